"""`VAOPDTrainer`: loss and gradients against independent references, in other precisions, and their invariances."""

import functools
import itertools
import math
import operator

import numpy as np
import peft
import pytest
import torch
from trl import DistillationTrainer
from va_opd_trainers import (
    FAMILIES,
    assert_same_step,
    build,
    fixed_rollouts,
    gradients_of,
    image,
    image_rows,
    mixed_rows,
    models,
    pixelated_pixels,
    prompt,
    reference_kl,
    response_logits,
    step,
    write_first_token,
)

from common.lora import lora_config
from va_opd import lm_head, objective, siblings
from va_opd.train import rollout_records

# --- against references ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weighting_none_is_standard_opd(make, monkeypatch, family):
    """Sequence mean, then mean over rollouts, of the exact reverse KL on the model's full logits."""
    fixed_rollouts(monkeypatch)
    trainer = make(family=family, weighting="none")
    got = step(trainer)
    (batch,) = got[2]
    kl = reference_kl(trainer.model, trainer.teacher_model, batch, trainer.vocab_size)
    lengths = batch["completion_mask"].sum(1)
    assert lengths.unique().numel() > 1
    expected = ((kl * batch["completion_mask"]).sum(1) / lengths).mean()
    assert_same_step(got, (expected.item(), gradients_of(expected, trainer.model), None), 1e-5, 2e-5)


@pytest.mark.parametrize("kind", [image_rows, mixed_rows])
def test_without_measuring_va_standard_opd_is_the_same_and_the_teacher_reads_one_view(make, monkeypatch, kind):
    fixed_rollouts(monkeypatch)
    found, images = {}, []
    for measure in (True, False):
        trainer = make(weighting="none", measure_va=measure, rows=kind(4), doctor_steps=0)
        images.clear()
        trainer.teacher_model.model.visual.register_forward_pre_hook(
            lambda module, args, kwargs: images.append(len(kwargs["grid_thw"])), with_kwargs=True
        )
        step(trainer)  # the first checks the sharing of prompts
        images.clear()
        if not measure:
            monkeypatch.setattr("va_opd.teacher.sampled_logps", lambda *given: pytest.fail("log-probabilities"))
        trainer._step = 0
        found[measure] = step(trainer)[:2], sum(images)
        logged = {name for name in trainer._metrics["train"] if name.startswith(("va/", "kl/"))}
        assert bool(logged - {"va/null"}) == measure and (trainer.last_rollouts["va"] is not None) == measure
        assert len(rollout_records(trainer.last_rollouts, trainer.processing_class.tokenizer, 2)) == 2
    (ours, seen), (both, seen_of_both) = found[False], found[True]
    assert ours[0] == both[0] != 0 and all(gradient.equal(both[1][name]) for name, gradient in ours[1].items())
    assert seen > 0 and seen_of_both == 2 * seen


def test_weighting_none_equals_trls_own_loss_when_all_rollouts_are_equally_long(make, monkeypatch):
    """TRL takes the mean over all tokens of the batch, at its one `temperature`; the same for equal lengths at 1."""
    fixed_rollouts(monkeypatch, length=4)
    trainer = make(weighting="none", temperature=1.0)
    got = step(trainer)
    (batch,) = got[2]
    tokens = batch["completion_mask"].sum()
    trl_loss, _, _ = DistillationTrainer._compute_loss(trainer, trainer.model, batch, tokens)
    assert_same_step(got, (trl_loss.item(), gradients_of(trl_loss, trainer.model), None))


SETTINGS = {"weight_temperature": 0.5, "va_eps": 0.01, "top_fraction": 0.4, "high_weight": 0.7, "kl_temperature": 2.0}


