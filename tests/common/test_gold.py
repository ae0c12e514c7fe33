"""The real files: row counts, gold answers against themselves as responses of others, and golds that are not read.

Of the 2,866 gold answers of the seven math files, all are right against themselves. Four are not mathematics to the
grader (`UNREAD`): there only the same text is right, and an equal answer that is written in another way is wrong.
"""

import json

import pytest

from common.answers import Verdict, grade_many
from common.evaluation import load_benchmark, score_responses
from common.runs import read_jsonl

MATH_ROWS = {
    "math500": 500, "gsm8k": 1319, "minerva_math": 272, "olympiadbench": 675, "amc23": 40, "aime24": 30, "aime25": 30
}  # fmt: skip
SRPO_ROWS = {
    "sciknoweval_chemistry": ("sciknoweval/chemistry/test.json", 210),
    "sciknoweval_physics": ("sciknoweval/physics/test.json", 80),
    "sciknoweval_biology": ("sciknoweval/biology/test.json", 50),
    "sciknoweval_materials": ("sciknoweval/material/test.json", 94),
    "tooluse": ("tooluse/test.json", 68),
}
FRAMES = (
    "So it is \\boxed{%s}.",
    "First \\boxed{-7}, no: $$\\boxed{ \\displaystyle %s \\,}$$",
    "<think>\\boxed{-7}</think>\nThe answer is $%s$.",
)
# Gold answers that are no mathematics to the grader: code, dollar signs inside, text in an index, operators' notation
UNREAD = {
    ("minerva_math", "5"): "np.arcsin(10/13)",
    ("minerva_math", "72"): r"x_{0} \cos (\omega t)+$ $\dot{x}_{0} \sin (\omega t) / \omega",
    ("minerva_math", "132"): r"m l \ddot{\theta}(t)-m g \sin \theta(t)=f(t) \cos \theta(t)",
    ("olympiadbench", "96"): "$t(0,4]$",
}
# Nested tool inputs, which the release's scorer reads up to their first closing brace: its rule, kept as it is
NEVER_RIGHT = {"tooluse": ["26", "33"]}
# Neighbours in a file whose different texts are the same answer
SAME_AS_NEXT = {("math500", "22"): ("5", "x=5")}


def math(shared_data, name):
    return load_benchmark(name, shared_data / "math" / f"{name}.jsonl")


def scored(benchmark, responses: list[tuple[str, str]], folder) -> dict:
    """Metrics of a file of responses (question, text)."""
    path = folder / "theirs.jsonl"
    path.write_text("".join(json.dumps({"id": key, "response": text}) + "\n" for key, text in responses))
    return score_responses(benchmark, path, folder / "out")


@pytest.mark.parametrize("name", MATH_ROWS)
def test_math_gold_answers_as_responses_are_all_right(shared_data, name, tmp_path):
    benchmark = math(shared_data, name)
    golds = [(row["id"], row["answer"]) for row in benchmark.rows]
    metrics = scored(benchmark, [(key, frame % gold) for frame in FRAMES for key, gold in golds], tmp_path)
    wrong = [record for record in read_jsonl(tmp_path / "out" / name / "scored.jsonl") if not record["score"]]
    assert wrong == []
    assert (metrics["questions"], metrics["samples"]) == (MATH_ROWS[name], 3)
    assert (metrics["avg@k"], metrics["parsed"], metrics["pass@k"]) == (1.0, 1.0, {1: 1.0, 3: 1.0})
    assert metrics["interval"][0] < 1.0 == metrics["interval"][1]


@pytest.mark.parametrize("name", SRPO_ROWS)
def test_srpo_gold_answers_as_responses_are_right_where_the_release_can_read_them(shared_data, name, tmp_path):
    path, rows = SRPO_ROWS[name]
    benchmark = load_benchmark(name, shared_data / path)
    metrics = scored(benchmark, [(row["id"], srpo_response(row["answer"])) for row in benchmark.rows], tmp_path)
    wrong = [record["id"] for record in read_jsonl(tmp_path / "out" / name / "scored.jsonl") if not record["score"]]
    assert wrong == NEVER_RIGHT.get(name, [])
    assert (metrics["questions"], metrics["avg@k"]) == (rows, pytest.approx(1 - len(wrong) / rows))


def srpo_response(gold: str) -> str:
    if len(gold) == 1:
        return f"Because of that: <answer>{gold}</answer>"
    calls = json.loads(gold)
    return "\n".join(f"Action: {call['Action']}\nAction Input: {call['Action_Input']}" for call in calls)


@pytest.mark.parametrize("name", MATH_ROWS)
def test_gold_answers_that_the_grader_cannot_read_are_named(shared_data, name):
    rows = math(shared_data, name).rows
    unread = {}
    for probe in (r"\boxed{\sqrt{q}+\sin(17)+w}", r"\boxed{q=w^2+\sqrt{3}}"):
        verdicts = grade_many([probe] * len(rows), [row["answer"] for row in rows])
        for row, verdict in zip(rows, verdicts, strict=True):
            assert verdict in (Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.GOLD_UNPARSEABLE)
            if verdict is Verdict.GOLD_UNPARSEABLE:
                unread[name, row["id"]] = row["answer"]
    assert unread == {key: gold for key, gold in UNREAD.items() if key[0] == name}


@pytest.mark.parametrize("name", MATH_ROWS)
def test_the_next_questions_gold_answer_is_right_only_where_it_is_the_same(shared_data, name):
    rows = math(shared_data, name).rows
    golds = [row["answer"] for row in rows]
    others = golds[1:] + golds[:1]
    verdicts = grade_many([f"\\boxed{{{other}}}" for other in others], golds)
    same = {
        (name, row["id"]): (gold, other)
        for row, gold, other, verdict in zip(rows, golds, others, verdicts, strict=True)
        if verdict is Verdict.CORRECT and gold != other
    }
    assert same == {key: pair for key, pair in SAME_AS_NEXT.items() if key[0] == name}
    assert all(v is Verdict.CORRECT for v, a, b in zip(verdicts, golds, others, strict=True) if a == b)
