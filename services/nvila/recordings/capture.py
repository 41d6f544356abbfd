"""One connection to a camera, in a process of its own that may hang, crash or be killed: packets in, files out.

`camera.py` starts it (`python -m nvila.recordings.capture <parent's pid>`), tells it in one JSON line on standard input
where to connect, and reads one JSON line for each finished piece of footage and one for how it ended. Nothing is
decoded and nothing encoded again: packets are written as they come, a new file at each key frame after `segment_s`, at
a change of the stream's parameters (resolution, profile), and when the camera's clock jumps. One packet is held back,
since only the next tells two things that FFmpeg gets wrong: the stamp of a connection's first picture, which it gives
none, and where a picture ends whose slices come each with parameter sets before it (as from GStreamer's payloaders).

The network is kept at arm's length. FFmpeg's RTSP client never connects to the camera: it talks to a relay in this
process, which connects to the addresses that were checked beforehand and to none else, refuses redirects (RTSP 3xx),
and knows from the camera's status lines why a connection failed. Credentials come through standard input, so that no
list of processes shows them, and are in no message.

**Clock.** A frame's capture time is its stamp by the camera's clock plus an offset to ours, and the offset is the least
lateness of a packet seen in the last pieces of footage: packets come late but never early, and after a stall whole
pieces are late. It follows slow drift from piece to piece. When stamps jump without time having passed, the camera's
clock was set: a new piece begins and is placed anew.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import av
import av.error
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from nvila.errors import (
    ForbiddenURL,
    InvalidMedia,
    NotFound,
    NvilaError,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from nvila.recordings.connection import Hello
from nvila.video import sandbox
from nvila.video.probe import CODECS

_JUMP_S = 1.0
"""Stamps that are off by more than this against the time that passed are a jump of the camera's clock."""
_DRIFT_S = 0.5
_MOST_PICTURE_BYTES = 16 << 20
"""Joined of slices: a camera whose slices never begin a picture fills no memory."""
_PIECES = 4
"""Whose least lateness counts: a stall that ends by itself is shorter (`CameraLimits.silence_s`, `segment_s`)."""
_LEAST_BYTES = 2048
"""FFmpeg does not know a shorter transport stream for one (libavformat/mpegts.c, mpegts_probe: 10 packets of 204)."""
_MEMORY_BYTES = 1 << 30
_TRANSPORT_STREAM = ("h264", "hevc", "mpeg1video", "mpeg2video")
"""Codecs that travel in MPEG transport streams, where parameters stand before each key frame; others in Matroska."""
_RELAY_BYTES = 1 << 16
_LONGEST_MESSAGE = 1 << 20


class CaptureClock:
    """From a camera's stamps to capture times, piece by piece. All in seconds; stamps are those of decoding, which do
    not go back by themselves."""

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._last: tuple[float, float] | None = None
        self._least_s = math.inf
        self._before_s: deque[float] = deque(maxlen=_PIECES - 1)

    def jumps(self, stamp_s: float, arrived_at: float) -> bool:
        """Whether the camera's clock was set between the packet before and this one."""
        last, self._last = self._last, (stamp_s, arrived_at)
        if last is None:
            return False
        step_s, passed_s = stamp_s - last[0], arrived_at - last[1]
        return step_s < -_JUMP_S or step_s - passed_s > _JUMP_S

    def restart(self) -> None:
        """What was known of the camera's clock holds no more."""
        self._offset_s, self._least_s = None, math.inf
        self._before_s.clear()

    def saw(self, stamp_s: float, arrived_at: float) -> None:
        """Note a packet of the present piece."""
        self._least_s = min(self._least_s, arrived_at - stamp_s)

    def finish(self, first_stamp_s: float) -> float:
        """Capture time of the present piece, whose first frame has this stamp, at its end."""
        least_s = min(self._least_s, *self._before_s, math.inf)
        if self._offset_s is None or abs(least_s - self._offset_s) > _DRIFT_S:
            self._offset_s = least_s
        self._before_s.append(self._least_s)
        self._least_s = math.inf
        return first_stamp_s + self._offset_s


def parameter_sets(data: bytes, codec: str) -> bytes:
    """The parameter sets (SPS, PPS; VPS) of a packet in Annex B form, joined; empty where the codec has none."""
    if codec not in ("h264", "hevc"):
        return b""
    kept = []
    for unit in annex_b_units(data):
        kind = unit[0] & 0x1F if codec == "h264" else unit[0] >> 1 & 0x3F
        if kind in ((7, 8) if codec == "h264" else (32, 33, 34)):
            kept.append(unit)
    return b"".join(kept)


