"""Footage as a browser plays it: of this disk or of a store, whole or by ranges, put into MP4 where that is needed."""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from nvila.errors import NotFound
from nvila.gateway.playing import Player, Stored
from nvila.recordings.cold import ColdStore
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import JobKind, RecordingState, Segment
from tests.gateway.faces import BEARER, OTHER_KEY, Gateway, serving
from tests.recordings.taking import write_clip

SECONDS, FPS = 4.0, 5
Stores = Callable[[], ColdStore]


@pytest.fixture(params=["disk", "remote"])
def cold(request: pytest.FixtureRequest, tmp_path: Path) -> ColdStore:
    """A store on this disk, and one that is not (fsspec's own in memory)."""
    return ColdStore(str(tmp_path / "cold") if request.param == "disk" else f"memory://kept-{secrets.token_hex(4)}")


async def keep(cold: ColdStore, clip: Path, number: int = 0, recording_id: str = "rec_1") -> Segment:
    path = await cold.keep(clip, recording_id, f"{number}{clip.suffix}")
    return Segment(
        recording_id=recording_id,
        number=number,
        path=path,
        start_s=number * SECONDS,
        duration_s=SECONDS,
        size_bytes=clip.stat().st_size,
        digest=secrets.token_hex(32),
    )


async def content(played: Path | Stored) -> bytes:
    if isinstance(played, Path):
        return played.read_bytes()
    return b"".join([block async for block in played.blocks(0, played.size_bytes)])


