"""A stage of a long experiment that is done once, whatever interrupts it.

A stage owns a folder. STARTED.json, written first, records its inputs; DONE.json, written last, has inputs, digests of
outputs, counts and versions. A finished stage is skipped, a started one goes on, one with other inputs is refused. So
is a finished one of which a file has changed: files up to `SMALL` bytes are compared by content, larger ones by size
alone, since weights would take minutes to read at every start.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.runs import append_jsonl, atomic_write_json, fingerprint
from common.versions import installed

SMALL = 1 << 26  # bytes up to which a finished stage's files are read again before they are trusted


def once(folder: Path, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Does `work(folder)` unless it is done, and returns the content of DONE.json.

    Args:
        folder: of the stage.
        inputs: what decides the result besides the run's settings: digests of earlier stages, numbers, names.
        work: makes the files of the folder and returns counts. Called again after a kill, it must end with the same.

    Raises `ValueError` if the folder was started from other inputs, or if a file is missing or has another size or, up
    to `SMALL` bytes, other content than when the stage ended.
    """
    for name in ("STARTED.json", "DONE.json"):
        if (folder / name).exists():
            _check_inputs(folder, _read_json(folder / name)["inputs"], inputs)
    if (folder / "DONE.json").exists():
        done = _read_json(folder / "DONE.json")
        _check_outputs(folder, done["outputs"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "STARTED.json", {"inputs": inputs})
        started = time.monotonic()
        counts = work(folder)
        for draft in (path for path in folder.rglob(".*") if path.is_file()):
            draft.unlink()  # left by a writer that was killed
        outputs = {str(path.relative_to(folder)): _entry(path) for path in _outputs(folder)}
        done = {"inputs": inputs, "outputs": outputs, "counts": counts, "versions": installed()}
        append_jsonl(
            folder.parent.parent / "stages.jsonl",
            {"iteration": folder.parent.name, "stage": folder.name, "seconds": time.monotonic() - started},
        )
        atomic_write_json(folder / "DONE.json", done)
    for checkpoint in folder.glob("checkpoint-*"):  # only a phase that is not done needs them
        shutil.rmtree(checkpoint)
    return done


def digest(done: dict[str, Any]) -> str:
    """Digest of a finished stage's outputs, by which later stages name them."""
    return fingerprint({name: entry["sha256"] for name, entry in done["outputs"].items()})


def read_counts(folder: Path) -> dict[str, Any]:
    """The counts that a finished stage returned."""
    return _read_json(folder / "DONE.json")["counts"]


def read_inputs(folder: Path) -> dict[str, Any]:
    """What a finished stage was made from."""
    return _read_json(folder / "DONE.json")["inputs"]


def _outputs(folder: Path) -> list[Path]:
    """All files except logs (they hold times), markers and checkpoints."""
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
            raise ValueError(
                f"{folder} was made with {name}={theirs.get(name)!r}, now it is {ours.get(name)!r}: delete this "
                "folder and those of the stages and iterations after it to make them anew"
            )


def _check_outputs(folder: Path, outputs: dict[str, dict[str, Any]]) -> None:
    for name, entry in outputs.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} is missing or has another size than when its stage ended: delete {folder}")
        if entry["bytes"] <= SMALL and _entry(path) != entry:
            raise ValueError(f"{path} was changed after its stage had ended: delete {folder} to make it anew")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete {path.parent} to make it anew") from error
