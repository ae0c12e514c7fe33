"""Tables and figures of an R-Diverse experiment from its run folders, beside the paper's.

    python -m benchmarks.r_diverse --config r_diverse/configs/tiny.yaml

Reads what `r_diverse.loop` wrote for all variants and seeds, and nothing else; a cell without a run stays empty.
Writes `report.md` and `figures/` into `runs/r_diverse/<experiment>/`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common import plots
from common.cli import run_main
from common.estimators import paired_difference
from common.evaluation import scores_by_question
from common.runs import atomic_write_text, read_jsonl
from r_diverse import analysis
from r_diverse.loop import VARIANT_FLAGS, finished_iterations
from r_diverse.train import parse

NAMES = {
    "r_diverse": "R-Diverse",
    "r_zero": "R-Zero",
    "no_penalty": "no penalty",
    "no_map": "without MAP",
    "no_map_penalty": "without similarity penalties",
    "no_replay": "without replay",
    "no_sam": "without SAM",
    "no_code": "without abstraction",
    "no_embedding": "without embeddings",
}
MATH = ("amc23", "minerva_math", "math500", "gsm8k", "olympiadbench", "aime25", "aime24")
GENERAL = ("supergpqa", "mmlu_pro", "bbeh")
# Table 1, in the order of MATH and GENERAL, after Math AVG and Overall AVG
PAPER = {
    "qwen3_4b": {
        "base": (42.58, 27.10, 45.70, 38.24, 68.20, 87.79, 41.04, 6.15, 10.94, 20.88, 37.38, 7.57),
        "R-Zero, 3 iterations": (49.07, 34.64, 57.27, 52.94, 79.60, 92.12, 44.59, 4.27, 12.71, 27.55, 51.53, 10.42),
        "R-Diverse, 3 iterations": (50.68, 36.30, 59.06, 56.62, 79.00, 92.27, 45.19, 6.25, 16.35, 28.84, 54.91, 10.77),
        "R-Diverse, 5 iterations": (
            52.59,
            36.68,
            60.23,
            59.56,
            78.80,
            92.34,
            46.96,
            11.04,
            19.17,
            28.54,
            55.24,
            10.35,
        ),
    },
    "qwen3_8b": {
        "base": (49.18, 34.49, 51.95, 50.00, 78.00, 89.08, 44.74, 16.67, 13.85, 28.33, 51.80, 8.63),
        "R-Zero, 3 iterations": (54.69, 38.73, 61.67, 60.66, 82.00, 94.09, 48.89, 19.17, 16.35, 31.38, 58.23, 10.60),
        "R-Diverse, 3 iterations": (
            55.40,
            40.34,
            59.30,
            63.24,
            80.60,
            94.31,
            49.19,
            17.71,
            23.44,
            32.56,
            61.49,
            11.92,
        ),
        "R-Diverse, 5 iterations": (
            56.46,
            40.75,
            66.02,
            66.18,
            82.20,
            94.39,
            49.78,
            12.19,
            24.48,
            32.52,
            61.79,
            12.23,
        ),
    },
}
# Fig. 3, read off the figure, within 0.03: Math AVG after each iteration
PAPER_CURVES = {
    "qwen3_4b": {"r_diverse": (48.98, 50.07, 50.68, 51.63, 52.59), "r_zero": (48.06, 48.44, 49.07, 46.52, 42.91)},
    "qwen3_8b": {"r_diverse": (54.18, 54.70, 55.40, 55.95, 56.46), "r_zero": (53.39, 53.84, 54.69, 53.52, 53.05)},
}
SERIES = {
    "accuracy": "Solver's accuracy",
    "intra_repetition": "repeated within the iteration",
    "cross_repetition": "repeated from earlier ones",
    "effective_clusters": "effective number of skill clusters",
    "label_accuracy": "right labels",
    "usable": "usable questions",
    "bank": "questions in memory",
    "entropy": "Challenger's entropy (nats)",
}
REWARD = {
    "challenger/uncertainty": "uncertainty",
    "challenger/repetition": "repetition penalty",
    "challenger/memory": "memory penalty",
    "challenger/valid": "valid outputs",
}


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.r_diverse", lambda words: print(report(words)), argv)


def report(argv: list[str]) -> str:
    """Writes the report of all runs of the experiment and returns it."""
    run = parse(argv).run
    folder = Path(run.out) / "r_diverse" / run.experiment
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder} holds no run with a finished iteration: run r_diverse.loop first")
    histories = {key: history(path) for key, path in runs.items()}
    drawn = figures(folder / "figures", runs, histories)
    parts = [
        f"# {run.experiment}: self-play by iteration",
        iteration_table(histories),
        differences(runs),
        "## Beside the paper's Table 1",
        paper_table(run.experiment, histories),
        paper_curves(run.experiment, histories),
        "\n".join(f"![{path.stem}](figures/{path.name})" for path in drawn),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    atomic_write_text(folder / "report.md", text)
    return text


def find_runs(folder: Path) -> dict[tuple[str, str], Path]:
    """Run folders with a finished iteration, by variant and seed, in the order of the variants."""
    found = {}
    for path in sorted(folder.glob("*-seed*")):
        name, _, seed = path.name.rpartition("-seed")
        if finished_iterations(path):
            found[name, seed] = path
    order = list(VARIANT_FLAGS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]) if item[0][0] in order else 99, item)))


def history(run: Path) -> list[dict[str, Any]]:
    """One row an iteration, 0 for the base: what the stages counted, and the diversity of the usable questions."""
    counts = {t: _counts(run / f"iteration_{t}") for t in range(finished_iterations(run) + 1)}
    embeddings, texts = [], []
    for t in list(counts)[1:]:
        vectors = np.load(run / f"iteration_{t}" / "embed" / "embeddings.npy")
        ok = np.isfinite(vectors).all(1)
        questions = [r["question"] for r in read_jsonl(run / f"iteration_{t}" / "embed" / "programs.jsonl")]
        embeddings.append(vectors[ok])
        texts += [question for question, good in zip(questions, ok, strict=True) if good]
    numbers = np.repeat(list(counts)[1:], [len(rows) for rows in embeddings])
    table = analysis.diversity(texts, np.concatenate(embeddings), numbers) if len(texts) else []
    rows = []
    for t, stage in counts.items():
        scores = {name: value["avg@k"] for name, value in stage["evaluate"].items()}
        row = {"step": t, "scores": scores, "accuracy": float(np.mean(list(scores.values()))) if scores else None}
        if t:
            usable = [c.get("usable", 0) for name, c in stage.items() if name.startswith("label_")]
            row |= {"usable": sum(usable), **{k: stage["filter"][k] for k in ("label_accuracy", "bank", "replayed")}}
            logged = read_jsonl(run / f"iteration_{t}" / "challenger" / "metrics.jsonl")
            row["entropy"] = _mean([line["entropy"] for line in logged if "entropy" in line])
            row |= {name: _mean([line[name] for line in logged if name in line]) for name in REWARD}
            row |= next((found for found in table if found["iteration"] == t), {})
        rows.append({k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and np.isnan(v))})
    return rows


def _counts(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text())["counts"] for path in folder.glob("*/DONE.json")}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def iteration_table(histories: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Mean over the seeds, with their standard deviation where there are several."""
    columns = ("accuracy", "label_accuracy", "usable", "bank", "intra_repetition", "cross_repetition")
    columns += ("effective_clusters", *REWARD)
    rows = []
    for name in dict.fromkeys(name for name, _ in histories):
        seeds = [rows for (other, _), rows in histories.items() if other == name]
        for t in range(min(len(rows) for rows in seeds)):
            cells = [_mean_sd([rows[t].get(column) for rows in seeds]) for column in columns]
            rows.append([f"{NAMES.get(name, name)}, {f'iteration {t}' if t else 'base'}", len(seeds), *cells])
    heads = [column.removeprefix("challenger/").replace("_", " ") for column in columns]
    return plots.table_markdown(rows, ["run", "seeds", *heads])


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    digits = 0 if isinstance(known[0], int) else 3
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def differences(runs: dict[tuple[str, str], Path]) -> str:
    """R-Diverse against each baseline after the last iteration that both have, on the same questions."""
    lines = []
    for (name, seed), other in runs.items():
        ours = runs.get(("r_diverse", seed))
        if name == "r_diverse" or ours is None:
            continue
        t = min(finished_iterations(ours), finished_iterations(other))
        folders = [run / f"iteration_{t}" / "evaluate" for run in (ours, other)]
        for path in sorted(folders[0].glob("*/scored.jsonl")):
            if not (folders[1] / path.parent.name / "scored.jsonl").exists():
                continue
            scores = [scores_by_question(folder, path.parent.name) for folder in folders]
            difference, low, high, p_value = paired_difference(*scores)
            lines.append(
                f"- R-Diverse minus {NAMES.get(name, name)}, seed {seed}, iteration {t}, {path.parent.name}: "
                f"{difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {p_value:.2g}"
            )
    head = "On the same questions (intervals over questions, not over trainings):\n\n"
    return head + "\n".join(lines) if lines else ""


