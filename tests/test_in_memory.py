"""Images given as Python objects: what is certified is what was passed, with its own label."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import certify
from certify import SmoothedClassifier, UserError, load_classifier, load_images
from certify.images.decode import decode
from certify.images.in_memory import collect

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"sigma": 0.25, "n0": 10, "n": 50, "progress": False}


class Images(Dataset[Any]):
    """Pairs of an image and its position."""

    def __init__(self, targets: list[int] | None = None, noise: float = 0.0) -> None:
        self.noise, self.reads = noise, 0
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return (IMAGES[index] + self.noise * torch.rand(1)).clamp(0, 1), index


def test_labels_are_those_that_come_with_the_images() -> None:
    run = certify.certify("digits", Images(), **OPTIONS)
    assert [row.label for row in run] == [0, 1, 2, 3]
    assert [row.label for row in certify.certify("digits", Images([0, 1, 2, 3]), **OPTIONS)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="image 1: the Images returns label 1 but its targets say 7"):
        certify.certify("digits", Images([0, 7, 2, 3]), **OPTIONS)


def test_a_data_set_that_changes_between_reads_is_refused() -> None:
    with pytest.raises(UserError, match="image 0 of the Images differs between two reads"):
        certify.certify("digits", Images(noise=0.1), **OPTIONS)


def shuffled(**how: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, torch.arange(4)), **how)


@pytest.mark.parametrize(
    "loader",
    [
        shuffled(batch_size=2, shuffle=True),
        shuffled(batch_sampler=BatchSampler(RandomSampler(range(4)), 2, False)),
        shuffled(batch_sampler=[[1, 0], [3, 2]]),
    ],
)
def test_separate_labels_of_a_shuffled_loader_are_refused(loader: DataLoader[Any]) -> None:
    with pytest.raises(UserError, match="labels with a DataLoader that does not keep the order"):
        collect(loader, [0, 1, 2, 3])
    with pytest.raises(UserError, match="ids with a DataLoader that does not keep the order"):
        collect(loader, ids=["a", "b", "c", "d"])
    found = collect(loader)  # its own labels belong to their images
    for item, label in zip(found.items, found.labels, strict=True):
        assert label is not None
        assert np.array_equal(item.read(), IMAGES[label].numpy())


def test_a_loader_in_order_takes_separate_labels() -> None:
    assert collect(shuffled(batch_size=3), [3, 2, 1, 0]).labels == [3, 2, 1, 0]


def test_an_image_set_is_certified_as_by_its_name() -> None:
    images = load_images("digits", load_classifier("digits"), skip=100)
    by_set = certify.certify("digits", images, **OPTIONS)
    by_name = certify.certify("digits", "digits", skip=100, **OPTIONS)
    assert [(row.id, row.label, row.votes) for row in by_set] == [(row.id, row.label, row.votes) for row in by_name]
    assert [row.label for row in certify.certify("digits", images, [1, 2, 3, 4, 5], **OPTIONS)] == [1, 2, 3, 4, 5]


def test_one_layout_of_channels_is_as_good_as_another() -> None:
    pixels = (torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    channels_last = pixels.permute(1, 2, 0).numpy()
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(162, 10)).eval()
    forms = [
        pixels,
        pixels.numpy(),
        channels_last,
        torch.from_numpy(channels_last.copy()),
        Image.fromarray(channels_last),
    ]
    answers = [SmoothedClassifier(module, 0.25).certify(form, n0=10, n=50, image_id="x") for form in forms]
    assert all(answer == answers[0] for answer in answers)
    batch = SmoothedClassifier(module, 0.25).certify(channels_last[None], n0=10, n=50, image_id=["x"])  # type: ignore[arg-type]
    assert batch == [answers[0]]
    runs = [certify.certify(module, [form], ids=["x"], **OPTIONS) for form in forms]
    assert all(run[0].votes == runs[0][0].votes for run in runs)
    assert certify.certify(module, forms[-1], ids=["x"], **OPTIONS)[0].votes == runs[0][0].votes  # without a list


def test_a_grey_picture_is_an_image_of_one_channel() -> None:
    grey = Image.fromarray((IMAGES[0, 0].numpy() * 255).astype(np.uint8))
    g = SmoothedClassifier("digits", 0.25)
    assert g.predict(grey, n=50) == g.predict(np.asarray(grey)[None], n=50)


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "LA", "I;16"])
def test_pictures_without_plain_values_are_read_as_their_files(mode: str) -> None:
    """The numbers of a palette image are no brightness."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = Image.new("I;16", (8, 8), 257 * 51) if mode == "I;16" else colours.convert(mode)
    file = io.BytesIO()
    picture.save(file, "TIFF")
    expected = decode(file.getvalue(), 3)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
    classifier = load_classifier(module, input_size=(3, 8, 8))
    by_object, by_file = (certify.certify(classifier, [one], ids=["x"], **OPTIONS)[0] for one in (picture, expected))
    assert by_object.votes == by_file.votes
