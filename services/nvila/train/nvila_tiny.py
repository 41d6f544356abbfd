"""nvila-tiny before it has learned anything: its shape, its words, its first weights; and what it costs to train.

The whole path in at most 40 MB: a SigLIP-shape tower, the projector of NVILA-8B, a Qwen2-shape language model with
heads of 64 (which vLLM's CPU attention has), and a byte-level BPE vocabulary learned from the texts of the generated
tasks, with 100 time tokens in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from nvila.model.checkpoint import RANDOM_KEY, TOWER_PREFIX, Checkpoint
from nvila.model.config import NvilaConfig, TowerConfig
from nvila.model.cost import prefill_flops, projector_flops, tower_flops
from nvila.model.layouts import Part
from nvila.model.projector import Projector
from nvila.model.qwen2 import llm_shapes
from nvila.model.save import save_part, whole_folder, write_json
from nvila.model.siglip import Tower
from nvila.model.time_tokens import time_tokens
from nvila.model.tiny import SPECIAL_TOKENS
from nvila.model.tokenizer import CHAT_TEMPLATE, QWEN2_WORDS

SPREAD = 0.02
"""Standard deviation of first embeddings (`initializer_range` of Qwen2). Matrices start at the inverse root of how many
numbers they add up, which at Qwen2's width is nearly the same; a narrow model would start too quietly with 0.02."""


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """`tower_layers` counts the last block, which NVILA does not use (NVILA-SPEC §3.2)."""

    tile_px: int = 224
    patch_px: int = 16
    tower_width: int = 192
    tower_mlp: int = 768
    tower_layers: int = 7
    tower_heads: int = 3
    llm_width: int = 256
    llm_mlp: int = 768
    llm_layers: int = 6
    llm_heads: int = 4
    llm_kv_heads: int = 2
    time_tokens: int = 100
    max_positions: int = 16384


TINY = TinyShape()
TOY = TinyShape(
    tile_px=56,
    patch_px=14,
    tower_width=64,
    tower_mlp=128,
    tower_layers=3,
    tower_heads=2,
    llm_width=128,
    llm_mlp=256,
    llm_layers=2,
    llm_heads=2,
    llm_kv_heads=1,
    max_positions=4096,
)
"""Steps in tens of milliseconds on a processor core."""


def make_base(folder: Path, shape: TinyShape = TINY, merges: Sequence[str] = (), seed: int = 0) -> Path:
    """Write the checkpoint that `tiny_base` starts from: one tile per picture, random weights. The same seed gives the
    same weights. A folder that is there is kept. `merges`: of the vocabulary; default: nvila-tiny's own."""
    if (folder / "config.json").exists():
        return folder
    with whole_folder(folder, is_kept=True) as new:
        rows = _write_tokenizer(new / Part.LLM, merges or tiny_merges(), shape)
        write_json(new / Part.LLM / "config.json", _llm(shape, rows))
        write_json(new / Part.TOWER / "config.json", _tower(shape))
        write_json(new / Part.TOWER / "preprocessor_config.json", _processor(shape))
        projector = {"architectures": ["MultimodalProjector"], "model_type": "v2l_projector"}
        write_json(new / Part.PROJECTOR / "config.json", projector | {"mm_projector_type": "mlp_downsample"})
        write_json(new / "config.json", _root(shape))
        config = Checkpoint.open(new).config
        for part, weights in _first_weights(config, seed).items():
            save_part(new / part, weights)
    return folder


# -- words ------------------------------------------------------------------------------------------------------------


def tiny_merges() -> list[str]:
    """nvila-tiny's, learned once from the texts of 22,000 generated samples (`learn_merges`)."""
    return Path(__file__).with_name("nvila_tiny_merges.txt").read_text("utf-8").splitlines()[1:]


