"""The figures of serving: what a swap of versions under load costs, and whether a fleet changes together.

python -m bench.deploy_serving --swaps 200     a longer deploy.1 than a figure has time for
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np

from bench.core import Answer
from bench.harness import ENVIRONMENT, BenchError, Fleet, Samples, read_line
from bench.load import Client, Seen
from bench.replica import LAYERS
from bench.report import Check
from headwater._errors import PeerError
from headwater._fleet import LEASE_S, asker, promote
from headwater._fleet import Fleet as Replicas
from headwater._versions import Versions

SEED = 1
WIDTHS = ((1024, 1024), (1024, 1024), (512, 1024))  # 10 MB of float32
KINDS = 12  # versions that the tag moves between
WINDOW_S, WINDOWS = 10.0, 5
SWAP_EVERY_S = 0.5
CLIENTS = 16
PATH = "/v2/models/layers/infer"


def value_of(version: int) -> int:
    """Return what every weight of a version is, but for a factor that makes layers multiply by it."""
    return 1 + version % KINDS


def publish_layers(store: str) -> list[int]:
    """Publish versions of the model in `bench.peers.layers`."""
    versions, found = Versions(store), []
    for number in range(1, KINDS + 1):
        layers = {
            f"layers.{i}.weight": np.full(shape, value_of(number) / 1024, np.float32) for i, shape in enumerate(WIDTHS)
        }
        found.append(versions.publish(layers, keep=KINDS).id)
    versions.tag("prod", found[0])
    return found


def check_layers(head: bytes, body: bytes) -> bool:
    """Return whether every layer was of the version that an answer names."""
    match = re.search(rb"x-model-version: (\d+)", head)
    size = re.search(rb"inference-header-content-length: (\d+)", head)
    assert match is not None
    assert size is not None
    value = value_of(int(match[1]))
    found = np.frombuffer(body[int(size[1]) :], np.float32)
    return bool(found.tolist() == [float(value**power) for power in (1, 1, 2, 2, 3, 3)])


class Serving:
    """A `headwater serve` process of the layers."""

    def __init__(self, fleet: Fleet, store: str) -> None:
        self._fleet, self._store = fleet, store
        self.start(0)

    def start(self, port: int) -> None:
        words = [str(Path(sys.executable).with_name("headwater")), "serve", "--model", "bench.peers.layers:build"]
        words += ["--store", self._store, "--listen", f"http://127.0.0.1:{port}"]
        self.child = self._fleet.command(words, dict(os.environ))
        line = read_line(self.child)
        if "headwater serves" not in line:
            raise BenchError(f"expected a server, got {line!r}")
        self.port = int(line.rpartition(":")[2].partition("/")[0])

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready"):
                    return
            except OSError:
                time.sleep(0.005)
        raise BenchError("the server did not become ready")

    def client(self) -> Client:
        head = b'{"inputs":[{"name":"x","shape":[1,1024],"datatype":"FP32","parameters":{"binary_data_size":4096}}],'
        head += b'"parameters":{"binary_data_output":true}}'
        headers = b"Inference-Header-Content-Length: %d\r\n" % len(head)
        return Client(self.port, PATH, head + np.ones(1024, np.float32).tobytes(), headers, check_layers)

    def metrics(self) -> dict[str, float]:
        """Return what it shows, by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def pause_ms(self) -> float:
        """Return the bound that no swap's pause was above."""
        seen = self.metrics()
        count = seen["headwater_swap_pause_seconds_count"]
        bounds = {
            float(m[1]): n
            for key, n in seen.items()
            if (m := re.match(r'headwater_swap_pause_seconds_bucket{le="(.*)"}', key))
        }
        return 1e3 * min(bound for bound, n in bounds.items() if n == count)


@contextmanager
def swapping(fleet: Fleet, store: str, versions: Iterator[int]) -> Iterator[None]:
    """Move the tag twice a second while the block runs, in a process of its own: the client has enough to do."""
    order = [str(next(versions)) for _ in range(round(WINDOW_S / SWAP_EVERY_S))]
    child = fleet.command([sys.executable, "-m", "bench.deploy_serving", "--move", store, *order], dict(os.environ))
    if "ready" not in read_line(child):
        raise BenchError("expected a process that moves the tag, got none")
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    yield
    if child.wait(WINDOW_S):
        raise BenchError("the tag could not be moved")


