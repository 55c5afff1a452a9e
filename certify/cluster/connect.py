"""To a Ray cluster, or one of this machine's own; which devices it has, and one slot for a worker on each.

Ray's usage statistics and its dashboard stay off. A cluster of this machine's own is guarded by a token that is drawn
for it and never reaches a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certify.errors import RunFault, UserError, first_line
from certify.models.resolve import reachable

CONNECT_SECONDS = 60.0
"""How long a cluster may take to answer."""

_MOST_LOCAL = 8  # workers on the processor of this machine, unless told
_STORE_BYTES = 2**29  # of images under way, on this machine


@dataclass(frozen=True)
class Address:
    """Where the workers are: ``local`` (this machine), ``auto`` (the cluster this machine is in) or ``ray://HOST:PORT``.

    Attributes:
        where: as above.
        workers: on this machine; None leaves it open.
    """

    where: str
    workers: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """What ``--cluster`` takes.

        Raises:
            UserError: anything else.
        """
        kind, _, rest = text.partition(":")
        if text in ("local", "auto"):
            return cls(text)
        if kind == "local" and rest.isdecimal() and int(rest):
            return cls("local", int(rest))
        host, _, port = text.removeprefix("ray://").rpartition(":")
        if text.startswith("ray://") and host and port.isdecimal() and 0 < int(port) < 2**16:
            return cls(text)
        raise UserError(
            f"--cluster {text!r}: expected local, local:K (K workers on this machine), auto (the Ray cluster this "
            "machine is in) or ray://HOST:PORT"
        )


@dataclass(frozen=True)
class Slot:
    """Room for one worker.

    Attributes:
        node: Ray's name of the machine; None: any.
        cpus: of Ray's resources.
        gpus: of Ray's resources; below 1 where workers share a device.
        threads: of the processor for torch; None leaves it to torch.
    """

    node: str | None
    cpus: int
    gpus: float
    threads: int | None

    def options(self) -> dict[str, Any]:
        """For the actor: never restarted by Ray, since its images must be asked for again."""
        found: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0, "max_task_retries": 0}
        if self.node is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            found["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.node, soft=True)
        return found


def require_ray(address: Address) -> None:
    """Refuse before anything is loaded what cannot work.

    Raises:
        UserError: Ray is not installed.
        RunFault: the address does not answer.
    """
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise UserError("--cluster needs ray, which is not installed; pip install 'certify-toolkit[cluster]'")
    if address.where.startswith("ray://"):
        if find_spec("grpc") is None:
            raise UserError(
                "--cluster ray:// needs grpcio, which is not installed; pip install 'certify-toolkit[cluster]'"
            )
        if not reachable(address.where):
            raise RunFault(f"--cluster {address.where} does not answer; is the cluster up, and its client server on?")


@contextlib.contextmanager
def connected(address: Address, *, device: str, gpus: int, threads: int, most: int) -> Iterator[list[Slot]]:
    """A connection to the cluster, and the slots for workers on it; it ends with the block.

    Args:
        address: of the cluster.
        device: ``auto``, ``cpu`` or ``cuda``: what the workers are to use.
        gpus: of this machine, for a cluster of its own.
        threads: of torch on this machine, to be shared between the workers of its own cluster.
        most: workers that there is work for.

    Raises:
        RunFault: the cluster does not answer.
        UserError: it has no device of the wanted kind.
    """
    own = address.where == "local"
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    if own and "RAY_AUTH_MODE" not in os.environ:  # read when Ray is imported: a token in the environment alone
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if own:
            gpus = 0 if device == "cpu" else gpus
            count = min(address.workers or gpus or min(threads, _MOST_LOCAL), most)
            _start(count, gpus, common)
            slots = local_slots(count, gpus, threads)
        else:
            _bounded(address.where, common)
            slots = cluster_slots([node for node in ray.nodes() if node["Alive"]], device)
        if device == "cuda" and not any(slot.gpus for slot in slots):
            raise UserError(f"--device cuda: the cluster {address.where} has no GPU; expected auto or cpu")
        if not slots:
            raise UserError(f"the cluster {address.where} has no processor to work on; start a node with --num-cpus")
        with contextlib.redirect_stdout(sys.stderr):  # where Ray reports workers that died: stdout is the result's
            yield slots[:most]
    finally:
        ray.shutdown()


def _start(count: int, gpus: int, common: Mapping[str, Any]) -> None:
    """A cluster on this machine. Ray gives its own processes 30 seconds, which a busy machine may miss."""
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=count,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                **common,
            )
        except Exception as error:  # Ray's own kinds, down to bare Exception
            ray.shutdown()
            if not left:
                raise RunFault(f"Ray does not start on this machine: {first_line(error)}; nothing was done") from error
        else:
            return


def _bounded(where: str, common: Mapping[str, Any]) -> None:
    """Connect, or say within bounds that it cannot be done: Ray itself may wait for minutes."""
    import ray

    outcome: list[BaseException | None] = []

    def connect() -> None:
        try:
            ray.init(address=where, **common)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, name="certify-connect", daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not outcome:
        raise RunFault(f"--cluster {where} did not answer within {CONNECT_SECONDS:.0f} s; is it a Ray cluster?")
    if isinstance(outcome[0], ConnectionError) and where == "auto":
        raise RunFault("--cluster auto: this machine is in no running Ray cluster; expected local, or ray://HOST:PORT")
    if outcome[0] is not None:
        raise RunFault(f"--cluster {where}: {first_line(outcome[0])}") from outcome[0]


def local_slots(count: int, gpus: int, threads: int) -> list[Slot]:
    """Workers on this machine: its devices and cores shared between them."""
    share = 1 / -(-count // gpus) if gpus else 0.0
    return [Slot(None, 1, share, max(1, threads // count))] * count


def cluster_slots(nodes: Sequence[Mapping[str, Any]], device: str) -> list[Slot]:
    """One worker a GPU; where there is none, or none is wanted, one a machine with all its cores."""
    found = [(str(node["NodeID"]), node["Resources"]) for node in nodes]
    slots = [Slot(name, 0, 1.0, None) for name, has in found for _ in range(int(has.get("GPU", 0)))]
    if slots and device != "cpu":
        return slots
    cores = [(name, int(has.get("CPU", 0))) for name, has in found]
    return [Slot(name, count, 0.0, count) for name, count in cores if count]
