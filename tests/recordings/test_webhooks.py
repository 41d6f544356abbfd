"""Webhook calls against real servers on loopback: signed, refused where they may not go, tried again or not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.fernet import Fernet

from nvila.errors import ForbiddenURL, InvalidRequest, LimitExceeded, Unavailable
from nvila.gateway.egress import EgressPolicy, PinnedBackend, parse_url
from nvila.recordings.asking import MOST_QUESTION_CHARS
from nvila.recordings.seal import Seal
from nvila.recordings.types import Job, JobKind, JobState
from nvila.recordings.webhooks import (
    DeliverHandler,
    Refused,
    Webhook,
    WebhookLimits,
    WebhookSender,
    deliver_params,
    sign,
)

SECRET = "a secret of the client"


@dataclass
class Receiver:
    """An HTTP server that answers what a test says."""

    answer: bytes = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
    wait_s: float = 0.0
    port: int = 0
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((headers, body))
        try:
            await asyncio.sleep(self.wait_s)
            writer.write(self.answer)
            await writer.drain()
        finally:
            writer.close()


@asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[Receiver]:
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


class Names:
    """Resolves every name to these addresses."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        return self._addresses


def sender(*allow: str, timeout_s: float = 5.0, addresses: Sequence[str] = ("127.0.0.1",)) -> WebhookSender:
    backend = PinnedBackend(EgressPolicy(allow=allow, ports={80, 443}), Names(*addresses))
    return WebhookSender(backend, parse_url, limits=WebhookLimits(timeout_s=timeout_s))


@dataclass
class Held:
    job: Job


def delivery(url: str, event: dict[str, Any] | None = None, secret: str = SECRET) -> Held:
    params = deliver_params(Webhook(url=url, secret=secret), "job_1.7", event or {"type": "recording.alert"})
    job = Job(
        id="job_2",
        tenant="acme",
        kind=JobKind.DELIVER,
        recording_id=None,
        params=params,
        fingerprint="f",
        state=JobState.RUNNING,
        attempt=1,
        max_attempts=9,
        fence=1,
        created_at=0,
        not_before=0,
    )
    return Held(job)


async def test_a_call_carries_its_event_an_id_a_time_and_their_signature() -> None:
    async with receiving(Receiver()) as receiver:
        seal = Seal([Fernet.generate_key().decode()])
        deliver = DeliverHandler(sender("hooks.example"), seal, clock=lambda: 1_800_000_000.9)
        address = f"http://hooks.example:{receiver.port}/alerts?x=1"
        result = await deliver(delivery(address, {"chunk": 7}, seal.close(SECRET)))

    ((headers, body),) = receiver.requests
    assert result == {"status": 204, "webhook_id": "job_1.7"}
    assert json.loads(body) == {"id": "job_1.7", "chunk": 7}
    assert headers["host"] == f"hooks.example:{receiver.port}"
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("job_1.7", "1800000000")
    signed = hmac.new(SECRET.encode(), b"job_1.7.1800000000." + body, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(signed).decode()}"


def test_the_signature_is_that_of_the_standard_webhooks_specification() -> None:
    # The example of the specification's own libraries.
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    made = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    with pytest.raises(InvalidRequest, match="no base64"):
        sign("whsec_!", "m", 1, b"")


def test_a_replay_with_another_time_does_not_verify() -> None:
    assert sign(SECRET, "m", 1, b"x") != sign(SECRET, "m", 2, b"x")
    assert sign(SECRET, "m", 1, b"x") != sign(SECRET, "n", 1, b"x")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://2130706433:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://localhost:{port}/",
        "http://inside.example:{port}/",
    ],
)
async def test_private_addresses_are_denied_unless_allowed(url: str) -> None:
    async with receiving(Receiver()) as receiver:
        deliver = DeliverHandler(sender())
        with pytest.raises(ForbiddenURL, match="the webhook's address"):
            await deliver(delivery(url.format(port=receiver.port)))
    assert receiver.requests == []


async def test_a_name_with_one_private_address_among_public_ones_is_denied() -> None:
    mixed = sender(addresses=("93.184.216.34", "10.0.0.7"))
    with pytest.raises(ForbiddenURL):
        await DeliverHandler(mixed)(delivery("https://hooks.example/"))


