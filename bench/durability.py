"""The figures of durability: what deaths cost."""

from __future__ import annotations

import heapq
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
import numpy as np

import headwater as hw
from bench.core import PARAMETERS, Answer, start_server, start_workers
from bench.core import STEPS as UNIT
from bench.crew import Outcome, Plan
from bench.harness import BenchError, Contestant, Fleet, Process, end_command, interleave, read_line
from bench.report import Check
from bench.wreck import ADAM, SLOTS, Found, Page, Servers, adam_state, adam_step
from headwater._connect import connect_session
from headwater._dense import Shard
from headwater._files import LocalFiles
from headwater._keeper import Keeper
from headwater._messages import Restore

WORKERS = 30
STEP_S = 0.5  # thirty NumPy workers and their starts take a small part of two cores
STEPS = 44  # of a window
REPLAYS = 40
SEED = 1
DURABILITIES = ("log:3", "replicated:3")  # with a snapshot every 3 s, so that servers die within some, too
#: Share of workers alive on average → steps between kills, and torchft's share of fault-free training in its own experiment with
#: 30 replica groups (PyTorch blog, 2025-06-20).
RATES = {0.987: (5.5, 0.812), 0.63: (1.0, 0.134)}


def kills(fleet: Fleet) -> Answer:
    """durability.2"""
    parts, beside = list[float](), dict[str, float]()
    for kind in ("bsp", "asp"):
        free = run(fleet, planned(kind))
        step_s = WORKERS / rate(free)
        for share, (every, torchft) in RATES.items():
            plan = planned(kind, share, every)
            seen = run(fleet, plan)
            goodput, bound = rate(seen) / rate(free), bound_of(plan, seen, step_s) / rate(free)
            print(
                f"  {kind.upper()}: {seen.alive:.1%} alive, {len(seen.kills)} kills; a process connects after {1e3 * seen.join_s:.0f} ms, "
                f"a step takes {1e3 * step_s:.0f} ms; goodput {goodput:.3f}, bound {bound:.3f}",
                flush=True,
            )
            parts.append(goodput / bound)
            name = f"{kind.upper()}, a kill per {every:g} step{'s' * (every > 1)}"
            beside |= {
                f"{name}: goodput": goodput,
                f"{name}: bound": bound,
                f"{name}: alive": seen.alive,
                f"torchft, published for {share:.1%} alive": torchft,
            }
    return [Check("of the bound, the worst of four", min(parts), 0.97)], beside


def planned(kind: str, share: float = 1.0, every: float = 0.0) -> Plan:
    """Plan a run. share: of workers alive on average; every: steps between kills."""
    # As many are away as die in the time that each is: kills per second times away_s.
    away_s = (1 - share) * WORKERS * every * STEP_S
    warm_s = 1.3 * away_s  # then as many come as go
    return Plan(kind, WORKERS, STEP_S, every * STEP_S, away_s, warm_s, STEPS * STEP_S, SEED)


def run(fleet: Fleet, plan: Plan) -> Outcome:
    """Let a crew live through a plan at a server of its own."""
    address, server = start_server(fleet)
    words = [sys.executable, "-m", "bench.crew", address, msgspec.json.encode(plan).decode()]
    child = fleet.command(words, dict(os.environ))
    line = read_line(child)
    end_command(child)
    end_command(server)
    if not line:
        raise BenchError("expected the crew to say what happened to it, got nothing")
    return msgspec.json.decode(line, type=Outcome)


def rate(seen: Outcome) -> float:
    """Return accepted pushes per second."""
    return seen.accepted / (seen.closed_s - seen.opened_s)


def bound_of(plan: Plan, seen: Outcome, step_s: float) -> float:
    """Return the rate that the policy allows under the same kills, each jittered by a twentieth of a step for its phase."""
    chance = random.Random(SEED)
    found = []
    for _ in range(REPLAYS):
        deaths = [(when + step_s * chance.uniform(-0.05, 0.05), whom) for when, whom in seen.kills]
        away_s = plan.away_s + seen.join_s
        found.append(
            simulate(plan.consistency, plan.workers, step_s, deaths, away_s, seen.opened_s, seen.closed_s, chance)
        )
    return mean(found)


