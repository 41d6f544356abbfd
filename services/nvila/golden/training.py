"""Recorded losses and batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nvila.golden.compare import MODULE_TOLERANCE, Case, Check, Golden, close, equal, near, relative
from nvila.train.loss import IGNORE, next_token_loss
from nvila.train.packing import Sample, pack, pad


def soft_cross_entropy(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        targets_BP = tensors["targets"]
        yield from equal("ignored label", IGNORE, case["ignore_index"])
        shifted = targets_BP[:, 1:]
        yield from equal("targets", int((shifted != IGNORE).sum()), case["num_valid_shifted_targets"])
        with torch.enable_grad():
            logits_BPV = tensors["logits"].clone().requires_grad_()
            loss = next_token_loss(logits_BPV, targets_BP, case["soft_tokens"], case["std"])
            (gradient_BPV,) = torch.autograd.grad(loss, logits_BPV)
        yield from near("loss", loss.detach()[None], tensors["loss"], MODULE_TOLERANCE)
        yield from relative("gradient", gradient_BPV, tensors["grad_logits"], MODULE_TOLERANCE)

    yield from golden.by_case(checks)


def batching_packing(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        samples = [
            Sample(embeddings_PD=tensors[f"input.{i}"], labels_P=tensors[f"labels.{i}"])
            for i in range(len(case["lengths"]))
        ]
        if case["training"]:
            samples = [sample.cut(case["model_max_length"]) for sample in samples]
        batch = pad(samples, side=case["padding_side"])
        yield from close("embeddings", batch.embeddings_BPD, tensors["batched_embeds"], atol=0)
        yield from close("labels", batch.labels_BP, tensors["batched_labels"], atol=0)
        yield from close("mask", batch.mask_BP, tensors["attention_mask"], atol=0)
        if "packed_shape" not in case:
            return
        row = pack(samples, multiple_of=case["pad_to_multiple_of"] or 1, fill=case["pad_token_id"])
        yield from close("packed embeddings", row.embeddings_1PD, tensors["packed_embeds"], atol=0)
        for name, tensor in (
            ("attention_mask", row.mask_1P),
            ("position_ids", row.positions_1P),
            ("labels", row.labels_1P),
        ):
            yield from close(f"packed {name}", tensor, tensors[f"packed_{name}"], atol=0)
            yield from equal(f"packed {name}'s type", str(tensor.dtype), case["packed_dtypes"][name])

    yield from golden.by_case(checks)
