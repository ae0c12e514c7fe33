"""The memory bank on hostile rows and hostile files, and its size."""

import errno
import json
import math
import os
import resource
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from r_diverse_banks import TOY, content, files, fill, run, unit, verify

from r_diverse import memory
from r_diverse.memory import MemoryBank

HOSTILE = ["", "a\nb\r\n\u2028c", '{"question": "x"}\n', "\x00\x1b<|im_end|>", "\ud800", "证明 ∫ é", "x" * 50_000]


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Inside no file grows beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- hostile rows ---


def test_hostile_text_comes_back_as_it_was(tmp_path):
    bank = MemoryBank(tmp_path / "path with spaces" / "ünïcode")
    bank.add(HOSTILE, unit(np.random.default_rng(0), len(HOSTILE)), HOSTILE[::-1], 1)
    again = MemoryBank(bank.path)
    verify(again)
    records = again.records(range(len(HOSTILE)))
    assert [r["question"] for r in records] == HOSTILE
    assert [r["answer"] for r in records] == HOSTILE[::-1]


def test_the_same_question_twice_is_two_rows(tmp_path):
    bank = MemoryBank(tmp_path)
    bank.add(["q", "q"], [[1, 0], [1, 0]], ["1", "2"], 1)
    bank.add(["q"], [[1, 0]], ["1"], 2)
    assert len(bank) == 3
    assert [r["answer"] for r in bank.records([0, 1, 2])] == ["1", "2", "1"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, 0.0], "embedding 1 has norm 0.0"),
        ([math.nan, 1.0], "embedding 1 has norm nan"),
        ([math.inf, 0.0], "embedding 1 has norm inf"),
        ([3.0, 4.0], "embedding 1 has norm 5.0, not 1: normalise"),
        ([0.5, 0.5], "embedding 1 has norm 0.7"),
        ([1.011, 0.0], "embedding 1 has norm 1.011"),
    ],
)
def test_a_vector_that_is_no_direction_is_refused_and_nothing_is_kept(toy, bad, message):
    before = files(toy.path)
    with pytest.raises(ValueError, match=message):
        toy.add(["x", "y"], [[1.0, 0.0], bad], ["1", "2"], 2)
    assert files(toy.path) == before
    with pytest.raises(ValueError, match=message):
        toy.penalty([[1.0, 0.0], bad])


def test_a_bad_vector_is_named_by_its_row_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 2)
    with pytest.raises(ValueError, match="embedding 4 has norm 0.0"):
        MemoryBank(tmp_path).add(["q"] * 5, [*TOY, [1.0, 0.0], [0.0, 0.0]], ["a"] * 5, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["q"], [[1, 0]], ["1", "2"], 2), "1 questions, 1 embeddings, 2 answers"),
        ((["q"], [[1, 0, 0]], ["1"], 2), "embeddings have 3 dimensions, .* has 2"),
        ((["q"], [1], ["1"], 2), "shape"),
        ((["q"], [[1, 0]], [None], 2), "answer of row 0 is None"),
        (([7], [[1, 0]], ["1"], 2), "question of row 0 is 7"),
    ],
)
def test_rows_that_do_not_fit_are_refused(toy, row, message):
    before = files(toy.path)
    with pytest.raises(ValueError, match=message):
        toy.add(*row)
    assert files(toy.path) == before


