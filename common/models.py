"""Models and processors from a hub id or a local folder, with one clear sentence when they cannot be had."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)


class ModelNotFound(ValueError):
    """Neither a local folder nor reachable on the hub, or a folder without a model."""


class _ImageOnly:
    """Qwen's video processors need torchvision. A processor whose `__init__` does not name one is accepted, because
    `ProcessorMixin` reads its parts off that signature; it saves and loads by its own class."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        for name in ("image", "video"):
            setattr(self, f"{name}_token", f"<|{name}_pad|>")
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
        for name in ("vision_start", "vision_end"):
            setattr(self, f"{name}_token", f"<|{name}|>")
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyQwen3VLProcessor(_ImageOnly, Qwen3VLProcessor):
    """Qwen3-VL's processor without video."""


class ImageOnlyQwen2_5_VLProcessor(_ImageOnly, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without video."""


IMAGE_ONLY = {"qwen3_vl": ImageOnlyQwen3VLProcessor, "qwen2_5_vl": ImageOnlyQwen2_5_VLProcessor}


def load_config(name: str) -> PretrainedConfig:
    """The config of a hub id or local folder, of an adapter's base; `ModelNotFound` otherwise."""
    name = adapter_base(name) or name
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            problem = "the folder holds no model that transformers knows (no usable config.json)"
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
            problem = "there is no such folder"
        else:
            problem = "it is no local folder, and the hub cannot be reached or has no model of this name"
        raise ModelNotFound(f"model {name!r}: {problem}; pass a hub id or a folder made by save_pretrained") from error


def adapter_base(name: str) -> str | None:
    """The model that a folder with a LoRA adapter belongs to; None for any other name."""
    if not (Path(name) / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def lora_config(rank: int) -> LoraConfig | None:
    """LoRA on all linear layers but the head, with alpha twice the rank; None for rank 0, where all weights train.

    Never on `lm_head`: the losses read its weight, so an adapter there would not be trained. Trainers refuse one.
    """
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None


def four_bit() -> BitsAndBytesConfig:
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


def _differentiable_after_evaluation(model: PreTrainedModel) -> None:
    """On CPUs with AVX-512 and bfloat16, bitsandbytes repacks the weights of a layer in its first pass in evaluation
    mode, such as generation, and gradients do not flow through it from then on. It is told that the CPU is another."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def float32_adapters(model: PreTrainedModel) -> None:
    """TRL's trainers round adapters on quantized weights to bfloat16, which most updates at the papers' learning rates
    are too small to change; here they train in float32, as those on other weights do."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def with_adapters(build: Callable[[], Any], rank: int, load_in_4bit: bool) -> Any:
    """The TRL trainer that `build` makes, for LoRA of that rank: adapters in float32, a weight sync that keeps W."""
    with _engine_in_full() if load_in_4bit else nullcontext():
        trainer = build()
    if load_in_4bit:
        float32_adapters(trainer.model)
    if rank and hasattr(trainer, "vllm_generation"):
        sync_sums(trainer.vllm_generation)
    return trainer


@contextmanager
def _engine_in_full() -> Iterator[None]:
    """For weights in 4 bits TRL asks a colocated vLLM for such weights too, which 0.31 does not have and which could
    not take the sums of a weight sync. It looks for them where bitsandbytes is."""
    from trl.generation import vllm_generation

    look, vllm_generation.is_bitsandbytes_available = vllm_generation.is_bitsandbytes_available, lambda: False
    try:
        yield
    finally:
        vllm_generation.is_bitsandbytes_available = look


def sync_sums(generation) -> None:
    """Lets a TRL trainer's `vllm_generation` send W + scale B A and never write W, for a model with plain LoRA.

    TRL adds the adapter to the frozen weights, sends them and takes it out again. In bfloat16 both round, so that the
    weights drift at every sync, after a hundred by a third of what the adapter changes, and an adapter loaded onto the
    model's own weights is then not the model that was trained. In 4 bits it is worse, and vLLM needs them in full.
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
    """`weight`, whole and of this layer, plus the active adapters' scale B A, rounded once."""
    delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    if isinstance(delta, DTensor):
        delta = delta.full_tensor()
    if not weight.is_floating_point():
        weight = dequantize_module_weight(layer.get_base_layer())
    return (weight.float() + delta).to(weight.dtype)


def check_lora(rank: int, load_in_4bit: bool) -> None:
    """Raises `ValueError` for settings of LoRA that mean nothing or ruin the model."""
    if rank < 0:
        raise ValueError(f"lora_rank must be at least 0, got {rank}")
    if load_in_4bit and not rank:
        raise ValueError("load_in_4bit trains an adapter on frozen weights: set lora_rank too, such as 16")


def is_vlm(config: PretrainedConfig) -> bool:
    """Whether the model reads images."""
    return getattr(config, "vision_config", None) is not None


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """A causal or image-text model in `dtype`, on `device` (left on the CPU for a trainer to place, if None).

    From a folder with a LoRA adapter: its base with the adapter merged in.
    """
    if base := adapter_base(name):
        if load_in_4bit:
            raise ValueError(
                f"model {name!r} holds a LoRA adapter, which cannot be merged into weights in 4 bits: save the merged "
                "model first (load_model(...).save_pretrained(...)), or set load_in_4bit to false"
            )
        model = load_model(base, dtype, device, attn_implementation)
        return PeftModel.from_pretrained(model, name).merge_and_unload()
    config = load_config(name)
    auto = AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if load_in_4bit:
        options["quantization_config"] = four_bit()
    try:
        model = auto.from_pretrained(name, dtype=dtype, **options)
    except OSError as error:
        raise ModelNotFound(f"model {name!r}: {str(error).splitlines()[0]}") from error
    if load_in_4bit:
        _differentiable_after_evaluation(model)
    return model if device is None else model.to(device)


def load_processor(name: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of a vision-language model, or the tokenizer of a text model; it pads on the left, as generation
    does.

    Without torchvision, `AutoProcessor` fails for families with a video processor, or quietly returns the tokenizer,
    and training would then never see an image. So those families are put together here, without video; a folder saved
    that way has no video processor for `AutoProcessor` to find, wherever it is loaded.
    """
    config = load_config(name)
    if not is_vlm(config):
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    without_video = importlib.util.find_spec("torchvision") is None or _saved_without_video(name)
    if config.model_type in IMAGE_ONLY and without_video:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        return IMAGE_ONLY[config.model_type](image_processor, tokenizer, chat_template=tokenizer.chat_template)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ImportError, ValueError, AttributeError) as error:
        raise ModelNotFound(
            f"the processor of {name!r} ({config.model_type}) cannot be loaded: {str(error).strip().splitlines()[0]}; "
            "this family may need torchvision (the build that matches torch)"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelNotFound(
            f"{name!r} ({config.model_type}) reads images, but only a {type(processor).__name__} was found: save its "
            "processor into the folder, or install torchvision (the build that matches torch)"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def _saved_without_video(name: str) -> bool:
    file = Path(name) / "processor_config.json"
    classes = {cls.__name__ for cls in IMAGE_ONLY.values()}
    return file.is_file() and json.loads(file.read_text()).get("processor_class") in classes


def save_whole(out: Path, model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Writes model and processor so that the folder `out` appears whole or not at all."""
    temporary = out.with_name(out.name + ".partial")
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(out)


def count_parameters(name: str) -> int:
    """Number of parameters, from the config alone: no weight is loaded."""
    config = load_config(name)
    auto = AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config).num_parameters()


def parameter_count(name: str) -> float | None:
    """Parameters of a local model, or the size in a hub id such as Qwen3-VL-8B; none if the name holds no size."""
    if Path(name).exists():
        return count_parameters(name)
    size = re.search(r"(\d+(?:\.\d+)?)B(?![a-zA-Z])", name)
    return float(size.group(1)) * 1e9 if size else None
