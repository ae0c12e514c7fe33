r"""Answer checkers side by side: accuracy, answers over the time limit, checks a second by kind; batches of 2,048
responses, and of 256 long ones.

    python -m benchmarks.answers [--data FILE ...] [--repeats N] [--checkers NAME ...]

Ours, math-verify and MathRuler check the same pairs in one run on one core. A file is JSON lines with `gold`,
`prediction`, `expected` (true or false) and optionally `kind` (else what our checker compares the pair as) and `form`:
`answer` (the default) is a bare answer, anything else a response that holds one. Rows of kind `arguable` and of form
`nomarker` are left out. Without --data the pairs are those of our tests, written by the authors of our checker: name a
file of your own for a fair comparison.

Each checker runs in a process of its own, a new one for each repeat, so that each pair is new to it; a pair that takes
more than --limit seconds ends it, and another one is started. Checks per second count the pairs that every checker
finished. "Late" are the pairs beyond the limit; the answers in LARGE are only measured for that. MathRuler evaluates
predictions as Python code: give it no file that you do not trust. Writes benchmarks/results/answers.json.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.machine import in_own_process, machine
from common import plots
from common.answers import check, grade, grade_many, same_answer
from common.cli import run_main
from common.runs import atomic_write_json

OWN_PAIRS = Path(__file__).parents[1] / "tests" / "common" / "answer_pairs.jsonl"
# Name: modules. mathruler does not declare that it needs the second one.
CHECKERS = {"ours": ["common"], "math-verify": ["math_verify"], "mathruler": ["mathruler", "pylatexenc"]}
LARGE = (
    "9^{9^{9^{9}}}", "9**9**9", "((10!)!)!", "(9!)!!", "1000000000!", r"\binom{10^9}{5\cdot10^8}", "(x+y)**3000",
    r"\sum_{n=1}^{\infty} \frac{1}{n^3+\sin n}", "(" * 3000 + "5" + ")" * 3000, "9" * 5000,
)  # fmt: skip
PACKAGES = ("math-verify", "mathruler", "latex2sympy2-extended", "sympy", "mpmath")
BATCH = 2048
BATCHES = (512, 1024, BATCH)
LONG = 256  # responses as of reasoning models
CHARACTERS = (3_000, 10_000, 30_000)
MIN_TIMED = 5  # pairs of a kind below which its checks a second say little


class Pair(NamedTuple):
    gold: str
    prediction: str
    expected: bool
    kind: str
    bare: bool  # an answer, not a response


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.answers", _main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.answers", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[OWN_PAIRS], help="JSON lines of answer pairs")
    parser.add_argument("--checkers", nargs="*", default=list(CHECKERS), choices=CHECKERS, help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="times are medians over these (3)")
    parser.add_argument("--limit", type=float, default=6.0, help="seconds for one check (6)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "answers.json")
    args = parser.parse_args(argv)
    files = {path.name: read_pairs(path) for path in args.data}
    names = [name for name in args.checkers if is_installed(name)]
    result: dict[str, Any] = {"machine": machine(*PACKAGES), "limit_seconds": args.limit, "files": {}}
    for name, pairs in files.items():
        result["files"][name] = measure(pairs, names, args.repeats, args.limit)
        print(f"\n{name}: {len(pairs)} pairs\n{table(result['files'][name])}", flush=True)
    result["large"] = measure_large(names, args.limit)
    result["batches"] = {count: measure_batch(names, args.repeats, args.limit, (count,)) for count in BATCHES}
    result["long"] = {size: measure_batch(names, args.repeats, args.limit, (LONG, size)) for size in CHARACTERS}
    print(f"\n{other_table(result)}")
    atomic_write_json(args.out, result)
    print(f"\nWritten to {args.out}")


def is_installed(name: str) -> bool:
    missing = [module for module in CHECKERS[name] if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{name} is left out: pip install {' '.join(missing).replace('_', '-')}", flush=True)
    return not missing


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Pair]:
    """Rows of `gold`, `prediction`, `expected`, or rows of our tests: `gold`, `same` and `different` answers."""
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        row = json.loads(line) if line.strip() else {"kind": "arguable"}
        if row.get("kind") == "arguable" or row.get("form") == "nomarker":
            continue
        if "gold" not in row or not ("expected" in row or "same" in row):
            raise ValueError(f"{path}, line {number}: a row needs gold, prediction and expected")
        answers = [(row["prediction"], row["expected"])] if "expected" in row else []
        answers += [(answer, same) for same in ("same", "different") for answer in row.get(same, [])]
        bare = row.get("form", "answer") == "answer"
        for answer, expected in answers:
            kind = row.get("kind") or check(rf"\boxed{{{answer}}}", row["gold"]).kind or "other"
            pairs.append(Pair(row["gold"], answer, expected in (True, "same"), kind, bare))
    if not pairs:
        raise ValueError(f"{path} holds no pair")
    return pairs


def batch_pairs(count: int, characters: int = 800) -> list[Pair]:
    """`count` responses as in a training step: none seen before, three in four right."""
    kinds = (
        ("{i}", "{i}"), (r"\frac{{{i}}}{{7}}", r"{i}/7"), ("x^2+{i}x", "x(x+{i})"), ("({i}, 2)", "({i},2)"),
        (r"{i}\sqrt{{2}}", r"\sqrt{{2}} \cdot {i}"), (r"\$1,{i:03d}.50", "1{i:03d}.5"), ("[0, {i})", "[0,{i})"),
        ("x={i}", "{i}"), (r"\dfrac{{{i}\pi}}{{6}}", r"\frac{{{i}}}{{6}}\pi"), ("{i}^\\circ", "{i}"),
    )  # fmt: skip
    sentence = (
        r"Let $x$ be the number sought. From the first equation $x = \frac{3}{2}y_{1} + 2$, and so on for a while. "
    )
    reasoning = sentence * (characters // len(sentence))
    pairs = []
    for i in range(count):
        answer, gold = (text.format(i=i % 997 + 2) for text in kinds[i % len(kinds)])
        wrong = i % 4 == 3
        response = f"{reasoning}\n\nThe answer is $\\boxed{{{answer}{'+1' if wrong else ''}}}$."
        pairs.append(Pair(gold, response, not wrong, "batch", False))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Checkers, each in its own process
# ---------------------------------------------------------------------------------------------------------------------


def ours() -> Callable[[Pair], bool]:
    return lambda pair: (same_answer if pair.bare else grade)(pair.prediction, pair.gold)


def math_verify() -> Callable[[Pair], bool]:
    r"""As its users call it: gold answers in a box, and letters read as choices if the gold answer is one."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    usual = (LatexExtractionConfig(), ExprExtractionConfig())

    def is_right(pair: Pair) -> bool:
        configs = (*usual, StringExtractionConfig()) if len(pair.gold) == 1 and pair.gold.isupper() else usual
        prediction = rf"\boxed{{{pair.prediction}}}" if pair.bare else pair.prediction
        return verify(parse(rf"\boxed{{{pair.gold}}}", configs), parse(prediction, configs))

    return is_right


