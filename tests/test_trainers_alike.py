"""What all trainers have in common: the order of prompts, seeds, warnings."""

import asyncio
import functools
import importlib.util
import inspect
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import is_async_callable

from common.lora import sync_merged_weights
from common.tiny import tiny_qwen3

METHODS = ("va_opd", "srpo", "r_diverse")
# A method's folder has to work alone, so these stand in several
COPIES = {
    "_trl": (
        "AdapterSync",
        "AskedSampling",
        "EpochSampler",
        "WholeBatches",
        "disable_functional_dropout",
        "prepare_rollouts",
        "reshard_before_syncs",
        "seed_rollouts",
        "send_names_of_files",
    ),
    "batches": ("SortsByLength", "_has_rows", "joined", "length_sorted", "loss_mask", "real_columns"),
    "checks": (
        "_check_reward",
        "_is_said",
        "_lacks_template",
        "_watched",
        "check_calls",
        "check_calls_of_tools",
        "check_reference",
        "check_rewards",
        "check_tokens",
        "watch_rewards",
    ),
    "checkpoints": ("LoadsWeights", "load_adapters", "load_weights"),
    "config": ("check_init_kwargs", "in_our_fields"),
    "divergence": ("tile_rows",),
    "lm_head": ("lm_head", "logit_scale"),
    "logps": ("_is_callable", "check_logps", "count_positions"),
    "rope": ("exact_frequencies",),
    "turns": ("stop_at_the_end_of_a_turn", "turn_end_id"),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in COPIES.items() for name in names])
def test_what_is_copied_is_mended_everywhere(module, name):
    found = [m for m in METHODS if importlib.util.find_spec(f"{m}.{module}")]
    found = [vars(importlib.import_module(f"{m}.{module}")).get(name) for m in found]
    copies = [inspect.getsource(copy) for copy in found if copy is not None]
    assert len(copies) > 1 and len(set(copies)) == 1


