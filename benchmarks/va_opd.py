"""Tables and figures of a VA-OPD experiment from its run folders, beside the paper's Tables 1 and 2.

    python -m benchmarks.va_opd --config va_opd/configs/tiny.yaml

Reads what `va_opd.train` and `va_opd.evaluate` wrote and nothing else. The paper's tables are there where a cell of
ours can be filled; a cell without a run stays empty. Writes `report.md` and `figures/` into the experiment's folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.estimates import Estimate, cell, decodings, estimate_of, is_run, mean_of, part_of
from common import plots
from common.cli import run_main
from common.estimators import avg_at_k, interval, mean_of_independent, over_seeds, paired_difference
from common.evaluation import BENCHMARKS, check_same_questions, paired_scores, scores_by_question
from common.runs import atomic_write_text, by_number, read_jsonl, settings_of, trained_with
from va_opd.evaluate import benchmark_name
from va_opd.objective import high_tokens
from va_opd.train import GIVEN_RESPONSES, ScriptArguments, load_splits_of, parse

# Paper, Table 1 (8B -> 2B, Geometry3K, best checkpoint): each column with the benchmarks that it is the mean of
MATH, VISUAL = ("wemath", "mathvista", "mathverse"), ("hallusionbench", "ai2d", "mmmu", "mmstar", "ocrbench")
COLUMNS = {
    "WeMath": MATH[:1],
    "MathVista": MATH[1:2],
    "MathVerse": MATH[2:],
    "Math": MATH,
    "HallusB": VISUAL[:1],
    "AI2D": VISUAL[1:2],
    "MMMU": VISUAL[2:3],
    "MMStar": VISUAL[3:4],
    "OCRB": VISUAL[4:],
    "Visual": VISUAL,
}
PAPER = {
    "base": (36.8, 63.9, 19.6, 40.1, 52.6, 77.8, 49.1, 56.1, 85.9, 64.3),
    "sft": (39.7, 64.4, 23.9, 42.7, 51.0, 75.7, 48.7, 57.1, 86.2, 63.7),
    "kd": (38.9, 65.3, 24.3, 42.8, 52.3, 76.0, 49.3, 57.4, 85.5, 64.1),
    "grpo": (44.1, 64.6, 24.9, 44.5, 54.0, 77.5, 52.9, 57.8, 84.8, 65.4),
    "papo": (44.8, 64.5, 25.8, 45.0, 54.0, 77.8, 52.7, 58.0, 84.7, 65.4),
    "opd": (43.3, 63.7, 29.1, 45.4, 52.0, 75.8, 50.9, 59.7, 84.7, 64.6),
    "va_opd": (46.6, 66.4, 31.9, 48.3, 54.5, 78.2, 51.5, 59.9, 86.4, 66.1),
}
# Paper, Table 2, by the name of the experiment here: (OPD, VA-OPD) on the math and on the visual benchmarks
SCALING = {
    "geo3k_teacher_4b": ("4B -> 2B, Geometry3K", (45.3, 47.4), (64.4, 65.2)),
    "geo3k": ("8B -> 2B, Geometry3K", (45.4, 48.3), (64.6, 66.1)),
    "geo3k_teacher_32b": ("32B -> 2B, Geometry3K", (51.1, 54.8), (65.3, 67.3)),
    "virl39k": ("8B -> 2B, ViRL39K", (46.4, 50.2), (65.5, 68.0)),
}
# Updates of 64 rollouts in the paper's 5 epochs, by data set
UPDATES = {"geo3k": 655, "virl39k": 12_145}
NAMES = {
    "base": "Base student",
    "sft": "CoT-SFT",
    "kd": "Off-policy KD",
    "grpo": "GRPO",
    "papo": "PAPO",
    "opd": "Standard OPD",
    "rollout_only": "Rollout weights only",
    "token_only": "Token groups only",
    "va_opd": "VA-OPD",
    "teacher": "Teacher",
}
NOT_THE_PAPER = (
    "No benchmark of the paper was evaluated in this experiment, so these results do not reproduce it. Once one is, "
    "the paper's Tables 1 and 2 appear here with our numbers beside them."
)
Results = dict[str, dict[str, Estimate]]  # by run and benchmark
MEANING = (
    "VA (visual advantage) of a token: what the true image adds to the teacher's log-probability of it over the "
    "pixelated image, in nats, and 0 where it adds nothing."
)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.va_opd", _main, argv)


def _main(words: list[str]) -> None:
    args, config = parse([*words, "--dry_run"])  # settings of a GPU run can be read without one
    print(report(args, config.seed))
    print(f"Written to {experiment_folder(args)}: report.md, figures/")


def report(args: ScriptArguments, seed: int) -> str:
    """Writes report.md and the figures of `args.experiment`; returns the Markdown."""
    folder = experiment_folder(args)
    runs = {name: folder / f"{name}-seed{seed}" for name in NAMES}
    runs = {name: run for name, run in runs.items() if (run / "eval" / "va.json").exists()}
    if not runs:
        raise ValueError(
            f"{folder} holds no evaluated run with seed {seed}: run va_opd.train and va_opd.evaluate first"
        )
    scores = {
        name: {kind: sample_scores(run, args, kind) for kind in ("true", "pixelated")} for name, run in runs.items()
    }
    for run in runs.values():
        check_same_questions(next(iter(runs.values())) / "eval", run / "eval", benchmark_name(args))
    last = {name: found for name, run in runs.items() if (found := last_checkpoint_scores(run, args)) is not None}
    rollouts = {name: read_jsonl(run / "eval" / "va_tokens.jsonl") for name, run in runs.items()}
    hours = accuracy_by_hours(runs, scores)
    drawn = figures(folder / "figures", args, runs, scores, rollouts, hours)
    results = vision_results(folder, seed)
    named = {NAMES[name]: run for name, run in runs.items()}
    parts = [
        f"# VA-OPD, experiment {args.experiment}, seed {seed}",
        "" if results else NOT_THE_PAPER,
        f"{decodings(metrics_files(named, args), 'held-out problems')}; intervals are 95 %, clustered by problem.",
        trained_with(named, ("model", "teacher")),
        selection_line(last),
        measured_table(scores, rollouts, last),
        MEANING,
        difference_line(scores, last),
        hours_line(hours),
        seeds_table(folder, args),
        beside_paper(folder, seed, results) if results else "",
        "## Figures",
        "\n".join(f"![{path.stem}](figures/{path.name})" for path in drawn),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    atomic_write_text(folder / "report.md", text)
    return text


def experiment_folder(args: ScriptArguments) -> Path:
    return Path(args.out) / "va_opd" / args.experiment


def sample_scores(run: Path, args: ScriptArguments, kind: str) -> list[list[float]]:
    """Scores by problem and sample, problems in the order of their ids."""
    return scores_by_question(run / "eval", benchmark_name(args, kind == "pixelated"))


def metrics_files(runs: dict[str, Path], args: ScriptArguments) -> dict[str, Path]:
    """The metrics of each run on the held-out problems."""
    return {label: run / "eval" / f"{benchmark_name(args)}.json" for label, run in runs.items()}


def last_checkpoint_scores(run: Path, args: ScriptArguments) -> list[list[float]] | None:
    """`sample_scores` of the last checkpoint, if the evaluated one was chosen by its scores; else None."""
    path = run / "eval" / "selection.json"
    if not path.exists():
        return None
    last = max(map(int, json.loads(path.read_text())["accuracy"]))
    return scores_by_question(run / "eval" / f"checkpoint-{last}", benchmark_name(args))


def selection_line(last: dict[str, list]) -> str:
    """Says which accuracies are too good because the same problems chose the checkpoint."""
    if not last:
        return ""
    return (
        f"Checkpoint chosen on these problems: {', '.join(NAMES[name] for name in last)}. The best of several "
        "checkpoints is too good on the problems that chose it, and intervals and p-values do not know of the choice. "
        "The last checkpoint, which nothing chose, stands beside it. For models not named here there was no choice."
    )


def with_interval(scores: list[list[float]]) -> str:
    return f"{avg_at_k(scores):.3f} [{', '.join(f'{x:.3f}' for x in interval(scores))}]"


def measured_table(scores: dict[str, dict[str, list]], rollouts: dict[str, list[dict]], last: dict[str, list]) -> str:
    """A row for each model. `last`: scores of the last checkpoint of models whose checkpoint was chosen, if any."""
    rows = []
    for name in scores:
        cells = [with_interval(scores[name][kind]) for kind in ("true", "pixelated")]
        if last:
            cells.insert(1, with_interval(last[name]) if name in last else "")
        va = np.concatenate([record["va"] for record in rollouts[name]])
        ranked = np.sort(va)[::-1]
        top = ranked[: max(1, round(0.1 * len(va)))].sum() / max(va.sum(), 1e-12)
        rows.append([NAMES[name], *cells, f"{va.mean():.3f}", f"{top:.0%}", f"{digit_share(rollouts[name]):.0%}"])
    columns = [
        "model",
        "accuracy",
        "accuracy, pixelated image",
        "mean VA",
        "VA in the top 10 % of tokens",
        "digits among the top 20 % tokens by VA",
    ]
    if last:
        columns.insert(2, "accuracy, last checkpoint")
    return plots.table_markdown(rows, columns)


def digit_share(rollouts: list[dict[str, Any]]) -> float:
    """Share of digit tokens in the high-VA group V (Eq. 5): where VA works, V is what is looked up in the image."""
    selected = []
    for record in rollouts:
        va = torch.tensor([record["va"]])
        high = high_tokens(va, torch.ones_like(va))[0].tolist()
        selected += [token.strip().isdigit() for token, chosen in zip(record["tokens"], high, strict=True) if chosen]
    return float(np.mean(selected))


def difference_line(scores: dict[str, dict[str, list]], last: dict[str, list]) -> str:
    if not {"opd", "va_opd"} <= scores.keys():
        return ""
    parts = [("", scores["va_opd"]["true"], scores["opd"]["true"])]
    if {"opd", "va_opd"} <= last.keys():
        parts = [
            (" (checkpoint chosen on these problems)", *parts[0][1:]),
            (", last checkpoints", last["va_opd"], last["opd"]),
        ]
    lines = []
    for which, ours, theirs in parts:
        difference, low, high, p_value = paired_difference(ours, theirs)
        lines.append(
            f"VA-OPD minus Standard OPD on the same problems{which}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], "
            f"p = {p_value:.2g} (one seed: the interval is over problems, not over trainings)."
        )
    return "\n\n".join(lines)


def accuracy_by_hours(runs: dict[str, Path], scores: dict[str, dict[str, list]]) -> dict[str, list[dict[str, float]]]:
    """Accuracy on the held-out problems over hours of training, for runs whose checkpoints were evaluated: one point
    for each checkpoint, and the base student at 0."""
    base = [{"hours": 0.0, "accuracy": avg_at_k(scores["base"]["true"])}] if "base" in scores else []
    curves = {}
    for name, run in runs.items():
        path = run / "eval" / "selection.json"
        if path.exists():
            hours, accuracy = (json.loads(path.read_text())[kind] for kind in ("hours", "accuracy"))
            points = [{"hours": hours[step], "accuracy": accuracy[step]} for step in sorted(hours, key=int)]
            curves[name] = [*base, *points]
    return curves


def hours_line(curves: dict[str, list[dict[str, float]]]) -> str:
    """When VA-OPD reaches the accuracy with which Standard OPD ends; 3 times as fast in the paper's Fig. 5."""
    if not {"opd", "va_opd"} <= curves.keys():
        return ""
    end = curves["opd"][-1]
    trained = [point for point in curves["va_opd"] if point["hours"]]  # not the base student
    first = next((point["hours"] for point in trained if point["accuracy"] >= end["accuracy"]), None)
    reached = "no checkpoint of VA-OPD has that" if first is None else f"VA-OPD has that after {first:.3g} h"
    return (
        f"Standard OPD ends at {end['accuracy']:.3f} after {end['hours']:.3g} h of training, and {reached}. In the "
        "paper (Fig. 5, MathVerse, 8 x A100) these are 19.3 h and 6.5 h. Hours are those of optimizer steps with "
        "their rollouts, and Standard OPD's hold the degraded view too, for the VA that it logs; accuracy is known at "
        "checkpoints only."
    )


