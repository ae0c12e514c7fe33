"""What the commands `python -m METHOD.train` have in common."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {"va_opd": "geo3k", "srpo": "qwen3_8b"}


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("flag", ["--dry_run", "--dry_run=true", "--dry-run"])
def test_settings_for_gpus_can_be_looked_at_without_one(method, flag, capsys):
    config = ["--config", str(ROOT / f"{method}/configs/{PRESETS[method]}.yaml")]
    assert importlib.import_module(f"{method}.train").main([*config, flag]) == 0
    assert importlib.import_module(f"benchmarks.{method}").main([*config, "--out", "/nowhere"]) == 2
    assert "bf16" not in capsys.readouterr().err


@pytest.mark.parametrize("method", [*PRESETS, "r_diverse"])
@pytest.mark.parametrize("command", ["train", "loop"])
def test_of_two_config_files_none_counts_silently(method, command, tmp_path, capsys):
    files = [str(tmp_path / f"{name}.yaml") for name in "ab"]
    for file in files:
        Path(file).write_text("model: a\n")
    first = ["solver", "--iteration=1"] if (method, command) == ("r_diverse", "train") else []
    for words in (["--config", files[0], "--config", files[1]], [f"--config={files[0]}", "--config", files[1]]):
        assert importlib.import_module(f"{method}.{command}").main([*first, *words, "--dry_run"]) == 2
        assert f"--config is given more than once, {files[0]} and {files[1]}: pass one" in capsys.readouterr().err


@pytest.mark.parametrize("method", [*PRESETS, "r_diverse"])
def test_words_without_a_field_are_one_sentence(method, capsys):
    config = ["--config", str(ROOT / f"{method}/configs/tiny.yaml")]
    for words in (["-dry_run"], ["dry_run"], ["--variants", "all,", "b"]):
        assert importlib.import_module(f"{method}.loop").main([*config, *words]) == 2
        assert capsys.readouterr().err.startswith(f"{method}.loop: {words[-1]!r} is no flag: write --field value")


FIRST_WORDS = {"srpo.evaluate": "run", "va_opd.evaluate": "teacher", "r_diverse.train": "solver"}


@pytest.mark.parametrize("command", FIRST_WORDS)
def test_help_in_place_of_the_first_word_says_which_words_there_are(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main(["--help"])
    assert ended.value.code == 0 and FIRST_WORDS[command] in capsys.readouterr().out


@pytest.mark.parametrize("method", PRESETS)
def test_a_dry_run_of_an_evaluation_is_refused(method, capsys):
    words = ["base", "--config", str(ROOT / f"{method}/configs/tiny.yaml"), "--dry_run"]
    assert importlib.import_module(f"{method}.evaluate").main(words) == 2
    assert f"leave it out, or ask {method}.loop, which shows all commands" in capsys.readouterr().err


def test_a_dry_run_of_a_phase_trains_nothing(capsys):
    words = ["solver", "--iteration=1", "--config", str(ROOT / "r_diverse/configs/qwen3_4b.yaml"), "--dry_run"]
    assert importlib.import_module("r_diverse.train").main(words) == 0
    assert "training process of the solver" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "got"), [([], "none"), (["--config"], "--config"), (["runs"], "runs")])
def test_what_is_to_be_evaluated_comes_first(words, got, capsys):
    assert importlib.import_module("srpo.evaluate").main(words) == 2
    assert f"first argument must be one of run, base; got {got} (" in capsys.readouterr().err


def test_the_fields_of_a_self_play_run_can_be_listed(capsys):
    """The loop's own `--help` has no room for them, and said nowhere where they are."""
    with pytest.raises(SystemExit):
        importlib.import_module("r_diverse.train").main(["--help"])
    assert "replay_fraction (`float`" in capsys.readouterr().out
