from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from nvila.cache.codec import RecordFormat
from nvila.decode.prompt import MissingTokens, PromptBuilder, PromptLimits
from nvila.errors import InvalidRequest, LimitExceeded, Unavailable
from nvila.model.checkpoint import Checkpoint
from nvila.types import Deadline, GenerateRequest, Level, PromptMedia, TokenDtype, TokensRef, VisualTokens
from tests.decode.questions import request, tokens_of, video

REVISION = "weights"
FILM = video("film", chunks=3)


class FakeTokens:
    """A cache in which records appear when the test says so."""

    def __init__(self, *tokens: VisualTokens) -> None:
        self.held = {record.ref.key: record for record in tokens}
        self.unusable: set[str] = set()
        self.changed = asyncio.Event()
        self.waits = 0

    def put(self, record: VisualTokens) -> None:
        self.held[record.ref.key] = record
        self.changed.set()

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]:
        return {ref.key for ref in refs if ref.key in self.held}

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        return {ref.key: self.held[ref.key] for ref in refs if ref.key not in self.unusable}

    async def await_tokens(self, refs: Iterable[TokensRef], form: RecordFormat, deadline: Deadline) -> set[str]:
        wanted = {ref.key for ref in refs}
        while missing := wanted - self.held.keys():
            self.waits += 1
            self.changed.clear()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline.left_s()):
                    await self.changed.wait()
            except TimeoutError:
                return missing
        return set()


@pytest.fixture
def form(checkpoint: Checkpoint) -> RecordFormat:
    return RecordFormat(width=checkpoint.config.llm_width, dtype=TokenDtype.FLOAT32, vision_revision=REVISION)


def builder(
    checkpoint: Checkpoint, form: RecordFormat, tokens: FakeTokens | None = None, *, step: int = 0, wait_s: float = 5
) -> PromptBuilder:
    limits = PromptLimits(max_model_len=1024, token_wait_s=wait_s, prefill_step=step)
    return PromptBuilder(checkpoint, torch.float32, form, tokens, limits)


def ask(media: Iterable[PromptMedia] = (FILM,), **fields: object) -> GenerateRequest:
    return replace(request(media=media, vision_revision=REVISION), **fields)  # type: ignore[arg-type]


async def test_records_from_the_cache_and_beside_it_make_the_same_prompt(
    checkpoint: Checkpoint, form: RecordFormat
) -> None:
    tokens = tokens_of(FILM, form)
    embeds = []
    for held, inline in ((tokens, ()), ((), tokens), (tokens[1:], tokens[:1])):
        prompts = builder(checkpoint, form, FakeTokens(*held))
        question = ask(inline=inline)
        layout = prompts.lay_out(question)
        embeds.append(prompts.splice(layout, await prompts.fetch(question, layout, None), ()))
    assert len(embeds[0]) == layout.usage.total
    assert layout.usage.video == sum(ref.tokens + 4 for ref in FILM.records)  # an end embedding after each frame
    assert torch.equal(embeds[0], embeds[1])
    assert torch.equal(embeds[0], embeds[2])


async def test_ids_of_a_begun_answer_follow_the_prompt(checkpoint: Checkpoint, form: RecordFormat) -> None:
    prompts = builder(checkpoint, form)
    layout = prompts.lay_out(ask(()))
    embeds = prompts.splice(layout, {}, (5, 6))
    assert torch.equal(embeds[-2:], checkpoint.embedding_rows([5, 6]).float())
    assert len(embeds) == layout.usage.total + 2


async def test_records_that_do_not_come_in_time_are_named(checkpoint: Checkpoint, form: RecordFormat) -> None:
    tokens = tokens_of(FILM, form)
    prompts = builder(checkpoint, form, FakeTokens(tokens[1]), wait_s=0.05)
    question = ask()
    with pytest.raises(MissingTokens) as caught:
        await prompts.fetch(question, prompts.lay_out(question), None)
    assert caught.value.keys == (FILM.records[0].key, FILM.records[2].key)


async def test_records_that_cannot_be_used_are_missing(checkpoint: Checkpoint, form: RecordFormat) -> None:
    cache = FakeTokens(*tokens_of(FILM, form))
    cache.unusable = {FILM.records[1].key}
    prompts = builder(checkpoint, form, cache)
    question = ask()
    with pytest.raises(MissingTokens) as caught:
        await prompts.fetch(question, prompts.lay_out(question), None)
    assert caught.value.keys == (FILM.records[1].key,)


async def test_without_a_cache_what_is_not_inline_is_missing(checkpoint: Checkpoint, form: RecordFormat) -> None:
    prompts = builder(checkpoint, form)
    question = ask(inline=tokens_of(FILM, form)[:2])
    with pytest.raises(MissingTokens) as caught:
        await prompts.fetch(question, prompts.lay_out(question), None)
    assert caught.value.keys == (FILM.records[2].key,)


async def test_the_beginning_is_prefilled_while_later_records_are_awaited(
    checkpoint: Checkpoint, form: RecordFormat
) -> None:
    tokens = tokens_of(FILM, form)
    cache = FakeTokens(tokens[0])
    prompts = builder(checkpoint, form, cache, step=32)
    question = ask()
    layout = prompts.lay_out(question)
    warmed: list[torch.Tensor] = []

    async def warm(embeds_TD: torch.Tensor) -> None:
        warmed.append(embeds_TD)
        cache.put(tokens[len(warmed)])  # the next record is published while this is prefilled

    values = await prompts.fetch(question, layout, warm)
    whole = prompts.splice(layout, values, ())
    record = FILM.records[0].tokens + 4
    assert [len(beginning) for beginning in warmed] == [len(warmed[0]), len(warmed[0]) + record]
    for beginning in warmed:
        assert torch.equal(beginning, whole[: len(beginning)])


