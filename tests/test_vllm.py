"""All that goes through vLLM, on its CPU build: evaluation, colocated rollouts, a server. `make test-vllm` runs it."""

import inspect
import io
import itertools
import os
import re
import signal
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Timer

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from benchmarks import vllm_on_cpu
from benchmarks.vllm_gap import with_video

os.environ.update(vllm_on_cpu.SETTINGS)  # before vLLM reads them

import numpy as np
import peft
import torch
import va_opd_trainers
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    Qwen3VLForConditionalGeneration,
)
from trl.generation.vllm_client import VLLMClient
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.multimodal.image import convert_image_mode, normalize_image

from common import models
from common.evaluation import Decoding, Prompt, ServerEngine, TransformersEngine, VLLMEngine
from common.lora import lora_config, with_adapters
from common.runs import read_jsonl, write_jsonl
from common.tiny import char_tokenizer, tiny_qwen3_vl
from r_diverse import data, engines, loop, servers
from r_diverse import doctor as r_diverse_doctor
from r_diverse.config import SolverConfig
from r_diverse.servers import free_port, serving
from r_diverse.train import parse
from r_diverse.trainer import PhaseTrainer
from srpo import SRPOConfig, SRPOTrainer, train
from srpo import doctor as srpo_doctor
from srpo.teacher import SelfTeacher
from va_opd import VAOPDConfig, VAOPDTrainer, served
from va_opd import doctor as va_opd_doctor
from va_opd.engine import in_rgb

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(torch.cuda.is_available(), reason="is for vLLM's CPU build")]
PADDED, SECOND_STOP = 128, 9
FLOAT32 = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
QUIET = {
    "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "max_completion_length": 8,
    "use_vllm": True, "vllm_max_model_length": 256,
}  # fmt: skip
GAPS = {SRPOTrainer: "sampling/sampling_logp_difference/mean"}  # TRL's own; the other two log theirs


def save_model(path: Path, seed: int, vocabulary: int | None = None, kind: type = Qwen3ForCausalLM, **fields) -> Path:
    """A tiny Qwen3 with heads that vLLM's CPU attention knows. Rows that pad the vocabulary are likely tokens."""
    tokenizer = char_tokenizer()
    torch.manual_seed(seed)
    config = kind.config_class(
        vocab_size=vocabulary or len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **fields,
    )  # fmt: skip
    model = kind(config)
    model.lm_head.weight.data[len(tokenizer) :] *= 20
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, SECOND_STOP]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def plugin_of_servers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        paths = vllm_on_cpu.plugin_paths(tmp_path_factory.mktemp("plugin") / "site")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "model", seed=0))


def chats(count: int) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": f"{i}+{3 * i}="}]) for i in range(count)]


def transformers_engine(path: str) -> TransformersEngine:
    return TransformersEngine(Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32), char_tokenizer())


def test_answers_are_those_of_transformers(tmp_path):
    path = str(save_model(tmp_path / "padded", seed=0, vocabulary=PADDED))
    engine, greedy = VLLMEngine(path, **FLOAT32), Decoding(max_new_tokens=48)
    answers = engine.generate(chats(60), greedy, range(60))
    assert answers == transformers_engine(path).generate(chats(60), greedy, range(60))
    sampled = Decoding(temperature=1.0, max_new_tokens=48)
    rows = engine.generate(chats(60), sampled, range(60))
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    assert engine.generate(chats(60), sampled, range(60)) == rows  # its own seed for each
    assert engine.stops == [2, SECOND_STOP]
    engine.bias = None  # the ban is needed: without it rows without a text are drawn
    assert engine.generate(chats(60), greedy, range(60)) != answers


def test_a_closed_engine_frees_its_model_and_makes_room_for_the_next(model_path):
    """An experiment evaluates one checkpoint after the other in one process, then trains or loads a teacher."""
    for _ in range(2):
        engine = VLLMEngine(model_path, **FLOAT32)
        core = engine.llm.llm_engine.engine_core.engine_core
        model = weakref.ref(core.model_executor.driver_worker.worker.model_runner.model)
        assert len(engine.generate(chats(2), Decoding(max_new_tokens=4), range(2))) == 2
        del core
        engine.close()
        assert model() is None
    assert not torch.distributed.is_initialized()


