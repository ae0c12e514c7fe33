"""`VAOPDTrainer` on tiny random models: against references written from the definitions, invariances, bad input,
resuming, learning. CPU, no network. Most tests replace generation by fixed rollouts, so that numbers can be compared.
"""

import copy
import functools
import inspect
import itertools
import logging
import math
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import utils as trl_utils

from common.evaluation.engines import never_sampled
from common.tiny import tiny_qwen2_5_vl, tiny_qwen3_vl
from va_opd import VAOPDConfig, VAOPDTrainer, _trl, checks, degraded, doctor, lm_head, objective, siblings
from va_opd import trainer as va_opd_trainer
from va_opd.checks import check_same_tokens, sibling_fingerprints
from va_opd.engine import VLLMRollouts
from va_opd.lm_head import logit_scale

ROOT = Path(__file__).resolve().parents[2]


# --- models, data, trainers ----------------------------------------------------------------


def _text_config(vocab: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_llava(hidden: int = 64, layers: int = 2):
    """No `image_grid_thw`: one (3, H, W) tensor an image, after a resize of the short side and a centre crop."""
    tokenizer = tiny_qwen3_vl(hidden=32)[1].tokenizer
    template = tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=Qwen3Config(**_text_config(len(tokenizer), hidden, layers)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


def tiny_gemma3(hidden: int = 64, layers: int = 2):
    """`token_type_ids` instead of `mm_token_type_ids`, and a processor whose `image_token` is not the placeholder."""
    base = tiny_qwen3_vl(hidden=32)[1].tokenizer
    names = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base._tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=names,
    )
    template = base.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=template,
        image_seq_length=4,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Gemma3Config(
        text_config=_text_config(len(tokenizer), hidden, layers),
        vision_config=dict(VISION),
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    model = Gemma3ForConditionalGeneration(config)
    # starts at zero: a random model would not see its image
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model, processor


class ImageOnlyInternVLProcessor(InternVLProcessor):
    """Without the part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)


def tiny_internvl(hidden: int = 64, layers: int = 2):
    """An image is two or three tiles and a small view of all of it, each a row of `pixel_values`."""
    base = tiny_qwen3_vl(hidden=32)[1].tokenizer
    names = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    names |= {"context_image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base._tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=names,
    )
    processor = ImageOnlyInternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=2, max_patches=3),
        tokenizer,
        chat_template=base.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"),
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(len(tokenizer), hidden, layers)},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
    )
    return InternVLForConditionalGeneration(config), processor


def tiny_idefics3(hidden: int = 64, layers: int = 2):
    """The tiles of all images of a row stand together: `pixel_values` (B, tiles, 3, H, W), padded with empty tiles."""
    special = ["<pad>", "<eos>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    vocabulary = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    words.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = Idefics3Config(
        vision_config=dict(VISION),
        text_config={"model_type": "llama", **_text_config(len(tokenizer), hidden, layers)},
        scale_factor=2,
        image_token_id=vocabulary["<image>"],
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config)
    return model, Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


FAMILIES = {
    "qwen3_vl": tiny_qwen3_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "llava": tiny_llava,
    "gemma3": tiny_gemma3,
    "internvl": tiny_internvl,
    "idefics3": tiny_idefics3,
}


def image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def prompt(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Q{i}" + "?" * (1 + i % 3)}]


def image_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": prompt(i), "image": image(i, (40 + 8 * (i % 2), 40))} for i in range(n)]


def mixed_rows(n: int) -> list[dict[str, Any]]:
    """Every other prompt without an image, the first one too."""
    return [{**row, "image": row["image"] if i % 2 else None} for i, row in enumerate(image_rows(n))]


def models(family: str = "qwen3_vl", sharp: float = 6.0):
    """A student, a wider teacher with peaked distributions (random ones are all but uniform), the processor."""
    torch.manual_seed(0)
    student, processor = FAMILIES[family](hidden=32)
    torch.manual_seed(1)
    teacher, _ = FAMILIES[family](hidden=64)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(sharp)
        student.get_output_embeddings().weight.mul_(sharp / 2)
    return student, teacher, processor


def build(
    output_dir: str | Path,
    rows: list[dict[str, Any]] | None = None,
    family: str = "qwen3_vl",
    parts: tuple | None = None,
    callbacks: list | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    peft_config: peft.LoraConfig | None = None,
    **overrides,
) -> VAOPDTrainer:
    """A trainer of two prompts times four rollouts a step; `parts` are student, teacher and processor."""
    student, teacher, processor = parts or models(family)
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "doctor_steps": 0,
    }
    return VAOPDTrainer(
        model=student,
        teacher_model=teacher,
        args=VAOPDConfig(**{**defaults, **overrides}),
        train_dataset=Dataset.from_list(rows or image_rows(4)),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=processor,
        callbacks=callbacks,
        peft_config=peft_config,
    )


@pytest.fixture
def make(tmp_path) -> Callable[..., VAOPDTrainer]:
    return lambda rows=None, **overrides: build(overrides.pop("output_dir", tmp_path / "run"), rows, **overrides)


def fixed_rollouts(monkeypatch, length: int | None = None) -> None:
    """Completions that depend on the prompt and the sibling's number only: 1 to 6 letters and an end of sequence."""

    def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        k = self.args.num_generations if self.model.training else 1
        start = len(prompt_ids) * self.accelerator.process_index
        rollouts = []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([sum(ids), (start + row) % k])
            rollouts.append([*rng.integers(10, 100, length or rng.integers(1, 7)).tolist(), self.eos_token_ids[0]])
        return rollouts

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", generate)


def step(trainer: VAOPDTrainer, inputs=None) -> tuple[float, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Loss, gradients and micro-batches of one optimizer step, without the update."""
    accumulation = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = accumulation
    inputs = next(iter(trainer.get_train_dataloader())) if inputs is None else inputs
    trainer.model.train()
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, inputs, None).item() for _ in range(accumulation))
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, gradients, trainer._buffered_inputs


def assert_same_step(a, b, loss_tolerance: float = 1e-6, gradient_tolerance: float = 1e-6) -> None:
    # float32: z-scores of nearly equal siblings enlarge the last bits of their log-probabilities
    assert a[0] == pytest.approx(b[0], rel=5e-6, abs=loss_tolerance)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        message = (lambda n: lambda text: f"{n}: {text}")(name)
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-4, atol=gradient_tolerance, msg=message)


# --- references ----------------------------------------------------------------


def response_logits(model, batch: dict[str, Any], **replaced) -> torch.Tensor:
    """(B, T, V) float64 logits of the response tokens from the model's public forward."""
    extra = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "token_type_ids")
    given = {key: batch[key] for key in extra if key in batch} | replaced
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].size(1)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits[:, -length - 1 : -1].double()


def reference_kl(student, teacher, batch, vocab: int, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) reverse KL over the tokenizer's vocabulary, in float64, with gradient to the student."""
    s = (response_logits(student, batch)[..., :vocab] / temperature).log_softmax(-1)
    with torch.no_grad():
        t = (response_logits(teacher, batch)[..., :vocab] / temperature).log_softmax(-1)
    return (s.exp() * (s - t)).sum(-1)


def gradients_of(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def pixelated_pixels(processor, batch: dict[str, Any], images: list[Image.Image]) -> torch.Tensor:
    """Pixelation at the model's size with numpy-free PIL calls, as Section 3.1 and the specification say it."""
    patch, degraded = processor.image_processor.patch_size, []
    for picture, (_, rows, columns) in zip(images, batch["image_grid_thw"].tolist(), strict=True):
        width, height = columns * patch, rows * patch
        small = max(1, width // 10), max(1, height // 10)
        picture = picture.resize((width, height), Image.BICUBIC).resize(small, Image.BILINEAR)
        degraded.append(picture.resize((width, height), Image.NEAREST))
    return processor.image_processor(images=degraded, return_tensors="pt")["pixel_values"]


# --- the contact with TRL ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (DistillationTrainer._get_train_sampler, "self dataset"),
        (DistillationTrainer._prepare_inputs, "self generation_batch"),
        (DistillationTrainer._tokenize_prompts, "self prompts"),
        (DistillationTrainer._generate, "self prompts"),
        (DistillationTrainer._generate_single_turn, "self prompt_ids images multimodal_fields has_tool_images"),
        (DistillationTrainer._generate_and_score_completions, "self inputs"),
        (DistillationTrainer.compute_loss, "self model inputs return_outputs num_items_in_batch"),
        (DistillationTrainer._compute_loss, "self unwrapped_student inputs num_items_in_batch"),
        (
            DistillationTrainer._get_last_hidden_state,
            "self unwrapped_model input_ids attention_mask logits_to_keep " + " ".join(_trl.MULTIMODAL_KEYS),
        ),
        (_trl.chunked_divergence._compute_dtype, "hidden"),
        (_trl.chunked_divergence._project, "tile hidden_chunk weight bias start end dtype"),
        (_trl.chunked_divergence._addmm_fp32, "acc a b"),
        (_trl.chunked_divergence._use_triton, "device"),
        (
            getattr(_trl.chunked_divergence._stats_kernel, "fn", _trl.chunked_divergence._stats_kernel),
            "s_ptr s_stride t_ptr t_stride s_max_ptr s_sum_ptr s_x_sum_ptr t_max_ptr t_sum_ptr t_weighted_gap_ptr "
            "s_weighted_gap_ptr n_cols s_scale s_softcap t_scale t_softcap inv_t S_HAS_SOFTCAP T_HAS_SOFTCAP "
            "BLOCK_SIZE",
        ),
        (
            getattr(_trl.chunked_divergence._backward_kernel, "fn", _trl.chunked_divergence._backward_kernel),
            "s_ptr s_stride t_ptr t_stride s_log_z_ptr t_log_z_ptr aux_ptr grad_ptr n_cols beta s_scale s_softcap "
            "t_scale t_softcap inv_t MODE S_HAS_SOFTCAP T_HAS_SOFTCAP BLOCK_SIZE",
        ),
        (trl_utils.split_pixel_values_by_grid, "batch"),
        (trl_utils.unsplit_pixel_values_by_grid, "batch"),
        (trl_utils.maybe_gather_lm_head_ctx, "params"),
        (trl_utils.RepeatSampler.__init__, "self data_source mini_repeat_count batch_size repeat_count shuffle seed"),
    ],
)
def test_private_names_of_trl_have_the_signature_that_the_trainer_expects(function, parameters):
    assert list(inspect.signature(inspect.unwrap(function)).parameters) == parameters.split()


def test_every_override_has_trls_parameters():
    for name, function in vars(VAOPDTrainer).items():
        upstream = getattr(DistillationTrainer, name, None)
        if not inspect.isfunction(function) or upstream is None or name == "__init__":
            continue
        ours, theirs = (inspect.signature(inspect.unwrap(f)).parameters for f in (function, upstream))
        assert list(ours) == list(theirs), name


def test_multimodal_keys_are_those_of_trl():
    source = inspect.getsource(inspect.unwrap(DistillationTrainer._compute_loss))
    block = re.search(r"multimodal_keys = \((.*?)\)", source, re.S).group(1)
    assert tuple(re.findall(r'"(\w+)"', block)) == _trl.MULTIMODAL_KEYS


def test_trls_names_for_the_logit_scale_are_all_known():
    source = inspect.getsource(inspect.unwrap(DistillationTrainer._compute_loss))
    names = set(re.findall(r'getattr\(student_config, "(\w+)"', source))
    assert names == {
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logit_scale": None, "output_multiplier": 3.0}, 3.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale(fields, expected):
    assert logit_scale(SimpleNamespace(**fields)) == expected


# --- precision ----------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_reaches_student_and_head_and_leaves_the_teacher(make, monkeypatch, bf16):
    """The redirected forward passes by accelerate's autocast: without one of its own, float32 weights would train in
    float32, many times slower on a GPU."""
    seen, project = set(), lm_head.project

    def record(tile, hidden, weight, bias, start, end, dtype):
        seen.add(("head", dtype))
        project(tile, hidden, weight, bias, start, end, dtype)

    fixed_rollouts(monkeypatch)
    monkeypatch.setattr(lm_head, "project", record)
    trainer = make(bf16=bf16)
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        layer = model.model.language_model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda m, a, out, name=name: seen.add((name, out.dtype)))
    step(trainer)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {("student", dtype), ("head", dtype), ("teacher", torch.float32)}


def test_fsdps_rounding_passes_by_the_coefficients(make, monkeypatch, tmp_path):
    """FSDP2 with bfloat16 rounds what goes into the forward of the whole model."""
    fixed_rollouts(monkeypatch)
    runs = []
    for rounds in (False, True):
        trainer = make(output_dir=tmp_path / f"{rounds}")
        redirect = trainer._forward_redirection

        def rounded(model, unwrapped, method, *args, redirect=redirect):
            if method.__name__ == "_compute_loss":  # the teacher's forward comes this way, too
                student, batch, *rest = args
                args = (student, {**batch, "coefficients": batch["coefficients"].bfloat16()}, *rest)
            return redirect(model, unwrapped, method, *args)

        if rounds:
            monkeypatch.setattr(trainer, "_forward_redirection", rounded)
        runs.append(step(trainer))
    assert runs[0][0] == runs[1][0]
    assert_same_step(*runs)


# --- the loss against references ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weighting_none_is_standard_opd(make, monkeypatch, family):
    """Sequence mean, then mean over rollouts, of the exact reverse KL on the model's full logits."""
    fixed_rollouts(monkeypatch)
    trainer = make(family=family, weighting="none")
    got = step(trainer)
    (batch,) = got[2]
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size)
    lengths = batch["completion_mask"].sum(1)
    assert lengths.unique().numel() > 1
    expected = ((kl * batch["completion_mask"]).sum(1) / lengths).mean()
    assert_same_step(got, (expected.item(), gradients_of(expected, trainer.model), None), 1e-5, 2e-5)


