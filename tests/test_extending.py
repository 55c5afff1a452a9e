"""The pages of docs/extending: each page's own code, added exactly as the page says, is tested and used."""

from __future__ import annotations

import base64
import importlib
import inspect
import itertools
import json
import math
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_attacks
import test_bounds
import test_denoisers
import test_formats
import test_noise
import test_sequential
import torch
from command import run
from flint import arb, ctx
from vision_stubs import noisy_digits, serving

from analysis.comparison.attacked import attack
from certify import SmoothedClassifier, load_classifier
from certify.blackbox.encoding import to_pictures, to_tensor
from certify.blackbox.protocols import FORMATS
from certify.blackbox.types import BadReply, Busy, Reply
from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.registry import PLUGINS, Registry
from certify.smoothing.bounds import clopper_pearson_lower
from denoisers import load_denoiser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "extending"
NAMES = ("denoiser", "bound", "stopping-rule", "noise", "attack", "api-format", "classifier")
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


@dataclass(frozen=True)
class Page:
    """The steps of a page of docs/extending.

    Attributes:
        path: of the file to write, below the root of the repository.
        claimed: how many lines the page says it has.
        code: of that file.
        registry: the file that gets one more statement.
        line: that statement.
        commands: each with the output that the page shows.
        scripts: further Python that the page shows.
    """

    path: str
    claimed: int
    code: str
    registry: str
    line: str
    commands: list[tuple[str, str]]
    scripts: list[str]


def read_page(name: str) -> Page:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    ((path, claimed, code),) = re.findall(r"`([\w/]+\.py)`, (\d+) lines:\n\n```python\n(.*?)^```$", text, re.S | re.M)
    ((registry, line),) = re.findall(r"One line in `([\w/]+\.py)`:\n\n```python\n(.*?)^```$", text, re.S | re.M)
    commands = re.findall(r"^```bash\n(certify .*?)^```\n+(?:```text\n(.*?)^```$)?", text, re.S | re.M)
    scripts = [s for s in re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M) if s not in (code, line)]
    return Page(path, int(claimed), code, registry, line, commands, scripts)


PAGES = {name: read_page(name) for name in NAMES}


