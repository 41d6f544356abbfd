"""Fine-tuning few parameters: LoRA and QLoRA through PEFT, LayerNorms of the tower (NVILA-SPEC §8.4).

Adapters are put inside the modules (PEFT's `inject_adapter_in_model`), so that the training forward stays as it is, and
merged into the weights before a checkpoint is written: what is served has no trace of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nvila.errors import InvalidRequest
from nvila.train.model import Module, TrainableNvila
from nvila.train.recipes import LLM, TOWER, Adapters


def freeze_all_but_norms(tower: nn.Module) -> None:
    """Of the tower, only LayerNorms learn: whatever is named embedding, mlp, self_attn or head does not."""
    frozen = ("embedding", "mlp", "self_attn", "head")
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(not any(word in name for word in frozen))


def adapt(model: TrainableNvila, settings: Adapters) -> None:
    """Put adapters on every linear layer of the chosen sides, but not on the output head; the layers themselves freeze.

    What is stored in 4 bits is packed where the model is: on the processor, so that a GPU never holds it whole.
    Raises `InvalidRequest` where 4 bits are asked for and cannot be had.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for side in settings.on:
        module = {LLM: model.llm, TOWER: model.tower}[side]
        was_learning = {
            name for name, p in module.named_parameters() if p.requires_grad and Module(side) in model.trained
        }
        module.requires_grad_(False)
        if side == LLM and settings.bits == 4:
            obstacle = obstacle_to_4_bits()
            if obstacle:
                raise InvalidRequest(obstacle)
            store_in_4_bits(module)
        names = sorted(
            {n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        )
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            bias="none",
            use_dora=settings.use_dora,
            target_modules=names,
        )
        inject_adapter_in_model(config, module)
        for name, parameter in module.named_parameters():
            if side == TOWER and name in was_learning:
                parameter.requires_grad_(True)
        model.trained |= {Module(side)} if side == TOWER else frozenset()
        module.train()


def merge(model: TrainableNvila) -> None:
    """Add what adapters learned to the weights, and put plain linear layers back. Nothing happens without adapters."""
    for module in (model.llm, model.tower):
        for name, layer in list(module.named_modules()):
            if not hasattr(layer, "get_base_layer") or not hasattr(layer, "merge"):
                continue
            layer.base_layer = _plain(layer.get_base_layer())
            layer.merge(safe_merge=True)
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())


def _plain(base: nn.Module) -> nn.Module:
    """A linear layer that was stored in 4 bits, in float32 again."""
    state: Any = getattr(base.weight, "quant_state", None)
    if state is None:
        return base
    import bitsandbytes

    weight = bitsandbytes.functional.dequantize_4bit(base.weight.data, state).float()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None)
    plain.weight = nn.Parameter(weight)
    if isinstance(base.bias, Tensor):
        plain.bias = nn.Parameter(base.bias.detach().float())
    return plain


def obstacle_to_4_bits() -> str:
    """Why a language model cannot be trained in 4 bits here; empty if it can."""
    if not torch.cuda.is_available():
        return "QLoRA stores the language model in 4 bits, which needs an NVIDIA GPU; use finetune-lora"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"QLoRA needs the package bitsandbytes: {error}"
    return ""


def store_in_4_bits(llm: nn.Module) -> None:
    """nf4 with double quantisation in place of every linear layer but the head."""
    import bitsandbytes

    for name, layer in list(llm.named_modules()):
        if not isinstance(layer, nn.Linear) or name.endswith("lm_head"):
            continue
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        device = layer.weight.device
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        setattr(llm.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], packed.to(device))
