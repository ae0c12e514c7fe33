r"""One spelling for one meaning: Unicode and LaTeX synonyms folded; and a limit on the size of what is worked on.

The normal form keeps LaTeX: `\frac{a}{b}`, `\sqrt{a}`, `\text{cm}`, `\cdot`, `\leq`, `^`, a comma for "and", a
semicolon for "or".
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from common._extract import boxes_of

__all__ = ["BROKEN", "CLOSING", "MAX_CHARS", "OPENING", "key", "normalise", "within_limits"]

MAX_CHARS = 4000  # an answer, not a response; the longest gold answer of the usual benchmarks has about 300
OPENING, CLOSING = "([{", ")]}"
_MAX_DEPTH = 40
_MAX_DIGITS = 1000
_MAX_BOXES = 10

# ---------------------------------------------------------------------------------------------------------------------
# Unicode
# ---------------------------------------------------------------------------------------------------------------------

_SYMBOLS = str.maketrans(
    dict.fromkeys("−–—‒‐‑﹣－", "-")
    | dict.fromkeys("·⋅∙×✕•", "\\cdot ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", "")
    | dict.fromkeys("’‘′ʹ", "'")
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("°º˚", "^\\circ ")
    | {"÷": "/", "⁄": "/", "∕": "/", "∛": "\\sqrt[3] ", "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in "}
    | {"≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "≈": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∖": "\\setminus "}
    | {"∅": "\\emptyset ", "。": ".", "、": ",", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℚ": "\\mathbb{Q}"}
    | {"ℕ": "\\mathbb{N}", "ℂ": "\\mathbb{C}", "…": "\\ldots ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil "}
    | {"⌉": "\\rceil ", "⟨": "\\langle ", "⟩": "\\rangle ", "℃": "^\\circ C", "℉": "^\\circ F", "∣": "|"}
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
BROKEN = "\ufffd"  # control characters, direction overrides and lone surrogates become this, which equals nothing


def _fold_unicode(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉ₙ]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|\w|\([^()]*\))", r"\\sqrt{\1}", text).replace("√", "\\sqrt")
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
_NESTED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+"


def _compiled(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), to) for pattern, to in rules]


_LATEX_RULES = _compiled(  # only where there is a backslash
    (r"(\d), ?\\! ?(?=\d{3})", r"\1"),
    (r"(?<=[\d)\]]) ?\{\} ?(?=\^)", ""),
    (_O + r"\\([%#&_])", r"\1"),
    (r"(?:US ?)?" + _O + r"\\\$|\\(?:text)?dollar" + _A, "¤"),
    (r"\\(?:pounds|textsterling)" + _A, "£"),
    (r"\\(?:euro|texteuro)" + _A, "€"),
    (r"\\cr" + _A + r"|\\\\ ?\[[^][{}]*\]", r"\\\\"),
    (_O + r"\\[,;:> ]|\\(?:q?quad|thinspace|enspace)" + _A + r"|\\[hv]space\*?\{[^{}]*\}", " "),
    (_O + r"(?:\\[()\[\]!])", ""),
    (r"\\[hv]?phantom ?\{[^{}]*\}|\\(?:tag\*?|label) ?\{[^{}]*\}|\\(?:text)?color(?:box)? ?\{[^{}]*\}", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)" + _A + r"\.?", ""),
    (r"\\(?:display|text|script|scriptscript)style" + _A, ""),
    (r"\\(?:rm|bf|it|sf|tt|sl|sc|large|Large|LARGE|huge|Huge|small|normalsize|no)?(?:limits)?(?<=[a-zA-Z])" + _A, ""),
    (r"\\(?:nonumber|notag|therefore|because|bfseries|mathstrut|strut)" + _A, ""),
    (r"\\(?:underline|underset ?\{[^{}]*\}|mathop|mathord|ensuremath)" + _A, ""),
    (r"\\(?:[dtcs]|nice)frac" + _A, r"\\frac"),
    (r"\\frac ?([0-9A-Za-z]) ?([0-9A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\frac ?([0-9A-Za-z]) ?(?=\{)", r"\\frac{\1}"),
    (r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9A-Za-z])", r"\1{\2}"),
    (r"\\frac (?=\{)", r"\\frac"),
    (r"\{ ?([^{}\\]+?) ?\\over" + _A + r" ?([^{}\\]+?) ?\}", r"\\frac{\1}{\2}"),
    (r"\\[dt]binom" + _A, r"\\binom"),
    (r"\\binom ?([0-9A-Za-z]) ?([0-9A-Za-z])", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\choose" + _A + r"([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\surd" + _A, r"\\sqrt"),
    (r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),
    (_FONT + r" ?\{ ?\$?( ?-?[\\\d](?=[^{}]*+\{)" + _NESTED + r")\}", r"\1"),  # \mathbf{\frac{1}{2}}
    (_FONT + r" ?\{ ?cis ?\}", r"\\cis "),
    *[(_FONT + r" ?\{((?:[^{}^]|\^(?! ?\{))*+)\^ ?\{ ?(-?\d) ?\}(?=[^{}]*\})", r"\\text{\1^\2")]
    * 3,  # \mathrm{m\,s^{-1}}
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathbit|vec|mathcal|mathscr) ?\{([^{}]*)\}", r"\1"),
    (r"\\(?:mathbb|Bbb) ?\{? ?([A-Z]) ?\}?", r"\\mathbb{\1}"),
    (rf"\\operatorname\*? ?\{{ ?({_FUNCTIONS}) ?\}}", r"\\\1 "),
    (r"\\(?:text\w*|mbox|hbox|mathrm|mathsf|mathtt|emph|operatorname\*?) ?\{ ?([^{}]*)\}", r"\\text{\1}"),
    (r"(\\text\{[^{}]*) \}", r"\1}"),
    (r"\\text\{((?:[^A-Za-z{}]|\b(?:and|or)\b)*+)\}", r" \1 "),
    (r"^\\text\{([^{}]*,[^{}]*)\}$|^\\text\{(?i:(?:the )?(?:final )?answer is) ([^{}]*)\}$", r"\1\2"),
    (r"(\\text\{[^{}]*?) ?\\cdot ?(?=[^{}]*\})", r"\1 "),
    (r"\\text\{ ?(?i:([+-]|positive |negative )? ?infinity) ?\}", r"\1 infinity "),
    (r"\\text\{(?i:(?:the )?(?:(?:final|correct) )?answer(?: is)?) ?:?\}", ""),
    (r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
    (r"(?<![\d})])( ?)\\text\{([^A-Za-z{}]*[A-Za-z]?[^A-Za-z{}]*)\}", r"\1\2"),
    (r"\\text\{([^A-Za-z{}]*[^mshgLKJNWVCF{}]?[^A-Za-z{}]*)\}", r"\1"),  # after a number, `\text{m}` is a unit
    (r"\\l?brace" + _A, r"\\{"),
    (r"\\rbrace" + _A, r"\\}"),
    (r"\\lbrack" + _A, "["),
    (r"\\rbrack" + _A, "]"),
    (r"\\(?:[lr]?vert|mid)" + _A, "|"),
    (r"\\colon" + _A, ":"),
    (r"\\(?:leqslant|leqq|le)" + _A, r"\\leq "),
    (r"\\(?:geqslant|geqq|ge)" + _A, r"\\geq "),
    (r"\\lt" + _A, "<"),
    (r"\\gt" + _A, ">"),
    (r"\\(?:ne|not ?=)(?![A-Za-z])", r"\\neq "),
    (r"\\simeq" + _A + r"|^\\sim" + _A, r"\\approx "),
    (r"\\(?:times|ast|bullet)" + _A, r"\\cdot "),
    (r"\\div" + _A, "/"),
    (r"\\[cd]?dots" + _A, r"\\ldots "),
    (r"\\(?:backslash|smallsetminus)" + _A, r"\\setminus "),
    (r"(\\mathbb\{R\}) ?- ?(?=\\\{)", r"\1\\setminus "),
    (r"\\bigcup" + _A, r"\\cup "),
    (r"\\varnothing" + _A + r"|\\\{ ?\\\}", r"\\emptyset "),
    (r"\+ ?\\infty", r"\\infty"),
    (r"\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"\\overline{\1\2\3}"),
    (r"(?<=[.\d])\\(?:dot|bar) ?\{?(\d+)\}?", r"\\overline{\1}"),
    (r"\\pmod ?\{?(\w+)\}?|\((?:\\text\{)?\\?mod ?\}? ?(\w+)\)", r"\\pmod{\1\2}"),
    (r"\^ ?\{? ?\\prime ?\}?", "'"),
    (r"\^ ?\{? ?\\circ ?\}?|\\(?:text)?degree" + _A, r"\\text{degrees}"),
    (r"\\text\{degrees\} ?(?:\\text\{ ?)?([CFK])(?:elsius|ahrenheit)?\}?" + _A, r"\\text{deg\1}"),
    (rf"\\text\{{ ?,? ?(?:{_AND}) ?,? ?\}}|\\(?:land|wedge)" + _A, ","),
    (rf"\\text\{{ ?,? ?(?:{_OR}) ?,? ?\}}|\\(?:lor|vee)" + _A, ";"),
    (rf"(\\text\{{[^{{}}]*?),? (?:{_AND}|{_OR}) (?=[^{{}}\d]*\}})", r"\1},\\text{"),
)
_PLAIN_RULES = _compiled(
    (r"(\d) ?\{ ?, ?\} ?(?=\d{3})", r"\1"),
    (r"~", " "),
    (r"\{([.:=+-])\}", r"\1"),
    (r"^(?i:(?:\\text\{)?(?:all|the) (?:real numbers|reals))[}. ]*$", r"\\mathbb{R}"),
    (r"^(?i:negative +infinity) ?$", r"-\\infty "),
    (r"^(?i:(?:positive +)? ?infinity) ?$", r"\\infty "),
    (r"^(?i:(?:\\text\{)?(?:the )?(?:empty|null) set)[}. ]*$", r"\\emptyset "),
    (r"\$", ""),
    (r"<=|=<", r"\\leq "),
    (r">=", r"\\geq "),
    (r"(?<![\d)])!=", r"\\neq "),
    (r"==|:=", "="),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\.{3,}", r"\\ldots "),
    (r"(\d\.\d*)\((\d+)\)", r"\1\\overline{\2}"),
    (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)" + _A, r"\\infty "),
    (r"(?<=\d) ?\^ ?\{? ?o ?\}?" + _A, r"\\text{degrees}"),
    (r"(?<=\d) ?\^? ?\{? ?(?:\\text\{)?(st|nd|rd|th)\b\}?\}?", r"\\text{\1}"),
    (r"(?<=[)\]}]) ?U ?(?=[(\[\\])", r"\\cup "),
    (r" ?(?<![A-Za-z\\{])and" + _A + "|和", ","),
    (r" ?(?<![A-Za-z\\{])or" + _A + "|或", ";"),
    (r"^(\d+) ?(?:to|\\text\{to\}) ?(\d+)$", r"\1:\2"),
    (r"(?:\{\})?[_^] ?\{?(\w+)\}? ?C ?_ ?\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    (r"(?i)\bper cents?\b", "percent"),
    (r"(?i)^(?:approximately|approx\.?|about|roughly|around|nearly) (?=[-¤€£\d\\.$])", ""),
    (r"^ ?= ?|^ ?\\(?:implies|Rightarrow|Longrightarrow|to)" + _A, ""),
    (r", ?(?=[,;])|[,;] ?$", ""),
    (r" +", " "),
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?i)(?<=\d) ?(\\text\{{ ?)?({'|'.join(_SCALES)})(?![A-Za-z]) ?")
_LEAD = re.compile(r"(?i)^ ?(?:the )?(?:final )?answers?\b ?(?:is\b|are\b)?[ :]*(?=\S)")
_QUOTED = re.compile(r"([\"'`])(.*)\1")


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """One spelling for one meaning: synonyms folded, delimiters dropped, "and" as a comma, "or" as a semicolon."""
    text = " ".join(_fold_unicode(text).split())
    text = _LEAD.sub("", re.sub(r"\*\.$", "", text).strip("*").strip())
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[2]
    for _ in range(_MAX_BOXES):  # one inside the other
        boxes = boxes_of(text) if "\\" in text else []
        if len(boxes) != 1:
            break
        start, end, content = boxes[0]
        text = content if (start, end) == (0, len(text)) else f"{text[:start]}{{{content}}}{text[end:]}"
    if "\\" in text:
        for pattern, to in _LATEX_RULES:
            text = pattern.sub(to, text)
    for pattern, to in _PLAIN_RULES:
        text = pattern.sub(to, text)
    text = _SCALE.sub(lambda m: rf" \cdot 10^{{{_SCALES[m[2].lower()]}}}{m[1] or ''}", text).replace("\\text{}", "")
    return re.sub(r"(?:[\s.,;:]|\\)+$|[\s.]+(?=\}+$)", "", text).strip()


def key(text: str) -> str:
    """For the test "same text": spaces dropped, except between digits (1 1/4 is not 11/4)."""
    return re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", re.sub(r"(?<!\d) | (?!\d)", "", text))


_EXPLOSIVE = re.compile(
    r"(?:\^-?\w+){3}|\^\(?-?\d{6}"  # bare power towers; huge exponents
    r"|\d{5}[)}]*!|![)}\]]*!"  # huge and repeated factorials
    r"|\\binom\{[^{}]*(?:\d{5}|\^)"
)


def within_limits(text: str) -> bool:
    """Whether a normalised answer is small enough to work on, judged by its text alone."""
    if len(text) > MAX_CHARS or re.search(rf"\d{{{_MAX_DIGITS}}}", text):
        return False
    text = text.replace(" ", "")
    raised: list[bool] = []  # for each open bracket: is it an exponent?
    for i, char in enumerate(text):
        if char in OPENING:
            raised.append(text[i - 1 : i] == "^")
            if len(raised) > _MAX_DEPTH or (raised[-1] and sum(raised) > 2):
                return False
        elif char in CLOSING and raised:
            raised.pop()
    return not _EXPLOSIVE.search(re.sub(r"\^\{([^{}]*)\}", r"^\1 ", text))
