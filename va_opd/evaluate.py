"""Evaluates a model of an experiment: on the held-out problems, with true and with pixelated images, and its VA; then
on `--benchmarks`, such as wemath,mathvista (the paper's eight: common/evaluation/vision.py).

    python -m va_opd.evaluate run  --config va_opd/configs/tiny.yaml --method va_opd     # what va_opd.train trained
    python -m va_opd.evaluate base --config va_opd/configs/tiny.yaml                     # the student before training
    python -m va_opd.evaluate teacher --config va_opd/configs/tiny.yaml

Writes `eval/<benchmark>.json` with the sample records beside it, and `eval/va_tokens.jsonl`: held-out rollouts of the
model with the VA of each token. Interrupted, it goes on where it stopped; finished, it does nothing. It refuses other
settings than those of the results (`eval/settings.json`), so that no old number passes for a new one.
"""

import copy
import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .config import VAOPDConfig
from .degraded import degrade, model_sizes
from .train import (
    ScriptArguments,
    load_teacher,
    load_validation_of,
    loads_teacher,
    models,
    parse,
    rollout_records,
    run_path,
)
from .trainer import VAOPDTrainer

# isort: split
from common.answers import grade
from common.cli import run_main, split_first
from common.evaluation import BENCHMARKS, Benchmark, Decoding, evaluate, headline, load_benchmark
from common.evaluation.engines import build_engine
from common.rewards import reward_of_response
from common.runs import (
    append_jsonl,
    atomic_write_json,
    checkpoints,
    claim,
    exclusive,
    folders_of,
    is_done,
    read_jsonl,
    weights_of,
)
from common.stages import on_one_gpu
from common.training import train_seconds

from .data import data_settings, digits_correct, fingerprint_of, reward_of

if TYPE_CHECKING:
    from datasets import Dataset

WHAT = ("run", "base", "teacher")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    return run_main("va_opd.evaluate", _main, argv)


def _main(argv: list[str]) -> None:
    what, fields = split_first(argv, WHAT, __doc__)
    args, config = parse(fields)
    if args.dry_run:
        raise ValueError("dry_run is not for evaluations: leave it out, or ask va_opd.loop, which shows all commands")
    evaluate_model(what, args, config)


def evaluate_model(what: str, args: ScriptArguments, config: VAOPDConfig) -> None:
    """Evaluates what is missing of one model, see the top of this file.

    Raises `ValueError` for a run that is not finished, and for results of other settings.
    """
    run = run_path(args, config)
    if what == "run":
        check_trained(run, args)
    out = (run if what == "run" else run.with_name(f"{what}-seed{config.seed}")) / "eval"
    rows = load_validation_of(args)
    names = [name for name in benchmark_names(args) if not is_evaluated(out, name, args.eval_limit)]
    has_results = any(out.rglob("*.jsonl"))
    claim(out / "settings.json", settings_of(what, args, config, rows), has_results)
    if what == "run":
        model = str(best_checkpoint(run, args, config, rows) if args.select_checkpoint else run / "model")
    else:
        model = args.model if what == "base" else args.teacher
    views = {benchmark_name(args): None, benchmark_name(args, True): config}
    missing = [view for name, view in views.items() if not (out / f"{name}.json").exists()]
    held_out = [benchmark_of(args, rows, view) for view in missing]
    if missing or names:
        with closing(build_engine(args, model, config)) as engine:
            for benchmark in (*held_out, *(paper_benchmark(args, name) for name in names)):  # one at a time in memory
                report = evaluate(engine, benchmark, out, samples=args.eval_samples, seed=config.seed)
                score = headline(report)[0]
                shown = "not defined on so few questions" if score is None else f"{score:.3f}"
                print(f"{out.parent.name}: {benchmark.name} = {shown}", flush=True)
    if not (out / "va.json").exists() and (what != "teacher" or args.dataset == "digits"):
        with exclusive(out):  # a paper's teacher is too large to be both models
            score_visual_advantage(model, args, config, rows, out)


