"""HLS as a live source (RFC 8216): a playlist that is read again and again, its segments fetched one by one.

Everything goes through the same fetcher, and so the same egress policy, as any media address: playlists only name
addresses, and a demuxer that followed them by itself could be sent anywhere. A segment is a file already; nothing is
unpacked. Encrypted playlists and byte ranges are refused.

Time: `EXT-X-PROGRAM-DATE-TIME` where the playlist has it; otherwise segments follow each other from the moment at which
the first was read, and segments that were missed keep their place by the target duration. A worker that takes over goes
on behind the last segment that is kept, by its number and its time, whatever the list still shows of what was before.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from nvila.errors import DeadlineExceeded, InvalidMedia, NotFound, Overloaded, Unavailable, UnsupportedMedia
from nvila.recordings.seal import Seal
from nvila.recordings.sources import Away, Connections, Ended, Fetcher, Footage, LiveEvent, MetricSink
from nvila.recordings.types import Recording, Segment, SourceKind
from nvila.types import Deadline, MediaKind, MediaSource

_MOST_PLAYLIST_BYTES = 1 << 20
_MOST_SEGMENTS = 10_000
_LEAST_SIDE_PX = 448
"""Of the variants, the smallest that gives the tower's tiles all they can show."""
_FETCH_S = 60.0
_STALLED_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_REFUSALS = 3
"""So often a host may refuse a segment that its list names, before it is taken for gone: a gap in what follows."""
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^,]*)')


@dataclass(frozen=True, kw_only=True)
class HlsSegment:
    """`number`: media sequence. `at`: capture time, None when the playlist does not say. `map_url`: what must stand
    before its bytes, empty for none."""

    number: int
    url: str
    duration_s: float
    at: float | None
    map_url: str


@dataclass(frozen=True, kw_only=True)
class Playlist:
    """A media playlist."""

    segments: tuple[HlsSegment, ...]
    target_s: float
    is_ended: bool


