"""`VAOPDTrainer` and TRL: the signatures it relies on, logit scales, the model card; learning, a golden trajectory."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DistillationTrainer
from trl.trainer import utils as trl_utils
from va_opd_trainers import fixed_rollouts, image_rows, models

from va_opd import VAOPDTrainer, _trl
from va_opd.lm_head import logit_scale

# --- the contact with TRL ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (DistillationTrainer._get_train_sampler, "self dataset"),
        (DistillationTrainer.get_batch_samples, "self epoch_iterator num_batches device"),
        (DistillationTrainer._prepare_inputs, "self generation_batch"),
        (DistillationTrainer._tokenize_prompts, "self prompts"),
        (DistillationTrainer._generate, "self prompts"),
        (DistillationTrainer._generate_single_turn, "self prompt_ids images multimodal_fields has_tool_images"),
        (DistillationTrainer._generate_and_score_completions, "self inputs"),
        (DistillationTrainer.compute_loss, "self model inputs return_outputs num_items_in_batch"),
        (DistillationTrainer._compute_loss, "self unwrapped_student inputs num_items_in_batch"),
        (
            DistillationTrainer._get_last_hidden_state,
            "self unwrapped_model input_ids attention_mask logits_to_keep " + " ".join(_trl.MULTIMODAL_KEYS),
        ),
        (_trl.chunked_divergence._compute_dtype, "hidden"),
        (_trl.chunked_divergence._project, "tile hidden_chunk weight bias start end dtype"),
        (_trl.chunked_divergence._addmm_fp32, "acc a b"),
        (_trl.chunked_divergence._use_triton, "device"),
        (
            getattr(_trl.chunked_divergence._stats_kernel, "fn", _trl.chunked_divergence._stats_kernel),
            "s_ptr s_stride t_ptr t_stride s_max_ptr s_sum_ptr s_x_sum_ptr t_max_ptr t_sum_ptr t_weighted_gap_ptr "
            "s_weighted_gap_ptr n_cols s_scale s_softcap t_scale t_softcap inv_t S_HAS_SOFTCAP T_HAS_SOFTCAP "
            "BLOCK_SIZE",
        ),
        (
            getattr(_trl.chunked_divergence._backward_kernel, "fn", _trl.chunked_divergence._backward_kernel),
            "s_ptr s_stride t_ptr t_stride s_log_z_ptr t_log_z_ptr aux_ptr grad_ptr n_cols beta s_scale s_softcap "
            "t_scale t_softcap inv_t MODE S_HAS_SOFTCAP T_HAS_SOFTCAP BLOCK_SIZE",
        ),
        (trl_utils.split_pixel_values_by_grid, "batch"),
        (trl_utils.unsplit_pixel_values_by_grid, "batch"),
        (trl_utils.maybe_gather_lm_head_ctx, "params"),
        (trl_utils.RepeatSampler.__init__, "self data_source mini_repeat_count batch_size repeat_count shuffle seed"),
    ],
)
def test_private_names_of_trl_have_the_signature_that_the_trainer_expects(function, parameters):
    assert list(inspect.signature(inspect.unwrap(function)).parameters) == parameters.split()


def test_every_override_has_trls_parameters():
    for name, function in vars(VAOPDTrainer).items():
        upstream = getattr(DistillationTrainer, name, None)
        if not inspect.isfunction(function) or upstream is None or name == "__init__":
            continue
        ours, theirs = (inspect.signature(inspect.unwrap(f)).parameters for f in (function, upstream))
        assert list(ours) == list(theirs), name


def test_multimodal_keys_are_those_of_trl():
    source = inspect.getsource(inspect.unwrap(DistillationTrainer._compute_loss))
    block = re.search(r"multimodal_keys = \((.*?)\)", source, re.S).group(1)
    assert tuple(re.findall(r'"(\w+)"', block)) == _trl.MULTIMODAL_KEYS


def test_trls_names_for_the_logit_scale_are_all_known():
    source = inspect.getsource(inspect.unwrap(DistillationTrainer._compute_loss))
    names = set(re.findall(r'getattr\(student_config, "(\w+)"', source))
    assert names == {
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
    }


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


def test_the_model_card_cites_the_paper(make, tmp_path):
    trainer = make()
    trainer.create_model_card(model_name="x")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "2605.21924" in card
    assert "va-opd" in card


# --- learning ----------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["va", "none"])
def test_the_student_learns_the_teacher(make, weighting):
    trainer = make(
        rows=image_rows(8),
        weighting=weighting,
        max_steps=30,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        per_device_train_batch_size=16,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


# (loss, grad_norm) with torch 2.13.0 on one CPU thread, transformers 5.17.0, trl 1.16.0, Python 3.11, x86-64 AVX-512
GOLDEN = [
    (0.8124734, 0.7006765),
    (0.7729051, 0.5705851),
    (0.8069836, 0.4388132),
    (0.6070980, 0.4145712),
    (0.5750840, 0.3290441),
]


def set_weights(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Fixed weights of every matrix, whatever the library's initialization draws."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.ndim > 1:
                values = np.random.default_rng([seed, i]).standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(scale * values))


def test_golden_trajectory(make, monkeypatch):
    """Five steps on fixed rollouts. A change here is a change of the method, of TRL or of the tiny model."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    set_weights(student, 1, 0.05)
    set_weights(teacher, 2, 0.15)
    trainer = make(
        rows=image_rows(8),
        parts=(student, teacher, processor),
        max_steps=5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    got = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    assert np.array(got) == pytest.approx(np.array(GOLDEN), rel=1e-3), got
