"""Still scenes are told from events: real pictures held still through noise and H.264, and labelled small events."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nvila.model.preprocess import resize_exact
from nvila.recordings.gate import Gate, reference_of
from tests import clips

Picture = NDArray[np.uint8]

_TILE_PX = 448
_GROUP = 8
_STILL_LIFES = (clips.BIKES, clips.BUNNY)


def real_picture(path: Path, number: int = 20) -> Picture:
    """One frame of a real clip, at most 640 pixels across."""
    with av.open(str(path)) as container:
        for at, frame in enumerate(container.decode(video=0)):
            if at == number:
                step = -(-frame.width // 640)
                rgb = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)[::step, ::step]
                return np.ascontiguousarray(rgb[: len(rgb) // 2 * 2, : rgb.shape[1] // 2 * 2])
    raise AssertionError(f"{path.name} has fewer than {number + 1} frames")


def through_camera(pictures: Sequence[Picture], *, sigma: float, crf: int, seed: int = 0) -> list[Picture]:
    """What a camera makes of scenes: sensor noise, H.264 with a key frame every 50, decoded and brought to size."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf), "g": "50", "preset": "veryfast"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            noisy = np.clip(picture + rng.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as decoded:
        return [tile_of(frame) for frame in decoded.decode(video=0)]


def tile_of(frame: av.VideoFrame) -> Picture:
    return resize_exact(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), _TILE_PX, _TILE_PX)


def encoded_groups(frames: Sequence[Picture], floor_s: float = 1e9) -> list[int]:
    """Numbers of the groups that the gate lets through, a frame each second."""
    gate = Gate(floor_s)
    groups = [np.stack(frames[at : at + _GROUP]) for at in range(0, len(frames), _GROUP)]
    return [number for number, group in enumerate(groups) if not gate.is_static(group, number * _GROUP)]


@pytest.mark.parametrize("path", _STILL_LIFES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("sigma", "crf"), [(0.0, 23), (3.0, 23), (3.0, 28), (6.0, 28)])
def test_a_real_scene_held_still_is_encoded_once_in_ten_groups_or_less(path: Path, sigma: float, crf: int) -> None:
    frames = through_camera([real_picture(path)] * 80, sigma=sigma, crf=crf)
    assert len(encoded_groups(frames)) <= 2, "80 frames are 10 groups: at least five times fewer are encoded"


@pytest.mark.parametrize("path", [clips.BIKES, clips.BUNNY, clips.CARPHONE], ids=lambda path: path.stem)
def test_a_busy_real_clip_loses_nothing(path: Path) -> None:
    with av.open(str(path)) as container:
        every_sixth = [tile_of(frame) for at, frame in enumerate(container.decode(video=0)) if at % 6 == 0]
    groups = -(-len(every_sixth) // _GROUP)
    assert encoded_groups(every_sixth) == list(range(groups))


@dataclass(frozen=True)
class Event:
    """Something small that happens in one frame of a still scene, at a place of the scene's own pixels."""

    name: str
    draw: str
    size_px: int
    colour: tuple[int, int, int] | int


_EVENTS = (
    Event("a person far away", "box", 14, -60),
    Event("a small bright thing", "box", 10, 70),
    Event("a lamp that turns green", "lamp", 10, (30, 170, 60)),
    Event("a digit of a display", "digit", 18, 0),
)


def with_event(scene: Picture, event: Event, at: tuple[int, int], *, happens: bool) -> Picture:
    """The scene, or the scene while the event is on. A lamp is red before, a digit is 3 before and 8 after."""
    picture = scene.copy()
    y, x = at
    here = picture[y : y + event.size_px, x : x + event.size_px]
    if event.draw == "box" and happens:
        assert isinstance(event.colour, int)
        here[:] = np.clip(here.astype(int).mean() + event.colour, 0, 255).astype(np.uint8)
    elif event.draw == "lamp":
        here[:] = event.colour if happens else (170, 60, 30)
    elif event.draw == "digit":
        image = Image.new("RGB", (event.size_px, event.size_px), (20, 20, 20))
        ImageDraw.Draw(image).text((1, 0), "8" if happens else "3", fill=(230, 230, 230), font_size=event.size_px - 1)
        here[:] = np.asarray(image)
    return picture


@pytest.mark.parametrize("event", _EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize("path", _STILL_LIFES, ids=lambda path: path.stem)
def test_no_labelled_event_is_missed(path: Path, event: Event) -> None:
    scene = real_picture(path)
    places = np.random.default_rng(7).uniform(0.1, 0.85, (3, 2))
    groups_of_event = {2: 3, 4: 0, 6: 7}  # group -> the one frame of it in which the event is on
    for fraction in places:
        y, x = (fraction * scene.shape[:2]).astype(int)
        pictures = [
            with_event(scene, event, (y, x), happens=groups_of_event.get(number // _GROUP) == number % _GROUP)
            for number in range(8 * _GROUP)
        ]
        encoded = encoded_groups(through_camera(pictures, sigma=2.0, crf=26))
        assert set(groups_of_event) <= set(encoded), f"at {(y, x)} only groups {encoded} were encoded"


def test_what_comes_to_rest_is_encoded_again_before_its_rest_is_skipped() -> None:
    """The tokens of a group in which something passed do not stand for the empty scene after it."""
    still = np.full((_GROUP, 64, 64, 3), 90, np.uint8)
    passing = still.copy()
    passing[3, 10:30, 10:30] = 200
    gate = Gate(1e9)
    assert [gate.is_static(group, 0.0) for group in (still, still, passing, still, still)] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_a_slow_change_adds_up_until_it_is_seen() -> None:
    gate = Gate(1e9)
    encoded = [
        number for number in range(40) if not gate.is_static(np.full((_GROUP, 64, 64, 3), 80 + number, np.uint8), 0.0)
    ]
    assert encoded[0] == 0
    assert len(encoded) >= 2
    assert max(np.diff(encoded)) <= 25, "a change of more than the highest bound never passes"


def test_at_least_one_group_in_floor_seconds_is_encoded() -> None:
    frames = [np.full((32, 32, 3), 128, np.uint8)] * (_GROUP * 12)
    assert encoded_groups(frames, floor_s=32.0) == [0, 4, 8]


def test_a_gate_made_again_from_the_last_encoded_group_goes_on_alike() -> None:
    frames = through_camera([real_picture(clips.BIKES)] * 32, sigma=3.0, crf=23)
    groups = [np.stack(frames[at : at + _GROUP]) for at in range(0, 32, _GROUP)]
    gate = Gate(60.0)
    whole = [gate.is_static(group, 8.0 * number) for number, group in enumerate(groups)]
    last = max(number for number in range(2) if not whole[number])
    again = Gate(60.0, reference_of(groups[last], 8.0 * last))
    assert [again.is_static(group, 8.0 * number) for number, group in enumerate(groups) if number >= 2] == whole[2:]


def test_a_frame_of_another_size_is_never_alike() -> None:
    gate = Gate(1e9)
    gate.is_static(np.zeros((2, 64, 64, 3), np.uint8), 0.0)
    assert not gate.is_static(np.zeros((2, 32, 32, 3), np.uint8), 1.0)
