"""The bare limit: a process whose threads loop over decode, batch, run and top five, with nobody to answer.

Started by the benchmark as `python -m bench.limit MODEL IMAGES`. It reads orders from stdin, `limit SECONDS`,
`session SECONDS` or `decode SECONDS`, and answers each with a line of JSON; between them it sleeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from bench.pipeline import Pipeline, top_five
from service.adapters.onnx_session import cores

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

BATCHES: Final = (1, 4, 16)
_TRIED_S: Final = 0.7
_SWITCH_S: Final = 0.0001  # as the service: a thread that waits for the interpreter asks for it sooner


@dataclass(frozen=True)
class Pace:
    """How fast something went: images a second, and what each cost."""

    per_s: float
    cpu_us: float

    @property
    def used_cores(self) -> float:
        """How many cores it had: fewer than there are means that something else ran."""
        return self.per_s * self.cpu_us / 1e6


class Limit:
    """The process, seen from the benchmark. Close it, or use it in a `with`."""

    def __init__(self, model: Path, images: Path) -> None:
        """Start it, and wait until it has found its best batch."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.limit", str(model), str(images)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.batch = int(self._line())

    def measure(self, what: str, seconds: float) -> Pace:
        """Return how fast `limit`, `session` or `decode` goes."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {seconds}\n")
        self._process.stdin.flush()
        return Pace(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare loop ended with exit code {self._process.wait()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> int:
    """Obey until stdin ends."""
    model, folder = map(Path, sys.argv[1:])
    sys.setswitchinterval(_SWITCH_S)
    pipeline = Pipeline(model, threads=1)
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    works = {batch: _whole(pipeline, files, batch) for batch in BATCHES}
    batch = max(works, key=lambda batch: pace(works[batch], batch, _TRIED_S).per_s)
    noise = np.stack([pipeline.decode(data) for data in islice(cycle(files), batch)])
    orders = {
        "limit": (works[batch], batch),
        "session": (lambda: lambda: pipeline.run(noise), batch),
        "decode": (_decoding(pipeline, files), 1),
    }
    print(batch, flush=True)
    for line in sys.stdin:
        what, seconds = line.split()
        work, images = orders[what]
        print(json.dumps(asdict(pace(work, images, float(seconds)))), flush=True)
    return 0


def pace(work: Callable[[], Callable[[], object]], images: int, seconds: float) -> Pace:
    """Let one thread a core do steps of `images` images for so long. `work` gives each thread its step."""
    steps = [work() for _ in range(cores())]
    for step in steps:
        step()
    counts = [0] * len(steps)
    stop = threading.Event()

    def loop(place: int) -> None:
        while not stop.is_set():
            steps[place]()
            counts[place] += 1

    threads = [threading.Thread(target=loop, args=(place,)) for place in range(len(steps))]
    cpu, started = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()  # the last step of each is counted, and so is its time
    elapsed, spent = time.perf_counter() - started, time.process_time() - cpu
    done = sum(counts) * images
    return Pace(done / elapsed, spent / done * 1e6)


def _whole(pipeline: Pipeline, files: list[bytes], batch: int) -> Callable[[], Callable[[], object]]:
    def work() -> Callable[[], object]:
        turn = cycle(files)
        return lambda: top_five(pipeline.run([pipeline.decode(data) for data in islice(turn, batch)]))

    return work


def _decoding(pipeline: Pipeline, files: list[bytes]) -> Callable[[], Callable[[], object]]:
    def work() -> Callable[[], object]:
        turn = cycle(files)
        return lambda: pipeline.decode(next(turn))

    return work


if __name__ == "__main__":
    sys.exit(main())
