"""The processes that share one compression under `torchrun` (docs/scaling.md).

Every rank runs the same program and calls the same operations of `Ranks` in the same order, so that
no two of them ever wait for each other. One process alone is a single rank, for which each of these
operations is the work itself.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from cerwu_gpu.errors import CerwuError, ConfigError, RankError, reason

T = TypeVar("T")

SHARDS = 8
"""Number of shards of the calibration batches, whatever the number of ranks: sums are those of the
shards, added in their order, so that the files do not depend on the number of ranks."""
MESSAGE_BYTES = 1 << 30
"""Most bytes of one message."""
PATIENCE = timedelta(days=7)
"""Time to wait for a rank that works; one that has ended closes its connections at once."""
REACH = timedelta(minutes=5)
"""Time within which the store answers, which has begun before the ranks."""
LOOK = 0.05
"""Seconds between two looks at who has started."""


def shard_of(batch: int, batches: int) -> int:
    """Return the shard of calibration batch number `batch`; shards hold neighbouring batches."""
    return batch * SHARDS // batches


class Ranks:
    """The ranks of a run.

    Attributes:
        index: number of this rank.
        count: number of all.
        device: of this rank's work; None: the GPU where there is one, else the CPU.
        local: whether the same `torchrun` has started rank 0, so that both see the same files.
        sent, received: bytes of tensors and objects that this rank has sent to and received from
            others, a broadcast once for each receiver.
        shared_error: an error that all ranks raise, of which rank 0 tells.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        device: str | torch.device | None = None,
        *,
        local: bool = True,
    ) -> None:
        """Take this rank's number; without a number there is one rank."""
        self.index = index
        self.count = count
        self.device = device
        self.local = local
        self.sent = 0
        self.received = 0
        self.shared_error: CerwuError | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes, journals and shows progress."""
        return self.index == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.count == 1

    def of_shard(self, shard: int) -> int:
        """Return the rank that runs the batches of a shard; rank 0 has the first ones."""
        return shard * self.count // SHARDS

    def everywhere(self, device: torch.device) -> torch.device:
        """Return the device that all ranks may be given: of several ranks with a GPU each, cuda."""
        return device if self.alone else torch.device(device.type)

    # Tensors.

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give a contiguous tensor of rank `source` to all, in place.

        Raises:
            RankError: another rank has ended.
        """
        if self.alone:
            return
        for piece in _pieces(tensor):
            with _connected():
                dist.broadcast(piece, source)
            if self.index == source:
                self.sent += len(piece) * (self.count - 1)
            else:
                self.received += len(piece)

    def send(self, tensor: Tensor, target: int) -> None:
        """Send a contiguous tensor to another rank.

        Raises:
            RankError: another rank has ended.
        """
        for piece in _pieces(tensor):
            with _connected():
                dist.send(piece, target)
            self.sent += len(piece)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor with the one that another rank sends.

        Raises:
            RankError: another rank has ended.
        """
        for piece in _pieces(tensor):
            with _connected():
                dist.recv(piece, source)
            self.received += len(piece)

    # Objects.

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of the work, and return the results of all ranks.

        Raises:
            CerwuError: that of the first rank that raised one, on all of them.
            RankError: another rank has ended.
        """
        outcome = _outcome(work)
        outcomes = [self._object(outcome, source) for source in range(self.count)]
        return [self._result(one) for one in outcomes]

    def agree(self, work: Callable[[], T]) -> T:
        """Do the work, and return its result where all ranks have one.

        Raises:
            CerwuError: that of the first rank that raised one, on all of them.
            RankError: another rank has ended.
        """
        result, error = _outcome(work)
        for source in range(self.count):
            self._result(self._object((None, error), source))
        return result  # type: ignore[return-value]  # without an error there is one

    def from_first(self, work: Callable[[], T]) -> T:
        """Return on every rank the result of the work of rank 0; the others do not do it.

        Raises:
            CerwuError: that of rank 0, on all of them.
            RankError: another rank has ended.
        """
        result: T = self._result(self._object(_outcome(work) if self.first else None, 0))
        return result

    def to_first(self, value: T) -> list[T]:
        """Return on rank 0 the values of all ranks, elsewhere nothing.

        Raises:
            RankError: another rank has ended.
        """
        if self.first:
            return [value, *(self._received_object(source) for source in range(1, self.count))]
        content = _bytes(value)
        self.send(torch.tensor([len(content)]), 0)
        self.send(content, 0)
        return []

    def _received_object(self, source: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        self.receive(size, source)
        content = torch.empty(int(size), dtype=torch.uint8)
        self.receive(content, source)
        return pickle.loads(content.numpy().tobytes())

    def _object(self, value: Any, source: int) -> Any:
        """Return the value of rank `source`."""
        if self.alone:
            return value
        here = self.index == source
        content = _bytes(value) if here else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self.broadcast(size, source)
        if not here:
            content = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content, source)
        return value if here else pickle.loads(content.numpy().tobytes())

    def _result(self, outcome: Any) -> Any:
        """Return a result of `_outcome`, or raise its error."""
        result, error = outcome
        if error is not None:
            self.shared_error = error
            raise error
        return result


