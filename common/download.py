"""What an experiment takes from the hub, put into the caches of this machine, for nodes without network."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

# Formats that neither transformers nor vLLM nor sentence-transformers reads where safetensors are
OTHER_FORMATS = ["original/*", "*.gguf", "*.pth", "onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot"]


def download(models: Iterable[str], data: Iterable[tuple[str, Callable[[], Any]]]) -> int:
    """Fetches the models that are no local folders, then calls what loads each data set, by which it is cached.

    Exit code 2 where something cannot be had, after all else is there; each failure is one line on stderr.
    """
    wanted = [(name, lambda name=name: _model(name)) for name in dict.fromkeys(models)]
    failed = 0
    for name, load in [*wanted, *data]:
        print(f"{name} ...", flush=True)
        try:
            load()
        except Exception as error:  # whatever breaks in a transfer; the rest is to be there after a night
            failed += 1
            print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    print(f"missing: {failed}" if failed else "all there: with HF_HUB_OFFLINE=1 in the environment runs ask no hub")
    return 2 if failed else 0


def _model(name: str) -> None:
    if not Path(name).is_dir() and name.count("/") < 2:  # else a folder that an experiment makes itself
        snapshot_download(name, ignore_patterns=OTHER_FORMATS)
