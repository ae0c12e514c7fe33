"""What can be wrong with the parts of a run, each said in one sentence before it costs GPU hours."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.utils import logging
from trl import prepare_multimodal_messages

from .config import VAOPDConfig
from .degraded import check_depth
from .lm_head import lm_head
from .siblings import backbone, split_images

logger = logging.get_logger(__name__)

MOST_BIASES = 1024  # of a request to vLLM on a GPU
IMAGE_COLUMNS = ("images", "image")
SEARCH_SECONDS = 300  # for a row that cannot be read; the other ranks wait for at least 600


def check_inputs(args: VAOPDConfig, train_dataset, eval_dataset=None) -> None:
    """Raises `ValueError` for another configuration class, for data that cannot be read, and unless an optimizer step
    holds whole groups of siblings and the data set fills it."""
    if not isinstance(args, VAOPDConfig):
        raise ValueError(f"args must be a VAOPDConfig, got {type(args).__name__}; weighting='none' makes it plain OPD")
    is_map_style = hasattr(train_dataset, "__len__") and hasattr(train_dataset, "__getitem__")
    if isinstance(train_dataset, str | dict) or not (is_map_style or train_dataset is None):
        raise ValueError(
            "train_dataset must be a map-style Dataset or a list of rows, as each prompt is repeated num_generations "
            f"times, and one split of a DatasetDict; got {type(train_dataset).__name__}"
        )
    prompts = args.prompts_of_a_step(args.world_size)
    if isinstance(eval_dataset, Dataset | list) and len(eval_dataset):  # else the first evaluation would say so
        check_rows(eval_dataset, "eval_dataset")
    if train_dataset is None:  # only an evaluation
        return
    if len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts} of one optimizer step: add "
            "prompts, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    check_rows(train_dataset)
    check_image_columns(args, train_dataset)


def check_rows(dataset, name: str = "train_dataset") -> None:
    """Raises `ValueError` for data without `prompt`, and for a prompt that says nothing, or shows what is no image."""
    with naming_unread_rows(dataset, name):
        row = dataset[0]
    if "prompt" not in row:
        raise ValueError(f"{name} has the columns {', '.join(row)}: it needs `prompt`, messages")
    prompts = [row["prompt"]]
    if isinstance(dataset, list | tuple):
        prompts = [row.get("prompt") for row in dataset]
    elif "prompt" in getattr(dataset, "column_names", ()):  # stored, not made by a transform
        prompts = dataset.with_format(None)["prompt"]
    for i, prompt in enumerate(prompts):
        if not prompt or not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_said, prompt)))):
            raise ValueError(
                f"the prompt of row {i} of {name} is {prompt!r}: it needs messages with content and role, or a "
                "text; leave such rows out"
            )
        for kind in (str(part.get("type")) for part in _parts(prompt)):  # other texts are a matter of the template
            if kind != "image" and any(medium in kind for medium in ("image", "video", "audio")):
                raise ValueError(
                    f"the prompt of row {i} of {name} has a part of type {kind!r}, which TRL leaves out where "
                    "rollouts are scored: write {'type': 'image', 'image': ...}, or leave such rows out"
                )
    check_one_image_column(dataset if isinstance(dataset, list | tuple) else [row], name)
    if isinstance(dataset, Dataset):
        check_calls_of_tools(dataset, name)


def check_calls_of_tools(dataset: Dataset, name: str) -> None:
    """Raises `ValueError` where Arrow has put arguments into the calls of tools in prompts: in a table all have the
    same keys, and those that a call lacks are None. The model would read calls that nobody made."""
    try:
        arguments = dataset.features["prompt"].feature["tool_calls"].feature["function"]["arguments"]
    except (AttributeError, KeyError, TypeError):  # no messages with calls, or Json, which keeps each as it is
        return
    if not isinstance(arguments, dict) or dataset.format["type"] == "custom":  # a transform may leave them out
        return
    for row, prompt in enumerate(dataset.with_format(None)["prompt"]):
        functions = (call["function"] or {} for message in prompt or [] for call in message["tool_calls"] or [])
        for function in functions:
            if empty := [key for key, value in (function.get("arguments") or {}).items() if value is None]:
                raise ValueError(
                    f"a call of {function.get('name')} in row {row} of {name} has {empty[0]}=None, which Arrow adds "
                    "where another call has this argument: drop it from the rows, and make the data set by "
                    "Dataset.from_list(rows, on_mixed_types='use_json')"
                )


def check_one_image_column(rows: Sequence[dict[str, Any]], name: str) -> None:
    """Raises `ValueError` where TRL would leave out images without a word: in all rows of a batch it reads the first
    of `IMAGE_COLUMNS` that the batch's first row has."""
    columns = [[column for column in IMAGE_COLUMNS if column in row] for row in rows]
    for i, row in enumerate(rows):
        passed_by = len(columns[i]) == 2 and row["image"] is not None and row["image"] not in (row["images"] or [])
        if passed_by or columns[i] != columns[0]:
            raise ValueError(
                f"images of {name} are not in one column (row {i} differs), so that some would not be read: give all "
                "rows one column `images`, lists that are empty where there is no image"
            )


