"""`VAOPDTrainer`: wires rollouts, teacher and the functions of `objective.py` into TRL's `DistillationTrainer`.

One optimizer step. Generation stays TRL's. Phase 1 (`_score`, no gradient, the whole generation batch): the frozen
teacher reads each rollout twice, once with the true and once with the pixelated image; the first pass also leaves the
hidden states from which the loss is computed later, so there is no third pass. VA is gathered over all ranks, and the
coefficients come out for all siblings at once. Phase 2 (`_compute_loss`, micro-batches): per-token reverse KL of
student and cached teacher hidden states, times the coefficients.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from packaging.specifiers import SpecifierSet
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import load_image
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DistillationTrainer

from . import objective
from .config import VAOPDConfig
from .doctor import DoctorCallback

SUPPORTED_TRL = ">=1.16,<1.17"
if version("trl") not in SpecifierSet(SUPPORTED_TRL):
    raise ImportError(f"va_opd overrides private methods of trl and needs trl{SUPPORTED_TRL}; found {version('trl')}")

from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    RepeatSampler,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

# What `DistillationTrainer._get_last_hidden_state` accepts beside ids and masks
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# Added to the logits of padded vocabulary rows: exp() of it is exactly 0 in float32, and unlike -inf it keeps
# 0 * (difference of two such logits) at 0
PADDED_ROW_LOGIT = -1e4


class LMHead(NamedTuple):
    """The output projection of a model and what the model does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