def test_weighting_none_equals_trls_own_loss_when_all_rollouts_are_equally_long(make, monkeypatch):
    """TRL takes the mean over all tokens of the batch, at its one `temperature`; the same for equal lengths at 1."""
    fixed_rollouts(monkeypatch, length=4)
    trainer = make(weighting="none", temperature=1.0)
    got = step(trainer)
    (batch,) = got[2]
    tokens = batch["completion_mask"].sum()
    trl_loss, _, _ = DistillationTrainer._compute_loss(trainer, trainer.model, batch, tokens)
    assert_same_step(got, (trl_loss.item(), gradients_of(trl_loss, trainer.model), None))


SETTINGS = {"weight_temperature": 0.5, "va_eps": 0.01, "top_fraction": 0.4, "high_weight": 0.7, "kl_temperature": 2.0}


@pytest.mark.parametrize(
    ("family", "weighting", "settings"),
    [
        *itertools.product(["qwen3_vl", "qwen2_5_vl"], ["va", "rollout", "token"], [{}]),
        ("qwen3_vl", "va", SETTINGS),
    ],
)
def test_loss_and_gradient_against_an_independent_computation(make, monkeypatch, family, weighting, settings):
    """The whole method once more in float64, from full logits and images that the test pixelates itself."""
    fixed_rollouts(monkeypatch)
    k = 4
    trainer = make(rows=image_rows(4), family=family, weighting=weighting, num_generations=k, **settings)
    args = trainer.args
    monkeypatch.setattr(siblings, "length_sorted", lambda batch, parts: [batch])
    inputs = next(iter(trainer.get_train_dataloader()))
    got = step(trainer, inputs)
    (batch,) = got[2]
    student, teacher, mask = trainer.model, trainer.teacher_model, batch["completion_mask"].bool()

    degraded = pixelated_pixels(trainer.processing_class, batch, [row["image"] for row in inputs])
    with torch.no_grad():
        true, other = (
            response_logits(teacher, batch, **extra)
            .log_softmax(-1)
            .gather(-1, batch["completion_ids"][..., None])[..., 0]
            for extra in ({}, {"pixel_values": degraded})
        )
    va = ((true - other).clamp(min=0) * mask).numpy()
    np.testing.assert_allclose(trainer.last_rollouts["va"].numpy(), va, atol=2e-5)
    assert va.max() > 0.01

    expected = 0
    kl = reference_kl(student, teacher, batch, trainer.vocab_size, args.kl_temperature)
    for start in range(0, len(mask), k):
        means = np.array([va[r][mask[r]].mean() for r in range(start, start + k)])
        scores = np.exp((means - means.mean()) / (means.std() + args.va_eps) / args.weight_temperature)
        for r, weight in zip(range(start, start + k), scores / scores.sum(), strict=True):
            weight = weight if weighting != "token" else 1 / k
            valid = mask[r].nonzero()[:, 0].tolist()
            ranked = sorted(valid, key=lambda t, r=r: -va[r, t])
            high = ranked[: math.ceil(len(valid) * args.top_fraction - 1e-9)]
            low = [t for t in valid if t not in high]
            if weighting == "rollout" or not low:
                inner = kl[r, valid].mean()
            else:
                inner = args.high_weight * kl[r, high].mean() + (1 - args.high_weight) * kl[r, low].mean()
            expected = expected + weight * inner / (len(mask) // k)
    assert_same_step(got, (expected.item(), gradients_of(expected, student), None), 2e-5, 5e-5)


def test_padded_vocabulary_rows_do_not_change_the_loss(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    plain = step(make())
    student, teacher, processor = models()
    tokens = len(processor.tokenizer)
    for model, size in ((student, tokens + 9), (teacher, tokens + 25)):  # sizes of one family pad differently
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokens:] = 3.0
    trainer = make(parts=(student, teacher, processor))
    assert trainer.teacher_model.config.get_text_config().vocab_size == tokens + 9
    padded = step(trainer)
    name = "model.language_model.embed_tokens.weight"
    assert not padded[1][name][tokens:].any()
    padded[1][name] = padded[1][name][:tokens]
    assert_same_step(padded, plain, 1e-5, 1e-5)


# --- phase 1 ----------------------------------------------------------------


def test_teacher_is_frozen_and_nothing_but_the_student_carries_gradient(make):
    student, teacher, processor = models()
    teacher.train()
    trainer = make(parts=(student, teacher, processor))
    modes = []
    trainer.teacher_model.model.register_forward_hook(lambda m, *_: modes.append(m.training))
    _, gradients, (batch,) = step(trainer)
    assert modes
    assert not any(modes)
    assert not trainer.teacher_model.training
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher_model.parameters())
    assert not any(value.requires_grad for value in batch.values() if isinstance(value, torch.Tensor))
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


