"""The Challenger's reward of a whole generation batch, on any number of processes.

Its penalties are shares of the batch, but TRL calls a reward function on each process with its own slice.
`ChallengerReward` therefore lets each process question the Solver about its slice, gathers everything, computes the
penalties once on the main process, and hands back to each its part.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from . import analysis, objective
from .config import RDiverseConfig
from .memory import MemoryBank
from .questions import FAILURES, Challenge, read_challenge
from .skills import ENGINE, Program, SkillEncoder
from .votes import timed_vote

# m extracted answers to each question (None: no answer); None in place of a list where the engine failed
Solver = Callable[[Sequence[str], int], Sequence[Sequence[str | None] | None]]


class Asked(NamedTuple):
    """An output's question, and what the Solver's answers to it say: self-consistency (NaN: none was measured), and
    whether the time ended before all of them were compared."""

    challenge: Challenge
    consistency: float = np.nan
    late: bool = False


class Penalties(NamedTuple):
    """P_rep and P_MAP, 0 for an invalid output; whether the coder's engine failed: (B,) each. What else is logged."""

    repetition: np.ndarray
    memory: np.ndarray
    lost: np.ndarray
    figures: dict[str, Any]


class ChallengerReward:
    """Reward of the Challenger's outputs (Eq. 11, or R-Zero's), a reward function for `GRPOTrainer`.

    Args:
        config: which reward.
        solver: the frozen Solver, called on each process with the valid questions of its slice and a seed. m is as
            many as it answers, whatever `config.m_reward` says.
        same: whether two answers mean the same. It must bound its own time; all comparisons of a question have
            `votes.QUESTION_SECONDS`, after which answers count as different.
        skills: SAM. Needed with `penalty="r_diverse"`, but not by the measure "question_text".
        bank: M_t; it is read and not written. Needed with `penalty="r_diverse"`, but not with `beta=0`.

    Raises `ValueError` for a reward that lacks `skills` or `bank`, and for a bank whose vectors another encoder made.

    After each call `last_batch` on the main process holds the parts of all rewards by name, each with B rows. A row
    gets None, no gradient, where an engine failed: the Solver's on its question, or the coder's on its program; the
    latter's on a question of the memory is a `ConnectionError`. What was not measured is NaN.
    """

    __name__ = "challenger_reward"

    def __init__(
        self,
        config: RDiverseConfig,
        solver: Solver,
        same: Callable[[str, str], bool],
        skills: SkillEncoder | None = None,
        bank: MemoryBank | None = None,
    ):
        if config.needs_skills and skills is None:
            raise ValueError(f"penalty='r_diverse' with measure={config.measure!r} needs skills, a SkillEncoder")
        if config.needs_bank and bank is None:
            raise ValueError(
                f"beta={config.beta} weighs similarity to a memory: pass bank, a MemoryBank, or set beta=0"
            )
        if config.needs_skills and (skills.coder is None) != (config.measure == "question"):
            raise ValueError(
                f"measure={config.measure!r} with skills {skills.name!r}: SkillEncoder(None, encoder) is the measure "
                "'question', all others need a coder"
            )
        vectors = config.needs_bank and config.measure in ("sam", "question")
        if vectors and bank.written_with not in (None, skills.name):
            raise ValueError(
                f"bank {bank.path} has encoder={bank.written_with!r}, skills has name={skills.name!r}: their vectors "
                "cannot be compared; pass the SkillEncoder that wrote the bank, or start a new bank"
            )
        self.config, self.solver, self.same, self.skills, self.bank = config, solver, same, skills, bank
        self.last_batch: dict[str, Any] = {}

    def __call__(self, completions, trainer_state=None, log_metric=None, **columns) -> list[float | None]:
        step = 0 if trainer_state is None else trainer_state.global_step
        own = _together(lambda: self._asked([_text(c) for c in completions], step))
        batch = gather_object(own)
        late = sum(row.late for row in batch)
        parts = _on_main(
            lambda: self.score([row.challenge for row in batch], [row.consistency for row in batch]) | {"late": late}
        )
        if PartialState().is_main_process:
            self.last_batch = parts
        if log_metric is not None:
            for name, value in batch_figures(parts).items():
                log_metric(name, value)
        start = len(own) * PartialState().process_index
        rewards = parts["reward"][start : start + len(own)].tolist()
        return [None if np.isnan(reward) else reward for reward in rewards]

    def _asked(self, outputs: list[str], step: int) -> list[Asked]:
        """Reads the outputs, and asks the Solver each different question once."""
        challenges = [read_challenge(output) for output in outputs]
        questions = sorted({challenge.question for challenge in challenges if challenge.valid})
        answers = self.solver(questions, step) if questions else []
        _check_answers(questions, answers)
        votes = {q: timed_vote(row, self.same) for q, row in zip(questions, answers, strict=True) if row is not None}
        found = {question: (vote.consistency, vote.late) for question, vote in votes.items()}
        return [Asked(c, *found.get(c.question, ())) if c.valid else Asked(c) for c in challenges]

    def score(self, challenges: Sequence[Challenge], consistency: Sequence[float]) -> dict[str, Any]:
        """Parts of the reward of a whole batch, without any process group: arrays (B,) and lists by name."""
        config = self.config
        valid = np.array([challenge.valid for challenge in challenges], bool)
        repetition, memory, lost, figures = self._penalties(challenges, valid)
        consistency = np.where(lost, np.nan, np.asarray(consistency, float))  # so that there is no reward
        weights = config.alpha, config.beta
        invalid = objective.reward_of_invalid(*weights, config.gamma, config.tau_max, config.tau_mean)
        reward = objective.challenger_reward(consistency, repetition, memory, valid, *weights, invalid)
        if config.penalty == "r_zero":  # which has a reward of its own for an invalid output
            reward[~valid] = objective.r_zero_invalid_reward(repetition[~valid], config.alpha)
        repetition[lost] = memory[lost] = np.nan
        return {
            "questions": [challenge.question for challenge in challenges],
            "failures": [challenge.failure for challenge in challenges],
            "valid": valid,
            "consistency": consistency,
            "repetition": repetition,
            "memory": memory,
            "reward": reward,
            **figures,
        }

    def _penalties(self, challenges: Sequence[Challenge], valid: np.ndarray) -> Penalties:
        if self.config.penalty == "r_diverse":
            return self._skill_penalties([c.question for c in challenges if c.valid], valid)
        repetition, figures = np.zeros(len(valid)), {}
        if self.config.penalty == "r_zero":  # an invalid output is the empty text, as in its release
            texts = [challenge.question if challenge.valid else "" for challenge in challenges]
            repetition = objective.bleu_repetition_penalty(texts, self.config.bleu_threshold)
            figures = {"clusters": objective.cluster_sizes(repetition[valid], len(valid))}
        return Penalties(repetition, np.zeros(len(valid)), np.zeros(len(valid), bool), figures)

    def _skill_penalties(self, questions: list[str], valid: np.ndarray) -> Penalties:
        """R-Diverse's, of the questions of the `valid` outputs.

        Nobody knows the skill of a lost question, so the others are compared as if it were not in the batch.
        """
        programs, by_text = self._programs(questions), self.config.measure in ("program_text", "question_text")
        repetition, memory, lost = np.zeros(len(valid)), np.zeros(len(valid)), np.zeros(len(valid), bool)
        lost[valid] = [program.failure == ENGINE for program in programs]
        if by_text:
            skills, ok = _codes(programs), np.array([program.ok for program in programs], bool)
        else:
            vectors, ok = self.skills.embed(programs)
            skills = vectors[ok]
        size = len(valid) - int(lost.sum())
        if by_text:
            shares = objective.bleu_repetition_penalty(skills, self.config.bleu_threshold, batch_size=size)
        else:
            shares = objective.repetition_penalty(skills, self.config.distance_threshold, batch_size=size)
        repetition[valid] = objective.scatter_penalty(shares, ok, 1.0)
        figures = {"encoded": int(ok.sum()), "clusters": objective.cluster_sizes(shares, size)}
        if not by_text and len(skills) > 1:
            figures["median_cosine"] = float(np.median(analysis.batch_cosines(skills)))
        if self.config.needs_bank:
            figures["bank"] = len(self.bank)
            if len(self.bank):
                p_max, p_mean = self._similarity(skills, by_text)
                limits = (self.config.gamma, self.config.tau_max, self.config.tau_mean)
                worst = objective.memory_penalty(1.0, 1.0, *limits)
                penalties = objective.memory_penalty(p_max, p_mean, *limits)
                memory[valid] = objective.scatter_penalty(penalties, ok, worst)
                figures |= {"p_max": p_max, "p_mean": p_mean}
        return Penalties(repetition, memory, lost, figures)

    def _programs(self, questions: list[str]) -> list[Program]:
        if self.config.measure == "question_text":
            return [Program(question) for question in questions]
        return self.skills.programs(questions)

    def _similarity(self, skills: np.ndarray | list[str], by_text: bool) -> tuple[np.ndarray, np.ndarray]:
        """P_max and P_mean of each skill, a vector (D,) or a text: highest and mean similarity to the memory."""
        if not len(skills):
            return np.zeros(0), np.zeros(0)
        if not by_text:
            return self.bank.similarity(skills)
        similarity = objective.bleu_similarity(skills, self._past())
        return similarity.max(1), similarity.mean(1)

    def _past(self) -> list[str]:
        """Texts that stand for the questions of the memory.

        Raises `ConnectionError` where the coder's engine failed on one, without which questions would seem newer than
        they are, and `ValueError` where none has a program.
        """
        programs = self._programs([record["question"] for record in self.bank.records(np.arange(len(self.bank)))])
        if lost := sum(program.failure == ENGINE for program in programs):
            raise ConnectionError(
                f"{lost} of {len(programs)} questions of the memory have no program because requests to "
                f"{self.skills.coder.name} failed: give SkillEncoder a cache, and start again"
            )
        if not (codes := _codes(programs)):
            raise ValueError(
                f"bank {self.bank.path} has {len(programs)} questions, and skills {self.skills.name!r} has a program "
                "for none of them: pass the coder that wrote their programs, or set beta=0"
            )
        return codes


