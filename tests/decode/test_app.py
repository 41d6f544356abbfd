"""The real application: Ray Serve, vLLM and Redis, compared with the plain engine in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvila.cache.codec import RecordFormat, pack
from nvila.cache.store import TokenStore
from nvila.decode.build import Decode
from nvila.decode.client import DecodeClient
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NvilaError, Overloaded, Unavailable
from nvila.telemetry.metrics import Metrics
from nvila.types import Accepted, GenerateRequest, SamplingParams, TextDelta, TokensMissing
from tests.cache.redis_server import RedisServer
from tests.decode.app_process import DecodeApp
from tests.decode.conftest import MAX_MODEL_LEN
from tests.decode.questions import Answer, answer, request, tokens_of, video
from tests.otlp import OtlpReceiver

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)
TOKEN_WAIT_S = 3.0
MAX_ONGOING, MAX_QUEUED = 10, 8  # requests on their way to a replica count as queued


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
async def app(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, redis: RedisServer, receiver: OtlpReceiver
) -> AsyncIterator[DecodeApp]:
    running = DecodeApp(
        tmp_path_factory.mktemp("decode"),
        model_folder,
        receiver.environment,
        engine="vllm",
        redis_url=redis.url,
        max_model_len=MAX_MODEL_LEN,
        token_wait_s=TOKEN_WAIT_S,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        prefill_step_tokens=64,
    )
    await running.wait_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
async def client(app: DecodeApp) -> AsyncIterator[DecodeClient]:
    opened = DecodeClient(app.target)
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def store(redis: RedisServer) -> AsyncIterator[TokenStore]:
    opened = TokenStore.open(redis.url, Metrics(), ttl_s=60)
    yield opened
    await opened.close()


def about(decode: Decode, question: GenerateRequest) -> GenerateRequest:
    return replace(question, vision_revision=decode.card.vision_revision)


async def expected(decode: Decode, question: GenerateRequest) -> Answer:
    return await answer(decode.service.generate(question))


async def until(app: DecodeApp, seconds: float, name: str, value: float, **labels: str) -> float:
    """Seconds until the metric, over all replicas, has at least or (for 0) exactly this value."""
    started = time.monotonic()
    while True:
        total = sum(app.metric(name, **labels).values())
        if total == value or (value and total > value):
            return time.monotonic() - started
        assert time.monotonic() - started < seconds, f"{name} is {total} after {seconds} s, expected {value}"
        await asyncio.sleep(0.1)


async def test_it_describes_the_model_it_serves(client: DecodeClient, decode: Decode) -> None:
    card = await client.describe()
    assert card.engine.startswith("vllm ")
    assert replace(card, engine="") == replace(decode.card, engine="")
    assert await client.ready()


async def test_a_text_is_where_the_reference_puts_it(client: DecodeClient, decode: Decode) -> None:
    vector_D = await client.embed("a red car at the gate")
    np.testing.assert_array_equal(vector_D, await decode.service.embed("a red car at the gate"))
    with pytest.raises(InvalidRequest, match="an empty text"):
        await client.embed("")


async def test_text_gives_the_reference_s_greedy_ids(client: DecodeClient, decode: Decode) -> None:
    question = request(sampling=SamplingParams(max_tokens=40))
    got, want = await answer(client.generate(question)), await expected(decode, question)
    assert (got.ids, got.text, got.finished.reason) == (want.ids, want.text, want.finished.reason)
    assert isinstance(got.events[0], Accepted)


async def test_visual_tokens_from_the_cache_and_beside_it_give_the_reference_s_ids(
    client: DecodeClient, decode: Decode, store: TokenStore
) -> None:
    film = video("cached", chunks=3, frames=5)
    tokens = tokens_of(film, decode.form, seed=1)
    for record in tokens[1:]:
        assert await store.put(pack(record))
    question = about(decode, request(media=[film], inline=tokens[:1], sampling=SamplingParams(max_tokens=24)))
    want = await expected(decode, replace(question, inline=tokens))
    got = await answer(client.generate(question))
    assert got.ids == want.ids
    assert replace(got.finished.prompt, cached=0) == want.finished.prompt


async def test_a_second_question_about_the_same_media_finds_its_prefix_computed(
    client: DecodeClient, decode: Decode
) -> None:
    film = video("again", chunks=2, frames=8)
    tokens = tokens_of(film, decode.form, seed=2)
    ask = [about(decode, request(text, media=[film], inline=tokens)) for text in ("What happens?", "And then what?")]
    first, second = [await answer(client.generate(question)) for question in ask]
    assert first.finished.prompt.cached < 32  # the template before the video is everybody's
    assert second.finished.prompt.cached >= second.finished.prompt.video - 32
    assert second.ids == (await expected(decode, ask[1])).ids


async def test_tenants_share_no_prefix(client: DecodeClient, decode: Decode) -> None:
    film = video("private", chunks=2, frames=8)
    question = about(decode, request(media=[film], inline=tokens_of(film, decode.form, seed=3), cache_salt="one"))
    await answer(client.generate(question))
    other = await answer(client.generate(replace(question, cache_salt="two", request_id="other-tenant")))
    assert other.finished.prompt.cached == 0


async def test_tokens_that_do_not_come_are_named(client: DecodeClient, decode: Decode) -> None:
    film = video("nowhere")
    started = time.monotonic()
    got = await answer(client.generate(about(decode, request(media=[film]))))
    assert got.events[-1] == TokensMissing(tuple(ref.key for ref in film.records))
    assert time.monotonic() - started < TOKEN_WAIT_S + 10


async def test_tokens_that_come_late_are_waited_for_and_their_beginning_is_prefilled(
    client: DecodeClient, decode: Decode, store: TokenStore
) -> None:
    film = video("late", chunks=3, frames=8)
    tokens = tokens_of(film, decode.form, seed=4)
    question = about(decode, request(media=[film]))
    reading = asyncio.create_task(answer(client.generate(question)))
    for record in tokens:
        await asyncio.sleep(0.4)  # the pace of encoding, not a wait for something
        assert await store.put(pack(record))
    got = await reading
    assert got.ids == (await expected(decode, replace(question, inline=tokens))).ids
    assert got.finished.prompt.cached > film.records[0].tokens


async def test_inline_tokens_of_another_width_are_refused(client: DecodeClient, decode: Decode) -> None:
    film = video("narrow")
    narrow = RecordFormat(width=8, dtype=decode.form.dtype, vision_revision=decode.form.vision_revision)
    with pytest.raises(InvalidRequest, match="width: expected 256, the record has 8"):
        await answer(client.generate(about(decode, request(media=[film], inline=tokens_of(film, narrow)))))


async def test_inline_tokens_that_are_not_finite_are_refused(client: DecodeClient, decode: Decode) -> None:
    film = video("infinite")
    tokens = tokens_of(film, decode.form)
    tokens[0].values_TD[2, 2] = float("nan")
    with pytest.raises(InvalidRequest, match="not finite"):
        await answer(client.generate(about(decode, request(media=[film], inline=tokens))))


async def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client: DecodeClient) -> None:
    with pytest.raises(LimitExceeded, match=r"prompt tokens: \d,\d{3} asked, at most 4,095 allowed"):
        await answer(client.generate(request("word " * 3000)))


async def test_the_service_lives_on_after_every_extreme_of_sampling(client: DecodeClient) -> None:
    extremes = [
        SamplingParams(max_tokens=3, temperature=2, top_p=1e-6, top_k=(1 << 31) - 1, min_p=1, seed=(1 << 64) - 1),
        SamplingParams(max_tokens=3, temperature=1e-6, top_k=1, seed=0),
        SamplingParams(max_tokens=MAX_MODEL_LEN * 2, temperature=1, stop=(" ",)),
    ]
    for sampling in extremes:
        assert (await answer(client.generate(request(sampling=sampling)))).finished
    with pytest.raises(InvalidRequest, match="temperature"):
        await answer(client.generate(request(sampling=SamplingParams(max_tokens=3, temperature=float("nan")))))


async def test_a_begun_answer_goes_on_with_the_same_ids(client: DecodeClient, decode: Decode) -> None:
    film = video("resumed")
    question = about(decode, request(media=[film], inline=tokens_of(film, decode.form, seed=5)))
    whole = await answer(client.generate(question))
    rest = await answer(client.generate(replace(question, resume_ids=whole.ids[:5], request_id="resumed")))
    assert whole.ids[:5] + rest.ids == whole.ids
    assert whole.text.endswith(rest.text)


async def test_the_deadline_ends_an_answer(client: DecodeClient) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await answer(client.generate(request(sampling=ENDLESS, timeout_s=1)))
    assert time.monotonic() - started < 10


async def test_a_client_that_leaves_frees_the_engine_within_two_seconds(app: DecodeApp, client: DecodeClient) -> None:
    times = 12
    before = sum(app.metric("nvila_decode_requests_total", outcome="cancelled").values())
    for number in range(times):  # at different moments: while a message is sent, and while the next is awaited
        async with aclosing(client.generate(request(sampling=ENDLESS))) as events:
            heard = 0
            async for event in events:
                heard += isinstance(event, TextDelta)
                if heard > number:
                    break
    page_lag_s = 1.5
    await until(app, 2 + page_lag_s, "nvila_decode_requests_total", before + times, outcome="cancelled")
    await until(app, 2 + page_lag_s, "vllm:num_requests_running", 0)
    await until(app, 2 + page_lag_s, "vllm:kv_cache_usage_perc", 0)


async def test_many_at_once_get_what_each_would_get_alone(client: DecodeClient, decode: Decode) -> None:
    questions = [request(f"Question {n}?", sampling=SamplingParams(max_tokens=30)) for n in range(8)]
    got = await asyncio.gather(*(answer(client.generate(question)) for question in questions))
    want = [await expected(decode, question) for question in questions]
    assert [one.ids for one in got] == [one.ids for one in want]


async def test_what_is_too_much_is_refused_as_overload(client: DecodeClient) -> None:
    async def outcome() -> type[NvilaError] | None:
        try:
            sampling = SamplingParams(max_tokens=600, ignore_eos=True)
            await answer(client.generate(request(sampling=sampling, timeout_s=240)))
        except NvilaError as error:
            return type(error)
        return None

    outcomes = await asyncio.gather(*(outcome() for _ in range(3 * (MAX_ONGOING + MAX_QUEUED))))
    assert set(outcomes) == {None, Overloaded}
    assert outcomes.count(None) >= MAX_ONGOING


async def test_the_whole_generation_is_in_the_caller_s_trace(client: DecodeClient, receiver: OtlpReceiver) -> None:
    trace_id, caller = "0123456789abcdef0123456789abcdef", "00f067aa0ba902b7"
    await answer(client.generate(request(traceparent=f"00-{trace_id}-{caller}-01")))
    wanted = {"decode", "fetch tokens", "prompt", "generate", "llm_request"}
    give_up = time.monotonic() + 30
    while True:
        spans = {span.name: span for span in receiver.trace(trace_id)}
        if spans.keys() >= wanted:
            break
        assert time.monotonic() < give_up, f"only {sorted(spans)} came"
        await asyncio.sleep(0.1)
    assert spans["decode"].parent_id == caller
    assert {spans[name].parent_id for name in ("fetch tokens", "prompt", "generate")} == {spans["decode"].span_id}
    assert spans["llm_request"].parent_id == spans["generate"].span_id
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 12
    assert {span.service for span in spans.values()} == {"nvila-decode"}


async def test_metrics_of_ours_and_of_vllm_are_on_one_page(app: DecodeApp) -> None:
    page = app.metrics()
    for name in ("nvila_decode_requests_total", "nvila_decode_tokens_total", "vllm:prefix_cache_hits_total"):
        assert f"\n{name}{{" in page
    assert sum(app.metric("nvila_decode_pending_tokens").values()) == 0


async def test_a_killed_replica_breaks_off_and_another_takes_over(
    app: DecodeApp, client: DecodeClient, decode: Decode
) -> None:
    question = request(sampling=SamplingParams(max_tokens=3000, ignore_eos=True))
    (replica,) = app.replicas()
    (engine,) = app.engines()
    ids: list[int] = []

    async def read_and_kill() -> None:
        async for event in client.generate(question):
            if isinstance(event, TextDelta):
                ids.extend(event.token_ids)
                if len(ids) >= 20 and replica.is_running():
                    replica.kill()

    with pytest.raises(Unavailable):
        await read_and_kill()
    give_up = time.monotonic() + 90
    goes_on = replace(question, resume_ids=tuple(ids[:20]), sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    while True:
        assert time.monotonic() < give_up, "no replica took over"
        try:
            rest = await answer(client.generate(replace(goes_on, deadline=request().deadline)))
            break
        except Unavailable:
            await asyncio.sleep(1)
    whole = await expected(decode, replace(question, sampling=SamplingParams(max_tokens=30, ignore_eos=True)))
    assert tuple(ids[:20]) + rest.ids == whole.ids
    assert not engine.is_running()
