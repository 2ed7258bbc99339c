"""Processes that train one network together: each computes the gradient of its own batch, and all take the step of their mean.

Owned by models/train; called by the training loop. Two processes of one thread get more done on two cores than one process of two
threads, most of all on short rows. Every process holds the whole network and its optimisers and comes to the same weights.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn


def start(processes: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(*args)`` in as many processes, or in this one if it is one. Raises what a process raised."""
    if processes == 1:
        work(*args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (processes, str(Path(folder) / "meeting"), os.getpid(), work, args), nprocs=processes)


def _leave_with(parent: int) -> None:
    """End this process when its parent has ended, however that was: nothing else tells it, and it would train on and overwrite checkpoints."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _join(rank: int, processes: int, meeting: str, parent: int, work: Callable[..., None], args: tuple) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        work(*args)
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 is the one that logs and saves, and the only one of a run in one process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(net: nn.Module) -> None:
    """Replace every gradient by the mean over the processes; they must all have the same ones."""
    if count() == 1:
        return
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    distributed.all_reduce(flat)
    flat /= count()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


def share(value: int) -> float:
    """``value`` over its mean in all processes: times this, the means of each process's own ``value`` things average to the mean of all."""
    if count() == 1:
        return 1.0
    held = torch.tensor([value], dtype=torch.float64)
    distributed.all_reduce(held)
    return count() * value / held.item()


def most(value: int) -> int:
    """The largest ``value`` of all processes."""
    if count() == 1:
        return value
    held = torch.tensor([value])
    distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return int(held.item())


def agreed(value: float) -> float:
    """``value`` of process 0, in all of them."""
    if count() == 1:
        return value
    held = torch.tensor([value], dtype=torch.float64)
    distributed.broadcast(held, 0)
    return held.item()


def gathered(value: Any) -> list[Any]:
    """``value`` of every process, in order, in all of them."""
    found = [value] * count()
    if count() > 1:
        distributed.all_gather_object(found, value)
    return found
