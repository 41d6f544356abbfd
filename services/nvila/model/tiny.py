"""A made-up checkpoint: the published layout, a real tokenizer and random weights, so that all programs run anywhere.

Its words mean nothing, and `Checkpoint.is_random` says so. The same seed gives the same bytes: weights are integers
from PCG64, scaled and rounded to float16, and the vocabulary is the 3,000 merges of `tiny_merges.txt`, learned from
this project's own documents.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nvila.model.checkpoint import RANDOM_KEY
from nvila.model.tokenizer import CHAT_TEMPLATE, IMAGE, SENTINEL, VIDEO

VERSION = 1
"""Raised whenever the bytes of a made-up checkpoint change."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", SENTINEL, IMAGE, VIDEO, "[BOS]", "[PAD]")
"""In the order of the newer published layout, in which media tokens are saved (NVILA-SPEC §6.1)."""

TILE_PX, PATCH_PX = 112, 14
SCALES = (112, 224, 336)
TOWER_WIDTH, TOWER_MLP, TOWER_LAYERS, TOWER_HEADS = 128, 256, 4, 4
LLM_WIDTH, LLM_MLP, LLM_LAYERS, LLM_HEADS, LLM_KV_HEADS = 256, 512, 3, 4, 2
HEAD_WIDTH = LLM_WIDTH // LLM_HEADS
"""64: one of the sizes that vLLM's CPU attention has."""
MAX_POSITIONS = 16384
VIDEO_FRAMES, POOL_SIZES = 256, [[8, 1, 1]]

LOGIT_SPREAD = 6.0
"""Standard deviation of the logits of words: wide enough that the best one is rarely close to the next."""

WORD = re.compile(r"Ġ[A-Za-z]{2,}|[.,]")
"""Tokens that the made-up model can say; other rows of its output head are zero, so that answers are readable text."""

Tensors = dict[str, NDArray[np.float32]]


def make_random_checkpoint(folder: str | Path, seed: int = 0) -> Path:
    """Write the checkpoint of this seed to `folder`, all at once or not at all; an equal one that is there is kept.

    Takes about a second. Raises `FileExistsError` if something else is there.
    """
    target = Path(folder)
    mark = {"version": VERSION, "seed": seed}
    if _is_made(target, mark):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        _write(made, seed, mark)
        try:
            made.rename(target)
        except OSError as error:
            if not _is_made(target, mark):
                raise FileExistsError(f"{target} is there and holds something else") from error
    return target


def _is_made(folder: Path, mark: dict[str, int]) -> bool:
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text("utf-8")).get(RANDOM_KEY) == mark


def _write(folder: Path, seed: int, mark: dict[str, int]) -> None:
    vocabulary = _vocabulary()
    draw = _Draw(seed)
    _write_json(folder / "config.json", _root_config(mark))
    _write_json(folder / "vision_tower" / "config.json", TOWER_CONFIG)
    _write_json(folder / "vision_tower" / "preprocessor_config.json", PROCESSOR_CONFIG)
    _save(folder / "vision_tower", _tower_tensors(draw))
    _write_json(folder / "mm_projector" / "config.json", PROJECTOR_CONFIG)
    _save(folder / "mm_projector", _projector_tensors(draw))
    _write_json(folder / "llm" / "config.json", _llm_config(vocabulary))
    _write_tokenizer(folder / "llm", vocabulary)
    _save(folder / "llm", _llm_tensors(draw, vocabulary))


# -- configuration ----------------------------------------------------------------------------------------------------

TOWER_CONFIG: dict[str, Any] = {
    "architectures": ["SiglipVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": TOWER_WIDTH,
    "image_size": TILE_PX,
    "intermediate_size": TOWER_MLP,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": TOWER_HEADS,
    "num_channels": 3,
    "num_hidden_layers": TOWER_LAYERS,
    "patch_size": PATCH_PX,
    "torch_dtype": "float32",
    "vision_use_head": False,
}

PROCESSOR_CONFIG: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": TILE_PX, "width": TILE_PX},
}

