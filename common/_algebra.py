"""What needs a computer algebra system: sums without end, integrals, limits, sets. `Algebra` is in a worker process.

latex2sympy2_extended's grammar takes an untrusted text to sympy objects; no text is ever evaluated as code.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from common._formula import Unreadable, parse
from common._notation import RELATION, closing_bracket, split
from common._values import scattered_points


class Algebra:
    """Equality of two formulas with sympy, parsed by math-verify's LaTeX parser (latex2sympy2_extended).

    Two formulas in the same variables are equal when their values agree to 100 digits at points chosen in advance; two
    equations or inequalities, when left minus right differ by a constant factor. No tolerance is meant by this:
    decimals are exact fractions, and unequal formulas of the size admitted do not agree so far everywhere.
    """

    _MAX_CHARS = 1000  # of one formula; the parser is slow
    _DIGITS = 120
    _MAX_LOG10 = 1e5  # of any power on the way

    def __init__(self) -> None:
        import sympy
        from latex2sympy2_extended import latex2sympy
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from sympy.parsing import sympy_parser

        # sympy makes even a number from its text by running code: not here
        sympy_parser.eval_expr = _numbers_and_names_only
        self.sympy = sympy
        config = ConversionConfig(lowercase_symbols=False)
        self._latex2sympy = lambda text: latex2sympy(text, normalization_config=None, conversion_config=config)
        self.parse = lru_cache(maxsize=256)(self._parse)
        for text in _EVERY_KIND:  # builds the parser's tables
            self.parse(text)

    def equal(self, p: str, g: str) -> bool | str:
        """Whether two normalised answers are equal, or which side ("prediction", "gold") cannot be read."""
        sides = []
        for name, text in (("gold", g), ("prediction", p)):
            try:
                sides.append(self.parse(text))
            except MemoryError:
                raise
            except Exception:
                return name
        gold, prediction = sides
        try:
            return gold == prediction or self._same(prediction, gold)
        except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
            return False  # sympy's ways of saying that it has no answer

    def _parse(self, text: str):
        sympy = self.sympy
        if len(text) > self._MAX_CHARS:
            raise Unreadable
        parsed = self._latex2sympy(to_latex(text))
        if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
            raise Unreadable
        parsed = parsed.as_immutable() if isinstance(parsed, sympy.MatrixBase) else parsed
        self._size(parsed)
        parsed = parsed.replace(_is_odd_root, _real_root) if isinstance(parsed, sympy.Expr) else parsed
        known = {sympy.Symbol("i"): sympy.I, sympy.Symbol("e"): sympy.E}
        parsed = parsed.xreplace(known)
        parsed = parsed if isinstance(parsed, sympy.core.relational.Relational) else parsed.doit()
        if isinstance(parsed, sympy.Expr):
            parsed = parsed.replace(_has_branch_without_value, lambda piecewise: piecewise.args[0].expr)
        if parsed.has(sympy.nan, sympy.zoo):
            raise Unreadable
        return parsed

    def _size(self, node) -> float:
        """log10 of the magnitude of a formula, roughly; raises where an exact power or factorial has no end."""
        sizes = [self._size(arg) for arg in node.args]
        if node.is_Rational:
            return math.log10(abs(node.p)) - math.log10(node.q) if node.p else -9.0
        if node.is_Mul:
            return sum(sizes)
        if node.is_Pow and len(sizes) == 2:
            size = (abs(sizes[0]) + 0.1) * 10 ** min(sizes[1], 9.0)
        elif isinstance(node, self.sympy.factorial):
            size = (abs(sizes[0]) + 0.1) * 10 ** min(sizes[0], 9.0)
        else:
            return max([0.5, *sizes])
        if size > self._MAX_LOG10:
            raise Unreadable
        return size

    def _same(self, p, g) -> bool:
        sympy = self.sympy
        relation = sympy.core.relational.Relational
        if isinstance(p, relation) and isinstance(g, relation):
            return self._same_relation(p, g)
        if isinstance(p, sympy.Set) and isinstance(g, sympy.Set):
            return p == g or self._same_set(p, g)
        if isinstance(p, sympy.MatrixBase) and isinstance(g, sympy.MatrixBase):
            return p.shape == g.shape and all(self._same(*cells) for cells in zip(p.flat(), g.flat(), strict=True))
        if not isinstance(p, sympy.Expr) or not isinstance(g, sympy.Expr):
            return False
        pairs = self._values(p, g)
        return pairs is not None and all(self._close(*pair) for pair in pairs)

    def _same_set(self, p, g) -> bool:
        half = self.sympy.Rational(1, 2)  # tells integers from intervals, which sympy's set algebra is slow at
        if {p.contains(half), g.contains(half)} == {self.sympy.true, self.sympy.false}:
            return False
        return p.symmetric_difference(g).is_empty is True

    def _same_relation(self, p, g) -> bool:
        flipped = p.reversed.rel_op == g.rel_op and p.rel_op != g.rel_op
        if p.rel_op != g.rel_op and not flipped:
            return False
        pairs = self._values(p.lhs - p.rhs, g.lhs - g.rhs)
        if pairs is None or any(right == 0 for _, right in pairs):
            return False
        ratios = [left / right for left, right in pairs]
        ordered = p.rel_op not in ("==", "!=")
        positive = all(self.sympy.re(ratio) > 0 for ratio in ratios)
        negative = all(self.sympy.re(ratio) < 0 for ratio in ratios)
        right_way = not ordered or (negative if flipped else positive)
        return right_way and all(self._close(ratio, ratios[0]) for ratio in ratios)

    def _values(self, p, g) -> list[tuple] | None:
        """Values of both at the same points; None when the variables differ or too few points are in both domains.

        A point where exactly one value is real tells of a branch (cube roots of negative numbers) and is left out.
        """
        if p.is_Rational and g.is_Rational:
            return [(p, g)]
        if p.free_symbols != g.free_symbols:
            return None
        symbols = sorted(p.free_symbols, key=str)
        pairs = []
        for values in scattered_points() if symbols else [[]]:
            point = {
                symbol: self.sympy.Rational(*value.as_integer_ratio())
                for symbol, value in zip(symbols, values, strict=False)
            }
            left, right = (expr.subs(point).evalf(self._DIGITS, maxn=1000) for expr in (p, g))
            numeric = left.is_number and right.is_number and left.is_finite and right.is_finite
            if numeric and self._is_real(left) == self._is_real(right):
                pairs.append((left, right))
        return pairs if len(pairs) >= (4 if symbols else 1) else None

    def _is_real(self, value) -> bool:
        real, imaginary = value.as_real_imag()
        return abs(imaginary) <= abs(real) * self.sympy.Float("1e-100")

    def _close(self, left, right) -> bool:
        if left.is_Rational and right.is_Rational:
            return left == right
        scale = 1 if left == 0 or right == 0 else abs(left) + abs(right)
        return bool(abs(left - right) <= scale * self.sympy.Float("1e-100"))


def _is_odd_root(node) -> bool:
    if not (node.is_Pow and node.base.is_Rational and node.exp.is_Rational):
        return False
    return node.base < 0 and node.exp.q > 1 and node.exp.q % 2 == 1


def _real_root(node):
    """The cube root of -8 is -2 here, as in school, not the principal complex root."""
    return (-1) ** node.exp.p * (-node.base) ** node.exp


def _has_branch_without_value(node) -> bool:
    """As the geometric series has outside of its radius: values are compared where both sides have one."""
    import sympy

    return isinstance(node, sympy.Piecewise) and node.args[-1].expr.has(sympy.Sum, sympy.Product, sympy.Integral)


_GENERATED = re.compile(
    r"Integer\((?P<top>\d+)\)(?:/Integer\((?P<bottom>\d+)\))?|Symbol\('(?P<name>\w+)'\)|(?P<constant>E|I|pi)"
)


def _numbers_and_names_only(code, *_namespaces):
    """In the place of sympy's evaluation of generated code: reads `Integer (3 )/Integer (2 )`, `Symbol ('x' )` and
    `pi`, of which sympy makes its own tables of series and integrals, and refuses all else."""
    import sympy

    found = _GENERATED.fullmatch(re.sub(r"\s", "", code)) if isinstance(code, str) else None
    if not found:
        raise Unreadable("text is never evaluated as code")
    if found["constant"]:
        return getattr(sympy, found["constant"])
    if found["name"]:
        return sympy.Symbol(found["name"])
    return sympy.Rational(int(found["top"]), int(found["bottom"] or 1))


_EVERY_KIND = (
    r"x^{2}+\frac{1}{2}", r"\sum_{k=1}^{3} k", r"\int_{0}^{1} x dx", r"\lim_{x \to 0} x", r"\{1,2\}\cup (3,4]", "x<2",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2)", r"\mathbb{Z}\setminus\emptyset",
)  # fmt: skip

_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|alpha|beta|theta)"
    r"(?![A-Za-z])"
)
_COMMANDS = (
    "frac|binom|sqrt|sum|prod|int|lim|infty|to|cdot|pi|cup|cap|setminus|emptyset|mathbb|begin|end|lfloor|rfloor|lceil"
    "|rceil|gcd|lcm|max|min|det|leq|geq|neq|in|partial|langle|rangle|exp|ln|log|a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?"
    "|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
    "|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|overline"
)
_KNOWN = re.compile(rf"(?:\\(?:{_COMMANDS})(?![A-Za-z])|\\\\|\\[{{}}]|\d+\.\d+|[A-Za-z\d+\-/^_=<>!()\[\]{{}}|,; &])*+")


_BOUNDED_BY_INFINITY = re.compile(r"\\(?:sum|prod|int|lim|cup|cap|setminus|mathbb|in)(?![A-Za-z])|<|\\[lg]eq")

_BEYOND = re.compile(  # what `common._formula` does not read and sympy does
    r"\\(?:sum|prod|int|lim|infty|cup|cap|setminus|emptyset|mathbb|gcd|lcm|max|min|det|begin|partial)(?![A-Za-z])"
    r"|(?<![A-Za-z\\])(?P<function>[fghF]_? ?[({])"
)

_VARIABLE = re.compile(r"\\(?:sum|prod) ?_ ?\{ ?([A-Za-z]) ?=")

_SUBSCRIPT = re.compile(  # no bound of an integral, and no word such as `x_{min}`
    r"(?<!\\int)(?<!\\lim)(?<!\\sum)(?<!\\prod) ?_ ?(?:([A-Za-z])(?![A-Za-z])|\{(?! ?[A-Za-z]{3,} ?\})([^{}=]*)\})"
)


def _has_sequence(text: str) -> bool:
    r"""Whether the variable of a sum is an index, as in `\sum_{k=1}^{\infty} a_k`: a_k is one name to the parser."""
    subscripts = ["".join(groups) for groups in _SUBSCRIPT.findall(text)]
    return any(name in subscript for name in _VARIABLE.findall(text) for subscript in subscripts)


_BEFORE_ARGUMENT = re.compile(r"(?:\\sqrt|\^)(?=\s*\()")
_OPENING_BRACKETS = ("(", "[", "{", "\\{", "\\langle")


def needs_algebra(text: str) -> bool:
    """Whether a computer algebra system can tell more of a normalised answer than `common._values`."""
    return bool(_BEYOND.search(text))


def unknown_functions(text: str) -> set[str]:
    """The heads of the functions of which nothing is known: f(x) and g(x) are never equal."""
    return {found["function"][0] for found in _BEYOND.finditer(text) if found["function"]}


def is_readable(text: str) -> bool:
    """Whether a normalised answer may be a formula, a relation, an interval or a set, so that it is worth a worker."""
    try:
        if not needs_algebra(text) and not text.startswith(_OPENING_BRACKETS):
            return all(map(parse, split(text, RELATION)[::2]))
        return bool(to_latex(text))
    except Unreadable:
        return False


def to_latex(text: str) -> str:
    """The LaTeX that the parser reads, out of a normalised answer: plain-text functions, exact decimals, braces.

    The grammar skips what it does not know, and would read "5 or 7" as 5. So what is unknown is refused first.
    """
    text = re.sub(r"(?<![\\A-Za-z])a(?=(?:sin|cos|tan)(?![A-Za-z]))", "arc", text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = re.sub(r"\\text\{([A-Za-z])\}", r"\1", text)
    text = re.sub(r"(\d+) ?\\text\{degrees\}", r"{\\frac{\1\\pi}{180}}", text)
    if not _KNOWN.fullmatch(text) or re.search(r"\d +\d|(?<![A-Za-z\\{])[A-Za-z]{4}", text):
        raise Unreadable("no formula")
    if _has_sequence(text):
        raise Unreadable("a sequence")
    if "\\infty" in text and text[:1] not in ("(", "[") and not _BOUNDED_BY_INFINITY.search(text):
        raise Unreadable("infinity is no number")
    if re.search(r"_ ?\{? ?i ?=", text) and "w" not in text:  # an index, not the imaginary unit
        text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", "w", text)
    text = re.sub(r"\^ ?(-?\d+)", r"^{\1}", text)
    if not re.search(r"[\[({]", text):
        text = re.sub(r"\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<![\\A-Za-z])E(?![A-Za-z\d])", r"\\Upsilon ", text)  # the parser takes E for Euler's number
    text = re.sub(r"\\gamma(?![A-Za-z])", r"\\overline{gamma}", text)  # and this for the function or Euler's constant
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)
    return _brace_arguments(text)


def _brace_arguments(text: str) -> str:
    r"""`\sqrt{2+x}` from `\sqrt (2+x)`, and exponents likewise; the last one first, so that places stay."""
    for head in reversed(list(_BEFORE_ARGUMENT.finditer(text))):
        rest = text[head.end() :].lstrip()
        if (end := closing_bracket(rest)) > 0 and rest[end] == ")":
            text = f"{text[: head.end()]}{{{rest[1:end]}}}{rest[end + 1 :]}"
    return text
