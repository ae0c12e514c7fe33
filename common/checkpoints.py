"""Checkpoints that a run resumes from exactly, or that are known to be useless.

By itself transformers writes the files of a checkpoint one after another, deletes older checkpoints before callbacks
have written into the new one, does not notice missing or cut files, forgets at each start what it has summed since the
last log line, and trains one step too many when it resumes at the last one.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .runs import (
    COMPLETE,
    UNFINISHED,
    WEIGHTS,
    atomic_write_json,
    begin_checkpoint,
    checkpoint_fault,
    checkpoints,
    complete_checkpoint,
    last_checkpoint,
)

ONLY_TO_RESUME = ("optimizer*", "self_teacher*", "global_step*", "pytorch_model_fsdp*")
LOG_SUMS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def resume_point(trainer: Any) -> Path | None:
    """The newest whole checkpoint of a trainer's run, None if there is nothing to resume from.

    If a newer one is not whole, stderr says so. Raises `ValueError` if checkpoints are damaged and none is whole,
    and `ValueError` if the checkpoint is of another number of processes, or of DeepSpeed and this launch is not (or
    the reverse), and if new checkpoints would have no weights.
    """
    check_saves_weights(trainer)
    args = trainer.args
    found, checkpoint = checkpoints(args.output_dir), last_checkpoint(args.output_dir)
    faults = {}
    for folder in reversed(found.values()):
        if folder == checkpoint:
            break
        faults[folder] = checkpoint_fault(folder)
    damaged = [f"{folder}: {fault}" for folder, fault in faults.items() if fault != UNFINISHED]
    if damaged and checkpoint is None:
        raise ValueError(
            f"{damaged[0]}, and no older checkpoint can be resumed from: restore its files, or delete all checkpoint "
            "folders beside it, then the same command starts from the beginning"
        )
    if faults and args.process_index == 0:
        newest, fault = next(iter(faults.items()))
        instead = f"going on from {checkpoint.name}" if checkpoint else "starting from the beginning"
        print(f"{newest}: {fault}; {instead}", file=sys.stderr)
    if checkpoint:
        _check_processes(checkpoint, trainer)
    return checkpoint


def check_saves_weights(trainer: Any) -> None:
    """Raises `ValueError` for accelerate configs with which checkpoints hold only shards, from which no model can be
    loaded."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type is {state.fsdp_plugin.state_dict_type}, with which checkpoints have no weights "
            "that can be evaluated: set it to FULL_STATE_DICT in the accelerate config, as in TRL's fsdp2.yaml"
        )
    plugin = getattr(state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise ValueError(
            "zero3_save_16bit_model is off, so that checkpoints have no weights that can be evaluated: set it to true "
            "in the accelerate config, as in TRL's zero3.yaml"
        )


def _check_processes(checkpoint: Path, trainer: Any) -> None:
    """Raises `ValueError` for another kind of launch: micro-batches keep their size, so batches would change."""
    before, now = len(list(checkpoint.glob("rng_state*.pth"))), trainer.args.world_size
    cut = any(checkpoint.glob("global_step*"))  # DeepSpeed's states
    if cut != trainer.is_deepspeed_enabled or before != now:
        raise ValueError(
            f"{checkpoint} was saved by {before} processes with{'' if cut else 'out'} DeepSpeed and the run cannot go "
            f"on with {now} with{'' if trainer.is_deepspeed_enabled else 'out'} it: launch as before, or choose "
            "another out="
        )


def thin_out(checkpoint: Path, weights: bool) -> None:
    """Deletes from a checkpoint of a finished run what only resuming needs, and with `weights` its weights too.

    The other small files stay. A second call ends what a kill has cut short; until then the rest of the weights does
    not count as weights. A checkpoint that is a link, or holds one in their place, is left as it is.
    """
    paths = _matching(checkpoint, (*ONLY_TO_RESUME, *([WEIGHTS] if weights else [])))
    if checkpoint.is_symlink() or any(path.is_symlink() for path in paths):
        print(f"{checkpoint} is a link or holds one: nothing in it is deleted", file=sys.stderr)
        return
    if weights and paths:
        atomic_write_json(checkpoint / COMPLETE, False)
    _delete(paths)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class ExactCheckpoints(TrainerCallback):
    """Marks whole checkpoints, deletes older ones only then, saves in them the sums for the next log line, and stops a
    run that has done all its steps.

    Args:
        trainer: a TRL trainer.
        checkpoint: what it resumes from.
        keep_weights: whether older checkpoints are kept for evaluation without what only resuming needs.
    """

    def __init__(self, trainer: Any, checkpoint: Path | None, keep_weights: bool):
        self.trainer, self.checkpoint, self.keep_weights = trainer, checkpoint, keep_weights
        self.limit: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.limit, args.save_total_limit = args.save_total_limit, None  # else the only whole one is deleted too early
        if self.checkpoint:
            self._restore_sums(_sums_file(self.checkpoint, args))
        if state.global_step >= state.max_steps:
            control.should_training_stop, control.should_save = True, False
            self.trainer.get_batch_samples = lambda *_: ([], None)  # the loop checks `control` only after a batch
            self.trainer.model.train()  # else TRL's last log line would be one of an evaluation
            if args.process_index == 0:
                self._tidy(args, state)  # a kill may have come before it

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self.limit

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            if args.process_index == 0:
                begin_checkpoint(_folder(args, state))
            self.trainer.accelerator.wait_for_everyone()

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        torch.save(self._sums(), _sums_file(_folder(args, state), args))
        self.trainer.accelerator.wait_for_everyone()
        if args.process_index == 0:
            complete_checkpoint(_folder(args, state))
            self._tidy(args, state)

    def _sums(self) -> dict[str, Any]:
        trainer = self.trainer
        sums = {name: getattr(trainer, name) for name in LOG_SUMS}
        metrics = {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()}
        return {**sums, "_tr_loss": trainer._tr_loss, "_metrics": metrics}

    def _restore_sums(self, path: Path) -> None:
        if not path.exists():  # the checkpoint is of other code or of fewer processes
            return
        sums = torch.load(path, map_location="cpu", weights_only=True)
        for name in LOG_SUMS:
            setattr(self.trainer, name, sums[name])
        self.trainer._tr_loss.copy_(sums["_tr_loss"])
        self.trainer._metrics["train"].update(sums["_metrics"])
        self.trainer._initial_global_step = 0  # transformers 5.23 takes `train_loss` over the steps since this one

    def _tidy(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.limit and self.limit > 0:
            self._rotate(args, state)
        for step, folder in checkpoints(args.output_dir).items():
            if step >= state.global_step:
                continue
            if args.save_strategy == "steps" and (not state.save_steps or step % state.save_steps):
                shutil.rmtree(folder)  # SIGTERM's: it would be evaluated among the scheduled ones
            elif self.keep_weights:
                _delete(_matching(folder, ONLY_TO_RESUME))

    def _rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        """Keeps the newest `limit` and the best. Checkpoints beyond this step are not whole: else the run would have
        resumed from them."""
        found = checkpoints(args.output_dir)
        kept = [folder for step, folder in found.items() if step <= state.global_step][-self.limit :]
        for folder in set(found.values()) - {*kept, Path(state.best_model_checkpoint or "")}:
            shutil.rmtree(folder)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _sums_file(checkpoint: Path, args: TrainingArguments) -> Path:
    return checkpoint / f"log_sums_{args.process_index}.pt"
