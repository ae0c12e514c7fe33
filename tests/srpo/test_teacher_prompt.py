"""The self-teacher's prompt: the demonstration in it, its thinking stripped."""

import itertools
import re
from types import SimpleNamespace

import pytest

from srpo import objective


def test_teacher_prompt_is_the_released_string_byte_for_byte():
    prompt = "Q {demonstration} {x}\n"
    expected = prompt + "\nCorrect solution:\n\nA {prompt} \\1\n\nCorrectly solve the original question."
    assert objective.teacher_prompt(prompt, "A {prompt} \\1") == expected


def test_teacher_prompt_keeps_what_comes_before_the_last_user_message():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": [{"type": "text", "text": "Q2"}], "name": "n"},
    ]
    original = [dict(m) for m in messages]
    got = objective.teacher_prompt(messages, "D")
    assert got[:-1] == messages[:-1]
    assert got[-1]["name"] == "n"
    assert got[-1]["content"][0] == {"type": "text", "text": "Q2"}
    assert got[-1]["content"][1]["text"] == "\nCorrect solution:\n\nD\n\nCorrectly solve the original question."
    assert messages == original


@pytest.mark.parametrize("prompt", [[], [{"role": "system", "content": "S"}], [{"role": "assistant", "content": "A"}]])
def test_a_prompt_without_a_user_turn_is_one_clear_sentence(prompt):
    with pytest.raises(ValueError, match="does not end with a user message") as error:
        objective.teacher_prompt(prompt, "D")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n\nAnswer: <b>", "Answer: <b>"),
        ("<think>a</think>x<think>b</think> y", "xy"),
        ("<think></think>x", "x"),
        ("<think>never closed", "<think>never closed"),
        ("no thinking ", "no thinking "),
    ],
)
def test_thinking_is_stripped(text, expected):
    assert objective.strip_thinking(text) == expected


def by_searching_the_whole_text(text: str) -> str:
    text = re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    return re.sub(r"^.*</think>\s*", "", text, flags=re.DOTALL)


def test_thinking_is_stripped_as_by_searching_the_whole_text():
    """Of all texts of up to six pieces, some of which are a tag only when what is between them is gone."""
    pieces = ("<think>", "</think>", " \n", "a", "</thi", "nk>")
    for count in range(7):
        for text in map("".join, itertools.product(pieces, repeat=count)):
            assert objective.strip_thinking(text) == by_searching_the_whole_text(text), text


@pytest.mark.parametrize("start", ["", "a</think>", "<think>a</think> b"])
def test_thinking_that_does_not_end_is_not_searched_for_its_end(start, monkeypatch):
    """From each `<think>` the search would read to the end of the text."""
    searched = []

    def sub(pattern, new, text, flags):
        searched.append((pattern[:7], text))
        return re.sub(pattern, new, text, flags=flags)

    monkeypatch.setattr(objective, "re", SimpleNamespace(sub=sub, DOTALL=re.DOTALL))
    text = start + "<think>a" * 100
    assert objective.strip_thinking(text) == by_searching_the_whole_text(text)
    assert all(text.endswith("</think>") for pattern, text in searched if pattern == "<think>")
    assert len(searched) == 2 * bool(start)
