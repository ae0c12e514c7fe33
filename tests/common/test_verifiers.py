"""`common.verifiers`: TRL's signature, what each reward accepts, and what a row without a gold answer gets."""

import json

import numpy as np
import pytest
from datasets import Dataset

from common.verifiers import (
    check_gold,
    choice_reward,
    format_reward,
    length_penalty,
    math_reward,
    numeric_reward,
    tool_call_reward,
)

CALL = {"name": "search", "arguments": {"query": "rain", "limit": 3}}
GOLD_REWARDS = [math_reward, choice_reward, numeric_reward, tool_call_reward]


def talk(text):
    return [{"role": "assistant", "content": text}]


def test_math_reward_of_the_first_answer():
    texts = [r"\boxed{1}, no, \boxed{2}", "The answer is 2."]
    assert math_reward(texts, answer=["1", "2"], which="first") == [1.0, 1.0]
    assert math_reward(texts, answer=["1", "2"]) == [0.0, 1.0]


def test_math_reward_on_text_and_conversations():
    texts = [r"\boxed{\frac{1}{2}}", "the answer is 0.5", "0.5", r"\boxed{5 \text{ or } 7}"]
    golds = ["0.5", "1/2", "0.5", "5"]
    assert math_reward(texts, answer=golds) == [1.0, 1.0, 0.0, 0.0]
    assert math_reward([talk(text) for text in texts], answer=golds) == [1.0, 1.0, 0.0, 0.0]


