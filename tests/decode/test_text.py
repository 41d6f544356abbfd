from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.decode.text import TextStream, Vocabulary
from nvila.model.checkpoint import Checkpoint
from nvila.model.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    return checkpoint.tokenizer()


@pytest.fixture(scope="module")
def vocabulary(tokenizer: ChatTokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def told(vocabulary: Vocabulary, steps: list[list[int]], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(vocabulary, stop)
    return [*(stream.add(ids) for ids in steps), stream.finish()]


@given(data=st.data())
def test_any_ids_give_what_the_tokenizer_decodes(
    data: st.DataObject, vocabulary: Vocabulary, tokenizer: ChatTokenizer
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=40))
    assert "".join(told(vocabulary, [ids])) == tokenizer.decode(ids)


@given(data=st.data())
def test_steps_of_any_size_give_the_same_text(data: st.DataObject, vocabulary: Vocabulary) -> None:
    ids = data.draw(st.lists(st.integers(0, 300), max_size=30))  # byte symbols mostly: many broken characters
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    stop = tuple(data.draw(st.lists(st.sampled_from(["ab", "a", "!!", "\ufffd", "é"]), max_size=2)))
    steps = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(told(vocabulary, steps, stop)) == "".join(told(vocabulary, [ids], stop))


def test_a_character_of_several_tokens_comes_when_it_is_whole(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("🦊")
    assert len(ids) > 1
    pieces = told(vocabulary, [[i] for i in ids])
    assert pieces == [*([""] * (len(ids) - 1)), "🦊", ""]


def test_a_character_that_never_becomes_whole_is_replaced_at_the_end(
    vocabulary: Vocabulary, tokenizer: ChatTokenizer
) -> None:
    assert told(vocabulary, [tokenizer.encode("ok🦊")[:-1]]) == ["ok", "\ufffd"]


def test_special_tokens_have_no_text(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> None:
    assert "".join(told(vocabulary, [[tokenizer.eos_id, *tokenizer.encode("a"), *tokenizer.media_ids]])) == "a"


def test_what_may_begin_a_stop_string_is_held_back(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> None:
    steps = [tokenizer.encode(piece) for piece in ("one ST", "ar two", " S", "TOP three")]
    assert told(vocabulary, steps, ("STOP",)) == ["one ", "STar two", " ", "", ""]


def test_what_was_held_back_comes_at_the_end(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> None:
    assert told(vocabulary, [tokenizer.encode("one ST")], ("STOP",)) == ["one ", "ST"]


def test_the_first_of_several_stop_strings_ends_the_text(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> None:
    stream = TextStream(vocabulary, ("zzz", "b", "c"))
    assert stream.add(tokenizer.encode("abc")) == "a"
    assert stream.is_stopped
    assert stream.add(tokenizer.encode("more")) == ""


@given(data=st.data())
def test_text_goes_on_elsewhere_without_gap_or_repeat(
    data: st.DataObject, vocabulary: Vocabulary, tokenizer: ChatTokenizer
) -> None:
    ids = tokenizer.encode("naïve 🦊 says STOR, then 東京 STOP and more")
    cut = data.draw(st.integers(0, len(ids)))
    stop = ("STOP",)
    before, after = TextStream(vocabulary, stop), TextStream(vocabulary, stop)
    sent = before.add(ids[:cut])
    assert after.add(ids[:cut]) == sent  # thrown away: the client has it
    assert sent + after.add(ids[cut:]) + after.finish() == "naïve 🦊 says STOR, then 東京 "
