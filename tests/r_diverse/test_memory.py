"""The memory bank against a naive float64 reference, hostile rows and files, and writers that are killed."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from r_diverse import memory, objective
from r_diverse.memory import MemoryBank

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
TOY = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
HOSTILE = ["", "a\nb\r\n\u2028c", '{"question": "x"}\n', "\x00\x1b<|im_end|>", "\ud800", "证明 ∫ é", "x" * 50_000]


def unit(rng: np.random.Generator, rows: int, dim: int = 16) -> np.ndarray:
    vectors = rng.normal(size=(rows, dim)) + 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def content(iteration: int, rows: int, version: int = 0, dim: int = 16) -> tuple[list[str], np.ndarray, list[str]]:
    """Rows that depend on nothing but the arguments."""
    names = [f"q{iteration}.{version}.{i}" for i in range(rows)]
    return names, unit(np.random.default_rng([iteration, version, rows]), rows, dim), [f"a {n}" for n in names]


def fill(bank: MemoryBank, sizes: dict[int, int]) -> MemoryBank:
    for iteration, rows in sizes.items():
        bank.add(*content(iteration, rows), iteration)
    return bank


def everything(bank: MemoryBank) -> list[tuple]:
    records = bank.records(range(len(bank)))
    return [(r["iteration"], r["question"], r["answer"], bytes(bank._rows([r["row"]]))) for r in records]


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture
def toy(tmp_path) -> MemoryBank:
    bank = MemoryBank(tmp_path / "bank")
    bank.add(["q0", "q1", "q2"], TOY, ["0", "1", "2"], 1)
    return bank


# --- similarity ---


def test_the_toy_bank_of_the_specification(toy):
    p_max, p_mean = toy.similarity([[0.8, 0.6]])
    assert p_max == pytest.approx([0.96], abs=1e-7)
    assert p_mean == pytest.approx([0.7866667], abs=1e-7)
    assert toy.penalty([[0.8, 0.6]]) == pytest.approx([0.4983333], abs=1e-7)  # 0.5949684 with the mean normalised
    reward = objective.challenger_reward([0.6], [0.25], toy.penalty([[0.8, 0.6]]), [True])
    assert reward == pytest.approx([-0.3483333], abs=1e-7)
    cosines, rows = toy.nearest([[0.8, 0.6]], k=5)
    assert cosines[0] == pytest.approx([0.96, 0.8, 0.6], abs=1e-7)
    assert rows.tolist() == [[1, 0, 2]]
    assert toy.records(rows[0])[0] == {"question": "q1", "answer": "1", "iteration": 1, "row": 1}


@pytest.mark.parametrize("engine", ["8 bits", "faiss", "numpy"])
def test_similarity_is_exact_over_iterations_and_chunks(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(memory._scan, "is_fast", lambda: engine == "8 bits")
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    if engine == "numpy":
        monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(memory, "CHUNK", 64)
    bank = fill(MemoryBank(tmp_path), {1: 200, 2: 1, 3: 129, 7: 64})
    bank.verify()
    rows = np.concatenate([bank.embeddings(t) for t in (1, 2, 3, 7)]).astype(np.float64)
    queries = unit(np.random.default_rng(5), 50).astype(np.float64)
    queries[7] = rows[300]  # a question asked before
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = np.array([[math.fsum(q * r) for r in rows] for q in queries])
    p_max, p_mean = bank.similarity(queries)
    assert p_max == pytest.approx(cosines.max(1), abs=1e-7)
    assert p_max[7] == pytest.approx(1, abs=1e-7)
    assert p_max.max() <= 1
    assert p_mean == pytest.approx(cosines.mean(1), abs=1e-12)
    assert bank.penalty(queries, 0.3, 0.1, 0.2) == pytest.approx(
        0.3 * np.maximum(cosines.max(1) - 0.1, 0) + 0.7 * np.maximum(cosines.mean(1) - 0.2, 0), abs=1e-7
    )
    found, where = bank.nearest(queries, k=3)
    assert where.tolist() == np.argsort(-cosines, axis=1)[:, :3].tolist()
    assert found == pytest.approx(-np.sort(-cosines, axis=1)[:, :3], abs=1e-7)


def test_an_empty_bank_penalises_nothing(tmp_path):
    bank = MemoryBank(tmp_path / "none yet")
    assert len(bank) == 0
    assert bank.iterations == {}
    assert bank.penalty(TOY).tolist() == [0, 0, 0]
    assert np.isnan(bank.similarity(TOY)).all()
    assert bank.sample(5, seed=0) == []
    assert bank.nearest(TOY)[0].shape == (3, 0)
    assert bank.dim is None
    bank.verify()
    assert not bank.path.exists()  # looking writes nothing
    reward = objective.challenger_reward([0.5] * 3, [0.2] * 3, bank.penalty(TOY), [True] * 3)
    assert reward == pytest.approx([0.3] * 3)


def test_no_queries_is_no_error(toy):
    assert toy.penalty(np.zeros((0, 2))).shape == (0,)


def test_one_row_and_one_row_only(tmp_path):
    bank = MemoryBank(tmp_path)
    bank.add(["q"], [[0.0, 1.0]], ["a"], 0)
    assert bank.penalty([[0.0, 1.0], [1.0, 0.0]]).tolist() == [0.625, 0]


def test_the_order_of_rows_and_of_adding_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {1: 40, 2: 30, 3: 20}
    straight = fill(MemoryBank(tmp_path / "a"), sizes)
    backwards = fill(MemoryBank(tmp_path / "b"), dict(reversed(sizes.items())))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    shuffled = MemoryBank(tmp_path / "c")
    for t, n in sizes.items():
        questions, embeddings, answers = content(t, n)
        order = rng.permutation(n)
        shuffled.add([questions[i] for i in order], embeddings[order], [answers[i] for i in order], t)
    queries = unit(rng, 20)
    assert np.array_equal(straight.similarity(queries), backwards.similarity(queries))
    for ours, theirs in zip(straight.similarity(queries), shuffled.similarity(queries), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-14)


# --- rows by iteration ---


def test_running_an_iteration_again_replaces_exactly_its_own_rows(tmp_path):
    bank = fill(MemoryBank(tmp_path / "a"), {1: 5, 2: 7, 3: 4})
    others = [row for row in everything(bank) if row[0] != 2]
    bank.add(*content(2, 9, version=1), 2)
    assert bank.iterations == {1: 5, 2: 9, 3: 4}
    assert [row for row in everything(bank) if row[0] != 2] == others
    assert [row[1] for row in everything(bank) if row[0] == 2] == [f"q2.1.{i}" for i in range(9)]
    straight = MemoryBank(tmp_path / "b")
    for t, n, version in ((1, 5, 0), (2, 9, 1), (3, 4, 0)):
        straight.add(*content(t, n, version), t)
    assert files(tmp_path / "a") == files(tmp_path / "b")  # nothing is left of what was replaced
    queries = unit(np.random.default_rng(1), 10)
    assert np.array_equal(bank.similarity(queries), straight.similarity(queries))
    assert bank.sample(20, seed=3) == straight.sample(20, seed=3)


def test_the_mean_does_not_drift_when_rows_are_replaced_many_times(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 50, 2: 50})
    queries = unit(np.random.default_rng(1), 5)
    before = bank.similarity(queries)
    for version in range(30):
        bank.add(*content(2, 20 + version, version), 2)
    bank.add(*content(2, 50), 2)
    assert np.array_equal(bank.similarity(queries), before)


def test_the_same_rows_again_change_no_byte(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 7})
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.rglob("*") if f.name != ".lock"}
    fill(bank, {1: 5, 2: 7})
    after = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.rglob("*") if f.name != ".lock"}
    assert {f: v for f, v in before.items() if f.is_file()} == {f: v for f, v in after.items() if f.is_file()}


def test_adding_touches_no_earlier_row(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 7})
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("iteration_*/*")}
    assert len(before) == 12
    fill(bank, {3: 100})
    after = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("iteration_*/*")}
    assert before.items() <= after.items()


def test_an_iteration_without_rows_removes_its_rows(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 7})
    bank.add([], np.zeros((0, 16)), [], 2)
    assert bank.iterations == MemoryBank(tmp_path).iterations == {1: 5}
    bank.add([], [], [], 1)
    assert len(bank) == 0
    bank.add(*content(1, 3, dim=8), 1)  # an empty bank takes any encoder
    assert bank.dim == 8


def test_a_view_of_earlier_iterations_never_meets_its_own_rows(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 7, 3: 4})
    own = bank.embeddings(2)
    view = bank.before(2)
    assert bank.similarity(own)[0] == pytest.approx(np.ones(7))
    assert view.similarity(own)[0].max() < 0.99
    assert view.iterations == {1: 5}
    assert {r["iteration"] for r in view.sample(50, seed=0)} == {1}
    assert bank.before(1).penalty(own).tolist() == [0] * 7
    assert view.before(3).iterations == {1: 5}
    (later := view.before(3)).reload()
    assert later.iterations == {1: 5}
    assert bank.iterations == {1: 5, 2: 7, 3: 4}
    assert view.fingerprint() == fill(MemoryBank(tmp_path / "b"), {1: 5}).fingerprint() != bank.fingerprint()
    with pytest.raises(ValueError, match="embeddings have 3 dimensions"):
        bank.before(1).penalty(np.eye(3))
    with pytest.raises(ValueError, match="read-only"):
        view.add(*content(1, 2), 1)


def test_a_fingerprint_is_of_rows_their_iteration_and_their_encoder(tmp_path):
    rows = content(1, 3)
    prints = []
    for name, encoder, iteration in (("a", "x", 1), ("b", "x", 1), ("c", "y", 1), ("d", "x", 2)):
        bank = MemoryBank(tmp_path / name, encoder)
        bank.add(*rows, iteration)
        prints.append(bank.fingerprint())
        # what a run has seen before its first iteration stays the same once that has added its rows
        assert bank.before(1).fingerprint() == MemoryBank(tmp_path / "none").fingerprint()
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_reader_keeps_its_rows_until_it_looks_again(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5})
    reader = MemoryBank(tmp_path)
    before = everything(reader)
    bank.add(*content(1, 3, version=1), 1)
    bank.add(*content(2, 3), 2)
    assert everything(reader) == before
    reader.reload()
    assert everything(reader) == everything(bank) != before


def test_a_reader_that_opens_while_rows_are_replaced_sees_the_bank_before_or_after(tmp_path, monkeypatch):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 5})
    opened = memory._open_segment

    def replaced_in_between(*arguments):
        monkeypatch.setattr(memory, "_open_segment", opened)
        bank.add(*content(1, 3, version=1), 1)
        return opened(*arguments)

    monkeypatch.setattr(memory, "_open_segment", replaced_in_between)
    assert MemoryBank(tmp_path).iterations == {1: 3, 2: 5}


# --- replay ---


def test_the_sample_follows_the_seed(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 50, 2: 50})
    assert bank.sample(30, seed=1) == MemoryBank(tmp_path).sample(30, seed=1)
    assert bank.sample(30, seed=1) != bank.sample(30, seed=2)
    assert bank.sample(0, seed=1) == []
    with pytest.raises(TypeError):
        bank.sample(3, seed=None)


def test_no_row_is_used_twice_before_all_are_used(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 6, 2: 4})
    assert len({r["row"] for r in bank.sample(10, seed=0)}) == 10
    rows = [r["row"] for r in bank.sample(25, seed=0)]
    counts = np.bincount(rows)
    assert set(counts) == {2, 3}
    assert sum(counts) == 25


def test_the_sample_is_uniform_over_rows(tmp_path):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 15})
    counts = np.bincount([r["row"] for seed in range(2000) for r in bank.sample(4, seed)], minlength=20)
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 43.8  # 0.1 % of uniform samples exceed it, 19 degrees of freedom


def test_a_sample_is_the_stored_record(tmp_path):
    bank = fill(MemoryBank(tmp_path), {3: 4, 5: 4})
    for record in bank.sample(8, seed=0):
        t, place = record["iteration"], record["row"] - (4 if record["iteration"] == 5 else 0)
        assert record == {
            "question": f"q{t}.0.{place}", "answer": f"a q{t}.0.{place}", "iteration": t, "row": record["row"]
        }  # fmt: skip


# --- hostile rows ---


def test_hostile_text_comes_back_as_it_was(tmp_path):
    bank = MemoryBank(tmp_path / "path with spaces" / "ünïcode")
    bank.add(HOSTILE, unit(np.random.default_rng(0), len(HOSTILE)), HOSTILE[::-1], 1)
    again = MemoryBank(bank.path)
    again.verify()
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
        ([1.02, 0.0], "embedding 1 has norm 1.02"),
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
        ((["q"], [[1, 0]], ["1"], -1), "iteration=-1"),
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
    stored = bank.embeddings(1)
    assert stored.dtype == np.float32
    assert np.linalg.norm(stored.astype(float), axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert np.abs(stored - embeddings).max() < 2e-3


def test_other_dimensions_are_refused_in_a_search(toy):
    with pytest.raises(ValueError, match="embeddings have 3 dimensions, .* has 2"):
        toy.penalty([[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="shape"):
        toy.penalty([1.0, 0.0])
    with pytest.raises(ValueError, match="k=0"):
        toy.nearest(TOY, k=0)
    with pytest.raises(ValueError, match="row numbers reach from 0 to 3; the bank has 0 to 2"):
        toy.records([0, 3])
    with pytest.raises(ValueError, match="row numbers reach from -1 to 0"):
        toy.records([-1, 0])
    with pytest.raises(ValueError, match="n=-1"):
        toy.sample(-1, seed=0)
    with pytest.raises(ValueError, match=r"no iteration 9; it has \[1\]"):
        toy.embeddings(9)


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


@pytest.mark.parametrize(
    "name", ["embeddings.npy", "records.jsonl", "sum.npy", "offsets.npy", "codes.npy", "blocks.npy"]
)
def test_verify_finds_one_changed_byte(tmp_path, name):
    bank = fill(MemoryBank(tmp_path), {1: 5, 2: 5})
    bank.verify()
    file = next(tmp_path.glob(f"iteration_00002_*/{name}"))
    data = bytearray(file.read_bytes())
    data[-12] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="iteration_00002_.* changed after it was written"):
        MemoryBank(tmp_path).verify()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "bank").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        MemoryBank(tmp_path / "bank")


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
        reader.verify()
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


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


# --- several processes, and kill -9 ---


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
    bank.verify()
    assert bank.iterations == dict.fromkeys(range(24), 20)
    fill(MemoryBank(tmp_path / "b"), dict.fromkeys(range(24), 20))
    assert everything(bank) == everything(MemoryBank(tmp_path / "b"))


def test_a_writer_that_waits_too_long_says_so(toy, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(memory, "LOCK_SECONDS", 0.1)
    with FileLock(toy.path / ".lock"), pytest.raises(TimeoutError, match="locked by another writer for 0.1 s"):
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
        bank.verify()
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
    """What a loss of power keeps: a file is synced before it is renamed, and the folder after that."""
    synced = set()

    def fsync(descriptor, call=os.fsync):
        synced.add(os.fstat(descriptor).st_ino)
        call(descriptor)

    def renaming(call):
        def wrapper(source, target):
            parts = [Path(source), *Path(source).rglob("*")]
            assert {part.stat().st_ino for part in parts} <= synced
            synced.discard(Path(target).parent.stat().st_ino)
            call(source, target)

        return wrapper

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    bank = MemoryBank(tmp_path)
    for version in range(2):
        bank.add(*content(1, 5, version), 1)
        assert tmp_path.stat().st_ino in synced


def test_another_user_can_read_a_bank(tmp_path):
    umask = os.umask(0o022)
    try:
        fill(MemoryBank(tmp_path), {1: 5})
    finally:
        os.umask(umask)
    for path in tmp_path.rglob("*"):
        assert path.name == ".lock" or path.stat().st_mode & 0o044 == 0o044
        assert not path.is_dir() or path.stat().st_mode & 0o011 == 0o011


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
        bank.verify()
        if last is not None and last[3] == "started" and bank.iterations.get(last[0], 0) == last[1]:
            stored = [r["question"] for r in bank.before(last[0] + 1).records(range(len(bank.before(last[0] + 1))))]
            if stored[-1:] == content(last[0], last[1], last[2])[0][-1:] or last[1] == 0:
                known[last[0]] = last[1:3]  # on disk, though the kill came before the reply
        assert bank.iterations == {t: rows for t, (rows, _) in sorted(known.items()) if rows}
        for t, (rows, version) in known.items():
            if rows:
                assert np.abs(bank.embeddings(t) - content(t, rows, version)[1]).max() < 1e-6
    assert acknowledged > 0
    bank.add(*content(9, 10), 9)
    assert sorted(f.name for f in tmp_path.glob("iteration_*")) == sorted(s.folder for s in bank._segments.values())
    assert not list(tmp_path.glob(".new_*"))


# --- size ---


def test_rows_are_mapped_not_read_and_written_piece_by_piece(tmp_path):
    """A process that may use 350 MB more of memory of its own adds, opens and searches 512 MB of rows."""
    rows, dim = 80_000, 1600
    script = textwrap.dedent(
        f"""
        import resource, sys
        import numpy as np
        from r_diverse.memory import MemoryBank
        source = np.lib.format.open_memmap(sys.argv[1] + "/source.npy", "w+", np.float32, ({rows}, {dim}))
        for i in range(0, {rows}, 500):
            source[i:i + 500, i // 500] = 1
        del source
        source = np.load(sys.argv[1] + "/source.npy", mmap_mode="r")
        bank = MemoryBank(sys.argv[1] + "/bank")
        bank.nearest(np.eye({dim})[:1])
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