def test_an_adapter_is_merged_first_and_the_context_is_what_fits(model_path, tmp_path):
    base = models.load_model(model_path)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, lora_config(4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    char_tokenizer().save_pretrained(tmp_path / "adapter")
    engine = VLLMEngine(str(tmp_path / "adapter"), dtype="float32", enforce_eager=True)
    answers = engine.generate(chats(20), Decoding(max_new_tokens=24), range(20))
    assert engine.name == str(tmp_path / "adapter")
    assert engine.llm.model_config.max_model_len == 512  # the model's own
    engine.close()
    merged = TransformersEngine(models.load_model(str(tmp_path / "adapter")), char_tokenizer())
    assert answers == merged.generate(chats(20), Decoding(max_new_tokens=24), range(20))
    assert answers != transformers_engine(model_path).generate(chats(20), Decoding(max_new_tokens=24), range(20))


def test_a_self_teacher_in_a_checkpoint_is_not_taken_for_the_policy(tmp_path):
    path = str(save_model(tmp_path / "model", seed=0))
    other = Qwen3ForCausalLM.from_pretrained(path)
    other.model.norm.weight.data.neg_()  # answers otherwise
    SelfTeacher(other, Accelerator(cpu=True)).save(Path(path))
    answers = VLLMEngine(path, **FLOAT32).generate(chats(20), Decoding(max_new_tokens=24), range(20))
    assert answers == transformers_engine(path).generate(chats(20), Decoding(max_new_tokens=24), range(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_modl_len": 3}, "does not start .* engine_options=.*unexpected keyword argument 'max_modl_len'; change"),
        ({"dtype": "int8"}, "does not start .* Input should be 'auto'"),
        ({"max_model_len": 9999}, r"does not start .* max_model_len \(9999\) is greater"),
    ],
)
def test_options_that_vllm_does_not_take_are_one_sentence(model_path, options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(model_path, **{**FLOAT32, **options})


def test_a_prompt_that_is_too_long_is_one_sentence(model_path):
    prompt = Prompt([{"role": "user", "content": "?" * 300}])
    with pytest.raises(ValueError, match="maximum context length is 256 tokens.*raise max_model_len"):
        VLLMEngine(model_path, **FLOAT32).generate([prompt], Decoding(max_new_tokens=8), [0])


def pictures() -> list[Image.Image]:
    """Transparent ones, and one whose EXIF tag turns it."""
    rng, exif, file = np.random.default_rng(0), Image.Exif(), io.BytesIO()
    picture = Image.fromarray(rng.integers(0, 256, (40, 56, 4), dtype=np.uint8))
    palette = picture.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    exif[0x0112] = 6
    picture.convert("RGB").save(file, "JPEG", exif=exif)
    return [picture, picture.convert("LA"), palette, picture.convert("L"), Image.open(file)]


def test_vllm_sees_images_as_a_processor_does():
    def as_vllm(image: Image.Image) -> np.ndarray:
        return np.asarray(convert_image_mode(normalize_image(image), "RGB"))

    for image in pictures():
        seen = np.asarray(image.convert("RGB"))  # by a trainer's processor
        assert np.array_equal(as_vllm(in_rgb(image)), seen)
        assert image.mode == "L" or not np.array_equal(as_vllm(image), seen)


def test_what_sleep_loses_is_where_it_is_looked_for():
    """Of the runner for GPUs, which a CPU does not run: made within `load_model`, whose tensors sleep discards."""
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
    from vllm.v1.worker.gpu.mm.rope import RopeState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    for where, text in {
        gpu_worker.Worker.load_model: 'self._maybe_get_memory_pool_context(tag="weights")',
        GPUModelRunner.load_model: "self.model_state = init_model_state(",
        DefaultModelState: "self.rope_state = get_rope_state(",
        ModelState: "self.encoder_runner = EncoderRunner(",
        RopeState: "self.positions = torch.zeros(",
        EncoderRunner: "self.inputs_embeds = torch.zeros(",
    }.items():
        assert text in inspect.getsource(where), where


# --- training ---


def digits(completions, **columns) -> list[float]:
    return [float(sum(c.isdigit() for c in row[0]["content"]) > 0) for row in completions]


def make_trainer(kind: type, path: str, out: Path, **changes):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(32)])
    shared = {**QUIET, "output_dir": str(out), "num_generations": 4, "per_device_train_batch_size": 8, **changes}
    data = {"train_dataset": rows, "processing_class": char_tokenizer()}
    if kind is VAOPDTrainer:
        teacher = Qwen3ForCausalLM.from_pretrained(save_model(out / "teacher", seed=1), dtype=torch.float32)
        args = VAOPDConfig(**shared, weighting="none", doctor_steps=1)  # its data are text
        return kind(model=path, teacher_model=teacher, args=args, **data)
    if kind is SRPOTrainer:
        return kind(path, digits, SRPOConfig(**shared, doctor_steps=1), **data)
    return kind(path, digits, SolverConfig(**shared, beta=0.0, doctor_steps=1), **data)


