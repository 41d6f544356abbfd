"""`nvila model`: look into a checkpoint, convert it, verify it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvila.cli import show
from nvila.errors import InvalidRequest

if TYPE_CHECKING:
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.summary import Summary
    from nvila.model.verify import Finding


def run(args: argparse.Namespace) -> int:
    return {"inspect": _inspect, "convert": _convert, "verify": _verify}[args.action](args)


# -- inspect ----------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.summary import summarise

    checkpoint = Checkpoint.open(args.path)
    summary = summarise(checkpoint)
    if args.json:
        show.print_json(
            {
                "name": checkpoint.name,
                "layout": checkpoint.layout.style,
                "is_random": checkpoint.is_random,
                "config": json.loads(checkpoint.config.to_json()),
                **asdict(summary),
            }
        )
        return 0
    out = Console(highlight=False)
    for table in (_about(checkpoint), _parameters(summary), _images(summary), _videos(checkpoint, summary)):
        out.print(table)
        out.print()
    return 0


def _table(*titles: str, title: str = "", left: int = 1) -> Table:
    """Numbers to the right, the first `left` columns to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, title_justify="left", title=title)
    table.title_style = "bold"
    for place, name in enumerate(titles):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=place >= left)
    return table


def _about(checkpoint: Checkpoint) -> Table:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    tower, llm = config.tower, config.llm
    scales = f", scales {'/'.join(map(str, config.s2_scales))}" if config.s2_scales else ""
    if config.is_static_s2:
        scales += f" in {config.tower_px} px squares (static S2)"
    pools = " + ".join("×".join(map(str, pool)) for pool in config.pool_sizes)
    tied = "tied head" if llm.is_tied else "own head"
    about = {
        "layout": {"vila": "folders (vila)", "hf": "flat (hf)"}[checkpoint.layout.style],
        "images": f"{config.image_mode}, {config.tile_px} px tiles, {config.min_tiles}–{config.max_tiles}{scales}",
        "videos": f"{config.default_frames} frames by default, {config.max_frames} at most, pooled {pools}",
        "tower": f"SigLIP, {tower.blocks} of {tower.layers} blocks, width {tower.width}, {tower.heads} heads",
        "projector": f"{config.projector_type}, {config.projector_width} → {config.llm_width}, "
        f"{config.map_grid}×{config.map_grid} → {config.side}×{config.side} tokens",
        "language model": f"Qwen2, {llm.layers} blocks, width {llm.width}, {llm.heads} heads on {llm.kv_heads}, "
        f"{tied}, {llm.max_positions:,} positions",
        "tokens": f"{llm.vocab:,} rows, {tokenizer.size:,} in the tokenizer, image {tokenizer.image_id}, "
        f"video {tokenizer.video_id}, time {config.time_tokens}",
    }
    table = _table("", "", left=2, title=checkpoint.name + (" (random weights)" if checkpoint.is_random else ""))
    table.show_header = False
    for name, value in about.items():
        table.add_row(Text(name, style="dim"), value)
    return table


def _parameters(summary: Summary) -> Table:
    table = _table("module", "parameters", "stored", "as", "float32", "bfloat16", "int8", "W4", title="Weights")
    rows = [
        (m.name, m.parameters, m.stored_bytes, " ".join(m.dtypes), [m.memory_bytes[p] for p in m.memory_bytes])
        for m in summary.modules
    ]
    for name, parameters, stored, dtypes, memory in rows:
        table.add_row(name, f"{parameters:,}", _bytes(stored), dtypes, *map(_bytes, memory))
    sums = [sum(row[4][place] for row in rows) for place in range(4)]
    table.add_row(
        "all", f"{sum(r[1] for r in rows):,}", _bytes(sum(r[2] for r in rows)), "", *map(_bytes, sums), style="bold"
    )
    table.caption = "int8 and W4: matrices of linear layers, the rest in 16 bits"
    table.caption_justify, table.caption_style = "left", "dim"
    return table


