"""Open a video file under an allow-list and find out which frames it holds, without decoding its pixels.

Runs in a decode worker only. Which frames then really decode is `decode.py`'s matter.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from nvila.errors import InvalidMedia, LimitExceeded, UnsupportedMedia
from nvila.video.holes import Span, find_holes
from nvila.video.media import DecodeLimits

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "gif")
"""FFmpeg demuxers that may run. No playlists or lists of files (HLS, DASH, concat), no images, subtitles or devices."""

CODECS = (
    "h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9",
    "mpeg1video", "mpeg2video", "mpeg4", "h263", "mjpeg", "prores", "dnxhd", "gif",
)  # fmt: skip
"""FFmpeg decoders that may run: what cameras, phones, editors and the web produce. JPEG2000 is left out on purpose."""

_ENCRYPTED_TAGS = ("encv", "drmi")
_TAGGED_DURATION = re.compile(r"(\d{1,4}):(\d\d):(\d\d\.\d{1,9})")  # of a track in Matroska
_VP8_SHOW_FRAME = 0x10
"""Bit of a VP8 packet's first byte (RFC 6386 §9.1): unset in packets that are only referred to, never shown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTable:
    """Every frame that the container announces, in presentation order, from the packets' headers.

    `pts`: presentation stamps, ascending, in units of `time_base`; `durations`: of the same packets, 0 when the
    container does not say. `announced_s`: length of the video by the header, 0 when it does not say. `is_indexed`: an
    index names every packet. `is_timed`: every packet had a stamp of its own, so a decoded frame is known by it;
    otherwise frames can only be counted from the start. `key_numbers`: positions in `pts` at which decoding can start,
    with their two stamps `key_pts` and `key_dts`.
    """

    pts: NDArray[np.int64]
    durations: NDArray[np.int64]
    announced_s: float
    is_indexed: bool
    time_base: Fraction
    is_timed: bool
    key_numbers: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    key_dts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pts)

    def times_s(self, fps: float) -> NDArray[np.float64]:
        """Seconds since the first frame. Without stamps: counted off at fps, or at 25 when that is unknown too."""
        if self.is_timed or np.any(self.pts):
            times_s: NDArray[np.float64] = (self.pts - self.pts[0]).astype(np.float64) * float(self.time_base)
            return times_s
        return np.arange(len(self), dtype=np.float64) / (fps or 25.0)

    def holes(self, fps: float, frames: int) -> tuple[Span, ...]:
        """What the file should hold beside its first `frames` frames, by the stamps of its packets and its header."""
        times_s = self.times_s(fps)
        lasting_s = self.durations * float(self.time_base) if np.any(self.pts) else np.full(len(self), 1 / (fps or 25))
        # Some headers count from the container's zero, some from the first frame: take the reading that is kinder.
        announced_s = self.announced_s - max(0.0, float(self.pts[0] * self.time_base))
        end_s = max(announced_s, float((times_s + lasting_s).max()))
        return find_holes(times_s[:frames], (times_s + lasting_s)[:frames], end_s, is_indexed=self.is_indexed)


def check_file(path: Path, limits: DecodeLimits) -> os.stat_result:
    """Refuse what is not a plain file of a size within the limit."""
    try:
        status = path.stat()
    except OSError:
        raise InvalidMedia("the media file cannot be read") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidMedia("the media is not a plain file")
    if status.st_size == 0:
        raise InvalidMedia("the media file is empty")
    if status.st_size > limits.max_file_bytes:
        raise LimitExceeded.of("bytes in a media file", asked=status.st_size, limit=limits.max_file_bytes)
    return status


def check_pixels(width_px: int, height_px: int, limits: DecodeLimits) -> None:
    if width_px < 1 or height_px < 1:
        raise InvalidMedia("the header gives no picture size that can be decoded")
    if max(width_px, height_px) > limits.max_side_px:
        raise LimitExceeded.of(
            f"pixels on a side of a {width_px} x {height_px} picture",
            asked=max(width_px, height_px),
            limit=limits.max_side_px,
        )
    if width_px * height_px > limits.max_pixels:
        raise LimitExceeded.of(
            f"pixels of a {width_px} x {height_px} picture", asked=width_px * height_px, limit=limits.max_pixels
        )


