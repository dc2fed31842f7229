"""Worker processes for jobs of which one may fail, or its process die, without the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any

from nnunet_plugins.lean.cases.failures import one_line

Job = tuple[Callable[..., Any], tuple[Any, ...]]


class WorkerDiedError(RuntimeError):
    """A worker process ended in the middle of a job, twice."""


def end_with_parent() -> None:
    """End this process when the one that started it is killed; an idle worker would wait for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def sendable(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; an error that another process could not make anew, which breaks its pool, is told."""
    try:
        return function(*arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(one_line(error)) from None
        raise


class Workers:
    """Up to ``count`` processes; 0 runs every job in this one, when its result is wanted.

    A job whose process died runs once more in a process of its own.

    Args:
        count: Number of processes.
        work: What they do, for messages.

    Raises:
        ValueError: a negative count.
    """

    def __init__(self, count: int, work: str) -> None:
        if count < 0:
            raise ValueError(f"the number of processes for {work} must not be negative, got {count} (-npp, -nps).")
        self.count, self.work = count, work
        self.executor = self._new(count) if count else None

    @staticmethod
    def _new(count: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, job: Job) -> Future[Any] | None:
        """Start a job if there are processes."""
        if self.executor is None:
            return None
        try:
            return self.executor.submit(sendable, job[0], *job[1])
        except BrokenProcessPool:
            self.executor.shutdown(wait=False)
            self.executor = self._new(self.count)
            return self.executor.submit(sendable, job[0], *job[1])

    def result(self, job: Job, future: Future[Any] | None) -> Any:
        """The result of a job, or the exception it ended with."""
        try:
            return job[0](*job[1]) if future is None else future.result()
        except BrokenProcessPool:
            return self._again(job)
        except Exception as error:
            return error

    def _again(self, job: Job) -> Any:
        with self._new(1) as alone:
            try:
                return alone.submit(sendable, job[0], *job[1]).result()
            except BrokenProcessPool:
                return WorkerDiedError(
                    f"a worker process for {self.work} died twice: its error stands further up (a script that predicts "
                    'needs `if __name__ == "__main__":`); if there is none, the system ran out of memory: use fewer '
                    "workers (-npp, -nps)"
                )
            except Exception as error:
                return error

    def in_order(self, jobs: Iterator[Job]) -> Iterator[Any]:
        """Results, or exceptions, in the order of the jobs; at most one job more than processes is under way."""
        waiting: deque[tuple[Job, Future[Any] | None]] = deque()
        for job in jobs:
            waiting.append((job, self.submit(job)))
            if len(waiting) > self.count:
                yield self.result(*waiting.popleft())
        while waiting:
            yield self.result(*waiting.popleft())
