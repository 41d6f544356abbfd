"""The path for 256 frames on this machine: `make bench`.

Starts a stack, then, `--rounds` times, asks about a part of a real clip that it has not seen (cold), asks a second
question about the same part (warm), and does the same work in this process without any service. Cold, warm and
in-process alternate within one run, because machines are shared and noisy: read the ratios, not the milliseconds.

Prints the time of each stage, what overlapped (from the trace's spans), time to first token cold and warm, and the
platform's cost over the same work in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from nvila.cli.client import Ask, Media
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.local import local_pipeline, to_question
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.gateway.pipeline import Pipeline
from nvila.model.tiny import make_random_checkpoint
from nvila.types import Answered, MediaKind
from tests.clips import BIKES
from tests.otlp import OtlpReceiver, ReceivedSpan

FRAMES = 256
ANSWER_TOKENS = 16
FRAME_S = 0.04
"""bikes.mp4 has 25 frames per second: each round's window begins one frame later, so its chunks are new."""
CALLER = "1" * 16
"""The span that asks; nobody sends it."""

STAGES = {
    "plan": ("nvila-gateway", "plan"),
    "decode frames": ("nvila-gateway", "video"),
    "vision call": ("nvila-gateway", "vision"),
    "· preprocess": ("nvila-vision", "vision.preprocess"),
    "· tower": ("nvila-vision", "vision.tower"),
    "· publish": ("nvila-vision", "vision.publish"),
    "decode call": ("nvila-gateway", "decode"),
    "· fetch tokens": ("nvila-decode", "fetch tokens"),
    "· generate": ("nvila-decode", "generate"),
}


@dataclass
class Timed:
    """Seconds. `first_s`: to the first text."""

    first_s: float
    total_s: float
    encoded: int


@dataclass
class Round:
    cold: Timed
    warm: Timed
    alone: Timed
    spans: list[ReceivedSpan] = field(default_factory=list)


async def ask_platform(http: httpx.AsyncClient, clip_id: str, start_s: float, question: str, trace_id: str) -> Timed:
    """One streamed question about an uploaded clip; the spans carry `trace_id`."""
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": clip_id, "num_frames": FRAMES, "start_s": start_s}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
    }
    began, first_s, encoded = time.perf_counter(), 0.0, 0
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if not first_s and any(choice["delta"].get("content") for choice in event.get("choices", [])):
                first_s = time.perf_counter() - began
            if event.get("coverage"):
                encoded = event["coverage"]["media"][0]["frames_encoded"]
    return Timed(first_s, time.perf_counter() - began, encoded)


async def ask_alone(pipeline: Pipeline, start_s: float, question: str) -> Timed:
    """The same work in this process."""
    clip = Media(kind=MediaKind.VIDEO, path=BIKES)
    ask = Ask(media=[clip], question=question, num_frames=FRAMES, start_s=start_s, max_tokens=ANSWER_TOKENS)
    began, first_s, encoded = time.perf_counter(), 0.0, 0
    async for event in pipeline.answer(to_question(ask)):
        if isinstance(event, Answered):
            encoded = event.coverage.media[0].frames_encoded
        elif event.text and not first_s:
            first_s = time.perf_counter() - began
    return Timed(first_s, time.perf_counter() - began, encoded)


async def measure(stack: RunningStack, receiver: OtlpReceiver, model: Path, rounds: int) -> list[Round]:
    headers = {"Authorization": f"Bearer {stack.config.api_key}"}
    done: list[Round] = []
    async with (
        httpx.AsyncClient(base_url=stack.config.url, headers=headers, timeout=300) as http,
        local_pipeline(model) as pipeline,
    ):
        upload = await http.post("/v1/files", files={"file": BIKES.open("rb")}, data={"purpose": "vision"})
        clip_id = upload.raise_for_status().json()["id"]
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warming up")
            trace_id, start_s = os.urandom(16).hex(), FRAME_S * number
            cold = await ask_platform(http, clip_id, start_s, "What happens here?", trace_id)
            warm = await ask_platform(http, clip_id, start_s, "And how does it end?", os.urandom(16).hex())
            alone = await ask_alone(pipeline, start_s, "What happens here?")
            services = {"nvila-gateway", "nvila-vision", "nvila-decode"}
            spans = await asyncio.to_thread(receiver.wait_for, trace_id, CALLER, services)
            if number:
                done.append(Round(cold, warm, alone, spans))
    return done


# -- what overlapped --------------------------------------------------------------------------------------------------


def busy_ms(spans: Iterable[ReceivedSpan]) -> float:
    """Milliseconds in which at least one of these spans was open."""
    total, end = 0, 0
    for span in sorted(spans, key=lambda span: span.start_ns):
        total += max(0, span.end_ns - max(span.start_ns, end))
        end = max(end, span.end_ns)
    return total / 1e6


