"""Lookahead, and the published optimizer made with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from monai_memeff.arguments import numbers_checked
from monai_memeff.occupancy.nn.activation import PadeActivation


class Lookahead(Optimizer):
    """Slow weights that follow an optimizer's: every ``k`` steps they move a fraction ``alpha`` of the way to them.

    Zhang, Lucas, Hinton and Ba, NeurIPS 2019 (arXiv 1907.08610), algorithm 1. Parameter groups are those of the inner
    optimizer, so schedulers and gradient scalers work as usual. The slow weights start when the first step is taken.

    Args:
        optimizer: The inner optimizer.
        k: Steps between two updates of the slow weights.
        alpha: Fraction of the way, in (0, 1].

    Raises:
        ValueError: k or alpha out of range.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Lookahead(torch.optim.SGD([weight], lr=0.1), k=2, alpha=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(1)
        ...     _ = optimizer.step()
        >>> weight.data  # SGD alone would be at 0.8
        tensor([0.9000])
    """

    @numbers_checked
    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"k must be 1 or more and alpha in (0, 1], got {k} and {alpha}.")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.param_groups = optimizer.param_groups
        self.steps = 0
        self.slow: list[torch.Tensor] = []

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the inner optimizer, and every k-th time one of the slow weights."""
        parameters = self._parameters()
        self.slow += [p.detach().clone() for p in parameters[len(self.slow) :]]
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for slow, fast in zip(self.slow, parameters, strict=True):
                slow.lerp_(fast.detach(), self.alpha)
                fast.copy_(slow)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer too; its slow weights start with the next step."""
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the slow weights and the count of steps."""
        return {"optimizer": self.optimizer.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        pairs = zip(state_dict["slow"], self._parameters(), strict=False)
        self.slow = [slow.to(parameter.device, copy=True) for slow, parameter in pairs]
        self.steps = state_dict["steps"]


@numbers_checked
def occupancy_optimizer(
    network: nn.Module, lr: float = 3e-4, pade_lr: float = 1e-2, k: int = 5, alpha: float = 0.8
) -> Lookahead:
    """The published optimizer: Lookahead around RAdam, with a learning rate of their own for Pade activations.

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 4.

    Args:
        network: Network whose parameters are trained; without Pade activations there is one group.
        lr: Learning rate of everything else.
        pade_lr: Learning rate of the coefficients of :class:`~monai_memeff.occupancy.PadeActivation`.
        k: see :class:`Lookahead`.
        alpha: see :class:`Lookahead`.

    Raises:
        ValueError: a learning rate below 0, or k or alpha out of range.

    Examples:
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), PadeActivation())
        >>> [group["lr"] for group in occupancy_optimizer(network).param_groups]
        [0.0003, 0.01]
    """
    pade = [p for module in network.modules() if isinstance(module, PadeActivation) for p in module.parameters()]
    known = {id(p) for p in pade}
    groups = [{"params": [p for p in network.parameters() if id(p) not in known], "lr": lr}]
    if pade:
        groups.append({"params": pade, "lr": pade_lr})
    return Lookahead(torch.optim.RAdam(groups), k, alpha)
