"""Peak memory and time of VA-OPD's loss, the weighted reverse KL over the full vocabulary, forward and backward.

    python -m benchmarks.va_opd_loss                           # CPU, about 20 minutes
    python -m benchmarks.va_opd_loss --student 2048 --teacher 4096 --head_rows --most 60 --repeats 5      # a GPU

`naive` holds the logits of both models, `trl` is the path of TRL's trainer, its tiled kernel, which computes logits
twice, `liger` Liger's fused JSD, which needs a GPU and weighs all tokens alike, `ours` computes logits once, in tiles
of less than 1 GB. Each runs in a process of its own (on a GPU once more, to warm up); the peak is what it adds to
inputs and gradients. A path is left out if it needs more than --most GiB. Then --head_rows rows with heads of the
true widths (--heads), where the products decide and not the passes over the logits. Writes
benchmarks/results/va_opd_loss.json.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from benchmarks import tables
from benchmarks.machine import in_own_process, machine, memory, seconds, unless_out_of_memory
from common.runs import atomic_write_json
from va_opd import objective
from va_opd.divergence import chunked_reverse_kl
from va_opd.lm_head import LMHead

VOCABULARY = 151936
PATHS = {"naive": 6.5, "trl": 2.5, "ours": 0.0}  # (N, V) tensors of float32 that the peak may hold, to leave some out
if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
    PATHS["liger"] = 0.0
Found = dict[str, dict[int, dict[str, Any]]]


def peak_bytes() -> int:
    """High-water mark of the GPU's memory or, without one, of this process's."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory("VmHWM")


def heads(rows: int, vocabulary: int, student: int, teacher: int) -> list[torch.Tensor]:
    """Random hidden states and heads of student and teacher; the student's need gradients. Logits have variance 1.

    On a GPU in the dtypes of training: hidden states and teacher in bfloat16, the student's weights in float32.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    s_hidden, t_hidden = torch.randn(rows, student, **like), torch.randn(rows, teacher, **like)
    s_weight = torch.randn(vocabulary, student, device=device).mul_(student**-0.5)
    t_weight = torch.randn(vocabulary, teacher, **like).mul_(teacher**-0.5)
    return [s_hidden.requires_grad_(), s_weight.requires_grad_(), t_hidden, t_weight]


def loss_of(name: str, s_hidden, s_weight, t_hidden, t_weight) -> torch.Tensor:
    weights = torch.linspace(0, 1, len(s_hidden), device=s_hidden.device) / len(s_hidden)
    if name == "naive":
        kl = objective.reverse_kl(s_hidden @ s_weight.T, t_hidden @ t_weight.T)
    elif name == "trl":
        kl, _ = ChunkedDivergenceFunction.apply(s_hidden, s_weight, None, t_hidden, t_weight, None, 1.0)
    elif name == "liger":
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=1.0)(s_hidden, s_weight, t_hidden, t_weight, None) / 2  # the mean weight
    else:
        student, teacher = (LMHead(weight, None, 1.0, None) for weight in (s_weight, t_weight))
        kl, _ = chunked_reverse_kl(student, s_hidden, teacher, t_hidden, weights)
    return (kl * weights).sum()


def measured(loss: Callable[..., torch.Tensor], name: str, *sizes: int) -> dict[str, float]:
    """One forward and backward: peak in bytes, seconds, loss, norm of the gradient."""
    inputs = heads(*sizes)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            value = loss(name, *inputs)
        value.backward()
        return value

    before = peak_bytes()
    taken, value = seconds(step)
    gradients = [tensor.grad for tensor in inputs[:2]]
    peak = peak_bytes() - before - sum(gradient.nbytes for gradient in gradients)
    norm = gradients[0].float().norm().item()
    return {"peak": peak, "seconds": taken, "loss": value.item(), "gradient_norm": norm}


def measured_alone(loss: Callable[..., torch.Tensor], name: str, rows: int, *widths: int) -> dict[str, float]:
    """`measured` on one thread, after a small step that loads what the first call loads."""
    torch.set_num_threads(1)
    measured(loss, name, 8, 256, *widths)
    return measured(loss, name, rows, VOCABULARY, *widths)


def run(loss: Callable[..., torch.Tensor], name: str, rows: int, *widths: int) -> dict[str, float]:
    """`measured_alone` in a process of its own; on a GPU, which records its own peak, `measured` in this one."""
    if torch.cuda.is_available():
        measured(loss, name, rows, VOCABULARY, *widths)  # the size for which kernels are chosen
        return measured(loss, name, rows, VOCABULARY, *widths)
    return in_own_process(measured_alone, loss, name, rows, *widths)


def measure(
    loss: Callable[..., torch.Tensor],
    paths: dict[str, float],
    rows: list[int],
    widths: list[int],
    repeats: int,
    most: float,
    save: Callable[[Found], None],
) -> Found:
    """Median peak and all seconds, by path and rows; paths take turns, so that all see the same machine. Results are
    saved after each number of rows."""
    found: Found = {name: {} for name in paths}
    for count in rows:
        names = [name for name, tensors in paths.items() if tensors * count * VOCABULARY * 4 < most * 2**30]
        runs: dict[str, list[dict[str, float] | None]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, mine in runs.items():
                if None not in mine:
                    mine.append(unless_out_of_memory(partial(run, loss, name, count, *widths)))
        for name, mine in runs.items():
            found[name][count] = {"out_of_memory": True} if None in mine else summary(mine)
            print(name, count, found[name][count], flush=True)
        save(found)
    return found


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "peak_gib": statistics.median(x["peak"] for x in runs) / 2**30,
        "seconds": [x["seconds"] for x in runs],
        "loss": runs[0]["loss"],
        "gradient_norm": runs[0]["gradient_norm"],
    }


def parser(name: str, rows: list[int]) -> argparse.ArgumentParser:
    """The options of this command and of `benchmarks.srpo_loss`."""
    made = argparse.ArgumentParser(prog=f"benchmarks.{name}", formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--rows", type=int, nargs="+", default=rows)
    made.add_argument("--student", type=int, default=128, help="width of the student")
    made.add_argument("--teacher", type=int, default=256, help="width of the teacher")
    made.add_argument("--most", type=float, default=8.0, help="GiB that a path may take")
    made.add_argument("--repeats", type=int, default=2)
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    return made


def main(argv: list[str] | None = None) -> None:
    asked = parser("va_opd_loss", [256, 512, 1024, 4096])
    asked.description = __doc__
    asked.add_argument("--heads", type=int, nargs=2, default=[2048, 4096], help="true widths: 2B and 8B")
    asked.add_argument("--head_rows", type=int, nargs="*", default=[64, 256, 1024], help="none leaves them out")
    options = asked.parse_args(argv)
    try:
        if "liger" in PATHS:
            measured(loss_of, "liger", 8, 256, 64, 64)
    except Exception as error:
        print(f"Liger's kernel does not run here: {error!r}")
        del PATHS["liger"]
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"settings": settings, **machine("trl"), "true heads": {name: {} for name in PATHS}}
    works = {
        "paths": (options.rows, [options.student, options.teacher]),
        "true heads": (options.head_rows, options.heads),
    }
    for part, (rows, widths) in works.items():

        def save(found: Found, part: str = part) -> None:
            atomic_write_json(options.out, result | {part: found})

        more = (options.repeats, options.most, save)
        result[part] = measure(loss_of, PATHS, rows, widths, *more)
    print(tables.of_file("va_opd_loss", options.out))


if __name__ == "__main__":
    main()
