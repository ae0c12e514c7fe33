"""Letters of multiple-choice answers."""

from __future__ import annotations

import re

from common._normalise import MAX_CHARS, normalise

__all__ = ["chosen_letter", "gold_letter"]

_GOLD_CHOICE = re.compile(r"\(?([A-Ja-j])\)?|(?:\(([A-J])\)|([A-J])[.:)]) .+|([A-J]) [A-Z][a-z]+")
_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer|letter)(?: is)?:? ?)?[(\[]?(?:([A-J])|([a-j])(?=\W*$))[)\]]?"
    r"(?P<rest>(?:[.,:;)]| (?:because|since|as|non|not|is (?:the )?(?:correct|right|best|true)|[(-])(?!\w)).*)?",
    re.DOTALL,
)
_OTHER_LETTER = re.compile(r"(?<![\w'\\])(?!A [a-z]|I['’ ]+[a-z])[A-J](?![\w'])")
_INITIALS = re.compile(r"[.:)\s]*(?:[A-Z]\.\s*)*")
_LABEL = re.compile(  # as in "A: no, B: yes"
    r"(?<![\w'\\(])[A-J]:\s|^[^(]*(?<![\w'\\])[A-J]\)|(?<=[.;,\n])\s*\b[A-J]\.\s*(?![a-z\s]|$)"
    r"|\b[A-J]\.\s*(?=[\d$\\])"
)
_POINTED = re.compile(r"\b([A-J])\.\s")
_REFUSED = re.compile(r"(?i)[.:)]\s*;|[\s,;.:)]*(?:or\b|is\s+(?:wrong|incorrect|false|not)\b)|[\s,;]*\bnot\b")
_HEDGE = re.compile(
    r"(?i)\b(?:maybe|perhaps|possibly|probably|also|either|or|could|might|may|wait|actually|sure|unless|both|alternatively)\b|;\s*\(?[A-J]\b"
)
_NEGATION = re.compile(r"(?i)n't|\b(?:not|non|wrong|incorrect|false|rather|because|since)\b")


def gold_letter(gold: str) -> str | None:
    """The choice letter that a gold answer is or begins with ("C", "(C)", "C. Neon", "(C) Neon"); None without one."""
    found = _GOLD_CHOICE.fullmatch(normalise(gold)) if len(gold) <= MAX_CHARS else None
    return next(filter(None, found.groups())).upper() if found and found[0] != "e" else None  # Euler's number


def chosen_letter(answer: str) -> str | None:
    """The choice letter that a short answer commits to ("(C)", "C. Neon", "option c"); None for none and for two."""
    if len(answer) > MAX_CHARS:
        return None
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", normalise(answer)).replace("**", "").strip("{} ")
    found = _CHOICE.fullmatch(text)
    if not found or _names_another(found["rest"] or ""):
        return None
    return (found[1] or found[2]).upper()


def _names_another(rest: str) -> bool:
    """Whether what follows a letter offers another one. "A because (B) is wrong" and "C. Vitamin A" do not."""
    if re.fullmatch(
        r"(?:[.,:;)\s(\[-]+[A-J])+[)\].\s]*|[.,:;\s]*\([a-j]\)[.\s]*|.*[,;]\s*\(?[a-j]\)?\W*", rest
    ):  # "C. D", "C or d"
        return True
    if _REFUSED.match(rest):
        return True
    after = _INITIALS.sub("", rest, count=1)
    if _LABEL.search(after) or len(set(_POINTED.findall(after))) > 1:  # growth of E. coli has one
        return True
    if not _OTHER_LETTER.search(rest):
        return False
    is_label = rest[0] in ".:)"
    return bool(_HEDGE.search(rest)) or not (is_label or _NEGATION.search(rest))
