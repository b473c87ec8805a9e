"""The worker: order, urgency between steps, streams that pause and stop, and a clean end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from csm_studio.errors import JobError
from csm_studio.jobs.worker import Worker

WAIT_S = 20.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close(WAIT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


class LongTask:
    """A task of steps, each begun by the test."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._begun = threading.Event()
        self._go = threading.Semaphore(0)
        self._is_over = False
        self.breaths: list[int] = []
        self.draws: list[float] = []
        self.future = worker.submit(self._run, label="long task")
        assert self._begun.wait(WAIT_S)

    def _run(self) -> str:
        mx.random.seed(5)
        self._begun.set()
        while True:
            assert self._go.acquire(timeout=WAIT_S)
            if self._is_over:
                return "done"
            self.draws.append(float(np.array(mx.random.uniform())))
            self.breaths.append(self._worker.breathe())

    def step(self) -> None:
        """Take a step and breathe."""
        num_before = len(self.breaths)
        self._go.release()
        wait_until(lambda: len(self.breaths) > num_before)

    def end(self) -> str:
        """Return from the task."""
        self._is_over = True
        self._go.release()
        return self.future.result(WAIT_S)


def test_tasks_run_in_order_on_one_thread(worker: Worker) -> None:
    gate = threading.Event()
    order: list[str] = []
    threads = set()

    def note(name: str) -> str:
        threads.add(threading.get_ident())
        order.append(name)
        return name

    worker.submit(lambda: gate.wait(WAIT_S))
    futures = [worker.submit(lambda name=name: note(name)) for name in "ab"]  # type: ignore[misc]
    urgent = worker.submit(lambda: note("urgent"), urgent=True)
    gate.set()
    assert [future.result(WAIT_S) for future in futures] == ["a", "b"]
    assert urgent.result(WAIT_S) == "urgent"
    assert order == ["urgent", "a", "b"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_exceptions_travel_and_the_worker_goes_on(worker: Worker) -> None:
    failing = worker.submit(lambda: int("absent"))
    with pytest.raises(ValueError, match="absent"):
        failing.result(WAIT_S)
    assert worker.submit(lambda: 3).result(WAIT_S) == 3


def test_a_task_that_has_not_begun_can_be_cancelled(worker: Worker) -> None:
    gate = threading.Event()
    ran: list[int] = []
    worker.submit(lambda: gate.wait(WAIT_S))
    future = worker.submit(lambda: ran.append(1))
    assert future.cancel()
    gate.set()
    worker.submit(lambda: None).result(WAIT_S)
    assert ran == []


def test_urgent_tasks_run_between_steps_and_others_wait(worker: Worker) -> None:
    task = LongTask(worker)
    ordinary = worker.submit(lambda: "after")
    urgent = worker.submit(worker.busy_with, label="urgent", urgent=True)
    assert not urgent.done()
    assert worker.busy_with() == "long task"
    task.step()
    assert urgent.result(WAIT_S) == "urgent"
    assert not ordinary.done()
    failing = worker.submit(lambda: 1 // 0, urgent=True)
    task.step()
    with pytest.raises(ZeroDivisionError):
        failing.result(WAIT_S)
    assert task.end() == "done"
    assert ordinary.result(WAIT_S) == "after"
    assert task.breaths == [1, 1]
    wait_until(lambda: worker.busy_with() == "")


@pytest.mark.parametrize(
    "meddle",
    [lambda: mx.random.seed(9), lambda: mx.eval(mx.random.normal((3,)))],
    ids=["seed", "draw"],
)
def test_urgent_tasks_leave_the_random_state(worker: Worker, meddle: Callable[[], None]) -> None:
    draws = []
    for is_disturbed in (False, True):
        task = LongTask(worker)
        for _ in range(3):
            if is_disturbed:
                worker.submit(meddle, urgent=True)
            task.step()
        task.end()
        draws.append(task.draws)
    assert task.breaths == [1, 1, 1]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 3


def test_a_breath_within_an_urgent_task_does_nothing(worker: Worker) -> None:
    task = LongTask(worker)
    inner: list[int] = []
    worker.submit(lambda: inner.append(worker.breathe()), urgent=True)
    worker.submit(lambda: None, urgent=True)
    task.step()
    task.end()
    assert (inner, task.breaths) == ([0], [2])


def test_breathing_elsewhere_is_an_error(worker: Worker) -> None:
    with pytest.raises(JobError, match="outside"):
        worker.breathe()


class Counted:
    """Yields arrays and counts them."""

    def __init__(self, num_chunks: int, fails: bool = False) -> None:
        self.made = 0
        self.closed_on: int | None = None
        self._num_chunks = num_chunks
        self._fails = fails

    def __call__(self) -> Iterator[np.ndarray]:
        try:
            while self.made < self._num_chunks:
                self.made += 1
                yield np.array(mx.ones(2) * self.made)
            if self._fails:
                raise ValueError("no more")
        finally:
            self.closed_on = threading.get_ident()


def test_stream_gives_every_chunk_in_order(worker: Worker) -> None:
    stream = worker.stream(Counted(200), capacity=3)
    assert [chunk[0] for chunk in stream] == list(range(1, 201))
    assert stream.has_ended
    assert list(stream) == []


def test_stream_raises_the_producers_exception_after_its_chunks(worker: Worker) -> None:
    stream = worker.stream(Counted(2, fails=True))
    assert [next(stream)[0], next(stream)[0]] == [1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(stream)
    with pytest.raises(ZeroDivisionError):
        next(worker.stream(lambda: 1 // 0))  # type: ignore[arg-type, return-value]
    assert worker.submit(lambda: 3).result(WAIT_S) == 3


def test_close_stops_the_producer_within_a_chunk(worker: Worker) -> None:
    taken, go = threading.Event(), threading.Event()
    source = Counted(1000)

    def slow() -> Iterator[np.ndarray]:
        for chunk in source():
            yield chunk
            taken.set()
            assert go.wait(WAIT_S)

    stream = worker.stream(slow)
    next(stream)
    assert taken.wait(WAIT_S)
    stream.close()
    go.set()
    wait_until(lambda: stream.has_ended)
    # The chunk in the making when close was called, and none after it.
    assert source.made == 2
    assert list(stream) == []


def test_paused_or_dropped_stream_is_closed_on_the_workers_thread(worker: Worker) -> None:
    its_thread = worker.submit(threading.get_ident).result(WAIT_S)
    closed, dropped = Counted(1000), Counted(1000)
    streams = [worker.stream(source, capacity=2) for source in (closed, dropped)]
    wait_until(lambda: closed.made == 2 and dropped.made == 2)
    streams.pop(0).close()
    streams.clear()
    wait_until(lambda: closed.closed_on is not None and dropped.closed_on is not None)
    assert (closed.closed_on, dropped.closed_on) == (its_thread, its_thread)
    assert (closed.made, dropped.made) == (2, 2)


def test_a_sleeping_listener_does_not_hold_up_a_long_task(worker: Worker) -> None:
    task = LongTask(worker)
    source = Counted(5)
    stream = worker.stream(source, capacity=2)
    task.step()
    assert source.made == 2
    task.step()
    assert (source.made, task.breaths) == (2, [1, 0])
    assert next(stream)[0] == 1
    task.step()
    assert source.made == 3
    assert task.end() == "done"
    assert [chunk[0] for chunk in stream] == [2, 3, 4, 5]


def test_a_stream_is_produced_to_its_end_in_one_breath(worker: Worker) -> None:
    task = LongTask(worker)
    source = Counted(20)
    stream = worker.stream(source)
    task.step()
    assert source.made == 20
    assert len(list(stream)) == 20
    task.end()


def test_taking_a_chunk_can_time_out(worker: Worker) -> None:
    task = LongTask(worker)
    with (
        worker.stream(Counted(1), label="speech") as stream,
        pytest.raises(TimeoutError, match="speech"),
    ):
        stream.take(0.01)
    task.end()


def test_closing_refuses_cancels_and_ends_streams() -> None:
    worker = Worker()
    begun = threading.Event()

    def until_closing() -> str:
        begun.set()
        wait_until(lambda: worker.is_closing)
        return "stopped"

    running = worker.submit(until_closing)
    waiting = worker.submit(lambda: None)
    stream = worker.stream(Counted(3), urgent=False)
    assert begun.wait(WAIT_S)
    assert worker.close(WAIT_S)
    assert running.result(WAIT_S) == "stopped"
    assert waiting.cancelled()
    with pytest.raises(JobError, match="is ending"):
        next(stream)
    with pytest.raises(JobError, match="is ending"):
        worker.submit(lambda: None)
    assert worker.close(WAIT_S)


def test_closing_ends_an_endless_stream() -> None:
    worker = Worker()
    source = Counted(10**9)
    stream = worker.stream(source, capacity=10**9)
    next(stream)
    assert worker.close(WAIT_S)
    assert source.closed_on is not None


@pytest.mark.parametrize("ending", ["pass", "worker.close()", "raise SystemExit(0)"])
def test_process_ends_cleanly_with_work_under_way(ending: str) -> None:
    code = f"""
import mlx.core as mx
from csm_studio.jobs.worker import Worker
worker = Worker()
def train():
    while not worker.is_closing:
        mx.eval(mx.random.normal((64, 64)) @ mx.ones((64, 64)))
        worker.breathe()
    print("stopped", flush=True)
worker.submit(train)
assert worker.submit(lambda: mx.ones(3).sum().item(), urgent=True).result(20) == 3
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
