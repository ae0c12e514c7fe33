"""Figures of odd input: written whole, of bounded size, with tokens drawn as they are."""

import warnings

import numpy as np
import pytest
from PIL import Image

from common import plots


def drawn(path) -> np.ndarray:
    with Image.open(path) as image:
        assert max(image.size) < 6000
        return np.asarray(image.convert("RGB"))


def test_a_table_is_markdown():
    table = plots.table_markdown([["a", 1], ["b", 2.5]], ["name", "value"])
    assert table.splitlines() == ["| name | value |", "| --- | --: |", "| a | 1 |", "| b | 2.5 |"]


@pytest.mark.parametrize(
    "tokens",
    [
        ["a"],
        [],
        ["$", "\\frac{", "_", "^", "%", "$x^2$", "\\", "{", "}$"],
        ["\u4f60\u597d", "\U0001f600", "\x00", "\ufffd", "\n", "\t", ""],
        ["word "] * 400,
        ["x" * 300],
    ],
    ids=["one", "none", "mathtext", "odd characters", "long", "wide"],
)
def test_token_heat_maps_of_odd_tokens(tmp_path, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font may lack a character
        path = plots.token_heatmap(tokens, [0.1 * i for i in range(len(tokens))], tmp_path / "a.png", "t $x_1$ \\")
    assert drawn(path).std() > 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_dollar_sign_is_drawn_and_not_read_as_mathematics(tmp_path):
    one = drawn(plots.token_heatmap(["$a$"], [1.0], tmp_path / "a.png", "x"))
    two = drawn(plots.token_heatmap(["aaa"], [1.0], tmp_path / "b.png", "x"))
    assert one.shape == two.shape
    assert not np.array_equal(one, two)


def test_curves_skip_what_a_run_has_not_logged(tmp_path):
    runs = {
        "a": [{"step": i, "loss": 1 / i, "only_a": None if i % 2 else float(i)} for i in range(1, 20)],
        "b": [{"step": 1, "loss": 2.0}],
        "empty": [],
    }
    path = plots.training_curves(runs, {"loss": "loss", "only_a": "only a", "none": "none"}, tmp_path / "c.png")
    assert drawn(path).std() > 1
    with pytest.raises(ValueError, match="no run has logged any of none"):
        plots.training_curves(runs, {"none": "none"}, tmp_path / "d.png")
    assert not (tmp_path / "d.png").exists()


def test_curves_over_hours_have_few_ticks_and_no_whole_ones_only(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or path)
    lines = [{"step": 9, "hours": 0.0, "accuracy": 0.5}, {"step": 1, "hours": 0.018, "accuracy": 0.75}]
    plots.training_curves({"a": lines}, {"accuracy": "accuracy"}, tmp_path / "a.png", 1, "hours", over="hours")
    (axes,) = figures[0].axes
    (line,) = axes.get_lines()
    assert line.get_xdata().tolist() == [0.0, 0.018] and line.get_ydata().tolist() == [0.5, 0.75]
    inside = [tick for tick in axes.get_xticks() if 0 <= tick <= 0.018]
    assert axes.get_xlabel() == "hours" and 2 < len(inside) <= 6


@pytest.mark.parametrize(("count", "window"), [(12, 5), (9, 5), (10, 1)])
def test_rolling_means_and_their_band(tmp_path, monkeypatch, count, window):
    """Fewer than two windows are drawn as they are, without a spread."""
    figures, size = [], window if count >= 2 * window else 1
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or path)
    values = np.random.default_rng(0).normal(size=count)
    lines = [{"step": step, "loss": value} for step, value in enumerate(values)]
    plots.training_curves({"a": lines}, {"loss": "loss"}, tmp_path / "a.png", window, band=True)
    plots.training_curves({"a": lines}, {"loss": "loss"}, tmp_path / "a.png", window)
    for figure, has_band in zip(figures, (True, False), strict=True):
        (axes,) = figure.axes
        parts = [values[i : i + size] for i in range(count - size + 1)]
        assert axes.get_lines()[0].get_ydata() == pytest.approx([part.mean() for part in parts])
        assert axes.get_lines()[0].get_xdata() == pytest.approx([i + (size - 1) / 2 for i in range(len(parts))])
        assert len(axes.collections) == has_band
        bands = "; shaded: ± the standard deviation of these" * has_band
        assert figure.get_supxlabel() == (f"Lines: means of 5 logged points{bands}" if size == 5 else "")
    highest = max(part.mean() + part.std() for part in parts)
    assert figures[0].axes[0].collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(highest)


def test_bars_with_a_missing_condition_and_values_at_the_ends(tmp_path):
    table = {
        "a very long name of a variant": {"true": (1.0, 0.95, 1.0), "other": (0.0, 0.0, 0.05)},
        "b": {"true": (0.5, 0.4, 0.6)},
    }
    assert drawn(plots.accuracy_bars(table, tmp_path / "a.png")).std() > 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [3.0, 2.0, 0.0, 0.0]])
def test_cumulative_mass(tmp_path, values):
    assert drawn(plots.cumulative_mass({"x": np.array(values)}, tmp_path / "a.png", "VA")).std() > 1


def test_a_single_point_is_seen(tmp_path, monkeypatch):
    """After the first iteration of self-play a series has one."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.training_curves(
        {"a": [{"step": 1, "loss": 2.0}], "b": [{"step": s, "loss": s} for s in range(5)]}, {"loss": "l"}, tmp_path
    )
    (axes,) = drawn[0].axes
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]
    plots.training_curves({"a": [{"step": 1, "loss": 2.0}]}, {"loss": "l"}, tmp_path)
    drawn[1].draw_without_rendering()
    assert all(tick == int(tick) for tick in drawn[1].axes[0].get_xticks())


def test_all_names_stand_inside_the_figure_and_each_line_has_a_style_of_its_own(tmp_path, monkeypatch):
    """As of all variants of a method in one small figure: more than there are colours, some of a long name."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    names = [f"a variant without part {i} of it" for i in range(9)]
    line = [{"step": step, "loss": 1.0} for step in range(3)]
    plots.training_curves(dict.fromkeys(names, line), {"loss": "l"}, tmp_path)
    plots.training_curves({"a": line, "b": line}, {"loss": "l"}, tmp_path)
    plots.cumulative_mass(dict.fromkeys(names, np.ones(3)), tmp_path, "VA")
    for axes in (figure.axes[0] for figure in drawn):
        lines = [line for line in axes.lines if line.get_label().split(":")[0] in [*names, "a", "b"]]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) > 1
    for figure, columns in zip(drawn, (1, 2), strict=False):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and legend._ncols == columns
