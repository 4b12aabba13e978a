"""Several processes of one test, which form a group over gloo."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def run_ranks(work: Callable[..., None], folder: str | Path, *arguments: Any, seconds: float, count: int = 2) -> None:
    """Run `work(rank, folder, *arguments)` in each of the processes of a group; all are ended if they take too long."""
    # A server that has imported what every rank needs forks them: an import takes longer than most of what is tested.
    mp.set_forkserver_preload(["transformers.trainer", "hf_compact", "tests.conftest"])
    context = mp.start_processes(
        _in_group, (work, count, folder, *arguments), nprocs=count, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):  # true once all have ended; raises what one of them raised
            assert time.monotonic() < deadline, f"{count} processes did not finish within {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _in_group(rank: int, work: Callable[..., None], count: int, folder: str | Path, *arguments: Any) -> None:
    """They find each other by a file in the folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for by the Trainer, not used
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    work(rank, folder, *arguments)
    # A DistributedDataParallel that outlives its group ends the group's threads with the interpreter's lock in hand,
    # and a thread that still holds a tensor waits for that lock: forever. With all of them gone, torch gives it up.
    gc.collect()
    dist.destroy_process_group()