def seeds_table(folder: Path, args: ScriptArguments) -> str:
    """Accuracy of each trained variant over all its seeds, if there are at least two, and how they were evaluated."""
    rows, evaluated = [], {}
    for name in ("opd", "rollout_only", "token_only", "va_opd"):
        found = filter(is_run, folder.glob(f"{name}-seed*"))
        runs = [run for run in found if (run / "eval" / "va.json").exists()]
        runs.sort(key=by_number)
        accuracy = [avg_at_k(sample_scores(run, args, "true")) for run in runs]
        if len(accuracy) > 1:
            evaluated |= {f"{NAMES[name]} seed {run.name.split('seed')[1]}": run for run in runs}
            each = ", ".join(
                f"{run.name.split('seed')[1]}: {value:.3f}" for run, value in zip(runs, accuracy, strict=True)
            )
            mean, deviation, low, high = over_seeds(accuracy)
            rows.append(
                [NAMES[name], len(accuracy), f"{mean:.3f}", f"{deviation:.3f}", f"[{low:.3f}, {high:.3f}]", each]
            )
    if not rows:
        return ""
    columns = ["variant", "seeds", "mean accuracy", "standard deviation", "95 % of the mean", "seed: accuracy"]
    table = plots.table_markdown(rows, columns)
    chosen = any(folder.glob("*-seed*/eval/selection.json"))
    note = "Checkpoints chosen on these problems, see above." if chosen else ""
    how = decodings(metrics_files(evaluated, args), "held-out problems")
    return "\n\n".join(filter(None, ["## All seeds", f"{how}.", note, table]))