def test_siblings_share_a_degraded_image(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer, calls = make(), []
    degrade = degraded.degrade
    monkeypatch.setattr(degraded, "degrade", lambda picture, *a: calls.append(a) or degrade(picture, *a))
    step(trainer)
    assert len(calls) == 2  # 8 rollouts of 2 prompts


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


def zoom(box: str) -> list:
    """Shows a part of the image.

    Args:
        box: which part.
    """


def rollouts_with_tool_images(monkeypatch) -> None:
    """Each rollout: some letters, the result of a tool with an image of its own, some letters."""

    def generate(self, prompts):
        prompt_ids, images, _ = self._tokenize_prompts(prompts)
        tokens, rollouts, masks = self.processing_class.tokenizer.get_vocab(), [], []
        for row in range(len(prompts)):
            letters = np.random.default_rng(row).integers(10, 100, 3 + row % 3).tolist()
            result = [tokens["<|vision_start|>"], *[tokens["<|image_pad|>"]] * 4, tokens["<|vision_end|>"]]
            rollouts.append([*letters, *result, *letters[::-1], self.eos_token_ids[0]])
            masks.append([1] * len(letters) + [0] * len(result) + [1] * (len(letters) + 1))
        shown = [[image(100 + row, (32, 32))] for row in range(len(prompts))]
        merged = [own + new for own, new in zip(images, shown, strict=True)]
        return prompt_ids, rollouts, masks, merged, shown

    monkeypatch.setattr(DistillationTrainer, "_generate", generate)


def test_siblings_with_other_images_from_tools(make, monkeypatch):
    """VA against an independent computation: each rollout has degraded images of its own."""
    rollouts_with_tool_images(monkeypatch)
    monkeypatch.setattr(siblings, "length_sorted", lambda batch, parts: [batch])
    trainer = make()
    trainer.tools = [zoom]
    loss, _, (batch,) = step(trainer)
    assert math.isfinite(loss)
    images = trainer.last_rollouts["images"]
    assert [len(row) for row in images] == [2] * 8
    degraded = pixelated_pixels(trainer.processing_class, batch, list(itertools.chain(*images)))
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    with torch.no_grad():
        true, other = (
            response_logits(trainer.teacher_model, batch, **extra)
            .log_softmax(-1)
            .gather(-1, batch["completion_ids"][..., None])[..., 0]
            for extra in ({}, {"pixel_values": degraded})
        )
    va = (true - other).clamp(min=0) * mask
    torch.testing.assert_close(trainer.last_rollouts["va"].double(), va, atol=2e-5, rtol=0)
    assert va.max() > 0.01


# --- text-only rows ----------------------------------------------------------------


@pytest.mark.parametrize("column", ["none", "null", "empty"])
def test_text_only_data_is_standard_opd(make, monkeypatch, column):
    fixed_rollouts(monkeypatch)
    extra = {"none": {}, "null": {"image": None}, "empty": {"images": []}}[column]
    rows = [{"prompt": prompt(i), **extra} for i in range(4)]
    va, none = (step(make(rows=rows, weighting=weighting)) for weighting in ("va", "none"))
    assert_same_step(va, none)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_text_only_rows_of_a_mixed_batch_have_uniform_weights(make, monkeypatch, family, accumulation):
    """TRL itself cannot (its processor call refuses the missing image); micro-batches may hold no image at all."""
    fixed_rollouts(monkeypatch)
    trainer = make(
        rows=mixed_rows(4),
        family=family,
        shuffle_dataset=False,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    loss, gradients, batches = step(trainer)
    assert math.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    rollouts = trainer.last_rollouts
    assert not rollouts["va"][:4].any()
    assert rollouts["va"][4:].any()
    assert rollouts["weights"][:4].tolist() == [0.25] * 4
    seen = 0
    for batch in batches:
        for row, count in enumerate(batch["num_images"]):
            c, valid = batch["coefficients"][row], batch["completion_mask"][row].bool()
            if not count:
                seen += 1
                torch.testing.assert_close(c[valid], torch.full_like(c[valid], 0.25 / valid.sum().item()))
    assert seen == 4


def test_rounding_between_the_views_gives_a_row_without_an_image_no_va(make, monkeypatch):
    """On a GPU two passes over equal text may differ; softmax over siblings would make weights of any difference."""
    fixed_rollouts(monkeypatch)
    trainer = make(rows=mixed_rows(2), shuffle_dataset=False)
    views = trainer.teacher.views

    def noisy(*arguments):
        kept, logps, degraded = views(*arguments)
        return kept, logps, degraded - 1e-3 * torch.arange(len(degraded)) / len(degraded)

    trainer.teacher.views = noisy
    step(trainer)
    assert not trainer.last_rollouts["va"][:4].any()
    assert trainer.last_rollouts["weights"][:4].tolist() == [0.25] * 4


def test_a_mixed_batch_is_the_mean_of_its_prompts(make, monkeypatch):
    """The loss of an image prompt and a text prompt together = the mean of their losses alone."""
    fixed_rollouts(monkeypatch)
    rows = mixed_rows(2)
    both = step(make(rows=rows, shuffle_dataset=False))
    alone = [step(make(rows=[row], per_device_train_batch_size=4)) for row in rows]
    assert both[0] == pytest.approx(sum(a[0] for a in alone) / 2, abs=1e-6)


# --- sampling ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_and_padded_rows_are_never_sampled(make, family):
    student, teacher, processor = models(family)
    tokens = len(processor.tokenizer)
    for model in (student, teacher):
        model.resize_token_embeddings(tokens + 9, mean_resizing=False)
    trainer = make(parts=(student, teacher, processor), family=family, temperature=1.0, top_p=1.0)
    placeholders = {trainer.model.config.image_token_id}
    placeholders |= {i for i in [getattr(trainer.model.config, "video_token_id", None)] if i is not None}
    banned = placeholders | set(range(tokens, tokens + 9))
    assert banned <= trainer.banned_ids
    assert trainer.banned_ids == set(never_sampled(processor, trainer.model.config))  # nor in evaluation
    assert processor.tokenizer.eos_token_id not in trainer.banned_ids

    boost = torch.zeros(tokens + 9)
    boost[sorted(banned)] = 30.0
    hook = trainer.model.get_output_embeddings().register_forward_hook(lambda m, a, out: out + boost)
    step(trainer)
    hook.remove()
    assert not banned & set(trainer.last_rollouts["completion_ids"][trainer.last_rollouts["mask"].bool()].tolist())


def test_bans_add_to_the_callers_generation_settings(make):
    trainer = make(generation_kwargs={"no_repeat_ngram_size": 3})
    assert trainer.generation_config.no_repeat_ngram_size == 3
    assert set(trainer.generation_config.suppress_tokens) == trainer.banned_ids


def test_the_callers_own_bans_stay(make):
    free = min(set(range(20)) - make().banned_ids)
    trainer = make(generation_kwargs={"suppress_tokens": [free]})
    assert set(trainer.generation_config.suppress_tokens) == trainer.banned_ids | {free}


@pytest.mark.parametrize("use_vllm", [True, False])
def test_the_callers_options_lift_no_ban(use_vllm):
    student, _, processor = models()
    student.config.video_token_id = 30  # which this processor does not name
    kept = {"logit_bias": {30: 5.0, 40: 1.0}, "allowed_token_ids": [30, 40]} if use_vllm else {"suppress_tokens": [50]}
    args = SimpleNamespace(use_vllm=use_vllm, generation_kwargs=copy.deepcopy(kept))
    got, banned = checks.ban_tokens(args, processor, student), checks.banned_ids(processor, student.config)
    assert args.generation_kwargs == kept  # the caller's own
    assert {30, student.config.image_token_id} <= banned
    expected = {"suppress_tokens": sorted({50, *banned})}
    if use_vllm:
        expected = {"logit_bias": {40: 1.0, **dict.fromkeys(banned, -100.0)}, "allowed_token_ids": [40]}
    assert got.generation_kwargs == expected


def test_a_teacher_by_name_with_other_padding_is_one_clear_sentence(make, tmp_path):
    student, teacher, processor = models()
    teacher.resize_token_embeddings(len(processor.tokenizer) + 9, mean_resizing=False)
    teacher.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pads its vocabulary to .* rows.*pass the model") as error:
        make(parts=(student, str(tmp_path), processor))
    assert "\n" not in str(error.value)


def test_the_model_card_cites_the_paper(make, tmp_path):
    trainer = make()
    trainer.create_model_card(model_name="x")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "2605.21924" in card
    assert "va-opd" in card


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (lambda t: [11, t.model.config.image_token_id, 12], "which stand for images or padding"),
        (lambda t: [11, t.model.config.video_token_id], "which stand for images or padding"),
        (lambda t: [], "rollout 3 is empty"),
    ],
)
def test_a_bad_rollout_of_the_engine_is_one_clear_sentence(make, monkeypatch, rollout, message):
    trainer = make()

    def generate(self, prompt_ids, *args, **kwargs):
        return [[11, 12] if row != 3 else rollout(trainer) for row in range(len(prompt_ids))]

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", generate)
    with pytest.raises(ValueError, match=message) as error:
        step(trainer)
    assert "rollout 3" in str(error.value)
    assert "\n" not in str(error.value)


