"""Many jobs in several processes, each of which stays with jobs that share what is costly to make."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

import torch

J = TypeVar("J")
A = TypeVar("A")


def shared(work: Callable[..., A], jobs: Sequence[tuple], workers: int) -> Iterator[A]:
    """What comes of jobs, the arguments of `work`, in the order in which they are done.

    Raises:
        ValueError: A process that was killed.
    """
    for _, answer in answers([[job] for job in jobs], workers, partial(_called_with, work)):
        yield answer


def answers(
    groups: Sequence[Sequence[J]], workers: int, make: Callable[[], Callable[[J], A]]
) -> Iterator[tuple[J, A]]:
    """Each job with its answer, as they are done; the first that fails ends all.

    A process takes one group after another, and job by job what is left of the longest one once all have begun.

    Args:
        groups: Jobs that share what their function keeps from one to the next.
        workers: Processes, of one thread each; with 1 all runs in this one.
        make: Of the function that answers, one in each process.

    Raises:
        ValueError: A process that was killed.
    """
    count = sum(map(len, groups))
    if workers == 1 or count < 2:
        answer = make()
        for group in groups:
            for job in group:
                yield job, answer(job)
        return
    workers = min(workers, count)
    waiting, own = deque(map(deque, groups)), [deque() for _ in range(workers)]
    running: dict[Future[A], tuple[int, J]] = {}
    # a fork would inherit threads that it cannot use
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, _begin, (make,)) for _ in range(workers)]

    def go_on(k: int) -> None:
        while waiting and not own[k]:
            own[k] = waiting.popleft()
        own[k] = own[k] or max(own, key=len)
        if own[k]:
            job = own[k].popleft()
            running[pools[k].submit(_answered, job)] = k, job

    try:
        for k in range(workers):
            go_on(k)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                k, job = running.pop(future)
                answer = future.result()
                go_on(k)
                yield job, answer
    except BrokenProcessPool as error:
        raise ValueError(
            "a process was killed, perhaps for memory; try fewer workers, or smaller batches"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _called_with(work: Callable[..., A]) -> Callable[[tuple], A]:
    return lambda job: work(*job)


_answer: Callable[[Any], Any]  # of a process


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _answer = make()


def _end_with_parent() -> None:
    # one that was killed says no goodbye, and its jobs would go on for nobody
    multiprocessing.parent_process().join()
    os._exit(1)


def _answered(job: Any) -> Any:
    return _answer(job)
