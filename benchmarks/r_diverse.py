"""Tables and figures of an R-Diverse experiment from its run folders, beside the paper's.

    python -m benchmarks.r_diverse --config r_diverse/configs/tiny.yaml

Reads what `r_diverse.loop` wrote for all variants and seeds, and nothing else. The paper's table is there where a
cell of ours can be filled; a cell without a run stays empty. Writes `report.md` and `figures/` into
`runs/r_diverse/<experiment>/`.
"""

import dataclasses
import itertools
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.estimates import Estimate, cell, estimate_of, is_run, mean_of, mean_sd, unlike, ways
from common import plots
from common.cli import run_main
from common.estimators import over_seeds, paired_difference
from common.evaluation import paired_scores
from common.evaluation.judge import PROTOCOLS
from common.runs import atomic_write_text, by_number, read_jsonl, settings_of, trained_with
from r_diverse import RDiverseConfig, analysis
from r_diverse.config import UPDATES, ChallengerConfig, PhaseConfig, SolverConfig
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
# Methods of others in Table 1, which nothing here can run
OTHERS = {"absolute_zero": "Absolute Zero", "spiral": "SPIRAL", "socratic_zero": "Socratic-Zero"}
MATH = ("amc23", "minerva_math", "math500", "gsm8k", "olympiadbench", "aime25", "aime24")
GENERAL = ("supergpqa", "mmlu_pro", "bbeh")
COLUMNS = ("Math AVG", "Overall AVG", *MATH, *GENERAL)
# By experiment and (variant, iterations): Math AVG, Overall AVG, then the benchmarks in the order of MATH and GENERAL.
# Full rows are Table 1. Rows of two are read off Fig. 3, within 0.03; rows of one are Table 2, after five iterations.
PAPER = {
    "qwen3_4b": {
        ("base", 0): (42.58, 27.10, 45.70, 38.24, 68.20, 87.79, 41.04, 6.15, 10.94, 20.88, 37.38, 7.57),
        ("absolute_zero", 0): (46.42, 33.61, 52.45, 41.96, 76.20, 89.34, 42.56, 10.20, 12.20, 27.10, 52.60, 8.30),
        ("spiral", 0): (47.00, 34.22, 57.50, 42.40, 76.40, 91.00, 38.40, 10.00, 13.30, 27.10, 53.20, 9.57),
        ("r_diverse", 1): (48.98, 35.73),
        ("r_diverse", 2): (50.07, 36.10),
        ("r_diverse", 3): (50.68, 36.30, 59.06, 56.62, 79.00, 92.27, 45.19, 6.25, 16.35, 28.84, 54.91, 10.77),
        ("r_diverse", 4): (51.63, 36.59),
        ("r_diverse", 5): (52.59, 36.68, 60.23, 59.56, 78.80, 92.34, 46.96, 11.04, 19.17, 28.54, 55.24, 10.35),
        ("r_zero", 1): (48.06, 34.27),
        ("r_zero", 2): (48.44, 34.92),
        ("r_zero", 3): (49.07, 34.64, 57.27, 52.94, 79.60, 92.12, 44.59, 4.27, 12.71, 27.55, 51.53, 10.42),
        ("r_zero", 4): (46.52, 34.81),
        ("r_zero", 5): (42.91, 33.97),
        ("no_map", 5): (49.62,),
        ("no_map_penalty", 5): (49.88,),
        ("no_replay", 5): (51.18,),
        ("no_sam", 5): (50.50,),
        ("no_code", 5): (50.79,),
        ("no_embedding", 5): (51.05,),
    },
    "qwen3_8b": {
        ("base", 0): (49.18, 34.49, 51.95, 50.00, 78.00, 89.08, 44.74, 16.67, 13.85, 28.33, 51.80, 8.63),
        ("absolute_zero", 0): (52.68, 38.97, 57.89, 57.90, 76.60, 92.00, 47.80, 18.20, 18.40, 31.89, 60.50, 10.80),
        ("socratic_zero", 0): (56.10, 39.15, 63.70, 52.40, 81.20, 87.30, 55.10, 24.60, 28.40, 30.10, 60.90, 9.50),
        ("r_diverse", 1): (54.18, 39.49),
        ("r_diverse", 2): (54.70, 39.98),
        ("r_diverse", 3): (55.40, 40.34, 59.30, 63.24, 80.60, 94.31, 49.19, 17.71, 23.44, 32.56, 61.49, 11.92),
        ("r_diverse", 4): (55.95, 40.55),
        ("r_diverse", 5): (56.46, 40.75, 66.02, 66.18, 82.20, 94.39, 49.78, 12.19, 24.48, 32.52, 61.79, 12.23),
        ("r_zero", 1): (53.39, 37.93),
        ("r_zero", 2): (53.84, 38.45),
        ("r_zero", 3): (54.69, 38.73, 61.67, 60.66, 82.00, 94.09, 48.89, 19.17, 16.35, 31.38, 58.23, 10.60),
        ("r_zero", 4): (53.52, 39.57),
        ("r_zero", 5): (53.05, 39.19),
    },
}
SERIES = {
    "accuracy": "Solver's accuracy",
    "math_avg": "Math AVG, percent",
    "overall_avg": "Overall AVG, percent",
    "intra_repetition": "share repeated in the iteration",
    "cross_repetition": "share repeated from earlier ones",
    "duplicate_ratio": "share worded as an earlier one",
    "effective_clusters": "effective number of skill clusters",
    "label_accuracy": "share of right labels",
    "usable": "usable questions",
    "bank": "questions in memory",
    "entropy": "Challenger's entropy, nats",
}
REWARD = {
    "challenger/uncertainty": "uncertainty R_unc",
    "challenger/repetition": "repetition penalty P_rep",
    "challenger/memory": "memory penalty P_MAP",
    "challenger/valid": "share of valid outputs",
}

