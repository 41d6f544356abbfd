"""Recordings over HTTP and gRPC: adding, listing, looking into them, deleting; whose they are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from nvila.api.v1 import recordings_pb2 as pb
from nvila.api.v1.recordings_pb2_grpc import RecordingServiceStub
from nvila.recordings.inbox import Inbox
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Counters, Group, JobKind, RecordedChunk, RecordingState
from nvila.recordings.window import NOT_SAMPLED
from nvila.types import Gap, Level, TokensRef
from tests.gateway.faces import BEARER, KEY, OTHER_KEY, SEAL, Gateway, serving
from tests.gateway.pushing import encoded

METADATA = (("authorization", f"Bearer {KEY}"),)
OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}
PUSH: dict[str, Any] = {"source": {"type": "push"}}


async def _add(gateway: Gateway, body: dict[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
    headers = {**BEARER, **({"Idempotency-Key": key} if key else {})}
    made = await gateway.client.post("/v1/recordings", json=body or PUSH, headers=headers)
    assert made.status_code == 201, made.text
    record: dict[str, Any] = made.json()
    return record


async def _ingest(gateway: Gateway, chunks: int, stride_s: float = 10.0) -> str:
    """A recording of ten seconds a chunk, two of four still, a gap at the end of chunk 1 and beginning of chunk 2."""
    recording_id = str((await _add(gateway))["id"])
    claim = await JobStore(gateway.database).claim("worker", (JobKind.INGEST,), 30)
    assert claim is not None
    away = {1: [(8, 10)], 2: [(0, 3)]}
    for number in range(chunks):
        start = number * stride_s
        gaps = [Gap(start_s=start + begin, end_s=start + end, reason="away") for begin, end in away.get(number, ())]
        group = Group(
            times_s=tuple(start + n for n in range(10)),
            segment=0,
            indices=tuple(range(10)),
            ref=None if number == 5 else TokensRef(key=f"key-{number}", levels=(Level(1, 4),)),
            is_static=number % 4 in (2, 3),
        )
        await claim.add_chunk(
            RecordedChunk(
                recording_id=recording_id,
                number=number,
                start_s=start,
                end_s=start + 10,
                groups=(group,),
                gaps=tuple(gaps),
                thumbnail=b"\xff\xd8jpeg" if number == 0 else b"",
            ),
            Counters(chunks=1, frames_sampled=10),
        )
    length_s = chunks * stride_s
    await claim.update_recording(state=RecordingState.COMPLETE, ingested_s=length_s, duration_s=length_s)
    await claim.finish({})
    return recording_id


async def test_a_recording_is_made_with_its_job_and_told_without_its_password(tmp_path: Path) -> None:
    source = {"type": "rtsp", "url": "rtsp://guard:open%3Asesame@camera.example:8554/yard?x=1#f"}
    body = {"source": source, "policy": {"fps": 2, "chunk_s": 20}, "metadata": {"site": "north"}, "captured_at": 5}
    async with serving(tmp_path) as gateway:
        made = await _add(gateway, body)
        got = (await gateway.client.get(f"/v1/recordings/{made['id']}", headers=BEARER)).json()
        claim = await JobStore(gateway.database).claim("worker", (JobKind.INGEST,), 30)
        assert claim is not None
        kept = await RecordingStore(gateway.database).get(made["id"], tenant="acme")
        listed = await gateway.client.get("/v1/recordings", headers=BEARER)
    assert got == made
    assert made["source"] == {
        "type": "rtsp",
        "file_id": None,
        "url": "rtsp://camera.example:8554/yard?x=1",
        "is_live": True,
    }
    assert (made["name"], made["state"], made["progress"]) == ("camera.example/yard", "waiting", None)
    assert made["policy"] == {"fps": 2, "chunk_s": 20, "stride_s": None, "gate": True, "floor_s": 60}
    assert claim.job.recording_id == made["id"]
    assert kept.source.secret is not None
    assert "sesame" not in kept.source.secret
    assert SEAL.open(kept.source.secret) == "guard:open:sesame"
    assert "sesame" not in listed.text


@pytest.mark.parametrize("url", ["s3://key:hush@bucket/a.mp4", "gs://bucket/a.mp4"])
async def test_an_object_store_is_not_asked_with_a_clients_password(tmp_path: Path, url: str) -> None:
    source = {"type": "url", "url": url} | ({} if "@" in url else {"username": "key", "password": "hush"})
    async with serving(tmp_path) as gateway:
        refused = await gateway.client.post("/v1/recordings", json={"source": source}, headers=BEARER)
    assert refused.status_code == 422
    assert "read with the service's own credentials" in refused.json()["error"]["message"]
    assert "hush" not in refused.text


async def test_the_same_key_gives_the_same_recording_and_another_request_with_it_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        first = await _add(gateway, key="once")
        assert (await _add(gateway, key="once"))["id"] == first["id"]
        for other in ({"policy": {"fps": 2}}, {"name": "Yard"}, {"metadata": {"site": "north"}}):
            refused = await gateway.client.post(
                "/v1/recordings", json={**PUSH, **other}, headers={**BEARER, "Idempotency-Key": "once"}
            )
            assert refused.status_code == 409
        odd = await gateway.client.post("/v1/recordings", json=PUSH, headers={**BEARER, "Idempotency-Key": "a b"})
        assert (odd.status_code, odd.json()["error"]["param"]) == (422, "Idempotency-Key")
        assert len((await gateway.client.get("/v1/recordings", headers=BEARER)).json()["data"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "source"),
        ({"source": {"type": "tape"}}, 422, "source.type"),
        ({"source": {"type": "file"}}, 422, "source.file_id"),
        ({"source": {"type": "file", "file_id": "file-" + "0" * 32}}, 404, "file_id"),
        ({"source": {"type": "push", "url": "https://a/"}}, 422, "source.url"),
        ({"source": {"type": "url"}}, 422, "source.url"),
        ({"source": {"type": "url", "url": "file:///etc/passwd"}}, 403, "source.url"),
        ({"source": {"type": "url", "url": "https://"}}, 422, "source.url"),
        ({"source": {"type": "url", "url": "https://[::1"}}, 422, "source.url"),
        ({"source": {"type": "url", "url": "https://a:99999/"}}, 422, "source.url"),
        ({"source": {"type": "url", "url": "https://a/" + "x" * 3000}}, 413, "source.url"),
        ({"source": {"type": "rtsp", "url": "https://a/"}}, 403, "source.url"),
        ({**PUSH, "captured_at": 1.8e12}, 422, "captured_at"),
        ({**PUSH, "policy": {"fps": 0}}, 422, "policy.fps"),
        ({**PUSH, "policy": {"chunk_s": 1e9}}, 422, "policy.chunk_s"),
        ({**PUSH, "policy": {"chunk_s": 3600, "fps": 2}}, 413, "policy.chunk_s"),
        ({**PUSH, "policy": {"chunk_s": 10, "fps": 0.01}}, 422, "policy.chunk_s"),
        ({**PUSH, "policy": {"speed": 1}}, 422, "policy.speed"),
        ({**PUSH, "captured_at": -1}, 422, "captured_at"),
        ({**PUSH, "metadata": {str(n): "" for n in range(17)}}, 413, "metadata"),
        ({**PUSH, "metadata": {"a": "x" * 600}}, 413, "metadata"),
        ({**PUSH, "colour": "red"}, 422, "colour"),
    ],
)
async def test_what_cannot_be_recorded_is_refused_at_the_field(
    tmp_path: Path, body: dict[str, Any], status: int, param: str
) -> None:
    async with serving(tmp_path) as gateway:
        refused = await gateway.client.post("/v1/recordings", json=body, headers=BEARER)
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text
        assert (await gateway.client.get("/v1/recordings", headers=BEARER)).json()["data"] == []


async def test_quotas_refuse_what_is_too_much(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        for _ in range(4):
            await _add(gateway)
        refused = await gateway.client.post("/v1/recordings", json=PUSH, headers=BEARER)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "limit_exceeded")
        assert (await gateway.client.post("/v1/recordings", json=PUSH, headers=OTHER)).status_code == 201


async def test_pages_of_a_list_meet_without_gap_or_overlap(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        ids = [(await _add(gateway))["id"] for _ in range(4)]
        seen: list[str] = []
        cursor: dict[str, str] = {}
        for has_more in (True, True, False, False):
            if seen and not cursor:
                break
            url = "/v1/recordings"
            page = (await gateway.client.get(url, params={"limit": "2", **cursor}, headers=BEARER)).json()
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            seen += [one["id"] for one in page["data"]]
            cursor = {"cursor": page["next_cursor"]} if page["has_more"] else {}
            assert has_more or not cursor
        assert seen == ids[::-1]
        for query in ({"limit": "0"}, {"cursor": "x"}, {"state": "asleep"}):
            refused = await gateway.client.get("/v1/recordings", params=query, headers=BEARER)
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, next(iter(query)))


async def test_the_same_key_with_another_password_is_another_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:

        async def add(password: str) -> httpx.Response:
            source = {"type": "rtsp", "url": "rtsp://camera.example/1", "username": "a", "password": password}
            headers = {**BEARER, "Idempotency-Key": "once"}
            return await gateway.client.post("/v1/recordings", json={"source": source}, headers=headers)

        first, again, other = [await add(password) for password in ("hush", "hush", "other")]
    assert (first.json()["id"], first.status_code) == (again.json()["id"], again.status_code)
    assert (other.status_code, other.json()["error"]["param"]) == (409, "Idempotency-Key")


async def test_coverage_joins_gaps_and_still_stretches_of_neighbours(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _ingest(gateway, 8)
        url = f"/v1/recordings/{recording_id}/coverage"
        whole = (await gateway.client.get(url, headers=BEARER)).json()
        part = (await gateway.client.get(url, params={"start_s": "45", "end_s": "61"}, headers=BEARER)).json()
        for bounds in (("5", "5"), ("9", "1"), ("-1", "1"), ("0", "nan")):
            query = dict(zip(("start_s", "end_s"), bounds, strict=True))
            for what in ("coverage", "chunks", "segments"):
                address = f"/v1/recordings/{recording_id}/{what}"
                assert (await gateway.client.get(address, params=query, headers=BEARER)).status_code == 422
    assert whole["gaps"] == [{"start_s": 18, "end_s": 23, "reason": "away"}]
    assert whole["static"] == [{"start_s": 20, "end_s": 39}, {"start_s": 60, "end_s": 79}]
    assert (whole["frames"], whole["frames_static"], whole["frames_lost"], whole["chunks"]) == (80, 40, 10, 8)
    assert (part["start_s"], part["end_s"], part["chunks"]) == (45, 61, 3)
    assert (part["frames"], part["frames_static"], part["frames_lost"]) == (5 + 10 + 1, 1, 10)
    assert part["static"] == [{"start_s": 60, "end_s": 60}]


async def test_coverage_of_a_part_tells_the_gaps_in_it_and_time_between_chunks(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _ingest(gateway, 3, stride_s=60)
        url = f"/v1/recordings/{recording_id}/coverage"

        async def gaps(start_s: float, end_s: float) -> list[tuple[float, float, str]]:
            query = {"start_s": start_s, "end_s": end_s}
            found = (await gateway.client.get(url, params=query, headers=BEARER)).json()["gaps"]
            return [(gap["start_s"], gap["end_s"], gap["reason"]) for gap in found]

        whole = (await gateway.client.get(url, headers=BEARER)).json()
        assert await gaps(5, 10) == []
        assert await gaps(30, 65) == [(30, 60, NOT_SAMPLED)]
        assert await gaps(20, 40) == [(20, 40, NOT_SAMPLED)]
        assert await gaps(69, 121) == [(69, 70, "away"), (70, 120, NOT_SAMPLED), (120, 121, "away")]
    told = [(gap["start_s"], gap["end_s"]) for gap in whole["gaps"]]
    assert told == [(10, 60), (68, 70), (70, 120), (120, 123), (130, 180)]


async def test_coverage_counts_a_frame_once_however_many_chunks_have_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        url = f"/v1/recordings/{await _ingest(gateway, 8, stride_s=4)}/coverage"
        whole = (await gateway.client.get(url, headers=BEARER)).json()
        part = (await gateway.client.get(url, params={"start_s": "13", "end_s": "33"}, headers=BEARER)).json()
    assert (whole["chunks"], whole["frames"], part["frames"]) == (8, 7 * 4 + 10, 20)
    assert (whole["frames_static"], whole["frames_lost"]) == (16, 4), "as the first says that has it"


async def test_chunks_come_in_pages_with_their_pictures(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _ingest(gateway, 5)
        url = f"/v1/recordings/{recording_id}/chunks"
        first = (await gateway.client.get(url, params={"limit": "3"}, headers=BEARER)).json()
        query = {"limit": "3", "cursor": first["next_cursor"]}
        second = (await gateway.client.get(url, params=query, headers=BEARER)).json()
        picture = await gateway.client.get(first["data"][0]["thumbnail"], headers=BEARER)
        missing = await gateway.client.get(first["data"][1]["thumbnail"], headers=BEARER)
        odd = [
            (await gateway.client.get(f"{url}{path}", headers=BEARER)).status_code
            for path in (f"?cursor={10**30}", f"/{10**30}/thumbnail", f"/../segments?cursor={10**30}")
        ]
    assert [chunk["number"] for chunk in first["data"] + second["data"]] == [0, 1, 2, 3, 4]
    assert (first["has_more"], second["has_more"], second["next_cursor"]) == (True, False, None)
    assert (picture.content, picture.headers["content-type"]) == (b"\xff\xd8jpeg", "image/jpeg")
    assert missing.status_code == 404
    assert odd == [422, 422, 422], "no chunk nor segment has such a number"


async def test_an_uploaded_video_is_played_in_ranges_and_never_as_a_page(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        for data, kind in ((encoded("mp4", 1), "video/mp4"), (b"<script>", "application/octet-stream")):
            form = {"data": {"purpose": "vision"}, "files": {"file": ("a.mp4", data)}}
            file = await gateway.client.post("/v1/files", headers=BEARER, **form)  # type: ignore[arg-type]
            made = await _add(gateway, {"source": {"type": "file", "file_id": file.json()["id"]}})
            url = f"/v1/recordings/{made['id']}/media"
            part = await gateway.client.get(url, headers={**BEARER, "Range": "bytes=2-5"})
            assert (part.status_code, part.content, part.headers["content-type"]) == (206, data[2:6], kind)
            assert part.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in part.headers["content-security-policy"]


async def test_a_deleted_recording_is_gone_at_once_and_a_job_drains_behind(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _ingest(gateway, 2)
        gone = await gateway.client.delete(f"/v1/recordings/{recording_id}", headers=BEARER)
        assert gone.status_code == 202
        for path in ("", "/coverage", "/chunks", "/media", "/chunks/0/thumbnail"):
            assert (await gateway.client.get(f"/v1/recordings/{recording_id}{path}", headers=BEARER)).status_code == 404
        assert (await gateway.client.delete(f"/v1/recordings/{recording_id}", headers=BEARER)).status_code == 404
        claim = await JobStore(gateway.database).claim("worker", (JobKind.DELETE,), 30)
        assert claim is not None
        assert claim.job.id == gone.json()["job"]


async def test_another_tenants_recording_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        recording_id = await _ingest(gateway, 1)
        url = f"/v1/recordings/{recording_id}"
        for method, path in (
            ("GET", ""),
            ("GET", "/coverage"),
            ("GET", "/chunks"),
            ("GET", "/chunks/0/thumbnail"),
            ("GET", "/media"),
            ("POST", "/media_link"),
            ("POST", "/frames"),
            ("DELETE", ""),
        ):
            assert (await gateway.client.request(method, url + path, headers=OTHER)).status_code == 404
            assert (await gateway.client.request(method, url + path)).status_code == 401
        assert (await gateway.client.get("/v1/recordings", headers=OTHER)).json()["data"] == []
        form = {"data": {"purpose": "vision"}, "files": {"file": ("a.mp4", b"0000ftyp")}}
        file = await gateway.client.post("/v1/files", headers=BEARER, **form)  # type: ignore[arg-type]
        body = {"source": {"type": "file", "file_id": file.json()["id"]}}
        assert (await gateway.client.post("/v1/recordings", json=body, headers=OTHER)).status_code == 404


async def test_the_routes_are_in_the_document_with_what_they_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        paths = (await gateway.client.get("/openapi.json", headers=BEARER)).json()["paths"]
    frames = paths["/v1/recordings/{recording_id}/frames"]["post"]
    assert "video/mp2t" in frames["requestBody"]["content"]
    assert "202" in paths["/v1/recordings/{recording_id}"]["delete"]["responses"]
    assert "text/event-stream" in paths["/v1/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert {"post", "options"} <= paths["/v1/uploads"].keys()
    assert {"head", "patch", "delete"} <= paths["/v1/uploads/{upload_id}"].keys()


# -- over gRPC


@asynccontextmanager
async def _stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.grpc_target) as channel:
        yield RecordingServiceStub(channel)  # type: ignore[no-untyped-call]


async def test_the_same_recording_is_seen_over_grpc(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        recording_id = await _ingest(gateway, 3)
        found = (await stub.GetRecording(pb.GetRecordingRequest(id=recording_id), metadata=METADATA)).recording
        listed = await stub.ListRecordings(pb.ListRecordingsRequest(limit=5), metadata=METADATA)
        seen = await stub.GetRecordingCoverage(pb.GetRecordingCoverageRequest(id=recording_id), metadata=METADATA)
        chunks = await stub.ListChunks(pb.ListChunksRequest(recording_id=recording_id, limit=2), metadata=METADATA)
        gone = await stub.DeleteRecording(pb.DeleteRecordingRequest(id=recording_id), metadata=METADATA)
        left = await stub.ListRecordings(pb.ListRecordingsRequest(), metadata=METADATA)
    assert (found.state, found.progress, found.counters.chunks, found.source.type) == ("complete", 1, 3, "push")
    assert not found.HasField("captured_at")
    assert [one.id for one in listed.recordings] == [recording_id]
    assert [(gap.start_s, gap.end_s, gap.reason) for gap in seen.gaps] == [(18, 23, "away")]
    assert ([chunk.number for chunk in chunks.chunks], chunks.has_more) == ([0, 1], True)
    assert gone.job_id.startswith("job_")
    assert not left.recordings


async def test_video_is_pushed_over_grpc(tmp_path: Path) -> None:
    data = encoded("mpegts")

    async def said(recording_id: str) -> AsyncIterator[pb.PushRequest]:
        start = pb.PushStart(recording_id=recording_id, content_type="video/mp2t", captured_at=50, end=True)
        yield pb.PushRequest(start=start)
        for at in range(0, len(data), 1000):
            yield pb.PushRequest(data=data[at : at + 1000])

    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        source = pb.Source(type="push")
        made = await stub.CreateRecording(pb.CreateRecordingRequest(source=source), metadata=METADATA)
        pushed = await stub.Push(said(made.recording.id), metadata=METADATA)
        inbox = Inbox(tmp_path / "recordings")
        assert inbox.is_ended(made.recording.id)
        assert len(inbox.pieces(made.recording.id)) == pushed.pieces == 3
    assert (pushed.bytes, pushed.last_captured_at) == (len(data), pytest.approx(54, abs=0.01))


async def test_a_job_is_submitted_followed_and_cancelled_over_grpc(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        recording_id = await _ingest(gateway, 3)
        asked = pb.CreateJobRequest(
            kind="when",
            recording_id=recording_id,
            window=pb.Window(start_s=5, end_s=25),
            params_json=json.dumps({"question": "When?", "secret": "hush"}),
        )
        job = (await stub.CreateJob(asked, metadata=METADATA)).job
        claim = await JobStore(gateway.database).claim("worker", (JobKind.WHEN,), 30)
        assert claim is not None
        await claim.event("interval", {"start_s": 7, "end_s": 9})
        await claim.finish({"intervals": []})
        asked_events = pb.FollowJobRequest(id=job.id, after_event=1)
        events = [event async for event in stub.FollowJob(asked_events, metadata=METADATA)]
        done = (await stub.CancelJob(pb.CancelJobRequest(id=job.id), metadata=METADATA)).job
    assert json.loads(job.params_json) == {"question": "When?", "start_s": 5, "end_s": 25}
    assert "hush" not in claim.job.params["secret"]
    assert SEAL.open(claim.job.params["secret"]) == "hush"
    assert [event.number for event in events] == list(range(2, 2 + len(events)))
    assert events[-1].kind == "done"
    assert (done.state, json.loads(done.result_json)) == ("done", {"intervals": []})


@pytest.mark.parametrize(
    ("method", "request_", "status", "param"),
    [
        ("GetRecording", pb.GetRecordingRequest(id="rec_0"), grpc.StatusCode.NOT_FOUND, None),
        ("CreateRecording", pb.CreateRecordingRequest(), grpc.StatusCode.INVALID_ARGUMENT, "source.type"),
        ("ListRecordings", pb.ListRecordingsRequest(limit=9999), grpc.StatusCode.INVALID_ARGUMENT, "limit"),
        (
            "CreateJob",
            pb.CreateJobRequest(kind="ask", params_json="[]"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "params_json",
        ),
        (
            "CreateJob",
            pb.CreateJobRequest(kind="ask", params_json=r'{"question": "\ud800"}'),
            grpc.StatusCode.INVALID_ARGUMENT,
            "params_json",
        ),
        ("CreateJob", pb.CreateJobRequest(kind="ingest"), grpc.StatusCode.INVALID_ARGUMENT, "kind"),
    ],
)
async def test_errors_over_grpc_have_the_status_of_their_kind(
    tmp_path: Path, method: str, request_: Any, status: grpc.StatusCode, param: str | None
) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request_, metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as keyless:
            await getattr(stub, method)(request_)
    assert caught.value.code() is status
    assert dict(tuple(caught.value.trailing_metadata() or ())).get("nvila-param") == param
    assert keyless.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/recordings"),
        ("GET", "/v1/recordings"),
        ("GET", f"/v1/recordings/rec_{'0' * 32}"),
        ("DELETE", f"/v1/recordings/rec_{'0' * 32}"),
        ("GET", f"/v1/recordings/rec_{'0' * 32}/coverage"),
        ("GET", f"/v1/recordings/rec_{'0' * 32}/chunks"),
        ("GET", f"/v1/recordings/rec_{'0' * 32}/media"),
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", f"/v1/jobs/job_{'0' * 32}"),
        ("GET", f"/v1/jobs/job_{'0' * 32}/events"),
    ],
)
async def test_where_none_are_kept_nothing_is_accepted_that_would_wait_for_ever(
    tmp_path: Path, method: str, path: str
) -> None:
    body = PUSH if path.endswith("recordings") else {"recording": f"rec_{'0' * 32}", "kind": "summary", "window": {}}
    async with serving(tmp_path, is_recording=False) as gateway:
        answer = await gateway.client.request(method, path, json=body if method == "POST" else None, headers={**BEARER})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), answer.text
    assert answer.json()["error"]["message"] == "recordings are not enabled on this gateway"


async def test_where_none_are_kept_grpc_says_so_too(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, is_recording=False) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        stub = RecordingServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListRecordings(pb.ListRecordingsRequest(), metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as alike:
            async for _ in stub.FollowJob(pb.FollowJobRequest(id="job_0"), metadata=METADATA):
                pass
    assert refused.value.code() is alike.value.code() is grpc.StatusCode.NOT_FOUND
    assert refused.value.details() == "recordings are not enabled on this gateway"