def gaps(trainer) -> list[float]:
    name = GAPS.get(type(trainer), "sampling/logps_gap")
    return [line[name] for line in trainer.state.log_history if name in line]


# --- R-Diverse's servers ---


def write_outputs(path: Path, count: int) -> Path:
    """What a Challenger has written."""
    texts = (f"<question>{i}+{7 * i}=?</question>\\boxed{{{8 * i}}}" for i in range(count))
    write_jsonl(path, [{"id": "0", "sample": i, "response": text} for i, text in enumerate(texts)])
    return path


@pytest.fixture
def self_play(model_path, tmp_path):
    """The loop in a run folder of its own, as `--engine vllm --gpus 1` has it."""

    def make(name: str, **changes) -> loop.SelfPlay:
        (tmp_path / "empty.yaml").write_text("seed: 0\n")
        fields = {"model": model_path, "coder": model_path, "encoder": "minilm", "out": tmp_path / name}
        fields |= {"engine": "vllm", "gpus": 1, "m_label": 10, "answer_tokens": 8, "answer_top_k": 0}
        fields |= {"challenger.bf16": False, "solver.bf16": False, **changes}
        flags = [f"--{name}={value}" for name, value in fields.items()]
        settings = parse(["--config", str(tmp_path / "empty.yaml"), *flags])
        return loop.SelfPlay(settings, tmp_path / name, "base")

    return make


def started_servers(monkeypatch) -> list:
    """The processes of `vllm serve` that are started from now on."""
    processes, start = [], servers.subprocess.Popen

    def popen(command, *arguments, **options):
        process = start(command, *arguments, **options)
        if "serve" in command:
            processes.append(process)
        return process

    monkeypatch.setattr(servers.subprocess, "Popen", popen)
    return processes


