r"""Extracts the final answer of a response, and decides whether two answers are the same.

Policy, in one place (the tests hold a table of it):

* What counts as an answer: the last (or first) balanced `\boxed{}`, else an explicit marker ("The answer is",
  "Answer:", "#### ", `<answer>`, and their equivalents in a few languages). There is no fallback to "any number".
  Only text after `</think>` counts; an unfinished `<think>` commits to nothing. Boxes joined by "and" or commas are
  one list.
* Value decides, not spelling: 0.5 = 1/2, 1{,}000 = 1000, sqrt(8) = 2 sqrt(2). Decimals are exact: 0.333 is not 1/3.
* Order is free in sets and lists ("2 or 3"), not in tuples. Bracket kinds must match. Variable names must match.
  "x = 1, y = 2" is the pair (1, 2) and "1, 2", not "2, 1"; the set {5} is 5. "x > 1 and x < 4" is the interval
  (1, 4), with "or" a union; |x| < 2 is (-2, 2).
  Conditions are on real numbers, R^+ is (0, infinity); floors of n, k, m and N are compared at whole numbers.
* A unit, currency or degree sign may be missing on one side; two of them must agree (5 km is 5000 m, never 5 cm).
  A percent sign is such a unit: 50% equals 50 and 50 percent, never 0.5. "7 feet 6 inches" is 90 inches.
* Times, dates and words are compared as such, words without case, punctuation and an article. "four" alone is 4.
* A gold letter A-J is a choice letter. "(B) 12" is B and 12. Hedges ("5 or 7", "A or B", "5=7") are wrong.
* An equality chain ("x = 5 + 6 = 11") is right when every part of it equals the gold answer.

`Policy` sets what graders disagree on: percent, units, rounded gold answers, fractions in lowest terms.

Comparison has layers: identical text, exact numbers, structure (`common._compare`), sets of real numbers
(`common._sets`), values of formulas (`common._values`), and last a computer algebra system in a separate process that
is killed when it is late (`common._worker`). Nothing here evaluates code; the size of each input is checked first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from tqdm import tqdm

from common import _worker
from common._choice import LABEL_START, chosen_letter, gold_letter, option_text, without_label
from common._compare import NeedsAlgebra, Outcome, Policy, compare
from common._extract import boxes_of, extract_answer, own_words
from common._normalise import MAX_CHARS, key, normalise, within_limits
from common._notation import assignment, bare
from common._units import is_unit_word, number, split_unit

BARE_WORDS = 5  # a response of at most so many words is itself an answer; MMMU's script draws the same line

__all__ = [
    "BARE_WORDS",
    "Check",
    "Policy",
    "Verdict",
    "boxes_of",
    "check",
    "chosen_letter",
    "exact_number",
    "extract_answer",
    "gold_letter",
    "grade",
    "grade_many",
    "judge",
    "own_words",
    "same_answer",
]


class Verdict(StrEnum):
    """Outcome of one check. Only `CORRECT` earns a reward; the others say why not."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    GOLD_UNPARSEABLE = "gold_unparseable"


class Check(NamedTuple):
    """A verdict with its reasons.

    `answer` is the extracted answer, None without one. `kind` is what the pair was compared as ("number", "time",
    "unit", "assignment", "union", "collection", "relation", "brackets", "matrix", "ratio", "words", "value", "choice",
    "text"). `rule` is the comparison that decided, on the innermost part: one of the same names, or "set", "algebra",
    "size", "late", "failure" (a step failed on the text; the answer may be right).
    """

    verdict: Verdict
    answer: str | None
    kind: str = ""
    rule: str = ""


_DEFAULT = Policy()


def same_answer(prediction: str, gold: str, *, timeout: float = 5.0, policy: Policy = _DEFAULT) -> bool:
    """Whether two answers (not responses) mean the same, by the policy at the top of this module.

    Never raises because of a string, never evaluates code, and returns within `timeout` seconds (False if they run
    out) from any thread, asyncio task or process. Not symmetric: `gold` is trusted.
    Raises `ImportError` if latex2sympy2-extended is needed and missing: False would look like a wrong answer.
    """
    return _check(_as_text(prediction), _as_text(gold), timeout, policy).verdict is Verdict.CORRECT


def check(
    response: str,
    gold: str,
    *,
    which: str = "last",
    whole: bool = False,
    timeout: float = 5.0,
    policy: Policy = _DEFAULT,
) -> Check:
    """The verdict on a response's answer against `gold`, with its reasons; limits and errors as in `same_answer`.

    `which`: the "last" or the "first" answer that the response commits to (`extract_answer`). `whole`: a response that
    commits to none and has at most `BARE_WORDS` words is itself the answer, such as "58" or "x = 58".
    """
    answer = _answer_of(_as_text(response), which, whole)
    return _check(answer, _as_text(gold), timeout, policy)


def judge(response: str, gold: str, **options: Any) -> Verdict:
    """The verdict of `check`, whose options it takes."""
    return check(response, gold, **options).verdict


