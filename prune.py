"""Pruning: fewer weights, heads, channels, layers or directions of a finished model (SparseGPT, arXiv 2301.00774).

A matrix W (out, in) multiplies inputs x; X holds those of some text, a row a token, and H = X^T X. What to leave out?

    magnitude   the weights of least |W_ij|
    wanda       of least |W_ij| * |X_j|, in every row (Sun et al. 2023, 2306.11695, equation 1)
    sparsegpt   of least W_ij^2 / [H^-1]_jj, and the weights after them make up for it:
                W_i: -= W_ij / [H^-1]_jj * [H^-1]_j:        (Frantar & Alistarh 2023, 2301.00774, equation 3)
    llm-pruner  heads and channels of the feed-forward network of least sum |w * dL/dw| (Ma et al. 2023, 2305.11627)
    flap        those whose output fluctuates least, Var(X_j) * |W_:j|^2, their mean put into a bias (2312.11983)
    shortgpt    the layers that change the stream least: influence = 1 - E cos(x_in, x_out) (2403.03853, equation 1)
    slicegpt    the last principal directions of the stream, to which all weights are rotated first (2401.15024)
    svd, asvd,  W = B A of low rank, the nearest to W (svd), after columns were scaled by mean |X_j|^0.5 (asvd,
    svd-llm     2312.05821), or nearest in its products with X: SVD(W S) S^-1, S S^T = H (2403.07378)

The first three put zeros into matrices that keep their shape, anywhere or N in every M of a row (--pattern 2:4): the
model loads everywhere as before, and is neither smaller nor faster where zeros are stored and multiplied like other
numbers. The others make the model itself smaller, by as much in every layer, so that one config.json describes it.

A short training afterwards (--recover) makes up for much of the loss. Zeros stay zero in it: LoRA's B A is full of
numbers, and merged into W it would fill all gaps again, so that what is trained, and merged, is mask * (W + B A). `kd`
trains all that is left to say what the dense model says, KL(dense, pruned) (1503.02531). Zeros that a model came with
are weights like others, to this and to every other script: a training fills those that no mask of this run holds.

Differences from the papers: every layer keeps the same share, but under --scope global (FLAP and ShortGPT's follow-ups
spread it unevenly), and SliceGPT turns all layers by one rotation, so that no layer needs a matrix on its residual
connection and what comes out is a plain Llama. q, k and v share one pair of factors, as do gate and up. Embedding and
head are left alone.

    python prune.py                                                     SparseGPT, half of the weights, then LoRA
    python prune.py --method wanda --pattern 2:4 --recover none
    python prune.py --model DIR --data rows.jsonl --method llm-pruner   a real model, calibrated on real rows
    python prune.py --method all                                        a table of all methods

Measured, of the dense model, of the pruned one ("pruned: ...") and after recovery: `bits per byte` of held-out weather
reports, whose entropy is known; `exact match` on held-out questions; `sparsity`, the share of the numbers in the
blocks' matrices that is zero or gone; `parameters` (millions, zeros counted), `MB` of them, `MB packed` without zeros
but with a bit a number that says which are there; `tokens/s` scored. The last lines: `bits per byte: 0.5 before, ...`.
"""

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import chat, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from distill import n_bytes_of
from kernels import linear_divergence, whole_fp32
from loop import COUNT, REAL, ROOT, Loop, adamw, clip, compare, fill, parser, run, set_lr, told
from lora import Adapter, LoRA, linears, merge, put_at, wide
from model import Config, Transformer, load, stored_dtype, token_logps
from quantize import MATRICES, Inputs, cholesky, inverse_factor, layer_by_layer, plant
from sft import Batch, collate, document, encode, evaluate, fitting, pack, row_losses, sft_loss

# 1. The objective


