"""Micro-batches of policy and self-teacher: rows of like length together, and no wider than their longest."""

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
    """A micro-batch of B rows without the padding between prompt and response, as wide as its longest row.

    Args:
        inputs: `prompt_ids` and `prompt_mask` (B, P), padded on the left; what `PER_TOKEN` names, (B, T) or (B, 1),
            padded on the right.
        multiple: the width is rounded up to a multiple of it.

    Returns the inputs with `input_ids` and `attention_mask` (B, L), padded on the left, and what `PER_TOKEN` names
    (B, R) for the last R columns of these, R the longest response.
    """
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    response = int(inputs["completion_mask"].sum(1).max().clamp(min=1))  # truncated rows may be masked
    width = max(int(attention.sum(1).max()), response + 1)
    width += -width % (multiple or 1)
    order = attention.argsort(dim=1, stable=True)[:, -width:]  # padding first, then the tokens in their order
    tokens = inputs["completion_mask"].argsort(dim=1, stable=True)[:, -response:]
    aligned = {name: inputs[name] for name in PER_TOKEN if name in inputs}
    aligned = {name: x.expand_as(inputs["completion_mask"]).gather(1, tokens) for name, x in aligned.items()}
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1).gather(1, order)
    return {**inputs, **aligned, "input_ids": input_ids, "attention_mask": attention.gather(1, order)}


def sequence_batches(sequences: dict[int, torch.Tensor], size: int) -> list[dict[int, torch.Tensor]]:
    """Batches for the self-teacher: `size` sequences of similar length each, by row, the longest first."""
    order = sorted(sequences.items(), key=lambda item: -len(item[1]))
    return [dict(order[start : start + size]) for start in range(0, len(order), size)]
