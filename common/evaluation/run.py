"""The harness: generate what is missing, append sample records, then score them and compute the metrics.

<out>/<benchmark>/identity.json   whose samples these are
<out>/<benchmark>/samples.jsonl   responses, only ever appended to, or those of --responses
<out>/<benchmark>/scored.jsonl    the same records with their scores: rewritten by each scoring
<out>/<benchmark>.json            metrics
"""

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.runs import (
    append_jsonl,
    atomic_write_json,
    exclusive,
    fingerprint,
    folder_fingerprint,
    image_digest,
    read_jsonl,
    weights_of,
    write_jsonl,
)

from .benchmarks import Benchmark
from .engines import Decoding, Engine, Prompt
from .scoring import answer_row, majority, score_records, summarize

# What a model's folder holds, by its name in identity.json
IN_FOLDER = {
    "weights": "weights",
    "base of weights": "weights of the adapter's base",
    "folder": "config, tokenizer, template or image processor",
}


def evaluate(
    engine: Engine,
    benchmark: Benchmark,
    out: str | Path,
    *,
    samples: int | None = None,
    decoding: Decoding | None = None,
    seed: int = 0,
    batch: int = 256,
) -> dict[str, Any]:
    """Generates, records and scores; returns the metrics, which are also in `<out>/<benchmark>.json`.

    Records go to `<out>/<benchmark>/samples.jsonl`, `batch` at a time: a kill loses at most one batch, and a second
    call goes on with what is missing. Raises `ValueError` if the records belong to another model, to other weights or
    another tokenizer at its path, to other questions or decoding, or if another process is at work on them.
    """
    samples = benchmark.samples if samples is None else samples
    decoding = decoding or benchmark.decoding
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples > 1 and decoding.temperature == 0:
        raise ValueError(f"{samples} samples at temperature 0 would repeat one answer: set a temperature above 0")
    out = Path(out)
    path = out / benchmark.name / "samples.jsonl"
    identity = {
        "model": engine.name,
        "weights": None,
        **weights_of(weights=engine.name),
        "folder": folder_fingerprint(engine.name),
        "engine": getattr(engine, "kind", type(engine).__name__),
        "benchmark": benchmark.name,
        "rows": question_fingerprint(benchmark.rows),
        "decoding": dataclasses.asdict(decoding),
        "engine_options": getattr(engine, "options", {}),
        "chat_template_kwargs": getattr(engine, "template_options", {}),
        "stop_token_ids": getattr(engine, "stops", []),
        "samples": samples,
        "seed": seed,
    }
    with exclusive(path.parent):
        _claim(path.with_name("identity.json"), identity)
        generate_samples(engine, benchmark.rows, path, samples, decoding, seed, batch)
        return rescore(benchmark, out)


def generate_samples(
    engine: Engine,
    rows: Sequence[dict[str, Any]],
    path: Path,
    samples: int,
    decoding: Decoding,
    seed: int = 0,
    batch: int = 256,
    keep_refused: bool = False,
) -> None:
    """Appends what is missing to the records at `path`: `samples` responses to the `prompt` of each row.

    A record has `id`, `sample`, `response`, `num_tokens` and `finish_reason`. After a kill a second call ends with the
    same file as an undisturbed one. A prompt that a server refuses is a `ValueError`, or with `keep_refused` an empty
    response; a request that fails is a `ConnectionError`.
    """
    done = {(record["id"], record["sample"]) for record in read_jsonl(path)} if path.exists() else set()
    by_id = {str(row["id"]): row for row in rows}
    wanted = [(key, sample) for sample in range(samples) for key in by_id]
    with tqdm(total=len(wanted), desc=path.parent.name, unit="sample", disable=None) as progress:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            if not done.issuperset(part):  # whole batches, so that a resumed run rounds as the straight one
                _generate(engine, part, by_id, decoding, seed, path, done, keep_refused)
            progress.update(len(part))


def rescore(benchmark: Benchmark, out: str | Path) -> dict[str, Any]:
    """Metrics of the records that are there, scored anew.

    Raises `ValueError` if some are missing, or if the questions are not those of the records.
    """
    folder = Path(out) / benchmark.name
    if not (folder / "identity.json").exists() or not (folder / "samples.jsonl").exists():
        raise ValueError(f"{folder} holds no records of {benchmark.name}: run the evaluation first")
    identity = identity_of(folder, benchmark)
    records = read_jsonl(folder / "samples.jsonl")
    wanted = identity.get("samples", 0) * len(benchmark.rows)  # not recorded for someone else's responses
    if len(records) < wanted:
        raise ValueError(f"{folder} holds {len(records)} of {wanted} responses: the same evaluation goes on there")
    return _score(benchmark, records, Path(out), identity)


