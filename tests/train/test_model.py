"""The training forward: held against the code that serves, and packed against not packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.preprocess import pixel_values
from nvila.model.prompt import splice
from nvila.model.tiny import make_random_checkpoint
from nvila.train.labels import label_answers
from nvila.train.loss import next_token_loss
from nvila.train.model import Module, Row, TrainableNvila, pixels
from nvila.train.prepare import Prepared, PrepareSettings, prepare
from nvila.train.samples import Sample, SampleMedia, ask
from nvila.train.toy import make
from nvila.types import EncodeSettings, MediaKind, PromptMedia, TokenDtype, TokensRef
from tests.model.conftest import make_static_s2

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_static_s2(tmp_path_factory.mktemp("checkpoints") / "static"))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> TrainableNvila:
    return TrainableNvila.load(checkpoint)


def samples() -> list[Sample]:
    text = Sample(source="text", index=0, task="text", messages=ask("Say yes.", "yes", 0))
    return [make(0, 1, is_video=False), make(3, 1, is_video=True), text]


def prepared(checkpoint: Checkpoint) -> list[Prepared]:
    settings = PrepareSettings(frames=(8,), tiles_every_image=False)
    return [prepare(sample, checkpoint.config, checkpoint.tokenizer(), settings) for sample in samples()]


@pytest.mark.parametrize("kind", ["checkpoint", "static"])
def test_a_sample_alone_has_the_loss_of_the_serving_code(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(kind)
    model = TrainableNvila.load(checkpoint)
    model.choose([])
    encoder = VisionEncoder.from_checkpoint(checkpoint)
    for sample, ready in zip(samples(), prepared(checkpoint), strict=True):
        media, values = [], {}
        for number, item in enumerate(sample.media):
            is_image = item.kind is MediaKind.IMAGE
            settings = EncodeSettings(
                kind=item.kind,
                is_tiled=is_image and checkpoint.config.can_tile,
                pool_sizes=() if is_image else checkpoint.config.pool_sizes,
                token_dtype=TokenDtype.FLOAT32,
                vision_revision="",
            )
            frames = item.frames_FHWC if is_image else item.look(8, checkpoint.config.tile_px)
            values[str(number)], levels = encoder.encode(frames, settings)
            ref = TokensRef(key=str(number), levels=levels)
            media.append(PromptMedia(kind=item.kind, is_tiled=is_image and checkpoint.config.can_tile, records=(ref,)))
        labelled = label_answers(sample.messages, media, checkpoint.tokenizer(), checkpoint.config)
        embeddings_PD = splice(labelled.layout.segments, model.llm.model.embed_tokens, values)
        with torch.no_grad():
            model.llm.set_attn_implementation("sdpa")
            logits = model.llm(inputs_embeds=embeddings_PD[None]).logits
            model.llm.set_attn_implementation("nvila_packed")
            expected = next_token_loss(logits, torch.tensor([labelled.labels]))
            row = Row.of([ready], "cpu")
            loss = model(row) / row.targets

        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_static_s2_learns_in_all_its_parts(static: Checkpoint) -> None:
    model = TrainableNvila.load(static)
    for recomputes in (False, True):
        model.choose(Module, recomputes=recomputes)
        model(Row.of(prepared(static), "cpu")).backward()
        for module in Module:
            assert any(p.grad is not None and bool(p.grad.any()) for p in model.part(module).parameters()), module
        model.zero_grad()


@pytest.mark.parametrize("multiple", [1, 128])
def test_samples_in_one_row_learn_as_if_each_were_alone(
    checkpoint: Checkpoint, model: TrainableNvila, multiple: int
) -> None:
    model.choose(Module)
    model.row_multiple = multiple
    ready = prepared(checkpoint)

    together = model(Row.of(ready, "cpu"))
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = sum(model(Row.of([one], "cpu")) for one in ready)
    alone.backward()

    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, rtol=1e-4, atol=2e-5)
    model.zero_grad()
    model.row_multiple = 1


def test_recomputing_changes_no_gradient(checkpoint: Checkpoint, model: TrainableNvila) -> None:
    row = Row.of(prepared(checkpoint)[:1], "cpu")
    found = []
    for recomputes in (False, True):
        model.choose(Module, recomputes=recomputes)
        model(row).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    model.llm.gradient_checkpointing_disable()

    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_frozen_modules_get_no_gradient_and_rest(checkpoint: Checkpoint, model: TrainableNvila) -> None:
    model.choose([Module.PROJECTOR])
    model(Row.of(prepared(checkpoint), "cpu")).backward()

    learning = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"projector"}
    assert not model.tower.training
    assert not model.llm.training
    assert model.projector.training
    model.zero_grad()


def test_a_row_without_any_media_trains_the_language_model(checkpoint: Checkpoint, model: TrainableNvila) -> None:
    model.choose(Module)
    model(Row.of(prepared(checkpoint)[2:], "cpu")).backward()

    assert model.llm.model.layers[0].mlp.up_proj.weight.grad is not None
    model.zero_grad()


def test_a_picture_that_a_clip_shows_again_goes_through_the_tower_once(
    checkpoint: Checkpoint, model: TrainableNvila
) -> None:
    clip = make(3, 1, is_video=True)
    shown = clip.media[0].frames_FHWC[[0, 0, 1, 0, 1, 1, 0, 2]]
    still = replace(clip, media=(replace(clip.media[0], frames_FHWC=shown, times_s=tuple(n / 8 for n in range(8))),))
    ready = prepare(still, checkpoint.config, checkpoint.tokenizer(), PrepareSettings(frames=(8,)))
    every = replace(ready, tiles_USS3=ready.tiles_USS3[ready.which_N], which_N=np.arange(8))
    model.choose([Module.TOWER])

    def learned(sample: Prepared) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(Row.of([prepared(checkpoint)[0], sample, sample], "cpu"))
        loss.backward()
        gradient = model.tower.embeddings.patch_embedding.weight.grad
        assert gradient is not None
        return loss.item(), gradient.clone()

    assert len(ready.tiles_USS3) == len(np.unique(shown, axis=0)) < 4
    assert ready.which_N.tolist()[:5] == [0, 0, 1, 0, 1]
    (loss, gradient), (whole_loss, whole_gradient) = learned(ready), learned(every)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-3, atol=1e-4)


def test_pixels_equal_those_of_serving() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)

    assert np.array_equal(pixels(torch.from_numpy(tiles)).numpy(), pixel_values(tiles))


def test_seconds_in_answers_become_time_tokens_and_a_long_sample_is_cut(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = replace(checkpoint.config, time_tokens=100)
    clip = make(3, 1, is_video=True).media[0]
    timed = Sample(source="t", index=0, task="t", messages=ask("When is <2> red?", "from <0> to <4>", 1), media=(clip,))
    settings = PrepareSettings(frames=(8,), tiles_every_image=False)
    tokenizer = checkpoint.tokenizer()

    ready = prepare(timed, config, tokenizer, settings)
    learned = tokenizer.decode([i for i in ready.labels_P.tolist() if i >= 0])
    cut = prepare(timed, config, tokenizer, replace(settings, max_positions=40))

    assert "<t0> to <t50>" in learned
    assert cut.positions == 40
    assert len(cut.rows_V) == int((cut.ids_P == -1).sum())


def test_every_image_of_a_sample_is_tiled_where_the_recipe_says_so(checkpoint: Checkpoint) -> None:
    pictures = tuple(SampleMedia(kind=MediaKind.IMAGE, frames_FHWC=np.zeros((1, 50, 50, 3), np.uint8)) for _ in "ab")
    two = Sample(source="t", index=0, task="t", messages=ask("Same?", "yes", 2), media=pictures)

    def tiles(is_every: bool) -> int:
        settings = PrepareSettings(tiles_every_image=is_every)
        return len(prepare(two, checkpoint.config, checkpoint.tokenizer(), settings).which_N)

    assert tiles(False) == 2
    assert tiles(True) > 20
