"""Time of the Challenger's reward for one step of 2,048 questions: R-Diverse against R-Zero's BLEU path.

    python -m benchmarks.r_diverse_reward [--questions N] [--bank-rows N ...] [--no-peer]

R-Diverse: P_rep on embeddings and MAP against a bank on disk. R-Zero: one nltk `sentence_bleu` for each pair, then
scikit-learn's clustering; and the same rule by `bleu_repetition_penalty`, whose penalties must be equal. The work of
models is left out: the Solver's answers are the same for both, and a coder and an encoder make the embeddings that
R-Diverse needs. Each bank is in a process of its own, whose memory is measured. Questions, embeddings and bank are
synthetic, from a seed. Ours is the median of five steps; R-Zero's minutes are taken once, at a quarter, half and all
of the questions.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import tables
from benchmarks.machine import in_own_process, machine
from common.cli import run_main
from common.runs import atomic_write_json
from r_diverse import MemoryBank, bleu_repetition_penalty, challenger_reward, repetition_penalty

TEMPLATES = (
    "Let {x} and {y} be positive integers such that {x}^2 + {a} {x} {y} + {b} {y}^2 = {c}. Find the sum of all "
    "possible values of {x} + {y}, given that {x} is {adjective} and {y} leaves remainder {d} when divided by {e}.",
    "A fair {a}-sided die is rolled {b} times. Find the probability that the sum of the outcomes is {adjective} and "
    "at least {c}, and express it as a fraction in lowest terms whose numerator and denominator you then add.",
    "In triangle ABC, AB = {a}, BC = {b} and the angle at B is {c} degrees. The circle through A and C that is "
    "tangent to BC meets AB again at the point {x}. Find the length of the segment from {x} to the midpoint of AC.",
    "Consider the polynomial P({x}) = {x}^4 - {a} {x}^3 + {b} {x}^2 - {c} {x} + {d} with real coefficients. If two of "
    "its roots are {adjective} numbers whose product is {e}, compute the value of P({y}) at {y} = {a} + {b}.",
    "How many sequences of length {a} made of the digits 0 to {b} contain no two equal neighbours and an "
    "{adjective} number of the digit {d}? Give the remainder of the answer when it is divided by {e}.",
    "Evaluate the integral of {x}^{a} times the logarithm of {x} plus {b} over the interval from {c} to {d}, where "
    "{x} is a real variable, and write the result as {y} times pi plus a rational number with denominator {e}.",
    "A train leaves the station at {a} km/h and a second one follows {b} minutes later at {c} km/h. After how many "
    "minutes is the distance between them {adjective} for the first time and less than {d} km?",
    "Find the number of functions f from the set of the first {a} positive integers to the set of the first {b} such "
    "that f(f({x})) = {x} + {c} for every {adjective} {x}, and f takes the value {d} exactly {e} times.",
)
ADJECTIVES = (
    "even",
    "odd",
    "prime",
    "composite",
    "square-free",
    "a multiple of three",
    "a perfect square",
    "positive",
)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.r_diverse_reward", _main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.r_diverse_reward", description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=2048, help="questions of one step (2048)")
    parser.add_argument(
        "--bank-rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="sizes of the bank"
    )
    parser.add_argument("--dim", type=int, default=1536, help="dimensions of the embeddings (1536)")
    parser.add_argument("--no-peer", action="store_true", help="leave R-Zero's pair-by-pair path out: minutes")
    parser.add_argument(
        "--folder", type=Path, help="where the banks are made and removed (the system's temporary one)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/r_diverse_reward.json"))
    args = parser.parse_args(argv)
    atomic_write_json(args.out, measure(args))
    if not args.no_peer:
        print(tables.of_file("r_diverse_reward", args.out))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    questions, embeddings = make_questions(args.questions), make_embeddings(args.questions, args.dim, seed=1)
    consistency = np.random.default_rng(2).integers(11, size=args.questions) / 10
    valid = np.ones(args.questions, bool)
    result: dict[str, Any] = {
        "questions": args.questions,
        "dim": args.dim,
        "machine": machine("numpy", "scipy", "scikit-learn", "faiss-cpu", "nltk"),
        "bank": [],
    }
    ours, seconds = repeated(lambda: repetition_penalty(embeddings))
    result["p_rep"] = {"seconds": seconds, "clusters": clusters(ours)}
    for rows in args.bank_rows:
        measured = in_own_process(measure_bank, rows, args.dim, embeddings, args.folder)
        memory = np.array(measured.pop("penalty"))
        _, rest = timed(lambda memory=memory: challenger_reward(consistency, ours, memory, valid))
        steps = [p_rep + p_map + rest for p_rep, p_map in zip(seconds, measured["penalty_seconds"], strict=True)]
        measured["reward_seconds"], measured["reward_range"] = statistics.median(steps), [min(steps), max(steps)]
        result["bank"].append(measured)
        print(measured, flush=True)
    result["r_zero"] = {}
    r_zero_penalty(questions[:4])  # imports
    for count in (args.questions // 4, args.questions // 2, args.questions):
        bleu, bleu_seconds = repeated(lambda count=count: bleu_repetition_penalty(questions[:count]))
        found = result["r_zero"][count] = {"seconds": statistics.median(bleu_seconds), "clusters": clusters(bleu)}
        if not args.no_peer:
            peer, found["pairwise_seconds"] = timed(lambda count=count: r_zero_penalty(questions[:count]))
            found["equal"] = bool(np.array_equal(peer, bleu))
        print(f"R-Zero's penalty of {count} questions: {found}", flush=True)
    return result


def r_zero_penalty(questions: list[str]) -> np.ndarray:
    """R-Zero's penalty as its release computes it: BLEU of every pair with nltk, one after the other."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from sklearn.cluster import AgglomerativeClustering

    smoothing = SmoothingFunction().method1
    distances = np.zeros((len(questions), len(questions)))
    for i in tqdm(range(len(questions)), desc="R-Zero, pair by pair", disable=None):
        for j in range(i + 1, len(questions)):
            bleu = sentence_bleu([questions[j].split()], questions[i].split(), smoothing_function=smoothing)
            distances[i, j] = distances[j, i] = 1 - bleu
    labels = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=0.5
    ).fit_predict(distances)
    return np.bincount(labels)[labels] / len(questions)


