"""Requests to models, run together where they can be: one thread, one run of one model at a time.

Requests that wait are run together along axis 0 if they are for the same resident version, and every input has the same name,
type and shape but for that axis; each then gets its rows of every output. A batch in which something fails is run again one by
one, so that nobody is refused for what another sent. A model with an output of another number of rows is run one by one from then on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from headwater import _limits
from headwater._errors import RequestError, debug
from headwater._metrics import Metrics
from headwater._models import ServedModel
from headwater._oip import Tensor

Outputs = list[Tensor]


class Job(NamedTuple):
    """A request that waits for a model."""

    model: ServedModel
    inputs: Sequence[Tensor]
    rows: int  # 0: has no common axis 0
    key: object  # those of equal keys are run together
    answer: Future[Outputs]
    arrived_s: float


def _job(model: ServedModel, inputs: Sequence[Tensor], arrived_s: float) -> Job:
    counts = {each.array.shape[0] if each.array.shape else 0 for each in inputs}
    rows = counts.pop() if len(counts) == 1 else 0
    key: object = object()
    if rows:
        key = (id(model), *sorted((each.name, each.datatype, each.array.shape[1:]) for each in inputs))
    return Job(model, inputs, rows, key, Future(), arrived_s)


class Batcher:
    """Runs models for requests. Can be shared between threads.

    rows: of one run at most; 1 turns batching off. wait_s: how long a request waits for others while the model is idle.
    """

    def __init__(self, metrics: Metrics, *, rows: int, wait_s: float = 0.0) -> None:
        self._rows, self._wait_s = rows, wait_s
        self._jobs: deque[Job] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        self._unsplit: set[int] = set()  # models whose outputs have other numbers of rows, by id
        self._sizes = metrics.histogram(
            "headwater_batch_size", "Requests that were run together.", [1, 2, 4, 8, 16, 32, 64, 128, 256]
        )
        metrics.gauge("headwater_waiting_requests", "Requests that wait for the model.", lambda: len(self._jobs))
        self._thread = threading.Thread(target=self._live, name="headwater-models", daemon=True)
        self._thread.start()

    def submit(self, model: ServedModel, inputs: Sequence[Tensor], done: Callable[[], None]) -> Future[Outputs]:
        """Return the outputs to come; a RequestError where the model failed on these inputs.

        done: is called once the model is not used any more for this request, whatever came of it. Raises RequestError where too
        many wait.
        """
        job = _job(model, inputs, time.monotonic())
        job.answer.add_done_callback(lambda _: done())
        with self._condition:
            if self._is_closed or len(self._jobs) >= _limits.QUEUE_REQUESTS:
                why = (
                    "a server that goes on" if self._is_closed else f"at most {_limits.QUEUE_REQUESTS} requests to wait"
                )
                error = RequestError(f"Expected {why}, got one more: try again later, or elsewhere.", 503)
                job.answer.set_exception(error)
                return job.answer
            self._jobs.append(job)
            self._condition.notify()
        return job.answer

    def close(self) -> None:
        """Run what waits, then stop."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    def _live(self) -> None:
        while batch := self._next():
            if batch := [job for job in batch if job.answer.set_running_or_notify_cancel()]:
                self._run(batch)

    def _next(self) -> list[Job]:
        """Wait for requests that can be run together, in their order; none: closed."""
        with self._condition:
            while not self._jobs:
                if self._is_closed:
                    return []
                self._condition.wait()
            batch = [self._jobs.popleft()]
            until = batch[0].arrived_s + self._wait_s
            while self._take_more(batch) and (left := until - time.monotonic()) > 0 and not self._is_closed:
                self._condition.wait(left)
        return batch

    def _take_more(self, batch: list[Job]) -> bool:
        """Take those that can be run with the batch; returns whether there is room for others still."""
        first, rows = batch[0], sum(job.rows for job in batch)
        if not first.rows or id(first.model) in self._unsplit:
            return False
        others: deque[Job] = deque()
        for job in self._jobs:
            if job.key == first.key and rows + job.rows <= self._rows:
                batch.append(job)
                rows += job.rows
            else:
                others.append(job)
        self._jobs = others
        return rows < self._rows

    def _run(self, batch: list[Job]) -> None:
        self._sizes.add(len(batch))
        try:
            answers = self._run_together(batch)
        except Exception as error:  # noqa: BLE001 - whatever a model raises
            if len(batch) > 1:
                for job in batch:
                    self._run([job])
            else:
                debug(f"The model failed on a request: {error!r}")
                batch[0].answer.set_exception(
                    RequestError(f"The model failed on these inputs: {type(error).__name__}: {str(error)[:500]}", 422)
                )
            return
        for job, outputs in zip(batch, answers, strict=True):
            job.answer.set_result(outputs)

    def _run_together(self, batch: list[Job]) -> list[Outputs]:
        model = batch[0].model
        by_name = [{each.name: each for each in job.inputs} for job in batch]
        outputs = model.run({name: _join([each[name] for each in by_name]) for name in by_name[0]})
        if len(batch) == 1:
            return [outputs]
        if any(not each.array.shape or each.array.shape[0] != sum(job.rows for job in batch) for each in outputs):
            self._unsplit.add(id(model))
            raise ValueError("an output has not as many rows as the inputs")
        answers, start = [], 0
        for job in batch:
            rows = slice(start, start := start + job.rows)
            answers.append([each._replace(array=each.array[rows]) for each in outputs])
        return answers


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all in one array of its own: aligned, and the model's to write to."""
    if not parts[0].array.shape:
        return parts[0]._replace(array=parts[0].array.copy())
    return parts[0]._replace(array=np.concatenate([each.array for each in parts]))
