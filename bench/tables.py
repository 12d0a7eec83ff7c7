"""The figures of embedding tables, in the manner of `core`: a row has 16 float32 values and row-wise Adagrad, a batch 26 × 4,096 ids.

ids/s counts every id of a batch, repeated ones too, pulled and pushed. Workers are ASP, in shared memory.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.core import Answer, start_server
from bench.harness import BenchError, Contestant, Fleet, Samples, interleave
from bench.report import Check
from bench.traffic import BATCH, KINDS, distinct_beyond

ROWS = 10_000_000
IDS = "ids/s"
SEEDS = range(5)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CORES = len(os.sched_getaffinity(0))


# Quality.


def run_example(name: str, *options: object) -> str:
    """Run an example with a server and two workers; returns what they print. Raises BenchError when it fails."""
    command = [sys.executable, "-m", "headwater", "run", "-n", "2", str(EXAMPLES / name), *map(str, options)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise BenchError(f"{name} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """Return what the pattern's groups say, as numbers, each time it occurs."""
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, text)]


def seconds_to(rmse: float, text: str) -> float:
    """Return the training time after which the held-out RMSE was first so low; infinite when it never was."""
    epochs = numbers(r"held-out RMSE ([\d.]+), ([\d.]+) s", text)
    return next((seconds for reached, seconds in epochs if reached <= rmse), float("inf"))


def quality(_: Fleet) -> Answer:
    """tables.1"""
    target = 0.93
    kinds = {"ASP": "asp", "BSP": "bsp", "SSP(3)": "ssp:3", "dense BSP, sparse ASP": "mixed"}
    rmse: dict[str, list[float]] = {kind: [] for kind in kinds}
    seconds, below, content = Samples({kind: [] for kind in kinds}), [], []
    for seed in SEEDS:
        for kind, consistency in kinds.items():
            said = run_example("collaborative_filtering.py", "--consistency", consistency, "--seed", seed)
            ((reached, lower),) = numbers(r"held-out RMSE ([\d.]+); with biases only [\d.]+: (-?[\d.]+) lower", said)
            rmse[kind].append(reached)
            seconds[kind].append(seconds_to(target, said))
            if kind == "ASP":
                below.append(lower)
        said = run_example("content_based.py", "--seed", seed)
        content += numbers(r"(-?[\d.]+)% lower, 95 % interval (-?[\d.]+)%", said)
    seconds.show(f"s to {target}")
    Samples(rmse).show("RMSE")
    share, low = ([row[i] for row in content] for i in (0, 1))
    checks = [
        Check("held-out RMSE, two ASP workers, median of 5 seeds", median(rmse["ASP"]), target, at_most=True),
        Check("RMSE of the worst seed", max(rmse["ASP"]), target, at_most=True),
        Check("below biases only, the worst seed", min(below), 0.01),
        Check("films without a rating, % below the user's mean, median", median(share), 2),
        Check("the worst seed", min(share), 2),
        Check("lower end of the 95 % interval, the worst seed", min(low), 0),
    ]
    beside = {f"RMSE, {kind}": median(values) for kind, values in rmse.items()}
    return checks, beside | seconds.medians(f"s of training to {target}")


# Speed.


def headwater(fleet: Fleet, address: str, name: str = "headwater") -> list[Contestant]:
    """Return two workers for each kind of traffic, all on one server's table; the first of them makes its rows."""
    found = []
    for i, kind in enumerate(KINDS):
        processes = []
        for j in range(2):
            index = 2 * i + j
            arguments: tuple[Any, ...] = (address, 2 * len(KINDS), kind, ROWS, {}, index == 0)
            processes.append(fleet.start("bench.ours.table_worker", *arguments, HEADWATER_WORKER=str(index)))
            processes[0].ready()
        found.append(Contestant(f"{name}, {kind}", processes, worth=BATCH))
    return found


