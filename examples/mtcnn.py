"""The refinement and output networks of MTCNN, a trained face detector (Zhang et al. 2016, arXiv 1604.02878).

Weights: ``rnet.pt`` and ``onet.pt`` of the package facenet-pytorch 2.6.0 (MIT licence). The parameter names are theirs.

    parasym audit examples/mtcnn.py:rnet --weights rnet.pt
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RNet(nn.Module):
    """Three convolutions and a dense layer on 24 x 24 patches: is it a face, and how should its box move?"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (batch, 3, 24, 24) in [-1, 1] -> box moves (batch, 4) and face probabilities (batch, 2)."""
        x = self.pool(self.prelu1(self.conv1(x)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(x.permute(0, 3, 2, 1).flatten(1)))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


class ONet(nn.Module):
    """Four convolutions and a dense layer on 48 x 48 patches; adds the five landmarks of the face."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)
        self.pool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.pool2 = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (batch, 3, 48, 48) in [-1, 1] -> box moves (batch, 4), landmarks (batch, 10), face probabilities (batch, 2)."""
        x = self.pool3(self.prelu1(self.conv1(x)))
        x = self.pool3(self.prelu2(self.conv2(x)))
        x = self.pool2(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(x.permute(0, 3, 2, 1).flatten(1)))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


def _patches(side: int) -> tuple[Tensor]:
    """Eight patches of uniform noise in [-1, 1], the range the detector was trained on."""
    return (2 * torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)) - 1,)


def rnet() -> tuple[nn.Module, tuple[Tensor]]:
    """R-Net without weights, and patches for it."""
    return RNet().eval(), _patches(24)


def onet() -> tuple[nn.Module, tuple[Tensor]]:
    """O-Net without weights, and patches for it."""
    return ONet().eval(), _patches(48)
