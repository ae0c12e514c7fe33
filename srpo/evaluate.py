"""Evaluates a model of an experiment on the test problems: avg@k, with the records of every sample.

    python -m srpo.evaluate run  --config srpo/configs/tiny.yaml --routing srpo     # every checkpoint of a training
    python -m srpo.evaluate base --config srpo/configs/tiny.yaml                    # the policy before training
    python -m srpo.evaluate run  --config srpo/configs/qwen3_8b.yaml --part 3/8     # of these the 3rd, 11th, 19th, ...

Writes `eval/<checkpoint>/<benchmark>.json` with the sample records beside it, and `eval/curve.json`: accuracy over
steps and over hours of training, from which the paper's numbers come (best within 1, 5 and 10 hours; also last and
mean). Interrupted, it goes on where it stopped; finished, it does nothing. It refuses other settings than those of the
results (`eval/<checkpoint>/settings.json`), so that no old number passes for a new one.

`--part I/N` shares the checkpoints of a run among N processes, such as one on each GPU. A part writes no curve: the
command without `--part` does, after all of them, from their results. `--drop_evaluated true` deletes the weights of a
checkpoint, except the last one's, once its result is written: it can then be evaluated with these settings only.
"""

import argparse
import itertools
import json
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from .config import SRPOConfig
from .data import DATASETS, reward_of
from .train import ScriptArguments, load_splits_of, parse, run_path

# isort: split
from common.checkpoints import thin_out
from common.cli import run_main, split_first
from common.evaluation import Benchmark, Decoding, evaluate, question_fingerprint
from common.evaluation.engines import build_engine
from common.evaluation.scoring import reward_scorer
from common.rewards import reward_file, reward_of_response
from common.runs import atomic_write_json, checkpoints, claim, fingerprint, folders_of, is_done, weights_of
from common.training import SECONDS, train_seconds

WHAT = ("run", "base")
BUDGETS = (1, 5, 10)  # hours of training, Table 1


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    return run_main("srpo.evaluate", _main, argv)


def _main(argv: list[str]) -> None:
    what, fields = split_first(argv, WHAT, __doc__)
    part, fields = split_part(fields)
    args, config = parse(fields)
    if args.dry_run:
        raise ValueError("dry_run is not for evaluations: leave it out, or ask srpo.loop, which shows all commands")
    if what == "base":
        if part:
            raise ValueError("part shares the checkpoints of a run, and base is one model: leave it out")
        out = run_path(args, config).with_name("base")
        policy = score(args.model, benchmark_of(args, config), args, config, out / "eval" / "base")
        curve = [{"step": 0, "hours": 0.0, **policy}]
    else:
        out = run_path(args, config)
        curve = evaluate_run(out, args, config, *(part or (1, 1)))
    if not part:
        atomic_write_json(out / "eval" / "curve.json", {"curve": curve, **within_budgets(curve)})
    said = ", ".join(f"step {point['step']}: {point['accuracy']:.3f}" for point in curve)
    print(f"{out.name}: {said or 'no checkpoint in this part'}", flush=True)


