"""Experiments as stages of commands: order, side by side, failures, Ctrl-C."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from torch.distributed.run import get_args_parser

from common import stages

ROOT = Path(__file__).resolve().parents[2]


def python(name: str, code: str) -> stages.Command:
    return name, [sys.executable, "-c", code]


def sleeper(name: str, seconds: float, code: int = 0) -> stages.Command:
    return python(name, f"import sys, time; print('{name} here', flush=True); time.sleep({seconds}); sys.exit({code})")


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 2)


def test_stages_run_in_order(tmp_path, two_cores, capfd):
    log = tmp_path / "order"
    write = "open({!r}, 'a').write({!r})"
    plan = [
        [python("a", write.format(str(log), "a"))],
        [python("b", write.format(str(log), "b")), python("b2", write.format(str(log), "b"))],
        [python("c", write.format(str(log), "c"))],
    ]
    assert stages.run_stages(plan, tmp_path / "logs") == 0
    assert log.read_text() == "abbc"
    logs = {path.name for path in (tmp_path / "logs").glob("*.log")}
    assert logs == {"b.log", "b2.log"}  # one alone writes to the terminal
    assert "$ python -c 'open(" in capfd.readouterr().out


def test_on_one_core_commands_take_turns(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)
    assert stages.run_stages([[sleeper("a", 0), sleeper("b", 0)]], tmp_path / "logs") == 0
    said = capfd.readouterr().out
    assert said.index("\na here") < said.index("\nb here") and not any((tmp_path / "logs").glob("*.log"))


def test_a_module_that_is_not_there_shows_before_the_first_command(tmp_path, monkeypatch):
    """As in a folder that a method and common/ were copied into: the report was missing after all trainings."""
    monkeypatch.chdir(tmp_path)
    for module in ("benchmarks.no_method", "no_package.report"):
        plan = [
            [python("train", "open('trained', 'w')")],
            [("report", [sys.executable, "-m", module, "--config", "x"])],
        ]
        with pytest.raises(ValueError, match=rf"{module} is not to be found from here: start .* copy \w+/ beside"):
            stages.run_stages(plan, tmp_path / "logs")
    assert not list(tmp_path.iterdir())
    launch = [*stages.launcher(2, "zero2"), "common.evaluation"]
    stages.check_modules([[("train", launch), ("report", [sys.executable, "-m", "benchmarks.srpo"])]])


def test_a_free_place_is_taken_at_once(tmp_path, two_cores, capfd):
    """Three commands on two cores: the third starts when the short one ends, not when both have."""
    plan = [[sleeper("long", 3), sleeper("short", 0), sleeper("third", 0)]]
    assert stages.run_stages(plan, tmp_path) == 0
    ends = [line.split()[2] for line in capfd.readouterr().out.splitlines() if line.endswith("ended")]
    assert ends == ["short:", "third:", "long:"]
    assert (tmp_path / "third.log").read_text() == "third here\n"


def test_a_log_keeps_what_was_written_before(tmp_path, two_cores):
    """A second command on a run that is in use ends at once, and must not empty the log of the first."""
    stage = [python("a", "print('one')"), python("b", "print('two')")]
    assert stages.run_stages([stage], tmp_path) == stages.run_stages([stage], tmp_path) == 0
    assert [(tmp_path / f"{name}.log").read_text() for name in "ab"] == ["one\none\n", "two\ntwo\n"]


def test_each_command_has_one_thread_on_a_cpu(tmp_path, two_cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    look = python("look", "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '1')")
    assert stages.run_stages([[look], [look, ("again", look[1])]], tmp_path) == 0


def test_a_command_that_was_stopped_stops_the_others_and_shows_its_log(tmp_path, two_cores, capfd):
    pid = tmp_path / "pid"
    pid.touch()
    path = repr(str(pid))
    other = f"import os, time; open({path}, 'w').write(str(os.getpid())); time.sleep(60); os.remove({path})"
    bad = f"import os, sys, time\nwhile not os.path.getsize({path}): time.sleep(0.01)\nprint('bad here')\n"
    bad += "sys.exit(143)"
    plan = [[python("other", other), python("bad", bad), sleeper("never", 0)], [sleeper("later", 0)]]
    assert stages.run_stages(plan, tmp_path) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    printed = capfd.readouterr().out
    assert "bad failed with exit code 143" in printed and "\nbad here\n" in printed
    assert not (tmp_path / "never.log").exists()
    assert not (tmp_path / "later.log").exists()


@pytest.mark.parametrize("cores", [1, 2])
def test_a_failure_leaves_the_others_to_go_on_and_is_named_at_the_end(tmp_path, monkeypatch, capfd, cores):
    """One variant of many that has no room on the GPU ended a night's trainings."""
    monkeypatch.setattr(stages.os, "cpu_count", lambda: cores)
    train = [sleeper("train-a", 0), python("train-b", "import sys; sys.exit('out of memory')"), sleeper("train-c", 0)]
    evaluate = [sleeper("evaluate-a", 0), sleeper("evaluate-b", 0, code=2), sleeper("evaluate-c", 0)]
    assert stages.run_stages([train, evaluate, [sleeper("report", 0)]], tmp_path) == 1
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    failed = "train-b (exit code 1), evaluate-b (exit code 2)"
    assert lines[-1] == f"failed: {failed}; the same command tries them again"
    assert "report here" in lines and "out of memory" in printed.out + printed.err
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("train-c", "evaluate-c")] if cores == 2 else lines
    assert {"train-c here", "evaluate-c here"} <= {line.strip() for line in logs}


