"""The demo's GPT under PyTorch's DistributedDataParallel (Gloo) and under Headwater: same model, same batch, one thread each."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from gpt import BATCH, CONTEXT, GPT, loss_of
from text import VOCABULARY
from torch.nn.parallel import DistributedDataParallel

import headwater as hw
from bench.harness import Step
from bench.ours import connect

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def task(batch: int, length: int) -> tuple[GPT, torch.Tensor]:
    """Return a model and a batch, 0 being the demo's size; every worker starts from the same parameters."""
    torch.manual_seed(0)
    return GPT(), torch.randint(VOCABULARY, (batch or BATCH, (length or CONTEXT) + 1))


def our_worker(address: str, workers: int, batch: int, length: int) -> Step:
    """Return a training step; it returns the seconds spent in `optimizer.step()`."""
    model, windows = task(batch, length)
    settings = hw.optim.AdamW(**SETTINGS, clip_norm=1.0)
    optimizer = hw.torch.Optimizer(model, settings, session=connect(address, workers))

    def step() -> float:
        loss_of(model, windows).backward()
        start = time.perf_counter()
        optimizer.step()
        elapsed = time.perf_counter() - start
        optimizer.zero_grad()
        return elapsed

    return step


def ddp_worker(rendezvous: str, index: int, workers: int, batch: int, length: int) -> Step:
    """Return the same training step under DDP."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    return _ddp_step(batch, length, is_local=False)


def _ddp_step(batch: int, length: int, *, is_local: bool) -> Step:
    module, windows = task(batch, length)
    model = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True)

    def step() -> None:
        with model.no_sync() if is_local else contextlib.nullcontext():
            loss_of(model, windows).backward()
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
        alone_s, together_s = (_seconds(_ddp_step(1, length, is_local=is_local)) for is_local in (True, False))
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
