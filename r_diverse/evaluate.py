"""How good a Solver is: its benchmarks, and the embedded test."""

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import RDiverseConfig
from .data import BATCH, test_questions
from .questions import solver_prompt

# isort: split
from common.evaluation import BENCHMARKS, Benchmark, Completion, Decoding, Engine, Prompt, evaluate, load_benchmark


def score(folder: Path, engine: Engine, run: RDiverseConfig) -> dict[str, Any]:
    """Accuracy of a Solver on the run's benchmarks."""
    results = {}
    for name in benchmark_names(run):
        benchmark = (
            arithmetic_benchmark(run) if name == "arithmetic" else load_benchmark(name, run.data, run.eval_limit)
        )
        # A batch is waited for; servers on several GPUs would idle for most of a short one
        options = {"batch": BATCH["vllm"]} if run.engine == "vllm" else {}
        metrics = evaluate(engine, benchmark, folder, seed=run.seed, **options)
        results[name] = {"avg@k": metrics["avg@k"], "interval": metrics["interval"], "parsed": metrics["parsed"]}
    return results


def benchmark_names(run: RDiverseConfig) -> list[str]:
    """The names in `run.benchmarks`, without "none"."""
    return [name for part in run.benchmarks.split(",") if (name := part.strip()) not in ("", "none")]


def check_benchmarks(run: RDiverseConfig) -> None:
    """Raises `ValueError` for a benchmark that is not registered, with the nearest names."""
    known = ["arithmetic", *BENCHMARKS]
    for name in benchmark_names(run):
        if name not in known:
            close = difflib.get_close_matches(name, known) or known
            raise ValueError(f"benchmarks has {name!r}, which is unknown: choose among {', '.join(close)}")


class Recorded:
    """Engine of a model whose answers are all recorded; `name` and `template_options` are those of the records."""

    kind = stops = options = None  # whichever made them

    def __init__(self, name: str, template_options: dict[str, Any]):
        self.name, self.template_options = name, template_options

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Completion]:
        raise ValueError(f"{len(prompts)} answers of {self.name} are not recorded: evaluate it with an engine")


def copy_answers(source: Path, target: Path, run: RDiverseConfig) -> None:
    """Copies the records of the run's benchmarks, not their scores; those of other questions `score` refuses."""
    for name in benchmark_names(run):
        if (source / name / "samples.jsonl").exists():
            (target / name).mkdir(parents=True, exist_ok=True)
            for file in ("identity.json", "samples.jsonl"):
                shutil.copyfile(source / name / file, target / name / file)


def arithmetic_benchmark(run: RDiverseConfig) -> Benchmark:
    """The embedded test questions, sampled at temperature 1 from the whole distribution."""
    rows = test_questions()[: run.eval_limit]
    return Benchmark(
        "arithmetic",
        [{**row, "prompt": solver_prompt(row["question"], run.solver_system)} for row in rows],
        decoding=Decoding(1.0, 1.0, run.answer_tokens),
        samples=run.eval_samples,
    )