def open_video(path: Path, limits: DecodeLimits) -> tuple[InputContainer, VideoStream]:
    """Open the file and choose its first video stream (as OpenCV does, which the reference uses); cover art is none.

    Raises `InvalidMedia`, `UnsupportedMedia` or `LimitExceeded`.
    """
    check_file(path, limits)
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(CODECS),
        "max_pixels": str(limits.max_pixels),
    }
    try:
        container = av.open(f"file:{path.resolve()}", options=options)
    except MemoryError:
        raise
    except av.error.ArgumentError:
        raise UnsupportedMedia(f"the container is none of {', '.join(CONTAINERS)}") from None
    except (av.error.FFmpegError, OSError, ValueError):
        raise InvalidMedia("not a readable video: its header is missing, cut off or broken") from None
    try:
        return container, _first_stream(container, limits)
    except BaseException:
        container.close()
        raise


def _first_stream(container: InputContainer, limits: DecodeLimits) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InvalidMedia("the file has no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise UnsupportedMedia("the video's codec is not known")
    if context.codec_tag in _ENCRYPTED_TAGS:
        raise UnsupportedMedia("the video is encrypted")
    if context.codec.name not in CODECS:
        raise UnsupportedMedia(f"codec {context.codec.name} is not allowed")
    check_pixels(context.width, context.height, limits)
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count = limits.threads
    return stream


def packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets from where the container stands, and an empty one at the end."""
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # PyAV fails on a packet of a stream that the header did not name; go on behind it
            continue


def read_table(container: InputContainer, stream: VideoStream, limits: DecodeLimits) -> FrameTable:
    """Read every packet's header (no decoding). What can be read before the file breaks off counts."""
    pts: list[int | None] = []
    durations: list[int] = []
    keys: list[tuple[int, int]] = []
    announced_s = _announced_s(container, stream)
    is_vp8 = stream.codec_context.codec.canonical_name == "vp8"
    try:
        for packet in packets(container, stream):
            if not packet.size or packet.is_discard or (is_vp8 and not memoryview(packet)[0] & _VP8_SHOW_FRAME):
                continue
            if not pts and packet.has_sidedata("encryption_info"):
                raise UnsupportedMedia("the video is encrypted")
            pts.append(packet.pts)
            durations.append(packet.duration or 0)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if len(pts) > limits.max_source_frames:
                raise LimitExceeded.of("frames in a video file", asked=len(pts), limit=limits.max_source_frames)
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError):
        pass  # a cut-off file: the frames before the cut are usable
    if not pts:
        raise InvalidMedia("the video stream holds no frames")
    stamps = np.array([0 if stamp is None else stamp for stamp in pts], np.int64)
    is_timed = None not in pts and len(np.unique(stamps)) == len(stamps) and not _stamps_are_guesses(container, stream)
    if None in pts:
        stamps[:] = 0
    order = np.argsort(stamps, kind="stable")
    stamps = stamps[order]
    keys.sort()
    key_pts, key_dts = np.array(keys, np.int64).reshape(-1, 2).T
    return FrameTable(
        pts=stamps,
        durations=np.array(durations, np.int64)[order],
        announced_s=announced_s,
        is_indexed="mp4" in container.format.name,
        time_base=stream.time_base or Fraction(1, 1000),
        is_timed=is_timed,
        key_numbers=np.searchsorted(stamps, key_pts),
        key_pts=key_pts,
        key_dts=key_dts,
    )


def _announced_s(container: InputContainer, stream: VideoStream) -> float:
    """How long the video is by the header; 0 when it does not say. The length of a file is that of the longest of its
    streams, so it counts only where there is no sound."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tagged = _TAGGED_DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    if tagged is not None:
        return int(tagged[1]) * 3600 + int(tagged[2]) * 60 + float(tagged[3])
    if container.duration and not container.streams.audio:
        return container.duration / av.time_base
    return 0.0


def _stamps_are_guesses(container: InputContainer, stream: VideoStream) -> bool:
    """AVI stores the order of decoding only. Unless no frame is reordered, FFmpeg guesses the presentation stamps, and
    the guesses depend on where reading began.
    """
    context = stream.codec_context
    return container.format.name == "avi" and (context.has_b_frames or context.codec.canonical_name in ("h264", "hevc"))
