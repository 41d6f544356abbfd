"""A checkpoint's own JSON files to an `NvilaConfig` (NVILA-SPEC §7.1-7.2). Pure Python, no I/O.

Unknown keys are ignored; classes named in the files are matched by name and never imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nvila.errors import InvalidCheckpoint
from nvila.model.config import ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap

Json = Mapping[str, Any]
Encode = Callable[[str], list[int]]


def read_config(
    *, name: str, root: Json, llm: Json, tower: Json, projector: Json, processor: Json, encode: Encode
) -> NvilaConfig:
    """The model that these files describe. `encode` is the tokenizer's `encode_markup`.

    Raises `InvalidCheckpoint` naming the key at fault.
    """
    tower_config = _tower(root, tower)
    mode = _image_mode(root)
    is_static_s2 = bool(root.get("s2")) and mode is not ImageMode.DYNAMIC_S2
    scales = (
        _static_scales(root, tower_config) if is_static_s2 else _scales(root) if mode is ImageMode.DYNAMIC_S2 else ()
    )
    llm_config = _llm(llm)
    video = media_encoder(root.get("video_encoder"), "video_encoder", ("BasicVideoEncoder", "TSPVideoEncoder"))
    image = media_encoder(root.get("image_encoder"), "image_encoder", ("BasicImageEncoder",))
    return NvilaConfig(
        name=name,
        tower=tower_config,
        llm=llm_config,
        image_mode=mode,
        tile_px=scales[-1] if is_static_s2 else _tile_px(root, tower_config, processor, scales),
        s2_scales=scales,
        s2_merge_index=_integer(root, "s2_resize_output_to_scale_idx", 0),
        min_tiles=_integer(root, "min_tiles", 1),
        max_tiles=_integer(root, "max_tiles", 12),
        projector_type=_required(projector, "mm_projector_type", "mm_projector/config.json"),
        projector_width=tower_config.width * max(1, len(scales)),
        image_wrap=wrap_ids(image, encode),
        video_wrap=wrap_ids(video, encode),
        pool_sizes=_pool_sizes(video),
        default_frames=_integer(root, "num_video_frames", 8),
        fps=float(root.get("fps") or 0.0),
        time_tokens=_integer(root, "num_time_tokens", 0),
        time_token_format=root.get("time_token_format") or "<t{t}>",
    )


def _tower(root: Json, tower: Json) -> TowerConfig:
    where = "vision_tower/config.json"
    if "siglip" not in "".join(tower.get("architectures") or [tower.get("model_type", "")]).lower():
        raise InvalidCheckpoint(f"{where} describes {tower.get('architectures')}; only SigLIP towers are supported")
    feature = root.get("mm_vision_select_feature")
    if feature != "cls_patch":
        raise InvalidCheckpoint(
            f"mm_vision_select_feature is {feature!r}; 'cls_patch' is needed, SigLIP has no class token"
        )
    return TowerConfig(
        image_px=_count(tower, "image_size", where),
        patch_px=_count(tower, "patch_size", where),
        width=_count(tower, "hidden_size", where),
        mlp_width=_count(tower, "intermediate_size", where),
        layers=_count(tower, "num_hidden_layers", where),
        heads=_count(tower, "num_attention_heads", where),
        norm_eps=float(tower.get("layer_norm_eps", 1e-6)),
        select_layer=_whole(_required(root, "mm_vision_select_layer", "config.json"), "mm_vision_select_layer"),
    )


def _llm(llm: Json) -> LlmConfig:
    where = "llm/config.json"
    if llm.get("model_type") != "qwen2":
        raise InvalidCheckpoint(f"{where} has model_type {llm.get('model_type')!r}; 'qwen2' is needed")
    width, heads = _count(llm, "hidden_size", where), _count(llm, "num_attention_heads", where)
    rope: Json = llm.get("rope_parameters") or {}
    return LlmConfig(
        width=width,
        mlp_width=_count(llm, "intermediate_size", where),
        layers=_count(llm, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_count({"num_key_value_heads": heads} | _given(llm), "num_key_value_heads", where),
        head_width=_count({"head_dim": width // heads} | _given(llm), "head_dim", where),
        vocab=_count(llm, "vocab_size", where),
        is_tied=bool(llm.get("tie_word_embeddings", False)),
        max_positions=_count(llm, "max_position_embeddings", where),
        norm_eps=float(llm.get("rms_norm_eps", 1e-6)),
        rope_base=float(llm.get("rope_theta") or rope.get("rope_theta") or 1e6),
    )


def _image_mode(root: Json) -> ImageMode:
    mode = root.get("image_aspect_ratio") or "resize"
    if mode not in set(ImageMode):
        raise InvalidCheckpoint(f"image_aspect_ratio is {mode!r}; known: {', '.join(ImageMode)}")
    if (mode == ImageMode.DYNAMIC_S2) != bool(root.get("dynamic_s2")):
        raise InvalidCheckpoint(
            f"image_aspect_ratio is {mode!r} and dynamic_s2 {root.get('dynamic_s2')!r}: they disagree"
        )
    return ImageMode(mode)


def _scales(root: Json) -> tuple[int, ...]:
    given = _required(root, "s2_scales", "config.json")
    scales = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    return tuple(_whole(scale, "s2_scales") for scale in scales)


def _static_scales(root: Json, tower: TowerConfig) -> tuple[int, ...]:
    """Of static S2 (spec §3.6), each of which `s2_max_split_size` must cut into squares of the tower's own side."""
    scales = tuple(sorted(_scales(root)))
    most = _integer(root, "s2_max_split_size", scales[-1])
    for scale in scales:
        if most < 1 or scale != -(-scale // most) * tower.image_px:
            raise InvalidCheckpoint(
                f"s2_max_split_size {most} does not cut the scale of {scale} px into squares of the tower's "
                f"{tower.image_px} px"
            )
    if _integer(root, "vision_resolution", -1) not in (-1, tower.image_px):
        raise InvalidCheckpoint(f"vision_resolution is {root['vision_resolution']}: not supported with static S2")
    return scales


def _tile_px(root: Json, tower: TowerConfig, processor: Json, scales: tuple[int, ...]) -> int:
    """The processor's side: Dynamic-S2's first scale, else its own size, else `vision_resolution` where that is set.

    A side other than the tower's needs `vision_resolution`, which has the position table resampled (spec §3.7).
    """
    resolution = _integer(root, "vision_resolution", -1)
    size = processor.get("size") or {}
    own = int(size.get("height") or tower.image_px) if isinstance(size, Mapping) else int(size)
    side = scales[0] if scales else resolution if resolution > 0 else own
    if side != tower.image_px and side != resolution:
        raise InvalidCheckpoint(f"tiles are {side} px, the tower was made for {tower.image_px} px")
    return side


def media_encoder(given: Any, key: str, known: tuple[str, ...]) -> Json:
    """Arguments of a media encoder: a dictionary or JSON string with `_target_`; absent means the basic one."""
    try:
        encoder: Any = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        encoder = None
    if not isinstance(encoder, Mapping):
        raise InvalidCheckpoint(f"{key} is {given!r:.80}; an object is needed, or its JSON")
    name = str(encoder.get("_target_", known[0])).rpartition(".")[2]
    if name not in known:
        raise InvalidCheckpoint(f"{key} is {name!r}; known: {', '.join(known)}")
    if name == "TSPVideoEncoder" and not encoder.get("pool_sizes"):
        raise InvalidCheckpoint(f"{key} is a TSPVideoEncoder without pool_sizes")
    return encoder if name == "TSPVideoEncoder" else {k: v for k, v in encoder.items() if k.endswith("_tokens")}


def _pool_sizes(video: Json) -> tuple[tuple[int, int, int], ...]:
    given = video.get("pool_sizes") or [[1, 1, 1]]
    if not isinstance(given, list) or not all(isinstance(pool, list) and len(pool) == 3 for pool in given):
        raise InvalidCheckpoint(f"pool_sizes is {given!r:.80}; a list of triples is needed")
    return tuple((_whole(f, "pool_sizes"), _whole(h, "pool_sizes"), _whole(w, "pool_sizes")) for f, h, w in given)


def wrap_ids(encoder: Json, encode: Encode) -> Wrap:
    """Default: nothing before, one newline after every block, no separator (spec §5.3)."""

    def ids(key: str, default: str | None) -> tuple[int, ...]:
        text = encoder.get(key, default)
        return tuple(encode(text)) if text else ()

    return Wrap(start=ids("start_tokens", None), end=ids("end_tokens", "\n"), sep=ids("sep_tokens", None))


def _required(config: Json, key: str, where: str) -> Any:
    value = config.get(key)
    if value is None:
        raise InvalidCheckpoint(f"{where} has no {key!r}")
    return value


def _given(config: Json) -> dict[str, Any]:
    """Without the keys that say nothing."""
    return {key: value for key, value in config.items() if value}


def _count(config: Json, key: str, where: str) -> int:
    value = _whole(_required(config, key, where), key)
    if value < 1:
        raise InvalidCheckpoint(f"{key} in {where} is {value}; at least 1 is needed")
    return value


def _integer(config: Json, key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else _whole(value, key)


def _whole(value: Any, key: str) -> int:
    """A whole number, in whichever way JSON writers put it."""
    try:
        whole = int(value)
        if whole == float(value):
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidCheckpoint(f"{key} is {value!r:.80}; a whole number is needed")