async def test_what_browsers_play_is_given_as_it_lies(cold: ColdStore, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", SECONDS)
    played = await Player(cold, tmp_path / "playing").open(await keep(cold, clip))

    assert await content(played) == clip.read_bytes()
    assert not (tmp_path / "playing").exists()
    if isinstance(played, Stored):
        assert (played.size_bytes, played.media_type) == (clip.stat().st_size, "video/mp4")


@pytest.mark.parametrize("ending", ["ts", "mkv"])
async def test_a_cameras_footage_is_put_into_mp4_once(cold: ColdStore, tmp_path: Path, ending: str) -> None:
    clip = write_clip(tmp_path / f"a.{ending}", SECONDS)
    player = Player(cold, tmp_path / "playing")
    segment = await keep(cold, clip)
    played = await player.open(segment)
    assert isinstance(played, Path)
    made_at = played.stat().st_ino
    again = await player.open(segment)

    assert isinstance(again, Path)
    assert (again, again.stat().st_ino) == (played, made_at)
    with av.open(io.BytesIO(played.read_bytes()), "r") as source:
        assert "mp4" in source.format.name
        times_s = [frame.time for frame in source.decode(video=0)]
    assert times_s == pytest.approx([number / FPS for number in range(round(SECONDS * FPS))], abs=0.01)


async def test_what_holds_no_video_is_given_as_it_is(cold: ColdStore, tmp_path: Path) -> None:
    rubbish = tmp_path / "a.ts"
    rubbish.write_bytes((b"G" + bytes(187)) * 100)
    player = Player(cold, tmp_path / "playing")

    segment = await keep(cold, rubbish)
    for _ in range(2):
        assert await content(await player.open(segment)) == rubbish.read_bytes()
    (noted,) = (tmp_path / "playing").iterdir()
    assert noted.stat().st_size == 0, "so that it is not tried at each request"
    os.utime(noted, (time.time() - 700,) * 2)
    await player.tidy()
    assert not noted.exists()


async def test_footage_that_is_gone_is_not_found(cold: ColdStore, tmp_path: Path) -> None:
    segment = await keep(cold, write_clip(tmp_path / "a.mp4", 1.0))
    await cold.forget_segment(segment.path)

    with pytest.raises(NotFound):
        await Player(cold, tmp_path / "playing").open(segment)


async def test_what_nobody_asks_for_any_more_is_removed(cold: ColdStore, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", 1.0)
    player = Player(cold, tmp_path / "playing", most_kept_bytes=1)
    kept = [await player.open(await keep(cold, clip, number)) for number in range(3)]
    paths = [path for path in kept if isinstance(path, Path)]
    await player.tidy()
    assert all(path.exists() for path in paths), "their answers may still be on their way"
    for path, age_s in zip(paths, (700, 100, 0), strict=True):
        os.utime(path, (time.time() - age_s,) * 2)
    await player.tidy()

    assert [path.exists() for path in paths] == [False, False, True]


async def live(gateway: Gateway, cold: ColdStore, folder: Path, count: int) -> str:
    """A camera's recording of segments with a hole of one segment after the second."""
    source = {"type": "rtsp", "url": "rtsp://camera.example/yard"}
    made = await gateway.client.post("/v1/recordings", json={"source": source}, headers=BEARER)
    recording_id = str(made.json()["id"])
    claim = await JobStore(gateway.database).claim("worker", (JobKind.INGEST,), 30)
    assert claim is not None
    for number in range(count):
        clip = write_clip(folder / f"{number}.ts", SECONDS, seed=number)
        segment = await keep(cold, clip, number, recording_id)
        start_s = SECONDS * (number + (number > 1))
        await claim.add_segment(
            Segment(**{**vars(segment), "start_s": start_s})  # where it lies in time
        )
    end_s = SECONDS * (count + 1)
    await claim.update_recording(state=RecordingState.LIVE, captured_at=1.0, duration_s=end_s, ingested_s=end_s)
    return recording_id


async def test_all_segments_are_listed_and_each_is_played_wherever_it_lies(cold: ColdStore, tmp_path: Path) -> None:
    async with serving(tmp_path, cold=cold) as gateway:
        recording_id = await live(gateway, cold, tmp_path, 4)
        path = f"/v1/recordings/{recording_id}"
        first = (await gateway.client.get(f"{path}/segments?limit=3", headers=BEARER)).json()
        rest = (await gateway.client.get(f"{path}/segments?cursor={first['next_cursor']}", headers=BEARER)).json()
        after = (await gateway.client.get(f"{path}/segments?start_s=9&limit=1", headers=BEARER)).json()
        bodies = []
        for number in range(4):
            link = await gateway.client.post(f"{path}/media_link?segment={number}", headers=BEARER)
            bodies.append(await gateway.client.get(link.json()["url"]))
        other = await gateway.client.get(f"{path}/segments", headers={"Authorization": f"Bearer {OTHER_KEY}"})
        none = await gateway.client.get(f"{path}/media?segment=9", headers=BEARER)
    listed = [*first["data"], *rest["data"]]
    assert [(one["number"], one["start_s"], one["duration_s"]) for one in listed] == [
        (0, 0, 4), (1, 4, 4), (2, 12, 4), (3, 16, 4),
    ]  # fmt: skip
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["number"] for one in after["data"]] == [2], "the next one, where nothing was recorded"
    assert {(one.status_code, one.headers["content-type"]) for one in bodies} == {(200, "video/mp4")}
    assert len({one.content for one in bodies}) == 4
    assert (other.status_code, none.status_code) == (404, 404)


async def test_ranges_of_what_lies_in_a_store_are_read_from_there(tmp_path: Path) -> None:
    cold = ColdStore(f"memory://kept-{secrets.token_hex(4)}")
    clip = write_clip(tmp_path / "a.mp4", SECONDS)
    whole = clip.read_bytes()
    async with serving(tmp_path, cold=cold) as gateway:
        body = {"source": {"type": "url", "url": "https://example.com/a.mp4"}}
        recording_id = (await gateway.client.post("/v1/recordings", json=body, headers=BEARER)).json()["id"]
        claim = await JobStore(gateway.database).claim("worker", (JobKind.INGEST,), 30)
        assert claim is not None
        await claim.add_segment(await keep(cold, clip, 0, recording_id))

        async def asked(span: str | None) -> tuple[int, bytes, str | None]:
            headers = BEARER if span is None else {**BEARER, "Range": span}
            answer = await gateway.client.get(f"/v1/recordings/{recording_id}/media", headers=headers)
            return answer.status_code, answer.content, answer.headers.get("content-range")

        size = len(whole)
        assert await asked(None) == (200, whole, None)
        assert await asked("bytes=0-") == (206, whole, f"bytes 0-{size - 1}/{size}")
        assert await asked("bytes=100-199") == (206, whole[100:200], f"bytes 100-199/{size}")
        assert await asked(f"bytes=100-{size * 2}") == (206, whole[100:], f"bytes 100-{size - 1}/{size}")
        assert await asked("bytes=-50") == (206, whole[-50:], f"bytes {size - 50}-{size - 1}/{size}")
        assert await asked("bytes=0-1,4-5") == (200, whole, None)
        assert await asked("pages=1-2") == (200, whole, None)
        status, said, where = await asked(f"bytes={size}-")
    assert (status, where) == (416, f"bytes */{size}")
    assert b"no such bytes" in said
