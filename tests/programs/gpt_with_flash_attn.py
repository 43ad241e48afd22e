"""A small GPT as programs for flash-attn write it: training on packed sequences, then generation with a cache."""
import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb
from torch import nn

VOCAB, DIM, HEADS, LAYERS, LONGEST = 17, 32, 4, 2, 64
HEAD_DIM = DIM // HEADS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x, cos, sin, cu_seqlens=None, max_seqlen=None, cache=None, cache_seqlens=None):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, HEAD_DIM))
        if cache is None:                                   # packed: x [total, DIM]
            q, k, v = qkv.unbind(1)
            q, k = (apply_rotary_emb(t, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen) for t in (q, k))
            out = flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu_seqlens, max_seqlen, causal=True)
        else:                                               # x [B, new tokens, DIM]
            q, k, v = qkv.unbind(2)
            out = flash_attn_with_kvcache(q, *cache, k, v, cos, sin, cache_seqlens=cache_seqlens, causal=True,
                                          rotary_interleaved=False)
        x = x + self.proj(out.flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        angles = torch.outer(torch.arange(LONGEST), 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x, caches=None, **where):
        for block, cache in zip(self.blocks, caches or [None] * LAYERS, strict=True):
            x = block(x, self.cos, self.sin, cache=cache, **where)
        return self.head(x)

    def loss(self, ids, mask):
        """Of the next token, in sequences [B, S] with a mask of which tokens there are."""
        x, indices, cu_seqlens, max_seqlen, *_ = unpad_input(self.embed(ids), mask)
        logits = self(x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        logits = pad_input(logits, indices, *ids.shape)[:, :-1]
        targets = torch.where(mask, ids, -100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, prompt, tokens):
        """prompt [B, S] and what follows, [B, S + tokens]."""
        caches = [[torch.zeros(len(prompt), LONGEST, HEADS, HEAD_DIM) for _ in "kv"] for _ in self.blocks]
        seqlens = torch.zeros(len(prompt), dtype=torch.int32)
        ids, new = prompt, prompt
        for _ in range(tokens):
            logits = self(self.embed(new), caches, cache_seqlens=seqlens)
            seqlens += new.shape[1]
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
        return ids


def train(steps=60):
    """Counts upwards from a random start, modulo VOCAB; returns the model and its losses."""
    torch.manual_seed(0)
    model = GPT()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        lengths = torch.randint(2, 24, (8, 1))
        ids = (torch.randint(0, VOCAB, (8, 1)) + torch.arange(24)) % VOCAB
        loss = model.loss(ids, torch.arange(24) < lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses
