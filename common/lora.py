"""LoRA and QLoRA: their settings, adapters in float32, and a weight sync with vLLM that leaves the frozen weights."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel


def adapter_base(name: str) -> str | None:
    """The model that a folder with a LoRA adapter belongs to; None for any other name.

    Raises `ValueError` for an adapter's folder whose configuration cannot be read.
    """
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return PeftConfig.from_pretrained(name).base_model_name_or_path
    except (KeyError, TypeError, ValueError) as error:  # the first for an unknown `peft_type`
        raise ValueError(f"{file} cannot be read ({error}): copy the adapter again") from error


def check_lora(rank: int, load_in_4bit: bool) -> None:
    """Raises `ValueError` for a negative rank, and for 4-bit weights without an adapter to train."""
    if rank < 0:
        raise ValueError(f"lora_rank must be at least 0, got {rank}")
    if load_in_4bit and not rank:
        raise ValueError("load_in_4bit trains an adapter on frozen weights: set lora_rank too, such as 16")


def lora_config(rank: int) -> LoraConfig | None:
    """LoRA on all linear layers but the head, with alpha twice the rank; None for rank 0, which trains all weights.

    Never on `lm_head`: the losses read its weight, so an adapter there would not be trained. Trainers refuse one.
    """
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None


def nf4_config() -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in bfloat16 (QLoRA). `ValueError` without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit needs the package bitsandbytes: pip install 'bitsandbytes>=0.50', or leave it out"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def differentiable_after_evaluation(model: PreTrainedModel) -> None:
    """Tells bitsandbytes that the CPU lacks AVX-512 with bfloat16. With it, a layer's first pass in evaluation mode,
    such as generation, repacks its weights, and gradients do not flow through it from then on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def float32_adapters(model: PreTrainedModel) -> None:
    """Makes trained bfloat16 weights float32. TRL's trainers round adapters on quantized weights to bfloat16, in which
    most updates at the papers' learning rates are lost; those on other weights are float32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def with_adapters(build: Callable[[], Any], rank: int, load_in_4bit: bool) -> Any:
    """The TRL trainer that `build` makes, for LoRA of that rank: adapters in float32, a weight sync that keeps W."""
    with _vllm_without_bitsandbytes() if load_in_4bit else nullcontext():
        trainer = build()
    if load_in_4bit:
        float32_adapters(trainer.model)
    if rank and hasattr(trainer, "vllm_generation"):
        sync_merged_weights(trainer.vllm_generation)
    return trainer


@contextmanager
def _vllm_without_bitsandbytes() -> Iterator[None]:
    """Hides bitsandbytes from TRL, which for 4-bit weights asks a colocated vLLM for 4-bit weights too: vLLM 0.31 does
    not have them, and they could not take the sums of a weight sync."""
    from trl.generation import vllm_generation

    look, vllm_generation.is_bitsandbytes_available = vllm_generation.is_bitsandbytes_available, lambda: False
    try:
        yield
    finally:
        vllm_generation.is_bitsandbytes_available = look


def sync_merged_weights(generation) -> None:
    """Lets a TRL trainer's `vllm_generation` send W + scale B A and never write W, for a model with plain LoRA.

    TRL adds the adapter to the frozen weights, sends them and takes it out again. In bfloat16 both steps round, so the
    weights drift at every sync (after a hundred by a third of what the adapter changes), and the adapter on the
    original weights is no longer the trained model. In 4 bits it is worse, and vLLM needs full weights.
    """
    iterate = generation._iter_named_params

    def sums() -> Iterator[tuple[str, torch.Tensor]]:
        model = generation.model
        layers = {
            generation._fix_param_name_to_vllm(f"{name.removeprefix('base_model.model.')}.weight"): layer
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        model.merge_adapter = model.unmerge_adapter = lambda: None  # over PEFT's, which write into W
        try:
            for name, weight in iterate():
                yield name, _with_adapter(layers[name], weight) if name in layers else weight
        finally:
            del model.merge_adapter, model.unmerge_adapter

    generation._iter_named_params = sums


@torch.no_grad()
def _with_adapter(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """This layer's unsharded `weight` plus the active adapters' scale B A, rounded once."""
    delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    delta = delta.to(weight.device)  # from host memory, where FSDP keeps it with fsdp_offload_params
    if isinstance(delta, DTensor):
        delta = delta.full_tensor()
    if not weight.is_floating_point():
        weight = dequantize_module_weight(layer.get_base_layer())
    return (weight.float() + delta).to(weight.dtype)
