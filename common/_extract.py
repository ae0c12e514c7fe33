"""The committed final answer of a response."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_MAX_CHARS = 4000  # of the sentence after a marker

_TURN_END = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>")
_OPENED = re.compile(r"^\s*<think>|\n[^\S\n]*<think>")
_TURN_START = re.compile(r"\s*<\|im_start\|>\s*assistant\s*")
_BOX_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)(?:\s+|(?=\d))(?P<bare>[^\s{}$\\,;]+)|\\.|[{}]", re.DOTALL
)
_ESCAPED_END = re.compile(r"\\boxed ?\{([^{}\\]*)\\\}")  # a box whose last brace is escaped by mistake
_BOX_JOIN = re.compile(
    r"(?:[\s$,;}]|\\[,;:!()\[\]]|\\q?quad|\\text\w*\s*\{|\b(?:and|or|for\spart\s\(\w\))(?!\w)|[,、和或])*",
    re.IGNORECASE,
)
_BOX_NAME = re.compile(r"(?<![A-Za-z\\])([A-Za-z])(?:_\{?\w+\}?)?\s*=\s*$")
_LIST_SIGN = re.compile(r"(?i),|;|\band\b|\bor\b|[、和或]")
_TAG = re.compile(r"</?(?:final_)?answer>", re.IGNORECASE)
_BULLETS = ("- ", "• ")
_MAX_MARKS = 20  # markers tried before giving up, when the nearest ones are followed by nothing
_ABOUT = (  # what is said of an answer that stands elsewhere
    r"[\s*_]+(?:(?:also|indeed|therefore|thus|then|now|both|very|the\s+same)\s+)*"
    r"(?:in(?=\s+[a-z])|correct(?=[,\s]+\w)|confirmed(?!\s+as\b)"
    r"|consistent|reasonable|plausible|sensible|verified|valid|rounded|helpful|clear|obvious|unique|found|obtained|expressed)\b"
    r"(?!\s+(?:to\s+be\b|(?:to|as)\s+[$\\(\d]))"  # "found to be 6" names one; what denies one is not in the list
)
_INDEED = r"(?:[\s*_]+(?:in\s+fact|(?:found|confirmed)\s+to\s+be|confirmed\s+as)\b)?"  # an answer follows
_MARKER = re.compile(
    rf"""(?ix) (?:^|(?<=\n))\#{{4}}\s++ (?![^\w\\$\n]{{0,9}}  # no heading: "1. Add", or words with text below them
        (?:\d+[.)][^\S\n]+\S|\d+:[^\S\n]+\D|(?:[^\W\d_]{{2}}|A\ [a-z])[^\n]*\n\s*+\S)) |
    (?:^|(?<=\n)) (?:[\#*_]|[^\S\n])* (?:final\s+)?answer [\s*_]* \n+ |
    \b(?:answers? | (?:correct|right|best)\s+(?:option|choice))\b [\s*_]*
        (?:['’]s\b|\b(?:is|are|(?:would|should|must|will)\s+be|becomes|equals)\b
            {_INDEED} (?!{_ABOUT})|[:=：]) [\s*_:：]* |
    \b(?:réponse|respuesta|resposta|risposta|antwort|ответ)\b [\s*_]* (?:\b(?:est|es|é|è|ist)\b|[:：]) [\s*_:：]* |
    (?:答案|答え|答|정답|답)\s*+\**\s*(?:应该是|应为|就是|是|为|は|은|[:：])[\s*:：]*"""
)
_REMARK = re.compile(rf"(?i)\banswers?\b[\s*_]*\b(?:is|are)\b(?={_ABOUT}){_INDEED}")
_MARK_WORDS = (  # one of them is in each match of `_MARKER`, at most a word, spaces and "#*_" before it
    "####", "answer", "option", "choice", "réponse", "respuesta", "resposta", "risposta", "antwort",
    "ответ", "答", "답",
)  # fmt: skip
_MORE_CASES = "ıſᲀᲂᲄᲅ"  # with re.IGNORECASE they are the letters i, s, в, о and т of these words; lower() keeps them
_FILLER = re.compile(
    r"(?i)(?:for sure|definitely|clearly|simply|just|therefore|thus|indeed|certainly|probably|likely|exactly)\b[\s,:]*"
)
_SENTENCE_END = re.compile(  # behind a formula, "!" is no factorial
    r"\.(?=\s|$|\*)|(?:(?<=\$)|(?<=\\[)\]]))!(?=\s|$|\*)|。|\n|</?\w+>"
)
_FORMULA_START = re.compile(r"\$\$|\$|\\\(|\\\[|\\begin\{")
_REASON = re.compile(
    r"(?i)(?:,\s*(?:it|i|we|you|that|this|not(?!.*(?:,\s|\bbut\b)))\b"
    r"|,?(?<!\s)\s+(?:because|since|which|as(?! well)|so)\b).*",
    re.DOTALL,
)
_COPULA = re.compile(r"(?i)(?:the|this|that|there|its|our)\b.*\b(?:is|are|equals|equal to)\b\s*(.+)", re.DOTALL)
_DENIAL = re.compile(r"(?i)\b(?:no (?:way|chance)|not (?:true|the case|possible)|impossible|never the case)\b")
_COPULA_END = re.compile(r"(?:です|である|だ|입니다|이다)$")
_COPULA_ZH = re.compile(r"[\u4e00-\u9fff].*(?:是|为|等于)\s*(.+)", re.DOTALL)


def extract_answer(response: str, which: str = "last") -> str | None:
    r"""Return the committed final answer of a response, or None when it commits to none.

    `which="last"`: the last balanced `\boxed{}`, else the last explicit marker. `which="first"`: whichever of them
    comes earliest (VA-OPD's evaluation rule; a later correction does not override). An empty box is no answer.
    """
    if which not in ("last", "first"):
        raise ValueError(f'which must be "last" or "first", not {which!r}')
    text = own_words(response)
    boxes = boxes_of(text)
    marked = None if boxes and which == "last" else _marked(text, which)
    if marked and (not boxes or marked[0] < boxes[0][0]):
        return marked[1]
    if boxes:
        return boxes[-1 if which == "last" else 0][2] or None
    unclosed = _ESCAPED_END.findall(text)
    return unclosed[-1 if which == "last" else 0].strip() or None if unclosed else None


def own_words(response: str) -> str:
    """The part of a response that speaks to the reader: after the thinking, before any that has no end, before any
    end-of-turn token."""
    turn = _TURN_START.match(response)
    text = response[turn.end() :] if turn else response
    if "<" not in text:
        return text
    end = _TURN_END.search(text)
    text = text[: end.start()] if end else text
    return after_thinking(text)


def after_thinking(text: str) -> str:
    """What follows the last closed `<think>` block, up to one that has no end; elsewhere in a line it is a word."""
    text = text.rpartition("</think>")[2]
    return _OPENED.split(text, maxsplit=1)[0] if "<think>" in text else text


def boxes_of(text: str) -> list[tuple[int, int, str]]:
    """Outermost balanced boxes as (start, end, content); boxes joined by "and" or commas are one. Linear time."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    starts = [start for start in map(text.find, ("\\boxed", "\\fbox")) if start >= 0]
    first = len(text[: min(starts)].rstrip("\\"))  # backslashes before it escape each other, or it
    found: list[tuple[int, int, int, int]] = []  # start, end, start and end of the content
    stack: list[tuple[int, int] | None] = []
    for token in _BOX_TOKEN.finditer(text, first):
        if token["box"]:
            stack.append(token.span())
        elif token["bare"]:
            found.append((*token.span(), *token.span("bare")))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            while found and found[-1][0] > opened[0]:
                found.pop()
            found.append((opened[0], token.end(), opened[1], token.start()))
    return _join_boxes(text, [(start, end, text[first:last].strip()) for start, end, first, last in found])


def _join_boxes(text: str, boxes: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    joined: list[tuple[int, int, str]] = []
    for start, end, content in boxes:
        between = text[joined[-1][1] : start] if joined else ""
        is_list = 0 < len(between) <= 60 and _LIST_SIGN.search(between)
        if is_list and (name := _BOX_NAME.search(between)):  # x = \boxed{1} or x = \boxed{2}
            first = _BOX_NAME.search(text, max(0, joined[-1][0] - 20), joined[-1][0])
            same_name = first and first[1] == name[1] and content != joined[-1][2]
            between = between[: name.start()] if same_name else between
        if is_list and _BOX_JOIN.fullmatch(between):
            start, content = joined[-1][0], f"{joined.pop()[2]}, {content}"
        joined.append((start, end, content))
    return joined


def _matches(pattern: re.Pattern[str], text: str, words: tuple[str, ...]) -> Iterator[re.Match[str]]:
    """`pattern.finditer(text)`, tried only around `words`: twenty times as fast on a long response."""
    lowered = text.lower()
    # One capital letter may have become two, which moves the places, and a word may be spelled with other letters
    if not text.isascii() and (len(lowered) != len(text) or any(char in text for char in _MORE_CASES)):
        yield from pattern.finditer(text)
        return
    done = 0
    found_words = [word for word in words if word in lowered]
    for place in sorted(m.start() for word in found_words for m in re.finditer(re.escape(word), lowered)):
        for start in range(_start(text, place, done), place + 1):
            if found := pattern.match(text, start):
                yield found
                done = found.end()
                break
        else:
            done = max(done, place + 1)  # no place is tried for a second word: time in proportion to the text


def _start(text: str, place: int, done: int) -> int:
    """Where a match with its word at `place` may start: before it stand at most spaces, "#*_" and one other word."""
    for may_stand in (_is_space_or_mark, str.isalpha, _is_space_or_mark):
        while place > done and may_stand(text[place - 1]):
            place -= 1
    return max(place, done)


def _is_space_or_mark(char: str) -> bool:
    return char.isspace() or char in "#*_"


def _marks(text: str) -> list[tuple[int, int, int]]:
    """(start, start of the content, its end or -1 where the sentence decides) of every answer marker, in order."""
    marks = [(m.start(), m.end(), -1) for m in _matches(_MARKER, text, _MARK_WORDS)]
    opened = None
    for tag in _TAG.finditer(text) if "<" in text else ():
        if opened and tag[0][1] == "/":
            marks.append((opened.start(), opened.end(), tag.start()))
        opened = tag if tag[0][1] != "/" else None
    return sorted(marks)


def _marked(text: str, which: str) -> tuple[int, str] | None:
    """(position, answer) of the last or first marker that an answer follows."""
    if text.isascii() and "<" not in text and not any(map(text.lower().__contains__, _MARK_WORDS)):
        return None  # at once: so it is with most answers
    marks = _marks(text) or [  # "valid" is an answer, too
        (m.start(), m.end(), -1) for m in _matches(_REMARK, text, ("answer",))
    ]
    for start, content, end in marks[: -_MAX_MARKS - 1 : -1] if which == "last" else marks[:_MAX_MARKS]:
        is_bullet = text.startswith(_BULLETS, content) and text[start:content].rstrip(" \t").endswith("\n")
        items = _bulleted(text[content : content + _MAX_CHARS]) if is_bullet else []
        content += 2 * is_bullet
        clause = text[content:end] if end >= 0 else _clause(text[content : content + _MAX_CHARS])
        clause = ", ".join(map(_clean_item, items)) if len(items) > 1 else clause
        if answer := _clean_clause(clause, is_sentence=end < 0):
            return start, answer
    return None


def _bulleted(text: str) -> list[str]:
    """`5` and `6` from the lines `- 5` and `- 6` at the start of a text."""
    lines = filter(None, map(str.strip, text.split("\n")))
    return [line[2:] for line in itertools.takewhile(lambda line: line.startswith(_BULLETS), lines)]


def _clean_item(item: str) -> str:
    return _clause(item).strip("*_ ")


def _clean_clause(clause: str, is_sentence: bool) -> str | None:
    if boxes := boxes_of(clause):
        return boxes[0][2] or None
    while inner := _MARKER.search(clause):  # "Final Answer: The final answer is 5"
        clause = clause[inner.end() :]
    clause = clause.strip().removeprefix("}").strip().strip("*_`").strip()
    while filler := _FILLER.match(clause):
        clause = clause[filler.end() :]
    if is_sentence:
        clause = _REASON.sub("", clause, count=1)
        copula = _COPULA.match(clause) or _COPULA_ZH.match(clause)
        denied = copula and _DENIAL.search(clause, 0, copula.start(1))  # "there is no way it is 5"
        clause = _COPULA_END.sub("", copula[1] if copula and not denied else clause)
    return clause.strip(" \t\n*_`") or None


def _clause(rest: str) -> str:
    """The sentence that follows a marker; a formula between delimiters is never cut."""
    rest = rest.lstrip(" \t\n*_:：")
    opening = _FORMULA_START.match(rest)
    inside = 0
    if opening:
        closing = {"\\(": "\\)", "\\[": "\\]", "\\begin{": "\\end{"}.get(opening[0], opening[0])
        inside = max(rest.find(closing, opening.end()), 0)
        if inside and opening[0] in ("$$", "\\["):
            return rest[: inside + 2]
    end = _SENTENCE_END.search(rest, inside)
    return rest[: end.start()] if end else rest