def dotted(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """All pages followed at once; what gives the module of a page. Registries and packages are put back afterwards."""
    root = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        for page in PAGES.values():
            file = root / page.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(page.code, encoding="utf-8")
            package, home = importlib.import_module(dotted(page.path).rpartition(".")[0]), dotted(page.registry)
            patch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
            registry = vars(importlib.import_module(home))[page.line.partition(".")[0]]
            patch.setattr(registry, "_entries", dict(registry._entries))
            exec(page.line, vars(importlib.import_module(home)))
        importlib.invalidate_caches()
        yield lambda name: importlib.import_module(dotted(PAGES[name].path))
    for page in PAGES.values():
        sys.modules.pop(dotted(page.path), None)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_counts_its_lines(name: str) -> None:
    page = PAGES[name]
    assert page.claimed == len(page.code.splitlines())
    assert page.code.startswith('"""')
    assert not (ROOT / page.path).exists()
    assert page.commands


def test_the_index_names_every_page_and_its_lines() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    for name, page in PAGES.items():
        assert re.search(rf"\({name}\.md\).*\b{page.claimed}\b", text), name


# (a) what the registries' tests check about every member


CHECKS: list[tuple[Callable[..., None], dict[str, str]]] = [
    *(
        (check, {"name": "haar"})
        for check in (test_denoisers.test_contract, test_denoisers.test_it_denoises_a_smooth_image)
    ),
    (test_bounds.test_coverage_is_exact_by_enumeration, {"name": "chernoff"}),
    (test_bounds.test_the_strongest_rival_is_bounded_whichever_it_is, {"name": "chernoff"}),
    (test_bounds.test_bound_is_monotone, {"name": "chernoff"}),
    (test_sequential.test_the_chance_of_ever_being_wrong_is_at_most_alpha, {"rule": "doubling"}),
    (test_sequential.test_boundaries_never_retreat, {"rule": "doubling"}),
    (test_sequential.test_all_classes_at_once, {"rule": "doubling"}),
    (test_sequential.test_the_earliest_decision, {}),
    (test_noise.test_moments, {"name": "logistic"}),
    (test_noise.test_no_radius_exceeds_a_half_space_s, {"name": "logistic"}),
    (test_noise.test_radius_of_two_classes, {}),
    (test_attacks.test_every_attack_fulfils_its_contract_in_any_batch, {"name": "simba"}),
    (test_formats.test_broken_replies_are_bad_replies, {"name": "acme"}),
    (test_formats.test_formats_record_the_options_that_affect_votes, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("check", "member"), CHECKS, ids=[check.__name__ for check, _ in CHECKS])
def test_the_registries_own_tests(
    check: Callable[..., None], member: dict[str, str], added: Any, linear_classifier: Any
) -> None:
    """Each with its own other parameters, in all combinations."""
    fixtures = {"linear_classifier": linear_classifier, "photo": to_pictures(torch.rand(1, 3, 5, 4))[0]}
    given = member | {name: fixtures[name] for name in inspect.signature(check).parameters if name in fixtures}
    marks = [mark.args for mark in getattr(check, "pytestmark", []) if mark.args and mark.args[0] not in member]
    for values in itertools.product(*(values for _, values in marks)):
        others: dict[str, Any] = {}
        for (names, _), given_value in zip(marks, values, strict=True):
            value = given_value.values[0] if hasattr(given_value, "marks") else given_value  # of pytest.param
            others |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        check(**given, **others)


# (b) the commands of the pages, and the output that they show


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    return tmp_path


def shown_in(output: str, shown: str) -> None:
    """Every line of a page's output was printed, in this order; numbers may differ a little from machine to machine."""
    lines = iter(output.splitlines())
    for line in (one for one in shown.splitlines() if one.strip() not in ("", "...")):
        line = line.removesuffix(" ...")
        words, numbers = NUMBER.sub("#", line).split(), [float(n.replace(",", "")) for n in NUMBER.findall(line)]
        for printed in lines:
            found = [float(n.replace(",", "")) for n in NUMBER.findall(printed)][: len(numbers)]
            if NUMBER.sub("#", printed).split()[: len(words)] == words and found == pytest.approx(
                numbers, rel=0.2, abs=0.05
            ):
                break
        else:
            raise AssertionError(f"not printed, or not there: {line!r} in\n{output}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_the_page(
    name: str, added: Any, workplace: Path, digits: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGES[name]
    if name == "classifier":
        exec(page.scripts[0], {})
    if name == "api-format":
        service: dict[str, Any] = {"__name__": "acme_server"}
        exec(page.scripts[0], service)
        with serving(service["app"]) as url:
            follow(page, capsys, {"http://127.0.0.1:8124": url})
    else:
        follow(page, capsys, {})


def follow(page: Page, capsys: pytest.CaptureFixture[str], instead: dict[str, str]) -> None:
    for command, shown in page.commands:
        for there, here in instead.items():
            command, shown = command.replace(there, here), shown.replace(there, here)
        for line in command.replace("\\\n", " ").splitlines():
            run(*shlex.split(line, comments=True)[1:])
        shown_in("".join(capsys.readouterr()), shown)


# (c) what is true about the examples


def test_wavelets_without_a_threshold_give_the_image_back(added: Any) -> None:
    images = torch.rand((2, 3, 9, 14), generator=torch.Generator().manual_seed(0))
    for levels in (1, 2, 3, 4):
        assert torch.allclose(load_denoiser(f"haar:levels={levels}:threshold=1e-9")(images), images, atol=1e-6)
    filters = added("denoiser").HAAR.flatten(1)
    assert torch.allclose(filters @ filters.T, torch.eye(4))
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(load_denoiser("haar:threshold=9")(flat), flat)
    means = load_denoiser("haar:levels=1:threshold=99")(torch.eye(8)[None, None])  # local means, averaged over shifts:
    assert float(means[0, 0, 3, 3]) == pytest.approx(0.375)  # 1 2 1 by 1 2 1, over 16
    for wrong, words in (
        ("levels=0", "levels=0; expected a whole"),
        ("factor=x", "factor=x; expected a number above 0"),
    ):
        with pytest.raises(UserError, match=words):
            load_denoiser(f"haar:{wrong}")
    with pytest.raises(UserError, match="write haar:threshold"):
        load_denoiser("haar")(images)
    with pytest.raises(UserError, match="levels=5 on images of 9x14"):
        load_denoiser("haar:levels=5")(images, 0.25)


def test_a_denoiser_that_needs_a_level_is_no_defence_without_one(added: Any, digits: Classifier) -> None:
    from denoisers.defences import build_defence

    with pytest.raises(UserError, match=r"write haar:threshold=0.1.*write denoised:denoiser=haar:sigma=0.25"):
        build_defence("haar", digits)
    assert build_defence("haar:threshold=0.1", digits).name == "haar:threshold=0.1"


def test_chernoff_is_below_what_it_solves_and_below_clopper_pearson(added: Any) -> None:
    """Ball arithmetic: at the bound, n KL(k/n, p) is at least log(1/alpha), and a little above it is not."""
    lower, ctx.prec, draw = added("bound").chernoff_lower, 300, random.Random(0)
    for _ in range(300):
        n = round(10 ** draw.uniform(0, 7))
        k = draw.choice([n, max(1, n - 1), draw.randint(1, n)])
        alpha = 10 ** draw.uniform(-12, -0.3)
        found = lower(k, n, alpha)
        assert 0 <= found <= clopper_pearson_lower(k, n, alpha) + 1e-11

        def exponent(p: float, k: int = k, n: int = n) -> arb:
            right = arb(n - k) * ((arb(n - k) / n).log() - (1 - arb(p)).log()) if k < n else arb(0)
            return arb(k) * ((arb(k) / n).log() - arb(p).log()) + right

        if found > 1e-9:
            assert exponent(found) >= -arb(alpha).log()
            assert exponent(found + 1e-9) < -arb(alpha).log()
    assert lower(0, 10, 0.001) == 0.0


def test_levels_of_the_looks_add_up(added: Any) -> None:
    """Each look is an exact test at its share: not above it, and one vote less is."""
    from scipy.stats import binom

    trials = np.arange(70_000)
    at, level, p0 = added("stopping-rule").doubling_boundary(0.9, 0.01, trials), 0.01, 0.9
    looks = trials[(at.up <= trials) | (at.low >= 0)]
    assert set(looks) <= {2**i for i in range(4, 17)}
    shares = {2 ** (j + 3): level / (j * (j + 1)) for j in range(1, 14)}
    assert sum(shares.values()) < level
    for t in looks:
        if at.up[t] <= t:
            assert binom.sf(at.up[t] - 1, t, p0) <= shares[t] < binom.sf(at.up[t] - 2, t, p0)
        assert binom.cdf(at.low[t], t, p0) <= shares[t] < binom.cdf(at.low[t] + 1, t, p0)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_no_set_of_the_plane_refutes_the_logistic_radius(added: Any, p: float) -> None:
    """Neyman and Pearson: of all base classifiers with probability p here, the worst still has 1/2 at the radius.

    On a fine grid of two pixels the likelihood ratio orders the cells. Along one pixel the radius is exact.
    """
    noise = added("noise").Logistic(0.25)
    side = np.linspace(-4, 4, 801)
    radius = noise.radius(p)

    def mass(shift: float) -> np.ndarray:
        ends = 1 / (1 + np.exp(-(side - shift) / noise.s))
        return np.diff(ends, prepend=0.0)

    here = np.outer(mass(0), mass(0)).ravel()

    def worst(first: float, second: float) -> float:
        """The least probability, after this shift, of a set that has p before it."""
        there = np.outer(mass(first), mass(second)).ravel()
        order = np.argsort(there / np.maximum(here, 1e-300))
        kept = np.searchsorted(np.cumsum(here[order]), p)
        return float(there[order][: kept + 1].sum())

    for along in (0.75, 0.5, 0.2):
        assert worst(along * radius, -(1 - along) * radius) > 0.5 - 3e-3
    assert worst(radius, 0) == pytest.approx(0.5, abs=3e-3)
    assert worst(1.1 * radius, 0) < 0.5 - 3e-3


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_simba_succeeds_beyond_the_margin_alone(added: Any, norm: str) -> None:
    for times in (0.98, 2.0):
        eps, net = times * test_attacks.MARGIN[norm], test_attacks.linear()
        access = test_attacks.asked(net, "scores", 400, 1)
        found = attack("simba", test_attacks.GREY[:1], torch.tensor([0]), ["a"], norm=norm, eps=eps, access=access)
        assert found.success == (times > 1,)
        assert found.success[0] == bool(net(found.images)[0] == 1)
        assert found.queries[0] == access[0].spent <= 400


def test_acme_gives_the_votes_of_the_classifier_behind_it(added: Any, digits: Classifier) -> None:
    from fastapi.testclient import TestClient

    service: dict[str, Any] = {"__name__": "acme_server"}
    exec(PAGES["api-format"].scripts[0], service)
    made, pictures = FORMATS.get("acme")(), to_pictures(noisy_digits())
    local = digits.logits(torch.stack([to_tensor(one) for one in pictures])).softmax(1)
    with TestClient(service["app"]) as client:
        for picture, expected in zip(pictures, local, strict=True):
            sent = made.request(picture)
            assert base64.b64decode(json.loads(sent.body)["input"]["image"]["content"])[:4] == b"\x89PNG"
            found = client.post(f"/{sent.path}", content=sent.body, headers=dict(sent.headers))
            ranked = made.reply(Reply(found.status_code, found.content))
            assert len(ranked) == 5
            assert ranked[0].label == f"digit {int(expected.argmax())}"
            assert ranked[0].score == pytest.approx(float(expected.max()), abs=1e-6)
    for status, kind in (("overloaded", Busy), ("bad image", BadReply)):
        with pytest.raises(BadReply, match=status) as caught:
            made.reply(Reply(200, json.dumps({"status": status}).encode()))
        assert type(caught.value) is kind
    with pytest.raises(UserError, match="expected at least 1"):
        FORMATS.get("acme")(tags=0)


def test_a_linear_classifier_s_radius_is_its_margin(added: Any, workplace: Path) -> None:
    weight = np.linspace(-1, 2, 16)
    np.savez("two.npz", coef=weight[None], intercept=[-0.5 * weight.sum() - 0.2], size=(1, 4, 4))
    classifier = load_classifier("linear:two.npz")
    assert classifier.num_classes == 2
    image = torch.full((1, 4, 4), 0.5) + 0.05 * torch.from_numpy(np.sign(weight)).float().view(1, 4, 4)
    truth = (0.05 * np.abs(weight).sum() - 0.2) / np.linalg.norm(weight)
    c = SmoothedClassifier(classifier, 0.25).certify(image, n=100_000)
    assert (c.prediction, c.norm) == (1, "l2")
    assert 0.9 * truth < c.radius <= truth
    for key, value, words in (
        ("coef", weight[None, :9], "expected (K, 16)"),
        ("size", 4, "expected an .npz with coef"),
    ):
        np.savez("bad.npz", **({"coef": weight[None], "intercept": [0.0], "size": (1, 4, 4)} | {key: value}))
        with pytest.raises(UserError, match=re.escape(words)):
            load_classifier("linear:bad.npz")
    with pytest.raises(UserError, match="drop weights"):
        load_classifier("linear:two.npz", num_classes=2)


# Other packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A package that adds to the registries, as an installer would leave it."""

    def install(points: str, package: str = "some-noises") -> None:
        about = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (about / "entry_points.txt").write_text(points)
        monkeypatch.syspath_prepend(tmp_path)

    (tmp_path / "some_noises.py").write_text(PAGES["noise"].code.replace('"logistic"', '"theirs"'))
    (tmp_path / "some_bounds.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.delitem(sys.modules, "some_noises", raising=False)
    return install


def test_a_package_adds_a_noise_without_touching_this_one(
    installed: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from certify import read_run
    from certify.smoothing.noise import NOISES

    installed("[certify.noises]\ntheirs = some_noises:Logistic\n")
    for name, value in (("_group", "certify.noises"), ("_entries", dict(NOISES._entries)), ("_packages", {})):
        monkeypatch.setattr(NOISES, name, value)
    PLUGINS.clear()
    assert "some_noises" not in sys.modules  # nothing is imported to list it
    run("list", "noises", "theirs")
    assert "from some-noises 1.2" in capsys.readouterr().out
    assert "some_noises" not in sys.modules
    run(*"--model digits --sigma 0.25 --noise theirs --n 100 --max 4 --out a.jsonl --quiet".split())
    header = read_run("a.jsonl").header
    assert (header["noise"], header["norm"], header["versions"]["some-noises"]) == ("theirs", "l1", "1.2")
    run("recompute", "a.jsonl", "--alpha", "0.01", "--out", "b.jsonl")
    assert read_run("b.jsonl").usable[0]["radius"] >= read_run("a.jsonl").usable[0]["radius"]
    PLUGINS.clear()


def test_packages_that_do_not_do_are_named(installed: Any) -> None:
    installed("[certify.things]\nbroken = some_bounds:X\ngone = some_noises:Nothing\n[certify.bounds]\nbest = x:y\n")
    things = Registry("thing", "certify.things")
    things.add("own", "statistics:median")
    assert list(things) == ["own", "broken", "gone"]
    with pytest.raises(UserError, match=r"thing 'broken' of package some-noises 1\.2 fails: no licence"):
        things.get("broken")
    with pytest.raises(UserError, match=r"thing 'gone' of package some-noises 1\.2 fails: .*Nothing"):
        things.get("gone")
    taken = Registry("bound", "certify.bounds")
    taken.add("best", math.sqrt)
    assert taken.get("best") is math.sqrt  # names of the house need no look
    for _ in range(2):
        with pytest.raises(UserError, match=r"package some-noises 1\.2 adds the bound 'best', a name that is taken"):
            list(taken)
    with pytest.raises(UserError, match="unknown thing 'owm'; nearest: own"):
        things.get("owm")
