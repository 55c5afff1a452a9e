"""Functions for scripts: certify or predict a whole set of images with ordinary Python objects."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from certify.errors import UserError
from certify.registry import unknown_name
from certify.smoothed_classifier import ModelOptions, SmoothingOptions
from certify.smoothing.procedures import Certify, Decide, Measure, Predict, Procedure, expected_samples, samples
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE

if TYPE_CHECKING:
    from certify.images.dataset import ImageSet
    from certify.images.in_memory import Collection
    from certify.results import Run
    from certify.smoothed_classifier import SmoothedClassifier


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
        shard: ``"i/n"``: certify part i of n of the images; :meth:`certify.Run.merge` joins the parts.
        trust_identity: resume a run file that cannot prove that its model is still the same.
        progress: show a progress bar, in a terminal or notebook.
    """

    strict: bool
    shard: str | None
    trust_identity: bool
    progress: bool


def certify(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None = None,
    n0: int = 100,
    n: int | None = None,
    alpha: float = 0.001,
    bound: str | None = None,
    radius: float | Iterable[float] | None = None,
    tolerance: float | None = None,
    rule: str = DEFAULT_RULE,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Run:
    """Certify images: a class and an l2 radius for each, or an abstention.

    For each image separately, with probability at least 1 - alpha over the noise draws, the answer is true or an
    abstention (Cohen, Rosenfeld and Kolter 2019, algorithm CERTIFY). The same call as ``certify run``, option by
    option: its run file is the same.

    Args:
        model: a ``torch.nn.Module`` or function from images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)`` or labels
            ``(B,)``; a name or file as of ``--model``; or a :class:`SmoothedClassifier`, which has its own sigma.
        images: a tensor or array ``(N, C, H, W)``, one image, a list, a ``Dataset``, a ``DataLoader``, or a name,
            folder or file as of ``--data``.
        labels: N class indices (with a path: as of ``--labels``); None takes the data's own, if it has any.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        n0: samples that select the class.
        n: samples that bound its probability, 100,000 unless given; at most so many with ``radius`` (20,000 unless
            given) or ``tolerance``.
        alpha: failure probability per image.
        bound: name of a bound (``certify list bounds``), Clopper-Pearson unless given.
        radius: decide only whether images are robust at these radii, with as few samples as possible.
        tolerance: stop each image once its radius is known to this relative tolerance.
        rule: name of the stopping rule with ``radius``.
        seed: of all noise; secret if an adversary may choose images.
        out: run file to write or resume (``.jsonl``); None keeps the run in memory.
        **options: keyword arguments of :func:`load_classifier`, :class:`SmoothedClassifier` (whose ``device`` is here
            ``"auto"`` by default) and :func:`load_images`, and ``shard``, ``strict``, ``trust_identity``, ``progress``
            (:class:`certify.api.Options`).

    Returns:
        The run: a row per image, ``run.table()``, ``run.plot()``.

    Raises:
        UserError: arguments out of range or that contradict each other; a model or images that cannot be used.
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

    For each image the prediction is wrong with probability at most alpha (algorithm PREDICT of Cohen, Rosenfeld and
    Kolter 2019). Arguments as in :func:`certify`.
    """
    return _run(Predict(n, alpha), model, images, labels, sigma, seed, out, options)


def procedure_for(
    *,
    n0: int,
    n: int | None,
    alpha: float,
    bound: str | None,
    radius: float | Iterable[float] | None,
    tolerance: float | None,
    rule: str,
) -> Procedure:
    """Return the procedure that these parameters ask for.

    Raises:
        UserError: parameters out of range or that contradict each other.
    """
    if radius is not None and tolerance is not None:
        raise UserError("radius and tolerance: expected one of them; decide at a radius, or estimate it")
    if radius is not None or tolerance is not None:
        name = "radius" if radius is not None else "tolerance"
        if bound is not None and (radius is not None or bound != Measure.bound):
            raise UserError(
                f"bound {bound!r} with {name}: a bound for a fixed n is invalid when images stop early; leave it out"
            )
    if radius is not None:
        return Decide(radius, DEFAULT_CAP if n is None else n, alpha, rule)  # type: ignore[arg-type]
    if tolerance is not None:
        return Measure(tolerance, 100_000 if n is None else n, alpha)
    return Certify(n0, 100_000 if n is None else n, alpha, bound or "clopper-pearson")


def _run(
    procedure: Procedure,
    model: Any,
    images: Any,
    labels: Any,
    sigma: float | None,
    seed: int,
    out: str | Path | None,
    options: Mapping[str, Any],
) -> Run:
    """Load, sample and collect; a run that was begun in ``out`` is resumed."""
    from certify.results import Run, RunInMemory, read_run
    from certify.runs.config import Settings, execution_of, run_header, with_execution
    from certify.runs.records import RunHeader
    from certify.runs.run_file import RunFile, peek_header
    from certify.runs.runner import process
    from certify.runs.shards import Shard

    check_options(Options, options)
    settings = Settings(procedure, seed)
    shard = Shard.parse(options["shard"]) if options.get("shard") else None
    smoothed, chosen, name = _load(model, images, labels, sigma, options)
    places = range(len(chosen)) if shard is None else shard.places(len(chosen))
    work = len(chosen) if shard is None else shard.largest(len(chosen))  # alike in all shards, and so the execution
    denoiser = options.get("denoiser")
    header = run_header(
        smoothed,
        chosen,
        settings,
        model=name,
        data=str(images) if isinstance(images, str | Path) else chosen.name,
        denoiser=denoiser if isinstance(denoiser, str) else smoothed.base.denoiser_name,
        command=f"certify.{procedure.kind}",
    )
    header = header if shard is None else shard.header(header)
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "run.jsonl") if out is None else Path(out)
        begun = peek_header(path)
        first = chosen.first_usable()
        if first is not None and smoothed.execution is None:
            execution = execution_of(begun, smoothed.options) if isinstance(begun, RunHeader) else None
            smoothed.prepare(first, work * expected_samples(procedure), execution)
        if smoothed.execution is not None:
            header = with_execution(header, smoothed.execution)
        file = stack.enter_context(RunFile(path, header, trust_identity=options.get("trust_identity", False)))
        each, unit = (1, " images") if procedure.sequential else (samples(procedure), " samples")
        bar = progress_bar(len(places) * each, len(file.done) * each, unit, shown=options.get("progress", True))
        advance = stack.enter_context(bar)
        process(smoothed, chosen, settings, file, places=places, strict=options.get("strict", False), progress=advance)
        run = read_run(path)
    order = {item.id: place for place, item in enumerate(chosen.items)}  # images that stop early are written first
    rows = sorted(run.images, key=lambda row: order[row.id])
    return Run(path, run.header, rows) if out is not None else RunInMemory(Path(path.name), run.header, rows)


