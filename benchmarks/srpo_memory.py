"""Peak memory of one SRPO step beside our own GRPO and TRL's SDPO, on a CPU under Linux.

    python -m benchmarks.srpo_memory            # about 10 minutes

The step is that of `benchmarks.srpo_step`, which shows the peaks of a GPU itself. Each measurement is a process of its
own: after a short step that loads what a first step loads, the high-water mark of its resident memory during a step,
less what it had before the trainer was made. So weights, the teacher's copy and gradients count. Writes
benchmarks/results/srpo_memory.json.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import tables
from benchmarks.machine import in_own_process, machine, memory
from benchmarks.srpo_step import build, fix_rollouts, rollout_ids, save_model, seconds_of_a_step, step_parser
from common.runs import atomic_write_json
from common.tiny import char_tokenizer

KINDS = ("srpo", "grpo", "sdpo (trl)")


def measured(kind: str, folder: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes at the peak of a step, and bytes of the policy's weights."""
    tokenizer, before = char_tokenizer(), memory("VmRSS")
    trainer = build(kind, folder, tokenizer, options)
    for response in (16, options.response):
        fix_rollouts(rollout_ids(options.rollouts, response, tokenizer.eos_token_id))
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident
        seconds_of_a_step(trainer)
    weights = sum(weight.nbytes for weight in trainer.model.parameters())
    return {"peak": memory("VmHWM") - before, "weights": weights}


def main(argv: list[str] | None = None) -> None:
    parser = step_parser(__doc__, "srpo_memory")
    parser.set_defaults(hidden=768, vocabulary=8192, rollouts=16, micro_batch=4)
    parser.add_argument("--responses", type=int, nargs="+", default=[64, 128, 256], help="longest response in tokens")
    options = parser.parse_args(argv)
    found: dict[str, dict[int, list[int]]] = {kind: {n: [] for n in options.responses} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, char_tokenizer(), argparse.Namespace(**vars(options), real=None))
        for response in options.responses:
            for kind in [kind for _ in range(options.repeats) for kind in KINDS]:
                one = in_own_process(measured, kind, folder, argparse.Namespace(**vars(options), response=response))
                found[kind][response].append(one["peak"])
                print(f"{kind}, responses of up to {response}: {one['peak'] / 1e9:.3f} GB", flush=True)
    settings = vars(options) | {"out": options.out.name}
    result = {
        "settings": settings,
        "machine": machine("transformers", "trl"),
        "teacher": one["weights"],
        "peak": found,
    }
    atomic_write_json(options.out, result)
    print(tables.of_file("srpo_memory", options.out))


if __name__ == "__main__":
    main()
