"""The memory of past questions of R-Diverse (arXiv 2602.13103): a bank on disk that survives a kill at any moment.

    bank/
      manifest.json                    encoder, dimension, normalisation, and the folder of each iteration
      iteration_00003_<digest>/
        embeddings.npy                 (rows, D) float32 unit vectors, memory-mapped
        codes.npy  blocks.npy          the same in 8 bits, and scale and error of each block of CHUNK rows
        records.jsonl  offsets.npy     question and answer of each row; where each line starts
        sum.npy                        (D,) float64, sum of the rows

A folder is complete on disk before the manifest names it, and it never changes after that. So the manifest is the
commit: a killed writer loses only the `add` that had not returned, and the next `add` clears what it left behind.
Adding touches no row that is there already, and searching needs no index in memory.
"""

import copy
import hashlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike

from . import _scan
from .objective import memory_penalty

_EMPTY = {"format": 2, "encoder": None, "dim": None, "normalized": True, "iterations": {}}
CHUNK = 8192  # rows read, written or searched at a time
UNIT_TOLERANCE = 0.01  # a unit vector in bfloat16 is off by up to 0.004
LOCK_SECONDS = 300


@dataclass(frozen=True)
class _Segment:
    """The rows of one iteration, mapped into memory."""

    sha256: str
    embeddings: np.ndarray
    codes: np.ndarray
    blocks: np.ndarray
    offsets: np.ndarray
    records: np.ndarray
    total: np.ndarray

    def record(self, row: int) -> dict[str, str]:
        return json.loads(self.records[self.offsets[row] : self.offsets[row + 1]].tobytes())