def split_part(words: list[str]) -> tuple[tuple[int, int] | None, list[str]]:
    """(I, N) of `--part I/N`, if it is there, and the other words; `ValueError` unless 1 <= I <= N."""
    parser = argparse.ArgumentParser(prog="srpo.evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("--part")
    known, others = parser.parse_known_args(words)
    if known.part is None:
        return None, others
    numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", known.part)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ValueError(f"part must be I/N with I from 1 to N, such as 3/8, got {known.part!r}")
    return (int(numbers[1]), int(numbers[2])), others


def evaluate_run(
    run: Path, args: ScriptArguments, config: SRPOConfig, part: int = 1, parts: int = 1
) -> list[dict[str, Any]]:
    """One point of the curve for each checkpoint, or for every `parts`-th, from the `part`-th on (from 1)."""
    if not is_done(run):
        raise ValueError(f"{run} holds no finished run: run srpo.train with the same settings first")
    found = {step: folder for step, folder in checkpoints(run).items() if (folder / SECONDS).exists()}
    if not found:
        raise ValueError(f"{run} holds no checkpoint: set save_steps to at most max_steps={config.max_steps}")
    benchmark, results, last = benchmark_of(args, config), run / "eval", max(found)
    found = dict(itertools.islice(found.items(), part - 1, None, parts))
    for folder in found.values():  # all, before hours go into the first
        check_weights(folder, results / folder.name / f"{benchmark.name}.json")
        claim_results(str(folder), benchmark, args, config, results / folder.name)
    curve = []
    for step, folder in found.items():
        point = score(str(folder), benchmark, args, config, results / folder.name)
        curve.append({"step": step, "hours": train_seconds(folder) / 3600, **point})
        if args.drop_evaluated:
            thin_out(folder, weights=step < last)
    return curve


def check_weights(checkpoint: Path, result: Path) -> None:
    """Raises `ValueError` for a checkpoint that has neither its weights nor a result."""
    if not result.exists() and not weights_of(weights=str(checkpoint)):
        raise ValueError(
            f"{checkpoint} has no weights (drop_evaluated deletes them after evaluation), and {result} is not there: "
            "put its folder back, or train again under another experiment"
        )


def score(model: str, benchmark: Benchmark, args: ScriptArguments, config: SRPOConfig, out: Path) -> dict[str, Any]:
    """Accuracy, interval, length and truncation of a model on the test problems.

    Raises `ValueError` where `out` holds results of other settings; known before a model is loaded.
    """
    claim_results(model, benchmark, args, config, out)
    path = out / f"{benchmark.name}.json"
    if path.exists():
        report = json.loads(path.read_text())
    else:
        with closing(build_engine(args, model, config)) as engine:
            report = evaluate(engine, benchmark, out, samples=args.eval_samples, seed=config.seed)
    return {
        "accuracy": report["avg@k"],
        "interval": report["interval"],
        "mean_tokens": report["mean_tokens"],
        "truncated": report["truncated"],
    }


def claim_results(model: str, benchmark: Benchmark, args: ScriptArguments, config: SRPOConfig, out: Path) -> None:
    """Ties `out` to what decides its results; raises `ValueError` where it holds others."""
    settings, has_results = settings_of(model, benchmark, args, config, out), any(out.rglob("*.jsonl"))
    if out.name == "base" or weights_of(weights=model):
        claim(out / "settings.json", settings, has_results)
    else:
        anew = f"train again under another experiment (drop_evaluated has deleted the weights of {model})"
        claim(out / "settings.json", settings, has_results, anew)


def settings_of(
    model: str, benchmark: Benchmark, args: ScriptArguments, config: SRPOConfig, out: Path
) -> dict[str, Any]:
    """What decides the results in `out`.

    The name of a run's own checkpoint does not: its folder may have been moved. The policy before training is
    evaluated once for all seeds of training.
    """
    names = ("eval_samples", "eval_temperature", "eval_top_p", "strict")
    # A reward of own data may read every column
    problems = fingerprint(benchmark.rows) if args.reward else question_fingerprint(benchmark.rows)
    return {
        **({"model": model} if out.name == "base" else {"seed": config.seed}),
        **{name: getattr(args, name) for name in names},
        **({"reward": args.reward, "reward_threshold": config.reward_threshold} if args.reward else {}),
        **({"the reward's file": fingerprint(file)} if (file := reward_file(args.reward)) else {}),
        **{name: getattr(config, name) for name in ("max_completion_length", "chat_template_kwargs")},
        "test problems (data, eval_limit)": problems,
        **weights_of(weights=model),
        **folders_of(**{"config, tokenizer and template in the model's folder": model}),
    }


def benchmark_of(args: ScriptArguments, config: SRPOConfig) -> Benchmark:
    """The test problems with the reward of the training as their scorer."""
    reward, rows = reward_of(args.dataset, args.strict, args.reward), load_splits_of(args)["test"]
    rows = rows.select(range(min(args.eval_limit or len(rows), len(rows))))

    def score(response: str, row: dict[str, Any]) -> float:
        value = reward_of_response(reward, response, row)
        return float(value >= config.reward_threshold)  # what is correct in routing

    return Benchmark(
        name=args.dataset,
        rows=list(rows),
        score=reward_scorer(reward) if args.dataset in DATASETS else score,
        decoding=Decoding(
            temperature=args.eval_temperature, top_p=args.eval_top_p, max_new_tokens=config.max_completion_length
        ),
        settings={"reward": args.reward} if args.reward else {"strict": args.strict},
    )


def within_budgets(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Best, mean and last accuracy over the whole curve and within each budget of training hours.

    The best is chosen on the test problems, as in the paper; it is optimistic, so the others stand beside it. `hours`
    is how long was trained: less than the budget where the run ended before.
    """
    table, end = {}, curve[-1]["hours"]
    for hours in (*BUDGETS, None):
        inside = [point["accuracy"] for point in curve if hours is None or point["hours"] <= hours]
        if inside:
            name = "all" if hours is None else f"{hours}h"
            trained = end if hours is None else min(hours, end)
            best, mean = max(inside), sum(inside) / len(inside)
            table[name] = {"best": best, "mean": mean, "last": inside[-1], "hours": trained}
    return table


if __name__ == "__main__":
    sys.exit(main())