# Phases of an iteration with their generation batches in the paper
PHASES = {"challenger": (ChallengerConfig, 5), "solver": (SolverConfig, 15)}
NOT_THE_PAPER = (
    "No benchmark of the paper was evaluated in this experiment, so these results do not reproduce it. Once one is, "
    "the paper's Tables 1 and 2 and Fig. 3 appear here with our numbers beside them."
)
MEANING = (
    "*Accuracy*: the Solver's after the iteration, mean of the benchmarks. *Label accuracy*: share of right labels, "
    "where it can be known. *Usable*: questions that passed all checks. *Bank*: questions in the memory. *Intra* and "
    "*cross repetition*: share of the questions with a near twin in skill space (cosine of 0.9 or more), in the same "
    "iteration and in earlier ones. *Duplicate ratio*: share worded as an earlier one. *Effective clusters*: exp of "
    "the entropy of the skill clusters' shares. Skill space is that of programs, *without abstraction* that of "
    "questions. Means over the Challenger's training: *uncertainty* R_unc, *repetition* P_rep, *memory* P_MAP, each "
    "by the run's own measure (R-Zero's, *without SAM* and *without embeddings*: BLEU), and *valid*, the share of "
    "outputs in the asked form."
)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.r_diverse", _main, argv)


def _main(words: list[str]) -> None:
    print(report(words))
    print(f"Written to {report_folder(parse(words).run)}: report.md, figures/")


def report_folder(run: RDiverseConfig) -> Path:
    return Path(run.out) / "r_diverse" / run.experiment


def report(argv: list[str]) -> str:
    """Writes the report of all runs of the experiment and returns it."""
    run = parse(argv).run
    folder = report_folder(run)
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder} holds no run with a finished iteration: run r_diverse.loop first")
    histories = {key: history(path) for key, path in runs.items()}
    drawn = figures(folder / "figures", runs, histories)
    paper = beside_paper(run.experiment, runs)
    parts = [
        f"# R-Diverse, experiment {run.experiment}",
        "" if paper else NOT_THE_PAPER,
        trained_with(
            {f"{NAMES.get(name, name)} seed {seed}": path for (name, seed), path in runs.items()}, ("model",)
        ),
        iteration_table(histories),
        MEANING,
        differences(runs),
        paper,
        "## Figures",
        "\n".join(f"![{path.stem}](figures/{path.name})" for path in drawn),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    atomic_write_text(folder / "report.md", text)
    return text


def find_runs(folder: Path) -> dict[tuple[str, str], Path]:
    """Run folders with a finished iteration, by variant and seed, in the order of the variants."""
    found = {}
    for path in sorted(folder.glob("*-seed*"), key=by_number):
        name, _, seed = path.name.rpartition("-seed")
        if is_run(path) and finished_iterations(path):
            found[name, seed] = path
    order = list(VARIANT_FLAGS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order)))


