"""The eight vision benchmarks of VA-OPD (arXiv 2605.21924, Table 1): avg@8 at temperature 1, original prompts, no
system prompt, first committed answer. How they are scored: `vision_scoring`."""

from __future__ import annotations

import re

from .benchmarks import Messages, Row, Source
from .engines import Decoding
from .vision_scoring import (
    HALLUSION_UNITS,
    StructuredMetric,
    ai2d_row,
    as_list,
    hallusion_row,
    hallusion_units,
    mathverse_row,
    mathvista_row,
    mmmu_row,
    mmstar_row,
    ocrbench_row,
    wemath_row,
    wemath_units,
)

LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
WEMATH_PROMPT = """\
Now, we require you to solve a multiple-choice math question. Please briefly describe your thought process and \
provide the final answer(option).
Question: {question}
Option: {option}
Regarding the format, please answer following the template below, and be sure to include two <> symbols:
<Thought process>: <<your thought process>> <Answer>: <<your option>>"""
_MMMU_IMAGE = re.compile(r"<image (\d)>")


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def ai2d_prompt(row: Row) -> Messages:
    """Question, options A, B, C, ... on a line each, and the request for the letter."""
    options = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(row["options"]))
    return _user(f"{row['question']}\n{options}\n{LETTER_REQUEST}")


def mmmu_text(row: Row) -> str:
    """Question and options (A), (B), ... in the words of MMMU's script, with the marks of images left in."""
    if row["question_type"] != "multiple-choice":
        return f"{row['question']}\n\nAnswer the question using a single word or phrase."
    options = "".join(f"({chr(ord('A') + i)}) {option}\n" for i, option in enumerate(as_list(row["options"])))
    return f"{row['question']}\n\n{options}\n{LETTER_REQUEST}"


def mmmu_prompt(row: Row) -> Messages:
    """The prompt with each image where the question or an option names it."""
    pieces = _MMMU_IMAGE.split(mmmu_text(row))  # text, number, text, number, ..., text
    parts = [{"type": "image"} if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def mmmu_images(row: Row) -> list:
    """The images, in the order in which question and options name them."""
    return [row[f"image_{number}"] for number in _MMMU_IMAGE.findall(mmmu_text(row))]


def _vision(rows: int, hub_id: str, prompt, score, split: str, image="image", answer="answer", **more) -> Source:
    """`image` and `answer`: a column, or a reader of a row. The paper gives no top-p or length: here 1.0 and 4,096."""
    return Source(
        rows,
        hub_id,
        prompt,
        (lambda row: row[answer]) if isinstance(answer, str) else answer,
        score,
        Decoding(temperature=1.0, top_p=1.0, max_new_tokens=4096),
        split,
        samples=8,
        images=(lambda row: [row[image]]) if isinstance(image, str) else image,
        **more,
    )


VISION = {
    "wemath": _vision(
        1740,
        "We-Math/We-Math",
        lambda row: _user(WEMATH_PROMPT.format(question=row["question"], option=row["option"])),
        wemath_row,
        split="testmini",
        image="image_path",
        columns=("ID", "key"),
        metric=StructuredMetric(wemath_units),
    ),
    "mathvista": _vision(
        1000,
        "AI4Math/MathVista",
        lambda row: _user(row["query"]),
        mathvista_row,
        split="testmini",
        image="decoded_image",
        columns=("question_type", "answer_type", "choices", "precision"),
    ),
    "mathverse": _vision(
        3940,
        "AI4Math/MathVerse",
        lambda row: _user(row["query_wo"]),
        mathverse_row,
        split="testmini",
        config="testmini",
        columns=("question_type",),
    ),
    "hallusionbench": _vision(
        951,
        "lmms-lab/HallusionBench",
        lambda row: _user(row["question"]),
        hallusion_row,
        split="image",
        answer=lambda row: "yes" if str(row["gt_answer"]) == "1" else "no",
        columns=HALLUSION_UNITS["aAcc"],
        metric=StructuredMetric(hallusion_units),
    ),
    "ai2d": _vision(
        3088,
        "lmms-lab/ai2d",
        ai2d_prompt,
        ai2d_row,
        split="test",
        answer=lambda row: chr(ord("A") + int(row["answer"])),
        columns=("options",),
    ),
    "mmmu": _vision(
        900,
        "lmms-lab/MMMU",
        mmmu_prompt,
        mmmu_row,
        split="validation",
        image=mmmu_images,
        columns=("question_type", "options"),
    ),
    "mmstar": _vision(
        1500,
        "Lin-Chen/MMStar",
        lambda row: _user(f"{row['question']}\n{LETTER_REQUEST}"),
        mmstar_row,
        split="val",
    ),
    "ocrbench": _vision(
        1000,
        "echo840/OCRBench",
        lambda row: _user(row["question"]),
        ocrbench_row,
        split="test",
        answer=lambda row: as_list(row["answer"]),
        columns=("dataset",),
    ),
}
