"""The hybrid of bench/cpu_step.py in plain torch: what one writes without a framework.

The layers are those of our `small` model: RMSNorm before each mixer, QK-norm, RoPE on half of a
head's channels, lightning attention in chunks with a gated group norm, every fourth layer softmax
attention with two key-value heads, sigmoid routing in groups, a shared expert. Experts run one
after another on their sorted tokens. Nothing is packed: rows are of equal length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, GROUP, HEADS, QUERY_GROUPS, HEAD_DIM = 8, 4, 4, 2, 64
ROTATED, NORM_GROUPS, CHUNK = 32, 2, 64
EXPERTS, TOP_K, EXPERT_GROUPS, EXPERT_DIM, DENSE_DIM, SCALING = 16, 2, 4, 128, 768, 2.5
EPSILON = 1e-6


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a projection without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class SwiGlu(nn.Module):
    """silu(x a) * (x b), projected back."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = linear(hidden, 2 * inner), linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., hidden]."""
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Experts(nn.Module):
    """Two of sixteen experts a token, and a shared one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.router = linear(hidden, EXPERTS)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.experts = nn.ModuleList(SwiGlu(hidden, EXPERT_DIM) for _ in range(EXPERTS))
        self.shared = SwiGlu(hidden, EXPERT_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, s, hidden]."""
        tokens = x.flatten(0, 1)
        scores = torch.sigmoid(self.router(tokens))
        grouped = (scores.detach() + self.bias).view(-1, EXPERT_GROUPS, EXPERTS // EXPERT_GROUPS)
        best = grouped.topk(2, -1).values.sum(-1).argmax(-1)  # the group of each token
        own = F.one_hot(best, EXPERT_GROUPS).bool()[..., None]
        chosen = grouped.masked_fill(~own, -torch.inf).flatten(1).topk(TOP_K, -1).indices
        weights = scores.gather(1, chosen)
        weights = SCALING * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        order = chosen.flatten().argsort(stable=True)
        rows = order // TOP_K
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        parts = tokens[rows].split(counts)
        outputs = [expert(p) for expert, p in zip(self.experts, parts, strict=True) if len(p)]
        output = torch.cat(outputs) * weights.flatten()[order, None]
        routed = torch.zeros_like(tokens).index_add(0, rows, output)
        return routed.view_as(x) + self.shared(x)


class Attention(nn.Module):
    """Softmax attention, or lightning attention with a gated group norm."""

    def __init__(self, hidden: int, index: int) -> None:
        super().__init__()
        self.softmax = (index + 1) % GROUP == 0
        inner = HEADS * HEAD_DIM
        self.kv_heads = QUERY_GROUPS if self.softmax else HEADS
        self.qkv = linear(hidden, (HEADS + 2 * self.kv_heads) * HEAD_DIM)
        self.q_norm, self.k_norm = (nn.RMSNorm(HEAD_DIM, eps=EPSILON) for _ in range(2))
        self.out = linear(inner, hidden)
        if not self.softmax:
            self.gate = linear(hidden, inner)
            self.weight = nn.Parameter(torch.ones(inner))
            slopes = torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
            self.register_buffer("slopes", slopes * (1 - index / (LAYERS - 1) + 1e-5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [b, s, hidden]."""
        b, s, _ = x.shape
        sizes = [HEADS, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).view(b, s, -1, HEAD_DIM).split(sizes, 2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [b, n, s, d]
        if self.softmax:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(o.transpose(1, 2).flatten(2))
        o = chunked(q, k, v, self.slopes).transpose(1, 2).reshape(b, s, NORM_GROUPS, -1)
        o = F.rms_norm(o, o.shape[-1:], eps=EPSILON).flatten(2) * self.weight
        return self.out(o * torch.sigmoid(self.gate(x)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [b, s, n, d] with its first channels rotated."""
    turned, kept = x[..., :ROTATED], x[..., ROTATED:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, kept], -1)


def chunked(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Return lightning attention [b, n, s, d]: chunks, their states scanned by one product."""
    chunks = q.shape[2] // CHUNK
    q, k, v = (y.unflatten(2, (chunks, CHUNK)) for y in (q * HEAD_DIM**-0.5, k, v))
    place = torch.arange(CHUNK)
    rate = slopes[:, None, None]
    inside = decay(rate, place[:, None] - place[None, :])[:, None]  # [n, 1, c, c]
    read = decay(rate, place[:, None] + 1)[:, None]  # [n, 1, c, 1]
    write = decay(rate, CHUNK - 1 - place[:, None])[:, None]
    number = torch.arange(chunks)
    transfer = decay(rate * CHUNK, number[:, None] - 1 - number[None, :])  # [n, chunks, chunks]
    updates = (k * write).mT @ v  # [b, n, chunks, d, d]
    states = (transfer @ updates.flatten(3)).view_as(updates)
    out = ((q @ k.mT) * inside) @ v + (q * read) @ states
    return out.flatten(2, 3)


def decay(rate: Tensor, distance: Tensor) -> Tensor:
    """Return exp(-rate * distance), 0 for a distance < 0."""
    return torch.exp(-rate * distance.clamp(min=0)) * (distance >= 0)


class Layer(nn.Module):
    """Mixer and MLP, each after a norm and added to what came."""

    def __init__(self, hidden: int, index: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=EPSILON) for _ in range(2))
        self.attention = Attention(hidden, index)
        self.mlp = SwiGlu(hidden, DENSE_DIM) if index == 0 else Experts(hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [b, s, hidden]."""
        x = x + self.attention(self.norms[0](x), cos, sin)
        return x + self.mlp(self.norms[1](x))


class Hybrid(nn.Module):
    """The whole model."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, index) for index in range(LAYERS))
        self.norm = nn.RMSNorm(hidden, eps=EPSILON)
        self.head = linear(hidden, vocabulary)
        self.apply(
            lambda m: nn.init.normal_(m.weight, std=0.08) if hasattr(m, "in_features") else 0
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [b, s, vocabulary] of [b, s] tokens."""
        place = torch.arange(tokens.shape[1])
        rates = 10000.0 ** (-torch.arange(0, ROTATED, 2) / ROTATED)
        angles = (place[:, None] * rates).repeat(1, 2)[:, None]  # [s, 1, r]
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))
