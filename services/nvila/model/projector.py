"""From tower channels to the language model's width (NVILA-SPEC §4).

Follows llava/model/multimodal_projector/base_projector.py of NVlabs/VILA; parameter names are those of its checkpoints.
GELU is the exact one and LayerNorm's eps 1e-5, torch's defaults, unlike in the tower.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from nvila.model.compress import space_to_channel
from nvila.model.config import DOWNSAMPLE


class SpaceToChannel(nn.Module):
    """`space_to_channel` as a layer without parameters."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_NTC: Tensor) -> Tensor:
        return space_to_channel(x_NTC, self.block)


class Projector(nn.Module):
    """(N tiles, T tokens, C channels) to (N, T', D)."""

    def __init__(self, kind: str, width: int, llm_width: int) -> None:
        super().__init__()
        self.layers = projector_layers(kind, width, llm_width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        projected: Tensor = self.layers(x_NTC)
        return projected


def projector_layers(kind: str, width: int, llm_width: int) -> nn.Module:
    """The layers of `mm_projector_type` `kind`, numbered as in a checkpoint."""
    W, D = width, llm_width
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(W, D)
    if kind.endswith("x_gelu"):
        depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))
        hidden = [layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(D, D))]
        return nn.Sequential(nn.Linear(W, D), *hidden)
    normed_widths = {
        "mlp_downsample": (4 * W, D),
        "mlp_downsample_2x2_fix": (4 * W, D),
        "mlp_downsample_3x3_fix": (9 * W, 3 * W, D),
        "mlp_downsample_3x3_s2": (9 * W, 3 * W, W, W // 3, D),
        "mlp_downsample_3x3_s2_new": (9 * W, 4 * W, 2 * W, W, W // 3, D),
    }[kind]
    normed = [
        layer
        for before, after in pairwise(normed_widths)
        for layer in (nn.LayerNorm(before), nn.Linear(before, after), nn.GELU())
    ]
    return nn.Sequential(SpaceToChannel(DOWNSAMPLE[kind]), *normed, nn.Linear(D, D))
