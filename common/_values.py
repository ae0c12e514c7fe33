r"""Whether two formulas are equal, by their values.

Two formulas are equal when their values agree wherever both are defined: as exact fractions where every step is
rational, else to more digits than the two texts could differ in. The points are fixed, so a verdict never changes.
Bounds of sums are whole numbers there, and a sequence of which nothing is known, such as a_k, has random terms.
Every step is bounded (`TooLarge`) and looks at the deadline, so that this can run in any thread.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any

from common._fingerprint import fingerprint
from common._formula import (
    CIRCULAR,
    HYPERBOLIC,
    Node,
    Unreadable,
    indexed,
    is_whole,
    names,
    operators,
    parse,
    sequences,
    whole_names,
)

_MAX_DIGITS = 8000  # of an exact number on the way
_MAX_PRECISION = 2000  # of an inexact one
_MAX_FACTORIAL = 2500
_MAX_TERMS = 5000  # of all sums and products at one point


class TooLarge(ArithmeticError):
    """A value with no end of digits: a power tower, a huge factorial."""


class _Undefined(ArithmeticError):
    """No value at this point: a division by zero, the logarithm of zero."""


class _Irrational(Exception):
    """The value is no fraction, or not seen to be one."""


# ---------------------------------------------------------------------------------------------------------------------
# Exact steps
# ---------------------------------------------------------------------------------------------------------------------


def _digits(value: Fraction) -> float:
    """Decimal digits of numerator and denominator together."""
    return 0.302 * (value.numerator.bit_length() + value.denominator.bit_length())


def _quotient(a: Fraction, b: Fraction) -> Fraction:
    if not b:
        raise _Undefined
    return a / b


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _rational_root(base, exponent)
    power = exponent.numerator
    if not base and power <= 0:
        raise _Undefined
    if base.denominator == 1 and abs(base.numerator) < 2:
        return base ** (2 - power % 2)
    if abs(power) > 2 * _MAX_DIGITS / _digits(base):  # the product may be larger than any float
        raise TooLarge
    return base**power


def _rational_root(base: Fraction, exponent: Fraction) -> Fraction:
    """`8^{2/3}` is 4; an odd root of a negative number is the real one, as in school."""
    degree = exponent.denominator
    if degree > 64 or (base < 0 and degree % 2 == 0):
        raise _Irrational
    top, bottom = _integer_root(abs(base.numerator), degree), _integer_root(base.denominator, degree)
    if top is None or bottom is None:
        raise _Irrational
    return _power(Fraction(top, bottom) * (-1 if base < 0 else 1), Fraction(exponent.numerator))


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() < 1000:
        root = round(value ** (1 / degree))
    else:
        return None
    return next((near for near in (root - 1, root, root + 1) if near >= 0 and near**degree == value), None)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1:
        raise _Irrational
    if value < 0:
        raise _Undefined
    if value > _MAX_FACTORIAL:
        raise TooLarge
    return Fraction(math.factorial(int(value)))


def _binomial(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        raise _Irrational
    if n > _MAX_FACTORIAL:
        raise TooLarge
    return Fraction(math.comb(int(n), int(k)))


_EXACT = {
    "+": lambda *terms: sum(terms),
    "*": lambda a, b: a * b,
    "/": _quotient,
    "neg": lambda a: -a,
    "^": _power,
    "root": lambda a, degree: _power(a, _quotient(Fraction(1), degree)),
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "re": lambda a: a,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Values at a point
# ---------------------------------------------------------------------------------------------------------------------

_local = threading.local()


def _context():
    """mpmath keeps the precision in a context, so each thread has its own."""
    if not hasattr(_local, "context"):
        import mpmath

        _local.context = mpmath.MPContext()
    return _local.context


class _Point:
    """Values of formulas where the names have the values `at`, each step bounded, all of them before `deadline`."""

    def __init__(self, at: dict[str, Fraction], deadline: float) -> None:
        self.at = at
        self.deadline = deadline  # time.monotonic()
        self.mp = None
        self.spread = 0.0  # digits of the largest or smallest number met
        self._known: dict[tuple, Any] = {}  # values of functions, for the other formula often has them too
        self._terms = 0

    def _series(self, node: Node):
        """The sum or product of its terms. A bound that is not whole, or far below: undefined."""
        variable, *bounds, body = node.args
        lower, upper = map(self.value, bounds)
        if not (isinstance(lower, Fraction) and isinstance(upper, Fraction) and lower.denominator == 1):
            raise _Undefined
        if upper.denominator != 1 or upper < lower - 1:
            raise _Undefined
        self._terms += int(upper - lower) + 1
        if self._terms > _MAX_TERMS:
            raise Unreadable("too many terms")  # a computer algebra system may know a closed form
        op, result = _SERIES[node.op]
        outside = self.at
        try:
            for k in range(int(lower), int(upper) + 1):
                self.at = outside | {variable: Fraction(k)}
                result = self._combined(op, (result, self.value(body)))
        finally:
            self.at = outside
        return result

    def _exactly(self, op: str, values: tuple[Fraction, ...]) -> Fraction:
        if time.monotonic() > self.deadline:
            raise TimeoutError
        value = _EXACT[op](*values)
        if _digits(value) > _MAX_DIGITS:
            raise TooLarge
        return value

    def set_digits(self, digits: int) -> None:
        if digits > _MAX_PRECISION:
            raise TooLarge
        self.mp = _context()
        self.mp.dps = digits
        self._known.clear()

    def value(self, node: Node):
        """The value: a fraction where every step to it is exact, else a real or complex number of mpmath.

        Raises `_Undefined` or `TooLarge`.
        """
        if node.op == "number":
            return node.args[0]
        if node.op == "name":
            return self.at[node.args[0]]
        if node.op == "constant":
            return _CONSTANTS[node.args[0]](self.mp)
        if node.op == "term":
            return _term(node.args[0], *map(self.value, node.args[1:]))
        if node.op in _SERIES:
            return self._series(node)
        return self._combined(node.op, tuple(map(self.value, node.args)))

    def _combined(self, op: str, values: tuple):
        if op in _EXACT and all(isinstance(value, Fraction) for value in values):
            with suppress(_Irrational):
                return self._exactly(op, values)
        if op in _ARITHMETIC:
            return self._inexactly(op, values)
        if (op, values) not in self._known:
            self._known[op, values] = self._inexactly(op, values)
        return self._known[op, values]

    def _inexactly(self, op: str, values: tuple):
        if time.monotonic() > self.deadline:
            raise TimeoutError
        try:
            value = self._apply(op, values)
        except (ValueError, ZeroDivisionError) as error:  # mpmath at a pole
            raise _Undefined from error
        if not self.mp.isfinite(value):
            raise _Undefined
        return value

    def rounded(self, value):
        """`number`, and remembers how large it is."""
        if not isinstance(value, Fraction):
            return value
        self.spread = max(self.spread, _digits(value))
        return self.number(value)

    def number(self, value):
        """A fraction as a number of mpmath; a number of mpmath as it is."""
        return self.mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def _apply(self, op: str, values: tuple):
        if op == "^":
            return self._power(*values)
        if op == "root":
            base, degree = values
            exact = isinstance(degree, Fraction)
            return self._power(base, _quotient(Fraction(1), degree) if exact else self.rounded(Fraction(1)) / degree)
        values = [self.rounded(value) for value in values]
        if op in _ARITHMETIC:
            return _ARITHMETIC[op](self.mp, *values)
        if op == "exp":
            return self._bounded_power(+self.mp.e, values[0])
        if max(map(abs, values)) > (1e3 if op in ("!", "binom") else 1e6) and op != "ln":
            raise TooLarge  # reducing a large angle takes as many digits as it has
        if op in ("!", "binom") and self.mp.dps > 400:
            raise TooLarge
        self._see_limits(op, values[0])
        return getattr(self.mp, {"ln": "log", "!": "factorial", "binom": "binomial"}.get(op, op))(*values)

    def _see_limits(self, op: str, value) -> None:
        """Remembers the digits by which tanh(100) is not 1, and cos(1e-40) neither."""
        if op in HYPERBOLIC:
            self.spread = max(self.spread, 0.87 * float(abs(self.mp.re(value))))
        if op in ("cos", "sec", "cosh", "sech") and value:
            self.spread = max(self.spread, -0.602 * float(self.mp.mag(value)))
        if self.spread > _MAX_DIGITS:
            raise TooLarge

    def _power(self, base, exponent):
        base, exact = self.rounded(base), exponent
        exponent = self.rounded(exact)
        is_odd_root = isinstance(exact, Fraction) and exact.denominator % 2 and exact.denominator > 1
        if is_odd_root and self.mp.im(base) == 0 and self.mp.re(base) < 0:
            return (-1) ** exact.numerator * self._bounded_power(-base, exponent)  # the real root
        return self._bounded_power(base, exponent)

    def _bounded_power(self, base, exponent):
        noise = _noise(self.mp)
        if abs(base) <= noise:  # the square of sin(pi) is 0 and has no size
            if self.mp.re(exponent) <= noise:
                raise _Undefined
            return self.mp.mpf(0)
        size = 0.302 * abs(exponent) * (abs(self.mp.mag(base)) + 6)  # in digits, an upper bound; with i, too
        if size > 10:  # where `spread` counts
            size = abs(exponent * self.mp.log(base)) / 2.302585
        if size > _MAX_PRECISION:
            raise TooLarge
        self.spread = max(self.spread, float(size))
        return self.mp.power(base, exponent)


def _noise(mp):
    """What is no larger is taken for a rounding error."""
    return mp.mpf(10) ** -int(0.75 * mp.dps)


@lru_cache(maxsize=4096)
def _term(letter: str, *indices: Fraction) -> Fraction:
    """A sequence of which nothing is known: any number, the same one for the same index."""
    if any(index.denominator != 1 for index in indices):
        raise _Undefined
    return Fraction(random.Random(f"{letter} {' '.join(map(str, indices))}").randint(-(10**9), 10**9), 94)


_SERIES = {"sum": ("+", Fraction(0)), "prod": ("*", Fraction(1))}
_CONSTANTS = {"pi": lambda mp: +mp.pi, "e": lambda mp: +mp.e, "i": lambda mp: mp.j}
_ARITHMETIC = {
    "+": lambda mp, *terms: mp.fsum(terms),
    "*": lambda mp, a, b: a * b,
    "/": lambda mp, a, b: a / b,
    "neg": lambda mp, a: -a,
    "abs": lambda mp, a: abs(a),
    "re": lambda mp, a: mp.re(a),
    "im": lambda mp, a: mp.im(a),
    "floor": lambda mp, a: mp.floor(a + _noise(mp)),
    "ceil": lambda mp, a: mp.ceil(a - _noise(mp)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Equality
# ---------------------------------------------------------------------------------------------------------------------

_MARGIN = 40  # digits beyond those in which two texts of their length can differ
_WHOLE = frozenset("nkmN")  # where every name is one of these, whole numbers are points too
_BOUNDS = tuple(map(Fraction, (7, 4, 11, 3, 9, 2, 12, 6, 8, 5)))  # of sums, at each of the points
_MAX_NAMES = 16
_NEEDED = 3  # points at which both formulas have values
# Functions with one branch, defined but at poles: two of these that differ do so almost everywhere
_SMOOTH = frozenset(_ARITHMETIC) - {"abs", "re", "im", "floor", "ceil"} | {"name", "exp", *CIRCULAR, *HYPERBOLIC}
_POSITIVE = frozenset(["+", "*", "/", "^", "root"])


def _is_smooth(node: Node) -> bool:
    if not names(node):
        return node.op not in ("term", *_SERIES)
    if node.op == "^":
        base, exponent = node.args
        return _is_smooth(base) if is_whole(exponent) else _is_positive(base) and _is_smooth(exponent)
    return node.op in _SMOOTH and all(_is_smooth(arg) for arg in node.args if isinstance(arg, Node))


def _is_positive(node: Node) -> bool:
    if node.op == "constant":
        return node.args[0] != "i"
    if node.op == "number":
        return node.args[0] > 0
    return node.op in _POSITIVE and all(map(_is_positive, node.args))


@lru_cache(maxsize=1)
def scattered_points() -> list[list[Fraction]]:
    """Ten points with 16 coordinates each, of sizes below 1 to above 10, of one sign and of mixed signs.

    The denominators are even, so that (-1)^x is not taken for an odd root, and differ, so that no sine of a usual
    multiple of x vanishes at all of them.
    """
    rng = random.Random(2605)
    halves = (47, 53, 59, 61, 67, 71, 73, 79, 83, 89)
    sizes = [(1, "+"), (3, "+"), (1, "-"), (11, "+-"), (3, "+-"), (1, "+-"), (3, "-"), (41, "+"), (1, "+"), (5, "+-")]
    signs = {"+": (1,), "-": (-1,), "+-": (1, -1)}
    return [
        [rng.choice(signs[sign]) * size * Fraction(2 * rng.randint(3, 45) + 1, 2 * half) for _ in range(_MAX_NAMES)]
        for half, (size, sign) in zip(halves, sizes, strict=True)
    ]


class _Pair:
    """Two formulas and the points at which to compare them."""

    def __init__(self, p: str, g: str, deadline: float) -> None:
        self.texts = p, g
        self.digits = _MARGIN + sum(map(str.isdigit, p + g))  # that tell their values apart
        self.nodes = parse(p), parse(g)
        self.deadline = deadline
        self.scale = Fraction(1)  # the first formula is this times the second one
        self.operators = operators(self.nodes[0]) | operators(self.nodes[1])
        self.whole: list[str] = []
        if not self.operators.isdisjoint(_SERIES):
            letters = sequences(self.nodes[0]) | sequences(self.nodes[1])
            self.nodes = indexed(self.nodes[0], letters), indexed(self.nodes[1], letters)
            self.whole = sorted(whole_names(self.nodes[0]) | whole_names(self.nodes[1]))
        self.names = sorted(names(self.nodes[0]) | names(self.nodes[1]))
        if len(self.names) > _MAX_NAMES:
            raise Unreadable("too many names")

    def points(self) -> Iterator[_Point]:
        coordinates = scattered_points() if self.names else [[]]
        if self.names and not self.whole and _WHOLE.issuperset(self.names):
            coordinates = coordinates + [[Fraction(i + j) for j in range(len(self.names))] for i in range(1, 5)]
        for i, values in enumerate(coordinates):
            whole = {name: _BOUNDS[(i + 3 * j) % len(_BOUNDS)] for j, name in enumerate(self.whole)}
            yield _Point(dict(zip(self.names, values, strict=False)) | whole, self.deadline)

    def values(self, point: _Point) -> tuple:
        """Both values at a point: two fractions, or two numbers to enough digits to tell them apart."""
        point.set_digits(self.digits + 20)
        values = tuple(map(point.value, self.nodes))
        if all(isinstance(value, Fraction) for value in values):
            return values
        values = tuple(map(point.rounded, values))
        if point.spread > 10:
            point.set_digits(int(self.digits + 2 * point.spread))
            values = tuple(map(point.rounded, map(point.value, self.nodes)))
        return values

    def compared(self, test: Callable) -> int:
        """Points at which `test(point, a, b)` is True; 0 when it is False anywhere. None leaves a point out."""
        agreed, too_large = 0, None
        for point in self.points():
            try:
                result = test(point, *self.values(point))
            except _Undefined:
                continue
            except TooLarge as error:
                too_large = error
                continue
            if result is False:
                return 0
            agreed += result is True
            if agreed == 1 and self.names and self._are_one():
                return agreed
            if agreed == _NEEDED and self.names and all(map(_is_smooth, self.nodes)):
                return agreed
        if too_large and agreed < _NEEDED:
            raise too_large
        return agreed if not self.names or agreed >= _NEEDED else 0

    def _are_one(self) -> bool:
        """Whether no further point can tell the two apart (up to `scale`), once they are seen to have values."""
        if not isinstance(self.scale, Fraction):
            return False
        p, g = fingerprint(self.texts[0], Fraction(1)), fingerprint(self.texts[1], self.scale)
        return p is not None and p == g

    def same(self, point: _Point, a, b) -> bool | None:
        if _close(point, a, b):
            return True
        if isinstance(a, Fraction) or "i" in self.operators:
            return False
        real = _is_real(point, a), _is_real(point, b)
        if all(real) or not self.names or (any(real) and "abs" in self.operators):
            return False
        return None  # another branch of a root or logarithm: outside the domain that is meant


def _zero(point: _Point):
    """What two equal numbers differ by at most, relative to their size. Raises `TooLarge` where that says nothing."""
    exponent = int(point.spread + 15 - point.mp.dps)
    if exponent > -30:
        raise TooLarge
    return point.mp.mpf(10) ** exponent


def _close(point: _Point, a, b) -> bool:
    if isinstance(a, Fraction):
        return a == b
    zero = _zero(point)
    small, large = sorted((abs(a), abs(b)))
    if small <= zero:
        return large <= zero
    return abs(a - b) <= large * zero


def _is_real(point: _Point, value) -> bool:
    return abs(point.mp.im(value)) <= abs(value) * _zero(point)


def equal(p: str, g: str, deadline: float) -> bool:
    """Whether two formulas have the same value wherever both are defined.

    Raises `Unreadable` where a text is no formula, `TooLarge` where a value has too many digits, `TimeoutError`.
    """
    pair = _Pair(p, g, deadline)
    return pair.compared(pair.same) > 0


def proportional(p: str, g: str, deadline: float) -> int:
    """1 or -1, the sign of the constant by which p is g everywhere; 0 if there is none. Raises as `equal` does."""
    pair, ratios = _Pair(p, g, deadline), []

    def same_ratio(point: _Point, a, b) -> bool | None:
        vanish = [_close(point, value, 0) for value in (a, b)]
        if any(vanish):
            return None if all(vanish) else False
        ratios.append(a / b)
        pair.scale = ratios[0]
        if not isinstance(a, Fraction):
            if not _is_real(point, a / b):  # outside the domain, unless one side alone is
                return None if "i" not in pair.operators and not _is_real(point, a) else False
            ratios[0] = point.number(ratios[0])
        return _close(point, ratios[-1], ratios[0])

    agreed = pair.names and pair.compared(same_ratio)  # any two numbers are proportional
    return 0 if not agreed else 1 if ratios[0].real > 0 else -1


def within(p: str, g: str, tolerance: Fraction, deadline: float) -> bool:
    """Whether two constants differ by at most `tolerance`. Raises as `equal` does."""
    pair = _Pair(p, g, deadline)

    def near(point: _Point, a, b) -> bool:
        return bool(abs(a - b) <= (tolerance if isinstance(a, Fraction) else point.number(tolerance)))

    return not pair.names and pair.compared(near) > 0


def order(p: str, g: str, deadline: float, at: Mapping[str, Fraction]) -> int:
    """-1, 0 or 1 as p is less than, equal to or greater than g, two real numbers where names have the values `at`.

    Raises as `equal` does.
    """
    pair, point = _Pair(p, g, deadline), _Point(dict(at), deadline)
    if not at.keys() >= set(pair.names):
        raise Unreadable("no constant")
    try:
        a, b = pair.values(point)
    except _Undefined as error:
        raise Unreadable("no value") from error
    if not isinstance(a, Fraction):
        if not _is_real(point, a) or not _is_real(point, b):
            raise Unreadable("not real")
        a, b = point.mp.re(a), point.mp.re(b)
    return 0 if _close(point, a, b) else -1 if a < b else 1
