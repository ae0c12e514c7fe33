"""What a self-teacher must know about a policy's adapters: whether they can be merged, and where they started."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

# Settings of a LoRA config with which the merged model is not just W + scale B A of whole layers
NOT_MERGED = (
    "use_dora",
    "trainable_token_indices",
    "lora_bias",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model's weights are in 4 or 8 bits, or of another kind that arithmetic cannot average."""
    return getattr(model, "is_quantized", False)


def check_mergeable(adapters: dict[str, Any]) -> None:
    """Raises `ValueError` for adapters (PEFT's configs by name) whose merged weight is not W + scale B A, the only
    form that `SelfTeacher.update` averages."""
    for config in adapters.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        wrong = [f"{name}={value!r}" for name in NOT_MERGED if (value := getattr(config, name, None))]
        if kind != "LORA" or wrong:
            raise ValueError(
                "teacher='ema' averages the merged weights of plain LoRA: leave "
                f"{', '.join(wrong) or f'peft_type={kind}'} out of peft_config, or set teacher='current' or 'frozen'"
            )


def loses_its_start(policy: nn.Module) -> bool:
    """Whether a trained policy without its adapters may differ from the policy at the start: the adapters were trained
    before, were made from its weights (PiSSA, OLoRA) or are of a kind unknown here, or biases are trained beside them,
    which stay."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if _trains_biases(policy):
        return True
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            factors = ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B))
            pairs = [(a[name], b[name]) for a, b in factors for name in module.active_adapters if name in a]
            if any(_has_values(a) and _has_values(b) for a, b in pairs):
                return True
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[module.active_adapter].parameters()
            pairs = zip(module.original_module.parameters(), saved, strict=True)
            if any(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs):  # not so of shards
                return True
        elif isinstance(module, BaseTunerLayer):
            return True
    return False


def _trains_biases(policy: nn.Module) -> bool:
    """Whether a LoRA config's `bias` trains biases that the model has (Qwen3 has none)."""
    if all(getattr(config, "bias", "none") == "none" for config in policy.peft_config.values()):
        return False
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    return any(name.endswith(".bias") and "lora_" not in name for name in trained)


def untie_adapted(policy: nn.Module) -> None:
    """Gives a head that is tied to an embedding with an adapter its own weight: the adapter changes only the
    embedding, but merging it would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding, head = policy.get_input_embeddings(), policy.get_output_embeddings()
    if isinstance(embedding, BaseTunerLayer) and head.weight is embedding.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _has_values(factor: nn.Module | nn.Parameter) -> bool:
    """Whether a factor, or its shard under ZeRO-3, has any value other than 0."""
    weights = [factor] if isinstance(factor, torch.Tensor) else factor.parameters()
    return any(getattr(weight, "ds_tensor", weight).any() for weight in weights)


def merged_weights(policy: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, weight) of the merged model's `names` that training can change; W + scale B A is float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = policy.get_base_model()
    for name in names:
        path, leaf = name.rpartition(".")[::2]
        module = base.get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), leaf).float()
            if leaf == "weight":
                weight = sum((module.get_delta_weight(a) for a in module.active_adapters), start=weight)
            yield name, weight
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield name, getattr(module.modules_to_save[module.active_adapter], leaf)
        elif (weight := getattr(module, leaf)).requires_grad:  # bias="all", or inside a module that is saved whole
            yield name, weight
