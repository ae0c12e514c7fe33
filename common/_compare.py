r"""Whether two normalised answers are the same: text, exact numbers, units, structure, and last their values."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from common import _notation, _sets, _values
from common._algebra import is_readable, needs_algebra, unknown_functions
from common._formula import Unreadable, names, parse
from common._normalise import BROKEN, key
from common._notation import BUILDER, COMMA, FLIP, RELATION, assignment, bare, split
from common._units import AMBIGUOUS, PRODUCTS, conversion, decimals, is_lowest_terms, number, split_unit


@dataclass(frozen=True)
class Policy:
    """Where graders differ, the choice is the caller's. The defaults are the policy of `common.answers`.

    Args:
        percent (`"unit"` or `"value"`, *optional*, defaults to `"unit"`):
            Whether 50% is 50 with a unit, so that it equals 50 and never 0.5, or the value 0.5.
        units (`"optional"`, `"required"` or `"ignored"`, *optional*, defaults to `"optional"`):
            Whether a unit may be missing on one side, must be there when the gold answer has one, or never matters.
        rounding (`bool`, *optional*, defaults to `False`):
            Whether a gold decimal stands for every value that rounds to it: 3.14 for pi, 0.33 for 1/3.
        lowest_terms (`bool`, *optional*, defaults to `False`):
            Whether a fraction that can be reduced is wrong.
    """

    percent: Literal["unit", "value"] = "unit"
    units: Literal["optional", "required", "ignored"] = "optional"
    rounding: bool = False
    lowest_terms: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("percent", ("unit", "value")), ("units", ("optional", "required", "ignored"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class NeedsAlgebra(Exception):
    """Raised in the calling process: nothing short of a computer algebra system decides this pair."""


class Outcome(NamedTuple):
    """`kind` is the kind of answer, `rule` the comparison that decided; `unreadable` is "", "prediction" or "gold"."""

    same: bool
    kind: str
    rule: str
    unreadable: str


def compare(
    p: str, g: str, deadline: float, policy: Policy, algebra: Callable[[str, str], bool | str] | None = None
) -> Outcome:
    """Compare two normalised answers before `deadline` (`time.monotonic()`), else `TimeoutError`.

    `algebra` maps (prediction, gold) to equal or not, or to "prediction" or "gold": the side that it cannot read.
    Raises `NeedsAlgebra` where it is needed and missing. An answer that makes a step fail is unreadable and ends no
    training run; `MemoryError` and `ImportError` are of the machine and pass.
    """
    comparison = Comparison(deadline, policy, algebra)
    try:
        same = comparison.same(p, g)
    except _FAILURES:
        return Outcome(False, "", "failure", "prediction")
    unreadable = "" if same else "gold" if "gold" in comparison.unreadable else "".join(comparison.unreadable)
    return Outcome(same, comparison.kind, comparison.rule, unreadable)


_APART = re.compile(  # "500 m" and "15 m^2" are lengths and areas, "500m" may be a product
    r"(?<=[\d}] )([mshgLNJWVK]|in)(?= ?(?:\^ ?\{?\d\}?)?$)"
)
_CAPITALS = re.compile(r"(?:\\text\{ ?)?([A-Z]{3,}) ?\}?")  # an order of letters: THT is not HTT
_CLOCK = re.compile(r"(?i)(?:\\text\{)?(\d{1,2})(?::(\d\d))? ?(?:\\text\{)? ?([ap])\.? ?m\.?\}?")
_AFTER_NOON = re.compile(r"(1[3-9]|2[0-3]):(\d\d)()")  # 15:30; a smaller number of hours may be of either half
_INFINITE = re.compile(r"[+-]? ?\\infty")
_MAX_ITEMS = 64  # larger collections are compared by their sorted texts
_MEMBER = re.compile(r"\\in(?![a-z])")
_NAME_SUM = re.compile(r"[A-Za-z](?:_\w)?(?: ?[+] ?[A-Za-z](?:_\w)?)+")  # what contests ask for: m+n
_SET_ALGEBRA = re.compile(r"\\(?:cup|sqcup|cap|setminus|mathbb|emptyset)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # in a list with a space after its own commas
_UNBOUNDED_ABOVE = re.compile(r"([(\[])(.+),\\infty\)")
_UNBOUNDED_BELOW = re.compile(r"\(-\\infty,(.+)([)\]])")
_UPRIGHT = re.compile(r"\\(?:text|mathrm|ce)(?![a-z])")  # names of substances are set upright
_CUP, _COLON = re.compile(r"\\cup"), re.compile(":")


class Comparison:
    """One comparison. Each step returns True, False, or None for "not my kind of answer"."""

    def __init__(
        self, deadline: float, policy: Policy, algebra: Callable[[str, str], bool | str] | None = None
    ) -> None:
        self.deadline = deadline
        self.policy = policy
        self.algebra = algebra
        self.unreadable: set[str] = set()
        self.kind = self.rule = ""
        self.depth = 0
        self.inside = 0  # collections around the two texts

    def same(self, p: str, g: str) -> bool:
        if time.monotonic() > self.deadline:
            raise TimeoutError
        p, g = bare(_notation.exact_side(p)), bare(_notation.exact_side(g))
        self.depth += 1
        both = f"{p}\n{g}"
        for kind, step, needs in _STEPS:
            if needs and not needs.search(both):
                continue
            self.rule = kind
            result = step(self, p, g)
            if result is not None:
                break
        self.depth -= 1
        if self.depth == 0:
            self.kind = kind
        return bool(result)

    def _by_text(self, p: str, g: str) -> bool | None:
        if not p or not g or BROKEN in p:
            return False
        return True if key(p) == key(g) and self._reduced(p, g) else None

    def _reduced(self, p: str, g: str) -> bool:
        return not self.policy.lowest_terms or is_lowest_terms(p) or not is_lowest_terms(g)

    def _by_number(self, p: str, g: str) -> bool | None:
        p_based, g_based = _notation.based(p), _notation.based(g)
        if (p_based or g_based) and not (RELATION.search(p) or RELATION.search(g)):  # not n = 77_8
            return p_based == g_based
        left, right = number(p), number(g)
        if left is None or right is None:  # the text has settled equal infinities
            return False if _INFINITE.fullmatch(p) or _INFINITE.fullmatch(g) else None
        return self._equal_numbers(left, right, g) and self._reduced(p, g)

    def _equal_numbers(self, left: Fraction, right: Fraction, g: str) -> bool:
        tolerance = self._tolerance(g)
        return left == right if tolerance is None else abs(left - right) <= tolerance

    def _tolerance(self, g: str) -> Fraction | None:
        """Half a unit of the last digit of a gold decimal, where the policy takes it as rounded."""
        places = decimals(g) if self.policy.rounding else None
        return None if places is None else Fraction(1, 2 * 10**places)

    def _by_time(self, p: str, g: str) -> bool | None:
        p_date, g_date = _notation.date(p), _notation.date(g)
        if g_date or (p_date and number(g) is not None):
            return p_date == g_date
        p_time, g_time = _CLOCK.fullmatch(p), _CLOCK.fullmatch(g)
        if not p_time and not g_time:
            return None
        p_time, g_time = p_time or _AFTER_NOON.fullmatch(p), g_time or _AFTER_NOON.fullmatch(g)
        if not p_time or not g_time:
            return None
        return _time_of_day(*p_time.groups()) == _time_of_day(*g_time.groups())

    def _by_unit(self, p: str, g: str) -> bool | None:
        apart = _APART.search(g)
        is_unit = apart and not _notation.is_symbolic(g[: apart.start()])
        g_value, g_unit = split_unit(g, keep=AMBIGUOUS - {apart[1]} if is_unit else AMBIGUOUS)
        p_value, p_unit = split_unit(p, keep=AMBIGUOUS.intersection(g_value))
        if p_unit and not g_unit and _notation.is_symbolic(g_value):  # \pi r^2 h is a product, x^2\text{ m} has a unit
            p_value, p_unit = split_unit(p, keep=PRODUCTS)
        if p_unit is None and g_unit is None:
            return None
        if self.policy.percent == "value":
            p_value, p_unit = _percent_as_value(p_value, p_unit)
            g_value, g_unit = _percent_as_value(g_value, g_unit)
        if self.policy.units == "required" and g_unit is not None and p_unit is None:
            return False
        if self.policy.units == "ignored" or p_unit is None or g_unit is None:
            return self.same(p_value, g_value)
        factor, left, right = conversion(p_unit, g_unit), number(p_value), number(g_value)
        if factor in (None, 1):
            return factor == 1 and self.same(p_value, g_value)
        if left is not None and right is not None:
            return self._equal_numbers(left * factor, right, g_value)
        return self.same(rf"({p_value})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}", g_value)

    def _by_name(self, p: str, g: str) -> bool | None:
        p_each, g_each = _notation.one_by_one(p, g), _notation.one_by_one(g, p)
        if (p_each, g_each) != (p, g):
            return self.same(p_each, g_each)
        if _MEMBER.search(p) or _MEMBER.search(g):  # x \in (1,4) is not 1<y<4
            found = filter(None, map(_sets.condition, (p, g)))
            if len({name for name, _ in found}) > 1:
                return None
        (p_name, p_parts), (g_name, g_parts) = assignment(p), assignment(g)
        if p_name and g_name and not _notation.same_name(p_name, g_name):
            return None
        p_equation, g_equation = p_name is None and len(p_parts) > 1, g_name is None and len(g_parts) > 1
        if g_equation or (p_equation and g_name) or not (p_name or g_name or p_equation):
            return None
        named, other = (g_parts, p_parts) if g_name else (p_parts, g_parts)
        if "=" in other[0] and len(split(named[-1], COMMA)) > 1:  # x=-1,2 and x=-1,y=2 are compared item by item
            return None
        if p_equation and _NAME_SUM.fullmatch(p_parts[0]):
            p_parts = p_parts[1:]
        return all(self.same(part, g_parts[-1]) for part in p_parts)

    def _by_condition(self, p: str, g: str) -> bool | None:
        """Two sets of real numbers, at least one of them as a condition: |x|<2 and (-2,2), x<1; x>1 and x \\neq 1."""
        sets = self._as_sets(p, g)
        same = _sets.same_set(*sets, self.deadline) if sets != (p, g) else None
        return same or (None if self.policy.rounding else same)

    def _as_sets(self, p: str, g: str) -> tuple[str, str]:
        """The sets of conditions on the same number; both texts as they are where the numbers differ."""
        found = [_sets.condition(x) or (None, x) for x in self._conjunctions(p, g)]
        (p_name, p_set), (g_name, g_set) = found
        return (p, g) if p_name and g_name and p_name != g_name else (p_set, g_set)

    def _by_union(self, p: str, g: str) -> bool | None:
        p_parts, g_parts = split(p, _CUP)[::2], split(g, _CUP)[::2]
        if len(p_parts) == len(g_parts) == 1:
            return None
        p_parts, g_parts = (x if len(x) > 1 else split(x[0], COMMA)[::2] for x in (p_parts, g_parts))
        if len({found[0] for part in p_parts + g_parts if (found := _sets.condition(part))}) > 1:
            return False  # x < 1 or y > 2
        return self._match(p_parts, g_parts) or self._by_value(*self._as_sets(p, g))

    def _by_items(self, p: str, g: str) -> bool | None:
        if BUILDER.fullmatch(p) or BUILDER.fullmatch(g):
            return None
        p_one, g_one = self._conjunctions(p, g)
        if (p_one, g_one) != (p, g):
            return self.same(p_one, g_one)
        (p_kind, p_items), (g_kind, g_items) = _notation.items_of(p), _notation.items_of(g)
        if p_kind == g_kind == "one" or _SET_ALGEBRA.search(p + g):
            return None
        if not p_items or not g_items:  # only separators, as of an "or" with nothing before it
            return False
        if "one" in (p_kind, g_kind):
            if p_kind == "set" or g_kind == "set":  # the solution set {5} says 5
                are_single = len(p_items) == len(g_items) == 1 and not self.inside
                return are_single and self._same_member(p_items[0], g_items[0])
            return self._named_tuple(p_items, g_items)
        return self._same_items(p, g) or (
            bool(_THOUSANDS.search(p) or _THOUSANDS.search(g))
            and self._same_items(*(_THOUSANDS.sub("", x) for x in (p, g)))
        )

    def _same_items(self, p: str, g: str) -> bool:
        if "=" in p + g and (ordered := self._by_order(p, g)) is not None:
            return ordered
        return self._match(*(_notation.items_of(x)[1] for x in (p, g)))

    def _by_order(self, p: str, g: str) -> bool | None:
        """Where one side alone gives its values different names: "1, 2" is x=1, y=2, but "2, 1" and {1, 2} are not."""
        (p_kind, p_items), (g_kind, g_items) = _notation.items_of(p), _notation.items_of(g)
        p_names, g_names = (set(map(_notation.unnumbered_name, items)) for items in (p_items, g_items))
        named, other, text = (p_names, g_names, g) if g_names == {None} else (g_names, p_names, p)
        if other != {None} or len(named - {None}) < 2:
            return None
        has_order = ";" not in text and "set" not in (p_kind, g_kind) and len(p_items) == len(g_items)
        p_items, g_items = (_notation.values_by_name(items) or items for items in (p_items, g_items))
        return has_order and all(map(self._same_member, p_items, g_items))

    def _named_tuple(self, p_items: list[str], g_items: list[str]) -> bool:
        """`x = 1, y = 2` is the pair (1, 2); other names have no order that a reader knows."""
        named, (pair, *_) = (p_items, g_items) if len(p_items) > 1 else (g_items, p_items)
        if (values := _notation.values_by_name(named)) is None:
            return False
        point = f"({','.join(values)})"
        return bool(self._by_brackets(*((point, pair) if named is p_items else (pair, point))))

    def _conjunctions(self, p: str, g: str) -> tuple[str, str]:
        """`_conjunction` of both; both unchanged where only one is one, of the other's items in another order."""
        p_one, g_one = self._conjunction(p), self._conjunction(g)
        only_one = (p_one == p) != (g_one == g)
        if not only_one or ";" in p + g:
            return p_one, g_one
        p_items, g_items = (sorted(map(key, split(x, COMMA)[::2])) for x in (p, g))
        return (p, g) if p_items == g_items else (p_one, g_one)

    def _conjunction(self, text: str) -> str:
        r"""`1<x<4` from `x>1, x<4`, which as alternatives would be every number; any other text as it is."""
        parts = split(text, COMMA)
        if len(parts) != 3 or ";" in text:
            return text
        written = list(filter(None, map(_notation.as_interval, parts[::2])))
        if len(written) != 2 or written[0][0] != written[1][0]:
            return text
        ranges = sorted(written, key=lambda x: x[1].startswith("(-\\infty"))
        low, high = _UNBOUNDED_ABOVE.fullmatch(ranges[0][1]), _UNBOUNDED_BELOW.fullmatch(ranges[1][1])
        if not (low and high and self._overlap(low[2], high[1], ranges == written)):
            return text
        below, above = ("<" if bracket in "()" else "\\leq " for bracket in (low[1], high[2]))
        return f"{low[2]}{below}{ranges[0][0]}{above}{high[1]}"

    def _overlap(self, low: str, high: str, low_is_first: bool) -> bool:
        """Whether `x>low, x<high` means both at once, as there are numbers in between: not so x>a, x<-a. Small and
        large positive numbers are tried for the names. Where they disagree (x>a, x<b), `low` has to stand first."""
        try:
            unknown = sorted(names(parse(low)) | names(parse(high)))
            small, large = ([Fraction(i + 1) * scale for i in range(len(unknown))] for scale in (Fraction(1, 97), 97))
            values = (small, small[::-1], large, large[::-1])
            points = [dict(zip(unknown, numbers, strict=True)) for numbers in values]
            found = {_values.order(low, high, self.deadline, point) < 0 for point in points}
        except Unreadable:
            return low_is_first
        except _values.TooLarge:
            return False
        return low_is_first if len(found) > 1 else found == {True}

    def _same_member(self, p: str, g: str) -> bool:
        """`same` for what is inside a collection, where {5} is not 5."""
        self.inside += 1
        same = self.same(p, g)
        self.inside -= 1
        return same

    def _match(self, p_items: list[str], g_items: list[str]) -> bool:
        """Equal as multisets. Equality is an equivalence, so that taking the first match is enough."""
        if len(p_items) != len(g_items) or len(g_items) > _MAX_ITEMS:
            return sorted(map(key, p_items)) == sorted(map(key, g_items))
        left = list(_notation.carried(p_items))
        for item in _notation.carried(g_items):
            text = key(item)
            tried = [i for i, other in enumerate(left) if key(other) == text] or range(len(left))
            found = next((i for i in tried if self._same_member(left[i], item)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _by_relation(self, p: str, g: str) -> bool | None:
        p_parts, g_parts = split(p, RELATION), split(g, RELATION)
        p_range, g_range = _sets.as_range(p), _sets.as_range(g)
        if len(p_parts) == len(g_parts) == 1 and not (p_range or g_range):
            return None
        if p_range and g_range and p_range[0] == g_range[0]:
            return self.same(p_range[1], g_range[1])
        if len(p_parts) > 1 and len(g_parts) > 1:
            return self._same_relation(p_parts, g_parts)
        if p_range or g_range:
            return self.same(p_range[1] if p_range else p, g_range[1] if g_range else g)
        sets = self._as_sets(p, g)
        return sets != (p, g) and all(map(_SET_ALGEBRA.search, sets)) and self._ask_algebra(*sets)

    def _same_relation(self, p_parts: list[str], g_parts: list[str]) -> bool:
        """Equal chains of terms; or one relation, where left minus right is the same up to a constant factor."""
        if p_parts[1::2] == g_parts[1::2] and all(map(self._match_term, p_parts[::2], g_parts[::2])):
            return True
        if len(p_parts) != 3 or len(g_parts) != 3:
            return False
        (p_left, op, p_right), (g_left, g_op, g_right) = p_parts, g_parts
        if op not in (g_op, FLIP.get(g_op)) or op not in ("=", "\\neq", *FLIP):
            return False
        try:
            sign = _values.proportional(f"({p_left})-({p_right})", f"({g_left})-({g_right})", self.deadline)
        except Unreadable:
            return self._ask_algebra("".join(p_parts), "".join(g_parts))
        except _values.TooLarge:
            return False
        return sign != 0 and (op not in FLIP or sign == (1 if op == g_op else -1))

    def _match_term(self, p: str, g: str) -> bool:
        try:
            return key(p) == key(g) or _values.equal(p, g, self.deadline)
        except (Unreadable, _values.TooLarge):
            return False

    def _by_brackets(self, p: str, g: str) -> bool | None:
        p, g = _unnamed_point(p, g), _unnamed_point(g, p)
        p_is, g_is = (x[0] in "([" and x[-1] in ")]" and _notation.closing_bracket(x) == len(x) - 1 for x in (p, g))
        if not p_is and not g_is:
            return None
        if (p[0], p[-1]) != (g[0], g[-1]) or p_is != g_is:
            if _SET_ALGEBRA.search(p + g):
                return self._ask_algebra(p, g)
            return None if "\\begin" in p + g else False
        p_items, g_items = split(p[1:-1], COMMA)[::2], split(g[1:-1], COMMA)[::2]
        return len(p_items) == len(g_items) and all(map(self._same_member, p_items, g_items))

    def _by_matrix(self, p: str, g: str) -> bool | None:
        tables = [_notation.matrix_of(x) for x in (p, g)]
        if None in tables:
            return None if ("\\begin" in p and "\\begin" in g) or tables == [None, None] else False
        p_rows, g_rows = tables
        if list(map(len, p_rows)) != list(map(len, g_rows)):
            return False
        return all(all(map(self.same, *rows)) for rows in zip(p_rows, g_rows, strict=True))

    def _by_ratio(self, p: str, g: str) -> bool | None:
        p_terms, g_terms = split(p, _COLON)[::2], split(g, _COLON)[::2]
        if len(p_terms) == len(g_terms) == 1:
            return None
        return len(p_terms) == len(g_terms) and all(map(self.same, p_terms, g_terms))

    def _by_words(self, p: str, g: str) -> bool | None:
        if (p_letters := _CAPITALS.fullmatch(p)) and (g_letters := _CAPITALS.fullmatch(g)):
            return p_letters[1] == g_letters[1]
        if _UPRIGHT.search(p + g) and (substance := _notation.chemical(g)) and (other := _notation.chemical(p)):
            return substance == other or substance.casefold() == other.casefold() == "no"  # CO is not Co; no is a word
        p_text, g_text = _notation.is_text(p), _notation.is_text(g)
        return None if not p_text and not g_text else g_text and _notation.fold_text(p) == _notation.fold_text(g)

    def _by_value(self, p: str, g: str) -> bool:
        """Equal values of two formulas; what is no formula of the usual kind goes to the computer algebra system."""
        tolerance = self._tolerance(g)
        p, g = map(_plain_number, (p, g))
        try:
            if tolerance is not None:
                return _values.within(p, g, tolerance, self.deadline)
            return _values.equal(p, g, self.deadline)
        except Unreadable:
            return self._ask_algebra(p, g)
        except _values.TooLarge:
            self.rule = "size"
            self.unreadable.add("gold" if _is_too_large(g, self.deadline) else "prediction")
            return False

    def _ask_algebra(self, p: str, g: str) -> bool:
        if _SET_ALGEBRA.search(p) or _SET_ALGEBRA.search(g):
            same = _sets.same_set(p, g, self.deadline)
            if same is not None:
                self.rule = "set"
                return same
        self.rule = "algebra"
        if needs_algebra(p) and needs_algebra(g) and _loosened(p) == _loosened(g):
            return True
        for side, text in (("gold", g), ("prediction", p)):
            if not is_readable(text):
                self.unreadable.add(side)
        if (
            self.unreadable
            or not (needs_algebra(p) or needs_algebra(g))
            or unknown_functions(p) != unknown_functions(g)
        ):
            return False
        if self.algebra is None:
            raise NeedsAlgebra
        result = self.algebra(p, g)
        if isinstance(result, str):
            self.unreadable.add(result)
        return result is True


class _Step(NamedTuple):
    kind: str
    compared: Callable[[Comparison, str, str], bool | None]
    needs: re.Pattern[str] | None = None  # found in one of the two texts at least, else the step has nothing to say


_STEPS = (  # in this order; behind each a pair that it finds equal
    _Step("text", Comparison._by_text),  # "1 , 2" and "1,2"
    _Step("number", Comparison._by_number),  # "0.5" and "1/2"
    _Step("time", Comparison._by_time),  # "6 a.m." and "06:00 AM"
    _Step("unit", Comparison._by_unit),  # "5 km" and "5000 m"
    _Step("assignment", Comparison._by_name, RELATION),  # "x = 5 + 6 = 11" and "11"
    _Step("condition", Comparison._by_condition, re.compile(r"[<>]|\\(?:[lg]eq|neq|notin|in(?![a-z]))")),  # "|x|<2"
    _Step("union", Comparison._by_union, _CUP),  # "(2,3) \cup (0,1)" and "(0,1) \cup (2,3)"
    _Step("collection", Comparison._by_items, re.compile(r"[,;]|\\(?:\{|[pm][pm])")),  # "3, 2" and "\{2, 3\}"
    _Step("relation", Comparison._by_relation, RELATION),  # "2x - y = 0" and "y = 2x"
    _Step("brackets", Comparison._by_brackets, re.compile(r"[(\[]")),  # "(0.5, 2)" and "(1/2, 2)"
    _Step("matrix", Comparison._by_matrix, re.compile(r"\\begin")),
    _Step("ratio", Comparison._by_ratio, _COLON),  # "1.0:2" and "1:2"
    _Step("words", Comparison._by_words),  # "No solution." and "no solution"
    _Step("value", Comparison._by_value),  # "2\sqrt{2}" and "\sqrt{8}"
)


_BRACED_COMMAND = re.compile(r"([_^])\{(\w|\\[a-z]+)\}")


def _loosened(text: str) -> str:
    """Without what LaTeX does not see in a formula that nothing here reads: spaces, braces round one character or
    command."""
    return _BRACED_COMMAND.sub(r"\1\2", key(text))


_POINT = re.compile(r"[A-Z] ?(?=\()")


def _unnamed_point(text: str, other: str) -> str:
    """`(3,4)` from `P(3,4)` where the other side has no name before its brackets; any other text as it is."""
    return _POINT.sub("", text, count=1) if other.startswith("(") and _POINT.match(text) else text


_EXPONENT = re.compile(r"\d[eE][-+]?\d")


def _plain_number(text: str) -> str:
    """`1/100000` from `1e-5`, which a formula would read as a product with Euler's number."""
    value = number(text) if _EXPONENT.search(text) else None
    return text if value is None else f"{value.numerator}/{value.denominator}"


def _is_too_large(text: str, deadline: float) -> bool:
    try:
        return not _values.equal(text, text, deadline)
    except _values.TooLarge:
        return True
    except Unreadable:  # a sum of too many terms
        return False


def _percent_as_value(value: str, unit) -> tuple[str, object]:
    return (rf"({value})/100", None) if unit is not None and unit.powers == (("%", 1),) else (value, unit)


def _time_of_day(hours: str, minutes: str | None, half: str) -> tuple[int, int, str]:
    """06:00 AM and 6 a.m. are the same time, and so are 15:30 and 3:30 p.m."""
    return (int(hours), int(minutes or 0), half.lower()) if half else (int(hours) - 12, int(minutes), "p")