@pytest.mark.slow
def test_a_label_server_that_is_killed_in_a_batch(self_play, model_path, tmp_path, monkeypatch):
    raw, asked, ask = write_outputs(tmp_path / "raw.jsonl", 60), itertools.count(1), ServerEngine._one
    monkeypatch.setitem(data.BATCH, "vllm", 512)

    def label(folder: str) -> bytes:
        (tmp_path / folder).mkdir(exist_ok=True)
        counts = self_play("run")._with_engine(model_path, tmp_path / folder, data.label, raw)
        assert counts["questions"] == 60
        return (tmp_path / folder / "samples.jsonl").read_bytes()

    def ask_and_kill(*arguments):
        if next(asked) == 540:  # of 600: in the second batch
            os.killpg(processes[-1].pid, signal.SIGKILL)
        return ask(*arguments)

    serve = loop.vllm_command  # on a CPU vLLM cannot cut a prompt of a request with a seed in two
    monkeypatch.setattr(loop, "vllm_command", lambda *a, **k: [*serve(*a, **k), "--max-num-batched-tokens", "16384"])
    straight, processes = label("straight"), started_servers(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(ServerEngine, "_one", ask_and_kill)
        with pytest.raises(
            ConnectionError, match="the same command goes on.*; the server ended with exit code -9; the"
        ):
            label("killed")
    assert 512 <= len(read_jsonl(tmp_path / "killed" / "samples.jsonl")) < 600  # some may have been answered before
    assert label("killed") == straight


@pytest.mark.slow
def test_a_coder_on_a_server(self_play, model_path, tmp_path, monkeypatch):
    local = engines.LocalCoderEngine(transformers_engine(model_path).model, char_tokenizer())
    serve = loop.vllm_command
    monkeypatch.setattr(
        loop, "vllm_command", lambda *a, **k: [*serve(*a, **k), "--dtype", "float32"]
    )  # its own is bfloat16
    prompts = [char_tokenizer().encode(f"# {i}+{7 * i}=?") for i in range(20)]
    with self_play("run")._server(model_path, tmp_path, 0.5, None) as url:
        coder = engines.ServedCoderEngine(url, model_path)
        assert coder.generate(prompts, 32, "7") == local.generate(prompts, 32, "7")
        with pytest.raises(ConnectionError, match="max_model_len=512.*context that is long enough"):
            coder.generate(prompts, 2048, "7")


# The server comes first: a colocated engine leaves its process group behind in this process


@contextmanager
def serving_student(path: str, tmp_path: Path, monkeypatch):
    """Address of `vllm serve` with the flags of TRL's trainers."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    vllm_on_cpu.weights_by_file(tmp_path / "weights.safetensors", monkeypatch.setattr)
    port = free_port()
    arguments = ScriptArguments(path, host="127.0.0.1", port=port, max_model_len=256, enforce_eager=True)
    extra = ["--weight-transfer-config", '{"backend": "file"}', "--served-model-name", "model"]
    log = tmp_path / "server.log"
    with serving(build_command(arguments, extra), port, log, ready_seconds=400) as url:
        yield url


@pytest.mark.slow
def test_a_server_of_rollouts(model_path, tmp_path, monkeypatch):
    greedy = Decoding(max_new_tokens=12)
    with serving_student(model_path, tmp_path, monkeypatch) as url:
        answers = ServerEngine(url, "model").generate(chats(20), greedy, range(20))
        local = transformers_engine(model_path).generate(chats(20), greedy, range(20))
        assert sum(a == b for a, b in zip(answers, local, strict=True)) > 10  # bfloat16 beside float32
        options = {
            "vllm_mode": "server",
            "vllm_server_base_url": url.removesuffix("/v1"),
            "max_steps": 4,
            "top_p": 1.0,
        }
        for kind in (SRPOTrainer, VAOPDTrainer):  # one after the other: a server has one trainer at a time
            trainer = make_trainer(kind, model_path, tmp_path / kind.__name__, **options)
            trainer.train()
            print(f"server: {kind.__name__}, gap {gaps(trainer)}")
            assert 0 < max(gaps(trainer)) < 0.05


@pytest.mark.slow
def test_a_rollout_server_that_is_killed_while_it_generates(model_path, tmp_path, monkeypatch, capfd):
    processes, asked, generate = started_servers(monkeypatch), itertools.count(1), VLLMClient.generate
    command = ["--config", "srpo/configs/tiny.yaml", "--model", model_path, "--out", str(tmp_path / "runs")]
    command += ["--use_vllm=true", "--vllm_mode=server", "--vllm_max_model_length=256", "--logging_steps=1"]
    command += ["--max_steps=5", "--save_steps=2", "--vllm_server_base_url"]

    def generate_and_kill(*arguments, **options):
        if next(asked) == 4:
            Timer(0.1, os.killpg, (processes[-1].pid, signal.SIGKILL)).start()
        return generate(*arguments, **options)

    with serving_student(model_path, tmp_path, monkeypatch) as url, monkeypatch.context() as patch:
        patch.setattr(VLLMClient, "generate", generate_and_kill)
        assert train.main([*command, url.removesuffix("/v1")]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("srpo.train: the rollout server does not answer; start it, then the same command goes on")
    assert url.split(":")[-1].removesuffix("/v1") in said
    with serving_student(model_path, tmp_path, monkeypatch) as other:
        assert other != url
        assert train.main([*command, other.removesuffix("/v1")]) == 0
    # At 4 where the fourth generation takes less than a tenth of a second
    assert re.search("resuming at step [24]$", capfd.readouterr().out, re.MULTILINE)
    lines = read_jsonl(tmp_path / "runs/srpo/tiny-additions/srpo-seed0/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


@contextmanager
def serving_teacher(path: Path, log: Path):
    """Address of `vllm serve` as docs/vllm.md says it for a teacher, in float32."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enable-scale-out", "--max-model-len", "256", "--dtype", "float32"]
    with serving([*command, "--enforce-eager"], port, log, ready_seconds=400) as url:
        yield url


