"""Training runs as functions: each returns the whole configuration of one stage, frozen; a variant changes two fields.

Which modules train, learning rates, batch and length of the published stages are those of the launch scripts of
NVlabs/VILA (scripts/NVILA, scripts/NVILA-Lite; NVILA-SPEC §8.1): one epoch, AdamW, no weight decay, cosine after 3 % of
warm-up, bf16, gradient checkpointing. One difference: a batch is counted in positions here, because rows are packed;
the scripts count samples (`_rows`). The nvila-tiny recipes train a model from nothing on generated data, most of it by
Muon: on the first 240 steps of the tower stage (24 tiles each, two cores) its letters were 16 % right, AdamW's 6 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from nvila.errors import InvalidRequest, NotFound
from nvila.train.prepare import PrepareSettings
from nvila.types import MediaKind

TOWER, PROJECTOR, LLM = "tower", "projector", "llm"
"""`train.model.Module`'s values; recipes are read without torch."""


class Precision(StrEnum):
    """FLOAT32: for processors. BF16: autocast, weights and optimizer in float32. FP8: besides, the language model's
    large linear layers in FP8 (train/fp8.py), where the GPU can."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW. `projector_lr`, `tower_lr`: instead of `lr` for those modules. `warmup`: share of the run. `clip_norm`:
    0 for none. `states`: `float32`, `8bit` or `fp8` moments (torchao). Biases and norms never decay.

    `muon`: matrices inside blocks by Muon (github.com/KellerJordan/Muon; `torch.optim.Muon`), at so many times their
    module's rate; 0 for AdamW throughout.
    """

    lr: float
    projector_lr: float | None = None
    tower_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.03
    clip_norm: float = 1.0
    states: str = "float32"
    muon: float = 0.0

    def __post_init__(self) -> None:
        if self.muon and self.states != "float32":
            raise InvalidRequest(f"Muon keeps its moments in float32, not in {self.states}", param="states")


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a stage is: exactly one of steps, epochs of its data, seconds of training (resumed time counts on)."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if sum(value > 0 for value in (self.steps, self.epochs, self.seconds)) != 1:
            raise InvalidRequest("a stage lasts some steps, epochs or seconds: exactly one of them")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One optimizer step: `rows` packed rows of at most `row_positions` positions and `row_tiles` tower tiles.

    `lanes`: streams that the data are dealt into; row k is filled from lane k mod lanes, so that the batches are the
    same however many processes share the lanes. Each lane has its own feeding process where `nvila train` has them. A
    run keeps the lanes that it began with, which are raised to a multiple of its processes.
    """

    rows: int
    row_positions: int
    row_tiles: int = 512
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.rows % self.lanes:
            raise InvalidRequest(f"{self.rows} rows cannot be dealt from {self.lanes} lanes evenly")

    @property
    def positions(self) -> int:
        return self.rows * self.row_positions

    def dealt_to(self, processes: int) -> Batch:
        """With the fewest further lanes, and rows from them, that so many processes can share evenly."""
        lanes = math.ceil(self.lanes / processes) * processes
        return replace(self, rows=math.ceil(self.rows / lanes) * lanes, lanes=lanes)


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """A stage that begins with another head on the same tower and language model: a projector with fresh weights, and
    what the configuration says about images and videos. None keeps a field; a projector that is kept takes more scales
    in (`export.reshape_checkpoint`)."""

    projector: str | None = None
    image_mode: str | None = None
    s2_scales: tuple[int, ...] | None = None
    max_tiles: int | None = None
    pool_sizes: tuple[tuple[int, int, int], ...] | None = None
    video_frames: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Fine-tuning with few parameters (NVILA-SPEC §8.4). `bits`: 4 stores the frozen language model in nf4 (QLoRA)."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    on: tuple[str, ...] = (LLM,)
    bits: int = 16
    use_dora: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage. `data`: what `train/feed.py` opens. `tower_norms_only`: of the tower, only LayerNorms learn.

    `fp8_smallest`: linears whose smaller side is below it stay in bf16 (NVILA-SPEC §8.3: 3,584). `save_every`: steps
    between checkpoints; `save_every_s`: seconds, whichever comes first. `kinds`: samples with other media are left out.
    """

    name: str
    stage: str
    trained: tuple[str, ...]
    optim: Optim
    duration: Duration
    batch: Batch
    data: str
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    precision: Precision = Precision.BF16
    fp8_smallest: int = 3584
    recomputes: bool = True
    time_std: float = 1.0
    seed: int = 0
    skips_bad: bool = True
    kinds: tuple[MediaKind, ...] = (MediaKind.IMAGE, MediaKind.VIDEO)
    reshape: Reshape | None = None
    adapters: Adapters | None = None
    tower_norms_only: bool = False
    save_every: int = 500
    save_every_s: float = 120.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# -- published stages -------------------------------------------------------------------------------------------------

