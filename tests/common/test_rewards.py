"""The reward of own data: a file of the user's as a module, its mistakes, and the reward of one response."""

import pytest

from common.rewards import check_parameters, load_reward, reward_of_response

ROW = {"id": "7", "prompt": [{"role": "user", "content": "1+1="}], "answer": "2", "images": []}


def reward(folder, text: str) -> str:
    (folder / "rewards.py").write_text(text)
    return f"{folder / 'rewards.py'}:reward"


def returning(folder, value: str):
    return load_reward(reward(folder, f"import math\ndef reward(completions, **columns): return {value}"))


def test_a_file_imports_what_lies_beside_it_and_holds_dataclasses(tmp_path):
    (tmp_path / "half_beside.py").write_text("HALF = 0.5")
    text = """
from __future__ import annotations
from dataclasses import dataclass
from half_beside import HALF

@dataclass
class Score:
    value: float = HALF

def reward(completions, **columns):
    return [Score().value for _ in completions]
"""
    assert reward_of_response(load_reward(reward(tmp_path, text)), "2", ROW) == 0.5


def test_a_file_runs_once_until_it_changes(tmp_path, capsys):
    text = "print('runs')\ndef reward(completions, **columns): return [1.0]"
    for _ in range(2):
        load_reward(reward(tmp_path, text))
    assert capsys.readouterr().out == "runs\n"
    changed = load_reward(reward(tmp_path, text.replace("1.0", "0.0")))
    assert reward_of_response(changed, "2", ROW) == 0.0


@pytest.mark.parametrize("value", ["[True]", "(1.0,)", "__import__('numpy').ones(1)", "__import__('torch').ones(1)"])
def test_any_list_of_one_number_is_a_reward(tmp_path, value):
    assert reward_of_response(returning(tmp_path, value), "2", ROW) == 1.0


@pytest.mark.parametrize("value", ["None", "1.0", "[]", "[1.0, 0.0]", "['yes']", "[[1.0]]"])
def test_anything_else_is_refused_with_the_row(tmp_path, value):
    with pytest.raises(ValueError, match="returned .* for one response to row 7: it must return a list"):
        reward_of_response(returning(tmp_path, value), "2", ROW)


@pytest.mark.parametrize("value", ["[None]", "[math.nan]", "[math.inf]"])
def test_a_reward_that_is_no_finite_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="the reward of row 7 is (None|nan|inf): give failed checks 0.0"):
        reward_of_response(returning(tmp_path, value), "2", ROW)


def test_an_error_in_the_function_names_it(tmp_path):
    with pytest.raises(RuntimeError, match="reward '.*rewards.py:reward' raised ValueError: could not") as error:
        reward_of_response(returning(tmp_path, "[float('two')]"), "2", ROW)
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("parameters", ["completions, answer, **columns", "*args, **columns"])
def test_a_decorator_may_rename_columns(tmp_path, parameters):
    text = f"""
import functools

def renamed(function):
    @functools.wraps(function)
    def call({parameters}):
        return function(gold=columns.get("answer"))
    return call

@renamed
def reward(gold):
    return [1.0]
"""
    name = reward(tmp_path, text)
    check_parameters(load_reward(name), name, ["id", "prompt", "answer"])
