"""For the tests of the memory bank: its rows, all that is in it, a program beside it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np

from r_diverse import _scan, memory
from r_diverse.memory import MemoryBank

ROOT = Path(__file__).resolve().parents[1]
TOY = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]


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


def exact_multiplier(codes: np.ndarray):
    """In the place of `_scan._multiplier`, where a processor has no instruction for it."""
    return lambda rows: (rows.astype(np.int64) @ codes.T.astype(np.int64)).astype(np.float32)


def everything(bank: MemoryBank) -> list[tuple]:
    records = bank.records(range(len(bank)))
    return [(r["iteration"], r["question"], r["answer"], bytes(bank._rows([r["row"]]))) for r in records]


def verify(bank: MemoryBank) -> None:
    """Reads every byte: each row is as it was added, in all of its files."""
    for segment in bank._segments.values():
        digest, total = hashlib.sha256(), np.zeros(bank.dim)
        for i, block in enumerate(segment.blocks):
            part = slice(i * memory.CHUNK, (i + 1) * memory.CHUNK)
            digest.update(segment.embeddings[part].tobytes())
            total += segment.embeddings[part].sum(0, dtype=np.float64)
            codes, expected = _scan.encode(segment.embeddings[part])
            np.testing.assert_array_equal(codes, segment.codes[part])
            np.testing.assert_allclose(block, expected, rtol=1e-9, atol=0)
        digest.update(segment.records.tobytes())
        ends = np.flatnonzero(segment.records == ord("\n")) + 1
        np.testing.assert_array_equal(segment.offsets, [0, *ends])
        np.testing.assert_array_equal(segment.total, total)
        assert digest.hexdigest() == segment.sha256


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
