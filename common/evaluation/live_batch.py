"""A batch in generation that rows leave when they stop and new ones join, with transformers' own cache.

transformers' continuous batching reserves most of the memory for its pages and wants other attention kernels; here a
row is a row of the plain cache, and `model.generate` does every forward.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def is_joinable(cache) -> bool:
    """Whether every layer of a cache is keys and values of (rows, heads, positions, size), and nothing else.

    False for sliding windows, whose layers count positions for all rows together, and for recurrent states.
    """
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


class LiveBatch:
    """Rows of (B, T) prompt and generated ids, padded on the left, and the keys and values of all but the last id.

    Args:
        rows: B names of the rows, for the caller.
        ids: (B, T) prompts with their first generated token.
        mask: (B, T), 0 for padding.
        cache: joinable, of T - 1 positions.
        offsets: (B, 1) that the model adds to the position of a new token, because of a row's images; None without.
    """

    def __init__(self, rows: Sequence[int], ids, mask, cache: DynamicCache, offsets: torch.Tensor | None):
        self.rows, self.ids, self.mask, self.cache, self.offsets = list(rows), ids, mask, cache, offsets
        self.starts = torch.full((len(self.rows),), ids.size(1) - 1, device=ids.device)  # of generated ids

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def generated(self) -> torch.Tensor:
        """(B,) numbers of generated tokens."""
        return self.ids.size(1) - self.starts

    def extend(self, ids: torch.Tensor) -> None:
        """Takes the (B, T + new) ids of `generate`, which has put the new positions into the cache."""
        self.mask = pad(self.mask, (0, ids.size(1) - self.ids.size(1)), value=1)
        self.ids = ids

    def pop(self, stops: torch.Tensor, limit: int) -> Iterator[tuple[int, list[int]]]:
        """(row, generated ids) of the rows with a stop id or `limit` ids, which leave the batch."""
        columns = torch.arange(self.ids.size(1), device=self.ids.device)
        new = columns >= self.starts[:, None]
        done = (new & torch.isin(self.ids, stops)).any(1) | (self.generated >= limit)
        for i in torch.nonzero(done).flatten().tolist():
            yield self.rows[i], self.ids[i, self.starts[i] :].tolist()
        if done.any():
            self._keep(torch.nonzero(~done).flatten())

    def join(self, other: "LiveBatch") -> None:
        """Adds the rows of another batch; the narrower of both is padded on the left."""
        width = max(self.ids.size(1), other.ids.size(1))
        for batch in (self, other):
            batch._widen(width - batch.ids.size(1))
        self.rows += other.rows
        for name in ("ids", "mask", "starts", *(["offsets"] if self.offsets is not None else [])):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = torch.cat([mine.keys, theirs.keys]), torch.cat([mine.values, theirs.values])

    def _widen(self, by: int) -> None:
        if by:
            self.ids, self.mask, self.starts = pad(self.ids, (by, 0)), pad(self.mask, (by, 0)), self.starts + by
            for layer in self.cache.layers:
                layer.keys, layer.values = pad(layer.keys, (0, 0, by, 0)), pad(layer.values, (0, 0, by, 0))

    def _keep(self, kept: torch.Tensor) -> None:
        """Keeps the rows `kept`, and drops the columns that pad all of them."""
        self.rows = [self.rows[i] for i in kept.tolist()]
        first = int(self.mask[kept].any(0).int().argmax()) if len(kept) else 0
        self.ids, self.mask, self.starts = self.ids[kept, first:], self.mask[kept, first:], self.starts[kept] - first
        self.offsets = None if self.offsets is None else self.offsets[kept]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, first:], layer.values[kept, :, first:]
