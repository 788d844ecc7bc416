"""A Llama/Qwen-style transformer: forward pass, cached generation, Hugging Face checkpoints in and out.

    x = embed(input_ids)
    x = x + attention(norm(x));  x = x + down(silu(gate(norm(x))) * up(norm(x)))       for every block
    logits = head(norm(x))

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202), a
bias on q, k and v for Qwen2, norms on q and k for Qwen3, a tied or untied head. Checkpoints of Llama, SmolLM2, Qwen2,
Qwen2.5 and Qwen3 load and save unchanged, so does what quantize.py made of them. Not here: sliding windows, mixtures of
experts, dropout, other formats of quantized weights.

A row is [prompt][completion][padding]. Causal attention never looks at what stands to the right, so that padding needs
no mask. `hidden_before(input_ids)[:, t]` is the state that predicts token t: the only shift in this codebase.

    python model.py --model out/sft/checkpoint "Please sort 3 1 2."     one answer
    python model.py --model DIR                                         a chat in the terminal
    python model.py --model DIR --raw "The reverse of cat dog is"       continue the text, no chat
"""

import argparse
import copy
import functools
import json
import math
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from data import chat
from data.formats import UserError
from data.tokenizer import Tokenizer, from_hf, save_hf

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Config:
    """The shape of a transformer; `rope_scaling` is None or the "llama3" dictionary of a Hugging Face config."""

    family: str  # "llama", "qwen2" or "qwen3": how the checkpoint calls itself
    vocab_size: int
    depth: int  # blocks
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_length: int
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True  # the head is the embedding
    labels: int = 0  # 0: a language model; 1: the head is one number, of a reward model or a critic
    out_bias: bool = False  # on what attention and feed-forward network add to the stream; prune.py makes such models
    ranks: dict[str, int] | None = None  # of the matrices of a block that are products of two; prune.py, too
    quantization: dict | None = None  # the scheme of QuantMatrix, where quantize.py made the checkpoint

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, max_length: int) -> "Config":
        """One dial for models that are trained here: width 32 * depth, two query heads to a key head, norms on q and k.

        With those norms a tiny model learns to copy from its context in about two thirds of the tokens.
        """
        width, head_dim = 32 * depth, 32 if depth < 12 else 64
        heads = max(1, width // head_dim)
        return cls(
            family="qwen3", vocab_size=vocab_size, depth=depth, width=width, heads=heads,
            kv_heads=heads // 2 if heads % 2 == 0 else heads, head_dim=head_dim, qk_norm=True,
            ffn_width=math.ceil(width * 8 / 3 / 64) * 64, max_length=max_length,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def linear(c: Config, name: str, n_in: int, n_out: int, bias: bool) -> nn.Module:
    """The matrix `name` of a block ("ffn.down"); if c.ranks has it, two smaller ones, `down` and then `up`."""
    if not c.ranks or name not in c.ranks:
        return nn.Linear(n_in, n_out, bias=bias)
    down, up = nn.Linear(n_in, c.ranks[name], bias=False), nn.Linear(c.ranks[name], n_out, bias=bias)
    return nn.Sequential(OrderedDict(down=down, up=up))


# keys, values, and the columns used of a cache, a tensor once it is pinned; None: of a prefix
Past = tuple[Tensor, Tensor, int | Tensor | None] | None


class Attention(nn.Module):
    """Grouped-query attention; q, k and v are one matrix, split only where a checkpoint is read or written."""

    def __init__(self, c: Config):
        super().__init__()
        self.sizes, self.head_dim = (c.heads, c.kv_heads, c.kv_heads), c.head_dim
        self.qkv = linear(c, "attention.qkv", c.width, sum(self.sizes) * c.head_dim, c.qkv_bias)
        self.out = linear(c, "attention.out", c.heads * c.head_dim, c.width, c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, past: Past) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 Hkv, d)
        if self.q_norm is not None:
            q, k, v = qkv.split_with_sizes(self.sizes, dim=2)
            q = kernels.qk_norm_rotary(q, self.q_norm.weight, self.q_norm.eps, cos, sin)
            k = kernels.qk_norm_rotary(k, self.k_norm.weight, self.k_norm.eps, cos, sin)
        else:
            qk, v = qkv.split_with_sizes((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=2)
            if torch.is_grad_enabled():
                v = v.contiguous()  # a view would keep all of qkv until the backward pass
            q, k = kernels.rotary(qk, cos, sin).split_with_sizes(self.sizes[:2], dim=2)
        if past is not None:
            keys, values, used = past
            if used is None:  # a learned prefix: the same before every row
                k, v = (torch.cat([x.to(y.dtype).expand(B, *x.shape), y], dim=1) for x, y in ((keys, k), (values, v)))
            elif isinstance(used, Tensor):
                k, v = keys.index_copy_(1, used, k.to(keys.dtype)), values.index_copy_(1, used, v.to(keys.dtype))
            else:
                keys[:, used : used + T], values[:, used : used + T] = k, v
                if used:  # else k and v are all there is, and lie better
                    k, v = keys[:, : used + T], values[:, : used + T]
        return self.out(kernels.attention(q, k, v, mask=mask).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up = linear(c, "ffn.gate_up", c.width, 2 * c.ffn_width, False)
        self.down = linear(c, "ffn.down", c.ffn_width, c.width, c.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(c.width, c.norm_eps), Attention(c)
        self.ffn_norm, self.ffn = RMSNorm(c.width, c.norm_eps), FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, past: Past) -> Tensor:
        h = self.attention(self.attention_norm(x), cos, sin, mask, past)
        h, x = kernels.add_rms_norm(h, x, self.ffn_norm.weight, self.ffn_norm.eps)
        return x + self.ffn(h)


class QuantMatrix(nn.Module):
    """A matrix (out, in) of a few bits a weight, as quantize.py makes it and the checkpoint holds it, tensor by tensor.

    scheme, one for all matrices of a checkpoint: "format" (int or nf4), "bits", "group_size", "symmetric" (no zeros),
    "activations" (8: tokens are rounded, too; else 16), "rotation" (of both sides: a seed, or None; 2307.13304).
    Columns `kept` (k,) are not quantized: theirs is kept_weight (out, k), and their codes stand for 0.
    """

    def __init__(self, shape: tuple[int, int], tensors: dict[str, Tensor], scheme: dict):
        super().__init__()
        self.shape, self.scheme, self.laid_out = tuple(shape), scheme, None
        for name in (*kernels.NF4._fields[:-1], *kernels.Packed._fields[:3], "kept", "kept_weight"):
            if name not in self._buffers:
                self.register_buffer(name, tensors.get(name))

    @property
    def q(self) -> kernels.Packed | kernels.NF4:
        if self.scheme["format"] == "nf4":
            return kernels.NF4(self.codes, self.scales, self.steps, self.mean, self.shape)
        return kernels.Packed(self.codes, self.scales, self.zeros, self.scheme["bits"], self.shape)

    def forward(self, x: Tensor) -> Tensor:
        seed, of_kept = self.scheme["rotation"], None
        if seed is not None:
            x = kernels.rotate(x, seed)
        if self.kept is not None:
            of_kept = F.linear(x[..., self.kept], self.kept_weight.to(x.dtype))
        if self.scheme["activations"] == 8:
            x = x if self.kept is None else x.index_fill(-1, self.kept.long(), 0.0)  # or they would set the scale
            y = kernels.int8_linear(x, self.q)
        elif (few := self._for_few_rows(x)) is not None:
            y = kernels.few_rows_linear(x, few)
        else:
            y = kernels.quantized_linear(x, self.q)
        y = y if of_kept is None else y + of_kept
        return y if seed is None else kernels.rotate(y, seed + 1, back=True)

    def _for_few_rows(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What kernels.few_rows_linear reads, a second copy, made when a bf16 model on a CPU first decodes."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
            return None
        if x.numel() > kernels.FEW * x.shape[-1]:
            return None
        if self.laid_out is None:
            self.laid_out = kernels.lay_out(self.q) or ()
        return self.laid_out or None

    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers())


class QuantLinear(nn.Module):
    """In the place of an nn.Linear: the matrices that a checkpoint keeps apart (q, k, v; gate, up), one by one."""

    def __init__(self, parts: Sequence[QuantMatrix], bias: Tensor | None):
        super().__init__()
        self.parts, self.bias = nn.ModuleList(parts), bias
        self.in_features, self.out_features = parts[0].shape[1], sum(part.shape[0] for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    """{path: module} of the quantized matrices of `model`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.labels or config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.checkpoint_activations = False  # recompute each block in the backward pass (arXiv 1604.06174)
        # lora.py may put these on: what writes the checkpoint in the place of `save`, and n positions before every row,
        # () -> (n, D) embeddings or () -> (n, depth, 2, Hkv, d) keys and values
        self.adapter, self.prompt, self.prefix, self.virtual = None, None, None, 0
        self.cache: Callable[..., KVCache] | None = None  # what generates in the place of KVCache (quantize.py --kv)
        self._angles: tuple[Tensor, Tensor] | None = None
        if not self.embed.weight.is_meta:  # as in `load`, which brings the weights
            self._init_weights()

    def _init_weights(self) -> None:
        """Normal, of standard deviation 0.02 for the embedding and the head, width**-0.5 for the other matrices.

        That keeps a normed state at its size; the usual 0.02 everywhere would be a quarter of it at a width of 128,
        and learns markedly slower. Matrices whose product is added to the residual stream are smaller by
        sqrt(2 * depth), so that the stream does not grow with depth. Biases are 0.
        """
        c = self.config
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_stream = name.endswith(("attention.out.weight", "ffn.down.weight"))
                std = 0.02 if name in ("embed.weight", "head.weight") else c.width**-0.5
                nn.init.normal_(p, std=std / math.sqrt(2 * c.depth) if into_stream else std)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    @property
    def context(self) -> int:
        """How many tokens a row may have: max_length, less the positions of a prompt or a prefix."""
        return self.config.max_length - self.virtual

    def forward(self, input_ids: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) that follow each of input_ids (B, T), or (B, T, labels) of a model with a scalar head."""
        return self.head(self.hidden(input_ids, documents=documents))

    def hidden_before(self, input_ids: Tensor, *, documents: Tensor | None = None, embeddings: Tensor | None = None,
                      memory: "Memory | None" = None) -> Tensor:  # fmt: skip
        """(B, T, D): the state that predicts token t, which has seen the tokens before t; zeros at position 0.

        Where documents (B, T) are packed, the first position of each holds the state of another: mask it.
        """
        hidden = self.hidden(input_ids, documents=documents, embeddings=embeddings, memory=memory)
        return F.pad(hidden, (0, 0, 1, -1))

    def hidden(self, input_ids: Tensor, *, documents: Tensor | None = None, embeddings: Tensor | None = None,
               memory: "Memory | None" = None, cache: "KVCache | None" = None) -> Tensor:  # fmt: skip
        """The state (B, T, D) after the final norm, which has seen the tokens up to and including t.

        input_ids (B, T). documents (B, T) of integers: a token sees earlier tokens of its own document only.
        embeddings (B, T, D) stand in for the tokens' own. memory: x becomes memory(i, x) before block i; that of a
        cache, if it has one. With a cache, the tokens follow those that it holds. A learned prompt or prefix stands
        before the first token; no state of it is returned.
        """
        x = self.embed(input_ids) if embeddings is None else embeddings
        n_tokens = x.shape[1]
        if self.virtual and documents is not None:
            raise ValueError("a learned prompt or prefix stands before a row, not before each of its packed documents")
        n = self.virtual if cache is None or cache.used == 0 else 0  # positions before x; a prefix is in the cache
        if self.prompt is not None and n:
            x, n = torch.cat([self.prompt().to(x.dtype).expand(len(x), -1, -1), x], dim=1), 0
        T, used = x.shape[1], cache.used if cache else 0
        if cache:
            cache.reserve(T)
        cos, sin = self._rotary_table(n + used + T, x.device)
        if cache is None or used == 0:
            cos, sin = cos[None, n : n + T], sin[None, n : n + T]  # (1, T, d)
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=x.device)
            cos, sin = cos[positions], sin[positions]  # (B, T, d): rows may be of different lengths
        mask = kernels.document_mask(documents) if documents is not None else cache.mask(T) if cache else None
        prefix = self.prefix() if self.prefix is not None and cache is None else None
        memory = cache.memory if cache else memory
        for i, block in enumerate(self.blocks):
            x = x if memory is None else memory(i, x)
            past = cache.block(i) if cache else None if prefix is None else (*prefix[:, i].transpose(0, 1), None)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, past, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, past)
        if cache:
            cache.advance(T)
        return self.norm(x[:, T - n_tokens :])

    def _rotary_table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (at least `length`, d), kept from call to call, in fp32."""
        if self._angles is None or len(self._angles[0]) < length or self._angles[0].device != device:
            with torch.inference_mode(False):  # what generate leaves here must serve training too
                positions = torch.arange(1 << (length - 1).bit_length(), device=device, dtype=torch.float32)
                angles = torch.outer(positions, inverse_frequencies(self.config).to(device)).repeat(1, 2)
                self._angles = angles.cos(), angles.sin()
        return self._angles


def inverse_frequencies(config: Config) -> Tensor:
    """Radians a position (d / 2,), theta^(-2i/d); Llama 3's scaling stretches long wavelengths by `factor`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the context of pre-training
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / s["factor"])


def token_logps(
    model: Transformer, input_ids: Tensor, *, temperature: float = 1.0, documents: Tensor | None = None
) -> Tensor:
    """log pi(token t | tokens before t) (B, T) of softmax(logits / temperature); 0 at position 0, without a past.

    The (B, T, V) logits are never held (kernels.linear_logps).
    """
    targets = input_ids.clone()
    targets[:, 0] = kernels.IGNORED
    hidden = model.hidden_before(input_ids, documents=documents)
    return kernels.linear_logps(hidden, model.head.weight, targets, temperature=temperature)


def frozen(model: Transformer) -> Transformer:
    """A copy in eval mode that takes no gradient: a reference model or a teacher.

    Weights that are frozen already are shared: under an adapter the reference needs the memory of the adapter alone.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


class Memory(Protocol):
    """What each row may look at between the blocks, beside its own tokens: images, in vlm.py."""

    def __call__(self, i: int, x: Tensor) -> Tensor: ...  # x (B, T, D) before block i, with what is seen added

    def select(self, rows: Tensor) -> "Memory": ...  # of these rows, in this order


GROWTH = 64  # columns that a cache grows by
ALIGNED = 16  # columns: a GPU's attention copies a mask whose rows begin between
PATIENCE = {"cpu": 1, "cuda": 16}  # steps between looks at which rows ended: each makes the CPU wait for the GPU


class KVCache:
    """Keys and values of every block for rows of different lengths, with room for `capacity` tokens that grows.

    All rows write at one column: a short prompt is followed by columns that stay hidden from its row, which costs
    nothing beyond what the longest row needs and makes every write a slice. Positions are each row's own.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int, dtype: torch.dtype):
        c, device, self.virtual = model.config, model.embed.weight.device, model.virtual
        of_row, capacity = (c.depth, rows, c.kv_heads), capacity + model.virtual
        self.transposed = device.type == "cpu"  # the product of queries and keys is then twice as fast
        size = (c.head_dim, capacity) if self.transposed else (capacity, c.head_dim)
        self.keys = torch.zeros(*of_row, *size, dtype=dtype, device=device)
        self.values = torch.zeros(*of_row, capacity, c.head_dim, dtype=dtype, device=device)
        self.bias = torch.zeros(rows, c.kv_heads, 1, capacity, dtype=dtype, device=device)  # of scores: -inf is hidden
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # tokens that each row holds
        self.column: int | Tensor = 0  # columns written; (1,) once pinned
        self.memory: Memory | None = None
        if model.prefix is not None:
            prefix, n = model.prefix().to(dtype), model.virtual
            for i in range(c.depth):
                (keys, values, _), (k, v) = self.block(i), prefix[:, i].transpose(0, 1)
                keys[:, :n], values[:, :n] = k, v
            self.advance(n)

    @property
    def used(self) -> int:
        """Columns to read before those of the next tokens: the ones written, of a pinned cache all but one."""
        return self.column if isinstance(self.column, int) else self.bias.shape[-1] - 1

    def block(self, i: int) -> tuple[Tensor, Tensor, int | Tensor]:
        """Keys and values (B, capacity, Hkv, d) of block i, and the column from which on they are to be written."""
        keys = self.keys[i].permute(0, 3, 1, 2) if self.transposed else self.keys[i].transpose(1, 2)
        return keys, self.values[i].transpose(1, 2), self.column

    def mask(self, T: int) -> Tensor | None:
        """What is added to the scores of T more tokens, (B, Hkv, 1, used + 1) or (B, 1, T, used + T); None: causal."""
        if self.used == 0:
            return None
        bias = self.bias[..., : self.used + T]
        if T == 1:
            return bias
        return bias[:, :1] + bias.new_full((T, self.used + T), -torch.inf).triu(self.used + 1)

    def reserve(self, T: int) -> None:
        """Make room for T more tokens; of a pinned cache, show the column of the next one."""
        if isinstance(self.column, Tensor):
            self.bias.index_fill_(-1, self.column, 0.0)
        missing = self.used + T - self.bias.shape[-1]
        if missing > 0:
            more = -(-missing // GROWTH) * GROWTH
            self.keys = F.pad(self.keys, (0, more) if self.transposed else (0, 0, 0, more))
            self.values, self.bias = F.pad(self.values, (0, 0, 0, more)), F.pad(self.bias, (0, more))

    def advance(self, T: int) -> None:
        self.lengths += T
        self.column += T

    def pin(self) -> None:
        """From here on each token is the same work on the same memory, which a CUDA graph can repeat.

        Nothing grows, all columns are read, a bias of -inf hides those that are not written, and what is written next
        is a tensor: of shape (1,), since the CPU would wait for one of shape () that is an index.
        """
        self.bias[..., self.column :] = -torch.inf
        self.column = torch.full((1,), self.column, device=self.bias.device)

    def cut(self, lengths: Tensor) -> None:
        """After right-padded prompts: row b holds `lengths[b]` tokens, and its padding is never seen."""
        self.lengths = lengths + self.virtual
        padding = torch.arange(self.used, device=lengths.device) >= self.lengths[:, None, None, None]
        self.bias[..., : self.used].masked_fill_(padding, -torch.inf)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, each as often as it is named."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.bias, self.lengths = self.bias[rows], self.lengths[rows]
        self.memory = None if self.memory is None else self.memory.select(rows)

    def drop(self, ended: Tensor) -> Tensor:
        """Without the rows that `ended` (B,): the last ones move into their places, and no other is copied.

        Returns which of the old rows each of those that are left was.
        """
        n = int((~ended).sum())
        kept, places = torch.arange(n, device=ended.device), ended[:n].nonzero().squeeze(-1)
        kept[places] = n + (~ended[n:]).nonzero().squeeze(-1)
        for x in (self.keys.transpose(0, 1), self.values.transpose(0, 1), self.bias, self.lengths):
            x[places] = x[kept[places]]
        self.keys, self.values = self.keys[:, :n], self.values[:, :n]
        self.bias, self.lengths = self.bias[:n], self.lengths[:n]
        self.memory = None if self.memory is None else self.memory.select(kept)
        return kept


class Generation(NamedTuple):
    """Row r is sample r % samples of prompt r // samples."""

    input_ids: Tensor  # (B, T): [prompt][completion][zeros]
    completion_mask: Tensor  # (B, T): 1 on the completion, its ending token included
    logps: Tensor  # (B, T): of the completion at `temperature` (1 if that is 0), before top-k and top-p; else 0
    completions: list[list[int]]  # ids, the ending token included
    finished: Tensor  # (B,): whether the completion ended by itself


@kernels.eager()  # every step has a new length
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    rollout_batch: int | None = None,
    embeddings: Sequence[Tensor] | None = None,
    memory: Memory | None = None,
) -> Generation:
    """Sample `samples` completions of each prompt, of at most max_new_tokens tokens, that end with one of eos_ids.

    temperature 0 takes the most probable token; top_k 0 and top_p 1 keep all. Ids from `vocab_size` on (padding of the
    checkpoint's vocabulary) are never sampled. A row depends on its own prompt and on its own row of uniforms, drawn
    from `seed`: not on the rows beside it, nor on how many are decoded at once, `rollout_batch` (None: all). A prompt
    is prefilled once for all its rows among those. embeddings, (its tokens, D) for each prompt, stand in for those of
    its tokens; memory has a row for each prompt (see `Transformer.hidden`). Nothing is compiled; on a GPU a step is one
    CUDA graph, and room for max_new_tokens is taken at the start. Raises ValueError for an empty prompt or one that
    leaves no room.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: there is nothing to predict the first token from")
    if longest + max_new_tokens > model.context:
        new = f"{max_new_tokens} new ones"
        raise ValueError(f"a prompt of {longest} tokens and {new} exceed the context of {model.context}")
    device, starts = model.embed.weight.device, [tuple(prompt) for prompt in prompts for _ in range(samples)]
    rows = len(starts)
    # prompts of the same ids are one, unless they have more to them than their ids
    owners = None if embeddings is None and memory is None else [r // samples for r in range(rows)]
    uniforms = torch.rand(rows, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    eos = torch.tensor(list(eos_ids), device=device, dtype=torch.long)

    def draw(state: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(state)[:, :vocab_size].float()
        return sample(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)

    size = rollout_batch or rows
    # inference_mode takes 0.9 of the time of no_grad; but what FSDP gathers in it is closed to training.
    with torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode():
        spans = [slice(i, i + size) for i in range(0, rows, size)]
        parts = [_decode(model, starts[span], uniforms[span], eos, draw, owners and owners[span], embeddings, memory)
                 for span in spans]  # fmt: skip
    tokens, logps = (torch.cat(part) for part in zip(*parts, strict=True))

    is_end = torch.isin(tokens, eos.cpu())
    finished = is_end.any(-1)
    n_new = torch.where(finished, is_end.int().argmax(-1) + 1, max_new_tokens).tolist()
    completions = []
    width = max(len(start) + n for start, n in zip(starts, n_new, strict=True))
    input_ids, completion_mask = torch.zeros(2, rows, width, dtype=torch.long)
    aligned_logps = torch.zeros(rows, width)
    for r, (prompt, n) in enumerate(zip(starts, n_new, strict=True)):
        start, end = len(prompt), len(prompt) + n
        completions.append(tokens[r, :n].tolist())
        input_ids[r, :end] = torch.tensor([*prompt, *completions[-1]])
        completion_mask[r, start:end] = 1
        aligned_logps[r, start:end] = logps[r, :n]
    return Generation(input_ids.to(device), completion_mask.to(device), aligned_logps.to(device), completions,
                      finished.to(device))  # fmt: skip


def _prefill(model: Transformer, prompts: list[tuple[int, ...]], owners: list[int] | None,
             embeddings: Sequence[Tensor] | None, memory: Memory | None, room: int, aligned: bool
             ) -> tuple[KVCache, Tensor]:  # fmt: skip
    """A cache of `prompts` with `room` for more tokens, and the state (rows, D) after each; equal ones are read once.

    owners: where prompts are more than their ids, whose of the embeddings and of the memory's rows each has.
    """
    device = model.embed.weight.device
    keys = prompts if owners is None else list(zip(prompts, owners, strict=True))
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    distinct = [prompt for prompt, _ in place] if owners else list(place)
    lengths = torch.tensor([len(prompt) for prompt in distinct])
    longest = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in distinct])
    lengths = lengths.to(device)
    narrow = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if narrow else model.embed.weight.dtype
    capacity = longest + room
    capacity += -(model.virtual + capacity) % ALIGNED if aligned else 0
    cache, more = (model.cache or KVCache)(model, len(place), capacity, dtype), {}
    if embeddings is not None:
        more["embeddings"] = nn.utils.rnn.pad_sequence([embeddings[i] for _, i in place], batch_first=True)
    if memory is not None:
        cache.memory = memory.select(torch.tensor([i for _, i in place], device=device))
    state = model.hidden(ids.to(device), cache=cache, **more)[torch.arange(len(place), device=device), lengths - 1]
    cache.cut(lengths)
    if len(place) < len(prompts):
        source = torch.tensor([place[key] for key in keys], device=device)
        state = state[source]
        cache.select(source)
    return cache, state


def _decode(model: Transformer, prompts: list[tuple[int, ...]], uniforms: Tensor, eos: Tensor, draw: Callable,
            owners: list[int] | None, embeddings: Sequence[Tensor] | None, memory: Memory | None
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A token and its log-prob (rows, max_new_tokens) for each of `uniforms`; arbitrary after a row's ending token.

    Rows that ended are computed until the next look at them; what they say after their ending token is to be cut off.
    All that a step changes it changes in place.
    """
    device, (rows, max_new_tokens) = uniforms.device, uniforms.shape
    moves = hasattr(model, "unshard") or model.cache is not None  # what FSDP gathers, what is quantized in groups
    capture = None if moves else CAPTURE.get(device.type)
    room = max_new_tokens if capture else min(max_new_tokens, GROWTH)
    cache, state = _prefill(model, prompts, owners, embeddings, memory, room, capture is not None)
    begun = cache.column
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(rows, max_new_tokens, device=device)
    alive = torch.arange(rows, device=device)
    token, ended = torch.zeros_like(alive), torch.zeros_like(alive, dtype=torch.bool)

    def say(state: Tensor, t: int | Tensor) -> None:
        new, logp = draw(state, uniforms[alive, t])
        tokens[alive, t], logps[alive, t] = new, logp
        token.copy_(new)
        ended.logical_or_((new[:, None] == eos).any(-1))  # isin sorts where there are many, and the CPU waits for it

    def step() -> None:
        state = model.hidden(token[:, None], cache=cache)[:, 0]
        say(state, cache.column - begun)

    say(state, 0)
    if capture:
        cache.pin()
    run = None
    for t in range(1, max_new_tokens):
        if t % PATIENCE.get(device.type, 1) == 0 and ended.any():
            n = int((~ended).sum())
            if n == 0:
                break
            if capture:  # rows that ended fill a power of two: few sizes, a graph each
                n = 1 << (n - 1).bit_length()
            if n < len(ended):
                kept = cache.drop(ended & (ended.cumsum(0) <= len(ended) - n))
                token, alive, ended = token[kept], alive[kept], ended[kept]
                run = None
        run = run or (capture(step, device).__next__ if capture else step)
        run()
    return tokens.cpu(), logps.cpu()  # which waits for the graph, before it is gone


def _captured(step: Callable[[], None], device: torch.device) -> Iterator[None]:
    """Does `step` each time it is asked for the next one: at first as it is, then as one CUDA graph of its kernels.

    The first time is a real step and the warm-up that a capture needs: no weight is cast for autocast, no workspace of
    cuBLAS made and no kernel loaded while it captures. The capture itself computes nothing.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    yield
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # NCCL's thread may ask its events
        step()
    while True:
        graph.replay()
        yield


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


CAPTURE = {"cuda": _captured}  # devices on which launching a step's kernels one by one takes longer than they do


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """A token (B,) for each row of logits (B, V) by inverse CDF of uniforms (B,) in [0, 1), and its log-prob (B,)."""
    logps = torch.log_softmax(logits / temperature if temperature else logits, dim=-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        p = logps.exp()
        if top_k:
            p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1])).values[:, -1:], 0.0)
        if top_p < 1:
            sorted_p, order = p.sort(descending=True, stable=True)
            before = sorted_p.cumsum(-1) - sorted_p  # what is more probable; the smallest set that reaches top_p stays
            dropped = before >= top_p * sorted_p.sum(-1, keepdim=True)
            p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
        cdf = p.cumsum(-1)
        token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return token, logps.gather(-1, token[:, None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes of header length, a JSON header, raw little-endian bytes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` to the file `path`, whole or not at all."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    new = Path(path).with_name(Path(path).name + ".new")
    with new.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            if tensor.numel():
                raw = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(memoryview(raw.view(torch.uint8).numpy()))
    os.replace(new, path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU; the header is checked before anything is allocated."""
    header, start = _safetensors_header(Path(path))
    tensors = {}
    with Path(path).open("rb") as file:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            raw = bytearray(end - begin)
            file.seek(start + begin)
            if file.readinto(raw) != len(raw):
                raise UserError(f"{path}: cut short while it was read, in {name}")
            dtype = DTYPES[entry["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _safetensors_header(path: Path) -> tuple[dict[str, dict], int]:
    """{name: {"dtype", "shape", "data_offsets"}} and where the data starts; UserError unless all fits the file."""

    def refuse(what: str):
        raise UserError(f"{path}: not a whole safetensors file: {what}")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            refuse("a name occurs twice in the header")
        return dict(pairs)

    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            n = struct.unpack("<Q", file.read(8))[0] if size >= 8 else refuse(f"{size} bytes are too few")
            if n > size - 8:
                refuse(f"the header should have {n} bytes, {size - 8} are there")
            header = json.loads(file.read(n), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        refuse("the header is not JSON")
    if not isinstance(header, dict):
        refuse("the header is not a JSON object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                refuse(f"the entry of {name} is malformed")
        if dtype not in DTYPES:
            refuse(f"{name} has dtype {dtype}; known are {', '.join(DTYPES)}")
        if not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
            refuse(f"{name} has shape {shape} at {begin} to {end}")
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            refuse(f"{name} of shape {shape} and dtype {dtype} does not fill bytes {begin} to {end}")
        spans.append((begin, end))
    filled = 0
    for begin, end in sorted(spans):
        if begin != filled:
            refuse(f"its tensors leave or share bytes at {min(begin, filled)}")
        filled = end
    if filled != size - 8 - n:
        refuse(f"its tensors have {filled} bytes, the data {size - 8 - n}")
    return header, 8 + n


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face checkpoints

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ENDS = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight"}  # fmt: skip
SCALAR = "ForSequenceClassification"  # how architectures with a scalar head end there; it is called score
PARTS = {  # of a block, here: there, where q, k, v and gate, up are matrices of their own
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "attention.out.bias": ("self_attn.o_proj.bias",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
    "ffn.down.bias": ("mlp.down_proj.bias",),
}
OURS = "_pruned"  # ends the model_type of what transformers has no architecture for, so that it refuses it


def their_names(config: Config, name: str) -> tuple[tuple[str, ...], list[int]]:
    """The Hugging Face names of the rows of parameter `name`, and how many rows each has (none if it is one alone)."""
    if name in ENDS:
        return ("score.weight" if config.labels and name == "head.weight" else ENDS[name],), []
    _, i, part = name.split(".", 2)
    if part not in PARTS:  # one of two factors, of which they have none
        return (f"model.layers.{i}.{part}",), []
    sizes = {
        "attention.qkv": [config.head_dim * n for n in (config.heads, config.kv_heads, config.kv_heads)],
        "ffn.gate_up": [config.ffn_width] * 2,
    }
    return tuple(f"model.layers.{i}.{theirs}" for theirs in PARTS[part]), sizes.get(part.rsplit(".", 1)[0], [])


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         labels: int | None = 0, with_tokenizer: bool = False) -> tuple[Transformer, Tokenizer | None]:  # fmt: skip
    """The model of a Hugging Face directory, or of a run's folder, in `dtype`, and its tokenizer, None if it has none.

    Every tensor must be there, none too many, each of the shape that config.json says, and the head that of a language
    model, with `labels` 1 that of a reward model, with None either; with_tokenizer: that, too. UserError otherwise.
    """
    path = Path(path)
    if not (path / "config.json").exists() and (path / "checkpoint" / "config.json").exists():
        path /= "checkpoint"
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(f"{path}: an adapter, not a model; merge it (python lora.py --merge) or give it to --adapter")
    config = read_config(path / "config.json")
    if labels is not None and config.labels != labels:
        kinds = [f"a model with {n} labels" if n else "a language model" for n in (config.labels, labels)]
        raise UserError(f"{path}: found {kinds[0]}, expected {kinds[1]}")
    tensors = _read_weights(path)
    with torch.device("meta"):
        model = Transformer(config)
    if config.quantization:
        _put_quantized(model, tensors, path, device)
    state = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for name, parameter in model.named_parameters():  # a tied head is named once, as the embedding
        theirs, sizes = their_names(config, name)
        if missing := [key for key in theirs if key not in tensors]:
            raise UserError(f"{path}: the weights lack {missing[0]}")
        parts = [tensors.pop(key) for key in theirs]
        shapes = [(n, *parameter.shape[1:]) for n in sizes] or [tuple(parameter.shape)]
        for key, part, shape in zip(theirs, parts, shapes, strict=True):
            if tuple(part.shape) != shape or not part.is_floating_point():
                raise UserError(f"{path}: {key} is {tuple(part.shape)} {part.dtype}, config.json asks for {shape}")
        state[name] = torch.cat([part.to(device, dtype) for part in parts])
    if config.tied:
        state["head.weight"] = state["embed.weight"]
        tensors.pop("lm_head.weight", None)
    if odd := [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]:
        raise UserError(f"{path}: no place for the tensor {odd[0]} in a {config.family} of this shape")
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    tokenizer = from_hf(path) if (path / "tokenizer.json").exists() else None
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    if with_tokenizer and not tokenizer:
        raise UserError(f"{path}: no tokenizer.json in it")
    return model.requires_grad_(True), tokenizer


def stored_dtype(path: str | Path) -> torch.dtype:
    """That of the weights of a Hugging Face directory, or of a run's folder, as its config.json says it."""
    folders = Path(path), Path(path) / "checkpoint"
    config = json.loads(next(file for x in folders if (file := x / "config.json").exists()).read_text())
    return getattr(torch, config.get("torch_dtype") or config.get("dtype") or "float32")  # the old name, and the new


def _put_quantized(model: Transformer, tensors: dict[str, Tensor], path: Path, device: str | torch.device) -> None:
    """Put each matrix of a quantized checkpoint in its place, and take what it is made of out of `tensors`."""
    scheme = model.config.quantization
    for full, linear in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if not full.startswith("blocks."):
            continue
        theirs, sizes = their_names(model.config, f"{full}.weight")
        parts = []
        for key, n_out in zip(theirs, sizes or [linear.out_features], strict=True):
            key, shape = key.removesuffix("weight"), (n_out, linear.in_features)
            found = {name.removeprefix(key): tensors.pop(name) for name in list(tensors) if name.startswith(key)
                     and not name.endswith("bias")}  # fmt: skip
            wanted = quantized_like(shape, scheme, len(found["kept"]) if "kept" in found else None)
            if (like := {name: (t.dtype, tuple(t.shape)) for name, t in found.items()}) != wanted:
                raise UserError(f"{path}: {key[:-1]} is made of {like}, config.json asks for {wanted}")
            if any(not 0 <= column < shape[1] for column in found.get("kept", torch.empty(0)).tolist()):
                raise UserError(f"{path}: {key}kept names columns that are not there")
            parts.append(QuantMatrix(shape, {name: t.to(device) for name, t in found.items()}, scheme))
        parent, _, name = full.rpartition(".")
        setattr(model.get_submodule(parent), name, QuantLinear(parts, linear.bias))


def quantized_like(shape: tuple[int, int], scheme: dict, kept: int | None) -> dict[str, tuple[torch.dtype, tuple]]:
    """{name: (dtype, shape)} of what a QuantMatrix is made of; kept: how many columns are not quantized, if any are."""
    out, width = shape
    if scheme["format"] == "nf4":
        blocks = -(-out * width // 64)
        like = {"codes": (torch.uint8, (32 * blocks,)), "scales": (torch.int8, (blocks,)),
                "steps": (torch.float32, (-(-blocks // 256),)), "mean": (torch.float32, ())}  # fmt: skip
    else:
        groups, (count, n_bytes) = width // (scheme["group_size"] or width), kernels.word(scheme["bits"])
        like = {"codes": (torch.uint8, (out, -(-width // count) * n_bytes)), "scales": (torch.bfloat16, (out, groups))}
        if not scheme["symmetric"]:
            like["zeros"] = torch.uint8, (out, -(-groups // count) * n_bytes)
    if kept is not None:
        like |= {"kept": (torch.int32, (kept,)), "kept_weight": (torch.bfloat16, (out, kept))}
    return like


def save(model: Transformer, tokenizer: Tokenizer | None, path: str | Path) -> None:
    """Write a Hugging Face directory that `load` and transformers read: config, weights and, if given, tokenizer."""
    path, c = Path(path), model.config
    path.mkdir(parents=True, exist_ok=True)
    if model.adapter is not None:
        model.adapter.save(model, tokenizer, path)
        return
    state = {}
    for name, parameter in model.named_parameters():
        theirs, sizes = their_names(c, name)
        state.update(zip(theirs, parameter.detach().split(sizes) if sizes else (parameter.detach(),), strict=True))
    for full, module in quantized(model).items():
        for key, part in zip(their_names(c, f"{full}.weight")[0], module.parts, strict=True):
            state |= {key.removesuffix("weight") + name: tensor for name, tensor in part.named_buffers()}
    write_safetensors(path / "model.safetensors", state)
    eos = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id} if tokenizer else {}
    eos |= {"bos_token_id": tokenizer.bos_id} if tokenizer else {}
    architecture = ARCHITECTURES[c.family]
    if c.labels:
        architecture = architecture.replace("ForCausalLM", SCALAR)
    config = {
        "architectures": [architecture], "model_type": c.family, "vocab_size": c.vocab_size,
        "num_hidden_layers": c.depth, "hidden_size": c.width, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "intermediate_size": c.ffn_width,
        "max_position_embeddings": c.max_length, "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling,
        "rms_norm_eps": c.norm_eps, "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": c.tied,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."), **eos,
    }  # fmt: skip
    if c.quantization:
        config["quantization_config"] = c.quantization
    if c.labels:
        names = [f"LABEL_{i}" for i in range(c.labels)]
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        if eos and tokenizer.pad_id in tokenizer.eos_ids:  # transformers reads a score at the last token that is not
            config["pad_token_id"] = None  # padding: it would miss the end of an answer; so it takes one row at a time
    if c.out_bias or c.ranks:
        config |= {"model_type": c.family + OURS, "out_bias": c.out_bias, "ranks": c.ranks}
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if tokenizer:
        (path / "generation_config.json").write_text(json.dumps(eos, indent=1) + "\n")
        save_hf(tokenizer, path)


def read_config(path: Path) -> Config:
    """The Config of a Hugging Face config.json; UserError for what this transformer cannot represent."""
    try:
        c = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a checkpoint directory is expected") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(c, dict):
        raise UserError(f"{path}: not a JSON object")
    family = str(c.get("model_type")).removesuffix(OURS)
    if family not in ARCHITECTURES:
        raise UserError(f"{path}: model_type {c.get('model_type')!r} is not supported; {', '.join(ARCHITECTURES)} are")
    scalar = str(c.get("architectures")).endswith(f"{SCALAR}']")
    rope = {"rope_theta": c.get("rope_theta", 10_000.0)} | (c.get("rope_scaling") or c.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    for ok, what in (
        (c.get("hidden_act", "silu") == "silu", f"hidden_act {c.get('hidden_act')}"),
        (not c.get("attention_bias"), "attention_bias"),
        (not c.get("mlp_bias"), "mlp_bias"),
        (not c.get("use_sliding_window"), "use_sliding_window"),
        (_is_ours(c.get("quantization_config")), "quantization_config"),
        (kind in ("default", "llama3"), f"rope type {kind!r}"),
        (rope.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor"),
    ):
        if not ok:
            raise UserError(f"{path}: {what} is not supported")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    try:
        scaling = {"rope_type": "llama3", **{key: rope[key] for key in keys}} if kind == "llama3" else None
        config = Config(
            family=family, vocab_size=c["vocab_size"], depth=c["num_hidden_layers"], width=c["hidden_size"],
            heads=c["num_attention_heads"], kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            ffn_width=c["intermediate_size"], max_length=c["max_position_embeddings"],
            rope_theta=float(rope["rope_theta"]), rope_scaling=scaling, norm_eps=c.get("rms_norm_eps", 1e-6),
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
            tied=bool(c.get("tie_word_embeddings", False)) and not scalar,
            labels=len(c.get("id2label") or range(c.get("num_labels") or 2)) if scalar else 0,
            out_bias=bool(c.get("out_bias")), ranks=c.get("ranks"),
            quantization=c.get("quantization_config"),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: the sizes make no model: {error}") from None
    ranks = config.ranks or {}
    matrices = {name.removesuffix(".weight") for name in PARTS if name.endswith(".weight") and "norm" not in name}
    if not isinstance(ranks, dict) or not ranks.keys() <= matrices:
        raise UserError(f"{path}: ranks {ranks}: expected those of {', '.join(sorted(matrices))}")
    sizes = (config.vocab_size, config.depth, config.width, config.heads, config.kv_heads, config.head_dim,
             config.ffn_width, config.max_length, *ranks.values())  # fmt: skip
    if not all(type(n) is int and n > 0 for n in sizes) or config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(f"{path}: the sizes make no model: {c}")
    return config


def _is_ours(scheme: object) -> bool:
    """Whether this quantization_config is none, or one that quantize.py writes."""
    if scheme is None:
        return True
    known = {"quant_method": ("post-training",), "format": ("int", "nf4"), "bits": (2, 3, 4, 8), "activations": (8, 16),
             "symmetric": (True, False)}  # fmt: skip
    return (isinstance(scheme, dict) and scheme.keys() == {*known, "group_size", "rotation"}
            and all(scheme[name] in values for name, values in known.items())
            and type(scheme["group_size"]) is int and scheme["group_size"] >= 0
            and (scheme["rotation"] is None or type(scheme["rotation"]) is int))  # fmt: skip


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not (path / "model.safetensors").exists():
            raise UserError(f"{path}: no model.safetensors in it")
        return read_safetensors(path / "model.safetensors")
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: no index of a sharded checkpoint") from None
    tensors = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:  # only files of this directory
            raise UserError(f"{index}: {file!r} is not the name of a file beside it")
        for name, tensor in read_safetensors(path / file).items():
            if places.get(name) != file:
                raise UserError(f"{index}: says {places.get(name)} holds {name}, which {file} does")
            tensors[name] = tensor
    if missing := places.keys() - tensors.keys():
        raise UserError(f"{index}: no file holds {min(missing)}")
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("prompt", nargs="?", help="what to answer; without it, a chat")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat format")
    parser.add_argument("--chat-format", choices=chat.FORMATS, help="where the checkpoint does not say, or otherwise")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k best tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the best tokens of this probability")
    parser.add_argument("--samples", type=int, default=1, help="answers to the prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    for flag, ok, wanted in (
        ("--max-new-tokens", args.max_new_tokens >= 1, "of at least 1"),
        ("--temperature", 0 <= args.temperature < math.inf, "of at least 0"),
        ("--top-k", args.top_k >= 0, "of at least 0"),
        ("--top-p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--samples", args.samples >= 1, "of at least 1"),
    ):
        if not ok:
            raise UserError(f"{flag}: expected a number {wanted}")
    if not args.temperature and (args.samples > 1 or args.top_k or args.top_p < 1):
        raise UserError("--samples, --top-k and --top-p draw at random, --temperature 0 does not: choose one above 0")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: there is none on this machine") from None
    model, tokenizer = load(args.model, device=args.device)
    if tokenizer is None:
        raise UserError(f"{args.model}: no tokenizer.json in it")
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    messages: list[dict[str, str]] = []
    while True:
        text = args.prompt
        if text is None:
            try:
                text = input("> ").strip()
            except EOFError:
                return
            if not text:
                return
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.begin(text) if args.raw else chat.prompt_ids(messages, tokenizer)
        room = model.context - len(prompt)
        if not prompt or room < 1:
            raise UserError(f"the prompt has {len(prompt)} tokens, the model reads 1 to {model.context - 1}")
        found = generate(model, [prompt], max_new_tokens=min(args.max_new_tokens, room), eos_ids=tokenizer.eos_ids,
                         samples=args.samples, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                         seed=args.seed + len(messages), vocab_size=tokenizer.vocab_size)  # fmt: skip
        for completion in found.completions:
            print(chat.completion_text(completion, tokenizer))
        if args.prompt is not None:
            return
        messages.append({"role": "assistant", "content": chat.completion_text(found.completions[0], tokenizer)})


if __name__ == "__main__":
    try:
        main(get_args())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
