r"""Whether two formulas are equal, by their values.

Two formulas are equal when their values agree wherever both are defined: as exact fractions where every step is
rational, else to more digits than the two texts could differ in. The points are fixed, so a verdict never changes.
Quotients of polynomials need no values: their fingerprints decide (`common._fingerprint`).
At these points bounds of sums are whole numbers, and an unknown sequence, such as a_k, has random terms.
Every step is bounded (`TooLarge`) and checks the deadline, so that this can run in any thread.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

from common._fingerprint import fingerprint, is_rational
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

_EXACT_TYPES = frozenset([int, Fraction])  # steps with whole numbers as int take a tenth of the time
_MAX_DIGITS = 8000  # of an intermediate number
_MAX_BITS = int(_MAX_DIGITS / 0.302)
_MAX_PRECISION = 2000  # digits of an inexact number
_MAX_FACTORIAL = 2500
_MAX_TERMS = 5000  # of all sums and products at one point


class TooLarge(ArithmeticError):
    """A value with too many digits, such as a power tower or a huge factorial."""


class _Undefined(ArithmeticError):
    """No value at this point: a division by zero, the logarithm of zero."""


class _Irrational(Exception):
    """The value is no fraction, or not recognised as one."""


# ---------------------------------------------------------------------------------------------------------------------
# Exact steps
# ---------------------------------------------------------------------------------------------------------------------


def _are_exact(*values: Any) -> bool:
    return _EXACT_TYPES.issuperset(map(type, values))


def _digits(value: int | Fraction) -> float:
    """Decimal digits of numerator and denominator together."""
    return 0.302 * (value.numerator.bit_length() + value.denominator.bit_length())


def _quotient(a: int | Fraction, b: int | Fraction) -> Fraction:
    if not b:
        raise _Undefined
    return Fraction(a, b) if type(a) is type(b) is int else a / b


def _power(base: int | Fraction, exponent: int | Fraction) -> int | Fraction:
    if exponent.denominator != 1:
        return _rational_root(base, exponent)
    power = exponent.numerator
    if not base and power <= 0:
        raise _Undefined
    if base.denominator == 1 and abs(base.numerator) < 2:
        return base ** (2 - power % 2)
    if abs(power) > 2 * _MAX_DIGITS / _digits(base):  # the product may be larger than any float
        raise TooLarge
    return base**power if power > 0 else Fraction(base) ** power


def _rational_root(base: int | Fraction, exponent: Fraction) -> int | Fraction:
    """`8^{2/3}` is 4; an odd root of a negative number is the real one, as in school."""
    degree = exponent.denominator
    if degree > 64 or (base < 0 and degree % 2 == 0):
        raise _Irrational
    top, bottom = _integer_root(abs(base.numerator), degree), _integer_root(base.denominator, degree)
    if top is None or bottom is None:
        raise _Irrational
    return _power(Fraction(top, bottom) * (-1 if base < 0 else 1), exponent.numerator)


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() < 1000:
        root = round(value ** (1 / degree))
    else:
        return None
    return next((near for near in (root - 1, root, root + 1) if near >= 0 and near**degree == value), None)


def _factorial(value: int | Fraction) -> int:
    if value.denominator != 1:
        raise _Irrational
    if value < 0:
        raise _Undefined
    if value > _MAX_FACTORIAL:
        raise TooLarge
    return math.factorial(int(value))


def _binomial(n: int | Fraction, k: int | Fraction) -> int:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        raise _Irrational
    if n > _MAX_FACTORIAL:
        raise TooLarge
    return math.comb(int(n), int(k))


_EXACT = {
    "+": lambda *terms: sum(terms),
    "*": operator.mul,
    "/": _quotient,
    "neg": operator.neg,
    "^": _power,
    "root": lambda a, degree: _power(a, _quotient(1, degree)),
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "re": lambda a: a,
    "floor": math.floor,
    "ceil": math.ceil,
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
    """Values of formulas where names have the values `at`. Each step is bounded, and all have to end by `deadline`."""

    def __init__(self, at: dict[str, Fraction], deadline: float) -> None:
        self.at = at
        self.deadline = deadline  # time.monotonic()
        self.mp = None
        self.spread = 0.0  # digits of the largest or smallest number met
        self._known: dict[tuple, Any] = {}  # values of functions: the other formula often has the same
        self._terms = 0

    def _series(self, node: Node):
        """The sum or product of its terms. Undefined if a bound is not whole, or the upper one lies far below."""
        variable, *bounds, body = node.args
        lower, upper = map(self.value, bounds)
        if not _are_exact(lower, upper) or lower.denominator > 1 or upper.denominator > 1 or upper < lower - 1:
            raise _Undefined
        self._terms += int(upper - lower) + 1
        if self._terms > _MAX_TERMS:
            raise Unreadable("too many terms")  # a computer algebra system may know a closed form
        op, result = _SERIES[node.op]
        outside = self.at
        self.at = dict(outside)
        try:
            for k in range(int(lower), int(upper) + 1):
                self.at[variable] = k
                result = self._combined(op, (result, self.value(body)))
        finally:
            self.at = outside
        return result

    def set_digits(self, digits: int) -> None:
        if digits > _MAX_PRECISION:
            raise TooLarge
        self.mp = _context()
        self.mp.dps = digits
        self._known.clear()

    def value(self, node: Node):
        """The value: an int or a fraction where every step is exact, else a real or complex number of mpmath.

        Raises `_Undefined` or `TooLarge`.
        """
        op, args = node
        if op == "number":
            return args[0]
        if op == "name":
            return self.at[args[0]]
        if op == "constant":
            return _CONSTANTS[args[0]](self.mp)
        if op == "term":
            return _term(args[0], *map(self.value, args[1:]))
        if op in _SERIES:
            return self._series(node)
        return self._combined(op, tuple(map(self.value, args)))

    def _combined(self, op: str, values: tuple):
        if op in _EXACT and _EXACT_TYPES.issuperset(map(type, values)):
            if time.monotonic() > self.deadline:
                raise TimeoutError
            try:
                value = _EXACT[op](*values)
            except _Irrational:
                value = None
            if value is not None:
                if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
                    raise TooLarge
                return value
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
        """As `number`, but the size of a fraction goes into `spread`."""
        if type(value) not in _EXACT_TYPES:
            return value
        self.spread = max(self.spread, _digits(value))
        return self.number(value)

    def number(self, value):
        """A fraction as a number of mpmath; a number of mpmath as it is."""
        if type(value) is int:
            return self.mp.mpf(value)
        return self.mp.mpf(value.numerator) / value.denominator if type(value) is Fraction else value

    def _apply(self, op: str, values: tuple):
        if op == "^":
            return self._power(*values)
        if op == "root":
            base, degree = values
            return self._power(base, _quotient(1, degree) if _are_exact(degree) else self.rounded(1) / degree)
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
        """Adds to `spread` the digits that it takes to tell tanh(100), or cos(1e-40), from 1."""
        if op in HYPERBOLIC:
            self.spread = max(self.spread, 0.87 * float(abs(self.mp.re(value))))
        if op in ("cos", "sec", "cosh", "sech") and value:
            self.spread = max(self.spread, -0.602 * float(self.mp.mag(value)))
        if self.spread > _MAX_DIGITS:
            raise TooLarge

    def _power(self, base, exponent):
        base, exact = self.rounded(base), exponent
        exponent = self.rounded(exact)
        is_odd_root = _are_exact(exact) and exact.denominator % 2 and exact.denominator > 1
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
    """The largest value that is taken for a rounding error, of numbers of size 1."""
    return mp.mpf(10) ** -int(0.75 * mp.dps)


@lru_cache(maxsize=4096)
def _term(letter: str, *indices: Fraction) -> Fraction:
    """A term of an unknown sequence: an arbitrary number, always the same for the same letter and index."""
    if any(index.denominator != 1 for index in indices):
        raise _Undefined
    digest = hashlib.blake2b(f"{letter} {' '.join(map(str, indices))}".encode(), digest_size=4).digest()
    return Fraction(int.from_bytes(digest) - 2**31, 94)


_SERIES = {"sum": ("+", 0), "prod": ("*", 1)}
_CONSTANTS = {"pi": lambda mp: +mp.pi, "e": lambda mp: +mp.e, "i": lambda mp: mp.j}
_ARITHMETIC = {
    "+": lambda mp, *terms: mp.fsum(terms),
    "*": lambda mp, a, b: a * b,
    "/": lambda mp, a, b: a / b,
    "neg": lambda mp, a: -a,
    "abs": lambda mp, a: abs(a),
    "re": lambda mp, a: mp.re(a),
    "im": lambda mp, a: mp.im(a),
    "floor": lambda mp, a: mp.floor(a + _noise(mp) * max(1, abs(a))),
    "ceil": lambda mp, a: mp.ceil(a - _noise(mp) * max(1, abs(a))),
}


# ---------------------------------------------------------------------------------------------------------------------
# Equality
# ---------------------------------------------------------------------------------------------------------------------

_MARGIN = 40  # digits beyond those in which two texts of their length can differ
_WHOLE = frozenset("nkmN")  # where every name is one of these, whole numbers are points too
_STEPPED = frozenset(["floor", "ceil"])
_WRITTEN = re.compile(r"(?<!\d)\d{2,6}(?!\d)")
_MAX_AROUND = 60  # whole numbers tried around those that are written
_BOUNDS = (7, 4, 11, 3, 9, 2, 12, 6, 8, 5)  # of sums, one for each point
_MAX_NAMES = 16
_NEEDED = 3  # points at which both formulas have values
# Functions with one branch, defined except at poles: two of these that differ do so almost everywhere
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


_SQUARES_AND_OTHERS = (143, 144, 168, 169, 195, 196, 210, 224, 225, 243, 255, 256, 1000, 1001, 2401, 10**4, 10**6)
_WHOLE_NUMBERS = (*range(1, 131), *_SQUARES_AND_OTHERS)


def whole_points(count: int, texts: str) -> list[list[int]]:
    """Points of positive whole coordinates: floors that differ anywhere, as a rule differ at one of them. Each name in
    turn takes many values, among them those around the numbers in `texts`, while the others are small."""
    rng = random.Random(2605)
    written = {int(digits) for digits in _WRITTEN.findall(texts)}
    around = {n for c in written for n in (*range(c - 3, c + 4), *range(2 * c - 1, 2 * c + 2)) if n > 0}
    values = [*_WHOLE_NUMBERS, *sorted(around - set(_WHOLE_NUMBERS))[:_MAX_AROUND]]
    return [
        [n if j == i else rng.randint(1, most) for j in range(count)]
        for n, most, i in itertools.product(values, (4, 40)[:count], range(count))
    ]


class _Pair:
    """Two formulas and the points at which to compare them."""

    def __init__(self, p: str, g: str, deadline: float) -> None:
        self.texts = p, g
        self.nodes = parse(p), parse(g)
        self.deadline = deadline
        self.scale: Any = 1  # the first formula is this times the second one
        self.whole: list[str] = []
        if any(op in p or op in g for op in _SERIES):
            letters = sequences(self.nodes[0]) | sequences(self.nodes[1])
            self.nodes = indexed(self.nodes[0], letters), indexed(self.nodes[1], letters)
            self.whole = sorted(whole_names(self.nodes[0]) | whole_names(self.nodes[1]))
        self.names = sorted(names(self.nodes[0]) | names(self.nodes[1]))
        if len(self.names) > _MAX_NAMES:
            raise Unreadable("too many names")

    @cached_property
    def operators(self) -> frozenset[str]:
        return operators(self.nodes[0]) | operators(self.nodes[1])

    @cached_property
    def digits(self) -> int:
        """How many digits tell two values apart."""
        return _MARGIN + sum(map(str.isdigit, "".join(self.texts)))

    def points(self) -> Iterator[_Point]:
        coordinates = scattered_points() if self.names else [[]]
        if self.names and not self.whole:
            are_whole, are_stepped = _WHOLE.issuperset(self.names), not self.operators.isdisjoint(_STEPPED)
            if are_whole and are_stepped:  # of \lceil n/2 \rceil nobody asks the value at n = 1/2
                coordinates = whole_points(len(self.names), " ".join(self.texts))
            elif are_whole or are_stepped:
                coordinates = coordinates + [[i + j for j in range(len(self.names))] for i in range(1, 5)]
        for i, values in enumerate(coordinates):
            whole = {name: _BOUNDS[(i + 3 * j) % len(_BOUNDS)] for j, name in enumerate(self.whole)}
            yield _Point(dict(zip(self.names, values, strict=False)) | whole, self.deadline)

    def values(self, point: _Point) -> tuple:
        """Both values at a point: two fractions, or two numbers to enough digits to tell them apart."""
        point.set_digits(self.digits + 20)
        values = tuple(map(point.value, self.nodes))
        if _are_exact(*values):
            return values
        values = tuple(map(point.rounded, values))
        if point.spread > 10:
            point.set_digits(int(self.digits + 2 * point.spread))
            values = tuple(map(point.rounded, map(point.value, self.nodes)))
        return values

    def compared(self, test: Callable) -> int:
        """Number of points at which `test(point, a, b)` is True; 0 if it is False anywhere. None skips a point."""
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
            if agreed == 1 and self.names and (same := self.by_fingerprint()) is not None:
                return int(same)
            if agreed == _NEEDED and self.names and all(map(_is_smooth, self.nodes)):
                return agreed
        if too_large and agreed < _NEEDED:
            raise too_large
        return agreed if not self.names or agreed >= _NEEDED else 0

    def by_fingerprint(self) -> bool | None:
        """Whether both are one formula up to `scale`, given that they have values; None if this cannot tell."""
        if not _are_exact(self.scale):
            return None
        p, g = fingerprint(self.texts[0], 1), fingerprint(self.texts[1], self.scale)
        if p is None or g is None:
            return None
        return p == g or (False if self.is_rational() else None)

    def is_number(self) -> bool:
        """Whether exact steps give both values."""
        return not self.names and self.operators.isdisjoint(_CONSTANTS)

    def is_rational(self) -> bool:
        return all(map(is_rational, self.nodes))

    def same(self, point: _Point, a, b) -> bool | None:
        if _close(point, a, b):
            return True
        if _are_exact(a) or "i" in self.operators:
            return False
        real = _is_real(point, a), _is_real(point, b)
        if all(real) or not self.names or (any(real) and "abs" in self.operators):
            return False
        return None  # another branch of a root or logarithm: outside the domain that is meant


def _zero(point: _Point):
    """Largest relative difference of two equal numbers. Raises `TooLarge` if it is too large to mean anything."""
    exponent = int(point.spread + 15 - point.mp.dps)
    if exponent > -30:
        raise TooLarge
    return point.mp.mpf(10) ** exponent


def _close(point: _Point, a, b) -> bool:
    if _are_exact(a, b):
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

    Raises `Unreadable` if a text is no formula, `TooLarge` if a value has too many digits, and `TimeoutError`.
    """
    pair = _Pair(p, g, deadline)
    if pair.is_rational() and not pair.is_number() and (same := pair.by_fingerprint()) is not None:
        return same
    return pair.compared(pair.same) > 0


