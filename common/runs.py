"""Run folders: settings, manifest, metrics, samples; files are written so that a kill at any moment loses nothing.

    runs/<method>/<experiment>/<variant>-seed<k>/
      config.yaml  manifest.json  metrics.jsonl  samples.jsonl  checkpoint-*/  eval/  figures/

Whole files are written to a temporary name in the same folder, fsynced and renamed; lines of .jsonl files are appended
in one write. JSON has no NaN or infinity: they are written as null.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from common.versions import TESTED, installed

COMPLETE = "complete.json"  # in a checkpoint: the size of each of its files; false while it is written or thinned out
UNFINISHED = "it was not saved to its end"
WEIGHTS = "*model*.safetensors"  # of a model or an adapter, in its folder
BLOCKS, BLOCK_BYTES = 64, 1 << 16  # parts of a weights file that tell it from another: how many, and their size
# Files beside a model's weights that determine its answers; none that differs between equal trainings, but for the
# order of modules in adapter_config.json: PEFT writes a set, whose order depends on PYTHONHASHSEED
DECIDING = (
    "config.json", "adapter_config.json", "*token*", "vocab*", "merges.txt", "*.model", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def check_writable(folder: Path) -> None:
    """Makes the folder and a nameless file in it, so that an `OSError` comes now and not after minutes of work."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes the whole file or nothing; a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """The whole file or nothing; numpy values, paths and non-finite floats as `_plain` writes them."""
    atomic_write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, *records: dict[str, Any]) -> None:
    """Appends a line for each record, all on disk when this returns; without records no file is made.

    A half-written line of a killed writer is dropped first. A kill leaves the first few records, the last of them
    maybe half-written. Each call waits for the disk, which takes long on network file systems: pass many records.
    """
    if not records:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records)
    with path.open("ab+") as file:
        if file.tell() and not _ends_line(file):
            _drop_half_line(file)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file, without a half-written last line. `ValueError` for a broken line before it."""
    content = Path(path).read_bytes()
    lines = content.split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is no whole line
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): repair or remove the line") from error
    return records


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """The whole file or nothing, each record on a line."""
    atomic_write_text(path, "".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records))


def truncate_jsonl(path: str | Path, step: int) -> None:
    """Drops from a log, if there is one, what a run that resumes at `step` will write again.

    That is all records after `step`, and the one with which transformers closes a training, whatever its step.
    """
    if Path(path).exists():
        kept = (r for r in read_jsonl(path) if r["step"] <= step and "train_runtime" not in r)
        write_jsonl(path, kept)