def simulate(
    kind: str,
    workers: int,
    step_s: float,
    deaths: Sequence[tuple[float, int]],
    away_s: float,
    opens_s: float,
    closes_s: float,
    chance: random.Random,
) -> float:
    """Return accepted pushes per second of workers whose steps take exactly step_s, and nothing else takes any time.

    The window is from the first commit after opens_s to the first after closes_s. deaths: when and whose. away_s: from a death until
    the successor may compute. BSP: a commit is made when every worker that lives has sealed a push; one that comes meanwhile begins
    with the others then; what was sealed before a death counts. ASP: each push is a commit.
    """
    numbers, events = count(), list[tuple[float, int, str, int, int]]()
    lives = [0] * workers  # how many times each has died: events of an earlier life are void
    computing, sealed, joining = set(range(workers)), set[int](), set[int]()
    left = accepted = 0  # sealed by the dead; counted
    window: list[tuple[float, int]] = []

    def plan(when: float, what: str, who: int) -> None:
        heapq.heappush(events, (when, next(numbers), what, who, lives[who]))

    def commit(now: float, pushes: int) -> None:
        nonlocal accepted
        accepted += pushes
        if now > (closes_s if window else opens_s):
            window.append((now, accepted))

    for who in range(workers):
        plan(step_s if kind == "bsp" else step_s * chance.random(), "seal", who)
    for when, who in deaths:
        heapq.heappush(events, (when, next(numbers), "die", who, 0))
    while len(window) < 2:
        now, _, what, who, life = heapq.heappop(events)
        if what == "die":
            lives[who] += 1
            left += who in sealed
            computing.discard(who)
            sealed.discard(who)
            joining.discard(who)
            plan(now + away_s, "come", who)
        elif life != lives[who]:
            continue
        elif what == "come" and kind == "bsp" and computing:
            joining.add(who)
        elif what == "come":
            computing.add(who)
            plan(now + step_s, "seal", who)
        elif kind == "asp":
            commit(now, 1)
            plan(now + step_s, "seal", who)
        else:
            computing.discard(who)
            sealed.add(who)
        if kind == "bsp" and not computing and (sealed or left):
            commit(now, len(sealed) + left)
            computing, sealed, joining, left = sealed | joining, set(), set(), 0
            for each in computing:
                plan(now + step_s, "seal", each)
    (opened_s, first), (closed_s, last) = window
    return (last - first) / (closed_s - opened_s)


TRIALS = 200
LOAD_S = 0.3  # at most, from when a job is whole again until servers are killed
ENDS_AFTER = 500  # steps
BACK_S = (
    0.3  # at most, from when a server listens again until it, or another one, is killed that may still be coming back
)


