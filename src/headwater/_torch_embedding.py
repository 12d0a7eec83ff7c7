"""Tables as PyTorch modules: forward pulls rows, backward pushes their gradients.

The rows live on the servers: a module has no parameters, and its `state_dict` is empty. Where its table's pushes count at once (ASP, SSP),
that is in `backward`; under BSP it is in the worker's next `optimizer.step()`, with that step's weight, and not if no step follows.
A loss that is scaled, as GradScaler does, scales what is pushed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from headwater._errors import LayoutError, SettingError
from headwater._lookup import Batch, Table, as_ids


class _Pull(torch.autograd.Function):
    """Rows of a batch: one for each of its ids, or one for each that is distinct."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, table: Table, batch: Batch, is_distinct: bool) -> torch.Tensor:
        ctx.table, ctx.batch, ctx.is_distinct = table, batch, is_distinct
        return torch.from_numpy(table.pull_batch(batch, is_distinct=is_distinct))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        ctx.table.push_batch(ctx.batch, gradient.numpy(), is_distinct=ctx.is_distinct)
        return None, None, None, None


class _Module(torch.nn.Module):
    """What both kinds of embedding share."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def _rows(self, ids: torch.Tensor, *, is_distinct: bool) -> tuple[torch.Tensor, Batch]:
        """Pull; in training mode with a backward that pushes, else without a trace."""
        if not isinstance(ids, torch.Tensor) or ids.device.type != "cpu":
            got = ids.device if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise LayoutError(f"Expected ids in a tensor on the CPU, got {got} — table {self.table.name!r}.")
        batch = self.table.batch(ids.detach().numpy())
        if self.training and torch.is_grad_enabled():
            wants_gradient = torch.empty(0, requires_grad=True)
            rows: torch.Tensor = _Pull.apply(wants_gradient, self.table, batch, is_distinct)  # type: ignore[no-untyped-call]
            return rows, batch
        return torch.from_numpy(self.table.pull_batch(batch, is_distinct=is_distinct, touch=False)), batch

    def extra_repr(self) -> str:
        """Name the table."""
        return f"{self.table.name!r}, dim={self.table.dim}"


class Embedding(_Module):
    """As `torch.nn.Embedding`, with any integers as ids and the rows of a table.

    In training mode forward pulls and backward pushes; in `eval()` or under `no_grad()` it only reads, and leaves no trace in the table.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 (*ids.shape, dim). Raises LayoutError for ids that are no integers."""
        rows, _ = self._rows(ids, is_distinct=False)
        return rows.view(*ids.shape, self.table.dim)


class EmbeddingBag(_Module):
    """As `torch.nn.EmbeddingBag` with mode "sum" or "mean", with any integers as ids and the rows of a table.

    include_last_offset: offsets end with the number of ids.
    """

    def __init__(self, table: Table, *, mode: str = "mean", include_last_offset: bool = False) -> None:
        super().__init__(table)
        if mode not in ("sum", "mean"):
            raise SettingError(f"Expected mode 'sum' or 'mean', got {mode!r} — table {table.name!r}.")
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return float32 (bags, dim); an empty bag gives zeros.

        ids: (bags, length), or (n,) with offsets, (bags,): where in ids each bag starts. per_sample_weights: float32, of the shape of
        ids, with mode="sum"; it gets a gradient where it wants one. Raises LayoutError.
        """
        rows, batch = self._rows(ids, is_distinct=True)
        if not len(batch.ids):  # torch looks for the first row
            rows = torch.zeros(1, self.table.dim)
        inverse = torch.from_numpy(batch.inverse).view(ids.shape)
        self._check(ids, offsets, per_sample_weights)
        return torch.nn.functional.embedding_bag(
            inverse,
            rows,
            None if offsets is None else offsets.to(inverse.dtype),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )

    def _check(self, ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        where = f"table {self.table.name!r}"
        if ids.dim() != (2 if offsets is None else 1):
            raise LayoutError(
                f"Expected ids of shape (bags, length), or (n,) with offsets, got {tuple(ids.shape)} "
                f"{'without' if offsets is None else 'with'} offsets — {where}."
            )
        if offsets is not None:
            starts = as_ids(offsets.detach().numpy(), where)
            if self.include_last_offset and starts[-1:] != len(ids):
                raise LayoutError(f"Expected offsets that end with {len(ids)}, got {starts.tolist()} — {where}.")
            if offsets.dim() != 1 or np.any(np.diff(starts, prepend=0, append=len(ids)) < 0) or np.any(starts[:1]):
                raise LayoutError(
                    f"Expected offsets (bags,) that start at 0 and never fall, up to {len(ids)} ids, got {offsets} — {where}."
                )
        if weights is None:
            return
        if self.mode != "sum" or weights.shape != ids.shape or weights.dtype != torch.float32:
            raise LayoutError(
                f"Expected per_sample_weights of float32 {tuple(ids.shape)} with mode='sum', got {weights.dtype} "
                f"{tuple(weights.shape)} with mode={self.mode!r} — {where}."
            )
