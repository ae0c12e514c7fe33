"""The self-teacher's prompt as token ids: the plain prompt, a correct sibling, and the closing instruction."""

from collections.abc import Callable
from typing import Any

from . import objective

Prompt = str | list[dict[str, Any]]


def teacher_prompt_ids(
    prompts: list[Prompt],
    demonstrations: list[str],
    tokenize: Callable[[list[Prompt]], list[list[int]]],
    tokenizer,
    max_length: int,
) -> list[list[int]]:
    """Token ids of each teacher prompt, at most `max_length` long.

    Where a prompt is too long, the end of the demonstration is left out, never the question or the closing
    instruction. Raises `ValueError` for a prompt that leaves no room for any of it.
    """
    if not prompts:
        return []
    demonstrations = [objective.strip_thinking(text) for text in demonstrations]
    ids = tokenize([objective.teacher_prompt(p, d) for p, d in zip(prompts, demonstrations, strict=True)])
    for row, prompt in enumerate(prompts):
        tokens = tokenizer(demonstrations[row], add_special_tokens=False)["input_ids"]
        while (excess := len(ids[row]) - max_length) > 0:
            if excess >= len(tokens):
                raise ValueError(
                    f"a teacher prompt without its demonstration has {len(ids[row]) - len(tokens)} tokens and leaves "
                    f"no room for one in max_reprompt_length={max_length}: raise the limit or filter long prompts"
                )
            tokens = tokens[:-excess]
            ids[row] = tokenize([objective.teacher_prompt(prompt, tokenizer.decode(tokens))])[0]
    return ids
