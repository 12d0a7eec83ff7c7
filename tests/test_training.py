"""What a job computes: the same bits wherever it runs, and what one process would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Arrays, Job, assert_close, assert_equal_bits, read_all, start_job

import headwater as hw
from headwater import _kernels
from headwater._dense import Shard
from headwater._layout import BLOCK
from headwater._messages import AnyMessage

#: Every wire dtype that NumPy has, a scalar, odd sizes, tensors over several blocks: 16 blocks for up to 5 servers.
SHAPES = {
    "weight": ("float32", (300, 130)),
    "bias": ("float32", (7,)),
    "double": ("float64", (40_000,)),
    "half": ("float16", (90_001,)),
    "scale": ("float32", ()),
    "statistics": ("float32", (40_000,)),
    "half statistics": ("float16", (100,)),
}
AVERAGED = ("statistics", "half statistics")
OPTIMIZERS: dict[str, hw.optim.AnyOptimizer] = {
    "momentum": hw.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": hw.optim.AdamW(lr=0.01),
    "clipped": hw.optim.AdamW(lr=0.01, clip_norm=0.5),
}
optimizers = pytest.mark.parametrize("kind", OPTIMIZERS)


def make_arrays(*seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape)).astype(dtype) for name, (dtype, shape) in SHAPES.items()}


def train(session: hw.Session, kind: str) -> Arrays:
    """Make steps whose gradients, weights, rates and gaps follow from worker and step; return the whole state."""
    session.register(make_arrays(0), OPTIMIZERS[kind], averaged=AVERAGED)
    for step in range(5):
        gradients = make_arrays(1, session.index, step)
        if step in {2, 4}:
            del gradients["double"]  # nobody has it
        if step in {1, 4} and session.index == 0:
            del gradients["bias"], gradients["statistics"]
        session.step(gradients, weight=1.0 + session.index, scalars={"lr": 0.1 / (step + 1)})
    return read_all(session) | {name: array.copy() for name, array in session.parameters.items()}


def run_story(kind: str, **options: Any) -> Arrays:
    with start_job(**options) as job:
        first, *others = job.run(lambda session: train(session, kind))
        for other in others:
            assert_equal_bits(other, first)
        return first


@cache
def reference(kind: str, workers: int) -> Arrays:
    """Return the outcome with one server and one kernel thread at the plainest level, over TCP."""
    return run_story(kind, workers=workers, transport="tcp", level="baseline")


@optimizers
def test_an_embedded_server_gives_the_same_bits_as_one_behind_a_socket(kind: str) -> None:
    with hw.connect() as session:
        assert_equal_bits(train(session, kind), reference(kind, 1))


@optimizers
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_every_transport_and_number_of_servers_gives_the_same_bits(kind: str, transport: str, servers: int) -> None:
    assert_equal_bits(run_story(kind, workers=2, servers=servers, transport=transport), reference(kind, 2))


def test_servers_on_unix_sockets_give_the_same_bits(tmp_path: Path) -> None:
    assert_equal_bits(run_story("clipped", workers=2, servers=2, folder=tmp_path), reference("clipped", 2))


@optimizers
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("level", _kernels.simd_levels())
def test_every_thread_count_and_simd_level_gives_the_same_bits(kind: str, threads: int, level: str) -> None:
    assert_equal_bits(run_story(kind, workers=2, threads=threads, level=level), reference(kind, 2))


def test_four_workers_on_three_servers_repeat_bit_for_bit() -> None:
    assert_equal_bits(run_story("clipped", workers=4, servers=3), reference("clipped", 4))


# The arithmetic.


def test_sgd_steps_are_exactly_parameter_minus_rate_times_gradient() -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(BLOCK + 5), rng.standard_normal((3, BLOCK + 5))
    for dtype in (np.float32, np.float64):
        expected, lr = start.astype(dtype), dtype(0.1)
        with hw.connect() as session:
            session.register({"w": expected}, hw.optim.SGD(lr=0.1))
            for gradient in gradients.astype(dtype):
                expected = expected - lr * gradient
                session.step({"w": gradient})
            assert_equal_bits(session.pull(), {"w": expected})


def test_two_workers_average_exactly() -> None:
    start, gradients = np.ones(10, np.float32), np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)
    half, lr = np.float32(0.5), np.float32(0.1)

    def work(session: hw.Session) -> Arrays:
        session.register({"w": start}, hw.optim.SGD(lr=0.1))
        session.step({"w": gradients[session.index]})
        return session.pull()

    with start_job(workers=2) as job:
        for found in job.run(work):
            assert_equal_bits(found, {"w": start - lr * (half * gradients[0] + half * gradients[1])})


def test_the_mean_is_weighted() -> None:
    def work(session: hw.Session) -> Arrays:
        session.register({"w": np.zeros(4, np.float32)}, hw.optim.SGD(lr=1.0))
        session.step({"w": np.full(4, 8.0 if session.index else 4.0, np.float32)}, weight=3.0 if session.index else 1.0)
        return session.pull()

    with start_job(workers=2) as job:
        assert [found["w"].tolist() for found in job.run(work)] == [[-7.0] * 4] * 2


@pytest.mark.parametrize("servers", [1, 2])
def test_a_gradient_that_one_worker_lacks_counts_as_zero_and_one_that_all_lack_leaves_no_trace(servers: int) -> None:
    def work(session: hw.Session) -> tuple[Arrays, Arrays]:
        names = ("all", "one", "none")
        session.register({n: np.ones(BLOCK, np.float32) for n in names}, hw.optim.SGD(lr=1.0, momentum=0.5))
        gradients = {"all": np.full(BLOCK, 2.0, np.float32)}
        if session.index == 0:
            gradients["one"] = np.full(BLOCK, 2.0, np.float32)
        session.step(gradients)
        return {name: array[:1] for name, array in session.pull().items()}, read_all(session)

    with start_job(workers=2, servers=servers) as job:
        for parameters, state in job.run(work):
            assert {name: value[0] for name, value in parameters.items()} == {"all": -1.0, "one": 0.0, "none": 1.0}
            assert not state["momentum_buffer/none"].any()
            assert state["steps"].tolist() == [1, 1, 0]


def averaged_pair(session: hw.Session, optimizer: hw.optim.AnyOptimizer) -> None:
    session.register({"w": np.zeros(4, np.float32), "mean": np.ones(4, np.float32)}, optimizer, averaged=["mean"])


@pytest.mark.parametrize("servers", [1, 2])
def test_an_averaged_tensor_is_the_weighted_mean_of_the_values_that_were_pushed(servers: int) -> None:
    """Whoever leaves it out has no part in the mean; where all do it stays. No rate, decay, momentum, sign or clipping changes it."""
    optimizer = hw.optim.SGD(lr=0.5, momentum=0.9, weight_decay=0.1, maximize=True, clip_norm=1e-3)
    values = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

    def body(session: hw.Session) -> list[Arrays]:
        averaged_pair(session, optimizer)
        found = []
        gradient = {"w": np.full(4, 1.0 + session.index, np.float32)}
        mine = gradient | {"mean": 1000 * values[session.index]}
        for pushed in (mine, mine if session.index else gradient, gradient):
            session.step(pushed, weight=1.0 + 2 * session.index)
            found.append({name: array.copy() for name, array in session.parameters.items()})
        return found

    def without(session: hw.Session) -> list[Arrays]:
        session.register({"w": np.zeros(4, np.float32)}, optimizer)
        found = []
        for _ in range(3):
            session.step({"w": np.full(4, 1.0 + session.index, np.float32)}, weight=1.0 + 2 * session.index)
            found.append({"w": session.parameters["w"].copy()})
        return found

    with start_job(workers=2, servers=servers) as job:
        found, other = job.run(body)
    with start_job(workers=2) as job:
        alone = job.run(without)[0]
    thousands = 1000 * values
    mean = np.float32(0.25) * thousands[0] + np.float32(0.75) * thousands[1]
    for ours, theirs, trained, expected in zip(found, other, alone, (mean, thousands[1], thousands[1]), strict=True):
        assert_equal_bits(ours, theirs)
        assert_equal_bits(ours, trained | {"mean": expected})


def test_without_a_barrier_an_averaged_tensor_is_what_was_pushed_last() -> None:
    with start_job(workers=2, consistency=hw.asp()) as job, job.connect() as one, job.connect() as other:
        for session in (one, other):
            averaged_pair(session, hw.optim.SGD(lr=1.0))
        one.step({"w": np.zeros(4, np.float32), "mean": np.full(4, 3.0, np.float32)})
        other.step({"mean": np.full(4, 5.0, np.float32)}, weight=2.0)
        assert one.pull()["mean"].tolist() == [5.0] * 4
        with pytest.raises(
            hw.errors.NonFiniteError, match=r"finite values, got NaN or infinity in 'mean' .* at element 2 — worker 1"
        ):
            other.step({"w": np.ones(4, np.float32), "mean": np.array([1, 1, np.nan, 1], np.float32)})
        assert one.pull()["mean"].tolist() == [5.0] * 4
        assert one.pull()["w"].tolist() == [0.0] * 4


def test_a_tensor_that_gets_its_first_gradient_late_begins_at_its_own_first_step() -> None:
    gradient = np.full(3, 0.25, np.float32)

    def final(steps_before: int) -> Arrays:
        with hw.connect() as session:
            session.register({"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}, hw.optim.Adam(lr=0.1))
            for _ in range(steps_before):
                session.step({"a": gradient})
            session.step({"a": gradient, "b": gradient})
            return session.pull(["b"])

    assert_equal_bits(final(4), final(0))


def test_an_empty_push_closes_the_clock_and_changes_nothing() -> None:
    with hw.connect() as session:
        session.register(make_arrays(0), OPTIMIZERS["adam"])
        session.step(make_arrays(1))
        before = read_all(session)
        assert session.step(make_arrays(2), weight=0.0) == 2
        assert session.clock == 2
        assert_equal_bits(read_all(session), before)


@pytest.mark.parametrize("servers", [1, 5])
def test_clipping_is_torchs_on_the_averaged_gradient(servers: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 200), "b": (50_001,), "c": (3,)}
    gradients = [
        {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(2)
    ]  # by worker

    def work(session: hw.Session) -> Arrays:
        session.register({n: np.zeros(s, np.float32) for n, s in shapes.items()}, hw.optim.SGD(lr=1.0, clip_norm=1.5))
        session.step(gradients[session.index])
        return session.pull()

    expected = [torch.zeros(shape, requires_grad=True) for shape in shapes.values()]
    for parameter, name in zip(expected, shapes, strict=True):
        parameter.grad = torch.from_numpy((gradients[0][name] + gradients[1][name]) / 2)
    torch.nn.utils.clip_grad_norm_(expected, 1.5)
    theirs = {n: -p.grad.numpy() for n, p in zip(shapes, expected, strict=True) if p.grad is not None}
    with start_job(workers=2, servers=servers) as job:
        for found in job.run(work):
            assert_close(found, theirs, 1e-6)


@pytest.mark.parametrize("servers", [1, 3])
def test_clipping_measures_before_the_pass_or_in_it_with_the_same_result(
    servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    handle = Shard.handle

    def note(shard: Shard, message: AnyMessage) -> AnyMessage:
        asked.append(type(message).__name__)
        return handle(shard, message)

    monkeypatch.setattr(Shard, "handle", note)
    rng = np.random.default_rng(0)
    gradient, rates = rng.standard_normal(50_001).astype(np.float32), [3.0, 1e-3, 2e-3, 3.0, 5.0, 1e-3, 1.0]

    def work(session: hw.Session) -> Arrays:
        session.register({"w": np.zeros(50_001, np.float32)}, hw.optim.SGD(lr=1.0, clip_norm=1.5))
        for rate in rates:
            session.step({"w": gradient * np.float32(rate)})
        return session.pull()

    expected = torch.zeros(50_001, requires_grad=True)
    for rate in rates:
        expected.grad = torch.from_numpy(gradient * np.float32(rate))
        torch.nn.utils.clip_grad_norm_([expected], 1.5)
        expected.data -= expected.grad
    with start_job(servers=servers) as job:
        for found in job.run(work):
            assert_close(found, {"w": expected.detach().numpy()}, 1e-6)
    # The first commit is measured beforehand, and so is each that follows a clipped one; a surprise is applied twice.
    steps = [kind for kind in asked if kind in ("Norms", "Prepare", "Flip")]
    measured = [
        ("Norms", "Prepare"),
        ("Norms", "Prepare"),
        ("Prepare",),
        ("Prepare", "Norms", "Prepare"),
        ("Norms", "Prepare"),
    ]
    measured += [("Norms", "Prepare"), ("Prepare", "Norms", "Prepare")]
    if servers == 1:
        assert steps == ["Flip", *(kind for step in measured for kind in (*step, "Flip"))]


# N workers and one process.


def make_model(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 5)
    ).to(dtype)


def make_batches(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(64, 20, generator=generator, dtype=dtype), torch.randn(64, 5, generator=generator, dtype=dtype))
        for _ in range(10)
    ]


def fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, part: slice) -> Arrays:
    for x, y in make_batches(dtype):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def fit_with_workers(workers: int, optimizer: hw.optim.AnyOptimizer, dtype: torch.dtype) -> Arrays:
    models = [make_model(dtype) for _ in range(workers)]

    def work(session: hw.Session) -> Arrays:
        model = models[session.index]
        ours = hw.torch.Optimizer(model, optimizer, session=session)
        return fit(model, ours, dtype, slice(session.index, None, workers))

    with start_job(workers=workers) as job:
        first, *others = job.run(work)
        for other in others:
            assert_equal_bits(other, first)
        return first


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("SGD", torch.float32, 1e-6), ("Adam", torch.float32, 1e-3), ("Adam", torch.float64, 1e-9)],
)
def test_workers_equal_one_process_with_the_larger_batch(
    workers: int, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(dtype)
    theirs = fit(model, getattr(torch.optim, name)(model.parameters(), lr=0.01), dtype, slice(None))
    ours = fit_with_workers(workers, getattr(hw.optim, name)(lr=0.01), dtype)
    assert_close(ours, theirs, tolerance)
    assert_equal_bits(fit_with_workers(workers, getattr(hw.optim, name)(lr=0.01), dtype), ours)


# Consistency.


def run_with_events(job: Job, *bodies: Callable[[hw.Session], None]) -> None:
    """Run a different body in each worker."""
    job.run(lambda session: bodies[session.index](session))


def register_ones(session: hw.Session) -> None:
    session.register({"w": np.ones(4, np.float32)}, hw.optim.SGD(lr=1.0))


def test_asynchronous_workers_never_wait_and_every_push_counts() -> None:
    registered, done = threading.Event(), threading.Event()

    def fast(session: hw.Session) -> None:
        register_ones(session)
        assert registered.wait(30)
        for _ in range(20):
            session.step({"w": np.ones(4, np.float32)})
        assert session.pull()["w"].tolist() == [-19.0] * 4
        done.set()

    def idle(session: hw.Session) -> None:
        register_ones(session)
        registered.set()
        assert done.wait(30)
        session.step({"w": np.ones(4, np.float32)})
        assert session.staleness == 20
        assert session.pull()["w"].tolist() == [-20.0] * 4

    with start_job(workers=2, servers=2, consistency=hw.asp()) as job:
        run_with_events(job, fast, idle)


@pytest.mark.parametrize("servers", [1, 2])
def test_without_a_barrier_parameters_stand_still_until_the_next_pull(servers: int) -> None:
    """However many workers come later and whatever they commit: read in place with one server, copied with two."""
    size, later = 2 * BLOCK, 11  # more buffers than a message passes

    def register(session: hw.Session) -> hw.Session:
        session.register({"w": np.zeros(size, np.float32)}, hw.optim.SGD(lr=1.0, momentum=0.5))
        return session

    with start_job(servers=servers, consistency=hw.asp()) as job, ExitStack() as stack:
        first = register(stack.enter_context(job.connect()))
        others = [register(stack.enter_context(job.connect())) for _ in range(later)]
        seen = {session: session.parameters["w"][0].item() for session in (first, *others)}
        for turn in range(3):
            for session in others:
                session.step({"w": np.ones(size, np.float32)})
                seen[session] = session.parameters["w"][0].item()
                for reader, value in seen.items():
                    assert np.all(reader.parameters["w"] == value)
            first.push({"w": np.ones(size, np.float32)})
            first.wait()
            assert np.all(first.parameters["w"] == seen[first])
            seen[first] = first.pull()["w"][0].item()
            assert seen[first] < seen[others[-1]]
            first.parameters["w"][:] = 7  # undone by the next pull
            assert np.all(first.pull()["w"] == seen[first]), turn


def test_a_worker_too_far_ahead_waits_for_the_slowest() -> None:
    registered, ahead, released = threading.Event(), threading.Event(), threading.Event()

    def fast(session: hw.Session) -> None:
        register_ones(session)
        assert registered.wait(30)
        for _ in range(2):  # within the bound: does not wait
            session.step({"w": np.ones(4, np.float32)})
        session.push({"w": np.ones(4, np.float32)})
        ahead.set()
        session.wait()
        assert released.is_set()

    def slow(session: hw.Session) -> None:
        register_ones(session)
        registered.set()
        assert ahead.wait(30)
        while session.stats().commit < 3:  # until the third push counts; its worker is not released by that
            pass
        released.set()
        session.step({"w": np.ones(4, np.float32)})

    with start_job(workers=2, consistency=hw.ssp(2)) as job:
        run_with_events(job, fast, slow)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_staleness_stays_within_its_bound_however_workers_run(transport: str) -> None:
    workers, bound = 3, 1
    begun = [0] * workers
    registered = threading.Barrier(workers)

    def work(session: hw.Session) -> None:
        register_ones(session)
        registered.wait(30)
        for step in range(30):
            begun[session.index] = step + 1  # before the push: never less than what the job knows
            session.step({"w": np.ones(4, np.float32)})
            assert session.clock - bound <= min(begun)

    with start_job(workers=workers, transport=transport, consistency=hw.ssp(bound)) as job:
        job.run(work)


@pytest.mark.parametrize("consistency", [hw.ssp(0), hw.ssp(3), hw.asp()], ids=str)
@pytest.mark.parametrize("servers", [1, 3])
def test_without_a_barrier_every_push_counts_once(consistency: hw.Consistency, servers: int) -> None:
    def work(session: hw.Session) -> None:
        register_ones(session)
        for _ in range(25):
            session.step({"w": np.ones(4, np.float32)})

    with start_job(workers=2, servers=servers, consistency=consistency) as job:
        job.run(work)
        with job.connect(role="observer") as reader:
            assert reader.stats().commit == 50
            planes, _ = reader.read_optimizer()
            assert planes["master"]["w"].tolist() == [-49.0] * 4


# The job's memory.


def test_the_jobs_state_is_seen_by_every_worker() -> None:
    written = threading.Event()

    def write(session: hw.Session) -> None:
        session.state["schedule"] = {"step": 3, "rates": [0.1, 0.2]}
        session.state["gone"] = True
        del session.state["gone"]
        written.set()

    def read(session: hw.Session) -> None:
        assert written.wait(30)
        assert dict(session.state) == {"schedule": {"step": 3, "rates": [0.1, 0.2]}}
        assert session.state.get("nothing") is None

    with start_job(workers=2) as job:
        run_with_events(job, write, read)


def train_from(session: hw.Session, steps: range, path: Path | None = None) -> Arrays:
    """Train over these steps; load the job from `path` first where one is given."""
    if path is not None:
        session.load(path)
    session.register(make_arrays(0), OPTIMIZERS["clipped"], averaged=AVERAGED)
    assert session.clock == steps.start
    for step in steps:
        gradients = make_arrays(1, session.index, step)
        if step == 1:
            del gradients["double"]
        session.step(gradients)
    return read_all(session)


@pytest.mark.parametrize("servers", [1, 3])
def test_a_saved_job_goes_on_as_if_nothing_had_happened(tmp_path: Path, servers: int) -> None:
    with start_job(workers=2) as job:
        undisturbed = job.run(lambda session: train_from(session, range(6)))[0]

    def first_half(session: hw.Session) -> None:
        train_from(session, range(3))
        if session.index == 0:
            session.state["epoch"] = 7
            session.save(tmp_path / "saved")

    with start_job(workers=2) as job:
        job.run(first_half)
    with start_job(workers=2, servers=servers) as job:
        resumed = job.run(
            lambda session: (train_from(session, range(3, 6), tmp_path / "saved"), session.state["epoch"])
        )
    assert_equal_bits(resumed[0][0], undisturbed)
    assert [epoch for _, epoch in resumed] == [7, 7]


def test_saving_from_several_servers_writes_the_same_files(tmp_path: Path) -> None:
    for servers in (1, 3):
        with start_job(servers=servers) as job, job.connect() as session:
            train_from(session, range(3))
            session.save(tmp_path / str(servers))
    for name in ("model-0.safetensors", "optimizer-0.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    with hw.connect() as session:
        register_ones(session)
        for _ in range(2):
            session.step({"w": np.ones(4, np.float32)})
            session.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    with hw.connect() as session:
        session.load(tmp_path / "saved")
        register_ones(session)
        assert session.pull()["w"].tolist() == [-1.0] * 4


def test_figures_and_counts_stand_in_the_statistics() -> None:
    def work(session: hw.Session) -> None:
        register_ones(session)
        for step in range(3):
            session.report(loss=float(step), worker=session.index)
            session.step({"w": np.ones(4, np.float32)})

    with start_job(workers=2, servers=2) as job:
        job.run(work)
        with job.connect(role="observer") as reader:
            stats = reader.stats()
    assert (stats.commit, stats.parameters, stats.servers, stats.refused) == (3, 4, 2, 0)
    assert str(stats.consistency) == "bsp"
    for index, worker in enumerate(stats.workers):
        assert (worker.index, worker.live, worker.clock, worker.pushes, worker.refused) == (index, False, 3, 3, 0)
        assert worker.figures == {"loss": 2.0, "worker": float(index)}
