"""Generation by transformers, with rows that leave and join one batch."""

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.functional import pad

from .engines import Completion, Decoding, Prompt, never_sampled, stop_ids
from .live_batch import LiveBatch, is_joinable
from .sampling import seeded_sampling

# Settings that a model may declare for its own generation and no other engine reads: off for every model
UNDECLARED = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_new_tokens", "max_time", "guidance_scale")),
    **dict.fromkeys(("stop_strings", "bad_words_ids", "sequence_bias", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
}


@dataclass(frozen=True)
class _Work:
    """One call of `TransformersEngine.generate`: for each prompt its text, images and seed."""

    texts: list[str]
    images: list[Sequence[Any]]
    seeds: Sequence[int]
    decoding: Decoding


@dataclass(frozen=True)
class _Greedy:
    """The first tokens (B,) of greedy answers, and the logits (2, B, V) of their first two."""

    tokens: torch.Tensor
    logits: torch.Tensor

    def moved(self, row: int, alone: "_Greedy") -> float:
        """By how much of their spread a row's logits differ from those of the same prompt alone."""
        gap = (self.logits[:, row] - alone.logits[:, 0]).square().mean(-1).sqrt() / alone.logits[:, 0].std(-1)
        same = torch.equal(self.tokens[row], alone.tokens[0])  # else the second follow another one, as in a near tie
        return gap[: 1 + same].max().item()


class TransformersEngine:
    """Generates with `model.generate`, `batch_size` prompts at once, longest prompts first.

    After every 32 tokens the rows that have stopped leave the batch and the next prompts take their places, so that
    the work follows the tokens that are kept and not the longest response of a batch. Memory is that of `batch_size`
    rows of the longest prompt and `max_new_tokens`. Where a model's cache allows no such exchange (`is_joinable`), or
    the positions after an image are unknown here, batches are fixed. Where the rows of a batch would change each other
    (see `_shared_length`), a batch is one prompt.

    Each prompt is sampled by its own seed: up to rounding, the other prompts and `batch_size` change nothing.
    `chat_template_kwargs` go to the chat template, such as `enable_thinking`.
    """

    SEGMENT = 32  # tokens: a row wastes half as many, and each segment pays a pass over new prompts

    def __init__(self, model, processor, batch_size: int = 16, chat_template_kwargs: dict[str, Any] | None = None):
        self.template_options, self.options = chat_template_kwargs or {}, {"dtype": str(model.dtype)}
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # as TRL does
        self.name = model.name_or_path
        self.stops = stop_ids(model.generation_config.eos_token_id, processor)
        self.banned = never_sampled(processor, model.config)  # once: it reads the whole vocabulary
        self.said = False  # why prompts are answered one at a time
        # In Qwen's and GLM's vision families: what a row's images add to the positions of later tokens, as (B, 1)
        self.offsets = next((module for module in model.modules() if "rope_deltas" in vars(module)), None)

    def close(self) -> None:
        """Frees the model, unless the caller still holds it; `generate` fails after that."""
        self.model = self.offsets = None
        torch.cuda.empty_cache()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Completion]:
        work = _Work([self._render(prompt) for prompt in prompts], [p.images for p in prompts], seeds, decoding)
        order = sorted(range(len(prompts)), key=lambda i: len(work.texts[i]), reverse=True)  # the largest fails first
        live = self._rows_are_exchangeable and (self.offsets is not None or not any(work.images))
        done = dict((self._live if live else self._fixed)(order, work))
        return [self._completion(done[i]) for i in range(len(prompts))]

    def _live(self, order: list[int], work: _Work) -> Iterator[tuple[int, list[int]]]:
        """(prompt, generated ids) as they finish, by rows that leave and join one batch."""
        stops = torch.tensor(self.stops, dtype=torch.long, device=self.model.device)
        waiting, batch = list(order), None
        while waiting or batch:
            if free := min(self.batch_size - len(batch or ()), len(waiting)):
                new = self._first_tokens(waiting[:free], work)
                del waiting[:free]
                if batch:
                    batch.join(new)
                else:
                    batch = new
            else:
                self._next_tokens(batch, work)
            yield from batch.pop(stops, work.decoding.max_new_tokens)

    def _first_tokens(self, rows: list[int], work: _Work) -> LiveBatch:
        given = self._inputs(rows, work)
        output = self._tokens(given, rows, work, 1)
        mask = pad(given["attention_mask"], (0, 1), value=1)
        offsets = None if self.offsets is None else self.offsets.rope_deltas
        return LiveBatch(rows, output.sequences, mask, output.past_key_values, offsets)

    def _next_tokens(self, batch: LiveBatch, work: _Work) -> None:
        count = min(self.SEGMENT, work.decoding.max_new_tokens - int(batch.generated.max()))
        if self.offsets is not None:
            self.offsets.rope_deltas = batch.offsets
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, "past_key_values": batch.cache}
        batch.extend(self._tokens(given, batch.rows, work, count, batch.starts).sequences)

    def _fixed(self, order: list[int], work: _Work) -> Iterator[tuple[int, list[int]]]:
        """The same by batches that stay together until their last row stops."""
        for start in range(0, len(order), self.batch_size):
            rows, count = order[start : start + self.batch_size], work.decoding.max_new_tokens
            given = self._inputs(rows, work)
            alone = len(rows) > 1 and given["input_ids"].size(1) + count > self._shared_length
            if alone and not self.said:
                self.said = True
                why = (
                    "the frequencies of its RoPE follow the longest row" if self._shared_length else "it reads padding"
                )
                print(f"{self.name}: {why}, so prompts are answered one at a time", file=sys.stderr)
            for part in [[row] for row in rows] if alone else [rows]:
                given = self._inputs(part, work) if alone else given
                ids = self._tokens(given, part, work, count).sequences
                yield from zip(part, ids[:, given["input_ids"].size(1) :].tolist(), strict=True)

    @functools.cached_property
    def _rows_are_exchangeable(self) -> bool:
        """Whether rows can leave and join a batch, as the cache of one token shows."""
        if self._shared_length < math.inf:
            return False
        one = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
        given = {"input_ids": one, "attention_mask": torch.ones_like(one)}
        output = self._tokens(given, [0], _Work([""], [()], [0], Decoding()), 1)
        return is_joinable(output.get("past_key_values"))

    @functools.cached_property
    def _shared_length(self) -> float:
        """Tokens of prompt and answer up to which rows of a batch do not change each other; 0 where they always do.

        Some recurrent models read padding as text; a prompt beside a longer one shows it. bfloat16 moves logits by a
        hundredth of their spread, padding that is read by a tenth and more. Between, as by the rounding of many
        layers or experts, the longer prompt decides, which moves by rounding alone. The RoPE types `dynamic` and
        `longrope` change the frequencies of all rows when the longest one passes the length of pretraining.
        """
        config = self.model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        of_kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
        lengths = [
            kind.get("original_max_position_embeddings") or config.max_position_embeddings
            for kind in of_kinds
            if kind.get("rope_type") in ("dynamic", "longrope")
        ]
        ids = self.tokenizer("What is the sum of 1 and 2?", add_special_tokens=False, return_tensors="pt")["input_ids"]
        padded = torch.cat([torch.full((1, 5), self.tokenizer.pad_token_id), ids[:, 5:]], 1)
        mask = torch.ones_like(ids).repeat(2, 1)
        mask[0, :5] = 0
        beside = self._two_tokens(torch.cat([padded, ids]), mask)
        moved = beside.moved(0, alone=self._two_tokens(ids[:, 5:], mask[1:, 5:]))
        by_rounding = beside.moved(1, alone=self._two_tokens(ids, mask[1:]))
        return 0 if moved > max(0.05, min(2 * by_rounding, 0.1)) else min(lengths, default=math.inf)

    def _two_tokens(self, ids: torch.Tensor, mask: torch.Tensor) -> _Greedy:
        """What follows each row; the cache has its part in the second token."""
        given = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        given |= {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": None, "suppress_tokens": None}
        options = {"do_sample": False, "use_cache": True, "output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(**given, **options, **UNDECLARED, max_new_tokens=2)
        return _Greedy(output.sequences[:, -2], torch.stack(output.logits).float())

    def _inputs(self, rows: list[int], work: _Work):
        images = [list(work.images[i]) for i in rows]
        options = {"images": images} if any(images) else {}
        options["add_special_tokens"] = False  # the chat template has written the first one already
        given = self.processor(
            text=[work.texts[i] for i in rows], padding=True, padding_side="left", return_tensors="pt", **options
        )
        return given.to(self.model.device)

    def _tokens(
        self, given: Mapping[str, Any], rows: list[int], work: _Work, count: int, starts: torch.Tensor | None = None
    ):
        """`generate`'s output with sequences and cache, after at most `count` tokens more; `starts`: see LiveBatch."""
        sampling, decoding, ids = None, work.decoding, given["input_ids"]
        if decoding.temperature > 0:
            starts = torch.full((len(ids),), ids.size(1), device=ids.device) if starts is None else starts
            sampling = seeded_sampling(
                decoding.temperature,
                decoding.top_p,
                decoding.top_k,
                [work.seeds[i] for i in rows],
                starts,
                decoding.max_new_tokens,
            )
        return self.model.generate(
            **given,
            logits_processor=sampling,
            max_new_tokens=count,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.stops,
            suppress_tokens=self.banned or None,
            do_sample=False,
            use_cache=True,  # may be off in the config of a model in training
            return_dict_in_generate=True,
            **UNDECLARED,
        )

    def _render(self, prompt: Prompt) -> str:
        messages = [dict(message) for message in prompt.messages]
        if prompt.images or self._reads_parts:
            from trl import prepare_multimodal_messages  # seconds that `--help` need not wait

            messages = prepare_multimodal_messages(messages, images=list(prompt.images))
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.template_options
        )

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """Whether a content is given to the chat template in parts, as TRL and vLLM do for vision-language models: the
        templates of SmolVLM and LLaVA leave a plain text out. That of Phi-4-multimodal takes nothing else."""
        if self.processor is self.tokenizer:
            return False
        turn = {"role": "user", "content": [{"type": "text", "text": "@question@"}]}
        try:
            text = self.processor.apply_chat_template([turn], tokenize=False, **self.template_options)
        except (TemplateError, TypeError):
            return False
        return "@question@" in text and "'type'" not in text  # else it prints the list

    def _completion(self, ids: list[int]) -> Completion:
        length = next((i + 1 for i, token in enumerate(ids) if token in self.stops), None)
        if length is None:
            return Completion(self.tokenizer.decode(ids, skip_special_tokens=True), len(ids), "length")
        # Without the end itself, as by vLLM: not every tokenizer marks it as special
        return Completion(self.tokenizer.decode(ids[: length - 1], skip_special_tokens=True), length, "stop")