def speed(fleet: Fleet) -> Answer:
    """tables.2"""
    hash_kernel, plain_kernel = (
        Contestant(name, [fleet.start("bench.peers.kernel.bare_table", ROWS, CORES, plain)])
        for name, plain in (("hash", False), ("plain array", True))
    )
    plain_address = fleet.start("bench.ours.plain_server", ROWS, 2 * len(KINDS)).ready()
    samples = interleave(
        *headwater(fleet, start_server(fleet)[0]),
        *headwater(fleet, plain_address, "headwater over a plain array"),
        {contestant.name: ids_per_s(contestant) for contestant in (hash_kernel, plain_kernel)},
    )
    samples.show(IDS)
    checks = [
        Check(f"of bare lookup and update, {kind}", samples.ratio(f"headwater, {kind}", f"hash: table, {kind}"), 0.7)
        for kind in KINDS
    ]
    checks += [
        Check(
            f"bare lookup, times one without prefetch, {kind}",
            samples.ratio(f"hash: pull, {kind}", f"hash: pull without prefetch, {kind}"),
            2,
        )
        for kind in KINDS
    ]
    for kind in KINDS:
        kernel = samples.ratio(f"plain array: table, {kind}", f"hash: table, {kind}")
        end_to_end = samples.ratio(f"headwater over a plain array, {kind}", f"headwater, {kind}")
        checks.append(Check(f"times a plain array's time, kernels, {kind}", kernel, 1.9, at_most=True))
        checks.append(Check(f"times a plain array's time, end to end, {kind}", end_to_end, 1.4, at_most=True))
    # With what makes ids distinct, spreads rows and sums gradients: natively too, on the worker's side.
    whole = {
        f"of all kernels that a batch needs, {kind}": samples.ratio(f"headwater, {kind}", f"hash: all, {kind}")
        for kind in KINDS
    }
    return checks, whole | samples.medians(IDS)


def ids_per_s(contestant: Contestant) -> Callable[[], dict[str, float]]:
    """Return what measures a contestant whose steps return seconds by name."""
    return lambda: {f"{contestant.name}: {what}": BATCH / seconds for what, seconds in contestant.timings().items()}


def redis_and_torch(fleet: Fleet) -> Answer:
    """tables.3"""
    from bench.peers import redis

    redis.wait_until_ready(fleet.command(redis.server_command(fleet.folder), dict(os.environ)), fleet.folder)

    def pair(name: str, make: str, *arguments: Any, index_at: int) -> list[Contestant]:
        """Return two workers for each kind; index_at: where among the arguments a worker's index goes, the kind comes last."""
        found = []
        for i, kind in enumerate(KINDS):
            processes = []
            for j in range(2):
                words = [*arguments, kind]
                words.insert(index_at, 2 * i + j)
                processes.append(fleet.start(make, *words))
            found.append((f"{name}, {kind}", processes))
        return [Contestant(title, processes, worth=BATCH) for title, processes in found]

    job = (f"{fleet.folder}/rpc", 2 * len(KINDS), ROWS)
    fleet.start("bench.peers.torch_tables.rpc_table_server", *job, CORES)
    dense = "bench.peers.torch_tables.dense_embedding"
    samples = interleave(
        *headwater(fleet, start_server(fleet)[0]),
        *pair("Redis", "bench.peers.redis.worker", fleet.folder, ROWS, index_at=0),
        *pair("PyTorch RPC", "bench.peers.torch_tables.rpc_table_worker", *job, index_at=0),
        *(
            Contestant(f"nn.Embedding(sparse=True), {kind}", [fleet.start(dense, ROWS, kind, CORES)], worth=BATCH)
            for kind in KINDS
        ),
    )
    samples.show(IDS)
    checks = [Check(f"times Redis, {kind}", samples.ratio(f"headwater, {kind}", f"Redis, {kind}"), 5) for kind in KINDS]
    return checks, samples.medians(IDS)


# Size.

SIZES = 1_000_000, 10_000_000, 100_000_000  # rows; the last as far as memory goes
FREE = 6 << 30  # bytes that are left to others
PROMISED = 4 * 16 + 4 + 16  # bytes a row: its value, its state, and 16


