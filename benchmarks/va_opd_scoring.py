"""VA-OPD's teacher scoring and student pass beside TRL's way, on the same rollouts in one run.

    python -m benchmarks.va_opd_scoring                        # CPU, 6 to 15 minutes
    python -m benchmarks.va_opd_scoring --real                 # a GPU with 80 GB: Qwen3-VL-2B and 8B

Three works. Teacher scoring of a prompt's siblings in both views: for each view one pass over image and prompt, then
one over the rollouts, beside TRL's way, a micro-batch of whole padded rows for each view, and beside 2 x K whole
forwards, one for each rollout and view. Student forward and backward of uneven rollouts: micro-batches sorted by
length and cut to their own tokens, beside TRL's, padded to the longest rollout of the step. A whole step with
generation, of VA-OPD and of plain OPD (`measure_va=False`). Random weights; at the full size the vision tower takes
about 0.4 of the text tower's FLOPs for an image token, as in Qwen3-VL-8B. `predicted` holds FLOPs of the published
sizes.
Writes benchmarks/results/va_opd_scoring.json.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from trl import DistillationTrainer

from benchmarks import tables
from benchmarks.machine import machine, seconds, spread, unless_out_of_memory
from common.runs import atomic_write_json
from common.tiny import tiny_qwen3_vl
from va_opd import VAOPDConfig, VAOPDTrainer, siblings
from va_opd._trl import MULTIMODAL_KEYS
from va_opd.lm_head import lm_head, sampled_logps

K = 4
TRL, ALONE = "TRL's way", "2 x K whole forwards"  # peers, as the overview names them
# Published shapes; the vision tower last
REAL = {
    "2B": (28, 2048, 6144, 16, 24, 1024, 4096, (5, 11, 17)),
    "8B": (36, 4096, 12288, 32, 27, 1152, 4304, (8, 16, 24)),
}
UNEVEN = (1.0, 0.75, 0.45, 0.2)  # lengths of four siblings, as shares of the longest: mean 0.6


class Shapes(NamedTuple):
    """Sizes of a teacher, whose student is half as wide; with `real` the published ones of Qwen3-VL-8B and 2B."""

    real: bool
    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int

    @property
    def vocabulary(self) -> int:
        return 151936 if self.real else 2048

    @property
    def patch(self) -> int:
        return 16 if self.real else 8

    def towers(self, size: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config of the text and of the vision tower of "2B", the student, or "8B", the teacher."""
        if self.real:
            layers, hidden, inner, heads, depth, vision, vision_inner, deepstack = REAL[size]
            groups, head, sections, vision_heads = 8, 128, [24, 20, 20], 16
        else:
            share = 0.5 if size == "2B" else 1.0
            hidden, vision = int(share * self.hidden), int(share * self.vision_hidden)
            layers, inner, heads, groups = self.layers, 3 * hidden, max(2, hidden // 64), max(1, hidden // 256)
            depth, vision_inner, vision_heads = self.vision_layers, int(3.75 * vision), max(1, vision // 64)
            head, sections, deepstack = 64, [12, 10, 10], (0,)
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
        text = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
        text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head}
        text |= {"vocab_size": self.vocabulary, "max_position_embeddings": 32768, "rope_parameters": rope}
        tower = {"depth": depth, "hidden_size": vision, "intermediate_size": vision_inner, "num_heads": vision_heads}
        tower |= {"patch_size": self.patch, "out_hidden_size": hidden, "num_position_embeddings": 2304}
        return text, tower | {"deepstack_visual_indexes": list(deepstack)}


@cache
def build_model(shapes: Shapes, size: str) -> Qwen3VLForConditionalGeneration:
    """A model with random weights, in float32; on a GPU a teacher is in bfloat16."""
    processor = tiny_qwen3_vl()[1]
    text, tower = shapes.towers(size)
    text |= {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=tower,
        tie_word_embeddings=shapes.real and size == "2B",
        **{name: getattr(processor, name) for name in names},
    )
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        dtype = torch.bfloat16 if gpu and size == "8B" else torch.float32
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)


