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

from common import plots
from common.runs import atomic_write_text

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- begin: python -m benchmarks.tables -->\n", "<!-- end -->\n"
COLUMNS = ["work", "peer", "ours", "peer's", "ratio", "aim", "machine, date"]
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
    rows = []
    for name, make in ROWS.items():
        result = json.loads((FOLDER / "results" / f"{name}.json").read_text())
        where = result.get("machine") if isinstance(result.get("machine"), dict) else result
        rows += [[*row, f"{where['processor']}, {where['date']}"] for row in make(result)]
    return plots.table_markdown(rows, COLUMNS)


def answers(result: Result) -> list[list[str]]:
    rows = []
    for file, name in (("cases.jsonl", "shared"), ("answer_pairs.jsonl", "own")):
        rates = result["files"][file]["checks_per_second"]
        for peer in ("math-verify", "mathruler"):
            ours, theirs = rates["ours"]["all"], rates[peer]["all"]
            work = f"answer checks a second, {result['files'][file]['pairs']:,} {name} pairs"
            rows.append([work, peer, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f} x", "10 x"])
    batch = {name: entry["seconds"] for name, entry in result["batch"].items()}
    theirs = batch["math-verify"]
    return [
        *rows,
        ["2,048 responses, s", "math-verify", *_pair(batch["ours"], theirs), f"{theirs / batch['ours']:.1f} x", ""],
    ]


def r_diverse_reward(result: Result) -> list[list[str]]:
    peer = result["r_zero_pairwise"]["seconds"]
    rows = [["R-Zero's penalty, bit for bit, s", "R-Zero", *_pair(result["r_zero"]["seconds"], peer)]]
    rows += [
        [f"R-Diverse's reward, bank of {b['rows']:,} rows, s", "R-Zero", *_pair(b["reward_seconds"], peer)]
        for b in result["bank"]
    ]
    seconds = [result["r_zero"]["seconds"], *(bank["reward_seconds"] for bank in result["bank"])]
    aims = ["300 x", *("300 x" if bank["rows"] < 10**6 else "10 s" for bank in result["bank"])]
    return [[*row, f"{peer / s:.1f} x", aim] for row, s, aim in zip(rows, seconds, aims, strict=True)]


def srpo_step(result: Result) -> list[list[str]]:
    ours, theirs = (statistics.median(result["seconds"][kind]) for kind in ("srpo", "sdpo (trl)"))
    spread = {name: 1 / value for name, value in result["srpo_over_trl_sdpo"].items()}
    ratio = f"{spread['median']:.2f} x [{spread['high']:.2f}, {spread['low']:.2f}]"
    return [["SRPO step, 41 % routed, s", "trl.experimental.sdpo", *_pair(ours, theirs), ratio, "1.18 x"]]


def startup(result: Result) -> list[list[str]]:
    rows = []
    for name, sides in result["seconds"].items():
        ratios = [trl / ours for ours, trl in zip(sides["ours"], sides["trl"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} x [{min(ratios):.2f}, {max(ratios):.2f}]"
        medians = (statistics.median(sides[side]) for side in ("ours", "trl"))
        rows.append([f"`{name}`, s", "TRL's own", *_pair(*medians), ratio, "1 x"])
    return rows


def va_opd_scoring(result: Result) -> list[list[str]]:
    rows = []
    for name, found in result.items():
        if isinstance(found, dict) and "ratio" in found:
            ours, theirs = (statistics.median(values) for values in found["seconds"].values())
            ratio = "{median:.2f} x [{low:.2f}, {high:.2f}]".format(**found["ratio"])
            student = name == "student"
            work = "student, uneven rollouts, s" if student else f"teacher scoring, {name}, s"
            rows.append([work, "TRL's way", *_pair(ours, theirs), ratio, "" if student else "2.5 x"])
    return rows


def _pair(ours: float, theirs: float) -> tuple[str, str]:
    return f"{ours:.2f}", f"{theirs:.2f}"


ROWS: dict[str, Callable[[Result], list[list[str]]]] = {
    "va_opd_scoring": va_opd_scoring,
    "srpo_step": srpo_step,
    "r_diverse_reward": r_diverse_reward,
    "answers": answers,
    "startup": startup,
}

if __name__ == "__main__":
    sys.exit(main())
