"""Trains one phase of a self-play iteration: the Challenger, or the Solver on its questions. `r_diverse.loop` runs it.

    python -m r_diverse.train challenger --iteration 2 --config r_diverse/configs/tiny.yaml
    accelerate launch ... -m r_diverse.train solver --iteration 2 --config r_diverse/configs/qwen3_4b.yaml

A phase resumes from its last checkpoint and does nothing when it is done. The settings of a phase are the sections
`challenger:` and `solver:` of the config, `--challenger.field value` on the command line.
Deviations from the paper (arXiv 2602.13103): r_diverse/README.md; its numbers: benchmarks/r_diverse.py.
"""

from __future__ import annotations  # the trainer is imported where it is used: `--help` needs none

import argparse
import dataclasses
import inspect
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    from common import models, plan, preemption
    from common.checkpoints import resume_point
    from common.cli import (
        MACHINE_FIELDS,
        changed_fields,
        machine_settings,
        parse_fields,
        read_config,
        run_main,
        split_config,
    )
    from common.evaluation import Engine, Prompt, ServerEngine, TransformersEngine
    from common.lora import check_lora, lora_config, with_adapters
    from common.runs import exclusive, read_jsonl
    from common.stages import on_one_gpu
    from common.training import RunLog, step_of

    from .data import (
        BATCH,
        answer_decoding,
        answer_of,
        boxed_reward,
        challenger_rows,
        label_reward,
        ready_to_compare,
        same,
        solver_rows,
    )
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "common":
        raise
    sys.exit("r_diverse.train also needs the folder common/ of the project beside r_diverse/; the trainer does not")

import torch
from accelerate import PartialState
from transformers import AutoConfig, PrinterCallback, set_seed
from transformers.integrations import deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .config import UPDATES, ChallengerConfig, PhaseConfig, RDiverseConfig, SolverConfig
from .memory import MemoryBank
from .questions import PLAIN_TEMPLATE, solver_prompt
from .skills import ModelCoder, SentenceEncoder, SkillEncoder, minilm
from .turns import turn_end_id

if TYPE_CHECKING:
    from .reward import ChallengerReward
    from .trainer import PhaseTrainer

PHASES = ("challenger", "solver")
CONFIGS = "r_diverse/configs/"


class Settings(NamedTuple):
    """A run's settings and those of its phases; the other flags and the content of `--config` that they are from."""

    run: RDiverseConfig
    challenger: ChallengerConfig
    solver: SolverConfig
    argv: list[str]
    config: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """What defines the run, as plain values: every field of the run, and the changed ones of its phases."""
        run = {name: value for name, value in dataclasses.asdict(self.run).items() if name not in MAY_CHANGE}
        return run | {name: _changed(getattr(self, name)) for name in PHASES}

    def free(self) -> dict[str, Any]:
        """The fields of the run that may change while it waits, but those of the command itself."""
        run = {name: getattr(self.run, name) for name in MAY_CHANGE if name not in ("out", "dry_run")}
        phases = {name: machine_settings(getattr(self, name)) for name in PHASES}
        return run | {f"{name}.{key}": value for name, fields in phases.items() for key, value in fields.items()}


def _changed(phase: PhaseConfig) -> dict[str, Any]:
    updates = {"steps_per_generation": phase.steps_per_generation}
    followed = phase.steps_per_generation == UPDATES * phase.gradient_accumulation_steps
    return changed_fields(phase, (*DERIVED, *MACHINE_FIELDS)) | ({} if followed else updates)