def check_trained(run: Path, args: ScriptArguments) -> None:
    """Raises `ValueError` where the run is not finished, or was trained from another student or by another teacher."""
    if not is_done(run):
        raise ValueError(f"{run} holds no finished run: run va_opd.train with the same settings first")
    trained = json.loads((run / "manifest.json").read_text())["config"]
    for name in ("model", "teacher"):
        ours = getattr(args, name)
        if trained.get(name, ours) != ours:
            raise ValueError(
                f"{run} was trained with {name}={trained[name]!r}, these settings have {ours!r}: set {name} back, or "
                "choose another experiment"
            )


def settings_of(what: str, args: ScriptArguments, config: VAOPDConfig, rows: "Dataset") -> dict[str, Any]:
    """What decides the results in a folder, but for `eval_limit`, which each benchmark has its own record of.

    The model of a run is in its folder; which of its checkpoints, the settings decide.
    """
    loaded = {"teacher": args.teacher} if what == "teacher" else {"model": args.model, "teacher": args.teacher}
    chosen = ("eval_samples", "eval_temperature", *(["select_checkpoint"] if what == "run" else []))
    names = ("temperature", "top_p", "max_completion_length", "chat_template_kwargs", "degradation_ratio")
    names += ("pixelate_at", "seed")
    return {
        **loaded,
        **{name: getattr(args, name) for name in chosen},
        **{name: getattr(config, name) for name in names},
        **data_settings(args),
        "validation_size": args.validation_size,
        "data": fingerprint_of(rows),
        **weights_of(**{f"weights of {name}": model for name, model in loaded.items()}),
        **folders_of(**{f"config and tokenizer of {name}": model for name, model in loaded.items()}),
    }


def is_evaluated(out: Path, name: str, limit: int | None) -> bool:
    """Whether there is a result; `ValueError` for one on another number of questions."""
    path, source = out / f"{name}.json", BENCHMARKS[name]
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["questions"], min(limit or source.rows, source.rows)
    if found not in {min(limit or rows, rows) for rows in (source.rows, *source.also)}:
        raise ValueError(
            f"{path} is of {found} questions, this evaluation has eval_limit for {wanted}: set it to {found}, or move "
            f"the file and the folder {out / name} away to evaluate anew"
        )
    return True


def benchmark_names(args: ScriptArguments) -> list[str]:
    """Names in `args.benchmarks`; `ValueError` for one that is not registered."""
    names = [name for name in args.benchmarks.split(",") if name]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"unknown benchmarks {', '.join(unknown)}; choose among {', '.join(BENCHMARKS)}")
    return names


def paper_benchmark(args: ScriptArguments, name: str) -> Benchmark:
    """A registered benchmark at the temperature of the settings."""
    benchmark = load_benchmark(name, args.benchmark_data, args.eval_limit)
    decoding = dataclasses.replace(benchmark.decoding, temperature=args.eval_temperature)
    return dataclasses.replace(benchmark, decoding=decoding)


def best_checkpoint(run: Path, args: ScriptArguments, config: VAOPDConfig, rows: "Dataset") -> Path:
    """The checkpoint with the highest avg@k on the held-out problems, ties to the earlier one, as in the paper.

    Its own accuracy there is then too good by chance: selection.json holds those of all checkpoints, and the hours of
    training before each.
    """
    found = {step: folder for step, folder in checkpoints(run).items() if any(folder.glob("*.safetensors"))}
    if not found:  # shorter than save_steps
        return run / "model"
    accuracy = {}
    for step, folder in found.items():
        benchmark, out = benchmark_of(args, rows), run / "eval" / folder.name
        if (out / f"{benchmark.name}.json").exists():
            report = json.loads((out / f"{benchmark.name}.json").read_text())
        else:
            with closing(build_engine(args, str(folder), config)) as engine:
                report = evaluate(engine, benchmark, out, samples=args.eval_samples, seed=config.seed)
        accuracy[step] = report["avg@k"]
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    hours = {step: train_seconds(folder) / 3600 for step, folder in found.items()}
    atomic_write_json(run / "eval" / "selection.json", {"accuracy": accuracy, "hours": hours, "best": best})
    print(f"{run.name}: best of {len(found)} checkpoints is step {best} with {accuracy[best]:.3f}", flush=True)
    return found[best]


