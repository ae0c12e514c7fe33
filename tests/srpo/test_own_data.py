"""Own data with an own reward on SRPO's command line: rows, refusals, and a run that is the additions' own."""

import json
import re
from pathlib import Path

import pytest
from training_runs import fails

from common.runs import read_jsonl
from srpo import data, evaluate, loop, train

EXACT = """
def reward(completions, answer, **columns):
    return [float(c[0]["content"].strip() == gold) for c, gold in zip(completions, answer)]
"""


def write(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def reward(folder: Path, text: str = EXACT) -> str:
    (folder / "rewards.py").write_text(text)
    return f"{folder / 'rewards.py'}:reward"


def test_texts_and_messages_become_rows_and_other_columns_stay(tmp_path):
    question = {"role": "user", "content": "1+1="}
    told, second = [{"role": "system", "content": "Add."}, question], {"prompt": "2+2=", "answer": "4", "idx": 9}
    source = write(
        tmp_path / "rows",
        train=[{"prompt": "1+1=", "answer": "2", "system": "Add.", "idx": 7}, second],
        test=[{"prompt": [told[0], {**question, "name": "Ann"}], "label": [2]}],
    )
    splits = data.load_splits("own", source, reward=reward(tmp_path, "def reward(label=None, **columns): ..."))
    assert splits["train"].to_list() == [
        {"id": "7", "prompt": told, "answer": "2"},
        {"id": "9", "prompt": [{"role": "user", "content": "2+2="}], "answer": "4"},
    ]
    assert splits["test"].to_list() == [{"id": "0", "prompt": told, "answer": None, "label": [2]}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1+1=", "answer": "2"}, "split 'test' has no column 'prompt' among question, answer: rename"),
        (
            {"prompt": "1+1=", "answer": "2", "day": "2026-01-01T00:00:00"},
            "a column holds no plain values .*: leave it",
        ),
        ({"prompt": "1+1=", "answer": "2", "images": ["1.png"]}, "split 'test' has the column 'images', .* rename it"),
        ({"prompt": " ", "answer": "2"}, "row 0: prompt must be a text, .* got prompt ' '"),
        ({"prompt": [{"role": "assistant", "content": "1"}], "answer": "2"}, "row 0: .* the last from the user"),
        ({"prompt": [{"role": "user", "content": [{"text": "1"}]}], "answer": "2"}, "row 0: .* messages of texts"),
        ({"prompt": ["1+1="], "answer": "2"}, "row 0: .* messages of texts"),
        (
            {"prompt": [{"content": "1"}, {"role": "user", "content": "2"}], "answer": "2"},
            "row 0: .* the roles system",
        ),
        ({"prompt": [{"role": "user", "content": "1"}], "system": "Add.", "answer": "2"}, "and system 'Add.'"),
        ({"prompt": "1+1=", "answer": ""}, "row 0 has answer='', which math_reward cannot use: mend it"),
        ({"prompt": "1+1="}, "own, row 0: answer is null, which no response can equal: mend"),
        ({"prompt": "1+1=", "answer": True}, "own, row 0: answer is True, and no text: mend"),
    ],
)
def test_a_row_that_cannot_be_used_stops_at_the_start(tmp_path, row, message):
    source = write(tmp_path / "rows", train=[{"prompt": "1+1=", "answer": "2"}], test=[row])
    with pytest.raises(ValueError, match=message):
        data.load_splits("own", source, reward="math")


