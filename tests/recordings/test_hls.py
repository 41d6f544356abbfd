"""HLS playlists are read as RFC 8216 says, fetched through the one fetcher only, and placed in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nvila.errors import DeadlineExceeded, ForbiddenURL, InvalidMedia, UnsupportedMedia
from nvila.recordings.hls import HlsReader, Playlist, parse_playlist
from nvila.recordings.seal import Seal
from nvila.recordings.sources import Away, Ended, Footage
from nvila.recordings.types import Recording, Segment, Source, SourceKind
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, MediaSource
from tests.recordings import made
from tests.recordings.taking import Local

_BASE = "https://cdn.example/live/index.m3u8"


class Web:
    """Addresses and what they give; anything else is refused as the gateway refuses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.shown: dict[str, str | None] = {}

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[Local]:
        assert source.url is not None
        self.asked.append(source.url)
        self.shown[source.url] = source.credentials
        if "inside" in source.url:
            raise ForbiddenURL("the media address does not lead to a public host")
        if source.url not in self.pages:
            raise InvalidMedia("the host of the media address answered 404, not 200")
        path = self._folder / "page"
        path.write_bytes(self.pages[source.url])
        yield Local(path, b"", len(self.pages[source.url]))


def playlist(first: int, count: int, *, dated: bool = True, more: str = "", end: bool = False) -> bytes:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", f"#EXT-X-MEDIA-SEQUENCE:{first}", *([more] if more else [])]
    for number in range(first, first + count):
        if dated:
            lines.append(f"#EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:{number * 2:02d}.000Z")
        lines += ["#EXTINF:2.0,", f"{number}.ts"]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if end else [])]).encode()


def recording() -> Recording:
    return replace(made.recording(kind=SourceKind.HLS), source=Source(kind=SourceKind.HLS, url=_BASE))


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path)


def test_the_smallest_variant_that_fills_a_tile_is_read() -> None:
    text = """#EXTM3U
#EXT-X-STREAM-INF:BANDWIDTH=8000000,RESOLUTION=1920x1080
big.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=2000000,RESOLUTION=1280x720
mid/index.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=400000,RESOLUTION=426x240,CODECS="avc1,mp4a"
small.m3u8
"""
    assert parse_playlist(text, _BASE) == "https://cdn.example/live/mid/index.m3u8"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<html>", InvalidMedia),
        ("#EXTM3U\n#EXTINF:abc,\n1.ts", InvalidMedia),
        ("#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:-1\n", InvalidMedia),
        ("#EXTM3U\n#EXTINF:nan,\n1.ts", InvalidMedia),
        ('#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="key"\n#EXTINF:2,\n1.ts', UnsupportedMedia),
        ("#EXTM3U\n#EXT-X-BYTERANGE:100@0\n#EXTINF:2,\n1.ts", UnsupportedMedia),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n", InvalidMedia),
    ],
)
def test_what_cannot_be_read_says_so(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_playlist(text, _BASE)


def test_times_run_on_from_the_last_date_that_the_playlist_gives() -> None:
    text = playlist(4, 1).decode() + "\n#EXTINF:3.0,\n5.ts\n"
    found = parse_playlist(text, _BASE)
    assert isinstance(found, Playlist)
    first, second = found.segments
    assert first.at is not None
    assert second.at == first.at + 2.0


async def test_a_live_playlist_is_followed_and_each_segment_comes_once(web: Web, tmp_path: Path) -> None:
    web.pages = {_BASE: playlist(1, 2), **{f"https://cdn.example/live/{n}.ts": b"%d" % n for n in range(1, 9)}}
    web.pages[_BASE] = web.pages[_BASE].replace(b"DURATION:2", b"DURATION:0.1")
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01)
    pieces: list[tuple[bytes, float]] = []
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        async for event in events:
            if isinstance(event, Ended):
                break
            assert isinstance(event, Footage)
            pieces.append((event.path.read_bytes(), event.captured_at))
            event.taken()
            assert not event.path.exists()
            if len(pieces) == 2:
                web.pages[_BASE] = playlist(2, 3, end=True)
    assert [content for content, _ in pieces] == [b"1", b"2", b"3", b"4"]
    assert [after - before for (_, before), (_, after) in zip(pieces, pieces[1:], strict=False)] == [2.0] * 3  # noqa: RUF007
    assert list((tmp_path / "hls").iterdir()) == []


