r"""One spelling for one meaning: Unicode and LaTeX synonyms folded; and a limit on the size of what is worked on.

The normal form keeps LaTeX: `\frac{a}{b}`, `\sqrt{a}`, `\text{cm}`, `\cdot`, `\leq`, `^`, a comma for "and", a
semicolon for "or".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from common._extract import boxes_of
from common._units import is_unit

MAX_CHARS = 4000  # an answer, not a response; the longest gold answer of the usual benchmarks has about 300
OPENING = "([{"
BRACKET = re.compile(r"[][(){}]")
_MAX_DEPTH = 40
_MAX_DIGITS = 1000
_MAX_BOXES = 10

# ---------------------------------------------------------------------------------------------------------------------
# Unicode
# ---------------------------------------------------------------------------------------------------------------------

_COMMANDS = (  # a symbol and the LaTeX command for it
    "×cdot ·cdot ⋅cdot ∙cdot ✕cdot •cdot ∛sqrt[3] ∠angle △triangle ⊙odot ≡equiv ∞infty ∪cup ∩cap ∈in ∖setminus"
    " ∅emptyset ≤leq ≥geq ≠neq ≈approx ±pm ∓mp …ldots ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil ⟨langle ⟩rangle ∑sum ∏prod"
)
_SYMBOLS = str.maketrans(
    {word[0]: f"\\{word[1:]} " for word in _COMMANDS.split()}
    | {symbol: f"\\mathbb{{{letter}}}" for symbol, letter in zip("ℝℤℚℕℂ", "RZQNC", strict=True)}
    | dict.fromkeys("−–—‒‐‑﹣－", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", "")
    | dict.fromkeys("’‘′ʹ", "'")
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("÷⁄∕", "/")
    | dict.fromkeys("°º˚", "^\\circ ")
    | {"℃": "^\\circ C", "℉": "^\\circ F", "。": ".", "、": ",", "∣": "|"}
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_ABOVE_LINE, _BELOW_LINE = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), re.compile("[₀-₉ₙ]+")
_ROOT_SIGN = re.compile(r"√\s*(\d+(?:\.\d+)?|\w|\([^()]*\))")
BROKEN = "\ufffd"  # control characters, direction overrides and lone surrogates become this, which equals nothing


def _fold_unicode(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = _ABOVE_LINE.sub(lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = _BELOW_LINE.sub(lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text).replace("√", "\\sqrt")
    return "".join(map(_fold_char, text.translate(_SYMBOLS)))


@lru_cache(maxsize=4096)
def _fold_char(char: str) -> str:
    if char.isascii():
        return char if char.isprintable() else " " if char in "\t\n\r\v\f" else BROKEN
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return BROKEN
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    plain = unicodedata.normalize("NFKC", char)
    if unicodedata.category(char) == "No" and "\u2044" in plain:
        return "\\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    name = unicodedata.name(plain[0], "") if len(plain) == 1 else ""
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name):
        letter = greek[2].lower().replace("lamda", "lambda")
        return f"\\{letter if greek[1] == 'SMALL' else letter.capitalize()} "
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX and plain text
# ---------------------------------------------------------------------------------------------------------------------

_A = r"(?![A-Za-z])"  # end of a LaTeX command
_O = r"(?<!\\)"  # not the second half of a row break
_FUNCTIONS = (
    r"(?:arc|ar|a)?(?:sin|cos|tan|cot|sec|csc)h?|cosec|ln|log|lg|exp|abs|floor|ceil|gcd|lcm|max|min|det|tr|rank|sgn"
    r"|Re|Im|mod|lim"
)
_AND, _OR = "and|et|und", "or|ou|oder"  # a comma and a semicolon in the normal form

_FONT = r"\\(?:mathbf|boldsymbol|bm|mathit|mathrm|mathsf|text\w*|mbox|hbox|operatorname\*?)"
_ROMAN_FONT = r"\\(?:mathrm|mathsf|text\w*|mbox|hbox|operatorname\*?)"
_IN_FONT = "math|text|box|bold|\\bm|operator"
_NESTED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+"

_NO_MEANING = (
    "rm|bf|bfseries|it|sf|tt|sl|sc|large|Large|LARGE|huge|Huge|small|normalsize|(?:no)?limits|nonumber|notag|strut"
    "|mathstrut|therefore|because|mathop|mathord|ensuremath|underline|underset ?\\{[^{}]*\\}"
    "|(?:display|text|script|scriptscript)style"
)
_SYNONYMS = {
    "\\{": "brace lbrace", "\\}": "rbrace", "[": "lbrack", "]": "rbrack", "|": "vert lvert rvert mid", ":": "colon",
    "\\leq ": "le leqq leqslant", "\\geq ": "ge geqq geqslant", "<": "lt", ">": "gt", "\\neq ": "ne", "/": "div",
    "\\approx ": "simeq", "\\cdot ": "times ast bullet", "\\ldots ": "dots cdots ddots", "\\cup ": "bigcup",
    "\\setminus ": "backslash smallsetminus", "\\emptyset ": "varnothing",
}  # fmt: skip
_SYNONYM = {name: to for to, names in _SYNONYMS.items() for name in names.split()}

_QUANTITY = r"^(\$?-?\d[\d.,]*(?: ?\\(?:cdot|times) ?10 ?\^ ?\{? ?-?\d+ ?\}?)?)"  # a numeral
_FOR_EVERY = (  # "for all real numbers x \in \mathbb{R}": nothing else is meant without it
    r"(?<=[^ ,])[ ,]*(?:\\forall|(?:\\text\{ ?)?for (?:all|every|any|each)"
    r"(?: (?:real|rational|complex|natural|whole|positive|integers?|reals|numbers?))*) ?\}? ?"
    r"\(?[a-z]\)?(?: ?\\in ?\\mathbb\{[A-Z]\}(?: ?[_^] ?(?:\{[^{}]*\}|[+*\d]))?)?$"
)
_ALL_BUT = r"(?i:all|the) (?i:real numbers|reals),? except(?: for)?"


class _Rule(NamedTuple):
    needs: tuple[str, ...]  # no text without one of these can match, and to look for them is ten times faster
    pattern: re.Pattern[str]
    to: str | Callable[[re.Match[str]], str]


class _Rules:
    """Substitutions, one after the other; of a text only those are tried that it may match."""

    def __init__(self, *rules: tuple[str, str, str | Callable[[re.Match[str]], str]]) -> None:
        self.rules = [_Rule(tuple(needs.split("|")), re.compile(pattern), to) for needs, pattern, to in rules]
        self.of_word: dict[str, list[int]] = {}
        for place, rule in enumerate(self.rules):
            for word in rule.needs:
                self.of_word.setdefault(word, []).append(place)
        self.of_char: dict[str, list[str]] = {}  # the words by the character of theirs that is in fewest words
        for word in self.of_word:
            rarest = min(word, key=lambda char: sum(char in other for other in self.of_word))
            self.of_char.setdefault(rarest, []).append(word)

    def that_may_match(self, text: str) -> list[int]:
        words = [word for char, words in self.of_char.items() if char in text for word in words if word in text]
        return sorted({place for word in words for place in self.of_word[word]})

    def apply(self, text: str) -> str:
        places, done = self.that_may_match(text), 0
        while done < len(places):
            place = places[done]
            _, pattern, to = self.rules[place]
            done += 1
            if pattern.search(text):  # few match, and `sub` looks at its template first
                text = pattern.sub(to, text)
                places, done = [later for later in self.that_may_match(text) if later > place], 0
        return text


_LATEX_RULES = _Rules(  # only where there is a backslash; behind a rule stands a text that it changes
    ("{$|{ $", r"\\(?:text\w*|mbox|hbox|emph) ?\{ ?\$([^$]*)\$ ?\}", r"\1"),  # \textbf{$x+1$}
    (r"\!", r"(\d), ?\\! ?(?=\d{3})", r"\1"),  # 1,\!000
    ("{}", r"(?<=[\d)\]]) ?\{\} ?(?=\^)", ""),  # 45{}^\circ
    ("%|#|&|_", _O + r"\\([%#&_])", r"\1"),  # 50\%
    ("$|dollar", r"(?:US ?)?" + _O + r"\\\$|\\(?:text)?dollar" + _A, "¤"),  # \$5
    ("pounds|sterling", r"\\(?:pounds|textsterling)" + _A, "£"),  # \pounds 5
    ("euro", r"\\(?:euro|texteuro)" + _A, "€"),  # \euro 5
    (r"\cr|\\", r"\\cr" + _A + r"|\\\\ ?\[[^][{}]*\]", r"\\\\"),  # 1&2\cr3&4
    (
        "quad",
        r"(=(?:[^=,;&\\]|\\(?!text))*[^=,;&\s(]) ?(?:\\q?quad ?)+(?=[A-Za-z](?:_\{?\w\}?)? ?=)",
        r"\1, ",
    ),  # x=1 \quad y=2, but no "1 & \text{if} \quad x=0"
    ("\\", _O + r"\\[,;:> ]|\\(?:q?quad|thinspace|enspace)" + _A + r"|\\[hv]space\*?\{[^{}]*\}", " "),  # 3\,cm
    (r"\(|\)|\[|\]|\!", _O + r"(?:\\[()\[\]!])", ""),  # \(5\)
    ("color", r"(?<![\^_])\\(?:text)?color ?\{[^{}]*\} ?\{(" + _NESTED + r")\}", r"\1"),  # \textcolor{red}{1,234}
    (
        "phantom|tag|label|color",
        r"\\[hv]?phantom ?\{[^{}]*\}|\\(?:tag\*?|label) ?\{[^{}]*\}|\\(?:text)?color(?:box)? ?\{[^{}]*\}",
        "",
    ),  # \tag{1}
    ("left|right|middle|ig", r"\\(?:left|right|middle|[bB]igg?[lrm]?)" + _A + r"\.?", ""),  # \left(
    (r"\rm", r"\\rm ?\{([^{}]*)\}|(?:(?<=\d)|(?<=[\d}] ))\{ ?\\rm" + _A + r" ?([^{}\\]*)\}", r"\\text{\1\2}"),
    ("\\", rf"\\(?:{_NO_MEANING})" + _A, ""),  # \displaystyle x
    ("frac", r"\\(?:[dtcs]|nice)frac" + _A, r"\\frac"),  # \dfrac
    (r"\frac", r"\\frac ?([0-9A-Za-z]) ?([0-9A-Za-z])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\frac", r"\\frac ?([0-9A-Za-z]) ?(?=\{)", r"\\frac{\1}"),  # \frac1{2}
    (r"\frac", r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])", r"\1{\2}"),  # \frac{1}2
    (r"\frac ", r"\\frac (?=\{)", r"\\frac"),  # \frac {1}{2}
    (r"\over", r"\{ ?([^{}\\]+?) ?\\over" + _A + r" ?([^{}\\]+?) ?\}", r"\\frac{\1}{\2}"),  # {1 \over 2}
    ("binom", r"\\[dt]binom" + _A, r"\\binom"),  # \dbinom
    (r"\binom", r"\\binom ?([0-9A-Za-z]) ?([0-9A-Za-z])", r"\\binom{\1}{\2}"),  # \binom73
    (r"\choose", r"\{([^{}]*)\\choose" + _A + r"([^{}]*)\}", r"\\binom{\1}{\2}"),  # {7 \choose 3}
    (r"\surd", r"\\surd" + _A, r"\\sqrt"),  # \surd2
    (r"\sqrt", r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),  # \sqrt2
    (_IN_FONT, _FONT + r" ?\{ ?\$?( ?-?[\\\d](?=[^{}]*+\{)" + _NESTED + r")\}", r"\1"),  # \mathbf{\frac{1}{2}}
    ("cis", _FONT + r" ?\{ ?cis ?\}", r"\\cis "),  # \text{cis}
    *[(_IN_FONT, _ROMAN_FONT + r" ?\{((?:[^{}^]|\^(?! ?\{))*+)\^ ?\{ ?(-?\d) ?\}(?=[^{}]*\})", r"\\text{\1^\2")]
    * 3,  # \mathrm{m\,s^{-1}}
    (
        r"math|bold|\bm|\vec",
        r"\\(?:mathbf|boldsymbol|bm|mathit|mathbit|vec|mathcal|mathscr) ?\{(" + _NESTED + r")\}",
        r"\1",
    ),  # \vec{v}
    ("mathbb|Bbb", r"\\(?:mathbb|Bbb) ?\{? ?([A-Z]) ?\}?", r"\\mathbb{\1}"),  # \Bbb R
    ("operator", rf"\\operatorname\*? ?\{{ ?({_FUNCTIONS}) ?\}}", r"\\\1 "),  # \operatorname{ln}
    (
        "text|box|math|emph|operator",
        r"\\(?:text\w*|mbox|hbox|mathrm|mathsf|mathtt|emph|operatorname\*?) ?\{ ?([^{}]*)\}",
        r"\\text{\1}",
    ),  # \mbox{cm}
    (r"\text", r"(\\text\{[^{}]*) \}", r"\1}"),  # \text{cm }
    (r"\text", r"\\text\{((?:[^A-Za-z{}]|\b(?:and|or)\b)*+)\}", r" \1 "),  # \text{ or }
    (r"\text", r"^\\text\{([^{}]*,[^{}]*)\}$|^\\text\{(?i:(?:the )?(?:final )?answer is) ([^{}]*)\}$", r"\1\2"),
    (r"\text", r"(\\text\{[^{}]*?) ?\\cdot ?(?=[^{}]*\})", r"\1 "),  # \text{m\cdot s}
    (r"\text", r"((?<=[\d}]) *\\text\{[A-Za-z ]+)\} ?\\cdot ?\\text\{ ?", r"\1 "),  # 5\text{ kJ}\cdot\text{mol}^{-1}
    (r"\text", r"^\\text\{ ?([A-Z]{2,}) ?\} ?= ?\\text\{ ?([A-Z]{2,}) ?\}$", r"\1=\2"),  # names of quantities: MR=MC
    (r"\odot", _QUANTITY + r" *(?:\\text\{ ?)?([MLR]) ?\}? ?_ ?(?:\\odot|\{ ?\\odot ?\})$", r"\1\\text{ solar\2}"),
    (
        "Omega",
        r"((?:^|[=,;(}$]|\\approx|\band|\bor) *-?(?:"
        r"\d(?:[\d.,]|\{,\})*+(?: ?/ ?\d+| ?(?:\\(?:cdot|times) ?10 ?)?\^ ?(?:\{ ?-?\d+ ?\}|\d+))?"
        r"|\\frac ?\{ ?\d+ ?\} ?\{ ?\d+ ?\})) *(?:\\text\{ ?)?([kM]?) ?\}? ?(?:\\text\{ ?)?\\Omega ?\}?"
        r"(?= *(?:$|[.,;)=$]|\\approx|\\text\{ ?(?:and|or) ?\}|and|or))",
        r"\1\\text{ \2ohm}",
    ),  # 5\,k\Omega, as an answer, an item or a value of a name; in 2\Omega+1 it may be a variable
    (r"\text", r"\\text\{ ?(?i:([+-]|positive |negative )? ?infinity) ?\}", r"\1 infinity "),  # \text{infinity}
    (r"\text", r"\\text\{(?i:(?:the )?(?:(?:final|correct) )?answer(?: is)?) ?:?\}", ""),  # \text{Answer:}
    (r"\frac{\text", r"(\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*)\} ?\^ ?\{? ?(\d) ?\}?\}", r"\1^\2}}"),
    (r"\frac{\text", r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
    (r"\mu", r"\\text\{ ?\\mu ?(?=[A-Za-z])|(?<=[\d}]) ?\\mu ?\\text\{(?=[A-Za-z])", r"\\text{u"),  # 5\,\mu\text{m}
    (r"\mu", r"^(\$?-?\d[\d.,]*) ?\\mu ?([ms])(\$?)$", r"\1\\text{ u\2}\3"),  # 5 μm as a whole, else a product
    (r"\text", r"(\\[A-Za-z]+)\\text\{(?=[A-Za-z])", r"\1 \\text{"),  # \ln\mathrm{e}
    (
        r"\text",
        r"(?<![\d})])(?<![\d})][ ~])(?<!\\pi)(?<!\\pi[ ~])( ?)\\text\{([^A-Za-z{}]*+[A-Za-z]?[^A-Za-z{}]*+)\}",
        r"\1\2",
    ),  # \text{A}
    (  # after a number, `\text{m}` is a unit
        r"\text",
        r"\\text\{([^A-Za-z{}]*+[^mshgLKJNWVCF{}]?[^A-Za-z{}]*+)\}",
        r"\1",
    ),
    (r"\text", r"_ ?(?:\{ ?\\text\{([A-Za-z]+)\} ?\}|\\text\{([A-Za-z]+)\})", r"_{\1\2}"),  # v_{\text{max}}
    ("\\" + "|\\".join(_SYNONYM), rf"\\({'|'.join(_SYNONYM)})" + _A, lambda m: _SYNONYM[m[1]]),
    (r"\not", r"\\not ?=", r"\\neq "),  # \not=
    (r"\sim", r"^\\sim" + _A, r"\\approx "),  # \sim 5
    ("mathbb", r"(\\mathbb\{R\}) ?- ?(?=\\\{)", r"\1\\setminus "),  # \mathbb{R}-\{2\}
    (r"\{", r"\\\{ ?\\\}", r"\\emptyset "),  # \{\}
    (r"\infty", r"\+ ?\\infty", r"\\infty"),  # +\infty
    (r"\dot", r"\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"\\overline{\1\2\3}"),  # 0.\dot{2}\dot{7}
    (r"\dot|\bar", r"(?<=[.\d])\\(?:dot|bar) ?\{?(\d+)\}?", r"\\overline{\1}"),  # 0.\dot3
    ("prime", r"\^ ?(?:\{ ?\\prime ?\}|\\prime" + _A + ")", "'"),  # f^\prime
    (r"/\text|/ \text", r"(?<=\d) ?/ ?\\text\{ ?(?=[a-z]{2})", r"\\text{per "),  # 18/\text{day}
    (  # no brace but its own: \sin{30^\circ}; that of 20^{\circ C} is of the next rule
        "circ|degree",
        r"\^ ?(?:\{ ?\\circ(?: ?\}|(?= ?(?:\\text\{ ?)?[CFK]))|\\circ" + _A + r")|\\(?:text)?degree" + _A,
        r"\\text{degrees}",
    ),
    ("degrees", r"\\text\{degrees\} ?(?:\\text\{ ?)?([CFK])(?:elsius|ahrenheit)?\}?" + _A, r"\\text{deg\1}"),
    (r"\text|land|wedge", rf"\\text\{{ ?,? ?(?:{_AND}) ?,? ?\}}|\\(?:land|wedge)" + _A, ","),  # \text{ and }
    (r"\text|lor|vee", rf"\\text\{{ ?,? ?(?:{_OR}) ?,? ?\}}|\\(?:lor|vee)" + _A, ";"),  # \text{ or }
    (r"\text", rf"(\\text\{{[^{{}}]*?),? (?:{_AND}|{_OR}) (?=[^{{}}\d]*\}})", r"\1},\\text{"),  # \text{A or B}
)
_PLAIN_RULES = _Rules(
    (",", r"(\d) ?\{ ?, ?\} ?(?=\d{3})", r"\1"),  # 1{,}000
    ("~", r"~", " "),
    (
        "mod",
        r"\((?:\\text\{)?\\?b?mod ?\}? ?(\w+)\)|\\[pb]?mod" + _A + r" ?(?:\{ ?(\w+) ?\}|(\w+))",
        r"\\pmod{\1\2\3}",
    ),  # 3 \pmod 7
    ("{", r"\{([.:=+-])\}", r"\1"),  # 3{:}2
    ("AA|Å", r"\\text\{ ?(?:\\AA|Å) ?\}|\\AA" + _A + "|Å", r"\\text{ angstrom}"),  # 6630 Å
    ("oint", r"^(?:\\text\{ ?)?(?i:(?:the )?points?) ?\}? ?(?=[A-Z]? ?\()", ""),  # the point (3, 4)
    ("for |forall", _FOR_EVERY, ""),
    (" ", r"^(?i:(?:\\text\{)?(?:all|the) (?:real numbers|reals))[}. ]*$", r"\\mathbb{R}"),  # all reals
    ("y|Y", r"^(?i:negative +infinity) ?$", r"-\\infty "),
    ("y|Y", r"^(?i:(?:positive +)? ?infinity) ?$", r"\\infty "),
    (" ", r"^(?i:(?:\\text\{)?(?:the )?(?:empty|null) set)[}. ]*$", r"\\emptyset "),  # the empty set
    ("$", r"^(-?) ?\$ ?(?=\.?\d[^$]*$)", r"\1¤"),  # and not the two around a formula
    ("$", r"\$", ""),
    (
        "except",
        rf"^(?:\\text\{{ ?{_ALL_BUT} ?\}} ?|{_ALL_BUT} )(?=.*\d)(?![(\[])(?:\\\{{ ?)?(.+?)(?: ?\\\}})?[. ]*$"
        rf"|^\\text\{{ ?{_ALL_BUT} (?=.*\d)(?![(\[])([^{{}}]+)\}}[. ]*$",
        r"\\mathbb{R}\\setminus \\{\1\2\\}",
    ),  # all reals except 2
    ("<", r"<=|=<", r"\\leq "),
    (">", r">=", r"\\geq "),
    ("!=", r"(?<![\d)])!=", r"\\neq "),
    ("==|:=", r"==|:=", "="),
    ("**", r"\*\*", "^"),
    ("*", r"\*", r"\\cdot "),
    ("...", r"\.{3,}", r"\\ldots "),
    ("(", r"(\d\.\d*)\((\d+)\)", r"\1\\overline{\2}"),  # 0.(27)
    ("inf|oo", r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)" + _A, r"\\infty "),  # oo
    ("^", r"(?<=\d) ?\^ ?(?:\{ ?o ?\}|o" + _A + ")", r"\\text{degrees}"),  # 45^o
    ("st|nd|rd|th", r"(?<=\d) ?\^? ?\{? ?(?:\\text\{)?(st|nd|rd|th)\b\}?\}?", r"\\text{\1}"),  # 42nd
    ("U", r"(?<=[)\]}]) ?U ?(?=[(\[\\])", r"\\cup "),  # (0,1)U(2,3)
    ("and|和", " ?(?<![A-Za-z\\\\{])and" + _A + "|和", ","),
    ("or|或", " ?(?<![A-Za-z\\\\{])or" + _A + "|或", ";"),
    ("to", r"^(\d+) ?(?:to|\\text\{to\}) ?(\d+)$", r"\1:\2"),  # 3 to 2
    (
        "C_",
        r"(?<![A-Za-z\\])C_ ?\{(\d\d+)\} ?\^ ?(?:\{ ?(\d+) ?\}|(\d))",
        r"\\binom{\1}{\2\3}",
    ),  # C_1^2 may be a square
    ("C", r"(?:\{\})?[_^] ?\{?(\w+)\}? ?C ?_ ?\{?(\w+)\}?", r"\\binom{\1}{\2}"),  # ^7C_3
    (" ", r"(?i)\bper cents?\b", "percent"),
    (" ", r"(?i)^(?:approximately|approx\.?|about|roughly|around|nearly) (?=[-¤€£\d\\.$])", ""),  # about 5.2
    ("=|implies|arrow|to", r"^ ?= ?|^ ?\\(?:implies|Rightarrow|Longrightarrow|to)" + _A, ""),  # = 5
    (",|;", r", ?(?=[,;])|[,;] ?$", ""),  # 5,
    ("  ", r" +", " "),
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?i)(?<=\d) ?(\\text\{{ ?)?({'|'.join(_SCALES)})s?(?![A-Za-z]) ?")
_LEAD = re.compile(r"(?i)^ ?(?:the )?(?:final )?answers?\b ?(?:is\b|are\b)?[ :]*(?=\S)")
_ROWS = re.compile(r"\$*\\begin\{(aligned|gathered|cases)\}((?:(?!\\begin|\\text|& ?[^ =<>]).)*)\\end\{\1\}\$*")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBER_WORD = re.compile(rf"(?i)(?:\\text\{{ ?)?({'|'.join(_WORDS)}) ?\}}?")
_QUOTED = re.compile(r"([\"'`])(.*)\1")
_NUMERAL = re.compile(r"-?(?:\d+(?:[./]\d+)?|\\frac\{\d+\}\{\d+\})", re.ASCII)
_BOLD = re.compile(  # **C**: 12, but no power
    r"(?<![^\s(\[:])\*\*(?=[^\s*{])(?!(?<=[\d)\]}]\s\*\*)[\d(√.])|(?<=[^\s*])\*\*(?!\.?[\w({\\+√$-])"
)
_STARS_STOP = re.compile(r"\*\.$")
_TAIL = re.compile(r"(?:[\s.,;:]|\\)+$|[\s.]+(?=\}+$)")
# A number with its unit, all of it in roman type; a letter that touches the number may be a variable
_ROMAN = re.compile(r"\\text\{ ?(-?\d[\d.,/]*)(?: | ?(?=[A-Za-z]{2}))([A-Za-z][^{}]*)\}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_BRACED_CHAR = re.compile(r"([_^])\{(\w)\}(?!\w)")


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One spelling for one meaning: synonyms folded, delimiters dropped, "and" as a comma, "or" as a semicolon."""
    if _NUMERAL.fullmatch(text):  # no rule has anything to do; every second answer is such a number
        return text
    text = " ".join(_fold_unicode(_BOLD.sub("", text) if "*" in text else text).split())
    text = _STARS_STOP.sub("", text).strip("*").strip() if "*" in text else text
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[2]
    for _ in range(_MAX_BOXES):  # one inside the other
        boxes = boxes_of(text) if "\\" in text else []
        if len(boxes) != 1:
            break
        start, end, content = boxes[0]
        text = content if (start, end) == (0, len(text)) else f"{text[:start]}{{{content}}}{text[end:]}"
    if "\\" in text:
        if rows := _ROWS.fullmatch(text):  # one answer on each line
            text = rows[2].replace("&", "").replace("\\\\", ",")
        text = _LATEX_RULES.apply(text)
        if (roman := _ROMAN.fullmatch(text)) and is_unit(roman[2]):
            text = rf"{roman[1]}\text{{ {roman[2]}}}"
    text = _PLAIN_RULES.apply(text)
    if word := _NUMBER_WORD.fullmatch(text):
        return str(_WORDS.index(word[1].lower()))
    text = _SCALE.sub(lambda m: rf" \cdot 10^{{{_SCALES[m[2].lower()]}}}{m[1] or ''}", text).replace("\\text{}", "")
    return (text if text[-1:].isalnum() else _TAIL.sub("", text)).strip()


