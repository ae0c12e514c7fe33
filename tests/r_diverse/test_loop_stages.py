"""The stages between the phases: once each, what they label, drop, remember and replay; the collapse alarm."""

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.once import digest, once
from common.runs import read_jsonl
from r_diverse import RDiverseConfig, alarm, data, loop, votes
from r_diverse.skills import Program, SkillEncoder
from r_diverse.train import parse


def test_once_runs_a_stage_once(tmp_path):
    calls = []

    def work(folder):
        calls.append(1)
        (folder / "out.txt").write_text("x")
        return {"n": 1}

    folder = tmp_path / "iteration_1" / "stage"
    first = once(folder, {"a": "1"}, work)
    assert once(folder, {"a": "1"}, work) == first
    assert calls == [1]
    assert first["outputs"]["out.txt"]["bytes"] == 1
    with pytest.raises(ValueError, match="was made with a='1', now it is '2'"):
        once(folder, {"a": "2"}, work)


def test_a_finished_stage_is_its_outputs_alone(tmp_path):
    """What depends on when and how often it was started is in no digest; drafts and checkpoints go."""

    def work(folder):
        of_a_start = (".out.txt.draft", ".cache/part", "metrics.jsonl", "logs/server.log", "checkpoint-4/model")
        for name in ("out.txt", *of_a_start):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        return {}

    folder = tmp_path / "iteration_1" / "stage"
    assert list(once(folder, {}, work)["outputs"]) == ["out.txt"]
    left = {".cache", "DONE.json", "STARTED.json", "logs", "metrics.jsonl", "out.txt"}
    assert {path.name for path in folder.iterdir()} == left
    (record,) = read_jsonl(tmp_path / "stages.jsonl")
    assert (record["iteration"], record["stage"]) == ("iteration_1", "stage")
    (folder / "checkpoint-4").mkdir()  # of a kill while they were deleted
    once(folder, {}, work)
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("ours", [{}, {"a": "1", "b": "2"}])
def test_another_number_of_inputs_is_another_stage(tmp_path, ours):
    once(tmp_path / "1/stage", {"a": "1"}, lambda folder: {})
    with pytest.raises(ValueError, match="was made with"):
        once(tmp_path / "1/stage", ours, lambda folder: {})


