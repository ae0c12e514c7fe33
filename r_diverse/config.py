"""Settings of a self-play run, and of its two phases on top of TRL's, with the values of R-Diverse (arXiv 2602.13103)
and, where it is silent, of R-Zero (arXiv 2508.05004) and its release."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .engines import CODER
from .objective import lowest_valid_reward
from .questions import CHALLENGER_SYSTEM, CHALLENGER_USER, SOLVER_SYSTEM
from .skills import ENCODER

PENALTIES = ("r_diverse", "r_zero", "none")
MEASURES = ("sam", "question", "program_text", "question_text")
ALARMS = ("off", "warn", "stop")
# TRL's; it checks the name only at the first loss, after the rollouts and rewards of a whole generation batch
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
UPDATES = 4  # optimizer steps on one generation batch: 512 prompts in four batches of 128
MATH = "math500,gsm8k,minerva_math,olympiadbench,amc23,aime24,aime25"


def _one_of(names: tuple[str | bool, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"must be one of {', '.join(map(str, names))}"


_COUNT = (lambda value: value >= 1 and value == int(value), "must be at least 1, and whole")
_GROUP = (lambda value: value >= 2 and value == int(value), "must be at least 2: one answer always agrees with itself")
_WHOLE = (lambda value: value >= 0 and value == int(value), "must be at least 0, and whole")
_AMOUNT = (lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
_SHARE = (lambda value: 0 < value <= 1, "must be in (0, 1]")
_FRACTION = (lambda value: 0 <= value <= 1, "must be in [0, 1]")
_SWITCH = (lambda value: isinstance(value, bool), "must be true or false")
_TEXT = (lambda value: isinstance(value, str), "must be a text")


def _check(config: Any, rules: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raises `ValueError` for the first field that breaks its rule."""
    for name, (valid, rule) in rules.items():
        value = getattr(config, name)
        try:
            is_valid = valid(value)
        except (TypeError, ValueError, OverflowError):  # None, a text or infinity
            is_valid = False
        if not is_valid:
            raise ValueError(f"{name} {rule}, got {value!r}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping from one, from its JSON text (a flag) or from None (empty). Raises `ValueError` for anything else."""
    given = {} if value is None else value
    if isinstance(given, str):
        with contextlib.suppress(ValueError):  # text that is no JSON is refused below
            given = json.loads(given)
    if not isinstance(given, dict):
        raise ValueError(f"""{name} must be a mapping such as '{{"enable_thinking": false}}', got {value!r}""")
    return given


def _or_none(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or none"


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
class PhaseConfig(GRPOConfig):
    """TRL's configuration with the values that both phases share. The KL reference is the model at the phase's start.

    By default a generation batch serves four optimizer steps. An optimizer step has
    `per_device_train_batch_size * gradient_accumulation_steps * processes` rollouts (512 for the Challenger and 640
    for the Solver in the papers), a generation batch four times as many. `save_steps` counts optimizer steps and must
    be a multiple of four, because a resumed phase begins with a new generation batch.
    """

    beta: float = field(default=0.01, metadata={"help": "Weight of the KL term (k3)."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=0.3, metadata={"help": "Upper clip range."})
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip."})
    loss_type: str = field(default="grpo", metadata={"help": "Mean over the tokens of a rollout, then over rollouts."})
    scale_rewards: str = field(default="group", metadata={"help": "Advantages over their group's deviation."})
    temperature: float = field(default=1.0, metadata={"help": "Of the rollouts."})
    top_p: float = field(default=0.99, metadata={"help": "Of the rollouts."})
    max_completion_length: int | None = field(default=4096, metadata={"help": "Longest rollout in tokens."})
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "None in R-Zero; it is biased where top_p is below 1."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "No warm-up and no decay."})
    warmup_steps: float = field(default=0, metadata={"help": "Warm-up steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    save_steps: float = field(default=UPDATES, metadata={"help": "Optimizer steps between two checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    ddp_timeout: int = field(
        default=7200, metadata={"help": "Seconds that processes wait while the first one measures the rewards."}
    )
    doctor_steps: int = field(default=20, metadata={"help": "Steps between health lines; 0 = off."})

    def __post_init__(self):
        _check(
            self,
            {
                "per_device_train_batch_size": _COUNT,
                "gradient_accumulation_steps": _COUNT,
                "num_iterations": _COUNT,
                "max_steps": (lambda value: value >= 1, "must be at least 1: a phase has a fixed length"),
                "max_completion_length": _COUNT,
                **dict.fromkeys(("steps_per_generation", "generation_batch_size"), _or_none(_COUNT)),
                "num_generations": (_GROUP[0], "must be at least 2, and whole: a group needs siblings"),
                "auto_find_batch_size": (
                    lambda value: not value,
                    "must be false: the smaller batches that it makes repeat some prompts and leave out others",
                ),
                "temperature": (lambda value: 0 < value < math.inf, "must be above 0 and finite"),
                "top_p": _SHARE,
                "delta": (lambda value: value is None or value > 1, "must be above 1, or none"),
                **dict.fromkeys(("learning_rate", "save_steps", "beta", "epsilon"), _AMOUNT),
                "epsilon_high": _or_none(_AMOUNT),
                "loss_type": _one_of(LOSSES),
                "scale_rewards": _one_of(("group", "batch", "none", True, False)),
                "importance_sampling_level": _one_of(("token", "sequence")),
            },
        )
        if self.generation_batch_size is None and self.steps_per_generation is None:
            self.steps_per_generation = UPDATES * self.gradient_accumulation_steps
        try:
            super().__post_init__()
        except ValueError as error:
            raise in_our_fields(self, error) from error
        check_init_kwargs(self)
        context = self.vllm_max_model_length if self.use_vllm and self.vllm_mode == "colocate" else None
        if context is not None and context <= self.max_completion_length:
            raise ValueError(
                f"vllm_max_model_length={context} is for prompt and rollout together, and max_completion_length alone "
                f"is {self.max_completion_length}: raise the first, or lower the second"
            )
        micro_steps = self.steps_per_generation * self.num_iterations  # for which a generation batch is used
        if self.save_strategy == "steps" and self.save_steps * self.gradient_accumulation_steps % micro_steps:
            raise ValueError(
                f"save_steps={self.save_steps} must be a multiple of the "
                f"{micro_steps / self.gradient_accumulation_steps:g} optimizer steps that share a generation batch: a "
                "phase that resumes in between would draw other rollouts"
            )


@dataclass
class ChallengerConfig(PhaseConfig):
    """Phase A: 5 generation batches, each of 512 identical prompts x 4 rollouts once the batch fields say so."""

    num_generations: int | None = field(default=4, metadata={"help": "Rollouts whose rewards form a group."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rollouts of a micro-batch."})
    max_steps: int = field(default=5 * UPDATES, metadata={"help": "Optimizer steps of a phase."})


@dataclass
class SolverConfig(PhaseConfig):
    """Phase F: 15 generation batches, each of 512 questions x 5 rollouts once the batch fields say so."""

    num_generations: int | None = field(default=5, metadata={"help": "Rollouts of one question."})
    per_device_train_batch_size: int = field(default=5, metadata={"help": "Rollouts of a micro-batch."})
    max_steps: int = field(default=15 * UPDATES, metadata={"help": "Optimizer steps of a phase."})


@dataclass
class RDiverseConfig:
    r"""
    Settings of one self-play run. The settings of its phases are [`ChallengerConfig`] and [`SolverConfig`].

    Raises `ValueError`, which names the field, for a value that makes no sense.

    Parameters:
        > Parameters of the run

        model (`str`):
            Base model of both roles: hub id or local folder.
        experiment, out, seed:
            Runs are in `<out>/r_diverse/<experiment>/<variant>-seed<seed>`.
        iterations (`int`, *optional*, defaults to `5`):
            T, the number of iterations. May be raised later: a finished run then goes on.
        chat_template_kwargs (`dict`, *optional*, defaults to `{}`):
            Arguments of the base's chat template wherever it is applied: both phases, the reward, generation, labels,
            gate and evaluation. `{"enable_thinking": false}` for a model that thinks. A model without a template
            gets R-Zero's plain form, see [`~r_diverse.questions.PLAIN_TEMPLATE`].
        dry_run (`bool`, *optional*, defaults to `False`):
            Print settings, sizes, memory and commands, and run nothing.

        > Parameters of the Challenger's reward

        penalty (`str`, *optional*, defaults to `"r_diverse"`):
            `"r_diverse"` is Eq. 11; `"r_zero"` is R-Zero's reward and `"none"` is R_unc alone, both without memory and
            replay.
        measure (`str`, *optional*, defaults to `"sam"`):
            What both penalties compare. `"sam"` embeds the solver program, `"question"` the question itself (Table 2,
            without abstraction); `"program_text"` takes BLEU of programs (without embeddings), `"question_text"` BLEU
            of questions (without SAM).
        alpha, beta (`float`, *optional*, default to `1.0`):
            Weights of P_rep and P_MAP. `beta=0` is Table 2's "without similarity penalties".
        gamma, tau_max, tau_mean (`float`, *optional*, default to `0.5`, `0.5`, `0.25`):
            Weight and thresholds of P_MAP, see [`~r_diverse.objective.memory_penalty`].
        distance_threshold, bleu_threshold (`float`, *optional*, both default to `0.5`):
            1 - cosine, and 1 - BLEU, from which clusters stay apart. The second is R-Zero's, and the first too, since
            the paper discloses none; another encoder may need another one.
        m_reward (`int`, *optional*, defaults to `10`):
            m, the Solver's answers to each question while the Challenger trains.
        boxed_only (`bool`, *optional*, defaults to `True`):
            In rewards, labels and the gate only a boxed answer of the Solver counts, as in R-Zero. `False` also
            accepts "The answer is 5" and "#### 5". Benchmarks have rules of their own.

        > Parameters of the Solver's questions

        candidates (`int`, *optional*, defaults to `8000`):
            Outputs of the Challenger in a round.
        min_questions (`int`, *optional*, defaults to `512`):
            Usable questions an iteration needs, at least a generation batch. With fewer, another round follows.
        max_rounds (`int`, *optional*, defaults to `4`):
            Rounds after which a run that still has too few questions ends with an error message.
        m_label (`int`, *optional*, defaults to `10`):
            Answers of the Solver to each question; their majority is the label.
        low, high (`float`, *optional*, default to `0.3`, `0.8`):
            Questions with self-consistency in [low, high] are kept.
        r_zero_words (`bool`, *optional*, defaults to `True`):
            R-Zero's word rules, see [`~r_diverse.objective.drop_reason`].
        replay_fraction (`float`, *optional*):
            rho, share of past questions in the Solver's data. By default 0.3 with `penalty="r_diverse"`, else 0, since
            the baselines have no memory.

        > Parameters of generation

        question_temperature, question_top_p, question_tokens (*optional*, default to `1.0`, `0.95`, `4096`):
            Sampling and longest output in tokens of the frozen Challenger that writes the candidates. Its rollouts in
            training follow the phase's settings.
        answer_temperature, answer_top_p, answer_top_k, answer_tokens (*optional*):
            Sampling and longest answer (in tokens) of the Solver in the reward, for labels and in the gate: 1.0, 1.0,
            40 and 4,096 by default. `answer_top_k=0` is off.
        challenger_system, challenger_user, solver_system (`str`, *optional*):
            Messages of the prompts, see [`~r_diverse.questions`]; an empty system message is left out.

        > Parameters of skills (SAM)

        coder (`str`, *optional*, defaults to `"Qwen/Qwen2.5-Coder-7B-Instruct"`):
            Model that writes the solver programs: hub id or local folder. `"rules"` needs none, for arithmetic only.
        coder_chat (`bool`, *optional*, defaults to `True`):
            Prompt in the coder's chat template. `False` is completion, for base models such as the paper names.
        encoder (`str`, *optional*, defaults to `"jinaai/jina-code-embeddings-1.5b"`):
            Model that embeds them: hub id or local folder of sentence-transformers. `"minilm"` is the small model that
            comes as a package. The default, the paper's, forbids commercial use.

        > Parameters of evaluation

        benchmarks (`str`, *optional*, defaults to R-Zero's seven of maths):
            Comma-separated names, evaluated for the base and after each iteration; `"none"` evaluates nothing,
            `"arithmetic"` is the embedded test.
        data (`str`, *optional*):
            Folder of local copies of the benchmarks.
        eval_samples (`int`, *optional*, defaults to `4`):
            Samples for each question of the embedded test.
        eval_limit (`int`, *optional*):
            Only the first questions of each benchmark.

        > Parameters of the machine

        engine (`str`, *optional*, defaults to `"transformers"`):
            What generates everything but the phases' rollouts: `"transformers"` in this process, or `"vllm"` servers.
        engine_memory, reward_memory (`float`, *optional*, default to `0.85`, `0.3`):
            Share of a GPU's memory for a vLLM server that runs alone, and for each beside the Challenger's training.
        server_tensor_parallel (`int`, *optional*, defaults to `1`):
            GPUs that hold one replica of a served model together. Must divide the number of GPUs that serve.
        max_model_len (`int`, *optional*):
            Tokens of prompt and answer together for which the servers of Challenger and Solver make room. By default
            the model's own limit.
        engine_batch (`int`, *optional*, defaults to `64`):
            Prompts that transformers generates for at once.
        policy_dtype (`str`, *optional*, defaults to `"float32"`):
            Weights in training: `"float32"`, or `"bfloat16"`, which rounds away most updates at a rate of 1e-6.
        lora_rank (`int`, *optional*, defaults to `0`):
            Train a LoRA adapter of this rank and merge it at the end of the phase; 0 trains all weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            QLoRA: the frozen weights in 4 bits. Needs `lora_rank`.
        attn_implementation (`str`, *optional*):
            Attention of transformers in training, such as `"flash_attention_2"`.
        gpus (`int`, *optional*, defaults to `0`):
            Processes of the training phases; with `engine="vllm"` half of them train the Challenger and half serve.
            0 runs all in one process.
        sharding (`str`, *optional*, defaults to `"zero2"`):
            Name of one of TRL's accelerate configs, for several GPUs.

        > Parameters beyond the paper, off by default

        gate_samples (`int`, *optional*, defaults to `0`):
            Validity gate: answers of the base model, which no phase has trained, to each usable question. Their
            majority must be the label.
        alarm (`str`, *optional*, defaults to `"off"`):
            When an iteration collapses, by the next five limits, `"warn"` prints a line and `"stop"` ends the run.
        alarm_duplicates, alarm_cluster (`float`, *optional*, both default to `0.9`):
            A collapse is a larger share of the usable questions that repeat another of this or of an earlier iteration
            (cosine 0.9), or that lie in one skill cluster (`distance_threshold`).
        alarm_yield, alarm_labels, alarm_entropy (`float`, *optional*, default to `0.02`, `0.0`, `0.0`):
            A collapse is a smaller share of usable candidates or of right labels (known for arithmetic only), or a
            lower token entropy of the Challenger in nats.
    """

    model: str
    experiment: str = "qwen3_4b"
    out: str = "runs"
    seed: int = 0
    iterations: int = 5
    chat_template_kwargs: dict | str | None = None

    penalty: str = "r_diverse"
    measure: str = "sam"
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.5
    tau_max: float = 0.5
    tau_mean: float = 0.25
    distance_threshold: float = 0.5
    bleu_threshold: float = 0.5
    m_reward: int = 10
    boxed_only: bool = True

    candidates: int = 8000
    min_questions: int = 512
    max_rounds: int = 4
    m_label: int = 10
    low: float = 0.3
    high: float = 0.8
    r_zero_words: bool = True
    replay_fraction: float | None = None

    gate_samples: int = 0
    alarm: str = "off"
    alarm_duplicates: float = 0.9
    alarm_cluster: float = 0.9
    alarm_yield: float = 0.02
    alarm_labels: float = 0.0
    alarm_entropy: float = 0.0

    question_temperature: float = 1.0
    question_top_p: float = 0.95
    question_tokens: int = 4096
    answer_temperature: float = 1.0
    answer_top_p: float = 1.0
    answer_top_k: int = 40
    answer_tokens: int = 4096
    challenger_system: str = CHALLENGER_SYSTEM
    challenger_user: str = CHALLENGER_USER
    solver_system: str = SOLVER_SYSTEM

    coder: str = CODER
    coder_chat: bool = True
    encoder: str = ENCODER

    engine: str = "transformers"
    engine_memory: float = 0.85
    reward_memory: float = 0.3
    server_tensor_parallel: int = 1
    max_model_len: int | None = None
    engine_batch: int = 64
    policy_dtype: str = "float32"
    lora_rank: int = 0
    load_in_4bit: bool = False
    attn_implementation: str | None = None
    gpus: int = 0
    sharding: str = "zero2"
    benchmarks: str = MATH
    data: str | None = None
    eval_samples: int = 4
    eval_limit: int | None = None
    dry_run: bool = False

    def __post_init__(self):
        if self.replay_fraction is None:
            self.replay_fraction = 0.3 if self.penalty == "r_diverse" else 0.0
        self.chat_template_kwargs = _mapping("chat_template_kwargs", self.chat_template_kwargs)
        _check(
            self,
            {
                "model": (lambda value: isinstance(value, str) and value, "must name a model or its folder"),
                **dict.fromkeys(
                    ("challenger_system", "challenger_user", "solver_system", "coder", "encoder", "benchmarks"), _TEXT
                ),
                "penalty": _one_of(PENALTIES),
                "measure": _one_of(MEASURES),
                "alarm": _one_of(ALARMS),
                "engine": _one_of(("transformers", "vllm")),
                "policy_dtype": _one_of(("float32", "bfloat16")),
                **dict.fromkeys(("seed", "gpus", "gate_samples", "lora_rank"), _WHOLE),
                **dict.fromkeys(("iterations", "candidates", "min_questions", "max_rounds", "engine_batch"), _COUNT),
                **dict.fromkeys(
                    ("question_tokens", "answer_tokens", "eval_samples", "server_tensor_parallel"), _COUNT
                ),
                **dict.fromkeys(("max_model_len", "eval_limit"), _or_none(_COUNT)),
                **dict.fromkeys(("m_reward", "m_label"), _GROUP),
                **dict.fromkeys(("alpha", "beta"), (_AMOUNT[0], f"{_AMOUNT[1]}: it weighs a penalty")),
                **dict.fromkeys(("question_temperature", "answer_temperature"), _AMOUNT),
                **dict.fromkeys(("alarm_duplicates", "alarm_cluster", "alarm_yield", "alarm_labels"), _FRACTION),
                "alarm_entropy": _AMOUNT,
                **dict.fromkeys(("question_top_p", "answer_top_p", "engine_memory", "reward_memory"), _SHARE),
                "answer_top_k": (_WHOLE[0], "must be at least 0, which is off, and whole"),
                "high": (lambda value: value <= 1, "must be at most 1"),
                "low": (lambda value: 0 <= value <= self.high, f"must be in [0, high], with high={self.high!r}"),
                **dict.fromkeys(("boxed_only", "r_zero_words", "coder_chat", "load_in_4bit", "dry_run"), _SWITCH),
                "replay_fraction": (lambda value: 0 <= value < 1, "must be in [0, 1)"),
                "distance_threshold": (lambda value: 0 < value <= 2, "must be in (0, 2], the range of 1 - cosine"),
                "bleu_threshold": (_SHARE[0], f"{_SHARE[1]}, the range of 1 - BLEU"),
            },
        )
        if self.penalty != "r_diverse" and self.measure != "sam":
            raise ValueError(f"measure={self.measure!r} needs penalty='r_diverse', got penalty={self.penalty!r}")
        if self.penalty != "r_diverse" and self.replay_fraction:
            raise ValueError(
                f"replay_fraction={self.replay_fraction} needs penalty='r_diverse', got penalty={self.penalty!r}: the "
                "baselines remember nothing that could be replayed; set replay_fraction to 0"
            )
        self._check_servers()
        lowest_valid_reward(self.alpha, self.beta, self.gamma, self.tau_max, self.tau_mean)  # checks the last three

    @property
    def needs_skills(self) -> bool:
        """Whether the reward needs programs or vectors of questions, and not just their text."""
        return self.penalty == "r_diverse" and self.measure != "question_text"

    @property
    def needs_bank(self) -> bool:
        """Whether the reward compares with past questions."""
        return self.penalty == "r_diverse" and self.beta > 0

    @property
    def uses_coder_model(self) -> bool:
        """Whether a language model writes programs in some stage."""
        return self.coder != "rules" and self.measure != "question"

    @property
    def trainer_gpus(self) -> int:
        """GPUs that train the Challenger: all, or beside servers the first half, as in R-Zero; one GPU is shared."""
        return max(1, self.gpus // 2 if self.engine == "vllm" else self.gpus)

    def _check_servers(self) -> None:
        """Raises `ValueError` unless each stage with servers has whole replicas and a context that holds an answer."""
        longest = max(self.question_tokens, self.answer_tokens)
        if self.engine == "vllm" and self.max_model_len is not None and self.max_model_len <= longest:
            raise ValueError(
                f"max_model_len={self.max_model_len} is for prompt and answer together, and question_tokens or "
                f"answer_tokens alone is {longest}: raise it, or lower them"
            )
        beside = max(1, self.gpus - self.trainer_gpus)
        for number in (beside, max(1, self.gpus)):
            if self.engine == "vllm" and number % self.server_tensor_parallel:
                raise ValueError(
                    f"server_tensor_parallel={self.server_tensor_parallel} does not divide {number}, the GPUs that "
                    f"serve in one of the stages with gpus={self.gpus}: change one of the two"
                )
