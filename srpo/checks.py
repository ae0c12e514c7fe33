"""What SRPO cannot run on, each said in one sentence before it costs GPU hours."""

from accelerate.utils import is_peft_model


def check_support(trainer) -> None:
    """Raises `ValueError` for a model or a sharding with which the routed loss would be wrong."""
    if is_peft_model(trainer.model) and hasattr(trainer.model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "a LoRA adapter on lm_head is never trained: the loss reads its weight; remove it from target_modules"
        )
    if trainer._is_vlm:
        raise ValueError("SRPOTrainer is for text: the self-teacher's prompt would lose the images")
    if trainer.aux_loss_enabled:
        raise ValueError("SRPOTrainer adds no load-balancing loss: set router_aux_loss_coef=0 for this model")
    if trainer.is_fsdp_enabled:
        raise ValueError("SRPOTrainer's self-teacher does not run under FSDP: use DeepSpeed ZeRO-2 or ZeRO-3")


def check_prompt_lengths(prompt_ids: list[list[int]], limit: int) -> None:
    """Raises `ValueError` for a prompt of more than `limit` tokens."""
    longest = max(len(ids) for ids in prompt_ids)
    if longest > limit:
        raise ValueError(
            f"a prompt has {longest} tokens, above max_prompt_length={limit}: raise the limit or filter the data set "
            "(prompts are never cut)"
        )
