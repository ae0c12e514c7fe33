"""The teacher's responses, on which the baselines sft and kd train, and the reward that chooses among them, GRPO's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from .config import VAOPDConfig
from .data import digits_correct, with_completions

# isort: split
from common import verifiers
from common.evaluation import Decoding, Engine, Prompt, json_options, load_engine, question_fingerprint
from common.runs import append_jsonl, claim, exclusive, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

    from .train import ScriptArguments

TEACHER_ROWS = 256  # responses of the teacher between two writes: an engine fills its batch from so many


def teacher_rows(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> Dataset:
    """Rows with a `completion` sampled once from the teacher: the complete ones for kd (sequence-level distillation),
    of these the ones with a correct answer for sft (the paper's CoT-SFT, whose data it does not publish).

    A response that was cut at the token limit would teach to stop there. Raises `ValueError` where none is left, and
    in the processes of a launcher where the responses are not sampled yet.
    """
    records = {record["id"]: record for record in read_jsonl(sample_teacher(args, config, rows))}
    complete = [index for index, row_id in enumerate(rows["id"]) if records[row_id]["finish_reason"] != "length"]
    responses, answers = [records[row_id]["response"] for row_id in rows["id"]], rows["answer"]
    reward = reward_of(args)
    keep = [i for i in complete if args.method == "kd" or reward([responses[i]], answer=[answers[i]])[0] == 1.0]
    if not keep:
        raise ValueError(
            f"method {args.method} has nothing to train on: of the teacher's {len(rows)} responses {len(complete)} "
            "are complete, and for sft none of these is correct; raise max_completion_length, or take another teacher"
        )
    if PartialState().is_main_process:
        print(f"{args.method}: {len(keep)} of the teacher's {len(rows)} responses used", flush=True)
    return with_completions(rows.select(keep), [responses[i] for i in keep])


def sample_teacher(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> Path:
    """The file with one teacher response a row, to which the missing ones are added, `TEACHER_ROWS` at a time.

    Raises `ValueError` where the responses there are of another teacher, decoding or data, and where some are missing
    in the processes of a launcher: an engine would join their process group.
    """
    cache = Path(args.out) / "va_opd" / args.experiment / f"teacher-seed{config.seed}" / "responses.jsonl"
    claim(cache.with_name("settings.json"), teacher_settings(args, config, rows), cache.exists())
    found = read_jsonl(cache) if cache.exists() else []
    done = {record["id"] for record in found if "finish_reason" in record}  # older ones do not say if they are whole
    missing = [index for index, row_id in enumerate(rows["id"]) if row_id not in done]
    if not missing:
        return cache
    if PartialState().num_processes > 1:
        raise ValueError(
            f"{cache} lacks {len(missing)} of {len(rows)} responses of the teacher: sample them first, by the same "
            "command without a launcher and with --sample_only true"
        )
    decoding = Decoding(
        temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_completion_length
    )
    with exclusive(cache.parent), closing(build_engine(args, args.teacher, config)) as engine:
        for start in range(0, len(missing), TEACHER_ROWS):
            part = [rows[index] for index in missing[start : start + TEACHER_ROWS]]
            prompts = [Prompt(messages=row["prompt"], images=row["images"]) for row in part]
            seeds = [config.seed + index for index in missing[start : start + TEACHER_ROWS]]
            for row, completion in zip(part, engine.generate(prompts, decoding, seeds), strict=True):
                record = {"response": completion.text, "finish_reason": completion.finish_reason}
                append_jsonl(cache, {"id": row["id"], **record})
            print(f"teacher: {len(done) + start + len(part)} of {len(rows)} responses", flush=True)
    return cache


def teacher_settings(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> dict[str, Any]:
    """What decides the teacher's responses."""
    names = ("temperature", "top_p", "max_completion_length", "seed")
    return {
        "teacher": args.teacher,
        "engine": args.engine,
        **{name: getattr(config, name) for name in names},
        **data_settings(args),
        "limit": args.limit,
        "data": fingerprint_of(rows),
    }


def data_settings(args: ScriptArguments) -> dict[str, Any]:
    """What is made of a row's text and images."""
    return {name: getattr(args, name) for name in ("dataset", "template", "min_pixels", "max_pixels")}


def fingerprint_of(rows: Dataset) -> str:
    """`question_fingerprint`, without the images, which would have to be decoded."""
    return question_fingerprint(rows.select_columns(["id", "prompt", "answer"]))


def reward_of(args: ScriptArguments) -> Callable[..., list[float | None]]:
    """GRPO's reward: the first answer counts, as in the paper's monitoring reward and in evaluation; for digits the
    exact sentence."""
    if args.dataset != "digits":
        return first_answer_reward

    def digits_reward(completions, answer, **columns) -> list[float]:
        texts = map(verifiers.completion_text, completions)
        return [float(digits_correct(text, {"answer": gold})) for text, gold in zip(texts, answer, strict=True)]

    return digits_reward


def first_answer_reward(completions, answer, **columns) -> list[float | None]:
    """`verifiers.math_reward` of the first answer that each completion commits to, or of a short one as a whole."""
    return verifiers.math_reward(completions, answer, which="first", whole=True, **columns)


def build_engine(args: ScriptArguments, model: str, config: VAOPDConfig) -> Engine:
    """The engine of `args.engine`, which generates with `model`, a hub id or a local folder; to be closed."""
    options = json_options("engine_options", args.engine_options)
    return load_engine(
        args.engine, model, args.eval_batch_size, bf16=config.bf16, device=config.device, options=options
    )
