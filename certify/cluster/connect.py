"""Connect to a Ray cluster, or start one on this machine; list its devices, one slot for a worker on each.

Ray's usage statistics and its dashboard stay off. A cluster on this machine is guarded by a token that is drawn for it
and never reaches a file.
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
"""Time limit of one attempt to connect to a cluster."""

_ATTEMPTS = 3  # to start a cluster here, or to connect as a client: Ray gives its own processes 30 s, busy or not
_MOST_LOCAL = 8  # workers on the processor of this machine, unless the user says how many
_STORE_BYTES = 2**29  # of images in flight, on this machine


@dataclass(frozen=True)
class Address:
    """The address of the workers.

    Attributes:
        where: ``local`` (this machine), ``auto`` (the cluster this machine belongs to) or ``ray://HOST:PORT``.
        workers: their number on this machine; None chooses.
    """

    where: str
    workers: int | None = None

    @classmethod
    def usable(cls, text: str, device: Any) -> Address:
        """Parse the value of ``--cluster``; refuse what cannot work before anything is loaded.

        Raises:
            UserError: anything else, a device that Ray cannot assign, or Ray is not installed.
            RunFault: the address does not answer.
        """
        address = cls.parse(text)
        if str(device) not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {device} with --cluster: Ray assigns the devices; expected auto, cpu or cuda")
        require_ray(address)
        return address

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse the value of ``--cluster``.

        Raises:
            UserError: anything else.
        """
        text = text if isinstance(text, str) else repr(text)
        if "@" in text:  # and no part of it is displayed
            raise UserError(
                "--cluster: the address holds a user name or password, which Ray does not take; expected ray://HOST:PORT"
            )
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
        cpus: processors, as Ray counts them.
        gpus: GPUs, as Ray counts them; below 1 where workers share a device.
        threads: of the processor for torch; None leaves it to torch.
    """

    node: str | None
    cpus: int
    gpus: float
    threads: int | None

    def options(self) -> dict[str, Any]:
        """Return the options of the actor: Ray restarts it, and its calls wait meanwhile."""
        restarts = {"max_restarts": -1, "max_task_retries": -1}
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, **restarts}
        if self.node is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.node, soft=True)
        return options


def require_ray(address: Address) -> None:
    """Refuse what cannot work, before anything is loaded.

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
    """Connect to the cluster for the duration of the block, and yield the slots for workers on it.

    Args:
        address: of the cluster.
        device: ``auto``, ``cpu`` or ``cuda``: the workers' device.
        gpus: of this machine, for a cluster on it.
        threads: of torch on this machine, to be shared between the workers of a cluster on it.
        most: largest number of workers that there is work for.

    Raises:
        RunFault: the cluster does not answer.
        UserError: it has no device of the wanted kind.
    """
    own = address.where == "local"
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    # Read when Ray is imported: a token in the environment alone. A script that has imported Ray itself goes without.
    if own and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        raise UserError("this process is connected to a Ray cluster already: call ray.shutdown() first")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if own:
            gpus = 0 if device == "cpu" else gpus
            count = min(address.workers or gpus or min(threads, _MOST_LOCAL), most)
            _start(count, gpus, common)
            slots = local_slots(count, gpus, threads)
        else:
            _connect(address.where, common)
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
    """Start a cluster on this machine."""
    import ray

    for attempt in range(1, _ATTEMPTS + 1):
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
            if attempt == _ATTEMPTS:
                raise RunFault(f"Ray does not start on this machine: {first_line(error)}; nothing was done") from error
        else:
            return


def _connect(where: str, common: Mapping[str, Any]) -> None:
    """Connect to a running cluster; once more where it answers but could not start its side of the connection."""
    import ray

    for attempt in range(1, _ATTEMPTS + 1):
        error = _connect_once(where, common)
        if error is None:
            return
        if isinstance(error, ConnectionAbortedError) and attempt < _ATTEMPTS:
            ray.shutdown()
            continue
        if isinstance(error, ConnectionError) and where == "auto":
            raise RunFault(
                "--cluster auto: this machine is in no running Ray cluster; expected local, or ray://HOST:PORT"
            )
        raise RunFault(f"--cluster {where}: {_reason(error)}") from error


def _connect_once(where: str, common: Mapping[str, Any]) -> BaseException | None:
    """Try to connect, in a thread, since Ray itself may wait for minutes; return the error, or None."""
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
    return outcome[0]


def _reason(error: BaseException) -> str:
    """Return an error of Ray's as one line: its first line may only announce the second."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2])[:200] if lines and lines[0].endswith(":") else first_line(error)


def local_slots(count: int, gpus: int, threads: int) -> list[Slot]:
    """Return slots on this machine, which share its devices and cores."""
    share = 1 / -(-count // gpus) if gpus else 0.0
    return [Slot(None, 1, share, max(1, threads // count))] * count


def cluster_slots(nodes: Sequence[Mapping[str, Any]], device: str) -> list[Slot]:
    """Return one slot per GPU; without GPUs, or for ``cpu``, one per machine with all its cores."""
    found = [(str(node["NodeID"]), node["Resources"]) for node in nodes]
    slots = [Slot(name, 0, 1.0, None) for name, has in found for _ in range(int(has.get("GPU", 0)))]
    if slots and device != "cpu":
        return slots
    cores = [(name, int(has.get("CPU", 0))) for name, has in found]
    return [Slot(name, count, 0.0, count) for name, count in cores if count]
