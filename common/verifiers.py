"""Reward functions in TRL's signature, built on `common.answers`.

    f(completions, **columns) -> list[float | None]        one reward for each completion

`completions` are strings, or conversations (lists of messages; the last assistant message counts). The gold answer is
the column `answer`, one for each completion. A None gold gives None: this verifier does not apply to that row, and
TRL leaves it out. A data set without that column is a `ValueError`, because a silent 0 would train on nothing.
Where TRL passes `log_metric`, the shares of the verdicts are logged (`verdict/correct`, `verdict/timeout`, ...).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from common._extract import after_thinking
from common.answers import Verdict, chosen_letter, exact_number, extract_answer, gold_letter, grade_many

__all__ = [
    "check_gold",
    "choice_reward",
    "completion_text",
    "format_reward",
    "length_penalty",
    "math_reward",
    "numeric_reward",
    "tool_call_reward",
]

Completion = str | list[dict]
LogMetric = Callable[[str, float], None]

LETTERS = "ABCD"  # whose shares are logged: a policy that stops reading the options prefers one
_MAX_CALL_CHARS = 100_000
_NAMES = {"name": ("name", "arguments"), "Action": ("Action", "Action_Input")}
_ACTION = re.compile(r"Action:\s*(\w+)")
_ACTION_INPUT = re.compile(r"^[ \t]*Action Input:\s*\{", re.MULTILINE)
_FIRST_BRACES = re.compile(r"Action Input:\s*(\{[^}]*\})")


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    log_metric: LogMetric | None = None,
    which: str = "last",
    whole: bool = False,
    **columns,
) -> list[float | None]:
    """1.0 where the final answer is mathematically the gold answer, else 0.0; None for an unusable gold answer.

    `which`: the "last" or the "first" answer that a completion commits to. `whole`: a short one
    that commits to none is an answer as a whole.
    """
    golds = _column("answer", answer, completions)
    verdicts = grade_many([completion_text(completion) for completion in completions], golds, which=which, whole=whole)
    return _rewards(verdicts, golds, log_metric)


def choice_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    log_metric: LogMetric | None = None,
    compatible: bool = False,
    **columns,
) -> list[float | None]:
    """1.0 where the response commits to the gold choice letter and to no other ("A or B" is wrong), else 0.0.

    The letter may stand in a box, in `<answer>` tags, after "The answer is", or be all of the response: C, (C), c.
    With `compatible` as in the release of SDPO (arXiv 2601.20802): what stands between the last `<answer>` and the
    next `</answer>` is the letter itself, or wrong; without the opening tag the whole response is read so.
    Logged beside the verdicts: `letter/A` ... `letter/D`, shares of the letters among the responses that have one;
    with `compatible` also `untagged`, the share of responses without the opening tag.
    """
    golds = _column("answer", answer, completions)
    judge_one = _compatible_choice if compatible else _choice_verdict
    texts = [completion_text(completion) for completion in completions]
    results = [judge_one(text, gold) for text, gold in zip(texts, golds, strict=True)]
    if log_metric is not None and compatible and texts:
        log_metric("untagged", sum("<answer>" not in text for text in texts) / len(texts))
    if log_metric is not None and (chosen := Counter(letter for letter, _ in results if letter)):
        for letter in LETTERS:
            log_metric(f"letter/{letter}", chosen[letter] / chosen.total())
    return _rewards([verdict for _, verdict in results], golds, log_metric)


def _compatible_choice(response: str, gold: str | None) -> tuple[str | None, Verdict]:
    chosen = response.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    letter = chosen if len(chosen) == 1 else None
    if gold is None:
        return letter, Verdict.GOLD_UNPARSEABLE
    return letter, Verdict.CORRECT if chosen == gold else Verdict.WRONG if letter else Verdict.UNPARSEABLE


def _choice_verdict(response: str, gold: str | None) -> tuple[str | None, Verdict]:
    wanted, committed = gold_letter("" if gold is None else str(gold)), extract_answer(response)
    chosen = chosen_letter(response if committed is None else committed)
    if wanted is None:
        return chosen, Verdict.GOLD_UNPARSEABLE
    if chosen is None:
        return None, Verdict.NO_ANSWER if committed is None else Verdict.UNPARSEABLE
    return chosen, Verdict.CORRECT if chosen == wanted else Verdict.WRONG


def numeric_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | float | None] | None = None,
    tolerance: Sequence[float | None] | float | None = None,
    log_metric: LogMetric | None = None,
    **columns,
) -> list[float | None]:
    """1.0 where the final answer is a numeral equal to the gold number, or within `tolerance` of it, else 0.0.

    `tolerance` is absolute, one for each row (a column) or one for all; without it the numbers must be equal.
    """
    golds = _column("answer", answer, completions)
    is_column = isinstance(tolerance, Sequence) or getattr(tolerance, "ndim", 0) == 1
    limits = list(tolerance) if is_column else [tolerance] * len(golds)
    if wrong := next((limit for limit in limits if limit is not None and not 0 <= limit < math.inf), None):
        raise ValueError(f"tolerance must be at least 0 and finite, got {wrong}: mend the column or the argument")
    rows = zip(completions, golds, limits, strict=True)
    verdicts = [_numeric_verdict(completion_text(completion), gold, limit) for completion, gold, limit in rows]
    return _rewards(verdicts, golds, log_metric)


def _numeric_verdict(response: str, gold: str | float | None, tolerance: float | None) -> Verdict:
    wanted = None if gold is None else exact_number(str(gold))
    if wanted is None:
        return Verdict.GOLD_UNPARSEABLE
    committed = extract_answer(response)
    if committed is None:
        return Verdict.NO_ANSWER
    number = exact_number(committed)
    if number is None:
        return Verdict.UNPARSEABLE
    return Verdict.CORRECT if abs(number - wanted) <= Fraction(str(tolerance or 0)) else Verdict.WRONG


def tool_call_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | list | dict | None] | None = None,
    log_metric: LogMetric | None = None,
    compatible: bool = False,
    **columns,
) -> list[float | None]:
    """1.0 where the response makes exactly the gold tool calls, in any order, else 0.0.

    A call is `{"name": ..., "arguments": {...}}`, or ToolAlpaca's `{"Action": ..., "Action_Input": "{...}"}`; the gold
    column holds one or a list of them, as JSON text or as objects. The response gives them in the message's
    `tool_calls`, in `<tool_call>` tags, as a whole that is JSON, or as lines `Action: ...` and `Action Input: {...}`.
    Comparison is strict JSON equality: 1, 1.0, "1" and true are four values.

    With `compatible` as in the release of SDPO (arXiv 2601.20802), for ToolAlpaca: the names after `Action:` are the
    gold ones in any order, and all inputs, each read up to its first closing brace, merge to the merged gold inputs.
    Nested inputs cannot be right there, and with several calls their order may matter.

    Raises `ValueError` for gold objects with an argument that is None, which `datasets` puts where another row has it.
    """
    golds = _column("answer", answer, completions)
    for gold in golds:
        _check_arguments(gold)
    pairs = zip(completions, golds, strict=True)
    verdict = _compatible_tools if compatible else _tool_verdict
    verdicts = [verdict(completion, gold) for completion, gold in pairs]
    return _rewards(verdicts, golds, log_metric)


def _check_arguments(gold: str | list | dict | None) -> None:
    for call in gold if isinstance(gold, list) else [gold]:
        given = (call.get("arguments") or call.get("Action_Input")) if isinstance(call, dict) else None
        if isinstance(given, dict) and None in given.values():
            raise ValueError(
                f"the gold call {call!r:.200} has an argument that is None, which datasets adds where another row has "
                'it, and no right response could equal it: give the column "answer" as JSON text (json.dumps)'
            )


def _compatible_tools(completion: Completion, gold: str | list | None) -> Verdict:
    try:
        calls = _parse_json(gold)
        names = Counter(call["Action"] for call in calls)
        inputs: dict = {}
        for call in calls:
            inputs |= _parse_json(call["Action_Input"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return Verdict.GOLD_UNPARSEABLE
    response = completion_text(completion)[:_MAX_CALL_CHARS]
    merged: dict = {}
    for block in _FIRST_BRACES.findall(response):
        try:
            merged |= json.loads(block)
        except (TypeError, ValueError, RecursionError):
            continue  # the release skips what it cannot read
    made = Counter(_ACTION.findall(response))
    if not made:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if made == names and merged == inputs else Verdict.WRONG


def _tool_verdict(completion: Completion, gold: str | list | dict | None) -> Verdict:
    wanted = _calls(gold)
    if wanted is None:
        return Verdict.GOLD_UNPARSEABLE
    made = _calls(_tool_calls(completion))
    if made is None:
        return Verdict.UNPARSEABLE
    return Verdict.CORRECT if made == wanted else Verdict.WRONG


def _tool_calls(completion: Completion) -> str | list:
    message = {} if isinstance(completion, str) else _last_message(completion)
    if message.get("tool_calls"):
        return [call.get("function", call) if isinstance(call, dict) else call for call in message["tool_calls"]]
    text = after_thinking(completion_text(completion))
    tagged = [part.partition("</tool_call>")[0] for part in text.split("<tool_call>")[1:]]
    return f"[{','.join(tagged)}]" if tagged else _action_lines(text) or text


def _action_lines(text: str) -> list[dict]:
    """Calls written as `Action: name` with the `Action Input: {...}` that follows; one without an input is no call."""
    calls = []
    for part in re.split(r"^[ \t]*Action:", text[:_MAX_CALL_CHARS], flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("Action Input:")
        calls.append({"name": name.strip(), "arguments": _one_object(rest)})
    return calls


def _one_object(text: str) -> object:
    """The JSON value at the start of a text; None without one, and where the text offers another one."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    rest_of_line, _, after = text[end:].partition("\n")
    return None if _first_value(rest_of_line) is not None or _ACTION_INPUT.search(after) else value


