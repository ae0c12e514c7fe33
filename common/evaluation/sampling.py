"""Sampling in `model.generate` with a seed for each row, independent of the rows beside it."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def seeded_sampling(
    temperature: float, top_p: float, top_k: int, seeds: Sequence[int], starts: torch.Tensor, limit: int
) -> LogitsProcessorList:
    """Processors for a greedy `generate` that leave only the sampled token to choose.

    Temperature, top_k (0 is off) and top_p are transformers' own, in its order.

    Args:
        seeds: of the B rows.
        starts: (B,) lengths of the rows before their first generated token, padding included.
        limit: most tokens that a row generates.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*processors, _SeededChoice(seeds, starts, limit)])


class _SeededChoice(LogitsProcessor):
    """Samples by the inverse of the cumulative distribution at the row's random number for this position.

    Numbers are drawn on the CPU, so that a GPU chooses the same tokens, and float32 below 1, so that the product with
    a sum of probabilities in float64 stays below that sum.
    """

    def __init__(self, seeds: Sequence[int], starts: torch.Tensor, limit: int):
        numbers = [torch.rand(limit, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.starts, self.numbers = starts[:, None], torch.stack(numbers).to(starts.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        number = self.numbers.gather(1, input_ids.size(1) - self.starts).double()
        below = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        token = torch.searchsorted(below, number * below[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
