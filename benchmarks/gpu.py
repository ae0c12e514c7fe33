"""All measurements that want a GPU, at the published sizes with random weights, one after the other.

    python -m benchmarks.gpu --out DIR                       # one GPU with 141 GB, about 10 minutes
    python -m benchmarks.gpu --out DIR --only va_opd_loss srpo_loss

Each runs in a process of its own, forked after the imports, and is ended after --limit seconds; one that fails does
not stop the next. Writes DIR/<name>_gpu.json, the default of DIR being benchmarks/results, and DIR/<name>.log.
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() must not start CUDA before the fork

WORKS = {  # name of the result: module and arguments
    "va_opd_loss": "va_opd_loss --student 2048 --teacher 4096 --head_rows --most 60 --repeats 5",
    "srpo_loss": "srpo_loss --rows 1024 2048 4096 8192 --student 4096 --teacher 4096 --most 60 --repeats 3",
    "va_opd_scoring": "va_opd_scoring --real --repeats 3",
    "srpo_step": "srpo_step --real 4B --response 800 --repeats 2 --kinds srpo 'sdpo (trl)' grpo",
    "evaluation": "evaluation --real --prompts 32 --tokens 256 --repeats 1",
    "srpo_step_8b": "srpo_step --real 8B --rollouts 16 --micro_batch 4 --response 200 --repeats 1"
    " --kinds srpo 'sdpo (trl)'",
}


def work(name: str, out: Path) -> None:
    """One measurement, with what it prints in its log."""
    with (out / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        module, *arguments = shlex.split(WORKS[name])
        importlib.import_module(f"benchmarks.{module}").main([*arguments, "--out", str(out / f"{name}_gpu.json")])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    started, codes = time.monotonic(), []
    for name in options.only:
        importlib.import_module(f"benchmarks.{WORKS[name].split()[0]}")
    print(f"imports: {time.monotonic() - started:.0f} s", flush=True)
    fork = multiprocessing.get_context("fork")
    for name in options.only:
        started, process = time.monotonic(), fork.Process(target=work, args=(name, options.out))
        process.start()
        process.join(options.limit)
        if process.is_alive():
            process.kill()
            process.join()
        codes.append(process.exitcode)
        end = (options.out / f"{name}.log").read_text().splitlines()[-30:]
        print(
            f"--- {name}: {time.monotonic() - started:.0f} s, exit code {process.exitcode}", *end, sep="\n", flush=True
        )
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
