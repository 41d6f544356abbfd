"""Folders: what is read, what is refused and how that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.errors import InvalidCheckpoint
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.model.encoder import VisionEncoder
from tests.model.conftest import GOLDEN


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    change(content)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))


def test_a_configuration_travels_as_json(tiny: Checkpoint) -> None:
    assert NvilaConfig.from_json(tiny.config.to_json()) == tiny.config


@pytest.mark.parametrize("text", ["", "{}", '{"name": 1}', "[]"])
def test_other_json_is_no_configuration(text: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="not a model configuration"):
        NvilaConfig.from_json(text)


def test_a_folder_without_tokenizer_json_gives_the_same_ids(tmp_path: Path) -> None:
    whole = Checkpoint.open(GOLDEN / "e2e" / "nvila-tiny-video")
    copy = Path(shutil.copytree(whole.path, tmp_path / "copy"))
    (copy / "llm" / "tokenizer.json").unlink()
    built = Checkpoint.open(copy).tokenizer()
    text = "When does it happen?\n\n  At <t3>, it's 42 °C — naïve café\u0301 日本語 <|im_end|>\r\n"

    assert built.encode(text) == whole.tokenizer().encode(text)
    assert built.encode_markup(text) == whole.tokenizer().encode_markup(text)
    assert built.size == whole.tokenizer().size == 438
    assert built.media_ids == whole.tokenizer().media_ids


def test_markers_saved_as_ordinary_tokens_are_still_special(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / "e2e" / "nvila-tiny-video", tmp_path / "copy"))
    saved = copy / "llm" / "tokenizer.json"
    content = json.loads(saved.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in ("<image>", "<vila/sentinel>")
    saved.write_text(json.dumps(content))
    tokenizer = Checkpoint.open(copy).tokenizer()

    assert not set(tokenizer.encode("an <image> and a <vila/sentinel>")) & set(tokenizer.media_ids)
    assert tokenizer.decode([tokenizer.image_id]) == ""


def test_added_tokens_without_description_keep_their_kind(tmp_path: Path) -> None:
    whole = Checkpoint.open(GOLDEN / "e2e" / "nvila-tiny-video")
    copy = Path(shutil.copytree(whole.path, tmp_path / "copy"))
    (copy / "llm" / "tokenizer.json").unlink()
    edit(copy / "llm" / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))
    tokenizer = Checkpoint.open(copy).tokenizer()

    assert tokenizer.decode([tokenizer.eos_id, tokenizer.id_of("<t3>")]) == "<t3>"
    assert tokenizer.encode("<t3>") == [tokenizer.id_of("<t3>")]


def test_text_survives_the_tokenizer(tiny: Checkpoint) -> None:
    text = "Ünïcödé, emoji 🎬 and <|im_start|> as text"

    assert tiny.tokenizer().decode(tiny.tokenizer().encode(text)) == text


def test_media_markers_are_suppressed(tiny: Checkpoint) -> None:
    assert set(tiny.tokenizer().media_ids) <= set(tiny.suppressed_ids)
    assert tiny.eos_id not in tiny.suppressed_ids


def test_an_id_without_a_saved_row_has_no_embedding(tiny: Checkpoint) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"token id {tiny.config.vocab} "):
        tiny.embedding_rows([0, tiny.config.vocab])


def test_the_revision_names_the_vision_weights(tiny: Checkpoint, folder: Path) -> None:
    assert Checkpoint.open(folder).vision_revision == tiny.vision_revision

    edit(folder / "mm_projector" / "model.safetensors", lambda t: t["layers.4.bias"].add_(1))
    assert Checkpoint.open(folder).vision_revision != tiny.vision_revision


def test_the_revision_names_what_shapes_tokens_and_nothing_else(tiny: Checkpoint, folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(num_video_frames=8))
    assert Checkpoint.open(folder).vision_revision == tiny.vision_revision

    edit(folder / "config.json", lambda c: c.update(max_tiles=10))
    assert Checkpoint.open(folder).vision_revision != tiny.vision_revision


def test_sharded_weights_are_found_by_their_index(tiny: Checkpoint, folder: Path) -> None:
    tower = folder / "vision_tower"
    tensors = load_file(tower / "model.safetensors")
    names = sorted(tensors)
    shards = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, tower / shard)
    (tower / "model.safetensors").unlink()
    (tower / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    assert Checkpoint.open(folder).vision_revision == tiny.vision_revision


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    index = {"weight_map": {"x": "../mm_projector/model.safetensors"}}
    (folder / "vision_tower" / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InvalidCheckpoint, match="not in the folder"):
        VisionEncoder.load(folder)


WEIGHTS = [
    (
        "vision_tower",
        lambda t: t.pop("vision_model.embeddings.patch_embedding.bias"),
        r"missing .*patch_embedding\.bias",
    ),
    ("vision_tower", lambda t: t.update(stray=torch.zeros(1)), "unexpected stray"),
    ("mm_projector", lambda t: t.pop("layers.2.weight"), r"missing layers\.2\.weight"),
    (
        "mm_projector",
        lambda t: t.update({"layers.4.bias": torch.zeros(7)}),
        r"'layers\.4\.bias' has shape \(7,\), its configuration says \(256,\)",
    ),
]


@pytest.mark.parametrize(("part", "change", "says"), WEIGHTS)
def test_weights_that_do_not_fit_are_named(
    folder: Path, part: str, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(folder / part / "model.safetensors", change)

    with pytest.raises(InvalidCheckpoint, match=says):
        VisionEncoder.load(folder)


STATIC_S2 = {"s2": True, "dynamic_s2": False, "image_aspect_ratio": "resize"}
SETTINGS = [
    ("config.json", {"model_type": "llama"}, "model_type 'llama'"),
    ("config.json", {"mm_vision_select_layer": None}, "no 'mm_vision_select_layer'"),
    ("config.json", {"mm_vision_select_layer": -9}, "is -9; the tower has 4 layers"),
    ("config.json", {"mm_vision_select_feature": "patch"}, "'cls_patch' is needed"),
    ("config.json", {"image_aspect_ratio": "anyres"}, "known: resize, pad, dynamic"),
    ("config.json", {"s2_scales": "112,200"}, "ascend in multiples"),
    ("config.json", {"dynamic_s2": False}, "they disagree"),
    ("config.json", STATIC_S2 | {"s2_max_split_size": 336}, "336 does not cut the scale of 224 px"),
    ("config.json", STATIC_S2 | {"s2_max_split_size": 0}, "s2_max_split_size 0 does not cut"),
    ("config.json", STATIC_S2 | {"s2_scales": "112,280"}, "112 does not cut the scale of 280 px"),
    ("config.json", STATIC_S2 | {"s2_resize_output_to_scale_idx": 3}, "is 3 of 3 scales"),
    ("config.json", STATIC_S2 | {"vision_resolution": 224}, "not supported with static S2"),
    ("config.json", {"video_encoder": '{"_target_": "os.system"}'}, "video_encoder is 'system'"),
    ("config.json", {"video_encoder": {"_target_": "x.TSPVideoEncoder"}}, "without pool_sizes"),
    ("config.json", {"video_encoder": {"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8]]}}, "a list of triples"),
    ("config.json", {"video_encoder": "{"}, "video_encoder is '{'; an object is needed"),
    ("config.json", {"s2_scales": "112,two"}, "s2_scales is 'two'; a whole number is needed"),
    ("config.json", {"max_tiles": 2.5}, "max_tiles is 2.5; a whole number"),
    ("vision_tower/config.json", {"patch_size": 0}, "patch_size in vision_tower/config.json is 0; at least 1"),
    ("llm/config.json", {"num_attention_heads": 0}, "num_attention_heads in llm/config.json is 0; at least 1"),
    ("llm/config.json", {"hidden_size": "wide"}, "hidden_size is 'wide'; a whole number"),
    ("llm/config.json", {"hidden_size": [64]}, "hidden_size is .64.; a whole number"),
    ("mm_projector/config.json", {"mm_projector_type": "mlp_magic"}, "unknown mm_projector_type 'mlp_magic'"),
    ("vision_tower/config.json", {"architectures": ["RadioModel"]}, "only SigLIP"),
    ("llm/config.json", {"model_type": "llama"}, "'qwen2' is needed"),
    ("llm/added_tokens.json", {"<extra>": 9000}, "should have id 9000"),
]


@pytest.mark.parametrize(("file", "change", "says"), SETTINGS)
def test_a_configuration_that_cannot_be_served_says_why(
    folder: Path, file: str, change: dict[str, Any], says: str
) -> None:
    edit(folder / file, lambda content: content.update(change))

    with pytest.raises(InvalidCheckpoint, match=says):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["config.json", "llm/config.json", "llm/vocab.json", "mm_projector/config.json"])
def test_missing_and_broken_files_are_named(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    with pytest.raises(InvalidCheckpoint, match=f"{file} is not JSON"):
        Checkpoint.open(folder)

    (folder / file).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"{file} cannot be read"):
        Checkpoint.open(folder)


def test_broken_weights_are_named(folder: Path) -> None:
    (folder / "mm_projector" / "model.safetensors").write_bytes(b"\x00" * 64)

    with pytest.raises(InvalidCheckpoint, match=r"mm_projector/model\.safetensors cannot be read"):
        VisionEncoder.load(folder)
