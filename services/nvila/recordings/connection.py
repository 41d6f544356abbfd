"""What a capture process (`capture.py`) is told by the one that starts it (`camera.py`). Light: without FFmpeg."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What the process is told. `url`: rtsp(s), without credentials. `addresses`: of its host, checked. `folder`: where
    pieces go, under names that begin with `session`. `segment_s`: least length of a piece. `open_s`, `silence_s`:
    longest wait for the first and the next packet."""

    url: str
    addresses: tuple[str, ...]
    user: str
    password: str = field(repr=False)
    folder: str
    session: int
    segment_s: float
    open_s: float
    silence_s: float
