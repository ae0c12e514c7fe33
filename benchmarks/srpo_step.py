"""One SRPO step beside TRL's experimental SDPO and beside our own GRPO, on the same rollouts in one run.

    python -m benchmarks.srpo_step                                    # CPU, about 8 minutes
    python -m benchmarks.srpo_step --real 4B --rollouts 256 --response 800      # a GPU with 141 GB

A step here is reward, teacher phase, forward and backward of 32 rollouts; generation and optimizer are the same for
all and left out. The models have random weights; the 8 or 16 GB of --real are saved in TMPDIR first. The rollouts are
fixed: groups of 8, about 40 % of them failed with a correct sibling. By default the head takes 8 % of a token's work,
as in Qwen3-8B. Writes benchmarks/results/srpo_step.json.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks.machine import machine, seconds, spread, unless_out_of_memory
from benchmarks.va_opd_scoring import as_training_does, precision
from common import plots
from common.runs import atomic_write_json
from common.tiny import char_tokenizer
from srpo import SRPOConfig, SRPOTrainer

GROUP = 8
KINDS = ("srpo", "sdpo (trl)", "sdpo", "grpo")
PAIR = KINDS[:2]
Found = dict[str, dict[str, Any]]
REAL = {"4B": (2560, 36, 9728, 32, True), "8B": (4096, 36, 12288, 32, False)}  # of Qwen3, as published


def reward(completions, **columns) -> list[float]:
    """Of four prompts 5, 5, 5 and 4 of 8 siblings are correct: 13 of 32 rows, 41 %, fail beside a correct one."""
    return [float(i % GROUP < (4 if i // GROUP % 4 == 3 else 5)) for i in range(len(completions))]


def prompts(options: argparse.Namespace, group: int) -> Dataset:
    """Rows with one prompt for each group of rollouts."""
    question = "".join(chr(97 + i % 26) for i in range(options.prompt))
    rows = [{"prompt": [{"role": "user", "content": f"{i}{question}"}]} for i in range(options.rollouts // group)]
    return Dataset.from_list(rows)


def rollout_ids(rollouts: int, response: int, eos: int) -> list[list[int]]:
    """Ids of printable characters, with lengths from half of `response` to the whole."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(response // 2, response, rollouts)
    return [[*rng.integers(10, 100, length).tolist(), eos] for length in lengths]


def build(kind: str, folder: str, tokenizer, options: argparse.Namespace):
    """A trainer that computes as in `train()`."""
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.rollouts // options.micro_batch,
        "num_generations": GROUP,
        # TRL's limit holds for the teacher's prompt too
        "max_prompt_length": 8 * options.prompt + 4 * options.response,
        "max_completion_length": options.response,
        "report_to": [],
        **precision(),
        "save_strategy": "no",
        "shuffle_dataset": False,
        "learning_rate": 1e-6,
    }
    parts = {"reward_funcs": reward, "train_dataset": prompts(options, GROUP), "processing_class": tokenizer}
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
        return as_training_does(SDPOTrainer(model=folder, args=SDPOConfig(**shared, **settings), **parts))
    args = SRPOConfig(**shared, routing=kind, doctor_steps=0, max_reprompt_length=10**6)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return as_training_does(SRPOTrainer(model, args=args, **parts))


def count_teacher(trainer) -> list[int]:
    """Collects the tokens of every teacher forward, those of its prompts too and no padding."""
    teacher = trainer.teacher.model if isinstance(trainer, SRPOTrainer) else trainer.teacher_model
    tokens: list[int] = []
    if teacher is not None:
        teacher.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
        )
    return tokens


def seconds_of_a_step(trainer) -> float:
    """Seconds of one generation batch, without its generation and optimizer."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._step = 0
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    parts = range(trainer.args.steps_per_generation)
    return seconds(lambda: [trainer.training_step(trainer.model, inputs, None) for _ in parts])[0]


def step_parser(about: str, name: str) -> argparse.ArgumentParser:
    """The options of every measurement of a step: shapes of the model and of a batch."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument(
        "--rollouts", type=int, default=32, help="a multiple of --micro_batch; of r_diverse_step of four of them"
    )
    parser.add_argument("--prompt", type=int, default=64, help="characters, about the tokens of a prompt")
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = step_parser(__doc__, "srpo_step")
    parser.add_argument("--real", choices=REAL, help="shapes of this Qwen3, whatever --hidden and the like say")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--response", type=int, default=128, help="longest response in tokens")
    options = parser.parse_args(argv)

    tokenizer = char_tokenizer()
    known = {"settings": vars(options) | {"out": options.out.name}, "machine": machine("transformers", "trl")}

    def save(found: Found) -> None:
        atomic_write_json(options.out, known | summary(found, tokenizer, options))

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, tokenizer, options)
        found = measure(folder, tokenizer, options, save)
    print(table(summary(found, tokenizer, options)))


