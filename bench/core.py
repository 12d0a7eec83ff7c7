"""The figures of the core. Each takes a Fleet and returns its checks, the headline first, and what else stands beside them.

A worker-step is one worker's push of a whole gradient and pull of the parameters it led to. 25 M float32 parameters in one
array, gradients in place on both sides, plain SGD, BSP, unless said otherwise. Servers are `headwater server` processes, workers
processes of their own, all on this machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.harness import (
    ANSWER_S,
    BenchError,
    Contestant,
    Fleet,
    Process,
    Trace,
    end_command,
    interleave,
    joint_rate,
    read_line,
)
from bench.report import Check

PARAMETERS = 25_000_000
GPT_PARAMETERS = 1_969_536  # of the demo's model
STEPS = "worker-steps/s"
FRAMEWORKS = ("torch", "keras", "jax", "tensorflow")
Answer = tuple[list[Check], dict[str, float]]


def start_server(fleet: Fleet, *options: str) -> tuple[str, subprocess.Popen[str]]:
    """Start `headwater server`, with all cores for its kernels; returns its address and its process."""
    command = [str(Path(sys.executable).with_name("headwater")), "server", "--listen", "tcp://127.0.0.1:0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    child = fleet.command([*command, "--stop-with-input"], environment)
    line = read_line(child)
    if "listening on" not in line:
        raise BenchError(f"expected `headwater server` to say where it listens, got {line!r}")
    return line.split()[-1], child


def start_workers(fleet: Fleet, make: str, *arguments: object, workers: int = 2, address: str = "") -> list[Process]:
    """Start workers, and a server of their own unless there is one. arguments: as of `make` from its third on."""
    address = address or start_server(fleet)[0]
    return [fleet.start(make, address, workers, *arguments, HEADWATER_WORKER=str(i)) for i in range(workers)]


def ours(fleet: Fleet, name: str, *arguments: object, workers: int = 2) -> Contestant:
    """Workers that do nothing but push and pull; arguments as of `pushing_worker`."""
    return Contestant(name, start_workers(fleet, "bench.ours.pushing_worker", *arguments, workers=workers))


def one_host(fleet: Fleet) -> Answer:
    """core.1"""

    def bare(kind: str) -> Contestant:
        cores = len(os.sched_getaffinity(0))
        process = fleet.start("bench.peers.kernel.bare_kernel", kind, PARAMETERS, 2, cores)
        return Contestant(f"bare kernel, {kind}", [process], worth=2)

    gloo = "bench.peers.torch_peers.gloo_worker"
    samples = interleave(
        ours(fleet, "headwater, sgd", PARAMETERS),
        bare("sgd"),
        ours(fleet, "headwater, sgd clipped", PARAMETERS, "clipped"),
        ours(fleet, "headwater, adam", PARAMETERS, "adam"),
        bare("adam"),
        ours(fleet, "headwater, sgd, ASP", PARAMETERS, "sgd", "asp"),
        Contestant("Gloo + torch SGD", [fleet.start(gloo, f"{fleet.folder}/gloo", i, 2, PARAMETERS) for i in range(2)]),
    )
    samples.show(STEPS)
    checks = [
        Check("of the bare fused kernel, SGD", samples.ratio("headwater, sgd", "bare kernel, sgd"), 0.8),
        Check("with global-norm clipping", samples.ratio("headwater, sgd clipped", "bare kernel, sgd"), 0.55),
        Check("Adam, of bare Adam", samples.ratio("headwater, adam", "bare kernel, adam"), 0.8),
        Check("times Gloo all-reduce + torch SGD", samples.ratio("headwater, sgd", "Gloo + torch SGD"), 5),
    ]
    return checks, samples.medians(STEPS)


def tcp(fleet: Fleet) -> Answer:
    """core.2"""

    def raw(pattern: str, workers: int) -> Contestant:
        cores = len(os.sched_getaffinity(0))
        port = fleet.start("bench.peers.raw.raw_server", pattern, PARAMETERS, workers, cores).ready()
        processes = [fleet.start("bench.peers.raw.raw_worker", port, PARAMETERS) for _ in range(workers)]
        return Contestant(f"raw sockets {pattern}, {workers}", processes)

    def rpc(workers: int, kind: str) -> Contestant:
        job = (f"{fleet.folder}/rpc-{kind}-{workers}", workers, PARAMETERS, kind == "TCP")
        fleet.start("bench.peers.torch_peers.rpc_server", *job)
        processes = [fleet.start("bench.peers.torch_peers.rpc_worker", i, *job) for i in range(workers)]
        return Contestant(f"PyTorch RPC, {kind}, {workers}", processes)

    contestants = []
    for workers in (1, 2):
        mine = ours(fleet, f"headwater, {workers}", PARAMETERS, "sgd", "bsp", "tcp", workers=workers)
        contestants += [mine, raw("duplex", workers), raw("in turn", workers), rpc(workers, "TCP")]
    samples = interleave(*contestants)
    # Within one machine TensorPipe leaves TCP for shared memory; so does Headwater, which is core.1. Its processes poll when they are idle,
    # two thirds of a core each, so the others are not to be measured beside them.
    samples |= interleave(rpc(2, "shared memory"))
    samples.show(STEPS)
    checks = []
    for workers in (2, 1):
        name, who = f"headwater, {workers}", f"{workers} worker{'s' * (workers > 1)}"
        better = max((f"raw sockets {pattern}, {workers}" for pattern in ("duplex", "in turn")), key=samples.median)
        checks += [
            Check(f"of the better raw-socket pattern, {who}", samples.ratio(name, better), 0.9),
            Check(f"times PyTorch RPC over TCP, {who}", samples.ratio(name, f"PyTorch RPC, TCP, {workers}"), 2),
        ]
    return checks, samples.medians(STEPS)


def round_trip(fleet: Fleet) -> Answer:
    """core.3"""
    port = fleet.start("bench.peers.echo.echo_server").ready()
    contestants = [
        Contestant("bare TCP echo", [fleet.start("bench.peers.echo.echo_worker", port)]),
        ours(fleet, "headwater, TCP", 16, "sgd", "bsp", "tcp", workers=1),
        ours(fleet, "headwater, shared memory", 16, "sgd", "bsp", "shm", workers=1),
    ]
    samples = interleave({contestant.name: contestant.latency_us for contestant in contestants}, rounds=7)
    samples.show("µs")
    checks = [
        Check("echoes, over TCP", samples.ratio("headwater, TCP", "bare TCP echo"), 3, at_most=True),
        Check("echoes, in shared memory", samples.ratio("headwater, shared memory", "bare TCP echo"), 3, at_most=True),
    ]
    return checks, samples.medians("µs")


def unequal(fleet: Fleet) -> Answer:
    """core.4

    Where workers compute, ASP comes out at BSP's speed or up to 3 % below, from run to run: a pass for each push moves three times
    its bytes (gradient and parameters in, parameters out), one for two pushes twice, at some 25 GB/s of a core. Fewer threads for it, or
    threads of low priority, change nothing that can be told from noise.
    """
    fast, slow, busy = (0.020, 0), (0.060, 0), (0.0, 10)  # seconds of sleep, matrix products
    four = [slow, fast, fast, fast]

    def team(name: str, consistency: str, work: list[tuple[float, int]], size: int, *pace: int) -> Contestant:
        workers = start_workers(fleet, "bench.ours.working_worker", consistency, size, work, workers=len(work))
        return Contestant(name, workers, turn_s=2.0, pace=pace)

    samples = interleave(
        team("a fast one alone", "bsp", [fast], 262_144),
        team("the slow one alone", "bsp", [slow], 262_144),
        team("four, ASP", "asp", four, 262_144, 1, 3, 3, 3),
        team("four, SSP(3)", "ssp:3", four, 262_144),
        team("four, BSP", "bsp", four, 262_144),
        team("two that compute, 1 MB, ASP", "asp", [busy, busy], 262_144),
        team("two that compute, 1 MB, BSP", "bsp", [busy, busy], 262_144),
        team("two that compute, 20 MB, ASP", "asp", [busy, busy], 5_000_000),
        team("two that compute, 20 MB, BSP", "bsp", [busy, busy], 5_000_000),
    )
    samples["the four, each alone"] = [
        3 * a + b for a, b in zip(samples["a fast one alone"], samples["the slow one alone"], strict=True)
    ]
    samples.show(STEPS)
    note = "where workers compute (2 % noise allowed)"
    checks = [
        Check("of the workers' own rates, ASP", samples.ratio("four, ASP", "the four, each alone"), 0.95),
        Check("SSP(3), of BSP (2 % noise allowed)", samples.ratio("four, SSP(3)", "four, BSP"), 0.98),
        Check("SSP(3), of ASP (2 % noise allowed)", samples.ratio("four, SSP(3)", "four, ASP"), 1.02, at_most=True),
    ]
    for size in ("1 MB", "20 MB"):
        asp, bsp = f"two that compute, {size}, ASP", f"two that compute, {size}, BSP"
        checks.append(Check(f"ASP, of BSP, {size}, {note}", samples.ratio(asp, bsp), 0.98))
    return checks, samples.medians(STEPS)


def gpt(fleet: Fleet) -> Answer:
    """core.5

    Own overhead is what `step()` takes, waiting for the other worker left out, beyond what clipping and the optimizer's step take under DDP
    in the same run: the update that any such training makes, here on the servers. Beside it is that update as the bare kernel makes it,
    with both cores and its memory in the caches.
    """

    def ddp(name: str, *size: int) -> Contestant:
        store = f"{fleet.folder}/{name}"
        return Contestant(
            name,
            [fleet.start("bench.training.ddp_worker", store, i, 2, -1, "gpt", *size) for i in range(2)],
            turn_s=2.0,
        )

    def headwater(name: str, *size: int) -> Contestant:
        return Contestant(name, start_workers(fleet, "bench.training.our_worker", "bsp", -1, "gpt", *size), turn_s=2.0)

    probes = [fleet.start("bench.training.probe_communication", f"{fleet.folder}/probe", i, 2) for i in range(2)]
    length, share = next(probe.ready() for probe in probes)
    print(f"  one sequence of {length} tokens: communication is {share:.0%} of DDP's step")
    full, full_ddp = headwater("headwater", 0, 0), ddp("DDP", 0, 0)

    def ours_and_own_time() -> dict[str, float]:
        traces = full.turn()
        return {"headwater": joint_rate(traces), "in step": own_time_percent(traces)}

    def ddp_and_update() -> dict[str, float]:
        traces = full_ddp.turn()
        update_s = median(value for trace in traces for value in trace.values)
        return {"DDP": joint_rate(traces), "DDP's update": 1 / update_s}

    small = (headwater("headwater, small batch", 1, length), ddp("DDP, small batch", 1, length))
    cores = len(os.sched_getaffinity(0))
    update = Contestant(
        "bare Adam, clipped",
        [fleet.start("bench.peers.kernel.bare_kernel", "adam, clipped", GPT_PARAMETERS, 2, cores)],
        worth=2,
    )
    samples = interleave({"headwater": ours_and_own_time, "DDP": ddp_and_update}, *small, update)
    in_step = samples.only("in step").median("in step")
    # Two workers' rate over one update's: the share of a step, twice.
    ddp_percent = 50 * samples.ratio("headwater", "DDP's update")
    bare_percent = 100 * samples.ratio("headwater", "bare Adam, clipped")
    update_ms = 1e3 / samples.only("DDP's update").median("DDP's update")
    samples.show(STEPS)
    checks = [
        Check("of DDP's speed, the demo's batch", samples.ratio("headwater", "DDP"), 0.98),
        Check("own overhead, of a step (%)", in_step - ddp_percent, 3, at_most=True),
        Check("times DDP, small batch", samples.ratio("headwater, small batch", "DDP, small batch"), 1.3),
    ]
    beside = {
        "time in optimizer.step(), waiting for the other left out (%)": in_step,
        "clipping and optimizer.step() under DDP (%)": ddp_percent,
        "ms of that": update_ms,
        "bare clipped Adam, warm, with both cores (%)": bare_percent,
        "tokens of the small batch": length,
        "communication's share of DDP's step there": share,
    }
    return checks, samples.medians(STEPS) | beside


def own_time_percent(traces: list[Trace]) -> float:
    """Return how much of a turn was Headwater's own, given steps that return the seconds they spent in `optimizer.step()`.

    The worker that comes last to a step waits for nobody, so the least of these times is Headwater's: pushing, the optimizer
    itself, pulling.
    """
    own_s = sum(min(times) for times in zip(*(trace.values for trace in traces), strict=True))
    return float(100 * own_s / (traces[0].stamps[-1] - traces[0].stamps[0]))


def footprint(fleet: Fleet) -> Answer:
    """core.6"""

    def python(code: str) -> Callable[[], float]:
        def start_to_exit_s() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            return time.perf_counter() - start

        return start_to_exit_s

    def accepting_s() -> float:
        start = time.perf_counter()
        address, child = start_server(fleet)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        socket.create_connection((host, int(port)), ANSWER_S).close()
        elapsed = time.perf_counter() - start
        end_command(child)
        return elapsed

    count = f"import sys; from headwater import *; print(len(set({FRAMEWORKS}) & set(sys.modules)))"
    frameworks = subprocess.run([sys.executable, "-c", count], stdout=subprocess.PIPE, text=True, check=True).stdout
    programs = {
        "python": "pass",
        "python, import numpy": "import numpy",
        "python, import headwater": "import headwater",
        "python, from headwater import *": "from headwater import *",
    }
    measures = {name: python(code) for name, code in programs.items()}
    samples = interleave(measures | {"headwater server, until it accepts": accepting_s}, rounds=7)
    samples.show("s")
    import_s = samples.median("python, import headwater") - samples.median("python")
    beyond, memory = server_memory(fleet)
    checks = [
        Check("import headwater (s)", import_s, 0.2, at_most=True),
        Check("frameworks imported", float(frameworks), 0, at_most=True),
        Check("server accepting (s)", samples.median("headwater server, until it accepts"), 1, at_most=True),
        Check("server's memory beyond its state (MB)", beyond, 100, at_most=True),
    ]
    return checks, samples.medians("s") | memory


def server_memory(fleet: Fleet) -> tuple[float, dict[str, float]]:
    """Return the server's resident megabytes beyond its two parameter buffers, with two workers that share its memory.

    The gradient buffers, which the server reads and so maps too, are the workers': they are told apart by their name.
    """
    address, child = start_server(fleet)
    workers = start_workers(fleet, "bench.ours.pushing_worker", PARAMETERS, address=address)
    Contestant("headwater", workers).turn()
    resident = resident_mb(Path(f"/proc/{child.pid}/smaps").read_text())
    total, state = sum(resident.values()), 2 * 4 * PARAMETERS / 1e6
    gradients = sum(mb for name, mb in resident.items() if "gradients" in name)
    beside = {"server resident (MB)": total, "of it workers' gradients (MB)": gradients, "its state (MB)": state}
    return total - gradients - state, beside


def resident_mb(smaps: str) -> dict[str, float]:
    """Return resident megabytes by the name of what is mapped, from /proc/PID/smaps."""
    found: dict[str, float] = {}
    name = ""
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # address, permissions, offset, device, inode, name
            name = " ".join(words[5:])
        elif words[0] == "Rss:":
            found[name] = found.get(name, 0.0) + int(words[1]) * 1024 / 1e6
    return found


#: Figure → what its value says, the value's unit, how to measure it.
FIGURES: dict[str, tuple[str, str, Callable[[Fleet], Answer]]] = {
    "core.1": ("One host, shared memory, 2 workers, against the bare fused kernel", "of its worker-steps/s", one_host),
    "core.2": ("TCP loopback, 2 workers, against the better raw-socket pattern", "of its worker-steps/s", tcp),
    "core.3": ("A 64-byte push and pull over TCP, 1 server", "bare socket echoes", round_trip),
    "core.4": ("4 workers that mostly sleep, one slowed to a third, ASP", "of the sum of their own rates", unequal),
    "core.5": ("The demo's GPT, 2 workers, against DistributedDataParallel (Gloo)", "of its steps/s", gpt),
    "core.6": ("`import headwater`; no framework; a server's start and memory", "s", footprint),
}
