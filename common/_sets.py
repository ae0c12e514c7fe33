r"""Whether two sets of real numbers are the same: unions, intersections and differences of intervals and finite sets.

The endpoints of both sides cut the real line into points and gaps. A set is the collection of those that lie in it, as
the bits of an integer, so that set algebra is exact. Endpoints are constant formulas (`common._values`).
"""

from __future__ import annotations

import re
from functools import cmp_to_key, reduce
from itertools import groupby

from common import _values
from common._formula import Unreadable
from common._notation import split
from common._units import number

_OPERATOR = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?")
_INTERVAL = re.compile(r"([(\[])([^,;]+)[,;]([^,;]+)([)\]])")
_FINITE = re.compile(r"\\?\{(.+?)\\?\}")
_NAMED = frozenset(["\\emptyset", *(f"\\mathbb{{{letter}}}" for letter in "NZQRC")])
_MAX_ENDPOINTS = 64
_INFINITE = {"\\infty": 1, "-\\infty": -1, "- \\infty": -1}

# (operator, left, right), ("interval", opening, low, high, closing) or ("points", [text, ...])
_Set = tuple


def same_set(p: str, g: str, deadline: float) -> bool | None:
    """None where a text is no such set, or an endpoint no real constant. Raises `TimeoutError`."""
    if all(text in _NAMED or number(text) is not None for text in (p, g)):
        return p == g
    try:
        sets = [_parse(text) for text in (p, g)]
        line = _Line([text for tree in sets for text in _endpoints(tree)], deadline)
        left, right = map(line.bits, sets)
    except (Unreadable, _values.TooLarge):
        return None
    return left == right


def _parse(text: str) -> _Set:
    parts = split(text, _OPERATOR)
    operators = set(parts[1::2])
    if len(operators) > 1:
        raise Unreadable("operators without parentheses")
    if not operators:
        return _atom(parts[0])
    return reduce(lambda left, right: (parts[1], left, right), map(_parse, parts[::2]))


def _atom(text: str) -> _Set:
    if _REALS.fullmatch(text):
        return "interval", "(", "-\\infty", "\\infty", ")"
    if found := _INTERVAL.fullmatch(text):
        opening, low, high, closing = found.groups()
        return "interval", opening, low.strip(), high.strip(), closing
    if found := _FINITE.fullmatch(text):
        return "points", [part.strip() for part in re.split("[,;]", found[1])]
    if text == "\\emptyset":
        return "points", []
    if text[:1] == "(" and text[-1:] == ")" and _OPERATOR.search(text):
        return _parse(text[1:-1])
    raise Unreadable(text)


def _endpoints(tree: _Set) -> list[str]:
    if tree[0] == "interval":
        return [text for text in (tree[2], tree[3]) if text not in _INFINITE]
    if tree[0] == "points":
        return tree[1]
    return _endpoints(tree[1]) + _endpoints(tree[2])


class _Line:
    """The real line, cut at `texts`: bit 2i + 1 is the i-th point, bit 2i the gap before it."""

    def __init__(self, texts: list[str], deadline: float) -> None:
        texts = list(dict.fromkeys(texts))
        if len(texts) > _MAX_ENDPOINTS:
            raise Unreadable("too many endpoints")
        by_value = cmp_to_key(lambda a, b: _values.order(a, b, deadline))
        equal = groupby(sorted(texts, key=by_value), key=by_value)
        self.place = {text: 2 * i + 1 for i, (_, group) in enumerate(equal) for text in group}
        self.last = max(self.place.values(), default=-1) + 1

    def bits(self, tree: _Set) -> int:
        if tree[0] == "points":
            return reduce(lambda bits, text: bits | 1 << self.place[text], tree[1], 0)
        if tree[0] == "interval":
            return self._interval(*tree[1:])
        left, right = self.bits(tree[1]), self.bits(tree[2])
        return {"\\cup": left | right, "\\cap": left & right, "\\setminus": left & ~right}[tree[0]]

    def _interval(self, opening: str, low: str, high: str, closing: str) -> int:
        if _INFINITE.get(low) == 1 or _INFINITE.get(high) == -1:
            raise Unreadable("infinity at the wrong end")
        first = 0 if low in _INFINITE else self.place[low] + (opening == "(")
        last = self.last if high in _INFINITE else self.place[high] - (closing == ")")
        if first > last:
            raise Unreadable("an empty interval")
        beyond = (low in _INFINITE and opening == "[") | (high in _INFINITE and closing == "]") << 1
        return self._between(first, last) | beyond << self.last + 1  # [0, \\infty] is not [0, \\infty)

    @staticmethod
    def _between(first: int, last: int) -> int:
        return (1 << last + 1) - (1 << first)
