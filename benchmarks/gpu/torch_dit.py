"""The peer: a DiT of torch's own modules, with facebookresearch/DiT's parameter names, and its sampler step.

The same mathematics as `vq4dit_jax.networks.dit`, with which it shares no code: `tests/test_torch_peer.py` compares them.
NCHW, as torch has it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) -> (B, 2C, H, W). Random weights, all of them: no adaLN-Zero."""

    def __init__(self, input_size=32, patch_size=2, channels=4, width=1152, depth=28, heads=16, num_classes=1000):
        super().__init__()
        self.patch_size, self.channels, self.num_classes = patch_size, channels, num_classes
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch_size, stride=patch_size)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (input_size // patch_size) ** 2, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch_size**2 * 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        x, p = self.final_layer(x, c), self.patch_size
        grid = math.isqrt(x.shape[1])
        x = x.view(-1, grid, grid, p, p, 2 * self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 2 * self.channels, grid * p, grid * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """y = [labels, null]; the first half of x is read twice. Three channels are guided, as in the reference."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, null = out[:, :3].chunk(2)
        guided = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


def sampler_step(model: DiT, table: Tensor, x: Tensor, i: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """One DDPM step with guidance 4 of latents x (B, C, H, W) in float32, as `vq4dit_jax.diffusion.ddpm_step`; i (1,).

    `table` (7, N): time steps, sqrt(1 - a), sqrt(a), the posterior's factors of x_0 and x_t, and the ends of its log variance.
    """
    t, noise_part, signal, by_x0, by_xt, low, high = table.index_select(1, i)
    y = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    both = torch.cat([x, x]).to(model.pos_embed.dtype)
    out = model.forward_with_cfg(both, t.expand(len(both)), y, 4.0)[: len(x)].float()
    eps, interpolation = out.chunk(2, dim=1)
    fraction = (interpolation + 1) / 2
    mean = by_x0 * (x - noise_part * eps) / signal + by_xt * x
    return mean + torch.exp(0.5 * (fraction * high + (1 - fraction) * low)) * noise
