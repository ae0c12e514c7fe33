"""The coder by rules: which questions are arithmetic, and the skills of these."""

import numpy as np
import pytest

from r_diverse import objective, skills
from r_diverse.arithmetic import ArithmeticCoder, arithmetic_programs
from r_diverse.skills import Program, SkillEncoder


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is 2 + 3?", "add(n1, n2)"),
        ("Compute 1,000+7.5 .", "add(n1, n2)"),
        ("007 + 4", "add(n1, n2)"),
        ("What is 5 - 2 - 1?", "subtract(subtract(n1, n2), n3)"),
        ("What is 5 - 2 * 3 / 4?", "subtract(n1, divide(multiply(n2, n3), n4))"),
        ("(3 + 4) * (5 - 6)", "multiply(add(n1, n2), subtract(n3, n4))"),
        ("-3 + +4", "add(negative(n1), n2)"),
        ("3**2 + 2^5", "add(power(n1, n2), power(n3, n4))"),
        ("17 % 5", "remainder(n1, n2)"),
        ("Double-check: what is 6 * 7?", "multiply(n1, n2)"),
        ("9" * 5_000 + " + 1", "add(n1, n2)"),
    ],
)
def test_arithmetic_programs(question, expected):
    (program,) = ArithmeticCoder().write([question])
    assert program.code.splitlines()[-1].strip() == f"return {expected}"
    assert skills.check_program(program.code, question) == program


@pytest.mark.parametrize(
    "question",
    [
        "What is 5?",
        "What is 2 + 3 = 5?",
        "What is 2 + 3? And what is 4 + 5?",
        "Problem 1: 2 + 3",
        "Tom has 3 apples.",
        "the sum of 3 and 4",
        "x + 3",
        "3 + 4 +",
        "3 4 + 5",
        "3 // 4",
        "3 * * 4",
        "2(3 + 4)",
        "((3 + 4)",
        "(" * 60 + "3 + 4" + ")" * 60,
        "n1 + n2",
        "__import__('os').system('x') + 1 + 2",
        "- - 5",
        "1" + " + 1" * 300,
        "1 " + "- " * 300 + "1",
        "1 if 2 else 3",
        "1 , 2 + 3",
    ],
)
def test_other_questions_are_no_arithmetic(question):
    assert ArithmeticCoder().write([question]) == [Program(None, "not_arithmetic")]


def test_skills_of_arithmetic_ignore_numbers_and_tell_operations_apart(minilm):
    encoder = skills.minilm(centre=arithmetic_programs(), device="cpu")
    assert encoder.name != minilm.name
    questions = ["1 + 2", "30 + 40", "1 + 2 + 3", "5 - 6", "5 - 6 - 7", "8 * 9", "8 * 9 * 10", "6 / 3"]
    embeddings, ok = SkillEncoder(ArithmeticCoder(), encoder).encode(questions)
    assert ok.all()
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    penalty = objective.repetition_penalty(embeddings) * len(questions)  # at the paper's threshold
    assert penalty.round(6).tolist() == [3, 3, 3, 2, 2, 2, 2, 1]
    # without a centre all programs are alike to a small general encoder: one cluster
    plain, _ = SkillEncoder(ArithmeticCoder(), minilm).encode(questions)
    assert objective.repetition_penalty(plain).tolist() == [1.0] * len(questions)