def save_model(folder: str, tokenizer, options: argparse.Namespace) -> None:
    """Saves the model with random weights from which each trainer is made."""
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


def measure(folder: str, tokenizer, options: argparse.Namespace, save: Callable[[Found], None]) -> Found:
    """What `in_turns` finds. On a CPU the kinds take turns, so that all see the same machine; on a GPU they follow one
    another, so that each has a peak of memory of its own."""
    found: Found = {}
    for turn in [[kind] for kind in options.kinds] if torch.cuda.is_available() else [options.kinds]:
        in_turns(turn, folder, tokenizer, options, found, save)
        gc.collect()
    return found


def in_turns(
    kinds: list[str], folder: str, tokenizer, options: argparse.Namespace, found: Found, save: Callable[[Found], None]
) -> None:
    """Puts into `found`, for each kind, the seconds of each repeat and of steps with a quarter and a half of the
    response (these come first), its peak of memory and the teacher's tokens, or the response for which memory did not
    suffice. Saved after each length."""
    trainers, counters = {}, {}
    for kind in kinds:
        found[kind] = {"seconds": [], "shorter": {}}
        if (trainer := unless_out_of_memory(partial(build, kind, folder, tokenizer, options))) is None:
            found[kind]["out_of_memory"] = 0
        else:
            trainers[kind], counters[kind] = trainer, count_teacher(trainer) if kind != "grpo" else []
    for share, repeats in ((4, 1), (2, 1), (1, options.repeats)):
        length = options.response // share
        fix_rollouts(rollout_ids(options.rollouts, length, tokenizer.eos_token_id))
        for repeat in range(repeats + 1):  # the first warms up
            for kind, trainer in trainers.items():
                if "out_of_memory" in found[kind]:
                    continue
                counters[kind].clear()
                taken = unless_out_of_memory(partial(seconds_of_a_step, trainer))
                if taken is None:
                    found[kind]["out_of_memory"] = length
                    continue
                print(f"{kind}, responses of up to {length}: {taken:.2f} s", flush=True)
                if repeat:
                    entry = found[kind]
                    (entry["seconds"] if share == 1 else entry["shorter"].setdefault(length, [])).append(taken)
        save(found)
    for kind, trainer in trainers.items():
        found[kind]["teacher_tokens_forwarded"] = sum(counters[kind])
        found[kind]["scored_over_needed"] = trainer._metrics["train"].get("teacher/scored_over_needed", [None])[-1]
        gpu = torch.cuda.is_available()
        found[kind]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    save(found)


def summary(found: Found, tokenizer, options: argparse.Namespace) -> dict[str, Any]:
    """The results of the kinds that are done, and the ratio of seconds if both of `PAIR` are."""
    done = {kind: x for kind, x in found.items() if "peak_gib" in x and "out_of_memory" not in x}
    keys = ("seconds", "peak_gib", "teacher_tokens_forwarded")
    results = {key: {kind: entry[key] for kind, entry in done.items()} for key in keys}
    results["out_of_memory"] = {kind: x["out_of_memory"] for kind, x in found.items() if "out_of_memory" in x}
    results["seconds of shorter steps"] = {
        length: {kind: x["shorter"][length] for kind, x in found.items() if length in x["shorter"]}
        for length in (options.response // 4, options.response // 2)
    }
    ids = rollout_ids(options.rollouts, options.response, tokenizer.eos_token_id)
    results["response_tokens"] = sum(len(row) for row in ids)
    results["response_tokens_needed"] = sum(
        len(row) for row, r in zip(ids, reward([None] * len(ids)), strict=True) if not r
    )
    if "srpo" in done:
        results["srpo_scored_over_needed"] = done["srpo"]["scored_over_needed"]
    if all(kind in done for kind in PAIR):
        results["srpo_over_trl_sdpo"] = spread(
            a / b for a, b in zip(*(done[kind]["seconds"] for kind in PAIR), strict=True)
        )
    return results


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
    columns = ["step", "seconds, median [min, max]", "teacher's tokens", "peak GiB"]
    lines = [plots.table_markdown(rows, columns[: len(rows[0])])] if rows else []
    lines += [f"{kind}: out of memory, responses of {n}" for kind, n in results["out_of_memory"].items()]
    if ratio := results.get("srpo_over_trl_sdpo"):
        lines.append("SRPO over TRL's SDPO: {median:.2f} [{low:.2f}, {high:.2f}] of the seconds".format(**ratio))
    if scored := results.get("srpo_scored_over_needed"):
        lines.append(f"response tokens scored over needed: {scored:.2f}")
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
