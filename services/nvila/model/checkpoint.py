"""An opened checkpoint: configuration, tokenizer, weights; the same in every layout that `model/layouts.py` reads.

Only safetensors and JSON are read: no pickle, and no code from the folder. Opening one reads no weights;
`model/encoder.py` and the decode service take what each needs, memory-mapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from nvila.errors import InvalidCheckpoint
from nvila.model.awq_layout import is_packed, packed_shapes
from nvila.model.config import NvilaConfig
from nvila.model.int8_layout import QUANTIZATION, SCALE, int8_linears
from nvila.model.layouts import Layout, LayoutStyle, Part, read_layout
from nvila.model.projector import Projector
from nvila.model.published import read_config
from nvila.model.qwen2 import UNUSED_IN_LLM, llm_shapes
from nvila.model.siglip import Tower, resize_positions
from nvila.model.tokenizer import ChatTokenizer
from nvila.model.unpack import unpack_llm, widen_llm

ARITHMETIC_VERSION = 1
"""Raised when a change of our own code changes the tokens that the same weights give; part of every cache key."""

RANDOM_KEY = "nvila_random_weights"
"""Set in the root configuration of a made-up checkpoint (`model/tiny.py`)."""

EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "embeddings.position_embedding.weight"
TOWER_PREFIX = "vision_model."
UNUSED_IN_TOWER = ("post_layernorm.", "head.", "embeddings.position_ids")
"""SigLIP's final norm and pooling head, which NVILA does not use, and a buffer that older `transformers` saved."""


