"""Our service on a GPU beside ONNX Runtime alone: `python -m bench.gpu`. Without a GPU it says so.

What limits it there is the slower of two: the network alone (CUDA, buffers bound, the best batch size), or
decoding on all cores. Both are measured, for ResNet-32 and ResNet-50, the network also in float16.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnxruntime

from bench.limit import Limit
from bench.load import LoadError, check_wrk, post
from bench.models import RESNET32, ModelError, cache_folder, prepared, resnet50
from bench.report import machine, table
from bench.servers import OURS, Model, Server, ServerError, version
from service.adapters.onnx_session import FAILURES, is_built_in, missing_libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
CONNECTIONS: Final = (1, 64, 256)
GOAL: Final = 0.85
_WARM_UP: Final = 3
_HEADS: Final = ("model", "what", "images/s", "share of the limit", "p50 / p99 ms", "not 2xx + broken")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, and return 0, also where there is no GPU; 2 where it fails."""
    options = _parser().parse_args(arguments)
    reason = why_no_gpu()
    if reason is not None:
        print(f"bench.gpu: no GPU to measure on: {reason}", file=sys.stderr)
        print(table(_HEADS, []))
        return 0
    cache = cache_folder()
    try:
        check_wrk()
        models = [prepared(folder, cache) for folder in (RESNET32, resnet50(cache), *options.bundle)]
        rows = [row for model in models for row in measure(model, cache, options.seconds)]
    except (LoadError, ModelError, ServerError) as failure:
        print(f"bench.gpu: {failure}", file=sys.stderr)
        return 2
    print(machine([version(OURS, Path(sys.executable))], 1, options.seconds))
    print(f"\n{table(_HEADS, rows)}")
    return 0


def why_no_gpu() -> str | None:
    """Return why CUDA is not to be had here; None where it is."""
    if not is_built_in("cuda"):
        return "this onnxruntime is built without CUDA (install with: make RUNTIME=gpu)"
    return "; ".join(missing_libraries()) or None


def measure(model: Model, cache: Path, seconds: float) -> list[list[str]]:
    """Return the rows of one model: the network alone, decoding alone, the service."""
    rows = []
    best = {}
    for precision, network in (("fp32", model.network), ("fp16", _half(model.network, cache))):
        paces = {batch: _alone(network, batch, seconds) for batch in BATCHES}
        best[precision] = max(paces.values())
        rows += [
            [model.name, f"network alone, {precision}, batch {batch}", f"{pace:,.0f}", "", "", ""]
            for batch, pace in paces.items()
        ]
    with Limit(model.network, model.images) as bare:
        decode = bare.measure("decode", seconds).per_s
    rows.append([model.name, "decoding alone, all cores", f"{decode:,.0f}", "", "", ""])
    limit = min(best["fp32"], decode)
    folder = Path(tempfile.mkdtemp(prefix="tare-bench-"))
    server = Server(OURS, model, Path(sys.executable), folder, TARE_PROVIDER="cuda")
    try:
        server.until_good(next(iter(sorted(model.images.iterdir()))).read_bytes())
        for number in CONNECTIONS:
            load = post(server.url, model.images, number, seconds)
            share = load.per_s / limit
            reached = "" if number < 64 else ", reached" if share >= GOAL else ", **not reached**"
            rows.append(
                [
                    model.name,
                    f"**ours** at {number} connections",
                    f"{load.per_s:,.0f}",
                    f"{share:.2f}{reached}",
                    f"{load.p50_ms:.3g} / {load.p99_ms:.3g}",
                    f"{load.refused} + {load.broken} of {load.requests:,}",
                ]
            )
            server.rest()
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _half(network: Path, cache: Path) -> Path:
    """Return the network in float16, made on first use; pixels come in and logits go out as before."""
    path = cache / "networks" / f"{network.stem}-fp16.onnx"
    if not path.exists():
        from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415  (slow to import)

        onnx.save(convert_float_to_float16(onnx.load(network), keep_io_types=True), path)
    return path


def _alone(network: Path, batch: int, seconds: float) -> float:
    """Return the images a second of the network on the GPU: pixels copied in, logits out, buffers bound."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"})]
    try:
        session = onnxruntime.InferenceSession(str(network), options, providers=providers)
        (entry,), (exit_,) = session.get_inputs(), session.get_outputs()
        pixels = np.random.default_rng(0).integers(0, 256, (batch, *entry.shape[1:]), dtype=np.uint8)
        run = _bound(session, entry.name, exit_.name, pixels)
        for _ in range(_WARM_UP):
            run()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            run()
            done += batch
        return done / (time.perf_counter() - started)
    except FAILURES as failure:
        raise ModelError(f"{network} does not run on CUDA: {failure}") from failure


def _bound(session: Any, entry: str, exit_: str, pixels: NDArray[np.uint8]) -> Any:
    """Return a call that copies the pixels to the GPU, runs, and copies the logits back."""
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(pixels, "cuda", 0)
    binding.bind_ortvalue_input(entry, value)
    binding.bind_output(exit_, "cuda")

    def run() -> None:
        value.update_inplace(pixels)
        session.run_with_iobinding(binding)
        binding.copy_outputs_to_cpu()

    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement (default %(default)s)")
    parser.add_argument("--bundle", type=Path, action="append", default=[], metavar="FOLDER", help="one more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
