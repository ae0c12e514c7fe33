"""Memory and disk of a run from its sizes alone: the table that every dry run prints.

These are estimates. Activations (`benchmarks/plan.py` has a formula), communication buffers and fragmentation come on
top.
"""

import os
from collections.abc import Iterable
from math import ceil, inf, log, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import models

GIB = 2**30
GPU_GIB = 80.0  # memory of the GPUs that the presets are made for
NF4_BYTES = 4.127 / 8  # a weight in NF4 with double quantization (arXiv 2305.14314, Section 3)
ZERO_STAGE = {"none": 0, "single_gpu": 0, "multi_gpu": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp1": 3, "fsdp2": 3}


class Shape(NamedTuple):
    """The sizes of a decoder; `query` and `key` are the widths of all query heads and of all key heads together."""

    layers: int
    width: int
    query: int
    key: int
    mlp: int
    vocabulary: int


# Published configurations of Qwen3 by nominal size; Qwen3-VL has the same text models, 2B that of Qwen3-1.7B
QWEN3 = {
    0.6e9: Shape(28, 1024, 2048, 1024, 3072, 151_936),
    1.7e9: Shape(28, 2048, 2048, 1024, 6144, 151_936),
    4e9: Shape(36, 2560, 4096, 1024, 9728, 151_936),
    8e9: Shape(36, 4096, 4096, 1024, 12288, 151_936),
    14e9: Shape(40, 5120, 5120, 1024, 17408, 151_936),
    32e9: Shape(64, 5120, 8192, 1024, 25600, 151_936),
}
# Their vision towers: layers, width and width of the MLP
QWEN3_VL_TOWERS = {2e9: (24, 1024, 4096), 4e9: (24, 1024, 4096), 8e9: (27, 1152, 4304), 32e9: (27, 1152, 4304)}


def _nearest(table: dict[float, Any], parameters: float) -> Any:
    return table[min(table, key=lambda size: abs(log(size / parameters)))]


def shape_of(name: str, parameters: float) -> Shape:
    """Shape of a local model, or for a hub id of the Qwen3 nearest in size."""
    if not Path(name).exists():
        return _nearest(QWEN3, parameters)
    config = models.load_config(name).get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        heads * head,
        keys * head,
        config.intermediate_size,
        config.vocab_size,
    )


def linear_layers(name: str, parameters: float) -> list[tuple[int, int]]:
    """(inputs, outputs) of all linear layers but the head, the vision tower's too: of a local model, or for a hub id
    of the Qwen3 or Qwen3-VL nearest in size. LoRA adapts these layers, and `load_in_4bit` quantizes them."""
    if Path(name).exists():
        model = models.empty_model(name)
        head = model.get_output_embeddings()
        linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
        return [(module.in_features, module.out_features) for module in linear]
    shape = shape_of(name, parameters)
    attention = [(shape.width, shape.query), *2 * [(shape.width, shape.key)], (shape.query, shape.width)]
    mlp = [*2 * [(shape.width, shape.mlp)], (shape.mlp, shape.width)]
    return shape.layers * (attention + mlp) + ("-VL-" in name) * _tower_layers(parameters, shape.width)


def _tower_layers(parameters: float, outputs: int) -> list[tuple[int, int]]:
    layers, width, mlp = _nearest(QWEN3_VL_TOWERS, parameters)
    block = [(width, 3 * width), (width, width), (width, mlp), (mlp, width)]
    merger = [(4 * width, 4 * width), (4 * width, outputs)]  # of 2 x 2 patches; one at the end and three of DeepStack
    return layers * block + 4 * merger


def trained_parameters(name: str, parameters: float, lora_rank: int) -> float:
    """All, or those of the adapters: rank * (inputs + outputs) in each layer (arXiv 2106.09685)."""
    return lora_rank * sum(map(sum, linear_layers(name, parameters))) if lora_rank else parameters


