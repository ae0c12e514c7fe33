"""An experiment as stages of commands: printed before they run, side by side on a CPU, stopped together."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

SIGN_OF_LIFE = 20  # seconds between two lines about commands that run side by side

Command = tuple[str, list[str]]  # a name for its log, and the words of it


def launcher(gpus: int, sharding: str) -> list[str]:
    """Start of a training command: plain Python, or accelerate with one of the configs that TRL ships."""
    if gpus <= 1:
        return [sys.executable, "-m"]
    config = files("trl") / "accelerate_configs" / f"{sharding}.yaml"
    if not config.is_file():
        names = sorted(path.name.removesuffix(".yaml") for path in (files("trl") / "accelerate_configs").iterdir())
        raise ValueError(f"sharding {sharding!r} is no accelerate config of TRL; choose among {', '.join(names)}")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(gpus), "-m"]


def run_experiment(name: str, stages: list[list[Command]], logs: Path) -> int:
    """Exit code of the first command that failed, 130 for Ctrl-C, else 0."""
    try:
        return run_stages(stages, logs)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_stages(stages: list[list[Command]], logs: Path) -> int:
    """Runs the stages; on a machine without GPU, two commands of a stage side by side, one core and log file each."""
    import torch

    width = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    for stage in stages:
        for start in range(0, len(stage), width):
            if code := run_together(stage[start : start + width], logs):
                return code
    return 0


def run_together(commands: list[Command], logs: Path) -> int:
    """Exit code of the first command that failed. A single command writes to the terminal, several to log files."""
    for command in commands:
        print(f"$ {shown(command)}", flush=True)
    if len(commands) == 1:
        return subprocess.run(commands[0][1]).returncode
    logs.mkdir(parents=True, exist_ok=True)
    # Two processes with two threads each would spin against each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = {}
    try:
        for name, words in commands:
            with (logs / f"{name}.log").open("w") as log:
                running[name] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        for name in _as_they_end(running, logs):
            if code := running[name].returncode:
                tail = (logs / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
                print(f"{name} failed with exit code {code}. The end of {logs / name}.log:", *tail, sep="\n")
                return code
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return 0


def _as_they_end(running: dict[str, subprocess.Popen], logs: Path) -> Iterator[str]:
    """Names of the commands as they end; in between, now and then, the last line of each log."""
    started = spoken = time.monotonic()
    waiting = dict(running)
    while waiting:
        time.sleep(0.2)
        for name in [name for name, process in waiting.items() if process.poll() is not None]:
            print(f"  {time.monotonic() - started:4.0f} s  {name}: ended", flush=True)
            del waiting[name]
            yield name
        if time.monotonic() - spoken > SIGN_OF_LIFE:
            spoken = time.monotonic()
            for name in waiting:
                lines = (logs / f"{name}.log").read_text(errors="replace").splitlines()
                print(f"  {spoken - started:4.0f} s  {name}: {lines[-1][:100] if lines else 'starting'}", flush=True)


def shown(command: Command) -> str:
    """A command as one would type it."""
    return " ".join("python" if word == sys.executable else word for word in command[1])
