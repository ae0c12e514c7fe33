"""Data of the paper and the embedded digits, as rows in TRL's format.

A row has `prompt` (messages), `images` (list of PIL images, empty for text), `answer` and `id`; digits also have
`response`, the sentence a tiny model is first taught to say. Also the teacher's responses, on which the baselines sft
and kd train, and the reward that chooses among them, GRPO's. Needs `common/`.

    python -m va_opd.data teacher FOLDER      # trains the tiny teacher of the `tiny` preset on digits, once
    python -m va_opd.data base FOLDER         # the same for its student before distillation
"""

from __future__ import annotations  # datasets is imported where it is used: `--help` needs none

import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from PIL import Image as PILImage
from transformers import TrainerCallback

from .config import VAOPDConfig
from .images import MAX_PIXELS, MIN_PIXELS, check_readable, decoded

# isort: split
from common import rewards, verifiers
from common.evaluation import Decoding, Prompt, question_fingerprint
from common.evaluation.engines import build_engine
from common.runs import append_jsonl, claim, exclusive, fingerprint, folders_of, read_jsonl, weights_of
from common.tables import image_files, load_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .train import ScriptArguments

TEACHER_ROWS = 256  # responses of the teacher between two writes: an engine fills its batch from so many


@dataclass(frozen=True)
class Source:
    """Where a data set of the paper is, and how many rows its splits have."""

    hub_id: str
    rows: dict[str, int]


SOURCES = {
    "geo3k": Source("hiyouga/geometry3k", {"train": 2101, "validation": 300, "test": 601}),
    "virl39k": Source("PAPOGalaxy/PAPO_ViRL39K_train", {"train": 38870}),
}


def load_rows(
    source: str,
    split: str,
    limit: int | None = None,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    template: str = "{problem}",
    check_images: bool = True,
    reward: str | None = None,
) -> Dataset:
    """Rows of a split of `source`: a hub id, or a local folder or file (parquet, json, jsonl) of the same columns.

    Columns read: `problem` (or `question`; `<image>` marks where an image stands), `images` (or `image`; paths are
    relative to the folder), `answer`, `id` (else the row number). `template` wraps the problem; the paper has none.
    `check_images` decodes all of them once, and prints how many answers cannot be read; of several processes one is
    enough. `reward`: what own data are scored by, which has to be able to use the answers.
    Raises `ValueError` naming the source, the column, the row or the image that is at fault, and the remedy.
    """
    if "{problem}" not in template:
        raise ValueError(f"template must hold {{problem}}, which each row's problem replaces, got {template!r}")
    dataset = load_split(source, split)
    dataset = dataset.select(range(min(limit, len(dataset)))) if limit else dataset
    dataset = _standard_columns(dataset, source)
    if reward not in (None, "math"):
        _check_answers(dataset, reward)
    elif check_images:
        _report_golds(dataset, source)
    if check_images:
        check_readable(dataset, source, min_pixels, max_pixels)

    def messages(row: dict) -> dict:
        where = f"data {source!r}, row {row['id']}"
        return {"prompt": _messages(template.replace("{problem}", row["problem"]), len(row["images"]), where)}

    dataset = dataset.map(messages, desc=f"prompts of {split}")
    return dataset.with_transform(partial(_in_budget, min_pixels=min_pixels, max_pixels=max_pixels))


def validation_ids(dataset: Dataset, size: int = 200, seed: int = 42) -> list[int]:
    """Indices of the validation problems on which checkpoints are chosen: a seeded draw, sorted.

    The paper holds 200 problems out but does not publish them; like the author release, they are drawn from the
    official validation rows with seed 42.
    """
    if len(dataset) < size:
        raise ValueError(f"validation split has {len(dataset)} rows, fewer than validation_size={size}")
    return sorted(random.Random(seed).sample(range(len(dataset)), size))


