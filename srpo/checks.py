"""What SRPO cannot run on, each said in one sentence before it costs GPU hours."""

import inspect
from collections.abc import Callable, Set
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from .adapters import is_quantized
from .config import SRPOConfig
from .objective import teacher_prompt
from .reprompt import check_plain

logger = logging.get_logger(__name__)

# What TRL gives reward functions beside the columns of the data
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_batch(args: SRPOConfig, train_dataset) -> None:
    """Raises `ValueError` for another configuration, for data without prompts, and unless the data set fills a
    generation batch."""
    if not isinstance(args, SRPOConfig):
        raise ValueError(f"args must be an SRPOConfig, got {type(args).__name__}; routing='grpo' makes it GRPO")
    if isinstance(train_dataset, dict):  # DatasetDict, what load_dataset gives without split=
        raise ValueError(f"train_dataset holds the splits {', '.join(train_dataset)}: pass one of them")
    if isinstance(train_dataset, IterableDataset):
        raise ValueError("SRPOTrainer repeats each prompt num_generations times and needs a map-style Dataset")
    if not isinstance(train_dataset, Dataset):
        return  # none, and lists and the like, which TRL refuses
    prompts = args.generation_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts} of one generation batch: add "
            "prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    if "prompt" not in train_dataset[0]:
        raise ValueError(f"train_dataset has the columns {', '.join(train_dataset[0])}: it needs `prompt`, messages")


def check_calls(reward_funcs: Any, processing_class: Any, dataset: Any, name: str = "train_dataset") -> None:
    """Raises `ValueError` for a reward function that cannot be called with the columns of the data, and for messages
    without a chat template: TRL would say so when the engine runs, of rewards after the first rollouts."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return
    row = dataset[0]
    if "prompt" not in row:
        raise ValueError(f"{name} has the columns {', '.join(row)}: it needs `prompt`, messages")
    if isinstance(row["prompt"], list) and _lacks_template(processing_class):
        raise ValueError(
            "prompts are messages, and processing_class has no chat_template: set it, or pass the prompts as texts"
        )
    columns = row.keys() - {"prompt", "completion", "completion_ids"}
    for reward in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if callable(reward) and not isinstance(reward, torch.nn.Module):  # else none, a model or the name of one
            _check_reward(reward, columns, name)


def _lacks_template(processing_class: Any) -> bool:
    """Whether messages cannot be rendered; not so of a class that renders without a template, such as Mistral's."""
    if getattr(processing_class, "chat_template", "") is not None:  # without a processing_class TRL loads the model's
        return False
    by_template = [kind.apply_chat_template for kind in (PreTrainedTokenizerBase, ProcessorMixin)]
    return getattr(type(processing_class), "apply_chat_template", by_template[0]) in by_template


def _check_reward(reward: Callable, columns: Set[str], name: str) -> None:
    if taken := columns & set(OF_TRL):
        raise ValueError(f"{name} has the column {min(taken)}, as TRL calls what it makes itself: rename it")
    try:  # a decorator may rename columns for the function that it wraps
        inspect.signature(reward, follow_wrapped=False).bind(**dict.fromkeys([*OF_TRL, *columns]))
    except ValueError:  # a function of C, which need not say what it takes
        return
    except TypeError as error:
        function = getattr(reward, "__name__", type(reward).__name__)
        raise ValueError(
            f"reward function {function}: {error}; with {name} TRL calls it with {', '.join(OF_TRL)} and the "
            f"columns {', '.join(sorted(columns)) or '(none)'}: rename its argument or the column, and add "
            "**columns for what it does not use"
        ) from error


def check_tokens(model, tokenizer) -> None:
    """Raises `ValueError` for a padding token of which the model has no row: on a GPU an assertion without a name."""
    rows = model.config.get_text_config().vocab_size
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        raise ValueError(
            f"the tokenizer's pad_token {tokenizer.pad_token!r} is id {tokenizer.pad_token_id}, and the model has "
            f"{rows} rows: call model.resize_token_embeddings(len(tokenizer)), or set pad_token to a known token"
        )