def _outcome(work: Callable[[], T]) -> tuple[T | None, CerwuError | None]:
    """Return (the result of the work, None), or (None, its error)."""
    try:
        return work(), None
    except RankError:
        raise
    except CerwuError as error:
        return None, error


def _bytes(value: Any) -> Tensor:
    """Return a value as bytes, uint8."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return views uint8 of a contiguous tensor's bytes, of MESSAGE_BYTES at most."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    return torch.split(flat, MESSAGE_BYTES) if len(flat) else ()


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a lost connection into one sentence.

    Raises:
        RankError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        # Of a closed connection gloo says no more than where in its code it noticed.
        why = "" if "onnection" in str(error) else f" ({reason(error)})"
        raise RankError(
            f"another rank of this run has ended{why}: see its message; the same command continues "
            "after what is finished."
        ) from error


def launched() -> bool:
    """Return whether `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Join the other processes that `torchrun` has started: NCCL between GPUs, gloo between CPUs.

    Args:
        device: as the user gave it.

    Yields:
        The ranks, as `compress` takes them.

    Raises:
        ConfigError: the ranks of this machine would share one GPU.
        RankError: the others cannot be reached.
    """
    if not launched():
        yield Ranks(device=device)
        return
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if count == 1:
        yield Ranks(device=device)
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if device not in (None, "cuda") or local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {index} has no GPU of its own (device {device}, "
                f"{torch.cuda.device_count()} GPUs): give --device cuda or cpu, and start as many "
                "processes as there are GPUs."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    try:
        store = _store_of_all()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, store=store, rank=index, world_size=count, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the other ranks cannot be reached ({reason(error)}).") from error
    try:
        # Rank 0 is one of the first machine's.
        yield Ranks(index, count, device, local=os.environ["GROUP_RANK"] == "0")
    finally:
        dist.destroy_process_group()  # after an error, so that the others do not wait


def _store_of_all() -> Any:
    """Return the store of the run when all ranks have started.

    torch's own wait for a rank that has died before notices no signal, so that it would be killed
    without a sentence.
    """
    store, index, count = next(rendezvous("env://", timeout=REACH))
    store.set_timeout(PATIENCE)  # by which NCCL's first calls wait
    store.set(f"started/{index}", "")
    while not store.check([f"started/{rank}" for rank in range(count)]):
        time.sleep(LOOK)
    prefixed: Any = dist.PrefixStore  # type: ignore[attr-defined]
    return prefixed("default_pg", store)


def greedy_owners(costs: dict[str, float], count: int) -> dict[str, int]:
    """Return the rank that owns each item: the costliest first, each for the rank with the least
    cost so far, of several the first."""
    loads, owners = [0.0] * count, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners
