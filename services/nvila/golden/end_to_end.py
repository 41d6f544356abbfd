"""Recorded runs of whole tiny checkpoints: answers from pictures and videos, training steps, static S2."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvila.golden.compare import (
    FEATURE_TOLERANCE,
    LOGIT_TOLERANCE,
    MODULE_TOLERANCE,
    Case,
    Check,
    Golden,
    Tensors,
    close,
    equal,
    near,
    unknown,
)
from nvila.golden.conversations import MARKERS, labels_before_splice, recorded_messages, with_markers
from nvila.golden.inputs import FORMULAS, synthetic
from nvila.golden.pipeline import EncodedMedia, Pipeline, opened
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import ImageMode
from nvila.model.encoder import Prepared, VisionEncoder
from nvila.model.layouts import read_layout
from nvila.model.prompt import Block, Layout, lay_out, splice
from nvila.model.time_tokens import time_tokens
from nvila.model.tokenizer import IMAGE, VIDEO
from nvila.train.labels import Labelled, label_answers
from nvila.train.loss import IGNORE, next_token_loss
from nvila.train.packing import Sample, pad
from nvila.types import MediaKind, MediaPart, Message, Role, TextPart
from nvila.video.sampling import uniform_indices

NEW_TOKENS = 12
"""How many ids of an answer are recorded, at most."""


def end_to_end(golden: Golden) -> Iterator[Case]:
    kinds: dict[str, Callable[[Golden, str], Iterator[Check]]] = {
        "greedy_ids": _answer,
        "conversations": _labelled_batch,
        "soft_ce_std": _training_step,
        "max_split_size": _static_s2,
    }
    for name, case in golden.content.items():
        if isinstance(case, dict):
            checks = next((checks for key, checks in kinds.items() if key in case), None)
            full_name = f"e2e/{golden.stem}.{name}"
            yield Case(full_name, partial(checks, golden, name)) if checks else unknown(full_name)


# -- answers ----------------------------------------------------------------------------------------------------------


def _answer(golden: Golden, name: str) -> Iterator[Check]:
    pipeline = opened(golden.checkpoint(golden.content["checkpoint"]))
    case, recorded = golden.content[name], golden.under(f"{name}.")
    pictures = _pictures(case, pipeline.config.default_frames)
    is_tiled = len(pictures[MediaKind.IMAGE]) == 1 and pipeline.config.can_tile
    encoded: dict[MediaKind, list[EncodedMedia]] = {}
    for kind, runs in pictures.items():
        settings = pipeline.settings(kind, is_tiled and kind is MediaKind.IMAGE)
        prepared = [pipeline.encoder.prepare(frames_FHWC, settings) for frames_FHWC in runs]
        encoded[kind] = [pipeline.encode(f"{kind} {i}", one, settings) for i, one in enumerate(prepared)]
        if not prepared:
            continue
        yield from _pixels(kind, prepared, recorded)
        blocks = [[*one.block_size] for one in prepared if one.block_size]
        yield from equal(f"{kind} block sizes", blocks, case["block_sizes"].get(kind.value, []))
        features = torch.cat([one.features_NTC for one in encoded[kind]])
        yield from near(f"{kind} features", features, recorded[f"{kind}.tower_features"], FEATURE_TOLERANCE)

    tokenizer = pipeline.checkpoint.tokenizer()
    messages, media = _prompt(case["prompt_text_after_media_extraction"], encoded, pipeline.config.image_mode)
    layout = lay_out(messages, [one.item for one in media], tokenizer, pipeline.config)
    yield from equal("ids", with_markers(layout, tokenizer), case["input_ids"])
    yield from equal("recorded ids", recorded["input_ids"].flatten().tolist(), case["input_ids"])
    positions = sum(segment.positions for segment in layout.segments)
    yield from equal("positions", positions, case["sequence_length_after_splice"])
    values = {one.key: one.values_TD for one in media}
    yield from _media_embeddings(layout, pipeline.embed, values, recorded)
    embeddings_PD = splice(layout.segments, pipeline.embed, values)
    yield from near("embeddings", embeddings_PD, recorded["inputs_embeds"][0], FEATURE_TOLERANCE)
    logits, ids = pipeline.greedy(embeddings_PD, golden.content["compared_vocab"], NEW_TOKENS)
    yield from near("logits", logits, recorded["logits"][0], LOGIT_TOLERANCE)
    yield from equal("greedy ids", ids, case["greedy_ids"])
    if "greedy_ids" in recorded:
        yield from equal("recorded greedy ids", recorded["greedy_ids"].flatten().tolist(), case["greedy_ids"])


def _pictures(case: dict[str, Any], frames: int) -> dict[MediaKind, list[NDArray[np.uint8]]]:
    """Images as runs of one frame; a video as one run of its sampled frames, or, as the reference's head has it, as
    images."""
    images = [synthetic(i["formula"], i["width"], i["height"], i["seed"])[None] for i in case.get("images", [])]
    if "video" not in case:
        return {MediaKind.IMAGE: images, MediaKind.VIDEO: []}
    video = case["video"]
    size = video["width"], video["height"]
    indices = uniform_indices(video["num_source_frames"], frames)
    run_FHWC = np.stack([synthetic(FORMULAS[i % len(FORMULAS)], *size, video["seed0"] + i) for i in indices])
    if VIDEO in case["prompt_text_after_media_extraction"]:
        return {MediaKind.IMAGE: images, MediaKind.VIDEO: [run_FHWC]}
    return {MediaKind.IMAGE: [*images, *run_FHWC[:, None]], MediaKind.VIDEO: []}


def _prompt(
    text: str, encoded: Mapping[MediaKind, Sequence[EncodedMedia]], mode: ImageMode
) -> tuple[list[Message], list[EncodedMedia]]:
    """The recorded prompt as messages, and its media in order; tiles of a picture have a marker and a newline each."""
    if mode is ImageMode.DYNAMIC and encoded[MediaKind.IMAGE] and encoded[MediaKind.IMAGE][0].item.is_tiled:
        text = re.sub(f"({IMAGE}\n)+", IMAGE, text, count=1)
    queues = {kind: iter(items) for kind, items in encoded.items()}
    messages: list[Message] = []
    media: list[EncodedMedia] = []
    for role, content in re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL):
        parts: list[TextPart | MediaPart] = []
        for piece in re.split(f"({IMAGE}|{VIDEO})", content):
            if piece in MARKERS:
                parts.append(MediaPart(len(media)))
                media.append(next(queues[MARKERS[piece]]))
            else:
                parts.append(TextPart(piece))
        messages.append(Message(Role(role), tuple(parts)))
    return messages, media


def _pixels(kind: MediaKind, prepared: Sequence[Prepared], recorded: Tensors) -> Iterator[Check]:
    """Exactly: 8-bit levels, normalised and rounded to float16."""
    pixels = [one.pixels_N3SS for one in prepared]
    if kind is MediaKind.IMAGE:
        yield from close("image pixels", torch.cat(pixels), recorded["pixel_values.image"], atol=0)
        return
    for i, pixels_F3SS in enumerate(pixels):
        yield from close(f"video {i} pixels", pixels_F3SS, recorded[f"pixel_values.video.{i}"], atol=0)


def _media_embeddings(
    layout: Layout, embed: Callable[[Tensor], Tensor], values: Mapping[str, Tensor], recorded: Tensors
) -> Iterator[Check]:
    """What replaces each marker: of an image every block on its own, of a video all together."""
    for kind in MediaKind:
        blocks = [segment for segment in layout.segments if isinstance(segment, Block) and segment.kind is kind]
        if kind is MediaKind.VIDEO:
            runs = [list(run) for _, run in groupby(blocks, key=lambda block: block.media)]
        else:
            runs = [[block] for block in blocks]
        names = [name for name in recorded if name.startswith(f"{kind}.media_embeds.")]
        yield from equal(f"{kind} markers", len(runs), len(names))
        for i, run in enumerate(runs[: len(names)]):
            wanted = recorded[f"{kind}.media_embeds.{i}"]
            yield from near(f"{kind} embeddings {i}", splice(run, embed, values), wanted, FEATURE_TOLERANCE)


# -- training ---------------------------------------------------------------------------------------------------------


def _labelled_batch(golden: Golden, name: str) -> Iterator[Check]:
    """A batch of conversations, padded before and after the splice. Each sample is computed on its own."""
    pipeline = opened(golden.checkpoint(golden.content["checkpoint"]))
    case, recorded = golden.content[name], golden.under(f"{name}.")
    tokenizer = pipeline.checkpoint.tokenizer()
    queues = _recorded_media(pipeline, recorded)
    labelled, samples = zip(*(_sample(pipeline, turns, queues) for turns in case["conversations"]), strict=True)
    yield from equal("media left over", [len(list(queue)) for queue in queues.values()], [0, 0])

    ids = [torch.tensor(with_markers(one.layout, tokenizer)) for one in labelled]
    labels = [torch.tensor(labels_before_splice(one.layout, one.labels)) for one in labelled]
    rows = {
        "input_ids": (ids, tokenizer.pad_id or 0),
        "labels": (labels, IGNORE),
        "attention_mask": ([torch.ones_like(row) for row in ids], 0),
    }
    for key, (tensors, fill) in rows.items():
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
        yield from close(key, padded, recorded[key], atol=0)
    batch = pad(samples)
    yield from close("labels after splice", batch.labels_BP, recorded["labels_after_splice"], atol=0)
    yield from close("mask after splice", batch.mask_BP, recorded["attention_mask_after_splice"], atol=0)
    yield from near("embeddings", batch.embeddings_BPD, recorded["inputs_embeds"], FEATURE_TOLERANCE)
    targets = int((batch.labels_BP[:, 1:] != IGNORE).sum())
    yield from equal("targets", targets, case["num_valid_labels_after_shift"])
    for i, sample in enumerate(samples):
        logits = pipeline.logits(sample.embeddings_PD)[:, : golden.content["compared_vocab"]]
        yield from near(f"logits {i}", logits, recorded["logits"][i, : len(logits)], LOGIT_TOLERANCE)


def _training_step(golden: Golden, name: str) -> Iterator[Check]:
    """One question about a medium and its answer in time tokens: labels, logits and smoothed loss."""
    pipeline = opened(golden.checkpoint(golden.content["checkpoint"]))
    case, recorded = golden.content[name], golden.under(f"{name}.")
    config, tokenizer = pipeline.config, pipeline.checkpoint.tokenizer()
    time_ids = [tokenizer.id_of(token) for token in time_tokens(config.time_tokens, config.time_token_format)]
    yield from equal("time ids", time_ids, case["time_token_ids"])
    queues = _recorded_media(pipeline, recorded)
    markers = "".join(marker * _count(recorded, kind) for marker, kind in MARKERS.items())
    turns = [{"from": "human", "value": markers + case["question"]}, {"from": "gpt", "value": case["answer"]}]
    labelled, sample = _sample(pipeline, turns, queues)
    labels = labels_before_splice(labelled.layout, labelled.labels)
    for key, got in {"input_ids": with_markers(labelled.layout, tokenizer), "labels": labels}.items():
        yield from equal(key, got, case[key])
        yield from equal(f"recorded {key}", recorded[key].flatten().tolist(), case[key])
    yield from close("labels after splice", sample.labels_P[None], recorded["labels_after_splice"], atol=0)
    logits_PV = pipeline.logits(sample.embeddings_PD)
    wanted = recorded["logits"][0]
    yield from near("logits", logits_PV[:, : wanted.shape[1]], wanted, LOGIT_TOLERANCE)
    loss = next_token_loss(logits_PV[None], sample.labels_P[None], time_ids, case["soft_ce_std"])
    yield from near("loss", loss[None], recorded["loss"], MODULE_TOLERANCE)
    yield from near("loss in JSON", loss[None], torch.tensor([case["loss"]]), MODULE_TOLERANCE)


def _recorded_media(pipeline: Pipeline, recorded: Tensors) -> dict[MediaKind, Iterator[EncodedMedia]]:
    """Media of recorded pixels, in order: images of one tile each, and videos."""
    pixels: dict[MediaKind, list[Tensor]] = {kind: [] for kind in MediaKind}
    if "pixel_values.image" in recorded:
        pixels[MediaKind.IMAGE] = list(torch.split(recorded["pixel_values.image"].float(), 1))
    videos = _count(recorded, MediaKind.VIDEO)
    pixels[MediaKind.VIDEO] = [recorded[f"pixel_values.video.{i}"].float() for i in range(videos)]
    return {kind: _encoded(pipeline, kind, tensors) for kind, tensors in pixels.items()}


def _encoded(pipeline: Pipeline, kind: MediaKind, pixels: Sequence[Tensor]) -> Iterator[EncodedMedia]:
    settings = pipeline.settings(kind, False)
    for i, pixels_N3SS in enumerate(pixels):
        yield pipeline.encode(f"{kind} {i}", Prepared(pixels_N3SS=pixels_N3SS), settings)


def _count(recorded: Tensors, kind: MediaKind) -> int:
    if kind is MediaKind.VIDEO:
        return sum(name.startswith("pixel_values.video.") for name in recorded)
    return len(recorded["pixel_values.image"]) if "pixel_values.image" in recorded else 0


def _sample(
    pipeline: Pipeline, turns: Sequence[dict[str, str]], queues: Mapping[MediaKind, Iterator[EncodedMedia]]
) -> tuple[Labelled, Sample]:
    messages, placeholders = recorded_messages(turns)
    media = [next(queues[item.kind]) for item in placeholders]
    tokenizer = pipeline.checkpoint.tokenizer()
    labelled = label_answers(messages, [one.item for one in media], tokenizer, pipeline.config)
    values = {one.key: one.values_TD for one in media}
    embeddings_PD = splice(labelled.layout.segments, pipeline.embed, values)
    return labelled, Sample(embeddings_PD=embeddings_PD, labels_P=torch.tensor(labelled.labels))


# -- static S2 --------------------------------------------------------------------------------------------------------


def _static_s2(golden: Golden, name: str) -> Iterator[Check]:
    """A checkpoint of these keys with the recorded tower, and nothing behind it."""
    case, recorded = golden.content[name], golden.under(f"{name}.")
    layout = read_layout(golden.checkpoint(case["vision_tower"]).parent)
    keys = {
        "s2": True,
        "s2_scales": case["scales"],
        "s2_max_split_size": case["max_split_size"],
        "s2_resize_output_to_scale_idx": case["resize_output_to_scale_idx"],
        "dynamic_s2": False,
        "image_aspect_ratio": "resize",
    }
    bare = replace(layout, root={**layout.root, **keys}, projector={"mm_projector_type": "identity"})
    encoder = VisionEncoder.from_checkpoint(Checkpoint(bare))
    side = encoder.config.tile_px
    got = encoder.tower(recorded["input"])
    yield from equal("channels", encoder.config.projector_width, case["hidden_size"])
    yield from equal("side of pictures", {"height": side, "width": side}, case["image_processor_size"])
    yield from near("features", got, recorded["output"], FEATURE_TOLERANCE)