def test_the_last_assistant_message_counts():
    turns = [*talk(r"\boxed{1}"), {"role": "tool", "content": r"\boxed{3}"}, *talk(r"\boxed{2}")]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{2}"}]}]
    empty = [{"role": "assistant", "content": None}]
    assert math_reward([turns, parts, empty, []], answer=["2"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert math_reward([[*turns, {"role": "tool", "content": r"\boxed{3}"}]], answer=["2"]) == [1.0]


@pytest.mark.parametrize("reward", GOLD_REWARDS)
def test_a_row_without_gold_is_none_and_a_missing_column_is_an_error(reward):
    assert reward(["C", "C"], answer=[None, None], prompts=["p", "p"], trainer_state=object()) == [None, None]
    with pytest.raises(ValueError, match=r'column "answer".*rename_column'):
        reward(["C"], solution=["C"])
    with pytest.raises(ValueError, match="1 values for 2 completions"):
        reward(["C", "C"], answer=["C"])


def test_an_unusable_gold_never_rewards():
    assert math_reward([r"\boxed{}", r"\boxed{None}"], answer=["", "  "]) == [None, None]
    assert choice_reward(["A"], answer=["Paris"]) == [None]
    assert numeric_reward([r"\boxed{x}"], answer=["x"]) == [None]
    assert tool_call_reward(["{}"], answer=["not json"]) == [None]
    listed = {"name": "f", "arguments": [1]}
    assert tool_call_reward([json.dumps(listed)], answer=[listed]) == [None]


def test_verdicts_are_logged_as_shares_of_the_rows_with_gold():
    logged = {}
    completions = [r"\boxed{1}", r"\boxed{2}", "what?", r"\boxed{1}", r"\boxed{1}"]
    math_reward(completions, answer=["1", "1", "1", "1", None], log_metric=logged.__setitem__, log_extra=print)
    assert logged["verdict/correct"] == 0.5
    assert logged["verdict/wrong"] == logged["verdict/no_answer"] == 0.25
    assert sum(logged.values()) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "C", "(C)", "c", "C.", "**C**", "C)", "C: Neon", "C. Neon", "Option C", r"\boxed{C}", r"\boxed{\text{(C)}}",
        "The answer is C.", "The correct option is (C)", "Answer: C) Neon", "<answer>C</answer>", "**Answer:** C",
        "C. E. coli", "C. It inhibits E. coli growth", "C. Vitamin A", "C. False", "C. No change", "C. J. D. Salinger",
        "C: pH = 7", "C. A, B and more are needed", "C) A and B", r"\boxed{C. A, B, and D}", r"\boxed{C. A-B-D}",
        r"\boxed{C. Vitamin A: for the eyes}", r"\boxed{C. Group A: 5, Group B: 3}", r"\boxed{C. Washington, D.C.}",
        r"\boxed{C. John F. Kennedy and Lyndon B. Johnson}", r"\boxed{C. The U.S. v. E. C. Knight}", "C) OR gate",
        r"\boxed{C. E. coli, S. aureus, B. subtilis and A. baumannii}", "C. Is not a function", "C. 0.5 A. 5 V",
        "A looks right, but no. The answer is C", "Choice C", "C is correct", "C is right", "C, as I said",
        "C. I am sure", "C. A dog may bark", "C. pH may rise", "C. Boron may burn", "C: pH: 7", "C. The mayor of A",
        "{C}", r"\boxed{\text{C. Neon}}", "C non-metal",
        "The answer is C because A and B are wrong", r"$\boxed{\textbf{C}}$",
    ],
)  # fmt: skip
def test_choice_letters(response):
    assert choice_reward([response] * 3, answer=["C", "(C) Neon", "A"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "response",
    [
        "A or C", "A, C", "A/C", "AC", "C or A", r"\boxed{C, A}", r"\boxed{A} and \boxed{C}", "Carbon", "", "C and D",
        "C: no\nD: yes", "C: no, D: yes, C: no", "C. Incorrect. D. Correct.", "C) D) A)", "C. 3 D. 5 E. 7",
        "The answer is C: 3, D: 5",
        "C is wrong", "<answer>A. apples B. pears C. plums</answer>", r"\boxed{C: no, D: yes}", "C. or the second",
        "<answer>C or the second</answer>", "<answer>(C), or the second</answer>", "$C$ or both",
        r"\(C\) or both", "C (or both)", "C / or both", "<answer>C, OR else</answer>",
        "C; not C", "C. (d)", "C. D. A",
        "C. D", "C. x, (b)", "C. x, b.", "C, NOT D", "<think>C", "I think it is C", "The answer is C or D",
        "<answer>A or B or C</answer>", "<answer></answer>", r"\boxed{}",
    ],
)  # fmt: skip
def test_hedges_and_other_words_are_no_choice(response):
    assert choice_reward([response], answer=["C"]) == [0.0]


@pytest.mark.parametrize(
    "word",
    [
        "maybe", "perhaps", "possibly", "probably", "also", "either", "could", "might", "may", "wait", "actually",
        "sure", "unless", "both", "alternatively", "or",
    ],
)  # fmt: skip
def test_an_option_and_a_hedge_are_no_choice(word):
    responses = ["C. Neon, then B", f"C. Neon, {word} B", f"C. Neon. {word.title()} B"]
    assert choice_reward(responses, answer=["C"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "rest",
    [
        ", B isn't it", ", B is non-metal", ", B is wrong", ", B is incorrect", ", B is FALSE", ", rather than B",
        " because B fails", " since B fails", " as B is not it",
    ],
)  # fmt: skip
def test_a_letter_that_is_denied_is_no_second_choice(rest):
    assert choice_reward([f"C{rest}", "C, B fails"], answer=["C", "C"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "letter"), [("c", "C"), ("(c)", "C"), ("C: Neon", "C"), ("C) Neon", "C"), ("C Neon", "C"), ("E", "E")]
)
def test_the_letter_of_a_gold_answer(gold, letter):
    assert choice_reward([letter, "D"], answer=[gold, gold]) == [1.0, 0.0]
    assert choice_reward(["E"], answer=["e"]) == [None]  # Euler's number


def test_a_gold_number_is_no_letter():
    assert choice_reward(["C"], answer=[2]) == [None]
    with pytest.raises(ValueError, match="row 0 has answer='2', which choice_reward cannot use"):
        check_gold(choice_reward, [{"answer": 2}])


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0, [0.1, float("nan")]])
def test_a_tolerance_must_be_finite(tolerance):
    with pytest.raises(ValueError, match="tolerance must be at least 0 and finite"):
        numeric_reward([r"\boxed{3}"] * 2, answer=["3", "3"], tolerance=tolerance)


