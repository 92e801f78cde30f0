"""Many jobs in several processes, each of which stays with jobs that share what is costly to make."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

J = TypeVar("J")
A = TypeVar("A")


def answers(
    groups: Sequence[Sequence[J]], workers: int, make: Callable[[], Callable[[J], A]]
) -> Iterator[tuple[J, A]]:
    """Each job with its answer, as they are done.

    A process takes one group after another, and job by job what is left of the longest one once all have begun.

    Args:
        groups: Jobs that share what their function keeps from one to the next.
        workers: Processes, of one thread each; with 1 all runs in this one.
        make: Of the function that answers, one in each process.
    """
    if workers == 1 or sum(map(len, groups)) < 2:
        answer = make()
        for group in groups:
            for job in group:
                yield job, answer(job)
        return
    waiting, own = deque(map(deque, groups)), [deque() for _ in range(workers)]
    running: dict[Future[A], tuple[int, J]] = {}
    # a fork would inherit threads that it cannot use
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, _begin, (make,)) for _ in range(workers)]

    def go_on(k: int) -> None:
        if not own[k]:
            own[k] = waiting.popleft() if waiting else max(own, key=len)
        if own[k]:
            job = own[k].popleft()
            running[pools[k].submit(_answered, job)] = k, job

    try:
        for k in range(workers):
            go_on(k)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                k, job = running.pop(future)
                go_on(k)
                yield job, future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


_answer: Callable[[Any], Any]  # of a process


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _answer
    torch.set_num_threads(1)
    _answer = make()


def _answered(job: Any) -> Any:
    return _answer(job)
