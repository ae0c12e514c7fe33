"""Tiny models with their tokenizer or processor, built from a config in code: no download, no torchvision.

For demos and tests. The tokenizer has one token for each printable ASCII character; the weights are random and depend
on `seed` only.
"""

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from .models import ImageOnlyQwen2_5_VLProcessor, ImageOnlyQwen3VLProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string %}{{- m['content'] }}"
    "{%- else %}{%- for c in m['content'] %}"
    "{%- if c['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif c['type'] == 'text' %}{{- c['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """103 tokens: Qwen's special ones, newline and the printable ASCII characters; ChatML template."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_qwen3(hidden: int = 64, seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A text model: two blocks of width `hidden` (a multiple of 32)."""
    tokenizer = char_tokenizer()
    config = Qwen3Config(**_text_config(tokenizer, hidden), tie_word_embeddings=True)
    return _build(Qwen3ForCausalLM, config, tokenizer, seed), tokenizer


def tiny_qwen3_vl(
    hidden: int = 64, patch: int = 8, seed: int = 0, max_pixels: int = 64 * 64
) -> tuple[Qwen3VLForConditionalGeneration, ImageOnlyQwen3VLProcessor]:
    """A Qwen3-VL: one visual token for (2 * patch)^2 pixels, images of 32 * 32 to `max_pixels` pixels."""
    tokenizer = char_tokenizer()
    processor = ImageOnlyQwen3VLProcessor(
        _image_processor(patch, max_pixels), tokenizer, chat_template=tokenizer.chat_template
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**_text_config(tokenizer, hidden), "rope_parameters": rope},
        vision_config={
            **_vision_config(hidden, patch),
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **_placeholders(processor),
        tie_word_embeddings=True,
    )
    return _build(Qwen3VLForConditionalGeneration, config, tokenizer, seed), processor


def tiny_qwen2_5_vl(
    hidden: int = 64, patch: int = 8, seed: int = 0, max_pixels: int = 64 * 64
) -> tuple[Qwen2_5_VLForConditionalGeneration, ImageOnlyQwen2_5_VLProcessor]:
    """The same as a Qwen2.5-VL, whose vision tower has windowed attention."""
    tokenizer = char_tokenizer()
    processor = ImageOnlyQwen2_5_VLProcessor(
        _image_processor(patch, max_pixels), tokenizer, chat_template=tokenizer.chat_template
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**_text_config(tokenizer, hidden), "rope_parameters": rope}
    del text["head_dim"]  # this family derives it
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**_vision_config(hidden, patch), "window_size": 4 * patch, "fullatt_block_indexes": [1]},
        **_placeholders(processor),
        tie_word_embeddings=True,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed), processor


def answer_loss(model, tokenizer, rows: Sequence[tuple[list[dict[str, str]], str]]) -> torch.Tensor:
    """Mean cross-entropy of the answers in (prompt, answer) rows and of their ends of turn, for teaching a model."""
    logits, labels = _answer_logits(model, tokenizer, rows)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def answer_probabilities(model, tokenizer, rows: Sequence[tuple[list[dict[str, str]], str]]) -> torch.Tensor:
    """Probability (B,) of each answer with its end of turn: the share of samples at temperature 1 that would be it."""
    logits, labels = _answer_logits(model, tokenizer, rows)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return torch.exp(-losses.sum(1))  # 0 where nothing is asked


def _answer_logits(model, tokenizer, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, V) logits, and the tokens (B, T) that they are of, -100 before an answer."""
    prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p, _ in rows]
    answers = [answer + tokenizer.eos_token for _, answer in rows]
    batch = tokenizer([p + a for p, a in zip(prompts, answers, strict=True)], return_tensors="pt", padding=True)
    lengths = torch.tensor([len(tokenizer(a)["input_ids"]) for a in answers])
    width = batch["input_ids"].size(1)
    labels = batch["input_ids"].masked_fill(torch.arange(width) < width - lengths[:, None], -100)  # padding is left
    keep = int(lengths.max()) + 1
    logits = model(**batch, logits_to_keep=keep).logits[:, :-1]
    return logits, labels[:, 1 - keep :]


def _build(model_class, config, tokenizer: PreTrainedTokenizerFast, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _text_config(tokenizer: PreTrainedTokenizerFast, hidden: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _vision_config(hidden: int, patch: int) -> dict:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden,
    }


def _image_processor(patch: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": 32 * 32, "longest_edge": max_pixels}
    return Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)


def _placeholders(processor) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(processor, name) for name in names}
