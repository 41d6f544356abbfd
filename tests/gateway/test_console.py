"""The console in a real browser: a recording looked at, asked about, added; by mouse, by keyboard, small and dark.

With NVILA_TEST_PICTURES=FOLDER the pictures that are compared with nothing here are kept there, to be looked at.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from nvila.errors import DeadlineExceeded, LimitExceeded
from nvila.recordings.cold import ColdStore
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import Counters, Group, JobKind, RecordedChunk, RecordingState
from nvila.types import Answered, Gap, Level, RecordingCoverage, TokensRef, WindowMode, WindowPlan
from tests.clips import BIKES, BUNNY, CARPHONE
from tests.gateway.browser import Browser, Page, chromium
from tests.gateway.faces import ANSWERED, BEARER, COVERAGE, KEY, PAUSE, Gateway, ScriptedPipeline, serving
from tests.gateway.test_playing import live

pytestmark = pytest.mark.slow

CHUNK_S = 10.0
REPEATS = 18


@pytest.fixture(scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real clip again and again, packets as they are."""
    path = tmp_path_factory.mktemp("clips") / "yard.mp4"
    with av.open(str(path), "w") as target:
        stream = None
        shift = Fraction(0)
        for _ in range(REPEATS):
            with av.open(str(BIKES)) as source:
                video = source.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                assert video.time_base is not None
                end = 0
                for packet in source.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue
                    end = max(end, packet.pts + (packet.duration or 0))
                    packet.pts += int(shift / video.time_base)
                    packet.dts += int(shift / video.time_base)
                    packet.stream = stream
                    target.mux(packet)
                shift += end * video.time_base
    return path


@asynccontextmanager
async def _console(
    folder: Path, browser: Browser, script: Any = None, *, is_recording: bool = True, cold: ColdStore | None = None
) -> AsyncIterator[tuple[Gateway, Page]]:
    pipeline = ScriptedPipeline(script or ScriptedPipeline().script)
    async with (
        serving(folder, pipeline, upload_bytes=64 << 20, is_recording=is_recording, cold=cold) as gateway,
        browser.page() as page,
    ):
        yield gateway, page


async def _sign_in(gateway: Gateway, page: Page, fragment: str = "") -> None:
    await page.open(f"{gateway.url}/{fragment}")
    await page.until("document.querySelector('#key-dialog')?.open")
    await page.write(KEY)
    await page.press("Enter", 13, text="\r")
    await page.until("!document.querySelector('#key-dialog').open")
    page.problems.clear()  # that there was no key at first