class MemoryBank:
    """Questions, skill embeddings and labels of all past iterations, with exact similarity to all of them.

    Rows are numbered 0 to len(bank) - 1 by iteration and, within it, as they were added. Readers see the bank as it
    was when they opened it; `reload` looks again.

    Args:
        path: folder of the bank, made by the first `add`.
        encoder: name of what computes the embeddings, such as model, revision and pooling. Vectors of different
            encoders cannot be compared, so a bank written under another name is refused. None reads any bank.

    Raises `ValueError` for a bank of another encoder, and for files that are missing, cut short or of another format.
    """

    def __init__(self, path: str | os.PathLike, encoder: str | None = None):
        self.path = Path(path)
        self.encoder = encoder
        self._end: int | None = None
        self.reload()

    def reload(self) -> None:
        """Reads the bank again, with what other processes have added since. Raises as the constructor does."""
        manifest = _read_manifest(self.path)
        if manifest["iterations"] and self.encoder not in (None, manifest["encoder"]):
            raise ValueError(
                f"{self.path} was written with encoder={manifest['encoder']!r}, this one is {self.encoder!r}: their "
                "vectors cannot be compared; start a new bank, or encode its questions again"
            )
        try:
            segments = {
                t: _open_segment(self.path, entry, manifest["dim"])
                for t, entry in manifest["iterations"].items()
                if self._end is None or t < self._end
            }
        except ValueError:
            if _read_manifest(self.path) == manifest:
                raise
            self.reload()  # a writer replaced rows between the two reads
        else:
            self._manifest, self._segments = manifest, segments

    def before(self, iteration: int) -> "MemoryBank":
        """Read-only view of the rows of earlier iterations: M_t, even when iteration t runs a second time."""
        view = copy.copy(self)
        view._end = iteration if self._end is None else min(iteration, self._end)
        view._segments = {t: segment for t, segment in self._segments.items() if t < view._end}
        return view

    def __len__(self) -> int:
        return sum(self.iterations.values())

    @property
    def iterations(self) -> dict[int, int]:
        """Number of rows of each iteration, in order."""
        return {t: len(segment.embeddings) for t, segment in self._segments.items()}

    @property
    def written_with(self) -> str | None:
        """Name of the rows' encoder; before the first row that of the constructor, which may be None."""
        return self._manifest["encoder"] if self._manifest["iterations"] else self.encoder

    @property
    def dim(self) -> int | None:
        """D, None before the first row."""
        return self._manifest["dim"] if self._manifest["iterations"] else None

    def fingerprint(self) -> str:
        """Digest that tells whether two banks hold the same rows; made from stored digests, without reading rows."""
        content = {str(t): segment.sha256 for t, segment in self._segments.items()}
        encoder = self._manifest["encoder"] if content else None  # empty banks are the same, whatever their encoder
        return hashlib.sha256(json.dumps([encoder, content]).encode()).hexdigest()

    # --- writing ---

    def add(self, questions: Sequence[str], embeddings: ArrayLike, answers: Sequence[str], iteration: int) -> None:
        """Makes these the rows of `iteration`, on disk when this returns.

        One call holds all rows of an iteration. A second call for the same one replaces exactly these; with the same
        content it changes nothing; with no rows it removes them. Several processes may add: they take turns.

        Args:
            questions: B texts.
            embeddings: (B, D) unit vectors; may be a memory-mapped array larger than memory.
            answers: B pseudo-labels, none of them missing.
            iteration: its number.

        Raises `ValueError`, leaving the bank as it was, for rows that do not match each other or the bank, and
        `TimeoutError` if another writer holds it for `LOCK_SECONDS`. After an `OSError`, such as a full disk, every
        iteration has its old rows or all of its new ones.
        """
        if self._end is not None:
            raise ValueError(
                f"this view of the rows before iteration {self._end} is read-only: add to the bank itself"
            )
        iteration = operator.index(iteration)
        embeddings = _checked_columns(questions, embeddings, answers)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=LOCK_SECONDS):
                self._add(questions, embeddings, answers, iteration)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from error  # Python gives no path for a write

    def _add(self, questions, embeddings, answers, iteration: int) -> None:
        self.reload()  # another writer may have been here
        entries = dict(self._manifest["iterations"])
        if entries and self.encoder != self._manifest["encoder"]:
            raise ValueError(
                f"{self.path} was written with encoder={self._manifest['encoder']!r}: open it with that name to add"
            )
        manifest = {**_EMPTY, "encoder": self.encoder, "dim": self.dim, "iterations": entries}
        if not (self.path / "manifest.json").exists():  # before any row: rows without a manifest are a damaged bank
            _write_manifest(self.path, manifest)
        entries.pop(iteration, None)
        if len(questions):
            manifest["dim"] = self.dim or embeddings.shape[1]
            _check_dimension(embeddings, manifest["dim"], self.path)
            entries[iteration] = _write_segment(self.path, questions, embeddings, answers, iteration)
        if entries != self._manifest["iterations"]:
            _write_manifest(self.path, manifest)
        _clear(self.path, keep={entry["folder"] for entry in entries.values()})
        self.reload()

    # --- similarity ---

    def penalty(
        self, embeddings: ArrayLike, gamma: float = 0.5, tau_max: float = 0.5, tau_mean: float = 0.25
    ) -> np.ndarray:
        """P_MAP of each row of (B, D) unit vectors, (B,): see `objective.memory_penalty`; 0 if the bank is empty."""
        if len(self) == 0:
            return np.zeros(len(self._queries(embeddings)))
        return memory_penalty(*self.similarity(embeddings), gamma, tau_max, tau_mean)

    def similarity(self, embeddings: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """P_max and P_mean: highest and mean cosine of each row of (B, D) to all rows, (B,) each, float64.

        All rows are compared; the mean is the product with the (unnormalised) mean vector. NaN if the bank is empty.
        """
        queries = self._queries(embeddings)
        if len(self) == 0:
            return np.full(len(queries), np.nan), np.full(len(queries), np.nan)
        rows = _scan.nearest_rows(queries, self._blocks()) if _scan.is_fast() else self._nearest_rows(queries)
        nearest = self._rows(rows)
        # In float64, so that it does not depend on how a search was cut into blocks
        p_max = np.einsum("bd,bd->b", queries, nearest) / np.linalg.norm(nearest, axis=1)
        # From the sum of each iteration, never by subtraction: replacing rows leaves no trace in the mean
        mean = np.sum([segment.total for segment in self._segments.values()], axis=0) / len(self)
        return p_max.clip(-1, 1), queries @ mean

    def _nearest_rows(self, queries: np.ndarray) -> np.ndarray:
        """Index of the row with the highest product with each query, (B,), as far as float32 tells rows apart."""
        queries = queries.astype(np.float32)
        best, rows = np.full(len(queries), -np.inf, np.float32), np.zeros(len(queries), np.int64)
        for start, chunk in self._chunks():
            products, where = _highest_products(queries, chunk)
            better = products > best
            best[better], rows[better] = products[better], where[better] + start
        return rows

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        for segment in self._segments.values():
            for i in range(0, len(segment.embeddings), CHUNK):
                yield start + i, segment.embeddings[i : i + CHUNK]
            start += len(segment.embeddings)

    def _blocks(self) -> Iterator[_scan.Block]:
        for segment in self._segments.values():
            for i, (scale, error) in enumerate(segment.blocks):
                part = slice(i * CHUNK, (i + 1) * CHUNK)
                yield _scan.Block(segment.embeddings[part], segment.codes[part], scale, error)

    def _queries(self, embeddings: ArrayLike) -> np.ndarray:
        embeddings = np.asarray(embeddings)
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings must have shape (questions, dimensions), got {embeddings.shape}")
        queries = _unit_rows(embeddings)
        if self.dim is not None:
            _check_dimension(queries, self.dim, self.path)
        return queries

    # --- rows ---

    def sample(self, n: int, seed: int) -> list[dict[str, Any]]:
        """n rows for replay, drawn uniformly and without replacement until all are used, then again.

        The same seed and rows give the same sample. Returns records as `records` does, none if the bank is empty.
        """
        if len(self) == 0:
            return []
        rng = np.random.default_rng(operator.index(seed))  # None would draw another sample each time
        rounds = [rng.permutation(len(self)) for _ in range(math.ceil(n / len(self)))]
        return self.records(list(itertools.chain(*rounds))[:n])

    def records(self, rows: ArrayLike) -> list[dict[str, Any]]:
        """question, answer, iteration and row number of the given row numbers, in their order."""
        return [
            {**self._segments[t].record(local), "iteration": t, "row": int(row)}
            for row, (t, local) in zip(np.asarray(rows), self._places(rows), strict=True)
        ]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), self.dim))
        for i, (t, local) in enumerate(self._places(rows)):
            result[i] = self._segments[t].embeddings[local]
        return result

    def _places(self, rows: ArrayLike) -> list[tuple[int, int]]:
        """(iteration, index within it) of each row number."""
        rows = np.asarray(rows, np.int64)
        iterations = list(self._segments)
        ends = np.cumsum([len(self._segments[t].embeddings) for t in iterations])
        which = np.searchsorted(ends, rows, side="right")
        starts = np.concatenate([[0], ends])[which]
        return [(iterations[w], int(row - start)) for w, row, start in zip(which, rows, starts, strict=True)]


