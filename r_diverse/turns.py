"""Where a rollout ends: at the ends that model and tokenizer declare, and at that of a turn in the chat template."""

from collections.abc import Collection
from itertools import dropwhile, takewhile
from typing import Any

from jinja2 import TemplateError


def stop_at_the_end_of_a_turn(trainer: Any) -> None:
    """TRL knows the ends that the model and its tokenizer declare; base models leave out that of a turn."""
    end = turn_end_id(trainer.processing_class, trainer.eos_token_ids)
    if end is None:
        return
    trainer.eos_token_ids = [*trainer.eos_token_ids, end]
    if trainer.use_vllm:
        own = trainer.vllm_generation.generation_kwargs or {}
        stops = sorted({*own.get("stop_token_ids", []), *trainer.eos_token_ids})
        trainer.vllm_generation.generation_kwargs = {**own, "stop_token_ids": stops}
    else:
        asked = trainer.generation_config.eos_token_id  # of `generation_kwargs`, if given there
        trainer.generation_config.eos_token_id = [*([asked] if isinstance(asked, int) else asked or []), end]


def turn_end_id(processor: Any, declared: Collection[int] = ()) -> int | None:
    """The special token that closes an assistant's turn in the chat template, if there is one and neither it nor one
    right behind it is `declared`.

    Base models such as Qwen3-4B-Base declare `<|endoftext|>` only, while their template ends a turn with `<|im_end|>`:
    a rollout would go on with turns that it makes up, and what is read in it would be of these.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    # A folder with the older chat_template.json gives it to the processor alone
    holder = tokenizer if getattr(tokenizer, "chat_template", None) else processor
    if not getattr(holder, "chat_template", None):
        return None
    texts = {"user": "?", "assistant": "@answer@"}
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):  # some VLMs' templates read only parts
        turns = [{"role": role, "content": as_content(text)} for role, text in texts.items()]
        try:
            text = holder.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError, ValueError):  # it asks for more than two turns, or for the other form
            continue
        if "@answer@" in text:
            break
    else:
        return None
    ids = tokenizer(text.rpartition("@answer@")[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [*takewhile(special.__contains__, dropwhile(lambda index: index not in special, ids))]
    return closing[0] if closing and not {*closing} & {*declared} else None
