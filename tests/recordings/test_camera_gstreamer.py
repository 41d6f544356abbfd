"""The same camera code against a server that others wrote: GStreamer's, with real encoders, in the system's Python.

Debian: gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-{base,good,ugly}, python3-gi; without them these tests are
skipped. Drops of 60 s (refused, and silent), H.265, VP8, Basic credentials and a hundred adds and removes were run by
hand against the same server.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from nvila.errors import Unauthenticated
from nvila.recordings.camera import CameraLimits, CameraReader
from nvila.recordings.chunks import IngestLimits
from nvila.recordings.jobs import JobStore
from nvila.recordings.seal import Seal
from nvila.recordings.sources import LiveSources
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import ChunkPolicy, RecordingState, Source, SourceKind
from nvila.telemetry.metrics import Metrics
from nvila.video.pool import DecodePool
from tests.recordings import made
from tests.recordings.taking import Elsewhere, Taking
from tests.recordings.test_camera import Loopback, away, described, footage
from tests.recordings.test_live import until
from tests.video.conftest import decode_pool

_PYTHON = "/usr/bin/python3"
_SEAL = Seal([Fernet.generate_key().decode()])

_SERVER = """
import json, sys, threading
import gi
for name in ("Gst", "GstRtsp", "GstRtspServer"):
    gi.require_version(name, "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer as Rtsp

Gst.init(None)
missing = [name for name in ("videotestsrc", "x264enc", "rtph264pay", "jpegenc", "rtpjpegpay")
           if not Gst.ElementFactory.find(name)]
if missing:
    sys.exit(f"no {missing[0]}")
CODECS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=5 ! rtph264pay name=pay0 config-interval=-1",
    "mjpeg": "jpegenc ! rtpjpegpay name=pay0",
}
server, shown = Rtsp.RTSPServer.new(), {}
permissions = Rtsp.RTSPPermissions()
permissions.add_role("user")
permissions.add_permission_for_role("user", "media.factory.access", True)
permissions.add_permission_for_role("user", "media.factory.construct", True)

def caps(width, height):
    return f"video/x-raw,format=I420,width={width},height={height},framerate=10/1"

def show(codec="h264", width=640, height=360):
    factory = Rtsp.RTSPMediaFactory.new()
    factory.set_launch(f"( videotestsrc is-live=true ! capsfilter name=size caps={caps(width, height)} "
                       f"! {CODECS[codec]} )")
    factory.set_shared(True)
    factory.set_permissions(permissions)
    factory.connect("media-configure", lambda _, media: shown.update(media=media))
    server.get_mount_points().add_factory("/yard", factory)

def resize(width, height):
    element = shown["media"].get_element().get_by_name("size")
    element.set_property("caps", Gst.Caps.from_string(caps(width, height)))

def set_clock(seconds):
    shown["media"].get_element().get_parent().iterate_recurse().foreach(
        lambda one, *_: one.set_property("sync", False) if one.find_property("sync") else None)
    pay = shown["media"].get_element().get_by_name("pay0")
    pay.get_static_pad("sink").get_peer().set_offset(int(seconds * Gst.SECOND))

def lock(user, password):
    auth, token = Rtsp.RTSPAuth.new(), Rtsp.RTSPToken()
    token.set_string("media.factory.role", "user")
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    auth.add_digest(user, password, token)
    server.set_auth(auth)

def drop():
    server.client_filter(lambda *_: Rtsp.RTSPFilterResult.REMOVE)

def clients():
    return len(server.client_filter(lambda *_: Rtsp.RTSPFilterResult.REF))

def do(line):
    what, more = json.loads(line)
    print(json.dumps(globals()[what](**more)), flush=True)

def listen():
    for line in sys.stdin:
        GLib.idle_add(do, line)
    GLib.idle_add(loop.quit)

server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
show()
if not server.attach(None):
    sys.exit("the port is taken")
