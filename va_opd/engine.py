"""vLLM as the engine of rollouts: prompts with images in the form that it takes, and a check of its weights."""

import math
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from .degraded import as_rgb


class VLLMRollouts:
    """Stands before the `generate` of a TRL trainer's `vllm_generation`.

    A colocated engine expands the image placeholders of a prompt itself, but TRL 1.16 passes prompts with placeholders
    already expanded, which would then be expanded once more (huggingface/trl#6294): here they are folded first, and
    the engine must make the same prompts of them. A server takes them as TRL passes them. After each weight sync an
    engine forgets what the older weights of the vision tower made of its last images, which TRL leaves in its cache;
    in a colocated one what vLLM's sleep leaves undefined is 0 again (`lost_in_sleep`). Images go to it as the
    trainer's processor sees them (`in_rgb`).

    After each generation `logps` has B lists: the log-probabilities in nats with which vLLM sampled the T_i tokens.
    """

    def __init__(self, generation):
        self.logps: list[list[float | None]] = []
        self._generation, self._generate = generation, generation.generate
        generation.logprobs, generation.generate = 0, self._rollouts  # 0: of the sampled token alone
        self._sync, generation.sync_weights = generation.sync_weights, self._sync_weights

    def _sync_weights(self):
        self._sync()
        if self._generation.mode == "server":
            if self._generation.accelerator.is_main_process:
                client = self._generation.vllm_client
                client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()
            return
        engine = self._generation.llm.llm_engine
        engine.reset_encoder_cache()
        for tensor in lost_in_sleep(engine.model_executor.driver_worker.model_runner):  # as TRL finds the model
            tensor.zero_()

    def _rollouts(self, prompts, images, *arguments, **options):
        folded, images = prompts, images and [row and [in_rgb(image) for image in row] for row in images]
        if images is not None and self._generation.mode == "colocate":
            token = self._generation.processing_class.image_token_id
            folded = [fold_placeholders(ids, row, token) for ids, row in zip(prompts, images, strict=True)]
        expanded, completion_ids, logprobs, token_ids = self._generate(folded, images, *arguments, **options)
        if folded is not prompts:
            check_expanded(prompts, expanded)
        self.logps = [[token[0] for token in row] for row in logprobs]
        return prompts, completion_ids, logprobs, token_ids

    def gap(self, logps_N: torch.Tensor, count: int, top_p: float) -> torch.Tensor:
        """How far the student's (N,) log-probabilities of the first `count` rollouts are from vLLM's: mean in nats.

        vLLM's are within the nucleus: higher by 0 to -log(top_p), which is no gap.
        """
        rows = [float("nan") if logp is None else logp for row in self.logps[:count] for logp in row]
        difference = torch.tensor(rows, device=logps_N.device) - logps_N
        return (difference - difference.clamp(0, -math.log(top_p))).abs().nanmean()


def lost_in_sleep(runner: Any) -> list[torch.Tensor]:
    """Tensors of vLLM's model runner that it makes while it loads the model, fills with zeros, and may read where it
    has not written: what Qwen3-VL adds to the states of text, and the positions of M-RoPE and the embeddings of the
    places that only fill a CUDA graph, of which a position beyond the table ends the process. vLLM's sleep discards
    them with the weights, and restores buffers alone."""
    state = getattr(runner, "model_state", None)  # of the runner for GPUs
    rope, encoder = (getattr(state, name, None) for name in ("rope_state", "encoder_runner"))
    found = [getattr(rope, "positions", None), getattr(encoder, "inputs_embeds", None)]
    found += getattr(runner.model, "deepstack_input_embeds", None) or []
    return [tensor for tensor in found if tensor is not None]


def in_rgb(image: Any) -> Any:
    """A PIL image in RGB as processors make it, without alpha and EXIF: vLLM would put it on white, and rotate it."""
    return as_rgb(image) if isinstance(image, Image.Image) else image


def fold_placeholders(ids: list[int], images: list | None, token: int) -> list[int]:
    """`ids` with each run of the image placeholder `token` as one. Raises `ValueError` unless an image is one run."""
    runs = [list(run) for _, run in groupby(ids, lambda i: i == token)]
    folded = [i for run in runs for i in (run[:1] if run[0] == token else run)]
    if folded.count(token) != len(images or []):
        raise ValueError(
            f"a prompt with {len(images or [])} images has {folded.count(token)} runs of image placeholders: "
            "vllm_mode=colocate and teacher_server need a model with one run an image, such as Qwen-VL; for others "
            "use transformers for rollouts and a local teacher"
        )
    return folded


def check_expanded(prompts: list[list[int]], expanded: list[list[int]]) -> None:
    """Raises `ValueError` where vLLM has generated from other prompts than those that are trained on."""
    for ours, theirs in zip(prompts, expanded, strict=True):
        if list(ours) != list(theirs):
            raise ValueError(
                f"vLLM makes another prompt of text and images than the processor, of {len(theirs)} tokens where "
                f"processing_class has {len(ours)}: save processing_class into the student's folder, where vLLM reads "
                "its image limits; if that is done, vLLM expands images of this family differently: set use_vllm to "
                "false"
            )
