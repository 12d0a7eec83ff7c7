"""The figures of durability: what deaths cost."""

from __future__ import annotations

import heapq
import os
import random
import sys
from collections.abc import Callable, Sequence
from itertools import count
from statistics import mean

import msgspec

from bench.core import Answer, start_server
from bench.crew import Outcome, Plan
from bench.harness import BenchError, Fleet, end_command, read_line
from bench.report import Check

WORKERS = 30
STEP_S = 0.5  # thirty NumPy workers and their starts take a small part of two cores
STEPS = 44  # of a window
REPLAYS = 40
SEED = 1
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


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "durability.2": (
        "30 workers, killed and replaced all the time: pushes that count, against a simulation of the policy under the same kills",
        "of the bound",
        kills,
    ),
}
