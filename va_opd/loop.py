"""The paper's experiment end to end: models or data at hand, base, baselines, method, evaluation, table and figures.

    python -m va_opd.loop --config va_opd/configs/tiny.yaml
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --variants opd,va_opd --gpus 8
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --dry_run      # settings, memory, commands; runs nothing
    python -m va_opd.loop --config va_opd/configs/geo3k.yaml --download     # models and data into the caches

Each step is a command of its own that is printed before it runs and does nothing when its result is there already:
started again after a kill, the experiment goes on. Other `--field value` pairs are passed on to every command;
`python -m va_opd.train --help` explains the fields.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from .train import (  # first: it says in one line what is missing without common/
    GIVEN_RESPONSES,
    ScriptArguments,
    dry_run,
    load_splits_of,
    loads_teacher,
    parse,
)

# isort: split

from common.cli import run_main, split_config
from common.download import download
from common.evaluation import json_options
from common.models import check_at_hand
from common.rewards import missing_reward
from common.stages import (
    Command,
    OneGPUEach,
    Trainings,
    check_packages,
    check_path,
    chosen,
    chosen_seeds,
    launcher,
    run_stages,
    shown,
)

from .evaluate import benchmark_names, paper_benchmark

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
    """Exit code of the first command that failed, 2 for a mistake in the arguments, 130 for Ctrl-C, else 0."""
    return run_main("va_opd.loop", _main, argv)


def _main(argv: list[str]) -> int:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog="va_opd.loop", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--variants", default="opd,va_opd", help=f"comma list of {', '.join(VARIANT_FLAGS)}, or all")
    parser.add_argument("--seeds", help="comma list; by default the config's seed")
    parser.add_argument("--gpus", type=int, default=1, help="processes for training; 1 starts no launcher")
    parser.add_argument("--sharding", default="zero2", help="accelerate config of TRL used for several GPUs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--download", action="store_true", help="fetch models and data into the caches; run nothing")
    known, rest = parser.parse_known_args(argv)
    fields = ["--config", split_config(argv)[0], *rest]
    args, config = parse([*fields, "--dry_run"] if known.dry_run or known.download else fields)
    names = benchmark_names(args)  # a name that is not there would show only after the training
    variants = chosen("variants", known.variants, VARIANT_FLAGS)
    seeds = chosen_seeds(known.seeds or str(config.seed))
    if known.download:
        data = [(name, partial(paper_benchmark, args, name)) for name in names]
        return download([args.model, args.teacher], [(args.dataset, partial(load_splits_of, args)), *data])
    given = {"model", "teacher"} - made_here(args).keys()
    check_at_hand(not known.dry_run, **{name: getattr(args, name) for name in sorted(given)})
    for name in ("data", "validation_data"):
        check_path(name, getattr(args, name), or_hub_id=True)
    check_path("benchmark_data", args.benchmark_data)
    if problem := missing_reward(args.reward):
        raise ValueError(problem)
    if not known.dry_run:
        check_packages(config.use_vllm or args.engine == "vllm", known.gpus, known.sharding, config.report_to)
    local = loads_teacher(args, config)
    stages = plan(fields, args, variants, seeds, launcher(known.gpus, known.sharding), local)
    if known.dry_run:
        print(
            dry_run(args, config, max(1, known.gpus), known.sharding),
            *(f"$ {shown(c)}" for stage in stages for c in stage),
            sep="\n",
        )
        return 0
    return run_stages(stages, Path(args.out) / "va_opd" / args.experiment / "logs", known.gpus)


def made_here(args: ScriptArguments) -> dict[str, tuple[str, str]]:
    """Name and folder of the tiny preset's models, by field; none under another model's name."""
    folders = (("teacher", "teacher", args.teacher), ("model", "base", args.model))
    return {field: (name, path) for field, name, path in folders if Path(path).parts[-3:] == ("tiny", "models", name)}


def plan(
    fields: list[str],
    args: ScriptArguments,
    variants: list[str],
    seeds: list[str],
    launch: list[str],
    local_teacher: bool = True,
) -> list[list[Command]]:
    """Stages in order; the commands of one stage do not need each other. A teacher that only a server can hold is not
    evaluated."""
    python = [sys.executable, "-m"]
    flags = {
        f"{name}-seed{seed}": [*fields, "--seed", seed, *VARIANT_FLAGS[name]] for seed in seeds for name in variants
    }
    evaluations = [(f"evaluate-{name}", [*python, "va_opd.evaluate", "run", *f]) for name, f in flags.items()]
    with_teacher = args.dataset == "digits" or (args.benchmarks and local_teacher)
    untrained = ["base", "teacher"] if with_teacher else ["base"]
    evaluations += [
        (f"evaluate-{what}-seed{seed}", [*python, "va_opd.evaluate", what, *fields, "--seed", seed])
        for seed in seeds
        for what in untrained
    ]
    several = json_options("engine_options", args.engine_options).get("tensor_parallel_size", 1) > 1  # GPUs for each
    responses = [  # by one process: an engine does not start among those of a launcher
        (f"teacher-seed{seed}", [*python, "va_opd.train", *fields, "--seed", seed, "--sample_only", "true"])
        for seed in seeds
        if {*GIVEN_RESPONSES} & set(variants)
    ]
    stages = [
        *([responses] if responses else []),
        Trainings((f"train-{name}", [*launch, "va_opd.train", *f]) for name, f in flags.items()),
        evaluations if several else OneGPUEach(evaluations),
        [("report", [*python, "benchmarks.va_opd", *fields, "--seed", seeds[0]])],
    ]
    makers = [(f"make-{name}", [*python, "va_opd.data", name, path]) for name, path in made_here(args).values()]
    return [makers, *stages] if makers else stages


if __name__ == "__main__":
    sys.exit(main())