# --- bad input ----------------------------------------------------------------


def other_tokenizer():
    tokenizer = copy.deepcopy(models()[2].tokenizer)
    tokenizer.add_tokens(["another"])
    return tokenizer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 3}, "8 rollouts do not divide into groups of num_generations=3"),
        ({"num_generations": 1}, "num_generations=1 leaves rollout weights without siblings"),
        ({"num_generations": 1, "weighting": "rollout"}, "num_generations=1 leaves rollout weights without siblings"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"num_generations": 1.5}, "num_generations must be at least 1, and whole, got 1.5"),
        ({"max_completion_length": 1.5}, "max_completion_length must be at least 1, and whole"),
        ({"adam_beta2": 2}, "adam_beta2 must be in [0, 1), got 2"),
        ({"num_train_epochs": math.nan}, "num_train_epochs must be above 0 and finite, got nan"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0 and finite"),
        ({"weighting": "vaopd"}, "weighting must be one of va, rollout, token, none, got 'vaopd'"),
        ({"pixelate_at": "before"}, "pixelate_at must be one of model, raw"),
        ({"degradation_ratio": 0.0}, "degradation_ratio must be in"),
        ({"top_fraction": 0.0}, "top_fraction must be in"),
        ({"high_weight": 1.5}, "high_weight must be in"),
        ({"weight_temperature": 0.0}, "weight_temperature must be above 0"),
        ({"kl_temperature": 0.0}, "kl_temperature must be above 0"),
        ({"va_eps": 0.0}, "va_eps must be above 0"),
        ({"beta": 0.5}, "beta must be 1.0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_p": 2.0}, "top_p must be in (0, 1]"),
        ({"max_prompt_length": None}, "max_prompt_length must be at least 1, and whole, got None"),
        ({"max_completion_length": None}, "max_completion_length must be at least 1, and whole, got None"),
        ({"doctor_steps": -1}, "doctor_steps must be at least 0"),
        ({"va_floor": math.nan}, "va_floor must be finite, or none"),
        ({"per_device_train_batch_size": 32}, "train_dataset has 4 prompts, fewer than the 8"),
    ],
)
def test_bad_settings_are_one_clear_sentence(make, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**overrides)
    assert "\n" not in str(error.value)