def grade(response: str, gold: str, **options: Any) -> bool:
    """Whether `judge(...)` is `CORRECT`."""
    return judge(response, gold, **options) is Verdict.CORRECT


def grade_many(
    responses: Sequence[str | None],
    golds: Sequence[str | None],
    *,
    workers: int | None = None,
    timeout: float = 5.0,
    which: str = "last",
    whole: bool = False,
    policy: Policy = _DEFAULT,
) -> list[Verdict]:
    """`judge` for each pair, in order, with up to `workers` processes for the pairs that need algebra.

    `workers` defaults to the number of cores, at most 8. `timeout` is for each pair, counted from when a worker takes
    it; equal pairs are checked once. A response or gold answer that is None counts as an empty one. A progress bar
    shows after five seconds. Raises `ValueError` for sequences of unequal length, and for less than one worker.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} gold answers")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more: leave it out for one a core, at most 8")
    verdicts: list[Verdict | None] = []
    pending: dict[_Request, list[int]] = {}
    for i, (response, gold) in enumerate(
        _progress(zip(responses, golds, strict=True), len(golds), "Checking answers")
    ):
        answer = _answer_of(_as_text(response), which, whole)
        settled = _settle(answer, _as_text(gold), time.monotonic() + timeout, policy)
        verdicts.append(settled.verdict if isinstance(settled, Check) else None)
        if isinstance(settled, _Request):
            pending.setdefault(settled, []).append(i)
    outcomes = _ask_all(list(pending), workers, timeout)
    for request, outcome in zip(pending, _progress(outcomes, len(pending), "Computer algebra"), strict=True):
        for i in pending[request]:
            verdicts[i] = outcome.verdict
    return verdicts


def exact_number(answer: str) -> Fraction | None:
    """The exact value of an answer that is a numeral, without its unit; None for anything else."""
    if len(answer) > MAX_CHARS or not within_limits(text := normalise(answer)):
        return None
    parts = assignment(bare(text))[1]
    return number(split_unit(bare(parts[-1]))[0]) if len(parts) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# One pair
# ---------------------------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """A normalised pair for a worker process."""

    prediction: str
    gold: str
    policy: Policy


_memo: dict[_Request, Check] = {}
_MEMO_SIZE = 20_000


def _as_text(value: object) -> str:
    """Data sets hold numbers and missing values in answer columns: None and NaN are no answer at all."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else str(value)


def _answer_of(response: str, which: str, whole: bool) -> str | None:
    answer = extract_answer(response, which)
    if answer is None and whole:
        text = own_words(response).strip()
        return text if 0 < len(text.split()) <= BARE_WORDS and len(text) <= MAX_CHARS else None
    return answer


def _check(answer: str | None, gold: str, timeout: float, policy: Policy) -> Check:
    deadline = time.monotonic() + timeout
    settled = _settle(answer, gold, deadline, policy)
    if isinstance(settled, _Request):
        return _ask(settled, deadline - time.monotonic(), wait=False)._replace(answer=answer)
    return settled


def _settle(answer: str | None, gold: str, deadline: float, policy: Policy) -> Check | _Request:
    """The verdict, or a request to a worker if nothing short of computer algebra decides."""
    if not gold.strip():
        return Check(Verdict.GOLD_UNPARSEABLE, answer)
    if not answer or not answer.strip():
        return Check(Verdict.NO_ANSWER, answer)
    if answer.strip() == gold.strip():
        return Check(Verdict.CORRECT, answer, "text", "text")
    if len(gold) > MAX_CHARS or len(answer) > MAX_CHARS:
        return Check(Verdict.GOLD_UNPARSEABLE if len(gold) > MAX_CHARS else Verdict.UNPARSEABLE, answer, "", "size")
    if (policy is _DEFAULT or policy == _DEFAULT) and (settled := _settle_numerals(answer.strip(), gold.strip())):
        return settled
    stated = _stated(answer)
    p, g = normalise(stated), normalise(_stated(gold))
    if not p or not g:
        return Check(Verdict.NO_ANSWER if g else Verdict.GOLD_UNPARSEABLE, answer)
    if letter := gold_letter(g):
        chosen, text = chosen_letter(stated), option_text(g)  # in normal form "or" may be a semicolon
        if chosen or (g.isupper() and not text):  # a small letter may be a variable
            return Check(Verdict.CORRECT if chosen == letter else Verdict.WRONG, answer, "choice", "choice")
        g = text or g
    if p[0] in LABEL_START or g[0] in LABEL_START:
        p, g = without_label(p, g), without_label(g, p)
    if key(p) != key(g) and not (within_limits(p) and within_limits(g)):
        return Check(Verdict.UNPARSEABLE if within_limits(g) else Verdict.GOLD_UNPARSEABLE, answer, "", "size")
    try:
        return _verdict(compare(p, g, deadline, policy), answer)
    except NeedsAlgebra:
        return _Request(p, g, policy)
    except TimeoutError:
        return Check(Verdict.TIMEOUT, answer, "", "late")


