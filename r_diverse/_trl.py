"""All that R-Diverse uses of TRL beyond its public API, behind one check of the version.

`tests/r_diverse/test_trainer.py` pins the signatures.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from transformers import Trainer, TrainerCallback, set_seed

SUPPORTED_TRL = ">=1.16,<1.17"
if version("trl") not in SpecifierSet(SUPPORTED_TRL):
    raise ImportError(
        f"r_diverse overrides private methods of trl and needs trl{SUPPORTED_TRL}; found {version('trl')}"
    )

from trl.trainer.utils import RepeatSampler, is_async_callable, split_tensor_dict  # noqa: E402

__all__ = ["SUPPORTED_TRL", "EpochSampler", "WholeBatches", "is_async_callable", "seed_rollouts", "split_tensor_dict"]


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


def seed_rollouts(trainer: Trainer) -> None:
    """Lets a trainer's seed decide what its colocated vLLM samples.

    The engine seeds this process by its rank alone when it starts, and draws the seeds of its requests from there.
    """
    args = trainer.args
    if trainer.use_vllm and args.vllm_mode == "colocate":
        group = trainer.accelerator.process_index // args.vllm_tensor_parallel_size
        set_seed(args.seed + group)  # the same where several processes are one engine


class WholeBatches(TrainerCallback):
    """Starts each call of `train` with new rollouts. After a call that was interrupted within a step, TRL would go on
    in the middle of that step's rollouts, while the optimizer starts a new step."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step, self.trainer._buffered_inputs = 0, None
