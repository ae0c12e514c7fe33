"""Divergence and entropy from hidden states beside their definitions in float64; what they count and refuse."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PhiConfig

from srpo import divergence, lm_head, objective
from srpo.divergence import chunked_divergence, chunked_entropy
from srpo.lm_head import LMHead, logit_scale, sampled_logps

N, VOCAB, SCALE = 23, 40, 0.5


@pytest.fixture(params=[None, 1, 7], ids=["one tile", "tiles of one row", "tiles of seven rows"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(divergence, "tile_rows", lambda *arguments: request.param)
        monkeypatch.setattr(lm_head, "VOCABULARY_TILE", 16)  # real vocabularies are several pieces


def heads(seed: int = 0, dtype=torch.float32, vocab: int = VOCAB, bias: bool = True, softcap=None, widths=(6, 8)):
    """Student head, hidden states, teacher head of another width, hidden states; the student's want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    student, teacher = (LMHead(draw(vocab, width), draw(vocab) if bias else None, SCALE, softcap) for width in widths)
    for tensor in student[:2]:
        if tensor is not None:
            tensor.requires_grad_()
    return student, draw(N, widths[0]).requires_grad_(), teacher, draw(N, widths[1])


def naive_logits(head: LMHead, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """(N, V) float64 logits at once."""
    logits = hidden.double() @ head.weight.double().T
    logits = SCALE * (logits if head.bias is None else logits + head.bias.double())
    return (logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()) / temperature


def leaves(student: LMHead, hidden: torch.Tensor) -> list[torch.Tensor]:
    return [t for t in (hidden, student.weight, student.bias) if t is not None and t.requires_grad]


CASES = [
    ({}, {}),  # the whole vocabulary, of 40 tokens
    ({"top_k": 5}, {"bias": False}),
    ({"top_k": 1, "temperature": 2.0}, {}),
    ({"top_k": 5, "alpha": 1.0, "temperature": 0.7}, {"softcap": 3.0}),
    ({"top_k": 5, "alpha": 0.0}, {"softcap": 3.0}),
    ({"top_k": 5, "tail": False, "temperature": 0.5}, {}),
    ({"top_k": None, "alpha": 0.0, "temperature": 0.7}, {"softcap": 3.0}),
]


def divergences(*given, **settings) -> torch.Tensor:
    return chunked_divergence(*given, **settings)[0]


@pytest.mark.parametrize(("settings", "head"), CASES)
def test_divergence_and_gradient_against_float64(tiles, settings, head):
    given = heads(**head)
    student, hidden, teacher, teacher_hidden = given
    settings = {"temperature": 1.0, "top_k": 100, "alpha": 0.5, "tail": True, **settings}
    coefficients = torch.linspace(-1, 2, N)
    got, entropy = chunked_divergence(*given, coefficients, **settings)
    temperature = settings.pop("temperature")
    probabilities = naive_logits(student, hidden, temperature).softmax(-1)
    torch.testing.assert_close(entropy.double(), torch.special.entr(probabilities).sum(-1), rtol=1e-4, atol=1e-5)
    naive = objective.jsd_topk_tail(
        naive_logits(student, hidden, temperature), naive_logits(teacher, teacher_hidden, temperature), **settings
    )
    torch.testing.assert_close(got.double(), naive, rtol=1e-4, atol=1e-6)
    ours, expected = (
        torch.autograd.grad((value * coefficients).sum() / 5, leaves(student, hidden)) for value in (got, naive)
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("top_k", [4, None])
def test_a_student_that_is_all_but_certain(top_k):
    student, hidden, teacher, teacher_hidden = given = heads(3)
    with torch.no_grad():
        student.bias[7] += 150
        student.bias[9] = -math.inf  # ruled out
    value, entropy = chunked_divergence(*given, torch.ones(N), top_k=top_k)
    assert (entropy < 1e-20).all()  # and no nan of what is ruled out
    naive = objective.jsd_topk_tail(naive_logits(student, hidden, 1), naive_logits(teacher, teacher_hidden, 1), top_k)
    torch.testing.assert_close(value.double(), naive, rtol=1e-4, atol=1e-5)
    value.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(student, hidden))


@pytest.mark.parametrize("top_k", [20, None])
def test_logits_whose_exponential_overflows(top_k):
    student, hidden, teacher, teacher_hidden = heads()
    hidden, teacher_hidden = 100 * hidden.detach(), 100 * teacher_hidden
    value = divergences(student, hidden, teacher, teacher_hidden, torch.ones(N), top_k=top_k)
    naive = objective.jsd_topk_tail(naive_logits(student, hidden, 1), naive_logits(teacher, teacher_hidden, 1), top_k)
    torch.testing.assert_close(value.double(), naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [5, None])
def test_only_what_wants_a_gradient_gets_one(top_k):
    student, hidden, teacher, teacher_hidden = heads(1)
    for tensor in (teacher.weight, teacher.bias, teacher_hidden):
        tensor.requires_grad_()
    student = student._replace(weight=student.weight.detach())
    divergences(student, hidden, teacher, teacher_hidden, torch.ones(N), top_k=top_k).sum().backward()
    assert hidden.grad.any() and student.bias.grad.any()
    assert teacher.weight.grad is teacher.bias.grad is teacher_hidden.grad is None
    assert student.weight.grad is None  # a frozen head


def test_a_tied_head_gets_the_gradients_of_both_its_uses():
    student, _, teacher, teacher_hidden = heads(2)
    ids = torch.arange(N)
    got = divergences(student, student.weight[ids], teacher, teacher_hidden, torch.ones(N), top_k=5)
    naive = objective.jsd_topk_tail(
        naive_logits(student, student.weight[ids], 1), naive_logits(teacher, teacher_hidden, 1), 5
    )
    gradients = [torch.autograd.grad(value.sum(), student.weight)[0] for value in (got, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_half_precision_states_have_float32_logits():
    student, hidden, teacher, teacher_hidden = given = heads(2, torch.bfloat16)
    got = divergences(*given, torch.ones(N), top_k=10)
    naive = objective.jsd_topk_tail(naive_logits(student, hidden, 1), naive_logits(teacher, teacher_hidden, 1), 10)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), naive, rtol=1e-4, atol=1e-6)  # inputs are half precision, logits are not
    ours, expected = (torch.autograd.grad(value.sum(), leaves(student, hidden)) for value in (got, naive))
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("top_k", [5, None])
def test_no_token(top_k):
    student, hidden, teacher, teacher_hidden = heads(3)
    value = divergences(student, hidden[:0], teacher, teacher_hidden[:0], torch.ones(0), top_k=top_k)
    assert value.shape == (0,)
    value.sum().backward()
    assert not hidden.grad.any() and not student.weight.grad.any()


def test_the_loss_must_be_the_one_that_was_announced():
    student, hidden, *_ = given = heads()
    value = divergences(*given, torch.rand(N))
    with pytest.raises(RuntimeError, match="^the loss is not the sum of coefficients"):
        value.mean().backward()
    coefficients = torch.ones(N)
    with pytest.raises(RuntimeError, match="^the loss is not the sum of coefficients"):
        (divergences(*given, coefficients) * torch.linspace(1, 1.02, N)).sum().backward()
    value = divergences(*given, torch.zeros(N))
    (value * 0).sum().backward()
    assert not hidden.grad.any() and not student.weight.grad.any()
    value = divergences(*given, torch.zeros(N))
    with pytest.raises(RuntimeError, match="^the loss is not the sum of coefficients"):
        value.sum().backward()


def test_coefficients_of_both_signs():
    student, hidden, teacher, teacher_hidden = heads()
    coefficients, gradients = torch.tensor([1.0, -1.0] + [0.0] * (N - 2)), []  # whose sum is 0
    for part in (coefficients, coefficients.relu(), (-coefficients).relu()):
        leaf = hidden.detach().requires_grad_()
        (divergences(student, leaf, teacher, teacher_hidden, part, top_k=5) * part).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1] - gradients[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("top_k", "softcap", "expected"), [(5, None, 2), (5, 3.0, 3), (None, None, 14)])
