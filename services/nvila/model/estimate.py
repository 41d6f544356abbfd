"""What a request costs, from sizes alone: tiles, tokens, positions, operations, bytes, and whether it fits.

One sum over `model/cost.py`'s parts; the gateway's limits and `POST /v1/estimate` use it before any pixel is decoded,
and a test holds it equal to what the encoder makes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from nvila.errors import LimitExceeded
from nvila.model import cost
from nvila.model.config import ImageMode, NvilaConfig
from nvila.types import Level, MediaKind, Message, RecordingCoverage, Role, TextPart, TokenDtype

VALUE_BYTES = 2
"""Of a key or value in the language model's cache, and of its arithmetic, unless that is float32."""

MOST_PADDED_PX = 16_384
"""Longer side of a picture in `pad` mode: its square has to be gone over, however thin it is."""
PAD_STRIP_PX = 1 << 20
"""Of a picture's square in `pad` mode, made at a time (or one row, where that is more)."""


@dataclass(frozen=True, kw_only=True)
class MediaSize:
    """A media item as its headers and the frame plan describe it.

    Sizes in pixels are the file's own. `runs`: frames of each chunk as they are encoded, whole temporal groups; an
    image is one run of one frame.
    """

    kind: MediaKind
    is_tiled: bool
    width_px: int
    height_px: int
    runs: tuple[int, ...]
    pool_sizes: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class MediaCost:
    """`grid`: (columns, rows) of the tiled picture, else (1, 1). `tiles`: that the tower computes. `tokens`: visual
    ones. `positions`: of the language model, with what stands around the tokens. `record_bytes`: payload of all
    records. `pixel_bytes`: most that preparing one chunk holds at a time (`preparation_bytes`)."""

    kind: MediaKind
    grid: tuple[int, int]
    frames: int
    chunks: int
    tiles: int
    levels: tuple[Level, ...]
    tokens: int
    positions: int
    record_bytes: int
    pixel_bytes: int
    recording: RecordingCoverage | None = None
    """Of a recording's window, whose tokens are there already; then the numbers above are the largest call's."""


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """`text_at_most`: positions of the text, an upper bound. Operations are floating-point ones, a multiply-add is two.
    `kv_cache_bytes`: of prompt and longest answer."""

    media: tuple[MediaCost, ...]
    text_at_most: int
    answer_tokens: int
    longest: int
    tower_flops: float
    projector_flops: float
    prefill_flops: float
    record_bytes: int
    kv_cache_bytes: int

    def visual(self, kind: MediaKind | None = None) -> int:
        """Positions of media, of one kind or all."""
        return sum(one.positions for one in self.media if kind in (None, one.kind))

    @property
    def positions_at_most(self) -> int:
        return self.visual() + self.text_at_most

    @property
    def excess(self) -> str | None:
        """Why the media cannot fit, whatever the text is; None when they can."""
        if self.visual() + self.answer_tokens < self.longest:
            return None
        return (
            f"visual tokens: {self.visual():,} asked, at most {max(self.longest - self.answer_tokens, 0):,} allowed "
            f"({self.longest:,} of the model less {self.answer_tokens:,} for the answer); "
            "ask for fewer frames, fewer media or a shorter answer"
        )

    @property
    def fits(self) -> bool | None:
        """None: the media fit, and whether the text does too only its exact length can tell."""
        if self.excess is not None:
            return False
        return True if self.positions_at_most < self.longest else None


def media_cost(config: NvilaConfig, size: MediaSize, dtype: TokenDtype) -> MediaCost:
    """Raises `InvalidRequest` where a pooling level does not divide a run, `LimitExceeded` for a picture whose square
    would be huge."""
    side = max(size.width_px, size.height_px)
    if size.kind is MediaKind.IMAGE and config.image_mode is ImageMode.PAD and side > MOST_PADDED_PX:
        raise LimitExceeded.of("pixels on a side of a picture to be padded", asked=side, limit=MOST_PADDED_PX)
    runs = [_levels(config, size, frames) for frames in size.runs]
    levels = cost.join_levels(runs)
    is_woven = size.kind is MediaKind.IMAGE and size.is_tiled and config.can_tile
    tiles = [_tiles(config, size, frames) for frames in size.runs]
    return MediaCost(
        kind=size.kind,
        grid=cost.tile_grid(config, size.width_px, size.height_px) if is_woven else (1, 1),
        frames=sum(size.runs),
        chunks=len(size.runs),
        tiles=sum(tiles),
        levels=levels,
        tokens=cost.tokens(levels),
        positions=cost.positions(config, kind=size.kind, is_tiled=size.is_tiled, levels=levels),
        record_bytes=sum(cost.record_bytes(run, config.llm_width, dtype) for run in runs),
        pixel_bytes=max((preparation_bytes(config, size, count) for count in tiles), default=0),
    )


