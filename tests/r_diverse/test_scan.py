"""The 8-bit scan: the row that a search in float64 finds, and few rows looked at closely."""

import numpy as np
import pytest
import torch
from r_diverse_banks import exact_multiplier

from r_diverse import _scan


@pytest.fixture(autouse=True)
def exact(monkeypatch, request):
    """Whether this processor multiplies codes; else what stands around the products is tested with others."""
    if not (fast := _scan.is_fast()):
        monkeypatch.setattr(_scan, "_multiplier", exact_multiplier)
    return fast


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blocks(rows: np.ndarray, size: int) -> list[_scan.Block]:
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [_scan.Block(part, codes, *entry) for part in parts for codes, entry in [_scan.encode(part)]]


def gaussian(rng, number, dim):
    return unit(rng.standard_normal((number, dim)))


def one_large_coordinate(rng, number, dim):
    """As of encoders with outlier dimensions: most codes are 0."""
    rows = rng.standard_normal((number, dim))
    rows[:, 3] += 30
    return unit(rows)


def nearly_equal(rng, number, dim):
    return unit(np.ones(dim) + 1e-4 * rng.standard_normal((number, dim)))


def sparse(rng, number, dim):
    return np.eye(dim, dtype=np.float32)[rng.integers(dim, size=number)]


@pytest.mark.parametrize("size", [7, 64, 1000])
@pytest.mark.parametrize("kind", [gaussian, one_large_coordinate, nearly_equal, sparse])
def test_the_nearest_row_is_the_one_of_float64(kind, size):
    rng = np.random.default_rng(0)
    rows, queries = kind(rng, 500, 96), kind(rng, 40, 96).astype(np.float64)
    queries[5] = rows[321]
    queries[6] = -rows[3]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found = _scan.nearest_rows(queries, blocks(rows, size))
    products = queries @ rows.T.astype(np.float64)
    assert np.take_along_axis(products, found[:, None], 1)[:, 0] == pytest.approx(products.max(1), abs=1e-15)


def test_near_copies_are_told_apart():
    """In float32 their products are equal up to rounding; few rows are near, so only those are computed."""
    rng = np.random.default_rng(3)
    rows, queries = gaussian(rng, 4000, 96), gaussian(rng, 40, 96).astype(np.float64)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for i, query in enumerate(queries):
        rows[20 * i : 20 * i + 9] = unit(query + 1e-7 * rng.standard_normal((9, 96)))
    found = _scan.nearest_rows(queries, blocks(rows, 1000))
    products = queries @ rows.T.astype(np.float64)
    assert np.take_along_axis(products, found[:, None], 1)[:, 0] == pytest.approx(products.max(1), abs=1e-15)


@pytest.mark.parametrize("size", [100, 4000])
def test_of_equal_rows_the_first_is_found(size):
    rows = gaussian(np.random.default_rng(6), 4000, 96)
    rows[[17, 18, 300]] = rows[1234]
    assert _scan.nearest_rows(rows[[1234]].astype(np.float64), blocks(rows, size)).tolist() == [17]


def test_the_error_of_the_rows_counts_where_that_of_the_query_is_zero():
    rows, queries = gaussian(np.random.default_rng(5), 500, 96), np.eye(96)
    assert _scan.nearest_rows(queries, blocks(rows, 64)).tolist() == rows.argmax(0).tolist()


def test_the_error_bounds_every_product():
    """The difference of two products is never above the bound: rows that are off by half a level in one direction."""
    rng = np.random.default_rng(1)
    scale = 0.1 / _scan.LEVELS
    codes = rng.integers(-60, 60, (200, 128))
    rows = scale * (codes + 0.499)
    rows[:, 0] = 0.1  # so that the scale of the block is this one
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    found, (found_scale, error) = _scan.encode(rows.astype(np.float32))
    assert found_scale == pytest.approx(scale)
    differences = np.linalg.norm(rows - found * found_scale, axis=1)
    assert differences.max() == pytest.approx(error, rel=1e-4)
    assert (np.abs(rows @ (rows - found * found_scale).T) <= length * error * (1 + 1e-6)).all()


