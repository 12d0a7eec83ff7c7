"""The figures of deployment that concern versions: what publishing costs, and how small deltas are."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

import headwater as hw
from bench.core import Answer, start_server
from bench.harness import Fleet, Step, spread
from bench.ours import connect
from bench.report import Check

PARAMETERS = 125_000_000  # 500 MB
ROUNDS = 5
REST_S = 0.25  # of a step, as while a device computes


def publishing(fleet: Fleet) -> Answer:
    """deploy.2"""
    address = start_server(fleet)[0]
    store = f"{fleet.folder}/versions"
    worker = fleet.start("bench.deploy.publishing_worker", address, store, HEADWATER_WORKER="0")
    subscriber = fleet.start("bench.deploy.subscriber", store)
    worker.ready()
    subscriber.ready()
    found: dict[str, list[float]] = {name: [] for name in ("call", "stall", "lost", "held", "copied")}
    for _ in range(ROUNDS + 1):
        subscriber.begin(1)
        worker.begin(1)
        seconds: dict[str, float] = worker.answer().values[0]
        seconds["held"] = subscriber.answer().values[0] - seconds.pop("at")
        seconds["copied"] = _copy(Path(store), Path(fleet.folder, "copy"))
        for name, value in seconds.items():
            found[name].append(value)
    for values in found.values():
        values[:] = values[1:]  # the first makes room
    for name in ("call", "stall", "lost", "held", "copied"):
        low, middle, high = spread(found[name])
        print(f"  {name:<8} {1e3 * middle:9.4g} [{1e3 * low:.4g} – {1e3 * high:.4g}] ms, {len(found[name])} runs")
    ratios = [held / copied for held, copied in zip(found["held"], found["copied"], strict=True)]
    checks = [
        Check("ms that the trainer is paused for a version", 1e3 * median(found["call"]), 10, at_most=True),
        Check("times cp and fsync until a subscriber holds it", median(ratios), 2, at_most=True),
    ]
    beside = {
        "longest step beside it, more than the median one (ms)": 1e3 * median(found["stall"]),
        "time that steps lose to the writing beside them (ms)": 1e3 * median(found["lost"]),
        "s until a subscriber holds the verified version": median(found["held"]),
        "s of cp and fsync": median(found["copied"]),
    }
    return checks, beside


def _copy(store: Path, target: Path) -> float:
    """Copy the files of the newest version as cp does, and sync them; returns the seconds."""
    source = max(store.glob("version-*"))
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    taken_s = time.perf_counter() - start
    shutil.rmtree(target)
    return taken_s


def publishing_worker(address: str, store: str) -> Step:
    """Return a step that trains for a while, publishes, and trains on until the version is there; returns seconds by name."""
    session = connect(address, 1)
    chance = np.random.default_rng(1)
    session.register({"weights": chance.standard_normal(PARAMETERS, np.float32)}, optimizer=hw.optim.SGD(lr=1e-2))
    chance.standard_normal(out=session.gradients["weights"], dtype=np.float32)

    def train() -> float:
        time.sleep(REST_S)
        session.step()
        return time.perf_counter()

    def step() -> dict[str, float]:
        usual_s = median(b - a for a, b in pairwise([train() for _ in range(6)]))
        called_s, at = time.perf_counter(), time.monotonic()
        publication = session.publish("prod", store=store, keep=1)
        stamps = [time.perf_counter()]
        while not publication.is_done or len(stamps) < 6:
            stamps.append(train())
        version = publication.result()
        assert version is not None
        assert version.is_full
        steps = [b - a for a, b in pairwise(stamps)]
        return {
            "call": stamps[0] - called_s,
            "stall": max(steps) - usual_s,
            "lost": sum(steps) - usual_s * len(steps),
            "at": at,
        }

    return step


def subscriber(store: str) -> Step:
    """Return a step that waits for the next version; returns when it was there, verified."""
    subscription = hw.subscribe(store, "prod")

    def step() -> float:
        subscription.wait(60)
        return time.monotonic()

    return step


RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
STEPS = (1, 10, 100)  # between two versions
WARM = 80  # steps before: text is learnt a little, and the moments are not those of a first step
CHAIN = 10
BATCH = 2  # windows of 64 tokens


def deltas(fleet: Fleet) -> Answer:
    """deploy.3"""
    found = dict[str, float]()
    right, chains = 0.0, list[float]()
    for kind in ("bfloat16", "float32"):
        found |= fleet.start("bench.deploy.delta_sizes", fleet.folder, kind).ready()
        right, chains = right + found.pop("right"), [*chains, found.pop("chain")]
    for name, times in found.items():
        print(f"  {name:<32} {times:8.4g} times smaller than a full version", flush=True)
    print(f"  {chains[0]:g} and {chains[1]:g} deltas after one another, at {RATES[0]:g}", flush=True)
    headline = f"bfloat16, {RATES[0]:g}, 1 step"
    checks = [
        Check("times smaller than full, bfloat16 at 3e-6, one AdamW step", found.pop(headline), 30),
        Check("of a full version's tensors, the largest of all", 1 / min(found.values()), 1.01, at_most=True),
        Check("runs whose last version has the right bits", right, 2),
    ]
    shown = {
        name: times
        for name, times in found.items()
        if "float16" in name and (f"{RATES[0]:g}" in name or "1 step" in name)
    }
    return checks, shown | {name: times for name, times in found.items() if "float32, 3e-06" in name}


def delta_sizes(folder: str, kind: str) -> dict[str, float]:
    """Train the GPT of the examples on text with AdamW, and publish before and after some steps at each rate."""
    import torch
    from gpt import CONTEXT, GPT, loss_of
    from text import Tokenizer, read_text

    found = dict[str, float]()
    text = read_text(None)[:100_000]
    windows = Tokenizer.learn(text).encode(text).unfold(0, CONTEXT + 1, 1)
    torch.manual_seed(1)
    model = GPT().to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    session = hw.connect()
    optimizer = hw.torch.Optimizer(model, hw.optim.AdamW(lr=1e-3), session=session)

    def train(steps: int, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
                loss = loss_of(model, windows[torch.randint(len(windows), (BATCH,))])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(WARM, 1e-3)
    for rate in RATES:
        for steps in STEPS:
            store = f"{folder}/{kind}-{rate}-{steps}"
            session.publish(store=store).result()
            train(steps, rate)
            version = session.publish(store=store).result()
            assert version is not None
            full = sum(tensor.bytes for tensor in version.tensors)
            found[f"{kind}, {rate:g}, {steps} step{'s' * (steps > 1)}"] = full / version.bytes
            hw.Versions(store).load(version.id)
            shutil.rmtree(store)
    store = f"{folder}/{kind}-chain"
    for _ in range(CHAIN + 1):
        train(1, RATES[0])
        session.publish(store=store, keep=CHAIN + 1).result()
    last = hw.Versions(store).load("latest")
    found["chain"] = last.version.chain
    is_right = all(last.tensors[name].tobytes() == array.tobytes() for name, array in session.parameters.items())
    found["right"] = float(is_right)
    session.close()
    return found


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "deploy.2": (
        "A 500 MB model is published while it is trained: for how long the trainer waits",
        "ms",
        publishing,
    ),
    "deploy.3": (
        "A GPT fine-tuned on text in bfloat16: a delta after one step of AdamW at 3e-6",
        "times smaller than full",
        deltas,
    ),
}
