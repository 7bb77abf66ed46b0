"""Trains what a table or figure lacks: one run after the other or several side by side, within a time limit.

A process that is out of time stops as on SIGTERM: its run's checkpoint is on disk, and the same command goes
on from there.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from training.exceptions import TrainingError
from training.loop import choose_device
from training.paper.runs import RunStore, Target
from training.progress import Progress
from training.run import Stopped
from training.sharing import gpu_shared

_SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Job:
    """A run to be trained, and what to call it to a person."""

    name: str
    target: Target


@dataclass(frozen=True)
class Ended:
    """How a job ended: finished, or why not."""

    job: Job
    finished: bool
    reason: str = ""  # a sentence where it failed; empty where time ran out


def train_all(
    jobs: Sequence[Job], runs: Path, *, device: str, at_once: int, deadline: float | None
) -> list[Ended]:
    """Train the jobs, `at_once` side by side, until `deadline` (of time.monotonic); return how each ended.

    A job that fails, such as by a loss that is not finite, is told of and leaves the others alone. Ctrl-C
    stops all of them in good order.
    """
    # A second stage stands on a run that may be among the jobs: it waits for all first stages.
    ended: list[Ended] = []
    for second in (False, True):
        of_stage = [job for job in jobs if (job.target.classifier is not None) == second]
        ended += _train_side_by_side(of_stage, runs, device=device, at_once=at_once, deadline=deadline)
    return ended


def _train_side_by_side(
    jobs: Sequence[Job], runs: Path, *, device: str, at_once: int, deadline: float | None
) -> list[Ended]:
    if at_once == 1 or len(jobs) <= 1:
        return [_run(job, runs, device, deadline) for job in jobs]
    context = multiprocessing.get_context("spawn")
    at_once = min(at_once, len(jobs))
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    with gpu_shared(), ProcessPoolExecutor(at_once, context, _begin, (threads,)) as pool:
        futures = [pool.submit(_run, job, runs, device, deadline) for job in jobs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            raise


class _OneLineAMinute(Progress):
    """Says how a run goes in a line a minute under its own name, since several may run side by side."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._said_at = time.monotonic()

    def epoch(self, row: dict[str, float]) -> None:
        """Say what the last epoch came to, if the last line is a minute old."""
        if time.monotonic() - self._said_at < _SAY_EVERY_S:
            return
        self._said_at = time.monotonic()
        left = (self._total_steps - row["step"]) * row["seconds"] / row["step"]
        self.say(
            f"{self._name}: epoch {row['epoch']:.4g}, loss {row['loss']:.3f},"
            f" {row['images_per_s']:.0f} images/s, about {left / 60:.0f} min left"
        )


def _begin(threads: int) -> None:
    """Prepare a worker process: its share of the cores, and an end when the command ends however it does."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    command = multiprocessing.parent_process()

    def end_with_command() -> None:
        if command is not None:
            command.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_command, daemon=True).start()


def _run(job: Job, runs: Path, device: str, deadline: float | None) -> Ended:
    store = RunStore(runs)
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds <= 0:
        return Ended(job, finished=False)
    progress = _OneLineAMinute(job.name)
    began = time.monotonic()
    try:
        with _time_limit(seconds):
            result = store.train(job.target, device=choose_device(device), progress=progress)
    except _OutOfTime:
        return Ended(job, finished=False)
    except TrainingError as failure:
        progress.say(f"{job.name}: {failure}")
        return Ended(job, finished=False, reason=str(failure))
    if isinstance(result, Stopped):
        if deadline is None or time.monotonic() < deadline:  # by a person
            raise KeyboardInterrupt
        progress.say(f"{job.name}: out of time after step {result.step}")
        return Ended(job, finished=False)
    progress.say(f"{job.name}: trained in {time.monotonic() - began:.0f} s")
    return Ended(job, finished=True)


class _OutOfTime(BaseException):
    """The time limit passed while nothing was being trained, so that there was nothing to save."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Send this process SIGTERM when the time is over: training notes it and saves, all else is given up."""
    if seconds is None:
        yield
        return

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGTERM, give_up)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
