"""For the tests of `VAOPDTrainer`: tiny random models of several families, data, trainers, references in float64.

CPU, no network. Most tests replace generation by fixed rollouts, so that numbers can be compared.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
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
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from trl import DistillationTrainer

from common.tiny import tiny_qwen2_5_vl, tiny_qwen3_vl
from va_opd import VAOPDConfig, VAOPDTrainer


def text_config(vocab: int, hidden: int, layers: int) -> dict[str, Any]:
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
        text_config=Qwen3Config(**text_config(len(tokenizer), hidden, layers)),
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
        text_config=text_config(len(tokenizer), hidden, layers),
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
        text_config={"model_type": "qwen2", **text_config(len(tokenizer), hidden, layers)},
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
        text_config={"model_type": "llama", **text_config(len(tokenizer), hidden, layers)},
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


def write_first_token(processor) -> None:
    """Lets template and tokenizer both begin with `bos_token`, as those of Gemma 3 do."""
    tokenizer = processor.tokenizer
    tokenizer.bos_token = bos = "<|video_pad|>"
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


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