def of_stage(spans: Sequence[ReceivedSpan], stage: str) -> list[ReceivedSpan]:
    service, name = STAGES[stage]
    return [span for span in spans if (span.service, span.name) == (service, name)]


def stage_table(spans: Sequence[ReceivedSpan]) -> list[str]:
    """Calls, summed and busy time of each stage, and when it was busy: a bar from the request's start to its end."""
    began = min(span.start_ns for span in spans)
    wall_ms = (max(span.end_ns for span in spans) - began) / 1e6
    lines = [f"{'stage':<16} {'calls':>5} {'sum ms':>8} {'busy ms':>8}  0{' ' * 46}{wall_ms:.0f} ms"]
    for stage in STAGES:
        mine = of_stage(spans, stage)
        bar = [" "] * 48
        for span in mine:
            left = int((span.start_ns - began) / 1e6 / wall_ms * 47)
            right = int((span.end_ns - began) / 1e6 / wall_ms * 47)
            bar[left : right + 1] = "█" * (right + 1 - left)
        total = sum(span.ms for span in mine)
        lines.append(f"{stage:<16} {len(mine):>5} {total:>8.0f} {busy_ms(mine):>8.0f}  {''.join(bar)}")
    return lines


def overlap(spans: Sequence[ReceivedSpan]) -> tuple[float, float]:
    """Busy time of frame decoding, vision and language model one after the other, and together, in milliseconds."""
    parts = [of_stage(spans, stage) for stage in ("decode frames", "· tower", "· publish", "· generate")]
    return sum(busy_ms(part) for part in parts), busy_ms(span for part in parts for span in part)


# -- report -----------------------------------------------------------------------------------------------------------


def summarize(rounds: Sequence[Round]) -> dict[str, float]:
    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    apart_together = [overlap(one.spans) for one in rounds]
    return {
        "cold_first_s": middle(one.cold.first_s for one in rounds),
        "warm_first_s": middle(one.warm.first_s for one in rounds),
        "alone_first_s": middle(one.alone.first_s for one in rounds),
        "cold_total_s": middle(one.cold.total_s for one in rounds),
        "alone_total_s": middle(one.alone.total_s for one in rounds),
        "warm_over_cold_first": middle(one.warm.first_s / one.cold.first_s for one in rounds),
        "platform_over_alone_first": middle(one.cold.first_s / one.alone.first_s for one in rounds),
        "platform_over_alone_total": middle(one.cold.total_s / one.alone.total_s for one in rounds),
        "overlapped_share": middle(1 - together / apart for apart, together in apart_together),
    }


def report(rounds: Sequence[Round]) -> str:
    figures = summarize(rounds)
    typical = sorted(rounds, key=lambda one: one.cold.first_s)[len(rounds) // 2]
    lines = [
        f"{FRAMES} frames of bikes.mp4 (640x272), {ANSWER_TOKENS} answer tokens, {len(rounds)} rounds; medians",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "",
        *stage_table(typical.spans),
        "",
        f"of frames, tower, publishing and generation, {figures['overlapped_share']:.0%} of the time overlapped",
        "",
        f"time to first token   cold {figures['cold_first_s'] * 1000:6.0f} ms   "
        f"warm {figures['warm_first_s'] * 1000:6.0f} ms   in process {figures['alone_first_s'] * 1000:6.0f} ms",
        f"whole answer          cold {figures['cold_total_s'] * 1000:6.0f} ms   "
        f"{'':17}in process {figures['alone_total_s'] * 1000:6.0f} ms",
        "",
        f"warm / cold, first token               {figures['warm_over_cold_first']:.2f}",
        f"platform / in process, first token     {figures['platform_over_alone_first']:.2f}",
        f"platform / in process, whole answer    {figures['platform_over_alone_total']:.2f}",
        f"frames encoded cold / warm             {typical.cold.encoded} / {typical.warm.encoded}",
    ]
    return "\n".join(lines)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up (5)")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the tiny one with random weights)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder, OtlpReceiver() as receiver:
        model = options.model or make_random_checkpoint(Path(folder) / "model")
        os.environ.update(receiver.environment)
        say("starting a stack")
        stack = start(configure(name="bench", model=model), StackFolder(Path(folder) / "bench"))
        try:
            rounds = asyncio.run(measure(stack, receiver, model, options.rounds))
        finally:
            stack.stop()
    if options.json:
        timed = [{name: asdict(getattr(one, name)) for name in ("cold", "warm", "alone")} for one in rounds]
        print(json.dumps({"summary": summarize(rounds), "rounds": timed}, indent=1))
    else:
        print(report(rounds))


if __name__ == "__main__":
    main()
