"""Which chunks of a recording are most like a question: chunks' vectors from the tower, the question's from its words.

A chunk's vector is made of its visual tokens, which live in the space of the language model's input embeddings; the
question's is the mean of its words' input embeddings (the decode service's `Embed`). Both are of unit length. Chunks of
one recording have much in common, so their mean is taken off before they are compared. How well this finds things, and
where it does not, is told in docs/recordings.md: it narrows a search, and is no proof that something is absent.

The index (`usearch`, cosine) is a cache of the database's rows: built when first asked for, extended by new chunks,
thrown away at will.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index, Matches

from nvila.errors import InvalidRequest
from nvila.recordings.types import Recording
from nvila.types import RecordingWindow

MOST_BYTES = 1 << 30
"""Of indexes that are kept, and the vectors in them: a day of chunks of 32 s in 3,584 channels is 77 MB, twice float32.
The one that was asked last is kept whatever its size."""


class Embedder(Protocol):
    """Words into the language model's input space (`decode/client.py`): float32 of unit length."""

    async def embed(self, text: str) -> NDArray[np.float32]: ...


class Vectors(Protocol):
    """What is asked of `RecordingStore`."""

    async def get(self, recording_id: str, *, tenant: str) -> Recording: ...
    async def vectors(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None, after: int | None = None
    ) -> Sequence[tuple[int, bytes]]: ...
    async def spans(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[tuple[int, float, float]]: ...


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A chunk that is like the question. `likeness`: cosine after the mean is taken off, from -1 to 1."""

    chunk: int
    start_s: float
    end_s: float
    likeness: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Relevance(Protocol):
    async def most_like(self, text: str, window: RecordingWindow, tenant: str, count: int) -> Sequence[Hit]: ...


class SimilaritySearch:
    """Finds chunks like a text. One per process."""

    def __init__(self, vectors: Vectors, embedder: Embedder, *, most_bytes: int = MOST_BYTES) -> None:
        self._vectors = vectors
        self._embedder = embedder
        self._most_bytes = most_bytes
        self._indexes: OrderedDict[str, RecordingIndex] = OrderedDict()

    async def most_like(self, text: str, window: RecordingWindow, tenant: str, count: int) -> Sequence[Hit]:
        """Up to `count` chunks of the window, the likest first.

        Raises `NotFound` for another tenant's recording, `InvalidRequest` when no chunk of the window has a vector.
        """
        await self._vectors.get(window.recording_id, tenant=tenant)
        spans = await self._vectors.spans(window.recording_id, start_s=window.start_s, end_s=window.end_s)
        by_number = {number: (start_s, end_s) for number, start_s, end_s in spans}
        index = self._indexes.pop(window.recording_id, None) or RecordingIndex()
        self._indexes[window.recording_id] = index
        async with index.turn:
            rows = await self._vectors.vectors(window.recording_id, after=index.last)
            await asyncio.to_thread(index.add, rows)
            asked_D = await self._embedder.embed(text)
            found = await asyncio.to_thread(index.search, asked_D, by_number, count)
        self._forget_old()
        if not found:
            raise InvalidRequest(
                "the window's chunks have no vectors to compare a question with", param="relevant_chunks"
            )
        return [
            Hit(chunk=number, start_s=by_number[number][0], end_s=by_number[number][1], likeness=likeness)
            for number, likeness in found
        ]

    def _forget_old(self) -> None:
        while len(self._indexes) > 1 and sum(index.size_bytes for index in self._indexes.values()) > self._most_bytes:
            self._indexes.popitem(last=False)


class RecordingIndex:
    """One recording's vectors, less their mean, in a `usearch` index. Rebuilt when the mean has moved: at each doubling
    of the number of chunks."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.last: int | None = None
        self._numbers: list[int] = []
        self._raw_ND: NDArray[np.float32] | None = None
        self._index: Index | None = None
        self._mean_D: NDArray[np.float32] | None = None
        self._centred_at = 0

    @property
    def size_bytes(self) -> int:
        """Of the vectors, here and in the index."""
        return 0 if self._raw_ND is None else 2 * self._raw_ND.nbytes

    def add(self, rows: Sequence[tuple[int, bytes]]) -> None:
        if not rows:
            return
        widths = {len(vector) // 4 for _, vector in rows}
        if self._raw_ND is not None:
            widths.add(self._raw_ND.shape[1])
        if len(widths) > 1:
            raise InvalidRequest(
                f"the recording's chunk vectors have {sorted(widths)} channels: it was ingested for one model after "
                "another, and its chunks cannot be compared with each other",
                param="relevant_chunks",
            )
        new_ND = np.stack([np.frombuffer(vector, "<f4") for _, vector in rows])
        raw_ND = new_ND if self._raw_ND is None else np.concatenate([self._raw_ND, new_ND])
        self._raw_ND = raw_ND
        self._numbers += [number for number, _ in rows]
        self.last = self._numbers[-1]
        if self._index is None or self._mean_D is None or len(raw_ND) >= 2 * self._centred_at:
            self._mean_D = raw_ND.mean(axis=0)
            self._centred_at = len(raw_ND)
            self._index = Index(ndim=raw_ND.shape[1], metric="cos", dtype="f32")
            self._index.add(np.array(self._numbers, np.uint64), raw_ND - self._mean_D)
        else:
            self._index.add(np.array([number for number, _ in rows], np.uint64), new_ND - self._mean_D)

    def search(self, asked_D: NDArray[np.float32], numbers: Collection[int], count: int) -> list[tuple[int, float]]:
        """(number, cosine) of the likest of these chunks."""
        if self._index is None or self._raw_ND is None or self._mean_D is None:
            return []
        if asked_D.shape != self._mean_D.shape:
            raise InvalidRequest(
                f"the recording's chunk vectors have {len(self._mean_D)} channels, the served model {len(asked_D)}: it "
                "was ingested for another model",
                param="relevant_chunks",
            )
        allowed = set(numbers)
        if not allowed.issuperset(self._numbers):  # a part of the recording: every vector of it, exactly
            places = [place for place, number in enumerate(self._numbers) if number in allowed]
            return self._exactly(asked_D, places, count)
        found = self._index.search(asked_D, min(count, len(self._numbers)))
        assert isinstance(found, Matches), "of one question"
        return [(int(key), 1.0 - float(distance)) for key, distance in zip(found.keys, found.distances, strict=True)]

    def _exactly(self, asked_D: NDArray[np.float32], places: Sequence[int], count: int) -> list[tuple[int, float]]:
        if not places:
            return []
        assert self._raw_ND is not None
        assert self._mean_D is not None
        centred_ND = self._raw_ND[list(places)] - self._mean_D
        lengths_N = np.linalg.norm(centred_ND, axis=1) * np.linalg.norm(asked_D)
        likeness_N = centred_ND @ asked_D / np.where(lengths_N > 0, lengths_N, 1)
        order = np.argsort(-likeness_N, kind="stable")[:count]
        return [(self._numbers[places[place]], float(likeness_N[place])) for place in order]