async def test_segments_that_were_missed_keep_their_place_without_dates(web: Web, tmp_path: Path) -> None:
    web.pages = {f"https://cdn.example/live/{n}.ts": b"x" for n in range(20)}
    web.pages[_BASE] = playlist(1, 1, dated=False).replace(b"DURATION:2", b"DURATION:0.1")
    reader, at = HlsReader(web, tmp_path / "hls", Metrics(), clock=lambda: 1000.0), []
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        async for event in events:
            if isinstance(event, Footage):
                at.append(event.captured_at)
                web.pages[_BASE] = playlist(6, 1, dated=False, end=True)
            else:
                break
    assert at == [998.0, 1000.0 + 4 * 2.0]


async def test_segments_that_were_missed_for_long_do_not_lie_in_the_future(web: Web, tmp_path: Path) -> None:
    clock = made.Clock()
    web.pages = {f"https://cdn.example/live/{n}.ts": b"x" for n in range(100)}
    web.pages[_BASE] = playlist(80, 2, dated=False)
    kept = Segment(
        recording_id="r",
        number=3,
        path="",
        start_s=0,
        duration_s=2,
        size_bytes=1,
        digest="",
        source_number=9,
        source_until=clock.now - 70.0,
    )
    reader = HlsReader(web, tmp_path / "hls", Metrics(), clock=clock)
    async with asyncio.timeout(30), aclosing(reader.events(recording(), kept)) as events:
        first, second = await anext(events), await anext(events)
    assert isinstance(first, Footage)
    assert isinstance(second, Footage)
    assert (first.number, second.number) == (80, 81)
    assert (first.captured_at, second.until) == (clock.now - 4.0, clock.now), "70 x 2 s would be 70 s from now"


async def test_a_playlist_that_is_away_is_told_and_tried_again(web: Web, tmp_path: Path) -> None:
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01)
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        assert isinstance(await anext(events), Away)
        web.pages = {_BASE: playlist(1, 1, end=True), "https://cdn.example/live/1.ts": b"x"}
        event = await anext(events)
        while isinstance(event, Away):
            event = await anext(events)
        assert isinstance(event, Footage)
        assert event.is_new_session


async def test_a_segment_that_trickles_is_told_away_and_asked_for_again(tmp_path: Path) -> None:
    class Slow(Web):
        @asynccontextmanager
        async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[Local]:
            if str(source.url).endswith(".ts") and source.url not in self.asked:
                self.asked.append(str(source.url))
                raise DeadlineExceeded("the request's time is up")
            async with super().open(source, tenant, deadline) as local:
                yield local

    web = Slow(tmp_path)
    web.pages = {_BASE: playlist(1, 1, end=True), "https://cdn.example/live/1.ts": b"x"}
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01)
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        told = [await anext(events) for _ in range(3)]
    assert [type(event) for event in told] == [Away, Footage, Ended]


@pytest.mark.parametrize("dated", [True, False])
async def test_a_listed_segment_that_is_gone_is_left_out_and_what_follows_keeps_its_time(
    web: Web, tmp_path: Path, dated: bool
) -> None:
    web.pages = {f"https://cdn.example/live/{n}.ts": b"x" for n in (1, 3, 4)}
    web.pages[_BASE] = playlist(1, 5, dated=dated, end=True)
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01, clock=lambda: 1000.0)
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        told = [event async for event in events]
    assert isinstance(told.pop(), Ended)
    footage = [event for event in told if isinstance(event, Footage)]
    assert [(one.number, one.is_new_session) for one in footage] == [(1, True), (3, True), (4, False)]
    assert [one.captured_at - footage[0].captured_at for one in footage] == [0.0, 4.0, 6.0]
    assert len(told) - len(footage) == 6, "each of two is asked for three times"


