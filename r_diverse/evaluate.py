"""How good a Solver is: its benchmarks, and the embedded test."""

from pathlib import Path
from typing import Any

from .config import RDiverseConfig
from .data import test_questions
from .questions import solver_prompt

# isort: split
from common.evaluation import Benchmark, Decoding, Engine, evaluate, load_benchmark


def score(folder: Path, engine: Engine, run: RDiverseConfig) -> dict[str, Any]:
    """Accuracy of a Solver on the run's benchmarks."""
    results = {}
    for name in filter(None, (part.strip() for part in run.benchmarks.split(","))):
        benchmark = (
            arithmetic_benchmark(run) if name == "arithmetic" else load_benchmark(name, run.data, run.eval_limit)
        )
        metrics = evaluate(engine, benchmark, folder, seed=run.seed)
        results[name] = {"avg@k": metrics["avg@k"], "interval": metrics["interval"], "parsed": metrics["parsed"]}
    return results


def arithmetic_benchmark(run: RDiverseConfig) -> Benchmark:
    """The embedded test questions, sampled as the Solver's answers are."""
    rows = test_questions()[: run.eval_limit]
    return Benchmark(
        "arithmetic",
        [{**row, "prompt": solver_prompt(row["question"], run.solver_system)} for row in rows],
        decoding=Decoding(1.0, 1.0, run.answer_tokens),
        samples=run.eval_samples,
    )
