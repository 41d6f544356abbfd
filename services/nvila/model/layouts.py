"""Where a checkpoint keeps what: the published on-disk layouts (NVILA-SPEC §7), read into one description.

    vila   config.json + llm/ + vision_tower/ + mm_projector/, each with weights of its own (§7.1). Folders with remote
           code (`*-hf-preview`, §7.2) are the same; their code is not looked at.
    hf     one flat folder (`NVILA-8B-hf`, `NVILA-Lite-2B-hf-0626`, …, §7.3): weights under the prefixes `llm.`,
           `vision_tower.` and `mm_projector.`, configuration in `text_config` and `vision_config`.

The flat layout has no words for tiling, projector and video encoder: they are constants of its reader's code. They are
added here, so that everything behind speaks the words of `vila`. What `model/save.py` writes flat also keeps the
original words, under `KEPT_KEY`, so that no model changes by being converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvila.errors import InvalidCheckpoint
from nvila.model import hub
from nvila.model.weights import Weights

Json = Mapping[str, Any]

KEPT_KEY = "nvila_vila_config"
"""In a flat `config.json` that we wrote: {"root", "projector"}, those two files of the folder layout."""


class LayoutStyle(StrEnum):
    VILA = "vila"
    HF = "hf"


class Part(StrEnum):
    """A part of the model; the value is its folder in the one layout and its tensors' prefix in the other."""

    LLM = "llm"
    TOWER = "vision_tower"
    PROJECTOR = "mm_projector"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A checkpoint's JSON files, in the words of the `vila` layout, and where the rest is.

    `name`: what to call the model. `tokenizer`: the folder with the tokenizer's files. `weights_at`: for each part the
    folder of its weights and what its tensors' names begin with there.
    """

    name: str
    style: LayoutStyle
    path: Path
    root: Json
    llm: Json
    tower: Json
    projector: Json
    processor: Json
    tokenizer: Path
    weights_at: Mapping[Part, tuple[Path, str]]

    def weights(self, part: Part) -> Weights:
        return Weights(*self.weights_at[part])


def read_layout(named: str | Path) -> Layout:
    """Read the JSON files of a checkpoint: a folder, or a hub id as `model/hub.py` has it; opens no weights.

    Raises `InvalidCheckpoint` naming what is missing or unknown.
    """
    given = hub.locate(named)
    folder = given / "model" if (given / "model" / "config.json").exists() else given
    _refuse_adapters(folder)
    root = read_json(folder / "config.json")
    if "text_config" in root or "vision_config" in root:
        return _flat(hub.name_of(given), folder, root)
    if root.get("model_type") not in ("llava_llama", "vila"):
        raise InvalidCheckpoint(
            f"config.json has model_type {root.get('model_type')!r}; known: 'llava_llama', 'vila', and with a "
            "text_config 'nvila', 'nvila_lite'"
        )
    return _folders(hub.name_of(given), folder, root)


def _refuse_adapters(folder: Path) -> None:
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        if (folder / name).exists():
            raise InvalidCheckpoint(
                f"the folder holds a LoRA adapter ({name}), not a model: merge it into its base model and save the "
                "result as safetensors; pickled files (*.bin, *.pt) are never read, because reading one runs its code"
            )


# -- folders ----------------------------------------------------------------------------------------------------------


def _folders(name: str, folder: Path, root: Json) -> Layout:
    at = {part: _part_folder(folder, root, part) for part in Part}
    return Layout(
        name=name,
        style=LayoutStyle.VILA,
        path=folder,
        root=root,
        llm=read_json(at[Part.LLM] / "config.json"),
        tower=read_json(at[Part.TOWER] / "config.json"),
        projector=read_json(at[Part.PROJECTOR] / "config.json"),
        processor=read_json(at[Part.TOWER] / "preprocessor_config.json"),
        tokenizer=at[Part.LLM],
        weights_at={part: (at[part], "") for part in Part},
    )


def _part_folder(folder: Path, root: Json, part: Part) -> Path:
    """The sub-folder of the part's name; where `<part>_cfg` is a string, the folder or hub id that it names instead."""
    named = root.get(f"{part}_cfg")
    if isinstance(named, str) and (folder / named).is_dir():  # an absolute path stands for itself
        return folder / named
    if (folder / part).is_dir():
        return folder / part
    if isinstance(named, str) and hub.is_id(named):
        return hub.locate(named)
    elsewhere = f", nor what {part}_cfg names: {named!r}" if isinstance(named, str) else ""
    raise InvalidCheckpoint(f"the checkpoint has no folder {part}/{elsewhere}")


# -- flat -------------------------------------------------------------------------------------------------------------

_COMMON = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaModel"],
    "chat_template": None,
    "fps": 0.0,
    "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
    "max_tiles": 12,
    "min_tiles": 1,
    "mm_vision_select_feature": "cls_patch",
    "mm_vision_select_layer": -2,
    "num_time_tokens": 0,
    "num_video_frames": 8,
    "s2": False,
    "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
    "video_max_tiles": 1,
}

