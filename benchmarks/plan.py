"""What a step costs before anything runs: memory of a GPU and seconds by part, and the part that takes most.

    python -m benchmarks.plan --config va_opd/configs/geo3k.yaml --gpus 8 --gpu h100
    python -m benchmarks.plan --method va_opd --student 2e9 --teacher 8e9 --gpus 8 --gpu a100 --response 800
    python -m benchmarks.plan --config r_diverse/configs/qwen3_4b.yaml --gpu h20       # an iteration
    python -m benchmarks.plan --check         # predicted beside published times
    python -m benchmarks.plan --table         # recommended placements on 1, 4, 8 and 64 GPUs

Seconds are a range: the same formulas at the two ends of each assumption, which are flags (`--train 0.15,0.4`).
`--field value` sets any field of the config, such as `--per_device_train_batch_size 4` or `--vllm_mode server`.
With `--server_gpus N` the rollouts come from one vLLM server on N more GPUs.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import r_diverse.train as r_diverse
import srpo.train as srpo
import va_opd.train as va_opd
from benchmarks.cost import (
    ASSUMED,
    GPUS,
    NODE,
    Assumed,
    Job,
    Pass,
    Place,
    activation_bytes,
    generation_seconds,
    step_seconds,
)
from common import models, plan
from common.cli import run_main
from common.plan import GIB, Shape

ROOT = Path(__file__).parents[1]
PARSERS = {"va_opd": va_opd.parse, "srpo": srpo.parse, "r_diverse": r_diverse.parse}
CONFIGS = {
    "va_opd": "va_opd/configs/geo3k.yaml",
    "srpo": "srpo/configs/qwen3_8b.yaml",
    "r_diverse": "r_diverse/configs/qwen3_4b.yaml",
}
METHOD_NAMES = {"va_opd": "VA-OPD", "srpo": "SRPO", "r_diverse": "R-Diverse"}
SINGLE = {
    "va_opd": "va_opd/configs/geo3k_single_gpu.yaml",
    "srpo": "srpo/configs/single_gpu.yaml",
    "r_diverse": "r_diverse/configs/single_gpu.yaml",
}
# Mean tokens of prompt and response. SRPO: SDPO paper, Table 8 (GRPO on-policy). The others are not published. VA-OPD:
# an image of the smallest budget is 256 tokens, and most responses of Qwen3-VL exceed 1,024
LENGTHS = {"va_opd": (400, 1500), "srpo": (300, 821), "r_diverse": (200, 1000)}
ROUTED = 0.4  # of rollouts at the start, SRPO paper, Fig. 5
PROGRAM = 300  # tokens of a program of the coder; our guess
RESERVE = 4 * GIB  # CUDA context, NCCL's buffers, fragmentation; our guess
SERVER = 0.9  # share of memory of a generation server


# ---------------------------------------------------------------------------------------------------------------------
# The methods


class Case(NamedTuple):
    """Settings of a method, `(args, config)` of its train module or R-Diverse's `Settings`; mean lengths in tokens."""

    method: str
    settings: Any
    prompt: float
    response: float
    placement: str = "local"  # of VA-OPD's teacher: local, served, or offloaded as its config says too
    teacher_gpus: int = 8


def size_of(name: str, flag: str) -> float:
    if (size := models.guess_parameters(name)) is None:
        raise ValueError(f"model {name!r} is not at hand and its name holds no size such as 8B: set --{flag} 8e9")
    return size


