"""The figures of whole models: what they learn, and how fast, in the manner of `core`; on real data, by the examples' own scripts.

models.1 runs the examples as they are, only shorter, so that its 36 runs take three minutes: two processes live through all of a
family's, which import PyTorch and read the data once. A run is two workers that train together, or one process that has the batch
of both; of those two are under way at a time, one in each process, with a thread each. So GPT and BERT are far from what they reach
in the examples' own time; ResNet and Inception are not.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from statistics import mean, variance
from typing import NamedTuple

from bench.core import STEPS, Answer, start_server, start_workers
from bench.harness import BenchError, Contestant, Fleet, interleave
from bench.report import Check
from bench.tables import numbers

SEEDS = range(3)


class Family(NamedTuple):
    """How a family's example is run."""

    module: str
    batch: int  # of each of two workers
    short: tuple[str, ...]  # options that make a run one of seconds
    result: str  # the held-out metric in what it prints, the last time that occurs
    target: float | None = None  # that every run must reach


FAMILIES = {
    "GPT, nats per character": Family("gpt", 8, ("--small", "--steps", "200"), r"held out ([\d.]+) nats"),
    "BERT, % of topics": Family("bert", 4, ("--epochs", "1", "6"), r"topic of ([\d.]+)%"),
    "ResNet, % of digits": Family("resnet", 32, ("--epochs", "6"), r"reads ([\d.]+)%", 97.0),
    "Inception, % of digits": Family("inception", 32, ("--epochs", "6"), r"reads ([\d.]+)%", 97.0),
}


def learn(index: int, runs: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """Run examples one after the other in this process; returns what each prints.

    index: as a worker. runs: module, server's address or "" for a run alone, options.
    """
    import bert
    import digits
    import text

    # What all runs read is read once.
    for place, name in ((bert, "Data"), (digits, "load"), (text.Tokenizer, "learn")):
        setattr(place, name, cache(getattr(place, name)))
    said = []
    for module, address, options in runs:
        os.environ |= {"HEADWATER_ADDRESS": address, "HEADWATER_WORKER": str(index) if address else "0"}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            importlib.import_module(module).main(options)
        said.append(output.getvalue())
    return said


def quality(fleet: Fleet) -> Answer:
    """models.1

    The difference of two means over the three seeds, divided by its standard error √(s₁²/3 + s₂²/3), as in Welch's test; s² are the sample
    variances (divided by 2). It may be 2 in either direction: of differences by chance alone about one in eight is larger (Student's t
    with 4 degrees of freedom). A seed gives a family's runs the same initial parameters; what is held out is always the same.
    """
    found, beside = {}, {}
    for name, family in FAMILIES.items():
        start = time.perf_counter()
        found[name] = of_family(fleet, family)
        beside[f"{name}: s a run, about"] = (time.perf_counter() - start) / 9
    checks = []
    for name, values in found.items():
        alone = values["one process"]
        for kind, some in values.items():
            print(f"  {name + ', ' + kind:<45} {mean(some):8.4g}, by seed {', '.join(f'{value:g}' for value in some)}")
            beside[f"{name}, {kind}"] = mean(some)
            if some is not alone:
                checks.append(Check(f"{name}: {kind}, from one process", errors_apart(some, alone), 2, at_most=True))
        worst = min(min(some) for some in values.values())
        target = FAMILIES[name].target
        if target is not None:
            checks.append(Check(f"{name}, the worst run", worst, target))
    checks.sort(key=lambda check: -check.value if check.at_most else 0)  # the headline: what is farthest apart
    return checks, beside


def errors_apart(some: Sequence[float], others: Sequence[float]) -> float:
    """Return by how many standard errors two means differ."""
    difference = abs(mean(some) - mean(others))
    error = sqrt(variance(some) / len(some) + variance(others) / len(others))
    return difference / error if error else float("inf") if difference else 0.0


def of_family(fleet: Fleet, family: Family) -> dict[str, list[float]]:
    """Return the held-out metric of each seed, by how it was trained."""
    plans: list[list[tuple[str, str, list[str]]]] = [[], []]  # by process
    places: dict[str, list[tuple[int, int]]] = {"two workers, BSP": [], "two workers, ASP": [], "one process": []}
    for seed in SEEDS:
        options = [*family.short, "--seed", str(seed), "--batch"]
        for kind in ("bsp", "asp"):
            address, _ = start_server(fleet, "--workers", "2", "--consistency", kind)
            places[f"two workers, {kind.upper()}"].append((0, len(plans[0])))
            for plan in plans:
                plan.append((family.module, address, [*options, str(family.batch)]))
    for seed in SEEDS:
        i = seed % 2
        places["one process"].append((i, len(plans[i])))
        plans[i].append((family.module, "", [*family.short, "--seed", str(seed), "--batch", str(2 * family.batch)]))
    workers = [fleet.start("bench.models.learn", i, plan) for i, plan in enumerate(plans)]
    said = [worker.ready() for worker in workers]

    def result(process: int, run: int) -> float:
        matches = numbers(family.result, said[process][run])
        if not matches:
            raise BenchError(f"expected {family.result!r} from examples/{family.module}.py, got {said[process][run]!r}")
        return matches[-1][0]

    return {kind: [result(*place) for place in some] for kind, some in places.items()}


def against_ddp(fleet: Fleet) -> Answer:
    """models.3

    Every process computes with one thread, DDP's too (bench/__main__.py). Slowed: the first worker sleeps after each step for as long as
    the step took, in DDP and BSP as in ASP. Where nobody waits, two such workers make 1.5 times the steps of two that keep together.
    """
    job = ("resnet", 32)

    def ddp(name: str, slow: int) -> Contestant:
        store = f"{fleet.folder}/{name}"
        make = "bench.training.ddp_worker"
        return Contestant(name, [fleet.start(make, store, i, 2, slow, *job) for i in range(2)], turn_s=2.0)

    def headwater(name: str, consistency: str, slow: int, *pace: float) -> Contestant:
        workers = start_workers(fleet, "bench.training.our_worker", consistency, slow, *job)
        return Contestant(name, workers, turn_s=2.0, pace=pace)

    samples = interleave(
        headwater("BSP", "bsp", -1),
        ddp("DDP", -1),
        headwater("ASP", "asp", -1),
        headwater("one slowed, ASP", "asp", 0, 1, 2),
        headwater("one slowed, BSP", "bsp", 0),
        ddp("one slowed, DDP", 0),
        rounds=7,
    )
    samples.show(STEPS)
    checks = [
        Check("of DDP's steps/s, BSP", samples.ratio("BSP", "DDP"), 0.98),
        Check("one slowed: ASP, times DDP", samples.ratio("one slowed, ASP", "one slowed, DDP"), 1.4),
        Check("one slowed: ASP, times BSP", samples.ratio("one slowed, ASP", "one slowed, BSP"), 1.4),
    ]
    return checks, samples.medians(STEPS)


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "models.1": (
        "GPT, BERT, ResNet, Inception: 2 workers, BSP and ASP, against one process with the batch of both, 3 seeds",
        "standard errors between means, the largest",
        quality,
    ),
    "models.3": (
        "The example's ResNet, 2 workers, against DistributedDataParallel (Gloo)",
        "of its steps/s",
        against_ddp,
    ),
}
