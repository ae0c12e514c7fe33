"""The collapse alarm of a self-play run: what has gone wrong with an iteration's questions, if anything has."""

from collections.abc import Sequence

import numpy as np

from . import analysis
from .config import RDiverseConfig

REWARD_BATCH = 2048  # questions: as many as the paper's reward clusters


def check(
    run: RDiverseConfig,
    iteration: int,
    embeddings: Sequence[np.ndarray],
    candidates: int,
    labels: float | None = None,
    entropy: float | None = None,
) -> str | None:
    """What has collapsed in this iteration, if anything has.

    Args:
        embeddings: of the usable questions, by iteration.
        candidates: outputs of the Challenger in this iteration.
        labels: share of right labels, None if it cannot be known.
        entropy: of the Challenger's tokens at the end of its phase, in nats.
    """
    now = embeddings[-1]
    if len(now) < run.alarm_yield * candidates:
        return f"only {len(now)} of {candidates} candidates are usable"
    if labels is not None and labels < run.alarm_labels:
        return f"only {labels:.0%} of the labels of iteration {iteration} are right"
    if entropy is not None and entropy < run.alarm_entropy:
        return f"the Challenger's entropy has fallen to {entropy:.3f} nats a token in iteration {iteration}"
    inside = analysis.intra_repetition(now)
    past = np.concatenate(embeddings[:-1]) if len(embeddings) > 1 else now[:0]
    across = analysis.cross_repetition(now, past) if len(past) else 0.0
    for share, where in ((inside, "another one of this iteration"), (across, "one of an earlier iteration")):
        if share > run.alarm_duplicates:
            return f"{share:.0%} of the questions of iteration {iteration} repeat {where}"
    return _giant_cluster(run, now[:REWARD_BATCH], iteration)


def _giant_cluster(run: RDiverseConfig, embeddings: np.ndarray, iteration: int) -> str | None:
    if len(embeddings) < 2:
        return None
    largest = analysis.cluster_sizes(embeddings, run.distance_threshold)[0] / len(embeddings)
    median = np.median(analysis.batch_cosines(embeddings))
    where = f"of the questions of iteration {iteration} are one skill cluster, median cosine {median:.2f}"
    return f"{largest:.0%} {where}" if largest > run.alarm_cluster else None