def test_rows_are_told_apart_by_their_ids(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "id": i // 2} for i in range(3)]
    with pytest.raises(ValueError, match="split 'train': 2 rows have the id '0': give each its own, or leave ids out"):
        data.load_splits("own", write(tmp_path / "rows", train=rows, test=rows), reward="numeric")


def test_prompts_in_both_splits_are_counted(tmp_path, capsys):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    data.load_splits("own", write(tmp_path / "rows", train=rows, test=rows[1:]), reward="math")
    assert "own: 2 prompts of test are also in train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--dataset", "own", "--data", "ROWS"], "dataset=own needs reward: math, choice, .* got None"),
        (["--dataset", "own", "--data", "ROWS", "--reward", "maths"], "or FILE.py:FUNCTION; got 'maths'"),
        (["--dataset", "own", "--reward", "math"], "dataset=own needs data: set it to a hub id, or to a folder"),
        (["--dataset", "own", "--reward", "math", "--data", "ROWS/no"], "there is no such folder"),
        (["--dataset", "own", "--reward", "math", "--data", "ROWS/test.jsonl"], "is a file: set data to a folder"),
        (["--dataset", "own", "--reward", "math", "--data", "ROWS/half"], "split 'test': local data"),
        (["--reward", "math"], "reward='math' is for dataset=own, and additions has its own reward: leave it out"),
        (
            ["--dataset", "own", "--data", "ROWS", "--reward", "math", "--strict", "true"],
            "leave it out with dataset=own",
        ),
        (["--dataset", "own", "--data", "ROWS", "--reward", "ROWS/no.py:f"], "there is no file '.*no.py'"),
    ],
)
def test_a_mistake_in_the_fields_is_one_sentence(config, tmp_path, capsys, fields, message):
    rows = [{"prompt": "1+1=", "answer": "2"}]
    write(tmp_path / "rows", train=rows, test=rows)
    (tmp_path / "rows/half").mkdir()
    write(tmp_path / "rows/half", train=rows)
    fields = [field.replace("ROWS", str(tmp_path / "rows")) for field in fields]
    assert re.search(message, fails(train, capsys, config, *fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no plain function 'reward', but nothing of this name: write one with def"),
        ("from functools import partial\nreward = partial(print)", "no plain function 'reward', but a partial: write"),
        ("async def reward(completions, **columns): ...", "has no plain function 'reward'"),
        ("def reward(completions, gold, **columns): ...", "asks for gold, and there is .* columns answer, id: give"),
        ("def reward(completions, answer): ...", r"must take \*\*columns too"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_a_model_is_loaded(tmp_path, text, message):
    rows = [{"prompt": "1+1=", "answer": "2"}]
    source = write(tmp_path / "rows", train=rows, test=rows)
    with pytest.raises(ValueError, match=message):
        data.load_splits("own", source, reward=reward(tmp_path, text))


def test_numbers_of_a_csv_file_are_answers(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("prompt,answer\n1+1=,2\n")
    assert data.load_splits("own", str(tmp_path), reward="math")["test"]["answer"] == ["2"]


def test_own_data_stand_alone_under_the_preset_of_all_data_sets(config, tmp_path, capsys):
    rows = [{"prompt": "1+1=", "answer": "2"}]
    fields = ["--dataset", "own", "--data", write(tmp_path / "rows", train=rows, test=rows), "--reward", "math"]
    assert loop.main(["--config", str(config), *fields, "--datasets", "all", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "--dataset own --seed" in said and "missing" not in said and "chemistry" not in said


def test_a_dry_run_names_what_is_missing(config, tmp_path, capsys):
    fields = ["--dataset", "own", "--data", str(tmp_path / "no"), "--reward", f"{tmp_path}/no.py:f"]
    assert loop.main(["--config", str(config), *fields, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert f"data '{tmp_path}/no': there is no such folder" in said
    assert f"; reward '{tmp_path}/no.py:f': there is no file" in said


def test_the_additions_as_own_data_are_the_same_training_and_evaluation(config, tmp_path):
    rows = {
        split: [{"prompt": row["prompt"][0]["content"], "answer": row["answer"], "id": row["id"]} for row in splits]
        for split, splits in data.additions().items()
    }
    source = write(tmp_path / "rows", **rows)
    own = ["--dataset", "own", "--data", source, "--reward", reward(tmp_path)]
    found = []
    for fields in ([], own):
        words = ["--config", str(config), *fields, "--max_steps", "2"]
        assert train.main(words) == 0 and evaluate.main(["run", *words]) == 0
        run = train.run_path(*train.parse(words))
        records = read_jsonl(run / "eval/checkpoint-2" / ("own" if fields else "additions") / "scored.jsonl")
        found.append([(run / "model/model.safetensors").read_bytes(), [(r["response"], r["score"]) for r in records]])
    assert found[0] == found[1]


@pytest.mark.parametrize("change", ["reward", "column"])
def test_another_reward_or_column_is_another_run_and_another_result(config, tmp_path, capsys, change):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "weight": 1.0} for i in range(16)]
    source = write(tmp_path / "rows", train=[{**row, "level": 1} for row in rows], test=rows[:4])
    fields = ["--dataset", "own", "--data", source, "--reward", reward(tmp_path), "--max_steps", "2"]
    words = ["--config", str(config), *fields]
    assert train.main(words) == 0 and evaluate.main(["run", *words]) == 0
    if change == "reward":
        reward(tmp_path, EXACT.replace("strip()", "lstrip()"))
    else:
        write(tmp_path / "rows", test=[{**row, "weight": 2.0} for row in rows[:4]])
    names = {"reward": ("reward's file", "the reward's file"), "column": ("data test", "test problems")}
    assert names[change][0] in fails(train, capsys, config, *fields)
    capsys.readouterr()
    assert evaluate.main(["run", *words]) == 2
    assert f"holds results of {names[change][1]}" in capsys.readouterr().err


def test_a_response_is_correct_in_evaluation_where_it_is_in_routing(config, tmp_path):
    half = "def reward(completions, answer, **columns): return [float(answer[0]) for _ in completions]"
    rows = [{"prompt": "1", "answer": "0.6"}, {"prompt": "2", "answer": "0.4"}, {"prompt": "3", "answer": "nan"}]
    source = write(tmp_path / "rows", train=rows, test=rows)
    fields = ["--dataset", "own", "--data", source, "--reward", reward(tmp_path, half)]
    benchmark = evaluate.benchmark_of(*train.parse(["--config", str(config), *fields]))
    assert [benchmark.score("", row) for row in benchmark.rows[:2]] == [1.0, 0.0]
    lower = train.parse(["--config", str(config), *fields, "--reward_threshold", "0.3"])
    assert evaluate.settings_of("model", benchmark, *lower, tmp_path)["reward_threshold"] == 0.3
    with pytest.raises(ValueError, match="the reward of row 2 is nan: give failed checks 0.0"):
        benchmark.score("", benchmark.rows[2])
