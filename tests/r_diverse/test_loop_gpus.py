"""A run on GPUs: how many, and who has which; the servers beside a phase; what ZeRO-3 must not cut."""

import contextlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from r_diverse_coders import HashEncoder
from transformers.integrations import deepspeed

from common import models
from common.preemption import Preempted
from common.runs import exclusive
from common.stages import launcher
from r_diverse import RDiverseConfig, loop, train
from r_diverse.loop import dry_run
from r_diverse.questions import PLAIN_TEMPLATE
from r_diverse.train import parse


def test_numbers_of_gpus_that_would_end_a_run_late_are_refused(monkeypatch):
    phases = ["--challenger.use_vllm=true", "--solver.use_vllm=true"]
    allowed = [parse(["--model=m", *fields]) for fields in (["--engine=vllm", "--gpus=4"], ["--gpus=1", *phases], [])]
    served, both, second = (
        parse(["--model=m", *fields])
        for fields in (["--engine=vllm"], phases, [*phases[1:], "--solver.vllm_mode=server"])
    )
    monkeypatch.setattr(loop.torch.cuda, "is_available", lambda: False)
    for settings in (*allowed, served, both, second):  # vLLM on a CPU
        loop.check_gpus(settings)
    monkeypatch.setattr(loop.torch.cuda, "is_available", lambda: True)
    for settings in allowed:
        loop.check_gpus(settings)
    with pytest.raises(ValueError, match="engine=vllm needs gpus, got gpus=0, .* set gpus to 1 or more"):
        loop.check_gpus(served)
    with pytest.raises(ValueError, match="use_vllm of challenger and solver needs gpus, got gpus=0, .* set gpus to 1"):
        loop.check_gpus(both)
    with pytest.raises(ValueError, match="use_vllm of solver needs gpus"):
        loop.check_gpus(second)


@pytest.mark.parametrize(
    ("allowed", "seen"), [(None, "4,5,6,7"), ("8,9,10,11,12,13,14,15", "12,13,14,15"), ("0,1", None)]
)
def test_servers_have_replicas_of_several_gpus(tmp_path, monkeypatch, base, allowed, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)

    started = []

    @contextlib.contextmanager
    def serving(command, port, log, gpus, preexec_fn):
        started.append((command, gpus))
        yield "url"

    monkeypatch.setattr(loop, "serving", serving)
    fields = ["--gpus=8", "--engine=vllm", "--server_tensor_parallel=2", "--max_model_len=5120"]
    player = loop.SelfPlay(parse([f"--model={base}", *fields]), tmp_path, "base")
    with contextlib.ExitStack() as stack:
        if seen is None:
            with pytest.raises(ValueError, match="GPU number 7 is needed"):
                player._reward_servers(stack, str(base), tmp_path)
            return
        flags = player._reward_servers(stack, str(base), tmp_path)
    assert flags == ["--solver_url", "url", "--coder_url", "url"]
    for command, gpus in started:
        assert gpus == seen
        assert command[command.index("--data-parallel-size") + 1] == "2"
        assert command[command.index("--tensor-parallel-size") + 1] == "2"
    assert "--max-model-len" in started[0][0] and "--max-model-len" not in started[1][0]  # the coder has its own limit
    with player._server(str(base), tmp_path, 0.9, None):
        command, gpus = started[-1]
    assert gpus is None and command[command.index("--data-parallel-size") + 1] == "4"
    assert "--chat-template" not in command
    tokenizer = models.load_processor(str(base))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    models.load_config(str(base)).save_pretrained(tmp_path / "plain")
    with player._server(str(tmp_path / "plain"), tmp_path, 0.9, None):
        command, _ = started[-1]
    assert command[command.index("--chat-template") + 1] == PLAIN_TEMPLATE


