"""The documentation site builds without a warning and loads nothing from elsewhere; the house's papers agree."""

from __future__ import annotations

import functools
import http.server
import inspect
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from browser import browser

import certify

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_navigation(page: str) -> None:
    assert re.search(
        rf"^ +- (?:.*: )?{re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_the_reference_names_everything_public_once() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert [name for name in certify.__all__ if f"certify.{name}" not in entries] == ["__version__"]
    assert len(set(entries)) == len(entries)


PUBLIC = set(certify.__all__) - {"__version__", "ABSTAIN", "BaseClassifier", "CertifyError", "UserError"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_docstrings_explain_arguments_and_errors(name: str) -> None:
    thing = getattr(certify, name)
    text = inspect.getdoc(thing) or ""
    for argument in inspect.signature(thing).parameters.values():
        stars = "**" if argument.kind is argument.VAR_KEYWORD else ""
        assert f"\n    {stars}{argument.name}: " in text, argument.name
    assert "Raises:" in text or inspect.isclass(thing)


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert certify.__version__ == project["version"]


def test_the_papers_name_verbs_that_make_has() -> None:
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for paper in ("CONTRIBUTING.md", "README.md", ".github/pull_request_template.md"):
        named = set(re.findall(r"\bmake ([a-z]+) *(?:`|#)", (ROOT / paper).read_text(encoding="utf-8")))
        assert named, paper
        assert named <= verbs, paper


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning would be an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_pages_read_as_meant(site: Path) -> None:
    """Links that lead out of docs/ are names here, file names are titles, roles of docstrings are gone."""
    audit = (site / "audit.html").read_text(encoding="utf-8")
    assert "<code>examples/litserve_digits.py</code>" in audit
    assert '<a href="few-samples.html">Certify with fewer samples</a>' in audit
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(?:func|meth|class|data):", text), page
        assert "../examples/" not in text, page
        assert "](" not in re.sub(r"<(code|script)\b.*?</\1>", "", text, flags=re.DOTALL), page


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.browser
def test_search_works_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        with browser() as page:
            page.open(f"{home}index.html?q=abstention")
            end = time.monotonic() + 60
            while not (found := page.evaluate("document.querySelectorAll('.md-search-result__item').length")):
                assert time.monotonic() < end, "nothing is found"
                time.sleep(0.2)
            assert found > 3
            assert [url for url in page.requests if not url.startswith(home)] == []
            assert page.complaints == []
            for name in ("purifier-study.html", "reference/certifying.html"):
                for width in (390, 1400):
                    page.view(width, dark=width == 1400)
                    page.open(home + name)
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
    finally:
        server.shutdown()
        server.server_close()