def test_tiles_have_room_for_all_that_is_alive_at_once(monkeypatch, top_k, softcap, expected):
    asked = []
    monkeypatch.setattr(divergence, "tile_rows", lambda rows, size, buffers: asked.append(buffers) or rows)
    divergences(*heads(softcap=softcap), torch.ones(N), top_k=top_k)
    assert asked == [expected]


@pytest.mark.parametrize("size", [1e-17, 1e-28, 1e-42, 1e-44, 0.0])
def test_tiny_coefficients_are_no_error(size):
    """As entropy weights with a large beta are."""
    student, hidden, teacher, teacher_hidden = heads()
    coefficients = size * torch.rand(N)
    value = divergences(student, hidden, teacher, teacher_hidden, coefficients, top_k=5)
    (value * coefficients).sum().backward()
    assert hidden.grad.isfinite().all()
    if size > 1e-30:
        plain = divergences(
            student, again := hidden.detach().requires_grad_(), teacher, teacher_hidden, coefficients / size, top_k=5
        )
        (plain * coefficients / size).sum().backward()
        torch.testing.assert_close(hidden.grad / size, again.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("top_k", [5, None])
def test_logits_are_computed_once_and_only_for_what_is_needed(top_k):
    student, hidden, teacher, teacher_hidden = heads(bias=False)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    for trained in (True, False):
        student = student._replace(weight=student.weight.detach().requires_grad_(trained))
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            given = (student, hidden, teacher, teacher_hidden, torch.ones(N))
            divergences(*given, top_k=top_k).sum().backward()
        products = 6 + 8 + 6 * (2 if trained else 1)
        assert counter.get_total_flops() == 2 * N * VOCAB * products, trained


def test_heads_are_gathered_once(monkeypatch):
    """Under ZeRO-3 every gather is a collective; a rank without such a token takes part in as many."""
    entered = []
    gathered = LMHead.gathered
    monkeypatch.setattr(LMHead, "gathered", lambda head: entered.append(head) or gathered(head))
    student, hidden, teacher, teacher_hidden = heads()
    for count in (N, 0):
        entered.clear()
        given = (hidden[:count], teacher, teacher_hidden[:count], torch.ones(count))
        divergences(student, *given, top_k=5).sum().backward()
        assert len(entered) == 2


def test_weight_and_bias_of_a_head_are_gathered_where_it_is_read(monkeypatch):
    given = []
    monkeypatch.setattr(lm_head, "maybe_gather_lm_head_ctx", lambda *tensors: given.append(tensors) or nullcontext())
    student, hidden, *_ = heads()
    sampled_logps(student, hidden, torch.arange(N))
    chunked_entropy(student, hidden)
    assert [[id(tensor) for tensor in tensors] for tensors in given] == [[id(student.weight), id(student.bias)]] * 2


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sampled_logps_of_scaled_and_capped_logits(softcap):
    student, hidden, *_ = heads(6, softcap=softcap)
    tokens = torch.arange(N)
    naive = naive_logits(student, hidden, 0.7).log_softmax(-1)
    logps, entropy = sampled_logps(student, hidden, tokens, 0.7)
    expected = naive[tokens, tokens]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(naive.exp() * naive).sum(-1), rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value.sum(), leaves(student, hidden)) for value in (logps, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logit_scale": None, "output_multiplier": 3.0}, 3.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale(fields, expected):
    assert logit_scale(SimpleNamespace(**fields)) == expected


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES["num_attention_heads"] = 2


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1),
        PhiConfig(**SIZES),  # a head with a bias
        GraniteConfig(**SIZES, logits_scaling=8.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_from_hidden_states_are_the_models(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    input_ids, mask = torch.randint(1, 64, (2, 8)), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    with torch.no_grad():
        hidden = lm_head.last_hidden_states(model, input_ids, mask)
        logits = lm_head.lm_head(model).logits(hidden.flatten(0, 1), torch.empty(16, 64))
        whole = model(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(logits.view(2, 8, 64)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_whole_logits_are_float32_in_autocast_too(softcap):
    """Where a loss of one's own calls them."""
    head, hidden, *_ = heads(softcap=softcap)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.whole_logits(hidden, 0.7)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), naive_logits(head, hidden, 0.7), rtol=1e-5, atol=1e-5)


def test_entropy_is_exact(tiles):
    *_, teacher, hidden = heads(4)
    teacher.bias[3] = -math.inf  # ruled out: adds nothing
    expected = torch.special.entr(naive_logits(teacher, hidden, 0.7).softmax(-1)).sum(-1)
    torch.testing.assert_close(chunked_entropy(teacher, hidden, 0.7).double(), expected, rtol=1e-5, atol=1e-6)
    assert chunked_entropy(teacher, hidden[:0]).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "softcap"),
    [({"top_k": 20}, None), ({"top_k": 20, "tail": False}, None), ({"top_k": 20}, 3.0), ({"top_k": None}, 3.0)],
)
def test_on_a_gpu_as_on_the_cpu(tiles, dtype, settings, softcap):
    """More tokens than a slice of the vocabulary has, so that products are written into part of a tile."""
    made = heads(5, dtype, vocab=33_000, softcap=softcap, widths=(16, 32))
    coefficients = torch.rand(N, generator=torch.Generator().manual_seed(0))

    def run(device):
        student, teacher = (
            head._replace(weight=head.weight.detach().to(device), bias=head.bias.detach().to(device))
            for head in made[::2]
        )
        hidden, teacher_hidden, given = (tensor.detach().to(device) for tensor in (*made[1::2], coefficients))
        wanted = [tensor.requires_grad_() for tensor in (hidden, *student[:2])]
        value, own = chunked_divergence(student, hidden, teacher, teacher_hidden, given, 0.7, **settings)
        gradients = torch.autograd.grad((value * given).sum(), wanted)
        entropy = chunked_entropy(teacher, teacher_hidden, 0.7)
        return [tensor.detach().float().cpu() for tensor in (value, entropy, own, *gradients)]

    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def test_tiles_are_of_like_size_and_bounded():
    for count, vocab_size in ((0, 10), (1, 10), (4096, 151936), (5000, 151936), (700, 40000), (3, 10**9)):
        rows = divergence.tile_rows(count, vocab_size, 2)
        assert rows == 1 or 4 * 2 * rows * vocab_size <= divergence.TILE_BYTES
        assert -(-count // rows) * rows - count < rows
    assert divergence.tile_rows(8192, 151936, 2) == 631
