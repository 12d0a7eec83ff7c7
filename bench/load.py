"""An open-loop client: requests are sent when they are due, whether or not earlier ones were answered, and each answer is checked."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

HEAD = b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n%s\r\n"
ANSWER_S = 20.0
T = TypeVar("T")
Check = Callable[[bytes, bytes], bool]  # header and body of an answer → whether it is of one version


@dataclass
class Seen:
    """What came of a load."""

    latencies_s: list[float] = field(default_factory=list)  # from when a request was due to its answer
    failed: int = 0  # another status, or no answer
    mixed: int = 0  # an answer of more than one version
    reasons: set[str] = field(default_factory=set)

    def __iadd__(self, other: Seen) -> Seen:
        self.latencies_s += other.latencies_s
        self.failed, self.mixed = self.failed + other.failed, self.mixed + other.mixed
        self.reasons |= other.reasons
        return self

    def quantile_ms(self, share: float) -> float:
        return 1e3 * sorted(self.latencies_s)[min(int(share * len(self.latencies_s)), len(self.latencies_s) - 1)]


class Client:
    """Requests of one kind to one server, over connections that stay."""

    def __init__(self, port: int, path: str, body: bytes, headers: bytes, check: Check) -> None:
        self._port, self._check = port, check
        self._request = HEAD % (path.encode(), len(body), headers) + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def _ask(self) -> bool:
        """Return whether the answer is of one version. Raises OSError, or EOFError, or ValueError for another status."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(size)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(body.decode(errors="replace")[:200])
        return self._check(head, body)

    async def _one(self, due_s: float, seen: Seen) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                is_whole = await self._ask()
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            seen.failed += 1
            seen.reasons.add(f"{type(error).__name__} {error}"[:200])
            return
        seen.latencies_s.append(time.perf_counter() - due_s)
        seen.mixed += not is_whole

    async def _open(self, rate: float, seconds: float, seed: int) -> Seen:
        seen, chance = Seen(), random.Random(seed)
        start = due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (due_s := due_s + chance.expovariate(rate)) < start + seconds:
                if (wait_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(due_s, seen))
        return seen

    async def _closed(self, clients: int, seconds: float) -> float:
        stop, done = time.perf_counter() + seconds, 0

        async def ask() -> None:
            nonlocal done
            while time.perf_counter() < stop:
                await self._ask()
                done += 1

        await asyncio.gather(*(ask() for _ in range(clients)))
        return done / seconds

    def open(self, rate: float, seconds: float, seed: int) -> Seen:
        """Send requests at moments of a Poisson process."""
        return self._run(self._open(rate, seconds, seed))

    def capacity(self, clients: int, seconds: float) -> float:
        """Return answers per second to clients that each wait for theirs."""
        return self._run(self._closed(clients, seconds))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        gc.freeze()

        async def run() -> T:
            try:
                return await work
            finally:
                for _, writer in self._idle:
                    writer.close()
                self._idle.clear()

        return asyncio.run(run())
