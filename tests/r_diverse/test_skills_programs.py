"""What is a program in a coder's answer. Nothing of it may run or stop the parser."""

import ast
import time
from pathlib import Path

import pytest
from r_diverse_coders import ADD, block

from r_diverse import arithmetic, skills
from r_diverse.skills import Program

QUESTION = "How many marbles are left in the big green bag after 3 were taken out?"


@pytest.mark.parametrize(
    "answer",
    [
        block(ADD),
        f"Here it is:\n{block(ADD)}\nDone.",
        block(f"```python\n{ADD}\n```"),
        f"```python\n{ADD}\n```",
        f"Sure.\n```\n{ADD}\n```\n",
        f"```PY \n    {ADD.replace(chr(10), chr(10) + '    ')}\n```",
        f"<CODE>\n{ADD}\n",  # the stop string is not part of a generation
        block(f"# adds\n{ADD}  # end\n\nprint(solver())\nif __name__ == '__main__':\n    solver()"),
        block("def solver(n1 = 1,n2=2) :\n  '''Adds.'''\n  'a comment'\n  pass\n  return (n1+n2)"),
        block(f"    {ADD.replace(chr(10), chr(10) + '    ')}"),
    ],
)
def test_one_program_in_many_layouts(answer):
    assert skills.read_answer(answer, True, "What is 1 + 2?") == Program(ADD)


@pytest.mark.parametrize("text", ["x y", "marbles", "a text of some length that copies nothing", QUESTION[:20]])
def test_text_constants_that_copy_nothing_are_no_echo(text):
    code = f"def solver(n1=3):\n    return '{text}'"
    assert skills.read_answer(block(code), True, QUESTION) == Program(code)


def test_imports_belong_to_the_program():
    code = f"import math\nfrom sympy import symbols\n{ADD}"
    assert skills.read_answer(block(code), True, "q").code == f"import math\nfrom sympy import symbols\n\n{ADD}"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", "no_block"),
        ("I cannot answer that.", "no_block"),
        (ADD, "no_block"),
        (block(ADD) * 2, "several_blocks"),
        (block(f"<CODE>{ADD}"), "several_blocks"),
        (f"{block(ADD)}</CODE>", "several_blocks"),
        (f"```\n{ADD}\n```\n```\n{ADD}\n```", "several_blocks"),
        (block(f"```\n{ADD}\n```\n```\n{ADD}\n```"), "several_blocks"),
        (block(""), "no_solver"),
        (block("def solve(n1=1):\n    return n1"), "no_solver"),
        (block("solver = lambda n1=1: n1"), "no_solver"),
        (block("async def solver(n1=1):\n    return n1"), "no_solver"),
        (block("class A:\n    def solver(self):\n        return 1"), "no_solver"),
        (block(f"{ADD}\n\n{ADD}"), "several_functions"),
        (block(f"def helper(x):\n    return x\n\n{ADD}"), "several_functions"),
        (block("def solver(n1=1):\n    pass"), "empty_solver"),
        (block("def solver(n1=1):\n    'text'\n    ...\n    pass"), "empty_solver"),
        (block("def solver(n1=1:\n    return n1"), "unparseable"),
        (block("def solver():\n    return 1\x00"), "unparseable"),
        (block(f"Input Question: {QUESTION}\nOutput:"), "unparseable"),
        (block(f"def solver(n1=3):\n    x = '{QUESTION}'\n    return n1"), "echo"),
        (block("def solver(n1=3):\n    return 'You encode maths problems as logic. Write'"), "echo"),
        (block(skills.EXAMPLES[0][1]), "echo"),
        (block(f"{ADD}{' ' * skills.MAX_PROGRAM}"), "too_large"),
        (block(f"def solver():\n    return {'(' * 60}1{')' * 60}"), "too_large"),
    ],
)
def test_answers_that_are_no_program(answer, failure):
    assert skills.read_answer(answer, True, QUESTION).failure == failure


def test_an_answer_cut_at_the_limit_is_truncated():
    assert skills.read_answer(block(ADD), False, "q") == Program(None, "truncated")


@pytest.mark.parametrize(("question", "code"), skills.EXAMPLES)
def test_examples_of_the_prompt_are_programs_and_no_echo_of_their_own_question(question, code):
    program = skills.read_answer(block(code), True, question)
    assert program.ok and program.code in skills._example_codes()
    assert skills.read_answer(block(code), True, "What is the largest prime?").failure == "echo"


def parser_attacks() -> dict[str, str]:
    head = "def solver():\n return "
    return {
        "minus": head + "-" * 19_000 + "1",
        "not": head + "not " * 4_000 + "1",
        "attributes": head + "a" + ".b" * 9_000,
        "sum": head + "1+" * 9_000 + "1",
        "power": head + "2**" * 6_000 + "2",
        "digits": head + "9" * 19_000,
        "lambda": head + "lambda x: " * 1_900 + "1",
        "ternary": head + "1 if 1 else " * 1_500 + "1",
        "brackets": head + "(" * 19_000,
        "balanced": head + "[" * 45 + "a b" + "]" * 45,
        "calls": head + "f(" * 45 + "a b" + ")" * 45,
        "dictionaries": head + "{a:" * 45 + "a b" + "}" * 45,
        "braces": head + "f'" + "{" * 300 + "'",
        "blocks": "def solver():\n" + "".join(" " * i + "if x:\n" for i in range(1, 150)),
        "targets": head.replace("return ", "") + "a = " * 4_000 + "1",
        "escapes": head + r"'\d\q\N{x}'",
        "escapes that Python warns of": head + r"'\d\q'",
        "text": head + "'" * 19_000,
        "continued": "\\\n" * 9_000,
        "decorators": "@a\n" * 6_000 + "def solver(): return 1",
        "match": "def solver():\n match x:\n  case " + "(" * 40 + "a b" + ")" * 40 + ": pass",
        "surrogate": head + "'\ud800'",
    }


@pytest.mark.parametrize("kind", parser_attacks())
def test_no_program_stops_the_parser(kind, recwarn):
    start = time.monotonic()
    program = skills.check_program(parser_attacks()[kind], "q")
    assert time.monotonic() - start < 2
    assert not recwarn.list
    if program.ok:
        assert ast.unparse(ast.parse(program.code)) == program.code


def test_programs_are_never_run(tmp_path):
    path = tmp_path / "ran"
    attacks = [
        f"import os\nos.system('touch {path}')\n{ADD}",
        f"def solver(n1=open('{path}', 'w')):\n    return n1",
        f"@(lambda f: open('{path}', 'w'))\n{ADD}",
        f"from pathlib import Path\ndef solver(n1: Path('{path}').touch() = 1):\n    return n1",
        "def solver():\n    return 9 ** 9 ** 9 ** 9",
        "import this_module_does_not_exist\ndef solver():\n    while True:\n        continue",
        "def solver():\n    raise SystemExit",
    ]
    for attack in attacks:
        assert skills.read_answer(block(attack), True, "q").ok
    assert not path.exists()
    for module in (skills, arithmetic):
        tree = ast.parse(Path(module.__file__).read_text())
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
        assert not called & {"eval", "exec", "compile", "__import__", "literal_eval"}
