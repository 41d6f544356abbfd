"""The cold store gives back what it was given, whole, or nothing; on a local disk and on another kind of store."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nvila.cache.codec import Record, RecordFormat, pack
from nvila.errors import NotFound, Unavailable
from nvila.recordings.cold import ColdStore
from nvila.types import Level, TokenDtype, TokensRef, VisualTokens

_FORM = RecordFormat(width=16, dtype=TokenDtype.FLOAT32, vision_revision="rev-1")


def record(seed: int = 0, tokens: int = 12) -> tuple[TokensRef, Record, VisualTokens]:
    ref = TokensRef(key=f"{seed:064x}", levels=(Level(1, tokens),))
    values_TD = np.random.default_rng(seed).normal(size=(tokens, _FORM.width)).astype(np.float32)
    made = VisualTokens(
        ref=ref, dtype=_FORM.dtype, values_TD=values_TD, scales_T=None, vision_revision=_FORM.vision_revision
    )
    return ref, pack(made), made


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ColdStore]:
    name = f"/cold-{secrets.token_hex(4)}"
    yield ColdStore(str(tmp_path / "cold") if request.param == "folder" else f"memory:/{name}")
    if request.param == "memory" and fsspec.filesystem("memory").exists(name):
        fsspec.filesystem("memory").rm(name, recursive=True)


def stored_file(folder: Path) -> Path:
    (file,) = (path for path in (folder / "tokens").rglob("*") if path.is_file())
    return file


async def test_a_record_comes_back_as_it_was(store: ColdStore) -> None:
    ref, kept, tokens = record()
    assert not await store.has(ref.key)
    assert await store.put(kept) > len(kept.payload)
    assert await store.has(ref.key)
    back = await store.get(ref, _FORM)
    assert back is not None
    np.testing.assert_array_equal(back.values_TD, tokens.values_TD)


async def test_a_record_that_is_not_there_is_none(store: ColdStore) -> None:
    assert await store.get(record()[0], _FORM) is None


async def test_dropping_frees_bytes_and_may_be_repeated(store: ColdStore) -> None:
    ref, kept, _ = record()
    size = await store.put(kept)
    assert await store.drop([ref.key, record(1)[0].key]) == size
    assert await store.drop([ref.key]) == 0
    assert not await store.has(ref.key)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\xff\xff\xff\xff" + data[4:],
        lambda data: data[:-8] + bytes(8),
        lambda data: data + b"more",
    ],
    ids=["cut in half", "cut in the length", "empty", "wild length", "flipped payload", "longer"],
)
async def test_a_damaged_record_is_none_and_writing_it_again_mends_it(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    store, (ref, kept, tokens) = ColdStore(str(tmp_path)), record()
    await store.put(kept)
    file = stored_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert await store.get(ref, _FORM) is None
    await store.put(kept)
    back = await store.get(ref, _FORM)
    assert back is not None
    np.testing.assert_array_equal(back.values_TD, tokens.values_TD)


async def test_a_record_of_other_weights_is_none(store: ColdStore) -> None:
    ref, kept, _ = record()
    await store.put(kept)
    other = RecordFormat(width=_FORM.width, dtype=_FORM.dtype, vision_revision="rev-2")
    assert await store.get(ref, other) is None


async def test_a_write_leaves_nothing_half_done_beside_it(tmp_path: Path) -> None:
    store, (_, kept, _) = ColdStore(str(tmp_path)), record()
    await store.put(kept)
    assert stored_file(tmp_path).name == kept.key


async def test_a_store_that_cannot_write_says_so(tmp_path: Path) -> None:
    store = ColdStore(str(tmp_path))
    (tmp_path / "tokens").write_text("a file where a folder is needed")
    with pytest.raises(Unavailable, match="keep a record"):
        await store.put(record()[1])


async def test_a_kept_segment_outlives_its_original(store: ColdStore, tmp_path: Path) -> None:
    original = tmp_path / "upload"
    original.write_bytes(b"a video")
    name = await store.keep(original, "rec_1", "0.mp4")
    assert await store.keep(original, "rec_1", "0.mp4") == name
    original.unlink()
    async with store.open(name) as path:
        assert path.read_bytes() == b"a video"
    await store.forget_segments("rec_1")
    await store.forget_segments("rec_1")
    with pytest.raises(NotFound):
        async with store.open(name):
            pass


class Counted(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store that counts what is fetched of it."""

    protocol = "counted"
    fetched = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counted://").strip("/")

    def get_file(self, *arguments: object, **options: object) -> None:
        type(self).fetched += 1
        super().get_file(*arguments, **options)


async def test_a_segment_of_an_object_store_is_fetched_once_for_all_who_ask_for_it(tmp_path: Path) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    store, original = ColdStore(f"counted://cold-{secrets.token_hex(4)}"), tmp_path / "upload"
    original.write_bytes(b"a video")
    name = await store.keep(original, "rec_1", "0.mp4")

    async def look() -> bytes:
        async with store.open(name) as path:
            await asyncio.sleep(0)
            return path.read_bytes()

    assert await asyncio.gather(*(look() for _ in range(4))) == [b"a video"] * 4
    assert await look() == b"a video"
    assert Counted.fetched == 1
    async with store.open(name) as path:
        await store.forget_segment(name)
        assert path.read_bytes() == b"a video", "who has it open keeps it"
    with pytest.raises(NotFound):
        await look()


async def test_a_segment_on_the_same_disk_is_not_copied(tmp_path: Path) -> None:
    store, original = ColdStore(str(tmp_path / "cold")), tmp_path / "upload"
    original.write_bytes(b"a video")
    async with store.open(await store.keep(original, "rec_1", "0.mp4")) as path:
        assert path.stat().st_ino == original.stat().st_ino
