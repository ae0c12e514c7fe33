"""The paper's experiment end to end: data, base, baselines, method, evaluation, table and figures.

    python -m srpo.loop --config srpo/configs/tiny.yaml
    python -m srpo.loop --config srpo/configs/qwen3_8b.yaml --datasets all --variants grpo,sdpo,srpo --gpus 8
    python -m srpo.loop --config srpo/configs/qwen3_8b.yaml --dry_run      # settings, memory, commands; runs nothing
    python -m srpo.loop --config srpo/configs/qwen3_8b.yaml --download     # model and data into the caches

Each step is a command of its own that is printed before it runs and does nothing when its result is there already:
started again after a kill, the experiment goes on. With `--drop_evaluated true` each run is evaluated before the next
one trains, and the disk has to hold all checkpoints of one run only, of the others the last. Other `--field value`
pairs are passed on to every command; `python -m srpo.train --help` explains the fields.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

from .train import (  # first: it says in one line what is missing without common/
    ScriptArguments,
    checkpoint_sizes,
    dry_run,
    load_splits_of,
    parse,
)

# isort: split

from common.cli import run_main, split_config
from common.download import download
from common.evaluation import json_options
from common.models import check_at_hand, guess_parameters
from common.plan import GIB
from common.rewards import missing_reward
from common.stages import (
    Command,
    OneGPUEach,
    RunByRun,
    Trainings,
    check_packages,
    chosen,
    chosen_seeds,
    commands_of,
    launcher,
    run_stages,
    shown,
)

from .data import DATASETS, missing_source

VARIANT_FLAGS = {
    "srpo": ["--routing", "srpo"],
    "grpo": ["--routing", "grpo"],
    "sdpo": ["--routing", "sdpo"],
    "srpo_no_dw": ["--routing", "srpo", "--entropy_beta", "0"],
    "mix": ["--routing", "mix"],
    "sdpo_incorrect": ["--routing", "sdpo_incorrect"],
    "sdpo_correct": ["--routing", "sdpo_correct"],
}


def main(argv: list[str] | None = None) -> int:
    """Exit code of the first command that failed, 2 for a mistake in the arguments, 130 for Ctrl-C, else 0."""
    return run_main("srpo.loop", _main, argv)


def _main(argv: list[str]) -> int:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog="srpo.loop", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--variants", default="grpo,sdpo,srpo", help=f"comma list of {', '.join(VARIANT_FLAGS)}, or all"
    )
    parser.add_argument(
        "--datasets", help=f"comma list of {', '.join(DATASETS)}, or all; by default the config's,\nand own data alone"
    )
    parser.add_argument("--seeds", help="comma list; by default the config's seed")
    parser.add_argument("--gpus", type=int, default=1, help="processes for training; 1 starts no launcher")
    parser.add_argument("--sharding", default="zero3", help="accelerate config of TRL used for several GPUs")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--download", action="store_true", help="fetch model and data into the caches; run nothing")
    known, rest = parser.parse_known_args(argv)
    fields = ["--config", split_config(argv)[0], *rest]
    look = ["--dry_run"] if known.dry_run or known.download else []
    args, config = parse([*fields, *look])
    variants = chosen("variants", known.variants, VARIANT_FLAGS)
    for name in variants:  # settings that one of them refuses would show only after the trainings before
        parse([*fields, *look, *VARIANT_FLAGS[name]])
    alone = known.datasets in (None, args.dataset) or (args.dataset, known.datasets) == ("own", "all")
    datasets = [args.dataset] if alone else chosen("datasets", known.datasets, DATASETS)
    seeds = chosen_seeds(known.seeds or str(config.seed))
    sources = [(name, partial(load_splits_of, dataclasses.replace(args, dataset=name))) for name in datasets]
    if known.download:
        return download([args.model], sources)
    if not made_here(args.model):
        check_at_hand(not known.dry_run, model=args.model)
    problems = [*(missing_source(dataset, args.data) for dataset in datasets), missing_reward(args.reward)]
    missing = list(dict.fromkeys(filter(None, problems)))
    if missing and (args.data or args.reward or not known.dry_run):  # it would show only after other trainings
        raise ValueError("; ".join(missing))
    if not known.dry_run:
        check_packages(config.use_vllm or args.engine == "vllm", known.gpus, known.sharding, config.report_to)
        for _, load in sources:
            load()
    stages = plan(fields, args, variants, datasets, seeds, launcher(known.gpus, known.sharding), known.gpus)
    if known.dry_run:
        print(
            dry_run(args, config, max(1, known.gpus), known.sharding),
            *(f"$ {shown(command)}" for command in commands_of(stages)),
            disk_of_all(args, config, len(variants) * len(datasets) * len(seeds), known.gpus, known.sharding),
            *(f"missing: {problem}" for problem in missing),
            sep="\n",
        )
        return 0
    return run_stages(stages, Path(args.out) / "srpo" / args.experiment / "logs", known.gpus)


def disk_of_all(args: ScriptArguments, config, runs: int, gpus: int, sharding: str) -> str:
    """What the runs have on the disk together, as a line."""
    held = f"one run and two models of each of {runs}" if args.drop_evaluated else f"{runs} runs"
    said, parameters = f"the disk has to hold the checkpoints of {held}", guess_parameters(args.model)
    if parameters is None or config.max_steps < 1:
        return said
    count, each, resume = checkpoint_sizes(args, config, parameters, sharding if gpus > 1 else "none")
    one = count * each + resume
    # A finished run keeps its last checkpoint, which is in `one`, and model/
    size, fewer = (one + (2 * runs - 1) * each, "") if args.drop_evaluated else (runs * one, ", drop_evaluated too")
    return f"{said}: {size / GIB:,.0f} GiB; a larger save_steps keeps fewer{fewer}"


def plan(fields, args, variants, datasets, seeds, launch, gpus: int = 1) -> list[list]:
    """Stages in order; the commands of one stage do not need each other. With `drop_evaluated` the runs take turns,
    each evaluated in as many parts as there are GPUs."""
    python = [sys.executable, "-m"]
    bases, runs, evaluations = [], [], []
    for dataset in datasets:
        shared = [*fields, "--dataset", dataset]
        bases.append((f"evaluate-base-{dataset}", [*python, "srpo.evaluate", "base", *shared]))
        evaluations.append(bases[-1])
        for seed in seeds:
            for name in variants:
                flags = [*shared, "--seed", seed, *VARIANT_FLAGS[name]]
                label = f"{name}-{dataset}-seed{seed}"
                evaluations.append((f"evaluate-{label}", [*python, "srpo.evaluate", "run", *flags]))
                runs.append(((f"train-{label}", [*launch, "srpo.train", *flags]), evaluations[-1]))
    several = json_options("engine_options", args.engine_options).get("tensor_parallel_size", 1) > 1  # GPUs for each
    each = list if several else OneGPUEach
    if args.drop_evaluated:  # the base first: if evaluation cannot work, it shows before the disk fills up
        parts = 1 if several else gpus
        stages = [each(bases), RunByRun([[train], *in_parts(run, parts), [run]] for train, run in runs)]
    else:
        stages = [Trainings(train for train, _ in runs), each(evaluations)]
    stages.append([("report", [*python, "benchmarks.srpo", *fields])])
    if name := made_here(args.model):
        stages.insert(0, [("make-policy", [*python, "srpo.data", name, args.model])])
    return stages


def made_here(model: str) -> str | None:
    """Name of the embedded experiments' policy that the folder is for; none is made under another model's name."""
    place = Path(model).parts[-3:]
    return place[-1] if place in (("tiny", "models", "base"), ("small", "models", "smollm2")) else None


def in_parts(evaluation: Command, parts: int) -> list[OneGPUEach]:
    """A stage that evaluates a run's checkpoints in several parts; none for a single one."""
    name, words = evaluation
    numbers = range(1, parts + 1)
    return [OneGPUEach((f"{name}-part{i}", [*words, "--part", f"{i}/{parts}"]) for i in numbers)] if parts > 1 else []


if __name__ == "__main__":
    sys.exit(main())
