"""A method's folder works alone: copied out of the project, it trains on the caller's own data with PyPI packages."""

import math
import re
import shutil
from pathlib import Path

import forks
import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
METHODS = [name for name in ("va_opd", "srpo", "r_diverse") if (ROOT / name / "__init__.py").exists()]
ENTRY_POINTS = [(m, e) for m in METHODS for e in ("train", "loop") if (ROOT / m / f"{e}.py").exists()]

# The ten lines of a caller, and a model small enough for a test. Nothing of it comes from this project but the method.
VA_OPD_SCRIPT = """
import numpy as np, torch
from datasets import Dataset
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
    PreTrainedTokenizerFast, Qwen3Config)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
import va_opd
from va_opd import VAOPDConfig, VAOPDTrainer

print("module", va_opd.__file__)
special = ["<pad>", "<eos>", "<image>"]
vocabulary = {t: i for i, t in enumerate(special + [chr(c) for c in range(32, 127)])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
tokenizer.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")
template = ("{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endfor %}")
processor = LlavaProcessor(
    LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer, patch_size=8,
    vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template)

def model(hidden):
    torch.manual_seed(hidden)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8)
    text = Qwen3Config(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)

pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), dtype=np.uint8)
rows = [{"prompt": [{"role": "user", "content": "What is it?"}], "image": Image.fromarray(p)} for p in pixels]
config = VAOPDConfig("run", max_steps=2, per_device_train_batch_size=8, max_completion_length=6, logging_steps=1,
    save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-3)
trainer = VAOPDTrainer(model(32), model(64), config, Dataset.from_list(rows), processing_class=processor)
trainer.train()
print("final loss", trainer.state.log_history[1]["loss"], "step", trainer.state.global_step)
"""
SRPO_SCRIPT = """
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
import srpo
from srpo import SRPOConfig, SRPOTrainer

print("module", srpo.__file__)
special = ["<pad>", "<eos>", "<user>"]
vocabulary = {t: i for i, t in enumerate([*special, "\\n", *map(chr, range(32, 127))])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\\s\\S]"), "isolated"), decoders.Fuse()
tokenizer.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")
tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<user>{% endfor %}"
torch.manual_seed(0)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1))

def early_letter(completions, goal, **columns):
    return [float((c[0]["content"][:1] or "~") < g) for c, g in zip(completions, goal)]

rows = [{"prompt": [{"role": "user", "content": f"Question {i}"}], "goal": "P"} for i in range(4)]
config = SRPOConfig("run", max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
    logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    learning_rate=1e-3, disable_tqdm=True)
trainer = SRPOTrainer(model, early_letter, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
trainer.train()
assert trainer.state.log_history[1]["route/sdpo"] > 0
print("final loss", trainer.state.log_history[1]["loss"], "step", trainer.state.global_step)
"""
R_DIVERSE_SCRIPT = """
import numpy as np, torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
import r_diverse
from r_diverse import (ChallengerConfig, ChallengerReward, MemoryBank, PhaseTrainer, RDiverseConfig, SkillEncoder,
    SolverConfig, challenger_prompt, replay_count, self_consistency, solver_prompt)

print("module", r_diverse.__file__)
special = ["<pad>", "<eos>", "<user>"]
vocabulary = {t: i for i, t in enumerate([*special, "\\n", *map(chr, range(32, 127))])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\\s\\S]"), "isolated"), decoders.Fuse()
tokenizer.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")
tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<user>{% endfor %}"

def model(seed):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0,
        eos_token_id=1))

class Letters:  # the caller's own encoder: how often each letter is there
    name, dim = "letters", 26
    def encode(self, texts):
        return np.array([[1 + t.lower().count(chr(97 + i)) for i in range(26)] for t in texts], float)

rng = np.random.default_rng(0)
def ask(questions, seed):  # the caller's own Solver
    return [[str(rng.integers(2)) for _ in range(4)] for _ in questions]

def same(a, b):  # and the caller's own comparison of answers
    return a.lower() == b.lower()

def written(completions, **columns):  # random letters have no form: give them one
    outputs = [f"<question>{c[0]['content']} ?</question>\\\\boxed{{1}}" for c in completions]
    return reward(outputs)

shared = dict(report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, beta=0.0,
    save_strategy="no", learning_rate=1e-3, disable_tqdm=True, max_steps=4)
skills = SkillEncoder(None, Letters())
bank = MemoryBank("bank", skills.name)
challenger, solver = model(0), model(1)
for t in (1, 2):
    reward = ChallengerReward(RDiverseConfig("mine", measure="question"), ask, same, skills, bank.before(t))
    rows = Dataset.from_list([{"prompt": challenger_prompt("", "new")}] * 8)
    trainer = PhaseTrainer(challenger, written, ChallengerConfig("challenger", max_completion_length=8, **shared),
        train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    questions = sorted({q for q in reward.last_batch["questions"]})
    labels = [self_consistency(answers, same)[0] for answers in ask(questions, 0)]
    embeddings, ok = skills.encode(questions)
    assert ok.all()
    bank.add(questions, embeddings, labels, iteration=t)
    past = bank.before(t).sample(replay_count(len(questions)), seed=t)
    data = [*zip(questions, labels), *((row["question"], row["answer"]) for row in past)]
    rows = Dataset.from_list([{"prompt": solver_prompt(q, ""), "answer": a} for q, a in data] * 4)
    trainer = PhaseTrainer(solver, lambda completions, answer, **c: [float(a in x[0]["content"]) for x, a in
        zip(completions, answer)], SolverConfig("solver", max_completion_length=8, **shared),
        train_dataset=rows, processing_class=tokenizer)
    trainer.train()
assert list(bank.iterations) == [1, 2]
assert trainer.state.global_step == 4
print("final loss", np.abs([line.get("loss", 0) for line in trainer.state.log_history]).max(), "step 2")
"""
SCRIPTS = {"va_opd": VA_OPD_SCRIPT, "srpo": SRPO_SCRIPT, "r_diverse": R_DIVERSE_SCRIPT}