def score_responses(benchmark: Benchmark, responses: str | Path, out: str | Path) -> dict[str, Any]:
    """Metrics of responses that someone else generated.

    `responses`: JSON lines with `id` (the question's number in the data, from 0) and `response`; `sample`,
    `num_tokens` and `finish_reason` ("stop" or "length") where they are known. Without `sample`, a question's
    responses are numbered in their order. Raises `ValueError` for a line without the first two, another finish reason,
    a sample that comes twice, an unknown question, or a question without a response.
    """
    path = Path(responses)
    if not path.is_file():
        raise ValueError(f"there is no file of responses {path}")
    records = _foreign(path)
    identity = {"responses": str(path), "benchmark": benchmark.name, "rows": question_fingerprint(benchmark.rows)}
    _claim(Path(out) / benchmark.name / "identity.json", identity)
    metrics = _score(benchmark, records, Path(out), identity)
    write_jsonl(Path(out) / benchmark.name / "samples.jsonl", records)  # for `rescore`
    return metrics


def scores_by_question(out: str | Path, benchmark: str) -> list[list[float]]:
    """Scores of a finished evaluation by question and sample, questions in the order of their ids."""
    scores: dict[str, list[float]] = {}
    for record in read_jsonl(Path(out) / benchmark / "scored.jsonl"):
        scores.setdefault(record["id"], []).append(record["score"])
    return [scores[key] for key in sorted(scores)]


def paired_scores(a: str | Path, b: str | Path, benchmark: str) -> tuple[list[list[float]], list[list[float]]]:
    """`scores_by_question` of two finished evaluations; `ValueError` if their questions differ."""
    check_same_questions(a, b, benchmark)
    return scores_by_question(a, benchmark), scores_by_question(b, benchmark)


def check_same_questions(a: str | Path, b: str | Path, benchmark: str) -> None:
    """Raises `ValueError` if two evaluations of a benchmark have different questions, by their metrics' digests."""
    rows = [json.loads((Path(out) / f"{benchmark}.json").read_text())["rows"] for out in (a, b)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"{a} and {b} hold evaluations of {benchmark} on other questions, which no difference can be taken of: "
            "evaluate one of them anew with the data and limit of the other"
        )


def _foreign(path: Path) -> list[dict[str, Any]]:
    """Records of a file that someone else wrote: its last line counts even without a newline."""
    records, seen, counts = [], set(), Counter()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): repair or remove the line") from error
        if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("response"), str):
            raise ValueError(f"{path}, line {number}: a record needs `id` and `response`, a string")
        tokens = record.get("num_tokens")
        if not isinstance(tokens, int | float | None):
            raise ValueError(f"{path}, line {number}: num_tokens must be a number, got {tokens!r}")
        record["num_tokens"] = None if tokens != tokens else tokens  # in tables NaN means not known
        if (reason := record.get("finish_reason")) not in ("stop", "length", None):
            raise ValueError(f'{path}, line {number}: finish_reason must be "stop" or "length", got {reason!r}')
        key, sample = str(record["id"]), record.get("sample")
        if isinstance(sample, list | dict):
            raise ValueError(f"{path}, line {number}: sample must be a number, got {sample!r}")
        sample = counts[key] if sample is None or sample != sample else sample
        if (key, sample) in seen:
            raise ValueError(f"{path}, line {number}: sample {sample} of question {key} stands there twice")
        seen.add((key, sample))
        counts[key] += 1
        records.append({**record, "id": key, "sample": sample})
    return records


