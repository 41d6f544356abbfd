"""The vision tower: SigLIP through `transformers`, up to the selected layer (NVILA-SPEC §3.1-3.2, §3.7).

NVILA takes the output of the last block but one, without the final norm; neither that block nor that norm is made.

N tiles · T tokens of a tile · C channels · S tile side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from nvila.model.config import TowerConfig


class Tower(nn.Module):
    """Pixels to patch features. Parameter names are those of `vision_tower/`, less the leading `vision_model.`."""

    def __init__(self, config: TowerConfig, tile_px: int, attention: str = "sdpa") -> None:
        super().__init__()
        siglip = siglip_config(config, tile_px, attention)
        self.embeddings = SiglipVisionEmbeddings(siglip)
        self.encoder = SiglipEncoder(siglip)

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) float of any dtype to (N, T, C) in the tower's dtype; tokens row by row."""
        weight = self.embeddings.patch_embedding.weight
        x_NTC = self.embeddings(pixels_N3SS.to(device=weight.device, dtype=weight.dtype))
        features: Tensor = self.encoder(inputs_embeds=x_NTC).last_hidden_state
        return features

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take these tensors, without copying, as the parameters; names and shapes are the caller's to have checked."""
        self.load_state_dict(weights, strict=True, assign=True)
        positions = self.embeddings.num_positions
        self.embeddings.position_ids = torch.arange(positions).expand(1, -1)


def siglip_config(config: TowerConfig, tile_px: int, attention: str = "sdpa") -> SiglipVisionConfig:
    """In the words of `transformers`, for the blocks that are computed."""
    return SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.blocks,
        num_attention_heads=config.heads,
        image_size=tile_px,
        patch_size=config.patch_px,
        layer_norm_eps=config.norm_eps,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation=attention,
    )


def resize_positions(table_TC: Tensor, tokens: int) -> Tensor:
    """The position table for another tile side, resampled as a list, not as a picture (`resize_position_embeddings`).

    The weights of both neighbours vanish where a new index falls on an old one, so those vectors, the first and the
    last among them, become zero. So the reference computes it, and so its models were tuned.
    """
    old = table_TC.shape[0]
    at = torch.arange(tokens, dtype=torch.float32) / (tokens - 1) * (old - 1)
    floor, ceil = at.floor(), at.ceil()
    below, above = table_TC[floor.long()].float(), table_TC[ceil.long()].float()
    return ((ceil - at)[:, None] * below + (at - floor)[:, None] * above).to(table_TC.dtype)
