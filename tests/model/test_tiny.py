"""The made-up checkpoint: the same everywhere, in the published layout, and able to talk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3

from nvila.golden.pipeline import Pipeline
from nvila.model.checkpoint import Checkpoint
from nvila.model.prompt import lay_out, splice
from nvila.model.tiny import make_random_checkpoint
from nvila.types import MediaKind, MediaPart, Message, PromptMedia, Role, TextPart, TokensRef
from tests.model.conftest import picture

SEED_0 = "1ce1e32bd1a48e99c206dced029bbe95"
"""Digest of all files of seed 0, recorded when this version was made."""


def digest(folder: Path) -> str:
    state = blake3()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(path.relative_to(folder).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest(length=16)


def test_seed_0_is_the_same_bytes_everywhere(tiny_path: Path) -> None:
    assert digest(tiny_path) == SEED_0


def test_another_seed_is_another_model(tiny: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint.open(make_random_checkpoint(tmp_path / "other", seed=1))

    assert other.vision_revision != tiny.vision_revision


def test_it_says_that_it_is_random(tiny: Checkpoint) -> None:
    assert tiny.is_random


def test_it_has_the_published_files_and_no_tokenizer_json(tiny_path: Path) -> None:
    assert sorted(p.relative_to(tiny_path).as_posix() for p in tiny_path.rglob("*") if p.is_file()) == [
        "config.json",
        "llm/added_tokens.json",
        "llm/config.json",
        "llm/generation_config.json",
        "llm/merges.txt",
        "llm/model.safetensors",
        "llm/special_tokens_map.json",
        "llm/tokenizer_config.json",
        "llm/vocab.json",
        "mm_projector/config.json",
        "mm_projector/model.safetensors",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    ]


def test_making_it_again_keeps_what_is_there(tmp_path: Path) -> None:
    made = make_random_checkpoint(tmp_path / "c")
    before = (made / "config.json").stat().st_mtime_ns

    assert make_random_checkpoint(tmp_path / "c") == made
    assert (made / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_something_else_in_its_place_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("precious")

    with pytest.raises(FileExistsError, match="something else"):
        make_random_checkpoint(tmp_path / "c")
    assert [p.name for p in tmp_path.rglob("*")] == ["c", "mine.txt"]


def test_its_tokenizer_is_the_one_that_transformers_reads(tiny: Checkpoint) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny.llm_path)
    text = "Describe the scene: it's 12:30,  isn't it?\n\nNaïve — yes."

    assert theirs(text).input_ids == tiny.tokenizer().encode(text)
    turns = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == tiny.tokenizer().render(
        [("user", "hi")]
    )


@pytest.fixture(scope="module")
def pipeline(tiny_path: Path) -> Pipeline:
    return Pipeline(tiny_path)


def answer(pipeline: Pipeline, seed: int, question: str) -> tuple[list[int], float]:
    """Greedy ids, and the smallest lead of the best logit at the prompt's end."""
    values, levels = pipeline.encoder.encode(picture(300, 200, seed), pipeline.settings(MediaKind.IMAGE, True))
    item = PromptMedia(kind=MediaKind.IMAGE, is_tiled=True, records=(TokensRef(key="k", levels=levels),))
    message = Message(Role.USER, (MediaPart(0), TextPart(question)))
    layout = lay_out([message], [item], pipeline.checkpoint.tokenizer(), pipeline.config)
    embeddings = splice(layout.segments, pipeline.embed, {"k": values})
    with torch.inference_mode():
        logits, ids = pipeline.greedy(embeddings, pipeline.config.vocab, limit=16)
    best, second = logits[-1].topk(2).values
    return ids, float(best - second)


def test_it_answers_in_words(pipeline: Pipeline) -> None:
    ids, lead = answer(pipeline, 1, "What is shown?")

    text = pipeline.checkpoint.tokenizer().decode(ids)
    assert len(ids) == 16
    assert not set(ids) & set(pipeline.checkpoint.suppressed_ids)
    assert text.isascii()
    assert lead > 1e-3


def test_its_answer_depends_on_the_picture_and_on_the_question(pipeline: Pipeline) -> None:
    first, _ = answer(pipeline, 1, "What is shown?")

    assert answer(pipeline, 1, "What is shown?")[0] == first
    assert answer(pipeline, 4, "What is shown?")[0] != first
    assert answer(pipeline, 1, "Describe the scene in detail.")[0] != first
