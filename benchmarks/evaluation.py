"""Generation by transformers for an evaluation: live batches beside padded ones, the same tokens in one run.

    python -m benchmarks.evaluation                    # CPU, about 5 minutes
    python -m benchmarks.evaluation --real --prompts 32 --tokens 256 --repeats 1      # a GPU

`naive` takes the prompts as they come, 16 at a time, and generates until the last of them stops. `ours` is
`common.evaluation.TransformersEngine`, `sorted` the same with its fixed batches, for caches that allow no exchange.
Prompts have 20 to 400 tokens (log-uniform). The model is small, with random weights, so that it stops with a
probability of about 1/100 after each token: responses of 1 to 512 tokens, 100 on average. All ways draw by the seed of
each prompt and give the same responses. The seconds are those of a small model on a CPU; forwards and tokens hold for
any. With --real it has the layers of Qwen3-0.6B, in bfloat16. Writes benchmarks/results/evaluation.json.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import tables
from benchmarks.machine import machine, spread
from common.evaluation import Completion, Decoding, Prompt, TransformersEngine
from common.evaluation.sampling import seeded_sampling
from common.runs import atomic_write_json
from common.tiny import char_tokenizer

BATCH = 16


def prompts(count: int) -> list[Prompt]:
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(20), np.log(400), count)).astype(int)
    return [Prompt([{"role": "user", "content": "?" * length}]) for length in lengths]


def small_engine(counts: Counter[str], real: bool = False) -> TransformersEngine:
    """An engine of 3 million weights, or with Qwen3-0.6B's layers; `counts` gets forwards and tokens with padding."""
    tokenizer = char_tokenizer()
    torch.manual_seed(0)
    hidden, inner, layers, heads, groups, head = (1024, 3072, 28, 16, 8, 128) if real else (256, 512, 4, 4, 2, 64)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    if real:
        model.to("cuda", torch.bfloat16)
    model.register_forward_pre_hook(
        lambda module, args, given: counts.update(forwards=1, tokens=given["input_ids"].numel()), with_kwargs=True
    )
    return TransformersEngine(model, tokenizer, BATCH)


@torch.no_grad()
def naive(engine: TransformersEngine, asked: Sequence[Prompt], decoding: Decoding) -> list[Completion]:
    done, tokenizer = [], engine.tokenizer
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        texts = tokenizer.apply_chat_template([p.messages for p in part], tokenize=False, add_generation_prompt=True)
        given = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(engine.model.device)
        width, seeds = given["input_ids"].size(1), range(start, start + len(part))
        sampling = seeded_sampling(
            1.0, 1.0, 0, seeds, torch.full((len(part),), width, device=engine.model.device), decoding.max_new_tokens
        )
        ids = engine.model.generate(
            **given, max_new_tokens=decoding.max_new_tokens, do_sample=False, logits_processor=sampling
        )
        done += [engine._completion(row) for row in ids[:, width:].tolist()]
    return done


def in_fixed_batches(engine: TransformersEngine, asked: Sequence[Prompt], decoding: Decoding) -> list[Completion]:
    engine._rows_are_exchangeable = False
    try:
        return engine.generate(asked, decoding, range(len(asked)))
    finally:
        engine._rows_are_exchangeable = True


def ways(
    engine: TransformersEngine, asked: Sequence[Prompt], decoding: Decoding
) -> dict[str, Callable[[], list[Completion]]]:
    return {
        "naive": partial(naive, engine, asked, decoding),
        "sorted": partial(in_fixed_batches, engine, asked, decoding),
        "ours": partial(engine.generate, asked, decoding, range(len(asked))),
    }


def measure(count: int, repeats: int, real: bool, tokens: int) -> dict[str, Any]:
    counts = Counter[str]()
    engine, asked = small_engine(counts, real), prompts(count)
    decoding = Decoding(temperature=1.0, max_new_tokens=tokens)
    short = Decoding(temperature=1.0, max_new_tokens=2)
    for work in ways(engine, asked[:BATCH], short).values():  # loads what the first call of each loads
        work()
    seconds: dict[str, list[float]] = {}
    counted, responses = {}, {}
    for _ in range(repeats):
        for name, work in ways(engine, asked, decoding).items():
            counts.clear()
            started = time.perf_counter()
            responses[name] = work()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
            counted[name] = dict(counts)
    lengths = sorted(completion.num_tokens for completion in responses["ours"])
    return {
        "seconds": seconds,
        "counted": counted,
        "ratio": spread([a / b for a, b in zip(seconds["naive"], seconds["ours"], strict=True)]),
        "response_tokens": {"sum": sum(lengths), "median": lengths[count // 2], "longest": lengths[-1]},
        "equal_responses": {
            name: sum(a == b for a, b in zip(responses["naive"], responses[name], strict=True))
            for name in ("sorted", "ours")
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="the longest response")
    parser.add_argument("--real", action="store_true", help="layers of Qwen3-0.6B, on a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    options = parser.parse_args(argv)
    found = {}
    for count in options.prompts:
        found[count] = measure(count, options.repeats, options.real, options.tokens)
        print(count, found[count], flush=True)
        atomic_write_json(options.out, {**machine("transformers"), "prompts": found})
    print(tables.of_file("evaluation", options.out))


if __name__ == "__main__":
    main()
