"""The figures that show a silent failure of a phase: form, rewards, lengths, memory; now and then, and in words."""

from collections.abc import Mapping

from transformers import TrainerCallback

FIGURES = (
    ("reward", "reward {:.3f}"),
    ("reward_std", "spread {:.2f}"),
    ("frac_reward_zero_std", "groups without spread {:.0%}"),
    ("challenger/valid", "valid {:.0%}"),
    ("challenger/consistency", "self-consistency {:.2f}"),
    ("challenger/uncertainty", "uncertainty {:.2f}"),
    ("challenger/repetition", "P_rep {:.3f}"),
    ("challenger/clusters", "clusters {:.0f}"),
    ("challenger/largest_cluster", "largest cluster {:.0%}"),
    ("challenger/median_cosine", "median cosine {:.2f}"),
    ("challenger/memory", "P_MAP {:.3f}"),
    ("challenger/bank", "questions in memory {:.0f}"),
    ("challenger/encoded", "with a program {:.0%}"),
    ("challenger/unanswered", "unanswered {:.0%}"),
    ("challenger/late", "compared too late {:.0%}"),
    ("entropy", "entropy {:.3f}"),
    ("completions/mean_length", "length {:.0f}"),
    ("completions/clipped_ratio", "truncated {:.0%}"),
    ("sampling/logps_gap", "trainer/engine logps gap {:.2g}"),
)
LARGE_CLUSTER = 0.9  # share of the questions; above it P_rep is the same for nearly all of them
LARGE_GAP = 0.1  # nats a token between trainer and rollout engine; rounding to bfloat16 makes about 0.01


def diagnose(logs: Mapping[str, float]) -> list[str]:
    """Warnings in words for logged metrics of either phase; empty when all looks well."""
    unrewarded = "reward" in logs and logs["reward"] is None  # TRL's mean of nothing
    logs = {name: value for name, value in logs.items() if value is not None}
    checks = (
        (
            unrewarded,
            "no rollout has a reward, so nothing is learned: every reward function gave None; check the column that "
            "it compares with, or the engines that it asks",
        ),
        (
            logs.get("challenger/valid", 1.0) < 0.5,
            "fewer than half of the Challenger's outputs have the asked form: check challenger_system, "
            "challenger_user and the chat template, or raise max_completion_length",
        ),
        (
            logs.get("challenger/consistency", 1.0) < 0.1,
            "the Solver's answers hardly ever agree: check that they end in a box, and answer_tokens",
        ),
        (
            logs.get("challenger/unanswered", 0.0) > 0.1,
            "an engine, the Solver's or the coder's, failed on more than a tenth of the questions: look at its log",
        ),
        (
            logs.get("challenger/encoded", 1.0) < 0.5,
            "fewer than half of the valid questions became a program: check coder and coder_chat",
        ),
        (
            logs.get("challenger/largest_cluster", 0.0) > LARGE_CLUSTER,
            "more than 90 % of the questions are one cluster, so P_rep is nearly the same for each and gives no "
            "gradient: if challenger/median_cosine is above 0.5, take another encoder or a lower distance_threshold; "
            "else the Challenger repeats itself",
        ),
        (
            logs.get("challenger/late", 0.0) > 0.1,
            "for more than a tenth of the questions the time ended before all answers were compared, and the rest "
            "counts as different: give the run more of the machine's cores, or the Solver's answers are hard formulas",
        ),
        (
            logs.get("frac_reward_zero_std", 0.0) > 0.8,
            "more than 80 % of the groups have equal rewards and no gradient",
        ),
        (
            logs.get("completions/clipped_ratio", 0.0) > 0.5,
            "most rollouts are truncated: raise max_completion_length or check the prompt template",
        ),
        (logs.get("entropy", 1.0) < 0.01, "the policy's entropy has collapsed: lower learning_rate"),
        (
            logs.get("sampling/logps_gap", 0.0) > LARGE_GAP,
            "trainer and rollout engine disagree on the rollouts' log-probabilities: check the weight sync and, on a "
            "vLLM server, --logprobs-mode processed_logprobs",
        ),
    )
    return [message for failed, message in checks if failed]


class DoctorCallback(TrainerCallback):
    """Prints the doctor line at the first log and then about every `every` steps; a warning in words as soon as it is
    due, once a line."""

    def __init__(self, every: int):
        self.every, self.next_step = every, 0
        self.said: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        if state.global_step >= self.next_step:
            self.next_step, self.said = state.global_step + self.every, set()
            figures = [text.format(logs[name]) for name, text in FIGURES if logs.get(name) is not None]
            print(f"[doctor] step {state.global_step}: " + "; ".join(figures), flush=True)
        for message in diagnose(logs):
            if message not in self.said:
                print(f"[doctor] WARNING: {message} (step {state.global_step})", flush=True)
                self.said.add(message)