@pytest.mark.parametrize("cores", [1, 2])
def test_a_mistake_of_the_first_training_ends_the_experiment(tmp_path, monkeypatch, capfd, cores):
    """A mistyped field that only the trainer refuses was said by all 35 trainings, each after loading its models."""
    monkeypatch.setattr(stages.os, "cpu_count", lambda: cores)
    train = stages.Trainings([sleeper("train-a", 0, code=2), sleeper("train-b", 2), sleeper("train-c", 0)])
    assert stages.run_stages([train, [sleeper("later", 0)]], tmp_path) == 2
    said = capfd.readouterr().out.splitlines()
    assert "the other trainings of this experiment (2) share model, data and settings: none goes on" in said
    assert said[-1] == "failed: train-a (exit code 2); the same command tries them again"
    assert not [line for line in said if line in ("train-c here", "later here")]


def test_a_mistake_of_a_later_training_that_ends_before_the_first_is_its_own(tmp_path, monkeypatch):
    """Such as a field that kd refuses and va_opd takes: side by side, it ended the others."""
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 2)
    train = stages.Trainings([sleeper("train-a", 2), sleeper("train-b", 0, code=2), sleeper("train-c", 0)])
    assert stages.run_stages([train, [sleeper("later", 0)]], tmp_path) == 2
    assert "train-c here" in (tmp_path / "train-c.log").read_text()


@pytest.mark.parametrize(
    ("codes", "all_begin"),
    [([2], True), ([1, 0], True), ([0, 2, 0], True), ([1, 2, 0], True), ([-9, 0], True), ([2, 0], False)],
)
def test_other_failures_of_a_training_leave_the_next_ones_to_go_on(tmp_path, monkeypatch, codes, all_begin):
    monkeypatch.setattr(stages, "call", lambda words, _: begun.append(words) or codes[len(begun) - 1])
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)
    begun: list = []
    stages.run_stages([stages.Trainings([sleeper(f"train-{i}", 0) for i in range(len(codes))])], tmp_path)
    assert (len(begun) == len(codes)) == all_begin


def test_the_same_experiment_does_not_run_twice_at_a_time(tmp_path, monkeypatch):
    """The second one was refused at the first training, and went on with the next on the same GPU."""
    plan, begun = [[sleeper("train-a", 0)], [sleeper("train-b", 0)]], []

    def while_it_runs(words, environment):
        begun.append(words)
        with monkeypatch.context() as inside:
            inside.setattr(stages, "call", lambda *_: 0)
            with pytest.raises(ValueError, match="is in use by another process: wait for it"):
                stages.run_stages(plan, tmp_path)
            assert stages.run_stages(plan[:1], tmp_path) == 0  # other variants may run meanwhile
        return 0

    monkeypatch.setattr(stages, "call", while_it_runs)
    assert stages.run_stages(plan, tmp_path) == stages.run_stages(plan, tmp_path) == 0
    assert len(begun) == 4