def _first_value(text: str) -> object:
    """The JSON value that begins at the first brace; None without one."""
    try:
        return json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    except (ValueError, RecursionError):
        return None


def _calls(source: str | list | dict | None) -> Counter | None:
    """Calls as canonical JSON texts with their counts; None for what is no list of calls."""
    try:
        parsed = _parse_json(source)
        calls = parsed if isinstance(parsed, list) else [parsed]
        named = [_NAMES["Action"] if "Action" in call else _NAMES["name"] for call in calls]
        pairs = [
            {"name": call[name], "arguments": _parse_json(call[arguments])}
            for call, (name, arguments) in zip(calls, named, strict=True)
        ]
        if not all(isinstance(pair["arguments"], dict) for pair in pairs):
            return None
        return Counter(json.dumps(pair, sort_keys=True, allow_nan=False) for pair in pairs)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _parse_json(source: object) -> object:
    if not isinstance(source, str):
        return source
    if len(source) > _MAX_CALL_CHARS:
        raise ValueError("tool call too long")
    return json.loads(source)


def format_reward(completions: Sequence[Completion], **columns) -> list[float]:
    """1.0 where the response commits to an answer and thinks in one closed block or in none, else 0.0."""
    return [float(_well_formed(completion_text(completion))) for completion in completions]


