"""Tables and figures of an SRPO experiment from its run folders, beside the paper's Table 1.

    python -m benchmarks.srpo --config srpo/configs/tiny.yaml

Reads what `srpo.train` and `srpo.evaluate` wrote for all data sets and seeds, and nothing else. The paper's table is
there where a cell of ours can be filled; a cell without a run stays empty. Writes `report.md` and `figures/` into
`runs/srpo/<experiment>/`.
"""

import glob
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import decodings, is_run, mean_sd
from common import plots
from common.cli import run_main
from common.estimators import avg_at_k, interval, mean_of_independent, paired_difference
from common.evaluation import paired_scores, scores_by_question
from common.runs import atomic_write_text, by_number, read_jsonl, settings_of, trained_with
from common.verifiers import LETTERS
from srpo.data import DATASET_NAMES, DATASETS
from srpo.evaluate import BUDGETS
from srpo.train import ScriptArguments, parse

NAMES = {
    "base": "base",
    "grpo": "GRPO",
    "sdpo": "SDPO",
    "srpo": "SRPO",
    "srpo_no_dw": "SRPO without dynamic weighting",
    "mix": "Advantage Mix",
    "sdpo_incorrect": "SDPO, incorrect only",
    "sdpo_correct": "SDPO, correct only",
}
# Table 1: best avg@16 within 1, 5 and 10 hours, in the order of DATASETS and their average; base has one number
PAPER = {
    "qwen3_8b": {
        "base": ("41.1", "58.7", "30.5", "59.3", "57.9", "49.5"),
        "grpo": (
            "62.1 / 75.9 / 78.9", "61.0 / 72.3 / 73.6", "46.9 / 68.1 / 70.6",
            "74.7 / 77.6 / 77.8", "64.3 / 68.5 / 69.0", "61.8 / 72.5 / 74.0",
        ),
        "sdpo": (
            "71.6 / 80.6 / 80.6", "67.6 / 74.0 / 74.0", "52.1 / 58.5 / 58.5",
            "68.1 / 76.6 / 76.6", "64.8 / 65.7 / 65.7", "64.8 / 71.1 / 71.1",
        ),
        "srpo": (
            "69.2 / 81.8 / 83.0", "69.5 / 77.1 / 78.4", "55.8 / 68.3 / 72.8",
            "74.9 / 79.2 / 81.5", "65.2 / 71.2 / 71.2", "66.9 / 75.5 / 77.4",
        ),
        "srpo_no_dw": ("", "", "", "", "", "66.5 / 74.8 / 75.6"),
        "mix": ("", "", "", "", "", "67.2 / 72.3 / 72.3"),
    },
    "qwen3_4b": {
        "base": ("43.6", "59.8", "30.8", "61.2", "58.8", "50.8"),
        "grpo": (
            "64.1 / 76.9 / 78.3", "64.8 / 71.9 / 71.9", "39.1 / 51.6 / 55.5",
            "78.0 / 78.9 / 80.1", "62.9 / 62.9 / 62.9", "61.8 / 68.4 / 69.7",
        ),
        "sdpo": (
            "70.0 / 77.3 / 77.3", "65.4 / 66.7 / 66.7", "54.0 / 54.0 / 54.0",
            "74.3 / 74.3 / 74.3", "61.1 / 61.1 / 61.1", "65.0 / 66.7 / 66.7",
        ),
        "srpo": (
            "68.8 / 81.0 / 82.7", "69.2 / 74.0 / 74.0", "53.8 / 58.6 / 65.8",
            "75.7 / 79.1 / 81.3", "61.4 / 63.1 / 67.0", "65.8 / 71.2 / 74.2",
        ),
    },
}  # fmt: skip
# Fig. 4b: seconds of a step within 1, 5 and 10 hours, mean over the five data sets, Qwen3-8B
PAPER_SECONDS = {"grpo": (71.0, 82.4, 91.5), "sdpo": (85.9, 83.9, 83.7), "srpo": (83.4, 78.3, 75.8)}
PAPER_MODELS = {"qwen3_8b": "Qwen3-8B", "qwen3_4b": "Qwen3-4B"}
CURVES = {
    "reward": "reward of rollouts",
    "route/sdpo": "share routed to SDPO",
    "route/grpo": "share routed to GRPO",
    "route/teacher_available": "share with a correct sibling",
    "teacher/entropy": "teacher entropy, nats",
    "completions/mean_length": "response length, tokens",
    "entropy": "policy entropy, nats",
    "step_time": "seconds per step",
}

NOT_THE_PAPER = (
    "None of the paper's five data sets was evaluated in this experiment, so these results do not reproduce it. Once "
    "one is, the paper's Table 1 appears here with our numbers beside it."
)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.srpo", _main, argv)


