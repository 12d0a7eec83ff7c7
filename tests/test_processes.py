"""Jobs of real processes: exit codes, deaths and interruptions, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import TOKEN, start_job

import headwater as hw
from headwater import _limits, errors
from headwater._launch import LocalJob
from headwater._transport import Address

WORKERS = Path(__file__).parent / "workers"
SIZE = 40_000  # as in steps.py
LIMIT_S = 60.0  # no process takes longer
SOON_S = 5.0  # after a death; about 0.1 s on an idle machine

servers = pytest.mark.parametrize("servers", [1, 2])


class Output:
    """What a process and its children print, line by line. It ends when the last of them has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._has_ended = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)
        self.process.stdout.close()

    def next(self) -> str | None:
        """Return the next line; None at the end."""
        if self._has_ended:
            return None
        try:
            line = self._queue.get(timeout=LIMIT_S)
        except queue.Empty:
            raise AssertionError(f"no further line in {LIMIT_S} s after:\n{self.text}") from None
        if line is None:
            self._has_ended = True
        else:
            self.lines.append(line)
        return line

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match in lines to come."""
        while (line := self.next()) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern} not found in:\n{self.text}")

    def finish(self) -> int:
        """Wait until the process and all its children have ended; return its exit status."""
        while self.next() is not None:
            pass
        self._thread.join(LIMIT_S)
        return self.process.wait(LIMIT_S)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Machine:
    """Starts processes that carry a mark in their environment, and finds what is left of them."""

    def __init__(self) -> None:
        self.mark = f"HEADWATER_MARK={uuid.uuid4().hex}"
        self.folder = Path(tempfile.mkdtemp(prefix="hw-"))  # short: socket paths have a limit
        self.outputs: list[Output] = []

    def start(self, *command: str, **environment: str) -> Output:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HEADWATER_", "OMP_", "COV"))}
        name, value = self.mark.split("=")
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=kept | {name: value, "TMPDIR": str(self.folder)} | environment,
        )
        self.outputs.append(Output(process))
        return self.outputs[-1]

    def run(
        self,
        *arguments: str,
        workers: int = 2,
        servers: int = 1,
        transport: str = "auto",
        restarts: int = 0,
        durability: str = "snapshot",
    ) -> Output:
        """Start `headwater run`."""
        options = ["-n", str(workers), "-s", str(servers), "--transport", transport, "--restarts", str(restarts)]
        return self.start("-m", "headwater", "run", *options, "--durability", durability, *arguments)

    def steps(self, *arguments: str, **options: int | str) -> Output:
        """Start `headwater run` with the worker that makes steps."""
        return self.run(str(WORKERS / "steps.py"), *arguments, **options)  # type: ignore[arg-type]

    def processes(self) -> dict[int, str]:
        """Return the command lines of live processes with our mark."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:  # it has ended, or is another user's
                    continue
        return found

    def servers(self) -> list[int]:
        """Return the process ids of servers, first server first."""
        return sorted(number for number, command in self.processes().items() if " server " in command)

    def clean(self) -> tuple[dict[int, str], list[str]]:
        """Return processes and files that are left, after killing the former and removing the latter.

        The last line of output may be read a moment before the last process is gone.
        """
        deadline = time.monotonic() + SOON_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in left:
            os.kill(number, signal.SIGKILL)
        for output in self.outputs:
            output.finish()
        files = [str(path) for path in self.folder.rglob("*")]
        shutil.rmtree(self.folder)
        return left, files


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Give a machine; afterwards no process, socket or folder of the job may be left. (Shared memory has no name: it is gone
    when the last process is.)"""
    found = Machine()
    yield found
    assert found.clean() == ({}, [])


# Beginning and end.


@servers
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_job_that_goes_well_exits_with_0(machine: Machine, servers: int, transport: str) -> None:
    output = machine.steps("5", workers=3, servers=servers, transport=transport)
    assert output.finish() == 0, output.text
    assert sorted(line for line in output.lines if "ends" in line) == [
        f"worker {i} ends at -4.0 -4.0" for i in range(3)
    ]


def test_workers_find_their_job_in_the_environment_and_nothing_of_torchruns(machine: Machine) -> None:
    output = machine.run("--consistency", "ssp:2", str(WORKERS / "environment.py"), servers=2)
    assert output.finish() == 0, output.text
    found = sorted((json.loads(line) for line in output.lines), key=lambda entry: str(entry["session"]))
    for index, entry in enumerate(found):
        del entry["HEADWATER_MARK"]
        assert entry.pop("HEADWATER_ADDRESS").startswith(f"unix://{machine.folder}/")
        assert len(entry.pop("HEADWATER_TOKEN")) == 32
        assert entry.pop("HEADWATER_LAUNCHER").isdigit()
        assert entry == {
            "HEADWATER_WORKER": str(index),
            "HEADWATER_WORKERS": "2",
            "HEADWATER_TRANSPORT": "auto",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
            "session": f"{index} of 2 ssp:2 on 2",
        }


def test_a_script_runs_alone_without_a_launcher(machine: Machine) -> None:
    output = machine.start(str(WORKERS / "steps.py"), "3")
    assert output.finish() == 0
    assert output.lines[-1] == "worker 0 ends at -2.0 -2.0"


def test_a_worker_that_fails_before_the_first_commit_fails_the_job(machine: Machine) -> None:
    output = machine.steps("0", "1:0:fail")
    assert output.finish() == 1
    assert "RuntimeError: on purpose" in output.text
    assert "headwater: worker 1 ended with exit status 1 before its first commit; the job ends." in output.lines, (
        output.text
    )


def test_a_worker_that_fails_later_leaves_the_others_to_finish(machine: Machine) -> None:
    output = machine.steps("6", "1:3:exit7", workers=3)
    assert output.finish() == 7
    assert "headwater: worker 1 ended with exit status 7; the others go on." in output.lines, output.text
    assert sorted(line for line in output.lines if "ends" in line) == [
        "worker 0 ends at -5.0 -5.0",
        "worker 2 ends at -5.0 -5.0",
    ]


def test_workers_with_unequal_data_all_exit_with_0(machine: Machine) -> None:
    output = machine.start("-m", "headwater", "run", "-n", "2", str(WORKERS / "uneven.py"))
    assert output.finish() == 0, output.text
    assert sorted(output.lines) == ["worker 0 made 2 steps", "worker 1 made 5 steps"]


def test_a_script_that_is_missing_is_named(machine: Machine) -> None:
    output = machine.run("nowhere.py")
    assert output.finish() == 2
    assert "nowhere.py is no file" in output.text


def test_the_demo_trains_publishes_serves_and_swaps(machine: Machine, tmp_path: Path) -> None:
    output = machine.start(
        "-m", "headwater", "demo", "--minutes", "0.03", "--folder", str(tmp_path), TMPDIR=str(tmp_path)
    )
    assert output.finish() == 0, output.text
    assert "prod is version 1, of step " in output.text
    assert re.search(r"Of \d+ requests meanwhile none failed \(\d+ by version 1, \d+ by version 2\)", output.text)


# Deaths.


def killed(output: Output) -> float:
    """Wait for the death that a worker announces; return when it is."""
    return float(output.wait_for(r"dies at ([\d.]+)")[1])


@servers
@pytest.mark.parametrize(
    ("action", "transport"),
    [("torn", "tcp"), ("unsealed", "tcp"), ("unsealed", "auto"), ("kill", "auto")],
)
def test_a_worker_killed_before_its_push_is_sealed_counts_on_no_server(
    machine: Machine, servers: int, action: str, transport: str
) -> None:
    output = machine.steps("6", f"1:3:{action}", servers=servers, transport=transport)
    death = killed(output)
    accepted, released = output.wait_for(r"worker 0 made step 3 with (\d) at ([\d.]+)").groups()
    assert accepted == "1"
    assert float(released) - death < SOON_S
    assert output.finish() == 128 + signal.SIGKILL
    assert "headwater: worker 1 ended by SIGKILL; the others go on." in output.lines, output.text
    assert "worker 0 ends at -5.0 -5.0" in output.lines, output.text


@servers
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_worker_killed_between_its_rows_and_its_seal_leaves_no_row(
    machine: Machine, servers: int, transport: str
) -> None:
    output = machine.steps("6", "0:1:rows", "1:3:staged", "0:5:show", servers=servers, transport=transport)
    killed(output)
    assert output.wait_for(r"worker 0 has (.*)")[1] == "9 rows of -0.5 to -0.5"  # one of two workers had a gradient
    assert output.finish() == 128 + signal.SIGKILL
    assert "worker 0 ends at -5.0 -5.0" in output.lines, output.text


@servers
def test_a_worker_killed_after_its_push_is_sealed_counts(machine: Machine, servers: int) -> None:
    output = machine.steps("6", "1:3:sealed", servers=servers)
    assert output.wait_for(r"worker 0 made step 3 with (\d)")[1] == "2"
    assert output.finish() == 128 + signal.SIGKILL
    assert "worker 0 ends at -5.0 -5.0" in output.lines, output.text


@servers
def test_a_worker_killed_among_others_that_do_not_wait_counts_nowhere(machine: Machine, servers: int) -> None:
    output = machine.start(
        *("-m", "headwater", "run", "-n", "2", "-s", str(servers), "--transport", "tcp", "--consistency", "asp"),
        *("--restarts", "0", str(WORKERS / "steps.py"), "6", "1:3:torn"),
    )
    assert output.finish() == 128 + signal.SIGKILL
    low, high = output_values(output)
    assert low == high
    assert -8.0 <= low <= -5.0


def output_values(output: Output) -> tuple[float, float]:
    line = next(line for line in output.lines if "ends at" in line)
    low, high = line.split()[-2:]
    return float(low), float(high)


def test_a_job_whose_workers_are_all_killed_ends(machine: Machine) -> None:
    output = machine.steps("6", *(f"{i}:2:kill" for i in range(3)), workers=3)
    assert output.finish() == 128 + signal.SIGKILL


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_server_ends_the_job_with_a_word(machine: Machine, victim: int) -> None:
    output = machine.steps("0", servers=2)
    for _ in range(2):
        output.wait_for("is under way")
    os.kill(machine.servers()[victim], signal.SIGKILL)
    assert output.finish() == 1
    assert f"headwater: server {victim} ended by SIGKILL; the job cannot go on." in output.lines, output.text


@servers
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_killed_server_is_started_again_and_nothing_is_lost(machine: Machine, servers: int, transport: str) -> None:
    """Each of 40 steps takes 1 from a parameter that is 1 at first: one that is lost or counted twice would show."""
    output = machine.steps("40", servers=servers, transport=transport, restarts=4, durability="log")
    for step in (3, 10, 20, 30):
        output.wait_for(f"made step {step} ")
        os.kill(machine.servers()[step % servers], signal.SIGKILL)
        output.wait_for("it is started again")
    assert output.finish() == 0
    assert "ends at -39.0 -39.0" in output.text


def test_a_killed_launcher_takes_servers_and_workers_along(machine: Machine) -> None:
    output = machine.steps("0", servers=2)
    for _ in range(2):
        output.wait_for("is under way")
    output.process.kill()
    assert output.finish() == -signal.SIGKILL


# Workers that are started again.


def again(machine: Machine, action: str, *, restarts: int = 0, servers: int = 1) -> Output:
    """Start a job of three whose worker 1 comes to an end in the middle."""
    return machine.run(str(WORKERS / "again.py"), action, workers=3, restarts=restarts, servers=servers)


def ends(output: Output) -> list[str]:
    """Return what the workers said at their end."""
    return sorted(line for line in output.lines if "ends at" in line)


ALL_END = [f"worker {i} ends at -19.0" for i in range(3)]


@servers
def test_a_killed_worker_is_started_again_and_the_job_ends_well(machine: Machine, servers: int) -> None:
    output = again(machine, "dies", restarts=3, servers=servers)
    clock, held = output.wait_for(r"worker 1 is back at clock (\d+) with (\S+)").groups()
    assert int(clock) >= 3
    assert float(held) == 1.0 - int(clock)
    assert output.finish() == 0, output.text
    assert "headwater: worker 1 ended by SIGKILL; it is started again, restart 1 of 3." in output.lines, output.text
    assert ends(output) == ALL_END


def test_a_worker_that_always_dies_is_started_again_so_often_and_the_others_finish(machine: Machine) -> None:
    output = again(machine, "always_dies", restarts=2)
    assert output.finish() == 128 + signal.SIGKILL
    assert [line for line in output.lines if line.startswith("headwater: ")] == [
        "headwater: worker 1 ended by SIGKILL; it is started again, restart 1 of 2.",
        "headwater: worker 1 ended by SIGKILL; it is started again, restart 2 of 2.",
        "headwater: worker 1 ended by SIGKILL; the others go on.",
    ]
    assert len(ends(output)) == 2


def test_a_worker_that_fails_when_it_is_started_again_is_not_started_a_third_time(machine: Machine) -> None:
    output = again(machine, "dies_and_fails", restarts=3)
    assert output.finish() == 1
    assert output.text.count("RuntimeError: on purpose") == 1
    assert "headwater: worker 1 ended with exit status 1 before its first commit; the others go on." in output.lines, (
        output.text
    )
    assert ends(output) == [ALL_END[0], ALL_END[2]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_while_it_waits_for_others_is_back_before_they_move(
    machine: Machine, number: signal.Signals
) -> None:
    """The server would find out only when it has something to say; and what was sealed counts."""
    output = again(machine, "waits", restarts=1)
    victim = int(output.wait_for(r"waits as process (\d+)")[1])
    since = time.monotonic()
    os.kill(victim, number)
    accepted = output.wait_for(r"worker 0 made the step with (\d)")[1]  # which it does when the other is back
    assert time.monotonic() - since < SOON_S
    assert accepted == "3"  # the dead worker's among them
    assert output.finish() == 0, output.text
    assert ends(output) == ALL_END


def test_a_worker_that_gets_sigterm_leaves_the_job_and_ends_with_143(machine: Machine) -> None:
    output = again(machine, "pauses")
    victim = int(output.wait_for(r"pauses as process (\d+)")[1])
    os.kill(victim, signal.SIGTERM)
    output.wait_for("worker 1 leaves, and has left: True")
    assert output.finish() == 143
    assert "headwater: worker 1 ended with exit status 143; the others go on." in output.lines, output.text
    assert ends(output) == [ALL_END[0], ALL_END[2]]


def test_a_worker_that_does_not_leave_on_sigterm_is_gone_after_the_limit(machine: Machine) -> None:
    output = again(machine, "stays")
    victim = int(output.wait_for(r"stays as process (\d+)")[1])
    os.kill(victim, signal.SIGTERM)
    output.wait_for("worker 1 stays all the same")
    assert output.finish() == 128 + signal.SIGALRM
    assert ends(output) == [ALL_END[0], ALL_END[2]]


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_dead_server_can_be_started_again_at_its_address(transport: str) -> None:
    with LocalJob([], workers=0, transport=transport) as job:
        address = job.address
        job.servers[0].kill()
        job.servers[0].wait()
        job._start_server(0)
        assert job.address == address
        with hw.connect(address, token=job.token) as session:
            assert session.stats().commit == 0


def test_sigterm_keeps_the_meaning_that_a_script_has_given_it(machine: Machine) -> None:
    output = machine.run(str(WORKERS / "handlers.py"), workers=1)
    assert output.finish() == 0, output.text
    assert output.lines == ["the script's own: True", "a forked child's: <Handlers.SIG_DFL: 0>"]


# Interruption.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@servers
def test_an_interrupted_job_saves_what_was_learnt(
    machine: Machine, tmp_path: Path, number: signal.Signals, servers: int
) -> None:
    path = tmp_path / "saved"
    output = machine.run("--save", str(path), str(WORKERS / "steps.py"), "0", servers=servers)
    for _ in range(2):
        output.wait_for("is under way")
    output.process.send_signal(number)
    assert output.finish() == 130
    assert f"headwater: saved to {path}" in output.lines, output.text
    with hw.connect() as session:
        session.load(path)
        session.register({"w": np.ones(SIZE, np.float32)}, hw.optim.SGD(lr=1.0))
        assert session.clock >= 3
        assert session.pull()["w"].tolist() == [1.0 - session.clock] * SIZE


def test_an_interruption_before_the_first_commit_has_nothing_to_save(machine: Machine, tmp_path: Path) -> None:
    output = machine.run("--save", str(tmp_path / "saved"), str(WORKERS / "sleeper.py"), workers=1)
    output.wait_for("sleeps")
    output.process.send_signal(signal.SIGINT)
    assert output.finish() == 130
    assert "headwater: nothing was learnt yet, so nothing is saved." in output.lines, output.text
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", ["server", "sleep"])
def test_an_interrupt_while_a_process_is_started_leaves_none(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **how: Any) -> None:
            super().__init__(command, **how)
            if kind in command:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), LocalJob(["sleep", "1000"], workers=1):
        pass  # what is left is found by every test


def test_a_job_saves_at_its_end_too(machine: Machine, tmp_path: Path) -> None:
    output = machine.run("--save", str(tmp_path / "saved"), str(WORKERS / "steps.py"), "3")
    assert output.finish() == 0
    with hw.connect() as session:
        session.load(tmp_path / "saved")
        session.register({"w": np.ones(SIZE, np.float32)}, hw.optim.SGD(lr=1.0))
        assert session.pull(["w"])["w"][0] == -2.0


# Life signs.


def start_worker(machine: Machine, address: str, *arguments: str) -> Output:
    """Start one worker of a job whose server runs in this process."""
    environment = {"HEADWATER_ADDRESS": address, "HEADWATER_TOKEN": TOKEN, "HEADWATER_WORKER": "1"}
    return machine.start(str(WORKERS / "steps.py"), *arguments, **environment)


def step_beside(session: hw.Session) -> None:
    """Make the first step of a job of two."""
    session.register({"w": np.ones(SIZE, np.float32)}, hw.optim.SGD(lr=1.0))
    session.step({"w": np.ones(SIZE, np.float32)})


def test_a_stopped_process_is_dropped_after_the_beat_limit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "BEAT_LIMIT_S", 0.7)
    monkeypatch.setattr(_limits, "BEAT_INTERVAL_S", 0.1)
    monkeypatch.setenv("HEADWATER_WORKER", "0")
    with start_job(workers=2) as job, job.connect() as session:
        output = start_worker(machine, job.address, "6", "1:1:stop")
        step_beside(session)
        assert session.accepted == 2
        since = float(output.wait_for(r"stops at ([\d.]+)")[1])
        session.step({"w": np.ones(SIZE, np.float32)})
        assert session.accepted == 1
        assert 0.5 < time.time() - since < SOON_S
        output.process.send_signal(signal.SIGCONT)
        assert output.finish() == 1
        assert "PeerLostError" in output.text


def test_a_process_that_is_busy_in_one_long_call_is_not_dropped(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_limits, "BEAT_LIMIT_S", 0.7)
    monkeypatch.setattr(_limits, "BEAT_INTERVAL_S", 0.1)
    monkeypatch.setenv("HEADWATER_WORKER", "0")
    with start_job(workers=2) as job, job.connect() as session:
        output = start_worker(machine, job.address, "2", "1:1:hold_lock")
        step_beside(session)
        session.step({"w": np.ones(SIZE, np.float32)})
        assert session.accepted == 2
        assert output.finish() == 0


# Memory that is shared.


@servers
def test_a_stray_write_harms_nobody_and_is_undone_by_the_next_pull(machine: Machine, servers: int) -> None:
    output = machine.run(str(WORKERS / "stray.py"), servers=servers)
    assert output.finish() == 0, output.text
    expected = [*([float(-n)] * 2 for n in range(4)), [-3.0]]
    assert sorted(output.lines) == [f"worker {i} saw {expected}" for i in range(2)]


# Servers alone.


def test_a_server_alone_says_what_workers_need(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    output = machine.start("-m", "headwater", "server", "--listen", "tcp://127.0.0.1:0")
    address, token = output.wait_for(r"export HEADWATER_ADDRESS=(\S+) HEADWATER_TOKEN=(\S+)").groups()
    for name in ("HEADWATER_TOKEN", "HEADWATER_WORKER", "HEADWATER_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEADWATER_ADDRESS", address)
    with pytest.raises(errors.AuthenticationError):
        hw.connect()
    monkeypatch.setenv("HEADWATER_TOKEN", token)
    for _ in range(2):  # it stays when its workers leave
        with hw.connect() as session:
            session.register({"w": np.ones(3, np.float32)}, hw.optim.SGD(lr=1.0))
            session.step({"w": np.ones(3, np.float32)})
    assert session.clock == 2
    output.process.send_signal(signal.SIGTERM)
    assert output.finish() == 0


def test_servers_started_by_hand_make_one_job(machine: Machine) -> None:
    first = machine.start(
        *("-m", "headwater", "server", "--listen", "tcp://127.0.0.1:0", "--servers", "2", "--workers", "1"),
        HEADWATER_TOKEN=TOKEN,
    )
    address = first.wait_for(r"listening on (\S+)")[1]
    second = machine.start(
        *("-m", "headwater", "server", "--listen", "tcp://127.0.0.1:0", "--join", address), HEADWATER_TOKEN=TOKEN
    )
    with hw.connect(address, token=TOKEN) as session:
        session.register({"w": np.ones(SIZE, np.float32)}, hw.optim.SGD(lr=1.0))
        session.step({"w": np.ones(SIZE, np.float32)})
        assert session.pull()["w"].tolist() == [0.0] * SIZE
        assert session.stats().servers == 2
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 0
    assert second.finish() == 0  # a further server ends with the first


@pytest.mark.parametrize("arguments", [("--listen", "tcp://0.0.0.0:0"), ("--join", "tcp://127.0.0.1:1")])
def test_a_server_that_others_can_reach_needs_a_token(machine: Machine, arguments: tuple[str, str]) -> None:
    output = machine.start("-m", "headwater", "server", *arguments)
    assert output.finish() == 2
    assert "Expected HEADWATER_TOKEN in the environment, got none" in output.text


def test_what_a_killed_server_left_is_removed_by_the_next(machine: Machine) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        output = machine.start("-m", "headwater", "server", "--listen", "tcp://127.0.0.1:0")
        output.wait_for("listening")
        assert len(list(machine.folder.iterdir())) == 1
        output.process.send_signal(number)
        output.finish()


def test_a_server_that_is_told_to_stop_while_it_starts_leaves_nothing(machine: Machine) -> None:
    """Here it waits for a coordinator that is nowhere, and listens already."""
    options = ("--listen", "tcp://127.0.0.1:0", "--join", "tcp://127.0.0.1:1")
    output = machine.start("-m", "headwater", "server", *options, HEADWATER_TOKEN=TOKEN)
    deadline = time.monotonic() + LIMIT_S
    while not list(machine.folder.rglob("socket")):
        assert time.monotonic() < deadline
    output.process.send_signal(signal.SIGTERM)
    assert output.finish() != 0


def test_a_server_that_is_told_to_stop_while_it_closes_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job has ended under it while it was starting, say, and whoever started it ends it at the same moment."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    server = hw.Server(Address("tcp", "127.0.0.1", 0), token=TOKEN)
    folder = Path(Address.parse(server.address.unix).host).parent
    assert folder.exists()
    monkeypatch.setattr(server, "_ending", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.close()
    assert not folder.exists()


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_follower_takes_over_from_a_killed_server(machine: Machine, transport: str) -> None:
    """Whichever of the two servers dies, another one follows; nothing acknowledged is lost."""
    output = machine.steps("400", transport=transport, restarts=3, durability="replicated")
    output.wait_for("made step 60 ")
    os.kill(machine.servers()[0], signal.SIGKILL)
    output.wait_for("its follower takes over")
    assert output.finish() == 0
    assert "ends at -399.0 -399.0" in output.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_job_in_a_script_that_is_killed_goes_on_where_it_was(
    machine: Machine, tmp_path: Path, number: signal.Signals
) -> None:
    """At once: nobody waits for the worker that was killed."""
    words = (str(WORKERS / "kept.py"), str(tmp_path / "store"), "log")
    output = machine.start(*words, "100000")
    seen = 0
    for _ in range(2):
        output.wait_for(f"made step {seen + 50} ")
        output.process.send_signal(number)
        output.finish()
        assert "no last snapshot" not in output.text
        last = int(re.findall(r"made step (\d+) ", output.text)[-1])
        output = machine.start(*words, str(last + 70))
        # One or two may have been kept and not said.
        output.wait_for(rf"made step (?:{last + 1}|{last + 2}|{last + 3}) ")
        seen = last
    assert output.finish() == 0
    assert f"ends at {last + 70} -{last + 70}.0" in output.text


def test_a_replica_serves_what_it_has_while_its_job_is_away_and_then_follows_it(
    machine: Machine, tmp_path: Path
) -> None:
    job, ids = f"unix://{machine.folder}/job", np.arange(12)

    def start_server(*more: str) -> Output:
        options = ("--consistency", "asp", "--durability", "log", "--store", str(tmp_path / "store"), "--index", "0")
        output = machine.start("-m", "headwater", "server", "--listen", job, *options, *more, HEADWATER_TOKEN=TOKEN)
        output.wait_for("listening on")
        return output

    def push(some: np.ndarray) -> np.ndarray:
        with hw.connect(job, token=TOKEN) as session:
            table = session.table("items", 3)
            table.push(some, np.ones((len(some), 3), np.float32))
            return table.pull(ids, touch=False)

    server = start_server()
    before = push(ids[:3])
    options = ("--job", job, "--listen", "tcp://127.0.0.1:0", "--tables", "items")
    replica = machine.start("-m", "headwater", "replica", *options, HEADWATER_TOKEN=TOKEN)
    address = replica.wait_for(r"listening on (\S+)")[1]
    replica.wait_for(r"tables: items \(3 rows\)")
    with hw.lookup(address, token=TOKEN) as reader:
        server.process.kill()
        replica.wait_for("the replica serves what it has")
        np.testing.assert_array_equal(reader.pull("items", ids), before)
        assert reader.stats().trouble
        (machine.folder / "job").unlink()  # which it had no time to
        server = start_server("--resume")
        after = push(ids[2:9])
        deadline = time.monotonic() + LIMIT_S
        while not np.array_equal(reader.pull("items", ids), after):
            assert time.monotonic() < deadline
        (table,) = reader.stats().tables
        assert (table.rows, table.restarts, reader.stats().trouble) == (9, 2, "")
    for each in (replica, server):
        each.process.send_signal(signal.SIGTERM)
        assert each.finish() == 0