def move(store: str, order: list[str]) -> None:
    """Move the tag to these versions, twice a second from when it is told to."""
    versions = Versions(store)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.monotonic()
    for i, each in enumerate(order):
        time.sleep(max(start + (i + 0.5) * SWAP_EVERY_S - time.monotonic(), 0.0))
        versions.tag("prod", int(each))


def swaps(fleet: Fleet, windows: int = WINDOWS) -> Answer:
    """deploy.1"""
    store = f"{fleet.folder}/store"
    versions = publish_layers(store)
    serving = Serving(fleet, store)
    serving.wait()
    client = serving.client()
    client.capacity(CLIENTS, 1.0)
    capacity = client.capacity(CLIENTS, 4.0)
    rate = capacity / 2
    print(f"  capacity {capacity:.0f} requests/s with {CLIENTS} clients; load {rate:.0f}/s", flush=True)
    names, seen, samples = cycle(versions[1:] + versions[:1]), {True: Seen(), False: Seen()}, Samples()
    client.open(rate, 2.0, SEED)
    for number in range(windows):
        for is_swapping in (True, False) if number % 2 else (False, True):
            if not is_swapping and windows > WINDOWS and number % 2:  # of many, every second
                continue
            if is_swapping:
                with swapping(fleet, store, names):
                    found = client.open(rate, WINDOW_S, SEED + number)
            else:
                found = client.open(rate, WINDOW_S, SEED + number)
            name = "swaps" if is_swapping else "no swaps"
            samples.setdefault(f"p99, {name}", []).append(found.quantile_ms(0.99))
            samples.setdefault(f"p50, {name}", []).append(found.quantile_ms(0.5))
            seen[is_swapping] += found
    samples.show("ms")
    shown = serving.metrics()
    swap_count = shown['headwater_swaps_total{tag="prod"}'] - 1
    pause_ms = serving.pause_ms()
    under = seen[True]
    reasons = "; ".join(sorted(under.reasons))
    print(
        f"  {swap_count:.0f} swaps, {len(under.latencies_s)} requests in their windows; failures: {reasons or 'none'}",
        flush=True,
    )
    down_s, lost, asked = reload(serving, client, rate, store, next(names))
    beside = samples.medians("ms") | {
        "swaps": swap_count,
        "requests in windows with swaps": len(under.latencies_s) + under.failed,
        "requests without": len(seen[False].latencies_s) + seen[False].failed,
        "load, requests/s": rate,
        "worst latency with swaps (ms)": under.quantile_ms(1.0),
        "worst latency without (ms)": seen[False].quantile_ms(1.0),
        "updates that failed": shown.get('headwater_update_failures_total{tag="prod"}', 0.0),
        "stop and start again: s without answers": down_s,
        "stop and start again: requests failed": lost,
        "stop and start again: requests sent": asked,
    }
    return [
        Check("failed requests", under.failed + seen[False].failed, 0, at_most=True),
        Check("answers that mix versions", under.mixed + seen[False].mixed, 0, at_most=True),
        Check(
            "p99, of that without swaps",
            samples.median("p99, swaps") / samples.median("p99, no swaps"),
            1.25,
            at_most=True,
        ),
        Check("pause of a swap at most (ms)", pause_ms, 1.0, at_most=True),
    ], beside


def reload(serving: Serving, client: Client, rate: float, store: str, version: int) -> tuple[float, int, int]:
    """Put a new version in place by ending the server and starting it again; returns seconds without answers, requests failed and sent."""
    down = list[float]()

    def restart() -> None:
        time.sleep(1.0)
        Versions(store).tag("prod", version)
        serving.child.send_signal(signal.SIGTERM)
        serving.child.wait()  # it answers for a second still
        start = time.monotonic()
        serving.start(serving.port)
        serving.wait()
        down.append(time.monotonic() - start)

    thread = threading.Thread(target=restart)
    thread.start()
    found = client.open(rate, WINDOW_S, SEED)
    thread.join()
    return down[0], found.failed, found.failed + len(found.latencies_s)


REPLICAS = 8
WAIT_S = 20.0
DISTURBANCES = (
    "kill",
    "stop",
    "corrupt",
    "cut off",
    "coordinator",
)  # cut off: the coordinator cannot reach it any more
TRIAL_S = 165.0  # of all trials
SEEN_S = 0.15  # after each, while nothing is mended yet


