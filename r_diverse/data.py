"""Rows of both phases in TRL's format, the stages that make the Solver's questions, and the embedded task: arithmetic.

    python -m r_diverse.data base FOLDER         # trains the model from which the `tiny` preset starts, once

The paper's method has no data: the Challenger writes the questions. Needs `common/`.
"""

from __future__ import annotations  # datasets is imported where it is used: `--help` does without

import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.answers import boxes_of, extract_answer, grade_many, own_words, same_answer
from common.evaluation import Decoding, Engine, Prompt, TransformersEngine, generate_samples
from common.once import read_counts
from common.runs import read_jsonl, write_jsonl
from common.verifiers import completion_text, math_reward

from . import analysis, objective
from .config import RDiverseConfig
from .memory import MemoryBank, save_array
from .questions import Challenge, challenger_prompt, last_box, read_challenge, solver_prompt
from .skills import ENGINE, SkillEncoder
from .votes import Vote, timed_vote

if TYPE_CHECKING:
    from datasets import Dataset

# Responses between two writes, each of which waits for all of them: servers on several GPUs answer many more at once
BATCH = {"transformers": 512, "vllm": 4096}
SAME_SECONDS = 1.0  # for one comparison of two answers of the Solver

# How often each kind of question is taught, relative to the others; in the test all are equally frequent
KINDS = {"a+b": 10, "a-b": 5, "a*b": 3, "a+b+c": 2, "a*b+c": 1, "a-b*c": 1}
LARGE, SMALL = 30, 10  # numbers are below LARGE in a+b and a-b, below SMALL in the other kinds
TEST_ROWS = 300
_EXPRESSION = re.compile(r"(\d{1,4})((?:[-+*]\d{1,4}){1,4})")


def challenger_rows(number: int, system: str, user: str) -> Dataset:
    """The Challenger's one prompt, `number` times: it gets no data."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": challenger_prompt(system, user)}] * number)


def solver_rows(questions: Sequence[dict[str, Any]], system: str) -> Dataset:
    """Rows with `prompt` and `answer` (the label) from records with `question` and `answer`."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": solver_prompt(row["question"], system), "answer": row["answer"]} for row in questions]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The Solver's questions: each function is a stage of `r_diverse.loop`, writes into its folder and returns counts


def answer_decoding(run: RDiverseConfig) -> Decoding:
    """How the Solver is sampled in rewards, labels and the gate."""
    return Decoding(run.answer_temperature, run.answer_top_p, run.answer_tokens, run.answer_top_k)


def answer_of(response: str, run: RDiverseConfig) -> str | None:
    """The Solver's answer. A response without a closed box has none, as in R-Zero, unless `boxed_only` is off."""
    if run.boxed_only and not boxes_of(own_words(response)):
        return None
    return extract_answer(response)


def label_reward(completions, answer=None, log_metric=None, **columns) -> list[float]:
    """The Solver's reward: 1 for a response that gives the label, else 0.

    As in the vote, two answers are equal in either direction: the label may be a form such as "a+b=42", whose part 42
    most of the majority gave. And where `math_reward` cannot read the gold answer it gives None, here 0: any other
    text than such a label is wrong, and None beside 1 would leave the group without a gradient.
    """
    forward = math_reward(completions, answer, log_metric, **columns)
    own = [extract_answer(completion_text(completion)) for completion in completions]
    back = math_reward([f"\\boxed{{{label}}}" for label in answer], own)
    return [float(1.0 in pair) for pair in zip(forward, back, strict=True)]


def boxed_reward(completions, answer=None, log_metric=None, **columns) -> list[float]:
    """The Solver's reward with `boxed_only`: `label_reward`, but 0 for a response without a closed box."""
    texts = map(completion_text, completions)
    boxed = [text if boxes_of(own_words(text)) else "" for text in texts]
    return label_reward(boxed, answer, log_metric, **columns)


_late: set[frozenset[str]] = set()  # pairs that took too long and would again, in either order
_LATE_SIZE = 20_000
_number = itertools.count(1)


def same(first: str, second: str) -> bool:
    """Whether two answers of the Solver mean the same; False if the comparison takes over `SAME_SECONDS`."""
    pair = frozenset((first, second))
    if pair in _late:
        return False
    started = time.monotonic()
    alike = same_answer(first, second, timeout=SAME_SECONDS)
    if not alike and time.monotonic() - started > 0.95 * SAME_SECONDS:
        if len(_late) >= _LATE_SIZE:
            _late.clear()
        _late.add(pair)
        ready_to_compare()  # the late process was killed: the next pairs must not wait in vain for its successor
    return alike


