r"""Numerals and units: `15\text{ cm}^2` is the number 15 and the unit cm^2."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# Numerals
# ---------------------------------------------------------------------------------------------------------------------

_MAX_EXPONENT = 2000  # of ten, in scientific notation
_INT = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+"
_DECIMAL = re.compile(rf"(?:(?:{_INT})(?:\.\d*)?|\.\d+)")
_SIGNED = rf"[+-]? ?{_DECIMAL.pattern}"
_WITH_POINT = re.compile(r"[+-]? ?[\d ,]*\.(\d+)")
_MINUS = re.compile(r"-(?! ?-)")
_QUOTIENT = re.compile(
    rf"(?:\\frac ?\{{ ?({_SIGNED}) ?\}} ?\{{ ?({_SIGNED}) ?\}}|\(?({_SIGNED})\)? ?/ ?\(?({_SIGNED})\)?)"
)
_MIXED = re.compile(r"(\d+) ?(?:\{ ?)?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}(?: ?\})?|(?<= )(\d+) ?/ ?(\d+))")
_SCIENTIFIC = re.compile(
    rf"({_SIGNED})(?: ?(?:\\cdot|x) ?10 ?\^ ?(?:\{{ ?([+-]? ?\d+) ?\}}|\( ?([+-]?\d+) ?\)|([+-]?\d+))|[eE]([+-]?\d+))"
)


@lru_cache(maxsize=4096)
def number(text: str) -> Fraction | None:
    """The exact value of a numeral: integer, decimal, fraction, mixed number or scientific notation; else None."""
    text = text.strip()
    sign = -1 if _MINUS.match(text) else 1
    body = text[1:].strip() if text[:1] in ("+", "-") else text
    if _DECIMAL.fullmatch(body):
        return sign * _exact(body)
    if not body[-1:].isdigit() and body[-1:] not in ("}", ")"):
        return None
    if "/" in body or "\\frac" in body:
        return _fraction(body, sign)
    if part := _SCIENTIFIC.fullmatch(body):
        mantissa, power = (group.replace(" ", "") for group in part.groups() if group)
        return sign * _exact(mantissa) * Fraction(10) ** int(power) if abs(int(power)) <= _MAX_EXPONENT else None
    return None


def _fraction(body: str, sign: int) -> Fraction | None:
    if part := _MIXED.fullmatch(body):
        whole, top, bottom = (int(group) for group in part.groups() if group)
        return sign * (whole + Fraction(top, bottom)) if top < bottom else None
    if part := _QUOTIENT.fullmatch(body):
        top, bottom = (_exact(group) for group in part.groups() if group)
        return sign * top / bottom if bottom else None
    return None


def _exact(text: str) -> Fraction:
    return Fraction(text.replace(" ", "").replace(",", "").rstrip("."))


def decimals(text: str) -> int | None:
    """Digits after the point of a decimal numeral ("3.14": 2); None for anything else."""
    found = _WITH_POINT.fullmatch(text)
    return len(found[1]) if found else None


def is_lowest_terms(text: str) -> bool:
    r"""False for a fraction of whole numbers that can be reduced: `\frac{2}{4}`, `4/2`."""
    part = _QUOTIENT.fullmatch(text.lstrip("+- "))
    if not part:
        return True
    top, bottom = (_exact(group) for group in part.groups() if group)
    whole = top.denominator == bottom.denominator == 1
    return not whole or not bottom or abs((top / bottom).denominator) == abs(bottom)


# ---------------------------------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A unit: `scale` times a product of powers of base units; words that are no known unit are in `others`."""

    scale: Fraction
    powers: tuple[tuple[str, int], ...]
    others: frozenset[str] = frozenset()


