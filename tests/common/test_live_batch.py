"""Generation in which rows leave and join: the tokens of one prompt at a time, in few forwards."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MiniMaxConfig,
    Phi3Config,
    RwkvConfig,
)

from common.evaluation import Decoding, Prompt, TransformersEngine
from common.evaluation.engines import never_sampled
from common.evaluation.live_batch import is_joinable
from common.evaluation.sampling import seeded_sampling
from common.tiny import char_tokenizer, tiny_qwen2_5_vl, tiny_qwen3, tiny_qwen3_vl

GREEDY = Decoding(max_new_tokens=100)
SAMPLED = Decoding(temperature=1.2, top_p=0.9, top_k=40, max_new_tokens=100)


def picture(i: int) -> Image.Image:
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 255, (32 + 16 * (i % 4), 48 + 32 * (i % 3), 3), dtype=np.uint8))


def questions(count: int, images: bool) -> list[Prompt]:
    """Of several lengths; with `images` none, one or two each."""
    rows = [[picture(i)] * (i % 3) if images else [] for i in range(count)]
    return [Prompt([{"role": "user", "content": "Why" + "?" * (7 * i % 17)}], row) for i, row in enumerate(rows)]


def engine(make, batch_size: int) -> TransformersEngine:
    """Over a random model of which one token in sixteen ends a response and few repeat, so that lengths differ."""
    model, processor = make()
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id = list(range(2, tokenizer.vocab_size, 16))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "visual" not in name:
            torch.nn.init.normal_(weight, std=0.6)
    return TransformersEngine(model, processor, batch_size)


MODELS = pytest.mark.parametrize(
    ("make", "images"),
    [(tiny_qwen3, False), (tiny_qwen3_vl, False), (tiny_qwen3_vl, True), (tiny_qwen2_5_vl, True)],
)


@MODELS
def test_greedy_responses_are_those_of_each_prompt_alone(make, images):
    ours, prompts = engine(make, 4), questions(13, images)
    together = ours.generate(prompts, GREEDY, [0] * 13)
    lengths = {completion.num_tokens for completion in together}
    assert len(lengths) > 5 and max(lengths) > ours.SEGMENT
    for prompt, completion in zip(prompts, together, strict=True):
        given = ours.processor(
            text=[ours._render(prompt)],
            return_tensors="pt",
            **({"images": [list(prompt.images)]} if prompt.images else {}),
        )
        banned = never_sampled(ours.processor, ours.model.config)
        ids = ours.model.generate(**given, max_new_tokens=100, do_sample=False, suppress_tokens=banned)
        alone = ids[0, given["input_ids"].size(1) :].tolist()
        assert completion == ours._completion(alone)


@MODELS
def test_a_sampled_response_depends_on_its_own_seed_alone(make, images):
    ours, prompts, seeds = engine(make, 5), questions(11, images), range(40, 51)
    together = ours.generate(prompts, SAMPLED, seeds)
    assert len({completion.num_tokens for completion in together}) > 5
    backwards = ours.generate(prompts[::-1], SAMPLED, seeds[::-1])[::-1]
    assert backwards == together
    ours.batch_size = 1
    assert ours.generate(prompts, SAMPLED, seeds) == together
    same = ours.generate([prompts[4]] * 2, SAMPLED, [44, 45])
    assert same[0] == together[4] != same[1]


def test_fixed_batches_give_the_same(monkeypatch):
    ours, prompts = engine(tiny_qwen3_vl, 4), questions(9, True)
    live = [ours.generate(prompts, decoding, range(9)) for decoding in (GREEDY, SAMPLED)]
    monkeypatch.setattr(TransformersEngine, "_live", None)
    monkeypatch.setattr(ours, "_rows_are_exchangeable", False)
    assert [ours.generate(prompts, decoding, range(9)) for decoding in (GREEDY, SAMPLED)] == live


SMALL = {"vocab_size": 103, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "bos_token_id": None}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
LONG |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
MINIMAX = {"head_dim": 16, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=LONG), "RoPE"),
        (LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=DYNAMIC), "RoPE"),
        (RwkvConfig(**SMALL, attention_hidden_size=64), "padding"),  # takes no mask
        (MiniMaxConfig(**SMALL, **MINIMAX), "padding"),  # reads it from the second token on
    ],
)
def test_rows_that_would_change_each_other_are_answered_alone(config, why, capsys):
    ours = engine(lambda: (AutoModelForCausalLM.from_config(config), char_tokenizer()), 4)
    prompts = questions(7, False)
    together = ours.generate(prompts, GREEDY, [0] * 7)
    assert why in (said := capsys.readouterr().err) and said.count("one at a time") == 1
    for prompt, completion in zip(prompts, together, strict=True):
        given = ours.processor(ours._render(prompt), return_tensors="pt")
        ids = ours.model.generate(**given, max_new_tokens=100, do_sample=False, pad_token_id=0)
        assert completion == ours._completion(ids[0, given["input_ids"].size(1) :].tolist())


def test_coarse_rounding_is_not_taken_for_padding_that_is_read():
    """As of many layers and experts in bfloat16, whose rounding depends on the shape of the batch."""
    ours = engine(tiny_qwen3, 4)
    noise = torch.Generator().manual_seed(0)

    def rounded(module, args, hidden):
        return hidden * (1 + 0.05 * torch.randn(hidden.shape, generator=noise))

    ours.model.model.norm.register_forward_hook(rounded)
    assert ours._shared_length == math.inf


def test_short_answers_by_longrope_share_a_batch(monkeypatch):
    """Phi-4-mini as published: the length of pretraining stands beside the factors."""
    factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    config = Phi3Config(**SMALL, original_max_position_embeddings=64, rope_scaling=factors)
    ours, sizes = engine(lambda: (AutoModelForCausalLM.from_config(config), char_tokenizer()), 4), []
    take = ours._tokens
    monkeypatch.setattr(
        ours, "_tokens", lambda given, rows, *rest: sizes.append(len(rows)) or take(given, rows, *rest)
    )
    for tokens in (8, 40):
        ours.generate(questions(7, False), Decoding(max_new_tokens=tokens), [0] * 7)
    assert sizes == [4, 3, *[1] * 7]


def test_the_vocabulary_is_read_once(monkeypatch):
    """A dict of 150,000 tokens takes as long as some steps of a GPU."""
    ours = engine(tiny_qwen3, 4)
    monkeypatch.setattr(type(ours.tokenizer), "get_vocab", None)
    assert len(ours.generate(questions(9, False), SAMPLED, range(9))) == 9


def test_the_longest_prompts_are_the_first():
    """What does not fit into memory fails in the first forward."""
    ours, prompts = engine(tiny_qwen3, 4), questions(9, False)
    assert ours._rows_are_exchangeable
    widths = []
    ours.model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].size(1)), with_kwargs=True
    )
    ours.generate(prompts, Decoding(max_new_tokens=1), [0] * 9)
    assert len(widths) == 3
    assert widths[0] > widths[1] > widths[2]


def test_a_model_in_training_generates_with_a_cache():
    model, processor = tiny_qwen3(hidden=32)
    model.config.use_cache = model.generation_config.use_cache = False  # as with gradient checkpointing
    assert TransformersEngine(model, processor)._rows_are_exchangeable


def test_images_are_in_the_first_turn_of_the_user():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    text = engine(tiny_qwen3_vl, 1)._render(Prompt(turns, [picture(0), picture(1)]))
    assert text.count("<|image_pad|>") == 2
    assert text.index("<|im_start|>user") < text.rindex("<|image_pad|>") < text.index("<|im_start|>assistant")


def test_no_prompts_give_no_completions():
    assert engine(tiny_qwen3, 4).generate([], GREEDY, []) == []


def test_only_plain_caches_are_joinable():
    assert is_joinable(engine(tiny_qwen3, 1).model(torch.ones(1, 3, dtype=torch.long)).past_key_values)
    sliding = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert not is_joinable(DynamicCache(config=sliding))
    assert not is_joinable(None)


# --- counted work ----------------------------------------------------------------


def test_row_forwards_follow_the_tokens_that_are_kept(monkeypatch):
    """A quarter of the responses run to the limit: fixed batches hold nearly every row until then."""
    ours, prompts, decoding = engine(tiny_qwen3, 4), questions(24, False), Decoding(max_new_tokens=200)
    assert ours._rows_are_exchangeable
    rows = []
    ours.model.register_forward_pre_hook(
        lambda module, args, given: rows.append(given["input_ids"].size(0)), with_kwargs=True
    )
    kept = sum(completion.num_tokens for completion in ours.generate(prompts, decoding, [0] * 24))
    live = sum(rows)
    assert kept <= live < kept + 24 * ours.SEGMENT
    assert len(rows) < live / 3  # nearly four rows in each forward
    rows.clear()
    monkeypatch.setattr(ours, "_rows_are_exchangeable", False)
    ours.generate(prompts, decoding, [0] * 24)
    assert sum(rows) > 1.5 * live


# --- sampling ----------------------------------------------------------------


def choose(scores, seeds, starts, decoding=(1.0, 1.0, 0), limit=50, width=7):
    ids = torch.zeros(len(scores), width, dtype=torch.long)
    return seeded_sampling(*decoding, seeds, torch.tensor(starts), limit)(ids, scores)


def test_frequencies_are_the_probabilities():
    """20,000 draws; chi-square of 5 cells below its 0.999 quantile for 4 degrees of freedom."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    count = 20_000
    chosen = choose(probabilities.log().repeat(count, 1), range(count), [7] * count, limit=1)
    assert torch.isfinite(chosen).sum(1).eq(1).all()
    observed = chosen.argmax(1).bincount(minlength=5)
    assert ((observed - count * probabilities) ** 2 / (count * probabilities)).sum() < 18.47