def vision_results(folder: Path, seed: int) -> Results:
    """Estimates by run and benchmark, for those of the paper's eight benchmarks that were evaluated."""
    results: Results = {}
    for name in NAMES:
        for benchmark in MATH + VISUAL:
            if found := estimate_of(benchmark, folder / f"{name}-seed{seed}" / "eval" / f"{benchmark}.json"):
                results.setdefault(name, {})[benchmark] = found
    return results


def mean_score(results: Results, name: str, benchmarks: tuple[str, ...]) -> Estimate | None:
    """Mean of a run over benchmarks; None if one is missing."""
    return mean_of([results.get(name, {}).get(benchmark) for benchmark in benchmarks])


def beside_paper(folder: Path, seed: int, results: Results) -> str:
    """The paper's tables with ours beside them, for an experiment with `vision_results`."""
    parts = [
        "## The paper's Table 1 (8B -> 2B, Geometry3K)",
        "*Ours*: the rule-based score in percent, its difference from the paper's, where the experiment is the "
        "paper's, its 95 % interval; n is the number of questions where it is not the full set. An empty cell was not "
        "run.",
        paper_table(folder.name, results),
        shorter_line(folder, seed) if folder.name in SCALING else "",
        vision_differences(folder, seed, results),
        scaling_table(folder.parent, seed),
    ]
    return "\n\n".join(part for part in parts if part)


