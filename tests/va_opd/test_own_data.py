"""Own data with an own reward on VA-OPD's command line."""

import json
import re
from pathlib import Path

import pytest
from training_runs import fails

from common.runs import read_jsonl
from va_opd import data, evaluate, loop, train

SENTENCE = """
def sentence(completions, answer, **columns):
    return [float(c[0]["content"].strip() == f"I see {gold}.") for c, gold in zip(completions, answer)]
"""


@pytest.fixture
def own(tmp_path) -> list[str]:
    """The embedded digits as files, with the sentence that they ask for as the reward."""
    splits = data.load_splits("digits", limit=64, validation_size=8)
    for split, rows in splits.items():
        records = []
        for i, row in enumerate(rows):
            row["images"][0].save(tmp_path / f"{split}{i}.png")
            question = {"problem": "Which digits?", "images": [f"{split}{i}.png"]}
            records.append(json.dumps({**question, "answer": row["answer"], "id": row["id"]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(records))
    (tmp_path / "rewards.py").write_text(SENTENCE)
    pixels = ["--min_pixels", "1"]
    return ["--dataset", "own", "--data", str(tmp_path), "--reward", f"{tmp_path}/rewards.py:sentence", *pixels]


def test_the_digits_as_own_data_are_the_same_training_and_evaluation(config, own):
    """Up to the length of a response, which the digits' evaluation ends after 24 tokens."""
    found = []
    for fields in ([], own):
        words = ["--config", str(config), *fields, "--max_steps", "2", "--experiment", f"e{len(fields)}"]
        assert train.main(words) == 0 and evaluate.main(["run", *words]) == 0
        run = train.run_path(*train.parse(words))
        name = "own_validation" if fields else "digits"
        records = sorted(read_jsonl(run / "eval" / name / "scored.jsonl"), key=lambda record: record["id"])
        scores = [(record["id"], record["response"][:20], record["score"]) for record in records]
        found.append([(run / "model/model.safetensors").read_bytes(), scores])
    assert found[0] == found[1]


def test_the_reward_scores_evaluation_and_grpo_and_chooses_responses(config, own, tmp_path, monkeypatch):
    args, settings = train.parse(["--config", str(config), *own, "--method", "sft"])
    splits = train.load_splits_of(args)
    right = dict(zip(splits["train"]["id"], splits["train"]["answer"], strict=True))
    score = evaluate.benchmark_of(args, splits["validation"]).score
    row = {"id": "0", "prompt": [], "answer": "1, 2"}
    assert [score(text, row) for text in ("I see 1, 2.", "1, 2")] == [1.0, 0.0]
    reward = data.reward_of(args)
    assert reward(completions=[[{"role": "assistant", "content": "I see 3."}]], answer=["3"]) == [1.0]
    responses = tmp_path / "responses.jsonl"
    said = [f"I see {gold}." if i % 2 else gold for i, gold in enumerate(right.values())]
    records = [{"id": i, "response": text, "finish_reason": "stop"} for i, text in zip(right, said, strict=True)]
    responses.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(data, "sample_teacher", lambda *arguments: responses)
    kept = data.teacher_rows(args, settings, splits["train"])
    assert [turns[0]["content"] for turns in kept["completion"]] == said[1::2]


def test_mathematics_is_scored_as_for_geometry3k(config, own):
    rows = [{"id": "0", "prompt": [], "images": [], "answer": "1/2"}]
    scores = []
    for fields in (["--dataset", "geo3k"], ["--dataset", "own", "--reward", "math", "--data", own[3]]):
        args, _ = train.parse(["--config", str(config), *fields])
        benchmark, reward = evaluate.benchmark_of(args, rows), data.reward_of(args)
        texts = [r"\boxed{0.5}. Then \boxed{2}", r"\boxed{2}", "1/2", "none"]
        scores.append([benchmark.score(text, rows[0]) for text in texts] + reward(texts, answer=["1/2"] * 4))
    assert scores[0] == scores[1] == [1.0, 0.0, 1.0, 0.0] * 2


@pytest.mark.parametrize("change", ["reward", "answer"])
def test_another_reward_is_another_run_and_another_result(config, own, tmp_path, capsys, change):
    words = ["--config", str(config), *own, "--max_steps", "2"]
    assert train.main(words) == 0 and evaluate.main(["run", *words]) == 0
    if change == "reward":
        (tmp_path / "rewards.py").write_text(SENTENCE.replace("strip()", "lstrip()"))
        names = ("reward's file", "the reward's file")
    else:
        lines = (tmp_path / "validation.jsonl").read_text()
        (tmp_path / "validation.jsonl").write_text(re.sub(r'"answer": "\d', '"answer": "0', lines))
        names = ("data validation", "data")
    assert names[0] in fails(train, capsys, config, *own, "--max_steps", "2")
    capsys.readouterr()
    assert evaluate.main(["run", *words]) == 2
    assert f"holds results of {names[1]}=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--reward", "maths"], "dataset=own needs reward: math, choice, .* got 'maths'"),
        (["--dataset", "geo3k"], "reward='.*' is for dataset=own, and geo3k has its own reward: leave it out"),
        (["--reward", "choice"], "row .* has answer=.* which choice_reward cannot use: mend it"),
        (["--reward", "FOLDER/no.py:f"], "there is no file '.*no.py'"),
        (["--reward", "FOLDER/rewards.py:missing"], "has no plain function 'missing'"),
        (["--data", "FOLDER/train.jsonl"], "is one file, whose rows would be trained on and held out"),
    ],
)
def test_a_mistake_is_one_sentence(config, own, tmp_path: Path, capsys, fields, message):
    fields = [*own, *(field.replace("FOLDER", str(tmp_path)) for field in fields)]
    assert re.search(message, fails(train, capsys, config, *fields))


def test_a_dry_run_says_that_the_reward_is_missing(config, own, capsys):
    assert loop.main(["--config", str(config), *own, "--reward", "no.py:f", "--dry_run"]) == 2
    assert "reward 'no.py:f': there is no file 'no.py'" in capsys.readouterr().err


def test_own_data_have_to_be_named(config, capsys):
    said = fails(train, capsys, config, "--dataset", "own", "--reward", "math")
    assert "dataset=own needs data: set it to a hub id or a folder with the splits train and validation" in said
