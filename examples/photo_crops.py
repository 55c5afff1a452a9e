"""Cut photographs into squares, to train purifiers without labels (``ncis``).

    python examples/photo_crops.py photographs/ crops.npz --side 64

Each photograph is resized to three sizes, for textures at several scales, and cut into non-overlapping squares. Flat
squares are left out. ``y`` is the photograph's number. ``certify train`` holds out squares at random, so held-out
squares come from photographs that are also used for training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SHORT_SIDES = (256, 384, 512)
FLAT = 8
"""Standard deviation of the 8-bit pixels below which a square is left out."""


def pieces(path: Path, side: int) -> list[np.ndarray]:
    """Return the squares of one photograph: uint8 arrays ``(side, side, 3)``."""
    squares = []
    with Image.open(path) as photograph:
        whole = photograph.convert("RGB")
    for short in SHORT_SIDES:
        scale = short / min(whole.size)
        small = np.asarray(
            whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.LANCZOS)
        )
        for top in range(0, small.shape[0] - side + 1, side):
            for left in range(0, small.shape[1] - side + 1, side):
                piece = small[top : top + side, left : left + side]
                if piece.std() >= FLAT:
                    squares.append(piece)
    return squares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Cut photographs into squares, as .npz")
    parser.add_argument("photographs", type=Path, help="folder of JPEG or PNG files")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--side", type=int, default=64, help="pixels (default: 64)")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.photographs.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    cut = [pieces(path, arguments.side) for path in paths]
    np.savez_compressed(
        arguments.out,
        x=np.stack([piece for found in cut for piece in found]),
        y=np.concatenate([np.full(len(found), number) for number, found in enumerate(cut)]),
    )
    print(f"{sum(map(len, cut)):,} pieces of {len(paths)} photographs in {arguments.out}")
