"""Rows of a data set from the hub or from local files."""

from __future__ import annotations  # datasets is imported where it is used: `--help` does without

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def load_split(source: str, split: str) -> Dataset:
    """The rows of a split of `source`: a hub id, or a local folder or file (parquet, json, jsonl).

    Raises `ValueError` that says why they cannot be read, and the remedy.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    try:
        if files := _tables(path, split):
            builder = "parquet" if files[0].suffix == ".parquet" else "json"
            return load_dataset(builder, data_files=[str(file) for file in files], split="train")
        return load_dataset(str(path) if path.is_dir() else source, split=split)
    except StopIteration as error:  # of datasets, for files without a row
        raise ValueError(f"data {source!r}, split {split!r}: there are no rows; set data to other files") from error
    except Exception as error:
        where = "local data" if path.exists() else "no local path, and the hub gave no data set of this name"
        cause = str(error.__cause__ or error).strip()  # of a file that cannot be read datasets says why in the cause
        remedy = "parquet, json or jsonl file" if path.is_file() else f"folder with the split {split!r}"
        raise ValueError(
            f"data {source!r}, split {split!r}: {where} ({cause.splitlines()[0] if cause else type(error).__name__}); "
            f"set data to a hub id or a {remedy}"
        ) from error


def image_files(rows: Dataset) -> Iterable[list[Any]]:
    """The column `images` of each row as files, without a transform that decodes them; nothing where there is none."""
    return rows.with_format(None)["images"] if "images" in rows.column_names else [[]] * len(rows)


def _tables(path: Path, split: str) -> list[Path]:
    """The files of a split: the path itself, or what lies in the folder under the split's name, where `datasets` would
    take the folder for images without columns if it holds more of these than tables."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.glob(f"{split}[-._0-9]*") if file.suffix in (".parquet", ".json", ".jsonl"))
