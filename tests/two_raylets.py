"""A Ray cluster on this machine: a head without processors and two raylets with one each, until stdin ends.

``python two_raylets.py`` prints the cluster's address and the port of its client server as its first line. Each line of
stdin is a command: ``remove`` kills the first raylet, ``add PATH`` starts one whose workers import from PATH; each is
answered with ``done``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster

AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def small(*more: str) -> dict[str, object]:
    """A raylet's options. Its agents get their ports here: it dies when they are too slow to choose them themselves."""
    found: dict[str, object] = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    with contextlib.ExitStack() as stack:
        for name in (*AGENTS, *more):
            found[name] = stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
    return found


if __name__ == "__main__":
    for left in (2, 1, 0):  # Ray gives a raylet 30 seconds, which a busy machine may miss
        cluster = Cluster(shutdown_at_exit=True)
        try:
            head = small("ray_client_server_port")
            cluster.add_node(num_cpus=0, **head)
            nodes = [cluster.add_node(num_cpus=1, **small()) for _ in range(2)]
            break
        except Exception:
            cluster.shutdown()
            if not left:
                raise
    print(cluster.address, head["ray_client_server_port"], flush=True)
    for line in sys.stdin:
        what, _, path = line.strip().partition(" ")
        if what == "remove":
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        elif what == "add":
            nodes.append(cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path}, **small()))
        print("done", flush=True)
    cluster.shutdown()
