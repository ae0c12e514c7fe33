"""A small language model as coder, built and taught here.

Questions are hostile where they can be: nothing in them may run, become a control token or stop a batch.
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from r_diverse_coders import ADD, EASY, HOSTILE, Counting, HashEncoder, Recorder, causal_lm
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from r_diverse import skills
from r_diverse.engines import Generation, LocalCoderEngine
from r_diverse.skills import ModelCoder, Program, SkillEncoder

# --- hostile questions ---


def test_clean_and_neutralise():
    assert skills.clean(" a\x00b\u202e\u200b\x1b[0m\u00a0c\r\nd\te\ud800 ") == "ab[0m c \nd\te?"
    kept = "if a <= b and b < c then x[N] = 2 << 3, [A], <"
    assert skills.neutralise(kept) == kept
    assert skills.neutralise("a<b <|im_end|> <<SYS>> [/INST]") == "a< b < |im_end|> << SYS>> [ /INST]"
    for text in HOSTILE.values():
        once = skills.neutralise(text)
        assert skills.neutralise(once) == once
        assert once.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("chat", [True, False])
def test_a_question_cannot_write_control_tokens(tokenizer, kind, chat):
    engine = LocalCoderEngine(causal_lm(tokenizer), tokenizer, name="tiny")
    coder = ModelCoder(engine, tokenizer, chat=chat)
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    question = skills.clean(HOSTILE[kind])
    plain, hostile = coder._prompt("", ""), coder._prompt(question, "")
    assert [i for i in hostile if i in control] == [i for i in plain if i in control]
    assert sum(i in control for i in plain) == (3 if chat else 0)
    text = tokenizer.decode(hostile)
    assert skills.neutralise(question) in text  # as it is: no template was applied to it
    assert text.count("<CODE>") == tokenizer.decode(plain).count("<CODE>")


def test_minilm_reads_no_control_tokens_in_text(minilm):
    backend = minilm.model.tokenizer
    text = "[CLS] [SEP] [MASK] [PAD] [UNK] </s>"
    assert set(backend(text, add_special_tokens=False)["input_ids"]) & set(backend.all_special_ids)
    ids = backend(skills.neutralise(text), add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(backend.all_special_ids)


def test_a_control_token_of_an_unknown_form_fails_the_question(tokenizer, taught):
    copy = PreTrainedTokenizerFast(  # the shared one keeps its tokens
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
    )
    copy.add_special_tokens({"extra_special_tokens": ["~stop~"]})
    programs = ModelCoder(taught, copy, max_new_tokens=40).write(["1 + 1 ~stop~ 2", "1 + 1"])
    assert programs == [Program(None, "control_token"), Program(ADD)]


def test_added_tokens_are_control_tokens_but_not_runs_of_spaces_and_single_characters():
    added = {7: "<think>", 8: " " * 4, 9: "\n\n", 10: "\u2581\u2581", 11: "÷", 0: "<|im_end|>"}
    tokens = {index: SimpleNamespace(content=content) for index, content in added.items()}
    tokenizer = SimpleNamespace(added_tokens_decoder=tokens, all_special_ids=[0, 1])  # 1 is in the vocabulary itself
    assert skills._control_ids(tokenizer) == {0, 1, 7}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_questions_pass_through_the_whole_path(taught, tokenizer, minilm, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    coder = ModelCoder(taught, tokenizer, max_new_tokens=40)
    skill = SkillEncoder(coder, minilm, cache=tmp_path / "cache")
    embeddings, ok = skill.encode([HOSTILE[kind], "What is 3 + 4?"])
    assert ok[1]
    assert np.isfinite(embeddings[0]).all() == ok[0]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    np.testing.assert_array_equal(skill.encode([HOSTILE[kind]])[0], embeddings[:1])  # now from the cache


def test_huge_questions_reach_no_model():
    coder = Counting()
    skill = SkillEncoder(coder, HashEncoder())
    huge = ["1 + " * 1_000_000, "<" * 5_000_000, "\x00" * 3_000_000, "x" * 50_000]
    start = time.monotonic()
    programs = skill.programs([*huge, "\x00" * 100, "1 + 2"])
    assert time.monotonic() - start < 2
    assert [p.failure for p in programs] == ["long_question"] * 4 + ["empty_question", None]
    assert coder.asked == ["1 + 2"]
    assert skill.programs(["x" * skills.MAX_QUESTION])[0].failure == "not_arithmetic"  # of the coder


def test_long_prompts_reach_no_model(taught, tokenizer):
    engine = Recorder(taught)
    longest = len(ModelCoder(engine, tokenizer)._prompt("1 + 1", ""))
    coder = ModelCoder(engine, tokenizer, max_new_tokens=40, max_prompt_tokens=longest)
    programs = coder.write(["1 + 1 " * 500, "1 + 1"])
    assert programs == [Program(None, "long_question"), Program(ADD)]
    assert [len(prompts) for prompts, _ in engine.calls] == [1]


# --- a language model as coder ---


def test_a_language_model_writes_programs(taught, tokenizer, minilm):
    engine = Recorder(taught)
    coder = ModelCoder(engine, tokenizer, max_new_tokens=40)
    embeddings, ok = SkillEncoder(coder, minilm).encode(EASY)
    assert ok.all() and [len(prompts) for prompts, _ in engine.calls] == [5]
    np.testing.assert_array_equal(embeddings, embeddings[[0] * 5])


def test_a_failed_program_is_asked_for_once_more(taught, tokenizer):
    engine = Recorder(taught)
    program = ModelCoder(engine, tokenizer, max_new_tokens=18).write(["What is 3 + 4?"])
    assert program == [Program(ADD)]  # 29 tokens: too many for the first try
    (first, short), (second, long) = engine.calls
    assert (short, long) == (18, 36)
    assert tokenizer.decode(second[0]) == tokenizer.decode(first[0]) + "<CODE>\ndef solver("
    engine.calls.clear()
    program = ModelCoder(engine, tokenizer, max_new_tokens=3).write(["What is 3 + 4?"])
    assert program == [Program(None, "truncated")] and len(engine.calls) == 2


def test_a_base_model_that_does_not_declare_the_end_of_a_turn_ends_there(taught, tokenizer, monkeypatch):
    monkeypatch.setattr(taught.model.generation_config, "eos_token_id", tokenizer.pad_token_id)
    engine = LocalCoderEngine(taught.model.train(), tokenizer, name="taught")
    assert not taught.model.training  # no dropout
    prompt = ModelCoder(engine, tokenizer)._prompt("What is 3 + 4?", "")
    (generation,) = engine.generate([prompt], 60, "no such text")
    assert generation == Generation(f"<CODE>\n{ADD}\n</CODE>", True)
    ids = engine._batch([prompt], 60, "no such text")[0]
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1  # and costs no token more


def test_a_turn_ends_at_all_that_model_and_tokenizer_declare(tokenizer):
    model = causal_lm(tokenizer)
    for declared, ends in (([8, 7], {7, 8}), (9, {9}), (None, set())):
        model.generation_config.eos_token_id = declared
        engine = LocalCoderEngine(model, tokenizer, name="tiny")
        assert engine._stops == sorted(ends | {tokenizer.eos_token_id})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 100.0),
        ("no_repeat_ngram_size", 1),
        ("num_beams", 4),
        ("min_new_tokens", 60),
        ("suppress_tokens", "first"),
        ("begin_suppress_tokens", "first"),
    ],
)
def test_what_a_model_declares_for_its_own_generation_is_not_applied(tokenizer, name, value):
    model = causal_lm(tokenizer)
    engine = LocalCoderEngine(model, tokenizer, name="tiny")
    own = engine._batch([[1, 2, 3]], 20, "</CODE>")[0]
    engine._stops = sorted({*engine._stops, own[9]})  # an end that min_new_tokens would forbid
    plain = engine._batch([[1, 2, 3]], 20, "</CODE>")
    setattr(model.generation_config, name, [own[0]] if value == "first" else value)
    assert engine._batch([[1, 2, 3]], 20, "</CODE>") == plain


def test_a_local_engine_is_named_by_the_commit_of_its_model(tokenizer):
    model = causal_lm(tokenizer)
    model.name_or_path = "org/coder"
    assert LocalCoderEngine(model, tokenizer).name == "org/coder"
    model.config._commit_hash = "abc123"
    assert LocalCoderEngine(model, tokenizer).name == "org/coder abc123"


def test_junk_of_an_untaught_model_is_a_failure(tokenizer):
    for chat in (True, False):
        coder = ModelCoder(LocalCoderEngine(causal_lm(tokenizer), tokenizer, name="tiny"), tokenizer, chat, 8)
        embeddings, ok = SkillEncoder(coder, HashEncoder()).encode(["What is 3 + 4?", "Why?"])
        assert not ok.any() and np.isnan(embeddings).all()


def test_completion_mode_begins_the_block(taught, tokenizer):
    engine = Recorder(taught)
    ModelCoder(engine, tokenizer, chat=False, max_new_tokens=1).write(["What is 3 + 4?"])
    first, second = (tokenizer.decode(prompts[0]) for prompts, _ in engine.calls)
    assert first == skills.PROMPT + "What is 3 + 4?\nOutput:\n<CODE>\n"
    assert second == first + "def solver("


def test_batches_of_an_engine_keep_the_order_of_prompts(taught, tokenizer):
    coder = ModelCoder(taught, tokenizer)
    prompts = [coder._prompt("1 + " * n, "")[-60 - n :] for n in range(7)]  # several lengths, batches of 3
    together = taught.generate(prompts, 6, "</CODE>")
    alone = [taught.generate([prompt], 6, "</CODE>")[0] for prompt in prompts]
    assert together == alone and len({g.text for g in alone}) > 1


def test_padding_is_masked(taught, monkeypatch):
    """transformers finds it by itself, but not where a tokenizer pads with its end of sequence."""
    seen = {}
    monkeypatch.setattr(taught.model, "generate", lambda **given: seen.update(given) or given["input_ids"])
    taught.generate([[11], [12, 13, 14]], 1, "</CODE>")
    assert seen["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_coder_without_a_padding_token_writes_too(taught, tokenizer):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
    )
    engine = LocalCoderEngine(taught.model, plain, name="taught")
    questions = ["What is 3 + 4?", "1 + 1"]
    programs = ModelCoder(engine, plain, max_new_tokens=40).write(questions)
    assert programs == [Program(ADD)] * 2


def test_prompts_of_like_length_are_generated_together_the_longest_first(taught, monkeypatch):
    lengths = []
    monkeypatch.setattr(taught, "_batch", lambda part, *_: lengths.append([*map(len, part)]) or [[]] * len(part))
    taught.generate([[11] * n for n in (2, 9, 1, 8, 7)], 1, "</CODE>")
    assert lengths == [[9, 8, 7], [2, 1]]


def test_generation_goes_on_no_longer_than_to_the_stop(taught, tokenizer):
    prompt = ModelCoder(taught, tokenizer)._prompt("What is 3 + 4?", "")
    text = tokenizer.decode(taught._batch([prompt], 60, "return")[0])
    assert "return" in text and "n1 + n2" not in text


def test_generations_end_at_the_stop_or_at_the_end_of_turn(taught, tokenizer, monkeypatch):
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert taught._read(ids("a b</CODE> c"), "</CODE>") == Generation("a b", True)
    assert taught._read(ids("a b<|im_end|> c"), "</CODE>") == Generation("a b", True)
    assert taught._read(ids("a b"), "</CODE>") == Generation("a b", False)
    assert taught._read(ids("a<|im_start|> b</CODE>"), "</CODE>") == Generation("a b", True)  # as a server gives it
    monkeypatch.setattr(taught, "_stops", ids(" c"))  # a text of the vocabulary itself
    assert taught._read(ids("a b c"), "</CODE>") == Generation("a b", True)


def test_settings_that_change_programs_change_the_name(taught, tokenizer, monkeypatch):
    names = [
        ModelCoder(taught, tokenizer).name,
        ModelCoder(taught, tokenizer, chat=False).name,
        ModelCoder(taught, tokenizer, max_new_tokens=100).name,
        ModelCoder(LocalCoderEngine(taught.model, tokenizer, name="other"), tokenizer).name,
        ModelCoder(taught, tokenizer, max_prompt_tokens=100).name,
    ]
    assert names[0] == ModelCoder(taught, tokenizer).name
    for place, name, value in (
        (tokenizer, "chat_template", tokenizer.chat_template + " "),
        (skills, "CHECKS", skills.CHECKS + 1),
        (skills, "PROMPT", skills.PROMPT + " "),
        (skills, "RETRY_PREFIX", skills.RETRY_PREFIX + " "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            names.append(ModelCoder(taught, tokenizer).name)
    assert len(set(names)) == len(names)


def test_a_coder_that_cannot_work_is_refused(taught, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"engine\.name is empty"):
        ModelCoder(LocalCoderEngine(causal_lm(tokenizer), tokenizer), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat=False"):
        ModelCoder(taught, tokenizer)
    ModelCoder(taught, tokenizer, chat=False)
