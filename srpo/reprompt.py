"""The self-teacher's prompt: the plain prompt, a correct sibling and the closing instruction."""

import re
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
    template: str = objective.TEMPLATE,
) -> list[list[int]]:
    """Token ids of each teacher prompt, at most `max_length` long.

    What a demonstration spells of the tokenizer's special tokens stays text. Where a prompt is too long, the end of
    the demonstration is left out, never the question or the closing instruction. Raises `ValueError` for a prompt that
    leaves no room for any of it, and for text with a chat template.
    """
    if not prompts:
        return []
    check_plain(prompts, tokenizer)
    demonstrations = [neutralise(objective.strip_thinking(text), tokenizer) for text in demonstrations]
    ids = tokenize([objective.teacher_prompt(p, d, template) for p, d in zip(prompts, demonstrations, strict=True)])
    for row in (row for row, tokens in enumerate(ids) if len(tokens) > max_length):
        tokens = tokenizer(demonstrations[row], add_special_tokens=False)["input_ids"]
        while (excess := len(ids[row]) - max_length) > 0:
            if excess >= len(tokens):
                raise ValueError(
                    f"a teacher prompt without its demonstration has {len(ids[row]) - len(tokens)} tokens and leaves "
                    f"no room for one in max_reprompt_length={max_length}: raise the limit or filter long prompts"
                )
            tokens = tokens[:-excess]
            ids[row] = tokenize([objective.teacher_prompt(prompts[row], tokenizer.decode(tokens), template)])[0]
    return ids


def neutralise(text: str, tokenizer) -> str:
    """The text with a space inside each special token that it spells: <|im_end|> must not end the teacher's turn."""
    special = [re.escape(token) for token in _special_tokens(tokenizer)]
    return re.sub(rf"(?=(?:{'|'.join(special)}))(.)", r"\1 ", text, flags=re.DOTALL) if special else text


def check_plain(prompts: list[Prompt], tokenizer) -> None:
    """Raises `ValueError` for a text that holds special tokens other than those that begin, end or fill one."""
    plain = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    special = [token for token in _special_tokens(tokenizer) if token not in plain]
    for text in (prompt for prompt in prompts if isinstance(prompt, str)):
        if found := next((token for token in special if token in text), None):
            raise ValueError(
                f"a prompt is text with the chat template applied (it holds {found!r}), into whose user message no "
                "demonstration can be put: pass messages"
            )


def _special_tokens(tokenizer) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
