"""Compression that learns, at the same token ratio as space-to-channel: what the paper compares it with.

NVILA (arXiv:2412.04468, "scale then compress") weighs its plain spatial pooling against TokenLearner and the Perceiver
resampler and keeps the pooling. These are the two alternatives, to train and measure: `mm_projector_type`
`token_learner_2x2`, `token_learner_3x3`, `resampler_2x2`, `resampler_3x3`. A tile's tokens become as many as the
pooling of that size gives, so that everything behind, counts and costs included, is the same.

Their tokens have no place in the picture, unlike those of pooling: pooling over time still averages like with like,
pooling over rows and columns does not.

N tiles · T tokens of a tile · M tokens after compression · C channels · D language-model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nvila.errors import InvalidCheckpoint
from nvila.model.compress import square_side
from nvila.model.config import TOKEN_LEARNER_WIDTH

HEAD_WIDTH = 128
"""Of the resampler's attention (`embed_dim // 128` heads, openbmb/MiniCPM-V resampler.py)."""

SPREAD = 0.02
"""Standard deviation of fresh resampler weights, as MiniCPM-V's."""


class TokenLearner(nn.Module):
    """Each new token is a weighted mean of all tokens, the weights being learned from the tokens themselves.

    TokenLearner v1.1 (arXiv:2106.11297; `TokenLearnerModuleV11` of google-research/scenic): a small network gives every
    token one score per new token; softmax over the tokens. (N, T, C) to (N, M, C).
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, TOKEN_LEARNER_WIDTH),
            nn.GELU(),
            nn.Linear(TOKEN_LEARNER_WIDTH, tokens),
        )

    def forward(self, x_NTC: Tensor) -> Tensor:
        weights_NTM = self.scores(x_NTC).softmax(1)
        means_NMC: Tensor = weights_NTM.transpose(1, 2) @ x_NTC
        return means_NMC


class Resampler(nn.Module):
    """Each new token is what a learned query finds among the tokens: one cross-attention, then a projection.

    Perceiver resampler as in MiniCPM-V (arXiv:2408.01800, resampler.py): keys and values at the language model's width,
    keys with two-dimensional sine positions, norms before and after. (N, T, C) to (N, M, D).
    """

    def __init__(self, width: int, llm_width: int, tokens: int) -> None:
        super().__init__()
        if llm_width % 4:
            raise InvalidCheckpoint(f"a resampler's width must be a multiple of 4, not {llm_width}")
        heads = llm_width // HEAD_WIDTH if llm_width % HEAD_WIDTH == 0 else 1
        self.query = nn.Parameter(torch.empty(tokens, llm_width))
        self.key_value = nn.Linear(width, llm_width, bias=False)
        self.query_norm = nn.LayerNorm(llm_width)
        self.key_norm = nn.LayerNorm(llm_width)
        self.attention = nn.MultiheadAttention(llm_width, heads, batch_first=True)
        self.norm = nn.LayerNorm(llm_width)
        self.project = nn.Linear(llm_width, llm_width, bias=False)
        for weight in (self.query, self.key_value.weight, self.project.weight):
            nn.init.trunc_normal_(weight, std=SPREAD)

    def forward(self, x_NTC: Tensor) -> Tensor:
        values_NTD = self.key_norm(self.key_value(x_NTC))
        keys_NTD = values_NTD + sine_positions(square_side(x_NTC.shape[1]), values_NTD)
        query_NMD = self.query_norm(self.query).expand(len(x_NTC), -1, -1)
        found_NMD, _ = self.attention(query_NMD, keys_NTD, values_NTD, need_weights=False)
        projected: Tensor = self.project(self.norm(found_NMD))
        return projected


def sine_positions(side: int, like: Tensor) -> Tensor:
    """(side², D) in the dtype and on the device of `like`, whose last axis is D: half of the channels tell the column,
    half the row, each half sines and cosines at wavelengths from 2π to 2π · 10,000."""
    quarter = like.shape[-1] // 4
    rates = torch.exp(torch.arange(quarter, device=like.device) * (-math.log(10_000) / quarter))
    angles = torch.arange(side, device=like.device)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)
    return grid.to(like.dtype)
