"""What the benchmark of serving measured, as Markdown: medians, shares of the bare limit, goals."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench.limit import Pace
from bench.load import Load
from bench.servers import OURS, PEERS, ROOT, Model
from service.adapters.onnx_session import cores

_QUIET: Final = 0.95  # of the cores for the bare limit
FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass
class Turn:
    """One server in one round, and the bare limit just before it."""

    limit: Pace
    start_s: float
    loads: dict[int, Load] = field(default_factory=dict)
    cpu_us: dict[int, float] = field(default_factory=dict)
    memory_mib: float = 0.0

    def add(self, connections: int, load: Load, cpu_s: float) -> None:
        """Keep what came of a load, and what it cost a request: the cores it had, by its answers a second.

        Not by the answers that came: a large batch that is not done yet has cost its time.
        """
        self.loads[connections] = load
        self.cpu_us[connections] = cpu_s / load.seconds / load.per_s * 1e6 if load.per_s else math.inf

    def __str__(self) -> str:
        """Return a line for who waits."""
        rates = ", ".join(f"{load.per_s:,.0f} at {number}" for number, load in self.loads.items())
        return f"{rates} (limit {self.limit.per_s:,.0f})"


@dataclass
class Measured:
    """All turns of all servers with one model; `batch` is that of the bare limit."""

    model: Model
    batch: int
    session: list[Pace] = field(default_factory=list)
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    @property
    def limit(self) -> Pace:
        """The bare limit: medians over all turns."""
        return _pace([turn.limit for turns in self.turns.values() for turn in turns])

    @property
    def quiet(self) -> bool:
        """Whether the bare limit got its cores; else something else ran, and the clock says nothing."""
        return self.limit.used_cores >= _QUIET * cores()

    def median(self, server: str, of: Callable[[Turn], float]) -> float:
        """Return the median over a server's turns."""
        return statistics.median(map(of, self.turns[server]))

    def per_s(self, server: str, connections: int) -> float:
        """Return good answers a second."""
        return self.median(server, lambda turn: turn.loads[connections].per_s)

    def share(self, server: str, connections: int) -> float:
        """Return the rate as a share of the limit's just before."""
        return self.median(server, lambda turn: turn.loads[connections].per_s / turn.limit.per_s)


def report(measured: Sequence[Measured]) -> str:
    """Return the tables of each model, and which goals were reached."""
    parts = [part for one in measured for part in (f"### {one.model.name}", rates(one), costs(one))]
    if not all(one.quiet for one in measured):
        parts.append(
            "**The machine was not quiet**: the bare limit did not get its cores;"
            " only CPU time and memory say anything."
        )
    lines = [line for one in measured for line in goals(one, measured)]
    if lines:
        parts += ["### Goals", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)


def machine(versions: Iterable[str], rounds: int, seconds: float) -> str:
    """Return when, with what and on what it was measured."""
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_commit()}; {_processor()}; Python"
        f" {platform.python_version()}; {', '.join(dict.fromkeys(versions))}; medians of {rounds} rounds,"
        f" {seconds:g} s a load; load average at the end {os.getloadavg()[1]:.1f}"
    )


def rates(one: Measured) -> str:
    """Return the table of good answers a second, with shares of the bare limit, and times to answer."""
    numbers = _connections(one)
    rows = [
        [
            _label(name),
            *(f"{one.per_s(name, n):,.0f} ({_share(one.share(name, n))})" for n in numbers),
            *(
                f"{one.median(name, lambda t, n=n: t.loads[n].p50_ms):.3g}"  # type: ignore[misc]
                f" / {one.median(name, lambda t, n=n: t.loads[n].p99_ms):.3g}"  # type: ignore[misc]
                for n in numbers
            ),
        ]
        for name in one.turns
    ]
    empty = [""] * (len(numbers) * 2 - 1)
    rows += [
        [
            f"bare limit (batches of {one.batch}, on {one.limit.used_cores:.2f} cores)",
            f"{one.limit.per_s:,.0f}",
            *empty,
        ],
        ["session.run alone", f"{_pace(one.session).per_s:,.0f}", *empty],
    ]
    heads = [f"answers/s at {n} (share of the limit)" for n in numbers]
    return table(["server", *heads, *(f"p50 / p99 ms at {n}" for n in numbers)], rows)


