"""All that VA-OPD uses of TRL beyond its public API, behind one check of the version.

`tests/va_opd/test_trainer.py` pins the signatures of these names and of the trainer's private methods.
"""

from contextlib import contextmanager
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED_TRL = ">=1.16,<1.17"
if version("trl") not in SpecifierSet(SUPPORTED_TRL):
    raise ImportError(f"va_opd overrides private methods of trl and needs trl{SUPPORTED_TRL}; found {version('trl')}")

from trl.kernels import chunked_divergence  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    RepeatSampler,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)

__all__ = [
    "MULTIMODAL_KEYS",
    "SUPPORTED_TRL",
    "ChunkedDivergenceFunction",
    "DivergenceInSmallTiles",
    "SiblingSampler",
    "maybe_gather_lm_head_ctx",
    "split_pixel_values_by_grid",
    "unsplit_pixel_values_by_grid",
]

# What `DistillationTrainer._get_last_hidden_state` accepts beside ids and masks
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


# Bytes for logits, and how many (rows, VOCAB_CHUNK_SIZE) tiles of float32 TRL's kernel has at once: with Triton one of
# each model and a gradient, in plain torch also what each step of the formula leaves
TILE_BYTES, TILES_ON_GPU, TILES_IN_TORCH = 3 * 2**28, 3, 12


def tile_rows(device_type: str) -> int:
    """Rows of a tile of the kernel on "cuda", "cpu", ...: 2,048 with Triton, else 512."""
    tiles = TILES_ON_GPU if device_type == "cuda" else TILES_IN_TORCH
    return TILE_BYTES // (tiles * 4 * chunked_divergence.VOCAB_CHUNK_SIZE)


@contextmanager
def _small_tiles(device_type: str):
    before = chunked_divergence.TOKEN_CHUNK_SIZE
    chunked_divergence.TOKEN_CHUNK_SIZE = min(before, tile_rows(device_type))
    try:
        yield
    finally:
        chunked_divergence.TOKEN_CHUNK_SIZE = before


class DivergenceInSmallTiles(ChunkedDivergenceFunction):
    """TRL's kernel in tiles of `tile_rows` and not of 4,096, with the same values at less than 1 GB of logits."""

    @staticmethod
    def forward(ctx, student_hidden, *arguments):
        with _small_tiles(student_hidden.device.type):
            return ChunkedDivergenceFunction.forward(ctx, student_hidden, *arguments)

    @staticmethod
    def backward(ctx, *gradients):
        with _small_tiles(ctx.saved_tensors[0].device.type):
            return ChunkedDivergenceFunction.backward(ctx, *gradients)


class SiblingSampler(RepeatSampler):
    """Each prompt K times in a row; the order of an epoch depends on seed and epoch only, so that a resumed run sees
    the prompts that the uninterrupted one would have seen."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