def unpruned(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Nothing is taken away: what does the training do by itself that is called recovery of the others?"""
    return model, {}


# Zeros: a score for every weight, and which of them are kept


def magnitude(weight: Tensor, inputs: Inputs) -> Tensor:
    """|W| (out, in)."""
    return wide(weight).abs()


def wanda(weight: Tensor, inputs: Inputs) -> Tensor:
    """|W_ij| * |X_j|, the norm over all tokens (2306.11695, eq. 1), (out, in)."""
    return wide(weight).abs() * inputs.gram.diagonal().sqrt()


def keep(scores: Tensor, sparsity: float, pattern: str, scope: str) -> Tensor:
    """Which of scores (out, in) are kept: all but the round(sparsity * n) least, exactly, of ties the first ones go.

    n is of a "row", or of the whole matrix. pattern "2:4" keeps the 2 largest of every 4 neighbours in a row instead.
    """
    if pattern == "unstructured":
        rows = scores if scope == "row" else scores.reshape(1, -1)
        gone = round(sparsity * rows.shape[1])
    else:
        n, m = map(int, pattern.split(":"))
        rows, gone = scores.reshape(-1, m), m - n
    least = rows.argsort(dim=-1, stable=True)[:, :gone]
    return torch.ones_like(rows, dtype=torch.bool).scatter(-1, least, False).view_as(scores)


@whole_fp32()
def sparsegpt(weight: Tensor, upper: Tensor, sparsity: float, pattern: str, *, block: int) -> tuple[Tensor, Tensor]:
    """(the weights (out, in) with their zeros, which are kept), by optimal brain surgery a column at a time.

    2301.00774, algorithm 1. upper (in, in): quantize.inverse_factor of H. The columns before j are done and stay;
    U_jj U_j: is row j of the inverse of H without them. Zeros are chosen for `block` columns at once, or for the M of a
    pattern, by weights that have made up for all zeros before; what follows a block learns of it at its end.
    """
    w, kept = wide(weight).clone(), torch.ones_like(weight, dtype=torch.bool)
    group = 0 if pattern == "unstructured" else int(pattern.split(":")[1])
    block = max(group, block - block % max(1, group))
    scale = upper.diagonal()  # of column j: the root of [H^-1]_jj
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = torch.zeros_like(w[:, start:end])
        for j in range(start, end):
            if (j - start) % (group or block) == 0:
                some = slice(j, j + group if group else end)
                kept[:, some] = keep((w[:, some] / scale[some]).square(), sparsity, pattern, "layer")
            errors[:, j - start] = torch.where(kept[:, j], 0.0, w[:, j] / scale[j])
            w[:, j:end] -= errors[:, j - start, None] * upper[j, j:end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return w.masked_fill(~kept, 0.0).to(weight.dtype), kept


BLOCK, DAMPING = 128, 0.01  # of SparseGPT's paper
WEIGHT_SCORES = {"magnitude": magnitude, "wanda": wanda}


@torch.no_grad()
def prune_weights(model: Transformer, batches: list[Batch], args: argparse.Namespace
                  ) -> tuple[Transformer, dict[str, Tensor]]:  # fmt: skip
    """Put zeros into the matrices of the blocks, in place: (model, {path: which are kept}).

    q, k, v, gate and up are judged each by itself, as in the papers. Each matrix sees what the pruned ones before it
    make of the text.
    """
    if args.scope == "global":
        return prune_at_once(model, batches, args)
    everywhere = [(path, list(rows.values())) for path, _, rows in linears(model)]
    masks = {}
    for (path, linear, inputs), (same, spans) in zip(layer_by_layer(model, batches), everywhere, strict=True):
        assert path == same
        check_pattern(args.pattern, linear.in_features, path)
        parts = [linear.weight[start:end] for start, end in spans]
        if args.method == "sparsegpt":
            upper = inverse_factor(inputs.gram, DAMPING)
            pairs = [sparsegpt(part, upper, args.sparsity, args.pattern, block=BLOCK) for part in parts]
            linear.weight.copy_(torch.cat([new for new, _ in pairs]))
            masks[path] = torch.cat([kept for _, kept in pairs])
        else:
            score = WEIGHT_SCORES[args.method]
            masks[path] = torch.cat([keep(score(x, inputs), args.sparsity, args.pattern, args.scope) for x in parts])
            linear.weight.masked_fill_(~masks[path], 0.0)
    return model, masks


def prune_at_once(model: Transformer, batches: list[Batch], args: argparse.Namespace
                  ) -> tuple[Transformer, dict[str, Tensor]]:  # fmt: skip
    """--scope global: one threshold for all matrices, which are judged on what the dense model makes of the text."""
    score, matrices = WEIGHT_SCORES[args.method], layer_by_layer(model, batches)
    scores = {path: score(linear.weight, inputs) for path, linear, inputs in matrices}
    flat = torch.cat([x.flatten() for x in scores.values()])
    kept = keep(flat, args.sparsity, "unstructured", "layer").split([x.numel() for x in scores.values()])
    masks = {path: part.view_as(x) for (path, x), part in zip(scores.items(), kept, strict=True)}
    for path, mask in masks.items():
        model.get_submodule(path).weight.masked_fill_(~mask, 0.0)
    return model, masks


def check_pattern(pattern: str, n_in: int, path: str) -> None:
    if pattern != "unstructured" and n_in % (m := int(pattern.split(":")[1])):
        raise UserError(f"--pattern {pattern}: {path} has {n_in} inputs, which groups of {m} do not fill")


# Smaller shapes: a pruned model is a Config and its tensors


def rebuilt(model: Transformer, config: Config, changed: dict[str, Tensor]) -> Transformer:
    """A model of `config` with the tensors of `model`, but those that are `changed`: a name of ours, and its tensor."""
    state = {name: p.detach() for name, p in model.named_parameters()} | changed
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    with torch.device("meta"):
        made = Transformer(config)
    names = made.state_dict().keys()
    made.load_state_dict({name: state[name].contiguous() for name in names}, assign=True)
    if config.tied:
        made.head.weight = made.embed.weight
    return made.requires_grad_(True)


def saliency(model: Transformer, batches: list[Batch], score: str, seed: int) -> dict[str, Tensor]:
    """How much each weight of the blocks matters, {name: (out, in)}.

    taylor: |w * dL/dw|, what the loss would change by without it to first order (2305.11627), a mean over
    batches; magnitude: w^2; random: nothing.
    """
    matrices = {f"{path}.weight": linear.weight for path, linear, _ in linears(model)}
    if score == "magnitude":
        return {name: wide(w.detach()).square() for name, w in matrices.items()}
    if score == "random":
        g = torch.Generator().manual_seed(seed)
        return {name: torch.rand(w.shape, generator=g).to(w.device) for name, w in matrices.items()}
    total = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in matrices.items()}
    for batch in batches:
        loss = sft_loss(model, batch) / batch.completion_mask.sum()
        for (name, w), grad in zip(matrices.items(), torch.autograd.grad(loss, [*matrices.values()]), strict=True):
            total[name] += (w.detach() * grad).abs() / len(batches)
    return total


def unit_scores(c: Config, scores: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of `scores` over all weights that go with a head (depth, heads), with a channel (depth, ffn_width).

    A channel is a row of gate, the same of up, and a column of down; a head is rows of q and columns of out, and where
    it shares them with no other, rows of k and v, too.
    """
    heads, channels, sizes = [], [], [c.head_dim * n for n in (c.heads, c.kv_heads, c.kv_heads)]
    for i in range(c.depth):
        qkv, out, gate_up, down = (scores[f"blocks.{i}.{name}.weight"] for name in MATRICES)
        q, k, v = (x.sum(1).view(-1, c.head_dim).sum(1) for x in qkv.split(sizes))
        heads.append(q + out.sum(0).view(c.heads, -1).sum(1) + (k + v if c.heads == c.kv_heads else 0))
        channels.append(gate_up.sum(1).view(2, -1).sum(0) + down.sum(0))
    return torch.stack(heads), torch.stack(channels)


@dataclass
class Units:
    """The heads (depth, n) and channels (depth, m) that are kept, in rising order, in each layer."""

    heads: Tensor
    channels: Tensor

    @classmethod
    def best(cls, c: Config, heads: Tensor, channels: Tensor, sparsity: float, units: str) -> "Units":
        """Those of largest scores; of query heads that share keys and values, as many from each such group."""
        of_heads, of_channels = (sparsity if units in (kind, "both") else 0.0 for kind in ("heads", "ffn"))
        group = c.heads // c.kv_heads
        groups = heads.view(c.depth, c.kv_heads, group) if group > 1 else heads[:, None]
        n = max(1, round((1 - of_heads) * groups.shape[-1]))
        best = groups.topk(n).indices.sort().values
        first = torch.arange(groups.shape[1], device=heads.device)[:, None] * groups.shape[-1]
        m = max(1, round((1 - of_channels) * c.ffn_width))
        return cls((best + first).flatten(1), channels.topk(m).indices.sort().values)

    def taken(self, model: Transformer, biases: dict[str, Tensor] | None = None) -> Transformer:
        """`model` with these alone; biases: {name: what is added instead of what was taken away}."""
        c, changed = model.config, dict(biases or {})
        n, alone = self.heads.shape[1], c.heads == c.kv_heads
        d = torch.arange(c.head_dim, device=self.heads.device)
        for i, block in enumerate(model.blocks):
            heads, channels = self.heads[i], self.channels[i]
            shared = heads if alone else torch.arange(c.kv_heads, device=heads.device)
            q, kv = ((x[:, None] * c.head_dim + d).flatten() for x in (heads, shared))
            start_k, start_v = c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim
            rows = torch.cat([q, start_k + kv, start_v + kv])
            own = f"blocks.{i}."
            changed[f"{own}attention.qkv.weight"] = block.attention.qkv.weight.detach()[rows]
            if c.qkv_bias:
                changed[f"{own}attention.qkv.bias"] = block.attention.qkv.bias.detach()[rows]
            changed[f"{own}attention.out.weight"] = block.attention.out.weight.detach()[:, q]
            both = torch.cat([channels, c.ffn_width + channels])
            changed[f"{own}ffn.gate_up.weight"] = block.ffn.gate_up.weight.detach()[both]
            changed[f"{own}ffn.down.weight"] = block.ffn.down.weight.detach()[:, channels]
        config = replace(c, heads=n, kv_heads=n if alone else c.kv_heads, ffn_width=self.channels.shape[1],
                         out_bias=c.out_bias or bool(biases))  # fmt: skip
        return rebuilt(model, config, changed)


def llm_pruner(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Heads and channels of the feed-forward network are taken out together with all weights that go with them."""
    scores = unit_scores(model.config, saliency(model, batches, args.score, args.seed))
    return Units.best(model.config, *scores, args.sparsity, args.units).taken(model), {}


@torch.no_grad()
def flap(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """A unit that hardly varies is as good as a constant: it goes, and its mean times its weights becomes a bias.

    2312.11983: Var(X_j) * |W_:j|^2, of a head the sum over its inputs of `out`.
    """
    c, scores, means = model.config, {}, {}
    for path, linear, inputs in layer_by_layer(model, batches):
        scores[f"{path}.weight"] = torch.zeros_like(wide(linear.weight))
        if path.endswith(("attention.out", "ffn.down")):
            means[path] = inputs.sum / inputs.n
            variance = (inputs.gram.diagonal() / inputs.n - means[path].square()).clamp(min=0)
            scores[f"{path}.weight"] = variance * wide(linear.weight).square()
    units, biases = Units.best(c, *unit_scores(c, scores), args.sparsity, args.units), {}
    for path, mean in means.items():
        linear, i = model.get_submodule(path), int(path.split(".")[1])
        gone = torch.ones_like(mean, dtype=torch.bool)
        if path.endswith("ffn.down"):
            gone[units.channels[i]] = False
        else:
            gone.view(c.heads, -1)[units.heads[i]] = False
        old = 0.0 if linear.bias is None else linear.bias
        biases[f"{path}.bias"] = old + (wide(linear.weight) @ (mean * gone)).to(linear.weight.dtype)
    return units.taken(model, biases), {}


@torch.no_grad()
def stream(model: Transformer, batch: Batch) -> list[Tensor]:
    """The residual stream (tokens, D) before and within each block in turn, and at the end: 2 * depth + 1 states."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    hooks += [b.attention.register_forward_hook(lambda *args: seen.append(seen[-1] + args[2])) for b in model.blocks]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    model.hidden(batch.input_ids, documents=batch.documents)
    for hook in hooks:
        hook.remove()
    return [wide(x[batch.documents >= 0]) for x in seen]


def influence(model: Transformer, batches: list[Batch]) -> Tensor:
    """1 - E cos(x_in, x_out) of each layer (depth,) over all tokens (2403.03853, eq. 1)."""
    total, n = 0.0, 0
    for batch in batches:
        states = stream(model, batch)[::2]
        cosines = [F.cosine_similarity(x, y, dim=-1).sum() for x, y in zip(states, states[1:], strict=False)]
        total, n = total + torch.stack(cosines), n + len(states[0])
    return 1 - total / n


def shortgpt(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """The layers of least influence are left out; those after them move up."""
    c, n = model.config, max(1, round((1 - args.sparsity) * model.config.depth))
    scores = influence(model, batches)
    if args.score == "random":
        scores = torch.rand(c.depth, generator=torch.Generator().manual_seed(args.seed))
    kept = scores.topk(n).indices.sort().values.tolist()
    changed = {f"blocks.{new}.{name}": p.detach() for new, old in enumerate(kept)
               for name, p in model.blocks[old].named_parameters()}  # fmt: skip
    return rebuilt(model, replace(c, depth=n), changed), {}


@whole_fp32()
@torch.no_grad()
def slicegpt(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Rotate the stream to its principal components, and cut the last ones off (2401.15024, section 3).

    RMSNorm commutes with a rotation Q once its gains are moved into the matrices after it: reading matrices become
    W diag(gain) Q, writing ones Q^T W. A norm of fewer numbers divides by a larger root: its gain is sqrt(D / d).
    The head has the gain of the last norm in it, and so is no longer the embedding.
    """
    c = model.config
    covariance = torch.zeros(c.width, c.width, dtype=torch.float64)
    for batch in batches:
        for x in stream(model, batch):
            x = F.normalize(x, dim=-1)  # what the norms make of it, but for a factor
            covariance += (x.T @ x).cpu()
    width = max(8, round((1 - args.sparsity) * c.width / 8) * 8)
    q = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width].to(wide(model.embed.weight))

    def read(linear: nn.Linear, norm: nn.Module) -> Tensor:
        return (wide(linear.weight) * wide(norm.weight) @ q).to(linear.weight.dtype)

    def write(p: Tensor) -> Tensor:
        return (q.T @ wide(p)).to(p.dtype)

    def gain() -> Tensor:  # anew for each norm: one tensor for all would take the updates of all
        return model.norm.weight.new_full((width,), math.sqrt(c.width / width))

    changed = {"embed.weight": write(model.embed.weight.T).T, "head.weight": read(model.head, model.norm),
               "norm.weight": gain()}  # fmt: skip
    for i, block in enumerate(model.blocks):
        for name, norm in (("attention.qkv", block.attention_norm), ("ffn.gate_up", block.ffn_norm)):
            changed[f"blocks.{i}.{name}.weight"] = read(block.get_submodule(name), norm)
        for name in ("attention.out", "ffn.down"):
            for kind, p in block.get_submodule(name).named_parameters():
                changed[f"blocks.{i}.{name}.{kind}"] = write(p)
        changed |= {f"blocks.{i}.{name}_norm.weight": gain() for name in ("attention", "ffn")}
    return rebuilt(model, replace(c, width=width, tied=False), changed), {}


# Low rank


def whitening(method: str, inputs: Inputs) -> Tensor:
    """S (in, in): the products of W with the text have the size of W S."""
    if method == "svd":
        return torch.eye(len(inputs.gram), dtype=inputs.gram.dtype, device=inputs.gram.device)
    if method == "asvd":
        mean = inputs.abssum / inputs.n
        return torch.diag(mean.clamp(min=1e-4 * mean.max()).sqrt())
    h = inputs.gram.clone()
    h.diagonal().add_(1e-4 * h.diagonal().mean())  # a channel that is always 0 would have no inverse
    return cholesky(h, 1e-4)


@whole_fp32()
def factors(weight: Tensor, s: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is nearest to W in |(W - B A) S| (2403.07378)."""
    u, sigma, vt = torch.linalg.svd(wide(weight) @ s, full_matrices=False)
    root = sigma[:rank].sqrt()
    down = torch.linalg.solve(s, root[:, None] * vt[:rank], left=False)
    return down.to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


@torch.no_grad()
def low_rank(model: Transformer, batches: list[Batch], args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Each matrix of the blocks becomes two, which together have 1 - sparsity of its numbers."""
    ranks: dict[str, int] = {}
    for path, linear, inputs in layer_by_layer(model, batches):
        n_out, n_in = linear.weight.shape
        rank = ranks[path.split(".", 2)[2]] = max(1, int((1 - args.sparsity) * n_out * n_in / (n_out + n_in)))
        down, up = factors(linear.weight, whitening(args.method, inputs), rank)
        two = nn.Sequential()
        for name, weight, bias in (("down", down, None), ("up", up, linear.bias)):
            two.add_module(name, nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta"))
            two[-1].weight = nn.Parameter(weight)
            two[-1].bias = bias
        put_at(model, path, two)
    return rebuilt(model, replace(model.config, ranks=ranks), {}), {}


# Recovery


class MaskedLoRA(LoRA):
    """mask * (W + scale B A): what was pruned stays 0, while it is trained and when it is merged."""

    def __init__(self, base: nn.Linear, rows: dict[str, tuple[int, int]], c: Adapter, mask: Tensor):
        super().__init__(base, rows, c)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.cat([up @ down for _, _, down, up in self.parts()])
        weight = (self.base.weight + self.scale * low) * self.mask
        return F.linear(x, weight.to(x.dtype), self.base.bias)

    @torch.no_grad()
    def weight(self) -> Tensor:
        return super().weight() * self.mask


def prepare(model: Transformer, masks: dict[str, Tensor], recover: str) -> None:
    """Choose what learns. lora: B A beside every matrix; kd: all that is left, while gradients of zeros are 0.

    AdamW moves a weight whose gradient was always 0 by nothing, as long as no weight decays.
    """
    if recover == "kd":
        for path, mask in masks.items():
            model.get_submodule(path).weight.register_hook(lambda grad, mask=mask: grad * mask)
        return
    c = Adapter("lora", rank=8, alpha=16.0)
    model.requires_grad_(False)
    for path, linear, rows in list(linears(model)):
        put_at(model, path, MaskedLoRA(linear, rows, c, masks[path]) if path in masks else LoRA(linear, rows, c))


def kd_loss(model: Transformer, teacher: Transformer, batch: Batch) -> Tensor:
    """The sum over the tokens of completion_mask of KL(teacher, model) = sum_v p (log p - log q), a scalar."""
    with torch.no_grad():
        said = teacher.hidden_before(batch.input_ids, documents=batch.documents), teacher.head.weight
    hidden = model.hidden_before(batch.input_ids, documents=batch.documents)
    return linear_divergence(hidden, model.head.weight, [said], batch.completion_mask, kind="forward_kl")


# 2. Data


def world_rows(n: int, seed: int, tokenizer: Tokenizer) -> Iterator[chat.Row]:
    """A third each of conversations, base text and weather reports, of the training split, and none of sft.py's own."""
    chats, texts = world.sft_rows(n, 1_000_000 + seed), world.base_documents(n, 1_000_000 + seed)
    for i in range(n // 3 + 1):
        yield chat.render(next(chats)["messages"], tokenizer)
        yield document(next(texts), tokenizer)
        yield document(world.weather_log(world.rng_for("prune weather", seed, i)), tokenizer)


def examples(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop
             ) -> tuple[list[chat.Row], list[chat.Row], dict[str, list]]:  # fmt: skip
    """The rows to calibrate on, those to recover on, and what `measured` measures."""
    if not args.data:
        rows = world_rows(args.rows + args.steps * args.batch_size, args.seed, tokenizer)
        rows = fitting(rows, "rows", args, loop)
        if not rows[args.rows if args.steps and args.recover != "none" else 0 :]:
            raise UserError(f"no row is left to calibrate or to recover on: --max-length is {args.max_length}")
        logs = [world.weather_log(world.rng_for("test weather", i)) for i in range(128)]
        test = {"rows": [document(log, tokenizer) for log in logs], "logs": logs, "questions": world.sft_test(20)}
        return rows[: args.rows], rows[args.rows :], test
    read = partial(formats.read_jsonl, schemas=("text", "chat", "completion"), mapping=formats.parse_map(args.map))
    parts, held_out = formats.split(args.data.split(","), args.eval_data, read, loop.say)
    rows, test = (fitting((encode(row, tokenizer) for row in some), what, args, loop)
                  for some, what in ((sum(parts, []), "rows"), (held_out, "held-out rows")))  # fmt: skip
    if not rows or not test:
        raise UserError(f"no row is left to calibrate on or to measure: --max-length is {args.max_length}")
    some = random.Random(args.seed).sample(rows, min(args.rows, len(rows)))
    return some, rows, {"rows": test}


def batched(rows: list[chat.Row], args: argparse.Namespace, loop: Loop) -> list[Batch]:
    """The rows packed to --max-length tokens, --micro-batch-size such at a time."""
    groups, size = list(pack(rows, args.max_length)), args.micro_batch_size
    return [collate(groups[i : i + size], loop.device, with_documents=True) for i in range(0, len(groups), size)]


def measured(model: Transformer, tokenizer: Tokenizer, test: dict[str, list], args: argparse.Namespace, loop: Loop
             ) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out row}; the mean over rows of bits per byte is that over all bytes."""
    mean_bytes = statistics.fmean(n_bytes_of(row, tokenizer) for row in test["rows"])
    losses = row_losses(model.eval(), test["rows"], args, loop)
    found = {"bits per byte": [nats / math.log(2) / mean_bytes for nats, _ in losses]}
    if "questions" in test:
        questions = evaluate(model, tokenizer, {"questions": test["questions"]}, args, loop)
        found["exact match"] = questions["exact match"]
    return found


def sizes(model: Transformer, dense: Transformer) -> dict[str, list[float]]:
    """Sparsity of the matrices of the blocks, millions of parameters, MB, and MB without zeros."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    whole = sum(p.numel() for p in dense.blocks.parameters() if p.ndim == 2)
    present = sum(int(p.count_nonzero()) for p in matrices)
    n, zeros = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in matrices) - present
    width = model.embed.weight.element_size()
    packed = (n - zeros) * width + (sum(p.numel() for p in matrices) / 8 if zeros else 0)
    return {"sparsity": [1 - present / whole], "parameters": [n / 1e6], "MB": [n * width / 1e6],
            "MB packed": [packed / 1e6]}  # fmt: skip


@torch.no_grad()
def speeds(models: tuple[Transformer, ...], args: argparse.Namespace, loop: Loop) -> list[float]:
    """Tokens that each of `models` scores in a second: medians of 7 rounds, in which they take turns."""
    length = min(args.max_length, models[0].config.max_length)
    ids = torch.randint(models[0].config.vocab_size, (args.micro_batch_size, length)).to(loop.device)
    found: list[list[float]] = [[] for _ in models]
    for _ in range(8):
        for model, times in zip(models, found, strict=True):
            start = time.perf_counter()
            with loop.autocast():
                token_logps(model, ids).sum().item()  # which waits for a GPU
            times.append(time.perf_counter() - start)
    return [ids.numel() / statistics.median(times[1:]) for times in found]


# 3. Config

Method = Callable[[Transformer, list[Batch], argparse.Namespace], tuple[Transformer, dict[str, Tensor]]]
ZEROS = {"sparsity": 0.5, "pattern": "unstructured"}
METHODS: dict[str, tuple[Method, dict[str, object]]] = {  # name: (what does it, {flag: default})
    "dense": (unpruned, {"sparsity": 0.0}),
    "magnitude": (prune_weights, ZEROS | {"scope": "layer"}),
    "wanda": (prune_weights, ZEROS | {"scope": "row"}),
    "sparsegpt": (prune_weights, ZEROS),
    "llm-pruner": (llm_pruner, {"sparsity": 0.25, "units": "ffn", "score": "taylor"}),
    "flap": (flap, {"sparsity": 0.25, "units": "ffn"}),
    "shortgpt": (shortgpt, {"sparsity": 0.25, "score": "influence"}),
    "slicegpt": (slicegpt, {"sparsity": 0.25}),
    "svd": (low_rank, {"sparsity": 0.25}),
    "asvd": (low_rank, {"sparsity": 0.25}),
    "svd-llm": (low_rank, {"sparsity": 0.25}),
}
OWN = ("sparsity", "pattern", "scope", "units", "score")  # flags that not every method has
SCORES = {"llm-pruner": ("taylor", "magnitude", "random"), "shortgpt": ("influence", "random")}
DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (32, 16),
    "micro_batch_size": (32, 1),
    "max_length": (128, 1024),
}
RATES = {"none": (0.0, 0.0), "lora": (5e-3, 5e-5), "kd": (1e-3, 1e-5)}  # --lr, for the same two
TABLE = (
    "dense", "magnitude", "magnitude --scope global", "wanda", "wanda --scope layer", "sparsegpt",
    "sparsegpt --recover kd", "magnitude --sparsity 0.7", "wanda --sparsity 0.7", "sparsegpt --sparsity 0.7",
    "magnitude --pattern 2:4", "wanda --pattern 2:4", "sparsegpt --pattern 2:4", "magnitude --plant 64",
    "wanda --plant 64", "sparsegpt --plant 64",
    "llm-pruner --score random --sparsity 0.5", "llm-pruner --score magnitude --sparsity 0.5",
    "llm-pruner --sparsity 0.5", "llm-pruner --sparsity 0.5 --recover kd", "flap --sparsity 0.5",
    "llm-pruner --units heads --sparsity 0.5", "flap --units heads --sparsity 0.5", "shortgpt",
    "shortgpt --score random", "slicegpt", "svd", "asvd", "svd-llm",
)
MAIN_METHODS = ("magnitude", "wanda", "sparsegpt")  # which --method all runs with --seeds seeds
COLUMNS = ("bits per byte", "pruned: bits per byte", "exact match", "pruned: exact match", "sparsity", "parameters",
           "MB", "MB packed", "tokens/s")  # fmt: skip


def pattern(text: str) -> str:
    n, _, m = text.partition(":")
    if text != "unstructured" and not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise argparse.ArgumentTypeError(f"expected unstructured, or N:M with N below M as in 2:4, found {text!r}")
    return text


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--batch-size", "--micro-batch-size", "--lr", "--warmup",
               "--schedule", "--grad-clip", "--max-length", "--max-new-tokens", "--eval-data", "--chat-format",
               "--seed", "--device", "--dtype", "--log-every", "--resume"),
        defaults=told(DEFAULTS) | {"lr": None, "steps": 60, "warmup": 10, "schedule": "linear", "grad_clip": 1.0,
                                   "max_new_tokens": 32},
    )  # fmt: skip
    cli.epilog = "methods, and the flags of each with their defaults:\n" + "\n".join(
        f"  {name:12}" + " ".join(f"--{flag} {value}" for flag, value in own.items())
        for name, (_, own) in METHODS.items())
    cli.add_argument("--method", default="sparsegpt", metavar="NAME", help="see below, or all: a table; may bring its "
                     "own flags, as in --method 'wanda --pattern 2:4' (default: %(default)s)")  # fmt: skip
    cli.add_argument("--sparsity", type=REAL, help="share to leave out: of weights, units, layers, directions")
    cli.add_argument("--pattern", type=pattern, help="unstructured, or 2:4: two of every four neighbours are kept")
    cli.add_argument("--scope", choices=("row", "layer", "global"), help="what is compared to find the least weights")
    cli.add_argument("--units", choices=("ffn", "heads", "both"), help="what is taken out")
    cli.add_argument("--score", choices=("taylor", "magnitude", "influence", "random"), help="by which it is chosen")
    cli.add_argument("--recover", choices=tuple(RATES), default="lora", help="train for --steps steps afterwards: lora "
                     "on the text, kd on what the dense model says (default: %(default)s)")  # fmt: skip
    cli.add_argument("--plant", type=REAL, default=0.0, metavar="FACTOR", help="first plant outliers of this size, as "
                     "in quantize.py; 0: none")  # fmt: skip
    cli.add_argument("--rows", type=COUNT, default=192, help="to calibrate on (default: %(default)s)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut", "split"), default="split",
                     help="rows of more than --max-length tokens (default: %(default)s)")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_METHODS)} in --method all")
    args = cli.parse_args(argv)
    if args.method == "all":
        if args.model or args.data or any(getattr(args, flag) is not None for flag in OWN):
            raise UserError("--method all makes a table of the generated world, with flags of its own: it takes no "
                            "--model, no --data, and none of " + ", ".join(f"--{flag}" for flag in OWN))  # fmt: skip
        return args
    if args.resume:
        raise UserError("--resume keeps the finished runs of --method all: one run is short, and starts anew")
    return resolved(args)


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the flags that --method brings along and the defaults of the method; UserError if they do not fit."""
    args.variant, (args.method, *more) = args.method, args.method.split() or [""]
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: there are {', '.join(METHODS)}, and all")
    for flag in more[::2]:
        name = flag.removeprefix("--")
        if name not in (*OWN, "recover", "plant"):
            raise UserError(f"--method {args.variant}: {flag} is none of --{', --'.join(OWN)}, --recover, --plant")
        setattr(args, name, getattr(get_args(["--method", args.method, *more]), name))
    own = METHODS[args.method][1]
    for flag in OWN:
        if flag not in own and getattr(args, flag) is not None:
            raise UserError(f"--method {args.method} has no --{flag}")
    if "pattern" in own and (args.pattern or "unstructured") != "unstructured":
        n, m = map(int, args.pattern.split(":"))
        if args.sparsity not in (None, 1 - n / m) or args.scope == "global":
            raise UserError(f"--pattern {args.pattern} leaves out {1 - n / m:g} of each row: no other --sparsity, and "
                            "no --scope global")  # fmt: skip
        args.sparsity = 1 - n / m
    fill(args, {flag: (value,) for flag, value in own.items()}, 0)
    if args.sparsity >= 1:
        raise UserError(f"--sparsity {args.sparsity}: expected a share below 1")
    if args.score not in SCORES.get(args.method, (None,)):
        raise UserError(f"--score {args.score}: --method {args.method} has {', '.join(SCORES[args.method])}")
    fill(args, DEFAULTS | {"lr": RATES[args.recover]}, args.model is not None)
    return args


SAME_TRAINING = ("data", "model", "recover", "steps", "batch_size", "lr", "warmup", "schedule", "grad_clip",
                 "max_length", "chat_format", "plant", "dtype")  # fmt: skip


def stored(args: argparse.Namespace) -> dict[str, float]:
    """What the recovery by itself makes of the dense model, from the committed table, where the training is that."""
    path, usual = ROOT / "results" / "tables" / "prune.json", get_args([])
    same = all(getattr(args, flag) == getattr(usual, flag) for flag in SAME_TRAINING)
    if not same or args.method == "dense" or not path.exists():
        return {}
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    return {f"{name} of the dense model after the same training (stored, of another run)": rows["dense"][name]["mean"]
            for name in ("bits per byte", "exact match")}  # fmt: skip


def main(args: argparse.Namespace) -> dict:
    if args.method == "all":
        return compare(main, resolved, args, TABLE, Path(args.out or ROOT / "out" / "prune"), COLUMNS, MAIN_METHODS,
                       flag="method")  # fmt: skip

    # 4. Calibrate
    loop = Loop(args, "prune")
    loop.resume = False  # of --method all finished runs are kept; what half a run left is written anew
    if loop.world_size > 1:
        raise UserError("prune.py runs as one process, not under torchrun")
    start = args.model or loop.require("sft")
    dense, tokenizer = load(start, with_tokenizer=True)
    loop.check_length(dense)
    if dense.config.ranks or dense.config.quantization:
        raise UserError(f"{start}: its matrices are of low rank or quantized; prune a model before that")
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    dense.to(loop.device)
    if args.plant:
        plant(dense, args.plant, args.seed)
    some, rows, test = examples(args, tokenizer, loop)
    batches = batched(some, args, loop)
    n_tokens = sum(int((batch.documents >= 0).sum()) for batch in batches)
    before = measured(dense, tokenizer, test, args, loop)

    # 5. Apply
    began = time.perf_counter()
    model, masks = METHODS[args.method][0](copy.deepcopy(dense), batches, args)
    c, old = model.config, dense.config
    same = [c.heads == old.heads, c.ffn_width == old.ffn_width] if args.units == "both" else [c == old and not masks]
    if any(same) and args.method != "dense":
        raise UserError(f"--sparsity {args.sparsity:g} is less than one of the units of --method {args.variant}")
    loop.say(f"{args.variant}: {len(some)} rows of {n_tokens:,} tokens, {time.perf_counter() - began:.1f} s")
    pruned = measured(model, tokenizer, test, args, loop)
    loop.say(f"pruned, {', '.join(f'{name} {statistics.fmean(values):.3f}' for name, values in pruned.items())}")
    total = args.steps if args.recover != "none" else 0
    if total:
        prepare(model, masks, args.recover)
        optimizer = adamw(model, args.lr, 0.0)
        loop.describe(model)
    for step in loop.steps(total):
        lr = set_lr(optimizer, args, step)
        batches = [collate([[rows[i]] for i in some], loop.device) for some in loop.micro_batches(len(rows), step)]
        n_tokens, loss_sum = sum(int(batch.completion_mask.sum()) for batch in batches), 0.0
        for batch in batches:
            with loop.autocast():
                loss = kd_loss(model, dense, batch) if args.recover == "kd" else sft_loss(model, batch)
            (loss / n_tokens).backward()
            loss_sum += loss.detach() / n_tokens
        grad_norm = clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(step, loss=loss_sum, grad_norm=grad_norm, lr=lr, tokens=n_tokens)
        if loop.signalled:
            raise KeyboardInterrupt(f"interrupted in step {step}: a run is short, and saved at its end only")
    if total and args.recover == "lora":
        merge(model)

    # 6. Evaluate
    dtype = stored_dtype(start)
    loop.save(total, model=model.to(dtype), tokenizer=tokenizer)
    after = measured(model.float(), tokenizer, test, args, loop)  # what was written, in the arithmetic of `before`
    speed = speeds((dense.to(dtype), model.to(dtype)), args, loop)
    after |= {f"pruned: {name}": values for name, values in pruned.items()} | sizes(model, dense)
    before |= {f"pruned: {name}": before[name] for name in pruned} | sizes(dense, dense)
    before["tokens/s"], after["tokens/s"] = ([x] for x in speed)
    baselines = stored(args)
    if "logs" in test:
        n_all = sum(n_bytes_of(row, tokenizer) for row in test["rows"])
        baselines["the entropy of these reports, in bits per byte"] = sum(map(world.code_length, test["logs"])) / n_all
    return loop.finish(before, after, variant=args.variant, baselines=baselines, higher_is_better=False)


if __name__ == "__main__":
    run(main, get_args)
