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
        ({"teacher/scored_over_needed": 1.5}, "does not use"),
        ({"sampling/sampling_logp_difference/mean": 0.2}, "disagree"),
    ],
)
def test_the_doctor_warns_in_words(logs, message):
    (warning,) = doctor.diagnose(logs, first_length=100.0)
    assert message in warning
    assert doctor.diagnose(dict.fromkeys(logs), first_length=100.0) == []


def test_a_resumed_run_remembers_its_first_length(capsys):
    before = [{"loss": 0.1}, {"eval_completions/mean_length": 9.0}, {"completions/mean_length": 400.0}]
    now = {"route/sdpo": 0.5, "completions/mean_length": 50.0}
    state = SimpleNamespace(is_world_process_zero=True, global_step=300, log_history=[*before, now])
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "five times shorter than at the start" in capsys.readouterr().out
    state.log_history = [{"completions/mean_length": 60.0}, now]
    doctor.DoctorCallback(every=20).on_log(None, state, None, now)
    assert "shorter" not in capsys.readouterr().out
