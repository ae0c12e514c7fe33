"""The scoring rules of VA-OPD's eight vision benchmarks (arXiv 2605.21924, Table 1): one small function each.

A rule reads the first answer that a response commits to, or else the whole response, as the benchmarks' own scripts
do. What a rule cannot read is wrong and counted: no letter is drawn at random, as in MMMU's script, and no nearest
option is taken, as in MathVista's.
"""

from __future__ import annotations

import math
import re
from ast import literal_eval
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.answers import BARE_WORDS, Verdict, chosen_letter, exact_number, extract_answer, own_words, same_answer

Row = dict[str, Any]
Units = dict[str, dict[str, list[float]]]  # component -> cluster -> values in [0, 1], whose mean the component is

_WEMATH = re.compile(r"Answer\s*>?\s*[>:][\s<>:.*(]*([A-H])(?![A-Za-z]| [a-z])")
_MMSTAR = re.compile(r"(?:\(|option |the answer is )?([a-d])(?![a-z]| [a-z])")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


# --- readers: text of an answer -> what it says, or None ---------------------------------------------------------


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names, or that of the only option that it repeats word for word; else None."""
    letters = _letters(options)
    if (letter := chosen_letter(text)) in letters:
        return letter
    said = text.strip().rstrip(".").lower()
    same = [letters[i] for i, option in enumerate(options) if option.strip().rstrip(".").lower() == said]
    return same[0] if len(same) == 1 else None


def wemath_letter(text: str) -> str | None:
    """The letter in the first `<Answer>: <<B>>`, the form that WeMath's prompt asks for and its script reads."""
    found = _WEMATH.search(text)
    return found[1] if found else None


def mmstar_letter(text: str) -> str | None:
    """MMStar's rule: the text begins with the letter, bare or after "(", "option " or "the answer is ".

    Unlike there, the letter must not go on as a word or a sentence ("Because", "A dog").
    """
    found = _MMSTAR.match(text.strip().lower())
    return found[1].upper() if found else None


def mmmu_letter(text: str, options: Sequence[str]) -> str | None:
    """MMMU's rule: the last "(B)"; else the last " B "; else, in a text of over 5 words, the option named last."""
    text = f" {text.strip(',.!?;:' + chr(39))} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in _letters(options)}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.get)
    if len(text.split()) > BARE_WORDS:
        said = [text.lower().rfind(option.lower()) for option in options]
        if max(said, default=-1) >= 0:
            return _letters(options)[said.index(max(said))]
    return None


def mmmu_open(text: str, golds: Sequence[str]) -> bool:
    """MMMU's rule for open questions: a gold number is among those of the key phrases, or a gold text is in one."""
    phrases = _key_phrases(text)
    said = [*phrases, *(number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase))]
    found = [value for one in said for value in _mmmu_values(one)]
    wanted = [value for gold in golds for value in _mmmu_values(gold)]
    return any(
        any(isinstance(gold, str) and gold in value for gold in wanted) if isinstance(value, str) else value in wanted
        for value in found
    )


def _key_phrases(text: str) -> list[str]:
    """Of each line with key words, the shortest text that follows the last place of one; else the whole text."""
    text = text.strip().strip(".").lower()
    sentences = text.split("\n")  # the script also splits before capitals, of which it has left none
    phrases = []
    for number, sentence in enumerate(sentences):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(sentences) - 1 else _KEYS:
            tail = sentence.split(key)[-1].strip()
            if key in sentence and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest not in ("", *":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def _mmmu_values(text: str) -> list[str | float]:
    """A number to two decimals; else the text in lower case, a single character with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mathvista_value(text: str, row: Row) -> str | float | None:
    """MathVista's normal form: the option's text, the truncated integer, the rounded float, or the list."""
    if row["question_type"] == "multi_choice":
        letter = option_letter(text, row["choices"])
        return None if letter is None else row["choices"][ord(letter) - ord("A")]
    if row["answer_type"] == "list":
        return re.sub(r"\s", "", text) if re.fullmatch(r"\s*\[[^\[\]]*\]\s*", text) else None
    number = exact_number(text)
    if number is None:
        return None
    if row["answer_type"] == "integer":
        return int(number)
    try:
        return round(float(number), int(row["precision"]))
    except OverflowError:  # beyond what a float holds, as no gold answer is
        return math.inf


def yes_or_no(text: str) -> str | None:
    """The first word, if it is yes or no; else that of the two that the text has, if it has only one."""
    words = re.findall(r"[a-z]+", text.lower())
    said = set(words[:1]) & {"yes", "no"} or set(words) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def ocrbench_contains(text: str, answers: Sequence[str], formula: bool) -> bool:
    """OCRBench's rule: an answer is part of the text, ignoring case or, for formulas (HME100k), spaces instead."""

    def plain(string: str) -> str:
        string = string.strip().replace("\n", " ")
        return string.replace(" ", "") if formula else string.lower()

    return any(plain(answer) in plain(text) for answer in answers)


def as_list(value: Any) -> list[str]:
    """A column that is a list, a list written as text ("['a', 'b']"), or one value."""
    if isinstance(value, str) and value.startswith(("['", '["')):
        value = literal_eval(value)
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _letters(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(options))]


