"""The papers' tables in the reports: copied without a slip, and ours beside them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import srpo, va_opd
from common.runs import atomic_write_json
from srpo.data import DATASETS


@pytest.mark.parametrize("name", va_opd.PAPER)
def test_va_opds_averages_follow_from_its_benchmarks(name):
    wemath, mathvista, mathverse, math_avg, *visual, visual_avg = va_opd.PAPER[name]
    assert np.mean([wemath, mathvista, mathverse]) == pytest.approx(math_avg, abs=0.051)
    assert np.mean(visual) == pytest.approx(visual_avg, abs=0.051)


def test_va_opds_gains_are_the_papers():
    gains = np.subtract(va_opd.PAPER["va_opd"], va_opd.PAPER["opd"])
    assert gains.round(1).tolist() == [3.3, 2.7, 2.8, 2.9, 2.5, 2.4, 0.6, 0.2, 1.7, 1.5]
    scaling = {name: np.diff(pairs)[:, 0].round(1).tolist() for name, (_, *pairs) in va_opd.SCALING.items()}
    assert scaling == {
        "geo3k_teacher_4b": [2.1, 0.8],
        "geo3k": [2.9, 1.5],
        "geo3k_teacher_32b": [3.7, 2.0],
        "virl39k": [3.8, 2.5],
    }
    _, (opd_math, va_math), (opd_visual, va_visual) = va_opd.SCALING["geo3k"]  # Table 2 has a row of Table 1
    for name, math_avg, visual_avg in (("opd", opd_math, opd_visual), ("va_opd", va_math, va_visual)):
        assert (va_opd.PAPER[name][3], va_opd.PAPER[name][9]) == (math_avg, visual_avg)


@pytest.mark.parametrize(
    ("experiment", "name"), [(e, n) for e in srpo.PAPER for n in ("base", "grpo", "sdpo", "srpo")]
)
def test_srpos_averages_follow_from_its_benchmarks(experiment, name):
    *each, average = ([float(x) for x in cell.split(" / ")] for cell in srpo.PAPER[experiment][name])
    assert np.mean(each, axis=0) == pytest.approx(average, abs=0.051)


def test_the_papers_columns_are_in_the_order_of_the_data_sets():
    base = dict(zip([*DATASETS, "average"], srpo.PAPER["qwen3_8b"]["base"], strict=True))
    assert base == {
        "chemistry": "41.1",
        "physics": "58.7",
        "biology": "30.5",
        "materials": "59.3",
        "tooluse": "57.9",
        "average": "49.5",
    }
    student = dict(zip(va_opd.COLUMNS, va_opd.PAPER["base"], strict=True))
    assert (student["WeMath"], student["MathVerse"], student["MMMU"], student["OCRB"]) == (36.8, 19.6, 49.1, 85.9)
    assert {name: benchmarks[0] for name, benchmarks in va_opd.COLUMNS.items() if len(benchmarks) == 1} == {
        "WeMath": "wemath",
        "MathVista": "mathvista",
        "MathVerse": "mathverse",
        "HallusB": "hallusionbench",
        "AI2D": "ai2d",
        "MMMU": "mmmu",
        "MMStar": "mmstar",
        "OCRB": "ocrbench",
    }


@pytest.mark.parametrize(
    ("experiment", "baseline", "gains"),
    [
        ("qwen3_8b", "grpo", [4.1, 4.8, 2.2, 3.7, 2.2]),
        ("qwen3_8b", "sdpo", [2.4, 4.4, 14.3, 4.9, 5.5]),
        ("qwen3_4b", "grpo", [4.4, 2.1, 10.3, 1.2, 4.1]),
        ("qwen3_4b", "sdpo", [5.4, 7.3, 11.8, 7.0, 5.9]),
    ],
)
def test_srpos_gains_after_ten_hours_are_the_papers(experiment, baseline, gains):
    ours, theirs = (
        [float(cell.split(" / ")[-1]) for cell in srpo.PAPER[experiment][name][:5]] for name in ("srpo", baseline)
    )
    assert np.subtract(ours, theirs).round(1).tolist() == gains


def test_ours_beside_the_papers_table():
    points = [(0.5, 0.60, [0.5, 0.7]), (4.0, 0.80, [0.7, 0.9]), (9.0, 0.70, [0.6, 0.8])]
    curve = [{"hours": h, "accuracy": a, "interval": i} for h, a, i in points]
    one = srpo._ours([curve], "69.2 / 81.8 / 83.0")
    assert one == "60.0 (-9.2) [50.0, 70.0] / 80.0 (-1.8) [70.0, 90.0] / 80.0 (-3.0) [70.0, 90.0] ended at 9.0 h"
    longer = [*curve, {"hours": 10.5, "accuracy": 0.1, "interval": [0.0, 0.2]}]
    assert srpo._ours([longer], "69.2 / 81.8 / 83.0") == one.removesuffix(" ended at 9.0 h")
    assert (
        srpo._ours([[{"hours": 0.0, "accuracy": 0.5, "interval": [0.4, 0.6]}]], "41.1") == "50.0 (+8.9) [40.0, 60.0]"
    )
    assert srpo._ours([curve], "41.1") == "60.0 (+18.9) [50.0, 70.0]"
    assert srpo._ours([curve] * 4, "").startswith("60.0 [55.0, 65.0] / ")  # four independent errors of 0.1: 0.05
    late = srpo._ours([curve, curve[1:]], "69.2 / 81.8 / 83.0")  # no checkpoint within the first hour: its place stays
    assert late.startswith(" / 80.0 (-1.8) [") and late.count(" / ") == 2
    assert srpo._ours([[{"hours": 11.0, "accuracy": 0.5, "interval": [0.4, 0.6]}]], "69.2 / 81.8 / 83.0") == ""


def curve_of(run: Path, questions: int) -> Path:
    """A run of SRPO with one checkpoint, after half an hour, that was asked so many questions."""
    dataset = run.parent.name.rpartition("-")[2]
    point = {"step": 5, "hours": 0.5, "accuracy": 0.6, "interval": [0.5, 0.7]}
    atomic_write_json(run / "eval/curve.json", {"curve": [point]})
    atomic_write_json(run / f"eval/checkpoint-5/{dataset}.json", {"questions": questions})
    return run


def test_a_part_of_srpos_test_problems_is_marked(tmp_path):
    """Of two data sets that were cut the average has both; a whole one is not marked."""
    asked = {name: subject.test for name, subject in DATASETS.items()} | {"physics": 20, "tooluse": 8}
    runs = {
        (name, "sdpo", "0"): curve_of(tmp_path / f"qwen3_8b-{name}" / "sdpo-seed0", count)
        for name, count in asked.items()
    }
    (row,) = [line for line in srpo.paper_table("qwen3_8b", runs).splitlines() if line.startswith("| SDPO |")]
    ours = [cell.split(" / ")[0].partition("] ")[2] for cell in row.split(" | ")[2::2]]
    short = "ended at 0.5 h"
    assert ours == [short, f"n=20 {short}", short, short, f"n=8 {short}", f"n=28 {short}"]


def test_another_experiment_has_no_difference_to_the_papers_model(tmp_path):
    for experiment in ("qwen3_4b", "mine"):
        run = curve_of(tmp_path / "srpo" / f"{experiment}-chemistry" / "srpo-seed0", 210)
        table = srpo.paper_table(experiment, {("chemistry", "srpo", "0"): run})
        (row,) = [line for line in table.splitlines() if line.startswith("| SRPO |")]
        paper, ours = row.split(" | ")[1:3]
        if experiment == "mine":
            assert paper == srpo.PAPER["qwen3_8b"]["srpo"][0]
            assert ours.startswith("60.0 [50.0, 70.0] ended at 0.5 h / ")
        else:
            assert paper == srpo.PAPER["qwen3_4b"]["srpo"][0]
            assert ours.startswith("60.0 (-8.8) [50.0, 70.0] ended at 0.5 h / ")
