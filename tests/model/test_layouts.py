"""The published layouts: what is read from each, and that converting changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import ImageMode
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import KEPT_KEY, LayoutStyle, Part, read_layout
from nvila.model.qwen2 import load_llm
from nvila.model.save import convert_checkpoint, save_checkpoint
from nvila.model.unpack import unpack_llm
from nvila.types import EncodeSettings, MediaKind, TokenDtype
from tests.model.conftest import GOLDEN, picture

CHECKPOINTS = ("nvila-tiny-s2", "nvila-tiny-lite", "nvila-tiny-video")
IMAGE = EncodeSettings(
    kind=MediaKind.IMAGE, is_tiled=True, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
)


def golden(name: str) -> Path:
    return GOLDEN / "e2e" / name


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def files(folder: Path) -> dict[str, Any]:
    """All that a checkpoint says: JSON by content, tensors by their bytes."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {
                key: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
                for key, t in load_file(path).items()
            }
        else:
            found[name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_there_and_back_changes_nothing(name: str, tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden(name)), tmp_path / "flat", LayoutStyle.HF)
    back = convert_checkpoint(read_layout(flat), tmp_path / "back", LayoutStyle.VILA)

    assert files(back) == files(golden(name))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_flat_checkpoint_is_the_same_model(name: str, tmp_path: Path) -> None:
    whole = Checkpoint.open(golden(name))
    flat = Checkpoint.open(convert_checkpoint(whole.layout, tmp_path / name, LayoutStyle.HF))

    assert flat.config == whole.config
    assert flat.vision_revision == whole.vision_revision
    assert flat.tokenizer().media_ids == whole.tokenizer().media_ids
    frames = picture(150, 90)
    assert torch.equal(
        VisionEncoder.from_checkpoint(flat).encode(frames, IMAGE)[0],
        VisionEncoder.from_checkpoint(whole).encode(frames, IMAGE)[0],
    )


FOREIGN = [("nvila-tiny-s2", "nvila"), ("nvila-tiny-lite", "nvila_lite"), ("nvila-tiny-video", "vila")]


@pytest.mark.parametrize(("name", "model_type"), FOREIGN)
def test_a_flat_file_says_a_type_that_its_readers_know_only_if_they_would_compute_the_same(
    name: str, model_type: str, tmp_path: Path
) -> None:
    flat = convert_checkpoint(read_layout(golden(name)), tmp_path / "flat", LayoutStyle.HF)
    config = json.loads((flat / "config.json").read_text())
    names = set(load_file(flat / "model.safetensors"))

    assert config["model_type"] == model_type
    assert {"text_config", "vision_config", "image_token_id", "video_token_id"} <= set(config)
    assert {"llm.model.norm.weight", "mm_projector.layers.1.weight"} <= names
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names


@pytest.mark.parametrize("model_type", ["nvila", "vila"])
@pytest.mark.parametrize("name", ["nvila-tiny-s2", "nvila-tiny-lite"])
def test_a_flat_folder_of_others_gets_the_constants_of_its_readers(name: str, model_type: str, tmp_path: Path) -> None:
    """As published: nothing of ours in it, and sub-configurations without what equals their classes' defaults."""
    whole = Checkpoint.open(golden(name))
    flat = convert_checkpoint(whole.layout, tmp_path / name, LayoutStyle.HF)
    own = "nvila_lite" if "lite" in name else "nvila"
    edit_json(flat / "config.json", **{KEPT_KEY: ..., "model_type": own if model_type == "nvila" else "vila"})
    read = Checkpoint.open(flat).config

    assert read.image_mode is (ImageMode.DYNAMIC if "lite" in name else ImageMode.DYNAMIC_S2)
    assert read == whole.config
    back = convert_checkpoint(read_layout(flat), tmp_path / "back", LayoutStyle.VILA)
    assert Checkpoint.open(back).config.to_json().replace("back", name) == whole.config.to_json()


def test_defaults_that_a_flat_file_leaves_out_are_those_of_the_configuration_classes(tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path / "flat", LayoutStyle.HF)
    text = json.loads((flat / "config.json").read_text())["text_config"]
    for key in ("max_position_embeddings", "rms_norm_eps", "model_type", "tie_word_embeddings"):
        del text[key]
    edit_json(flat / "config.json", **{KEPT_KEY: ..., "text_config": text})
    llm = Checkpoint.open(flat).config.llm

    assert (llm.max_positions, llm.norm_eps, llm.is_tied) == (32768, 1e-6, False)