def _main(words: list[str]) -> None:
    args, _ = parse([*words, "--dry_run"])  # settings of a GPU run can be read without one
    print(report(args))
    print(f"Written to {report_folder(args)}: report.md, figures/")


def report_folder(args: ScriptArguments) -> Path:
    return Path(args.out) / "srpo" / args.experiment


def report(args: ScriptArguments) -> str:
    """Writes report.md and the figures of `args.experiment`; returns the Markdown."""
    runs = find_runs(args)
    if not runs:
        where = Path(args.out) / "srpo"
        raise ValueError(
            f"{where} holds no evaluated run of {args.experiment}: run srpo.train and srpo.evaluate first"
        )
    folder = report_folder(args)
    paper = beside_paper(args.experiment, runs)
    parts = [f"# SRPO, experiment {args.experiment}", "" if paper else NOT_THE_PAPER]
    for dataset in sorted({dataset for dataset, _, _ in runs}):
        mine = {(name, seed): run for (d, name, seed), run in runs.items() if d == dataset}
        drawn = figures(folder / "figures", dataset, mine)
        files = {_label(*key): _metrics_file(run, dataset) for key, run in mine.items()}
        parts += [
            f"## {dataset}",
            trained_with({_label(*key): run for key, run in mine.items()}, ("model",)),
            f"{decodings(files, 'problems')}. *Best*, *mean* and *last* are of a run's checkpoints; the best is "
            "chosen on the test problems, as in the paper, and optimistic. The interval is 95 % over problems.",
            accuracy_table(mine),
            differences(mine),
            letter_table(mine),
            "\n".join(f"![{path.stem}](figures/{path.name})" for path in drawn),
        ]
    text = "\n\n".join(part for part in [*parts, paper] if part) + "\n"
    atomic_write_text(folder / "report.md", text)
    return text


def find_runs(args: ScriptArguments) -> dict[tuple[str, str, str], Path]:
    """(data set, variant, seed) -> folder of each evaluated run."""
    runs = {}
    curves = (Path(args.out) / "srpo").glob(f"{glob.escape(args.experiment)}-*/*/eval/curve.json")
    for path in sorted(curves, key=by_number):
        run = path.parents[1]
        dataset = run.parent.name.removeprefix(f"{args.experiment}-")
        name, _, seed = run.name.partition("-seed")
        known = name in NAMES and (run.name == "base" or is_run(run))
        if known and dataset in DATASET_NAMES:  # else its experiment has a longer name
            runs[dataset, name, seed or "-"] = run
    return runs