PROJECTOR_CONFIG: dict[str, Any] = {
    "architectures": ["MultimodalProjector"],
    "mm_projector_type": "mlp_downsample",
    "model_type": "v2l_projector",
    "torch_dtype": "float32",
}


def _llm_config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": _special_id(vocabulary, "<|endoftext|>"),
        "eos_token_id": _special_id(vocabulary, "<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": LLM_WIDTH,
        "intermediate_size": LLM_MLP,
        "max_position_embeddings": MAX_POSITIONS,
        "model_max_length": MAX_POSITIONS,
        "model_type": "qwen2",
        "num_attention_heads": LLM_HEADS,
        "num_hidden_layers": LLM_LAYERS,
        "num_key_value_heads": LLM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(vocabulary) + len(SPECIAL_TOKENS),
    }


def _root_config(mark: dict[str, int]) -> dict[str, Any]:
    return {
        "_name_or_path": "",
        "architectures": ["LlavaLlamaModel"],
        "chat_template": None,
        "dynamic_s2": True,
        "fps": 0.0,
        "hidden_size": LLM_WIDTH,
        "image_aspect_ratio": "dynamic_s2",
        "image_encoder": json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder"}),
        "interpolate_mode": "linear",
        "llm_cfg": {"model_type": "qwen2"},
        "max_tiles": 12,
        "min_tiles": 1,
        "mm_hidden_size": TOWER_WIDTH * len(SCALES),
        "mm_projector_cfg": PROJECTOR_CONFIG,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.float32",
        "model_type": "llava_llama",
        "num_time_tokens": 0,
        "num_video_frames": VIDEO_FRAMES,
        "s2": False,
        "s2_max_split_size": TILE_PX,
        "s2_resize_output_to_scale_idx": -1,
        "s2_scales": ",".join(map(str, SCALES)),
        "time_token_format": "<t{t}>",
        "video_encoder": json.dumps({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": POOL_SIZES}),
        "video_max_tiles": 1,
        "vision_resolution": -1,
        "vision_tower_cfg": {"model_type": "siglip_vision_model"},
        RANDOM_KEY: mark,
    }


# -- tokenizer --------------------------------------------------------------------------------------------------------


def _vocabulary() -> dict[str, int]:
    """Byte symbols, then one entry per merge."""
    tokens = [*_byte_symbols(), *("".join(pair) for pair in _merges())]
    return {token: i for i, token in enumerate(tokens)}


def _merges() -> list[tuple[str, str]]:
    lines = Path(__file__).with_name("tiny_merges.txt").read_text("utf-8").splitlines()
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines[1:])]


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (`bytes_to_unicode`), which byte-level BPE is written in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _special_id(vocabulary: dict[str, int], token: str) -> int:
    return len(vocabulary) + SPECIAL_TOKENS.index(token)


