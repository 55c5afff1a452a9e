"""``certify run`` (the default) and ``certify predict``: plan, run, table, curve."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.errors import CertifyError, RunFault, UserError

if TYPE_CHECKING:
    from certify.images import ImageSet
    from certify.records import Run, RunFile
    from certify.runner import Settings
    from certify.smoothing import SmoothedClassifier


@click.command(short_help="Certify images (the default verb).")
@options.classifier_options
@options.sigma
@options.data_options
@click.option("--n0", type=options.Count("a number of samples"), default=100, show_default=True, help="Selection samples.")
@options.n
@options.alpha
@click.option("--bound", default="clopper-pearson", show_default=True, help="Confidence bound (`certify list bounds`).")
@click.option("--radii", type=options.Numbers(), help="Radii of the table (default: round numbers up to the largest possible).")
@options.compute_options
def run(**given: Any) -> None:
    """Certify images: a class and an l2 radius for each, or an abstention.

    Cohen, Rosenfeld and Kolter (2019): n0 noisy copies choose a class, n fresh ones bound its probability from below
    (Clopper-Pearson at alpha), and the radius is sigma * Phi^-1 of the bound. Results go to a run file; the same command
    goes on where it stopped. The largest possible radius is sigma times 1.50 at n = 100, 2.46 at 1,000, 3.20 at 10,000
    and 3.81 at 100,000 (alpha = 0.001).
    """
    _execute("certify", given)


@click.command(short_help="Predict with the smoothed classifier.")
@options.classifier_options
@options.sigma
@options.data_options
@options.n
@options.alpha
@options.compute_options
def predict(**given: Any) -> None:
    """Predict with the smoothed classifier: its class for each image, or an abstention, without a radius.

    PREDICT of Cohen, Rosenfeld and Kolter (2019): n noisy copies, and a two-sided binomial test at alpha between the two
    leading classes.
    """
    _execute("predict", {**given, "n0": 1, "bound": "clopper-pearson", "radii": None})


def _execute(procedure: str, o: dict[str, Any]) -> None:
    """The whole verb: check cheaply first, then import what is heavy."""
    from certify import hub
    from certify.bounds import BOUNDS

    BOUNDS.get(o["bound"])
    source = hub.find_source(o["model"])
    if o["weights"] is not None and not Path(o["weights"]).is_file():
        raise UserError(f"no weights file {o['weights']!r}; expected an existing .pth, .pt, .th, .tar or .safetensors file")
    hub.require_weights(source, o["weights"])
    if o["radii"] is not None and not all(0 <= r < float("inf") for r in o["radii"]):
        raise UserError(f"--radii {','.join(map(str, o['radii']))}: expected numbers from 0")

    say = _silent if o["quiet"] or o["as_json"] else _say
    smoothed, images = _prepare(o, say)
    from certify.records import RunFile, read_run
    from certify.runner import Settings, run_header

    settings = Settings(o["n"], o["n0"], o["alpha"], o["seed"], o["bound"], procedure)
    header = run_header(
        smoothed,
        images,
        settings,
        model=o["model"],
        data=o["data"],
        denoiser=o["denoiser"],
        command="certify " + " ".join(_quoted(sys.argv[1:])),
    )
    path = _run_path(o["out"], header)
    with RunFile(path, header) as file:
        took = _work(smoothed, images, settings, file, o, say)
    _summary(read_run(path), o, took, settings.samples)


def _prepare(o: dict[str, Any], say: Any) -> tuple[SmoothedClassifier, ImageSet]:
    """Load what was asked for and show what it turned out to be."""
    import torch

    from certify.classifiers import load_classifier
    from certify.images import load_images
    from certify.smoothing import SmoothedClassifier

    device = _device(o["device"])
    denoiser = None
    if o["denoiser"] != "none":
        from denoisers import load_denoiser

        denoiser = load_denoiser(o["denoiser"])
    classifier = load_classifier(
        o["model"],
        weights=o["weights"],
        input_size=o["input_size"],
        mean=o["mean"],
        std=o["std"],
        num_classes=o["num_classes"],
    )
    given = o["data"] is not None
    if not given:
        o["data"], o["skip"] = ("digits", max(o["skip"], 5)) if o["model"] == "digits" else ("photos", o["skip"])
    images = load_images(
        o["data"],
        classifier,
        skip=o["skip"],
        max_images=o["max_images"],
        ids=o["ids"].split(",") if o["ids"] else None,
        labels=o["labels"],
        class_map=o["class_map"],
        root=o["root"],
        download=o["download"],
    )
    smoothed = SmoothedClassifier(classifier, o["sigma"], denoiser=denoiser, device=device)
    size = "x".join(map(str, classifier.input.size)) if classifier.input.size else "any size"
    normalised = f"mean {_list(classifier.input.mean)} std {_list(classifier.input.std)}" if classifier.input.mean else "none"
    say(f"model      {o['model']}, {classifier.num_classes} classes, input {size}, weights: {classifier.weights}")
    say(f"input      {classifier.input.steps}; noise is added there, in [0, 1] pixels; normalisation inside: {normalised}")
    if denoiser is not None:
        say(f"denoiser   {o['denoiser']}, between the noise and the classifier")
    say(f"data       {o['data']}: {len(images):,} of {images.available:,} images; labels: {images.rule}")
    if not given:
        say("           (no --data: pass your own images with --data FOLDER, FILE.zip, FILE.npz or IMAGE)")
    if torch.device(device).type == "cpu":
        say(f"device     cpu, {torch.get_num_threads()} threads, float32")
    else:
        say(f"device     {device}, float32")
    return smoothed, images


def _work(
    smoothed: SmoothedClassifier, images: ImageSet, settings: Settings, file: RunFile, o: dict[str, Any], say: Any
) -> float:
    """Say what it costs, warn of what cannot work, then do what is left; seconds it took."""
    from tqdm import tqdm

    from certify.runner import measure_rate, process
    from certify.smoothing import largest_radius

    left = len(images) - len(file.done)
    if file.resumed:
        say(f"run file   {file.path}: {len(file.done):,} of {len(images):,} images are there already")
    else:
        say(f"run file   {file.path}")
    if settings.procedure == "certify":
        cap = largest_radius(smoothed.noise, settings.n, settings.alpha, settings.bound)
        stages = f"n0 = {settings.n0:,}, n = {settings.n:,}"
        say(f"procedure  {stages}, alpha = {settings.alpha:g}, {settings.bound}, sigma = {smoothed.noise.scale:g}")
        say(f"radius     at most {cap:.4g} ({cap / smoothed.noise.scale:.2f} sigma) at this n and alpha")
        if cap == 0.0:
            _warn(f"n = {settings.n} can certify nothing at alpha = {settings.alpha:g}: every image will abstain; raise --n")
    else:
        say(f"procedure  predict: n = {settings.n:,}, alpha = {settings.alpha:g}, sigma = {smoothed.noise.scale:g}")
    if not left:
        return 0.0
    first = _first_image(images)
    _check_base(smoothed, images)
    if first is not None:
        rate = measure_rate(smoothed, first, o["batch_size"])
        total = left * settings.samples
        say(f"cost       {left:,} images x {settings.samples:,} samples = {total:,}: about {_clock(total / rate)}")
    start = time.perf_counter()
    with tqdm(
        total=left * settings.samples,
        unit=" samples",
        unit_scale=True,
        disable=True if say is _silent else None,  # None: only on a terminal
        leave=False,
        file=sys.stderr,
    ) as bar, _stoppable(file, len(images)):
        process(
            smoothed,
            images,
            settings,
            file,
            strict=o["strict"],
            batch_size=o["batch_size"],
            progress=bar.update,
            warn=_warn,
        )
    return time.perf_counter() - start


@contextlib.contextmanager
def _stoppable(file: RunFile, expected: int) -> Any:
    """Ctrl-C ends the run in one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"stopped after {len(file.done):,} of {expected:,} images, which are in {file.path}"
        fault = RunFault(f"{kept}; the same command goes on from there")
        fault.exit_code = 130
        raise fault from None


