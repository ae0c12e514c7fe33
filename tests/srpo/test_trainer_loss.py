"""`SRPOTrainer`: loss and gradients against TRL's trainer and float64 references, bfloat16, invariances."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from srpo_trainers import ROUTED, always, assert_same_step, mixed_reward, policy, reference_loss, step
from torch.utils._pytree import tree_map
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HunYuanDenseV1Config,
    Mamba2Config,
    ModernBertDecoderConfig,
    PhiConfig,
    RwkvConfig,
)
from trl import GRPOConfig, GRPOTrainer

from srpo import SRPOTrainer, lm_head, objective
from srpo.batches import length_sorted, sequence_batches, trimmed

# --- against TRL's trainer ----------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_routing_grpo_is_trls_trainer(make, fixed, accumulation):
    batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    ours = step(make(routing="grpo", **batch))
    plain = {
        "loss_type": "dapo",
        "scale_rewards": "none",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 3.0,
        "beta": 0.0,
        "temperature": 1.0,
    }
    theirs = step(make(cls=GRPOTrainer, config=GRPOConfig, **plain, **batch))
    assert ours[0] != 0
    assert_same_step(ours, theirs)


def test_routing_grpo_leaves_out_a_rollout_without_reward_as_trl_does(make, fixed):
    def reward(completions, **columns):
        return [None if i == 5 else value for i, value in enumerate(mixed_reward(completions))]

    plain = {"loss_type": "dapo", "scale_rewards": "none", "epsilon_high": 0.28, "delta": 3.0, "temperature": 1.0}
    ours = step(make(routing="grpo", reward=reward))
    theirs = step(make(cls=GRPOTrainer, config=GRPOConfig, reward=reward, **plain))
    assert ours[0] != 0
    assert_same_step(ours, theirs)


def test_without_an_upper_clip_range_the_lower_one_is_taken(make, fixed):
    assert_same_step(step(make(epsilon_high=None)), step(make(epsilon_high=0.2)))


def test_without_a_routed_row_srpo_is_grpo(make, fixed):
    """Rewards below the threshold differ within groups, so that GRPO has a signal and nothing is routed."""

    def low(completions, **columns):
        return [0.4 * r for r in mixed_reward(completions)]

    ours, theirs = step(make(reward=low)), step(make(reward=low, routing="grpo"))
    assert ours[0] != 0
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("scale", [False, True])
def test_advantages_are_those_of_the_paper_before_routing(make, fixed, scale):
    trainer = make(advantage_scale=scale)
    step(trainer)
    rewards = trainer._rollouts["rewards"]
    expected = objective.group_advantages(rewards, 4, scale)
    got = trainer._buffered_inputs[0]["advantages"]
    if scale:  # TRL adds 1e-4 to the deviation, where the SDPO release adds 1e-6
        deviation = rewards.view(-1, 4).std(1, keepdim=True)
        expected = (expected.view(-1, 4) * (deviation + 1e-6) / (deviation + 1e-4)).flatten()
    torch.testing.assert_close(got.sort().values, expected.sort().values)  # the rows are in the order of their lengths


# --- against references ----------------------------------------------------------------


def move_teacher(trainer) -> None:
    """So that it differs from the student."""
    with torch.no_grad():
        for p in trainer.teacher.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def assert_step_is(trainer, expected, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradients[name], gradient.float(), rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.6)])
def test_loss_and_gradients_against_float64(make, fixed, routing, beta, temperature):
    """Both distributions, and the entropy of the weights, are those of the temperature of the rollouts."""
    settings = {"routing": routing, "entropy_beta": beta, "temperature": temperature}
    trainer = make(**settings, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    move_teacher(trainer)
    loss, gradients = step(trainer)
    assert_step_is(trainer, reference_loss(trainer, routing, beta, temperature), loss, gradients)


def of_family(config, tokenizer, **settings):
    """A tiny random policy of another family; of its settings those that the family has."""
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "n_layer": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{k: v for k, v in sizes.items() if hasattr(config(), k)}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(6.0)
    return model, tokenizer


UNEVEN = [{"prompt": [{"role": "user", "content": "Q" + "?" * (1 + 5 * i)}], "answer": i} for i in range(4)]
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (GPT2Config, {**NO_DROPOUT, "n_head": 4}),  # absolute positions
        (HunYuanDenseV1Config, {}),  # queries and keys are scaled after the rotation
        (Gemma2Config, {"final_logit_softcapping": 5.0, "sliding_window": 8}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (PhiConfig, {"partial_rotary_factor": 0.5, "head_dim": None}),  # a head with biases
        (Mamba2Config, {"state_size": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 8}),
    ],
)
def test_families_against_float64(make, fixed, config, settings):
    trainer = make(data=UNEVEN, model=of_family(config, policy()[1], **settings))
    move_teacher(trainer)
    loss, gradients = step(trainer)
    trainer.model.eval()
    reference = reference_loss(trainer, "srpo", beta=1.0)
    assert loss == pytest.approx(reference.item(), rel=1e-4)
    expected = torch.autograd.grad(reference, [*trainer.model.parameters()], allow_unused=True)
    for (name, _), gradient in zip(trainer.model.named_parameters(), expected, strict=True):
        if gradient is not None and gradient.norm() > 1e-6:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-5)


def test_a_head_that_is_more_than_its_weight_is_refused(make):
    ids = {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
    parts = of_family(ModernBertDecoderConfig, policy()[1], local_attention=8, **ids)
    for routing in ("srpo", "grpo"):
        with pytest.raises(ValueError, match="logits of ModernBertDecoderForCausalLM are not the product"):
            make(model=parts, routing=routing)


def test_rows_that_depend_on_their_padding_are_warned_of(make, warned):
    make(routing="grpo")
    assert not warned("depend on the padding")
    make(routing="grpo", model=of_family(RwkvConfig, policy()[1], attention_hidden_size=32))
    assert warned("RwkvForCausalLM depend on the padding") == 1


@pytest.mark.parametrize(
    ("routing", "others"),
    [*((routing, [1.0, 0.0] * 2) for routing in ROUTED), *itertools.product(("srpo", "mix"), ([0.0] * 4, [1.0] * 4))],
)
def test_what_has_no_signal_has_its_place_in_the_denominator(make, fixed, routing, others):
    """A lone success, which has no teacher, and a group of equal rewards. In SRPO and Advantage Mix, whose means are
    over all tokens; SDPO's and its variants' are over the distilled."""
    trainer = make(routing=routing, reward=lambda completions, **columns: [1.0, 0.0, 0.0, 0.0, *others])
    move_teacher(trainer)
    loss, gradients = step(trainer)
    assert not trainer.last_rollouts["distill"][0]
    assert_step_is(trainer, reference_loss(trainer, routing, trainer.args.entropy_beta), loss, gradients)


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation_topk": 3},
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl"},
        {"tail": False},
        {"routing": "mix", "mix_weight": 0.3},
    ],
)
def test_settings_of_the_distillation_reach_loss_and_gradients(make, fixed, fields):
    trainer = make(**{"routing": "srpo", "entropy_beta": 0.0, "distillation_topk": 7, **fields})
    move_teacher(trainer)
    loss, gradients = step(trainer)
    assert_step_is(trainer, reference_loss(trainer, trainer.args.routing, 0.0), loss, gradients)


def test_a_teacher_with_the_policys_weights_and_prompt_is_the_policy(make, fixed, monkeypatch):
    """An average of rate 1, step for step: both read the same token at the same place."""
    monkeypatch.setattr("srpo.trainer.teacher_prompt_ids", lambda prompts, texts, tokenize, *_: tokenize(prompts))
    trainer = make(teacher_update_rate=1.0, max_steps=3)
    trainer.train()
    lines = [log for log in trainer.state.log_history if "loss" in log]
    assert [line["loss/sdpo"] for line in lines] == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(line["route/sdpo"] > 0 and line["teacher/distance"] > 1e-3 for line in lines)  # and the policy moves


def environment_masks(monkeypatch) -> list[list[int]]:
    """Of each rollout of one step the second token is its environment's, of rollout 2 every token."""
    masks, whole = [], GRPOTrainer._generate

    def generate(self, prompts):
        prompt_ids, completion_ids, _, *rest = whole(self, prompts)
        masks[:] = [[int(i != 2 and t != 1) for t in range(len(ids))] for i, ids in enumerate(completion_ids)]
        return prompt_ids, completion_ids, [list(mask) for mask in masks], *rest

    monkeypatch.setattr(GRPOTrainer, "_generate", generate)
    return masks


