"""Images of the data: brought within the budget in pixels, and all decoded once before a run."""

from __future__ import annotations  # datasets is imported where it is used: `--help` needs none

import io
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image as PILImage
from PIL import ImageOps

from .degraded import check_depth

if TYPE_CHECKING:
    from datasets import Dataset

MIN_PIXELS, MAX_PIXELS = 262_144, 4_194_304  # image budget of the paper's framework
MAX_ASPECT = 200  # longer side / shorter side, above which Qwen-VL's processors raise an error


def fit_budget(image: PILImage.Image, min_pixels: int, max_pixels: int) -> PILImage.Image:
    """The image upright, in RGB, and scaled, its aspect kept, until its area lies within the budget in pixels."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    size = budget_size(image.size, min_pixels, max_pixels)
    return image if size == image.size else image.resize(size, PILImage.Resampling.BICUBIC)


def budget_size(size: tuple[int, int], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) of `fit_budget` of an image of that size."""
    area = size[0] * size[1]
    scale = (max_pixels / area) ** 0.5 if area > max_pixels else max(1.0, (min_pixels / area) ** 0.5)
    return size if scale == 1.0 else tuple(max(1, int(side * scale)) for side in size)


@lru_cache(maxsize=64)
def decoded(data: bytes | None, path: str | None, min_pixels: int, max_pixels: int) -> PILImage.Image:
    """The image in its budget. TRL's loader reads a generation batch anew for each sibling and each micro-batch."""
    with _opened(data, path) as image:
        return fit_budget(image, min_pixels, max_pixels)


def _opened(data: bytes | None, path: str | None) -> PILImage.Image:
    return PILImage.open(io.BytesIO(data) if data else path)


def check_readable(dataset: Dataset, source: str, min_pixels: int, max_pixels: int) -> None:
    """Decodes every image once, so that a broken file stops the run at its start and not in step 900.

    `dataset` has the columns `id` and `images`, lists of {"bytes", "path"}.
    Raises `ValueError` naming `source` and the rows at fault.
    """
    checked = dataset.map(
        lambda row: {"fault": _fault(row["images"], min_pixels, max_pixels)},
        remove_columns=dataset.column_names,
        load_from_cache_file=False,  # a cached verdict would not notice that a file has changed
        desc="checking images",
    )
    faults = [(row_id, fault) for row_id, fault in zip(dataset["id"], checked["fault"], strict=True) if fault]
    if faults:
        shown = "; ".join(f"id {row_id}: {fault}" for row_id, fault in faults[:3])
        raise ValueError(
            f"data {source!r} has {len(faults)} rows with unreadable images ({shown}): repair or remove them"
        )


def _fault(images: list[dict], min_pixels: int, max_pixels: int) -> str:
    """What is wrong with the first image that a processor will not read; empty for none."""
    for image in images:
        if image is None or not (image["bytes"] or image["path"]):
            return "no image"
        try:
            with _opened(image["bytes"], image["path"]) as opened:
                opened.load()
                check_depth(opened)
                size = budget_size(opened.size, min_pixels, max_pixels)  # whose rounding changes the aspect
                if max(size) > MAX_ASPECT * min(size):
                    shown = f"{opened.width} x {opened.height}, in the image budget {size[0]} x {size[1]}"
                    return f"{shown}: one side is over {MAX_ASPECT} times the other"
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
            return f"{type(error).__name__}: {error}"
    return ""
