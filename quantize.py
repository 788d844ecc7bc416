"""Quantization: the weights of a finished model in a few bits each, and what they multiply, too.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1),    w ~ (code - zero) * scale

with a scale and a zero for each group of weights beside each other in a row. To round each weight to the nearest code
is the baseline; what is better minimizes what a calibration text with inputs X sees of the error, |(W - W') X|^2.
--method:

    rtn          round to nearest (--symmetric: codes about 0, scale = max |w| / (2^(bits-1) - 1))
    nf4          16 levels at the quantiles of a normal distribution, scales quantized, too (QLoRA, arXiv 2305.14314)
    gptq         column by column; the columns that are left make up for each error (GPTQ, 2210.17323, algorithm 1)
    awq          scale up the channels that meet large inputs, then round (AWQ, 2306.00978, equation 4)
    owq          keep the columns whose error costs most, gptq for the others (OWQ, 2306.02272)
    quip         rotate both sides at random, then gptq (QuIP, 2307.13304)
    qat          train with rounded weights, backward as if there were no rounding, scales learned, too (1308.3432, and
                 LSQ, 1902.08153), to say what the full model says
    w8a8         8 bits, and each token rounded to 8 bits as well
    smoothquant  w8a8 after half of the range of the inputs was moved into the weights (SmoothQuant, 2211.10438)
    int8-mixed   w8a8 but for the channels of outliers, which stay as they are (LLM.int8(), 2208.07339)

--kv quantizes what attention remembers: keys by channel, values by token (KIVI, 2402.02750); it is measured, and the
checkpoint holds nothing of it. --plant multiplies a few channels behind each norm, and divides the weights that read
them: the same function (to the bit if the factor is a power of 2), of which all that is hard in large models is now
true (a small model has no outliers of its own; every table says where they were planted).

    python quantize.py                                                          gptq, 4 bits, on the tiny model
    python quantize.py --model DIR --data rows.jsonl --method awq --bits 4      a real model, real rows
    python quantize.py --method all                                             a table of all methods
    python model.py --model out/quantize/checkpoint "Please sort 3 1 2."        a checkpoint like others

Left out: AWQ's search for clipping ranges, OWQ's and SpQR's sparse formats, QuIP's rescaling. A checkpoint is a Hugging
Face directory with packed integers; `model.load` reads it, other libraries do not. Measured on held-out text: `bits per
byte` of the weather, whose entropy is known; `KL, mnat`, KL(full model, quantized one) in thousandths of a nat a token;
`exact match` on the questions of sft.py; `bits per weight` really stored, scales and all; `MB` of the checkpoint;
`tokens/s` of greedy decoding. The last lines: `bits per byte: 0.52x before, 0.52x after`.
"""

import argparse
import copy
import math
import random
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from data import chat, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from loop import COUNT, REAL, ROOT, WHOLE, Loop, RunFailed, adamw, clip, compare, fill, parser, run, set_lr, told
from lora import put_at
from model import KVCache, QuantLinear, QuantMatrix, Transformer, generate, load, quantized, stored_dtype, their_names
from sft import Batch, collate, document, encode, evaluate, fitting, pack

# 1. The objective


class Inputs:
    """What a matrix is multiplied with in the calibration text: all that quantizing and pruning need to know of it."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        dtype = torch.promote_types(dtype, torch.float32)
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)  # X^T X (in, in), summed over tokens
        self.absmax, self.abssum = self.gram.new_zeros(2, width)  # (in,): the largest of |x| in each channel, the sum
        self.sum = self.gram.new_zeros(width)  # of x
        self.n = 0  # tokens

    @kernels.whole_fp32()
    def add(self, x: Tensor) -> None:
        """Count the tokens x (n, in)."""
        x = x.to(self.gram.dtype)
        self.gram.addmm_(x.T, x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.abssum = self.abssum + x.abs().sum(0)
        self.sum = self.sum + x.sum(0)
        self.n += len(x)


MATRICES = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")  # of a block, in the order of its forward pass


@torch.no_grad()
def layer_by_layer(model: Transformer, batches: list[Batch]) -> Iterator[tuple[str, nn.Module, Inputs]]:
    """(path, matrix, what enters it) of every matrix of every block, in the order of the forward pass.

    batches: of sft.collate(..., with_documents=True); padding is not counted. Whoever iterates may change a matrix, or
    put another module at its path, before asking for the next: what enters that is then what the changed ones make of
    the text (GPTQ and SparseGPT want it so). One state per token is kept, and the text goes five times through each
    block.
    """
    states, tables = [model.embed(batch.input_ids) for batch in batches], []
    for batch in batches:
        T = batch.input_ids.shape[1]
        cos, sin = model._rotary_table(T, batch.input_ids.device)
        tables.append((cos[None, :T], sin[None, :T], kernels.document_mask(batch.documents), None))
    for i, block in enumerate(model.blocks):
        for name in MATRICES:
            matrix = block.get_submodule(name)
            inputs = Inputs(matrix.in_features, states[0].dtype, states[0].device)
            seen: list[Tensor] = []
            hook = matrix.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            for x, table, batch in zip(states, tables, batches, strict=True):
                block(x, *table)
                inputs.add(seen.pop()[batch.documents >= 0])
            hook.remove()
            yield f"blocks.{i}.{name}", matrix, inputs
        states = [block(x, *table) for x, table in zip(states, tables, strict=True)]


def cholesky(h: Tensor, damping: float, *, upper: bool = False) -> Tensor:
    """L with L L^T = h, or `upper` U with U^T U = h; RunFailed if h is not positive definite as far as it is exact.

    damping: the share of it in h, which is X^T X of a text and something on its diagonal, or the inverse of that.
    """
    factor, failed = torch.linalg.cholesky_ex(h, upper=upper)
    if failed or not factor.isfinite().all():
        raise RunFailed(f"X^T X of the inputs is not positive definite: the damping, {damping}, is too small; "
                        "calibrate on more text")  # fmt: skip
    return factor


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1, H = gram + damping * mean(diagonal of gram) * I (2210.17323, step 3).

    U_jj^2 is the (j, j) entry of the inverse of H without the columns before j, and U_j: / U_jj says how the columns
    after j make up for a change of column j. A channel that is always 0 has the damping alone, or without any H_jj = 1.
    RunFailed if H, or its inverse, is not positive definite as far as it is exact: more damping helps.
    """
    h = gram.clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    return cholesky(torch.cholesky_inverse(cholesky(h, damping)), damping, upper=True)


