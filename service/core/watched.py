"""An engine that remembers how its runs went, so that readiness rests on work done and not on what exists."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from service.core.ports import DeviceLostError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from service.core.ports import Engine, EngineOutput

# A run that takes longer than this, or than some times the longest of late, is taken for stuck.
PATIENCE_S: Final = 1.5
_TIMES_AS_LONG: Final = 4
_MEMORY: Final = 0.95  # of the longest run, so that one odd run is forgotten


@dataclass(frozen=True)
class Failure:
    """Why the last run failed, and with how many images: no smaller run proves that it is over."""

    reason: str
    images: int


class WatchedEngine:
    """The engine itself to whoever runs it; whoever asks learns whether it runs, fails, or is stuck."""

    def __init__(
        self,
        engine: Engine,
        *,
        usual_s: float = 0.0,
        lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engine` has just run well, its largest batch in `usual_s`.

        `lost` hears, on the thread that ran, that the device is gone for this process.
        """
        self._engine = engine
        self._lost = lost
        self._clock = clock
        self._lock = threading.Lock()
        self._longest_s = usual_s
        self._good_at = clock()
        self._failure: Failure | None = None
        self._running: dict[int, float] = {}  # by thread, since when

    @property
    def provider(self) -> str:
        """What truly runs it."""
        return self._engine.provider

    @property
    def failure(self) -> Failure | None:
        """What failed last, until a run of as many images has gone well."""
        return self._failure

    @property
    def good_age_s(self) -> float:
        """Seconds since a run went well."""
        return self._clock() - self._good_at

    @property
    def patience_s(self) -> float:
        """Seconds after which a run is taken for stuck."""
        return max(PATIENCE_S, _TIMES_AS_LONG * self._longest_s)

    @property
    def stuck(self) -> bool:
        """Whether some run has outlasted all patience."""
        with self._lock:
            since = min(self._running.values(), default=None)
        return since is not None and self._clock() - since > self.patience_s

    def run(
        self,
        pixels: NDArray[Any],
        offsets: NDArray[np.float64],
        rows: NDArray[np.int64],
        top_k: int,
        *,
        factors: NDArray[np.float64] | None = None,
        alone: bool = False,
    ) -> EngineOutput:
        """Answer a batch: see service.core.ports.Engine."""
        started, thread = self._clock(), threading.get_ident()
        with self._lock:
            self._running[thread] = started
        try:
            answer = self._engine.run(pixels, offsets, rows, top_k, factors=factors, alone=alone)
        except EngineError as failure:
            self._failure = Failure(str(failure), len(pixels))
            if isinstance(failure, DeviceLostError) and self._lost is not None:
                self._lost(str(failure))
            raise
        finally:
            with self._lock:
                del self._running[thread]
        self._good_at = self._clock()
        self._longest_s = max(self._good_at - started, _MEMORY * self._longest_s)
        failed = self._failure
        if failed is not None and len(pixels) >= failed.images:
            self._failure = None
        return answer
