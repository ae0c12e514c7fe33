"""Micro-batches of like length, no wider than their longest row: the same update as TRL's with less work."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from common.tiny import tiny_qwen3
from r_diverse import PhaseTrainer, SolverConfig
from r_diverse.batches import joined, length_sorted, real_columns

LENGTHS = (40, 3, 5, 4, 9, 2, 6, 5, 31, 3, 4, 2, 7, 8, 2, 3)  # of one generation batch: 2 updates of 4 micro-batches
EIGHT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "steps_per_generation": 16}


@pytest.mark.parametrize(
    ("prompts", "lengths", "multiple", "columns", "kept"),
    [
        ([2, 3], [1, 2], None, slice(1, 6), 2),
        ([4, 1], [5, 0], None, slice(0, 9), 5),
        ([2, 2], [0, 0], None, slice(2, 5), 1),  # truncated rows that are masked
        ([1, 2], [3, 1], 2, slice(2, 8), 4),
        ([4, 3], [5, 5], 3, slice(0, 9), 5),  # never wider than what there is
    ],
)
def test_only_columns_with_a_token_are_left(prompts, lengths, multiple, columns, kept):
    mask = torch.tensor([[0] * (4 - p) + [1] * (p + t) + [0] * (5 - t) for p, t in zip(prompts, lengths, strict=True)])
    assert real_columns(mask, 5, multiple) == (columns, kept)


def test_rows_stay_whole_and_the_longest_come_first():
    lengths = torch.tensor([[3, 1], [5, 2], [4, 5]])
    batches = [
        {
            "prompt_mask": torch.ones(2, 1),
            "completion_mask": (torch.arange(5) < row[:, None]).long(),
            "row": row * 10,
            "nothing": None,
            "num_items_in_batch": torch.tensor(20),
        }
        for row in lengths
    ]
    found = length_sorted(joined(batches), 3)
    assert [batch["row"].tolist() for batch in found] == [[50, 50], [40, 30], [20, 10]]
    assert [batch["completion_mask"].sum(1).tolist() for batch in found] == [[5, 5], [4, 3], [2, 1]]
    assert all(batch["nothing"] is None and batch["num_items_in_batch"] == 20 for batch in found)


def area(shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


def note(seen, module, args, kwargs):
    seen.append(tuple(kwargs["input_ids"].shape))


def mixture(tokenizer) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        output_router_logits=True, router_aux_loss_coef=0.1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def some_reward(completions, **columns) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def trained(kind, folder, monkeypatch, experts=False, reward=some_reward, **options):
    """A trainer after one generation batch of `LENGTHS`, and the (rows, columns) of each forward of its policy and of
    the KL reference."""
    model, tokenizer = tiny_qwen3(hidden=32)
    model = mixture(tokenizer) if experts else model
    model.save_pretrained(folder / "base")  # from which TRL loads the KL reference
    tokenizer.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    ids = [[*torch.randint(10, 100, (n - 1,), generator=generator).tolist(), tokenizer.eos_token_id] for n in LENGTHS]

    def generate(self, *args, **kwargs):
        return [row[: self.max_completion_length] for row in ids], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    settings |= {"num_generations": 4, "max_steps": 2, "max_completion_length": 40, "learning_rate": 1e-3}
    settings |= {"beta": 0.1, "weight_decay": 0.0, "adam_epsilon": 1.0}  # a step is linear in the gradient, or nearly
    config = SolverConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, save_strategy="no",
        doctor_steps=0, logging_steps=1, **settings | options,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"{'1' * (7 * i)}+{i}="} for i in range(4)])
    trainer = kind(
        model,
        reward,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    shapes = {"policy": [], "reference": []}
    for seen, part in zip(shapes.values(), (trainer.model, trainer.ref_model), strict=True):
        if part is not None:
            part.model.register_forward_pre_hook(partial(note, seen), with_kwargs=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, shapes, {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_iterations": 2, "max_steps": 4, "save_steps": 4},
        {"loss_type": "dapo", "pad_to_multiple_of": 4},
        {"loss_type": "bnpo", "beta": 0.0},
        {"top_entropy_quantile": 0.5},
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"entropy_coef": 0.5},
        {"mask_truncated_completions": True, "max_completion_length": 31},
        {"experts": True},
    ],
    ids=str,
)
def test_the_update_is_trls(tmp_path, monkeypatch, options):
    ours, shapes, step = trained(PhaseTrainer, tmp_path, monkeypatch, **options)
    theirs, padded, expected = trained(GRPOTrainer, tmp_path, monkeypatch, **options)
    assert max(value.abs().max() for value in expected.values()) > 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(step[name], value, rtol=1e-3, atol=5e-9)  # rounding of the weights
    for ours_line, line in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in {"loss", "reward", "grad_norm"} & line.keys():
            assert ours_line[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6)
    for name, rows in padded.items():
        assert len(shapes[name]) == len(rows)  # as many forwards
        assert not rows or area(shapes[name]) < area(rows)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"importance_sampling_level": "sequence"},
        {"entropy_coef": 1e-9},  # with which micro-batches stay as they were drawn
    ],
    ids=str,
)
def test_what_is_logged_is_a_mean_over_the_tokens_of_the_update(tmp_path, monkeypatch, more):
    """Not over micro-batches, of which the first has most tokens; as TRL logs it of an update in one micro-batch."""
    options = {"num_iterations": 2, "max_steps": 4, "epsilon": 1e-6, **more}
    ours, _, _ = trained(PhaseTrainer, tmp_path, monkeypatch, **options)
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    theirs, _, _ = trained(GRPOTrainer, tmp_path, monkeypatch, **options, **whole)
    names = ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/region_mean")
    found, expected = ([[line[n] for n in names] for line in t.state.log_history[:4]] for t in (ours, theirs))
    assert np.array(expected)[-1].min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_an_update_with_fewer_tokens_than_micro_batches_logs_their_mean(tmp_path, monkeypatch):
    """All rollouts but those of two tokens are truncated and masked: six tokens in two updates of eight."""
    options = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 2}
    ours, _, _ = trained(PhaseTrainer, tmp_path, monkeypatch, **options, **EIGHT)
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    theirs, _, _ = trained(GRPOTrainer, tmp_path, monkeypatch, **options, **whole)
    found, expected = ([line["entropy"] for line in t.state.log_history[:2]] for t in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_reward_may_log_a_figure_under_a_name_of_trl(tmp_path, monkeypatch):
    """Which TRL itself does not log here, as without a KL there is no `kl`."""

    def reward(completions, log_metric, **columns):
        log_metric("kl", 0.7)
        return some_reward(completions)

    trainer, _, _ = trained(PhaseTrainer, tmp_path, monkeypatch, reward=reward, beta=0.0)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.7)


def test_rows_with_images_go_to_trl_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(
        GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, *given, **more: seen.append((given, more))
    )
    given = ("model", torch.ones(2, 9), torch.ones(2, 9), 5, 1)
    trainer, pixels = object.__new__(PhaseTrainer), torch.ones(3, 4)
    trainer._get_per_token_logps_and_entropies(*given, compute_entropy=True, pixel_values=pixels, num_images=[1, 2])
    compute = {"compute_entropy": True, "compute_aux_loss": False}
    assert seen == [(given, {**compute, "pixel_values": pixels, "num_images": [1, 2]})]


@pytest.mark.parametrize("images", [False, True])
def test_micro_batches_with_images_are_left_as_they_were_drawn(monkeypatch, images):
    """Their pixels have no row each."""
    masks = torch.arange(40) < torch.tensor(LENGTHS[:6])[:, None]
    rows = {"prompt_mask": torch.ones(6, 1), "completion_mask": masks}
    drawn = [{name: value[i : i + 2] for name, value in rows.items()} for i in (0, 2, 4)]
    drawn = [batch | {"pixel_values": torch.ones(9, 4)} if images else batch for batch in drawn]

    def prepared(self, generation_batch):
        self._buffered_inputs = drawn
        return drawn[0]

    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", prepared)
    trainer = object.__new__(PhaseTrainer)
    trainer.args = SimpleNamespace(steps_per_generation=3, gradient_accumulation_steps=3)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.loss_type, trainer.top_entropy_quantile, trainer._step, trainer._buffered_inputs = "grpo", 1.0, 0, None
    trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = False
    first = trainer._prepare_inputs([])
    assert (trainer._buffered_inputs is drawn and first is drawn[0]) == images
    assert images or first["completion_mask"].sum(1).tolist() == [40, 9]


def test_work_grows_with_the_tokens_and_not_with_the_longest_rollout(tmp_path, monkeypatch):
    _, shapes, _ = trained(PhaseTrainer, tmp_path, monkeypatch)
    _, padded, _ = trained(GRPOTrainer, tmp_path, monkeypatch)
    tokens = sum(LENGTHS) + 4 * sum(len(f"{'1' * (7 * i)}+{i}=") for i in range(4))
    policy, reference = (area(shapes[name]) for name in ("policy", "reference"))
    # The policy gives the log-probabilities of the old one too, of all rows
    assert area(padded["policy"]) == 2 * 16 * (40 + 24) and policy < 1.3 * 2 * tokens
    assert area(padded["reference"]) == 16 * (40 + 24) and reference < 1.2 * tokens


def test_rows_of_two_updates_are_never_mixed(tmp_path, monkeypatch):
    """Six micro-batches a generation batch and four an update: of the second update two are of the next batch."""
    seen = {}
    for kind in (GRPOTrainer, PhaseTrainer):
        trainer, _, _ = trained(kind, tmp_path, monkeypatch, max_steps=1, save_steps=1)
        trainer.args.steps_per_generation = 6
        trainer.args.gradient_accumulation_steps = 4
        rows = {"prompt_mask": torch.ones(12, 1), "completion_mask": torch.ones(12, 40), "row": torch.arange(12)}
        rows["completion_mask"] = (torch.arange(40) < torch.tensor(LENGTHS[:12])[:, None]).long()
        monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda inputs, rows=rows: rows)
        trainer.model.train()
        trainer._buffered_inputs, found = None, []
        torch.manual_seed(0)
        for trainer._step in range(6):
            found.append(trainer._prepare_inputs([])["row"].tolist())
        seen[kind] = [sorted(a + b) for a, b in zip(found[::2], found[1::2], strict=True)]
        trainer.model.eval()
        assert trainer._prepare_inputs([]) is rows  # as it comes
    assert seen[GRPOTrainer] == seen[PhaseTrainer]