def last_teacher_figures(trainer) -> dict[str, float]:
    names = ("teacher/parity_mean", "teacher/parity_max", "va/null")
    return {name: line[name] for line in trainer.state.log_history for name in names if name in line}


@pytest.mark.slow
def test_a_served_teacher(model_path, tmp_path, monkeypatch):
    local = {"use_vllm": False, "max_steps": 3, "logging_steps": 1}
    exact = make_trainer(VAOPDTrainer, model_path, tmp_path, **local)
    exact.train()
    with serving_teacher(tmp_path / "teacher", tmp_path / "teacher.log") as url:
        for mode in ("sampled_token", "teacher_topk"):
            trainer = make_trainer(VAOPDTrainer, model_path, tmp_path, teacher_server=url, teacher_mode=mode, **local)
            trainer.train()
            figures = last_teacher_figures(trainer)
            print(f"served teacher: {mode}, {figures}")
            assert len(figures) == 3
            assert max(figures.values()) < 1e-4
        bound, kl = (next(x["loss"] for x in t.state.log_history) for t in (trainer, exact))  # of the same rollouts
        assert 0.1 * kl < bound < kl
        with pytest.raises(ValueError, match="Requested prompt logprobs of 21"):
            make_trainer(
                VAOPDTrainer, model_path, tmp_path, teacher_server=url, teacher_mode=mode, teacher_top_k=21, **local
            ).train()
        trainer.args.max_steps = 6
    monkeypatch.setattr(served, "PAUSES", (0.1,))
    with pytest.raises(ConnectionError, match="the teacher server at .* does not answer"):
        trainer.train()


def save_vision_model(path: Path, seed: int) -> None:
    """The tiny Qwen3-VL with heads that vLLM's CPU attention knows, and the processor that vLLM asks for."""
    small, images_only = tiny_qwen3_vl()
    config = small.config
    config.text_config.head_dim = 32
    config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.get_output_embeddings().weight.data *= 6  # random models are all but uniform
    model.save_pretrained(path)
    with_video(images_only).save_pretrained(path)


def image_rows(count: int) -> Dataset:
    """Sizes that are no multiple of a patch, under and over the limits; with alpha, which vLLM would not drop."""
    rng = np.random.default_rng(0)
    sizes = [(40 + 7 * i, 20 + 11 * (i % 5)) for i in range(count)]
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 4), dtype=np.uint8)) for w, h in sizes]
    content = [{"role": "user", "content": "What?"}]
    return Dataset.from_list([{"prompt": content, "image": picture} for picture in pictures])


