"""The pool of worker threads that runs the slabs of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any


def run_all(jobs: Iterable[tuple[Any, ...]], threads: int) -> None:
    """Run jobs (function, *arguments), a bounded number in flight; the first error (or Ctrl-C) stops the rest."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lowbit")
    pending: set[Future[None]] = set()
    try:
        for function, *arguments in jobs:
            pending.add(pool.submit(function, *arguments))
            if len(pending) > 2 * threads:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
        for future in pending:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
