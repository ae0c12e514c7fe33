"""Several processes at one memory bank, and writers that are killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from r_diverse_banks import content, everything, files, fill, verify

from r_diverse import memory
from r_diverse.memory import MemoryBank

FORK = multiprocessing.get_context("fork")


def _add_all(path: Path, iterations: list[int]) -> None:
    fill(MemoryBank(path), dict.fromkeys(iterations, 20))


def test_several_writers_take_turns(tmp_path):
    workers = [FORK.Process(target=_add_all, args=(tmp_path, list(range(w, 24, 4)))) for w in range(4)]
    for worker in workers:
        worker.start()
    readers = 0
    while any(worker.is_alive() for worker in workers):
        bank = MemoryBank(tmp_path)  # never sees half an add
        assert set(bank.iterations.values()) <= {20}
        readers += 1
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert readers > 0
    bank = MemoryBank(tmp_path)
    verify(bank)
    assert bank.iterations == dict.fromkeys(range(24), 20)
    fill(MemoryBank(tmp_path / "b"), dict.fromkeys(range(24), 20))
    assert everything(bank) == everything(MemoryBank(tmp_path / "b"))


def test_a_writer_that_waits_too_long_says_so(toy, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(memory, "LOCK_SECONDS", 0.1)
    with FileLock(toy.path / ".lock"), pytest.raises(TimeoutError, match="lock .* could not be acquired"):
        toy.add(["q"], [[1, 0]], ["1"], 2)


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod")


def _add_and_die(path: Path, call: int) -> None:
    """Replaces iteration 2 and is killed before the `call`-th operation on files."""
    bank, calls = MemoryBank(path), iter(range(call, -1, -1))

    def counted(operation):
        def wrapper(*args, **kwargs):
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapper

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    bank.add(*content(2, 30, version=1), 2)


@pytest.mark.parametrize("first", [False, True], ids=["replacing", "first add"])
def test_a_kill_before_any_file_operation_loses_at_most_the_add(tmp_path, first):
    old = {} if first else {1: 10, 2: 20, 3: 10}
    straight = fill(MemoryBank(tmp_path / "straight"), old)
    before = everything(straight)
    straight.add(*content(2, 30, version=1), 2)
    after = everything(straight)
    outcomes = []
    for call in range(100):
        path = tmp_path / f"killed_{call}"
        fill(MemoryBank(path), old)
        process = FORK.Process(target=_add_and_die, args=(path, call))
        process.start()
        process.join()
        bank = MemoryBank(path)
        verify(bank)
        outcomes.append(everything(bank) == after)
        assert outcomes[-1] or everything(bank) == before
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        bank.add(*content(2, 30, version=1), 2)  # run again
        assert files(path) == files(tmp_path / "straight")
    assert process.exitcode == 0, "the add must come to its end once it is not killed"
    assert outcomes == sorted(outcomes)  # once committed, it stays
    assert outcomes.count(False) >= 8


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What a loss of power keeps: a file is synced before it is renamed, and the folder before the next one is: the
    manifest names no rows that may be lost."""
    synced, renamed_in = set(), set()

    def fsync(descriptor, call=os.fsync):
        number = os.fstat(descriptor).st_ino
        synced.add(number)
        renamed_in.discard(number)
        call(descriptor)

    def renaming(call):
        def wrapper(source, target):
            parts = [Path(source), *Path(source).rglob("*")]
            assert {part.stat().st_ino for part in parts} <= synced
            assert not renamed_in
            renamed_in.add(Path(target).parent.stat().st_ino)
            call(source, target)

        return wrapper

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    bank = MemoryBank(tmp_path)
    for version in range(2):
        bank.add(*content(1, 5, version), 1)
        assert not renamed_in


def _add_for_ever(path: Path, seed: int, acknowledged) -> None:
    rng, bank = np.random.default_rng(seed), MemoryBank(path)
    for version in range(10**6):
        iteration, rows = int(rng.integers(4)), int(rng.integers(0, 3000))
        acknowledged.send((iteration, rows, version, "started"))
        bank.add(*content(iteration, rows, version), iteration)
        acknowledged.send((iteration, rows, version, "done"))


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_killed_at_random_instants_loses_at_most_the_unacknowledged_add(tmp_path, seed):
    rng = np.random.default_rng(seed)
    known: dict[int, tuple[int, int]] = {}  # iteration -> rows, version
    acknowledged = 0
    for kill in range(6):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_add_for_ever, args=(tmp_path, 100 * seed + kill, sender))
        process.start()
        sender.close()
        time.sleep(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
        last = None
        while receiver.poll():
            try:
                last = receiver.recv()
            except EOFError:
                break
            if last[3] == "done":
                known[last[0]] = last[1:3]
                acknowledged += 1
        bank = MemoryBank(tmp_path)
        verify(bank)
        if last is not None and last[3] == "started" and bank.iterations.get(last[0], 0) == last[1]:
            stored = [r["question"] for r in bank.before(last[0] + 1).records(range(len(bank.before(last[0] + 1))))]
            if stored[-1:] == content(last[0], last[1], last[2])[0][-1:] or last[1] == 0:
                known[last[0]] = last[1:3]  # on disk, though the kill came before the reply
        assert bank.iterations == {t: rows for t, (rows, _) in sorted(known.items()) if rows}
        for t, (rows, version) in known.items():
            if rows:
                assert np.abs(bank._segments[t].embeddings - content(t, rows, version)[1]).max() < 1e-6
    assert acknowledged > 0
    bank.add(*content(9, 10), 9)
    named = {entry["folder"] for entry in bank._manifest["iterations"].values()}
    assert {f.name for f in tmp_path.glob("iteration_*")} == named
    assert not list(tmp_path.glob(".new_*"))
