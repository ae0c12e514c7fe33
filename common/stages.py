"""An experiment as stages of commands: printed before they run, side by side on a CPU, stopped together."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.integrations import get_available_reporting_integrations

from .models import is_path
from .preemption import EXIT_CODE, call, end_with_parent
from .runs import check_writable, exclusive, fingerprint

SIGN_OF_LIFE = 20  # seconds between two lines about commands that run side by side
MISTAKE = 2  # exit code of a command that says in a sentence what the user has to mend
# Exit codes of commands that were told to end, by Ctrl-C or SIGTERM: no failure after which the others go on
STOPPED = {130, EXIT_CODE, -signal.SIGINT, -signal.SIGTERM}

Command = tuple[str, list[str]]  # a name for its log, and its words


class OneGPUEach(list):
    """A stage of commands that use one GPU each: on several they run side by side."""


class Trainings(list):
    """A stage of trainings that share model, data and most settings: where the first has exit code 2, for what the
    user has to mend, the others would say the same, and the experiment ends."""


class RunByRun(list):
    """A stage of runs, each a list of stages of its own, the first of which is the training: a run begins when the one
    before has ended or failed. The first training's exit code 2 ends the experiment, as in `Trainings`."""


def commands_of(stages: Iterable[list]) -> Iterator[Command]:
    """All commands of the stages, in their order."""
    for stage in stages:
        yield from commands_of(itertools.chain(*stage)) if isinstance(stage, RunByRun) else stage


def chosen(name: str, text: str, known: Collection[str] = ()) -> list[str]:
    """The entries of a comma-separated list; with `known` only those are valid, and "all" stands for all of them.

    Raises `ValueError` for an empty list, an unknown entry, and one that comes twice: two commands would write into
    one folder.
    """
    entries = list(known) if text == "all" and known else [entry for entry in text.split(",") if entry]
    if not entries:
        raise ValueError(f"{name} names nothing, got {text!r}")
    if unknown := [entry for entry in entries if known and entry not in known]:
        raise ValueError(f"unknown {name} {unknown}; choose among {', '.join(known)}, or all")
    if len(set(entries)) < len(entries):
        raise ValueError(f"{name} must differ, got {text}: two runs would write into one folder")
    return entries


def chosen_seeds(text: str) -> list[str]:
    """The seeds of a comma-separated list, as texts; `ValueError` for one that is no whole number or comes twice."""
    entries = chosen("seeds", text)
    if wrong := [entry for entry in entries if not entry.isdecimal()]:
        raise ValueError(f"seeds must be whole numbers, got {', '.join(wrong)}")
    return chosen("seeds", ",".join(str(int(entry)) for entry in entries))  # 0 and 00 are one seed and one folder


def check_packages(vllm: bool, gpus: int, sharding: str, report_to: Collection[str] = ()) -> None:
    """Raises `ValueError` if packages that an experiment needs are missing (those of a GPU machine, and trackers), or
    if it needs more GPUs than there are."""
    needed = {"vllm": vllm, "deepspeed": gpus > 1 and sharding.startswith("zero")}
    missing = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    found = torch.cuda.device_count()
    if missing:
        raise ValueError(
            f"these settings need {' and '.join(missing)}, which this Python does not have: install the environment "
            'of a GPU machine ("On GPUs" in README.md), or try PRESET=tiny'
        )
    check_report_to(report_to)
    if 0 < found < gpus:
        raise ValueError(
            f"these settings want {gpus} GPUs and this process sees {found}: set gpus (GPUS= of make) to {found}, and "
            "raise gradient_accumulation_steps by as much, which keeps the batch"
        )


def check_modules(stages: list[list]) -> None:
    """Raises `ValueError` for a command `python -m MODULE` whose module is missing: that of the report, which comes
    last, would be noticed only after all trainings."""
    for _, words in commands_of(stages):
        for flag, module in itertools.pairwise(words):
            if flag == "-m" and not _is_module(module):
                raise ValueError(
                    f"{module} is not to be found from here: start this command in the project's folder, or copy "
                    f"{module.split('.')[0]}/ beside the other folders"
                )


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def check_path(field: str, path: str | None, or_hub_id: bool = False) -> None:
    """Raises `ValueError` for the path of data where there is nothing; with `or_hub_id` it may name a data set."""
    if path and not Path(path).expanduser().exists() and not (or_hub_id and not is_path(path)):
        known = "a hub id or one" if or_hub_id else "one"
        raise ValueError(f"{field} {path!r}: there is no such file or folder; set {field} to {known}, or leave it out")


