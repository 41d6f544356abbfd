"""`nvila ask --in-process`: the pipeline with everything in one process, on a real clip and the random checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from nvila.cli.client import Ask, Media, Report
from nvila.cli.local import answer_here
from nvila.errors import InvalidMedia
from nvila.model.tiny import make_random_checkpoint
from nvila.types import MediaKind
from tests.clips import BIKES
from tests.model.conftest import make_static_s2, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random-tiny"
    make_random_checkpoint(folder)
    return folder


def ask(path: Path, question: str = "What happens?") -> Ask:
    return Ask(
        media=[Media(kind=MediaKind.VIDEO, path=path)], question=question, num_frames=16, max_tokens=8, timeout_s=120
    )


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("nvila-local")}


def test_text_comes_piece_by_piece_and_then_the_account(model: Path) -> None:
    before = shared_memory()

    *pieces, report = answer_here(ask(BIKES), model)

    assert isinstance(report, Report)
    assert "".join(str(piece) for piece in pieces)
    assert report.usage["completion_tokens"] <= 8
    (media,) = report.coverage["media"]
    assert (media["frames_asked"], media["frames_decoded"], media["frames_encoded"]) == (16, 16, 16)
    assert report.coverage["stage_ms"]["total"] > 0
    assert shared_memory() <= before


def test_the_same_question_has_the_same_answer(model: Path) -> None:
    once, again = (list(answer_here(ask(BIKES), model))[:-1] for _ in range(2))

    assert once == again


def test_a_model_with_static_s2_answers_from_a_picture_and_a_video(tmp_path: Path) -> None:
    folder = make_static_s2(tmp_path / "static")
    Image.fromarray(picture(150, 90)[0]).save(tmp_path / "picture.png")
    media = [Media(kind=MediaKind.IMAGE, path=tmp_path / "picture.png"), Media(kind=MediaKind.VIDEO, path=BIKES)]
    asked = Ask(media=media, question="What happens?", num_frames=8, max_tokens=8, timeout_s=120)

    *_, report = answer_here(asked, folder)

    assert isinstance(report, Report)
    image, video = report.coverage["media"]
    # Merged to the first scale: 4×4 patches of a picture become 2×2 tokens, each block followed by a newline.
    assert (image["tiles"], image["tokens"]) == (1, 5)
    assert (video["tiles"], video["tokens"], video["frames_encoded"]) == (8, 8 * 5, 8)
    assert report.usage["completion_tokens"] > 0


def test_what_is_no_video_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("not a video")

    with pytest.raises(InvalidMedia):
        list(answer_here(ask(path), model))


def test_leaving_in_the_middle_leaves_nothing_behind(model: Path) -> None:
    before = shared_memory()
    pieces = answer_here(ask(BIKES), model)
    next(pieces)

    pieces.close()

    assert shared_memory() <= before
