"""The shapes of the published models, for arithmetic without their weights (NVILA-SPEC §1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nvila.model.config import ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap

_NEWLINE = Wrap(end=(198,))
"""One text newline after every block, the default of all published models; only the count matters here."""

_SIGLIP = TowerConfig(
    image_px=448, patch_px=14, width=1152, mlp_width=4304, layers=27, heads=16, norm_eps=1e-6, select_layer=-2
)


def _qwen2(width: int, mlp_width: int, layers: int, heads: int, kv_heads: int, *, is_tied: bool = False) -> LlmConfig:
    return LlmConfig(
        width=width,
        mlp_width=mlp_width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=128,
        vocab=151_936,
        is_tied=is_tied,
        max_positions=32_768,
        norm_eps=1e-6,
        rope_base=1e6,
    )


def nvila_8b() -> NvilaConfig:
    """Dynamic-S2: 14 to 17 tower tiles and 9 to 12 output tiles of 256 tokens per image; 8 frames per video."""
    return NvilaConfig(
        name="NVILA-8B",
        tower=_SIGLIP,
        llm=_qwen2(3584, 18_944, 28, 28, 4),
        image_mode=ImageMode.DYNAMIC_S2,
        tile_px=448,
        s2_scales=(448, 896, 1344),
        projector_type="mlp_downsample",
        projector_width=3456,
        image_wrap=_NEWLINE,
        video_wrap=_NEWLINE,
    )


def nvila_15b() -> NvilaConfig:
    return replace(nvila_8b(), name="NVILA-15B", llm=_qwen2(5120, 13_824, 48, 40, 8))


def nvila_8b_video() -> NvilaConfig:
    """One tile per picture; up to 256 frames, eight of which become one block of 256 tokens."""
    return NvilaConfig(
        name="NVILA-8B-Video",
        tower=_SIGLIP,
        llm=_qwen2(3584, 18_944, 28, 28, 4),
        image_mode=ImageMode.RESIZE,
        tile_px=448,
        projector_type="mlp_downsample_2x2_fix",
        projector_width=1152,
        image_wrap=_NEWLINE,
        video_wrap=_NEWLINE,
        pool_sizes=((8, 1, 1),),
        default_frames=256,
    )


def nvila_lite_8b() -> NvilaConfig:
    """1 to 12 tiles of 121 tokens and a thumbnail per image."""
    return NvilaConfig(
        name="NVILA-Lite-8B",
        tower=_SIGLIP,
        llm=_qwen2(3584, 18_944, 28, 28, 4),
        image_mode=ImageMode.DYNAMIC,
        tile_px=448,
        projector_type="mlp_downsample_3x3_fix",
        projector_width=1152,
        image_wrap=_NEWLINE,
        video_wrap=_NEWLINE,
    )


def nvila_lite_2b() -> NvilaConfig:
    return replace(nvila_lite_8b(), name="NVILA-Lite-2B", llm=_qwen2(1536, 8960, 28, 12, 2, is_tied=True))


PUBLISHED: tuple[Callable[[], NvilaConfig], ...] = (nvila_8b_video, nvila_8b, nvila_15b, nvila_lite_8b, nvila_lite_2b)
"""The first is the default of `nvila capacity`."""


def llm_parameters(llm: LlmConfig) -> int:
    """Weights of the language model: its matrices, embeddings and head."""
    attention = llm.width * llm.head_width * (2 * llm.heads + 2 * llm.kv_heads)
    layers = llm.layers * (attention + 3 * llm.width * llm.mlp_width)
    return layers + llm.vocab * llm.width * (1 if llm.is_tied else 2)


def step_parameters(llm: LlmConfig) -> int:
    """Weights that one decoding step reads: all but the embedding table, of which it needs a row."""
    return llm_parameters(llm) - (0 if llm.is_tied else llm.vocab * llm.width)