def _score(benchmark: Benchmark, records: list[dict[str, Any]], out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    rows = {str(row["id"]): row for row in benchmark.rows}
    unknown = {record["id"] for record in records} - rows.keys()
    missing = rows.keys() - {record["id"] for record in records}
    if unknown or missing:
        what = f"no question {min(unknown)!r}" if unknown else f"no response to question {min(missing)!r}"
        raise ValueError(
            f"benchmark {benchmark.name}: there is {what} ({len(unknown)} unknown questions, {len(missing)} without a "
            "response): the records and the data must be of the same questions"
        )
    if benchmark.metric:
        _check_same_samples(benchmark.name, records)
    scored = score_records(benchmark, records, rows)
    metrics = {**identity, **benchmark.settings, **summarize(scored)}
    if benchmark.score is answer_row and metrics["samples"] > 1:
        metrics["maj@k"] = majority(scored, rows)
    if benchmark.metric:
        metrics["metric"] = benchmark.metric(scored)
    write_jsonl(out / benchmark.name / "scored.jsonl", scored)
    atomic_write_json(out / f"{benchmark.name}.json", metrics)
    return metrics


def _check_same_samples(name: str, records: Sequence[dict[str, Any]]) -> None:
    """A metric may take the questions of one sample together: numbered on through a file, each would stand alone."""
    samples: dict[str, set[Any]] = {}
    for record in records:
        samples.setdefault(record["id"], set()).add(record["sample"])
    first, numbers = next(iter(samples.items()))
    if (other := next((key for key, found in samples.items() if found != numbers), None)) is not None:
        raise ValueError(
            f"benchmark {name}: question {first} has sample {_some(numbers)}, question {other} has "
            f"{_some(samples[other])}: number the samples of each question alike, such as from 0, or leave sample out"
        )


def _some(numbers: set[Any]) -> str:
    return ", ".join(sorted(map(str, numbers))[:8])


def question_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Digest of ids, prompts, gold answers and images, which tells whose records a folder holds."""
    return fingerprint(
        [[row["id"], row["prompt"], row["answer"], *map(image_digest, row.get("images") or ())] for row in rows]
    )


def _generate(
    engine: Engine,
    part: list[tuple[str, int]],
    rows: dict[str, dict[str, Any]],
    decoding: Decoding,
    seed: int,
    path: Path,
    done: set[tuple[str, int]],
    keep_refused: bool,
) -> None:
    prompts = [Prompt(rows[key]["prompt"], _opened(rows[key].get("images") or (), key)) for key, _ in part]
    seeds = [_sample_seed(seed, key, sample) for key, sample in part]
    completions, records = engine.generate(prompts, decoding, seeds), []
    for (key, sample), completion in zip(part, completions, strict=True):
        if completion is None or (completion.finish_reason == "refused" and not keep_refused):
            break  # what follows comes again, so that the order of the records is that of an undisturbed run
        if (key, sample) not in done:
            record = {"id": key, "sample": sample, "response": completion.text}
            counts = {"num_tokens": completion.num_tokens, "finish_reason": completion.finish_reason}
            records.append({**record, **counts})
    append_jsonl(path, *records)
    if lost := sum(completion is None for completion in completions):
        raise ConnectionError(f"{lost} of {len(part)} requests to {engine.name} failed; the same command goes on here")
    refused = sum(completion.finish_reason == "refused" for completion in completions)
    if refused and not keep_refused:
        raise ValueError(
            f"{engine.name} refuses {refused} of {len(part)} prompts: serve it with a longer context or leave them out"
        )


def _opened(images: Sequence[Any], key: str) -> list[Any]:
    """PIL images in RGB, with alpha dropped as in the data of training: vLLM and transformers 5.23's processors put
    white behind transparent pixels, and PNG, in which a server gets images, has no CMYK.

    Raises `ValueError`, which names the question, for an image of more than 8 bits, and for one of floats up to 1.
    """
    from datasets import Image

    opened = [Image().decode_example(image) if isinstance(image, dict) else image for image in images]
    for image in opened:
        deep = image.convert("I") if image.mode.startswith("I;16") else image  # I;16B cannot say its extrema
        highest = deep.getextrema()[1] if deep.mode in ("I", "F") else 0
        dark = deep.mode == "F" and 0 < highest <= 1
        if highest > 255 or dark:
            turned = "below 1 would turn black" if dark else "above 255 would turn white"
            raise ValueError(
                f"question {key} has an image of mode {image.mode} and values up to {highest:g}, of which all "
                f"{turned}: scale it to 8 bits in the data"
            )
    return [image.convert("RGB") for image in opened]


def _sample_seed(seed: int, key: str, sample: int) -> int:
    """A seed of its own for every sample, the same on every machine."""
    return zlib.crc32(f"{seed}/{key}/{sample}".encode())


def read_identity(folder: Path) -> dict[str, Any]:
    """Whose records a folder holds; `ValueError` if identity.json is missing or cannot be read."""
    try:
        return {**json.loads((folder / "identity.json").read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}/identity.json, which says whose records these are, cannot be read: delete the folder or choose "
            "another --out"
        ) from error


def identity_of(folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """`read_identity`; `ValueError` also if the records are of other questions than the benchmark's."""
    identity = read_identity(folder)
    if identity.get("rows") != question_fingerprint(benchmark.rows):
        raise ValueError(f"{folder} holds records of other questions: pass the --data and --limit of that evaluation")
    return identity


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """The first evaluation with a record in a folder says whose records it holds; `ValueError` for any other."""
    if not any((path.parent / name).exists() for name in ("samples.jsonl", "scored.jsonl")):
        atomic_write_json(path, identity)
        return
    theirs = read_identity(path.parent)
    for name, value in identity.items():
        if value is not None and theirs.get(name, "nothing") not in (value, None):  # None: not known
            what = f"with {name}={theirs.get(name)!r}, this evaluation has {value!r}"
            if name == "rows":  # their digests tell a reader nothing
                what = "of other questions: --data or --limit was another one"
            if name in IN_FOLDER:
                what = f"of other {IN_FOLDER[name]}, which {theirs.get('model')!r} held then"
            raise ValueError(f"{path.parent} holds records {what}: choose another --out or delete the folder")