def test_temperature_top_k_and_top_p_are_those_of_transformers():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]]).repeat(3000, 1)
    for decoding, possible in (
        ((1.0, 1.0, 2), {0, 1}),
        ((1.0, 0.6, 0), {0}),
        ((1.0, 0.9, 0), {0, 1, 2}),
        ((50.0, 1.0, 0), {0, 1, 2, 3}),
        ((0.01, 1.0, 0), {0}),
    ):
        chosen = choose(scores, range(3000), [7] * 3000, decoding, limit=1)
        assert set(chosen.argmax(1).tolist()) == possible


def test_a_token_of_probability_zero_is_never_chosen():
    scores = torch.full((4000, 6), -torch.inf)
    scores[:, 3] = 0.0
    assert set(choose(scores, range(4000), [7] * 4000, limit=1).argmax(1).tolist()) == {3}


def test_the_least_number_chooses_a_token_that_is_possible():
    """A number may be 0, and the first tokens have no probability."""
    processors = seeded_sampling(1.0, 1.0, 0, [5], torch.tensor([7]), 1)
    processors[-1].numbers.zero_()
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, 0.0]])
    assert processors(torch.zeros(1, 7, dtype=torch.long), scores).argmax().item() == 2


def test_each_position_has_a_number_of_its_own():
    scores = torch.zeros(1, 1000)
    tokens = [choose(scores, [5], [start]).argmax().item() for start in (7, 6, 5)]
    assert len(set(tokens)) == 3
    wider = choose(scores.repeat(2, 1), [5, 5], [9, 8], width=9).argmax(1).tolist()
    assert wider == tokens[:2]  # padding on the left moves nothing
