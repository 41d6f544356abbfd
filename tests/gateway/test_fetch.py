"""Fetching media: which hosts may be reached, in every spelling and after every redirect, and how much may come."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gzip
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from nvila.errors import (
    DeadlineExceeded,
    ForbiddenURL,
    InvalidMedia,
    InvalidRequest,
    LimitExceeded,
    MediaUnavailable,
    NvilaError,
    UnsupportedMedia,
)
from nvila.gateway.egress import AllowRule, EgressPolicy, is_public
from nvila.gateway.fetch import FetchLimits, MediaFetcher
from nvila.gateway.files import FileStore
from nvila.gateway.scratch import Scratch
from nvila.locks import LOCK
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, MediaKind, MediaSource

LIMIT = 100_000


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Names:
    """A resolver that knows these names, and gives a name's answers in turn, the last one for good."""

    def __init__(self, **hosts: list[list[str]]) -> None:
        self._hosts = hosts
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._hosts.get(host.rstrip(".").replace(".", "_").lower())
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@asynccontextmanager
async def _fetching(
    folder: Path,
    *,
    allow: Iterable[str] = (),
    names: Names | None = None,
    trusted: ssl.SSLContext | None = None,
    **limits: float,
) -> AsyncIterator[MediaFetcher]:
    scratch = Scratch(folder / "scratch")
    fetcher = MediaFetcher(
        files=FileStore(folder / "files", scratch),
        scratch=scratch,
        policy=EgressPolicy(allow=allow, ports=[80, 443]),
        limits=FetchLimits(media_bytes=LIMIT, **limits),  # type: ignore[arg-type]
        metrics=Metrics(),
        resolver=names or Names(),
        ssl_context=trusted or _NO_TLS,
    )
    try:
        yield fetcher
        assert [path.name for path in (folder / "scratch").rglob("*") if path.is_file()] == [LOCK]
    finally:
        await fetcher.close()
        scratch.close()


async def _get(fetcher: MediaFetcher, url: str, *, kind: MediaKind = MediaKind.VIDEO, within_s: float = 20) -> bytes:
    async with fetcher.open(MediaSource(kind=kind, url=url), "acme", Deadline.after(within_s)) as media:
        data = media.path.read_bytes()
        assert media.size_bytes == len(data)
        assert media.digest == blake3(data).digest()
    assert not media.path.exists()
    return data


Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _server(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A host on loopback that does what `handler` does with the request's head. Yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(await reader.readuntil(b"\r\n\r\n"), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _answers(*responses: bytes) -> Handler:
    left = list(responses)

    async def handler(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return handler


def _ok(body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in (f"Content-Length: {len(body)}", *headers))
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body


def _to(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


# -- which hosts


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "192.0.2.1"),
        *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "fe80::1%eth0"),
        *("fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "100::1"),
        *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::", "2001:0:1::1"),
        *("3fff::1", "5f00::1"),
    ],
)
def test_addresses_that_are_not_on_the_open_internet(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "172.32.0.1"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001"),
        *("0177.0.0.1", "①②⑦.⓪.⓪.①", "localhost", "LocalHost.", "a.localhost"),
        *("127.0.0.1.", "0", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
        *("[0:0:0:0:0:0:0:1]", "[64:ff9b::127.0.0.1]", "169.254.169.254", "0xa9fea9fe", "[fd00:ec2::254]"),
        *("10.0.0.1", "192.168.0.1", "[fe80::1]", "100.100.100.200"),
    ],
)
async def test_inside_addresses_are_denied_in_every_spelling(tmp_path: Path, host: str) -> None:
    names = Names()
    async with _fetching(tmp_path, names=names) as fetcher:
        with pytest.raises(ForbiddenURL):
            await _get(fetcher, f"http://{host}/latest/meta-data")
    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@example.com/a.mp4",
        "http://user@example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "unix:///var/run/docker.sock",
    ],
)
async def test_credentials_and_other_schemes_are_denied_without_repeating_them(tmp_path: Path, url: str) -> None:
    async with _fetching(tmp_path) as fetcher:
        with pytest.raises(ForbiddenURL) as caught:
            await _get(fetcher, url)
    assert "secret" not in caught.value.message
    assert "passwd" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a",
        "http://exa mple.com/",
        "http://example.com:99999/",
        "http://[::1/",
        "http://a\x00b/",
    ],
)
async def test_what_is_no_url_is_refused(tmp_path: Path, url: str) -> None:
    async with _fetching(tmp_path) as fetcher:
        with pytest.raises(InvalidRequest):
            await _get(fetcher, url)