def _load(
    model: Any, images: Any, labels: Any, sigma: float | None, options: Mapping[str, Any]
) -> tuple[SmoothedClassifier, ImageSet, str]:
    """Return the smoothed classifier, the images as it takes them, and the classifier's name."""
    from certify.images.dataset import load_images
    from certify.models.classifier import InputSpec
    from certify.smoothed_classifier import SmoothedClassifier

    of_data = chosen_options(DataOptions, options)
    collection = collect_images(images, labels, of_data)
    of_model = chosen_options(ModelOptions, options) | chosen_options(SmoothingOptions, options)
    if not isinstance(model, SmoothedClassifier):
        smoothed = SmoothedClassifier(model, sigma, **{"device": "auto", **of_model})
    elif sigma is not None or of_model:
        given = min(of_model) if of_model else "sigma"
        raise UserError(
            f"{given} with a SmoothedClassifier: it has its own; pass it there, or pass the base classifier"
        )
    else:
        smoothed = model
    if collection is not None:
        smoothed.adapt_to(collection.first_shape())
    classifier: Any = smoothed.classifier
    name = getattr(classifier, "name", type(classifier).__name__)
    if collection is None:
        return smoothed, load_images(str(images), classifier, labels=labels, **of_data), name
    spec = getattr(classifier, "input", InputSpec(None))
    return smoothed, collection.image_set(spec, smoothed.num_classes, **of_data), name


def collect_images(images: Any, labels: Any, options: dict[str, Any]) -> Collection | None:
    """Return images that are Python objects; None for a name or path. Takes ``ids`` out of the options.

    Raises:
        UserError: options that only names and paths have.
    """
    from certify.images.in_memory import collect

    if isinstance(images, str | Path):
        return None
    collection = collect(images, labels, options.pop("ids", None))
    if extra := sorted(options.keys() & {"class_map", "root", "download"}):
        raise UserError(f"{extra[0]} with images of type {collection.name}: expected a name or path of data with it")
    return collection


def check_options(group: type, options: Mapping[str, Any]) -> None:
    """Refuse options that a group does not have.

    Raises:
        UserError: an unknown option, with the nearest names.
    """
    if unknown := options.keys() - group.__annotations__.keys():
        raise unknown_name("option", min(unknown), group.__annotations__)


def chosen_options(group: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group that are given."""
    return {name: options[name] for name in group.__annotations__ if name in options}


@contextlib.contextmanager
def progress_bar(total: int, done: int, unit: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in a terminal or notebook; yield its update function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets the bar is text
        from tqdm.auto import tqdm
    with tqdm(
        total=total, initial=done, unit=unit, unit_scale=True, disable=None if shown else True, leave=False
    ) as bar:
        yield lambda count: bar.update(count) and None
