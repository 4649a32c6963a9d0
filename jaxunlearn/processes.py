"""Several processes that make one run, on one machine or on many: how they meet, agree and end.

All of them compute the same program on one mesh, each on its own devices. Process 0 leads: it alone uses the cache and
writes what is left, so no folder need be shared; the data set is read by each.
"""

import glob
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunlearn.errors import UserError, one_line

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is taken for dead

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # how many processes srun, mpirun has started

# In what JAX raises where another process is gone. It has no exception of its own for that.
LOST = re.compile(r"gloo|nccl|coordination service|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Meets the other processes of the run, if it has any, and moves file descriptor 1. Before the first use of JAX.

    Where the arguments are None, Slurm, Open MPI or a TPU pod say who the others are. Raises UserError where only some
    of the arguments are given, or the others are not there.
    """
    given = [argument is not None for argument in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id: give all three, or none")
    if not any(given) and not _launched():
        return
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"--process-id {index}: with --num-processes {count} it is from 0 to {count - 1}")
    if coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise UserError(
            f"--coordinator {coordinator}: write HOST:PORT, the same for all, a port of process 0's machine"
        )
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run do not find each other: {one_line(error)}") from error
    # Gloo, which carries the sums between CPUs, greets on stdout, where results are to be alone.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _launched() -> bool:
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return bool(tpu) or any(os.environ.get(name, "1") != "1" for name in LAUNCHERS)


def leads() -> bool:
    """Whether this process is the one that reads the cache, writes and speaks."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all must ask at the same point of the program. Takes milliseconds."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_leader(content: bytes) -> bytes:
    """The leader's `content`, in every process; all must ask at the same point of the program."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(content) if leads() else 0)))
    mine = np.frombuffer(content, np.uint8) if leads() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def check_agreement(what: str) -> None:
    """Raises UserError, in every process, where `what` is not the same text in all."""
    own = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    if jax.process_count() > 1 and (multihost_utils.process_allgather(own) != own).any():
        raise UserError("the processes of this run differ in data, arguments or rule files: give all of them the same")


@contextmanager
def watched() -> Iterator[None]:
    """Ends the process with status 1 and one line on stderr where it fails because another one is gone."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not LOST.search(str(error)):
            raise
        remedy = "start all of them again with the same command, which goes on from the last checkpoint"
        print(f"error: another process of this run has ended ({one_line(error)}): {remedy}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the regular way out waits for those that are gone
