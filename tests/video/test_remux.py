"""Footage is put into MP4 by a process that holds nothing else and reads strangers' files with its hands tied."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

from nvila.gateway import playing
from nvila.video.remux import MOST_BYTES, NOTHING_TO_PLAY, remux
from tests.clips import BIKES


def run(path: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-I", "-W", "ignore", "-m", "nvila.video.remux", str(os.getpid()), str(path)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def packets(data: io.BytesIO | str) -> list[tuple[int, bool]]:
    with av.open(data, "r") as source:
        return [(packet.size, packet.is_keyframe) for packet in source.demux(video=0) if packet.size]


def test_packets_come_out_as_they_went_in() -> None:
    done = run(BIKES)

    assert (done.returncode, done.stderr) == (0, b"")
    assert packets(io.BytesIO(done.stdout)) == packets(str(BIKES))


@pytest.mark.parametrize("content", [b"", b"rubbish" * 1000, BIKES.read_bytes()[:200]])
def test_what_cannot_be_played_is_said_by_the_exit_status(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ts"
    path.write_bytes(content)
    done = run(path)

    assert (done.returncode, done.stdout, done.stderr) == (NOTHING_TO_PLAY, b"", b"")


def test_a_codec_that_no_browser_plays_in_mp4_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for _ in range(3):
            target.mux(stream.encode(av.VideoFrame(96, 64, "yuvj420p")))
        target.mux(stream.encode(None))

    assert remux(path) is None


def test_both_sides_agree_on_the_largest_file() -> None:
    assert playing.MOST_REMUXED_BYTES == MOST_BYTES
