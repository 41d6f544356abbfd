"""Where visual tokens stand among text (NVILA-SPEC §5.3, §6.2-6.4): a conversation to a layout to embeddings.

The chat template never sees what users wrote: it is rendered around stand-ins, and control tokens are read only from
what the template itself says. So no text of a user can open a turn, close one, or pose as media.

P prompt positions · T visual tokens of a record · D language-model width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.model.config import ImageMode, NvilaConfig
from nvila.model.cost import join_levels, wrap_of
from nvila.model.tokenizer import IMAGE, VIDEO, ChatTokenizer
from nvila.types import MediaKind, MediaPart, Message, PromptMedia, PromptUsage, Role, TextPart


@dataclass(frozen=True)
class TextIds:
    """A run of text."""

    ids: tuple[int, ...]

    @property
    def positions(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One tile, frame, pooled frame or whole Dynamic-S2 image: `tokens` rows of record `key` from `first_row` on.

    `media`, `record`, `level`, `block` say which: the media item, its record (chunk), the pooling level, and the block
    within the record's level. `before` and `after`: text ids whose embeddings surround the rows; the last block of a
    pooling level carries the separator too.
    """

    media: int
    kind: MediaKind
    record: int
    level: int
    block: int
    key: str
    first_row: int
    tokens: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def positions(self) -> int:
        return len(self.before) + self.tokens + len(self.after)


Segment = TextIds | Block


@dataclass(frozen=True)
class Layout:
    """A prompt in order. `usage.cached` is 0: only the engine knows."""

    segments: tuple[Segment, ...]

    @property
    def usage(self) -> PromptUsage:
        """Positions by modality; the newlines between the tiles of a `dynamic` image are text."""
        image = sum(s.positions for s in self.segments if isinstance(s, Block) and s.kind is MediaKind.IMAGE)
        video = sum(s.positions for s in self.segments if isinstance(s, Block) and s.kind is MediaKind.VIDEO)
        text = sum(s.positions for s in self.segments if isinstance(s, TextIds))
        return PromptUsage(text=text, image=image, video=video)

    @property
    def keys(self) -> tuple[str, ...]:
        """The records needed, in the order of first use."""
        return tuple(dict.fromkeys(s.key for s in self.segments if isinstance(s, Block)))


def lay_out(
    messages: Sequence[Message],
    media: Sequence[PromptMedia],
    tokenizer: ChatTokenizer,
    config: NvilaConfig,
    *,
    add_generation_prompt: bool = True,
) -> Layout:
    """The prompt of a conversation, ready for the answer (or, without generation prompt, complete as it is).

    Raises `InvalidRequest` for no messages, media in a system message, a media item that no part or more than one part
    stands for, and records that disagree about their layout.
    """
    contents = message_contents(messages, media, config)
    roles = [message.role for message in messages]
    return compose(roles, contents, tokenizer, add_generation_prompt=add_generation_prompt)


def message_contents(
    messages: Sequence[Message], media: Sequence[PromptMedia], config: NvilaConfig
) -> list[list[Piece]]:
    """What the template puts between the marks of each message's turn; raises as `lay_out` does."""
    _check(messages, media)
    pieces_by_media = [media_pieces(index, item, config) for index, item in enumerate(media)]
    return [_stripped(message_pieces(message, pieces_by_media)) for message in messages]


def compose(
    roles: Sequence[Role],
    contents: Sequence[Sequence[int | Piece]],
    tokenizer: ChatTokenizer,
    *,
    add_generation_prompt: bool,
) -> Layout:
    """The chat template around contents: text, blocks, and ids of control tokens that stand for themselves."""
    turns = [(role.value, _stand_in(i)) for i, role in enumerate(roles)]
    rendered = tokenizer.render(turns, add_generation_prompt=add_generation_prompt)
    return Layout(tuple(_joined(_fill(tokenizer.split_markup(rendered), contents), tokenizer)))


def splice(
    segments: Iterable[Segment], embed: Callable[[Tensor], Tensor], values_by_key: Mapping[str, Tensor]
) -> Tensor:
    """Input embeddings (P, D) of segments, or of a first part of them, in the dtype and on the device of the text's.

    `embed`: int64 ids (n,) to rows (n, D) of the language model's table. `values_by_key`: (T, D) of every record named.
    Raises `InvalidRequest` when a record has too few rows or another width.
    """
    segments = tuple(segments)
    ids = [i for s in segments for i in (s.ids if isinstance(s, TextIds) else s.before + s.after)]
    text_PD = embed(torch.tensor(ids, dtype=torch.long))
    pieces: list[Tensor] = []
    at = 0
    for segment in segments:
        if isinstance(segment, TextIds):
            pieces.append(text_PD[at : at + len(segment.ids)])
            at += len(segment.ids)
            continue
        middle, end = at + len(segment.before), at + len(segment.before) + len(segment.after)
        pieces += [text_PD[at:middle], _rows(segment, values_by_key[segment.key], text_PD), text_PD[middle:end]]
        at = end
    return torch.cat(pieces)


