"""Log-probabilities of sampled tokens, from hidden states, against float64."""

import numpy as np
import pytest
import torch

from va_opd import objective


def ref_logps(hidden, weight, tokens, bias=None, scale=1.0, softcap=None) -> np.ndarray:
    logits = hidden.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        logits = logits + bias.double().numpy()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits - logits.max(1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(tokens)), tokens.numpy()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"logit_scale": 0.25}, {"softcap": 3.0}, {"bias": True, "logit_scale": 2.0, "softcap": 5.0}],
)
def test_sampled_logps_against_float64(dtype, options):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24).to(dtype), torch.randn(53, 24).to(dtype)
    tokens = torch.randint(53, (37,))
    bias = torch.randn(53).to(dtype) if options.get("bias") else None
    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    got = objective.sampled_logps(hidden, weight, tokens, bias, scale, softcap)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    np.testing.assert_allclose(got.numpy(), ref_logps(hidden, weight, tokens, bias, scale, softcap), atol=5e-5)


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
def test_sampled_logps_do_not_depend_on_the_chunk(rows):
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(37, 24), torch.randn(53, 24), torch.randint(53, (37,))
    torch.testing.assert_close(
        objective.sampled_logps(hidden, weight, tokens, rows=rows),
        objective.sampled_logps(hidden, weight, tokens),
        rtol=0,
        atol=5e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_logps_of_nothing(dtype):
    hidden, weight = torch.zeros(0, 4, dtype=dtype), torch.zeros(7, 4, dtype=dtype)
    got = objective.sampled_logps(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,)
    assert got.dtype == torch.float32


def test_va_of_nearby_bfloat16_states_is_not_lost_to_rounding():
    """The teacher's two views differ in the last bits of its hidden states; log-probabilities in bfloat16 would make
    most differences exactly 0. Autocast must not undo this."""
    torch.manual_seed(0)
    hidden = torch.randn(400, 64).to(torch.bfloat16)
    nearby = (hidden.float() * (1 + 0.01 * torch.randn(400, 64))).to(torch.bfloat16)
    weight, tokens = (0.3 * torch.randn(300, 64)).to(torch.bfloat16), torch.randint(300, (400,))
    with torch.autocast("cpu", torch.bfloat16):
        true = objective.sampled_logps(hidden, weight, tokens)
        other = objective.sampled_logps(nearby, weight, tokens)
    got = objective.visual_advantage(true[None], other[None], torch.ones(1, 400))[0]
    expected = np.maximum(ref_logps(hidden, weight, tokens) - ref_logps(nearby, weight, tokens), 0)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    positive = (expected > 1e-3).mean()
    assert positive > 0.3
    assert (got > 1e-3).double().mean().item() == pytest.approx(positive, abs=0.01)
    in_bf16 = (hidden @ weight.T).log_softmax(-1) - (nearby @ weight.T).log_softmax(-1)
    rounded = in_bf16.gather(1, tokens[:, None])[:, 0].float().clamp(min=0)
    assert (rounded.numpy() - expected).std() > 50 * (got.numpy() - expected).std()  # what the float32 path avoids


def test_sampled_logps_carry_no_gradient():
    hidden = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(9, 6, requires_grad=True)
    logps = objective.sampled_logps(hidden, weight, torch.zeros(4, dtype=torch.long))
    assert not logps.requires_grad


def test_whole_logits_of_half_precision_are_multiplied_in_float32():
    """As of a teacher in bfloat16, in a loss of one's own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 24).bfloat16(), torch.randn(53, 24).bfloat16()
    logits = objective.head_logits(hidden, weight, None, 1.0, None)
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
