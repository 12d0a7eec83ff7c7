"""The model of deploy.1: three layers in PyTorch, each of which multiplies by its version's value."""

from __future__ import annotations

import torch


class Layers(torch.nn.Module):
    """Returns the least and the largest output of each layer: value, value² and value³ where all its weights are value / 1024."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((1024, 1024), (1024, 1024), (1024, 512))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*shape, bias=False) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen += [x.amin(1), x.amax(1)]
        return torch.stack(seen, 1)


def build() -> torch.nn.Module:
    return Layers()
