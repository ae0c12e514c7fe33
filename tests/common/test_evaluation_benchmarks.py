"""The registered benchmarks: decoding, questions, files and their rows, scorers of their own."""

import json
import math

import pytest
from datasets import Dataset

from common.answers import Verdict
from common.evaluation import BENCHMARKS, Benchmark, Decoding, load_benchmark
from common.evaluation.scoring import bbeh_row, reward_scorer, score_records
from common.verifiers import choice_reward

# --- registered benchmarks and their files ---


MATH = ["math500", "gsm8k", "minerva_math", "olympiadbench", "amc23", "aime24", "aime25"]
SRPO = {
    "sciknoweval_biology": "sciknoweval/biology/test.json",
    "sciknoweval_chemistry": "sciknoweval/chemistry/test.json",
    "sciknoweval_materials": "sciknoweval/material/test.json",
    "sciknoweval_physics": "sciknoweval/physics/test.json",
    "tooluse": "tooluse/test.json",
}


@pytest.mark.parametrize(
    ("names", "samples", "decoding"),
    [
        (("math500", "gsm8k", "minerva_math", "olympiadbench"), 1, Decoding(0.0, 1.0, 4096)),
        (("amc23", "aime24", "aime25"), 32, Decoding(1.0, 0.95, 4096)),
        (("mmlu_pro", "supergpqa", "bbeh"), 1, Decoding(0.0, 1.0, 8192)),
        (SRPO, 16, Decoding(0.6, 0.95, 8192)),
    ],
)
def test_samples_and_decoding_of_the_papers(names, samples, decoding):
    assert [(BENCHMARKS[name].samples, BENCHMARKS[name].decoding) for name in names] == [(samples, decoding)] * len(
        names
    )


BOX = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Which?\n\nA. x\nB. y\n\nPlease reason step by step, and put the letter of the right option within \\boxed{}."


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        ("math500", {"problem": "1+1?", "answer": 2.0}, [BOX, "1+1?"], "2"),
        ("gsm8k", {"question": "1+1?", "answer": "1+1.\n#### 1,234"}, [BOX, "1+1?"], "1234"),
        ("minerva_math", {"question": "1+1?", "solution": "So \\boxed{2}."}, [BOX, "1+1?"], "2"),
        ("olympiadbench", {"question": "1+1?", "final_answer": ["2"]}, [BOX, "1+1?"], "2"),
        ("mmlu_pro", {"question": "Which?", "options": ["x", "y"], "answer": "B"}, [LETTER], "B"),
        (
            "supergpqa",
            {"question": "Which?", "options": ["x", "y"], "answer": "y", "answer_letter": "B"},
            [LETTER],
            "B",
        ),
        ("bbeh", {"question": "Why?", "answer": "so"}, [f"Why?\n\n{BOX}"], "so"),
        ("tooluse", {"system": None, "prompt": "Call.", "answer": "{}"}, ["Call."], "{}"),
        ("tooluse", {"system": "Tools", "prompt": "Call.", "answer": "{}"}, ["Tools", "Call."], "{}"),
    ],
)
def test_a_row_becomes_a_question(name, row, prompt, answer):
    messages = BENCHMARKS[name].prompt(row)
    assert [message["role"] for message in messages] == ["system", "user"][-len(prompt) :]
    assert [message["content"] for message in messages] == prompt
    assert BENCHMARKS[name].answer(row) == answer


@pytest.mark.parametrize("name", MATH)
def test_the_math_files_have_the_registered_rows(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / "math" / f"{name}.jsonl"))
    assert len(benchmark.rows) in (BENCHMARKS[name].rows, *BENCHMARKS[name].also)
    assert all(row["answer"] for row in benchmark.rows)
    assert benchmark.samples == 1 or benchmark.decoding.temperature > 0
    assert "\\boxed{}" in benchmark.rows[0]["prompt"][0]["content"]


@pytest.mark.parametrize("name", SRPO)
def test_the_srpo_files_have_the_registered_rows_and_score_their_gold(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / SRPO[name]))
    assert len(benchmark.rows) in (BENCHMARKS[name].rows, *BENCHMARKS[name].also)
    assert (benchmark.samples, benchmark.decoding.temperature, benchmark.decoding.top_p) == (16, 0.6, 0.95)
    if name != "tooluse":
        rows = benchmark.rows
        verdicts = [benchmark.score(f"<answer>{row['answer']}</answer>", row) for row in rows]
        assert verdicts == [Verdict.CORRECT] * len(rows)


