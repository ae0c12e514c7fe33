"""`VAOPDTrainer`: bad settings, models and data are one clear sentence; what is warned of."""

import copy
import logging
import math
import re
from collections import UserList
from unittest.mock import MagicMock

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageColumn
from PIL import Image
from transformers import Cohere2Config, Gemma2Config, GraniteConfig, Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import remove_none_values
from va_opd_trainers import image, image_rows, mixed_rows, models, prompt, step, text_config

from va_opd import VAOPDTrainer
from va_opd import trainer as va_opd_trainer
from va_opd.checks import (
    check_image_columns,
    check_prompts,
    check_rows,
    check_same_tokens,
    naming_rows,
    naming_unread_rows,
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_generations": 6},
            "do not divide into groups of num_generations=6: set gradient_accumulation_steps to a multiple of 3",
        ),
        ({"num_generations": 1}, "num_generations=1 leaves rollout weights without siblings"),
        ({"num_generations": 1, "weighting": "rollout"}, "num_generations=1 leaves rollout weights without siblings"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"num_generations": 1.5}, "num_generations must be at least 1, and whole, got 1.5"),
        ({"max_completion_length": 1.5}, "max_completion_length must be at least 1, and whole"),
        ({"adam_beta2": 2}, "adam_beta2 must be in [0, 1), got 2"),
        ({"num_train_epochs": math.nan}, "num_train_epochs must be above 0 and finite, got nan"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0 and finite"),
        ({"weighting": "vaopd"}, "weighting must be one of va, rollout, token, none, got 'vaopd'"),
        ({"measure_va": False}, "measure_va=False leaves no VA for weighting='va': set weighting to 'none'"),
        ({"pixelate_at": "before"}, "pixelate_at must be one of model, raw"),
        ({"degradation_ratio": 0.0}, "degradation_ratio must be in"),
        ({"top_fraction": 0.0}, "top_fraction must be in"),
        ({"high_weight": 1.5}, "high_weight must be in"),
        ({"weight_temperature": 0.0}, "weight_temperature must be above 0"),
        ({"kl_temperature": 0.0}, "kl_temperature must be above 0"),
        ({"va_eps": 0.0}, "va_eps must be above 0"),
        ({"beta": 0.5}, "beta must be 1.0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_p": 2.0}, "top_p must be in (0, 1]"),
        ({"max_prompt_length": None}, "max_prompt_length must be at least 1, and whole, got None"),
        ({"max_completion_length": None}, "max_completion_length must be at least 1, and whole, got None"),
        ({"doctor_steps": -1}, "doctor_steps must be at least 0"),
        ({"va_floor": math.nan}, "va_floor must be finite, or none"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be false: the smaller batches that it makes"),
        ({"per_device_train_batch_size": 32}, "train_dataset has 4 prompts, fewer than the 8"),
    ],
)
def test_bad_settings_are_one_clear_sentence(make, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**overrides)
    assert "\n" not in str(error.value)


def test_what_no_trainer_can_be_built_of_is_one_clear_sentence(make):
    student, teacher, processor = models()
    rows = Dataset.from_list(image_rows(2))
    good = {"train_dataset": rows, "processing_class": processor}

    def refused(message: str, teacher=teacher, **changes):
        with pytest.raises(ValueError, match=message):
            VAOPDTrainer(student, teacher, make().args, **{**good, **changes})

    endless = IterableDataset.from_generator(lambda: iter(image_rows(2)))
    refused("must be a map-style Dataset .* got IterableDataset", train_dataset=endless)
    splits = DatasetDict(train=rows, test=rows)
    refused("and one split of a DatasetDict; got DatasetDict", train_dataset=splits)
    refused(
        "train_dataset has the columns problem, .*it needs `prompt`",
        train_dataset=rows.rename_column("prompt", "problem"),
    )
    refused("pass the student's processor, loaded by AutoProcessor", processing_class="org/model")
    refused("student and teacher are one object", teacher=student)
    refused("VAOPDTrainer takes no tools", tools=[print])
    trainer = VAOPDTrainer(student, teacher, make().args, **{**good, "train_dataset": None})
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer.train()


def test_a_frozen_student_is_refused_before_it_learns_nothing(make):
    """With gradient checkpointing, TRL's default, torch only warns."""
    student, teacher, processor = models()
    trainer = make(parts=(student.requires_grad_(False), teacher, processor), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="^no weight of the student is trained: load an adapter with"):
        trainer.train()


