"""A question on its way to a streamed answer: the page to read first.

For each media item: open its bytes, plan its frames, cut them into chunks. For each chunk: decode its frames, name it
by its content, look it up in the cache, have vision encode it if nobody has. As soon as every chunk has its name the
decode service is called; it awaits the tokens itself, so its work and the last chunks' encoding overlap.

A recording's window is a media item whose records exist already (`nvila.recordings`); one that is too long for a call
is asked about in parts, each a question of its own, and a last one over what they gave.

The pipeline knows no service, only `ports.py`. Which frames are looked at is decided here, once; tiling is vision's
business and the prompt's layout is decode's.

When parts die (DESIGN §2.3-2.4): tokens that are lost, evicted or could not be published are encoded again and travel
beside the cache; a vision call that fails is repeated; a generation that breaks off goes on where it was
(`generation.py`). What cannot be mended within `recovery_s` ends as a typed error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from nvila.cache.codec import RecordFormat
from nvila.cache.keys import plan_key
from nvila.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    MediaUnavailable,
    NotFound,
    Unavailable,
)
from nvila.gateway.generation import Generation
from nvila.gateway.media import ChunkState, MediaItem, PlanRecord, is_tiled
from nvila.gateway.ports import Decoder, Fetcher, Frames, LocalMedia, Recordings, Store, Vision
from nvila.gateway.recorded import RecordedItem
from nvila.gateway.work import Clock, Patience, first_of, gather, stop
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.model.estimate import MediaCost, RequestCost, request_cost, text_at_most
from nvila.recordings.planner import Budget
from nvila.recordings.questions import (
    PART_POSITIONS,
    closing_question,
    condense,
    map_stretches,
    not_kept,
    the_recording,
    total_coverage,
    total_usage,
)
from nvila.recordings.window import Restored
from nvila.telemetry import names
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Answered,
    AnswerEvent,
    Chunk,
    Coverage,
    EncodeSettings,
    Finished,
    MediaKind,
    MediaSource,
    ModelCard,
    Question,
    TokensRef,
)
from nvila.video.plan import plan_frames

_RESTORED_AT_ONCE = 4
"""Token records of a recording brought back at the same time, by one request."""

Emit = Callable[[AnswerEvent], None]


@dataclass(frozen=True, kw_only=True)
class PipelineLimits:
    """`chunk_frames`: most frames of one vision call, rounded down to a multiple of the model's temporal group.
    `max_frames`: most frames of one video. `recovery_s`: how long a service behind may be away before a request gives
    up on it. `inline_parts`: most parts of a recording's window that one request asks about; more are a job.
    `parts_at_once`: of them."""

    chunk_frames: int = 32
    max_frames: int = 256
    recovery_s: float = 20.0
    inline_parts: int = 16
    parts_at_once: int = 2


@dataclass(kw_only=True)
class Pipeline:
    """One for all requests. `model`: what is served, None until the decode service has described itself;
    `is_doubtful`: a service behind was away since. `recordings`: None where none are kept."""

    fetcher: Fetcher
    frames: Frames
    store: Store
    vision: Vision
    decoder: Decoder
    limits: PipelineLimits
    metrics: Metrics
    model: ModelCard | None = None
    is_doubtful: bool = False
    recordings: Recordings | None = None

    async def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """The answer, piece by piece, then one `Answered`. Closing this iterator stops all work behind it.

        The work runs in a task of its own, so that its spans, time limit and clean-up are plain `with` blocks however
        the caller iterates. Raises an `NvilaError` when there is no answer.
        """
        events: asyncio.Queue[AnswerEvent | None] = asyncio.Queue()
        work = asyncio.create_task(self._work(question, events.put_nowait))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            if work.cancelled():
                raise Cancelled("the request was cancelled")
            await work
        finally:
            await stop(work)

    async def _work(self, question: Question, emit: Emit) -> None:
        async with self._one(question) as one:
            emit(await one.follow(emit))

    async def estimate(self, question: Question) -> RequestCost:
        """What the answer would cost, from headers alone: media are fetched and looked into, no pixel is decoded."""
        async with self._one(question) as one:
            return await one.estimate()

    @asynccontextmanager
    async def _one(self, question: Question) -> AsyncGenerator[OneAnswer, None]:
        """A question's way, within its time; of several failures the one that matters comes out."""
        try:
            async with asyncio.timeout(question.deadline.left_s()), AsyncExitStack() as files:
                yield OneAnswer(self, question, await self.describe(), files)
        except TimeoutError:
            raise DeadlineExceeded("the request's time is up") from None
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    async def describe(self) -> ModelCard:
        """What is served. Asked of the decode service once, and again after a service behind was away; while nobody
        answers, what was served last: the request has the patience to wait until it is served again."""
        if self.model is None or self.is_doubtful:
            try:
                self.model = await self.decoder.describe()
                self.is_doubtful = False
            except Unavailable:
                if self.model is None:
                    raise
        return self.model

    def check_budgets(self) -> list[str]:
        """Reasons why the largest video that is allowed would not fit; empty when all is well (ANCHORS P9)."""
        if self.model is None:
            return ["the decode service has not described its model yet"]
        config = NvilaConfig.from_json(self.model.config_json)
        frames = min(self.limits.max_frames, config.max_frames) // config.temporal_group * config.temporal_group
        levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=frames, pool_sizes=config.pool_sizes)
        positions = cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels)
        if positions >= self.model.max_model_len:
            return [f"{frames} frames make {positions:,} tokens, the language model takes {self.model.max_model_len:,}"]
        return []