def test_a_flat_projector_that_no_reader_has_is_refused(tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path / "flat", LayoutStyle.HF)
    edit_json(flat / "config.json", **{KEPT_KEY: ..., "model_type": "vila"})
    tensors = load_file(flat / "model.safetensors")
    save_file(tensors | {"mm_projector.layers.1.weight": torch.ones(7)}, flat / "model.safetensors")

    with pytest.raises(InvalidCheckpoint, match=r"'layers\.1\.weight' has shape \(7,\)"):
        Checkpoint.open(flat)


def test_flat_weights_that_do_not_fit_are_named_in_full(tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path / "flat", LayoutStyle.HF)
    tensors = load_file(flat / "model.safetensors")
    wrong = tensors | {"llm.model.norm.weight": torch.ones(3), "mm_projector.layers.9.bias": torch.ones(1)}
    save_file(wrong, flat / "model.safetensors")
    opened = Checkpoint.open(flat)

    with pytest.raises(InvalidCheckpoint, match=r"llm\. tensor 'model\.norm\.weight' has shape \(3,\).*\(64,\)"):
        opened.check_llm()
    with pytest.raises(InvalidCheckpoint, match=r"mm_projector\. does not fit.*unexpected layers\.9\.bias"):
        opened.projector_weights()


def test_remote_code_folders_are_read_without_their_code(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "nvila-tiny-s2"))
    (copy / "modeling_vila.py").write_text("raise SystemExit('executed')")
    edit_json(copy / "config.json", model_type="vila", version="2.0", auto_map={"AutoModel": "modeling_vila.VILA"})

    assert Checkpoint.open(copy).config == Checkpoint.open(golden("nvila-tiny-s2")).config


def test_a_model_folder_inside_the_path_is_the_checkpoint_and_the_path_its_name(tmp_path: Path) -> None:
    shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "mine" / "model")

    assert Checkpoint.open(tmp_path / "mine").name == "mine"


def test_a_sub_config_that_is_a_string_names_a_folder_elsewhere(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "nvila-tiny-s2"))
    shutil.move(copy / "llm", tmp_path / "language")
    shutil.move(copy / "vision_tower", copy / "tower")
    edit_json(
        copy / "config.json", llm_cfg=str(tmp_path / "language"), vision_tower_cfg="tower", mm_projector_cfg="/none"
    )
    read = Checkpoint.open(copy)

    assert read.vision_revision == Checkpoint.open(golden("nvila-tiny-s2")).vision_revision
    assert read.llm_path == tmp_path / "language"


