"""A generation batch of an R-Diverse phase beside TRL's GRPOTrainer, with the same uneven rollouts in one run.

    python -m benchmarks.r_diverse_step                                     # CPU, about 15 minutes
    python -m benchmarks.r_diverse_step --real 4B --response 2048 --repeats 1       # a GPU with 141 GB

A step here is the log-probabilities of the old policy and of the KL reference, then forward and backward of the four
updates of a generation batch; generation and optimizer are the same for both and left out. Both have the settings of
`SolverConfig`. The models have random weights. Lengths of rollouts are log-normal, and one is the longest allowed, as
among the thousands of a real batch. Writes benchmarks/results/r_diverse_step.json.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from trl import GRPOTrainer

from benchmarks import tables
from benchmarks.machine import machine, spread
from benchmarks.srpo_step import REAL, fix_rollouts, prompts, save_model, seconds_of_a_step, step_parser
from benchmarks.va_opd_scoring import as_training_does, precision
from common.runs import atomic_write_json
from common.tiny import char_tokenizer
from r_diverse import PhaseTrainer, SolverConfig

GROUP, UPDATES = 4, 4
KINDS = {"ours": PhaseTrainer, "trl": GRPOTrainer}


def rollout_ids(rollouts: int, response: int, eos: int) -> list[list[int]]:
    """Ids of printable characters; the median length is 0.2 of the longest and the 90th percentile 0.6."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(0.2 * response), 0.85, rollouts), 2, response).astype(int)
    lengths[rng.integers(rollouts)] = response
    return [[*rng.integers(10, 100, length - 1).tolist(), eos] for length in lengths]


def build(kind: str, folder: str, tokenizer, options: argparse.Namespace):
    """A trainer that computes as in `train()`."""
    config = SolverConfig(
        output_dir=folder,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.rollouts // options.micro_batch // UPDATES,
        num_generations=GROUP,
        max_completion_length=options.response,
        report_to=[],
        save_strategy="no",
        shuffle_dataset=False,
        **precision(),
    )
    trainer = KINDS[kind](
        model=folder,
        reward_funcs=lambda completions, **columns: [float(i % 3 == 0) for i in range(len(completions))],
        args=config,
        train_dataset=prompts(options, GROUP),
        processing_class=tokenizer,
    )
    return as_training_does(trainer)


def count(trainer) -> list[int]:
    """Collects the positions, padding included, of every forward of the policy and of the KL reference."""
    positions: list[int] = []
    for model in (trainer.model, trainer.ref_model):
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    return positions


def measure(
    folder: str, tokenizer, options: argparse.Namespace, save: Callable[[dict[int, Any]], None]
) -> dict[int, dict[str, Any]]:
    """By longest response: seconds of both, in turn, and positions and tokens of a step; saved after each length."""
    trainers = {kind: build(kind, folder, tokenizer, options) for kind in KINDS}
    positions, found = {kind: count(trainer) for kind, trainer in trainers.items()}, {}
    for share in (4, 2, 1):
        ids = rollout_ids(options.rollouts, options.response // share, tokenizer.eos_token_id)
        fix_rollouts(ids)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repeat in range(options.repeats + 1):  # the first warms up
            for kind, trainer in trainers.items():
                positions[kind].clear()
                taken = seconds_of_a_step(trainer)
                print(f"{kind}, responses of up to {options.response // share}: {taken:.2f} s", flush=True)
                seconds[kind] += [taken] if repeat else []
        found[options.response // share] = {
            "seconds": seconds,
            "ratio": spread(b / a for a, b in zip(seconds["ours"], seconds["trl"], strict=True)),
            "positions": {kind: sum(numbers) for kind, numbers in positions.items()},
            "response_tokens": sum(map(len, ids)),
            "mean_over_longest": sum(map(len, ids)) / len(ids) / (options.response // share),
        }
        save(found)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = step_parser(__doc__, "r_diverse_step")
    parser.set_defaults(rollouts=64, micro_batch=4)
    parser.add_argument("--real", choices=REAL, help="shapes of this Qwen3, whatever --hidden and the like say")
    parser.add_argument("--response", type=int, default=256, help="longest response in tokens")
    options = parser.parse_args(argv)
    tokenizer = char_tokenizer()
    about = {"settings": vars(options) | {"out": options.out.name}, "machine": machine("transformers", "trl")}

    def save(found: dict[int, Any]) -> None:
        atomic_write_json(options.out, about | {"responses": found})

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, tokenizer, options)
        measure(folder, tokenizer, options, save)
    print(tables.of_file("r_diverse_step", options.out))


if __name__ == "__main__":
    main()
