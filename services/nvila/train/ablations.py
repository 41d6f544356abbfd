"""The paper's ablations on nvila-tiny, one command each: variants trained alike and scored in a table.

Tables 1, 2, 3, 5 and 10 of arXiv:2412.04468 in their form, not in their numbers: this model has 9 million parameters
and answers generated tasks. Every variant starts from the same checkpoint and trains for the same time; runs lie in
folders of their own and go on where they were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nvila.model.checkpoint import Checkpoint
from nvila.train import adapters
from nvila.train.data.draw import Knobs
from nvila.train.loop import train_all
from nvila.train.nvila_tiny import TINY, TOY, learn_merges, make_base
from nvila.train.plot import read_metrics
from nvila.train.prune import prune
from nvila.train.recipes import (
    TINY_SCALES,
    Batch,
    Duration,
    Precision,
    Recipe,
    Reshape,
    finetuning,
    tiny_stage1,
    tiny_stage2,
    tiny_stage4,
    tiny_stage5,
)
from nvila.train.samples import Sample
from nvila.train.tables import Table

IMAGES = ("shapes", "scene", "documents", "tables", "charts")
VIDEOS = ("motion", "order", "counting", "brief")
PATCHES = TINY.tile_px // TINY.patch_px
"""Along a tile's side."""
TEST_SEED = 20_000
"""Of held-out samples; `train/data` keeps the splits' seeds apart besides."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`stages`: trained one after the other. `frames`: looked at when it is scored. `facts`: further columns."""

    label: str
    stages: tuple[Recipe, ...]
    frames: int = 32
    facts: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """`families`: what is scored, a column each; `columns`: names of the variants' facts; `note`: what to know besides
    of the table."""

    title: str
    variants: tuple[Variant, ...]
    families: tuple[str, ...]
    columns: tuple[str, ...] = ()
    note: str = ""


