"""The closest row of millions by 8-bit products. Exact: a product only rules out rows that cannot be the closest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

LEVELS = 127
ROUNDING = 1e-6  # more than float32 rows and float64 sums can be off
PIECE = 256  # rows that are gathered at a time
PART = 256  # queries of one thread at a time
DENSE = 32  # gathering one row costs as much as multiplying so many


class Block(NamedTuple):
    """Rows that share one scale.

    rows: (n, D) float32 unit vectors; codes: (n, D) int8; scale: codes * scale are nearly the rows; error: length of
    the largest difference between a row and its codes.
    """

    rows: np.ndarray
    codes: np.ndarray
    scale: float
    error: float


def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (n, D) int8 and [scale, error] of rows (n, D) that form one block."""
    scale = float(np.abs(rows).max()) / LEVELS
    codes = np.rint(rows / scale).astype(np.int8)
    return codes, np.array([scale, np.linalg.norm(rows - codes * scale, axis=1).max()])


def is_fast() -> bool:
    """Whether torch is there, and the processor has an instruction for 8-bit products; else float32 is faster."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cpu._is_vnni_supported()


def nearest_rows(queries: np.ndarray, blocks: Iterable[Block]) -> np.ndarray:
    """Number of the row with the highest inner product with each query, (B,) int64.

    For codes q', x' of a query q and a row x, |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|, and the lengths of both
    differences are known. What may still be the highest is computed in float32, what is left then in float64.

    Args:
        queries: (B, D) float64 unit vectors.
        blocks: all rows, numbered in order.
    """
    import torch

    scales = np.abs(queries).max(1) / LEVELS
    codes = np.rint(queries / scales[:, None]).astype(np.int8)
    errors = np.linalg.norm(queries - codes * scales[:, None], axis=1)
    best, where, start = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64), 0
    parts = [slice(i, i + PART) for i in range(0, len(queries), PART)]
    # Threads share the work since numpy lets go of the interpreter in all that takes long here
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for block in blocks:
            products = torch._int_mm(torch.from_numpy(codes), torch.from_numpy(np.array(block.codes)).T).numpy()
            known = best
            if start == 0:  # later a search in the block itself would rule out few rows more
                known = _products(queries, block.rows, np.arange(len(queries)), products.argmax(1))
            slack = errors + (1 + errors) * block.error + ROUNDING
            least = np.ceil((known - slack) / (scales * block.scale)).astype(np.int32)
            search = partial(_search, queries, block.rows, products, least, best, where, start)
            list(pool.map(search, parts))
            start += len(block.rows)
    return where


def _search(queries, rows, products, least, best, where, start, part: slice) -> None:
    """Updates `best` and `where` of a part of the queries with the rows whose products reach `least`."""
    values, found = _highest(queries[part], rows, products[part] >= least[part, None])
    better = values > best[part]
    best[part][better], where[part][better] = values[better], found[better] + start


def _highest(queries: np.ndarray, rows: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest inner product of each query with its candidates among the rows, and the row; -inf without candidates."""
    which, row = np.divmod(np.flatnonzero(candidates), candidates.shape[1])  # many times as fast as `nonzero`
    if len(row) * DENSE > candidates.size:
        products = queries @ rows.T.astype(np.float64)
        return products.max(1, initial=-np.inf), products.argmax(1)
    highest, best = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64)
    if not len(row):
        return highest, best
    rough = _products(queries.astype(np.float32), rows, which, row)
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    margin = 2 * rows.shape[1] * np.finfo(np.float32).eps  # more than the sums of two unit vectors can be off
    near = rough >= np.repeat(np.maximum.reduceat(rough, starts), np.diff([*starts, len(which)])) - margin
    which, row = which[near], row[near]
    values = _products(queries, rows, which, row)
    order = np.lexsort((-row, values))  # so that the highest, and of equal ones the first row, is written last
    highest[which[order]], best[which[order]] = values[order], row[order]
    return highest, best


def _products(queries: np.ndarray, rows: np.ndarray, which: np.ndarray, row: np.ndarray) -> np.ndarray:
    """queries[which] . rows[row] in the format of the queries, in pieces that stay in the processor's cache."""
    pieces = [slice(i, i + PIECE) for i in range(0, len(row), PIECE)]
    found = [np.einsum("bd,bd->b", queries[which[p]], rows[row[p]].astype(queries.dtype)) for p in pieces]
    return np.concatenate([np.zeros(0, queries.dtype), *found])
