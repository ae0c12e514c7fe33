"""The figures that all methods share. Each writes one PNG, whole or not at all, and returns its path."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.lib.stride_tricks import sliding_window_view

# Okabe and Ito's palette: told apart with any colour vision
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # where there are more lines than colours
MARK = 0.1  # share of the tokens at which `cumulative_mass` says what they hold
WIDTH = 48  # characters of a line of `token_heatmap`
DPI = 150  # of a picture: text stays sharp on a page of 72 rem


def table_markdown(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, str],
    path: str | Path,
    smooth: int = 3,
    unit: str = "step",
    over: str = "step",
    band: bool = False,
) -> Path:
    """Small multiples, one for each metric that a run has logged, one line for each run.

    Args:
        runs: name of a run -> its logged lines with `step`, or what `over` names.
        metrics: name of a metric -> label of its axis.
        smooth: lines show the mean over so many logged points.
        unit: label of the horizontal axis, what `step` counts.
        over: what the lines have on the horizontal axis.
        band: shade a standard deviation of these points on both sides of their mean.
    """
    present = [name for name in metrics if any(name in line for lines in runs.values() for line in lines)]
    if not present:
        raise ValueError(f"no run has logged any of {', '.join(metrics)}")
    wide = min(len(present), 2)
    figure = Figure(figsize=(5 * wide, 3.2 * math.ceil(len(present) / wide)), layout="constrained")
    for place, metric in enumerate(present, start=1):
        axes = figure.add_subplot(math.ceil(len(present) / wide), wide, place)
        for number, (name, lines) in enumerate(runs.items()):
            points = np.array(
                [(line[over], line[metric]) for line in lines if line.get(metric) is not None], dtype=float
            )
            if len(points):
                shown, spread = _smoothed(points, smooth)
                marker = "o" if len(shown) == 1 else None  # a line of one point would not be seen
                style = _style(number)
                axes.plot(*shown.T, marker=marker, label=name, **style)
                if band:
                    x, y = shown.T
                    axes.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=unit, ylabel=metrics[metric])
        whole = {"integer": True, "min_n_ticks": 1} if over == "step" else {"nbins": 6}  # 0.0025 is long for a tick
        axes.xaxis.get_major_locator().set_params(**whole)
        _light(axes)
        if place == 1:
            _legend_above(figure, axes)
    if any(len(lines) >= 2 * smooth > 2 for lines in runs.values()):
        bands = "; shaded: ± the standard deviation of these" * band
        figure.supxlabel(f"Lines: means of {smooth} logged points{bands}", fontsize="small")
    figure.align_ylabels()
    return save(figure, path)


def accuracy_bars(table: Mapping[str, Mapping[str, tuple[float, float, float]]], path: str | Path) -> Path:
    """Bars of accuracy with 95 % intervals: variant -> condition -> (value, low, high), one colour a condition."""
    conditions = list(dict.fromkeys(condition for row in table.values() for condition in row))
    figure = Figure(figsize=(1.6 + 1.5 * len(table), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(conditions)
    for number, condition in enumerate(conditions):
        places = [i + (number - (len(conditions) - 1) / 2) * width for i in range(len(table))]
        values, lows, highs = np.array([row.get(condition, (np.nan,) * 3) for row in table.values()]).T
        axes.bar(places, values, width * 0.92, color=PALETTE[number], label=condition)
        axes.errorbar(places, values, [values - lows, highs - values], fmt="none", ecolor="#333333", capsize=3)
        for place, value, high in zip(places, values, highs, strict=True):
            if np.isfinite(value):
                axes.text(place, high + 0.015, f"{value:.2f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(table)), ["\n".join(textwrap.wrap(name, 14)) for name in table])
    axes.set(ylabel="accuracy, 95 % interval", ylim=(0, 1.08))
    _legend_above(figure, axes)
    _light(axes)
    axes.grid(visible=False, axis="x")  # names are no scale
    return save(figure, path)


def cumulative_mass(values: Mapping[str, np.ndarray], path: str | Path, what: str) -> Path:
    """Share of the total that the largest values hold, against the share of tokens; marked at `MARK`.

    `what` the values are, for the label.
    """
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, array) in enumerate(values.items()):
        ranked = np.sort(np.asarray(array, dtype=float))[::-1]
        mass = np.concatenate([[0], np.cumsum(ranked)]) / max(ranked.sum(), 1e-12)
        share = np.linspace(0, 1, len(mass))
        at_mark = float(np.interp(MARK, share, mass))
        axes.plot(share, mass, label=f"{name}: {at_mark:.0%} at {MARK:.0%}", **_style(number))
    axes.axvline(MARK, color="#999999", linewidth=1, linestyle=":")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="the same in every token")
    axes.set(xlabel="share of tokens, largest first", ylabel=f"share of all {what}", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", edgecolor="none", framealpha=0.9)  # it may cover the diagonal
    _light(axes)
    return save(figure, path)


def token_heatmap(tokens: Sequence[str], values: Sequence[float], path: str | Path, title: str, image=None) -> Path:
    """One response as text, each token on a background coloured by its value; a PIL image above, if given.

    Values are in nats. Lines wrap after `WIDTH` characters; blanks and line ends are made visible.
    """
    boxes, lines = _place(tokens)
    inch = 9 / WIDTH
    above = 0.0 if image is None else 1.2
    figure = Figure(figsize=(10, 1.5 + above + 0.42 * lines), layout="constrained")
    heights = ([above] if image is not None else []) + [0.42 * lines + 0.1, 0.18]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if image is not None:
        picture = figure.add_subplot(grid[0])
        picture.imshow(image, interpolation="nearest")
        picture.set_axis_off()
    axes = figure.add_subplot(grid[-2])
    scale = ScalarMappable(Normalize(0, max(max(values, default=0.0), 1e-9)), colormaps["YlOrRd"])
    for (column, line, text), value in zip(boxes, values, strict=True):
        colour = scale.to_rgba(value)
        ink = "white" if sum(colour[:3]) < 1.5 else "black"
        place = (column, -line - 0.95)
        axes.add_patch(Rectangle(place, len(text), 0.9, facecolor=colour, edgecolor="white", linewidth=1.5))
        middle = column + len(text) / 2
        axes.text(
            middle,
            -line - 0.5,
            text,
            ha="center",
            va="center",
            family="monospace",
            color=ink,
            fontsize=min(15, 95 * inch),
            parse_math=False,  # a token may hold a dollar sign
        )
    used = max(column + len(text) for column, _, text in boxes) if boxes else 1
    axes.set(xlim=(0, max(used, 12)), ylim=(-lines, 0))
    axes.set_axis_off()
    figure.suptitle(title, fontsize=11, parse_math=False)
    unit = "nats (\u00b7 in the text: a blank)"
    figure.colorbar(scale, cax=figure.add_subplot(grid[-1]), orientation="horizontal", label=unit)
    return save(figure, path)


def _place(tokens: Sequence[str]) -> tuple[list[tuple[int, int, str]], int]:
    """(column, line, visible text) of each token, and the number of lines."""
    boxes, column, line = [], 0, 0
    for token in tokens:
        text = token.replace("\n", "\u21b5").replace("\t", "\u2192").replace(" ", "\u00b7") or "\u2205"
        text = "".join(c if c.isprintable() else "\ufffd" for c in text)
        if column and column + len(text) > WIDTH:
            column, line = 0, line + 1
        boxes.append((column, line, text))
        column += len(text)
        if "\n" in token:
            column, line = 0, line + 1
    return boxes, line + 1


def _smoothed(points: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Rolling means (M, 2) of (N, 2) points, and the standard deviation (M,) of the second column in each window; too
    few points stay as they are."""
    windows = sliding_window_view(points, window if len(points) >= 2 * window else 1, axis=0)
    return windows.mean(-1), windows[:, 1].std(-1)


def _style(number: int) -> dict[str, str]:
    """Colour and dashes of a line; no two of 28 lines have both in common."""
    turn, place = divmod(number, len(PALETTE))
    return {"color": PALETTE[place], "linestyle": LINES[turn % len(LINES)]}


def _legend_above(figure: Figure, axes) -> None:
    """Names of the lines or bars above the figure, in as many columns, four at most, as its width has room for."""
    handles, names = axes.get_legend_handles_labels()
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def _light(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG whole or not at all, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
    os.replace(temporary, path)
    return path