def _pictures() -> list[bytes]:
    """A small JPEG each of frames of three real clips."""
    found = []
    for clip in (BIKES, BUNNY, CARPHONE):
        with av.open(str(clip)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % 40 == 0:
                    picture = io.BytesIO()
                    frame.to_image().resize((160, 90), Image.Resampling.BILINEAR).save(picture, "JPEG", quality=70)  # type: ignore[no-untyped-call]
                    found.append(picture.getvalue())
    return found


async def _recorded(gateway: Gateway, clip: Path | None, *, name: str = "Yard, north gate") -> str:
    """A recording with chunks, pictures, a gap and a still scene, as a worker leaves it."""
    source = {"type": "push"}
    if clip is not None:
        form = {"data": {"purpose": "vision"}, "files": {"file": (clip.name, clip.read_bytes())}}
        file = await gateway.client.post("/v1/files", headers=BEARER, **form)  # type: ignore[arg-type]
        source = {"type": "file", "file_id": file.json()["id"]}
    body = {"source": source, "name": name, "captured_at": 1_795_000_000}
    recording_id = str((await gateway.client.post("/v1/recordings", json=body, headers=BEARER)).json()["id"])
    jobs = JobStore(gateway.database)
    claim = await jobs.claim("worker", (JobKind.INGEST,), 30)
    assert claim is not None
    pictures = _pictures()
    for number in range(REPEATS):
        start = number * CHUNK_S
        is_still = number in (4, 5, 6, 11)
        ref = TokensRef(key=f"key-{number}", levels=(Level(1, 4),))
        group = Group(times_s=tuple(start + n for n in range(10)), segment=0, indices=tuple(range(10)), ref=ref)
        chunk = RecordedChunk(
            recording_id=recording_id,
            number=number,
            start_s=start,
            end_s=start + CHUNK_S,
            groups=(replace(group, is_static=is_still),),
            gaps=(Gap(start_s=start + 2, end_s=start + 9, reason="frames could not be decoded"),)
            if number == 8
            else (),
            thumbnail=pictures[number % len(pictures)],
        )
        counters = Counters(
            frames_sampled=10, frames_static=10 * is_still, frames_encoded=10 * (not is_still), chunks=1
        )
        await claim.add_chunk(chunk, counters)
    whole = REPEATS * CHUNK_S
    await claim.update_recording(state=RecordingState.COMPLETE, duration_s=whole, ingested_s=whole)
    await claim.finish({})
    return recording_id


async def _timeline_job(gateway: Gateway, recording_id: str) -> None:
    body = {"kind": "timeline", "recording": recording_id}
    await gateway.client.post("/v1/jobs", json=body, headers=BEARER)
    claim = await JobStore(gateway.database).claim("worker", (JobKind.TIMELINE,), 30)
    assert claim is not None
    events = [
        {"start_s": 20.0, "end_s": 40.0, "label": "A cyclist comes in at the gate", "chunks": [2, 3]},
        {"start_s": 90.0, "end_s": 110.0, "label": "Two people cross the yard", "chunks": [9, 10]},
        {"start_s": 150.0, "end_s": 160.0, "label": "The cyclist leaves", "chunks": [15, 15]},
    ]
    await claim.finish({"events": events, "gaps": []})


def _answered(recording_id: str) -> Answered:
    plan = WindowPlan(
        mode=WindowMode.FULL,
        pool=1,
        leaves_out_static=True,
        calls=1,
        blocks=14,
        tokens=3600,
        most_tokens=3600,
        frames=140,
        seconds_per_frame=1.2,
        seconds_per_block=9.6,
        prefill_flops=1e12,
        reason="it fits",
    )
    about = RecordingCoverage(
        recording_id=recording_id,
        start_s=0,
        end_s=180,
        captured_from=None,
        captured_to=None,
        frames_static=40,
        frames_left_out=40,
        chunks=18,
        plan=plan,
    )
    gap = Gap(start_s=82.0, end_s=89.0, reason="frames could not be decoded")
    media = replace(COVERAGE.media[0], frames_asked=180, frames_dropped=0, gaps=(gap,), recording=about)
    return replace(ANSWERED, coverage=replace(COVERAGE, media=(media,)))


async def _keep(page: Page, name: str) -> None:
    picture = await page.picture()
    if folder := os.environ.get("NVILA_TEST_PICTURES"):
        (Path(folder) / f"{name}.png").write_bytes(picture)
    shown = Image.open(io.BytesIO(picture)).convert("RGB")
    assert len(shown.resize((64, 64)).getcolors(4096) or ()) > 20, "more than an empty page"


# -- what it does


async def test_the_page_asks_for_a_key_and_says_when_it_is_wrong(tmp_path: Path, browser: Browser) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        await page.open(f"{gateway.url}/")
        await page.until("document.querySelector('#key-dialog')?.open")
        await page.write("no-such-key")
        await page.press("Enter", 13, text="\r")
        wrong = await page.until(
            "document.querySelector('#key-dialog').open && document.querySelector('#key-wrong').innerText"
        )
        assert "a valid API key is needed" in wrong
        await page.write(KEY)
        await page.press("Enter", 13, text="\r")
        await page.until("document.querySelector('#list-empty').checkVisibility()")
        assert "tiny (random weights" in await page.run("document.querySelector('#model').innerText")
        assert await page.run("sessionStorage.length + ' ' + localStorage.length + document.cookie") == "1 0"


async def test_a_recording_is_shown_with_its_video_timeline_events_and_gaps(
    tmp_path: Path, browser: Browser, long_clip: Path
) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, long_clip)
        await _timeline_job(gateway, recording_id)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('video')?.readyState >= 2")
        assert abs(await page.run("document.querySelector('video').duration") - 180) < 5
        await page.until("[...document.querySelectorAll('.strip img')].filter(i => i.naturalWidth === 160).length >= 6")
        await page.until("document.querySelector('.mark-event')")
        marks = "n => document.querySelectorAll('.mark-' + n).length"
        assert await page.run(f"['static', 'gap', 'event'].map({marks})") == [2, 1, 3]
        events = await page.run("[...document.querySelectorAll('.events li')].map(i => i.innerText)")
        assert events[0].replace("\n", " ") == "0:20–0:40 A cyclist comes in at the gate"
        assert "1:22–1:29" in await page.run("document.querySelector('.gaps').innerText")
        await page.click(".events li:nth-child(2) button")
        await page.until("Math.abs(document.querySelector('video').currentTime - 90) < 0.2")
        told = await page.run("document.querySelector('.track').getAttribute('aria-valuetext')")
        assert told == "1:30 of 3:00"
        await page.until("!document.querySelector('video').seeking")
        await _keep(page, "recording")
        assert page.problems == []