@pytest.mark.parametrize("routing", ROUTED)
def test_tokens_of_tools_and_environments_have_no_loss_and_no_route(make, fixed, monkeypatch, routing):
    masks = environment_masks(monkeypatch)

    def reward(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "entropy_beta": 1.0}
    trainer = make(routing=routing, reward=reward, **settings)
    move_teacher(trainer)
    loss, gradients = step(trainer)
    assert_step_is(trainer, reference_loss(trainer, routing, 1.0, masks=masks), loss, gradients)
    assert not trainer.last_rollouts["distill"][2] and not trainer.last_rollouts["grpo"][2]
    assert trainer.last_rollouts["distill"][0] == (routing != "sdpo_correct")
    metrics = trainer._metrics["train"]
    assert metrics["teacher/scored_over_needed"] == [1.0]
    lengths = torch.tensor([sum(mask) for mask in masks]).float()
    assert metrics["length/wrong"] == [lengths[::2].mean().item()]
    assert metrics["length/correct"] == [lengths[1::2].mean().item()]


@pytest.mark.parametrize("routing", ["srpo", "mix"])
@pytest.mark.parametrize("per", ["token", "rollout"])
def test_corrections_of_the_rollout_engine_multiply_the_divergence(make, fixed, monkeypatch, routing, per):
    """Half of every importance ratio is half of the loss and of its gradients, of each token or of each rollout."""
    steps, logged, whole = [], [], SRPOTrainer._generate_and_score_completions
    for ratio in (1.0, 0.5):

        def corrected(self, inputs, ratio=ratio):
            batch = whole(self, inputs)
            mask = batch["completion_mask"]
            shape = mask.shape if per == "token" else (len(mask), 1)
            return {**batch, "importance_sampling_ratio": torch.full(shape, ratio)}

        monkeypatch.setattr(SRPOTrainer, "_generate_and_score_completions", corrected)
        trainer = make(routing=routing)
        steps.append(step(trainer))
        assert trainer.last_rollouts["distill"].any()
        logged.append(trainer._metrics["train"]["loss/sdpo"][-1])
    (loss, gradients), half = steps
    assert logged[0] == logged[1]  # the divergence is what it is
    assert_same_step((loss / 2, {name: gradient / 2 for name, gradient in gradients.items()}), half)


