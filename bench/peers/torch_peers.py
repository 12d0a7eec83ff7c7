"""What people use with PyTorch today: all-reduce over Gloo, and a parameter server on PyTorch RPC.

Both hold one flat float32 tensor with its gradient in place and run PyTorch's fused SGD, one compute thread per process.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import rpc

from bench.harness import Step

LR = 0.1


def gloo_worker(rendezvous: str, index: int, workers: int, parameters: int) -> Step:
    """Return a step that sums gradients over the workers and then makes the same SGD step in each of them."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    # The sum lands in the gradient's place, so gradients other than zero would grow without end; zeros cost the same.
    _, gradient, optimizer = _state_of(parameters, workers)

    def step() -> None:
        dist.all_reduce(gradient)
        optimizer.step()

    return step


def _state_of(parameters: int, workers: int) -> tuple[torch.Tensor, torch.Tensor, torch.optim.Optimizer]:
    weights = torch.full((parameters,), 0.5, requires_grad=True)
    weights.grad = torch.full((parameters,), 0.0)  # filled, so that its pages exist
    return weights, weights.grad, torch.optim.SGD([weights], lr=LR / workers, fused=True)


class _Job:
    """The parameter server's state, in the process of rank 0."""

    def __init__(self, parameters: int, workers: int) -> None:
        self.weights, self.gradient, self.optimizer = _state_of(parameters, workers)
        self.workers, self.arrived = workers, 0
        self.lock = threading.Lock()
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def push(self, gradient: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Add a gradient; the last one of a step makes the step, and every worker gets the parameters."""
        with self.lock:
            future = self.future
            if self.arrived == 0:
                self.gradient.copy_(gradient)
            else:
                self.gradient.add_(gradient)
            self.arrived += 1
            if self.arrived == self.workers:
                self.optimizer.step()
                self.arrived, self.future = 0, torch.futures.Future()
                future.set_result(self.weights.detach())
            return future


_jobs: list[_Job] = []


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # PyTorch's own recipe for parameter servers that wait for several workers
def _push(gradient: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    return _jobs[0].push(gradient)


def rpc_server(rendezvous: str, workers: int, parameters: int, over_tcp: bool) -> str:
    """Be the server. over_tcp: keep TensorPipe from the shared memory that it takes within one machine."""
    _jobs.append(_Job(parameters, workers))
    _join(rendezvous, 0, workers, over_tcp)
    return "up"


def rpc_worker(index: int, rendezvous: str, workers: int, parameters: int, over_tcp: bool) -> Step:
    """Return a step that calls the server with a gradient and gets the parameters."""
    _join(rendezvous, 1 + index, workers, over_tcp)
    gradient = torch.full((parameters,), 1e-6)

    def step() -> Any:
        rpc.rpc_sync("0", _push, args=(gradient,))

    return step


def _join(rendezvous: str, rank: int, workers: int, over_tcp: bool) -> None:
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{rendezvous}",
        _transports=["uv"] if over_tcp else None,
        _channels=["basic"] if over_tcp else None,
    )
    rpc.init_rpc(str(rank), rank=rank, world_size=1 + workers, rpc_backend_options=options)
