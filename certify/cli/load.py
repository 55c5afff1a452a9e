"""From the command's options to the objects they name; everything cheap is checked first."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli import options
from certify.cli.console import warn
from certify.cli.options import check_radii
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from certify.smoothed_classifier import SmoothedClassifier
    from certify.smoothing.procedures import Procedure


def check_first(o: dict[str, Any]) -> None:
    """Everything that can be refused before torch is imported."""
    from certify.models import resolve as hub
    from certify.smoothing.noise import make_noise

    make_noise(o.get("noise", "gaussian"), o["sigma"], rounded=o.get("rounded", False))
    check_procedure(o)
    source = hub.find_source(o["model"], o["weights"])
    hub.require_weights(source, o["weights"], trust_code=o["trust_code"])
    if o["denoiser"] != "none":
        from denoisers.names import require_trusted

        require_trusted(o["denoiser"], trust_code=o["trust_code"])
    check_radii(o.get("radii"))


def check_procedure(o: dict[str, Any]) -> None:
    """Refuse options that contradict each other; a tolerance fixes the bound."""
    from certify.smoothing.bounds import BOUNDS
    from certify.smoothing.stopping_rules import DEFAULT_RULE, MEASURING_BOUND, RULES

    BOUNDS.get(o.get("bound", "clopper-pearson"))
    radii, tolerance, rule = o.get("radius"), o.get("tolerance"), o.get("rule")
    o["rule"] = rule or DEFAULT_RULE
    RULES.get(o["rule"])
    check_radii(radii, "--radius")
    if radii is not None and tolerance is not None:
        raise UserError("--radius and --tolerance: decide at a radius, or measure it to a tolerance; expected one")
    if radii is None and tolerance is None:
        if rule is not None:
            raise UserError(f"--rule {rule} without --radius: there is nothing to stop early; add --radius R")
        return
    option = "--radius" if radii is not None else "--tolerance"
    if options.given_by_user("n0"):
        raise UserError(f"--n0 with {option}: no selection samples are drawn there; leave it out")
    if options.given_by_user("bound") and (radii is not None or o["bound"] != MEASURING_BOUND):
        raise UserError(
            f"--bound {o['bound']} with {option}: the votes are looked at while they come, which a bound for a fixed n "
            "does not survive; leave --bound out" + (" (--rule names the stopping rule)" if radii is not None else "")
        )
    if tolerance is not None:
        if rule not in (None, MEASURING_BOUND):
            raise UserError(
                f"--rule {rule} with --tolerance: expected {MEASURING_BOUND}, the rule that can look at any time"
            )
        o["bound"] = MEASURING_BOUND


def procedure_from(kind: str, o: dict[str, Any]) -> Procedure:
    """Return the procedure that the options ask for: ``kind`` certify or predict, or by --radius and --tolerance."""
    from certify.smoothing.procedures import Certify, Decide, Measure, Predict

    if kind == Predict.kind:
        return Predict(o["n"], o["alpha"])
    if o["radius"] is not None:
        return Decide(tuple(o["radius"]), o["n"], o["alpha"], o["rule"])
    if o["tolerance"] is not None:
        return Measure(o["tolerance"], o["n"], o["alpha"])
    return Certify(o["n0"], o["n"], o["alpha"], o["bound"])


def load_smoothed(o: dict[str, Any]) -> SmoothedClassifier:
    """The smoothed classifier that the options name, with its denoiser, on its device."""
    from certify.smoothed_classifier import SmoothedClassifier

    device = device_from(o["device"])
    classifier = classifier_from(o["model"], o)
    classifier.probe_size = o.get("probe_size") or classifier.probe_size  # on a worker, which sees no image yet
    size = classifier.input.size
    denoiser = None
    if o["denoiser"] != "none":
        denoiser = denoiser_for(o["denoiser"], o["sigma"], size, classifier, trust_code=o["trust_code"])
    return SmoothedClassifier(
        classifier,
        o["sigma"],
        denoiser=denoiser,
        noise=o.get("noise", "gaussian"),
        norm=o.get("norm"),
        rounded=o.get("rounded", False),
        device=device,
        precision=o["precision"],
        compile=o["compile"],
        batch_size=o["batch_size"],
    )


def classifier_from(model: str, o: dict[str, Any]) -> Classifier:
    """The classifier of this name, with the user's settings in place of its own."""
    from certify.models.classifier import load_classifier

    settings = {name: o[name] for name in ("weights", "input_size", "mean", "std", "num_classes", "trust_code")}
    return load_classifier(model, **settings)


