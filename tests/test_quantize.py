"""quantize.py: codes by hand, GPTQ against brute force, folding and planting change no logit, what is saved loads."""

import contextlib
import copy
import json
import math
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import loop as loop_module
import model as model_module
import quantize
import sft
from data import chat, world
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop, RunFailed
from model import Config, KVCache, QuantLinear, Transformer, generate, load, read_safetensors, save, write_safetensors
from quantize import (
    MATRICES,
    METHODS,
    FakeQuantLinear,
    Grid,
    Inputs,
    QuantizedCache,
    awq_scales,
    fake_quantize,
    fit_grid,
    fold,
    fold_all,
    get_args,
    inverse_factor,
    layer_by_layer,
    meant,
    nearest,
    optimal_brain,
    plant,
    put_quantized,
    smooth_scales,
    tensors_of,
)

LLAMA = Config("llama", vocab_size=40, depth=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn_width=48, max_length=64,
               tied=False)  # fmt: skip
FAMILIES = {"llama": LLAMA, "qwen2": Config(**{**vars(LLAMA), "family": "qwen2", "qkv_bias": True, "tied": True}),
            "qwen3": Config(**{**vars(LLAMA), "family": "qwen3", "qk_norm": True, "head_dim": 16})}  # fmt: skip


def random_net(family: str = "llama", dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(FAMILIES[family]).to(dtype)
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return net.requires_grad_(False).eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(sum(shape)))


def flags(**changes) -> Namespace:
    """The flags of a run, as get_args makes them, with `changes`."""
    return Namespace(**vars(get_args([])) | changes)


