"""What vLLM's CPU build lacks for training, so that tests and `benchmarks.vllm_gap` run without a GPU.

    python -m benchmarks.vllm_on_cpu srpo.train --config srpo/configs/tiny.yaml --use_vllm true ...    # any command

- Its linear layers repack their weights and drop the plain ones, so that a weight sync could not write to them; so do
  its experts. Here they stay. vLLM loads `register` in each of its processes.
- Weights reach a server over NCCL, which needs CUDA. Here the trainer leaves them in a file that the server loads.
- Its attention does not support heads of width 16. `widened` gives a tiny model heads of 32 that compute the same.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main(argv: list[str]) -> int:
    """Runs the `main` of the module `argv[0]` with all of this in place."""
    with tempfile.TemporaryDirectory() as folder:
        use_plugin(Path(folder) / "plugin")
        weights_by_file(Path(folder) / "weights.safetensors")
        return importlib.import_module(argv[0]).main(argv[1:])


def use_plugin(folder: Path) -> None:
    """Makes vLLM load `register`, in this process and in those that it starts."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    paths = plugin_paths(folder)
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def plugin_paths(folder: Path) -> list[str]:
    """Folders that, on PYTHONPATH, make vLLM load `register`, and the package vllm-cpu go by the name vllm."""
    plugin, alias = folder / "vllm_on_cpu-0.dist-info", folder / "vllm-0.31.0+cpu.dist-info"
    plugin.mkdir(parents=True)
    alias.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-on-cpu\nVersion: 0\n")
    entry = "vllm_on_cpu = benchmarks.vllm_on_cpu:register"
    (plugin / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    (alias / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
    return [str(folder), str(Path(__file__).parents[1])]


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
        _keep_experts()


def _keep_experts() -> None:
    """Repacks the weights of experts at each use, in a copy."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts, pack = cpu_moe.CPUUnquantizedExperts, cpu_moe.cpu_prepack_moe_weight
    apply = experts.apply

    def packed(self, output, hidden_states, w1, w2, *arguments, **options):
        apply(self, output, hidden_states, pack(w1, self.isa), pack(w2, self.isa), *arguments, **options)

    experts.apply, experts.process_weights_after_loading = packed, lambda self, layer: None


def weights_by_file(path: Path, patch: Callable[[type, str, Callable], None] = setattr) -> None:
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

    patch(VLLMClient, "init_communicator", start)
    patch(VLLMClient, "update_named_params", update)
    patch(VLLMClient, "close_communicator", lambda client: None)


def widened(model: torch.nn.Module, head_dim: int = 32) -> torch.nn.Module:
    """A copy of a tiny Qwen3 or Qwen3-VL with heads of `head_dim`, padded with zeros, that computes the same.

    Rotary embeddings pair a head's halves, so each half is padded; raising their base to the power of the growth keeps
    the frequencies of the pairs. The norms of query and key, and the attention, divide by the root of the width.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    text = config.get_text_config()
    old, growth = text.head_dim, head_dim / text.head_dim
    rope = dict(text.rope_parameters)
    rope["rope_theta"] **= growth
    if "mrope_section" in rope:
        rope["mrope_section"] = [rope["mrope_section"][0] + (head_dim - old) // 2, *rope["mrope_section"][1:]]
    text.head_dim, text.rope_parameters = head_dim, rope

    def fill(weight: torch.Tensor, dim: int) -> torch.Tensor:
        halves = weight.movedim(dim, 0).unflatten(0, (-1, old // 2))
        zeros = halves.new_zeros(len(halves), (head_dim - old) // 2, *halves.shape[2:])
        return torch.cat([halves, zeros], dim=1).flatten(0, 1).movedim(0, dim)

    weights = model.state_dict()
    for name, weight in weights.items():
        if ".self_attn." in name:
            weights[name] = fill(weight, dim=1 if name.endswith("o_proj.weight") else 0)
        if name.endswith("q_norm.weight"):
            weights[name] *= growth**-0.5
    copy = type(model)(config)
    copy.load_state_dict(weights)
    copy.generation_config = model.generation_config
    return copy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
