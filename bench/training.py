"""Images per second of our training step beside the loop that most people write: `python -m bench.training`.

That loop: a DataLoader with workers, torchvision's transforms on PIL images, the network in eager float32.
Both train ResNet-32 on as many images of 32 x 32 as CIFAR-100-LT has; the pixels are noise, which costs the
same. The two take turns, so that what else the machine does falls on both; each figure is a median of rounds.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision import transforms

from training.augment import Augmentation
from training.batches import MemoryBatches
from training.loop import choose_device, fit, new_trainee
from training.losses import make_loss
from training.networks import make_network
from training.recipes import COSINE
from training.sharing import gpu_shared
from training.step import has_bf16

N_IMAGES, N_CLASSES, BATCH_SIZE = 9_752, 100, 128
WARM_UP_STEPS = 5  # more than a recording on a GPU is preceded by
_FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Round:
    """What one loop did in one turn."""

    images_per_s: float
    images_per_cpu_s: float  # by all its processes, warm-up included: steady beside other work


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a Markdown table and return 0."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    images, labels = _noise()
    ours, theirs = [], []
    own_steps = our_loop(images, labels, device)
    for place in range(1, options.rounds + 1):
        theirs.append(_turn(common_loop(images, labels, device), options.steps, device, last=True))
        ours.append(_turn(own_steps, options.steps, device, last=place == options.rounds))
        print(
            f"round {place}: ours {ours[-1].images_per_s:.0f} images/s, theirs {theirs[-1].images_per_s:.0f}",
            file=sys.stderr,
        )
    together = None if options.runs == 1 else _side_by_side(options.runs, options.steps, options.device)
    print(report(ours, theirs, device, n_runs=options.runs, together=together))
    return 0


def our_loop(images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device) -> Generator[object]:
    """Take the steps of `training.fit` with the recipe `cosine`: crops and flips, as the other loop has."""
    batches = MemoryBatches(
        torch.from_numpy(images).to(device),
        torch.from_numpy(labels).to(device),
        torch.full((3,), 0.5, device=device),
        torch.full((3,), 0.25, device=device),
        augmentation=Augmentation(),
    )
    trainee = new_trainee(make_network("resnet32", N_CLASSES), COSINE, device)
    loss = make_loss("cross-entropy", np.bincount(labels, minlength=N_CLASSES), None, device)
    yield from fit(trainee, batches, loss, COSINE, total_steps=10**9, seed=0)


def common_loop(
    images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device
) -> Generator[object]:
    """Take the steps of the loop that most people write, one after another."""
    loader = torch.utils.data.DataLoader(
        _PilImages(images, labels),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, _cores()),
        pin_memory=device.type == "cuda",
    )
    network = make_network("resnet32", N_CLASSES).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    while True:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(network(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            yield loss


class _PilImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR100: an array that becomes a PIL image, then the usual transforms."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._images, self._labels = images, labels
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[place])), int(self._labels[place])


def _turn(steps: Generator[object], n_steps: int, device: torch.device, *, last: bool) -> Round:
    """Take steps and time them; `last` ends the loop and its workers, so that their time is known."""
    cpu = _cpu_seconds()
    for _ in range(WARM_UP_STEPS):
        next(steps)
    _wait(device)
    began = time.perf_counter()
    for _ in range(n_steps):
        next(steps)
    _wait(device)
    seconds = time.perf_counter() - began
    if last:
        steps.close()
    spent = _cpu_seconds() - cpu
    return Round(n_steps * BATCH_SIZE / seconds, (n_steps + WARM_UP_STEPS) * BATCH_SIZE / spent)


def _side_by_side(n_runs: int, n_steps: int, device: str) -> float:
    """Return the images per second of so many runs of ours together, each in a process, on one device."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(n_runs), context.SimpleQueue()
    with gpu_shared():
        processes = [
            context.Process(target=_one_of_several, args=(start, results, n_steps, device))
            for _ in range(n_runs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("one of the runs side by side failed")
    speeds: list[float] = [results.get() for _ in processes]
    return sum(speeds)


def _one_of_several(start: Barrier, results: "SimpleQueue[float]", n_steps: int, device_name: str) -> None:
    device = choose_device(device_name)
    steps = our_loop(*_noise(), device)
    for _ in range(WARM_UP_STEPS):
        next(steps)
    _wait(device)
    start.wait(timeout=300)
    results.put(_turn(steps, n_steps, device, last=True).images_per_s)


def report(
    ours: Sequence[Round],
    theirs: Sequence[Round],
    device: torch.device,
    *,
    n_runs: int = 1,
    together: float | None = None,
) -> str:
    """Return what was measured as Markdown: the machine, a table, the ratio of medians."""
    own, common = _medians(ours), _medians(theirs)
    lines = [
        _machine(device),
        "",
        "| loop | images/s | images per CPU-second |",
        "|---|---|---|",
        f"| most people's: DataLoader with workers, PIL, eager float32 | {common.images_per_s:,.0f}"
        f" | {common.images_per_cpu_s:,.0f} |",
        f"| ours | {own.images_per_s:,.0f} | {own.images_per_cpu_s:,.0f} |",
        f"| ratio | **{own.images_per_s / common.images_per_s:.2f}**"
        f" | {own.images_per_cpu_s / common.images_per_cpu_s:.2f} |",
    ]
    if together is not None:
        lines.append(f"| ours, {n_runs} runs side by side, in all | {together:,.0f} | |")
    return "\n".join(lines)


def _medians(rounds: Sequence[Round]) -> Round:
    return Round(
        statistics.median(one.images_per_s for one in rounds),
        statistics.median(one.images_per_cpu_s for one in rounds),
    )


def _machine(device: torch.device) -> str:
    """Return in a line what it ran on, with the processor flags that decide how fast bfloat16 is."""
    has = torch.cpu.get_capabilities()
    flags = ", ".join(flag for flag in _FLAGS if has.get(flag)) or "none"
    bfloat16 = "on" if has_bf16(device) else "off"
    line = (
        f"{_processor()}, {_cores()} cores, {torch.get_num_threads()} threads, flags: {flags}"
        f" (of {', '.join(_FLAGS)}); torch {torch.__version__}, bfloat16 {bfloat16}"
    )
    return line if device.type == "cpu" else f"{torch.cuda.get_device_name(device)} beside {line}"


def _cores() -> int:
    """Return how many cores this process may use, which are fewer than the machine has where it is pinned."""
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _noise() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N_IMAGES, 32, 32, 3), dtype=np.uint8), np.arange(N_IMAGES) % N_CLASSES


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds() -> float:
    """Return what this process and its ended children have spent."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loop (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps timed in a turn (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice, OMP_NUM_THREADS)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=int, default=1, help="also time so many runs of ours side by side")
    return parser


if __name__ == "__main__":
    sys.exit(main())
