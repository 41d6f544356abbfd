"""Worker processes: what they give, and that no way of failing reaches another request or leaves anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from nvila.cache.keys import content_digest
from nvila.errors import DeadlineExceeded, InvalidMedia, LimitExceeded, Unavailable
from nvila.model.preprocess import resize_exact
from nvila.types import Deadline, FrameRun, MediaKind, VideoSampling
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.plan import plan_frames
from nvila.video.pool import DecodePool
from tests.clips import BIKES, CARPHONE
from tests.video.conftest import PREFIX, Pools
from tests.video.made import decode_everything, picture, write_image, write_video

VIDEO = MediaKind.VIDEO


def soon() -> Deadline:
    return Deadline.after(60)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "nvila.video.worker" in " ".join(child.cmdline())]


async def until_alive(pool: DecodePool) -> None:
    async with asyncio.timeout(30):
        while pool.live_workers < pool.limits.workers:
            await asyncio.sleep(0.01)


async def until_working(pool: DecodePool) -> None:
    async with asyncio.timeout(30):
        while not pool.stats.tasks:
            await asyncio.sleep(0)


async def digest_of(pool: DecodePool, path: Path, numbers: tuple[int, ...]) -> bytes:
    async with pool.decode(path, VIDEO, FrameRun(indices=numbers), 64, 1, soon()) as chunk:
        return chunk.content_digest


async def test_a_chunk_is_the_frames_their_times_and_their_digest(pool: DecodePool) -> None:
    expected = np.stack([resize_exact(rgb, 64, 64) for rgb in decode_everything(BIKES)[100:104]])
    async with pool.decode(BIKES, VIDEO, FrameRun(indices=(100, 101, 102, 103)), 64, 1, soon()) as chunk:
        assert np.array_equal(chunk.frames_FHWC, expected)
        assert chunk.content_digest == content_digest(expected)
        assert chunk.times_s == pytest.approx((4.0, 4.04, 4.08, 4.12))
        assert (chunk.missing, chunk.padded) == ((), 0)
        assert chunk.location is not None
        assert chunk.location.region == pool.arena.region
        shared = Path("/dev/shm", chunk.location.region.lstrip("/")).read_bytes()[chunk.location.offset :]
        assert shared[: expected.nbytes] == expected.tobytes()
        with pytest.raises(ValueError, match="read-only"):
            chunk.frames_FHWC[0, 0, 0, 0] = 1
    assert pool.arena.used_bytes == 0


async def test_a_short_run_is_filled_up_to_the_group_with_its_last_frame(pool: DecodePool) -> None:
    async with pool.decode(BIKES, VIDEO, FrameRun(indices=(5, 6, 7)), 64, 8, soon()) as chunk:
        assert chunk.frames_FHWC.shape == (8, 64, 64, 3)
        assert (len(chunk.times_s), chunk.padded) == (3, 5)
        assert all(np.array_equal(frame, chunk.frames_FHWC[2]) for frame in chunk.frames_FHWC[3:])


async def test_repeated_frames_are_repeated(pool: DecodePool) -> None:
    async with pool.decode(CARPHONE, VIDEO, FrameRun(indices=(9, 9, 9, 10)), 64, 4, soon()) as chunk:
        assert np.array_equal(chunk.frames_FHWC[0], chunk.frames_FHWC[2])
        assert len(chunk.times_s) == 4
        assert chunk.padded == 0


async def test_an_image_keeps_its_own_size(pool: DecodePool, tmp_path: Path) -> None:
    rgb = picture(4, 37, 21)
    path = write_image(tmp_path / "picture.png", Image.fromarray(rgb))
    info = await pool.probe(path, MediaKind.IMAGE, soon())
    assert (info.kind, info.width_px, info.height_px) == (MediaKind.IMAGE, 37, 21)
    async with pool.decode(path, MediaKind.IMAGE, FrameRun(indices=(0,)), None, 1, soon()) as chunk:
        assert np.array_equal(chunk.frames_FHWC[0], rgb)


async def test_an_image_of_several_is_brought_to_the_tile_size(pool: DecodePool, tmp_path: Path) -> None:
    rgb = picture(4, 37, 21)
    path = write_image(tmp_path / "picture.png", Image.fromarray(rgb))
    async with pool.decode(path, MediaKind.IMAGE, FrameRun(indices=(0,)), 64, 1, soon()) as chunk:
        assert np.array_equal(chunk.frames_FHWC[0], resize_exact(rgb, 64, 64))


async def test_256_frames_in_eight_runs_at_once_decode_little_more_than_the_file(pools: Pools) -> None:
    async with pools() as pool:
        info = await pool.probe(BIKES, VIDEO, soon())
        plan = plan_frames(VideoSampling(num_frames=256), info, default_frames=8, max_frames=256, group=8)
        before = pool.stats.frames_decoded
        together = await asyncio.gather(*(digest_of(pool, BIKES, run.indices) for run in plan.runs))
        assert pool.stats.frames_decoded - before < 1.4 * info.frames
        assert pool.stats.frames_delivered == 256
        alone = [await digest_of(pool, BIKES, run.indices) for run in plan.runs]
    assert together == alone


async def test_a_full_arena_holds_decoding_back_until_a_chunk_is_released(pools: Pools) -> None:
    async with pools(arena_bytes=2 * 64 * 64 * 3) as pool:
        async with pool.decode(BIKES, VIDEO, FrameRun(indices=(0, 1)), 64, 1, soon()):
            second = asyncio.create_task(digest_of(pool, BIKES, (2, 3)))
            await asyncio.sleep(0.05)
            assert not second.done()
            assert pool.busy_workers == 0
        assert await second


async def test_a_chunk_larger_than_the_arena_is_refused(pools: Pools) -> None:
    async with pools(arena_bytes=4096) as pool:
        with pytest.raises(LimitExceeded, match="bytes of decoded frames"):
            await digest_of(pool, BIKES, (0, 1))


async def test_a_worker_killed_at_work_fails_its_request_only(pools: Pools) -> None:
    async with pools() as pool:
        run = FrameRun(indices=tuple(range(250)))

        async def decode_all(path: Path) -> int:
            async with pool.decode(path, VIDEO, run, 32, 1, soon()) as chunk:
                return len(chunk.times_s)

        doomed = asyncio.create_task(decode_all(BIKES))
        await until_working(pool)
        busy = next(worker for worker in pool._workers if worker not in pool._free)
        other = asyncio.create_task(digest_of(pool, CARPHONE, (0, 50)))
        os.kill(busy.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="try again"):
            await doomed
        assert await other
        await until_alive(pool)
        assert await decode_all(BIKES) == 250
        assert (pool.stats.crashes, pool.stats.failed) == (1, 1)


async def test_a_worker_that_dies_idle_is_replaced_unnoticed(pools: Pools) -> None:
    async with pools() as pool:
        old = {process.pid for process in workers()} & {worker.pid for worker in pool._workers}
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while pool.stats.crashes < 2:
                await asyncio.sleep(0.01)
        assert await digest_of(pool, BIKES, (0,))


async def test_a_crash_of_the_decoder_is_the_files_fault(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1)) as pool:
        task = asyncio.create_task(digest_of(pool, BIKES, tuple(range(250))))
        await until_working(pool)
        os.kill(next(iter(pool._workers)).pid, signal.SIGSEGV)
        with pytest.raises(InvalidMedia, match="decoder broke"):
            await task


async def test_leaving_ends_the_work_and_frees_its_memory(pools: Pools) -> None:
    async with pools() as pool:
        task = asyncio.create_task(digest_of(pool, BIKES, tuple(range(250))))
        await until_working(pool)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.arena.used_bytes == 0
        assert pool.stats.kills == 1
        assert await digest_of(pool, BIKES, (0,))


async def test_leaving_the_line_costs_no_worker(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1)) as pool:
        first = asyncio.create_task(digest_of(pool, BIKES, tuple(range(100))))
        await until_working(pool)
        second = asyncio.create_task(digest_of(pool, BIKES, (3,)))
        while not pool.waiting:
            await asyncio.sleep(0)
        second.cancel()
        assert await first
        assert (pool.stats.kills, pool.waiting) == (0, 0)


async def test_a_request_whose_time_is_up_ends_with_its_deadline(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1)) as pool:
        with pytest.raises(DeadlineExceeded):
            async with pool.decode(BIKES, VIDEO, FrameRun(indices=tuple(range(250))), 64, 1, Deadline.after(0.02)):
                pass
        assert pool.arena.used_bytes == 0
        assert await digest_of(pool, BIKES, (0,))


async def test_a_task_over_the_time_limit_is_killed_and_told_so(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1, task_s=0.05)) as pool:
        with pytest.raises(LimitExceeded, match=r"more than the 0\.05 s allowed"):
            await digest_of(pool, BIKES, tuple(range(250)))
        assert pool.stats.kills == 1


async def test_a_decoder_that_wants_too_much_memory_is_refused(pools: Pools, tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", frames=2, size=(4096, 2304), options={"preset": "ultrafast"})
    async with pools(limits=DecodeLimits(workers=1, memory_bytes=24 * 1024**2)) as pool:
        with pytest.raises((LimitExceeded, InvalidMedia)):
            await digest_of(pool, path, (0, 1))
        await until_alive(pool)
        assert pool.live_workers == 1


async def test_closing_fails_what_is_under_way_and_refuses_what_comes_later(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1)) as pool:
        under_way = [asyncio.create_task(digest_of(pool, BIKES, tuple(range(200)))) for _ in range(3)]
        await until_working(pool)
    results = await asyncio.gather(*under_way, return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    with pytest.raises(Unavailable):
        await pool.probe(BIKES, VIDEO, soon())


async def test_many_cancelled_requests_leave_nothing(pools: Pools) -> None:
    async with pools() as pool:
        for pause_s in np.linspace(0, 0.03, 12):
            tasks = [asyncio.create_task(digest_of(pool, BIKES, tuple(range(at, at + 32)))) for at in range(0, 128, 32)]
            await asyncio.sleep(float(pause_s))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert pool.arena.used_bytes == 0
        await until_alive(pool)
        assert await digest_of(pool, BIKES, (0,))


def test_workers_die_with_a_killed_parent() -> None:
    program = f"""
import asyncio, os
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool
async def main():
    pool = await DecodePool.start(DecodeLimits(), FrameArena.create("{PREFIX}-orphan", 4096))
    print(*(worker.pid for worker in pool._workers), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (2, [])
    FrameArena.create(f"{PREFIX}-orphan", 4096).close()  # the next owner removes what it left
    assert not list(Path("/dev/shm").glob(f"{PREFIX}-orphan*"))


async def test_a_worker_has_no_environment_of_ours_and_few_rights(pool: DecodePool) -> None:
    process = psutil.Process(next(iter(pool._workers)).pid)
    assert set(process.environ()) <= {"LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status


async def test_a_worker_closes_a_file_that_nobody_asks_for_any_more(pool: DecodePool, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=3)
    await pool.probe(path, VIDEO, soon())
    pids = [worker.pid for worker in pool._workers]
    path.unlink()
    started = time.monotonic()
    while any(str(path) in _open_files(pid) for pid in pids):
        assert time.monotonic() - started < 30
        await asyncio.sleep(0.05)


def _open_files(pid: int) -> str:
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(descriptor))
    return " ".join(links)
