"""Recorded prompts: the template, the media in it, the answers' labels, and what a tokenizer says of generation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from nvila.golden.compare import Case, Check, Golden, equal
from nvila.golden.inputs import shape
from nvila.model.prompt import Block, Layout, lay_out, media_pieces, message_pieces
from nvila.model.tokenizer import IMAGE, VIDEO, ChatTokenizer
from nvila.train.labels import label_answers
from nvila.types import Level, MediaKind, MediaPart, Message, PromptMedia, Role, TextPart, TokensRef

ROLES = {"system": Role.SYSTEM, "human": Role.USER, "gpt": Role.ASSISTANT}
MARKERS = {IMAGE: MediaKind.IMAGE, VIDEO: MediaKind.VIDEO}


def conversation(golden: Golden) -> Iterator[Case]:
    tokenizer = ChatTokenizer.open(golden.checkpoint(golden.content["tokenizer"]))
    known = ("media_token_ids", "stop_tokens", "stop_token_ids", "default_generation_config", "newline_token_ids")
    yield from golden.others(*known, "tokenize_conversation", "preprocess_conversation", "extract_media")
    yield Case("conversation/tokens", partial(_tokens, golden.content, tokenizer))
    yield Case("conversation/generation", partial(_generation, golden.content, tokenizer))
    for i, entry in enumerate(golden.content.get("tokenize_conversation", [])):
        yield Case(f"conversation/tokenize {i}", partial(_tokenize, entry, tokenizer))
    for i, entry in enumerate(golden.content.get("preprocess_conversation", [])):
        yield Case(f"conversation/labels {i}", partial(_labels, entry, tokenizer))
    for i, entry in enumerate(golden.content.get("extract_media", [])):
        yield Case(f"conversation/extract {i}", partial(_extract, entry))


def _tokens(content: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[Check]:
    yield from equal("image id", tokenizer.image_id, content["media_token_ids"]["image"])
    yield from equal("video id", tokenizer.video_id, content["media_token_ids"]["video"])
    yield from equal("sentinel id", tokenizer.sentinel_id, content["sentinel_token_id"])
    yield from equal("stop ids", list(tokenizer.stop_ids), content["stop_token_ids"])
    yield from equal("stop tokens", [tokenizer.token_of(i) for i in tokenizer.stop_ids], content["stop_tokens"])
    yield from equal("size", tokenizer.size, content["len_tokenizer_after_load"])
    yield from equal("newline", tokenizer.encode("\n"), content["newline_token_ids"])


def _generation(content: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[Check]:
    """The reference makes these from the tokenizer, not from the language model's own file (spec §6.7)."""
    defaults = {
        "max_length": tokenizer.max_length,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
    }
    yield from equal("generation defaults", defaults, content["default_generation_config"])


def _tokenize(entry: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[Check]:
    messages, media = recorded_messages(entry["conversation"], has_system=not entry["no_system_prompt"])
    is_prompt = entry["add_generation_prompt"]
    layout = lay_out(messages, media, tokenizer, shape(), add_generation_prompt=is_prompt)
    yield from equal("ids", with_markers(layout, tokenizer), entry["input_ids"])
    turns = [(ROLES[turn["from"]].value, turn["value"].strip()) for turn in entry["conversation"]]
    empty = [("system", "")] if entry["no_system_prompt"] else []
    yield from equal("text", tokenizer.render(empty + turns, add_generation_prompt=is_prompt), entry["text"])


def _labels(entry: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[Check]:
    messages, media = recorded_messages(entry["conversation"], has_system=not entry["no_system_prompt"])
    labelled = label_answers(messages, media, tokenizer, shape())
    yield from equal("ids", with_markers(labelled.layout, tokenizer), entry["input_ids"])
    yield from equal("labels", labels_before_splice(labelled.layout, labelled.labels), entry["labels"])


def _extract(entry: dict[str, Any]) -> Iterator[Check]:
    media = [placeholder(MediaKind.IMAGE)] * entry["parts"].count("IMG")
    numbers = count()
    parts = tuple(MediaPart(next(numbers)) if part == "IMG" else TextPart(part) for part in entry["parts"])
    blocks = [media_pieces(i, item, shape()) for i, item in enumerate(media)]
    pieces = message_pieces(Message(Role.USER, parts), blocks)
    value = "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces)
    yield from equal("value", value, entry["value"])
    yield from equal("images", sum(isinstance(piece, Block) for piece in pieces), entry["num_images"])


# -- recorded conversations hold markers in their text; ours hold media -----------------------------------------------


def recorded_messages(
    turns: Sequence[dict[str, str]], *, has_system: bool = True
) -> tuple[list[Message], list[PromptMedia]]:
    """Messages, and a stand-in for each medium they hold. Without system prompt, its turn is there and empty."""
    media: list[PromptMedia] = []
    messages = [] if has_system else [Message(Role.SYSTEM, ())]
    for turn in turns:
        parts: list[TextPart | MediaPart] = []
        for piece in re.split(f"({IMAGE}|{VIDEO})", turn["value"]):
            if piece in MARKERS:
                parts.append(MediaPart(len(media)))
                media.append(placeholder(MARKERS[piece]))
            elif piece:
                parts.append(TextPart(piece))
        messages.append(Message(ROLES[turn["from"]], tuple(parts)))
    return messages, media


def placeholder(kind: MediaKind) -> PromptMedia:
    return PromptMedia(kind=kind, is_tiled=False, records=(TokensRef(key="k", levels=(Level(1, 1),)),))


def with_markers(layout: Layout, tokenizer: ChatTokenizer) -> list[int]:
    """The ids that the reference has before its splice: one marker per media item, or per tile of a `dynamic` image."""
    ids: list[int] = []
    for segment, is_first in _by_item(layout):
        if not isinstance(segment, Block):
            ids += segment.ids
        elif is_first:
            ids.append(tokenizer.image_id if segment.kind is MediaKind.IMAGE else tokenizer.video_id)
    return ids


def labels_before_splice(layout: Layout, labels: Sequence[int]) -> list[int]:
    """One label per marker in place of those of its blocks."""
    before: list[int] = []
    at = 0
    for segment, is_first in _by_item(layout):
        here = labels[at : at + segment.positions]
        at += segment.positions
        before += here if not isinstance(segment, Block) else here[:is_first]
    return before


def _by_item(layout: Layout) -> Iterator[tuple[Any, bool]]:
    """Segments, and of each block whether a media item begins with it."""
    previous: Any = None
    for segment in layout.segments:
        continues = isinstance(segment, Block) and isinstance(previous, Block) and previous.media == segment.media
        yield segment, not continues
        previous = segment