@pytest.mark.parametrize("name", ["STARTED.json", "DONE.json"])
def test_a_marker_that_is_no_json_is_one_sentence(tmp_path, name):
    once(tmp_path / "1/stage", {}, lambda folder: {})
    (tmp_path / "1/stage" / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is no JSON .*: delete .*/1/stage to make it anew"):
        once(tmp_path / "1/stage", {}, lambda folder: {})


def test_every_file_of_a_stage_is_in_its_digest(tmp_path):
    digests = set()
    for i, texts in enumerate((("1", "1"), ("1", "2"), ("2", "1"))):

        def work(folder, texts=texts):
            for name, text in zip("ab", texts, strict=True):
                (folder / name).write_text(text)
            return {}

        digests.add(digest(once(tmp_path / f"{i}/stage", {}, work)))
    assert len(digests) == 3


def test_a_large_file_that_was_cut_after_its_stage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("common.once.SMALL", 4)
    folder = tmp_path / "1/stage"
    once(folder, {}, lambda folder: (folder / "weights").write_text("12345678") and {})
    (folder / "weights").write_text("12345")
    with pytest.raises(ValueError, match="is missing or has another size"):
        once(folder, {}, lambda folder: {})


def test_only_small_files_of_a_finished_stage_are_read_again(tmp_path, monkeypatch):
    """Weights would take minutes at each start: their size has to do."""
    monkeypatch.setattr("common.once.SMALL", 4)
    folder, files = tmp_path / "1/stage", {"weights": "12345", "counts": "1234"}

    def work(folder):
        for name, text in files.items():
            (folder / name).write_text(text)
        return {}

    done = once(folder, {}, work)
    (folder / "weights").write_text("54321")
    assert once(folder, {}, work) == done
    (folder / "counts").write_text("4321")
    with pytest.raises(ValueError, match="counts was changed after its stage had ended: delete .*1/stage to make it"):
        once(folder, {}, work)


def test_a_stage_that_failed_starts_again_from_the_same_inputs_only(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    folder = tmp_path / "iteration_1" / "stage"
    with pytest.raises(OSError, match="disk full"):
        once(folder, {"a": "1"}, fail)
    with pytest.raises(ValueError, match="was made with"):
        once(folder, {"a": "2"}, lambda folder: {})
    assert once(folder, {"a": "1"}, lambda folder: {"n": 2})["counts"] == {"n": 2}


# --- labels and the gate ---


def test_late_comparisons_are_remembered_both_ways(monkeypatch):
    from r_diverse import data

    asked, now, waited = [], [0.0], []

    def slow(first, second, timeout):
        asked.append((first, second))
        now[0] += timeout if "sum" in first + second else 0.0
        return False

    monkeypatch.setattr(data, "same_answer", slow)
    monkeypatch.setattr(data, "_late", set())
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(data, "ready_to_compare", lambda: waited.append(1))
    assert not any([data.same("sum", "1"), data.same("1", "sum"), data.same("sum", "1"), data.same("1", "2")])
    assert asked == [("sum", "1"), ("1", "2")]
    assert len(waited) == 1  # for the process that takes the place of the one that was killed


class Asked:
    """An engine that gives each question its replies in turn, and keeps the seeds."""

    name = "asked"

    def __init__(self, replies):
        self.replies, self.seeds = {question: iter(texts) for question, texts in replies.items()}, []

    def generate(self, prompts, decoding, seeds):
        from common.evaluation import Completion

        self.seeds += seeds
        return [Completion(next(self.replies[prompt.messages[-1]["content"]]), 1, "stop") for prompt in prompts]


def test_labels_and_gate_follow_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ready_to_compare", lambda: None)  # numbers are compared here
    fields = ["--m_label=4", "--m_reward=7", "--low=0.2", "--high=0.5", "--r_zero_words=false", "--gate_samples=2"]
    run, votes = parse(["--model=m", *fields]).run, {"a box": "1122", "most": "1112", "each": "1234"}
    raw = [{"sample": i, "response": f"<question>{q}</question>\\boxed{{1}}"} for i, q in enumerate(votes)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in raw))

    def asked(votes):
        return Asked({q: [f"\\boxed{{{vote}}}" for vote in row] for q, row in votes.items()})

    data.label(tmp_path, asked(votes), run, tmp_path / "raw.jsonl")
    rows = read_jsonl(tmp_path / "labelled.jsonl")
    assert ["".join(row["answers"]) for row in rows] == list(votes.values())
    assert [row["drop"] for row in rows] == [None, "high_consistency", None]
    (tmp_path / "gate").mkdir()
    counts = data.gate(tmp_path / "gate", asked({"a box": "11", "each": "23"}), run, tmp_path / "labelled.jsonl")
    rows = read_jsonl(tmp_path / "gate/labelled.jsonl")
    assert [(row["drop"], row["gate_consistency"]) for row in rows] == [(None, 1.0), ("gate", 0.5)]
    assert counts == {"questions": 2, "usable": 1}


def test_stages_have_seeds_of_their_own_in_every_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ready_to_compare", lambda: None)
    seeds = []
    for seed in (0, 5):
        fields = ["--candidates=6", "--m_label=3", "--gate_samples=3", "--high=1", "--challenger_user=new"]
        run, folder = parse(["--model=m", f"--seed={seed}", *fields]).run, tmp_path / str(seed)
        engine = Asked({"new": ["<question>1+1</question>\\boxed{2}"] * 6, "1+1": ["\\boxed{2}"] * 36})
        for name in ("generate", "label", "gate"):
            (folder / name).mkdir(parents=True)
        data.generate(folder / "generate", engine, run, "iteration 1, round 1")
        data.label(folder / "label", engine, run, folder / "generate/samples.jsonl")
        data.gate(folder / "gate", engine, run, folder / "label/labelled.jsonl")
        seeds += engine.seeds
    assert len(seeds) == len(set(seeds)) == 2 * (6 + 18 + 18)


@pytest.mark.parametrize(("wanted", "rounds"), [(1, 2), (6, 3)])
def test_rounds_go_on_until_the_solver_has_a_batch(tmp_path, monkeypatch, wanted, rounds):
    """Two usable questions a round; a generation batch of the Solver has four. The gate asks the base."""
    fields = [f"--min_questions={wanted}", "--gate_samples=2", "--solver.per_device_train_batch_size=5"]
    player, asked = loop.SelfPlay(parse(["--model=base", *fields]), tmp_path, "digest"), []
    monkeypatch.setattr(player, "_stage", lambda t, name, inputs, work: work(Path(name)))
    monkeypatch.setattr(
        player, "_with_engine", lambda model, folder, *_: asked.append((folder.name, model)) or {"outputs": {}}
    )
    monkeypatch.setattr(data, "usable", lambda files: [{}] * 2 * len(files))
    player._questions(1, "solver", "opponent")
    author = str(tmp_path / "iteration_1/challenger/model")
    models = {"generate": author, "label": "solver", "gate": "base"}
    assert asked == [(f"{name}_{k + 1}", model) for k in range(rounds) for name, model in models.items()]


def test_a_stage_is_bound_to_all_that_it_was_made_from(tmp_path, monkeypatch):
    """So that one which is made anew is refused with those after it, instead of mixed with them."""
    fields = ["--iterations=2", "--gate_samples=2", "--alarm=off"]
    player, seen = loop.SelfPlay(parse(["--model=m", *fields]), tmp_path, "base"), {}

    def result(t: int, name: str) -> dict:
        return {"outputs": {"file": {"sha256": f"{t} {name}"}}}

    def stage(t: int, name: str, inputs: dict, work) -> dict:
        seen[t, name] = inputs
        return result(t, name)

    monkeypatch.setattr(player, "_stage", stage)
    monkeypatch.setattr(loop, "read_counts", lambda folder: {"current": 9999, "replayed": 0})
    monkeypatch.setattr(data, "usable", lambda files: [{}] * 9999)
    bank = SimpleNamespace(before=lambda t: SimpleNamespace(fingerprint=lambda: f"bank before {t}"))
    monkeypatch.setattr(loop, "MemoryBank", lambda path: bank)
    player.run()
    challenger = solver = "base"
    expected = {(0, "evaluate"): {"solver": "base"}}
    for t in (1, 2):
        made = {name: digest(result(t, name)) for _, name in seen}
        past = {"bank": f"bank before {t}"}
        expected |= {
            (t, "challenger"): {"challenger": challenger, "solver": solver, **past},
            (t, "generate_1"): {"challenger": made["challenger"]},
            (t, "label_1"): {"outputs": made["generate_1"], "solver": solver},
            (t, "gate_1"): {"labels": made["label_1"], "base": "base"},
            (t, "embed"): {"labels": [made["gate_1"]]},
            (t, "filter"): {"embeddings": made["embed"], "labels": [made["gate_1"]], **past},
            (t, "solver"): {"solver": solver, "questions": made["filter"]},
            (t, "evaluate"): {"solver": made["solver"]},
        }
        challenger, solver = made["challenger"], made["solver"]
    assert seen == expected


@pytest.mark.parametrize(("gate_samples", "rounds"), [(0, 2), (3, 1)])
def test_a_round_is_finished_with_its_last_stage(tmp_path, gate_samples, rounds):
    for name in ("label_1", "gate_1", "label_2"):
        once(tmp_path / f"iteration_1/{name}", {}, lambda folder: {})
    player = loop.SelfPlay(parse(["--model=m", f"--gate_samples={gate_samples}"]), tmp_path, "digest")
    assert player._finished_rounds(1) == rounds


def test_labels_of_hostile_answers_are_bounded_and_counted(tmp_path, monkeypatch):
    from common.evaluation import Completion
    from common.runs import write_jsonl
    from r_diverse import data

    monkeypatch.setattr(votes, "QUESTION_SECONDS", 0.0)
    run = parse(["--model=m", "--m_label=3"]).run
    write_jsonl(tmp_path / "raw.jsonl", [{"sample": 0, "response": "<question>q</question>\\boxed{1}"}])
    engine = SimpleNamespace(name="e", generate=lambda p, d, s: [Completion(f"\\boxed{{{i}}}", 1, "stop") for i in s])
    counts = data.label(tmp_path, engine, run, tmp_path / "raw.jsonl")
    assert (counts["questions"], counts["late"]) == (1, 1)


def test_each_label_has_a_budget_of_its_own(tmp_path, monkeypatch):
    """One comparison spends it; that of the next question is made all the same."""
    now = [0.0]

    def slow(first, second):
        now[0] += 5.0
        return True

    monkeypatch.setattr(data, "ready_to_compare", lambda: None)
    monkeypatch.setattr(data, "same", slow)
    monkeypatch.setattr(votes, "QUESTION_SECONDS", 4.0)
    monkeypatch.setattr(votes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = parse(["--model=m", "--m_label=2", "--high=1", "--gate_samples=2"]).run
    raw = [{"sample": i, "response": f"<question>{q}</question>\\boxed{{1}}"} for i, q in enumerate("ab")]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in raw))
    for name, source in (("label", tmp_path / "raw.jsonl"), ("gate", tmp_path / "label/labelled.jsonl")):
        (tmp_path / name).mkdir()
        engine = Asked({q: ["\\boxed{1}", "\\boxed{2}"] for q in "ab"})
        counts = getattr(data, name)(tmp_path / name, engine, run, source)
        assert "late" not in counts
    rows = read_jsonl(tmp_path / "gate/labelled.jsonl")
    assert [(row["consistency"], row["gate_consistency"]) for row in rows] == [(1.0, 1.0), (1.0, 1.0)]


