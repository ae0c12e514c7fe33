"""Rows of both phases in TRL's format, and the embedded task: arithmetic that a tiny model writes and solves.

    python -m r_diverse.data base FOLDER         # trains the model from which the `tiny` preset starts, once

Needs `common/` for the tiny model. The paper's method has no data: the Challenger writes the questions.
"""

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .questions import challenger_prompt, solver_prompt

# How often a kind of question is taught; in the test all are equally frequent
KINDS = {"a+b": 10, "a-b": 5, "a*b": 3, "a+b+c": 2, "a*b+c": 1, "a-b*c": 1}
LARGE, SMALL = 30, 10  # numbers are below; small ones where there are three, or a product
TEST_ROWS = 300
_EXPRESSION = re.compile(r"(\d{1,4})((?:[-+*]\d{1,4}){1,4})")


def challenger_rows(number: int, system: str, user: str) -> Dataset:
    """The one prompt, `number` times: the Challenger gets no data."""
    return Dataset.from_list([{"prompt": challenger_prompt(system, user)}] * number)


def solver_rows(questions: Sequence[dict[str, Any]], system: str) -> Dataset:
    """Records with `question` and `answer` (the label) as prompts."""
    return Dataset.from_list(
        [{"prompt": solver_prompt(row["question"], system), "answer": row["answer"]} for row in questions]
    )


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
    """Teaches a tiny Qwen3 both roles, into `out`: to write questions in the Challenger's form and to answer some.

    Teaching stops once `until` of the test kinds' questions are right and 90 % of the outputs have the form: after a
    fixed number of steps so small a model knows anything between a tenth and nine tenths. Returns both shares. Raises
    `RuntimeError` if it never gets there.
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
            print(f"step {step}: loss {loss.item():.2f}, {shares}", flush=True)
            if shares["accuracy"] >= until and shares["form"] >= 0.9:
                break
    else:
        raise RuntimeError(f"the base reaches {shares} after {max_steps} steps; try another --seed")
    save_whole(out, model, tokenizer)
    return shares


def base_shares(model, tokenizer, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Greedy accuracy on the rows, and the share of 64 sampled outputs in the Challenger's form."""
    from common.evaluation import Decoding, Prompt, TransformersEngine

    from .questions import last_box, read_challenge

    was_training = model.training
    engine = TransformersEngine(model.eval(), tokenizer, batch_size=len(rows))
    asked = [Prompt(solver_prompt(row["question"], "")) for row in rows]
    answers = engine.generate(asked, Decoding(max_new_tokens=12), [0] * len(rows))
    right = [last_box(answer.text) == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    written = engine.generate([Prompt(challenger_prompt("", "new"))] * 64, Decoding(1.0, 1.0, 48), range(64))
    model.train(was_training)
    form = [read_challenge(output.text).valid for output in written]
    return {"accuracy": sum(right) / len(right), "form": sum(form) / len(form)}


def _base(out: Path, seed: int) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in train_base(out, seed=seed).items())


def main(argv: list[str] | None = None) -> int:
    """Exit code of the command at the top of this file."""
    from common.cli import make_model_main

    return make_model_main("r_diverse.data", {"base": _base}, argv)


if __name__ == "__main__":
    sys.exit(main())