def _write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    """The files of a published `llm/` folder; no `tokenizer.json`."""
    ids = {token: _special_id(vocabulary, token) for token in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(folder / "vocab.json", vocabulary)
    shutil.copyfile(Path(__file__).with_name("tiny_merges.txt"), folder / "merges.txt")
    _write_json(folder / "added_tokens.json", ids)
    roles = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    additional = ["<|im_start|>", "<|im_end|>"]
    _write_json(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": additional})
    _write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "added_tokens_decoder": {str(i): {"content": t, **flags, "special": True} for t, i in ids.items()},
            "additional_special_tokens": additional,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": MAX_POSITIONS,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    end = ids["<|im_end|>"]
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": ids["[BOS]"], "eos_token_id": end, "pad_token_id": ids["[PAD]"]},
    )


# -- weights ----------------------------------------------------------------------------------------------------------


class _Draw:
    """Uniform weights of a given spread, the same on every machine: integers, scaled and rounded to float16."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, *shape: int, spread: float, centre: float = 0.0) -> NDArray[np.float32]:
        steps = self._generator.integers(-1024, 1025, size=shape, dtype=np.int16)
        values = np.float64(centre) + steps * (spread * 3**0.5 / 1024)
        return values.astype(np.float16).astype(np.float32)

    def linear(self, name: str, inputs: int, outputs: int, *, gain: float = 1.0, has_bias: bool = True) -> Tensors:
        """Weights that keep the variance of their input, times `gain`²."""
        tensors = {f"{name}.weight": self(outputs, inputs, spread=gain * inputs**-0.5)}
        return tensors | ({f"{name}.bias": self(outputs, spread=0.1)} if has_bias else {})

    def norm(self, name: str, width: int, *, has_bias: bool = True) -> Tensors:
        tensors = {f"{name}.weight": self(width, spread=0.1, centre=1.0)}
        return tensors | ({f"{name}.bias": self(width, spread=0.1)} if has_bias else {})


def _tower_tensors(draw: _Draw) -> Tensors:
    C = TOWER_WIDTH
    tensors = {
        "vision_model.embeddings.patch_embedding.weight": draw(C, 3, PATCH_PX, PATCH_PX, spread=0.06),
        "vision_model.embeddings.patch_embedding.bias": draw(C, spread=0.1),
        "vision_model.embeddings.position_embedding.weight": draw((TILE_PX // PATCH_PX) ** 2, C, spread=0.3),
    }
    for i in range(TOWER_LAYERS):
        block = f"vision_model.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            tensors |= draw.norm(f"{block}.{norm}", C)
        for side in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= draw.linear(f"{block}.self_attn.{side}", C, C)
        tensors |= draw.linear(f"{block}.mlp.fc1", C, TOWER_MLP) | draw.linear(f"{block}.mlp.fc2", TOWER_MLP, C)
    return tensors | draw.norm("vision_model.post_layernorm", C)


def _projector_tensors(draw: _Draw) -> Tensors:
    W, D = 4 * TOWER_WIDTH * len(SCALES), LLM_WIDTH
    return draw.norm("layers.1", W) | draw.linear("layers.2", W, D) | draw.linear("layers.4", D, D, gain=1.7)


def _llm_tensors(draw: _Draw, vocabulary: dict[str, int]) -> Tensors:
    D, attention, kv = LLM_WIDTH, LLM_HEADS * HEAD_WIDTH, LLM_KV_HEADS * HEAD_WIDTH
    rows = len(vocabulary) + len(SPECIAL_TOKENS)
    tensors = {"model.embed_tokens.weight": draw(rows, D, spread=1.0)}
    for i in range(LLM_LAYERS):
        block = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors |= draw.norm(f"{block}.{norm}", D, has_bias=False)
        tensors |= draw.linear(f"{block}.self_attn.q_proj", D, attention, gain=1.5)
        tensors |= draw.linear(f"{block}.self_attn.k_proj", D, kv, gain=1.5)
        tensors |= draw.linear(f"{block}.self_attn.v_proj", D, kv, gain=2.0)
        tensors |= draw.linear(f"{block}.self_attn.o_proj", attention, D, gain=2.0, has_bias=False)
        tensors |= draw.linear(f"{block}.mlp.gate_proj", D, LLM_MLP, has_bias=False)
        tensors |= draw.linear(f"{block}.mlp.up_proj", D, LLM_MLP, has_bias=False)
        tensors |= draw.linear(f"{block}.mlp.down_proj", LLM_MLP, D, gain=2.0, has_bias=False)
    head = draw(rows, D, spread=LOGIT_SPREAD * D**-0.5)
    said = np.zeros((rows, 1), np.float32)
    said[[i for token, i in vocabulary.items() if WORD.fullmatch(token)]] = 1
    said[_special_id(vocabulary, "<|im_end|>")] = 1
    return tensors | draw.norm("model.norm", D, has_bias=False) | {"lm_head.weight": head * said}


# -- files ------------------------------------------------------------------------------------------------------------


def _save(folder: Path, tensors: Tensors) -> None:
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