@lru_cache(maxsize=8192)
def _stated(answer: str) -> str:
    """What an answer, or a gold answer, says, without a box or a marker that may be in it."""
    return extract_answer(answer) or own_words(answer)


_NUMERAL = re.compile(
    r"(?P<currency>\\?\$(?=\d))?"
    r"(?P<value>-?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,99})(?:\.\d{1,99})?)"
    r"(?P<sign> ?(?:\\?%|°|\^ ?(?:\\circ|\{ ?\\circ ?\})))?"
    r"(?: ?\\(?:text|mathrm|mbox)\{ ?(?P<roman>[A-Za-z]{2,15})\}| (?P<word>[A-Za-z]{2,15}))?",
    re.ASCII,
)


def _decimal(numeral: re.Match[str]) -> Decimal:
    return Decimal(numeral["value"].replace(",", ""))


_FRACTION = re.compile(
    r"(-?)(?:\\[dt]?frac\{(-?\d{1,20})\}\{(-?\d{1,20})\}|(\d{1,20})(?:/(\d{1,20}))?)", re.ASCII
)  # or a whole number


def _settle_numerals(answer: str, gold: str) -> Check | None:
    """The result of the long way in `_settle` for two plain numerals, in a tenth of its time; None for other answers.

    Only one of the two may have a unit: whether two units agree is not decided here.
    """
    p, g = _NUMERAL.fullmatch(answer), _NUMERAL.fullmatch(gold)
    if not p or not g:
        plain_p = _undelimited(answer) if answer[0] == "$" else answer
        plain_g = _undelimited(gold) if gold[0] == "$" else gold
        if plain_p is answer and plain_g is gold:
            return _settle_fractions(answer, gold)
        settled = _settle_numerals(plain_p, plain_g)
        return settled and settled._replace(answer=answer)
    units = [found[name] for found in (p, g) for name in ("currency", "sign", "roman", "word") if found[name]]
    if len(units) > 1 or (units and units[0].isalpha() and not is_unit_word(units[0])):
        return None
    by_text = p["value"] == g["value"]
    same = by_text or _decimal(p) == _decimal(g)
    verdict = Verdict.CORRECT if same else Verdict.WRONG
    rule = "text" if by_text else "number"
    return Check(verdict, answer, "unit" if units else rule, rule)


def _undelimited(text: str) -> str:
    """`42` from `$42$`; any other text as it is."""
    return text[1:-1] if text[-1] == "$" and text.count("$") == 2 and len(text) > 2 else text


def _settle_fractions(answer: str, gold: str) -> Check | None:
    r"""As `_settle_numerals`, for two fractions such as `\frac{3}{4}` and 3/4, or a fraction and a whole number."""
    if not (p := _FRACTION.fullmatch(answer)) or not (g := _FRACTION.fullmatch(gold)):
        return None
    if p.groups() == g.groups():
        return Check(Verdict.CORRECT, answer, "text", "text")
    (top, bottom), (gold_top, gold_bottom) = _ratio(p), _ratio(g)
    if not bottom or not gold_bottom:
        return None
    same = top * gold_bottom == gold_top * bottom
    return Check(Verdict.CORRECT if same else Verdict.WRONG, answer, "number", "number")


def _ratio(fraction: re.Match[str]) -> tuple[int, int]:
    sign, top, bottom, plain_top, plain_bottom = fraction.groups()
    return int(f"{sign}1") * int(top or plain_top), int(bottom or plain_bottom or 1)


def _verdict(outcome: Outcome, answer: str | None = None) -> Check:
    verdict = Verdict.CORRECT if outcome.same else Verdict.WRONG
    if outcome.unreadable:
        verdict = Verdict.UNPARSEABLE if outcome.unreadable == "prediction" else Verdict.GOLD_UNPARSEABLE
    return Check(verdict, answer, outcome.kind, outcome.rule)


def _ask(request: _Request, timeout: float, *, wait: bool) -> Check:
    """Asks a worker process. With `wait`, the time until a worker is free and ready does not count."""
    if known := _memo.get(request):  # one look-up: another thread may empty it meanwhile
        return known
    reply = _worker.ask(request.prediction, request.gold, request.policy, timeout, wait=wait)
    if reply is None:
        return Check(Verdict.TIMEOUT, None, "", "late")
    if len(_memo) >= _MEMO_SIZE:
        _memo.clear()
    return _memo.setdefault(request, _verdict(reply))


def _ask_all(requests: list[_Request], workers: int | None, timeout: float):
    """Yields the outcomes in order."""
    if len(requests) <= 1 or workers == 1:
        yield from (_ask(request, timeout, wait=True) for request in requests)
        return
    executor = ThreadPoolExecutor(_worker.at_least(workers))
    try:
        yield from executor.map(lambda request: _ask(request, timeout, wait=True), requests)
    finally:
        executor.shutdown(cancel_futures=True)


def _progress(rows, total: int, what: str):
    return tqdm(rows, desc=what, total=total, delay=5, leave=False, unit=" answers")
