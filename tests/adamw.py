"""AdamW by its formula, in float64: what the optimizers under DeepSpeed and accelerate are held against."""

from __future__ import annotations

from torch import Tensor


class Formula:
    """One weight under AdamW (Loshchilov and Hutter 2019, Algorithm 2)."""

    def __init__(self, weight: Tensor, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.weight, self.weight_decay, self.betas = weight.detach().double().clone(), weight_decay, betas
        self.first, self.second, self.steps = self.weight * 0, self.weight * 0, 0

    def step(self, gradient: Tensor, lr: float, epsilon: float = 1e-8) -> None:
        """Take one step."""
        first, second = self.betas
        gradient, self.steps = gradient.double(), self.steps + 1
        self.first = first * self.first + (1 - first) * gradient
        self.second = second * self.second + (1 - second) * gradient**2
        mean, square = self.first / (1 - first**self.steps), self.second / (1 - second**self.steps)
        self.weight = self.weight - lr * (mean / (square.sqrt() + epsilon) + self.weight_decay * self.weight)
