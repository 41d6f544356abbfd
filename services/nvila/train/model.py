"""NVILA in training: tiles and ids of a packed row in, a loss out. One device, one row, readable from top to bottom.

tower -> scales merged or tiles as they are -> projector -> pooling -> splice -> language model -> loss. What is between
tower and splice is the code that serves (`model/encoder.py`). Sharding, mixed precision, FP8 and adapters wrap this
from outside. Modules that are not trained are in eval mode and make no gradients (NVILA-SPEC §8.1).

N tiles · U different ones among them · S tile side · T visual tokens · P positions of the row ·
D language-model width · n targets · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute
from transformers import Qwen2ForCausalLM

from nvila.errors import InvalidCheckpoint
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import ImageMode
from nvila.model.encoder import tower_features, visual_tokens
from nvila.model.preprocess import pixel_values
from nvila.model.projector import Projector
from nvila.model.qwen2 import load_llm
from nvila.model.siglip import Tower
from nvila.model.time_tokens import time_tokens
from nvila.train.attention import PACKED, TILES
from nvila.train.data.tasks.truth import KINDS
from nvila.train.loss import IGNORE, summed_loss
from nvila.train.packing import Sample, pack
from nvila.train.prepare import ASIDE, VISUAL, Prepared
from nvila.types import MediaKind


class Module(StrEnum):
    """A part of the model that a stage trains or leaves alone."""

    TOWER = "tower"
    PROJECTOR = "projector"
    LLM = "llm"


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """`time_std`: of the smoothed targets over time tokens (`soft_ce_std`, NVILA-SPEC §6.8)."""

    time_std: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Samples of one packed row, as tensors on the model's device. tiles_USS3: uint8; ids_P: int64. which_N: rows of
    tiles_USS3 (`Prepared`)."""

    samples: tuple[Prepared, ...]
    tiles_USS3: Tensor
    which_N: Tensor
    ids_P: Tensor
    rows_V: Tensor
    labels: tuple[Tensor, ...]
    turns: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, samples: Sequence[Prepared], device: torch.device | str) -> Row:
        first = np.cumsum([0, *(sample.visual_rows for sample in samples)])
        rows = [sample.rows_V + start for sample, start in zip(samples, first[:-1], strict=True)]
        before = np.cumsum([0, *(len(sample.tiles_USS3) for sample in samples)])
        which = [sample.which_N + start for sample, start in zip(samples, before[:-1], strict=True)]
        return cls(
            samples=tuple(samples),
            tiles_USS3=_to(np.concatenate([sample.tiles_USS3 for sample in samples]), device),
            which_N=_to(np.concatenate(which), device),
            ids_P=_to(np.concatenate([sample.ids_P for sample in samples]), device),
            rows_V=_to(np.concatenate(rows), device),
            labels=tuple(_to(sample.labels_P, device) for sample in samples),
            turns=tuple(_to(sample.turns_P, device) if sample.turns_P.any() else None for sample in samples),
        )

    @property
    def lengths(self) -> list[int]:
        return [sample.positions for sample in self.samples]

    @property
    def targets(self) -> int:
        return sum(sample.targets for sample in self.samples)


