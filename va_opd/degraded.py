"""The degraded view of a batch: the same model inputs, only `pixel_values` are those of pixelated images."""

import base64
import io
import math
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from . import objective


def degraded_pixel_values(
    image_processor,
    batch: dict[str, Any],
    images: list[list[Any]],
    groups: list[int],
    ratio: float = 0.1,
    pixelate_at: str = "model",
) -> tuple[torch.Tensor, list[int]]:
    """`pixel_values` of the pixelated images in the shape of the batch's, and the cells that each degraded image has.

    Args:
        image_processor: of the model that made `batch`.
        batch: holds `pixel_values`, and `image_grid_thw` for models that cut images to a grid.
        images: the images of each row, PIL images or what `load_image` reads.
        groups: number of the prompt of each row; rows of one group share their degraded images.
        ratio: see `objective.pixelate`.
        pixelate_at: "model" pixelates at the size at which the model sees the image, "raw" at its own size.

    Raises `ValueError` when the processor gives the pixelated images another shape or grid.
    """
    at_model, has_grids = pixelate_at == "model", "image_grid_thw" in batch
    flat, keys = [image for row in images for image in row], image_keys(images, groups)
    sizes = model_sizes(image_processor, batch, len(flat)) if at_model else [None] * len(flat)
    degraded: dict[tuple[int, int], Image.Image] = {}
    for key, image, size in zip(keys, flat, sizes, strict=True):
        if key not in degraded:
            degraded[key] = degrade(image, size, ratio, getattr(image_processor, "resample", None))
    # Images that were brought to the size of their grid stay at it: a second resize may choose another grid
    options = {"do_resize": False} if has_grids and at_model else {}
    if "num_tiles" in batch and "spatial_shapes" not in batch:  # InternVL, whose processor sets this and not its part
        options["crop_to_patches"] = True
    # By row, as TRL gives the true ones: Idefics3 and SmolVLM put the tiles of a row into one tensor
    by_row = ([degraded[group, i] for i in range(len(row))] for group, row in zip(groups, images, strict=True))
    given = list(degraded.values()) if has_grids else list(by_row)
    processed = image_processor(images=given, return_tensors="pt", **options)
    pixels, grid = processed["pixel_values"], processed.get("image_grid_thw")
    if has_grids:  # a patch belongs to an image, so siblings need no processing of their own
        number = {key: n for n, key in enumerate(degraded)}
        numbers, patches = [number[key] for key in keys], pixels.split(grid.prod(1).tolist())
        pixels, grid = torch.cat([patches[n] for n in numbers]), grid[numbers]
    true = batch["pixel_values"]
    if pixels.shape != true.shape or (has_grids and not torch.equal(grid, batch["image_grid_thw"].cpu())):
        raise ValueError(
            f"the pixelated images have pixel_values {tuple(pixels.shape)}, the true ones {tuple(true.shape)}, or "
            "another grid: set pixelate_at='raw' for this processor"
        )
    cells = [math.prod(objective.cells(image.size, ratio)) for image in degraded.values()]
    return pixels.to(true.device, true.dtype), cells


def image_keys(images: list[list[Any]], groups: list[int]) -> list[tuple[int, int]]:
    """(number of its prompt, place in its row) of each image, row by row: siblings have the same keys."""
    return [(group, i) for group, row in zip(groups, images, strict=True) for i in range(len(row))]


def model_sizes(image_processor, batch: dict[str, Any], num_images: int) -> list[tuple[int, int] | None]:
    """(width, height) at which the model sees each image of a batch; None where the processor cuts, crops or pads."""
    if "image_grid_thw" in batch:
        patch = image_processor.patch_size
        return [(columns * patch, rows * patch) for _, rows, columns in batch["image_grid_thw"].tolist()]
    pixels = batch.get("pixel_values")
    changed = getattr(image_processor, "do_center_crop", None) or getattr(image_processor, "do_pad", None)
    if pixels is None or changed or pixels.ndim != 4 or len(pixels) != num_images:
        return [None] * num_images
    return [(pixels.size(-1), pixels.size(-2))] * num_images


def degrade(image: Any, size: tuple[int, int] | None, ratio: float, resample: int | None) -> Image.Image:
    """One image as RGB, brought to `size` with the processor's filter if there is a size, then pixelated."""
    check_depth(image)
    image = image if isinstance(image, Image.Image) else load_image(image)
    image = as_rgb(image)  # before cells are averaged, which would apply alpha
    if size is not None:
        image = image.resize(size, resample if isinstance(resample, int) else Image.Resampling.BICUBIC)
    return objective.pixelate(image, ratio)


def as_rgb(image: Image.Image) -> Image.Image:
    """A new image in RGB as processors make it: transformers 5.17 drops alpha, 5.23 puts white behind it."""
    return Image.fromarray(np.array(convert_to_rgb(image)))


def check_depth(image: Any) -> None:
    """Raises `ValueError` for an image of which processors turn all above 255 white (more than 8 bits), or all below 1
    black (floats up to 1).

    Looks at PIL images and, as `load_image` reads them, paths and base64; an address is not fetched for this.
    """
    if isinstance(image, str) and not image.startswith(("http://", "https://")):
        file = image if os.path.isfile(image) else io.BytesIO(base64.decodebytes(image.split(",")[-1].encode()))
        with Image.open(file) as opened:
            check_depth(opened)
    elif isinstance(image, Image.Image) and image.mode.startswith(("I", "F")):
        # I;16B cannot say its extrema
        highest = (image.convert("I") if ";" in image.mode else image).getextrema()[1]
        dark = image.mode == "F" and 0 < highest <= 1
        if highest > 255 or dark:
            turned = "below 1 black" if dark else "above 255 white"
            raise ValueError(
                f"an image has mode {image.mode} and values up to {highest:g}, and processors turn all {turned}: "
                "scale it to 8 bits"
            )
