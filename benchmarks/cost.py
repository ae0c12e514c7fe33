"""Memory traffic, FLOP and seconds of the parts of a training step, from sizes: what `benchmarks.plan` adds up.

Each formula is a function that names its source. Left out: rewards, data, saving, evaluation, the vision tower's part
beyond its parameters, and any overlap of the parts.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from common import plan
from common.plan import GIB, Shape

NODE = 8  # GPUs
PCIE = 32e9  # bytes/s, version 4.0, 16 lanes, one way


class GPU(NamedTuple):
    """Memory in GiB, dense bfloat16 FLOP/s, bytes/s of memory, to a GPU of the node (one way) and to another node."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    # NVIDIA A100 data sheet (SXM); DGX A100: one 200 Gb/s adapter a GPU
    "a100": GPU(80, 312e12, 2.039e12, 300e9, 25e9),
    "a100-40g": GPU(40, 312e12, 1.555e12, 300e9, 25e9),
    # NVIDIA H100 and H200 data sheets (SXM), dense; DGX H100 and H200: one 400 Gb/s adapter a GPU
    "h100": GPU(80, 989e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(141, 989e12, 4.8e12, 450e9, 50e9),
    # No public data sheet: the figures that trade press and resellers give; network as of an H100
    "h20": GPU(96, 148e12, 4.0e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Assumed:
    """One end of every assumption. Shares are of the GPU's figures."""

    memory: float
    score: float
    train: float
    link: float
    launch: float
    longest: float
    start: float


# slow end, fast end, meaning
ASSUMED = {
    "memory": (0.3, 0.7, "share of memory bandwidth in decoding and in the optimizer; our guess"),
    "score": (0.2, 0.5, "share of FLOP/s in forward passes and prefill; 0.5 is usual for packed batches"),
    "train": (0.15, 0.4, "share of FLOP/s in forward and backward; published runs reach 0.15 to 0.36"),
    "link": (0.3, 0.8, "share of a link's bandwidth; our guess"),
    "launch": (10e-3, 2e-3, "seconds between two decoding steps in which no kernel runs; our guess"),
    "longest": (4.0, 2.0, "longest rollout of a GPU's batch over the mean one, cut at the limit; our guess"),
    "start": (300.0, 60.0, "seconds to start a server of R-Diverse; our guess"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def kv_bytes(shape: Shape) -> int:
    """Bytes of a token's bfloat16 keys and values: 2 tensors x 2 bytes in each layer (arXiv 1911.02150)."""
    return 4 * shape.layers * shape.key


def forward_flops(parameters: float, shape: Shape, tokens: float, context: float) -> float:
    """FLOP of a forward pass: 2 per parameter and token, and 4 * query per layer, token and position in attention,
    which sees half of the positions if causal (arXiv 2204.02311, Appendix B)."""
    return tokens * (2 * parameters + 2 * shape.layers * shape.query * context)


def train_flops(forward: float, checkpointing: bool, lora: bool) -> float:
    """FLOP of forward and backward: the backward is two forwards, one for inputs and one for weights, which adapters
    save; checkpointing repeats the forward (arXiv 2205.05198, Section 5)."""
    return forward * (3 + checkpointing - lora)


def activation_bytes(shape: Shape, tokens: float, checkpointing: bool) -> float:
    """Bytes of a micro-batch in training: 34 per token and width in each layer, without attention scores; with
    checkpointing 2 in each layer, and 34 in one (arXiv 2205.05198, Table 2)."""
    return tokens * shape.width * (2 * shape.layers + 34 if checkpointing else 34 * shape.layers)


def decode_seconds(
    parameters: float,
    shape: Shape,
    rollouts: float,
    prompt: float,
    response: float,
    slots: float,
    gpu: GPU,
    a: Assumed,
) -> float:
    """Seconds in which one engine decodes: it reads all weights once per step and each rollout's cache at each of its
    tokens, or is bound by 2 FLOP per parameter and token.

    `slots` rollouts run at once, so there are as many steps as the longest rollout or the queue needs. arXiv
    2211.05102, Section 2; the bound is in the docs of every engine: bandwidth over bytes of weights and cache.
    """
    steps = max(response * a.longest, rollouts * response / slots)
    cache = rollouts * response * (prompt + response / 2) * kv_bytes(shape)
    read = (steps * 2 * parameters + cache) / (gpu.bandwidth * a.memory)
    return max(read, 2 * parameters * rollouts * response / (gpu.flops * a.score)) + steps * a.launch


def cache_slots(parameters: float, shape: Shape, memory: float, context: float) -> float:
    """Rollouts whose cache fits beside the weights in `memory` bytes, at most vLLM's default of 256.

    Raises `ValueError` if not even one does.
    """
    slots = (memory - 2 * parameters) / (context * kv_bytes(shape))
    if slots < 1:
        raise ValueError(
            f"an engine with {memory / GIB:.1f} GiB does not hold {2 * parameters / GIB:.1f} GiB of weights and the "
            "cache of one rollout: raise its share of memory"
        )
    return min(slots, 256)


def optimizer_seconds(trained: float, gpu: GPU, a: Assumed) -> float:
    """AdamW reads and writes 28 bytes per parameter, in float32 as in DeepSpeed's mixed precision: gradient, weights
    and two moments (arXiv 1910.02054, Section 3.1)."""
    return 28 * trained / (gpu.bandwidth * a.memory)


def update_bytes(sharding: str, weights: float, gradients: float, micro_batches: int, processes: int) -> float:
    """Bytes that a GPU sends for one update (arXiv 1910.02054, Section 7).

    Gradients are scattered and summed, after each micro-batch in ZeRO-2 and 3; then as many bytes are gathered. ZeRO-3
    and FSDP gather all weights twice in each micro-batch instead.
    """
    stage, ring = plan.ZERO_STAGE[sharding], (processes - 1) / processes
    if stage == 3:
        return ring * micro_batches * (2 * weights + gradients)
    return ring * ((micro_batches if stage == 2 else 1) * gradients + gradients)


# ---------------------------------------------------------------------------------------------------------------------
# A step


class Pass(NamedTuple):
    """A forward pass without gradients over a share of the rollouts, with more tokens of context."""

    name: str
    parameters: float
    shape: Shape
    share: float = 1.0
    context: float = 0.0
    gpus: int = 0  # GPUs of its server; 0: those that train


@dataclass(frozen=True)
class Job:
    """One generation batch and the updates on it; sizes in parameters, lengths in tokens."""

    parameters: float
    shape: Shape
    rollouts: int
    group: int
    prompt: float
    response: float
    limit: int
    micro_batches: int
    passes: tuple[Pass, ...] = ()
    trained: float | None = None  # parameters of adapters; None: all are trained
    updates: int = 1
    checkpointing: bool = True
    moved: float = 0  # bytes of an offloaded teacher


@dataclass(frozen=True)
class Place:
    """What a step runs on."""

    gpu: GPU
    gpus: int
    sharding: str
    engine: float = 0.9  # share of a GPU's memory
    server_gpus: int = 0  # of one vLLM server beside the `gpus`; 0: each of these has an engine
    packed: bool = False  # no padding; TRL pads to the longest rollout of a GPU's batch

    @property
    def link(self) -> float:
        return self.gpu.link if self.gpus + self.server_gpus <= NODE else self.gpu.network


def generation_seconds(job: Job, place: Place, a: Assumed, repeats: int = 1) -> dict[str, float]:
    """Seconds of the job's rollouts, or of `repeats` times as many if a question is answered several times."""
    gpus = place.server_gpus or place.gpus
    width = place.server_gpus or 1  # a server splits its model over all its GPUs
    gpu = place.gpu._replace(bandwidth=width * place.gpu.bandwidth, flops=width * place.gpu.flops)
    each = repeats * job.rollouts * width / gpus
    memory = place.engine * width * gpu.memory * GIB
    slots = cache_slots(job.parameters, job.shape, memory, job.prompt + job.response)
    prefill = forward_flops(job.parameters, job.shape, each / job.group * job.prompt, job.prompt)
    a = replace(a, longest=min(a.longest, job.limit / job.response))
    return {
        "generation: prefill": prefill / (gpu.flops * a.score),
        "generation: decode": decode_seconds(job.parameters, job.shape, each, job.prompt, job.response, slots, gpu, a),
    }


def step_seconds(job: Job, place: Place, a: Assumed) -> dict[str, float]:
    """Seconds by part of one generation batch and its updates. Nothing overlaps; rewards and data are left out."""
    gpu, each = place.gpu, job.rollouts / place.gpus
    length = job.response if place.packed else min(job.limit, job.response * a.longest)
    seconds = generation_seconds(job, place, a)
    frozen = 0.0
    for scored in job.passes:
        tokens = job.prompt + scored.context + length
        rollouts = scored.share * job.rollouts / (scored.gpus or place.gpus)
        flops = forward_flops(scored.parameters, scored.shape, rollouts * tokens, tokens)
        seconds[scored.name] = flops / (gpu.flops * a.score)
        frozen += 0 if scored.gpus else scored.parameters
    tokens = job.prompt + length
    forward = forward_flops(job.parameters, job.shape, each * tokens, tokens)
    trained = job.parameters if job.trained is None else job.trained
    work = train_flops(forward, job.checkpointing, job.trained is not None)
    seconds["student: forward and backward"] = work / (gpu.flops * a.train)
    pieces = plan.split(place.sharding, place.gpus)
    seconds["optimizer"] = job.updates * optimizer_seconds(trained / pieces.states, gpu, a)
    sent = job.updates * update_bytes(place.sharding, 2 * job.parameters, 2 * trained, job.micro_batches, place.gpus)
    if pieces.weights > 1:  # each forward pass gathers weights, one micro-batch at a time
        sent += 2 * frozen * job.micro_batches * job.updates
    seconds["communication"] = sent / (place.link * a.link)
    gathered = pieces.weights > 1 or place.server_gpus
    copied = 2 * 2 * job.parameters / (gpu.bandwidth * a.memory)
    seconds["weight sync"] = copied + (2 * job.parameters / (place.link * a.link) if gathered else 0)
    if job.moved:
        seconds["teacher: to the GPU"] = job.moved / (PCIE * a.link)
    return seconds
