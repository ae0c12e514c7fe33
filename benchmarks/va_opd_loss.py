"""Peak memory and time of VA-OPD's loss, the weighted reverse KL over the full vocabulary, forward and backward.

    python -m benchmarks.va_opd_loss                           # CPU, about 10 minutes
    python -m benchmarks.va_opd_loss --rows 1024 4096 --student 2048 --teacher 4096       # a GPU

`naive` holds the logits of both models, `kernel` is the trainer's path, TRL's tiled kernel with its tiles of 4,096
rows, and `kernel, N rows` the same with smaller tiles. Each runs in a process of its own; the peak is what it adds to
inputs and gradients. `naive` is left out where it needs more than --most GiB. Liger's fused JSD needs a GPU and is
not here. Writes benchmarks/results/va_opd_loss.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from trl.kernels import chunked_divergence

from benchmarks.machine import machine
from benchmarks.va_opd_scoring import exponent, synchronize
from common import plots
from common.runs import atomic_write_json
from va_opd import objective
from va_opd.lm_head import LMHead, chunked_reverse_kl

VOCABULARY = 151936
TILES = {"kernel": 4096, "kernel, 1024 rows": 1024}


def peak_bytes() -> int:
    """High-water mark of this process's memory, or of the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def loss_of(name: str, rows: int, vocabulary: int, student: int, teacher: int) -> dict[str, float]:
    """One forward and backward: peak in bytes, seconds of the thread (clock on a GPU), loss, norm of the gradient."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    s_hidden, t_hidden = torch.randn(rows, student, **like), torch.randn(rows, teacher, **like)
    s_weight = torch.randn(vocabulary, student, **like).mul_(student**-0.5)
    t_weight = torch.randn(vocabulary, teacher, **like).mul_(teacher**-0.5)
    weights = torch.rand(rows, device=device) / rows
    s_hidden.requires_grad_()
    s_weight.requires_grad_()
    synchronize()
    before, clock = peak_bytes(), time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    if name == "naive":
        kl = objective.reverse_kl(s_hidden @ s_weight.T, t_hidden @ t_weight.T)
    else:
        chunked_divergence.TOKEN_CHUNK_SIZE = TILES[name]
        heads = (LMHead(weight, None, 1.0, None) for weight in (s_weight, t_weight))
        kl, _ = chunked_reverse_kl(s_hidden, t_hidden, *heads)
    loss = (kl * weights).sum()
    loss.backward()
    synchronize()
    seconds, gradients = clock() - started, s_hidden.grad.nbytes + s_weight.grad.nbytes
    norm = s_hidden.grad.float().norm().item()
    return {"peak": peak_bytes() - before - gradients, "seconds": seconds, "loss": loss.item(), "gradient_norm": norm}


def child(name: str, rows: int, student: int, teacher: int) -> dict[str, float]:
    torch.set_num_threads(1)
    loss_of(name, 8, 64, student, teacher)  # loads what the first call loads
    return loss_of(name, rows, VOCABULARY, student, teacher)


def run(name: str, rows: int, options: argparse.Namespace) -> dict[str, float]:
    words = [name, rows, options.student, options.teacher]
    command = [sys.executable, "-m", "benchmarks.va_opd_loss", "--child", *map(str, words)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    return json.loads(output.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median peak and each time, by path and rows; paths in turn, so that all see the same machine."""
    found: dict[str, Any] = {name: {} for name in ("naive", *TILES)}
    for rows in options.rows:
        names = [name for name in found if name != "naive" or 6 * rows * VOCABULARY * 4 < options.most * 2**30]
        runs = [{name: run(name, rows, options) for name in names} for _ in range(options.repeats)]
        for name in names:
            mine = [each[name] for each in runs]
            found[name][rows] = {
                "peak_gib": statistics.median(x["peak"] for x in mine) / 2**30,
                "seconds": [x["seconds"] for x in mine],
                "loss": mine[0]["loss"],
                "gradient_norm": mine[0]["gradient_norm"],
            }
            print(name, rows, found[name][rows], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--student", type=int, default=128, help="width of the student")
    parser.add_argument("--teacher", type=int, default=256, help="width of the teacher")
    parser.add_argument("--most", type=float, default=5.0, help="GiB that the naive path may take")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "va_opd_loss.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.child[0], *map(int, options.child[1:]))))
        return
    found = measure(options)
    growth = {
        name: {
            "peak": exponent(list(by_rows), [x["peak_gib"] for x in by_rows.values()]),
            "seconds": exponent(list(by_rows), [statistics.median(x["seconds"]) for x in by_rows.values()]),
        }
        for name, by_rows in found.items()
    }
    print(table(found, options.rows))
    settings = {key: value for key, value in vars(options).items() if key not in ("child", "out")}
    atomic_write_json(options.out, {"settings": settings, **machine("trl"), "paths": found, "exponents": growth})


def table(found: dict[str, Any], rows: list[int]) -> str:
    lines = []
    for name, by_rows in found.items():
        cells = [by_rows.get(n) for n in rows]
        figures = [f"{c['peak_gib']:.2f} / {statistics.median(c['seconds']):.1f}" if c else "-" for c in cells]
        lines.append([name, *figures])
    return plots.table_markdown(lines, ["peak GiB / seconds", *(f"{n} rows" for n in rows)])


if __name__ == "__main__":
    main()
