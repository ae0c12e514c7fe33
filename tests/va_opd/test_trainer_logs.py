"""`VAOPDTrainer`: the figures that it logs against their definitions, evaluation, and the doctor's words."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from va_opd_trainers import fixed_rollouts, image, image_rows, mixed_rows, prompt, reference_kl, response_logits, step

from va_opd import doctor, objective

# --- figures of a step ----------------------------------------------------------------


@pytest.mark.parametrize("random_ties", [False, True])
def test_logged_groups_are_those_of_the_loss(make, monkeypatch, random_ties):
    """`kl/high` must be the KL of the tokens that the loss weighs as high, also when ties are drawn."""
    fixed_rollouts(monkeypatch, length=19)
    trainer = make(random_ties=random_ties, rows=[{**row, "image": image(0)} for row in image_rows(4)])
    monkeypatch.setattr(objective, "visual_advantage", lambda logps, other, mask: torch.zeros_like(logps))
    (batch,) = step(trainer)[2]
    for c, high, mask in zip(batch["coefficients"], batch["high_tokens"], batch["completion_mask"], strict=True):
        valid = mask.bool()
        assert c[valid & high].min() > c[valid & ~high].max()


def test_rows_without_an_image_are_in_no_figure_of_va(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    rows = mixed_rows(2)
    trainer = make(rows=rows, shuffle_dataset=False)
    _, _, (batch,) = step(trainer)
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size).detach()
    alone = make(rows=rows[1:], per_device_train_batch_size=4)
    step(alone)
    logged, expected = ({k: v[-1] for k, v in t._metrics["train"].items()} for t in (trainer, alone))
    names = [name for name in expected if name.startswith("va/")] + ["kl/high", "kl/low"]
    assert {"va/mean", "va/positive_share", "va/top10_mass", "va/group_sigma", "va/zero_in_high"} <= set(names)
    for name in names:
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    images = torch.tensor(batch["num_images"]).bool()[:, None] & batch["completion_mask"].bool()
    assert torch.equal(batch["high_tokens"] | batch["low_tokens"], images)
    assert logged["kl/high"] == pytest.approx(kl[batch["high_tokens"]].mean().item(), rel=1e-4)


def test_nothing_is_said_of_va_where_no_row_of_a_step_has_an_image(make, capsys):
    rows = [{"prompt": prompt(i), "image": image(i) if i == 3 else None} for i in range(4)]
    trainer = make(rows=rows, doctor_steps=1, max_steps=1, shuffle_dataset=False)
    trainer.train()
    line = trainer.state.log_history[0]
    figures = {name for name in line if name.startswith(("va/", "kl/"))}
    assert "loss" in line and figures <= {"va/null"}
    out = capsys.readouterr().out
    assert "[doctor] step 1: entropy" in out and "VA is 0" not in out


def test_logged_kl_does_not_depend_on_micro_batches(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    logged = []
    for size in (8, 2, 1):
        trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        trainer.train()
        logged.append([(line["kl/high"], line["kl/low"]) for line in trainer.state.log_history if "kl/high" in line])
    assert len(logged[0]) == 2
    for other in logged[1:]:
        np.testing.assert_allclose(other, logged[0], rtol=1e-3)


def test_the_logged_kl_of_a_step_is_of_its_own_tokens(make, monkeypatch):
    """Also with steps before it: nothing of theirs is in a later mean."""
    fixed_rollouts(monkeypatch)

    def logged(rows: list[dict[str, Any]], steps: int) -> list[list[float]]:
        trainer = make(rows, max_steps=steps, learning_rate=0.0, shuffle_dataset=False)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "kl/high" in line]
        return [[line["kl/high"], line["kl/low"]] for line in lines]

    rows = image_rows(4)
    both, (first,), (second,) = logged(rows, 2), logged(rows[:2], 1), logged(rows[2:], 1)
    assert both == [pytest.approx(first, rel=1e-3), pytest.approx(second, rel=1e-3)]
    assert second != pytest.approx(first, rel=0.01)


def test_logged_kl_and_va_against_their_definitions(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make()
    _, _, (batch,) = step(trainer)
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size).detach()
    mask, high = batch["completion_mask"].bool(), batch["high_tokens"]
    metrics, rollouts = trainer._metrics["train"], trainer.last_rollouts
    assert metrics["kl/high"][-1] == pytest.approx(kl[mask & high].mean().item(), rel=1e-4)
    assert metrics["kl/low"][-1] == pytest.approx(kl[mask & ~high].mean().item(), rel=1e-4)
    va = rollouts["va"][rollouts["mask"].bool()]
    assert metrics["va/mean"][-1] == pytest.approx(va.mean().item())
    assert metrics["va/positive_share"][-1] == pytest.approx((va > 0).double().mean().item())
    top = va.sort(descending=True).values[: round(0.1 * len(va))].sum() / va.sum()
    assert metrics["va/top10_mass"][-1] == pytest.approx(top.item(), rel=1e-5)
    assert metrics["va/weight_max"][-1] == pytest.approx(rollouts["weights"].max().item())


def test_figures_of_va_by_hand():
    va, mask = torch.tensor([[4.0, 0.0, 9.0], [0.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    high, weights = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(), torch.tensor([0.9, 0.1])
    expected = {"va/mean": 0.8, "va/positive_share": 0.2, "va/top10_mass": 1.0, "va/group_sigma": 1.0}
    expected |= {"va/weight_min": 0.1, "va/weight_max": 0.9, "va/zero_in_high": 2 / 3}
    seen = torch.tensor([True, True])
    assert doctor.va_figures(va, mask, weights, high, seen, 2) == pytest.approx(expected)
    blind = doctor.va_figures(torch.zeros(2, 3), mask, weights, torch.zeros(2, 3).bool(), seen, 2)
    assert blind["va/top10_mass"] == 0 and "va/zero_in_high" not in blind
    half = doctor.va_figures(va, mask, weights, torch.zeros_like(high), torch.tensor([True, False]), 1)
    expected = {"va/mean": 2.0, "va/positive_share": 0.5, "va/top10_mass": 1.0, "va/group_sigma": 0.0}
    assert half == pytest.approx(expected | {"va/weight_min": 0.9, "va/weight_max": 0.9})


def test_the_logged_entropy_is_the_students(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(max_steps=1, learning_rate=0.0)
    trainer.train()
    (batch,) = trainer._buffered_inputs
    with torch.no_grad():
        probabilities = response_logits(trainer.model, batch)[..., : trainer.vocab_size].softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)[batch["completion_mask"].bool()].mean().item()
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(entropy, rel=1e-4)


# --- evaluation ----------------------------------------------------------------


def test_evaluation(make, monkeypatch):
    """K = 1, uniform weights, no update; an eval set that does not divide by its batch size, nor that by the parts."""
    fixed_rollouts(monkeypatch)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make(eval_rows=image_rows(5), per_device_eval_batch_size=3, **parts)
    before = copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["eval_loss"] > 0
    line = trainer.state.log_history[-1]
    assert {"eval_va/mean", "eval_kl/high", "eval_time/teacher"} <= line.keys()
    assert line["eval_teacher/shared_prompts"] == 0.0  # no siblings
    assert not any(trainer._metrics["train"].values()) and trainer._kl_sums is None  # nothing is left to a step
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != metrics["eval_loss"]


def test_evaluation_loss_against_the_reference(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(eval_rows=image_rows(3), per_device_eval_batch_size=3)
    seen = []
    score = trainer._generate_and_score_completions
    monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda rows: seen.append(score(rows)) or seen[-1])
    loss = trainer.evaluate()["eval_loss"]
    (batch,) = seen
    kl, mask = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size), batch["completion_mask"]
    assert loss == pytest.approx(((kl * mask).sum(1) / mask.sum(1)).mean().item(), rel=1e-4)


# --- the doctor ----------------------------------------------------------------


def test_an_evaluation_before_training_does_not_hide_the_null_check(make, capsys, monkeypatch):
    trainer = make(doctor_steps=1, max_steps=2, eval_on_start=True, eval_strategy="steps", eval_rows=image_rows(4))
    score = trainer.teacher.score

    def higher_in_the_second(*arguments):
        hidden, logps = score(*arguments)
        return hidden, [x + 0.01 * view for view, x in enumerate(logps)]

    monkeypatch.setattr(trainer.teacher, "score", higher_in_the_second)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "va/null" in line or "eval_va/null" in line]
    assert [line["step"] for line in lines] == [1] and lines[0]["va/null"] == pytest.approx(0.01, rel=0.01)
    assert "WARNING: the teacher's log-probabilities differ between two passes" in capsys.readouterr().out


def test_the_null_check_is_of_images(make, monkeypatch):
    """The first prompt has none, and of text both views are one whatever the vision tower does."""
    fixed_rollouts(monkeypatch)
    trainer = make(rows=mixed_rows(2), shuffle_dataset=False, doctor_steps=1)
    passes, score = [], trainer.teacher.score
    monkeypatch.setattr(trainer.teacher, "score", lambda *given: passes.append(given) or score(*given))
    step(trainer)
    (rows,) = passes[-1][1]
    assert list(rows) == [4, 5, 6, 7] and all(trainer.last_rollouts["images"][row] for row in rows)


def test_doctor_line_and_warnings(make, capsys):
    make(doctor_steps=1, degradation_ratio=1.0, max_steps=1).train()
    out = capsys.readouterr().out
    assert "[doctor] step 1: VA mean 0.0000" in out
    assert "WARNING: VA is 0 on every token" in out


@pytest.mark.parametrize(
    ("name", "bad", "good", "message"),
    [
        ("va/positive_share", 0.0, 0.01, "VA is 0 on every token"),
        ("va/zero_in_high", 0.51, 0.5, "high-VA group have VA 0"),
        ("completions/clipped_ratio", 0.51, 0.5, "truncated"),
        ("entropy", 0.009, 0.01, "entropy has collapsed"),
        ("va/null", 0.0011, 0.001, "two passes over equal images"),
        ("va/cells", 3.9, 4.0, "fewer than 4 cells"),
        ("sampling/logps_gap", 0.11, 0.1, "weight sync"),
    ],
)
def test_the_doctor_warns_in_words(name, bad, good, message):
    (warning,) = doctor.diagnose({name: bad})
    assert message in warning
    assert doctor.diagnose({name: good}) == doctor.diagnose({name: None}) == []