@pytest.mark.parametrize("code", [130, 143])
def test_after_a_command_that_was_stopped_none_begins(tmp_path, monkeypatch, code):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)
    touch = python("later", f"open({str(tmp_path / 'later')!r}, 'w')")
    plan = [[sleeper("done", 0), sleeper("stopped", 0, code=code), touch], [touch]]
    assert stages.run_stages(plan, tmp_path) == code
    assert not (tmp_path / "later").exists()


def test_a_stage_without_success_ends_the_experiment(tmp_path, two_cores):
    bad = [sleeper("bad", 0, code=4), sleeper("worse", 0.5, code=5)]
    assert stages.run_stages([bad, [python("later", f"open({str(tmp_path / 'later')!r}, 'w')")]], tmp_path) == 4
    assert not (tmp_path / "later").exists()


def runs_that_log(tmp_path, codes: dict[str, int]) -> list[list]:
    """A base, then runs of a training and an evaluation in two parts, then a report; each logs its name and ends with
    its code."""
    write = "import sys; open({!r}, 'a').write({!r}); sys.exit({})"

    def command(name: str) -> stages.Command:
        return python(name, write.format(str(tmp_path / "order"), f"{name} ", codes.get(name, 0)))

    runs = []
    for i in "12":
        parts = stages.OneGPUEach([command(f"part{i}1"), command(f"part{i}2")])
        runs.append([[command(f"train{i}")], parts, [command(f"curve{i}")]])
    return [[command("base")], stages.RunByRun(runs), [command("report")]]


@pytest.mark.parametrize(
    ("codes", "begun"),
    [
        ({}, "base train1 part11 part12 curve1 train2 part21 part22 curve2 report"),
        ({"train1": 3}, "base train1 train2 part21 part22 curve2 report"),  # nothing of it is there to evaluate
        (
            {"part12": 3},
            "base train1 part11 part12 curve1 train2 part21 part22 curve2 report",
        ),  # `curve` tries it again
        ({"part11": 3, "part12": 4}, "base train1 part11 part12 train2 part21 part22 curve2 report"),
        ({"train1": 3, "curve2": 4}, "base train1 train2 part21 part22 curve2"),  # no run is whole
        ({"train1": 143}, "base train1"),
        ({"train1": 2}, "base train1"),  # a mistake of all
        ({"train2": 2}, "base train1 part11 part12 curve1 train2 report"),
        ({"curve1": 2}, "base train1 part11 part12 curve1 train2 part21 part22 curve2 report"),
        ({"part11": 130}, "base train1 part11"),
        ({"base": 3}, "base"),
    ],
)
def test_a_run_begins_when_the_one_before_is_evaluated_or_has_failed(tmp_path, monkeypatch, codes, begun):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)
    plan = runs_that_log(tmp_path, codes)
    assert stages.run_stages(plan, tmp_path / "logs") == next(iter(codes.values()), 0)
    assert (tmp_path / "order").read_text().split() == begun.split()


def test_every_failed_command_of_a_run_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)
    assert stages.run_stages(runs_that_log(tmp_path, {"train1": 3, "part22": 4}), tmp_path / "logs") == 3
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "failed: train1 (exit code 3), part22 (exit code 4); the same command tries them again"


def test_a_missing_module_of_a_run_shows_before_the_first_command(tmp_path):
    plan = runs_that_log(tmp_path, {})
    plan[1][1].append([("late", [sys.executable, "-m", "no_package.report"])])
    with pytest.raises(ValueError, match="no_package.report is not to be found from here"):
        stages.run_stages(plan, tmp_path / "logs")
    assert not (tmp_path / "order").exists()