def benchmark_name(args: ScriptArguments, pixelated: bool = False) -> str:
    """Name of the held-out problems in result files."""
    names = {"digits": "digits", "own": "own_validation"}
    return names.get(args.dataset, "geo3k_validation") + ("_pixelated" if pixelated else "")


def benchmark_of(args: ScriptArguments, rows: "Dataset", pixelated: VAOPDConfig | None = None) -> Benchmark:
    """The held-out problems as a benchmark, with images pixelated if there are settings for it. The first answer
    counts, or what own data's reward says."""
    own = reward_of(args) if args.reward not in (None, "math") else None
    part = models.load_processor(args.model).image_processor if pixelated else None

    def images(row: dict[str, Any]) -> list:
        return row["images"] if part is None else [pixelated_view(image, part, pixelated) for image in row["images"]]

    def score(response: str, row: dict[str, Any]) -> float:
        if args.dataset == "digits":
            return float(digits_correct(response, row))
        if own:
            return reward_of_response(own, response, row)
        return float(grade(response, row["answer"], which="first", whole=True))  # as the rules of Table 1 do

    return Benchmark(
        name=benchmark_name(args, part is not None),
        rows=[{"id": r["id"], "prompt": r["prompt"], "images": images(r), "answer": r["answer"]} for r in rows],
        score=score,
        decoding=Decoding(
            temperature=args.eval_temperature, top_p=1.0, max_new_tokens=24 if args.dataset == "digits" else 4096
        ),
    )


def pixelated_view(image: Any, image_processor: Any, config: VAOPDConfig) -> Any:
    """An image as the teacher's second view has it in training: pixelated at the size at which the model sees it."""
    seen = image_processor(images=[image], return_tensors="pt") if config.pixelate_at == "model" else {}
    size = model_sizes(image_processor, seen, 1)[0]
    return degrade(image, size, config.degradation_ratio, getattr(image_processor, "resample", None))


def score_visual_advantage(model: str, args: ScriptArguments, config: VAOPDConfig, rows: "Dataset", out: Path) -> None:
    """One rollout of the model for each held-out problem with an image, and the teacher's VA on it (Figs. 2a, 4b)."""
    config = on_one_gpu(copy.copy(config))
    config.doctor_steps, config.use_vllm, config.output_dir = 0, False, str(out / "trainer")
    config.measure_va = True
    # The trainer checks the batch of a training, which had more processes
    config.per_device_train_batch_size, config.gradient_accumulation_steps = config.num_generations, 1
    local = loads_teacher(args, config)
    if local:  # then no server has to be there
        config.teacher_server, config.teacher_mode = None, "exact"
    # An adapter stays beside the weights, as in evaluation: a sum in bfloat16 would round a small one away
    student = models.load_model(model, torch.bfloat16 if config.bf16 else torch.float32, merge=not config.bf16)
    trainer = VAOPDTrainer(
        model=student.requires_grad_(False),
        teacher_model=load_teacher(args, config) if local else None,
        args=config,
        eval_dataset=rows,
        processing_class=models.load_processor(args.model),
    )
    trainer.model.eval()
    with_images = [i for i, row in enumerate(rows) if row["images"]]
    rows = rows.select(with_images) if with_images else rows  # the VA of others is 0 whatever the model
    path, tokenizer = out / "va_tokens.jsonl", trainer.processing_class.tokenizer
    size = config.per_device_eval_batch_size
    path.unlink(missing_ok=True)
    for start in range(0, len(rows), size):
        part = [rows[i] for i in range(start, min(start + size, len(rows)))]
        trainer._prepare_inputs(part)
        for row, record in zip(part, rollout_records(trainer.last_rollouts, tokenizer, size), strict=True):
            append_jsonl(path, {"id": row["id"], **record})
    va = np.concatenate([record["va"] for record in read_jsonl(path)])
    atomic_write_json(
        out / "va.json", {"mean": float(va.mean()), "positive_share": float((va > 0).mean()), "tokens": len(va)}
    )


if __name__ == "__main__":
    sys.exit(main())
