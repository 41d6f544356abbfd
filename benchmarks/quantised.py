"""What eight and four bits change on the served path: `python -m benchmarks.quantised FOLDER [FOLDER …]`.

One stack for each checkpoint, all at once, asked in turn `--rounds` times: a question about 256 frames that nobody has
asked about (cold), and a second one about the same frames (warm). Others are compared with the first folder;
`FOLDER=int8` serves it with visual tokens of eight bits. Prints medians of the time to first token, with ratios to the
first, resident memory of the vision and decode services, and the checkpoint's size. Machines are shared and noisy: read
the ratios. Accuracy and agreement are `nvila evaluate --compare`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.long_recording import resident_mib
from benchmarks.path import FRAME_S, ask_platform, say
from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from tests.clips import BIKES

TOKEN_DTYPE = "NVILA_DECODE_TOKEN_DTYPE"


@dataclass
class Served:
    """A checkpoint on a stack of its own, and seconds to its first tokens, round by round."""

    model: Path
    is_int8: bool
    stack: RunningStack
    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    memory_mib: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model.name + (", int8 tokens" if self.is_int8 else "")

    def row(self) -> dict[str, object]:
        size = sum(file.stat().st_size for file in self.model.rglob("*.safetensors"))
        return {
            "served": self.name,
            "cold_first_ms": 1000 * statistics.median(self.cold_s),
            "warm_first_ms": 1000 * statistics.median(self.warm_s),
            "memory_mib": self.memory_mib,
            "weights_mb": size / 1e6,
        }


async def measure(served: Sequence[Served], rounds: int) -> None:
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up")
        for one in served:
            headers = {"Authorization": f"Bearer {one.stack.config.api_key}"}
            async with httpx.AsyncClient(base_url=one.stack.config.url, headers=headers, timeout=300) as http:
                upload = await http.post("/v1/files", files={"file": BIKES.open("rb")}, data={"purpose": "vision"})
                clip = upload.raise_for_status().json()["id"]
                cold, warm = [
                    await ask_platform(http, clip, FRAME_S * number, question, os.urandom(16).hex())
                    for question in ("What happens here?", "And how does it end?")
                ]
            if number:
                one.cold_s.append(cold.first_s)
                one.warm_s.append(warm.first_s)
    for one in served:
        one.memory_mib = {part: resident_mib(one.stack, part) for part in ("vision", "decode")}


def table(served: Sequence[Served]) -> str:
    lines = [
        "| served | first token, cold | first token, warm | vision, MiB | decode, MiB | weights, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    whole = served[0]
    for one in served:
        cold, warm = (
            f"{1000 * statistics.median(mine):.0f} ms "
            f"({statistics.median(a / b for a, b in zip(mine, theirs, strict=True)):.2f} ×)"
            for mine, theirs in ((one.cold_s, whole.cold_s), (one.warm_s, whole.warm_s))
        )
        memory = " | ".join(f"{one.memory_mib[part]:.0f}" for part in ("vision", "decode"))
        lines.append(f"| {one.name} | {cold} | {warm} | {memory} | {one.row()['weights_mb']:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER", help="checkpoints; FOLDER=int8 for int8 visual tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as folder, ExitStack() as stacks:
        served = []
        for number, given in enumerate(args.models):
            name, _, dtype = given.partition("=")
            os.environ.pop(TOKEN_DTYPE, None)
            if dtype:
                os.environ[TOKEN_DTYPE] = dtype
            say(f"starting a stack for {given}")
            stack = start(configure(name=f"bench-{number}", model=Path(name)), StackFolder(Path(folder) / str(number)))
            stacks.callback(stack.stop)
            served.append(Served(Path(name), bool(dtype), stack))
        asyncio.run(measure(served, args.rounds))
    print(json.dumps([one.row() for one in served], indent=1) if args.json else table(served))  # a command's result
    return 0


if __name__ == "__main__":
    sys.exit(main())