@pytest.mark.parametrize("text", ["<s>old</s> new", "use <think> tags", "a</tool_call b"])
def test_arguments_of_a_call_hold_any_text(text):
    call = {"name": "write", "arguments": {"text": text}}
    assert tool_call_reward([f"<think>x</think><tool_call>{json.dumps(call)}</tool_call>"], answer=[call]) == [1.0]


def test_tolerances_of_a_numpy_column():
    assert numeric_reward([r"\boxed{3}"], answer=["3.1"], tolerance=np.array(0.2)) == [1.0]
    assert numeric_reward([r"\boxed{3}"] * 2, answer=["3.1", "3.1"], tolerance=np.array([0.2, 0.05])) == [1.0, 0.0]


def test_numeric_reward():
    texts = [
        r"\boxed{3.14}",
        r"\boxed{3.14}",
        r"\boxed{1{,}000\text{ m}}",
        r"\boxed{x}",
        "3.14",
        r"\boxed{9^{9^{9^9}}}",
    ]
    golds = [3.14159, "3.14", "1000", "5", "3.14", "5"]
    assert numeric_reward(texts, answer=golds) == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert numeric_reward(texts[:2], answer=golds[:2], tolerance=[0.01, None]) == [1.0, 1.0]
    assert numeric_reward(texts[:1], answer=golds[:1], tolerance=0.001) == [0.0]