def _rows(block: Block, values_TD: Tensor, like: Tensor) -> Tensor:
    last = block.first_row + block.tokens
    if values_TD.ndim != 2 or len(values_TD) < last or values_TD.shape[1] != like.shape[1]:
        raise InvalidRequest(
            f"record {block.key} is {tuple(values_TD.shape)}; at least {last} rows of width {like.shape[1]} are needed"
        )
    return values_TD[block.first_row : last].to(device=like.device, dtype=like.dtype)


def _check(messages: Sequence[Message], media: Sequence[PromptMedia]) -> None:
    if not messages:
        raise InvalidRequest("a conversation needs at least one message", param="messages")
    used: list[int] = []
    for message in messages:
        if message.role not in set(Role):
            raise InvalidRequest(f"unknown role {message.role!r}; known: {', '.join(Role)}", param="messages")
        indices = [part.index for part in message.parts if isinstance(part, MediaPart)]
        if indices and message.role is Role.SYSTEM:
            raise InvalidRequest("a system message cannot hold media", param="messages")
        used += indices
    if sorted(used) != list(range(len(media))):
        raise InvalidRequest(
            f"{len(media)} media items came; the messages stand for items {sorted(used)}", param="messages"
        )


# -- media ------------------------------------------------------------------------------------------------------------


def media_blocks(index: int, item: PromptMedia, config: NvilaConfig) -> Iterator[Block]:
    """All blocks of a media item: level by level over the whole item, and within a level record by record."""
    levels = join_levels(record.levels for record in item.records)
    if not levels or not all(level.blocks and level.tokens for level in levels):
        raise InvalidRequest(f"media item {index} has no visual tokens")
    wrap = wrap_of(config, item.kind)
    for depth, level in enumerate(levels):
        places = [(r, b) for r, record in enumerate(item.records) for b in range(record.levels[depth].blocks)]
        for record_index, block in places:
            record = item.records[record_index]
            above = sum(earlier.blocks * earlier.tokens for earlier in record.levels[:depth])
            yield Block(
                media=index,
                kind=item.kind,
                record=record_index,
                level=depth,
                block=block,
                key=record.key,
                first_row=above + block * level.tokens,
                tokens=level.tokens,
                before=wrap.start,
                after=wrap.end + (wrap.sep if (record_index, block) == places[-1] else ()),
            )


Piece = str | Block


def media_pieces(index: int, item: PromptMedia, config: NvilaConfig) -> tuple[Piece, ...]:
    """A media item's blocks; tiles of a `dynamic` image are images of their own, each before a newline (spec §2.6)."""
    blocks = tuple(media_blocks(index, item, config))
    if item.kind is MediaKind.IMAGE and item.is_tiled and config.image_mode is ImageMode.DYNAMIC:
        return tuple(piece for block in blocks for piece in (block, "\n"))
    return blocks


# -- text -------------------------------------------------------------------------------------------------------------


def message_pieces(message: Message, pieces_by_media: Sequence[Sequence[Piece]]) -> list[Piece]:
    """A message's text and media in order, texts that meet joined."""
    pieces: list[Piece] = []
    for part in message.parts:
        pieces += [_without_markers(part.text)] if isinstance(part, TextPart) else pieces_by_media[part.index]
    return list(_merged(pieces))


def _stripped(pieces: list[Piece]) -> list[Piece]:
    """Without white space at both ends, as the reference strips every message."""
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return pieces


def _without_markers(text: str) -> str:
    """Text with media markers taken out, and stripped if there were any (`extract_media` in llava/utils/media.py)."""
    for marker in (IMAGE, VIDEO):
        if marker in text:
            text = text.replace(marker, "").strip()
    return text


def _stand_in(index: int) -> str:
    return f"\ue000{index}\ue001"


def _fill(markup: Iterable[int | str], contents: Sequence[Sequence[int | Piece]]) -> Iterator[int | Piece]:
    """The rendered template with each stand-in replaced by the message's content."""
    for piece in markup:
        if isinstance(piece, int):
            yield piece
            continue
        for position, text in enumerate(re.split("\ue000(\\d+)\ue001", piece)):
            if position % 2:
                yield from contents[int(text)]
            else:
                yield text


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbouring texts joined: words may run across parts."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text


def _joined(pieces: Iterable[int | Piece], tokenizer: ChatTokenizer) -> Iterator[Segment]:
    """Text encoded in the longest runs that no control token or media interrupts, ids joined between media."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        ids += tokenizer.encode(text)
        text = ""
        if isinstance(piece, int):
            ids.append(piece)
            continue
        if ids:
            yield TextIds(tuple(ids))
        ids = []
        yield piece
    ids += tokenizer.encode(text)
    if ids:
        yield TextIds(tuple(ids))
