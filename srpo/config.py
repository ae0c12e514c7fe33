"""One dataclass on top of TRL's: the fields of SRPO, and TRL's defaults moved to the paper's (arXiv 2604.02288)."""

import json
import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from .objective import ROUTINGS, TEMPLATE, check_template

TEACHERS = ("ema", "frozen", "current")
# Learning rate of each method (Table 3); the masked variants and Advantage Mix are run with SDPO's or SRPO's
LEARNING_RATES = {"srpo": 5e-6, "grpo": 1e-6, "sdpo": 1e-5, "sdpo_incorrect": 1e-5, "sdpo_correct": 1e-5, "mix": 5e-6}
# Share alpha of the teacher's term in the generalised Jensen-Shannon divergence
ALPHAS = {"jsd": 0.5, "reverse_kl": 1.0, "forward_kl": 0.0}


def check_init_kwargs(config) -> None:
    """Raises `ValueError` for the old name of `dtype`: TRL would load the model in its own default beside it."""
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if "torch_dtype" in (getattr(config, name, None) or {}):
            raise ValueError(f"{name} has torch_dtype, which would be ignored: write dtype")


def in_our_fields(config, error: ValueError) -> ValueError:
    """TRL's error about a generation batch that holds no whole groups with the fields it is made of; others as they
    are."""
    if "divisible by num_generations" not in str(error):
        return error
    rollouts, steps, groups_of = config.generation_batch_size, config.steps_per_generation, config.num_generations
    whole = groups_of // math.gcd(rollouts // steps, groups_of)
    return ValueError(
        f"per_device_train_batch_size * processes * steps_per_generation = {rollouts} rollouts of a generation batch "
        f"do not divide into groups of num_generations={groups_of}: set steps_per_generation (now {steps}), or "
        f"gradient_accumulation_steps, of which it is made if it is not given, to a multiple of {whole}"
    )


