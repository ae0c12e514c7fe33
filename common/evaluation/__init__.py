"""Evaluation: what (benchmarks), who generates (engines), how answers count (scoring), and the harness (run)."""

from .benchmarks import BENCHMARKS, Benchmark, load_benchmark
from .engines import Completion, Decoding, Engine, Prompt, TransformersEngine, VLLMEngine
from .run import evaluate
from .scoring import summarize

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Completion",
    "Decoding",
    "Engine",
    "Prompt",
    "TransformersEngine",
    "VLLMEngine",
    "evaluate",
    "load_benchmark",
    "summarize",
]
