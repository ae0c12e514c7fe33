"""Seconds from the command to the first useful moment: imports and `--help`, beside TRL's own, in turn.

    python -m benchmarks.startup [--repeats 7]

Each is a new process. Writes benchmarks/results/startup.json.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import tables
from benchmarks.machine import machine
from common.runs import atomic_write_json

TRL = [sys.executable, "-m", "trl.cli.main"]
PYTHON = [sys.executable, "-c"]
# name: (ours, TRL's)
PAIRS = {
    "import va_opd": ([*PYTHON, "import va_opd"], [*PYTHON, "import trl"]),
    "import srpo": ([*PYTHON, "import srpo"], [*PYTHON, "import trl"]),
    "import r_diverse": ([*PYTHON, "import r_diverse"], [*PYTHON, "import trl"]),
    "VAOPDTrainer": (
        [*PYTHON, "from va_opd import VAOPDTrainer"],
        [*PYTHON, "from trl import DistillationTrainer"],
    ),
    "SRPOTrainer": ([*PYTHON, "from srpo import SRPOTrainer"], [*PYTHON, "from trl import GRPOTrainer"]),
    "va_opd.train --help": ([sys.executable, "-m", "va_opd.train", "--help"], [*TRL, "distillation", "--help"]),
    "srpo.train --help": ([sys.executable, "-m", "srpo.train", "--help"], [*TRL, "grpo", "--help"]),
    "r_diverse.loop --help": ([sys.executable, "-m", "r_diverse.loop", "--help"], [*TRL, "grpo", "--help"]),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="after one that warms the file cache (7)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    args = parser.parse_args(argv)
    seconds: dict[str, dict[str, list[float]]] = {name: {"ours": [], "trl": []} for name in PAIRS}
    for repeat in range(args.repeats + 1):
        for name, commands in PAIRS.items():
            for side, command in zip(("ours", "trl"), commands, strict=True):
                taken = seconds_of(command)
                if repeat:
                    seconds[name][side].append(taken)
        print(f"repeat {repeat} of {args.repeats}", flush=True)
    atomic_write_json(args.out, {**machine("trl", "transformers"), "seconds": seconds})
    print(tables.of_file("startup", args.out))
    return 0


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
