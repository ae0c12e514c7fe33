"""A resumed run sees the prompts that the uninterrupted one would have seen, on any number of processes."""

import importlib

import pytest
import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

SAMPLERS = {"va_opd": "EpochSampler", "srpo": "EpochSampler", "r_diverse": "EpochSampler"}


def loader(method: str, epoch: list[int], processes: int, rank: int):
    """As a trainer makes it: 4 prompts twice a batch of all processes, 3 batches an epoch."""
    sampler = getattr(importlib.import_module(f"{method}._trl"), SAMPLERS[method])
    order = sampler(range(12), mini_repeat_count=2, batch_size=4, seed=7, epoch=lambda: epoch[0])
    batches = DataLoader(range(12), batch_size=8 // processes, sampler=order, collate_fn=list)
    device = torch.device("cpu")
    return prepare_data_loader(batches, device, num_processes=processes, process_index=rank, put_on_device=False)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_run_resumed_in_a_later_epoch(method, processes, rank):
    PartialState(cpu=True)
    epoch, straight = [0], []
    batches = loader(method, epoch, processes, rank)
    for number in range(3):
        epoch[0] = number
        straight.append(list(batches))
    assert straight[0] != straight[1] != straight[2]
    for skipped in range(3):
        # As transformers does it: `set_epoch` of what accelerate returns reaches no sampler on several processes
        resumed = skip_first_batches(loader(method, epoch, processes, rank), skipped)
        resumed.set_epoch(2)
        assert list(resumed) == straight[2][skipped:]
