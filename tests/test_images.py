"""Sources of images: ids, labels by name, selections, transforms."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from certify import load_classifier, load_images
from certify.errors import ImageError, UserError
from certify.images.decode import decode
from certify.images.sources import DATASETS, open_source
from certify.models.classifier import Classifier
from certify.models.labels import imagenet_classes, map_names


def png(value: int, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def tree(root: Path, files: list[str]) -> Path:
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(10 * i))
    return root


def archive(path: Path, files: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for i, name in enumerate(files):
            out.writestr(name, png(10 * i))
        out.writestr("__MACOSX/._x.png", b"rubbish")
        out.writestr("readme.txt", b"text")
    return path


def test_class_folders_and_zip_agree(tmp_path: Path, digits: Classifier) -> None:
    files = ["7/a.png", "7/b.png", "3/a.png", "0/c.PNG"]
    folder = load_images(str(tree(tmp_path / "d", files)), digits)
    zipped = load_images(str(archive(tmp_path / "d.zip", [f"outer/test/{f}" for f in files])), digits)
    for images in (folder, zipped):
        assert [item.id for item in images.items] == ["0/c.PNG", "3/a.png", "7/a.png", "7/b.png"]
        assert images.labels == [0, 3, 7, 7]
        assert images.rule == "by name (3 of 10 classes)"
    for i in range(4):
        assert torch.equal(folder.load(i), zipped.load(i))
    assert torch.equal(folder.load(3), torch.full((1, 8, 8), 10 / 255))


def test_flat_folder_single_image_and_labels_file(tmp_path: Path, digits: Classifier) -> None:
    folder = tree(tmp_path / "flat", ["b.png", "a.png"])
    images = load_images(str(folder), digits)
    assert [i.id for i in images.items] == ["a.png", "b.png"]
    assert images.labels == [None, None]
    assert not images.labelled
    (tmp_path / "labels.csv").write_text("file,label\nb.png,4\na.png,0\n")
    assert load_images(str(folder), digits, labels=tmp_path / "labels.csv").labels == [0, 4]
    single = load_images(str(folder / "a.png"), digits)
    assert [i.id for i in single.items] == ["a.png"]


def test_a_split_beside_another_is_refused(tmp_path: Path, digits: Classifier) -> None:
    root = tree(tmp_path / "both", ["train/1/a.png", "test/1/a.png"])
    with pytest.raises(UserError, match="choose one, such as"):
        load_images(str(root), digits)
    assert load_images(str(root / "test"), digits).labels == [1]


def test_class_map_and_ignored_labels(tmp_path: Path, digits: Classifier) -> None:
    root = str(tree(tmp_path / "d", ["eins/a.png", "zwei/a.png"]))
    with pytest.raises(UserError, match="class_map"):
        load_images(root, digits)
    (tmp_path / "map.csv").write_text("eins,1\nzwei,2\n")
    (tmp_path / "map.json").write_text('{"eins": "1", "zwei": 2}')
    for name in ("map.csv", "map.json"):
        assert load_images(root, digits, class_map=tmp_path / name).labels == [1, 2]
    assert load_images(root, digits, labels="none").labels == [None, None]


@pytest.mark.parametrize(
    ("names", "classes", "k", "mapped", "rule"),
    [
        (["n01443537", "n01440764"], "imagenet", 1000, {"n01440764": 0, "n01443537": 1}, "by name"),
        (["goldfish", "tench"], "imagenet", 1000, {"tench": 0, "goldfish": 1}, "by name"),
        (["Great_White_Shark"], "imagenet", 1000, {"Great_White_Shark": 2}, "by name"),
        (["0", "2", "10"], None, 11, {"0": 0, "2": 2, "10": 10}, "indices"),
        (["b", "a", "c"], None, 3, {"a": 0, "b": 1, "c": 2}, "sorted order"),
        (["01", "02", "03"], None, 3, {"01": 0, "02": 1, "03": 2}, "sorted order"),
    ],
)
def test_class_names_are_mapped_to_indices(
    names: list[str], classes: str | None, k: int, mapped: dict[str, int], rule: str
) -> None:
    found, how = map_names(names, imagenet_classes() if classes else None, k)
    assert found == mapped
    assert rule in how


@pytest.mark.parametrize(
    ("names", "classes", "k", "text"),
    [
        (["a", "b"], None, 3, "cannot tell which"),
        (
            ["Apfel", "Birne", "Kuh"],
            "imagenet",
            3,
            "3 of 3 class names are not the classifier's",
        ),  # never by the alphabet
        ([f"{i:04}" for i in range(1, 1001)], "imagenet", 1000, "cannot tell which"),
        ([str(i) for i in range(1, 11)], None, 10, "cannot tell which"),  # 1, 10, 2, ...: sorted order is no order
        (["tench", "no such thing"], "imagenet", 1000, r"1 of 2 class names .*no such thing"),
        (["crane"], "imagenet", 1000, "several classes: crane"),  # the bird and the machine
    ],
)
def test_unclear_class_names_require_a_class_map(names: list[str], classes: str | None, k: int, text: str) -> None:
    with pytest.raises(UserError, match=text):
        map_names(names, imagenet_classes() if classes else None, k)


def test_dataset_order_precedes_alphabetical_order() -> None:
    order = ["T-shirt", "Trouser", "Ankle boot"]
    assert map_names(order, None, 3, order=order)[0] == {"T-shirt": 0, "Trouser": 1, "Ankle boot": 2}


def test_selection(digits: Classifier) -> None:
    everything = load_images("digits", digits)
    assert (len(everything), everything.available) == (500, 500)
    assert [i.id for i in load_images("digits", digits, skip=100).items] == ["1297", "1397", "1497", "1597", "1697"]
    assert [i.id for i in load_images("digits", digits, skip=100, max_images=2).items] == ["1297", "1397"]
    assert [i.id for i in load_images("digits", digits, ids=["1300", "1299"]).items] == ["1300", "1299"]
    assert everything.digest() != load_images("digits", digits, skip=2).digest()
    halves = [load_images("digits", digits, skip=2, start=start) for start in (0, 1)]
    assert sorted(i.id for half in halves for i in half.items) == sorted(i.id for i in everything.items)
    assert halves[1].selection["start"] == 1
    with pytest.raises(UserError, match="start=500: expected a whole number from 0 to 499"):
        load_images("digits", digits, start=500)


def test_digits_are_the_held_out_ones(digits: Classifier) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = load_images("digits", digits)
    assert images.labels == found.target[1297:].tolist()
    assert np.allclose(images.load(0)[0].numpy(), found.images[1297] / 16)


def test_photos(digits: Classifier) -> None:
    photos = load_images("photos", digits)
    assert [i.id for i in photos.items] == ["china.jpg", "flower.jpg"]
    assert photos.load(0).shape == (1, 8, 8)


@pytest.mark.parametrize("layout", ["grey", "last", "first", "float"])
def test_npz(layout: str, tmp_path: Path, digits: Classifier) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    arrays = {"grey": x, "last": x[..., None], "first": x[:, None], "float": (x / 255).astype(np.float32)}
    np.savez(tmp_path / "d.npz", x=arrays[layout], y=np.array([3, 1, 4, 1, 5]))
    images = load_images(str(tmp_path / "d.npz"), digits)
    assert images.labels == [3, 1, 4, 1, 5]
    assert torch.allclose(images.load(2), torch.from_numpy(x[2] / 255.0).float()[None], atol=1e-7)


def test_mnist_files_and_a_missing_one(tmp_path: Path, digits: Classifier) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), rng.integers(0, 10, 6, dtype=np.uint8)
    for part in ("train", "t10k"):
        header = np.array([0x803, 6, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 6], ">i4").tobytes() + y.tobytes())
    images = load_images("mnist", digits, root=tmp_path)
    assert images.labels == y.tolist()
    assert images.load(0).shape == (1, 8, 8)
    for name in ("cifar10", "cifar100", "fashion_mnist", "imagenet"):
        with pytest.raises(UserError, match="root"):
            load_images(name, digits, root=tmp_path / "nowhere")


def test_cifar10_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as torchvision wants them (its checksums patched to these files'), labels by its own names."""
    import hashlib
    import pickle

    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": x, "labels": [9, 0, 3, 5]})
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    meta = pickle.dumps({"label_names": names})
    (folder / "test_batch").write_bytes(batch)
    (folder / "batches.meta").write_bytes(meta)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [["test_batch", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(meta).hexdigest()})
    source = open_source("cifar10", root=tmp_path)
    assert [item.name for item in source.items] == ["truck", "airplane", "cat", "dog"]
    assert np.array_equal(np.asarray(source.items[1].read()), x[1].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_embedded_datasets_have_unique_ids(name: str) -> None:
    assert name in DATASETS
    ids = [item.id for item in open_source(name).items]
    assert len(set(ids)) == len(ids)


def test_arrays_are_preprocessed_like_files(tmp_path: Path) -> None:
    """Arrays and files of one picture give the same image, overshoot and all (resnet50 resizes like this one)."""
    import timm
    from sklearn.datasets import load_sample_images

    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.pth")
    classifier = load_classifier("test_vit", weights=tmp_path / "vit.pth")
    assert "bicubic" in classifier.input.steps
    photos = load_images("photos", classifier)
    found = load_sample_images()
    (tmp_path / "p").mkdir()
    for name, picture in zip(found.filenames, found.images, strict=True):
        Image.fromarray(picture).save(tmp_path / "p" / f"{Path(name).stem}.png")
    files = load_images(str(tmp_path / "p"), classifier)
    np.savez(tmp_path / "p.npz", x=np.stack([np.asarray(i) / np.float32(255) for i in found.images]))
    arrays = load_images(str(tmp_path / "p.npz"), classifier)
    for i in range(2):
        assert torch.equal(photos.load(i), files.load(i))
        assert (arrays.load(i) - files.load(i)).abs().mean() < 0.01  # tensors are resized without 8-bit rounding


def test_a_zipped_flat_folder_has_no_classes(tmp_path: Path, digits: Classifier) -> None:
    images = load_images(str(archive(tmp_path / "p.zip", ["photos/a.png", "photos/b.png"])), digits)
    assert images.labels == [None, None]
    assert load_images(str(archive(tmp_path / "seven.zip", ["7/a.png"])), digits).labels == [7]


def test_ambiguous_labels_are_refused(tmp_path: Path, digits: Classifier) -> None:
    root = str(tree(tmp_path / "d", ["1/a.png", "2/a.png"]))
    (tmp_path / "labels.csv").write_text("a.png,1\n")
    with pytest.raises(UserError, match=r"several images are called 'a.png'"):
        load_images(root, digits, labels=tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("1/a.png,1\n2/a.png,2\n1/a.png,3\n")
    with pytest.raises(UserError, match="twice with different classes"):
        load_images(root, digits, labels=tmp_path / "labels.csv")


def test_decompression_bomb_in_an_npz_is_refused(tmp_path: Path, digits: Classifier) -> None:
    """A few hundred bytes whose header claims a petabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as out:
        out.writestr("x.npy", header.getvalue())
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        load_images(str(tmp_path / "bomb.npz"), digits)


def test_floating_point_files_are_refused(tmp_path: Path, digits: Classifier) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="floating-point"):
        load_images(str(tmp_path / "f.tif"), digits).load(0)


def test_one_bad_image_does_not_affect_the_others(tmp_path: Path, digits: Classifier) -> None:
    root = tree(tmp_path / "d", ["a.png", "b.png"])
    (root / "b.png").write_bytes(png(5, 64)[:-30])
    images = load_images(str(root), digits)
    assert images.load(0).shape == (1, 8, 8)
    with pytest.raises(ImageError, match="damaged"):
        images.load(1)


@pytest.mark.slow
def test_ids_of_the_real_zip(shared_data: Path, digits: Classifier) -> None:
    source = open_source(str(shared_data / "cifar10_jpeg_test.zip"))
    assert len(source.items) == 10_000
    assert len({item.id for item in source.items}) == 10_000
    assert {item.name for item in source.items} == set(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    )
    assert source.items[0].id.startswith("airplane/")


@pytest.mark.parametrize("error", [struct.error("unpack requires 4 bytes"), zlib.error("-3"), TypeError("None")])
def test_any_decoder_error_means_a_damaged_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*given: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("certify.images.decode.Image.open", stumble)
    with pytest.raises(ImageError, match="is damaged"):
        decode(b"an image")