def build(
    folder: str,
    options: argparse.Namespace,
    prompt: int,
    lengths: list[int] | None,
    micro_batch: int = K,
    response: int = 0,
):
    """A trainer on images that make prompts of about `prompt` tokens. Its rollouts have fixed `lengths`, or without
    them are sampled, with `response` tokens each."""
    shapes = Shapes(*(getattr(options, name) for name in Shapes._fields))
    unit = 2 * shapes.patch  # pixels of the side of a visual token
    side = unit * round(math.sqrt(0.94 * prompt))
    processor = tiny_qwen3_vl(patch=shapes.patch, max_pixels=side * side)[1]
    rng = np.random.default_rng(0)
    text = "".join(chr(97 + i % 26) for i in range(max(1, prompt - (side // unit) ** 2 - 14)))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}{text}"}],
            "image": Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)),
        }
        for i in range(2)
    ]
    count = len(lengths) if lengths else 2 * K
    torch.manual_seed(0)
    args = VAOPDConfig(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=count // micro_batch,
        num_generations=K,
        max_completion_length=response or max(lengths),
        generation_kwargs={"min_new_tokens": response},
        report_to=[],
        **precision(),
        save_strategy="no",
        shuffle_dataset=False,
        learning_rate=1e-6,
        doctor_steps=0,
    )
    parts = {"train_dataset": Dataset.from_list(rows[: count // K]), "processing_class": processor}
    student, teacher = build_model(shapes, "2B"), build_model(shapes, "8B")
    trainer = as_training_does(VAOPDTrainer(model=student, teacher_model=teacher, args=args, **parts))
    trainer.vocab_size = shapes.vocabulary
    trainer.teacher.shares = {True: True}  # the check at a run's start is not timed
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    if lengths is not None:
        ids = [[*rng.integers(10, 100, n - 1).tolist(), processor.tokenizer.eos_token_id] for n in lengths]
        trainer._generate_single_turn = lambda *args, **kwargs: ids
    return trainer


def precision() -> dict[str, bool]:
    """Settings of a trainer: on a GPU those of the configs."""
    gpu = torch.cuda.is_available()
    return {"use_cpu": not gpu, "bf16": gpu, "gradient_checkpointing": gpu}


def as_training_does(trainer):
    """The trainer, its model as `train()` makes it and the constructor does not: with checkpointing, and autocast
    around its forward."""
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.accelerator.prepare_model(trainer.model)
    trainer.model.train()
    return trainer


# TRL's way


def padded_inputs(batch: dict[str, Any], multiple: int | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """In place of `siblings.trimmed_inputs`: what `DistillationTrainer._compute_loss` gives to a model."""
    inputs = {key: batch[key] for key in MULTIMODAL_KEYS if key in batch}
    if "pixel_values" in inputs and not len(inputs["pixel_values"]):  # TRL itself has no rows without an image
        inputs = {key: value for key, value in inputs.items() if key.endswith("token_type_ids")}
    inputs["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return inputs, torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1).bool()


def trl_micro_batches(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """In place of `siblings.length_sorted`: rows in the order of generation, as wide as the longest of all."""
    size = len(batch["prompt_ids"]) // parts
    return [siblings.take_rows(batch, list(range(i, i + size))) for i in range(0, parts * size, size)]


@torch.no_grad()
def whole_scoring(trainer: VAOPDTrainer, views: list[dict[str, Any]], rows: int) -> list[torch.Tensor]:
    """(N,) log-probabilities for each view, from forwards of `rows` whole rows, as wide as the longest of all."""
    teacher, results = trainer.teacher_model, []
    for view in views:
        logps = []
        for start in range(0, len(view["prompt_ids"]), rows):
            part = siblings.take_rows(view, list(range(start, start + rows)))
            inputs, _ = padded_inputs(part)
            length = part["completion_ids"].size(1)
            hidden = trainer._get_last_hidden_state(teacher, logits_to_keep=length, **inputs)
            mask = part["completion_mask"].bool()
            ids = part["completion_ids"][mask]
            logps.append(sampled_logps(lm_head(teacher), hidden[mask], ids, trainer.vocab_size))
        results.append(torch.cat(logps))
    return results


@torch.no_grad()
def shared_scoring(trainer: VAOPDTrainer, views: list[dict[str, Any]]) -> list[torch.Tensor]:
    parts = trainer.teacher.parts(len(views[0]["prompt_ids"]), K, True)
    return trainer.teacher.score(views, parts, True)[1]


# Measuring


class Counter:
    """Context manager that counts forwards and tokens of the text tower and patches of the vision tower."""

    def __init__(self, model: Qwen3VLForConditionalGeneration):
        self.model, self.counts = model.model, {"forwards": 0, "tokens": 0, "patches": 0}

    def __enter__(self) -> dict[str, int]:
        self.hooks = [
            self.model.language_model.register_forward_pre_hook(self._text, with_kwargs=True),
            self.model.visual.register_forward_pre_hook(self._vision, with_kwargs=True),
        ]
        return self.counts

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _text(self, module, args, given) -> None:
        self.counts["forwards"] += 1
        self.counts["tokens"] += math.prod(given["inputs_embeds"].shape[:2])

    def _vision(self, module, args, given) -> None:
        self.counts["patches"] += len(args[0] if args else given["hidden_states"])


def compare(works: dict[str, Callable[[], Any]], model, repeats: int) -> dict[str, Any]:
    """Runs all works in turn, `repeats` times: seconds, counted work, ratios of the others to the first; results."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    counted, results = {}, {}
    for repeat in range(repeats + 1):  # the first warms up and counts
        for name, work in works.items():
            with Counter(model) as counts:
                time_, results[name] = seconds(work)
            counted[name] = counts
            if repeat:
                taken[name].append(time_)
    ours, *others = taken
    ratios = {name: spread(b / a for a, b in zip(taken[ours], taken[name], strict=True)) for name in others}
    return {"seconds": taken, "counted": counted, "ratio": ratios}, results


def scoring(options: argparse.Namespace, folder: str, prompt: int, shares: tuple[float, ...], response: int):
    """Teacher scoring of one prompt's siblings, whose lengths are `shares` of `response`."""
    trainer = build(folder, options, prompt, [max(2, round(share * response)) for share in shares])
    batch = DistillationTrainer._generate_and_score_completions(trainer, trainer_inputs(trainer))
    views = [batch, batch | {"pixel_values": batch["pixel_values"].flip(0)}]
    works = {
        "shared": lambda: shared_scoring(trainer, views),
        TRL: lambda: whole_scoring(trainer, views, K),
        ALONE: lambda: whole_scoring(trainer, views, 1),
    }
    found, results = compare(works, trainer.teacher_model, options.repeats)
    ours, *others = results.values()
    gaps = [(a - b).abs() for whole in others for a, b in zip(ours, whole, strict=True)]
    return found | {
        "prompt": int(batch["prompt_mask"][0].sum()),
        "responses": batch["completion_mask"].sum(1).tolist(),
        "largest_difference_in_logps": max(gap.max().item() for gap in gaps),
        "difference_of_the_views": (ours[0] - ours[1]).abs().max().item(),
    }


def trainer_inputs(trainer: VAOPDTrainer) -> list[dict[str, Any]]:
    return next(iter(trainer.get_train_dataloader()))


def student(options: argparse.Namespace, folder: str, prompt: int, response: int) -> dict[str, Any]:
    """Forward and backward of eight uneven rollouts in micro-batches of two."""
    lengths = [max(2, round(share * response)) for share in (*UNEVEN, *reversed(UNEVEN))]
    trainer = build(folder, options, prompt, lengths, micro_batch=2)
    batch = trainer._generate_and_score_completions(trainer_inputs(trainer))
    trimmed = siblings.trimmed_inputs

    def step(prepare, inputs):
        siblings.trimmed_inputs = inputs
        trainer.model.zero_grad()
        total = 0.0
        for part in prepare(batch, len(lengths) // 2):
            loss = trainer.compute_loss(trainer.model, part)
            loss.backward()
            total += loss.item()
        siblings.trimmed_inputs = trimmed
        return total, math.sqrt(
            sum(p.grad.square().sum().item() for p in trainer.model.parameters() if p.grad is not None)
        )

    works = {
        "trimmed": lambda: step(siblings.length_sorted, trimmed),
        TRL: lambda: step(trl_micro_batches, padded_inputs),
    }
    found, results = compare(works, trainer.model, options.repeats)
    real = sum(siblings.sequence_lengths(batch))
    return found | {"real_tokens": real, "responses": lengths, "loss_and_gradient_norm": results}


def whole_step(options: argparse.Namespace, folder: str, prompt: int, response: int) -> dict[str, Any]:
    """Two prompts times four rollouts that the student really samples: a step of VA-OPD and one of plain OPD, in
    turn."""
    trainer = build(folder, options, prompt, None, response=response)
    steps: dict[str, list[dict[str, float]]] = {"va": [], "none": []}
    # The first warms up; with --real a step takes half a minute
    for repeat in range(2 if options.real else options.repeats + 1):
        for weighting, found in steps.items():
            trainer.args.weighting, trainer.args.measure_va = weighting, weighting == "va"
            trainer._step = 0
            trainer._metrics["train"].clear()
            inputs = trainer_inputs(trainer)
            total, _ = seconds(lambda inputs=inputs: optimizer_step(trainer, inputs))
            times = {part: sum(x) for part, x in trainer._metrics["train"].items() if part.startswith("time/")}
            found += [{"step": total, **times}] if repeat else []
    more = spread(va["step"] / opd["step"] - 1 for va, opd in zip(*steps.values(), strict=True))
    return {"prompt": prompt, "response": response, "va_over_opd": more, "steps": steps}


def optimizer_step(trainer: VAOPDTrainer, inputs: list[dict[str, Any]]) -> None:
    """Generation, teacher, forward and backward."""
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(trainer.model, inputs, None)


# Prediction from FLOPs


def flops(size: str, image: int, text: int, response: int) -> dict[str, float]:
    """FLOPs of Qwen3-VL: vision tower on an image of `image` tokens, text tower on the prompt and on a response."""
    layers, hidden, inner, _, depth, vision, vision_inner, _ = REAL[size]
    heads, weights = hidden, 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * inner
    patches, prompt = 4 * image, image + text
    merger = 4 * (16 * vision * vision + 4 * vision * hidden)  # one and three for deepstack
    tower = (
        patches * depth * (2 * (4 * vision**2 + 2 * vision * vision_inner) + 4 * patches * vision) + 2 * image * merger
    )

    def tokens(count: int, before: int) -> float:
        return count * layers * (2 * weights + 4 * heads * (before + count / 2))

    head = 2 * 151936 * hidden * response
    return {"vision": tower, "prompt": tokens(prompt, 0), "response": tokens(response, prompt), "head": head}


def predicted() -> dict[str, float]:
    """Ratios of FLOPs for the 8B teacher, and the share of VA in a step of the paper's size on eight A100."""
    image, text, found = 960, 64, {}
    work = flops("8B", image, text, 512)
    for name, share in (("equal", 1.0), ("uneven", statistics.mean(UNEVEN))):
        once, each = work["vision"] + work["prompt"], work["response"]
        ours = once + K * share * (each + work["head"])
        found[f"teacher scoring, {name} lengths"] = K * (once + each + share * work["head"]) / ours
    # 64 rollouts on 8 GPUs at half of 312 TFLOP/s; the paper's step takes about 105 s, most of it generation. The head
    # twice: log-probabilities in both views
    for length in (512, 1500, 4096):
        one = flops("8B", image, text, length)
        extra = 2 * (one["vision"] + one["prompt"] + K * (one["response"] + 2 * one["head"])) / (0.5 * 312e12)
        found[f"seconds of VA, {length} tokens"] = extra
        found[f"VA over OPD at the paper's 105 s a step, {length} tokens"] = extra / (105 - extra)
    # The other end: an engine at the floor, 56 to 110 microseconds a generated token on an H100, student at 40 %
    one, small = flops("8B", image, text, 1000), flops("2B", image, text, 1000)
    head = one["head"] / (0.5 * 989e12)
    teacher = ((one["vision"] + one["prompt"]) / K + one["response"]) / (0.5 * 989e12) + head
    update = 4 * sum(small.values()) / (0.4 * 989e12)
    for decode in (56e-6, 110e-6):
        found[f"VA over OPD on an H100, decoding at {decode * 1e6:.0f} us a token"] = (teacher + head) / (
            1000 * decode + teacher + update
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--real", action="store_true", help="shapes of Qwen3-VL-2B and 8B; the next four are ignored")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision_hidden", type=int, default=96)
    parser.add_argument("--vision_layers", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt, 94 %% of them of its image")
    parser.add_argument("--response", type=int, default=512, help="tokens of the longest rollout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "va_opd_scoring.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    results: dict[str, Any] = {"settings": vars(options) | {"out": options.out.name}, **machine("transformers", "trl")}
    results["predicted"] = predicted()
    with tempfile.TemporaryDirectory() as folder:
        for name, work in sections(options, folder).items():
            results[name] = unless_out_of_memory(work) or {"out_of_memory": True}
            said = ("ratio", "largest_difference_in_logps", "loss_and_gradient_norm", "va_over_opd", "out_of_memory")
            print(name, {key: results[name][key] for key in said if key in results[name]}, flush=True)
            atomic_write_json(options.out, results)
    print(tables.of_file("va_opd_scoring", options.out))
    print(*(f"{name}: {value:.3g}" for name, value in results["predicted"].items()), sep="\n")


def sections(options: argparse.Namespace, folder: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """(name in the results, measurement) of each work and size."""
    prompt, response, found = options.prompt, options.response, {}
    for name, shares in (("equal", (1.0,) * K), ("uneven", UNEVEN)):
        for part in (1, 2, 4):
            arguments = (prompt // part, shares, response // part)
            found[f"{name} lengths, size 1/{part}"] = partial(scoring, options, folder, *arguments)
    for part in (1, 2, 4):
        arguments = (prompt // 4 // part, response // part)
        found[f"student, size 1/{part}"] = partial(student, options, folder, *arguments)
    for part in (1,) if options.real else (1, 2, 4):
        arguments = ((prompt if options.real else prompt // 4) // part, response // part)
        found[f"whole step, size 1/{part}"] = partial(whole_step, options, folder, *arguments)
    return found


if __name__ == "__main__":
    main()
