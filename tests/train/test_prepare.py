"""What a sample is made into for training: what visual tokens are to be named, and how answers are spelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.tasks.truth import LETTERS
from nvila.train.nvila_tiny import make_base
from nvila.train.packing import Sample as Packing
from nvila.train.prepare import VISUAL, Prepared, PrepareSettings, prepare
from nvila.train.samples import Sample

PLAIN = PrepareSettings(tiles_every_image=False)
LARGE = Knobs(text_px=(56, 64))
SMALL = Knobs(objects=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_base(tmp_path_factory.mktemp("base")))


def made(checkpoint: Checkpoint, sample: Sample, settings: PrepareSettings) -> Prepared:
    return prepare(sample, checkpoint.config, checkpoint.tokenizer(), settings)


def learned(checkpoint: Checkpoint, ready: Prepared) -> list[str]:
    tokenizer = checkpoint.tokenizer()
    return [tokenizer.token_of(label) or "" for label in ready.labels_P.tolist() if label >= 0]


def test_each_visual_token_is_to_say_which_letter_it_shows(checkpoint: Checkpoint) -> None:
    sample = make_sample("page", Split.TRAIN, 0, 1, LARGE)
    ready = made(checkpoint, sample, replace(PLAIN, names_tokens=True))
    assert sample.truth_KHW is not None
    side = int((ready.ids_P == VISUAL).sum() ** 0.5)
    middle = (np.arange(side) * 2 + 1) * sample.truth_KHW.shape[1] // (2 * side)
    shown = sample.truth_KHW[-1][np.ix_(middle, middle)].reshape(-1)
    said = ready.labels_P[np.flatnonzero(ready.ids_P == VISUAL) + 1]  # the label that is predicted where the token is

    tokenizer = checkpoint.tokenizer()
    assert (shown > 0).sum() > 5
    for letter, label in zip(shown, said, strict=True):
        if letter:
            assert tokenizer.token_of(int(label)) == LETTERS[letter - 1]


def test_shapes_are_named_by_their_kind_or_colour_and_the_ground_by_where_it_is(checkpoint: Checkpoint) -> None:
    names: set[str] = set()
    for index in range(30):
        sample = make_sample("describing", Split.TRAIN, 0, index)
        ready = made(checkpoint, sample, replace(PLAIN, names_tokens=True))
        names |= set(learned(checkpoint, ready)) - set(LETTERS)

    assert {"Ġcircle", "Ġsquare", "Ġred", "Ġblue", "top", "right"} <= names


def test_tokens_of_several_pictures_cannot_be_named(checkpoint: Checkpoint) -> None:
    one = make_sample("page", Split.TRAIN, 0, 1)
    two = replace(make_sample("pairs", Split.TRAIN, 0, 1), truth_KHW=one.truth_KHW)

    with pytest.raises(InvalidRequest, match="one picture"):
        made(checkpoint, two, replace(PLAIN, names_tokens=True))


def test_what_is_read_is_learned_letter_by_letter_and_is_the_same_text(checkpoint: Checkpoint) -> None:
    sample = make_sample("page", Split.TRAIN, 0, 1, LARGE)
    merged, spelled = (made(checkpoint, sample, replace(PLAIN, spells=spells)) for spells in (False, True))

    assert learned(checkpoint, spelled) == [*sample.answer.replace(" ", "Ġ"), "<|im_end|>"]
    assert len(learned(checkpoint, merged)) < len(learned(checkpoint, spelled))
    whole, by_letter = (checkpoint.tokenizer().decode([i for i in p.ids_P if i >= 0]) for p in (merged, spelled))
    assert whole == by_letter
    assert len(spelled.ids_P) == len(spelled.labels_P)


@pytest.mark.parametrize(("family", "kept"), [("describing", "Ġ"), ("when", "<t")])
def test_what_is_named_and_times_keep_their_own_tokens(checkpoint: Checkpoint, family: str, kept: str) -> None:
    said: set[str] = set()
    for index in range(24):
        sample = make_sample(family, Split.TRAIN, 0, index)
        tokens = learned(checkpoint, made(checkpoint, sample, replace(PLAIN, spells=True)))
        assert tokens == learned(checkpoint, made(checkpoint, sample, PLAIN))
        said |= set(tokens)

    assert any(token.startswith(kept) and len(token) > 2 for token in said)


def test_questions_asked_apart_are_each_laid_out_as_if_they_were_the_only_one(checkpoint: Checkpoint) -> None:
    sample = make_sample("describing", Split.TRAIN, 0, 3, replace(SMALL, questions=5))
    questions = len(sample.messages) // 2
    ready = made(checkpoint, sample, replace(PLAIN, asks_apart=True, max_positions=4096))
    positions = Packing(
        embeddings_PD=torch.zeros(ready.positions, 1),
        labels_P=torch.from_numpy(ready.labels_P),
        turns_P=torch.from_numpy(ready.turns_P),
    ).positions_P.numpy()

    assert questions > 2
    assert sorted(set(ready.turns_P.tolist())) == list(range(questions + len(sample.cues) + 1))
    for turn in range(questions):
        user, answer = sample.messages[2 * turn : 2 * turn + 2]
        user = user if turn == 0 else replace(user, parts=(*sample.messages[0].parts[:1], *user.parts))
        alone = made(checkpoint, replace(sample, messages=(user, answer)), replace(PLAIN, max_positions=4096))
        own = (ready.turns_P == 0) | (ready.turns_P == turn + 1)
        np.testing.assert_array_equal(ready.ids_P[own], alone.ids_P)
        np.testing.assert_array_equal(ready.labels_P[own], alone.labels_P)
        np.testing.assert_array_equal(positions[own], np.arange(alone.positions))


def test_cues_are_answered_at_once(checkpoint: Checkpoint) -> None:
    sample = make_sample("describing", Split.TRAIN, 0, 3, replace(SMALL, questions=5))
    ready = made(checkpoint, sample, replace(PLAIN, asks_apart=True, max_positions=4096))
    tokenizer = checkpoint.tokenizer()

    learned_last = [
        tokenizer.decode([label for label in ready.labels_P[ready.turns_P == turn].tolist() if label >= 0])
        for turn in range(len(sample.messages) // 2 + 1, int(ready.turns_P.max()) + 1)
    ]
    assert learned_last == [answer for _, answer in sample.cues]


def test_times_in_cues_are_time_tokens(checkpoint: Checkpoint) -> None:
    sample = make_sample("narrating", Split.TRAIN, 5, 1, replace(SMALL, questions=5))
    ready = made(checkpoint, sample, replace(PLAIN, asks_apart=True, max_positions=4096))

    assert any(cue.endswith(" time") for cue, _ in sample.cues)
    assert {"<t0>", "<t67>"} <= set(learned(checkpoint, ready))


def test_one_conversation_in_four_stays_whole_so_that_what_was_said_before_is_used_too(checkpoint: Checkpoint) -> None:
    several = replace(LARGE, questions=3)
    whole = [
        not made(
            checkpoint, make_sample("page", Split.TRAIN, 0, i, several), replace(PLAIN, asks_apart=True)
        ).turns_P.any()
        for i in range(8)
    ]

    assert whole == [True, False, False, False] * 2