def in_4_bits(name: str, parameters: float, load_in_4bit: bool) -> float:
    """How many of a model's parameters are held in 4 bits."""
    return min(parameters, sum(map(prod, linear_layers(name, parameters)))) if load_in_4bit else 0


class Split(NamedTuple):
    """Number of pieces into which weights, gradients and optimizer states are cut; each process holds one of each."""

    weights: int
    gradients: int
    states: int


def launched() -> tuple[int, str]:
    """Number of processes and sharding with which `accelerate launch` has started this process."""
    environment, processes = os.environ, int(os.environ.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return processes, f"fsdp{environment.get('FSDP_VERSION', '1')}"
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    return processes, "none" if stage == "0" else f"zero{stage}"


def split(sharding: str, processes: int) -> Split:
    """ZeRO-1 cuts the states, 2 the gradients too, 3 the weights too (arXiv 1910.02054, Section 5), as FSDP does.

    `ValueError` for an unknown name.
    """
    if sharding not in ZERO_STAGE:
        raise ValueError(f"sharding {sharding!r} is unknown; choose among {', '.join(ZERO_STAGE)}")
    return Split(*(processes if ZERO_STAGE[sharding] >= least else 1 for least in (3, 2, 1)))


class Bytes(NamedTuple):
    """Bytes for one trained parameter."""

    weight: int
    gradient: int
    states: int
    copy: int = 0


def bytes_each(sharding: str, bf16: bool, dtype: str = "float32") -> Bytes:
    """Bytes of a trained parameter's weight, gradient, AdamW states and autocast copy.

    DeepSpeed in bfloat16 trains a copy of 2 bytes; its states are a float32 weight and two moments, 12 bytes
    (arXiv 1910.02054, Section 3.1). PyTorch has all of them in the weight's dtype; FSDP with bf16 makes that float32.
    Where nothing is sharded, autocast keeps a bfloat16 copy of each trained float32 weight until the forward ends
    (`cached_cast` in PyTorch's aten/src/ATen/autocast_mode.cpp).
    """
    if sharding.startswith("zero") and bf16:
        return Bytes(2, 2, 12)
    size = 2 if dtype == "bfloat16" and not (sharding.startswith("fsdp") and bf16) else 4
    return Bytes(size, size, 2 * size, copy=2 if bf16 and size == 4 and not ZERO_STAGE[sharding] else 0)


def model_bytes(
    who: str, parameters: float, trained: float, each: Bytes, pieces: Split, quantized: float = 0
) -> dict[str, float]:
    """Bytes that each process holds of a model, by part. `trained` parameters are trained: all, or the adapters'.
    `quantized` of the frozen ones are held in 4 bits."""
    weights = each.weight * (parameters - quantized) + NF4_BYTES * quantized
    what = f"{quantized / parameters:.0%} of them in 4 bits" if quantized else f"{each.weight} bytes each"
    copies = {"bfloat16 copies of autocast": each.copy * trained} if each.copy else {}
    return {
        f"{who} weights, {what}": weights / pieces.weights,
        "gradients": each.gradient * trained / pieces.gradients,
        "optimizer": each.states * trained / pieces.states,
        **copies,
    }


def generation_bytes(config: Any, shape: Shape, size: int, gpu_gib: float | None = None) -> dict[str, float]:
    """What the rollouts take of each training GPU: vLLM's share, or the cache of transformers' `generate`.

    TRL's trainers give `generate` all rollouts of a process at once. The cache has the dtype of the weights (`size`
    bytes each), under autocast too: the rotary embedding makes the keys float32, and the values follow them.
    """
    if config.use_vllm:
        return engine_bytes(config, gpu_gib)
    batches = getattr(config, "steps_per_generation", None) or config.gradient_accumulation_steps
    rows, prompt = config.per_device_train_batch_size * batches, getattr(config, "max_prompt_length", None)
    length = (prompt or 0) + config.max_completion_length
    what = f"{rows} rollouts of {length:,} tokens{'' if prompt else ', prompts come on top'}"
    return {f"KV cache of generate, {what}": 2 * size * shape.layers * shape.key * rows * length}


def engine_bytes(config: Any, gpu_gib: float | None = None) -> dict[str, float]:
    """What a colocated vLLM takes of each training GPU: its share of all memory, for weights and cache. By default the
    memory is GPU_GIB of the environment, else that of this process's GPU or, without one, of the GPUs that the presets
    are made for."""
    if not config.use_vllm or config.vllm_mode != "colocate":
        return {}
    which = ""
    if gpu_gib is None:
        gpu_gib = _asked_gib()
    if gpu_gib is None and torch.cuda.is_available():
        gpu_gib, which = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB, ", this GPU"
    elif gpu_gib is None:
        gpu_gib, which = GPU_GIB, ", no GPU being here and no GPU_GIB"
    share = config.vllm_gpu_memory_utilization
    asleep = ", asleep while training" if config.vllm_enable_sleep_mode else ""
    return {f"rollout engine, {share:.0%} of {gpu_gib:.4g} GiB{which}{asleep}": share * gpu_gib * GIB}


def _asked_gib() -> float | None:
    """GPU_GIB of the environment, by which a dry run plans for another machine: no field, as no run depends on it."""
    text = os.environ.get("GPU_GIB")
    if not text:
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < inf:
        raise ValueError(f"GPU_GIB must be the memory of a GPU in GiB, such as 24, got {text!r}")
    return gib


def checkpoint_count(steps: int | None, save_steps: float) -> int | None:
    """How many checkpoints a run writes: one every `save_steps` (below 1: a share of all steps), one at the end."""
    if steps is None or steps < 1:
        return None
    if save_steps == 0:  # for transformers only at the end
        return 1
    return ceil(steps / (save_steps if save_steps >= 1 else ceil(save_steps * steps)))


# ---------------------------------------------------------------------------------------------------------------------
# Printed


def settings_lines(run: Path, chosen: dict[str, Any]) -> list[str]:
    """Where the run goes, and its settings."""
    hidden = {"use_cpu", "disable_tqdm"}  # set for the look itself
    lines = [f"run folder: {run}", "settings (every other field is at its default):"]
    return lines + [f"  {key}: {value}" for key, value in chosen.items() if value is not None and key not in hidden]


def update_line(config: Any, processes: int, rollouts: bool = True) -> str:
    """Rows of an optimizer step, and how they are made up: rollouts, or given responses, one for each prompt."""
    rows, micro_batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    total, what = rows * micro_batches * processes, "rollouts" if rollouts else "responses"
    prompts = f"{total // config.num_generations} prompts x {config.num_generations} rollouts"
    parts = f"{processes} processes x {rows} {what} x {micro_batches} micro-batches"
    return f"one update: {prompts if rollouts else f'{total} {what}'}, {parts}"


def memory_lines(parts: dict[str, float], sharding: str, processes: int, who: str = "process") -> list[str]:
    """GiB by part and their sum, which is more than is held at once if an engine sleeps during training."""
    how = f"{sharding} over {processes} processes" if ZERO_STAGE[sharding] else "not sharded"
    rows = {**parts, "sum": sum(parts.values())}
    return [f"memory a {who}, GiB ({how}; activations come on top):"] + [
        f"  {value / GIB:7.2f}  {name}" for name, value in rows.items()
    ]


def unknown_line(names: Iterable[str]) -> str:
    """The line printed where the memory table would be."""
    return f"memory: unknown, {' and '.join(names)}: not at hand, and no size such as 8B in the name"


def disk_line(count: int | None, kept: str, each: float, resume: float) -> str:
    """GiB of a run: the weights that stay, `count` times, and what only resuming needs, held twice during a save."""
    number = "number of" if count is None else count
    return f"disk a run, GiB: {number} {kept} x {each / GIB:.2f}, and 2 x {resume / GIB:.2f} to resume"