def test_all_commands_are_told_to_end_before_one_is_waited_for(tmp_path, two_cores, monkeypatch):
    """A scheduler leaves them seconds, all of which each may need to save."""
    child = """
import pathlib, signal, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
def stop(*_):
    mine.with_suffix(".told").touch()
    for _ in range(1000):
        if other.with_suffix(".told").exists():
            sys.exit(mine.with_suffix(".saved").touch())
        time.sleep(0.01)
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
mine.touch()
while True:
    time.sleep(0.01)
"""
    files, sleep = [tmp_path / "a", tmp_path / "b"], stages.time.sleep

    def interrupted(seconds):
        if all(file.exists() for file in files):
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(stages.time, "sleep", interrupted)
    words = [[sys.executable, "-c", child, str(file), str(other)] for file, other in (files, files[::-1])]
    with pytest.raises(KeyboardInterrupt):
        stages.run_stages([[("a", words[0]), ("b", words[1])]], tmp_path / "logs")
    assert all(file.with_suffix(".saved").exists() for file in files)


def test_what_an_earlier_start_logged_is_kept_and_not_shown(tmp_path, two_cores, capfd):
    for name in ("failing", "speaking"):
        (tmp_path / f"{name}.log").write_text("of yesterday\n")
    spoken = f"open({str(tmp_path / 'speaking.log')!r}).read().count('today')"
    fail = python("failing", f"import sys, time\nwhile not {spoken}: time.sleep(0.01)\nsys.exit(3)")
    plan = [[fail, python("speaking", "print('of today')")]]
    assert stages.run_stages(plan, tmp_path) == 3
    assert (tmp_path / "speaking.log").read_text() == "of yesterday\nof today\n"
    assert "of yesterday" not in capfd.readouterr().out


def test_a_sign_of_life_ends_with_a_whole_word(tmp_path, two_cores, monkeypatch, capfd):
    """step_time 3.97 was shown as "step_time 3."."""
    monkeypatch.setattr(stages, "SIGN_OF_LIFE", 0.3)
    speaks = f"import time; print('{'a' * 88} time 3.97', flush=True); time.sleep(3)"
    assert stages.run_stages([[python("a", speaks), python("b", "import time; time.sleep(3)")]], tmp_path) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if " s  " in line and not line.endswith("ended")]
    said = {line.split("  ")[-1] for line in lines} - {"a: starting"}
    assert said == {f"a: {'a' * 88} time 3.97", "b: starting"}
    assert stages._cut("a" * 94 + " time 3.97") == "a" * 94 + " time ..."
    assert stages._cut("a" * 95 + " time") == "a" * 95 + " time"  # as wide as it may be


def test_a_bar_that_was_wiped_out_is_no_line(tmp_path):
    """It is blanks as long as the bar was: those of more than a hundred ended the experiment."""
    for words in (f"step 6\nstep 7 \udcff\r{' ' * 120}\r", f"{' ' * 120}step 7 \udcff\n\n"):
        (tmp_path / "a.log").write_text(words, errors="surrogateescape")  # with a byte that is no UTF-8
        assert [stages._cut(line) for line in stages._end(tmp_path, "a", 0, 1)] == ["step 7 \ufffd"]


def test_a_failed_command_alone_ends_the_experiment(tmp_path):
    assert stages.run_stages([[sleeper("bad", 0, code=4)], [sleeper("later", 0)]], tmp_path) == 4


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("sys.exit(2)", "time.sleep(60)", 2),
        ("sys.exit(2)", "sys.exit(2)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)", 137),
        ("sys.exit(143)", "sys.exit(143)", 143),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", "time.sleep(60)", 143),
        ("os.kill(os.getppid(), signal.SIGHUP); time.sleep(60)", "time.sleep(60)", 143),
        ("pass", "pass", 0),
    ],
)
def test_a_launcher_ends_with_the_exit_code_of_the_training(tmp_path, first, second, code):
    """Where accelerate's ended with 1, so that an experiment took a SIGTERM, or a mistake of all, for a crash."""
    ranks = f"if os.environ['RANK'] == '0':\n    {first}\nelse:\n    {second}\n"
    (tmp_path / "rank.py").write_text("import os, signal, sys, time\n" + ranks)
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["-m", "common.launch", "--config_file", str(tmp_path / "config.yaml"), "--num_processes", "2"]
    words += ["--main_process_port", "0", str(tmp_path / "rank.py")]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == code, ended.stderr
    assert ("FAILED" in ended.stderr) == (code == 137)  # of a mistake, the training has said it