# --- scorers: (response, row) -> Verdict -------------------------------------------------------------------------


def _judged(response: str, gold: Any, reader: Callable[[str], Any]) -> Verdict:
    committed = extract_answer(response, "first")
    found = reader(own_words(response).strip() if committed is None else committed)
    if found is None:
        return Verdict.NO_ANSWER if committed is None else Verdict.UNPARSEABLE
    return Verdict.CORRECT if found == gold else Verdict.WRONG


def wemath_row(response: str, row: Row) -> Verdict:
    """Whether the letter is right: that in WeMath's template, else the one that the answer commits to."""
    in_template = wemath_letter(own_words(response))
    return _judged(response, row["answer"], lambda text: in_template or chosen_letter(text))


def mathvista_row(response: str, row: Row) -> Verdict:
    """Whether the option, number or list that MathVista's script would read (without its GPT) is right."""
    gold = row["answer"]
    if row["question_type"] != "multi_choice":
        gold = re.sub(r"\s", "", gold) if row["answer_type"] == "list" else float(gold)
    return _judged(response, gold, lambda text: mathvista_value(text, row))


def mathverse_row(response: str, row: Row) -> Verdict:
    """Whether the letter, or mathematically the answer, is right; MathVerse's script asks a GPT or compares text."""
    if row["question_type"] == "multi-choice":
        return _judged(response, row["answer"], chosen_letter)

    def same(text: str) -> bool | None:
        bare = 0 < len(text.split()) <= BARE_WORDS or extract_answer(response, "first") is not None
        return same_answer(text, row["answer"]) if bare else None

    return _judged(response, True, same)


def hallusion_row(response: str, row: Row) -> Verdict:
    """HallusionBench: yes or no."""
    return _judged(response, row["answer"], yes_or_no)


def ai2d_row(response: str, row: Row) -> Verdict:
    """Whether the letter, or the option whose text is the answer, is right."""
    return _judged(response, row["answer"], lambda text: option_letter(text, row["options"]))


def mmmu_row(response: str, row: Row) -> Verdict:
    """Whether MMMU's script would call it right: an open answer, or the letter or text of an option."""
    if row["question_type"] != "multiple-choice":
        return _judged(response, True, lambda text: mmmu_open(text, as_list(row["answer"])) if text else None)
    options = as_list(row["options"])
    return _judged(response, row["answer"], lambda text: mmmu_letter(text, options) or option_letter(text, options))


def mmstar_row(response: str, row: Row) -> Verdict:
    """Whether the letter is right: that by MMStar's rule, else the one that the answer commits to."""
    return _judged(response, row["answer"], lambda text: mmstar_letter(text) or chosen_letter(text))


def ocrbench_row(response: str, row: Row) -> Verdict:
    """Whether the response contains an answer, as in OCRBench's script; in formulas spaces do not count."""
    formula = row["dataset"] == "HME100k"
    return _judged(response, True, lambda text: ocrbench_contains(text, row["answer"], formula) if text else None)


# --- structured metrics ------------------------------------------------------------------------------------------


def wemath_points(steps: Sequence[bool], whole: bool) -> tuple[float, float]:
    """WeMath's four-dimensional score of one problem, (strict, loose), from its one-step parts and the whole.

    Complete mastery is 1, inadequate generalisation (all parts, not the whole) 0.5, insufficient knowledge 0, and rote
    memorisation (the whole, not the parts) 0: mastery needs all parts if strict, one if loose. The mean over problems
    is the published score, 1 - (0.5 IG + IK + RM) / problems (arXiv 2407.01284).
    """
    if whole:
        return float(all(steps)), float(any(steps))
    return (0.5, 0.5) if all(steps) else (0.0, 0.0)


