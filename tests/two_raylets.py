"""A Ray cluster on this machine: a head without processors and two raylets with one each, until stdin ends.

``python two_raylets.py`` prints the cluster's address as its first line. Each line of stdin is a command: ``remove``
kills the first raylet, ``add PATH`` starts one whose workers import from PATH; each is answered with ``done``.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "120000"}

from ray.cluster_utils import Cluster

STORE = 80 * 2**20

if __name__ == "__main__":
    small = {"include_dashboard": False, "object_store_memory": STORE}
    for left in (2, 1, 0):  # Ray gives a raylet 30 seconds, which a busy machine may miss
        cluster = Cluster(shutdown_at_exit=True)
        try:
            cluster.add_node(num_cpus=0, **small)
            nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
            break
        except Exception:
            cluster.shutdown()
            if not left:
                raise
    print(cluster.address, flush=True)
    for line in sys.stdin:
        what, _, path = line.strip().partition(" ")
        if what == "remove":
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        elif what == "add":
            nodes.append(cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path}, **small))
        print("done", flush=True)
    cluster.shutdown()