def ablate(
    table: str,
    out: Path,
    *,
    start: Path | None = None,
    seconds: float = 60,
    samples: int = 100,
    is_toy: bool = False,
    stop_after_s: float | None = None,
    lanes: int = 12,
    report: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> Table | None:
    """Train and score every variant of a table; None when time was up before the end, then the same call goes on.

    Writes `out/table-<n>.md`, `.json` and a picture of the scores. Without `start`, from random weights.
    """
    began = time.monotonic()
    start = start or make_base(
        out / "random", TOY if is_toy else TINY, learn_merges(_toy_texts(), 300) if is_toy else ()
    )
    study = STUDIES[table](seconds)
    if table == "3" and not is_toy:
        _make_lists(start, out)
    rows = []
    for number, variant in enumerate(study.variants):
        folder = out / f"table-{table}" / f"{number}-{_slug(variant.label)}"
        stages = tuple(_fitted(recipe, lanes, is_toy) for recipe in variant.stages)
        stages = tuple(replace(r, data=r.data.replace("listed:", f"listed:{out.resolve()}/")) for r in stages)
        left_s = None if stop_after_s is None else max(0.0, stop_after_s - (time.monotonic() - began))
        outcome = train_all(
            stages, start.resolve(), folder, stop_after_s=left_s, has_processes=not is_toy, report=report
        )
        if outcome.model is None:
            return None
        families = ("toy",) if is_toy else study.families
        scores = held_out_scores(
            outcome.model, folder / "scores.json", families, samples, 8 if is_toy else variant.frames
        )
        speed = _speed(folder / stages[-1].name / "metrics.jsonl")
        mean = sum(scores[family] for family in families) / len(families)
        rows.append((variant.label, *variant.facts, *(round(v, 1) for v in scores.values()), round(mean, 1), *speed))
    columns = ("variant", *study.columns, *scores, "mean", "training samples/s", "memory GB")
    note = " ".join(filter(None, (_note(seconds, samples, is_toy), study.note)))
    result = Table(title=study.title, columns=columns, rows=tuple(rows), note=note)
    (out / f"table-{table}.md").write_text(result.to_markdown() + "\n", "utf-8")
    (out / f"table-{table}.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
    _plot(result, len(scores), out / f"table-{table}.png")
    return result


# -- what is compared -------------------------------------------------------------------------------------------------


def _named(recipe: Recipe, seconds: float, **changes: Any) -> Recipe:
    return replace(recipe, duration=Duration(seconds=seconds), **changes)


def table_1(seconds: float) -> Study:
    """Scale, then compress: one tile, Dynamic-S2, 3×3 pooling, VEP, and compressors that learn."""

    def variant(label: str, mode: str, projector: str, *, has_vep: bool) -> Variant:
        reshape = Reshape(
            projector=projector, image_mode=mode, s2_scales=TINY_SCALES, max_tiles=9, pool_sizes=((8, 1, 1),)
        )
        vep = (_named(tiny_stage2(), seconds),) if has_vep else ()
        # The same time in all: without VEP, the last stage has it.
        last = _named(tiny_stage4(), seconds * (1 if has_vep else 2))
        stages = (_named(tiny_stage1(), seconds / 2, reshape=reshape), *vep, last)
        return Variant(label=label, stages=stages, facts=(_tokens(mode, projector),))

    s2 = "dynamic_s2"
    return Study(
        title="Spatial: scale, then compress (Table 1)",
        variants=(
            variant("one tile", "resize", "mlp_downsample", has_vep=False),
            variant("Dynamic-S2", s2, "mlp_downsample", has_vep=False),
            variant("Dynamic-S2, 3×3", s2, "mlp_downsample_3x3_fix", has_vep=False),
            variant("Dynamic-S2, 3×3, VEP", s2, "mlp_downsample_3x3_fix", has_vep=True),
            variant("TokenLearner 3×3, VEP", s2, "token_learner_3x3", has_vep=True),
            variant("Perceiver 3×3, VEP", s2, "resampler_3x3", has_vep=True),
        ),
        families=IMAGES,
        columns=("tokens, 448 px",),
    )


def _tokens(mode: str, projector: str) -> int:
    side = -(-PATCHES // (3 if "3x3" in projector else 2))
    return side**2 * (1 if mode == "resize" else 4)


def table_2(seconds: float) -> Study:
    """Frames, and pooling over time at equal tokens."""

    def variant(frames: int, group: int) -> Variant:
        reshape = Reshape(pool_sizes=((group, 1, 1),), video_frames=frames)
        stage5 = tiny_stage5()
        recipe = _named(
            stage5,
            2 * seconds,
            data="synthetic:videos",
            reshape=reshape,
            prepare=replace(stage5.prepare, frames=(frames,), max_positions=20_000),
            batch=replace(stage5.batch, row_positions=max(4096, frames // group * 66 + 512)),
        )
        pooled = f"pooled by {group}" if group > 1 else "not pooled"
        return Variant(
            label=f"{frames} frames, {pooled}", stages=(recipe,), frames=frames, facts=(frames // group * 64,)
        )

    longest = Knobs().video_fps * Knobs().clip_s[1]
    return Study(
        title="Temporal: scale, then compress (Table 2)",
        variants=(variant(8, 1), variant(32, 1), variant(32, 4), variant(256, 8), variant(256, 32)),
        families=VIDEOS,
        columns=("tokens",),
        note=f"Clips have at most {longest:g} frames: 256 are those again, more than twice.",
    )


def table_3(seconds: float) -> Study:
    """Pruning to one half: training on what `_make_lists` kept of generated data, by each rule."""

    def variant(by: str, label: str, kept: str) -> Variant:
        data = f"listed:{by}/kept.json"
        return Variant(label=label, stages=(_named(tiny_stage4(), seconds, data=data),), facts=(kept,))

    return Study(
        title="Data-set pruning (Table 3)",
        variants=(
            variant("all", "everything", "100 %"),
            variant("random", "random", "50 %"),
            variant("cluster", "cluster", "50 %"),
            variant("delta", "DeltaLoss", "50 %"),
        ),
        families=IMAGES,
        columns=("kept",),
    )


PRUNED = "synthetic:shapes+scene+documents+tables+charts"


def _make_lists(start: Path, out: Path) -> None:
    """Large: `start`; small: the same shape with random weights, which knows the language of no task."""
    small = make_base(out / "small", TINY, seed=1)
    for by, keep in (("all", 1.0), ("random", 0.5), ("cluster", 0.5), ("delta", 0.5)):
        if not (out / by / "kept.json").exists():
            prune(start, small, PRUNED, out / by, keep=keep, by="random" if by == "all" else by)


def table_5(seconds: float) -> Study:
    """Fine-tuning: what of the tower and the language model learns."""

    def variant(method: str, tower: str) -> Variant:
        recipe = finetuning(method, tower, lr=1e-4 if method == "full" else 3e-4)
        stage = tiny_stage4()
        fitted = _named(
            recipe, seconds, data="synthetic:charts+tables", batch=stage.batch, prepare=stage.prepare, recomputes=False
        )
        return Variant(label=f"LLM {method}, tower {tower}", stages=(fitted,))

    towers = ("frozen", "norms", "lora", "full")
    obstacle = adapters.obstacle_to_4_bits()
    methods = ("lora", "full") if obstacle else ("lora", "full", "qlora")
    return Study(
        title="Fine-tuning (Table 5)",
        variants=tuple(variant(method, tower) for method in methods for tower in towers),
        families=("tables", "charts"),
        note=f"Open: {obstacle}." if obstacle else "",
    )


def table_10(seconds: float) -> Study:
    """Temporal localisation: of when-questions, mean IoU (as a percentage) and how many reach one half, by targets and
    by frames."""

    def variant(label: str, std: float, frames: int) -> Variant:
        stage5 = tiny_stage5()
        prepare = replace(stage5.prepare, frames=(frames,))
        recipe = _named(stage5, 2 * seconds, data="synthetic:when*3+videos", time_std=std, prepare=prepare)
        return Variant(label=label, stages=(recipe,), frames=frames)

    return Study(
        title="Temporal localisation (Table 10)",
        variants=(
            variant("32 frames, hard targets", 1e-3, 32),
            variant("32 frames, smoothed", 1.0, 32),
            variant("64 frames, smoothed", 1.0, 64),
        ),
        families=("when",),
    )


STUDIES: dict[str, Callable[[float], Study]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "5": table_5,
    "10": table_10,
}


def _fitted(recipe: Recipe, lanes: int, is_toy: bool) -> Recipe:
    if not is_toy:
        rows = -(-recipe.batch.rows // lanes) * lanes
        return replace(recipe, batch=replace(recipe.batch, rows=rows, lanes=lanes))
    reshape = recipe.reshape
    if reshape is not None:
        scales = None if reshape.s2_scales is None else (TOY.tile_px, 2 * TOY.tile_px)
        reshape = replace(reshape, s2_scales=scales, max_tiles=4 if scales else None)
    return replace(
        recipe,
        data="toy",
        duration=Duration(steps=2),
        batch=Batch(rows=1, row_positions=1024, row_tiles=64),
        prepare=replace(recipe.prepare, max_positions=1024, frames=tuple(min(f, 32) for f in recipe.prepare.frames)),
        precision=Precision.FLOAT32,
        recomputes=False,
        reshape=reshape,
    )


# -- scores -----------------------------------------------------------------------------------------------------------


def held_out_scores(model: Path, kept: Path, families: Sequence[str], samples: int, frames: int) -> dict[str, float]:
    """Mean score per family, in percent, and precision at one half of those that are intervals in time; kept beside the
    run, so that a second call for the same samples costs nothing."""
    from nvila.train.evaluation.model import ModelAnswerer
    from nvila.train.evaluation.run import evaluate

    asked = {"families": list(families), "samples": samples, "seed": TEST_SEED, "frames": frames}
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if known.get("asked") == asked:
        scores: dict[str, float] = known["scores"]
        return scores
    config = Checkpoint.open(model).config
    group = config.temporal_group
    answerer = ModelAnswerer.load(
        model,
        device="cuda" if torch.cuda.is_available() else "cpu",
        frames=-(-frames // group) * group,
        batch=16,
        max_tokens=32,
    )
    try:
        scores = {}
        for family in families:
            answers = evaluate(
                _held_out(family, samples), answerer, None, lambda _: None, time_tokens=config.time_tokens
            )
            scores[family] = 100 * sum(answer.score for answer in answers) / len(answers)
            if all(answer.metric == "interval" for answer in answers):
                reached = sum(answer.score >= 0.5 for answer in answers)
                scores[f"{family}, P@0.5"] = 100 * reached / len(answers)
    finally:
        answerer.close()
    kept.write_text(json.dumps({"asked": asked, "scores": scores}), "utf-8")
    return scores


def _held_out(family: str, samples: int) -> Iterator[Sample]:
    if family == "toy":
        from nvila.train.toy import make

        yield from (make(n, TEST_SEED, is_video=n % 4 == 3) for n in range(samples))
        return
    from nvila.train.data.catalogue import make_sample
    from nvila.train.data.draw import Split

    yield from (make_sample(family, Split.TEST, TEST_SEED, n) for n in range(samples))


def _speed(metrics: Path) -> tuple[float, float | None]:
    """Samples per second of training without the first steps, and the most memory, where a GPU tells."""
    lines = read_metrics(metrics)
    settled = lines[min(5, len(lines) // 2) :]
    rate = sum(line["samples"] for line in settled) / max(1e-9, sum(line["seconds"] for line in settled))
    memory = max((line["memory_gb"] for line in lines if "memory_gb" in line), default=None)
    return round(rate, 1), None if memory is None else round(memory, 2)


def _note(seconds: float, samples: int, is_toy: bool) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if is_toy:
        return f"Toy run ({device}): two steps per stage, which only shows that the command works; scores mean nothing."
    return f"{device}; {seconds:g} s of training per stage and variant; {samples} held-out samples per family; percent."


def _plot(table: Table, families: int, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = len(table.columns) - 3 - families
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.55 * len(table.rows)))
    labels = [str(row[0]) for row in table.rows]
    axes.barh(labels, [row[first + families] for row in table.rows], color="#9ecae1", label="mean")
    for place in range(families):
        column = first + place
        axes.plot([row[column] for row in table.rows], labels, "o", markersize=5, label=table.columns[column])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of held-out samples")
    axes.set_title(table.title, fontsize=10)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-")


def _toy_texts() -> Iterator[str]:
    from nvila.train.toy import texts

    return texts()
