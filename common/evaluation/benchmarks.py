"""What is asked: benchmarks as data. A method's package can build a `Benchmark` of its own rows too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.answers import extract_answer
from common.verifiers import choice_reward, tool_call_reward

from .engines import Decoding
from .scoring import Metric, Scorer, answer_row, bbeh_row, reward_scorer

Row = dict[str, Any]
Messages = list[dict[str, Any]]

MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
GENERAL_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE_REQUEST = "Please reason step by step, and put the letter of the right option within \\boxed{}."
DATA = "--data (of va_opd: --benchmark_data)"  # the flag, in messages


@dataclass(frozen=True)
class Benchmark:
    """A list of questions and how a response to one is scored.

    Attributes:
        name: of the result files.
        rows: `id` (unique), `prompt` (messages), `answer` and, if there are any, `images`: PIL images, or files as the
            package datasets gives them undecoded.
        score: (response, row) -> a `Verdict`, or a number in [0, 1].
        decoding: of the responses, unless the caller chooses another.
        samples: for each question, unless the caller chooses another number.
        metric: of all scored records, if it is not their mean: {"score": the headline in [0, 1] or None,
            "interval": its 95 % interval, ...}.
        columns: of the rows, which the metric needs in the records.
        settings: of the scorer, recorded in the result.
    """

    name: str
    rows: Sequence[Row]
    score: Scorer = answer_row
    decoding: Decoding = field(default_factory=Decoding)
    samples: int = 1
    metric: Metric | None = None
    columns: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        ids = [str(row["id"]) for row in self.rows]
        if not ids:
            raise ValueError(f"benchmark {self.name} has no rows")
        if len(set(ids)) != len(ids):
            raise ValueError(f"benchmark {self.name} has rows with the same id, such as {max(ids, key=ids.count)!r}")


@dataclass(frozen=True)
class Source:
    """Where the questions of a benchmark are, how many, how one is asked, and the paper's decoding and scoring.

    `hub_id` None: the rows are only in a release's files, and the caller names one. `prompt`, `answer` and `images`
    read a row of the source; `columns` of it are kept for the scorer and the metric. `also`: numbers of rows of other
    copies in use.
    """

    rows: int
    hub_id: str | None
    prompt: Callable[[Row], Messages]
    answer: Callable[[Row], Any]
    score: Scorer
    decoding: Decoding
    split: str = "test"
    config: str | None = None
    samples: int = 1
    images: Callable[[Row], list] | None = None
    columns: tuple[str, ...] = ()
    metric: Metric | None = None
    also: tuple[int, ...] = ()


def math_prompt(row: Row) -> Messages:
    """R-Zero's solver prompt (arXiv 2508.05004), with which R-Diverse evaluates."""
    problem = row["problem"] if "problem" in row else row["question"]  # copies differ in the name
    return [{"role": "system", "content": MATH_SYSTEM}, {"role": "user", "content": problem}]


def choice_prompt(row: Row) -> Messages:
    """Question, options A, B, C, ... on a line each, and the request for the letter in a box."""
    options = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(row["options"]))
    return [{"role": "user", "content": f"{row['question']}\n\n{options}\n\n{CHOICE_REQUEST}"}]


def general_prompt(row: Row) -> Messages:
    """The question and the request for a boxed answer; options are part of the question."""
    return [{"role": "user", "content": f"{row['question']}\n\n{GENERAL_REQUEST}"}]


def ready_prompt(row: Row) -> Messages:
    """Rows of the SDPO release: the user message, and a system message or null."""
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def _answer(row: Row) -> str | None:
    """The gold answer as text, 27.0 of a column of numbers as "27"; None without one."""
    value = row["answer"]
    if value is None or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _answer_or_boxed(row: Row) -> str | None:
    """Copies differ: some have the answer as a column, the others have it boxed in the solution."""
    return _answer(row) if "answer" in row else extract_answer(row["solution"]) or ""


def _after_hashes(row: Row) -> str:
    return row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")


def _math(rows: int, hub_id: str, answer=_answer, sampled: bool = False, **where: Any) -> Source:
    """R-Diverse (arXiv 2602.13103): greedy, or the mean of 32 samples. Its paper gives no temperature for these; 1.0
    is that of the Solver's rollouts and labels."""
    decoding = Decoding(1.0, 0.95, 4096) if sampled else Decoding(0.0, 1.0, 4096)
    return Source(rows, hub_id, math_prompt, answer, answer_row, decoding, samples=32 if sampled else 1, **where)


def _general(rows: int, hub_id: str, prompt, answer, score: Scorer, split: str) -> Source:
    """R-Diverse: greedy, full sets. Without a letter the authors' release scores a random one; here it is wrong."""
    return Source(rows, hub_id, prompt, answer, score, Decoding(0.0, 1.0, 8192), split)


def _srpo(rows: int, reward) -> Source:
    """SRPO (arXiv 2604.02288): avg@16 with the scorer of the SDPO release (arXiv 2601.20802), from its test.json."""
    score = reward_scorer(reward, compatible=True)
    return Source(rows, None, ready_prompt, _answer, score, Decoding(0.6, 0.95, 8192), samples=16)