def _codes(programs: Sequence[Program]) -> list[str]:
    return [program.code for program in programs if program.ok]


def batch_figures(parts: dict[str, Any]) -> dict[str, float]:
    """Means of a reward batch for the log; what no row has, or what was not measured, is left out."""
    valid, failures = parts["valid"], Counter(failure for failure in parts["failures"] if failure)
    consistency, size = parts["consistency"][valid], len(parts["valid"])
    figures = {"challenger/valid": valid.mean()}
    # Those that nothing has too: what is logged is the mean over the batches that have a figure
    figures |= {f"challenger/failure/{name}": failures[name] / size for name in FAILURES}
    if valid.any():
        figures["challenger/unanswered"] = np.isnan(consistency).mean()
        if (compared := valid & ~np.isnan(parts["repetition"])).any():
            figures |= {f"challenger/{name}": parts[name][compared].mean() for name in ("repetition", "memory")}
            if "encoded" in parts:
                figures["challenger/encoded"] = parts["encoded"] / compared.sum()
        if (measured := consistency[~np.isnan(consistency)]).size:
            figures["challenger/consistency"] = measured.mean()
            figures["challenger/uncertainty"] = objective.uncertainty(measured).mean()
        questions = [q for q, good in zip(parts["questions"], valid, strict=True) if good]
        figures["challenger/distinct"] = len(set(questions)) / len(questions)
        figures["challenger/late"] = parts.get("late", 0) / valid.sum()
    figures |= {f"challenger/{name}": parts[name] for name in ("bank", "median_cosine") if name in parts}
    return {name: float(value) for name, value in (figures | _spread(parts)).items()}


