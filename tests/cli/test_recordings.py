"""`nvila recordings` and `nvila jobs` against a real gateway, with this test as the worker behind it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nvila.cli.main import main
from nvila.cli.recording_client import RecordingClient
from nvila.cli.recordings import seconds
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NotFound, NvilaError
from nvila.recordings.claims import Claim
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import JobKind, RecordingState
from tests.gateway.faces import ANSWERED, KEY, SEAL, Gateway, ScriptedPipeline, serving

DATA = random.Random(3).randbytes(300_000)


class Cli:
    """Types commands at a gateway."""

    def __init__(self, gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
        self.gateway = gateway
        self._capsys = capsys

    async def __call__(self, *words: str, status: int = 0) -> str:
        """What it prints on stdout."""
        arguments = [*words, "--url", self.gateway.url, "--api-key", KEY]
        given = await asyncio.to_thread(main, arguments)
        said = self._capsys.readouterr()
        assert given == status, said.err or said.out
        return said.out if status == 0 or "--json" in words else said.err

    async def json(self, *words: str) -> Any:
        return json.loads(await self(*words, "--json"))

    async def claim(self, *kinds: JobKind) -> Claim:
        async with asyncio.timeout(30):
            while (claim := await JobStore(self.gateway.database).claim("worker", kinds or tuple(JobKind), 30)) is None:
                await asyncio.sleep(0.02)
        return claim


@asynccontextmanager
async def _cli(folder: Path, capsys: pytest.CaptureFixture[str], script: Any = None) -> AsyncIterator[Cli]:
    async with serving(folder, ScriptedPipeline(script or ScriptedPipeline().script)) as gateway:
        yield Cli(gateway, capsys)


async def _pushed(cli: Cli) -> str:
    return str((await cli.json("recordings", "add", "push", "--name", "Yard"))["id"])


async def test_a_file_is_sent_and_its_recording_listed_shown_and_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "yard.mp4"
    clip.write_bytes(DATA)
    async with _cli(tmp_path, capsys) as cli:
        recording_id = (await cli("recordings", "add", str(clip), "--fps", "2", "--meta", "site=north")).strip()
        (listed,) = await cli.json("recordings", "list")
        assert (listed["id"], listed["name"], listed["policy"]["fps"]) == (recording_id, "yard.mp4", 2)
        assert listed["metadata"] == {"site": "north"}
        assert cli.gateway.files.content_path("acme", listed["source"]["file_id"]).read_bytes() == DATA
        assert "yard.mp4" in await cli("recordings", "list")
        shown = await cli.json("recordings", "show", recording_id)
        assert shown["coverage"]["gaps"] == []
        assert recording_id in await cli("recordings", "delete", recording_id)
        assert await cli.json("recordings", "list") == []
        assert "no recording" in await cli("recordings", "show", recording_id, status=5)


async def test_a_recording_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with _cli(tmp_path, capsys) as cli:
        adding = asyncio.create_task(cli.json("recordings", "add", "https://example.com/a.mp4", "--wait"))
        claim = await cli.claim(JobKind.INGEST)
        await claim.update_recording(state=RecordingState.COMPLETE, duration_s=60.0, ingested_s=60.0)
        await claim.finish({})
        recording = await adding
    assert (recording["state"], recording["progress"], recording["source"]["type"]) == ("complete", 1.0, "url")


async def test_a_recording_that_fails_gives_its_errors_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with _cli(tmp_path, capsys) as cli:
        adding = asyncio.create_task(cli("recordings", "add", "rtsp://a:b@camera.example/1", "--wait", status=3))
        claim = await cli.claim(JobKind.INGEST)
        await claim.update_recording(
            state=RecordingState.FAILED, error_code="invalid_media", error="this is not a video"
        )
        assert "this is not a video" in await adding
        assert " failed: invalid_media " in await cli("recordings", "list")


async def test_a_question_is_answered_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with _cli(tmp_path, capsys, ["A ", "cat.", ANSWERED]) as cli:
        recording_id = await _pushed(cli)
        said = await cli(
            "recordings", "ask", recording_id, "What is it?", *("--start", "1:30", "--end", "100", "--timeout", "30")
        )
        (question,) = cli.gateway.pipeline.questions
    assert said.strip() == "A cat."
    window = question.media[0].recording
    assert window is not None
    assert (window.recording_id, window.start_s, window.end_s) == (recording_id, 90.0, 100.0)


async def test_a_timeline_is_followed_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [{"start_s": 20, "end_s": 3700, "label": "A cyclist", "chunks": [0, 1]}]
    async with _cli(tmp_path, capsys) as cli:
        recording_id = await _pushed(cli)
        making = asyncio.create_task(cli("recordings", "timeline", recording_id))
        claim = await cli.claim(JobKind.TIMELINE)
        await claim.event("chunk", {"chunk": 0, "start_s": 0, "end_s": 10, "label": "empty"})
        await claim.finish({"events": events, "gaps": []})
        assert (await making).strip() == "0:20–1:01:40  A cyclist"
        output = tmp_path / "found.jsonl"
        await cli("recordings", "export", recording_id, "-o", str(output))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["chunk", "result"]
        assert lines[1]["events"] == events
        assert "no finished job" in await cli("recordings", "export", recording_id, "--kind", "watch", status=5)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LimitExceeded("parts: 29 needed, at most 16 allowed"), 3),
        (DeadlineExceeded("the window needs 9 model calls, about 90 s more, and 20 s are left"), 8),
    ],
)
async def test_a_question_too_long_for_one_request_is_asked_as_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: NvilaError, status: int
) -> None:
    async with _cli(tmp_path, capsys, [error]) as cli:
        recording_id = await _pushed(cli)
        words = ("recordings", "ask", recording_id, "What happens?", "--timeout", "30")
        asking = asyncio.create_task(cli(*words))
        claim = await cli.claim(JobKind.ASK)
        assert claim.job.params["question"] == "What happens?"
        await claim.finish({"text": "A cyclist passes.", "gaps": []})
        assert await asking == "A cyclist passes.\n"
        refused = await cli(*words, "--json", status=status)
        assert json.loads(refused)["error"]["code"] == error.code


async def test_a_question_about_the_likest_chunks_is_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with _cli(tmp_path, capsys) as cli:
        recording_id = await _pushed(cli)
        asking = asyncio.create_task(cli("recordings", "ask", recording_id, "Where is the dog?", "--relevant", "5"))
        claim = await cli.claim(JobKind.ASK)
        assert claim.job.params == {"question": "Where is the dog?", "relevant_chunks": 5}
        await claim.finish({"text": "By the gate.", "gaps": []})
        assert await asking == "By the gate.\n"


async def test_a_standing_questions_alerts_are_printed_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with _cli(tmp_path, capsys) as cli:
        recording_id = await _pushed(cli)
        watching = asyncio.create_task(cli("recordings", "watch", recording_id, "Is the gate open?"))
        claim = await cli.claim(JobKind.WATCH)
        for number, is_so in enumerate((False, True)):
            seen = {"chunk": number, "start_s": 8 * number, "end_s": 8 * number + 8, "is_so": is_so}
            await claim.event("verdict", seen | {"answer": "yes" if is_so else "no"})
        await claim.event("alert", {"id": "job.1", "start_s": 8, "end_s": 16, "answer": "Yes, wide."})
        await claim.finish({"chunks": 2, "alerts": 1})
        assert (await watching).strip() == "0:08–0:16  Yes, wide."


async def test_jobs_are_listed_cancelled_retried_and_fail_with_their_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with _cli(tmp_path, capsys) as cli:
        recording_id = await _pushed(cli)
        words = ("recordings", "when", recording_id, "When does it rain?", "-d", "--idempotency-key", "once")
        job_id = (await cli(*words)).strip()
        assert (await cli(*words)).strip() == job_id
        assert [job["id"] for job in await cli.json("jobs", "list", "--kind", "when")] == [job_id]
        assert "cancelled" in await cli("jobs", "cancel", job_id)
        assert "cancelled" in await cli("jobs", "follow", job_id, status=1)
        assert "queued" in await cli("jobs", "retry", job_id)
        claim = await cli.claim(JobKind.WHEN)
        await claim.fail(InvalidRequest("the window is empty"), retry=False)
        assert "the window is empty" in await cli("jobs", "follow", job_id, status=3)
        assert f"{job_id}  when    failed: invalid_request  {recording_id}" in await cli("jobs", "list")
        assert json.loads(await cli("jobs", "show", "job_no", "--json", status=5))["error"]["code"] == "not_found"


async def test_a_webhooks_secret_is_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with _cli(tmp_path, capsys) as cli:
        recording_id = await _pushed(cli)
        words = ("--webhook", "https://example.com/hook", "--secret", "whsec_hushhushhushhush", "-d")
        job = await cli.json("recordings", "watch", recording_id, "Is somebody there?", *words)
        assert job["params"] == {"question": "Is somebody there?", "webhook_url": "https://example.com/hook"}
        claim = await cli.claim(JobKind.WATCH)
        assert SEAL.open(claim.job.params["secret"]) == "whsec_hushhushhushhush"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("recordings", "add", "/no/such/file.mp4"), 5),
        (("recordings", "add", "/"), 3),
        (("recordings", "add", "ftp://example.com/a.mp4"), 3),
        (("recordings", "add", "push", "--fps", "1000"), 3),
        (("recordings", "add", "push", "--meta", "nothing"), 3),
        (("recordings", "summarize", "rec_0", "--start", "noon"), 3),
        (("recordings", "list", "--state", "asleep"), 3),
        (("jobs", "follow", "job_0"), 5),
    ],
)
async def test_what_cannot_be_done_says_why_with_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int
) -> None:
    async with _cli(tmp_path, capsys) as cli:
        assert (await cli(*words, status=status)).startswith("nvila: ")


def test_an_export_that_ends_with_an_error_raises_it() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        error = {"code": "not_found", "message": "no job 'job_1'"}
        lines = [{"event": 1, "kind": "chunk"}, {"kind": "error", "error": error}]
        return httpx.Response(200, text="".join(json.dumps(line) + "\n" for line in lines))

    with RecordingClient("http://gateway.example", KEY) as client:
        client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway.example")
        lines = client.lines("/v1/jobs/job_1/results")
        assert json.loads(next(lines))["kind"] == "chunk"
        with pytest.raises(NotFound, match="job_1"):
            next(lines)


async def test_an_upload_goes_on_after_its_connection_broke(tmp_path: Path) -> None:
    clip = tmp_path / "yard.mp4"
    clip.write_bytes(DATA)
    async with serving(tmp_path) as gateway:
        broken = _Breaking(gateway.url)
        with RecordingClient(gateway.url, KEY, pause_s=0.01) as client:
            client._http = httpx.Client(transport=broken, base_url=gateway.url, headers=client._http.headers)
            seen: list[int] = []
            file_id = await asyncio.to_thread(client.upload, clip, seen.append)
        assert gateway.files.content_path("acme", file_id).read_bytes() == DATA
    assert broken.broke == 2


class _Breaking(httpx.BaseTransport):
    """Sends only the beginning of the first piece, then loses the answer to the second."""

    def __init__(self, url: str) -> None:
        self._inner = httpx.HTTPTransport()
        self.broke = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "PATCH" and self.broke < 2:
            self.broke += 1
            body = request.read()
            sent = body[: len(body) // 2] if self.broke == 1 else body
            headers = [(name, value) for name, value in request.headers.items() if name != "content-length"]
            self._inner.handle_request(httpx.Request("PATCH", request.url, headers=headers, content=sent)).read()
            raise httpx.ReadError("the line broke", request=request)
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize(("told", "found"), [("90", 90), ("90.5", 90.5), ("1:30", 90), ("1:04:16", 3856)])
def test_times_are_read_as_people_write_them(told: str, found: float) -> None:
    assert seconds(told) == found


@pytest.mark.parametrize("told", ["", "noon", "-1", "1:2:3:4", "1e3", "nan", ":5"])
def test_what_is_no_time_is_refused(told: str) -> None:
    with pytest.raises(InvalidRequest):
        seconds(told)
