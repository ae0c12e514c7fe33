"""What the paper's GRPO and SFT baselines change in TRL's trainers, so that a run can be killed and resumed."""

from trl import GRPOTrainer, SFTTrainer

from . import siblings
from ._trl import EpochSampler, prepare_rollouts, reach_adapters_of_vision
from .checkpoints import LoadsWeights
from .rope import exact_frequencies


class ResumableGRPOTrainer(LoadsWeights, GRPOTrainer):
    """TRL's trainer; a run that was killed and resumed sees the prompts that the uninterrupted one would have seen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        exact_frequencies(self.model, self.ref_model)
        prepare_rollouts(self)
        reach_adapters_of_vision(self)

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            epoch=lambda: int(self.state.epoch or 0),
            seed=self.args.seed,
        )

    def _get_per_token_logps_and_entropies(self, model, input_ids, *arguments, **fields):
        # Gemma 3's have one more place, in front: see `siblings.with_token_types`
        width, types = input_ids.size(1), siblings.token_types(fields)
        fields |= {key: value[:, -width:] for key, value in types.items() if value is not None}
        return super()._get_per_token_logps_and_entropies(model, input_ids, *arguments, **fields)


class ResumableSFTTrainer(LoadsWeights, SFTTrainer):
    """TRL's trainer; it resumes from all weights of a checkpoint."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        reach_adapters_of_vision(self)
