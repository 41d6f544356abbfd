"""Several processes, one model: who this process is, how weights are shared (FSDP2), and what all have to agree on.

`torchrun` and Ray Train set the same environment; without it there is one process and nothing is shared. Lanes are
dealt to processes, gradients are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvila.errors import InvalidRequest
from nvila.train.model import TrainableNvila


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world`. Rank 0 reports and writes checkpoints."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str | None = None) -> Ranks:
        """From the environment that `torchrun` sets (RANK, WORLD_SIZE, LOCAL_RANK: its interface, not our settings)."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(place)
        if world == 1:
            return cls(device=place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(rank=dist.get_rank(), world=world, device=place)

    def average(self, gradients: Iterable[Tensor]) -> None:
        """In place, over all processes, of a model that each of them has whole."""
        if self.world == 1:
            return
        gradients = list(gradients)
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(joined)
        joined /= self.world
        for gradient, mean in zip(gradients, torch.split(joined, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Not to be called on the way out of an error: the others may never come."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def lanes(self, count: int) -> list[int]:
        """The lanes of a run that are this process's. Raises `InvalidRequest` when they cannot be dealt evenly."""
        if count % self.world:
            raise InvalidRequest(
                f"{count} lanes cannot be dealt to {self.world} processes: a run that began with {count} lanes goes on "
                "with as many processes as divide them; or begin anew, with another --out"
            )
        return list(range(self.rank, count, self.world))

    def sum(self, *values: float) -> list[float]:
        """Of each value, the sum over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce((value,), dist.ReduceOp.MAX)[0]

    def _reduce(self, values: tuple[float, ...], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: object) -> list[object]:
        """Plain values of all processes, by rank (sent as text: `repr` of JSON-like data)."""
        if self.world == 1:
            return [value]
        import json

        encoded = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(encoded)], device=self.device))
        longest = max(int(size) for size in sizes)
        own = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(self.device)
        all_ = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(all_, own)
        return [json.loads(bytes(x[: int(n)].tolist())) for x, n in zip(all_, sizes, strict=True)]


def shard(model: TrainableNvila, ranks: Ranks) -> None:
    """Share parameters, gradients and optimizer states among the processes, block by block; sums in float32.

    Raises `InvalidRequest` for a model whose processes would not call its parts equally often.
    """
    if ranks.world == 1:
        return
    if model.config.is_static_s2:  # its tower is called as often as there are tiles, and processes must call together
        raise InvalidRequest(
            "a model with static S2 is trained by one process: start it without torchrun and --workers"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in [*model.tower.encoder.layers, *model.llm.model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process has to ask together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be shared out."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    source = source.to(device=target.device, dtype=target.dtype)
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(source, target.device_mesh, target.placements))
        else:
            target.copy_(source)


def clip(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm over all of them, and return the norm that they had; 0 is no limit."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))
    return float(whole(norm))