def begins_picture(data: bytes, codec: str) -> bool:
    """Whether a packet in Annex B form begins a picture: False when its first slice is not a picture's first
    (first_mb_in_slice, H.264 7.4.3; first_slice_segment_in_pic_flag, H.265 7.4.7.1)."""
    if codec not in ("h264", "hevc"):
        return True
    for unit in annex_b_units(data):
        if codec == "h264" and unit[0] & 0x1F in (1, 5):
            return unit[1:2] >= b"\x80"
        if codec == "hevc" and unit[0] >> 1 & 0x3F < 32:
            return unit[2:3] >= b"\x80"
    return True


def joined(first: Packet[VideoStream], rest: Packet[VideoStream], codec: str) -> Packet[VideoStream]:
    """A picture of which FFmpeg has made two packets; of the second only the slices."""
    slices = [
        unit
        for unit in annex_b_units(bytes(rest))
        if (unit[0] & 0x1F in (1, 5) if codec == "h264" else unit[0] >> 1 & 0x3F < 32)
    ]
    whole: Packet[Any] = Packet(bytes(first) + b"".join(b"\0\0\1" + unit for unit in slices))
    whole.pts, whole.dts = (rest.pts, rest.dts) if first.pts is None else (first.pts, first.dts)
    whole.duration, whole.is_keyframe = first.duration, first.is_keyframe
    assert first.time_base is not None
    whole.time_base = first.time_base
    return whole


def annex_b_units(data: bytes) -> Iterator[bytes]:
    """NAL units between start codes."""
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else None].rstrip(b"\0")
        if unit:
            yield unit
        start = end


class Piece:
    """A file of footage being written."""

    def __init__(self, folder: Path, name: str, stream: VideoStream, parameters: bytes) -> None:
        codec = stream.codec_context.codec.canonical_name
        form, ending = ("mpegts", "ts") if codec in _TRANSPORT_STREAM else ("matroska", "mkv")
        self._path = folder / f"{name}.{ending}"
        self._making = folder / f".{self._path.name}"
        self._container: OutputContainer = av.open(str(self._making), "w", format=form)
        self._stream = self._container.add_stream_from_template(stream)
        self._first: int | None = None
        self._last = 0
        self.parameters = parameters
        self.first_stamp_s = self._last_stamp_s = 0.0
        self.frames = 0

    def add(self, packet: Packet[VideoStream], stamp_s: float) -> None:
        assert packet.dts is not None
        assert packet.pts is not None
        if self._first is None:
            self._first, self.first_stamp_s = packet.dts, stamp_s
        elif packet.dts <= self._last:  # the camera does not say in which order its frames are decoded
            packet.dts = self._last + 1
            if packet.pts < packet.dts:
                return
        self._last = packet.dts
        packet.pts, packet.dts = packet.pts - self._first, packet.dts - self._first
        packet.stream = self._stream
        self._container.mux(packet)
        self._last_stamp_s = stamp_s
        self.frames += 1

    @property
    def seconds(self) -> float:
        """To the end of its last frame, which is taken to last as long as the others do."""
        return max(0.0, self._last_stamp_s - self.first_stamp_s) * self.frames / max(1, self.frames - 1)

    def length_s(self, stamp_s: float) -> float:
        return stamp_s - self.first_stamp_s if self._first is not None else 0.0

    def close(self) -> Path:
        """Finish the file, which appears whole."""
        self._container.close()
        self._making.replace(self._path)
        return self._path


