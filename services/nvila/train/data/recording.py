"""A recording of minutes in which shapes come and go, and what is right to say of any part of it.

Written frame by frame as H.264, so its length costs no memory. Made like the clips of `tasks/events.py`, but hundreds
of seconds long: what a model learned on clips is asked of it through the platform's own recordings
(`benchmarks/recordings.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.errors import Unavailable
from nvila.train.data.draw import COLOURS, SHAPES, Draw, Knobs, Split, background, paste, stamp, tint

SCENE_S = 60.0
"""The ground changes so often, as in footage that is cut."""
SHOWN_S = (2.0, 5.0)
APART_S = (1.0, 6.0)
AGAIN = 0.2
"""Share of what is shown that was shown before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """What is there from `start_s` to `end_s`. `at`: its centre, in pixels."""

    name: str
    start_s: float
    end_s: float
    picture: Image.Image
    at: tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Story:
    """`shown`: in order of time, one at a time. `grounds`: one for each `SCENE_S`."""

    seconds: float
    fps: int
    shown: tuple[Shown, ...]
    grounds: tuple[Image.Image, ...]

    @classmethod
    def drawn(cls, seed: int, seconds: float, split: Split = Split.TEST) -> Story:
        """The recording of this seed: always the same one."""
        draw = Draw.of("recording", split, seed, 0, Knobs())
        side = draw.knobs.video_px
        unseen = draw.some_of([f"{hue} {kind}" for hue in COLOURS for kind in SHAPES], len(COLOURS) * len(SHAPES))
        shown: list[Shown] = []
        at_s = draw.real(*APART_S)
        while unseen and (end_s := at_s + draw.real(*SHOWN_S)) < seconds:
            again = [one.name for one in shown[:-1]]
            name = draw.one_of(again) if again and draw.chance(AGAIN) else unseen.pop()
            hue, kind = name.split()
            picture = stamp(kind, round(side * draw.real(0.25, 0.4)), tint(draw, COLOURS[hue]))
            at = side * draw.real(0.25, 0.75), side * draw.real(0.25, 0.75)
            shown.append(Shown(name=name, start_s=at_s, end_s=end_s, picture=picture, at=at))
            at_s = end_s + draw.real(*APART_S)
        grounds = []
        for scene in range(int(seconds // SCENE_S) + 1):
            in_it = [one for one in shown if one.end_s > scene * SCENE_S and one.start_s < (scene + 1) * SCENE_S]
            grounds.append(background(draw, side, side, avoid=[COLOURS[one.name.split()[0]] for one in in_it]))
        return cls(seconds=seconds, fps=draw.knobs.video_fps, shown=tuple(shown), grounds=tuple(grounds))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.name for one in self.shown))

    @property
    def absent(self) -> tuple[str, ...]:
        """Shapes of colours that are never shown."""
        return tuple(f"{hue} {kind}" for hue in COLOURS for kind in SHAPES if f"{hue} {kind}" not in self.names)

    def times_of(self, name: str) -> list[tuple[float, float]]:
        return [(one.start_s, one.end_s) for one in self.shown if one.name == name]

    def pairs(self, longest_s: float) -> list[tuple[Shown, Shown]]:
        """Two of other colours, with something between them, whose colours are shown only once within the stretch from
        the first to the second, which is at most so long."""
        found = []
        for first, one in enumerate(self.shown):
            for second in range(first + 2, len(self.shown)):
                other = self.shown[second]
                if other.end_s - one.start_s > longest_s:
                    break
                hues = [between.name.split()[0] for between in self.shown[first : second + 1]]
                if hues.count(hues[0]) == 1 and hues.count(hues[-1]) == 1:
                    found.append((one, other))
        return found

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """(H, W, 3) each."""
        for number in range(round(self.seconds * self.fps)):
            at_s = number / self.fps
            frame = self.grounds[int(at_s // SCENE_S)].copy()
            for one in self.shown:
                if one.start_s <= at_s < one.end_s:
                    paste(frame, one.picture, one.at)
            yield np.asarray(frame)

    def write(self, path: Path) -> None:
        """As MP4. Raises `Unavailable` without PyAV."""
        try:
            import av
        except ImportError:
            raise Unavailable("writing H.264 files needs PyAV: pip install av") from None
        side = self.grounds[0].width
        with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=self.fps, options={"crf": "12", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            stream.thread_count = 1
            for picture_HWC in self.frames():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
            container.mux(stream.encode(None))


def overlap(found: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """Seconds that both name over seconds that either names; intervals of one list may overlap each other."""
    marks = sorted({edge for interval in (*found, *right) for edge in interval})
    both = either = 0.0
    for start_s, end_s in pairwise(marks):
        is_found = any(a <= start_s and end_s <= b for a, b in found)
        is_right = any(a <= start_s and end_s <= b for a, b in right)
        both += (is_found and is_right) * (end_s - start_s)
        either += (is_found or is_right) * (end_s - start_s)
    return both / either if either else 1.0
