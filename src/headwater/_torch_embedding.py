"""Tables as PyTorch modules: forward pulls rows, backward pushes their gradients.

The rows live on the servers: a module has no parameters, and its `state_dict` is empty. Where its table's pushes count at once (ASP, SSP),
that is in `backward`; under BSP it is in the worker's next `optimizer.step()`, with that step's weight, whichever that is: a batch
that is skipped after `backward` trains its rows with the next step.
A loss that is scaled, as GradScaler does, scales what is pushed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from headwater import _kernels
from headwater._errors import LayoutError, SettingError
from headwater._lookup import Batch, Table, as_ids
from headwater._table_copy import TableCopy


class _Rows(torch.autograd.Function):
    """A row for each id of a batch."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, table: Table | TableCopy, batch: Batch, is_training: bool) -> torch.Tensor:
        ctx.table, ctx.batch = table, batch
        return torch.from_numpy(table.pull_batch(batch, touch=is_training))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        ctx.table.push_batch(ctx.batch, gradient.numpy())
        return None, None, None, None


class _Bags(torch.autograd.Function):
    """Weighted sums of rows; id i counts in bag bags[i]."""

    @staticmethod
    def forward(
        ctx: Any,
        _: torch.Tensor,
        weights: torch.Tensor | None,  # float32 (n,)
        table: Table | TableCopy,
        batch: Batch,
        bags: np.ndarray,  # int32 (n,)
        count: int,
        is_training: bool,
    ) -> torch.Tensor:
        rows = table.pull_batch(batch, touch=is_training, is_distinct=True)
        scales = None if weights is None else weights.detach().contiguous().numpy()
        ctx.table, ctx.batch, ctx.bags, ctx.scales, ctx.rows, ctx.is_training = (
            table,
            batch,
            bags,
            scales,
            rows,
            is_training,
        )
        out = np.empty((count, table.dim), np.float32)
        _kernels.sum_rows(rows, bags, out, sources=batch.inverse, weights=scales)
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spread = gradient.contiguous().numpy()
        if ctx.is_training:
            total = np.empty_like(ctx.rows)
            _kernels.sum_rows(spread, ctx.batch.inverse, total, sources=ctx.bags, weights=ctx.scales)
            ctx.table.push_batch(ctx.batch, total, is_distinct=True)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = torch.from_numpy(np.einsum("ij,ij->i", ctx.rows[ctx.batch.inverse], spread[ctx.bags]))
        return None, of_weights, None, None, None, None, None


class _Module(torch.nn.Module):
    """What both kinds of embedding share."""

    def __init__(self, table: Table | TableCopy) -> None:
        super().__init__()
        self.table = table

    def _batch(self, ids: torch.Tensor) -> tuple[Batch, bool, torch.Tensor]:
        """Return the batch, whether it is trained, and a tensor that lets autograd come by where it is."""
        if not isinstance(ids, torch.Tensor) or ids.device.type != "cpu":
            got = ids.device if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise LayoutError(f"Expected ids in a tensor on the CPU, got {got} — table {self.table.name!r}.")
        is_training = self.training and torch.is_grad_enabled()
        return self.table.batch(ids.detach().numpy()), is_training, torch.empty(0, requires_grad=is_training)

    def extra_repr(self) -> str:
        """Name the table."""
        return f"{self.table.name!r}, dim={self.table.dim}"


class Embedding(_Module):
    """As `torch.nn.Embedding`, with any integers as ids and the rows of a table.

    In training mode forward pulls and backward pushes; in `eval()` or under `no_grad()` it only reads, and leaves no trace in the table.
    A `TableCopy` is only read: to train it is a UsageError.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 (*ids.shape, dim). Raises LayoutError for ids that are no integers."""
        batch, is_training, comes_by = self._batch(ids)
        rows: torch.Tensor = _Rows.apply(comes_by, self.table, batch, is_training)  # type: ignore[no-untyped-call]
        return rows.view(*ids.shape, self.table.dim)


class EmbeddingBag(_Module):
    """As `torch.nn.EmbeddingBag` with mode "sum" or "mean", with any integers as ids and the rows of a table.

    include_last_offset: offsets end with the number of ids.
    """

    def __init__(self, table: Table | TableCopy, *, mode: str = "mean", include_last_offset: bool = False) -> None:
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
        batch, is_training, comes_by = self._batch(ids)
        lengths = self._lengths(ids, offsets)
        bags = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        weights = None
        if per_sample_weights is not None:
            self._check_weights(ids, per_sample_weights)
            weights = per_sample_weights.reshape(-1)
        elif self.mode == "mean":
            weights = torch.from_numpy((1.0 / np.maximum(lengths, 1)).astype(np.float32)[bags])
        found: torch.Tensor = _Bags.apply(  # type: ignore[no-untyped-call]
            comes_by, weights, self.table, batch, bags, len(lengths), is_training
        )
        return found

    def _lengths(self, ids: torch.Tensor, offsets: torch.Tensor | None) -> np.ndarray:
        """Return how many ids each bag has. Raises LayoutError."""
        where = f"table {self.table.name!r}"
        if ids.dim() != (2 if offsets is None else 1):
            raise LayoutError(
                f"Expected ids of shape (bags, length), or (n,) with offsets, got {tuple(ids.shape)} "
                f"{'without' if offsets is None else 'with'} offsets — {where}."
            )
        if offsets is None:
            return np.full(ids.shape[0], ids.shape[1])
        starts = as_ids(offsets.detach().numpy(), where)
        if self.include_last_offset:
            if starts[-1:] != len(ids):
                raise LayoutError(f"Expected offsets that end with {len(ids)}, got {starts.tolist()} — {where}.")
            starts = starts[:-1]
        lengths = np.diff(starts, append=len(ids))
        if offsets.dim() != 1 or np.any(lengths < 0) or np.any(starts[:1]) or (len(ids) and not len(starts)):
            raise LayoutError(
                f"Expected offsets (bags,) that start at 0 and never fall, up to {len(ids)} ids, got {offsets} — {where}."
            )
        return lengths

    def _check_weights(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if self.mode != "sum" or weights.shape != ids.shape or weights.dtype != torch.float32:
            raise LayoutError(
                f"Expected per_sample_weights of float32 {tuple(ids.shape)} with mode='sum', got {weights.dtype} "
                f"{tuple(weights.shape)} with mode={self.mode!r} — table {self.table.name!r}."
            )
