"""`nvila capacity`: what a load needs, and what the autoscalers make of it. The arithmetic is in `nvila.capacity`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from nvila.capacity import load, recordings, rules, sizing
from nvila.capacity.hardware import GPUS, Gpu
from nvila.capacity.load import EXAMPLES, MIXES, Mix
from nvila.capacity.models import PUBLISHED
from nvila.capacity.plot import draw
from nvila.capacity.recordings import DAY_S, KEPT, CameraCost, Sampling
from nvila.capacity.simulate import Plan, PoolRecord, Record, simulate
from nvila.capacity.sizing import Assumptions, Cost, Size
from nvila.cli import show
from nvila.errors import InvalidRequest
from nvila.model.config import NvilaConfig

LADDER = (1, 2, 8, 32, 128, 512, 2048)
"""GPUs of the table's rows when no number is given: one machine to thousands."""
RATES_FPS = (0.25, 0.5, 1.0, 2.0, 4.0)
STILL = (0.0, 0.8)
"""Sampling rates and shares of time without change of the recordings' table when none is given."""


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "size": _size,
        "recordings": _recordings,
        "simulate": _simulate,
        "gpus": _gpus,
    }
    actions[args.action](args)
    return 0


# -- size -------------------------------------------------------------------------------------------------------------


def _size(args: argparse.Namespace) -> None:
    config, vision, decode = _model(args.model), _gpu(args.vision_gpu or args.gpu), _gpu(args.decode_gpu or args.gpu)
    assumed = Assumptions(load_share=args.load, ttl_s=args.keep, redis_memory_bytes=args.redis_memory * 1e9)
    tables = []
    for mix in [_mix(args.mix)] if args.mix else list(MIXES.values()):
        rates = sizing.rates_for(
            config, mix, vision, decode, tiles_per_s=args.tiles_per_s, positions_per_s=args.positions_per_s
        )
        each = sizing.cost_of(config, mix, rates)
        if args.rate:
            sizes = [sizing.size_for_rate(each, rates, rate, assumed) for rate in args.rate]
        else:
            sizes = [sizing.size_for_gpus(each, rates, gpus, assumed) for gpus in args.gpus or LADDER]
        tables.append((mix, each, rates.is_measured, sizes))
    if args.json:
        show.print_json(
            [
                {
                    "model": config.name,
                    "mix": mix.name,
                    "gpu": {"vision": vision.name, "decode": decode.name},
                    "measured": is_measured,
                    "request": asdict(each),
                    "sizes": [asdict(size) | {"gpus": size.gpus} for size in sizes],
                }
                for mix, each, is_measured, sizes in tables
            ]
        )
        return
    for mix, each, _, sizes in tables:
        rows = [_row(size, mix) for size in sizes]
        heading = f"{config.name}, {mix.name} ({mix.what}), {_gpus_text(vision, decode)}"
        if args.markdown:
            print(f"**{heading}** · {_cost_text(each)}\n")
            print("\n".join(markdown(_COLUMNS, rows)) + "\n")
        else:
            _print_table(heading, _cost_text(each), _COLUMNS, rows)
    if not args.markdown:
        source = "given as measured" if args.tiles_per_s and args.positions_per_s else "assumed (nvila capacity gpus)"
        print(
            f"Throughput: {source}. Planned load: {args.load:.0%} of it. Tokens stay {args.keep:,.0f} s, as bfloat16."
        )


_COLUMNS = (
    "GPUs",
    "vision",
    "decode",
    "requests/s",
    "of colocated",
    "live streams",
    "Redis",
    "moved",
    "kept",
    "pixels",
    "gateway cores",
)


def _row(size: Size, mix: Mix) -> tuple[str, ...]:
    return (
        f"{size.gpus:,}",
        "shared" if size.is_shared else f"{size.vision_gpus:,}",
        "shared" if size.is_shared else f"{size.decode_gpus:,}",
        _amount(size.requests_per_s),
        f"{size.of_shared:.0%}",
        f"{size.streams:,.0f}" if mix.name == "camera" else "–",
        f"{size.redis:,}",
        _bytes(size.redis_bytes_per_s) + "/s",
        _bytes(size.cache_bytes),
        _bytes(size.pixel_bytes_per_s) + "/s",
        f"{size.gateway_cores:,}",
    )