def test_an_iteration_is_a_whole_number(toy):
    with pytest.raises(TypeError):
        toy.add(["q"], [[1, 0]], ["1"], 1.5)
    toy.add(["q"], [[1, 0]], ["1"], np.int64(2))
    assert toy.iterations == {1: 3, 2: 1}


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_are_stored_as_unit_vectors_in_float32(tmp_path, dtype):
    bank = MemoryBank(tmp_path)
    questions, embeddings, answers = content(1, 50)
    rounded = embeddings.astype(dtype)
    rounded[:2] *= [[0.996], [1.004]]  # as far off as bfloat16 may be
    bank.add(questions, rounded, answers, 1)
    stored = bank._segments[1].embeddings
    assert stored.dtype == np.float32
    assert np.linalg.norm(stored.astype(float), axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert np.abs(stored - embeddings).max() < 2e-3


def test_other_dimensions_are_refused_in_a_search(toy):
    with pytest.raises(ValueError, match="embeddings have 3 dimensions, .* has 2"):
        toy.penalty([[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="shape"):
        toy.penalty([1.0, 0.0])


# --- hostile files ---


def test_another_encoder_is_refused(tmp_path):
    bank = MemoryBank(tmp_path, encoder="jina, last token")
    bank.add(*content(1, 3), 1)
    assert MemoryBank(tmp_path, encoder="jina, last token").iterations == {1: 3}
    with pytest.raises(ValueError, match="written with encoder='jina, last token', this one is 'minilm'"):
        MemoryBank(tmp_path, encoder="minilm")
    unnamed = MemoryBank(tmp_path)
    assert len(unnamed.penalty(content(2, 3)[1])) == 3  # anyone may look
    with pytest.raises(ValueError, match="open it with that name to add"):
        unnamed.add(*content(2, 3), 2)
    fill(MemoryBank(tmp_path / "b"), {1: 3})
    with pytest.raises(ValueError, match="written with encoder=None, this one is 'minilm'"):
        MemoryBank(tmp_path / "b", encoder="minilm")


def damage_manifest(**changes):
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return damage


def damage_array(name: str, change):
    def damage(path: Path) -> None:
        file = next(path.glob(f"iteration_00001_*/{name}"))
        np.save(file, change(np.load(file)))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_manifest(normalized=False), "normalized=False"),
        (damage_manifest(format=1), "format=1"),
        (damage_manifest(dim=8), "holds .* not"),
        (damage_manifest(iterations=[]), "is no manifest"),
        (damage_manifest(iterations={"1": None}), "is no manifest"),
        (damage_manifest(iterations={"1": {"folder": "x", "rows": 1}}), "is no manifest of a bank \\('sha256'\\)"),
        (lambda path: (path / "manifest.json").write_text("{"), "is no manifest"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is no manifest"),
        (lambda path: (path / "manifest.json").unlink(), "has rows but no manifest.json"),
        (lambda path: shutil.rmtree(next(path.glob("iteration_00001_*"))), "cannot be read"),
        (lambda path: next(path.glob("iteration_00001_*/records.jsonl")).write_text(""), "cannot be read"),
        (lambda path: next(path.glob("iteration_00001_*/sum.npy")).write_text(""), "cannot be read"),
        (lambda path: next(path.glob("iteration_00001_*/records.jsonl")).write_text("{}"), "holds .* not"),
        (lambda path: os.truncate(next(path.glob("iteration_00001_*/embeddings.npy")), 200), "cannot be read"),
        (damage_array("embeddings.npy", lambda a: a.astype(np.float16)), "holds .* not"),
        (damage_array("embeddings.npy", lambda a: a[:-1]), "holds .* not"),
        (damage_array("codes.npy", lambda a: a[:-1]), "holds .* not"),
        (damage_array("blocks.npy", lambda a: a[:, :1]), "holds .* not"),
        (damage_array("offsets.npy", lambda a: a[:-1]), "holds .* not"),
        (damage_array("sum.npy", lambda a: a[:-1]), "holds .* not"),
    ],
)
def test_a_damaged_bank_is_refused_by_name(tmp_path, damage, message):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 5})
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        MemoryBank(tmp_path)
    assert str(tmp_path) in str(error.value)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):  # and nothing is added to it
        bank.add(*content(3, 5), 3)
    assert files(tmp_path).items() >= before.items()


def test_files_of_others_are_left_alone(toy):
    (toy.path / "notes.txt").write_text("mine")
    (toy.path / "figures").mkdir()
    toy.add(["q"], [[1, 0]], ["1"], 2)
    assert (toy.path / "notes.txt").read_text() == "mine"
    assert (toy.path / "figures").is_dir()


