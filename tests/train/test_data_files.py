"""Data sets in files: shards and conversation lists, what is wrong with them by file and line, streams that resume."""

from __future__ import annotations

import json
import logging
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvila.errors import InvalidMedia, InvalidRequest, NotFound
from nvila.train.data import clips
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.generate import Plan, generate
from nvila.train.data.listing import ListingSource, write_listing
from nvila.train.data.media import VideoReading, open_media
from nvila.train.data.mixture import open_mixture
from nvila.train.data.records import read_record
from nvila.train.data.shards import ShardSource, write_shard
from nvila.train.data.stream import SampleStream
from nvila.train.samples import Sample, Unusable, usable
from nvila.types import MediaKind, MediaPart, Role

SMALL = Knobs(canvas_px=96, text_px=(8, 16), video_px=48, clip_s=(3.0, 4.0))


def made(family: str, count: int, first: int = 0) -> list[Sample]:
    return [make_sample(family, Split.TRAIN, 0, index, SMALL) for index in range(first, first + count)]


def turn(question: str = "what?", answer: str = "that") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sets of shards."""
    write_shard(tmp_path / "shapes-train-00000.tar", made("shapes", 4))
    write_shard(tmp_path / "shapes-train-00001.tar", made("shapes", 3, first=4))
    write_shard(tmp_path / "when-train-00000.tar", made("when", 2))
    return tmp_path


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["shapes", "pairs", "when", "brief"])
def test_a_shard_gives_back_what_was_put_in(tmp_path: Path, family: str) -> None:
    samples = made(family, 3)
    write_shard(tmp_path / "a.tar", samples)

    read = ShardSource("a", [tmp_path / "a.tar"], VideoReading())

    assert len(read) == 3
    for index, sample in enumerate(samples):
        again = read.load(index)
        assert (again.question, again.answer, again.task, again.metric) == (
            sample.question,
            sample.answer,
            sample.task,
            sample.metric,
        )
        assert (again.answers, again.choices, again.notes) == (sample.answers, sample.choices, sample.notes)
        for one, other in zip(again.media, sample.media, strict=True):
            assert np.array_equal(one.frames_FHWC, other.frames_FHWC)
            assert (one.times_s, one.duration_s) == (other.times_s, other.duration_s)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, made("order", 2))

    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def breaking() -> Any:
        yield made("shapes", 1)[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "a.tar", breaking())

    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rendering_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = Plan(families=("shapes", "motion"), counts={Split.TRAIN: 3}, knobs=SMALL, shard_samples=2)
    counted: list[int] = []

    assert generate(plan, tmp_path, 2, counted.append) == 6
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    (tmp_path / "shapes-train-00001.tar").unlink()

    assert generate(plan, tmp_path, 1, counted.append) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert sum(counted) == 12
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"]["motion"] == {"train": 3}


def test_a_folder_of_other_data_is_not_mixed_up_with(tmp_path: Path) -> None:
    generate(Plan(families=("shapes",), counts={Split.TRAIN: 1}, knobs=SMALL), tmp_path, 1, lambda _: None)

    with pytest.raises(InvalidRequest, match="another seed"):
        generate(Plan(families=("shapes",), counts={Split.TRAIN: 1}, seed=1, knobs=SMALL), tmp_path, 1, print)


def test_a_broken_clip_is_no_clip() -> None:
    packed = clips.pack(made("order", 1)[0].media[0])

    for broken in (packed[: len(packed) // 2], b"", b"PK\x03\x04 and more"):
        with pytest.raises(InvalidMedia):
            clips.unpack(broken)


# -- conversation lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "a record is an object, not str"),
        ({"conversations": []}, "at least one message"),
        ({"conversations": [{"from": "human"}]}, "a text `value`"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "a message is from 'bot'"),
        ({"conversations": turn()[::-1]}, "message 1 is from the assistant"),
        ({"image": 5, "conversations": turn()}, "`image` must be a file's name"),
        ({"image": "a.png", "conversations": turn("<audio> what?")}, "unknown placeholder <audio>"),
        ({"image": "a.png", "conversations": turn("<image_2> what?")}, "unknown placeholder <image_2>"),
        ({"image": "a.png", "conversations": turn("<image><image> same?")}, "2 placeholders for images, but 1"),
        ({"conversations": turn("<video> when?")}, "1 placeholders for videos, but 0"),
        ({"conversations": turn(), "nvila": 3}, "`nvila` must be an object"),
        ({"conversations": turn(), "nvila": {"answers": None}}, "`answers` must be a list, not NoneType"),
        ({"conversations": turn(), "nvila": {"answers": "42"}}, "`answers` must be a list, not str"),
        ({"conversations": turn(), "nvila": {"choices": 7}}, "`choices` must be a list, not int"),
        ({"conversations": turn(), "nvila": {"notes": ["x"]}}, "`notes` must be an object, not list"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"a message is from \['human'\]"),
        ({"conversations": turn("what is \ud83d?")}, "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        read_record(record)


def test_media_stand_before_the_first_message_wherever_their_marks_were() -> None:
    raw = {
        "images": ["a.png", "b.png"],
        "conversations": [{"from": "system", "value": "Be brief."}, *turn("is <image> like\n<image>?")],
    }

    system, question, answer = read_record(raw).messages

    assert [part.index for part in question.parts if isinstance(part, MediaPart)] == [0, 1]
    assert not any(isinstance(part, MediaPart) for part in system.parts)
    assert isinstance(question.parts[0], MediaPart)
    assert question.parts[2].text == "is  like\n?"  # type: ignore[union-attr]  # the last part is text
    assert answer.role is Role.ASSISTANT


def test_html_in_a_question_is_no_placeholder() -> None:
    assert read_record({"conversations": turn("what does <br> mean? and <b>?")}).media == ()


def test_unusable_records_are_named_with_their_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "own.json").write_text(
        "[\n"
        + ",\n".join(
            [
                json.dumps({"image": "a.png", "conversations": turn()}),
                json.dumps({"image": "gone.png", "conversations": turn()}),
                json.dumps({"image": "a.png", "conversations": turn("<speech> what?")}),
                json.dumps({"image": "a.png", "conversations": turn()}, indent=1),
            ]
        )
        + ",\n{broken}\n]"
    )

    source = ListingSource("own", tmp_path / "own.json", tmp_path, VideoReading())

    assert len(source) == 2
    assert [fault.where for fault in source.faults] == ["own.json:3", "own.json:4", "own.json:18"]
    assert "there is no image 'gone.png'" in source.faults[0].reason
    assert "unknown placeholder <speech>" in source.faults[1].reason
    assert "wrong JSON" in source.faults[2].reason


def test_a_wrong_line_of_json_lines_costs_that_line_only(tmp_path: Path) -> None:
    good = json.dumps({"conversations": turn()})
    (tmp_path / "own.jsonl").write_text(f"{good}\n{{oops\n\n{good}\n")

    source = ListingSource("own", tmp_path / "own.jsonl", tmp_path, VideoReading())

    assert len(source) == 2
    assert [fault.where for fault in source.faults] == ["own.jsonl:2"]


def test_json_that_is_nested_too_deeply_is_a_fault_of_its_line(tmp_path: Path) -> None:
    good, deep = json.dumps({"conversations": turn()}), "[" * 100_000
    (tmp_path / "lines.jsonl").write_text(f"{good}\n{deep}\n{good}\n")
    (tmp_path / "list.json").write_text(f"[{good},\n{deep}")

    lines = ListingSource("lines", tmp_path / "lines.jsonl", tmp_path, VideoReading())
    listed = ListingSource("list", tmp_path / "list.json", tmp_path, VideoReading())

    assert (len(lines), [fault.where for fault in lines.faults]) == (2, ["lines.jsonl:2"])
    assert (len(listed), [fault.where for fault in listed.faults]) == (1, ["list.json:2"])
    assert "nested too deeply" in listed.faults[0].reason


def test_a_name_that_no_file_can_have_is_a_fault_of_its_line(tmp_path: Path) -> None:
    records = [{"image": name, "conversations": turn()} for name in ("x" * 5000, "a\0b")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))

    source = ListingSource("own", tmp_path / "own.jsonl", tmp_path, VideoReading())

    assert [fault.where for fault in source.faults] == ["own.jsonl:1", "own.jsonl:2"]


def test_a_list_without_end_and_a_file_that_is_no_text_are_reported(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text("[" + json.dumps({"conversations": turn()}) + ",")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")

    cut = ListingSource("cut", tmp_path / "cut.json", tmp_path, VideoReading())

    assert len(cut) == 1
    assert "no end" in cut.faults[0].reason
    assert "no UTF-8" in ListingSource("bytes", tmp_path / "bytes.json", tmp_path, VideoReading()).faults[0].reason


def test_written_lists_are_read_back_with_real_video_files(tmp_path: Path) -> None:
    write_listing(tmp_path / "all.json", [*made("shapes", 2), *made("when", 1)], media_folder="media")

    source = ListingSource("all", tmp_path / "all.json", tmp_path, VideoReading(frames=8))
    image, clip = source.load(0), source.load(2)

    assert np.array_equal(image.media[0].frames_FHWC, made("shapes", 1)[0].media[0].frames_FHWC)
    original = made("when", 1)[0]
    assert clip.media[0].frames_FHWC.shape == (8, 48, 48, 3)
    assert clip.duration_s == pytest.approx(original.duration_s, abs=0.15)
    assert clip.answer == original.answer
    drift = clip.media[0].frames_FHWC[0].astype(int) - original.media[0].frames_FHWC[0]
    assert np.abs(drift).mean() < 6  # H.264 halves the resolution of colour


# -- mixtures and streams ---------------------------------------------------------------------------------------------


def test_a_mixture_repeats_joins_and_leaves_out(folder: Path) -> None:
    (folder / "pruned.json").write_text("[0, 6]")

    mixture = open_mixture("shapes@pruned.json*3 + when", folder)
    placed = [mixture.locate(place) for place in range(len(mixture))]

    assert len(mixture) == 5 * 3 + 2
    assert [index for source, index in placed if source.name == "shapes"] == [1, 2, 3, 4, 5] * 3
    assert [index for source, index in placed if source.name == "when"] == [0, 1]


@pytest.mark.parametrize(
    ("text", "error", "reason"),
    [
        ("shapes*x", InvalidRequest, "no part of a mixture"),
        ("shapes++when", InvalidRequest, "no part of a mixture"),
        ("shapes*0", InvalidRequest, "has no samples"),
        ("poems", NotFound, "no data set 'poems'"),
        ("shapes@none.json", NotFound, "no list of left-out samples"),
    ],
)
def test_a_wrong_mixture_is_refused(folder: Path, text: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        open_mixture(text, folder)


def test_a_stream_goes_on_after_a_kill_with_exactly_what_would_have_followed(folder: Path) -> None:
    mixture = open_mixture("shapes*2+when", folder)
    whole = [sample.name for sample in usable(SampleStream(mixture, seed=5, limit=40))]

    stream = SampleStream(mixture, seed=5, limit=40)
    before = [sample.name for sample in islice(usable(stream), 17)]
    state = json.loads(json.dumps(stream.state()))
    resumed = SampleStream(open_mixture("shapes*2+when", folder), seed=5, limit=40)
    resumed.restore(state)

    assert before + [sample.name for sample in usable(resumed)] == whole
    assert sorted(whole[:16]) == sorted(whole[16:32])  # every epoch holds everything
    assert whole[:16] != whole[16:32]


def test_ranks_share_an_epoch_without_overlap(folder: Path) -> None:
    mixture = open_mixture("shapes", folder)
    ranks = [SampleStream(mixture, seed=1, rank=rank, ranks=7, limit=1) for rank in range(7)]

    assert sorted(sample.index for stream in ranks for sample in usable(stream)) == list(range(7))
    assert len(ranks[0]) == 1


def test_a_position_of_other_data_is_refused(folder: Path) -> None:
    state = SampleStream(open_mixture("shapes", folder)).state()

    with pytest.raises(InvalidRequest, match="samples 7; here it is 2"):
        SampleStream(open_mixture("when", folder)).restore(state)


def damage(folder: Path) -> None:
    """Overwrite the first picture of the second shard, and cut the video shard short."""
    path = folder / "shapes-train-00001.tar"
    with tarfile.open(path) as tar:
        picture = next(member for member in tar if member.name.endswith(".png"))
    with path.open("r+b") as file:
        file.seek(picture.offset_data)
        file.write(b"no picture at all")


def unusable(stream: SampleStream) -> list[str]:
    return [str(sample) for sample in stream if isinstance(sample, Unusable)]


def test_a_broken_picture_stands_in_its_place_by_file_and_member(folder: Path) -> None:
    damage(folder)
    mixture = open_mixture("shapes", folder)

    samples = list(usable(SampleStream(mixture, limit=7)))

    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3, 5, 6]
    assert samples[0].where.startswith("shapes-train-0000")
    (said,) = unusable(SampleStream(mixture, limit=7))
    assert said.startswith("shapes-train-00001.tar:00000004: a broken or unknown picture")


def test_what_is_left_out_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(folder)

    with caplog.at_level(logging.WARNING, "nvila.train.samples"):
        list(usable(SampleStream(open_mixture("shapes", folder), limit=7)))

    assert "left out shapes-train-00001.tar:00000004" in caplog.text


def bomb() -> bytes:
    """A PNG's header that announces 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(64)


