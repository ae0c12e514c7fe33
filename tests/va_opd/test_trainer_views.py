"""`VAOPDTrainer`: the teacher and the two views that it scores, true and pixelated, of images of all kinds."""

import base64
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from va_opd_trainers import (
    FAMILIES,
    assert_same_step,
    fixed_rollouts,
    image,
    image_rows,
    models,
    prompt,
    step,
)

from va_opd import degraded


def test_teacher_is_frozen_and_nothing_but_the_student_carries_gradient(make, monkeypatch):
    student, teacher, processor = models()
    teacher.train()
    trainer = make(parts=(student, teacher, processor))
    modes = []
    trainer.teacher_model.model.register_forward_hook(lambda m, *_: modes.append(m.training))
    gather, gathered = trainer.accelerator.gather, []
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: gathered.append(x.requires_grad) or gather(x))
    _, gradients, (batch,) = step(trainer)
    assert modes
    assert not any(modes)
    assert not trainer.teacher_model.training
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher_model.parameters())
    assert not any(value.requires_grad for value in batch.values() if isinstance(value, torch.Tensor))
    assert gathered and not any(gathered)
    assert not trainer.last_rollouts["va"].requires_grad
    assert not trainer.last_rollouts["weights"].requires_grad
    assert any(g.abs().max() > 0 for n, g in gradients.items() if "visual" in n)


@pytest.mark.parametrize("shared", [True, False])
def test_only_pixel_values_differ_in_the_degraded_view(make, shared):
    trainer = make(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    views = []
    trainer.teacher_model.model.register_forward_pre_hook(
        lambda m, a, kw: views.append({k: v.clone() if torch.is_tensor(v) else v for k, v in kw.items()}),
        with_kwargs=True,
    )
    trainer.teacher.shares = {True: shared}
    step(trainer)
    prompts = [view for view in views if "pixel_values" in view]
    if shared:  # both views of a prompt are rows of one pass
        prompts = [
            {k: v.chunk(2)[row] if torch.is_tensor(v) else v for k, v in p.items()} for p in prompts for row in (0, 1)
        ]
    assert len(prompts) == 2 * 2  # views of prompts, or of micro-batches
    for true, blurred in zip(prompts[::2], prompts[1::2], strict=True):
        assert true.keys() == blurred.keys() >= {"input_ids", "image_grid_thw", "mm_token_type_ids"}
        for key in true.keys() - {"pixel_values"}:
            assert torch.equal(*(torch.as_tensor(view[key]) for view in (true, blurred))), key
        assert true["pixel_values"].shape == blurred["pixel_values"].shape
        assert not torch.equal(true["pixel_values"], blurred["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_va_is_exactly_zero_when_the_degraded_view_is_the_true_one(make, family, pixelate_at):
    """Images that are not square: a view of another shape (squashed where the processor crops) would not be equal."""
    rows = [{**row, "image": image(i, (70, 40))} for i, row in enumerate(image_rows(4))]
    trainer = make(rows=rows, family=family, degradation_ratio=1.0, pixelate_at=pixelate_at, doctor_steps=1)
    step(trainer)
    assert trainer.last_rollouts["va"].shape[0] == 8
    assert not trainer.last_rollouts["va"].any()
    assert trainer._metrics["train"]["va/null"] == [0.0]
    assert trainer.last_rollouts["weights"].tolist() == [0.25] * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_sees_the_image(make, family):
    trainer = make(family=family, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.train()
    logs = trainer.state.log_history[:2]
    assert all(math.isfinite(log["loss"]) and log["loss"] > 0 and log["va/mean"] > 0 for log in logs)


@pytest.mark.parametrize("mode", ["RGBA", "P", "exif", "L", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_degraded_view_of_odd_images_is_the_true_view_at_ratio_one(make, monkeypatch, mode, pixelate_at):
    """Both views take the same way to RGB, and neither or both are turned by an orientation tag."""
    fixed_rollouts(monkeypatch)
    picture = image(0, (72, 40))
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 72), dtype=np.uint8)))
    elif mode == "P":
        picture = picture.quantize(32)
        picture.info["transparency"] = 0
    elif mode == "exif":
        exif = Image.Exif()
        exif[274] = 6  # turned by 90 degrees
        picture.info["exif"] = exif.tobytes()
    elif mode == "I;16":
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 72)).astype(np.uint16))
    else:
        picture = picture.convert(mode)
    trainer = make(degradation_ratio=1.0, pixelate_at=pixelate_at)
    # past the data set, which re-encodes images
    step(trainer, [{"prompt": prompt(0), "image": picture}] * 8)
    assert not trainer.last_rollouts["va"].any()