_TABLE = """
m = 1 m: meter metre | km = 1000 m: kilometer kilometre kms | cm = 1/100 m: centimeter centimetre cms
mm = 1/1000 m: millimeter millimetre | dm = 1/10 m: decimeter decimetre | nm = 1/1000000000 m: nanometer nanometre
in = 127/5000 m: inch inches | ft = 381/1250 m: foot feet | yd = 1143/1250 m: yard | mi = 201168/125 m: mile
g = 1 g: gram gm | kg = 1000 g: kilogram kilo kgs | mg = 1/1000 g: milligram | t = 1000000 g: ton tonne
lb = 1 lb: pound lbs | oz = 1/16 lb: ounce
s = 1 s: sec second secs | ms = 1/1000 s: millisecond | min = 60 s: minute mins | h = 3600 s: hr hour hrs
day = 86400 s: d | week = 604800 s: wk | month = 1 month: mo | year = 12 month: yr yrs
L = 1 L: l liter litre | mL = 1/1000 L: ml milliliter millilitre | gal = 1 gal: gallon
$ = 1 $: ¤ dollar USD buck | cent = 1/100 $: ¢ | € = 1 €: euro EUR | £ = 1 £: GBP | ¥ = 1 ¥: yen yuan RMB CNY JPY
₹ = 1 ₹: rupee INR Rs
% = 1 %: percent percentage pct | deg = 1 deg: degree | rad = 1 rad: radian | degC = 1 degC | degF = 1 degF
kPa = 1000 Pa: kilopascal | MPa = 1000000 Pa: megapascal | atm = 101325 Pa: atmosphere | kHz = 1000 Hz: kilohertz
MHz = 1000000 Hz: megahertz | GHz = 1000000000 Hz: gigahertz | mmol = 1/1000 mol: millimole | kN = 1000 N: kilonewton
um = 1/1000000 m: micrometer micrometre micron | us = 1/1000000 s: microsecond | ug = 1/1000000 g: microgram
Å = 1/10000000000 m: angstrom
K = 1 K: kelvin | N = 1 N: newton | J = 1 J: joule | kJ = 1000 J: kilojoule | W = 1 W: watt | kW = 1000 W: kilowatt
V = 1 V: volt | A = 1 A: amp ampere | Hz = 1 Hz: hertz | Pa = 1 Pa: pascal | mol = 1 mol: mole | C = 1 C: coulomb
eV = 1 eV: electronvolt | keV = 1000 eV | MeV = 1000000 eV | GeV = 1000000000 eV
ohm = 1 ohm | kohm = 1000 ohm | Mohm = 1000000 ohm
person = 1 person: people person | unit = 1 unit | point = 1 point: pt pts
"""


def _read_table() -> dict[str, tuple[Fraction, str]]:
    units = {}
    for line in re.split(r"[|\n]", _TABLE.strip()):
        symbol, scale, base, names = re.fullmatch(r"(\S+) = (\S+) ([^:\s]+):? ?(.*)", line.strip()).groups()
        for name in [symbol, *names.split()]:
            units[name] = units[f"{name}s" if len(name) > 2 else name] = Fraction(scale), base
    return units


