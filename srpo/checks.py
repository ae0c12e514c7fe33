"""What SRPO cannot run on, each said in one sentence before it costs GPU hours."""

import inspect
from collections.abc import Callable, Set
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from ._trl import is_async_callable
from .adapters import is_quantized
from .config import SRPOConfig
from .objective import teacher_prompt
from .reprompt import check_plain

logger = logging.get_logger(__name__)

# What TRL gives reward functions beside the columns of the data
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_inputs(args: SRPOConfig, train_dataset) -> None:
    """Raises `ValueError` for another configuration class, for data that are no map-style data set, unless they fill a
    generation batch, and for calls of tools that nobody made."""
    if not isinstance(args, SRPOConfig):
        raise ValueError(f"args must be an SRPOConfig, got {type(args).__name__}; routing='grpo' makes it GRPO")
    if isinstance(train_dataset, dict | IterableDataset):
        raise ValueError(
            "train_dataset must be a map-style Dataset, as each prompt is repeated num_generations times, and one "
            f"split of a DatasetDict; got {type(train_dataset).__name__}"
        )
    if not isinstance(train_dataset, Dataset):
        return  # none, and lists and the like, which TRL refuses
    prompts = args.generation_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts} of one generation batch: add "
            "prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    check_calls_of_tools(train_dataset, "train_dataset")


def check_calls(reward_funcs: Any, processing_class: Any, dataset: Any, name: str = "train_dataset") -> None:
    """Raises `ValueError` for a reward that is no function or does not take the columns of the data, and for messages
    without a chat template. TRL would fail only when the engine runs, for rewards after the first rollouts."""
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
        if reward is None or isinstance(reward, str | torch.nn.Module):  # none, a model or the name of one
            continue
        if not callable(reward):
            raise ValueError(
                "reward_funcs must be a function, a model or its name, or a list of these, got "
                f"{type(reward).__name__}"
            )
        _check_reward(reward, columns, name)


def check_calls_of_tools(dataset: Dataset, name: str) -> None:
    """Raises `ValueError` where Arrow has put arguments into the calls of tools in prompts: in a table all have the
    same keys, and those that a call lacks are None. The model would read calls that nobody made."""
    try:
        arguments = dataset.features["prompt"].feature["tool_calls"].feature["function"]["arguments"]
    except (AttributeError, KeyError, TypeError):  # no messages with calls, or Json, which keeps each as it is
        return
    if not isinstance(arguments, dict) or dataset.format["type"] == "custom":  # a transform may leave them out
        return
    for row, prompt in enumerate(dataset.with_format(None)["prompt"]):
        functions = (call["function"] or {} for message in prompt or [] for call in message["tool_calls"] or [])
        for function in functions:
            if empty := [key for key, value in (function.get("arguments") or {}).items() if value is None]:
                raise ValueError(
                    f"a call of {function.get('name')} in row {row} of {name} has {empty[0]}=None, which Arrow adds "
                    "where another call has this argument: drop it from the rows, and make the data set by "
                    "Dataset.from_list(rows, on_mixed_types='use_json')"
                )


def _lacks_template(processing_class: Any) -> bool:
    """Whether messages cannot be rendered. Some classes, such as Mistral's, render them without a template."""
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


