"""The reward of own data on a command line: one of `common.verifiers`, or a function in a file of the user's."""

import importlib.util
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common import verifiers

REWARDS = ("math", "choice", "numeric", "tool_call")  # of `common.verifiers`

Reward = Callable[..., list[float | None]]


def check_reward(dataset: str, reward: str | None) -> None:
    """Raises `ValueError` unless the data set "own", and no other, comes with a reward."""
    if dataset != "own" and reward is not None:
        raise ValueError(f"reward={reward!r} is for dataset=own, and {dataset} has its own reward: leave it out")
    if dataset == "own" and (reward is None or not (reward in REWARDS or ".py:" in reward)):
        raise ValueError(f"dataset=own needs reward: {', '.join(REWARDS)} or FILE.py:FUNCTION; got {reward!r}")


def reward_file(name: str | None) -> Path | None:
    """The file of "FILE.py:FUNCTION"; None for a reward of `REWARDS`, or none."""
    return Path(name.rpartition(":")[0]).expanduser() if name and name not in REWARDS else None


def missing_reward(name: str | None) -> str | None:
    """What to say of a reward whose file is not there; else None."""
    file = reward_file(name)
    return f"reward {name!r}: there is no file {str(file)!r}" if file and not file.is_file() else None


def load_reward(name: str) -> Reward:
    """The reward function of a name in `REWARDS`, or FUNCTION of "FILE.py:FUNCTION", in TRL's signature.

    Runs the file. Raises `ValueError` where there is no such file or plain function.
    """
    if name in REWARDS:
        return getattr(verifiers, f"{name}_reward")
    if problem := missing_reward(name):
        raise ValueError(problem)
    path, function = reward_file(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, function, None)
    if not inspect.isfunction(reward) or inspect.iscoroutinefunction(reward):
        raise ValueError(f"reward {name!r}: {path} has no plain function {function!r}")
    return reward


def check_parameters(reward: Reward, name: str, columns: Collection[str]) -> None:
    """Raises `ValueError` for a parameter that is no column, and for columns that the function would not take."""
    parameters = inspect.signature(reward).parameters.values()
    known = sorted({*columns} - {"prompt"})
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if unknown := [parameter for parameter in needed if parameter not in ("prompts", "completions", *known)]:
        raise ValueError(
            f"reward {name!r} asks for {', '.join(unknown)}, and there is prompts, completions and the columns "
            f"{', '.join(known)}: give it a default, or rename the column"
        )
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"reward {name!r} must take **columns too: TRL passes every column, and more, by name")


def reward_of_response(reward: Reward, response: str, row: dict[str, Any]) -> float:
    """The reward of one response to a row, called as TRL calls it with the row's columns.

    Raises `ValueError` where it is None or nan, which says nothing of the response.
    """
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "images")}
    completions = [[{"role": "assistant", "content": response}]]
    (value,) = reward(prompts=[row["prompt"]], completions=completions, **columns)
    if value is None or value != value:
        raise ValueError(f"the reward of row {row['id']} is {value}: give failed checks 0.0, or leave the row out")
    return float(value)