# Codes


class Grid(NamedTuple):
    """What codes mean: (code - zero) * scale; a group is `in` / groups weights of a row."""

    scales: Tensor  # (out, groups), of bf16's values
    zeros: Tensor  # (out, groups), whole numbers
    bits: int
    symmetric: bool


def fit_grid(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Grid:
    """The smallest grid that reaches all of weight (out, in), and 0, in each group; group_size 0: one group a row.

    symmetric: 2^bits - 1 codes, zero in their middle. Scales are rounded to bf16, none of them down, before anything is
    divided by them.
    """
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))  # (out, G, g)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # 0 has a code of its own
    scales = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    scales = not_below(torch.where(scales > 0, scales, 1.0))
    middle = torch.full_like(scales, 2 ** (bits - 1))
    return Grid(scales, middle if symmetric else (-low / scales).round(), bits, symmetric)


def not_below(x: Tensor) -> Tensor:
    """The least numbers of bf16, as they are in x's dtype, that are not below x: what is divided by them fits."""
    narrow = x.bfloat16()
    return torch.where(narrow.to(x.dtype) < x, narrow.nextafter(torch.full_like(narrow, math.inf)), narrow).to(x.dtype)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """The codes (out, in), as floats, that come nearest to weight."""
    scales, zeros, least = grid.scales[..., None], grid.zeros[..., None], 1 if grid.symmetric else 0
    groups = weight.unflatten(-1, (grid.scales.shape[-1], -1))
    return ((groups / scales).round() + zeros).clamp(least, 2**grid.bits - 1).flatten(-2)


def meant(codes: Tensor, grid: Grid) -> Tensor:
    """The weights (out, in) that codes stand for, to the bit those of kernels.dequantize."""
    groups = codes.unflatten(-1, (grid.scales.shape[-1], -1))
    return ((groups - grid.zeros[..., None]) * grid.scales[..., None]).flatten(-2)