def _highest_products(queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest inner product of each query with the rows, and its row: by faiss's flat search, or by numpy."""
    if importlib.util.find_spec("faiss") is None:
        products = queries @ rows.T
        return products.max(1), products.argmax(1)
    import faiss

    products, where = faiss.knn(queries, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
    return products[:, 0], where[:, 0]


# --- files ---


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        manifest = {name: content[name] for name in _EMPTY}
        manifest["iterations"] = {
            int(t): {name: entry[name] for name in ("folder", "rows", "sha256")}
            for t, entry in content["iterations"].items()
        }
    except FileNotFoundError:
        if path.is_dir() and any(path.glob("iteration_*")):
            raise ValueError(f"{path} has rows but no manifest.json: restore it, or choose another folder") from None
        return copy.deepcopy(_EMPTY)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no manifest of a bank ({error}): restore it, or choose another folder") from error
    for name in ("format", "normalized"):
        if manifest[name] != _EMPTY[name]:
            raise ValueError(f"{file} has {name}={manifest[name]!r}, not {_EMPTY[name]!r}: start a new bank")
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    entries = {str(t): manifest["iterations"][t] for t in sorted(manifest["iterations"])}
    descriptor, temporary = tempfile.mkstemp(dir=path, prefix=".new_manifest_")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({**manifest, "iterations": entries}, file, indent=2)
        file.write("\n")
        _sync(file)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path / "manifest.json")
    _sync_folder(path)


def _open_segment(path: Path, entry: dict[str, Any], dim: int) -> _Segment:
    folder = path / entry["folder"]
    try:
        embeddings, codes, offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("embeddings", "codes", "offsets")
        )
        blocks, total = (np.load(folder / f"{name}.npy") for name in ("blocks", "sum"))
        records = np.memmap(folder / "records.jsonl", np.uint8, "r")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read ({error}): restore it from a copy") from error
    rows = entry["rows"]
    expected = (
        *(((rows, dim), np.float32), ((rows, dim), np.int8), ((rows + 1,), np.int64)),
        *(((math.ceil(rows / CHUNK), 2), np.float64), ((dim,), np.float64)),
    )
    found = tuple((array.shape, array.dtype) for array in (embeddings, codes, offsets, blocks, total))
    if found != expected or offsets[-1] != len(records):
        raise ValueError(f"{folder} holds {found}, not {expected}: restore it from a copy")
    return _Segment(entry["sha256"], embeddings, codes, blocks, offsets, records, total)


