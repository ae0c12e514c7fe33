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
