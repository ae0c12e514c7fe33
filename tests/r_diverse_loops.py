"""For the tests of `r_diverse.loop`: a model that is taught in seconds, and flags of runs with it."""

import random
from pathlib import Path

SMALL = {
    "experiment": "small", "iterations": 1, "m_reward": 3, "candidates": 24, "min_questions": 6, "max_rounds": 2,
    "m_label": 3, "low": 0, "high": 1, "question_tokens": 40, "answer_tokens": 11, "answer_top_k": 0, "coder": "rules",
    "encoder": "minilm", "engine_batch": 64, "benchmarks": "arithmetic", "eval_samples": 1, "eval_limit": 10,
    "challenger_system": "", "challenger_user": "new", "solver_system": "",
    "challenger.per_device_train_batch_size": 4, "challenger.max_steps": 8, "challenger.max_completion_length": 40,
    "solver.per_device_train_batch_size": 5, "solver.max_steps": 8, "solver.max_completion_length": 11,
}  # fmt: skip
QUIET = {"disable_tqdm": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "logging_steps": 4}


def small(model: Path, out: Path, **changes) -> list[str]:
    """Flags of a run of seconds."""
    fields = {"model": model, "out": out, **SMALL, **changes}
    fields |= {f"{phase}.{name}": value for phase in ("challenger", "solver") for name, value in QUIET.items()}
    return [f"--{name}={value}" for name, value in fields.items()]


def teach(out: Path) -> None:
    """A model that mostly has the Challenger's form and answers at random."""
    import torch

    from common.tiny import answer_loss, tiny_qwen3
    from r_diverse.questions import challenger_prompt, solver_prompt

    model, tokenizer = tiny_qwen3(hidden=64)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        pairs = [(f"{rng.randrange(10)}{rng.choice('+-*')}{rng.randrange(10)}", rng.randrange(3)) for _ in range(16)]
        rows = [(challenger_prompt("", "new"), f"<question>{q}</question>\\boxed{{{a}}}") for q, a in pairs]
        rows += [(solver_prompt(q, ""), f"\\boxed{{{a}}}") for q, a in pairs]
        answer_loss(model, tokenizer, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def empty_config(folder: Path) -> str:
    (folder / "empty.yaml").write_text("seed: 0\n")
    return str(folder / "empty.yaml")