def paper_table(experiment: str, results: Results) -> str:
    """The paper's numbers with ours beside them; differences only for the paper's experiment, since any other has
    another teacher, other data or other settings."""
    rows = []
    for name in [*PAPER, *(name for name in results if name not in PAPER)]:
        cells = []
        for i, benchmarks in enumerate(COLUMNS.values()):
            paper = PAPER[name][i] if name in PAPER else None
            compared = paper if experiment == "geo3k" else None
            ours = cell(mean_score(results, name, benchmarks), compared, 1)
            cells += ["" if paper is None else f"{paper:.1f}", ours]
        rows.append([NAMES[name], *cells])
    return plots.table_markdown(rows, ["method", *(head for column in COLUMNS for head in (column, "ours"))])


def shorter_line(folder: Path, seed: int) -> str:
    """Names trainings that were shorter than the paper's of this experiment, by the settings in their manifests."""
    shorter = {}
    for name in NAMES:
        config = settings_of(folder / f"{name}-seed{seed}")
        updates = UPDATES[folder.name.split("_")[0]] / (4 if name in GIVEN_RESPONSES else 1)  # one response a prompt
        cut = {
            "max_steps": 0 < config.get("max_steps", 0) < int(updates),
            "num_train_epochs": config.get("num_train_epochs", 5) < 5,
            "limit": config.get("limit") is not None,
        }
        if any(cut.values()):
            shorter[name] = ", ".join(f"{field}={config[field]}" for field, is_cut in cut.items() if is_cut)
    said = "; ".join(f"{NAMES[name]} ({how})" for name, how in shorter.items())
    return f"Trained for less than the paper's 5 epochs of all problems in {folder.name}: {said}." if said else ""


def vision_differences(folder: Path, seed: int, results: Results) -> str:
    """VA-OPD minus Standard OPD, question by question, on the benchmarks that both were evaluated on, if any."""
    runs = [folder / f"{name}-seed{seed}" / "eval" for name in ("va_opd", "opd")]
    both = results.get("va_opd", {}).keys() & results.get("opd", {}).keys()
    if not both:
        return ""
    differences = {benchmark: vision_difference(*runs, benchmark) for benchmark in both}
    rows = []
    for i, (column, benchmarks) in enumerate(COLUMNS.items()):
        cells = ["", "", ""]
        if both.issuperset(benchmarks):
            found = [differences[benchmark] for benchmark in benchmarks]
            value, low, high = mean_of_independent([part[:3] for part in found])
            p_value = f"{found[0][3]:.2g}" if len(found) == 1 else ""
            cells = [f"{100 * value:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]", p_value]
        rows.append([column, f"{PAPER['va_opd'][i] - PAPER['opd'][i]:+.1f}", *cells])
    columns = ["VA-OPD minus Standard OPD", "paper", "ours", "95 % over questions", "p"]
    return plots.table_markdown(rows, columns)