def history(run: Path) -> list[dict[str, Any]]:
    """A row for each iteration (0: the base): what its stages counted, and the diversity of its usable questions."""
    counts = {t: _counts(run / f"iteration_{t}") for t in range(finished_iterations(run) + 1)}
    embeddings, texts = [], []
    for t in list(counts)[1:]:
        vectors = np.load(run / f"iteration_{t}" / "embed" / "embeddings.npy")
        ok = np.isfinite(vectors).all(1)
        questions = [r["question"] for r in read_jsonl(run / f"iteration_{t}" / "embed" / "programs.jsonl")]
        embeddings.append(vectors[ok])
        texts += [question for question, good in zip(questions, ok, strict=True) if good]
    numbers = np.repeat(list(counts)[1:], [len(rows) for rows in embeddings])
    cut = {"distance_threshold": settings_of(run).get("distance_threshold", RDiverseConfig.distance_threshold)}
    table = analysis.diversity(texts, np.concatenate(embeddings), numbers, **cut) if texts else []
    rows = []
    for t, stage in counts.items():
        scores = {name: value["avg@k"] for name, value in stage["evaluate"].items()}
        row = {"step": t, "accuracy": _mean(list(scores.values()))}
        math_avg, overall_avg, *_ = estimates(run / f"iteration_{t}" / "evaluate")
        row |= {"math_avg": math_avg and math_avg.value, "overall_avg": overall_avg and overall_avg.value}
        if t:
            row |= {
                "usable": usable_questions(stage),
                **{k: stage["filter"][k] for k in ("label_accuracy", "bank", "replayed")},
            }
            logged = read_jsonl(run / f"iteration_{t}" / "challenger" / "metrics.jsonl")
            row["entropy"] = _mean([line["entropy"] for line in logged if "entropy" in line])
            row |= {name: _mean([line[name] for line in logged if name in line]) for name in REWARD}
            row |= next((found for found in table if found["iteration"] == t), {})
        rows.append({k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and np.isnan(v))})
    return rows


def usable_questions(stage: dict[str, dict[str, Any]]) -> int:
    """Questions of an iteration that passed its last check: the validity gate if there is one, else the labels."""
    last = "gate_" if any(name.startswith("gate_") for name in stage) else "label_"
    return sum(counts.get("usable", 0) for name, counts in stage.items() if name.startswith(last))


