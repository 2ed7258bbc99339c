"""The optimiser: Muon for the matrices inside layers, AdamW for embedding and norms.

Owned by models/train; called by the training loop only.

Muon (Jordan et al., 2024): momentum, then the orthogonal matrix nearest to it by five
Newton-Schulz steps with the published coefficients, scaled by 0.2 * sqrt(larger side) so
that the update's size per entry is Adam's (Liu et al., 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V' of g = U S V', for [rows, columns] or a stack of such; float32."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates; parameters must be matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(m, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def make_optimizers(net: nn.Module, lr: float, embedding_lr: float) -> list[torch.optim.Optimizer]:
    """[Muon over the layers' matrices, AdamW over everything else]."""
    matrices = [p for name, p in net.named_parameters() if p.dim() == 2 and "blocks" in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=embedding_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr), adam]
