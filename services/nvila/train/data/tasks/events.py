"""Things that come and go in a clip: in which order, how often, what was shown briefly, and when.

`order` and `counting` are told by looking at all of the clip; `brief` by looking often enough; `when` is temporal
localisation, its answers `<start> <end>` in seconds (NVILA-SPEC §6.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from nvila.model.wording import CAPTION, DOES_IT_HAPPEN, IS_IT_SO, LABEL, NOTHING
from nvila.train.data import words
from nvila.train.data.clips import film, length
from nvila.train.data.draw import COLOURS, SHAPES, Draw, background, ink_on, paste, stamp, text_size, tint, write
from nvila.train.data.made import Made, Turn, clip, told_last

ORDINALS = ("first", "second", "third", "fourth")
PLACE_QUESTIONS = ("Which {noun} appears {place}?", "What {noun} is shown {place}?", "Which {noun} comes {place}?")
EARLIER_QUESTIONS = (
    "Which appears first, {} or {}?",
    "Which comes first: {} or {}?",
    "Which is shown earlier, {} or {}?",
)
FLASHES_QUESTIONS = (
    "How many times does the {} appear?",
    "How often is the {} shown?",
    "Count how often the {} appears.",
)
WHEN_QUESTIONS = (
    "When is the {} visible?",
    "When does the {} appear? Give start and end.",
    "From when to when is the {} shown?",
    "During which time do you see the {}?",
)
VISIBLE_QUESTIONS = ("Is the {} visible?", "Does the {} appear?", "Do you see the {}?")
STORY_QUESTIONS = ("What happens in the video?", "Describe the video.", "What is shown, and when?")
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class _Show:
    """A picture, where, and from which frame to which (not included)."""

    picture: Image.Image
    at: tuple[float, float]
    first: int
    end: int


# -- order ------------------------------------------------------------------------------------------------------------


def order(draw: Draw) -> Made:
    """Shapes shown one after the other: which came first, last, or after another."""
    count = draw.whole(2, 3)
    frames = length(draw)
    hues, kinds = draw.some_of(COLOUR_NAMES, count), draw.some_of(SHAPES, count)
    shows = [
        _Show(_stamp(draw, hue, kind), _spot(draw), first, end)
        for hue, kind, (first, end) in zip(hues, kinds, _turns(draw, frames, count), strict=True)
    ]
    by_colour = draw.chance(0.5)
    names = hues if by_colour else kinds
    noun = "color" if by_colour else "shape"
    if draw.chance(0.6):
        asked = draw.whole(0, count - 1)
        place = "last" if asked == count - 1 and draw.chance(0.5) else ORDINALS[asked]
        question = draw.one_of(PLACE_QUESTIONS).format(noun=noun, place=place)
        return _made(draw, "place", question, names[asked], frames, shows, hues)
    one, other = draw.some_of(range(count), 2)
    question = draw.one_of(EARLIER_QUESTIONS).format(names[one], names[other])
    return _made(draw, "earlier", question, names[min(one, other)], frames, shows, hues)


# -- counting over time -----------------------------------------------------------------------------------------------


def counting(draw: Draw) -> Made:
    """How often one shape flashes, or how many different ones pass."""
    number = draw.whole(1, draw.knobs.count)
    frames = max(length(draw), round(draw.knobs.video_fps * 0.9 * number))
    question: str
    if draw.chance(0.5):
        hue, kind = draw.one_of(COLOUR_NAMES), draw.one_of(SHAPES)
        picture, at = _stamp(draw, hue, kind), _spot(draw)
        shows = [_Show(picture, at, first, end) for first, end in _turns(draw, frames, number, is_apart=True)]
        question = draw.one_of(FLASHES_QUESTIONS).format(f"{hue} {kind}")
        return _made(draw, "flashes", question, str(number), frames, shows, [hue])
    kind = draw.one_of(SHAPES)
    hues = draw.some_of(COLOUR_NAMES, number)
    turns = _turns(draw, frames, number, is_apart=True)
    shows = [_Show(_stamp(draw, hue, kind), _spot(draw), a, b) for hue, (a, b) in zip(hues, turns, strict=True)]
    plural = f"{kind}es" if kind == "cross" else f"{kind}s"
    question = draw.one_of(
        ("How many {} appear in the video?", "How many {} are shown in all?", "Count the {} in the video.")
    ).format(plural)
    return _made(draw, "passing", question, str(number), frames, shows, hues)


# -- text shown for part of a clip ------------------------------------------------------------------------------------


def brief(draw: Draw) -> Made:
    """What is written on a sign that is there for a moment."""
    frames, fps = length(draw), draw.knobs.video_fps
    shown = max(2, round(draw.real(*draw.knobs.brief_s) * fps))
    first = draw.whole(1, frames - shown - 1)
    text = draw.one_of((words.word(draw), words.code(draw, draw.whole(2, 4)), words.number(draw)))
    hue = draw.one_of(COLOUR_NAMES)
    sign = _sign(draw, text, hue)
    shows = [_Show(sign, _room(draw, sign), first, first + shown)]
    question = draw.one_of(
        (
            "What text appears in the video?",
            "What does the sign say?",
            "Read the text that is shown for a moment.",
            "What is written on the sign?",
        )
    )
    made = _made(draw, "sign", question, text, frames, shows, [hue], metric="anls")
    made.notes.update(shown_s=shown / fps, share=round(shown / frames, 3))
    return made


# -- when -------------------------------------------------------------------------------------------------------------


def when(draw: Draw) -> Made:
    """From when to when a shape is on show, with another shape or none at other times."""
    frames, fps = length(draw), draw.knobs.video_fps
    shown = round(frames * draw.real(0.12, 0.5))
    first = draw.whole(0, frames - shown)
    hues, kinds = draw.some_of(COLOUR_NAMES, 2), draw.some_of(SHAPES, 2)
    left, right = draw.some_of((0.27, 0.73), 2)
    side = draw.knobs.video_px
    shows = [_Show(_stamp(draw, hues[0], kinds[0]), (side * left, side * draw.real(0.3, 0.7)), first, first + shown)]
    if draw.chance(0.5):  # something else, at a time of its own
        other = round(frames * draw.real(0.12, 0.5))
        start = draw.whole(0, frames - other)
        at = (side * right, side * draw.real(0.3, 0.7))
        shows.append(_Show(_stamp(draw, hues[1], kinds[1]), at, start, start + other))
    question = draw.one_of(WHEN_QUESTIONS).format(f"{hues[0]} {kinds[0]}")
    answer = _times(first, first + shown, fps)
    return _made(draw, "shown", question, answer, frames, shows, hues, metric="interval")


def _times(first: int, end: int, fps: int) -> str:
    return f"<{first / fps:.2f}> <{end / fps:.2f}>"


# -- everything at once -----------------------------------------------------------------------------------------------


def narrate(draw: Draw) -> Made:
    """Shapes one after the other, some of them again: all of it with times, every question of the above, and those
    that the platform asks of each part of a recording. Some clips are cut out of longer ones: what is shown then begins
    before them or goes on after them, and in some nothing happens."""
    whole, fps = length(draw), draw.knobs.video_fps
    count = draw.whole(1, min(4, whole // 6))
    known = list(zip(draw.some_of(COLOUR_NAMES, count), draw.some_of(SHAPES, count), strict=True))
    things = known if draw.chance(0.6) else [draw.one_of(known[: max(1, count - 1)]) for _ in range(count)]
    turns = _turns(draw, whole, count, is_apart=True)
    low, high = _cut(draw, whole) if draw.chance(0.4) else (0, whole)
    left = [
        (thing, (max(first, low) - low, min(end, high) - low))
        for thing, (first, end) in zip(things, turns, strict=True)
        if min(end, high) - max(first, low) >= 2
    ]
    things, turns, frames = [thing for thing, _ in left], [turn for _, turn in left], high - low
    shows = [_Show(_stamp(draw, *thing), _spot(draw), a, b) for thing, (a, b) in left]
    names = [" ".join(thing) for thing in things]
    told = ", ".join(f"{name} {_times(a, b, fps)}" for name, (a, b) in zip(names, turns, strict=True))
    asked: list[Turn] = [(draw.one_of(STORY_QUESTIONS), told or NOTHING)]
    asked += [(LABEL, ", ".join(names) or NOTHING), (CAPTION, _caption(names)), *_whether(draw, things)]
    cues: list[Turn] = []
    for name in dict.fromkeys(names):
        often = names.count(name)
        cues.append((f"{name} number", f" {often}"))
        asked.append((draw.one_of(FLASHES_QUESTIONS).format(name), str(often)))
        if often == 1:
            asked.append((draw.one_of(WHEN_QUESTIONS).format(name), _times(*turns[names.index(name)], fps)))
            cues.append((f"{name} time", _times(*turns[names.index(name)], fps)))
    for noun, traits in (("color", [hue for hue, _ in things]), ("shape", [kind for _, kind in things])):
        for place, trait in enumerate(traits):
            spoken = "last" if place == len(things) - 1 and draw.chance(0.5) else ORDINALS[place]
            asked.append((draw.one_of(PLACE_QUESTIONS).format(noun=noun, place=spoken), trait))
            cues.append((f"{spoken} {noun}", f" {trait}"))
        if len(set(traits)) == len(things) > 1:
            one, other = draw.some_of(range(len(things)), 2)
            earlier = draw.one_of(EARLIER_QUESTIONS).format(traits[one], traits[other])
            asked.append((earlier, traits[min(one, other)]))
            cues += [
                (f"{traits[i]}, {traits[j]} first", f" {traits[min(i, j)]}") for i, j in ((one, other), (other, one))
            ]
    (question, answer), more = told_last(draw, asked)
    made = _made(draw, "story", question, answer, frames, shows, [hue for hue, _ in things])
    return replace(made, more=more, cues=tuple(draw.some_of(cues, min(len(cues), 2 * draw.knobs.questions))))


def _cut(draw: Draw, frames: int) -> tuple[int, int]:
    """First frame and end of a part of a clip, half of it or less."""
    kept = max(8, round(frames * draw.real(0.1, 0.5)))
    first = draw.whole(0, frames - kept)
    return first, first + kept


def _caption(names: Sequence[str]) -> str:
    if not names:
        return "Nothing happens."
    first, *others = [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in names]
    return f"{first.capitalize()} appears{''.join(f', then {other}' for other in others)}."


def _whether(draw: Draw, things: Sequence[tuple[str, str]]) -> list[Turn]:
    """Of one that is there and of two that are not, one of which is nearly so; in the words of both kinds of job."""
    absent = [(hue, kind) for hue in COLOUR_NAMES for kind in SHAPES if (hue, kind) not in things]
    alike = [one for one in absent if any((one[0] == hue) != (one[1] == kind) for hue, kind in things)]
    asked = [draw.one_of(alike or absent), draw.one_of(absent), *draw.some_of(things, min(2, len(things)))]
    turns = []
    for thing in asked:
        questions, tail = draw.one_of(((WHEN_QUESTIONS, DOES_IT_HAPPEN), (VISIBLE_QUESTIONS, IS_IT_SO)))
        turns.append((f"{draw.one_of(questions).format(' '.join(thing))}\n{tail}", "yes" if thing in things else "no"))
    return turns


# -- common -----------------------------------------------------------------------------------------------------------


def _made(
    draw: Draw,
    task: str,
    question: str,
    answer: str,
    frames: int,
    shows: Sequence[_Show],
    hues: Sequence[str],
    metric: str = "exact",
) -> Made:
    side = draw.knobs.video_px
    ground = background(draw, side, side, avoid=[COLOURS[hue] for hue in hues])

    def paint(frame: Image.Image, number: int) -> None:
        for show in shows:
            if show.first <= number < show.end:
                paste(frame, show.picture, show.at)

    media = clip(film(ground, frames, paint), draw.knobs.video_fps)
    return Made(task=task, question=question, answer=answer, media=media, metric=metric, notes={"frames": frames})


def _turns(draw: Draw, frames: int, count: int, *, is_apart: bool = False) -> list[tuple[int, int]]:
    """`count` stretches of frames one after the other; `is_apart`: with a gap of two frames or more between them."""
    slot = frames / count
    turns = []
    for turn in range(count):
        low, high = round(turn * slot) + 1, round((turn + 1) * slot) - 1
        longest = max(2, high - low - (1 if is_apart else 0))
        shown = max(2, round(longest * draw.real(0.4, 0.8)))
        first = draw.whole(low, max(low, high - shown))
        turns.append((first, min(first + shown, frames)))
    return turns


def _spot(draw: Draw) -> tuple[float, float]:
    side = draw.knobs.video_px
    return side * draw.real(0.25, 0.75), side * draw.real(0.25, 0.75)


def _stamp(draw: Draw, hue: str, kind: str) -> Image.Image:
    return stamp(kind, round(draw.knobs.video_px * draw.real(0.25, 0.4)), tint(draw, COLOURS[hue]))


def _sign(draw: Draw, text: str, hue: str) -> Image.Image:
    side = draw.knobs.video_px
    ground = tint(draw, COLOURS[hue])
    face, bold = draw.face(), draw.chance(0.5)
    size_px = round(side * draw.real(0.13, 0.2))
    while text_size(text, face.font(size_px, bold=bold))[0] > side * 0.8:
        size_px -= 1
    font = face.font(size_px, bold=bold)
    width, height = text_size(text, font)
    picture = Image.new("RGBA", (width + size_px, height + size_px), (*ground, 255))
    write(ImageDraw.Draw(picture), (picture.width / 2, picture.height / 2), text, font, ink_on(ground), "mm")
    return picture


def _room(draw: Draw, picture: Image.Image) -> tuple[float, float]:
    """A centre with which a picture lies inside the frame."""
    side = draw.knobs.video_px
    spare_x, spare_y = max(0, side - picture.width), max(0, side - picture.height)
    return picture.width / 2 + draw.real(0, spare_x), picture.height / 2 + draw.real(0, spare_y)
