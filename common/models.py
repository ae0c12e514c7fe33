"""Models and processors from a hub id or a local folder, with one clear sentence when they cannot be loaded."""

import importlib.util
import json
import re
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

from common.lora import adapter_base, differentiable_after_evaluation, nf4_config

TOKENIZER_FILES = ("*token*", "vocab*", "tekken*", "*.model")


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
    """The config of a hub id or local folder, for an adapter that of its base; raises `ValueError` without one."""
    name = adapter_base(name) or name
    if Path(name).is_file():
        raise ValueError(f"model {name!r} is a file: pass the folder that it is in")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            problem = "the folder holds no model that transformers knows (no usable config.json)"
        elif is_path(name):
            problem = "there is no such folder" + (" (write ~ as a whole path)" if name.startswith("~") else "")
        else:
            problem = "it is no local folder, and the hub cannot be reached or has no model of this name"
        raise ValueError(f"model {name!r}: {problem}; pass a hub id or a folder made by save_pretrained") from error


def is_path(name: str) -> bool:
    """Whether a name of a model or data set has the form of a path, and not that of a hub id."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def check_at_hand(ask_hub: bool, **names: str) -> None:
    """Raises `ValueError` that names the field, for a model that is no folder where its name is a path or, with
    `ask_hub`, is nowhere: each run of an experiment would say so, and a dry run would not."""
    for field, name in names.items():
        if ask_hub or (is_path(name) and not Path(name).exists()):
            try:
                load_config(name)
            except ValueError as error:
                raise ValueError(f"{field}{str(error).removeprefix('model')}") from error


def is_vlm(config: PretrainedConfig) -> bool:
    """Whether the model reads images."""
    return getattr(config, "vision_config", None) is not None


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    merge: bool = True,
) -> PreTrainedModel | PeftModel:
    """A causal or image-text model in `dtype`, on `device` (None: on the CPU, for a trainer to place).

    From a folder with a LoRA adapter: its base, with the adapter merged in or, if not `merge`, attached to it.
    """
    if base := adapter_base(name):
        if load_in_4bit:
            raise ValueError(
                f"model {name!r} holds a LoRA adapter, which cannot be merged into weights in 4 bits: save the merged "
                "model first (load_model(...).save_pretrained(...)), or set load_in_4bit to false"
            )
        model = load_model(base, dtype, device, attn_implementation)
        try:
            adapted = PeftModel.from_pretrained(model, name)
            return adapted.merge_and_unload() if merge else adapted
        except SafetensorError as error:
            raise _cut(name, error) from error
    config = load_config(name)
    auto = AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM
    # Not None in place of it: transformers would take that for the model's own, and read weights in FP8 without scales
    quantization = {"quantization_config": nf4_config()} if load_in_4bit else {}
    try:
        model = auto.from_pretrained(name, dtype=dtype, attn_implementation=attn_implementation, **quantization)
    except OSError as error:
        raise ValueError(f"model {name!r}: {str(error).splitlines()[0]}") from error
    except SafetensorError as error:
        raise _cut(name, error) from error
    if load_in_4bit:
        differentiable_after_evaluation(model)
    return model if device is None else model.to(device)


def _cut(name: str, error: SafetensorError) -> ValueError:
    """The error for a weights file that was cut off: safetensors' own names neither the file nor the model."""
    return ValueError(f"model {name!r}: its weights are not whole ({error}); copy or download it again")


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    except Exception as error:  # for a cut file tokenizers raises a plain one, without its name
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {name!r}: its tokenizer cannot be loaded ({cause}); copy or download it again"
        ) from error


def load_processor(name: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of a vision-language model, or the tokenizer of a text model; it pads on the left, as generation
    does.

    Without torchvision, `AutoProcessor` fails for families with a video processor, or quietly returns the tokenizer,
    and training would then never see an image. So those families are put together here, without video. A folder saved
    that way is loaded the same way everywhere, since it has no video processor for `AutoProcessor` to find.
    """
    config = load_config(name)
    files = (file for pattern in TOKENIZER_FILES for file in Path(name).glob(pattern))
    if Path(name).is_dir() and not any(files):  # else AutoTokenizer makes one without tokens
        raise ValueError(
            f"model {name!r}: the folder holds no tokenizer; save that of its base model into it, as in "
            "AutoProcessor.from_pretrained(BASE).save_pretrained(FOLDER)"
        )
    if not is_vlm(config):
        return _tokenizer(name)
    without_video = importlib.util.find_spec("torchvision") is None or _saved_without_video(name)
    if config.model_type in IMAGE_ONLY and without_video:
        tokenizer, processor_class = _tokenizer(name), IMAGE_ONLY[config.model_type]
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        # Older folders have it in chat_template.json, which a tokenizer does not read and AutoProcessor prefers
        template = processor_class.get_processor_dict(name)[0].get("chat_template", tokenizer.chat_template)
        return processor_class(image_processor, tokenizer, chat_template=template)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the processor of {name!r} ({config.model_type}) cannot be loaded: {str(error).strip().splitlines()[0]}; "
            "this family may need torchvision (the build that matches torch)"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
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


def empty_model(name: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model by its config alone, on the meta device: no weight is loaded."""
    config = load_config(name)
    auto = AutoModelForImageTextToText if is_vlm(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation=attn_implementation)


def guess_parameters(name: str) -> float | None:
    """Parameters of a local model, or the size in a hub id such as Qwen3-VL-8B; None if the id holds no size."""
    if Path(name).exists():
        return empty_model(name).num_parameters()
    size = re.search(r"(\d+(?:\.\d+)?)B(?![a-zA-Z])", name)
    return float(size.group(1)) * 1e9 if size else None
