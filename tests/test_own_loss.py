"""The READMEs' "Another loss": their trainers take the same step as ours, another divergence is trained on, and the
equations that they name are those of the training."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import srpo_trainers
import torch
import va_opd_trainers

from srpo import SRPOTrainer
from va_opd import VAOPDTrainer

ROOT = Path(__file__).parents[1]


def of_readme(method: str, folder: Path):
    """The class `MyTrainer` of a method's README."""
    text = (ROOT / method / "README.md").read_text().partition("## Another loss")[2]
    file = folder / f"my_{method}.py"
    file.write_text(re.search(r"```python\n(.*?)```", text, re.S).group(1))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.MyTrainer


def step_of(method: str, folder: Path, divergence=None):
    """Loss and gradients of a step of the method's tests, with another `divergence` or its own."""
    trainers = {"va_opd": va_opd_trainers, "srpo": srpo_trainers}[method]
    trainer = trainers.build(folder)
    if divergence is not None:
        trainer.divergence = divergence
    return trainers.step(trainer)[:2]


@pytest.mark.parametrize("method", ["va_opd", "srpo"])
def test_the_lines_of_the_readme_take_the_same_step(method, tmp_path, monkeypatch):
    {"va_opd": va_opd_trainers, "srpo": srpo_trainers}[method].fixed_rollouts(monkeypatch)
    mine = of_readme(method, tmp_path)
    assert mine.divergence is not {"va_opd": VAOPDTrainer, "srpo": SRPOTrainer}[method].divergence
    loss, gradients = step_of(method, tmp_path / "ours")
    own_loss, own_gradients = step_of(method, tmp_path / "mine", mine.divergence)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["va_opd", "srpo"])
def test_another_divergence_is_trained_on(method, tmp_path, monkeypatch):
    {"va_opd": va_opd_trainers, "srpo": srpo_trainers}[method].fixed_rollouts(monkeypatch)
    mine = of_readme(method, tmp_path)

    def with_bonus(student, student_hidden, *others, **options):
        value, entropy = mine.divergence(student, student_hidden, *others, **options)
        return value + student.whole_logits(student_hidden).log_softmax(-1).mean(-1), entropy

    _, gradients = step_of(method, tmp_path / "ours", mine.divergence)
    _, changed = step_of(method, tmp_path / "mine", with_bonus)
    assert not any(torch.allclose(changed[name], g) for name, g in gradients.items() if g.any())


@pytest.mark.parametrize("method", ["va_opd", "srpo"])
def test_training_calls_the_equations_that_the_readme_names(method, tmp_path, monkeypatch):
    """And none of those that it calls references."""
    text = (ROOT / method / "README.md").read_text().partition("## Another loss")[2]
    parts = re.search(r"Training calls (.*?) from there.*?training changes\.(.*?)What trains", text, re.S).groups()
    trained, references = (set(re.findall(r"`(\w+)`", part)) for part in parts)
    assert references
    objective, called = importlib.import_module(f"{method}.objective"), set()

    def noted(name, function, *args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    for name in trained | references:
        monkeypatch.setattr(objective, name, partial(noted, name, getattr(objective, name)))
    {"va_opd": va_opd_trainers, "srpo": srpo_trainers}[method].fixed_rollouts(monkeypatch)
    step_of(method, tmp_path)
    assert called == trained
