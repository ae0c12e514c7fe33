"""Fixtures of the tests of VA-OPD: trainers, and runs of seconds on embedded digits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training_runs import SMALL

DIGITS = {
    **SMALL,
    "dataset": "digits",
    "validation_size": 8,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
    "max_completion_length": 6,
    "eval_samples": 1,
}


@pytest.fixture
def make(tmp_path) -> Callable:
    """`build` in a folder of the test's own."""
    from va_opd_trainers import build  # here, so that tests without a trainer start without TRL

    return lambda rows=None, **overrides: build(overrides.pop("output_dir", tmp_path / "run"), rows, **overrides)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Folders of student and teacher."""
    from common.tiny import tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("models")
    for name, hidden, seed in (("student", 32, 0), ("teacher", 64, 1)):
        model, processor = tiny_qwen3_vl(hidden=hidden, seed=seed)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("student", "teacher")}


@pytest.fixture
def config(tmp_path, tiny_models) -> Path:
    settings = {
        **DIGITS,
        "model": tiny_models["student"],
        "teacher": tiny_models["teacher"],
        "out": str(tmp_path / "runs"),
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def vision_data(tmp_path, monkeypatch) -> str:
    """A folder with eight questions each of HallusionBench and MMStar, registered with so many rows."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from PIL import Image

    from common.evaluation import BENCHMARKS, Decoding

    image = Image.new("RGB", (40, 32), "red")
    shared = {"question": "Is it red?", "image": image, "answer": "A", "category": "VS", "subcategory": "map"}
    rows = [
        {**shared, "set_id": str(i // 4), "figure_id": str(i // 2), "question_id": str(i % 2), "gt_answer": str(i % 2)}
        for i in range(8)
    ]
    features = Features({name: ImageColumn() if name == "image" else Value("string") for name in rows[0]})
    for name in ("hallusionbench", "mmstar"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "vision" / f"{name}.parquet")
        small = dataclasses.replace(BENCHMARKS[name], rows=8, decoding=Decoding(1.0, 1.0, 4))
        monkeypatch.setitem(BENCHMARKS, name, small)
    return str(tmp_path / "vision")
