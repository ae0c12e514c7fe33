"""What the command lines of all methods share: fields from YAML and flags, one sentence for a mistake."""

import argparse
import atexit
import dataclasses
import difflib
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from safetensors import SafetensorError

from .preemption import EXIT_CODE, Preempted, sigterm_raises
from .runs import check_writable

SERVER_FIELDS = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "teacher_server",
    "teacher_server_timeout",
)
# Of a trainer's configuration: how it fits a machine, and who watches; another value is the same training
MACHINE_FIELDS = (
    "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "dataloader_num_workers", "teacher_offload",
    "report_to", "run_name", "ddp_timeout", "doctor_steps",
)  # fmt: skip
COUNTS = ("limit", "validation_size", "eval_limit", "eval_samples", "eval_batch_size", "grpo_steps")
# Of a trainer's configuration what the command decides, and what to do instead
OF_THE_COMMAND = {
    "output_dir": "set out and experiment, in whose folder each run has its own",
    "resume_from_checkpoint": "a run goes on from its own last checkpoint",
}
FULL_DISK = re.compile(  # what Python and safetensors, what torch.save, and what numpy say of it
    r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing file|\. unexpected pos \d+ vs \d+"
    r"|\d+ requested and \d+ written"
)


def run_main(name: str, command: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Runs `command(argv)`; its exit code or 0, 2 with one sentence for what the user can mend, 130 for Ctrl-C, 143
    for SIGTERM.

    With TRACEBACK=1 in the environment the error is raised as it is.
    """
    _reach_this_machine_directly()
    try:
        with sigterm_raises():
            code = command(sys.argv[1:] if argv is None else argv) or 0
        atexit.register(_end_process_group)  # not before: this process may run another command
        return code
    except KeyboardInterrupt as error:
        print(f"\n{name}: stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_CODE if isinstance(error, Preempted) else 130
    except (ValueError, OSError, ImportError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not FULL_DISK.search(str(error)):
            raise
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{name}: {_sentence(error)} (TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def _reach_this_machine_directly() -> None:
    """Servers that this process and its children start are on this machine, where the proxy of a cluster is not."""
    names = ("no_proxy", "NO_PROXY")
    hosts = [host.strip() for name in names for host in os.environ.get(name, "").split(",") if host.strip()]
    if "*" not in hosts:  # "*" stands for all hosts, but only as the whole value
        hosts = dict.fromkeys([*hosts, "127.0.0.1", "localhost"])
        os.environ.update(dict.fromkeys(names, ",".join(hosts)))


def _end_process_group() -> None:
    """Destroys the process group: its threads may abort a rank whose work is done. A colocated vLLM uses it, and ends
    it itself at exit."""
    vllm = sys.modules.get("vllm.distributed.parallel_state")
    if vllm is not None and vllm.model_parallel_is_initialized():
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if FULL_DISK.search(text):
        where = ", ".join([text, *getattr(error, "__notes__", ())])  # of a write Python says no path
        return f"the disk is full; free some of it, then the same command goes on from here ({where})"
    if any(cls.__module__ == "requests.exceptions" for cls in type(error).__mro__):  # TRL's client of a vLLM server
        return f"the rollout server does not answer; start it, then the same command goes on from here ({text})"
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        return f"{error.filename}: there is a file in the place of a folder: choose another path"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        remedy = "choose another path, or get the right to read and write this one; then the same command goes on"
        return f"{error.filename}: {error.strerror}: {remedy}"
    return text


def split_first(argv: list[str], choices: Collection[str], description: str) -> tuple[str, list[str]]:
    """The first word of a command line, one of `choices`, and the other words.

    `--help` in its place prints `description` and ends with exit code 0. Raises `ValueError` for anything else.
    """
    if argv[:1] in (["-h"], ["--help"]):
        print(description.rstrip(), f"\nThe fields: --help behind {' or '.join(choices)}.", sep="\n")
        sys.exit(0)
    if not argv or argv[0] not in choices:
        raise ValueError(f"first argument must be one of {', '.join(choices)}; got {argv[0] if argv else 'none'}")
    return argv[0], argv[1:]


def make_model_main(name: str, makers: dict[str, Callable[[Path, int], str]], argv: list[str] | None = None) -> int:
    """The command `python -m NAME WHAT FOLDER [--seed K]`, which makes a model of the embedded experiments once.

    A maker writes the model into the folder and returns what there is to say of it.
    """
    parser = argparse.ArgumentParser(prog=name, description="Makes the model of an embedded experiment, once.")
    parser.add_argument("what", choices=list(makers))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    def make(_: list[str]) -> None:
        if (options.out / "config.json").exists():
            print(f"{options.out}: done already")
            return
        check_writable(options.out)
        started = time.monotonic()
        said = makers[options.what](options.out, options.seed)
        print(f"{options.out}: {said} after {time.monotonic() - started:.0f} s")

    return run_main(name, make, [])


def parse_fields(
    argv: list[str], classes: tuple[type, ...], configs: str, section: dict[str, Any] | None = None
) -> tuple:
    """One instance of each dataclass from `--config FILE.yaml` and `--field value`, the latter winning.

    `section` holds fields from a file that has been read, in place of `--config`. Raises `ValueError` for an unknown
    key, with the nearest known one, and for a config file that is not there; `configs` says where the project's are.
    """
    from trl import TrlParser

    path, argv = split_config(argv)
    known = {f.name for cls in classes for f in dataclasses.fields(cls)}
    keys = [argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")]
    given = (section or {}) if path is None else read_config(path, configs)
    keys += [str(key) for key in given if key != "env" or path is None]  # of a file, TRL sets these variables
    for key in keys:
        if key not in known | {"help"}:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown field {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if key in OF_THE_COMMAND and "out" in known:
            raise ValueError(f"{key} would be ignored: {OF_THE_COMMAND[key]}")
    check_types(given, classes)
    if "use_cpu" in known and any(map(_is_dry_run, argv, [*argv[1:], ""])) and not torch.cuda.is_available():
        argv = [*argv, "--use_cpu", "true"]  # else bf16 settings could only be looked at on a GPU machine
    module = getattr(sys.modules["__main__"], "__spec__", None)  # argparse alone says "train.py"
    parser = TrlParser(classes, **({"prog": f"python -m {module.name}"} if module else {}))
    parser.usage = "%(prog)s [--config FILE.yaml] [--FIELD VALUE ...]; --help explains the fields"  # there are 200
    parser.set_defaults_with_config(**(section or {}))
    try:
        parsed = parser.parse_args_and_config(argv if path is None else ["--config", path, *argv])
    except ValueError as error:
        if "not used by the HfArgumentParser" in str(error):
            words = str(error).split(": ", 1)[1].strip("[]")
            raise ValueError(f"{words} is no flag: write --field value, and lists without spaces") from error
        if "bf16/gpu" not in str(error):
            raise
        raise ValueError(
            "bf16 is true, but there is no GPU: take a machine that has one, or set use_cpu to true for a tiny model; "
            "--dry_run of a train or loop command shows settings and memory here"
        ) from error
    for part in parsed:
        _check_numbers(part)
    return parsed


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, if there is one ("" for no name), and the other words.

    Raises `ValueError` for two: settings of only one of them would count.
    """
    paths, others, words = [], [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            paths.append(value if equals else next(words, ""))
        else:
            others.append(word)
    if len(paths) > 1:
        raise ValueError(f"--config is given more than once, {' and '.join(paths)}: pass one file")
    return (paths[0] if paths else None), others


def check_types(given: dict[str, Any], classes: tuple[type, ...]) -> None:
    """`ValueError` for a value of a YAML file that its field cannot hold: argparse looks at texts and flags only,
    and at choices in flags only."""
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    fields = [field for cls in classes for field in dataclasses.fields(cls)]
    choices = {field.name: field.metadata["choices"] for field in fields if "choices" in field.metadata}
    for name, value in given.items():
        if isinstance(value, str) and name in choices and value not in choices[name]:
            raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {value!r}")
        hint = hints.get(name)
        kinds = (set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}) - {NoneType}
        takes_mapping = dict in {get_origin(kind) or kind for kind in kinds}
        if takes_mapping and not (value is None or list in kinds or isinstance(value, dict | str)):
            raise ValueError(f"{name} must be a mapping, got {value!r}")
        if not kinds <= {str, int, float, bool} or (value is None and NoneType in get_args(hint)):
            continue
        converts = type(value) is int and kinds & {float, bool}  # 1 for 1.0 or true
        if not (isinstance(value, str) or type(value) in kinds or converts):
            wanted = "a text (in quotes)" if str in kinds else " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_dry_run(argument: str, following: str) -> bool:
    name, assigned, value = argument.partition("=")
    value = value if assigned else following
    return name in ("--dry_run", "--dry-run") and value.lower() not in ("no", "false", "f", "n", "0")


class _UniqueKeys(yaml.SafeLoader):
    """Of two values for one key, YAML would quietly take the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)  # as written: later, keys that `<<` merges stand beside its own
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} is there twice: leave out one")
        return node


def read_config(path: str, configs: str) -> dict[str, Any]:
    """Content of a YAML file of fields; `ValueError` for a file that is not there or holds something else."""
    if not Path(path).is_file():
        raise ValueError(f"config file {path!r} does not exist; the project's are in {configs}")
    try:
        content = _UniqueKeys(Path(path).read_text()).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {path!r} holds no mapping of fields to values")
    return content


def _check_numbers(part: Any) -> None:
    """`ValueError` for what would be noticed only when a run has begun, or when it has trained."""
    for names, valid, rule in (
        (COUNTS, lambda value: value >= 1, "must be at least 1"),
        (("eval_temperature",), lambda value: 0 <= value < math.inf, "must be at least 0 and finite"),
        (("eval_top_p",), lambda value: 0 < value <= 1, "must be in (0, 1]"),
    ):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not valid(value):
                raise ValueError(f"{name} {rule}, got {value!r}")


def changed_settings(args: Any, config: Any, follow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every field of `args`, and those of `config` that are not at their default: with `--config` on it, the same run
    again. `out`, modes of the command, paths made from other fields and the fields in `follow` are left out."""
    skipped = {"out", "dry_run", "sample_only", "output_dir", "dataloader_pin_memory", *follow}
    chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in skipped}
    return chosen | changed_fields(config, skipped)


def changed_fields(config: Any, skipped: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a trainer's configuration that are not at their default, as plain values; not where its server is."""
    chosen, skipped = {}, {*skipped, *SERVER_FIELDS}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        plain = isinstance(value, (str, int, float, bool, dict, list))
        turned_off = value is None and default != "auto"  # which TRL resolves to None
        if f.init and f.name not in skipped and value != default and value != [] and (plain or turned_off):
            chosen[f.name] = str(value.value) if hasattr(value, "value") else value
    return chosen


def machine_settings(config: Any) -> dict[str, Any]:
    """The `MACHINE_FIELDS` that a trainer's configuration has."""
    return {name: getattr(config, name) for name in MACHINE_FIELDS if hasattr(config, name)}
