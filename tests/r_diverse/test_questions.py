"""What is read out of a Challenger's output, and what reaches the Solver's prompt."""

import time

import pytest

from r_diverse.questions import FAILURES, challenger_prompt, last_box, read_challenge, solver_prompt


@pytest.mark.parametrize(
    ("output", "question", "answer"),
    [
        ("<question>1+1?</question>\\boxed{2}", "1+1?", "2"),
        ("plan\n<question>\n What is 2^3?\n</question>\n\n\\boxed{8} done", "What is 2^3?", "8"),
        ("<question>old</question>\\boxed{1}<question>new</question>\\boxed{2}", "new", "2"),
        ("\\boxed{7}<question>q</question>", "q", "7"),  # R-Zero asks for both, not for their order
        ("<question>q</question>\\boxed{\\frac{1}{2}}", "q", "\\frac{1}{2}"),
        ("<question>q</question>\\boxed{3}\\boxed{unclosed", "q", "3"),
        ("<question>A 100% box {} %s {0} \\boxed</question>\\boxed{1}", "A 100% box {} %s {0} \\boxed", "1"),
        ("<question>五加七等于几?</question>\\boxed{12}", "五加七等于几?", "12"),
        ("<question>a\u200bb\x07c</question>\\boxed{1}", "abc", "1"),
        ("<think>\n<question>old</question>\\boxed{1}</think>\n<question>new</question>\\boxed{2}", "new", "2"),
        ("old <question>old</question>\\boxed{1}</think><question>new</question>\\boxed{2}", "new", "2"),
        ("\\boxed{7}<question>q</question>\n<think> Is it new?", "q", "7"),
        ("A <think> tag.<question>a </think><think> b</question>\\boxed{1}", "a </think><think> b", "1"),
    ],
)
def test_valid_outputs(output, question, answer):
    challenge = read_challenge(output)
    assert challenge == (question, answer, None)
    assert challenge.valid


@pytest.mark.parametrize(
    ("output", "failure"),
    [
        ("", "no_question"),
        ("just text \\boxed{1}", "no_question"),
        ("<question>q \\boxed{1}", "no_question"),
        ("q</question>\\boxed{1}", "no_question"),
        ("</question><question>\\boxed{1}", "no_question"),
        ("<question>  \n </question>\\boxed{1}", "empty_question"),
        ("<question>\u200b\x00</question>\\boxed{1}", "empty_question"),
        ("<question>" + "x" * 50_000 + "</question>\\boxed{1}", "long_question"),
        ("<question>a</question>b</question>\\boxed{1}", "several_blocks"),
        # Drafts of a model that thinks, and the form that it was asked for
        ("<think>\nWrite <question>...</question> and \\boxed{final_answer}. Let me", "no_question"),
        ("So:\n <think><question>old</question>\\boxed{1}, too easy", "no_question"),
        ("<think>a</think><think><question>old</question>\\boxed{1}", "no_question"),
        ("<think>\n<question>old</question>\\boxed{1}</think>\n<question>new", "no_question"),
        ("<question>old</question>\\boxed{1}, too easy</think>Sorry.", "no_question"),
        ("<think>\n\\boxed{1}</think><question>q</question>", "no_box"),
        ("<question>q</question>", "no_box"),
        ("<question>q</question>\\boxed{}", "no_box"),
        ("<question>q</question>\\boxed{  }", "no_box"),
        ("<question>q</question>\\boxed{1", "no_box"),
        ("<question>q</question>\\boxed", "no_box"),
    ],
)
def test_invalid_outputs_say_why(output, failure):
    challenge = read_challenge(output)
    assert challenge.failure == failure
    assert failure in FAILURES
    assert not challenge.valid


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{a}\\boxed{b}", "b"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{a}}", "a"),
        ("}}\\boxed{a}", "a"),
        ("\\boxed{a{b}", None),
        ("\\boxed{\\left\\{x=1\\right.}", "\\left\\{x=1\\right."),  # an escaped brace is a sign
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{5\\}", None),
        ("\\boxed{a\\\\}", "a\\\\"),  # a new line of LaTeX, then the end
        ("\\boxed{\\text{None}}", "\\text{None}"),
        ("boxed{5}", None),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 200_000, "{" * 1_000_000, "}" * 1_000_000, "\\boxed{" + "}" * 1_000_000]
)
def test_a_hostile_output_costs_one_pass(text):
    started = time.perf_counter()
    read_challenge(f"<question>q</question>{text}")
    assert time.perf_counter() - started < 5  # a hang, not a speed: quadratic code needs hours


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>system", "</s>", "<think>", "[INST]", "<|image_pad|>"])
def test_a_question_writes_no_control_token_into_the_prompt(control):
    (message,) = solver_prompt(f"reply 5 {control} now", system="")
    assert control not in message["content"]
    assert message["role"] == "user"


def test_prompts():
    system, user = challenger_prompt()
    assert (system["role"], user["role"]) == ("system", "user")
    assert "<question>" in system["content"]
    assert "\\boxed{" in system["content"]
    assert solver_prompt("q")[0]["content"].endswith("\\boxed{}.")
    assert solver_prompt("q", system="") == [{"role": "user", "content": "q"}]
