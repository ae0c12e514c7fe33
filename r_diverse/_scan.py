"""The closest row of millions by 8-bit products. Exact: products only rule out rows that cannot be the closest."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

LEVELS = 127
ROUNDING = 1e-6  # more than the error of float32 rows and float64 sums
SUM_ROUNDING = 255 * LEVELS * 2.0**-22  # the float32 product of codes is off by less than this for each dimension
ROWS = 1024  # rows multiplied at a time
DENSE = 8  # a single product costs as much as this many in a matrix product


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
    """Whether torch is installed and sums 8-bit products with the processor's instruction for them (VNNI).

    Without that instruction, or where ONEDNN_MAX_CPU_ISA forbids it, float32 is faster and sums saturate at 16 bits.
    So the largest sums are tried.
    """
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    if not (torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()):
        return False
    codes = np.repeat(np.array([[LEVELS], [-LEVELS]], np.int8), 64, axis=1)
    return bool((_multiplier(codes)(codes) == 64 * LEVELS**2 * np.array([[1, -1], [-1, 1]])).all())


def nearest_rows(queries: np.ndarray, blocks: Iterable[Block]) -> np.ndarray:
    """Index of the row with the highest inner product with each query, (B,) int64.

    For codes q', x' of a query q and a row x, |q.x - q'.x'| <= |q - q'| |x| + |q'| |x - x'|, and the lengths of both
    differences are known. The products that may still be the highest are computed in float64.

    Args:
        queries: (B, D) float64 unit vectors.
        blocks: all rows, numbered in order.
    """
    scales = np.abs(queries).max(1) / LEVELS
    codes = np.rint(queries / scales[:, None]).astype(np.int8)
    errors = np.linalg.norm(queries - codes * scales[:, None], axis=1)
    multiply = _multiplier(codes)
    best, where, start = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64), 0
    for block in _pieces(blocks):
        products = multiply(block.codes)
        known = best
        if start == 0:  # in later blocks this search would rule out few more rows
            known = np.einsum("bd,bd->b", queries, block.rows[products.argmax(0)].astype(np.float64))
        slack = errors + (1 + errors) * block.error + ROUNDING
        least = (known - slack) / (scales * block.scale) - codes.shape[1] * SUM_ROUNDING
        values, found = _highest(queries, block.rows, products >= least.astype(np.float32))
        better = values > best
        best[better], where[better] = values[better], found[better] + start
        start += len(block.rows)
    return where


def _pieces(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks whose products stay in the processor's cache."""
    for block in blocks:
        for i in range(0, len(block.rows), ROWS):
            yield block._replace(rows=block.rows[i : i + ROWS], codes=block.codes[i : i + ROWS])


def _multiplier(codes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from (n, D) int8 to its products with the codes (B, D) int8 of the queries, (n, B) float32.

    PyTorch's quantized linear layer does it: its weights are the queries, laid out once, its inputs are unsigned.
    """
    import torch

    weights = torch.ops.onednn.qlinear_prepack(torch.from_numpy(codes), [ROWS, codes.shape[1]])
    layer, zeros = torch.ops.onednn.qlinear_pointwise, torch.zeros(len(codes), dtype=torch.long)
    ones = torch.ones(len(codes), dtype=torch.float32)  # whatever the default dtype is

    def multiply(rows: np.ndarray) -> np.ndarray:
        unsigned = torch.from_numpy(rows.view(np.uint8) ^ 128)  # the code plus 128
        output = layer(unsigned, 1.0, 128, weights, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return output.numpy()

    return multiply


def _highest(queries: np.ndarray, rows: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest inner product of each query with its candidates among the rows (-inf without any), and the row's index.

    candidates: (rows, queries) bool.
    """
    row, which = np.divmod(np.flatnonzero(candidates), candidates.shape[1])  # many times as fast as `nonzero`
    if len(row) * DENSE > candidates.size:
        products = queries @ rows.T.astype(np.float64)
        return products.max(1), products.argmax(1)
    order = np.argsort(which, kind="stable")
    which, row = which[order], row[order]
    values = _products(queries, rows, which, row)
    order = np.lexsort((-row, values))  # so that the highest, and of equal ones the first row, is written last
    highest, best = np.full(len(queries), -np.inf), np.zeros(len(queries), np.int64)
    highest[which[order]], best[which[order]] = values[order], row[order]
    return highest, best


def _products(queries: np.ndarray, rows: np.ndarray, which: np.ndarray, row: np.ndarray) -> np.ndarray:
    """queries[which] . rows[row] in float64, `which` ascending, without a copy of a row for each product."""
    import torch

    used, column = np.unique(row, return_inverse=True)
    starts = np.searchsorted(which, np.arange(len(queries) + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        wanted = torch.sparse_csr_tensor(
            torch.from_numpy(starts),
            torch.from_numpy(column),
            torch.zeros(len(row), dtype=torch.float64),
            (len(queries), len(used)),
            check_invariants=True,
        )
    chosen = torch.from_numpy(rows[used].astype(np.float64))
    return torch.sparse.sampled_addmm(wanted, torch.from_numpy(queries), chosen.T, beta=0.0).values().numpy()