def watch_rewards(trainer: GRPOTrainer) -> None:
    """Makes each reward function of a trainer raise `ValueError` unless it returns a number for each rollout: the
    errors of TRL and torch do not name the function, and an infinite reward makes all weights NaN."""
    functions = zip(trainer.reward_funcs, trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    trainer.reward_funcs = [
        reward if isinstance(reward, torch.nn.Module) else _watched(reward, name, weight)
        for reward, name, weight in functions
    ]


def _watched(reward: Callable, name: str, weight: float) -> Callable:
    if not is_async_callable(reward):
        return lambda **columns: check_rewards(reward(**columns), columns["prompts"], name, weight)

    async def call(**columns):
        return check_rewards(await reward(**columns), columns["prompts"], name, weight)

    return call


def check_rewards(returned: Any, prompts: list, name: str, weight: float = 1.0) -> list:
    """What a reward function returned, as a list; TRL compares its length with that of `prompts`.

    Raises `ValueError` for an entry that is no number, and for an infinite one, unless its weight is 0.
    """
    wanted = "it must return a list with one finite number for each rollout, or None where it does not apply"
    try:
        rewards = list(returned)
    except TypeError as error:
        raise ValueError(f"reward function {name} returned {returned!r:.100}: {wanted}") from error
    for row, (reward, prompt) in enumerate(zip(rewards, prompts, strict=False)):
        try:  # as TRL reads them
            number = torch.tensor([torch.nan if reward is None else reward], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = torch.empty(0)
        if number.shape != (1,) or (weight and number.isinf()):
            raise ValueError(
                f"reward function {name} returned {reward!r:.100} for rollout {row}, of the prompt {prompt!r:.100}: "
                f"{wanted}"
            )
    return rewards


def check_tokens(model, tokenizer) -> None:
    """Raises `ValueError` if the model has no vocabulary row for the padding or the end token: on a GPU this is an
    unnamed assertion, or rollouts never end. Warns if it has none for other tokens, which need not be used."""
    rows = model.config.get_text_config().vocab_size
    for name in ("pad_token", "eos_token"):
        token, token_id = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= rows:
            raise ValueError(
                f"the tokenizer's {name} {token!r} is id {token_id}, and the model has {rows} rows: call "
                f"model.resize_token_embeddings(len(tokenizer)), set {name} to a known token, or pass the model's own "
                "tokenizer"
            )
    if beyond := {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}:
        logger.warning(
            "the tokenizer has the token %s and the model no row for it: no prompt may hold it, unless you call "
            "model.resize_token_embeddings(len(tokenizer))",
            beyond[min(beyond)],
        )


def check_reference(model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
    """Raises `ValueError` for a model in memory that is not its KL reference, as after training: TRL loads that from
    where the model was first loaded."""
    weights = reference.named_parameters() if reference is not None else ()
    loaded = {name.replace("_orig_mod.", ""): weight for name, weight in weights}  # the prefix is of torch.compile
    for name, weight in model.named_parameters() if loaded else ():
        other = loaded.get(name, weight.new_empty(0))
        narrow = min(weight.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(weight.to(other.device, narrow), other.to(narrow)):
            raise ValueError(
                f"the KL reference, which TRL loads from {model.config._name_or_path}, is not this model ({name} "
                "differs): save the model and pass its folder, or set beta=0"
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


class FrozenCallback(TrainerCallback):
    """Raises `ValueError` at the start of training if no weight is trainable: with gradient checkpointing torch only
    warns, and no step would change the model."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "no weight of the model is trained: load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), pass peft_config, or call requires_grad_(True) on what shall be trained"
            )


class HalfPrecisionCallback(TrainerCallback):
    """Warns at the start of training if trained weights are in half precision, which rounds away most updates at a
    small learning rate. Not earlier: once a trainer is built, its adapters may still be made float32."""

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
        raise ValueError("peft_config makes a learned prompt, which the loss would not see: use LoRA")
    if trainer._is_vlm:
        raise ValueError("SRPOTrainer is for text: the self-teacher's prompt would lose the images")
    if trainer.environment_factories is not None:
        raise ValueError(
            "SRPOTrainer has no environment_factory: TRL makes prompts for a whole batch of environments, and the "
            "self-teacher scores some of its rows; pass tools="
        )
    check_prompts(trainer.train_dataset, trainer._tokenizer)
    check_longest_prompts(trainer)
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


def check_longest_prompts(trainer: GRPOTrainer, count: int = 8) -> None:
    """Raises `ValueError` for a prompt over the limit among the `count` with the longest texts: shuffled, it may come
    after hours. The others are looked at when they are drawn."""
    dataset = trainer.train_dataset
    stored = dataset.with_format(None)
    if "prompt" not in stored.column_names or trainer.rollout_func is not None:  # which may make other prompts
        return
    lengths = [len(str(prompt)) for prompt in stored["prompt"]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__)[-count:]:
        prompts = [dataset[row]["prompt"]]
        try:
            check_prompt_lengths(trainer._tokenize_prompts(prompts)[0], prompts, trainer.args)
        except ValueError as error:
            raise ValueError(f"row {row} of train_dataset: {error}") from error


def check_prompt_lengths(prompt_ids: list[list[int]], prompts: list, args: SRPOConfig) -> None:
    """Raises `ValueError` for a prompt over the limit; warns once of a colocated vLLM whose context does not hold a
    prompt and its rollout."""
    longest, row = max((len(ids), row) for row, ids in enumerate(prompt_ids))
    if longest > args.max_prompt_length:
        raise ValueError(
            f"a prompt has {longest} tokens, above max_prompt_length={args.max_prompt_length}: raise the limit or "
            f"filter the data set (prompts are never cut); it begins {prompts[row]!r:.100}"
        )
    context = args.vllm_max_model_length if args.use_vllm and args.vllm_mode == "colocate" else None
    if context and longest + args.max_completion_length > context:
        logger.warning_once(
            f"vllm_max_model_length={context} is for a prompt and its rollout, and some prompts leave less than "
            f"max_completion_length={args.max_completion_length}: vLLM cuts their rollouts short; raise the first, or "
            "lower max_completion_length, or max_prompt_length to refuse such prompts"
        )
