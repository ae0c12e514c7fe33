"""What generates: vLLM's offline engine, a server or transformers (in its own module), behind one small interface."""

import base64
import gc
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import TemplateError

if TYPE_CHECKING:
    from .transformers_engine import TransformersEngine

# Options of vllm.LLM that fit an engine to its machine; an evaluation may go on with other values
MACHINE_OPTIONS = {
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "max_num_seqs", "max_num_batched_tokens",
    "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "compilation_config", "download_dir",
    "seed", "disable_log_stats", "load_format", "trust_remote_code",
}  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How to sample: temperature 0 is greedy, `top_k` 0 is off. Raises `ValueError` for a value out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "must be at least 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("top_k", self.top_k >= 0, "must be at least 0, which is off"),
        ):
            if not valid:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Prompt:
    """Messages in TRL's format, and the PIL images of their image parts in order (first, if there is no such part)."""

    messages: Sequence[dict[str, Any]]
    images: Sequence[Any] = ()


@dataclass(frozen=True)
class Completion:
    """`finish_reason` as vLLM names it: "stop", or "length" for a response that was cut at the token limit; "refused"
    for a prompt that a server rejects although it accepts others."""

    text: str
    num_tokens: int
    finish_reason: str


class Engine(Protocol):
    """`name` identifies the model in result files."""

    name: str

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Completion | None]:
        """One completion for each prompt, in order; None where a request failed. Equal prompts and seeds give equal
        completions, up to rounding."""
        ...


def json_options(
    name: str, text: str | dict[str, Any], example: str = '{"tensor_parallel_size": 2}'
) -> dict[str, Any]:
    """The options that a command takes as JSON; `ValueError` for other text and for what an engine sets itself."""
    try:
        options = text if isinstance(text, dict) else json.loads(text)  # a config file may hold a mapping
    except (TypeError, ValueError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{name} must be JSON such as {example}, got {text}")
    if taken := {"tokenize", "add_generation_prompt", "return_dict", "return_tensors"} & options.keys():
        raise ValueError(f"{name} must leave out {', '.join(sorted(taken))}, which the engine sets; got {text}")
    return options


def load_engine(
    kind: str,
    model: str,
    batch_size: int,
    *,
    bf16: bool,
    device: Any,
    chat_template_kwargs: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> "VLLMEngine | TransformersEngine":
    """An engine for `model`, a hub id or a local folder, in this process; the caller closes it.

    Args:
        kind: "vllm", which takes `options` of `vllm.LLM`; or "transformers", which takes `batch_size`, `bf16` (else
            float32) and `device`.
        chat_template_kwargs: for the chat template, such as `enable_thinking`.

    Raises `ValueError` for another kind.
    """
    if kind == "vllm":
        return VLLMEngine(model, chat_template_kwargs, **(options or {}))
    if kind != "transformers":
        raise ValueError(f"engine must be transformers or vllm, got {kind!r}")
    import torch

    from common.models import load_model, load_processor

    from .transformers_engine import TransformersEngine

    # A merge in bfloat16 would round a small adapter away: half of one that is a thousandth of the weights
    loaded = load_model(model, torch.bfloat16 if bf16 else torch.float32, device, merge=not bf16)
    engine = TransformersEngine(loaded, load_processor(model), batch_size, chat_template_kwargs)
    engine.name = model  # for an adapter its folder, not its base
    return engine


def build_engine(args: Any, model: str, config: Any) -> "VLLMEngine | TransformersEngine":
    """`load_engine` with the settings of a method: its `ScriptArguments` and its TRL configuration."""
    return load_engine(
        args.engine,
        model,
        args.eval_batch_size,
        bf16=config.bf16,
        device=config.device,
        chat_template_kwargs=config.chat_template_kwargs,
        options=json_options("engine_options", args.engine_options),
    )


class VLLMEngine:
    """Generates with vLLM's offline engine; needs the extra `vllm`. Each prompt has its own seed.

    The engine runs in this process: scheduling is then deterministic, and a killed run leaves no process that holds
    GPU memory. `engine_options` are those of `vllm.LLM`, such as `dtype` and `tensor_parallel_size`; by default
    `max_model_len` is what fits into the GPU's memory, up to the model's own. A LoRA adapter is merged into its base.
    Raises `ValueError` for options or a model that vLLM does not take, and `generate` for a prompt that is too long.
    """

    def __init__(self, model: str, chat_template_kwargs: dict[str, Any] | None = None, **engine_options: Any):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # FlashInfer's sampler, which seeded requests do not use, is compiled at the start and needs a CUDA toolkit
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("engine vllm needs vLLM: pip install 'post-training-reference[vllm]'") from error
        from common.models import load_processor

        self.merged = _merged(model, engine_options.get("dtype"))  # kept: vLLM reads from it later, too
        folder = self.merged.name if self.merged else model
        try:
            self.llm, self.name = LLM(model=folder, **{"max_model_len": -1, **engine_options}), model
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"vLLM does not start {model} with engine_options={engine_options}: {_reason(error)}; change them, or "
                "use the engine transformers"
            ) from error
        self.template_options, self.options = chat_template_kwargs or {}, deciding_options(engine_options)
        self.warns_of_cuts = "max_model_len" not in engine_options  # else the user has chosen where to cut
        config, processor = self.llm.model_config, load_processor(model)
        self.stops = stop_ids(config.try_get_generation_config().get("eos_token_id"), processor)
        # The lowest bias that vLLM takes; a list of all other tokens would go with every request
        self.bias = dict.fromkeys(never_sampled(processor, config.hf_config), -100.0)

    def close(self) -> None:
        """Frees the GPU for what comes next in this process; `generate` fails after that.

        vLLM hides what it holds from the garbage collector until its engine is shut down.
        """
        import torch

        core, self.llm = self.llm.llm_engine.engine_core, None
        core.shutdown()
        del core
        gc.collect()
        torch.cuda.empty_cache()
        if self.merged:
            self.merged.cleanup()

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        parameters = [
            SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=self.stops,
                logit_bias=self.bias,
                seed=seed,
            )
            for seed in seeds
        ]
        try:
            outputs = self.llm.chat(
                [_with_images(prompt, _as_pil) for prompt in prompts],
                parameters,
                use_tqdm=False,
                chat_template_kwargs=self.template_options,
            )
        except VLLMValidationError as error:
            raise ValueError(f"vLLM does not take a prompt: {error}; raise max_model_len in engine_options") from error
        completions = [
            Completion(out.outputs[0].text, len(out.outputs[0].token_ids), out.outputs[0].finish_reason)
            for out in outputs
        ]
        config = self.llm.model_config
        if config.max_model_len < getattr(config.hf_text_config, "max_position_embeddings", 0):
            why = f", since the GPU's memory holds prompts and responses of {config.max_model_len}"
            remedy = "raise gpu_memory_utilization in engine_options"
            _warn_of_cuts(self, completions, decoding.max_new_tokens, f"{why}: {remedy}")
        return completions


