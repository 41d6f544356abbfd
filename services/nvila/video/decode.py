"""Exact frames of a video file, by their number in presentation order, as RGB squares. Runs in a decode worker only.

**Which frame.** A frame is known by its presentation stamp, looked up in the packets' headers (`probe.FrameTable`),
never by counting after a seek, so a seek that lands somewhere else costs time but gives no wrong frame. Between two
wanted frames the reader either decodes on or seeks to the last key frame before the wanted one, whichever means fewer
frames to decode. Frames that nothing refers to (most B frames) are not decoded at all on the way.

**Which pixels.** The reference reads frames with OpenCV (4.8 then) and resizes them with Pillow. OpenCV converts with
swscale's bicubic and BT.601 coefficients whatever the file is tagged with, and turns frames by the file's rotation in
quarter turns; the models were trained on that, so it is done here: 8-bit 4:2:0, 4:2:2, 4:4:4, full-range and GIF frames
equal OpenCV 4.8's byte for byte (OpenCV 5 honours the tag: 2.6 of 255 levels apart in the mean on BT.709 clips). Pixels
that are not square are not stretched, alpha is dropped, high dynamic range is not tone-mapped: the same there.

**Size.** Frames up to `EXACT_PIXELS` (1080p) are converted at full size and resized as the reference does: equal to it.
Larger ones are first shrunk by swscale, still in their own pixel format, to twice the target on both sides, then
converted and resized. Measured on real clips brought to size, target 448, one thread: 3840 x 2160 takes 14 ms a frame
instead of 78, 0.5 of 255 levels from exact in the mean, 99.9 % of levels within 7; at 1920 x 1080 it would take 10
instead of 14, which is not worth any difference. Never more than one full-size RGB frame is held.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import av.error
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from nvila.errors import InvalidMedia
from nvila.model.preprocess import resize_exact
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.probe import check_pixels, open_video, packets, read_table

EXACT_PIXELS = 1920 * 1088
"""Frames up to 1080p are resized exactly as the reference does (module docstring)."""

_SEEK_WORTH_FRAMES = 8
"""A seek throws away the frames that the decoder holds back for reordering; below this gain decoding on is cheaper."""

_SEEK_TRIES = 3

_SKIPPING_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
"""Decoders that look at `skip_frame` packet by packet (libdav1d takes it once, for good)."""


class VideoReader:
    """One open file with a decoder that remembers where it is, so that runs of frames in order never start over."""

    def __init__(self, path: Path, limits: DecodeLimits) -> None:
        """Raises `InvalidMedia`, `UnsupportedMedia` or `LimitExceeded`."""
        self._path, self._limits = path, limits
        self._container, self._stream = open_video(path, limits)
        self._table = read_table(self._container, self._stream, limits)
        self._can_skip = self._table.is_timed and self._stream.codec_context.codec.canonical_name in _SKIPPING_CODECS
        self._seek_stamps = (self._table.key_pts, self._table.key_dts)  # containers differ in which one they go by
        self._reformatter = VideoReformatter()
        self._untrusted_keys: set[int] = set()
        self._settled_keys: set[int] = set()
        self._keep: set[int] = set()
        self._keep_until = 0
        self._info: MediaInfo | None = None
        self.decoded_frames = 0
        self._packets: Iterator[Packet[VideoStream]]
        self._last: tuple[int, VideoFrame] | None = None
        self._seek(self._key_before(0))

    def close(self) -> None:
        self._container.close()

    def info(self) -> MediaInfo:
        """What the file is. Decodes its last frame, which the reference's frame count depends on."""
        if self._info is None:
            self._info = self._describe()
        return self._info

    def read(
        self, numbers: Sequence[int], size_px: tuple[int, int] | None
    ) -> Iterator[tuple[int, float, NDArray[np.uint8] | None]]:
        """Yield (number, presentation time in seconds, uint8 RGB (H, W, 3)) for each of the ascending frame numbers; no
        pixels for a frame that cannot be decoded. size_px: (width, height), or None for the video's own.
        """
        if size_px is None:
            size_px = (self.info().width_px, self.info().height_px)
        self._want(numbers)
        times_s = self._table.times_s(self._fps())
        for number in numbers:
            frame = self._fetch(number) if number < len(self._table) else None
            rgb = None if frame is None else self._rgb(frame, size_px)
            yield number, float(times_s[min(number, len(times_s) - 1)]), rgb

    # -- what the file is ----------------------------------------------------------------------------------------------

    def _describe(self) -> MediaInfo:
        last, frame = self._last_decodable()
        table, context = self._table, self._stream.codec_context
        width, height = context.width, context.height
        keys = table.key_numbers[table.key_numbers <= last]
        return MediaInfo.of_video(
            container=self._container.format.name,
            codec=context.codec.canonical_name,
            size_px=(height, width) if _quarter_turns(frame) % 2 else (width, height),
            times_s=table.times_s(self._fps())[: last + 1],
            fps=self._fps(),
            key_frames=keys.tolist() if table.is_timed and len(keys) else (0,),
            rotation_deg=frame.rotation % 360,
            stream_count=len(self._container.streams.video),
            holes=table.holes(self._fps(), last + 1),
        )

    def _fps(self) -> float:
        rate = self._stream.guessed_rate or self._stream.average_rate
        if rate:
            return float(rate)
        span_s = float((self._table.pts[-1] - self._table.pts[0]) * self._table.time_base)
        return (len(self._table) - 1) / span_s if span_s > 0 else 0.0

    def _last_decodable(self) -> tuple[int, VideoFrame]:
        """The reference's rule: the container's count, lowered until the last frame decodes (NVILA-SPEC §5.1)."""
        reported = self._stream.frames or len(self._table)
        last = min(reported, len(self._table)) - 1
        self._want([last])
        frame = self._fetch(last)
        if frame is not None:
            return last, frame
        while last >= 0:
            key = self._key_before(last)
            start = 0 if key is None else int(self._table.key_numbers[key])
            best = None
            for number in range(start, last + 1):  # every frame counts now, so none is skipped
                self._want([number])
                frame = self._fetch(number)
                best = (number, frame) if frame is not None else best
            if best is not None:
                return best
            last = start - 1
        raise InvalidMedia("no frame of the video could be decoded")

    # -- the frame with a number ---------------------------------------------------------------------------------------

    def _want(self, numbers: Sequence[int]) -> None:
        known = [number for number in numbers if number < len(self._table)]
        self._keep = {int(self._table.pts[number]) for number in known}
        self._keep_until = max(self._keep, default=0)

    def _fetch(self, number: int) -> VideoFrame | None:
        if (
            self._last is None or self._last[0] != number
        ):  # runs of short videos begin with the frame that ended the last
            frame = self._decode_to(number)
            self._last = None if frame is None else (number, frame)
        return self._last[1] if self._last is not None else None

    def _decode_to(self, number: int) -> VideoFrame | None:
        key = self._key_before(number)
        key_number = 0 if key is None else int(self._table.key_numbers[key])
        if number < self._next or key_number - self._next > _SEEK_WORTH_FRAMES:
            self._seek(key)
        frame = self._advance(number)
        if frame is None and key is not None and self._started_at == key and key not in self._settled_keys:
            frame = self._retry_from_earlier(key, number)
        return frame

    def _retry_from_earlier(self, key: int, number: int) -> VideoFrame | None:
        """A frame did not come out after starting at its key frame: either it is broken, or that key frame refers to
        something before it. One try from the key frame before settles which, for all frames up to the next key frame.
        """
        self._seek(self._key_before(int(self._table.key_numbers[key]) - 1))
        frame = self._advance(number)
        (self._settled_keys if frame is None else self._untrusted_keys).add(key)
        return frame

    def _key_before(self, number: int) -> int | None:
        """Position in the table's key frames of the last trusted one not after this frame; None is the file's start."""
        if not self._table.is_timed:
            return None
        key = int(np.searchsorted(self._table.key_numbers, number, side="right")) - 1
        while key in self._untrusted_keys:
            key -= 1
        return key if key >= 0 else None

    def _seek(self, key: int | None) -> None:
        """Go to a key frame; where the container cannot, to an earlier one, and at last to the file's start."""
        for at in () if key is None else range(key, max(key - _SEEK_TRIES, -1), -1):
            wanted = int(self._table.key_pts[at])
            if any(self._lands_at_or_before(wanted, int(stamps[at])) for stamps in self._seek_stamps):
                return
        self._container.close()
        self._container, self._stream = open_video(self._path, self._limits)
        self._start_over()

    def _lands_at_or_before(self, wanted: int, stamp: int) -> bool:
        try:
            self._container.seek(stamp, stream=self._stream)
            self._start_over()
            packet = next(self._packets)
        except (av.error.FFmpegError, OSError, StopIteration):
            return False
        if packet.pts is None or not packet.is_keyframe or packet.pts > wanted:
            return False
        self._packets = itertools.chain([packet], self._packets)
        self._next = int(np.searchsorted(self._table.pts, packet.pts))
        self._started_at = int(np.searchsorted(self._table.key_pts, packet.pts))
        return True

    def _start_over(self) -> None:
        self._packets = packets(self._container, self._stream)
        self._ready: deque[tuple[int, VideoFrame]] = deque()
        self._next = 0  # number of the next frame to come out
        self._started_at = -1  # position of the key frame at which decoding began, -1 for the file's start
        self._counted = 0
        self._is_at_end = False

    def _advance(self, number: int) -> VideoFrame | None:
        """Decode on until this frame comes out, or a later one does, or the file ends."""
        while True:
            while self._ready:
                if self._ready[0][0] > number:
                    return None
                came, frame = self._ready.popleft()
                self._next = came + 1
                if came == number:
                    return frame
            if self._is_at_end:
                return None
            self._decode_packet()

    def _decode_packet(self) -> None:
        context = self._stream.codec_context
        try:
            packet = next(self._packets)
            self._is_at_end = not packet.size
            is_passed_over = packet.pts is not None and packet.pts < self._keep_until and packet.pts not in self._keep
            if self._can_skip:
                context.skip_frame = "NONREF" if is_passed_over else "DEFAULT"
            frames = context.decode(packet)
        except MemoryError:
            raise
        except StopIteration:
            self._is_at_end, frames = True, context.decode(None)
        except av.error.EOFError:
            self._is_at_end, frames = True, []
        except (av.error.FFmpegError, OSError):
            return  # a broken packet: the frames that need it will not come out
        for frame in frames:
            check_pixels(frame.width, frame.height, self._limits)
            self.decoded_frames += 1
            number = self._number_of(frame)
            if number is not None and not frame.is_corrupt:
                self._ready.append((number, frame))

    def _number_of(self, frame: VideoFrame) -> int | None:
        if not self._table.is_timed:
            self._counted += 1
            return self._counted - 1
        if frame.pts is None:
            return None
        number = int(np.searchsorted(self._table.pts, frame.pts))
        return number if number < len(self._table) and self._table.pts[number] == frame.pts else None

    # -- its pixels ----------------------------------------------------------------------------------------------------

    def _rgb(self, frame: VideoFrame, size_px: tuple[int, int]) -> NDArray[np.uint8]:
        turns = _quarter_turns(frame)
        frame = self._shrunk(frame, size_px[::-1] if turns % 2 else size_px)
        rgb = np.rot90(self._converted(frame, frame.width, frame.height, "rgb24").to_ndarray(), turns)
        return resize_exact(np.ascontiguousarray(rgb, dtype=np.uint8), *size_px)

    def _shrunk(self, frame: VideoFrame, target_px: tuple[int, int]) -> VideoFrame:
        """A large frame at no less than twice the target on both sides, even numbers for the sake of chroma."""
        width, height = (min(own, 2 * wanted) for own, wanted in zip(_size(frame), target_px, strict=True))
        if frame.width * frame.height <= EXACT_PIXELS or (width, height) == _size(frame):
            return frame
        name = "rgb24" if frame.format.is_rgb or frame.format.has_palette else frame.format.name
        return self._converted(frame, width + width % 2, height + height % 2, name)

    def _converted(self, frame: VideoFrame, width: int, height: int, pixels: str) -> VideoFrame:
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=pixels,
            src_colorspace=Colorspace.ITU601,
            dst_colorspace=Colorspace.ITU601,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )


def _size(frame: VideoFrame) -> tuple[int, int]:
    return frame.width, frame.height


def _quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns that the file asks for; OpenCV, and so the reference, ignores other angles."""
    return frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0
