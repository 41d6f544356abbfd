"""The language model's own tensors: which there must be, and loading them without copying.

Serving leaves the language model to its engine; this is for training, checks and whoever needs it in process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvila.model.config import LlmConfig

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM

    from nvila.model.layouts import Layout

UNUSED_IN_LLM = ("model.rotary_emb.",)
"""A buffer that older `transformers` saved."""


def llm_shapes(config: LlmConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a Qwen2 model: biases on q, k and v only (NVILA-SPEC §1); no head where it is tied."""
    D, mlp, q, kv = (
        config.width,
        config.mlp_width,
        config.heads * config.head_width,
        config.kv_heads * config.head_width,
    )
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q, D),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (D, q),
        "mlp.gate_proj.weight": (mlp, D),
        "mlp.up_proj.weight": (mlp, D),
        "mlp.down_proj.weight": (D, mlp),
    }
    blocks = {f"model.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in block.items()}
    head = {} if config.is_tied else {"lm_head.weight": (config.vocab, D)}
    return {"model.embed_tokens.weight": (config.vocab, D)} | blocks | {"model.norm.weight": (D,)} | head


def load_llm(layout: Layout, config: LlmConfig) -> Qwen2ForCausalLM:
    """`transformers`' Qwen2 on the checkpoint's memory-mapped tensors, in the stored dtype: no second copy.

    Not to be written to: `.to(dtype)`, or moving it to a device, makes a copy that may be. Raises `InvalidCheckpoint`.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from nvila.model.layouts import Part

    shapes = llm_shapes(config)
    unused = (*UNUSED_IN_LLM, *(["lm_head."] if config.is_tied else []))
    tensors = layout.weights(Part.LLM).take(shapes, unused)
    described = Qwen2Config.from_dict(dict(layout.llm))
    with torch.device("meta"):
        llm = Qwen2ForCausalLM(described)
    llm.load_state_dict(_with_head(tensors, config), strict=True, assign=True)
    llm.tie_weights()
    llm.model.rotary_emb = Qwen2RotaryEmbedding(described)  # computed, not stored: the one made above holds nothing
    return llm.eval().requires_grad_(False)


def _with_head(tensors: dict[str, torch.Tensor], config: LlmConfig) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]} if config.is_tied else tensors