def _to(array: NDArray[Any], device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


class TrainableNvila(nn.Module):
    """The three modules of a checkpoint, in float32, and which of them learn."""

    def __init__(self, checkpoint: Checkpoint, tower: Tower, projector: Projector, llm: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.config = checkpoint.config
        self.tower, self.projector, self.llm = tower, projector, llm
        self.llm.set_attn_implementation(PACKED)
        self.tokenizer = tokenizer = checkpoint.tokenizer()
        names = time_tokens(self.config.time_tokens, self.config.time_token_format)
        self.time_ids = tuple(tokenizer.id_of(name) for name in names)
        self.pad_fill = float(tokenizer.pad_id or 0)
        self.loss = LossSettings()
        self.row_multiple = 1
        self.trained: frozenset[Module] = frozenset()
        self.recomputes = False
        self.patch_head: nn.Linear | None = None

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> TrainableNvila:
        """Own float32 copies of a checkpoint's weights. Raises `InvalidCheckpoint`."""
        config = checkpoint.config
        if checkpoint.has_int8_tower or checkpoint.has_int4_llm:
            raise InvalidCheckpoint(f"{checkpoint.name} is quantised; train its original, and quantise that")
        tower, projector = Tower(config.tower, config.tower_px, TILES), Projector.of(config)
        tower.load_state_dict(_own(checkpoint.tower_weights()), strict=True)
        projector.load_state_dict(_own(checkpoint.projector_weights()), strict=True)
        llm = load_llm(checkpoint.layout, config.llm)
        for parameter in llm.parameters():
            parameter.data = parameter.data.float().clone()
        return cls(checkpoint, tower, projector, llm).to(device)

    def part(self, module: Module) -> nn.Module:
        parts: dict[Module, nn.Module] = {
            Module.TOWER: self.tower,
            Module.PROJECTOR: self.projector,
            Module.LLM: self.llm,
        }
        return parts[module]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.llm.device
        return device

    def choose(self, trained: Iterable[Module], *, recomputes: bool = False) -> None:
        """Train these modules and freeze the others. `recomputes`: gradient checkpointing, a third more arithmetic for
        much less memory."""
        self.trained, self.recomputes = frozenset(trained), recomputes
        for module in Module:
            is_trained = module in self.trained
            self.part(module).train(is_trained).requires_grad_(is_trained)
        self.set_recompute()

    def set_recompute(self) -> None:
        if self.recomputes:
            self.llm.train()  # `transformers` recomputes only in training mode; Qwen2 has no dropout of its own
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})

    def name_patches(self) -> None:
        """From here on the loss is that of naming what each patch shows, with a head that is not kept."""
        self.patch_head = nn.Linear(self.config.tower.width, sum(PATCH_LABELS), device=self.device)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, row: Row) -> Tensor:
        """The summed loss over the row's targets; divide by how many there are in the whole step."""
        if self.patch_head is not None:
            logits_NTL = self.patch_head(self._features(row.tiles_USS3)).float()
            labels_NTK = torch.stack([labels[1:] for labels in row.labels]).view(*logits_NTL.shape[:2], -1)
            return torch.stack(
                [
                    functional.cross_entropy(logits_NTl.flatten(0, 1), labels_NT.flatten(), reduction="sum")
                    for logits_NTl, labels_NT in zip(
                        logits_NTL.split(PATCH_LABELS, -1), labels_NTK.unbind(-1), strict=True
                    )
                ]
            ).sum()
        values_TD = self.see(row)
        spliced = self._splice(row, values_TD)
        packed = pack(spliced, multiple_of=self.row_multiple, fill=self.pad_fill)
        hidden_1PD = self.llm.model(
            inputs_embeds=packed.embeddings_1PD,
            position_ids=packed.positions_1P.clamp(min=0),
            attention_mask={"full_attention": None},
            use_cache=False,
            lengths=packed.lengths,
            turns_P=packed.turns_P,
        ).last_hidden_state
        next_1P = packed.labels_1P[:, 1:]
        is_target_1P = next_1P != IGNORE
        logits_nV = self.llm.lm_head(hidden_1PD[:, :-1][is_target_1P])
        loss = summed_loss(logits_nV.float(), next_1P[is_target_1P], self.time_ids, self.loss.time_std)
        return loss + self._names(packed.embeddings_1PD[0, : len(row.ids_P)], next_1P[0], row.ids_P == VISUAL)

    def _names(self, embeddings_PD: Tensor, next_P: Tensor, is_visual_P: Tensor) -> Tensor:
        """The summed loss of visual tokens that are to say what they show (`PrepareSettings.names_tokens`), as they
        come from the projector: so that they lie by the words of it, where a question's words find them."""
        is_named_P = is_visual_P & (next_P[: len(is_visual_P)] != IGNORE)
        if not bool(is_named_P.any()):
            return embeddings_PD.new_zeros(())
        seen_nD = embeddings_PD[is_named_P]
        logits_nV = self.llm.lm_head(functional.rms_norm(seen_nD, seen_nD.shape[-1:]))
        return functional.cross_entropy(logits_nV.float(), next_P[: len(is_visual_P)][is_named_P], reduction="sum")

    def see(self, row: Row) -> Tensor:
        """Visual tokens of all media of the row, one after the other, (T, D).

        The tower is called once however many tiles there are, also for none: processes that share its weights have to
        call it together.
        """
        tiles_USS3 = row.tiles_USS3
        if not len(tiles_USS3):
            tiles_USS3 = tiles_USS3.new_zeros(1, self.config.tile_px, self.config.tile_px, 3)
        features_UTC = self._features(tiles_USS3)
        values: list[Tensor] = []
        at = 0
        for item in (item for sample in row.samples for item in sample.items):
            which_N, which_F = row.which_N[at : at + item.tiles], None
            if item.kind is MediaKind.VIDEO:
                which_N, which_F = torch.unique(which_N, return_inverse=True)
            own_NTC = features_UTC.index_select(0, which_N)
            pools = self.config.pool_sizes
            values.append(
                visual_tokens(self.config, own_NTC, item.block_size, item.kind, pools, self.projector, which_F)[0]
            )
            at += item.tiles
        if values:
            return torch.cat(values)
        scales = self.config.scales if self.config.image_mode is ImageMode.DYNAMIC_S2 else 1
        unseen_TD: Tensor = self.projector(features_UTC.repeat(1, 1, scales)).flatten(0, 1)
        return unseen_TD[:0] + 0.0 * unseen_TD.sum()

    def _features(self, tiles_NSS3: Tensor) -> Tensor:
        values_N3SS = pixels(tiles_NSS3)
        with nullcontext() if Module.TOWER in self.trained else torch.no_grad():
            return tower_features(
                self.config, values_N3SS.half() if self.config.is_static_s2 else values_N3SS, self._tower
            )

    def _tower(self, pixels_N3SS: Tensor) -> Tensor:
        if not (Module.TOWER in self.trained and self.recomputes):
            features: Tensor = self.tower(pixels_N3SS)
            return features
        x_NTC: Tensor = self.tower.embeddings(pixels_N3SS.to(self.tower.embeddings.patch_embedding.weight.dtype))
        for block in self.tower.encoder.layers:
            x_NTC = recompute(block, x_NTC, None, use_reentrant=False)
            x_NTC = x_NTC[0] if isinstance(x_NTC, tuple) else x_NTC
        return x_NTC

    def _splice(self, row: Row, values_TD: Tensor) -> list[Sample]:
        is_visual_P = row.ids_P == VISUAL
        embeddings_PD = self.llm.model.embed_tokens(row.ids_P.clamp(min=0))
        seen_VD = values_TD[row.rows_V].to(embeddings_PD.dtype)
        embeddings_PD = embeddings_PD.masked_scatter(is_visual_P[:, None], seen_VD)
        runs = torch.split(embeddings_PD, row.lengths)
        return [
            Sample(embeddings_PD=embeddings_PD, labels_P=labels_P, turns_P=turns_P)
            for embeddings_PD, labels_P, turns_P in zip(runs, row.labels, row.turns, strict=True)
        ]


def pixels(tiles_NSS3: Tensor) -> Tensor:
    """`model.preprocess.pixel_values` on the tiles' own device: uint8 to (N, 3, S, S) float32 of float16 values."""
    levels = torch.from_numpy(_LEVELS).to(tiles_NSS3.device)
    return levels[tiles_NSS3.permute(0, 3, 1, 2).contiguous().int()]


PATCH_LABELS = [KINDS["shape"], KINDS["color"], *[KINDS["letter"]] * len(ASIDE)]

_LEVELS = pixel_values(np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1).repeat(3, 3))[0, 0, :, 0]


def _own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in weights.items()}