def test_a_read_only_folder_can_be_read(toy):
    for path in [*toy.path.rglob("*"), toy.path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(toy.path)
    try:
        reader = MemoryBank(toy.path)
        assert reader.penalty([[0.8, 0.6]]) == pytest.approx([0.4983333], abs=1e-7)
        assert len(reader.sample(3, seed=0)) == 3
        verify(reader)
        assert files(toy.path) == before
    finally:
        for path in [toy.path, *toy.path.rglob("*")]:
            path.chmod(0o755)


def test_a_full_disk_leaves_the_bank_as_it_was(tmp_path):
    fill(MemoryBank(tmp_path), {1: 5})
    before = files(tmp_path)
    script = textwrap.dedent(
        """
        import resource, signal, sys
        import numpy as np
        from r_diverse.memory import MemoryBank
        bank = MemoryBank(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        n = 5000
        try:
            bank.add(["q"] * n, np.tile(np.eye(1, 16), (n, 1)), ["a"] * n, 2)
        except OSError as error:
            print("refused", error.errno, bank.iterations)
        """
    )
    done = run(script, str(tmp_path))
    assert done.stdout.startswith("refused"), done.stderr
    assert "{1: 5}" in done.stdout
    assert files(tmp_path) == before


def test_another_user_can_read_a_bank(tmp_path):
    umask = os.umask(0o022)
    try:
        fill(MemoryBank(tmp_path), {1: 5})
    finally:
        os.umask(umask)
    for path in tmp_path.rglob("*"):
        assert path.name == ".lock" or path.stat().st_mode & 0o044 == 0o044
        assert not path.is_dir() or path.stat().st_mode & 0o011 == 0o011


# --- size ---


def test_rows_are_mapped_not_read_and_written_piece_by_piece(tmp_path):
    """A process that may use 350 MB more of memory of its own adds, opens and searches 512 MB of rows."""
    rows, dim = 80_000, 1600
    script = textwrap.dedent(
        f"""
        import resource, sys
        import numpy as np
        from r_diverse.memory import MemoryBank, _scan
        _scan.is_fast()  # torch's CUDA build alone maps more than the limit
        source = np.lib.format.open_memmap(sys.argv[1] + "/source.npy", "w+", np.float32, ({rows}, {dim}))
        for i in range(0, {rows}, 500):
            source[i:i + 500, i // 500] = 1
        del source
        source = np.load(sys.argv[1] + "/source.npy", mmap_mode="r")
        bank = MemoryBank(sys.argv[1] + "/bank")
        bank.similarity(np.eye({dim})[:1])
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + 350_000_000, -1))
        bank.add(["q"] * {rows}, source, ["a"] * {rows}, 1)
        bank = MemoryBank(sys.argv[1] + "/bank")
        p_max, p_mean = bank.similarity(np.eye({dim})[[3, 1599]])
        print(p_max.tolist(), p_mean.tolist(), len(bank))
        """
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory of a process is read from /proc")
    if shutil.disk_usage(tmp_path).free < 2e9:
        pytest.skip("needs 1 GB of disk")
    done = run(script, str(tmp_path))
    shutil.rmtree(tmp_path)
    assert done.stdout.strip() == f"[1.0, 0.0] [0.00625, 0.0] {rows}", done.stderr[-2000:]


@pytest.mark.parametrize("size", [6000, 4100, 500])
def test_a_full_disk_is_told_with_the_folder_and_leaves_the_bank_as_it_was(tmp_path, size):
    """In sum.npy of 8,128 bytes, in embeddings.npy and in its first bytes. Numpy, which writes into files by itself,
    would say nothing where the last 4,096 bytes do not fit, or no reason."""
    bank, rows = MemoryBank(tmp_path / "bank"), np.eye(1000)
    bank.add(["q"], rows[:1], ["1"], 1)
    before = files(bank.path)
    for iteration in (1, 2):  # one is replaced, one is new
        with pytest.raises(OSError, match=f"File too large: '{bank.path}'") as error, full_after(size):
            bank.add(["r"], rows[1:2], ["2"], iteration)
        assert error.value.errno == errno.EFBIG
        assert files(bank.path) == before
    again = MemoryBank(bank.path)
    verify(again)
    assert again.records([0])[0]["question"] == "q"


def test_an_array_that_does_not_fit_is_an_error(tmp_path):
    for count in (700, 1000, 100_000):
        with pytest.raises(OSError, match="File too large"), full_after(5000):
            memory.save_array(tmp_path / "a.npy", np.arange(count))
    memory.save_array(tmp_path / "a.npy", np.arange(count).reshape(2, -1).T)
    assert np.load(tmp_path / "a.npy")[:, 1].tolist() == list(range(count // 2, count))
