"""Work in proportion to real tokens: rows of like length together, and a forward no wider than its longest row.

TRL pads all rows to the longest rollout of a generation batch, among thousands nearly always `max_completion_length`.
"""

import math
from typing import Any

import torch

from ._trl import split_tensor_dict


def length_sorted(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `micro_batches` in as many others of like lengths, the longest first, so that what does not fit
    shows in the first one. Their values are tensors, with a row each or of no dimension, or None."""
    first = micro_batches[0]
    rows = {
        name: torch.cat([batch[name] for batch in micro_batches]) if _has_rows(value) else value
        for name, value in first.items()
    }
    lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    return split_tensor_dict(
        {name: value[order] if _has_rows(value) else value for name, value in rows.items()}, len(micro_batches)
    )


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def real_columns(attention_mask: torch.Tensor, responses: int, multiple: int | None = None) -> tuple[slice, int]:
    """The columns in which any row has a token, and how many of them are of responses (at least one).

    Args:
        attention_mask: (B, P + T), prompts padded on the left and responses on the right.
        responses: T.
        multiple: both widths are rounded up to multiples of it, as by TRL's `pad_to_multiple_of`.
    """
    multiple, width = multiple or 1, attention_mask.size(1)
    parts = attention_mask.split([width - responses, responses], dim=1)
    longest = torch.stack([part.sum(1).max() for part in parts]).clamp(min=1).tolist()
    prompt, response = (math.ceil(count / multiple) * multiple for count in longest)
    start = width - responses - min(prompt, width - responses)
    kept = min(response, responses)
    return slice(start, width - responses + kept), kept
