"""One training in a run folder: begun or resumed, its logs recorded, ended; the same for each method."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from . import plan, preemption, versions
from .checkpoints import resume_point
from .runs import (
    RunFolder,
    append_jsonl,
    check_writable,
    exclusive,
    fingerprint,
    image_digest,
    is_done,
    truncate_jsonl,
)
from .stages import check_report_to
from .tables import image_files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


SECONDS = "train_seconds.json"  # in a checkpoint


@dataclass(kw_only=True)
class RunArguments:
    """What to train on what, as far as VA-OPD and SRPO have it in common; each adds its own."""

    model: str = field(metadata={"help": "Student (VA-OPD) or policy (SRPO): hub id or local folder."})
    data: str | None = field(default=None, metadata={"help": "Hub id or local folder to read the data set from."})
    out: str = field(default="runs", metadata={"help": "Folder of all runs."})
    limit: int | None = field(default=None, metadata={"help": "Use only so many training prompts."})
    lora_rank: int = field(default=0, metadata={"help": "Train a LoRA adapter of this rank; 0 trains all weights."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in 4 bits; with lora_rank."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of all models, such as flash_attention_2."}
    )
    eval_limit: int | None = field(default=None, metadata={"help": "Use only so many questions of each benchmark."})
    eval_batch_size: int = field(default=16, metadata={"help": "Prompts at once in evaluation with transformers."})
    engine: str = field(
        default="transformers", metadata={"help": "What generates in evaluation.", "choices": ["transformers", "vllm"]}
    )
    engine_options: str = field(
        default="{}", metadata={"help": 'JSON for engine vllm: options of `vllm.LLM`, as {"tensor_parallel_size": 2}.'}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print settings and a memory estimate; train nothing."})


class RunLog(TrainerCallback):
    """Writes metrics.jsonl and a short line at each log, rollouts to samples.jsonl, and the seconds of training so
    far (`train_seconds`) to each line and checkpoint.

    Seconds are those of optimizer steps alone, rollouts included: the papers' hours leave out start and evaluation,
    and a checkpoint of one method may hold more than another's. A resumed run counts on from its checkpoint, so work
    that a kill has lost counts once. A method says in a subclass which metrics the line has (`SHOWN`) and what its
    rollouts are.

    Args:
        folder: of the run; lines after the checkpoint are dropped from its files, since they will come again.
        checkpoint: what the training resumes from, None for its beginning.
        trainer: a TRL trainer.
    """

    SHOWN: tuple[str, ...] = ()
    unit = "step"  # what the line begins with

    def __init__(self, folder: Path, checkpoint: Path | None, trainer: "Trainer"):
        self.folder, self.trainer = folder, trainer
        self.seconds, self.started = train_seconds(checkpoint) if checkpoint else 0.0, 0.0
        step = step_of(checkpoint)
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate_jsonl(folder / name, step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        line = {"step": state.global_step, "train_seconds": self.seconds, **logs}
        append_jsonl(self.folder / "metrics.jsonl", line)
        shown = [f"{name} {logs[name]:.4g}" for name in self.SHOWN if isinstance(logs.get(name), float)]
        if shown:
            print(f"{self.unit} {state.global_step}/{state.max_steps}  " + "  ".join(shown), flush=True)
        rollouts = self.rollouts() if "loss" in logs else []  # the last line, of the whole training, has none
        append_jsonl(self.folder / "samples.jsonl", *({"step": state.global_step, **record} for record in rollouts))

    def on_save(self, args, state, control, **kwargs):
        newest = self.folder / f"checkpoint-{state.global_step}"
        (newest / SECONDS).write_text(json.dumps(self.seconds))

    def rollouts(self) -> list[dict[str, Any]]:
        """Records of some rollouts of the step that is logged."""
        return []


def train_seconds(checkpoint: Path) -> float:
    """Seconds of training before a checkpoint."""
    return json.loads((checkpoint / SECONDS).read_text())


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps before a `checkpoint-<step>`."""
    return int(checkpoint.name.split("-")[-1]) if checkpoint else 0


def train_run(
    command: str,
    run: Path,
    config: Any,
    open_run: Callable[[], RunFolder],
    build_trainer: Callable[[], "Trainer"],
    log: Callable[[Path, Path | None, "Trainer"], RunLog],
    rollouts: bool = True,
) -> None:
    """Trains into a run folder, from its last checkpoint if there is one; does nothing if the run is done.

    All checkpoints keep their weights, which are evaluated.

    Args:
        command: such as "va_opd.train".
        run: the folder.
        config: a TRL configuration.
        open_run: opens the folder and refuses one with other settings; the first process alone calls it.
        build_trainer: the trainer with model and rows in place.
        log: makes what records the training, from folder, checkpoint and trainer.
        rollouts: whether it trains on its own rollouts, not on given responses.
    """
    main_process, done = PartialState().is_main_process, is_done(run)
    PartialState().wait_for_everyone()  # every rank has looked before the first one touches the folder
    if done:
        if main_process:
            open_run()
            print(f"{run}: done already")
        return
    if main_process:
        versions.announce(command)
        print(plan.update_line(config, PartialState().num_processes, rollouts), flush=True)
        check_writable(next(folder for folder in (run, *run.parents) if folder.exists()))
    check_report_to(config.report_to)
    trainer = build_trainer()  # most mistakes show here, before there is a folder
    logging.disable_progress_bar()  # those for saving weights in each checkpoint, not one for a download
    with exclusive(run) if main_process else nullcontext():
        checkpoint = resume_point(trainer)  # every rank looks for itself on the shared folder
        with open_run() if main_process else nullcontext() as folder:
            if folder is not None:
                where = f"resuming at step {step_of(checkpoint)}" if checkpoint else "starting"
                print(f"{run}: {where}", flush=True)
                trainer.add_callback(log(run, checkpoint, trainer))
            trainer.remove_callback(PrinterCallback)
            preemption.train(trainer, checkpoint, keep_weights=True)
            trainer.save_model(str(run / "model"))
            if folder is not None:
                folder.finish()


def row_fingerprints(splits: Mapping[str, "Dataset"], others: Collection[str] = ()) -> dict[str, str]:
    """A fingerprint of each split's ids, prompts, answers and files of images, and of those of its columns that are in
    `others`."""
    found = {}
    for name, rows in splits.items():
        columns = ["id", "prompt", "answer", *(column for column in others if column in rows.column_names)]
        files = [[]] * len(rows) if "images" in columns else image_files(rows)  # text's may be of any kind
        pairs = zip(rows.select_columns(columns), files, strict=True)
        found[name] = fingerprint([[*(row[c] for c in columns), *map(image_digest, images)] for row, images in pairs])
    return found