@pytest.mark.parametrize("name", ["patch_size", "spatial_merge_size"])
def test_a_teacher_that_reads_other_patches_is_refused(make, name):
    """As Qwen2.5-VL (14) for Qwen3-VL (16): torch would say that a shape is invalid, at the first step."""
    student, teacher, processor = models()
    setattr(teacher.config.vision_config, name, 7)
    with pytest.raises(
        ValueError, match=f"the student's vision_config has {name}=., the teacher's 7: .*choose a teacher"
    ):
        make(parts=(student, teacher, processor))


@pytest.mark.parametrize("said", [[{"role": "user", "content": None}], [], None])
def test_a_prompt_that_says_nothing_is_refused_with_its_row(make, said):
    rows = [*image_rows(3), {**image_rows(1)[0], "prompt": said}]
    with pytest.raises(ValueError, match="the prompt of row 3 of train_dataset is .*: it needs messages with content"):
        make(rows=rows)


def test_rows_to_evaluate_on_are_looked_at_before_the_first_evaluation(make):
    with pytest.raises(ValueError, match="^eval_dataset has the columns question: it needs `prompt`"):
        make(eval_rows=[{"question": "a"}])
    with pytest.raises(ValueError, match="^the prompt of row 1 of eval_dataset is "):
        make(eval_rows=[{"prompt": prompt(0)}, {"prompt": []}])


def test_an_empty_text_is_refused_with_its_row(make):
    """The student would be sampled from nothing but padding."""
    with pytest.raises(ValueError, match="the prompt of row 3 of train_dataset is '': it needs messages with content"):
        make(rows=[*[{"prompt": "a"}] * 3, {"prompt": ""}])


def shown(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize("said", [{"role": "user", "content": "a"}, 5, ["a"], [{"content": "a"}]])
def test_a_prompt_of_another_form_is_refused_with_its_row(make, said):
    with pytest.raises(ValueError, match="the prompt of row 0 of train_dataset is .*: it needs messages with content"):
        make(rows=[{"prompt": said}] * 4)


@pytest.mark.parametrize("kind", ["image_url", "video"])
def test_a_part_that_trl_leaves_out_of_the_scoring_is_refused_with_its_row(make, kind):
    """Rollouts would be drawn with the picture in it, and learned from without."""
    student, teacher, processor = models()
    rows = [*image_rows(3), {"prompt": shown({"type": kind, kind: "a.png"})}]
    with pytest.raises(ValueError, match=f"the prompt of row 3 of train_dataset has a part of type '{kind}'"):
        VAOPDTrainer(student, teacher, make().args, rows, processing_class=processor)


def test_other_texts_among_the_parts_are_a_matter_of_the_template(make):
    """Such as the thoughts in the system prompts of Mistral's reasoning models."""
    thoughts = {"role": "system", "content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]}
    make(rows=[{"prompt": [thoughts, *shown({"type": "text", "text": "Q"})]}] * 4, weighting="none")


def test_a_part_that_is_no_mapping_is_one_clear_sentence(make):
    with pytest.raises(ValueError, match="^row 0 of train_dataset makes no prompt "):
        make(rows=[{"prompt": [{"role": "user", "content": ["a"]}]}] * 4, weighting="none")


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": shown({"type": "image"}), "images": [image(0)] * 2}, r"provided \(2\) does not match .* \(1\)"),
        ({"prompt": "What?", "image": image(0)}, "a prompt that is a text has no place for its images"),
        ({"prompt": shown({"type": "image", "image": "/nowhere/a.png"})}, "Got /nowhere/a.png"),
        ({"prompt": prompt(0), "image": image(0, (900, 4))}, "absolute aspect ratio must be smaller than 200"),
    ],
)
def test_a_first_row_that_makes_no_prompt_is_said_before_anything_is_loaded(make, monkeypatch, row, cause):
    monkeypatch.setattr(DistillationTrainer, "__init__", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(
        ValueError, match=f"^row 0 of train_dataset makes no prompt .*{cause}.*: mend such rows"
    ) as error:
        make(rows=[row] * 4)
    assert "\n" not in str(error.value)


def with_files(folder) -> Dataset:
    """Rows whose images are files 0.png to 3.png, read when a row is asked for."""
    for i in range(4):
        image(i).save(folder / f"{i}.png")
    files = [{"prompt": prompt(i), "image": str(folder / f"{i}.png")} for i in range(4)]
    return Dataset.from_list(files).cast_column("image", ImageColumn())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_with_its_row(make, tmp_path, workers):
    student, teacher, processor = models()
    args, data = make(dataloader_num_workers=workers).args, with_files(tmp_path)
    trainer = VAOPDTrainer(student, teacher, args, data, processing_class=processor)
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[:400])
    message = "^row 3 of train_dataset cannot be read .*truncated.*: mend such rows, or leave them out"
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_first_image_that_cannot_be_read_is_named_too(make, tmp_path):
    student, teacher, processor = models()
    data = with_files(tmp_path)
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match="^row 0 of train_dataset cannot be read .*No such file.*0.png"):
        VAOPDTrainer(student, teacher, make().args, data, processing_class=processor)


