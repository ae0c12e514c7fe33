"""The harness: generate what is missing, append sample records, then compute the metrics from them."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.runs import append_jsonl, atomic_write_json, atomic_write_text, fingerprint, read_jsonl

from .benchmarks import Benchmark
from .engines import Decoding, Engine, Prompt
from .scoring import score_record, summarize


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
    call goes on with what is missing. Raises `ValueError` where the records belong to another model, question set or
    decoding.
    """
    samples, decoding = samples or benchmark.samples, decoding or benchmark.decoding
    if samples > 1 and decoding.temperature == 0:
        raise ValueError(f"{samples} samples at temperature 0 would repeat one answer: set a temperature above 0")
    out = Path(out)
    path = out / benchmark.name / "samples.jsonl"
    identity = {
        "model": engine.name,
        "benchmark": benchmark.name,
        "rows": fingerprint([[row["id"], row["prompt"], row["answer"]] for row in benchmark.rows]),
        "decoding": dataclasses.asdict(decoding),
        "samples": samples,
        "seed": seed,
    }
    _claim(path.with_name("identity.json"), identity)
    done = {(record["id"], record["sample"]) for record in read_jsonl(path)} if path.exists() else set()
    rows = {str(row["id"]): row for row in benchmark.rows}
    wanted = [(key, sample) for sample in range(samples) for key in rows]
    with tqdm(total=len(wanted), desc=benchmark.name, unit="sample", disable=None) as progress:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            if not done.issuperset(part):  # whole batches, so that a resumed run draws the same random numbers
                _generate(engine, part, rows, decoding, seed, path, done)
            progress.update(len(part))
    return rescore(benchmark, out, identity)


def rescore(benchmark: Benchmark, out: str | Path, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """Metrics of the records that are there, scored anew."""
    out = Path(out)
    path = out / benchmark.name / "samples.jsonl"
    rows = {str(row["id"]): row for row in benchmark.rows}
    records = [score_record(benchmark, record, rows) for record in read_jsonl(path)]
    metrics = {**(identity or {}), **summarize(records)}
    _write_records(path, records)
    atomic_write_json(out / f"{benchmark.name}.json", metrics)
    return metrics


def _generate(
    engine: Engine,
    part: list[tuple[str, int]],
    rows: dict[str, dict[str, Any]],
    decoding: Decoding,
    seed: int,
    path: Path,
    done: set[tuple[str, int]],
) -> None:
    prompts = [Prompt(rows[key]["prompt"], rows[key].get("images") or ()) for key, _ in part]
    seeds = [_sample_seed(seed, key, sample) for key, sample in part]
    for (key, sample), completion in zip(part, engine.generate(prompts, decoding, seeds), strict=True):
        if (key, sample) not in done:
            record = {"id": key, "sample": sample, "response": completion.text}
            append_jsonl(path, {**record, "num_tokens": completion.num_tokens, "finished": completion.finished})


def _sample_seed(seed: int, key: str, sample: int) -> int:
    """A seed of its own for every sample, the same on every machine."""
    return zlib.crc32(f"{seed}/{key}/{sample}".encode())


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """The first evaluation in a folder says whose records these are; another one is refused."""
    if not path.exists():
        atomic_write_json(path, identity)
        return
    theirs = json.loads(path.read_text())
    for name, value in identity.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{path.parent} holds records with {name}={theirs.get(name)!r}, this evaluation has {value!r}: choose "
                "another --out or delete the folder"
            )


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in records))