async def test_a_cameras_segments_are_played_one_after_the_other_and_across_a_hole(
    tmp_path: Path, browser: Browser
) -> None:
    cold = ColdStore(f"memory://{tmp_path.name}")
    async with _console(tmp_path, browser, cold=cold) as (gateway, page):
        recording_id = await live(gateway, cold, tmp_path, 4)
        await _sign_in(gateway, page, f"#/{recording_id}")
        at = "Number(document.querySelector('.track').getAttribute('aria-valuenow'))"
        shows = (
            "document.querySelector('video')?.readyState >= 2 && document.querySelector('video').src.split('=').at(-1)"
        )
        await page.until(f"({shows}) === '0'")
        await page.run("document.querySelector('.track').focus()")
        await page.press("ArrowRight", 39)
        await page.until(f"({shows}) === '1' && Math.abs(document.querySelector('video').currentTime - 1) < 0.1")
        await page.press("ArrowRight", 39)  # to 10 s, where nothing was recorded
        await page.until(f"({shows}) === '2' && {at} === 12")
        await page.run("document.querySelector('video').playbackRate = 4; document.querySelector('video').play()")
        await page.until(f"({shows}) === '3' && {at} >= 17")
        await page.until(f"document.querySelector('video').ended && {at} >= 19")
        assert page.problems == []


async def test_a_click_and_the_arrow_keys_move_on_the_track(tmp_path: Path, browser: Browser, long_clip: Path) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, long_clip)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('video')?.readyState >= 1")
        await page.click(".track")
        await page.until("Math.abs(document.querySelector('video').currentTime - 90) < 1")
        await page.run("document.querySelector('.track').focus()")
        before = await page.run("Number(document.querySelector('.track').getAttribute('aria-valuenow'))")
        await page.press("ArrowRight", 39)
        await page.until(f"Number(document.querySelector('.track').getAttribute('aria-valuenow')) == {before + 5}")
        await page.press("Home", 36)
        await page.until("document.querySelector('video').currentTime < 0.1")


async def test_an_answer_streams_links_its_times_and_says_what_it_stands_on(
    tmp_path: Path, browser: Browser, long_clip: Path
) -> None:
    script: list[Any] = ["At 0:20 a cyclist ", PAUSE, "comes in, and leaves at 2:30."]
    async with _console(tmp_path, browser, script) as (gateway, page):
        recording_id = await _recorded(gateway, long_clip)
        script.append(_answered(recording_id))
        await _timeline_job(gateway, recording_id)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('#question')")
        await page.click("#question")
        await page.write("Who comes and goes?")
        await page.press("Enter", 13, text="\r")
        await page.until("document.querySelector('.turn.working .text')?.innerText.includes('a cyclist')")
        gateway.pipeline.go.set()
        await page.until("document.querySelectorAll('.turn .time').length === 2")
        (question,) = gateway.pipeline.questions
        assert question.media[0].recording is not None
        assert question.media[0].recording.recording_id == recording_id
        stands = await page.run("document.querySelector('.stands').innerText")
        assert stands == (
            "180 frames, 0:00–3:00 · 40 of a still scene · 62 encoded for this answer · "
            "gap 1:22–1:29: frames could not be decoded"
        )
        await page.click(".turn .time:last-of-type")
        await page.until("Math.abs(document.querySelector('video').currentTime - 150) < 0.2")
        await page.until("!document.querySelector('video').seeking")
        await _keep(page, "answer")
        await page.look(dark=True)
        await _keep(page, "answer-dark")
        await page.look(width=390, height=844)
        await _keep(page, "answer-small")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
        assert page.problems == []


async def test_a_question_that_fails_says_why_in_its_place(tmp_path: Path, browser: Browser) -> None:
    from nvila.errors import Unavailable

    async with _console(tmp_path, browser, [Unavailable("the decode service is away")]) as (gateway, page):
        recording_id = await _recorded(gateway, None)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('#question')")
        await page.click("#question")
        await page.write("What?")
        await page.press("Enter", 13, text="\r")
        assert (
            await page.until("document.querySelector('.turn.failed .text')?.innerText") == "the decode service is away"
        )
        assert await page.run("document.querySelector('.send').disabled") is False