# Not part of what a run is: how far it goes, when it gives up, where it is, and the machine
MAY_CHANGE = (
    "iterations", "max_rounds", "alarm", "alarm_duplicates", "alarm_cluster", "alarm_yield", "alarm_labels",
    "alarm_entropy", "out", "data", "dry_run", "sharding", "engine_memory", "reward_memory",
    "server_tensor_parallel", "max_model_len", "engine_batch",
)  # fmt: skip
# Of a phase's fields those that are made from others
DERIVED = (
    "generation_batch_size", "steps_per_generation", "use_cpu", "output_dir", "dataloader_pin_memory",
    "chat_template_kwargs",
)  # fmt: skip
# Of a phase's fields those that the run decides, and what to do instead
OF_THE_RUN = {
    "seed": "set seed of the run, from which each phase makes its own",
    "output_dir": "set out and experiment of the run, in whose folder a phase has its own",
    "resume_from_checkpoint": "a phase resumes from its own last checkpoint",
    "chat_template_kwargs": "set it of the run, whose phases and engines all have it",
    "eval_strategy": "a phase has no rows for it; set benchmarks of the run, evaluated after each iteration",
}


def parse(argv: list[str], phase: str = "challenger") -> Settings:
    """Settings from `--config FILE.yaml` and flags, the latter winning. `ValueError` for unknown keys.

    `phase` is the one that this process trains: what is made first sets up the processes, with its `ddp_timeout`.
    """
    if {"-h", "--help"}.intersection(argv):
        print(inspect.cleandoc(RDiverseConfig.__doc__))
        sys.exit(0)
    path, argv = split_config(argv)
    config = {} if path is None else read_config(path, CONFIGS)
    given, flags = _fields_by_section(config), _flags_by_section(argv)
    known, of_phases = ({f.name for f in dataclasses.fields(cls)} for cls in (RDiverseConfig, PhaseConfig))
    for key in _names(given["run"], flags["run"]) & (of_phases - known):
        raise ValueError(f"{key} is a field of the phases: set challenger.{key} or solver.{key}, or both")
    (run,) = parse_fields(flags["run"], (RDiverseConfig,), CONFIGS, given["run"])
    check_lora(run.lora_rank, run.load_in_4bit)
    _check_adapter(run, run.gpus > 1 and run.sharding == "zero3")
    kinds = {"challenger": ChallengerConfig, "solver": SolverConfig}
    order = sorted(PHASES, key=lambda name: name != phase)
    phases = {name: _phase(name, kinds[name], given[name], flags[name], run) for name in order}
    return Settings(run, phases["challenger"], phases["solver"], argv, config)


def _check_adapter(run: RDiverseConfig, zero3: bool) -> None:
    """Raises `ValueError` for LoRA in a phase under ZeRO-3."""
    if run.lora_rank and zero3:
        raise ValueError(
            f"lora_rank={run.lora_rank} does not run under zero3, where the adapter could not be merged: use sharding "
            "zero2"
        )


