r"""Takes a normalised answer apart by its text: lists, sets, intervals, assignments, matrices and other notations."""

from __future__ import annotations

import re

from common._formula import Unreadable, names, parse
from common._normalise import BRACKET, OPENING, key
from common._units import number

_NAME_PART = (
    r"[A-Za-z]|_ ?\{? ?[\w+-]+ ?\}?|\( ?-?\w+ ?\)|[|:'(),/{} ]|\\(?:angle|triangle|overline|frac|text|var\w+|alpha"
    r"|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|tau|epsilon|eta|xi|psi|Delta|Omega)(?![a-zA-Z])"
)
_NAME = re.compile(rf"(?:{_NAME_PART})++")  # possessive, so that no input makes it backtrack
_QUANTITY = re.compile(  # a name in an equation, not in an inequality: m\angle 1, [ABC], P(X=2), f^{-1}(2), \sin A
    r"(?:\\(?:angle|triangle) ?\d+|_ ?\{(?:[^{}=]|\{[^{}=]*\})*+\}|\[[A-Za-z]+\]|\^ ?\{? ?-1 ?\}?(?= ?\()"
    r"|(?:(?<![A-Za-z])P|\\mathbb\{[EP]\}) ?(?:\([^()]*\))?"
    r"|\\(?:widehat|overset|frown|overrightarrow|odot|bar|hat|max|min|sin|cos|tan)(?![a-zA-Z])"
    rf"|{_NAME_PART})++"
)
_VECTOR = re.compile(  # of unknowns in their order
    r"\\begin ?\{[pb]?matrix\} ?(?:x ?\\\\ ?y(?: ?\\\\ ?z)?|a ?\\\\ ?b(?: ?\\\\ ?c)?) ?\\end ?\{[pb]?matrix\}"
)
_LONE_NAME = re.compile(r"[A-Za-df-hj-z](?: ?_ ?(?:\w|\{ ?\w+ ?\}))?")  # neither e nor i
_NEGATION = re.compile(r"\b(?:not|never|isn'?t|doesn'?t|wrong|false|but)\b")
_MEASURE = re.compile(r"^m ?(?=\\(?:angle|widehat|overset))")
RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in(?![a-z])|subset|equiv|to(?![a-z]))")
_BRACES = re.compile(r"\\?\{(.*?)\\?\}")
_PLUS_MINUS = re.compile(r"\\[pm][pm]")
FLIP = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
COMMA, _APPROX = re.compile("[,;]"), re.compile(r"\\approx")
_MATRIX = re.compile(
    r"(?P<factor>[^\\(\[]*|\\frac\{[^{}]*\}\{[^{}]*\}) ?(?:[(\[] ?)?\\begin ?\{[pbB]?(?:small)?(?:matrix|array)\}"
    r"(?: ?\{[clr| ]*\})?(?P<rows>.*)\\end ?\{[pbB]?(?:small)?(?:matrix|array)\}(?: ?[)\]])?"
)
_ROWS_END = re.compile(r"(?: |\\\\)+$")
BUILDER = re.compile(r"\\\{ ?([A-Za-z]) ?(?:\\in ?\\mathbb\{R\} ?)?[|:] ?(.*)\\\}")
_BASED = re.compile(
    r"[({]?(?:\\text\{)?([0-9A-Za-z]+)\}?[)}]? ?"
    r"(?:_ ?\{? ?\(? ?(?:\\text\{)?(?:base ?\}? ?)?|(?:\\text\{ ?)?\(?(?:\\text\{ ?)?(?:in )?base ?\}? ?)"
    r"(\d+|[a-z]+) ?\)?\}?\)?\}?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}
_DATE = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})([-/.])(\d{1,2})\6(\d{4})")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-df-hj-z](?![A-Za-z])")  # except e and i

