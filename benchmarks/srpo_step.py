"""One SRPO step beside TRL's experimental SDPO and beside our own GRPO, on the same rollouts in one run.

    python -m benchmarks.srpo_step                                    # CPU, about 8 minutes
    python -m benchmarks.srpo_step --real 4B --rollouts 256 --response 800      # a GPU with 141 GB

A step here is reward, teacher phase, forward and backward of 32 rollouts; generation and optimizer are the same for
all and left out. The models have random weights. The rollouts are fixed: groups of 8, about 40 % of them failed with
a correct sibling. By default the head takes 8 % of a token's work, as in Qwen3-8B.
Writes benchmarks/results/srpo_step.json.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks.machine import machine
from benchmarks.va_opd_scoring import synchronize
from common import plots
from common.runs import atomic_write_json
from common.tiny import char_tokenizer
from srpo import SRPOConfig, SRPOTrainer

GROUP = 8
KINDS = ("srpo", "sdpo (trl)", "sdpo", "grpo")
REAL = {"4B": (2560, 36, 9728, 32, True), "8B": (4096, 36, 12288, 32, False)}  # of Qwen3, as published


def reward(completions, **columns) -> list[float]:
    """Of four prompts 5, 5, 5 and 4 of 8 siblings are correct: 13 of 32 rows, 41 %, fail beside a correct one."""
    return [float(i % GROUP < (4 if i // GROUP % 4 == 3 else 5)) for i in range(len(completions))]


def rollout_ids(rollouts: int, response: int, eos: int) -> list[list[int]]:
    """Printable characters, lengths from half of `response` to the whole."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(response // 2, response, rollouts)
    return [[*rng.integers(10, 100, length).tolist(), eos] for length in lengths]


def build(kind: str, folder: str, tokenizer, options: argparse.Namespace):
    """A trainer whose rollouts are fixed."""
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.rollouts // options.micro_batch,
        "num_generations": GROUP,
        "max_prompt_length": 8 * options.prompt
        + 4 * options.response,  # TRL's limit holds for the teacher's prompt too
        "max_completion_length": options.response,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),
        "save_strategy": "no",
        "shuffle_dataset": False,
        "learning_rate": 1e-6,
    }
    question = "".join(chr(97 + i % 26) for i in range(options.prompt))
    rows = [{"prompt": [{"role": "user", "content": f"{i}{question}"}]} for i in range(options.rollouts // GROUP)]
    parts = {"reward_funcs": reward, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    if kind == "sdpo (trl)":
        settings = {
            "distillation_weight": 1.0,
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
            "distillation_add_tail": True,
            "distillation_alpha": 0.5,
            "teacher_model_kind": "ema",
            "success_reward_threshold": 0.5,
            "dont_reprompt_on_self_success": True,
            "include_environment_feedback": False,
            "scale_rewards": "none",
        }
        args = SDPOConfig(**shared, **settings)
        return SDPOTrainer(model=folder, args=args, **parts)
    args = SRPOConfig(**shared, routing=kind, doctor_steps=0, max_reprompt_length=10**6)
    dtype = torch.float32
    return SRPOTrainer(Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype), args=args, **parts)


def count_teacher(trainer) -> list[int]:
    """Collects the response tokens of every teacher forward, from the shapes that its backbone sees."""
    teacher = trainer.teacher.model if isinstance(trainer, SRPOTrainer) else trainer.teacher_model
    tokens: list[int] = []
    if teacher is not None:
        teacher.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
        )
    return tokens


def seconds_of_a_step(trainer) -> float:
    accumulation = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = accumulation
    trainer._step = 0
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    for _ in range(accumulation):
        trainer.training_step(trainer.model, inputs, None)
    synchronize()
    return clock() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--real", choices=REAL, help="shapes of this Qwen3; the three above are ignored")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="characters, about the tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="longest response in tokens")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "srpo_step.json")
    options = parser.parse_args(argv)

    tokenizer = char_tokenizer()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if options.real and memory.is_dir() else None) as folder:
        save_model(folder, tokenizer, options)
        results = measure(folder, tokenizer, options)
    print(table(results))
    atomic_write_json(
        options.out,
        {"settings": vars(options) | {"out": options.out.name}, "machine": machine("transformers", "trl"), **results},
    )


