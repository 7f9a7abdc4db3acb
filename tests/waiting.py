"""Finds what makes the host wait for the device, on the CPU too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.bincount",
    "aten.unique",
    "aten.equal",
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        assert name not in WAITING, f"{name} waits for the device"
        if name in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails on what needs a number from the device: .item(), a mask as an index, shapes that depend on data."""
    with _Watch():  # type: ignore[no-untyped-call]
        yield
