"""The overview of all measurements in benchmarks/README.md, from benchmarks/results/*.json.

python -m benchmarks.tables            # writes it into the README
python -m benchmarks.tables --check    # exit code 1 if the README says otherwise than the results
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import spread
from common import plots
from common.runs import atomic_write_text

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- begin: python -m benchmarks.tables -->\n", "<!-- end -->\n"
COLUMNS = ["work", "peer", "ours", "peer's", "ratio", "aim", "growth"]
PAIRS = {"cases.jsonl": "shared", "answer_pairs.jsonl": "own"}  # name of a file of `benchmarks.answers` in the README
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}{overview()}\n{END}{after}"
    if args.check:
        if text != readme.read_text():
            print(
                "benchmarks.tables: README.md differs from results/: run python -m benchmarks.tables", file=sys.stderr
            )
            return 1
    else:
        atomic_write_text(readme, text)
    return 0


def overview() -> str:
    tables: dict[str, list[list[str]]] = {}  # by machine and date
    for name, make in ROWS.items():
        for path in (FOLDER / "results" / f"{name}.json", FOLDER / "results" / f"{name}_gpu.json"):
            if path.exists():  # the second where a GPU was at hand
                result = json.loads(path.read_text())
                where = result["machine"] if isinstance(result.get("machine"), dict) else result
                tables.setdefault(f"{where['processor']}, {where['date']}", []).extend(make(result))
    return "\n\n".join(f"{where}:\n\n{_table(rows)}" for where, rows in tables.items())


def of_file(name: str, path: Path) -> str:
    """The rows that one results file adds to the overview; `name` is a key of `ROWS`."""
    return _table(ROWS[name](json.loads(path.read_text())))


def _table(rows: list[list[str]]) -> str:
    return plots.table_markdown([[*row, *[""] * (len(COLUMNS) - len(row))] for row in rows], COLUMNS)


def growth(sizes: list[float], *sides: list[float]) -> str:
    """Exponents of ours and the peer's values over the size, at three sizes or more: slopes of log value over log
    size."""
    if len(sizes) < 3:
        return "-"
    return " / ".join(f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}" for values in sides)


def answers(result: Result) -> list[list[str]]:
    rows = []
    for file, found in result["files"].items():
        rates = {name: rate["all"] for name, rate in found["checks_per_second"].items()}
        work, ours = f"answer checks a second, {found['pairs']:,} {PAIRS.get(file, file)} pairs", rates.pop("ours")
        for peer, theirs in rates.items():
            rows.append([work, peer, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f} x", "10 x"])
    for key, work in (("batches", "{:,} responses, s"), ("long", "256 responses of {:,} characters, s")):
        sizes, batches = list(map(int, result[key])), list(result[key].values())
        for peer in (name for name in batches[0] if name != "ours"):
            ours, theirs = ([batch[name]["seconds"] for batch in batches] for name in ("ours", peer))
            slopes, ratio = growth(sizes, ours, theirs), f"{theirs[-1] / ours[-1]:.1f} x"
            rows.append([work.format(sizes[-1]), peer, *_pair(ours[-1], theirs[-1]), ratio, "", slopes])
    return rows


def r_diverse_reward(result: Result) -> list[list[str]]:
    found = {int(count): entry for count, entry in result["r_zero"].items()}
    ours, theirs = ([entry[side] for entry in found.values()] for side in ("seconds", "pairwise_seconds"))
    peer, slopes = theirs[-1], growth(list(found), ours, theirs)
    figures = [*_pair(ours[-1], peer), f"{peer / ours[-1]:.1f} x", "300 x", slopes]
    rows = [[f"R-Zero's penalty of {max(found):,} questions, bit for bit, s", "R-Zero", *figures]]
    seconds = [bank["reward_seconds"] for bank in result["bank"]]
    slopes = growth([bank["rows"] for bank in result["bank"]], seconds)
    for count, taken in zip((bank["rows"] for bank in result["bank"]), seconds, strict=True):
        aim = {10**4: "300 x", 10**6: "10 s"}.get(count, "")
        work = f"R-Diverse's reward, bank of {count:,} rows, s"
        rows.append([work, "R-Zero", *_pair(taken, peer), f"{peer / taken:.1f} x", aim, slopes])
    return rows


def evaluation(result: Result) -> list[list[str]]:
    found = {int(count): entry["seconds"] for count, entry in result["prompts"].items()}
    works = [f"evaluation, {count} prompts, s" for count in found]
    return _timed(works, "padded batches", list(found.values()), ("ours", "naive"), list(found), "2 x")


def srpo_step(result: Result) -> list[list[str]]:
    kinds = ("srpo", "sdpo (trl)")
    if any(kind not in result["seconds"] for kind in kinds):  # the run was out of time or memory
        return []
    steps = {int(length): seconds for length, seconds in result["seconds of shorter steps"].items()}
    steps[result["settings"]["response"]] = result["seconds"]
    ours, theirs = ([statistics.median(step[kind]) for step in steps.values()] for kind in kinds)
    ratio = _ratio(*(result["seconds"][kind] for kind in kinds))
    figures = [*_pair(ours[-1], theirs[-1]), ratio, "1.18 x", growth(list(steps), ours, theirs)]
    size = f" {result['settings']['real']}," if result["settings"].get("real") else ""
    rows = [[f"SRPO step,{size} 41 % routed, s", "trl.experimental.sdpo", *figures]]
    peaks = result.get("peak_gib", {})
    for kind, label in (("sdpo (trl)", "trl.experimental.sdpo"), ("grpo", "GRPO without a teacher")):
        if peaks.get(kind):
            pair = [peaks[name] * 2**30 / 1e9 for name in ("srpo", kind)]
            rows.append([f"SRPO step,{size} peak GB", label, *_pair(*pair), f"{pair[1] / pair[0]:.2f} x"])
    return rows


def srpo_memory(result: Result) -> list[list[str]]:
    lengths, rows = result["settings"]["responses"], []
    peaks = {kind: [statistics.median(by[str(n)]) / 1e9 for n in lengths] for kind, by in result["peak"].items()}
    work, teacher = f"SRPO step, responses of up to {lengths[-1]}, peak GB", result["teacher"] / 1e9
    for kind, label in (("grpo", "our own GRPO"), ("sdpo (trl)", "trl.experimental.sdpo")):
        ours, theirs = peaks["srpo"][-1], peaks[kind][-1]
        aim = f"{theirs + teacher:.2f} GB, with a teacher" if kind == "grpo" else ""
        cells = [*_pair(ours, theirs), f"{theirs / ours:.2f} x", aim, growth(lengths, peaks["srpo"], peaks[kind])]
        rows.append([work, label, *cells])
    return rows


def r_diverse_step(result: Result) -> list[list[str]]:
    found = {int(longest): entry["seconds"] for longest, entry in result["responses"].items()}
    size = f"{result['settings']['real']}, " if result["settings"].get("real") else ""
    works = [f"R-Diverse's phase, {size}rollouts of up to {longest}, s" for longest in found]
    return _timed(works, "TRL's GRPOTrainer", list(found.values()), ("ours", "trl"), list(found), "")


def startup(result: Result) -> list[list[str]]:
    rows = []
    for name, sides in result["seconds"].items():
        ratio = _ratio(sides["ours"], sides["trl"])
        medians = (statistics.median(sides[side]) for side in ("ours", "trl"))
        rows.append([f"`{name}`, s", "TRL's own", *_pair(*medians), ratio, "1 x"])
    return rows


def va_opd_scoring(result: Result) -> list[list[str]]:
    rows = []
    for work, way, aim in (("equal lengths", "shared", "2.5 x"), ("uneven lengths", "shared", "2.5 x"),
                           ("student", "trimmed", "")):  # fmt: skip
        found = {name: x for name, x in result.items() if name.startswith(f"{work}, size") and "seconds" in x}
        label = "student, uneven rollouts" if work == "student" else f"teacher scoring, {work}"
        works, seconds = [f"{name.replace(work, label)}, s" for name in found], [x["seconds"] for x in found.values()]
        for peer in dict.fromkeys(name for taken in seconds for name in taken if name != way):
            tokens = [x["counted"][peer]["tokens"] for x in found.values()]
            rows += _timed(works, peer, seconds, (way, peer), tokens, aim)
    found = {name: entry for name, entry in result.items() if name.startswith("whole step") and "steps" in entry}
    ours, plain = (
        [statistics.median(step["step"] for step in entry["steps"][weighting]) for entry in found.values()]
        for weighting in ("va", "none")
    )
    slopes = growth([entry["response"] for entry in found.values()], ours, plain)
    for (name, entry), *pair in zip(found.items(), ours, plain, strict=True):
        share = "{median:+.1%} [{low:.1%}, {high:.1%}]".format(**entry["va_over_opd"])
        rows.append([f"VA-OPD's {name}, s", "our own OPD", *_pair(*pair), share, "+3 %", slopes])
    return rows


def va_opd_loss(result: Result) -> list[list[str]]:
    peers = {"trl": "TRL's trainer", "naive": "whole logits", "liger": "Liger's fused JSD"}
    true = _loss_rows("VA-OPD loss, heads of 2B and 8B", result["true heads"], peers)
    of = ", heads of 2B and 8B" if result["settings"]["student"] == 2048 else ""
    return [*_loss_rows(f"VA-OPD loss{of}", result["paths"], peers), *true]


def srpo_loss(result: Result) -> list[list[str]]:
    return _loss_rows("SRPO divergence and entropy", result["paths"], {"full logits": "whole logits"})


def _loss_rows(work: str, paths: dict[str, dict[str, Any]], peers: dict[str, str]) -> list[list[str]]:
    """Peak and seconds of ours and of each peer, at the largest size at which both were measured."""
    rows = []
    paths = {name: {n: x for n, x in side.items() if "out_of_memory" not in x} for name, side in paths.items()}
    ours = paths["ours"]
    for peer, label in peers.items():
        if not (common := ours.keys() & paths.get(peer, {}).keys()):
            continue
        size = max(common, key=int)
        for unit, aim in (("GB", "1 GB"), ("s", "1 x")):
            both = [{int(n): _figure(entry, unit) for n, entry in side.items()} for side in (ours, paths[peer])]
            mine, theirs = (side[int(size)] for side in both)
            slopes = " / ".join(growth(list(side), list(side.values())) if len(side) > 2 else "-" for side in both)
            cells = [*_pair(mine, theirs), f"{theirs / mine:.2f} x", aim, slopes]
            rows.append([f"{work}, {int(size):,} rows, {'peak ' * (unit == 'GB')}{unit}", label, *cells])
    return rows


def _figure(entry: dict[str, Any], unit: str) -> float:
    return entry["peak_gib"] * 2**30 / 1e9 if unit == "GB" else statistics.median(entry["seconds"])


def r_diverse_sam(result: Result) -> list[list[str]]:
    found = {int(count): entry for count, entry in result["questions"].items()}
    largest, rows = found[max(found)], []
    ours, alone, again = (
        [statistics.median(entry["seconds"][way]) for entry in found.values()]
        for way in ("ours", "one by one", "again")
    )
    work, slopes = f"SAM of {max(found):,} questions", growth(list(found), ours, alone)
    figures = [*_pair(ours[-1], alone[-1]), _spread(largest["ratio"]), "", slopes]
    rows.append([f"{work}, s", "one request a question", *figures])
    figures = [*_pair(again[-1], alone[-1]), f"{alone[-1] / again[-1]:.1f} x", "", growth(list(found), again, alone)]
    rows.append([f"{work}, written before, s", "one request a question", *figures])
    for key, what in (("requests", "requests"), ("forwards", "forwards of the coder")):
        mine, theirs = (largest["counted"][way][key] for way in ("ours", "one by one"))
        cells = [f"{mine:,}", f"{theirs:,}", f"{theirs / mine:.1f} x", "", ""]
        rows.append([f"{work}, {what}", "one request a question", *cells])
    return rows


def _timed(
    works: list[str], peer: str, seconds: list[dict], ways: tuple[str, str], sizes: list[float], aim: str
) -> list[list[str]]:
    """A row for each size: medians of the repeats of two `ways`, ours and the peer's, their ratio, their growth."""
    sides = [[statistics.median(taken[way]) for taken in seconds] for way in ways]
    ratios, slopes = [_ratio(*(taken[way] for way in ways)) for taken in seconds], growth(sizes, *sides)
    return [
        [work, peer, *_pair(ours, theirs), ratio, aim, slopes]
        for work, ours, theirs, ratio in zip(works, *sides, ratios, strict=True)
    ]


def _ratio(ours: list[float], theirs: list[float]) -> str:
    return _spread(spread(b / a for a, b in zip(ours, theirs, strict=True)))


def _spread(ratio: dict[str, float]) -> str:
    return "{median:.2f} x [{low:.2f}, {high:.2f}]".format(**ratio)


def _pair(ours: float, theirs: float) -> tuple[str, str]:
    digits = 2 if min(ours, theirs) >= 0.2 else 4
    return f"{ours:.{digits}f}", f"{theirs:.{digits}f}"


ROWS: dict[str, Callable[[Result], list[list[str]]]] = {
    "va_opd_scoring": va_opd_scoring,
    "va_opd_loss": va_opd_loss,
    "srpo_step": srpo_step,
    "srpo_step_8b": srpo_step,
    "srpo_memory": srpo_memory,
    "srpo_loss": srpo_loss,
    "r_diverse_step": r_diverse_step,
    "r_diverse_reward": r_diverse_reward,
    "r_diverse_sam": r_diverse_sam,
    "evaluation": evaluation,
    "answers": answers,
    "startup": startup,
}

if __name__ == "__main__":
    sys.exit(main())
