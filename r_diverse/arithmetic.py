"""Skills of arithmetic questions by rules: the coder of the tiny preset, and of tests that need no language model."""

import ast
import re
from collections.abc import Sequence

from .skills import CHECKS, MAX_NESTING, Program, check_program, nesting

_SCANNER = re.compile(r"(?P<number>\d+(?:,\d{3})*(?:\.\d+)?)|(?P<sign>\*\*|[-+*/%^()])|(?P<space>\s+)|(?P<other>.)")
_CALLS = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Mod: "remainder",
    ast.Pow: "power",
    ast.USub: "negative",
}
MAX_EXPRESSION = 400  # characters, after numbers became names


class ArithmeticCoder:
    """Rules for questions that hold one arithmetic expression: `What is 12 + 7 * 3?` is `add(n1, multiply(n2, n3))`.

    Numbers become arguments without a value, so questions that differ only in their numbers share one program.
    Operations are calls by name, because small sentence encoders hardly see signs. Takes + - * / % ^ with brackets.
    Any other question, and one with a number outside its expression, fails as "not_arithmetic".
    """

    name = f"arithmetic rules {CHECKS}"

    def write(self, questions: Sequence[str]) -> list[Program]:
        return [self._write(question) for question in questions]

    def _write(self, question: str) -> Program:
        expression, numbers = _expression(question)
        tree = _arithmetic(expression)
        if tree is None:
            return Program(None, "not_arithmetic")
        used = sorted({_CALLS[type(node)] for node in ast.walk(tree) if type(node) in _CALLS})
        arguments = ", ".join(f"n{i}" for i in range(1, numbers + 1))
        source = f"from numpy import {', '.join(used)}\ndef solver({arguments}):\n    return {_as_calls(tree)}"
        return check_program(source, question)


def arithmetic_programs() -> list[str]:
    """Programs of all expressions of one and two of + - * / without brackets: a `centre` for `SentenceEncoder`."""
    one = [f"1 {a} 2" for a in "+-*/"]
    two = [f"1 {a} 2 {b} 3" for a in "+-*/" for b in "+-*/"]
    return [program.code for program in ArithmeticCoder().write(one + two)]


def _expression(question: str) -> tuple[str, int]:
    """The only run of numbers and signs of a question, with n1, n2, ... for its numbers, and how many there are."""
    runs, numbers = [""], 0
    for token in _SCANNER.finditer(question):
        if token.lastgroup == "number":
            numbers += 1
            runs[-1] += f" n{numbers}"
        elif token.lastgroup == "sign":
            runs[-1] += " " + {"^": "**"}.get(token[0], token[0])
        elif token.lastgroup == "other":
            runs.append("")
    runs = [run for run in runs if "n" in run]
    return (runs[0].strip(), numbers) if len(runs) == 1 else ("", numbers)


def _arithmetic(expression: str) -> ast.expr | None:
    """The tree of an expression with at least one operation between two numbers; None for any other text."""
    if len(expression) > MAX_EXPRESSION or nesting(expression) > MAX_NESTING:
        return None
    try:
        tree = ast.parse(expression, mode="eval").body
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    allowed = ast.BinOp | ast.UnaryOp | ast.Name | ast.Load | ast.UAdd
    known = all(isinstance(node, allowed) or type(node) in _CALLS for node in nodes)
    return tree if known and any(isinstance(node, ast.BinOp) for node in nodes) else None


def _as_calls(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return f"{_CALLS[type(node.op)]}({_as_calls(node.left)}, {_as_calls(node.right)})"
    if isinstance(node, ast.UnaryOp):
        inner = _as_calls(node.operand)
        return inner if isinstance(node.op, ast.UAdd) else f"negative({inner})"
    return node.id
