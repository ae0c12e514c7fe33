"""One SRPO step beside TRL's experimental SDPO and beside our own GRPO, on the same rollouts in one run.

    python -m benchmarks.srpo_step                                    # CPU, about 8 minutes
    python -m benchmarks.srpo_step --hidden 2560 --layers 36 --vocabulary 151936 --response 800      # a GPU

A step here is reward, teacher phase, forward and backward of 32 rollouts; generation and optimizer are the same for
all and left out. The models have random weights. The rollouts are fixed: groups of 8, about 40 % of them failed with
a correct sibling. By default the head takes 8 % of a token's work, as in Qwen3-8B.
Writes benchmarks/results/srpo_step.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
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

ROLLOUTS, GROUP = 32, 8
KINDS = ("srpo", "sdpo (trl)", "sdpo", "grpo")


def reward(completions, **columns) -> list[float]:
    """5, 5, 5 and 4 of 8 siblings are correct: 13 of 32 rows, 41 %, fail beside a correct one."""
    return [float(i % GROUP < (4 if i // GROUP == 3 else 5)) for i in range(len(completions))]


def rollout_ids(response: int, eos: int) -> list[list[int]]:
    """Printable characters, lengths from half of `response` to the whole."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(response // 2, response, ROLLOUTS)
    return [[*rng.integers(10, 100, length).tolist(), eos] for length in lengths]


def build(kind: str, folder: str, tokenizer, options: argparse.Namespace):
    """A trainer whose rollouts are fixed."""
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": ROLLOUTS // options.micro_batch,
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
    rows = [{"prompt": [{"role": "user", "content": f"{i}{question}"}]} for i in range(ROLLOUTS // GROUP)]
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
    parser.add_argument("--prompt", type=int, default=64, help="characters, about the tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="longest response in tokens")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "srpo_step.json")
    options = parser.parse_args(argv)

    tokenizer = char_tokenizer()
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(2, options.hidden // 128),
        num_key_value_heads=max(1, options.hidden // 256),
        head_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        results = measure(folder, tokenizer, options)
        results["seconds of shorter steps"] = shorter_steps(folder, tokenizer, options)
    print(table(results))
    atomic_write_json(
        options.out,
        {"settings": vars(options) | {"out": options.out.name}, "machine": machine("transformers", "trl"), **results},
    )


def shorter_steps(folder: str, tokenizer, options: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Seconds of SRPO and SDPO by tokens of the longest response, for prompts and responses of half and a quarter."""
    found = {}
    for share in (2, 4):
        lengths = {"response": options.response // share, "prompt": options.prompt // share}
        shorter = argparse.Namespace(**vars(options) | lengths | {"repeats": 1})
        found[shorter.response] = measure(folder, tokenizer, shorter, ("srpo", "sdpo (trl)"))["seconds"]
    return found


def measure(folder: str, tokenizer, options: argparse.Namespace, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Seconds of each repeat, interleaved so that all see the same machine, and the teacher's tokens of one step."""
    ids = rollout_ids(options.response, tokenizer.eos_token_id)
    GRPOTrainer._generate_single_turn = lambda self, *args, **kwargs: (ids, None)
    SDPOTrainer._generate = lambda self, prompt_ids: (prompt_ids, ids)
    trainers = {kind: build(kind, folder, tokenizer, options) for kind in kinds}
    counters = {kind: count_teacher(t) if kind != "grpo" else [] for kind, t in trainers.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(options.repeats + 1):  # the first warms up
        for kind, trainer in trainers.items():
            counters[kind].clear()
            taken = seconds_of_a_step(trainer)
            if repeat:
                seconds[kind].append(taken)
        print(f"repeat {repeat}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items() if v), flush=True)
    ratios = [a / b for a, b in zip(seconds["srpo"], seconds["sdpo (trl)"], strict=True)]
    needed = sum(len(row) for row, r in zip(ids, reward([None] * ROLLOUTS), strict=True) if not r)
    return {
        "seconds": seconds,
        "teacher_tokens_forwarded": {kind: sum(counter) for kind, counter in counters.items()},
        "srpo_scored_over_needed": trainers["srpo"]._metrics["train"]["teacher/scored_over_needed"][-1],
        "response_tokens_needed": needed,
        "response_tokens": sum(len(row) for row in ids),
        "srpo_over_trl_sdpo": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def table(results: dict[str, Any]) -> str:
    rows = [
        [
            kind,
            f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]",
            results["teacher_tokens_forwarded"][kind],
        ]
        for kind, values in results["seconds"].items()
    ]
    ratio = results["srpo_over_trl_sdpo"]
    return (
        plots.table_markdown(rows, ["step", "seconds, median [min, max]", "tokens through the teacher"])
        + f"\n\nSRPO over TRL's SDPO: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] of the seconds; "
        f"response tokens scored over needed: {results['srpo_scored_over_needed']:.2f}"
    )


if __name__ == "__main__":
    main()