_WORD = r"[A-Za-z][a-z'-]{3,}|yes|no|none|odd|even|all|any|one|two|six|ten|not|the|of|to|red|east|west|may|dne"
_TEXT = re.compile(
    rf"(?i)(?:(?!may\s)[A-Za-z'-]{{1,3}}\s)*+(?:{_WORD})(?:[\s,.]+(?:[A-Za-z'-]+|\d+(?:st|nd|rd|th)?))*+"
)
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}")
_FUNCTIONS = re.compile(
    r"(?i)(?<![a-z])(?:a?(?:sin|cos|tan|cot|sec|csc)h?|arc\w+|sqrt|log|ln|exp|gcd|lcm|theta|alpha|beta|gamma)(?![a-z])"
)


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators that lie outside all brackets; the separators themselves are kept at odd positions."""
    parts, depth, start, seen = [], 0, 0, 0
    for cut in separator.finditer(text):
        for bracket in BRACKET.findall(text, seen, cut.start()):
            depth = depth + 1 if bracket in OPENING else max(0, depth - 1)
        seen = cut.end()
        if depth == 0:
            parts += [text[start : cut.start()].strip(), cut[0]]
            start = seen
    return [*parts, text[start:].strip()]


def bare(text: str) -> str:
    """The text without brackets that only group: `{x}`, `(x)`. Brackets round a list stay: they mean something."""
    text = text.strip()
    while text[:1] in ("(", "{") and closing_bracket(text) == len(text) - 1:
        if text[-1] != {"(": ")", "{": "}"}[text[0]] or len(split(text[1:-1], COMMA)) > 1:
            break
        text = text[1:-1].strip()
    return text


def closing_bracket(text: str) -> int:
    """Index of the bracket that closes the one at the start, -1 if none does."""
    depth = 0
    for bracket in BRACKET.finditer(text):
        depth += 1 if bracket[0] in OPENING else -1
        if depth == 0:
            return bracket.start()
    return -1


def items_of(text: str) -> tuple[str, list[str]]:
    """(kind, elements): "set" for braces, "list" for bare commas, "one" for neither. A plus-minus is two elements."""
    if number(text) is not None:  # 1,000
        return "one", [text]
    inner = _BRACES.fullmatch(text)
    is_set = inner and closing_bracket(text.removeprefix("\\")) >= len(text) - 2
    parts = [part for part in split(inner[1] if is_set else text, COMMA)[::2] if part]
    if _PLUS_MINUS.search(text):
        lower = [part.replace("\\pm", "-").replace("\\mp", "+") for part in parts if _PLUS_MINUS.search(part)]
        parts = [part.replace("\\pm", "+").replace("\\mp", "-") for part in parts] + lower
    return "set" if is_set else "list" if len(parts) > 1 else "one", parts


def assignment(text: str) -> tuple[str | None, list[str]]:
    """`("x", ["5+6", "11"])` from `x = 5+6 = 11`; the name is None when the left side is more than a name."""
    parts = split(text, RELATION)
    if len(parts) < 3 or any(op not in ("=", "\\in") for op in parts[1::2]):
        return None, [text]
    if len(parts) > 3 and len(split(text, COMMA)) > 1:  # "x=1, y=2" is a list of assignments
        return None, [text]
    is_name = _QUANTITY.fullmatch(parts[0]) or parts[0].startswith("\\lim") or _VECTOR.fullmatch(parts[0])
    is_name = is_name and not _NEGATION.search(parts[0])
    if not is_name and parts[1:2] == ["="] and _LONE_NAME.fullmatch(parts[-1]) and not _LETTER.search(parts[0]):
        return key(parts[-1]), parts[:-2:2]  # 5 = x
    name = _MEASURE.sub("", key(parts[0])) if is_name else None
    return name, parts[2::2] if name else parts[::2]


def unnumbered_name(item: str) -> str | None:
    """The name of `x = 5`, that of `x_1 = 5` without its number; None without a name."""
    name = assignment(item)[0]
    return name and name.partition("_")[0]


def values_by_name(items: list[str]) -> list[str] | None:
    """`["1", "2"]` from `y = 2` and `x = 1`: in the order of x, y, z or of a, b, c, d; None for other names."""
    found = sorted((name or "?", parts[-1]) for name, parts in map(assignment, items))
    names = "".join(name for name, _ in found)
    is_known = names.isalpha() and ("xyz".startswith(names) or "abcd".startswith(names))
    return [value for _, value in found] if is_known else None


def same_name(p: str, g: str) -> bool:
    """Whether two names agree; x_1 counts as x, since one side alone may number its solutions."""
    return p == g or p.startswith(f"{g}_") or g.startswith(f"{p}_")


def as_interval(text: str) -> tuple[str, str] | None:
    r"""`("x", "[-2,7]")` from `-2 \leq x \leq 7`; None for what is no inequality on one name."""
    if builder := BUILDER.fullmatch(text):
        text = builder[2]
    parts = split(text, RELATION)
    terms, ops = parts[::2], parts[1::2]
    if not ops or len(ops) > 2 or any(op not in FLIP for op in ops):
        return None
    turned = ops[0] in (">", "\\geq")
    if turned:  # small end first
        terms, ops = terms[::-1], [FLIP[op] for op in reversed(ops)]
    if len(ops) == 1:
        is_below = _NAME.fullmatch(terms[0]) and not (turned and _NAME.fullmatch(terms[1]))  # of x>a, the name is x
        terms = [r"-\infty", *terms] if is_below else [*terms, r"\infty"]
        ops = ["<", *ops] if is_below else [*ops, "<"]
    if not _NAME.fullmatch(terms[1]) or not {"<", "\\leq"}.issuperset(ops):
        return None
    name = key(terms[1])
    if builder and builder[1] != name.strip("|"):
        return None
    return name, f"{'(' if ops[0] == '<' else '['}{terms[0]},{terms[2]}{')' if ops[1] == '<' else ']'}"


def one_by_one(text: str, other: str) -> str:
    """`m=2,n=3` from `(m,n)=(2,3)` if the other side names its values; any other text is returned as it is."""
    if text[:1] != "(" or "=" not in other:
        return text
    name, parts = assignment(text)
    if not name or len(parts) > 1 or assignment(other)[0]:
        return text
    left, right = (split(side.strip()[1:-1], COMMA)[::2] for side in (name, parts[0]))
    return ",".join(map("{}={}".format, left, right)) if len(left) == len(right) > 1 else text


def carried(items: list[str]) -> list[str]:
    """`x=-1, x=2` from `x=-1, 2`: a name holds until the next one."""
    if not items or "=" not in items[0]:
        return items
    carried, name = [], None
    for item in items:
        name = assignment(item)[0] or name
        carried.append(item if not name or RELATION.search(item) else f"{name}={item}")
    return carried


def is_symbolic(text: str) -> bool:
    """Whether a value, after any `x =`, has names in it, so that a letter at its end may be a factor."""
    value = split(text, RELATION)[-1]
    try:
        return bool(names(parse(value)))
    except Unreadable:
        return bool(_LETTER.search(value))


def based(text: str) -> tuple[str, int] | None:
    """`("204", 5)` from `204_5` and `(204)_{\\text{five}}`; None for anything else."""
    found = _BASED.fullmatch(text)
    if not found or not (base := int(found[2]) if found[2].isdigit() else _BASES.get(found[2], 0)):
        return None
    is_number = found[1].isdigit() or (found[1].isupper() and any(map(str.isdigit, found[1])))
    return (found[1].lstrip("0"), base) if is_number else None


def exact_side(text: str) -> str:
    r"""`\frac{1}{3}` from `\frac{1}{3} \approx 0.33`, but `11` from `x \approx 11`."""
    if "\\approx" not in text:
        return text
    left, *right = split(text, _APPROX)[::2]
    return right[0] if right and (not left or _QUANTITY.fullmatch(left)) else left


def date(text: str) -> list[int] | None:
    """The numbers of `2024-03-15` or `3/15/2024` in their order; None for anything else."""
    found = _DATE.fullmatch(text)
    return [int(part) for part in found.groups() if part and part.isdigit()] if found else None


def is_text(text: str) -> bool:
    unwrapped = _WRAPPED.sub(r"\1", text) if "\\text" in text else text
    only_text = unwrapped != text and not _WRAPPED.sub("", text).strip()
    return only_text or (bool(_TEXT.fullmatch(unwrapped)) and not _FUNCTIONS.search(unwrapped))


_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d])-(?=[^\W\d])|[\s_.,;:!?'\"()\[\]{}$]+")
_PLURAL = re.compile(r"(?<=[a-z]{3})(?<!s)s$")  # no real solutions
_ORDINAL_OR_ARTICLE = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|^(?:an?|the) (?=[a-z])")


def fold_text(text: str) -> str:
    words = _BETWEEN_WORDS.sub(" ", text.replace("\\text", " ")).split()
    text = _ORDINAL_OR_ARTICLE.sub("", " ".join(words).casefold())
    return _PLURAL.sub("", text) if " " in text else text


_CHEMICAL = re.compile(r"(?:[A-Z][a-z]?\d*|\((?:[A-Z][a-z]?\d*)+\)\d*)++(?:\^\d?[+-])?")
_CHARGE = re.compile(r"\^([+-])(\d)$")
_SET_UPRIGHT = re.compile(r"\\(?:mathrm|text|ce)(?= ?\{)|[{} ]|_(?= ?\{? ?\d)")


def chemical(text: str) -> str | None:
    r"""`Fe2(SO4)3` from `\mathrm{Fe_2(SO_4)_3}`, `Fe^3+` from `\text{Fe}^{+3}`; None if it is no chemical formula."""
    plain = _CHARGE.sub(r"^\2\1", _SET_UPRIGHT.sub("", text))
    return plain if _CHEMICAL.fullmatch(plain) else None


def matrix_of(text: str) -> list[list[str]] | None:
    """Rows of cells, each times the factor before the matrix; None if there is no matrix."""
    table = _MATRIX.fullmatch(text)
    if not table:
        return None
    rows = [row.split("&") for row in _ROWS_END.sub("", table["rows"]).split("\\\\")]
    factor = table["factor"].strip()
    factor = f"{factor}1" if factor in ("-", "+") else factor
    return [[f"({factor})\\cdot ({cell})" for cell in row] for row in rows] if factor else rows
