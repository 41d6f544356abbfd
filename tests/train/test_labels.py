"""Which positions are learned: against the rule written plainly on ids, and beside visual tokens."""

from __future__ import annotations

import random

import pytest

from nvila.golden.inputs import shape
from nvila.model.config import Wrap
from nvila.model.prompt import Block, TextIds
from nvila.model.tokenizer import ChatTokenizer
from nvila.train.labels import label_answers
from nvila.train.loss import IGNORE
from nvila.types import Level, MediaKind, MediaPart, Message, PromptMedia, Role, TextPart, TokensRef
from tests.model.conftest import GOLDEN

WORDS = ["\n", " ", "answer", "question", "user", "assistant", "0", ".", "é", "ass", "system", "\t", "<t1>", "!\n\n"]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.open(GOLDEN / "e2e" / "nvila-tiny-s2" / "llm")


def plain_rule(turns: list[tuple[str, str]], tokenizer: ChatTokenizer, before: int = 0) -> tuple[list[int], list[int]]:
    """Ids and labels by the reference's steps: render with the answers and with the sentinel, cut it out, match."""

    def ids_of(answer: str | None) -> list[int]:
        said = [(role, answer if answer and role == "assistant" else text.strip()) for role, text in turns]
        return tokenizer.encode_markup(tokenizer.render(said, add_generation_prompt=False))

    ids, template = ids_of(None), ids_of("<vila/sentinel>")
    keep = [True] * len(template)
    for k in range(len(template) - 1):
        if template[k] == tokenizer.sentinel_id:
            keep[k - before : k + 2] = [False] * (2 + before)
    template = [token for token, is_kept in zip(template, keep, strict=True) if is_kept]
    labels, used = [IGNORE] * len(ids), 0
    for k, token in enumerate(ids):
        if used < len(template) and token == template[used]:
            used += 1
        else:
            labels[k] = token
    if used == len(template):
        return ids, labels
    return plain_rule(turns, tokenizer, before=1) if before == 0 else (ids, [IGNORE] * len(ids))


def test_labels_are_those_of_the_plain_rule(tokenizer: ChatTokenizer) -> None:
    dice = random.Random(5)
    for _ in range(300):
        turns = [
            (role, "".join(dice.choices(WORDS, k=dice.randrange(6))))
            for _ in range(dice.randrange(1, 4))
            for role in ("user", "assistant")
        ]
        messages = [Message(Role(role), (TextPart(text),)) for role, text in turns]

        labelled = label_answers(messages, [], tokenizer, shape())

        ids = [i for segment in labelled.layout.segments if isinstance(segment, TextIds) for i in segment.ids]
        assert (ids, list(labelled.labels)) == plain_rule(turns, tokenizer), turns


def test_an_answer_and_what_closes_it_are_learned_and_visual_tokens_are_not(tokenizer: ChatTokenizer) -> None:
    video = PromptMedia(
        kind=MediaKind.VIDEO, is_tiled=False, records=(TokensRef(key="k", levels=(Level(blocks=3, tokens=4),)),)
    )
    messages = [Message(Role.USER, (MediaPart(0), TextPart("When?"))), Message(Role.ASSISTANT, (TextPart("now"),))]

    labelled = label_answers(messages, [video], tokenizer, shape(video_wrap=Wrap(end=(198,))))

    segments = labelled.layout.segments
    assert len(labelled.labels) == sum(segment.positions for segment in segments)
    assert sum(segment.positions for segment in segments if isinstance(segment, Block)) == 15
    learned = [label for label in labelled.labels if label != IGNORE]
    assert learned == [*tokenizer.encode("now"), tokenizer.eos_id]


def test_a_conversation_without_an_answer_has_nothing_to_learn(tokenizer: ChatTokenizer) -> None:
    labelled = label_answers([Message(Role.USER, (TextPart("hello"),))], [], tokenizer, shape())

    assert set(labelled.labels) == {IGNORE}