@pytest.mark.parametrize(
    "script",
    [
        [LimitExceeded("parts: 29 needed, at most 16 allowed")],
        ["In ", DeadlineExceeded("9 model calls are needed, about 90 s more, and 20 s are left")],
    ],
)
async def test_a_question_too_long_for_one_request_is_asked_as_a_job(
    tmp_path: Path, browser: Browser, script: list[Any]
) -> None:
    async with _console(tmp_path, browser, script) as (gateway, page):
        recording_id = await _recorded(gateway, None)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('#question')")
        await page.click("#question")
        await page.write("What happens?")
        await page.press("Enter", 13, text="\r")
        claim = None
        async with asyncio.timeout(30):
            while claim is None:
                claim = await JobStore(gateway.database).claim("worker", (JobKind.ASK,), 30)
                await asyncio.sleep(0.02)
        assert claim.job.params["question"] == "What happens?"
        await claim.progress({"done": 3, "total": 29})
        await page.until("document.querySelector('.estimate').innerText === '3 of 29'")
        await claim.finish({"text": "A cyclist passes.", "gaps": []})
        await page.until("document.querySelector('.turn:last-child .text').innerText === 'A cyclist passes.'")
        assert await page.run("document.querySelector('.estimate').innerText") == ""


async def test_a_timeline_is_made_as_a_job_and_its_events_come_onto_the_track(
    tmp_path: Path, browser: Browser, long_clip: Path
) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, long_clip)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('.kind')")
        change = "s => { s.value = 'timeline'; s.dispatchEvent(new Event('change', {bubbles: true})); }"
        await page.run(f"({change})(document.querySelector('.kind'))")
        await page.click(".send")
        claim = None
        async with asyncio.timeout(30):
            while claim is None:
                claim = await JobStore(gateway.database).claim("worker", (JobKind.TIMELINE,), 30)
                await asyncio.sleep(0.02)
        await claim.progress({"done": 1, "total": 18})
        await claim.event("chunk", {"chunk": 0, "start_s": 0, "end_s": 10, "label": "<b>empty</b> yard"})
        await page.until("document.querySelector('.turn.working .who').innerText.includes('1 of 18')")
        assert (
            await page.until("document.querySelector('.parts li')?.innerText.replace('\\n', ' ')")
            == "0:00–0:10 <b>empty</b> yard"
        )
        await claim.finish(
            {"events": [{"start_s": 20, "end_s": 40, "label": "A cyclist", "chunks": [2, 3]}], "gaps": []}
        )
        await page.until("document.querySelectorAll('.mark-event').length === 1")
        await page.until("document.querySelector('.turn:last-child .text').innerText === '1 found:'")
        assert page.problems == []


async def test_without_a_file_pictures_of_chunks_are_shown(tmp_path: Path, browser: Browser) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, None, name="Pushed by a client")
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('.still')?.naturalWidth === 160")
        await _keep(page, "pictures")


async def test_a_file_is_added_by_the_form_and_arrives_whole(tmp_path: Path, browser: Browser, long_clip: Path) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        await _sign_in(gateway, page)
        await page.until("document.querySelector('#list-empty').checkVisibility()")
        await page.click("#add")
        await page.choose_files("#file", long_clip)
        await _keep(page, "adding")
        await page.click("#add-send")
        await page.until("location.hash.startsWith('#/rec_')")
        await page.until("document.querySelector('#list .title')?.innerText === 'yard.mp4'")
        (file,) = (await gateway.client.get("/v1/files", headers=BEARER)).json()["data"]
        content = await gateway.client.get(f"/v1/files/{file['id']}/content", headers=BEARER)
        assert content.content == long_clip.read_bytes()
        assert page.problems == []


async def test_a_camera_that_is_refused_says_why_and_one_that_is_taken_hides_its_password(
    tmp_path: Path, browser: Browser
) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        await _sign_in(gateway, page)
        await page.until("document.querySelector('#list-empty').checkVisibility()")
        await page.click("#add")
        await page.click("input[value=rtsp]")
        await page.click("#url")
        await page.write("http://camera.example/")
        await page.click("#add-send")
        wrong = await page.until("document.querySelector('#add-wrong').innerText")
        assert wrong == "source.url: scheme http given, must be one of rtsp, rtsps"
        await page.run("document.querySelector('#url').value = 'rtsp://guard:opensesame@camera.example/yard'")
        await page.click("#add-send")
        await page.until("document.querySelector('#main .about')?.innerText.includes('rtsp://camera.example/yard')")
        assert "opensesame" not in await page.run("document.documentElement.outerHTML")


