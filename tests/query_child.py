"""Query a service from processes that are killed at random moments; after enough kills one finishes.

``python query_child.py URL LEDGER USED BUDGET KILLS SEED``. The processes are forked, so that each costs milliseconds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from fault_server import RAW, queries

from certify.blackbox.client.http import HttpSender
from certify.blackbox.client.query_client import QueryClient
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import ledger_header

LIMITS = QueryLimits(concurrency=4, first_wait=0.002, longest_wait=0.01)
FURTHER = 16  # queries that are new to a process


def ask(url: str, path: Path, used: Path, budget: int, count: int) -> None:
    """Send the first ``count`` queries and note the answers that are yielded."""
    with (
        HttpSender(url, timeout=20) as send,
        Ledger(path, ledger_header("http://service", RAW)) as ledger,
        used.open("ab", buffering=0) as notes,
    ):
        client = QueryClient(send, RAW, ledger, budget=budget, limits=LIMITS)
        for answer in client(itertools.islice(queries(count), count)):
            label = answer.ranked[0].label if answer.ranked else answer.failure
            notes.write(f"{answer.name}\t{label}\n".encode())


def end(child: int, deadline: float) -> int:
    """Wait for a process, kill it at the deadline, and return its status."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(url: str, path: Path, used: Path, budget: int, kills: int, seed: int) -> None:
    """Kill processes, and check that the ledger keeps every line."""
    draw, done, count, before, progress = random.Random(seed), 0, FURTHER, b"", 0
    lasts = 0.0  # seconds until a kill at most: a little more than the last undisturbed process needed
    while True:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                ask(url, path, used, budget, count)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = end(child, start + draw.uniform(0, lasts) if lasts and done < kills else math.inf)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        now = path.read_bytes() if path.exists() else b""
        assert now.startswith(before), "the ledger lost lines"
        before = now[: now.rfind(b"\n") + 1]
        if os.WIFSIGNALED(status):
            done += 1
        elif done == kills:
            break
        else:
            lasts = 1.3 * (time.monotonic() - start)
        if done < kills:  # the next one has as much to do; lost answers are final
            first = now.count(b'"attempt": 1, "pixels"')
            count = max(count, first + FURTHER)
            lasts *= 1.1 if first == progress else 1.0  # a busy machine needs longer for any query at all
            progress = first
    print(json.dumps({"kills": done, "asked": count}))


if __name__ == "__main__":
    url, path, used, *numbers = sys.argv[1:]
    main(url, Path(path), Path(used), *map(int, numbers))
