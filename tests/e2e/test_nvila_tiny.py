"""nvila-tiny, the model that is served where no other is named, through the whole platform: what it says is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.recordings import measure
from nvila.cli.checkpoint import NVILA_TINY, find_model
from nvila.cli.client import Ask, GatewayClient, Media, kind_of
from nvila.cli.examples import read_examples
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.train.data.recording import Story


@pytest.fixture(scope="module")
def tiny_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = StackFolder(tmp_path_factory.mktemp("stacks") / "nvila-tiny")
    running = start(configure(name="nvila-tiny", model=find_model(None)), folder)
    yield running
    running.stop()


def test_the_questions_that_it_brings_along_are_answered_rightly(tiny_stack: RunningStack) -> None:
    examples = read_examples(NVILA_TINY)
    said = []
    with GatewayClient(tiny_stack.config.url, tiny_stack.config.api_key) as gateway:
        for one in examples:
            media = [Media(kind=kind_of(one.media), path=one.media)]
            *pieces, _ = gateway.ask(Ask(media=media, question=one.question))
            said.append("".join(map(str, pieces)).strip())

    assert {kind_of(one.media).value for one in examples} == {"image", "video"}
    assert said == [one.answer for one in examples]


def test_it_finds_when_things_happen_in_a_recording_much_longer_than_its_clips(
    tiny_stack: RunningStack, tmp_path: Path
) -> None:
    found = measure(tiny_stack, Story.drawn(5, 96), tmp_path / "recording.mp4", questions=5)

    assert found["when"]["mean_iou"] > 0.5
    assert found["absent"]["nothing_found"] > 0.5
    assert found["order"]["right"] > 0.5