print(server.get_bound_port(), flush=True)
loop = GLib.MainLoop()
threading.Thread(target=listen, daemon=True).start()
loop.run()
"""


class Gstreamer:
    """The server in a process of its own. `port`: the same after a kill."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Raises `OSError` or `ValueError` where there is no such server."""
        self._process = subprocess.Popen(
            [_PYTHON, "-c", _SERVER, str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def do(self, what: str, **more: object) -> object:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, more]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @property
    def source(self) -> Source:
        return Source(kind=SourceKind.RTSP, url=f"rtsp://127.0.0.1:{self.port}/yard")


@pytest.fixture
def shown() -> Iterator[Gstreamer]:
    server = Gstreamer()
    try:
        server.start()
    except (OSError, ValueError):
        server.kill()
        pytest.skip(f"{_PYTHON} has no GStreamer RTSP server with its encoders (gir1.2-gst-rtsp-server-1.0)")
    yield server
    server.kill()


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture(scope="module")
async def frames() -> AsyncIterator[DecodePool]:
    async with decode_pool(arena_bytes=96 * 1024**2) as pool:
        yield pool


@pytest.mark.slow
async def test_a_camera_that_is_gone_for_five_seconds_and_comes_back_in_another_size_is_one_recording_with_a_gap(
    shown: Gstreamer, store: RecordingStore, jobs: JobStore, frames: DecodePool, tmp_path: Path
) -> None:
    taking = Taking.over(store, jobs, frames, tmp_path, limits=IngestLimits(late_s=12.0))
    limits = CameraLimits(segment_s=2.0, first_pause_s=0.2, longest_pause_s=0.4)
    reader = CameraReader(Loopback(), tmp_path / "captures", taking.metrics, limits)
    taking.live = LiveSources({SourceKind.RTSP: reader})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, ChunkPolicy(fps=4.0, chunk_s=2.0), kind=SourceKind.RTSP)
    taking.shelf = Elsewhere(store, shown.source)  # type: ignore[assignment]  # with the server's own port
    work = asyncio.ensure_future(taking.handler()(await taking.claim()))
    assert (await until(taking, recording_id, 1)).state is RecordingState.LIVE
    gone = time.monotonic()
    shown.kill()
    await asyncio.sleep(5.0)
    recording = await store.get(recording_id, tenant="acme")
    assert (recording.state, recording.error_code) == (RecordingState.INTERRUPTED, "unavailable")
    shown.start()
    shown.do("show", width=320, height=240)
    recording = await until(taking, recording_id, 6)
    away_s = time.monotonic() - gone
    work.cancel()
    await asyncio.wait({work})
    reader.close()
    chunks = await store.chunks(recording_id)
    gaps = [gap for chunk in chunks for gap in chunk.gaps]
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(before.end_s == after.start_s for before, after in pairwise(gaps)), "it is one"
    assert 4.0 < sum(gap.end_s - gap.start_s for gap in gaps) < away_s
    assert (recording.state, recording.counters.reconnects) == (RecordingState.LIVE, 1)
    assert taking.metrics.registry.get_sample_value("nvila_capture_reconnects_total") == 1.0
    segments = await store.segments(recording_id)
    async with taking.cold.open(segments[0].path) as first, taking.cold.open(segments[-1].path) as last:
        assert (described(first), described(last)) == (((640, 360), 20, True), ((320, 240), 20, True))


async def test_size_clock_codec_and_credentials_may_change_and_nothing_stays_connected(
    shown: Gstreamer, tmp_path: Path
) -> None:
    limits = CameraLimits(segment_s=1.0, first_pause_s=0.2, longest_pause_s=0.4, refused_pause_s=0.5)
    reader = CameraReader(Loopback(), tmp_path / "captures", Metrics(), limits, _SEAL)
    source = replace(shown.source, secret=_SEAL.close("operator:p@ss/w:rd"))
    shown.do("lock", user="operator", password="p@ss/w:rd")
    async with aclosing(reader.events(replace(made.recording(kind=SourceKind.RTSP), source=source))) as events:
        first = await footage(events)
        assert described(first.path) == ((640, 360), 10, True)
        shown.do("resize", width=320, height=240)
        while described((piece := await footage(events)).path)[0] != (320, 240):
            pass
        shown.do("set_clock", seconds=3600.0)
        for _ in range(3):
            piece, before = await footage(events), piece
            assert 0.0 < piece.captured_at - before.captured_at < 2.5
            assert not piece.is_new_session

        shown.do("lock", user="operator", password="another")
        shown.do("show", codec="mjpeg")
        shown.do("drop")
        while not isinstance((await away(events)).error, Unauthenticated):
            pass
        shown.do("lock", user="operator", password="p@ss/w:rd")
        piece = await footage(events)
        assert piece.is_new_session
        assert piece.path.suffix == ".mkv"
        assert described(piece.path)[0] == (640, 360)
    async with asyncio.timeout(30):
        while shown.do("clients"):
            await asyncio.sleep(0.05)
    reader.close()
