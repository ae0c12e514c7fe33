"""`VAOPDTrainer`: wires rollouts, teacher and the functions of `objective.py` into TRL's `DistillationTrainer`.

One optimizer step. Generation stays TRL's. Phase 1 (`_score`, no gradient, the whole generation batch): the frozen
teacher reads each rollout twice, with the true and with the pixelated image, side by side, and in both views a prompt
once for its rollouts. The true view leaves the hidden states from which the loss is computed later, so there is no
third reading. VA is gathered over all ranks, and the coefficients come out for all siblings at once. Phase 2
(`_compute_loss`, micro-batches of like length): per-token reverse KL of student and cached teacher hidden states,
times the coefficients.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DistillationTrainer

from . import checks, objective, siblings
from ._trl import AdapterSync, EpochSampler, WholeBatches, prepare_rollouts, reach_adapters_of_vision
from .checkpoints import LoadsWeights
from .config import VAOPDConfig
from .degraded import degraded_pixel_values
from .divergence import chunked_reverse_kl
from .doctor import DoctorCallback, va_figures
from .engine import VLLMRollouts
from .lm_head import lm_head, sampled_logps, without_padding
from .rope import exact_frequencies
from .served import ServedTeacher
from .teacher import Teacher


class VAOPDTrainer(LoadsWeights, DistillationTrainer):
    """
    Distils a vision-language teacher into a student on the student's own rollouts, where the rollouts and tokens for
    which the teacher really needs the image count more (arXiv 2605.21924). `args.weighting="none"` is Standard OPD.

    Arguments are those of [`~trl.DistillationTrainer`]; `args` is a [`VAOPDConfig`]. Rows of `train_dataset` have
    `prompt` (messages or text) and, for rows with images, `image` or `images`. With `args.teacher_server`,
    `teacher_model` may be None; else it is compared with the server before the first update. Raises `ValueError` for a
    batch that does not divide into groups of `num_generations`, an iterable dataset, `tools`, a teacher with fewer
    vocabulary rows than tokens, and a teacher given by its name with another tokenizer (a loaded teacher has none).
    """

    _tag_names: ClassVar = ["trl", "va-opd"]
    _name = "VA-OPD"
    _paper: ClassVar = {
        "title": "Visual-Advantage On-Policy Distillation for Vision-Language Models",
        "id": "2605.21924",
        "citation": "@article{liu2026vaopd,\n    title = {Visual-Advantage On-Policy Distillation for Vision-Language "
        "Models},\n    author = {R. Liu and others},\n    journal = {arXiv preprint arXiv:2605.21924},\n"
        "    year = {2026}\n}",
    }

    divergence = staticmethod(chunked_reverse_kl)  # a subclass may have another: README.md, "Another loss"

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None,
        args: VAOPDConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        if kwargs.get("tools"):
            raise ValueError("VAOPDTrainer takes no tools: rollouts of a prompt must have the same images")
        checks.check_inputs(args, train_dataset, eval_dataset)
        checks.check_processor(processing_class, train_dataset)
        if train_dataset is not None:
            checks.check_row(args, processing_class, train_dataset[0])
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if isinstance(teacher_model, str):
            checks.check_same_tokens(tokenizer, AutoTokenizer.from_pretrained(teacher_model))
        checks.check_teacher(args, model, teacher_model)
        if teacher_model is not None:
            checks.match_vocabulary_size(model, teacher_model, len(tokenizer))
        super().__init__(
            model=model,
            teacher_model=None if args.teacher_offload else teacher_model,
            args=checks.ban_tokens(args, processing_class, model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        for callback in (checks.FrozenCallback(), WholeBatches(self), AdapterSync(self)):
            self.add_callback(callback)
        reach_adapters_of_vision(self)
        if not self.is_deepspeed_enabled:  # which keeps float32 copies
            self.add_callback(checks.HalfPrecisionCallback())
        self._place_teacher(teacher_model)
        exact_frequencies(self.model, self.teacher_model)
        self.vocab_size = len(tokenizer)
        self.banned_ids = checks.banned_ids(processing_class, self.model.config)
        checks.check_logits(self)
        self.last_rollouts: dict[str, Any] = {}
        self._token_types: dict[str, Any] = {}
        self._kl_sums: torch.Tensor | None = None
        self.teacher = ServedTeacher(self) if args.teacher_server else Teacher(self)
        self.engine = VLLMRollouts(self.vllm_generation) if self.use_vllm else None
        prepare_rollouts(self)
        if args.doctor_steps:
            self.add_callback(DoctorCallback(args.doctor_steps))

    def _place_teacher(self, teacher_model: PreTrainedModel | None) -> None:
        if self.args.teacher_offload:  # TRL would put it on the device, where it may not fit beside the rollout engine
            self.teacher_model = teacher_model
        if teacher_model is not None:
            self.teacher_model.eval()  # not chained: a DeepSpeed engine's eval() returns None
            self.teacher_model.requires_grad_(False)
        if self.is_fsdp_enabled:
            checks.check_fsdp(self.accelerator.state.fsdp_plugin)
            if not self.args.teacher_offload:  # whole on every rank; TRL leaves it where it was loaded
                self.teacher_model.to(self.accelerator.device)

    # Generation

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        if dataset is None and self.train_dataset is None:
            raise ValueError("training requires a train_dataset")
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.prompts_of_a_step(self.accelerator.num_processes),
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            epoch=lambda: int(self.state.epoch or 0),
            seed=self.args.seed,
        )

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        checks.check_prompts(prompt_ids, self.args)
        self._token_types = siblings.token_types(multimodal_fields)
        with self._timed("generation"):
            completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        checks.check_rollouts(completion_ids, self.banned_ids)
        return completion_ids

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        # A row without an image beside rows with one: the processor, which TRL calls next, takes [] but not None
        self._rollout_images = images and [row or [] for row in images]
        return prompt_ids, completion_ids, tool_mask, self._rollout_images, tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        checks.check_batch_images(inputs)
        self._check_images(inputs)
        batch = siblings.with_token_types(super()._generate_and_score_completions(inputs), self._token_types)
        batch.update(self._score(batch))
        if self.engine and self.model.training:
            self._record("sampling/logps_gap", self._engine_gap(batch))
        return batch

    def _check_images(self, rows: list[dict[str, Any]]) -> None:
        """`checks.check_all_or_none` over the rows of all ranks, where weights or gradients are sharded."""
        sharded = is_deepspeed_zero3_enabled() or self.is_fsdp_enabled
        # ZeRO-2 shards gradients only, and there are none in evaluation
        if self.accelerator.num_processes > 1 and (sharded or (self.is_deepspeed_enabled and self.model.training)):
            has_image = torch.tensor([checks.has_images(row) for row in rows], device=self.accelerator.device)
            checks.check_all_or_none(self._gather(has_image))

    @torch.no_grad()
    def _engine_gap(self, batch: dict[str, Any]) -> float:
        """`VLLMRollouts.gap` of the student on a micro-batch of each rank, mean over ranks."""
        count = self.args.per_device_train_batch_size
        part, student = siblings.take_rows(batch, list(range(count))), self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            hidden = self._forward_redirection(self.model_wrapped, student, self._hidden_states, student, part)
        head, tokens = lm_head(student), part["completion_ids"][part["completion_mask"].bool()]
        softcap = head.softcap and head.softcap / self.temperature  # the temperature comes after the cap
        head = head._replace(scale=head.scale / self.temperature, softcap=softcap)
        logps = sampled_logps(head, hidden, tokens, self.vocab_size)
        return self.accelerator.gather(self.engine.gap(logps, count, self.top_p)).mean().item()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        with checks.naming_unread_rows(self.train_dataset):
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, generation_batch):
        """TRL's, but micro-batches are sorted by length instead of drawn: the same sum, less padding."""
        with checks.naming_rows(self.args, self.processing_class, generation_batch):
            if not self.model.training:
                return super()._prepare_inputs(generation_batch)
            parts = self.args.gradient_accumulation_steps
            if self._step % parts == 0:
                # Frees the memory of the step before for the next rollouts
                self._buffered_inputs = self._kl_sums = None
                batch = self._generate_and_score_completions(generation_batch)
                self._buffered_inputs = siblings.length_sorted(batch, parts)
            return self._buffered_inputs[self._step % parts]

    # Phase 1: two teacher views, visual advantage, coefficients

    def _score(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the loss needs beside the batch: what `teacher.views` keeps, lists of B tensors; (B, T) coefficients,
        and bool masks of the tokens inside and outside the high-VA groups; P as `num_items_in_batch`."""
        num_generations = self.args.num_generations if self.model.training else 1
        mask, images = batch["completion_mask"], self._rollout_images or [[]] * len(batch["completion_mask"])
        has_image = torch.tensor([bool(row) for row in images], device=mask.device)
        checks.check_siblings(self._gather(checks.sibling_fingerprints(batch)), num_generations)

        for_loss, logps = self.teacher.views(batch, images, has_image, num_generations)
        va, has_va = torch.zeros_like(mask, dtype=torch.float32), has_image & self.args.measure_va
        if logps:
            given_true, given_degraded = (va.masked_scatter(mask.bool(), x) for x in logps)
            va = objective.visual_advantage(given_true, given_degraded, mask * has_image[:, None])
        of_all_ranks = self._gather(va), self._gather(mask), self._gather(has_va)
        weights, coefficients, high, low = self._coefficients_of(*of_all_ranks, num_generations)
        start = len(mask) * self.accelerator.process_index
        own = slice(start, start + len(mask)), slice(mask.size(1))  # rows and columns of this rank
        self.last_rollouts = {
            "prompt_ids": batch["prompt_ids"],
            "completion_ids": batch["completion_ids"],
            "mask": mask,
            "va": va if logps else None,
            "weights": weights[own[0]],
            "images": images,
        }
        return {
            **for_loss,
            "coefficients": coefficients[own],
            "high_tokens": high[own],
            "low_tokens": low[own],
            "num_items_in_batch": torch.tensor(len(weights) / num_generations, device=mask.device),
        }

    def _coefficients_of(
        self, va: torch.Tensor, mask: torch.Tensor, has_va: torch.Tensor, num_generations: int
    ) -> tuple[torch.Tensor, ...]:
        """Rollout weights (B,), token coefficients (B, T), and (B, T) bool masks of the tokens inside and outside the
        high-VA groups, of the rollouts of all ranks; logs the figures of their VA.

        Args:
            va, mask: (B, T) VA and response tokens.
            has_va: (B,) bool; a row without, such as one without an image, is weighted as in Standard OPD.
        """
        args, ungrouped = self.args, ~has_va
        if args.va_floor is not None:
            ungrouped = ungrouped | (objective.mean_over_tokens(va, mask) < args.va_floor)
        weights, coefficients = objective.coefficients(
            va,
            mask,
            num_generations,
            weighting=args.weighting if self.model.training else "none",
            weight_temperature=args.weight_temperature,
            eps=args.va_eps,
            top_fraction=args.top_fraction,
            high_weight=args.high_weight,
            ungrouped=ungrouped,
            generator=self._ties(),
        )
        # For the logs only, where a row without groups has neither high nor low tokens
        grouped = mask.bool() & ~ungrouped[:, None]
        high = grouped & objective.high_tokens(va, mask, args.top_fraction, self._ties())
        if has_va.any():  # a row without an image has no VA that could be 0
            for name, value in va_figures(va, mask, weights, high, has_va, num_generations).items():
                self._record(name, value)
        return weights, coefficients, high, grouped & ~high

    def _degraded_pixel_values(self, batch: dict[str, Any], images: list, num_generations: int) -> torch.Tensor:
        args, processor = self.args, self.processing_class.image_processor
        groups = self._prompt_numbers(len(images), num_generations)
        with self._timed("degraded_images"):
            pixels, cells = degraded_pixel_values(
                processor, batch, images, groups, args.degradation_ratio, args.pixelate_at
            )
        self._record("va/cells", sum(cells) / len(cells))
        return pixels

    def _hidden_states(self, model, batch: dict[str, Any]) -> torch.Tensor:
        """Hidden states (N, H) from which the response tokens are predicted, row by row."""
        inputs, mask = siblings.trimmed_inputs(batch, self.pad_to_multiple_of)
        hidden = self._get_last_hidden_state(model, logits_to_keep=mask.size(1) - 1, **inputs)
        return hidden[mask[:, 1:]]

    # Phase 2: the loss

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """Sum of coefficient * KL over the rows of a micro-batch, divided by the prompts of the step."""
        # Not those of `inputs`: FSDP rounds what a forward is given to bfloat16
        inputs, num_prompts = {**inputs, "coefficients": self._coefficients}, self._num_prompts
        mask = inputs["completion_mask"].bool()
        # The redirected forward, in which this runs, bypasses the autocast that accelerate puts around a model's own
        with self.accelerator.autocast():
            hidden = self._hidden_states(unwrapped_student, inputs)
            kl_N, entropy_N = self.teacher.divergence(unwrapped_student, hidden, inputs)
        kl = torch.zeros_like(mask, dtype=kl_N.dtype).masked_scatter(mask, kl_N)
        loss = objective.grouped_kl_loss(kl, inputs["coefficients"], num_prompts)
        high, low = inputs["high_tokens"], inputs["low_tokens"]
        sums = torch.stack([kl[high].sum(), high.sum(), kl[low].sum(), low.sum()]).detach()
        self._kl_sums = sums if self._kl_sums is None else self._kl_sums + sums
        return loss, entropy_N.sum(), mask.sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._coefficients = inputs["coefficients"]
        self._num_prompts = inputs["num_items_in_batch"] / self.accelerator.num_processes  # undoes the mean over ranks
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Reduced here and not in `_compute_loss`, so that no collective runs inside a wrapped forward; once a step:
        # means over all its tokens, whatever the micro-batches
        if self.accelerator.sync_gradients or not self.model.training:
            kl_high, n_high, kl_low, n_low = self.accelerator.gather(self._kl_sums[None]).sum(0).tolist()
            for name, kl, count in (("kl/high", kl_high, n_high), ("kl/low", kl_low, n_low)):
                if count:
                    self._record(name, kl / count)
            self._kl_sums = None
        return loss

    # Helpers

    def _head(self, model):
        return without_padding(lm_head(model), model.config.get_text_config().vocab_size, self.vocab_size)

    def _prompt_numbers(self, num_rows: int, num_generations: int) -> list[int]:
        """The number of each row's prompt, counted over all ranks, for the rows of this rank."""
        start = num_rows * self.accelerator.process_index
        return [row // num_generations for row in range(start, start + num_rows)]

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks in the sampler's order, padded with zeros to the longest rollout."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=1))

    def _ties(self) -> torch.Generator | None:
        """The same draw for every call within a step and on every rank."""
        seed = self.args.seed + self.state.global_step
        return torch.Generator().manual_seed(seed) if self.args.random_ties else None

    def _record(self, name: str, value: float) -> None:
        """Logs the mean over calls."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _measures_null(self) -> bool:
        """At the first training batch: the doctor would not see the figure of an evaluation before it."""
        return self.args.measure_va and self.args.doctor_steps > 0 and self.model.training and self._step == 0

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Logs the seconds of a part of the step as `time/<part>`; waits for the GPU so that they are its own."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._record(f"time/{part}", time.perf_counter() - start)