def _first_image(images: ImageSet) -> Any:
    for i in range(len(images)):
        with contextlib.suppress(CertifyError):
            return images.load(i)
    return None


def _check_base(smoothed: SmoothedClassifier, images: ImageSet, most: int = 50) -> None:
    """Warn when the classifier without noise does no better than guessing: labels or normalisation are wrong."""
    from certify.runner import near_chance

    if not images.labelled:
        return
    correct = total = 0
    for i in range(0, len(images), max(1, -(-len(images) // most))):
        with contextlib.suppress(CertifyError):
            correct += smoothed.base_label(images.load(i)) == images.labels[i]
            total += 1
    if total and near_chance(correct, total, smoothed.num_classes):
        _warn(
            f"without noise the classifier is right on {correct} of {total} images, which is near chance: "
            "wrong class order (--class-map)? normalised twice or not at all (--mean, --std)? another model's weights?"
        )


def _summary(run: Run, o: dict[str, Any], took: float, samples: int) -> None:
    """The table (or one JSON object) on stdout; for certificates, the curve beside the run file."""
    from certify.noise import Gaussian

    rows = run.usable
    done = took and samples * len(run.images)
    rate = sum(r["trials"] for r in rows) / max(1e-9, sum(r["seconds"] for r in rows))
    abstained = sum(r["prediction"] < 0 for r in rows)
    failures = sum(r["failures"] for r in rows)
    if rows and failures == sum(r["trials"] for r in rows):
        _warn("every sample failed (NaN or no finite answer): the base classifier gives nothing to certify")
    elif failures:
        _warn(f"{failures:,} samples failed (NaN or no finite answer); they count against every class")
    certified: dict[str, float] | None = None
    picture: Path | None = None
    text = ""
    if run.header["procedure"] == "certify" and rows:
        from analysis.curves import curves, default_radii
        from analysis.plots import plot_curves
        from analysis.tables import one_run
        from certify.smoothing import largest_radius

        cap = largest_radius(Gaussian(run.header["sigma"]), run.header["n"], run.header["alpha"], run.header["bound"])
        radii = o["radii"] or default_radii(cap)
        (curve,) = curves([run])
        certified = {f"{r:g}": float(a) for r, a in zip(radii, curve.accuracy(radii), strict=True)}
        text = one_run(curve, radii)
        picture = run.path.with_suffix(".png")
        plot_curves([curve], picture)
    if o["as_json"]:
        labelled = bool(rows) and rows[0]["label"] is not None
        result = {
            "run": str(run.path),
            "images": len(rows),
            "certified_accuracy": certified if labelled else None,
            "certified_fraction": None if labelled else certified,
            "samples": sum(r["trials"] for r in rows) + len(rows) * run.header["n0"],
            "samples_per_second": round(rate, 1),
            "abstained": abstained,
            "unreadable": len(run.images) - len(rows),
            "curve": str(picture) if picture else None,
        }
        click.echo(json.dumps(result))
        return
    del done
    click.echo(_in_words(run, text, abstained))
    click.echo(f"\nrun file   {run.path}" + (f"\ncurve      {picture}" if picture else ""))


def _in_words(run: Run, table: str, abstained: int) -> str:
    """What the run says, every number by its full name."""
    from analysis.tables import share

    rows, header = run.usable, run.header
    if not rows:
        return f"no image could be used ({len(run.images)} unreadable)"
    labelled = rows[0]["label"] is not None
    lines = [f"{header['model']}, sigma = {header['sigma']:g} ([0, 1] pixels), {len(rows):,} images of {header['data']}"]
    if len(rows) < len(run.images):
        lines.append(f"{len(run.images) - len(rows)} images could not be read and are left out")
    lines += ["", table, ""] if table else [""]
    if labelled:
        base = sum(r["base"] == r["label"] for r in rows)
        smoothed = sum(r["prediction"] == r["label"] for r in rows)
        lines.append(f"base accuracy (no noise)   {share(base, len(rows))}")
        lines.append(f"smoothed accuracy          {share(smoothed, len(rows))}")
    else:
        lines += _each(rows)
    lines.append(f"abstained                  {abstained} of {len(rows)}")
    if table:
        lines.append(
            f"Each certificate holds for its image with probability at least {1 - header['alpha']:g} over the noise draws: "
            "no l2 change smaller than its radius alters the smoothed classifier's prediction."
        )
    else:
        lines.append(f"Each prediction is the smoothed classifier's with probability at least {1 - header['alpha']:g}.")
    return "\n".join(lines)


def _each(rows: list[dict[str, Any]], most: int = 20) -> list[str]:
    """Without labels there is no accuracy: the predictions themselves."""
    from analysis.tables import render

    shown = [
        [r["id"], "abstains" if r["prediction"] < 0 else str(r["prediction"]), "-" if r["radius"] is None else f"{_floor(r['radius'])}"]
        for r in rows[:most]
    ]
    more = [f"... and {len(rows) - most} more, in the run file"] if len(rows) > most else []
    return [render(["image", "class", "l2 radius"], shown, "text"), *more, ""]


def _floor(radius: float) -> str:
    """Four decimals, rounded down: a radius is never shown larger than it is."""
    return f"{int(radius * 10_000) / 10_000:.4f}"


def _run_path(out: str | None, header: dict[str, Any]) -> Path:
    """Where the run goes: a file as named, or a telling name in a folder."""
    from certify.records import identity_digest

    target = Path(out or "runs")
    if target.suffix == ".jsonl":
        return target
    if target.suffix and not target.is_dir():
        raise UserError(f"--out {out!r}: expected a file ending in .jsonl, or a folder")
    words = (Path(header["model"]).stem, Path(header["data"]).stem, f"sigma{header['sigma']:g}", f"n{header['n']}")
    name = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)
    return target / f"{name}-{identity_digest(header)}.jsonl"


def _device(wanted: str) -> str:
    import torch

    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    if wanted == "auto":
        return accelerators[0] if accelerators else "cpu"
    known = ["cpu", *accelerators, *(["cuda"] if torch.cuda.is_available() else [])]
    if wanted not in known:
        raise UserError(f"--device {wanted!r} does not exist on this machine; expected auto or one of {', '.join(known)}")
    return wanted


def _list(values: Any) -> str:
    return ",".join(f"{v:g}" for v in values)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _quoted(args: list[str]) -> list[str]:
    import shlex

    return [shlex.quote(a) for a in args]


def _say(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    pass


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)