@pytest.mark.parametrize("url", ["ftp://hooks.example/", "file:///etc/passwd", "data:,x", "https://u:p@hooks.example/"])
def test_what_is_no_address_for_a_call_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(ForbiddenURL, match="webhook's address"):
        sender().check(url)


async def test_redirects_are_not_followed() -> None:
    async with receiving(Receiver()) as inside:
        answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % inside.port
        async with receiving(Receiver(answer)) as receiver:
            with pytest.raises(Refused, match="302: redirects are not followed"):
                await DeliverHandler(sender("hooks.example"))(delivery(f"http://hooks.example:{receiver.port}/"))
    assert len(receiver.requests) == 1
    assert inside.requests == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("500 Oh", Unavailable),
        ("503 Later", Unavailable),
        ("429 Slow", Unavailable),
        ("408 Timeout", Unavailable),
        ("404 Gone", Refused),
        ("401 Who", Refused),
    ],
)
async def test_what_may_pass_is_tried_again_and_what_will_not_is_not(status: str, error: type[Exception]) -> None:
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    async with receiving(Receiver(answer)) as receiver:
        with pytest.raises(error, match=status[:3]):
            await DeliverHandler(sender("hooks.example"))(delivery(f"http://hooks.example:{receiver.port}/"))


async def test_a_slow_receiver_is_given_up_on_in_time() -> None:
    async with receiving(Receiver(wait_s=30)) as receiver:
        began = asyncio.get_running_loop().time()
        slow = sender("hooks.example", timeout_s=0.3)
        with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
            await DeliverHandler(slow)(delivery(f"http://hooks.example:{receiver.port}/"))
        assert asyncio.get_running_loop().time() - began < 3


async def test_an_endless_answer_is_not_read() -> None:
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + bytes(1 << 20)
    async with receiving(Receiver(endless)) as receiver:
        url = f"http://hooks.example:{receiver.port}/"
        assert (await DeliverHandler(sender("hooks.example"))(delivery(url)))["status"] == 200


async def test_nobody_there_is_worth_another_try() -> None:
    async with receiving(Receiver()) as receiver:
        pass
    with pytest.raises(Unavailable, match="cannot be reached"):
        await DeliverHandler(sender("hooks.example"))(delivery(f"http://hooks.example:{receiver.port}/"))


@pytest.mark.parametrize("error", [socket.EAI_NONAME, socket.EAI_AGAIN])
async def test_a_name_server_that_forgets_loses_no_alert(error: int) -> None:
    class Forgetful(Names):
        async def resolve(self, host: str, port: int) -> Sequence[str]:
            raise socket.gaierror(error, "not now")

    forgetful = WebhookSender(PinnedBackend(EgressPolicy(allow=(), ports={443}), Forgetful()), parse_url)
    with pytest.raises(Unavailable, match="the webhook's address"):
        await DeliverHandler(forgetful)(delivery("https://hooks.example/"))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"webhook_url": "https://x", "secret": "short"}, "5 characters given, 16 to 256"),
        ({"webhook_url": "https://x"}, "0 characters given"),
        ({"webhook_url": "https://x", "secret": "whsec_this is no base64"}, "after whsec_ comes no base64"),
        ({"webhook_url": "", "secret": SECRET}, "webhook_url"),
        ({"webhook_url": 7, "secret": SECRET}, "webhook_url"),
        ({"webhook_url": "https://x/" + "y" * 3000, "secret": SECRET}, "webhook_url"),
    ],
)
def test_an_address_without_a_good_secret_is_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Webhook.of(params, Seal())


def test_no_address_is_no_webhook() -> None:
    assert Webhook.of({"secret": SECRET}, Seal()) is None


def test_an_event_that_is_too_large_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="at most 65,536"):
        deliver_params(Webhook(url="https://x", secret=SECRET), "m", {"text": "x" * 70_000})


def test_an_alert_fits_its_call_whichever_alphabet_its_question_is_in() -> None:
    question = "🚪" * MOST_QUESTION_CHARS
    params = deliver_params(Webhook(url="https://x", secret=SECRET), "m", {"question": question})
    assert json.loads(params["body"])["question"] == question
