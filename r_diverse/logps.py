"""Whether the loss sees the model that samples: TRL's log-probabilities beside those of the model's own forward."""

import inspect
from itertools import islice
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.utils import logging
from trl import GRPOTrainer

logger = logging.get_logger(__name__)

TOKENS = 8  # in the row that is scored, and of padding on its left


@torch.no_grad()
def check_logps(trainer: GRPOTrainer) -> None:
    """Raises `ValueError` if the loss of a trainer takes other log-probabilities than the model samples by.

    TRL makes logits of the last hidden states, the head's weight, and a scale and soft cap that the config names. A
    model's own forward may do more (ModernBERT has a layer in its head) or less (LLaVA around Granite or Gemma 2).
    TRL also gives no positions, so that padding on the left moves them: where that matters (GPT-2, HunYuan), they are
    counted from the first token from here on; where that does not help, a warning says so.
    """
    model = trainer.model
    if not _is_callable(trainer):
        return
    rows, special = range(model.config.get_text_config().vocab_size), set(trainer._tokenizer.all_special_ids)
    row = list(islice((i for i in rows if i not in special), TOKENS))
    padded = [trainer._tokenizer.pad_token_id] * len(row) + row
    alone, batch = (torch.tensor(x, device=model.device) for x in ([row], [padded, row + row]))
    mask = torch.ones_like(batch)
    mask[0, : len(row)] = 0
    training, autocast = model.training, trainer.accelerator.autocast
    model.eval()
    with autocast():
        logits = model(input_ids=alone, use_cache=False).logits[0, :-1].float() / trainer.temperature
    own = logits.log_softmax(1).gather(1, alone.T[1:]).squeeze(1)
    # Nats: a wrong head or position makes tenths. A GPU may multiply float32 as TF32; a logit may be one of bfloat16
    exact = trainer.accelerator.mixed_precision == "no" and model.dtype == torch.float32 and model.device.type == "cpu"
    rounding = 1e-3 if exact else 0.05 + 2**-8 * logits.abs().max().item()

    def differs(ids: torch.Tensor, mask: torch.Tensor) -> bool:
        with autocast():
            output = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
        logps = output.log_probs[0, -len(own) :].to(own.device)  # of a model on several GPUs: made beside its head
        return not (logps - own).abs().mean() <= rounding

    if differs(alone, torch.ones_like(alone)):
        raise ValueError(
            f"the loss would not be that of the model that samples: logits of {type(model).__name__} are not the "
            "product of its last hidden states and its head, with the scale and soft cap that its config names; "
            "train a model of another family"
        )
    if differs(batch, mask):
        hooks = [count_positions(m) for m in (model, trainer.ref_model) if m is not None]
        if differs(batch, mask):
            for hook in hooks:
                hook.remove()
            logger.warning(
                "log-probabilities of %s depend on the padding on the left of a row: rollouts and loss are wrong "
                "where prompts have different lengths",
                type(model).__name__,
            )
    model.train(training)


def _is_callable(trainer: GRPOTrainer) -> bool:
    """Whether the model can be looked at: DeepSpeed and FSDP have not moved its weights to their devices yet, those in
    4 bits may not be called in evaluation; a learned prompt adds tokens, and with trained tokens in a tied head TRL's
    loss ends by itself."""
    model = trainer.model
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    learned = is_peft_model(model) and model.active_peft_config.is_prompt_learning
    quantized = getattr(model, "is_quantized", False)
    return not (sharded or learned or quantized) and hasattr(model.get_output_embeddings(), "bias")


def count_positions(model: nn.Module) -> Any:
    """Lets a model that gets no positions count them from the first token of each row. Returns the hook's handle."""
    backbone = (model.get_base_model() if is_peft_model(model) else model).base_model
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    def positions(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        given = kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None
        if takes_positions and not given and mask is not None and mask.ndim == 2:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return args, kwargs

    return backbone.register_forward_pre_hook(positions, with_kwargs=True)
