r"""Whether two sets of real numbers are the same: unions, intersections and differences of intervals and finite sets,
and conditions on one number, such as `x<1; x>2`.

The endpoints of both sides cut the real line into points and gaps. A set is the collection of those that lie in it, as
the bits of an integer, so that set algebra is exact. Endpoints are formulas (`common._values`).
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cmp_to_key, reduce
from itertools import groupby
from typing import NamedTuple

from common import _values
from common._formula import Unreadable, names, parse
from common._notation import BUILDER, COMMA, RELATION, as_interval, items_of, split
from common._units import number

_OPERATOR = re.compile(r"\\(?:cup|sqcup|cap|setminus)(?![A-Za-z])")
_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?(?: ?[\^_] ?\{? ?([+-]|[<>] ?0) ?\}?)?")
_BOUNDS = {"": ("-\\infty", "\\infty"), "+": ("0", "\\infty"), "-": ("-\\infty", "0")}
_BOUNDS |= {">": _BOUNDS["+"], "<": _BOUNDS["-"]}  # R_{>0}
_INTERVAL = re.compile(r"([(\[])([^,;]+)[,;]([^,;]+)([)\]])")
_FINITE = re.compile(r"\\?\{(.+?)\\?\}")
_EQUALS = re.compile(r"([a-z]) ?= ?")  # {x=1, x=2}
_NAMED = frozenset(["\\emptyset", *(f"\\mathbb{{{letter}}}" for letter in "NZQRC")])
_SCATTERED = re.compile(  # neither finite nor a union of intervals
    r"\\mathbb\{[NZQ]\}(?: ?\\setminus ?\\\{[^{}<>=]*\\\})?|\\mathbb\{R\} ?\\setminus ?\\mathbb\{[NZQ]\}"
)
_INFINITE = {"\\infty": 1, "-\\infty": -1, "- \\infty": -1}
_MAX_ENDPOINTS, _MAX_UNKNOWN = 64, 8  # without and with names in them

_MEMBER = re.compile(r"([A-Za-z]) ?(?:= ?([^=]+)|\\in(?![a-z]) ?(.+))")
_HOLE = re.compile(  # |x| \neq 1, but not |x| \neq -1, which is no hole
    rf"(\|)?([A-Za-z])(?(1)\|) ?\\(?:neq ?((?(1)(?! ?-))(?:(?!{RELATION.pattern}).)+)|notin ?\\?\{{(.+?)\\?\}})"
)
_JOINT = re.compile(r"[,;]|\\c[ua]p(?! ?(?:[(\[{]|\\[{a-z]))")  # x<1 \cup x>2, but not x \in (1,2) \cup (3,4)
_MAGNITUDE = re.compile(r"\|([A-Za-z])\|")


class _Interval(NamedTuple):
    opening: str  # bracket
    low: str
    high: str
    closing: str


class _Points(NamedTuple):
    texts: list[str]


class _Operation(NamedTuple):
    operators: list[str]  # one between each two sets
    sets: list[_Set]


_Set = _Interval | _Points | _Operation


class _Malformed(ValueError):
    """What is written like a set and is none."""


def same_set(p: str, g: str, deadline: float) -> bool | None:
    """None where a text is no such set, or an endpoint no real number. Raises `TimeoutError`.

    Sets whose endpoints have names in them are the same where they are for each of the values tried.
    """
    if all(text in _NAMED or number(text) is not None for text in (p, g)):
        return p == g
    try:
        sets = [_parse(text) for text in (p, g) if not _SCATTERED.fullmatch(text)]
        texts = [text for tree in sets for text in _endpoints(tree)]
        unknown = sorted({name for text in texts if number(text) is None for name in names(parse(text))})
        if len(sets) < 2:
            return False if sets else None
        return _same_everywhere(sets, texts, unknown, deadline)
    except (Unreadable, _values.TooLarge):
        return None
    except _Malformed:
        return False


def _same_everywhere(sets: list[_Set], texts: list[str], unknown: list[str], deadline: float) -> bool | None:
    if len(set(texts)) > (_MAX_UNKNOWN if unknown else _MAX_ENDPOINTS):
        raise Unreadable("too many endpoints")
    agreed = 0
    for values in _values.scattered_points() if unknown else [[]]:
        line = _Line(texts, dict(zip(unknown, values, strict=False)), deadline)
        try:
            left, right = map(line.bits, sets)
        except _Malformed:
            if not unknown:
                raise
            continue  # of [a, b] where a > b nothing is said
        if left != right:
            return False
        agreed += 1
    return True if agreed else None


# ---------------------------------------------------------------------------------------------------------------------
# Conditions
# ---------------------------------------------------------------------------------------------------------------------


class _Term(NamedTuple):
    """One condition: "range" x<1, "point" x=1, "member" x \\in (0,1), or "hole" x \\neq 1."""

    name: str
    kind: str
    values: str


def condition(text: str) -> tuple[str, str] | None:
    r"""`("x", "(-\infty,1)\cup (2,\infty)")` from `x<1; x>2`: the name, and the set of the values that it may take.

    Commas between inequalities, or between sets, mean "or" where these exclude each other (`x<1, x>2`, the operator is
    `\sqcup` then), otherwise "and" (`x>0, x \neq 1`), in a set builder always "and", as `\cap`. None for any other
    text, also where both may be meant, and for a builder of another name (`\{y|x>1\}`).
    """
    builder = BUILDER.fullmatch(text)
    parts, joints = _conditions(builder[2] if builder else text)
    if len(parts) > _MAX_ENDPOINTS:
        return None
    terms = list(map(_term, parts))
    if None in terms or len(joints) > 1 or len({term.name for term in terms}) > 1:
        return None
    if any(_names(term.values, term.name) for term in terms):
        return None  # x < 2x
    if builder and builder[1] != terms[0].name:
        return None
    if joints == {"\\cap"}:
        return terms[0].name, _all_of(terms)
    kinds = [term.kind for term in terms]
    alike = len(terms) > 1 and set(kinds) in ({"range"}, {"member"}) and not builder
    if alike or joints - {","}:
        joint = "\\sqcup " if alike and joints == {","} else "\\cup "
        return None if "hole" in kinds else (terms[0].name, joint.join(term.values for term in terms))
    if not builder and (kinds.count("range") > 1 or ("point" in kinds and len(terms) > 1)):
        return None
    return terms[0].name, _all_of(terms)


def _names(text: str, name: str) -> bool:
    return name in text and bool(re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", text))


def _conditions(text: str) -> tuple[list[str], set[str]]:
    r"""The parts that stand between commas and the like, and these; `x \neq 1, 2` is one part."""
    first, *rest = split(text, _JOINT)
    parts, joints, is_hole = [first], set(), _HOLE.fullmatch(first)
    for joint, part in zip(rest[::2], rest[1::2], strict=True):
        if RELATION.search(part) or not is_hole:
            parts.append(part)
            joints.add(joint)
            is_hole = _HOLE.fullmatch(part)
        else:
            parts[-1] += joint + part
    return parts, joints


def _all_of(terms: list[_Term]) -> str:
    within = [term.values for term in terms if term.kind != "hole"]
    holes = ",".join(term.values for term in terms if term.kind == "hole")
    allowed = "\\cap ".join(within) or "\\mathbb{R}"
    return rf"{f'({allowed})' if len(within) > 1 else allowed}\setminus \{{{holes}\}}" if holes else allowed


def _term(text: str) -> _Term | None:
    if hole := _HOLE.fullmatch(text):
        points = items_of(hole[3] or hole[4])[1]
        points += [f"-({point})" for point in points] if hole[1] else []
        return _Term(hole[2], "hole", ",".join(points))
    if member := _MEMBER.fullmatch(text):
        name, point, values = member.groups()
        return (
            _Term(name, "member", values) if values else _Term(name, "point", rf"\{{{','.join(items_of(point)[1])}\}}")
        )
    return _Term(found[0], "range", found[1]) if (found := as_range(text)) else None


def as_range(text: str) -> tuple[str, str] | None:
    r"""`as_interval`, where `|x|<2` is `("x", "(-(2),2)")`."""
    found = as_interval(text)
    if not found or not (magnitude := _MAGNITUDE.fullmatch(found[0])):
        return found
    bounds = _INTERVAL.fullmatch(found[1])
    return (magnitude[1], _of_either_sign(*bounds.groups())) if bounds else None


def _of_either_sign(opening: str, low: str, high: str, closing: str) -> str:
    """The numbers whose magnitude lies in an interval."""
    inside = rf"{'[' if closing == ']' else '('}-({high}),{high}{closing}"
    outside = rf"((-\infty,-({low}){']' if opening == '[' else ')'}\cup {opening}{low},\infty))"
    if low in _INFINITE or high in _INFINITE:
        return inside if low in _INFINITE else outside
    return rf"({outside}\cap {inside})"


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------


def _parse(text: str) -> _Set:
    first, *rest = split(text, _OPERATOR)
    return _Operation(rest[::2], list(map(_parse, [first, *rest[1::2]]))) if rest else _atom(first)


def _atom(text: str) -> _Set:
    if reals := _REALS.fullmatch(text):
        return _Interval("(", *_BOUNDS[(reals[1] or "")[:1]], ")")
    if found := _INTERVAL.fullmatch(text):
        opening, low, high, closing = found.groups()
        return _Interval(opening, low.strip(), high.strip(), closing)
    if found := _FINITE.fullmatch(text):
        points = items_of(found[1])[1]
        if len({equals[1] for equals in map(_EQUALS.match, points) if equals}) == 1:
            points = [_EQUALS.sub("", point) for point in points]
        if any(point in _NAMED or len(split(point[1:-1], COMMA)) > 1 for point in points):
            raise _Malformed("a pair or a set is no number")
        return _Points(points)
    if text == "\\emptyset":
        return _Points([])
    if text[:1] == "(" and text[-1:] == ")" and _OPERATOR.search(text):
        return _parse(text[1:-1])
    if number(text) is None and ((found := names(parse(text))) == {text} or not all(map(str.islower, found))):
        raise Unreadable("a name may be that of a set")
    raise _Malformed("a number is no set")


def _endpoints(tree: _Set) -> list[str]:
    if isinstance(tree, _Interval):
        return [text for text in (tree.low, tree.high) if text not in _INFINITE]
    return tree.texts if isinstance(tree, _Points) else [text for part in tree.sets for text in _endpoints(part)]


class _Line:
    """The real line, cut at `texts`: bit 2i + 1 is the i-th point, bit 2i the gap before it."""

    def __init__(self, texts: list[str], at: dict[str, Fraction], deadline: float) -> None:
        texts = list(dict.fromkeys(texts))
        exact = {text: number(text) for text in texts}
        by_value = cmp_to_key(lambda a, b: _values.order(a, b, deadline, at)) if None in exact.values() else exact.get
        equal = groupby(sorted(texts, key=by_value), key=by_value)
        self.place = {text: 2 * i + 1 for i, (_, group) in enumerate(equal) for text in group}
        self.last = max(self.place.values(), default=-1) + 1

    def bits(self, tree: _Set) -> int:
        if isinstance(tree, _Points):
            return reduce(lambda bits, text: bits | 1 << self.place[text], tree.texts, 0)
        if isinstance(tree, _Interval):
            return self._interval(*tree)
        return _combined(tree.operators, list(map(self.bits, tree.sets)))

    def _interval(self, opening: str, low: str, high: str, closing: str) -> int:
        if _INFINITE.get(low) == 1 or _INFINITE.get(high) == -1:
            raise _Malformed("infinity at the wrong end")
        first = 0 if low in _INFINITE else self.place[low] + (opening == "(")
        last = self.last if high in _INFINITE else self.place[high] - (closing == ")")
        if first > last:
            raise _Malformed("an empty interval")
        beyond = (low in _INFINITE and opening == "[") | (high in _INFINITE and closing == "]") << 1
        return self._between(first, last) | beyond << self.last + 1  # [0, \\infty] is not [0, \\infty)

    @staticmethod
    def _between(first: int, last: int) -> int:
        return (1 << last + 1) - (1 << first)


def _combined(operators: list[str], sets: list[int]) -> int:
    """From the left. Different operators without parentheses have to give the same from the right."""
    first, *rest = sets
    result = reduce(lambda left, step: _apply(step[0], left, step[1]), zip(operators, rest, strict=True), first)
    if len(set(operators)) > 1:
        *rest, last = sets
        steps = zip(reversed(operators), reversed(rest), strict=True)
        if result != reduce(lambda right, step: _apply(step[0], step[1], right), steps, last):
            raise _Malformed("operators without parentheses")
    return result


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "\\sqcup":
        if left & right:
            raise Unreadable("a disjoint union of what is not disjoint")
        operator = "\\cup"
    return {"\\cup": left | right, "\\cap": left & right, "\\setminus": left & ~right}[operator]
