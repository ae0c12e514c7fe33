"""Work in proportion to what is new: siblings share the pass over their prompt, micro-batches are cut to their tokens.

The teacher scores the K rollouts of a prompt, in both views, from one pass over the prompt (vision tower included) and
few over the rollouts, which read the prompt from a key-value cache. Rows of a batch are dicts as TRL builds them:
left-padded `prompt_ids`, right-padded `completion_ids`, their masks, and the processor's fields.
"""

import copy
import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from ._trl import MULTIMODAL_KEYS, split_pixel_values_by_grid, unsplit_pixel_values_by_grid

# Padding tokens that cost as much as one more forward pass. On a GPU the launches of a pass take as long as about a
# thousand tokens of an 8B model, on a CPU next to nothing.
PASS_TOKENS = {"cuda": 1024, "cpu": 16}
# Most tokens in one pass; a prompt counts once for each of its rollouts. More would only take memory
MOST_TOKENS = 32768


def take_rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The given rows of a batch, in the given order, with the images that belong to them."""

    def take(value):
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value

    return unsplit_pixel_values_by_grid({k: take(v) for k, v in split_images(batch).items()})


def split_images(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a list of what belongs to the images of each row. Idefics3 and SmolVLM have a row each already,
    which TRL would cut once more where a batch has as many images as rows."""
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim == 5 and "image_sizes" not in batch:  # which LLaVA-NeXT has
        return batch
    return split_pixel_values_by_grid(batch)


def token_types(fields: dict[str, Any]) -> dict[str, Any]:
    """Of what a processor makes of prompts, what says for each token whether it stands for an image."""
    return {key: value for key, value in fields.items() if key.endswith("token_type_ids")}


def with_token_types(batch: dict[str, Any], types: dict[str, list[list[int]]]) -> dict[str, Any]:
    """The batch with the given token types of its prompts, lists of B lists, and 0 for rollouts.

    TRL makes those of the loss anew from the rendered prompts, which its rollouts do not: there a processor adds
    another token in front of a template's own `bos_token` (Gemma 3), and an answer at the end stays open. Then each
    type is that of a token before or behind.
    """
    for key in types.keys() & batch.keys():
        mask = batch["prompt_mask"]
        of_prompts = torch.zeros_like(mask)
        of_prompts[mask.bool()] = torch.cat([mask.new_tensor(row) for row in types[key]])
        batch = {**batch, key: torch.cat([of_prompts, torch.zeros_like(batch["completion_mask"])], dim=1)}
    return batch


