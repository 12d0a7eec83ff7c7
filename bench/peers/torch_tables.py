"""What PyTorch has for embedding rows: a dense array with sparse gradients, inside the process or behind PyTorch RPC."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.distributed import rpc

from bench.harness import Step
from bench.traffic import BATCH, DIM, batches, gradients

LR, EPS = 0.05, 1e-10


def dense_embedding(rows: int, kind: str, threads: int) -> Step:
    """Return a step of nn.Embedding(sparse=True) and torch.optim.Adagrad, in this process: nobody else can use the rows."""
    torch.set_num_threads(threads)
    embedding = torch.nn.Embedding(rows, DIM, sparse=True)
    optimizer = torch.optim.Adagrad(embedding.parameters(), lr=LR)
    traffic, gradient = _traffic(kind, rows, 0), torch.from_numpy(gradients(BATCH, 0))

    def step() -> None:
        embedding(next(traffic)).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Rows:
    """The server's side: row-wise Adagrad on a dense array, in as few passes as PyTorch's operators allow."""

    def __init__(self, rows: int) -> None:
        self.values, self.sums = torch.full((rows, DIM), 0.01), torch.zeros(rows)


_tables: list[_Rows] = []


def _pull(ids: Tensor) -> Tensor:
    return _tables[0].values[ids]


def _push(ids: Tensor, gradient: Tensor) -> None:
    table = _tables[0]
    sums = table.sums[ids] + gradient.square().mean(1)
    table.sums[ids] = sums
    table.values.index_add_(0, ids, gradient * (-LR / (sums.sqrt() + EPS))[:, None])


def rpc_table_server(rendezvous: str, workers: int, rows: int, threads: int) -> str:
    """Be the server."""
    torch.set_num_threads(threads)
    _tables.append(_Rows(rows))
    _join(rendezvous, 0, workers)
    return "up"


def rpc_table_worker(index: int, rendezvous: str, workers: int, rows: int, kind: str) -> Step:
    """Return a step that asks for the rows of a batch's distinct ids and sends their gradients."""
    _join(rendezvous, 1 + index, workers)
    traffic, raw = _traffic(kind, rows, index), torch.from_numpy(gradients(BATCH, index))

    def step() -> None:
        ids, inverse = next(traffic).unique(return_inverse=True)
        pulled = rpc.rpc_sync("0", _pull, args=(ids,))[inverse]
        assert pulled.shape == (BATCH, DIM)
        gradient = torch.zeros(len(ids), DIM).index_add_(0, inverse, raw)
        rpc.rpc_sync("0", _push, args=(ids, gradient))

    return step


def _join(rendezvous: str, rank: int, workers: int) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{rendezvous}")
    rpc.init_rpc(str(rank), rank=rank, world_size=1 + workers, rpc_backend_options=options)


def _traffic(kind: str, rows: int, seed: int) -> Iterator[Tensor]:
    return cycle([torch.from_numpy(ids) for ids in batches(kind, rows, seed)])