async def test_lists_that_are_read_and_lists_that_are_away_are_counted(web: Web, tmp_path: Path) -> None:
    metrics = Metrics()
    reader = HlsReader(web, tmp_path / "hls", metrics, first_pause_s=0.01)

    def counted() -> list[float | None]:
        states = ("connected", "away")
        return [metrics.registry.get_sample_value("nvila_captures", {"source": "hls", "state": one}) for one in states]

    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        assert isinstance(await anext(events), Away)
        assert counted() == [0, 1]
        web.pages = {_BASE: playlist(1, 1), "https://cdn.example/live/1.ts": b"x"}
        while not isinstance(await anext(events), Footage):
            pass
        assert counted() == [1, 0]
        web.pages = {}
        while not isinstance(await anext(events), Away):
            pass
        assert counted() == [0, 1]
    assert counted() == [0, 0]


async def test_a_playlist_cannot_lead_inside(web: Web, tmp_path: Path) -> None:
    web.pages = {_BASE: playlist(1, 1).replace(b"1.ts", b"http://inside/secret")}
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01)
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        with pytest.raises(ForbiddenURL):
            await anext(events)


async def test_a_fragmented_segment_gets_its_head(web: Web, tmp_path: Path) -> None:
    text = playlist(1, 1, more='#EXT-X-MAP:URI="init.mp4"', end=True)
    web.pages = {_BASE: text, "https://cdn.example/live/1.ts": b"body", "https://cdn.example/live/init.mp4": b"head "}
    async with aclosing(HlsReader(web, tmp_path / "hls", Metrics()).events(recording())) as events:
        event = await anext(events)
        assert isinstance(event, Footage)
        assert event.path.read_bytes() == b"head body"
        assert event.path.suffix == ".mp4"


async def test_credentials_are_shown_to_the_playlists_own_host_only(web: Web, tmp_path: Path) -> None:
    elsewhere = "https://other.example/2.ts"
    listed = playlist(1, 2, end=True).replace(b"2.ts", elsewhere.encode())
    web.pages = {_BASE: listed, "https://cdn.example/live/1.ts": b"1", elsewhere: b"2"}
    seal = Seal(["c2VhbHMgd2hhdCB0ZXN0cyBrZWVwIHNlY3JldC4uLi4="])
    theirs = replace(recording(), source=Source(kind=SourceKind.HLS, url=_BASE, secret=seal.close("guard:sesame")))
    async with (
        asyncio.timeout(30),
        aclosing(HlsReader(web, tmp_path / "hls", Metrics(), seal).events(theirs)) as events,
    ):
        async for event in events:
            if isinstance(event, Footage):
                assert event.can_wait, "the whole list is there"
    assert web.shown == {
        _BASE: "guard:sesame",
        "https://cdn.example/live/1.ts": "guard:sesame",
        elsewhere: None,
    }


async def test_numbers_that_begin_anew_are_followed(web: Web, tmp_path: Path) -> None:
    web.pages = {f"https://cdn.example/live/{n}.ts": b"%d" % n for n in range(120)}
    web.pages[_BASE] = playlist(50, 2).replace(b"DURATION:2", b"DURATION:0.1")
    got: list[bytes] = []
    async with asyncio.timeout(30), aclosing(HlsReader(web, tmp_path / "hls", Metrics()).events(recording())) as events:
        async for event in events:
            if isinstance(event, Ended):
                break
            assert isinstance(event, Footage)
            got.append(event.path.read_bytes())
            if got == [b"50", b"51"]:
                web.pages[_BASE] = playlist(0, 2, end=True)
    assert got == [b"50", b"51", b"0", b"1"]


async def test_a_playlist_that_does_not_grow_is_told_away_until_it_does(web: Web, tmp_path: Path) -> None:
    clock = made.Clock()
    web.pages = {f"https://cdn.example/live/{n}.ts": b"x" for n in range(9)}
    web.pages[_BASE] = playlist(1, 1).replace(b"DURATION:2", b"DURATION:0.1")
    reader = HlsReader(web, tmp_path / "hls", Metrics(), first_pause_s=0.01, clock=clock)
    async with asyncio.timeout(30), aclosing(reader.events(recording())) as events:
        assert isinstance(await anext(events), Footage)
        clock.now += 31
        gone = await anext(events)
        assert isinstance(gone, Away)
        assert "nothing new for 31 s" in gone.error.message
        web.pages[_BASE] = playlist(2, 1)
        event = await anext(events)
        while isinstance(event, Away):
            event = await anext(events)
        assert isinstance(event, Footage)
        assert event.is_new_session
