"""Video that a client pushes, cut into files that open on their own while it arrives.

Nothing is decoded here, and nothing but headers is understood: MPEG-TS is cut at random access points of its video with
its tables put in front (ISO/IEC 13818-1 §2.4), fragmented MP4 between fragments with its initialisation put in front
(ISO/IEC 14496-12 §8.8), and JPEG pictures become Matroska files whose timestamps are their capture times.
"""

from __future__ import annotations

import asyncio
import math
import re
import struct
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Protocol

from nvila.errors import DeadlineExceeded, InvalidMedia, InvalidRequest, LimitExceeded, Overloaded, UnsupportedMedia

PIECE_S = 2.0
"""Least length of a piece: its worker sees it that late, and opens so many files."""
ROOM_S = 60.0
"""How long a client is held back before it is told to come again."""

_PIECE_BYTES = 4 << 20
_MOST_PIECE_BYTES = 64 << 20
_MOST_PICTURE_BYTES = 16 << 20
_MOST_BOX_BYTES = 32 << 20
_MOST_PICTURES = 256
_SILENCE_S = 60.0
_LATEST_S = 1e11
"""Beyond the year 5000: milliseconds were meant, or the media's own clock is broken."""


class Sink(Protocol):
    """Where pieces go (`recordings.inbox.Writer`)."""

    def new_path(self) -> Path: ...
    def add(self, path: Path, ending: str, captured_at: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Done:
    bytes: int
    pieces: int
    last_captured_at: float | None


class Cutter(Protocol):
    """`feed` and `finish` add whole pieces to the sink; `discard` gives up the one that is not whole."""

    pieces: Pieces

    def feed(self, data: bytes) -> None: ...
    def finish(self) -> None: ...


async def receive(body: AsyncIterable[bytes], cutter: Cutter, room: Callable[[], Awaitable[None]]) -> Done:
    """Read a body to its end. `room`: waits until the next piece may be taken on; the body is not read meanwhile.

    However the body ends, what came is kept as far as it is whole. Raises `DeadlineExceeded` when nothing comes, and
    `InvalidMedia` when of what came nothing was whole. What may be tried again says what is kept by then: sent again,
    it would be in the recording twice."""
    received = 0
    await room()
    pieces = aiter(body)
    try:
        while True:
            before = cutter.pieces.count
            try:
                async with asyncio.timeout(_SILENCE_S):
                    data = await anext(pieces, None)
            except TimeoutError:
                raise DeadlineExceeded(f"no byte came for {_SILENCE_S:g} s") from None
            if data is None:
                break
            received += len(data)
            cutter.feed(data)
            if cutter.pieces.count != before:
                await room()
        cutter.finish()
        if received and not cutter.pieces.count:
            raise InvalidMedia(
                f"of the body's {received:,} bytes none can be taken: no key frame, nor a picture, is whole"
            )
    except (InvalidRequest, asyncio.CancelledError):
        cutter.pieces.discard()
        raise
    except (Overloaded, DeadlineExceeded) as error:
        cutter.finish()
        if not cutter.pieces.count:
            raise
        kept = (
            f"{received:,} bytes of this body are taken, to the piece captured at {cutter.pieces.last_captured_at:.3f}"
        )
        raise type(error)(f"{error.message}; {kept}: go on after them", retry_after_s=error.retry_after_s) from None
    except BaseException:  # the client left
        cutter.finish()
        raise
    return Done(bytes=received, pieces=cutter.pieces.count, last_captured_at=cutter.pieces.last_captured_at)


def cutter(content_type: str, sink: Sink, captured_at: float | None) -> Cutter:
    """Raises `UnsupportedMedia`."""
    name = content_type.partition(";")[0].strip().lower()
    if name not in CUTTERS:
        raise UnsupportedMedia(f"Content-Type: {name[:64]!r} given, must be one of {', '.join(CUTTERS)}")
    return CUTTERS[name](Pieces(sink), Clock(captured_at))


@dataclass
class Pieces:
    """The piece being written, and those before it."""

    sink: Sink
    count: int = 0
    last_captured_at: float | None = None
    size_bytes: int = 0
    _path: Path | None = None
    _file: BinaryIO | None = None
    _captured_at: float = 0.0

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def begin(self, captured_at: float, head: bytes) -> None:
        if captured_at > _LATEST_S:
            raise InvalidMedia(f"captured_at: {captured_at:g} comes out, must be seconds since 1970")
        self._path = self.sink.new_path()
        self._file = self._path.open("xb")
        self._captured_at = captured_at
        self.size_bytes = 0
        self.write(head)

    def write(self, data: bytes) -> None:
        assert self._file is not None
        self.size_bytes += len(data)
        if self.size_bytes > _MOST_PIECE_BYTES:
            raise LimitExceeded.of("bytes without a key frame", asked=self.size_bytes, limit=_MOST_PIECE_BYTES)
        self._file.write(data)

    def end(self, ending: str) -> None:
        if self._file is None or self._path is None:
            return
        self._file.close()
        self.add(self._path, ending, self._captured_at)
        self._file = self._path = None

    def add(self, path: Path, ending: str, captured_at: float) -> None:
        self.sink.add(path, ending, captured_at)
        self.count += 1
        self.last_captured_at = captured_at

    def discard(self) -> None:
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = self._path = None


@dataclass
class Clock:
    """Capture times from media times. `given`: of the first frame, as the client says it; else it is now, and media
    time that stops agreeing with the clock on the wall by more than `_DRIFT_S` begins anew."""

    given: float | None
    _media_s: float | None = None
    _at: float = 0.0

    _DRIFT_S = 10.0

    def at(self, media_s: float | None) -> float:
        now = time.time()
        if media_s is None:
            return now if self.given is None else self._at or self.given
        if self._media_s is None:
            self._media_s, self._at = media_s, now if self.given is None else self.given
        found = self._at + media_s - self._media_s
        if self.given is None and abs(found - now) > self._DRIFT_S:
            self._media_s, self._at = media_s, now
            return now
        return found


# -- MPEG-TS

_PACKET = 188
_PAT_PID = 0
_VIDEO_TYPES = frozenset({0x01, 0x02, 0x10, 0x1B, 0x24, 0x33})
_HEADS = {
    0x01: re.compile(rb"\x00\x00\x01\xb3"),
    0x02: re.compile(rb"\x00\x00\x01\xb3"),
    0x1B: re.compile(rb"\x00\x00\x01[\x27\x47\x67]"),
    0x24: re.compile(rb"\x00\x00\x01[\x40\x42]"),
}
"""What stands before a key frame, by stream type: the sequence header of MPEG-1 and MPEG-2 (ITU-T H.262 §6.2.2.1), the
sequence parameter set of H.264 (§7.4.1), the video or sequence parameter set of HEVC (ITU-T H.265 §7.4.2.2)."""
_PTS_WRAP_S = (1 << 33) / 90_000


@dataclass
class TsCutter:
    pieces: Pieces
    clock: Clock
    _left: bytearray = field(default_factory=bytearray)
    _pat: bytes = b""
    _pmt: bytes = b""
    _pmt_pid: int = -1
    _video_pid: int = -1
    _video_type: int = -1
    _has_marks: bool = False
    _skipped_bytes: int = 0
    _began_s: float | None = None
    _last_pts_s: float | None = None
    _wrapped_s: float = 0.0

    def feed(self, data: bytes) -> None:
        self._left += data
        whole = len(self._left) // _PACKET * _PACKET
        run = bytearray()
        for at in range(0, whole, _PACKET):
            packet = bytes(self._left[at : at + _PACKET])
            if packet[0] != 0x47:
                raise InvalidMedia("the body is not MPEG-TS: a packet does not begin with 0x47")
            self._note_tables(packet)
            if self._is_entry(packet):
                self._write(run)
                run = bytearray()
                self._cut(_pts_s(packet))
            run += packet
        del self._left[:whole]
        self._write(run)

    def finish(self) -> None:
        self.pieces.end("ts")

    def _write(self, run: bytearray) -> None:
        if self.pieces.is_open:
            if run:
                self.pieces.write(bytes(run))
            return
        self._skipped_bytes += len(run)
        if self._skipped_bytes > _MOST_PIECE_BYTES:
            raise LimitExceeded.of("bytes without a key frame", asked=self._skipped_bytes, limit=_MOST_PIECE_BYTES)

    def _cut(self, pts_s: float | None) -> None:
        if pts_s is not None:
            if self._last_pts_s is not None and pts_s < self._last_pts_s - _PTS_WRAP_S / 2:
                self._wrapped_s += _PTS_WRAP_S
            self._last_pts_s = pts_s
            pts_s += self._wrapped_s
        if self.pieces.is_open:
            is_long = pts_s is not None and self._began_s is not None and abs(pts_s - self._began_s) >= PIECE_S
            if not is_long and self.pieces.size_bytes < _PIECE_BYTES:
                return
            self.pieces.end("ts")
        self._began_s = pts_s
        self.pieces.begin(self.clock.at(pts_s), self._pat + self._pmt)

    def _note_tables(self, packet: bytes) -> None:
        pid = _pid(packet)
        if pid == _PAT_PID and (section := _section(packet)):
            self._pat = packet
            for at in range(8, len(section) - 4, 4):
                program, pmt_pid = struct.unpack_from(">HH", section, at)
                if program:
                    self._pmt_pid = pmt_pid & 0x1FFF
                    break
        elif pid == self._pmt_pid and (section := _section(packet)) and len(section) > 12:
            self._pmt = packet
            at = 12 + (struct.unpack_from(">H", section, 10)[0] & 0x0FFF)
            while at + 5 <= len(section) - 4:
                stream_type = section[at]
                stream_pid, info = struct.unpack_from(">HH", section, at + 1)
                if stream_type in _VIDEO_TYPES:
                    self._video_pid, self._video_type = stream_pid & 0x1FFF, stream_type
                    break
                at += 5 + (info & 0x0FFF)

    def _is_entry(self, packet: bytes) -> bool:
        """A frame of the video begins here that can be decoded without those before it: by its mark, or in a stream
        without marks by what it begins with."""
        is_start = packet[1] & 0x40
        if _pid(packet) != self._video_pid or not is_start:
            return False
        if packet[3] & 0x20 and packet[4] > 0 and packet[5] & 0x40:
            self._has_marks = True
            return True
        head = None if self._has_marks else _HEADS.get(self._video_type)
        return head is not None and head.search(_payload(packet)) is not None


def _pid(packet: bytes) -> int:
    return (packet[1] & 0x1F) << 8 | packet[2]


def _payload(packet: bytes) -> bytes:
    control = packet[3] >> 4 & 3
    if not control & 1:
        return b""
    return packet[5 + packet[4] :] if control & 2 else packet[4:]


def _section(packet: bytes) -> bytes:
    """A table that lies whole in one packet, as those of one program do."""
    payload = _payload(packet)
    if not packet[1] & 0x40 or not payload:
        return b""
    section = payload[1 + payload[0] :]
    if len(section) < 3:
        return b""
    return section[: 3 + (struct.unpack_from(">H", section, 1)[0] & 0x0FFF)]


def _pts_s(packet: bytes) -> float | None:
    payload = _payload(packet)
    if len(payload) < 14 or payload[:3] != b"\0\0\1" or not payload[7] & 0x80:
        return None
    b = payload[9:14]
    pts = (b[0] >> 1 & 7) << 30 | b[1] << 22 | (b[2] >> 1) << 15 | b[3] << 7 | b[4] >> 1
    return pts / 90_000


# -- fragmented MP4


@dataclass
class Mp4Cutter:
    """Fragments are taken to begin at key frames, as encoders make them for streaming."""

    pieces: Pieces
    clock: Clock
    _left: bytearray = field(default_factory=bytearray)
    _ftyp: bytes = b""
    _init: bytes = b""
    _timescale: int = 0
    _has_moov: bool = False
    _has_fragment: bool = False
    _began_s: float | None = None

    def feed(self, data: bytes) -> None:
        self._left += data
        while (head := _box_head(self._left)) is not None:
            size, kind, inner = head
            if size > _MOST_BOX_BYTES:
                raise LimitExceeded.of("bytes of an MP4 box", asked=size, limit=_MOST_BOX_BYTES)
            if size < inner or not kind.isascii():
                raise InvalidMedia("the body is not fragmented MP4: a box has an impossible size")
            if len(self._left) < size:
                return
            box = bytes(self._left[:size])
            del self._left[:size]
            self._take(kind, box, inner)

    def finish(self) -> None:
        if self._has_fragment:
            self.pieces.end("mp4")
        else:
            self.pieces.discard()

    def _take(self, kind: bytes, box: bytes, inner: int) -> None:
        if kind == b"ftyp":
            self._ftyp = box
        elif kind == b"moov":
            if self._init != self._ftyp + box:  # what follows does not open with the one before
                self.finish()
            self._init = self._ftyp + box
            self._has_moov = True
            self._timescale = _timescale(box[inner:])
        elif kind == b"moof":
            if not self._has_moov:
                raise InvalidMedia("the body is not fragmented MP4 from its beginning: a fragment comes before moov")
            self._cut(_decode_time_s(box[inner:], self._timescale))
            self.pieces.write(box)
        elif kind == b"mdat":
            if not self.pieces.is_open:
                raise InvalidMedia("this MP4 is not fragmented; send it as a file")
            self.pieces.write(box)
            self._has_fragment = True

    def _cut(self, media_s: float | None) -> None:
        if self.pieces.is_open:
            is_long = media_s is not None and self._began_s is not None and abs(media_s - self._began_s) >= PIECE_S
            if not is_long and self.pieces.size_bytes < _PIECE_BYTES:
                return
            self.pieces.end("mp4")
        self._began_s = media_s
        self._has_fragment = False
        self.pieces.begin(self.clock.at(media_s), self._init)


def _box_head(data: bytes | bytearray, at: int = 0) -> tuple[int, bytes, int] | None:
    """Size, type, and where its content begins; None when the head is not there whole."""
    if len(data) - at < 8:
        return None
    size, kind = struct.unpack_from(">I4s", data, at)
    if size == 1:
        if len(data) - at < 16:
            return None
        return struct.unpack_from(">Q", data, at + 8)[0], kind, 16
    return size, kind, 8


def _find(data: bytes, *path: bytes) -> bytes | None:
    """The content of the first box at a path of types."""
    at = 0
    while (head := _box_head(data, at)) is not None:
        size, kind, inner = head
        if size < inner:
            return None
        if kind == path[0]:
            content = data[at + inner : at + size]
            return content if len(path) == 1 else _find(content, *path[1:])
        at += size
    return None


def _timescale(moov: bytes) -> int:
    mdhd = _find(moov, b"trak", b"mdia", b"mdhd")
    if mdhd is None or len(mdhd) < 24:
        return 0
    return int(struct.unpack_from(">I", mdhd, 20 if mdhd[0] == 1 else 12)[0])


def _decode_time_s(moof: bytes, timescale: int) -> float | None:
    tfdt = _find(moof, b"traf", b"tfdt")
    if tfdt is None or not timescale or len(tfdt) < (12 if tfdt[0] == 1 else 8):
        return None
    return float(struct.unpack_from(">Q" if tfdt[0] == 1 else ">I", tfdt, 4)[0]) / timescale


# -- JPEG pictures

_PICTURE_HEAD = struct.Struct(">dI")
_MOST_PIXELS = 64 << 20


@dataclass
class JpegCutter:
    pieces: Pieces
    clock: Clock
    _left: bytearray = field(default_factory=bytearray)
    _pictures: list[tuple[float, bytes]] = field(default_factory=list)
    _size: tuple[int, int] = (0, 0)
    _last_at: float = -math.inf
    _bytes: int = 0

    def feed(self, data: bytes) -> None:
        self._left += data
        while len(self._left) >= _PICTURE_HEAD.size:
            at, size = _PICTURE_HEAD.unpack_from(self._left)
            if size > _MOST_PICTURE_BYTES:
                raise LimitExceeded.of("bytes of a picture", asked=size, limit=_MOST_PICTURE_BYTES)
            if not math.isfinite(at) or at < 0 or at > _LATEST_S:
                raise InvalidMedia(f"a picture's capture time is {at:g}, must be seconds since 1970")
            if len(self._left) < _PICTURE_HEAD.size + size:
                return
            picture = bytes(self._left[_PICTURE_HEAD.size : _PICTURE_HEAD.size + size])
            del self._left[: _PICTURE_HEAD.size + size]
            self._take(at, picture)

    def finish(self) -> None:
        if self._pictures:
            path = self.pieces.sink.new_path()
            _write_pictures(path, self._pictures, self._size)
            self.pieces.add(path, "mkv", self._pictures[0][0])
            self._pictures = []
            self._bytes = 0

    def _take(self, at: float, picture: bytes) -> None:
        if at <= self._last_at:
            raise InvalidMedia(f"a picture's capture time is {at:f}, must be after that of the one before it")
        size = _jpeg_size(picture)
        is_full = self._pictures and (
            at - self._pictures[0][0] >= PIECE_S
            or len(self._pictures) >= _MOST_PICTURES
            or self._bytes >= _PIECE_BYTES
            or size != self._size
        )
        if is_full:
            self.finish()
        self._pictures.append((at, picture))
        self._bytes += len(picture)
        self._size, self._last_at = size, at


def _jpeg_size(picture: bytes) -> tuple[int, int]:
    """Width and height from the frame header (ITU-T T.81 §B.2.2)."""
    at = 2
    while picture[:2] == b"\xff\xd8" and at + 9 <= len(picture) and picture[at] == 0xFF:
        marker, length = picture[at + 1], struct.unpack_from(">H", picture, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", picture, at + 5)
            if not width or not height or width * height > _MOST_PIXELS:
                break
            return width, height
        at += 2 + length
    raise InvalidMedia("a picture is not a JPEG of a usable size")


def _write_pictures(path: Path, pictures: list[tuple[float, bytes]], size: tuple[int, int]) -> None:
    """Matroska with the pictures as they came; the first one's timestamp is 0."""
    import av  # a gateway to which nobody pushes pictures does without

    with path.open("xb") as file, av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(30))
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p"
        stream.time_base = Fraction(1, 1000)
        for at, picture in pictures:
            packet = av.Packet(picture)
            packet.stream = stream
            packet.time_base = Fraction(1, 1000)
            packet.pts = packet.dts = round((at - pictures[0][0]) * 1000)
            packet.is_keyframe = True
            container.mux(packet)


CUTTERS: dict[str, Callable[[Pieces, Clock], Cutter]] = {
    "video/mp2t": TsCutter,
    "video/mp4": Mp4Cutter,
    "application/vnd.nvila.jpeg-frames": JpegCutter,
}
"""By content type."""
