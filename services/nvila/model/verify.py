"""Is this folder a model that can be served? Everything that can be told from the checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nvila.errors import InvalidCheckpoint, NvilaError
from nvila.model.checkpoint import EMBEDDING, Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import LayoutStyle, Part, read_json
from nvila.model.weights import Weights
from nvila.types import EncodeSettings, MediaKind, TokenDtype

SLICE_ELEMENTS = 1 << 22
"""Looked at together when values are checked: bounds memory, whatever the tensor."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `problem` is None when it is as it should be, `note` says what was seen."""

    name: str
    note: str
    problem: str | None = None


def verify(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Findings in order, each as soon as it is known. Reads every weight once and encodes one picture."""
    looks: tuple[tuple[str, Callable[[Checkpoint], str]], ...] = (
        ("tensors", _tensors),
        ("values", _values),
        ("tokens", _tokens),
        ("chat template", _template),
        ("picture", _picture),
    )
    for name, look in looks:
        try:
            yield Finding(name, look(checkpoint))
        except NvilaError as error:
            yield Finding(name, "", error.message)


def _tensors(checkpoint: Checkpoint) -> str:
    """Names and shapes of all parts, and in a flat folder nothing besides."""
    checkpoint.check_llm()
    tower, projector = checkpoint.tower_weights(), checkpoint.projector_weights()
    if checkpoint.layout.style is LayoutStyle.HF:
        known = tuple(f"{part}." for part in Part)
        strays = [name for name in Weights(checkpoint.path).names() if not name.startswith(known)]
        if strays:
            raise InvalidCheckpoint(f"tensors of no part of the model: {', '.join(strays[:5])}")
    count = len(checkpoint.layout.weights(Part.LLM).names())
    return f"{len(tower)} of the tower, {len(projector)} of the projector, {count} of the language model"


def _values(checkpoint: Checkpoint) -> str:
    """No weight is infinite or not a number."""
    count = 0
    for part in Part:
        if part is Part.PROJECTOR and not checkpoint.projector_weights():
            continue
        weights = checkpoint.layout.weights(part)
        for name in weights.names():
            tensor = weights.tensor(name)
            count += tensor.numel()
            if tensor.is_floating_point() and not is_finite(tensor):
                raise InvalidCheckpoint(f"{part}: tensor {name!r} holds values that are infinite or not numbers")
    return f"{count:,} numbers, all finite"


def is_finite(tensor: Tensor) -> bool:
    """Every value is a number, looked at a slice at a time."""
    return all(bool(torch.isfinite(run).all()) for run in torch.split(tensor.reshape(-1), SLICE_ELEMENTS))


def _tokens(checkpoint: Checkpoint) -> str:
    """Ids of the tokenizer, of configuration files and rows of the embedding table belong together."""
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    rows = checkpoint.layout.weights(Part.LLM).shape(EMBEDDING)[0]
    if len(set(tokenizer.media_ids)) != len(tokenizer.media_ids):
        raise InvalidCheckpoint(f"media tokens share an id: {tokenizer.media_ids}")
    beyond = [i for i in checkpoint.stop_ids if i >= rows]
    if beyond:
        raise InvalidCheckpoint(f"stop ids {beyond} have no row among {rows:,}: an answer would never end")
    for number in range(config.time_tokens):
        if tokenizer.id_of(config.time_token_format.format(t=number)) >= rows:
            raise InvalidCheckpoint(f"time token {number} has no row among {rows:,}")
    _compare_told_ids(checkpoint)
    saved = "saved" if max(tokenizer.media_ids) < rows else "added at load"
    return (
        f"{rows:,} rows, {tokenizer.size:,} tokens, media tokens {saved} ({tokenizer.image_id}, {tokenizer.video_id})"
    )


def _compare_told_ids(checkpoint: Checkpoint) -> None:
    if checkpoint.layout.style is not LayoutStyle.HF:
        return
    told, tokenizer = read_json(checkpoint.path / "config.json"), checkpoint.tokenizer()
    for key, own in (("image_token_id", tokenizer.image_id), ("video_token_id", tokenizer.video_id)):
        if told.get(key) not in (None, -1, own):
            raise InvalidCheckpoint(f"config.json says {key} {told[key]}, the tokenizer {own}")


def _template(checkpoint: Checkpoint) -> str:
    rendered = checkpoint.tokenizer().render([("user", "question")])
    if "question" not in rendered:
        raise InvalidCheckpoint("the chat template leaves out what the user said")
    return f"ends a turn with {', '.join(checkpoint.tokenizer().token_of(i) or '?' for i in checkpoint.stop_ids)}"


def _picture(checkpoint: Checkpoint) -> str:
    """A tile of grey goes through tower and projector."""
    encoder = VisionEncoder.from_checkpoint(checkpoint)
    side = checkpoint.config.tile_px
    settings = EncodeSettings(
        kind=MediaKind.IMAGE, is_tiled=False, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
    )
    values_TD, _ = encoder.encode(np.full((1, side, side, 3), 127, np.uint8), settings)
    if not bool(torch.isfinite(values_TD).all()):
        raise InvalidCheckpoint("a grey picture gives visual tokens that are infinite or not numbers")
    return f"{len(values_TD)} tokens of width {values_TD.shape[1]}, all finite"