def _spread(parts: dict[str, Any]) -> dict[str, float]:
    """Clusters of a reward batch, and its similarity to the memory."""
    figures, sizes = {}, parts.get("clusters", ())
    if sum(sizes) > 1:  # of a single question there is nothing to say
        figures = {"challenger/clusters": len(sizes), "challenger/largest_cluster": sizes[0] / sum(sizes)}
    if len(p_max := parts.get("p_max", ())):
        figures |= {"challenger/p_max": p_max.mean(), "challenger/p_mean": parts["p_mean"].mean()}
        figures |= {f"challenger/p_max_p{q}": np.percentile(p_max, q) for q in (10, 50, 90)}
        figures |= {f"challenger/p_mean_p{q}": np.percentile(parts["p_mean"], q) for q in (10, 50, 90)}
    return figures


def _check_answers(questions: list[str], answers: Any) -> None:
    """Raises `ValueError` for what is not m answers to each question, or None in their place."""
    if not _is_list(answers):
        raise ValueError(f"the solver gave {answers!r}: a list is needed, with m answers to each question")
    if len(answers) != len(questions):
        raise ValueError(f"the solver gave {len(answers)} rows of answers to {len(questions)} questions: one to each")
    asked = [(question, row) for question, row in zip(questions, answers, strict=True) if row is not None]
    for question, row in asked:
        if not (_is_list(row) and len(row) and all(isinstance(answer, str | None) for answer in row)):
            raise ValueError(
                f"the solver's answers to {question!r} are {row!r}: a list of texts is needed, None for no answer"
            )
        if len(row) != len(asked[0][1]):
            raise ValueError(
                f"the solver gave {len(row)} answers to {question!r} and {len(asked[0][1])} to {asked[0][0]!r}: the "
                "same number is needed for each, None for no answer"
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _together(compute: Callable[[], list]) -> list:
    """The result of every process, or an error on all of them: one that fails alone would leave the others waiting."""
    result, error = None, None
    try:
        result = compute()
    except Exception as caught:  # whatever it is, it is raised again below
        error = caught
    errors = [text for text in gather_object([None if error is None else f"{type(error).__name__}: {error}"]) if text]
    if error is not None:
        raise error
    if errors:
        raise RuntimeError(f"the reward failed on another process: {errors[0]}")
    return result


def _on_main(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The main process's result on every process, or its error on all of them."""
    message = _together(lambda: [compute() if PartialState().is_main_process else None])
    if PartialState().num_processes > 1:
        broadcast_object_list(message)
    return message[0]
