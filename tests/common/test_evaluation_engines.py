"""Engines of the harness: generation in this process, and where a response ends."""

import gc
import json
import weakref
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config

from common.evaluation import Completion, Decoding, Prompt, TransformersEngine
from common.evaluation.engines import (
    _merged,
    deciding_options,
    json_options,
    load_engine,
    never_sampled,
    stop_ids,
    turn_end_id,
)
from common.lora import lora_config
from common.models import load_model, load_processor
from common.tiny import tiny_qwen3, tiny_qwen3_vl
from r_diverse import turns

SAMPLED = Decoding(temperature=1.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = tiny_qwen3(hidden=32)
    return TransformersEngine(model, tokenizer, batch_size=3)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": "?" * (1 + 3 * i % 7)}]) for i in range(count)]


def test_a_prompt_has_the_special_tokens_of_its_template_only():
    """Gemma's and Llama's tokenizers put a first token before what their templates have begun with it already."""
    model, tokenizer = tiny_qwen3(hidden=32)
    plain = TransformersEngine(model, tokenizer).generate(prompts(3), Decoding(max_new_tokens=4), range(3))
    first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    assert tokenizer("?")["input_ids"][0] == first[1]
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(prompts(3), Decoding(max_new_tokens=4), range(3)) == plain


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine must be transformers or vllm, got 'VLLM'"):
        load_engine("VLLM", "model", 1, bf16=False, device="cpu")


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict", "return_tensors"])
def test_an_option_that_the_engine_sets_is_refused(name):
    with pytest.raises(ValueError, match=f"options must leave out {name}, which the engine sets"):
        json_options("options", {name: True, "enable_thinking": False})


@pytest.mark.parametrize(("declared", "ends"), [(None, [5]), (7, [5, 7]), ([9, 7], [5, 7, 9])])
def test_every_declared_end_ends_a_response(declared, ends):
    assert stop_ids(declared, SimpleNamespace(eos_token_id=5)) == ends
    assert stop_ids(declared, SimpleNamespace(eos_token_id=None)) == ends[1:]


def test_a_tokenizer_without_a_pad_token_pads_with_its_end():
    model, tokenizer = tiny_qwen3(hidden=32)
    plain = TransformersEngine(model, tokenizer).generate(prompts(3), Decoding(max_new_tokens=4), range(3))
    tokenizer.pad_token = None
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(prompts(3), Decoding(max_new_tokens=4), range(3)) == plain


DECLARED = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 2,
    "min_length": 60,
    "min_new_tokens": 30,
    "stop_strings": ["a"],
    "bad_words_ids": [[50]],
    "sequence_bias": [[[60], 5.0]],
    "begin_suppress_tokens": list(range(50)),
    "forced_eos_token_id": 2,
    "guidance_scale": 2.0,
    "exponential_decay_length_penalty": (2, 3.0),
    "prompt_lookup_num_tokens": 3,
    "num_beams": 2,
    "watermarking_config": {"bias": 5.0, "context_width": 1},
    "top_k": 1,
}


@pytest.mark.parametrize("name", list(DECLARED))
def test_what_a_model_declares_for_its_own_generation_is_left_out(name):
    """vLLM's offline engine reads none of it, either."""
    model, tokenizer = tiny_qwen3()
    asked = [Prompt([{"role": "user", "content": f"what is {i}?"}]) for i in range(3)]
    decodings = [Decoding(max_new_tokens=40), Decoding(temperature=1.0, max_new_tokens=40)]
    plain = [TransformersEngine(model, tokenizer).generate(asked, decoding, range(3)) for decoding in decodings]
    setattr(model.generation_config, name, DECLARED[name])
    engine = TransformersEngine(model, tokenizer)
    assert [engine.generate(asked, decoding, range(3)) for decoding in decodings] == plain


@pytest.fixture
def adapter(tmp_path):
    """A folder with a small adapter, and the model with it."""
    model, tokenizer = tiny_qwen3()
    model.bfloat16().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora_config(4))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    rng = torch.Generator().manual_seed(0)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(0, 1e-5, generator=rng)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path), adapted


