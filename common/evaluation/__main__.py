"""python -m common.evaluation --model PATH_OR_ID --benchmark math500 [--engine vllm] [--samples K] [--out DIR]"""

import argparse
import dataclasses
import sys
from pathlib import Path

SEVERAL = {"temperature": 0.6, "top_p": 0.95}  # for several samples of a benchmark whose decoding is greedy
TEMPLATE_EXAMPLE = '{"enable_thinking": false}'


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m common.evaluation", description="Accuracy of a model on a benchmark."
    )
    parser.add_argument("--model", help="hub id or local folder")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--responses", help="instead: score this file of JSON lines with `id` and `response`")
    given.add_argument("--rescore", action="store_true", help="instead: score the records in --out anew")
    parser.add_argument("--benchmark", required=True, help="such as math500; an unknown name lists them")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--server", help="instead of --engine: address of a server, such as http://localhost:8000/v1")
    parser.add_argument(
        "--tokenizer",
        help="with --server: hub id or local folder of its model, whose template's end of a turn then ends a response "
        "(base models do not declare it)",
    )
    parser.add_argument("--samples", type=int, help="samples a question; default: the benchmark's")
    parser.add_argument("--data", help="local file or folder instead of the hub")
    parser.add_argument("--limit", type=int, help="only the first questions")
    several = "; {} for several samples of a greedy one without --temperature"
    for name, value in SEVERAL.items():
        parser.add_argument(f"--{name}", type=float, help=f"default: the benchmark's{several.format(value)}")
    parser.add_argument("--max_new_tokens", type=int, help="default: the benchmark's")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at once with transformers")
    parser.add_argument("--chat_template_kwargs", default="{}", help=f"JSON, such as '{TEMPLATE_EXAMPLE}'")
    parser.add_argument(
        "--engine_options", default="{}", help="JSON, of vllm.LLM, such as '{\"max_model_len\": 8192}'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder of records and metrics; default: runs/evaluation/ and the model's name")
    args = parser.parse_args(argv)
    name = Path(args.model).name if args.model else Path(args.responses or "").stem
    args.out = args.out or str(Path("runs/evaluation") / name)
    from common.cli import run_main  # torch: `--help` need not wait for it

    return run_main("common.evaluation", lambda _: print(_report(_run(args))), [])


def _run(args: argparse.Namespace) -> dict:
    from common import versions

    from . import load_benchmark
    from .run import evaluate, rescore, score_responses

    _check(args)
    benchmark = load_benchmark(args.benchmark, args.data, args.limit)
    if args.rescore:
        return rescore(benchmark, args.out)
    if args.responses:
        return score_responses(benchmark, args.responses, args.out)
    versions.announce("common.evaluation")
    engine, decoding = _engine(args), _decoding(args, benchmark)
    return evaluate(engine, benchmark, args.out, samples=args.samples, decoding=decoding, seed=args.seed)


def _check(args: argparse.Namespace) -> None:
    """Parses the JSON options; raises `ValueError` for what is wrong, before the benchmark is maybe downloaded."""
    from . import json_options

    if args.responses and not Path(args.responses).is_file():
        raise ValueError(f"there is no file of responses {args.responses}")
    if not (args.model or args.responses or args.rescore):
        raise ValueError("there is no --model to ask, no file of --responses, and no --rescore: pass one of them")
    for name in ("samples", "limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.tokenizer and not args.server:
        raise ValueError(f"tokenizer {args.tokenizer!r} is for a --server: leave it out")
    args.chat_template_kwargs = json_options("chat_template_kwargs", args.chat_template_kwargs, TEMPLATE_EXAMPLE)
    args.engine_options = json_options("engine_options", args.engine_options)
    if args.engine_options and (args.server or args.engine != "vllm"):
        raise ValueError("engine_options are for --engine vllm, without a --server: set that, or leave them out")


def _decoding(args: argparse.Namespace, benchmark):
    """The benchmark's with the user's changes; several samples are not greedy by default: all would be the same."""
    decoding = benchmark.decoding
    if (args.samples or 1) > 1 and decoding.temperature == 0 and args.temperature is None:
        decoding = dataclasses.replace(decoding, **SEVERAL)
        print(f"{args.samples} samples are drawn with {SEVERAL}: {benchmark.name} is greedy", file=sys.stderr)
    changes = {name: getattr(args, name) for name in (*SEVERAL, "max_new_tokens")}
    return dataclasses.replace(decoding, **{name: value for name, value in changes.items() if value is not None})


def _engine(args: argparse.Namespace):
    from . import ServerEngine, load_engine

    options = args.chat_template_kwargs
    if args.server:
        return ServerEngine(args.server, args.model, options, stop_token_ids=_turn_end(args.tokenizer))
    import torch

    cuda = torch.cuda.is_available()
    return load_engine(
        args.engine,
        args.model,
        args.batch_size,
        bf16=cuda,
        device="cuda" if cuda else "cpu",
        chat_template_kwargs=options,
        options={"seed": args.seed, **args.engine_options},
    )


def _turn_end(tokenizer: str | None) -> list[int]:
    if tokenizer is None:
        return []
    from common.models import load_processor

    from .engines import turn_end_id

    end = turn_end_id(load_processor(tokenizer))
    if end is None:
        raise ValueError(f"tokenizer {tokenizer!r} has no chat template that closes a turn by a token: leave it out")
    return [end]


def _report(metrics: dict) -> str:
    low, high = metrics["interval"]
    rates = {"parsed": metrics["parsed"], "truncated": metrics["truncated"]}
    majority = f"; maj@{metrics['samples']} = {metrics['maj@k']:.4f}" if "maj@k" in metrics else ""
    known = majority + "".join(f"; {name} {rate:.1%}" for name, rate in rates.items() if rate is not None)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(metrics["verdicts"].items()))
    return (
        f"avg@{metrics['samples']} = {metrics['avg@k']:.4f} [{low:.4f}, {high:.4f}] "
        f"over {metrics['questions']} questions{known}{'; ' if counts else ''}{counts}{_own(metrics.get('metric'))}"
    )


def _own(metric: dict | None) -> str:
    """The line of a benchmark's own metric."""
    if metric is None:
        return ""
    if metric["score"] is None:
        return "\nscore: none, the limit cuts every unit of the metric"
    low, high = metric["interval"]
    parts = ", ".join(f"{name} {metric[name]:.4f}" for name in metric if name not in ("score", "interval"))
    return f"\nscore = {metric['score']:.4f} [{low:.4f}, {high:.4f}] ({parts})"


if __name__ == "__main__":
    sys.exit(main())