class Checkpoint:
    """An opened checkpoint. Cheap to make; weights are touched when asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.is_random = bool(layout.root.get(RANDOM_KEY, False))
        """Its weights were made up: its words mean nothing."""
        self._tokenizer = ChatTokenizer.open(layout.tokenizer)
        self.config: NvilaConfig = read_config(
            name=layout.name,
            root=layout.root,
            llm=layout.llm,
            tower=layout.tower,
            projector=layout.projector,
            processor=layout.processor,
            encode=self._tokenizer.encode_markup,
        )

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read configuration and tokenizer of a folder or hub id; raises `InvalidCheckpoint` naming what is wrong."""
        return cls(read_layout(path))

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def path(self) -> Path:
        return self.layout.path

    @cached_property
    def llm_path(self) -> Path:
        """A Qwen2 folder as vLLM and transformers load it, its tensors' names and shapes checked.

        The first time that a flat checkpoint is asked for it, this copies the language model's weights into the hub's
        cache folder (`model/unpack.py`). Raises `InvalidCheckpoint`.
        """
        self.check_llm()
        if self.layout.style is LayoutStyle.VILA:
            return self.layout.tokenizer
        return unpack_llm(self.layout)

    @property
    def has_int4_llm(self) -> bool:
        """Its linears are in four bits, packed as `model/awq_layout.py` says."""
        return is_packed(self.layout.llm)

    @cached_property
    def dense_llm_path(self) -> Path:
        """As `llm_path`, for whoever has no kernel for four bits: a copy in 16 bits where it is stored so, in the hub's
        cache folder, made when it is first asked for. Raises `InvalidCheckpoint`."""
        if not self.has_int4_llm:
            return self.llm_path
        self.check_llm()
        return widen_llm(self.layout)

    def check_llm(self) -> None:
        """Compare the language model's tensors with its configuration, by their headers.

        vLLM and transformers only warn of a tensor that is missing, and go on with random numbers.
        """
        shapes = llm_shapes(self.config.llm)
        if self.has_int4_llm:
            shapes = packed_shapes(shapes, int(self.layout.llm["quantization_config"]["group_size"]))
        elif "quantization_config" in self.layout.llm:
            return  # packed tensors of another program, which checks them itself
        unused = (*UNUSED_IN_LLM, *(["lm_head."] if self.config.llm.is_tied else []))
        self.layout.weights(Part.LLM).check(shapes, unused)

    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._tokenizer.stop_ids

    @cached_property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Saved ids that must never be sampled: media markers, and rows that no token stands for."""
        tokenizer = self._tokenizer
        media = set(tokenizer.media_ids)
        return tuple(i for i in range(self.config.vocab) if i in media or tokenizer.token_of(i) is None)

    # -- weights ----------------------------------------------------------------------------------------------------

    def tower_weights(self) -> dict[str, Tensor]:
        """Parameters of `Tower`, as stored; the position table resampled where the configuration asks for it.

        Of a tower in 8 bits the linears' weights are int8, and their scales are there besides (`model/int8_tower.py`).
        """
        config = self.config
        with torch.device("meta"):
            shapes = {
                name: tuple(p.shape) for name, p in Tower(config.tower, config.tower.image_px).state_dict().items()
            }
        if self.has_int8_tower:
            names = int8_linears(config.tower.blocks)
            shapes |= {f"{name}.{SCALE}": (shapes[f"{name}.weight"][0], 1) for name in names}
        skipped = [f"{TOWER_PREFIX}encoder.layers.{i}." for i in range(config.tower.blocks, config.tower.layers)]
        taken = self.layout.weights(Part.TOWER).take(
            {TOWER_PREFIX + name: shape for name, shape in shapes.items()},
            unused=[*skipped, *(TOWER_PREFIX + name for name in UNUSED_IN_TOWER)],
        )
        weights = {name.removeprefix(TOWER_PREFIX): tensor for name, tensor in taken.items()}
        if config.tower_px != config.tower.image_px:
            weights[POSITIONS] = resize_positions(weights[POSITIONS], config.grid**2)
        return weights

    @property
    def has_int8_tower(self) -> bool:
        """Written by `nvila quantize tower`. Raises `InvalidCheckpoint` for any other quantisation."""
        told = self.layout.tower.get("quantization_config")
        if told is not None and told != QUANTIZATION:
            raise InvalidCheckpoint(
                "the tower is quantised in a way that is not known here: its configuration's quantization_config is "
                "not that of 8-bit weights per channel and activations per token"
            )
        return told is not None

    def projector_weights(self) -> dict[str, Tensor]:
        """Parameters of `Projector`, as stored."""
        config = self.config
        with torch.device("meta"):
            projector = Projector.of(config)
        shapes = {name: tuple(p.shape) for name, p in projector.state_dict().items()}
        return self.layout.weights(Part.PROJECTOR).take(shapes) if shapes else {}

    def embedding_rows(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings of text ids, (len(ids), D) in the stored dtype; only these rows are read.

        Raises `InvalidCheckpoint` for an id without a saved row: those are never fed to the model (spec §6.1).
        """
        wanted = torch.as_tensor(ids, dtype=torch.long)
        table = self._embedding_table
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(table):
            raise InvalidCheckpoint(f"token id {int(wanted.max())} has no embedding: {len(table)} rows are saved")
        return table[wanted]

    @cached_property
    def _embedding_table(self) -> Tensor:
        table = self.layout.weights(Part.LLM).tensor(EMBEDDING)
        if tuple(table.shape) != (self.config.vocab, self.config.llm_width):
            raise InvalidCheckpoint(
                f"llm/ tensor {EMBEDDING!r} has shape {tuple(table.shape)}, "
                f"its configuration says {(self.config.vocab, self.config.llm_width)}"
            )
        return table

    @cached_property
    def vision_revision(self) -> str:
        """Hex digest over everything that shapes visual tokens: tower and projector weights and their configuration.

        Reads those weights once, about a second per 2 GB. The same for every layout that the weights are stored in.
        """
        config = self.config
        fields = (
            "tower",
            "image_mode",
            "tile_px",
            "s2_scales",
            "s2_merge_index",
            "min_tiles",
            "max_tiles",
            "projector_type",
        )
        shape = json.loads(config.to_json())
        digest = blake3(max_threads=blake3.AUTO)
        digest.update(json.dumps([ARITHMETIC_VERSION, [shape[field] for field in fields]]).encode())
        parts = {"tower": self.tower_weights(), "projector": self.projector_weights()}
        for part, weights in parts.items():
            for name in sorted(weights):
                tensor = weights[name]
                digest.update(f"\n{part}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if math.prod(tensor.shape):
                    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