def save_model(folder: str, tokenizer, options: argparse.Namespace) -> None:
    """With random weights, from which each trainer is made."""
    hidden, layers = options.hidden, options.layers
    inner, heads, head, groups, tied = 3 * hidden, max(2, hidden // 128), 64, max(1, hidden // 256), False
    if options.real:
        (hidden, layers, inner, heads, tied), head, groups = REAL[options.real], 128, 8
    config = Qwen3Config(
        vocab_size=151936 if options.real else options.vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    (model.bfloat16() if options.real else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: str, tokenizer, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each repeat and the teacher's tokens of one step. On a CPU the kinds take turns, so that all see the
    same machine; on a GPU one follows the other, and its peak of memory is its own."""
    found: dict[str, dict[str, Any]] = {}
    for turn in [[kind] for kind in options.kinds] if torch.cuda.is_available() else [options.kinds]:
        found |= in_turns({kind: build(kind, folder, tokenizer, options) for kind in turn}, tokenizer, options)
        gc.collect()
    keys = ("seconds", "peak_gib", "teacher_tokens_forwarded")
    results = {key: {kind: entry[key] for kind, entry in found.items()} for key in keys}
    ratios = [a / b for a, b in zip(*(results["seconds"][kind] for kind in ("srpo", "sdpo (trl)")), strict=True)]
    ids = rollout_ids(options.rollouts, options.response, tokenizer.eos_token_id)
    needed = sum(len(row) for row, r in zip(ids, reward([None] * len(ids)), strict=True) if not r)
    return results | {
        "srpo_scored_over_needed": found["srpo"]["scored_over_needed"],
        "response_tokens_needed": needed,
        "response_tokens": sum(len(row) for row in ids),
        "srpo_over_trl_sdpo": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "seconds of shorter steps": {
            length: {kind: found[kind]["shorter"][length] for kind in ("srpo", "sdpo (trl)")}
            for length in found["srpo"]["shorter"]
        },
    }


def in_turns(trainers: dict[str, Any], tokenizer, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `measure` wants of each trainer; steps with a half and a quarter of the response come first."""
    counters = {kind: count_teacher(trainer) if kind != "grpo" else [] for kind, trainer in trainers.items()}
    found = {kind: {"seconds": [], "shorter": {}} for kind in trainers}
    for share, repeats in ((4, 1), (2, 1), (1, options.repeats)):
        ids = rollout_ids(options.rollouts, options.response // share, tokenizer.eos_token_id)
        fix_rollouts(ids)
        for repeat in range(repeats + 1):  # the first warms up
            for kind, trainer in trainers.items():
                counters[kind].clear()
                seconds = seconds_of_a_step(trainer)
                print(f"{kind}, responses of up to {options.response // share}: {seconds:.2f} s", flush=True)
                if repeat:
                    kept = found[kind]["shorter"].setdefault(options.response // share, []) if share > 1 else None
                    (found[kind]["seconds"] if kept is None else kept).append(seconds)
    for kind, trainer in trainers.items():
        found[kind]["teacher_tokens_forwarded"] = sum(counters[kind])
        found[kind]["scored_over_needed"] = trainer._metrics["train"].get("teacher/scored_over_needed", [None])[-1]
        gpu = torch.cuda.is_available()
        found[kind]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return found


def fix_rollouts(ids: list[list[int]]) -> None:
    GRPOTrainer._generate_single_turn = lambda self, *args, **kwargs: (ids, None)
    SDPOTrainer._generate = lambda self, prompt_ids: (prompt_ids, ids)


def table(results: dict[str, Any]) -> str:
    rows = [
        [
            kind,
            f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]",
            results["teacher_tokens_forwarded"][kind],
            *([f"{results['peak_gib'][kind]:.1f}"] if results["peak_gib"][kind] else []),
        ]
        for kind, values in results["seconds"].items()
    ]
    ratio = results["srpo_over_trl_sdpo"]
    return (
        plots.table_markdown(
            rows, ["step", "seconds, median [min, max]", "teacher's tokens", "peak GiB"][: len(rows[0])]
        )
        + f"\n\nSRPO over TRL's SDPO: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] of the seconds; "
        f"response tokens scored over needed: {results['srpo_scored_over_needed']:.2f}"
    )


if __name__ == "__main__":
    main()
