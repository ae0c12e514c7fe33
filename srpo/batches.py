"""Micro-batches of the policy: rows of like length together, and no wider than their longest."""

import math
from typing import Any

import torch

from ._trl import split_tensor_dict

# Of a micro-batch, what has a column for each response token
PER_TOKEN = ("completion_ids", "completion_mask", "tool_mask", "importance_sampling_ratio", "entropy_weights")


def length_sorted(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`parts` micro-batches of equally many rows of a generation batch and of like lengths, the longest first, so that
    what does not fit shows in the first one. Values of `batch` are tensors, with a row each or of no dimension."""
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    rows = {
        name: value[order] if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in batch.items()
    }
    return split_tensor_dict(rows, parts)


def trimmed(inputs: dict[str, torch.Tensor], multiple: int | None = None) -> dict[str, torch.Tensor]:
    """A micro-batch of B rows as wide as its longest prompt and its longest response: TRL pads all to the longest of
    the generation batch, which may be many times as long.

    Args:
        inputs: `prompt_ids` and `prompt_mask` (B, P), padded on the left; (B, T) what `PER_TOKEN` names.
        multiple: widths are rounded up to multiples of it, as TRL's `pad_to_multiple_of` does.
    """
    multiple, masks = multiple or 1, (inputs["prompt_mask"], inputs["completion_mask"])
    longest = torch.stack([mask.sum(1).max() for mask in masks]).clamp(min=1).tolist()  # truncated rows may be masked
    prompt, response = (math.ceil(width / multiple) * multiple for width in longest)
    parts = {"prompt_ids": slice(-prompt, None), "prompt_mask": slice(-prompt, None)}
    parts |= {name: slice(response) for name in PER_TOKEN if name in inputs}
    return {**inputs, **{name: inputs[name][:, part] for name, part in parts.items()}}
