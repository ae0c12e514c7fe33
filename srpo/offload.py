"""A model that waits in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offloaded:
    """Keeps the weights of `model` in host memory, pinned where there is a GPU, and on `device` inside `on_device`.

    The output projection stays on the device: the loss needs it after the model's own passes. Weights that are changed
    in host memory count from the next `on_device` on; what is changed inside it is lost.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        head = set(model.get_output_embeddings().parameters())
        self.weights = [weight for weight in model.parameters() if weight not in head]
        for weight in self.weights:
            host = weight.data.cpu()
            weight.data = host.pin_memory() if device.type == "cuda" else host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """One transfer to the device and none back."""
        hosts = [weight.data for weight in self.weights]
        try:
            for weight, host in zip(self.weights, hosts, strict=True):
                weight.data = host.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            for weight, host in zip(self.weights, hosts, strict=True):
                weight.data = host
