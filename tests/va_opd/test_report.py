"""Tables and figures of VA-OPD from records of runs."""

import itertools
import json

import pytest

from benchmarks import va_opd as report
from common.estimators import mean_of_independent
from common.evaluation import BENCHMARKS, load_benchmark, score_responses
from common.runs import atomic_write_json, write_jsonl
from va_opd import train


def test_the_report_shows_the_last_checkpoint_beside_the_chosen_one(tmp_path, config):
    args, _ = train.parse(["--config", str(config)])
    scores = {"opd": {4: [1, 0, 0, 0], 12: [0, 0, 0, 1]}, "va_opd": {4: [1, 1, 1, 0], 12: [1, 1, 0, 0]}}
    for name, by_step in scores.items():
        out = tmp_path / f"{name}-seed0" / "eval"
        atomic_write_json(out / "selection.json", {"accuracy": dict.fromkeys(map(str, by_step), 0.5), "best": 4})
        for step, values in by_step.items():
            records = [{"id": str(i), "sample": 0, "score": value} for i, value in enumerate(values)]
            write_jsonl(out / f"checkpoint-{step}" / "digits" / "scored.jsonl", records)
    last = {name: report.last_checkpoint_scores(tmp_path / f"{name}-seed0", args) for name in scores}
    assert last["va_opd"] == [[1], [1], [0], [0]]
    assert report.last_checkpoint_scores(tmp_path, args) is None and report.selection_line({}) == ""
    best = {name: {"true": [[v] for v in by_step[4]]} for name, by_step in scores.items()}
    chosen, plain = report.difference_line(best, last).split("\n\n")
    assert "(checkpoint chosen on these problems): +0.500" in chosen and "last checkpoints: +0.250" in plain
    assert report.difference_line(best, {}).startswith("VA-OPD minus Standard OPD on the same problems: +0.500")


def test_accuracy_over_hours_says_when_va_opd_has_what_opd_ends_with(tmp_path):
    """Steps sort as numbers; a run without a choice of the checkpoint has no curve."""
    accuracy = {"opd": {"50": 0.3, "100": 0.4}, "va_opd": {"100": 0.45, "50": 0.41}, "sft": None}
    runs = {name: tmp_path / name for name in accuracy}
    for name, values in accuracy.items():
        if values:
            hours = {step: int(step) / 20 for step in values}
            atomic_write_json(runs[name] / "eval/selection.json", {"accuracy": values, "best": 50, "hours": hours})
    curves = report.accuracy_by_hours(runs, {"base": {"true": [[0, 0, 0, 1]]}})
    assert {name: [tuple(point.values()) for point in points] for name, points in curves.items()} == {
        "opd": [(0.0, 0.25), (2.5, 0.3), (5.0, 0.4)],
        "va_opd": [(0.0, 0.25), (2.5, 0.41), (5.0, 0.45)],
    }
    said = report.hours_line(curves)
    assert said.startswith("Standard OPD ends at 0.400 after 5 h of training, and VA-OPD has that after 2.5 h. In")
    low = {**curves, "va_opd": curves["va_opd"][:1]}
    assert "and no checkpoint of VA-OPD has that. In" in report.hours_line(low)
    fallen = {**curves, "opd": [{"hours": 5.0, "accuracy": 0.2}]}  # below the base student
    assert "and VA-OPD has that after 2.5 h. In" in report.hours_line(fallen)
    assert report.hours_line({"opd": curves["opd"]}) == "" and report.accuracy_by_hours({}, {}) == {}