def test_one_rollout_a_prompt_is_fine_without_rollout_weights(make):
    for weighting in ("token", "none"):
        loss, _, _ = step(make(rows=image_rows(8), num_generations=1, weighting=weighting))
        assert math.isfinite(loss)


def test_what_no_trainer_can_be_built_of_is_one_clear_sentence(make):
    student, teacher, processor = models()
    rows = Dataset.from_list(image_rows(2))
    good = {"train_dataset": rows, "processing_class": processor}

    def refused(message: str, teacher=teacher, **changes):
        with pytest.raises(ValueError, match=message):
            VAOPDTrainer(student, teacher, make().args, **{**good, **changes})

    endless = IterableDataset.from_generator(lambda: iter(image_rows(2)))
    refused("needs a map-style Dataset", train_dataset=endless)
    splits = DatasetDict(train=rows, test=rows)
    refused("train_dataset holds the splits train, test: pass one of them", train_dataset=splits)
    refused("pass the student's processor, loaded by AutoProcessor", processing_class="org/model")
    refused("student and teacher are one object", teacher=student)
    trainer = VAOPDTrainer(student, teacher, make().args, **{**good, "train_dataset": None})
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer.train()


def test_another_configuration_is_one_clear_sentence(tmp_path):
    student, teacher, processor = models()
    plain = DistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args must be a VAOPDConfig, got DistillationConfig"):
        VAOPDTrainer(student, teacher, plain, Dataset.from_list(image_rows(4)), processing_class=processor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_student_in_half_precision_is_warned_of(make, caplog, monkeypatch, dtype):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    student, teacher, processor = models()
    begin(make(parts=(student.to(dtype), teacher, processor)))
    warned = [record for record in caplog.records if "in half precision" in record.getMessage()]
    assert len(warned) == (dtype == torch.bfloat16)


def begin(trainer) -> None:
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_adapters_that_are_made_float32_after_the_constructor_are_not_warned_of(make, caplog, monkeypatch):
    """As `va_opd.train` does with those on quantized weights, which TRL rounds."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make(peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.model.base_model.model.is_quantized = True  # stands for 4 bits
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.bfloat16()
    for _ in range(2):
        begin(trainer)
        (warning,) = [record.getMessage() for record in caplog.records if "in half" in record.getMessage()]
        assert "p.data = p.data.float()" in warning
        for p in trainer.model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data


def test_the_seconds_of_generation_are_those_of_all_turns(make, monkeypatch):
    """With tools TRL generates once a turn, and averages what is logged."""
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda self, *arguments: [[11]])
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0, 30.0, 38.0])
    monkeypatch.setattr("va_opd.trainer.time.perf_counter", lambda: next(clock))
    trainer = make()
    trainer.model.train()
    for turns in (3, 1):  # generation batches
        trainer._is_first_turn = True
        for _ in range(turns):
            trainer._generate_single_turn([[11]], None, {})
    assert trainer._metrics["train"]["time/generation"] == [1.0 + 2.0 + 4.0, 8.0]


def test_the_results_of_tools_are_no_part_of_the_prompts_limit(make, monkeypatch):
    """TRL's loop of tool calls generates again with the whole conversation as prompt."""
    fixed_rollouts(monkeypatch)
    trainer = make(max_prompt_length=60)
    trainer._is_first_turn = True
    trainer._generate_single_turn([[11] * 60] * 8, None, {})
    trainer._generate_single_turn([[11] * 70] * 8, None, {})
    with pytest.raises(ValueError, match="above max_prompt_length=5"):
        step(make(max_prompt_length=5))


def test_a_missing_processor_is_one_clear_sentence(make):
    student, teacher, _ = models()
    with pytest.raises(ValueError, match="processing_class is required"):
        VAOPDTrainer(student, teacher, make().args, Dataset.from_list(image_rows(4)))


def test_a_tokenizer_for_rows_with_images_is_one_clear_sentence(make):
    student, teacher, processor = models()
    parts = student, teacher, processor.tokenizer
    with pytest.raises(ValueError, match=r"rows have images, but processing_class is a tokenizer: .*AutoProcessor"):
        make(parts=parts)
    for extra in ({}, {"image": None}, {"images": []}):
        make(rows=[{"prompt": prompt(i), **extra} for i in range(4)], parts=parts)


@pytest.mark.parametrize(("sharding", "stops_evaluation"), [("zero2", False), ("zero3", True), ("fsdp", True)])
def test_mixed_rows_stop_evaluation_only_where_weights_are_sharded(make, monkeypatch, sharding, stops_evaluation):
    trainer = make()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer, "_gather", lambda tensor: tensor)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", sharding != "fsdp")
    monkeypatch.setattr(trainer, "is_fsdp_enabled", sharding == "fsdp")
    monkeypatch.setattr(va_opd_trainer, "is_deepspeed_zero3_enabled", lambda: sharding == "zero3")
    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", lambda *_: pytest.fail("generates"))
    stopped = ValueError, "1 of the 2 rollouts of a step have images"
    for training, stops in ((True, True), (False, stops_evaluation)):
        trainer.model.train(training)
        error, message = stopped if stops else (pytest.fail.Exception, "generates")
        with pytest.raises(error, match=message):
            trainer._generate_and_score_completions(mixed_rows(2))


def test_a_prompt_over_the_limit_is_one_clear_sentence(make):
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, above max_prompt_length=12"):
        step(make(max_prompt_length=12))


def test_another_tokenizer_is_one_clear_sentence(tmp_path, make):
    student, teacher, processor = models()
    check_same_tokens(processor.tokenizer, copy.deepcopy(processor.tokenizer))
    with pytest.raises(ValueError, match=r"different vocabularies .*'another'") as error:
        check_same_tokens(processor.tokenizer, other_tokenizer())
    assert "\n" not in str(error.value)
    teacher.save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="different vocabularies"):
        make(parts=(student, str(tmp_path / "teacher"), processor))


def test_a_teacher_that_lacks_tokens_is_one_clear_sentence(make):
    student, teacher, processor = models()
    teacher.resize_token_embeddings(len(processor.tokenizer) - 2)
    with pytest.raises(ValueError, match="must be of one tokenizer family"):
        make(parts=(student, teacher, processor))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3"])
def test_a_processor_that_pads_on_the_right_trains_the_same(tmp_path, monkeypatch, family):
    """TRL pads prompts on the left, and takes from the processor's padding which of their tokens are an image's."""
    fixed_rollouts(monkeypatch)
    runs = {}
    for side in ("left", "right"):
        parts = models(family)
        parts[2].tokenizer.padding_side = side
        rows = [{**row, "prompt": prompt(0 if i else 8)} for i, row in enumerate(image_rows(2))]
        rows[1]["prompt"][0]["content"] += "?" * 9
        loss, gradients, (batch,) = step(build(tmp_path / side, rows, parts=parts))
        runs[side] = loss, gradients
        assert batch["prompt_mask"].sum(1).unique().numel() == 2  # prompts of two lengths
        for name in {"mm_token_type_ids", "token_type_ids"} & batch.keys():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            assert torch.equal(batch[name] == 1, ids == parts[0].config.image_token_id)
    assert runs["left"][0] == runs["right"][0]
    assert_same_step(runs["left"], runs["right"])