# --- precision ----------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_reaches_student_teacher_and_heads(make, fixed, monkeypatch, bf16):
    """The redirected forward passes by accelerate's autocast: without one of its own, the heads, whose hidden states
    leave a float32 model in float32, would multiply in float32, many times slower on a GPU."""
    seen, project, logps = set(), lm_head.project, lm_head.ChunkedLogProbFunction.apply

    def record(tile, hidden, weight, bias, start, end, dtype):
        seen.add(("divergence", dtype))
        project(tile, hidden, weight, bias, start, end, dtype)

    def autocast(hidden, *arguments):
        seen.add(("logps", lm_head.compute_dtype(hidden)))
        return logps(hidden, *arguments)

    monkeypatch.setattr(lm_head, "project", record)
    monkeypatch.setattr(lm_head.ChunkedLogProbFunction, "apply", autocast)
    trainer = make(bf16=bf16)
    seen.clear()  # of `check_logps`
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda m, a, out, name=name: seen.add((name, out.dtype)))
    step(trainer)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {(name, dtype) for name in ("student", "teacher", "divergence", "logps")}
    assert {states.dtype for states in trainer._teacher_hidden.values()} == {torch.float32}  # as `memory_parts` counts


def test_the_teacher_computes_in_bf16_where_accelerate_has_no_autocast(make, fixed, monkeypatch):
    """As under DeepSpeed, which casts the policy's weights; the average is float32."""
    seen, project = {"teacher": set(), "head": set()}, lm_head.project
    trainer = make(bf16=True)

    def record(tile, hidden, weight, bias, start, end, dtype):
        if weight is trainer._teacher_head.weight:
            seen["head"].add(dtype)
        project(tile, hidden, weight, bias, start, end, dtype)

    monkeypatch.setattr(lm_head, "project", record)
    monkeypatch.setattr(trainer.accelerator, "autocast", lambda *_: nullcontext())
    layer = trainer.teacher.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda m, a, out: seen["teacher"].add(out.dtype))
    step(trainer)
    assert seen == {"teacher": {torch.bfloat16}, "head": {torch.bfloat16}}


