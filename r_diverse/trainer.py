"""TRL's `GRPOTrainer` for the two phases of a self-play iteration: the Challenger's, or the Solver's."""

import math
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from ._trl import AdapterSync, EpochSampler, WholeBatches, prepare_rollouts
from .batches import SortsByLength
from .checkpoints import LoadsWeights
from .checks import (
    FrozenCallback,
    HalfPrecisionCallback,
    check_calls,
    check_data,
    check_reference,
    check_roles,
    check_tokens,
    watch_rewards,
)
from .doctor import DoctorCallback
from .logps import check_logps
from .rope import exact_frequencies


class PhaseTrainer(LoadsWeights, SortsByLength, GRPOTrainer):
    """TRL's trainer for one phase of self-play (arXiv 2602.13103): the Challenger's, or the Solver's.

    Arguments are those of [`~trl.GRPOTrainer`]; `args` is a [`ChallengerConfig`] or [`SolverConfig`]. A phase that was
    killed and resumed gives the result of the undisturbed one. Raises `ValueError` for data without `prompt` or with
    fewer prompts than a generation batch, for rewards and models that TRL would train on wrongly (`checks.py`,
    `logps.py`), and for a model in memory that is not its KL reference.
    """

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, **kwargs):
        check_data(train_dataset)
        if not (kwargs.get("rollout_func") or kwargs.get("environment_factory")):  # which may make columns
            for name, data in {"eval_dataset": kwargs.get("eval_dataset"), "train_dataset": train_dataset}.items():
                check_calls(reward_funcs, kwargs.get("processing_class"), data, name)
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        watch_rewards(self)
        first = train_dataset[0]["prompt"] if isinstance(train_dataset, Dataset) and len(train_dataset) else ""
        if isinstance(first, list):
            check_roles(self.processing_class, first, self.chat_template_kwargs)
        check_tokens(self.model, self._tokenizer)
        exact_frequencies(self.model, self.ref_model)
        check_logps(self)
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # no process has a shard only
        if not isinstance(model, str) and whole:
            check_reference(self.model, self.ref_model)
        prompts = self.args.generation_batch_size // self.num_generations
        if self.train_dataset is not None and len(self.train_dataset) < prompts:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} prompts, fewer than the {prompts} of one generation "
                "batch: add prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or "
                "steps_per_generation"
            )
        prepare_rollouts(self)
        if steps := getattr(self.args, "doctor_steps", 0):  # TRL's own config has none
            self.add_callback(DoctorCallback(steps))
        self.add_callback(FrozenCallback())
        self.add_callback(WholeBatches(self))
        self.add_callback(AdapterSync(self))
        if not self.is_deepspeed_enabled:  # which keeps float32 copies
            self.add_callback(HalfPrecisionCallback())
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.ref_model is not None and fsdp is not None and fsdp.cpu_ram_efficient_loading:
            raise ValueError(
                "under FSDP every rank must load the KL reference, which else is zeros on all but the first: add "
                "--fsdp_cpu_ram_efficient_loading false to accelerate launch"
            )

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            epoch=lambda: int(self.state.epoch or 0),
            seed=self.args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Also logs the gap between trainer and rollout engine, which TRL logs only where it corrects for it."""
        batch = super()._generate_and_score_completions(inputs)
        if "sampling_per_token_logps" in batch and "old_per_token_logps" in batch:
            logps = (batch["old_per_token_logps"], batch["sampling_per_token_logps"])
            gaps = self.accelerator.gather(logps_gap(*logps, batch["completion_mask"], self.top_p))
            gap = gaps.nanmean().item()  # a rank whose rollouts are all masked has none
            self._metrics["train" if self.model.training else "eval"]["sampling/logps_gap"].append(gap)
        return batch


def logps_gap(trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor, top_p: float) -> torch.Tensor:
    """How far apart two engines see sampled tokens: mean over `mask` in nats, all (B, T); NaN counts for no token, and
    is the gap of none.

    The second one's log-probabilities are within the nucleus: higher by 0 to -log(top_p), which is no gap.
    """
    difference = engine - trainer
    gap = (difference - difference.clamp(0, -math.log(top_p))).abs()
    return gap[mask.bool() & ~gap.isnan()].mean()