def _write_segment(path: Path, questions, embeddings: np.ndarray, answers, iteration: int) -> dict[str, Any]:
    """Writes the rows of one iteration into a folder of their own; returns its entry of the manifest."""
    temporary = Path(tempfile.mkdtemp(dir=path, prefix=".new_"))
    try:
        digest = hashlib.sha256()
        _write_embeddings(temporary, embeddings, digest)
        _write_records(temporary, questions, answers, digest)
        sha256 = digest.hexdigest()
        folder = f"iteration_{iteration:05d}_{sha256[:16]}"
        _sync_folder(temporary)
        if not (path / folder).exists():  # it exists, complete, where the same rows are added again
            os.chmod(temporary, 0o755)
            os.rename(temporary, path / folder)
            _sync_folder(path)
        return {"folder": folder, "rows": len(questions), "sha256": sha256}
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_embeddings(folder: Path, embeddings: np.ndarray, digest) -> None:
    total, blocks = np.zeros(embeddings.shape[1]), []
    with (folder / "embeddings.npy").open("wb") as file, (folder / "codes.npy").open("wb") as codes_file:
        for kind, target in (("<f4", file), ("|i1", codes_file)):
            header = {"descr": kind, "fortran_order": False, "shape": embeddings.shape}
            np.lib.format.write_array_header_1_0(target, header)
        for start in range(0, len(embeddings), CHUNK):
            rows = _unit_rows(embeddings[start : start + CHUNK], start).astype("<f4")
            total += rows.sum(0, dtype=np.float64)
            digest.update(rows.tobytes())
            file.write(rows.tobytes())
            codes, block = _scan.encode(rows)
            codes_file.write(codes.tobytes())
            blocks.append(block)
        _sync(file)
        _sync(codes_file)
    save_array(folder / "blocks.npy", np.array(blocks))
    save_array(folder / "sum.npy", total)


def _write_records(folder: Path, questions, answers, digest) -> None:
    offsets = [0]
    with (folder / "records.jsonl").open("wb") as file:
        for question, answer in zip(questions, answers, strict=True):
            line = json.dumps({"question": question, "answer": answer}).encode() + b"\n"
            digest.update(line)
            file.write(line)
            offsets.append(offsets[-1] + len(line))
        _sync(file)
    save_array(folder / "offsets.npy", np.array(offsets, np.int64))


def save_array(path: Path, array: np.ndarray) -> None:
    """As `np.save`, and on disk when this returns; `OSError` if there is no room for it."""
    content = io.BytesIO()  # numpy's own way to write a file does not notice that the end did not fit
    np.save(content, array)
    with path.open("wb") as file:
        file.write(content.getbuffer())
        _sync(file)


def _clear(path: Path, keep: set[str]) -> None:
    """Removes replaced rows and what a killed writer left, but nothing that the bank did not make."""
    for pattern in (".new_*", "iteration_*_*"):
        for found in path.glob(pattern):
            if found.is_dir() and found.name not in keep:
                shutil.rmtree(found)
            elif found.is_file():
                found.unlink()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checks ---


def _checked_columns(questions: Sequence[str], embeddings: ArrayLike, answers: Sequence[str]) -> np.ndarray:
    embeddings = np.asanyarray(embeddings)  # keeps a memory map as it is
    if not len(questions) == len(embeddings) == len(answers):
        raise ValueError(
            f"{len(questions)} questions, {len(embeddings)} embeddings, {len(answers)} answers: a row needs all three"
        )
    for name, column in (("question", questions), ("answer", answers)):
        wrong = next((i for i, value in enumerate(column) if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f"{name} of row {wrong} is {column[wrong]!r}, not text: leave rows without a label out")
    if len(questions) and embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (rows, dimensions), got {embeddings.shape}")
    return embeddings


def _unit_rows(rows: np.ndarray, start: int = 0) -> np.ndarray:
    """(B, D) float64 rows of length 1 from rows that have it up to rounding; `ValueError` for others."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = ~(np.abs(norms[:, 0] - 1) <= UNIT_TOLERANCE)  # NaN is bad too
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"embedding {start + row} has norm {norms[row, 0]}, not 1: normalise what the encoder gives, and leave "
            "failed encodings out"
        )
    return rows / norms


def _check_dimension(embeddings: np.ndarray, dim: int, path: Path) -> None:
    if embeddings.shape[1] != dim:
        raise ValueError(
            f"embeddings have {embeddings.shape[1]} dimensions, {path} has {dim}: use the encoder that wrote it, or "
            "start a new bank"
        )