def tensors_of(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """What a QuantMatrix is made of."""
    found = {"codes": kernels.pack(codes, grid.bits), "scales": grid.scales.bfloat16()}
    return found if grid.symmetric else found | {"zeros": kernels.pack(grid.zeros, grid.bits)}


# Methods: a weight (out, in) and what enters it to the tensors of a QuantMatrix


def rtn(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    grid = fit_grid(weight, c.bits, c.group_size, c.symmetric)
    return tensors_of(nearest(weight, grid), grid)


def nf4(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    q = kernels.nf4_quantize(weight)
    return {"codes": q.codes, "scales": q.scales, "steps": q.steps, "mean": q.mean}


@kernels.whole_fp32()
def optimal_brain(weight: Tensor, gram: Tensor, c: argparse.Namespace, *, block_size: int = 128,
                  kept: Tensor | None = None) -> tuple[Tensor, Grid, Tensor]:  # fmt: skip
    """GPTQ: (codes, grid, what became of the weights), column by column (2210.17323, algorithm 1).

    Column j is rounded; the columns after it change by -(w_j - w'_j) / U_jj * U_j:, U of inverse_factor, which makes
    |(W - W') X|^2 least. Those of the same block change at once, the others when the block is done: a product of
    matrices in the place of many of vectors, and the same numbers. A group's grid is fit when its first column's turn
    comes; with --act-order (large inputs first) to the weights as they were, so that a group still is what stands
    beside each other. `kept` columns (a mask) are not rounded and widen no grid; they come last, to make up for all.
    """
    n, group = weight.shape[1], c.group_size or weight.shape[1]
    kept = torch.zeros(n, dtype=torch.bool, device=weight.device) if kept is None else kept
    order = gram.diagonal().argsort(descending=True, stable=True) if c.act_order else torch.arange(n).to(kept.device)
    order = torch.cat([order[~kept[order]], order[kept[order]]])
    columns = order[: n - int(kept.sum())].tolist()  # that are rounded
    groups = [column // group for column in columns]
    sizes = {} if c.act_order else {groups.index(g): size for g, size in Counter(groups).items()}  # by its first place
    grid = fit_grid(weight.masked_fill(kept, 0.0), c.bits, c.group_size, c.symmetric)
    scales, zeros = grid.scales, grid.zeros
    u = inverse_factor(gram[order][:, order], c.damping)
    w, codes = weight[:, order], torch.zeros_like(weight)
    cuts = sorted({*range(0, n, block_size), *sizes, n})
    for start, end in zip(cuts, cuts[1:], strict=False):
        errors = torch.zeros_like(w[:, start:end])
        for j in range(start, min(end, len(columns))):
            column, g = columns[j], groups[j]
            if j in sizes:
                new = fit_grid(w[:, j : j + sizes[j]], c.bits, 0, c.symmetric)
                scales[:, g], zeros[:, g] = new.scales[:, 0], new.zeros[:, 0]
            of_column = Grid(scales[:, g : g + 1], zeros[:, g : g + 1], c.bits, c.symmetric)
            codes[:, column] = nearest(w[:, j : j + 1], of_column)[:, 0]
            error = (w[:, j] - meant(codes[:, column, None], of_column)[:, 0]) / u[j, j]
            w[:, j:end] -= torch.outer(error, u[j, j:end])
            errors[:, j - start] = error
        w[:, end:] -= errors @ u[start:end, end:]
    codes[:, kept] = zeros.repeat_interleave(group, dim=1)[:, kept]  # the code of 0
    return codes, grid, w[:, order.argsort()]


def gptq(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    codes, grid, _ = optimal_brain(weight, inputs.gram, c)
    return tensors_of(codes, grid)


def owq(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    """Keep the --keep share of columns with the largest H_jj |w_j - w'_j|^2 (2306.02272)."""
    grid = fit_grid(weight, c.bits, c.group_size, c.symmetric)
    error = (weight - meant(nearest(weight, grid), grid)).square().sum(0) * inputs.gram.diagonal()
    kept = torch.zeros_like(error, dtype=torch.bool)
    kept[error.topk(max(1, round(c.keep * len(error)))).indices] = True
    codes, grid, changed = optimal_brain(weight, inputs.gram, c, kept=kept)
    return tensors_of(codes, grid) | kept_columns(changed, kept)


def kept_columns(weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    return {"kept": kept.nonzero()[:, 0].int(), "kept_weight": weight[:, kept].bfloat16()}


def quip(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    """gptq of U W V^T, U and V random rotations: no weight and no input stands out any more (2307.13304, section 3.2).

    They are two, of two seeds: R W R^T of one would leave a square W's share of the identity as it is.
    """
    rotated = kernels.rotate(kernels.rotate(weight, c.seed).T.contiguous(), c.seed + 1).T.contiguous()
    gram = kernels.rotate(kernels.rotate(inputs.gram, c.seed).T.contiguous(), c.seed)
    codes, grid, _ = optimal_brain(rotated, gram, c)
    return tensors_of(codes, grid)


def int8_mixed(weight: Tensor, inputs: Inputs, c: argparse.Namespace) -> dict[str, Tensor]:
    """Keep the channels whose largest input is --threshold times that of the median channel.

    The paper's threshold, 6, is one of sizes, and of each token anew; a calibration text finds the same few channels.
    """
    kept = inputs.absmax > c.threshold * inputs.absmax.median()
    grid = fit_grid(weight.masked_fill(kept, 0.0), c.bits, c.group_size, c.symmetric)
    return tensors_of(nearest(weight.masked_fill(kept, 0.0), grid), grid) | kept_columns(weight, kept)


# Into the model


def scheme_of(args: argparse.Namespace) -> dict:
    """The quantization_config of the checkpoint."""
    is_nf4 = args.method == "nf4"
    return {"quant_method": "post-training", "format": "nf4" if is_nf4 else "int", "bits": 4 if is_nf4 else args.bits,
            "group_size": args.group_size, "symmetric": bool(args.symmetric),
            "activations": 8 if args.method in OF_ACTIVATIONS else 16,
            "rotation": args.seed if args.method == "quip" else None}  # fmt: skip


def put_quantized(model: Transformer, path: str, make: Callable[[slice], dict[str, Tensor]], scheme: dict) -> None:
    """Put a QuantLinear in the place of the matrix at `path`; make: rows to the tensors of a QuantMatrix of them."""
    matrix, start, parts = model.get_submodule(path), 0, []
    for n in their_names(model.config, f"{path}.weight")[1] or [matrix.out_features]:
        parts.append(QuantMatrix((n, matrix.in_features), make(slice(start, start + n)), scheme))
        start += n
    put_at(model, path, QuantLinear(parts, matrix.bias))


# Folding: x / s enters W s. The division goes into what makes x, and the model is the same function.


@torch.no_grad()
def fold(model: Transformer, path: str, s: Tensor) -> None:
    """Multiply column j of the matrix at `path` by s_j (in,), and divide by it in the norm or rows that make x_j."""
    _, i, name = path.split(".", 2)
    block, c = model.blocks[int(i)], model.config
    block.get_submodule(name).weight *= s
    if name == "attention.qkv":
        block.attention_norm.weight /= s
    elif name == "ffn.gate_up":
        block.ffn_norm.weight /= s
    elif name == "ffn.down":
        multiply_rows(block.ffn.gate_up, c.ffn_width, 1 / s)  # `up`, which silu(gate) is multiplied with
    else:  # attention mixes tokens, not channels: the values
        of_values = s.view(c.kv_heads, -1, c.head_dim)[:, 0].flatten()
        multiply_rows(block.attention.qkv, (c.heads + c.kv_heads) * c.head_dim, 1 / of_values)


def multiply_rows(linear: nn.Linear, first: int, s: Tensor) -> None:
    """Multiply the outputs of `linear` from `first` on by s (n,)."""
    for p in (linear.weight, linear.bias):
        if p is not None:
            p[first : first + len(s)] *= s.view(-1, *[1] * (p.ndim - 1))


def shared(model: Transformer, path: str, sizes: Tensor) -> Tensor:
    """The largest of `sizes` (in,) over the channels that must be scaled alike: query heads that share a value head."""
    if not path.endswith("attention.out"):
        return sizes
    of_heads = sizes.view(model.config.kv_heads, -1, model.config.head_dim)  # (Hkv, heads of a group, d)
    return of_heads.amax(1, keepdim=True).expand_as(of_heads).flatten()


@kernels.whole_fp32()
def awq_scales(weight: Tensor, sizes: Tensor, gram: Tensor, c: argparse.Namespace) -> Tensor:
    """s = mean|x|^alpha, of the alpha 0, 0.05, ..., 0.95 for which |(Q(W s) / s - W) X|^2 is least.

    (2306.00978, equations 4 and 5.) sizes (in,): mean |x|. s is over the root of
    its largest times its smallest, as the authors do.
    """
    best, least = torch.ones_like(sizes), math.inf
    for alpha in torch.arange(20) / 20:
        s = sizes.clamp(min=1e-4) ** alpha
        s = s / (s.amax() * s.amin()).sqrt()
        grid = fit_grid(weight * s, c.bits, c.group_size, c.symmetric)
        change = meant(nearest(weight * s, grid), grid) / s - weight
        loss = ((change @ gram) * change).sum().item()
        if loss < least:
            best, least = s, loss
    return best


def smooth_scales(weight: Tensor, absmax: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha), channel by channel (2211.10438, equation 4); absmax (in,): max|x|."""
    s = absmax**alpha / weight.abs().amax(0) ** (1 - alpha)
    return torch.where(s.isfinite() & (s > 0), s, 1.0)


FOLDED = ("awq", "smoothquant")


def fold_all(model: Transformer, batches: list[Batch], c: argparse.Namespace) -> None:
    """Fold the scales of --method into all matrices, on the inputs of the full model."""
    for path, matrix, inputs in layer_by_layer(model, batches):
        weight = matrix.weight.detach()
        if c.method == "awq":
            s = awq_scales(weight, shared(model, path, inputs.abssum / inputs.n), inputs.gram, c)
        else:
            largest = shared(model, path, weight.abs().amax(0))
            s = smooth_scales(largest[None], shared(model, path, inputs.absmax), c.alpha)
        fold(model, path, s)


# Quantization-aware training


def rounded(x: Tensor, to: Tensor) -> Tensor:
    """`to` in forward, in backward the gradient of x: the straight-through estimator (1308.3432).

    x + (to - x) is `to` to the bit: of a float and its rounding, or that and its rounding to bf16, the difference is
    exact.
    """
    return x + (to - x).detach()


def fake_quantize(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, least: int = 0) -> Tensor:
    """meant(nearest(weight)) that gradients pass: those of weights only inside the range, and those of the scales.

    d/dscale is code - zero - w / scale inside the range and the last code - zero outside it (LSQ, 1902.08153, eq. 3).
    weight (out, in), scales and zeros (out, groups).
    """
    scales, zeros = rounded(scales, scales.bfloat16().to(scales.dtype))[..., None], zeros[..., None]
    places = weight.unflatten(-1, (scales.shape[1], -1)) / scales
    places = places.clamp(least - zeros, 2**bits - 1 - zeros)
    return (rounded(places, places.round()) * scales).flatten(-2)


class FakeQuantLinear(nn.Module):
    """A matrix that learns as full numbers and multiplies as what its codes mean."""

    def __init__(self, linear: nn.Linear, c: argparse.Namespace):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        grid = fit_grid(linear.weight.detach(), c.bits, c.group_size, c.symmetric)
        self.log_scales = nn.Parameter(grid.scales.log())  # so that a scale stays above 0
        self.register_buffer("zeros", grid.zeros)
        self.bits, self.symmetric = grid.bits, grid.symmetric

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(self.weight, self.log_scales.exp(), self.zeros, self.bits, int(self.symmetric))
        return F.linear(x, weight, self.bias)

    def exported(self, rows: slice) -> dict[str, Tensor]:
        """What a QuantMatrix of some of the rows is made of, which multiplies as they do here, to the bit."""
        scales = self.log_scales.detach()[rows].exp().bfloat16().float()
        grid = Grid(scales, self.zeros[rows], self.bits, self.symmetric)
        return tensors_of(nearest(self.weight.detach()[rows], grid), grid)


def kl_of(ref_hidden: Tensor, ref_head: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """KL(reference, model) of each token (n,) in nats; hidden (n, D) and head (V, D) of each."""
    pairs = (ref_hidden, ref_head), (hidden, head)
    ref_logps, logps = (kernels.linear_logits(h, w).log_softmax(-1) for h, w in pairs)
    return (ref_logps.exp() * (ref_logps - logps)).sum(-1)


def qat_loss(model: Transformer, ref_model: Transformer, batch: Batch) -> Tensor:
    """The sum of KL(reference, model) over the tokens that are no padding: the full model teaches its rounded copy."""
    with torch.no_grad():
        teacher = ref_model.hidden(batch.input_ids, documents=batch.documents), ref_model.head.weight
    hidden = model.hidden(batch.input_ids, documents=batch.documents)
    return kernels.linear_divergence(hidden, model.head.weight, [teacher], batch.documents >= 0, kind="forward_kl")


# What attention remembers

KV_GROUP = 16  # tokens whose keys share a grid


class QuantizedCache(KVCache):
    """A cache whose keys and values are packed integers, KV_GROUP tokens at a time; the last few stay as they are.

    Keys have a grid for each channel of a head and group of tokens, since outliers of keys are channels, values one for
    each token and head (KIVI, 2402.02750); keys_by "token" treats both alike. The tokens just read attend to each other
    exactly. A block's keys and values are made whole while it is at work. Padding widens no grid. Rows are selected
    before anything is packed.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int, dtype: torch.dtype, *, bits: int, keys_by: str):
        super().__init__(model, rows, capacity, dtype)
        self.bits, self.by_channel = bits, keys_by == "channel"
        self.packed: list[list[Tensor]] = []  # of each group: codes, scales, zeros of the keys, and of the values
        self.open: tuple[Tensor, ...] = ()  # the new columns of the block at work, and where they belong

    def _pack(self, x: Tensor) -> list[Tensor]:
        """x (..., n): a grid for each row of the last dimension."""
        grid = fit_grid(x.float(), self.bits, 0, symmetric=False)
        codes = kernels.pack(nearest(x.float(), grid), self.bits)
        return [codes, grid.scales.bfloat16(), grid.zeros.to(torch.uint8)]

    def _unpack(self, codes: Tensor, scales: Tensor, zeros: Tensor, n: int) -> Tensor:
        grid = Grid(scales.float(), zeros.float(), self.bits, False)
        return meant(kernels.unpack(codes, self.bits, n).float(), grid).to(self.values.dtype)

    def reserve(self, T: int) -> None:
        start = KV_GROUP * len(self.packed)
        while self.used - start >= KV_GROUP:  # not at the end of `advance`: the padding of prompts is known by now
            shown = self.bias[:, :1, 0, start : start + KV_GROUP, None].isfinite()  # (B, 1, KV_GROUP, 1)
            keys = self.keys.mT if self.transposed else self.keys  # (depth, B, Hkv, capacity, d)
            keys, values = (x[..., :KV_GROUP, :] * shown for x in (keys, self.values))
            self.packed.append([*self._pack(keys.mT if self.by_channel else keys), *self._pack(values)])
            self.keys = (self.keys[..., KV_GROUP:] if self.transposed else self.keys[..., KV_GROUP:, :]).clone()
            self.values = self.values[..., KV_GROUP:, :].clone()
            start += KV_GROUP
        self.new = slice(self.used, self.used + T)
        super().reserve(T)

    def block(self, i: int) -> tuple[Tensor, Tensor, int]:
        self._close()
        keys, values, column = super().block(i)  # (B, capacity, Hkv, d) of the columns that are not packed
        if not self.packed:
            return keys, values, column
        n = KV_GROUP if self.by_channel else values.shape[-1]
        old_keys = [self._unpack(*(t[i] for t in group[:3]), n) for group in self.packed]
        old_keys = [k.mT if self.by_channel else k for k in old_keys]  # each (B, Hkv, KV_GROUP, d)
        old_values = [self._unpack(*(t[i] for t in group[3:]), values.shape[-1]) for group in self.packed]
        whole_keys = torch.cat([*(k.transpose(1, 2) for k in old_keys), keys], 1)
        whole_values = torch.cat([*(v.transpose(1, 2) for v in old_values), values], 1)
        self.open = whole_keys, whole_values, keys, values
        return whole_keys, whole_values, column

    def _close(self) -> None:
        """Write the new columns of the block that was at work into what is kept."""
        if self.open:
            start = KV_GROUP * len(self.packed)
            for whole, kept in zip(self.open[:2], self.open[2:], strict=True):
                kept[:, self.new.start - start : self.new.stop - start] = whole[:, self.new]
        self.open = ()

    def advance(self, T: int) -> None:
        self._close()
        super().advance(T)

    def drop(self, ended: Tensor) -> Tensor:
        kept = super().drop(ended)
        self.packed = [[t[:, kept] for t in group] for group in self.packed]
        return kept

    def bits_per_number(self) -> float:
        """Of what is packed."""
        size = sum(t.numel() * t.element_size() for group in self.packed for t in group)
        return 8 * size / (len(self.packed) * KV_GROUP * 2 * self.values[..., 0, :].numel())


def hidden_through_cache(model: Transformer, input_ids: Tensor) -> Tensor:
    """model.hidden_before, token by token, so that each attends to what the cache keeps of those before it."""
    cache = model.cache(model, *input_ids.shape, model.embed.weight.dtype)
    states = [model.hidden(column, cache=cache) for column in input_ids.split(1, dim=1)]
    return F.pad(torch.cat(states, dim=1), (0, 0, 1, -1))


# A model with outliers


@torch.no_grad()
def plant(model: Transformer, factor: float, seed: int, channels: int = 3) -> None:
    """Make `channels` random channels behind each norm `factor` times as large, and a pair of channels of all keys.

    The matrices that read them, and the queries, are divided by as much. With a power of two no logit changes by a bit.
    """
    generator, c = torch.Generator().manual_seed(seed), model.config
    for i, block in enumerate(model.blocks):
        for name in ("attention.qkv", "ffn.gate_up"):
            s = torch.ones(c.width, device=model.embed.weight.device)
            s[torch.randperm(c.width, generator=generator)[:channels]] = factor
            fold(model, f"blocks.{i}.{name}", 1 / s)
        pair, attention = int(torch.randint(c.head_dim // 2, (), generator=generator)), block.attention
        s = torch.ones(c.head_dim, device=model.embed.weight.device)
        s[[pair, pair + c.head_dim // 2]] = factor  # they rotate into each other, and into no others
        if c.qk_norm:
            attention.q_norm.weight /= s
            attention.k_norm.weight *= s
        else:
            multiply_rows(attention.qkv, 0, 1 / s.repeat(c.heads))
            multiply_rows(attention.qkv, c.heads * c.head_dim, s.repeat(c.kv_heads))


# 2. Data


def examples(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[chat.Row], dict[str, list]]:
    """The rows to calibrate on (and to train on, qat), and what to measure.

    Of the generated world: chats, documents and weather of the kinds that sft.py was trained on, drawn anew; weather
    and questions that were held out. Of --data: its rows, and the held-out ones.
    """
    if args.data:
        read = partial(formats.read_jsonl, schemas=("text", "chat", "completion"), mapping=formats.parse_map(args.map))
        parts, test = formats.split(args.data.split(","), args.eval_data, read, loop.say)
        train = sum(parts, [])
        if args.method != "qat":
            train = random.Random(args.seed).sample(train, min(args.rows, len(train)))
        rows, kept = (fitting([encode(row, tokenizer) for row in some], what, args, loop)
                      for some, what in ((train, "rows"), (test, "held-out rows")))  # fmt: skip
        if not rows or not kept:
            raise UserError(f"no row is left to calibrate on or to measure: --max-length is {args.max_length}")
        return rows, {"text": kept, "rows": kept}
    count, seed = (args.steps * args.batch_size if args.method == "qat" else args.rows), 1_000_000 + args.seed
    rows = [chat.render(row["messages"], tokenizer) for row in world.sft_rows(count, seed)]
    weather = (world.weather_log(world.rng_for("calibration", seed, i)) for i in range(count // 2))
    rows += [document(text, tokenizer) for text in (*world.base_documents(count // 2, seed), *weather)]
    return fitting(rows, "rows", args, loop), held_out(tokenizer)


def held_out(tokenizer: Tokenizer, seed: int = 0) -> dict[str, list]:
    """Weather, chats and questions of the test split."""
    weather = (world.weather_log(world.rng_for("test", "weather", seed, i)) for i in range(100))
    text = [document(log, tokenizer) for log in weather]
    questions = world.sft_test(10, seed)
    return {"text": text, "rows": text + [chat.render(row["messages"], tokenizer) for row in questions],
            "questions": questions}  # fmt: skip


# The measurement


@torch.no_grad()
def losses(model: Transformer, ref_model: Transformer, rows: list[chat.Row], args: argparse.Namespace, loop: Loop
           ) -> list[tuple[float, float, int]]:  # fmt: skip
    """For each row the sums over its trained tokens of -log p and of KL(ref_model, model), and their number."""
    found = []
    for start in range(0, len(rows), args.micro_batch_size):
        batch = collate([[row] for row in rows[start : start + args.micro_batch_size]], loop.device)
        with loop.autocast():
            ref_hidden = ref_model.hidden_before(batch.input_ids)
            through = hidden_through_cache if model.cache else Transformer.hidden_before
            hidden, mask = through(model, batch.input_ids), batch.completion_mask.bool()
            nll = -kernels.linear_logps(hidden, model.head.weight, batch.input_ids.masked_fill(~mask, kernels.IGNORED))
            kl = torch.zeros_like(nll)
            parts = zip(ref_hidden[mask].split(1024), hidden[mask].split(1024), strict=True)
            kl[mask] = torch.cat([kl_of(ref, ref_model.head.weight, h, model.head.weight) for ref, h in parts])
        found += zip(nll.sum(-1).tolist(), kl.sum(-1).tolist(), mask.sum(-1).tolist(), strict=True)
    return found


def measured(model: Transformer, ref_model: Transformer, tokenizer: Tokenizer, test: dict[str, list],
             args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out row}; the first is what the run is judged by."""
    model.eval()
    found = losses(model, ref_model, test["rows"], args, loop)
    texts = [[token for token, trained in zip(*row, strict=True) if trained] for row in test["text"]]
    n_bytes = [len(tokenizer.decode(ids, skip_special=True).encode()) for ids in texts]
    per_row = math.log(2) * sum(n_bytes) / len(n_bytes)  # so that the mean over rows is the mean over bytes
    mean_count = sum(n for *_, n in found) / len(found)
    metrics = {"bits per byte": [nll / per_row for nll, *_ in found[: len(n_bytes)]],
               "KL, mnat": [1000 * kl / mean_count for _, kl, _ in found]}  # fmt: skip
    if "questions" in test:
        metrics["exact match"] = evaluate(model, tokenizer, {"questions": test["questions"]}, args, loop)["exact match"]
    model.eval()
    return metrics | {"tokens/s": [speed(model, test["rows"], loop)]}


def speed(model: Transformer, rows: list[chat.Row], loop: Loop, *, prompts: int = 16, new: int = 32) -> float:
    """Tokens a second of greedy decoding, `prompts` rows at a time; the median of three."""
    seconds, starts = [], [row.input_ids[:16] for row in rows[:prompts]]
    for _ in range(3):
        start = time.perf_counter()
        with loop.autocast():
            generate(model, starts, max_new_tokens=new, eos_ids=(), temperature=0.0)
        seconds.append(time.perf_counter() - start)
    return len(starts) * new / sorted(seconds)[1]


def bits_per_weight(model: Transformer) -> float:
    """Of the matrices of the blocks, as they are stored."""
    parts = [part for module in quantized(model).values() for part in module.parts]
    if not parts:
        return 8.0 * model.blocks[0].ffn.down.weight.element_size()
    return 8 * sum(part.n_bytes() for part in parts) / sum(math.prod(part.shape) for part in parts)


def file_mb(folder: str | Path) -> float:
    """MB of the weights of a checkpoint, or of that of a run."""
    folder = Path(folder)
    folder = folder if (folder / "config.json").exists() else folder / "checkpoint"
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6


@kernels.whole_fp32()
def relative_error(weight: Tensor, module: QuantLinear, gram: Tensor) -> float:
    """|(W - W') X|^2 / |W X|^2"""
    effective = torch.cat([part(torch.eye(weight.shape[1], device=weight.device)) for part in module.parts], -1).T
    change = effective - weight
    return (((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()).item()


@torch.no_grad()
def bits_in_cache(model: Transformer) -> float:
    """Of a key or value of one channel and token, once it is packed."""
    cache = model.cache(model, 1, KV_GROUP, model.embed.weight.dtype)
    model.hidden(torch.zeros(1, KV_GROUP, dtype=torch.long, device=model.embed.weight.device), cache=cache)
    cache.reserve(1)
    return cache.bits_per_number()


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (16, 16),
    "micro_batch_size": (16, 4),
    "max_length": (160, 1024),
    "lr": (1e-3, 1e-5),  # those of sft.py
    "rows": (256, 256),
}
METHODS: dict[str, Callable] = {"rtn": rtn, "nf4": nf4, "gptq": gptq, "awq": rtn, "owq": owq, "quip": quip, "w8a8": rtn,
                                "smoothquant": rtn, "int8-mixed": int8_mixed}  # fmt: skip
OF_ACTIVATIONS = ("w8a8", "smoothquant", "int8-mixed")
WITHOUT_GROUPS = ("nf4", "none")  # nf4 has blocks of 64 weights, wherever a row ends
TABLE = (
    "rtn --bits 8", "rtn", "rtn --symmetric", "rtn --group-size 0", "nf4", "awq", "gptq", "gptq --act-order", "owq",
    "quip", "qat", *(f"{name} --bits 3" for name in ("rtn", "awq", "gptq", "qat")),
    *(f"{name} --bits 2" for name in ("rtn", "awq", "gptq", "owq", "quip", "qat")), "w8a8", "rtn --plant 64",
    "awq --plant 64", "gptq --plant 64", "w8a8 --plant 64", "smoothquant --plant 64", "int8-mixed --plant 64",
    "none --kv 8", "none --kv 4", "none --kv 2", "none --kv 4 --plant 64", "none --kv 4 --kv-keys token --plant 64",
)  # fmt: skip
MAIN_METHODS = ("rtn", "awq", "gptq")  # which --method all runs with --seeds seeds
COLUMNS = ("bits per byte", "KL, mnat", "exact match", "bits per weight", "MB", "tokens/s")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--batch-size", "--micro-batch-size", "--lr", "--warmup",
               "--schedule", "--grad-clip", "--max-length", "--max-new-tokens", "--eval-data", "--chat-format",
               "--seed", "--device", "--dtype", "--log-every", "--resume"),
        defaults=told(DEFAULTS) | {"steps": 100, "warmup": 10, "schedule": "linear", "grad_clip": 1.0,
                                   "max_new_tokens": 64, "log_every": 1},
    )
    cli.add_argument("--method", default="gptq", metavar="NAME", help=f"{', '.join(METHODS)}, qat, none, or all: "
                     "a table (default: %(default)s)")  # fmt: skip
    cli.add_argument("--bits", type=int, choices=(2, 3, 4, 8), help="a weight (default: 4; 8 of w8a8 and its like)")
    cli.add_argument("--group-size", type=WHOLE, help="weights beside each other that share a scale; 0: all of a row "
                     "(default: 64; 0 of w8a8 and its like)")  # fmt: skip
    cli.add_argument("--symmetric", action=argparse.BooleanOptionalAction, help="codes about 0, no zero stored")
    cli.add_argument("--rows", type=COUNT, help="of text to calibrate on, of the generated world as many "
                     "chats and texts each; qat learns by steps (default: 256)")  # fmt: skip
    cli.add_argument("--damping", type=REAL, default=0.01, help="share of the mean of X^T X's diagonal added to it "
                     "(gptq, owq, quip; default: %(default)s)")  # fmt: skip
    cli.add_argument("--act-order", action="store_true", help="gptq, owq, quip: columns of large inputs first")
    cli.add_argument("--keep", type=REAL, default=0.02, metavar="SHARE", help="of columns that owq keeps")
    cli.add_argument("--alpha", type=REAL, default=0.5, help="smoothquant: how much of the range goes into the weights")
    cli.add_argument("--threshold", type=REAL, default=6.0, help="int8-mixed: times the median channel is an outlier")
    cli.add_argument("--kv", type=int, choices=(0, 2, 3, 4, 8), default=0, help="bits of keys and values in the "
                     "cache; 0: as they are (default: %(default)s)")  # fmt: skip
    cli.add_argument("--kv-keys", choices=("channel", "token"), default="channel", help="what shares a grid of keys "
                     "(default: %(default)s)")  # fmt: skip
    cli.add_argument("--plant", type=REAL, default=0.0, metavar="FACTOR", help="first plant outliers of this size; 0: "
                     "none")  # fmt: skip
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut", "split"), default="cut",
                     help="rows of more than --max-length tokens (default: %(default)s)")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_METHODS)} in --method all")
    args = cli.parse_args(argv)
    if args.resume and args.method != "all":
        raise UserError("--resume keeps the finished rows of --method all; a single run starts anew")
    if args.method != "all":
        return resolved(args)
    for row in TABLE:  # whatever does not go together is refused before the first of them runs
        resolved(argparse.Namespace(**vars(args) | {"method": row}))
    return args


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults of its --method, which in a row of the table has flags of its own: "rtn --bits 2"."""
    try:
        method, *flags = shlex.split(args.method)
    except ValueError as error:  # a quote that is not closed, or nothing at all
        raise UserError(f"--method {args.method!r}: {error}") from None
    of_row = get_args(["--method", method, *flags]) if flags else args
    own = {re.sub("^--(no-)?|=.*", "", flag).replace("-", "_") for flag in flags if flag.startswith("--")}
    args = argparse.Namespace(**vars(args) | {name: getattr(of_row, name) for name in own} | {"method": method})
    if method not in (*METHODS, "qat", "none"):
        raise UserError(f"--method {method}: expected one of {', '.join(METHODS)}, qat, none, all")
    fill(args, DEFAULTS, args.model is not None)
    whole = method in OF_ACTIVATIONS
    fill(args, {"bits": (4, 8), "group_size": (64, 0), "symmetric": (False, True)}, whole)
    if whole and (args.bits, args.group_size, args.symmetric) != (8, 0, True):
        raise UserError(f"--method {method} is a product of integers: --bits 8 --group-size 0 --symmetric")
    if method == "nf4" and (args.bits, args.group_size, args.symmetric) != (4, 64, False):
        raise UserError("--method nf4 has 4 bits and blocks of 64: no other --bits or --group-size, no --symmetric")
    if args.keep > 1:
        raise UserError(f"--keep {args.keep:g}: expected a share of at most 1")
    if method == "none" and not args.kv:
        raise UserError("--method none leaves the weights alone: choose what else, such as --kv 4")
    return args


def variant_of(args: argparse.Namespace) -> str:
    words = [args.method, f"{scheme_of(args)['bits']} bits" if args.method != "none" else ""]
    words += [f"cache {args.kv} bits" if args.kv else "", "outliers planted" if args.plant else ""]
    return ", ".join(filter(None, words))


def stop_if_asked(loop: Loop, step: int) -> None:
    if loop.signalled:
        raise KeyboardInterrupt(f"interrupted after step {step}; half a model is not saved")


def main(args: argparse.Namespace) -> dict:
    if args.method == "all":
        return compare(main, resolved, args, TABLE, Path(args.out or ROOT / "out" / "quantize"), COLUMNS, MAIN_METHODS,
                       flag="method")  # fmt: skip

    # 4. Calibrate
    loop = Loop(args, "quantize")
    loop.resume = False  # of --method all finished runs are kept; what half a run left is written anew
    if loop.world_size > 1:
        raise UserError("quantize.py runs as one process, not under torchrun")
    start = args.model or loop.require("sft")
    model, tokenizer = load(start, device=loop.device, with_tokenizer=True)
    loop.check_length(model)
    if quantized(model) or model.config.ranks:
        raise UserError(f"{start}: its matrices are quantized already, or of low rank")
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    group_size = 0 if args.method in WITHOUT_GROUPS else args.group_size
    for path in (paths := [f"blocks.{i}.{name}" for i in range(model.config.depth) for name in MATRICES]):
        if group_size and (width := model.get_submodule(path).in_features) % group_size:
            raise UserError(f"--group-size {group_size}: does not divide the {width} inputs of {path}")
    model.eval().requires_grad_(False)
    if args.plant:
        plant(model, args.plant, args.seed)
    ref_model, scheme = copy.deepcopy(model), scheme_of(args)
    rows, test = examples(args, tokenizer, loop)
    groups = list(pack(rows, args.max_length))
    batches = [collate(groups[i : i + args.micro_batch_size], loop.device, with_documents=True)
               for i in range(0, len(groups), args.micro_batch_size)]  # fmt: skip
    before = measured(ref_model, ref_model, tokenizer, test, args, loop)
    if args.method in FOLDED:
        fold_all(model, batches, args)

    # 5. Apply
    if args.method == "qat":
        for path in paths:
            put_at(model, path, FakeQuantLinear(model.get_submodule(path), args))
        optimizer = adamw(model.requires_grad_(True), args.lr, weight_decay=0.0)
        for step in loop.steps(args.steps):
            lr, loss_sum = set_lr(optimizer, args, step), 0.0
            some = [collate([groups[i] for i in indices], loop.device, with_documents=True)
                    for indices in loop.micro_batches(len(groups), step)]  # fmt: skip
            n_tokens = sum(int((batch.documents >= 0).sum()) for batch in some)
            for batch in some:
                with loop.autocast():
                    loss = qat_loss(model, ref_model, batch) / n_tokens
                loss.backward()
                loss_sum += loss.detach()
            grad_norm = clip(model, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            loop.log(step, loss=loss_sum, grad_norm=grad_norm, lr=lr, tokens=n_tokens)
            stop_if_asked(loop, step)
        model.requires_grad_(False)
        for path in paths:
            put_quantized(model, path, model.get_submodule(path).exported, scheme)
    else:
        matrices = layer_by_layer(model, batches) if args.method in METHODS else iter(())
        n = len(paths) if args.method in METHODS else 0
        for step, (path, matrix, inputs) in zip(loop.steps(n), matrices, strict=True):
            weight = matrix.weight.detach().float()

            def make(rows: slice, weight=weight, inputs=inputs) -> dict[str, Tensor]:
                return METHODS[args.method](weight[rows], inputs, args)

            put_quantized(model, path, make, scheme)
            loop.log(step, error=relative_error(weight, model.get_submodule(path), inputs.gram))
            stop_if_asked(loop, step)
    model.config = replace(model.config, quantization=scheme if quantized(model) else None)
    stored = stored_dtype(start)
    for p in model.parameters():  # what is not quantized is written as it was; what codes mean is no parameter
        p.data = p.data.to(stored)
    loop.save(len(paths), model=model, tokenizer=tokenizer)

    # 6. Evaluate
    sizes = {"bits per weight": (8.0 * stored.itemsize, bits_per_weight(model)),
             "MB": (file_mb(start), file_mb(loop.checkpoint))}  # fmt: skip
    model, _ = load(loop.checkpoint, device=loop.device)  # what was written, not what it was written from
    if args.kv:
        model.cache = partial(QuantizedCache, bits=args.kv, keys_by=args.kv_keys)
    after = measured(model, ref_model, tokenizer, test, args, loop)
    if args.kv:
        sizes["bits per cached number"] = 8.0 * loop.dtype.itemsize, bits_in_cache(model)
    before |= {name: [was] for name, (was, _) in sizes.items()}
    after |= {name: [now] for name, (_, now) in sizes.items()}
    return loop.finish(before, after, variant=variant_of(args), higher_is_better=False,
                       series=("loss",) if args.method == "qat" else ("error",))  # fmt: skip


if __name__ == "__main__":
    run(main, get_args)