async def test_a_name_is_denied_when_any_of_its_addresses_is_inside(tmp_path: Path) -> None:
    names = Names(mixed_example=[["8.8.8.8", "10.0.0.1"]], localhost=[["127.0.0.1"]])
    async with _fetching(tmp_path, names=names) as fetcher:
        for host in ("mixed.example", "localhost", "LOCALHOST."):
            with pytest.raises(ForbiddenURL, match="does not lead to a public host"):
                await _get(fetcher, f"http://{host}/")


async def test_other_ports_of_public_hosts_are_denied(tmp_path: Path) -> None:
    async with _fetching(tmp_path, names=Names(example_com=[["8.8.8.8"]])) as fetcher:
        with pytest.raises(ForbiddenURL, match="port 22; allowed are 80, 443"):
            await _get(fetcher, "http://example.com:22/")


async def test_a_name_is_resolved_once_for_check_and_connection(tmp_path: Path) -> None:
    async with _server(_answers(_ok(b"bytes"))) as port:
        names = Names(rebinding_example=[["127.0.0.1"], ["10.255.255.1"]])
        async with _fetching(tmp_path, allow=["127.0.0.1"], names=names) as fetcher:
            assert await _get(fetcher, f"http://rebinding.example:{port}/") == b"bytes"
            with pytest.raises(ForbiddenURL):
                await _get(fetcher, f"http://rebinding.example:{port}/")
    assert names.asked == ["rebinding.example"] * 2


async def test_an_unknown_host_is_the_requests_fault(tmp_path: Path) -> None:
    async with _fetching(tmp_path) as fetcher:
        with pytest.raises(InvalidMedia, match="not known"):
            await _get(fetcher, "http://nowhere.example/a?token=secret")


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_AGAIN, "try again"), TimeoutError(), OSError("no fds")])
async def test_a_name_that_cannot_be_looked_up_now_is_worth_another_try(tmp_path: Path, error: OSError) -> None:
    class Away(Names):
        async def resolve(self, host: str, port: int) -> Sequence[str]:
            raise error

    async with _fetching(tmp_path, names=Away()) as fetcher:
        with pytest.raises(MediaUnavailable):
            await _get(fetcher, "http://media.example/a")


@pytest.mark.parametrize(
    ("rule", "host", "address", "port", "is_allowed"),
    [
        ("media.internal", "media.internal", "10.0.0.1", 9000, True),
        ("media.internal", "Media.Internal.", "10.0.0.1", 9000, True),
        ("media.internal", "evil.media.internal", "10.0.0.1", 80, False),
        ("media.internal:9000", "media.internal", "10.0.0.1", 9000, True),
        ("media.internal:9000", "media.internal", "10.0.0.1", 80, False),
        ("10.0.0.0/8", "any", "10.2.3.4", 5000, True),
        ("10.0.0.0/8", "any", "::ffff:10.2.3.4", 80, True),
        ("10.0.0.0/8", "any", "11.2.3.4", 5000, False),
        ("10.0.0.1:81", "any", "10.0.0.1", 81, True),
        ("[fd00::1]:81", "any", "fd00::1", 81, True),
        ("fd00::/8", "any", "fd00::1", 80, True),
        ("[fd00::1]:81", "any", "fd00::1", 80, False),
    ],
)
def test_the_allow_list(rule: str, host: str, address: str, port: int, is_allowed: bool) -> None:
    parsed = AllowRule.parse(rule)
    assert parsed.allows(host.rstrip(".").lower(), ipaddress.ip_address(address), port) is is_allowed


@pytest.mark.parametrize("rule", ["", "host:port", "host:0", "10.0.0.1/8", "a/b", ":80", "[fd00::1]:x"])
def test_rules_that_are_none_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=r"port|host"):
        AllowRule.parse(rule)


# -- redirects