def parse_playlist(text: str, url: str) -> Playlist | str:
    """A media playlist, or the address of the variant that a master playlist is read from.

    Raises `InvalidMedia` for what is no playlist, `UnsupportedMedia` for encryption and byte ranges.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != "#EXTM3U":
        raise InvalidMedia("the address gives no HLS playlist", param="url")
    if any(line.startswith("#EXT-X-STREAM-INF") for line in lines):
        return _variant(lines, url)
    return _media(lines, url)


def _variant(lines: list[str], url: str) -> str:
    found: list[tuple[int, int, str]] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("#EXT-X-STREAM-INF:") and following and not following.startswith("#"):
            given = _attributes(line)
            width, _, height = given.get("RESOLUTION", "0x0").partition("x")
            side = min(_whole(width), _whole(height))
            found.append((side, _whole(given.get("BANDWIDTH", "0")), urljoin(url, following)))
    if not found:
        raise InvalidMedia("the HLS playlist names no variant", param="url")
    enough = [one for one in found if one[0] >= _LEAST_SIDE_PX]
    return min(enough)[2] if enough else max(found)[2]


def _media(lines: list[str], url: str) -> Playlist:
    segments: list[HlsSegment] = []
    number, target_s, duration_s, is_ended, map_url = 0, 6.0, 0.0, False, ""
    at: float | None = None
    for line in lines[1:]:
        tag, _, value = line.partition(":")
        if tag == "#EXT-X-TARGETDURATION":
            target_s = _seconds(value)
        elif tag == "#EXT-X-MEDIA-SEQUENCE":
            number = _whole(value)
        elif tag == "#EXTINF":
            duration_s = _seconds(value.split(",")[0])
        elif tag == "#EXT-X-PROGRAM-DATE-TIME":
            at = _moment(value)
        elif tag == "#EXT-X-MAP":
            given = _attributes(line)
            if "BYTERANGE" in given:
                raise UnsupportedMedia("HLS with byte ranges is not read", param="url")
            map_url = urljoin(url, given.get("URI", ""))
        elif tag == "#EXT-X-KEY" and _attributes(line).get("METHOD") != "NONE":
            raise UnsupportedMedia("the HLS stream is encrypted", param="url")
        elif tag == "#EXT-X-BYTERANGE":
            raise UnsupportedMedia("HLS with byte ranges is not read", param="url")
        elif tag == "#EXT-X-ENDLIST":
            is_ended = True
        elif not line.startswith("#"):
            segments.append(
                HlsSegment(number=number, url=urljoin(url, line), duration_s=duration_s, at=at, map_url=map_url)
            )
            number += 1
            at = at + duration_s if at is not None else None
            if len(segments) > _MOST_SEGMENTS:
                raise InvalidMedia(f"the HLS playlist names more than {_MOST_SEGMENTS:,} segments", param="url")
    return Playlist(segments=tuple(segments), target_s=min(max(target_s, 0.1), 60.0), is_ended=is_ended)


def _attributes(line: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(line.partition(":")[2])}


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise InvalidMedia("the HLS playlist has a malformed number", param="url")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise InvalidMedia("the HLS playlist has a malformed duration", param="url") from None
    if not 0 <= seconds <= 3600:
        raise InvalidMedia(f"the HLS playlist has a duration of {seconds:g} s", param="url")
    return seconds


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


class HlsReader:
    """Reads HLS sources (`sources.LiveReader`). `folder`: for segments on their way."""

    def __init__(
        self,
        fetcher: Fetcher,
        folder: Path,
        metrics: MetricSink,
        seal: Seal | None = None,
        *,
        first_pause_s: float = _FIRST_PAUSE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fetcher = fetcher
        self._folder = folder
        self._connections = Connections(metrics, SourceKind.HLS)
        self._seal = seal or Seal()
        self._first_pause_s = first_pause_s
        self._clock = clock

    async def events(self, recording: Recording, after: Segment | None = None) -> AsyncGenerator[LiveEvent, None]:
        assert recording.source.url is not None, "checked where recordings are made"
        secret = self._seal.open(recording.source.secret) if recording.source.secret else None
        reading = _Reading(self._fetcher, self._folder / secrets.token_hex(8), recording, after, secret, self._clock)
        pause_s, is_new = self._first_pause_s, True
        self._connections.show(reading, is_away=True)
        try:
            while True:
                try:
                    async for piece in reading.new_segments(is_new_session=is_new):
                        self._connections.show(reading, is_away=False)
                        yield piece
                        is_new, pause_s = False, self._first_pause_s
                    if reading.is_ended:
                        yield Ended()
                        return
                    await asyncio.sleep(reading.target_s / 2)
                except UnsupportedMedia:
                    raise
                except (InvalidMedia, NotFound, Unavailable, Overloaded, DeadlineExceeded) as error:
                    self._connections.show(reading, is_away=True)
                    yield Away(error=error)
                    is_new = True
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        finally:
            self._connections.forget(reading)
            await asyncio.to_thread(reading.close)


class _Reading:
    """One playlist, and how far it is read."""

    def __init__(
        self,
        fetcher: Fetcher,
        folder: Path,
        recording: Recording,
        after: Segment | None,
        secret: str | None,
        clock: Callable[[], float],
    ) -> None:
        folder.mkdir(mode=0o700)
        self._fetcher = fetcher
        self._folder = folder
        self._tenant = recording.tenant
        self._url = recording.source.url or ""
        self._secret = secret
        self._clock = clock
        self._next: int | None = None
        self._next_at = 0.0
        if after is not None and after.source_number is not None and after.source_until is not None:
            self._next, self._next_at = after.source_number + 1, after.source_until
        self._grew_at = clock()
        self._maps: dict[str, bytes] = {}
        self._refusals = 0
        self.target_s = 6.0
        self.is_ended = False

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    async def new_segments(self, *, is_new_session: bool) -> AsyncGenerator[Footage, None]:
        """What the playlist has that was not there before, in order."""
        playlist = await self._playlist()
        self.target_s = playlist.target_s
        if self._next is not None and playlist.segments:
            if playlist.segments[-1].number + len(playlist.segments) < self._next - 1:
                self._next = None  # its numbers began anew, as after a restart of the encoder
            elif playlist.segments[-1].number >= self._next or playlist.is_ended:
                self._grew_at = self._clock()
        stood_s = self._clock() - self._grew_at
        if self._next is not None and stood_s > max(_STALLED_S, 3 * self.target_s):
            raise Unavailable(f"the HLS playlist has named nothing new for {stood_s:.0f} s")
        if self._next is None:
            listed_s = sum(segment.duration_s for segment in playlist.segments)
            self._next_at = self._clock() - (0.0 if playlist.is_ended else listed_s)
            self._next = playlist.segments[0].number if playlist.segments else None
            self._grew_at = self._clock()
        for place, segment in enumerate(playlist.segments):
            if self._next is not None and segment.number < self._next:
                continue
            at = segment.at if segment.at is not None else self._placed(playlist, place)
            try:
                path = await self._fetch(segment)
            except InvalidMedia:
                self._refusals += 1
                if self._refusals == _REFUSALS:
                    self._pass(segment, at)
                raise
            self._pass(segment, at)
            yield Footage(
                path=path,
                captured_at=at,
                taken=lambda path=path: path.unlink(missing_ok=True),  # type: ignore[misc]  # bound now
                number=segment.number,
                until=self._next_at,
                is_new_session=is_new_session,
                can_wait=playlist.is_ended,
            )
            is_new_session = False
        self.is_ended = playlist.is_ended

    def _pass(self, segment: HlsSegment, at: float) -> None:
        self._next, self._next_at, self._refusals = segment.number + 1, at + segment.duration_s, 0

    def _placed(self, playlist: Playlist, place: int) -> float:
        """When a segment without a date was captured. What is listed live has happened: many that were missed, or
        numbers that were skipped, do not lead past now."""
        assert self._next is not None, "a list with segments has a next one"
        missed_s = (playlist.segments[place].number - self._next) * playlist.target_s
        if playlist.is_ended:
            return self._next_at + missed_s
        listed_s = sum(segment.duration_s for segment in playlist.segments[place:])
        return self._next_at + max(0.0, min(missed_s, self._clock() - listed_s - self._next_at))

    async def _playlist(self) -> Playlist:
        url = self._url
        for _ in range(2):
            found = parse_playlist((await self._bytes(url, _MOST_PLAYLIST_BYTES)).decode("utf-8", "replace"), url)
            if isinstance(found, Playlist):
                return found
            url = found
        raise InvalidMedia("the HLS playlist names another list of variants", param="url")

    async def _fetch(self, segment: HlsSegment) -> Path:
        path = self._folder / f"{segment.number}{'.mp4' if segment.map_url else '.ts'}"
        wanted = self._source(segment.url)
        if segment.map_url and segment.map_url not in self._maps:
            self._maps = {segment.map_url: await self._bytes(segment.map_url, _MOST_PLAYLIST_BYTES)}
        async with self._fetcher.open(wanted, self._tenant, Deadline.after(_FETCH_S)) as media:
            if not segment.map_url:
                await asyncio.to_thread(_link_or_copy, media.path, path)
                return path
            await asyncio.to_thread(_join, self._maps[segment.map_url], media.path, path)
        return path

    def _source(self, url: str) -> MediaSource:
        """The playlist may name other hosts; they are shown no credentials."""
        is_theirs = urlsplit(url)[:2] == urlsplit(self._url)[:2]
        return MediaSource(kind=MediaKind.VIDEO, url=url, credentials=self._secret if is_theirs else None)

    async def _bytes(self, url: str, most: int) -> bytes:
        async with self._fetcher.open(self._source(url), self._tenant, Deadline.after(_FETCH_S)) as media:
            if media.size_bytes > most:
                raise InvalidMedia(f"an HLS playlist of {media.size_bytes:,} bytes, at most {most:,} are read")
            return await asyncio.to_thread(media.path.read_bytes)


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _join(head: bytes, source: Path, target: Path) -> None:
    with target.open("wb") as file, source.open("rb") as rest:
        file.write(head)
        shutil.copyfileobj(rest, file)
