"""The two networks of the demo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers, 1.0M parameters: logits [B, 10] of [B, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, 312)
        self.head = nn.Linear(312, 10)

    def forward(self, images: Tensor) -> Tensor:  # [B, 1, 28, 28]
        """Logits."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [B, 32, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [B, 64, 7, 7]
        return self.head(F.relu(self.hidden(x.flatten(1))))  # [B, 10]


class CharGPT(nn.Module):
    """A decoder-only transformer with a tied head: logits [B, T, vocabulary] of indices [B, T]."""

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int = 128,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(_initialise)

    def forward(self, indices: Tensor) -> Tensor:  # [B, T]
        """Logits for the index that follows each."""
        # Expanded to [B, T]: looked up as [T], the table's gradient would already be summed over
        # the batch when it leaves the layer, and no example's share could be told from another's.
        positions = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
        x = self.dropout(self.wte(indices) + self.wpe(positions))  # [B, T, width]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        """The residual stream after this block."""
        x = x + self.dropout(self.proj(self._attend(self.norm1(x))))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, width)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
