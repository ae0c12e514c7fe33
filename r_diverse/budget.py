"""A limit of time on comparing the answers to one question, whoever compares them."""

import time
from collections.abc import Callable

QUESTION_SECONDS = 10.0  # ten answers make up to 90 comparisons, each of which may take its own limit


class Budget:
    """`same` for the answers to one question: once `seconds` are spent, what was not compared yet counts as different.

    Args:
        same: whether two answers mean the same. It bounds the time of one comparison, so that a question takes at most
            `seconds` and one comparison.
        seconds: for all comparisons of the question.
        clock: gives the time in seconds.

    `cut` is the number of comparisons that were not made.
    """

    def __init__(
        self,
        same: Callable[[str, str], bool],
        seconds: float = QUESTION_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.same, self.seconds, self.clock = same, seconds, clock
        self.spent, self.cut = 0.0, 0

    def __call__(self, first: str, second: str) -> bool:
        if self.spent >= self.seconds:
            self.cut += 1
            return False
        started = self.clock()
        try:
            return self.same(first, second)
        finally:
            self.spent += self.clock() - started