def check_report_to(names: Collection[str]) -> None:
    """Raises `ValueError` for a tracker whose package is missing: transformers says so after all models are loaded."""
    # It never lists flyte, nor azure_ml beside mlflow, nor comet_ml without a key, although that can run offline
    known = {*get_available_reporting_integrations(), "azure_ml", "comet_ml", "flyte"}
    if missing := [str(name) for name in names if name not in known]:
        raise ValueError(
            f"report_to has {', '.join(missing)}, which this Python does not have: install it, or set report_to to "
            "none"
        )


def on_one_gpu(config: Any) -> Any:
    """The trainer's configuration, made to use only the first GPU without a launcher.

    Otherwise transformers wraps the model in `nn.DataParallel` over all GPUs, which TRL's trainers refuse and which
    multiplies the batch of its `SFTTrainer`; and TRL spreads a KL reference over them.
    """
    if config.n_gpu > 1:
        config._n_gpu = 1
        if hasattr(config, "model_init_kwargs"):
            config.model_init_kwargs = {**(config.model_init_kwargs or {}), "device_map": None}
    return config


def visible(gpus: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a child process for some of the GPUs that this one may use, counted from 0.

    Raises `ValueError` if it may not use so many.
    """
    wanted, allowed = list(gpus), os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return ",".join(map(str, wanted))
    names = [name for name in allowed.split(",") if name]
    if max(wanted) >= len(names):
        raise ValueError(
            f"GPU number {max(wanted)} is needed, but CUDA_VISIBLE_DEVICES={allowed!r} leaves {len(names)}: lower "
            "gpus, or let the process see more"
        )
    return ",".join(names[number] for number in wanted)


def launcher(gpus: int, sharding: str) -> list[str]:
    """Start of a training command: plain Python, or accelerate (`common.launch`) with one of the configs that TRL
    ships."""
    if gpus < 0:
        raise ValueError(f"gpus must be at least 0, got {gpus}")
    if gpus <= 1:
        return [sys.executable, "-m"]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup; torch's launcher would handle it all the same
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    config = files("trl") / "accelerate_configs" / f"{sharding}.yaml"
    if not config.is_file():
        names = sorted(path.name.removesuffix(".yaml") for path in (files("trl") / "accelerate_configs").iterdir())
        raise ValueError(f"sharding {sharding!r} is no accelerate config of TRL; choose among {', '.join(names)}")
    launch = [sys.executable, "-m", "common.launch", "--config_file", str(config)]
    if sharding.startswith("fsdp"):  # else every rank but the first starts with zeros for a teacher or reference
        launch += ["--fsdp_cpu_ram_efficient_loading", "false"]
    return [*launch, "--num_processes", str(gpus), "-m"]


def run_stages(stages: list[list], logs: Path, gpus: int = 1) -> int:
    """Runs the stages; returns the exit code of the first command that failed, else 0. Without a GPU two commands of a
    stage run at a time, each with one core and a log file; of a stage `OneGPUEach` one on each of the first `gpus`.

    When a command fails, for lack of memory say, the others go on, unless none of its stage has succeeded or it was
    told to end. In a stage `RunByRun` that ends a run, and the others go on, unless none gets through its stages.
    `Trainings` end with the mistake of the first.
    Raises `OSError` if no log can be written, and `ValueError` for a command whose module is missing, and if another
    process runs the same commands: each would go on past what the other is at work on, on the same GPUs.
    """
    check_modules(stages)
    check_writable(logs)
    with exclusive(logs, f".{fingerprint([name for name, _ in commands_of(stages)])[:12]}.lock"):
        return _run_stages(stages, logs, gpus)


def _run_stages(stages: list[list], logs: Path, gpus: int) -> int:
    failed, _ = _failures(stages, logs, gpus)
    if failed:
        said = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        print(f"failed: {said}; the same command tries them again", flush=True)
    return next(iter(failed.values()), 0)


def _failures(stages: list[list], logs: Path, gpus: int) -> tuple[dict[str, int], bool]:
    """Exit codes of the commands that failed, by name, and whether something of every stage succeeded."""
    failed: dict[str, int] = {}
    for stage in stages:
        if isinstance(stage, RunByRun):
            now, succeeded = _runs(stage, logs, gpus)
        else:
            codes = _stage(stage, logs, gpus)
            now, succeeded = {name: code for name, code in codes.items() if code}, 0 in codes.values()
        failed |= now
        if now and (not succeeded or STOPPED.intersection(now.values())):
            return failed, False
    return failed, True


def _runs(runs: RunByRun, logs: Path, gpus: int) -> tuple[dict[str, int], bool]:
    """The same, and whether one of the runs got through its stages."""
    failed, succeeded = dict[str, int](), False
    for number, stages in enumerate(runs):
        now, whole = _failures(stages, logs, gpus)
        failed, succeeded = failed | now, succeeded or whole
        training = now.get(stages[0][0][0], 0)
        if STOPPED.intersection(now.values()) or _is_shared(training, first=number == 0, others=len(runs) - 1):
            break
    return failed, succeeded


def _is_shared(code: int, first: bool, others: int) -> bool:
    """Whether a training's exit code is that of a mistake which the others share; says so."""
    shared = first and code == MISTAKE
    if shared and others:
        said = "share model, data and settings: none goes on"
        print(f"the other trainings of this experiment ({others}) {said}", flush=True)
    return shared


def _stage(stage: list[Command], logs: Path, gpus: int) -> dict[str, int]:
    """Exit codes of the commands that ended, by name."""
    cpu, gpus = not torch.cuda.is_available(), min(gpus, torch.cuda.device_count())
    # One thread each: two processes of two threads hinder each other, and sums would depend on the number of threads
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} if cpu else {})}
    each = not cpu and isinstance(stage, OneGPUEach)
    width = min(2, os.cpu_count() or 1) if cpu else gpus if each else 1
    side_by_side = min(width, len(stage)) > 1
    return _pool(stage, width, logs, environment, each) if side_by_side else _in_turn(stage, environment)