async def test_credentials_are_shown_to_their_own_host_only(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def handler(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        there = f"http://other.example:{port}/c"
        writer.write(_to("/b") if b"GET /a " in head else _to(there) if b"GET /b " in head else _ok(b"here"))

    async with _server(handler) as port:
        names = Names(own_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
        async with _fetching(tmp_path, allow=["own.example", "other.example"], names=names) as fetcher:
            source = MediaSource(
                kind=MediaKind.VIDEO, url=f"http://own.example:{port}/a", credentials="guard:open:sésame"
            )
            async with fetcher.open(source, "acme", Deadline.after(20)) as media:
                assert media.path.read_bytes() == b"here"
    shown = base64.b64encode("guard:open:sésame".encode())
    assert [b"Authorization: Basic " + shown in head for head in heads] == [True, True, False]
    assert "sésame" not in repr(source)


async def test_redirects_are_followed_relative_ones_too_with_the_right_host_header(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def handler(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(_ok(b"here") if b"/there" in head else _to("/there?a=b"))

    async with _server(handler) as port:
        names = Names(media_example=[["127.0.0.1"]])
        async with _fetching(tmp_path, allow=["media.example"], names=names) as fetcher:
            assert await _get(fetcher, f"http://media.example:{port}/a") == b"here"
    assert [head.split(b"\r\n")[0] for head in heads] == [b"GET /a HTTP/1.1", b"GET /there?a=b HTTP/1.1"]
    assert all(f"Host: media.example:{port}".encode() in head for head in heads)
    assert all(b"Accept-Encoding: identity" in head for head in heads)


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://169.254.169.254/latest", ForbiddenURL),
        ("http://inside.example/", ForbiddenURL),
        ("http://127.0.0.2/", ForbiddenURL),
        ("//10.0.0.1/", ForbiddenURL),
        ("file:///etc/passwd", ForbiddenURL),
        ("data:video/mp4;base64,AAAA", ForbiddenURL),
        ("http://user:pw@inside.example/", ForbiddenURL),
        ("http://[::1", InvalidRequest),
    ],
)
async def test_each_redirect_is_checked_like_the_first_address(
    tmp_path: Path, location: str, error: type[NvilaError]
) -> None:
    async with _server(_answers(_to(location))) as port:
        names = Names(inside_example=[["10.0.0.1"]])
        async with _fetching(tmp_path, allow=[f"127.0.0.1:{port}"], names=names) as fetcher:
            with pytest.raises(error):
                await _get(fetcher, f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_without_end_are_cut_off(tmp_path: Path, status: int) -> None:
    async with _server(_answers(_to("/again", status))) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(InvalidMedia, match="more than 5 times"):
            await _get(fetcher, f"http://127.0.0.1:{port}/")


# -- how much


async def test_a_declared_length_over_the_limit_is_refused_before_the_body(tmp_path: Path) -> None:
    async def handler(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8589934593\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(30)

    async with _server(handler) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(LimitExceeded, match="8,589,934,593 asked, at most 100,000"):
            await _get(fetcher, f"http://127.0.0.1:{port}/", within_s=20)


async def test_a_body_without_a_length_is_cut_off_at_the_limit(tmp_path: Path) -> None:
    async def handler(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"4000\r\n" + bytes(0x4000) + b"\r\n")
            await writer.drain()

    async with _server(handler) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(LimitExceeded):
            await _get(fetcher, f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", InvalidMedia),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nsecret", InvalidMedia),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret", InvalidMedia),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\na", InvalidMedia),
        (_ok(gzip.compress(bytes(1_000_000)), "Content-Encoding: gzip"), UnsupportedMedia),
    ],
    ids=["empty", "403", "404", "206", "gzip"],
)
async def test_responses_that_are_no_media_are_the_requests_fault(
    tmp_path: Path, response: bytes, error: type[NvilaError]
) -> None:
    async with _server(_answers(response)) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(error) as caught:
            await _get(fetcher, f"http://127.0.0.1:{port}/?token=secret")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "response",
    [
        *(f"HTTP/1.1 {status} x\r\nContent-Length: 6\r\n\r\nsecret".encode() for status in (408, 429, 500, 503)),
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: banana\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"",
    ],
    ids=["408", "429", "500", "503", "short", "two lengths", "odd length", "ssh", "headers", "nothing"],
)
async def test_a_host_that_is_in_trouble_is_worth_another_try(tmp_path: Path, response: bytes) -> None:
    async with _server(_answers(response)) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(MediaUnavailable) as caught:
            await _get(fetcher, f"http://127.0.0.1:{port}/?token=secret")
    assert "secret" not in caught.value.message


async def test_a_host_that_refuses_connections_is_worth_another_try(tmp_path: Path) -> None:
    async with _server(_answers(b"")) as port:
        pass
    async with _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(MediaUnavailable):
            await _get(fetcher, f"http://127.0.0.1:{port}/")


async def test_more_bytes_than_declared_are_not_taken(tmp_path: Path) -> None:
    answers = _answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabcdef")
    async with _server(answers) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        assert await _get(fetcher, f"http://127.0.0.1:{port}/") == b"ab"


async def _drip(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1\r\na\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def test_a_body_that_drips_for_ever_is_given_up_in_time(tmp_path: Path) -> None:
    async with _server(_drip) as port, _fetching(tmp_path, allow=["127.0.0.1"], timeout_s=0.2) as fetcher:
        with pytest.raises(MediaUnavailable, match="too slow"):
            await _get(fetcher, f"http://127.0.0.1:{port}/")


async def test_the_requests_own_deadline_comes_first(tmp_path: Path) -> None:
    async with _server(_drip) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        with pytest.raises(DeadlineExceeded):
            await _get(fetcher, f"http://127.0.0.1:{port}/", within_s=0.2)


async def test_a_host_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def silent(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with _server(silent) as port, _fetching(tmp_path, allow=["127.0.0.1"], silence_s=0.1) as fetcher:
        with pytest.raises(MediaUnavailable, match="too slow"):
            await _get(fetcher, f"http://127.0.0.1:{port}/", within_s=20)


async def test_proxies_of_the_environment_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with _server(_answers(_ok(b"direct"))) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        assert await _get(fetcher, f"http://127.0.0.1:{port}/") == b"direct"


async def test_what_an_address_carries_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with _server(_answers(_ok(b"x"))) as port, _fetching(tmp_path, allow=["127.0.0.1"]) as fetcher:
        await _get(fetcher, f"http://127.0.0.1:{port}/a?signature=secret")
    assert "secret" not in caplog.text


# -- data URLs

_PIXELS = bytes(range(256)) * 7


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:image/png;base64," + base64.b64encode(_PIXELS).decode(), _PIXELS),
        ("DATA:IMAGE/PNG;BASE64," + base64.b64encode(_PIXELS).decode(), _PIXELS),
        ("data:image/png;charset=x;base64," + base64.b64encode(b"abcd").decode().rstrip("="), b"abcd"),
        ("data:image/png;base64,YWJj%59g%3D%3D", b"abcb"),
        ("data:image/png;base64," + base64.encodebytes(_PIXELS).decode(), _PIXELS),
        ("data:application/octet-stream;base64,YQ==", b"a"),
        ("data:image/svg,%41b", b"Ab"),
    ],
)
async def test_data_urls_are_decoded(tmp_path: Path, url: str, data: bytes) -> None:
    async with _fetching(tmp_path) as fetcher:
        assert await _get(fetcher, url, kind=MediaKind.IMAGE) == data


@pytest.mark.parametrize("media_type", ["video/mp4", "image/gif", "image/webp"])
async def test_an_animation_is_a_video_to_who_says_so(tmp_path: Path, media_type: str) -> None:
    async with _fetching(tmp_path) as fetcher:
        assert await _get(fetcher, f"data:{media_type};base64,YQ==", kind=MediaKind.VIDEO) == b"a"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("data:image/png;base64,****", InvalidRequest),
        ("data:image/png;base64,A", InvalidRequest),
        ("data:image/png;base64,YQ==YQ==", InvalidRequest),
        ("data:image/png;base64", InvalidRequest),
        ("data:", InvalidRequest),
        ("data:text/html,<b>", UnsupportedMedia),
        ("data:,abc", UnsupportedMedia),
        ("data:video/mp4;base64,AAAA", UnsupportedMedia),
        ("data:image/png;base64,", InvalidMedia),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", InvalidRequest),
    ],
)
async def test_data_urls_that_hold_no_image_are_refused(tmp_path: Path, url: str, error: type[NvilaError]) -> None:
    async with _fetching(tmp_path) as fetcher:
        with pytest.raises(error):
            await _get(fetcher, url, kind=MediaKind.IMAGE)