def lost_or_twice(fleet: Fleet) -> Answer:
    """durability.1"""
    chance, tally = random.Random(SEED), Tally()
    updates = wrong = steps = 0
    same, beside = True, dict[str, float]()
    for durability in DURABILITIES:
        tally = Tally()
        for kind, servers in (("bsp", 2), ("bsp", 1), ("asp", 2)):
            made, bad = count_updates(fleet, chance, tally, durability, kind, servers, TRIALS // 8)
            updates, wrong = updates + made, wrong + bad
        made, is_same = compare_bits(fleet, chance, tally, durability, TRIALS // 2 - 3 * (TRIALS // 8))
        steps, same = steps + made, same and is_same
        beside |= {
            f"{durability}: kills": tally.kills,
            f"{durability}: of two servers at once": tally.both_at_once,
            f"{durability}: while one came back": tally.early,
            f"{durability}: ms from a kill to the next step, median": 1e3 * median(tally.gaps_s),
            f"{durability}: worst": 1e3 * max(tally.gaps_s),
        }
    beside |= {"updates that were acknowledged": updates, "Adam steps compared": steps}
    return [
        Check("updates lost or applied twice", wrong, 0, at_most=True),
        Check("parameters and Adam's slots equal to the bit", float(same), 1),
    ], beside


@dataclass
class Tally:
    """What was done to servers."""

    kills: int = 0
    both_at_once: int = 0
    early: int = 0
    gaps_s: list[float] = field(default_factory=list)


def harass(
    chance: random.Random, tally: Tally, servers: Servers, page: Page, processes: list[Process], trials: int
) -> None:
    """Kill servers at random moments, and let the workers stop."""
    page.wait(processes)
    is_early, victims = False, list[int]()
    for _ in range(trials):
        if not is_early:  # else those that come back: of a replicated job the others have what is acknowledged
            servers.wait_whole()
        if not is_early or not servers.is_replicated:
            victims = servers.choose(chance)
        time.sleep(chance.uniform(0, BACK_S if is_early else LOAD_S))
        when = servers.kill(*victims)
        tally.kills += 1
        tally.both_at_once += len(victims) == 2
        tally.early += is_early
        is_early = chance.random() < 0.25
        if not is_early:
            tally.gaps_s.append(page.wait(processes) - when)
    page.wait(processes)
    page.end(ENDS_AFTER)


def count_updates(
    fleet: Fleet, chance: random.Random, tally: Tally, durability: str, kind: str, servers: int, trials: int
) -> tuple[int, int]:
    """Kill servers under two workers that count their own steps; returns how many updates there were, and how many are wrong."""
    with Servers(fleet, servers, durability, 2, kind) as running:
        page = Page(f"{running.store}/page", 2)
        processes = [
            fleet.start("bench.wreck.counting_worker", running.address, page.path, 2, HEADWATER_WORKER=str(i))
            for i in range(2)
        ]
        found = live(processes, partial(harass, chance, tally, running, page, processes, trials))
    expected = np.concatenate([np.bincount(np.arange(each.steps) % SLOTS, minlength=SLOTS) for each in found])
    state, wrong = found[0].state, 0.0
    for name, array in state.items():
        off = array.reshape(len(expected), -1) - expected[:, None]
        for worker, some in enumerate(off.any(1).reshape(2, SLOTS)):
            if some.any():
                steps = np.flatnonzero(some)
                which = f"{len(steps)} steps of worker {worker}, {steps[0]} to {steps[-1]}"
                print(f"  {durability}, {kind}, {name}: {which}, by {off.min():g} to {off.max():g}", flush=True)
        wrong += np.abs(off).max(1).sum()
    return len(state) * sum(each.steps for each in found), int(wrong)


def compare_bits(fleet: Fleet, chance: random.Random, tally: Tally, durability: str, trials: int) -> tuple[int, bool]:
    """Kill servers under Adam; returns its steps, and whether the state is that of a run in which nobody was killed."""
    with Servers(fleet, 2, durability, 1) as running:
        page = Page(f"{running.store}/page", 1)
        processes = [fleet.start("bench.wreck.adam_worker", running.address, page.path)]
        (found,) = live(processes, partial(harass, chance, tally, running, page, processes, trials))
    with hw.connect() as session:
        session.register(ADAM, hw.optim.Adam(lr=1e-3))
        for step in range(found.steps):
            adam_step(session, step)
        expected = adam_state(session)
    is_same = found.state.keys() == expected.keys()
    return found.steps, is_same and all(
        array.tobytes() == expected[name].tobytes() for name, array in found.state.items()
    )


def live(processes: list[Process], disturb: Callable[[], None]) -> list[Found]:
    """Let workers live, disturb them meanwhile, and return what they find when all have ended."""
    for process in processes:
        process.ready()
    for process in processes:
        process.begin(0)  # only the step that is not measured
    disturb()
    for process in processes:
        process.answer()
    answers = []
    for process in processes:
        process.begin(1)
        answers.append(process.answer().values[0])
    return answers


LOGGED = (5_000_000, 250_000)  # parameters


def logging(fleet: Fleet) -> Answer:
    """durability.5"""
    contestants = []
    with ExitStack() as stack:
        for parameters in LOGGED:
            size = f"{4e-6 * parameters:g} MB"
            for name, kind in (("log", "log:0"), ("no log", ""), ("replicated", "replicated:0")):
                servers = stack.enter_context(Servers(fleet, 1, kind, 2))
                processes = start_workers(fleet, "bench.ours.pushing_worker", parameters, address=servers.address)
                contestants.append(Contestant(f"{name}, {size}", processes))
            process = fleet.start("bench.wreck.bare_writer", servers.store, 4 * parameters)
            contestants.append(Contestant(f"write and fdatasync, {size}", [process], worth=2))
        rest_s = 0.0
        for name, kind in (
            ("not replicated, 100 MB, half asleep", ""),
            ("replicated, 100 MB, half asleep", "replicated:0"),
        ):
            servers = stack.enter_context(Servers(fleet, 1, kind, 2))
            resting = start_workers(
                fleet, "bench.wreck.half_resting_worker", PARAMETERS, rest_s, address=servers.address
            )
            contestants.append(Contestant(name, resting))
            # Half of a step of one of the two; the same for those who wait for a follower.
            rest_s = 1 / contestants[-1].rate()
        samples = interleave(*contestants)
    samples.show(UNIT)
    checks = []
    sizes = [f"{4e-6 * parameters:g} MB" for parameters in LOGGED]
    for size in sizes:
        bare = zip(samples[f"no log, {size}"], samples[f"write and fdatasync, {size}"], strict=True)
        samples[f"the lesser, {size}"] = [min(pair) for pair in bare]
        checks.append(Check(f"of the lesser, {size}", samples.ratio(f"log, {size}", f"the lesser, {size}"), 0.8))
    asleep = samples.ratio("replicated, 100 MB, half asleep", "not replicated, 100 MB, half asleep")
    checks.append(Check("replicated, of not replicated, workers half asleep", asleep, 0.8))
    # With both cores full every commit is applied twice, so half of the rate is the most there is.
    bounds = {
        f"replicated, of its bound, {size}": 2 * samples.ratio(f"replicated, {size}", f"no log, {size}")
        for size in sizes
    }
    return checks, samples.medians(UNIT) | bounds


REST_S = 0.05  # of a step
SMALL, LARGE = 1_666_667, 83_333_333  # parameters under Adam: 20 MB and 1 GB of state
KILL_EVERY_S, KILLS = 10.0, 3


def goodput(fleet: Fleet) -> Answer:
    """durability.3"""
    found, gaps, large, chance = dict[str, float](), dict[str, list[float]](), dict[str, float](), random.Random(SEED)
    for kind in ("log", "replicated", "snapshot"):
        with resting(fleet, f"{kind}:{KILL_EVERY_S / 3}", SMALL, REST_S) as (servers, page, processes):
            page.wait(processes)
            servers.wait_whole()
            free = [accepted_rate(page, lambda: time.sleep(KILL_EVERY_S / 2))]
            gaps[kind] = []

            def kill(
                servers: Servers = servers, page: Page = page, kind: str = kind, processes: Any = processes
            ) -> None:
                start = time.monotonic()
                for i in range(KILLS):
                    phase = chance.uniform(0.1, 0.9)  # of the period; else snapshots would be as old at each kill
                    time.sleep(max(start + (i + phase) * KILL_EVERY_S - time.monotonic(), 0.0))
                    when = servers.kill(servers.leaders[0])
                    gaps[kind].append(page.wait(processes) - when)
                time.sleep(max(start + KILLS * KILL_EVERY_S - time.monotonic(), 0.0))

            killed = accepted_rate(page, kill)
            free.append(accepted_rate(page, lambda: time.sleep(KILL_EVERY_S / 2)))
            found[kind] = killed / mean(free)
    for kind in ("replicated", "snapshot"):
        with resting(fleet, f"{kind}:0", LARGE, 0.0) as (servers, page, processes):
            page.wait(processes)
            servers.wait_whole()
            if kind == "snapshot":
                with connect_session(servers.address, role="observer") as observer:
                    observer.take_snapshot()
            large[kind] = -(servers.kill(servers.leaders[0]) - page.wait(processes))
    beside = {f"goodput under {kind}": found[kind] for kind in ("replicated", "snapshot")}
    for kind, each in gaps.items():
        beside |= {f"{kind}: s from a kill to the next commit, median": median(each), f"{kind}: worst": max(each)}
    for kind, source in (("snapshot", "disk"), ("replicated", "a replica")):
        beside[f"s from a kill to the next commit, 1 GB of state, from {source}"] = large[kind]
        beside[f"s per GB of state from {source}"] = large[kind] - median(gaps[kind])
    return [Check("of the fault-free rate under log", found["log"], 0.9)], beside


def accepted_rate(page: Page, act: Callable[[], None]) -> float:
    """Return steps that still count afterwards per second, while something is done."""
    before, start = page.clocks.sum(), time.monotonic()
    act()
    return float((page.clocks.sum() - before) / (time.monotonic() - start))


@contextmanager
def resting(
    fleet: Fleet, durability: str, parameters: int, rest_s: float
) -> Iterator[tuple[Servers, Page, list[Process]]]:
    """Let two workers make steps of Adam until the block ends."""
    with Servers(fleet, 1, durability, 2) as servers:
        page = Page(f"{servers.store}/page", 2)
        arguments = (servers.address, page.path, 2, parameters, rest_s)
        processes = [fleet.start("bench.wreck.resting_worker", *arguments, HEADWATER_WORKER=str(i)) for i in range(2)]
        for process in processes:
            process.ready()
        for process in processes:
            process.begin(0)
        yield servers, page, processes
        page.end(3)
        for process in processes:
            process.answer()


PERIOD_S = 10.0  # of snapshots
ROUNDS = 3
ROWS = 12_000_000  # of a table of about 1 GB


def snapshots(fleet: Fleet) -> Answer:
    """durability.4"""
    extra = table_memory(fleet)
    with Servers(fleet, 1, "snapshot:0", 2) as servers:
        workers = start_workers(fleet, "bench.wreck.half_resting_worker", LARGE, address=servers.address)
        training = Contestant("training", workers, turn_s=PERIOD_S)
        taking_s = []
        with connect_session(servers.address, role="observer") as observer, ThreadPoolExecutor(1) as pool:

            def take() -> None:
                start = time.perf_counter()
                observer.take_snapshot()
                taking_s.append(time.perf_counter() - start)

            def rate_with_snapshot() -> float:
                taken = pool.submit(take)
                rate = training.rate()
                taken.result()
                return rate

            training.rate()
            samples = interleave({"no snapshot": training.rate, "a snapshot": rate_with_snapshot}, rounds=ROUNDS)
        samples.show(UNIT)
        restores = interleave(
            {
                "restore": partial(restore, servers.store),
                "bare": partial(bare_read, servers.store),
                "restore, from the disk": partial(from_disk, restore, servers.store),
                "bare, from the disk": partial(from_disk, bare_read, servers.store),
            },
            rounds=5,
        )
        restores.show("GB/s")
    checks = [
        Check("% by which training slows", 100 * (1 - samples.ratio("a snapshot", "no snapshot")), 3, at_most=True),
        Check("% of extra memory, tables", extra, 10, at_most=True),
        Check(
            "restore from the disk, of a bare read",
            restores.ratio("restore, from the disk", "bare, from the disk"),
            0.7,
        ),
        Check("restore from the page cache, of a bare read", restores.ratio("restore", "bare"), 0.7),
    ]
    return checks, samples.medians(UNIT) | restores.medians("GB/s") | {"s that a snapshot takes": median(taking_s)}


def table_memory(fleet: Fleet) -> float:
    """Return by how many percent a server's memory grows at most while a snapshot of its table is taken under load."""
    with Servers(fleet, 1, "snapshot:0", 1, "asp") as servers:
        rows: tuple[object, ...] = ("uniform", ROWS, {}, True)
        (process,) = start_workers(fleet, "bench.ours.table_worker", *rows, workers=1, address=servers.address)
        worker = Contestant("rows", [process])
        worker.rate()
        with connect_session(servers.address, role="observer") as observer, ThreadPoolExecutor(2) as pool:
            before = peak = resident_bytes(servers.pid(0))
            taking, working = pool.submit(observer.take_snapshot), pool.submit(worker.rate)
            while not taking.done():
                if working.done():
                    working = pool.submit(worker.rate)
                peak = max(peak, resident_bytes(servers.pid(0)))
                time.sleep(0.005)
            working.result()
            taking.result()
        print(f"  a table: {before / 1e9:.2f} GB, at most {peak / 1e9:.2f} GB while a snapshot is taken", flush=True)
        return 100 * (peak / before - 1)


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def newest(store: str) -> Path:
    return max(Path(store).glob("snapshot-*"))


def restore(store: str) -> float:
    """Bring a server's part back; returns GB/s of its files."""
    name = newest(store).name
    shard = Shard(threads=len(os.sched_getaffinity(0)))
    keeper = Keeper(shard, LocalFiles(), store, hw.durability.snapshot())
    start = time.perf_counter()
    keeper.handle(Restore(name, 0, 0, 1))
    took_s = time.perf_counter() - start
    keeper.close()
    return sum(file.stat().st_size for file in newest(store).iterdir()) / took_s / 1e9


def from_disk(act: Callable[[str], float], store: str) -> float:
    """Restore or read when the files are not in the page cache."""
    for file in newest(store).iterdir():
        with file.open("rb") as source:
            os.fsync(source.fileno())  # else they stay
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return act(store)


def bare_read(store: str) -> float:
    """Read the same files whole into new memory; returns GB/s."""
    files = sorted(newest(store).iterdir())
    sizes = [file.stat().st_size for file in files]
    start = time.perf_counter()
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for file, array in zip(files, arrays, strict=True):
        with file.open("rb", buffering=0) as source:
            done = 0
            while got := source.readinto(memoryview(array)[done:]):
                done += got
    return sum(sizes) / (time.perf_counter() - start) / 1e9


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "durability.1": (
        f"log and replicated: servers killed {TRIALS} times under load and started again; acknowledged updates that are wrong afterwards",
        "updates lost or applied twice",
        lost_or_twice,
    ),
    "durability.5": (
        "log: 2 workers that only push and pull, against the lesser of the rate without it and what the disk takes, 20 MB a commit",
        "of the lesser",
        logging,
    ),
    "durability.3": (
        "log: a server killed every 10 s (a third of 30 s), 20 MB of state, 2 workers with steps of 50 ms and more (target of our own)",
        "of the fault-free rate",
        goodput,
    ),
    "durability.4": (
        "A snapshot every 10 s of 1 GB (Adam), workers that sleep half of the time",
        "% by which training slows",
        snapshots,
    ),
    "durability.2": (
        "30 workers, killed and replaced all the time: pushes that count, against a simulation of the policy under the same kills",
        "of the bound",
        kills,
    ),
}