def mathruler() -> Callable[[Pair], bool]:
    from mathruler.grader import extract_boxed_content, grade_answer

    return lambda pair: grade_answer(
        pair.prediction if pair.bare else extract_boxed_content(pair.prediction), pair.gold
    )


def serve(name: str, pipe) -> None:
    """Answers each pair with (right or wrong, seconds). An exception counts as wrong: the answer earns nothing."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # checkers print and log what they cannot parse
    is_right = {"ours": ours, "math-verify": math_verify, "mathruler": mathruler}[name]()
    for gold in ("x^2+2x+1", r"\sqrt{x}", r"\int_{0}^{x} t dt", r"\{1,2\}"):  # imports, tables, our worker process
        is_right(Pair(gold, f"({gold})+y", False, "", True))
    pipe.send(None)
    while True:
        pair = pipe.recv()
        start = time.perf_counter()
        try:
            right = bool(is_right(pair))
        except Exception:
            right = False
        pipe.send((right, time.perf_counter() - start))


class Checker:
    """A process that serves one checker. `ask` returns None for a pair that took longer than `limit`."""

    def __init__(self, name: str, limit: float) -> None:
        self.name, self.limit = name, limit
        self._start()

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.name, theirs))
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def ask(self, pair: Pair) -> tuple[bool, float] | None:
        self.pipe.send(pair)
        if self.pipe.poll(self.limit):
            return self.pipe.recv()
        self.__exit__()
        self._start()
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def measure(pairs: list[Pair], names: list[str], repeats: int, limit: float) -> dict[str, Any]:
    """Scores and checks per second of each checker; they take turns in each repeat, so that all see one machine."""
    answers: dict[str, list[list]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            with Checker(name, limit) as checker:
                rows = tqdm(pairs, desc=f"{name}, {repeat + 1} of {repeats}", disable=None, leave=False)
                answers[name].append([checker.ask(pair) for pair in rows])
    done = [i for i in range(len(pairs)) if all(run[i] for runs in answers.values() for run in runs)]
    groups = {"all": done} | {kind: [i for i in done if pairs[i].kind == kind] for kind in kinds_of(pairs)}
    return {
        "pairs": len(pairs),
        "timed": {kind: len(rows) for kind, rows in groups.items()},
        "scores": {name: scores(pairs, runs[0]) for name, runs in answers.items()},
        "checks_per_second": {
            name: {kind: rate(runs, rows) for kind, rows in groups.items() if rows} for name, runs in answers.items()
        },
    }


def kinds_of(pairs: list[Pair]) -> list[str]:
    """Kinds of the pairs, the most frequent first."""
    return [kind for kind, _ in Counter(pair.kind for pair in pairs).most_common()]


def scores(pairs: list[Pair], answers: list[tuple[bool, float] | None]) -> dict[str, Any]:
    """Accuracy, false positives and negatives, late answers. A late one counts as wrong, as it would in training."""
    right = [answer is not None and answer[0] for answer in answers]
    false_positives = [pair for pair, got in zip(pairs, right, strict=True) if got and not pair.expected]
    false_negatives = [pair for pair, got in zip(pairs, right, strict=True) if pair.expected and not got]
    return {
        "accuracy": 1 - (len(false_positives) + len(false_negatives)) / len(pairs),
        "false_positives": len(false_positives),
        "false_negatives": len(false_negatives),
        "late": answers.count(None),
    }


def rate(runs: list[list[tuple[bool, float]]], rows: list[int]) -> float:
    return len(rows) / statistics.median(sum(run[i][1] for i in rows) for run in runs)


def measure_large(names: list[str], limit: float) -> dict[str, Any]:
    """Late checks of answers with endless work. Gold is a formula, since some checkers compare numbers as text."""
    result = {}
    for name in names:
        with Checker(name, limit) as checker:
            answers = [checker.ask(Pair("x+5", text, False, "large", True)) for text in LARGE]
        slowest = max((answer[1] for answer in answers if answer), default=None)
        result[name] = {"late": answers.count(None), "slowest_seconds_in_time": slowest}
    return result


def measure_batch(names: list[str], repeats: int, limit: float, size: tuple[int, ...]) -> dict[str, Any]:
    """Seconds for the responses of `batch_pairs(*size)`: ours by `grade_many` with one worker, others one by one."""
    pairs, result = batch_pairs(*size), {}
    for name in names:
        if name == "ours":
            runs = [in_own_process(grade_batch, *size) for _ in range(repeats)]
        else:
            with Checker(name, limit) as checker:
                answers = [
                    checker.ask(pair) or (False, limit)
                    for pair in tqdm(pairs, desc=f"{name}, batch", disable=None, leave=False)
                ]
            wrong = sum(right != pair.expected for (right, _), pair in zip(answers, pairs, strict=True))
            runs = [(sum(seconds for _, seconds in answers), wrong)]
        result[name] = {"seconds": statistics.median(run[0] for run in runs), "wrong_verdicts": runs[0][1]}
    return result


def grade_batch(*size: int) -> tuple[float, int]:
    """Seconds and wrong verdicts of one batch, in a process that has checked nothing before."""
    pairs = batch_pairs(*size)
    start = time.perf_counter()
    verdicts = grade_many([pair.prediction for pair in pairs], [pair.gold for pair in pairs], workers=1)
    seconds = time.perf_counter() - start
    return seconds, sum((verdict == "correct") != pair.expected for verdict, pair in zip(verdicts, pairs, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Scores, and checks per second by kind; a kind with few pairs is only in the file."""
    names = list(result["scores"])
    score_rows = [
        [name, f"{row['accuracy']:.2%}", row["false_positives"], row["false_negatives"], row["late"]]
        for name, row in result["scores"].items()
    ]
    rates = result["checks_per_second"]
    rate_rows = [
        [kind, count, *(f"{rates[name][kind]:,.0f}" for name in names)]
        for kind, count in result["timed"].items()
        if count >= MIN_TIMED
    ]
    columns = ["checker", "accuracy", "false positives", "false negatives", "late"]
    rate_table = plots.table_markdown(rate_rows, ["checks a second", "pairs", *names])
    return f"{plots.table_markdown(score_rows, columns)}\n\n{rate_table}"


def other_table(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['late']} of {len(LARGE)}",
            f"{result['batches'][BATCH][name]['seconds']:.2f}",
            result["batches"][BATCH][name]["wrong_verdicts"],
            f"{result['long'][CHARACTERS[-1]][name]['seconds']:.2f}",
        ]
        for name, row in result["large"].items()
    ]
    long = f"seconds for {LONG} of {CHARACTERS[-1]:,} characters"
    columns = ["late on answers without end", f"seconds for {BATCH:,} responses", "wrong verdicts", long]
    return plots.table_markdown(rows, ["checker", *columns])


if __name__ == "__main__":
    sys.exit(main())