@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_alpha_does_not_darken_the_degraded_view(make, monkeypatch, pixelate_at):
    """The processor drops alpha, so a transparent white background is white; it must be so in both views."""
    fixed_rollouts(monkeypatch)
    picture = Image.new("RGBA", (72, 40), (255, 255, 255, 0))
    trainer = make(pixelate_at=pixelate_at)
    step(trainer, [{"prompt": prompt(0), "image": picture}] * 8)
    assert not trainer.last_rollouts["va"].any()  # a constant image is its own pixelation


@pytest.mark.parametrize("mode", ["RGBA", "P", "exif"])
@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_odd_images_train(make, monkeypatch, mode, pixelate_at):
    fixed_rollouts(monkeypatch)
    picture = image(0, (72, 40))
    exif = Image.Exif()
    exif[274] = 6
    if mode == "exif":
        picture.info["exif"] = exif.tobytes()
    else:
        picture = picture.convert(mode)
    trainer = make(pixelate_at=pixelate_at)
    loss, _, _ = step(trainer, [{"prompt": prompt(0), "image": picture}] * 8)
    assert math.isfinite(loss)
    assert trainer.last_rollouts["va"].any()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (1900, 10), (300, 300)])
@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_images_of_odd_sizes_train(make, monkeypatch, size, pixelate_at):
    """The processor enlarges small images and shrinks large ones; the degraded view must keep their grid."""
    fixed_rollouts(monkeypatch)
    trainer = make(pixelate_at=pixelate_at)
    loss, _, _ = step(trainer, [{"prompt": prompt(0), "image": image(0, size)}] * 8)
    assert math.isfinite(loss)


def test_pixelation_at_the_models_size_and_at_the_raw_size_differ_in_cells(make, monkeypatch):
    """A 20 x 20 image is enlarged to 32 x 32: 3 x 3 cells at the model's size, 2 x 2 at its own."""
    fixed_rollouts(monkeypatch)
    rows = [{**row, "image": image(i, (20, 20))} for i, row in enumerate(image_rows(4))]
    for pixelate_at, cells in (("model", 9.0), ("raw", 4.0)):
        trainer = make(rows=rows, pixelate_at=pixelate_at)
        step(trainer)
        assert set(trainer._metrics["train"]["va/cells"]) == {cells}


def test_the_models_size_is_width_and_height():
    pixels = {"pixel_values": torch.zeros(2, 3, 10, 20)}
    assert degraded.model_sizes(SimpleNamespace(), pixels, 2) == [(20, 10), (20, 10)]
    grids = {**pixels, "image_grid_thw": torch.tensor([[1, 2, 3], [1, 4, 5]])}
    assert degraded.model_sizes(SimpleNamespace(patch_size=7), grids, 2) == [(21, 14), (35, 28)]
    assert degraded.model_sizes(SimpleNamespace(), pixels, 1) == [None]  # tiles
    assert degraded.model_sizes(SimpleNamespace(), {"pixel_values": pixels["pixel_values"][None]}, 1) == [None]
    for name in ("do_pad", "do_center_crop"):  # the model sees more of it, or less
        assert degraded.model_sizes(SimpleNamespace(**{name: True}), pixels, 2) == [None, None]
    assert degraded.model_sizes(None, {}, 0) == []  # text


def test_degraded_images_of_another_grid_or_shape_are_one_clear_sentence():
    """Turned by a processor, an image has as many patches: only its grid shows that each is of another place."""
    batch = {"pixel_values": torch.zeros(8, 6, dtype=torch.bfloat16), "image_grid_thw": torch.tensor([[1, 2, 4]])}

    def pixels(rows: int, columns: int) -> torch.Tensor:
        grid = torch.tensor([[1, rows, columns]])
        given = {"pixel_values": torch.ones(rows * columns, 6), "image_grid_thw": grid}
        return degraded.degraded_pixel_values(lambda **_: given, batch, [[image(0)]], [0], pixelate_at="raw")[0]

    assert torch.equal(pixels(2, 4), torch.ones_like(batch["pixel_values"]))
    for rows, columns in ((4, 2), (2, 3)):
        with pytest.raises(ValueError, match="or another grid: set pixelate_at='raw'"):
            pixels(rows, columns)
    wide = {"pixel_values": torch.zeros(1, 3, 8, 16)}
    with pytest.raises(ValueError, match=r"have pixel_values \(1, 3, 8, 16\), the true ones \(1, 3, 8, 8\)"):
        degraded.degraded_pixel_values(lambda **_: wide, {"pixel_values": torch.zeros(1, 3, 8, 8)}, [[image(0)]], [0])