def surrogate_from(named: str, *, trust_code: bool = False) -> Classifier:
    """The classifier of ``MODEL`` or ``MODEL=FILE``."""
    from certify.models.classifier import load_classifier

    model, _, weights = named.partition("=")
    return load_classifier(model, weights=weights or None, trust_code=trust_code)


def denoiser_for(
    name: str,
    sigma: float,
    image: tuple[int, int, int] | None,
    classifier: Classifier | None = None,
    *,
    trust_code: bool = False,
) -> nn.Module:
    """The denoiser of this name for images (C, H, W); a warning where it was trained for other noise.

    Raises:
        UserError: no such denoiser, one for other images, or weights that cannot be told a noise level.
    """
    from denoisers.find import find_denoiser
    from denoisers.weights import Trained

    own = classifier.identity() if classifier is not None else None
    denoiser = find_denoiser(name, sigma=sigma, image=image, classifier=own, trust_code=trust_code)
    if isinstance(denoiser, Trained):
        denoiser.check_use(sigma)
        if not denoiser.card.covers(sigma):
            warn(denoiser.card.mismatch(sigma))
    return denoiser


def device_from(wanted: str) -> str:
    """Return the device of this name, or an accelerator for ``auto``.

    Raises:
        UserError: this machine has no such device.
    """
    from certify.engine.hardware import find_device

    return str(find_device(wanted))


def without_data(o: dict[str, Any]) -> str:
    """Fill in images that are at hand, and so few of them or of their samples that an answer comes soon; in words."""
    is_default = {name: not options.given_by_user(name) for name in ("n", "skip", "ids")}
    how = "pass your own images with --data FOLDER, FILE.zip, FILE.npz or IMAGE"
    if o["model"] == "digits":
        o["data"] = "digits"
        if is_default["skip"] and is_default["ids"]:
            o["skip"] = 5
        return f"demo       no --data: the digits held out from training; {how}"
    o["data"] = "photos"
    if not is_default["n"]:
        return f"demo       no --data: scikit-learn's two photographs; {how}"
    o["n"] = min(o["n"], 1000)
    few = f"n = {o['n']:,} for a quick answer (--n sets it)"
    return f"demo       no --data: scikit-learn's two photographs, {few}; {how}"


def check_data(o: dict[str, Any]) -> None:
    """Refuse a dataset's name that is a folder here too, unless ``--root`` says that the dataset is meant."""
    from certify.images.named_datasets import DATASETS

    if options.given_by_user("data") and o["root"] is None and o["data"] in DATASETS and Path(o["data"]).is_dir():
        named = o["data"]
        raise UserError(
            f"--data {named} is a dataset's name and a folder here; write {named}/, or --root data for the dataset"
        )


def chosen_images(o: dict[str, Any], classifier: Any) -> ImageSet:
    """The images that the options choose, with the classifier's labels for them."""
    from certify.images.dataset import load_images

    check_data(o)
    images = load_images(
        o["data"],
        classifier,
        skip=o["skip"],
        start=o["start"],
        max_images=o["max_images"],
        ids=[i for row in csv.reader(io.StringIO(o["ids"], newline="")) for i in row] if o["ids"] else None,
        labels=o["labels"],
        class_map=o["class_map"],
        root=o["root"],
        download=o["download"],
    )
    if getattr(classifier, "probe_size", False) is None:  # a classifier that takes any size
        from certify.cli.plan import first_shape

        classifier.probe_size = first_shape(images)
    return images
