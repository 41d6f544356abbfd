"""A standing question on a recording: asked of each new chunk once, each yes an event and a webhook call.

Verdict, event and the job that makes the call are one transaction, so a kill neither loses an alert nor makes two calls
of one; the call itself is made at least once (`webhooks.py`), under an id that stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from nvila.errors import InvalidRequest, LimitExceeded
from nvila.model.wording import IS_IT_SO
from nvila.recordings.asking import (
    Caller,
    Piece,
    Writes,
    fingerprint,
    only_ref,
    piece_of,
    plain,
    text_param,
    window_of,
    window_params,
)
from nvila.recordings.job_rows import NewJob
from nvila.recordings.seal import Seal
from nvila.recordings.types import Job, JobKind, RecordedChunk, Recording, RecordingState
from nvila.recordings.webhooks import ATTEMPTS, Webhook, WebhookSender, deliver_params
from nvila.recordings.when import ANSWER_TOKENS, verdict
from nvila.types import RecordingWindow

_OVER = (RecordingState.COMPLETE, RecordingState.FAILED, RecordingState.DELETING)
_AT_ONCE = 100
_NONE_YET = {"chunks": 0, "alerts": 0, "unclear": 0}


class Shelf(Protocol):
    """What is asked of `RecordingStore`."""

    async def get(self, recording_id: str, *, tenant: str) -> Recording: ...
    async def last_chunk(self, recording_id: str) -> RecordedChunk | None: ...
    async def chunk(self, recording_id: str, number: int) -> RecordedChunk: ...
    async def chunks(
        self,
        recording_id: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[RecordedChunk]: ...


class WatchWrites(Writes, Protocol):
    async def submit(self, new: NewJob) -> Job: ...


class WatchHeld(Protocol):
    """What is asked of a `jobs.Claim`."""

    @property
    def job(self) -> Job: ...
    async def last_checkpoint(self, steps: str) -> Mapping[str, Any] | None: ...
    def transaction(self) -> AbstractAsyncContextManager[WatchWrites]: ...


class WatchHandler:
    """Params: `question`: such as "Is somebody at the door?"; `here`: other words for what is asked besides;
    `webhook_url` and `secret`; the window: absent, it begins with the next chunk, and it ends with the recording.

    Events: `begin`, `verdict` for each chunk, `alert` for each yes, with the id of its call. Result: `chunks`,
    `alerts`, `unclear`: how many. `poll_s`: between looks for new chunks.
    """

    def __init__(
        self, caller: Caller, shelf: Shelf, sender: WebhookSender, seal: Seal | None = None, *, poll_s: float = 1.0
    ) -> None:
        self._seal = seal or Seal()
        self._caller = caller
        self._shelf = shelf
        self._sender = sender
        self._poll_s = poll_s

    async def __call__(self, claim: WatchHeld) -> Mapping[str, Any]:
        job = claim.job
        assert job.recording_id is not None, "a job about a recording"
        question = f"{text_param(job.params, 'question')}\n{text_param(job.params, 'here', IS_IT_SO)}"
        webhook = Webhook.of(job.params, self._seal)
        if webhook is not None:
            self._sender.check(webhook.url)
        window = window_of(job)
        begin = await claim.last_checkpoint("begin") or await self._begin(claim, window)
        last = await claim.last_checkpoint("chunk/")  # a camera's year has a million
        after = begin["after"] if last is None else last["chunk"]
        before = None if last is None else await self._shelf.chunk(job.recording_id, after)
        while True:
            is_over = (await self._shelf.get(job.recording_id, tenant=job.tenant)).state in _OVER  # before its chunks
            chunks = await self._shelf.chunks(job.recording_id, after=after, limit=_AT_ONCE)
            if not chunks:
                if is_over:
                    return _so_far(last)
                await asyncio.sleep(self._poll_s)
                continue
            recording = await self._shelf.get(job.recording_id, tenant=job.tenant)  # its capture time came before them
            start_s, end_s = _bounds(window, recording)
            for chunk in chunks:
                if end_s is not None and chunk.start_s >= end_s:
                    return _so_far(last)
                if start_s is None or chunk.end_s > start_s:
                    like = None if before is None or last is None else only_ref(before)
                    piece = piece_of(chunk, chunk.start_s, chunk.end_s, like)
                    last = await self._look(claim, recording, piece, question, webhook, last)
                after, before = chunk.number, chunk

    async def _begin(self, claim: WatchHeld, window: RecordingWindow) -> Mapping[str, Any]:
        """The window as it was asked for: what it is on the recording's clock may be known with the first frame only.
        `after`: number of the last chunk that is not looked at."""
        newest = await self._shelf.last_chunk(window.recording_id)
        after = -1
        if newest is not None:
            after = newest.number
            start_s, _ = _bounds(window, await self._shelf.get(window.recording_id, tenant=claim.job.tenant))
            if start_s is not None:
                first = await self._shelf.chunks(window.recording_id, start_s=start_s, limit=1)
                after = first[0].number - 1 if first else after
        begin = plain({"after": after, **window_params(window)})
        async with claim.transaction() as write:
            if await write.checkpoint("begin", begin):
                await write.event("begin", begin)
        return begin

    async def _look(
        self,
        claim: WatchHeld,
        recording: Recording,
        piece: Piece,
        question: str,
        webhook: Webhook | None,
        last: Mapping[str, Any] | None,
    ) -> Mapping[str, Any]:
        job = claim.job
        said: dict[str, Any] = dict(piece.told())
        if piece.is_unchanged and last is not None and "is_so" in last:
            said |= {"is_so": last["is_so"], "answer": last["answer"], "is_unchanged": True}
        elif piece.has_frames:
            window = piece.window(recording.id)
            answer = (await self._caller.about(job, window, question, max_tokens=ANSWER_TOKENS)).text
            said |= {"is_so": verdict(answer), "answer": answer}
        said = plain(said)
        is_alert = bool(said.get("is_so")) and not said.get("is_unchanged")
        counts = _so_far(last)
        counts["chunks"] += 1
        counts["alerts"] += is_alert
        counts["unclear"] += "is_so" in said and said["is_so"] is None
        looked = {**said, "so_far": counts}
        async with claim.transaction() as write:
            if await write.checkpoint(f"chunk/{piece.number}", looked):
                await write.event("verdict", said)
                if is_alert:
                    await self._alert(write, job, recording, said, webhook)
        return looked

    async def _alert(
        self, write: WatchWrites, job: Job, recording: Recording, said: Mapping[str, Any], webhook: Webhook | None
    ) -> None:
        """One event, and one job that makes the call."""
        alert_id = f"{job.id}.{said['chunk']}"
        at = recording.captured_at
        event = {
            "type": "recording.alert",
            "recording_id": recording.id,
            "job_id": job.id,
            "question": job.params["question"],
            **said,
            "captured": {
                "from": None if at is None else at + said["start_s"],
                "to": None if at is None else at + said["end_s"],
            },
        }
        await write.event("alert", {"id": alert_id, **event})
        if webhook is None:
            return
        try:
            params = deliver_params(webhook, alert_id, event)
        except LimitExceeded:  # a chunk with thousands of gaps: the receiver can ask for it
            params = deliver_params(webhook, alert_id, {**event, "gaps": []})
        await write.submit(
            NewJob(
                kind=JobKind.DELIVER,
                params=params,
                fingerprint=fingerprint(JobKind.DELIVER, params, recording.id),
                recording_id=recording.id,
                idempotency_key=f"deliver:{alert_id}",
                max_attempts=ATTEMPTS,
            )
        )


def _so_far(last: Mapping[str, Any] | None) -> dict[str, int]:
    """How many chunks, alerts and unclear answers there were with this one, the last that was looked at."""
    return dict(_NONE_YET if last is None else last["so_far"])


def _bounds(window: RecordingWindow, recording: Recording) -> tuple[float | None, float | None]:
    """On the recording's clock, which `start_at` may be before. Raises `InvalidRequest` when nobody knows when that
    began."""
    if window.start_at is None and window.end_at is None:
        return window.start_s, window.end_s
    at = recording.captured_at
    if at is None:
        raise InvalidRequest("nobody knows when this recording was captured: give start_s and end_s")
    start_s = window.start_s if window.start_at is None else window.start_at - at
    end_s = window.end_s if window.end_at is None else window.end_at - at
    return start_s, end_s