def loader(method: str, epoch: list[int], processes: int, rank: int):
    """As a trainer makes it: 4 prompts twice a batch of all processes, 3 batches an epoch."""
    sampler = importlib.import_module(f"{method}._trl").EpochSampler
    order = sampler(range(12), mini_repeat_count=2, batch_size=4, seed=7, epoch=lambda: epoch[0])
    batches = DataLoader(range(12), batch_size=8 // processes, sampler=order, collate_fn=list)
    device = torch.device("cpu")
    return prepare_data_loader(batches, device, num_processes=processes, process_index=rank, put_on_device=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_run_resumed_in_a_later_epoch(method, processes, rank):
    """It sees the prompts that the uninterrupted one would have seen."""
    PartialState(cpu=True)
    epoch, straight = [0], []
    batches = loader(method, epoch, processes, rank)
    for number in range(3):
        epoch[0] = number
        straight.append(list(batches))
    assert straight[0] != straight[1] != straight[2]
    for skipped in range(3):
        # As transformers does it: `set_epoch` of what accelerate returns reaches no sampler on several processes
        resumed = skip_first_batches(loader(method, epoch, processes, rank), skipped)
        resumed.set_epoch(2)
        assert list(resumed) == straight[2][skipped:]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_order_of_prompts_that_are_shuffled(method):
    def order(seed: int, shuffle: bool = True) -> list[int]:
        sampler = importlib.import_module(f"{method}._trl").EpochSampler
        return list(sampler(range(12), mini_repeat_count=1, batch_size=4, shuffle=shuffle, seed=seed, epoch=lambda: 1))

    assert order(3) == order(3) != order(4)
    assert order(3, shuffle=False) == list(range(12))


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_what_a_colocated_engine_samples(method):
    """Started, it seeds this process by its rank, and later draws the seeds of its requests from it."""
    module = importlib.import_module(f"{method}._trl")

    def drawn(seed: int, rank: int = 0, use_vllm: bool = True, mode: str = "colocate") -> int:
        args = SimpleNamespace(seed=seed, vllm_mode=mode, vllm_tensor_parallel_size=2)
        accelerator = SimpleNamespace(process_index=rank)
        random.seed(0)
        module.seed_rollouts(SimpleNamespace(args=args, use_vllm=use_vllm, accelerator=accelerator))
        return random.randrange(2**31)

    assert drawn(1) != drawn(2) == drawn(1, rank=2) and drawn(1) == drawn(1, rank=1)  # two processes are one engine
    assert drawn(1, use_vllm=False) == drawn(2, use_vllm=False) == drawn(1, mode="server")
    trainers = {"va_opd": ("trainer", "baselines"), "srpo": ("trainer",), "r_diverse": ("trainer",)}[method]
    for name in trainers:
        assert "prepare_rollouts(self)" in inspect.getsource(importlib.import_module(f"{method}.{name}"))


@pytest.mark.parametrize("method", METHODS)
def test_a_doctors_warning_does_not_wait_for_its_next_line(method, capsys):
    """A Challenger has 20 steps: a collapse at its second batch would never be said."""
    callback = importlib.import_module(f"{method}.doctor").DoctorCallback(every=20)
    for step, entropy in ((1, 1.0), (5, 0.001), (9, 0.001), (21, 0.001)):
        logs = {"loss": 0.5, "reward": 0.25, "route/sdpo": 0.5, "entropy": entropy, "completions/mean_length": None}
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, log_history=[])
        callback.on_log(None, state, None, logs)
    lines = capsys.readouterr().out.splitlines()
    said = [line.rpartition("(")[2] for line in lines if "WARNING" in line and "entropy" in line]
    assert said == ["step 5)", "step 21)"]
    other = SimpleNamespace(is_world_process_zero=False, global_step=99, log_history=[])
    callback.on_log(None, other, None, logs)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("module", ["va_opd.checks", "srpo.checks", "r_diverse.checks"])
def test_one_process_warns_of_trained_weights_in_half_precision(module, monkeypatch):
    module, said = importlib.import_module(module), []
    monkeypatch.setattr(module.logger, "warning", lambda text, count, *_: said.append((dtype, count)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), frozen).to(dtype)
        for main in (True, False):
            state = SimpleNamespace(is_world_process_zero=main)
            module.HalfPrecisionCallback().on_train_begin(None, state, None, model=model)
    assert said == [(torch.float16, 2), (torch.bfloat16, 2)]


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_reward_functions_are_called_with_the_columns_of_the_data(method):
    check = importlib.import_module(f"{method}.checks").check_calls
    rows = Dataset.from_list([{"prompt": "a", "answer": "1", "completion": "b"}])

    def all_named(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric): ...

    async def waits(completions, answer, **columns): ...

    class Called:
        def __call__(self, completions, answer, **columns): ...

    def of_column(function):
        @functools.wraps(function)
        def renamed(answer, **columns): ...

        return renamed

    wrapped = of_column(lambda gold: ...)
    models = ["org/reward-model", torch.nn.Linear(1, 1), None]
    check([all_named, waits, Called(), functools.partial(all_named, answer=2), wrapped, max, *models], None, rows)
    for data in (None, list(rows)):  # which TRL refuses
        check(lambda nothing: ..., None, data)

    def refused(message: str, reward, processor=None, data=rows):
        with pytest.raises(ValueError, match=message) as error:
            check(reward, processor, data)
        assert "\n" not in str(error.value)

    refused(
        "^reward function <lambda>: missing a required argument: 'gold'; with train_dataset TRL",
        lambda gold, **_: ...,
    )
    refused("got an unexpected keyword argument .* add [*][*]columns", [all_named, lambda completions, answer: ...])
    refused(
        "missing a required argument: 'completion'; .* the columns answer:", lambda completion, **_: ...
    )  # TRL's own
    taken = rows.rename_column("answer", "completions")
    refused("^train_dataset has the column completions, as TRL calls", lambda **_: ..., data=taken)
    check(models, None, taken)
    with pytest.raises(ValueError, match="^eval_dataset has the columns answer, .*: it needs `prompt`"):
        check(all_named, None, rows.remove_columns("prompt"), "eval_dataset")
    check([None, "org/reward-model", torch.nn.Identity()], None, rows)
    for functions in ((waits,), {"a": waits}, [waits, 1.0]):
        with pytest.raises(
            ValueError, match="^reward_funcs must be a function, a model or its name, or a list of these"
        ):
            check(functions, None, rows)
    with pytest.raises(ValueError, match="missing a required argument: 'answer'; with eval_dataset TRL calls it with"):
        check(all_named, None, rows.remove_columns("answer"), "eval_dataset")


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_messages_want_a_chat_template_and_texts_do_not(method):
    check = importlib.import_module(f"{method}.checks").check_calls
    texts, messages = ([{"prompt": p}] for p in ("a", [{"role": "user", "content": "a"}]))
    bare = SimpleNamespace(chat_template=None)
    check([], bare, Dataset.from_list(texts))
    check([], None, Dataset.from_list(messages))  # TRL loads the model's
    check([], SimpleNamespace(chat_template="{{ messages }}"), Dataset.from_list(messages))
    own = type("Own", (SimpleNamespace,), {"apply_chat_template": None})(chat_template=None)  # as Mistral's
    check([], own, Dataset.from_list(messages))
    with pytest.raises(ValueError, match="prompts are messages, and processing_class has no chat_template: set it"):
        check([], bare, Dataset.from_list(messages))


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_tokens_without_rows_are_seen_in_tokenizers_of_any_class(method, monkeypatch):
    checks, said = importlib.import_module(f"{method}.checks"), []
    monkeypatch.setattr(checks.logger, "warning", lambda text, *values: said.append(text % values))
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=3)))
    vocabulary = {"<pad>": 0, "</s>": 1, "x": 2, "b": 4, "a": 3}
    known = {"pad_token": "<pad>", "pad_token_id": 0, "eos_token": "</s>", "eos_token_id": 1}
    checks.check_tokens(model, SimpleNamespace(**known, get_vocab=lambda: vocabulary))  # no more has Mistral's
    assert len(said) == 1 and said[0].startswith("the tokenizer has the token a and the model no row for it")


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_what_reward_functions_may_return(method):
    """All that TRL reads, and None in the list; anything else is one sentence with the function's name."""
    check = functools.partial(
        importlib.import_module(f"{method}.checks").check_rewards, prompts=["P0", "P1"], name="f"
    )
    for rewards in ([1.0, None], (True, 0), np.ones(2), torch.ones(2, 1), [torch.tensor(1.0), np.float32(2)]):
        assert [float(r or 0) for r in check(rewards)] == [float(r or 0) for r in rewards]
    assert check(float(i) for i in range(2)) == [0.0, 1.0]
    assert check([1.0] * 3) == [1.0] * 3  # TRL says that they are too many
    assert check([-math.inf, math.nan], weight=0.0)[0] == -math.inf  # only logged
    for returned in (None, 1.0, torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match="^reward function f returned [^:]*: it must return a list with one finite"
        ):
            check(returned)
    for reward in ("1", [1.0], {"score": 1}, 1j, math.inf, -math.inf, 1e39, 10**400):
        with pytest.raises(
            ValueError, match="^reward function f returned .* for rollout 1, of the prompt 'P1': "
        ) as e:
            check([1.0, reward])
        assert len(str(e.value)) < 300


