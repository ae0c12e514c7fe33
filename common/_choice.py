"""Letters of multiple-choice answers."""

from __future__ import annotations

import re

from common._normalise import MAX_CHARS, normalise

_GOLD_CHOICE = re.compile(r"\(?([A-Ja-j])\)?|(?:\(([A-J])\)|([A-J])[.:)]) .+|([A-J]) [A-Z][a-z]+")
_OPTION_TEXT = re.compile(r"(?:\([A-J]\)|[A-J][.:)]) ((?!\([A-J]\)).+)")
_LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.)]) ?((?=-? ?(?:[\d\\¤.]|\((?![A-J]\)))).+)")  # (A)(B) is two
LABEL_START = "(ABCDEFGHIJ"
_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer|letter)(?: is)?:? ?)?[(\[]?(?:([A-J])|([a-j])(?=\W*$))[)\]]?"
    r"(?P<rest>(?:[.,:;)]| (?:because|since|as|non|not|is (?:the )?(?:correct|right|best|true)|[(-])(?!\w)).*)?",
    re.DOTALL,
)
_OTHER_LETTER = re.compile(r"(?<![\w'\\])(?!A [a-z]|I['’ ]+[a-z])[A-J](?![\w'])")
_LIST_OF_LETTERS = re.compile(  # "C. D", "A) B) C)", "A. (b)", "C or d"; but "D. A, B and C" is an option
    r"[.,:;)\s(\[-]*[A-J][)\].\s]*|(?:[.)]\s*[A-J]){2,}[.)\s]*|[.,:;\s]*\([a-j]\)[.\s]*|.*[,;]\s*\(?[a-j]\)?\W*"
)
_LABEL, _CLAUSE_LABEL = re.compile(r"\b([A-J]):\s"), re.compile(r"[.;,]\s*([A-J]):\s")  # "A: no, B: yes"
_SENTENCE_LABEL = re.compile(r"[a-z]{3}\.\s*[A-J]\.\s+[A-Z]")  # "A. Incorrect. B. Correct."
_REFUSED = re.compile(r"(?i)[.:)]\s*;|[\s,;]*\bnot\b")
_REJECTED = re.compile(r"[\s,;]*\bnot \(?([A-J])\)?[.\s]*")  # "B, not A"
_VALUE_LABEL = re.compile(r"[\d)}]\s*[,;]?\s*\(?([A-J])[.)]\s*(?=[-\\(\d])")  # "B. 5 C. 6"
_TEXT_LABEL = re.compile(r"\\text\w*\{\W*([A-J])(?:[):]|\.(?=\W*\}.*\w))\W*\}")
_OPTION = re.compile(r"(?<![\w(])([A-L])[.)]\s")
_DOUBTED = re.compile(r"[\s,;*]*\b(?i:or)\b|[()\[\]{}.:,;*/$\\\s]*\bor\b")  # but "C) OR gate" is an option
_HEDGE = re.compile(
    r"(?i)\b(?:maybe|perhaps|possibly|probably|also|either|or|could|might|may|wait|actually|sure|unless|both|alternatively)\b|;\s*\(?[A-J]\b"
)
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}")
_BEHIND = {letter: re.compile(rf"(?is)\b{letter}\b(.*)") for letter in "ABCDEFGHIJ"}
_NEGATION = re.compile(r"(?i)n't|\b(?:not|non|wrong|incorrect|false|rather|because|since)\b")


def gold_letter(gold: str) -> str | None:
    """The choice letter that a gold answer is, or begins with ("C", "(C)", "C. Neon", "(C) Neon"); else None."""
    found = _GOLD_CHOICE.fullmatch(normalise(gold)) if len(gold) <= MAX_CHARS else None
    return next(filter(None, found.groups())).upper() if found and found[0] != "e" else None  # Euler's number


def option_text(gold: str) -> str | None:
    """`Neon` from the normalised gold answer `(C) Neon`; None where it is a letter alone."""
    found = _OPTION_TEXT.fullmatch(gold)
    return found[1] if found else None


def without_label(answer: str, other: str) -> str:
    """`12` from the normalised `(B) 12`; unchanged where the answer that it is compared with has a label or that
    letter, too."""
    found = _LABELLED.fullmatch(answer)
    is_label = found and (found[1] or found[2]) not in other and not _LABELLED.fullmatch(other)
    return found[3] if is_label else answer


def chosen_letter(answer: str) -> str | None:
    """The choice letter that a short answer commits to ("(C)", "C. Neon", "option c"); None for none or two."""
    if len(answer) > MAX_CHARS:
        return None
    text = _WRAPPED.sub(r"\1", normalise(answer)).strip("{} ")
    found = _CHOICE.fullmatch(text)
    if not found:
        return None
    letter = (found[1] or found[2]).upper()
    behind = _BEHIND[letter].search(answer)  # not in `text`, where "or" may be a semicolon
    if (behind and _DOUBTED.match(behind[1])) or len(set(_TEXT_LABEL.findall(answer))) > 1:
        return None
    return None if _names_another(letter, found["rest"] or "") else letter


def _names_another(letter: str, rest: str) -> bool:
    """Whether what follows a letter offers another one. "A because (B) is wrong" and "C. Vitamin A" do not."""
    if rejected := _REJECTED.fullmatch(rest):
        return rejected[1] == letter
    if _LIST_OF_LETTERS.fullmatch(rest) or _REFUSED.match(rest):
        return True
    # After "C." a colon may belong to the option's text: "C. Vitamin A: for the eyes"
    labels = (_LABEL if rest.startswith(":") else _CLAUSE_LABEL).findall(rest)
    labels += [other for other in _VALUE_LABEL.findall(rest) if other > letter]  # "C. 0.5 A. 5 V" has amperes
    if any(other != letter for other in labels) or _SENTENCE_LABEL.search(rest):
        return True
    places = {option[1]: option.start() for option in reversed([*_OPTION.finditer(rest)])}
    second, third = (places.get(chr(ord(letter) + step), -1) for step in (1, 2))
    if 0 <= second < third:  # the options one after the other
        return True
    if not _OTHER_LETTER.search(rest):
        return False
    is_label = rest[0] in ".:)"
    return bool(_HEDGE.search(rest)) or not (is_label or _NEGATION.search(rest))