def check_prompts(dataset: Dataset, tokenizer) -> None:
    """Raises `ValueError` for a column of images, and for a prompt to which no demonstration could be added."""
    if found := [name for name in ("image", "images") if name in dataset[0]]:
        raise ValueError(
            f"train_dataset has the column {found[0]}, which TRL gives to the model, and SRPOTrainer is for text: "
            "remove or rename it"
        )
    stored = dataset.with_format(None)  # what a transform makes is looked at when it is distilled
    prompts = stored["prompt"] if "prompt" in stored.column_names else [dataset[0]["prompt"]]
    for row, prompt in enumerate(prompts):
        try:
            teacher_prompt(prompt, "")
        except ValueError as error:
            raise ValueError(f"row {row} of train_dataset: {error}; leave such rows out") from error
    check_plain(prompts, tokenizer)


class HalfPrecisionCallback(TrainerCallback):
    """Warns when training starts of trained weights in half precision, in which most updates at a small learning rate
    are rounded away. Not before: the adapters of a trainer that is built may still be made float32."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        dtypes = (torch.bfloat16, torch.float16)
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in dtypes]
        advice = 'load the model with dtype="float32", and bf16=True computes in bfloat16 all the same'
        if is_quantized(model):
            advice = (
                "TRL rounds adapters on quantized weights to bfloat16: once the trainer is built, run `for p in "
                "trainer.model.parameters(): p.data = p.data.float() if p.requires_grad else p.data`"
            )
        if half and state.is_world_process_zero:
            logger.warning(
                "%d of the trained weights are in half precision (%s): at a learning rate such as 1e-6 most updates "
                "are rounded away; %s",
                len(half),
                half[0],
                advice,
            )


def warn_of_summed_rewards(args: SRPOConfig, weights: torch.Tensor) -> None:
    """Warns if rewards of 1 add up to a correct rollout without the one that weighs most: right form, wrong answer."""
    weights = weights.abs()
    rest = (weights.sum() - weights.max()).item() if len(weights) else 0.0
    if args.reward_threshold == SRPOConfig.reward_threshold and rest >= args.reward_threshold:
        logger.warning(
            "a rollout is correct, and may be shown as the solution, when the weighted sum of its %d rewards reaches "
            "reward_threshold=%g: set it, or reward_weights, so that only correct answers do, not also wrong ones in "
            "the right form or length",
            len(weights),
            args.reward_threshold,
        )


def warn_of_positions(args: SRPOConfig, model) -> None:
    """Warns if a teacher prompt and a response may be longer than the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    response = args.max_completion_length or 0
    prompt = min(args.max_reprompt_length, args.max_prompt_length + response)
    if positions and prompt + response > positions:
        logger.warning(
            "a teacher prompt (up to %d tokens) and a response (max_completion_length=%d) together may be longer than "
            "the model's %d positions: lower max_reprompt_length=%d, which cuts long demonstrations, or "
            "max_completion_length",
            prompt,
            response,
            positions,
            args.max_reprompt_length,
        )


def check_support(trainer) -> None:
    """Raises `ValueError` for a model, data or a sharding with which the routed loss would be wrong; warns of
    settings."""
    if is_peft_model(trainer.model) and trainer.model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config is a {type(trainer.model.active_peft_config).__name__}, whose learned prompt the loss would "
            "not see: use LoRA"
        )
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
    check_prompts(trainer.train_dataset, trainer._tokenizer)
    if trainer.aux_loss_enabled:
        raise ValueError("SRPOTrainer adds no load-balancing loss: set router_aux_loss_coef=0 for this model")
    if trainer.is_fsdp_enabled:
        check_fsdp(trainer.accelerator.state.fsdp_plugin)
    if trainer.accelerator.is_main_process:
        warn_of_summed_rewards(trainer.args, trainer.reward_weights)
        warn_of_positions(trainer.args, trainer.model)


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
