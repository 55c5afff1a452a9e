"""Which image goes to which worker, and what becomes of those whose worker died: pure bookkeeping, without Ray.

Images are handed out as workers have room for them, since their cost is not known before. A worker holds as many as
fill its batches, and fewer towards the end, so that none waits beside an idle worker. When a worker dies, whatever it
held is suspected: each such image runs again alone, so that a further death can be blamed on it. One that its worker
does not survive ``TRIES`` times alone is set aside.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

TRIES = 3
"""Deaths of a worker that held this image alone, until the image is set aside."""


class Handing:
    """The images that are owed, and who has them.

    Args:
        places: the images, by their places.
        depth: images that a worker holds at once, at most.
    """

    def __init__(self, places: Iterable[int], depth: int) -> None:
        self.waiting = deque(places)
        self.suspects: deque[int] = deque()
        self.held: dict[Any, set[int]] = {}
        self._depth = depth
        self._alone: set[int] = set()
        self._deaths: Counter[int] = Counter()

    @property
    def left(self) -> int:
        """Images without an answer."""
        return len(self.waiting) + len(self.suspects) + sum(map(len, self.held.values()))

    def take(self, worker: Any, workers: int) -> list[int]:
        """Further images for this worker, one of ``workers``: maybe none."""
        mine = self.held.setdefault(worker, set())
        if mine & self._alone:
            return []
        if self.suspects and not mine:
            taken = [self.suspects.popleft()]
            self._alone.update(taken)
        else:
            room = min(self._depth, max(1, len(self.waiting) // (2 * workers))) - len(mine)
            taken = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        mine.update(taken)
        return taken

    def done(self, worker: Any, place: int) -> bool:
        """Take note of an answer; False where this worker does not hold the image."""
        mine = self.held.get(worker, set())
        if place not in mine:
            return False
        mine.remove(place)
        self._alone.discard(place)
        return True

    def lost(self, worker: Any) -> list[int]:
        """A worker died: its images go to others. Returns those that are set aside instead."""
        aside = []
        for place in sorted(self.held.pop(worker, set())):
            if place in self._alone:
                self._alone.remove(place)
                self._deaths[place] += 1
            if self._deaths[place] >= TRIES:
                aside.append(place)
            else:
                self.suspects.append(place)
        return aside
