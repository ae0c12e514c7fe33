"""The closest row of millions by 8-bit products. Exact: a product only rules out rows that cannot be the closest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch  # imported where used: without it a bank still works

LEVELS = 127
ROUNDING = 1e-6  # more than float32 rows and float64 sums can be off
PIECE = 256  # rows that are gathered at a time
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
    differences are known. What may still be the highest is computed in float64.

    Args:
        queries: (B, D) float64 unit vectors.
        blocks: all rows, numbered in order.
    """
    import torch

    scales = np.abs(queries).max(1) / LEVELS
    codes = np.rint(queries / scales[:, None]).astype(np.int8)
    errors = np.linalg.norm(queries - codes * scales[:, None], axis=1)
    codes = torch.from_numpy(codes)
    best, where, start = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64), 0
    for block in blocks:
        products = torch._int_mm(codes, torch.from_numpy(np.array(block.codes)).T)
        unit, slack = scales * block.scale, errors + (1 + errors) * block.error + ROUNDING
        likely = products.argmax(1).numpy()
        likely_products = _products(queries, block.rows, np.arange(len(queries)), likely)
        least = np.ceil((np.maximum(best, likely_products) - slack) / unit).astype(np.int32)
        values, rows = _highest(queries, block.rows, products >= torch.from_numpy(least)[:, None])
        better = values > best
        best[better], where[better] = values[better], rows[better] + start
        start += len(block.rows)
    return where


def _highest(queries: np.ndarray, rows: np.ndarray, candidates: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Highest inner product of each query with its candidates among the rows, and the row; -inf without candidates."""
    which, row = (index.numpy() for index in candidates.nonzero(as_tuple=True))
    if len(row) * DENSE > candidates.numel():
        products = queries @ rows.T.astype(np.float64)
        return products.max(1, initial=-np.inf), products.argmax(1)
    highest, best = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64)
    values = _products(queries, rows, which, row)
    order = np.lexsort((-row, values))  # so that the highest, and of equal ones the first row, is written last
    highest[which[order]], best[which[order]] = values[order], row[order]
    return highest, best


def _products(queries: np.ndarray, rows: np.ndarray, which: np.ndarray, row: np.ndarray) -> np.ndarray:
    """queries[which] . rows[row] in float64, in pieces that stay in the processor's cache."""
    pieces = [slice(i, i + PIECE) for i in range(0, len(row), PIECE)]
    found = [np.einsum("bd,bd->b", queries[which[piece]], rows[row[piece]].astype(np.float64)) for piece in pieces]
    return np.concatenate([np.zeros(0), *found])
