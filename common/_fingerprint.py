r"""A number by which two formulas are seen to be the same but for the order and spelling of sums, products and powers.

It is the value of the formula modulo a prime, where names, functions and roots are random numbers: equal functions of
equal arguments have equal ones. So it shows that `2x(x+1) + \sin 2x` is `\sin(2x) + 2x^2 + 2x`, up to a chance of
2^-50; it cannot show that `\sin^2 x + \cos^2 x` is 1. Two quotients of polynomials that differ in it are never equal.
Each process draws its own prime and random numbers, so that no text can be made to have the number of another one.
Whether the formula has a value it does not say: `\ln 0` has a number.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from common._formula import Node, is_whole, parse


def _draw_prime() -> int:
    """One of 61 bits, by Fermat's test: with a known one, a multiple of it could be added to an answer unseen."""
    while True:
        number = int.from_bytes(os.urandom(8)) >> 3 | 2**60 | 1
        if all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13, 17)):
            return number


_PRIME = _draw_prime()
_SECRET = os.urandom(16)
_MAX_EXPONENT, _MAX_DEGREE = 1000, 12  # beyond these a power is a function like others
_WITH_VARIABLES = ("sum", "prod", "term")  # the names of which mean nothing
_JUMPS = ("abs", "re", "im", "floor", "ceil", "i")  # equal arguments are not enough, or several branches count


def fingerprint(text: str, factor: int | Fraction) -> int | None:
    """Fingerprint of `factor` times the formula; None where it has none. Raises `Unreadable`."""
    own = _fingerprint(text)
    return None if own is None or not factor.denominator % _PRIME else own * _of_number(factor) % _PRIME


def is_rational(node: Node) -> bool:
    """Whether a formula is a quotient of polynomials in names, pi and e: one that has a fingerprint has values, and
    another fingerprint is of another function."""
    if node.op == "^":
        base, exponent = node.args
        exponent = exponent.args[0] if exponent.op == "neg" else exponent
        return is_whole(exponent) and exponent.args[0] <= _MAX_EXPONENT and is_rational(base)
    if node.op in ("+", "*", "/", "neg"):
        return all(map(is_rational, node.args))
    return node.op in ("number", "name") or (node.op == "constant" and node.args[0] != "i")


@lru_cache(maxsize=4096)
def _fingerprint(text: str) -> int | None:
    try:
        return _of(parse(text))
    except (ZeroDivisionError, LookupError):
        return None


def _of(node: Node) -> int:
    if node.op == "number":
        return _of_number(node.args[0])
    if node.op in _JUMPS or node.op in _WITH_VARIABLES or node.args[0] in _JUMPS:
        raise LookupError
    if node.op in ("name", "constant"):
        return _random_name(node)
    values = [_of(arg) for arg in node.args]
    if node.op in _STEPS:
        return _STEPS[node.op](*values) % _PRIME
    return _random(node.op, *values)


def _of_number(value: int | Fraction) -> int:
    return value.numerator * _inverse(value.denominator) % _PRIME


def _inverse(value: int) -> int:
    if not value % _PRIME:
        raise ZeroDivisionError
    return pow(value, -1, _PRIME)


def _power(base: int, exponent: int) -> int:
    """`b^{5/3}` is b times the square of its cube root, on any branch."""
    for degree in range(1, _MAX_DEGREE + 1):
        top = (exponent * degree + _MAX_EXPONENT) % _PRIME - _MAX_EXPONENT
        if top <= _MAX_EXPONENT:
            whole, rest = divmod(top, degree)
            root = _random("^", base, degree) if rest else 1
            return pow(base if whole > 0 else _inverse(base), abs(whole), _PRIME) * pow(root, rest, _PRIME)
    return _random("^", base, exponent)


def _random(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8, key=_SECRET).digest()) % _PRIME


@lru_cache(maxsize=4096)
def _random_name(node: Node) -> int:
    return _random(node.op, *node.args)


_STEPS: dict[str, Callable[..., int]] = {
    "+": lambda *terms: sum(terms),
    "*": lambda a, b: a * b,
    "/": lambda a, b: a * _inverse(b),
    "neg": lambda a: -a,
    "^": _power,
    "root": lambda base, degree: _power(base, _inverse(degree)),
}
