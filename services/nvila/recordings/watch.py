"""A standing question on a recording: asked of each new chunk once, each yes an event and a webhook call.

Verdict, event and the job that makes the call are one transaction, so a kill neither loses an alert nor makes two calls
of one; the call itself is made at least once (`webhooks.py`), under an id that stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from nvila.errors import LimitExceeded
from nvila.model.wording import IS_IT_SO
from nvila.recordings.asking import (
    Caller,
    Piece,
    Steps,
    Writes,
    fingerprint,
    only_ref,
    piece_of,
    plain,
    text_param,
    window_of,
)
from nvila.recordings.jobs import NewJob
from nvila.recordings.seal import Seal
from nvila.recordings.types import Job, JobKind, RecordedChunk, Recording, RecordingState
from nvila.recordings.webhooks import ATTEMPTS, Webhook, WebhookSender, deliver_params
from nvila.recordings.when import ANSWER_TOKENS, verdict

_OVER = (RecordingState.COMPLETE, RecordingState.FAILED, RecordingState.DELETING)
_AT_ONCE = 100


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
    async def checkpoints(self) -> Mapping[str, Mapping[str, Any]]: ...
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
        done = dict(await claim.checkpoints())
        steps = Steps(claim, done)
        begin = await steps.once("begin", lambda: self._begin(job), event="begin")
        after, end_s = begin["after"], begin["end_s"]
        counts = {"chunks": 0, "alerts": 0, "unclear": 0}
        for step, said in done.items():
            if step.startswith("chunk/"):
                after = max(after, said["chunk"])
                _count(counts, said)
        before = await self._shelf.chunk(job.recording_id, after) if after >= 0 else None
        last: Mapping[str, Any] | None = done.get(f"chunk/{after}")
        while True:
            recording = await self._shelf.get(job.recording_id, tenant=job.tenant)  # before its chunks
            chunks = await self._shelf.chunks(job.recording_id, after=after, limit=_AT_ONCE)
            for chunk in chunks:
                if end_s is not None and chunk.start_s >= end_s:
                    return counts
                piece = piece_of(
                    chunk, chunk.start_s, chunk.end_s, only_ref(before) if before is not None and last else None
                )
                last = await self._look(claim, recording, piece, question, webhook, last)
                _count(counts, last)
                after, before = chunk.number, chunk
            if not chunks:
                if recording.state in _OVER:
                    return counts
                await asyncio.sleep(self._poll_s)

    async def _begin(self, job: Job) -> Mapping[str, Any]:
        """`after`: number of the last chunk that is not looked at."""
        window = window_of(job)
        recording = await self._shelf.get(window.recording_id, tenant=job.tenant)
        at = recording.captured_at or 0.0
        start_s = window.start_s if window.start_at is None else window.start_at - at
        end_s = window.end_s if window.end_at is None else window.end_at - at
        if start_s is None:
            newest = await self._shelf.last_chunk(window.recording_id)
            return {"after": -1 if newest is None else newest.number, "end_s": end_s}
        first = await self._shelf.chunks(window.recording_id, start_s=start_s, limit=1)
        newest = await self._shelf.last_chunk(window.recording_id) if not first else None
        after = first[0].number - 1 if first else -1 if newest is None else newest.number
        return {"after": after, "end_s": end_s}

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
        async with claim.transaction() as write:
            if await write.checkpoint(f"chunk/{piece.number}", said):
                await write.event("verdict", said)
                if said.get("is_so") and not said.get("is_unchanged"):
                    await self._alert(write, job, recording, said, webhook)
        return said

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


def _count(counts: dict[str, int], said: Mapping[str, Any]) -> None:
    counts["chunks"] += 1
    counts["alerts"] += bool(said.get("is_so")) and not said.get("is_unchanged")
    counts["unclear"] += "is_so" in said and said["is_so"] is None