def curve(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval" / "curve.json").read_text())


def _curve_points(run: Path) -> list[dict[str, Any]]:
    return [{**point, "step": point["step"] / _steps_per_batch(run)} for point in curve(run)["curve"]]


def _last_evaluation(run: Path) -> Path:
    step = curve(run)["curve"][-1]["step"]
    folder = run / "eval" / f"checkpoint-{step}"
    return folder if folder.exists() else run / "eval" / "base"


def _label(name: str, seed: str) -> str:
    return NAMES[name] + (f" seed {seed}" if name != "base" else "")


def _metrics_file(run: Path, dataset: str) -> Path:
    """What the last evaluation wrote beside its sample records; all evaluations of a run have the same settings."""
    return _last_evaluation(run) / f"{dataset}.json"


def last_scores(run: Path, dataset: str) -> list[list[float]]:
    """Scores by problem and sample of the last checkpoint, problems in the order of their ids."""
    return scores_by_question(_last_evaluation(run), dataset)


def accuracy_table(runs: dict[tuple[str, str], Path]) -> str:
    rows = []
    for name, first in _first_seeds(runs).items():
        seeds = [curve(run)["all"] for (other, _), run in runs.items() if other == name]
        cells = [mean_sd([seed[kind] for seed in seeds]) for kind in ("best", "mean", "last")]
        low, high = interval(last_scores(first, first.parent.name.rpartition("-")[2]))
        seconds = [line["step_time"] for line in _metrics(first) if line.get("step_time")]
        time = f"{np.mean(seconds):.2f}" if seconds else ""
        rows.append([NAMES[name], len(seeds), *cells, f"[{low:.3f}, {high:.3f}]", time])
    columns = ["variant", "seeds", "best", "mean", "last", "95 % of last, first seed", "seconds per step"]
    note = "Trainings that ran side by side on one machine took time from each other, in seconds and in hours."
    return f"{plots.table_markdown(rows, columns)}\n\n{note}"


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Logged lines, with the steps and seconds of whole generation batches."""
    path, parts = run / "metrics.jsonl", _steps_per_batch(run)
    lines = read_jsonl(path) if path.exists() else []
    for line in lines:
        line["step"] /= parts
        if line.get("step_time"):
            line["step_time"] *= parts
    return lines


def _steps_per_batch(run: Path) -> int:
    """Optimizer steps that a run takes on one generation batch: four for the paper's GRPO."""
    config = settings_of(run)
    micro_batches = config.get("num_iterations", 1) * config.get("steps_per_generation", 1)
    return micro_batches // config.get("gradient_accumulation_steps", 1) or 1


def letter_table(runs: dict[tuple[str, str], Path]) -> str:
    """Which letters the rollouts of a multiple-choice set chose in the first and the last tenth of training."""
    rows = []
    for name, run in _first_seeds(runs).items():
        lines = [line for line in _metrics(run) if f"letter/{LETTERS[0]}" in line]
        tenth = max(1, len(lines) // 10)
        if lines:
            shares = np.array([[line[f"letter/{letter}"] for letter in LETTERS] for line in lines])
            ends = zip(shares[:tenth].mean(0), shares[-tenth:].mean(0), strict=True)
            rows.append([NAMES[name], *(f"{first:.2f}, {last:.2f}" for first, last in ends)])
    if not rows:
        return ""
    heading = "Shares of the letters among the choices made, first and last tenth of training, first seed:"
    return f"{heading}\n\n{plots.table_markdown(rows, ['variant', *LETTERS])}"


def _first_seeds(runs: dict[tuple[str, str], Path]) -> dict[str, Path]:
    """Variant -> run of its first seed, in the order of `NAMES`."""
    first = {name: run for (name, _), run in reversed(runs.items())}
    return {name: first[name] for name in NAMES if name in first}


def differences(runs: dict[tuple[str, str], Path]) -> str:
    """SRPO against each baseline on the same problems, last checkpoints, seed by seed."""
    lines = []
    for baseline in ("grpo", "sdpo", "srpo_no_dw", "mix"):
        for (name, seed), run in runs.items():
            other = runs.get((baseline, seed))
            if name != "srpo" or other is None:
                continue
            dataset = run.parent.name.rpartition("-")[2]
            scores = paired_scores(_last_evaluation(run), _last_evaluation(other), dataset)
            difference, low, high, p_value = paired_difference(*scores)
            lines.append(
                f"- SRPO minus {NAMES[baseline]}, seed {seed}: "
                f"{difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {p_value:.2g}"
            )
    return (
        "Last checkpoints on the same problems (intervals over problems, not over trainings):\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def beside_paper(experiment: str, runs: dict[tuple[str, str, str], Path]) -> str:
    """The paper's tables with ours beside them, if a cell of ours is filled."""
    tables = [table for table in (paper_table(experiment, runs), seconds_table(experiment, runs)) if table]
    heading = f"## The paper's Table 1, {PAPER_MODELS[paper_experiment(experiment)]}"
    note = (
        "Best avg@16 in percent within 1 / 5 / 10 hours of training. *Ours*: the first seed, its difference from the "
        "paper's, where the experiment is the paper's, and its 95 % interval over problems; n is the number of "
        "problems where it is not the full set; *ended at* where the training was shorter than the budget. An empty "
        "cell was not run."
    )
    return "\n\n".join([heading, note, *tables]) if tables else ""


def paper_experiment(experiment: str) -> str:
    """The paper's experiment that stands beside ours: the same one, or the 8B's if the paper does not have ours."""
    return experiment if experiment in PAPER else "qwen3_8b"


def paper_table(experiment: str, runs: dict[tuple[str, str, str], Path]) -> str:
    """The paper's numbers with ours beside them: best within 1 / 5 / 10 hours, first seed. "" if we have none.

    Differences only for an experiment of the paper, since any other has another model or other settings.
    """
    rows = []
    for name, values in PAPER[paper_experiment(experiment)].items():
        first, cells = _by_dataset(runs, name), []
        for dataset, value in zip((*DATASETS, "average"), values, strict=True):
            sources = DATASETS if dataset == "average" else (dataset,)
            there = {source: first[source] for source in sources if source in first}
            curves = [curve(run)["curve"] for run in there.values()]
            complete = len(there) == len(sources)
            cells += [value, _ours(curves, value, experiment in PAPER, _part(there)) if complete else ""]
        rows.append([NAMES[name], *cells])
    if not any(cell for row in rows for cell in row[2::2]):
        return ""
    return plots.table_markdown(rows, ["method", *(head for d in (*DATASETS, "average") for head in (d, "ours"))])


def _part(runs: dict[str, Path]) -> str:
    """Number of problems, such as " n=20", of the data sets that were evaluated in part; "" without any."""
    asked = {name: json.loads(_metrics_file(run, name).read_text())["questions"] for name, run in runs.items()}
    partial = [count for dataset, count in asked.items() if count < DATASETS[dataset].test]
    return f" n={sum(partial)}" if partial else ""


def _by_dataset(runs: dict[tuple[str, str, str], Path], name: str) -> dict[str, Path]:
    """Data set -> run of the first seed of a variant, in the order of `DATASETS`."""
    first = {d: run for (d, other, _), run in reversed(runs.items()) if other == name}
    return {d: first[d] for d in DATASETS if d in first}


def seconds_table(experiment: str, runs: dict[tuple[str, str, str], Path]) -> str:
    """Seconds of a step (here a whole generation batch) within each budget: mean over the data sets that ran, first
    seeds; for the paper's experiment beside its Fig. 4b."""
    rows = []
    for name in NAMES:
        lines = [_metrics(run) for run in _by_dataset(runs, name).values()]
        ours = [_seconds_within(lines, hours) for hours in BUDGETS]
        if any(ours):
            paper = PAPER_SECONDS.get(name, ()) if experiment == "qwen3_8b" else ()
            cells = (" / ".join(f"{x:.1f}" if x else "" for x in values) for values in (paper, ours))
            rows.append([NAMES[name], *cells, len(lines)])
    if not rows:
        return ""
    heading = "Seconds of a step within 1 / 5 / 10 hours of training (Fig. 4b), mean over data sets, first seed:"
    return f"{heading}\n\n{plots.table_markdown(rows, ['method', 'paper', 'ours', 'data sets'])}"


def _seconds_within(runs: list[list[dict[str, Any]]], hours: float) -> float | None:
    """Mean over runs of the seconds per step up to the last line within the budget; None if a run has none."""
    inside = [[line for line in lines if line.get("train_seconds", math.inf) <= 3600 * hours] for lines in runs]
    if not inside or not all(inside):
        return None
    return float(np.mean([lines[-1]["train_seconds"] / lines[-1]["step"] for lines in inside]))


def _ours(curves: list[list[dict[str, Any]]], paper: str, compared: bool = True, part: str = "") -> str:
    """Mean over data sets of the best within each budget that the paper has, as `value (difference) [low, high]` and
    `part`; without the difference if not `compared`."""
    numbers = [float(number) for number in paper.split(" / ")] if paper else [None] * len(BUDGETS)
    cells = []  # one for each budget, empty where a data set has no checkpoint yet
    for hours, number in zip(BUDGETS, numbers, strict=False):  # the base has one number
        cells.append("")
        inside = [[point for point in points if point["hours"] <= hours] for points in curves]
        if all(inside):
            best = [max(points, key=lambda point: point["accuracy"]) for points in inside]
            value, low, high = mean_of_independent([(point["accuracy"], *point["interval"]) for point in best])
            difference = f" ({100 * value - number:+.1f})" if compared and number is not None else ""
            end = min(points[-1]["hours"] for points in curves)
            short = f" ended at {end:.1f} h" if 0 < end < hours else ""  # the base was not trained
            cells[-1] = f"{100 * value:.1f}{difference} [{100 * low:.1f}, {100 * high:.1f}]{part}{short}"
    return " / ".join(cells) if any(cells) else ""


def figures(folder: Path, dataset: str, runs: dict[tuple[str, str], Path]) -> list[Path]:
    """Accuracy over steps and over hours of training (Fig. 3), bars of the last checkpoints, and the logged series of
    Figs. 1, 4 and 5."""
    first = _first_seeds(runs)
    base = curve(first["base"])["curve"] if "base" in first else []
    points = {NAMES[name]: [*base, *_curve_points(run)] for name, run in first.items() if name != "base"}
    drawn = []
    if points:
        drawn.append(
            plots.training_curves(
                points,
                {"accuracy": "test accuracy", "mean_tokens": "test response length, tokens"},
                folder / f"{dataset}_accuracy.png",
                1,
            )
        )
        hours, path = {"accuracy": "test accuracy"}, folder / f"{dataset}_hours.png"
        drawn.append(plots.training_curves(points, hours, path, 1, "hours of training", over="hours"))
    logged = {NAMES[name]: lines for name, run in first.items() if (lines := _metrics(run))}
    if logged:
        path = folder / f"{dataset}_training.png"  # the paper's figures are means of five steps with such a band
        drawn.append(plots.training_curves(logged, CURVES, path, smooth=5, band=True))
    bars = {
        NAMES[name]: {"last checkpoint": (avg_at_k(scores), *interval(scores))}
        for name, run in first.items()
        if (scores := last_scores(run, dataset))
    }
    drawn.append(plots.accuracy_bars(bars, folder / f"{dataset}_last.png"))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
