"""The answers of `nvila ask --in-process` to a data set's questions: the gateway's pipeline with the model behind it.

Media go through files and decode workers as a client's would: pictures as PNG, clips as H.264.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from nvila.cli.local import local_pipeline
from nvila.errors import InvalidRequest
from nvila.train.data.clips import write_h264
from nvila.train.data.shards import png
from nvila.train.samples import Sample, SampleMedia
from nvila.types import Answered, Deadline, MediaKind, MediaSource, Question, SamplingParams, VideoSampling

_TIMEOUT_S = 600.0


class PipelineAnswerer:
    """Implements `Answerer`, one question at a time."""

    batch = 1

    def __init__(self, model: Path, *, frames: int | None, max_tokens: int) -> None:
        self._runner = asyncio.Runner()
        self._opened = AsyncExitStack()
        self._frames, self._max_tokens = frames, max_tokens
        self._folder = tempfile.TemporaryDirectory(prefix="nvila-")
        self._pipeline = self._runner.run(self._opened.enter_async_context(local_pipeline(model)))
        self.name = self._runner.run(self._pipeline.describe()).name

    def close(self) -> None:
        self._runner.run(self._opened.aclose())
        self._runner.close()
        self._folder.cleanup()

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        return [self._runner.run(self._one(sample)) for sample in samples]

    async def _one(self, sample: Sample) -> str | InvalidRequest:
        paths = [self._write(item) for item in sample.media]
        sampling = VideoSampling(num_frames=self._frames)
        question = Question(
            request_id=uuid.uuid4().hex,
            tenant="local",
            messages=sample.prompt,
            media=tuple(
                MediaSource(
                    kind=item.kind,
                    url=f"file:{path}",
                    sampling=sampling if item.kind is MediaKind.VIDEO else VideoSampling(),
                )
                for item, path in zip(sample.media, paths, strict=True)
            ),
            sampling=SamplingParams(max_tokens=self._max_tokens),
            deadline=Deadline.after(_TIMEOUT_S),
        )
        said = ""
        try:
            async for event in self._pipeline.answer(question):
                said += "" if isinstance(event, Answered) else event.text
        except InvalidRequest as error:
            return error
        finally:
            for path in paths:
                path.unlink()
        return said

    def _write(self, item: SampleMedia) -> Path:
        path = Path(self._folder.name) / uuid.uuid4().hex
        if item.kind is MediaKind.IMAGE:
            path = path.with_suffix(".png")
            path.write_bytes(png(item.frames_FHWC[0]))
        else:
            path = path.with_suffix(".mp4")
            write_h264(item, path)
        return path
