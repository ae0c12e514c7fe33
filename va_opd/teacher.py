"""The teacher's side of a step: which rollouts pass it together, and what is kept of a pass."""

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from . import siblings
from .lm_head import lm_head, sampled_logps
from .offload import Offloaded

if TYPE_CHECKING:
    from .trainer import VAOPDTrainer

logger = logging.get_logger(__name__)


class Teacher:
    """Scores the rollouts of a generation batch, before they are sorted into micro-batches, with the teacher of
    `trainer`, and compares the student with it. `served.ServedTeacher` has the same `views` and `divergence`.

    `shares` holds the decisions of `shares_prompts`, for batches with images and for those without. With
    `args.teacher_offload` the teacher is on the device during `views` only.
    """

    def __init__(self, trainer: "VAOPDTrainer"):
        self.trainer, self.shares = trainer, dict[bool, bool]()
        offload, device = trainer.args.teacher_offload, trainer.accelerator.device
        self.offloaded = Offloaded(trainer.teacher_model, device) if offload else None

    def views(
        self, batch: dict[str, Any], images: list[list[Any]], has_image: torch.Tensor, num_generations: int
    ) -> tuple[dict[str, list[torch.Tensor]], tuple[torch.Tensor, ...]]:
        """What `divergence` needs of each rollout, and (N,) log-probabilities of their tokens given the true and given
        the degraded images, which `measure_va=False` leaves out. `has_image` is (B,) bool."""
        trainer, measure = self.trainer, self.trainer.args.measure_va
        with ExitStack() as stack:
            if self.offloaded:
                with trainer._timed("teacher_transfer"):
                    stack.enter_context(self.offloaded.on_device())
            shared = self.shares_prompts(batch, has_image, num_generations)
            parts = self.parts(len(has_image), num_generations, shared)
            trainer._record("teacher/shared_prompts", float(shared))
            views = [batch]
            # On all ranks or on none: the forward of a sharded teacher is a collective
            if measure and trainer.accelerator.gather(has_image).any():
                views.append(dict(batch))
                if has_image.any():
                    views[1]["pixel_values"] = trainer._degraded_pixel_values(batch, images, num_generations)
            with trainer._timed("teacher"):
                hidden, logps = self.score(views, parts, shared, measure)
            if trainer._measures_null():  # equal images must give VA 0, else it is noise
                _, (a, b) = self.score([batch, dict(batch)], [first_with_image(parts, has_image)], shared)
                trainer._record("va/null", (a - b).abs().max().item())
        return {"teacher_hidden_states": hidden}, (logps[0], logps[-1]) if measure else ()

    def divergence(self, student, hidden: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(student || teacher) and the student's entropy, (N,) each, from its hidden states (N, H)."""
        trainer = self.trainer
        return trainer.divergence(
            trainer._head(student),
            hidden,
            trainer._head(trainer.accelerator.unwrap_model(trainer.teacher_model)),
            torch.cat(batch["teacher_hidden_states"]),
            batch["coefficients"][batch["completion_mask"].bool()],
            trainer.args.kl_temperature,
        )

    def shares_prompts(self, batch: dict[str, Any], has_image: torch.Tensor, num_generations: int) -> bool:
        """Whether a prompt passes the teacher once for all its rollouts: equal numbers are checked on one prompt, at
        the first batch with images and at the first without. Otherwise a warning says why each rollout passes whole.

        `has_image` is (B,) bool. All ranks decide alike.
        """
        trainer = self.trainer
        if num_generations == 1:
            return False
        kind = bool(trainer.accelerator.gather(has_image).any())
        if kind not in self.shares:
            model = trainer.accelerator.unwrap_model(trainer.teacher_model)
            problem = siblings.refusal(model) or self._cache_problem(batch, has_image, num_generations, model.dtype)
            self.shares[kind] = problem is None
            if problem and trainer.accelerator.is_main_process:
                logger.warning(f"each rollout passes the teacher with its whole prompt: {problem}")
        return self.shares[kind]

    def _cache_problem(
        self, batch: dict[str, Any], has_image: torch.Tensor, num_generations: int, dtype: torch.dtype
    ) -> str | None:
        """Scores a prompt's rollouts from its cache in two views, and the last of them whole: what is wrong if their
        numbers differ by more than rounding."""
        rows = first_with_image(self.parts(len(has_image), num_generations, True), has_image)
        _, both = self.score([batch, dict(batch)], [rows], True)
        _, (whole,) = self.score([batch], [rows[-1:]], False)
        gaps = torch.stack([(ours[-len(whole) :] - whole).abs().mean() for ours in both])
        gap = self.trainer.accelerator.gather(gaps).max().item()
        # A wrong position or mask makes tenths of a nat
        if gap <= (1e-3 if dtype == torch.float32 else 0.05):
            return None
        return f"log-probabilities from a cache of the prompt differ by {gap:.2g} nats on average"

    def parts(self, num_rows: int, num_generations: int, shared: bool) -> list[range]:
        """Rows that pass the teacher together: those of a prompt, or those of a micro-batch."""
        trainer = self.trainer
        if shared:
            rank, num_ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
            return siblings.sibling_groups(num_rows, num_generations, rank, num_ranks)
        size = num_rows // (trainer.args.gradient_accumulation_steps if trainer.model.training else 1)
        return [range(start, start + size) for start in range(0, num_rows, size)]

    @torch.no_grad()
    def score(
        self, views: list[dict[str, Any]], parts: list[range], shared: bool, with_logps: bool = True
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The teacher's hidden states of each rollout in the first view, (T_i, H), and `with_logps` for each view (N,)
        log-probabilities of their tokens. The views differ in pixels only. The teacher computes in its own dtype."""
        trainer = self.trainer
        trainer.teacher_model.eval()
        model = trainer.accelerator.unwrap_model(trainer.teacher_model)
        hidden: dict[range, tuple[torch.Tensor, ...]] = {}
        logps: list[dict[range, torch.Tensor]] = [{} for _ in views if with_logps]
        for rows in parts:  # one that is repeated, so that all ranks make as many passes, counts once
            part = [siblings.take_rows(view, list(rows)) for view in views]
            mask = part[0]["completion_mask"].bool()
            states = trainer._forward_redirection(trainer.teacher_model, model, self._states, model, part, shared)
            head, tokens = lm_head(model), part[0]["completion_ids"][mask]
            for found, of_view in zip(logps, states, strict=with_logps):
                found[rows] = sampled_logps(head, of_view, tokens, trainer.vocab_size)
            hidden[rows] = states[0].split(mask.sum(1).tolist())
        return [row for rows in hidden.values() for row in rows], [torch.cat(list(x.values())) for x in logps]

    def _states(self, model, views: list[dict[str, Any]], shared: bool) -> list[torch.Tensor]:
        """Hidden states (N, H) of each view: together from one pass over the prompt, or each by a whole pass."""
        if not shared:
            return [self.trainer._hidden_states(model, view) for view in views]
        # Where the teacher is sharded, a pass costs a transfer of all weights, and all ranks make equally many: one
        if is_deepspeed_zero3_enabled():
            return siblings.sibling_hidden_states(model, views, math.inf, math.inf)
        pass_tokens = siblings.PASS_TOKENS.get(self.trainer.accelerator.device.type, 0)
        return siblings.sibling_hidden_states(model, views, pass_tokens, siblings.MOST_TOKENS)


def first_with_image(parts: list[range], has_image: torch.Tensor) -> range:
    """The rows on which the views are checked: of the first part with an image, else of the first. `has_image`: (B,)
    bool."""
    return next((rows for rows in parts if has_image[rows.start : rows.stop].any()), parts[0])
