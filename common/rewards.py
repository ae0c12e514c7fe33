"""The reward of own data on a command line: one of `common.verifiers`, or a function in a file of the user's."""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from common import verifiers
from common.runs import fingerprint

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

    Runs the file, once for each text of it in a process. Raises `ValueError` where there is no such file or plain
    function. What the function raises on its calls becomes a `RuntimeError` that names it: a `ValueError` of int(), in
    one sentence without its place, would pass for one of ours.
    """
    if name in REWARDS:
        return getattr(verifiers, f"{name}_reward")
    if problem := missing_reward(name):
        raise ValueError(problem)
    path, function = reward_file(name), name.rpartition(":")[2]
    reward = getattr(_module(path.resolve(), fingerprint(path)), function, None)
    if not inspect.isfunction(reward) or inspect.iscoroutinefunction(reward):
        kind = "nothing of this name" if reward is None else f"a {type(reward).__name__}"
        raise ValueError(f"reward {name!r}: {path} has no plain function {function!r}, but {kind}: write one with def")

    @functools.wraps(reward)
    def named(*args, **columns):
        try:
            return reward(*args, **columns)
        except Exception as error:
            raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error

    named.__signature__ = inspect.signature(reward, follow_wrapped=False)  # a decorator may rename columns
    return named


@functools.cache
def _module(path: Path, text: str) -> ModuleType:
    """The file as a module, whose imports may be files beside it. `text` is its fingerprint."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: its `random.py` must not replace Python's
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look for it there
    spec.loader.exec_module(module)
    return module


def check_parameters(reward: Reward, name: str, columns: Collection[str]) -> None:
    """Raises `ValueError` for a parameter that is no column, and for columns that the function would not take."""
    parameters = inspect.signature(reward, follow_wrapped=False).parameters.values()
    known = sorted({*columns} - {"prompt"})
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if unknown := [parameter for parameter in needed if parameter not in ("prompts", "completions", *known)]:
        raise ValueError(
            f"reward {name!r} asks for {', '.join(unknown)}, and there is prompts, completions and the columns "
            f"{', '.join(known)}: give it a default, or rename the column"
        )
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"reward {name!r} must take **columns too: TRL passes every column, and more, by name")


def reward_of_response(reward: Reward, response: str, row: dict[str, Any]) -> float:
    """The reward of one response to a row, called as TRL calls it with the row's columns.

    Raises `ValueError` where it is no finite number, which says nothing of the response.
    """
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "images")}
    completions = [[{"role": "assistant", "content": response}]]
    values = reward(prompts=[row["prompt"]], completions=completions, **columns)
    try:
        (value,) = values
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the reward function returned {values!r:.80} for one response to row {row['id']}: it must return a list "
            "with one number for each response"
        ) from error
    if not math.isfinite(number):
        raise ValueError(f"the reward of row {row['id']} is {value}: give failed checks 0.0, or leave the row out")
    return number
