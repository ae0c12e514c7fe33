"""Evaluation: what is asked (benchmarks), what generates (engines), how answers count (scoring), the harness (run)."""

from typing import Any

from .benchmarks import BENCHMARKS, Benchmark, load_benchmark
from .engines import Completion, Decoding, Engine, Prompt, ServerEngine, VLLMEngine, json_options, load_engine
from .run import (
    check_same_questions,
    evaluate,
    generate_samples,
    paired_scores,
    question_fingerprint,
    rescore,
    score_responses,
    scores_by_question,
)
from .scoring import headline, summarize
from .vision import VISION

BENCHMARKS.update(VISION)

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Completion",
    "Decoding",
    "Engine",
    "Prompt",
    "ServerEngine",
    "TransformersEngine",
    "VLLMEngine",
    "check_same_questions",
    "evaluate",
    "generate_samples",
    "headline",
    "json_options",
    "load_benchmark",
    "load_engine",
    "paired_scores",
    "question_fingerprint",
    "rescore",
    "score_responses",
    "scores_by_question",
    "summarize",
]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only where they generate, and not for every user of the harness."""
    if name != "TransformersEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .transformers_engine import TransformersEngine

    return TransformersEngine
