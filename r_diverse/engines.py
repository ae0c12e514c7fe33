"""Engines that generate SAM's programs, greedily, from token ids: transformers, or a server such as `vllm serve`."""

import importlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple, Protocol

logger = logging.getLogger(__name__)

CODER = "Qwen/Qwen2.5-Coder-7B-Instruct"
# Settings that a model may declare for its own generation, off here: the paper's coder is plainly greedy
UNDECLARED = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_new_tokens", "max_time", "guidance_scale")),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    "prompt_lookup_num_tokens": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
}


class Generation(NamedTuple):
    """`text` without the stop string; `finished` is False if the token limit cut it, `refused` is True for a prompt
    that a server rejects although it accepts others."""

    text: str
    finished: bool
    refused: bool = False


class CoderEngine(Protocol):
    """What generates, greedily. `name` identifies the model."""

    name: str

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: str
    ) -> Sequence[Generation | None]:
        """One generation for each prompt of token ids, in order; None where the engine failed."""
        ...


class LocalCoderEngine:
    """Generates with `model.generate`, `batch_size` prompts at once, the longest first.

    Args:
        model: a causal model on its device.
        tokenizer: the model's.
        name: what caches and banks call the model. Default: the model's own name and, from the hub, its commit;
            needed if the model has neither.
    """

    def __init__(self, model, tokenizer, batch_size: int = 16, name: str | None = None):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # as TRL does
        revision = getattr(model.config, "_commit_hash", None)
        self.name = name or " ".join(filter(None, (model.name_or_path, revision)))
        declared = model.generation_config.eos_token_id
        declared = declared if isinstance(declared, list) else [declared]
        self._stops = sorted({*declared, tokenizer.eos_token_id} - {None})

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: str) -> list[Generation]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        done: list[Generation | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            rows = self._batch([prompts[i] for i in part], max_new_tokens, stop)
            for i, ids in zip(part, rows, strict=True):
                done[i] = self._read(ids, stop)
        return done

    def _batch(self, prompts: list[Sequence[int]], max_new_tokens: int, stop: str) -> list[list[int]]:
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=[stop],
            tokenizer=self.tokenizer,
            eos_token_id=self._stops,
            pad_token_id=self.tokenizer.pad_token_id,
            **UNDECLARED,
        )
        return output[:, inputs["input_ids"].size(1) :].tolist()

    def _read(self, ids: list[int], stop: str) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in self._stops), len(ids))
        text, found, _ = self.tokenizer.decode(ids[:end], skip_special_tokens=True).partition(stop)
        return Generation(text, bool(found) or end < len(ids))


class ServedCoderEngine:
    """Generates on a server that speaks OpenAI's completions and takes token ids, such as `vllm serve`.

    A request that still fails after its retries gives None for its prompt alone; one that the server refuses (status
    400) gives an empty generation.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: its name on the server.
        name: what caches and banks call the model, such as a name with its revision. Default: `model`.
        api_key: never taken from the environment: a key for another service must not go to this one.
        workers: requests at the same time.
        timeout: seconds for one request.
        retries: of one request, with growing pauses.

    `generate` raises `ConnectionError` if no request of a call reaches the model, or if the server refuses all of
    several requests before it has answered any with that token limit.
    """

    def __init__(
        self,
        base_url: str,
        model: str = CODER,
        api_key: str = "EMPTY",
        workers: int = 32,
        timeout: float = 600.0,
        retries: int = 4,
        name: str | None = None,
    ):
        self._openai = need("openai")
        self._client = self._openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
        self.base_url, self.model, self.workers, self.name = base_url, model, workers, name or model
        self._answered: set[int] = set()  # token limits of requests that were answered

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: str) -> list[Generation | None]:
        with ThreadPoolExecutor(self.workers) as pool:
            results = list(pool.map(lambda ids: self._one(list(ids), max_new_tokens, stop), prompts))
        errors = [result for result in results if isinstance(result, Exception)]
        if len(errors) < len(results):
            self._answered.add(max_new_tokens)
        refused = [isinstance(result, self._openai.BadRequestError) for result in results]
        prompt_alone = max_new_tokens in self._answered or len(results) == 1  # may be why it is refused
        lost = (
            self._openai.APIConnectionError,
            self._openai.AuthenticationError,
            self._openai.PermissionDeniedError,
            self._openai.NotFoundError,
            *([] if prompt_alone else [self._openai.BadRequestError]),
        )
        if errors and len(errors) == len(results) and all(isinstance(error, lost) for error in errors):
            raise ConnectionError(
                f"no request of {len(results)} was answered by {self.name} at {self.base_url} ({errors[0]}): check "
                "that the server runs, serves this model with a context that is long enough, and accepts the key"
            ) from errors[0]
        if errors:
            logger.warning("%d of %d requests to %s failed: %s", len(errors), len(results), self.base_url, errors[0])
        return [
            Generation("", False, refused=True) if no else None if isinstance(result, Exception) else result
            for result, no in zip(results, refused, strict=True)
        ]

    def _one(self, ids: list[int], max_new_tokens: int, stop: str) -> Generation | Exception:
        try:
            reply = self._client.completions.create(
                model=self.model,
                prompt=ids,
                temperature=0.0,
                max_tokens=max_new_tokens,
                stop=[stop],
                presence_penalty=0.0,  # without these three, `vllm serve` takes what the model's config declares
                frequency_penalty=0.0,
                extra_body={"repetition_penalty": 1.0},
            )
            text, reason = reply.choices[0].text, reply.choices[0].finish_reason
            if not isinstance(text, str):
                raise TypeError(f"the reply has {type(text).__name__} in place of a text")
            if reason == "abort":  # vLLM's reply to what it did not finish: no fault of the question
                raise ValueError("the server aborted the request")
            return Generation(text, reason == "stop")
        # The last four: an aborted reply or one of another form
        except (self._openai.OpenAIError, IndexError, TypeError, AttributeError, ValueError) as error:
            return error


def need(module: str) -> ModuleType:
    """Imports the module of a package of the extra `skills`; `ImportError` says how to install it."""
    package = module.replace("_", "-")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package} cannot be imported ({error}): pip install {package}, or all that this needs with "
            "pip install '.[skills]'"
        ) from error