@pytest.mark.slow
def test_rollouts_from_images_and_a_served_teacher(tmp_path, monkeypatch):
    """Two servers: the student's, which gets its weights each step, and the teacher's."""
    pytest.importorskip("torchvision", reason="vLLM's processors of images need torchvision")
    for seed, name in enumerate(("student", "teacher")):
        save_vision_model(tmp_path / name, seed)
    processor = models.load_processor(str(tmp_path / "student"))
    student, teacher = (
        Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    shared = {**QUIET, "per_device_train_batch_size": 16, "teacher_mode": "teacher_topk", "doctor_steps": 1}
    with (
        serving_teacher(tmp_path / "teacher", tmp_path / "teacher.log") as teacher_url,
        serving_student(str(tmp_path / "student"), tmp_path, monkeypatch) as student_url,
    ):
        engine = {"vllm_mode": "server", "vllm_server_base_url": student_url.removesuffix("/v1"), "top_p": 1.0}
        # The same images in each step, and a vision tower that moves: what the server kept of them would be another's
        engine |= {"max_steps": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
        for changes in ({"pixelate_at": "raw", "use_vllm": False}, {"pixelate_at": "model", **engine}):
            args = VAOPDConfig(str(tmp_path / "run"), teacher_server=teacher_url, **{**shared, **changes})
            trainer = VAOPDTrainer(student, teacher, args, image_rows(4), processing_class=processor)
            trainer.train()
            figures = last_teacher_figures(trainer)
            print(f"served teacher with images: {figures}, student's gap {gaps(trainer)}")
            assert max(figures.values()) < 1e-3
            assert trainer.last_rollouts["va"].max() > 1e-3
        assert 0 < max(gaps(trainer)) < 0.05
        assert gaps(trainer)[0] < 1e-3  # 2e-3 with alpha laid on white


def test_a_cpu_trainer_has_no_nccl(model_path, tmp_path):
    """What the tests above stand in for: TRL names the reason."""
    client = VLLMClient.__new__(VLLMClient)
    client.base_url, client.group_port = "http://127.0.0.1:1", 1
    client.get_server_info = lambda: {"weight_transfer_config": {"backend": "nccl"}}
    client.get_world_size = lambda: 1
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        client.init_communicator(torch.device("cpu"))


@pytest.mark.slow
def test_colocated_rollouts_from_images(tmp_path):
    """Rows with two images, one and none: vLLM's prompts are the trainer's, unless the processors' limits differ."""
    pytest.importorskip("torchvision", reason="vLLM's processors of images need torchvision")
    vllm_on_cpu.register()
    for seed, name in enumerate(("student", "teacher")):
        save_vision_model(tmp_path / name, seed)
    student, teacher = (
        Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    processor = models.load_processor(str(tmp_path / "student"))
    pictures = [[row["image"]] for row in image_rows(8)]
    pictures[0] += pictures[1]
    pictures[3] = []
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "What?"}], "images": p} for p in pictures])
    args = VAOPDConfig(str(tmp_path / "run"), **{**QUIET, "per_device_train_batch_size": 16}, top_p=1.0)
    trainer = VAOPDTrainer(student, teacher, args, rows, processing_class=processor)
    trainer.train()
    print(f"colocated with images: gap {gaps(trainer)}")
    assert 0 < max(gaps(trainer)) < 0.05
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    trainer.args.max_steps = 4
    with pytest.raises(ValueError, match="vLLM makes another prompt of text and images than the processor"):
        trainer.train()


def save_family(family: str, path: Path) -> None:
    """A tiny model with heads that vLLM's CPU attention knows, and files with the names of those on the hub."""
    if family == "qwen3_moe":
        experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        save_model(path, seed=0, kind=Qwen3MoeForCausalLM, **experts)
        return
    model, processor = va_opd_trainers.FAMILIES[family](hidden=64)
    tokenizer, text = processor.tokenizer, model.config.text_config
    tokenizer.add_tokens(["\n\n", "\n\n\n", "\n\n\n\n"])  # vLLM looks for these in Gemma 3's vocabulary
    text.vocab_size, text.head_dim = len(tokenizer), 32
    torch.manual_seed(0)
    model = type(model)(model.config)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)  # biases start at 0
    model.save_pretrained(path)
    processor.save_pretrained(path)
    file = path / "model.safetensors"
    renamed = {n.replace("vision_tower.", "vision_tower.vision_model."): w for n, w in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})


