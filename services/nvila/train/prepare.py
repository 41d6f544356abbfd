"""A sample to the numbers that a training step needs: tiles of its media, and ids, labels and places of its positions.

All that a processor can do before the model is asked: it runs in the feeding processes (`train/feed.py`), and its
result travels as flat arrays. The layout is the one that serving makes (`model/prompt.py`), so a model is trained on
exactly the positions that it will be asked with.

N tiles · U different ones among them · S tile side · P prompt positions · T visual tokens of the sample · M media
items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nvila.errors import InvalidRequest
from nvila.model.config import NvilaConfig
from nvila.model.cost import levels
from nvila.model.preprocess import resize_exact, split_frames, split_image
from nvila.model.prompt import Layout, TextIds
from nvila.model.time_tokens import encode_times
from nvila.model.tokenizer import ChatTokenizer
from nvila.train.data.draw import COLOURS, SHAPES
from nvila.train.data.tasks.describing import place
from nvila.train.data.tasks.truth import COLOR, LETTER, LETTERS, SHAPE
from nvila.train.labels import label_answers
from nvila.train.loss import IGNORE
from nvila.train.samples import Sample, SampleMedia
from nvila.types import MediaKind, MediaPart, Message, PromptMedia, Role, TextPart, TokensRef

COLOUR_NAMES = tuple(COLOURS)

VISUAL = -1
"""In `ids_P`: a visual token stands here, the next of `rows_V`."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """`frames`: a video's, one of them drawn per sample (by the sample's own index). `max_positions`: the rest of a
    sample is cut off. `tiles_every_image`: as the reference trains (NVILA-SPEC §8.1); serving tiles a single image.
    `names_patches`: no question is answered, but what each patch of a tile shows is named. `names_tokens`: of pictures
    with truth about their pixels the language model names what each visual token shows, or where it is, besides
    answering. `asks_apart`: three of four conversations about the same media are learned as if each question were the
    only one, and the sample's cues with them, behind media that are seen once (`Prepared.turns_P`): no answer can be
    copied from those before it. `spells`: numbers in answers, and all of an answer that is judged by its letters
    (`anls`), are learned letter by letter, which is how they are seen; they decode to the same text."""

    frames: tuple[int, ...] = (8,)
    max_positions: int = 8192
    tiles_every_image: bool = True
    names_patches: bool = False
    names_tokens: bool = False
    spells: bool = False
    asks_apart: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One media item's share of the tiles: how many, and how they belong together."""

    kind: MediaKind
    tiles: int
    block_size: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """tiles_USS3: uint8, each different tile once: most frames of a clip in which little happens are one picture.
    which_N: int64, for each tile of the media the row of tiles_USS3 that it is. ids_P: int64, `VISUAL` at visual
    tokens. labels_P: int64. rows_V: int64, for each visual position in order the row of the sample's visual tokens
    (media item after media item) that stands there. turns_P: int64, 0 for what all see, else the number of the question
    that a position belongs to, which sees nothing of the other questions and stands right behind what all see."""

    tiles_USS3: NDArray[np.uint8]
    which_N: NDArray[np.int64]
    items: tuple[Item, ...]
    ids_P: NDArray[np.int64]
    labels_P: NDArray[np.int64]
    rows_V: NDArray[np.int64]
    turns_P: NDArray[np.int64]
    visual_rows: int = 0
    """T: rows of visual tokens that its media give."""
    source: str = ""

    @property
    def positions(self) -> int:
        return len(self.ids_P)

    @property
    def targets(self) -> int:
        """Labels that count; the first of a sample never does."""
        return int((self.labels_P[1:] >= 0).sum())