class Recorder:
    """Turns one connection's packets into pieces, and says each when it is finished."""

    def __init__(self, hello: Hello, stream: VideoStream) -> None:
        self._hello = hello
        self._stream = stream
        self._codec = stream.codec_context.codec.canonical_name
        self._clock = CaptureClock()
        self._piece: Piece | None = None
        self._number = 0
        self._began = time.monotonic()
        self._held: tuple[Packet[VideoStream], float] | None = None

    def add(self, packet: Packet[VideoStream], arrived_at: float) -> None:
        """Raises `InvalidMedia` when no key frame comes for too long."""
        if not packet.size or packet.is_corrupt or packet.time_base is None:
            return
        if self._held is not None:
            held, held_at = self._held
            if held.size < _MOST_PICTURE_BYTES and not begins_picture(bytes(packet), self._codec):
                self._held = joined(held, packet, self._codec), held_at
                return
            if held.pts is None and packet.pts is not None:
                held.pts = packet.pts - max(1, held.duration or 0)
            self._write(held, held_at)
        self._held = packet, arrived_at

    def close(self) -> None:
        """The connection has ended."""
        if self._held is not None:
            self._write(*self._held)
        self._finish()

    def _write(self, packet: Packet[VideoStream], arrived_at: float) -> None:
        if packet.pts is None or packet.time_base is None:
            return
        if packet.dts is None:
            packet.dts = packet.pts
        stamp_s = float(packet.dts * packet.time_base)
        if self._clock.jumps(stamp_s, arrived_at):
            self._finish()
            self._clock.restart()
        parameters = parameter_sets(bytes(packet), self._codec) if packet.is_keyframe else b""
        if self._piece is not None and packet.is_keyframe:
            has_changed = bool(parameters and self._piece.parameters and parameters != self._piece.parameters)
            if has_changed or self._piece.length_s(stamp_s) >= self._hello.segment_s - 1e-3:
                self._finish()
        self._clock.saw(stamp_s, arrived_at)
        if self._piece is None:
            if not packet.is_keyframe:
                if time.monotonic() - self._began > self._hello.open_s:
                    raise InvalidMedia(f"no key frame came from the camera in {self._hello.open_s:g} s")
                return
            self._piece = Piece(
                Path(self._hello.folder), f"{self._hello.session}-{self._number}", self._stream, parameters
            )
            self._number += 1
        self._began = time.monotonic()
        self._piece.add(packet, stamp_s)

    def _finish(self) -> None:
        piece, self._piece = self._piece, None
        if piece is None:
            return
        captured_at = self._clock.finish(piece.first_stamp_s)
        path = piece.close()
        if path.stat().st_size < _LEAST_BYTES:
            path.unlink()
            return
        _say({"piece": path.name, "captured_at": captured_at, "seconds": piece.seconds})


# -- the relay --------------------------------------------------------------------------------------------------------


class StatusReader:
    """Reads the status lines of an RTSP server out of what it sends, interleaved media left aside."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.last = 0
        """Status of the last answer."""

    def feed(self, data: bytes) -> None:
        """Raises `ForbiddenURL` at a redirect, `InvalidMedia` for what is no RTSP."""
        self._data += data
        while self._take_one():
            pass

    def _take_one(self) -> bool:
        if len(self._data) < 4:
            return False
        if self._data[0] == 0x24:  # RFC 2326 §10.12: "$", channel, two bytes of length, binary data
            length = 4 + int.from_bytes(self._data[2:4], "big")
            if len(self._data) < length:
                return False
            del self._data[:length]
            return True
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > _LONGEST_MESSAGE:
                raise InvalidMedia("the camera does not speak RTSP")
            return False
        head = bytes(self._data[:end]).split(b"\r\n")
        length = next((int(line[15:]) for line in head if line[:15].lower() == b"content-length:" and _digits(line)), 0)
        if length > _LONGEST_MESSAGE:
            raise InvalidMedia("the camera does not speak RTSP")
        if len(self._data) < end + 4 + length:
            return False
        del self._data[: end + 4 + length]
        words = head[0].split()
        if words and words[0].startswith(b"RTSP/"):
            if len(words) < 2 or not words[1].isdigit():
                raise InvalidMedia("the camera does not speak RTSP")
            self.last = int(words[1])
            if 300 <= self.last < 400:
                raise ForbiddenURL("the camera redirects to another address, which is not followed")
        return True


def _digits(line: bytes) -> bool:
    return line[15:].strip().isdigit()


class Relay(threading.Thread):
    """Carries bytes between FFmpeg, which connects to `port` of the loopback, and the camera's checked addresses."""

    def __init__(self, hello: Hello) -> None:
        super().__init__(daemon=True)
        parts = urlsplit(hello.url)
        self._hello = hello
        self._host = parts.hostname or ""
        self._camera_port = parts.port or (322 if parts.scheme == "rtsps" else 554)
        self._is_tls = parts.scheme == "rtsps"
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self.status = StatusReader()
        self.error: NvilaError | None = None

    def run(self) -> None:
        while True:
            inner, _ = self._door.accept()
            with inner:
                try:
                    with self._connected() as outer:
                        self._carry(inner, outer)
                except NvilaError as error:
                    self.error = error
                except ssl.SSLCertVerificationError as error:
                    self.error = Unavailable(f"the camera's certificate is not trusted: {error.verify_message}")
                except OSError:
                    self.error = self.error or Unavailable("the connection to the camera failed or broke off")

    def _connected(self) -> socket.socket:
        for address in self._hello.addresses:
            try:
                outer = socket.create_connection((address, self._camera_port), timeout=self._hello.open_s)
            except OSError:
                continue
            if self._is_tls:
                return ssl.create_default_context().wrap_socket(outer, server_hostname=self._host)
            return outer
        raise Unavailable("the camera does not accept connections")

    def _carry(self, inner: socket.socket, outer: socket.socket) -> None:
        outer.settimeout(self._hello.silence_s)
        while True:
            waiting = isinstance(outer, ssl.SSLSocket) and outer.pending()
            ready = [outer] if waiting else select.select([inner, outer], [], [])[0]
            for source in ready:
                data = source.recv(_RELAY_BYTES)
                if not data:
                    return
                if source is outer:
                    self.status.feed(data)
                    inner.sendall(data)
                else:
                    outer.sendall(data)


