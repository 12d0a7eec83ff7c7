"""Models under PyTorch's DistributedDataParallel (Gloo) and under Headwater: same model, same batch, one thread each."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import torch
import torch.distributed as dist
from gpt import BATCH, CONTEXT, GPT, loss_of
from resnet import ResNet
from text import VOCABULARY
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import headwater as hw
from bench.harness import Step
from bench.ours import connect

NOBODY = -1  # is slow


class Task(NamedTuple):
    """What is trained. Every worker starts from the same parameters."""

    model: nn.Module
    loss_of: Callable[[nn.Module], torch.Tensor]  # on this worker's batch
    settings: hw.optim.AdamW | hw.optim.SGD
    plain: Callable[..., torch.optim.Optimizer]  # what makes the same steps without Headwater
    options: dict[str, Any]


def gpt(batch: int, length: int) -> Task:
    """The demo's; 0 is its size."""
    windows = torch.randint(VOCABULARY, (batch or BATCH, (length or CONTEXT) + 1))
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    settings = hw.optim.AdamW(**options, clip_norm=1.0)
    return Task(GPT(), lambda model: loss_of(model, windows), settings, torch.optim.AdamW, options)


def resnet(batch: int) -> Task:
    """The example's, on its digits."""
    training, _ = digits.load()
    images, labels = (torch.stack(part) for part in zip(*(training[i] for i in range(batch)), strict=True))
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    settings = hw.optim.SGD(**options)
    return Task(ResNet(), lambda model: cross_entropy(model(images), labels), settings, torch.optim.SGD, options)


def make(family: str, size: tuple[int, ...]) -> Task:
    """Return a task by its name; size: what its function takes."""
    torch.manual_seed(0)
    families: dict[str, Callable[..., Task]] = {"gpt": gpt, "resnet": resnet}
    return families[family](*size)


def our_worker(address: str, workers: int, consistency: str, slow: int, family: str, *size: int) -> Step:
    """Return a training step; it returns the seconds spent in `optimizer.step()`. slow: which worker is `slowed`."""
    task = make(family, size)
    session = connect(address, workers, consistency)
    optimizer = hw.torch.Optimizer(task.model, task.settings, session=session)

    def step() -> float:
        task.loss_of(task.model).backward()
        start = time.perf_counter()
        optimizer.step()
        elapsed = time.perf_counter() - start
        optimizer.zero_grad()
        return elapsed

    return slowed(step) if session.index == slow else step


def slowed(step: Step) -> Step:
    """Return a step that takes twice as long: half of it asleep. The slow one waits for nobody, so that is half of its own speed."""

    def slow_step() -> Any:
        start = time.perf_counter()
        value = step()
        time.sleep(time.perf_counter() - start)
        return value

    return slow_step


def ddp_worker(rendezvous: str, index: int, workers: int, slow: int, family: str, *size: int) -> Step:
    """Return the same training step under DDP; it returns the seconds spent in clipping and the optimizer's step."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    step = _ddp_step(make(family, size), is_local=False)
    return slowed(step) if index == slow else step


def _ddp_step(task: Task, *, is_local: bool) -> Step:
    model = DistributedDataParallel(task.model)
    optimizer = task.plain(model.parameters(), **task.options, fused=True)
    limit = task.settings.clip_norm

    def step() -> float:
        with model.no_sync() if is_local else contextlib.nullcontext():
            task.loss_of(model).backward()
        start = time.perf_counter()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        elapsed = time.perf_counter() - start
        optimizer.zero_grad()
        return elapsed

    return step


def probe_communication(rendezvous: str, index: int, workers: int) -> tuple[int, float]:
    """Return the length of one sequence at which communication is nearest to half of DDP's step, and its share there.

    The share is what a step takes longer than the same step without synchronisation, in all workers at the same time.
    """
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    found = []
    length = CONTEXT
    while length >= 1:
        alone_s, together_s = (
            _seconds(_ddp_step(make("gpt", (1, length)), is_local=is_local)) for is_local in (True, False)
        )
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