def prepare(sample: Sample, config: NvilaConfig, tokenizer: ChatTokenizer, settings: PrepareSettings) -> Prepared:
    """Tile, tokenise, label and lay out one sample. Raises `InvalidRequest` for one that cannot be."""
    if settings.names_patches:
        if sample.truth_KHW is None:
            raise InvalidRequest(f"{sample.name} has no truth about its pixels: the recipe is for other data")
        return _labelled_patches(sample, sample.truth_KHW, config)
    is_tiled = config.can_tile and (settings.tiles_every_image or _is_single_image(sample.media))
    tiled = [_tiles(media, sample, config, settings, is_tiled) for media in sample.media]
    media = [item[2] for item in tiled]
    told = _timed(sample, config)
    is_apart = bool(settings.asks_apart and sample.index % 4 and sample.media)
    laid = [
        _lay_out(messages, media, sample, config, tokenizer, settings)
        for messages in (_apart(told) if is_apart else [told])
    ]
    (ids, labels, rows), turns = laid[0], np.zeros(len(laid[0][0]), np.int64)
    if is_apart:
        ids, labels, turns = _side_by_side(
            laid, [_cue(cue, _timed_text(answer, sample, config), tokenizer) for cue, answer in sample.cues]
        )
    if settings.names_tokens and sample.truth_KHW is not None:
        block_size = tiled[0][0].block_size or (1, 1)
        _name_tokens(labels, np.flatnonzero(ids == VISUAL), block_size, sample, sample.truth_KHW, tokenizer)
    if len(ids) > settings.max_positions:
        ids, labels, turns = (array[: settings.max_positions] for array in (ids, labels, turns))
        rows = rows[: int((ids == VISUAL).sum())]
    side = config.tile_px
    tiles_NSS3 = np.concatenate([item[1] for item in tiled]) if tiled else np.zeros((0, side, side, 3), np.uint8)
    tiles_USS3, which_N = _different(tiles_NSS3)
    return Prepared(
        tiles_USS3=tiles_USS3,
        which_N=which_N,
        items=tuple(item[0] for item in tiled),
        ids_P=ids,
        labels_P=labels,
        rows_V=rows,
        turns_P=turns,
        visual_rows=sum(item.records[0].tokens for item in media),
        source=sample.name,
    )