class Heard(NamedTuple):
    """What a replica answered."""

    replica: int
    asked_s: float
    answered_s: float
    version: int  # 0: it refused, or was not there
    is_whole: bool


class Crew:
    """Replicas that are killed, stopped, fed corrupt bytes and started again; threads ask each of them all the time."""

    def __init__(self, fleet: Fleet, store: str) -> None:
        self._fleet, self._store = fleet, store
        self.children: list[subprocess.Popen[str]] = []
        self.urls: list[str] = []
        for i in range(REPLICAS):
            self.children.append(self._begin(i))
        for child in self.children:
            self.urls.append(self._listening(child))
        self.heard: list[Heard] = []
        self.cut_off: set[str] = set()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._probe, args=(i,)) for i in range(REPLICAS)]
        for thread in self._threads:
            thread.start()

    def flag(self, i: int) -> Path:
        return Path(f"{self._fleet.folder}/rotten-{i}")

    def _begin(self, i: int) -> subprocess.Popen[str]:
        return self._fleet.command(
            [sys.executable, "-m", "bench.replica", self._store, str(self.flag(i))], dict(os.environ)
        )

    @staticmethod
    def _listening(child: subprocess.Popen[str]) -> str:
        line = read_line(child).strip()
        if not line.startswith("http://"):
            raise BenchError(f"expected a replica, got {line!r}")
        return line

    def _probe(self, i: int) -> None:
        body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'
        while not self._is_over.wait(0.03):
            asked_s = time.monotonic()
            version, is_whole = 0, True
            try:
                request = urllib.request.Request(f"{self.urls[i]}/v2/models/m/infer", body)
                with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                    text, version = answer.read(), int(answer.headers["X-Model-Version"])
                    is_whole = values_in(text) == {float(version)}
            except (OSError, ValueError, HTTPException):  # refused, gone, or gone while it answered
                version = 0
            self.heard.append(Heard(i, asked_s, time.monotonic(), version, is_whole))

    def disturb(self, what: str, i: int) -> None:
        match what:
            case "kill":
                self.children[i].kill()
                self.children[i].wait()
            case "stop":
                self.children[i].send_signal(signal.SIGSTOP)
            case "corrupt":
                self.flag(i).touch()
            case "cut off":
                self.cut_off.add(self.urls[i])

    def mend(self, what: str, i: int, registered: Replicas) -> None:
        match what:
            case "kill":
                old, self.urls[i] = self.urls[i], ""
                self.children[i] = self._begin(i)
                self.urls[i] = self._listening(self.children[i])
                registered.unregister(old)
            case "stop":
                self.children[i].send_signal(signal.SIGCONT)
            case "corrupt":
                self.flag(i).unlink()
            case "cut off":
                self.cut_off.clear()

    def ask(self, urls: Sequence[str], path: str, message: msgspec.Struct, timeout_s: float) -> Mapping[str, str]:
        """Ask as `promote` does, but those that are cut off."""
        reached = [url for url in urls if url not in self.cut_off]
        return dict.fromkeys(urls, "cut off") | dict(asker("")(reached, path, message, timeout_s))

    def wait_for(self, version: int) -> bool:
        """Return whether every replica comes to answer with a version."""
        deadline, since_s = time.monotonic() + WAIT_S, time.monotonic()
        while time.monotonic() < deadline:
            latest = {h.replica: h.version for h in self.heard[-64 * REPLICAS :] if h.asked_s > since_s}
            if len(latest) == REPLICAS and set(latest.values()) == {version}:
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def values_in(text: bytes) -> set[float]:
    """Return the values in an answer's JSON."""
    return set(msgspec.json.decode(text)["outputs"][0]["data"])