def key(text: str) -> str:
    """For the test "same text": spaces dropped, except between digits (1 1/4 is not 11/4)."""
    text = _SPACE.sub("", text) if " " in text else text
    return _BRACED_CHAR.sub(r"\1\2", text) if "^{" in text or "_{" in text else text


_EXPLOSIVE = re.compile(
    r"(?:\^-?\w+){3}|\^\(?-?\d{6}"  # bare power towers; huge exponents
    r"|\d{5}[)}]*!|![)}\]]*!"  # huge and repeated factorials
    r"|\\binom\{[^{}]*(?:\d{5}|\^)"
)

_UPPER_BOUND = re.compile(r"(\\(?:sum|prod)(?:_(?:\{[^{}]*\}|\w))?)\^(?:\{[^{}^]*\}|\w)")
_ALL_DIGITS = re.compile(rf"\d{{{_MAX_DIGITS}}}")
_EXPONENT = re.compile(r"\^\{([^{}]*)\}")


def within_limits(text: str) -> bool:
    """Whether a normalised answer is small enough to work on, judged by its text alone."""
    if len(text) > MAX_CHARS or (len(text) >= _MAX_DIGITS and _ALL_DIGITS.search(text)):
        return False
    text = text.replace(" ", "")
    text = _UPPER_BOUND.sub(r"\1", text) if "\\sum" in text or "\\prod" in text else text  # no exponent
    if (len(text) > _MAX_DEPTH or text.count("^") > 2) and not _is_shallow(text):
        return False
    return not _EXPLOSIVE.search(_EXPONENT.sub(r"^\1 ", text) if "^{" in text else text)


def _is_shallow(text: str) -> bool:
    """Whether few brackets are open at once, and no more than two of them are exponents."""
    raised: list[bool] = []  # for each open bracket: is it an exponent?
    for bracket in BRACKET.finditer(text):
        if bracket[0] in OPENING:
            raised.append(text[bracket.start() - 1 : bracket.start()] == "^")
            if len(raised) > _MAX_DEPTH or (raised[-1] and sum(raised) > 2):
                return False
        elif raised:
            raised.pop()
    return True