def request_cost(
    config: NvilaConfig,
    media: Sequence[MediaSize | MediaCost],
    messages: Sequence[Message],
    *,
    answer_tokens: int,
    longest: int,
    dtype: TokenDtype,
) -> RequestCost:
    """`media`: sizes, or the costs of items that know theirs. `longest`: positions that the served model takes, prompt
    and answer. `dtype`: of the token records, which are float32 only for a model that computes so."""
    items = tuple(one if isinstance(one, MediaCost) else media_cost(config, one, dtype) for one in media)
    text = text_at_most(messages)
    prompt = sum(item.positions for item in items) + text
    plans = [item.recording.plan for item in items if item.recording is not None and item.recording.plan.calls > 1]
    value_bytes = 4 if dtype is TokenDtype.FLOAT32 else VALUE_BYTES
    return RequestCost(
        media=items,
        text_at_most=text,
        answer_tokens=answer_tokens,
        longest=longest,
        tower_flops=cost.tower_flops(config, sum(item.tiles for item in items)),
        projector_flops=sum(cost.projector_flops(config, _projected_tiles(config, item)) for item in items),
        prefill_flops=sum(plan.prefill_flops for plan in plans) or cost.prefill_flops(config, prompt),
        record_bytes=sum(item.record_bytes for item in items),
        kv_cache_bytes=cost.kv_bytes(config, prompt + answer_tokens, value_bytes),
    )


def text_at_most(messages: Sequence[Message]) -> int:
    """Positions of a conversation's text in NVILA's chat template: byte-level BPE makes at most one token of a byte.

    Bytes of the text as the tokenizer normalises it (NFC); per turn two control tokens, a role and two newlines; the
    system turn that the template adds, and the opened answer. A checkpoint with a longer template of its own has more.
    """
    turns = [(message.role.value, _text(message)) for message in messages]
    if not turns or messages[0].role is not Role.SYSTEM:
        turns.insert(0, (Role.SYSTEM.value, "You are a helpful assistant"))
    return sum(4 + len(role) + len(text.encode()) for role, text in turns) + 2 + len(Role.ASSISTANT.value)


def _text(message: Message) -> str:
    return unicodedata.normalize("NFC", "".join(part.text for part in message.parts if isinstance(part, TextPart)))


def preparation_bytes(config: NvilaConfig, size: MediaSize, tiles: int) -> int:
    """Most bytes that pixels of one chunk take on their way to the tower: decoded frames (twice: as they are, and as
    the resize takes them; in `pad` mode with a strip of their square), the picture between the two passes of a resize,
    tiles in 8 bits (cut, joined and channels first) and as float32 pixel values. Small whatever the picture's shape
    (its sides are bounded, video/media.py); weights and features not counted.
    """
    S, pixel = config.tile_px, 3
    if size.kind is MediaKind.VIDEO:
        source, between = tiles * S * S, 0
    else:
        columns, _ = cost.tile_grid(config, size.width_px, size.height_px) if size.is_tiled else (1, 1)
        side = max(size.width_px, size.height_px)
        source = size.width_px * size.height_px
        if config.image_mode is ImageMode.PAD:
            source += max(PAD_STRIP_PX, side)
        largest = max([columns, *(scale // S for scale in config.s2_scales[:-1])])
        between = largest * S * max(side if config.image_mode is ImageMode.PAD else size.height_px, largest * S)
    return pixel * (2 * source + 2 * between + tiles * S * S * (4 + 2 * 4))


def _levels(config: NvilaConfig, size: MediaSize, frames: int) -> tuple[Level, ...]:
    return cost.levels(
        config,
        kind=size.kind,
        is_tiled=size.is_tiled,
        width_px=size.width_px,
        height_px=size.height_px,
        frames=frames,
        pool_sizes=size.pool_sizes,
    )


def _tiles(config: NvilaConfig, size: MediaSize, frames: int) -> int:
    return cost.tower_tiles(
        config,
        kind=size.kind,
        is_tiled=size.is_tiled,
        width_px=size.width_px,
        height_px=size.height_px,
        frames=frames,
    )


def _projected_tiles(config: NvilaConfig, item: MediaCost) -> int:
    """The projector runs once per tile, after the scales of a Dynamic-S2 picture were merged, and before pooling."""
    is_merged = item.kind is MediaKind.IMAGE and config.image_mode is ImageMode.DYNAMIC_S2
    return item.tokens // config.side**2 if is_merged else item.tiles