def together(fleet: Fleet) -> Answer:
    """deploy.4"""
    store, chance = f"{fleet.folder}/store", random.Random(SEED)
    versions = Versions(store)
    for number in (1, 2):
        layers = {f"layer{i}": np.full(100_000, number, np.float32) for i in range(LAYERS)}
        versions.publish(layers, tag="prod" if number == 1 else None)
    crew, replicas = Crew(fleet, store), Replicas(versions, "prod")
    start, trials, outcomes, wrong, times = time.monotonic(), 0, {"moved": 0, "stayed": 0}, list[str](), list[float]()
    try:
        if not crew.wait_for(1):
            raise BenchError("the replicas did not become ready")
        plan = [(step, what) for step in range(7) for what in DISTURBANCES]
        chance.shuffle(plan)
        for step, what in cycle(plan):
            if time.monotonic() > start + TRIAL_S or trials == 6 * len(plan):
                break
            trials += 1
            wrong += trial(crew, replicas, step, what, chance, outcomes, times)
    finally:
        crew.close()
    mixed = sum(not heard.is_whole for heard in crew.heard)
    for line in wrong[:10]:
        print(f"  {line}", flush=True)
    answers = sum(heard.version > 0 for heard in crew.heard)
    beside = {
        "trials": trials,
        "of those in which all moved": outcomes["moved"],
        "of those in which all stayed": outcomes["stayed"],
        "answers that were checked": answers,
        "times that a replica refused or was gone": len(crew.heard) - answers,
        "s of a promotion that nobody disturbs, median": median(times),
    }
    return [Check("violations", len(wrong) + mixed, 0, at_most=True)], beside


def trial(
    crew: Crew,
    replicas: Replicas,
    step: int,
    what: str,
    chance: random.Random,
    outcomes: dict[str, int],
    times: list[float],
) -> list[str]:
    """Promote, disturb before a step, or some way into it; returns what was wrong."""
    old, victim = replicas.resolve("prod"), chance.randrange(REPLICAS)
    new = 3 - old
    first = len(crew.heard)
    is_done, moved_s, returned_s, number = False, float("inf"), float("inf"), -1
    running = promote(replicas, new, crew.ask, prepare_s=1.0)
    begun_s = time.monotonic()
    try:
        for number, name in enumerate(running):
            if name == "decide":
                moved_s = time.monotonic()  # at the earliest
            if number == step:
                if what == "coordinator":
                    running.close()
                    break
                is_asking = name in ("prepare", "commit")  # which takes some milliseconds: while it does
                delayed = threading.Timer(chance.uniform(0.0, 0.02) if is_asking else 0.0, crew.disturb, (what, victim))
                delayed.start()
                if not is_asking:
                    delayed.join()
                is_done = True
    except PeerError:
        pass
    ended_s = time.monotonic()
    if what != "coordinator" or number < step:
        returned_s = ended_s
    is_moved = replicas.resolve("prod") == new
    outcomes["moved" if is_moved else "stayed"] += 1
    if not is_done and what != "coordinator":
        times.append(ended_s - begun_s)
    return_to = replicas.resolve("prod")
    time.sleep(SEEN_S)
    if is_done:
        delayed.join()
        crew.mend(what, victim, replicas)
    wrong = [] if crew.wait_for(return_to) else [f"{what} at step {step}: not all came to version {return_to}"]
    limit_s = min(returned_s, ended_s + LEASE_S if is_moved else float("inf"))
    for heard in crew.heard[first:]:
        if heard.version == old and is_moved and heard.asked_s > limit_s:
            wrong.append(
                f"{what} at step {step}: replica {heard.replica} answered with the old version after the promotion"
            )
        if heard.version == new and (not is_moved or heard.answered_s < moved_s):
            wrong.append(
                f"{what} at step {step}: replica {heard.replica} answered with the new version before it was decided"
            )
        if heard.version not in (0, old, new):
            wrong.append(f"{what} at step {step}: version {heard.version}")
    return wrong


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "deploy.1": (
        "A model of 10 MB gets another version twice a second, under an open-loop load of half of what the server can answer",
        "failed requests",
        swaps,
    ),
    "deploy.4": (
        f"A fleet of {REPLICAS}: one killed, stopped, cut off or fed corrupt bytes, or the coordinator dead, at every step of a promotion",
        "violations of all or none",
        together,
    ),
}


def main(words: list[str]) -> None:
    """Run deploy.1 for longer."""
    if words[:1] == ["--move"]:
        move(words[1], words[2:])
        return
    if len(words) != 2 or words[0] != "--swaps":
        raise SystemExit(__doc__)
    os.environ.update(ENVIRONMENT)
    with Fleet() as fleet:
        checks, beside = swaps(fleet, round(int(words[1]) * SWAP_EVERY_S / WINDOW_S))
    for check in checks:
        print(f"  {check.name}: {check.rounded:g} ({check.target})")
    print(beside)


if __name__ == "__main__":
    main(sys.argv[1:])