def _warn_of_cuts(engine: Any, completions: Sequence[Completion | None], limit: int, why: str) -> None:
    """Warns once of responses that were cut before they had `limit` tokens, which vLLM does without a word."""
    cut = sum(done is not None and done.finish_reason == "length" and done.num_tokens < limit for done in completions)
    if engine.warns_of_cuts and cut:
        engine.warns_of_cuts = False
        print(
            f"{engine.name}: {cut} responses were cut short of {limit} tokens{why} and evaluate into another folder: "
            "records stay",
            file=sys.stderr,
        )


def deciding_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those options of `vllm.LLM` that may change an answer, such as `max_model_len`, as JSON values."""
    deciding = {name: value for name, value in options.items() if name not in MACHINE_OPTIONS}
    return json.loads(json.dumps(deciding, default=str))


def _merged(model: str, dtype: str | None) -> tempfile.TemporaryDirectory | None:
    """For a folder with a LoRA adapter, a temporary one with the adapter merged into its base (vLLM applies adapters
    only to some layers of some families), in bfloat16, or in float32 for an engine of another `dtype`. None for any
    other model."""
    from common.lora import adapter_base
    from common.models import load_model, load_processor

    if not adapter_base(model):
        return None
    import torch

    folder = tempfile.TemporaryDirectory(prefix="merged_")
    merged = load_model(model)  # in float32, so that a small adapter is rounded once
    merged.to(torch.bfloat16 if dtype in (None, "auto", "bfloat16") else torch.float32).save_pretrained(folder.name)
    load_processor(model).save_pretrained(folder.name)
    return folder


def _reason(error: Exception) -> str:
    """The error's message without the addresses and inputs that pydantic, which checks vLLM's options, adds."""
    errors = getattr(error, "errors", list)()
    return "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in errors) or str(error)


def stop_ids(declared: int | list[int] | None, processor) -> list[int]:
    """Ids of all end tokens: the generation config's, the tokenizer's, and that of a turn in the chat template."""
    declared = [] if declared is None else declared if isinstance(declared, list) else [declared]
    tokenizer = getattr(processor, "tokenizer", processor)
    return sorted({*declared, tokenizer.eos_token_id, turn_end_id(processor)} - {None})


def turn_end_id(processor) -> int | None:
    """The special token that closes an assistant's turn in the chat template, if there is one.

    Base models such as Qwen3-4B-Base declare only `<|endoftext|>` as their end, while their template and what is
    trained on it end a turn with `<|im_end|>`: without it, what counts as the answer may be one to a made-up turn.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    # A folder with the older chat_template.json gives it to the processor alone
    holder = tokenizer if getattr(tokenizer, "chat_template", None) else processor
    if not getattr(holder, "chat_template", None):
        return None
    texts = {"user": "?", "assistant": "@answer@"}
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):  # some VLMs' templates read only parts
        turns = [{"role": role, "content": as_content(text)} for role, text in texts.items()]
        try:
            text = holder.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError, ValueError):  # it asks for more than two turns, or for the other form
            continue
        if "@answer@" in text:
            break
    else:
        return None
    ids = tokenizer(text.rpartition("@answer@")[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((index for index in ids if index in special), None)


def never_sampled(processor, config) -> list[int]:
    """Ids of image and video placeholders, and of rows of the vocabulary without a token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    names = ("image_token", "video_token", "boi_token")
    vocabulary = tokenizer.get_vocab()
    tokens = (getattr(processor, name, None) for name in names)
    placeholders = {vocabulary[token] for token in tokens if isinstance(token, str) and token in vocabulary}
    # Some processors (Gemma 3) call another token image_token than the one that stands for image features
    placeholders |= {getattr(config, name, None) for name in ("image_token_id", "video_token_id")} - {None}
    rows = range(config.get_text_config().vocab_size)
    return sorted(placeholders.union(set(rows).difference(vocabulary.values())))  # ids may have gaps


class ServerEngine:
    """Generates on a server that speaks OpenAI's chat API, such as `vllm serve`; needs the package openai.

    Each prompt is a request with a seed of its own. One that still fails after its retries gives None in its place;
    one that the server refuses (status 400) while it answers others gives an empty completion, "refused".

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: its name on the server.
        api_key: never taken from the environment: a key for another service must not go to this one.
        workers: requests at the same time.
        timeout: seconds for one request.
        retries: of one request, with growing pauses.
        stop_token_ids: `turn_end_id` of a model whose generation config does not declare it; vLLM's parameter.

    `generate` raises `ConnectionError` if no request of a call succeeds, unless all refuse one and the same prompt.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        chat_template_kwargs: dict[str, Any] | None = None,
        api_key: str = "EMPTY",
        workers: int = 128,
        timeout: float = 1200.0,
        retries: int = 4,
        stop_token_ids: Sequence[int] = (),
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("engine server needs openai: pip install openai") from error
        self._error, self._refusal = openai.OpenAIError, openai.BadRequestError
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"server {base_url!r} is no address: write http://HOST:PORT/v1")
        try:
            self.client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
        except Exception as error:  # from the HTTP library, which is not ours to name
            raise ValueError(f"server {base_url!r} is no address ({error}): write http://HOST:PORT/v1") from error
        self.base_url, self.model, self.workers, self.warns_of_cuts = base_url, model, workers, True
        self.name = model
        self.template_options = chat_template_kwargs or {}
        self.stops = list(stop_token_ids)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int]) -> list[Completion | None]:
        with ThreadPoolExecutor(self.workers) as pool:
            results = list(
                pool.map(lambda pair: self._one(pair[0], decoding, pair[1]), zip(prompts, seeds, strict=True))
            )
        errors = [result for result in results if isinstance(result, Exception)]
        refused = [isinstance(result, self._refusal) for result in results]
        one_prompt = all(prompt == prompts[0] for prompt in prompts)  # then it may be to blame
        if results and len(errors) == len(results) and not (one_prompt and all(refused)):
            raise ConnectionError(
                f"no request of {len(results)} to {self.name} at {self.base_url} succeeded ({errors[0]}): check that "
                "the server runs and serves this model, then the same command goes on"
            ) from errors[0]
        completions = [
            Completion("", 0, "refused") if no else None if isinstance(result, Exception) else result
            for result, no in zip(results, refused, strict=True)
        ]
        # vLLM takes a prompt that leaves less room for the answer than was asked for
        why = f" by the server at {self.base_url}: serve it with a longer context"
        _warn_of_cuts(self, completions, decoding.max_new_tokens, why)
        return completions

    def _one(self, prompt: Prompt, decoding: Decoding, seed: int) -> Completion | Exception:
        extra = {"top_k": decoding.top_k or -1, "chat_template_kwargs": self.template_options}
        extra |= {"repetition_penalty": 1.0, "min_p": 0.0}
        extra |= {"stop_token_ids": self.stops} if self.stops else {}
        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=_with_images(prompt, _data_url) if prompt.images else list(prompt.messages),
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                seed=seed,
                # These and those of `extra`: else `vllm serve` takes what the model's config declares
                presence_penalty=0.0,
                frequency_penalty=0.0,
                extra_body=extra,
            )
            choice = reply.choices[0]
            text = choice.message.content or ""
            if not isinstance(text, str):
                raise TypeError(f"the reply has {type(text).__name__} in place of a text")
            if choice.finish_reason == "abort":  # vLLM's reply to what it did not finish
                raise ValueError("the server aborted the request")
            return Completion(text, reply.usage.completion_tokens, choice.finish_reason)
        # The last four: an aborted reply or one of another form
        except (self._error, IndexError, TypeError, AttributeError, ValueError) as error:
            return error


def _with_images(prompt: Prompt, image_part: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the images in place of their placeholders, each as `image_part` gives it."""
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(list(prompt.messages), images=list(prompt.images))
    parts = {"image": lambda part: image_part(part["image"]), "text": lambda part: part}
    return [{**m, "content": [parts[part["type"]](part) for part in m["content"]]} for m in messages]


def _as_pil(image: Any) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": image}


def _data_url(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