@pytest.mark.parametrize("method", ["srpo", "r_diverse"])
def test_rewards_of_all_kinds_of_functions_are_watched(method):
    async def waits(prompts, completions, **columns):
        return completions

    class Called:
        def __call__(self, prompts, completions, **columns):
            return completions

    functions = [waits, Called(), functools.partial(Called(), other=1), torch.nn.Identity()]
    names = ["waits", "Called", "partial", "model"]
    trainer = SimpleNamespace(reward_funcs=functions, reward_func_names=names, reward_weights=torch.ones(4))
    importlib.import_module(f"{method}.checks").watch_rewards(trainer)
    watched, columns = trainer.reward_funcs, {"prompts": ["P0", "P1"], "completions": [1.0, "a"]}
    assert [is_async_callable(f) for f in watched] == [True, False, False, False]
    assert asyncio.run(watched[0](prompts=[], completions=[1.0])) == watched[1](prompts=[], completions=[1.0]) == [1.0]
    for function, name in zip(watched[1:3], names[1:3], strict=True):
        with pytest.raises(ValueError, match=f"^reward function {name} returned 'a' for rollout 1"):
            function(**columns)
    with pytest.raises(ValueError, match="^reward function waits returned 'a' for rollout 1"):
        asyncio.run(watched[0](**columns))
    assert watched[3] is functions[3]