@pytest.mark.parametrize(
    ("family", "weighting", "settings"),
    [
        *itertools.product(["qwen3_vl", "qwen2_5_vl"], ["va", "rollout", "token"], [{}]),
        ("qwen3_vl", "va", SETTINGS),
    ],
)
def test_loss_and_gradient_against_an_independent_computation(make, monkeypatch, family, weighting, settings):
    """The whole method once more in float64, from full logits and images that the test pixelates itself."""
    fixed_rollouts(monkeypatch)
    k = 4
    trainer = make(rows=image_rows(4), family=family, weighting=weighting, num_generations=k, **settings)
    args = trainer.args
    monkeypatch.setattr(siblings, "length_sorted", lambda batch, parts: [batch])
    inputs = next(iter(trainer.get_train_dataloader()))
    got = step(trainer, inputs)
    (batch,) = got[2]
    student, teacher, mask = trainer.model, trainer.teacher_model, batch["completion_mask"].bool()

    degraded = pixelated_pixels(trainer.processing_class, batch, [row["image"] for row in inputs])
    with torch.no_grad():
        true, other = (
            response_logits(teacher, batch, **extra)
            .log_softmax(-1)
            .gather(-1, batch["completion_ids"][..., None])[..., 0]
            for extra in ({}, {"pixel_values": degraded})
        )
    va = ((true - other).clamp(min=0) * mask).numpy()
    np.testing.assert_allclose(trainer.last_rollouts["va"].numpy(), va, atol=2e-5)
    assert va.max() > 0.01

    expected = 0
    kl = reference_kl(student, teacher, batch, trainer.vocab_size, args.kl_temperature)
    for start in range(0, len(mask), k):
        means = np.array([va[r][mask[r]].mean() for r in range(start, start + k)])
        scores = np.exp((means - means.mean()) / (means.std() + args.va_eps) / args.weight_temperature)
        for r, weight in zip(range(start, start + k), scores / scores.sum(), strict=True):
            weight = weight if weighting != "token" else 1 / k
            valid = mask[r].nonzero()[:, 0].tolist()
            ranked = sorted(valid, key=lambda t, r=r: -va[r, t])
            high = ranked[: math.ceil(len(valid) * args.top_fraction - 1e-9)]
            low = [t for t in valid if t not in high]
            if weighting == "rollout" or not low:
                inner = kl[r, valid].mean()
            else:
                inner = args.high_weight * kl[r, high].mean() + (1 - args.high_weight) * kl[r, low].mean()
            expected = expected + weight * inner / (len(mask) // k)
    assert_same_step(got, (expected.item(), gradients_of(expected, student), None), 2e-5, 5e-5)


def test_padded_vocabulary_rows_do_not_change_the_loss(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    plain = step(make())
    student, teacher, processor = models()
    tokens = len(processor.tokenizer)
    for model, size in ((student, tokens + 9), (teacher, tokens + 25)):  # sizes of one family pad differently
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokens:] = 3.0
    trainer = make(parts=(student, teacher, processor))
    assert trainer.teacher_model.config.get_text_config().vocab_size == tokens + 9
    padded = step(trainer)
    name = "model.language_model.embed_tokens.weight"
    assert not padded[1][name][tokens:].any()
    padded[1][name] = padded[1][name][:tokens]
    assert_same_step(padded, plain, 1e-5, 1e-5)


# --- precision, adapters, memory ----------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_reaches_student_and_head_and_leaves_the_teacher(make, monkeypatch, bf16):
    """The redirected forward passes by accelerate's autocast: without one of its own, float32 weights would train in
    float32, many times slower on a GPU."""
    seen, project = set(), lm_head.project

    def record(tile, hidden, weight, bias, start, end, dtype):
        seen.add(("head", dtype))
        project(tile, hidden, weight, bias, start, end, dtype)

    fixed_rollouts(monkeypatch)
    monkeypatch.setattr(lm_head, "project", record)
    trainer = make(bf16=bf16)
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        layer = model.model.language_model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda m, a, out, name=name: seen.add((name, out.dtype)))
    step(trainer)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {("student", dtype), ("head", dtype), ("teacher", torch.float32)}