def test_a_row_whose_errors_point_the_worst_way_is_found():
    """What the query's codes leave out points as the row does, and what the row's leave out as the codes of the query,
    which are longer than the query is: no term of the bound can be left out."""
    off, level = 0.49, np.where(np.arange(256) % 3, -10, 9)
    codes = np.array([127.0] + [126.0] * 256)
    row = np.concatenate([[0], level]) + off * codes / 126
    query = codes + off * row / np.abs(row).max()
    query[0] = 127
    length = np.linalg.norm(row)
    row, query = row / length, query / np.linalg.norm(query)
    largest = 127 / length  # coordinate of the row that sets the scale, and is opposite to the query else
    other = -query * np.sqrt((1 - largest**2) / (1 - query[0] ** 2))
    other[0] = largest
    cosine, beside = query @ row - 2e-6, np.random.default_rng(7).standard_normal(257)
    beside -= query * (query @ beside)
    near = cosine * query + np.sqrt(1 - cosine**2) * beside / np.linalg.norm(beside)
    rows = unit(np.stack([near, other, row]))
    found = _scan.nearest_rows(query[None], [*blocks(rows[:1], 1), *blocks(rows[1:], 2)])
    assert found.tolist() == (rows @ query).argmax(keepdims=True).tolist() == [2]


def test_a_product_that_is_off_as_far_as_it_may_be_loses_no_row(monkeypatch):
    """Rows that are what their codes say, but for the last bit; that of the nearest is multiplied too low."""
    off = iter((0, 0.99 * 96 * 255 * 127 / 2**22))  # float32 sums of 8-bit numbers without sign times codes

    def multiplier(queries):
        return lambda rows: (rows.astype(float) @ queries.T - next(off)).astype(np.float32)

    query = np.eye(96)[:1]
    rows = unit(100 * query + 127 * np.eye(96)[1:3])
    rows[0, 0] = np.nextafter(rows[0, 0], np.float32(0))
    monkeypatch.setattr(_scan, "_multiplier", multiplier)
    assert _scan.nearest_rows(query, blocks(rows, 1)).tolist() == [1]


def test_the_error_is_that_of_the_row_that_is_off_most():
    rows = gaussian(np.random.default_rng(4), 50, 96)
    rows[0] = np.eye(96)[0]  # its codes are exact
    codes, (scale, error) = _scan.encode(rows)
    assert error == pytest.approx(np.linalg.norm(rows - codes * scale, axis=1).max(), rel=1e-6)
    assert error > 0.01


def test_few_rows_are_looked_at_closely(monkeypatch):
    """Counted work: of 400,000 pairs, the products in float64."""
    rng, counted, highest = np.random.default_rng(2), [], _scan._highest

    def count(queries, rows, candidates):
        counted.append(int(candidates.sum()))
        return highest(queries, rows, candidates)

    monkeypatch.setattr(_scan, "_highest", count)
    rows, queries = gaussian(rng, 4000, 768), gaussian(rng, 100, 768).astype(np.float64)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    _scan.nearest_rows(queries, blocks(rows, 1000))
    assert 100 <= sum(counted) < 100 * 4000 // 50


@pytest.mark.parametrize("dim", [1, 96, 1536, 8192])
def test_products_of_codes(dim, exact):
    """By a kernel without a public name: no sum overflows, and those beyond 2**24 are off by rounding alone."""
    if not exact:
        pytest.skip("this processor has no instruction for 8-bit products, so float32 ones are taken")
    rng = np.random.default_rng(0)
    rows, queries = (rng.integers(-127, 128, (count, dim)).astype(np.int8) for count in (5, 3))
    rows[0], rows[1], queries[0], queries[1] = 127, -127, 127, -127
    products = _scan._multiplier(queries)(rows)
    exact = rows.astype(np.int64) @ queries.astype(np.int64).T
    assert products.shape == (5, 3) and products.dtype == np.float32
    assert np.abs(products - exact).max() <= _scan.SUM_ROUNDING * dim
    if dim <= 96:
        assert (products == exact).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_has_no_effect(dtype):
    rng = np.random.default_rng(0)
    rows, queries = gaussian(rng, 50, 8), gaussian(rng, 3, 8).astype(np.float64)
    expected = _scan.nearest_rows(queries, blocks(rows, 10))
    torch.set_default_dtype(dtype)
    try:
        assert (_scan.nearest_rows(queries, blocks(rows, 10)) == expected).all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("least", "largest", "fast"),
    [(-np.inf, np.inf, True), (-(2**15), 2**15 - 1, False), (-np.inf, 2**15 - 1, False), (-(2**15), np.inf, False)],
)
def test_sums_that_are_cut_at_16_bits_are_not_used(least, largest, fast, monkeypatch):
    def multiplier(codes):
        return lambda rows: np.clip(rows.astype(np.float32) @ codes.T.astype(np.float32), least, largest)

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(_scan, "_multiplier", multiplier)
    assert _scan.is_fast() is fast
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert _scan.is_fast() is False


def test_without_torch_it_is_not_fast(monkeypatch):
    monkeypatch.setattr(_scan.importlib.util, "find_spec", lambda name: None)
    assert _scan.is_fast() is False