OUTSIDE = f"""
import importlib.util, os, runpy, sys
sys.path[:] = ["", *(folder for folder in sys.path if os.path.abspath(folder) not in {[str(ROOT), str(TESTS)]})]
os.environ.pop("PYTHONPATH", None)
sys.dont_write_bytecode = True
if importlib.util.find_spec("common"):  # the project is installed in this environment
    sys.modules["common"] = None
"""


def run_alone(code: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a program in `folder` that finds the project neither by path nor by variable."""
    return forks.call(["-c", OUTSIDE + code], folder / "said.txt", folder), (folder / "said.txt").read_text()


@pytest.fixture
def copied(request, tmp_path) -> Path:
    shutil.copytree(ROOT / request.param, tmp_path / request.param, ignore=shutil.ignore_patterns("__pycache__"))
    assert ROOT not in tmp_path.parents
    return tmp_path


@pytest.mark.parametrize(("copied", "method"), [(m, m) for m in METHODS if m in SCRIPTS], indirect=["copied"])
def test_a_copied_folder_trains_on_the_callers_data(copied, method):
    (copied / "caller.py").write_text(SCRIPTS[method])
    code, said = run_alone("runpy.run_path('caller.py', run_name='__main__')", copied)
    assert code == 0, said[-3000:]
    assert Path(re.search(r"module (.*)", said).group(1)).is_relative_to(copied)
    loss, step = re.search(r"final loss (\S+) step (\d+)", said).groups()
    assert math.isfinite(float(loss))
    assert float(loss) != 0
    assert step == "2"


@pytest.mark.parametrize(("copied", "method", "entry"), [(m, m, e) for m, e in ENTRY_POINTS], indirect=["copied"])
def test_the_entry_point_of_a_copied_folder_says_what_it_needs(copied, method, entry):
    run = f"runpy.run_module('{method}.{entry}', run_name='__main__', alter_sys=True)"
    code, printed = run_alone(f"sys.argv[1:] = ['--help']; {run}", copied)
    said = [line for line in printed.splitlines() if line.strip()]
    said = [line for line in said if "gemm_4bit" not in line]  # bitsandbytes', where it is installed
    assert code != 0
    assert len(said) == 1, said
    assert "common" in said[0]