def paper_table(experiment: str, histories: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The paper's rows, and ours of the first seed below them, in percent."""
    rows = [[f"paper: {name}", *values] for name, values in PAPER.get(experiment, PAPER["qwen3_4b"]).items()]
    for name in dict.fromkeys(name for name, _ in histories):
        history_ = next(rows for (other, _), rows in histories.items() if other == name)
        rows.append([f"ours: {NAMES.get(name, name)}, {len(history_) - 1} iterations", *ours(history_[-1]["scores"])])
    return plots.table_markdown(rows, ["run", "Math AVG", "Overall AVG", *MATH, *GENERAL])


def paper_curves(experiment: str, histories: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Math AVG after each iteration: the paper's Fig. 3, and ours of the first seed."""
    curves = PAPER_CURVES.get(experiment, PAPER_CURVES["qwen3_4b"])
    rows = [[f"paper: {NAMES[name]}", *values] for name, values in curves.items()]
    for name in curves:
        history_ = next((rows for (other, _), rows in histories.items() if other == name), [])
        values = [ours(row["scores"])[0] for row in history_[1:6]]
        rows.append([f"ours: {NAMES[name]}", *values, *[""] * (5 - len(values))])
    return plots.table_markdown(rows, ["Math AVG", *(f"iteration {t}" for t in range(1, 6))])


def ours(scores: dict[str, float]) -> list[str]:
    """Math AVG, Overall AVG (mean of Math AVG and the three general benchmarks) and each benchmark, in percent."""
    math = np.mean([scores[name] for name in MATH]) if scores.keys() >= set(MATH) else None
    overall = np.mean([math, *(scores[name] for name in GENERAL)]) if scores.keys() >= {*MATH, *GENERAL} else None
    values = [math, overall, *(scores.get(name) for name in (*MATH, *GENERAL))]
    return ["" if value is None else f"{100 * value:.2f}" for value in values]


def figures(folder: Path, runs: dict[tuple[str, str], Path], histories) -> list[Path]:
    """Series over iterations, the Challenger's reward over its steps, and a map of skills; first seed of each."""
    first = {name: next(key for key in runs if key[0] == name) for name in dict.fromkeys(name for name, _ in runs)}
    lines = {NAMES.get(name, name): histories[key] for name, key in first.items()}
    drawn = [plots.training_curves(lines, SERIES, folder / "iterations.png", smooth=1, unit="iteration")]
    steps = {NAMES.get(name, name): challenger_steps(runs[key]) for name, key in first.items()}
    drawn.append(plots.training_curves(steps, REWARD, folder / "reward.png", unit="Challenger's step, all iterations"))
    drawn += [
        skill_map(runs[key], folder / f"skills_{name}.png", NAMES.get(name, name)) for name, key in first.items()
    ]
    return drawn


def challenger_steps(run: Path) -> list[dict[str, Any]]:
    """Logged lines of all Challenger phases, their steps counted on."""
    lines, before = [], 0
    for t in range(1, finished_iterations(run) + 1):
        logged = read_jsonl(run / f"iteration_{t}" / "challenger" / "metrics.jsonl")
        lines += [{**line, "step": before + line["step"]} for line in logged]
        before += max(line["step"] for line in logged)
    return lines


def skill_map(run: Path, path: Path, title: str) -> Path:
    """Usable questions of each iteration as points: two principal axes of their skill vectors, the same for all."""
    iterations = range(1, finished_iterations(run) + 1)
    vectors = [np.load(run / f"iteration_{t}" / "embed" / "embeddings.npy") for t in iterations]
    vectors = [rows[np.isfinite(rows).all(1)] for rows in vectors]
    points = analysis.skill_map(np.concatenate(vectors))
    ends = np.cumsum([len(rows) for rows in vectors])
    figure = Figure(figsize=(3.2 * len(vectors), 3.4), layout="constrained")
    axes = figure.subplots(1, len(vectors), sharex=True, sharey=True, squeeze=False)[0]
    for t, ax, part in zip(iterations, axes, np.split(points, ends[:-1]), strict=True):
        places, counts = np.unique(part.round(6), axis=0, return_counts=True)
        ax.scatter(*places.T, s=12 + 4 * counts, alpha=0.6, color=plots.PALETTE[0], linewidths=0)
        ax.set_title(f"iteration {t}: {len(part)} questions", fontsize=9)
        ax.grid(alpha=0.25)
    figure.suptitle(f"{title}: skills of the usable questions (area: how many)", fontsize=10)
    return plots.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