def as_fsdp(redirect):
    """FSDP2 with bfloat16: what goes into the forward of the whole model and comes out of it is rounded."""

    def rounded(tree):
        return tree_map(lambda x: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x, tree)

    return lambda model, unwrapped, method, *args: rounded(redirect(model, unwrapped, method, *rounded(args)))


def test_fsdps_rounding_passes_by_the_loss(make, fixed, monkeypatch, tmp_path):
    """With rounded weights the gradient of the divergence would be of other coefficients than the loss."""
    runs = []
    for rounds in (False, True):
        trainer = make(output_dir=tmp_path / f"{rounds}")
        plain = trainer._loss_inputs

        def with_ratio(mask, *arguments, plain=plain):  # as with rollouts of vLLM
            ratio = 0.5 + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
            return plain(mask, *arguments) | {"importance_sampling_ratio": ratio}

        monkeypatch.setattr(trainer, "_loss_inputs", with_ratio)
        if rounds:
            monkeypatch.setattr(trainer, "_forward_redirection", as_fsdp(trainer._forward_redirection))
        runs.append((*step(trainer), {name: trainer._metrics["train"][name] for name in ("entropy", "loss/sdpo")}))
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert_same_step(runs[0], runs[1])


# --- invariances ----------------------------------------------------------------


@pytest.mark.parametrize("routing", ["srpo", "sdpo", "mix"])
def test_micro_batches_do_not_matter(make, fixed, routing):
    steps = [
        step(make(routing=routing, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size))
        for size in (8, 2, 1)
    ]
    for other in steps[1:]:
        assert_same_step(other, steps[0])


def test_row_order_and_padding_do_not_matter(make, fixed):
    trainer = make()
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = step(trainer, inputs)
    assert_same_step(step(make(), inputs[4:] + inputs[:4]), expected)
    assert_same_step(step(make(pad_to_multiple_of=16), inputs), expected)


