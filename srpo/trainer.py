"""`SRPOTrainer`: wires routing, self-teacher and the functions of `objective.py` into TRL's `GRPOTrainer`.

One generation batch. Generation, rewards, advantages, importance correction and token count stay TRL's. Then, on the
rewards of all ranks, each rollout is routed (Section 3.1). Teacher phase (`_self_distillation`, no gradient, routed
rows only): the self-teacher reads the plain prompt, a correct sibling and the rollout; its last hidden states are
kept, from which both the entropy weights and the divergence are computed. Loss (`_compute_loss`, micro-batches): one
forward of the student, clipped surrogate on the rows of the GRPO branch, weighted divergence on the others, and one
denominator for both. `routing="grpo"` is TRL's trainer, on micro-batches of like length (`batches.SortsByLength`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from . import checks, objective
from ._trl import AdapterSync, EpochSampler, ForwardRedirection, WholeBatches, prepare_rollouts
from .batches import SortsByLength, length_sorted, loss_mask, trimmed
from .checkpoints import LoadsWeights
from .config import ALPHAS, SRPOConfig
from .divergence import chunked_divergence, chunked_entropy
from .doctor import DoctorCallback, routing_figures, weight_figures
from .lm_head import last_hidden_states, lm_head, sampled_logps
from .logps import check_logps
from .reprompt import teacher_prompt_ids
from .rope import exact_frequencies
from .teacher import SelfTeacher, SelfTeacherCallback, autocast

# Means over the tokens of a step that have one: the policy's entropy, and the loss of each branch
LOSS_FIGURES = ("entropy", "loss/grpo", "loss/sdpo")


class SRPOTrainer(LoadsWeights, SortsByLength, GRPOTrainer):
    """
    Trains a policy on its own rollouts: correct ones by GRPO, failed ones with a correct sibling by distillation from
    the policy's own average, which is shown that sibling (arXiv 2604.02288).

    Arguments are those of [`~trl.GRPOTrainer`]; `args` is an [`SRPOConfig`], whose `routing` also gives GRPO, SDPO and
    the paper's other baselines. Reward functions must score every rollout with a finite number; a rollout is correct
    from `args.reward_threshold` on. Text only.
    """

    _tag_names: ClassVar = ["trl", "srpo"]
    _name = "SRPO"
    _paper: ClassVar = {
        "title": "Unifying Group-Relative and Self-Distillation Policy Optimization via Sample Routing",
        "id": "2604.02288",
        "citation": "@article{li2026srpo,\n    title = {Unifying Group-Relative and Self-Distillation Policy "
        "Optimization via Sample Routing},\n    author = {G. Li and others},\n"
        "    journal = {arXiv preprint arXiv:2604.02288},\n    year = {2026}\n}",
    }

    divergence = staticmethod(chunked_divergence)  # a subclass may have another: README.md, "Another loss"

    def __init__(self, model, reward_funcs=None, args: SRPOConfig | None = None, train_dataset=None, **kwargs):
        args = SRPOConfig() if args is None else args
        checks.check_inputs(args, train_dataset)
        if not (kwargs.get("rollout_func") or kwargs.get("environment_factory")):  # which may make columns
            for name, data in {"eval_dataset": kwargs.get("eval_dataset"), "train_dataset": train_dataset}.items():
                checks.check_calls(reward_funcs, kwargs.get("processing_class"), data, name)
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        checks.watch_rewards(self)
        checks.check_tokens(self.model, self._tokenizer)
        exact_frequencies(self.model, self.ref_model)
        check_logps(self)
        if not (isinstance(model, str) or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            checks.check_reference(self.model, self.ref_model)
        prepare_rollouts(self)
        self.add_callback(checks.FrozenCallback())
        self.add_callback(WholeBatches(self))
        self.add_callback(AdapterSync(self))
        if not self.is_deepspeed_enabled:  # which keeps float32 copies
            self.add_callback(checks.HalfPrecisionCallback())
        self._forward_redirection = ForwardRedirection()
        self._teacher_hidden: dict[int, torch.Tensor] = {}
        self._loss_sums: torch.Tensor | int = 0
        self.last_rollouts: dict[str, Any] = {}
        self.teacher: SelfTeacher | None = None
        if args.routing != "grpo":
            checks.check_support(self)
            self.teacher = SelfTeacher(
                self.model,
                self.accelerator,
                args.teacher,
                args.teacher_update_rate,
                args.teacher_offload,
                {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})},
            )
            if args.teacher == "ema":
                self.add_callback(SelfTeacherCallback(self))
        if args.doctor_steps:
            self.add_callback(DoctorCallback(args.doctor_steps))

    # Generation and rewards

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            epoch=lambda: int(self.state.epoch or 0),
            seed=self.args.seed,
        )

    def _generate(self, prompts: list):
        self._new_prompts = prompts
        generated = super()._generate(prompts)
        _, completion_ids, tool_mask, *_ = generated
        # Taken before TRL masks truncated rollouts, so that these count with their length
        self._lengths = [sum(row) for row in tool_mask] if tool_mask else [len(ids) for ids in completion_ids]
        return generated

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        prompts, self._new_prompts = self._new_prompts, None
        if prompts:  # None in later turns, where a prompt holds the rollout so far and the results of its tools
            checks.check_prompt_lengths(prompt_ids, prompts, self.args)
        with self._timed("generation", add=not prompts):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self._timed("reward"):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(rewards_per_func.device)
        self._rollouts = {
            "prompts": prompts,
            "completion_ids": completion_ids_list,
            "rewards": (rewards_per_func * weights).nansum(1).masked_fill(rewards_per_func.isnan().all(1), torch.nan),
        }
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            batch.update(self._route(batch))
        return batch

    def _prepare_inputs(self, generation_batch):
        """A generation batch of a routed update is one update: sorted by length as it is, not drawn before."""
        if self.args.routing == "grpo" or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % parts == 0:
            # Frees the memory of the step before for the next rollouts
            self._teacher_hidden, self._loss_sums = {}, 0
            self._buffered_inputs = length_sorted(self._generate_and_score_completions(generation_batch), parts)
        return self._buffered_inputs[self._step % parts]

    # Routing and teacher phase

    @torch.no_grad()
    def _route(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Logs the routes. Returns what the routed loss needs beside the batch, nothing for `routing="grpo"`."""
        args, rewards, self.last_rollouts = self.args, self._rollouts["rewards"], {}
        if args.routing == "grpo" and not rewards.isfinite().all():
            return {}  # TRL leaves such a rollout out of its group, and it cannot be routed
        routes = objective.route(rewards, self.num_generations, args.reward_threshold)
        mask = loss_mask(batch)
        counts = self.accelerator.gather(mask.sum(1)) > 0  # no token counts in a truncated row that is masked
        distill = objective.distilled_rows(routes, args.routing) & counts
        grpo = objective.grpo_rows(distill, args.routing) & counts
        donors = torch.where(distill, self._donors(routes), -1)
        lengths = self.accelerator.gather(torch.tensor(self._lengths, device=mask.device))
        start = len(mask) * self.accelerator.process_index
        here = slice(start, start + len(mask))
        texts = self._tokenizer.batch_decode(self._rollouts["completion_ids"], skip_special_tokens=True)
        self.last_rollouts = {
            "prompts": self._rollouts["prompts"],
            "texts": texts,
            "rewards": rewards[here],
            "distill": distill[here],
            "grpo": grpo[here],
            "donor": donors[here],
        }
        self._record(routing_figures(routes, distill, grpo, lengths, self.num_generations))
        if args.routing == "grpo":
            return {}
        entropy = self._self_distillation(batch, mask, distill[here], donors[here], gather_object(texts))
        return self._loss_inputs(mask, distill, entropy, here)

    def _donors(self, routes: objective.Routing) -> torch.Tensor:
        if self.args.demonstration == "first":
            return routes.donor
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        return objective.random_donors(routes.correct, self.num_generations, generator)

    def _self_distillation(
        self, batch: dict[str, Any], mask: torch.Tensor, distill: torch.Tensor, donors: torch.Tensor, texts: list[str]
    ) -> torch.Tensor:
        """Keeps the teacher's (T_i, H) hidden states of each distilled row; returns (B, T) entropy, 0 elsewhere."""
        args, rows = self.args, distill.nonzero().flatten().tolist()
        prompt_ids = teacher_prompt_ids(
            [self._rollouts["prompts"][row] for row in rows],
            [texts[donors[row]] for row in rows],
            lambda prompts: self._tokenize_prompts(prompts)[0],
            self._tokenizer,
            args.max_reprompt_length,
            args.reprompt_template,
        )
        entropy = torch.zeros_like(mask, dtype=torch.float32)
        with self._timed("teacher"):
            self._teacher_hidden, self._teacher_head = self.teacher.hidden_states(
                self.model,
                dict(zip(rows, prompt_ids, strict=True)),
                batch,
                mask,
                args.per_device_train_batch_size,
                self._tokenizer.pad_token_id,
            )
            # The head is gathered once on every rank, however many rows it has
            with self._teacher_head.gathered(), autocast(self.accelerator, self._teacher_head.weight.dtype):
                for row, hidden in self._teacher_hidden.items():
                    entropy[row, mask[row].bool()] = chunked_entropy(self._teacher_head, hidden, self.temperature)
        return entropy

    def _loss_inputs(
        self, mask: torch.Tensor, distill: torch.Tensor, entropy: torch.Tensor, here: slice
    ) -> dict[str, Any]:
        """Entropy weights over the routed tokens of all ranks, and the tokens by which the loss is divided."""
        mask_all, entropy_all = self._gather(mask), self._gather(entropy)
        routed = mask_all * distill[:, None]
        weights = objective.entropy_weights(entropy_all, routed, self.args.entropy_beta)
        self._record(weight_figures(entropy_all, weights, routed))
        scored = torch.tensor([sum(map(len, self._teacher_hidden.values()))], device=mask.device)
        scored, needed = self.accelerator.gather(scored).sum().item(), routed.sum().item()
        self._record({"teacher/scored_over_needed": scored / needed if needed else 1.0})
        counted = mask_all if self.args.routing in ("srpo", "mix") else routed
        return {
            "row": torch.arange(len(mask), device=mask.device),
            "distill": distill[here],
            "entropy_weights": weights[here, : mask.size(1)],
            "num_items_in_batch": counted.sum().clamp(min=1),
        }

    # The loss

    def _compute_loss(self, model, inputs):
        if "distill" not in inputs:  # routing="grpo", and evaluation
            return super()._compute_loss(model, inputs)
        exact, unwrapped = {}, self.accelerator.unwrap_model(model)

        def routed(student):
            exact["loss"], exact["sums"] = self._routed_loss(student, inputs)
            return exact["loss"]

        # The redirected forward bypasses the autocast that accelerate puts around a model's own. FSDP rounds its
        # arguments and its result to bfloat16: inputs, exact loss and what is logged go past it in the closure
        with self.accelerator.autocast():
            loss = self._forward_redirection(model, unwrapped, routed, unwrapped).float()
        self._log_loss(exact["sums"])
        return loss + (exact["loss"] - loss).detach()

    def _routed_loss(self, model, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch (Section 3.3), and sums and counts of what is logged.

        There is one optimizer step a generation batch, so the ratio to the old policy is 1; only its gradient counts.
        """
        inputs = trimmed(inputs, self.pad_to_multiple_of)
        args, distill, advantages = self.args, inputs["distill"], inputs["advantages"]
        mask = loss_mask(inputs).bool()
        hidden = last_hidden_states(model, inputs["input_ids"], inputs["attention_mask"])
        hidden, head = hidden[:, -mask.size(1) - 1 : -1], lm_head(model)  # states before each response token
        tis = inputs.get("importance_sampling_ratio", torch.ones_like(mask, dtype=torch.float32))
        num_tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes

        # A row that is distilled, or has no advantage, needs no log-probabilities
        grpo_rows = objective.grpo_rows(distill, args.routing) & (advantages != 0)
        by_grpo, by_sdpo = mask & grpo_rows[:, None], mask & distill[:, None]
        logps_N, entropy_N = sampled_logps(head, hidden[by_grpo], inputs["completion_ids"][by_grpo], self.temperature)
        logps = torch.zeros_like(mask, dtype=logps_N.dtype).masked_scatter(by_grpo, logps_N)
        grpo = tis * objective.grpo_token_loss(
            logps, logps.detach(), advantages, self.epsilon_low, self.epsilon_high, args.delta
        )
        weights = inputs["entropy_weights"]
        coefficients = tis * objective.distillation_coefficients(args.routing, weights, distill, mask, args.mix_weight)
        sdpo_N, student_entropy_N = self._divergence(
            head, hidden[by_sdpo], inputs["row"][distill].tolist(), coefficients[by_sdpo]
        )
        sdpo = tis * torch.zeros_like(mask, dtype=sdpo_N.dtype).masked_scatter(by_sdpo, sdpo_N)
        loss = objective.routed_loss(args.routing, grpo, sdpo, weights, distill, mask, num_tokens, args.mix_weight)
        entropy = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(by_grpo, entropy_N.detach().float())
        entropy = entropy.masked_scatter(by_sdpo, student_entropy_N)  # the same on tokens of both branches
        sums = ((entropy, by_grpo | by_sdpo), (grpo[by_grpo], by_grpo), (sdpo_N, by_sdpo))
        return loss, torch.stack([torch.stack([x.detach().float().sum(), m.sum()]) for x, m in sums])

    def _log_loss(self, sums: torch.Tensor) -> None:
        """Logs once a step, as means over all its tokens whatever the micro-batches."""
        self._loss_sums = self._loss_sums + sums
        if self.accelerator.sync_gradients:
            sums, self._loss_sums = self.accelerator.gather(self._loss_sums[None]).sum(0), 0
            figures = zip(LOSS_FIGURES, sums.tolist(), strict=True)
            self._record({name: total / count for name, (total, count) in figures if count})

    def _divergence(
        self, head, hidden: torch.Tensor, rows: list[int], coefficients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """On the tokens of the distilled `rows`, divergence (N,) between student and self-teacher, and the student's
        entropy (N,)."""
        if not rows and not self.teacher.sharded:  # a sharded head is gathered by all ranks or by none
            return hidden.new_zeros(2, 0, dtype=torch.float32).unbind()
        args, teacher = self.args, self._teacher_head
        teacher_hidden = torch.cat([self._teacher_hidden[row] for row in rows] or [hidden.detach()])  # else empty
        options = {"top_k": args.distillation_topk, "alpha": ALPHAS[args.divergence], "tail": args.tail}
        with autocast(self.accelerator, teacher.weight.dtype):
            return self.divergence(head, hidden, teacher, teacher_hidden, coefficients, self.temperature, **options)

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir):
        # Before trainer_state.json, which makes a checkpoint complete: a kill leaves no checkpoint without its teacher
        super()._save_optimizer_and_scheduler(output_dir)
        if self.teacher is not None:
            self.teacher.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            self.teacher.load(Path(checkpoint))

    # Helpers

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks in the sampler's order, padded with zeros to the longest rollout."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=1))

    def _record(self, figures: dict[str, float], add: bool = False) -> None:
        """Logs the mean over calls; with `add`, values count to the call before."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in figures.items():
            metrics[name].append(metrics[name].pop() + value if add else value)

    @contextmanager
    def _timed(self, part: str, add: bool = False) -> Iterator[None]:
        """Logs the seconds of a part of the step as `time/<part>`; waits for the GPU so that they are its own."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._record({f"time/{part}": time.perf_counter() - start}, add)