def sequence_lengths(batch: dict[str, Any]) -> list[int]:
    """Tokens of prompt and rollout together, a number a row."""
    return (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()


def length_sorted(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`parts` micro-batches of equally many rows and of like lengths, the longest first."""
    lengths = sequence_lengths(batch)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    size = len(order) // parts
    return [take_rows(batch, order[i : i + size]) for i in range(0, parts * size, size)]


def trimmed_inputs(batch: dict[str, Any], multiple: int | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs of a batch without the padding between prompt and rollout, as wide as its longest row.

    Args:
        multiple: the width is rounded up to a multiple of it.

    Returns the inputs, (B, L) where they are a token each, and the (B, L) bool mask of the response tokens.
    """
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = -(-int(attention.sum(1).max()) // (multiple or 1)) * (multiple or 1)
    order = attention.argsort(dim=1, stable=True)[:, -width:]  # padding first, then the tokens in their order
    fields = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}
    pixels = fields.get("pixel_values")
    # No row of this batch has an image; where the tiles of a row stand together, missing ones are 0
    if pixels is not None and (not len(pixels) or (pixels.ndim == 5 and not pixels.any())):
        fields = token_types(fields)
    fields |= {key: value.gather(1, order) for key, value in token_types(fields).items()}
    fields["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).gather(1, order)
    fields["attention_mask"] = attention.gather(1, order)
    mask = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)
    return fields, mask.gather(1, order).bool()


def sibling_groups(num_rows: int, num_generations: int, rank: int = 0, num_ranks: int = 1) -> list[range]:
    """The rows of a rank by prompt. All ranks together have the groups of K siblings in order, `num_rows` rows each.

    A group that lies on two ranks has a part on each. Ranks with fewer groups repeat their last one, so that all ranks
    make equally many forward passes, which a sharded teacher needs.
    """

    def groups_of(rank):
        firsts = [row for row in range(num_rows) if row == 0 or (rank * num_rows + row) % num_generations == 0]
        return [range(a, b) for a, b in pairwise([*firsts, num_rows])]

    groups, most = groups_of(rank), max(len(groups_of(r)) for r in range(num_ranks))
    return groups + [groups[-1]] * (most - len(groups))


def cheapest_runs(lengths: list[int], pass_tokens: float, before: int = 0, most: float = math.inf) -> list[list[int]]:
    """Indices of `lengths`, the longest first, cut into the runs that together cost least. A run is one forward pass:
    it costs `pass_tokens`, and for each of its rows the length of the longest. A run of several rows has `most` tokens
    at most, `before` tokens before each row included."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]  # of the first rows of `order`: cost and runs
    for end in range(1, len(order) + 1):
        choices = []
        for start, (cost, runs) in enumerate(best):
            rows, longest = end - start, lengths[order[start]]
            if rows == 1 or rows * (before + longest) <= most:
                choices.append((cost + pass_tokens + rows * longest, [*runs, order[start:end]]))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


def backbone(model: nn.Module) -> nn.Module:
    """A model without its head: what makes hidden states from ids and images."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model  # with PEFT or without


def rope_types(config: PretrainedConfig) -> set[str]:
    """The RoPE types of the model's layers; a model may have one for each kind of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    return {kind.get("rope_type", "default") for kind in of_kinds}


def refusal(model: nn.Module) -> str | None:
    """Why rollouts cannot be scored from a cache of their prompt with this model, or None if they can.

    Only a cache that keeps every key and value can be continued by several tokens of several rollouts and still be
    checked on one prompt: a window or a recurrent state may go wrong on longer prompts only. So may positions whose
    frequencies depend on the length of what passes.
    """
    if "past_key_values" not in inspect.signature(backbone(model).forward).parameters:
        return "its forward takes no past_key_values"
    if by_length := rope_types(model.config) & {"dynamic", "longrope"}:
        return f"its rope_type is {by_length.pop()}, which depends on the length of what passes"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    return f"its cache has layers of the kind {', '.join(sorted(kinds))}" if kinds else None


def sibling_hidden_states(
    model: nn.Module,
    views: list[dict[str, Any]],
    pass_tokens: float = PASS_TOKENS["cpu"],
    most: float = MOST_TOKENS,
) -> list[torch.Tensor]:
    """For each view, hidden states (N, H) from which the response tokens are predicted, without gradient.

    A view is a batch whose rows have the same prompt and images; the views differ in pixels only. One pass reads the
    prompt in all views; further passes read the rollouts, those of similar length together (see `cheapest_runs`), each
    in all views. No attention mask is needed: there is no padding on the left, and attention is causal.
    """
    model, length = backbone(model), int(views[0]["prompt_mask"][0].sum())
    inputs = [_prompt_inputs(view) for view in views]
    inputs = {key: torch.cat([given[key] for given in inputs]) for key in inputs[0]}
    output = model(**inputs, use_cache=True)
    last = output.last_hidden_state[:, -1:]
    # M-RoPE counts an image as fewer positions than tokens. Without images `rope_deltas` is left from an earlier call
    shift = getattr(model, "rope_deltas", None) if "image_grid_thw" in inputs else None
    ids, counts = views[0]["completion_ids"], views[0]["completion_mask"].sum(1).tolist()
    states: list[list[torch.Tensor]] = [[last[view]] * len(counts) for view in range(len(views))]
    for run in cheapest_runs(counts, pass_tokens / len(views), length, most / len(views)):
        width = max(counts[run[0]] - 1, 1)  # nothing follows the last token; one pass on all ranks alike
        view = torch.arange(len(views), device=ids.device).repeat_interleave(len(run))
        position = torch.arange(length, length + width, device=ids.device).expand(len(view), -1)
        hidden = model(
            input_ids=ids[run, :width].repeat(len(views), 1),
            position_ids=position if shift is None else position + shift[view],
            past_key_values=selected(output.past_key_values, view),
            use_cache=True,
        ).last_hidden_state
        for of_view, rows in zip(states, hidden.split(len(run)), strict=True):
            for rollout, row in zip(run, rows, strict=True):
                of_view[rollout] = torch.cat([of_view[rollout], row[: counts[rollout] - 1]])
    mask = views[0]["completion_mask"][:, : max(counts)].bool()
    return [pad_sequence(rows, batch_first=True)[mask] for rows in states]


def _prompt_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Model inputs of the first row's prompt alone."""
    first = take_rows(batch, [0])
    inputs, _ = trimmed_inputs(first | {"completion_mask": torch.zeros_like(first["completion_mask"])})
    inputs.pop("attention_mask")
    return inputs


def selected(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A copy of the cache with the given rows, each as often as it stands there; the given one stays as it is."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.batch_select_indices(rows)
    return cache
