"""What the documentation site changes in its pages, so that they read well as plain files and as a site."""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """Links to files outside ``docs/`` keep their text alone; links whose text is a page's file name get its title."""
    folder, docs = Path(page.file.abs_src_path).parent, Path(config.docs_dir).resolve()
    titles = {docs / file: title for title, file in _entries(config.nav)}

    def shown(link: re.Match[str]) -> str:
        text, path, anchor = link.groups()
        target = (folder / path).resolve()
        if target.is_file() and not target.is_relative_to(docs):
            return text if text.startswith("`") else f"`{text}`"
        return f"[{titles.get(target, text)}]({path}{anchor})" if text.endswith(".md") else link[0]

    return _LINK.sub(shown, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Docstrings name other objects as :func:`name`; here that is plain code."""
    return _ROLE.sub("", html)


def _entries(nav: Any) -> list[tuple[str, str]]:
    """Title and file of every page that ``nav`` gives a title."""
    if isinstance(nav, list):
        return [entry for part in nav for entry in _entries(part)]
    if not isinstance(nav, dict):
        return []
    pairs = nav.items()
    return [e for title, part in pairs for e in ([(title, part)] if isinstance(part, str) else _entries(part))]
