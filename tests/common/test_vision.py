"""VA-OPD's eight vision benchmarks: columns and row counts, prompts, images, generation."""

import io
import json

import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

from common.answers import Verdict
from common.evaluation import BENCHMARKS, Completion, Decoding, TransformersEngine, evaluate, headline, load_benchmark
from common.evaluation import __main__ as command
from common.evaluation.run import rescore, score_responses
from common.evaluation.vision import VISION, mmmu_images, mmmu_prompt
from common.runs import read_jsonl
from common.tiny import tiny_qwen3_vl

TEXT, NUMBER = Value("string"), Value("float64")
MMMU_IMAGES = [f"image_{i}" for i in range(1, 8)]
# The columns of the data sets on the hub, as their cards give them
COLUMNS = {
    "wemath": {
        **dict.fromkeys(["ID", "split", "knowledge concept", "question", "option", "answer", "key"], TEXT),
        **dict.fromkeys(["question number", "knowledge concept description"], TEXT),
        "image_path": Image(),
    },
    "mathvista": {
        **dict.fromkeys(["pid", "question", "image", "unit", "answer", "question_type", "answer_type", "query"], TEXT),
        "decoded_image": Image(),
        "choices": Sequence(TEXT),
        "precision": NUMBER,
    },
    "mathverse": {
        **dict.fromkeys(["sample_index", "problem_index", "problem_version", "question", "answer"], TEXT),
        **dict.fromkeys(["question_type", "query_wo", "query_cot", "question_for_eval"], TEXT),
        "image": Image(),
    },
    "hallusionbench": {
        **dict.fromkeys(["category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note"], TEXT),
        **dict.fromkeys(["question_id", "question", "gt_answer_details", "gt_answer", "filename"], TEXT),
        "image": Image(),
    },
    "ai2d": {"question": TEXT, "options": Sequence(TEXT), "answer": TEXT, "image": Image()},
    "mmmu": {
        **dict.fromkeys(["id", "question", "options", "explanation", "img_type", "answer"], TEXT),
        **dict.fromkeys(["topic_difficulty", "question_type", "subfield"], TEXT),
        **dict.fromkeys(MMMU_IMAGES, Image()),
    },
    "mmstar": {
        **dict.fromkeys(["question", "answer", "category", "l2_category"], TEXT),
        "index": Value("int64"),
        "image": Image(),
    },
    "ocrbench": {
        **dict.fromkeys(["dataset", "question", "question_type"], TEXT),
        "answer": Sequence(TEXT),
        "image": Image(),
    },
}