_UNITS = _read_table()
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmph": "km/h", "kmh": "km/h", "cc": "cm^3", "fps": "ft/s"}
_RAISED_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_RAISED_AFTER = {"squared": 2, "cubed": 3}
AMBIGUOUS = frozenset("mshgtLJNWVACKdl") | {"in", "a"}  # also variables or words: never stripped from a gold answer
PRODUCTS = AMBIGUOUS | {f"{a}/{b}" for a in AMBIGUOUS for b in AMBIGUOUS}  # what may end a formula in variables
_NO_UNIT = re.compile(  # words that change the value before them, and hedges
    r"(?i)[?!<>=]|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty|hundreds?"
    r"|thousands?|\w*illions?|bn|mil|bil|mn|lakhs?|crores?|googol|tens|dozens?|doz|scores?|gross|pi|half|halves|quarters?|thirds?|(?:four|fif|six|seven|eigh|nin|ten"
    r"|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w+illion)ths?|point|kilo|mega|giga|milli|micro"
    r"|or|and|not|\w+n't|isnt|cannot|never|neither|no|nope|maybe|perhaps|possibly|probably|either|alternatively|else|wrong|incorrect|false|unless|otherwise|if"
    r"|vs|but|except|negat\w+|opposite|inverse|reciprocal|doubled|tripled|halved"
    r"|less|fewer|least|most|than|above|below|under|over|up|plus|minus|times|multiplied|divided|by|choose|squared|cubed|factorial"
    r"|mod|modulo|base|to|through|between|about|is|are|was|remainder)\b"
)
_UNIT_TEXT = re.compile(r"[^\W_][\w ./^{},'%$-]*|[%$¤€£¥₹¢]")
_FACTOR = re.compile(r"(per\b|/|[^\s/^\d.,]+)\.?(?: ?\^\{?(-?\d)\}?|([23])(?!\d))?")  # a name of a unit and its power
_WRAPPED, _DIGIT, _NO_BRACES = re.compile(r"\\text\{([^{}]*)\}"), re.compile(r"\d"), str.maketrans("", "", " {}")
_NOT_MEASURED = re.compile(  # degrees of a sine are no unit of the result, nor is odd in \text{even}\text{odd}
    r"(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])|(?:^|[,;(] ?)\\text\{[^{}\d]*\}$"
)
_VARIABLE = re.compile(  # \pi d and 3t^2, but not m / s^2
    r"\\pi ?[dhtl]$|(?<![A-Za-z/])(?<!/ )[shgtLJNWVACKdl] ?\^ ?(?:\{ ?\d ?\}|\d)$"
)
_MAGNITUDE = re.compile(r"\d ?[KkMmBb]$")
_PREFIXED = re.compile(r"(-? ?)([¤€£¥₹]|(?:USD|EUR|GBP|INR|RMB|CNY|Rs)\.?(?= ?\d)) ?(.+)")
_TRAILING = re.compile(
    r"(?P<value>.*(?:[\d)}\]]|\\pi|(?<=[A-Za-z]) ?(?=\\text))) ?"
    r"(?P<unit>\\text\{[^{}]*\}(?: ?/ ?(?:\\text\{[^{}]*\}|[a-z]+))?"
    r"|%|(?:(?:square|sq|cubic|cu)\.? )?(?:[A-Za-z]{2,}[23]|[A-Za-z]+)(?: ?/ ?[A-Za-z]+)?(?: per [a-z]+)?"
    r"|[¤€£¥₹¢]|[\u4e00-\u9fff]+)"
    r"(?P<power> ?\^ ?(?:\{ ?-?\d ?\}|\d))?"
)


_TWO_UNITS = re.compile(
    r"(\d+) ?(\\text\{[^{}\d]*\}|[A-Za-z]+),? ?(\d+(?:\.\d+)?) ?(\\text\{[^{}\d]*\}|[A-Za-z]+)"
    r"|\\text\{(\d+) ?([a-z]+),? ?(\d+(?:\.\d+)?) ?([a-z]+)\}"
)


_ENDS_LIKE_UNIT = re.compile(r"[A-Za-z}%¤€£¥₹¢\u4e00-\u9fff]$|[A-Za-z^ ]\d$")


def split_unit(text: str, keep: frozenset[str] = frozenset()) -> tuple[str, Unit | None]:
    r"""`("15", cm^2)` from `15\text{ cm}^2`; the unit is None if there is none. Units in `keep` stay in the text."""
    if sign := _PREFIXED.fullmatch(text):
        value, trailing = split_unit(sign[3])
        unit = _parse_unit(sign[2])
        if _MAGNITUDE.search(sign[3]):
            return text, None  # in $50K the K is no unit
        return sign[1] + value, unit if trailing is None else _merge(unit, trailing)
    if both := _two_units(text):
        return both
    part = _TRAILING.fullmatch(text) if _ENDS_LIKE_UNIT.search(text[-2:]) else None
    if not part or part["unit"].replace(" ", "") in keep or _NOT_MEASURED.search(part["value"]):
        return text, None
    if _VARIABLE.search(text):
        return text, None
    unit = _parse_unit(_words(part["unit"]) + (part["power"] or "").translate(_NO_BRACES))
    apart = text[part.end("value")] == " "
    if unit is None or (unit.others and not _may_be_foreign(part["value"], part["unit"], apart)):
        return text, None
    return part["value"].strip(), unit


