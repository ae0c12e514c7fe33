"""One dataclass on top of TRL's: the fields of VA-OPD, and TRL's defaults moved to the paper's (arXiv 2605.21924)."""

import json
import math
from dataclasses import dataclass, field

from trl import DistillationConfig

from .objective import WEIGHTINGS

TEACHER_MODES = ("exact", "sampled_token", "teacher_topk")


def check_init_kwargs(config) -> None:
    """Raises `ValueError` for the old name of `dtype`: TRL would load the model in its own default beside it."""
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if "torch_dtype" in (getattr(config, name, None) or {}):
            raise ValueError(f"{name} has torch_dtype, which would be ignored: write dtype")


@dataclass
class VAOPDConfig(DistillationConfig):
    r"""
    Configuration of [`VAOPDTrainer`].

    Every other field is TRL's. The default of each field is the paper's value for 8B -> 2B on Geometry3K: 16 prompts
    times 4 rollouts an update, which is `per_device_train_batch_size * gradient_accumulation_steps * processes = 64`.

    Parameters:
        > Parameters that control the objective

        weighting (`str`, *optional*, defaults to `"va"`):
            `"va"` is VA-OPD; `"rollout"` and `"token"` keep only rollout weights or only token groups (Fig. 4a);
            `"none"` is Standard OPD, which also scores and logs VA but does not use it.
        measure_va (`bool`, *optional*, defaults to `True`):
            `False`, for `weighting="none"` only, leaves out what Standard OPD does not need: the teacher's pass over
            the degraded images, its log-probabilities, and the figures of VA in the logs.
        num_generations (`int`, *optional*, defaults to `4`):
            K, rollouts of one prompt (Eq. 3).
        degradation_ratio (`float`, *optional*, defaults to `0.1`):
            Side of the pixelated view as a share of the image's side (Section 3.1).
        pixelate_at (`str`, *optional*, defaults to `"model"`):
            `"model"` brings the image to the size at which the model sees it and pixelates there; `"raw"` pixelates
            the image as it comes to the trainer (in `va_opd.train` within the image budget), which leaves fewer cells
            when the processor enlarges images. Where the processor cuts an image into tiles, crops or pads it,
            `"model"` is `"raw"`.
        weight_temperature (`float`, *optional*, defaults to `1.0`):
            tau, temperature of the softmax over siblings (Eq. 4).
        va_eps (`float`, *optional*, defaults to `1e-6`):
            epsilon beside the standard deviation (Eq. 3).
        top_fraction (`float`, *optional*, defaults to `0.2`):
            p_v, share of a rollout's tokens in the high-VA group (Eq. 5).
        high_weight (`float`, *optional*, defaults to `0.5`):
            lambda, share of a rollout's weight that the high-VA group carries (Eq. 5).
        random_ties (`bool`, *optional*, defaults to `False`):
            Draw tokens of equal VA at random instead of in token order. Not in the paper.
        va_floor (`float`, *optional*):
            Rollouts with a mean VA below this have their tokens weighted alike. Off by default, as in the paper.
        kl_temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature of both models in the KL (TRL uses `temperature` for sampling and loss).
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Keep the teacher in host memory, but for its output head, and on the device only while it scores a
            generation batch: one transfer for both views. Each process has a copy of its own.

        > Parameters of a served teacher

        teacher_server (`str`, *optional*):
            Address of a `vllm serve` of the teacher, such as `"http://node:8000"`. It gives log-probabilities of a few
            tokens only, so `teacher_mode` must name an approximation of the reverse KL.
        teacher_mode (`str`, *optional*, defaults to `"exact"`):
            `"exact"` is the paper's full-vocabulary KL from a teacher in the trainer's process. With `teacher_server`:
            `"sampled_token"` is the policy gradient of the KL from the sampled tokens alone
            ([`objective.sampled_token_kl`]), `"teacher_topk"` a lower bound of the KL over the teacher's likeliest
            tokens, the sampled token and the rest as one ([`objective.partition_kl`]).
        teacher_top_k (`int`, *optional*, defaults to `20`):
            Tokens of the teacher in `"teacher_topk"`. More than 20 need `vllm serve --max-logprobs`.
        teacher_server_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that a request may wait for the server before it is sent again.
        teacher_parity_limit (`float`, *optional*, defaults to `0.05`):
            With a local `teacher_model` beside the server, both score a prompt's rollouts before the first update.
            Training ends if they differ by more than this many nats a token on average. Rounding to bfloat16 makes
            about 0.01; another prompt, image or revision tenths and more.

        > Parameters that control prompts and logs

        max_prompt_length (`int`, *optional*, defaults to `8192`):
            A longer prompt is an error: cutting it would cut image tokens. It may be raised in a run that has begun.
        doctor_steps (`int`, *optional*, defaults to `50`):
            Print the line of health figures at the first log and about every so many steps. `0` turns it off.
    """

    weighting: str = field(
        default="va", metadata={"help": "Weights of rollouts and tokens.", "choices": list(WEIGHTINGS)}
    )
    measure_va: bool = field(
        default=True, metadata={"help": "False leaves VA out, which Standard OPD logs but does not use."}
    )
    num_generations: int = field(default=4, metadata={"help": "K, rollouts of one prompt."})
    degradation_ratio: float = field(
        default=0.1, metadata={"help": "Side of the pixelated view as a share of the image's."}
    )
    pixelate_at: str = field(
        default="model", metadata={"help": "Size at which images are pixelated.", "choices": ["model", "raw"]}
    )
    weight_temperature: float = field(
        default=1.0, metadata={"help": "tau, temperature of the softmax over sibling rollouts."}
    )
    va_eps: float = field(default=1e-6, metadata={"help": "epsilon, added to the standard deviation of mean VA."})
    top_fraction: float = field(default=0.2, metadata={"help": "p_v, share of tokens in the high-VA group."})
    high_weight: float = field(default=0.5, metadata={"help": "lambda, weight share of the high-VA group."})
    random_ties: bool = field(
        default=False, metadata={"help": "Rank tokens of equal VA at random, not in token order."}
    )
    va_floor: float | None = field(
        default=None, metadata={"help": "Rollouts whose mean VA is lower have their tokens weighted alike."}
    )
    kl_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of both models in the KL."})
    teacher_offload: bool = field(
        default=False, metadata={"help": "Keep the teacher in host memory between its passes."}
    )
    teacher_server: str | None = field(default=None, metadata={"help": "Address of a vLLM server of the teacher."})
    teacher_mode: str = field(
        default="exact", metadata={"help": "How the KL to the teacher is computed.", "choices": list(TEACHER_MODES)}
    )
    teacher_top_k: int = field(
        default=20, metadata={"help": "Likeliest tokens of the teacher that teacher_topk uses."}
    )
    teacher_server_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that a request may wait for the teacher server."}
    )
    teacher_parity_limit: float = field(default=0.05, metadata={"help": "Largest mean gap of served logps, in nats."})
    max_prompt_length: int = field(
        default=8192, metadata={"help": "Longest prompt in tokens; a longer one is an error."}
    )
    doctor_steps: int = field(
        default=50, metadata={"help": "Steps between two doctor lines, the figures of health; 0 = off."}
    )

    # TRL's and transformers' fields whose default is moved to, or pinned at, the paper's value
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature of the rollouts."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling of the rollouts."})
    max_completion_length: int | None = field(default=4096, metadata={"help": "Longest rollout in tokens."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the prompts."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up, in steps or as a share below 1."})

    def __post_init__(self):
        self._check_fields()
        super().__post_init__()
        check_init_kwargs(self)
        if self.num_generations == 1 and self.weighting in ("va", "rollout"):
            raise ValueError(
                f"num_generations=1 leaves rollout weights without siblings to compare: set num_generations to 2 or "
                f"more, or weighting to 'token' or 'none' (got weighting={self.weighting!r})"
            )
        if not self.measure_va and self.weighting != "none":
            raise ValueError(
                f"measure_va=False leaves no VA for weighting={self.weighting!r}: set weighting to 'none', or "
                "measure_va to True"
            )
        self._check_teacher()

    def prompts_of_a_step(self, processes: int) -> int:
        """Groups of siblings in an optimizer step. Raises `ValueError` unless they are whole."""
        rows, micro_batches = self.per_device_train_batch_size, self.gradient_accumulation_steps
        rollouts = rows * processes * micro_batches
        if rollouts % self.num_generations:
            whole = self.num_generations // math.gcd(rows * processes, self.num_generations)
            raise ValueError(
                f"per_device_train_batch_size * processes * gradient_accumulation_steps = {rows} * {processes} * "
                f"{micro_batches} = {rollouts} rollouts do not divide into groups of "
                f"num_generations={self.num_generations}: set gradient_accumulation_steps to a multiple of {whole}"
            )
        return rollouts // self.num_generations

    def _check_fields(self) -> None:
        def one_of(names):
            return lambda value: value in names, f"must be one of {', '.join(names)}"

        positive = (lambda value: 0 < value < math.inf, "must be above 0 and finite")
        share = (lambda value: 0 < value <= 1, "must be in (0, 1]")
        at_least_1 = (lambda value: value >= 1 and value % 1 == 0, "must be at least 1, and whole")
        at_least_0 = (lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
        decay = (lambda value: 0 <= value < 1, "must be in [0, 1)")
        for name, (valid, rule) in {
            "weighting": one_of(WEIGHTINGS),
            "pixelate_at": one_of(("model", "raw")),
            "num_generations": at_least_1,
            "degradation_ratio": share,
            "weight_temperature": positive,
            "va_eps": positive,
            "top_fraction": share,
            "high_weight": (lambda value: 0 <= value <= 1, "must be in [0, 1]"),
            "va_floor": (lambda value: value is None or math.isfinite(value), "must be finite, or none"),
            "kl_temperature": positive,
            "teacher_mode": one_of(TEACHER_MODES),
            "teacher_top_k": at_least_1,
            "teacher_server_timeout": positive,
            "teacher_parity_limit": positive,
            "max_prompt_length": at_least_1,
            "per_device_train_batch_size": at_least_1,
            "auto_find_batch_size": (
                lambda value: not value,
                "must be false: the smaller batches that it makes repeat some prompts and leave out others",
            ),
            "gradient_accumulation_steps": at_least_1,
            "max_completion_length": at_least_1,
            "num_train_epochs": positive,
            **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "doctor_steps"), at_least_0),
            **dict.fromkeys(("adam_beta1", "adam_beta2"), decay),
            "temperature": positive,
            "chat_template_kwargs": (
                lambda value: isinstance(json.loads(value) if isinstance(value, str) else value, dict | None),
                """must be a mapping such as '{"enable_thinking": false}'""",
            ),
            "top_p": share,
            "beta": (lambda value: value == 1.0, "must be 1.0: the paper's divergence is the reverse KL"),
        }.items():
            value = getattr(self, name)
            try:
                is_valid = valid(value)
            except (TypeError, ValueError):  # none, or a text
                is_valid = False
            if not is_valid:
                raise ValueError(f"{name} {rule}, got {value!r}")

    def _check_teacher(self) -> None:
        if not self.teacher_server:
            if self.teacher_mode != "exact":
                raise ValueError(
                    f"teacher_mode={self.teacher_mode!r} needs teacher_server, the address of a vLLM server of the "
                    "teacher; with a local teacher use 'exact'"
                )
            return
        if self.teacher_mode == "exact":
            raise ValueError(
                "teacher_mode='exact' needs the teacher in the trainer's process, because a server gives "
                "log-probabilities of a few tokens only: set teacher_mode to 'sampled_token' or 'teacher_topk', which "
                f"are approximations, or leave teacher_server out (got {self.teacher_server!r})"
            )
        if not self.teacher_server.startswith(("http://", "https://")):
            raise ValueError(f"teacher_server must start with http:// or https://, got {self.teacher_server!r}")
        if self.teacher_offload:
            raise ValueError(
                "teacher_offload=True has nothing to do with teacher_server: a teacher in this process is only "
                "compared with the server once, and then moves to host memory for good; leave teacher_offload out"
            )
        if self.kl_temperature != 1.0:
            raise ValueError(
                f"kl_temperature must be 1.0 with teacher_server, whose log-probabilities are at temperature 1; got "
                f"{self.kl_temperature}"
            )
