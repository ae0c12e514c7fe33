"""Trains one variant of the SRPO paper (arXiv 2604.02288) into a run folder; resumes where it stopped.

    python -m srpo.train --config srpo/configs/single_gpu.yaml                                             # one GPU
    accelerate launch --config_file zero3.yaml --num_processes 8 -m srpo.train --config srpo/configs/qwen3_8b.yaml
    python -m srpo.train --config srpo/configs/qwen3_8b.yaml --dry_run            # resolved settings and memory

`--routing`: srpo, grpo, sdpo, sdpo_incorrect, sdpo_correct, mix; `--entropy_beta 0` is SRPO without dynamic weighting.
Deviations from the paper: srpo/README.md; its numbers: benchmarks/srpo.py.
The whole experiment: `python -m srpo.loop`.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from common import models, plan
    from common.cli import MACHINE_FIELDS, changed_settings, machine_settings, parse_fields, run_main
    from common.evaluation import json_options
    from common.lora import check_lora, lora_config, with_adapters
    from common.rewards import REWARDS, check_reward, reward_file
    from common.runs import RunFolder, fingerprint
    from common.stages import on_one_gpu
    from common.training import RunArguments, RunLog, row_fingerprints, train_run
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "common":
        raise
    sys.exit("srpo.train also needs the folder common/ of the project beside srpo/; the trainer alone does not")

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from .config import SRPOConfig
from .data import check_dataset, load_splits, others, reward_of

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .trainer import SRPOTrainer

ROUTES = {"grpo": "grpo", "sdpo": "distill"}  # label in samples.jsonl: rows with the loss
# TRL sets the first from the batch, and refuses both; the second only says what a GRPO batch's own fields have to be
DERIVED = ("generation_batch_size", "grpo_steps")
# May change without another training; evaluation ties its results to those that decide them. Not max_prompt_length,
# which decides what rows `short_prompts` keeps
MAY_CHANGE = (
    "engine", "engine_options", "eval_batch_size", "eval_samples", "eval_temperature", "eval_top_p", "eval_limit",
    "drop_evaluated",
)  # fmt: skip


@dataclass(kw_only=True)
class ScriptArguments(RunArguments):
    """What to train on what, beside `RunArguments`; the settings of the training itself are [`SRPOConfig`]'s."""

    experiment: str = field(default="qwen3_8b", metadata={"help": "Name of the folder that holds the variants' runs."})
    dataset: str = field(
        default="chemistry",
        metadata={"help": "chemistry, physics, biology, materials, tooluse, additions (embedded) or own (in `data`)."},
    )
    reward: str | None = field(
        default=None, metadata={"help": f"Of dataset own: {', '.join(REWARDS)} or FILE.py:FUNCTION."}
    )
    strict: bool = field(default=False, metadata={"help": "Strict scorer in place of the one of the SDPO release."})
    policy_dtype: str = field(default="float32", metadata={"help": "Weights of the policy: float32 or bfloat16."})
    grpo_steps: int = field(
        default=4, metadata={"help": "Optimizer steps a generation batch of routing grpo (Table 3: 4)."}
    )
    eval_samples: int = field(default=16, metadata={"help": "Samples a problem in evaluation (paper: avg@16)."})
    eval_temperature: float = field(default=0.6, metadata={"help": "Temperature in evaluation (paper: 0.6)."})
    eval_top_p: float = field(default=0.95, metadata={"help": "Top-p in evaluation (paper: 0.95)."})
    drop_evaluated: bool = field(
        default=False,
        metadata={
            "help": "Once a checkpoint of a finished run is evaluated, delete its weights, except the last one's, and "
            "what only resuming needs; `srpo.loop` then evaluates each run before the next one trains."
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    return run_main("srpo.train", _main, argv)


def _main(argv: list[str]) -> None:
    args, config = parse(argv)
    if args.dry_run:
        print(dry_run(args, config, *plan.launched()))
    else:
        train(args, config)


def parse(argv: list[str]) -> tuple[ScriptArguments, SRPOConfig]:
    """Arguments from `--config FILE.yaml` and `--field value`, the latter winning; with routing grpo in `grpo_steps`
    steps a batch. `ValueError` for unknown keys."""
    args, config = parse_fields(argv, (ScriptArguments, SRPOConfig), "srpo/configs/")
    if config.routing == "grpo" and (split := split_batch(config, args.grpo_steps)):
        args, config = parse_fields([*argv, *split], (ScriptArguments, SRPOConfig), "srpo/configs/")
    if args.policy_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"policy_dtype must be float32 or bfloat16, got {args.policy_dtype!r}")
    check_dataset(args.dataset)
    check_reward(args.dataset, args.reward)
    if args.dataset == "own" and args.strict:
        raise ValueError("strict chooses between the scorers of the paper's sets: leave it out with dataset=own")
    check_lora(args.lora_rank, args.load_in_4bit)
    json_options("engine_options", args.engine_options)
    config.output_dir = str(run_path(args, config))
    return args, config


def split_batch(config: SRPOConfig, steps: int) -> list[str]:
    """Flags for `steps` optimizer steps a generation batch, if it has others; the batch stays as it is.

    The paper's steps, of warm-up too, are batches; TRL's are optimizer steps. `ValueError` where it does not divide.
    """
    accumulation, rows = config.gradient_accumulation_steps, config.per_device_train_batch_size
    now = config.num_iterations * config.steps_per_generation / accumulation
    if now == steps:
        return []
    if now != 1:
        raise ValueError(
            f"the config's batch takes {now:g} optimizer steps already, grpo_steps={steps}: set steps_per_generation "
            f"to gradient_accumulation_steps={accumulation}, or grpo_steps"
        )
    if accumulation % steps == 0:
        split = {"steps_per_generation": accumulation, "gradient_accumulation_steps": accumulation // steps}
    elif rows % steps == 0:
        split = {"steps_per_generation": steps * accumulation, "per_device_train_batch_size": rows // steps}
    else:
        raise ValueError(
            f"neither gradient_accumulation_steps={accumulation} nor per_device_train_batch_size={rows} is a multiple "
            f"of grpo_steps={steps}, which GRPO takes a generation batch: change one of them"
        )
    counts = {name: getattr(config, name) for name in ("max_steps", "save_steps", "warmup_steps")}
    split |= {name: int(steps * count) for name, count in counts.items() if count >= 1}  # below, a share of all steps
    return [word for name, value in split.items() for word in (f"--{name}", str(value))]


def variant(config: SRPOConfig) -> str:
    """Name of what is trained, as in the report: "srpo", "srpo_no_dw", "grpo", ..."""
    return "srpo_no_dw" if config.routing == "srpo" and config.entropy_beta == 0 else config.routing


def run_path(args: ScriptArguments, config: SRPOConfig) -> Path:
    """Folder of the run: OUT/srpo/EXPERIMENT-DATASET/VARIANT-seedK."""
    experiment = Path(args.out) / "srpo" / f"{args.experiment}-{args.dataset}"
    return experiment / f"{variant(config)}-seed{config.seed}"


def train(args: ScriptArguments, config: SRPOConfig) -> None:
    """Trains into the run folder, from its last checkpoint if there is one; does nothing if the run is done."""
    set_seed(config.seed)
    splits = load_splits_of(args)
    train_run(
        "srpo.train",
        run_path(args, config),
        config,
        open_run=partial(open_run, args, config, splits),
        build_trainer=partial(build_trainer, args, config, splits),
        log=SRPOLog,
    )


def load_splits_of(args: ScriptArguments) -> "DatasetDict":
    """The data of a run: the same rows whatever the seed of the training."""
    return load_splits(args.dataset, args.data, limit=args.limit, reward=args.reward)


def open_run(args: ScriptArguments, config: SRPOConfig, splits) -> RunFolder:
    """The run's folder; `ValueError` where it holds a run with other settings, data or models to begin with."""
    data = row_fingerprints(splits, others(splits))
    if file := reward_file(args.reward):
        data["reward's file"] = fingerprint(file)
    unset = () if args.reward else ("reward",)  # runs that began before there was this field have none
    return RunFolder.open(
        run_path(args, config),
        changed_settings(args, config, (*DERIVED, *MAY_CHANGE, *MACHINE_FIELDS, *unset)),
        data=data,
        seed=config.seed,
        free={name: getattr(args, name) for name in ("grpo_steps", *MAY_CHANGE)} | machine_settings(config),
        models={"model": args.model},
    )


def build_trainer(args: ScriptArguments, config: SRPOConfig, splits) -> "SRPOTrainer":
    """The trainer with policy, reward and rows in place."""
    from .trainer import SRPOTrainer

    tokenizer = models.load_processor(args.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"model {args.model!r} reads images, and SRPO is for text: choose a text model")
    rows = short_prompts(splits["train"], tokenizer, config)
    policy = models.load_model(
        args.model,
        dtype=getattr(torch, args.policy_dtype),
        attn_implementation=args.attn_implementation,
        load_in_4bit=args.load_in_4bit,
    )
    build = partial(
        SRPOTrainer,
        policy,
        reward_of(args.dataset, args.strict, args.reward),
        on_one_gpu(config),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(args.lora_rank),
    )
    return with_adapters(build, args.lora_rank, args.load_in_4bit)


def short_prompts(rows, tokenizer, config: SRPOConfig):
    """Rows whose prompt fits `max_prompt_length`; the others are counted, in the paper's data there are none."""
    options = {"add_generation_prompt": True, **config.chat_template_kwargs}
    lengths = [len(tokenizer.apply_chat_template(prompt, **options)["input_ids"]) for prompt in rows["prompt"]]
    kept = [i for i, length in enumerate(lengths) if length <= config.max_prompt_length]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} prompts exceed {config.max_prompt_length} tokens: left out")
    if not kept:
        raise ValueError(
            f"no prompt fits max_prompt_length={config.max_prompt_length}; the shortest has {min(lengths)}"
        )
    return rows.select(kept)


class SRPOLog(RunLog):
    """Writes two prompts' rollouts to samples.jsonl."""

    SHOWN = ("loss", "reward", "route/sdpo", "teacher/entropy", "completions/mean_length", "step_time")

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs)
        self.trainer.last_rollouts = {}  # GRPO takes several steps on them

    def rollouts(self) -> list[dict[str, Any]]:
        return rollout_records(self.trainer.last_rollouts, 2 * self.trainer.args.num_generations)


def rollout_records(rollouts: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first `count` rollouts of `SRPOTrainer.last_rollouts` as plain records."""
    if not rollouts:
        return []
    return [
        {
            "prompt": rollouts["prompts"][row],
            "response": rollouts["texts"][row],
            "reward": round(float(rollouts["rewards"][row]), 5),
            "route": "+".join(name for name, key in ROUTES.items() if rollouts[key][row]) or "none",
            "donor": int(rollouts["donor"][row]),
        }
        for row in range(min(count, len(rollouts["texts"])))
    ]


def dry_run(args: ScriptArguments, config: SRPOConfig, processes: int = 1, sharding: str = "none") -> str:
    """Resolved settings, size of an update, memory a process and disk space, as text."""
    lines = plan.settings_lines(run_path(args, config), changed_settings(args, config, DERIVED))
    lines.append(plan.update_line(config, processes))
    parameters, sharding = models.guess_parameters(args.model), sharding if processes > 1 else "none"
    if parameters is None:
        return "\n".join([*lines, plan.unknown_line([args.model])])
    parts = memory_parts(args, config, parameters, processes, sharding)
    count, each, resume = checkpoint_sizes(args, config, parameters, sharding)
    lines += [*plan.memory_lines(parts, sharding, processes), plan.disk_line(count, "checkpoints", each, resume)]
    return "\n".join(lines)


def memory_parts(
    args: ScriptArguments, config: SRPOConfig, parameters: float, processes: int, sharding: str
) -> dict[str, float]:
    """Bytes by part in one process."""
    from .divergence import TILE_BYTES

    shape, pieces = plan.shape_of(args.model, parameters), plan.split(sharding, processes)
    each = plan.bytes_each(sharding, config.bf16, args.policy_dtype)
    zero3 = sharding == "zero3"  # the float32 average is then beside a copy in the policy's dtype; both are cut
    average = 4 + (each.weight if zero3 else 0)
    teacher_bytes = {"ema": average, "frozen": 0 if args.lora_rank else each.weight, "current": 0}[config.teacher]
    teacher_bytes = 0 if config.routing == "grpo" else teacher_bytes
    # Offloaded, only its head stays
    held = shape.width * shape.vocabulary if config.teacher_offload else averaged_parameters(args, parameters)
    held /= processes if sharding in ("zero3", "fsdp2") else 1
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = config.per_device_train_batch_size * config.max_completion_length
    quantized = plan.in_4_bits(args.model, parameters, args.load_in_4bit)
    # Of the dtype of the teacher's last norm, which autocast leaves as it is: a float32 copy gives float32 states
    hidden = shape.width * (4 if config.teacher == "ema" and not zero3 else each.weight)
    routed = 0.4 * rows * min(800, config.max_completion_length)
    return {
        **plan.model_bytes("policy", parameters, trained_parameters(args, parameters), each, pieces, quantized),
        f"self-teacher, {config.teacher}": teacher_bytes * held,
        "cached teacher hidden states, 40 % routed, mean length up to 800": hidden * routed,
        "one chunk of logits and its gradients": min(2 * 4 * tokens * shape.vocabulary, TILE_BYTES),
        **plan.generation_bytes(config, shape, each.weight),
    }


def trained_parameters(args: ScriptArguments, parameters: float) -> float:
    """Parameters that the optimizer has: with LoRA those of the adapter."""
    return plan.trained_parameters(args.model, parameters, args.lora_rank)


def averaged_parameters(args: ScriptArguments, parameters: float) -> float:
    """Parameters that an EMA teacher averages: all, with QLoRA those of the adapter."""
    return trained_parameters(args, parameters) if args.load_in_4bit else parameters


def checkpoint_sizes(
    args: ScriptArguments, config: SRPOConfig, parameters: float, sharding: str
) -> tuple[int | None, float, float]:
    """How many checkpoints stay, the bytes of their weights, which evaluation needs, and what only resuming needs of
    the newest."""
    each, trained = plan.bytes_each(sharding, config.bf16, args.policy_dtype), trained_parameters(args, parameters)
    averages = config.routing != "grpo" and config.teacher == "ema"
    average = averages * 4 * averaged_parameters(args, parameters)
    count = plan.checkpoint_count(config.max_steps, config.save_steps)
    return count, each.weight * trained, each.states * trained + average


if __name__ == "__main__":
    sys.exit(main())