@pytest.mark.parametrize("multiple", [None, 4])
def test_a_micro_batch_is_as_wide_as_its_longest_row(make, fixed, multiple):
    """TRL pads prompts and responses to the longest of the generation batch."""
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, pad_to_multiple_of=multiple)
    policy, teacher, caches = [], [], []
    for model, seen in ((trainer.model, policy), (trainer.teacher.model, teacher)):
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: (
                seen.append(kwargs["attention_mask"]) or caches.append(kwargs["use_cache"])
            ),
            with_kwargs=True,
        )
    step(trainer)
    assert not any(caches)  # keys and values of all layers would stay in memory
    padded = sum(trainer._buffered_inputs[0][name].size(1) for name in ("prompt_ids", "completion_ids"))
    widths = [mask.size(1) for mask in policy]
    assert len(policy) == 4 and min(widths) < padded
    for masks, rounding in ((policy, multiple or 1), (teacher, 1)):
        longest = [int(mask.sum(1).max()) for mask in masks]
        assert longest == sorted(longest, reverse=True)
        assert [mask.size(1) for mask in masks] == [-(-length // rounding) * rounding for length in longest]


@pytest.mark.parametrize(("multiple", "width"), [(None, 4), (3, 6)])
def test_no_padding_is_left_between_prompt_and_response(multiple, width):
    """What belongs to a token stays with it; a ratio may be one of the whole rollout."""
    inputs = {
        "prompt_ids": torch.tensor([[0, 1, 2], [0, 0, 3]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[4, 9, 9, 9], [5, 6, 7, 9]]),
        "completion_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]),
        "entropy_weights": torch.tensor([[0.4, 0, 0, 0], [0.5, 0, 0.7, 0]]),
        "importance_sampling_ratio": torch.tensor([[2.0], [3.0]]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    found, mask = trimmed(inputs, multiple), torch.tensor([[0, 0, 1], [1, 1, 1]])
    tokens = torch.zeros(2, width).long()
    tokens[:, -4:] = torch.tensor([[0, 1, 2, 4], [3, 5, 6, 7]])
    assert (found["input_ids"] * found["attention_mask"]).equal(tokens)
    assert found["attention_mask"].equal((tokens > 0).long())
    assert found["completion_mask"].equal(mask)
    assert (found["completion_ids"] * mask).tolist() == [[0, 0, 4], [5, 6, 7]]
    assert (found["tool_mask"] * mask).tolist() == [[0, 0, 1], [1, 0, 1]]
    assert (found["entropy_weights"] * mask).equal(torch.tensor([[0, 0, 0.4], [0.5, 0, 0.7]]))
    assert found["importance_sampling_ratio"].tolist() == [[2.0] * 3, [3.0] * 3]
    assert found["advantages"] is inputs["advantages"]


def test_rows_without_a_counted_response_keep_a_column_to_predict_from():
    inputs = {"prompt_ids": torch.tensor([[7]]), "prompt_mask": torch.ones(1, 1).long()}
    inputs |= {"completion_ids": torch.tensor([[8, 8]]), "completion_mask": torch.zeros(1, 2).long()}
    found = trimmed(inputs)
    assert found["completion_mask"].tolist() == [[0]] and found["attention_mask"].tolist() == [[0, 1]]


def test_sequences_of_like_length_pass_the_teacher_together():
    sequences = {row: torch.ones(length) for row, length in enumerate([5, 1, 4, 2, 3])}
    assert [list(part) for part in sequence_batches(sequences, 2)] == [[0, 2], [4, 3], [1]]


def test_micro_batches_are_of_like_length():
    """Every row once, with all that belongs to it, the longest first and siblings of equal length in their order."""
    prompts, responses = torch.tensor([2, 2, 3, 3, 1, 1]), torch.tensor([4, 1, 4, 2, 5, 5])
    batch = {
        "prompt_mask": (torch.arange(3) >= 3 - prompts[:, None]).long(),
        "completion_mask": (torch.arange(5) < responses[:, None]).long(),
        "row": torch.arange(6),
        "num_items_in_batch": torch.tensor(21),
    }
    parts = length_sorted(batch, 3)
    assert [part["row"].tolist() for part in parts] == [[2, 0], [4, 5], [3, 1]]
    assert [part["num_items_in_batch"].item() for part in parts] == [21] * 3
    for part in parts:
        for name in ("prompt_mask", "completion_mask"):
            assert part[name].equal(batch[name][part["row"]])


@pytest.mark.parametrize("updates", [1, 4])
def test_plain_grpo_has_micro_batches_of_like_length_within_an_update(make, updates):
    """Of several updates that follow from a generation batch each has the random part that TRL gives it."""
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8 // updates, "steps_per_generation": 8}
    parts = {}
    for cls in (SRPOTrainer, GRPOTrainer):
        trainer = make(cls=cls, **({"routing": "grpo"} if cls is SRPOTrainer else {"config": GRPOConfig}), **batch)
        widths = []
        trainer.model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, widths=widths: widths.append(kwargs["input_ids"].size(1)), with_kwargs=True
        )
        torch.manual_seed(0)
        step(trainer)
        rows = [int(part["prompt_mask"].sum() + part["completion_mask"].sum()) for part in trainer._buffered_inputs]
        parts[cls] = torch.tensor(rows).view(updates, -1)
        padded = sum(trainer._buffered_inputs[0][name].size(1) for name in ("prompt_ids", "completion_ids"))
        now = 8 // updates
        assert widths[-now:] == (rows[:now] if cls is SRPOTrainer else [padded] * now)
    ours, theirs = parts[SRPOTrainer], parts[GRPOTrainer]
    assert ours.unique().numel() > 1 and ours.equal(theirs.sort(1, descending=True).values)


@pytest.mark.parametrize("routing", ROUTED)
def test_a_tokenizer_that_pads_with_the_end_of_sequence_has_the_same_loss(make, fixed, routing):
    """The end of a rollout is one of its tokens."""
    expected = step(make(routing=routing))
    model, tokenizer = policy()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make(model=(model, tokenizer), routing=routing)
    assert_same_step(step(trainer), expected)
    assert trainer._tokenizer.pad_token_id == trainer._tokenizer.eos_token_id


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_groups_of_equal_rewards_give_a_finite_attached_zero(make, fixed, routing, value):
    loss, gradients = step(make(routing=routing, reward=always(value)))
    assert math.isfinite(loss)
    if value == 0.0 or routing in ("srpo", "sdpo_incorrect"):
        assert loss == 0
        assert gradients
        assert all(not g.any() for g in gradients.values())