def vision_difference(a: Path, b: Path, benchmark: str) -> tuple[float, float, float, float]:
    """(difference, low, high, p-value) of the benchmark's headline between two evaluations."""
    if metric := BENCHMARKS[benchmark].metric:
        check_same_questions(a, b, benchmark)
        return metric.difference(*(read_jsonl(out / benchmark / "scored.jsonl") for out in (a, b)))
    return paired_difference(*paired_scores(a, b, benchmark))


def scaling_table(experiments: Path, seed: int) -> str:
    """The paper's Table 2, if one of its experiments has both means of Standard OPD and VA-OPD."""
    rows = []
    for experiment, (label, *paper) in SCALING.items():
        results, cells = vision_results(experiments / experiment, seed), []
        for benchmarks, (opd, va_opd) in zip((MATH, VISUAL), paper, strict=True):
            cells += [f"{opd:.1f} -> {va_opd:.1f} ({va_opd - opd:+.1f})", scaling_cell(results, benchmarks)]
        rows.append([label, *cells])
    if not any(cell for row in rows for cell in row[2::2]):
        return ""
    table = plots.table_markdown(rows, ["Standard OPD -> VA-OPD", "Math", "ours", "Visual", "ours"])
    shorter = [shorter_line(experiments / experiment, seed) for experiment in SCALING]
    return "\n\n".join(filter(None, ["## The paper's Table 2", table, *shorter]))


def scaling_cell(results: Results, benchmarks: tuple[str, ...]) -> str:
    """Our cell of Table 2; empty if a benchmark of Standard OPD or VA-OPD is missing."""
    opd, va_opd = (mean_score(results, name, benchmarks) for name in ("opd", "va_opd"))
    if opd is None or va_opd is None:
        return ""
    shown = " -> ".join(f"{mean.value:.1f}{part_of(mean)}" for mean in (opd, va_opd))
    return f"{shown} ({va_opd.value - opd.value:+.1f})"


def figures(folder: Path, args: ScriptArguments, runs: dict[str, Path], scores, rollouts, hours) -> list[Path]:
    """Accuracy bars, accuracy over hours of training (Fig. 5) if known, curves of the trainings, cumulative VA mass
    (Fig. 2a), one rollout coloured by VA."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = {
        NAMES[name]: {f"{kind} image": (avg_at_k(values), *interval(values)) for kind, values in kinds.items()}
        for name, kinds in scores.items()
    }
    drawn = [plots.accuracy_bars(bars, folder / "accuracy.png")]
    if hours:
        curves = {NAMES[name]: points for name, points in hours.items()}
        label, path = {"accuracy": "accuracy, held-out problems"}, folder / "hours.png"
        drawn.append(plots.training_curves(curves, label, path, 1, "hours of training", over="hours"))
    trained = {
        NAMES[name]: read_jsonl(run / "metrics.jsonl")
        for name, run in runs.items()
        if (run / "metrics.jsonl").exists()
    }
    curves = {
        "kl/high": "KL of high-VA tokens, nats",
        "kl/low": "KL of other tokens, nats",
        "va/mean": "mean VA, nats",
        "entropy": "student entropy, nats",
    }
    if trained:
        drawn.append(plots.training_curves(trained, curves, folder / "training.png"))
    values = {NAMES[name]: np.concatenate([r["va"] for r in records]) for name, records in rollouts.items()}
    drawn.append(plots.cumulative_mass(values, folder / "va_mass.png", "VA"))
    name = next(n for n in ("va_opd", "opd", *runs) if n in runs)
    record = max(rollouts[name][:50], key=lambda r: sum(r["va"]))
    image = held_out_image(args, record["id"])
    title = f"Visual advantage of each token (nats), {NAMES[name]} on a held-out image"
    drawn.append(plots.token_heatmap(record["tokens"], record["va"], folder / "va_tokens.png", title, image=image))
    return drawn


def held_out_image(args: ScriptArguments, id_: str) -> Image.Image:
    rows = load_splits_of(args)["validation"]
    image = next((row["images"][0] for row in rows if row["id"] == id_), None)
    if image is None:
        raise ValueError(
            f"the evaluation has a problem with id {id_!r}, which the {len(rows)} held-out problems here do not have: "
            "give dataset, data, validation_data and validation_size as in the evaluation, or evaluate again"
        )
    return image


if __name__ == "__main__":
    sys.exit(main())