def test_corrupt_media_are_left_out_while_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 4096)
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "bad.clip.npz").write_bytes(_with_broken_deflate(clips.pack(made("order", 1)[0].media[0])))
    records: list[dict[str, Any]] = [{"video": "bad.mp4"}, {"image": "bomb.png"}, {"video": "bad.clip.npz"}, {}]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(record | {"conversations": turn()}) for record in records))
    mixture = open_mixture("own", tmp_path)

    assert [sample.where for sample in usable(SampleStream(mixture, limit=4))] == ["own.jsonl:4"]
    said = sorted(unusable(SampleStream(mixture, limit=4)))
    assert [line.split(": ")[0] for line in said] == ["own.jsonl:1", "own.jsonl:2", "own.jsonl:3"]
    assert "a broken or unknown picture" in said[1]


def _with_broken_deflate(packed: bytes) -> bytes:
    """The same archive, the compressed bytes of its first member overwritten."""
    begin = packed.index(b"steps_FHWC.npy") + len("steps_FHWC.npy")
    return packed[:begin] + b"\xff" * 64 + packed[begin + 64 :]


def test_videos_of_other_programs_in_shards_are_decoded(tmp_path: Path) -> None:
    clip = made("when", 1)[0]
    clips.write_h264(clip.media[0], tmp_path / "1.mp4")
    (tmp_path / "1.json").write_text(json.dumps({"video": "1.mp4", "conversations": turn()}))
    with tarfile.open(tmp_path / "own-train-00000.tar", "w") as tar:
        for name in ("1.json", "1.mp4"):
            tar.add(tmp_path / name, name)

    mixture = open_mixture("own", tmp_path, reading=VideoReading(frames=6, side_px=24))
    sample = mixture.parts[0].source.load(0)

    assert sample.media[0].frames_FHWC.shape == (6, 24, 24, 3)
    assert sample.duration_s == pytest.approx(clip.duration_s, abs=0.15)


