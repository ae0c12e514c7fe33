"""What a phase cannot train on, each said in one sentence before it costs GPU hours."""

import inspect
import logging
from collections.abc import Callable, Set
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer

from ._trl import is_async_callable

logger = logging.getLogger(__name__)

# What TRL gives reward functions beside the columns of the data
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_data(dataset: Any) -> None:
    """Raises `ValueError` for training data whose prompts a phase cannot repeat or render."""
    if isinstance(dataset, dict):  # DatasetDict, what load_dataset gives without split=
        raise ValueError(f"train_dataset holds the splits {', '.join(dataset)}: pass one of them")
    if isinstance(dataset, IterableDataset):
        raise ValueError("PhaseTrainer repeats each prompt num_generations times and needs a map-style Dataset")
    if not isinstance(dataset, Dataset) or not len(dataset):
        return  # none, and lists and the like, which TRL refuses
    if "prompt" not in dataset[0]:
        raise ValueError(f"train_dataset has the columns {', '.join(dataset[0])}: it needs `prompt`, messages")
    stored = dataset.with_format(None)  # what a transform makes, such as images, is not loaded
    for i, prompt in enumerate(stored["prompt"] if "prompt" in stored.column_names else ()):
        if not prompt or not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_said, prompt)))):
            raise ValueError(
                f"the prompt of row {i} of train_dataset is {prompt!r}: it needs messages with content and role, or a "
                "text; leave such rows out"
            )


def _is_said(message: Any) -> bool:
    """Whether a message can be rendered: calls of tools stand without content."""
    if not isinstance(message, dict) or not message.get("role"):
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))


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


def check_roles(tokenizer: Any, prompt: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Raises `ValueError` for a chat template that refuses a prompt of system and user, or leaves out one of its
    messages: some templates know no system message and render the others without a word.

    Args:
        tokenizer: with the chat template; one that has none, and a processor, are left alone.
        prompt: messages.
        options: of the template.

    Returns what the template makes of the prompt, with marks for the contents; "" of what is left alone.
    """
    of_text = isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.chat_template
    if not of_text or not all(m["role"] in ("system", "user") and isinstance(m["content"], str) for m in prompt):
        return ""
    turns = [{**message, "content": f"@message {i}@"} for i, message in enumerate(prompt)]
    remedy = "leave it out and put its text into the user's message, or give the tokenizer a template that renders it"
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the prompt ({error}): {remedy}") from error
    if lost := [turn["role"] for turn in turns if turn["content"] not in text]:
        raise ValueError(f"the chat template leaves out the prompt's message of the {lost[0]}: {remedy}")
    return text


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
        advice = "load the model in float32 (policy_dtype), and bf16=True computes in bfloat16 all the same"
        if getattr(model, "is_quantized", False):
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