async def test_a_recording_is_deleted_after_a_question(tmp_path: Path, browser: Browser) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, None)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('.delete')")
        await page.click(".delete")
        await page.click("#delete-dialog button.quiet")
        await page.until("!document.querySelector('#delete-dialog').open")
        assert (await gateway.client.get(f"/v1/recordings/{recording_id}", headers=BEARER)).status_code == 200
        await page.click(".delete")
        await page.click("#delete-dialog button.danger")
        await page.until("document.querySelector('#list-empty').checkVisibility()")
        assert (await gateway.client.get(f"/v1/recordings/{recording_id}", headers=BEARER)).status_code == 404


async def test_every_control_has_a_name_and_everything_is_reached_by_the_keyboard(
    tmp_path: Path, browser: Browser, long_clip: Path
) -> None:
    async with _console(tmp_path, browser) as (gateway, page):
        recording_id = await _recorded(gateway, long_clip)
        await _sign_in(gateway, page, f"#/{recording_id}")
        await page.until("document.querySelector('.track')")
        await page.call("Accessibility.enable")
        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        controls = {"button", "link", "textbox", "combobox", "slider", "checkbox", "radio", "progressbar"}
        nameless = [
            node["role"]["value"]
            for node in tree
            if node.get("role", {}).get("value") in controls and not node.get("name", {}).get("value")
        ]
        assert nameless == []
        reached = set()
        await page.run("document.activeElement?.blur()")
        for _ in range(30):
            await page.press("Tab", 9)
            reached.add(await page.run("document.activeElement.id || document.activeElement.className || ''"))
        assert {"add", "track", "question", "kind", "primary send"} <= reached


# -- how it is served


async def test_the_page_and_its_files_come_with_a_strict_policy_and_nothing_else_without_a_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        for path in ("/", "/console/app.js", "/console/style.css"):
            served = await gateway.client.get(path)
            assert served.status_code == 200
            policy = served.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        for path in ("/console/../auth.py", "/console/%2e%2e/auth.py", "/console/nothing.js"):
            assert (await gateway.client.get(path)).status_code in (401, 404)
        for path in ("/v1/recordings", "/openapi.json", "/docs", "/console"):
            assert (await gateway.client.get(path)).status_code == 401
        assert (await gateway.client.post("/")).status_code == 401
        page = (await gateway.client.get("/")).text
    assert "style=" not in page
    assert " on" + "click" not in page
    assert json.dumps("<script>") not in page


async def test_a_signed_link_reads_one_recordings_video_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path, upload_bytes=64 << 20) as gateway:
        recording_id = await _recorded(gateway, BIKES)
        other_id = await _recorded(gateway, BIKES)
        link = (await gateway.client.post(f"/v1/recordings/{recording_id}/media_link", headers=BEARER)).json()["url"]
        played = await gateway.client.get(link, headers={"Range": "bytes=4-7"})
        assert (played.status_code, played.content, played.headers["content-type"]) == (206, b"ftyp", "video/mp4")
        query = link.partition("?")[2]
        for path in (
            f"/v1/recordings/{other_id}/media?{query}",
            f"/v1/recordings/{recording_id}?{query}",
            link.replace("tenant=acme", "tenant=zeta"),
            link.replace("expires=", "expires=9"),
            link[:-1] + ("0" if link[-1] != "0" else "1"),
        ):
            assert (await gateway.client.get(path)).status_code == 401
        assert (await gateway.client.delete(link)).status_code == 401


async def test_where_no_recordings_are_kept_it_says_so_and_takes_none(tmp_path: Path, browser: Browser) -> None:
    async with _console(tmp_path, browser, is_recording=False) as (gateway, page):
        await _sign_in(gateway, page)
        await page.until("!document.querySelector('#list-empty').hidden")
        said = await page.run("document.querySelector('#list-empty').textContent")
        assert said == "Recordings are not enabled on this gateway."
        assert await page.run("document.querySelector('#add').disabled")
        assert await page.run("document.querySelector('#trouble').hidden")
        assert "keeps no recordings" in await page.run("document.querySelector('#main').textContent")
