"""For the tests of the Challenger's reward: a coder and encoder by table, a Solver by share, the toy bank."""

import numpy as np

from r_diverse import ChallengerReward, MemoryBank, RDiverseConfig, SkillEncoder
from r_diverse.skills import Program

VECTORS = {"alike": (0.8, 0.6), "same": (0.8, 0.6), "far": (-1.0, 0.0)}


class Table:
    """Coder and encoder in one: a question is its own program, its vector is in the table."""

    name, dim = "table", 2

    def write(self, questions):
        failures = {"bad": "no_block", "lost": "engine"}
        return [Program(None, failures[q[:4].strip()]) if q[:4].strip() in failures else Program(q) for q in questions]

    def encode(self, texts):
        return np.array([VECTORS.get(text.split()[0], (0.0, 1.0)) for text in texts])


def skills() -> SkillEncoder:
    return SkillEncoder(Table(), Table())


def bank(path) -> MemoryBank:
    """The toy bank of the specification."""
    memory = MemoryBank(path, "table > table")
    memory.add(["a", "b", "c"], np.array([(1.0, 0.0), (0.6, 0.8), (0.0, 1.0)]), ["1", "2", "3"], iteration=1)
    return memory


def solver(share: float, m: int = 10):
    """Answers "1" in a share of m, else all different; counts its calls."""

    def answer(questions, seed):
        right = round(share * m)
        answer.calls.append((list(questions), seed))
        return [["1"] * right + [f"other {i}" for i in range(m - right)] for _ in questions]

    answer.calls = []
    return answer


def output(question: str) -> str:
    return f"<question>{question}</question>\\boxed{{1}}"


def reward_of(config: RDiverseConfig, outputs, share=0.6, memory=None, **options):
    reward = ChallengerReward(
        config, options.pop("solver", solver(share)), lambda a, b: False, options.pop("skills", skills()), memory
    )
    return reward(outputs, **options), reward
