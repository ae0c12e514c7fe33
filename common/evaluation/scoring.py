"""How answers count: scorers of one response, and metrics of all records.

A scorer is a function (response, row) -> `Verdict` or a number in [0, 1]. A response without an answer is wrong and
counted as such; no answer is ever guessed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.answers import Verdict, extract_answer, grade_many, judge, same_answer

if TYPE_CHECKING:
    from .benchmarks import Benchmark

Scorer = Callable[[str, dict[str, Any]], Verdict | float]
Metric = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
UNREAD = (Verdict.NO_ANSWER, Verdict.UNPARSEABLE)


def answer_row(response: str, row: dict[str, Any]) -> Verdict:
    """Verdict of `common.answers.judge` on the last answer that the response commits to."""
    return judge(response, row["answer"])


def reward_scorer(reward: Callable[..., list[float | None]], **options: Any) -> Scorer:
    """The scorer that is a reward function of `common.verifiers`, called with `options`."""

    def score(response: str, row: dict[str, Any]) -> Verdict:
        shares: dict[str, float] = {}  # of one response: 1 for its verdict, 0 for the others
        reward([response], answer=[row["answer"]], log_metric=shares.__setitem__, **options)
        return next(verdict for verdict in Verdict if shares[f"verdict/{verdict}"])

    return score


def bbeh_row(response: str, row: dict[str, Any]) -> Verdict:
    """BIG-Bench Extra Hard's own lenient match of the last committed answer (arXiv 2502.19187, its evaluation code).

    Case, the space after a comma, one pair of brackets, quotation marks and a closing question mark are forgiven; (a)
    is a, 25 is 25.0. Unlike there, a response without an answer is `NO_ANSWER`, and not compared as a whole.
    """
    committed = extract_answer(response)
    if committed is None:
        return Verdict.NO_ANSWER
    answer = _bbeh_form(committed)
    gold = row["answer"].strip().lower().replace(", ", ",")
    return Verdict.CORRECT if _bbeh_same(answer, gold) else Verdict.WRONG


def _bbeh_form(committed: str) -> str:
    text = committed.strip().removesuffix(".")
    if text.startswith("$") and text.endswith("$"):
        text = text[1:-1]
    for command in ("boxed{", "text{", "texttt{"):
        if command in text and text.endswith("}"):
            text = text[:-1].split(command)[1]
    lines = text.lower().replace(", ", ",").replace("**", "").split("\n")
    return lines[0].removesuffix(".")


def _bbeh_same(answer: str, gold: str) -> bool:
    for one, other in ((answer, gold), (gold, answer)):
        if len(one) == 3 and one[0] == "(" and one[-1] == ")":
            return one[1] == other or one == other
    try:
        if float(answer) == float(gold):
            return True
    except ValueError:
        pass
    forms = {answer, answer.removesuffix("?"), f"[{answer}]"}
    return gold in forms or answer == f"[{gold}]" or answer.replace("'", "") == gold.replace("'", "")


def score_records(
    benchmark: Benchmark, records: Sequence[dict[str, Any]], rows: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records with `score` in [0, 1], `verdict` if the scorer gives one, and the columns that a metric needs.

    `rows`: the benchmark's, by id.
    """
    if benchmark.score is answer_row:  # many at once, in parallel processes
        results = grade_many([r["response"] for r in records], [rows[r["id"]]["answer"] for r in records])
    else:
        results = [benchmark.score(record["response"], rows[record["id"]]) for record in records]
    return [
        {**record, **{name: rows[record["id"]][name] for name in benchmark.columns}, **_outcome(result)}
        for record, result in zip(records, results, strict=True)
    ]


def _outcome(result: Verdict | float) -> dict[str, Any]:
    if isinstance(result, Verdict):
        return {"score": float(result is Verdict.CORRECT), "verdict": str(result)}
    return {"score": float(result)}


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of scored records.

    `avg@k` with its question-clustered 95 % `interval`; `pass@k` if scores are 0 or 1; if the scorer gives verdicts,
    their counts and `parsed`, the share of responses with an answer that could be read; if the records tell,
    `truncated`, the share not ended by a stop token, and `mean_tokens`. What the records do not tell is None.

    Raises `ValueError` for questions with unequal numbers of samples: the run is not complete.
    """
    from common.estimators import avg_at_k, interval, pass_at_k  # scipy: a second that `--help` need not wait

    scores = defaultdict(list)
    for record in records:
        scores[record["id"]].append(record["score"])
    counts = Counter(len(row) for row in scores.values())
    if len(counts) != 1:
        raise ValueError(f"questions have different numbers of samples {dict(counts)}: the evaluation is not complete")
    (samples,) = counts
    table = list(scores.values())
    verdicts = Counter(record["verdict"] for record in records if "verdict" in record)
    unread = sum(verdicts[verdict] for verdict in UNREAD)
    binary = all(score in (0.0, 1.0) for row in table for score in row)
    return {
        "questions": len(table),
        "samples": samples,
        "avg@k": avg_at_k(table),
        "interval": list(interval(table)),
        "pass@k": {k: pass_at_k(table, k) for k in sorted({1, samples})} if binary else None,
        "parsed": 1 - unread / verdicts.total() if verdicts else None,
        "truncated": _mean(None if r.get("finish_reason") is None else r["finish_reason"] != "stop" for r in records),
        "mean_tokens": _mean(record.get("num_tokens") for record in records),
        "verdicts": dict(verdicts),
    }


def majority(records: Sequence[dict[str, Any]], rows: dict[str, dict[str, Any]]) -> float:
    """maj@k: share of questions whose most frequent last committed answer is right. `rows` by id."""
    from common.estimators import maj_at_k

    answers = defaultdict(list)
    for record in records:
        answers[record["id"]].append(extract_answer(record["response"]))
    return maj_at_k(list(answers.values()), [rows[key]["answer"] for key in answers], same=same_answer)


def headline(metrics: dict[str, Any]) -> tuple[float | None, list[float] | None]:
    """The number that is reported, in [0, 1], and its interval: the benchmark's own metric, else avg@k."""
    own = metrics.get("metric")
    return (own["score"], own["interval"]) if own else (metrics["avg@k"], metrics["interval"])


def _mean(values) -> float | None:
    """Mean; None if any value is None, since a mean of the others would be of other responses than the score."""
    values = list(values)
    return None if None in values else sum(values) / len(values)
