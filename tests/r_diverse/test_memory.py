"""The memory bank against a naive float64 reference: similarity, rows by iteration, replay."""

import math

import numpy as np
import pytest
from r_diverse_banks import TOY, content, everything, exact_multiplier, files, fill, unit, verify

from r_diverse import memory, objective
from r_diverse.memory import MemoryBank

# --- similarity ---


def test_the_toy_bank_of_the_specification(toy):
    p_max, p_mean = toy.similarity([[0.8, 0.6]])
    assert p_max == pytest.approx([0.96], abs=1e-7)
    assert p_mean == pytest.approx([0.7866667], abs=1e-7)
    assert toy.penalty([[0.8, 0.6]]) == pytest.approx([0.4983333], abs=1e-7)  # 0.5949684 with the mean normalised
    reward = objective.challenger_reward([0.6], [0.25], toy.penalty([[0.8, 0.6]]), [True])
    assert reward == pytest.approx([-0.3483333], abs=1e-7)
    assert toy.records([1]) == [{"question": "q1", "answer": "1", "iteration": 1, "row": 1}]


@pytest.mark.parametrize("engine", ["8 bits", "faiss", "numpy"])
def test_similarity_is_exact_over_iterations_and_chunks(tmp_path, monkeypatch, engine):
    if not memory._scan.is_fast():
        monkeypatch.setattr(memory._scan, "_multiplier", exact_multiplier)
    monkeypatch.setattr(memory._scan, "is_fast", lambda: engine == "8 bits")
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    if engine == "numpy":
        monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(memory, "CHUNK", 64)
    bank = fill(MemoryBank(tmp_path), {1: 200, 2: 1, 3: 129, 7: 64})
    verify(bank)
    rows = np.concatenate([bank._segments[t].embeddings for t in (1, 2, 3, 7)]).astype(np.float64)
    queries = unit(np.random.default_rng(5), 50).astype(np.float64)
    queries[7] = rows[300]  # a question asked before
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = np.array([[math.fsum(q * r) for r in rows] for q in queries])
    p_max, p_mean = bank.similarity(queries)
    assert p_max == pytest.approx((cosines / np.linalg.norm(rows, axis=1)).max(1), abs=1e-12)  # rows are of float32
    assert p_max[7] == pytest.approx(1, abs=1e-7)
    assert p_max.max() <= 1
    assert p_mean == pytest.approx(cosines.mean(1), abs=1e-12)
    assert bank.penalty(queries, 0.3, 0.1, 0.2) == pytest.approx(
        0.3 * np.maximum(cosines.max(1) - 0.1, 0) + 0.7 * np.maximum(cosines.mean(1) - 0.2, 0), abs=1e-7
    )


def test_an_empty_bank_penalises_nothing(tmp_path):
    bank = MemoryBank(tmp_path / "none yet")
    assert len(bank) == 0
    assert bank.iterations == {}
    assert bank.penalty(TOY).tolist() == [0, 0, 0]
    assert np.isnan(bank.similarity(TOY)).all()
    assert bank.sample(5, seed=0) == []
    assert bank.dim is None
    verify(bank)
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
    own = bank._segments[2].embeddings
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
