"""The fused operations of a transformer: plain PyTorch, exact gradients, no CUDA code, no Triton.

Each kernel is a pure function with a short eager `*_reference` beside it, which is the definition of what it computes.
Two ways lead to speed. Eagerly, a `torch.autograd.Function` with a closed-form backward makes fewer passes over memory
than autograd's chain of small operations; each one says by how much (2 CPU threads, fp32). After `use_compile(True)`
torch.compile fuses instead: the references themselves for the elementwise kernels, and the body of one chunk, of a
fixed size, for the losses over the vocabulary. Statistics (norms, softmax, log-sum-exp) are at least fp32.

The losses over the vocabulary never hold the (tokens, vocab) logits. They walk over the tokens in chunks:

    linear_cross_entropy   keeps nothing for the backward: a sum has one scalar of upstream gradient, so the gradient is
                           computed in the forward, where the chunk's softmax is at hand, and scaled later (3 products)
    linear_logps           keeps one log-sum-exp a token; the upstream gradient is not known before the backward, which
                           therefore computes the chunk's logits once more (4 products)
    linear_divergence      between a student and its teachers: like linear_cross_entropy, and one product a teacher

Importing this file flushes denormal numbers to zero, which slow a small fp32 model down 5 to 70 times on a CPU.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

torch.set_flush_denormal(True)

IGNORED = -100  # a label that takes no part in the loss, as in torch.nn.functional.cross_entropy


@contextlib.contextmanager
def whole_fp32() -> Iterator[None]:
    """Products of fp32 matrices in fp32, not in TF32: a Gram matrix squares what is small, and TF32 then loses it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling

_compiling = False


def use_compile(on: bool) -> bool:
    """Switch torch.compile on or off for all kernels of this process; returns whether it is on now.

    Without a working compiler (g++ on a CPU, Triton on a GPU) it stays off, and one line on stderr says so. Running
    into torch's limit of recompilations is made an error: past it torch would silently run eagerly.
    """
    global _compiling
    _compiling = on and _has_compiler()
    if _compiling and hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if on and not _compiling:
        print("kernels: torch.compile finds no working compiler here; running eagerly, slower, to the same end",
              file=sys.stderr)  # fmt: skip
    return _compiling


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Nothing is compiled or runs compiled in here: for generation, where every step has a new length."""
    global _compiling
    before, _compiling = _compiling, False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _compiling = before


@functools.cache
def _has_compiler() -> bool:
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor import cpp_builder, exc  # costs seconds, hence not at the top

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


def _fused(body: Callable, dynamic: bool | None = None) -> Callable:
    """`body`, compiled if the switch is on; dynamic=False where its shapes never change, else torch finds out."""
    if not _compiling or torch.compiler.is_compiling():  # inside a compiled block there is nothing left to do
        return body
    return _compiled(body, dynamic)


@functools.cache
def _compiled(body: Callable, dynamic: bool | None) -> Callable:
    return torch.compile(body, dynamic=dynamic)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: fp32 for half precision, unchanged otherwise."""
    return torch.promote_types(dtype, torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Root mean square norm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, like x (arXiv 1910.07467, equation 4).

    x (..., D), weight (D,).
    """
    if _compiling:
        return _fused(rms_norm_reference)(x, weight, eps)
    if not torch.is_grad_enabled() and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # one operation where there were seven; its backward is slower
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms and n = x r: dx = r (g w - n mean(g w n)), dw = sum of g n over all vectors."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        grad = grad.to(r.dtype)
        gx = (grad * x).reshape(-1, x.shape[-1])  # both sums below are products with this one matrix
        dx = dw = None
        if ctx.needs_input_grad[0]:
            mean = (gx @ weight.to(r.dtype)).view_as(r) / x.shape[-1]
            dx = (grad * weight).mul_(r).addcmul_(x, mean * r**3, value=-1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (r.reshape(-1) @ gx).to(weight.dtype)
        return dx, dw, None


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x + residual, weight, eps), x + residual


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual itself: the joint between two blocks. All but weight (..., D)."""
    if _compiling:
        return _fused(add_rms_norm_reference)(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (1|B, T, 1, d): the same for every head
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) in the layout of Hugging Face checkpoints, like x.

    Dimensions i and i + d/2 make a pair: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]. The paper pairs 2i and 2i + 1;
    the two agree at position 0 and nowhere else. x (B, T, H, d), cos and sin (1|B, T, d) without gradient.
    """
    if _compiling:
        return _fused(rotary_reference)(x, cos, sin)
    if not torch.is_grad_enabled():
        return _rotate(x, cos, *sin.chunk(2, dim=-1))
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """The backward of a rotation is the rotation back. Writes each half, without neg, cat, two products and a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, *sin.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        sin1, sin2 = sin.chunk(2, dim=-1)
        return _rotate(grad, cos, -sin2, -sin1), None, None


def _rotate(x: Tensor, cos: Tensor, sin1: Tensor, sin2: Tensor) -> Tensor:
    cos, sin1, sin2 = cos.unsqueeze(-2), sin1.unsqueeze(-2), sin2.unsqueeze(-2)  # the same for every head
    x1, x2 = x.chunk(2, dim=-1)
    out = x * cos
    out1, out2 = out.chunk(2, dim=-1)
    out1.addcmul_(x2, sin1, value=-1)
    out2.addcmul_(x1, sin2)
    return out.to(x.dtype)


