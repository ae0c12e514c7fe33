"""The paper's experiment end to end: models or data at hand, base, baselines, method, evaluation, table and figures.

    python -m va_opd.loop --config va_opd/configs/tiny.yaml
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --variants opd,va_opd --gpus 8
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --dry_run         # prints the commands, runs nothing

Each stage is a command of its own that is printed before it runs, writes its output to a log beside the run folders,
and does nothing when its result is there already: started again after a kill, the experiment goes on. Other
`--field value` pairs are passed on to every stage.
"""

import argparse
import os
import subprocess
import sys
import time
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


def main(argv: list[str] | None = None) -> int:
    """Exit code of the first stage that failed, 2 for a mistake in the arguments, else 0."""
    parser = argparse.ArgumentParser(prog="va_opd.loop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--variants", default="opd,va_opd", help=f"comma list of {', '.join(VARIANT_FLAGS)}")
    parser.add_argument("--gpus", type=int, default=0, help="processes for training; 0 or 1 starts no launcher")
    parser.add_argument("--sharding", default="zero2", help="accelerate config of TRL used for several GPUs")
    parser.add_argument("--dry_run", action="store_true")
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    fields = ["--config", known.config, *rest]
    try:
        args, config = parse(fields)
        variants = [name for name in known.variants.split(",") if name]
        if unknown := set(variants) - set(VARIANT_FLAGS):
            raise ValueError(f"unknown variants {sorted(unknown)}; choose among {', '.join(VARIANT_FLAGS)}")
    except (ValueError, OSError) as error:
        print(f"va_opd.loop: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    stages = plan(fields, args, variants, launcher(known.gpus, known.sharding))
    if known.dry_run:
        os.environ["GPUS"] = str(max(1, known.gpus))
        print(dry_run(args, config), *(" ".join(command) for stage in stages for command in stage), sep="\n")
        return 0
    return run_stages(stages, Path(args.out) / "va_opd" / args.experiment / "logs")


def launcher(gpus: int, sharding: str) -> list[str]:
    """Start of a training command: plain Python, or accelerate with one of the configs that TRL ships."""
    if gpus <= 1:
        return [sys.executable, "-m"]
    config = files("trl") / "accelerate_configs" / f"{sharding}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(gpus), "-m"]


def plan(fields: list[str], args, variants: list[str], launch: list[str]) -> list[list[list[str]]]:
    """Stages in order; the commands of one stage do not depend on each other."""
    python = [sys.executable, "-m"]
    flags = [fields + VARIANT_FLAGS[name] for name in variants]
    report = [[*python, "benchmarks.va_opd", *fields]]
    stages = [
        [[*launch, "va_opd.train", *f] for f in flags],
        [[*python, "va_opd.evaluate", "base", *fields], *([*python, "va_opd.evaluate", "run", *f] for f in flags)],
        report,
    ]
    if args.dataset == "digits":
        tiny = [[*python, "va_opd.data", name, str(Path(path))] for name, path in (("teacher", args.teacher), ("base", args.model))]
        stages.insert(0, tiny)
        stages[2].append([*python, "va_opd.evaluate", "teacher", *fields])
    return stages


def run_stages(stages: list[list[list[str]]], logs: Path) -> int:
    """Runs the stages; commands of a stage side by side on a machine without GPU, one core each, else in turn."""
    import torch

    width = 1 if torch.cuda.is_available() else max(1, min(2, os.cpu_count() or 1))
    logs.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        for start in range(0, len(stage), width):
            code = _run_together(stage[start : start + width], logs, one_thread=width > 1)
            if code:
                return code
    return 0


def _run_together(commands: list[list[str]], logs: Path, one_thread: bool) -> int:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"  # two processes with two threads each would spin against each other
    started = time.monotonic()
    running = []
    for command in commands:
        name = "-".join([command[command.index("-m") + 1], *(a for a in command[-4:] if not a.startswith("-"))])
        log = logs / (name.replace("/", "_") + ".log")
        print("$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
        running.append((command, log, subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)))
    try:
        codes = [process.wait() for _, _, process in running]
    except BaseException:
        for _, _, process in running:
            process.terminate()
        raise
    for (_, log, _), code in zip(running, codes, strict=True):
        if code:
            print(f"failed with exit code {code}; the end of {log}:\n" + "".join(log.open().readlines()[-15:]), file=sys.stderr)
    print(f"  {time.monotonic() - started:.0f} s", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
