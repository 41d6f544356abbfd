"""Pushed video: cut into files that open on their own, kept through broken lines, held back when nobody takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from nvila.errors import Conflict, InvalidMedia, LimitExceeded, NotFound, NvilaError, Overloaded, UnsupportedMedia
from nvila.gateway import push
from nvila.gateway.recordings import Recordings
from nvila.recordings.inbox import Inbox, Piece
from nvila.recordings.types import Recording, SourceKind
from tests.gateway.faces import BEARER, OTHER_KEY, Gateway, serving
from tests.gateway.pushing import FPS, MP4, encoded, pictures
from tests.recordings import made

ID = "rec_" + "0" * 32
TS_TYPE, MP4_TYPE, JPEG_TYPE = push.CUTTERS


def _cut(folder: Path, content_type: str, data: bytes, captured_at: float | None, step: int = 777) -> list[Piece]:
    inbox = Inbox(folder)
    with inbox.writing(ID) as writer:
        cutter = push.cutter(content_type, writer, captured_at)
        for at in range(0, len(data), step):
            cutter.feed(data[at : at + step])
        cutter.finish()
    return inbox.pieces(ID)


def _frames(piece: Piece) -> list[av.VideoFrame]:
    with av.open(str(piece.path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(("content_type", "container", "options"), [(TS_TYPE, "mpegts", {}), (MP4_TYPE, "mp4", MP4)])
@pytest.mark.parametrize("step", [100, 777, 1 << 20])
def test_pieces_open_on_their_own_and_lose_no_frame(
    tmp_path: Path, content_type: str, container: str, options: dict[str, str], step: int
) -> None:
    pieces = _cut(tmp_path, content_type, encoded(container, options=options), 1000.0, step)
    assert [piece.number for piece in pieces] == [0, 1, 2]
    assert [piece.captured_at for piece in pieces] == pytest.approx([1000, 1002, 1004], abs=0.01)
    for piece in pieces:
        frames = _frames(piece)
        assert len(frames) == 2 * FPS
        assert frames[0].key_frame


def _unmarked(stream: bytes) -> bytes:
    """MPEG-TS as encoders write it that mark no random access points."""
    packets = bytearray(stream)
    for at in range(0, len(packets), 188):
        if packets[at + 3] & 0x20 and packets[at + 4]:
            packets[at + 5] &= ~0x40
    return bytes(packets)


def test_a_transport_stream_without_marks_is_cut_at_its_key_frames(tmp_path: Path) -> None:
    pieces = _cut(tmp_path, TS_TYPE, _unmarked(encoded("mpegts")), 1000.0)
    assert [piece.captured_at for piece in pieces] == pytest.approx([1000, 1002, 1004], abs=0.01)
    assert [len(_frames(piece)) for piece in pieces] == [2 * FPS] * 3


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        (TS_TYPE, (b"G\x1f\xff\x10" + bytes(184)) * 10),
        (MP4_TYPE, encoded("mp4", 1, MP4).partition(b"moof")[0][:-4]),
        (JPEG_TYPE, pictures([1.0])[:-1]),
    ],
)
async def test_a_body_of_which_nothing_can_be_taken_is_refused(tmp_path: Path, content_type: str, data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield data

    async def room() -> None:
        pass

    with Inbox(tmp_path).writing(ID) as writer, pytest.raises(InvalidMedia, match=f"{len(data):,} bytes"):
        await push.receive(body(), push.cutter(content_type, writer, None), room)


def test_a_transport_stream_without_end_and_key_frames_is_refused(tmp_path: Path) -> None:
    with Inbox(tmp_path).writing(ID) as writer:
        cutter = push.TsCutter(push.Pieces(writer), push.Clock(None), _skipped_bytes=64 << 20)
        with pytest.raises(LimitExceeded, match="without a key frame"):
            cutter.feed(b"G\x1f\xff\x10" + bytes(184))


def test_pictures_keep_their_capture_times(tmp_path: Path) -> None:
    times = [5000.0, 5000.7, 5001.4, 5002.1, 5009.25]
    pieces = _cut(tmp_path, JPEG_TYPE, pictures(times), None)
    found = [piece.captured_at + float(frame.time or 0) for piece in pieces for frame in _frames(piece)]
    assert found == pytest.approx(times, abs=0.001)


def test_a_picture_of_another_size_begins_another_file(tmp_path: Path) -> None:
    data = pictures([1.0, 1.1]) + pictures([1.2], size=(32, 32))
    pieces = _cut(tmp_path, JPEG_TYPE, data, None)
    assert [_frames(piece)[0].width for piece in pieces] == [64, 32]


@pytest.mark.parametrize(
    ("content_type", "data", "error"),
    [
        (TS_TYPE, b"<html>" * 100, InvalidMedia),
        (MP4_TYPE, b"\0\0\0\1junkjunkjunk", LimitExceeded),
        (MP4_TYPE, b"\0\0\0\4junk", InvalidMedia),
        (MP4_TYPE, b"\xff\xff\xff\xffmdat", LimitExceeded),
        (MP4_TYPE, b"\0\0\0\x08moof", InvalidMedia),
        (MP4_TYPE, b"\0\0\0\x08moov\0\0\0\x08mdat", InvalidMedia),
        (JPEG_TYPE, b"\x7f\xf8" + bytes(6) + b"\0\0\0\1x", InvalidMedia),
        (JPEG_TYPE, b"\x40" + bytes(7) + b"\xff\xff\xff\xff", LimitExceeded),
        (JPEG_TYPE, b"\x40" + bytes(7) + b"\0\0\0\4\xff\xd8\xff\xe0", InvalidMedia),
        (JPEG_TYPE, pictures([2.0]) + pictures([1.0]), InvalidMedia),
        ("video/webm", b"", UnsupportedMedia),
        ("", b"", UnsupportedMedia),
    ],
)
def test_what_is_not_what_it_says_is_refused(
    tmp_path: Path, content_type: str, data: bytes, error: type[NvilaError]
) -> None:
    with pytest.raises(error):
        _cut(tmp_path, content_type, data, None)


@pytest.mark.parametrize(("content_type", "container", "options"), [(TS_TYPE, "mpegts", {}), (MP4_TYPE, "mp4", MP4)])
def test_a_capture_time_in_milliseconds_is_refused_and_nothing_is_taken(
    tmp_path: Path, content_type: str, container: str, options: dict[str, str]
) -> None:
    with pytest.raises(InvalidMedia, match="must be seconds since 1970"):
        _cut(tmp_path, content_type, encoded(container, options=options), 1.8e12)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_head_that_comes_again_is_held_once(tmp_path: Path) -> None:
    data = encoded("mp4", options=MP4)
    moov = data.index(b"moov") - 4
    head, rest = data[moov : (at := data.index(b"moof") - 4)], data[at:]
    (piece, *others) = _cut(tmp_path, MP4_TYPE, data[:moov] + 100 * head + rest, 1000.0)
    assert piece.path.read_bytes().count(b"moov") == 1
    assert len(others) == 2
    assert len(_frames(piece)) == 2 * FPS


def test_a_new_head_in_the_middle_begins_a_piece_of_its_own(tmp_path: Path) -> None:
    small = encoded("mp4", 1, MP4)
    large = encoded("mp4", 1, MP4, size=(96, 64))
    pieces = _cut(tmp_path, MP4_TYPE, small + large + small, 1000.0)
    assert [[frame.width for frame in _frames(piece)] for piece in pieces] == [[64] * FPS, [96] * FPS, [64] * FPS]


async def test_a_client_that_is_faster_than_the_worker_is_held_back_and_then_told(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path, most_bytes=100)
    with inbox.writing(ID) as writer:
        for _ in range(2):
            path = writer.new_path()
            path.write_bytes(bytes(80))
            writer.add(path, "ts", 1.0)
        with pytest.raises(Overloaded, match="160 bytes"):
            await inbox.wait_for_room(ID, 0.3)
        waiting = asyncio.create_task(inbox.wait_for_room(ID, 10))
        await asyncio.sleep(0)
        inbox.take(inbox.pieces(ID)[0])
        await waiting
        path = writer.new_path()
        path.write_bytes(b"x")
        writer.add(path, "ts", 2.0)
    assert [piece.number for piece in inbox.pieces(ID)] == [1, 2]


async def test_a_client_that_finds_no_room_any_more_is_told_what_is_kept_and_one_that_finds_none_keeps_nothing(
    tmp_path: Path,
) -> None:
    data, inbox = encoded("mpegts"), Inbox(tmp_path, most_bytes=1)

    async def body() -> AsyncIterator[bytes]:
        half = len(data) // 2 // 188 * 188
        yield data[:half]
        yield data[half:]

    async def room() -> None:
        await inbox.wait_for_room(ID, 0)

    with inbox.writing(ID) as writer:
        with pytest.raises(Overloaded, match=r"at most 1 may; [\d,]+ bytes of this body are taken, .* at 1002\.000"):
            await push.receive(body(), push.cutter(TS_TYPE, writer, 1000.0), room)
        kept = inbox.pieces(ID)
        assert [piece.captured_at for piece in kept] == pytest.approx([1000, 1002], abs=0.001)
        with pytest.raises(Overloaded, match=r"at most 1 may$"):
            await push.receive(body(), push.cutter(TS_TYPE, writer, 1000.0), room)
        assert inbox.pieces(ID) == kept


def test_numbers_go_on_where_another_writer_stopped_even_when_all_is_taken(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    for number in range(3):
        with inbox.writing(ID) as writer:
            path = writer.new_path()
            path.write_bytes(b"x")
            writer.add(path, "ts", 1.0)
        (piece,) = inbox.pieces(ID)
        assert piece.number == number
        inbox.take(piece)


def test_only_one_writes_and_nobody_after_the_end(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    with inbox.writing(ID) as writer:
        with pytest.raises(Conflict, match="another client"), Inbox(tmp_path).writing(ID):
            pass
        writer.end()
    assert inbox.is_ended(ID)
    with pytest.raises(Conflict, match="ended"), inbox.writing(ID):
        pass
    inbox.remove(ID)
    assert not inbox.is_ended(ID)


# -- over HTTP


async def _recording(gateway: Gateway, kind: str = "push") -> str:
    source = {"type": kind, **({} if kind == "push" else {"url": "rtsp://camera.example/1"})}
    made = await gateway.client.post("/v1/recordings", json={"source": source}, headers=BEARER)
    return str(made.json()["id"])


async def _push(gateway: Gateway, recording_id: str, content: Any, key: str = "", **query: Any) -> httpx.Response:
    headers = {**BEARER, "Content-Type": TS_TYPE, **({"Authorization": f"Bearer {key}"} if key else {})}
    url = f"/v1/recordings/{recording_id}/frames"
    return await gateway.client.post(url, content=content, headers=headers, params=query)


async def test_a_body_without_end_is_cut_while_it_comes_and_kept_when_the_line_breaks(tmp_path: Path) -> None:
    data = encoded("mpegts")
    inbox = Inbox(tmp_path / "recordings")

    async def live() -> AsyncIterator[bytes]:
        yield data[: len(data) * 5 // 6]
        await asyncio.sleep(60)

    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)
        sending = asyncio.create_task(_push(gateway, recording_id, live()))
        async with asyncio.timeout(30):
            while len(inbox.pieces(recording_id)) < 2:
                await asyncio.sleep(0.01)
        busy = await _push(gateway, recording_id, data)
        assert busy.status_code == 409
        sending.cancel()
        async with asyncio.timeout(30):
            while len(inbox.pieces(recording_id)) < 3:
                await asyncio.sleep(0.01)
            while (again := await _push(gateway, recording_id, data, captured_at=7, end=True)).status_code == 409:
                await asyncio.sleep(0.01)
        assert again.json() == {
            "id": recording_id,
            "object": "recording.pushed",
            "bytes": len(data),
            "pieces": 3,
            "last_captured_at": pytest.approx(11, abs=0.01),
            "ended": True,
        }
        over = await _push(gateway, recording_id, data)
        assert (over.status_code, over.json()["error"]["code"]) == (409, "conflict")
    assert inbox.is_ended(recording_id)
    assert all(_frames(piece) for piece in inbox.pieces(recording_id))


async def test_frames_go_only_to_ones_own_recording_that_takes_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        mine, camera = await _recording(gateway), await _recording(gateway, "rtsp")
        assert (await _push(gateway, mine, b"", key=OTHER_KEY)).status_code == 404
        assert (await _push(gateway, camera, b"")).status_code == 409
        assert (await _push(gateway, "rec_..%2f..", b"")).status_code == 404
        wrong = await _push(gateway, mine, b"<html>" * 100)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "invalid_media")


async def _pushing_while(
    gateway: Gateway, inbox: Inbox, recording_id: str, happens: Callable[[], Awaitable[object]]
) -> httpx.Response:
    """What a client is told to whose recording something happens after two of its pieces."""
    data, has_happened = encoded("mpegts"), asyncio.Event()

    async def live() -> AsyncIterator[bytes]:
        yield data[: len(data) * 5 // 6]
        await has_happened.wait()
        yield data[len(data) * 5 // 6 :]
        yield data  # more pieces, so that it is not just the end

    sending = asyncio.create_task(_push(gateway, recording_id, live()))
    async with asyncio.timeout(30):
        while len(inbox.pieces(recording_id)) < 2:
            await asyncio.sleep(0.01)
    await happens()
    has_happened.set()
    return await asyncio.wait_for(sending, 30)


@pytest.mark.parametrize("is_emptied", [True, False])
async def test_a_push_to_a_recording_that_is_deleted_meanwhile_is_told_and_leaves_nothing(
    tmp_path: Path, is_emptied: bool
) -> None:
    inbox = Inbox(tmp_path / "recordings")
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)

        async def delete() -> None:
            await gateway.client.delete(f"/v1/recordings/{recording_id}", headers=BEARER)
            if is_emptied:  # else the deletion's job is late, or a piece came as it emptied the folder
                inbox.remove(recording_id)

        told = await _pushing_while(gateway, inbox, recording_id, delete)
    assert (told.status_code, told.json()["error"]["code"]) == (404, "not_found")
    assert not (tmp_path / "recordings" / "inbox" / recording_id).exists()


async def test_a_push_to_a_recording_that_is_cancelled_meanwhile_is_told(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "recordings")
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)

        async def cancel() -> None:
            jobs = await gateway.client.get("/v1/jobs", params={"recording": recording_id}, headers=BEARER)
            await gateway.client.post(f"/v1/jobs/{jobs.json()['data'][0]['id']}/cancel", headers=BEARER)

        told = await _pushing_while(gateway, inbox, recording_id, cancel)
    assert (told.status_code, told.json()["error"]["code"]) == (409, "conflict")
    assert "complete" in told.json()["error"]["message"]


async def test_a_recording_that_is_deleted_just_before_its_folder_is_made_leaves_none(tmp_path: Path) -> None:
    class Shelf:
        """A recording that is there once."""

        asked = 0

        async def get(self, recording_id: str, *, tenant: str) -> Recording:
            self.asked += 1
            if self.asked > 1:
                raise NotFound("deleted")
            return replace(made.recording(tenant, SourceKind.PUSH), id=ID)

    nothing: Any = None
    shelf: Any = Shelf()
    recordings = Recordings(shelf=shelf, jobs=nothing, files=nothing, inbox=Inbox(tmp_path), player=nothing)
    with pytest.raises(NotFound):
        async with recordings.pushing("acme", ID):
            raise AssertionError("nothing is taken")
    assert list((tmp_path / "inbox").iterdir()) == []
