"""What a phase cannot train on, each said in one sentence before it costs GPU hours."""

import logging
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback

logger = logging.getLogger(__name__)


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
        if not prompt or not (isinstance(prompt, str) or all(map(_is_said, prompt))):
            raise ValueError(
                f"the prompt of row {i} of train_dataset is {prompt!r}: it needs messages with content, or a text; "
                "leave such rows out"
            )


def _is_said(message: dict[str, Any]) -> bool:
    """Whether a message can be rendered: calls of tools stand without content."""
    return message.get("content") is not None or bool(message.get("tool_calls"))


def check_reference(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Raises `ValueError` for a model in memory that is not its KL reference, as after training: TRL loads that from
    where the model was first loaded."""
    loaded = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        other = loaded.get(name, weight.new_empty(0))
        narrow = min(weight.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(weight.to(other.device, narrow), other.to(narrow)):
            raise ValueError(
                f"the KL reference, which TRL loads from {model.config._name_or_path}, is not this model ({name} "
                "differs): save the model and pass its folder, or set beta=0"
            )


class HalfPrecisionCallback(TrainerCallback):
    """Warns when training starts of trained weights in half precision, in which most updates at a small learning rate
    are rounded away. Not before: the adapters of a trainer that is built may still be made float32."""

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