MEAN_POSITIONS = 1024
"""Assumed of a sample when a batch of samples becomes a batch of positions; real mixtures vary from 200 to 12,000."""


def _rows(samples: int, length: int) -> Batch:
    return Batch(rows=max(1, samples * MEAN_POSITIONS // length), row_positions=length)


def _nvila(
    name: str, stage: str, trained: tuple[str, ...], lr: float, samples: int, length: int, clip_norm: float = 1.0
) -> Recipe:
    return Recipe(
        name=name,
        stage=stage,
        trained=trained,
        optim=Optim(lr=lr, clip_norm=clip_norm),
        duration=Duration(epochs=1),
        batch=_rows(samples, length),
        data="",
        prepare=PrepareSettings(max_positions=length),
    )


EVERYTHING = (TOWER, PROJECTOR, LLM)


def nvila_stage1() -> Recipe:
    """Projector initialisation."""
    return _nvila("nvila-stage1", "projector", (PROJECTOR,), 1e-3, 512, 8192)


def nvila_stage2() -> Recipe:
    """Visual-encoder pre-training: gives back what spatial compression costs."""
    return _nvila("nvila-stage2", "vep", (TOWER, PROJECTOR), 2e-5, 1024, 8192, 5.0)


def nvila_stage3() -> Recipe:
    """Token-processor pre-training."""
    return _nvila("nvila-stage3", "pretrain", (PROJECTOR, LLM), 2e-5, 1024, 8192)


def nvila_stage4() -> Recipe:
    """Image instruction tuning."""
    return _nvila("nvila-stage4", "image", EVERYTHING, 1.5e-5, 1024, 8192, 5.0)


def nvila_stage5() -> Recipe:
    """Video instruction tuning."""
    recipe = _nvila("nvila-stage5", "video", EVERYTHING, 2e-5, 2048, 16384)
    return replace(recipe, prepare=replace(recipe.prepare, frames=(256,)))


def lite_stage1() -> Recipe:
    """NVILA-Lite, projector initialisation."""
    return _nvila("lite-stage1", "projector", (PROJECTOR,), 1e-3, 2048, 4096)


def lite_stage2() -> Recipe:
    """NVILA-Lite, visual-encoder pre-training."""
    return _nvila("lite-stage2", "vep", (TOWER, PROJECTOR), 5e-5, 1024, 4096)


def lite_stage3() -> Recipe:
    """NVILA-Lite, token-processor pre-training."""
    return _nvila("lite-stage3", "pretrain", (PROJECTOR, LLM), 5e-5, 1024, 4096)


def lite_stage4() -> Recipe:
    """NVILA-Lite, instruction tuning."""
    return _nvila("lite-stage4", "image", EVERYTHING, 2e-5, 2048, 4096)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def finetune_lora() -> Recipe:
    """LoRA on the language model, the tower's LayerNorms at a tenth of its rate, the projector fully (NVILA-SPEC §8.4).

    The paper's finding: a tower rate 5 to 50 times smaller than the language model's.
    """
    recipe = _nvila("finetune-lora", "finetune", (TOWER, PROJECTOR), 1e-4, 64, 8192)
    return replace(
        recipe,
        optim=replace(recipe.optim, tower_lr=1e-5, projector_lr=2e-5),
        adapters=Adapters(),
        tower_norms_only=True,
        prepare=replace(recipe.prepare, tiles_every_image=False),
    )


def finetune_qlora() -> Recipe:
    """The same on a language model that is stored in 4 bits: an 8B's linear layers are 3.4 GB, which float32 has 26 of.
    Its embeddings and head stay in float32."""
    return replace(finetune_lora(), name="finetune-qlora", adapters=Adapters(bits=4))


def finetune_full() -> Recipe:
    """Every parameter, the tower at a tenth of the rate."""
    recipe = _nvila("finetune-full", "finetune", EVERYTHING, 2e-5, 64, 8192)
    return replace(
        recipe,
        optim=replace(recipe.optim, tower_lr=2e-6),
        prepare=replace(recipe.prepare, tiles_every_image=False),
    )


def finetuning(method: str, tower: str = "norms", *, tower_ratio: float = 10.0, lr: float | None = None) -> Recipe:
    """`method`: lora, qlora or full, of the language model; `tower`: norms, full, lora or frozen, at a rate
    `tower_ratio` times smaller than the language model's."""
    recipe = {"lora": finetune_lora, "qlora": finetune_qlora, "full": finetune_full}[method]()
    rate = lr or recipe.optim.lr
    trained = tuple(part for part in recipe.trained if part != TOWER or tower in ("norms", "full"))
    adapters = recipe.adapters
    if tower == "lora":
        adapters = replace(adapters or Adapters(on=()), on=(*(adapters.on if adapters else ()), TOWER))
    return replace(
        recipe,
        name=f"finetune-{method}-tower-{tower}",
        trained=trained,
        adapters=adapters,
        tower_norms_only=tower == "norms",
        optim=replace(recipe.optim, lr=rate, tower_lr=rate / tower_ratio),
    )


# -- nvila-tiny -------------------------------------------------------------------------------------------------------

TINY_SHARE = {
    "tower": 0.10,
    "base": 0.29,
    "projector": 0.01,
    "vep": 0.01,
    "pretrain": 0.01,
    "image": 0.08,
    "video": 0.50,
}
"""Of the whole training time, by stage (`family`): as the minutes of `models/nvila-tiny` were."""

TINY_SCALES = (224, 448)
TINY_POOLS = ((8, 1, 1),)
TINY_ONE_TILE = "synthetic:describing*6+page*3+reading+shapes>28"
TINY_SEEING = "synthetic:describing*6+page*3+reading*2+images*4"
TINY_IMAGES = "synthetic:describing*2+page*2+reading+images*6"
TINY_TOWER_LR = 1e-4
"""Where answers train it: a tenth of what naming patches does, which tells it far more in each step."""
TINY_MIXTURE = "synthetic:narrating*2+videos*6+describing*2+images*6"


def _tiny(stage: str, trained: tuple[str, ...], lr: float, data: str, seed: int) -> Recipe:
    return Recipe(
        name=f"nvila-tiny-{stage}",
        stage=stage,
        trained=trained,
        optim=Optim(lr=lr, betas=(0.9, 0.98), weight_decay=0.02, warmup=0.05, muon=5.0),
        duration=Duration(seconds=1200 * TINY_SHARE[stage]),
        batch=Batch(rows=2, row_positions=2560, row_tiles=64, lanes=2),
        data=data,
        prepare=PrepareSettings(
            max_positions=2560,
            tiles_every_image=False,
            frames=(8, 16, 16, 32),
            names_tokens=True,
            spells=True,
            asks_apart=True,
        ),
        recomputes=False,
        seed=seed,
        save_every=10_000,
        save_every_s=45.0,
    )


def tiny_tower() -> Recipe:
    """In place of SigLIP's own pre-training: shapes, colours and letters, patch by patch."""
    recipe = _tiny("tower", (TOWER,), 1e-3, "synthetic:patches@16000", 0)
    positions = 1 + 5 * 14 * 14
    return replace(
        recipe,
        batch=replace(recipe.batch, row_positions=12 * positions),
        prepare=replace(recipe.prepare, max_positions=positions, names_patches=True),
    )


def tiny_base() -> Recipe:
    """In place of Qwen2's own pre-training: projector and language model, one tile per picture.

    Cheap samples (one tile, 49 visual tokens, everything told that is to be seen) teach the language model what the
    tower's features say, and the language of the tasks. The tower rests: moved by the gradients of a language model
    that knows nothing yet, it forgot its letters within 600 steps (79 % named rightly before, 18 % after).
    """
    return _tiny("base", (PROJECTOR, LLM), 4e-4, TINY_ONE_TILE, 1)


def tiny_stage1() -> Recipe:
    """Projector initialisation: a projector that takes Dynamic-S2's joined scales, and nothing else."""
    reshape = Reshape(
        image_mode="dynamic_s2",
        s2_scales=TINY_SCALES,
        max_tiles=9,
        pool_sizes=TINY_POOLS,
        video_frames=256,
    )
    return replace(_tiny("projector", (PROJECTOR,), 2e-3, TINY_SEEING, 2), reshape=reshape)


def tiny_stage2() -> Recipe:
    """Visual-encoder pre-training."""
    recipe = _tiny("vep", (TOWER, PROJECTOR), 6e-4, TINY_SEEING, 3)
    return replace(recipe, optim=replace(recipe.optim, tower_lr=TINY_TOWER_LR))


def tiny_stage3() -> Recipe:
    """Token-processor pre-training."""
    recipe = _tiny("pretrain", (PROJECTOR, LLM), 6e-4, TINY_MIXTURE, 4)
    return replace(recipe, prepare=replace(recipe.prepare, frames=(8, 32, 16, 64)))


def tiny_stage4() -> Recipe:
    """Image instruction tuning. The tower rests, as the paper's does not: it names what it sees since its own stage,
    and on a processor its gradients would halve the samples of a minute."""
    return _tiny("image", (PROJECTOR, LLM), 5e-4, TINY_IMAGES, 5)


def tiny_stage5() -> Recipe:
    """Video instruction tuning, images among it, so that they are not forgotten; up to 256 frames.

    The tower stays as the pictures left it, and sees each picture of a clip once (`prepare.Prepared`).
    """
    recipe = _tiny("video", (PROJECTOR, LLM), 5e-4, TINY_MIXTURE, 6)
    return replace(
        recipe,
        batch=replace(recipe.batch, row_tiles=256),
        prepare=replace(recipe.prepare, frames=(32, 64, 16, 128, 32, 64, 32, 256, 32, 64, 8, 128, 32, 64, 16, 256)),
    )


TINY_STAGES = (tiny_tower, tiny_base, tiny_stage1, tiny_stage2, tiny_stage3, tiny_stage4, tiny_stage5)


# -- toy: seconds on a processor --------------------------------------------------------------------------------------


def toy_stages(steps: int = 6) -> tuple[Recipe, ...]:
    """The five stages on a toy task, for proving the machinery; start from `nvila_tiny.make_base(shape=TOY)`."""
    return tuple(
        replace(
            stage(),
            name=f"toy-{number}",
            data="toy",
            duration=Duration(steps=steps),
            batch=Batch(rows=2, row_positions=512, row_tiles=32, lanes=2),
            prepare=PrepareSettings(max_positions=512, tiles_every_image=False, frames=(8,)),
            precision=Precision.FLOAT32,
            recomputes=False,
            reshape=Reshape(projector="mlp_downsample", image_mode="dynamic_s2", s2_scales=(56, 112), max_tiles=4)
            if number == 1
            else None,
            save_every=2,
        )
        for number, stage in enumerate(TINY_STAGES[2:], 1)
    )


def toy_smoke() -> Recipe:
    """Two minutes on one processor core: enough for a toy model to know colours."""
    return replace(
        tiny_base(),
        name="toy-smoke",
        data="toy:images",
        optim=Optim(lr=2e-3, warmup=0.05, betas=(0.9, 0.98)),
        duration=Duration(steps=150),
        batch=Batch(rows=1, row_positions=1024, row_tiles=32),
        prepare=PrepareSettings(max_positions=1024, tiles_every_image=False, frames=(8,)),
        precision=Precision.FLOAT32,
        save_every=50,
    )


# -- finding them -----------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[], Recipe]] = {
    make().name: make
    for make in (
        nvila_stage1,
        nvila_stage2,
        nvila_stage3,
        nvila_stage4,
        nvila_stage5,
        lite_stage1,
        lite_stage2,
        lite_stage3,
        lite_stage4,
        finetune_lora,
        finetune_qlora,
        finetune_full,
        *TINY_STAGES,
        toy_smoke,
    )
}


def recipe_named(name: str) -> Recipe:
    """Raises `NotFound` listing what there is."""
    if name not in RECIPES:
        raise NotFound(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def family(name: str, *, minutes: float | None = None) -> tuple[Recipe, ...]:
    """All stages of a model in order: `nvila`, `lite`, `nvila-tiny` or `toy`. `minutes`: shared out among the stages of
    nvila-tiny in its proportions."""
    families: dict[str, Callable[[], tuple[Recipe, ...]]] = {
        "nvila": lambda: tuple(s() for s in (nvila_stage1, nvila_stage2, nvila_stage3, nvila_stage4, nvila_stage5)),
        "lite": lambda: tuple(s() for s in (lite_stage1, lite_stage2, lite_stage3, lite_stage4)),
        "nvila-tiny": lambda: tuple(stage() for stage in TINY_STAGES),
        "toy": toy_stages,
    }
    if name not in families:
        raise NotFound(f"no family of recipes {name!r}; there are {', '.join(families)}")
    stages = families[name]()
    if minutes is None:
        return stages
    if name != "nvila-tiny":
        raise InvalidRequest("only the stages of nvila-tiny are measured in time")
    return tuple(replace(r, duration=Duration(seconds=minutes * 60 * TINY_SHARE[r.stage])) for r in stages)


def recipe_from(record: dict[str, Any]) -> Recipe:
    """The recipe that a run's record holds (`Recipe.to_json`)."""

    def tuples(fields: dict[str, Any]) -> dict[str, Any]:
        return {key: _tupled(value) for key, value in fields.items()}

    parts: dict[str, Any] = {
        "optim": Optim(**tuples(record["optim"])),
        "duration": Duration(**record["duration"]),
        "batch": Batch(**record["batch"]),
        "prepare": PrepareSettings(**tuples(record["prepare"])),
        "precision": Precision(record["precision"]),
        "kinds": tuple(MediaKind(kind) for kind in record["kinds"]),
        "reshape": Reshape(**tuples(record["reshape"])) if record["reshape"] else None,
        "adapters": Adapters(**tuples(record["adapters"])) if record["adapters"] else None,
    }
    return Recipe(**tuples(record) | parts)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