BENCHMARKS = {
    "math500": _math(500, "HuggingFaceH4/MATH-500"),
    "gsm8k": _math(1319, "openai/gsm8k", _after_hashes, config="main"),
    "minerva_math": _math(272, "math-ai/minervamath", _answer_or_boxed),
    "olympiadbench": _math(
        674,  # the copy of Qwen2.5-Math's evaluation has one more
        "Hothan/OlympiadBench",
        lambda row: str(row["final_answer"][0]),
        split="train",
        config="OE_TO_maths_en_COMP",
        also=(675,),
    ),
    "amc23": _math(40, "math-ai/amc23", sampled=True),
    "aime24": _math(30, "math-ai/aime24", _answer_or_boxed, sampled=True),
    "aime25": _math(30, "math-ai/aime25", sampled=True),
    "mmlu_pro": _general(
        12032, "TIGER-Lab/MMLU-Pro", choice_prompt, _answer, reward_scorer(choice_reward), split="test"
    ),
    "supergpqa": _general(
        26529,
        "m-a-p/SuperGPQA",
        choice_prompt,
        lambda row: row["answer_letter"],
        reward_scorer(choice_reward),
        split="train",
    ),
    "bbeh": _general(4520, "MrLight/bbeh-eval", general_prompt, _answer, bbeh_row, split="train"),
    "sciknoweval_chemistry": _srpo(210, choice_reward),
    "sciknoweval_physics": _srpo(80, choice_reward),
    "sciknoweval_biology": _srpo(50, choice_reward),
    "sciknoweval_materials": _srpo(94, choice_reward),
    "tooluse": _srpo(68, tool_call_reward),
}


def load_benchmark(name: str, data: str | Path | None = None, limit: int | None = None) -> Benchmark:
    """A registered benchmark, from the hub or from `data`.

    Args:
        name: a key of `BENCHMARKS`.
        data: a .json, .jsonl or .parquet file of the same columns; or a folder with such a file named after the
            benchmark, or with a copy of the hub's repository.
        limit: only so many questions from the start.

    A row's `id` is its number in the source, from 0. Raises `ValueError` for an unknown name, missing columns or
    answers, or another number of rows than registered.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; choose among {', '.join(BENCHMARKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    source = BENCHMARKS[name]
    table = _undecoded(_read(name, source, data))
    if len(table) not in (source.rows, *source.also):
        raise ValueError(
            f"benchmark {name}: {data or source.hub_id} has {len(table)} rows where {source.rows} are expected: it is "
            f"another version or incomplete; pass {DATA} the full set, and --limit for a part of it"
        )
    rows, folder = [], data and _folder_of(Path(data).expanduser(), name)
    for number, row in enumerate(table):
        if number == limit:
            break
        try:
            question = _question(source, row, folder)
        except KeyError as error:
            raise ValueError(f"benchmark {name}: no column {error} among {', '.join(row)}; rename yours") from error
        except (AttributeError, IndexError, SyntaxError, TypeError, ValueError) as error:  # a column of another kind
            raise ValueError(
                f"benchmark {name}: row {number} is not as in {source.hub_id or 'the release'} ({error}): take a copy "
                "with columns of the same kinds"
            ) from error
        if None in question.get("images", ()):
            raise ValueError(f"benchmark {name}: row {number} has no image where its prompt names one")
        if question["answer"] is None:
            raise ValueError(f"benchmark {name}: row {number} has no answer: take a copy that has all of them")
        rows.append({"id": str(number), **question})
    columns = source.columns if source.metric else ()
    return Benchmark(name, rows, source.score, source.decoding, source.samples, source.metric, columns)


def _question(source: Source, row: Row, folder: Path | None) -> Row:
    question = {name: row[name] for name in source.columns}
    question |= {"prompt": source.prompt(row), "answer": source.answer(row)}
    if source.images is not None:
        question["images"] = [_file_of(image, folder) for image in source.images(row)]
    return question


def _file_of(image: Any, folder: Path | None) -> Any:
    """An image; one that is a path is relative to the folder of the file that names it."""
    return {"path": str(folder / image), "bytes": None} if isinstance(image, str) else image


def _folder_of(path: Path, name: str) -> Path:
    file = _file(path, name)
    return file if file.is_dir() else file.parent


def _undecoded(table):
    """The table with images left undecoded until they are used: thousands of decoded ones do not fit into memory."""
    from datasets import Image

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    return table


def _read(name: str, source: Source, data: str | Path | None):
    from datasets import load_dataset

    if data is None and source.hub_id is None:
        raise ValueError(
            f"benchmark {name} is on no hub: pass --data a local file of it (SRPO's: test.json of the SDPO release)"
        )
    try:
        if data is None:
            return load_dataset(source.hub_id, source.config, split=source.split)
        path = _file(Path(data).expanduser(), name)
        if path.is_dir():
            return load_dataset(str(path), source.config, split=source.split)
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        return load_dataset(_builder(path), data_files=str(path), split="train")
    except StopIteration as error:  # datasets raises it for files without a row
        raise ValueError(f"benchmark {name}: {data} has no rows; pass {DATA} another copy") from error
    except Exception as error:  # datasets raises many kinds; the user needs one sentence
        cause = str(error.__cause__ or error)  # datasets says in the cause why a file cannot be read
        first = (cause.strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"benchmark {name}: cannot read {data or source.hub_id} ({first}); pass {DATA} a local copy"
        ) from error


def _file(path: Path, name: str) -> Path:
    """The file of this benchmark in a folder of several, else the path itself."""
    inside = [path / f"{name}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
    return next((file for file in inside if file.is_file()), path)


def _builder(path: Path) -> str:
    return "parquet" if path.suffix == ".parquet" else "json"