def _images(summary: Summary) -> Table:
    table = _table("image", "grid", "tiles", "tokens", "positions", "record", title="Tokens per image")
    for image in summary.images:
        cost = image.cost
        table.add_row(
            f"{image.width_px}×{image.height_px}",
            f"{cost.grid[0]}×{cost.grid[1]}",
            str(cost.tiles),
            f"{cost.tokens:,}",
            f"{cost.positions:,}",
            _bytes(cost.record_bytes),
        )
    return table


def _videos(checkpoint: Checkpoint, summary: Summary) -> Table:
    from nvila.model import cost as costs

    table = _table("frames", "tiles", "tokens", "positions", "record", "keys and values", title="Tokens per video")
    for video in summary.videos:
        cost = video.cost
        table.add_row(
            str(video.frames),
            str(cost.tiles),
            f"{cost.tokens:,}",
            f"{cost.positions:,}",
            _bytes(cost.record_bytes),
            _bytes(costs.kv_bytes(checkpoint.config, cost.positions)),
        )
    table.caption, table.caption_justify, table.caption_style = "records, keys and values in bfloat16", "left", "dim"
    return table


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


# -- convert ----------------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.layouts import LayoutStyle
    from nvila.model.save import convert_checkpoint

    checkpoint = Checkpoint.open(args.source)
    with show.waiting(f"writing {args.target}"):
        target = convert_checkpoint(
            checkpoint.layout, args.target, LayoutStyle(args.to), shard_bytes=round(args.shard_gb * 1e9)
        )
        revision = Checkpoint.open(target).vision_revision
    files = sorted(path for path in target.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if revision != checkpoint.vision_revision:
        raise InvalidRequest(f"the copy differs from its source: vision revision {revision[:12]}")
    if args.json:
        show.print_json({"target": str(target), "layout": args.to, "files": len(files), "bytes": size})
    else:
        print(
            f"{target}: {args.to} layout, {len(files)} files, {_bytes(size)}, vision revision {revision[:12]} as before"
        )
    return 0


# -- verify -----------------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.verify import verify

    checkpoint = Checkpoint.open(args.path)
    findings = list(_shown(_recorded(args) if args.golden else verify(checkpoint), is_quiet=args.json))
    failed = sum(finding.problem is not None for finding in findings)
    if args.json:
        show.print_json({"name": checkpoint.name, "ok": not failed, "findings": [asdict(f) for f in findings]})
    elif failed:
        print(f"{failed} of {len(findings)} failed")
    else:
        print(f"{checkpoint.name}: all {len(findings)} as they should be")
    return 1 if failed else 0


def _shown(findings: Iterator[Finding], *, is_quiet: bool) -> Iterator[Finding]:
    out = Console(highlight=False)
    for finding in findings:
        if not is_quiet:
            sign = Text("✗ ", style="bold red") if finding.problem else Text("✓ ", style="green")
            out.print(sign + Text(f"{finding.name}  ") + Text(finding.problem or finding.note, style="dim"))
        yield finding


def _recorded(args: argparse.Namespace) -> Iterator[Finding]:
    """Every recorded case of the checkpoint's name, run against this copy of it."""
    from transformers.utils.logging import disable_progress_bar

    from nvila.golden.compare import Golden, run
    from nvila.golden.end_to_end import end_to_end
    from nvila.model.hub import locate
    from nvila.model.verify import Finding

    path = locate(args.path)

    class Against(Golden):
        """The recorded numbers of a checkpoint, with another folder in its place."""

        def checkpoint(self, name: str) -> Path:
            return path

    folder, stem = _recording(Path(args.golden), args.name or path.name)
    disable_progress_bar()  # transformers draws one per weight file
    for case in end_to_end(Against(folder, stem, ())):
        outcome = run(case)
        closest = outcome.closest
        note = f"within {closest.difference:.1e} of {closest.allowed:.0e} allowed" if closest else "exact"
        yield Finding(case.name, note, "; ".join(outcome.problems) or None)


def _recording(folder: Path, name: str) -> tuple[Path, str]:
    places = [folder, folder / "e2e"]
    for place in places:
        if (place / f"{name}.json").is_file():
            return place, name
    there = sorted(path.stem for path in places[1].glob("*.json"))
    raise InvalidRequest(
        f"{folder.name} has no recording of {name!r}; there are: {', '.join(there) or 'none'} (choose with --name)"
    )
