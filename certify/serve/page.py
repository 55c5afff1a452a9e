"""The page at ``/``: one file without anything from elsewhere, and the headers that hold it to that."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

_TEXT = (resources.files("certify.serve") / "page.html").read_text(encoding="utf-8")


def _hashed(tag: str) -> str:
    """The source expression of a content security policy that allows this one inline element."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _TEXT, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hashed('script')}; style-src {_hashed('style')}; "
        "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
}


def page(model: str, about: Mapping[str, Any]) -> str:
    """The page of this model.

    Args:
        model: its name.
        about: settings that it shows.
    """
    data = json.dumps({"model": model, **about}).replace("<", "\\u003c")  # no name can end the element
    return _TEXT.replace("{{about}}", data)
