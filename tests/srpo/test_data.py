"""The paper's data sets, their scorers on the real files, and the embedded additions."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from common.verifiers import choice_reward, tool_call_reward
from srpo import data

SUBJECTS = {"chemistry": "chemistry", "physics": "physics", "biology": "biology", "materials": "material"}
COUNTS = {  # answers A, B, C, D of train and test, from the specification
    "chemistry": ((462, 463, 485, 480), (64, 47, 57, 42)),
    "physics": ((158, 282, 141, 139), (19, 33, 14, 14)),
    "biology": ((154, 154, 66, 76), (16, 19, 3, 12)),
    "materials": ((217, 199, 210, 215), (30, 25, 22, 17)),
}


@pytest.fixture
def sciknoweval(shared_data) -> str:
    return str(shared_data / "sciknoweval")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_four_subjects_are_the_papers(sciknoweval, subject, capsys):
    splits = data.load_splits(subject, sciknoweval)
    for split, counts in zip(("train", "test"), COUNTS[subject], strict=True):
        answers = Counter(splits[split]["answer"])
        assert tuple(answers[letter] for letter in "ABCD") == counts
        assert len(set(splits[split]["id"])) == len(splits[split])
        system, user = splits[split][0]["prompt"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert system["content"] == data.SYSTEM  # what the hub's rows get is what the files have
        assert user["content"].endswith("\nPlease reason step by step.")
    shared = "test row 365 is also training row 377"
    assert (shared in capsys.readouterr().out) == (subject == "materials")


def test_a_line_of_json_ends_at_a_line_feed_only(tmp_path):
    row = {"prompt": "a\u2028b", "answer": "A", "idx": 0}
    (tmp_path / "rows.json").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert data.read_rows(tmp_path / "rows.json")[0]["prompt"][0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("answer", "message"),
    [('""', "row 0 has answer='', which .* cannot use"), ("null", "row 0: answer is null.* mend")],
)
def test_a_gold_answer_that_the_reward_cannot_use_stops_at_the_start(tmp_path, monkeypatch, answer, message):
    monkeypatch.setitem(data.DATASETS, "chemistry", data.Subject("chemistry", "Chemistry", 1, 1))
    source = folder(tmp_path, ROW, ROW.replace('"A"', answer))
    with pytest.raises(ValueError, match=message):
        data.load_splits("chemistry", source)


def test_a_subjects_own_folder_and_the_limit(sciknoweval):
    splits = data.load_splits("materials", str(Path(sciknoweval) / "material"), limit=5)
    assert (len(splits["train"]), len(splits["test"])) == (5, 94)


def test_the_limit_may_exceed_the_rows():
    assert [len(data.load_splits("additions", limit=limit)["train"]) for limit in (5, 10_000)] == [5, 9500]


def test_a_gold_call_that_only_the_strict_reward_reads_is_refused():
    rows = Dataset.from_dict({"id": ["7"], "answer": ['[{"name": "f", "arguments": {}}]']})
    with pytest.raises(ValueError, match="row 7 has answer=.* which tool_call_reward cannot use"):
        data.check_answers("tooluse", {"train": rows})


def test_local_prompts_are_rebuilt_from_the_hubs_columns(sciknoweval):
    """A row of the file, taken apart into the hub's columns, comes back as it was."""
    row = json.loads((Path(sciknoweval) / "chemistry" / "test.json").read_text().splitlines()[0])
    body = row["prompt"].removesuffix("\nPlease reason step by step.")
    question, options = body.split("\n\nA: ", 1)
    parts = re.split(r"\n([B-D]): ", options)
    hub = {
        "question": question,
        "choices": {"label": ["A", *parts[1::2]], "text": [parts[0], *parts[2::2]]},
        "answerKey": row["answer"],
    }
    got = data.hub_row(hub, 7)
    assert got["prompt"] == [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
    assert (got["answer"], got["id"]) == (row["answer"], "7")


def test_the_hub_path_filters_and_splits_by_the_stated_rule(monkeypatch):
    def question(i: int, **changes):
        row = {
            "question": f"Question {i}?",
            "choices": {"label": ["A", "B"], "text": ["yes", "no"]},
            "answerKey": "A",
            "domain": "Biology",
            "type": "mcq-2-choices",
            "details": {"level": "L3"},
        }
        return {**row, **changes}

    rows = [question(i) for i in range(500)]
    rows += [question(i, domain="Physics") for i in range(3)]
    rows += [question(0, type="open-ended-qa"), question(1, details={"level": "L1"})]
    monkeypatch.setattr("datasets.load_dataset", lambda source, split: Dataset.from_list(rows))
    splits = data.load_splits("biology")
    again = Dataset.from_list(rows[:500]).train_test_split(test_size=0.1, seed=42)
    assert splits["test"]["id"] == [q.split()[1][:-1] for q in again["test"]["question"]]
    assert len(splits["train"]) == 450


# --- scorers ----------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("compatible", [True, False])
def test_the_gold_letter_in_the_expected_form_scores_one(sciknoweval, subject, compatible):
    golds = [answer for split in data.load_splits(subject, sciknoweval).values() for answer in split["answer"]]
    written = [f"<reasoning>\nWhy.\n</reasoning>\n<answer>\n{gold}\n</answer>" for gold in golds]
    assert choice_reward(written, answer=golds, compatible=compatible) == [1.0] * len(golds)
    wrong = [text.replace(f"\n{gold}\n", "\nE\n") for text, gold in zip(written, golds, strict=True)]
    assert choice_reward(wrong, answer=golds, compatible=compatible) == [0.0] * len(golds)


@pytest.mark.parametrize(
    ("response", "compatible", "strict"),
    [
        ("<answer>A</answer>", 1.0, 1.0),
        ("<answer>B</answer> no, <answer> A </answer>", 1.0, None),
        ("A", 1.0, 1.0),
        ("A</answer>", 1.0, None),
        ("<answer>A", 1.0, None),
        ("<answer>A.</answer>", 0.0, None),
        ("<answer>a</answer>", 0.0, 1.0),
        ("The answer is A", 0.0, 1.0),
        ("<answer>A or B</answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_choice_reward_with_the_quirks_of_the_release(response, compatible, strict):
    assert choice_reward([response], answer=["A"], compatible=True) == [compatible]
    if strict is not None:
        assert choice_reward([response], answer=["A"]) == [strict]


def test_choices_without_the_tag_are_counted():
    """The release's scorer takes a bare letter: a policy may learn to leave the form out."""
    logged = {}
    said = ["<answer>A</answer>", "A", "A</answer>", "<answer>B"]
    assert choice_reward(said, answer=["A"] * 4, log_metric=logged.__setitem__, compatible=True) == [1.0] * 3 + [0.0]
    assert logged["untagged"] == 0.5


def test_the_reward_of_a_data_set_is_the_releases_unless_it_is_strict():
    response, calls = "<answer>A", "Action: f\nAction Input: {}\nAction: g\nAction Input: {}"
    gold = '[{"Action": "g", "Action_Input": "{}"}, {"Action": "f", "Action_Input": "{}"}]'
    for strict in (False, True):
        choice = choice_reward([response], answer=["A"], compatible=not strict)
        assert data.reward_of("chemistry", strict)([response], answer=["A"]) == choice
        call = tool_call_reward([calls], answer=[gold], compatible=not strict)
        assert data.reward_of("tooluse", strict)([calls], answer=[gold]) == call
    assert data.reward_of("chemistry")([response], answer=["A"]) == [1.0]


def written_calls(answer: str) -> str:
    return "\n".join(
        f"Thought: so\nAction: {c['Action']}\nAction Input: {c['Action_Input']}" for c in json.loads(answer)
    )


def test_tool_use_gold_answers_score_one_wherever_they_can(shared_data):
    rows = data.read_rows(shared_data / "tooluse" / "test.json")
    assert len(rows) == 68
    golds = [row["answer"] for row in rows]
    written = [written_calls(gold) for gold in golds]
    strict = tool_call_reward(written, answer=golds)
    assert [row["id"] for row, r in zip(rows, strict, strict=True) if r != 1.0] == []
    release = tool_call_reward(written, answer=golds, compatible=True)
    # a nested input, which the release reads up to its first brace; the second has a gold name in brackets besides
    assert [row["id"] for row, r in zip(rows, release, strict=True) if r != 1.0] == ["4072", "4079"]


def test_the_order_of_calls_matters_to_the_release_only(shared_data):
    golds = [row["answer"] for row in data.read_rows(shared_data / "tooluse" / "test.json")]
    golds = [gold for gold in golds if len(json.loads(gold)) > 1]
    assert len(golds) == 19
    reverse = [written_calls(json.dumps(json.loads(gold)[::-1])) for gold in golds]
    assert tool_call_reward(reverse, answer=golds) == [1.0] * 19
    # 5 by the order of the merge, and row 4079, which cannot be right in any order
    assert sum(tool_call_reward(reverse, answer=golds, compatible=True)) == 19 - 5 - 1


GOLD = '[{"Action": "search", "Action_Input": "{\\"q\\": \\"x\\", \\"n\\": 1}"}]'


@pytest.mark.parametrize(
    ("response", "compatible", "strict"),
    [
        ('Action: search\nAction Input: {"q": "x", "n": 1}', 1.0, 1.0),
        ('Action: search\nAction Input: {"n": 1, "q": "x"} and so on', 1.0, 1.0),
        ('Action: search\nAction Input: {"n": 1, "q": "x"} or {"n": 2, "q": "x"}', 1.0, 0.0),
        ('Action: search\nAction Input: {"n": 1, "q": "x"}\nAction Input: {}', 1.0, 0.0),
        ('Action: search\nAction Input: {"n": 1, "q": "x"}\nAction Input:{}', 1.0, 0.0),
        ('Action: search\nAction Input: {"n": 1, "q": "x"} {note}\nThought: an Action Input: here', 1.0, 1.0),
        ('<think>perhaps\nAction: search\nAction Input: {"n": 1, "q": "x"}', 1.0, 0.0),
        ('Action: search\nAction Input: {"q": "x"}\nAction Input: {"n": 1}', 1.0, 0.0),
        ('Action: search\nAction Input: {"q": "x", "n": 1.0}', 1.0, 0.0),
        ('Action: search\nAction Input: {"q": "x", "n": 2}', 0.0, 0.0),
        ('Action: find\nAction Input: {"q": "x", "n": 1}', 0.0, 0.0),
        ('Action: search\nAction: search\nAction Input: {"q": "x", "n": 1}', 0.0, 0.0),
        ('Action: search\nAction Input: {"q": "x", "n": 1', 0.0, 0.0),
        ("Action: search\nAction Input: __import__('os').system('true')", 0.0, 0.0),
        ("I would search for x.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_tool_call_reward_on_action_lines(response, compatible, strict):
    assert tool_call_reward([response], answer=[GOLD], compatible=True) == [compatible]
    assert tool_call_reward([response], answer=[GOLD]) == [strict]


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize(
    "response",
    [
        "Action: a\nAction Input: " + "{" * 200_000,
        "Action: a\nAction Input: " + '{"a":' * 50_000,
        "Action Input: " * 50_000,
        "Action: " * 100_000,
        "Action: a\nAction Input: " + "[" * 100_000,
        "\x00Action: a\nAction Input: {\x00}",
        "<answer>" * 100_000,
        "</answer>" * 100_000,
    ],
)
def test_hostile_responses_are_wrong_and_fast(response, compatible):
    started = time.monotonic()
    assert tool_call_reward([response], answer=[GOLD], compatible=compatible) == [0.0]
    assert choice_reward([response], answer=["A"], compatible=compatible) == [0.0]
    assert time.monotonic() - started < 5


# --- bad input ----------------------------------------------------------------


def folder(path: Path, train: str = "", test: str = "") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "train.json").write_text(train)
    (path / "test.json").write_text(test)
    return str(path)


ROW = json.dumps({"prompt": "p", "answer": "A", "idx": 0, "system": None})


@pytest.mark.parametrize(
    ("dataset", "source", "message"),
    [
        ("chemstry", None, "dataset must be one of chemistry"),
        ("chemistry", "/nowhere/at/all", "there is no such folder"),
        ("chemistry", "empty", "holds no test.json"),
        ("chemistry", "cut", r"train.json, line 2 is no JSON.*cut off"),
        ("chemistry", "columns", r"line 1 has no answer"),
        ("chemistry", "small", r"chemistry has .*'train': 1.*the paper's has.*1890"),
        ("chemistry", "no idx", r"line 1 has no idx"),
        ("chemistry", "messages", r"train.json, line 2: prompt must be a text, got \[{'role'"),
        ("chemistry", "latin", r"train.json is no text in UTF-8 .*: convert it"),
        ("chemistry", "mark", r"chemistry has .*'train': 1.*the paper's has.*1890"),  # it can be read
        ("tooluse", "test only", "no train.json: training rows of ToolAlpaca"),
        ("tooluse", None, "tooluse is on no hub"),
    ],
)
def test_bad_data_is_one_clear_sentence(tmp_path, monkeypatch, dataset, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "cut", f"{ROW}\n{ROW[:20]}", ROW)
    folder(tmp_path / "columns", '{"prompt": "p", "idx": 1}', ROW)
    folder(tmp_path / "no idx", '{"prompt": "p", "answer": "A"}', ROW)
    folder(tmp_path / "small", ROW, ROW)
    folder(tmp_path / "messages", f'{ROW}\n{{"prompt": [{{"role": "user"}}], "answer": "A", "idx": 1}}', ROW)
    folder(tmp_path / "latin", ROW, ROW)
    (tmp_path / "latin" / "train.json").write_bytes(ROW.replace('"p"', '"é"').encode("latin-1"))
    folder(tmp_path / "mark", f"\ufeff{ROW}\r\n", f"\ufeff{ROW}")  # a byte-order mark, as editors of Windows write it
    folder(tmp_path / "test only", ROW, ROW)
    (tmp_path / "test only" / "train.json").unlink()
    with pytest.raises(ValueError, match=message) as error:
        data.load_splits(dataset, source)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_clear_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="hub gave no such data set") as error:
        data.load_splits("physics")
    assert "\n" not in str(error.value)


# --- additions ----------------------------------------------------------------


def test_additions_are_all_pairs_once_and_the_splits_are_disjoint():
    splits = data.additions()
    ids = [row_id for split in splits.values() for row_id in split["id"]]
    assert sorted(ids) == sorted(f"{a}+{b}" for a in range(100) for b in range(100))
    row = splits["test"][0]
    assert row["prompt"] == [{"role": "user", "content": row["id"] + "="}]
    assert int(row["answer"]) == sum(map(int, row["id"].split("+")))
    assert splits["test"]["id"] == data.additions()["test"]["id"]


def test_the_exact_reward_takes_the_whole_response():
    golds = ["46"] * 5
    responses = ["46", " 46\n", "46.", "046", [{"role": "assistant", "content": "46"}]]
    assert data.exact_reward(responses, golds) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_demonstration_row_is_the_self_teachers_prompt():
    row = {"prompt": [{"role": "user", "content": "1+2="}], "answer": "3", "id": "1+2"}
    assert data.with_demonstration(row)["prompt"][0]["content"] == (
        "1+2=\nCorrect solution:\n\n3\n\nCorrectly solve the original question."
    )
    assert row["prompt"][0]["content"] == "1+2="
