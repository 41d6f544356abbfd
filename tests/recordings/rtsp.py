"""A camera for tests: an RTSP server (RFC 2326, RTP over TCP, H.264 by RFC 6184) that FFmpeg really reads.

It plays the packets of a clip in real time, over and over, and can be made to misbehave: drop its clients and stay
away, fall silent, show another clip, set its clock, ask for other credentials, redirect.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av

from nvila.recordings.capture import annex_b_units

_PAYLOAD_BYTES = 1400
_REALM = "yard"


@dataclass(frozen=True)
class Clip:
    """H.264 access units in order, as NAL units, and how fast they go."""

    frames: tuple[tuple[bytes, ...], ...]
    fps: float

    @classmethod
    def read(cls, path: Path) -> Clip:
        """Of an H.264 file without B frames. Parameter sets stand before each key frame."""
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 25)
            to_annex_b = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream)
            frames = [
                tuple(annex_b_units(bytes(filtered)))
                for packet in container.demux(stream)
                if packet.size
                for filtered in to_annex_b.filter(packet)
            ]
        return cls(tuple(frames), fps)

    @property
    def parameters(self) -> tuple[bytes, bytes]:
        units = self.frames[0]
        return next(u for u in units if u[0] & 0x1F == 7), next(u for u in units if u[0] & 0x1F == 8)


class Camera:
    """`user`, `password`: asked for when set. `tls`: rtsps. Change its attributes to make it misbehave."""

    def __init__(
        self,
        clip: Clip,
        *,
        user: str = "",
        password: str = "",
        is_digest: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.clip = clip
        self.user, self.password, self.is_digest = user, password, is_digest
        self._tls = tls
        self.clock_s = 0.0
        """Added to its stamps from now on: its clock was set."""
        self.is_silent = False
        self.redirect_to = ""
        self.connections = 0
        """Ever accepted."""
        self.requests: list[str] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._nonce = secrets.token_hex(8)

    @property
    def url(self) -> str:
        return f"rtsp{'s' if self._tls else ''}://127.0.0.1:{self.port}/yard"

    @property
    def clients(self) -> int:
        return len(self._clients)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Drop everybody and accept nobody; `start` comes back at the same address."""
        if self._server is not None:
            self._server.close()
            self.drop()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    def drop(self) -> None:
        for client in list(self._clients):
            client.transport.abort()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._clients.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        player: asyncio.Task[None] | None = None
        try:
            while True:
                first = await reader.readexactly(1)
                if first == b"$":  # the client's RTCP
                    _, length = struct.unpack(">BH", await reader.readexactly(3))
                    await reader.readexactly(length)
                    continue
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, url, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                self.requests.append(head[0])
                status, more, body = self._answer(method, url, headers)
                lines = [f"RTSP/1.0 {status}", f"CSeq: {headers.get('cseq', '0')}", *more]
                if body:
                    lines += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
                writer.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
                await writer.drain()
                if method == "PLAY" and status.startswith("200"):
                    player = asyncio.create_task(self._play(writer))
                if method == "TEARDOWN":
                    return
        finally:
            if player is not None:
                player.cancel()
                await asyncio.wait({player})

    def _answer(self, method: str, url: str, headers: dict[str, str]) -> tuple[str, list[str], str]:
        if self.redirect_to and method == "DESCRIBE":
            return "302 Found", [f"Location: {self.redirect_to}"], ""
        if method == "OPTIONS":
            return "200 OK", ["Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN, GET_PARAMETER"], ""
        if self.user and not self._is_known(method, headers.get("authorization", "")):
            ask = f'Digest realm="{_REALM}", nonce="{self._nonce}"' if self.is_digest else f'Basic realm="{_REALM}"'
            return "401 Unauthorized", [f"WWW-Authenticate: {ask}"], ""
        if "/yard" not in url:
            return "404 Not Found", [], ""
        if method == "DESCRIBE":
            return "200 OK", [f"Content-Base: {url}/"], self._sdp()
        if method == "SETUP":
            return "200 OK", ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 7;timeout=60"], ""
        return "200 OK", ["Session: 7"], ""

    def _is_known(self, method: str, given: str) -> bool:
        kind, _, rest = given.partition(" ")
        if not self.is_digest:
            return kind == "Basic" and base64.b64decode(rest).decode() == f"{self.user}:{self.password}"
        fields = {k.strip(): v.strip(' "') for k, _, v in (part.partition("=") for part in rest.split(","))}

        def md5(text: str) -> str:
            return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()

        whose, what = md5(f"{self.user}:{_REALM}:{self.password}"), md5(f"{method}:{fields.get('uri', '')}")
        return kind == "Digest" and fields.get("response") == md5(f"{whose}:{self._nonce}:{what}")

    def _sdp(self) -> str:
        sps, pps = self.clip.parameters
        sets = ",".join(base64.b64encode(unit).decode() for unit in (sps, pps))
        lines = [
            "v=0", "o=- 1 1 IN IP4 127.0.0.1", "s=yard", "t=0 0", "m=video 0 RTP/AVP 96", "c=IN IP4 0.0.0.0",
            "a=rtpmap:96 H264/90000",
            f"a=fmtp:96 packetization-mode=1;profile-level-id={sps[1:4].hex()};sprop-parameter-sets={sets}",
            "a=control:track1",
        ]  # fmt: skip
        return "\r\n".join(lines) + "\r\n"

    async def _play(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        clip, number, sequence = self.clip, 0, secrets.randbelow(1000)
        due_s, stamp_s = loop.time(), float(1 + secrets.randbelow(1000))
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if self.clip is not clip:
                    clip, number = self.clip, 0
                stamp = int((stamp_s + self.clock_s) * 90_000) % 2**32
                if not self.is_silent:
                    for payload, is_last in _payloads(clip.frames[number % len(clip.frames)]):
                        header = struct.pack(">BBHII", 0x80, 96 | (0x80 if is_last else 0), sequence, stamp, 0x5EED)
                        writer.write(b"$\0" + struct.pack(">H", len(header) + len(payload)) + header + payload)
                        sequence = (sequence + 1) % 65536
                    await writer.drain()
                number += 1
                due_s += 1 / clip.fps
                stamp_s += 1 / clip.fps


def _payloads(units: tuple[bytes, ...]) -> list[tuple[bytes, bool]]:
    """A frame's RTP payloads; True for the last."""
    made: list[bytes] = []
    for unit in units:
        if len(unit) <= _PAYLOAD_BYTES:
            made.append(unit)
            continue
        kind, rest = unit[0], unit[1:]  # FU-A, RFC 6184 §5.8
        parts = [rest[at : at + _PAYLOAD_BYTES] for at in range(0, len(rest), _PAYLOAD_BYTES)]
        for number, part in enumerate(parts):
            edge = (0x80 if number == 0 else 0) | (0x40 if number == len(parts) - 1 else 0)
            made.append(bytes([(kind & 0xE0) | 28, edge | (kind & 0x1F)]) + part)
    return [(payload, at == len(made) - 1) for at, payload in enumerate(made)]


@asynccontextmanager
async def camera(clip: Clip, **more: str | bool | ssl.SSLContext) -> AsyncIterator[Camera]:
    shown = Camera(clip, **more)  # type: ignore[arg-type]  # its own
    await shown.start()
    try:
        yield shown
    finally:
        await shown.stop()