def test_a_small_adapter_is_not_rounded_away_in_bfloat16(adapter):
    """Merged into weights in bfloat16, less than a tenth of this one is left."""
    folder, adapted = adapter
    engine = load_engine("transformers", folder, 4, bf16=True, device="cpu")
    assert engine.options == {"dtype": "torch.bfloat16"}
    loaded = engine.model
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        trained = adapted.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), trained.get_delta_weight("default"))
        assert torch.equal(layer.get_base_layer().weight, trained.get_base_layer().weight)
    merged = load_model(folder, torch.bfloat16).get_submodule(name.removeprefix("base_model.model."))
    delta = layer.get_delta_weight("default")
    kept = (merged.weight.float() - layer.get_base_layer().weight.float()) * delta
    assert kept.sum() < 0.1 * (delta * delta).sum()


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("half", torch.float32)])
def test_vllm_rounds_a_merged_adapter_once(adapter, dtype, stored):
    with _merged(adapter[0], dtype) as folder:
        assert {tensor.dtype for tensor in load_file(f"{folder}/model.safetensors").values()} == {stored}


def test_options_of_vllm_that_may_change_an_answer():
    options = {"max_model_len": 99, "dtype": torch.float16, "gpu_memory_utilization": 0.5, "seed": 3}
    assert deciding_options(options) == {"max_model_len": 99, "dtype": "torch.float16"}


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_vl])
def test_a_closed_engine_holds_no_model(make):
    model, processor = make(hidden=32)
    engine, held = TransformersEngine(model, processor), weakref.ref(next(model.model.parameters()))
    del model
    engine.close()
    gc.collect()
    assert held() is None


def test_greedy_answers_do_not_depend_on_the_batch(engine):
    together = engine.generate(prompts(7), Decoding(max_new_tokens=5), [0] * 7)
    for prompt, completion in zip(prompts(7), together, strict=True):
        assert engine.generate([prompt], Decoding(max_new_tokens=5), [0]) == [completion]


def test_sampling_is_seeded_and_leaves_the_global_state(engine):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = engine.generate(prompts(5), SAMPLED, range(5))
    assert torch.equal(torch.rand(2), expected)
    assert engine.generate(prompts(5), SAMPLED, range(5)) == first
    assert engine.generate(prompts(5), SAMPLED, range(9, 14)) != first


def test_a_token_behind_a_gap_in_the_vocabulary_is_sampled():
    words = {"a": 0, "b": 1, "<end>": 7}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), eos_token="<end>")
    assert len(tokenizer) == 3
    assert never_sampled(tokenizer, Qwen3Config(vocab_size=10)) == [2, 3, 4, 5, 6, 8, 9]


def test_length_and_truncation(engine):
    (completion,) = engine.generate(prompts(1), Decoding(max_new_tokens=3), [0])
    assert (completion.num_tokens, completion.finish_reason) == (3, "length")


