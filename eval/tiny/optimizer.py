"""Muon: momentum whose update is made orthogonal, for the matrices of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the orthogonal polar factor.

        X <- a X + (b A + c A^2) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315)

    The coefficients are tuned for speed: singular values end near 1, not at 1.

    Args:
        matrices: [G, m, n], computed in bfloat16 where that is fast, on a GPU.
    Returns:
        [G, m, n] float32.
    Source: Muon, github.com/KellerJordan/Muon.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Matrices of one shape are updated together:

        B <- mu B + (1 - mu) G;   W <- (1 - lr * decay) W - 0.2 lr sqrt(max(m, n)) orthogonalise((1 - mu) G + mu B)

    The factor 0.2 sqrt(max(m, n)) gives a step the root mean square that Adam's steps have.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.05) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.momentum, self.decay = momentum, decay
        self.orthogonalise: Callable[[Tensor], Tensor] = orthogonalise

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameters, buffer in zip(self.groups, self.buffers, strict=True):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:  # of a part that had no part in the loss
                continue
            gradient = torch.stack(gradients)
            buffer.lerp_(gradient, 1 - self.momentum)
            update = self.orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * lr * math.sqrt(max(buffer.shape[1:]))
            torch._foreach_mul_(parameters, 1 - lr * self.decay)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-scale)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for buffer, stored in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(stored)


class Optimizer:
    """Muon for the matrices inside the stacks, Adam for everything else that the modules hold."""

    def __init__(self, matrices: Sequence[nn.Parameter], modules: Iterable[nn.Module], gpu: bool) -> None:
        inside = {id(p) for p in matrices}
        self.modules = list(modules)
        self.others = [p for module in self.modules for p in module.parameters() if id(p) not in inside]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(self.others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=gpu)

    def compile(self) -> None:
        self.muon.orthogonalise = torch.compile(orthogonalise, dynamic=False)

    def step(self, muon_lr: float, adam_lr: float) -> None:
        """One update from the gradients, which are used up."""
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step(muon_lr)
        self.adam.param_groups[0]["lr"] = adam_lr
        self.adam.step()
        self.clear()

    def clear(self) -> None:
        for module in self.modules:
            module.zero_grad()