def qk_norm_rotary_reference(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_reference(rms_norm_reference(x, weight, eps), cos, sin)


def qk_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Qwen3's queries and keys: each head of x (B, T, H, d) normed with weight (d,), then rotated."""
    if _compiling:
        return _fused(qk_norm_rotary_reference)(x, weight, eps, cos, sin)
    return rotary(rms_norm(x, weight, eps), cos, sin)


# ----------------------------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), where gate_up (..., 2F) holds gate first, then up; returns (..., F)."""
    if _compiling:
        return _fused(swiglu_reference)(gate_up)
    if not torch.is_grad_enabled():
        return swiglu_reference(gate_up)
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Writes both halves of the gradient in place, where autograd would concatenate them."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        torch.mul(grad, activated, out=d_up)
        return d_gate_up


# ----------------------------------------------------------------------------------------------------------------------
# A frozen matrix with a low-rank one beside it


def lora_linear_reference(
    x: Tensor, weight: Tensor | Callable[[], Tensor], bias: Tensor | None, down: Tensor, up: Tensor,
    rows: Sequence[tuple[int, int]], scale: float, dropped: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = F.linear(x, weight() if callable(weight) else weight, bias)
    h, done = F.linear(x if dropped is None else dropped, down).unflatten(-1, (len(rows), up.shape[1])), 0
    for p, (start, end) in enumerate(rows):
        part, done = up[done : done + end - start], done + end - start
        y = y + F.pad(scale * F.linear(h[..., p, :], part), (start, y.shape[-1] - end))
    return y


def lora_linear(
    x: Tensor, weight: Tensor | Callable[[], Tensor], bias: Tensor | None, down: Tensor, up: Tensor,
    rows: Sequence[tuple[int, int]], scale: float, dropped: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias, and scale * (x A_p^T) B_p^T on the outputs start to end of each p in `rows` (arXiv 2106.09685).

    x (..., in); weight (out, in) and bias (out,) without gradient, or a function that makes the weight anew in forward
    and in backward, so that a quantized one is never kept whole; down (P r, in), the A_p below each other; up (sum of
    end - start, r), the B_p. `rows` are apart: the q, k and v of one matrix, each with factors of its own. `dropped`
    stands in for x before A.
    """
    if _compiling:
        return lora_linear_reference(x, weight, bias, down, up, rows, scale, dropped)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        made = weight
        weight = (lambda: made().to(dtype)) if callable(made) else made.to(dtype)
        x, bias, down, up, dropped = (None if t is None else t.to(dtype) for t in (x, bias, down, up, dropped))
    return _LoRALinear.apply(x, weight, bias, down, up, tuple(rows), scale, dropped)


class _LoRALinear(torch.autograd.Function):
    """No product is scaled, padded or added in a pass of its own, and nothing is computed for the frozen weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, rows, scale, dropped) -> Tensor:
        seen = x if dropped is None else dropped
        h = seen.reshape(-1, x.shape[-1]) @ down.T * scale  # (n, P r)
        y = F.linear(x, weight() if callable(weight) else weight, bias)
        flat, r, done = y.view(-1, y.shape[-1]), up.shape[1], 0
        for p, (start, end) in enumerate(rows):
            flat[:, start:end].addmm_(h[:, p * r : (p + 1) * r], up[done : done + end - start].T)
            done += end - start
        ctx.weight, ctx.rows, ctx.scale, ctx.with_dropped = weight, rows, scale, dropped is not None
        ctx.save_for_backward(seen, h, down, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, h, down, up = ctx.saved_tensors
        g, r = grad.reshape(-1, grad.shape[-1]), up.shape[1]
        gh, d_up, done = torch.empty_like(h), torch.empty_like(up), 0
        for p, (start, end) in enumerate(ctx.rows):
            g_p, at = g[:, start:end], slice(done, done + end - start)
            torch.mm(g_p.T, h[:, p * r : (p + 1) * r], out=d_up[at])
            torch.mm(g_p, up[at], out=gh[:, p * r : (p + 1) * r])
            done += end - start
        gh *= ctx.scale
        dx = d_dropped = None
        if ctx.needs_input_grad[0]:
            dx = g @ (ctx.weight() if callable(ctx.weight) else ctx.weight)
        if ctx.with_dropped:
            d_dropped = (gh @ down).view_as(seen) if ctx.needs_input_grad[7] else None
        elif dx is not None:
            dx.addmm_(gh, down)
        dx = None if dx is None else dx.view_as(seen)
        return dx, None, None, gh.T @ seen.reshape(-1, seen.shape[-1]), d_up, None, None, d_dropped


# ----------------------------------------------------------------------------------------------------------------------
# Four bits a weight


class NF4(NamedTuple):
    """A matrix in 4-bit NormalFloat, with its scales quantized too (QLoRA, arXiv 2305.14314): 4.13 bits a weight."""

    codes: Tensor  # (n / 2,) uint8: two places in nf4_levels a byte, the earlier weight in the high half
    scales: Tensor  # (n / 64,) int8: of each block of 64 weights its largest size, less `mean`, over steps / 127
    steps: Tensor  # (n / 64 / 256, rounded up) fp32: of each 256 blocks
    mean: Tensor  # () fp32
    shape: tuple[int, ...]


@functools.cache
@torch.inference_mode(False)  # what is first asked for while generating must serve training too
def nf4_levels(device: torch.device | str = "cpu") -> Tensor:
    """(16,): quantiles of a normal distribution, 0 among them, from -1 to 1 (2305.14314, section 3 and appendix E).

    They stay on the device: a copy to a GPU can be no part of a CUDA graph.
    """
    positive, negative = (torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    levels = torch.cat([-torch.special.ndtri(negative), torch.zeros(1, dtype=torch.float64),
                        torch.special.ndtri(positive).flip(0)])  # fmt: skip
    return (levels / levels.amax()).float().to(device)


def nf4_quantize(weight: Tensor) -> NF4:
    """The nearest level for each weight over the largest size in its block of 64; weights (of any shape) in a row."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)  # (N, 64)
    largest = blocks.abs().amax(-1)
    mean = largest.mean()
    groups = F.pad(largest - mean, (0, -len(largest) % 256)).view(-1, 256)
    steps = groups.abs().amax(-1)
    scales = (groups / steps[:, None].clamp(min=1e-30) * 127).round().to(torch.int8).flatten()[: len(largest)]
    size = _nf4_sizes(scales, steps, mean)[:, None]
    levels = nf4_levels(flat.device)
    codes = torch.bucketize(blocks / size.clamp(min=1e-30), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return NF4(codes[::2] << 4 | codes[1::2], scales, steps, mean, tuple(weight.shape))


def _nf4_sizes(scales: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    return mean + scales * (steps / 127).repeat_interleave(256)[: len(scales)]  # (N,)


def nf4_dequantize(q: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that `q` stands for, in their shape."""
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=-1).int()  # (n / 2, 2)
    blocks = nf4_levels(q.codes.device)[codes].view(-1, 64) * _nf4_sizes(q.scales, q.steps, q.mean)[:, None]
    return blocks.flatten()[: math.prod(q.shape)].view(q.shape).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Integers of 2, 3, 4 or 8 bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n), integers from 0 to 2^bits - 1, as (..., m) uint8: code i at bits i * bits and up, lowest first.

    Two codes of 4 bits share a byte, four of 2, and eight of 3 bits share three; the last bytes are filled with 0.
    """
    (count, n_bytes), device = word(bits), codes.device
    shifts, byte_shifts = bits * torch.arange(count, device=device), 8 * torch.arange(n_bytes, device=device)
    words = F.pad(codes.int(), (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    words = (words << shifts).sum(-1)  # of at most 24 bits
    return (words[..., None] >> byte_shifts & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes (..., n) of each row of `packed` (..., m), in uint8 or, of 3 bits, int32."""
    (count, n_bytes), device = word(bits), packed.device
    if n_bytes > 1:
        byte_shifts = 8 * torch.arange(n_bytes, dtype=torch.int32, device=device)
        packed = (packed.unflatten(-1, (-1, n_bytes)).int() << byte_shifts).sum(-1, dtype=torch.int32)
    codes = packed[..., None] >> bits * torch.arange(count, dtype=packed.dtype, device=device) & (1 << bits) - 1
    return codes.flatten(-2)[..., :n]


def word(bits: int) -> tuple[int, int]:
    """How many codes fill how many whole bytes."""
    return math.lcm(bits, 8) // bits, math.lcm(bits, 8) // 8


class Packed(NamedTuple):
    """A matrix (out, in) of `bits` bits a weight: (code - zero) * scale, with a scale and a zero for each group.

    A group is in / groups weights of one row beside each other.
    """

    codes: Tensor  # (out, in * bits / 8) uint8, as `pack` lays them
    scales: Tensor  # (out, groups) bf16
    zeros: Tensor | None  # (out, groups * bits / 8, rounded up) uint8, laid alike; None: all are 2^(bits - 1)
    bits: int
    shape: tuple[int, int]


def dequantize(q: Packed | NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (out, in) that `q` stands for, computed in fp32."""
    if isinstance(q, NF4):
        return nf4_dequantize(q, dtype)
    groups = q.scales.shape[1]
    codes = unpack(q.codes, q.bits, q.shape[1]).unflatten(-1, (groups, -1)).float()
    zeros = 2.0 ** (q.bits - 1) if q.zeros is None else unpack(q.zeros, q.bits, groups)[..., None].float()
    return ((codes - zeros) * q.scales[..., None].float()).flatten(1).to(dtype)


def quantized_linear_reference(x: Tensor, q: Packed | NF4, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize(q, x.dtype), bias)


def quantized_linear(x: Tensor, q: Packed | NF4, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; W is made whole for the product and not kept, in backward it is made anew. x (..., in)."""
    if _compiling:
        return _fused(quantized_linear_reference)(x, q, bias)
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        return quantized_linear_reference(x, q, bias)
    nothing = x.new_zeros(0, x.shape[-1]), x.new_zeros(0, 1)
    return lora_linear(x, functools.partial(dequantize, q, x.dtype), bias, *nothing, (), 0.0)


FEW = 16  # rows of a product that reading the weights takes longer than


def lay_out(q: Packed | NF4) -> tuple[Tensor, Tensor] | None:
    """`q` as few_rows_linear reads it: 8 bits with one scale a row and no zeros, 4 bits in groups of 32 to 256.

    None for what PyTorch has no kernel for.
    """
    if isinstance(q, NF4) or q.codes.device.type != "cpu":
        return None
    group = q.shape[1] // q.scales.shape[1]
    if q.bits == 8 and q.zeros is None and group == q.shape[1]:
        return (q.codes ^ 128).view(torch.int8), q.scales[:, 0].contiguous()
    if q.bits != 4 or group not in (32, 64, 128, 256) or q.shape[0] % 16:
        return None
    zeros = torch.full_like(q.scales, 8.0) if q.zeros is None else unpack(q.zeros, 4, q.scales.shape[1]).to(q.scales)
    scales_and_shifts = torch.stack([q.scales, (8 - zeros) * q.scales], dim=-1)  # w = (code - 8) * scale + shift
    codes = torch._convert_weight_to_int4pack_for_cpu(unpack(q.codes, 4, q.shape[1]).int(), 1)
    return codes, scales_and_shifts.transpose(0, 1).contiguous()


def few_rows_linear(x: Tensor, laid_out: tuple[Tensor, Tensor]) -> Tensor:
    """x W^T for a few rows of x (..., in) in bf16 on a CPU: PyTorch's kernels, which read the codes and no more.

    4 bits read an eighth of what fp32 would, and take a quarter of the time of bf16 (one thread, width 896).
    """
    weight, scales = laid_out
    flat = x.reshape(-1, x.shape[-1])
    if weight.dtype == torch.int8:
        y = torch._weight_int8pack_mm(flat, weight, scales)
    else:
        y = torch._weight_int4pack_mm_for_cpu(flat, weight, x.shape[-1] // len(scales), scales)
    return y.view(*x.shape[:-1], -1)


def int8_linear_reference(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return F.linear((x / scales).round() * scales, dequantize(q, x.dtype), bias)


def int8_linear(x: Tensor, q: Packed, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with each token of x (..., in) rounded to 8 bits, too: a product of int8 matrices, summed in int32.

    q: 8 bits, symmetric, one group a row. A token's scale is its largest size / 127 (2208.07339, equation 4).
    """
    flat = x.reshape(-1, x.shape[-1]).to(_wide(x.dtype))
    scales = flat.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # (n, 1)
    tokens, weight = (flat / scales).round().to(torch.int8), (q.codes ^ 128).view(torch.int8)
    if x.is_cuda:  # there the product wants more than 16 rows, a multiple of 8
        tokens = F.pad(tokens, (0, 0, 0, max(24 - len(tokens), -len(tokens) % 8)))
    y = torch._int_mm(tokens, weight.T)[: len(flat)] * scales * q.scales[:, 0].to(scales.dtype)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Random rotations


@functools.cache
@torch.inference_mode(False)  # as above
def rotation(n: int, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random orthogonal matrices (p, p) and (n / p, n / p), p the largest divisor of n up to its root (2307.13304).

    Their Kronecker product is orthogonal (n, n), and is multiplied with in n (p + n / p) steps. The sign of each column
    is that of the Haar measure, which also makes it a function of the seed alone.
    """
    p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    generator, found = torch.Generator().manual_seed(seed), []
    for size in (p, n // p):
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        found.append((q * r.diagonal().sign()).float().to(device))
    return tuple(found)


@whole_fp32()
def rotate(x: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """x (..., n) times the transpose of the `rotation` of n and seed: each row rotated; `back` undoes it."""
    a, b = (m.to(x.dtype).T if back else m.to(x.dtype) for m in rotation(x.shape[-1], seed, x.device))
    return (a @ x.unflatten(-1, (len(a), len(b))) @ b.T).flatten(-2)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    if mask is None:
        mask = _causal(q, k) if documents is None else _causal(q, k) & _same(documents)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.to(_wide(q.dtype)).softmax(-1).to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, mask: Tensor | BlockMask | None = None
) -> Tensor:
    """Scaled dot-product attention with grouped heads: query head h reads key head h // (H / Hkv). Like q.

    q (B, Tq, H, d), k and v (B, Tk, Hkv, d). With neither option it is causal, the queries being the last Tq of the Tk
    positions. `documents` (B, T) of integers: rows are packed, a token sees earlier tokens of its own document only.
    `mask`: what `document_mask` returns, or a tensor broadcastable to (B, 1, Tq, Tk) (of one query, Tq = 1, to
    (B, Hkv, 1, Tk)), which replaces causality (for cached decoding): a bool, True = attend, or what is added to the
    scores. Every query must attend to something.
    """
    group = q.shape[2] // k.shape[2]
    if documents is not None:
        mask = document_mask(documents)
    elif mask is None and q.shape[1] != k.shape[1]:
        mask = _causal(q, k)  # is_causal would line up the first query with the first key
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if q.shape[1] == 1 and isinstance(mask, Tensor):
        return _attention_of_one(q, k, v, mask)
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, heads, T, d)
    if mask is None or isinstance(mask, Tensor):
        # enable_gqa: 1.3 times as fast on a CPU as expanded keys and values
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1)
    else:
        out = _fused(flex_attention, dynamic=False)(*heads, block_mask=mask, enable_gqa=group > 1)
    return out.transpose(1, 2)


def _attention_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query a row: the heads of a group become its queries, and no key or value is copied.

    On a CPU two products are twice as fast as the fused operation, if keys and mask lie as model.KVCache lays them.
    """
    q_of_group = q.view(q.shape[0], k.shape[2], -1, q.shape[3])  # (B, Hkv, group, d)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.is_cuda:
        out = F.scaled_dot_product_attention(q_of_group, k.transpose(1, 2), v.transpose(1, 2),
                                             attn_mask=mask.contiguous())  # fmt: skip
        return out.reshape(q.shape)
    mask = mask.expand(*q_of_group.shape[:2], 1, -1)
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # (B, Hkv, d, T), (B, Hkv, T, d)
    scores = torch.baddbmm(mask.flatten(0, 1), q_of_group.flatten(0, 1), k.flatten(0, 1), alpha=q.shape[-1] ** -0.5)
    weights = scores.softmax(-1, dtype=_wide(q.dtype)).to(q.dtype)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


def document_mask(documents: Tensor) -> Tensor | BlockMask:
    """The `mask` of attention for packed rows, made once a batch for all layers. documents (B, T).

    Compiled on a GPU it is a BlockMask, with which flex_attention skips the blocks that no document touches; elsewhere
    a bool (B, 1, T, T).
    """
    batch, length = documents.shape
    if not (_compiling and documents.is_cuda):
        return _same(documents).tril()

    def attend(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[b, i] == documents[b, j])

    return create_block_mask(attend, batch, None, length, length, device=documents.device)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """(Tq, Tk) bool: query i stands at position i + Tk - Tq and attends to no later one."""
    return torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])


def _same(documents: Tensor) -> Tensor:
    """(B, 1, T, T) bool: whether two positions belong to the same document."""
    return documents[:, None, :, None] == documents[:, None, None, :]


# ----------------------------------------------------------------------------------------------------------------------
# Losses over the vocabulary


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(_wide(logits.dtype)), labels, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The sum of -log softmax(hidden @ weight.T)[label] over the labels that are not -100, a scalar.

    hidden (..., D), weight (V, D), labels (...) like hidden without D. Rows whose label is -100 cost nothing and get a
    gradient of zero, whatever they hold; with no other row the loss is 0. chunk_size: tokens whose logits exist at a
    time, by default some 32 MB of them (512 MB on a GPU). Raises ValueError for a label outside [0, V) other than -100.

    The products run in autocast's dtype if there is one (torch.amp.custom_fwd wants a fixed device type, so the cast
    is written out below), the softmax and the sum that becomes the weight's gradient in at least fp32.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return -linear_logps(hidden, weight, labels, temperature=1.0, chunk_size=chunk_size).sum()
    hidden, labels, _ = _supervised(hidden, weight, labels)
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size or _chunk_size(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax - onehot: known in the forward up to the scalar that comes down in the backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        h, w = _operands(hidden, weight)
        ctx.grads = [torch.empty_like(h) if ctx.needs_input_grad[0] else None,
                     torch.zeros_like(w, dtype=_wide(w.dtype)) if ctx.needs_input_grad[1] else None]  # fmt: skip
        ctx.dtypes = hidden.dtype, weight.dtype
        loss = torch.zeros((), dtype=_wide(w.dtype), device=w.device)
        step = _fused(_cross_entropy_step, dynamic=False)
        for rows, n, logits, chunk_labels in _chunks(h, w, labels, chunk_size):
            nll, d_logits = step(logits, chunk_labels, w.dtype)
            loss += nll[:n].sum()
            if ctx.grads[0] is not None:
                torch.mm(d_logits[:n], w, out=ctx.grads[0][rows])
            if ctx.grads[1] is not None:
                _add_product(ctx.grads[1], d_logits[:n], h[rows])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: the backward ran already, and its gradients were given away")
        grads, ctx.grads = ctx.grads, None  # with no second owner, autograd can take the tensors over without a copy
        d_hidden, d_weight = (
            None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return d_hidden, d_weight, None, None


def _cross_entropy_step(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods (n,) and d loss / d logits (n, V) in `dtype`, from logits (n, V) and labels (n,)."""
    logps, labels = F.log_softmax(logits, dim=-1), labels[:, None]
    nll = -logps.gather(-1, labels).squeeze(-1)
    probs = logps.exp_()
    return nll, probs.scatter_add_(-1, labels, torch.full_like(nll, -1.0)[:, None]).to(dtype)


def linear_logps_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    logps = F.log_softmax(logits.to(_wide(logits.dtype)) / temperature, dim=-1)
    picked = logps.gather(-1, targets[..., None]).squeeze(-1)
    return (picked, -(logps.exp() * logps).sum(-1)) if with_entropy else picked


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target] of each token, at least fp32, and the entropy if asked for.

    hidden (..., D), weight (V, D), targets (...); returns logps (...), or logps and entropy in nats, both
    differentiable. A target of -100 gives 0 and a gradient of zero. chunk_size, ValueError and autocast as in
    linear_cross_entropy.
    """
    shape = targets.shape
    hidden, targets, kept = _supervised(hidden, weight, targets)
    logps, entropy = _LinearLogps.apply(
        hidden, weight, targets, temperature, with_entropy, chunk_size or _chunk_size(weight)
    )
    if kept is not None:
        logps, entropy = (x.new_zeros(shape.numel()).index_copy(0, kept, x) for x in (logps, entropy))
    return (logps.view(shape), entropy.view(shape)) if with_entropy else logps.view(shape)


class _LinearLogps(torch.autograd.Function):
    """With p = softmax(z): d logp / d z = onehot - p and d entropy / d z = -p (log p + entropy), z = logits / T."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        h, w = _operands(hidden, weight)
        ctx.temperature, ctx.chunk_size, ctx.dtype = temperature, chunk_size, w.dtype
        ctx.set_materialize_grads(False)
        logps, lse, entropy = torch.zeros(3, len(h), dtype=_wide(w.dtype), device=w.device)
        step = _fused(_logps_forward_step, dynamic=False)
        for rows, n, logits, chunk_targets in _chunks(h, w, targets, chunk_size):
            out = step(logits, chunk_targets, temperature, with_entropy)
            logps[rows], lse[rows] = out[0][:n], out[1][:n]
            if with_entropy:
                entropy[rows] = out[2][:n]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        if d_logps is None and d_entropy is None:
            return (None,) * 6
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        d_logps = torch.zeros_like(lse) if d_logps is None else d_logps / ctx.temperature
        d_entropy = None if d_entropy is None else d_entropy / ctx.temperature
        d_hidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(w, dtype=_wide(w.dtype)) if ctx.needs_input_grad[1] else None
        step = _fused(_logps_backward_step, dynamic=False)
        for rows, n, logits, chunk_targets in _chunks(h, w, targets, ctx.chunk_size):
            per_row = (None if x is None else _padded(x[rows], len(logits)) for x in (lse, entropy, d_logps, d_entropy))
            d_logits = step(logits, chunk_targets, *per_row, ctx.temperature, ctx.dtype)[:n]
            if d_hidden is not None:
                torch.mm(d_logits, w, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, d_logits, h[rows])
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def _logps_forward_step(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
    """logp, log-sum-exp and, if asked for, entropy (n,) from logits (n, V), which it may overwrite."""
    z = logits if temperature == 1.0 else logits.div_(temperature)
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    logps = z.gather(-1, targets[:, None]) - lse
    if not with_entropy:
        return logps.squeeze(-1), lse.squeeze(-1)
    z = z.sub_(lse)
    return logps.squeeze(-1), lse.squeeze(-1), -z.mul_(z.exp()).sum(-1)


def _logps_backward_step(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logps: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """d loss / d logits (n, V) in `dtype` from logits (n, V), which it overwrites, and the rest (n,) each."""
    z = logits if temperature == 1.0 else logits.div_(temperature)
    z = z.sub_(lse[:, None])  # log p
    if d_entropy is None:
        d_logits = z.exp_().mul_(-d_logps[:, None])
    else:
        p = z.exp()
        d_logits = z.add_(entropy[:, None]).mul_(d_entropy[:, None]).add_(d_logps[:, None]).mul_(p).neg_()
    return d_logits.scatter_add_(-1, targets[:, None], d_logps[:, None]).to(dtype)


def _supervised(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (n, D) and labels (n,) of the rows with a label, and their indices, None if that is all of them."""
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
                         "expected (..., D), (V, D), (...)")  # fmt: skip
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kept = (labels != IGNORED).nonzero().squeeze(-1)
    if len(kept) == len(labels):
        kept = None
    else:
        hidden, labels = hidden.index_select(0, kept), labels[kept]
    wrong = labels[(labels < 0) | (labels >= len(weight))]
    if len(wrong):
        raise ValueError(f"label {wrong[0].item()} is outside the vocabulary [0, {len(weight)}) and is not {IGNORED}")
    return hidden, labels, kept


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (..., V) of states (..., D) and a head (V, D), held as a whole, in at least fp32.

    F.linear under autocast rounds its sums to bf16, and a small divergence is then mostly rounding. Here the operands
    are rounded as autocast would have them, and the sums are not.
    """
    h, w = (x.to(_wide(x.dtype)) for x in _operands(hidden, weight))
    with torch.autocast(h.device.type, enabled=False):
        return F.linear(h, w)


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the products: autocast's where it is on (as in F.linear, fp64 stays), else the weight's."""
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _chunk_size(weight: Tensor) -> int:
    """Tokens in a chunk: enough rows to keep the products efficient, few enough that the logits stay small."""
    n_logits = 2**27 if weight.is_cuda else 2**23
    return max(128, n_logits // len(weight) // 64 * 64)


def _chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """The rows of each chunk, their number n, and logits and labels whose first n rows are theirs.

    All chunks share one buffer of logits. Eagerly the last chunk is short; compiled it is padded to the one shape that
    was compiled, and what stands in its rows past n is to be ignored.
    """
    size = chunk_size if _compiling else max(1, min(chunk_size, len(hidden)))
    buffer = weight.new_empty(size, len(weight), dtype=_wide(weight.dtype))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        h = hidden[rows]
        n = len(h)
        _product(h, weight.T, buffer[:n])
        yield rows, n, buffer if _compiling else buffer[:n], _padded(labels[rows], size if _compiling else n)


def _padded(x: Tensor, n: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, n - len(x)))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, where out may be wider than half-precision a and b; the GPU's tensor cores then give fp32 sums."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logits.T @ hidden, where total may be wider."""
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.T, hidden)
    elif total.is_cuda:
        torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.add_(d_logits.T @ hidden)


# ----------------------------------------------------------------------------------------------------------------------
# Divergences between two distributions over the vocabulary


def _forward_kl(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    p = logp.exp()
    return (p * (logp - logq)).sum(-1), -p


def _reverse_kl(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    terms = logq.exp() * (logq - logp)
    return terms.sum(-1), terms


def _jsd(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    logm = _log_mix(logp, logq, skew)
    of_p, of_q = logp.exp() * (logp - logm), (1 - skew) * logq.exp() * (logq - logm)
    return skew * of_p.sum(-1) + of_q.sum(-1), of_q


def _skew_kl(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    logm = _log_mix(logp, logq, skew)
    return (logp.exp() * (logp - logm)).sum(-1), -(1 - skew) * (logp + logq - logm).exp()


def _skew_reverse_kl(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    logm = _log_mix(logp, logq, 1 - skew)
    terms = logq.exp() * (logq - logm)
    return terms.sum(-1), terms - skew * (2 * logq - logm).exp()


def _tvd(logp: Tensor, logq: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    q = logq.exp()
    difference = q - logp.exp()
    return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()


def _log_mix(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), 0 < share < 1."""
    return torch.logaddexp(logp + math.log(share), logq + math.log1p(-share))


DIVERGENCES = {  # name: (log p, log q, skew) -> D (n,) and q dD/dq (n, V), to which any multiple of q may be added
    "forward_kl": _forward_kl,  # KL(p || q), the sum of p log(p / q)
    "reverse_kl": _reverse_kl,  # KL(q || p)
    "jsd": _jsd,  # b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = skew (2306.13649, equation 1)
    "skew_kl": _skew_kl,  # KL(p || a p + (1 - a) q), a = skew (2402.03898, equation 4)
    "skew_reverse_kl": _skew_reverse_kl,  # KL(q || (1 - a) p + a q)
    "tvd": _tvd,  # half the sum of |p - q|
}  # fmt: skip


class TopK(NamedTuple):
    """What is kept of distributions over a vocabulary: the k most probable tokens; all others are one bucket."""

    ids: Tensor  # (..., k)
    logps: Tensor  # (..., k + 1), the last that of the bucket


NEVER = -100.0  # the log of a bucket's probability 0: 0 log 0 is 0, and not NaN

Teachers = Sequence[tuple[Tensor, Tensor]]  # of each the hidden states (..., D) and the head (V, D)


def linear_divergence_reference(
    hidden: Tensor, weight: Tensor, teachers: Teachers | TopK, mask: Tensor, *, kind: str, skew: float,
    temperature: float, mixture: Tensor | None = None,
) -> Tensor:  # fmt: skip
    def probs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.softmax(logits.to(_wide(logits.dtype)) / temperature, dim=-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    q, s = probs(hidden, weight), skew
    if isinstance(teachers, TopK):
        kept = q.gather(-1, teachers.ids)
        p, q = teachers.logps.exp(), torch.cat([kept, q.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)], dim=-1)
    else:
        each = torch.stack([probs(*teacher) for teacher in teachers], dim=-1)  # (..., V, K)
        p = each.mean(-1) if mixture is None else (each * mixture[..., None, :]).sum(-1)
    found = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: s * kl(p, s * p + (1 - s) * q) + (1 - s) * kl(q, s * p + (1 - s) * q),
        "skew_kl": lambda: kl(p, s * p + (1 - s) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - s) * p + s * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[kind]()
    return (found * mask).sum()


def linear_divergence(
    hidden: Tensor, weight: Tensor, teachers: Teachers | TopK, mask: Tensor, *, kind: str, skew: float = 0.0,
    temperature: float = 1.0, mixture: Tensor | None = None, chunk_size: int | None = None,
) -> Tensor:  # fmt: skip
    """The sum over tokens of the divergence of q, the student, from p, the teacher, in nats; a scalar.

    q = softmax(hidden @ weight.T / temperature), hidden (..., D), weight (V, D). p is the same of a teacher, or of
    several their mean in the shares `mixture` (..., K), by default equal; teachers never get a gradient. A TopK stands
    for a p that was stored (at this temperature): D is then between distributions over its k + 1 buckets. `kind` is one
    of DIVERGENCES, `skew` the b or a of those that have one, in (0, 1). Tokens where mask (...) is 0 cost nothing and
    get a gradient of zero, whatever they hold. chunk_size and autocast as in linear_cross_entropy, for each model.
    """
    stored = isinstance(teachers, TopK)
    lead, n_words = mask.shape, len(weight)
    shapes = [teachers.ids.shape[:-1]] if stored else [h.shape[:-1] for h, _ in teachers]
    if any(shape != lead for shape in (hidden.shape[:-1], *shapes)):
        raise ValueError(f"hidden {tuple(hidden.shape)}, mask {tuple(lead)}, teachers {shapes}: expected (..., D), "
                         "(...), (...)")  # fmt: skip
    if not stored and any(len(w) != n_words for _, w in teachers):
        raise ValueError(f"vocabularies of {n_words} and {[len(w) for _, w in teachers]} words: expected one size")
    if kind in ("jsd", "skew_kl", "skew_reverse_kl") and not 0 < skew < 1:
        raise ValueError(f"skew {skew}: {kind} is between two distributions only where it lies between 0 and 1")
    kept = mask.reshape(-1).nonzero().squeeze(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    with torch.no_grad():
        if stored:
            targets = TopK(*(x.reshape(-1, x.shape[-1])[kept] for x in teachers))
        else:
            targets = [(h.reshape(-1, h.shape[-1])[kept], w) for h, w in teachers]
        shares = None if mixture is None else mixture.reshape(-1, mixture.shape[-1])[kept]
        h, w = _operands(hidden, weight)
        total = torch.zeros((), dtype=_wide(w.dtype), device=w.device)
        d_hidden = torch.empty_like(h) if wanted[0] else None
        d_weight = torch.zeros(w.shape, dtype=total.dtype, device=w.device) if wanted[1] else None
        step = _fused(_divergence_step, dynamic=False)
        for rows, n, logits, target in _beside_teachers(h, w, targets, shares, temperature, chunk_size):
            found, d_logits = step(logits, target, kind, skew, temperature, w.dtype)
            total += found[:n].sum()
            if wanted[0]:
                torch.mm(d_logits[:n], w, out=d_hidden[rows])
            if wanted[1]:
                _add_product(d_weight, d_logits[:n], h[rows])
    return _WithGradients.apply(hidden, weight, total, d_hidden, d_weight) if any(wanted) else total


def linear_top_k(teachers: Teachers, k: int, *, temperature: float, mixture: Tensor | None = None,
                 chunk_size: int | None = None) -> TopK:  # fmt: skip
    """The k most probable tokens of the (mean) teacher after every token; arguments as in linear_divergence."""
    lead = teachers[0][0].shape[:-1]
    with torch.no_grad():
        flat = [(h.reshape(-1, h.shape[-1]), w) for h, w in teachers]
        shares = None if mixture is None else mixture.reshape(-1, mixture.shape[-1])
        size, parts = chunk_size or _chunk_size(flat[0][1]), []
        for start in range(0, len(flat[0][0]), size):
            rows = slice(start, start + size)
            logits = [linear_logits(h[rows], w) for h, w in flat]
            logp = _mean_logps(logits, None if shares is None else shares[rows], temperature)
            best, ids = logp.topk(k)
            parts.append((ids, torch.cat([best, _log_rest(logp, ids)], dim=-1).clamp(min=NEVER)))
        ids, logps = (torch.cat(x) for x in zip(*parts, strict=True))
    return TopK(ids.view(*lead, k), logps.view(*lead, k + 1))


def _beside_teachers(hidden: Tensor, weight: Tensor, teachers: Teachers | TopK, shares: Tensor | None,
                     temperature: float, chunk_size: int | None) -> Iterator[tuple[slice, int, Tensor, Tensor | TopK]]:
    """`_chunks` of the student, with log p (n, V) of the same rows, or what is stored of it, in place of labels."""
    size = chunk_size or _chunk_size(weight)
    if isinstance(teachers, TopK):
        for rows, n, logits, ids in _chunks(hidden, weight, teachers.ids, size):
            yield rows, n, logits, TopK(ids, _padded(teachers.logps[rows], len(ids)))
        return
    mean = _fused(_mean_logps, dynamic=False)
    labels = hidden.new_zeros(len(hidden), 0) if shares is None else shares
    others = [_chunks(*_operands(h, w), labels, size) for h, w in teachers]
    for (rows, n, logits, share), *theirs in zip(_chunks(hidden, weight, labels, size), *others, strict=True):
        yield rows, n, logits, mean([z for _, _, z, _ in theirs], share if share.shape[-1] else None, temperature)


def _mean_logps(logits: list[Tensor], shares: Tensor | None, temperature: float) -> Tensor:
    """log of the mean of the distributions (n, V) of K teachers, in shares (n, K) if there are any."""
    logps = [F.log_softmax(z.to(_wide(z.dtype)) / temperature, dim=-1) for z in logits]
    if len(logps) == 1:
        return logps[0]
    if shares is None:
        return torch.stack(logps).logsumexp(0) - math.log(len(logps))
    return torch.stack([logp + share[:, None] for logp, share in zip(logps, shares.log().T, strict=True)]).logsumexp(0)


def _log_rest(logps: Tensor, ids: Tensor) -> Tensor:
    """(n, 1): log of the probability of all tokens but `ids` (n, k), without cancellation; -inf of none."""
    return logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)


def _divergence_step(logits: Tensor, target: Tensor | TopK, kind: str, skew: float, temperature: float,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """D (n,) and dD / d logits (n, V) in `dtype`: with c = q dD/dq it is (c - q sum of c) / temperature."""
    logq = F.log_softmax(logits / temperature, dim=-1)
    if isinstance(target, TopK):
        rest = _log_rest(logq, target.ids)
        buckets = torch.cat([logq.gather(-1, target.ids), rest], dim=-1).clamp(min=NEVER)
        found, c = DIVERGENCES[kind](target.logps, buckets, skew)
        in_bucket = (logq - rest).exp() * c[:, -1:]  # each token of the bucket by its share of it
        c = in_bucket.scatter(-1, target.ids, c[:, :-1])
    else:
        found, c = DIVERGENCES[kind](target, logq, skew)
    return found, ((c - logq.exp() * c.sum(-1, keepdim=True)) / temperature).to(dtype)


class _WithGradients(torch.autograd.Function):
    """`total`, whose gradients are known before the backward: there they are but scaled, once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, total: Tensor, *known: Tensor | None) -> Tensor:
        ctx.known, ctx.dtypes = known, (hidden.dtype, weight.dtype)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known is None:
            raise RuntimeError("linear_divergence: the backward ran already, and its gradients were given away")
        known, ctx.known = ctx.known, None
        pairs = zip(known, ctx.dtypes, strict=True)
        return *(None if d is None else d.mul_(grad).to(dtype) for d, dtype in pairs), None, None, None