def _counts(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text())["counts"] for path in folder.glob("*/DONE.json")}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def iteration_table(histories: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Mean over the seeds that have the iteration, with their standard deviation if there are several."""
    columns = ("accuracy", "label_accuracy", "usable", "bank", "intra_repetition", "cross_repetition")
    columns += ("duplicate_ratio", "effective_clusters", *REWARD)
    rows = []
    for name in dict.fromkeys(name for name, _ in histories):
        seeds = [rows for (other, _), rows in histories.items() if other == name]
        for t in range(max(len(lines) for lines in seeds)):
            there = [lines[t] for lines in seeds if t < len(lines)]  # a seed may still be on its way
            values = [[line.get(column) for line in there] for column in columns]
            cells = [mean_sd(found, 0 if isinstance(found[0], int) else 3) for found in values]
            rows.append([f"{NAMES.get(name, name)}, {f'iteration {t}' if t else 'base'}", len(there), *cells])
    heads = [column.removeprefix("challenger/").replace("_", " ") for column in columns]
    return plots.table_markdown(rows, ["run", "seeds", *heads])


def differences(runs: dict[tuple[str, str], Path]) -> str:
    """R-Diverse against each baseline after the last iteration that both have, on the same questions."""
    lines, found = [], defaultdict(list)
    for (name, seed), other in runs.items():
        ours = runs.get(("r_diverse", seed))
        if name == "r_diverse" or ours is None:
            continue
        t = min(finished_iterations(ours), finished_iterations(other))
        folders = [run / f"iteration_{t}" / "evaluate" for run in (ours, other)]
        for path in sorted(folders[0].glob("*/scored.jsonl")):
            if not (folders[1] / path.parent.name / "scored.jsonl").exists():
                continue
            difference, low, high, p_value = paired_difference(*paired_scores(*folders, path.parent.name))
            found[name, t, path.parent.name].append(difference)
            lines.append(
                f"- R-Diverse minus {NAMES.get(name, name)}, seed {seed}, iteration {t}, {path.parent.name}: "
                f"{difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {p_value:.2g}"
            )
    if not lines:
        return ""
    text = "On the same questions (intervals over questions, not over trainings):\n\n" + "\n".join(lines)
    repeated = {key: values for key, values in found.items() if len(values) > 1}
    return text + ("\n\n" + _over_seeds_lines(repeated) if repeated else "")


def _over_seeds_lines(found: dict[tuple[str, int, str], list[float]]) -> str:
    lines = ["Mean of the differences over seeds (standard deviation and interval over trainings):", ""]
    for (name, t, benchmark), values in found.items():
        mean, deviation, low, high = over_seeds(values)
        lines.append(
            f"- R-Diverse minus {NAMES.get(name, name)}, {len(values)} seeds, iteration {t}, {benchmark}: "
            f"{mean:+.3f} ± {deviation:.3f} [{low:+.3f}, {high:+.3f}]"
        )
    return "\n".join(lines)


def estimates(evaluation: Path, suffix: str = "") -> list[Estimate | None]:
    """Math AVG (the seven), Overall AVG (Math AVG and the three general ones, each a fourth), then each benchmark."""
    each = [estimate_of(name, evaluation / f"{name}{suffix}.json") for name in (*MATH, *GENERAL)]
    math_avg = mean_of(each[: len(MATH)])
    return [math_avg, mean_of([math_avg, *each[len(MATH) :]]), *each]


def beside_paper(experiment: str, runs: dict[tuple[str, str], Path]) -> str:
    """The paper's tables with ours beside them, if a cell of ours is filled."""
    table = paper_table(experiment, runs)
    heading = "## Beside the paper's Tables 1 and 2 and Fig. 3"
    note = (
        "In percent. *Ours*: the first seed by rules (another is named), its difference from the paper's, its 95 % "
        "interval over questions; n is the number of questions where it is not the full set. *Judge*: by a model's "
        "verdicts, never mixed with the rules'; the paper's numbers have R-Zero's re-check by GPT-4o. An empty cell "
        "was not run."
    )
    return "\n\n".join(filter(None, [heading, note, table, *unlike_lines(runs), shorter_line(runs)])) if table else ""


def unlike_lines(runs: dict[tuple[str, str], Path]) -> list[str]:
    """A warning of each benchmark that was not evaluated in the same way in all runs and iterations."""
    said = []
    for name in (*MATH, *GENERAL):
        files = {
            f"{run.name} iteration {t}": path
            for run in runs.values()
            for t in range(finished_iterations(run) + 1)
            if (path := run / f"iteration_{t}" / "evaluate" / f"{name}.json").exists()
        }
        kinds = ways(files, f"questions of {name}")
        said += [unlike(kinds)] if len(kinds) > 1 else []
    return said


def shorter_line(runs: dict[tuple[str, str], Path]) -> str:
    """Runs whose phases have fewer generation batches than the paper's, by their manifests."""
    shorter = []
    for (name, seed), run in runs.items():
        config = settings_of(run)
        for phase, (kind, batches) in PHASES.items():
            if (found := _generation_batches(kind, config.get(phase, {}))) < batches:
                label = f"{NAMES.get(name, name)} seed {seed}"
                shorter.append(f"{label}, {phase.capitalize()}: {found:g} generation batches and not {batches}")
    return f"Phases shorter than the paper's: {'; '.join(shorter)}." if shorter else ""


def _generation_batches(kind: type[PhaseConfig], changed: dict[str, Any]) -> float:
    """Generation batches of a phase with these changed fields; `steps_per_generation` else follows accumulation."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    fields = defaults | {"steps_per_generation": None} | changed
    micro_batches = fields["gradient_accumulation_steps"]
    generation = fields["steps_per_generation"] or UPDATES * micro_batches
    return fields["max_steps"] * micro_batches / (generation * fields["num_iterations"])


def paper_table(experiment: str, runs: dict[tuple[str, str], Path]) -> str:
    """The paper's rows by variant and iteration, each with ours below: by rules, by a judge, over all seeds. Empty if
    no cell of ours is filled.

    For an experiment that the paper does not have, its full rows for Qwen3-4B are shown without differences.
    """
    paper = PAPER.get(experiment) or {key: row for key, row in PAPER["qwen3_4b"].items() if len(row) > 2}
    evaluations = evaluation_folders(runs)
    order = ["base", *OTHERS, *NAMES, *(name for name, _ in runs)]
    first = {name: run for (name, _), run in reversed(runs.items())}
    rows = []
    for name, t in sorted({*paper, *evaluations}, key=lambda key: (order.index(key[0]), key[1])):
        label = (OTHERS | NAMES).get(name, name) + (f", {t} iteration{'s' * (t > 1)}" if t else "")
        numbers = [f"{value:.2f}" for value in paper.get((name, t), ())]
        if numbers:
            rows.append([f"paper: {label}", *numbers, *[""] * (len(COLUMNS) - len(numbers))])
        known = paper.get((name, t), ()) if experiment in PAPER else ()
        folders = evaluations.get((name, t), [])
        if folders or (experiment in PAPER and name not in OTHERS):
            found = estimates(folders[0]) if folders else [None] * len(COLUMNS)
            run = folders[0].parents[1] if folders and t else None
            seed = f", seed {run.name.rpartition('-seed')[2]}" if run and run != first[name] else ""  # not so far yet
            rows.append([f"ours: {label}{seed}", *cells(found, known)])
        rows += [[f"{who}: {label}", *cells(found, known)] for who, found in judged(folders[:1])]
        if len(folders) > 1:
            seeds = zip(*(estimates(folder) for folder in folders), strict=True)
            rows.append(
                [
                    f"ours, {len(folders)} seeds: {label}",
                    *(mean_sd([e and e.value for e in found], 2) for found in seeds),
                ]
            )
    if not any(text for row in rows if row[0].startswith("ours") for text in row[1:]):
        return ""
    return plots.table_markdown(rows, ["run", *COLUMNS])


def evaluation_folders(runs: dict[tuple[str, str], Path]) -> dict[tuple[str, int], list[Path]]:
    """(variant, iteration) -> evaluations, one for each seed; for the base, which every run has, the first run's."""
    found: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for (name, _), run in runs.items():
        for t in range(0 if not found else 1, finished_iterations(run) + 1):
            found[name if t else "base", t].append(run / f"iteration_{t}" / "evaluate")
    return found


def judged(folders: Sequence[Path]) -> Iterator[tuple[str, list[Estimate | None]]]:
    """Yields (who judged and how, estimates) for each kind of verdicts found."""
    for folder in folders:
        for suffix, protocol, _ in PROTOCOLS.values():
            paths = [folder / f"{name}.{suffix}.json" for name in (*MATH, *GENERAL)]
            if reports := [json.loads(path.read_text()) for path in paths if path.exists()]:
                names = ", ".join(sorted({report["judge"] for report in reports}))
                failures = sum(sum(report["failures"].values()) for report in reports)
                how = f"{protocol.split(':')[0]}, {failures} failures"
                yield f"ours, judge {names} ({how})", estimates(folder, f".{suffix}")


def cells(found: Sequence[Estimate | None], paper: Sequence[float]) -> list[str]:
    """Cells of a row with the differences from the paper's numbers, which may be fewer."""
    return [cell(estimate, number, 2) for estimate, number in itertools.zip_longest(found, paper)]


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
    """Logged lines of all Challenger phases, with steps counted on from one to the next."""
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
        ax.set_xlabel("principal axis 1")
        ax.margins(0.15)  # large points stand at the border, too
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("principal axis 2")
    text = f"{title}: skills of usable questions with a program (area: how many)"
    figure.suptitle("\n".join(textwrap.wrap(text, 42 * len(vectors))), fontsize=10)  # one panel is narrow
    return plots.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