def _words(unit: str) -> str:
    return _WRAPPED.sub(r" \1 ", unit).strip()


def _two_units(text: str) -> tuple[str, Unit] | None:
    """`("90", inch)` from `7 feet 6 inches`."""
    found = _TWO_UNITS.fullmatch(text)
    if not found:
        return None
    large, large_unit, small, small_unit = (part for part in found.groups() if part)
    units = [_parse_unit(_words(unit)) for unit in (large_unit, small_unit)]
    if None in units or units[0].powers != units[1].powers or units[0].others or units[1].others:
        return None
    ratio = units[0].scale / units[1].scale
    total = int(large) * ratio + Fraction(small)
    return (str(total), units[1]) if ratio > 1 and Fraction(small) < ratio else None


def _may_be_foreign(value: str, word: str, apart: bool) -> bool:
    """Whether an unknown word after a value is a unit ("8 apples") and not a product ("8abc")."""
    return word.startswith("\\") or not word.isascii() or (apart and len(word) > 3 and number(value) is not None)


def _merge(a: Unit, b: Unit) -> Unit:
    return a if b.powers in ((), a.powers) else Unit(a.scale * b.scale, tuple(sorted({*a.powers, *b.powers})))


@lru_cache(maxsize=4096)
def _parse_unit(text: str) -> Unit | None:
    """The unit that a text names; None for words that belong to the value, and for a hedge."""
    if not _UNIT_TEXT.fullmatch(text):
        return None
    factors, others, sign, raised = [], set(), 1, 1  # factors: (name, power)
    text = " ".join(_COMPOUND.get(word, word) for word in text.split())
    if _DIGIT.search(_FACTOR.sub("", text)):  # "cm, 7 cm"
        return None
    for word, *powers in _FACTOR.findall(text):
        power = "".join(powers)
        if word in ("per", "/"):
            sign = -1
        elif word in _RAISED_BEFORE:
            raised = _RAISED_BEFORE[word]
        elif word in _RAISED_AFTER and factors:
            factors[-1] = factors[-1][0], factors[-1][1] * _RAISED_AFTER[word]
        elif known := next((name for name in (word, word.lower() if len(word) > 1 else "") if name in _UNITS), None):
            factors.append((known, sign * int(power or 1) * raised))
            raised = 1
        else:
            others.add(word.casefold().removesuffix("s"))
    if (others and _NO_UNIT.search(text)) or not (factors or others):
        return None
    scale, total = Fraction(1), Counter()
    for name, exponent in factors:
        scale *= _UNITS[name][0] ** exponent
        total[_UNITS[name][1]] += exponent
    return Unit(scale, tuple(sorted(total.items())), frozenset(others))


def is_unit(text: str) -> bool:
    """Whether a text is made of known units alone."""
    unit = _parse_unit(text)
    return unit is not None and not unit.others


def is_unit_word(word: str) -> bool:
    """Whether a word of two letters or more is the name of a unit and nothing else."""
    return word in _UNITS and word not in AMBIGUOUS


def conversion(p: Unit, g: Unit) -> Fraction | None:
    """How many of `g` one `p` is: 1000 for km and m; None if they differ in kind. "$" may mean "$ per hour"."""
    plain = min(p, g, key=lambda unit: len(unit.powers))
    if p.powers != g.powers and _money(p) and _money(p) == _money(g) and (len(plain.powers), plain.scale) == (1, 1):
        return Fraction(1)
    if p.powers != g.powers:
        return None
    same_words = p.others <= g.others or g.others <= p.others
    return p.scale / g.scale if p.powers or same_words else None


def _money(unit: Unit) -> set[str]:
    return {base for base, power in unit.powers if base in "$€£¥₹" and power == 1}
