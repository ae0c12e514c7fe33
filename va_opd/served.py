"""A teacher behind a vLLM server: log-probabilities of a few tokens in place of hidden states. Both modes approximate
the paper's exact KL, see `objective.sampled_token_kl` and `objective.partition_kl`.

The server gets token ids and images, never text, so nothing is tokenized twice: `/inference/v1/generate` of
`vllm serve --enable-scale-out`. It answers with the ids after it has expanded the images; they must be ours.
"""

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from . import objective
from .degraded import degrade, image_keys, model_sizes
from .engine import fold_placeholders
from .lm_head import lm_head
from .teacher import Teacher, first_with_image

if TYPE_CHECKING:
    from .trainer import VAOPDTrainer

REQUESTS_AT_ONCE = 64
PAUSES = (2, 8, 20)  # seconds before a request is sent again: a server that restarts its workers comes back
VLLM_MINUS_INFINITY = -9999.0  # vLLM's stand-in, as JSON has no -inf


class TeacherServer:
    """Client of a `vllm serve`; `address` is such as "http://node:8000", `timeout` the seconds of a request."""

    def __init__(self, address: str, timeout: float):
        self.address, self.timeout = address.rstrip("/").removesuffix("/v1"), timeout
        self.model = self._send("/v1/models")["data"][0]["id"]

    def score(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to the requests, which are sent side by side.

        Raises `ConnectionError` where the server does not answer one after all retries, `ValueError` where it refuses
        one.
        """
        with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, len(requests))) as pool:
            return list(pool.map(partial(self._send, "/inference/v1/generate"), requests))  # an error cancels the rest

    def _send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        for pause in (*PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                if error.code < 500:
                    remedy = ": start it with `vllm serve --enable-scale-out`" if error.code == 404 else ""
                    raise ValueError(
                        f"the teacher server at {self.address} refuses a request (HTTP {error.code}: {said}){remedy}"
                    ) from error
                problem = f"HTTP {error.code}: {said}"
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{self.address + path} answers with no JSON ({error}): is it `vllm serve`?"
                ) from error
            if pause is not None:
                time.sleep(pause)
        raise ConnectionError(
            f"the teacher server at {self.address} does not answer ({problem}), {len(PAUSES) + 1} requests in a row: "
            "start it again, then the same command goes on from the last checkpoint"
        )


def read_scores(
    reply: dict[str, Any], ids: list[int], start: int, top_k: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their log-probabilities, (T, 1 + top_k) each, at the places of `ids` from `start` on.

    The first column is the token at the place, the others are the teacher's likeliest besides it in any order; a place
    that holds none has log-probability -inf. Ids from `vocab_size` on only pad the vocabulary and are left out. Raises
    `ValueError` where the server has other ids, or a log-probability that is missing or no such number.
    """
    seen, places = reply.get("prompt_token_ids"), reply.get("prompt_logprobs") or []
    if seen != ids or len(places) != len(ids):
        raise ValueError(_other_ids(seen, ids))
    tokens, logps = [], []  # lists of numbers, because a tensor a place would take most of the time
    for place in range(start, len(ids)):
        found = {int(token): entry.get("logprob") for token, entry in (places[place] or {}).items()}
        for token in (ids[place], *found):
            logp = found.get(token)
            floor = VLLM_MINUS_INFINITY if token == ids[place] else -math.inf
            if logp is None or not floor < logp < 1e-3:
                raise ValueError(
                    f"the teacher server gives token {token} at place {place} of {len(ids)} the log-probability "
                    f"{logp}: serve the teacher in bfloat16 or float32, without --logprobs-mode raw_logits, and check "
                    "its weights"
                )
        own = found.pop(ids[place])
        others = [(t, logp) for t, logp in found.items() if t < vocab_size and logp > VLLM_MINUS_INFINITY][:top_k]
        others += [(0, -math.inf)] * (top_k - len(others))
        tokens.append([ids[place], *(token for token, _ in others)])
        logps.append([own, *(logp for _, logp in others)])
    shape = (len(ids) - start, 1 + top_k)
    return torch.tensor(tokens).long().view(shape), torch.tensor(logps, dtype=torch.float32).view(shape)


def _other_ids(seen: list[int] | None, ids: list[int]) -> str:
    seen = seen or []
    place = next((i for i, (a, b) in enumerate(zip(seen, ids, strict=False)) if a != b), min(len(seen), len(ids)))
    return (
        f"the teacher server scored {len(seen)} tokens and the student has {len(ids)}, the first difference is at "
        f"place {place}: the server's processor cuts images otherwise or its tokenizer is another; serve a teacher of "
        "the student's family, with the image size limits of the student's processor (--mm-processor-kwargs)"
    )


class ServedTeacher:
    """Scores rollouts on `args.teacher_server` and compares the student with the scores; in place of `Teacher`."""

    def __init__(self, trainer: "VAOPDTrainer"):
        self.trainer, args = trainer, trainer.args
        self.local = None if trainer.teacher_model is None else Teacher(trainer)
        self.top_k = args.teacher_top_k if args.teacher_mode == "teacher_topk" else 0
        self.server = TeacherServer(args.teacher_server, args.teacher_server_timeout)

    def views(
        self, batch: dict[str, Any], images: list[list[Any]], has_image: torch.Tensor, num_generations: int
    ) -> tuple[dict[str, list[torch.Tensor]], tuple[torch.Tensor, ...]]:
        """See `Teacher.views`; a row without an image is scored once."""
        trainer, measure = self.trainer, self.trainer.args.measure_va
        both = measure or self.local is not None  # whose comparison with the server is one of both views
        with trainer._timed("degraded_images"):
            urls = self._image_urls(batch, images, num_generations, both)
        everything = range(len(images))
        with trainer._timed("teacher"):
            scores = self._scores(batch, images, urls, everything, self.top_k)
        true = [logps[:, 0] for _, logps in scores]
        if trainer._measures_null():
            first = next((row for row, of_row in enumerate(images) if of_row), 0)  # a prompt with an image
            again = everything[first : first + num_generations]
            gaps = [
                (logps[:, 0] - true[row]).abs().max()
                for row, (_, logps) in zip(again, self._scores(batch, images, urls, again, self.top_k), strict=True)
            ]
            trainer._record("va/null", max(gaps).item())
        degraded = list(true)
        if both:
            rows = [row for row in everything if images[row]]
            with trainer._timed("teacher_degraded"):
                scores_degraded = self._scores(batch, images, urls, rows, 0, degraded=True)
            for row, (_, logps) in zip(rows, scores_degraded, strict=True):
                degraded[row] = logps[:, 0]
        if self.local is not None:
            self._check_parity(batch, images, has_image, num_generations, true, degraded)
        kept = {"teacher_tokens": [t for t, _ in scores], "teacher_logps": [logps for _, logps in scores]}
        return kept, (torch.cat(true), torch.cat(degraded)) if measure else ()

    def divergence(self, student, hidden: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The mode's approximation of KL(student || teacher) and the student's entropy, (N,) each, from its hidden
        states (N, H)."""
        tokens, teacher = torch.cat(batch["teacher_tokens"]), torch.cat(batch["teacher_logps"])
        head, size = lm_head(student), self.trainer.vocab_size
        bias = None if head.bias is None else head.bias[:size]
        with torch.autocast(hidden.device.type, enabled=False):
            logps, entropy = objective.token_logps(hidden, head.weight[:size], tokens, bias, head.scale, head.softcap)
        if self.top_k:
            return objective.partition_kl(logps, teacher, teacher.isfinite()), entropy
        return objective.sampled_token_kl(logps[:, 0], teacher[:, 0]), entropy

    def _scores(
        self,
        batch: dict[str, Any],
        images: list[list[Any]],
        urls: list[list[tuple[str, ...]]],
        rows: Sequence[int],
        top_k: int,
        degraded: bool = False,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`read_scores` of the tokens of the given rollouts that count for the loss."""
        trainer, requests, sequences = self.trainer, [], []
        for row in rows:
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            rollout = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            sent, parts = prompt, [{"type": "image_url", "url": views[degraded]} for views in urls[row]]
            if parts:
                sent = fold_placeholders(prompt, images[row], trainer.processing_class.image_token_id)
            sequences.append((prompt + rollout, len(prompt)))
            requests.append(scoring_request(self.server.model, sent + rollout, parts, top_k))
        replies = self.server.score(requests) if requests else []
        device = batch["completion_ids"].device
        return [
            tuple(x.to(device) for x in read_scores(reply, ids, start, top_k, trainer.vocab_size))
            for reply, (ids, start) in zip(replies, sequences, strict=True)
        ]

    def _image_urls(
        self, batch: dict[str, Any], images: list[list[Any]], num_generations: int, both: bool
    ) -> list[list[tuple[str, ...]]]:
        """The true and, with `both`, the degraded view of each image as a PNG, at the size at which the model sees it:
        the server then has nothing to resize."""
        trainer, args = self.trainer, self.trainer.args
        processor = getattr(trainer.processing_class, "image_processor", None)
        resample, flat = getattr(processor, "resample", None), [image for row in images for image in row]
        groups = trainer._prompt_numbers(len(images), num_generations)
        keys, sizes = image_keys(images, groups), model_sizes(processor, batch, len(flat))
        urls: dict[tuple[int, int], tuple[str, ...]] = {}
        for key, image, size in zip(keys, flat, sizes, strict=True):
            if key in urls:
                continue
            views = [image]
            if both:
                early = size if args.pixelate_at == "model" else None
                views.append(degrade(image, early, args.degradation_ratio, resample))
                trainer._record("va/cells", math.prod(objective.cells(views[1].size, args.degradation_ratio)))
            # A ratio of 1 brings an image to its size and leaves it as it is
            urls[key] = tuple(png_url(degrade(view, size, 1.0, resample)) for view in views)
        return [[urls[group, i] for i in range(len(row))] for group, row in zip(groups, images, strict=True)]

    def _check_parity(
        self,
        batch: dict[str, Any],
        images: list[list[Any]],
        has_image: torch.Tensor,
        num_generations: int,
        true: list[torch.Tensor],
        degraded: list[torch.Tensor],
    ) -> None:
        """Compares one prompt's rollouts on each rank with the local teacher, which then leaves the GPU."""
        trainer, limit = self.trainer, self.trainer.args.teacher_parity_limit
        parts = self.local.parts(len(images), num_generations, True)
        rows = first_with_image(parts, has_image)
        views = [(true, dict(batch)), (degraded, dict(batch))]
        if has_image.any():
            views[1][1]["pixel_values"] = trainer._degraded_pixel_values(batch, images, num_generations)
        gaps = []
        for served, view in views:
            _, (local,) = self.local.score([view], [rows], False)
            gap = (torch.cat([served[row] for row in rows]) - local).abs()
            gaps += [gap.mean(), gap.max()]
        gathered = trainer.accelerator.gather(torch.stack(gaps)[None])
        mean, largest = gathered[:, ::2].mean(0), gathered[:, 1::2].amax(0)
        trainer._record("teacher/parity_mean", mean.max().item())
        trainer._record("teacher/parity_max", largest.max().item())
        said = (
            f"the served and the local teacher differ by {mean[0]:.2g} nats a token on average given the true images "
            f"and {mean[1]:.2g} given the degraded ones, at most {largest.max():.2g}"
        )
        if mean.max() > limit:
            raise ValueError(
                f"{said}; the limit is teacher_parity_limit={limit}. Likely causes: another model or revision, "
                "quantization, another dtype, other image preprocessing on the server (--mm-processor-kwargs)"
            )
        if trainer.accelerator.is_main_process:
            print(f"[teacher] {said}; the limit is {limit}", flush=True)
        self.local = None
        trainer.accelerator.unwrap_model(trainer.teacher_model).to("cpu")


def scoring_request(model: str, ids: list[int], parts: list[dict[str, str]], top_k: int) -> dict[str, Any]:
    """Body of a request for the log-probabilities of all tokens of a prompt, and of the `top_k` likeliest ones."""
    sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k, "detokenize": False}
    body = {"model": model, "token_ids": ids, "sampling_params": sampling, "return_token_ids": True}
    return {**body, "content_parts": parts} if parts else body


def png_url(image: Image.Image) -> str:
    """The image as a data URL, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
