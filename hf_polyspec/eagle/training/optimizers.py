# SPDX-License-Identifier: Apache-2.0
"""Which optimizer moves which weights of a head."""

from __future__ import annotations

import torch
from torch import nn

from hf_polyspec.eagle.training.config import OptimizationSettings


def build_optimizers(module: nn.Module, plan: OptimizationSettings) -> list[torch.optim.Optimizer]:
    """Makes the optimizers of a run.

    Args:
        module: what is trained; frozen weights are left out.
        plan: `optimizer="adamw"` moves everything by AdamW. `"muon"` moves the inner matrices by Muon, which
            orthogonalises their updates and needs fewer tokens (K. Jordan et al., 2024), scaled to AdamW's size of
            steps (Moonlight, arXiv 2502.16982) so that one learning rate serves both; embeddings, output rows,
            norms and biases stay with AdamW.

    Returns:
        One or two optimizers, which share the learning rate.
    """
    inner: list[torch.Tensor] = []
    outer: list[torch.Tensor] = []
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            matrix = weight.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head"))
            (inner if plan.optimizer == "muon" and matrix else outer).append(weight)
    found: list[torch.optim.Optimizer] = []
    if outer:
        fused = all(weight.device.type in ("cpu", "cuda") for weight in outer)  # one pass over memory instead of ten
        betas = (0.9, plan.beta2)
        found.append(torch.optim.AdamW(outer, plan.learning_rate, betas, weight_decay=plan.weight_decay, fused=fused))
    if inner:
        found.append(
            torch.optim.Muon(
                inner, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return found