def _in_budget(batch: dict, min_pixels: int, max_pixels: int) -> dict:
    """The rows that are read, with their images decoded and within the budget."""
    if "images" in batch:
        batch["images"] = [
            [decoded(image["bytes"], image["path"], min_pixels, max_pixels) for image in images]
            for images in batch["images"]
        ]
    if "prompt" in batch:
        batch["prompt"] = [[_without_nulls(message) for message in prompt] for prompt in batch["prompt"]]
    return batch


def _without_nulls(message: dict) -> dict:
    """Behind a thousand rows of text alone, image parts come back with "text": None."""
    return {**message, "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}


def _standard_columns(dataset: Dataset, source: str) -> Dataset:
    from datasets import Features, Image, Sequence, Value

    for names in (("problem", "question"), ("images", "image"), ("answer",)):
        found = next((name for name in names if name in dataset.column_names), None)
        if found is None:
            raise ValueError(
                f"data {source!r} has no column {' or '.join(names)!r}, only {', '.join(dataset.column_names)}: "
                "rename the column"
            )
        if found != names[0]:
            dataset = dataset.rename_column(found, names[0])
    ids = [str(i) for i in (dataset["id"] if "id" in dataset.column_names else range(len(dataset)))]
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    dataset = dataset.select_columns(["problem", "images", "answer"])
    feature = dataset.features["images"]
    if isinstance(feature, Image):
        dataset = dataset.cast_column("images", Image(decode=False))
    elif isinstance(getattr(feature, "feature", None), Image):
        dataset = dataset.cast_column("images", Sequence(Image(decode=False)))

    def checked(row: dict, number: int) -> dict:
        where = f"data {source!r}, row {ids[number]}"
        return {
            "problem": _problem(row["problem"], where),
            "images": _as_files(row["images"], folder, where),
            "answer": _gold(row["answer"], where),
        }

    features = Features(problem=Value("string"), images=Sequence(Image(decode=False)), answer=Value("string"))
    return dataset.map(checked, with_indices=True, features=features).add_column("id", ids)


def _problem(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: problem must be a text, got {value!r}: mend the row or leave it out")
    return value


def _gold(value: object, where: str) -> str:
    """A number as text. str() of a missing answer would be "None", which a response can give."""
    is_text = isinstance(value, str) and value.strip()
    if not is_text and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"{where}: answer must be a text or a number, got {value!r}: mend the row or leave it out")
    return str(value)


def _report_golds(dataset: Dataset, source: str) -> None:
    """Prints which gold answers are no mathematics, such as `Na^+`: no error, as the loss of VA-OPD reads none."""
    from common.answers import Verdict, grade_many

    golds = list(dataset["answer"])
    verdicts = grade_many(["\\boxed{x+1}"] * len(golds), golds)  # any answer: without one a gold is not looked at
    unread = [i for i, verdict in enumerate(verdicts) if verdict is Verdict.GOLD_UNPARSEABLE]
    if unread:
        shown = "; ".join(f"row {dataset['id'][i]}: {golds[i][:40]!r}" for i in unread[:3])
        print(
            f"data {source!r}: {len(unread)} of {len(golds)} gold answers cannot be read ({shown}): there the same "
            "text is right, score 1, and any other answer wrong, score 0, in the reward of grpo, in the choice of "
            "responses for sft and in evaluation",
            flush=True,
        )


def _check_answers(dataset: Dataset, reward: str) -> None:
    function = rewards.load_reward(reward)
    if reward in rewards.REWARDS:
        verifiers.check_gold(function, dataset.select_columns(["id", "answer"]))
    else:
        rewards.check_parameters(function, reward, ("id", "answer"))


def _as_files(images, folder: Path, where: str) -> list[dict]:
    images = [] if images is None else images if isinstance(images, list) else [images]
    if wrong := [image for image in images if not isinstance(image, str | dict | None)]:
        raise ValueError(f"{where}: images must be paths or images, got {wrong[0]!r}: mend the row or leave it out")
    return [{"bytes": None, "path": str(folder / i)} if isinstance(i, str) else i for i in images]


def _messages(problem: str, num_images: int, where: str) -> list[dict]:
    """One user turn; images stand where `<image>` marks them, or before the text if nothing marks them."""
    pieces = problem.split("<image>")
    if len(pieces) == 1:
        parts = [{"type": "image"}] * num_images + [{"type": "text", "text": problem}]
    elif len(pieces) - 1 == num_images:
        parts = []
        for i, piece in enumerate(pieces):
            parts += ([{"type": "image"}] if i else []) + ([{"type": "text", "text": piece}] if piece else [])
    else:
        raise ValueError(
            f"{where}: problem {problem[:60]!r} marks {len(pieces) - 1} images but has {num_images}: mend the row or "
            "leave it out"
        )
    return [{"role": "user", "content": parts}]


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data set: real handwritten digits that ship with scikit-learn, no network needed

DIGITS_QUESTION = "Which digits?"
# scikit-learn keeps the scans in the order of their 13 writers: a cut by position holds whole writers out
DIGITS_SPLITS = {"train": slice(0, 1400), "test": slice(1400, 1797)}


def digit_rows(split: str, count: int, seed: int, digits: int = 3) -> Dataset:
    """`count` images of `digits` handwritten digits side by side (32 pixels each) with the sentence that reads them.

    `split` is "train" (1,400 scans) or "test" (397 scans of other writers). Images are drawn when a row is read, so a
    large count costs nothing.
    """
    from datasets import Dataset
    from sklearn.datasets import load_digits

    scans = load_digits()
    images, targets = scans.images[DIGITS_SPLITS[split]], scans.target[DIGITS_SPLITS[split]]
    drawn = np.random.default_rng([seed, len(images)]).integers(len(images), size=(count, digits))
    answers = [", ".join(str(target) for target in row) for row in targets[drawn]]
    rows = {
        "id": [f"{split}-{number}" for number in range(count)],
        "prompt": [[{"role": "user", "content": DIGITS_QUESTION}]] * count,
        "scans": drawn.tolist(),
        "answer": answers,
        "response": [f"I see {answer}." for answer in answers],
    }

    def draw(batch: dict) -> dict:
        if "scans" in batch:
            batch["images"] = [[_side_by_side(images[row])] for row in batch.pop("scans")]
        return batch

    return Dataset.from_dict(rows).with_transform(draw)


def _side_by_side(scans: np.ndarray) -> PILImage.Image:
    """(N, 8, 8) scans, ink 0 to 16, as dark ink on white, four times as large."""
    pixels = (255 * (1 - np.concatenate(list(scans), axis=1) / 16)).astype(np.uint8)
    image = PILImage.fromarray(pixels)
    return image.resize((4 * image.width, 4 * image.height), PILImage.Resampling.BICUBIC).convert("RGB")


def digits_correct(response: str, row: dict) -> bool:
    """Exact match of the whole sentence: a digit missed, added or hedged is wrong."""
    return response.strip() == f"I see {row['answer']}."


def load_splits(
    dataset: str,
    source: str | None = None,
    validation_source: str | None = None,
    *,
    limit: int | None = None,
    validation_size: int = 200,
    **options,
) -> DatasetDict:
    """`train` and `validation` rows of "geo3k", "virl39k", "own" or "digits"; the sources override the hub ids.

    As in the paper, the validation problems are Geometry3K's for both data sets. `options` go to `load_rows`.
    """
    from datasets import DatasetDict

    validation = load_validation(dataset, source, validation_source, validation_size, **options)
    if dataset == "digits":
        return DatasetDict(train=digit_rows("train", limit or 2000, seed=0), validation=validation)
    source = source or SOURCES[dataset].hub_id
    train = load_rows(source, "train", limit, **options)
    if limit is None and dataset != "own":
        _check_count(dataset, source, "train", train)
    return DatasetDict(train=train, validation=validation)


def load_validation(
    dataset: str, source: str | None = None, validation_source: str | None = None, size: int = 200, **options
) -> Dataset:
    """The `validation` rows of `load_splits` alone."""
    check_dataset(dataset, source or validation_source)
    if dataset == "digits":
        return digit_rows("test", size, seed=0)
    geo3k = SOURCES["geo3k"].hub_id
    validation_source = validation_source or (source if dataset in ("geo3k", "own") and source else geo3k)
    if validation_source == source and Path(source).expanduser().is_file():
        raise ValueError(
            f"data {source!r} is one file, whose rows would be trained on and held out: name a file or folder of the "
            "problems to hold out as validation_data, or a folder with both splits as data"
        )
    rows = load_rows(validation_source, "validation", **options)
    if dataset != "own":
        _check_count("geo3k", validation_source, "validation", rows)  # of others the seed draws other problems
    return rows.select(validation_ids(rows, size))


def check_dataset(name: str, source: str | None = None) -> None:
    """`ValueError` for a data set that is not there, and for a source of the digits, which would not be read."""
    if name not in (*SOURCES, "own", "digits"):
        raise ValueError(f"dataset must be digits, own, {' or '.join(SOURCES)}; got {name!r}")
    if name == "digits" and source is not None:
        raise ValueError(
            f"dataset=digits is made in code, data {source!r} would not be read: set dataset to own for data of your "
            "own, or leave data out"
        )
    if name == "own" and source is None:
        raise ValueError("dataset=own needs data: set it to a hub id or a folder with the splits train and validation")


def _check_count(dataset: str, source: str, split: str, rows: Dataset) -> None:
    expected = SOURCES[dataset].rows[split]
    if source == SOURCES[dataset].hub_id and len(rows) != expected:
        raise ValueError(
            f"data {source!r} has {len(rows)} rows in split {split}, the paper's has {expected}: the copy changed; "
            "name another copy as data or validation_data"
        )


# What the tiny preset starts from. The base student stops on measured accuracy and not on a step count, because the
# sudden rise of so small a model comes at a step that depends on the seed.
@dataclass(frozen=True)
class Reader:
    """A tiny Qwen3-VL that is taught to read digits: its width, steps, and the accuracy at which teaching stops."""

    hidden: int
    max_steps: int
    until: float = 1.0


READERS = {"teacher": Reader(hidden=128, max_steps=600), "base": Reader(hidden=64, max_steps=900, until=0.5)}


def train_reader(name: str, out: Path, seed: int) -> str:
    """Trains READERS[name] with TRL's `SFTTrainer` into `out`; returns what to say of it: its greedy accuracy on fresh
    rows of "train".

    Raises `ValueError` for one that did not learn to read: less than half of the rows right.
    """
    from trl import SFTConfig, SFTTrainer

    from common.models import save_whole
    from common.tiny import tiny_qwen3_vl

    reader = READERS[name]
    model, processor = tiny_qwen3_vl(hidden=reader.hidden, seed=seed)
    rows = digit_rows("train", 32 * reader.max_steps, seed=1)
    stop = StopAtAccuracy(model, processor, digit_rows("train", 200, seed=2), reader.until)
    args = SFTConfig(
        output_dir=str(out.with_name(out.name + ".training")),
        max_steps=reader.max_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_length=None,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=with_completions(rows, rows["response"]),
        processing_class=processor,
        callbacks=[stop],
    )
    trainer.train()
    if stop.accuracy < 0.5:
        raise ValueError(f"the {name} reads {stop.accuracy:.0%} after {reader.max_steps} steps; try another --seed")
    save_whole(out, model, processor)
    return f"accuracy {stop.accuracy:.2f}"


class StopAtAccuracy(TrainerCallback):
    """Every 25 steps: greedy accuracy on `rows`; ends the training once it has reached `until`."""

    def __init__(self, model, processor, rows: Dataset, until: float):
        self.model, self.processor, self.rows, self.until, self.accuracy = model, processor, rows, until, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 25 == 0:
            self.accuracy = greedy_accuracy(self.model, self.processor, self.rows)
            print(f"step {state.global_step}: accuracy {self.accuracy:.2f}", flush=True)
            control.should_training_stop = self.accuracy >= self.until


def greedy_accuracy(model, processor, rows: Dataset) -> float:
    """Share of the digit rows that the model reads without a mistake."""
    from common.evaluation import Decoding, Prompt, TransformersEngine

    was_training = model.training
    engine = TransformersEngine(model.eval(), processor, batch_size=len(rows))
    prompts = [Prompt(messages=row["prompt"], images=row["images"]) for row in rows]
    done = engine.generate(prompts, Decoding(temperature=0.0, max_new_tokens=20), seeds=[0] * len(rows))
    model.train(was_training)
    return float(np.mean([digits_correct(c.text, row) for c, row in zip(done, rows, strict=True)]))


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's responses, and GRPO's reward


def teacher_rows(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> Dataset:
    """Rows with a `completion` sampled once from the teacher: the complete ones for kd (sequence-level distillation),
    of these the ones with a correct answer for sft (the paper's CoT-SFT, whose data it does not publish).

    A response that was cut at the token limit would teach to stop there. Raises `ValueError` where none is left, and
    in the processes of a launcher where the responses are not sampled yet.
    """
    records = {record["id"]: record for record in read_jsonl(sample_teacher(args, config, rows))}
    complete = [index for index, row_id in enumerate(rows["id"]) if records[row_id]["finish_reason"] != "length"]
    responses = [records[row_id]["response"] for row_id in rows["id"]]
    reward, asked = reward_of(args), rows.select_columns(["id", "prompt", "answer"])
    keep = [
        i for i in complete if args.method == "kd" or rewards.reward_of_response(reward, responses[i], asked[i]) == 1.0
    ]
    if not keep:
        raise ValueError(
            f"method {args.method} has nothing to train on: of the teacher's {len(rows)} responses {len(complete)} "
            "are complete, and for sft none of these is correct; raise max_completion_length, or take another teacher"
        )
    if PartialState().is_main_process:
        print(f"{args.method}: {len(keep)} of the teacher's {len(rows)} responses used", flush=True)
    return with_completions(rows.select(keep), [responses[i] for i in keep])


def sample_teacher(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> Path:
    """The file with one teacher response a row, to which the missing ones are added, `TEACHER_ROWS` at a time.

    Raises `ValueError` for rows with the same id, where the responses there are of another teacher, decoding or data,
    and where some are missing in the processes of a launcher: an engine would join their process group.
    """
    ids = list(rows["id"])
    (most, times), *_ = Counter(ids).most_common(1)
    if times > 1:  # the response to one of them would be taken for that to the others
        raise ValueError(f"data has {times} rows with the id {most!r}: give each its own")
    cache = Path(args.out) / "va_opd" / args.experiment / f"teacher-seed{config.seed}" / "responses.jsonl"
    claim(cache.with_name("settings.json"), teacher_settings(args, config, rows), cache.exists())
    found = read_jsonl(cache) if cache.exists() else []
    done = {record["id"] for record in found}
    missing = [index for index, row_id in enumerate(ids) if row_id not in done]
    if not missing:
        return cache
    if PartialState().num_processes > 1:
        raise ValueError(
            f"{cache} lacks {len(missing)} of {len(rows)} responses of the teacher: sample them first, by the same "
            "command without a launcher and with --sample_only true"
        )
    decoding = Decoding(
        temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_completion_length
    )
    with exclusive(cache.parent), closing(build_engine(args, args.teacher, config)) as engine:
        for start in range(0, len(missing), TEACHER_ROWS):
            part = missing[start : start + TEACHER_ROWS]
            prompts = [Prompt(messages=row["prompt"], images=row["images"]) for row in (rows[i] for i in part)]
            completions = engine.generate(prompts, decoding, [config.seed + index for index in part])
            for index, completion in zip(part, completions, strict=True):
                record = {"response": completion.text, "finish_reason": completion.finish_reason}
                append_jsonl(cache, {"id": ids[index], **record})
            print(f"teacher: {len(done) + start + len(part)} of {len(rows)} responses", flush=True)
    return cache


def teacher_settings(args: ScriptArguments, config: VAOPDConfig, rows: Dataset) -> dict[str, Any]:
    """What decides the teacher's responses."""
    names = ("temperature", "top_p", "max_completion_length", "chat_template_kwargs", "seed")
    return {
        "teacher": args.teacher,
        **weights_of(**{"weights of teacher": args.teacher}),
        **folders_of(**{"config and tokenizer of teacher": args.teacher}),
        "engine": args.engine,
        **{name: getattr(config, name) for name in names},
        **data_settings(args),
        "limit": args.limit,
        "data": fingerprint_of(rows),
    }


def data_settings(args: ScriptArguments) -> dict[str, Any]:
    """What is made of a row's text and images, and how own data are scored."""
    names = ("dataset", "template", "min_pixels", "max_pixels", *(["reward"] if args.reward else []))
    file = rewards.reward_file(args.reward)
    return {
        **{name: getattr(args, name) for name in names},
        **({"the reward's file": fingerprint(file)} if file else {}),
    }


def fingerprint_of(rows: Dataset) -> str:
    """`question_fingerprint`, with the images' files, which need no decoding."""
    questions = rows.select_columns(["id", "prompt", "answer"])
    return question_fingerprint(
        {**question, "images": images} for question, images in zip(questions, image_files(rows), strict=True)
    )


def reward_of(args: ScriptArguments) -> Callable[..., list[float]]:
    """GRPO's reward: the first answer counts, as in the paper's monitoring reward and in evaluation; for digits the
    exact sentence, for own data what they name."""
    if args.reward not in (None, "math"):
        return rewards.load_reward(args.reward)
    if args.dataset != "digits":
        return first_answer_reward

    def digits_reward(completions, answer, **columns) -> list[float]:
        texts = map(verifiers.completion_text, completions)
        return [float(digits_correct(text, {"answer": gold})) for text, gold in zip(texts, answer, strict=True)]

    return digits_reward


def first_answer_reward(completions, answer, **columns) -> list[float]:
    """1 where the first answer that a completion commits to, or a short one as a whole, is the gold answer, else 0.

    `math_reward` has None where it cannot read the gold answer and the texts differ. As the grade of evaluation and
    the paper's monitoring reward, this is 0: TRL leaves None out of its group, where the same text, 1, would be alone
    and without an advantage.
    """
    scores = verifiers.math_reward(completions, answer, which="first", whole=True, **columns)
    return [score or 0.0 for score in scores]


def with_completions(rows: Dataset, responses: list[str]) -> Dataset:
    """Rows for TRL's `SFTTrainer`: `prompt`, images as before, and `completion`, one assistant turn."""
    transform = rows.format["format_kwargs"]["transform"]
    rows = rows.with_format(None)
    unused = [name for name in ("id", "answer", "response", "problem") if name in rows.column_names]
    turns = [[{"role": "assistant", "content": response}] for response in responses]
    return rows.remove_columns(unused).add_column("completion", turns).with_transform(transform)


def main(argv: list[str] | None = None) -> int:
    """Exit code of the commands at the top of this file."""
    from common.cli import make_model_main

    return make_model_main("va_opd.data", {name: partial(train_reader, name) for name in READERS}, argv)


if __name__ == "__main__":
    sys.exit(main())
