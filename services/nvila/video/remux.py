"""Packets of a video from one container into an MP4 file that browsers play: a process of its own, for one file.

`python -m nvila.video.remux <parent's pid> <path>` writes the MP4 file to standard output, and exits with 0, or with
`NOTHING_TO_PLAY` for a file that holds no video that browsers play in MP4. Nothing is decoded. The file is a
stranger's, so the process gives up what a decode worker does (`sandbox.py`) before it opens it: it can write nowhere
else.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import av
import av.error

from nvila.video import sandbox

NOTHING_TO_PLAY = 3
MOST_BYTES = 64 << 20
"""Largest file: both containers are in memory."""

_CODECS = ("h264", "hevc", "vp9", "av1")
_MEMORY_BYTES = 4 * MOST_BYTES
_CPU_S = 20.0


def remux(path: Path) -> bytes | None:
    """The MP4 file, its first frame at 0; None when there is nothing to play."""
    made = io.BytesIO()
    with av.open(str(path)) as source, av.open(made, "w", format="mp4") as target:
        if not source.streams.video:
            return None
        video = source.streams.video[0]
        if video.codec_context.codec.canonical_name not in _CODECS:
            return None
        stream = target.add_stream_from_template(video)
        first: int | None = None
        for packet in source.demux(video):
            if packet.dts is None or packet.pts is None or (first is None and not packet.is_keyframe):
                continue
            first = packet.pts if first is None else first
            packet.pts, packet.dts = packet.pts - first, packet.dts - first
            packet.stream = stream
            target.mux(packet)
    return made.getvalue() if first is not None else None


def main() -> None:
    parent_pid, path = int(sys.argv[1]), Path(sys.argv[2])
    sandbox.die_with_parent(parent_pid)
    av.logging.set_level(None)  # its own words name paths
    sandbox.limit_resources(_MEMORY_BYTES)
    sandbox.limit_cpu(_CPU_S)
    sandbox.deny_system_calls()
    try:
        made = remux(path)
    except (av.error.FFmpegError, OSError, ValueError, MemoryError):
        made = None
    if made is None:
        os._exit(NOTHING_TO_PLAY)
    sys.stdout.buffer.write(made)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