def _apart(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Of a conversation whose media are all in its first message, each question with its answer as one of its own."""
    first, *others = (message for message in messages if message.role is Role.USER)
    answers = [message for message in messages if message.role is Role.ASSISTANT]
    if any(message.role is Role.SYSTEM for message in messages) or len(answers) != len(others) + 1:
        return [tuple(messages)]
    seen = tuple(part for part in first.parts if isinstance(part, MediaPart))
    asked = [first, *(replace(other, parts=(*seen, *other.parts)) for other in others)]
    return [*zip(asked, answers, strict=True)]


def _cue(cue: str, answer: str, tokenizer: ChatTokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids_P and labels_P of a question without a template around it."""
    asked, said = tokenizer.encode(" " + cue), tokenizer.encode(answer)
    return np.array([*asked, *said], np.int64), np.array([IGNORE] * len(asked) + said, np.int64)


def _side_by_side(
    laid: Sequence[tuple[NDArray[np.int64], ...]], cues: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """ids_P, labels_P and turns_P: what all conversations begin with, to the last visual token, once; then the rest of
    each, and the cues."""
    begin = int(np.flatnonzero(laid[0][0] == VISUAL)[-1]) + 1
    runs = [
        (laid[0][0][:begin], laid[0][1][:begin]),
        *((ids[begin:], labels[begin:]) for ids, labels, _ in laid),
        *cues,
    ]
    ids, labels = (np.concatenate([run[kind] for run in runs]) for kind in (0, 1))
    return ids, labels, np.repeat(np.arange(len(runs)), [len(run[0]) for run in runs])


def _lay_out(
    messages: Sequence[Message],
    media: Sequence[PromptMedia],
    sample: Sample,
    config: NvilaConfig,
    tokenizer: ChatTokenizer,
    settings: PrepareSettings,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """ids_P, labels_P and rows_V of one conversation."""
    labelled = label_answers(messages, media, tokenizer, config)
    ids, rows = _places(labelled.layout, media)
    labels = np.array(labelled.labels, np.int64)
    if settings.spells:
        ids, labels = _spelled(ids, labels, tokenizer, spells_words=sample.metric == "anls")
    return ids, labels, rows


ASIDE = (-6, 0, 6)
"""Pixels from a patch's centre to where its letters are asked for: small ones stand several in a patch."""
UNLABELLED = 0.6
"""Share of the places that show nothing of a kind which is not asked about it."""
SPACE = "\u0120"
"""In the spelling of byte-level tokens."""


def _labelled_patches(sample: Sample, truth_KHW: NDArray[np.uint8], config: NvilaConfig) -> Prepared:
    """One tile, and for every patch of it: shape and colour at its centre, letters there and aside. labels_P: five
    labels for each patch, one after the other, behind one that is none."""
    side, patch = config.tile_px, config.tower.patch_px
    middle = np.arange(patch // 2, side, patch) * truth_KHW.shape[1] // side
    letters_HW = truth_KHW[-1]
    aside = [letters_HW[middle[:, None], np.clip(middle + by, 0, letters_HW.shape[1] - 1)[None]] for by in ASIDE]
    seen_KT = np.stack([truth_KHW[0][np.ix_(middle, middle)], truth_KHW[1][np.ix_(middle, middle)], *aside])
    labels = seen_KT.reshape(len(seen_KT), -1).T.astype(np.int64).reshape(-1)
    chance = np.random.Generator(np.random.PCG64(sample.index)).random(len(labels))
    labels[(labels == 0) & (chance < UNLABELLED)] = IGNORE
    tile_1SS3 = resize_exact(sample.media[0].frames_FHWC[0], side, side)[None]
    return Prepared(
        tiles_USS3=tile_1SS3,
        which_N=np.zeros(1, np.int64),
        items=(Item(kind=MediaKind.IMAGE, tiles=1, block_size=None),),
        ids_P=np.zeros(len(labels) + 1, np.int64),
        labels_P=np.concatenate([[IGNORE], labels]),
        rows_V=np.zeros(0, np.int64),
        turns_P=np.zeros(len(labels) + 1, np.int64),
        source=sample.name,
    )


def _spelled(
    ids_P: NDArray[np.int64], labels_P: NDArray[np.int64], tokenizer: ChatTokenizer, *, spells_words: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Learned positions whose token stands for several letters, as one position for each letter."""
    ids: list[int] = []
    labels: list[int] = []
    added = tokenizer.backend.get_added_tokens_decoder()
    for token_id, label in zip(ids_P.tolist(), labels_P.tolist(), strict=True):
        letters = (tokenizer.token_of(label) or "") if label >= 0 and label not in added else ""
        is_spelled = len(letters) > 1 and (spells_words or not any(map(str.isalpha, letters.removeprefix(SPACE))))
        spelled = [tokenizer.id_of(letter) for letter in letters] if is_spelled else [token_id]
        ids += spelled
        labels += spelled if is_spelled else [label]
    return np.array(ids, np.int64), np.array(labels, np.int64)


def _name_tokens(
    labels_P: NDArray[np.int64],
    visual_V: NDArray[np.int64],
    block_size: tuple[int, int],
    sample: Sample,
    truth_KHW: NDArray[np.uint8],
    tokenizer: ChatTokenizer,
) -> None:
    """What a visual token shows is to be said right where it stands: the letter in its middle or beside it, else the
    shape, its colour, or in which row or column of thirds it is. Answers alone teach too slowly how visual tokens
    read, and hardly where they are."""
    tiles = block_size[0] * block_size[1]
    side = math.isqrt(len(visual_V) // tiles)
    if tiles * side**2 != len(visual_V) or visual_V[-1] + 1 >= len(labels_P):
        raise InvalidRequest(f"{sample.name}: only visual tokens of one picture can be named, not {len(visual_V)}")
    cells = (block_size[0] * side, block_size[1] * side)
    rows, columns = (
        (np.arange(count) * 2 + 1) * size // (2 * count) for count, size in zip(cells, truth_KHW.shape[1:], strict=True)
    )
    beside = truth_KHW.shape[2] // (4 * cells[1])
    letter_V, *others = (
        truth_KHW[LETTER][rows[:, None], columns[None] + by].reshape(-1) for by in (0, -beside, beside)
    )
    for other_V in others:
        letter_V = np.where(letter_V == 0, other_V, letter_V)
    shape_V, color_V = (truth_KHW[kind][rows[:, None], columns[None]].reshape(-1) for kind in (SHAPE, COLOR))
    chance_V3 = np.random.Generator(np.random.PCG64(sample.index)).random((len(visual_V), 3))
    for at, cell, letter, shape, color, (which, word, unlabelled) in zip(
        visual_V, np.ndindex(cells), letter_V, shape_V, color_V, chance_V3, strict=True
    ):
        where = place((cell[1] + 0.5) / cells[1], (cell[0] + 0.5) / cells[0]).split()
        if letter:
            name = LETTERS[letter - 1]
        elif shape and which < 2 / 3:
            name = " " + (SHAPES[shape - 1] if which < 1 / 3 else COLOUR_NAMES[color - 1])
        elif shape or unlabelled > UNLABELLED:
            name = where[int(word * len(where))]
        else:
            continue
        labels_P[at + 1] = tokenizer.encode(name)[0]


def _different(tiles_NSS3: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """tiles_USS3 and which_N (`Prepared`)."""
    rows: dict[bytes, int] = {}
    which_N = np.array([rows.setdefault(tile_SS3.tobytes(), len(rows)) for tile_SS3 in tiles_NSS3], np.int64)
    if len(rows) == len(which_N):
        return tiles_NSS3, which_N
    return tiles_NSS3[np.unique(which_N, return_index=True)[1]], which_N


def _is_single_image(media: Sequence[SampleMedia]) -> bool:
    return len(media) == 1 and media[0].kind is MediaKind.IMAGE


def _tiles(
    media: SampleMedia, sample: Sample, config: NvilaConfig, settings: PrepareSettings, is_tiled: bool
) -> tuple[Item, NDArray[np.uint8], PromptMedia]:
    if media.kind is MediaKind.VIDEO:
        count = settings.frames[sample.index % len(settings.frames)]
        group = config.temporal_group
        frames_FSS3 = media.look(-(-count // group) * group, config.tile_px)
        pieces = split_frames(config, frames_FSS3)
        record = levels(config, kind=media.kind, is_tiled=False, frames=len(frames_FSS3), pool_sizes=config.pool_sizes)
        is_tiled = False
    else:
        rgb_HWC = media.frames_FHWC[0]
        pieces = split_image(config, rgb_HWC, is_tiled)
        height, width = rgb_HWC.shape[:2]
        record = levels(config, kind=media.kind, is_tiled=is_tiled, width_px=width, height_px=height)
    item = Item(kind=media.kind, tiles=len(pieces.tiles_NHWC), block_size=pieces.block_size)
    ref = TokensRef(key=str(id(media)), levels=record)
    return item, pieces.tiles_NHWC, PromptMedia(kind=media.kind, is_tiled=is_tiled, records=(ref,))


def _timed(sample: Sample, config: NvilaConfig) -> tuple[Message, ...]:
    """Seconds in answers become time tokens, where the model has them and the sample a video; questions stay."""
    return tuple(
        replace(
            message,
            parts=tuple(
                TextPart(_timed_text(part.text, sample, config)) if isinstance(part, TextPart) else part
                for part in message.parts
            ),
        )
        if message.role is Role.ASSISTANT
        else message
        for message in sample.messages
    )


def _timed_text(text: str, sample: Sample, config: NvilaConfig) -> str:
    if not config.time_tokens or sample.duration_s <= 0:
        return text
    return encode_times(text, sample.duration_s, config.time_tokens, config.time_token_format)


def _places(layout: Layout, media: Sequence[PromptMedia]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids with gaps for visual tokens, and the rows that fill them."""
    first = np.cumsum([0, *(item.records[0].tokens for item in media)])
    ids: list[int] = []
    rows: list[NDArray[np.int64]] = []
    for segment in layout.segments:
        if isinstance(segment, TextIds):
            ids += segment.ids
            continue
        ids += [*segment.before, *[VISUAL] * segment.tokens, *segment.after]
        at = int(first[segment.media]) + segment.first_row
        rows.append(np.arange(at, at + segment.tokens, dtype=np.int64))
    return np.array(ids, np.int64), np.concatenate(rows) if rows else np.zeros(0, np.int64)


def check_fits(prepared: Prepared, max_positions: int) -> None:
    """Raises `InvalidRequest` for a sample that a row cannot hold, or that has nothing to learn from."""
    if prepared.positions > max_positions:
        raise InvalidRequest(f"{prepared.source} has {prepared.positions} positions; a row holds {max_positions}")
    if not prepared.targets:
        raise InvalidRequest(f"{prepared.source} has no answer to learn within {max_positions} positions")
