"""From sample records to metrics. Records come first, so that a scorer can change without generating again."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from common.answers import Verdict
from common.estimators import avg_at_k, interval, pass_at_k

from .benchmarks import Benchmark


def score_record(benchmark: Benchmark, record: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record with `score` in [0, 1] and, where the scorer gives one, `verdict`."""
    result = benchmark.score(record["response"], rows[record["id"]])
    if isinstance(result, Verdict):
        return {**record, "verdict": str(result.value), "score": float(result is Verdict.CORRECT)}
    return {**record, "score": float(result)}


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """avg@k with its question-clustered 95 % interval, pass@k, truncation, length and verdicts of scored records.

    Raises `ValueError` for questions with unequal numbers of samples: the run is not complete.
    """
    scores = defaultdict(list)
    for record in sorted(records, key=lambda r: (r["id"], r["sample"])):
        scores[record["id"]].append(record["score"])
    counts = Counter(len(row) for row in scores.values())
    if len(counts) != 1:
        raise ValueError(f"questions have different numbers of samples {dict(counts)}: the evaluation is not complete")
    (samples,) = counts
    table = list(scores.values())
    low, high = interval(table)
    summary = {
        "questions": len(table),
        "samples": samples,
        "avg@k": avg_at_k(table),
        "interval": [low, high],
        "truncated": sum(not record["finished"] for record in records) / len(records),
        "mean_tokens": sum(record["num_tokens"] for record in records) / len(records),
        "verdicts": dict(Counter(record["verdict"] for record in records if "verdict" in record)),
    }
    if all(score in (0.0, 1.0) for row in table for score in row):
        summary["pass@k"] = {k: pass_at_k(table, k) for k in sorted({1, samples})}
    return summary