def trainer_of(method: str, folder, **options):
    """Of one update in several micro-batches."""
    if method != "r_diverse":
        build = importlib.import_module(f"{method}_trainers").build
        return build(folder, max_steps=1, gradient_accumulation_steps=2, **options)
    from common.tiny import tiny_qwen3
    from r_diverse import PhaseTrainer
    from r_diverse.config import SolverConfig

    model, tokenizer = tiny_qwen3(hidden=32)
    config = SolverConfig(
        str(folder), per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=1, beta=0.0,
        max_completion_length=4, bf16=False, use_cpu=True, report_to="none", **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}] * 8)
    return PhaseTrainer(
        model, lambda completions, **_: [0.0] * len(completions), config, rows, processing_class=tokenizer
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("min_p", 0.99), ("num_beams", 3), ("no_repeat_ngram_size", 1), ("suppress_tokens", [*range(40, 99)])],
)
def test_what_a_model_declares_does_not_change_rollouts(method, tmp_path, monkeypatch, name, value):
    """Neither the loss nor vLLM knows of it."""

    def sampled(declared) -> list[list[int]]:
        trainer, ids = trainer_of(method, tmp_path, seed=1, save_strategy="no"), []
        setattr(trainer.model.generation_config, name, declared)
        generate = trainer._generate_single_turn

        def kept(*arguments, **options):
            found = generate(*arguments, **options)
            ids.extend(found if method == "va_opd" else found[0])
            return found

        monkeypatch.setattr(trainer, "_generate_single_turn", kept)
        trainer.train()
        assert getattr(trainer.model.generation_config, name) == declared  # what is saved with the model
        return ids

    assert sampled(None) == sampled(value)


@pytest.mark.parametrize("method", METHODS)
def test_disable_dropout_reaches_what_is_no_module(method, tmp_path):
    def rates(**options) -> list[float]:
        monkeypatch.setattr(attention, "__init__", with_dropout)
        model = trainer_of(method, tmp_path, **options).model
        return [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")]

    attention = {
        "va_opd": "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextAttention",
    }.get(method, "transformers.models.qwen3.modeling_qwen3.Qwen3Attention")
    module, _, name = attention.rpartition(".")
    attention = getattr(importlib.import_module(module), name)
    build = attention.__init__

    def with_dropout(self, *arguments, **options):
        build(self, *arguments, **options)
        self.attention_dropout = 0.5

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert 0.5 in rates()
        assert set(rates(disable_dropout=True)) == {0.0}


class Interruption(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_training_after_an_interruption_within_a_step_starts_with_new_rollouts(method, tmp_path, monkeypatch):
    trainer, sampled_at = trainer_of(method, tmp_path), []
    trainer.add_callback(Interruption)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interruption)
    generate = trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda rows: (sampled_at.append(trainer._step), generate(rows))[1]
    )
    trainer.train()
    assert sampled_at == [0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "lora", "vllm", "replaced", "warned"),
    [
        (torch.bfloat16, True, True, False, True),
        (torch.float32, True, True, False, False),
        (torch.bfloat16, False, True, False, False),
        (torch.bfloat16, True, False, False, False),
        (torch.bfloat16, True, True, True, False),
    ],
)
def test_weights_that_drift_at_each_sync(method, dtype, lora, vllm, replaced, warned, caplog):
    model = tiny_qwen3(hidden=32)[0].to(dtype)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear")) if lora else model
    generation = VLLMGeneration.__new__(VLLMGeneration)
    if replaced:
        sync_merged_weights(generation)
    trainer = SimpleNamespace(model=model, **({"vllm_generation": generation} if vllm else {}))
    callback = importlib.import_module(f"{method}._trl").AdapterSync(trainer)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    assert ("rounds the frozen weights at each sync" in caplog.text) == warned
