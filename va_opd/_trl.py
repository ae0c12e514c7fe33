"""All that VA-OPD uses of TRL beyond its public API, behind one check of the version.

`tests/va_opd/test_trainer.py` pins the signatures of these names and of the trainer's private methods.
"""

# ruff: noqa: E402, F401 - other modules import these names from here, behind the check

import logging
from collections.abc import Callable, Iterator
from importlib.metadata import version

from accelerate.utils import is_peft_model
from packaging.specifiers import SpecifierSet
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.core_model_loading import WeightRenaming

logger = logging.getLogger(__name__)

SUPPORTED_TRL = ">=1.16,<1.17"
if version("trl") not in SpecifierSet(SUPPORTED_TRL):
    raise ImportError(f"va_opd overrides private methods of trl and needs trl{SUPPORTED_TRL}; found {version('trl')}")

from trl.kernels import chunked_divergence
from trl.kernels.chunked_divergence import _addmm_fp32 as addmm_fp32
from trl.kernels.chunked_divergence import _compute_dtype as compute_dtype
from trl.kernels.chunked_divergence import _project as project
from trl.trainer.utils import (
    RepeatSampler,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)

# What `DistillationTrainer._get_last_hidden_state` accepts beside ids and masks
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

from .turns import stop_at_the_end_of_a_turn


class EpochSampler(RepeatSampler):
    """TRL's sampler, with an order of each epoch that depends on seed and epoch only: a resumed run sees the prompts
    that the uninterrupted one would have seen.

    `epoch` gives the epoch when an iteration starts: accelerate's loaders announce it by `set_epoch`, but not to the
    sampler of a resumed run on several processes, whose loader skips batches behind one more wrapper.
    """

    def __init__(self, *arguments, epoch: Callable[[], int], **options):
        super().__init__(*arguments, **options)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch())
        return super().__iter__()


class AskedSampling(GenerationConfig):
    """Sampling settings that stay as they are in `generate`, which else fills those that are None with what the model
    declares, such as `min_p`, `num_beams` or `suppress_tokens`: neither the loss nor vLLM knows of these."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings) -> dict:
        if allow_custom_entries:  # so come the model's own
            return {}
        return super().update(defaults_only=defaults_only, **settings)


def prepare_rollouts(trainer: Trainer) -> None:
    """Lets a trainer's seed, settings and weights alone decide what its engine samples, up to the end of a turn."""
    seed_rollouts(trainer)
    stop_at_the_end_of_a_turn(trainer)
    send_names_of_files(trainer)
    reshard_before_syncs(trainer)
    if trainer.args.disable_dropout:
        disable_functional_dropout(trainer.model)
    if not trainer.use_vllm:
        trainer.generation_config = AskedSampling.from_dict(trainer.generation_config.to_dict())


def disable_functional_dropout(model: nn.Module) -> None:
    """Sets the dropout that modules keep as a number, such as `attention_dropout` of Llama, Qwen and Granite, to 0.
    TRL's `disable_dropout` reaches modules of the class `Dropout` only."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def seed_rollouts(trainer: Trainer) -> None:
    """Lets a trainer's seed decide what its colocated vLLM samples.

    The engine seeds this process by its rank alone when it starts, and draws the seeds of its requests from there.
    """
    args = trainer.args
    if trainer.use_vllm and args.vllm_mode == "colocate":
        group = trainer.accelerator.process_index // args.vllm_tensor_parallel_size
        set_seed(args.seed + group)  # the same where several processes are one engine


def send_names_of_files(trainer: Trainer) -> None:
    """Lets a trainer send its weights to vLLM by the names that they have in the model's files.

    vLLM knows those in every family, but not all that transformers gives them: in LLaVA and Gemma 3 the vision tower
    has another, at which the first weight sync would end the training. Where files hold a weight in parts (the experts
    of a layer), it is sent as it is, which vLLM takes too.
    """
    if not trainer.use_vllm:
        return
    conversions = getattr(trainer.model, "_weight_conversions", None) or []  # a model made from a config has none
    renamings = [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightRenaming)]
    generation = trainer.vllm_generation
    own_name = generation._fix_param_name_to_vllm  # what TRL and common.lora pass each name through

    def name_of_file(name: str, extra_prefixes: list[str] | None = None) -> str:
        name = own_name(name, extra_prefixes)
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    generation._fix_param_name_to_vllm = name_of_file


def reshard_before_syncs(trainer: Trainer) -> None:
    """Under FSDP2, lets a trainer send its weights to vLLM after an evaluation too.

    A forward without a backward leaves some weights whole, at which TRL's sync would end the training. It comes then
    with the next rollouts where the engine sleeps. They are cut before adapters are merged: a merge into whole weights
    would be lost with these, and taking it out again would change the shards.
    """
    if not trainer.use_vllm:
        return
    generation = trainer.vllm_generation
    sync = generation.sync_weights

    def of_shards() -> None:
        for module in generation.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        sync()

    generation.sync_weights = of_shards


def reach_adapters_of_vision(trainer: Trainer) -> None:
    """Lets gradients reach adapters in the blocks of a vision tower, also by reentrant checkpoints, which TRL sets for
    LoRA under ZeRO-3. These give none where no input has one, and transformers does not know the inputs of Qwen3-VL's
    tower (`enable_input_require_grads`): its adapters would stay at their start, with no more than a warning."""
    args = trainer.args
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if not (reentrant and is_peft_model(trainer.model)):
        return
    for tower in trainer.model.modules():
        patches = getattr(tower, "patch_embed", None)
        if isinstance(tower, PreTrainedModel) and isinstance(patches, nn.Module):
            patches.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


class WholeBatches(TrainerCallback):
    """Starts each call of `train` with new rollouts. After a call that was interrupted within a step, TRL would go on
    in the middle of that step's rollouts, while the optimizer starts a new step."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step, self.trainer._buffered_inputs = 0, None
        self.trainer._last_loaded_step = -1  # of another call: vLLM would go on with the weights that it left


class AdapterSync(TrainerCallback):
    """Warns at the start of training where frozen weights in half precision will drift: TRL adds an adapter to them,
    sends them to vLLM and takes it out again, and each time both round. Not earlier: once a trainer is built, its way
    may still be replaced (`common.lora.with_adapters`)."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        generation = getattr(self.trainer, "vllm_generation", None)  # of a trainer with `use_vllm`
        if not is_peft_model(self.trainer.model) or generation is None or "_iter_named_params" in vars(generation):
            return
        frozen = [p.dtype for p in self.trainer.model.parameters() if not p.requires_grad]
        if any(dtype.itemsize < 4 for dtype in frozen) and state.is_world_process_zero:
            logger.warning(
                "with LoRA and use_vllm, TRL rounds the frozen weights at each sync (in a hundred by a third of what "
                "the adapter changes): build the trainer with `with_adapters` of common/lora.py, or load the "
                'model with dtype="float32"'
            )