def family_trainer(kind: type, path: Path, rank: int):
    shared = {**QUIET, "output_dir": str(path / "run"), "num_generations": 4, "per_device_train_batch_size": 8}
    if kind is VAOPDTrainer:
        student, teacher = (AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        teacher.get_output_embeddings().weight.data *= 6
        args, rows = VAOPDConfig(**shared, doctor_steps=1, top_p=1.0), Dataset.from_list(va_opd_trainers.image_rows(4))
        parts = {"train_dataset": rows, "processing_class": models.load_processor(str(path))}
        build = partial(kind, student, teacher, args, **parts, peft_config=lora_config(rank))
        return with_adapters(build, rank, False)
    args = {SRPOTrainer: SRPOConfig, PhaseTrainer: SolverConfig}[kind](**shared, doctor_steps=1, beta=0.0)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(32)])
    processor = models.load_processor(str(path))
    tokenizer = getattr(processor, "tokenizer", processor)
    return kind(str(path), digits, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "rank", "limit"),
    [
        (VAOPDTrainer, "llava", 0, 0.05),
        (VAOPDTrainer, "llava", 4, 0.05),
        (SRPOTrainer, "gemma3", 0, 0.05),
        (PhaseTrainer, "qwen3_moe", 0, 1e-3),
    ],
)
def test_a_weight_sync_reaches_every_weight_whatever_its_name(kind, family, rank, limit, tmp_path):
    """In these families transformers has other names than files have. The files are read as at the engine's start."""
    vllm_on_cpu.register()
    destroy_model_parallel()  # an earlier engine's, which has no group for experts
    save_family(family, tmp_path / "model")
    trainer = family_trainer(kind, tmp_path / "model", rank)
    trainer.train()
    print(f"{kind.__name__}, {family}, rank {rank}: gap {gaps(trainer)}")
    assert 0 < max(gaps(trainer)) < limit
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, trainer.model.parameters()):
            weight += 0.1 * torch.randn_like(weight)
    trainer.vllm_generation.sync_weights()
    engine = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    synced = {name: weight.clone() for name, weight in engine.named_parameters()}
    trained = trainer.model.merge_and_unload() if rank else trainer.model
    trained.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        for weight in engine.parameters():
            weight.zero_()
    engine.load_weights(load_file(tmp_path / "trained" / "model.safetensors").items())
    assert [name for name, weight in engine.named_parameters() if not torch.equal(weight, synced[name])] == []
    assert [name for name, weight in synced.items() if not weight.any()] == []


@pytest.mark.parametrize("kind", [VAOPDTrainer, SRPOTrainer, PhaseTrainer])
def test_a_lost_weight_sync_shows_in_the_log(kind, model_path, tmp_path, capfd):
    vllm_on_cpu.register()
    trainer = make_trainer(kind, model_path, tmp_path)
    if kind is PhaseTrainer:  # every prompt of a Challenger is the same text: the seed alone tells two runs apart
        assert torch.initial_seed() == trainer.args.seed == np.random.get_state()[1][0]  # noqa: NPY002
    trainer.train()
    print(f"{kind.__name__}: gap {gaps(trainer)}")
    assert gaps(trainer)
    assert max(gaps(trainer)) < 0.05  # the engine runs in bfloat16
    assert "weight sync" not in capfd.readouterr().out

    trainer.vllm_generation.sync_weights = lambda: None
    trainer.args.max_steps, trainer.args.learning_rate, trainer.optimizer = 6, 3e-2, None
    trainer.train()
    assert max(gaps(trainer)) > 0.1
    assert "weight sync" in capfd.readouterr().out
    doctors = {VAOPDTrainer: va_opd_doctor, SRPOTrainer: srpo_doctor, PhaseTrainer: r_diverse_doctor}
    name = GAPS.get(kind, "sampling/logps_gap")
    assert any("weight sync" in text for text in doctors[kind].diagnose({name: max(gaps(trainer))}))