def learn_merges(texts: Iterable[str], words: int) -> list[str]:
    """Of a byte-level BPE with at most so many words; fewer where the texts give fewer pairs that come twice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def _write_tokenizer(folder: Path, merges: Sequence[str], shape: TinyShape) -> int:
    """The files of a published `llm/` folder; returns how many rows the embedding table has, a multiple of 64."""
    joined = ["".join(pair.split(" ")) for pair in merges]
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *joined])}
    times = time_tokens(shape.time_tokens)
    added = {token: len(vocabulary) + i for i, token in enumerate([*SPECIAL_TOKENS, *times])}
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges), "utf-8")
    write_json(folder / "added_tokens.json", added)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    additional = ["<|im_start|>", "<|im_end|>"]
    write_json(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": additional})
    described = {str(i): {"content": t, **flags, "special": t in SPECIAL_TOKENS} for t, i in added.items()}
    write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "added_tokens_decoder": described,
            "additional_special_tokens": additional,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": shape.max_positions,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    ids = {"bos_token_id": added["[BOS]"], "eos_token_id": added["<|im_end|>"], "pad_token_id": added["[PAD]"]}
    write_json(folder / "generation_config.json", ids)
    return -(-(len(vocabulary) + len(added)) // 64) * 64


# -- configuration ----------------------------------------------------------------------------------------------------


def _llm(shape: TinyShape, rows: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": shape.llm_width,
        "intermediate_size": shape.llm_mlp,
        "max_position_embeddings": shape.max_positions,
        "model_max_length": shape.max_positions,
        "model_type": "qwen2",
        "num_attention_heads": shape.llm_heads,
        "num_hidden_layers": shape.llm_layers,
        "num_key_value_heads": shape.llm_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": rows,
    }


def _tower(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.tower_width,
        "image_size": shape.tile_px,
        "intermediate_size": shape.tower_mlp,
        "layer_norm_eps": 1e-6,
        "model_type": "siglip_vision_model",
        "num_attention_heads": shape.tower_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.tower_layers,
        "patch_size": shape.patch_px,
        "torch_dtype": "float32",
        "vision_use_head": False,
    }


def _processor(shape: TinyShape) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": shape.tile_px, "width": shape.tile_px},
    }


def _root(shape: TinyShape) -> dict[str, Any]:
    video = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}
    return {
        "architectures": ["LlavaLlamaModel"],
        "dynamic_s2": False,
        "fps": 0.0,
        "hidden_size": shape.llm_width,
        "image_aspect_ratio": "resize",
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
        "interpolate_mode": "linear",
        "max_tiles": 9,
        "min_tiles": 1,
        "mm_hidden_size": shape.tower_width,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "model_dtype": "torch.float32",
        "model_type": "llava_llama",
        "num_time_tokens": shape.time_tokens,
        "num_video_frames": 32,
        "s2": False,
        "time_token_format": "<t{t}>",
        "video_encoder": video,
        "video_max_tiles": 1,
        "vision_resolution": -1,
        RANDOM_KEY: {"version": "nvila-tiny"},
    }


# -- weights ----------------------------------------------------------------------------------------------------------


def _first_weights(config: NvilaConfig, seed: int) -> dict[Part, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower, projector = _whole_tower(config), Projector.of(config)
    llm: dict[str, Tensor] = {}
    for name, size in llm_shapes(config.llm).items():
        if name.endswith("norm.weight"):
            llm[name] = torch.ones(size)
        elif name.endswith("bias"):
            llm[name] = torch.zeros(size)
        else:
            # Layers that add to the residual stream start smaller (GPT-2: by the root of how many there are).
            is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = SPREAD if "embed_tokens" in name else size[-1] ** -0.5
            llm[name] = torch.randn(size, generator=draw) * spread / ((2 * config.llm.layers) ** 0.5 if is_last else 1)
    prefixed = {TOWER_PREFIX + name: tensor for name, tensor in tower.items()}
    return {Part.LLM: llm, Part.TOWER: prefixed, Part.PROJECTOR: dict(projector.state_dict())}


def _whole_tower(config: NvilaConfig) -> dict[str, Tensor]:
    """With the block and the norm that only others than NVILA use, so that `transformers` finds everything."""
    full = TowerConfig(**{**vars(config.tower), "select_layer": config.tower.layers})
    tower = Tower(full, config.tile_px)
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            summed = 0 if isinstance(module, nn.Embedding) else module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=summed**-0.5 if summed else SPREAD)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)
    width = config.tower.width
    norm = {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    return {**dict(tower.state_dict()), **norm}


# -- what it costs ----------------------------------------------------------------------------------------------------


def parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """By part, as stored."""
    return {
        part.value: sum(tensor.numel() for tensor in checkpoint.layout.weights(part).tensors().values())
        for part in Part
    }


def training_flops(config: NvilaConfig, *, tiles: int, positions: int, trained: Iterable[str]) -> float:
    """Of one sample: forward, plus twice that through whatever learns or lies between what learns and the loss."""
    trained = set(trained)
    tower = tower_flops(config, tiles) * (3 if "tower" in trained else 1)
    projector = projector_flops(config, tiles) * 3
    llm = prefill_flops(config, positions) * (3 if "llm" in trained else 2)
    return tower + projector + llm