def test_frames_in_a_folder_are_brought_to_the_side_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / "clip" / f"{number}.png")

    media = open_media(MediaKind.VIDEO, tmp_path / "clip", VideoReading(side_px=16))

    assert media.frames_FHWC.shape == (3, 16, 16, 3)


def test_bad_records_are_refused_at_once_when_asked(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"conversations": turn()}) + "\n{oops\n")

    assert open_mixture("own", tmp_path).faults[0].where == "own.jsonl:2"
    with pytest.raises(InvalidRequest, match=r"1 records cannot be used\n  own\.jsonl:2: wrong JSON"):
        open_mixture("own", tmp_path, is_strict=True)


def test_shards_of_other_programs_are_read_too(tmp_path: Path) -> None:
    """Long names, folders, and captions that no record names."""
    write_shard(tmp_path / "plain.tar", made("shapes", 2))
    with (
        tarfile.open(tmp_path / "plain.tar") as plain,
        tarfile.open(tmp_path / "other.tar", "w", format=tarfile.PAX_FORMAT) as other,
    ):
        for member in plain:
            data = plain.extractfile(member)
            member.name = f"{'long/' * 30}é{member.name}"
            other.addfile(member, data)
        other.addfile(tarfile.TarInfo(f"{'long/' * 30}é00000000.txt"))

    source = ShardSource("other", [tmp_path / "other.tar"], VideoReading())

    assert [source.load(i).question for i in range(2)] == [one.question for one in made("shapes", 2)]


def test_a_shard_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "cut.tar", made("shapes", 3))
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InvalidRequest, match=r"cut\.tar is no whole tar archive"):
        ShardSource("cut", [tmp_path / "cut.tar"], VideoReading())


def test_a_shard_that_is_no_tar_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "own-train-00000.tar").write_bytes(b"hello" * 300)

    with pytest.raises(InvalidRequest, match=r"own-train-00000\.tar is no whole tar archive"):
        open_mixture("own", tmp_path)
