"""Weights of a checkpoint, read back under the names that the model gives them."""

from typing import Any

from transformers import PreTrainedModel


class LoadsWeights:
    """A trainer with this base, named before TRL's, resumes from all weights of a checkpoint, whatever their names.

    Checkpoints have the names of the model hub. `transformers.Trainer` does not translate them back when it resumes or
    loads the best model (transformers issue 43701): parts of Qwen2.5-VL, LLaVA, Gemma 3, InternVL and of models with
    experts would keep the weights of the start, with no more than a warning.
    """

    def _load_from_checkpoint(self: Any, resume_from_checkpoint, model=None):
        if self._has_whole_weights():
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self: Any):
        if self._has_whole_weights():
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _has_whole_weights(self: Any) -> bool:
        """Adapters, DeepSpeed and FSDP save and load by the model's own names."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return isinstance(self.model, PreTrainedModel) and not sharded


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