@pytest.mark.parametrize(
    ("shown", "cause"),
    [
        (image(0, (2, 900)), "absolute aspect ratio must be smaller than 200"),
        (Image.new("I;16", (40, 40), 60_000), "mode I;16"),
        (None, "(one of its images is None|no images were passed)"),
    ],
)
def test_an_image_that_no_prompt_can_be_made_of_is_named_with_its_row(make, shown, cause):
    student, teacher, processor = models()
    rows = [{"id": f"geo-{i}", "prompt": prompt(i), "images": [image(i)]} for i in range(4)]
    rows[3]["images"] = [shown]
    trainer = VAOPDTrainer(student, teacher, make().args, rows, processing_class=processor)
    with pytest.raises(ValueError, match=f"^the row with id 'geo-3' makes no prompt .*{cause}.*: mend such rows"):
        trainer.train()
    trainer.train_dataset = [{"prompt": row["prompt"], "images": row["images"]} for row in rows]
    with pytest.raises(ValueError, match=f"^the row with prompt .*Q3.* makes no prompt .*{cause}"):
        trainer.train()


@pytest.mark.parametrize("place", ["image", "message"])
def test_a_white_image_is_refused_where_nothing_is_pixelated(make, place):
    """Standard OPD without VA never opens images itself."""
    rows = [{"id": i, **row} for i, row in enumerate(image_rows(4))]
    deep = Image.new("I;16", (40, 40), 60_000)
    rows[3]["image"] = deep
    if place == "message":
        for row in rows:
            part = {"type": "image", "image": row.pop("image")}
            row["prompt"] = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    student, teacher, processor = models()
    args = make(weighting="none", measure_va=False).args
    trainer = VAOPDTrainer(student, teacher, args, rows, processing_class=processor)
    with pytest.raises(ValueError, match="^the row with id 3 makes no prompt .*mode I;16 and values up to 60000"):
        trainer.train()


def test_a_long_prompt_is_named_with_its_row(make):
    rows = [{"id": i, **row} for i, row in enumerate(image_rows(4))]
    rows[2]["prompt"] = [{"role": "user", "content": "?" * 100}]
    with pytest.raises(
        ValueError, match=r"^the prompt of the row with id 2 has \d+ tokens, above max_prompt_length=64"
    ):
        make(rows=rows, max_prompt_length=64).train()


def test_an_error_that_is_of_no_row_is_raised_as_it_is(make, monkeypatch):
    trainer = make()

    def fails(*_):
        raise KeyError("of the engine")

    for name in ("_generate_single_turn", "get_batch_samples"):
        monkeypatch.setattr(DistillationTrainer, name, fails)
        with pytest.raises(KeyError, match="of the engine"):
            trainer.train()
    with pytest.raises(torch.OutOfMemoryError), naming_rows(None, None, [{}]):  # in which no row is read
        raise torch.OutOfMemoryError


