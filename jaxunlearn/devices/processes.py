"""Several processes that make one run, on one machine or on many: how they meet, agree and end.

All of them compute the same program on one mesh, each on its own devices, and ask the functions here at the same points
of it. Process 0 leads: it alone reads and writes checkpoints and records, so no folder need be shared.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunlearn.errors import UserError, one_line

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process is taken for dead


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What has started the processes of a run, in the words of this one's environment."""

    by: str  # such as "Slurm started on node[1-2]"
    count: int  # of processes
    index: int  # of this one
    on_node: int  # processes on this node
    index_on_node: int


def launcher(environment: Mapping[str, str]) -> Launcher | None:
    """What has started this process as one of several: Open MPI's mpirun, or srun; None otherwise.

    A batch script of Slurm, which runs once, has not been started so, whatever it asked for.
    """

    def number(name: str, otherwise: int = 0) -> int:
        return int(environment.get(name, otherwise))

    if (count := number("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        rank, local = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_LOCAL_RANK")
        return Launcher("Open MPI started", count, rank, number("OMPI_COMM_WORLD_LOCAL_SIZE", count), local)
    if (count := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # By node, such as 4(x2),3.
        tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", str(count)))
        by_node = [int(each) for each, nodes in tasks for _ in range(int(nodes or 1))]
        on_node = by_node[min(number("SLURM_NODEID"), len(by_node) - 1)]
        by = f"Slurm started on {environment.get('SLURM_STEP_NODELIST', 'this node')}"
        return Launcher(by, count, number("SLURM_PROCID"), on_node, number("SLURM_LOCALID"))
    return None


def own_gpus(environment: Mapping[str, str], devices: int) -> list[int] | None:
    """The numbers of the GPUs that this process computes on, among those that it sees; None: JAX is to decide.

    `devices` is how many NVIDIA devices the machine has, of which CUDA_VISIBLE_DEVICES may show only some. A process
    that is alone on its node takes all that it sees. Of several each takes its part, unless what it sees is its own:
    one GPU, or as many as Slurm was asked for a task. Left alone, JAX takes the one with the process's number on the
    node, whatever there is.

    Raises UserError where the GPUs cannot be divided among the processes.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:  # CUDA stops at the first name that is none
        devices = len(list(itertools.takewhile(re.compile(r"\s*(\d+|GPU-|MIG-)").match, shown.split(","))))
    if devices == 0 or {"JAX_LOCAL_DEVICE_IDS", "JAX_CUDA_VISIBLE_DEVICES"} & environment.keys():
        return None
    launched = launcher(environment)
    _, _, a_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")  # such as a100:2
    if launched is None or launched.on_node == 1 or devices == 1 or a_task == str(devices):
        return list(range(devices))
    share, rest = divmod(devices, launched.on_node)
    if rest:
        mistake = f"{launched.on_node} processes on this node cannot divide the {devices} GPUs that they see"
        raise UserError(f"{mistake}: start one process on a node, or {devices}")
    first = launched.index_on_node * share
    return list(range(first, first + share))


# What the libraries that carry arrays between processes call themselves in their errors, which are of no class of
# their own.
LOST = re.compile(r"Gloo|NCCL|coordination service")


def join(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Meets the other processes of the run. Returns whether it may have any. Must come before the first use of JAX.

    Where the arguments are None, Slurm, Open MPI or a TPU pod say who the others are. Raises UserError where only some
    of the arguments are given, or the others are not there within five minutes.
    """
    given = [argument is not None for argument in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id: give all three, or none")
    launched = launcher(os.environ)
    if not (any(given) or launched or _on_tpu()):
        return False
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"--process-id {index}: with --num-processes {count} it is from 0 to {count - 1}")
    if coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise UserError(f"--coordinator {coordinator}: write HOST:PORT, for all a port of process 0's machine")
    number = len(glob.glob("/dev/nvidia[0-9]*"))
    own = own_gpus(os.environ, number) if _on_nvidia() else None
    if coordinator is not None:
        _tell(f"of this run to meet at {coordinator}", count, index)
    elif launched:
        _tell(f"that {launched.by}", launched.count, launched.index)
    # JAX would put its own handler of SIGTERM in place of the one that saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=own,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if not (any(given) or launched):
            warnings.warn(f"this TPU host runs alone ({one_line(error)})", stacklevel=2)
            return False
        remedy = "name them with --coordinator, --num-processes and --process-id"
        raise UserError(f"the processes of this run do not find each other ({one_line(error)}): {remedy}") from error
    return True


def _tell(whom: str, count: int | None, index: int | None) -> None:
    print(f"waiting for all {count} processes {whom}; this is number {index}", file=sys.stderr, flush=True)


def _on_tpu() -> bool:
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(wanted and chips and importlib.util.find_spec("libtpu"))


def _on_nvidia() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS") or "cuda"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return ("cuda" in wanted or "gpu" in wanted) and any(map(importlib.util.find_spec, plugins))


def keep_stdout_for_results() -> None:
    """Sends to stderr what is no Python's: Gloo, which carries arrays between CPUs, greets on stdout."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def leads() -> bool:
    """Whether this process is the one that reads and writes checkpoints and records, and speaks."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process. With several it waits for what they compute, then takes 5 ms on CPUs."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def meet() -> None:
    """Waits until all processes are here."""
    anywhere(False)


def from_leader(content: bytes) -> bytes:
    """The leader's `content`, less than 2 GiB, in every process."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(content) if leads() else 0)))
    mine = np.frombuffer(content, np.uint8) if leads() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def check_agreement(what: str) -> None:
    """Raises UserError, in every process, where `what` or the number of devices is not the same in all."""
    differ = "the processes of this run differ in devices, data, arguments, rule files or versions: make them the same"
    if len({len(jax.local_devices(process)) for process in range(jax.process_count())}) > 1:
        raise UserError(differ)
    own = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.uint8)
    if jax.process_count() > 1 and (multihost_utils.process_allgather(own) != own).any():
        raise UserError(differ)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Raises UserError in every process where one is raised inside, where none may ask another, in any."""
    try:
        yield
    except UserError:
        anywhere(True)
        raise
    if anywhere(False):
        raise UserError("another process of this run says what is wrong")


@contextmanager
def watched() -> Iterator[None]:
    """Ends the process with status 1 and one line on stderr, after the traceback, where it has lost another one."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # of which kind Gloo's are depends on the operation
        if not LOST.search(str(error)) or jax.process_count() == 1:
            raise
        traceback.print_exc()
        remedy = "start all of them again with the same command, which goes on from the last checkpoint"
        print(f"error: another process of this run has ended or is out of reach: {remedy}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the regular way out waits for those that are gone