def _phase(
    name: str, kind: type[PhaseConfig], given: dict[str, Any], flags: list[str], run: RDiverseConfig
) -> PhaseConfig:
    """Settings of a phase. `ValueError`, with its name, for what it cannot be in this run."""
    _check_of_the_run(name, _names(given, flags), run)
    flags += [] if torch.cuda.is_available() else ["--use_cpu=true"]  # bf16 settings can be looked at
    try:
        (phase,) = parse_fields(flags, (kind,), CONFIGS, given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    phase.chat_template_kwargs = run.chat_template_kwargs or None  # else it is trained otherwise than asked
    return phase


def _fields_by_section(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a config file: of the run, and of each phase, in its section or under dotted names."""
    fields = {name: {} for name in ("run", *PHASES)}
    for key, value in config.items():
        section, _, field = str(key).rpartition(".")
        if key in PHASES:
            if not isinstance(value, dict | None):
                raise ValueError(f"section {key!r} of the config must map fields to values, got {value!r}")
            fields[key] |= value or {}
        elif section in PHASES:
            fields[section][field] = value
        else:
            fields["run"][key] = value
    return fields


def _flags_by_section(argv: list[str]) -> dict[str, list[str]]:
    """The flags `--field=value` of a command line: of the run, and of each phase, whose are `--phase.field`."""
    flags, rest = {name: [] for name in ("run", *PHASES)}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no flag: write --field value")
        key, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)  # else no value: true for a switch, an error for other fields
        section, dot, field = key.rpartition(".")
        if dot and section not in PHASES:
            raise ValueError(f"unknown section {section!r} in --{key}; choose among {', '.join(PHASES)}")
        flags[section or "run"].append(f"--{field}{equals}{value}")
    return flags


def _names(given: dict[str, Any], flags: list[str]) -> set[str]:
    """The fields that a config file or flags set."""
    return {*given, *(flag[2:].partition("=")[0].replace("-", "_") for flag in flags)}


def _check_of_the_run(name: str, given: set[str], run: RDiverseConfig) -> None:
    """`ValueError` for fields of a phase that would be ignored, or be counted on another number of processes."""
    for field in OF_THE_RUN.keys() & given:
        raise ValueError(f"{name}.{field} cannot be set: {OF_THE_RUN[field]}")
    if "generation_batch_size" in given and run.gpus > 1:
        raise ValueError(
            f"{name}.generation_batch_size with gpus={run.gpus}: set {name}.steps_per_generation instead, which does "
            "not depend on the number of processes"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Where a run is


class Sources(NamedTuple):
    """Models and questions that an iteration starts from."""

    challenger: str
    solver: str
    questions: Path


def variant(run: RDiverseConfig) -> str:
    """Name of the run's folder: the method or baseline, and what differs from the paper's."""
    if run.penalty != "r_diverse":
        return {"r_zero": "r_zero", "none": "no_penalty"}[run.penalty]
    parts = [
        {"sam": "", "question": "no_code", "program_text": "no_embedding", "question_text": "no_sam"}[run.measure]
    ]
    without = (run.beta == 0, run.replay_fraction == 0)
    parts.append(
        {(True, True): "no_map", (True, False): "no_map_penalty", (False, True): "no_replay"}.get(without, "")
    )
    parts.append("gate" if run.gate_samples else "")
    return "-".join(filter(None, parts)) or "r_diverse"


def run_path(run: RDiverseConfig) -> Path:
    """Folder of the run: OUT/r_diverse/EXPERIMENT/VARIANT-seedK."""
    return Path(run.out) / "r_diverse" / run.experiment / f"{variant(run)}-seed{run.seed}"


def stage_path(run: RDiverseConfig, iteration: int, stage: str) -> Path:
    """Folder of a stage of the run, such as a phase."""
    return run_path(run) / f"iteration_{iteration}" / stage


def sources_of(run: RDiverseConfig, iteration: int) -> Sources:
    """Both roles go on from their models of the iteration before, in the first one from the base."""
    before = [run.model if iteration == 1 else str(stage_path(run, iteration - 1, p) / "model") for p in PHASES]
    return Sources(*before, stage_path(run, iteration, "filter") / "solver_data.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Who answers, and what measures skills


class EngineSolver:
    """`reward.Solver`: m answers of an engine to each question, by seeds that depend on question and step only."""

    def __init__(self, engine: Engine, run: RDiverseConfig, salt: int):
        self.engine, self.run, self.salt = engine, run, salt
        ready_to_compare()

    def __call__(self, questions: Sequence[str], seed: int) -> list[list[str | None] | None]:
        m = self.run.m_reward
        prompts = [Prompt(solver_prompt(q, self.run.solver_system)) for q in questions for _ in range(m)]
        seeds = [zlib.crc32(f"{self.salt}/{seed}/{q}/{i}".encode()) for q in questions for i in range(m)]
        answers = self.engine.generate(prompts, answer_decoding(self.run), seeds)
        rows = [answers[i : i + m] for i in range(0, len(answers), m)]
        rows = [[a if a and a.finish_reason != "refused" else None for a in row] for row in rows]
        return [None if None in row else [answer_of(answer.text, self.run) for answer in row] for row in rows]


def load_tokenizer(model: str):
    """The tokenizer of a base or phase; with R-Zero's plain form where it has no chat template."""
    tokenizer = models.load_processor(model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def server_engine(url: str, model: str, run: RDiverseConfig) -> ServerEngine:
    """An engine of the base or of a phase's model, on a vLLM server."""
    end = turn_end_id(load_tokenizer(model))  # base models do not declare it, so the server does not know it
    workers = min(512, 128 * max(1, run.gpus))  # a replica on each GPU; more threads would only wait for each other
    return ServerEngine(
        url, model, run.chat_template_kwargs, workers=workers, stop_token_ids=[] if end is None else [end]
    )


def local_engine(model: str, run: RDiverseConfig) -> TransformersEngine:
    """An engine of the base or of a phase's model, in this process."""
    loaded, tokenizer = _loaded(model), load_tokenizer(model)
    return TransformersEngine(loaded, tokenizer, run.engine_batch, run.chat_template_kwargs)


def _loaded(model: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return models.load_model(model, torch.bfloat16 if device == "cuda" else torch.float32, device)


def revised(model: str) -> str:
    """A model's name with the hub's commit that is loaded under it, where that is known; a folder's name as it is."""
    try:
        commit = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
    except (OSError, ValueError):  # not every encoder has a config that transformers knows
        commit = None
    return f"{model} {commit}" if commit else model


def skill_encoder(run: RDiverseConfig, cache: Path, coder_url: str | None = None) -> SkillEncoder:
    """SAM by the settings; `coder_url` is a server of `run.coder`."""
    from .arithmetic import ArithmeticCoder, arithmetic_programs
    from .engines import LocalCoderEngine, ServedCoderEngine

    rules = run.coder == "rules"
    if run.measure == "question":
        coder = None
    elif rules:
        coder = ArithmeticCoder()
    else:
        tokenizer = models.load_processor(run.coder)
        if coder_url:
            engine = ServedCoderEngine(coder_url, run.coder, workers=256, name=revised(run.coder))
        else:
            engine = LocalCoderEngine(_loaded(run.coder), tokenizer, run.engine_batch, name=revised(run.coder))
        coder = ModelCoder(engine, tokenizer, chat=run.coder_chat)
    centre = arithmetic_programs() if rules and coder is not None else ()
    encoder = minilm(centre=centre) if run.encoder == "minilm" else SentenceEncoder(run.encoder)
    return SkillEncoder(coder, encoder, cache, chunk_size=BATCH["vllm" if coder_url else "transformers"])


# ---------------------------------------------------------------------------------------------------------------------
# The phases


def train_challenger(
    settings: Settings, iteration: int, solver_url: str | None = None, coder_url: str | None = None
) -> None:
    """Phase A: trains the Challenger against the frozen Solver, which with the coder may be on servers."""
    from .reward import ChallengerReward

    run, root = settings.run, run_path(settings.run)
    sources = sources_of(run, iteration)
    with whole_models():
        engine = server_engine(solver_url, sources.solver, run) if solver_url else local_engine(sources.solver, run)
        skills = skill_encoder(run, root / "programs", coder_url) if run.needs_skills else None
    solver = EngineSolver(engine, run, salt=1000 * run.seed + iteration)
    bank = MemoryBank(root / "bank").before(iteration) if run.needs_bank else None
    reward = ChallengerReward(run, solver, same, skills, bank)
    config = phase_config(settings, "challenger", iteration)
    rows = challenger_rows(config.generation_batch_size, run.challenger_system, run.challenger_user)
    train_phase(config, sources.challenger, reward, rows, run, lambda: _challenger_samples(reward))


@contextmanager
def whole_models() -> Iterator[None]:
    """Inside, models are loaded whole also under ZeRO-3, where transformers cuts what it loads over all processes:
    those of the reward are called by the main process alone."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def train_solver(settings: Settings, iteration: int) -> None:
    """Phase F: trains the Solver on the labelled questions of the iteration."""
    run = settings.run
    sources = sources_of(run, iteration)
    rows = solver_rows(read_jsonl(sources.questions), run.solver_system)
    reward = boxed_reward if run.boxed_only else label_reward
    train_phase(phase_config(settings, "solver", iteration), sources.solver, reward, rows, run)


def phase_config(settings: Settings, name: str, iteration: int) -> PhaseConfig:
    """The settings of a phase with its folder and its own seed."""
    config, folder = getattr(settings, name), stage_path(settings.run, iteration, name)
    seed = zlib.crc32(f"{settings.run.seed}/{iteration}/{name}".encode()) % 2**31
    # Made anew, TRL refuses both batch fields
    return on_one_gpu(dataclasses.replace(config, output_dir=str(folder), seed=seed, generation_batch_size=None))


def train_phase(config, model: str, reward, rows, run: RDiverseConfig, samples: Callable[[], list] = list) -> None:
    """Trains from `model`, or goes on from the last checkpoint, and saves the model last."""
    from .trainer import PhaseTrainer

    _check_adapter(run, is_deepspeed_zero3_enabled())  # the launch may have another accelerate config
    set_seed(config.seed)
    folder, main = Path(config.output_dir), PartialState().is_main_process
    with exclusive(folder) if main else nullcontext():  # from one that a killed loop has left behind
        dtype = getattr(torch, run.policy_dtype)
        policy = models.load_model(
            model, dtype, attn_implementation=run.attn_implementation, load_in_4bit=run.load_in_4bit
        )
        tokenizer, lora = load_tokenizer(model), lora_config(run.lora_rank)
        options = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
        trainer = with_adapters(
            lambda: PhaseTrainer(policy, reward, config, **options), run.lora_rank, run.load_in_4bit
        )
        checkpoint = resume_point(trainer)
        trainer.remove_callback(PrinterCallback)
        if main:
            where = f"resuming at step {step_of(checkpoint)}" if checkpoint else "starting"
            print(f"{folder}: {where}", flush=True)
            trainer.add_callback(PhaseLog(folder, checkpoint, trainer, samples))
        preemption.train(trainer, checkpoint)
        trainer.save_model(str(folder / ("adapter" if lora else "model")))
        if main:
            if lora:  # the next phases start from whole weights
                models.load_model(str(folder / "adapter"), dtype).save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            (folder / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths of this machine


class PhaseLog(RunLog):
    """Writes some rollouts to samples.jsonl, where a phase has them."""

    SHOWN = ("reward", "challenger/uncertainty", "challenger/repetition", "challenger/memory", "entropy", "step_time")

    def __init__(self, folder: Path, checkpoint: Path | None, trainer: PhaseTrainer, rollouts: Callable[[], list]):
        super().__init__(folder, checkpoint, trainer)
        self.unit, self.rollouts = folder.name, rollouts


def _challenger_samples(reward: ChallengerReward) -> list[dict[str, Any]]:
    parts, names = reward.last_batch, ("consistency", "repetition", "memory", "reward")
    return [
        {"question": question, "failure": parts["failures"][i], **{name: float(parts[name][i]) for name in names}}
        for i, question in enumerate(parts.get("questions", [])[:8])
    ]


def prompts_of_a_batch(config: PhaseConfig, processes: int) -> int:
    """Prompts in a generation batch of a phase."""
    return config.per_device_train_batch_size * config.steps_per_generation * processes // config.num_generations


# ---------------------------------------------------------------------------------------------------------------------
# The dry run


def dry_run(settings: Settings) -> str:
    """Resolved settings, sizes of both phases and memory a process, as text."""
    run = settings.run
    lines = [f"run folder: {run_path(run)}", "settings:"]
    shown = settings.plain() | settings.free()
    phases = {f"{phase}.{name}": value for phase in PHASES for name, value in shown.pop(phase, {}).items()}
    for name, value in (shown | phases).items():
        text = " ".join(str(value).split())
        lines.append(f"  {name}: {text if len(text) <= 100 else text[:97] + '...'}")
    trainers = {"challenger": run.trainer_gpus, "solver": max(1, run.gpus)}
    for phase in PHASES:
        config, processes = getattr(settings, phase), trainers[phase]
        update = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
        lines.append(
            f"{phase}: {config.max_steps} optimizer steps of {update} rollouts on {processes} processes; a generation "
            f"batch has {prompts_of_a_batch(config, processes)} prompts x {config.num_generations} rollouts"
        )
    parameters = models.guess_parameters(run.model)
    if parameters is None:
        return "\n".join([*lines, plan.unknown_line([run.model])])
    for phase, processes in trainers.items():
        sharding = run.sharding if processes > 1 else "none"
        parts = memory_parts(settings, phase, parameters, processes, sharding)
        lines += plan.memory_lines(parts, sharding, processes, f"training process of the {phase}")
    each = plan.bytes_each(run.sharding if run.gpus > 1 else "none", settings.solver.bf16, run.policy_dtype)
    trained = plan.trained_parameters(run.model, parameters, run.lora_rank)
    sizes = each.weight * parameters, each.states * trained  # an adapter is merged before it is saved
    return "\n".join([*lines, plan.disk_line(2 * run.iterations, "models", *sizes)])


def memory_parts(settings: Settings, phase: str, parameters: float, processes: int, sharding: str) -> dict[str, float]:
    """Bytes by part in one training process."""
    run, config, pieces = settings.run, getattr(settings, phase), plan.split(sharding, processes)
    each = plan.bytes_each(sharding, config.bf16, run.policy_dtype)
    trained = plan.trained_parameters(run.model, parameters, run.lora_rank)
    quantized = plan.in_4_bits(run.model, parameters, run.load_in_4bit)
    reference = config.beta != 0 and not run.lora_rank  # with LoRA it is the policy without its adapter
    return {
        **plan.model_bytes(phase, parameters, trained, each, pieces, quantized),
        "KL reference": reference * each.weight * parameters / pieces.weights,
        **plan.generation_bytes(config, plan.shape_of(run.model, parameters), each.weight),
        **(reward_parts(run, parameters) if phase == "challenger" else {}),
    }


def reward_parts(run: RDiverseConfig, parameters: float) -> dict[str, float]:
    """Bytes of what a training process of the Challenger holds for its reward: all that no server has."""
    served = run.engine == "vllm" and run.gpus > 0
    held = {} if served else {"Solver of the reward": parameters}
    if run.needs_skills and not served and run.uses_coder_model:
        held["coder"] = _size(run.coder)
    if run.needs_skills and run.encoder != "minilm":
        held["encoder"] = _size(run.encoder)
    parts = {f"{name}, 2 bytes each": 2 * number for name, number in held.items() if number is not None}
    unknown = [name for name, number in held.items() if number is None]
    return parts | {f"{name}, not counted: its size is not known": 0.0 for name in unknown}


def _size(name: str) -> float | None:
    """Parameters of a coder or encoder, None where they cannot be known."""
    try:
        return models.guess_parameters(name if Path(name).exists() else name.upper())  # ...-1.5b
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence on stderr for what the user can mend."""
    return run_main("r_diverse.train", _main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="r_diverse.train", description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False
    )
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--solver_url", help="server of the frozen Solver")
    parser.add_argument("--coder_url", help="server of the coder")
    if {"-h", "--help"}.intersection(argv):
        parser.print_help()
        print()
        parse(["--help"])  # the fields of a run; ends here
    known, rest = parser.parse_known_args(argv)
    settings = parse(rest, known.phase)
    if settings.run.dry_run:
        print(dry_run(settings))
    elif known.phase == "solver":
        train_solver(settings, known.iteration)
    else:
        train_challenger(settings, known.iteration, known.solver_url, known.coder_url)


if __name__ == "__main__":
    sys.exit(main())