class Refusing:
    """A server that refuses the prompt of one question, which is too long for it."""

    name = "refusing"

    def generate(self, prompts, decoding, seeds):
        from common.evaluation import Completion

        texts = [prompt.messages[-1]["content"] for prompt in prompts]
        return [Completion(*("", 0, "refused") if text == "long" else ("\\boxed{1}", 1, "stop")) for text in texts]


def test_a_question_that_the_solver_or_the_base_cannot_be_asked_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ready_to_compare", lambda: None)
    run = parse(["--model=m", "--m_label=2", "--high=1", "--gate_samples=2"]).run
    raw = [{"sample": i, "response": f"<question>{q}</question>\\boxed{{1}}"} for i, q in enumerate(("long", "short"))]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in raw))
    data.label(tmp_path, Refusing(), run, tmp_path / "raw.jsonl")
    rows = read_jsonl(tmp_path / "labelled.jsonl")
    assert [(row["question"], row["answer"], row["drop"]) for row in rows] == [
        ("long", None, "no_answer"),
        ("short", "1", None),
    ]
    usable = [{**row, "answer": "1", "drop": None} for row in rows]  # as if only the base had no room for it
    (tmp_path / "usable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in usable))
    (tmp_path / "gate").mkdir()
    data.gate(tmp_path / "gate", Refusing(), run, tmp_path / "usable.jsonl")
    assert [row["drop"] for row in read_jsonl(tmp_path / "gate/labelled.jsonl")] == ["gate", None]


# --- programs, filter, memory and replay ---


def test_candidates_without_an_answer_of_the_coder_come_again(tmp_path):
    """As outputs and labels do: a later stage would drop them for good."""
    lost, asked = {"3+4"}, []

    class Table:
        name, dim = "table", 2

        def write(self, questions):
            asked.append(sorted(questions))
            return [Program(None, "engine") if q in lost else Program(q) for q in questions]

        def encode(self, texts):
            return np.eye(2)[[len(text) % 2 for text in texts]]

    rows = [{"question": q} for q in ("1+2", "3+4", "12-5", "3+4")]
    folder = tmp_path / "embed"
    skills = SkillEncoder(Table(), Table(), tmp_path / "programs")
    message = "2 of 4 questions have no program because requests to table failed; the same command goes on here"
    with pytest.raises(ConnectionError, match=message):
        once(folder, {}, lambda folder: data.embed(folder, skills, rows))
    assert not (folder / "DONE.json").exists()
    lost.clear()
    done = once(folder, {}, lambda folder: data.embed(folder, skills, rows))
    assert asked == [["1+2", "12-5", "3+4"], ["3+4"]]
    assert done["counts"]["ok"] == 4


def test_vectors_that_do_not_fit_the_disk_end_their_stage(tmp_path, monkeypatch):
    """Written by numpy itself they were cut without a word, and the next stage could not read them."""

    class Table:
        name, dim = "table", 700

        def write(self, questions):
            return [Program(q) for q in questions]

        def encode(self, texts):
            return np.eye(700)[[0 for _ in texts]]

    skills = SkillEncoder(Table(), Table(), tmp_path / "programs")
    skills.embed(skills.programs(["1+2"]))  # into its cache

    def embed(folder):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # stands for the disk
        try:
            return data.embed(folder, skills, [{"question": "1+2"}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(OSError, match="File too large"):
        once(tmp_path / "embed", {}, embed)
    assert not (tmp_path / "embed" / "DONE.json").exists()


@pytest.mark.parametrize(("fields", "kept"), [({}, 3), ({"measure": "question_text"}, 4), ({"penalty": "r_zero"}, 4)])
def test_a_question_without_a_program_is_lost_where_vectors_are_compared_only(tmp_path, fields, kept):
    rows = [
        {"question": f"{i}+{i}", "answer": str(2 * i), "consistency": 0.5, "own_answer": "", "answers": []}
        for i in range(4)
    ]
    embedded = tmp_path / "embed"

    def embed(folder):
        vectors = np.eye(4)
        vectors[1] = np.nan
        np.save(folder / "embeddings.npy", vectors)
        return {"encoder": "table"}

    once(embedded, {}, embed)
    (tmp_path / "filter").mkdir()
    run = RDiverseConfig("m", **fields)
    counts = data.select(tmp_path / "filter", run, 1, rows, embedded, tmp_path / "bank")
    assert counts["current"] == kept
    assert counts["bank"] == (0 if run.penalty == "r_zero" else kept)
    questions = {row["question"] for row in read_jsonl(tmp_path / "filter/solver_data.jsonl")}
    assert ("1+1" in questions) == (kept == 4)


@pytest.mark.parametrize(("fraction", "replayed"), [(0.0, 0), (0.5, 4)])
def test_the_replayed_share_is_the_configs_and_rows_and_order_are_the_seeds(tmp_path, fraction, replayed):
    rows = [
        {"question": f"{i}+{i}", "answer": str(2 * i), "consistency": 0.5, "own_answer": "", "answers": []}
        for i in range(8)
    ]
    made = []
    for seed in (0, 1):
        run, root = RDiverseConfig("m", replay_fraction=fraction, seed=seed), tmp_path / str(seed)
        for t, new in ((1, rows), (2, rows[:4])):
            folder, embedded = root / f"{t}/filter", root / f"{t}/embed"
            folder.mkdir(parents=True)
            vectors = np.eye(8)[: len(new)]
            once(embedded, {}, lambda path, v=vectors: np.save(path / "embeddings.npy", v) or {"encoder": "table"})
            counts = data.select(folder, run, t, new, embedded, root / "bank")
        assert counts["replayed"] == replayed
        made.append([(row["iteration"], row["question"]) for row in read_jsonl(folder / "solver_data.jsonl")])
    assert made[0] != made[1]
    assert (set(made[0]) == set(made[1])) == (not replayed)


def test_new_and_replayed_questions_are_told_apart(tmp_path):
    """The first iteration's labels are right, two of the second's four are wrong, and its first has no program."""
    run = RDiverseConfig("m", replay_fraction=0.5)
    for t, answers in ((1, "1234"), (2, "2300")):
        rows = [
            {"question": f"{i}+{t}", "answer": a, "consistency": 0.5, "own_answer": "", "answers": []}
            for i, a in enumerate(answers)
        ]
        vectors, folder, embedded = np.eye(4), tmp_path / f"{t}/filter", tmp_path / f"{t}/embed"
        vectors[: t - 1] = np.nan
        folder.mkdir(parents=True)
        once(embedded, {}, lambda path, v=vectors: np.save(path / "embeddings.npy", v) or {"encoder": "table"})
        counts = data.select(folder, run, t, rows, embedded, tmp_path / "bank")
    assert (counts["current"], counts["replayed"], counts["replayed_from"]) == (3, 3, {"1": 3})
    assert counts["label_accuracy"] == pytest.approx(1 / 3)  # of the new ones: those replayed were counted before
    mixed = read_jsonl(folder / "solver_data.jsonl")
    assert all(row["question"].endswith(f"+{row['iteration']}") for row in mixed)
    assert sorted(row["iteration"] for row in mixed) == [1, 1, 1, 2, 2, 2]
    audit = read_jsonl(folder / "audit.jsonl")
    assert [(row["question"], row["exact"]) for row in audit] == [("1+2", 3), ("2+2", 4), ("3+2", 5)]


def test_the_share_of_right_labels_is_of_the_questions_whose_value_is_known():
    rows = [{"question": "1+1", "answer": "2"}, {"question": "Which one?", "answer": "2"}]
    assert data.label_accuracy(rows) == 1.0


# --- the alarm ---


def test_the_alarm_knows_repeats_and_yields():
    run = parse(["--model=m", "--alarm=warn"]).run
    distinct, repeated = np.eye(8), np.ones((8, 8)) / 8**0.5
    assert alarm.check(run, 1, [distinct], 8) is None
    assert "of the questions of iteration 1 repeat another" in alarm.check(run, 1, [repeated], 8)
    assert "repeat one of an earlier" in alarm.check(run, 2, [distinct, distinct], 8)
    assert "repeat one of an earlier" in alarm.check(run, 3, [distinct[:4], distinct[4:], distinct[:4]], 4)
    assert "only 8 of 8000" in alarm.check(run, 1, [distinct], 8000)
    assert alarm.check(run, 1, [distinct], 8, labels=0.0, entropy=0.0) is None  # off by default
    strict = parse(["--model=m", "--alarm=warn", "--alarm_labels=0.5", "--alarm_entropy=0.1"]).run
    assert "only 40% of the labels" in alarm.check(strict, 1, [distinct], 8, labels=0.4, entropy=1.0)
    assert "entropy has fallen to 0.050" in alarm.check(strict, 1, [distinct], 8, labels=0.6, entropy=0.05)
    assert alarm.check(strict, 1, [distinct], 8, labels=None, entropy=None) is None


def test_the_alarm_sees_all_rounds_and_the_end_of_the_phase(tmp_path, monkeypatch):
    for t in (1, 2):
        vectors = np.eye(4)[:t]
        vectors[0] = np.nan
        folder = tmp_path / f"iteration_{t}"
        once(folder / "embed", {}, lambda path, v=vectors: np.save(path / "embeddings.npy", v) or {})
        once(folder / "filter", {}, lambda path: {"label_accuracy": 0.5})
    (folder / "challenger").mkdir()
    lines = [{"entropy": 1.0}, {"entropy": 0.25}, {"train_runtime": 9.0}]
    (folder / "challenger/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    monkeypatch.setattr(alarm, "check", lambda *given: seen.append(given))
    player = loop.SelfPlay(parse(["--model=m", "--alarm=warn", "--candidates=100"]), tmp_path, "digest")
    player._alarm(2, 3)
    ((_, t, embeddings, *figures),) = seen
    assert (t, [len(rows) for rows in embeddings], figures) == (2, [0, 1], [300, 0.5, 0.25])


def test_the_alarm_knows_one_giant_cluster():
    """64 vectors with pairwise cosine 0.7: no two are repeats, and P_rep is 1 for each."""
    rows = np.hstack([np.full((64, 1), 0.7**0.5), np.eye(64) * 0.3**0.5])
    run = parse(["--model=m", "--alarm=warn"]).run
    problem = alarm.check(run, 1, [rows], 64)
    assert problem == "100% of the questions of iteration 1 are one skill cluster, median cosine 0.70"
    assert alarm.check(parse(["--model=m", "--alarm_cluster=1"]).run, 1, [rows], 64) is None
    assert alarm.check(parse(["--model=m", "--alarm_yield=0"]).run, 1, [rows[:0]], 64) is None
