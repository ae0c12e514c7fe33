"""Two processes on gloo give every question the reward of one. This file is also the program that each runs."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(TESTS), str(TESTS.parent)) if folder not in sys.path]

import processes  # noqa: E402

from r_diverse import ChallengerReward, MemoryBank, RDiverseConfig, SkillEncoder  # noqa: E402
from r_diverse.skills import Program  # noqa: E402

pytestmark = pytest.mark.distributed
WORDS = ["sum", "sum", "area", "prime", "prime", "prime", "angle", "sum"]
CASES = {
    "r_diverse": {},
    "r_zero": {"penalty": "r_zero"},
    "none": {"penalty": "none"},
    "text": {"measure": "question_text"},
}


class Table:
    """Coder and encoder: a question is its own program, and its first word decides the vector."""

    name, dim = "table", 8

    def write(self, questions):
        return [Program(q) for q in questions]

    def encode(self, texts):
        vectors = np.stack([np.random.default_rng(len(t.split()[0])).normal(size=8) for t in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class DeadCoder(Table):
    """Its error holds what cannot be sent to another process."""

    def write(self, questions):
        error = ValueError("dead coder")
        error.lock = threading.Lock()
        raise error


def answers(questions, seed):
    return [["1"] * (len(q) % 5) + [None] * (6 - len(q) % 5) + ["2"] * 3 for q in questions]


def outputs() -> list[str]:
    form = "<question>{} of {} and {} is what ?</question>\\boxed{{{}}}"
    return [*(form.format(word, i, i + 1, i) for i, word in enumerate(WORDS[:-1])), "no form"]


def rewards(case: str, bank_path: str, rank: int, count: int) -> list[float]:
    bank = MemoryBank(bank_path, "table > table")
    reward = ChallengerReward(
        RDiverseConfig("m", **CASES[case]), answers, lambda a, b: False, SkillEncoder(Table(), Table()), bank
    )
    size, figures = len(WORDS) // count, {}
    got = reward(outputs()[rank * size : (rank + 1) * size], log_metric=figures.__setitem__)
    return [*got, figures["challenger/repetition"] if case != "none" else 0.0]


def all_cases(folder: Path) -> dict[str, Any]:
    rank = PartialState(cpu=True).process_index
    results: dict[str, Any] = {case: rewards(case, str(folder.parent / "bank"), rank, 2) for case in CASES}

    def broken(questions, seed):
        raise ValueError("dead engine") if rank == 1 else None or []

    reward = ChallengerReward(RDiverseConfig("m", penalty="none"), broken, lambda a, b: False)
    results["error"] = error_of(reward, ["<question>q</question>\\boxed{1}" if rank == 1 else ""] * 2)
    dead = SkillEncoder(DeadCoder(), Table())
    reward = ChallengerReward(RDiverseConfig("m", beta=0), answers, lambda a, b: False, dead)
    results["error of the coder"] = error_of(reward, outputs()[:2])
    return results


def error_of(reward: ChallengerReward, completions: list[str]) -> str | None:
    try:
        reward(completions)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("distributed") / "bank"
    memory = MemoryBank(folder, "table > table")
    memory.add(["prime of 2 ?"], Table().encode(["prime of 2 ?"]), ["1"], iteration=1)
    return str(folder)


@pytest.fixture(scope="module")
def two_processes(bank) -> list[dict[str, Any]]:
    """Results of both ranks for all cases, run once."""
    folder = Path(bank).parent / "processes"
    folder.mkdir()
    return processes.two_processes(__file__, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, bank, case):
    *expected, repetition = rewards(case, bank, 0, 1)
    first, second = (rank[case] for rank in two_processes)
    assert [*first[:-1], *second[:-1]] == pytest.approx(expected)
    assert first[-1] == second[-1] == pytest.approx(repetition)
    assert len(set(expected)) > 2


def test_an_error_on_one_process_ends_both(two_processes):
    first, second = two_processes
    assert second["error"] == "ValueError: dead engine"
    assert first["error"] == "RuntimeError: the reward failed on another process: ValueError: dead engine"
    assert first["error of the coder"] == "ValueError: dead coder"
    assert second["error of the coder"] == "RuntimeError: the reward failed on another process: ValueError: dead coder"


if __name__ == "__main__":
    processes.run(all_cases)