@pytest.mark.parametrize(("fields", "options"), [(["num_tiles"], {"crop_to_patches": True}), (["spatial_shapes"], {})])
def test_only_internvls_images_are_cut_by_an_option(fields, options):
    """TRL counts tiles for LFM2-VL too, whose processor cuts as it was set to."""
    given, pixels = [], torch.zeros(1, 3, 8, 8)
    batch = {"pixel_values": pixels, "num_tiles": [1], **{field: [1] for field in fields}}

    def process(images, return_tensors, **more):
        given.append(more)
        return {"pixel_values": pixels}

    degraded.degraded_pixel_values(process, batch, [[image(0)]], [0])
    assert given == [options]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_an_image_of_more_than_8_bits_is_refused_before_it_is_made_white(mode):
    deep = Image.new(mode, (4, 4), 300)
    with pytest.raises(ValueError, match=f"mode {mode} and values up to 300, .* scale it to 8 bits"):
        degraded.degrade(deep, None, 0.1, None)


@pytest.mark.parametrize("form", ["file", "base64", "url"])
def test_an_image_of_more_than_8_bits_is_refused_as_a_text_too(tmp_path, form):
    """`load_image` gives it back in RGB, all but its darkest values white."""
    deep = tmp_path / "deep.png"
    Image.new("I;16", (4, 4), 300).save(deep)
    encoded = base64.b64encode(deep.read_bytes()).decode()
    text = {"file": str(deep), "base64": encoded, "url": f"data:image/png;base64,{encoded}"}[form]
    assert load_image(text).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="mode I;16 and values up to 300"):
        degraded.degrade(text, None, 0.1, None)


def test_an_image_of_floats_up_to_1_is_refused_before_it_is_made_black():
    floats = Image.new("F", (4, 4), 0.9)
    assert degraded.as_rgb(floats).getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(ValueError, match="mode F and values up to 0.9, and processors turn all below 1 black"):
        degraded.check_depth(floats)
    for usual in (Image.new("F", (4, 4), 200.0), Image.new("F", (4, 4), 0), Image.new("I", (4, 4), 1)):
        degraded.check_depth(usual)


def test_siblings_share_a_degraded_image(make, monkeypatch):
    """Counted work: pixelated and processed once for 8 rollouts of 2 prompts."""
    fixed_rollouts(monkeypatch)
    trainer, calls, processed = make(), [], []
    degrade, processor = degraded.degrade, type(trainer.processing_class.image_processor)
    process = processor.__call__

    def counted(self, *given, **options):
        if "do_resize" in options:  # of images that have their size: not TRL's call
            processed.append(len(options["images"]))
        return process(self, *given, **options)

    monkeypatch.setattr(degraded, "degrade", lambda picture, *a: calls.append(a) or degrade(picture, *a))
    monkeypatch.setattr(processor, "__call__", counted)
    step(trainer)
    assert len(calls) == 2 and processed == [2]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_as_many_images_as_rows_in_a_batch_stay_with_their_rows(make, monkeypatch, family):
    """Two for every other prompt. Micro-batches order and cut the rows."""
    fixed_rollouts(monkeypatch)
    rows = [{"prompt": prompt(i), "images": [image(2 * i), image(2 * i + 1)][: 2 - i % 3 * 2]} for i in (0, 1, 3, 4)]
    assert [len(row["images"]) for row in rows] == [2, 0, 2, 0]
    settings = {"family": family, "rows": rows, "shuffle_dataset": False, "weighting": "none"}
    whole, cut = (
        step(make(**settings)),
        step(make(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)),
    )
    assert_same_step(whole, cut, gradient_tolerance=1e-5)


def test_all_images_of_a_row_are_pixelated(make, monkeypatch):
    """Three images a row: the views differ in the rows of each of them."""
    fixed_rollouts(monkeypatch)
    rows = [{"prompt": prompt(i), "images": [image(10 * i + j, (40, 40)) for j in range(3)]} for i in range(4)]
    trainer, seen = make(rows=rows), {}
    pixels = trainer._degraded_pixel_values
    monkeypatch.setattr(
        trainer,
        "_degraded_pixel_values",
        lambda batch, *a: seen.update(true=batch, other=pixels(batch, *a)) or seen["other"],
    )
    step(trainer)
    sizes = seen["true"]["image_grid_thw"].prod(1).tolist()
    assert len(sizes) == 3 * 8
    for true, other in zip(seen["true"]["pixel_values"].split(sizes), seen["other"].split(sizes), strict=True):
        assert (true != other).float().mean() > 0.9
    assert len({other.sum().item() for other in seen["other"].split(sizes)}) == 3 * 2  # three images, two prompts