def test_phases_and_servers_share_gpus_and_their_memory(tmp_path, monkeypatch, base):
    """The Challenger trains beside the servers of its reward, the Solver on all GPUs."""
    served, launched = [], []

    @contextlib.contextmanager
    def serve(self, model, folder, memory, gpus, **options):
        served.append((model, memory, gpus))
        yield "url"

    monkeypatch.setattr(loop.SelfPlay, "_served", serve)
    monkeypatch.setattr(loop.SelfPlay, "_launch", lambda self, phase, t, flags, gpus: launched.append((phase, gpus)))
    monkeypatch.setattr(loop, "skill_encoder", lambda run, cache, url: url)
    monkeypatch.setattr(loop.data, "embed", lambda folder, encoder, rows: {"url": encoder})
    fields = [f"--model={base}", "--gpus=8", "--engine=vllm", "--engine_memory=0.8", "--reward_memory=0.3"]
    player = loop.SelfPlay(parse(fields), tmp_path, "base")
    player._train_challenger(tmp_path, 1)
    player._train_solver(1)
    assert player._embed(tmp_path, []) == {"url": "url"}
    coder = player.run_config.coder
    assert served == [(str(base), 0.3, [4, 5, 6, 7]), (coder, 0.3, [4, 5, 6, 7]), (coder, 0.4, None)]
    assert launched == [("challenger", [0, 1, 2, 3]), ("solver", list(range(8)))]
    served.clear()  # one GPU is shared
    loop.SelfPlay(parse([*fields, "--gpus=1"]), tmp_path, "base")._train_challenger(tmp_path, 1)
    assert [gpus for *_, gpus in served] == [[0], [0]]
    served.clear()  # a penalty on the questions' words asks no coder
    loop.SelfPlay(parse([*fields, *loop.VARIANT_FLAGS["r_zero"]]), tmp_path, "base")._train_challenger(tmp_path, 1)
    assert [model for model, *_ in served] == [str(base)]
    served.clear()  # nor do rules
    rules = loop.SelfPlay(parse([*fields, "--coder=rules"]), tmp_path, "base")
    rules._train_challenger(tmp_path, 1)
    assert [model for model, *_ in served] == [str(base)]
    assert rules._embed(tmp_path, []) == {"url": None} and len(served) == 1


