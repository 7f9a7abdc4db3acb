"""torchrun: one process per device, and the few collective operations the program needs.

Values of the training step are reduced on the device; everything else (signals, ids, evaluation counts) goes through a
gloo group on the host, which never makes a GPU wait.
"""

import atexit
import contextlib
import datetime
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

import errors
import ranks
from errors import UsageError, UserError

T = TypeVar("T")
MARGIN = 600.0  # seconds
WAIT_SECONDS = 1.0
WAIT_FOR_STATUS = 3.0  # seconds for which a rank waits to hear why another one has gone

_host_group: Any = None
_quiet = False


def init(device_flag: str, patience: float = 1800.0) -> torch.device:
    """Join torchrun's process group, if there is one, and return this process's device.

    Ranks wait `patience` seconds for the network, and MARGIN seconds longer for each other, so that a rank whose data
    does not arrive reports that first. Raises UsageError for a device that this machine does not have, and where the
    environment of a launcher is set by half.
    """
    global _host_group
    ranks.require_whole()
    device = pick_device(device_flag)
    if ranks.told_world() > 1:
        timeout = datetime.timedelta(seconds=patience + MARGIN)
        store = _join("nccl" if device.type == "cuda" else "gloo", timeout)
        errors.peers = Peers(store)
        _host_group = dist.new_group(backend="gloo", timeout=timeout)
        atexit.register(_leave)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Peers:
    """What the ranks tell each other when one of them fails, through the store in which they met."""

    def __init__(self, store: dist.Store) -> None:
        self._store = dist.PrefixStore("failed", store)

    def is_first(self, status: int) -> bool:
        """Note that this rank ends with this exit status. Whether it is the first to do so, as far as is known."""
        try:
            if self._store.add("ranks", 1) > 1:
                return False
            self._store.set("status", str(status))
        except RuntimeError:  # the rank that kept the store has ended
            return True
        return True

    def status_of(self, error: Exception) -> int | None:
        """The exit status of the rank that ended before, if the error says that one has gone; told if nobody did."""
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            return None
        with contextlib.suppress(RuntimeError):
            self._store.wait(["status"], datetime.timedelta(seconds=WAIT_FOR_STATUS))
            return int(self._store.get("status"))
        if self.is_first(UserError.status):
            errors.complain("error: another rank has ended; what it said, or the kernel's log, tells why")
        return UserError.status


def _join(backend: str, timeout: datetime.timedelta) -> dist.Store:
    """Form the process group, with a prefix that hides what earlier attempts left in the store (pytorch #135712).

    On several nodes each counts its own restarts, so torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt and ranks.local_world() == world:
        store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return store  # type: ignore[no-any-return]


def pick_device(flag: str) -> torch.device:
    """The device that --device names. Raises UsageError for one that this machine does not have."""
    if flag == "auto":
        flag = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if flag == "cuda" and "LOCAL_RANK" in os.environ:
        flag = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=flag).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {flag} cannot be used here ({str(error).splitlines()[0]}); leave it out, or give cpu"
        ) from error


def _leave() -> None:
    """Leave the process groups. Dropping the last reference to the host's group ends its threads: a thread that freed
    a Python tensor during interpreter shutdown would abort the process.
    """
    global _host_group
    _host_group = errors.peers = None
    dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def be_quiet(quiet: bool) -> None:
    """Whether `print0` leaves out from now on what is neither a warning nor said `always`."""
    global _quiet
    _quiet = quiet


def print0(*values: Any, sep: str = " ", always: bool = False) -> None:
    """Print on rank 0 only, and flush."""
    if rank() == 0 and (always or not _quiet or any("WARNING" in str(value) for value in values)):
        print(*values, sep=sep, flush=True)


@contextlib.contextmanager
def announced(text: str) -> Iterator[None]:
    """A context around what may take long: rank 0 tells of it if it takes more than a moment."""
    timer = threading.Timer(WAIT_SECONDS, lambda: print0(f"wait      {text}"))
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _group_of(tensor: torch.Tensor) -> Any:
    """The host's group for a CPU tensor, else the default group, which DDP keeps until the process ends."""
    return _host_group if tensor.is_cpu else None


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a float tensor over all ranks; on one rank, the tensor itself."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, group=_group_of(values))
        values /= world_size()
    return values


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """The sum of a host array over all ranks, exact for integers."""
    if world_size() > 1:
        tensor = torch.from_numpy(values.copy())
        dist.all_reduce(tensor, group=_host_group)
        return tensor.numpy()
    return values


def gather_columns(values: np.ndarray) -> np.ndarray:
    """Arrays of shape (k, n) on each rank -> (k, ranks x n) in rank order, on every rank."""
    if world_size() > 1:
        parts = [torch.empty_like(torch.from_numpy(values)) for _ in range(world_size())]
        dist.all_gather(parts, torch.from_numpy(values), group=_host_group)
        return torch.cat(parts, dim=1).numpy()
    return values


def largest_over_ranks(value: int) -> int:
    """The maximum of an integer over all ranks: how ranks agree that one of them was told to stop."""
    if world_size() > 1:
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group)
        return int(tensor)
    return value


def copy_from_rank0(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite these tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=_group_of(tensor))


def from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only, and return its result, or raise its UserError, on every rank."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=_host_group)
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def require_agreement(facts: Mapping[str, Any], error: type[UserError] = UsageError) -> None:
    """Raise `error`, naming the fact, on all ranks when one of the `facts` differs between ranks."""
    if world_size() == 1:
        return
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, dict(facts), group=_host_group)
    for name in facts:
        other = next((rank for rank in range(len(told)) if told[rank][name] != told[0][name]), None)
        if other is not None:
            raise error(
                f"the ranks differ in {name}: {_short(told[0][name])} on rank 0, {_short(told[other][name])} on rank "
                f"{other}; start all of them with the same flags, files and packages"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
