"""Several processes that train one network, as torchrun starts them: who leads, what is averaged, who died.

Each rank takes its share of every batch and gradients are averaged, so that a step is that of the whole batch
but for batch normalisation, which sees each share by itself. Its running statistics are the leader's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from training.batches import Share
from training.exceptions import RunError, first_line

T = TypeVar("T")

_PATIENCE = timedelta(
    minutes=10
)  # in which a rank must have answered: the slowest part is reading the images


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that train together we are; rank 0 leads: it alone logs and writes."""

    rank: int = 0
    size: int = 1
    place: int = 0  # among those on this machine: which GPU
    store: Store | None = None  # outlives the processes

    @property
    def leads(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """The part of each batch that is ours."""
        return Share(self.rank, self.size)

    def joint(self, network: nn.Module) -> nn.Module:
        """Return the network with the leader's weights, and gradients that are the mean over all ranks."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Return, on all ranks alike, whether the flag is up on one of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32)  # on the CPU: nobody waits for a GPU
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def from_leader(self, make: Callable[[], T]) -> T:
        """Return, on every rank, what the leader makes."""
        if self.size == 1:
            return make()
        made = [make() if self.leads else None]
        dist.broadcast_object_list(made, src=0)
        return cast(T, made[0])

    def first_to_fail(self) -> bool:
        """Say whether no other rank has asked this: a run that fails says so once."""
        return self.store is None or self.store.add("failures", 1) == 1


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started beside this one, if it did, until the block ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store)
    finally:
        dist.destroy_process_group()


@contextmanager
def lost_ranks_reported() -> Iterator[None]:
    """Raise RunError where the connection to another rank breaks inside the block."""
    try:
        yield
    except RuntimeError as failure:
        # Gloo raises a bare RuntimeError that only its text tells apart.
        if not isinstance(failure, dist.DistError) and "gloo" not in str(failure):
            raise
        raise RunError(
            "another process of this run is gone; start all of them again with --resume to go on from the"
            f" checkpoint ({first_line(failure)})"
        ) from failure
