"""Build classifiers from ONNX files, run by onnxruntime on the CPU."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.errors import UserError, shorten
from certify.models.checkpoints import refuse_weights
from certify.models.classifier import ClassifierSpec, InputSpec, square_input
from certify.models.file_kind import protobuf_fields
from certify.models.identity import file_digest
from certify.models.labels import default_class_names

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_BYTES = "tensor(uint8)"


class OnnxNet(nn.Module):
    """An ONNX graph with one image input, run by onnxruntime on the CPU.

    Images are float32 ``(B, C, H, W)`` in [0, 1]. They are converted for graphs that take another floating-point type,
    channels last, or 8-bit pixels (clipped and rounded).

    Args:
        path: the file.
        output: name of the output to use; empty to use the only one that can be scores or labels.
        num_classes: K, if known, to choose among several outputs.

    Raises:
        UserError: an unusable file, an unsupported input, or several candidate outputs.
    """

    def __init__(self, path: str, output: str = "", num_classes: int | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError("an ONNX model needs onnxruntime: pip install 'certify-toolkit[onnx]'") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has its own exception types, one for each kind of damage
            raise UserError(f"{path} is not a usable ONNX file ({_cause(error)})") from None
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(str(i.shape) for i in inputs)
            raise UserError(f"{path} takes {shapes}; expected one input (batch, channels, height, width)")
        self.input_name, self.kind = inputs[0].name, inputs[0].type
        if self.kind not in (*_TYPES, _BYTES):
            raise UserError(f"{path} takes {self.kind}; expected images in floating point or uint8")
        batch, *sides = (d if isinstance(d, int) and d > 0 else None for d in inputs[0].shape)
        self.batch, self.channels_last = batch, _channels_last(sides[0], sides[2])
        height, width, channels = sides if self.channels_last else (sides[1], sides[2], sides[0])
        self.size = (channels, height, width) if channels and height and width else None
        outputs = {o.name: list(o.shape) for o in self.session.get_outputs()}
        self.output = _choose_output(path, outputs, output, num_classes)
        self.width = outputs[self.output][1] if len(outputs[self.output]) == 2 else None

    def forward(self, images: Tensor) -> Tensor:
        """Return scores or labels for a batch of any size, padding it if the graph has a fixed batch size.

        Raises:
            RuntimeError: the graph fails on these images; the message is onnxruntime's cause.
        """
        array = images.cpu().numpy()
        if self.kind == _BYTES:
            array = (array.clip(0, 1) * np.float32(255)).round().astype(np.uint8)
        if self.channels_last:
            array = np.moveaxis(array, 1, 3)
        array = np.ascontiguousarray(array, dtype=_TYPES.get(self.kind, np.uint8))
        step = self.batch or len(array)
        parts = []
        for start in range(0, len(array), step):
            chunk = array[start : start + step]
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], step - len(chunk), axis=0)])
            try:
                parts.append(self.session.run([self.output], {self.input_name: filled})[0][: len(chunk)])
            except Exception as error:
                raise RuntimeError(_cause(error)) from error
        answer = np.concatenate(parts)
        return torch.from_numpy(answer.astype(np.float32) if answer.dtype == np.float16 else answer).to(images.device)


def _cause(error: Exception) -> str:
    """Return onnxruntime's reason for a failure, without error code, file name and C++ signature."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", text)
    text = re.sub(r"/\S+\.(cc|h|cpp|hpp):\d+ .*?\) (?=\S)", "", text)
    return shorten(text.rstrip(".") or type(error).__name__, 300)


def _channels_last(second: int | None, last: int | None) -> bool:
    """True if channels are the last dimension of an input: it has size 1 or 3, or else 2 or 4."""
    for usual in ((1, 3), (2, 4)):
        if second in usual:
            return False
        if last in usual:
            return True
    return False


def _choose_output(path: str, outputs: Mapping[str, list[Any]], named: str, num_classes: int | None) -> str:
    """Return the name of the output that holds scores or labels.

    Raises:
        UserError: no output of that name, or several candidates.
    """
    shown = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in outputs.items())
    if named:
        if named not in outputs:
            raise UserError(f"{path} has no output {named!r}; it has {shown}")
        return named
    usable = [name for name, shape in outputs.items() if len(shape) in (1, 2)] or list(outputs)
    fitting = [name for name in usable if num_classes and outputs[name][1:] == [num_classes]]
    (first, *others) = fitting if len(fitting) == 1 else usable
    if others:
        narrow = min(usable, key=lambda name: [d for d in outputs[name][1:] if isinstance(d, int)] or [1 << 62])
        raise UserError(
            f"{path} has several outputs: {shown}; choose the one with the class scores, "
            f"such as --model {path}::{narrow}"
        )
    return first


def build(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """Build the classifier of an ONNX file, ``FILE`` or ``FILE::OUTPUT``; its input size is used if stated."""
    refuse_weights(name, weights)
    path, _, output = name.partition("::")
    external = external_digests(Path(path))
    net = OnnxNet(path, output, num_classes)
    return ClassifierSpec(
        net,
        square_input(net.size) if net.size else InputSpec(None),
        default_class_names(net.width if isinstance(net.width, int) else num_classes),
        num_classes,
        Path(path).name,
        file_digest(path),
        native=False,
        closed=True,
        external=external,
        eight_bits=net.kind == _BYTES,
    )


def external_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each external data file of an ONNX graph, by its name in the graph.

    Raises:
        UserError: not an ONNX file, or an external file that is missing or outside the graph's folder.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            names = sorted(set(_locations(content, range(len(content)), "model")))
    except (ValueError, IndexError, RecursionError):  # an empty file cannot be mapped
        raise UserError(f"{path} is not a usable ONNX file (it is damaged, or something else)") from None
    digests = {}
    for name in names:
        place = PurePosixPath(name)
        if (
            place.is_absolute()
            or ".." in place.parts
            or "\\" in name
            or PureWindowsPath(name).drive
            or not name.isprintable()
        ):
            raise UserError(
                f"{path} keeps tensors in {name!r}, which is not in its own folder: refused; "
                "save it again with its data beside it"
            )
        if not (path.parent / place).is_file():
            raise UserError(
                f"{path} keeps its weights in {name}, which is not beside it; copy that file to {path.parent}"
            )
        digests[name] = file_digest(path.parent / place)
    return digests


_HOLDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Fields of onnx.proto, by number, on the path to tensors and to the locations of their external data."""


def _locations(content: mmap.mmap, message: range, kind: str) -> Iterator[str]:
    """Yield the external data files of the tensors in a message of this kind."""
    for number, value in protobuf_fields(content, message):
        inner = _HOLDS[kind].get(number)
        if inner == "entry":
            entry = {key: content[text.start : text.stop].decode() for key, text in protobuf_fields(content, value)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
        elif inner is not None:
            yield from _locations(content, value, inner)
