"""Image files with odd metadata, hostile shapes, or other content than the name says."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from PIL import Image, PngImagePlugin
from raw_png import raw_png

from certify import load_classifier, load_images, read_run
from certify.errors import ImageError
from certify.models.classifier import Classifier

DIGIT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
PIXELS = torch.from_numpy(DIGIT / np.float32(255))[None]
MANY = 101  # scans, one more than the limit


def encoded(kind: str = "PNG", image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(DIGIT)).save(out, kind, **options)
    return out.getvalue()


def with_chunk(kind: bytes, data: bytes, *, sound: bool = True) -> bytes:
    """The digit with one more chunk behind its header, whose checksum is right or wrong."""
    content, part = encoded(), kind + data
    chunk = struct.pack(">I", len(data)) + part + struct.pack(">I", zlib.crc32(part) ^ (not sound))
    return content[:33] + chunk + content[33:]


def text_chunks(count: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    for i in range(count):
        text.add_text(f"t{i}", "a" * 1_000_000, zip=True)
    return encoded(pnginfo=text)


ODD = {
    "a profile of two megabytes": with_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))),
    "a text with a wrong checksum": with_chunk(b"tEXt", b"Comment\0hello", sound=False),
    "an exif with a wrong checksum": with_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", sound=False),
    "an international text of two megabytes": with_chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(bytes(2_000_000))),
    "texts of 70 megabytes": text_chunks(70),
    "a time of no length": with_chunk(b"tIME", b""),
    "gamma of no length": with_chunk(b"gAMA", b""),
}


@pytest.mark.parametrize("odd", ODD)
def test_broken_metadata_does_not_prevent_decoding(odd: str, tmp_path: Path, digits: Classifier) -> None:
    (tmp_path / "x.png").write_bytes(ODD[odd])
    assert torch.equal(load_images(str(tmp_path / "x.png"), digits).load(0), PIXELS)


def test_damaged_pixels_are_refused(tmp_path: Path, digits: Classifier) -> None:
    header, pixels = bytearray(encoded()), bytearray(encoded())
    header[30] ^= 1  # its checksum
    pixels[45] ^= 255  # compressed
    for content, why in ((header, "is damaged: a PNG image whose header"), (pixels, "is damaged")):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ImageError, match=why):
            load_images(str(tmp_path / "x.png"), digits).load(0)


@pytest.fixture(scope="module")
def at_224() -> Classifier:
    """Any classifier that resizes to 224."""
    return load_classifier(lambda images: images.flatten(1).sum(1).long() * 0, input_size=(3, 224, 224), num_classes=2)


THIN = raw_png(1, 12_000, 8, 0, bytes(2 * 12_000))


def test_extreme_aspect_ratio_is_refused_before_resizing(tmp_path: Path, at_224: Classifier) -> None:
    """Resized, 1 x 12,000 pixels would be 224 x 2,688,000: seven gigabytes of floats."""
    expected = "the longer side may be at most 100 times the shorter"
    (tmp_path / "thin.png").write_bytes(THIN)
    with pytest.raises(ImageError, match=f"has 1x12000 pixels; {expected}"):
        load_images(str(tmp_path / "thin.png"), at_224).load(0)
    for name, array in {"bytes": np.zeros((1, 1, 12_000), np.uint8), "floats": np.zeros((1, 12_000, 1, 3))}.items():
        np.savez(tmp_path / f"{name}.npz", x=array)
        with pytest.raises(ImageError, match=expected):
            load_images(str(tmp_path / f"{name}.npz"), at_224).load(0)
    (tmp_path / "long.png").write_bytes(raw_png(100, 1, 8, 0, bytes(101)))
    assert load_images(str(tmp_path / "long.png"), at_224).load(0).shape == (3, 224, 224)


PROGRESSIVE = encoded(
    "JPEG", Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)), progressive=True
)


def many_scans(between: bytes = b"") -> bytes:
    """A progressive JPEG that refines its last bit again and again."""
    last = PROGRESSIVE.rindex(b"\xff\xda")
    return PROGRESSIVE[:-2] + (between + PROGRESSIVE[last:-2]) * MANY + PROGRESSIVE[-2:]


@pytest.mark.parametrize("between", [b"", b"\xff\xff\xff", b"\xff\xfe\0\4ab", b"\xff\2\xff\xff", b"\xff\xd0"])
def test_a_scan_bomb_is_refused(between: bytes, tmp_path: Path, digits: Classifier) -> None:
    """Also with fill bytes, comments, restarts or reserved markers (not skipped by length) between scans."""
    (tmp_path / "x.jpg").write_bytes(many_scans(between))
    with pytest.raises(ImageError, match="has more than 100 scans, the limit"):
        load_images(str(tmp_path / "x.jpg"), digits).load(0)


def test_jpeg_markers_in_metadata_are_not_counted_as_scans(tmp_path: Path, digits: Classifier) -> None:
    """A preview in a segment, a film behind the picture: as phones write them."""
    noise = b"\xff\xda" * MANY
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(noise)) + noise
    files = {"plain": PROGRESSIVE, "preview": PROGRESSIVE[:2] + segment + PROGRESSIVE[2:], "film": PROGRESSIVE + noise}
    seen = []
    for name, content in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        seen.append(load_images(str(tmp_path / f"{name}.jpg"), digits).load(0))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


PAGE = "\ufeff\n<!DOCTYPE html><html><body>Sign in</body></html>".encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_web_pages_and_lfs_pointers_named_as_images(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / f"a.{suffix}").write_bytes(PAGE)
    (folder / f"b.{suffix}").write_bytes(POINTER)
    (folder / f"c.{suffix}").write_bytes(SVG)
    (folder / "d.png").write_bytes(encoded())
    out = tmp_path / "x.jsonl"
    run(*f"--model digits --sigma 0.25 --n 100 --n0 10 --quiet --data {folder} --out {out}".split())
    errors = [row.get("error") for row in read_run(out).images]
    assert errors == [
        "is a web page, not an image: the download saved an HTML page; fetch the file itself",
        "is a Git LFS pointer, not an image; fetch the file itself (git lfs pull)",
        "is not an image (jpeg, png, webp, bmp, gif, tiff, ppm are read)",
        None,
    ]