# -- the process ------------------------------------------------------------------------------------------------------


def capture(hello: Hello) -> NvilaError:
    """Until the connection ends; returns why it did."""
    relay = Relay(hello)
    relay.start()
    try:
        container = _open(hello, relay)
    except NvilaError as error:
        return error
    try:
        stream = _video(container)
        recorder = Recorder(hello, stream)
        silent = Unavailable(f"the camera has been silent for {hello.silence_s:g} s")
        heard_at = time.monotonic()
        try:
            for packet in container.demux(stream):
                if time.monotonic() - heard_at >= hello.silence_s:  # FFmpeg first gives what it has of a picture
                    return silent
                heard_at = time.monotonic()
                recorder.add(packet, time.time())
        except av.error.ExitError:
            return silent
        except (av.error.FFmpegError, OSError):
            return relay.error or Unavailable("the connection to the camera broke off")
        finally:
            recorder.close()
        return relay.error or Unavailable("the camera ended the connection")
    except NvilaError as error:
        return error
    finally:
        container.close()


def _open(hello: Hello, relay: Relay) -> InputContainer:
    parts = urlsplit(hello.url)
    who = f"{quote(hello.user, safe='')}:{quote(hello.password, safe='')}@" if hello.user or hello.password else ""
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    options = {
        "rtsp_transport": "tcp",
        "allowed_media_types": "video",
        "protocol_whitelist": "rtsp,tcp",
        "analyzeduration": "1000000",
        "fpsprobesize": "0",
    }
    address = f"rtsp://{who}127.0.0.1:{relay.port}{path}"
    began = time.monotonic()
    try:
        return av.open(address, options=options, timeout=(hello.open_s, hello.silence_s))
    except (av.error.FFmpegError, OSError, ValueError):
        if relay.error is None and time.monotonic() - began >= hello.open_s:
            raise Unavailable(f"the camera did not answer in {hello.open_s:g} s") from None
        raise relay.error or _refused(relay.status.last) from None


def _refused(status: int) -> NvilaError:
    if status in (401, 403):
        return Unauthenticated("the camera does not accept the user name and password")
    if status in (404, 454):
        return NotFound("the camera has no stream of this name")
    if status >= 400:
        return Unavailable(f"the camera refused with RTSP status {status}")
    if not status:
        return Unavailable("the camera ended the connection without an answer")
    return InvalidMedia("the camera sends no stream that can be read")


def _video(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise UnsupportedMedia("the camera sends no video")
    stream = container.streams.video[0]
    name = stream.codec_context.codec.name
    if name not in CODECS:
        raise UnsupportedMedia(f"codec {name} is not allowed")
    return stream


def _say(told: dict[str, Any]) -> None:
    print(json.dumps(told), flush=True, file=_replies)


_replies = sys.stdout


def main() -> None:
    global _replies
    sandbox.die_with_parent(int(sys.argv[1]))
    av.logging.set_level(None)  # its own words name addresses and credentials
    _replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    told = json.loads(sys.stdin.readline())
    hello = Hello(**{**told, "addresses": tuple(told["addresses"])})
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _MEMORY_BYTES, in_use + _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    error = capture(hello)
    _say({"error": error.code, "message": error.message})
    os._exit(0)  # the relay may sit in a system call


if __name__ == "__main__":
    main()