def batches(*lengths: tuple[int, ...]) -> list[sft.Batch]:
    """For each tuple a batch of one row a length, padded."""
    made, seed = [], 0
    for some in lengths:
        rows = []
        for n in some:
            seed += 1
            found = torch.randint(1, 40, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
            rows.append([chat.Row(found, [0] + [1] * (n - 1))])
        made.append(sft.collate(rows, torch.device("cpu"), with_documents=True))
    return made


def inputs_of(x: Tensor) -> Inputs:
    found = Inputs(x.shape[1], x.dtype, x.device)
    found.add(x)
    return found


def correlated(n: int, width: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Tokens (n, width) whose channels hang together and are of different sizes."""
    mix = normal(width, width, seed=seed, dtype=dtype) * torch.linspace(0.2, 3, width, dtype=dtype)
    return normal(n, width, seed=seed + 1, dtype=dtype) @ mix


# Codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_writes_the_bits_one_after_the_other(bits):
    every = torch.arange(2**bits)
    for n in (1, 3, 8, 16, 37):
        codes = torch.stack([every.repeat(n)[:n], every.flip(0).repeat(n)[:n], normal(n).argsort() % 2**bits])
        packed = kernels.pack(codes, bits)
        for row, found in zip(codes.tolist(), packed, strict=True):  # a second writer: one long number
            number = sum(code << i * bits for i, code in enumerate(row))
            assert bytes(found.tolist()) == number.to_bytes(len(found), "little")
        assert packed.dtype == torch.uint8
        assert torch.equal(kernels.unpack(packed, bits, n).long(), codes)
    count, n_bytes = kernels.word(bits)
    assert (count * bits, packed.shape[-1]) == (8 * n_bytes, -(-37 // count) * n_bytes)
    whole = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 256).T.contiguous()  # every byte in every place
    back = kernels.pack(kernels.unpack(whole, bits, 24 // bits), bits)
    assert torch.equal(back, whole)


def test_grid_by_hand():
    weight = torch.tensor([[0.5, -1.0, 2.0, 0.25], [4.0, 6.0, 5.0, 7.5], [-3.0, -1.0, -2.0, -0.5], [0.0] * 4])
    grid = fit_grid(weight, 2, 0, symmetric=False)
    assert grid.scales.tolist() == [[1.0], [2.5], [1.0], [1.0]]
    assert grid.zeros.tolist() == [[1.0], [0.0], [3.0], [0.0]]  # 0 is in the range though all are above, or below it
    assert nearest(weight, grid).tolist() == [[1, 0, 3, 1], [2, 2, 2, 3], [0, 2, 1, 3], [0, 0, 0, 0]]
    assert meant(nearest(weight, grid), grid).tolist() == [[0, -1, 2, 0], [5, 5, 5, 7.5], [-3, -1, -2, 0], [0, 0, 0, 0]]
    grid = fit_grid(weight, 3, 0, symmetric=True)
    close = torch.tensor([2 / 3, 2.5, 1.0, 1.0]).bfloat16().float()
    assert torch.equal(grid.scales[:, 0], close) and (grid.zeros == 4).all()
    assert nearest(weight, grid).tolist() == [[5, 3, 7, 4], [6, 6, 6, 7], [1, 3, 2, 4], [4, 4, 4, 4]]
    assert fit_grid(torch.tensor([[-6.0, 1.0]]), 3, 0, symmetric=True).scales.item() == 2
    beyond = nearest(torch.tensor([[-9.0, 9.0, 0, 0]]), Grid(torch.ones(1, 1), torch.full((1, 1), 4.0), 3, True))
    assert beyond.tolist() == [[1, 7, 4, 4]]  # symmetric: -3 to 3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_code_is_the_nearest_of_all(bits, symmetric):
    weight = normal(5, 24)
    grid = fit_grid(weight, bits, 8, symmetric)
    every = torch.arange(1 if symmetric else 0, 2**bits).float()
    means = (every - grid.zeros.repeat_interleave(8, 1)[..., None]) * grid.scales.repeat_interleave(8, 1)[..., None]
    codes = nearest(weight, grid)
    assert torch.equal(codes, every[(weight[..., None] - means).abs().argmin(-1)])
    assert ((meant(codes, grid) - weight).abs() <= 0.51 * grid.scales.repeat_interleave(8, 1)).all()  # to the ends
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())
    q = kernels.Packed(*(tensors_of(codes, grid).get(name) for name in ("codes", "scales", "zeros")), bits, (5, 24))
    assert torch.equal(kernels.dequantize(q), meant(codes, grid))
    assert torch.equal(kernels.dequantize(q, torch.bfloat16), meant(codes, grid).bfloat16())
    assert (q.zeros is None) == symmetric


def test_rows_and_groups_have_grids_of_their_own():
    weight = normal(4, 24)
    before = meant(nearest(weight, grid := fit_grid(weight, 4, 8, False)), grid)
    for where in ((2, slice(None)), (slice(2, 3), slice(8, 16))):
        other = weight.clone()
        other[where] *= 1000
        after = meant(nearest(other, grid := fit_grid(other, 4, 8, False)), grid)
        changed = torch.zeros_like(weight, dtype=torch.bool)
        changed[where] = True
        assert torch.equal(after[~changed], before[~changed])
        assert (after[changed] - other[changed]).abs().max() < 0.1 * other[changed].abs().max()


def test_quantized_linear_multiplies_what_is_meant():
    weight, x, bias = normal(6, 16), normal(2, 3, 16, seed=1).requires_grad_(), normal(6, seed=2)
    grid = fit_grid(weight, 4, 8, False)
    parts = tensors_of(nearest(weight, grid), grid)
    for q in (kernels.Packed(*parts.values(), 4, (6, 16)), kernels.nf4_quantize(weight)):
        y = kernels.quantized_linear(x, q, bias)
        exact = F.linear(x, kernels.dequantize(q), bias)
        torch.testing.assert_close(y, exact)
        ramp = normal(2, 3, 6, seed=3)
        torch.testing.assert_close(torch.autograd.grad(y, x, ramp), torch.autograd.grad(exact, x, ramp))
        with torch.no_grad():
            assert torch.equal(kernels.quantized_linear(x, q, bias), exact)
        torch.testing.assert_close(kernels.quantized_linear_reference(x, q, bias), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert kernels.quantized_linear(x, q, bias).dtype == torch.bfloat16


def test_int8_linear_is_a_product_of_integers():
    weight, x = normal(6, 16), normal(2, 5, 16, seed=1)
    x[0, 0] *= 1000
    x[1, 1] = 0
    grid = fit_grid(weight, 8, 0, True)
    codes = nearest(weight, grid)
    q = kernels.Packed(kernels.pack(codes, 8), grid.scales.bfloat16(), None, 8, (6, 16))
    bias = normal(6, seed=2)
    found, wanted = kernels.int8_linear(x, q, bias), torch.zeros(2, 5, 6, dtype=torch.float64)
    for b, t, o in product(range(2), range(5), range(6)):
        scale = max(x[b, t].abs().max().item() / 127, 1e-30)
        tokens = [round(v / scale) for v in x[b, t].tolist()]
        total = sum(a * (w - 128) for a, w in zip(tokens, codes[o].tolist(), strict=True))
        wanted[b, t, o] = total * scale * grid.scales[o, 0] + bias[o]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.int8_linear_reference(x, q, bias), found, rtol=1e-4, atol=1e-4)
    assert kernels.int8_linear(x.bfloat16(), q).dtype == torch.bfloat16


def test_few_rows_are_padded_for_the_product_of_cuda(monkeypatch):
    """Which takes more than 16, and here always a multiple of 8."""
    seen, product = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: seen.append(len(a)) or product(a, b))
    grid = fit_grid(weight := normal(6, 16), 8, 0, True)
    q = kernels.Packed(kernels.pack(nearest(weight, grid), 8), grid.scales.bfloat16(), None, 8, (6, 16))
    counts = (1, 7, 8, 16, 17, 23, 24, 25, 32, 33)
    plain = [kernels.int8_linear(normal(n, 16), q) for n in counts]
    assert seen == [*counts]
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for n, wanted in zip(counts, plain, strict=True):
        assert torch.equal(kernels.int8_linear(normal(n, 16), q), wanted)
    assert seen[len(counts) :] == [24] * 7 + [32, 32, 40]


def test_rotations_are_orthogonal_and_undone():
    for n in (12, 7, 32):
        eye = torch.eye(n, dtype=torch.float64)
        r = kernels.rotate(eye, 3)
        assert (r @ r.T - eye).abs().max() < 1e-6
        assert (kernels.rotate(r, 3, back=True) - eye).abs().max() < 1e-6
        assert not torch.allclose(r, kernels.rotate(eye, 4), atol=0.1) or n == 1
    a, b = kernels.rotation(12, 3)
    assert (a.shape, b.shape) == ((3, 3), (4, 4))
    torch.testing.assert_close(kernels.rotate(torch.eye(12), 3).T, torch.kron(a, b))
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0  # one outlier becomes 64 sizes of about 1
    assert kernels.rotate(x, 0).abs().max() < 6


# Calibration


def test_inputs_are_those_of_a_plain_forward():
    net, some = random_net("qwen3"), batches((5, 9, 3), (7,))
    wanted: dict[str, list[Tensor]] = {}
    for path in (f"blocks.{i}.{name}" for i in range(2) for name in MATRICES):
        net.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: wanted.setdefault(path, []).append(args[0].flatten(0, -2)))  # fmt: skip
    for batch in some:
        for row, real in zip(batch.input_ids, batch.documents >= 0, strict=True):
            net(row[None, real])
    hooks = {path: torch.cat(found) for path, found in wanted.items()}
    fresh, seen = random_net("qwen3"), []
    for path, matrix, inputs in layer_by_layer(fresh, some):
        x = hooks[path].double()
        assert (inputs.n, matrix) == (24, fresh.get_submodule(path))
        torch.testing.assert_close(inputs.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(inputs.absmax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inputs.abssum.double(), x.abs().sum(0), rtol=1e-4, atol=1e-4)
        assert not inputs.gram.requires_grad
        seen.append(path)
    assert seen == [f"blocks.{i}.{name}" for i in range(2) for name in MATRICES]
    assert not any(m._forward_pre_hooks for m in fresh.modules())


def test_packed_documents_do_not_see_each_other():
    net = random_net()
    apart = batches((5, 6))
    pairs = zip(apart[0].input_ids, apart[0].documents >= 0, strict=True)
    rows = [chat.Row(row[real].tolist(), [1] * int(real.sum())) for row, real in pairs]
    both = [sft.collate([rows], torch.device("cpu"), with_documents=True)]
    sums = ([inputs.abssum for *_, inputs in layer_by_layer(net, some)] for some in (apart, both))
    for first, second in zip(*sums, strict=True):  # positions are relative: the second document begins anywhere
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_what_enters_a_matrix_is_what_the_changed_ones_make():
    net, some = random_net(), batches((6, 4))
    for path, matrix, inputs in layer_by_layer(net, some):
        if path == "blocks.0.attention.out":
            assert inputs.absmax.max() == 0  # what the first matrix was changed to makes no value
        if path == "blocks.1.attention.qkv":
            state = net.embed(some[0].input_ids)[some[0].documents >= 0]
            normed = net.blocks[1].attention_norm(state)
            torch.testing.assert_close(inputs.absmax, normed.abs().amax(0))
        assert matrix is net.get_submodule(path)
        net.get_submodule(path).weight.zero_()


def test_the_inverse_factor_is_that_of_the_inverse():
    x = correlated(50, 6)
    gram = x.T @ x
    u = inverse_factor(gram, 0.1)
    h = gram + 0.1 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, h.inverse())
    assert (u.tril(-1) == 0).all()
    for j in range(6):
        torch.testing.assert_close(u[j, j] ** 2, h[j:, j:].inverse()[0, 0])
    dead = gram.clone()
    dead[2], dead[:, 2] = 0, 0
    u = inverse_factor(dead, 0.1)
    assert u[2].count_nonzero() == 1 and u[:, 2].count_nonzero() == 1
    assert u[2, 2].item() ** -2 == pytest.approx(0.1 * dead.diagonal().mean().item())  # of no size of its own
    assert inverse_factor(dead, 0.0)[2, 2] == 1
    with pytest.raises(RunFailed, match="the damping, 0.0, is too small"):
        inverse_factor(torch.ones(3, 3, dtype=torch.float64), 0.0)
    with pytest.raises(RunFailed, match="not positive definite"):
        inverse_factor(gram * math.nan, 0.1)
    place = torch.arange(7)
    hilbert = 1.0 / (place + place[:, None] + 1)  # in fp32 it still has a factor, and its inverse none
    assert torch.linalg.cholesky_ex(hilbert).info == 0
    with pytest.raises(RunFailed, match="not positive definite"):
        inverse_factor(hilbert, 0.0)


def test_inputs_and_what_makes_up_for_errors_are_multiplied_in_whole_fp32():
    """Where Loop allows TF32, on CUDA: ten bits of what X^T X squared are not enough."""
    seen: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm_):
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **(kwargs or {}))

    x, weight, before = correlated(50, 8).float(), normal(3, 8), torch.get_float32_matmul_precision()
    inputs = quantize.Inputs(8, torch.float32, torch.device("cpu"))
    try:
        torch.set_float32_matmul_precision("high")
        c = flags(bits=2, group_size=0)
        for product in (lambda: inputs.add(x), lambda: optimal_brain(weight, x.T @ x, c, block_size=4),
                        lambda: kernels.rotate(normal(2, 64), 0)):  # fmt: skip
            seen.clear()
            with Products():
                product()
            assert "highest" in seen and seen.count("high") <= 1  # x.T @ x is ours
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# GPTQ


def surgeon(weight: Tensor, gram: Tensor, c: Namespace, order: list[int], kept: tuple[int, ...] = ()) -> Tensor:
    """Optimal brain quantization by the book: after each column solve for all that are left, with an inverse anew."""
    h = gram + c.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    w, group, left = weight.clone(), c.group_size or len(gram), list(order)
    start = weight.clone()
    start[:, list(kept)] = 0
    grids = [fit_grid(start[:, g : g + group], c.bits, 0, c.symmetric) for g in range(0, len(gram), group)]
    for j in order:
        left.remove(j)
        if j in kept:
            continue
        of_group = [k for k in range(len(gram)) if k // group == j // group and k not in kept]
        if not c.act_order and j == of_group[0]:
            grids[j // group] = fit_grid(w[:, of_group], c.bits, 0, c.symmetric)
        grid = grids[j // group]
        q = meant(nearest(w[:, j : j + 1], grid), grid)[:, 0]
        # minimize d H d^T where d_j = q - w_j, d is free on `left`, and 0 on what was done before
        d = q - w[:, j]
        if left:
            w[:, left] += torch.linalg.solve(h[left][:, left], -torch.outer(h[left, j], d)).T
        w[:, j] = q
    return w


CASES = {"a row": {"group_size": 0}, "groups": {"group_size": 3}, "symmetric": {"group_size": 2, "symmetric": True},
         "act order": {"group_size": 3, "act_order": True}}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [(), (1, 4)])
def test_gptq_is_optimal_brain_quantization(case, kept):
    c = flags(bits=3, damping=0.02, **CASES[case])
    weight, x = normal(64, 6, dtype=torch.float64), correlated(40, 6)
    gram = x.T @ x
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(kept)] = True
    order = sorted(range(6), key=lambda j: -gram[j, j]) if c.act_order else list(range(6))
    order = [j for j in order if j not in kept] + [j for j in order if j in kept]
    codes, grid, changed = optimal_brain(weight, gram, c, kept=mask)
    wanted = surgeon(weight, gram, c, order, kept)
    torch.testing.assert_close(meant(codes, grid)[:, ~mask], wanted[:, ~mask])
    torch.testing.assert_close(changed[:, mask], wanted[:, mask])
    assert (meant(codes, grid)[:, mask] == 0).all()
    loss = lambda w: (((w - weight) @ gram) * (w - weight)).sum()  # noqa: E731
    if not kept:
        plain = fit_grid(weight, 3, c.group_size, c.symmetric)
        assert loss(wanted) < 0.95 * loss(meant(nearest(weight, plain), plain))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [(), (3, 4, 11, *range(16, 20))])
def test_blocks_change_nothing(case, kept):
    """Nor where a group begins later than at a multiple of its size, or has no column that is rounded."""
    c = flags(bits=2, damping=0.01, **CASES[case] | ({"group_size": 4} if case == "groups" else {}))
    c.group_size = {3: 4, 2: 4}.get(c.group_size, c.group_size)
    weight, x = normal(5, 24, dtype=torch.float64), correlated(60, 24)
    mask = torch.zeros(24, dtype=torch.bool)
    mask[list(kept)] = True
    whole = optimal_brain(weight, x.T @ x, c, block_size=24, kept=mask)
    for size in (1, 3, 5, 8, 23):
        for found, wanted in zip(optimal_brain(weight, x.T @ x, c, block_size=size, kept=mask), whole, strict=True):
            if isinstance(found, Grid):
                assert torch.equal(found.scales, wanted.scales) and torch.equal(found.zeros, wanted.zeros)
            elif found is not whole[2]:
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(optimal_brain(weight, x.T @ x, c, block_size=size, kept=mask)[0], whole[0])


def test_act_order_is_of_channels_not_of_places():
    c = flags(bits=2, damping=0.01, group_size=0, act_order=True)
    weight, x = normal(5, 12, dtype=torch.float64), correlated(60, 12)
    p = normal(12, seed=7).argsort()
    codes, *_ = optimal_brain(weight, x.T @ x, c)
    assert torch.equal(optimal_brain(weight[:, p], x[:, p].T @ x[:, p], c)[0], codes[:, p])
    ordered = (x.T @ x).diagonal().argsort(descending=True)
    c.act_order = False
    in_order, *_ = optimal_brain(weight[:, ordered], (x.T @ x)[ordered][:, ordered], c)
    assert torch.equal(in_order, codes[:, ordered])


def test_without_correlation_gptq_is_rounding_and_a_dead_channel_hurts_nobody():
    c = flags(bits=3, group_size=4)
    weight, x = normal(5, 8, dtype=torch.float64), correlated(60, 8)
    grid = fit_grid(weight, 3, 4, False)
    assert torch.equal(optimal_brain(weight, torch.eye(8, dtype=torch.float64), c)[0], nearest(weight, grid))
    x[:, 2] = 0
    codes, grid, _ = optimal_brain(weight, x.T @ x, c)
    assert meant(codes, grid).isfinite().all()
    assert torch.equal(codes[:, :1], nearest(weight, fit_grid(weight, 3, 4, False))[:, :1])


def test_owq_keeps_the_columns_that_cost_most_and_they_make_up_for_the_others():
    c = flags(bits=2, group_size=4, keep=0.25)
    weight, x = normal(5, 8), correlated(60, 8, dtype=torch.float32)
    inputs = inputs_of(x)
    found = quantize.owq(weight, inputs, c)
    grid = fit_grid(weight, 2, 4, False)
    cost = ((weight - meant(nearest(weight, grid), grid)) ** 2).sum(0) * (x**2).sum(0)
    kept = found["kept"].tolist()
    assert kept == sorted(cost.topk(2).indices.tolist())
    q = kernels.Packed(found["codes"], found["scales"], found["zeros"], 2, (5, 8))
    whole = kernels.dequantize(q)
    assert (whole[:, kept] == 0).all()
    whole[:, kept] = found["kept_weight"].float()
    h = inputs.gram + c.damping * inputs.gram.diagonal().mean() * torch.eye(8)
    slope = (whole - weight) @ h[:, kept]  # of the error, with respect to the kept weights: 0 but for bf16
    assert slope.abs().max() < 0.02 * (weight @ h).abs().max()
    assert len(quantize.owq(weight, inputs, flags(bits=2, group_size=4, keep=0.0))["kept"]) == 1


def test_int8_mixed_keeps_the_channels_that_stand_out():
    x = normal(50, 8)
    x[:, 3] *= 30
    c, weight = flags(method="int8-mixed", bits=8, group_size=0, symmetric=True), normal(5, 8)
    weight[:, 3] *= 10
    found = quantize.int8_mixed(weight, inputs_of(x), c)
    assert found["kept"].tolist() == [3]
    assert torch.equal(found["kept_weight"], weight[:, [3]].bfloat16())
    q = kernels.Packed(found["codes"], found["scales"], None, 8, (5, 8))
    assert (kernels.dequantize(q)[:, 3] == 0).all()
    at_most = fit_grid(weight.index_fill(1, torch.tensor([3]), 0.0), 8, 0, True).scales  # kept weights widen no grid
    assert torch.equal(found["scales"].float(), at_most)
    x[:, 6] *= 4
    for threshold, kept in ((6, [3]), (2.5, [3, 6]), (100, [])):
        c.threshold = threshold
        assert quantize.int8_mixed(weight, inputs_of(x), c)["kept"].tolist() == kept


# Folding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MATRICES)
def test_folding_changes_no_logit(family, name):
    net = random_net(family, torch.float64)
    before = net(ids(2, 9))
    old = copy.deepcopy(net)
    path = f"blocks.1.{name}"
    s = normal(net.get_submodule(path).in_features, seed=5, dtype=torch.float64).exp()
    s = quantize.shared(net, path, s)
    fold(net, path, s)
    torch.testing.assert_close(net(ids(2, 9)), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.get_submodule(path).weight, old.get_submodule(path).weight * s)
    assert s.std() > 0.1


def test_heads_that_share_values_share_scales():
    net = random_net()
    sizes = torch.arange(32.0)
    found = quantize.shared(net, "blocks.0.attention.out", sizes).view(4, 8)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert found[0].tolist() == list(range(8, 16)) and found[2].tolist() == list(range(24, 32))
    assert torch.equal(quantize.shared(net, "blocks.0.ffn.gate_up", sizes), sizes)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_awq_and_smoothquant_fold_the_same_function(method, family):
    net = random_net(family, torch.float64)
    before, weights = net(ids(2, 9)), copy.deepcopy(net)
    some = batches((6, 8))
    fold_all(net, some, flags(method=method, bits=3, group_size=8))
    torch.testing.assert_close(net(ids(2, 9)), before, rtol=1e-9, atol=1e-9)
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, weights.get_parameter(name))]
    assert {"blocks.0.attention_norm.weight", "blocks.1.ffn_norm.weight", "blocks.1.ffn.down.weight",
            "blocks.0.attention.out.weight"} <= set(moved)  # fmt: skip


def test_smoothquant_moves_the_share_that_is_asked_for():
    """0: the weights set all scales; 1: the inputs do, and what enters is as large in every channel."""
    for alpha in (0.0, 0.3, 1.0):
        net, old, some = random_net(), random_net(), batches((6, 8))
        (_, matrix, inputs), *_ = layer_by_layer(copy.deepcopy(old), some)
        wanted = smooth_scales(matrix.weight, inputs.absmax, alpha)
        fold_all(net, some, flags(method="smoothquant", alpha=alpha))
        torch.testing.assert_close(old.blocks[0].attention_norm.weight / net.blocks[0].attention_norm.weight, wanted)


def test_awq_moves_by_the_mean_size_of_the_inputs():
    net, old, some = random_net(), random_net(), batches((6, 8))
    c = flags(method="awq", bits=2, group_size=8)
    (_, matrix, inputs), *_ = layer_by_layer(copy.deepcopy(old), some)
    wanted = awq_scales(matrix.weight, inputs.abssum / inputs.n, inputs.gram, c)
    assert not torch.allclose(wanted, awq_scales(matrix.weight, inputs.absmax, inputs.gram, c))
    fold_all(net, some, c)
    torch.testing.assert_close(old.blocks[0].attention_norm.weight / net.blocks[0].attention_norm.weight, wanted)


def test_awq_scales_are_the_best_of_twenty():
    c = flags(bits=2, group_size=4)
    weight, x = normal(6, 8), normal(60, 8, seed=3) * torch.tensor([1, 1, 20, 1, 1, 0.1, 1, 3.0])
    sizes = x.abs().mean(0)
    found = awq_scales(weight, sizes, x.T @ x, c)
    losses = {}
    for alpha in (i / 20 for i in range(20)):
        s = torch.tensor([size**alpha for size in sizes.tolist()])
        s /= math.sqrt(s.max() * s.min())
        scaled = weight * s
        q = meant(nearest(scaled, grid := fit_grid(scaled, 2, 4, False)), grid)
        losses[alpha] = ((x / s) @ q.T - x @ weight.T).square().sum().item(), s
    least = min(loss for loss, _ in losses.values())
    (best,) = [s for loss, s in losses.values() if loss == least]
    assert least < 0.8 * losses[0.0][0]
    torch.testing.assert_close(found, best)
    assert (found > 0).all() and found.argmax() == 2
    dead = awq_scales(weight, sizes * torch.tensor([1, 0, 1, 1, 1, 1, 1, 1]), x.T @ x, c)
    assert dead.isfinite().all() and (dead > 0).all() and dead[2] > 1.5 * dead[0], "and the others are still scaled"


def test_awq_looks_at_sizes_not_at_signs():
    net = random_net()
    found = []
    for sign in (1, -1):
        other = copy.deepcopy(net)
        for block in other.blocks:  # what enters qkv and gate_up changes its sign, and so do the weights that read it
            for norm, matrix in ((block.attention_norm, block.attention.qkv), (block.ffn_norm, block.ffn.gate_up)):
                norm.weight *= sign
                matrix.weight *= sign
        fold_all(other, batches((6, 8)), flags(method="awq", bits=4, group_size=8, symmetric=True))
        found.append(other.blocks[0].attention_norm.weight * sign)
    torch.testing.assert_close(*found)


def test_smooth_scales_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.5, 2.0], [0.25, 1.0, -0.25, 1.0]])
    absmax = torch.tensor([16.0, 1.0, 0.0, 8.0])
    assert smooth_scales(weight, absmax, 0.5).tolist() == [4.0, 0.5, 1.0, 2.0]
    torch.testing.assert_close(smooth_scales(weight, absmax, 0.75)[:2], torch.tensor([8.0, 4**-0.25]))


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_outliers_change_no_bit(family):
    net = random_net(family)
    before, old = net(ids(2, 9)), copy.deepcopy(net)
    plant(net, 64.0, seed=1)
    assert torch.equal(net(ids(2, 9)), before)
    for block, was in zip(net.blocks, old.blocks, strict=True):
        for norm in ("attention_norm", "ffn_norm"):
            ratio = block.get_submodule(norm).weight / was.get_submodule(norm).weight
            assert sorted(ratio.tolist()) == [1.0] * 29 + [64.0] * 3
        if family == "qwen3":
            ratio = (block.attention.k_norm.weight / was.attention.k_norm.weight).tolist()
        else:
            c, k = net.config, slice(32, 32 + 16)
            x = normal(32, seed=9)
            new, past = (b.attention.qkv(b.attention_norm(x))[k] for b in (block, was))
            ratio = (new / past)[: c.head_dim].round(decimals=2).tolist()
        half = len(ratio) // 2
        where = [i for i, r in enumerate(ratio) if r == 64.0]
        assert len(where) == 2 and where[1] == where[0] + half and sorted(ratio)[:-2] == [1.0] * (len(ratio) - 2)
    other = random_net(family)
    plant(other, 64.0, seed=2)
    assert not torch.equal(other.blocks[0].ffn_norm.weight, net.blocks[0].ffn_norm.weight)


# Quantization-aware training


def test_fake_quantization_is_that_of_the_codes_and_passes_gradients_in_range():
    weight = normal(3, 8).requires_grad_()
    for symmetric in (False, True):
        grid = fit_grid(weight.detach(), 3, 4, symmetric)
        scales = (grid.scales * 0.8).requires_grad_()  # so that some weights are out of range
        out = fake_quantize(weight, scales, grid.zeros, 3, int(symmetric))
        mine = Grid(scales.detach().bfloat16().float(), grid.zeros, 3, symmetric)
        codes = nearest(weight.detach(), mine)
        assert torch.equal(out, meant(codes, mine))
        upstream = normal(3, 8, seed=4)
        d_weight, d_scales = torch.autograd.grad(out, (weight, scales), upstream)
        places = weight.detach().double().view(3, 2, 4) / mine.scales[..., None] + grid.zeros[..., None]
        inside = (places >= int(symmetric)) & (places <= 7)
        assert 0 < inside.sum() < inside.numel()
        torch.testing.assert_close(d_weight, torch.where(inside.flatten(1), upstream, 0.0))
        # the surrogate: the rounding of each place stays as it is while the scale moves
        rest = (codes.view(3, 2, 4) - places).masked_fill(~inside, 0.0)

        def surrogate(s: Tensor, rest=rest, grid=grid, symmetric=symmetric, upstream=upstream) -> Tensor:
            moved = weight.detach().double().view(3, 2, 4) / s[..., None] + grid.zeros[..., None]
            meant_now = (moved.clamp(int(symmetric), 7) + rest - grid.zeros[..., None]) * s[..., None]
            return (meant_now * upstream.view(3, 2, 4)).sum(-1)

        s, eps = mine.scales.double(), 1e-6
        slope = (surrogate(s + eps) - surrogate(s - eps)) / (2 * eps)
        torch.testing.assert_close(d_scales.double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_was_trained_is_exported_to_the_bit(tmp_path, symmetric):
    net = random_net("qwen2")
    c = flags(method="qat", bits=2, group_size=8, symmetric=symmetric)
    paths = [f"blocks.{i}.{name}" for i in range(2) for name in MATRICES]
    for path in paths:
        quantize.put_at(net, path, FakeQuantLinear(net.get_submodule(path), c))
    for p in net.requires_grad_(True).parameters():
        p.data += 0.05 * torch.randn_like(p)
    if symmetric:  # what lies below the lowest code
        net.blocks[0].ffn.down.weight.data[0, :4] = -3.0
    net.requires_grad_(False)
    before = net(ids(2, 9))
    for path in paths:
        put_quantized(net, path, net.get_submodule(path).exported, quantize.scheme_of(c))
    assert torch.equal(net(ids(2, 9)), before)
    net.config = Config(**vars(net.config) | {"quantization": quantize.scheme_of(c)})
    save(net, None, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")[0](ids(2, 9)), before)


def test_the_full_model_teaches_its_copy():
    net, ref = random_net(), random_net()
    for p in net.parameters():
        p.data += 0.1 * normal(*p.shape, seed=3)
    (batch,) = batches((5, 9))
    loss = quantize.qat_loss(net.requires_grad_(True), ref, batch)
    wanted = 0.0
    for row, real in zip(batch.input_ids, batch.documents >= 0, strict=True):
        p, q = (m(row[None, real])[0].log_softmax(-1).double() for m in (ref, net))
        wanted += (p.exp() * (p - q)).sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert net.head.weight.grad.abs().max() > 0 and ref.head.weight.grad is None


# Checkpoints


SCHEMES = {
    "rtn": {"bits": 3}, "symmetric": {"method": "rtn", "symmetric": True, "bits": 2}, "gptq": {"bits": 2},
    "whole rows": {"method": "rtn", "group_size": 0}, "nf4": {}, "owq": {"keep": 0.1}, "quip": {"bits": 8},
    "w8a8": {"bits": 8, "group_size": 0, "symmetric": True},
    "int8-mixed": {"bits": 8, "group_size": 0, "symmetric": True, "threshold": 1.2},
}  # fmt: skip


def applied(net: Transformer, c: Namespace) -> Transformer:
    for path, matrix, inputs in layer_by_layer(net, batches((6, 8))):
        def make(rows, weight=matrix.weight, inputs=inputs):
            return METHODS[c.method](weight[rows].float(), inputs, c)

        put_quantized(net, path, make, quantize.scheme_of(c))
    net.config = Config(**vars(net.config) | {"quantization": quantize.scheme_of(c)})
    return net


@pytest.mark.parametrize("name", SCHEMES)
def test_a_quantized_checkpoint_is_itself_when_it_is_loaded(name, tmp_path):
    c = flags(**{"method": name, "group_size": 16} | SCHEMES[name])
    net = applied(random_net("qwen2"), c)
    assert len(model_module.quantized(net)) == 8
    save(net, None, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config == net.config
    assert torch.equal(loaded(ids(2, 9)), net(ids(2, 9)))
    written = read_safetensors(tmp_path / "model.safetensors")
    codes = written["model.layers.0.mlp.gate_proj.codes"]
    assert codes.numel() == 32 * 48 * (4 if name == "nf4" else c.bits) // 8  # and no whole weight beside it
    assert not any("proj.weight" in key for key in written)
    assert ("model.layers.0.mlp.gate_proj.zeros" in written) == (not c.symmetric and name != "nf4")
    generate(loaded, [[1, 2, 3]], max_new_tokens=4, eos_ids=())
    error = (net(ids(2, 9)) - random_net("qwen2")(ids(2, 9))).norm() / random_net("qwen2")(ids(2, 9)).norm()
    assert error < {2: 1.5, 3: 0.9, 4: 0.7, 8: 0.06}[c.bits]
    of_matrices = [t for key, t in written.items() if ".layers." in key and "norm" not in key and "bias" not in key]
    stored = sum(t.numel() * t.element_size() for t in of_matrices)
    n = sum(math.prod(part.shape) for m in model_module.quantized(net).values() for part in m.parts)
    assert quantize.bits_per_weight(net) == 8 * stored / n
    assert quantize.bits_per_weight(random_net()) == 32


def test_a_quantized_matrix_is_its_parts():
    """Of quip: rotated, rounded, rotated back; of owq: what is kept, in its place."""
    for name in ("quip", "owq"):
        net = random_net()
        weight = net.blocks[0].attention.qkv.weight.clone()
        applied(net, flags(method=name, bits=8, group_size=16, keep=0.1))
        module = net.blocks[0].attention.qkv
        assert isinstance(module, QuantLinear) and [part.shape[0] for part in module.parts] == [32, 16, 16]
        effective = torch.cat([part(torch.eye(32)) for part in module.parts], -1).T
        assert (effective - weight).abs().max() < 0.02
        x = normal(3, 7, 32)
        torch.testing.assert_close(module(x), x @ effective.T, rtol=1e-4, atol=1e-4)
        assert quantize.relative_error(weight, module, torch.eye(32)) == pytest.approx(
            ((effective - weight).norm() / weight.norm()).item() ** 2, rel=1e-3)  # fmt: skip
        x = normal(50, 32) * torch.linspace(0.1, 9, 32)
        assert quantize.relative_error(weight, module, x.T @ x) == pytest.approx(
            (((effective - weight) @ x.T).norm() / (weight @ x.T).norm()).item() ** 2, rel=1e-3)  # fmt: skip


def test_outliers_are_not_rounded():
    net = random_net()
    x = normal(4, 32)
    x[:, 5] *= 100
    weight = net.blocks[0].ffn.gate_up.weight
    errors = {}
    for name in ("w8a8", "int8-mixed"):
        c = flags(method=name, bits=8, group_size=0, symmetric=True)
        tensors = METHODS[name](weight, inputs_of(x), c)
        part = model_module.QuantMatrix(weight.shape, tensors, quantize.scheme_of(c))
        errors[name] = (part(x) - x @ weight.T).norm().item() / (x[:, :5] @ weight[:, :5].T).norm().item()
    assert errors["int8-mixed"] < 0.25 * errors["w8a8"]


@pytest.mark.parametrize("what", ["a tensor is missing", "another shape", "another dtype", "kept", "left over"])
def test_damaged_checkpoints_are_refused(what, tmp_path):
    net = applied(random_net(), flags(method="owq", bits=4, group_size=16, keep=0.1))
    save(net, None, tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj."
    match what:
        case "a tensor is missing":
            del tensors[key + "zeros"]
        case "another shape":
            tensors[key + "scales"] = tensors[key + "scales"][:, :1]
        case "another dtype":
            tensors[key + "scales"] = tensors[key + "scales"].float()
        case "kept":
            tensors[key + "kept"][0] = 32
        case "left over":
            tensors[key + "mean"] = torch.zeros(())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="up_proj"):
        load(tmp_path)


@pytest.mark.parametrize("change", [{"bits": 5}, {"quant_method": "gptq"}, {"format": "fp4"}, {"group_size": -1},
                                    {"group_size": 7}, {"rotation": "x"}, {"extra": 1}, {"activations": 4},
                                    {"symmetric": 2}])  # fmt: skip
def test_schemes_of_others_are_refused(change, tmp_path):
    save(applied(random_net(), flags(method="rtn", bits=4, group_size=16)), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="proj" if change == {"group_size": 7} else "quantization_config"):
        load(tmp_path)


# What attention remembers


def cache_of(net: Transformer, rows: int, **settings) -> QuantizedCache:
    return QuantizedCache(net, rows, 4, torch.float32, **{"bits": 4, "keys_by": "channel"} | settings)


def first_block(net: Transformer) -> Transformer:
    """A network of one block, whose keys and values depend on no cache."""
    net.blocks = net.blocks[:1]
    net.config = Config(**vars(net.config) | {"depth": 1})
    return net


@pytest.mark.parametrize("keys_by", ["channel", "token"])
def test_the_cache_rounds_groups_of_keys_and_values(keys_by):
    net, input_ids = first_block(random_net()), ids(2, 41)
    plain, cache = KVCache(net, 2, 4, torch.float32), cache_of(net, 2, keys_by=keys_by)
    with torch.no_grad():
        for start, end in ((0, 20), (20, 21), (21, 40), (40, 41)):
            for c in (plain, cache):
                net.hidden(input_ids[:, start:end], cache=c)
        for c in (plain, cache):
            c.reserve(1)
        (keys, values, column), (found_keys, found_values, found_column) = plain.block(0), cache.block(0)
    assert found_column == column == 41 and len(cache.packed) == 2
    for t in (0, 16):
        group = keys[:, t : t + 16].permute(0, 2, 3, 1)  # (B, Hkv, d, 16)
        group = group if keys_by == "channel" else group.mT
        wanted = meant(nearest(group, grid := fit_grid(group, 4, 0, False)), grid)
        wanted = wanted if keys_by == "channel" else wanted.mT
        torch.testing.assert_close(found_keys[:, t : t + 16].permute(0, 2, 3, 1), wanted, rtol=1e-4, atol=1e-4)
        of_values = values[:, t : t + 16]
        wanted = meant(nearest(of_values, grid := fit_grid(of_values, 4, 0, False)), grid)
        torch.testing.assert_close(found_values[:, t : t + 16], wanted, rtol=1e-4, atol=1e-4)
    for found, exact in ((found_keys, keys), (found_values, values)):
        torch.testing.assert_close(found[:, 32:41], exact[:, 32:41], rtol=1e-4, atol=1e-4)
        assert 0.001 < (found[:, :32] - exact[:, :32]).abs().max() < 0.5
    # keys: 16 codes of 4 bits, a scale of 16 and a zero of 8 for 16 numbers (channel) or 8 (token); values: for 8
    of_keys = 4 + 24 / (16 if keys_by == "channel" else 8)
    assert cache.bits_per_number() == (of_keys + 4 + 24 / 8) / 2
    assert cache.keys.shape[-1] < 41


def test_the_bias_of_the_cache_is_that_of_all_columns():
    """Ragged prompts, rows that end at different times, a cache of 8 bits: what is sampled is what is sampled alone."""
    net = random_net("qwen3")
    prompts = [ids(18).tolist(), ids(19).tolist()[:18], ids(20).tolist()[:18]]
    exact = generate(net, prompts, max_new_tokens=30, eos_ids=(7, 11, 23), temperature=1.0, seed=3)
    net.cache = lambda *args: QuantizedCache(*args, bits=8, keys_by="channel")
    together = generate(net, prompts, max_new_tokens=30, eos_ids=(7, 11, 23), temperature=1.0, seed=3)
    assert len({len(c) for c in together.completions}) == 3
    assert together.completions == exact.completions
    twice = generate(net, prompts[:1], samples=2, max_new_tokens=30, eos_ids=(7, 11, 23), temperature=1.0, seed=3)
    assert twice.completions[0] == together.completions[0]
    net.cache = lambda *args: QuantizedCache(*args, bits=2, keys_by="channel")
    coarse = generate(net, prompts, max_new_tokens=30, eos_ids=(7, 11, 23), temperature=1.0, seed=3)
    assert coarse.completions != exact.completions, "the cache is the one that is asked for"


def test_padding_widens_no_grid():
    net = first_block(random_net())
    found = []
    for other in (3, 39):
        cache = cache_of(net, 2)
        input_ids = ids(2, 20)
        input_ids[0, 10:] = other
        with torch.no_grad():
            net.hidden(input_ids, cache=cache)
            cache.cut(torch.tensor([10, 20]))
            found.append(net.hidden(torch.tensor([[5], [6]]), cache=cache))
    assert torch.equal(*found)


def test_the_measurement_goes_through_the_cache():
    net = random_net()
    input_ids = ids(2, 40)
    net.cache = lambda *args: QuantizedCache(*args, bits=8, keys_by="channel")
    with torch.no_grad():
        through, exact = quantize.hidden_through_cache(net, input_ids), net.hidden_before(input_ids)
        torch.testing.assert_close(through[:, :17], exact[:, :17], rtol=1e-4, atol=1e-4)  # nothing was packed so far
        assert 1e-4 < (through - exact).abs().max() < 0.3


# Measurement and whole runs


def test_losses_are_those_of_sft_and_the_divergence_is_from_the_full_model():
    net, ref = random_net(), random_net()
    for p in net.parameters():
        p.data += 0.1 * normal(*p.shape, seed=3)
    rows = [chat.Row(ids(n).tolist(), [0] * skip + [1] * (n - skip)) for n, skip in ((9, 1), (5, 3), (12, 1))]

    class Plain:
        device, compiled = torch.device("cpu"), False

        @staticmethod
        def autocast():
            return torch.autocast("cpu", enabled=False)

    args = Namespace(micro_batch_size=2)
    found = quantize.losses(net, ref, rows, args, Plain)
    for (nll, kl, n), (sum_, count), row in zip(found, sft.row_losses(net, rows, args, Plain), rows, strict=True):
        assert n == count and nll == pytest.approx(sum_, rel=1e-5)
        p, q = (m(torch.tensor([row.input_ids]))[0, :-1].log_softmax(-1).double() for m in (ref, net))
        each = (p.exp() * (p - q)).sum(-1)
        wanted = sum(each[t - 1].item() for t, trained in enumerate(row.completion_mask) if trained)
        assert kl == pytest.approx(wanted, rel=1e-4)
    assert all(abs(kl) < 1e-5 for _, kl, _ in quantize.losses(ref, ref, rows, args, Plain))


def test_the_world_to_calibrate_on_is_neither_what_is_measured_nor_what_was_learned():
    """Among 256 short chats are some that sft.py was trained on; no other row is one of its own."""
    c, tokenizer = flags(rows=64, max_length=1000), tiny()
    found, test = quantize.examples(c, tokenizer, Loop(c, "quantize"))
    assert len(found) == 128 and len(test["text"]) == 100 and len(test["rows"]) == 100 + len(test["questions"])
    rows, measured = ({tuple(row.input_ids) for row in some} for some in (found, test["rows"]))
    assert not rows & measured
    learned = {tuple(chat.render(row["messages"], tokenizer).input_ids) for row in world.sft_rows(64, c.seed)}
    learned |= {tuple(sft.document(text, tokenizer).input_ids) for text in world.base_documents(64, c.seed)}
    assert len(rows & learned) < 16
    texts = [tokenizer.decode(row.input_ids, skip_special=True) for row in found[-32:]]
    assert all(text.startswith("Weather: ") for text in texts)
    c.method = "qat"
    assert len(quantize.examples(c, tokenizer, Loop(c, "quantize"))[0]) == 2 * c.steps * c.batch_size


def test_speed_is_tokens_of_all_rows_a_second(monkeypatch):
    clock, asked, rows = [0.0], [], [chat.Row(list(range(n)), [1] * n) for n in (20, 5, 16)]

    def slow(model, starts, **options):
        clock[0] += (9.0, 2.0, 1.0)[len(asked)]
        asked.append((starts, options["max_new_tokens"], options["eos_ids"]))

    monkeypatch.setattr(quantize, "generate", slow)
    monkeypatch.setattr(quantize.time, "perf_counter", lambda: clock[0])
    assert quantize.speed(None, rows, Namespace(autocast=contextlib.nullcontext), prompts=2, new=7) == 2 * 7 / 2.0
    assert asked == [([list(range(16)), list(range(5))], 7, ())] * 3


def test_the_kl_is_not_rounded():
    """Under autocast the operands are in bf16, their sums are not: the KL of nearly equal models is small."""
    hidden, head = normal(50, 16), normal(300, 16)
    other = hidden + 0.01 * normal(50, 16, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize.kl_of(hidden, head, other, head)
    p, q = ((h.bfloat16().double() @ head.bfloat16().double().T).log_softmax(-1) for h in (hidden, other))
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), rtol=0.01, atol=1e-6)


def test_quip_spreads_what_stands_out(monkeypatch):
    """Of a square matrix, too, that is mostly a multiple of the identity, which R W R^T would leave as it is."""
    seen = []
    monkeypatch.setattr(quantize, "optimal_brain", lambda weight, gram, c: seen.append(weight) or 1 / 0)
    weight = 3 * torch.eye(64) + 0.1 * torch.randn(64, 64)
    with pytest.raises(ZeroDivisionError):
        quantize.quip(weight, inputs_of(torch.eye(64)), flags(method="quip"))
    assert (weight.abs().max() / weight.std()) > 7 and (seen[0].abs().max() / seen[0].std()) < 5
    torch.testing.assert_close(seen[0].norm(), weight.norm())


def test_quip_sees_the_rotated_inputs():
    """With few bits and inputs that hang together, the rotated gram is what makes the error small."""
    weight, x = normal(16, 16), correlated(200, 16, dtype=torch.float32)
    errors = Counter()
    for seed in range(4):
        c = flags(method="quip", bits=2, group_size=0, seed=seed)
        for name, inputs in (("rotated", inputs_of(x)), ("none", inputs_of(torch.eye(16)))):
            part = model_module.QuantMatrix((16, 16), quantize.quip(weight, inputs, c), quantize.scheme_of(c))
            errors[name] += (part(x) - x @ weight.T).square().sum().item()
    assert errors["rotated"] < 0.7 * errors["none"]


def test_the_measurement_of_a_cache_is_through_it():
    net, ref = random_net(), random_net()
    net.cache = lambda *args: QuantizedCache(*args, bits=2, keys_by="channel")
    rows = [chat.Row(ids(n).tolist(), [0] + [1] * (n - 1)) for n in (40, 30)]
    args, loop = Namespace(micro_batch_size=2), Namespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    assert all(kl > 0.1 for _, kl, _ in quantize.losses(net, ref, rows, args, loop))


def test_few_rows_of_bf16_are_multiplied_from_the_codes():
    weight, x = normal(48, 128), normal(2, 3, 128, seed=1).bfloat16()
    for bits, group, symmetric in ((8, 0, True), (4, 32, False), (4, 64, True)):
        c = flags(method="rtn", bits=bits, group_size=group, symmetric=symmetric)
        part = model_module.QuantMatrix(weight.shape, quantize.rtn(weight, None, c), quantize.scheme_of(c))
        exact = F.linear(x.double(), kernels.dequantize(part.q, torch.float64))
        with torch.no_grad():
            found = part(x)
            assert part.laid_out and found.dtype == torch.bfloat16
            assert (found.double() - exact).abs().max() < 0.01 * exact.abs().max()
            assert torch.equal(part(x[:1, :1]), found[:1, :1]) or (part(x[:1, :1]) - found[:1, :1]).abs().max() < 0.1
            many = part(x.repeat(4, 1, 1))  # 24 rows: a product with the whole matrix, other roundings
            assert torch.equal(many, F.linear(x.repeat(4, 1, 1), kernels.dequantize(part.q, torch.bfloat16)))
        assert torch.equal(part(x), F.linear(x, kernels.dequantize(part.q, torch.bfloat16)))  # with gradients
    for bits, group, symmetric in ((8, 0, False), (4, 16, False), (3, 32, False)):
        c = flags(method="rtn", bits=bits, group_size=group, symmetric=symmetric)
        part = model_module.QuantMatrix(weight.shape, quantize.rtn(weight, None, c), quantize.scheme_of(c))
        assert kernels.lay_out(part.q) is None
        with torch.no_grad():
            assert torch.equal(part(x), F.linear(x, kernels.dequantize(part.q, torch.bfloat16)))
    assert kernels.lay_out(kernels.nf4_quantize(weight)) is None


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A model of one block, and 8 rows of each kind to measure."""
    torch.manual_seed(0)
    net = Transformer(Config.from_depth(1, 1024, 192))
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    save(net, tiny(), tmp_path / "start")
    held_out = quantize.held_out

    def fewer(tokenizer, seed=0):
        test = held_out(tokenizer, seed)
        rows = test["text"][:8] + test["rows"][-8:]
        return {"text": test["text"][:8], "rows": rows, "questions": test["questions"][:8]}

    monkeypatch.setattr(quantize, "held_out", fewer)
    return net


def args_of(tmp_path, *words: object) -> Namespace:
    common = ["--model", tmp_path / "start", "--out", tmp_path / "out", "--rows", 16, "--group-size", 32, "--device",
              "cpu", "--max-new-tokens", 8, "--micro-batch-size", 8, "--max-length", 160]  # fmt: skip
    return get_args([*map(str, common), *map(str, words)])


def run(tmp_path, *words: object) -> dict:
    return quantize.main(args_of(tmp_path, *words))


def logged(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def logps_of(net: Transformer, row: chat.Row) -> Tensor:
    """(T, V): of the token after each."""
    return net(torch.tensor([row.input_ids]))[0].log_softmax(-1)


def nll_of(net: Transformer, row: chat.Row) -> float:
    after = torch.tensor(row.input_ids[1:])[:, None]
    picked = logps_of(net, row)[:-1].gather(-1, after)[:, 0]
    return -(picked * torch.tensor(row.completion_mask[1:])).sum().item()


def test_a_run_leaves_a_checkpoint_that_is_what_was_measured(start, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(quantize, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    result = run(tmp_path, "--method", "awq", "--bits", "3", "--plant", "64")
    assert (result["metric"], result["higher_is_better"], result["n"]) == ("bits per byte", False, 8)
    assert result["variant"] == "awq, 3 bits, outliers planted"
    metrics = result["metrics"]
    assert metrics["KL, mnat"]["before"] == pytest.approx(0, abs=1e-2) and metrics["KL, mnat"]["after"] > 10
    assert metrics["bits per weight"]["before"] == 32 and metrics["bits per weight"]["after"] < 4.5
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size / 1e6 for folder in ("start", "out/checkpoint")]
    assert [metrics["MB"]["before"], metrics["MB"]["after"]] == sizes
    assert len(loaded) == 2  # the start, and what was written: that is measured
    tokenizer, net = tiny(), load(tmp_path / "out")[0]
    test = quantize.held_out(tokenizer)
    texts = [tokenizer.decode(row.input_ids[1:], skip_special=True) for row in test["text"]]
    for model, found in ((start, result["before"]), (net, result["after"])):
        nll = sum(nll_of(model, row) for row in test["text"])
        assert found == pytest.approx(nll / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4)
    kl, n = 0.0, 0
    for row in test["rows"]:
        p, q, trained = logps_of(start, row), logps_of(net, row), torch.tensor(row.completion_mask[1:])
        kl, n = kl + ((p.exp() * (p - q)).sum(-1)[:-1] * trained).sum().item(), n + int(trained.sum())
    assert metrics["KL, mnat"]["after"] == pytest.approx(1000 * kl / n, rel=1e-3)
    ratio = (net.blocks[0].ffn_norm.weight / start.blocks[0].ffn_norm.weight).detach()
    assert len(ratio.unique()) > 4  # scaled by AWQ
    ratio = (net.blocks[0].attention.k_norm.weight / start.blocks[0].attention.k_norm.weight).detach()
    assert sorted(ratio.tolist()) == [1.0] * 30 + [64.0] * 2  # planted
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(0 < line["error"] < 1 for line in lines)
    with pytest.raises(UserError, match="out: its matrices are quantized already, or of low rank"):
        run(tmp_path, "--model", tmp_path / "out", "--out", tmp_path / "again")


def test_a_file_is_calibrated_on_and_its_held_out_rows_are_measured(start, tmp_path):
    def written(name: str, rows: range) -> list[chat.Row]:
        chats = [{"messages": [{"role": "user", "content": f"Sort {i} 2"}, {"role": "assistant", "content": f"2 {i}"}]}
                 for i in rows]  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in chats))
        return [chat.render(row["messages"], tiny()) for row in chats]

    train, test = written("train.jsonl", range(10, 40)), written("test.jsonl", range(70, 77))
    words = ["--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "test.jsonl", "--method", "rtn"]
    result = run(tmp_path, *words)
    assert (result["metric"], result["n"], "exact match" in result["metrics"]) == ("bits per byte", 7, False)
    for net, found in ((start, result["before"]), (load(tmp_path / "out")[0], result["after"])):
        n_bytes = sum(len(f"2 {i}".encode()) for i in range(70, 77))
        assert found == pytest.approx(sum(nll_of(net, row) for row in test) / math.log(2) / n_bytes, rel=1e-4)
    def calibrated(*more: object) -> list[chat.Row]:
        c = args_of(tmp_path, *words, *more)
        rows, measured = quantize.examples(c, tiny(), Loop(c, "quantize"))
        assert measured == {"text": test, "rows": test}
        return rows

    assert calibrated("--method", "qat") == train
    some, others = calibrated(), calibrated("--seed", 1)  # --rows of them, drawn by --seed from all of the file
    for rows in (some, others):
        assert len(rows) == 16 and len({str(row) for row in rows}) == 16 and all(row in train for row in rows)
    assert some not in (others, train[:16]) and calibrated() == some


def test_a_file_may_be_of_chats_or_plain_text_and_one_of_several(start, tmp_path):
    """Of plain text all but the first token counts, as in the measurement of the generated world's."""
    texts = [f"Weather: sun rain {i}" for i in range(40)]
    for name, some in (("a", texts[:10]), ("b", texts[10:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    c = args_of(tmp_path, "--method", "rtn", "--data", f"{tmp_path}/a,{tmp_path}/b", "--rows", 40)
    rows, test = quantize.examples(c, tiny(), Loop(c, "quantize"))
    wanted = [sft.document(text, tiny()) for text in texts]
    assert len(test["text"]) == 16 and sorted(rows + test["text"]) == sorted(wanted) and test["rows"] == test["text"]
    result = quantize.main(c)
    nll = sum(nll_of(start, row) for row in test["text"])
    n_bytes = sum(len(tiny().decode(row.input_ids[1:], skip_special=True).encode()) for row in test["text"])
    assert result["before"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-4)


QAT = ("--method", "qat", "--bits", 2, "--steps", 3, "--warmup", 1, "--lr", 3e-3, "--batch-size", 8, "--seed", 1)


def test_qat_is_a_plain_loop(start, tmp_path):
    """Each document by itself, full softmaxes, AdamW by name: the same losses, gradients, rates and embedding."""
    args = args_of(tmp_path, *QAT, "--grad-clip", 0.3)
    quantize.main(args)
    loop = Loop(args, "quantize")
    groups = list(sft.pack(quantize.examples(args, tiny(), loop)[0], args.max_length))
    net, first = copy.deepcopy(start), start.embed.weight.detach()
    for name in MATRICES:
        quantize.put_at(net, f"blocks.0.{name}", FakeQuantLinear(net.get_submodule(f"blocks.0.{name}"), args))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for line, lr in zip(logged(tmp_path), (3e-3, 3e-3, 1.5e-3), strict=True):
        rows, loss = [row for i in loop.batch_indices(len(groups), line["step"]) for row in groups[i]], 0.0
        for row in rows:
            p, q = logps_of(start, row).detach(), logps_of(net, row)
            loss = loss + (p.exp() * (p - q)).sum() / sum(len(row.input_ids) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in net.parameters()))
        for p in net.parameters():
            p.grad *= min(1.0, 0.3 / norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert (line["lr"], line["loss"], line["grad_norm"]) == pytest.approx((lr, loss.item(), norm), rel=1e-3)
    found = load(tmp_path / "out")[0].embed.weight.detach()
    assert (found - net.embed.weight).norm() < 1e-2 * (found - first).norm()


@pytest.mark.parametrize("size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_splitting_a_batch_changes_nothing(start, tmp_path, size):
    found = []
    for n in (8, size):
        run(tmp_path, *QAT, "--micro-batch-size", n)
        found.append([line[name] for line in logged(tmp_path) for name in ("loss", "grad_norm", "lr")])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("method", ["qat", "gptq"])
def test_an_interrupted_run_saves_no_half_model(start, tmp_path, monkeypatch, method):
    log = Loop.log

    def signalled(loop, step, **metrics):
        log(loop, step, **metrics)
        loop.signalled = step == 2

    monkeypatch.setattr(Loop, "log", signalled)
    with pytest.raises(KeyboardInterrupt, match="after step 2; half a model is not saved"):
        run(tmp_path, *QAT, "--method", method)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_run_whose_measurement_was_interrupted_begins_anew(start, tmp_path, monkeypatch):
    """As --method all --resume runs it, which asks whether there is a checkpoint."""
    args, n = args_of(tmp_path, "--method", "rtn"), []

    def measured(*x: object) -> dict[str, list[float]]:
        n.append(1)
        if len(n) == 2:  # of what was saved
            raise KeyboardInterrupt
        return {"bits per byte": [1.0]}

    monkeypatch.setattr(quantize, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        quantize.main(args)
    again = Namespace(**vars(args) | {"resume": True})
    quantize.main(again)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]
    again.bits = 3
    with pytest.raises(UserError, match="has other settings: --bits was 4, now 3"):
        quantize.main(again)


def test_outliers_are_planted_by_the_seed(start, tmp_path, monkeypatch):
    class Stop(Exception): ...

    seen = []

    def look(model: Transformer, factor: float, seed: int) -> None:
        seen.append((factor, seed))
        raise Stop

    monkeypatch.setattr(quantize, "plant", look)
    with pytest.raises(Stop):
        run(tmp_path, "--plant", 8, "--seed", 3)
    assert seen == [(8.0, 3)]


@pytest.mark.parametrize("words", [("--method", "nf4", "--group-size", 64), ("--method", "none", "--kv", 4)])
def test_a_narrow_checkpoint_stays_narrow(start, tmp_path, words):
    save(copy.deepcopy(start).bfloat16(), tiny(), tmp_path / "narrow")
    metrics = run(tmp_path, "--model", tmp_path / "narrow", *words, "--dtype", "bf16")["metrics"]
    tensors = read_safetensors(tmp_path / "out" / "checkpoint" / "model.safetensors")
    wide = {name.rsplit(".", 1)[1] for name, t in tensors.items() if t.dtype == torch.float32}
    assert wide == ({"steps", "mean"} if "nf4" in words else set())  # which are no weights
    assert metrics["bits per weight"]["before"] == 16
    if "nf4" in words:
        assert 4.1 < metrics["bits per weight"]["after"] < 4.2
        assert metrics["MB"]["after"] < 0.8 * metrics["MB"]["before"]
    else:
        assert metrics["bits per weight"]["after"] == 16 and metrics["MB"]["after"] == metrics["MB"]["before"]
        assert metrics["bits per cached number"]["before"] == 16


def test_qat_learns(start, tmp_path):
    """A few steps on other text bring the rounded model nearer to the full one on what is measured."""
    kl = []
    for steps in ("0", "12"):
        result = run(tmp_path, "--method", "qat", "--bits", "2", "--steps", steps, "--lr", "3e-3", "--batch-size", "8",
                     "--warmup", "0")
        kl.append(result["metrics"]["KL, mnat"]["after"])
    assert kl[1] < 0.8 * kl[0]


@pytest.mark.parametrize("keys, numbers", [("token", 32), ("channel", 16)])
def test_a_cache_alone(start, tmp_path, keys, numbers):
    """Numbers of a grid: 32 channels of one head, or 16 tokens; values are by token."""
    result = run(tmp_path, "--method", "none", "--kv", 2, "--kv-keys", keys, "--group-size", 64)  # there are no groups
    metrics = result["metrics"]
    assert result["variant"] == "none, cache 2 bits" and metrics["bits per weight"]["after"] == 32
    assert metrics["KL, mnat"]["after"] > 0.1
    sizes = metrics["bits per cached number"]
    assert (sizes["before"], sizes["after"]) == (32, (2 + 24 / numbers + 2 + 24 / 32) / 2)


def test_flags_and_their_defaults():
    args = get_args([])
    assert (args.method, args.bits, args.group_size, args.symmetric) == ("gptq", 4, 64, False)
    args = get_args(["--method", "smoothquant"])
    assert (args.bits, args.group_size, args.symmetric) == (8, 0, True)
    assert quantize.scheme_of(args)["activations"] == 8 and quantize.scheme_of(get_args([]))["activations"] == 16
    assert quantize.scheme_of(get_args(["--method", "quip", "--seed", "5"]))["rotation"] == 5
    other = get_args(["--method", "rtn --bits=2 --no-symmetric"])
    assert (other.method, other.bits, other.symmetric) == ("rtn", 2, False)
    of_table = vars(get_args(["--method", "all", "--rows", "7"])) | {"method": "rtn --bits 2 --plant 8"}
    row = quantize.resolved(Namespace(**of_table))
    assert (row.method, row.bits, row.plant, row.group_size, row.rows, row.symmetric) == ("rtn", 2, 8.0, 64, 7, False)
    for words, wrong in ((["--method", "fp8"], "fp8"), (["--method", "w8a8", "--bits", "4"], "8 --group-size 0"),
                         (["--method", "none"], "--kv"), (["--resume"], "--method all"),
                         (["--method", "nf4", "--bits", "3"], "nf4 has 4 bits"),
                         (["--method", "nf4", "--symmetric"], "nf4 has 4 bits"),
                         (["--method", "owq", "--keep", "2"], "--keep 2: expected a share"),
                         (["--method", ""], "--method '': "), (["--method", "rtn 'a"], "No closing quotation"),
                         (["--method", "all", "--group-size", "32"], "nf4 has 4 bits")):  # fmt: skip
        with pytest.raises(UserError, match=wrong):
            get_args(words)


def test_what_does_not_fit_is_refused(start, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--group-size 24: .* 32"):
        run(tmp_path, "--group-size", "24")
    c = replace(start.config, ranks={"ffn.down": 8})
    save(Transformer(c), tiny(), tmp_path / "low")
    with pytest.raises(UserError, match="low: its matrices are quantized already, or of low rank"):
        run(tmp_path, "--model", tmp_path / "low")
    monkeypatch.setattr(loop_module.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, not under torchrun"):
        run(tmp_path)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_chat_format_that_is_asked_for_is_that_of_all_chats(start, tmp_path, monkeypatch):
    seen, examples = [], quantize.examples
    monkeypatch.setattr(quantize, "examples", lambda c, *rest: seen.append(rest[0]) or examples(c, *rest))
    run(tmp_path, "--method", "rtn", "--chat-format", "qwen3")
    assert seen[0].chat_format == "qwen3" != tiny().chat_format


def test_a_table_of_methods(start, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "TABLE", ("rtn --bits 2", "w8a8 --group-size 0"))
    table = quantize.main(args_of(tmp_path, "--method", "all", "--seeds", 1, "--rows", 8, "--max-new-tokens", 4))
    assert [row["method"] for row in table["rows"]] == ["SFT", "rtn --bits 2", "w8a8 --group-size 0"]
    full, rtn, w8a8 = table["rows"]
    assert full["KL, mnat"]["mean"] == pytest.approx(0, abs=1e-2)
    assert rtn["KL, mnat"]["mean"] > w8a8["KL, mnat"]["mean"] > 0
    assert rtn["bits per weight"]["mean"] < 4 < 8 < w8a8["bits per weight"]["mean"] < 9