async def test_nothing_is_prefilled_ahead_when_everything_is_there(checkpoint: Checkpoint, form: RecordFormat) -> None:
    async def warm(embeds_TD: torch.Tensor) -> None:
        raise AssertionError("there was nothing to wait for")

    prompts = builder(checkpoint, form, FakeTokens(*tokens_of(FILM, form)), step=1)
    question = ask()
    await prompts.fetch(question, prompts.lay_out(question), warm)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(checkpoint: Checkpoint, form: RecordFormat) -> None:
    prompts = builder(checkpoint, form)
    too_long = request("word " * 600)
    with pytest.raises(LimitExceeded, match=r"prompt tokens: 1,\d\d\d asked, at most 1,023 allowed"):
        prompts.lay_out(too_long)


@pytest.mark.parametrize(
    "level", [Level(1 << 32, 0), Level(1 << 32, 1 << 32), Level(4, 300)], ids=["blocks", "tokens", "a little"]
)
def test_absurd_layouts_are_refused_before_they_are_laid_out(
    checkpoint: Checkpoint, form: RecordFormat, level: Level
) -> None:
    film = replace(FILM, records=(TokensRef(key="a", levels=(level,)),))
    with pytest.raises(LimitExceeded, match=r"visual tokens: .* asked, at most 1,023 allowed"):
        builder(checkpoint, form).lay_out(ask([film]))


def test_endless_text_is_refused_before_it_is_tokenized(checkpoint: Checkpoint, form: RecordFormat) -> None:
    with pytest.raises(LimitExceeded, match="prompt characters"):
        builder(checkpoint, form).lay_out(request("x" * 10_000_000))


def test_tokens_of_other_weights_are_refused(checkpoint: Checkpoint, form: RecordFormat) -> None:
    with pytest.raises(Unavailable, match="weights"):
        builder(checkpoint, form).lay_out(ask(vision_revision="others"))


def test_resumed_ids_must_be_of_the_vocabulary(checkpoint: Checkpoint, form: RecordFormat) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary"):
        builder(checkpoint, form).lay_out(ask((), resume_ids=(checkpoint.config.vocab,)))


async def test_one_record_named_with_two_layouts_is_refused(checkpoint: Checkpoint, form: RecordFormat) -> None:
    ref = FILM.records[0]
    other = replace(FILM, records=(replace(ref, levels=(Level(2, 32),)),))
    question = ask([replace(FILM, records=(ref,)), other])
    prompts = builder(checkpoint, form)
    with pytest.raises(InvalidRequest, match="named twice"):
        await prompts.fetch(question, prompts.lay_out(question), None)


def _narrow(record: VisualTokens) -> VisualTokens:
    return replace(record, values_TD=record.values_TD[:, :-1])


def _short(record: VisualTokens) -> VisualTokens:
    return replace(record, values_TD=record.values_TD[:-1])


def _not_finite(record: VisualTokens) -> VisualTokens:
    values_TD = record.values_TD.copy()
    values_TD[0, 0] = np.inf
    return replace(record, values_TD=values_TD)


def _foreign(record: VisualTokens) -> VisualTokens:
    return replace(record, ref=replace(record.ref, key="somebody else's"))


def _other_dtype(record: VisualTokens) -> VisualTokens:
    return replace(record, dtype=TokenDtype.BFLOAT16, values_TD=record.values_TD.astype(np.uint16))


@pytest.mark.parametrize("harm", [_narrow, _short, _not_finite, _foreign, _other_dtype])
async def test_inline_tokens_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, form: RecordFormat, harm: object
) -> None:
    assert callable(harm)
    first, *others = tokens_of(FILM, form)
    prompts = builder(checkpoint, form)
    question = ask(inline=(harm(first), *others))
    with pytest.raises(InvalidRequest, match="tokens"):
        await prompts.fetch(question, prompts.lay_out(question), None)


def test_a_text_lies_at_the_mean_of_its_tokens_embeddings(checkpoint: Checkpoint, form: RecordFormat) -> None:
    prompts = builder(checkpoint, form)
    text = "a red car at the gate"
    rows = checkpoint.embedding_rows(checkpoint.tokenizer().encode(text)).float()

    vector_D = prompts.embed_text(text)

    assert vector_D.shape == (checkpoint.config.llm_width,)
    assert vector_D.dtype == np.float32
    assert np.linalg.norm(vector_D) == pytest.approx(1)
    np.testing.assert_allclose(vector_D, (rows.mean(0) / rows.mean(0).norm()).numpy(), rtol=1e-6)
    assert not np.allclose(vector_D, prompts.embed_text("nobody is there"))


def test_control_tokens_in_a_text_are_text(checkpoint: Checkpoint, form: RecordFormat) -> None:
    vector_D = builder(checkpoint, form).embed_text("<|im_end|>")
    ids = checkpoint.tokenizer().encode("<|im_end|>")
    assert len(ids) > 1
    assert np.linalg.norm(vector_D) == pytest.approx(1)


@pytest.mark.parametrize(("text", "says"), [("", "an empty text"), ("x" * 70_000, "70,000 asked, at most 65,536")])
def test_a_text_without_place_is_refused(checkpoint: Checkpoint, form: RecordFormat, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        builder(checkpoint, form).embed_text(text)
