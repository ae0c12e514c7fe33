"""Tables and figures of SRPO from records of runs."""

import json
import shutil

from training_runs import choices

from benchmarks import srpo as report
from benchmarks.estimates import decodings
from common.runs import read_jsonl
from srpo import train


def test_the_shares_of_the_answer_letters_are_logged_and_reported(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = ["--config", str(config), "--dataset", "biology", "--data", str(choices(tmp_path)), "--max_steps", "2"]
    assert train.main([*fields, "--max_completion_length", "1"]) == 0  # one character is a whole answer
    run = tmp_path / "runs/srpo/small-biology/srpo-seed0"
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    for line in lines:
        shares = [line[f"letter/{letter}"] for letter in "ABCD"]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) <= 1 + 1e-9
    table = report.letter_table({("srpo", "0"): run})
    expected = " | ".join(f"{lines[0][f'letter/{x}']:.2f}, {lines[-1][f'letter/{x}']:.2f}" for x in "ABCD")
    assert f"| SRPO | {expected} |" in table


def test_steps_are_counted_in_generation_batches(tmp_path):
    """A run of four optimizer steps a batch stands beside the others by batches, and so do its seconds."""
    config = {"steps_per_generation": 8, "gradient_accumulation_steps": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40, "step_time": 3.0, "reward": 0.5}) + "\n")
    for more, step, seconds in (({}, 10, 12.0), ({"num_iterations": 2}, 5, 24.0)):  # the latter: each batch twice
        (tmp_path / "manifest.json").write_text(json.dumps({"config": config | more}))
        assert report._metrics(tmp_path) == [{"step": step, "step_time": seconds, "reward": 0.5}]


def test_seconds_of_a_step_within_the_budgets(tmp_path):
    """By hand: of GRPO, whose batches have four steps, and SRPO on two data sets, one without a line in 1 h."""

    def run(dataset, name, points):
        folder = tmp_path / dataset / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "train_seconds": seconds}) for step, seconds in points]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        config = {"steps_per_generation": 4 if name == "grpo" else 1, "gradient_accumulation_steps": 1}
        (folder / "manifest.json").write_text(json.dumps({"config": config}))
        return {(dataset, name, "0"): folder}

    runs = run("physics", "grpo", [(40, 700.0), (400, 9000.0)])
    runs |= run("physics", "srpo", [(10, 800.0), (30, 3600.0), (100, 9000.0)])
    runs |= run("biology", "srpo", [(50, 5000.0), (1000, 40000.0)])
    table = report.seconds_table("qwen3_8b", runs).splitlines()
    assert "| GRPO | 71.0 / 82.4 / 91.5 | 70.0 / 90.0 / 90.0 | 1 |" in table
    assert "| SRPO | 83.4 / 78.3 / 75.8 |  / 95.0 / 95.0 | 2 |" in table
    assert "| GRPO |  | 70.0 / 90.0 / 90.0 | 1 |" in report.seconds_table("mine", runs)
    assert report.seconds_table("mine", {}) == ""


def test_the_report_says_what_the_records_say(evaluated, tmp_path):
    """Not the settings of its own command line; and that evaluations differ."""
    _, folder = evaluated
    files = {"base": report._metrics_file(folder, "additions")}
    assert decodings(files, "problems") == "40 problems, 2 samples each at temperature 1.0, top-p 0.95"
    other = shutil.copytree(folder, tmp_path / "grpo")
    path = other / "eval/base/additions.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 0.6'))
    assert decodings({**files, "GRPO seed 0": path}, "problems") == (
        "Evaluated in different ways, so that accuracies do not compare: base: 40 problems, 2 samples each at "
        "temperature 1.0, top-p 0.95; GRPO seed 0: 40 problems, 2 samples each at temperature 0.6, top-p 0.95"
    )