class OneAnswer:
    """One question's way through the services."""

    def __init__(self, services: Pipeline, question: Question, card: ModelCard, files: AsyncExitStack) -> None:
        self._services = services
        self._question = question
        self._card = card
        self._files = files
        self._config = NvilaConfig.from_json(card.config_json)
        self._form = RecordFormat(
            width=self._config.llm_width, dtype=card.token_dtype, vision_revision=card.vision_revision
        )
        self._clock = Clock(services.metrics)
        self._items: list[MediaItem | RecordedItem] = []

    async def follow(self, emit: Emit) -> Answered:
        with self._clock.stage("plan"):
            self._items = await self._plan_all()
        self._check_size()
        if any(item.window.is_in_parts for item in self._recorded):
            return await self._in_parts(emit)
        async with asyncio.TaskGroup() as tasks:
            encoding = tasks.create_task(self._encode_all())
            for item in self._files_items:
                await item.all_named()
            generation = Generation(self._services.decoder, self._question, self._card, self._items, emit)
            finished = await self._generate(generation, encoding)
        for item in self._files_items:
            if item.is_published():
                await self._services.store.remember(item.plan_key, PlanRecord.of(item).to_bytes())
        return self._sum_up(finished)

    @property
    def _files_items(self) -> list[MediaItem]:
        return [item for item in self._items if isinstance(item, MediaItem)]

    @property
    def _recorded(self) -> list[RecordedItem]:
        return [item for item in self._items if isinstance(item, RecordedItem)]

    # -- planning: everything that can be known before any pixel is decoded

    async def _plan_all(self) -> list[MediaItem | RecordedItem]:
        """Files first: recordings' windows are fitted into the room that they leave."""
        files = iter(await self._plan_files())
        planned = [None if source.recording is not None else next(files) for source in self._question.media]
        others = sum(item.cost(self._config, self._card.token_dtype).positions for item in planned if item is not None)
        windows = [source for source in self._question.media if source.recording is not None]
        opened = iter(await gather(self._open_window(source, others, len(windows)) for source in windows))
        return [next(opened) if item is None else item for item in planned]

    async def _open_window(self, source: MediaSource, others: int, windows: int) -> RecordedItem:
        """`others`: positions of the question's files. Several windows share what they leave."""
        assert source.recording is not None
        question, longest = self._question, self._card.max_model_len
        budget = Budget.of(
            self._config,
            longest=longest,
            text=text_at_most(question.messages),
            answer=question.sampling.max_tokens,
            others=others,
        )
        budget = replace(budget, positions=budget.positions // windows, part_text=PART_POSITIONS)
        with _blaming(source):
            if self._services.recordings is None:
                raise InvalidRequest("no recordings are kept here")
            window = await self._services.recordings.open(source.recording, question.tenant, budget, self._config)
            return RecordedItem(source=source, window=window.served_by(self._config, self._form))

    async def _plan_files(self) -> list[MediaItem]:
        sources = [source for source in self._question.media if source.recording is None]
        opened = await gather(self._fetch(source) for source in sources)
        kinds = [source.kind for source in self._question.media]
        return await gather(
            self._plan(source, file, is_tiled(source.kind, kinds, self._config.image_mode))
            for source, file in zip(sources, opened, strict=True)
        )

    async def _fetch(self, source: MediaSource) -> LocalMedia:
        with self._clock.stage("fetch"), _blaming(source):
            file = self._services.fetcher.open(source, self._question.tenant, self._question.deadline)
            return await self._files.enter_async_context(file)

    async def _plan(self, source: MediaSource, file: LocalMedia, tiled: bool) -> MediaItem:
        services, limits = self._services, self._services.limits
        is_video = source.kind is MediaKind.VIDEO
        settings = EncodeSettings(
            kind=source.kind,
            is_tiled=tiled,
            pool_sizes=self._config.pool_sizes if is_video else (),
            token_dtype=self._card.token_dtype,
            vision_revision=self._card.vision_revision,
        )
        name = plan_key(file.digest, source.sampling, limits.chunk_frames, settings, self._question.tenant)
        remembered = PlanRecord.from_bytes(await services.store.recall(name))
        if remembered is not None:
            item = remembered.item(source, file, settings, name)
            await self._reuse(item)
            return item
        with _blaming(source):
            info = await services.frames.probe(file.path, source.kind, self._question.deadline)
            plan = plan_frames(
                source.sampling,
                info,
                default_frames=self._config.default_frames,
                max_frames=min(self._config.max_frames, limits.max_frames),
                group=self._config.temporal_group if is_video else 1,
                chunk_frames=limits.chunk_frames,
            )
        times_s = info.times_s()
        return MediaItem(
            source=source,
            file=file,
            settings=settings,
            plan_key=name,
            frames_asked=plan.frames_asked,
            width_px=info.width_px,
            height_px=info.height_px,
            chunks=[ChunkState(run=run, expected_s=tuple(times_s[list(run.indices)].tolist())) for run in plan.runs],
            gaps=plan.gaps,
        )

    async def _reuse(self, item: MediaItem) -> None:
        """The file was asked about in the same way before: chunks whose tokens are still there need no decoding."""
        there = await self._services.store.has(item.refs(), self._form)
        for chunk in item.chunks:
            assert chunk.facts is not None, "a remembered chunk has facts"
            if chunk.facts.ref is None or chunk.facts.ref.key in there:
                chunk.is_reused = chunk.facts.ref is not None
                chunk.is_named.set()
            else:
                chunk.facts = None

    async def estimate(self) -> RequestCost:
        with self._clock.stage("plan"):
            self._items = await self._plan_all()
        return self._cost()

    def _check_size(self) -> None:
        """Refuse what cannot fit before any pixel is decoded. The decode service checks exactly, with the text."""
        excess = self._cost().excess
        if excess is not None:
            raise LimitExceeded(excess, param="messages")

    def _cost(self) -> RequestCost:
        return request_cost(
            self._config,
            [self._cost_of(item) for item in self._items],
            self._question.messages,
            answer_tokens=self._question.sampling.max_tokens,
            longest=self._card.max_model_len,
            dtype=self._card.token_dtype,
        )

    def _cost_of(self, item: MediaItem | RecordedItem) -> MediaCost:
        with _blaming(item.source):
            return item.cost(self._config, self._card.token_dtype)

    # -- encoding: chunk -> frames -> name -> cache -> vision

    async def _encode_all(self, lost: Collection[str] | None = None) -> None:
        """See that all chunks' tokens are in the cache; or, given keys that it did not keep, in hand."""
        await gather(
            self._encode(item, chunk, again=lost is not None)
            for item in self._files_items
            for chunk in item.chunks
            if (chunk.facts is None if lost is None else chunk.is_lost(lost))
        )
        for item in self._recorded:
            await self._restore(item, lost)

    async def _encode(self, item: MediaItem, chunk: ChunkState, *, again: bool) -> None:
        deadline = self._question.deadline
        kind = item.source.kind
        group = self._config.temporal_group if kind is MediaKind.VIDEO else 1
        takes_whole = kind is MediaKind.IMAGE and (item.settings.is_tiled or self._config.image_mode == "pad")
        size_px = None if takes_whole else self._config.tile_px
        async with AsyncExitStack() as held:
            with self._clock.stage("video", nvila__media__kind=kind) as current, _blaming(item.source):
                decoding = self._services.frames.decode(item.file.path, kind, chunk.run, size_px, group, deadline)
                decoded = await held.enter_async_context(decoding)
                current.set_attribute(names.ATTR_FRAMES_DECODED, len(decoded.times_s))
                current.set_attribute(names.ATTR_FRAMES_DROPPED, len(decoded.missing))
            ref = item.name(chunk, decoded, self._config, self._question.tenant)
            if ref is None:
                return
            if not again:
                with self._clock.stage("cache") as current:
                    lease = await held.enter_async_context(self._services.store.lease(ref, self._form, deadline))
                    current.set_attribute(names.ATTR_CACHE_HIT, not lease.must_encode)
                if not lease.must_encode:
                    chunk.is_reused = True
                    return
            await self._have_encoded(item, chunk, decoded, ref, want_inline=again)

    async def _restore(self, item: RecordedItem, lost: Collection[str] | None) -> None:
        """Bring back those of a recording's records that the cache does not have (or, given keys, did not keep)."""
        assert self._services.recordings is not None, "a window was opened"
        refs = {ref.key: ref for ref in item.refs()}
        if lost is None:
            lost = refs.keys() - await self._services.store.has(refs.values(), self._form)
            is_wanted = False
        else:
            is_wanted = True
        turns = asyncio.Semaphore(_RESTORED_AT_ONCE)

        async def bring_back(ref: TokensRef) -> None:
            async with turns:
                with self._clock.stage("restore"), _blaming(item.source):
                    restored = await self._restored(item, ref)
                item.take(restored, is_wanted=is_wanted)

        await gather(bring_back(ref) for key, ref in refs.items() if key in lost and key not in item.in_hand)

    async def _restored(self, item: RecordedItem, ref: TokensRef) -> Restored:
        assert self._services.recordings is not None, "a window was opened"
        patience = Patience("vision", self._services.limits.recovery_s, self._services.metrics)
        while True:
            try:
                return await self._services.recordings.restore(
                    item.window, ref, self._form, self._config, self._question.deadline
                )
            except Unavailable as error:
                self._services.is_doubtful = True
                await patience.wait(error)

    async def _have_encoded(
        self, item: MediaItem, chunk: ChunkState, decoded: Chunk, ref: TokensRef, *, want_inline: bool
    ) -> None:
        vision, deadline = self._services.vision, self._question.deadline
        patience = Patience("vision", self._services.limits.recovery_s, self._services.metrics)
        while True:
            try:
                with self._clock.stage("vision", nvila__chunk__frames=len(decoded.frames_FHWC)) as current:
                    encoded = await vision.encode(
                        decoded, ref, item.settings, want_inline=want_inline, deadline=deadline
                    )
                    current.set_attribute(names.ATTR_TILES, encoded.tiles)
                break
            except Unavailable as error:
                self._services.is_doubtful = True
                await patience.wait(error)
        self._clock.add_parts("vision", encoded.stage_ms)
        chunk.is_reused = False
        chunk.encoded_frames += len(decoded.times_s)
        chunk.tiles += encoded.tiles
        chunk.inline = encoded.inline

    # -- decoding

    async def _generate(self, generation: Generation, encoding: asyncio.Task[None]) -> Finished:
        """Generate until it ends well, mending what breaks on the way."""
        patience = Patience("decode", self._services.limits.recovery_s, self._services.metrics)
        while True:
            said = len(generation.token_ids)
            try:
                with self._clock.stage("decode"):
                    outcome = await generation.attempt(encoding)
            except Unavailable as error:
                self._services.is_doubtful = True
                if len(generation.token_ids) > said:
                    patience.renew()
                await patience.wait(error)
                continue
            if isinstance(outcome, Finished):
                if generation.first_at is not None:
                    self._clock.mark("first_token", generation.first_at)
                return outcome
            self._services.metrics.add(names.RECOVERIES, cause="tokens_missing")
            await encoding
            await self._encode_all(lost=outcome.keys)

    # -- windows that are too long for one call

    async def _in_parts(self, emit: Emit) -> Answered:
        """Ask about each part of the one long window, then about what they gave; only that is emitted."""
        question, limits = self._question, self._services.limits
        flags = [isinstance(item, RecordedItem) and item.window.is_in_parts for item in self._items]
        place = the_recording(question.media, flags)
        item = self._items[place]
        assert isinstance(item, RecordedItem)
        parts = item.window.parts()
        if len(parts) > limits.inline_parts:
            raise LimitExceeded(
                f"parts of the recording's window: {len(parts):,} needed, at most {limits.inline_parts:,} allowed in "
                "one request; ask about a shorter window, or submit the question as a job (kind ask)",
                param=item.source.param,
            )
        kept = _Kept(self._services)
        with self._clock.stage("parts"):
            notes = await map_stretches(
                question, place, parts, kept, once=not_kept, at_once=limits.parts_at_once, after_each=self._on_time()
            )
            notes = await condense(question, place, notes, kept, self._card.max_model_len, once=not_kept)
        ending: Answered | None = None
        async with aclosing(kept.answer(closing_question(question, place, notes))) as events:
            async for event in events:
                if isinstance(event, Answered):
                    ending = event
                else:
                    emit(event)
        assert ending is not None, "an answer ends with `Answered` or an error"
        coverages = [one.coverage for one in kept.answers]
        total = total_coverage(item.window, coverages[:-1], coverages[-1], len(question.media), place)
        return Answered(
            reason=ending.reason,
            usage=total_usage([one.usage for one in kept.answers]),
            completion_tokens=sum(one.completion_tokens for one in kept.answers),
            coverage=replace(total, stage_ms={**total.stage_ms, **self._clock.summary()}),
        )

    def _on_time(self) -> Callable[[int, int], None]:
        """Gives up after the first parts when, at their pace, the request's time would not do for all and the end."""
        began = time.monotonic()

        def check(done: int, of: int) -> None:
            if done < self._services.limits.parts_at_once:
                return
            needed_s = (time.monotonic() - began) / done * (of - done + 1)
            left_s = self._question.deadline.left_s()
            if needed_s > left_s:
                raise DeadlineExceeded(
                    f"the recording's window needs {of + 1} model calls, about {needed_s:.0f} s more, and "
                    f"{left_s:.0f} s are left; allow more time, or submit the question as a job (kind ask)"
                )

        return check

    # -- the account

    def _sum_up(self, finished: Finished) -> Answered:
        self._clock.add_parts("decode", finished.stage_ms)
        media = tuple(item.coverage(self._config) for item in self._items)
        metrics, usage = self._services.metrics, finished.prompt
        for fate in ("decoded", "encoded", "reused", "dropped"):
            metrics.add(names.FRAMES, sum(getattr(one, f"frames_{fate}") for one in media), fate=fate)
        counts = {"text": usage.text, "image": usage.image, "video": usage.video, "cached": usage.cached}
        for kind, tokens in {**counts, "completion": finished.completion_tokens}.items():
            metrics.add(names.TOKENS, tokens, kind=kind)
        return Answered(
            reason=finished.reason,
            usage=usage,
            completion_tokens=finished.completion_tokens,
            coverage=Coverage(media=media, stage_ms=self._clock.summary()),
        )


class _Kept:
    """Answers with the pipeline, and keeps how each answer ended."""

    def __init__(self, services: Pipeline) -> None:
        self._services = services
        self.answers: list[Answered] = []

    async def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        async with aclosing(self._services.answer(question)) as events:
            async for event in events:
                if isinstance(event, Answered):
                    self.answers.append(event)
                yield event

    async def describe(self) -> ModelCard:
        return await self._services.describe()


@contextmanager
def _blaming(source: MediaSource) -> Iterator[None]:
    """What is wrong with one of several media items names the part of the request that brought it."""
    try:
        yield
    except (InvalidRequest, NotFound, MediaUnavailable) as error:
        error.param = source.param or error.param
        raise
