"""What is asked: benchmarks as data. A method's package can build a `Benchmark` of its own rows too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.answers import Verdict, extract_answer, judge

from .engines import Decoding

MATH_PROMPT = "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."


def judge_row(response: str, row: dict[str, Any]) -> Verdict:
    """Verdict of `common.answers` on the last committed answer."""
    return judge(response, row["answer"])


@dataclass(frozen=True)
class Benchmark:
    """A list of questions and how a response to one is scored.

    Attributes:
        name: of the result files.
        rows: `id` (unique), `prompt` (messages), `answer`, and `images` where there are some.
        score: (response, row) -> a `Verdict`, or a number in [0, 1].
        decoding: unless the caller chooses another.
        samples: a question, unless the caller chooses another number.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    score: Callable[[str, dict[str, Any]], Verdict | float] = judge_row
    decoding: Decoding = field(default_factory=Decoding)
    samples: int = 1

    def __post_init__(self):
        ids = [str(row["id"]) for row in self.rows]
        if not ids:
            raise ValueError(f"benchmark {self.name} has no rows")
        if len(set(ids)) != len(ids):
            raise ValueError(f"benchmark {self.name} has rows with the same id, such as {max(ids, key=ids.count)!r}")


@dataclass(frozen=True)
class Source:
    """A question set on the hub: where, which columns, how many rows, how the gold answer is read off."""

    hub_id: str
    rows: int
    split: str = "test"
    config: str | None = None
    problem: str = "problem"
    answer: Callable[[dict[str, Any]], str] = lambda row: str(row["answer"])
    samples: int = 1


def _after_hashes(row: dict[str, Any]) -> str:
    return row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")


def _number(row: dict[str, Any]) -> str:
    """27.0 and 27 are the same whole number."""
    value = row["answer"]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _first_of_list(row: dict[str, Any]) -> str:
    return str(row["final_answer"][0])


def _boxed_solution(row: dict[str, Any]) -> str:
    """Copies of Minerva differ: some have the answer as a column, all have it boxed in the solution."""
    return str(row["answer"]) if "answer" in row else extract_answer(row["solution"]) or ""


BENCHMARKS = {
    "math500": Source("HuggingFaceH4/MATH-500", 500),
    "gsm8k": Source("openai/gsm8k", 1319, config="main", problem="question", answer=_after_hashes),
    "minerva_math": Source("math-ai/minervamath", 272, answer=_boxed_solution),
    "olympiadbench": Source(
        "Hothan/OlympiadBench", 675, "train", "OE_TO_maths_en_COMP", problem="question", answer=_first_of_list
    ),
    "amc23": Source("math-ai/amc23", 40, answer=_number, samples=16),
    "aime24": Source("math-ai/aime24", 30, samples=16),
    "aime25": Source("math-ai/aime25", 30, samples=16),
}


def load_benchmark(name: str, data: str | None = None, limit: int | None = None) -> Benchmark:
    """A registered benchmark, from the hub or from `data`, a local file or folder of the same columns.

    Raises `ValueError` for an unknown name, missing columns, or another number of rows than registered.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; choose among {', '.join(BENCHMARKS)}")
    source = BENCHMARKS[name]
    table = _read(name, source, data)
    if source.problem not in table.column_names:
        raise ValueError(f"benchmark {name}: no column {source.problem!r} in {table.column_names}; rename the column")
    if len(table) != source.rows:
        raise ValueError(f"benchmark {name}: {len(table)} rows where {source.rows} are expected; the source has changed")
    rows = [
        {
            "id": str(number),
            "prompt": [{"role": "user", "content": MATH_PROMPT.format(problem=row[source.problem])}],
            "answer": source.answer(row),
        }
        for number, row in enumerate(table)
    ]
    return Benchmark(name=name, rows=rows[:limit], samples=source.samples)


def _read(name: str, source: Source, data: str | None):
    from datasets import load_dataset

    try:
        if data is None:
            return load_dataset(source.hub_id, source.config, split=source.split)
        path = Path(data).expanduser()
        if path.is_dir():
            return load_dataset(str(path), split=source.split)
        builder = "parquet" if path.suffix == ".parquet" else "json"
        return load_dataset(builder, data_files=str(path), split="train")
    except Exception as error:  # datasets raises many kinds; the user needs one sentence
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"benchmark {name}: cannot read {data or source.hub_id} ({first}); pass --data a local copy") from error
