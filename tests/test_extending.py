"""The pages of docs/extending: each page's own code, added exactly as the page says, is tested and used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "extending"


@dataclass(frozen=True)
class Page:
    """What a page of docs/extending tells its reader to do.

    Attributes:
        path: of the file to write, below the root of the repository.
        claimed: how many lines the page says it has.
        code: of that file.
        registry: the file that gets one more statement.
        line: that statement.
    """

    path: str
    claimed: int
    code: str
    registry: str
    line: str


def read_page(name: str) -> Page:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    ((path, claimed, code),) = re.findall(r"`([\w/]+\.py)`, (\d+) lines:\n\n```python\n(.*?)^```$", text, re.S | re.M)
    ((registry, line),) = re.findall(r"One line in `([\w/]+\.py)`:\n\n```python\n(.*?)^```$", text, re.S | re.M)
    return Page(path, int(claimed), code, registry, line)


PAGES = {
    name: read_page(name)
    for name in ("denoiser", "bound", "stopping-rule", "noise", "attack", "api-format", "classifier")
}