_CONSTANTS: dict[str, dict[str, Any]] = {
    "nvila": {"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_resize_output_to_scale_idx": -1},
    "nvila_lite": {"image_aspect_ratio": "dynamic", "dynamic_s2": False},
}
"""By `model_type`: what the flat layout's readers have built in (python/sglang/srt/models/nvila.py and nvila_lite.py of
sgl-project/sglang; NVILA-SPEC §7.3)."""

_PROJECTORS = {"nvila": ("mlp_downsample", "mlp_downsample_2x2_fix"), "nvila_lite": ("mlp_downsample_3x3_fix",)}
"""The first is what it is called; the others compute the same."""

_DECISIVE = ("min_tiles", "max_tiles", "mm_vision_select_layer", "mm_vision_select_feature")

_SCALES = (1, 2, 3)
"""448, 896, 1344 of a 448 px tower (spec §1)."""

# Keys that a flat file may leave out because they equal the defaults of transformers' configuration classes.
_QWEN2_DEFAULTS = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SIGLIP_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "architectures": ["SiglipVisionModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


def _flat(name: str, folder: Path, root: Json) -> Layout:
    weights_at = {part: (folder, f"{part}.") for part in Part}
    processor: Json = read_json(folder / "preprocessor_config.json", default={})
    kept: Json = root.get(KEPT_KEY) or {}
    if kept:
        llm, tower = (
            _sub_config(root, "text_config", "qwen2"),
            _sub_config(root, "vision_config", "siglip_vision_model"),
        )
        vila, projector = kept["root"], kept["projector"]
    else:
        llm = {**_QWEN2_DEFAULTS, **_sub_config(root, "text_config", "qwen2")}
        tower = {**_SIGLIP_DEFAULTS, **_sub_config(root, "vision_config", "siglip_vision_model")}
        kind = _told_kind(root, tower, Weights(*weights_at[Part.PROJECTOR]))
        vila = _spelled_out(kind, root, tower)
        projector = {"model_type": "v2l_projector", "mm_projector_type": _PROJECTORS[kind][0]}
        # Its own size may be that of another scale; tiles are of the tower's.
        processor = {**processor, "size": {"height": tower["image_size"], "width": tower["image_size"]}}
    return Layout(
        name=name,
        style=LayoutStyle.HF,
        path=folder,
        root=vila,
        llm=llm,
        tower=tower,
        projector=projector,
        processor=processor,
        tokenizer=folder,
        weights_at=weights_at,
    )


def _sub_config(root: Json, key: str, model_type: str) -> Json:
    given: Any = root.get(key)
    if not isinstance(given, Mapping):
        raise InvalidCheckpoint(f"config.json has no object {key!r}")
    if given.get("model_type", model_type) != model_type:
        raise InvalidCheckpoint(f"{key} has model_type {given['model_type']!r}; {model_type!r} is needed")
    return given


def _told_kind(root: Json, tower: Json, projector: Weights) -> str:
    """`nvila` or `nvila_lite`. The oldest flat files say `vila`: there the projector's first layer tells."""
    kind = root.get("model_type")
    if kind in _CONSTANTS:
        return str(kind)
    if kind != "vila":
        raise InvalidCheckpoint(
            f"config.json has model_type {kind!r} and a text_config; known: vila, nvila, nvila_lite"
        )
    entering = projector.shape("layers.1.weight")
    width = int(tower["hidden_size"])
    known = {(4 * len(_SCALES) * width,): "nvila", (9 * width,): "nvila_lite"}
    if entering not in known:
        raise InvalidCheckpoint(
            f"mm_projector. tensor 'layers.1.weight' has shape {entering}; "
            f"on a tower of width {width} one of {list(known)} is known"
        )
    return known[entering]


def flat_kind(layout: Layout) -> str:
    """The `model_type` under which a flat file of this model can be read by others: `nvila` or `nvila_lite` where their
    constants are its own, else `vila`, which says that they are not."""
    for kind, types in _PROJECTORS.items():
        words = _spelled_out(kind, {}, layout.tower)
        decisive = (*_CONSTANTS[kind], *(key for key in ("s2_scales", *_DECISIVE) if key in words))
        is_same = all(layout.root.get(key, words[key]) == words[key] for key in decisive)
        if (
            is_same
            and not layout.root.get("s2")
            and layout.projector.get("mm_projector_type") in types
            and "TSP" not in str(layout.root.get("video_encoder"))
        ):
            return kind
    return "vila"


def _spelled_out(kind: str, root: Json, tower: Json) -> Json:
    """The root configuration that the folder layout would have; keys of it that the flat file does have win."""
    words: dict[str, Any] = {**_COMMON, **_CONSTANTS[kind]}
    if kind == "nvila":
        words["s2_scales"] = ",".join(str(scale * int(tower["image_size"])) for scale in _SCALES)
    said = {key: root[key] for key in (*words, "vision_resolution", "time_token_format") if root.get(key) is not None}
    own = {key: value for key, value in said.items() if key not in ("model_type", "architectures")}
    return words | own


# -- files ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file that holds one JSON object; `default`, where given, when there is none."""
    if default is not None and not path.exists():
        return default
    label = f"{path.parent.name}/{path.name}" if path.parent.name in set(Part) else path.name
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidCheckpoint(f"{label} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{label} holds no JSON object")
    return content