def test_a_part_that_is_nowhere_is_named(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    shutil.rmtree(copy / "llm")
    edit_json(copy / "config.json", llm_cfg="/a/training/cluster/llm")

    with pytest.raises(InvalidCheckpoint, match="no folder llm/, nor what llm_cfg names: '/a/training/cluster/llm'"):
        Checkpoint.open(copy)


def test_a_template_that_walks_through_parts_is_replaced_by_the_references(tmp_path: Path) -> None:
    """Flat folders may carry their processor's template, to which a message is a list of parts."""
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    parts = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    edit_json(copy / "llm" / "tokenizer_config.json", chat_template=parts)
    turns = [("user", "What is it?")]

    expected = Checkpoint.open(golden("nvila-tiny-s2")).tokenizer().render(turns)
    assert Checkpoint.open(copy).tokenizer().render(turns) == expected


# -- the language model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_language_model_is_checked_by_its_headers(name: str) -> None:
    Checkpoint.open(golden(name)).check_llm()


def test_a_missing_tensor_of_the_language_model_is_named_before_an_engine_makes_one_up(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    tensors = load_file(copy / "llm" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "llm" / "model.safetensors")

    with pytest.raises(InvalidCheckpoint, match=r"llm/ does not fit.*missing lm_head\.weight"):
        _ = Checkpoint.open(copy).llm_path


def test_a_tied_model_may_or_may_not_store_its_head(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-lite"), tmp_path / "copy"))
    tensors = load_file(copy / "llm" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "llm/model.safetensors"
    )

    Checkpoint.open(copy).check_llm()


def test_rows_and_vocabulary_size_must_agree(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    edit_json(copy / "llm" / "config.json", vocab_size=428)

    with pytest.raises(InvalidCheckpoint, match=r"embed_tokens\.weight' has shape \(425, 64\).*\(428, 64\)"):
        Checkpoint.open(copy).check_llm()


@pytest.mark.parametrize(
    ("name", "rows", "are_saved"), [("nvila-tiny-s2", 425, False), ("nvila-tiny-video", 438, True)]
)
def test_both_token_layouts_are_read(name: str, rows: int, are_saved: bool) -> None:
    """The older one adds media tokens at load, past the saved rows; the newer one saves them (NVILA-SPEC §6.1)."""
    opened = Checkpoint.open(golden(name))

    assert opened.config.vocab == rows
    assert all((i < rows) is are_saved for i in opened.tokenizer().media_ids)


@pytest.mark.parametrize("style", LayoutStyle)
@pytest.mark.parametrize("name", ["nvila-tiny-s2", "nvila-tiny-lite"])
def test_the_language_model_loads_from_mapped_tensors_and_equals_transformers_own(
    name: str, style: LayoutStyle, tmp_path: Path
) -> None:
    from transformers import Qwen2ForCausalLM

    opened = Checkpoint.open(convert_checkpoint(read_layout(golden(name)), tmp_path / name, style))
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))
    mapped = load_llm(opened.layout, opened.config.llm).float()
    usual = Qwen2ForCausalLM.from_pretrained(golden(name) / "llm", dtype=torch.float32).eval()

    with torch.inference_mode():
        assert torch.equal(mapped(inputs_embeds=embeds).logits, usual(inputs_embeds=embeds).logits)


def test_an_engine_gets_a_folder_of_a_flat_checkpoints_language_model_made_once(tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path / "flat", LayoutStyle.HF)
    layout = read_layout(flat)
    first = unpack_llm(layout, tmp_path / "cache")
    written_ns = (first / "model.safetensors").stat().st_mtime_ns
    again = unpack_llm(layout, tmp_path / "cache")

    assert again == first
    assert (again / "model.safetensors").stat().st_mtime_ns == written_ns
    assert files(first) == files(golden("nvila-tiny-s2") / "llm")


# -- saving -----------------------------------------------------------------------------------------------------------


def test_large_weights_are_sharded_and_found_again(tmp_path: Path) -> None:
    layout = read_layout(golden("nvila-tiny-s2"))
    for style in LayoutStyle:
        saved = convert_checkpoint(layout, tmp_path / style, style, shard_bytes=100_000)
        shards = list(saved.rglob("model-*.safetensors"))
        assert len(shards) > 3
        assert Checkpoint.open(saved).vision_revision == Checkpoint.open(layout.path).vision_revision
        for part in Part:
            assert read_layout(saved).weights(part).shapes() == layout.weights(part).shapes()
        index = json.loads(next(saved.rglob("model.safetensors.index.json")).read_text())
        assert set(index) == {"metadata", "weight_map"}


def test_trained_tensors_are_saved_instead_of_the_old_ones(tmp_path: Path) -> None:
    layout = read_layout(golden("nvila-tiny-s2"))
    weights = {part: layout.weights(part).tensors() for part in Part}
    weights[Part.PROJECTOR] = {name: tensor * 2 for name, tensor in weights[Part.PROJECTOR].items()}
    saved = read_layout(save_checkpoint(layout, weights, tmp_path / "trained"))

    assert torch.equal(
        saved.weights(Part.PROJECTOR).tensor("layers.2.bias"),
        layout.weights(Part.PROJECTOR).tensor("layers.2.bias") * 2,
    )
    assert saved.weights(Part.LLM).shapes() == layout.weights(Part.LLM).shapes()


def test_what_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    layout = read_layout(golden("nvila-tiny-s2"))
    broken = {Part.LLM: {"model.norm.weight": torch.zeros(4, dtype=torch.complex64)}}

    with pytest.raises(KeyError):
        save_checkpoint(layout, broken, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(InvalidRequest, match="something is there already"):
        convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path, LayoutStyle.HF)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "projector.pt"])
def test_pickled_weights_are_refused_with_words(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    (copy / "mm_projector" / "model.safetensors").rename(copy / "mm_projector" / name)

    with pytest.raises(InvalidCheckpoint, match=f"only {name}: pickled files are not read"):
        VisionEncoder.load(copy)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(golden("nvila-tiny-s2"), tmp_path / "copy"))
    (copy / "non_lora_trainables.bin").write_bytes(b"\x80\x02")

    with pytest.raises(InvalidCheckpoint, match=r"LoRA adapter \(non_lora_trainables\.bin\)"):
        Checkpoint.open(copy)


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(golden("nvila-tiny-s2")), tmp_path / "flat", LayoutStyle.HF)
    edit_json(flat / "config.json", **{KEPT_KEY: ..., "model_type": "llava_next"})

    with pytest.raises(InvalidCheckpoint, match="'llava_next' and a text_config"):
        Checkpoint.open(flat)
