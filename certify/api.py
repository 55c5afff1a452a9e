"""Functions for scripts: certify or predict a whole set of images with ordinary Python objects."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from certify.errors import UserError, warn
from certify.registry import check_options, chosen_options
from certify.smoothed_classifier import ModelOptions, SmoothedClassifier, SmoothingOptions
from certify.smoothing.procedures import Accuracy, Predict
from certify.smoothing.procedures.choose import AnyProcedure, procedure_for

if TYPE_CHECKING:
    from analysis.accuracy_bound import AccuracyBound
    from certify.images.dataset import ImageSet
    from certify.images.in_memory import Collection
    from certify.results import Run
    from certify.runs.transaction import Job


class DataOptions(TypedDict, total=False):
    """Options of :func:`certify.load_images`; those after ``ids`` are for names and paths alone."""

    skip: int
    start: int
    max_images: int | None
    ids: Sequence[str] | None
    class_map: str | Path | None
    root: str | Path | None
    download: bool


class Options(ModelOptions, SmoothingOptions, DataOptions, total=False):
    """Further options of a run.

    Attributes:
        strict: stop at the first image that cannot be used, instead of recording it as an abstention.
        cluster: do the work on a Ray cluster: ``"local:K"`` (K workers on this machine), ``"local"``, ``"auto"`` (the
            cluster this machine belongs to) or ``"ray://HOST:PORT"``; the model is loaded there by name or sent there.
        shard: ``"i/n"``: certify part i of n of the images; :meth:`certify.Run.merge` joins the parts.
        trust_identity: resume a run file that cannot prove that its model is still the same.
        progress: False shows nothing; a number prints a line every so many seconds instead of a bar.
    """

    strict: bool
    cluster: str | None
    shard: str | None
    trust_identity: bool
    progress: bool | float


def certify(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None = None,
    n0: int | None = None,
    n: int | None = None,
    alpha: float = 0.001,
    bound: str | None = None,
    radius: float | Iterable[float] | None = None,
    tolerance: float | None = None,
    rule: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Run:
    """Certify images: a class and an l2 radius for each, or an abstention.

    For each image separately, with probability at least 1 - alpha over the noise draws, the answer is true or an
    abstention (Cohen, Rosenfeld and Kolter 2019, algorithm CERTIFY). The options and the run file are
    those of the command ``certify``.

    Args:
        model: a ``torch.nn.Module`` or function from images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)`` or labels
            ``(B,)``; a name or file as of ``--model``; or a :class:`SmoothedClassifier`, which has its own sigma.
        images: a tensor or array ``(N, C, H, W)``, one image, a list, a ``Dataset``, a ``DataLoader``, or a name,
            folder or file as of ``--data``.
        labels: N class indices (with a path: as of ``--labels``); None takes the data's own, if it has any.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        n0: samples that select the class, 100 unless given; none are drawn with ``radius`` or ``tolerance``.
        n: samples that bound its probability, 100,000 unless given; the maximum with ``radius`` (20,000 unless given)
            or ``tolerance``.
        alpha: failure probability per image.
        bound: name of a bound (``certify list bounds``), Clopper-Pearson unless given.
        radius: decide only whether images are robust at these radii, with as few samples as possible.
        tolerance: stop each image once its radius is known to this relative tolerance.
        rule: name of the stopping rule with ``radius`` (``certify list rules``).
        seed: of all noise; secret if an adversary may choose images.
        out: run file to write or resume (``.jsonl``), or a folder for it; None keeps the run in memory.
        **options: keyword arguments of :func:`load_classifier`, :class:`SmoothedClassifier` (whose ``device`` is here
            ``"auto"`` by default) and :func:`load_images`, and ``cluster``, ``shard``, ``strict``, ``trust_identity``,
            ``progress`` (:class:`certify.api.Options`).

    Returns:
        The run: a row per image, ``run.table()``, ``run.plot()``.

    Raises:
        UserError: arguments out of range or that contradict each other; a model or images that cannot be used.
        RunFault: the classifier, a worker or the disk failed; a run file keeps what was finished.

    Warns:
        CertifyWarning: what is probably a mistake (units, radii out of reach, accuracy near chance, failed samples) and
            images that are left out.
    """
    procedure = procedure_for(n0=n0, n=n, alpha=alpha, bound=bound, radius=radius, tolerance=tolerance, rule=rule)
    return _run(procedure, model, images, labels, sigma, seed, out, options)


def predict(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None = None,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Run:
    """Predict the smoothed class of images, or abstain, without a radius.

    For each image separately, with probability at least 1 - alpha over the noise draws, the prediction is that of the
    smoothed classifier or an abstention (Cohen, Rosenfeld and Kolter 2019, algorithm PREDICT).

    Args:
        model: as for :func:`certify`.
        images: as for :func:`certify`.
        labels: as for :func:`certify`.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        n: samples per image, from 1.
        alpha: failure probability per image, in (0, 1).
        seed: of all noise; secret if an adversary may choose images.
        out: run file to write or resume (``.jsonl``), or a folder for it; None keeps the run in memory.
        **options: as for :func:`certify`.

    Returns:
        The run: a row per image with ``prediction`` (-1 abstains), ``p_value`` and ``votes``.

    Raises:
        UserError: as for :func:`certify`.
        RunFault: as for :func:`certify`.
    """
    return _run(Predict(n, alpha), model, images, labels, sigma, seed, out, options)


def accuracy(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None = None,
    draws: int = 1,
    alpha: float = 0.001,
    population: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> AccuracyBound:
    """Bound the expected accuracy of all images together, without and under attack, from one noisy copy of each.

    The bound is about the randomised classifier, which answers each request from one fresh noisy copy of the image.
    With probability at least 1 - alpha over the noise (and the choice of the images, for a population), it holds at all
    radii at once; nothing is said about a single image (:mod:`certify.smoothing.dataset_accuracy`). Without labels it
    is about agreement with the base classifier's answers to the clean images.

    Args:
        model: as for :func:`certify`.
        images: as for :func:`certify`.
        labels: as for :func:`certify`.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        draws: noisy copies of each image, from 1.
        alpha: failure probability of the whole statement, in (0, 1); below 1/4 without ``population``.
        population: the images are a random sample, and the statement is about their population; otherwise it is about
            these images.
        seed: of all noise; secret if an adversary may choose images.
        out: as for :func:`certify`.
        **options: as for :func:`certify`.

    Returns:
        The bound: ``bound.lower`` without an attack, ``bound.under_attack(r)``, ``bound.table()``, ``bound.plot()``;
        ``bound.run`` has the votes.

    Raises:
        UserError: as for :func:`certify`; or labels for some images only.
        RunFault: as for :func:`certify`.
    """
    return _run(Accuracy(draws, alpha, population), model, images, labels, sigma, seed, out, options).accuracy_bound()


def _run(
    procedure: AnyProcedure,
    model: Any,
    images: Any,
    labels: Any,
    sigma: float | None,
    seed: int,
    out: str | Path | None,
    options: Mapping[str, Any],
) -> Run:
    """Do a run, or resume the one in ``out``; warn of what the summary of the command shows."""
    from certify.results import Run, RunInMemory
    from certify.runs.files import output_path
    from certify.runs.transaction import Observer, execute, run_words, warn_of_results

    job = load_job(procedure, model, images, labels, sigma=sigma, seed=seed, options=options)
    with tempfile.TemporaryDirectory() as folder:
        run = execute(
            job,
            lambda header: output_path(out or Path(folder, "run.jsonl"), run_words(header), header),
            command=f"certify.{procedure.kind}",
            observer=Observer(shown=options.get("progress", True)),
        )
    warn_of_results(run)
    if run.omissions:
        first = next(row for row in run.images if row.error is not None)
        warn(f"{run.omissions}; the first, {first.id}: {first.error}")
    order = {item.id: place for place, item in enumerate(job.images.items)}  # images that stop early are written first
    rows = sorted(run.images, key=lambda row: order[row.id])
    return Run(run.path, run.header, rows) if out is not None else RunInMemory(Path(run.path.name), run.header, rows)


def load_job(
    procedure: AnyProcedure,
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None,
    seed: int,
    options: Mapping[str, Any],
) -> Job:
    """Load everything that a run needs: Python objects, or what names and paths stand for.

    Args:
        procedure: the question about each image.
        model: as for :func:`certify`, and so are the others.
        images: to certify.
        labels: their classes.
        sigma: of the noise.
        seed: of the noise.
        options: of :class:`Options`.

    Raises:
        UserError: an unknown option, options that contradict each other, or what cannot be loaded.
    """
    check_options(Options, options, certify)
    from certify.runs.config import Settings
    from certify.runs.shards import Shard
    from certify.runs.transaction import Job

    settings = Settings(procedure, seed)
    shard = None if options.get("shard") is None else Shard.parse(options["shard"])
    if shard is not None and options.get("max_images") is not None:
        shard.places(options["max_images"])  # before anything is loaded: a shard that would be empty is refused
    device = options.get("device", "auto")
    address = None
    if options.get("cluster") is not None:
        from certify.cluster.connect import Address

        address = Address.usable(options["cluster"], device)
    of_model = chosen_options(ModelOptions, options) | chosen_options(SmoothingOptions, options)
    if isinstance(model, SmoothedClassifier) and (sigma is not None or of_model or address is not None):
        given = "cluster" if address is not None else min(of_model, default="sigma")
        raise UserError(
            f"{given} with a SmoothedClassifier: it has its own; pass it there, or pass the base classifier"
        )
    load = functools.partial(load_smoothed, model, sigma, of_model)
    smoothed, chosen = _load_images(load(device if address is None else "cpu"), images, labels, options)
    denoiser = options.get("denoiser")
    workers = None
    if address is not None:
        from certify.cluster.driver import started

        size = smoothed.classifier.probe_size  # type: ignore[attr-defined]
        sent = not isinstance(model, str) or not isinstance(of_model.get("denoiser"), str | None)
        workers = functools.partial(started, address, functools.partial(load, size=size), smoothed, device, sent=sent)
    return Job(
        smoothed,
        chosen,
        settings,
        model=model if isinstance(model, str) else getattr(smoothed.classifier, "name", type(model).__name__),
        data=str(images) if isinstance(images, str | Path) else chosen.name,
        denoiser=denoiser if isinstance(denoiser, str) else smoothed.base.denoiser_name,
        shard=shard,
        workers=workers,
        strict=options.get("strict", False),
        trust_identity=options.get("trust_identity", False),
    )


def load_smoothed(
    model: Any, sigma: float | None, options: Mapping[str, Any], device: str, size: tuple[int, int, int] | None = None
) -> SmoothedClassifier:
    """Return the smoothed classifier on a device; ``size`` (C, H, W) for one that does not state its input size."""
    if isinstance(model, SmoothedClassifier):
        return model
    smoothed = SmoothedClassifier(model, sigma, **{**options, "device": device})
    if size is not None:
        smoothed.adapt_to(size)
    return smoothed


def _load_images(
    smoothed: SmoothedClassifier, images: Any, labels: Any, options: Mapping[str, Any]
) -> tuple[SmoothedClassifier, ImageSet]:
    """Return the images as the smoothed classifier takes them, and the classifier at their size."""
    from certify.images.dataset import load_images
    from certify.models.classifier import InputSpec

    of_data = chosen_options(DataOptions, options)
    collection = collect_images(images, labels, of_data)
    if collection is not None:
        smoothed.adapt_to(collection.first_shape())
        spec = getattr(smoothed.classifier, "input", InputSpec(None))
        return smoothed, collection.image_set(spec, smoothed.num_classes, **of_data)
    chosen = load_images(str(images), smoothed.classifier, labels=labels, **of_data)  # type: ignore[arg-type]
    if getattr(smoothed.classifier, "probe_size", chosen) is None and (shape := chosen.first_shape()) is not None:
        smoothed.adapt_to(shape)  # a classifier that takes any size
    return smoothed, chosen


def collect_images(images: Any, labels: Any, options: dict[str, Any]) -> Collection | None:
    """Return images that are Python objects; None for a name or path. Takes ``ids`` out of the options.

    Raises:
        UserError: options that only names and paths have, or labels that only objects have.
    """
    if isinstance(images, str | Path):
        if not isinstance(labels, str | Path | None):
            raise UserError(
                f"labels of type {type(labels).__name__} with images {str(images)!r}: expected a CSV file of "
                "file,label, or None for the data's own; class indices go with images as Python objects"
            )
        return None
    from certify.images.in_memory import collect

    collection = collect(images, labels, options.pop("ids", None))
    if extra := sorted(options.keys() & {"class_map", "root", "download"}):
        raise UserError(f"{extra[0]} with images of type {collection.name}: expected a name or path of data with it")
    return collection
