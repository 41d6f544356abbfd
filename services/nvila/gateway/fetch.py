"""Brings a media item's bytes to local disk: from a public address, out of a `data:` URL, or from the file store.

Bytes are counted against the limit from the header first and again as they arrive, and hashed on the way. What an
address carries after the host (paths, queries, which may hold credentials) never enters a message, a log or a span.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import certifi
import httpcore
import httpx

from nvila.errors import ForbiddenURL, InvalidMedia, InvalidRequest, MediaUnavailable, UnsupportedMedia
from nvila.gateway.egress import EgressPolicy, PinnedBackend, Resolver, SystemResolver, parse_url
from nvila.gateway.files import FileStore
from nvila.gateway.ports import LocalMedia
from nvila.gateway.scratch import Scratch, Spool, Spooled
from nvila.telemetry import names
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, MediaKind, MediaSource

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN = frozenset({408, 425, 429})
"""Beside 5xx: what a host answers that may give the media later."""
_DATA_HEADER = re.compile(r"data:([^,;\s]*)((?:;[^,;]*)*),", re.IGNORECASE)
_LONGEST_DATA_HEADER = 256
_OF_BOTH_KINDS = ("application/octet-stream", "image/gif", "image/webp")  # animations are videos to who says so
_DATA_STEP = 4 << 18  # base64 characters decoded at a time; a multiple of 4


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """`timeout_s`: one fetch, redirects included; `silence_s`: without a byte."""

    media_bytes: int
    timeout_s: float = 120
    connect_timeout_s: float = 5
    silence_s: float = 15
    redirects: int = 5


class MediaFetcher:
    """`resolver` and `ssl_context` are the system's unless given."""

    def __init__(
        self,
        *,
        files: FileStore,
        scratch: Scratch,
        policy: EgressPolicy,
        limits: FetchLimits,
        metrics: Metrics,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._files = files
        self._scratch = scratch
        self._limits = limits
        self._metrics = metrics
        # No kept connections: each fetch resolves and checks anew. Proxies of the environment are never used.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or _ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=PinnedBackend(policy, resolver or SystemResolver()),
        )

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[LocalMedia]:
        """The item's bytes, on disk until the end of the block. Raises `InvalidRequest` and its kin, `NotFound`,
        `DeadlineExceeded`, and `MediaUnavailable` for a host that is away, broke off or asks for patience."""
        if source.file_id is not None:
            async with self._files.open(tenant, source.file_id) as file:
                self._count("file", file.size_bytes)
                yield file
            return
        assert source.url is not None
        async with self._scratch.spool(self._limits.media_bytes, param="url") as spool:
            if source.url[:5].lower() == "data:":
                await read_data_url(source.url, source.kind, spool)
                spooled = await spool.finish()
                self._count("data", spooled.size_bytes)
            else:
                spooled = await self._fetch(source.url, source.credentials, spool, deadline)
                self._count("url", spooled.size_bytes)
            if not spooled.size_bytes:
                raise InvalidMedia("the media is empty: 0 bytes", param="url")
            yield spooled

    async def close(self) -> None:
        await self._pool.aclose()

    def _count(self, source: str, size_bytes: int) -> None:
        self._metrics.add(names.MEDIA_BYTES, size_bytes, source=source)

    async def _fetch(self, address: str, credentials: str | None, spool: Spool, deadline: Deadline) -> Spooled:
        left_s = deadline.left_s()
        try:
            async with asyncio.timeout(min(left_s, self._limits.timeout_s)):
                await self._follow(parse_url(address), credentials, spool)
                return await spool.finish()
        except (TimeoutError, httpcore.TimeoutException):
            deadline.left_s()
            raise MediaUnavailable(
                f"the host of the media address is too slow: nothing for {self._limits.silence_s:g} s, "
                f"or not whole in {min(left_s, self._limits.timeout_s):g} s",
                param="url",
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
            cause = error.args[0] if error.args else None  # httpcore's errors hold those that they stand for
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise InvalidMedia(
                    f"the certificate of the media address's host is refused: {cause.verify_message}", param="url"
                ) from None
            raise MediaUnavailable(
                "the media could not be fetched: the connection failed or broke off", param="url"
            ) from None

    async def _follow(self, url: httpx.URL, credentials: str | None, spool: Spool) -> None:
        origin = (url.raw_scheme, url.raw_host, url.port)
        for _ in range(self._limits.redirects + 1):
            is_theirs = (url.raw_scheme, url.raw_host, url.port) == origin
            location = await self._get(url, credentials if is_theirs else None, spool)
            if location is None:
                return
            target = parse_url(str(_joined(url, location)))
            if url.scheme == "https" and target.scheme == "http":
                raise ForbiddenURL("the media address redirects from https to http", param="url")
            url = target
        raise InvalidMedia(f"the media address redirects more than {self._limits.redirects} times", param="url")

    async def _get(self, url: httpx.URL, credentials: str | None, spool: Spool) -> str | None:
        """Write the body to `spool`; or the address that the host redirects to."""
        timeouts = {
            "connect": self._limits.connect_timeout_s,
            "read": self._limits.silence_s,
            "write": self._limits.silence_s,
        }
        headers = [
            (b"Host", url.netloc),
            (b"Accept", b"image/*, video/*, */*;q=0.1"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", b"nvila"),
        ]
        if credentials is not None:  # RFC 7617
            headers.append((b"Authorization", b"Basic " + base64.b64encode(credentials.encode())))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        async with self._pool.stream("GET", target, headers=headers, extensions={"timeout": timeouts}) as response:
            found = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in found:
                return found[b"location"].decode("latin-1")
            if response.status >= 500 or response.status in _TRY_AGAIN:
                raise MediaUnavailable(f"the host of the media address answered {response.status}", param="url")
            if response.status != 200:
                raise InvalidMedia(f"the host of the media address answered {response.status}, not 200", param="url")
            if found.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
                # Media is compressed already: whoever compresses it again made a mistake or a bomb.
                raise UnsupportedMedia("the media comes in a compressed transfer encoding", param="url")
            length = found.get(b"content-length", b"")
            if length.isdigit():
                spool.expect(int(length))
            async for data in response.aiter_stream():
                await spool.write(data)
        return None


def _ssl_context() -> ssl.SSLContext:
    """Trusts what the system trusts (SSL_CERT_FILE included), and the usual authorities where the system has none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _joined(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return url.join(location)
    except (httpx.InvalidURL, ValueError):
        raise InvalidMedia("the media address redirects to something that is not a URL", param="url") from None


async def read_data_url(url: str, kind: MediaKind, spool: Spool) -> None:
    """Decode `data:<type>[;base64],<data>` into `spool`, its size checked before anything is decoded."""
    header = _DATA_HEADER.match(url[:_LONGEST_DATA_HEADER])
    if header is None:
        raise InvalidRequest("the data URL has no `data:<media type>[;base64],` at its start", param="url")
    media_type = header[1].lower()
    if not (media_type.startswith(f"{kind}/") or media_type in _OF_BOTH_KINDS):
        raise UnsupportedMedia(f"the data URL holds {media_type or 'text/plain'}, not {kind}/*", param="url")
    body = memoryview(url[header.end() :].encode("utf-8"))
    if not header[2].lower().endswith(";base64"):
        spool.expect(len(body) // 3)
        await spool.write(unquote_to_bytes(bytes(body)))
        return
    if b"%" in body[:_DATA_STEP].tobytes():
        body = memoryview(unquote_to_bytes(bytes(body)))
    if b"\n" in body[:_DATA_STEP].tobytes():
        body = memoryview(bytes(body).translate(None, b"\r\n\t "))
    spool.expect(len(body) // 4 * 3 - 2)
    try:
        for start in range(0, len(body), _DATA_STEP):
            await spool.write(base64.b64decode(_padded(body[start : start + _DATA_STEP]), validate=True))
    except (binascii.Error, ValueError):
        raise InvalidRequest("the data URL's base64 is malformed", param="url") from None


def _padded(part: memoryview) -> bytes:
    """The last part may come without its padding, as some clients send it."""
    data = part.tobytes()
    return data + b"=" * (-len(data) % 4)
