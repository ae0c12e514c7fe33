"""What SRPO cannot run on, each said in one sentence before it costs GPU hours."""

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from transformers.utils import logging

from .config import SRPOConfig

logger = logging.get_logger(__name__)


def check_batch(args: SRPOConfig, train_dataset) -> None:
    """Raises `ValueError` for another configuration, and unless the data set fills a generation batch."""
    if not isinstance(args, SRPOConfig):
        raise ValueError(f"args must be an SRPOConfig, got {type(args).__name__}; routing='grpo' makes it GRPO")
    if isinstance(train_dataset, IterableDataset):
        raise ValueError("SRPOTrainer repeats each prompt num_generations times and needs a map-style Dataset")
    prompts = args.generation_batch_size // args.num_generations
    if train_dataset is not None and len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts} of one generation batch: lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )


def warn_of_half_precision(model) -> None:
    """Warns of trained weights in half precision, in which most updates at a small learning rate are rounded away."""
    half = [
        name for name, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    ]
    if half:
        logger.warning(
            "%d of the trained weights are in half precision (%s): at a learning rate such as 1e-6 most updates are "
            'rounded away; load the model with dtype="float32", and bf16=True computes in bfloat16 all the same',
            len(half),
            half[0],
        )


def check_support(trainer) -> None:
    """Raises `ValueError` for a model or a sharding with which the routed loss would be wrong."""
    if is_peft_model(trainer.model) and hasattr(trainer.model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "a LoRA adapter on lm_head is never trained: the loss reads its weight; remove it from target_modules"
        )
    if trainer._is_vlm:
        raise ValueError("SRPOTrainer is for text: the self-teacher's prompt would lose the images")
    if trainer.environment_factories is not None:
        raise ValueError(
            "SRPOTrainer has no environment_factory: TRL makes prompts for a whole batch of environments, and the "
            "self-teacher scores some of its rows; pass tools="
        )
    if trainer.aux_loss_enabled:
        raise ValueError("SRPOTrainer adds no load-balancing loss: set router_aux_loss_coef=0 for this model")
    if trainer.is_fsdp_enabled:
        check_fsdp(trainer.accelerator.state.fsdp_plugin)


def check_fsdp(plugin) -> None:
    """Raises `ValueError` for FSDP 1, and where weights are loaded on one rank only: the others would copy zeros."""
    if plugin.fsdp_version != 2:
        raise ValueError("the self-teacher is sharded by FSDP 2 only: set fsdp_version: 2 in the accelerate config")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "under FSDP every rank must load the policy, which the self-teacher copies: add "
            "--fsdp_cpu_ram_efficient_loading false to accelerate launch"
        )


def check_prompt_lengths(prompt_ids: list[list[int]], limit: int) -> None:
    """Raises `ValueError` for a prompt of more than `limit` tokens."""
    longest = max(len(ids) for ids in prompt_ids)
    if longest > limit:
        raise ValueError(
            f"a prompt has {longest} tokens, above max_prompt_length={limit}: raise the limit or filter the data set "
            "(prompts are never cut)"
        )
