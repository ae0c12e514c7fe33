"""`python -m common.evaluation`: what it prints, mistakes, kills, what reaches the engine."""

import copy
import json
import signal
import time
from pathlib import Path

import forks
import peft
import pytest
from transformers import AutoTokenizer

from common.evaluation import __main__ as command
from common.evaluation.engines import turn_end_id
from common.lora import lora_config
from common.runs import read_jsonl
from common.tiny import tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]


def model_folder(path: Path) -> str:
    model, tokenizer = tiny_qwen3(hidden=32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def questions(path: Path, count: int = 30) -> str:
    path.write_text("".join(json.dumps({"problem": f"{i}?", "answer": i}) + "\n" for i in range(count)))
    return str(path)


def arguments(tmp_path: Path, out: str, *more: str) -> list[str]:
    data = questions(tmp_path / "aime24.jsonl")
    shared = [
        "--model",
        str(tmp_path / "model"),
        "--benchmark",
        "aime24",
        "--data",
        data,
        "--out",
        str(tmp_path / out),
    ]
    return [*shared, "--samples", "3", "--max_new_tokens", "8", "--batch_size", "10", *more]


def test_several_samples_of_a_greedy_benchmark_are_drawn(tmp_path, capsys, monkeypatch):
    """Without --temperature, and without --out: the command as one first types it."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    rows = "".join(json.dumps({"problem": f"{i}?", "answer": str(i)}) + "\n" for i in range(272))
    (tmp_path / "minerva.jsonl").write_text(rows)
    words = ["--model", "model", "--benchmark", "minerva_math", "--data", "minerva.jsonl", "--limit", "4"]
    assert command.main([*words, "--samples", "2", "--max_new_tokens", "4"]) == 0
    assert "2 samples are drawn with {'temperature': 0.6, 'top_p': 0.95}" in capsys.readouterr().err
    identity = json.loads((tmp_path / "runs/evaluation/model/minerva_math/identity.json").read_text())
    assert (identity["decoding"]["temperature"], identity["samples"]) == (0.6, 2)
    assert len(read_jsonl(tmp_path / "runs/evaluation/model/minerva_math/samples.jsonl")) == 4 * 2
    for more in (["--samples", "1"], ["--samples", "2", "--temperature", "0.3"]):
        assert command.main([*words, *more, "--max_new_tokens", "4", "--out", more[-1]]) == 0
        assert "are drawn with" not in capsys.readouterr().err
    greedy, chosen = (json.loads(Path(f"{out}/minerva_math/identity.json").read_text()) for out in ("1", "0.3"))
    assert (greedy["decoding"]["temperature"], chosen["decoding"]["temperature"]) == (0.0, 0.3)


def test_the_command_prints_value_interval_and_rates(tmp_path, capsys):
    model_folder(tmp_path / "model")
    assert command.main(arguments(tmp_path, "out")) == 0
    printed = capsys.readouterr().out.splitlines()[-1]  # an accelerator's library may have a line of its own
    assert printed.startswith("avg@3 = 0.")
    assert "maj@3 = 0." in printed
    assert "over 30 questions" in printed
    assert "truncated" in printed
    assert "no_answer" in printed
    assert command.main(arguments(tmp_path, "out", "--rescore")) == 0
    assert capsys.readouterr().out.splitlines() == [printed]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "math5000"], "unknown benchmark"),
        (["--model", "/nowhere"], "no such folder"),
        (
            ["--data", "/nowhere.jsonl"],
            "cannot read /nowhere.jsonl (there is no such file); pass --data (of va_opd: --benchmark_data)",
        ),
        (["--temperature", "0"], "3 samples at temperature 0"),
        (["--temperature", "nan"], "temperature must be at least 0 and finite"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--tokenizer", "x"], "tokenizer 'x' is for a --server"),
        (["--server", "http://127.0.0.1:9/v1", "--tokenizer", "/nowhere"], "there is no such folder"),
        (["--chat_template_kwargs", '{"tokenize": false}'], "chat_template_kwargs must leave out tokenize"),
        (["--benchmark", "math500"], "30 rows where 500 are expected"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, more, message):
    model_folder(tmp_path / "model")
    assert command.main(arguments(tmp_path, "out", *more)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no --model to ask"),
        (["--responses", "nowhere.jsonl"], "there is no file of responses nowhere.jsonl"),
        (["--model", "x", "--samples", "0"], "samples must be at least 1"),
        (["--model", "x", "--limit", "-1"], "limit must be at least 1"),
        (["--model", "x", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--model", "x", "--tokenizer", "y"], "is for a --server"),
        (["--model", "x", "--engine_options", "{bad"], "engine_options must be JSON"),
        (["--model", "x", "--engine_options", '{"dtype": "half"}'], "engine_options are for --engine vllm"),
        (["--model", "x", "--chat_template_kwargs", "[]"], "chat_template_kwargs must be JSON"),
    ],
)
def test_a_mistake_is_told_before_the_benchmark_is_fetched(capsys, monkeypatch, words, message):
    monkeypatch.setattr("common.evaluation.load_benchmark", lambda *_: pytest.fail("fetched"))
    assert command.main(["--benchmark", "math500", *words]) == 2
    assert message in capsys.readouterr().err


def test_records_and_responses_are_not_scored_at_once(tmp_path, capsys):
    path = tmp_path / "theirs.jsonl"
    path.write_text("")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--benchmark", "math500", "--rescore", "--responses", str(path)])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_killed_evaluation_ends_with_the_same_records(tmp_path):
    model_folder(tmp_path / "model")
    assert command.main(arguments(tmp_path, "straight")) == 0
    program = """
import sys, time
from common.evaluation import __main__, run
run.rescore = lambda *_: time.sleep(600)  # until it is killed
__main__.main(sys.argv[1:])
"""
    process = forks.start(["-c", program, *arguments(tmp_path, "killed")], tmp_path / "log.txt", tmp_path)
    records = tmp_path / "killed/aime24/samples.jsonl"
    while process.exitcode is None and not records.exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert command.main(arguments(tmp_path, "killed")) == 0
    assert records.read_bytes() == (tmp_path / "straight/aime24/samples.jsonl").read_bytes()


def test_two_adapters_of_one_base_are_two_models(tmp_path, capsys):
    model, tokenizer = tiny_qwen3(hidden=32)
    for folder in (tmp_path / "base", *(tmp_path / name / "model" for name in ("a", "b"))):
        saved = model if folder.name == "base" else peft.get_peft_model(copy.deepcopy(model), lora_config(2))
        if folder.name != "base":
            saved.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "1+1?", "answer": "#### 2"}] * 1319
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--benchmark", "gsm8k", "--data", str(data), "--limit", "1", "--max_new_tokens", "2"]
    words += ["--out", str(tmp_path / "out")]
    assert command.main(["--model", str(tmp_path / "a/model"), *words]) == 0
    assert command.main(["--model", str(tmp_path / "b/model"), *words]) == 2
    assert "holds records with model=" in capsys.readouterr().err


def test_the_command_gives_its_options_to_the_engine(tmp_path, monkeypatch, capsys):
    asked = []

    def load_engine(*given, **options):
        asked.append((given, options))
        raise ValueError("no GPU")

    monkeypatch.setattr("common.evaluation.load_engine", load_engine)
    words = ["--engine", "vllm", "--seed", "7", "--chat_template_kwargs", '{"a": 1}', "--batch_size", "3"]
    words += ["--engine_options", '{"max_model_len": 99}']
    assert command.main(arguments(tmp_path, "out", *words)) == 2
    assert "no GPU" in capsys.readouterr().err
    ((given, options),) = asked
    assert given == ("vllm", str(tmp_path / "model"), 3)
    assert (options["chat_template_kwargs"], options["options"]) == ({"a": 1}, {"seed": 7, "max_model_len": 99})


def test_a_server_hears_of_the_end_of_a_turn(chat_server, tmp_path, capsys):
    pytest.importorskip("openai")
    model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    server = ["--server", chat_server.url]
    named = [*server, "--tokenizer", str(tmp_path / "model"), "--limit", "5"]
    named += ["--chat_template_kwargs", '{"enable_thinking": false}']
    assert command.main(arguments(tmp_path, "out", *named)) == 0
    assert all(asked["stop_token_ids"] == [turn_end_id(tokenizer)] for asked in chat_server.asked)
    assert {(asked["max_tokens"], *asked["chat_template_kwargs"].items()) for asked in chat_server.asked} == {
        (8, ("enable_thinking", False))
    }
    seeds = {asked["seed"] for asked in chat_server.asked}
    assert command.main(arguments(tmp_path, "seed 1", *named, "--seed", "1")) == 0
    assert len(seeds) == 15 and seeds.isdisjoint(asked["seed"] for asked in chat_server.asked[15:])
    model_folder(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert command.main(arguments(tmp_path, "other", *server, "--tokenizer", str(tmp_path / "plain"))) == 2
    assert "no chat template that closes a turn" in capsys.readouterr().err
