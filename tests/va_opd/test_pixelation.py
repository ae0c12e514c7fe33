"""The degraded view: pixelation of images of every mode."""

import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from va_opd import objective


def random_image(mode: str, size: tuple[int, int] = (60, 40), transparency: bool = False) -> Image.Image:
    rng = np.random.default_rng(0)
    width, height = size
    if mode in ("I;16", "F"):
        values = rng.integers(0, 2**16, (height, width))
        return Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("P", "PA"):
        image = image.quantize(64).convert(mode)
        if transparency:
            image.info["transparency"] = 0
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image.convert(mode)


MODES = ["L", "RGB", "RGBA", "LA", "P", "PA", "1", "CMYK", "I;16", "I", "F"]


@pytest.mark.parametrize(("mode", "transparency"), [*((mode, False) for mode in MODES), ("P", True)])
def test_pixelation_keeps_mode_and_size_and_leaves_few_cells(mode, transparency):
    image = random_image(mode, transparency=transparency)
    before = image.tobytes()
    got = objective.pixelate(image)
    assert (got.mode, got.size) == (mode, (60, 40))
    assert image.tobytes() == before
    if mode != "1":  # 1-bit cells are dithered
        cells = {got.getpixel((x, y)) for x in range(60) for y in range(40)}
        assert len(cells) <= 24
        assert len(cells) > 4


def pixels(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA") if image.mode in ("P", "PA", "1", "CMYK") else image
    return np.asarray(image).astype(np.float64)


@pytest.mark.parametrize(
    ("mode", "colour", "palette"),
    [
        ("L", 77, None),
        ("RGB", (100, 150, 201), None),
        ("RGBA", (100, 150, 201, 255), None),
        ("LA", (99, 255), None),
        ("P", 3, [5, 6, 7] * 3 + [100, 150, 201]),  # a colour that no standard palette holds
        ("1", 1, None),
        ("1", 0, None),
        ("CMYK", (1, 99, 200, 7), None),
        ("I;16", 40000, None),
        ("I", 70000, None),
        ("F", 0.375, None),
    ],
)
def test_pixelation_leaves_a_constant_image_alone(mode, colour, palette):
    image = Image.new(mode, (61, 37), colour)
    if palette:
        image.putpalette(palette)
    np.testing.assert_array_equal(pixels(objective.pixelate(image)), pixels(image))


def test_a_transparent_colour_of_a_palette_stays_transparent():
    image = Image.new("P", (61, 37), 3)
    image.putpalette([5, 6, 7] * 3 + [100, 150, 201])
    image.info["transparency"] = 3
    assert objective.pixelate(image).convert("RGBA").getextrema()[3] == (0, 0)


def test_pixelation_of_a_palette_image_looks_like_that_of_its_colours():
    image = random_image("P")
    expected = objective.pixelate(image.convert("RGB"))
    difference = np.abs(pixels(objective.pixelate(image).convert("RGB")) - pixels(expected))
    assert difference.max() <= 2


@pytest.mark.parametrize("opaque", [True, False])
def test_pixelation_of_a_palette_with_opacity_looks_like_that_of_its_colours(opaque):
    image = random_image("P").convert("PA") if opaque else random_image("PA")
    expected = objective.pixelate(image.convert("RGBA"))
    got = objective.pixelate(image).convert("RGBA")
    assert np.abs(pixels(got) - pixels(expected)).max() <= 2
    assert len(np.unique(pixels(got).reshape(-1, 4), axis=0)) > 4


@pytest.mark.parametrize(
    ("size", "cells"),
    [((60, 40), (6, 4)), ((467, 448), (46, 44)), ((1, 1), (1, 1)), ((8000, 20), (800, 2)), ((9, 300), (1, 30))],
)
def test_number_of_cells_is_floored_and_at_least_one(size, cells):
    """A ramp in each direction shows the grid: as many distinct columns and rows as there are cells."""
    width, height = size
    ramp = np.zeros((height, width), np.float32)
    columns = pixels(objective.pixelate(Image.fromarray(ramp + np.arange(width, dtype=np.float32))))
    rows = pixels(objective.pixelate(Image.fromarray(ramp + np.arange(height, dtype=np.float32)[:, None])))
    assert (len(np.unique(columns)), len(np.unique(rows))) == cells


@pytest.mark.parametrize("ratio", ["0.05", "0.1", "0.29", "0.35", "0.7", "1"])
def test_number_of_cells_is_exact_for_every_ratio(ratio):
    sides = range(1, 8193)
    expected = [max(1, math.floor(Fraction(ratio) * side)) for side in sides]
    assert [objective.cells((side, 1), float(ratio)) for side in sides] == [(cells, 1) for cells in expected]


def test_pixelation_averages_over_the_cell():
    """The reduction is anti-aliased: a single white pixel leaves grey, and no pixel is merely picked."""
    image = Image.new("L", (100, 100), 0)
    for x in range(0, 100, 2):
        for y in range(100):
            image.putpixel((x, y), 255)
    inner = np.asarray(objective.pixelate(image))[20:80, 20:80]
    assert abs(inner.mean() - 127.5) < 2
    assert inner.std() < 2


def test_pixelation_at_ratio_one_changes_nothing():
    image = random_image("RGB")
    assert objective.pixelate(image, 1.0).tobytes() == image.tobytes()


def test_pixelation_does_not_forget_the_orientation_tag():
    """A tag that is lost would turn the degraded view against the true one."""
    image = random_image("RGB")
    image.info["exif"] = (exif := Image.Exif()).tobytes()
    exif[274] = 6
    image.info["exif"] = exif.tobytes()
    assert objective.pixelate(image).getexif().get(274) == 6
