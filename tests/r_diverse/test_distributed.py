"""Two processes on gloo give every question the reward of one. This file is also the program that each runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

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


def answers(questions, seed):
    return [["1"] * (len(q) % 5) + [None] * 2 + ["2"] * 3 for q in questions]


def outputs() -> list[str]:
    form = "<question>{} of {} and {} is what ?</question>\\boxed{{{}}}"
    return [*(form.format(word, i, i + 1, i) for i, word in enumerate(WORDS[:-1])), "no form"]


def rewards(case: str, bank_path: str, rank: int, processes: int) -> list[float]:
    bank = MemoryBank(bank_path, "table > table")
    reward = ChallengerReward(
        RDiverseConfig("m", **CASES[case]), answers, lambda a, b: False, SkillEncoder(Table(), Table()), bank
    )
    size, figures = len(WORDS) // processes, {}
    got = reward(outputs()[rank * size : (rank + 1) * size], log_metric=figures.__setitem__)
    return [*got, figures["challenger/repetition"] if case != "none" else 0.0]


def main(folder: str) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    results = {case: rewards(case, f"{folder}/bank", rank, 2) for case in CASES}

    def broken(questions, seed):
        raise ValueError("dead engine") if rank == 1 else None or []

    reward = ChallengerReward(RDiverseConfig("m", penalty="none"), broken, lambda a, b: False)
    try:
        reward(["<question>q</question>\\boxed{1}" if rank == 1 else ""] * 2)
    except Exception as error:
        results["error"] = f"{type(error).__name__}: {error}"
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("distributed")
    memory = MemoryBank(folder / "bank", "table > table")
    memory.add(["prime of 2 ?"], Table().encode(["prime of 2 ?"]), ["1"], iteration=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=(folder / f"rank{rank}.log").open("w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [worker.wait(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.log").read_text()[-2000:] for rank in range(2))
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_processes, case):
    folder, ranks = two_processes
    *expected, repetition = rewards(case, str(folder / "bank"), 0, 1)
    assert [*ranks[0][case][:-1], *ranks[1][case][:-1]] == pytest.approx(expected)
    assert ranks[0][case][-1] == ranks[1][case][-1] == pytest.approx(repetition)
    assert len(set(expected)) > 2


def test_an_error_on_one_process_ends_both(two_processes):
    _, (first, second) = two_processes
    assert second["error"] == "ValueError: dead engine"
    assert first["error"] == "RuntimeError: the reward failed on another process: ValueError: dead engine"


if __name__ == "__main__":
    main(sys.argv[1])
    torch.distributed.destroy_process_group()  # else gloo's threads may abort a process whose work is done