def check_batch_images(rows: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` for `rows` of a step whose images are in several columns, or turn white or black."""
    check_one_image_column(rows, "a batch")
    for image in (image for row in rows for image in images_of(row)):
        check_depth(image)


def check_image_columns(args: VAOPDConfig, dataset) -> None:
    """Raises `ValueError` for images of the first row that are no list, and for weights by VA where no row has an
    image: VA would be 0 everywhere. Data with images mostly have one in the first row, and no other is then read."""
    row = dataset[0]
    images = row.get("images")
    if images is not None and not isinstance(images, list | tuple):
        raise ValueError(
            f"`images` of row 0 of train_dataset is a {type(images).__name__}: it needs a list of images; name a "
            "column of single images `image`"
        )
    if args.weighting == "none":
        return
    rows = dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # images of other columns take minutes
        rows = dataset.select_columns([name for name in ("prompt", *IMAGE_COLUMNS) if name in dataset.column_names])
    with naming_unread_rows(rows):
        found = any(has_images(rows[i]) for i in range(len(rows)))
    if not found:
        raise ValueError(
            f"train_dataset has the columns {', '.join(row)}, and no row has an image in `image`, `images` or its "
            f"messages, so VA would be 0 everywhere and weighting={args.weighting!r} Standard OPD: rename the column "
            "of images, or set weighting to 'none' for data without any"
        )


def _is_said(message: Any) -> bool:
    """Whether a message can be rendered: calls of tools stand without content."""
    if not isinstance(message, dict) or not message.get("role"):
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))


def _parts(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of all messages of which a prompt is made."""
    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    return [part for parts in contents if isinstance(parts, list) for part in parts if isinstance(part, dict)]


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row has an image, in a column or among the parts of its messages, where TRL finds it too."""
    in_columns = bool(row.get("images")) or row.get("image") is not None
    return in_columns or any(part.get("type") == "image" for part in _parts(row["prompt"]))


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a row, those of its columns first."""
    in_columns = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    in_parts = [part.get("image") for part in _parts(row["prompt"]) if part.get("type") == "image"]
    return [*in_columns, *(image for image in in_parts if image is not None)]


def check_row(args: VAOPDConfig, processing_class, row: dict[str, Any], name: str = "row 0 of train_dataset") -> None:
    """Raises `ValueError` where a row cannot be made into the student's input. TRL would fail only at the first step,
    after all models and the engine have been loaded."""
    images = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    try:
        if isinstance(row["prompt"], str) and images:
            raise ValueError("a prompt that is a text has no place for its images, pass messages")
        if isinstance(row["prompt"], str):
            ids = processing_class(text=[row["prompt"]])["input_ids"]
        else:
            plain = isinstance(processing_class, PreTrainedTokenizerBase)
            prompt = row["prompt"] if plain else prepare_multimodal_messages(row["prompt"], images=images)
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            options |= args.chat_template_kwargs or {}
            ids = processing_class.apply_chat_template([prompt], **options)["input_ids"]
        for image in images_of(row):
            if image is None:
                raise ValueError("one of its images is None")
            check_depth(image)
    except Exception as error:  # whatever template, processor and PIL have
        raise ValueError(f"{name} makes no prompt ({_cause(error)}): mend such rows, or processing_class") from error
    check_prompts(ids, args, f"the prompt of {name}")


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def naming_rows(args: VAOPDConfig, processing_class, rows: list[dict]) -> Iterator[None]:
    """If the code inside fails because of one of the `rows` of a step, raises `ValueError` that names the row."""
    try:
        yield
    except torch.OutOfMemoryError:  # no row explains it, and checking all of them takes time
        raise
    except Exception:
        for row in rows:
            name = f"the row with id {row['id']!r}" if "id" in row else f"the row with prompt {row['prompt']!r:.200}"
            check_row(args, processing_class, row, name)
        raise


@contextmanager
def naming_unread_rows(dataset, name: str = "train_dataset") -> Iterator[None]:
    """If the code inside fails to load a row, such as one with a broken image, raises `ValueError` that names the row,
    provided that it is found within `SEARCH_SECONDS`."""
    try:
        yield
    except RuntimeError:  # such as of a worker that was killed
        raise
    except Exception as cause:
        logger.warning(
            "rows of %s cannot be loaded (%s): looking for the first, for %d s at most",
            name,
            _cause(cause),
            SEARCH_SECONDS,
        )
        end = time.monotonic() + SEARCH_SECONDS
        for row in range(len(dataset)):
            if time.monotonic() >= end:
                break
            try:
                dataset[row]
            except Exception as error:  # whatever PIL, transforms and file systems have
                raise ValueError(
                    f"row {row} of {name} cannot be read ({_cause(error)}): mend such rows, or leave them out"
                ) from error
        raise


def check_processor(processing_class, train_dataset) -> None:
    """Raises `ValueError` for no processor, and for a tokenizer in its place where the first row has images."""
    if processing_class is None or isinstance(processing_class, str):
        raise ValueError("processing_class is required: pass the student's processor, loaded by AutoProcessor")
    is_tokenizer = isinstance(processing_class, PreTrainedTokenizerBase)
    if is_tokenizer and train_dataset is not None and has_images(train_dataset[0]):
        raise ValueError(
            "rows have images, but processing_class is a tokenizer: pass the student's processor (AutoProcessor, "
            "which returns the tokenizer alone where torchvision is missing)"
        )


class FrozenCallback(TrainerCallback):
    """Raises `ValueError` at the start of training if no weight is trainable: with gradient checkpointing torch only
    warns, and no step would change the model."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "no weight of the student is trained: load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), pass peft_config, or call requires_grad_(True) on what shall be trained"
            )


class HalfPrecisionCallback(TrainerCallback):
    """Warns at the start of training if trained weights are in half precision, which rounds away most updates at a
    small learning rate. Not earlier: once a trainer is built, its adapters may still be made float32."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        dtypes = (torch.bfloat16, torch.float16)
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in dtypes]
        advice = 'load it with dtype="float32", and bf16=True computes in bfloat16 all the same'
        if getattr(model, "is_quantized", False):
            advice = (
                "TRL rounds adapters on quantized weights to bfloat16: once the trainer is built, run `for p in "
                "trainer.model.parameters(): p.data = p.data.float() if p.requires_grad else p.data`"
            )
        if half and state.is_world_process_zero:
            logger.warning(
                "%d of the student's trained weights are in half precision (%s): at a learning rate such as 1e-6 most "
                "updates are rounded away; %s",
                len(half),
                half[0],
                advice,
            )


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` unless both tokenizers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = next(token for token in [*ours, *theirs] if ours.get(token) != theirs.get(token))
    raise ValueError(
        f"student and teacher have different vocabularies ({len(ours)} and {len(theirs)} tokens; {differing!r} is id "
        f"{ours.get(differing)} and {theirs.get(differing)}): on-policy distillation compares their distributions "
        "token by token, so choose a teacher of the same tokenizer family"
    )


def check_teacher(
    args: VAOPDConfig, student: str | PreTrainedModel, teacher_model: str | PreTrainedModel | None
) -> None:
    """Raises `ValueError` where no teacher is named, where it is the student itself, where it is blind and the student
    is not or reads other patches, where one in shards is to be offloaded, and for shards with a served one."""
    if teacher_model is None and not args.teacher_server:
        raise ValueError("teacher_model is required: pass the teacher, or set teacher_server to a server of it")
    if student is teacher_model and not isinstance(student, str):
        raise ValueError("student and teacher are one object, which would be frozen: load the teacher a second time")
    if teacher_model is not None and _reads_images(student) and not _reads_images(teacher_model):
        raise ValueError(
            "the student reads images, the teacher does not: it would score every rollout blindly, and VA would be 0 "
            "everywhere; choose a vision-language teacher"
        )
    if teacher_model is not None:
        _check_patches(config_of(student), config_of(teacher_model))
    if args.teacher_offload and is_deepspeed_zero3_enabled():
        raise ValueError(
            "teacher_offload=True has nothing to do under ZeRO-3, which shards the teacher: leave it out, or set "
            "offload_param_device: cpu in the accelerate config"
        )
    if args.teacher_offload and isinstance(teacher_model, str):
        raise ValueError(
            f"teacher_offload=True needs a loaded teacher, got the name {teacher_model!r}: load it with "
            "from_pretrained, in the dtype in which it shall score, and pass the model"
        )
    if args.teacher_server and (is_deepspeed_zero3_enabled() or is_fsdp_enabled()):
        raise ValueError(
            "teacher_server needs the student whole on each GPU: use the accelerate config multi_gpu or zero2, not "
            "zero3 or fsdp2"
        )


def _check_patches(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        sizes = [getattr(getattr(config, "vision_config", None), name, None) for config in (student, teacher)]
        if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"the student's vision_config has {name}={sizes[0]}, the teacher's {sizes[1]}: it could not read the "
                "student's inputs; choose a teacher of the student's family"
            )


def match_vocabulary_size(model: str | PreTrainedModel, teacher: str | PreTrainedModel, num_tokens: int) -> None:
    """Sizes of one family pad the same tokens to other multiples: brings the teacher to the student's row count.

    Raises `ValueError` for fewer rows than tokens, and for a teacher given by its name, which cannot be resized here.
    """
    size, teacher_size = (config_of(m).get_text_config().vocab_size for m in (model, teacher))
    if min(size, teacher_size) < num_tokens:
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens, but the student has {size} vocabulary rows and the teacher "
            f"{teacher_size}: student, teacher and processing_class must be of one tokenizer family"
        )
    if size == teacher_size:
        return
    if isinstance(teacher, str):
        raise ValueError(
            f"teacher {teacher!r} pads its vocabulary to {teacher_size} rows, the student to {size}: load the teacher "
            "with from_pretrained and pass the model, which is then resized"
        )
    teacher.resize_token_embeddings(size, mean_resizing=False)


def config_of(model: str | PreTrainedModel) -> PretrainedConfig:
    return AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config


def _reads_images(model: str | PreTrainedModel) -> bool:
    return getattr(config_of(model), "vision_config", None) is not None


def check_fsdp(plugin) -> None:
    """Raises `ValueError` where FSDP loads weights on one rank only: the others would have zeros for a teacher."""
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "under FSDP every rank must load the teacher: add --fsdp_cpu_ram_efficient_loading false to "
            "accelerate launch"
        )


def banned_ids(processing_class, config: PretrainedConfig) -> set[int]:
    """Ids that a rollout must not hold: image and video placeholders, and rows that pad the vocabulary."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = tokenizer.get_vocab()
    tokens = (getattr(processing_class, name, None) for name in ("image_token", "video_token", "boi_token"))
    placeholders = {vocabulary[token] for token in tokens if isinstance(token, str) and token in vocabulary}
    # Some processors (Gemma 3) call another token image_token than the one that stands for image features
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    placeholders |= {token_id for token_id in ids if token_id is not None}
    return placeholders | set(range(len(tokenizer), config.get_text_config().vocab_size))


def ban_tokens(args: VAOPDConfig, processing_class, model: str | PreTrainedModel) -> VAOPDConfig:
    """A copy of `args` whose generation settings forbid `banned_ids` on the engine in use, beside what they forbid."""
    config, options = config_of(model), dict(args.generation_kwargs or {})
    banned = banned_ids(processing_class, config)
    if args.use_vllm:
        # vLLM has no list of banned ids. The lowest bias that it takes reaches both the colocated engine and, as JSON,
        # the server; on a GPU it takes no list of allowed ids as long as a vocabulary
        options["logit_bias"] = {**(options.get("logit_bias") or {}), **dict.fromkeys(sorted(banned), -100.0)}
        if options.get("allowed_token_ids"):
            options["allowed_token_ids"] = sorted(set(options["allowed_token_ids"]) - banned)
        if len(options["logit_bias"]) > MOST_BIASES:
            raise ValueError(
                f"{len(banned)} ids must not be sampled, most of them rows that pad the vocabulary, and vLLM takes at "
                f"most {MOST_BIASES}: call resize_token_embeddings(len(tokenizer)) on the student, or set use_vllm to "
                "false"
            )
    else:
        options["suppress_tokens"] = sorted(banned | set(options.get("suppress_tokens") or []))
    args = copy.copy(args)
    args.generation_kwargs = options
    return args


@torch.no_grad()
def check_logits(trainer) -> None:
    """Raises `ValueError` if the loss makes other logits of the student's hidden states than its own forward does, by
    which transformers samples: LLaVA-NeXT, Aya Vision and PaliGemma leave out the scale or soft cap of the language
    models of Granite, Cohere and Gemma 2. (vLLM does not; with it the gap is logged.)

    DeepSpeed and FSDP have not moved the weights to their devices yet, and those in 4 bits may not be called in
    evaluation: they are not looked at.
    """
    model = trainer.model
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or trainer.use_vllm or getattr(model, "is_quantized", False):
        return
    free = (i for i in range(trainer.vocab_size) if i not in trainer.banned_ids)
    ids = torch.tensor([list(islice(free, 8))], device=model.device)
    training = model.training
    model.eval()
    with trainer.accelerator.autocast():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        logits = lm_head(model).whole_logits(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    model.train(training)
    # A GPU may multiply float32 as TF32
    exact = trainer.accelerator.mixed_precision == "no" and model.dtype == torch.float32 and model.device.type == "cpu"
    gap, size = (logits - own).abs().max().item(), own.abs().max().item()
    if not gap <= size * (1e-4 if exact else 0.02):  # a soft cap of 30 changes a logit of 10 by 0.04 of its size
        raise ValueError(
            f"the loss would not be that of the student that samples: logits of {type(model).__name__} are not the "
            "product of its last hidden states and its head, with the scale and soft cap that its config names (they "
            f"are {gap:.2g} away); train another family, or let a vLLM that applies both sample (use_vllm)"
        )


def check_prompts(prompt_ids: list[list[int]], args: VAOPDConfig, name: str = "a prompt") -> None:
    """Raises `ValueError` for a prompt over the limit; warns once of a colocated vLLM whose context does not hold a
    prompt and its rollout."""
    longest = max(len(ids) for ids in prompt_ids)
    if longest > args.max_prompt_length:
        raise ValueError(
            f"{name} has {longest} tokens, above max_prompt_length={args.max_prompt_length}: raise the limit, with "
            "which a run that has begun goes on, or begin a new run with a lower image budget or without such rows "
            "(prompts are never cut)"
        )
    context = args.vllm_max_model_length if args.use_vllm and args.vllm_mode == "colocate" else None
    if context and longest + args.max_completion_length > context:
        logger.warning_once(
            f"vllm_max_model_length={context} is for a prompt and its rollout, and some prompts leave less than "
            f"max_completion_length={args.max_completion_length}: vLLM cuts their rollouts short; raise the first, or "
            "lower max_completion_length, or max_prompt_length to refuse such prompts"
        )


def check_rollouts(completion_ids: list[list[int]], banned: set[int]) -> None:
    """Raises `ValueError` for an empty rollout or one that holds a banned id."""
    for row, ids in enumerate(completion_ids):
        if not ids:
            raise ValueError(f"rollout {row} is empty: the engine returned no token, not even an end of sequence")
        if found := banned.intersection(ids):
            raise ValueError(
                f"rollout {row} holds the token ids {sorted(found)}, which stand for images or padding: the "
                "generation engine ignored the ban on sampling them"
            )


def check_all_or_none(has_image: torch.Tensor) -> None:
    """Raises `ValueError` if some rows of a batch, over all ranks, have an image and others have none; for sharding.

    A rank without images has no gradients of the vision tower. DeepSpeed sums gradients in the order in which they
    come, so other ranks would add them to those of other weights; under ZeRO-3 and FSDP all ranks would hang.
    """
    if has_image.any() and not has_image.all():
        raise ValueError(
            f"{has_image.sum()} of the {len(has_image)} rollouts of a step have images: rows with and without images "
            "train together with the accelerate config multi_gpu, not with DeepSpeed or FSDP"
        )


def sibling_fingerprints(batch: dict[str, Any]) -> torch.Tensor:
    """(B, 2) integers, equal in rows with the same prompt and the same images."""
    ids = batch["prompt_ids"] * batch["prompt_mask"]
    position = torch.arange(ids.size(1), 0, -1, device=ids.device)  # padding is on the left: count from the end
    pixels = split_images(batch).get("pixel_values")
    if pixels is None or len(pixels) != len(ids):
        pixels = torch.zeros(len(ids), 1)
    # Sums of integers, which the order of summation does not change
    image_sums = torch.stack([p.float().view(torch.int32).sum() for p in pixels]).to(ids.device)
    return torch.stack([(ids * position).sum(1), image_sums], dim=1)


def check_siblings(fingerprints: torch.Tensor, num_generations: int) -> None:
    """Raises `RuntimeError` unless siblings are consecutive rows over all ranks.

    A lost order would compare rollouts of different prompts, and nothing else would show it.
    """
    groups = fingerprints.view(-1, num_generations, fingerprints.size(-1))
    if (groups != groups[:, :1]).any():
        raise RuntimeError(
            f"rows of a group of num_generations={num_generations} have different prompts or images: the data loader "
            "re-ordered the batch; leave dispatch_batches and split_batches at their defaults"
        )
