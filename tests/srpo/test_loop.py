"""SRPO's experiment: GRPO's several steps a batch, memory, its stages end to end, what stops it at its start."""

import json
from pathlib import Path

import forks
import pytest
from training_runs import fails

from common import stages
from srpo import evaluate, loop, train

ROOT = Path(__file__).resolve().parents[2]


# --- GRPO's steps ---


def test_the_papers_grpo_takes_four_steps_a_batch():
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu"]
    _, config = train.parse([*given, "--routing", "grpo"])
    assert (config.steps_per_generation, config.gradient_accumulation_steps) == (8, 2)
    assert (config.max_steps, config.save_steps, config.warmup_steps) == (1900, 20, 40)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ("--gradient_accumulation_steps 8", "--steps_per_generation 8 --gradient_accumulation_steps 2"),
        ("--gradient_accumulation_steps 1", "--steps_per_generation 4 --per_device_train_batch_size 8"),
        ("--gradient_accumulation_steps 6", "--steps_per_generation 24 --per_device_train_batch_size 8"),
        ("--gradient_accumulation_steps 6 --grpo_steps 3", "--steps_per_generation 6 --gradient_accumulation_steps 2"),
    ],
)
def test_grpo_splits_any_batch_that_divides_and_keeps_it_whole(fields, flags):
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--per_device_train_batch_size", "32", "--use_cpu"]
    args, config = train.parse([*given, *fields.split()])
    steps = train.split_batch(config, args.grpo_steps)
    assert " ".join(steps[:4]) == flags
    _, split = train.parse([*given, *fields.split(), "--routing", "grpo"])
    assert split.gradient_accumulation_steps * args.grpo_steps == split.steps_per_generation
    assert split.generation_batch_size == config.generation_batch_size
    assert split.max_steps == args.grpo_steps * config.max_steps


def test_counts_that_are_shares_of_all_steps_stay_as_they_are():
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu", "--warmup_steps", "0.05"]
    _, config = train.parse([*given, "--save_steps", "0.5"])
    steps = train.split_batch(config, 4)
    assert "--max_steps" in steps and not {"--warmup_steps", "--save_steps"} & {*steps}


def test_every_command_of_a_data_set_names_it():
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu"]
    stages = loop.plan(fields, train.parse(fields)[0], ["srpo"], ["physics", "biology"], ["0"], ["python", "-m"])
    named = [words[words.index("--dataset") + 1] for stage in stages[:2] for _, words in stage]
    assert named == ["physics", "biology", *["physics"] * 2, *["biology"] * 2]


@pytest.mark.parametrize(
    ("config", "model", "made"),
    [
        ("tiny", None, "base"),
        ("small", None, "smollm2"),
        ("tiny", "/elsewhere/tiny/models/base", "base"),
        ("tiny", "/disk/models/base", None),  # somebody's model, on a disk that is not there
        ("small", "org/models/smollm2", None),
        ("qwen3_8b", None, None),
    ],
)
def test_no_policy_is_made_under_the_name_of_another_model(config, model, made):
    fields = ["--config", str(ROOT / f"srpo/configs/{config}.yaml"), "--use_cpu"]
    fields += ["--model", model] if model else []
    args, _ = train.parse(fields)
    stages = loop.plan(fields, args, ["srpo"], [args.dataset], ["0"], ["python", "-m"])
    makers = [words[-2:] for stage in stages for name, words in stage if name.startswith("make-")]
    assert makers == ([[made, args.model]] if made else [])


