"""A checkpoint answering in this process, several samples at a time: media as arrays, no files, no services.

The layout of the prompt and the visual tokens are those of serving (`model/prompt.py`, `model/encoder.py`), greedy
decoding by transformers. Prompts of different lengths are filled up on the left, masked, with positions that count from
each prompt's own beginning.

B samples · P prompt positions · D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from nvila.cache.codec import quantize
from nvila.errors import InvalidRequest, LimitExceeded
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import ImageMode
from nvila.model.encoder import VisionEncoder
from nvila.model.prompt import lay_out, splice
from nvila.train.samples import Sample, SampleMedia
from nvila.types import EncodeSettings, MediaKind, PromptMedia, PromptUsage, TokenDtype, TokensRef


class ModelAnswerer:
    """Implements `Answerer`. `frames`: looked at of each video; None is the model's own number. `token_dtype`: visual
    tokens are as a cache keeps them, FLOAT32 or INT8."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: VisionEncoder,
        llm: PreTrainedModel,
        *,
        frames: int | None = None,
        batch: int = 8,
        max_tokens: int = 32,
        token_dtype: TokenDtype = TokenDtype.FLOAT32,
    ) -> None:
        self.name, self.batch = checkpoint.name, batch
        self.config = checkpoint.config
        self._tokenizer = checkpoint.tokenizer()
        self._stop_ids, self._suppressed_ids = list(checkpoint.stop_ids), list(checkpoint.suppressed_ids)
        self._encoder, self._llm = encoder, llm.eval()
        self._token_dtype = token_dtype
        self._frames, self._max_tokens = frames or self.config.default_frames, max_tokens

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        frames: int | None = None,
        batch: int = 8,
        max_tokens: int = 32,
        token_dtype: TokenDtype = TokenDtype.FLOAT32,
    ) -> ModelAnswerer:
        """On a GPU in bfloat16 where there is one, else in float32. Raises `InvalidCheckpoint`."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        disable_progress_bar()  # transformers draws one per weight file
        checkpoint = Checkpoint.open(path)
        encoder = VisionEncoder.from_checkpoint(checkpoint, device, dtype)
        llm = Qwen2ForCausalLM.from_pretrained(checkpoint.dense_llm_path, dtype=dtype, local_files_only=True)
        return cls(
            checkpoint,
            encoder,
            llm.to(device),
            frames=frames,
            batch=batch,
            max_tokens=max_tokens,
            token_dtype=token_dtype,
        )

    def close(self) -> None:
        """Nothing is held but memory."""

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        said: list[str | InvalidRequest] = []
        prompts: list[Tensor] = []
        places: list[int] = []
        for place, sample in enumerate(samples):
            try:
                prompts.append(self.embed(sample)[0])
                places.append(place)
                said.append("")
            except InvalidRequest as error:
                said.append(error)
        if prompts:
            for place, text in zip(places, self._generate(prompts), strict=True):
                said[place] = text
        return said

    def embed(self, sample: Sample, *, is_answered: bool = False) -> tuple[Tensor, PromptUsage]:
        """Input embeddings (P, D) of what is asked, or of the whole conversation, and how many positions are whose.

        Raises `InvalidRequest`.
        """
        media, values_by_key = [], {}
        is_single = sum(item.kind is MediaKind.IMAGE for item in sample.media) == 1
        for number, item in enumerate(sample.media):
            settings = EncodeSettings(
                kind=item.kind,
                is_tiled=item.kind is MediaKind.IMAGE
                and is_single
                and self.config.image_mode in (ImageMode.DYNAMIC, ImageMode.DYNAMIC_S2),
                pool_sizes=self.config.pool_sizes if item.kind is MediaKind.VIDEO else (),
                token_dtype=TokenDtype.FLOAT32,
                vision_revision="",
            )
            values_TD, levels = self._encoder.encode(self._pixels(item), settings)
            key = str(number)
            values_by_key[key] = self._as_kept(values_TD)
            ref = TokensRef(key=key, levels=levels)
            media.append(PromptMedia(kind=item.kind, is_tiled=settings.is_tiled, records=(ref,)))
        messages = sample.messages if is_answered else sample.prompt
        layout = lay_out(messages, media, self._tokenizer, self.config, add_generation_prompt=not is_answered)
        if layout.usage.total + self._max_tokens > self.config.max_positions:
            raise LimitExceeded.of("prompt positions", asked=layout.usage.total, limit=self.config.max_positions)
        return splice(layout.segments, self._embed, values_by_key), layout.usage

    def _as_kept(self, values_TD: Tensor) -> Tensor:
        if self._token_dtype is TokenDtype.FLOAT32:
            return values_TD
        values, scales_T = quantize(values_TD.cpu().numpy(), self._token_dtype)
        assert scales_T is not None, "of 8 bits or whole"
        return torch.from_numpy(values.astype(np.float32) * scales_T[:, None])

    def _pixels(self, item: SampleMedia) -> NDArray[np.uint8]:
        """As the decode workers hand it to the tower: the last group of frames filled up."""
        if item.kind is MediaKind.IMAGE:
            return item.frames_FHWC
        frames_FHWC = item.look(self._frames, self.config.tile_px)
        padding = -len(frames_FHWC) % self.config.temporal_group
        return np.concatenate([frames_FHWC, *[frames_FHWC[-1:]] * padding])

    @torch.inference_mode()
    def _embed(self, ids: Tensor) -> Tensor:
        rows: Tensor = self._llm.get_input_embeddings()(ids.to(self._llm.device))
        return rows

    @torch.inference_mode()
    def _generate(self, prompts: list[Tensor]) -> list[str]:
        embeds_BPD = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask_BP = pad_sequence([p.new_ones(len(p), dtype=torch.long) for p in prompts], True, padding_side="left")
        ids = self._llm.generate(
            inputs_embeds=embeds_BPD,
            attention_mask=mask_BP,
            max_new_tokens=self._max_tokens,
            do_sample=False,
            eos_token_id=self._stop_ids,
            pad_token_id=self._stop_ids[0],
            suppress_tokens=self._suppressed_ids or None,
        )
        return [self._tokenizer.decode(self._until_stop(row)).strip() for row in ids.tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self._stop_ids), len(ids))
        return ids[:end]