@pytest.mark.parametrize("url", ["data:image/png;base64," + "A" * 4 * LIMIT, "data:image/png," + "A" * 4 * LIMIT])
async def test_data_over_the_limit_is_refused_by_its_length(tmp_path: Path, url: str) -> None:
    async with _fetching(tmp_path) as fetcher:
        with pytest.raises(LimitExceeded):
            await _get(fetcher, url, kind=MediaKind.IMAGE)


# -- TLS


def _certificate(folder: Path, host: str) -> Path:
    """A self-signed certificate for `host`, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    return path


async def test_tls_is_asked_for_the_name_and_verified_against_it_though_the_address_is_pinned(tmp_path: Path) -> None:
    certificate = _certificate(tmp_path, "media.example")
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate)
    asked_for: list[str | None] = []
    ours.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    theirs = ssl.create_default_context(cafile=str(certificate))
    names = Names(media_example=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
    async with (
        _server(_answers(_ok(b"secure")), ours) as port,
        _fetching(tmp_path, allow=["127.0.0.1"], names=names, trusted=theirs) as fetcher,
    ):
        assert await _get(fetcher, f"https://media.example:{port}/") == b"secure"
        with pytest.raises(InvalidMedia, match=r"certificate .* refused: Hostname mismatch"):
            await _get(fetcher, f"https://other.example:{port}/")
    assert asked_for == ["media.example", "other.example"]


async def test_a_redirect_from_https_to_http_is_denied(tmp_path: Path) -> None:
    certificate = _certificate(tmp_path, "media.example")
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate)
    names = Names(media_example=[["127.0.0.1"]])
    async with (
        _server(_answers(_to("http://media.example/a")), ours) as port,
        _fetching(
            tmp_path, allow=["127.0.0.1"], names=names, trusted=ssl.create_default_context(cafile=str(certificate))
        ) as fetcher,
    ):
        with pytest.raises(ForbiddenURL, match="from https to http"):
            await _get(fetcher, f"https://media.example:{port}/")