def test_fsdps_rounding_passes_by_the_coefficients_and_the_number_of_prompts(make, monkeypatch, tmp_path):
    """FSDP2 with bfloat16 rounds what goes into the forward of the whole model: of 16 prompts on 3 ranks 5.34 each.
    Two prompts on one are exact, so that another number stands for rounding here."""
    fixed_rollouts(monkeypatch)
    runs = []
    for rounds in (False, True):
        trainer = make(output_dir=tmp_path / f"{rounds}")
        redirect = trainer._forward_redirection

        def rounded(model, unwrapped, method, *args, redirect=redirect):
            if method.__name__ == "_compute_loss":  # the teacher's forward comes this way, too
                student, batch, num_prompts = args
                args = (student, {**batch, "coefficients": batch["coefficients"].bfloat16()}, 1.01 * num_prompts)
            return redirect(model, unwrapped, method, *args)

        if rounds:
            monkeypatch.setattr(trainer, "_forward_redirection", rounded)
        runs.append(step(trainer))
    assert runs[0][0] == runs[1][0]
    assert_same_step(*runs)


def test_bfloat16_step(make):
    trainer = make(bf16=True)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:2])
    va = trainer.last_rollouts["va"]
    assert va.dtype == torch.float32
    positive = va[va > 0]
    # bfloat16 log-probabilities near 4.6 are multiples of 2^-6 (their difference too): float32 ones are not
    assert (positive * 64 % 1 != 0).float().mean() > 0.9
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_bfloat16_teacher_of_a_float32_student(make):
    student, teacher, processor = models()
    trainer = make(parts=(student, teacher.to(torch.bfloat16), processor))
    loss, _, _ = step(trainer)
    assert math.isfinite(loss)
    assert trainer.last_rollouts["va"].dtype == torch.float32


def test_a_teacher_whose_eval_returns_nothing(make, monkeypatch):
    """As a DeepSpeed engine's does."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    teacher.eval = lambda: type(teacher).train(teacher, False) and None
    assert_same_step(step(make(parts=(student, teacher, processor))), step(make()))


def test_lora_student(make, monkeypatch):
    """Adapters only get a gradient; at the start they change nothing, so that the loss is the full model's."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make(parts=(peft.get_peft_model(student, lora), teacher, processor))
    loss, gradients, _ = step(trainer)
    assert loss == pytest.approx(step(make())[0], abs=1e-6)
    assert gradients
    assert all("lora_" in name for name in gradients)