def test_tool_calls_match_in_every_form():
    text, other = json.dumps(CALL), json.dumps({"name": "stop", "arguments": {}})
    tagged = f"<tool_call>\n{text}\n</tool_call>"
    message = [{"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}]
    as_text = [
        {"role": "assistant", "tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]}
    ]
    completions = [text, f"[{text}]", f"Let me see. {tagged}", message, as_text, f"<think>no</think>{tagged}"]
    for gold in (text, CALL, [CALL], json.dumps([CALL])):
        assert tool_call_reward(completions, answer=[gold] * len(completions)) == [1.0] * len(completions)
    both = [f"{tagged}<tool_call>{other}</tool_call>", f"<tool_call>{other}</tool_call>{tagged}"]
    assert tool_call_reward([*both, text], answer=[[CALL, json.loads(other)]] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "response",
    ["", "search", "{}", "[]", "[" * 100_000, '{"name": "search"}', '{"name": "search", "arguments": {"limit": 3}}']
    + [json.dumps(CALL).replace("3", value) for value in ("3.0", '"3"', "true", "NaN", "9" * 5000)]
    + [json.dumps([CALL, CALL]), json.dumps(CALL) + " or so", f"<tool_call>{json.dumps(CALL)}</tool_call><tool_call>"],
)
def test_other_tool_calls_are_wrong(response):
    assert tool_call_reward([response], answer=[CALL]) == [0.0]


@pytest.mark.parametrize(("name", "arguments"), [("name", "arguments"), ("Action", "Action_Input")])
def test_gold_calls_with_arguments_of_other_rows_are_refused(name, arguments):
    """So come objects out of a table of Arrow; the right response would have reward 0."""
    golds = [[{name: "f", arguments: {"x": 1}}], [{name: "g", arguments: {"y": "q"}}]]
    stored = list(Dataset.from_list([{"answer": gold} for gold in golds])["answer"])
    assert stored[0][0][arguments] == {"x": 1, "y": None}
    responses = [json.dumps(gold) for gold in golds]
    for compatible in (False, True):
        with pytest.raises(ValueError, match="has an argument that is None, .* as JSON text"):
            tool_call_reward(responses, answer=stored, compatible=compatible)
    assert tool_call_reward(responses, answer=golds) == tool_call_reward(responses, answer=responses) == [1.0, 1.0]
    null = json.dumps([{name: "f", arguments: {"x": None}}])
    assert tool_call_reward([null], answer=[null]) == [1.0]


def test_a_tool_call_that_is_no_object_is_wrong():
    assert tool_call_reward([[{"role": "assistant", "tool_calls": ["search"]}]], answer=[CALL]) == [0.0]


def test_format_reward():
    good = [r"\boxed{5}", r"<think>a</think>\boxed{5}", r"a</think>\boxed{5}", "The answer is 5", talk("Answer: 5")]
    bad = ["5", r"<think>\boxed{5}", r"</think><think>\boxed{5}", r"<think>a</think><think>b</think>\boxed{5}", ""]
    bad += [r"</think>\boxed{5}<think>"]
    assert format_reward(good, answer=["5"] * 5) == [1.0] * 5
    assert format_reward(bad) == [0.0] * 6


def test_length_penalty():
    ids = [[0] * size for size in (10, 80, 90, 100, 500)]
    assert length_penalty(["x"] * 5, completion_ids=ids, max_length=100, buffer=20) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert length_penalty(["x" * 90, talk("x" * 100)], max_length=100, buffer=20) == [-0.5, -1.0]
    assert length_penalty(["", "x"], max_length=1, buffer=1) == [0.0, -1.0]
    with pytest.raises(ValueError, match="buffer"):
        length_penalty(["x"], max_length=100, buffer=0)


@pytest.mark.parametrize("compatible", [False, True])
def test_shares_of_the_letters_are_logged(compatible):
    logged = {}
    responses = [f"<answer>{letter}</answer>" for letter in "AABC"] + ["no idea, none"]
    choice_reward(responses, answer=["A"] * 5, log_metric=logged.__setitem__, compatible=compatible)
    letters = {name: value for name, value in logged.items() if name.startswith("letter/")}
    assert letters == {"letter/A": 0.5, "letter/B": 0.25, "letter/C": 0.25, "letter/D": 0.0}


@pytest.mark.parametrize(("compatible", "unread"), [(False, (0.2, 0.4)), (True, (0.6, 0.0))])
def test_verdicts_of_letters_are_logged(compatible, unread):
    logged = {}
    responses = ["<answer>A</answer>", "<answer>B</answer>", "<answer>none</answer>", "no idea", "none"]
    choice_reward(responses, answer=["A"] * 5, log_metric=logged.__setitem__, compatible=compatible)
    assert logged["verdict/correct"] == logged["verdict/wrong"] == 0.2
    assert (logged["verdict/unparseable"], logged["verdict/no_answer"]) == unread


@pytest.mark.parametrize(
    ("reward", "answers"),
    [
        (math_reward, ["5", "\\frac{1}{2}", None]),
        (choice_reward, ["A", "(c)"]),
        (numeric_reward, ["1.5", 3]),
        (tool_call_reward, ['{"name": "f", "arguments": {}}']),
    ],
)
def test_usable_gold_answers_pass_at_loading(reward, answers):
    check_gold(reward, [{"answer": answer} for answer in answers])


@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        (math_reward, {"gold": "5"}, "row 1 has no column 'answer' among gold"),
        (math_reward, {"answer": ""}, "row 1 has answer='', which math_reward cannot use"),
        (math_reward, {"answer": "\\frac{1}{}+", "id": "q7"}, "row q7 has answer="),
        (choice_reward, {"answer": "maybe"}, "which choice_reward cannot use"),
        (numeric_reward, {"answer": "a few"}, "which numeric_reward cannot use"),
        (tool_call_reward, {"answer": "{broken"}, "which tool_call_reward cannot use"),
    ],
)
def test_unusable_gold_answers_are_named_at_loading(reward, row, message):
    good = {
        math_reward: "1",
        choice_reward: "A",
        numeric_reward: "1",
        tool_call_reward: '{"name": "f", "arguments": {}}',
    }
    with pytest.raises(ValueError, match=message):
        check_gold(reward, [{"answer": good[reward]}, row])


def test_an_empty_gold_letter_is_named_at_loading_in_the_form_of_the_release_too():
    with pytest.raises(ValueError, match="row 0 has answer='', which choice_reward cannot use"):
        check_gold(choice_reward, [{"answer": ""}], compatible=True)


def test_a_tolerance_is_the_decimal_that_is_written():
    assert numeric_reward([r"\boxed{1.3}"], answer=["1"], tolerance=0.3) == [1.0]  # in binary, 0.3 is below 3/10


def test_a_block_of_thoughts_in_another_one_is_not_the_form():
    assert format_reward([r"<think>a<think>b</think>\boxed{5}"]) == [0.0]
