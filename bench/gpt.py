"""The demo's GPT under PyTorch's DistributedDataParallel (Gloo) and under Headwater: same model, same batch, one thread each."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from examples.gpt import BATCH, CONTEXT, GPT
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import headwater as hw
from bench.harness import Step
from bench.ours import connect

VOCABULARY = 256
LR = 3e-4


class Task:
    """A model and a batch; no size given: the demo's. Every worker starts from the same parameters."""

    def __init__(self, batch: int = 0, length: int = 0) -> None:
        torch.manual_seed(0)
        self.model = GPT(VOCABULARY)
        tokens = torch.randint(VOCABULARY, (batch or BATCH, (length or CONTEXT) + 1))
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def backward(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Leave the batch's gradients in the parameters."""
        logits = model(self.x)
        functional.cross_entropy(logits.flatten(0, 1), self.y.flatten()).backward()


def our_worker(address: str, workers: int, batch: int, length: int) -> Step:
    """Return a training step; it returns the seconds spent in `optimizer.step()`."""
    task = Task(batch, length)
    session = connect(address, workers)
    optimizer = hw.torch.Optimizer(task.model, hw.optim.AdamW(lr=LR, clip_norm=1.0), session=session)

    def step() -> float:
        task.backward(task.model)
        start = time.perf_counter()
        optimizer.step()
        elapsed = time.perf_counter() - start
        optimizer.zero_grad()
        return elapsed

    return step


def ddp_worker(rendezvous: str, index: int, workers: int, batch: int, length: int) -> Step:
    """Return the same training step under DDP."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    return _ddp_step(Task(batch, length), is_local=False)


def _ddp_step(task: Task, *, is_local: bool) -> Step:
    model = DistributedDataParallel(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> None:
        with model.no_sync() if is_local else contextlib.nullcontext():
            task.backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def probe_communication(rendezvous: str, index: int, workers: int) -> tuple[int, float]:
    """Return the length of one sequence at which communication is nearest to half of DDP's step, and its share there.

    The share is what a step takes longer than the same step without synchronisation, in all workers at the same time.
    """
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    found = []
    length = CONTEXT
    while length >= 1:
        alone_s, together_s = (_seconds(_ddp_step(Task(1, length), is_local=is_local)) for is_local in (True, False))
        found.append((length, 1 - alone_s / together_s))
        length //= 2
    return min(found, key=lambda pair: abs(pair[1] - 0.5))


def _seconds(step: Step) -> float:
    """Return the median of a few steps, the mean over the workers."""
    step()
    times = []
    for _ in range(8):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    mean = torch.tensor(statistics.median(times))
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()
