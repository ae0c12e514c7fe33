"""Figures that show a silent failure of SRPO, in words."""

from types import SimpleNamespace

import pytest

from srpo import doctor


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({"route/all_wrong_groups": 0.9}, "no correct rollout"),
        ({"route/all_correct_groups": 0.95}, "nothing is left to learn"),
        ({"completions/clipped_ratio": 0.6}, "truncated"),
        ({"completions/mean_length": 10.0}, "five times shorter"),
        ({"entropy": 0.001}, "entropy has collapsed"),
        ({"sampling/sampling_logp_difference/mean": 0.2}, "disagree"),
    ],
)
def test_the_doctor_warns_in_words(logs, message):
    (warning,) = doctor.diagnose(logs, first_length=100.0)
    assert message in warning
    assert doctor.diagnose(dict.fromkeys(logs), first_length=100.0) == []


def test_the_doctor_warns_beyond_its_bounds_only():
    bounds = {
        "route/all_wrong_groups": 0.8,
        "route/all_correct_groups": 0.9,
        "completions/clipped_ratio": 0.5,
        "sampling/sampling_logp_difference/mean": 0.1,
        "entropy": 0.01,  # these two warn below it
        "completions/mean_length": 20.0,
    }
    for name, bound in bounds.items():
        warned = [len(doctor.diagnose({name: bound + by}, first_length=100.0)) for by in (-1e-4, 0, 1e-4)]
        assert warned == ([1, 0, 0] if name in ("entropy", "completions/mean_length") else [0, 0, 1]), name


def test_the_doctors_line_names_the_figures(capsys):
    """Each under its name in the logs; one that does not exist is left out."""
    logs = {name: 1 / 8 for name, _ in doctor.FIGURES} | {"reward_std": None}
    logs |= {"route/correct": 0.5, "route/sdpo": 0.4, "route/teacher_available": 0.6, "route/grpo": 0.9}
    logs |= {"route/all_wrong_groups": 0.2, "route/all_correct_groups": 0.3, "completions/mean_length": 250.4}
    logs["sampling/sampling_logp_difference/mean"] = 0.012
    state = SimpleNamespace(is_world_process_zero=True, global_step=7, log_history=[])
    doctor.DoctorCallback(every=20).on_log(None, state, None, logs)
    assert capsys.readouterr().out == (
        "[doctor] step 7: reward 0.125; correct 50%; to SDPO 40%; teacher available 60%; groups all wrong 20%; "
        "all correct 30%; teacher entropy 0.125; teacher-policy distance 0.12; divergence 0.1250; entropy 0.125; "
        "length 250; truncated 12%; train/rollout logps gap 0.012\n"
    )


def test_the_doctor_reads_the_logs_of_steps_only(capsys):
    """Not those of evaluations and of the end of training, which have other figures."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=50, log_history=[])
    for logs in ({"eval_reward": 0.5, "completions/clipped_ratio": 0.9}, {"train_runtime": 1.0}, None):
        doctor.DoctorCallback(every=20).on_log(None, state, None, logs)
    assert not capsys.readouterr().out


def test_a_resumed_run_remembers_its_first_length(capsys):
    before = [{"eval_completions/mean_length": 9.0}, {"completions/mean_length": None}]  # TRL's mean of nothing
    before.append({"completions/mean_length": 400.0})
    now = {"route/sdpo": 0.5, "completions/mean_length": 50.0}
    state = SimpleNamespace(is_world_process_zero=True, global_step=300, log_history=[*before, now])
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "five times shorter than at the start" in capsys.readouterr().out
    state.log_history = [{"completions/mean_length": 60.0}, now]
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "shorter" not in capsys.readouterr().out
