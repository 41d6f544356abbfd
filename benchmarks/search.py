"""How well chunks' vectors find what a question is about: `python -m benchmarks.search --model FOLDER`.

Makes a recording of held-out synthetic clips (`nvila.train.data`), each a chunk that shows one shape of one colour for
part of its time, asks "When is the red circle visible?" about each, and looks up the likest chunks as the recordings
part does: the mean of a chunk's visual tokens against the mean of the question's input embeddings, with the chunks' own
mean taken off (as served) and without. Right is any chunk whose clip is about that shape. Prints the share of questions
with a right chunk among the first 1, 5 and 10, beside what a random order gives. Of other material it says nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.recordings.search import RecordingIndex
from nvila.train.data.draw import Draw, Knobs, Split
from nvila.train.data.tasks import events
from nvila.types import EncodeSettings, MediaKind, TokenDtype

FIRST = (1, 5, 10)
_SHAPE = re.compile(r"the (\w+ \w+)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--groups", type=int, default=2, help="groups of frames per chunk")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.model, args.chunks, args.groups), indent=2))  # a command's result
    return 0


@torch.inference_mode()
def measure(model: Path, chunks: int, groups: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(model)
    encoder = VisionEncoder.from_checkpoint(checkpoint)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    settings = EncodeSettings(
        kind=MediaKind.VIDEO,
        is_tiled=False,
        pool_sizes=config.pool_sizes,
        token_dtype=TokenDtype.FLOAT32,
        vision_revision="",
    )
    made = [events.when(Draw.of("events.when", Split.TEST, 0, index, Knobs())) for index in range(chunks)]
    subjects = [_subject(one.question) for one in made]
    vectors = []
    for one in made:
        frames_FHWC = one.media[0].look(groups * config.temporal_group, config.tile_px)
        values_TD, _ = encoder.encode(frames_FHWC, settings)
        vectors.append(_unit(values_TD.float().mean(0).numpy()))
    asked = [_unit(checkpoint.embedding_rows(tokenizer.encode(one.question)).float().mean(0).numpy()) for one in made]
    vectors_ND, asked_ND = np.stack(vectors), np.stack(asked)
    return {
        "model": checkpoint.name,
        "is_random": checkpoint.is_random,
        "chunks": chunks,
        "subjects": len(set(subjects)),
        "as_served": _shares(_served(vectors_ND, asked_ND), subjects),
        "mean_kept": _shares(np.argsort(-(asked_ND @ vectors_ND.T), axis=1)[:, : max(FIRST)], subjects),
        "random_order": _chance(subjects),
    }


def _served(vectors_ND: NDArray[np.float32], asked_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    index = RecordingIndex()
    index.add([(number, vector.astype("<f4").tobytes()) for number, vector in enumerate(vectors_ND)])
    every = range(len(vectors_ND))
    return np.array([[number for number, _ in index.search(one_D, every, max(FIRST))] for one_D in asked_ND])


def _shares(found: NDArray[np.int64], subjects: Sequence[str]) -> dict[str, float]:
    is_right = np.array([[subjects[chunk] == subjects[row] for chunk in line] for row, line in enumerate(found)])
    return {f"first {k}": round(float(is_right[:, :k].any(axis=1).mean()), 3) for k in FIRST}


def _chance(subjects: Sequence[str]) -> dict[str, float]:
    count = len(subjects)
    wrong = [count - subjects.count(subject) for subject in subjects]
    return {
        f"first {k}": round(float(np.mean([1 - comb(some, k) / comb(count, k) for some in wrong])), 3) for k in FIRST
    }


def _subject(question: str) -> str:
    found = _SHAPE.search(question)
    assert found is not None, question
    return found[1]


def _unit(vector_D: NDArray[np.float32]) -> NDArray[np.float32]:
    return (vector_D / np.linalg.norm(vector_D)).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