def _cost_text(each: Cost) -> str:
    return (
        f"one request: {each.tiles:.0f} tiles {_seconds(each.vision_s)}, {each.positions:,.0f} positions and "
        f"{each.answer_tokens:.0f} tokens {_seconds(each.decode_s)}, cache {_bytes(each.put_bytes + each.get_bytes)}, "
        f"KV {_bytes(each.kv_bytes)}"
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# -- recordings ------------------------------------------------------------------------------------------------------


def _recordings(args: argparse.Namespace) -> None:
    config, vision = _model(args.model), _gpu(args.gpu)
    rates = sizing.rates_for(config, MIXES["camera"], vision, vision, tiles_per_s=args.tiles_per_s)
    found = []
    for still in args.still or STILL:
        for fps in args.fps or RATES_FPS:
            sampling = Sampling(fps=fps, chunk_s=args.chunk_s, floor_s=args.floor_s, still=still)
            costs = [
                recordings.camera_cost(config, sampling, dtype, footage_bits_per_s=args.footage_mbit * 1e6)
                for dtype in KEPT
            ]
            found.append((sampling, costs, recordings.cameras_per_gpu(costs[0], rates, args.load)))
    if args.json:
        show.print_json(
            [
                {
                    "model": config.name,
                    "gpu": vision.name,
                    "sampling": asdict(sampling),
                    "cameras_per_gpu": cameras,
                    "camera": {dtype.value: _camera(each) for dtype, each in zip(KEPT, costs, strict=True)},
                }
                for sampling, costs, cameras in found
            ]
        )
        return
    heading = f"{config.name}, recorded cameras, {vision.name}"
    note = (
        f"one group of {config.temporal_group} frames: {_bytes(found[0][1][0].record_bytes)} in bfloat16, "
        f"{_bytes(found[0][1][1].record_bytes)} in int8; footage {_bytes(found[0][1][0].footage_bytes_per_s * DAY_S)} "
        f"a camera-day; {args.load:.0%} of {rates.tiles_per_s:,.0f} tiles/s"
    )
    rows = [_camera_row(*one) for one in found]
    if args.markdown:
        print(f"**{heading}** · {note}\n")
        print("\n".join(markdown(_CAMERA_COLUMNS, rows)))
    else:
        _print_table(heading, note, _CAMERA_COLUMNS, rows)


_CAMERA_COLUMNS = (
    "frames/s",
    "still",
    "streams per GPU",
    "bf16 a day",
    "int8 a day",
    "Redis, bf16",
    "Redis, int8",
    "store, bf16",
    "store, int8",
    "puts",
)


def _camera_row(sampling: Sampling, costs: Sequence[CameraCost], cameras: int) -> tuple[str, ...]:
    return (
        f"{sampling.fps:g}",
        f"{sampling.still:.0%}",
        f"{cameras:,}",
        *(_bytes(each.token_bytes_per_s * DAY_S) for each in costs),
        *(_bytes(cameras * each.token_bytes_per_s) + "/s" for each in costs),
        *(_bytes(cameras * each.store_bytes_per_s) + "/s" for each in costs),
        f"{_amount(cameras * costs[0].groups_per_s)}/s",
    )


def _camera(each: CameraCost) -> dict[str, float]:
    return asdict(each) | {
        "token_bytes_per_day": each.token_bytes_per_s * DAY_S,
        "footage_bytes_per_day": each.footage_bytes_per_s * DAY_S,
        "vector_bytes_per_day": each.vector_bytes_per_s * DAY_S,
        "redis_bytes_per_s": each.token_bytes_per_s,
        "store_bytes_per_s": each.store_bytes_per_s,
    }


# -- gpus -------------------------------------------------------------------------------------------------------------


def _gpus(args: argparse.Namespace) -> None:
    config = _model(args.model)
    if args.json:
        show.print_json([asdict(gpu) for gpu in GPUS.values()])
        return
    columns = (
        "GPU",
        "memory",
        "dense 16 bit",
        "bandwidth",
        "tiles/s",
        "positions/s",
        "tokens/s",
        "per replica",
        "peaks from",
    )
    rows = []
    for gpu in GPUS.values():
        rates = sizing.rates_for(config, MIXES["mixed"], gpu, gpu)
        rows.append(
            (
                gpu.name,
                f"{gpu.memory_bytes / 1e9:.0f} GB",
                f"{gpu.tflops:.0f} TFLOP/s",
                f"{gpu.memory_bytes_per_s / 1e9:,.0f} GB/s",
                f"{rates.tiles_per_s:,.0f}",
                f"{rates.positions_per_s:,.0f}",
                f"{rates.sequences / rates.step_of(rates.sequences):,.0f}",
                f"{rates.gpus}",
                gpu.source,
            )
        )
    if args.markdown:
        print("\n".join(markdown(columns, rows)))
        return
    first = next(iter(GPUS.values()))
    note = (
        f"assumed: {first.compute_share:.0%} of arithmetic, {first.bandwidth_share:.0%} of bandwidth are reached; "
        "tokens/s of one full batch"
    )
    _print_table(f"{config.name} on one GPU of each kind (decode: as many as a replica needs)", note, columns, rows)


# -- simulate ---------------------------------------------------------------------------------------------------------


def _simulate(args: argparse.Namespace) -> None:
    config, vision, decode = _model(args.model), _gpu(args.vision_gpu or args.gpu), _gpu(args.decode_gpu or args.gpu)
    if (args.trace is None) == (args.example is None):
        raise InvalidRequest(f"one of a trace file and --example ({', '.join(EXAMPLES)}) is needed")
    name = args.example or args.trace.name
    asked = EXAMPLES[args.example](args.seed, args.scale) if args.example else load.read_trace(args.trace)
    refusals = [load.refusal(config, arrival.ask) for arrival in asked]
    arrivals = [arrival for arrival, refusal in zip(asked, refusals, strict=True) if not refusal]
    refused = [refusal for refusal in refusals if refusal]
    if not arrivals:
        raise InvalidRequest(f"{name} holds no request that would be taken" + (f": {refused[0]}" if refused else ""))
    kinds = [(1 / len(arrivals), arrival.ask) for arrival in arrivals[:: max(1, len(arrivals) // 2000)]]
    mix = Mix(name, "", tuple((1 / len(kinds), ask) for _, ask in kinds))
    rates = sizing.rates_for(
        config, mix, vision, decode, tiles_per_s=args.tiles_per_s, positions_per_s=args.positions_per_s
    )
    plan = _plan(args)
    record = simulate(config, rates, arrivals, plan)
    report = _report(record, name, plan) | {"refused": len(refused)}
    if args.png:
        subtitle = (
            f"{config.name}, {_gpus_text(vision, decode)}: {rates.tiles_per_s:,.0f} tiles/s, "
            f"{rates.positions_per_s:,.0f} positions/s per pod"
        )
        draw(
            record, args.png, f"{name}: {len(arrivals):,} requests, two pools, each under its own autoscaler", subtitle
        )
        report["png"] = str(args.png)
    if args.json:
        show.print_json(report)
    else:
        _print_report(report)
        if refused:
            print(f"\nleft out, because it would be refused at the door: {len(refused):,}, the first for {refused[0]}")


def _plan(args: argparse.Namespace) -> Plan:
    values = rules.as_values()
    for path in args.values:
        try:
            given = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InvalidRequest(f"{path} cannot be read as values of the chart: {error}") from None
        if not isinstance(given, Mapping):
            raise InvalidRequest(f"{path} holds a {type(given).__name__}, not a chart's values")
        values = rules.merged(values, given)
    vision, decode = rules.from_values(values, args.decode_scaler or "")
    for pool, text in (("vision", args.vision_pods), ("decode", args.decode_pods)):
        if text:
            least, most = _range(text)
            change = {"min_replicas": least, "max_replicas": most}
            vision, decode = (
                (rules.changed(vision, **change), decode)
                if pool == "vision"
                else (vision, rules.changed(decode, **change))
            )
    if args.scale_to_zero:
        vision = rules.changed(vision, scale_to_zero=True)
    return Plan(
        vision=vision,
        decode=decode,
        vision_start_s=args.vision_start,
        decode_start_s=args.decode_start,
        most_ongoing=args.max_ongoing or rules.most_ongoing(values),
        missing=tuple(_span(text) for text in args.metrics_missing),
    )


def _report(record: Record, name: str, plan: Plan) -> dict[str, Any]:
    seconds = np.array([value for value in record.first_tokens_s() if value == value])
    percentiles = np.percentile(seconds, [50, 95, 99]) if len(seconds) else [0.0, 0.0, 0.0]
    return {
        "trace": name,
        "requests": len(record.works),
        "answered": record.answered,
        "lost": record.lost,
        "first_token_s": {f"p{p}": round(float(v), 3) for p, v in zip((50, 95, 99), percentiles, strict=True)},
        "vision": _pool_report(record.vision) | {"rules": plan.vision.kind},
        "decode": _pool_report(record.decode) | {"rules": plan.decode.kind},
    }


def _pool_report(pool: PoolRecord) -> dict[str, Any]:
    return {
        "least": min(pool.wanted),
        "most": max(pool.wanted),
        "pod_hours": round(pool.pod_s / 3600, 2),
        "turns": pool.turns,
        "events": [{"at_s": at, "from": before, "to": after} for at, before, after in pool.events],
    }


def _print_report(report: Mapping[str, Any]) -> None:
    first = report["first_token_s"]
    note = (
        f"{report['requests']:,} requests, {report['answered']:,} answered, {report['lost']} lost · "
        f"first token: median {_seconds(first['p50'])}, 95% {_seconds(first['p95'])}, 99% {_seconds(first['p99'])}"
    )
    rows = []
    for pool in ("vision", "decode"):
        one = report[pool]
        rows.append(
            (
                pool,
                one["rules"],
                f"{one['least']}–{one['most']}",
                f"{one['pod_hours']:.1f}",
                f"{len(one['events'])}",
                f"{one['turns']}",
            )
        )
    _print_table(report["trace"], note, ("pool", "scaled by", "pods", "pod hours", "scale events", "turns"), rows)
    for pool in ("vision", "decode"):
        steps = "  ".join(
            f"{event['at_s'] / 60:.0f}′ {event['from']}→{event['to']}" for event in report[pool]["events"]
        )
        print(f"{pool:7} {steps or 'never scaled'}")
    if "png" in report:
        print(f"\npicture: {report['png']}")


# -- what was typed ---------------------------------------------------------------------------------------------------


def _model(name: str | None) -> NvilaConfig:
    known = {make().name.lower(): make for make in PUBLISHED}
    if name is None:
        return PUBLISHED[0]()
    if name.lower() not in known:
        raise InvalidRequest(f"unknown model {name!r}; known: {', '.join(make().name for make in PUBLISHED)}")
    return known[name.lower()]()


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise InvalidRequest(f"unknown GPU {name!r}; known: {', '.join(GPUS)} (nvila capacity gpus)")
    return GPUS[name]


def _mix(name: str) -> Mix:
    if name not in MIXES:
        raise InvalidRequest(f"unknown mix {name!r}; known: {', '.join(MIXES)}")
    return MIXES[name]


def _range(text: str) -> tuple[int, int]:
    """`4` or `2..8`."""
    least, dots, most = text.partition("..")
    try:
        found = int(least), int(most if dots else least)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a number of pods such as 4, or a range such as 2..8") from None
    if not 0 <= found[0] <= found[1]:
        raise InvalidRequest(f"{text!r}: the range must go up from 0 or more")
    return found


def _span(text: str) -> tuple[float, float]:
    begin, _, end = text.partition("-")
    try:
        return float(begin), float(end)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a span of seconds such as 600-1200") from None


# -- how it is shown --------------------------------------------------------------------------------------------------


def _print_table(title: str, note: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = show.results()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(
            column, justify="left" if place == 0 and not rows[0][0][:1].isdigit() else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/]\n[dim]{note}[/]", soft_wrap=True)
    console.print(table)
    console.print()


def _gpus_text(vision: Gpu, decode: Gpu) -> str:
    return vision.name if vision is decode else f"vision on {vision.name}, decode on {decode.name}"


def _amount(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e3:.0f} kB"
