"""Our evaluations beside a paper's numbers: estimates in percent, means and cells of them, and how they were made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.estimators import mean_of_independent, over_seeds
from common.evaluation import BENCHMARKS, headline

# What else decides an accuracy, by its name in a metrics file
ALSO = {
    "max_new_tokens": "at most tokens",
    "top_k": "top-k",
    "rows": "questions and gold answers with digest",
    "chat_template_kwargs": "template with",
    "engine_options": "engine with",
    "strict": "strict scorer",
    "reward": "reward",
}


class Estimate(NamedTuple):
    """A score in percent and the ends of its 95 % interval; `questions` if it is of a part of the set, else None."""

    value: float
    low: float
    high: float
    questions: int | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder is named like a run, `<variant>-seed<k>`; a copy such as `srpo-seed0_old` is no other seed."""
    name, _, seed = folder.name.rpartition("-seed")
    return bool(name) and seed.isascii() and seed.isdecimal()


def estimate_of(benchmark: str, path: Path) -> Estimate | None:
    """The headline of a metrics file; None without the file or the number."""
    metrics = json.loads(path.read_text()) if path.exists() else {}
    value, ends = headline(metrics) if metrics else (None, None)
    if value is None:
        return None
    part = metrics["questions"] if metrics["questions"] < BENCHMARKS[benchmark].rows else None
    return Estimate(100 * value, *(100 * end for end in ends), part)


def mean_of(parts: Sequence[Estimate | None]) -> Estimate | None:
    """Mean over benchmarks with independent errors; None if one is missing."""
    if None in parts:
        return None
    return Estimate(*mean_of_independent([part[:3] for part in parts]), sum(p.questions or 0 for p in parts) or None)


def part_of(estimate: Estimate) -> str:
    """Number of questions, such as " n=60", of an estimate on a part of the set; else ""."""
    return "" if estimate.questions is None else f" n={estimate.questions}"


def cell(estimate: Estimate | None, paper: float | None, digits: int) -> str:
    """`value (difference from the paper's) [low, high] n=part`; "" without an estimate."""
    if estimate is None:
        return ""
    difference = "" if paper is None else f" ({estimate.value - paper:+.{digits}f})"
    return f"{estimate.value:.{digits}f}{difference} [{estimate.low:.1f}, {estimate.high:.1f}]{part_of(estimate)}"


def mean_sd(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean over seeds, and `± standard deviation` of several; "" if one has no value."""
    if None in values:
        return ""
    mean, deviation, *_ = over_seeds(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def decodings(files: Mapping[str, Path], what: str) -> str:
    """How evaluations were made, by metrics file of each label; a warning if not all in the same way."""
    kinds = ways(files, what)
    return next(iter(kinds)) if len(kinds) == 1 else unlike(kinds)


def ways(files: Mapping[str, Path], what: str) -> dict[str, list[str]]:
    """Labels of metrics files by how the evaluations were made, of which `ALSO` is named where it differs."""
    records = {label: json.loads(file.read_text()) for label, file in files.items()}
    settings = {label: {**record, **record["decoding"]} for label, record in records.items()}
    values = {name: {label: _shown(found.get(name)) for label, found in settings.items()} for name in ALSO}
    kinds: dict[str, list[str]] = {}
    for label, found in settings.items():
        asked = f"{found['questions']} {what}, {found['samples']} samples each"
        how = f"{asked} at temperature {found['temperature']}, top-p {found['top_p']}"
        differing = (name for name in ALSO if len(set(values[name].values())) > 1)
        how += "".join(f", {ALSO[name]} {values[name][label]}" for name in differing)
        kinds.setdefault(how, []).append(label)
    return kinds


def _shown(value: Any) -> str:
    """A setting, "none" if it is off or not recorded; of a digest the beginning."""
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
    return text[:8] if len(text) == 64 else text if value else "none"


def unlike(kinds: Mapping[str, Sequence[str]]) -> str:
    """A warning of the different `ways`."""
    lines = [f"{', '.join(labels)}: {how}" for how, labels in kinds.items()]
    return f"Evaluated in different ways, so that accuracies do not compare: {'; '.join(lines)}"