def by_number(path: Path) -> list[tuple[int, str]]:
    """Key to sort paths by: checkpoint-50 is before checkpoint-100, and seed 2 before seed 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def fingerprint(value: Any) -> str:
    """SHA-256 of a file or folder (a `Path`) or of any JSON value: tells whether data are the same.

    Hidden files of a folder do not count: what git, a file manager or a download keeps there changes by itself.
    """
    digest = hashlib.sha256()
    if isinstance(value, Path):
        for file in [value] if value.is_file() else sorted(_visible_files(value)):
            digest.update(str(file.relative_to(value)).encode() + b"\0")
            with file.open("rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
    else:
        digest.update(json.dumps(_plain(value), sort_keys=True).encode())
    return digest.hexdigest()


def image_digest(image: Any) -> str:
    """SHA-256 of an image: of its file, where it is one as the package datasets gives it undecoded, else of a PIL
    image's pixels."""
    if isinstance(image, dict):
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    else:
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder except those that are hidden or in a hidden folder (a name that starts with a dot)."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def weights_fingerprint(model: str) -> str | None:
    """Digest of the weights in a local folder, which may be replaced under the same path; None for any other name.

    It covers the sizes and evenly spread blocks: to read a large model's files whole would take minutes. The
    self-teacher in a checkpoint does not count: it is deleted when the run goes on. Nor does what a kill has left in a
    checkpoint while its weights were written or deleted.
    """
    files = [] if _json(Path(model) / COMPLETE) is False else sorted(Path(model).glob(WEIGHTS))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\0".encode())
        with file.open("rb") as content:
            for i in range(BLOCKS):
                content.seek(i * size // BLOCKS)
                digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest() if files else None


def folder_fingerprint(model: str) -> str | None:
    """Digest of the configs of model and adapter, tokenizer, chat template and image processor in a local folder; None
    for any other name."""
    files = {file for pattern in DECIDING for file in Path(model).glob(pattern) if file.is_file()}
    return fingerprint({file.name: fingerprint(file) for file in files}) if files else None


def weights_of(**models: str) -> dict[str, str]:
    """`weights_fingerprint` of each model that is a local folder, under the name of its field; of an adapter also that
    of its base, if it is one too."""
    digests = {}
    for name, model in models.items():
        if digest := weights_fingerprint(model):
            digests[name] = digest
            base = (_json(Path(model) / "adapter_config.json") or {}).get("base_model_name_or_path")
            if base and (digest := weights_fingerprint(base)):
                digests[f"base of {name}"] = digest
    return digests


def folders_of(**models: str) -> dict[str, str]:
    """`folder_fingerprint` of each model that is a local folder, under the name of its field."""
    digests = {name: folder_fingerprint(model) for name, model in models.items()}
    return {name: digest for name, digest in digests.items() if digest}


def checkpoints(path: str | Path) -> dict[int, Path]:
    """`checkpoint-<step>` folders by step, in order."""
    found = ((folder.name.removeprefix("checkpoint-"), folder) for folder in Path(path).glob("checkpoint-*"))
    return dict(sorted((int(step), folder) for step, folder in found if step.isdigit()))


def last_checkpoint(path: str | Path) -> Path | None:
    """The newest whole `checkpoint-<step>` in a run folder; None without one."""
    return next((folder for folder in reversed(checkpoints(path).values()) if not checkpoint_fault(folder)), None)


def checkpoint_fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a whole one.

    One without complete.json, written by other code, was finished if it has trainer_state.json, which comes last.
    """
    marked, sizes = (folder / COMPLETE).exists(), _json(folder / COMPLETE)
    if sizes is False or (not marked and not _json(folder / "trainer_state.json")):
        return UNFINISHED
    if marked and sizes is None:
        return f"{COMPLETE} cannot be read"
    for name, size in (sizes or {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    if not any(folder.glob("optimizer*")) and not any(folder.glob("global_step*/*")):
        return "it holds no state of the optimizer"  # transformers would go on with a new one
    return None


def _json(path: Path) -> Any:
    """Content of a JSON file; None if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def begin_checkpoint(folder: Path) -> None:
    """Makes an empty checkpoint folder that is marked as not whole."""
    shutil.rmtree(folder, ignore_errors=True)
    atomic_write_json(folder / COMPLETE, False)


def complete_checkpoint(folder: Path) -> None:
    """Flushes a checkpoint's files to disk, then marks it as whole."""
    sizes, parents = {}, {folder.parent}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = os.fstat(file.fileno()).st_size
        parents.add(path.parent)
    for parent in parents:
        _sync_folder(parent)
    atomic_write_json(folder / COMPLETE, sizes)


@contextlib.contextmanager
def exclusive(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keeps other processes from working in a folder while this one does; a kill frees it. With another `name` of the
    lock's file only those with the same one.

    Raises `ValueError` if another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process: wait for it, or choose another out") from error
    try:
        yield
    finally:
        lock.release()


def claim(
    path: Path, settings: dict[str, Any], has_results: bool, anew: str = "move the folder away to make them anew"
) -> None:
    """Ties a folder of results to the settings that decide them, which the first call writes to `path`.

    `has_results` is whether the folder holds results: without any it is claimed anew. `anew` is how others are made.
    Raises `ValueError` if the results are of other settings, or if nothing records their settings.
    """
    if not has_results:
        atomic_write_json(path, settings)
        return
    try:
        theirs = json.loads(path.read_text()) if path.exists() else {}
        differing = [name for name, value in settings.items() if theirs.get(name, value) != value]
    except (ValueError, AttributeError):
        theirs = {}
    if not theirs:
        raise ValueError(
            f"{path.parent} holds results, but no readable {path.name} that says of which settings: {anew}"
        )
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path.parent} holds results of {name}={theirs[name]!r}, these settings have {settings[name]!r}: set "
            f"{name} back, or {anew}"
        )


FORMAT = 2  # of the manifest


