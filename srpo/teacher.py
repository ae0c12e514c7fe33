"""The self-teacher: the policy's exponential moving average, its frozen start, or the policy itself (Section 2.2,
Table 3)."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model, is_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ._trl import ForwardRedirection, create_model_from_path, pad, prepare_deepspeed
from .adapters import check_mergeable, is_quantized, loses_its_start, merged_weights, untie_adapted
from .batches import sequence_batches
from .lm_head import LMHead, last_hidden_states, lm_head
from .offload import Offloaded
from .rope import exact_frequencies


def autocast(accelerator, dtype: torch.dtype):
    """Autocast for a teacher of that dtype. accelerate's is none under DeepSpeed, which casts the policy's weights,
    but not a float32 average."""
    if accelerator.mixed_precision == "bf16" and dtype == torch.float32:
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


class SelfTeacher:
    """Scores the policy's rollouts under a longer prompt.

    `kind="ema"` keeps a float32 copy theta' <- (1 - rate) theta' + rate theta (a bfloat16 one would drop most updates:
    a step of 5 % of a small change is below its resolution). With LoRA the copy is of the merged weights, so that it
    averages the product B A and not its factors. With QLoRA, where merged weights would cost what it saves, the
    factors are averaged, and the policy with them is the teacher. `"frozen"` is the start: a copy, or with adapters
    that begin at zero the policy without them. `"current"` is the policy.

    Under ZeRO-3 and FSDP2 the copy is sharded like the policy and each rank averages its own shards; under ZeRO-3 the
    float32 average is kept beside the half-precision weights that the forward uses. With `offload` a copy that is not
    sharded waits in host memory between its passes, where it is averaged too. `loading` are options of
    `from_pretrained` for the copy that is loaded under ZeRO-3.
    """

    def __init__(
        self,
        policy: nn.Module,
        accelerator,
        kind: str = "ema",
        rate: float = 0.05,
        offload: bool = False,
        loading: dict[str, Any] | None = None,
    ):
        self.kind, self.rate, self.accelerator, self.loading = kind, rate, accelerator, loading or {}
        self.zero3, self.fsdp = is_deepspeed_zero3_enabled(), accelerator.is_fsdp2
        self.sharded = self.zero3 or self.fsdp
        self.factors = kind == "ema" and is_peft_model(policy) and is_quantized(policy)
        self.model = self._copy(policy) if self._needs_copy(policy) else None
        averaged = policy if self.factors else self.model
        self.average = dict(self._parameters(averaged, trained=self.factors)) if kind == "ema" else {}
        if self.zero3 or self.factors:
            self.average = {name: tensor.detach().float().clone() for name, tensor in self.average.items()}
        if offload and self.sharded:
            raise ValueError(
                "teacher_offload=True has nothing to do under ZeRO-3 and FSDP, which shard the self-teacher: leave it "
                "out, or set offload_param_device: cpu (fsdp_offload_params: true) in the accelerate config"
            )
        self.offloaded = Offloaded(self.model, accelerator.device) if offload and self.model is not None else None

    def _needs_copy(self, policy: nn.Module) -> bool:
        """Whether the teacher has to be a model of its own, not the policy with its own adapter, the averaged one or
        none. Raises `ValueError` where a copy is needed and cannot be made."""
        if self.kind == "current":
            return False
        if not is_peft_model(policy):
            return True
        if self.kind == "ema":
            if self.sharded:
                where = "ZeRO-3" if self.zero3 else "FSDP"
                raise ValueError(
                    f"teacher='ema' with LoRA does not run under {where}: use ZeRO-2, or teacher='frozen'"
                )
            if not self.factors:
                check_mergeable(policy.peft_config)
            return not self.factors
        lost = loses_its_start(policy)
        if lost and (self.sharded or is_quantized(policy)):
            raise ValueError(
                "teacher='frozen' is the policy without its adapter, which is not the policy's start: the adapter is "
                "trained already, init_lora_weights is such as 'pissa', it trains biases, or it is no LoRA. A merged "
                f"copy of {'sharded' if self.sharded else 'quantized'} weights cannot be made: pass the merged model "
                "with a new adapter, or set teacher='current'"
            )
        return lost

    def _copy(self, policy: nn.Module) -> nn.Module:
        if is_quantized(policy):
            raise ValueError(
                f"teacher={self.kind!r} copies the policy and cannot copy a quantized one: set teacher='current'"
            )
        if self.zero3:
            return self._zero3_copy(policy)
        teacher = copy.deepcopy(policy)
        if is_peft_model(teacher):
            untie_adapted(teacher)
            teacher = teacher.merge_and_unload()
        teacher.__dict__.pop("forward", None)  # TRL's patched forward is bound to the policy
        teacher = (teacher.float() if self.kind == "ema" else teacher).requires_grad_(False)
        if self.fsdp:
            return fsdp2_prepare_model(self.accelerator, teacher)
        return teacher.to(self.accelerator.device)

    def _zero3_copy(self, policy: nn.Module) -> nn.Module:
        """Loaded from the policy's name as TRL's reference is, because a partitioned model cannot be copied."""
        name = policy.config._name_or_path
        if not name:
            raise ValueError(
                "under ZeRO-3 the teacher is loaded from the policy's name: pass model as a path or hub id"
            )
        options = {key: value for key, value in self.loading.items() if key != "quantization_config"}
        options |= {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
        options["device_map"] = None  # TRL's, "auto" on a GPU, is none that transformers takes beside ZeRO-3
        teacher = create_model_from_path(name, **options)
        teacher.requires_grad_(False)
        exact_frequencies(teacher)
        self._check_start(teacher, policy, name)
        return prepare_deepspeed(teacher, self.accelerator)

    def _check_start(self, teacher: nn.Module, policy: nn.Module, name: str) -> None:
        """Raises `ValueError` if what was loaded from the policy's name is not the policy, up to rounding."""
        import deepspeed

        own, loaded = dict(policy.named_parameters()), dict(teacher.named_parameters())
        same = own.keys() == loaded.keys()
        for key, weight in loaded.items() if same else ():
            with deepspeed.zero.GatheredParameters([own[key], weight]):  # collective: on all ranks for every weight
                dtype = min(own[key].dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
                same &= torch.equal(own[key].to(weight.device, dtype), weight.to(dtype))
        if not same:
            raise ValueError(
                f"under ZeRO-3 the self-teacher is loaded from the policy's name, {name!r}, and its weights are not "
                "the policy's (changed after loading, another revision, an adapter merged in): save the policy and "
                "pass its folder as model, or set model_init_kwargs to how it was loaded"
            )

    @contextmanager
    def view(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The model to call, in evaluation mode: the copy where there is one, else the policy. As a frozen teacher the
        policy is without its adapter (LoRA), as an EMA teacher it has the averaged adapter (QLoRA)."""
        if self.model is not None:
            self.model.eval()
            with self.offloaded.on_device() if self.offloaded else nullcontext():
                yield self.model
            return
        unwrapped = self.accelerator.unwrap_model(policy)
        if self.kind == "current":
            adapter = nullcontext()
        else:
            adapter = self._averaged(unwrapped) if self.factors else unwrapped.disable_adapter()
        training = policy.training
        policy.eval()
        try:
            with adapter:
                yield policy
        finally:
            policy.train(training)

    @contextmanager
    @torch.no_grad()
    def _averaged(self, policy: nn.Module) -> Iterator[None]:
        """The average in place of the policy's own adapter."""
        own = {name: (weight, weight.clone()) for name, weight in self._parameters(policy, trained=True)}
        try:
            for name, (weight, _) in own.items():
                weight.copy_(self.average[name])
            yield
        finally:
            for weight, value in own.values():
                weight.copy_(value)

    @torch.no_grad()
    def hidden_states(
        self,
        policy: nn.Module,
        prompts: dict[int, list[int]],
        batch: dict[str, Any],
        mask: torch.Tensor,
        batch_size: int,
        pad_token_id: int,
    ) -> tuple[dict[int, torch.Tensor], LMHead]:
        """Scores some rows of a batch under prompts of their own.

        Args:
            prompts: row of `batch` -> token ids of the teacher's prompt.
            mask: (B, T), 1 on the response tokens that are wanted.

        Returns the last hidden states (T_i, H) from which the teacher predicts the response tokens of each row, and
        its head, which stays as it is until the optimizer steps, when the next batch is scored.
        """
        states = {}
        responses = {row: batch["completion_ids"][row, batch["completion_mask"][row].bool()] for row in prompts}
        sequences = {row: torch.cat([ids.new_tensor(prompts[row]), ids]) for row, ids in responses.items()}
        filler = {-1: batch["completion_ids"][0, :1]}  # for a forward whose result nobody reads
        with self.view(policy) as teacher:
            unwrapped = self.accelerator.unwrap_model(teacher)
            for part in self._same_number_on_all_ranks(sequence_batches(sequences, batch_size), filler):
                hidden = self._forward(teacher, unwrapped, list(part.values()), pad_token_id)
                for row, hidden_LH in zip(part, hidden, strict=True):
                    if row in responses:
                        length = len(responses[row])
                        states[row] = hidden_LH[-length - 1 : -1][mask[row, :length].bool()]
            head = lm_head(unwrapped)
            if self.factors and head.weight.requires_grad:  # the average in the policy's place, which ends here
                bias = None if head.bias is None else head.bias.clone()
                head = head._replace(weight=head.weight.clone(), bias=bias)
            return states, head

    def _forward(
        self, teacher: nn.Module, unwrapped: nn.Module, sequences: list[torch.Tensor], pad_token_id: int
    ) -> torch.Tensor:
        """Last hidden states (B, L, H) of B sequences, padded on the left to the longest."""
        input_ids = pad(sequences, padding_value=pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(ids) for ids in sequences], padding_value=0, padding_side="left")
        with autocast(self.accelerator, unwrapped.dtype):
            if self.sharded:
                return ForwardRedirection()(teacher, unwrapped, last_hidden_states, unwrapped, input_ids, mask)
            return last_hidden_states(unwrapped, input_ids, mask)  # past DDP, which would wait for ranks without rows

    def _same_number_on_all_ranks(self, parts: list, filler: dict[int, torch.Tensor]) -> list:
        """Appends fillers so that all ranks run equally many: the forward of a sharded teacher is a collective."""
        if self.sharded:
            count = torch.tensor([len(parts)], device=self.accelerator.device)
            parts = parts + [filler] * (int(self.accelerator.gather(count).max()) - len(parts))
        return parts

    @torch.no_grad()
    def update(self, policy: nn.Module) -> float:
        """One step of the average; returns its relative distance ||theta' - theta|| / ||theta|| before the step."""
        sums = torch.zeros(2, device=self.accelerator.device)
        for name, value in self._policy_values(self.accelerator.unwrap_model(policy)):
            average = self.average[name]
            value = value.to(average.device, torch.float32)
            sums += torch.stack([(average - value).square().sum(), value.square().sum()]).to(sums.device)
            average.lerp_(value, self.rate)
        if self.sharded:
            self._reach_forward()
            sums = self.accelerator.reduce(sums)
        gap, size = sums.tolist()
        return math.sqrt(gap / size)

    def _reach_forward(self) -> None:
        """Lets the next forward see a changed average: DeepSpeed keeps small weights gathered, FSDP the head's."""
        if self.zero3:
            for name, weight in self._parameters(self.model):
                weight.copy_(self.average[name])
            self.model.empty_partition_cache()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _shard(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's shard of a parameter, as storage that can be written."""
        if self.zero3:  # the padding at the end of the last rank's shard is never written
            share = parameter.ds_tensor
            return share[: max(0, parameter.ds_numel - self.accelerator.process_index * share.numel())]
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def _parameters(self, model: nn.Module, trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, local storage) of a model's parameters, with `trained` only of those that training changes."""
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            if parameter.requires_grad or not trained:
                # FSDP's activation checkpointing wraps layers of the policy alone
                yield name.replace("_checkpoint_wrapped_module.", ""), self._shard(parameter)

    def _policy_values(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights under the average's names; merged, if the average is so. Those that are frozen now
        may have been trained before, by a callback that trains layers in turn."""
        if self.factors or not is_peft_model(policy):
            return self._parameters(policy, trained=self.factors)
        return merged_weights(policy, self.average)

    def save(self, folder: Path) -> None:
        """Writes the float32 average to `folder`; every rank its own shards, the main process what is not sharded."""
        if self.kind != "ema" or not (self.sharded or self.accelerator.is_main_process):
            return
        path = self._file(folder)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".tmp")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.average.items()}, draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restores the average of a checkpoint. Raises `ValueError` if the checkpoint has none or another model's."""
        if self.kind != "ema":
            return
        path = self._file(folder)
        if not path.exists():
            name = path.relative_to(folder)
            raise ValueError(f"{folder} holds no {name}: it is no checkpoint of SRPO with teacher='ema'")
        saved = load_file(path)
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self.average.items()}:
            raise ValueError(
                f"{path} belongs to another model: its parameters differ in name or shape from the policy's"
            )
        for name, tensor in saved.items():
            self.average[name].copy_(tensor)
        if self.sharded:
            self._reach_forward()

    def _file(self, folder: Path) -> Path:
        # In a folder of its own: vLLM loads all safetensors files that lie beside a model's, this one over the policy
        rank = f"-{self.accelerator.process_index:05d}" if self.sharded else ""
        return folder / "self_teacher" / f"average{rank}.safetensors"


class SelfTeacherCallback(TrainerCallback):
    """Moves the average after every optimizer step that was not skipped."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            distance = self.trainer.teacher.update(self.trainer.model)
            self.trainer._metrics["train"]["teacher/distance"].append(distance)
