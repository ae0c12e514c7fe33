"""Micro-batches of policy and self-teacher: rows of like length together, and no wider than their longest."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from ._trl import split_tensor_dict

# Of a micro-batch, what has a column for each response token
PER_TOKEN = ("completion_ids", "completion_mask", "tool_mask", "importance_sampling_ratio", "entropy_weights")


class SortsByLength:
    """A trainer with this base, named before TRL's `GRPOTrainer`, makes the updates of that one on the same rollouts,
    in micro-batches of like length instead of drawn ones, each without the columns that are padding in all its rows.

    TRL pads all rows to the longest rollout of a generation batch, among thousands nearly always
    `max_completion_length`. Rows with images are left to it: their pixels have no row each.
    """

    # What TRL logs as the mean over micro-batches of a mean over tokens; the ratios, with one a token only
    _token_means: ClassVar = ("entropy", "kl")
    _ratio_means: ClassVar = (*(f"clip_ratio/{kind}_mean" for kind in ("low", "high", "region")), "cispo_clip_ratio")
    _token_shares: Sequence[float] = (1.0,)  # by micro-batch: its tokens over their mean in its update

    def _prepare_inputs(self: Any, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        parts = self.args.steps_per_generation
        size = math.gcd(parts, self.args.gradient_accumulation_steps)  # so many are never of two updates
        if self._is_sum_over_rows() and "pixel_values" not in inputs:
            updates = [joined(self._buffered_inputs[start : start + size]) for start in range(0, parts, size)]
            self._buffered_inputs = [batch for update in updates for batch in length_sorted(update, size)]
        # On all ranks, of which some may have images
        tokens = torch.stack([loss_mask(batch).sum() for batch in self._buffered_inputs]).float()
        tokens = self.accelerator.reduce(tokens, "sum").view(-1, size)
        self._token_shares = (tokens / tokens.mean(1, keepdim=True).clamp(min=1 / size)).flatten().tolist()
        return self._buffered_inputs[self._step % parts]

    def _is_sum_over_rows(self: Any) -> bool:
        """Whether an update is the same in any micro-batches: else a part of it is a mean or a quantile of each."""
        of_a_micro_batch = (
            self.loss_type == "bnpo",
            self.top_entropy_quantile < 1,
            self._entropy_bonus_enabled,
            self.aux_loss_enabled,
        )
        return not any(of_a_micro_batch)

    def _compute_loss(self: Any, model, inputs):
        """TRL's. What it logs as a mean over tokens becomes one of the whole update: micro-batches of long rollouts
        have more of them."""
        ratios = self._ratio_means if self.importance_sampling_level == "token" else ()
        metrics = self._metrics["train"]
        before = {name: len(metrics.get(name, ())) for name in (*self._token_means, *ratios)}
        loss = super()._compute_loss(model, inputs)
        for name, count in before.items():
            if len(metrics.get(name, ())) > count:  # not so in evaluation, or where only a reward logs under the name
                metrics[name][-1] *= self._token_shares[self._step % len(self._token_shares)]
        return loss

    def _get_per_token_logps_and_entropies(
        self: Any,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        compute = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        upstream = super()._get_per_token_logps_and_entropies
        if any(value is not None for value in images.values()):
            return upstream(model, input_ids, attention_mask, logits_to_keep, batch_size, **compute, **images)
        order = attention_mask.sum(1).argsort(descending=True, stable=True)
        found = []
        for rows in order.split(batch_size or len(order)):
            columns, kept = real_columns(attention_mask[rows], logits_to_keep, self.pad_to_multiple_of)
            logps, entropies, aux_loss = upstream(
                model, input_ids[rows, columns], attention_mask[rows, columns], kept, **compute
            )
            padding = (0, logits_to_keep - kept)
            found.append((pad(logps, padding), pad(entropies, padding) if compute_entropy else None, aux_loss))
        (logps, entropies, aux_losses), back = zip(*found, strict=True), order.argsort()
        return (
            torch.cat(logps)[back],
            torch.cat(entropies)[back] if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """(B, T): 1 for a token that the loss sees."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def joined(micro_batches: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of the rows of several. Values are tensors, with a row each or of no dimension, or None."""
    return {
        name: torch.cat([batch[name] for batch in micro_batches]) if _has_rows(value) else value
        for name, value in micro_batches[0].items()
    }


def length_sorted(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`parts` micro-batches of equally many rows of a batch and of like lengths, the longest first, so that what does
    not fit shows in the first one. Values of `batch` are those of `joined`."""
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    return split_tensor_dict(
        {name: value[order] if _has_rows(value) else value for name, value in batch.items()}, parts
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
