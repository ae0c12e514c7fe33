"""The vote of the answers to one question, in the reward, for labels and in the gate: within a limit of time."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .objective import self_consistency

QUESTION_SECONDS = 10.0  # ten answers make up to 90 comparisons, each of which may take its own limit


class Vote(NamedTuple):
    """Answers to one question, their majority and its share s; `late` if time ran out before all were compared."""

    answers: Sequence[str | None]
    majority: str | None
    consistency: float
    late: bool


def timed_vote(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> Vote:
    """`self_consistency` of m answers. Once QUESTION_SECONDS are spent, what was not compared counts as different.

    `same` bounds the time of one comparison, so that a question takes at most this time and one comparison.
    """
    spent, late = 0.0, False

    def bounded(first: str, second: str) -> bool:
        nonlocal spent, late
        if spent >= QUESTION_SECONDS:
            late = True
            return False
        started = time.monotonic()
        alike = same(first, second)
        spent += time.monotonic() - started
        return alike

    majority, consistency = self_consistency(answers, bounded)
    return Vote(answers, majority, consistency, late)
