"""Certify your own network on your own tensors.

    python examples/own_module.py

The network takes images in [0, 1] and returns logits; no registration or wrapper is needed.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import certify

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
labels = torch.tensor(digits.target)

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(200):  # trained under noise, as a base classifier should be
    noisy = images[:1200] + 0.25 * torch.randn_like(images[:1200])
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(noisy), labels[:1200]).backward()
    optimizer.step()

run = certify.certify(network, images[1200:1220], labels[1200:1220], sigma=0.25, n=1000)
print(run.table([0, 0.25, 0.5]))
print(run[0].prediction, run[0].radius)