def costs(one: Measured) -> str:
    """Return the table of CPU time a request, memory, start and answers that were not good."""
    numbers = _connections(one)
    rows = []
    for name, turns in one.turns.items():
        cpu = [one.median(name, lambda t, n=n: t.cpu_us[n]) for n in numbers]  # type: ignore[misc]
        loads = [load for turn in turns for load in turn.loads.values()]
        rows.append(
            [
                _label(name),
                *(f"{spent:,.0f} ({_share(one.limit.cpu_us / spent)})" for spent in cpu),
                f"{max(turn.memory_mib for turn in turns):,.0f}",
                f"{one.median(name, lambda turn: turn.start_s):.2f}",
                f"{sum(load.refused for load in loads)} + {sum(load.broken for load in loads)}"
                f" of {sum(load.requests for load in loads):,}",
            ]
        )
    rows += [
        ["bare limit", f"{one.limit.cpu_us:,.0f}", *[""] * (len(numbers) + 2)],
        ["session.run alone", f"{_pace(one.session).cpu_us:,.0f}", *[""] * (len(numbers) + 2)],
    ]
    heads = [f"CPU-us a request at {n} (limit's share)" for n in numbers]
    return table(["server", *heads, "memory MiB", "start s", "not 2xx + broken"], rows)


def goals(one: Measured, measured: Sequence[Measured]) -> list[str]:
    """Return a line for each goal that this run can judge."""
    if OURS not in one.turns:
        return []
    numbers = _connections(one)
    least = {"small": {8: 0.72, 64: 0.92}, "large": {1: 0.95, 8: 0.95, 64: 0.98}, "int8": {64: 0.85}}
    lines = [
        _goal(one, f"at {n} connections at least {share:.2f} of the limit", got >= share, f"{got:.2f}")
        for n, share in least[one.model.kind].items()
        if n in numbers
        for got in [one.share(OURS, n)]
    ]
    if one.model.kind == "small":
        lines += _goals_of_small(one, numbers)
    fp32 = next((other for other in measured if other.model.kind == "small"), None)
    if one.model.kind == "int8" and fp32 is not None and 64 in numbers:
        ratio = one.per_s(OURS, 64) / fp32.limit.per_s
        lines.append(_goal(one, f"1.6 times the limit of {fp32.model.name}", ratio >= 1.6, f"{ratio:.2f}"))
    peers = [name for name in PEERS if name in one.turns and name != "naive"]
    if peers:
        own, least_mib = (
            min(max(turn.memory_mib for turn in one.turns[name]) for name in names)
            for names in ([OURS], peers)
        )
        lines.append(
            _goal(
                one,
                "less memory than every peer but the naive app",
                own < least_mib,
                f"{own:.0f} MiB, the leanest of them {least_mib:.0f}",
                by_clock=False,
            )
        )
    start = one.median(OURS, lambda turn: turn.start_s)
    lines.append(_goal(one, "first good answer in less than 2 s", start < 2, f"{start:.2f} s"))
    return lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _goals_of_small(one: Measured, numbers: Sequence[int]) -> list[str]:
    lines = []
    if 1 in numbers and "naive" in one.turns:
        own, naive = one.per_s(OURS, 1), one.per_s("naive", 1)
        lines.append(
            _goal(
                one,
                "at 1 connection more than the naive app",
                own > naive,
                f"{own:,.0f} against {naive:,.0f}",
            )
        )
    if 64 in numbers:
        ratio = one.median(OURS, lambda turn: turn.loads[64].p99_ms / turn.loads[64].p50_ms)
        lines.append(_goal(one, "p99 at 64 connections under twice p50", ratio < 2, f"{ratio:.2f} times"))
    return lines


def _goal(one: Measured, asked: str, reached: bool, got: str, *, by_clock: bool = True) -> str:
    """Return the verdict; there is none by the clock of a machine that did other things meanwhile."""
    verdict = "reached" if reached else "**not reached**"
    if by_clock and not one.quiet:
        verdict = "not judged, the machine was busy"
    return f"{one.model.name}, {asked}: {verdict} ({got})"


def _pace(paces: Sequence[Pace]) -> Pace:
    return Pace(
        statistics.median(pace.per_s for pace in paces), statistics.median(pace.cpu_us for pace in paces)
    )


def _connections(one: Measured) -> list[int]:
    return list(next(iter(one.turns.values()))[0].loads)


def _label(name: str) -> str:
    return "**ours**" if name == OURS else PEERS[name]


def _share(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    """Return the processor with the flags that decide how fast a network is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has = set(fields.get("flags", "").split())
    flags = ", ".join(flag for flag in FLAGS if flag in has) or "none"
    name = fields.get("model name", platform.machine())
    return f"{name}, {cores()} cores, flags: {flags} (of {', '.join(FLAGS)})"