@dataclass
class SRPOConfig(GRPOConfig):
    r"""
    Configuration of [`SRPOTrainer`].

    Every other field is TRL's. Defaults are the paper's for Qwen3-8B (Table 3): 32 prompts times 8 rollouts an update,
    which is `per_device_train_batch_size * gradient_accumulation_steps * processes = 256`.

    Parameters:
        > Parameters that control routing

        routing (`str`, *optional*, defaults to `"srpo"`):
            `"srpo"` is the method; `"grpo"` is TRL's `GRPOTrainer`; `"sdpo"` distils every rollout that has a correct
            sibling; `"sdpo_incorrect"` and `"sdpo_correct"` only the failed or the correct ones of these (Fig. 1b);
            `"mix"` is Advantage Mix (Table 2), a weighted sum of both losses without routing.
        reward_threshold (`float`, *optional*, defaults to `0.5`):
            A rollout is correct when the weighted sum of its rewards reaches this. With a format or length reward
            beside the accuracy set it (or `reward_weights`) so that only correct answers do.
        mix_weight (`float`, *optional*, defaults to `0.9`):
            lambda, share of the GRPO loss in Advantage Mix.
        demonstration (`str`, *optional*, defaults to `"first"`):
            Which correct sibling the self-teacher sees: the `"first"`, or a `"random"` one.

        > Parameters that control the self-teacher

        teacher (`str`, *optional*, defaults to `"ema"`):
            `"ema"` is the float32 average of the policy; `"frozen"` its start; `"current"` the policy itself.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Rate of the average, once after each optimizer step.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Keep the self-teacher in host memory while it does not score; for one process or ZeRO-2.
        reprompt_template (`str`, *optional*, defaults to `"{prompt}\nCorrect solution:\n\n{demonstration}\n\nCorrectly solve the original question."`):
            The teacher's user message, with `{prompt}` and `{demonstration}`; the string of the SDPO release's runs.
        max_reprompt_length (`int`, *optional*, defaults to `10240`):
            Longest teacher prompt in tokens; the end of the demonstration is left out where it is longer.

        > Parameters that control the distillation loss

        entropy_beta (`float`, *optional*):
            beta of the entropy weights exp(-beta H) (Section 3.2). By default 1.0 for `routing="srpo"` and 0.0, no
            weights, for the baselines, which have none.
        divergence (`str`, *optional*, defaults to `"jsd"`):
            `"jsd"` with equal shares; `"reverse_kl"` is KL(student || teacher), `"forward_kl"` KL(teacher || student).
        distillation_topk (`int`, *optional*, defaults to `100`):
            Support of the divergence, the student's most likely tokens. `None` takes the whole vocabulary.
        tail (`bool`, *optional*, defaults to `True`):
            One more category for the mass outside the support; without it the support is renormalised.

        > Parameters that control the GRPO loss

        advantage_scale (`bool`, *optional*, defaults to `False`):
            Divide advantages by the standard deviation of their group, as in the paper's displayed equation. Its text
            and configuration do not. TRL adds 1e-4 to the deviation, the SDPO release 1e-6.

        > Parameters that control prompts and logs

        max_prompt_length (`int`, *optional*, defaults to `2048`):
            A longer prompt is an error: prompts are never cut. `srpo.train` leaves such rows out before it starts.
        doctor_steps (`int`, *optional*, defaults to `50`):
            Print the line of health figures at the first log and about every so many steps. `0` turns it off.
    """  # noqa: E501

    routing: str = field(
        default="srpo", metadata={"help": "Loss of each rollout: srpo, or a baseline.", "choices": list(ROUTINGS)}
    )
    reward_threshold: float = field(default=0.5, metadata={"help": "A rollout is correct from this reward on."})
    mix_weight: float = field(default=0.9, metadata={"help": "lambda, share of GRPO in Advantage Mix."})
    demonstration: str = field(
        default="first", metadata={"help": "Which correct sibling is shown.", "choices": ["first", "random"]}
    )
    teacher: str = field(default="ema", metadata={"help": "Self-teacher.", "choices": list(TEACHERS)})
    teacher_update_rate: float = field(default=0.05, metadata={"help": "Rate of the teacher's average."})
    teacher_offload: bool = field(default=False, metadata={"help": "Self-teacher in host memory between its passes."})
    reprompt_template: str = field(default=TEMPLATE, metadata={"help": "The teacher's user message."})
    max_reprompt_length: int = field(default=10240, metadata={"help": "Longest teacher prompt in tokens."})
    entropy_beta: float | None = field(default=None, metadata={"help": "beta; 1.0 for srpo, 0.0 for the others."})
    divergence: str = field(
        default="jsd",
        metadata={"help": "Divergence of the distillation loss.", "choices": list(ALPHAS)},
    )
    distillation_topk: int | None = field(
        default=100, metadata={"help": "The student's likeliest tokens, over which the divergence is."}
    )
    tail: bool = field(default=True, metadata={"help": "Keep the mass outside the support."})
    advantage_scale: bool = field(default=False, metadata={"help": "Divide advantages by their group's deviation."})
    max_prompt_length: int = field(default=2048, metadata={"help": "A longer prompt is an error."})
    doctor_steps: int = field(default=50, metadata={"help": "Steps between health lines; 0 = off."})

    # TRL's and transformers' fields whose default is moved to, or pinned at, the paper's value
    learning_rate: float | None = field(
        default=None, metadata={"help": "By default the paper's for the routing: srpo 5e-6, grpo 1e-6, sdpo 1e-5."}
    )
    num_generations: int | None = field(default=8, metadata={"help": "G, rollouts of one prompt."})
    max_completion_length: int | None = field(default=8192, metadata={"help": "Longest rollout in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of both distributions."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range."})
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to a reference (paper: 0)."})
    scale_rewards: str = field(default="none", metadata={"help": "Set by advantage_scale; none = no division."})
    loss_type: str = field(default="dapo", metadata={"help": "Mean over all tokens of the batch."})
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata={"help": "Per token, truncated."})
    vllm_importance_sampling_clip_max: float = field(default=2.0, metadata={"help": "Rollout importance clip."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=10, metadata={"help": "Warm-up, in steps or as a share below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    def __post_init__(self):
        if self.advantage_scale:
            if self.scale_rewards == "batch":
                raise ValueError(
                    "advantage_scale=True divides by group and scale_rewards='batch' by batch: leave out one"
                )
            self.scale_rewards = "group"
        if self.routing in LEARNING_RATES and self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.routing]
        if self.entropy_beta is None:
            self.entropy_beta = 1.0 if self.routing == "srpo" else 0.0
        self._check_fields()
        try:
            super().__post_init__()  # which reads a dict given as JSON
        except ValueError as error:
            raise in_our_fields(self, error) from error
        check_init_kwargs(self)
        self.chat_template_kwargs = {"enable_thinking": False, **(self.chat_template_kwargs or {})}
        check_template(self.reprompt_template)
        if self.routing != "grpo":
            self._check_loss()

    def _check_fields(self) -> None:
        def one_of(names):
            return lambda value: value in names, f"must be one of {', '.join(names)}"

        at_least_1 = (lambda value: value >= 1 and value % 1 == 0, "must be at least 1, and whole")
        at_least_0 = (lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
        positive = (lambda value: 0 < value < math.inf, "must be above 0 and finite")
        decay = (lambda value: 0 <= value < 1, "must be in [0, 1)")
        for name, (valid, rule) in {
            "routing": one_of(ROUTINGS),
            "teacher": one_of(TEACHERS),
            "demonstration": one_of(("first", "random")),
            "divergence": one_of(ALPHAS),
            "mix_weight": (lambda value: 0 <= value <= 1, "must be in [0, 1]"),
            "reprompt_template": (lambda value: isinstance(value, str), "must be a text"),
            "teacher_update_rate": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
            "entropy_beta": at_least_0,
            "reward_threshold": (math.isfinite, "must be finite"),
            "num_generations": (
                lambda value: value >= 2 and value % 1 == 0,
                "must be at least 2, and whole: a group needs siblings",
            ),
            "max_prompt_length": at_least_1,
            "max_reprompt_length": at_least_1,
            "per_device_train_batch_size": at_least_1,
            "auto_find_batch_size": (
                lambda value: not value,
                "must be false: the smaller batches that it makes repeat some prompts and leave out others",
            ),
            "gradient_accumulation_steps": at_least_1,
            "max_completion_length": at_least_1,
            "distillation_topk": (lambda value: value is None or at_least_1[0](value), f"{at_least_1[1]}, or none"),
            **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "doctor_steps"), at_least_0),
            **dict.fromkeys(("temperature", "num_train_epochs"), positive),
            **dict.fromkeys(("adam_beta1", "adam_beta2"), decay),
            "top_p": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
            "chat_template_kwargs": (
                lambda value: isinstance(json.loads(value) if isinstance(value, str) else value, dict | None),
                """must be a mapping such as '{"enable_thinking": false}'""",
            ),
            "epsilon": at_least_0,
            "epsilon_high": (lambda value: value is None or value >= 0, "must be at least 0, or none for epsilon"),
            "delta": (lambda value: value is None or value > 1, "must be above 1, or none"),
            "vllm_importance_sampling_clip_max": (
                lambda value: value is None or value > 0,
                "must be above 0, or none",
            ),
        }.items():
            value = getattr(self, name)
            try:
                is_valid = valid(value)
            except (TypeError, ValueError):  # none, or a text
                is_valid = False
            if not is_valid:
                raise ValueError(f"{name} {rule}, got {value!r}")

    def _check_loss(self) -> None:
        """What routing cannot be combined with."""
        for name, needed in (
            ("loss_type", "dapo"),
            ("beta", 0.0),
            ("num_iterations", 1),
            ("importance_sampling_level", "token"),
            ("top_entropy_quantile", 1.0),
            ("off_policy_mask_threshold", None),
            ("entropy_coef", 0.0),
            ("use_adaptive_entropy", False),
            ("cast_lm_head_to_fp32", False),
            ("multi_objective_aggregation", "sum_then_normalize"),  # the other divides by deviations in any case
        ):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name} must be {needed!r} with routing={self.routing!r}, got {getattr(self, name)!r}; other "
                    "values need routing='grpo'"
                )
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must equal gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} with routing={self.routing!r}: the method takes one optimizer "
                "step a generation batch"
            )
