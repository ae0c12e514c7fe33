"""Data of the paper from local files of the same columns, and the embedded digits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from sklearn.datasets import load_digits

from common.tiny import tiny_qwen3_vl
from va_opd import data, images


def diagram(shade: int, size: tuple[int, int] = (300, 250), mode: str = "RGB") -> PILImage.Image:
    image = PILImage.new(mode, size, "white")
    ImageDraw.Draw(image).polygon([(10, 200), (250, 220), (120, 10 + shade)], outline="black")
    return image


def write_split(folder: Path, split: str, count: int) -> None:
    features = Features(images=Sequence(Image()), problem=Value("string"), answer=Value("string"), id=Value("int64"))
    columns = {
        "images": [[diagram(i, mode="RGBA" if i % 2 else "RGB")] for i in range(count)],
        "problem": [f"<image>Find x{i}." for i in range(count)],
        "answer": [str(i) for i in range(count)],
        "id": list(range(100, 100 + count)),
    }
    Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def geometry(tmp_path) -> Path:
    folder = tmp_path / "geo3k"
    folder.mkdir()
    write_split(folder, "train", 4)
    write_split(folder, "validation", 12)
    return folder


def test_a_parquet_folder_gives_rows_in_the_format_of_trl(geometry):
    row = data.load_rows(str(geometry), "train")[1]
    assert row["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x1."}]}]
    assert (row["id"], row["answer"]) == ("101", "1")
    (image,) = row["images"]
    assert image.mode == "RGB" and image.size == (560, 467)  # 300 x 250 brought up to 262,144 pixels


def test_training_and_validation_come_from_their_own_splits(geometry):
    splits = data.load_splits("geo3k", str(geometry), validation_size=5)
    assert len(splits["train"]) == 4 and len(splits["validation"]) == 5
    assert (
        splits["validation"]["id"] == data.load_splits("geo3k", str(geometry), validation_size=5)["validation"]["id"]
    )


def test_one_file_is_not_trained_on_and_held_out(geometry):
    file = str(geometry / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is one file, whose rows .* name a file or folder .* as validation_data"):
        data.load_splits("geo3k", file, validation_size=2)
    splits = data.load_splits("geo3k", file, str(geometry), validation_size=5)
    assert len(splits["train"]) == 4 and len(splits["validation"]) == 5


def test_an_image_is_decoded_once_for_all_siblings_and_micro_batches(geometry, monkeypatch):
    rows, opened = data.load_rows(str(geometry), "train"), []
    original = images.fit_budget
    monkeypatch.setattr(images, "fit_budget", lambda image, *budget: opened.append(1) or original(image, *budget))
    images.decoded.cache_clear()
    order = [0, 0, 1, 1, 2, 2, 3, 3] * 3
    seen = [rows[i]["images"][0] for i in order]
    assert len(opened) == 4
    assert all(seen[k] is seen[k % 8] for k in range(len(order)))
    assert seen[0].tobytes() != seen[2].tobytes()


def test_validation_ids_are_a_seeded_sorted_draw_without_repeats():
    rows = Dataset.from_dict({"id": list(range(300))})
    ids = data.validation_ids(rows)
    assert ids == sorted(set(ids)) and len(ids) == 200 and ids != data.validation_ids(rows, seed=43)
    assert ids == data.validation_ids(rows, seed=42)  # the author release's
    assert data.validation_ids(rows.select(range(200))) == list(range(200))
    with pytest.raises(ValueError, match="200"):
        data.validation_ids(rows.select(range(199)))


@pytest.mark.parametrize(("dataset", "trained"), [("geo3k", 2101), ("virl39k", 38_870)])
def test_another_number_of_rows_on_the_hub_is_another_copy(monkeypatch, dataset, trained):
    counts = {"train": trained, "validation": 300}

    def load(source, split, limit=None, **options):
        return Dataset.from_dict({"id": list(range(limit or counts[split]))})

    monkeypatch.setattr(data, "load_rows", load)
    splits = data.load_splits(dataset)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": trained, "validation": 200}
    counts["train"] -= 1
    with pytest.raises(ValueError, match=f"{trained - 1} rows in split train, the paper's has {trained}"):
        data.load_splits(dataset)
    assert len(data.load_splits(dataset, limit=5)["train"]) == 5
    assert len(data.load_splits(dataset, "mine/copy", "mine/copy")["train"]) == trained - 1
    counts["validation"] = 301
    with pytest.raises(ValueError, match="'hiyouga/geometry3k' has 301 rows in split validation, the paper's has 300"):
        data.load_splits(dataset, limit=5)


def test_files_without_a_row_and_a_template_without_the_problem_are_one_sentence(tmp_path):
    (tmp_path / "train.jsonl").touch()
    for source in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(
            ValueError, match=r"^data '.*', split 'train': there are no rows; set data to other files$"
        ):
            data.load_rows(str(source), "train")
    with pytest.raises(ValueError, match=r"template must hold \{problem\}, .* got 'Solve this\.'"):
        data.load_rows(str(tmp_path), "train", template="Solve this.")


def test_jsonl_with_paths_questions_and_text_rows(tmp_path):
    diagram(0).save(tmp_path / "a.png")
    lines = [
        {"question": "Compare <image> and <image>.", "image": ["a.png", "a.png"], "answer": 3},
        {"question": "What is 1 + 1?", "image": [], "answer": 2},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = data.load_rows(str(tmp_path), "train", template="{problem} Answer in a box.")
    kinds = [part["type"] for part in first["prompt"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"] and len(first["images"]) == 2
    assert first["answer"] == "3" and first["prompt"][0]["content"][-1]["text"] == ". Answer in a box."
    assert second["images"] == [] and [p["type"] for p in second["prompt"][0]["content"]] == ["text"]


def test_a_folder_may_hold_more_images_than_tables(tmp_path):
    """datasets took one with images/train/*.png for images alone, and the columns were missing."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        rows = [
            {"problem": "Find x.", "images": [f"images/{split}/{i}.png"], "answer": f"{split} {i}"} for i in (0, 1)
        ]
        for i in (0, 1):
            diagram(i).save(tmp_path / "images" / split / f"{i}.png")
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        loaded = data.load_rows(str(tmp_path), split)
        assert loaded["answer"] == [f"{split} 0", f"{split} 1"]
        assert loaded[1]["images"][0].size == (560, 467)


def test_parts_without_text_have_no_text_whatever_the_first_rows_hold(tmp_path):
    """The columns of a data set are those of its first thousand rows: the rows behind are filled up with None."""
    diagram(0).save(tmp_path / "a.png")
    columns = {"problem": ["What?"] * 1001, "images": [[]] * 1000 + [["a.png"]], "answer": ["1"] * 1001}
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    *_, last = data.load_rows(str(tmp_path), "train", check_images=False)["prompt"]
    assert last == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    ("dataset", "source", "held_out", "expected"),
    [
        ("geo3k", None, None, "hiyouga/geometry3k"),
        ("geo3k", "folder", None, "folder"),
        ("virl39k", "folder", None, "hiyouga/geometry3k"),
        ("virl39k", "folder", "other", "other"),
    ],
)
def test_problems_are_held_out_of_geometry3k(monkeypatch, dataset, source, held_out, expected):
    asked, rows = [], Dataset.from_dict({"id": list(range(300))})
    monkeypatch.setattr(data, "load_rows", lambda *arguments: asked.append(arguments) or rows)
    assert len(data.load_validation(dataset, source, held_out)) == 200
    assert asked == [(expected, "validation")]


def test_an_image_of_more_than_8_bits_is_found_at_the_start(tmp_path):
    """Its RGB would be all but white."""
    row = {"problem": "Find y.", "images": ["a.png"], "answer": "3"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    for highest in (255, 65535):
        values = np.linspace(0, highest, 64 * 64).reshape(64, 64).astype(np.uint16)
        PILImage.fromarray(values).save(tmp_path / "a.png")
        if highest == 255:
            data.load_rows(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"unreadable images .*id 0: .*mode I;16 and values up to 65535.*8 bits"):
        data.load_rows(str(tmp_path), "train")
    row["images"] = ["floats.tiff"]
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    PILImage.new("F", (64, 64), 0.5).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="id 0: .*mode F and values up to 0.5, and processors turn all below 1 black"):
        data.load_rows(str(tmp_path), "train")


def test_a_truncated_image_is_found_at_the_start_and_again_after_a_good_run(tmp_path):
    diagram(0).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "Find y.", "images": ["a.png"], "answer": "3"}))
    data.load_rows(str(tmp_path), "train")
    with (tmp_path / "a.png").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match="unreadable images .*id 0"):
        data.load_rows(str(tmp_path), "train")
    assert len(data.load_rows(str(tmp_path), "train", check_images=False)) == 1


def test_all_that_is_wrong_with_a_file_is_found_and_three_rows_are_named(tmp_path):
    for name in ("chunk.png", "large.bmp"):
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        PILImage.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "chunk.png").read_bytes()
    (tmp_path / "chunk.png").write_bytes(b"\0\0\0\0".join(whole.rsplit(b"IDAT", 1)))
    whole = (tmp_path / "large.bmp").read_bytes()
    (tmp_path / "large.bmp").write_bytes(whole[:18] + b"\xff\xff\0\0" * 2 + whole[26:])  # width and height
    names = ["chunk.png", "large.bmp", "none.png", "none.png"]
    rows = [{"problem": "q", "images": [name], "answer": "1"} for name in names]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="has 4 rows with unreadable images") as error:
        data.load_rows(str(tmp_path), "train")
    faults = [fault.split(": ")[:2] for fault in str(error.value).split("(", 1)[1].split("; ")]
    assert faults == [["id 0", "SyntaxError"], ["id 1", "DecompressionBombError"], ["id 2", "FileNotFoundError"]]


def test_an_image_that_is_in_the_file_is_read_there(tmp_path):
    """Parquet files of the hub hold images beside names that are files nowhere."""
    diagram(0).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "nowhere.png"}
    features = Features(images=Sequence(Image()), problem=Value("string"), answer=Value("string"))
    rows = Dataset.from_dict({"images": [[image]], "problem": ["q"], "answer": ["1"]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    assert data.load_rows(str(tmp_path), "train")[0]["images"][0].size == (560, 467)


@pytest.mark.parametrize(
    ("size", "wrong"), [((8000, 20), True), ((20, 3980), True), ((3900, 20), False), ((8000, 40), False)]
)
def test_an_image_too_narrow_for_the_processor_is_found_at_the_start(tmp_path, size, wrong):
    PILImage.new("L", size).save(tmp_path / "a.png")
    rows = [{"problem": "Find y.", "images": [], "answer": "3"}, {"problem": "x?", "images": ["a.png"], "answer": "3"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if wrong:
        message = f"id 1: {size[0]} x {size[1]}, in the image budget .*: one side is over 200 times the .*remove"
        with pytest.raises(ValueError, match=message):
            data.load_rows(str(tmp_path), "train")
    else:
        (image,) = data.load_rows(str(tmp_path), "train")[1]["images"]
        tiny_qwen3_vl(hidden=32)[1].image_processor(images=[image])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"problem": "q", "answer": "1"}, "images"),
        ({"problem": "q", "images": ["missing.png"], "answer": "1"}, "missing.png"),
        ({"problem": "<image><image>", "images": [], "answer": "1"}, "row 0: .* marks 2 images but has 0: mend"),
        ({"problem": "q", "images": [None], "answer": "1"}, r"unreadable images \(id 0: no image\): repair or remove"),
        ({"problem": "q", "images": [3], "answer": "1"}, "row 0: images must be paths or images, got 3: mend the row"),
        ({"problem": None, "images": [], "answer": "1"}, "row 0: problem must be a text, got None: mend the row"),
        ({"problem": " ", "images": [], "answer": "1"}, "row 0: problem must be a text, got ' '"),
        ({"problem": "q", "images": [], "answer": None, "id": "g7"}, "row g7: answer must be .*, got None: mend the"),
        ({"problem": "q", "images": [], "answer": ""}, "row 0: answer must be a text or a number, got ''"),
        ({"problem": "q", "images": [], "answer": ["1", "2"]}, r"row 0: answer must be .*, got \['1', '2'\]"),
    ],
)
def test_faulty_rows_are_named(tmp_path, rows, message):
    (tmp_path / "train.jsonl").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        data.load_rows(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "rows.jsonl",
            "train",
            r"local data \(.*JSON parse error.*\); set data to a hub id or a parquet, json or jsonl file",
        ),
        ("rows.csv", "train", r"JSON parse error.*; set data to a hub id or a parquet, json or jsonl file"),
        (
            "",
            "validation",
            'Unknown split "validation".*; set data to a hub id or a folder with the split .validation.',
        ),
    ],
)
def test_data_that_cannot_be_read_says_why_and_what_would_do(tmp_path, name, split, message):
    (tmp_path / (name or "train.jsonl")).write_text("problem,answer\n" if name else '{"problem": "q"}')
    with pytest.raises(ValueError, match=message):
        data.load_rows(str(tmp_path / name), split)


@pytest.mark.parametrize(("answer", "read"), [(3, "3"), (0.5, "0.5"), (math.nan, None), (math.inf, None)])
def test_a_number_is_an_answer_where_it_is_one(tmp_path, answer, read):
    columns = {"problem": ["q"], "images": [[]], "answer": [answer]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    if read:
        assert data.load_rows(str(tmp_path), "train")[0]["answer"] == read
    else:
        with pytest.raises(ValueError, match=f"row 0: answer must be a text or a number, got {answer}"):
            data.load_rows(str(tmp_path), "train")


def test_gold_answers_that_are_no_mathematics_are_counted_once(tmp_path, capsys):
    rows = [{"problem": "q", "images": [], "answer": answer} for answer in ("\\frac{1}{2}", "5 cm", "Na^+", "x+1")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(data.load_rows(str(tmp_path), "train")) == 4
    said = capsys.readouterr().out
    assert "1 of 4 gold answers cannot be read (row 2: 'Na^+'): there the same text is right, score 1, and any" in said
    assert "wrong, score 0, in the reward of grpo, in the choice of responses for sft and in evaluation\n" in said
    data.load_rows(str(tmp_path), "train", check_images=False)  # by the other processes
    assert "cannot be read" not in capsys.readouterr().out


def test_a_missing_source_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="no local path"):
        data.load_rows(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="dataset must be"):
        data.load_splits("geometry")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 250), (560, 467)), ((512, 512), (512, 512)), ((4000, 2000), (2896, 1448)), ((1, 1), (512, 512))],
)
def test_the_budget_keeps_the_aspect(size, expected):
    assert images.fit_budget(diagram(0, size), images.MIN_PIXELS, images.MAX_PIXELS).size == expected


def test_no_side_of_an_image_vanishes_in_the_budget():
    assert images.budget_size((4000, 1), 1, 1000) == (2000, 1)


def test_the_budget_is_reached_by_bicubic_interpolation():
    """As in EasyR1, whose `resize` names no filter: it decides what a pixelated cell is made of."""
    image = diagram(1, (300, 250))
    resized = image.convert("RGB").resize((560, 467), PILImage.Resampling.BICUBIC)
    assert images.fit_budget(image, images.MIN_PIXELS, images.MAX_PIXELS).tobytes() == resized.tobytes()


def test_exif_rotation_is_applied():
    image = PILImage.new("RGB", (600, 500))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter turn
    image.info["exif"] = exif.tobytes()
    assert images.fit_budget(image, 1, images.MAX_PIXELS).size == (500, 600)


def test_digit_rows_hold_writers_out_and_say_what_the_image_shows():
    scans = load_digits()
    train, test = data.digit_rows("train", 50, seed=0), data.digit_rows("test", 50, seed=0)
    row = train[0]
    assert row["images"][0].size == (96, 32) and row["response"] == f"I see {row['answer']}."
    drawn = train.with_format(None)[0]["scans"]
    assert [int(d) for d in row["answer"].split(", ")] == [int(scans.target[i]) for i in drawn]
    cut = data.DIGITS_SPLITS["train"].stop
    assert cut == data.DIGITS_SPLITS["test"].start and test.with_format(None)[0]["scans"] != drawn
    assert (
        data.digit_rows("train", 50, seed=0)["answer"]
        == train["answer"]
        != data.digit_rows("train", 50, seed=1)["answer"]
    )
    assert train["answer"][:3] == ["7, 7, 6", "9, 6, 3", "8, 2, 3"]  # the README's tables are of these draws
    assert test["answer"][:3] == ["0, 4, 1", "1, 3, 3", "7, 6, 5"]


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("I see 4, 7, 2.", True),
        (" I see 4, 7, 2.\n", True),
        ("I see 4, 7.", False),
        ("I see 4, 7, 2, 2.", False),
        ("4, 7, 2", False),
        ("", False),
    ],
)
def test_a_digit_answer_is_the_whole_sentence(response, correct):
    assert data.digits_correct(response, {"answer": "4, 7, 2"}) is correct