def proportional(p: str, g: str, deadline: float) -> int:
    """Sign (1 or -1) of the constant c with p = c g everywhere; 0 if there is none. Raises as `equal` does."""
    pair, ratios = _Pair(p, g, deadline), []

    def same_ratio(point: _Point, a, b) -> bool | None:
        vanish = [_close(point, value, 0) for value in (a, b)]
        if any(vanish):
            return None if all(vanish) else False
        ratios.append(_quotient(a, b))
        pair.scale = ratios[0]
        if not _are_exact(a):
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
        return bool(abs(a - b) <= (tolerance if _are_exact(a) else point.number(tolerance)))

    return not pair.names and pair.compared(near) > 0


def order(p: str, g: str, deadline: float, at: Mapping[str, Fraction]) -> int:
    """-1, 0 or 1 if p is less than, equal to or greater than g, where names have the values `at`.

    Raises as `equal` does, and `Unreadable` if one of the two has no real value there.
    """
    pair, point = _Pair(p, g, deadline), _Point(dict(at), deadline)
    if not at.keys() >= set(pair.names):
        raise Unreadable("no constant")
    try:
        a, b = pair.values(point)
    except _Undefined as error:
        raise Unreadable("no value") from error
    if not _are_exact(a):
        if not _is_real(point, a) or not _is_real(point, b):
            raise Unreadable("not real")
        a, b = point.mp.re(a), point.mp.re(b)
    return 0 if _close(point, a, b) else -1 if a < b else 1
