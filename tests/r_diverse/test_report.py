"""The result table beside the paper's: averages as the paper defines them, differences, intervals, empty cells."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import r_diverse as report
from common.evaluation import BENCHMARKS
from common.runs import write_jsonl

TEN = (*report.MATH, *report.GENERAL)
FULL = [(e, key) for e, table in report.PAPER.items() for key, row in table.items() if len(row) > 2]
SCORES = {name: 0.2 + 0.06 * i for i, name in enumerate(TEN)}


def evaluated(
    run: Path, iterations: dict[int, dict[str, float]], questions: int | None = None, temperature: float = 1.0
) -> Path:
    """A run folder with the metrics of its evaluations; intervals of 10 points below and 20 above."""
    for t, scores in iterations.items():
        folder = run / f"iteration_{t}" / "evaluate"
        folder.mkdir(parents=True)
        (folder / "DONE.json").write_text("{}")
        for name, score in scores.items():
            metrics = {"questions": questions or BENCHMARKS[name].rows, "avg@k": score}
            metrics["interval"] = [score - 0.1, score + 0.2]
            metrics |= {"samples": 32, "decoding": {"temperature": temperature, "top_p": 1.0}}
            (folder / f"{name}.json").write_text(json.dumps(metrics))
    return run


def rows(experiment: str, runs: dict) -> dict[str, list[str]]:
    """Cells of the table by the name of their row, which is there once."""
    lines = report.paper_table(experiment, runs).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["run", "Math AVG", "Overall AVG", *TEN]
    assert len({row[0] for row in cells}) == len(cells) and {len(row) for row in cells} == {13}
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize(("experiment", "key"), FULL)
def test_the_papers_averages_follow_from_its_benchmarks(experiment, key):
    math_avg, overall, *each = report.PAPER[experiment][key]
    found = [report.Estimate(value, value, value) for value in each]
    assert report.mean_of(found[:7]).value == pytest.approx(math_avg, abs=0.011)
    assert report.mean_of([report.mean_of(found[:7]), *found[7:]]).value == pytest.approx(overall, abs=0.011)


def test_the_papers_ablations_have_its_differences():
    table = {name: row for (name, t), row in report.PAPER["qwen3_4b"].items() if t == 5}
    losses = {name: round(row[0] - 52.59, 2) for name, row in table.items() if len(row) == 1}
    assert losses == {
        "no_map": -2.97,
        "no_map_penalty": -2.71,
        "no_replay": -1.41,
        "no_sam": -2.09,
        "no_code": -1.80,
        "no_embedding": -1.54,
    }


def test_all_rows_of_the_paper_are_there_and_ours_is_empty_where_nothing_ran(tmp_path):
    run = evaluated(tmp_path / "r_diverse-seed0", {0: {}, 1: {"bbeh": 0.5}})
    table = rows("qwen3_4b", {("r_diverse", "0"): run})
    assert table.pop("ours: R-Diverse, 1 iteration") == [*[""] * 11, "50.00 [40.0, 70.0]"]
    assert len(table) == 2 * 17 + 2 - 1  # base, two methods of five iterations, six ablations; two methods of others
    assert table["paper: SPIRAL"][:2] == ["47.00", "34.22"] and "ours: SPIRAL" not in table
    assert table["paper: R-Diverse, 5 iterations"][:3] == ["52.59", "36.68", "60.23"]
    base = dict(zip(TEN, table["paper: base"][2:], strict=True))
    assert (base["aime24"], base["aime25"], base["math500"], base["bbeh"]) == ("10.94", "6.15", "68.20", "7.57")
    assert table["paper: R-Zero, 4 iterations"] == ["46.52", "34.81", *[""] * 10]
    assert table["paper: without MAP, 5 iterations"] == ["49.62", *[""] * 11]
    assert {cell for name, cells in table.items() if name.startswith("ours") for cell in cells} == {""}


@pytest.mark.parametrize("experiment", ["qwen3_4b", "tiny"])
def test_without_a_cell_of_ours_there_is_no_table(tmp_path, experiment):
    run = evaluated(tmp_path / "none/r_diverse-seed0", {0: {}, 1: {}})
    assert report.beside_paper(experiment, {("r_diverse", "0"): run}) == ""
    run = evaluated(tmp_path / "r_diverse-seed0", {0: {"math500": 0.5}, 1: {}})
    text = report.beside_paper(experiment, {("r_diverse", "0"): run})
    assert text.startswith("## Beside the paper's Tables 1 and 2 and Fig. 3\n") and "| paper: SPIRAL | 47.00 |" in text


def test_ours_has_the_difference_and_the_interval_of_each_iteration(tmp_path):
    run = evaluated(tmp_path / "r_diverse-seed0", dict.fromkeys(range(4), SCORES))
    table = rows("qwen3_4b", {("r_diverse", "0"): run})
    scores = np.array(list(SCORES.values())) * 100
    math_avg, overall = scores[:7].mean(), (scores[:7].mean() + scores[7:].sum()) / 4
    below, above = np.sqrt(7 * 10**2) / 7, np.sqrt(7 * 20**2) / 7
    ends = f"[{math_avg - below:.1f}, {math_avg + above:.1f}]"
    assert table["ours: R-Diverse, 3 iterations"][0] == f"{math_avg:.2f} ({math_avg - 50.68:+.2f}) {ends}"
    below, above = (np.sqrt(side**2 + 3 * end**2) / 4 for side, end in ((below, 10), (above, 20)))
    ends = f"[{overall - below:.1f}, {overall + above:.1f}]"
    assert table["ours: R-Diverse, 3 iterations"][1] == f"{overall:.2f} ({overall - 36.30:+.2f}) {ends}"
    assert table["ours: R-Diverse, 3 iterations"][2] == "20.00 (-39.06) [10.0, 40.0]"  # AMC23
    assert table["ours: R-Diverse, 1 iteration"][2] == "20.00 [10.0, 40.0]"  # the paper has averages only
    assert table["ours: base"][2] == "20.00 (-25.70) [10.0, 40.0]"
    assert table["ours: R-Diverse, 4 iterations"] == [""] * 12


def test_phases_that_are_shorter_than_the_papers_are_named(tmp_path):
    """By generation batches: with smaller optimizer batches as many take more steps."""
    run = evaluated(tmp_path / "r_diverse-seed0", {0: SCORES})
    whole = {"max_steps": 160, "gradient_accumulation_steps": 4, "steps_per_generation": 128}
    for phases, said in (
        ({}, None),
        ({"challenger": whole, "solver": {"gradient_accumulation_steps": 20}}, None),
        ({"challenger": {"max_steps": 4}}, "R-Diverse seed 0, Challenger: 1 generation batches and not 5."),
        ({"solver": {**whole, "num_iterations": 2}}, "R-Diverse seed 0, Solver: 2.5 generation batches and not 15."),
    ):
        (run / "manifest.json").write_text(json.dumps({"config": phases}))
        text = report.beside_paper("qwen3_4b", {("r_diverse", "0"): run})
        assert text.endswith(f"\n\nPhases shorter than the paper's: {said}" if said else " |")


def test_an_average_needs_all_its_benchmarks(tmp_path):
    some = {name: score for name, score in SCORES.items() if name not in ("aime25", "bbeh")}
    run = evaluated(tmp_path / "a", {0: {}, 1: {**some, "aime25": 0.5}, 2: {**some, "bbeh": 0.5}})
    table = rows("qwen3_8b", {("r_diverse", "0"): run})
    one, two = table["ours: R-Diverse, 1 iteration"], table["ours: R-Diverse, 2 iterations"]
    assert [bool(cell) for cell in one] == [True, False, *[True] * 9, False]
    assert [bool(cell) for cell in two] == [False, False, *[name != "aime25" for name in TEN]]


def test_a_part_of_a_set_is_marked(tmp_path):
    run = evaluated(tmp_path / "a", {0: SCORES}, questions=20)
    cells = rows("qwen3_8b", {("r_diverse", "0"): run})["ours: base"]
    assert cells[2].endswith(" n=20") and cells[0].endswith(" n=140") and cells[1].endswith(" n=200")


def test_another_experiment_has_no_difference_to_the_papers_models(tmp_path):
    run = evaluated(tmp_path / "a", {0: SCORES, 1: {}})
    table = rows("single_gpu", {("gate", "0"): run})
    assert [name for name in table if name.startswith("paper")] == [
        "paper: base",
        "paper: Absolute Zero",
        "paper: SPIRAL",
        "paper: R-Diverse, 3 iterations",
        "paper: R-Diverse, 5 iterations",
        "paper: R-Zero, 3 iterations",
    ]
    assert table["ours: base"][2] == "20.00 [10.0, 40.0]"
    assert "ours: gate, 1 iteration" in table


def test_several_seeds_have_a_row_of_their_mean(tmp_path):
    runs = {
        ("r_diverse", str(seed)): evaluated(tmp_path / str(seed), {0: {}, 1: {"amc23": score}})
        for seed, score in enumerate((0.5, 0.6))
    }
    table = rows("qwen3_4b", runs)
    assert table["ours: R-Diverse, 1 iteration"][2] == "50.00 [40.0, 70.0]"
    assert table["ours, 2 seeds: R-Diverse, 1 iteration"] == ["", "", "55.00 ± 7.07", *[""] * 9]


def test_another_seed_than_the_first_is_named(tmp_path):
    """Where the first has not come so far, the rows of one variant are of two trainings."""
    runs = {
        ("r_diverse", str(seed)): evaluated(tmp_path / f"r_diverse-seed{seed}", dict.fromkeys(range(2 + seed), SCORES))
        for seed in (0, 1)
    }
    table = rows("qwen3_4b", runs)
    assert table["ours: R-Diverse, 1 iteration"][0] and "ours: R-Diverse, 2 iterations" not in table
    assert table["ours: R-Diverse, 2 iterations, seed 1"][0]


def test_seeds_that_were_evaluated_in_different_ways_are_named(tmp_path):
    found = {0: {"amc23": 0.5, "gsm8k": 0.5}}
    runs = {
        ("r_diverse", str(seed)): evaluated(tmp_path / f"r_diverse-seed{seed}", found, temperature=temperature)
        for seed, temperature in enumerate((1.0, 1.0, 0.6))
    }
    said = "Evaluated in different ways, so that accuracies do not compare: r_diverse-seed0 iteration 0, "
    said += "r_diverse-seed1 iteration 0: 40 questions of amc23, 32 samples each at temperature 1.0, top-p 1.0; "
    text = report.beside_paper("qwen3_4b", runs)
    assert text.count("Evaluated in different ways") == 2 and said in text
    assert "Evaluated" not in report.beside_paper("qwen3_4b", dict(list(runs.items())[:2]))


def test_a_judges_verdicts_have_a_row_of_their_own(tmp_path):
    run = evaluated(tmp_path / "a", {0: {"amc23": 0.5}})
    path = run / "iteration_0/evaluate/amc23.judge_wrong.json"
    judged = {"judge": "some-model", "metric": None, "questions": 40, "avg@k": 0.6, "interval": [0.5, 0.7]}
    path.write_text(json.dumps({**judged, "failures": {"no_reply": 1, "unparseable": 2}}))
    table = rows("qwen3_4b", {("r_diverse", "0"): run})
    assert table["ours: base"][2] == "50.00 (+4.30) [40.0, 70.0]"
    name = "ours, judge some-model (R-Zero's re-check, 3 failures): base"
    assert table[name] == ["", "", "60.00 (+14.30) [50.0, 70.0]", *[""] * 9]


def test_differences_are_combined_over_seeds(tmp_path):
    runs = {}
    for name, rights in (("r_diverse", (6, 8)), ("r_zero", (5, 5))):
        for seed, right in enumerate(rights):
            runs[name, str(seed)] = run = evaluated(tmp_path / f"{name}-seed{seed}", {0: {}, 1: {}})
            path = run / "iteration_1/evaluate/amc23/scored.jsonl"
            path.parent.mkdir()
            path.write_text("".join(json.dumps({"id": f"{i}", "score": float(i < right)}) + "\n" for i in range(9)))
            path.parent.with_suffix(".json").write_text('{"rows": "the same"}')
    text = report.differences(runs)
    assert "R-Diverse minus R-Zero, seed 1, iteration 1, amc23: +0.333 [" in text
    assert "R-Diverse minus R-Zero, 2 seeds, iteration 1, amc23: +0.222 ± 0.157 [-1.190, +1.634]" in text
    del runs["r_zero", "1"]
    assert "seeds" not in report.differences(runs)


def test_a_seed_that_is_on_its_way_hides_no_iteration_of_the_others():
    done = [{"step": t, "accuracy": 0.2 + t / 10} for t in range(3)]
    table = report.iteration_table({("r_diverse", "0"): done, ("r_diverse", "1"): [{"step": 0, "accuracy": 0.4}]})
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    assert cells == [
        ["R-Diverse, base", "2", "0.300 ± 0.141"],
        ["R-Diverse, iteration 1", "1", "0.300"],
        ["R-Diverse, iteration 2", "1", "0.400"],
    ]


def test_usable_is_what_passed_the_gate():
    labels = {"label_1": {"usable": 5}, "label_2": {"questions": 3}, "filter": {"current": 4}}
    assert report.usable_questions(labels) == 5
    assert report.usable_questions({**labels, "gate_1": {"usable": 2}, "gate_2": {"usable": 0}}) == 2


@pytest.mark.parametrize(("settings", "clusters"), [({}, 1), ({"distance_threshold": 0.1}, 2)])
def test_clusters_are_cut_where_the_run_cuts_them(tmp_path, settings, clusters):
    (tmp_path / "manifest.json").write_text(json.dumps({"config": settings}))
    counts = {"evaluate": {}, "filter": {"label_accuracy": None, "bank": 2, "replayed": 0}, "embed": {}}
    for t, stages in ((0, ("evaluate",)), (1, tuple(counts))):
        for stage in stages:
            (tmp_path / f"iteration_{t}" / stage).mkdir(parents=True)
            (tmp_path / f"iteration_{t}" / stage / "DONE.json").write_text(json.dumps({"counts": counts[stage]}))
    np.save(tmp_path / "iteration_1/embed/embeddings.npy", np.array([[1, 0], [0.8, 0.6]], np.float32))
    write_jsonl(tmp_path / "iteration_1/embed/programs.jsonl", [{"question": "a"}, {"question": "b"}])
    write_jsonl(tmp_path / "iteration_1/challenger/metrics.jsonl", [])
    assert report.history(tmp_path)[1]["clusters"] == clusters


def test_duplicates_of_earlier_questions_have_a_column():
    """Fig. 4; empty where there is nothing before."""
    lines = [{"step": 0, "accuracy": 0.2}, {"step": 1, "accuracy": 0.3}, {"step": 2, "duplicate_ratio": 0.25}]
    table = report.iteration_table({("r_diverse", "0"): lines}).splitlines()
    place = [cell.strip() for cell in table[0].split("|")].index("duplicate ratio")
    assert [line.split("|")[place].strip() for line in table[2:]] == ["", "", "0.250"]
    assert "duplicate_ratio" in report.SERIES
