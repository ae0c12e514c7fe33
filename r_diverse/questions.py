"""Prompts of Challenger and Solver, and what is read from the Challenger's outputs (R-Zero, arXiv 2508.05004).

R-Diverse keeps R-Zero's prompts. The wording here is our own, after their description; `RDiverseConfig` takes others.
Everything that is read here was written by a model: it is cut out as text, never formatted, evaluated or executed.
"""

import re
from typing import Any, NamedTuple

from .skills import MAX_QUESTION, clean, neutralise

Messages = list[dict[str, Any]]

CHALLENGER_SYSTEM = """You set problems for mathematics competitions. Think in private first, and invent one new \
problem that needs real reasoning. It may come from algebra, geometry, number theory, combinatorics, prealgebra, \
probability, statistics or calculus. Fewer than three in ten advanced high-school students should solve it. Do not \
take a famous problem, and do not vary one. Then write exactly two blocks and nothing after them:

<question>
The whole problem, with a single answer that can be checked.
</question>

\\boxed{final_answer}"""
CHALLENGER_USER = "Write one new, challenging reasoning problem now. Use the format of the instructions."
SOLVER_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

# R-Zero's form for a model whose tokenizer has no chat template: "system: ...", then "user: ...", and nothing after it
PLAIN_TEMPLATE = (
    "{%- if bos_token %}{{- bos_token }}{%- endif %}"
    r"{%- for m in messages %}{{- m['role'] + ': ' + m['content'] }}{%- if not loop.last %}{{- '\n' }}{%- endif %}"
    "{%- endfor %}"
)

OPEN, CLOSE = "<question>", "</question>"
BOX = "\\boxed{"
FAILURES = ("no_question", "several_blocks", "long_question", "empty_question", "no_box")
THOUGHT_END = "</think>"
_THOUGHT = re.compile(r"^\s*<think>|\n[^\S\n]*<think>")  # elsewhere in a line it is a word


class Challenge(NamedTuple):
    """A question of the Challenger and its own answer (only checked for its form), or why there is none."""

    question: str
    answer: str | None
    failure: str | None = None

    @property
    def valid(self) -> bool:
        return self.failure is None


def challenger_prompt(system: str = CHALLENGER_SYSTEM, user: str = CHALLENGER_USER) -> Messages:
    """The one prompt of the Challenger: it gets no data."""
    return _messages(system, user)


def solver_prompt(question: str, system: str = SOLVER_SYSTEM) -> Messages:
    """The prompt that asks the Solver a question. What looks like a control token in it becomes plain text."""
    return _messages(system, neutralise(question))


def _messages(system: str, user: str) -> Messages:
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]


def read_challenge(output: str) -> Challenge:
    """The last `<question>` block and the last closed `\\boxed{}` of an output; both are needed.

    What a model thinks is not read: up to the last `</think>`, or from a `<think>` on that has no end, it drafts
    questions and repeats the form that it was asked for. Failures, FAILURES: "no_question" (no closed block),
    "several_blocks" (a tag inside the question), "long_question", "empty_question", "no_box" (none, none closed, or
    empty).
    """
    before, close, after = output.rpartition(CLOSE)
    before, opened, inside = before.rpartition(OPEN)
    before = before.rpartition(THOUGHT_END)[2]
    if not (opened and close) or THOUGHT_END in after or _THOUGHT.search(before):
        return Challenge("", None, "no_question")
    if CLOSE in inside:
        return Challenge("", None, "several_blocks")
    if len(inside) > MAX_QUESTION:
        return Challenge("", None, "long_question")
    question = clean(inside)
    if not question:
        return Challenge("", None, "empty_question")
    answer = last_box("".join((before, opened, inside, close, after)))
    return Challenge(question, answer, None) if answer else Challenge(question, None, "no_box")


def last_box(text: str) -> str | None:
    """Content of the last `\\boxed{}` whose braces balance, stripped; None if there is none or it is empty.

    `\\{` and `\\}` do not count as braces: they need not come in pairs (`\\left\\{ ... \\right.`).
    """
    open_braces: list[int] = []  # one pass, since an output may be nothing but boxes
    last = (-1, -1)
    for match in re.finditer(r"\\[\\{}]|[{}]", text):
        if match[0] == "{":
            open_braces.append(match.end())
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if text.endswith(BOX, 0, start):
                last = max(last, (start, match.start()))
    return text[slice(*last)].strip() or None if last[0] >= 0 else None