def test_the_search_for_a_row_that_cannot_be_read_says_why_and_ends(monkeypatch):
    """Of 40,000 images it takes minutes, in which the other ranks wait, and an error of the network may be over."""
    said, rows = [], MagicMock(**{"__len__.return_value": 40_000})
    monkeypatch.setattr("va_opd.checks.logger.warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr("va_opd.checks.SEARCH_SECONDS", 0)
    with pytest.raises(OSError, match="the server is away"), naming_unread_rows(rows):
        raise OSError("the server is away")
    assert said == [
        "rows of train_dataset cannot be loaded (OSError: the server is away): looking for the first, for 0 s at most"
    ]
    assert not rows.__getitem__.called


def test_a_context_of_vllm_that_cuts_rollouts_is_warned_of(make, monkeypatch):
    said, args = [], make().args  # max_completion_length=6
    monkeypatch.setattr("va_opd.checks.logger.warning_once", said.append)
    for use_vllm, mode, context in ((False, "colocate", 10), (True, "server", 10), (True, "colocate", None)):
        args.use_vllm, args.vllm_mode, args.vllm_max_model_length = use_vllm, mode, context
        check_prompts([[1] * 20], args)
    args.vllm_max_model_length = 26
    check_prompts([[1] * 20], args)
    assert not said
    check_prompts([[1] * 20, [1] * 21], args)
    assert "vllm_max_model_length=26 is for a prompt and its rollout" in said[0]


def test_a_processor_without_a_chat_template_and_a_long_prompt_are_said_before_anything_is_loaded(make, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "__init__", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(
        ValueError, match="the prompt of row 0 of train_dataset has 28 tokens, above max_prompt_length=20:"
    ):
        make(max_prompt_length=20)
    student, teacher, processor = models()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 0 of train_dataset makes no prompt .* does not have a chat template"):
        make(parts=(student, teacher, processor))


def test_a_single_image_in_the_column_of_lists_is_one_clear_sentence(make):
    rows = [{"prompt": row["prompt"], "images": row["image"]} for row in image_rows(4)]
    with pytest.raises(ValueError, match="`images` of row 0 of train_dataset is a .*: it needs a list of images"):
        make(rows=rows)


IN_IMAGE, IN_IMAGES, NOWHERE = ({"image": image(0)}, {"images": [image(0)]}, {})


@pytest.mark.parametrize(
    ("parts", "row"),
    [
        ((NOWHERE, IN_IMAGE), 1),
        ((IN_IMAGE, NOWHERE), 1),
        ((IN_IMAGES, IN_IMAGES, IN_IMAGE), 2),
        (({"images": [], **IN_IMAGE},), 0),
        (({"images": [image(1)], **IN_IMAGE},), 0),
    ],
)
def test_images_in_several_columns_are_one_clear_sentence(make, parts, row):
    """TRL reads one column in all rows of a batch, and rollouts of the others would have been drawn and weighted
    without their images."""
    student, teacher, processor = models()
    rows = [{"prompt": prompt(i), **part} for i, part in enumerate(parts)] * 2
    with pytest.raises(ValueError, match=rf"images of train_dataset are not in one column \(row {row} differs\)"):
        VAOPDTrainer(student, teacher, make().args, rows, processing_class=processor)


def test_the_same_image_in_both_columns_trains(make):
    rows = [{"prompt": prompt(i), "images": [image(i), image(i + 1)], "image": image(i)} for i in range(4)]
    trainer = make(rows=rows)
    step(trainer)
    assert [len(images) for images in trainer.last_rollouts["images"]] == [2] * 8


def test_images_of_data_sets_that_were_joined_are_one_clear_sentence(make):
    """Of which only the first row is looked at before the first batch: decoding all images would take long."""
    parts = [{**IN_IMAGES, "image": None}] * 2 + [{"images": None, **IN_IMAGE}] * 2  # as concatenate_datasets has them
    rows = [{"prompt": prompt(i), **part} for i, part in enumerate(parts)]
    trainer = make(rows=rows, shuffle_dataset=False)
    with pytest.raises(ValueError, match=r"images of a batch are not in one column \(row 0 differs\)"):
        trainer.train()


@pytest.mark.parametrize("said", [prompt(0), "a"])
@pytest.mark.parametrize("column", [{"scan": image(0)}, {"images": []}, {"image": None}])
def test_data_without_an_image_need_weighting_none(make, said, column):
    rows = [{"prompt": said, **column}] * 4
    message = rf"the columns prompt, {next(iter(column))}, and no row has an image .* set weighting to 'none'"
    for weighting in ("va", "rollout", "token"):
        with pytest.raises(ValueError, match=message):
            make(rows=rows, weighting=weighting)
    make(rows=rows, weighting="none")


def test_images_of_a_column_of_another_name_are_not_decoded_in_search_of_one(make):
    """Of 40,000 photographs that took minutes before the error."""
    scans = [ImageColumn().encode_example(image(0)), {"bytes": b"cut", "path": None}]
    dataset = Dataset.from_list([{"prompt": prompt(0)}] * 2).add_column("scan", scans, feature=ImageColumn())
    with pytest.raises(ValueError, match="columns prompt, scan, and no row has an image"):
        check_image_columns(make().args, dataset)
    shown = dataset.with_transform(lambda batch: {"prompt": batch["prompt"], "image": [image(0)] * len(batch["scan"])})
    check_image_columns(make().args, shown.select([0]))


def test_an_image_in_any_row_is_enough(make, tmp_path):
    image(0).save(tmp_path / "a.png")
    texts = [{"prompt": shown({"type": "text", "text": "Q"})}] * 3
    make(rows=mixed_rows(4))
    make(rows=[*texts, {"prompt": shown({"type": "image", "image": str(tmp_path / "a.png")})}])


def test_rows_in_a_list_are_looked_at(make):
    student, teacher, processor = models()
    for rows, message in (
        ([{"problem": "?"}] * 4, "train_dataset has the columns problem: it needs `prompt`"),
        ([*image_rows(3), {"prompt": []}], "the prompt of row 3 of train_dataset is "),
        ("org/data", "train_dataset must be a map-style Dataset or a list of rows, .* got str"),
        (iter(image_rows(4)), "train_dataset must be a map-style Dataset .* got list_iterator"),
    ):
        with pytest.raises(ValueError, match=message):
            VAOPDTrainer(student, teacher, make().args, rows, processing_class=processor)
    for rows in (image_rows(4), UserList(image_rows(4))):
        VAOPDTrainer(student, teacher, make().args, rows, processing_class=processor)


def test_another_configuration_is_one_clear_sentence(tmp_path):
    student, teacher, processor = models()
    plain = DistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="args must be a VAOPDConfig, got DistillationConfig"):
        VAOPDTrainer(student, teacher, plain, Dataset.from_list(image_rows(4)), processing_class=processor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_student_in_half_precision_is_warned_of(make, caplog, monkeypatch, dtype):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    student, teacher, processor = models()
    begin(make(parts=(student.to(dtype), teacher, processor)))
    warned = [record for record in caplog.records if "in half precision" in record.getMessage()]
    assert len(warned) == (dtype == torch.bfloat16)


def begin(trainer) -> None:
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_adapters_that_are_made_float32_after_the_constructor_are_not_warned_of(make, caplog, monkeypatch):
    """As `va_opd.train` does with those on quantized weights, which TRL rounds."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make(peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.model.base_model.model.is_quantized = True  # stands for 4 bits
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.bfloat16()
    for _ in range(2):
        begin(trainer)
        (warning,) = [record.getMessage() for record in caplog.records if "in half" in record.getMessage()]
        assert "p.data = p.data.float()" in warning
        for p in trainer.model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data


def test_a_missing_processor_is_one_clear_sentence(make):
    student, teacher, _ = models()
    with pytest.raises(ValueError, match="processing_class is required"):
        VAOPDTrainer(student, teacher, make().args, Dataset.from_list(image_rows(4)))


def test_a_tokenizer_for_rows_with_images_is_one_clear_sentence(make):
    student, teacher, processor = models()
    parts = student, teacher, processor.tokenizer
    with pytest.raises(ValueError, match=r"rows have images, but processing_class is a tokenizer: .*AutoProcessor"):
        make(parts=parts)
    with pytest.raises(ValueError, match="rows have images, but processing_class is a tokenizer"):
        make(rows=[{"prompt": shown({"type": "image", "image": image(0)})}] * 4, parts=parts)
    for extra in ({}, {"image": None}, {"images": []}):
        make(rows=[{"prompt": prompt(i), **extra} for i in range(4)], parts=parts, weighting="none")


@pytest.mark.parametrize(("sharding", "stops_evaluation"), [("zero2", False), ("zero3", True), ("fsdp", True)])
def test_mixed_rows_stop_evaluation_only_where_weights_are_sharded(make, monkeypatch, sharding, stops_evaluation):
    trainer = make()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer, "_gather", lambda tensor: tensor)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", sharding != "fsdp")
    monkeypatch.setattr(trainer, "is_fsdp_enabled", sharding == "fsdp")
    monkeypatch.setattr(va_opd_trainer, "is_deepspeed_zero3_enabled", lambda: sharding == "zero3")
    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", lambda *_: pytest.fail("generates"))
    stopped = ValueError, "1 of the 2 rollouts of a step have images"
    listed = [{"prompt": row["prompt"], "images": [row["image"]] if row["image"] else []} for row in mixed_rows(2)]
    within = [{"prompt": prompt(0)}, {"prompt": shown({"type": "image", "image": image(0)})}]
    for training, stops in ((True, True), (False, stops_evaluation)):
        trainer.model.train(training)
        error, message = stopped if stops else (pytest.fail.Exception, "generates")
        for rows in (mixed_rows(2), listed, within):
            with pytest.raises(error, match=message):
                trainer._generate_and_score_completions(rows)


def other_tokenizer():
    tokenizer = copy.deepcopy(models()[2].tokenizer)
    tokenizer.add_tokens(["another"])
    return tokenizer


def test_another_tokenizer_is_one_clear_sentence(tmp_path, make):
    student, teacher, processor = models()
    check_same_tokens(processor.tokenizer, copy.deepcopy(processor.tokenizer))
    with pytest.raises(ValueError, match=r"different vocabularies .*'another'") as error:
        check_same_tokens(processor.tokenizer, other_tokenizer())
    assert "\n" not in str(error.value)
    teacher.save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="different vocabularies"):
        make(parts=(student, str(tmp_path / "teacher"), processor))


def test_a_teacher_that_lacks_tokens_is_one_clear_sentence(make):
    student, teacher, processor = models()
    teacher.resize_token_embeddings(len(processor.tokenizer) - 2)
    with pytest.raises(ValueError, match="must be of one tokenizer family"):
        make(parts=(student, teacher, processor))


def test_a_teacher_by_name_with_other_padding_is_one_clear_sentence(make, tmp_path):
    student, teacher, processor = models()
    teacher.resize_token_embeddings(len(processor.tokenizer) + 9, mean_resizing=False)
    teacher.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pads its vocabulary to .* rows.*pass the model") as error:
        make(parts=(student, str(tmp_path), processor))
    assert "\n" not in str(error.value)


def test_a_teacher_without_eyes_is_one_clear_sentence(make):
    student, _, processor = models()
    teacher = Qwen3ForCausalLM(Qwen3Config(**text_config(student.config.get_text_config().vocab_size, 32, 1)))
    with pytest.raises(ValueError, match="the student reads images, the teacher does not: .* vision-language teacher"):
        make(parts=(student, teacher, processor))


def test_a_teacher_with_nan_is_one_clear_sentence(make):
    student, teacher, processor = models()
    with torch.no_grad():
        teacher.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(ValueError, match="teacher log-probability of rollout 0, token 0 is not finite"):
        step(make(parts=(student, teacher, processor)))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (GraniteConfig, {"logits_scaling": 4.0}),
        (Cohere2Config, {"logit_scale": 0.25}),
        (Gemma2Config, {"final_logit_softcapping": 5.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_whose_forward_leaves_out_a_scale_or_cap_of_its_logits_is_refused(make, config, settings, dtype):
    """As LLaVA-NeXT does around Granite, Aya Vision around Cohere, PaliGemma around Gemma 2."""
    student, teacher, processor = models("llava")
    text = config(**text_config(student.config.text_config.vocab_size, hidden=32, layers=2), **settings)
    torch.manual_seed(0)
    student = type(student)(type(student.config)(**{**student.config.to_dict(), "text_config": text}))
    with torch.no_grad():
        student.lm_head.weight.mul_(20.0)
    with pytest.raises(ValueError, match="logits of LlavaForConditionalGeneration are not the product of its last"):
        make(parts=(student.to(dtype), teacher, processor))


def test_arguments_that_arrow_adds_to_calls_of_tools_are_refused():
    """Where another call has a city, the prompt of this one would read {"unit": "C", "city": null}."""

    def row(arguments):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
        turns = [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return {"prompt": [*turns, {"role": "tool", "content": "9"}, {"role": "user", "content": "And?"}]}

    data, alike = [row({"city": "Rome"}), row({"unit": "C"})] * 2, [row({"city": "Rome"})] * 4
    with pytest.raises(ValueError, match="of weather in row 0 of train_dataset has unit=None, which Arrow adds"):
        check_rows(Dataset.from_list(data))
    for good in (Dataset.from_list(data, on_mixed_types="use_json"), Dataset.from_list(alike)):
        check_rows(good)
    without = Dataset.from_list(data).with_transform(remove_none_values)
    check_rows(without)