def row_of(name: str, i: int) -> dict:
    """Row i of a small copy: the columns that are read, with what the data sets hold in them."""
    letter = "ABCD"[i % 4]
    family = (("2steps", 3, i) if i < 1080 else ("3steps", 4, i - 1080)) if name == "wemath" else ("", 1, 0)
    part = family[2] % family[1] + 1
    rows = {
        "wemath": {
            "ID": str(family[2] // family[1]),
            "key": f"{family[0]}_{'multi' if part == family[1] else part}",
            "option": "A. 5 cm; B. 6 cm; C. 7 cm; D. 8 cm; E. No correct answer",
            "answer": letter,
        },
        "mathvista": [
            {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"], "answer": "blue"},
            {"question_type": "free_form", "answer_type": "integer", "choices": None, "answer": "12"},
            {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None, "answer": "1.2"},
            {"question_type": "free_form", "answer_type": "list", "choices": None, "answer": "[1, 2]"},
        ][i % 4]
        | {"query": f"Hint: answer.\nQuestion: {i}?"},
        "mathverse": {"query_wo": f"Please answer. {i}?"}
        | (
            {"question_type": "multi-choice", "answer": letter}
            if i % 2
            else {"question_type": "free-form", "answer": "\\frac{1}{2}"}
        ),
        "hallusionbench": {
            "category": "VS",
            "subcategory": "map",
            "set_id": str(i // 8),
            "figure_id": str(i // 2 % 4),
            "question_id": str(i % 2),
            "gt_answer": str(i % 2),
        },
        "ai2d": {"options": ["cat", "dog", "cow", "hen"], "answer": str(i % 4)},
        "mmmu": {"question": f"See <image 1>. What is {i}?", "question_type": "multiple-choice", "answer": letter}
        | {"options": "['one', \"it's two\", '<image 2>', 'four']"}
        if i % 2
        else {"question": "How many in <image 1>?", "question_type": "open", "options": "[]", "answer": "30"},
        "mmstar": {"question": f"What is {i}?\nOptions: A: a, B: b, C: c, D: d", "answer": letter},
        "ocrbench": {
            "dataset": "HME100k" if i % 2 else "IIIT5K",
            "answer": ["x = \\frac { 1 7 } { 5 }\n"] if i % 2 else ["CHAIN"],
        },
    }
    return {"question": f"What is {i}?", **rows[name]}


def picture(colour: int, mode: str = "RGB") -> dict:
    file = io.BytesIO()
    PILImage.new(mode, (40, 32), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """(benchmark) -> a parquet file of its columns and of as many rows as it has, made once."""
    folder = tmp_path_factory.mktemp("vision")

    def make(name: str) -> str:
        path, columns = folder / f"{name}.parquet", COLUMNS[name]
        if not path.exists():
            blank, pictures = dict.fromkeys(columns), [picture(0), picture(200)]
            images = [column for column, feature in columns.items() if isinstance(feature, Image)][:2]
            rows = [
                {**blank, **row_of(name, i), **dict(zip(images, pictures, strict=False))}
                for i in range(VISION[name].rows)
            ]
            Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
        return str(path)

    return make


def gold_response(row: dict) -> str:
    gold = row["answer"]
    return f"The answer is {gold[0] if isinstance(gold, list) else gold}."


@pytest.mark.parametrize("name", VISION)
def test_a_file_of_the_columns_is_read_and_its_gold_is_right(parquet, name):
    benchmark = load_benchmark(name, parquet(name))
    assert len(benchmark.rows) == {"wemath": 1740, "hallusionbench": 951, "mathverse": 3940, "mmmu": 900}.get(
        name, BENCHMARKS[name].rows
    )
    assert (benchmark.samples, benchmark.decoding) == (8, Decoding(1.0, 1.0, 4096))
    for row in benchmark.rows[:40]:
        assert [message["role"] for message in row["prompt"]] == ["user"]
        parts = row["prompt"][0]["content"]
        placeholders = 1 if isinstance(parts, str) else sum(part["type"] == "image" for part in parts)
        assert len(row["images"]) == placeholders and all(image["bytes"] for image in row["images"])
        assert benchmark.score(gold_response(row), row) is Verdict.CORRECT
        assert benchmark.score("I cannot see it", row) is not Verdict.CORRECT
        assert benchmark.score("", row) is Verdict.NO_ANSWER


LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "wemath",
            "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought "
            "process and provide the final answer(option).\nQuestion: What is 0?\nOption: A. 5 cm; B. 6 cm; C. 7 cm; "
            "D. 8 cm; E. No correct answer\nRegarding the format, please answer following the template below, and be "
            "sure to include two <> symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your option>>",
        ),
        ("mathvista", "Hint: answer.\nQuestion: 0?"),
        ("mathverse", "Please answer. 0?"),
        ("hallusionbench", "What is 0?"),
        ("ai2d", f"What is 0?\nA. cat\nB. dog\nC. cow\nD. hen\n{LETTER}"),
        ("mmmu", "How many in <image>?\n\nAnswer the question using a single word or phrase."),
        ("mmmu", f"See <image>. What is 1?\n\n(A) one\n(B) it's two\n(C) <image>\n(D) four\n\n{LETTER}"),
        ("mmstar", f"What is 0?\nOptions: A: a, B: b, C: c, D: d\n{LETTER}"),
        ("ocrbench", "What is 0?"),
    ],
)
def test_prompts_word_by_word(name, prompt):
    (message,) = VISION[name].prompt(row_of(name, int("What is 1?" in prompt)))
    parts = message["content"]
    parts = [parts] if isinstance(parts, str) else [part.get("text", "<image>") for part in parts]
    assert "".join(parts) == prompt


def test_another_number_of_rows_or_a_missing_image_is_refused(tmp_path):
    path = tmp_path / "mmstar.parquet"
    row = {**dict.fromkeys(COLUMNS["mmstar"]), **row_of("mmstar", 0)}
    Dataset.from_list([row] * 7, features=Features(COLUMNS["mmstar"])).to_parquet(path)
    with pytest.raises(ValueError, match="has 7 rows where 1500 are expected"):
        load_benchmark("mmstar", path)
    Dataset.from_list([row] * 1500, features=Features(COLUMNS["mmstar"])).to_parquet(path)
    with pytest.raises(ValueError, match="mmstar: row 0 has no image where its prompt names one"):
        load_benchmark("mmstar", path)


def test_images_named_in_a_json_file_are_beside_it(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(90)["bytes"])
    rows = [{"question": "What is written?", "image": "1.png", "answer": ["A"], "dataset": "svt"}] * 1000
    (tmp_path / "ocrbench.json").write_text(json.dumps(rows))
    for number, data in enumerate((tmp_path / "ocrbench.json", tmp_path)):
        engine = Watcher()
        evaluate(engine, load_benchmark("ocrbench", data, limit=1), tmp_path / f"out{number}", samples=1)
        assert [image.getpixel((0, 0))[0] for image in engine.images] == [90]


@pytest.mark.parametrize("name", VISION)
def test_no_response_breaks_a_rule(name):
    score, row = VISION[name].score, row_of(name, 3)
    row = {"choices": ["red", "blue"], "options": ["cat", "dog"], **row, "answer": VISION[name].answer(row)}
    hostile = [
        "\\boxed{",
        "((((" * 500,
        "\x00\ud800",
        "Answer:",
        "1" * 5000,
        "<think>A",
        "[" * 300,
        "nan",
        "1e999",
        "√" * 90,
    ]
    for text in hostile:
        assert score(text, row) is not Verdict.CORRECT


class Watcher:
    """Says yes, and keeps the images it is shown."""

    name = "watcher"

    def __init__(self):
        self.images = []

    def generate(self, prompts, decoding, seeds):
        self.images += [image for prompt in prompts for image in prompt.images]
        return [Completion("Yes.", 2, "stop") for _ in prompts]


def test_images_stand_where_mmmu_names_them():
    row = {
        "question_type": "multiple-choice",
        "question": "Compare <image 2> with <image 1>.",
        "options": "['<image 2>', 'x']",
    }
    row |= {"image_1": "one", "image_2": "two"}
    assert mmmu_images(row) == ["two", "one", "two"]
    parts = mmmu_prompt(row)[0]["content"]
    assert [part.get("text", "IMAGE") for part in parts[:5]] == ["Compare ", "IMAGE", " with ", "IMAGE", ".\n\n(A) "]


def test_a_structured_metric_is_the_headline_and_can_be_scored_again(parquet, tmp_path):
    benchmark, engine = load_benchmark("hallusionbench", parquet("hallusionbench"), limit=16), Watcher()
    metrics = evaluate(engine, benchmark, tmp_path, samples=2)
    assert len(engine.images) == 32 and engine.images[0].size == (40, 32)
    assert (metrics["avg@k"], metrics["metric"]["aAcc"], metrics["metric"]["fAcc"], metrics["metric"]["qAcc"]) == (
        *(0.5, 0.5, 0.0, 0.5),
    )
    assert headline(metrics) == (pytest.approx(1 / 3), metrics["metric"]["interval"])
    assert rescore(benchmark, tmp_path) == metrics
    assert json.loads((tmp_path / "hallusionbench.json").read_text())["metric"] == metrics["metric"]
    assert {"set_id", "figure_id"} <= read_jsonl(tmp_path / "hallusionbench/scored.jsonl")[0].keys()


def test_responses_without_numbers_are_samples_of_their_own(parquet, tmp_path):
    benchmark, path = load_benchmark("hallusionbench", parquet("hallusionbench"), limit=16), tmp_path / "theirs.jsonl"
    said = ({"response": "Yes."}, {"response": "No.", "sample": float("nan")})  # as tables write a missing one
    path.write_text("\n".join(json.dumps({"id": row["id"], **one}) for row in benchmark.rows for one in said))
    metric = score_responses(benchmark, path, tmp_path)["metric"]
    assert metric["aAcc"] == 0.5  # of each question one of two samples is right


def test_samples_that_are_numbered_on_through_the_file_are_refused(parquet, tmp_path):
    """Each would be alone in its figure, and fAcc and qAcc as high as aAcc."""
    benchmark, path = load_benchmark("hallusionbench", parquet("hallusionbench"), limit=16), tmp_path / "theirs.jsonl"

    def write(numbers) -> None:
        rows = [
            {"id": i, "response": "Yes." if i % 3 else "No.", "sample": number} for i, number in enumerate(numbers)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))

    write(range(16))
    with pytest.raises(ValueError, match="question 0 has sample 0, question 1 has 1: number the samples of each"):
        score_responses(benchmark, path, tmp_path)
    write([5] * 16)
    metric = score_responses(benchmark, path, tmp_path)["metric"]
    assert metric["fAcc"] < metric["aAcc"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reader")
    model, processor = tiny_qwen3_vl(hidden=32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_command_evaluates_a_vision_model(parquet, reader, tmp_path, capsys):
    shared = ["--model", reader, "--out", str(tmp_path), "--samples", "2", "--max_new_tokens", "4"]
    assert command.main([*shared, "--benchmark", "mathvista", "--data", parquet("mathvista"), "--limit", "3"]) == 0
    assert "avg@2 = 0.0000 [0.0000, 0." in capsys.readouterr().out
    assert command.main([*shared, "--benchmark", "wemath", "--data", parquet("wemath"), "--limit", "6"]) == 0
    assert "score = 0.0000 [0.0000, " in capsys.readouterr().out
    assert command.main([*shared, "--benchmark", "wemath", "--data", parquet("wemath"), "--limit", "2"]) == 2
    assert "holds records of other questions: --data or --limit was another one" in capsys.readouterr().err


def test_a_stopped_evaluation_goes_on_to_the_same_records(parquet, reader, tmp_path):
    from common.models import load_model, load_processor

    benchmark = load_benchmark("mmmu", parquet("mmmu"), limit=6)
    engine = TransformersEngine(load_model(reader), load_processor(reader), batch_size=2)
    options = {"samples": 2, "decoding": Decoding(temperature=1.0, max_new_tokens=4), "batch": 2}
    straight = evaluate(engine, benchmark, tmp_path / "a", **options)
    calls, generate = [], engine.generate

    def stops(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return generate(*arguments)

    engine.generate = stops
    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, benchmark, tmp_path / "b", **options)
    engine.generate = generate
    assert evaluate(engine, benchmark, tmp_path / "b", **options) == straight
    assert (tmp_path / "a/mmmu/samples.jsonl").read_bytes() == (tmp_path / "b/mmmu/samples.jsonl").read_bytes()
