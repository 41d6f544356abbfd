"""A trained model into the published layout: what the checkpoint that it started from had, with what was learned.

Tensors that a checkpoint holds and NVILA does not use (SigLIP's last block and final norm) go along unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import POSITIONS, RANDOM_KEY, TOWER_PREFIX, Checkpoint
from nvila.model.layouts import Layout, LayoutStyle, Part
from nvila.model.projector import Projector
from nvila.model.save import save_checkpoint
from nvila.train.distributed import whole
from nvila.train.model import TrainableNvila
from nvila.train.recipes import Reshape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    model: TrainableNvila,
    source: Checkpoint,
    target: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    style: LayoutStyle = LayoutStyle.VILA,
    is_writer: bool = True,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `target`, whole or not at all. Every process calls; the one with `is_writer` writes."""
    tensors = {part: _tensors(module) for part, module in _modules(model).items()}
    if not is_writer:
        return
    weights: dict[Part, dict[str, Tensor]] = {}
    for part, learned in tensors.items():
        stored = {} if part is not Part.TOWER else source.layout.weights(part).tensors()
        merged = {**stored, **learned}
        weights[part] = {name: tensor.to(dtype) for name, tensor in merged.items()}
    if not weights[Part.PROJECTOR]:
        del weights[Part.PROJECTOR]
    save_checkpoint(_described(source.layout, dtype), weights, target, style, shard_bytes)


def _modules(model: TrainableNvila) -> dict[Part, nn.Module]:
    return {Part.TOWER: model.tower, Part.PROJECTOR: model.projector, Part.LLM: model.llm}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters as a checkpoint names them: adapters merged by now, tied ones once, the tower under its prefix."""
    from nvila.model.siglip import Tower

    prefix = TOWER_PREFIX if isinstance(module, Tower) else ""
    return {prefix + name: whole(p.detach()).cpu() for name, p in module.named_parameters()}


def _described(layout: Layout, dtype: torch.dtype) -> Layout:
    name = str(dtype)
    root = {key: value for key, value in layout.root.items() if key != RANDOM_KEY} | {"model_dtype": name}
    short = name.removeprefix("torch.")
    parts: dict[str, Any] = {
        part: {**getattr(layout, part), "torch_dtype": short} for part in ("llm", "tower", "projector")
    }
    return replace(layout, root=_without_copies(root), **parts)


def _without_copies(root: dict[str, Any]) -> dict[str, Any]:
    """The parts' configurations, which are written beside again from the parts themselves."""
    return {key: value for key, value in root.items() if key not in {f"{part}_cfg" for part in Part}}


# -- another head -----------------------------------------------------------------------------------------------------


def reshape_checkpoint(source: Checkpoint, target: Path, change: Reshape) -> Path:
    """The same tower and language model with other words about images and videos.

    The projector is a fresh one where it is named. Where it is not, and more scales are joined than before, it is the
    old one with more channels: it sees in the largest scale what it saw in the only one, and in the others nothing yet.
    """
    layout = source.layout
    root: dict[str, Any] = _without_copies(dict(layout.root))
    if change.image_mode is not None:
        root |= {"image_aspect_ratio": change.image_mode, "dynamic_s2": change.image_mode == "dynamic_s2"}
    if change.s2_scales is not None:
        scales = change.s2_scales
        root |= {"s2_scales": ",".join(map(str, scales)), "s2_max_split_size": scales[0]}
        root |= {"s2_resize_output_to_scale_idx": -1}
    if change.max_tiles is not None:
        root["max_tiles"] = change.max_tiles
    if change.pool_sizes is not None:
        root["video_encoder"] = {
            "_target_": "llava.model.encoders.TSPVideoEncoder",
            "pool_sizes": [list(pool) for pool in change.pool_sizes],
        }
    if change.video_frames is not None:
        root["num_video_frames"] = change.video_frames
    kind = change.projector or layout.projector["mm_projector_type"]
    projector = {**layout.projector, "mm_projector_type": kind}
    scale_count = len(str(root["s2_scales"]).split(",")) if root.get("dynamic_s2") else 1
    root["mm_hidden_size"] = source.config.tower.width * scale_count
    described = replace(layout, root=root, projector=projector)
    from nvila.model.published import read_config

    config = read_config(
        name=described.name,
        root=root,
        llm=described.llm,
        tower=described.tower,
        projector=projector,
        processor=described.processor,
        encode=source.tokenizer().encode_markup,
    )
    with torch.random.fork_rng():
        torch.manual_seed(change.seed)
        fresh = dict(Projector.of(config).state_dict())
    weights = {
        Part.LLM: layout.weights(Part.LLM).tensors(),
        Part.TOWER: layout.weights(Part.TOWER).tensors(),
        Part.PROJECTOR: fresh if change.projector is not None else _widened(source, fresh),
    }
    if config.tile_px != source.config.tile_px:
        raise InvalidRequest(f"tiles of {config.tile_px} px need another position table than {POSITIONS}'s")
    return save_checkpoint(described, weights, target)


def _widened(source: Checkpoint, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projector of `source` in the shapes of `fresh`; fresh as a whole where it cannot be.

    The channels of a cell's scales follow each other (NVILA-SPEC §3.3), cell after cell.
    """
    width = source.config.projector_width
    widened = source.projector_weights()
    for name, tensor in fresh.items():
        old = widened.get(name)
        if old is None or old.shape[:-1] != tensor.shape[:-1]:
            return fresh
        if old.shape == tensor.shape:
            continue
        scales, left = divmod(tensor.shape[-1], old.shape[-1])
        if left or old.shape[-1] % width:
            return fresh
        cells = old.reshape(*old.shape[:-1], -1, 1, width)
        is_norm = tensor.ndim == 1
        unseen = cells if is_norm else torch.zeros_like(cells)
        widened[name] = torch.cat([*[unseen] * (scales - 1), cells], -2).flatten(-3)
    return widened