def test_launchers():
    assert stages.launcher(1, "zero2") == [sys.executable, "-m"]
    assert stages.launcher(8, "zero2")[-3:] == ["--num_processes", "8", "-m"]
    fsdp = stages.launcher(8, "fsdp2")
    assert fsdp[fsdp.index("--fsdp_cpu_ram_efficient_loading") + 1] == "false"
    with pytest.raises(ValueError, match="gpus must be at least 0, got -1"):
        stages.launcher(-1, "zero2")
    with pytest.raises(ValueError, match=r"sharding 'zero9' is no accelerate config of TRL; choose among .*zero3"):
        stages.launcher(8, "zero9")


@pytest.mark.parametrize(
    ("sharding", "kind", "settings"),
    [
        ("single_gpu", "NO", {}),
        ("multi_gpu", "MULTI_GPU", {}),
        # No gradient_accumulation_steps: it follows the training arguments
        ("zero2", "DEEPSPEED", {"zero_stage": 2, "gradient_accumulation_steps": None}),
        ("zero3", "DEEPSPEED", {"zero_stage": 3, "gradient_accumulation_steps": None, "zero3_save_16bit_model": True}),
        ("fsdp2", "FSDP", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
    ],
)
def test_accelerate_reads_the_configs_as_the_methods_need_them(sharding, kind, settings):
    from accelerate.commands.config.config_args import load_config_from_file

    words = stages.launcher(2, sharding)
    config = load_config_from_file(words[words.index("--config_file") + 1])
    assert config.distributed_type == kind
    section = config.deepspeed_config if kind == "DEEPSPEED" else getattr(config, "fsdp_config", {})
    assert {name: section.get(name) for name in settings} == settings


def test_a_comma_list_is_checked_before_anything_runs():
    assert stages.chosen("variants", "all", {"a": [], "b": []}) == ["a", "b"]
    assert stages.chosen_seeds("0,1,") == ["0", "1"]
    with pytest.raises(ValueError, match="seeds must be whole numbers, got a, -1"):
        stages.chosen_seeds("0,a,-1")
    with pytest.raises(ValueError, match="seeds must be whole numbers, got all"):
        stages.chosen_seeds("all")
    with pytest.raises(ValueError, match="seeds names nothing, got ','"):
        stages.chosen("seeds", ",")
    with pytest.raises(ValueError, match=r"unknown variants \['c'\]; choose among a, b, or all"):
        stages.chosen("variants", "a,c", ("a", "b"))
    for text in ("0,0", "0,00"):
        with pytest.raises(ValueError, match="seeds must differ, got 0,0"):
            stages.chosen_seeds(text)


def test_a_shown_command_can_be_pasted():
    words = [sys.executable, "-m", "srpo.train", "--chat_template_kwargs", '{"enable_thinking": false}', "--x", ""]
    assert shlex.split(stages.shown(("name", words))) == ["python", *words[1:]]


def test_missing_packages_of_a_gpu_machine_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    stages.check_packages(vllm=False, gpus=1, sharding="zero3")
    stages.check_packages(vllm=False, gpus=8, sharding="fsdp2")
    with pytest.raises(ValueError, match=r"need vllm and deepspeed.*README\.md"):
        stages.check_packages(vllm=True, gpus=8, sharding="zero2")
    with pytest.raises(ValueError, match="report_to has tracks, which this Python does not have"):
        stages.check_packages(vllm=False, gpus=1, sharding="zero3", report_to=["tracks"])
    stages.check_report_to(["azure_ml", "comet_ml", "flyte"])  # of which transformers knows more
    with pytest.raises(ValueError, match="report_to has None, .* set report_to to none"):
        stages.check_report_to([None])


def test_more_gpus_than_the_machine_has_are_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    stages.check_packages(vllm=False, gpus=4, sharding="fsdp2")
    with pytest.raises(ValueError, match=r"want 8 GPUs and this process sees 4: set gpus \(GPUS= of make\) to 4"):
        stages.check_packages(vllm=False, gpus=8, sharding="fsdp2")


@pytest.mark.parametrize("method", ["va_opd", "srpo", "r_diverse"])
def test_flags_of_make_are_passed_on_whole(method, capsys, tmp_path, monkeypatch):
    """DATA= and SEED= are --data and --seed, of which --datasets and --seeds must not be taken for the long form."""
    main = importlib.import_module(f"{method}.loop").main
    config = ROOT / method / "configs" / "tiny.yaml"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/test.json").touch()
    monkeypatch.chdir(tmp_path)
    dataset = ["--dataset", "geo3k"] if method == "va_opd" else []  # with its digits data are refused
    words = ["--config", str(config), "--variants", "all", *dataset, "--data", "mine", "--seed", "7", "--dry_run"]
    assert main(words) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    commands = [line for line in commands if f"{method}.data " not in line]
    assert commands and all("--data mine --seed 7" in line for line in commands)


class Placed(SimpleNamespace):
    n_gpu = property(lambda self: self._n_gpu)


def test_a_process_without_a_launcher_has_one_gpu():
    """Also for a KL reference, which TRL loads with the same arguments and spreads else."""
    assert stages.on_one_gpu(Placed(_n_gpu=2)).n_gpu == 1
    for given, left in ((None, {}), ({"dtype": "bfloat16"}, {"dtype": "bfloat16"})):
        config = stages.on_one_gpu(Placed(_n_gpu=2, model_init_kwargs=given))
        assert config.model_init_kwargs == {**left, "device_map": None}
    for count in (0, 1):
        assert vars(stages.on_one_gpu(Placed(_n_gpu=count, model_init_kwargs=None))) == {
            "_n_gpu": count, "model_init_kwargs": None,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("allowed", "wanted", "seen"),
    [(None, [2, 3], "2,3"), ("4,5,6,7", [2, 3], "6,7"), ("GPU-a,GPU-b", [1], "GPU-b"), ("3", [0], "3")],
)
def test_children_see_the_gpus_that_the_process_may_use(monkeypatch, allowed, wanted, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert stages.visible(wanted) == seen


@pytest.mark.parametrize(("allowed", "count"), [("4,5,6", 3), ("", 0)])
def test_more_gpus_than_the_process_may_use_are_one_sentence(monkeypatch, allowed, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    with pytest.raises(ValueError, match=f"GPU number 3 is needed, but CUDA_VISIBLE_DEVICES=.* leaves {count}: lower"):
        stages.visible(range(4))


def test_commands_of_one_gpu_each_share_the_gpus(tmp_path, monkeypatch):
    """Three commands on two of the machine's GPUs; a launcher's stage has all of them, one command after the other."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    tell = "import os, time; open({!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' '); time.sleep(0.3)"
    each, whole = (tell.format(str(tmp_path / name)) for name in ("each", "whole"))
    commands = [python(f"e{i}", each) for i in range(3)]
    plan = [stages.OneGPUEach(commands), [python(f"w{i}", whole) for i in range(2)]]
    assert stages.run_stages(plan, tmp_path / "logs", gpus=2) == 0
    seen = (tmp_path / "each").read_text().split()
    assert sorted(seen[:2]) == ["4", "5"] and len(seen) == 3 and seen[2] in ("4", "5")
    assert (tmp_path / "whole").read_text().split() == ["4,5,6", "4,5,6"]
    logs = {path.name for path in (tmp_path / "logs").glob("*.log")}
    assert logs == {"e0.log", "e1.log", "e2.log"}  # those of the launcher took turns


def test_a_launcher_under_nohup_leaves_the_lost_terminal_alone(monkeypatch):
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        stages.launcher(2, "zero2")
        assert "PET_SIGNALS_TO_HANDLE" not in os.environ
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stages.launcher(2, "zero2")
    finally:
        signal.signal(signal.SIGHUP, before)
    defaults = get_args_parser().parse_args(["x.py"])
    assert defaults.signals_to_handle == os.environ.pop("PET_SIGNALS_TO_HANDLE") == "SIGTERM,SIGINT,SIGQUIT"


def test_a_launcher_under_nohup_keeps_the_users_signals(monkeypatch):
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stages.launcher(2, "zero2")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert os.environ["PET_SIGNALS_TO_HANDLE"] == "SIGTERM"