def wemath_units(records: Sequence[Row]) -> Units:
    """Strict and loose points of each problem and sample; a problem that a limit has cut in two is left out."""
    parts: dict[str, dict[int, dict[str, bool]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        steps, _, part = record["key"].partition("_")
        parts[f"{steps}/{record['ID']}"][record["sample"]][part] = record["score"] == 1.0
    units: Units = {"strict": defaultdict(list), "loose": defaultdict(list)}
    for problem, samples in parts.items():
        for answers in samples.values():
            if len(answers) == int(problem[0]) + 1:  # "2steps": 1, 2 and multi
                whole = answers.pop("multi")
                for values, points in zip(units.values(), wemath_points(list(answers.values()), whole), strict=True):
                    values[problem].append(points)
    return units


HALLUSION_UNITS = {  # all questions of a unit must be right: one question, one figure, or one question on all figures
    "aAcc": ("category", "subcategory", "set_id", "figure_id", "question_id"),
    "fAcc": ("category", "subcategory", "set_id", "figure_id"),
    "qAcc": ("category", "subcategory", "set_id", "question_id"),
}


def hallusion_units(records: Sequence[Row]) -> Units:
    """Accuracy by question, by figure and by question over figures; the clusters are the sets, which share figures."""
    units: Units = {}
    for name, columns in HALLUSION_UNITS.items():
        right: dict[tuple, list[float]] = defaultdict(list)
        for record in records:
            right[(*(str(record[column]) for column in columns), record["sample"])].append(record["score"])
        units[name] = defaultdict(list)
        for unit, scores in right.items():
            units[name]["/".join(unit[:3])].append(min(scores))
    return units


@dataclass(frozen=True)
class StructuredMetric:
    """The mean of components, each of which is a mean over units of its own.

    All samples have the same units, so a component is also the mean of its values in the single samples: components
    are averaged over the runs before the formula, as in the paper. Intervals are clustered by what `units` groups by,
    to first order (each cluster's pull on the headline), with Student's quantile.
    """

    units: Callable[[Sequence[Row]], Units]

    def __call__(self, records: Sequence[Row]) -> dict[str, Any]:
        """`score` in [0, 1], its 95 % `interval`, and each component; all None if no unit is complete."""
        from common.estimators import interval  # scipy: a second that `--help` need not wait

        units = self.units(records)
        if not any(values for clusters in units.values() for values in clusters.values()):
            return {"score": None, "interval": None, **dict.fromkeys(units)}
        score, rates, pulls = _influence(units)
        half = _half_width(pulls.values())
        low, high = (score - half, score + half) if half else interval([[score]] * len(pulls))
        return {"score": score, "interval": [max(0.0, low), min(1.0, high)], **rates}

    def difference(self, a: Sequence[Row], b: Sequence[Row]) -> tuple[float, float, float, float]:
        """Score of a minus that of b on the same questions: (difference, low, high, two-sided p-value)."""
        from scipy import stats

        from common.estimators import paired_difference

        (score_a, _, pulls_a), (score_b, _, pulls_b) = _influence(self.units(a)), _influence(self.units(b))
        if pulls_a.keys() != pulls_b.keys():
            raise ValueError("the two runs have different questions: evaluate both with the same data and limit")
        pulls = [pulls_a[cluster] - pulls_b[cluster] for cluster in pulls_a]
        half = _half_width(pulls)
        if not half:
            return paired_difference([[score_a]] * len(pulls), [[score_b]] * len(pulls))
        difference = score_a - score_b
        degrees = len(pulls) - 1
        p_value = 2 * stats.t.sf(abs(difference) / half * stats.t.ppf(0.975, degrees), degrees)
        return difference, max(-1.0, difference - half), min(1.0, difference + half), float(p_value)


def _influence(units: Units) -> tuple[float, dict[str, float], dict[str, float]]:
    """The score, its components, and how far each cluster pulls the score, compared with a cluster at the mean."""
    rates, pulls = {}, defaultdict(float)
    for name, clusters in units.items():
        count = sum(map(len, clusters.values()))
        rates[name] = sum(map(sum, clusters.values())) / count
        for cluster, values in clusters.items():
            pulls[cluster] += sum(value - rates[name] for value in values) / count / len(units)
    return sum(rates.values()) / len(rates), rates, dict(pulls)


def _half_width(pulls) -> float:
    """Half the width of the 95 % interval; 0 where no spread is seen."""
    from scipy import stats

    pulls = list(pulls)
    total = math.fsum(pull * pull for pull in pulls)
    if len(pulls) < 2 or total < 1e-24:
        return 0.0
    return float(stats.t.ppf(0.975, len(pulls) - 1)) * math.sqrt(total * len(pulls) / (len(pulls) - 1))
