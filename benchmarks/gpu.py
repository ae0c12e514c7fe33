"""All measurements that want a GPU, at the published sizes with random weights, the most wanted first.

    python -m benchmarks.gpu --out DIR                       # one GPU with 141 GB, about 10 minutes
    python -m benchmarks.gpu --out DIR --total 570           # leaves out what does not fit any more
    python -m benchmarks.gpu --out DIR --only va_opd_loss srpo_loss

Each runs in a process of its own, forked after the imports, and is ended after --limit seconds; one that fails, even
in its imports, does not stop the next, and what it had measured by then stays. Writes DIR/<name>_gpu.json and
DIR/gpu.log; by default DIR is benchmarks/results.
"""

import argparse
import contextlib
import importlib
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() must not start CUDA before the fork

# Name of the result: module and arguments. What takes longest, the step of SRPO, is behind what else is wanted most
WORKS = {
    "va_opd_loss": "va_opd_loss --student 2048 --teacher 4096 --head_rows --most 60 --repeats 5",
    "srpo_loss": "srpo_loss --rows 1024 2048 4096 8192 --student 4096 --teacher 4096 --most 60 --repeats 3",
    "va_opd_scoring": "va_opd_scoring --real --repeats 3",
    "srpo_step": "srpo_step --real 4B --response 800 --repeats 1 --kinds srpo 'sdpo (trl)' grpo",
    "evaluation": "evaluation --real --prompts 32 --tokens 256 --repeats 1",
    "r_diverse_step": "r_diverse_step --real 4B --rollouts 32 --response 2048 --repeats 1",
    "srpo_step_8b": "srpo_step --real 8B --rollouts 16 --micro_batch 4 --response 200 --repeats 1"
    " --kinds srpo 'sdpo (trl)'",
}
LEAST = 40.0  # seconds, in which a work has made its models and measured something
CHECKPOINT = 17e9  # bytes of the largest model that a work saves: 8B in bfloat16


def work(name: str, out: Path, folder: str) -> None:
    """Runs one measurement; what it prints goes into the log, its temporary folders into `folder`."""
    tempfile.tempdir = folder
    with (out / "gpu.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        module, *arguments = shlex.split(WORKS[name])
        importlib.import_module(f"benchmarks.{module}").main([*arguments, "--out", str(out / f"{name}_gpu.json")])


def exit_code(name: str, out: Path, limit: float) -> int | None:
    """Runs a measurement and ends it after `limit` seconds. Its folder is made here, so that none is left behind."""
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        process = multiprocessing.get_context("fork").Process(target=work, args=(name, out, folder))
        process.start()
        try:
            process.join(limit)
        finally:
            process.kill()
            process.join()
    return process.exitcode


def fast_folder(memory: Path = Path("/dev/shm")) -> Path | None:
    """The folder in memory, if it has room for the largest checkpoint; else None, the usual one."""
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > CHECKPOINT else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one measurement")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds for all, imports included")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    log, began, codes = options.out / "gpu.log", time.monotonic(), []
    log.write_text("")
    for name in options.only:
        with contextlib.suppress(Exception):  # its own process says what is missing
            importlib.import_module(f"benchmarks.{WORKS[name].split()[0]}")
    print(f"imports: {time.monotonic() - began:.0f} s", flush=True)
    for name in options.only:
        started, before = time.monotonic(), log.stat().st_size
        left = options.total - (started - began)
        if left < LEAST:
            print(f"--- {name}: left out, {max(left, 0):.0f} of {options.total:g} s remain", flush=True)
            continue
        codes.append(exit_code(name, options.out, min(options.limit, left)))
        end = log.read_bytes()[before:].decode(errors="replace").splitlines()[-30:]
        print(f"--- {name}: {time.monotonic() - started:.0f} s, exit code {codes[-1]}", *end, sep="\n", flush=True)
    return int(any(codes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the work and its folder would outlive this process
    sys.exit(main())
