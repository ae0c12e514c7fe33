"""Weights of a checkpoint, read back under the names that the model gives them."""

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel


class LoadsWeights:
    """A trainer with this base, named before TRL's, resumes from all weights of a checkpoint, whatever their names.

    Checkpoints have the names of the model hub. `transformers.Trainer` does not translate them back when it resumes or
    loads the best model (transformers issue 43701): parts of Qwen2.5-VL, LLaVA, Gemma 3, InternVL and of models with
    experts would keep the weights of the start, with no more than a warning. Of several adapters it leaves out the
    one named "default": TRL adds "ref" to a `PeftModel` that is trained with `beta`.

    Where a checkpoint does not hold all that a run goes on from, resuming raises `ValueError`.
    """

    def _load_from_checkpoint(self: Any, resume_from_checkpoint, model=None):
        if not self._loads_its_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self: Any):
        self._last_loaded_step = -1  # else vLLM would go on with the weights of the last step
        if not self._loads_its_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self: Any, checkpoint):
        if checkpoint is not None and getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                "a run with sync_ref_model=True cannot be resumed: its KL reference has moved, and checkpoints do not "
                "hold it; begin a new run, or set sync_ref_model to false, which leaves the reference at the start"
            )
        for name in self._states_to_resume() if checkpoint is not None else ():
            if not any(Path(checkpoint).glob(name)):  # transformers would begin it anew without a word
                raise ValueError(
                    f"{checkpoint} holds no {name}, as with save_only_model=True, so that a run cannot go on from it: "
                    "put it back, resume from another checkpoint, or pass this one as the model of a new run"
                )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _loads_its_weights(self: Any, folder: str) -> bool:
        """Loads them. DeepSpeed and FSDP save and load by the model's own names: False, and nothing is loaded."""
        if self._is_sharded():
            return False
        if is_peft_model(self.model):
            load_adapters(self.model, folder)
        elif isinstance(self.model, PreTrainedModel):
            load_weights(self.model, folder)
        else:
            return False
        return True

    def _states_to_resume(self: Any) -> list[str]:
        """Files of a checkpoint beside the weights. DeepSpeed and FSDP keep the optimizer's state in folders."""
        scheduler = [] if self.is_deepspeed_enabled else ["scheduler.pt"]  # of DeepSpeed it may be in its folder
        return [*([] if self._is_sharded() else ["optimizer.pt"]), *scheduler, "rng_state*.pth"]

    def _is_sharded(self: Any) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Copies the weights of a saved model into `model`, on its device and in its dtypes.

    Raises `ValueError` for a folder that lacks some of them, `OSError` for one without any, and transformers'
    `RuntimeError` for other shapes.
    """
    dtype = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)  # rounds none of them
    loaded, found = type(model).from_pretrained(folder, config=model.config, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder} lacks weights of the model ({', '.join(missing[:5])}): it is of another model, or incomplete; "
            "resume from another checkpoint"
        )
    model.load_state_dict(loaded.state_dict())


def load_adapters(model: Any, folder: str) -> None:
    """Copies the weights of all adapters of a saved `PeftModel` into `model`. Raises `ValueError` for a folder that
    lacks one of them."""
    for name in model.peft_config:
        path = Path(folder) if name == "default" else Path(folder) / name
        if not any((path / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
            raise ValueError(
                f"{path} holds no adapter_model.safetensors of the adapter {name!r}: the checkpoint is of another "
                "model, or incomplete; resume from another one"
            )
        model.load_adapter(str(path), name, is_trainable=True)  # else it would end in evaluation mode