def test_the_end_of_a_turn_stops_a_base_model_too(monkeypatch):
    """As Qwen3-4B-Base has it: `<|endoftext|>` is the only end that is declared, its template has another."""
    model, tokenizer = tiny_qwen3()
    turn_end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert turn_end_id(tokenizer) == turn_end
    base = TransformersEngine(model, tokenizer)
    assert base.stops == sorted({tokenizer.eos_token_id, turn_end})
    text = r"So \boxed{5}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\boxed{4}"
    completion = base._completion(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert completion.text == r"So \boxed{5}" and completion.finish_reason == "stop"


def test_the_end_of_a_response_is_no_part_of_its_text():
    """Not every tokenizer marks it as special; vLLM leaves it out, too."""
    model, tokenizer = tiny_qwen3(hidden=32)
    end = tokenizer.convert_tokens_to_ids("~")
    model.generation_config.eos_token_id = end
    ids = [*tokenizer("5", add_special_tokens=False)["input_ids"], end]
    assert TransformersEngine(model, tokenizer)._completion([*ids, 0]) == Completion("5", 2, "stop")


def test_a_template_that_reads_content_as_parts_has_an_end_of_turn_too():
    tokenizer = tiny_qwen3()[1]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_token_of_the_text_before_the_end_of_a_turn_does_not_end_it():
    """Qwen3's `</think>` is an added token, but not a special one."""
    tokenizer = tiny_qwen3()[1]
    tokenizer.add_tokens(["</note>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</note><|im_end|>{% endfor %}"
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end_id(tokenizer) == turns.turn_end_id(tokenizer) == turn_end


def test_a_turn_whose_end_is_declared_has_no_other():
    """A template may close text and turn by a token each; cut at the first, a rollout would lack the declared end."""
    tokenizer = tiny_qwen3()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|text_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|text_end|><|im_end|>\n<|endoftext|>{% endfor %}"
    )
    text_end, turn_end, file_end = tokenizer.convert_tokens_to_ids(["<|text_end|>", "<|im_end|>", "<|endoftext|>"])
    assert turns.turn_end_id(tokenizer, [turn_end]) is None
    assert turns.turn_end_id(tokenizer, [file_end]) == turns.turn_end_id(tokenizer) == text_end


def test_a_template_that_the_processor_alone_has_has_an_end_of_turn(tmp_path):
    """transformers reads the older chat_template.json into the processor and not into its tokenizer."""
    model, processor = tiny_qwen3_vl(hidden=32)
    turn_end = processor.tokenizer.eos_token_id
    processor.tokenizer.eos_token = "<|endoftext|>"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    template = tmp_path / "chat_template.jinja"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    loaded = load_processor(str(tmp_path))
    assert loaded.chat_template and not loaded.tokenizer.chat_template
    model.generation_config.eos_token_id = loaded.tokenizer.eos_token_id
    assert TransformersEngine(model, loaded).stops == sorted({loaded.tokenizer.eos_token_id, turn_end})
    assert turns.turn_end_id(loaded) == turn_end


# None, one that shows the question only, one that wants three turns, one without text, one that cannot be rendered
NO_END = [
    None, "{{ messages[0]['content'] }}<|im_end|>", "{{ raise_exception('three turns') }}", "<|im_start|><|im_end|>",
    "{{ messages[0]['content'] + 1 }}",
]  # fmt: skip


@pytest.mark.parametrize("template", NO_END)
def test_a_template_without_an_end_of_turn_adds_none(template):
    tokenizer = tiny_qwen3()[1]
    tokenizer.chat_template = template
    assert turn_end_id(tokenizer) is None
    assert turns.turn_end_id(tokenizer) is None


def test_the_chat_template_gets_its_options(engine):
    model, tokenizer = engine.model, engine.tokenizer
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{{ 'off' if enable_thinking is false else 'on' }}"
    try:
        plain = TransformersEngine(model, tokenizer)
        off = TransformersEngine(model, tokenizer, chat_template_kwargs={"enable_thinking": False})
        assert [e._render(prompts(1)[0]) for e in (plain, off)] == ["on", "off"]
    finally:
        tokenizer.chat_template = kept


SMOLVLM = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
PHI4 = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
PRINTS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [SMOLVLM, PHI4, PRINTS])
def test_a_vision_template_gets_a_text_in_the_form_that_it_reads(template):
    """SmolVLM's and LLaVA's read parts only: a plain text is a row of letters without a type, and nothing is left."""
    model, processor = tiny_qwen3_vl(hidden=32)
    processor.chat_template = template
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    ours = TransformersEngine(model, processor)
    assert ours._render(Prompt(turns)) == "system: Add.\nuser: 1+1?\n"
    if template is SMOLVLM:
        assert ours._render(Prompt(turns, [None])) == "system: Add.\nuser: <image>1+1?\n"
    assert turns == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]


def test_vllm_without_its_package_names_the_extra():
    from common.evaluation import VLLMEngine

    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"post-training-reference\[vllm\]"):
            VLLMEngine("x")