def test_gradient_checkpointing(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(gradient_checkpointing=True)
    trainer.model.gradient_checkpointing_enable()  # as `train` does, which `step` is not
    assert trainer.model.is_gradient_checkpointing
    assert_same_step(step(trainer), step(make()))


def test_reentrant_checkpoints_train_the_adapters_of_the_vision_tower(make, monkeypatch):
    """TRL sets them for LoRA under ZeRO-3."""
    fixed_rollouts(monkeypatch)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make(peft_config=lora_config(4), max_steps=1, warmup_steps=0, **options)
    trainer.train()
    trained = {name: bool(w.any()) for name, w in trainer.model.named_parameters() if "lora_B" in name}
    assert any("visual.blocks" in name for name in trained)
    assert all(trained.values())


# --- text-only rows ----------------------------------------------------------------


@pytest.mark.parametrize(("column", "absent", "there"), [("image", None, image(3)), ("images", [], [image(3)])])
def test_a_step_without_an_image_is_standard_opd(make, monkeypatch, column, absent, there):
    """Data without any image at all are refused."""
    fixed_rollouts(monkeypatch)
    rows = [{"prompt": prompt(i), column: there if i == 3 else absent} for i in range(4)]
    va, none = (step(make(rows=rows, weighting=weighting, shuffle_dataset=False)) for weighting in ("va", "none"))
    assert_same_step(va, none)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_text_only_rows_of_a_mixed_batch_have_uniform_weights(make, monkeypatch, family, accumulation):
    """TRL itself cannot (its processor call refuses the missing image); micro-batches may hold no image at all."""
    fixed_rollouts(monkeypatch)
    trainer = make(
        rows=mixed_rows(4),
        family=family,
        shuffle_dataset=False,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    loss, gradients, batches = step(trainer)
    assert math.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    rollouts = trainer.last_rollouts
    assert not rollouts["va"][:4].any()
    assert rollouts["va"][4:].any()
    assert rollouts["weights"][:4].tolist() == [0.25] * 4
    seen = 0
    for batch in batches:
        for row, count in enumerate(batch["num_images"]):
            c, valid = batch["coefficients"][row], batch["completion_mask"][row].bool()
            if not count:
                seen += 1
                torch.testing.assert_close(c[valid], torch.full_like(c[valid], 0.25 / valid.sum().item()))
    assert seen == 4


def test_rounding_between_the_views_gives_a_row_without_an_image_no_va(make, monkeypatch):
    """On a GPU two passes over equal text may differ; softmax over siblings would make weights of any difference."""
    fixed_rollouts(monkeypatch)
    trainer = make(rows=mixed_rows(2), shuffle_dataset=False)
    views = trainer.teacher.views

    def noisy(*arguments):
        kept, (logps, degraded) = views(*arguments)
        return kept, (logps, degraded - 1e-3 * torch.arange(len(degraded)) / len(degraded))

    trainer.teacher.views = noisy
    step(trainer)
    assert not trainer.last_rollouts["va"][:4].any()
    assert trainer.last_rollouts["weights"][:4].tolist() == [0.25] * 4


def test_a_mixed_batch_is_the_mean_of_its_prompts(make, monkeypatch):
    """The loss of an image prompt and a text prompt together = the mean of their losses alone."""
    fixed_rollouts(monkeypatch)
    rows = mixed_rows(2)
    both = step(make(rows=rows, shuffle_dataset=False))
    kinds = ["va" if row["image"] else "none" for row in rows]
    alone = [
        step(make(rows=[row], per_device_train_batch_size=4, weighting=kind))
        for row, kind in zip(rows, kinds, strict=True)
    ]
    assert both[0] == pytest.approx(sum(a[0] for a in alone) / 2, abs=1e-6)


# --- invariances ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3"])
def test_a_processor_that_pads_on_the_right_trains_the_same(tmp_path, monkeypatch, family):
    """TRL pads prompts on the left, and would take which of their tokens are an image's from another padding."""
    fixed_rollouts(monkeypatch)
    runs = {}
    for side in ("left", "right"):
        parts = models(family)
        parts[2].tokenizer.padding_side = side
        rows = [{**row, "prompt": prompt(0 if i else 8)} for i, row in enumerate(image_rows(2))]
        rows[1]["prompt"][0]["content"] += "?" * 9
        loss, gradients, (batch,) = step(build(tmp_path / side, rows, parts=parts))
        runs[side] = loss, gradients
        assert batch["prompt_mask"].sum(1).unique().numel() == 2  # prompts of two lengths
        for name in {"mm_token_type_ids", "token_type_ids"} & batch.keys():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            assert torch.equal(batch[name] == 1, ids == parts[0].config.image_token_id)
    assert runs["left"][0] == runs["right"][0]
    assert_same_step(runs["left"], runs["right"])


def test_a_token_in_front_of_the_templates_own_moves_no_image(make, monkeypatch):
    """Gemma 3's template begins with `bos_token`, and its tokenizer adds one: TRL's token types of the loss, from the
    rendered prompts, stand one place behind the ids, which have no second one."""
    fixed_rollouts(monkeypatch)
    student, teacher, processor = models("gemma3")
    write_first_token(processor)
    trainer = make(parts=(student, teacher, processor), weighting="none")
    loss, _, (batch,) = step(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    assert (ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1] * 8
    batch["token_type_ids"] = (ids == student.config.image_token_id).long()
    kl = reference_kl(student, teacher, batch, len(processor.tokenizer))
    assert loss == pytest.approx(objective.mean_over_tokens(kl, batch["completion_mask"]).mean().item(), abs=1e-6)


def test_a_prompt_that_ends_with_an_answer_moves_no_image(make, monkeypatch):
    """Rollouts begin a turn behind it. TRL's token types of the loss are of a prompt in which it goes on."""
    fixed_rollouts(monkeypatch)
    rows = image_rows(2)
    rows[0]["prompt"] += [{"role": "assistant", "content": "A."}]
    rows[1]["prompt"][0]["content"] += "?" * 40
    student, teacher, processor = models()
    loss, _, (batch,) = step(make(rows=rows, parts=(student, teacher, processor), weighting="none"))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    batch["mm_token_type_ids"] = (ids == processor.image_token_id).long()
    kl = reference_kl(student, teacher, batch, len(processor.tokenizer))
    assert loss == pytest.approx(objective.mean_over_tokens(kl, batch["completion_mask"]).mean().item(), abs=1e-6)


@pytest.mark.parametrize("weighting", objective.WEIGHTINGS)
@pytest.mark.parametrize("batch", [2, 1])
def test_accumulation_does_not_change_the_step(make, monkeypatch, weighting, batch):
    """8 x 1 = 4 x 2 = 1 x 8: siblings in other micro-batches, padding as wide as the generation batch."""
    fixed_rollouts(monkeypatch)
    whole = step(make(weighting=weighting))
    split = step(make(weighting=weighting, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch))
    assert_same_step(split, whole)


def test_order_of_the_prompts_does_not_change_the_step(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(per_device_train_batch_size=16, rows=image_rows(4), shuffle_dataset=False)
    inputs = next(iter(trainer.get_train_dataloader()))
    first = step(trainer, inputs)
    trainer._step = 0
    groups = [inputs[i : i + 4] for i in range(0, 16, 4)]
    assert_same_step(step(trainer, functools.reduce(operator.iadd, (groups[i] for i in (2, 0, 3, 1)), [])), first)


@pytest.mark.parametrize("multiple", [16, 64])
def test_padding_does_not_change_the_step(make, monkeypatch, multiple):
    fixed_rollouts(monkeypatch)
    trainer, widths = make(pad_to_multiple_of=multiple), set()
    trainer.model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: widths.add(given["inputs_embeds"].size(1) % multiple), with_kwargs=True
    )
    assert_same_step(step(trainer), step(make()))
    assert widths == {0}


def soon_ending(trainer):
    """Drawn rollouts end early; the loss does not call the head."""
    head = trainer.model.get_output_embeddings()
    boost = torch.zeros(head.weight.size(0))
    boost[trainer.processing_class.tokenizer.eos_token_id] = 3.0
    head.register_forward_hook(lambda m, a, out: out + boost)
    return trainer


@pytest.mark.parametrize("drawn", [False, True])
def test_a_tokenizer_that_pads_with_its_end_of_sequence_gives_the_same_step(make, monkeypatch, drawn):
    """Only masks, never ids, tell padding from the end of a rollout."""
    if not drawn:
        fixed_rollouts(monkeypatch)
    steps = []
    for same in (False, True):
        student, teacher, processor = models()
        if same:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        trainer = soon_ending(make(parts=(student, teacher, processor)))
        assert (processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id) is same
        steps.append(step(trainer))
    masks = [micro[0]["completion_mask"] for *_, micro in steps]
    assert torch.equal(*masks) and len(set(masks[0].sum(1).tolist())) > 1
    assert_same_step(*steps)


def test_a_rollout_counts_to_its_first_end_of_sequence_and_a_truncated_one_whole(make):
    trainer = soon_ending(make())
    (batch,), end = step(trainer)[2], trainer.processing_class.tokenizer.eos_token_id
    masks = batch["completion_mask"].bool()
    rollouts = [ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], masks, strict=True)]
    assert {rollout[-1] == end for rollout in rollouts} == {True, False}
    for rollout, coefficients in zip(rollouts, batch["coefficients"], strict=True):
        assert rollout.count(end) == (rollout[-1] == end)
        assert rollout[-1] == end or len(rollout) == 6
        assert (coefficients > 0).tolist() == [True] * len(rollout) + [False] * (len(coefficients) - len(rollout))


# --- coefficients ----------------------------------------------------------------


def test_one_rollout_a_prompt_is_fine_without_rollout_weights(make):
    for weighting in ("token", "none"):
        loss, _, _ = step(make(rows=image_rows(8), num_generations=1, weighting=weighting))
        assert math.isfinite(loss)


def test_coefficients_follow_their_rows_through_sorting(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    _, _, batches = step(trainer)
    by_rollout = {}
    for batch in batches:
        for ids, mask, c in zip(batch["completion_ids"], batch["completion_mask"], batch["coefficients"], strict=True):
            by_rollout[tuple(ids[mask.bool()].tolist())] = c.sum().item()
    rollouts, order = trainer.last_rollouts, []
    for ids, mask, w in zip(rollouts["completion_ids"], rollouts["mask"], rollouts["weights"], strict=True):
        assert by_rollout[tuple(ids[mask.bool()].tolist())] == pytest.approx(w.item(), abs=1e-6)
        order.append(w.item())
    assert sum(order[:4]) == pytest.approx(1)
    assert sum(order[4:]) == pytest.approx(1)
    assert len(set(order)) > 4


def test_random_ties_are_reproducible_and_drawn_anew_in_each_step_and_run(make, monkeypatch):
    fixed_rollouts(monkeypatch, length=19)
    monkeypatch.setattr(objective, "visual_advantage", lambda logps, other, mask: torch.zeros_like(logps))
    runs = [(False, 42, 0), (True, 42, 0), (True, 42, 0), (True, 42, 1), (True, 7, 0)]
    drawn = []
    for random_ties, seed, at in runs:
        trainer = make(shuffle_dataset=False, random_ties=random_ties, seed=seed)
        trainer.state.global_step = at
        drawn.append(step(trainer)[2][0]["high_tokens"].flatten().tolist())
    assert [drawn.index(tokens) for tokens in drawn] == [0, 1, 1, 3, 4]


def test_rollouts_under_the_floor_have_uniform_tokens(make, monkeypatch):
    fixed_rollouts(monkeypatch)
    trainer = make(va_floor=1e9)
    (batch,) = step(trainer)[2]
    for c, mask in zip(batch["coefficients"], batch["completion_mask"], strict=True):
        assert c[mask.bool()].unique().numel() == 1
    logged = trainer._metrics["train"]
    assert not {"va/zero_in_high", "kl/high", "kl/low"} & logged.keys()  # there are no groups
    assert logged["va/mean"][0] > 0  # of which the floor takes nothing away


def test_the_floor_is_one_of_the_mean(make, monkeypatch):
    fixed_rollouts(monkeypatch, length=9)
    monkeypatch.setattr(siblings, "length_sorted", lambda batch, parts: [batch])
    trainer = make()
    step(trainer)
    means = objective.mean_over_tokens(trainer.last_rollouts["va"], trainer.last_rollouts["mask"])
    floor = means.sort().values[3:5].mean().item()
    (batch,) = step(make(va_floor=floor))[2]
    alike = [
        c[m.bool()].unique().numel() == 1 for c, m in zip(batch["coefficients"], batch["completion_mask"], strict=True)
    ]
    assert alike == (means < floor).tolist() and sum(alike) == 4
