"""A self-play run on a tiny model: its stages, refusals, kills. This file is also the program that gets killed."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import forks
import pytest
import yaml

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

from r_diverse_loops import empty_config, small  # noqa: E402

from common.runs import read_jsonl  # noqa: E402
from r_diverse import MemoryBank, loop  # noqa: E402
from r_diverse.loop import finished_iterations, main, run_path  # noqa: E402
from r_diverse.skills import Program  # noqa: E402
from r_diverse.train import parse  # noqa: E402


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """Folder of a run of two iterations."""
    out = tmp_path_factory.mktemp("finished")
    assert main(["--config", empty_config(out), *small(base, out, iterations=2)]) == 0
    return out / "r_diverse/small/r_diverse-seed0"


def again(base: Path, finished: Path, *more: str, **changes) -> int:
    out = finished.parents[2]
    return main(["--config", empty_config(out), *small(base, out, **{"iterations": 2, **changes}), *more])


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


def test_some_questions_are_there_to_be_read(finished):
    rows = read_jsonl(finished / "iteration_1/filter/audit.jsonl")
    kept = {row["question"] for row in read_jsonl(finished / "iteration_1/filter/solver_data.jsonl")}
    assert rows
    assert {row["question"] for row in rows} <= kept
    assert all(len(row["answers"]) == 3 and isinstance(row["exact"], int) for row in rows)


def test_a_finished_run_does_nothing_again(base, finished, capsys):
    before, manifest = digests(finished), (finished / "manifest.json").read_bytes()
    assert again(base, finished) == 0
    assert digests(finished) == before
    assert (finished / "manifest.json").read_bytes() == manifest  # it ended when it ended
    assert "iteration" not in capsys.readouterr().out


def test_another_iteration_goes_on(base, finished, tmp_path):
    ended = json.loads((finished / "manifest.json").read_text())["ended"]
    assert again(base, finished, iterations=3) == 0
    assert finished_iterations(finished) == 3
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["state"] == "done" and manifest["ended"] > ended
    assert yaml.safe_load((finished / "config.yaml").read_text())["iterations"] == 3
    assert loop.goal_of(finished, 1) == 4
    with pytest.raises(ValueError, match="more must be at least 1"):
        loop.goal_of(finished, 0)


def test_the_report_has_every_iteration(base, finished, capsys):
    from benchmarks import r_diverse as report

    assert report.main(["--config", empty_config(finished.parents[2]), *small(base, finished.parents[2])]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"Written to {finished.parent}: report.md, figures/\n")
    assert (finished.parent / "report.md").read_text() in text
    assert "| R-Diverse, iteration 2 | 1 |" in text
    assert "paper: R-Diverse" not in text and "so these results do not reproduce it" in text
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
    config = [] if "config" in changes else ["--config", empty_config(finished.parents[2])]
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


# --- other runs ---


def test_rounds_that_are_done_count_whatever_max_rounds_is(base, tmp_path):
    flags = small(base, tmp_path, candidates=8, min_questions=12, max_rounds=6, penalty="none", benchmarks="none")
    assert main(["--config", empty_config(tmp_path), *flags]) == 0
    folder = tmp_path / "r_diverse/small/no_penalty-seed0"
    assert (folder / "iteration_1/label_2/DONE.json").exists()
    before = digests(folder / "iteration_1")
    assert main(["--config", empty_config(tmp_path), *flags, "--max_rounds=1"]) == 0
    assert digests(folder / "iteration_1") == before


def test_the_base_is_asked_once_by_the_runs_of_a_seed(base, tmp_path, monkeypatch):
    flags = small(base, tmp_path, candidates=16)
    assert main(["--config", empty_config(tmp_path), *flags, "--penalty=none"]) == 0
    asked = []
    with_engine = loop.SelfPlay._with_engine
    monkeypatch.setattr(
        loop.SelfPlay, "_with_engine", lambda self, *a: asked.append(a[1].parent.name) or with_engine(self, *a)
    )
    settings = parse(["--config", empty_config(tmp_path), *flags, "--penalty=r_zero"])
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
    players[0]._evaluate(1, str(base))  # a Solver's answers are its own
    assert asked.pop() == "iteration_1"
    # One that has begun, other questions, another base: asked anew
    players[0].root = run_path(other.run).with_name("no_replay-seed0")
    (players[0].root / "iteration_0/evaluate/arithmetic").mkdir(parents=True)
    players[0]._evaluate(0, str(base))
    players[1].root = run_path(other.run).with_name("no_sam-seed0")
    players[1]._evaluate(0, str(base))
    players[1].base, players[1]._models = players[0].base, players[0]._models
    players[1].root = run_path(other.run).with_name("no_code-seed0")
    players[1]._evaluate(0, str(base))
    assert asked == ["iteration_0"] * 3


def test_too_few_questions_end_with_a_message(base, tmp_path, capsys):
    flags = small(base, tmp_path, low=0.99, high=1, min_questions=24, candidates=8, penalty="none")
    assert main(["--config", empty_config(tmp_path), *flags]) == 2
    assert "usable questions after 2 rounds of 8, 24 are needed" in capsys.readouterr().err
    folder = tmp_path / "r_diverse/small/no_penalty-seed0/iteration_1"
    rounds = [read_jsonl(folder / f"generate_{k}/samples.jsonl") for k in (1, 2)]
    assert rounds[0] != rounds[1]
    assert not (folder / "solver").exists()


def test_the_gate_and_the_alarm(base, tmp_path, capsys):
    flags = small(base, tmp_path, gate_samples=3, alarm="stop", alarm_duplicates=0.1, min_questions=1)
    assert main(["--config", empty_config(tmp_path), *flags]) == 2
    assert "collapse alarm" in capsys.readouterr().err
    folder = tmp_path / "r_diverse/small/gate-seed0/iteration_1"
    gated = read_jsonl(folder / "gate_1/labelled.jsonl")
    usable = [row for row in read_jsonl(folder / "label_1/labelled.jsonl") if row["drop"] is None]
    assert [row["id"] for row in gated] == [row["id"] for row in usable]
    assert {row["drop"] for row in gated} <= {None, "gate"}


def test_what_a_message_advises_is_the_same_run(base, tmp_path, capsys):
    flags = small(base, tmp_path, alarm="stop", alarm_duplicates=0.0, min_questions=1)
    assert main(["--config", empty_config(tmp_path), *flags]) == 2
    assert "--alarm warn goes on" in capsys.readouterr().err
    assert main(["--config", empty_config(tmp_path), *flags, "--alarm=warn", "--max_rounds=3"]) == 0


def test_questions_without_programs_end_the_run_before_the_solver(base, tmp_path, capsys, monkeypatch):
    encoder = loop.skill_encoder

    def failing(*arguments):
        made = encoder(*arguments)
        made.programs = lambda questions: [Program(None, "failed") for _ in questions]
        return made

    monkeypatch.setattr(loop, "skill_encoder", failing)
    assert main(["--config", empty_config(tmp_path), *small(base, tmp_path)]) == 2
    assert "iteration 1 has 0 questions with a solver program, 4 make a batch of the Solver" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse/small/r_diverse-seed0/iteration_1/solver").exists()


def test_a_path_with_blanks(base, tmp_path):
    out = tmp_path / "a folder with blanks"
    out.mkdir()
    assert main(["--config", empty_config(out), *small(base, out, penalty="r_zero", benchmarks="none")]) == 0
    counts = json.loads((out / "r_diverse/small/r_zero-seed0/iteration_1/filter/DONE.json").read_text())["counts"]
    assert (counts["bank"], counts["replayed"]) == (0, 0)


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
    log = tmp_path / "log.txt"
    assert forks.call([__file__, str(base), str(tmp_path)], log, tmp_path) == 0, log.read_text()[-5000:]
    report = json.loads(log.read_text().splitlines()[-1])
    assert report["codes"] == [0, 0]
    assert len(report["hit"]) >= 7
    assert {"challenger", "solver"} <= set(report["hit"])
    straight, killed = (digests(tmp_path / name / "r_diverse") for name in ("straight", "killed"))
    assert len(straight) > 40
    assert killed == straight


if __name__ == "__main__":
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    import sentence_transformers  # noqa: F401

    config = empty_config(folder)
    runs = [folder / name for name in ("straight", "killed")]
    commands = [["--config", config, *small(model, out, iterations=2)] for out in runs]
    _, status = os.waitpid(forked(commands[0]), 0)
    code, hit = killed_run(commands[1], runs[1] / "r_diverse/small/r_diverse-seed0", seed=0)
    print(json.dumps({"codes": [os.waitstatus_to_exitcode(status), code], "hit": hit}))