class RunFolder:
    """A run's folder, opened with `RunFolder.open`. As a context manager it records how the run ended."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: dict[str, Any],
        *,
        data: dict[str, str],
        seed: int,
        free: dict[str, Any] | None = None,
        models: dict[str, str] | None = None,
    ) -> "RunFolder":
        """Starts a run in a new folder, or goes on with the same run in its own.

        Args:
            path: the folder.
            config: settings that define the run, of JSON types.
            data: fingerprint of each data set by name.
            seed: of the run.
            free: settings that may change from one start to the next: config.yaml has the newest, nothing compares
                them.
            models: hub id or folder of each model that a run begins with, by field; the contents of folders are
                compared.

        Raises `ValueError` if the folder holds a run with other settings, data or models, or something else.
        """
        path, config, models = Path(path), _plain(config), models or {}
        contents = {"weights": weights_of(**models), "folders": folders_of(**models)}
        path.mkdir(parents=True, exist_ok=True)
        if (path / "manifest.json").exists():
            manifest = _same_run(path, config, data, seed)
            _check_models(path, manifest, contents)
            manifest["resumed"] = [*manifest["resumed"], _now()]
            manifest.pop("error", None)  # of the previous start
        elif any(not file.name.startswith(".") for file in path.iterdir()):  # not a killed writer's draft
            raise ValueError(f"{path} holds files but no manifest.json, so it is no run folder: choose another out=")
        else:
            manifest = _new_manifest(config, data, seed) | contents
        folder = cls(path, manifest)
        if not folder.is_done:
            folder._write(state="running", ended=None)  # first, since it says whose folder this is
        file, text = path / "config.yaml", yaml.safe_dump(config | _plain(free or {}), sort_keys=False)
        if not file.exists() or (free is not None and file.read_text() != text):
            atomic_write_text(file, text)
        return folder

    @property
    def is_done(self) -> bool:
        return is_done(self.path)

    def restart(self) -> None:
        """Marks a finished run as running: it has more to do."""
        self._write(state="running", ended=None)

    def finish(self, state: str = "done", **extra: Any) -> None:
        self._write(state=state, ended=_now(), **extra)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            interrupted = issubclass(kind, (KeyboardInterrupt, SystemExit))
            with contextlib.suppress(OSError):  # when the disk is full, say; the first error counts
                self.finish("interrupted" if interrupted else "failed", error=f"{kind.__name__}: {error}")
            error.add_note(f"in {self.path}")

    def _write(self, **changes: Any) -> None:
        self.manifest.update(changes)
        atomic_write_json(self.path / "manifest.json", self.manifest)


def is_done(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    manifest = run / "manifest.json"
    try:
        return manifest.exists() and json.loads(manifest.read_text()).get("state") == "done"
    except (ValueError, AttributeError):
        return False  # opening the folder says what is wrong with it


def settings_of(run: Path) -> dict[str, Any]:
    """Settings of a training by its manifest; {} for a model that was evaluated without one."""
    manifest = run / "manifest.json"
    return json.loads(manifest.read_text())["config"] if manifest.exists() else {}


def trained_with(runs: Mapping[str, Path], fields: Sequence[str]) -> str:
    """A sentence with settings of trainings, from their manifests, such as "Trained with model `a`, teacher `b`.";
    runs are named if their settings differ. "" without any training."""
    kinds: dict[str, list[str]] = {}
    for name, run in runs.items():
        if config := settings_of(run):
            kind = ", ".join(f"{field} `{config[field]}`" for field in fields if field in config)
            kinds.setdefault(kind, []).append(name)
    said = [kind if len(kinds) == 1 else f"{kind} ({', '.join(names)})" for kind, names in kinds.items()]
    return f"Trained with {'; '.join(said)}." if any(kinds) else ""


def _same_run(path: Path, config: dict, data: dict[str, str], seed: int) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        theirs = {
            **manifest["config"],
            "seed": manifest["seed"],
            **{f"data {k}": v for k, v in manifest["data"].items()},
        }
        manifest["state"], manifest["resumed"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}/manifest.json cannot be read ({error!r}): choose another out= or delete the folder"
        ) from error
    ours = {**config, "seed": seed, **{f"data {k}": v for k, v in data.items()}}
    for name in sorted(ours.keys() | theirs.keys()):
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name)):
            wanted, found = (repr(side[name]) if name in side else "its default" for side in (ours, theirs))
            raise ValueError(
                f"{path} belongs to a run with {name}={found}, this one has {wanted}: give the flags that it was "
                "begun with (its config.yaml has all), choose another out=, or delete the folder"
            )
    return manifest


def _check_models(path: Path, manifest: dict[str, Any], contents: dict[str, dict[str, str]]) -> None:
    """Compares the digests of the models' folders that both sides have; raises `ValueError` if one differs."""
    for kind, held in {"weights": "other weights", "folders": "another config, tokenizer or template"}.items():
        ours, theirs = contents[kind], manifest.get(kind, {})
        for name in sorted(theirs.keys() & ours.keys()):
            if theirs[name] != ours[name]:
                raise ValueError(
                    f"{path} belongs to a run that began when the folder of {name} held {held}: put back what it "
                    "held, choose another out=, or delete the folder of the run"
                )


def _new_manifest(config: dict, data: dict[str, str], seed: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "state": "running",
        "started": _now(),
        "ended": None,
        "resumed": [],
        "command": shlex.join(sys.argv),
        "seed": seed,
        "data": data,
        "config": config,
        "git": _git(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "packages": dict.fromkeys(TESTED) | installed(),
    }


def _git() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    torch = sys.modules.get("torch")  # asking for GPUs is not worth importing torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "memory_bytes": memory, "gpus": gpus}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """`value` in JSON types: numpy values as numbers and lists, paths as text, non-finite floats as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _ends_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _drop_half_line(file) -> None:
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # some file systems do not open folders; the rename itself is still atomic
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