def measure_bank(rows: int, dim: int, embeddings: np.ndarray, parent: Path | None) -> dict[str, Any]:
    """Fills a bank in iterations of at most 50,000 rows, opens it anew and takes the penalty of a whole step."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="bank_"))
    try:
        need = rows * dim * 4 + rows * 100
        if shutil.disk_usage(folder).free < 1.2 * need:
            raise OSError(
                f"a bank of {rows} rows needs {need / 1e9:.1f} GB in {parent or folder.parent}: choose --folder"
            )
        start, bank = time.perf_counter(), MemoryBank(folder, encoder="synthetic")
        for t, first in enumerate(range(0, rows, 50_000)):
            number = min(50_000, rows - first)
            made = make_embeddings(number, dim, seed=10 + t)
            bank.add([f"question {first + i}" for i in range(number)], made, ["0"] * number, t)
            del made
        fill_seconds = time.perf_counter() - start
        bank, open_seconds = timed(lambda: MemoryBank(folder, encoder="synthetic"))
        before = own_memory()
        penalty, penalty_seconds = repeated(lambda: bank.penalty(embeddings))
        searched = own_memory()
        _, add_seconds = timed(lambda: bank.add(["q"] * len(embeddings), embeddings, ["0"] * len(embeddings), 10**6))
        return {
            "rows": rows,
            "fill_seconds": fill_seconds,  # the making of the synthetic rows included
            "open_seconds": open_seconds,
            "penalty_seconds": penalty_seconds,
            "append_seconds": add_seconds,
            "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*")),
            "own_memory_bytes": {"before the search": before, "after it": searched},
            "penalty": penalty.tolist(),
        }
    finally:
        shutil.rmtree(folder)


def own_memory() -> int | None:
    """Resident memory of this process without pages of mapped files, which the system may drop at any time."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def make_questions(number: int) -> list[str]:
    rng = random.Random(0)
    fields = ("a", "b", "c", "d", "e")
    return [
        rng.choice(TEMPLATES).format(
            x=rng.choice("xnkmt"),
            y=rng.choice("yspqr"),
            adjective=rng.choice(ADJECTIVES),
            **{field: rng.randint(2, 99) for field in fields},
        )
        for _ in range(number)
    ]


def make_embeddings(number: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around 200 centres that are the same for every seed; cosine about 0.6 within a centre."""
    centres = np.random.default_rng(0).standard_normal((200, dim), np.float32)
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((number, dim), np.float32) * np.float32(0.8)
    vectors += centres[rng.integers(200, size=number)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def repeated(function: Callable[[], Any]) -> tuple[Any, list[float]]:
    """Value of the first call, and the seconds of each of five, which stand for the first steps of a training."""
    runs = [timed(function) for _ in range(5)]
    return runs[0][0], [seconds for _, seconds in runs]


def clusters(penalty: np.ndarray) -> int:
    return round(float((1 / (penalty * len(penalty))).sum()))


if __name__ == "__main__":
    sys.exit(main())