def test_a_teacher_without_eyes_is_one_clear_sentence(make):
    student, _, processor = models()
    teacher = Qwen3ForCausalLM(Qwen3Config(**_text_config(student.config.get_text_config().vocab_size, 32, 1)))
    with pytest.raises(ValueError, match="the student reads images, the teacher does not: .* vision-language teacher"):
        make(parts=(student, teacher, processor))


def test_a_teacher_with_nan_is_one_clear_sentence(make):
    student, teacher, processor = models()
    with torch.no_grad():
        teacher.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(ValueError, match="teacher log-probability of rollout 0, token 0 is not finite"):
        step(make(parts=(student, teacher, processor)))


def test_fingerprints_are_of_the_order_of_tokens_and_not_of_the_padding():
    def fingerprint(ids, width):
        pad = width - len(ids)
        batch = {"prompt_ids": [[99] * pad + ids], "prompt_mask": [[0] * pad + [1] * len(ids)]}
        return sibling_fingerprints({k: torch.tensor(v) for k, v in batch.items()}, False)

    assert torch.equal(fingerprint([1, 2, 3], 3), fingerprint([1, 2, 3], 5))  # as on two ranks
    assert not torch.equal(fingerprint([1, 2, 3], 3), fingerprint([2, 1, 3], 3))


def test_the_models_size_is_width_and_height():
    pixels = {"pixel_values": torch.zeros(2, 3, 10, 20)}
    assert degraded.model_size(SimpleNamespace(), pixels, None, 2) == (20, 10)
    assert degraded.model_size(SimpleNamespace(patch_size=7), pixels, [1, 2, 3], 2) == (21, 14)
    assert degraded.model_size(SimpleNamespace(), pixels, None, 1) is None  # tiles


def test_siblings_that_were_reordered_are_noticed(make):
    trainer = make()
    inputs = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(RuntimeError, match="have different prompts or images"):
        step(trainer, inputs[::2] + inputs[1::2])
    same_question = [{**row, "prompt": prompt(0)} for row in inputs]  # only the images tell the prompts apart
    step(trainer, same_question)
    trainer._step = 0
    with pytest.raises(RuntimeError, match="have different prompts or images"):
        step(trainer, same_question[::2] + same_question[1::2])


# --- invariances ----------------------------------------------------------------


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
@pytest.mark.parametrize("batch", [2, 1])
def test_accumulation_does_not_change_the_step(make, monkeypatch, weighting, batch):
    """8 x 1 = 4 x 2 = 1 x 8: siblings in other micro-batches, padding as wide as the generation batch."""
    fixed_rollouts(monkeypatch)
    whole = step(make(weighting=weighting))
    split = step(make(weighting=weighting, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch))
    assert_same_step(split, whole)


