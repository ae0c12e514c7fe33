"""The paper's experiment end to end: models or data at hand, base, baselines, method, evaluation, table and figures.

    python -m va_opd.loop --config va_opd/configs/tiny.yaml
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --variants opd,va_opd --gpus 8
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --dry_run      # settings, memory, commands; runs nothing

Each step is a command of its own that is printed before it runs and does nothing when its result is there already:
started again after a kill, the experiment goes on. Other `--field value` pairs are passed on to every command.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from .train import dry_run, parse

# The variants of Table 1 and Fig. 4a as flags of va_opd.train
VARIANT_FLAGS = {
    "va_opd": ["--method", "va_opd"],
    "opd": ["--method", "opd"],
    "rollout_only": ["--method", "va_opd", "--weighting", "rollout"],
    "token_only": ["--method", "va_opd", "--weighting", "token"],
    "sft": ["--method", "sft"],
    "kd": ["--method", "kd"],
    "grpo": ["--method", "grpo"],
}
SIGN_OF_LIFE = 20  # seconds between two lines about commands that run side by side

Command = tuple[str, list[str]]  # a name for its log, and the words of it


def main(argv: list[str] | None = None) -> int:
    """Exit code of the first command that failed, 2 for a mistake in the arguments, 130 for Ctrl-C, else 0."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="va_opd.loop", description=__doc__, formatter_class=formatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--variants", default="opd,va_opd", help=f"comma list of {', '.join(VARIANT_FLAGS)}")
    parser.add_argument("--gpus", type=int, default=1, help="processes for training; 1 starts no launcher")
    parser.add_argument("--sharding", default="zero2", help="accelerate config of TRL used for several GPUs")
    parser.add_argument("--dry_run", action="store_true")
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    fields = ["--config", known.config, *rest]
    try:
        args, config = parse([*fields, "--dry_run"] if known.dry_run else fields)
        variants = [name for name in known.variants.split(",") if name]
        if unknown := set(variants) - set(VARIANT_FLAGS):
            raise ValueError(f"unknown variants {sorted(unknown)}; choose among {', '.join(VARIANT_FLAGS)}")
        stages = plan(fields, args, variants, launcher(known.gpus, known.sharding))
    except (ValueError, OSError) as error:
        print(f"va_opd.loop: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if known.dry_run:
        print(
            dry_run(args, config, max(1, known.gpus)), *(f"$ {shown(c)}" for stage in stages for c in stage), sep="\n"
        )
        return 0
    try:
        return run_stages(stages, Path(args.out) / "va_opd" / args.experiment / "logs")
    except KeyboardInterrupt:
        print("\nva_opd.loop: stopped; the same command goes on from here", file=sys.stderr)
        return 130


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


def plan(fields: list[str], args, variants: list[str], launch: list[str]) -> list[list[Command]]:
    """Stages in order; the commands of one stage do not need each other."""
    python = [sys.executable, "-m"]
    flags = {name: fields + VARIANT_FLAGS[name] for name in variants}
    evaluations = [(f"evaluate-{name}", [*python, "va_opd.evaluate", "run", *f]) for name, f in flags.items()]
    evaluations.append(("evaluate-base", [*python, "va_opd.evaluate", "base", *fields]))
    stages = [
        [(f"train-{name}", [*launch, "va_opd.train", *f]) for name, f in flags.items()],
        evaluations,
        [("report", [*python, "benchmarks.va_opd", *fields])],
    ]
    if args.dataset == "digits":
        readers = {"teacher": args.teacher, "base": args.model}
        stages.insert(0, [(f"make-{name}", [*python, "va_opd.data", name, path]) for name, path in readers.items()])
        evaluations.append(("evaluate-teacher", [*python, "va_opd.evaluate", "teacher", *fields]))
    return stages


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


if __name__ == "__main__":
    sys.exit(main())