# Rows whose own gold answer in a box is not graded as correct: none of these files' answers may be lost unseen.
@pytest.mark.parametrize("name", MATH)
def test_gold_answers_in_a_box_are_correct(shared_data, name):
    benchmark = load_benchmark(name, str(shared_data / "math" / f"{name}.jsonl"))
    records = [{"id": r["id"], "response": f"So it is \\boxed{{{r['answer']}}}."} for r in benchmark.rows]
    scored = score_records(benchmark, records, {row["id"]: row for row in benchmark.rows})
    assert {r["id"]: r["verdict"] for r in scored if r["verdict"] != Verdict.CORRECT} == {}


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_question_without_an_answer_is_refused(tmp_path, missing):
    """As text it would be "None" or "nan", which a response can give."""
    answers = [*map(float, range(29)), missing]
    Dataset.from_dict({"problem": ["1+1?"] * 30, "answer": answers}).to_parquet(tmp_path / "aime25.parquet")
    with pytest.raises(ValueError, match="aime25: row 29 has no answer: take a copy that has all of them"):
        load_benchmark("aime25", tmp_path)


@pytest.mark.parametrize(("rows", "known"), [(674, True), (675, True), (673, False)])
def test_both_copies_of_olympiadbench_are_whole(tmp_path, rows, known):
    lines = [{"question": f"{i}?", "final_answer": [str(i)]} for i in range(rows)]
    (tmp_path / "olympiadbench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if known:
        assert len(load_benchmark("olympiadbench", tmp_path).rows) == rows
    else:
        with pytest.raises(ValueError, match="673 rows where 674 are expected"):
            load_benchmark("olympiadbench", tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "row"),
    [
        ("gsm8k", 1319, {"question": "1+1?", "answer": 2}),
        ("olympiadbench", 674, {"question": "1+1?", "final_answer": []}),
    ],
)
def test_a_column_of_another_kind_is_one_sentence(tmp_path, name, rows, row):
    (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * rows)
    with pytest.raises(ValueError, match=f"{name}: row 0 is not as in .*: take a copy") as error:
        load_benchmark(name, tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named_with_its_row(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{broken\n')
    with pytest.raises(ValueError, match="gsm8k: cannot read .*JSON parse error.* in row 1.*; pass") as error:
        load_benchmark("gsm8k", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"), [([], "has no rows"), ([{"id": "a"}, {"id": "a"}], "rows with the same id, such as 'a'")]
)
def test_a_benchmark_with_no_or_equal_ids_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(name="x", rows=rows)


# --- scorers ---


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\boxed{(A)}", "(A)", True),
        ("The answer is a.", "(A)", True),
        ("The answer is (a)", "A", True),
        ("The answer is (B)", "(A)", False),
        ("The answer is 25.0", "25", True),
        ("The answer is 25.5", "25", False),
        ("The answer is yes, no, Yes", "yes,no, yes", True),
        ("The answer is 1, 2", "[1, 2]", True),
        (r"\boxed{[1, 2]}", "1,2", True),
        ("The answer is Why?", "why", True),
        ("The answer is why", "why?", False),
        ("The answer is 'it'", "it", True),
        (r"\boxed{$x$}", "x", True),
        ("<answer>$5x</answer>", "5", False),
        (r"<answer>\text{abc</answer>", "ab", False),
        ("<answer>(bc</answer>", "b", False),
        (r"The answer is $\boxed{\text{Maybe}}$", "maybe", True),
        (r"The answer is \texttt{ab}.", "AB", True),
        (r"\boxed{\text{ab} c}", "ab", False),
        ("<answer>ab}</answer>", "ab", False),
        ("<answer>**ab**.\ncd</answer>", "ab", True),
        (r"<answer>$\text{ab}$.</answer>", " ab ", True),
    ],
)
def test_the_match_of_bbeh(response, gold, right):
    assert bbeh_row(response, {"answer": gold}) is (Verdict.CORRECT if right else Verdict.WRONG)
    assert bbeh_row("no idea", {"answer": "no idea"}) is Verdict.NO_ANSWER


def test_a_reward_function_as_a_scorer():
    score, release = reward_scorer(choice_reward), reward_scorer(choice_reward, compatible=True)
    responses = ["<answer>B</answer>", "<answer>A</answer>", "The answer is B", "no idea"]
    row = {"answer": "B"}
    assert [str(score(response, row)) for response in responses] == ["correct", "wrong", "correct", "no_answer"]
    assert [str(release(response, row)) for response in responses] == ["correct", "wrong", *["unparseable"] * 2]
