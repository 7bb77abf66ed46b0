"""Our service beside the bare limit and beside what others would use: `python -m bench.serving`.

In each round every server is started, warmed up, loaded at each number of connections, and stopped, so that
none idles beside another; before each the bare limit runs for a moment, so that both see the same machine.
bench/README.md says what is fair about it and how to read it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.limit import Limit
from bench.load import LoadError, check_wrk, post
from bench.models import RESNET32, ModelError, cache_folder, prepared, resnet50
from bench.pipeline import Pipeline
from bench.report import Measured, Turn, machine, report
from bench.servers import NAMES, Model, Server, ServerError, python_of, version

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS: Final = (1, 8, 64, 512)
MODELS: Final = ("resnet32", "resnet50")
_WARM_UP_S: Final = 1
_CHECKED: Final = 8  # images whose decision is compared with the bare loop's, each time a server has started


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and return 0; 2 where it cannot."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 1
    cache = cache_folder()
    try:
        check_wrk()
        folders = [resnet50(cache) if name == "resnet50" else RESNET32 for name in options.models]
        models = [prepared(folder, cache) for folder in (*folders, *options.bundle)]
        pythons = {name: python_of(name, cache, sys.stderr) for name in options.servers}
        measured = [
            measure(model, pythons, options.rounds, options.seconds, options.connections) for model in models
        ]
    except (LoadError, ModelError, ServerError) as failure:
        print(f"bench.serving: {failure}", file=sys.stderr)
        return 2
    used = [version(name, python) for name, python in pythons.items()]
    text = f"{machine(used, options.rounds, options.seconds)}\n\n{report(measured)}\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)
    return 0


def measure(
    model: Model, pythons: dict[str, Path], rounds: int, seconds: float, connections: list[int]
) -> Measured:
    """Let the servers take turns. Raises LoadError, or ServerError for one that fails or answers wrongly."""
    images = [path.read_bytes() for path in sorted(model.images.iterdir())]
    pipeline = Pipeline(model.network, threads=1)
    decoded = [pipeline.decode(data) for data in images[:_CHECKED]]
    expected = [int(np.argmax(pipeline.run([pixels])[0])) for pixels in decoded]
    with Limit(model.network, model.images) as limit:
        measured = Measured(model, limit.batch)
        for place in range(1, rounds + 1):
            measured.session.append(limit.measure("session", seconds))
            for name, python in pythons.items():
                pace = limit.measure("limit", seconds)
                folder = Path(tempfile.mkdtemp(prefix="tare-bench-"))
                server = Server(name, model, python, folder)
                try:
                    turn = Turn(pace, server.until_good(images[0]))
                    answered = [server.top_one(data) for data in images[:_CHECKED]]
                    if answered != expected:
                        raise ServerError(f"{name} decides {answered} where the bare loop decides {expected}")
                    _load(server, model, turn, seconds, connections)
                finally:
                    server.stop()
                    shutil.rmtree(folder, ignore_errors=True)
                measured.turns.setdefault(name, []).append(turn)
                _say(f"{model.name}, round {place}: {name} {turn}")
    return measured


def _load(server: Server, model: Model, turn: Turn, seconds: float, connections: list[int]) -> None:
    """Warm up, then load at each number of connections."""
    post(server.url, model.images, 8, _WARM_UP_S)
    for number in sorted(connections):
        server.rest()
        before = server.cpu_s()
        load = post(server.url, model.images, number, seconds)
        turn.add(number, load, server.cpu_s() - before)
        turn.memory_mib = max(turn.memory_mib, server.memory_mib())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9][0-9]{0,4}(,[1-9][0-9]{0,4})*", text):
        raise argparse.ArgumentTypeError(f"numbers separated by commas are expected, not '{text}'")
    return [int(word) for word in text.split(",")]


def _among(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what reads names separated by commas; `none` is none of them."""

    def names(text: str) -> list[str]:
        chosen = [] if text == "none" else text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return chosen

    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.serving", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="turns of each server (default %(default)s)")
    add("--seconds", type=float, default=4, help="of each load, whole ones (default %(default)s)")
    add("--connections", type=_numbers, default=list(CONNECTIONS), metavar="N,N", help="default 1,8,64,512")
    add("--servers", type=_among(NAMES), default=list(NAMES), metavar="A,B", help=f"of {', '.join(NAMES)}")
    add(
        "--models",
        type=_among(MODELS),
        default=list(MODELS),
        metavar="A,B",
        help="resnet32, resnet50 or none",
    )
    add(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="also another bundle of images",
    )
    add("--quick", action="store_true", help="one round of one second: only to see that it runs")
    add("--out", type=Path, metavar="FILE", help="write the tables to a file, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