def ready_to_compare() -> None:
    """Waits until the process that compares formulas has started: a loaded machine would time out the first ones."""
    n = next(_number)  # a new formula each time: known ones are answered from memory, without a process
    grade_many([rf"\boxed{{{n}x}}"], [rf"\int_{{0}}^{{x}} {n} dt"])


def generate(folder: Path, engine: Engine, run: RDiverseConfig, key: str) -> dict[str, Any]:
    """Samples the frozen Challenger. `key` names iteration and round, so that no two draw the same random numbers."""
    decoding = Decoding(run.question_temperature, run.question_top_p, run.question_tokens)
    rows = [{"id": key, "prompt": challenger_prompt(run.challenger_system, run.challenger_user)}]
    path = folder / "samples.jsonl"
    generate_samples(engine, rows, path, run.candidates, decoding, run.seed, BATCH[run.engine])
    failures = Counter(read_challenge(record["response"]).failure or "valid" for record in read_jsonl(path))
    return {"outputs": run.candidates, **dict(sorted(failures.items()))}


def label(folder: Path, engine: Engine, run: RDiverseConfig, raw: Path) -> dict[str, Any]:
    """Labels the questions in `raw`: majority answer, self-consistency and, for those dropped, the reason."""
    challenges = [(record["sample"], read_challenge(record["response"])) for record in read_jsonl(raw)]
    rows = [
        {"id": str(sample), "prompt": solver_prompt(challenge.question, run.solver_system), "challenge": challenge}
        for sample, challenge in challenges
        if challenge.valid
    ]
    votes = _votes(folder, engine, run, rows, run.m_label, run.seed)
    labelled = [_labelled(row["id"], row["challenge"], vote, run) for row, vote in zip(rows, votes, strict=True)]
    write_jsonl(folder / "labelled.jsonl", labelled)
    dropped = Counter(row["drop"] or "usable" for row in labelled)
    shares = [row["consistency"] for row in labelled]
    histogram = np.histogram(shares, bins=np.arange(12) / 10 - 0.05)[0].tolist()  # s = 0, 0.1, ..., 1
    counts = {"questions": len(rows), **dict(sorted(dropped.items())), "consistency": histogram}
    return counts | _late_of(votes)


def gate(folder: Path, engine: Engine, run: RDiverseConfig, labelled: Path) -> dict[str, Any]:
    """Validity gate, not in the paper: drops usable questions whose label is not the base model's majority answer."""
    rows = [row for row in read_jsonl(labelled) if row["drop"] is None]
    asked = [{"id": row["id"], "prompt": solver_prompt(row["question"], run.solver_system)} for row in rows]
    votes = _votes(folder, engine, run, asked, run.gate_samples, run.seed + 1)
    for row, vote in zip(rows, votes, strict=True):
        row["gate_consistency"], own = vote.consistency, vote.majority
        agrees = own is not None and (same(own, row["answer"]) or same(row["answer"], own))
        row["drop"] = None if agrees else "gate"
    write_jsonl(folder / "labelled.jsonl", rows)
    return {"questions": len(rows), "usable": sum(row["drop"] is None for row in rows)} | _late_of(votes)


def _votes(
    folder: Path, engine: Engine, run: RDiverseConfig, rows: Sequence[dict[str, Any]], samples: int, seed: int
) -> list[Vote]:
    """The engine's vote on the `prompt` of each row, with its responses in samples.jsonl."""
    path, answers = folder / "samples.jsonl", {row["id"]: [] for row in rows}
    generate_samples(engine, rows, path, samples, answer_decoding(run), seed, BATCH[run.engine], keep_refused=True)
    ready_to_compare()
    for record in read_jsonl(path) if rows else ():
        answers[record["id"]].append(answer_of(record["response"], run))
    return [timed_vote(answers[row["id"]], same) for row in rows]


def _late_of(votes: Sequence[Vote]) -> dict[str, int]:
    """{"late": number of questions whose time ran out before all answers were compared}; empty without any."""
    late = sum(vote.late for vote in votes)
    return {"late": late} if late else {}