def test_with_drop_evaluated_a_run_is_evaluated_on_all_gpus_before_the_next_one_trains(capsys):
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--drop_evaluated", "true", "--dry_run"]
    assert loop.main([*fields, "--variants", "sdpo,srpo", "--gpus", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    words = [line.split() for line in lines]
    said = [
        [w[w.index("-m", 4 if "accelerate" in line else 0) + 1], *(w[-1:] if "--part" in w else [])]
        for line, w in zip(lines, words, strict=True)
    ]
    run = [["srpo.train"], ["srpo.evaluate", "1/2"], ["srpo.evaluate", "2/2"], ["srpo.evaluate"]]
    assert said == [["srpo.evaluate"], *run, *run, ["benchmarks.srpo"]]
    routes = [w[w.index("--routing") + 1] for w in words if "--routing" in w]
    assert routes == ["sdpo"] * 4 + ["srpo"] * 4 and all("--drop_evaluated true" in line for line in lines)


@pytest.mark.parametrize(
    ("gpus", "options", "kinds"),
    [
        (1, {}, [list, list]),
        (8, {}, [list, stages.OneGPUEach, list]),
        (8, {"tensor_parallel_size": 2}, [list, list]),  # each evaluation has several GPUs
    ],
)
def test_a_run_is_evaluated_in_parts_where_there_are_gpus_for_them(gpus, options, kinds):
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu", "--drop_evaluated", "true"]
    args, _ = train.parse([*fields, "--engine_options", json.dumps(options)])
    _, runs, _ = loop.plan(fields, args, ["srpo"], ["physics"], ["0"], ["python", "-m"], gpus)
    assert isinstance(runs, stages.RunByRun) and [type(stage) for stage in runs[0]] == kinds
    parts = [words[-1] for stage in runs[0] for _, words in stage if "--part" in words]
    assert parts == [f"{i}/{gpus}" for i in range(1, gpus + 1) if len(kinds) == 3]
    names = [name for name, _ in stages.commands_of([runs])]
    assert len(set(names)) == len(names)  # each part has a log of its own


def test_a_batch_that_is_split_already_is_not_split_again():
    """As in the config.yaml of a finished GRPO run."""
    given = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--use_cpu", "--routing", "grpo"]
    _, config = train.parse([*given, "--steps_per_generation", "8", "--gradient_accumulation_steps", "2"])
    assert train.split_batch(config, 4) == []
    with pytest.raises(ValueError, match="takes 4 optimizer steps already, grpo_steps=2: set steps_per_gen"):
        train.split_batch(config, 2)


def test_grpo_never_takes_other_steps_than_it_says(config, capsys):
    assert "is a multiple of grpo_steps=3" in fails(train, capsys, config, "--routing", "grpo", "--grpo_steps", "3")
    capsys.readouterr()
    assert loop.main(["--config", str(config), "--variants", "grpo", "--grpo_steps", "3", "--dry_run"]) == 2
    assert "is a multiple of grpo_steps=3" in capsys.readouterr().err
    assert loop.main(["--config", str(config), "--variants", "srpo", "--grpo_steps", "3", "--dry_run"]) == 0


# --- memory ---


def test_the_memory_estimate_by_hand(capsys):
    """Qwen3-8B on 8 GPUs, in GiB: 2 + 2 + 12 + 6 bytes a parameter over 8 shards; 2 + 2/8 + 12/8 + 4 under ZeRO-2."""
    for sharding, weights, teacher in (("zero3", 2 / 8, 6 / 8), ("zero2", 2, 4)):
        fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", "8", "--sharding", sharding]
        assert loop.main([*fields, "--dry_run"]) == 0
        printed = capsys.readouterr().out
        for name, per_parameter in (
            ("policy weights", weights),
            ("gradients", 2 / 8),
            ("optimizer", 12 / 8),
            ("self-teacher, ema", teacher),
        ):
            (line,) = [line for line in printed.splitlines() if line[10:].strip().startswith(name)]
            assert float(line.split()[0]) == pytest.approx(8e9 * per_parameter / 2**30, abs=0.005)
        total = float(next(line for line in printed.splitlines() if line.endswith("  sum")).split()[0])
        assert (total < 80) == (sharding == "zero3")  # the default fits the 80 GB that the preset names
        assert "95 checkpoints x 14.90" in printed


def test_the_parts_of_every_teacher_by_hand():
    """8B, bytes: GRPO has no teacher, in memory or in a checkpoint, and a frozen one with LoRA is the policy."""

    def sizes(*fields: str) -> tuple[float, float]:
        """Of the teacher in memory, and of what only resuming needs."""
        argv = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run", *fields]
        args, settings = train.parse(argv)
        parts = train.memory_parts(args, settings, 8e9, 1, "none")
        (teacher,) = (size for name, size in parts.items() if name.startswith("self-teacher"))
        return teacher, train.checkpoint_sizes(args, settings, 8e9, "none")[2]

    average, states = 4 * 8e9, sizes("--teacher", "current")[1]
    assert sizes() == (average, states + average)
    assert sizes("--routing", "grpo") == (0, states)
    assert sizes("--teacher", "frozen") == (4 * 8e9, states)
    assert sizes("--teacher", "current")[0] == sizes("--teacher", "frozen", "--lora_rank", "8")[0] == 0


def test_what_an_offloaded_teacher_short_responses_and_adapters_take():
    """8B: on the GPU stays the teacher's head, no response is longer than its limit, a checkpoint is the adapter."""

    def parsed(*fields: str):
        return train.parse(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run", *fields])

    def size(name: str, *fields: str) -> float:
        parts = train.memory_parts(*parsed(*fields), 8e9, 1, "none")
        return next(value for key, value in parts.items() if key.startswith(name))

    assert size("self-teacher", "--teacher_offload", "true") == 4 * 4096 * 151_936
    whole, half = (size("cached", "--max_completion_length", length) for length in ("8192", "400"))
    assert half == whole / 2
    adapter = parsed("--lora_rank", "8")
    share = train.trained_parameters(adapter[0], 8e9) / 8e9
    sizes = [train.checkpoint_sizes(*settings, 8e9, "none")[1] for settings in (adapter, parsed())]
    assert share < 0.01 and sizes[0] == pytest.approx(share * sizes[1])


@pytest.mark.parametrize(
    ("fields", "sharding", "size"),
    [
        ([], "zero2", 4),  # a float32 average has float32 states, autocast or not
        ([], "zero3", 2),  # there it computes in the policy's dtype
        (["--teacher", "frozen", "--policy_dtype", "bfloat16"], "none", 2),
        (["--teacher", "current"], "none", 4),
    ],
)
def test_the_teachers_cached_states_have_its_dtype(capsys, fields, sharding, size):
    gpus = "1" if sharding == "none" else "8"
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", gpus, *fields, "--dry_run"]
    assert loop.main([*fields, "--sharding", "zero2" if sharding == "none" else sharding]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cached teacher hidden states" in line]
    _, config = train.parse(["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run"])
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    expected = size * 4096 * 0.4 * rows * 800
    assert float(line.split()[0]) == pytest.approx(expected / 2**30, abs=0.005)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_the_disk_of_all_runs_is_that_of_their_checkpoints(capsys, sharding):
    """On one GPU nothing is sharded. Each of two runs keeps what resuming needs of its newest checkpoint."""
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run"]
    assert loop.main([*fields, "--variants", "srpo", "--seeds", "0,1", "--sharding", sharding]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the disk has to hold" in line]
    count, each, resume = train.checkpoint_sizes(*train.parse(fields), 8e9, "none")
    assert f"checkpoints of 2 runs: {2 * (count * each + resume) / 2**30:,.0f} GiB;" in line


def test_the_disk_of_all_runs_whose_evaluated_checkpoints_are_dropped(capsys):
    """One run whole, beside it of each run the model twice: its last checkpoint and model/."""
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--dry_run", "--drop_evaluated", "true"]
    assert loop.main([*fields, "--variants", "srpo", "--seeds", "0,1,2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "the disk has to hold" in line]
    count, each, resume = train.checkpoint_sizes(*train.parse(fields), 8e9, "none")
    assert f"one run and two models of each of 3: {((count + 5) * each + resume) / 2**30:,.0f} GiB;" in line


def test_the_self_teacher_is_cut_under_fsdp_too(capsys):
    fields = ["--config", str(ROOT / "srpo/configs/qwen3_8b.yaml"), "--gpus", "8", "--sharding", "fsdp2", "--dry_run"]
    assert loop.main(fields) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "self-teacher, ema" in line]
    assert float(line.split()[0]) == pytest.approx(8e9 * 4 / 8 / 2**30, abs=0.005)


# --- the experiment ---


def test_the_experiment_runs_end_to_end_and_a_second_time_does_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", forks.run_stages)
    fields = ["--config", str(config), "--max_steps", "2"]
    assert loop.main([*fields, "--variants", "srpo"]) == 0
    report = (tmp_path / "runs/srpo/small/report.md").read_text()
    assert "| SRPO | 1 |" in report and "| base | 41.1 |" not in report
    for name in ("accuracy", "hours", "training", "last"):
        assert (tmp_path / f"runs/srpo/small/figures/additions_{name}.png").stat().st_size > 5000
    samples = tmp_path / "runs/srpo/small-additions/srpo-seed0/eval/checkpoint-2/additions/samples.jsonl"
    before = samples.stat().st_mtime_ns
    assert train.main(fields) == evaluate.main(["run", *fields]) == 0
    assert "done already" in capsys.readouterr().out
    assert samples.stat().st_mtime_ns == before


def test_the_configs_own_dataset_may_be_named(config, capsys):
    assert loop.main(["--config", str(config), "--datasets", "additions", "--dry_run"]) == 0
    assert loop.main(["--config", str(config), "--datasets", "all", "--dry_run"]) == 0
    assert loop.main(["--config", str(config), "--datasets", "chemistrie", "--dry_run"]) == 2


def test_data_that_is_missing_is_said_before_the_first_training(config, capsys, tmp_path, monkeypatch):
    paper = ["--config", str(config), "--datasets", "all"]
    assert loop.main(paper) == 2
    assert "tooluse is on no hub" in capsys.readouterr().err
    assert loop.main([*paper, "--dry_run"]) == 0
    assert "missing: tooluse is on no hub" in capsys.readouterr().out
    assert loop.main([*paper, "--dry_run", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere': there is no such folder" in capsys.readouterr().err
    monkeypatch.setattr(loop, "run_stages", lambda *_: pytest.fail("a training has begun"))
    (tmp_path / "data/chemistry").mkdir(parents=True)
    assert loop.main([*paper, "--data", str(tmp_path / "data")]) == 2
    assert "holds no test.json" in capsys.readouterr().err


def test_a_model_that_is_missing_is_said_before_the_first_training(config, capsys, monkeypatch):
    monkeypatch.setattr(loop, "run_stages", lambda *_: pytest.fail("a training has begun"))
    for flags in (["--model", "/no/Qwen3-8B", "--dry_run"], ["--model", "/no/Qwen3-8B"], ["--model", "org/none-8B"]):
        assert loop.main(["--config", str(config), *flags]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"srpo.loop: model {flags[1]!r}: ") and not said.out
    assert loop.main(["--config", str(config), "--model", "org/none-8B", "--dry_run"]) == 0  # asks no hub
    tiny = str(ROOT / "srpo/configs/tiny.yaml")
    assert loop.main(["--config", tiny, "--model", "/no/tiny/models/base", "--dry_run"]) == 0  # made by the experiment


def test_unknown_variants_are_one_sentence(config, capsys):
    assert loop.main(["--config", str(config), "--variants", "ppo"]) == 2
    assert "choose among srpo, grpo, sdpo" in capsys.readouterr().err