def policy_job(case: Case, config: Any, name: str, lora_rank: int, processes: int) -> Job:
    parameters = size_of(name, "student")
    shape = plan.shape_of(name, parameters)
    batches = getattr(config, "steps_per_generation", None) or config.gradient_accumulation_steps
    return Job(
        parameters,
        shape,
        config.per_device_train_batch_size * batches * processes,
        config.num_generations,
        case.prompt,
        min(case.response, config.max_completion_length),
        config.max_completion_length,
        config.gradient_accumulation_steps,
        trained=plan.trained_parameters(name, parameters, lora_rank) if lora_rank else None,
        updates=max(1, batches // config.gradient_accumulation_steps),
        checkpointing=config.gradient_checkpointing,
    )


def va_opd_job(case: Case, processes: int) -> Job:
    """The teacher scores both views of all rollouts."""
    args, config = case.settings
    job = policy_job(case, config, args.model, getattr(args, "lora_rank", 0), processes)
    size = size_of(args.teacher, "teacher")
    gpus = case.teacher_gpus if case.placement == "served" else 0
    views = (
        Pass(f"teacher: {view} view", size, plan.shape_of(args.teacher, size), gpus=gpus)
        for view in ("original", "degraded")
    )
    return replace(job, passes=tuple(views), moved=2 * size if config.teacher_offload else 0)


def srpo_job(case: Case, processes: int) -> Job:
    """The policy scores its rollouts to correct for the engine; the self-teacher the distilled ones, with a sibling's
    response in its prompt."""
    args, config = case.settings
    job = policy_job(case, config, args.model, args.lora_rank, processes)
    share = {"grpo": 0.0, "sdpo": 1.0}.get(config.routing, ROUTED)
    teacher = Pass("self-teacher", job.parameters, job.shape, share, case.response)
    return replace(job, passes=(Pass("policy: old logps", job.parameters, job.shape), *([teacher] if share else [])))


def phase_job(case: Case, phase: str, processes: int) -> Job:
    """Policy and KL reference score all rollouts before the updates."""
    config, run = getattr(case.settings, phase), case.settings.run
    job = policy_job(case, config, run.model, getattr(run, "lora_rank", 0), processes)
    names = ("policy: old logps", "KL reference")[: 2 if config.beta else 1]
    return replace(job, passes=tuple(Pass(name, job.parameters, job.shape) for name in names))


def phases(case: Case, gpus: int) -> dict[str, tuple[Any, int]]:
    """Configuration and number of training processes of each phase: two for R-Diverse, one for the others."""
    if case.method != "r_diverse":
        return {"": (case.settings[1], gpus)}
    settings = case.settings
    half = max(1, gpus // 2) if settings.run.engine == "vllm" else gpus  # the others serve Solver and coder
    return {"challenger": (settings.challenger, half), "solver": (settings.solver, gpus)}


def seconds_of(case: Case, place: Place, a: Assumed) -> dict[str, float]:
    """Seconds by part of a step, or for R-Diverse of an iteration."""
    if case.method == "r_diverse":
        return iteration_seconds(case, place, a)
    config = case.settings[1]
    place = replace(place, engine=SERVER if place.server_gpus else config.vllm_gpu_memory_utilization)
    return step_seconds({"va_opd": va_opd_job, "srpo": srpo_job}[case.method](case, place.gpus), place, a)


def iteration_seconds(case: Case, place: Place, a: Assumed) -> dict[str, float]:
    """Seconds by part of one iteration of R-Diverse without evaluation.

    While the Challenger trains, the Solver and the coder answer on the other half of the GPUs; the halves take turns.
    """
    run, seconds = case.settings.run, {"starts of servers": 5 * a.start}
    for phase, (config, gpus) in phases(case, place.gpus).items():
        job = phase_job(case, phase, gpus)
        where = replace(place, gpus=gpus, engine=config.vllm_gpu_memory_utilization)
        batches = config.max_steps / job.updates
        for name, value in step_seconds(job, where, a).items():
            kind = f"{phase}: rollouts" if name.startswith("generation") else f"{phase}: updates"
            seconds[kind] = seconds.get(kind, 0) + batches * value
        if phase == "challenger":
            served, asked = replace(where, engine=run.reward_memory), replace(job, group=1)
            seconds["reward: answers"] = batches * sum(generation_seconds(asked, served, a, run.m_reward).values())
            if run.needs_skills and run.uses_coder_model:
                coder = size_of(run.coder, "coder")
                asked = replace(asked, parameters=coder, shape=plan.shape_of(run.coder, coder), response=PROGRAM)
                seconds["reward: programs"] = batches * sum(generation_seconds(asked, served, a).values())
    pool, alone = replace(job, rollouts=run.candidates, group=1), replace(place, engine=run.engine_memory)
    seconds["questions"] = sum(generation_seconds(pool, alone, a).values())
    return seconds | {"labels": sum(generation_seconds(pool, alone, a, run.m_label).values())}


def memory_of(case: Case, place: Place, phase: str = "") -> dict[str, float]:
    """Bytes of a training GPU by part: those of the dry run, activations at the longest rollout, and a reserve."""
    config, processes = phases(case, place.gpus)[phase]
    sharding = place.sharding if processes > 1 else "none"
    if case.method == "r_diverse":
        settings, job = case.settings.run, phase_job(case, phase, processes)
        parts = r_diverse.memory_parts(case.settings, phase, job.parameters, processes, sharding)
    else:
        settings, job = case.settings[0], {"va_opd": va_opd_job, "srpo": srpo_job}[case.method](case, processes)
        parts = held_parts(case, job, config, processes, sharding)
        if config.teacher_offload:
            stays = copy.copy(config)
            stays.teacher_offload = False
            whole = held_parts(case, job, stays, processes, sharding)
            teacher = (value for name, value in whole.items() if name.startswith(("teacher weights", "self-teacher")))
            parts["whole teacher, while it scores"] = sum(teacher)
        if case.placement == "served":
            parts = {name: value for name, value in parts.items() if not name.startswith("teacher weights")}
    parts = {name: value for name, value in parts.items() if not name.startswith(("rollout engine", "KV cache"))}
    tokens = config.per_device_train_batch_size * (job.prompt + job.limit)
    parts["activations of a micro-batch at the limit"] = activation_bytes(job.shape, tokens, job.checkpointing)
    parts["CUDA context, buffers, fragmentation"] = RESERVE
    if phase == "challenger" and place.gpus == 1 and case.settings.run.engine == "vllm":
        parts["servers of Solver and coder"] = 2 * case.settings.run.reward_memory * place.gpu.memory * GIB
    if place.server_gpus:
        return parts
    each = plan.bytes_each(sharding, config.bf16, getattr(settings, "policy_dtype", "float32"))
    return parts | plan.generation_bytes(config, job.shape, each.weight, place.gpu.memory)


def held_parts(case: Case, job: Job, config: Any, processes: int, sharding: str) -> dict[str, float]:
    """The dry run's table of VA-OPD or SRPO."""
    args, sizes = case.settings[0], [job.parameters]
    if case.method == "srpo":
        return srpo.memory_parts(args, config, *sizes, processes, sharding)
    return va_opd.memory_parts(args, config, *sizes, job.passes[0].parameters, processes, sharding)


# What is absent at each time, by the beginning of its name
ABSENT = {
    "training": ("whole teacher", "KV cache"),
    "generation": ("whole teacher", "activations", "gradients", "cached", "KL tiles", "one chunk"),
    "scoring": ("teacher's output head", "self-teacher", "KV cache", "bfloat16 copies", "activations", "gradients",
                "KL tiles", "one chunk"),
}  # fmt: skip


def peak(parts: dict[str, float]) -> float:
    """Bytes at the fullest of three times: training, generation, and scoring by a teacher that is offloaded otherwise.
    An engine with sleep mode counts in generation only, autocast's copies not while an engine generates."""
    found = []
    for time, absent in ABSENT.items():
        if time == "generation" and not any(name.startswith("KV cache") for name in parts):
            absent = (*absent, "bfloat16 copies")
        there = {name: value for name, value in parts.items() if not name.startswith(absent)}
        found.append(sum(value for name, value in there.items() if time == "generation" or "asleep" not in name))
    return max(found)


# ---------------------------------------------------------------------------------------------------------------------
# Printed


def bottleneck(slow: dict[str, float], fast: dict[str, float]) -> str:
    """The part that takes most time, by the mean of both ends, and its share at each."""
    name = max(slow, key=lambda part: slow[part] + fast[part])
    shares = sorted(ends[name] / sum(ends.values()) for ends in (slow, fast))
    return f"{name}, {shares[0]:.0%} to {shares[1]:.0%}"


def report(case: Case, place: Place, slow: Assumed, fast: Assumed) -> str:
    lines = []
    for phase, (config, processes) in phases(case, place.gpus).items():
        lines.append(" ".join(filter(None, [phase, plan.update_line(config, processes)])))
        parts = memory_of(case, place, phase)
        lines += [f"memory of a GPU, GiB ({place.sharding if processes > 1 else 'one GPU'}):"]
        lines += [f"  {value / GIB:9.2f}  {name}" for name, value in parts.items()]
        highest = peak(parts) / GIB
        fits = "fits" if highest <= place.gpu.memory else "DOES NOT FIT"
        lines.append(f"  {highest:9.2f}  the most at one time, of {place.gpu.memory:g}: {fits}")
    ends = [seconds_of(case, place, a) for a in (fast, slow)]
    lines.append(f"seconds of {'an iteration' if case.method == 'r_diverse' else 'a step'}, fast and slow end:")
    rows = {name: [end[name] for end in ends] for name in ends[0]} | {"sum": [sum(end.values()) for end in ends]}
    lines += [f"  {first:9.1f} {last:9.1f}  {name}" for name, (first, last) in rows.items()]
    lines.append(f"bottleneck: {bottleneck(ends[1], ends[0])}")
    lines.append(f"assumed: prompt {case.prompt:g}, mean response {case.response:g} tokens; slow and fast end of")
    lines += [f"  {name:8} {getattr(slow, name):g}, {getattr(fast, name):g}: {ASSUMED[name][2]}" for name in ASSUMED]
    return "\n".join(lines)


# --- beside published times ---


class Published(NamedTuple):
    """A run whose time was published: seconds of a step or an iteration, and where."""

    run: str
    seconds: float
    source: str
    predict: Callable[[Assumed], float]


def published() -> list[Published]:
    """The papers' runs and two of EasyR1; all on frameworks that pack batches and shard all weights."""

    def own(method: str, gpu: str, response: float | None = None, **changes) -> Callable[[Assumed], float]:
        case, place = paper_case(method, response, **changes), Place(GPUS[gpu], 8, "fsdp2", packed=True)
        return lambda a: sum(seconds_of(case, place, a).values())

    def easy_r1(size: float, shape: Shape, tokens: float) -> Callable[[Assumed], float]:
        passes = (Pass("old", size, shape), Pass("reference", size, shape))
        job = Job(size, shape, 2560, 5, 300, tokens - 300, 2048, 4, passes, updates=4)
        place = Place(GPUS["h100"], 8, "fsdp2", 0.6, packed=True)
        return lambda a: sum(step_seconds(job, place, a).values())

    hour, qwen_3b, qwen_7b = (
        3600,
        Shape(36, 2048, 2048, 256, 11008, 151_936),
        Shape(28, 3584, 3584, 512, 18944, 152_064),
    )
    return [
        Published("VA-OPD 8B to 2B, 8 x A100", 19 * hour / 655, "Fig. 5, 19 h", own("va_opd", "a100")),
        Published("GRPO 8B, 8 x H20", 91.5, "SRPO paper, Fig. 4b", own("srpo", "h20", 821, routing="grpo")),
        Published("SDPO 8B, 8 x H20", 83.7, "SRPO paper, Fig. 4b", own("srpo", "h20", 256, routing="sdpo")),
        Published("SRPO 8B, 8 x H20", 75.8, "Fig. 4b; length between the two", own("srpo", "h20", 538)),
        Published("R-Diverse 4B iteration, 8 x H20", 6 * hour, "paper, 6 h", own("r_diverse", "h20")),
        Published("R-Zero 4B iteration, 8 x A100 40 GB", 50 * hour / 3, "R-Zero issue 10, 50 h for 3",
                  own("r_diverse", "a100-40g", penalty="r_zero", reward_memory="0.85")),
        Published("GRPO 3B, 8 x H100", 120, "EasyR1; length from its tokens/s", easy_r1(3.75e9, qwen_3b, 675)),
        Published("GRPO 7B, 8 x H100", 145, "EasyR1; length from its tokens/s", easy_r1(8.29e9, qwen_7b, 725)),
    ]  # fmt: skip


def check_table(slow: Assumed, fast: Assumed) -> str:
    """Predicted and published seconds, and how to read them."""
    rows = ["| run | predicted, s | published, s | published / predicted | source |", "|---|--:|--:|--:|---|"]
    ratios = []
    for run, seconds, source, predict in published():
        low, high = predict(fast), predict(slow)
        ratios.append((seconds / high, seconds / low))
        ratio = "{:.2f} to {:.2f}".format(*ratios[-1])
        rows.append(f"| {run} | {low:,.0f} to {high:,.0f} | {seconds:,.0f} | {ratio} | {source} |")
    inside, above = sum(least <= 1 <= most for least, most in ratios), sum(least > 1 for least, _ in ratios)
    widths = [most / least for least, most in ratios]
    rows += [
        f"\n{inside} of {len(ratios)} published times lie in the predicted range and {above} above it, the farthest "
        f"{max(least for least, _ in ratios):.2f} times its slow end. That end is {min(widths):.1f} to "
        f"{max(widths):.1f} times the fast one: a plan ranks the parts of a step, it does not say when a run ends."
    ]
    return "\n".join(rows)


# --- recommended placements ---


def table(gpu: str, slow: Assumed, fast: Assumed) -> str:
    """For each method and number of GPUs the fastest placement that fits, with the updates of the paper's config (on
    one GPU: of the single-GPU config)."""
    rows = ["| method | GPUs | config | sharding | rollouts x micro-batches | GiB at most | seconds | bottleneck |",
            "|---|--:|---|---|---|--:|--:|---|"]  # fmt: skip
    for method in PARSERS:
        for gpus in (1, 4, 8, 64):
            used = min(gpus, NODE) if method == "r_diverse" else gpus  # its loop runs on one node
            config = SINGLE[method] if gpus == 1 else CONFIGS[method]
            found = list(candidates(method, str(ROOT / config), used, GPUS[gpu], slow, fast))
            name = f"| {METHOD_NAMES[method]} | {gpus} | {Path(config).name}"
            if not found:
                rows.append(f"{name} | does not fit | | | | |")
                continue
            _, _, sharding, batches, highest, seconds, most = min(found)
            runs = f" ({gpus // used} runs, a node each)" if used < gpus else ""
            rows.append(f"{name} | {sharding}{runs} | {batches} | {highest:.0f} | {seconds} | {most} |")
    return "\n".join(rows)


def candidates(method: str, config: str, gpus: int, gpu, slow: Assumed, fast: Assumed) -> Iterator[tuple]:
    """Yields placements that fit, with rollouts and updates as in the config: tuples of which the fastest is the least
    and, of equally fast ones, that with the largest micro-batch."""
    case, native = case_of(method, [], config), 1 if gpus == 1 else 8
    for sharding in ("none",) if gpus == 1 else ("zero2", "zero3"):
        for rows in (16, 8, 4, 2, 1):
            tried = with_micro_batches(case, rows, native, gpus)
            if tried is None:
                continue
            place = Place(gpu, gpus, sharding)
            highest = max(peak(memory_of(tried, place, phase)) for phase in phases(tried, gpus)) / GIB
            if highest > gpu.memory:
                continue
            ends = [seconds_of(tried, place, a) for a in (fast, slow)]
            low, high = (sum(end.values()) for end in ends)
            counts = {
                f"{c.per_device_train_batch_size} x {c.gradient_accumulation_steps}"
                for c, _ in phases(tried, gpus).values()
            }
            seconds = f"{low:,.0f} to {high:,.0f}"
            yield (
                round(low + high),
                -rows,
                sharding,
                ", ".join(sorted(counts)),
                highest,
                seconds,
                bottleneck(ends[1], ends[0]),
            )


def with_micro_batches(case: Case, rows: int, native: int, gpus: int) -> Case | None:
    """The case with micro-batches of `rows` rollouts and the updates that its config has on `native` GPUs; None if
    they do not divide."""
    tried = case._replace(settings=copy.deepcopy(case.settings))
    before, after = phases(tried, native), phases(tried, gpus)
    for phase, (config, processes) in after.items():
        rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * before[phase][1]
        updates = (getattr(config, "steps_per_generation", None) or 0) // config.gradient_accumulation_steps
        if rollouts % (rows * processes):
            return None
        config.per_device_train_batch_size = rows
        config.gradient_accumulation_steps = rollouts // (rows * processes)
        if updates:
            config.steps_per_generation = updates * config.gradient_accumulation_steps
    return tried


# --- the command ---


def case_of(method: str, flags: list[str], config: str | None = None, **lengths) -> Case:
    prompt, response = LENGTHS[method]
    given = {"prompt": prompt, "response": response} | {key: value for key, value in lengths.items() if value}
    words = [
        "--config",
        config or str(ROOT / CONFIGS[method]),
        *flags,
        *(["--dry_run"] if method != "r_diverse" else []),
    ]
    return Case(method, PARSERS[method](words), **given)


def paper_case(method: str, response: float | None = None, **changes: str) -> Case:
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    return case_of(method, flags, response=response)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence for what the user can mend."""
    return run_main("benchmarks.plan", _main, argv)


def _main(argv: list[str]) -> None:
    options, rest = parser().parse_known_args(argv)
    check_numbers(options)
    slow, fast = ends_of(options)
    if options.check:
        print(check_table(slow, fast))
    elif options.table:
        print(table(options.gpu, slow, fast))
    else:
        method = options.method or method_of(options.config)
        for flag, target in (("student", "model"), ("teacher", "teacher")):
            if value := getattr(options, flag):
                rest += [f"--{target}", name_of(value)]
        if options.placement == "offloaded":
            rest += ["--teacher_offload", "true"]
        case = case_of(method, rest, options.config, prompt=options.prompt, response=options.response)
        case = case._replace(placement=options.placement, teacher_gpus=options.teacher_gpus)
        place = Place(GPUS[options.gpu], options.gpus, options.sharding, server_gpus=options.server_gpus)
        print(report(case, place, slow, fast))


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawTextHelpFormatter
    made = argparse.ArgumentParser(
        "benchmarks.plan", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    made.add_argument("--config", help="one of the project; by default the paper's of --method")
    made.add_argument("--method", choices=list(PARSERS), help="by default the one of --config")
    made.add_argument("--student", help="parameters such as 2e9, or a name")
    made.add_argument("--teacher", help="the same of VA-OPD's teacher; of SRPO: ema, frozen or current")
    made.add_argument("--gpus", type=int, default=8, help="GPUs that train")
    made.add_argument("--gpu", choices=list(GPUS), default="h100")
    made.add_argument("--sharding", choices=list(plan.ZERO_STAGE), default="zero2")
    made.add_argument(
        "--placement", choices=["local", "offloaded", "served"], default="local", help="VA-OPD's teacher"
    )
    made.add_argument("--teacher_gpus", type=int, default=8, help="GPUs of a served teacher")
    made.add_argument("--server_gpus", type=int, default=0, help="of a vLLM server for rollouts; 0: colocated")
    made.add_argument("--prompt", type=float, help="mean tokens")
    made.add_argument("--response", type=float, help="mean tokens")
    made.add_argument("--check", action="store_true", help="predicted beside published times")
    made.add_argument("--table", action="store_true", help="recommended placements")
    for name, (slow, fast, text) in ASSUMED.items():
        made.add_argument(f"--{name}", default=f"{slow:g},{fast:g}", help=f"{text} (slow,fast: %(default)s)")
    return made


def check_numbers(options: argparse.Namespace) -> None:
    """Raises `ValueError` for a number that no plan can be made with."""
    for name, least in (("gpus", 1), ("teacher_gpus", 1), ("server_gpus", 0), ("prompt", 1), ("response", 1)):
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name} must be a number from {least} on, got {value}")
    for name in ("student", "teacher"):
        value = number_of(getattr(options, name))
        if value is not None and not 1 <= value < math.inf:
            raise ValueError(f"--{name} must be a number of parameters such as 2e9, got {getattr(options, name)!r}")


def number_of(value: str | None) -> float | None:
    """The number that a text holds; None for a name."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def ends_of(options: argparse.Namespace) -> tuple[Assumed, Assumed]:
    """Slow and fast end of the assumptions; one number stands for both."""
    ends: tuple[dict, dict] = {}, {}
    for name in ASSUMED:
        numbers = [number_of(part) or 0.0 for part in getattr(options, name).split(",")]
        if len(numbers) > 2 or not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"--{name} takes one or two numbers above 0, slow,fast, got {getattr(options, name)!r}")
        ends[0][name], ends[1][name] = numbers[0], numbers[-1]
    return Assumed(**ends[0]), Assumed(**ends[1])


def method_of(config: str | None) -> str:
    for method in PARSERS:
        if config and method in Path(config).parts:
            return method
    where = f"--config {config!r} is in no method's folder" if config else "neither --config nor --method is set"
    raise ValueError(f"{where}: set --method to {', '.join(PARSERS)}")


def name_of(value: str) -> str:
    """A number of parameters as a name that holds it."""
    number = number_of(value)
    return value if number is None else f"model-{number / 1e9:.9f}B"


if __name__ == "__main__":
    sys.exit(main())
