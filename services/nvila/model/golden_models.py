"""The cases of `model/golden.py` that need a whole checkpoint: prompts, and end to end from pictures to greedy ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.golden import Case, Golden, close, equal, near, shape, synthetic
from nvila.model.prompt import Block, Layout, lay_out, media_pieces, message_pieces, splice
from nvila.model.tokenizer import IMAGE, VIDEO, ChatTokenizer
from nvila.types import (
    EncodeSettings,
    Level,
    MediaKind,
    MediaPart,
    Message,
    PromptMedia,
    Role,
    TextPart,
    TokenDtype,
    TokensRef,
)

FEATURE_TOLERANCE, LOGIT_TOLERANCE = 2e-5, 5e-5
"""Relative to the largest recorded magnitude (golden README, "Tolerances")."""

ROLES = {"system": Role.SYSTEM, "human": Role.USER, "gpt": Role.ASSISTANT}
FORMULAS = ("gradient", "waves", "checker", "hash")


# -- conversations ----------------------------------------------------------------------------------------------------


def conversation(golden: Golden) -> Iterator[Case]:
    tokenizer = ChatTokenizer.open(golden.folder / "e2e" / golden.content["tokenizer"])
    yield Case("conversation/tokens", partial(_tokens, golden.content, tokenizer))
    for i, entry in enumerate(golden.content["tokenize_conversation"]):
        yield Case(f"conversation/tokenize {i}", partial(_tokenize, entry, tokenizer))
    for i, entry in enumerate(golden.content["extract_media"]):
        yield Case(f"conversation/extract {i}", partial(_extract, entry))


def _tokens(content: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[str]:
    yield from equal("image id", tokenizer.image_id, content["media_token_ids"]["image"])
    yield from equal("video id", tokenizer.video_id, content["media_token_ids"]["video"])
    yield from equal("sentinel id", tokenizer.sentinel_id, content["sentinel_token_id"])
    yield from equal("stop ids", list(tokenizer.stop_ids), content["stop_token_ids"])
    yield from equal("size", tokenizer.size, content["len_tokenizer_after_load"])
    yield from equal("newline", tokenizer.encode("\n"), content["newline_token_ids"])
    generation = content["default_generation_config"]
    recorded = [generation["bos_token_id"], generation["pad_token_id"]]
    yield from equal("bos, pad", [tokenizer.bos_id, tokenizer.pad_id], recorded)


def _tokenize(entry: dict[str, Any], tokenizer: ChatTokenizer) -> Iterator[str]:
    """Recorded conversations hold markers in their text; ours hold media, whose markers are put back to compare."""
    messages, media = _split_markers([(ROLES[turn["from"]], turn["value"]) for turn in entry["conversation"]])
    if entry["no_system_prompt"]:
        messages.insert(0, Message(Role.SYSTEM, ()))
    is_prompt = entry["add_generation_prompt"]
    layout = lay_out(messages, media, tokenizer, shape(), add_generation_prompt=is_prompt)
    yield from equal("ids", _with_markers(layout, tokenizer), entry["input_ids"])


def _extract(entry: dict[str, Any]) -> Iterator[str]:
    count = entry["parts"].count("IMG")
    media = [_placeholder(MediaKind.IMAGE)] * count
    numbers = iter(range(count))
    parts = tuple(MediaPart(next(numbers)) if part == "IMG" else TextPart(part) for part in entry["parts"])
    blocks = [media_pieces(i, item, shape()) for i, item in enumerate(media)]
    pieces = message_pieces(Message(Role.USER, parts), blocks)
    value = "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces)
    yield from equal("value", value, entry["value"])


def _split_markers(turns: Sequence[tuple[Role, str]]) -> tuple[list[Message], list[PromptMedia]]:
    messages: list[Message] = []
    media: list[PromptMedia] = []
    for role, value in turns:
        parts: list[TextPart | MediaPart] = []
        for piece in re.split(f"({IMAGE}|{VIDEO})", value):
            if piece in (IMAGE, VIDEO):
                parts.append(MediaPart(len(media)))
                media.append(_placeholder(MediaKind.IMAGE if piece == IMAGE else MediaKind.VIDEO))
            elif piece:
                parts.append(TextPart(piece))
        messages.append(Message(role, tuple(parts)))
    return messages, media


def _placeholder(kind: MediaKind) -> PromptMedia:
    return PromptMedia(kind=kind, is_tiled=False, records=(TokensRef(key="k", levels=(Level(1, 1),)),))


def _with_markers(layout: Layout, tokenizer: ChatTokenizer) -> list[int]:
    """The ids that the reference has before its splice: one marker per media item, or per tile of a `dynamic` image."""
    ids: list[int] = []
    previous: Block | None = None
    for segment in layout.segments:
        if not isinstance(segment, Block):
            ids += segment.ids
            previous = None
            continue
        if previous is None or previous.media != segment.media:
            ids.append(tokenizer.image_id if segment.kind is MediaKind.IMAGE else tokenizer.video_id)
        previous = segment
    return ids


# -- end to end -------------------------------------------------------------------------------------------------------


class Pipeline:
    """A checkpoint in process: tower, projector, and the language model through `transformers`."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.config = self.checkpoint.config
        self.encoder = VisionEncoder.from_checkpoint(self.checkpoint)
        self.llm = Qwen2ForCausalLM.from_pretrained(
            self.checkpoint.llm_path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def settings(self, kind: MediaKind, is_tiled: bool) -> EncodeSettings:
        return EncodeSettings(
            kind=kind,
            is_tiled=is_tiled,
            pool_sizes=self.config.pool_sizes if kind is MediaKind.VIDEO else (),
            token_dtype=TokenDtype.FLOAT32,
            vision_revision=self.checkpoint.vision_revision,
        )

    def embed(self, ids: Tensor) -> Tensor:
        return self.checkpoint.embedding_rows(ids).float()

    def greedy(self, embeddings_PD: Tensor, columns: int, limit: int) -> tuple[Tensor, list[int]]:
        """Logits of the prompt's positions (P, columns), and the ids that follow, among the first `columns`."""
        out = self.llm(inputs_embeds=embeddings_PD[None], use_cache=True)
        prompt_logits: Tensor = out.logits[0, :, :columns]
        ids = [int(prompt_logits[-1].argmax())]
        while ids[-1] not in self.checkpoint.stop_ids and len(ids) < limit:
            embedded = self.embed(torch.tensor(ids[-1:]))[None]
            out = self.llm(inputs_embeds=embedded, past_key_values=out.past_key_values, use_cache=True)
            ids.append(int(out.logits[0, -1, :columns].argmax()))
        return prompt_logits, ids


@cache
def _pipeline(path: Path) -> Pipeline:
    return Pipeline(path)


def end_to_end(golden: Golden) -> Iterator[Case]:
    for name, case in golden.content.items():
        if isinstance(case, dict) and "greedy_ids" in case:
            yield Case(f"e2e/{golden.stem}.{name}", partial(_end_to_end, golden, name))


def _end_to_end(golden: Golden, name: str) -> Iterator[str]:
    pipeline = _pipeline(golden.folder / golden.stem)
    case, recorded = golden.content[name], golden.under(f"{name}.")
    tokenizer = pipeline.checkpoint.tokenizer()
    kind = MediaKind.IMAGE if "image" in case["media"] else MediaKind.VIDEO
    pictures = _pictures(case, pipeline.config.default_frames, kind)
    is_tiled = kind is MediaKind.IMAGE and len(pictures) == 1 and pipeline.config.can_tile
    settings = pipeline.settings(kind, is_tiled)

    values: dict[str, Tensor] = {}
    media: list[PromptMedia] = []
    pixels, features = [], []
    for i, frames_FHWC in enumerate(pictures):
        prepared = pipeline.encoder.prepare(frames_FHWC, settings)
        pixels.append(prepared.pixels_N3SS)
        features.append(pipeline.encoder.tower(prepared.pixels_N3SS))
        values[str(i)], levels = pipeline.encoder.finish(features[-1], prepared, settings)
        media.append(PromptMedia(kind=kind, is_tiled=is_tiled, records=(TokensRef(key=str(i), levels=levels),)))
    if pictures:
        stored = recorded["pixel_values.image" if kind is MediaKind.IMAGE else "pixel_values.video.0"]
        yield from close("pixels", torch.cat(pixels), stored, atol=0)
        yield from near("features", torch.cat(features), recorded[f"{kind}.tower_features"], FEATURE_TOLERANCE)

    layout = lay_out([Message(Role.USER, _question(case, len(pictures)))], media, tokenizer, pipeline.config)
    yield from equal("ids", _with_markers(layout, tokenizer), case["input_ids"])
    embeddings_PD = splice(layout.segments, pipeline.embed, values)
    yield from _media_embeddings(layout, pipeline.embed, values, recorded, kind)
    yield from near("embeddings", embeddings_PD, recorded["inputs_embeds"][0], FEATURE_TOLERANCE)
    with torch.inference_mode():
        logits, ids = pipeline.greedy(embeddings_PD, golden.content["compared_vocab"], limit=12)
    yield from near("logits", logits, recorded["logits"][0], LOGIT_TOLERANCE)
    yield from equal("greedy ids", ids, case["greedy_ids"])


def _pictures(case: dict[str, Any], frames: int, kind: MediaKind) -> list[NDArray[np.uint8]]:
    """Images as runs of one frame; a video as one run of its sampled frames, or, as the reference's HEAD has it, as
    images. Frames by the reference's rule: equally spaced, rounded half to even."""
    if "video" not in case:
        return [synthetic(i["formula"], i["width"], i["height"], i["seed"])[None] for i in case.get("images", [])]
    video = case["video"]
    indices = np.round(np.linspace(0, video["num_source_frames"] - 1, frames)).astype(int)
    size = video["width"], video["height"]
    run = np.stack([synthetic(FORMULAS[i % 4], *size, video["seed0"] + int(i)) for i in indices])
    return [run] if kind is MediaKind.VIDEO else list(run[:, None])


def _question(case: dict[str, Any], count: int) -> tuple[TextPart | MediaPart, ...]:
    """All recorded prompts have their media before the text."""
    content = case["prompt_text_after_media_extraction"].split("<|im_start|>user\n")[1].partition("<|im_end|>")[0]
    text = re.sub(f"^(({IMAGE}|{VIDEO})\n?)+", "", content)
    return (*(MediaPart(i) for i in range(count)), TextPart(text))


def _media_embeddings(
    layout: Layout,
    embed: Callable[[Tensor], Tensor],
    values: dict[str, Tensor],
    recorded: dict[str, Tensor],
    kind: MediaKind,
) -> Iterator[str]:
    """What replaces each marker: the blocks between two pieces of text, or of one media item."""
    blocks = [segment for segment in layout.segments if isinstance(segment, Block)]
    wanted = [recorded[f"{kind}.media_embeds.{i}"] for i in range(sum("media_embeds" in name for name in recorded))]
    one_each = len(blocks) == len(wanted)
    runs = [[block] for block in blocks] if one_each else [blocks]
    for i, (run, tensor) in enumerate(zip(runs, wanted, strict=True) if wanted else ()):
        yield from near(f"media embeddings {i}", splice(run, embed, values), tensor, FEATURE_TOLERANCE)