def _labelled(key: str, challenge: Challenge, vote: Vote, run: RDiverseConfig) -> dict[str, Any]:
    """The record of a question in labelled.jsonl."""
    drop = objective.drop_reason(
        challenge.question, vote.majority, vote.consistency, run.low, run.high, run.r_zero_words
    )
    return {
        "id": key,
        "question": challenge.question,
        "answer": vote.majority,
        "consistency": vote.consistency,
        "drop": drop,
        "answers": vote.answers,
        "own_answer": challenge.answer,
    }


def usable(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Questions of several rounds that were not dropped, in order."""
    return [row for file in files for row in read_jsonl(file) if row["drop"] is None]


def embed(folder: Path, skills: SkillEncoder, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes the skill vectors of the usable questions, (questions, D) with NaN for a question without one.

    Raises `ConnectionError` if requests for programs failed: later stages would drop those questions for good.
    """
    questions = [row["question"] for row in rows]
    programs = skills.programs(questions)
    if lost := sum(program.failure == ENGINE for program in programs):
        raise ConnectionError(
            f"{lost} of {len(programs)} questions have no program because requests to {skills.coder.name} failed; the "
            "same command goes on here with these"
        )
    embeddings, ok = skills.embed(programs)
    temporary = folder / ".embeddings.npy"
    save_array(temporary, embeddings)
    temporary.rename(folder / "embeddings.npy")
    records = [{"question": q, "code": p.code, "failure": p.failure} for q, p in zip(questions, programs, strict=True)]
    write_jsonl(folder / "programs.jsonl", records)
    failures = Counter(program.failure for program in programs if program.failure)
    cosines = analysis.batch_cosines(embeddings[ok]) if ok.sum() > 1 else np.zeros(0)
    median = float(np.median(cosines)) if len(cosines) else None
    return {"encoder": skills.name, "ok": int(ok.sum()), **dict(sorted(failures.items())), "median_cosine": median}


def select(
    folder: Path, run: RDiverseConfig, iteration: int, rows: Sequence[dict[str, Any]], embedded: Path, bank_path: Path
) -> dict[str, Any]:
    """Filter, memory update and replay: the Solver's questions, a share of them from the past with their labels."""
    embeddings = np.load(embedded / "embeddings.npy")
    ok = np.isfinite(embeddings).all(1)
    kept = [i for i in range(len(rows)) if ok[i] or not run.needs_skills]  # questions compared as text need no vector
    current = [{k: rows[i][k] for k in ("question", "answer")} for i in kept]
    replayed, remembered = [], 0
    if run.penalty == "r_diverse":  # the baselines have no memory
        bank = MemoryBank(bank_path, read_counts(embedded)["encoder"])
        vectors = embeddings[kept]
        vectors[~ok[kept]] = np.eye(1, vectors.shape[1])  # the bank needs some unit vector; nothing reads it
        bank.add([row["question"] for row in current], vectors, [row["answer"] for row in current], iteration)
        number = objective.replay_count(len(current), run.replay_fraction)
        replayed = bank.before(iteration).sample(number, seed=1000 * run.seed + iteration)
        remembered = len(bank.before(iteration + 1))
    mixed = [{**row, "iteration": iteration} for row in current]
    mixed += [{k: row[k] for k in ("question", "answer", "iteration")} for row in replayed]
    order = np.random.default_rng([run.seed, iteration]).permutation(len(mixed))
    write_jsonl(folder / "solver_data.jsonl", (mixed[i] for i in order))
    write_jsonl(folder / "audit.jsonl", _audit(rows, kept, [run.seed, iteration, 1]))
    sources = Counter(row["iteration"] for row in replayed)
    return {
        "current": len(current),
        "replayed": len(replayed),
        "replayed_from": {str(t): sources[t] for t in sorted(sources)},
        "bank": remembered,
        "label_accuracy": label_accuracy(current),
    }


def _audit(rows: Sequence[dict[str, Any]], kept: Sequence[int], seed: list[int], count: int = 50) -> list[dict]:
    """Up to `count` new questions of the Solver for a person to check: label, votes and, if known, the exact value."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(kept))[:count].tolist())
    names = ("question", "answer", "consistency", "own_answer", "answers")
    found = ({name: rows[kept[i]][name] for name in names} for i in chosen)
    return [{**row, "exact": exact_value(row["question"])} for row in found]


# ---------------------------------------------------------------------------------------------------------------------
# The embedded task


def exact_value(question: str) -> int | None:
    """Value of a sum of products of whole numbers such as "3*4+12"; None for any other text. Nothing is executed."""
    match = _EXPRESSION.fullmatch(question.replace(" ", ""))
    if match is None:
        return None
    terms = [int(match[1])]
    for sign, digits in re.findall(r"([-+*])(\d+)", match[2]):
        if sign == "*":
            terms[-1] *= int(digits)
        else:
            terms.append(int(sign + digits))
    return sum(terms)


def arithmetic_question(rng: random.Random, kind: str) -> str:
    """A question of a kind, with random numbers."""
    limit = LARGE if kind in ("a+b", "a-b") else SMALL
    names = iter(rng.randrange(limit) for _ in kind)
    return re.sub("[abc]", lambda _: str(next(names)), kind)


def test_questions() -> list[dict[str, str]]:
    """The same 300 questions for every run, each kind equally often: `id`, `question`, `answer`, `kind`."""
    rng, rows = random.Random(1), {}
    while len(rows) < TEST_ROWS:
        kind = list(KINDS)[len(rows) % len(KINDS)]
        question = arithmetic_question(rng, kind)
        rows.setdefault(question, {"question": question, "answer": str(exact_value(question)), "kind": kind})
    return [{"id": str(i), **row} for i, row in enumerate(rows.values())]


def label_accuracy(rows: Sequence[dict[str, str]]) -> float | None:
    """Share of right labels among the rows whose question is arithmetic; None if none is."""
    values = [(exact_value(row["question"]), row["answer"]) for row in rows]
    known = [str(value) == answer.strip() for value, answer in values if value is not None]
    return sum(known) / len(known) if known else None


def train_base(out: Path, until: float = 0.3, max_steps: int = 2000, seed: int = 0) -> dict[str, float]:
    """Teaches a tiny Qwen3 to write questions in the Challenger's form and to answer some; saves it in `out`.

    Teaching stops once a share `until` of half the test questions is right and 90 % of the outputs have the form: by a
    fixed number of steps so small a model knows anything from a tenth to nine tenths. Returns both shares. Raises
    `ValueError` if it never gets there.
    """
    from common.models import save_whole
    from common.tiny import answer_loss, tiny_qwen3

    model, tokenizer = tiny_qwen3(hidden=128, seed=seed)
    rng, held_out = random.Random(seed), [row for row in test_questions() if int(row["id"]) % 2]
    test = {row["question"] for row in test_questions()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    for step in range(1, max_steps + 1):
        questions = [arithmetic_question(rng, *rng.choices(list(KINDS), list(KINDS.values()))) for _ in range(96)]
        pairs = [(q, f"\\boxed{{{exact_value(q)}}}") for q in questions if q not in test]
        loss = answer_loss(model, tokenizer, [(solver_prompt(q, ""), box) for q, box in pairs])
        written = [(challenger_prompt("", "new"), f"<question>{q}</question>{box}") for q, box in pairs[:16]]
        loss = loss + 0.3 * answer_loss(model, tokenizer, written)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        if step % 50 == 0:
            shares = base_shares(model, tokenizer, held_out)
            print(f"{out}: step {step}, loss {loss.item():.2f}, {_shares(shares)}", flush=True)
            if shares["accuracy"] >= until and shares["form"] >= 0.9:
                break
    else:
        raise ValueError(f"the base reaches {shares} after {max_steps} steps; try another --seed")
    save_whole(out, model, tokenizer)
    return shares


def base_shares(model, tokenizer, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Greedy accuracy on the rows, and the share of 64 sampled outputs in the Challenger's form."""
    was_training = model.training
    engine = TransformersEngine(model.eval(), tokenizer, batch_size=len(rows))
    asked = [Prompt(solver_prompt(row["question"], "")) for row in rows]
    answers = engine.generate(asked, Decoding(max_new_tokens=12), [0] * len(rows))
    right = [last_box(answer.text) == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    written = engine.generate([Prompt(challenger_prompt("", "new"))] * 64, Decoding(1.0, 1.0, 48), range(64))
    model.train(was_training)
    form = [read_challenge(output.text).valid for output in written]
    return {"accuracy": sum(right) / len(right), "form": sum(form) / len(form)}


def _shares(shares: dict[str, float]) -> str:
    return f"greedy accuracy {shares['accuracy']:.2f}, questions in the right form {shares['form']:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Exit code of the command at the top of this file."""
    from common.cli import make_model_main

    return make_model_main("r_diverse.data", {"base": lambda out, seed: _shares(train_base(out, seed=seed))}, argv)


if __name__ == "__main__":
    sys.exit(main())
