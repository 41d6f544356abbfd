"""`nvila ask` against a small gateway over real HTTP: what is sent, what is printed, what each failure becomes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila.cli.client import GatewayClient, Media, kind_of
from nvila.cli.main import main
from nvila.errors import DeadlineExceeded, LimitExceeded, Unauthenticated
from nvila.types import MediaKind

COVERAGE = {
    "media": [
        {
            "kind": "video",
            "frames_asked": 8,
            "frames_decoded": 7,
            "frames_encoded": 7,
            "frames_reused": 0,
            "frames_dropped": 1,
            "frames_padded": 1,
            "start_s": 0.0,
            "end_s": 3.5,
            "gaps": [{"start_s": 1.0, "end_s": 1.5, "reason": "damaged"}],
            "tokens": 17,
            "chunks": 1,
            "cache_hits": 0,
            "tiles": 8,
        }
    ],
    "stage_ms": {"video": 12.0, "vision.tower": 5.0, "decode": 30.0, "first_token": 40.0, "total": 1234.0},
}
USAGE = {"prompt_tokens": 30, "completion_tokens": 3, "total_tokens": 33}


def chunk(text: str = "", reason: str | None = None) -> dict[str, Any]:
    delta = {"content": text} if text else {}
    return {"model": "small", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}


GOOD = [
    chunk(" A "),
    chunk("bike"),
    chunk("."),
    chunk(reason="stop"),
    {"choices": [], "usage": USAGE, "coverage": COVERAGE},
]


class Gateway:
    """Keeps what it was sent. `events`: what a chat answers; an int among them breaks the stream off."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.chats: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = GOOD
        self.status = 200
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                gateway.requests.append(("POST", self.path))
                if self.path == "/v1/files":
                    self._json(200, {"id": "file-1"})
                    return
                gateway.chats.append(json.loads(body))
                if self.headers["authorization"] != "Bearer right":
                    self._json(401, {"error": {"code": "unauthenticated", "message": "no such key", "param": None}})
                elif gateway.status != 200:
                    self._json(gateway.status, gateway.events[0])
                else:
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream")
                    self.end_headers()
                    for event in gateway.events:
                        self.wfile.write(b": still working\n\ndata: " + json.dumps(event).encode() + b"\n\n")
                    self.wfile.write(b"data: [DONE]\n\n")

            def do_DELETE(self) -> None:
                gateway.requests.append(("DELETE", self.path))
                self._json(200, {})

            def _json(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(32))
    return path


def ask(gateway: Gateway, *more: str, key: str = "right") -> int:
    return main(["ask", *more, "--url", gateway.url, "--api-key", key])


def test_the_answer_goes_to_stdout_and_what_it_stands_on_to_stderr(
    gateway: Gateway, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(gateway, str(clip), "What?") == 0

    told = capfd.readouterr()
    assert told.out == "A bike.\n"
    assert "0.0–3.5" in told.err
    assert "gap 1.0–1.5 s: damaged" in told.err
    assert "total 1.23 s" in told.err


def test_a_file_is_uploaded_asked_about_and_deleted(gateway: Gateway, clip: Path) -> None:
    ask(gateway, str(clip), "What?", "--frames", "8", "--start", "1", "--end", "3.5")

    assert gateway.requests == [("POST", "/v1/files"), ("POST", "/v1/chat/completions"), ("DELETE", "/v1/files/file-1")]
    video, text = gateway.chats[0]["messages"][0]["content"]
    assert video["video_url"] == {"url": "file-1", "num_frames": 8, "start_s": 1.0, "end_s": 3.5}
    assert text == {"type": "text", "text": "What?"}


def test_addresses_are_left_to_the_gateway_in_the_order_given(gateway: Gateway) -> None:
    ask(gateway, "https://host/a.PNG?size=1", "http://host/stream", "What?")

    *media, _ = gateway.chats[0]["messages"][0]["content"]
    assert [part["type"] for part in media] == ["image_url", "video_url"]
    assert media[0]["image_url"]["url"] == "https://host/a.PNG?size=1"


def test_a_program_gets_one_json_object(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, "What?", "--json") == 0

    told = capfd.readouterr()
    assert json.loads(told.out) == {
        "answer": "A bike.",
        "model": "small",
        "finish_reason": "stop",
        "usage": USAGE,
        "coverage": COVERAGE,
    }
    assert told.err == ""


def test_a_wrong_key_has_its_own_status(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(gateway, "What?", key="wrong") == 4
    assert capfd.readouterr().err == "nvila: no such key\n"


def test_the_gateways_errors_keep_their_meaning(gateway: Gateway) -> None:
    gateway.status = 422
    gateway.events = [{"error": {"code": "limit_exceeded", "message": "frames: 300 asked", "param": "messages"}}]

    assert ask(gateway, "What?") == 3
    with GatewayClient(gateway.url, "right") as client, pytest.raises(LimitExceeded, match="300 asked"):
        list(client.ask(_question()))


def test_an_error_in_the_middle_of_a_stream_is_an_error(gateway: Gateway) -> None:
    gateway.events = [chunk("A"), {"error": {"code": "deadline_exceeded", "message": "the request's time is up"}}]

    with GatewayClient(gateway.url, "right") as client, pytest.raises(DeadlineExceeded):
        list(client.ask(_question()))


def test_a_stream_that_just_ends_is_not_an_answer(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    gateway.events = [chunk("A")]

    assert ask(gateway, "What?") == 7
    assert "broke off" in capfd.readouterr().err


def test_no_key_is_no_header(gateway: Gateway) -> None:
    with GatewayClient(gateway.url, "") as client, pytest.raises(Unauthenticated):
        list(client.ask(_question()))


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", MediaKind.IMAGE),
        (b"\xff\xd8\xff\xe0", MediaKind.IMAGE),
        (b"RIFF\0\0\0\0WEBPVP8 ", MediaKind.IMAGE),
        (b"RIFF\0\0\0\0AVI LIST", MediaKind.VIDEO),
        (b"\0\0\0\x1cftypavif", MediaKind.IMAGE),
        (b"\0\0\0\x18ftypmp42", MediaKind.VIDEO),
        (b"\x1aE\xdf\xa3", MediaKind.VIDEO),
        (b"", MediaKind.VIDEO),
    ],
)
def test_a_files_kind_is_seen_in_its_first_bytes(start: bytes, kind: MediaKind, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(start)

    assert kind_of(path) is kind


def _question() -> Any:
    from nvila.cli.client import Ask

    return Ask(media=[Media(kind=MediaKind.IMAGE, url="https://host/a.png")], question="What?")
