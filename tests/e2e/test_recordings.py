"""Hours of video on the real stack, in minutes of it: taken in once, asked about over any window, through any kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest

from nvila.cli.lifecycle import RunningStack
from tests.clips import BIKES, BUNNY
from tests.e2e.asking import ask, messages
from tests.e2e.test_faults import part_pid, until_ready

MINUTES = 3
RATE = 10
POLICY = {"fps": 1.0, "chunk_s": 16.0}


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three minutes: real scenes that take turns with a picture that stands still, a stretch of it broken."""
    path = tmp_path_factory.mktemp("footage") / "day.mp4"
    scenes = [_frames(BIKES), _frames(BUNNY)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(MINUTES * 60 * RATE):
            second = number // RATE
            scene = scenes[second // 40 % 2]
            picture = scene[0] if second % 40 >= 16 else scene[number % len(scene)]
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def _frames(clip: Path) -> list[Any]:
    with av.open(str(clip)) as source:
        return [frame.to_ndarray(format="rgb24", width=160, height=96) for frame in source.decode(video=0)][:60]


async def upload(client: openai.AsyncOpenAI, footage: Path) -> str:
    return (await client.files.create(file=footage, purpose="vision")).id


async def add(http: httpx.AsyncClient, file_id: str, **policy: Any) -> str:
    given = {"source": {"type": "file", "file_id": file_id}, "policy": {**POLICY, **policy}}
    answer = await http.post("/v1/recordings", json=given)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def complete(http: httpx.AsyncClient, recording: str) -> dict[str, Any]:
    async with asyncio.timeout(200):
        while True:
            shown = await state(http, f"/v1/recordings/{recording}")
            assert shown["state"] != "failed", shown["error"]
            if shown["state"] == "complete":
                return shown
            await asyncio.sleep(0.25)


async def state(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    try:
        shown: dict[str, Any] = (await http.get(path)).raise_for_status().json()
    except httpx.TransportError:  # the gateway itself may be starting anew
        shown = {"state": "unknown"}
    return shown


async def chunks(http: httpx.AsyncClient, recording: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await http.get(f"/v1/recordings/{recording}/chunks")).json()["data"]
    return [{name: value for name, value in chunk.items() if name != "thumbnail"} for chunk in found]


async def done(http: httpx.AsyncClient, kind: str, recording: str, **given: Any) -> dict[str, Any]:
    """The job when it is over."""
    answer = await http.post("/v1/jobs", json={"kind": kind, "recording": recording, **given})
    assert answer.status_code == 201, answer.text
    return await over(http, answer.json()["id"])


async def begun(http: httpx.AsyncClient, job: str) -> None:
    """Once the job has got somewhere."""
    async with asyncio.timeout(200):
        while not (await http.get(f"/v1/jobs/{job}")).json()["progress"]:
            await asyncio.sleep(0.02)


async def over(http: httpx.AsyncClient, job: str) -> dict[str, Any]:
    async with asyncio.timeout(200):
        while True:
            shown = await state(http, f"/v1/jobs/{job}")
            if shown["state"] in ("done", "failed", "cancelled"):
                assert shown["state"] == "done", shown["error"]
                return shown
            await asyncio.sleep(0.25)


async def events(http: httpx.AsyncClient, job: str, after: int = 0) -> AsyncIterator[tuple[int, str]]:
    """Numbers and kinds, as they are streamed."""
    headers = {"Last-Event-ID": str(after)} if after else {}
    async with http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as stream:
        number = 0
        async for line in stream.aiter_lines():
            if line.startswith("id:"):
                number = int(line[3:])
            elif line.startswith("event:"):
                yield number, line[6:].strip()


async def test_a_recording_is_taken_in_once_and_a_second_pass_encodes_nothing(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, footage: Path
) -> None:
    file_id = await upload(client, footage)
    first = await complete(http, await add(http, file_id))
    counters = first["counters"]
    assert first["duration_s"] == pytest.approx(MINUTES * 60, abs=0.2)
    assert counters["frames_sampled"] == MINUTES * 60
    assert counters["frames_encoded"] + counters["frames_static"] + counters["frames_reused"] >= MINUTES * 60
    assert counters["frames_static"] >= 32  # the stretches that stand still

    second = await complete(http, await add(http, file_id))
    assert second["counters"]["frames_encoded"] == 0
    assert await chunks(http, first["id"]) == await chunks(http, second["id"])


async def test_a_window_is_asked_about_in_a_chat_and_says_what_it_stands_on(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, footage: Path
) -> None:
    recording = await add(http, await upload(client, footage))
    await complete(http, recording)

    def window(**bounds: float) -> dict[str, Any]:
        return {"type": "recording", "recording": {"id": recording, **bounds}}

    short = await ask(client, messages(window(start_s=0, end_s=32)))
    again = await ask(client, messages(window(start_s=0, end_s=32)))
    (coverage,) = short.coverage["media"]
    assert short.text
    assert again.text == short.text
    assert coverage["frames_encoded"] == 0
    assert 0 <= coverage["start_s"] < coverage["end_s"] <= 32
    elsewhere = await ask(client, messages(window(start_s=40, end_s=72)))
    assert elsewhere.text != short.text
    whole = await ask(client, messages(window()))
    assert whole.coverage["media"][0]["end_s"] > 150

    for bad in ({"start_s": 20, "end_s": 10}, {"start_s": -1}, {"start_s": 10_000, "end_s": 10_001}):
        with pytest.raises(openai.APIStatusError) as refused:
            await ask(client, messages(window(**bad)))
        assert refused.value.status_code == 422


async def test_jobs_tell_what_they_do_and_their_streams_go_on_where_they_were_cut(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, footage: Path
) -> None:
    recording = await add(http, await upload(client, footage))
    await complete(http, recording)
    summary = await done(http, "summary", recording, window={"start_s": 0, "end_s": 96})
    timeline = await done(http, "timeline", recording, window={"start_s": 0, "end_s": 64})
    when = await done(http, "when", recording, params={"question": "When do bikes pass?"})
    assert all(job["result"] for job in (summary, timeline, when))

    told = [event async for event in events(http, summary["id"])]
    numbers = [number for number, _ in told]
    assert numbers == list(range(1, len(told) + 1))
    assert told[-1][1] == "done"
    rest = [event async for event in events(http, summary["id"], after=numbers[2])]
    assert rest == told[3:]

    lines = (await http.get(f"/v1/jobs/{summary['id']}/results")).text.splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize("part", ["recordings", "cache", "vision", "gateway"])
async def test_a_kill_while_a_recording_is_taken_in_changes_nothing(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack, footage: Path, part: str
) -> None:
    file_id = await upload(client, footage)
    # A rate of its own for each, so that something is left to encode.
    policy = {"fps": {"recordings": 1.25, "cache": 1.5, "vision": 1.75, "gateway": 2.0}[part], "gate": False}
    killed = await add(http, file_id, **policy)
    async with asyncio.timeout(60):
        while (await http.get(f"/v1/recordings/{killed}")).json()["counters"]["chunks"] < 1:
            await asyncio.sleep(0.05)
    os.kill(part_pid(stack, part), signal.SIGKILL)
    through = await complete(http, killed)
    await until_ready(http)

    undisturbed = await complete(http, await add(http, file_id, **policy))
    assert await chunks(http, killed) == await chunks(http, undisturbed["id"])
    assert through["counters"]["frames_sampled"] == undisturbed["counters"]["frames_sampled"]
    assert undisturbed["counters"]["frames_encoded"] == 0


@pytest.mark.parametrize("part", ["recordings", "cache", "vision", "gateway"])
async def test_a_kill_during_a_summary_changes_nothing_in_it(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack, footage: Path, part: str
) -> None:
    recording = await add(http, await upload(client, footage))
    await complete(http, recording)
    answer = await http.post("/v1/jobs", json={"kind": "summary", "recording": recording})
    job = answer.json()["id"]
    await begun(http, job)
    os.kill(part_pid(stack, part), signal.SIGKILL)
    killed = await over(http, job)
    await until_ready(http)

    undisturbed = await done(http, "summary", recording)
    assert killed["result"] == undisturbed["result"]


async def test_a_decode_service_that_is_killed_changes_neither_a_summary_nor_what_is_taken_in(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack, footage: Path
) -> None:
    file_id = await upload(client, footage)
    recording = await add(http, file_id)
    await complete(http, recording)
    policy = {"fps": 2.25, "gate": False}  # as above: a rate of its own
    taken_in = await add(http, file_id, **policy)
    answer = await http.post("/v1/jobs", json={"kind": "summary", "recording": recording})
    job = answer.json()["id"]
    await begun(http, job)
    os.kill(part_pid(stack, "decode"), signal.SIGKILL)
    through = await complete(http, taken_in)
    killed = await over(http, job)
    await until_ready(http)

    undisturbed = await done(http, "summary", recording)
    assert killed["result"] == undisturbed["result"]
    told = [json.loads(line) for line in (await http.get(f"/v1/jobs/{job}/results")).text.splitlines()]
    seen = [one["chunk"] for one in told if one["kind"] == "chunk"]
    assert sorted(seen) == sorted(set(seen)) == list(range(len(await chunks(http, recording))))
    again = await complete(http, await add(http, file_id, **policy))
    assert await chunks(http, taken_in) == await chunks(http, again["id"])
    assert through["counters"]["frames_sampled"] == again["counters"]["frames_sampled"]
    assert again["counters"]["frames_encoded"] == 0


async def test_a_deleted_recording_is_gone_at_once(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, footage: Path
) -> None:
    recording = await add(http, await upload(client, footage))
    deleted = await http.delete(f"/v1/recordings/{recording}")
    assert deleted.status_code == 202
    assert (await http.get(f"/v1/recordings/{recording}")).status_code == 404
    await over(http, deleted.json()["job"])