def growth(fleet: Fleet) -> Answer:
    """tables.4"""
    room = available_bytes() - FREE
    largest = min(SIZES[-1], room // (2 * PROMISED) - sum(SIZES[:-1]))  # table and plain array of every size at once
    if largest < 2 * SIZES[-2]:
        raise BenchError(
            f"expected memory for 2 × {2 * SIZES[-2]:,} rows, got {room / 2**30:.1f} GiB after 6 for others"
        )
    sizes = [*SIZES[:-1], largest]

    def measure(contestant: Contestant) -> Callable[[], dict[str, float]]:
        return lambda: {f"{contestant.name}: {what}": value for what, value in contestant.timings().items()}

    contestants = [
        Contestant(f"{name}, {size:.3g} rows", [fleet.start("bench.peers.kernel.growing_table", size, CORES, plain)])
        for size in sizes
        for name, plain in (("hash", False), ("plain array", True))
    ]
    inserting = Contestant("inserting", [fleet.start("bench.peers.kernel.inserting_table", SIZES[-2] // 4, CORES)])
    samples = interleave({each.name: measure(each) for each in (*contestants, inserting)})
    samples.show("ns per id, bytes per row, inserts/s")

    def grown(name: str) -> float:
        small, large = (f"{name}, {sizes[i]:.3g} rows: ns per id" for i in (0, -1))
        return samples.ratio(large, small)

    memory = max(samples.median(f"hash, {size:.3g} rows: bytes per row") for size in sizes)
    full = samples.ratio("inserting: while full", "inserting: while empty")
    checks = [
        Check(f"times the ns per id from {sizes[0]:.3g} to {sizes[-1]:.3g} rows", grown("hash"), 2.5, at_most=True),
        Check("inserting while full, of while empty", full, 0.75),
        Check("memory per row, of value + state + 16 bytes", memory / PROMISED, 1.15, at_most=True),
    ]
    return checks, {"a plain array's growth": grown("plain array")} | {name: samples.median(name) for name in samples}


def available_bytes() -> int:
    """Return how much memory programs may still take."""
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


PAGE_BYTES = 4096  # that the disk reads at once
#: What 36 of 37 rows need in memory while they are on disk, and the other one whole.
SPILL_BUDGET = ROWS * 12 + ROWS // 37 * PROMISED * 11 // 10
SMALL_BATCH = 26 * 1024
COMPUTE_S = 0.05  # of a training step, on a device that leaves the cores alone


def spill(fleet: Fleet) -> Answer:
    """tables.5

    The steps fall short, for the disk: even if the hottest 1/37 of the rows were always the ones in memory, a batch would need thousands of
    pages from it, and with all of its reads at once it takes longer for those than a step lasts. So much is what `bound` says; what
    is written back comes on top.
    """
    policy = {"budget_bytes": SPILL_BUDGET, "when_full": "spill", "spill_folder": fleet.folder}

    def training(name: str, policy: dict[str, Any]) -> list[Contestant]:
        address, found = start_server(fleet)[0], []
        for i, batch in enumerate((BATCH, SMALL_BATCH)):
            arguments = (address, 2, ROWS, policy, COMPUTE_S, batch, i == 0)
            worker = fleet.start("bench.ours.training_worker", *arguments, HEADWATER_WORKER=str(i))
            worker.ready()
            found.append(Contestant(f"{name}, {batch:,} ids", [worker], turn_s=2.0))
        return found

    spilled = Contestant("spilled", [fleet.start("bench.peers.kernel.spilled_table", ROWS, CORES, policy)])
    disk = Contestant("disk", [fleet.start("bench.peers.kernel.disk", fleet.folder, ROWS * PROMISED)])
    own: dict[str, Callable[[], dict[str, float]]] = {"disk": disk.timings, "spilled": spilled.timings}
    rows = interleave(own)
    size = rows.only("rows for each in memory").median("rows for each in memory")
    rows.show("random reads/s")
    steps = interleave(*training("all rows in memory", {}), *training("36 of 37 on disk", policy))
    steps.show("steps/s")

    def kept(batch: int) -> float:
        return steps.ratio(f"36 of 37 on disk, {batch:,} ids", f"all rows in memory, {batch:,} ids")

    best = max((name for name in rows if name.endswith("at once")), key=rows.median)
    checks = [
        Check(
            "of the disk's random IOPS, rows that stay there", rows.ratio("reads/s, rows that stay on disk", best), 0.7
        ),
        Check(f"of the steps/s with all rows in memory, {BATCH:,} ids", kept(BATCH), 0.74),
    ]
    missing = distinct_beyond(ROWS, ROWS // 37)
    pages = ROWS * (4 * 16 + 4) / PAGE_BYTES  # values and states
    needed = pages * (1 - math.exp(-missing / pages))  # some rows are on one page
    beside = {
        "of the disk's random IOPS, rows that come back": rows.ratio("reads/s, rows that come back", best),
        "bound: pages that a batch needs, the hottest rows in memory": needed,
        "bound: of the steps/s, as fast as the disk reads them": min(
            rows.median(best) / needed / steps.median(f"all rows in memory, {BATCH:,} ids"), 1.0
        ),
        f"of the steps/s with all rows in memory, {SMALL_BATCH:,} ids": kept(SMALL_BATCH),
    }
    return checks, beside | {"rows for each in memory": size} | rows.medians("/s") | steps.medians("steps/s")


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "tables.1": ("MovieLens-100k, two ASP workers, matrix factorisation", "held-out RMSE", quality),
    "tables.2": (
        "Pull + push of 26 × 4,096 ids of 10 M, two workers, uniform",
        "of bare lookup and update's ids/s",
        speed,
    ),
    "tables.3": ("The same against Redis, PyTorch RPC and nn.Embedding", "times Redis, uniform", redis_and_torch),
    "tables.4": ("ns per id of a table that grows, against itself", "times", growth),
    "tables.5": ("36 of 37 rows on disk, Zipf 1.05", "of the disk's random IOPS", spill),
}
