"""Trains one variant of the VA-OPD paper (arXiv 2605.21924) into a run folder; resumes where it stopped.

    python -m va_opd.train --config va_opd/configs/geo3k_single_gpu.yaml                                      # one GPU
    accelerate launch --config_file zero2.yaml --num_processes 8 -m va_opd.train --config va_opd/configs/geo3k.yaml
    python -m va_opd.train --config va_opd/configs/geo3k.yaml --dry_run true       # resolved settings and memory

`--method`: va_opd (with `--weighting va|rollout|token|none`), opd (= va_opd with weighting none), sft, kd, grpo.
Deviations from the paper: va_opd/README.md; its numbers: benchmarks/va_opd.py.
The whole experiment: `python -m va_opd.loop`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, set_seed

from .config import VAOPDConfig
from .data import MAX_PIXELS, MIN_PIXELS, SOURCES, digits_correct, load_splits, load_validation, with_completions

try:
    from common import models, plan, preemption, verifiers, versions
    from common.checkpoints import resume_point
    from common.cli import MACHINE_FIELDS, changed_settings, machine_settings, parse_fields, run_main
    from common.evaluation import Decoding, Prompt, TransformersEngine, VLLMEngine, json_options
    from common.lora import adapter_base, check_lora, lora_config, with_adapters
    from common.runs import RunFolder, append_jsonl, atomic_write_json, exclusive, fingerprint, is_done, read_jsonl
    from common.stages import on_one_gpu
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "common":
        raise
    sys.exit("va_opd.train also needs the folder common/ of the project beside va_opd/; the trainer alone does not")

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, Trainer

METHODS = ("va_opd", "opd", "sft", "kd", "grpo")
# May change without another training; evaluation ties its results to those that decide them
MAY_CHANGE = (
    "benchmarks", "benchmark_data", "eval_limit", "eval_samples", "eval_temperature", "eval_batch_size", "engine",
    "engine_options", "select_checkpoint",
)  # fmt: skip
TEACHER_ROWS = 256  # responses of the teacher between two writes: an engine fills its batch from so many
VARIANTS = {"va": "va_opd", "none": "opd", "rollout": "rollout_only", "token": "token_only"}


@dataclass
class ScriptArguments:
    """What to train on what; the settings of the training itself are [`VAOPDConfig`]'s."""

    model: str = field(metadata={"help": "Student: hub id or local folder."})
    teacher: str = field(metadata={"help": "Teacher: hub id or local folder; same tokenizer."})
    teacher_parity: bool = field(
        default=True, metadata={"help": "With teacher_server: also load the teacher here and compare both once."}
    )
    experiment: str = field(default="geo3k", metadata={"help": "Name of the folder that holds the variants' runs."})
    dataset: str = field(default="geo3k", metadata={"help": "geo3k, virl39k or digits (embedded)."})
    data: str | None = field(default=None, metadata={"help": "Hub id or local folder to read the data set from."})
    validation_data: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of the validation problems."}
    )
    method: str = field(default="va_opd", metadata={"help": "Training method.", "choices": list(METHODS)})
    out: str = field(default="runs", metadata={"help": "Folder of all runs."})
    template: str = field(default="{problem}", metadata={"help": "Prompt; the paper adds nothing to the problem."})
    limit: int | None = field(default=None, metadata={"help": "Use only so many training prompts."})
    validation_size: int = field(default=200, metadata={"help": "Held-out problems (paper: 200)."})
    select_checkpoint: bool = field(
        default=True,
        metadata={"help": "Evaluate the checkpoint that is best on the held-out problems (paper), or the last."},
    )
    min_pixels: int = field(
        default=MIN_PIXELS, metadata={"help": "Smallest area of an image in pixels; smaller ones are enlarged."}
    )
    max_pixels: int = field(
        default=MAX_PIXELS, metadata={"help": "Largest area of an image in pixels; larger ones are reduced."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train a LoRA adapter of this rank; 0 trains all weights."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen weights in 4 bits; with lora_rank."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of student and teacher, such as flash_attention_2."}
    )
    grpo_beta: float = field(default=0.01, metadata={"help": "KL weight of the GRPO baseline (EasyR1's)."})
    eval_samples: int = field(default=8, metadata={"help": "Samples a problem in evaluation (paper: avg@8)."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature in evaluation (paper: 1.0)."})
    eval_batch_size: int = field(default=16, metadata={"help": "Prompts at once in evaluation with transformers."})
    benchmarks: str = field(
        default="", metadata={"help": "Comma list of benchmarks to evaluate on besides the held-out problems."}
    )
    benchmark_data: str | None = field(
        default=None, metadata={"help": "Folder of local benchmark files such as wemath.parquet."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on only so many questions of each benchmark."}
    )
    engine: str = field(
        default="transformers", metadata={"help": "What generates in evaluation.", "choices": ["transformers", "vllm"]}
    )
    engine_options: str = field(
        default="{}", metadata={"help": 'JSON for engine vllm: options of `vllm.LLM`, as {"tensor_parallel_size": 2}.'}
    )
    sample_only: bool = field(
        default=False, metadata={"help": "Sample the teacher's responses for methods sft and kd; train nothing."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print settings and a memory estimate; train nothing."})


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    return run_main("va_opd.train", _main, argv)


def _main(argv: list[str]) -> None:
    args, config = parse(argv)
    if args.dry_run:
        print(dry_run(args, config, *plan.launched()))
    elif args.sample_only:
        sample_teacher(args, config, load_splits_of(args)["train"])
    else:
        train(args, config)


def parse(argv: list[str]) -> tuple[ScriptArguments, VAOPDConfig]:
    """Arguments from `--config FILE.yaml` and `--field value`, the latter winning. `ValueError` for unknown keys."""
    args, config = parse_fields(argv, (ScriptArguments, VAOPDConfig), "va_opd/configs/")
    check_lora(args.lora_rank, args.load_in_4bit)
    json_options("engine_options", args.engine_options)
    if args.method == "opd":
        config.weighting = "none"
    config.output_dir = str(run_path(args, config))
    return args, config


def variant(args: ScriptArguments, config: VAOPDConfig) -> str:
    """Name of what is trained, as in the report: "va_opd", "opd", "token_only", "sft", ..."""
    return VARIANTS[config.weighting] if args.method in ("va_opd", "opd") else args.method


def run_path(args: ScriptArguments, config: VAOPDConfig) -> Path:
    """Folder of the run: OUT/va_opd/EXPERIMENT/VARIANT-seedK."""
    return Path(args.out) / "va_opd" / args.experiment / f"{variant(args, config)}-seed{config.seed}"


def train(args: ScriptArguments, config: VAOPDConfig) -> None:
    """Trains into the run folder, from its last checkpoint if there is one; does nothing if the run is done."""
    set_seed(config.seed)
    splits = load_splits_of(args)
    main_process, done = PartialState().is_main_process, is_done(run_path(args, config))
    PartialState().wait_for_everyone()  # every rank has looked before the first one touches the folder
    if done:
        if main_process:
            open_run(args, config, splits)  # refuses a run with other settings
            print(f"{run_path(args, config)}: done already")
        return
    if main_process:
        versions.announce("va_opd.train")
        print(plan.update_line(config, PartialState().num_processes), flush=True)
    trainer = build_trainer(args, config, splits)  # most mistakes show here, before there is a folder
    with exclusive(run_path(args, config)) if main_process else nullcontext():
        run(args, config, splits, trainer)


def run(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict", trainer: "Trainer") -> None:
    """Trains in the run folder, which no other process touches."""
    checkpoint = resume_point(trainer)  # every rank looks for itself on the shared folder
    folder = open_run(args, config, splits) if PartialState().is_main_process else None
    with folder or nullcontext():
        if folder is not None:
            record(folder, trainer, checkpoint)
        preemption.train(trainer, checkpoint, keep_weights=True)  # the best of them is chosen
        trainer.save_model(str(Path(config.output_dir) / "model"))
        if folder is not None:
            folder.finish()


def record(folder: RunFolder, trainer: "Trainer", checkpoint: Path | None) -> None:
    """Sends the trainer's logs to the folder from here on; lines after the checkpoint will come again."""
    step = int(checkpoint.name.split("-")[-1]) if checkpoint else 0
    folder.truncate_logs(step)
    print(f"{folder.path}: " + (f"resuming at step {step}" if checkpoint else "starting"), flush=True)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RecordCallback(folder, trainer))


def load_splits_of(args: ScriptArguments) -> "DatasetDict":
    """The data of a run: one seed draws the rows, whatever the seed of the training.

    The first process makes the caches that the others read, and checks the images.
    """
    state, size = PartialState(), args.validation_size
    options = {**row_options(args), "check_images": state.is_main_process}
    with state.main_process_first():
        return load_splits(
            args.dataset, args.data, args.validation_data, limit=args.limit, validation_size=size, **options
        )


def load_validation_of(args: ScriptArguments) -> "Dataset":
    """The held-out problems of a run."""
    size = args.validation_size
    return load_validation(args.dataset, args.data, args.validation_data, size, **row_options(args))


def row_options(args: ScriptArguments) -> dict[str, Any]:
    return {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels, "template": args.template}


def open_run(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> RunFolder:
    """The run's folder; `RunFolderError` where it holds a run with other settings or data."""
    prints = {
        name: fingerprint([[row["id"], row["answer"]] for row in rows.select_columns(["id", "answer"])])
        for name, rows in splits.items()
    }
    settings = changed_settings(args, config, (*MAY_CHANGE, *MACHINE_FIELDS))
    free = {name: getattr(args, name) for name in MAY_CHANGE} | machine_settings(config)
    return RunFolder.open(run_path(args, config), settings, data=prints, seed=config.seed, free=free)


def build_trainer(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> "Trainer":
    """The TRL trainer of `args.method` with student, teacher and rows in place."""
    build = partial(_trainer_of_method, args, on_one_gpu(config), splits)
    return with_adapters(build, args.lora_rank, args.load_in_4bit)


def _trainer_of_method(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> "Trainer":
    from trl import GRPOConfig, SFTConfig, SFTTrainer

    from .baselines import ResumableGRPOTrainer
    from .checks import ban_tokens, check_same_tokens
    from .engine import VLLMRollouts
    from .trainer import VAOPDTrainer

    processor = models.load_processor(args.model)
    for rows in splits.values():
        check_texts(_tokenizer(processor), rows)
    student = models.load_model(
        args.model, attn_implementation=args.attn_implementation, load_in_4bit=args.load_in_4bit
    )
    lora = lora_config(args.lora_rank)
    if args.method in ("va_opd", "opd"):
        check_same_tokens(_tokenizer(processor), _tokenizer(models.load_processor(args.teacher)))
        teacher = load_teacher(args, config) if loads_teacher(args, config) else None
        return VAOPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=splits["train"],
            processing_class=processor,
            peft_config=lora,
        )
    if args.method == "grpo":
        if args.grpo_beta and not lora and adapter_base(args.model):
            raise ValueError(
                f"model {args.model!r} holds a LoRA adapter, but TRL would load the KL reference of "
                f"grpo_beta={args.grpo_beta} without it: set grpo_beta to 0, or train a lora_rank above 0"
            )
        settings = shared_settings(ban_tokens(config, processor, student), GRPOConfig)
        grpo = GRPOConfig(
            **settings,
            beta=args.grpo_beta,
            epsilon=0.2,
            loss_type="grpo",
            # vLLM's log-probabilities are within the nucleus, so TRL's ratio, a product over the tokens of a rollout,
            # would take nearly all weight from long ones
            vllm_importance_sampling_correction=False,
        )
        trainer = ResumableGRPOTrainer(
            model=student,  # TRL loads the KL reference by its name, with its dtype and attention
            args=on_one_gpu(grpo),
            reward_funcs=[reward_of(args)],
            train_dataset=splits["train"],
            processing_class=processor,
            peft_config=lora,
        )
        if config.use_vllm:
            VLLMRollouts(trainer.vllm_generation)  # replaces its generate and sync_weights
        return trainer
    return SFTTrainer(
        model=student,
        args=on_one_gpu(SFTConfig(**shared_settings(config, SFTConfig), max_length=None)),
        train_dataset=teacher_rows(args, config, splits["train"]),
        processing_class=processor,
        peft_config=lora,
    )


def check_texts(tokenizer, rows: "Dataset") -> None:
    """Raises `ValueError` for a prompt whose text spells a special token.

    The tokenizer would read it as one: as the end of the turn, or as the place of an image that there is not.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for row in rows.select_columns(["id", "prompt"]):
        text = "\n".join(_words(message["content"]) for message in row["prompt"])
        if found := next((token for token in special if token in text), None):
            raise ValueError(
                f"the prompt of row {row['id']} holds {found}, a special token of the model: put a space into it, or "
                "leave the row out (<image> marks where an image stands)"
            )


def _words(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def loads_teacher(args: ScriptArguments, config: VAOPDConfig) -> bool:
    return args.teacher_parity or not config.teacher_server


def load_teacher(args: ScriptArguments, config: VAOPDConfig) -> "PreTrainedModel":
    """The teacher in the precision in which it scores, still on the CPU."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return models.load_model(args.teacher, dtype=dtype, attn_implementation=args.attn_implementation)


def shared_settings(config: VAOPDConfig, target: type) -> dict[str, Any]:
    """What a baseline has in common with VA-OPD: optimizer, schedule, batch, sampling, seed, logging."""
    names = {f.name for f in dataclasses.fields(target) if f.init} & {
        f.name for f in dataclasses.fields(config) if f.init
    }
    return {name: getattr(config, name) for name in names - {"beta"}}


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


def teacher_rows(args: ScriptArguments, config: VAOPDConfig, rows: "Dataset") -> "Dataset":
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


def sample_teacher(args: ScriptArguments, config: VAOPDConfig, rows: "Dataset") -> Path:
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


def teacher_settings(args: ScriptArguments, config: VAOPDConfig, rows: "Dataset") -> dict[str, Any]:
    """What decides the teacher's responses."""
    names = ("temperature", "top_p", "max_completion_length", "seed")
    return {
        "teacher": args.teacher,
        "engine": args.engine,
        **{name: getattr(config, name) for name in names},
        **data_settings(args),
        "limit": args.limit,
        "data": question_digest(rows),
    }


def data_settings(args: ScriptArguments) -> dict[str, Any]:
    """What is made of a row's text and images."""
    return {name: getattr(args, name) for name in ("dataset", "template", "min_pixels", "max_pixels")}


def question_digest(rows: "Dataset") -> str:
    """Digest of ids, prompts and answers, without the images, which would have to be decoded."""
    columns = rows.select_columns(["id", "prompt", "answer"])
    return fingerprint([[row["id"], row["prompt"], row["answer"]] for row in columns])


def claim(path: Path, settings: dict[str, Any], has_results: bool) -> None:
    """Ties a folder of results to the settings that decide them, which the first call writes to `path`.

    `has_results` is whether the folder holds results, which keep it from being claimed anew.
    Raises `ValueError` where the results are of other settings, or say nothing of them.
    """
    if not has_results:
        atomic_write_json(path, settings)
        return
    try:
        theirs = json.loads(path.read_text()) if path.exists() else {}
        differing = [name for name, value in settings.items() if theirs.get(name, value) != value]
    except (ValueError, AttributeError):
        theirs = {}
    if not theirs:
        raise ValueError(
            f"{path.parent} holds results, but no readable {path.name} that says of which settings: move the folder "
            "away to make them anew"
        )
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path.parent} holds results of {name}={theirs[name]!r}, these settings have {settings[name]!r}: set "
            f"{name} back, or move the folder away to make them anew"
        )


def build_engine(args: ScriptArguments, model: str, config: VAOPDConfig) -> TransformersEngine | VLLMEngine:
    """The engine of `args.engine`, which generates with `model`, a hub id or a local folder; to be closed."""
    if args.engine == "vllm":
        return VLLMEngine(model, **json_options("engine_options", args.engine_options))
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    engine = TransformersEngine(
        models.load_model(model, dtype=dtype, device=config.device), models.load_processor(model), args.eval_batch_size
    )
    engine.name = model  # a merged adapter calls itself by its base
    return engine


class RecordCallback(TrainerCallback):
    """Writes metrics.jsonl and a short line at each log, and for VA-OPD two prompts' rollouts to samples.jsonl."""

    SHOWN = ("loss", "reward", "kl/high", "kl/low", "va/mean", "entropy", "step_time")

    def __init__(self, folder: RunFolder, trainer: "Trainer"):
        self.folder, self.trainer = folder, trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self.folder.log({"step": state.global_step, **logs})
        shown = [f"{name} {logs[name]:.4g}" for name in self.SHOWN if isinstance(logs.get(name), float)]
        if shown:
            print(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown), flush=True)
        rollouts = getattr(self.trainer, "last_rollouts", None)
        if rollouts and "loss" in logs:  # not in the last line, of the whole training
            tokenizer = _tokenizer(self.trainer.processing_class)
            for record in rollout_records(rollouts, tokenizer, 2 * args.num_generations):
                self.folder.log_sample({"step": state.global_step, **record})


def rollout_records(rollouts: dict[str, Any], tokenizer, count: int) -> list[dict[str, Any]]:
    """The first `count` rollouts of `VAOPDTrainer.last_rollouts` as plain records: prompt, tokens, VA, weight."""
    records = []
    for row in range(min(count, len(rollouts["mask"]))):
        valid = rollouts["mask"][row].bool()
        ids = rollouts["completion_ids"][row][valid].tolist()
        records.append(
            {
                "prompt": tokenizer.decode(rollouts["prompt_ids"][row], skip_special_tokens=True),
                "response": tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": [tokenizer.decode([i]) for i in ids],
                "va": [round(v, 5) for v in rollouts["va"][row][valid].tolist()],
                "weight": round(rollouts["weights"][row].item(), 5),
            }
        )
    return records


def _tokenizer(processor):
    return getattr(processor, "tokenizer", processor)


def dry_run(args: ScriptArguments, config: VAOPDConfig, processes: int = 1, sharding: str = "zero2") -> str:
    """Resolved settings, size of an update, memory a process and disk space, as text."""
    lines = plan.settings_lines(run_path(args, config), changed_settings(args, config))
    lines.append(plan.update_line(config, processes))
    student, sharding = models.guess_parameters(args.model), sharding if processes > 1 else "none"
    teacher = models.guess_parameters(args.teacher)
    if student is None or teacher is None:
        return "\n".join([*lines, plan.unknown_line([args.model, args.teacher])])
    parts = memory_parts(args, config, student, teacher, processes, sharding)
    each = plan.bytes_each(sharding, config.bf16)
    count = plan.checkpoint_count(steps_of(args, config, processes), config.save_steps)
    trained = plan.trained_parameters(args.model, student, args.lora_rank)
    disk = plan.disk_line(count, "checkpoints", each.weight * trained, each.states * trained)
    lines += plan.memory_lines(parts, sharding, processes)
    if config.teacher_offload and args.method in ("va_opd", "opd"):
        size = (2 if config.bf16 else 4) * teacher / plan.GIB
        lines.append(f"while the teacher scores: its {size:.2f} GiB in place of gradients, KL tiles and activations")
    return "\n".join([*lines, disk])


def memory_parts(
    args: ScriptArguments, config: VAOPDConfig, student: float, teacher: float, processes: int, sharding: str
) -> dict[str, float]:
    """Bytes by part in one process."""
    from .divergence import TILE_BYTES

    pieces, each = plan.split(sharding, processes), plan.bytes_each(sharding, config.bf16)
    rows, number = config.per_device_train_batch_size * config.gradient_accumulation_steps, 2 if config.bf16 else 4
    trained = plan.trained_parameters(args.model, student, args.lora_rank)
    quantized = plan.in_4_bits(args.model, student, args.load_in_4bit)
    parts = plan.model_bytes("student", student, trained, each, pieces, quantized)
    if args.method in ("va_opd", "opd"):
        if config.teacher_offload:
            shape = plan.shape_of(args.teacher, teacher)
            parts["teacher's output head"] = number * shape.vocabulary * shape.width
        elif loads_teacher(args, config):  # whole on each GPU under FSDP
            cut = processes if sharding == "zero3" else 1
            parts[f"teacher weights, {number} bytes each"] = number * teacher / cut
        if config.teacher_server:  # see objective.token_logps: logits, log-probabilities, gradient; head in float32
            shape = plan.shape_of(args.model, student)
            parts["logits of 1,024 places and the head in float32"] = 4 * shape.vocabulary * (3 * 1024 + shape.width)
        else:
            cache = rows * config.max_completion_length * plan.shape_of(args.teacher, teacher).width
            parts |= {"cached teacher hidden states": number * cache, "KL tiles": TILE_BYTES}
    elif args.method == "grpo" and args.grpo_beta and not args.lora_rank:  # else the student without its adapter
        parts["KL reference"] = each.weight * student / pieces.weights
    if args.method in ("sft", "kd"):  # no rollouts
        return parts
    return {**parts, **plan.generation_bytes(config, plan.shape_of(args.model, student), each.weight)}


def steps_of(args: ScriptArguments, config: VAOPDConfig, processes: int) -> int | None:
    """Updates of a run; None where the number of rows is known only when they are loaded."""
    if config.max_steps > 0:
        return config.max_steps
    published = SOURCES[args.dataset].rows["train"] if args.dataset in SOURCES and not args.data else None
    rows = args.limit or published
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    return rows and int(config.num_train_epochs * (rows // max(1, rollouts // config.num_generations)))


if __name__ == "__main__":
    sys.exit(main())