def test_without_gpus_of_its_own_a_phase_trains_in_the_process_of_the_run(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(loop, "train_challenger", lambda settings, t: trained.append(("challenger", settings, t)))
    monkeypatch.setattr(loop, "train_solver", lambda settings, t: trained.append(("solver", settings, t)))
    monkeypatch.setattr(loop, "call", lambda *_: pytest.fail("a command"))
    settings = parse(["--model=m"])
    player = loop.SelfPlay(settings, tmp_path, "base")
    player._train_challenger(tmp_path, 3)
    player._train_solver(3)
    assert trained == [("challenger", settings, 3), ("solver", settings, 3)]


def test_a_phase_has_the_config_that_the_run_began_with(tmp_path, monkeypatch):
    config, launched = tmp_path / "c.yaml", []
    config.write_text("model: m\nalpha: 0.5\nsolver:\n  report_to: [tensorboard]\n  save_steps: 8\n")
    settings = parse(["--config", str(config), "--beta=0.25"])
    config.write_text("model: m\nalpha: 0.75\n")  # for the next run

    def call(words, environment):
        launched.append(parse(words[words.index("--iteration") + 2 :]))

    monkeypatch.setattr(loop, "call", call)
    loop.SelfPlay(settings, tmp_path / "run", "base")._launch("solver", 1, [], [0])
    assert launched[0][:3] == settings[:3]
    assert (launched[0].run.alpha, launched[0].run.beta) == (0.5, 0.25)


def test_a_phase_is_a_command_on_its_gpus_that_has_to_succeed(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launched = []
    monkeypatch.setattr(loop, "call", lambda words, environment: launched.append((words, environment)) or 1)
    player = loop.SelfPlay(parse(["--model=m", "--engine=vllm", "--gpus=4", "--sharding=zero3"]), tmp_path, "base")
    with pytest.raises(ValueError, match="iteration 2, challenger: its command ended with exit code 1"):
        player._launch("challenger", 2, ["--solver_url", "url"], [0, 1])
    ((words, environment),) = launched
    for code in (130, 143):  # it was told to end: no failure
        monkeypatch.setattr(loop, "call", lambda *_, code=code: code)
        with pytest.raises(Preempted):
            player._launch("challenger", 2, [], [0, 1])
    start = launcher(2, "zero3")
    assert words[: len(start)] == start
    assert words[len(start) :][:6] == ["r_diverse.train", "challenger", "--iteration", "2", "--solver_url", "url"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_served_engine_is_named_by_the_models_place(tmp_path, monkeypatch):
    """And its server has the memory that is for engines without a trainer beside them."""
    served = []

    @contextlib.contextmanager
    def serve(self, model, folder, memory, gpus):
        served.append((model, memory, gpus))
        yield "url"

    monkeypatch.setattr(loop.SelfPlay, "_server", serve)
    monkeypatch.setattr(loop, "server_engine", lambda url, model, run: SimpleNamespace(url=url))
    fields = ["--model=m", "--engine=vllm", "--gpus=1", "--engine_memory=0.8", "--reward_memory=0.3"]
    player, model = loop.SelfPlay(parse(fields), tmp_path, "base"), str(tmp_path / "iteration_1/solver/model")
    asked = player._with_engine(
        model, tmp_path, lambda folder, engine, run, key: (engine.url, engine.name, key), "key"
    )
    assert asked == ("url", "iteration_1/solver/model", "key")
    assert served == [(model, 0.8, None)]


def test_a_batch_of_the_solver_is_of_all_gpus_and_replayed_questions_count(tmp_path, monkeypatch):
    fields = ["--model=m", "--min_questions=1", "--solver.per_device_train_batch_size=4", "--solver.num_generations=8"]
    fields += ["--solver.steps_per_generation=2"]
    needed = {}
    for gpus in (0, 1, 8):
        engine = ["--engine=vllm"] if gpus else []
        player = loop.SelfPlay(parse([*fields, f"--gpus={gpus}", *engine]), tmp_path, "base")
        needed[gpus] = player._needed()
    assert needed == {0: 1, 1: 1, 8: 8}
    monkeypatch.setattr(loop, "read_counts", lambda folder: {"current": 3, "replayed": 5})
    player._check_enough(1)
    monkeypatch.setattr(loop, "read_counts", lambda folder: {"current": 3, "replayed": 4})
    with pytest.raises(ValueError, match="7 questions with a solver program, 8 make a batch"):
        player._check_enough(1)


@pytest.mark.parametrize(("url", "size"), [("http://127.0.0.1:9/v1", 4096), (None, 512)])
def test_a_served_coder_is_asked_in_long_chunks(base, tmp_path, monkeypatch, url, size):
    """Each chunk waits for its slowest answer."""
    monkeypatch.setattr(train, "SentenceEncoder", lambda name: HashEncoder())
    run = RDiverseConfig("m", coder=str(base))
    assert train.skill_encoder(run, tmp_path, url).chunk_size == size


def test_a_coder_has_the_settings_of_the_run_and_its_commit_in_its_name(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "revised", lambda model: f"{model} abc")
    monkeypatch.setattr(train, "SentenceEncoder", lambda name: HashEncoder())
    run = RDiverseConfig("m", coder=str(base), coder_chat=False, engine_batch=7)
    local, served = (train.skill_encoder(run, tmp_path, url).coder for url in (None, "http://127.0.0.1:9/v1"))
    assert local.engine.name == served.engine.name == f"{base} abc"
    assert local.chat is served.chat is False
    assert (local.engine.batch_size, served.engine.workers, served.engine.model) == (7, 256, str(base))


@pytest.mark.parametrize(("measure", "centred"), [("sam", True), ("question", False)])
def test_vectors_of_programs_are_centred_on_programs(tmp_path, monkeypatch, measure, centred):
    given = []
    monkeypatch.setattr(train, "minilm", lambda centre: given.append(centre) or HashEncoder())
    train.skill_encoder(RDiverseConfig("m", coder="rules", encoder="minilm", measure=measure), tmp_path)
    assert bool(given[0]) == centred


def test_a_phase_loads_its_policy_by_the_settings(tmp_path, monkeypatch):
    """After its seed, with which adapters begin, and in no folder that another process is at."""
    loaded = []

    def load_model(name, dtype, **options):
        loaded.append(((name, dtype, options), torch.rand(1).item()))
        raise InterruptedError

    monkeypatch.setattr(train.models, "load_model", load_model)
    for seed in (0, 0, 1):
        fields = ["--policy_dtype=bfloat16", "--attn_implementation=eager", f"--seed={seed}"]
        settings = parse(["--model=m", f"--out={tmp_path}", *fields])
        config = train.phase_config(settings, "solver", 1)
        with pytest.raises(InterruptedError):
            train.train_phase(config, "m", None, None, settings.run)
    calls, drawn = zip(*loaded, strict=True)
    assert calls == (("m", torch.bfloat16, {"attn_implementation": "eager", "load_in_4bit": False}),) * 3
    assert drawn[0] == drawn[1] != drawn[2]
    with exclusive(Path(config.output_dir)), pytest.raises(ValueError, match="is in use by another process"):
        train.train_phase(config, "m", None, None, settings.run)


def test_adapters_under_zero3_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    fields = ["--model=m", "--lora_rank=2", "--sharding=zero3"]
    with pytest.raises(ValueError, match="lora_rank=2 does not run under zero3"):  # and before the base is evaluated
        parse([*fields, "--gpus=2"])
    assert parse([*fields, "--gpus=1"]).run.lora_rank == 2  # which is launched without it
    monkeypatch.setattr(train, "is_deepspeed_zero3_enabled", lambda: True)
    settings = parse(["--model=m", f"--out={tmp_path}", "--lora_rank=2"])
    config = train.phase_config(settings, "solver", 1)
    with pytest.raises(ValueError, match="lora_rank=2 does not run under zero3, .* use sharding zero2"):
        train.train_phase(config, "m", None, None, settings.run)


def test_the_memory_of_a_challenger_without_servers_counts_its_reward():
    fields = ["--model=org/Base-4B", "--gpus=8"]
    parts = train.reward_parts(parse(fields).run, 4e9)
    assert parts == {
        "Solver of the reward, 2 bytes each": 8e9,
        "coder, 2 bytes each": 14e9,
        "encoder, 2 bytes each": 3e9,
    }
    assert list(train.reward_parts(parse([*fields, "--engine=vllm"]).run, 4e9)) == ["encoder, 2 bytes each"]
    assert list(train.reward_parts(parse([*fields, "--penalty=none"]).run, 4e9)) == [
        "Solver of the reward, 2 bytes each"
    ]
    unknown = train.reward_parts(parse([*fields, "--engine=vllm", "--encoder=some/encoder"]).run, 4e9)
    assert unknown == {"encoder, not counted: its size is not known": 0.0}
    text = dry_run(parse([*fields, "--sharding=zero2"]))
    assert (
        "Solver of the reward, 2 bytes each"
        in text.split("process of the challenger")[1].split("process of the solver")[0]
    )


def test_the_models_of_the_reward_are_whole_under_zero3(tmp_path, base, monkeypatch):
    """Only the main process calls them; transformers would cut all that is loaded while ZeRO-3 is configured."""

    class Config:
        def is_zero3(self):
            return True

    seen, config = {}, Config()

    def record(name):
        return lambda *_: seen.update({name: deepspeed.is_deepspeed_zero3_enabled()})

    def stop(*_):
        raise InterruptedError

    for name in ("local_engine", "skill_encoder"):
        monkeypatch.setattr(train, name, record(name))
    monkeypatch.setattr("r_diverse.reward.ChallengerReward", stop)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", weakref.ref(config))
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(InterruptedError):
        train.train_challenger(parse([f"--model={base}", f"--out={tmp_path}"]), 1)
    assert seen == {"local_engine": False, "skill_encoder": False}
    assert deepspeed.is_deepspeed_zero3_enabled()
