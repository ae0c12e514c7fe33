"""The definitions of SRPO, for the tests of its equations: plain Python loops in float64.

They share no code with `srpo.objective`.
"""

import math

import numpy as np
import torch

F64 = torch.float64
STUDENT, TEACHER = [2.0, 1.0, 0.0, -1.0], [0.5, 1.5, 0.0, -2.0]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_logits(seed: int, *shape: int, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(sharpness * torch.randn(*shape, generator=generator, dtype=F64) for _ in range(2))


def ref_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    scores = [math.exp(x - top) for x in logits]
    return [s / math.fsum(scores) for s in scores]


def ref_kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def ref_jsd(student: list[float], teacher: list[float], k: int | None, alpha: float, tail: bool) -> float:
    """SDPO, Section 3, for one token."""
    p, q = ref_softmax(student), ref_softmax(teacher)
    if k is not None and k < len(p):
        support = sorted(range(len(p)), key=lambda v: -student[v])[:k]
        rest = [v for v in range(len(p)) if v not in support]
        p, q = (
            [d[v] for v in support] + [math.fsum(d[v] for v in rest)]
            if tail
            else [d[v] / math.fsum(d[u] for u in support) for v in support]
            for d in (p, q)
        )
    if alpha in (0, 1):
        return ref_kl(p, q) if alpha else ref_kl(q, p)
    m = [(1 - alpha) * a + alpha * b for a, b in zip(p, q, strict=True)]
    return (1 - alpha) * ref_kl(p, m) + alpha * ref_kl(q, m)


def ref_entropy(logits: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in ref_softmax(logits) if p > 0)


def ref_route(rewards: list[float], group: int, threshold: float = 0.5) -> list[tuple[bool, bool, bool, int]]:
    """(c, m, z, donor) of each rollout (Section 3.1)."""
    rows = []
    for i, reward in enumerate(rewards):
        start = i // group * group
        donors = [j for j in range(start, start + group) if j != i and rewards[j] >= threshold]
        correct = reward >= threshold
        rows.append((correct, bool(donors), not correct and bool(donors), donors[0] if donors else -1))
    return rows


def ref_grpo(logp: float, old: float, advantage: float, low: float, high: float, delta: float | None) -> float:
    """Clipped surrogate as verl writes it, dual clip by a bound on the loss of negative advantages."""
    w = math.exp(logp - old)
    loss = max(-w * advantage, -min(max(w, 1 - low), 1 + high) * advantage)
    return min(loss, -delta * advantage) if delta is not None and advantage < 0 else loss


def ref_weights(entropy: np.ndarray, mask: np.ndarray, beta: float) -> np.ndarray:
    raw = {cell: math.exp(-beta * entropy[cell]) for cell in zip(*mask.nonzero(), strict=True)}
    mean = math.fsum(raw.values()) / max(len(raw), 1)
    weights = np.zeros_like(entropy)
    for cell, value in raw.items():
        weights[cell] = value / mean
    return weights


def ref_loss(routing, grpo, sdpo, weights, distill, mask, mix=0.9) -> float:
    """Section 3.3, and the baselines over the tokens that they train on."""
    terms, tokens = [], 0
    for i, t in np.ndindex(*mask.shape):
        routed = distill[i] and routing != "grpo"
        if not mask[i, t] or (routing.startswith("sdpo") and not routed):
            continue
        distillation = weights[i, t] * sdpo[i, t] if routed else 0.0
        tokens += 1
        if routing == "mix":
            terms.append(mix * grpo[i, t] + (1 - mix) * distillation)
        else:
            terms.append(distillation if routed else grpo[i, t])
    return math.fsum(terms) / max(tokens, 1)
