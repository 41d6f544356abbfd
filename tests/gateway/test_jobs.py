"""Jobs over HTTP: submitted once, followed over broken lines, exported as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from nvila.errors import InvalidMedia
from nvila.gateway.http_jobs import beating, result_lines
from nvila.recordings.claims import Claim
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import JobEvent, JobKind, RecordingState
from tests.gateway.faces import BEARER, OTHER_KEY, Gateway, serving

OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}


async def _recording(gateway: Gateway, length_s: float | None = None) -> str:
    made = await gateway.client.post("/v1/recordings", json={"source": {"type": "push"}}, headers=BEARER)
    if length_s is not None:
        claim = await _claim(gateway, JobKind.INGEST)
        await claim.update_recording(state=RecordingState.COMPLETE, duration_s=length_s, ingested_s=length_s)
        await claim.finish({})
    return str(made.json()["id"])


async def _submit(gateway: Gateway, **body: Any) -> httpx.Response:
    headers = {**BEARER, **body.pop("headers", {})}
    return await gateway.client.post("/v1/jobs", json={"kind": "summary", **body}, headers=headers)


async def _claim(gateway: Gateway, kind: JobKind) -> Claim:
    claim = await JobStore(gateway.database).claim("worker", (kind,), 30)
    assert claim is not None
    return claim


def _events(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


async def test_a_job_goes_from_asked_to_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)
        window = {"start_s": 5, "end_s": 50}
        made = (await _submit(gateway, recording=recording_id, window=window, params={"section_chunks": 4})).json()
        claim = await _claim(gateway, JobKind.SUMMARY)
        await claim.progress({"done": 1, "total": 2})
        running = (await gateway.client.get(f"/v1/jobs/{made['id']}", headers=BEARER)).json()
        await claim.finish({"text": "Quiet."})
        done = (await gateway.client.get(f"/v1/jobs/{made['id']}", headers=BEARER)).json()
    assert (made["object"], made["state"], made["recording"]) == ("job", "queued", recording_id)
    assert made["params"] == {"section_chunks": 4, "start_s": 5, "end_s": 50}
    assert (running["state"], running["progress"], running["result"]) == ("running", {"done": 1, "total": 2}, None)
    assert (done["state"], done["result"], done["error"]) == ("done", {"text": "Quiet."}, None)


async def test_the_same_key_gives_the_same_job(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)
        keyed = {"recording": recording_id, "headers": {"Idempotency-Key": "k1"}}
        first, second = await asyncio.gather(_submit(gateway, **keyed), _submit(gateway, **keyed))
        assert first.json()["id"] == second.json()["id"]
        other = await _submit(gateway, **keyed, window={"start_s": 1})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
        listed = await gateway.client.get("/v1/jobs", params={"kind": "summary"}, headers=BEARER)
        assert [job["id"] for job in listed.json()["data"]] == [first.json()["id"]]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"kind": "ingest"}, 422, "kind"),
        ({"kind": "ask"}, 422, "params.question"),
        ({"kind": "when", "params": {"question": "  "}}, 422, "params.question"),
        ({"window": {"start_s": -1}}, 422, "window.start_s"),
        ({"window": {"start_s": 9, "end_s": 9}}, 422, "window.end_s"),
        ({"window": {"start_s": 9, "end_s": 3}}, 422, "window.end_s"),
        ({"window": {"start_at": 9, "end_at": 3}}, 422, "window.end_at"),
        ({"window": {"start_s": 1, "start_at": 9}}, 422, "window.start_at"),
        ({"window": {"start_s": 60}}, 422, "window.start_s"),
        ({"window": {"from": 1}}, 422, "window.from"),
        ({"recording": "rec_0"}, 404, None),
        ({"recording": None}, 422, "recording"),
    ],
)
async def test_jobs_that_make_no_sense_are_refused_at_the_field(
    tmp_path: Path, body: dict[str, Any], status: int, param: str | None
) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway, 60)
        refused = await _submit(gateway, **{"recording": recording_id, **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ('{"question": "x", "max_tokens": NaN}', "not valid JSON"),
        ('{"question": "x", "max_tokens": -Infinity}', "not valid JSON"),
        ('{"question": "x", "max_tokens": 1e999}', "too large"),
        (r'{"question": "\ud800"}', "not valid JSON"),
        ('{"question": "x", "more": ' + "[" * 250 + "]" * 250 + "}", "not valid JSON"),
    ],
)
async def test_json_that_could_not_be_written_again_is_refused(tmp_path: Path, given: str, says: str) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway, 60)
        body = f'{{"kind": "ask", "recording": "{recording_id}", "params": {given}}}'
        headers = {**BEARER, "Content-Type": "application/json"}
        refused = await gateway.client.post("/v1/jobs", content=body, headers=headers)
        metadata = r'{"source": {"type": "push"}, "name": "\udc00", "metadata": {"a": "\ud800"}}'
        unnamed = await gateway.client.post("/v1/recordings", content=metadata, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
    assert says in refused.json()["error"]["message"]
    assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (422, "invalid_request")


async def test_jobs_that_wait_are_only_so_many(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway, 60)
        for _ in range(8):
            assert (await _submit(gateway, recording=recording_id)).status_code == 201
        refused = await _submit(gateway, recording=recording_id)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0


async def test_a_client_that_was_cut_off_goes_on_after_the_last_event_it_saw(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        claim = await _claim(gateway, JobKind.SUMMARY)
        for number in range(3):
            await claim.event("chunk", {"chunk": number, "text": "a\nb\u2028c"})
        url = f"/v1/jobs/{job_id}/events"
        seen: list[str] = []
        async with gateway.client.stream("GET", url, headers=BEARER) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    seen.append(line[4:])
                if len(seen) == 2:
                    break  # the line breaks
        await claim.finish({"text": "Quiet."})
        by_header = await gateway.client.get(url, headers={**BEARER, "Last-Event-ID": seen[-1]})
        by_query = await gateway.client.get(url, params={"after": seen[-1]}, headers=BEARER)
        rest = _events(by_header.text)
        nothing = await gateway.client.get(url, headers={**BEARER, "Last-Event-ID": rest[-1]["id"]})
        odd = await gateway.client.get(url, headers={**BEARER, "Last-Event-ID": "x"})
    numbers = [int(number) for number in seen] + [int(event["id"]) for event in rest]
    assert numbers == list(range(1, len(numbers) + 1))
    assert rest[-1]["event"] == "done"
    assert json.loads(next(event["data"] for event in rest if event["event"] == "chunk"))["text"] == "a\nb\u2028c"
    assert by_query.text == by_header.text
    assert (nothing.status_code, nothing.content) == (204, b"")
    assert odd.status_code == 422


async def test_a_silent_job_has_a_heartbeat_and_its_events_come_as_they_are_said(tmp_path: Path) -> None:
    async with serving(tmp_path, heartbeat_s=0.1) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        claim = await _claim(gateway, JobKind.SUMMARY)
        lines: list[str] = []
        url = f"/v1/jobs/{job_id}/events"
        async with asyncio.timeout(30), gateway.client.stream("GET", url, headers=BEARER) as got:
            async for line in got.aiter_lines():
                if line.startswith(":") and not any(said.startswith("event: section") for said in lines):
                    await claim.event("section", {"text": "now"})
                lines.append(line)
                if line == "event: section":
                    break
    assert ": still working" in lines


async def test_a_stream_that_nobody_reads_any_more_asks_nothing_more() -> None:
    closed = asyncio.Event()

    async def silent() -> AsyncGenerator[JobEvent, None]:
        try:
            await asyncio.sleep(60)
            yield JobEvent(job_id="job_0", number=1, kind="done", data={}, at=0)
        finally:
            closed.set()

    stream = beating(silent(), 0.01)
    assert await anext(stream) is None
    await stream.aclose()
    assert closed.is_set()


async def test_results_are_json_lines_with_the_whole_last(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        claim = await _claim(gateway, JobKind.SUMMARY)
        await claim.progress({"done": 0})
        for number in range(3):
            await claim.event("chunk", {"chunk": number})
        early = await gateway.client.get(f"/v1/jobs/{job_id}/results", headers=BEARER)
        await claim.finish({"text": "Quiet."})
        whole = await gateway.client.get(f"/v1/jobs/{job_id}/results", headers=BEARER)
    assert [json.loads(line)["chunk"] for line in early.text.splitlines()] == [0, 1, 2]
    assert whole.headers["content-type"].startswith("application/jsonl")
    last = json.loads(whole.text.splitlines()[-1])
    assert (last["kind"], last["text"], last["job"]) == ("result", "Quiet.", job_id)


async def test_results_of_a_job_that_is_removed_meanwhile_end_with_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        claim = await _claim(gateway, JobKind.SUMMARY)
        await claim.event("chunk", {"chunk": 0})
        await claim.finish({"text": "Quiet."})
        jobs, noted = JobStore(gateway.database), list[str]()
        lines = result_lines(jobs, await jobs.get(job_id, tenant="acme"), noted.append)
        first = await anext(lines)
        await jobs.sweep(math.inf)
        (last,) = [json.loads(line) async for line in lines]
    assert json.loads(first)["chunk"] == 0
    assert (last["kind"], last["error"]["code"], noted) == ("error", "not_found", ["not_found"])


async def test_a_job_that_failed_says_why_and_can_be_retried(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        claim = await _claim(gateway, JobKind.SUMMARY)
        await claim.fail(InvalidMedia("nothing to see"), retry=False)
        failed = (await gateway.client.get(f"/v1/jobs/{job_id}", headers=BEARER)).json()
        again = await gateway.client.post(f"/v1/jobs/{job_id}/retry", headers=BEARER)
        stopped = await gateway.client.post(f"/v1/jobs/{job_id}/cancel", headers=BEARER)
    assert (failed["state"], failed["error"]) == ("failed", {"code": "invalid_media", "message": "nothing to see"})
    assert (again.json()["state"], stopped.json()["state"]) == ("queued", "cancelled")


async def test_another_tenants_job_is_not_there_and_nothing_is_without_a_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _recording(gateway)
        job_id = (await _submit(gateway, recording=recording_id)).json()["id"]
        for method, path in (
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/results"),
            ("POST", "/cancel"),
            ("POST", "/retry"),
        ):
            assert (await gateway.client.request(method, f"/v1/jobs/{job_id}{path}", headers=OTHER)).status_code == 404
            assert (await gateway.client.request(method, f"/v1/jobs/{job_id}{path}")).status_code == 401
        assert (await gateway.client.get("/v1/jobs", headers=OTHER)).json()["data"] == []
        body = {"kind": "summary", "recording": recording_id}
        theirs = await gateway.client.post("/v1/jobs", json=body, headers=OTHER)
        assert theirs.status_code == 404


async def test_the_line_of_events_that_could_not_be_followed_has_the_errors_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nvila")
    async with serving(tmp_path) as gateway:
        job_id = (await _submit(gateway, recording=await _recording(gateway))).json()["id"]
        async with AsyncExitStack() as streams:
            for _ in range(8):  # all that may be followed at a time
                await streams.enter_async_context(gateway.streams.permit())
            response = await gateway.client.get(f"/v1/jobs/{job_id}/events", headers=BEARER)
    (line,) = [
        record.__dict__["fields"]
        for record in caplog.records
        if record.message == "request" and record.__dict__["fields"]["path"].endswith("/events")
    ]
    assert '"code": "overloaded"' in response.text
    assert (line["status"], line["code"]) == (200, "overloaded")
