"""The FID network in PyTorch, as pytorch-fid runs it, to time and test ours against; the two share no code."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    """relu(batch_norm(conv(x)))"""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, inputs, pool):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class B(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class C(nn.Module):
    def __init__(self, width):
        super().__init__()
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **column)
        self.branch7x7dbl_3 = Conv(width, width, **row)
        self.branch7x7dbl_4 = Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], 1)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class E(nn.Module):
    def __init__(self, inputs, pool):
        super().__init__()
        row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(inputs, 192, 1)
        self.pool = pool

    def forward(self, x):
        three, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class TorchInception(nn.Module):
    """Parameters named as in pytorch-fid's file; `complete=False`: those up to mixed_7 alone."""

    def __init__(self, complete: bool = True):
        super().__init__()
        self.complete = complete
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        if complete:
            self.Mixed_7a = D()
            self.Mixed_7b = E(1280, _average)
            self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
            self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        """x (B, 3, 299, 299) from -1 to 1 -> features by their names in `vq4dit_jax.evaluation.networks.inception`."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        out = {}
        x = self.Mixed_6d(x)
        out["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        out["mixed_7"] = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.complete:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            out["pool_3"] = F.adaptive_avg_pool2d(x, 1).flatten(1)
            out["logits"] = out["pool_3"] @ self.fc.weight.T
        return out
