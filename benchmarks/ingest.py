"""Taking in recordings on this machine: `python -m benchmarks.ingest`.

Starts a stack, makes two files out of real clips, one busy (a clip's own packets, over and over), one still (a frame of
it held through a sensor's noise and H.264), and takes in each in four ways, in turn, within one run:

- *everything*: each frame is decoded, each sampled one encoded, one after the other; what a plain loop does;
- *ingest*, without and with the gate for still scenes;
- *again*: the same file a second time, with an empty Redis.

All use the stack's vision service and the same model. Prints speed as a multiple of real time, seconds of work per hour
of video by stage, frames encoded, and ratios to *everything*: read the ratios, since machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nvila.cache.keys import content_digest
from nvila.cache.store import TokenStore
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.ports import HOST
from nvila.cli.stack import configure, redis_url
from nvila.cli.state import StackFolder
from nvila.decode.client import DecodeClient
from nvila.model.preprocess import resize_exact
from nvila.model.tiny import make_random_checkpoint
from nvila.recordings.chunks import IngestLimits
from nvila.recordings.cold import ColdStore
from nvila.recordings.database import Database
from nvila.recordings.encode import GroupEncoder, Model
from nvila.recordings.ingest import IngestHandler
from nvila.recordings.ingest_services import IngestServices
from nvila.recordings.jobs import JobStore
from nvila.recordings.sources import FileSources, LiveSources, LocalMedia
from nvila.recordings.store import RecordingStore, new_recording_id
from nvila.recordings.types import ChunkPolicy, JobKind, Recording, RecordingState, Source, SourceKind
from nvila.telemetry.metrics import Metrics
from nvila.types import Chunk, Deadline, MediaSource
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool
from nvila.vision.client import VisionClient
from tests.clips import BIKES

_CALL_S = 120.0


@dataclass(frozen=True)
class Pass:
    """One way through one file. `seconds`: wall clock; `work_s`: by stage; `encoded`: frames the tower saw."""

    way: str
    seconds: float
    work_s: dict[str, float]
    encoded: int
    sampled: int


# -- the files --------------------------------------------------------------------------------------------------------


def write_busy(path: Path, seconds: float, *, slow_every: int = 0) -> Path:
    """A real clip's packets as they are, over and over; every so many repeats at half the rate of frames."""
    with av.open(str(BIKES)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        assert stream.time_base is not None
        kept = [(bytes(p), p.pts or 0, p.dts or 0, p.is_keyframe, p.duration or 0) for p in packets]
        length = max(pts + duration for _, pts, _, _, duration in kept) + 4 * kept[0][4]
        began, number = 0, 0
        while float(began * stream.time_base) < seconds:
            number += 1
            slower = 2 if slow_every and number % slow_every == 0 else 1
            for data, pts, dts, is_key, _ in kept:
                packet = av.Packet(data)
                packet.pts, packet.dts = began + pts * slower, began + dts * slower
                packet.time_base, packet.is_keyframe, packet.stream = stream.time_base, is_key, out
                target.mux(packet)
            began += length * slower
    return path


def write_still(path: Path, seconds: float) -> Path:
    """One frame of the clip as a camera of 25 frames per second would see it for so long."""
    with av.open(str(BIKES)) as source:
        scene = np.asarray(next(source.decode(video=0)).to_ndarray(format="rgb24"), np.uint8)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 3, (25, *scene.shape)).astype(np.float32)
    with av.open(str(path), "w") as target:
        out = target.add_stream("libx264", rate=25, options={"crf": "23", "g": "50", "preset": "veryfast"})
        out.height, out.width, out.pix_fmt = scene.shape[0], scene.shape[1], "yuv420p"
        for _ in range(round(seconds * 25)):
            noisy = np.clip(scene + noise[rng.integers(25)], 0, 255).astype(np.uint8)
            target.mux(out.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        target.mux(out.encode(None))
    return path


# -- the ways ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    path: Path
    digest: bytes
    size_bytes: int


class _Files:
    """The file of the pass, whatever its id."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[LocalMedia]:
        data = self._path.read_bytes()
        yield _File(self._path, blake3(data).digest(), len(data))


@dataclass(kw_only=True)
class Bench:
    """What all ways share."""

    folder: Path
    database: Database
    pool: DecodePool
    hot: TokenStore
    vision: VisionClient
    decoder: DecodeClient
    model: Model

    async def everything(self, path: Path, policy: ChunkPolicy) -> Pass:
        """Each frame decoded, each sampled one encoded, group by group."""
        began, work_s, frames, sampled = time.perf_counter(), {"decode": 0.0, "encode": 0.0}, [], 0
        with av.open(str(path)) as container:
            decoding = time.perf_counter()
            for frame in container.decode(video=0):
                if frame.time is None or frame.time < sampled / policy.fps:
                    continue
                sampled += 1
                rgb = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
                frames.append(resize_exact(rgb, self.model.config.tile_px, self.model.config.tile_px))
                if len(frames) == self.model.group:
                    work_s["decode"] += time.perf_counter() - decoding
                    work_s["encode"] += await self._encode(frames)
                    decoding = time.perf_counter()
                    frames = []
        whole = sampled // self.model.group * self.model.group
        return Pass("everything", time.perf_counter() - began, work_s, whole, sampled)

    async def _encode(self, frames: list[NDArray[np.uint8]]) -> float:
        began = time.perf_counter()
        frames_FHWC = np.stack(frames)
        times_s = tuple(float(number) for number in range(len(frames)))
        chunk = Chunk(frames_FHWC=frames_FHWC, content_digest=content_digest(frames_FHWC), times_s=times_s)
        ref = self.model.ref(chunk, f"everything-{os.urandom(4).hex()}")
        await self.vision.encode(chunk, ref, self.model.settings, want_inline=True, deadline=Deadline.after(_CALL_S))
        return time.perf_counter() - began

    async def ingest(self, way: str, path: Path, policy: ChunkPolicy, tenant: str) -> Pass:
        """As a worker does it."""
        shelf, jobs = RecordingStore(self.database), JobStore(self.database)
        cold = ColdStore(str(self.folder / "cold"))
        services = IngestServices(
            shelf=shelf,
            cold=cold,
            frames=self.pool,
            encoder=GroupEncoder(cold, self.hot, self.vision, recovery_s=20.0),
            models=self.decoder,
            metrics=Metrics(),
            limits=IngestLimits(),
        )
        handler = IngestHandler(services, FileSources(_Files(path)), LiveSources({}))
        recording = Recording(
            id=new_recording_id(),
            tenant=tenant,
            name=path.stem,
            source=Source(kind=SourceKind.FILE, file_id="file"),
            policy=policy,
            state=RecordingState.WAITING,
            created_at=time.time(),
        )
        await jobs.submit(tenant=tenant, kind=JobKind.INGEST, params={}, fingerprint=recording.id, recording=recording)
        claim = await jobs.claim("bench", [JobKind.INGEST], 3600.0)
        assert claim is not None
        began = time.perf_counter()
        result = await handler(claim)
        seconds = time.perf_counter() - began
        await claim.finish(result)
        counters = (await shelf.get(recording.id, tenant=tenant)).counters
        return Pass(way, seconds, dict(result["seconds"]), counters.frames_encoded, counters.frames_sampled)


@asynccontextmanager
async def opened(stack: RunningStack, folder: Path) -> AsyncIterator[Bench]:
    config = stack.config
    async with AsyncExitStack() as held:
        database = Database.open(f"sqlite:///{folder}/bench.db")
        held.push_async_callback(database.close)
        await database.migrate()
        limits = DecodeLimits(workers=2, idle_s=60)
        pool = await DecodePool.start(limits, FrameArena.create("nvila-bench-ingest", 128 << 20))
        held.push_async_callback(pool.aclose)
        hot = TokenStore.open(redis_url(config), Metrics(), ttl_s=3600)
        held.push_async_callback(hot.close)
        vision = VisionClient(f"{HOST}:{config.ports.vision_grpc}")
        held.push_async_callback(vision.close)
        decoder = DecodeClient(f"{HOST}:{config.ports.decode_grpc}")
        held.push_async_callback(decoder.close)
        yield Bench(
            folder=folder,
            database=database,
            pool=pool,
            hot=hot,
            vision=vision,
            decoder=decoder,
            model=Model.of(await decoder.describe()),
        )


async def measure(stack: RunningStack, folder: Path, seconds: float, fps: float) -> dict[str, list[Pass]]:
    files = {"busy": write_busy(folder / "busy.mp4", seconds), "still": write_still(folder / "still.mp4", seconds)}
    gated, plain = ChunkPolicy(fps=fps), ChunkPolicy(fps=fps, gate=False)
    done: dict[str, list[Pass]] = {}
    async with opened(stack, folder) as bench:
        say("warming up")
        await bench.ingest("warm", write_busy(folder / "warm.mp4", 20.0), plain, "warm")
        for name, path in files.items():
            say(name)
            done[name] = [
                await bench.everything(path, plain),
                await bench.ingest("ingest, no gate", path, plain, "plain"),
                await bench.ingest("ingest", path, gated, "gated"),
                await bench.ingest("again", path, gated, "gated"),
            ]
    return done


def report(done: dict[str, list[Pass]], seconds: float, fps: float) -> str:
    lines = [
        f"{seconds:.0f} s each of busy and still video (640x272, 25 frames per second), sampled at {fps:g} per second",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    ]
    for name, passes in done.items():
        base = passes[0].seconds
        lines += ["", f"{name:<18} x real time  of everything  encoded   seconds of work per hour of video"]
        for one in passes:
            work = ", ".join(f"{stage} {spent * 3600 / seconds:.0f}" for stage, spent in one.work_s.items() if spent)
            lines.append(
                f"{one.way:<18} {seconds / one.seconds:>11.1f}  {one.seconds / base:>13.2f}  "
                f"{one.encoded:>4} of {one.sampled:<4} {work}"
            )
    return "\n".join(lines)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of each file (120)")
    parser.add_argument("--fps", type=float, default=1.0, help="frames sampled per second (1)")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the tiny one with random weights)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as name:
        folder = Path(name)
        model = options.model or make_random_checkpoint(folder / "model")
        say("starting a stack")
        stack = start(configure(name="bench", model=model), StackFolder(folder / "bench"))
        try:
            done = asyncio.run(measure(stack, folder, options.seconds, options.fps))
        finally:
            stack.stop()
    if options.json:
        print(json.dumps({name: [asdict(one) for one in passes] for name, passes in done.items()}, indent=1))
    else:
        print(report(done, options.seconds, options.fps))


if __name__ == "__main__":
    main()
