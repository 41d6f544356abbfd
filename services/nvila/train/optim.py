"""The optimizer: AdamW in groups, with Muon for matrices where a recipe wants it, and the learning rate's course
(NVILA-SPEC §8.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nvila.errors import InvalidRequest
from nvila.train.recipes import PROJECTOR, TOWER, Optim


def parameter_groups(model: nn.Module, settings: Optim) -> list[dict[str, Any]]:
    """Learning parameters by module and by whether they decay: biases and norms do not (in the reference, whatever is
    not a weight of a LayerNorm-like module or called bias).

    The reference ignores the tower's rate where the projector has its own; here both are taken as they are said.
    """
    rates = {TOWER: settings.tower_lr, PROJECTOR: settings.projector_lr}

    def rate(module: str) -> float:
        own = rates.get(module)
        return settings.lr if own is None else own

    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("bias")
            by_muon = settings.muon > 0 and parameter.ndim == 2 and ".layers." in name
            groups.setdefault((name.partition(".")[0], decays, by_muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": (lr := rate(module) * (settings.muon if by_muon else 1.0)),
            "peak_lr": lr,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "by_muon": by_muon,
        }
        for (module, decays, by_muon), parameters in groups.items()
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Each group by Muon or by AdamW, as its `by_muon` says; to its user one optimizer."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optim) -> None:
        super().__init__(groups, {})
        by_muon = [group for group in self.param_groups if group["by_muon"]]
        by_adamw = [group for group in self.param_groups if not group["by_muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if by_muon:
            self._parts.append(torch.optim.Muon(by_muon, adjust_lr_fn="match_rms_adamw"))
        if by_adamw:
            self._parts.append(torch.optim.AdamW(by_adamw, betas=settings.betas, fused=True))
        for part in self._parts:
            part.state = self.state  # groups are shared as they are; so are moments

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def make_optimizer(model: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """Raises `InvalidRequest` when nothing learns, or the moments' format is unknown."""
    groups = parameter_groups(model, settings)
    if not groups:
        raise InvalidRequest("the recipe trains no parameter")
    if settings.muon:
        return MuonAdamW(groups, settings)
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas}
    if settings.states == "float32":
        return torch.optim.AdamW(groups, **common, fused=True)
    from torchao import optim as low_bit

    kinds = {"8bit": low_bit.AdamW8bit, "fp8": low_bit.AdamWFp8}
    if settings.states not in kinds:
        raise InvalidRequest(f"optimizer states {settings.states!r} are unknown; known: float32, {', '.join(kinds)}")
    optimizer: torch.optim.Optimizer = kinds[settings.states](groups, **common)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, settings: Optim, progress: float) -> float:
    """Linear warm-up, then a half cosine to 0, as functions of the share of the run that is done; returns the first
    group's rate."""
    warm = settings.warmup
    if progress < warm:
        factor = progress / warm
    else:
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / max(1e-9, 1 - warm))))
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return float(optimizer.param_groups[0]["lr"])
