"""The stages of a self-play iteration between its two trainings, and the rule that makes every stage safe to repeat.

A stage owns a folder. STARTED.json, written first, says from which inputs; DONE.json, written last, has the digests of
inputs and outputs, counts and versions. A finished stage is skipped, a started one goes on, one with other inputs is
refused. No stage writes into the folder of another; the bank is keyed by iteration, so a repeated add changes nothing.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from . import analysis, objective
from .config import RDiverseConfig
from .data import exact_value, label_accuracy, test_questions
from .memory import MemoryBank
from .questions import challenger_prompt, read_challenge, solver_prompt
from .skills import SkillEncoder
from .train import answer_decoding, same

# isort: split
from common.answers import extract_answer
from common.evaluation import Benchmark, Decoding, Engine, evaluate, generate_samples, load_benchmark
from common.runs import append_jsonl, atomic_write_json, fingerprint, read_jsonl, write_jsonl

SMALL = 1 << 26  # bytes up to which a finished stage's files are read again before they are trusted
PACKAGES = ("torch", "transformers", "trl", "numpy", "scikit-learn")
BATCH = 512  # responses between two writes


class StageError(ValueError):
    """A stage cannot run or cannot be trusted. The message names the folder and the remedy."""


# --- one stage ---


def once(folder: Path, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Does `work(folder)` unless it is done, and returns the content of DONE.json.

    Args:
        folder: of the stage.
        inputs: what decides the result beside the run's settings: digests of the stages before, numbers, names.
        work: makes the files of the folder and returns counts. Called again after a kill, it must end with the same.

    Raises `StageError` where the folder was started from other inputs, or where a file changed after the stage ended.
    """
    for name in ("STARTED.json", "DONE.json"):
        if (folder / name).exists():
            _check_inputs(folder, _read_json(folder / name).get("inputs", {}), inputs)
    if (folder / "DONE.json").exists():
        done = _read_json(folder / "DONE.json")
        _check_outputs(folder, done["outputs"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "STARTED.json", {"inputs": inputs})
        started = time.monotonic()
        counts = work(folder)
        for draft in (path for path in folder.rglob(".*") if path.is_file()):
            draft.unlink()  # of a writer that was killed
        outputs = {str(path.relative_to(folder)): _entry(path) for path in _outputs(folder)}
        versions = {package: version(package) for package in PACKAGES}
        done = {"inputs": inputs, "outputs": outputs, "counts": counts, "versions": versions}
        append_jsonl(
            folder.parent.parent / "stages.jsonl",
            {"iteration": folder.parent.name, "stage": folder.name, "seconds": time.monotonic() - started},
        )
        atomic_write_json(folder / "DONE.json", done)
    for checkpoint in folder.glob("checkpoint-*"):  # only a phase that is not done needs them
        shutil.rmtree(checkpoint)
    return done


def digest(done: dict[str, Any]) -> str:
    """What a later stage calls the result of this one."""
    return fingerprint({name: entry["sha256"] for name, entry in done["outputs"].items()})


def read_counts(folder: Path) -> dict[str, Any]:
    """What a finished stage has counted."""
    return _read_json(folder / "DONE.json")["counts"]


def _outputs(folder: Path) -> list[Path]:
    """All files but logs with times in them, markers and checkpoints."""
    skipped = {"DONE.json", "STARTED.json", "metrics.jsonl"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)
    relative = ((path.relative_to(folder).parts[0], path) for path in sorted(files))
    return [path for first, path in relative if not first.startswith(("checkpoint-", ".", "logs"))]


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _check_inputs(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise StageError(
                f"{folder} was made with {name}={theirs.get(name)!r}, now it is {ours.get(name)!r}: delete this "
                "folder and those of the stages and iterations after it to make them anew"
            )


def _check_outputs(folder: Path, outputs: dict[str, dict[str, Any]]) -> None:
    for name, entry in outputs.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise StageError(f"{path} is missing or has another size than when its stage ended: delete {folder}")
        if entry["bytes"] <= SMALL and _entry(path) != entry:
            raise StageError(f"{path} was changed after its stage had ended: delete {folder} to make it anew")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StageError(f"{path} is no JSON ({error}): delete {path.parent} to make it anew") from error


# --- generate, label, embed, filter, evaluate ---


def generate(folder: Path, engine: Engine, run: RDiverseConfig, key: str) -> dict[str, Any]:
    """Outputs of the frozen Challenger. `key` names iteration and round: no two draw the same random numbers."""
    decoding = Decoding(run.question_temperature, run.question_top_p, run.question_tokens)
    rows = [{"id": key, "prompt": challenger_prompt(run.challenger_system, run.challenger_user)}]
    path = folder / "samples.jsonl"
    generate_samples(engine, rows, path, run.candidates, decoding, run.seed, BATCH)
    failures = Counter(read_challenge(record["response"]).failure or "valid" for record in read_jsonl(path))
    return {"outputs": run.candidates, **dict(sorted(failures.items()))}


def label(folder: Path, engine: Engine, run: RDiverseConfig, raw: Path) -> dict[str, Any]:
    """Majority answer and self-consistency of the questions in `raw`, with the reason of each that is dropped."""
    challenges = [(record["sample"], read_challenge(record["response"])) for record in read_jsonl(raw)]
    rows = [
        {"id": str(sample), "prompt": solver_prompt(challenge.question, run.solver_system), "question": challenge}
        for sample, challenge in challenges
        if challenge.valid
    ]
    path = folder / "samples.jsonl"
    generate_samples(engine, rows, path, run.m_label, answer_decoding(run), run.seed, BATCH)
    answers = _answers(path) if rows else {}
    labelled = [_labelled(row["id"], row["question"], answers[row["id"]], run) for row in rows]
    write_jsonl(folder / "labelled.jsonl", labelled)
    dropped = Counter(row["drop"] or "usable" for row in labelled)
    shares = [row["consistency"] for row in labelled]
    histogram = np.histogram(shares, bins=np.arange(12) / 10 - 0.05)[0].tolist()  # s = 0, 0.1, ..., 1
    return {"questions": len(rows), **dict(sorted(dropped.items())), "consistency": histogram}


def gate(folder: Path, engine: Engine, run: RDiverseConfig, labelled: Path) -> dict[str, Any]:
    """Validity gate, not in the paper: usable questions whose label the base model's majority shares."""
    rows = [row for row in read_jsonl(labelled) if row["drop"] is None]
    asked = [{"id": row["id"], "prompt": solver_prompt(row["question"], run.solver_system)} for row in rows]
    path = folder / "samples.jsonl"
    generate_samples(engine, asked, path, run.gate_samples, answer_decoding(run), run.seed + 1, BATCH)
    answers = _answers(path) if rows else {}
    for row in rows:
        majority, row["gate_consistency"] = objective.self_consistency(answers[row["id"]], same)
        agrees = majority is not None and (same(majority, row["answer"]) or same(row["answer"], majority))
        row["drop"] = None if agrees else "gate"
    write_jsonl(folder / "labelled.jsonl", rows)
    return {"questions": len(rows), "usable": sum(row["drop"] is None for row in rows)}


def _answers(path: Path) -> dict[str, list[str | None]]:
    answers: dict[str, list[str | None]] = {}
    for record in read_jsonl(path):
        answers.setdefault(record["id"], []).append(extract_answer(record["response"]))
    return answers


def _labelled(key: str, challenge, answers: list[str | None], run: RDiverseConfig) -> dict[str, Any]:
    majority, consistency = objective.self_consistency(answers, same)
    return {
        "id": key,
        "question": challenge.question,
        "answer": majority,
        "consistency": consistency,
        "drop": objective.drop_reason(challenge.question, majority, consistency, run.low, run.high, run.r_zero_words),
        "answers": answers,
        "own_answer": challenge.answer,
    }


def usable(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Questions of several rounds that were not dropped, in order."""
    return [row for file in files for row in read_jsonl(file) if row["drop"] is None]


def embed(folder: Path, skills: SkillEncoder, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Skill vectors of the usable questions; a row without one is NaN."""
    questions = [row["question"] for row in rows]
    programs = skills.programs(questions)
    embeddings, ok = skills.embed(programs)
    temporary = folder / ".embeddings.npy"
    np.save(temporary, embeddings)
    temporary.rename(folder / "embeddings.npy")
    records = [{"question": q, "code": p.code, "failure": p.failure} for q, p in zip(questions, programs, strict=True)]
    write_jsonl(folder / "programs.jsonl", records)
    failures = Counter(program.failure for program in programs if program.failure)
    cosines = analysis.batch_cosines(embeddings[ok]) if ok.sum() > 1 else np.zeros(0)
    median = float(np.median(cosines)) if len(cosines) else None
    return {"encoder": skills.name, "ok": int(ok.sum()), **dict(sorted(failures.items())), "median_cosine": median}


def select(
    folder: Path, run: RDiverseConfig, iteration: int, rows: Sequence[dict[str, Any]], embedded: Path, bank_path: Path
) -> dict[str, Any]:
    """Filter, memory update and replay: the Solver's questions, a share of them from the past with their labels."""
    embeddings = np.load(embedded / "embeddings.npy")
    encoder = read_counts(embedded)["encoder"]
    remembers = run.penalty == "r_diverse"
    ok = np.isfinite(embeddings).all(1) if len(rows) else np.zeros(0, bool)
    kept = [i for i in range(len(rows)) if ok[i] or not remembers]
    current = [{k: rows[i][k] for k in ("question", "answer")} for i in kept]
    bank, replayed = MemoryBank(bank_path, encoder), []
    if remembers:
        columns = [row["question"] for row in current], embeddings[kept], [row["answer"] for row in current]
        bank.add(*columns, iteration)
        number = objective.replay_count(len(current), run.replay_fraction)
        replayed = bank.before(iteration).sample(number, seed=1000 * run.seed + iteration)
    mixed = [{**row, "iteration": iteration} for row in current]
    mixed += [{k: row[k] for k in ("question", "answer", "iteration")} for row in replayed]
    order = np.random.default_rng([run.seed, iteration]).permutation(len(mixed))
    write_jsonl(folder / "solver_data.jsonl", (mixed[i] for i in order))
    write_jsonl(folder / "audit.jsonl", _audit(rows, kept, [run.seed, iteration, 1]))
    sources = Counter(row["iteration"] for row in replayed)
    return {
        "current": len(current),
        "replayed": len(replayed),
        "replayed_from": {str(t): sources[t] for t in sorted(sources)},
        "bank": len(bank.before(iteration + 1)) if remembers else 0,
        "label_accuracy": label_accuracy(current),
    }


def _audit(rows: Sequence[dict[str, Any]], kept: Sequence[int], seed: list[int], count: int = 50) -> list[dict]:
    """Some new questions of the Solver for a person to read: label, votes, and the exact value where it is known."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(kept))[:count].tolist())
    names = ("question", "answer", "consistency", "own_answer", "answers")
    found = ({name: rows[kept[i]][name] for name in names} for i in chosen)
    return [{**row, "exact": exact_value(row["question"])} for row in found]


def score(folder: Path, engine: Engine, run: RDiverseConfig) -> dict[str, Any]:
    """Accuracy of a Solver on the run's benchmarks."""
    results = {}
    for name in filter(None, (part.strip() for part in run.benchmarks.split(","))):
        benchmark = (
            arithmetic_benchmark(run) if name == "arithmetic" else load_benchmark(name, run.data, run.eval_limit)
        )
        metrics = evaluate(engine, benchmark, folder, seed=run.seed)
        results[name] = {"avg@k": metrics["avg@k"], "interval": metrics["interval"], "parsed": metrics["parsed"]}
    return results


def arithmetic_benchmark(run: RDiverseConfig) -> Benchmark:
    """The embedded test questions, sampled as the Solver's answers are."""
    rows = test_questions()[: run.eval_limit]
    return Benchmark(
        "arithmetic",
        [{**row, "prompt": solver_prompt(row["question"], run.solver_system)} for row in rows],
        decoding=Decoding(1.0, 1.0, run.answer_tokens),
        samples=run.eval_samples,
    )


def check_alarm(
    run: RDiverseConfig,
    iteration: int,
    embeddings: Sequence[np.ndarray],
    candidates: int,
    labels: float | None = None,
    entropy: float | None = None,
) -> str | None:
    """What has collapsed in this iteration, if anything has.

    Args:
        embeddings: of the usable questions, by iteration.
        candidates: outputs of the Challenger in this iteration.
        labels: share of right labels, None if it cannot be known.
        entropy: of the Challenger's tokens at the end of its phase, in nats.
    """
    now = embeddings[-1]
    if len(now) < run.alarm_yield * candidates:
        return f"only {len(now)} of {candidates} candidates are usable"
    if labels is not None and labels < run.alarm_labels:
        return f"only {labels:.0%} of the labels of iteration {iteration} are right"
    if entropy is not None and entropy < run.alarm_entropy:
        return f"the Challenger's entropy has fallen to {entropy:.3f} nats a token in iteration {iteration}"
    inside = analysis.intra_repetition(now)
    past = np.concatenate(embeddings[:-1]) if len(embeddings) > 1 else now[:0]
    across = analysis.cross_repetition(now, past) if len(past) else 0.0
    for share, where in ((inside, "another one of this iteration"), (across, "one of an earlier iteration")):
        if share > run.alarm_duplicates:
            return f"{share:.0%} of the questions of iteration {iteration} repeat {where}"
    return None
