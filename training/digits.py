"""Train the embedded digits classifier.

    python -m training.digits --seed 0 --out certify/models/data/digits.safetensors

Plain training without noise on scikit-learn's first 1,297 digits: the default model shows the effect of smoothing on a
classifier that was not made robust. The last 500 digits are used once, for the accuracy on the card.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from certify.models.builtin import SHIPPED, TRAIN_IMAGES, digits_net

EPOCHS, BATCH, PEAK_RATE = 60, 64, 5e-3


def train(seed: int) -> tuple[nn.Module, float]:
    """Return the trained network and its accuracy on the 500 held-out digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    x, y = images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]

    torch.manual_seed(seed)
    net = digits_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * -(-len(x) // BATCH))
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = cross_entropy(net(x[batch]), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.inference_mode():
        held_out = (net(images[TRAIN_IMAGES:]).argmax(1) == labels[TRAIN_IMAGES:]).double().mean().item()
    return net, held_out


def main() -> None:
    """Run the command: train, and save the weights with their card."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(SHIPPED))
    options = parser.parse_args()
    net, held_out = train(options.seed)
    card = {
        "architecture": "digits_net: 64-128-128-10 perceptron, ReLU",
        "data": f"scikit-learn load_digits, images 0 to {TRAIN_IMAGES - 1}, values / 16",
        "objective": "cross entropy, label smoothing 0.05, no noise",
        "optimizer": f"AdamW, one cycle to {PEAK_RATE}, {EPOCHS} epochs of batches of {BATCH}",
        "seed": str(options.seed),
        "command": f"python -m training.digits --seed {options.seed}",
        "held-out accuracy": f"{held_out:.4f} on images {TRAIN_IMAGES} to 1796",
        "torch": torch.__version__.split("+")[0],
        "license": "MIT",
    }
    save_file(net.state_dict(), options.out, metadata=card)
    print(f"held-out accuracy {held_out:.4f}; wrote {options.out}")


if __name__ == "__main__":
    main()