def _well_formed(response: str) -> bool:
    opened, closed = response.count("<think>"), response.count("</think>")
    ordered = closed == 0 or response.find("<think>") < response.find("</think>")
    # a chat template may have opened the block in the prompt, so that the response only closes it
    return opened <= closed <= 1 and ordered and extract_answer(response) is not None


def length_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    max_length: int = 4096,
    buffer: int = 1024,
    **columns,
) -> list[float]:
    """0.0 up to `max_length - buffer`, then falling in a straight line to -1.0 at `max_length` and beyond.

    Length is in tokens where TRL passes `completion_ids`, else in characters.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length], got {buffer} with max_length {max_length}")
    sizes = [len(ids) for ids in (map(completion_text, completions) if completion_ids is None else completion_ids)]
    return [-min(1.0, max(0.0, (size - max_length + buffer) / buffer)) for size in sizes]


def completion_text(completion: Completion) -> str:
    """The words of a completion; the text parts of a message with several parts."""
    if isinstance(completion, str):
        return completion
    content = _last_message(completion).get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _last_message(messages: list[dict]) -> dict:
    return next((message for message in reversed(messages) if message.get("role", "assistant") == "assistant"), {})


def _column(name: str, values: Sequence | None, completions: Sequence) -> list:
    if values is None:
        raise ValueError(
            f'this reward needs the data set column "{name}" with the gold answers; '
            f'rename yours, for instance dataset.rename_column("solution", "{name}")'
        )
    if len(values) != len(completions):
        raise ValueError(f'column "{name}" has {len(values)} values for {len(completions)} completions')
    return list(values)


def check_gold(reward: Callable[..., list[float | None]], rows: Sequence[Mapping[str, Any]], **options: Any) -> None:
    """Raises `ValueError` at loading for the first row whose gold answer a reward function cannot use.

    Args:
        reward: one of this module's.
        rows: of a data set, with `answer` and, where there is one, `id`. None is left alone: the reward gives None
            there, which says on purpose that it does not apply.
        options: of the reward function, such as `compatible`.
    """
    probe = r"\boxed{x+1}"  # any answer: without one the gold answer would not be looked at
    for number, row in enumerate(rows):
        if "answer" not in row:
            raise ValueError(f"row {number} has no column 'answer' among {', '.join(row)}: rename your gold column")
        gold = row["answer"]
        if gold is not None and (gold == "" or reward([probe], answer=[gold], **options) == [None]):
            raise ValueError(
                f"row {row.get('id', number)} has answer={str(gold)[:80]!r}, which {reward.__name__} cannot use: mend "
                "it or leave the row out, because it would train on nothing"
            )


def _rewards(verdicts: Sequence[Verdict], golds: list, log_metric: LogMetric | None) -> list[float | None]:
    """Rewards of verdicts; rows without a gold answer do not count in the logged shares."""
    counted = Counter(verdict for verdict, gold in zip(verdicts, golds, strict=True) if gold is not None)
    if log_metric is not None and counted:
        for verdict in Verdict:
            log_metric(f"verdict/{verdict}", counted[verdict] / counted.total())
    return [None if verdict is Verdict.GOLD_UNPARSEABLE else float(verdict is Verdict.CORRECT) for verdict in verdicts]
