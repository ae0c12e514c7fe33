"""On SIGTERM, by which a scheduler takes a machine back, and on SIGHUP of a lost terminal, training saves a checkpoint
and ends; the same command resumes it.

transformers' own `enable_jit_checkpoint` saves between the micro-batches of a step and on each rank by itself, and the
caller cannot tell a run that was stopped from one that is done.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .checkpoints import ExactCheckpoints

EXIT_CODE = 128 + signal.SIGTERM
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not loaded after a fork


class Preempted(KeyboardInterrupt):
    """The process was told to end by SIGTERM or SIGHUP. What is on disk is enough to go on."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Preempted` in the main thread, so that files and child processes are cleaned
    up."""
    owner = os.getpid()

    def stop(*_) -> None:
        if os.getpid() == owner:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell may send it too, in the middle of the clean-up
            raise Preempted("SIGTERM")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork, such as a worker, just ends
        os.kill(os.getpid(), signal.SIGTERM)

    with _handled(stop):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers only there
        yield
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def hung_up(*arguments) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in terminals:  # writing to one that is gone is an error
            with contextlib.suppress(OSError):
                os.write(descriptor, b"SIGHUP: no more is written here; the run ends as by SIGTERM\n")
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        handler(*arguments)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    # Under nohup SIGHUP is ignored; but a launcher passes it on, and kills whatever does not end
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    taken = [number for number, was in before.items() if launched or was is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, hung_up if number == signal.SIGHUP else handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def end_with_parent() -> None:
    """As `preexec_fn` of a child process: SIGTERM ends it when the thread that started it is gone, even by SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def call(words: Sequence[str], environment: dict[str, str]) -> int:
    """Runs a command, returns its exit code; if this process is interrupted or killed, the command is told to end."""
    process = subprocess.Popen(words, env=environment, preexec_fn=end_with_parent)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def train(trainer: Any, checkpoint: Path | None, keep_weights: bool = False) -> None:
    """`trainer.train` from the checkpoint. SIGTERM makes it save another one and raise `Preempted`.

    It does so after the first step from which the run can resume exactly: one with which a generation batch ends. With
    `keep_weights`, all older checkpoints keep their weights, but only the newest can be resumed from.
    """
    args = trainer.args
    micro_steps = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    steps = math.lcm(micro_steps, args.gradient_accumulation_steps) // args.gradient_accumulation_steps
    sigterm = SaveOnSigterm(steps)
    trainer.add_callback(sigterm)
    trainer.add_callback(ExactCheckpoints(trainer, checkpoint, keep_weights))  # last: it completes what others save
    with _handled(sigterm.ask):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if sigterm.any_asked(args.device):
        raise Preempted("SIGTERM")


class SaveOnSigterm(TrainerCallback):
    """After `ask` was called, ends training with a checkpoint and `Preempted`, at a multiple of `steps`.

    All processes stop at the same step, whichever of them was asked.
    """

    def __init__(self, steps: int):
        self.steps, self.asked, self.stopped = steps, False, False

    def ask(self, *_) -> None:
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        whole = state.global_step % self.steps == 0 and state.global_step < state.max_steps
        if whole and self.any_asked(args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            raise Preempted("SIGTERM")  # before transformers logs the end of a training that has not ended

    def any_asked(self, device: torch.device) -> bool:
        """Whether any process was asked; all processes have to call this."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.asked
        asked = torch.tensor(int(self.asked), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)
