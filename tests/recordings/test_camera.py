"""A real RTSP conversation with a camera that misbehaves: states, gaps and clocks are right, and nothing leaks."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import psutil
import pytest
from cryptography.fernet import Fernet

from nvila.errors import (
    ForbiddenURL,
    InvalidMedia,
    InvalidRequest,
    NotFound,
    NvilaError,
    Unauthenticated,
    Unavailable,
)
from nvila.locks import LOCK
from nvila.recordings.camera import CameraLimits, CameraReader, check_camera_url
from nvila.recordings.capture import CaptureClock, StatusReader, parameter_sets
from nvila.recordings.seal import Seal
from nvila.recordings.sources import Away, Footage, LiveEvent, Lost
from nvila.recordings.types import Recording, Source, SourceKind
from nvila.telemetry.metrics import Metrics
from tests.certificates import make_certificate
from tests.recordings import made
from tests.recordings.rtsp import Camera, Clip, camera
from tests.recordings.taking import write_clip

_LIMITS = CameraLimits(
    segment_s=0.4, open_s=5.0, silence_s=2.0, first_pause_s=0.2, longest_pause_s=0.4, refused_pause_s=0.5
)
_SECRET = "operator:p@ss/w:rd"
_SEAL = Seal([Fernet.generate_key().decode()])


class Loopback:
    """Lets every host be 127.0.0.1. `asked`: hosts and ports."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if host == "inside.example":
            raise ForbiddenURL("the camera's address does not lead to an allowed host")
        return ["127.0.0.1"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip.read(write_clip(tmp_path_factory.mktemp("camera") / "a.mp4", 4.0, fps=10, gop=5))


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """Of another size."""
    return Clip.read(write_clip(tmp_path_factory.mktemp("camera") / "b.mp4", 4.0, fps=10, gop=5, size=(160, 96)))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[CameraReader]:
    opened = CameraReader(Loopback(), tmp_path / "captures", Metrics(), _LIMITS, _SEAL)
    yield opened
    opened.close()


def watched(shown: Camera, *, secret: str | None = None, tenant: str = "acme", url: str = "") -> Recording:
    recording = made.recording(tenant, SourceKind.RTSP)
    return replace(recording, source=Source(kind=SourceKind.RTSP, url=url or shown.url, secret=secret))


async def next_of(events: AsyncIterator[LiveEvent], kind: type, within_s: float = 30.0) -> LiveEvent:
    """The next event of a kind; footage before it is let go."""
    async with asyncio.timeout(within_s):
        async for event in events:
            if isinstance(event, kind):
                return event
            if isinstance(event, Footage):
                event.taken()
    raise AssertionError("the source ended")


async def footage(events: AsyncIterator[LiveEvent]) -> Footage:
    event = await next_of(events, Footage)
    assert isinstance(event, Footage)
    return event


async def away(events: AsyncIterator[LiveEvent]) -> Away:
    event = await next_of(events, Away)
    assert isinstance(event, Away)
    return event


def described(path: Path) -> tuple[tuple[int, int], int, bool]:
    """Size, frames that decode, and whether the first is a key frame."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return (frames[0].width, frames[0].height), len(frames), frames[0].key_frame


async def test_packets_become_files_that_decode_cut_at_key_frames_and_placed_in_time(
    reader: CameraReader, clip: Clip
) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        before = time.time()
        first, second, third = [await footage(events) for _ in range(3)]
        assert described(second.path) == ((96, 64), 5, True)
    assert first.is_new_session
    assert not second.is_new_session
    assert before - 1 < first.captured_at < time.time()
    assert second.captured_at - first.captured_at == pytest.approx(0.5, abs=0.02), (
        "its key frames are half a second apart"
    )
    assert third.captured_at - second.captured_at == pytest.approx(0.5, abs=0.02)


async def test_a_camera_that_drops_is_told_away_and_connected_to_again(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        before = await footage(events)
        await shown.stop()
        gone = await away(events)
        assert isinstance(gone.error, Unavailable)
        await asyncio.sleep(1.0)
        await shown.start()
        while not (after := await footage(events)).is_new_session:
            pass
    assert after.captured_at - before.captured_at > 1.0, "the clock runs on while it is away"


@pytest.mark.parametrize("error", [InvalidMedia("the host is not known"), Unavailable("no name server answers")])
async def test_a_name_server_that_forgets_costs_a_moment(clip: Clip, tmp_path: Path, error: NvilaError) -> None:
    class Forgetful(Loopback):
        async def addresses(self, host: str, port: int) -> Sequence[str]:
            if not self.asked:
                self.asked.append((host, port))
                raise error
            return await super().addresses(host, port)

    patient = replace(_LIMITS, refused_pause_s=600.0)
    reader = CameraReader(Forgetful(), tmp_path / "captures", Metrics(), patient)
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        assert (await away(events)).error is error
        assert (await footage(events)).is_new_session
    reader.close()


async def test_a_camera_that_vanishes_is_counted_away_and_so_is_one_that_was_never_reached(
    clip: Clip, tmp_path: Path
) -> None:
    metrics = Metrics()
    reader = CameraReader(Loopback(), tmp_path / "captures", metrics, _LIMITS)

    def counted() -> list[float | None]:
        states = ("connected", "away")
        return [metrics.registry.get_sample_value("nvila_captures", {"source": "rtsp", "state": one}) for one in states]

    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        await shown.stop()
        await away(events)
        assert counted() == [0, 1]
        await shown.start()
        await footage(events)
        assert counted() == [1, 0]
        await shown.stop()
        await away(events)
        assert counted() == [0, 1]
    assert counted() == [0, 0]
    reader.close()


async def test_who_is_too_slow_is_told_what_was_lost(clip: Clip, tmp_path: Path) -> None:
    reader = CameraReader(Loopback(), tmp_path / "captures", Metrics(), replace(_LIMITS, most_waiting=1))
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        first = await footage(events)
        async with asyncio.timeout(30):
            while not list(first.path.parent.glob("0-4.*")):
                await asyncio.sleep(0.02)
        lost, after = await anext(events), await anext(events)
    assert isinstance(lost, Lost)
    assert isinstance(after, Footage), "what was lost is told as one"
    assert lost.start == pytest.approx(first.until, abs=0.02)
    assert first.until == pytest.approx(first.captured_at + 0.5, abs=0.02)
    assert after.captured_at == pytest.approx(lost.until, abs=0.02)
    reader.close()


async def test_who_is_busy_is_told_only_the_last_of_the_failures_to_connect(tmp_path: Path) -> None:
    door, recording = Loopback(), made.recording(kind=SourceKind.RTSP)
    recording = replace(recording, source=Source(kind=SourceKind.RTSP, url="rtsp://inside.example/yard"))
    reader = CameraReader(door, tmp_path / "captures", Metrics(), replace(_LIMITS, refused_pause_s=0.05))
    async with aclosing(reader.events(recording)) as events:
        await away(events)
        async with asyncio.timeout(30):
            while len(door.asked) < 5:
                await asyncio.sleep(0.01)
        assert isinstance((await away(events)).error, ForbiddenURL)
        told_at = len(door.asked)
        await away(events)
        assert len(door.asked) > told_at, "of a failure after that"
    reader.close()


async def test_a_camera_whose_certificate_is_not_trusted_is_told_so_and_read_once_its_authority_is(
    reader: CameraReader, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_for = make_certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(made_for / "tls.crt", made_for / "tls.key")
    async with camera(clip, tls=tls) as shown:
        async with aclosing(reader.events(watched(shown))) as events:
            assert "certificate is not trusted: self-signed" in (await away(events)).error.message
        monkeypatch.setenv("SSL_CERT_FILE", str(made_for / "ca.crt"))
        async with aclosing(reader.events(watched(shown))) as events:
            assert isinstance(await anext(events), Footage)


async def test_a_silent_camera_is_told_away(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        await footage(events)
        shown.is_silent = True
        assert "silent" in (await away(events)).error.message
        shown.is_silent = False
        assert (await footage(events)).is_new_session


async def test_the_first_picture_of_a_connection_is_kept_however_rare_key_frames_are_and_silence_is_told_in_time(
    reader: CameraReader, tmp_path: Path
) -> None:
    rare = Clip.read(write_clip(tmp_path / "rare.mp4", 30.0, fps=10, gop=300))
    async with camera(rare) as shown, aclosing(reader.events(watched(shown))) as events:
        waiting = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(30):
            while not any(request.startswith("PLAY") for request in shown.requests):
                await asyncio.sleep(0.02)
        await asyncio.sleep(2.5)
        shown.is_silent, fell_silent = True, time.monotonic()
        piece = await waiting
        assert time.monotonic() - fell_silent < 2 * _LIMITS.silence_s
        assert isinstance(piece, Footage), "there is no other key frame within half a minute"
        _, frames, is_key = described(piece.path)
        assert is_key
        assert frames > 10
        assert "silent" in (await away(events)).error.message


async def test_a_picture_whose_slices_come_each_with_parameter_sets_stays_whole(
    reader: CameraReader, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "slices.mp4", 4.0, fps=10, gop=5, slices=2)
    clip = Clip.read(path)
    frames = [
        tuple(part for unit in units for part in ((*clip.parameters, unit) if unit[0] & 0x1F == 5 else (unit,)))
        for units in clip.frames
    ]
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray() for frame in container.decode(video=0)]
    async with (
        camera(Clip(tuple(frames), clip.fps)) as shown,
        aclosing(reader.events(watched(shown))) as events,
    ):
        with av.open(str((await footage(events)).path)) as container:
            seen = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert len(seen) == 5
    assert all((one == other).all() for one, other in zip(seen, pictures, strict=False))


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_who_takes_connections_and_says_nothing_does_not_answer(tmp_path: Path, hangs_up: bool) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024) and not hangs_up:
            pass
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    url = f"rtsp://127.0.0.1:{server.sockets[0].getsockname()[1]}/yard"
    reader = CameraReader(Loopback(), tmp_path / "captures", Metrics(), replace(_LIMITS, open_s=1.0))
    recording = replace(made.recording("acme", SourceKind.RTSP), source=Source(kind=SourceKind.RTSP, url=url))
    async with server, aclosing(reader.events(recording)) as events:
        error = (await away(events)).error
    assert isinstance(error, Unavailable)
    assert ("without an answer" if hangs_up else "did not answer in 1 s") in error.message
    reader.close()


async def test_another_resolution_begins_another_file(reader: CameraReader, clip: Clip, other_clip: Clip) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        first = described((await footage(events)).path)
        shown.clip = other_clip
        sizes = [described((await footage(events)).path) for _ in range(3)]
    assert first[0] == (96, 64)
    assert sizes[-1][0] == (160, 96)
    assert all(is_key for _, _, is_key in sizes)
    assert all(size in ((96, 64), (160, 96)) for size, _, _ in sizes)


@pytest.mark.parametrize("jump_s", [3600.0, -5.0])
async def test_a_camera_whose_clock_is_set_keeps_its_place_in_time(
    reader: CameraReader, clip: Clip, jump_s: float
) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as events:
        first = await footage(events)
        shown.clock_s = jump_s
        pieces = [await footage(events) for _ in range(3)]
    assert not any(piece.is_new_session for piece in pieces)
    ends = [first.captured_at, *(piece.captured_at for piece in pieces)]
    steps = [after - before for before, after in pairwise(ends)]
    assert all(0.0 < step < 2.0 for step in steps), steps


@pytest.mark.parametrize("is_digest", [True, False])
async def test_credentials_are_given_and_their_revocation_is_told_and_never_logged(
    reader: CameraReader, clip: Clip, is_digest: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    user, _, password = _SECRET.partition(":")
    async with (
        camera(clip, user=user, password=password, is_digest=is_digest) as shown,
        aclosing(reader.events(watched(shown, secret=_SEAL.close(_SECRET)))) as events,
    ):
        await footage(events)
        argv = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
        shown.password = "another"
        shown.drop()
        gone = await away(events)
        while not isinstance(gone.error, Unauthenticated):
            gone = await away(events)
        shown.password = password
        await footage(events)
    told = [gone.error.message, *argv, *(str(record.__dict__) for record in caplog.records)]
    assert not any(part in text for text in told for part in ("p@ss", "p%40ss", "operator"))


async def test_a_stream_that_is_not_there_is_told(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown:
        nowhere = watched(shown, url=f"rtsp://127.0.0.1:{shown.port}/attic")
        async with aclosing(reader.events(nowhere)) as events:
            assert isinstance((await away(events)).error, NotFound)


async def test_a_redirect_is_not_followed(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown, camera(clip) as inside:
        shown.redirect_to = inside.url
        async with aclosing(reader.events(watched(shown))) as events:
            assert isinstance((await away(events)).error, ForbiddenURL)
        assert inside.connections == 0


async def test_an_address_that_is_not_allowed_is_never_connected_to(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown:
        forbidden = watched(shown, url=f"rtsp://inside.example:{shown.port}/yard")
        async with aclosing(reader.events(forbidden)) as events:
            assert isinstance((await away(events)).error, ForbiddenURL)
        assert shown.connections == 0


async def test_all_who_record_a_camera_share_one_connection_and_one_process(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown:
        async with (
            aclosing(reader.events(watched(shown))) as first,
            aclosing(reader.events(watched(shown))) as second,
            aclosing(reader.events(watched(shown, tenant="umbra"))) as stranger,
        ):
            one, _, _ = await asyncio.gather(footage(first), footage(second), footage(stranger))
            assert reader.captures == 2, "tenants share nothing"
            assert shown.connections == 2
            assert one.path.exists(), "the other has not taken it"
        assert reader.captures == 0


async def test_who_leaves_in_the_middle_of_a_piece_leaves_it_to_the_others(reader: CameraReader, clip: Clip) -> None:
    async with camera(clip) as shown, aclosing(reader.events(watched(shown))) as stays:
        async with aclosing(reader.events(watched(shown))) as leaves:
            one, same = await asyncio.gather(footage(stays), footage(leaves))
            assert one.path == same.path
        assert one.path.exists()
        one.taken()
        assert not one.path.exists()


async def test_nothing_is_left_after_a_hundred_adds_and_removes(
    reader: CameraReader, clip: Clip, tmp_path: Path
) -> None:
    process = psutil.Process()
    others = set(process.children(recursive=True))  # what other tests have started

    def kept() -> tuple[int, int, int]:
        return process.num_fds(), len(asyncio.all_tasks()), process.num_threads()

    async with camera(clip) as shown:
        for round_ in range(2):
            if round_ == 1:
                before = kept()
            for _ in range(10 if round_ == 0 else 90):
                events = reader.events(watched(shown))
                waiting = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.005)
                waiting.cancel()
                await asyncio.wait({waiting})
                await events.aclose()
        async with asyncio.timeout(30):
            while set(process.children(recursive=True)) - others or shown.clients:
                await asyncio.sleep(0.05)
        after = kept()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (after, before)
    assert reader.captures == 0
    (folder,) = (tmp_path / "captures").iterdir()
    assert [path.name for path in folder.iterdir()] == [LOCK]


async def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "captures" / "1-abc" / "x"
    left.mkdir(parents=True)
    (left / "0-0.ts").write_bytes(b"footage")
    CameraReader(Loopback(), tmp_path / "captures", Metrics(), _LIMITS).close()
    assert not left.exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://camera/yard",
        "rtsp://",
        "rtsp://user:pw@camera/yard",
        "rtsp://camera:0/",
        "rtsp://cam era/",
        "rtsp://[::1",
    ],
)
def test_what_is_no_cameras_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_camera_url(url)
    assert refused.value.param == "url"


# -- the clock, the relay's reader and the parameters, by themselves


def test_late_packets_do_not_move_a_piece() -> None:
    clock = CaptureClock()
    for number in range(80):
        arrived_at = max(1000 + number * 0.1 + 0.2, 1005 if number > 3 else 0)  # a stall of 4.5 s, then all at once
        assert not clock.jumps(number * 0.1, arrived_at)
        clock.saw(number * 0.1, arrived_at)
    assert clock.finish(0.0) == pytest.approx(1000.2)


def test_pieces_that_come_late_as_a_whole_do_not_move_what_follows() -> None:
    clock, placed = CaptureClock(), []
    for piece in range(6):
        for number in range(10):
            stamp_s = piece + number * 0.1
            arrived_at = max(1000 + stamp_s, 1005.5 if piece >= 2 else 0)  # a stall of 3.5 s, then all at once
            assert not clock.jumps(stamp_s, arrived_at)
            clock.saw(stamp_s, arrived_at)
        placed.append(clock.finish(float(piece)))
    assert placed == pytest.approx([1000 + piece for piece in range(6)])


def test_slow_drift_is_followed_from_piece_to_piece() -> None:
    clock, placed = CaptureClock(), []
    for piece in range(50):
        for number in range(10):
            stamp_s = piece + number * 0.1
            clock.jumps(stamp_s, 1000 + stamp_s * 1.1)
            clock.saw(stamp_s, 1000 + stamp_s * 1.1)
        placed.append(clock.finish(float(piece)))
    assert placed[-1] == pytest.approx(1000 + 49 * 1.1, abs=1.0)


def test_statuses_are_read_past_interleaved_media_in_pieces_of_any_size() -> None:
    said = b"$\0\0\5RTSP/RTSP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbodyRTSP/1.0 401 Unauthorized\r\nCSeq: 2\r\n\r\n"
    reader, seen = StatusReader(), []
    for at in range(len(said)):
        reader.feed(said[at : at + 1])
        seen.append(reader.last)
    assert sorted(set(seen)) == [0, 200, 401]


def test_parameter_sets_are_told_from_other_units() -> None:
    sps, pps, idr = b"\x67\x42\x01", b"\x68\xce\x02", b"\x65\x88\x03"
    data = b"\0\0\0\1" + sps + b"\0\0\0\1" + pps + b"\0\0\1" + idr
    assert parameter_sets(data, "h264") == sps + pps
    assert parameter_sets(data, "mjpeg") == b""
