"""Webhook calls: signed, made at least once, tried again for as long as it makes sense, to allowed places only.

A call is a job of its own (`JobKind.DELIVER`): it survives any kill, waits longer after each failure, and ends dead
when the receiver stays away. Headers and signature are those of the Standard Webhooks specification: `webhook-id` is
the same in every attempt (against duplicates), `webhook-timestamp` is this attempt's (against replays), and
`webhook-signature` is HMAC-SHA256 of both and the body. Where it may go is the gateway's egress policy, applied to the
address that the connection is made to. Redirects are not followed: where they lead was allowed by nobody.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpcore
import httpx

from nvila.errors import InvalidMedia, InvalidRequest, LimitExceeded, MediaUnavailable, NvilaError, Unavailable
from nvila.recordings.seal import Seal
from nvila.recordings.types import Job, JobKind

LEAST_SECRET = 16
"""Characters: a shorter one could be guessed from a few calls."""
MOST_SECRET = 256
MOST_BODY_BYTES = 64 << 10
MOST_ANSWER_BYTES = 64 << 10
_LONGEST_URL = 2048
_PREFIX = "whsec_"
_TRY_AGAIN = frozenset({408, 425, 429})

ATTEMPTS = 12
"""Of one call. With pauses that double from one second to five minutes: about twenty minutes."""


class Refused(NvilaError):
    """The receiver answered something that trying again will not change."""

    code = "webhook_refused"


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Where alerts go, as a client asked for it. `secret`: sealed, as it stands in the job's params."""

    url: str
    secret: str = field(repr=False)

    @classmethod
    def of(cls, params: Mapping[str, Any], seal: Seal) -> Webhook | None:
        """From a job's params `webhook_url` and `secret`; None without an address. Raises `InvalidRequest`, and
        `Unavailable` for a secret that `seal` cannot open."""
        url, secret = params.get("webhook_url"), params.get("secret")
        if url is None:
            return None
        if not isinstance(url, str) or not 0 < len(url) <= _LONGEST_URL:
            raise InvalidRequest(f"webhook_url: must be an address of at most {_LONGEST_URL} characters")
        length = len(seal.open(secret)) if isinstance(secret, str) else 0
        if not isinstance(secret, str) or not LEAST_SECRET <= length <= MOST_SECRET:
            raise InvalidRequest(
                f"secret: {length} characters given, {LEAST_SECRET} to "
                f"{MOST_SECRET} are needed to sign calls of webhook_url",
                param="secret",
            )
        _key(seal.open(secret))
        return cls(url=url, secret=secret)


def sign(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.new(_key(secret), b"%s.%d.%s" % (webhook_id.encode(), timestamp, body), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _key(secret: str) -> bytes:
    """A secret that begins with `whsec_` is base64, any other is its own bytes."""
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("secret: after whsec_ comes no base64", param="secret") from None


def deliver_params(webhook: Webhook, webhook_id: str, event: Mapping[str, Any]) -> dict[str, Any]:
    """Params of the job that makes one call. Raises `LimitExceeded` for an event that is too large to be sent."""
    body = json.dumps({"id": webhook_id, **event}, separators=(",", ":"), ensure_ascii=False)
    if len(body.encode()) > MOST_BODY_BYTES:
        raise LimitExceeded.of("bytes of a webhook's event", asked=len(body.encode()), limit=MOST_BODY_BYTES)
    return {"webhook_url": webhook.url, "secret": webhook.secret, "webhook_id": webhook_id, "body": body}


@dataclass(frozen=True, kw_only=True)
class WebhookLimits:
    """Seconds for a whole call; for its connection to be made."""

    timeout_s: float = 10.0
    connect_s: float = 5.0


class WebhookSender:
    """`backend`: makes connections, to allowed addresses only (the gateway's `PinnedBackend`). `parse`: takes an
    address apart and refuses what is no http or https (`parse_url`)."""

    def __init__(
        self,
        backend: httpcore.AsyncNetworkBackend,
        parse: Callable[[str], httpx.URL],
        *,
        ssl_context: ssl.SSLContext | None = None,
        limits: WebhookLimits | None = None,
    ) -> None:
        self._parse = parse
        self._limits = limits or WebhookLimits()
        # No kept connections: each call resolves and checks anew.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or ssl.create_default_context(),
            max_keepalive_connections=0,
            network_backend=backend,
        )

    async def close(self) -> None:
        await self._pool.aclose()

    def check(self, url: str) -> None:
        """Raises `ForbiddenURL` or `InvalidRequest` for an address that no call is ever made to. (What a name resolves
        to is checked at each call.)"""
        try:
            self._parse(url)
        except InvalidRequest as error:
            raise type(error)(_about(error), param="webhook_url") from None

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The answer's status. Raises `ForbiddenURL`, and `Unavailable` when there is no answer in time, nor a host of
        this name: name servers forget for a while, an alert is not lost for that."""
        limits = self._limits
        try:
            parsed = self._parse(url)
            target = httpcore.URL(
                scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path
            )
            fixed = [("Host", parsed.netloc.decode()), ("Content-Length", str(len(body))), ("User-Agent", "nvila")]
            timeouts = {"connect": limits.connect_s, "read": limits.timeout_s, "write": limits.timeout_s}
            async with (
                asyncio.timeout(limits.timeout_s),
                self._pool.stream(
                    "POST",
                    target,
                    headers=_encoded([*fixed, *headers.items()]),
                    content=body,
                    extensions={"timeout": timeouts},
                ) as response,
            ):
                await _read_some(response)
                return response.status
        except (InvalidMedia, MediaUnavailable) as error:
            raise Unavailable(_about(error)) from None
        except InvalidRequest as error:
            raise type(error)(_about(error)) from None
        except (TimeoutError, httpcore.TimeoutException):
            raise Unavailable(f"the webhook's receiver did not answer within {limits.timeout_s:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError):
            raise Unavailable("the webhook's receiver cannot be reached, or broke off") from None


def _encoded(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers]


async def _read_some(response: httpcore.Response) -> None:
    """The answer's body is of no use; a short one is read so that the receiver sees its answer taken."""
    size = 0
    async for data in response.aiter_stream():
        size += len(data)
        if size > MOST_ANSWER_BYTES:
            return


def _about(error: NvilaError) -> str:
    return error.message.replace("the media address", "the webhook's address").replace(
        "must be http, https or data, or the id of an uploaded file", "must be http or https"
    )


class _Held(Protocol):
    @property
    def job(self) -> Job: ...


class DeliverHandler:
    """Makes one call. Result: `status`, `webhook_id`. Raises `Unavailable` (to be tried again) when the receiver is
    away, busy or broken, `Refused` for any other answer but 2xx, `ForbiddenURL`."""

    def __init__(
        self, sender: WebhookSender, seal: Seal | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._sender = sender
        self._seal = seal or Seal()
        self._clock = clock

    async def __call__(self, claim: _Held) -> Mapping[str, Any]:
        params = claim.job.params
        assert claim.job.kind is JobKind.DELIVER, claim.job.kind
        body, webhook_id, timestamp = params["body"].encode(), params["webhook_id"], int(self._clock())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._seal.open(params["secret"]), webhook_id, timestamp, body),
        }
        status = await self._sender.post(params["webhook_url"], headers, body)
        if 200 <= status < 300:
            return {"status": status, "webhook_id": webhook_id}
        if status >= 500 or status in _TRY_AGAIN:
            raise Unavailable(f"the webhook's receiver answered {status}")
        if 300 <= status < 400:
            raise Refused(f"the webhook's receiver answered {status}: redirects are not followed")
        raise Refused(f"the webhook's receiver answered {status}")
