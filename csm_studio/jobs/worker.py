"""The one thread that owns MLX: tasks in order, and urgent ones between the steps of a long one.

Whatever leaves the thread - a task's result, a stream's chunks - must be numpy or plain Python. A
model may leave as a handle that is only passed on to other tasks.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx

from csm_studio.errors import JobError
from csm_studio.jobs.stream import Producer, Stream, ending

T = TypeVar("T")

EXIT_TIMEOUT_S = 60.0
"""How long the process waits at its end for the task that runs, such as a step and its save."""

STREAM_CAPACITY = 64
"""Chunks that a stream may be ahead of who listens: 20 s of speech in chunks of four frames."""


class _Task(Protocol):
    label: str

    def run(self) -> None:
        """Do it. Exceptions go to whoever waits for the task."""

    def abandon(self, error: Exception) -> None:
        """Tell whoever waits that it will not be done."""


class Worker:
    """Runs tasks on one thread, which ends with `close` or with the process.

    Ordinary tasks run in the order of their submission. Urgent ones go before them, and also
    between the steps of an ordinary task that calls `breathe`. All methods but `breathe` may be
    called from any thread. A task must not wait for another task.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str = "mlx-worker") -> None:
        self._changed = threading.Condition()
        self._urgent: deque[_Task] = deque()
        self._ordinary: deque[_Task] = deque()
        self._running: list[str] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        # A thread inside MLX when the interpreter ends would abort the process.
        atexit.register(self.close, EXIT_TIMEOUT_S)
        self._thread.start()

    @property
    def is_closing(self) -> bool:
        """Whether the end was asked for; a long task should then stop at its next step."""
        return self._is_closing

    def submit(
        self, function: Callable[[], T], *, label: str = "", urgent: bool = False
    ) -> Future[T]:
        """Have a function run on the thread.

        Args:
            function: Returns numpy or plain Python.
            label: What `busy_with` says meanwhile.
            urgent: Run it also between the steps of a long task.

        Returns:
            Its result to be. `cancel` works until it begins.

        Raises:
            JobError: The worker is closed.
        """
        task = _Call(function, label)
        self._add(task, urgent)
        return task.future

    def stream(
        self,
        produce: Callable[[], Iterator[T]],
        *,
        label: str = "",
        urgent: bool = True,
        capacity: int = STREAM_CAPACITY,
    ) -> Stream[T]:
        """Iterate on another thread over what is produced on this one.

        Between two steps of a long task an urgent stream is produced to its end, since a person
        waits for it, unless it gets `capacity` chunks ahead of the listener: then it pauses, the
        long task goes on, and it is continued at the next breath after a chunk was taken.
        So a listener who sleeps never holds up a training.

        Args:
            produce: Returns an iterator of numpy arrays or plain Python, such as a
                `SpeechStream`; its `close`, if it has one, is called on the worker's thread.
            label: What `busy_with` says meanwhile.
            urgent: Run it also between the steps of a long task.
            capacity: Chunks held for the listener, at least 1.

        Raises:
            JobError: The worker is closed.
        """
        producer = Producer(
            produce,
            label,
            capacity,
            requeue=lambda task: self._add(task, urgent, again=True),
            is_ending=lambda: self._is_closing,
        )
        self._add(producer, urgent)
        return Stream(producer)

    def breathe(self) -> int:
        """Run the urgent tasks that wait now, and return how many.

        Called by a long task between its steps. Their exceptions go to those who wait for them,
        and MLX's random state is afterwards what it was. Within an urgent task it does nothing.

        Raises:
            JobError: Called on another thread.
        """
        if threading.current_thread() is not self._thread:
            raise JobError("breathe() was called outside of the worker's thread.")
        if len(self._running) > 1 or self._is_closing:
            return 0
        with self._changed:
            # Only those that wait already: a steady flow of them must not starve the long task.
            waiting = [self._urgent.popleft() for _ in range(len(self._urgent))]
        if waiting:
            random_key = cast("list[mx.array]", mx.random.state)[0]
            before = mx.array(random_key)
            mx.eval(before)
            for task in waiting:
                self._do(task)
            # A seed replaces the array, so it is looked up again.
            random_key = cast("list[mx.array]", mx.random.state)[0]
            random_key[:] = before
            mx.eval(random_key)
        return len(waiting)

    def busy_with(self) -> str:
        """Return the label of what runs now, innermost first; empty when idle."""
        with self._changed:
            return self._running[-1] if self._running else ""

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread: tasks that wait are cancelled, the one that runs is waited for.

        A long task is expected to look at `is_closing` between its steps.

        Args:
            timeout_s: How long to wait, or None for as long as it takes.

        Returns:
            Whether the thread has ended.

        Raises:
            JobError: Called on the worker's own thread.
        """
        if threading.current_thread() is self._thread:
            raise JobError("close() was called on the worker's own thread.")
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        has_ended = not self._thread.is_alive()
        if has_ended:
            atexit.unregister(self.close)
        return has_ended

    def _add(self, task: _Task, urgent: bool, again: bool = False) -> None:
        with self._changed:
            if self._is_closing:
                if not again:
                    raise ending()
                task.abandon(ending())
                return
            (self._urgent if urgent else self._ordinary).append(task)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._do(task)
                del task
        finally:
            with self._changed:
                left = [*self._urgent, *self._ordinary]
            for task in left:
                task.abandon(ending())
            mx.clear_streams()

    def _next(self) -> _Task | None:
        with self._changed:
            while not (self._is_closing or self._urgent or self._ordinary):
                self._changed.wait()
            if self._is_closing:
                return None
            return (self._urgent or self._ordinary).popleft()

    def _do(self, task: _Task) -> None:
        with self._changed:
            self._running.append(task.label)
        try:
            task.run()
        finally:
            with self._changed:
                self._running.pop()


class _Call:
    """A function to run once, and its result to be."""

    def __init__(self, function: Callable[[], Any], label: str) -> None:
        self.label = label
        self.future: Future[Any] = Future()
        self._function: Callable[[], Any] | None = function

    def run(self) -> None:
        function, self._function = self._function, None
        if function is None or not self.future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def abandon(self, error: Exception) -> None:
        self.future.cancel()
        self.future.set_running_or_notify_cancel()
