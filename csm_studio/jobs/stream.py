"""Chunks that one thread produces and another takes, with a limit to how far ahead they are."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from csm_studio.errors import JobError

T = TypeVar("T")


def ending() -> JobError:
    """Return the error of those who ask for, or wait for, work when the program ends."""
    return JobError("The program is ending, and takes up no more work.")


class Producer(Generic[T]):
    """The producing side: a task that pauses itself when it is too far ahead.

    Args:
        produce: Returns the iterator; called on the producing thread, as is the iterator.
        label: What the task is called.
        capacity: Chunks that may wait to be taken.
        requeue: Has the task run again, after a pause.
        is_ending: Whether the program ends, and with it the producing thread.
    """

    def __init__(
        self,
        produce: Callable[[], Iterator[T]],
        label: str,
        capacity: int,
        requeue: Callable[[Producer[T]], None],
        is_ending: Callable[[], bool],
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        self.label = label
        self._produce = produce
        self._capacity = capacity
        self._requeue = requeue
        self._is_ending = is_ending
        self._iterator: Iterator[T] | None = None
        self._changed = threading.Condition()
        self._chunks: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_paused = False
        self._is_closed = False
        self._has_ended = False

    def run(self) -> None:
        """Produce until the end, a pause or the wish to stop."""
        try:
            if self._iterator is None and not self._is_closed:
                self._iterator = self._produce()
            while self._has_room():
                assert self._iterator is not None
                chunk = next(self._iterator)
                with self._changed:
                    self._chunks.append(chunk)
                    self._changed.notify_all()
            if self._is_closed:
                self._end(None)
            elif self._is_ending():
                self._end(ending())
        except StopIteration:
            self._end(None)
        except BaseException as error:
            self._end(error)

    def abandon(self, error: Exception) -> None:
        """End without producing what is left."""
        self._end(error)

    def take(self, timeout_s: float | None) -> T:
        """Return the next chunk, once there is one.

        Raises:
            StopIteration: There is none left, or the stream was closed.
            TimeoutError: None came in time.
        """
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._chunks or self._has_ended or self._is_closed, timeout_s
            )
            if not came:
                raise TimeoutError(f"{self.label or 'stream'}: no chunk within {timeout_s} s")
            if self._is_closed:
                raise StopIteration
            if not self._chunks:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopIteration
            chunk = self._chunks.popleft()
        self._resume()
        return chunk

    def close(self) -> None:
        """Stop producing, at the latest after the chunk that is in the making."""
        with self._changed:
            self._is_closed = True
            self._chunks.clear()
            self._changed.notify_all()
        # A paused iterator is closed on the thread that it runs on.
        self._resume()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be produced."""
        return self._has_ended

    def _has_room(self) -> bool:
        """Tell whether to make another chunk; if there is no room, note the pause."""
        with self._changed:
            if self._is_closed or self._is_ending():
                return False
            self._is_paused = len(self._chunks) >= self._capacity
            return not self._is_paused

    def _resume(self) -> None:
        with self._changed:
            if not self._is_paused:
                return
            self._is_paused = False
        self._requeue(self)

    def _end(self, error: BaseException | None) -> None:
        close: Any = getattr(self._iterator, "close", None)
        self._iterator = None
        try:
            if close is not None:
                close()
        except BaseException as closing_error:
            error = error or closing_error
        with self._changed:
            if not self._has_ended:
                self._error = error
            self._has_ended = True
            self._changed.notify_all()


class Stream(Iterator[T]):
    """The taking side. One thread iterates; any thread may `close`.

    An exception of the producer is raised after the chunks made before it. Dropping the stream
    closes it.
    """

    def __init__(self, producer: Producer[T]) -> None:
        self._producer = producer

    def __next__(self) -> T:
        return self._producer.take(None)

    def take(self, timeout_s: float) -> T:
        """Return the next chunk, waiting at most so long.

        Raises:
            StopIteration: There is none left, or the stream was closed.
            TimeoutError: None came in time.
        """
        return self._producer.take(timeout_s)

    def close(self) -> None:
        """Stop the producer within one chunk and end the iteration. Does not wait for it."""
        self._producer.close()

    @property
    def has_ended(self) -> bool:
        """Whether the producer is done, closed or failed; chunks may still wait."""
        return self._producer.has_ended

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
