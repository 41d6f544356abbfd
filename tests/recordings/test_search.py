"""Chunks like a question: found through the index, only in the window, only the tenant's, after more were added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from nvila.errors import InvalidRequest, NotFound
from nvila.recordings.search import SimilaritySearch
from nvila.recordings.types import Recording, RecordingState
from nvila.types import RecordingWindow
from tests.recordings import made
from tests.recordings.asked import chunk_of

WIDTH = 32


def unit(vector_D: NDArray[np.float32]) -> NDArray[np.float32]:
    return (vector_D / np.linalg.norm(vector_D)).astype(np.float32)


COMMON_D = unit(np.random.default_rng(0).normal(size=WIDTH).astype(np.float32))
"""What all chunks of a recording have in common: ten times what sets them apart."""


def direction(number: int) -> NDArray[np.float32]:
    return unit(np.random.default_rng(100 + number).normal(size=WIDTH).astype(np.float32))


class Rows:
    """A recording whose chunk n points into direction n, a little."""

    def __init__(self, chunks: int) -> None:
        self.recording = replace(made.recording(), state=RecordingState.LIVE)
        self.chunks_ = chunks
        self.reads = 0
        self.without: set[int] = set()
        self.narrow: set[int] = set()  # chunks that were ingested for a model of half the width
        self.newer = 0  # chunks that are written between the look at spans and the look at vectors

    async def get(self, recording_id: str, *, tenant: str) -> Recording:
        if (recording_id, tenant) != (self.recording.id, "acme"):
            raise NotFound("no recording")
        return self.recording

    async def vectors(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None, after: int | None = None
    ) -> Sequence[tuple[int, bytes]]:
        first = 0 if after is None else after + 1
        self.reads += max(0, self.chunks_ - first)
        return [
            (
                number,
                unit(10 * COMMON_D + direction(number))[: WIDTH // 2 if number in self.narrow else WIDTH]
                .astype("<f4")
                .tobytes(),
            )
            for number in range(first, self.chunks_)
            if number not in self.without
        ]

    async def spans(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[tuple[int, float, float]]:
        every = [chunk_of(recording_id, number) for number in range(self.chunks_ - self.newer)]
        inside = [one for one in every if one.end_s > (start_s or 0) and one.start_s < (end_s or np.inf)]
        return [(one.number, one.start_s, one.end_s) for one in inside]


class Words:
    """A text is the number of the direction that it means."""

    def __init__(self, width: int = WIDTH) -> None:
        self._width = width

    async def embed(self, text: str) -> NDArray[np.float32]:
        return direction(int(text))[: self._width]


def searching(rows: Rows, **more: int) -> SimilaritySearch:
    return SimilaritySearch(rows, Words(), **more)


def window(rows: Rows, start_s: float | None = None, end_s: float | None = None) -> RecordingWindow:
    return RecordingWindow(recording_id=rows.recording.id, start_s=start_s, end_s=end_s)


async def test_the_likest_chunk_is_first_though_all_have_much_in_common() -> None:
    rows = Rows(300)
    search = searching(rows)
    for wanted in (0, 17, 299):
        hits = await search.most_like(str(wanted), window(rows), "acme", 5)
        assert hits[0].chunk == wanted
        assert (hits[0].start_s, hits[0].end_s) == (wanted * 16.0, wanted * 16.0 + 16)
        assert [hit.likeness for hit in hits] == sorted((hit.likeness for hit in hits), reverse=True)
        assert hits[0].likeness > 0.9


async def test_the_index_finds_what_a_plain_comparison_finds() -> None:
    rows = Rows(200)
    search = searching(rows)
    for wanted in range(0, 200, 23):
        whole = await search.most_like(str(wanted), window(rows), "acme", 3)
        every_but_the_last = await search.most_like(str(wanted), window(rows, 0, 199 * 16), "acme", 3)
        assert [hit.chunk for hit in whole] == [hit.chunk for hit in every_but_the_last]
        assert whole[0].likeness == pytest.approx(every_but_the_last[0].likeness, abs=1e-4)


async def test_only_chunks_of_the_window_are_found() -> None:
    rows = Rows(50)
    hits = await searching(rows).most_like("30", window(rows, 0, 160), "acme", 50)
    assert sorted(hit.chunk for hit in hits) == list(range(10))


async def test_new_chunks_are_added_and_old_ones_are_not_read_again() -> None:
    rows = Rows(100)
    search = searching(rows)
    await search.most_like("1", window(rows), "acme", 1)
    for more in (101, 150, 260):
        rows.chunks_ = more
        assert (await search.most_like(str(more - 1), window(rows), "acme", 1))[0].chunk == more - 1
    assert rows.reads == 260


async def test_indexes_are_a_cache_that_may_be_thrown_away() -> None:
    first, second = Rows(20), Rows(20)
    search = searching(first, most_bytes=1)
    both = SimilaritySearch(Both(first, second), Words(), most_bytes=1)
    for rows in (first, second, first):
        assert (await both.most_like("7", window(rows), "acme", 1))[0].chunk == 7
    assert first.reads == 40
    assert (await search.most_like("7", window(first), "acme", 1))[0].chunk == 7


class Both(Rows):
    def __init__(self, *rows: Rows) -> None:
        self._rows = {one.recording.id: one for one in rows}

    async def get(self, recording_id: str, *, tenant: str) -> Recording:
        return await self._rows[recording_id].get(recording_id, tenant=tenant)

    async def vectors(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None, after: int | None = None
    ) -> Sequence[tuple[int, bytes]]:
        return await self._rows[recording_id].vectors(recording_id, after=after)

    async def spans(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[tuple[int, float, float]]:
        return await self._rows[recording_id].spans(recording_id, start_s=start_s, end_s=end_s)


async def test_a_chunk_that_is_written_meanwhile_is_not_of_this_search() -> None:
    rows = Rows(10)
    rows.without, rows.newer = {0, 1}, 1
    found = await searching(rows).most_like("9", window(rows), "acme", 10)
    assert sorted(hit.chunk for hit in found) == list(range(2, 9))


async def test_another_tenants_recording_is_not_searched() -> None:
    rows = Rows(5)
    with pytest.raises(NotFound):
        await searching(rows).most_like("1", window(rows), "zeta", 1)


async def test_chunks_without_vectors_are_said_to_have_none() -> None:
    rows = Rows(3)
    rows.without = {0, 1, 2}
    with pytest.raises(InvalidRequest, match="have no vectors"):
        await searching(rows).most_like("1", window(rows), "acme", 1)


async def test_another_models_vectors_are_not_compared() -> None:
    rows = Rows(3)
    with pytest.raises(InvalidRequest, match="have 32 channels, the served model 16"):
        await SimilaritySearch(rows, Words(16)).most_like("1", window(rows), "acme", 1)


async def test_a_recording_of_one_model_after_another_is_not_searched() -> None:
    rows = Rows(3)
    rows.narrow = {0, 1}
    with pytest.raises(InvalidRequest, match=r"have \[16, 32\] channels: .* one model after another"):
        await searching(rows).most_like("1", window(rows), "acme", 1)