def test_order_of_the_prompts_does_not_change_the_step(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(per_device_train_batch_size=16, rows=image_rows(4), shuffle_dataset=False)
    inputs = next(iter(trainer.get_train_dataloader()))
    first = step(trainer, inputs)
    trainer._step = 0
    groups = [inputs[i : i + 4] for i in range(0, 16, 4)]
    assert_same_step(step(trainer, functools.reduce(operator.iadd, (groups[i] for i in (2, 0, 3, 1)), [])), first)


@pytest.mark.parametrize("multiple", [16, 64])
def test_padding_does_not_change_the_step(make, monkeypatch, multiple):
    fixed_rollouts(monkeypatch)
    assert_same_step(step(make(pad_to_multiple_of=multiple)), step(make()))


@pytest.mark.parametrize("drawn", [False, True])
def test_a_tokenizer_that_pads_with_its_end_of_sequence_gives_the_same_step(make, monkeypatch, drawn):
    """Only masks, never ids, tell padding from the end of a rollout."""
    if not drawn:
        fixed_rollouts(monkeypatch)
    steps = []
    for same in (False, True):
        student, teacher, processor = models()
        boost = torch.zeros(student.get_output_embeddings().weight.size(0))
        boost[processor.tokenizer.eos_token_id] = 3.0  # drawn rollouts end early; the loss does not call the head
        student.get_output_embeddings().register_forward_hook(lambda m, a, out, boost=boost: out + boost)
        if same:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        trainer = make(parts=(student, teacher, processor))
        assert (processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id) is same
        steps.append(step(trainer))
    masks = [micro[0]["completion_mask"] for *_, micro in steps]
    assert torch.equal(*masks) and len(set(masks[0].sum(1).tolist())) > 1
    assert_same_step(*steps)


def test_coefficients_follow_their_rows_through_sorting(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    _, _, batches = step(trainer)
    by_rollout = {}
    for batch in batches:
        for ids, mask, c in zip(batch["completion_ids"], batch["completion_mask"], batch["coefficients"], strict=True):
            by_rollout[tuple(ids[mask.bool()].tolist())] = c.sum().item()
    rollouts, order = trainer.last_rollouts, []
    for ids, mask, w in zip(rollouts["completion_ids"], rollouts["mask"], rollouts["weights"], strict=True):
        assert by_rollout[tuple(ids[mask.bool()].tolist())] == pytest.approx(w.item(), abs=1e-6)
        order.append(w.item())
    assert sum(order[:4]) == pytest.approx(1)
    assert sum(order[4:]) == pytest.approx(1)
    assert len(set(order)) > 4


def test_random_ties_are_reproducible_and_drawn_anew_in_each_step_and_run(make, monkeypatch):
    fixed_rollouts(monkeypatch, length=19)
    monkeypatch.setattr(objective, "visual_advantage", lambda logps, other, mask: torch.zeros_like(logps))
    runs = [(False, 42, 0), (True, 42, 0), (True, 42, 0), (True, 42, 1), (True, 7, 0)]
    drawn = []
    for random_ties, seed, at in runs:
        trainer = make(shuffle_dataset=False, random_ties=random_ties, seed=seed)
        trainer.state.global_step = at
        drawn.append(step(trainer)[2][0]["high_tokens"].flatten().tolist())
    assert [drawn.index(tokens) for tokens in drawn] == [0, 1, 1, 3, 4]


@pytest.mark.parametrize("random_ties", [False, True])
def test_logged_groups_are_those_of_the_loss(make, monkeypatch, random_ties):
    """`kl/high` must be the KL of the tokens that the loss weighs as high, also when ties are drawn."""
    fixed_rollouts(monkeypatch, length=19)
    trainer = make(random_ties=random_ties, rows=[{**row, "image": image(0)} for row in image_rows(4)])
    monkeypatch.setattr(objective, "visual_advantage", lambda logps, other, mask: torch.zeros_like(logps))
    (batch,) = step(trainer)[2]
    for c, high, mask in zip(batch["coefficients"], batch["high_tokens"], batch["completion_mask"], strict=True):
        valid = mask.bool()
        assert c[valid & high].min() > c[valid & ~high].max()


def test_rollouts_under_the_floor_have_uniform_tokens(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(va_floor=1e9)
    (batch,) = step(trainer)[2]
    for c, mask in zip(batch["coefficients"], batch["completion_mask"], strict=True):
        assert c[mask.bool()].unique().numel() == 1
    logged = trainer._metrics["train"]
    assert not {"va/zero_in_high", "kl/high", "kl/low"} & logged.keys()  # there are no groups
    assert logged["va/mean"][0] > 0  # of which the floor takes nothing away


def test_the_floor_is_one_of_the_mean(make, monkeypatch):
    fixed_rollouts(monkeypatch, length=9)
    monkeypatch.setattr(siblings, "length_sorted", lambda batch, parts: [batch])
    trainer = make()
    step(trainer)
    means = objective.mean_over_tokens(trainer.last_rollouts["va"], trainer.last_rollouts["mask"])
    floor = means.sort().values[3:5].mean().item()
    (batch,) = step(make(va_floor=floor))[2]
    alike = [
        c[m.bool()].unique().numel() == 1 for c, m in zip(batch["coefficients"], batch["completion_mask"], strict=True)
    ]
    assert alike == (means < floor).tolist() and sum(alike) == 4


def test_rows_without_an_image_are_in_no_figure_of_va(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    rows = mixed_rows(2)
    trainer = make(rows=rows, shuffle_dataset=False)
    _, _, (batch,) = step(trainer)
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size).detach()
    alone = make(rows=rows[1:], per_device_train_batch_size=4)
    step(alone)
    logged, expected = ({k: v[-1] for k, v in t._metrics["train"].items()} for t in (trainer, alone))
    names = [name for name in expected if name.startswith("va/")] + ["kl/high", "kl/low"]
    assert {"va/mean", "va/positive_share", "va/top10_mass", "va/group_sigma", "va/zero_in_high"} <= set(names)
    for name in names:
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    images = torch.tensor(batch["num_images"]).bool()[:, None] & batch["completion_mask"].bool()
    assert torch.equal(batch["high_tokens"] | batch["low_tokens"], images)
    assert logged["kl/high"] == pytest.approx(kl[batch["high_tokens"]].mean().item(), rel=1e-4)


def test_nothing_is_said_of_va_where_no_row_has_an_image(make, capsys):
    trainer = make(rows=[{"prompt": prompt(i)} for i in range(4)], doctor_steps=1, max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    figures = {name for name in line if name.startswith(("va/", "kl/"))}
    assert "loss" in line and figures <= {"va/null"}
    out = capsys.readouterr().out
    assert "[doctor] step 1: entropy" in out and "VA is 0" not in out


def test_logged_kl_does_not_depend_on_micro_batches(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    logged = []
    for size in (8, 2, 1):
        trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        trainer.train()
        logged.append([(line["kl/high"], line["kl/low"]) for line in trainer.state.log_history if "kl/high" in line])
    assert len(logged[0]) == 2
    for other in logged[1:]:
        np.testing.assert_allclose(other, logged[0], rtol=1e-3)


def test_the_logged_kl_of_a_step_is_of_its_own_tokens(make, monkeypatch):
    """Also with steps before it: nothing of theirs is in a later mean."""
    fixed_rollouts(monkeypatch)

    def logged(rows: list[dict[str, Any]], steps: int) -> list[list[float]]:
        trainer = make(rows, max_steps=steps, learning_rate=0.0, shuffle_dataset=False)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "kl/high" in line]
        return [[line["kl/high"], line["kl/low"]] for line in lines]

    rows = image_rows(4)
    both, (first,), (second,) = logged(rows, 2), logged(rows[:2], 1), logged(rows[2:], 1)
    assert both == [pytest.approx(first, rel=1e-3), pytest.approx(second, rel=1e-3)]
    assert second != pytest.approx(first, rel=0.01)


def test_logged_kl_and_va_against_their_definitions(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make()
    _, _, (batch,) = step(trainer)
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size).detach()
    mask, high = batch["completion_mask"].bool(), batch["high_tokens"]
    metrics, rollouts = trainer._metrics["train"], trainer.last_rollouts
    assert metrics["kl/high"][-1] == pytest.approx(kl[mask & high].mean().item(), rel=1e-4)
    assert metrics["kl/low"][-1] == pytest.approx(kl[mask & ~high].mean().item(), rel=1e-4)
    va = rollouts["va"][rollouts["mask"].bool()]
    assert metrics["va/mean"][-1] == pytest.approx(va.mean().item())
    assert metrics["va/positive_share"][-1] == pytest.approx((va > 0).double().mean().item())
    top = va.sort(descending=True).values[: round(0.1 * len(va))].sum() / va.sum()
    assert metrics["va/top10_mass"][-1] == pytest.approx(top.item(), rel=1e-5)
    assert metrics["va/weight_max"][-1] == pytest.approx(rollouts["weights"].max().item())


def test_figures_of_va_by_hand():
    va, mask = torch.tensor([[4.0, 0.0, 9.0], [0.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    high, weights = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(), torch.tensor([0.9, 0.1])
    expected = {"va/mean": 0.8, "va/positive_share": 0.2, "va/top10_mass": 1.0, "va/group_sigma": 1.0}
    expected |= {"va/weight_min": 0.1, "va/weight_max": 0.9, "va/zero_in_high": 2 / 3}
    assert doctor.va_figures(va, mask, weights, high, 2) == pytest.approx(expected)


def test_the_logged_entropy_is_the_students(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(max_steps=1, learning_rate=0.0)
    trainer.train()
    (batch,) = trainer._buffered_inputs
    with torch.no_grad():
        probabilities = response_logits(trainer.model, batch)[..., : trainer.vocab_size].softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)[batch["completion_mask"].bool()].mean().item()
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(entropy, rel=1e-4)


# --- precision, evaluation, one line of health ----------------------------------------------------------------


def test_bfloat16_step(make):
    trainer = make(bf16=True)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:2])
    va = trainer.last_rollouts["va"]
    assert va.dtype == torch.float32
    positive = va[va > 0]
    # bfloat16 log-probabilities near 4.6 are multiples of 2^-6 (their difference too): float32 ones are not
    assert (positive * 64 % 1 != 0).float().mean() > 0.9
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_bfloat16_teacher_of_a_float32_student(make):
    student, teacher, processor = models()
    trainer = make(parts=(student, teacher.to(torch.bfloat16), processor))
    loss, _, _ = step(trainer)
    assert math.isfinite(loss)
    assert trainer.last_rollouts["va"].dtype == torch.float32


def test_a_teacher_whose_eval_returns_nothing(make, monkeypatch):
    """As a DeepSpeed engine's does."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    teacher.eval = lambda: type(teacher).train(teacher, False) and None
    assert_same_step(step(make(parts=(student, teacher, processor))), step(make()))


def test_lora_student(make, monkeypatch):
    """Adapters only get a gradient; at the start they change nothing, so that the loss is the full model's."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make(parts=(peft.get_peft_model(student, lora), teacher, processor))
    loss, gradients, _ = step(trainer)
    assert loss == pytest.approx(step(make())[0], abs=1e-6)
    assert gradients
    assert all("lora_" in name for name in gradients)


def test_gradient_checkpointing(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    assert_same_step(step(make(gradient_checkpointing=True)), step(make()))


def test_evaluation(make, monkeypatch):
    """K = 1, uniform weights, no update; an eval set that does not divide by its batch size."""
    fixed_rollouts(monkeypatch)
    trainer = make(eval_rows=image_rows(5), per_device_eval_batch_size=3)
    before = copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["eval_loss"] > 0
    assert {"eval_va/mean", "eval_kl/high", "eval_time/teacher"} <= trainer.state.log_history[-1].keys()
    assert not any(trainer._metrics["train"].values()) and trainer._kl_sums is None  # nothing is left to a step
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != metrics["eval_loss"]


def test_evaluation_loss_against_the_reference(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(eval_rows=image_rows(3), per_device_eval_batch_size=3)
    seen = []
    score = trainer._generate_and_score_completions
    monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda rows: seen.append(score(rows)) or seen[-1])
    loss = trainer.evaluate()["eval_loss"]
    (batch,) = seen
    kl, mask = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size), batch["completion_mask"]
    assert loss == pytest.approx(((kl * mask).sum(1) / mask.sum(1)).mean().item(), rel=1e-4)


def test_an_evaluation_before_training_does_not_hide_the_null_check(make, capsys, monkeypatch):
    trainer = make(doctor_steps=1, max_steps=2, eval_on_start=True, eval_strategy="steps", eval_rows=image_rows(4))
    score, noise = trainer.teacher.score, torch.Generator().manual_seed(0)

    def noisy(*arguments):
        hidden, logps = score(*arguments)
        return hidden, [x + 0.1 * torch.rand(x.shape, generator=noise) for x in logps]

    monkeypatch.setattr(trainer.teacher, "score", noisy)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "va/null" in line or "eval_va/null" in line]
    assert [line["step"] for line in lines] == [1] and lines[0]["va/null"] > 1e-3
    assert "WARNING: the teacher's log-probabilities differ between two passes" in capsys.readouterr().out


def test_doctor_line_and_warnings(make, capsys):
    make(doctor_steps=1, degradation_ratio=1.0, max_steps=1).train()
    out = capsys.readouterr().out
    assert "[doctor] step 1: VA mean 0.0000" in out
    assert "WARNING: VA is 0 on every token" in out


@pytest.mark.parametrize(
    ("name", "bad", "good", "message"),
    [
        ("va/positive_share", 0.0, 0.01, "VA is 0 on every token"),
        ("va/zero_in_high", 0.51, 0.5, "high-VA group have VA 0"),
        ("completions/clipped_ratio", 0.51, 0.5, "truncated"),
        ("entropy", 0.009, 0.01, "entropy has collapsed"),
        ("va/null", 0.0011, 0.001, "two passes over equal images"),
        ("va/cells", 3.9, 4.0, "fewer than 4 cells"),
        ("sampling/logps_gap", 0.11, 0.1, "weight sync"),
    ],
)
def test_the_doctor_warns_in_words(name, bad, good, message):
    (warning,) = doctor.diagnose({name: bad})
    assert message in warning
    assert doctor.diagnose({name: good}) == doctor.diagnose({name: None}) == []


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_gap_to_the_engine_divides_soft_capped_logits_by_the_temperature(make, monkeypatch, softcap):
    """The engine has sampled by these very probabilities: the gap is 0."""
    fixed_rollouts(monkeypatch)
    trainer = make(temperature=0.7)
    trainer.model.config.get_text_config().final_logit_softcapping = softcap
    _, _, (batch,) = step(trainer)
    with torch.no_grad():
        logits = response_logits(trainer.model, batch)[..., : trainer.vocab_size]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logps = (logits / 0.7).log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    generation = SimpleNamespace(mode="server", generate=None)
    trainer.engine, trainer.top_p = VLLMRollouts(generation), 1.0
    trainer.engine.logps = [row[m.bool()].tolist() for row, m in zip(logps, batch["completion_mask"], strict=True)]
    assert trainer._engine_gap(batch) < 1e-5


# --- order of the prompts and resuming ----------------------------------------------------------------


def sampler(n: int, k: int = 3, prompts: int = 2, seed: int = 5, epoch: int = 0) -> _trl.EpochSampler:
    options = {"batch_size": prompts, "repeat_count": 2, "seed": seed}
    return _trl.EpochSampler(range(n), mini_repeat_count=k, epoch=lambda: epoch, **options)


def test_sampler_keeps_siblings_together_and_covers_each_epoch():
    order = list(sampler(8))
    assert len(order) == len(sampler(8)) == 8 * 3 * 2
    for start in range(0, len(order), 3):
        assert len(set(order[start : start + 3])) == 1
    for start in range(0, len(order), 12):  # each generation batch twice, for two accumulation steps
        assert order[start : start + 6] == order[start + 6 : start + 12]
    assert sorted(order) == sorted(list(range(8)) * 6)


def test_sampler_order_depends_on_seed_and_epoch_only():
    straight, epoch = sampler(8), iter(range(3))
    straight.epoch = lambda: next(epoch)
    epochs = [list(straight) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(sampler(8, epoch=2)) == epochs[2]
    assert list(sampler(8, seed=6, epoch=2)) != epochs[2]


def weights_of(trainer: VAOPDTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def history_of(trainer: VAOPDTrainer) -> list[tuple]:
    """What must be the same in a resumed run: all but times, and the null check, which is made once a process."""
    skipped = ("time", "step_time", "train_", "va/null")
    return [
        {k: v for k, v in log.items() if not k.startswith(skipped)}
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize("resume_at", [2, 4])
def test_a_resumed_run_equals_the_straight_run(make, tmp_path, resume_at):
    """Six steps of sampled rollouts, three steps an epoch: resumed inside the first and inside the second epoch."""
    settings = {
        "rows": image_rows(6),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "straight"),
    }
    straight = make(**settings)
    straight.train()
    torch.manual_seed(123)  # a new process starts elsewhere
    resumed = make(**{**settings, "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{resume_at}"))
    assert history_of(resumed) == history_of(straight)
    for name, weight in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {here!r})
from transformers import TrainerCallback
import test_trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

test_trainer.ten_steps({output!r}, Kill()).train()
"""


def ten_steps(output_dir: str, *callbacks) -> VAOPDTrainer:
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    return build(output_dir, image_rows(6), callbacks=list(callbacks), **settings, **saving)


def test_kill_9_and_resume_gives_the_straight_runs_metrics(tmp_path):
    script = KILLED_RUN.format(root=str(ROOT), here=str(Path(__file__).parent), output=str(tmp_path / "killed"))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == -9, process.stderr[-2000:]
    resumed = ten_steps(str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    straight = ten_steps(str(tmp_path / "straight"))
    straight.train()
    assert history_of(resumed) == history_of(straight)
    assert len(history_of(straight)) == 10
    for name, weight in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


# --- learning ----------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["va", "none"])
def test_the_student_learns_the_teacher(make, weighting):
    trainer = make(
        rows=image_rows(8),
        weighting=weighting,
        max_steps=30,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        per_device_train_batch_size=16,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


# (loss, grad_norm) with torch 2.13.0 on one CPU thread, transformers 5.17.0, trl 1.16.0, Python 3.11, x86-64 AVX-512
GOLDEN = [
    (0.8124734, 0.7006765),
    (0.7729051, 0.5705851),
    (0.8069836, 0.4388132),
    (0.6070980, 0.4145712),
    (0.5750840, 0.3290441),
]


def set_weights(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Fixed weights of every matrix, whatever the library's initialization draws."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.ndim > 1:
                values = np.random.default_rng([seed, i]).standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(scale * values))


def test_golden_trajectory(make, monkeypatch):
    """Five steps on fixed rollouts. A change here is a change of the method, of TRL or of the tiny model."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    set_weights(student, 1, 0.05)
    set_weights(teacher, 2, 0.15)
    trainer = make(
        rows=image_rows(8),
        parts=(student, teacher, processor),
        max_steps=5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    got = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    assert np.array(got) == pytest.approx(np.array(GOLDEN), rel=1e-3), got