def _in_turn(commands: list[Command], environment: dict[str, str]) -> dict[str, int]:
    """One after the other, writing to the terminal."""
    codes = dict[str, int]()
    for name, words in commands:
        print(f"$ {shown((name, words))}", flush=True)
        codes[name] = call(words, environment)
        if _ends_all(commands, codes, name):
            break
    return codes


def _ends_all(commands: list[Command], codes: dict[str, int], name: str) -> bool:
    """Whether the command that has just ended is the last one."""
    shared = isinstance(commands, Trainings) and _is_shared(codes[name], name == commands[0][0], len(commands) - 1)
    return codes[name] in STOPPED or shared


class _Job(NamedTuple):
    """A command at work beside others."""

    name: str
    process: subprocess.Popen
    place: int  # its GPU, if each command has one of its own
    begun: int  # size of its log in bytes when it started


def _pool(
    commands: list[Command], width: int, logs: Path, environment: dict[str, str], one_gpu_each: bool = False
) -> dict[str, int]:
    """`width` at a time, each writing to its log, and each on a GPU of its own if asked for. After one that was told
    to end, or has a mistake of all, the others are stopped."""
    waiting, running, codes = list(commands), list[_Job](), dict[str, int]()
    started = spoken = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < width:
                place = min(set(range(width)) - {job.place for job in running})
                gpu = {"CUDA_VISIBLE_DEVICES": visible([place])} if one_gpu_each else {}
                running.append(_started(waiting.pop(0), place, logs, {**environment, **gpu}))
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                print(f"  {time.monotonic() - started:4.0f} s  {job.name}: ended", flush=True)
                if code := job.process.returncode:
                    said = f"{job.name} failed with exit code {code}. The end of {logs / job.name}.log:"
                    print(said, *_end(logs, job.name, job.begun, 15), sep="\n", flush=True)
                codes[job.name] = code
                if _ends_all(commands, codes, job.name):
                    return codes
            if time.monotonic() - spoken > SIGN_OF_LIFE:
                spoken = time.monotonic()
                for job in running:
                    line = (_end(logs, job.name, job.begun, 1) or ["starting"])[0]
                    print(f"  {spoken - started:4.0f} s  {job.name}: {_cut(line)}", flush=True)
    finally:
        for job in running:  # all before any is waited for: a scheduler kills what is slow to save
            job.process.terminate()
        for job in running:
            job.process.wait()
    return codes


def _started(command: Command, place: int, logs: Path, environment: dict[str, str]) -> _Job:
    name, words = command
    print(f"$ {shown(command)}", flush=True)
    # Appended: if another command is at work on the run, this one is refused, and that one's log stays
    with (logs / f"{name}.log").open("a") as log:
        begun = log.tell()
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent
        )
    return _Job(name, process, place, begun)


def _end(logs: Path, name: str, begun: int, lines: int) -> list[str]:
    """Last lines of a log that have text, from its byte `begun` on: what is before belongs to an earlier start."""
    text = (logs / f"{name}.log").read_bytes()[begun:].decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-lines:]  # tqdm erases a bar with a line of blanks


def _cut(line: str, width: int = 100) -> str:
    """A line cut to `width` between words, since a part of a number reads as another number."""
    line = line.strip()
    return line if len(line) <= width else line[: width + 1].rsplit(maxsplit=1)[0] + " ..."


def shown(command: Command) -> str:
    """A command as one would type it."""
    return shlex.join("python" if word == sys.executable else word for word in command[1])