def test_tables_of_the_benchmarks_stand_beside_the_papers(vision_data, tmp_path, monkeypatch):
    """Scores by hand: of 8 questions OPD has 4 right and VA-OPD 6 on MMStar; HallusionBench 1/3 and 1."""
    folder = tmp_path / "geo3k"
    right = {"opd": ([1, 1, 1, 1, 0, 0, 0, 0], ["yes"] * 8), "va_opd": ([1, 1, 1, 1, 1, 1, 0, 0], ["no", "yes"] * 4)}
    for name, (letters, words) in right.items():
        texts = {"mmstar": ["A" if one else "B" for one in letters], "hallusionbench": words}
        for benchmark, answers in texts.items():
            lines = [json.dumps({"id": i, "sample": 0, "response": text}) + "\n" for i, text in enumerate(answers)]
            path = tmp_path / f"{name}-{benchmark}.jsonl"
            path.write_text("".join(lines))
            score_responses(load_benchmark(benchmark, vision_data), path, folder / f"{name}-seed0" / "eval")
    results = report.vision_results(folder, 0)
    assert results["va_opd"].keys() == {"mmstar", "hallusionbench"}
    value, low, high, _ = report.mean_score(results, "va_opd", ("mmstar",))
    assert (value, results["va_opd"]["mmstar"].low) == (75.0, pytest.approx(low)) and high > 75
    rows = [line.split(" | ") for line in report.paper_table("geo3k", results).splitlines()]
    lines = {cells[0].strip("| "): cells for cells in rows}
    assert len(lines["VA-OPD"]) == 21 and lines["VA-OPD"][16].startswith("75.0 (+15.1) [")
    assert lines["Standard OPD"][10].startswith("33.3 (-18.7) [") and lines["GRPO"][16] == ""
    assert "| 75.0 [" in report.paper_table("virl39k", results)  # of other data, so no difference to Table 1
    table = report.vision_differences(folder, 0, results)
    assert "| MMStar | +0.2 | +25.0 | [" in table and "| HallusB | +2.5 | +66.7 | [" in table
    assert "| MMMU | +0.6 |  |  |  |" in table and "| Visual | +1.5 |  |  |  |" in table
    assert report.vision_differences(folder, 0, {"va_opd": results["va_opd"]}) == ""
    monkeypatch.setattr(report, "COLUMNS", {"both": ("mmstar", "hallusionbench")})
    (both,) = report.vision_differences(folder, 0, results).splitlines()[2:]
    runs = [folder / f"{name}-seed0" / "eval" for name in ("va_opd", "opd")]
    parts = [report.vision_difference(*runs, name)[:3] for name in ("mmstar", "hallusionbench")]
    value, low, high = (100 * number for number in mean_of_independent(parts))
    assert value == pytest.approx((25 + 200 / 3) / 2) and f"| +45.8 | [{low:+.1f}, {high:+.1f}] |  |" in both
    value, low, high, _ = report.mean_score(results, "va_opd", ("hallusionbench", "mmstar"))
    assert value == pytest.approx((75 + 100) / 2) and low < value <= high
    assert report.scaling_table(tmp_path, 0) == ""  # of neither mean


def test_the_papers_second_table_is_there_with_a_mean_of_ours(tmp_path):
    """A mean of Standard OPD alone fills no cell."""
    for name, score in (("opd", 0.4), ("va_opd", 0.5)):
        for benchmark in report.MATH:
            assert report.scaling_table(tmp_path, 0) == ""
            metrics = {"questions": BENCHMARKS[benchmark].rows, "avg@k": score}
            metrics["interval"] = [score - 0.1, score + 0.1]
            atomic_write_json(tmp_path / f"geo3k/{name}-seed0/eval/{benchmark}.json", metrics)
    table = report.scaling_table(tmp_path, 0)
    assert "| 8B -> 2B, Geometry3K | 45.4 -> 48.3 (+2.9) | 40.0 -> 50.0 (+10.0) | 64.6 -> 66.1 (+1.5) |  |" in table
    assert "| 8B -> 2B, ViRL39K | 46.4 -> 50.2 (+3.8) |  | 65.5 -> 68.0 (+2.5) |  |" in table
    atomic_write_json(tmp_path / "geo3k/va_opd-seed0/eval/wemath.json", {**metrics, "questions": 60})
    assert "| 40.0 -> 50.0 n=60 (+10.0) |" in report.scaling_table(tmp_path, 0)  # a part of the set


def test_a_training_that_is_shorter_than_the_papers_is_named(tmp_path):
    def trained(name: str, experiment: str = "geo3k", **settings) -> None:
        atomic_write_json(tmp_path / experiment / f"{name}-seed0/manifest.json", {"config": settings})

    folder = tmp_path / "geo3k"
    trained("opd", limit=None)
    trained("va_opd", limit=None, max_steps=655, num_train_epochs=6.0)
    trained("kd", limit=None, max_steps=163)  # one response a prompt: a quarter of the updates
    assert report.shorter_line(folder, 0) == ""
    trained("va_opd", limit=None, max_steps=50)
    trained("kd", limit=None, max_steps=162)
    trained("grpo", limit=100, num_train_epochs=1.0)
    said = report.shorter_line(folder, 0)
    assert said == (
        "Trained for less than the paper's 5 epochs of all problems in geo3k: Off-policy KD (max_steps=162); "
        "GRPO (num_train_epochs=1.0, limit=100); VA-OPD (max_steps=50)."
    )
    assert report.shorter_line(folder, 1) == ""
    assert f"\n\n{said}" in report.beside_paper(folder, 0, {})
    trained("opd", "virl39k", limit=None, max_steps=655)
    other = report.shorter_line(tmp_path / "virl39k", 0)
    assert other.endswith("in virl39k: Standard OPD (max_steps=655).")
    metrics = {"questions": 1, "avg@k": 0.5, "interval": [0.4, 0.6]}
    for name, benchmark in itertools.product(("opd", "va_opd"), report.MATH):
        atomic_write_json(folder / f"{name}-seed0/eval/{benchmark}.json", metrics)
    assert report.scaling_table(tmp_path, 0).endswith(f"\n\n{said}\n\n{other}")
    assert "Trained for less" not in report.beside_paper(tmp_path / "mine", 0, {}).partition("Table 2")[0]
