r"""Formulas of answers: a parser for LaTeX and plain text.

It knows what an answer may hold: numbers, names, + - * / ^ !, roots, absolute values, elementary functions, sums and
products over whole numbers. Anything else makes a text `Unreadable`; nothing is skipped, so "5 or 7" can never be read
as 5.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

_MAX_TOKENS = 400
_MAX_DEPTH = 60
_MAX_SERIES = 3  # sums in a sum


class Unreadable(ValueError):
    """The text is no formula of the kind that this module reads."""


class Node(NamedTuple):
    """A formula: an operator and its operands; the only operand of `number`, `name` and `constant` is their value.

    `sum` and `prod` have a variable (its letter), the lower and upper bound, and what is added or multiplied; `term`
    has the letter of a sequence and one index or two.
    """

    op: str
    args: tuple


CIRCULAR, HYPERBOLIC = ("sin", "cos", "tan", "cot", "sec", "csc"), ("sinh", "cosh", "tanh", "coth", "sech", "csch")
_INVERSE = {f"{prefix}{name}": f"a{name}" for name in CIRCULAR + HYPERBOLIC[:3] for prefix in ("arc", "ar", "a")}
_OTHER = ("ln", "log", "exp", "cis", "sqrt", "abs", "floor", "ceil")
_FUNCTIONS = {name: name for name in CIRCULAR + HYPERBOLIC + _OTHER} | _INVERSE
_FUNCTIONS |= {"cosec": "csc", "lg": "log", "ceiling": "ceil", "Re": "re", "Im": "im"}
_GREEK = re.findall(
    r"\w+",
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau"
    " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar",
)
_CONSTANTS = ("pi", "e", "i")
_BEFORE_NUMBER = (")", "}", "|", "]", "!", "i", "pi")
_TIMES_OR_OVER = ("*", "cdot", "/")
_SERIES = ("sum", "prod")
_UNKNOWN_FUNCTIONS = "fgh"  # f(x+1) is no product
_WORDS = sorted([*_FUNCTIONS, "pi", *(name for name in _GREEK[:-2] if len(name) > 2)], key=len, reverse=True)
_DERIVATIVE = (  # it is read as one name, not as a quotient of products
    r"\\frac ?\{ ?(?P<d>d|\\Delta)(?: ?\^ ?\{?\d\}?)? ?[A-Za-z]? ?\} ?\{ ?(?P=d) ?[A-Za-z](?: ?\^ ?\{?\d\}?)? ?\}"
)
_TOKEN = re.compile(
    r"(?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s*\{?\s*\d+\s*\}?)"
    r"|(?P<number>(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
    rf"|(?P<derivative>{_DERIVATIVE})"
    r"|\\operatorname\*?\s*\{(?P<operator>[A-Za-z]+)\}"
    r"|\\text\{\s*(?P<letter>[A-Za-z])\s*\}|(?P<degrees>\\text\{degrees\})"
    r"|\\(?P<command>[A-Za-z]+)"
    rf"|(?P<word>(?:{'|'.join(_WORDS)})(?![A-Za-z]{{2}}))"
    r"|(?P<name>[A-Za-z])"
    r"|(?P<symbol>[-+*/^_!(){}\[\]|'=])"
    r"|\s+"
)
_ABOVE = ("overline", "vec", "hat", "bar", "overrightarrow")  # a decorated name is one name


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    for found in _TOKEN.finditer(text):
        if found.start() > position:
            break
        if found.lastgroup:
            tokens.append((found.lastgroup, found[found.lastgroup]))
        position = found.end()
    if position < len(text):
        raise Unreadable(text[position])
    if len(tokens) > _MAX_TOKENS:
        raise Unreadable("too long")
    return [*tokens, ("end", "")]


class _Parser:
    """Recursive descent. An implicit product binds like an explicit one: 1/2x is (1/2)x."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.symbols = [text if kind in ("symbol", "command") else "" for kind, text in self.tokens]
        self.at = 0
        self.bars = 0  # open absolute values
        self.factor = 0  # index of a number that is a factor although a letter stands before it
        self.depth = 0
        self.variables: list[str] = []  # of the sums and products around

    @property
    def next(self) -> str:
        """The next symbol or command, "" where it is neither."""
        return self.symbols[self.at]

    def take(self, *wanted: str) -> bool:
        if self.symbols[self.at] not in wanted:
            return False
        self.at += 1
        return True

    def need(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable(f"{wanted} expected")

    def all(self) -> Node:
        node = self.sum()
        if self.tokens[self.at][0] != "end":
            raise Unreadable(self.tokens[self.at][1])
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        terms = [self.product()]
        while self.next in ("+", "-"):
            terms.append(self.product())  # a product takes its own sign
        node = terms[0] if len(terms) == 1 else Node("+", tuple(terms))
        if self.take("over"):
            node = Node("/", (node, self.sum()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.next in _TIMES_OR_OVER:
                op = "/" if self.next == "/" else "*"
                self.at += 1
                node = Node(op, (node, self.signed()))
            elif self.starts_factor():
                node = Node("*", (node, self.implicit()))
            else:
                return node

    def implicit(self) -> Node:
        """The next factor of a product without a sign; a number only follows what clearly ends (`_BEFORE_NUMBER`)."""
        is_number, before = self.tokens[self.at][0] in ("number", "repeating"), self.tokens[self.at - 1][1]
        if is_number and before not in _BEFORE_NUMBER and self.at != self.factor:
            raise Unreadable("two numbers side by side")
        return self.power()

    def signed(self) -> Node:
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.next == "-"
            self.at += 1
        node = self.power()
        return Node("neg", (node,)) if negative else node

    def starts_factor(self) -> bool:
        kind, text = self.tokens[self.at]
        if kind == "symbol":
            return text in ("(", "{", "[") or (text == "|" and not self.bars)
        if kind == "command":
            return text not in ("cdot", "over", "rfloor", "rceil")
        return kind not in ("end", "degrees")

    def power(self) -> Node:
        node = self.postfix()
        if not self.take("^"):
            return node
        exponent = self.exponent()
        if self.next in ("^", "'"):
            raise Unreadable("two exponents")
        return Node("^", (node, exponent))

    def exponent(self) -> Node:
        negative = self.take("-")
        self.take("+")
        kind, text = self.tokens[self.at]
        if kind == "name" and self.tokens[self.at + 1][0] == "number":  # in LaTeX 2^n 3^n is a product
            self.at += 1
            self.factor = self.at
            node = Node("constant" if text in _CONSTANTS else "name", (text,))
        else:
            node = self.primary()
        return Node("neg", (node,)) if negative else node

    def postfix(self) -> Node:
        node = self.primary()
        while True:
            if self.take("!"):
                node = Node("!", (node,))
            elif self.tokens[self.at][0] == "degrees":
                self.at += 1
                node = Node("*", (node, Node("/", (Node("constant", ("pi",)), whole(180)))))
            else:
                return node

    def primary(self) -> Node:
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            text = text.replace(",", "").rstrip(".")
            return self.mixed(Fraction(text) if "." in text else int(text))
        if kind == "repeating":
            return Node("number", (_repeating(text),))
        if kind in ("name", "letter"):
            return self.name(text)
        if kind == "derivative":
            return Node("name", (text.replace(" ", ""),))
        if kind in ("word", "operator", "command"):
            return self.word(text)
        if kind == "symbol" and text in ("(", "{", "["):
            return self.enclosed({"(": ")", "{": "}", "[": "]"}[text])
        if kind == "symbol" and text == "|":
            return self.absolute()
        raise Unreadable(text or "the end")

    def enclosed(self, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.need(closing)
        self.bars = bars
        return node

    def absolute(self) -> Node:
        self.bars += 1
        node = self.sum()
        self.need("|")
        self.bars -= 1
        return Node("abs", (node,))

    def mixed(self, value: int | Fraction) -> Node:
        r"""`3\frac{1}{2}` is three and a half, `2\frac{x}{3}` a product."""
        start = self.at
        if value.denominator == 1 and self.take("frac"):
            top, bottom = self.group(), self.group()
            if is_whole(top) and is_whole(bottom) and 0 < top.args[0] < bottom.args[0]:
                return Node("number", (value + Fraction(top.args[0], bottom.args[0]),))
            self.at = start
        return Node("number", (value,))

    def group(self) -> Node:
        """The argument of a command: braces, or one token."""
        if self.take("{"):
            return self.enclosed("}")
        if self.tokens[self.at][0] not in ("number", "name", "letter", "command", "word"):
            raise Unreadable("an argument is missing")
        return self.primary()

    def name(self, letter: str) -> Node:
        if letter in self.variables:
            return Node("name", (letter,))
        if self.variables and self.next == "_" and (indices := self.indices()):
            return Node("term", (letter, *indices))
        if letter in _CONSTANTS and self.next not in ("_", "'"):
            return Node("constant", (letter,))
        if self.next == "(" and letter in _UNKNOWN_FUNCTIONS:
            raise Unreadable("an unknown function")
        if self.next == "(" and self.tokens[self.at + 1][0] == "number" and self.tokens[self.at + 2][1] == ")":
            self.at += 3  # I(0) is a value of I, not 0 times I
            return Node("name", (f"{letter}({self.tokens[self.at - 2][1]})",))
        suffix = f"_{self.raw_group()}" if self.take("_") else ""
        if not suffix and self.tokens[self.at][0] == "number":  # x2 means x_2, but n2^{n-1} a product
            if self.is_power():
                self.factor = self.at
                return Node("name", (letter,))
            suffix = f"_{self.tokens[self.at][1]}"
            self.at += 1
        while self.take("'"):
            suffix += "'"
        return Node("name", (letter + suffix,))

    def is_power(self) -> bool:
        """Whether the next number is the base of a power with a letter in its exponent, as in n2^{n-1}. Not if the
        name before it also stands before 0 or 1: x1^n + x2^n has indices."""
        if self.tokens[self.at + 1][1] != "^":
            return False
        depth = 0
        for at in range(self.at + 2, len(self.tokens)):
            kind, text = self.tokens[at]
            if kind in ("name", "letter") or text in _GREEK:
                name = self.tokens[self.at - 1]
                return not any(left == name and right[1] in ("0", "1") for left, right in pairwise(self.tokens))
            depth += (text == "{") - (text == "}")
            if not depth and text not in ("+", "-"):
                break
        return False

    def indices(self) -> tuple[Node, ...]:
        """The indices of a subscript that has the variable of a sum in it; () for others, which are left unread."""
        start = self.at
        self.at += 1
        end = next((at for at in range(self.at, len(self.tokens)) if self.tokens[at][1] == "}"), start)
        inside = self.tokens[self.at + 1 : end] if self.next == "{" else []
        found = () if _is_word(inside) else _juxtaposed(inside)
        if found:
            self.at = end + 1
        elif not _is_word(inside):
            found = (self.bound(),)
        if not any(names(node).intersection(self.variables) for node in found):
            self.at = start
            return ()
        if not all(map(_is_index, found)):
            raise Unreadable("an index")
        return found

    def bound(self) -> Node:
        r"""One token or a group after `_` or `^`: the 2 of `\sum_{k=1}^n 2k` is no part of it."""
        kind, text = self.tokens[self.at]
        if kind in ("name", "letter"):
            self.at += 1
            return Node("name", (text,))
        if kind == "number" or self.next == "{":
            return self.primary()
        raise Unreadable("a bound is missing")

    def series(self, op: str) -> Node:
        r"""`\sum_{k=1}^{n} k^2 + 1` is the sum of k^2, plus one: a sum covers the product that follows it."""
        found: dict[str, tuple] = {}
        while (sign := self.next) in ("_", "^") and sign not in found:
            self.at += 1
            found[sign] = (self.variable(), self.enclosed("}")) if sign == "_" else (self.bound(),)
        if len(found) < 2 or len(self.variables) == _MAX_SERIES:
            raise Unreadable("no sum from one bound to another")
        (variable, lower), (upper,) = found["_"], found["^"]
        self.variables.append(variable)
        body = self.product()
        self.variables.pop()
        return Node(op, (variable, lower, upper, body))

    def variable(self) -> str:
        self.need("{")
        kind, text = self.tokens[self.at]
        self.at += 1
        self.need("=")
        if kind not in ("name", "letter"):
            raise Unreadable(text)
        return text

    def raw_group(self) -> str:
        """The text of a subscript."""
        if not self.take("{"):
            kind, text = self.tokens[self.at]
            if kind not in ("number", "name", "letter"):
                raise Unreadable("a subscript is missing")
            self.at += 1
            return text
        start = self.at
        while self.next not in ("}", "{", "^", "=") and self.tokens[self.at][0] != "end":
            self.at += 1
        self.need("}")
        return "".join(text for _, text in self.tokens[start : self.at - 1])

    def word(self, text: str) -> Node:
        if text in _FUNCTIONS:
            return self.function(_FUNCTIONS[text])
        if text == "pi":
            return Node("constant", ("pi",))
        if text in _GREEK:
            return self.name(f"\\{text.removeprefix('var')}")
        if text in ("frac", "binom"):
            top, bottom = self.group(), self.group()
            return Node("/" if text == "frac" else "binom", (top, bottom))
        if text in _SERIES:
            return self.series(text)
        if text in ("lfloor", "lceil"):
            return Node(text[1:], (self.enclosed("r" + text[1:]),))
        if text in _ABOVE:
            return self.name(f"\\{text} {self.decorated()}")
        raise Unreadable(text)

    def decorated(self) -> str:
        self.need("{")
        start = self.at
        while self.tokens[self.at][0] == "name":
            self.at += 1
        if start == self.at:
            raise Unreadable("no name")
        self.need("}")
        return "".join(text for _, text in self.tokens[start : self.at - 1])

    def function(self, name: str) -> Node:
        if name == "sqrt":
            return self.root()
        base, power = None, None
        while self.next in ("_", "^"):
            if self.take("_"):
                base = self.group()
            elif self.take("^"):
                power = self.exponent()
        if base and name != "log":
            raise Unreadable("subscript of a function")
        if power == Node("neg", (whole(1),)) and f"a{name}" in _FUNCTIONS.values():
            name, power = f"a{name}", None
        node = Node(name, (self.argument(),))
        if name == "cis":
            sine = Node("*", (Node("constant", ("i",)), Node("sin", node.args)))
            node = Node("+", (Node("cos", node.args), sine))
        if name == "log":
            node = Node("/", (Node("ln", node.args), Node("ln", (base or whole(10),))))
        return node if power is None else Node("^", (node, power))

    def root(self) -> Node:
        degree = self.enclosed("]") if self.take("[") else whole(2)
        return Node("root", (self.primary() if self.next == "(" else self.group(), degree))

    def argument(self) -> Node:
        r"""`(x)` ends an argument; without parentheses it is the implicit product: `\sin 2x \cos x`."""
        if self.next in ("(", "{", "[", "|", "lfloor"):
            return self.primary()
        if self.next in ("+", "-"):
            return self.signed()
        node = self.power()
        while self.starts_factor() and not self.starts_function() and self.next not in ("(", "["):
            node = Node("*", (node, self.implicit()))
        constant = not names(node)
        while constant and self.next == "/" and self.tokens[self.at + 1][0] == "number":
            self.at += 1
            node = Node("/", (node, self.power()))
        return node

    def starts_function(self) -> bool:
        kind, text = self.tokens[self.at]
        return kind in ("word", "operator", "command") and text in _FUNCTIONS and text != "sqrt"


def is_whole(node: Node) -> bool:
    return node.op == "number" and node.args[0].denominator == 1


def whole(value: int) -> Node:
    return Node("number", (value,))


def _repeating(text: str) -> Fraction:
    r"""`0.1\overline{6}` is 1/6."""
    whole, fixed, period = re.match(r"(\d*)\.(\d*)\D+(\d+)", text).groups()
    tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
    return Fraction(f"{whole or 0}.{fixed or 0}") + tail


def _is_word(tokens: list[tuple[str, str]]) -> bool:
    """Whether a subscript is a word: `x_{min}` has no index."""
    return len(tokens) > 2 and all(kind == "name" for kind, _ in tokens)


def _juxtaposed(tokens: list[tuple[str, str]]) -> tuple[Node, ...]:
    """Two indices, such as those of `x_{ij}` and `x_{i1}`; () for a single one that is a formula, such as 2k."""
    if len(tokens) != 2 or any(kind not in ("name", "number") for kind, _ in tokens):
        return ()
    if tokens[0][0] == "number" and tokens[0][1] not in ("0", "1"):
        return ()
    return tuple(Node("name", (text,)) if kind == "name" else whole(int(Fraction(text))) for kind, text in tokens)


def _is_index(node: Node) -> bool:
    """Whether a formula may be an index, such as n-2k+1."""
    if node.op == "*":
        return node.args[0].op == "number" and node.args[1].op == "name"
    return node.op in ("number", "name") or (node.op in ("+", "neg") and all(map(_is_index, node.args)))


def _operands(node: Node) -> list[Node]:
    return [arg for arg in node.args if isinstance(arg, Node)]


def names(node: Node) -> frozenset[str]:
    if node.op in ("name", "number", "constant"):
        return frozenset(node.args if node.op == "name" else ())
    if node.op in _SERIES:
        variable, lower, upper, body = node.args
        return names(lower) | names(upper) | (names(body) - {variable})
    return frozenset().union(*map(names, _operands(node)))


def whole_names(node: Node) -> frozenset[str]:
    """The names in bounds and indices, which must be whole numbers."""
    if node.op == "term":
        return names(node)
    if node.op in _SERIES:
        variable, lower, upper, body = node.args
        return names(lower) | names(upper) | (whole_names(body) - {variable})
    return frozenset().union(*map(whole_names, _operands(node)))


def sequences(node: Node) -> frozenset[str]:
    """The letters that have a variable index somewhere."""
    return frozenset(node.args[:1] if node.op == "term" else ()).union(*map(sequences, _operands(node)))


def indexed(node: Node, letters: frozenset[str]) -> Node:
    """The formula with names such as `a_n` and `a_1` made terms of the sequence a, if a is one of `letters`."""
    if node.op == "name":
        letter, _, subscript = node.args[0].partition("_")
        if letter not in letters:
            return node
        tokens = _tokens(subscript)[:-1]
        if _is_word(tokens):
            return node
        indices = _juxtaposed(tokens) or (parse(subscript),)  # without a subscript: unreadable
        if not all(map(_is_index, indices)):
            raise Unreadable("an index")
        return Node("term", (letter, *indices))
    return Node(node.op, tuple(indexed(arg, letters) if isinstance(arg, Node) else arg for arg in node.args))


def operators(node: Node) -> frozenset[str]:
    return frozenset([node.args[0] if node.op == "constant" else node.op]).union(*map(operators, _operands(node)))


@lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    """The formula that a normalised text holds. Raises `Unreadable`."""
    try:
        return _Parser(text).all()
    except RecursionError as error:
        raise Unreadable("too deep") from error
