"""Trains one variant of the VA-OPD paper (arXiv 2605.21924) into a run folder; resumes where it stopped.

    python -m va_opd.train --config va_opd/configs/geo3k_single_gpu.yaml                                      # one GPU
    accelerate launch --config_file zero2.yaml --num_processes 8 -m va_opd.train --config va_opd/configs/geo3k.yaml
    python -m va_opd.train --config va_opd/configs/geo3k.yaml --dry_run true       # resolved settings and memory

`--method`: va_opd (with `--weighting va|rollout|token|none`), opd (= va_opd with weighting none), sft, kd, grpo.
Deviations from the paper: va_opd/README.md; its numbers: benchmarks/va_opd.py.
The whole experiment: `python -m va_opd.loop`.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from common import models, plan
    from common.cli import (
        MACHINE_FIELDS,
        changed_settings,
        machine_settings,
        parse_fields,
        read_config,
        run_main,
        split_config,
    )
    from common.evaluation import json_options
    from common.lora import adapter_base, check_lora, lora_config, with_adapters
    from common.rewards import REWARDS, check_reward, reward_file
    from common.runs import RunFolder, fingerprint
    from common.stages import on_one_gpu
    from common.training import RunArguments, RunLog, row_fingerprints, train_run

    from .data import SOURCES, check_dataset, load_splits, load_validation, reward_of, sample_teacher, teacher_rows
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "common":
        raise
    sys.exit("va_opd.train also needs the folder common/ of the project beside va_opd/; the trainer alone does not")

import torch
from accelerate import PartialState
from transformers import set_seed

from .config import VAOPDConfig
from .images import MAX_PIXELS, MIN_PIXELS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, Trainer

METHODS = ("va_opd", "opd", "sft", "kd", "grpo")
GIVEN_RESPONSES = ("sft", "kd")  # of the teacher; the others train on rollouts
# May change without another training; evaluation ties its results to those that decide them
MAY_CHANGE = (
    "benchmarks", "benchmark_data", "eval_limit", "eval_samples", "eval_temperature", "eval_batch_size", "engine",
    "engine_options", "select_checkpoint",
    "max_prompt_length", "teacher_parity", "teacher_parity_limit",  # at most they end a run
)  # fmt: skip
VARIANTS = {"va": "va_opd", "none": "opd", "rollout": "rollout_only", "token": "token_only"}


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """What to train on what, beside `RunArguments`; the settings of the training itself are [`VAOPDConfig`]'s."""

    teacher: str = field(metadata={"help": "Teacher: hub id or local folder; same tokenizer."})
    teacher_parity: bool = field(
        default=True, metadata={"help": "With teacher_server: also load the teacher here and compare both once."}
    )
    experiment: str = field(default="geo3k", metadata={"help": "Name of the folder that holds the variants' runs."})
    dataset: str = field(default="geo3k", metadata={"help": "geo3k, virl39k, digits (embedded) or own (in `data`)."})
    reward: str | None = field(
        default=None, metadata={"help": f"What scores dataset own: {', '.join(REWARDS)} or FILE.py:FUNCTION."}
    )
    validation_data: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of the validation problems."}
    )
    method: str = field(default="va_opd", metadata={"help": "Training method.", "choices": list(METHODS)})
    template: str = field(default="{problem}", metadata={"help": "Prompt; the paper adds nothing to the problem."})
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
    grpo_beta: float = field(default=0.01, metadata={"help": "KL weight of the GRPO baseline (EasyR1's)."})
    eval_samples: int = field(default=8, metadata={"help": "Samples a problem in evaluation (paper: avg@8)."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature in evaluation (paper: 1.0)."})
    benchmarks: str = field(
        default="", metadata={"help": "Comma list of benchmarks to evaluate on besides the held-out problems."}
    )
    benchmark_data: str | None = field(
        default=None, metadata={"help": "Folder of local benchmark files such as wemath.parquet."}
    )
    sample_only: bool = field(
        default=False, metadata={"help": "Sample the teacher's responses for methods sft and kd; train nothing."}
    )


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
    classes = ScriptArguments, VAOPDConfig
    opd = ["--weighting", "none"] if method_of(argv) == "opd" else []
    args, config = parse_fields([*argv, *opd], classes, "va_opd/configs/")
    check_dataset(args.dataset, args.data or args.validation_data)
    check_reward(args.dataset, args.reward)
    check_lora(args.lora_rank, args.load_in_4bit)
    json_options("engine_options", args.engine_options)
    if args.method in GIVEN_RESPONSES and config.chat_template_kwargs:
        raise ValueError(
            f"method {args.method} cannot have chat_template_kwargs={config.chat_template_kwargs!r}: TRL's SFTTrainer "
            "renders prompts with images without them; leave them out, or the methods sft and kd"
        )
    config.output_dir = str(run_path(args, config))
    return args, config


def method_of(argv: list[str]) -> str | None:
    """`--method` of a command line, else that of its config file, before what it decides of the fields is checked."""
    path, words = split_config(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=read_config(path, "va_opd/configs/").get("method") if path else None)
    return parser.parse_known_args(words)[0].method


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
    train_run(
        "va_opd.train",
        run_path(args, config),
        config,
        open_run=partial(open_run, args, config, splits),
        build_trainer=partial(build_trainer, args, config, splits),
        log=VAOPDLog,
        rollouts=args.method not in GIVEN_RESPONSES,
    )


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
    """What is made of the text and the images of each row, and what has to be able to use its answer."""
    return {
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
        "template": args.template,
        "reward": args.reward,
    }


def open_run(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> RunFolder:
    """The run's folder; `ValueError` where it holds a run with other settings, data or models to begin with."""
    unset = () if args.reward else ("reward",)  # runs that began before there was this field have none
    settings = changed_settings(args, config, (*MAY_CHANGE, *MACHINE_FIELDS, *unset))
    free = {name: getattr(args if hasattr(args, name) else config, name) for name in MAY_CHANGE}
    free |= machine_settings(config)
    data, models = row_fingerprints(splits), {"model": args.model, "teacher": args.teacher}
    if file := reward_file(args.reward):
        data["reward's file"] = fingerprint(file)
    return RunFolder.open(run_path(args, config), settings, data=data, seed=config.seed, free=free, models=models)


def build_trainer(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> "Trainer":
    """The TRL trainer of `args.method` with student, teacher and rows in place."""
    build = partial(_trainer_of_method, args, on_one_gpu(config), splits)
    return with_adapters(build, args.lora_rank, args.load_in_4bit)


def _trainer_of_method(args: ScriptArguments, config: VAOPDConfig, splits: "DatasetDict") -> "Trainer":
    processor = models.load_processor(args.model)
    for rows in splits.values():
        check_texts(_tokenizer(processor), rows)
    student = models.load_model(
        args.model, attn_implementation=args.attn_implementation, load_in_4bit=args.load_in_4bit
    )
    parts = {
        "model": student,
        "train_dataset": splits["train"],
        "processing_class": processor,
        "peft_config": lora_config(args.lora_rank),
    }
    build = {"grpo": _grpo_trainer, "sft": _sft_trainer, "kd": _sft_trainer}.get(args.method, _distillation_trainer)
    return build(args, config, parts)


def _distillation_trainer(args: ScriptArguments, config: VAOPDConfig, parts: dict[str, Any]) -> "Trainer":
    from .checks import check_same_tokens
    from .trainer import VAOPDTrainer

    check_same_tokens(_tokenizer(parts["processing_class"]), _tokenizer(models.load_processor(args.teacher)))
    teacher = load_teacher(args, config) if loads_teacher(args, config) else None
    return VAOPDTrainer(teacher_model=teacher, args=config, **parts)


def _grpo_trainer(args: ScriptArguments, config: VAOPDConfig, parts: dict[str, Any]) -> "Trainer":
    from trl import GRPOConfig

    from .baselines import ResumableGRPOTrainer
    from .checks import ban_tokens
    from .engine import VLLMRollouts

    if args.grpo_beta and not args.lora_rank and adapter_base(args.model):
        raise ValueError(
            f"model {args.model!r} holds a LoRA adapter, but TRL would load the KL reference of "
            f"grpo_beta={args.grpo_beta} without it: set grpo_beta to 0, or train a lora_rank above 0"
        )
    config = ban_tokens(config, parts["processing_class"], parts["model"])
    grpo = GRPOConfig(
        **shared_settings(config, GRPOConfig),
        beta=args.grpo_beta,
        epsilon=0.2,
        loss_type="grpo",
        # vLLM's log-probabilities are within the nucleus, so TRL's ratio, a product over the tokens of a rollout,
        # would take nearly all weight from long ones
        vllm_importance_sampling_correction=False,
    )
    # TRL loads the KL reference by the name of the student, with its dtype and attention
    trainer = ResumableGRPOTrainer(args=on_one_gpu(grpo), reward_funcs=[reward_of(args)], **parts)
    if config.use_vllm:
        VLLMRollouts(trainer.vllm_generation)  # replaces its generate and sync_weights
    return trainer


def _sft_trainer(args: ScriptArguments, config: VAOPDConfig, parts: dict[str, Any]) -> "Trainer":
    from trl import SFTConfig

    from .baselines import ResumableSFTTrainer
    from .rope import exact_frequencies

    exact_frequencies(parts["model"])
    parts = {**parts, "train_dataset": teacher_rows(args, config, parts["train_dataset"])}
    settings = SFTConfig(**shared_settings(config, SFTConfig), max_length=None)
    return ResumableSFTTrainer(args=on_one_gpu(settings), **parts)


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
    """Whether the teacher is loaded here: not where a server has it and nothing is compared."""
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


class VAOPDLog(RunLog):
    """Writes two prompts' rollouts to samples.jsonl, where the trainer is VA-OPD's."""

    SHOWN = ("loss", "reward", "kl/high", "kl/low", "va/mean", "entropy", "step_time")

    def rollouts(self) -> list[dict[str, Any]]:
        rollouts = getattr(self.trainer, "last_rollouts", None)
        if not rollouts:
            return []
        count = 2 * self.trainer.args.num_generations
        return rollout_records(rollouts, _tokenizer(self.trainer.processing_class), count)


def rollout_records(rollouts: dict[str, Any], tokenizer, count: int) -> list[dict[str, Any]]:
    """The first `count` rollouts of `VAOPDTrainer.last_rollouts` as plain records: prompt, tokens, VA if it was
    measured, weight."""
    records, va = [], rollouts["va"]
    for row in range(min(count, len(rollouts["mask"]))):
        valid = rollouts["mask"][row].bool()
        ids = rollouts["completion_ids"][row][valid].tolist()
        records.append(
            {
                "prompt": tokenizer.decode(rollouts["prompt_ids"][row], skip_special_tokens=True),
                "response": tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": [tokenizer.decode([i]) for i in ids],
                **({} if va is None else {"va": [round(v, 5) for v in va[row][valid].tolist()]}),
                "weight": round(rollouts["weights"][row].item(), 5),
            }
        )
    return records


def _tokenizer(processor):
    return getattr(processor, "tokenizer", processor)


def dry_run(args: ScriptArguments, config: VAOPDConfig, processes: int = 1, sharding: str = "zero2") -> str:
    """Resolved settings, size of an update, memory a process and disk space, as text."""
    if args.method not in GIVEN_RESPONSES:
        config.prompts_of_a_step(processes)
    lines = plan.settings_lines(run_path(args, config), changed_settings(args, config))
    lines.append(plan.update_line(config, processes, args.method not in GIVEN_RESPONSES))
    sizes = {name: models.guess_parameters(name) for name in (args.model, args.teacher)}
    if unknown := [name for name, size in sizes.items() if size is None]:
        return "\n".join([*lines, plan.unknown_line(unknown)])
    student, teacher, sharding = sizes[args.model], sizes[args.teacher], sharding if processes > 1 else "none"
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
    if args.method in GIVEN_RESPONSES:
        return parts
    return {**parts, **plan.generation_bytes(config, plan.shape_of(args.model, student), each.weight)}


def steps_of(args: ScriptArguments, config: VAOPDConfig, processes: int) -> int | None:
    """Updates of a run; None where the number of rows is known only when they are loaded."""
    if config.max_steps > 0:
        return config.max_steps
    published = SOURCES[args.dataset].rows["train"] if args.dataset in SOURCES and not args.data else None
    rows = args.limit or published
    if rows is None:
        return None
    if args.method in GIVEN_RESPONSES:  # one a prompt; the last update of an epoch may have fewer
        responses = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
        return math.ceil(config.num_train_epochs * math.ceil(rows / responses))
    return math.ceil(config.num_train_epochs * (rows // config.prompts_of_a_step(processes)))


if __name__ == "__main__":
    sys.exit(main())
