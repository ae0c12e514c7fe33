"""Loading by path or name: what cannot be had is one clear sentence; the tiny models load back as they were."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import models
from common.lora import lora_config
from common.tiny import (
    answer_loss,
    answer_probabilities,
    char_tokenizer,
    tiny_qwen2_5_vl,
    tiny_qwen3,
    tiny_qwen3_vl,
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("~/nowhere", r"there is no such folder \(write ~ as a whole path\)"),
        ("no/where/here", "there is no such folder"),
        ("someone/no-such-model-8B", "no local folder, and the hub cannot be reached"),
        ("", "no local folder|no model"),
    ],
)
@pytest.mark.parametrize("load", [models.load_config, models.load_model, models.load_processor, models.empty_model])
def test_a_missing_model_is_one_clear_sentence(name, message, load):
    with pytest.raises(ValueError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_or_with_a_broken_one(tmp_path):
    with pytest.raises(ValueError, match="no usable config.json"):
        models.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not-a-family"}))
    with pytest.raises(ValueError, match="no usable config.json"):
        models.load_model(str(tmp_path))
    tiny_qwen3(hidden=32)[0].config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no file named model.safetensors|model '") as error:  # no weights
        models.load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_files_that_a_copy_has_cut_are_named(tmp_path):
    tiny_qwen3(hidden=32)[0].save_pretrained(tmp_path / "base")
    base = models.load_model(str(tmp_path / "base"))
    peft.get_peft_model(base, lora_config(2)).save_pretrained(tmp_path / "adapter")
    for name, file in (("adapter", "adapter_model.safetensors"), ("base", "model.safetensors")):
        cut(tmp_path / name / file)
        with pytest.raises(ValueError, match=f"model '.*/{name}': .*; copy or download it again"):
            models.load_model(str(tmp_path / name))
    tiny_qwen3(hidden=32)[1].save_pretrained(tmp_path / "base")
    cut(tmp_path / "base" / "tokenizer.json")
    with pytest.raises(ValueError, match="model '.*/base': its tokenizer cannot be loaded .*; copy or "):
        models.load_processor(str(tmp_path / "base"))
    cut(settings := tmp_path / "adapter/adapter_config.json")
    for content in (settings.read_text(), "[]"):
        settings.write_text(content)
        with pytest.raises(ValueError, match="adapter_config.json cannot be read .*: copy the adapter again"):
            models.load_config(str(tmp_path / "adapter"))


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_qwen3_vl])
def test_a_folder_without_a_tokenizer_and_a_file_are_one_clear_sentence(tmp_path, build):
    """AutoTokenizer would make a tokenizer without tokens, in which every prompt is empty."""
    model, processor = build(hidden=32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model '{tmp_path}': the folder holds no tokenizer; save that of"):
        models.load_processor(str(tmp_path))
    with pytest.raises(ValueError, match=r"config.json' is a file: pass the folder that it is in"):
        models.load_config(str(tmp_path / "config.json"))
    processor.save_pretrained(tmp_path)
    models.load_processor(str(tmp_path))


def test_the_template_of_a_processor_is_preferred_to_its_tokenizers(tmp_path):
    """Older folders have it in chat_template.json, at which a tokenizer does not look."""
    model, processor = tiny_qwen3_vl(hidden=32)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert models.load_processor(str(tmp_path)).chat_template == "of the processor"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "of the tokenizer"}))
    assert models.load_processor(str(tmp_path)).chat_template == "of the processor"


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_qwen3_vl, tiny_qwen2_5_vl])
def test_a_tiny_model_comes_back_from_its_folder(tmp_path, build):
    model, processor = build(hidden=32)
    getattr(processor, "tokenizer", processor).padding_side = "right"  # as many models on the hub have it
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = models.load_model(str(tmp_path))
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    loaded = models.load_processor(str(tmp_path))
    assert type(loaded) is type(processor)
    assert getattr(loaded, "tokenizer", loaded).padding_side == "left"
    messages = [{"role": "user", "content": "What is 1+2?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert loaded.apply_chat_template(messages, **options) == processor.apply_chat_template(messages, **options)
    assert models.guess_parameters(str(tmp_path)) == model.num_parameters()
    assert models.is_vlm(model.config) == (build is not tiny_qwen3)
    assert models.load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_in_fp8_are_read_with_their_scales(tmp_path):
    model = tiny_qwen3(hidden=32)[0]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:  # each smaller than a block of 128 x 128
        weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for name, weight in models.load_model(str(tmp_path)).named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0.07, atol=1e-4, msg=name)


def test_an_adapter_is_not_merged_into_weights_in_4_bits(tmp_path):
    model, _ = tiny_qwen3(hidden=32)
    model.save_pretrained(tmp_path / "base")
    adapter = peft.get_peft_model(models.load_model(str(tmp_path / "base")), lora_config(2))
    adapter.save_pretrained(tmp_path / "adapter")
    assert models.load_model(str(tmp_path / "adapter")).num_parameters() == model.num_parameters()
    merged = models.load_model(str(tmp_path / "adapter"), torch.bfloat16, attn_implementation="eager")
    assert (merged.dtype, merged.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(ValueError, match="holds a LoRA adapter, which cannot be merged into weights in 4 bits"):
        models.load_model(str(tmp_path / "adapter"), load_in_4bit=True)


def test_a_processor_saved_without_video_comes_back_where_torchvision_is(tmp_path, monkeypatch):
    """As made by the demo on a CPU and then used on a GPU node."""
    model, processor = tiny_qwen3_vl(hidden=32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name)
    assert type(models.load_processor(str(tmp_path))) is type(processor)


def test_a_processor_of_another_family_pads_on_the_left_and_reads_images(tmp_path, monkeypatch):
    """`AutoProcessor` returns the tokenizer alone where it finds no more."""
    model, processor = tiny_qwen3_vl(hidden=32)
    model.config.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(models, "IMAGE_ONLY", {})
    processor.tokenizer.padding_side = "right"
    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", lambda name: processor)
    assert models.load_processor(str(tmp_path)).tokenizer.padding_side == "left"
    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", lambda name: processor.tokenizer)
    with pytest.raises(ValueError, match=r"reads images, but only a .*Tokenizer\w* was found: save its"):
        models.load_processor(str(tmp_path))


def test_a_saved_folder_appears_whole_or_not_at_all(tmp_path):
    model, tokenizer = tiny_qwen3(hidden=32)
    with pytest.raises(KeyboardInterrupt):
        models.save_whole(tmp_path / "model", model, SimpleNamespace(save_pretrained=stopped))
    assert not (tmp_path / "model").exists()
    models.save_whole(tmp_path / "model", model, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert models.load_model(str(tmp_path / "model")).num_parameters() == model.num_parameters()


def stopped(*arguments):
    raise KeyboardInterrupt


def test_equal_seeds_give_equal_weights_and_the_global_state_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other = tiny_qwen3(hidden=32, seed=1)[0], tiny_qwen3(hidden=32, seed=2)[0]
    assert torch.equal(torch.rand(3), expected)
    again = tiny_qwen3(hidden=32, seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    ("name", "size"),
    [("Qwen/Qwen3-VL-8B-Instruct", 8e9), ("Qwen/Qwen3-1.7B", 1.7e9), ("someone/model", None), ("x/Bert-12Bx", None)],
)
def test_the_size_in_a_name(name, size):
    assert models.guess_parameters(name) == size


def test_the_character_tokenizer_gives_back_every_printable_text():
    tokenizer = char_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n  two blanks"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


def test_the_probability_of_an_answer_is_that_of_its_tokens_one_by_one():
    model, tokenizer = tiny_qwen3(hidden=32)
    rows = [
        ([{"role": "user", "content": question}], answer) for question, answer in (("1+2=", "3"), ("50+61=", "111"))
    ]
    expected = []
    for prompt, answer in rows:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        probability = 1.0
        for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]:
            with torch.no_grad():
                probability *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids = [*ids, token]
        expected.append(probability)
    found = answer_probabilities(model, tokenizer, rows)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    loss = answer_loss(model, tokenizer, rows).item()  # over 2 + 4 tokens
    assert -found.log().sum().item() / 6 == pytest.approx(loss, rel=1e-4)
