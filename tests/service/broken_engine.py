"""A service whose engine can be made to hang or fail from outside, for tests with real processes.

What stands in the file ENGINE_FAULT happens in every run from then on: `hang`, `slow` (0.2 s a run), or the
message of a failure of the provider, which is taken for CUDA. An empty or missing file is health.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime

from service import __main__
from service.adapters.onnx_engine import OnnxEngine

_FAULT = Path(os.environ["ENGINE_FAULT"])
_real = onnxruntime.InferenceSession.run


def run(session: Any, *arguments: Any) -> Any:
    fault = _FAULT.read_text() if _FAULT.exists() else ""
    if fault == "hang":
        while _FAULT.read_text() == "hang":
            time.sleep(0.01)
    elif fault == "slow":
        time.sleep(0.2)
    elif fault:
        raise RuntimeError(fault)
    return _real(session, *arguments)


def on_a_gpu(engine: OnnxEngine, *arguments: Any, **options: Any) -> Any:
    engine._provider = "cuda"
    return _run(engine, *arguments, **options)


_run = OnnxEngine.run
OnnxEngine.run = on_a_gpu  # type: ignore[method-assign]
onnxruntime.InferenceSession.run = run

if __name__ == "__main__":
    sys.exit(__main__.main())