class SiblingSampler(RepeatSampler):
    """Each prompt K times in a row; the order of an epoch depends on seed and epoch only, so that a resumed run sees
    the prompts that the uninterrupted one would have seen."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class VAOPDTrainer(DistillationTrainer):
    """
    Distils a vision-language teacher into a student on the student's own rollouts, where the rollouts and tokens for
    which the teacher really needs the image count more (arXiv 2605.21924). `args.weighting="none"` is Standard OPD.

    Arguments are those of [`~trl.DistillationTrainer`]; `args` is a [`VAOPDConfig`]. Rows of `train_dataset` have
    `prompt` (messages or text) and, for rows with images, `image` or `images`. Raises `ValueError` for a batch that
    does not divide into groups of `num_generations`, a teacher with other tokens, or an iterable dataset.
    """

    _tag_names = ["trl", "va-opd"]
    _name = "VA-OPD"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel",
        args: VAOPDConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        _check_batch(args, train_dataset)
        if processing_class is None:
            raise ValueError("processing_class is required: pass the student's processor")
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if isinstance(teacher_model, str):
            check_same_tokens(tokenizer, AutoTokenizer.from_pretrained(teacher_model))
        elif not isinstance(model, str):
            _match_vocabulary_size(model, teacher_model, len(tokenizer))
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=_ban_tokens(args, processing_class, model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.teacher_model.eval()  # not chained: a DeepSpeed engine's eval() returns None
        self.teacher_model.requires_grad_(False)
        self.vocab_size = len(tokenizer)
        self.banned_ids = _banned_ids(processing_class, self.model.config)
        self.last_rollouts: dict[str, Any] = {}
        if args.doctor_steps:
            self.add_callback(DoctorCallback(args.doctor_steps))

    def _get_train_sampler(self, dataset=None) -> SiblingSampler:
        args = self.args
        batch = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        return SiblingSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=args.num_generations,
            batch_size=batch // args.num_generations,
            repeat_count=args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        longest = max(len(ids) for ids in prompt_ids)
        if longest > self.args.max_prompt_length:
            raise ValueError(
                f"a prompt has {longest} tokens, above max_prompt_length={self.args.max_prompt_length}: raise the "
                "limit, lower the image budget, or filter the data set (prompts are never cut)"
            )
        with self._timed("generation"):
            completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        for row, ids in enumerate(completion_ids):
            if not ids:
                raise ValueError(f"rollout {row} is empty: the engine returned no token, not even an end of sequence")
            if banned := self.banned_ids.intersection(ids):
                raise ValueError(
                    f"rollout {row} holds the token ids {sorted(banned)}, which stand for images or padding: the "
                    "generation engine ignored the ban on sampling them"
                )
        return completion_ids

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        # A row without an image beside rows with one: the processor, which TRL calls next, takes [] but not None
        self._rollout_images = images and [row or [] for row in images]
        return prompt_ids, completion_ids, tool_mask, self._rollout_images, tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        batch.update(self._score(batch))
        return batch

    @torch.no_grad()
    def _score(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Phase 1: (B, T, H) teacher hidden states, (B, T) coefficients and high-VA mask, P in `num_items_in_batch`."""
        args, train = self.args, self.model.training
        num_generations, weighting = (args.num_generations, args.weighting) if train else (1, "none")
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        images = self._rollout_images or [None] * len(mask)
        has_image = torch.tensor([bool(row) for row in images], device=mask.device)
        has_image_all = self._gather(has_image)
        self._check_siblings(batch, num_generations)

        with self._timed("teacher"):
            hidden, logps = self._teacher_pass(batch, keep_hidden=True)
        if has_image_all.any():  # on all ranks or on none: the forward of a sharded teacher is a collective
            degraded = dict(batch)
            if has_image.any():
                with self._timed("degraded_images"):
                    degraded["pixel_values"] = self._degraded_pixels(batch, images, num_generations)
            with self._timed("teacher_degraded"):
                _, logps_degraded = self._teacher_pass(degraded, keep_hidden=False)
        else:
            logps_degraded = logps
        if args.doctor_steps and not self.last_rollouts:
            self._null_check(batch, logps)
        va = objective.visual_advantage(logps, logps_degraded, mask * has_image[:, None])

        va_all, mask_all = self._gather(va), self._gather(mask)
        ungrouped = ~has_image_all
        if args.va_floor is not None:
            ungrouped = ungrouped | (objective.mean_over_tokens(va_all, mask_all) < args.va_floor)
        weights, coefficients = objective.coefficients(
            va_all,
            mask_all,
            num_generations,
            weighting,
            args.rollout_temperature,
            args.va_eps,
            args.top_fraction,
            args.high_weight,
            ungrouped,
            self._ties(),
        )
        high = objective.high_tokens(va_all, mask_all, args.top_fraction, self._ties())
        self._log_va(va_all, mask_all, weights, high, num_generations)
        start = len(mask) * self.accelerator.process_index
        here, length = slice(start, start + len(mask)), mask.size(1)
        self.last_rollouts = {
            "prompt_ids": batch["prompt_ids"],
            "completion_ids": batch["completion_ids"],
            "mask": mask,
            "va": va,
            "weights": weights[here],
            "images": images,
        }
        return {
            "teacher_hidden_states": hidden,
            "coefficients": coefficients[here, :length],
            "high_tokens": high[here, :length],
            # TRL divides the loss by this and undoes the averaging over ranks: with P it is the mean over prompts
            "num_items_in_batch": torch.tensor(len(va_all) / num_generations, device=mask.device),
        }

    def _ties(self) -> torch.Generator | None:
        """The same draw for every call within a step and on every rank."""
        seed = self.args.seed + self.state.global_step
        return torch.Generator().manual_seed(seed) if self.args.random_ties else None

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """Phase 2: sum of coefficient * KL over the rows of a micro-batch, divided by the prompts of the step."""
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        student_hidden = self._hidden_states(unwrapped_student, inputs)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        kl_N, entropy_N = chunked_reverse_kl(
            student_hidden[mask],
            inputs["teacher_hidden_states"][mask],
            self._head(unwrapped_student, mask_padding=True),
            self._head(teacher, mask_padding=True),
            self.args.kl_temperature,
        )
        kl = torch.zeros_like(mask, dtype=kl_N.dtype).masked_scatter(mask, kl_N)
        num_prompts = len(mask) if num_items_in_batch is None else num_items_in_batch
        loss = objective.grouped_kl_loss(kl, inputs["coefficients"], num_prompts)
        self._kl_sums = self._sum_kl(kl.detach(), mask, inputs["high_tokens"])
        return loss, entropy_N.detach().sum(), mask.sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Reduced here and not in `_compute_loss`, so that no collective runs inside a wrapped forward
        kl_high, n_high, kl_low, n_low = self.accelerator.gather(self._kl_sums[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl/high"].append(kl_high / max(n_high, 1))
        self._metrics[mode]["kl/low"].append(kl_low / n_low if n_low else float("nan"))
        return loss

    @staticmethod
    def _sum_kl(kl: torch.Tensor, mask: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        low = mask & ~high
        return torch.stack([kl[high].sum(), high.sum(), kl[low].sum(), low.sum()])

    def _hidden_states(self, model, batch: dict[str, Any]) -> torch.Tensor:
        """Hidden states (B, T, H) from which the response tokens of `batch` are predicted."""
        keys = [key for key in MULTIMODAL_KEYS if key in batch]
        if "pixel_values" in batch and not batch["pixel_values"].numel():  # no row of this micro-batch has an image
            keys = [key for key in keys if key.endswith("token_type_ids")]
        return self._get_last_hidden_state(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            **{key: batch[key] for key in keys},
        )

    def _teacher_pass(self, batch: dict[str, Any], keep_hidden: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The teacher's (B, T, H) hidden states, if kept, and (B, T) float32 log-probabilities of the rollouts.

        Both views go through here in the same micro-batches, so that equal images give exactly equal numbers.
        """
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        hidden, logps = [], []
        for part in self._micro_batches(batch):
            with self.compute_loss_context_manager():
                states = self._forward_redirection(self.teacher_model, teacher, self._hidden_states, teacher, part)
            logps.append(self._sampled_logps(teacher, states, part))
            if keep_hidden:
                hidden.append(states)
        return torch.cat(hidden) if keep_hidden else None, torch.cat(logps)

    def _null_check(self, batch: dict[str, Any], logps: torch.Tensor) -> None:
        """Scores the first micro-batch again with the same images: VA must be 0, else it measures noise."""
        first = next(self._micro_batches(batch))
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with self.compute_loss_context_manager():
            states = self._forward_redirection(self.teacher_model, teacher, self._hidden_states, teacher, first)
        again = self._sampled_logps(teacher, states, first)
        gap = (again - logps[: len(again)]).abs().max().item()
        self._metrics["train" if self.model.training else "eval"]["va/null"].append(gap)

    def _micro_batches(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        parts = self.args.gradient_accumulation_steps if self.model.training else 1
        for part in split_tensor_dict(split_pixel_values_by_grid(batch), parts):
            yield unsplit_pixel_values_by_grid(part)

    def _sampled_logps(self, model, hidden: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        mask = batch["completion_mask"].bool()
        weight, bias, scale, softcap = self._head(model)
        with maybe_gather_lm_head_ctx(weight, bias):
            logps = objective.sampled_logps(
                hidden[mask],
                weight[: self.vocab_size],
                batch["completion_ids"][mask],
                None if bias is None else bias[: self.vocab_size],
                scale,
                softcap,
            )
        return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logps)

    def _degraded_pixels(self, batch: dict[str, Any], images: list, num_generations: int) -> torch.Tensor:
        """`pixel_values` of the pixelated images, the shape of the batch's; siblings share one degraded image."""
        grids = iter(batch["image_grid_thw"].tolist()) if "image_grid_thw" in batch else None
        start = len(images) * self.accelerator.process_index
        cache, flat = {}, []
        for row, row_images in enumerate(images):
            for i, image in enumerate(row_images or []):
                key = ((start + row) // num_generations, i)
                size = self._model_size(batch, next(grids) if grids else None, sum(len(r or []) for r in images))
                if key not in cache:
                    cache[key] = self._degrade(image, size)
                flat.append(cache[key])
        # Images that were brought to the size of their grid stay at it: a second resize may choose another grid
        options = {"do_resize": False} if grids and self.args.pixelate_at == "model" else {}
        processed = self.processing_class.image_processor(images=flat, return_tensors="pt", **options)
        processed = processed.to(batch["pixel_values"].device)
        if processed["pixel_values"].shape != batch["pixel_values"].shape or (
            grids and not torch.equal(processed["image_grid_thw"], batch["image_grid_thw"])
        ):
            raise ValueError(
                f"the pixelated images have pixel_values {tuple(processed['pixel_values'].shape)}, the true ones "
                f"{tuple(batch['pixel_values'].shape)}, or another grid: set pixelate_at='raw' for this processor"
            )
        return processed["pixel_values"].to(batch["pixel_values"].dtype)

    def _model_size(self, batch: dict[str, Any], grid: list[int] | None, num_images: int) -> tuple[int, int] | None:
        """(width, height) at which the model sees an image, or None where the processor cuts, crops or pads it."""
        processor = self.processing_class.image_processor
        if self.args.pixelate_at == "raw":
            return None
        if grid is not None:
            return grid[2] * processor.patch_size, grid[1] * processor.patch_size
        if getattr(processor, "do_center_crop", None) or getattr(processor, "do_pad", None):
            return None
        pixels = batch["pixel_values"]
        return (pixels.size(-1), pixels.size(-2)) if pixels.ndim == 4 and len(pixels) == num_images else None

    def _degrade(self, image: Any, size: tuple[int, int] | None) -> Image.Image:
        # RGB as the processor makes it, before cells are averaged: it drops alpha, which averaging would apply
        image = (image if isinstance(image, Image.Image) else load_image(image)).convert("RGB")
        if size is not None:
            resample = getattr(self.processing_class.image_processor, "resample", None)
            image = image.resize(size, resample if isinstance(resample, int) else Image.Resampling.BICUBIC)
        degraded = objective.pixelate(image, self.args.degradation_ratio)
        mode = "train" if self.model.training else "eval"
        cells = [max(1, int(side * self.args.degradation_ratio)) for side in degraded.size]
        self._metrics[mode]["va/cells"].append(float(cells[0] * cells[1]))
        return degraded

    def _head(self, model, mask_padding: bool = False) -> LMHead:
        """The LM head; with `mask_padding`, rows past the tokenizer's vocabulary get no probability."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        weight, bias = head.weight, getattr(head, "bias", None)
        if isinstance(weight, torch.distributed.tensor.DTensor):  # FSDP2: one all-gather instead of one a tile
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        scale, softcap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)
        if mask_padding and config.vocab_size > self.vocab_size:
            if softcap is not None:
                raise ValueError(
                    f"{config.model_type} soft-caps its logits and pads its vocabulary ({config.vocab_size} rows for "
                    f"{self.vocab_size} tokens): resize_token_embeddings({self.vocab_size}) on both models first"
                )
            padding = torch.zeros(config.vocab_size, device=weight.device)
            padding[self.vocab_size :] = PADDED_ROW_LOGIT
            bias = padding if bias is None else bias + padding
            if is_deepspeed_zero3_enabled():  # the kernel's gather asks it of every weight and bias
                from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

                bias.ds_status = ZeroParamStatus.AVAILABLE
        return LMHead(weight, bias, scale, softcap)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks in the sampler's order, padded with zeros to the longest rollout."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=1))

    def _check_siblings(self, batch: dict[str, Any], num_generations: int) -> None:
        """Siblings must be consecutive rows over all ranks: a lost order would compare rollouts of other prompts."""
        ids = batch["prompt_ids"] * batch["prompt_mask"]
        position = torch.arange(ids.size(1), 0, -1, device=ids.device)  # padding is on the left: count from the end
        pixels = split_pixel_values_by_grid(batch).get("pixel_values")
        if pixels is None or len(pixels) != len(ids):
            pixels = torch.zeros(len(ids), 1)
        # Sums of integers, which the order of summation does not change; gathered also on a rank without an image
        image_sums = torch.stack([p.float().view(torch.int32).sum() for p in pixels]).to(ids.device)
        fingerprint = self._gather(torch.stack([(ids * position).sum(1), image_sums], dim=1))
        groups = fingerprint.view(-1, num_generations, 2)
        if (groups != groups[:, :1]).any():
            raise RuntimeError(
                f"rows of a group of num_generations={num_generations} have different prompts or images: the data "
                "loader re-ordered the batch; leave dispatch_batches and split_batches at their defaults"
            )

    def _log_va(self, va, mask, weights, high, num_generations: int) -> None:
        valid = mask.bool()
        sorted_va = va[valid].sort(descending=True).values
        top = sorted_va[: max(1, round(0.1 * len(sorted_va)))].sum() / sorted_va.sum().clamp(min=1e-12)
        means = objective.mean_over_tokens(va, mask).view(-1, num_generations)
        figures = {
            "va/mean": va[valid].mean(),
            "va/positive_share": (va[valid] > 0).float().mean(),
            "va/top10_mass": top,
            "va/group_sigma": means.std(1, correction=0).mean(),
            "va/weight_min": weights.min(),
            "va/weight_max": weights.max(),
            "va/zero_in_high": (va[high] == 0).float().mean(),
        }
        mode = "train" if self.model.training else "eval"
        for name, value in figures.items():
            self._metrics[mode][name].append(value.item())

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Logs the seconds of a part of the step as `time/<part>`; waits for the GPU so that they are its own."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._metrics["train" if self.model.training else "eval"][f"time/{part}"].append(time.perf_counter() - start)


def chunked_reverse_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student: LMHead,
    teacher: LMHead,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) (Eq. 1) and the student's entropy, (N,) each in nats, by TRL's tiled kernel.

    `student_hidden` is (N, H_student) and carries the gradient, `teacher_hidden` (N, H_teacher); no (N, V) tensor
    exists. This is the one place that calls the kernel: its arguments are positional and not a public API.
    """
    return ChunkedDivergenceFunction.apply(
        student_hidden,
        student.weight,
        student.bias,
        teacher_hidden,
        teacher.weight,
        teacher.bias,
        1.0,  # beta: reverse KL
        temperature,
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
    )


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` unless both tokenizers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = next(token for token in [*ours, *theirs] if ours.get(token) != theirs.get(token))
    raise ValueError(
        f"student and teacher have different vocabularies ({len(ours)} and {len(theirs)} tokens; {differing!r} is id "
        f"{ours.get(differing)} and {theirs.get(differing)}): on-policy distillation compares their distributions "
        "token by token, so choose a teacher of the same tokenizer family"
    )


def _match_vocabulary_size(model: PreTrainedModel, teacher: PreTrainedModel, num_tokens: int) -> None:
    """Sizes of one family pad the same tokens to other multiples: bring the teacher to the student's row count."""
    size, teacher_size = (m.config.get_text_config().vocab_size for m in (model, teacher))
    if min(size, teacher_size) < num_tokens:
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens, but the student has {size} vocabulary rows and the teacher "
            f"{teacher_size}: student, teacher and processing_class must be of one tokenizer family"
        )
    if size != teacher_size:
        teacher.resize_token_embeddings(size, mean_resizing=False)


def _check_batch(args: VAOPDConfig, train_dataset) -> None:
    if isinstance(train_dataset, IterableDataset):
        raise ValueError("VAOPDTrainer repeats each prompt num_generations times and needs a map-style Dataset")
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if batch % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size * processes * gradient_accumulation_steps = {args.per_device_train_batch_size}"
            f" * {args.world_size} * {args.gradient_accumulation_steps} = {batch} rollouts do not divide into groups of "
            f"num_generations={args.num_generations}"
        )
    if train_dataset is not None and len(train_dataset) < batch // args.num_generations:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {batch // args.num_generations} of one "
            "optimizer step: lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def _banned_ids(processing_class, config: PretrainedConfig) -> set[int]:
    """Ids that a rollout must not hold: image and video placeholders, and rows that pad the vocabulary."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = tokenizer.get_vocab()
    tokens = (getattr(processing_class, name, None) for name in ("image_token", "video_token", "boi_token"))
    placeholders = {vocabulary[token] for token in tokens if isinstance(token, str) and token in vocabulary}
    # Some processors (Gemma 3) call another token image_token than the one that stands for image features
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    placeholders |= {token_id for token_id in ids if token_id is not None}
    return placeholders | set(range(len(tokenizer), config.get_text_config().vocab_size))


def _ban_tokens(args: VAOPDConfig, processing_class, model) -> VAOPDConfig:
    """A copy of `args` whose generation settings forbid `_banned_ids` on the engine in use."""
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    banned = _banned_ids(processing_class, config)
    args = copy.copy(args)
    if args.use_vllm:
        # A list of ids reaches both the colocated engine and, as JSON, the server; vLLM has no list of banned ids
        num_rows = config.get_text_config().vocab_size
        ban = {"allowed_token_ids": sorted(set(range(num_rows)) - banned)}
    else:
        ban = {"suppress_tokens": sorted(banned)}
    args.generation_kwargs = {**ban, **(args.generation_kwargs or {})}
    return args


def _logit_scale(config) -> float:
    """What the model multiplies its logits with, under the names that TRL knows."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
