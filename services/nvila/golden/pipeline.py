"""A whole checkpoint in one process, as the recorded runs used it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import Prepared, VisionEncoder
from nvila.types import EncodeSettings, MediaKind, PromptMedia, TokenDtype, TokensRef


@dataclass(frozen=True, eq=False)
class EncodedMedia:
    """A medium of a prompt, the tower's features of it, and the rows of its record."""

    item: PromptMedia
    features_NTC: Tensor
    values_TD: Tensor

    @property
    def key(self) -> str:
        return self.item.records[0].key


class Pipeline:
    """Tower, projector, and the language model through `transformers`."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.config = self.checkpoint.config
        self.encoder = VisionEncoder.from_checkpoint(self.checkpoint)
        self.llm = Qwen2ForCausalLM.from_pretrained(
            self.checkpoint.llm_path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def settings(self, kind: MediaKind, is_tiled: bool) -> EncodeSettings:
        return EncodeSettings(
            kind=kind,
            is_tiled=is_tiled,
            pool_sizes=self.config.pool_sizes if kind is MediaKind.VIDEO else (),
            token_dtype=TokenDtype.FLOAT32,
            vision_revision=self.checkpoint.vision_revision,
        )

    def encode(self, key: str, prepared: Prepared, settings: EncodeSettings) -> EncodedMedia:
        features_NTC = self.encoder.tower(prepared.pixels_N3SS)
        values_TD, levels = self.encoder.finish(features_NTC, prepared, settings)
        record = TokensRef(key=key, levels=levels)
        item = PromptMedia(kind=settings.kind, is_tiled=settings.is_tiled, records=(record,))
        return EncodedMedia(item, features_NTC, values_TD)

    def embed(self, ids: Tensor) -> Tensor:
        return self.checkpoint.embedding_rows(ids).float()

    def logits(self, embeddings_PD: Tensor) -> Tensor:
        """(P, V) of one sample."""
        logits: Tensor = self.llm(inputs_embeds=embeddings_PD[None]).logits[0]
        return logits

    def greedy(self, embeddings_PD: Tensor, columns: int, limit: int) -> tuple[Tensor, list[int]]:
        """Logits of the prompt's positions (P, columns), and the ids that follow, among the first `columns`."""
        out = self.llm(inputs_embeds=embeddings_PD[None], use_cache=True)
        prompt_logits: Tensor = out.logits[0, :, :columns]
        ids = [int(prompt_logits[-1].argmax())]
        while ids[-1] not in self.checkpoint.stop_ids and len(ids) < limit:
            embedded = self.embed(torch.tensor(ids[-1:]))[None]
            out = self.llm(inputs_embeds=embedded, past_key_values=out.past_key_values, use_cache=True)
            ids.append(int(out.logits[0, -1, :columns].argmax()))
        return prompt_logits, ids


@cache
def opened(path: Path) -> Pipeline:
    return Pipeline(path)
