"""From tower channels to the language model's width (NVILA-SPEC §4).

Follows llava/model/multimodal_projector/base_projector.py of NVlabs/VILA; parameter names are those of its checkpoints.
GELU is the exact one and LayerNorm's eps 1e-5, torch's defaults, unlike in the tower.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from nvila.model.compress import space_to_channel
from nvila.model.compressors import Resampler, TokenLearner
from nvila.model.config import DOWNSAMPLE, RESAMPLERS, TOKEN_LEARNERS, NvilaConfig, projector_widths


class SpaceToChannel(nn.Module):
    """`space_to_channel` as a layer without parameters."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_NTC: Tensor) -> Tensor:
        return space_to_channel(x_NTC, self.block)


class Projector(nn.Module):
    """(N tiles, T tokens, C channels) to (N, T', D). `tokens`: T', which a compressor that learns has to know."""

    def __init__(self, kind: str, width: int, llm_width: int, tokens: int = 0) -> None:
        super().__init__()
        self.layers = projector_layers(kind, width, llm_width, tokens)

    @classmethod
    def of(cls, config: NvilaConfig) -> Projector:
        """The projector that a configuration describes, with weights as torch makes them."""
        return cls(config.projector_type, config.projector_width, config.llm_width, config.side**2)

    def forward(self, x_NTC: Tensor) -> Tensor:
        projected: Tensor = self.layers(x_NTC)
        return projected


def projector_layers(kind: str, width: int, llm_width: int, tokens: int = 0) -> nn.Module:
    """The layers of `mm_projector_type` `kind`, numbered as in a checkpoint."""
    widths = projector_widths(kind, width, llm_width)
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, llm_width)
    if kind.endswith("x_gelu"):
        first, *hidden = [nn.Linear(before, after) for before, after in pairwise(widths)]
        return nn.Sequential(first, *(layer for linear in hidden for layer in (nn.GELU(), linear)))
    if kind in RESAMPLERS:
        return Resampler(width, llm_width, tokens)
    compress = TokenLearner(width, tokens) if kind in TOKEN_LEARNERS else SpaceToChannel(DOWNSAMPLE[kind])
    *normed, last = pairwise(widths)
    layers = [
        layer for before, after in normed for layer in (nn.LayerNorm(before), nn.Linear(before, after), nn.GELU())
    ]
    return nn.Sequential(compress, *layers, nn.Linear(last[0], last[1]))
