"""Each kernel against loops in float64, its reference in value and gradient, and what must not matter."""

import contextlib
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import IGNORED, attention, document_mask, linear_cross_entropy, linear_logps, rms_norm, rotary, swiglu

EPS = 0.3  # large beside mean(x^2), so that it cannot be forgotten or misplaced


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The largest error, relative to the largest entry, is at most `tolerance`."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e}"


def gradients(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the outputs, each entry weighted at random."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    weights = [normal(*x.shape, seed=9).detach().to(x) for x in outputs]
    return torch.autograd.grad(outputs, inputs, weights, retain_graph=True)


# ----------------------------------------------------------------------------------------------------------------------
# All kernels against their references

ANGLES = 7 * torch.rand(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).repeat(1, 1, 2)
COS, SIN = ANGLES.cos(), ANGLES.sin()
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
LABELS = torch.tensor([2, 0, 10, 4, 4, 1, 9])
QKV = [(2, 5, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6)]
CASES = {  # kernel: shapes of the inputs, what else it takes, options of the kernel alone
    "rms_norm": ([(2, 5, 6), (6,)], (EPS,), {}, {}),
    "add_rms_norm": ([(2, 5, 6), (2, 5, 6), (6,)], (EPS,), {}, {}),
    "rotary": ([(2, 5, 3, 6)], (COS, SIN), {}, {}),
    "qk_norm_rotary": ([(2, 5, 3, 6), (6,)], (EPS, COS, SIN), {}, {}),
    "swiglu": ([(2, 5, 6)], (), {}, {}),
    "attention": (QKV, (), {}, {}),
    "attention over documents": (QKV, (), {"documents": DOCUMENTS}, {}),
    "attention of the last queries": ([(2, 3, 4, 6), *QKV[1:]], (), {}, {}),
    "attention of one query": ([(2, 1, 4, 6), *QKV[1:]], (), {"mask": torch.arange(5)[None, None, None] != 1}, {}),
    "attention with a bias": ([(2, 1, 4, 6), *QKV[1:]], (), {"mask": torch.arange(5.0)[None, None, None] % 3}, {}),
    "linear_cross_entropy": ([(7, 6), (11, 6)], (LABELS,), {}, {"chunk_size": 3}),
    "linear_logps": ([(7, 6), (11, 6)], (LABELS,), {"temperature": 0.7}, {"chunk_size": 3}),
    "linear_logps and entropy": (
        [(7, 6), (11, 6)],
        (LABELS,),
        {"temperature": 0.7, "with_entropy": True},
        {"chunk_size": 3},
    ),
}


def teachers(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Two, of other widths than the student and than each other, for 7 tokens and 11 words."""
    pairs = ((normal(7, d, seed=d, dtype=dtype), normal(11, d, seed=d + 1, dtype=dtype)) for d in (5, 4))
    return [(hidden.detach(), weight.detach()) for hidden, weight in pairs]


MASK = torch.tensor([1, 1, 0, 1, 0, 1, 1])
SHARES = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
SHARES = SHARES / SHARES.sum(-1, keepdim=True)
STORED = kernels.linear_top_k(teachers()[:1], 3, temperature=0.7)
for _kind in kernels.DIVERGENCES:
    _of = {"kind": _kind, "skew": 0.3, "temperature": 0.7}
    _one = ([(7, 6), (11, 6)], (teachers()[:1], MASK), _of, {"chunk_size": 3})
    CASES[f"linear_divergence {_kind}"] = _one
    CASES[f"linear_divergence {_kind} of two"] = (_one[0], (teachers(), MASK), {**_of, "mixture": SHARES}, _one[3])
    CASES[f"linear_divergence {_kind} stored"] = (_one[0], (STORED, MASK), _of, _one[3])
ONCE = [name for name in CASES if name.startswith(("linear_cross_entropy", "linear_divergence"))]  # backward, no twice


def run_case(name: str, dtype: torch.dtype, reference: bool) -> tuple[Tensor | tuple[Tensor, ...], list[Tensor]]:
    shapes, rest, options, own = CASES[name]
    inputs = [normal(*shape, seed=i, dtype=torch.bfloat16).detach().to(dtype).requires_grad_()
              for i, shape in enumerate(shapes)]  # fmt: skip
    rest = [x.to(torch.float32) if dtype == torch.bfloat16 and torch.is_tensor(x) and x.is_floating_point() else x
            for x in rest]  # fmt: skip
    function = getattr(kernels, name.split()[0] + "_reference" * reference)
    return function(*inputs, *rest, **options, **({} if reference else own)), inputs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name, dtype, tolerance):
    """Value and gradient; in bfloat16 against the reference in float64 on the same numbers."""
    ours, inputs = run_case(name, dtype, reference=False)
    wanted, exact_inputs = run_case(name, torch.float64, reference=True)
    for found, want in zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, wanted)), strict=True):
        assert found.dtype == (torch.promote_types(dtype, torch.float32) if "linear" in name else dtype)
        close(found, want, tolerance)
    for found, want, x in zip(gradients(ours, inputs), gradients(wanted, exact_inputs), inputs, strict=True):
        assert found.dtype == x.dtype
        close(found, want, tolerance)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {*ONCE}))
def test_gradcheck(name):
    """The closed-form backwards against finite differences."""
    shapes, rest, options, own = CASES[name]
    kernel = getattr(kernels, name.split()[0])
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *x: kernel(*x, *rest, **options, **own), inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Elementwise kernels against loops


@pytest.mark.parametrize("with_gradient", [True, False])
def test_rms_norm_value(with_gradient):
    x, weight = normal(3, 8).detach(), normal(8, seed=1).detach()
    with torch.set_grad_enabled(with_gradient):
        found = rms_norm(x, weight, EPS)
    for row, out in zip(x, found, strict=True):
        rms = math.sqrt(sum(float(v) ** 2 for v in row) / 8 + EPS)
        close(out, torch.stack([v / rms * w for v, w in zip(row, weight, strict=True)]), 1e-14)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_rms_norm_statistics_are_fp32(with_gradient):
    x = torch.full((1, 4096), 1e4, dtype=torch.float16)  # the squares overflow in half precision
    with torch.set_grad_enabled(with_gradient):
        found = rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5)
    assert found.dtype == x.dtype
    close(found, torch.ones(1, 4096), 1e-3)


def test_rms_norm_skips_gradients_nobody_wants():
    x, weight = normal(3, 8), normal(8, seed=1)
    for wanted in (x, weight):
        alone = [v.detach().requires_grad_(v is wanted) for v in (x, weight)]
        rms_norm(*alone, EPS).sum().backward()
        both = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), wanted)[0]
        assert [v.grad is None for v in alone] == [x is not wanted, weight is not wanted]
        torch.testing.assert_close(next(v.grad for v in alone if v.grad is not None), both)


def test_add_rms_norm_returns_the_sum_too():
    x, residual, weight = normal(3, 8).detach(), normal(3, 8, seed=1).detach(), normal(8, seed=2).detach()
    normed, total = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, EPS))


def test_rotary_is_a_complex_rotation():
    """20 positions: at position 0 every layout of the pairs agrees."""
    x = normal(2, 20, 3, 8).detach()
    angles = torch.arange(20)[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    both = torch.cat((angles, angles), -1)[None]
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[None, :, None]
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            close(rotary(x, both.cos(), both.sin()), torch.cat((pairs.real, pairs.imag), -1), 1e-14)


def test_rotary_takes_angles_by_row():
    x, angles = normal(2, 5, 3, 6).detach(), torch.stack((ANGLES[0], ANGLES[0] + 1))
    each = [rotary(x[i : i + 1], a.cos(), a.sin()) for i, a in enumerate(angles.split(1))]
    torch.testing.assert_close(rotary(x, angles.cos(), angles.sin()), torch.cat(each))


def test_swiglu_value():
    gate_up = normal(3, 8).detach()
    for row, out in zip(gate_up.tolist(), swiglu(gate_up), strict=True):
        want = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(row[:4], row[4:], strict=True)]
        close(out, torch.tensor(want, dtype=torch.float64), 1e-14)


def test_denormals_are_flushed():
    assert (torch.tensor([1e-39]) * 0.5).item() == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def brute_force(q: Tensor, k: Tensor, v: Tensor, sees) -> Tensor:
    """softmax(q k / sqrt(d)) v, one query and head at a time; sees(row, query, key) says what it attends to."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            shared = h // (q.shape[2] // k.shape[2])
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if sees(b, i, j)]
                scores = torch.stack([q[b, i, h] @ k[b, j, shared] for j in keys]) / math.sqrt(q.shape[3])
                exps = (scores - scores.max()).exp()
                out[b, i, h] = sum(e / exps.sum() * v[b, j, shared] for e, j in zip(exps, keys, strict=True))
    return out


def qkv(queries: int = 6, keys: int = 6) -> list[Tensor]:
    shapes = [(2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 3)]
    return [normal(*shape, seed=i).detach() for i, shape in enumerate(shapes)]


def test_attention_causal():
    q, k, v = qkv()
    close(attention(q, k, v), brute_force(q, k, v, lambda b, i, j: j <= i), 1e-13)


@pytest.mark.parametrize("queries", [1, 4])
def test_attention_queries_are_the_last_positions(queries):
    q, k, v = qkv(queries)
    close(attention(q, k, v), brute_force(q, k, v, lambda b, i, j: j <= i + 6 - queries), 1e-13)


def test_attention_over_documents():
    q, k, v = qkv()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [3, 4, 4, 4, 4, 7]])
    want = brute_force(q, k, v, lambda b, i, j: j <= i and bool(documents[b, i] == documents[b, j]))
    close(attention(q, k, v, documents=documents), want, 1e-13)
    close(attention(q, k, v, mask=document_mask(documents)), want, 1e-13)


def test_attention_over_documents_equals_rows_alone():
    q, k, v = (x[:1] for x in qkv())
    packed = attention(q, k, v, documents=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    alone = [attention(*(x[:, part] for x in (q, k, v))) for part in (slice(0, 2), slice(2, 6))]
    close(packed, torch.cat(alone, dim=1), 1e-13)


def test_attention_is_deaf_to_other_documents_and_the_future():
    """Poison, not NaN: a weight of exactly 0 times NaN is NaN in every implementation."""
    q, k, v = qkv()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    want = attention(q, k, v, documents=documents)
    for position, heard in ((1, [1, 2]), (4, [4, 5])):
        k2, v2 = k.clone(), v.clone()
        k2[:, position], v2[:, position] = 1e6, -1e6
        same = (attention(q, k2, v2, documents=documents) == want).all(-1).all(-1).all(0)
        assert same.tolist() == [i not in heard for i in range(6)]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kernel", [attention, kernels.attention_reference])
def test_attention_with_the_mask_of_a_cache(queries, kernel):
    """A mask replaces causality, as a bool or added to the scores; rows differ in what they may see."""
    q, k, v = qkv(queries)
    mask = torch.rand(2, 1, queries, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 2] = True
    wanted = brute_force(q, k, v, lambda b, i, j: bool(mask[b, 0, i, j]))
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    for either in (mask, bias):
        close(kernel(q, k, v, mask=either), wanted, 1e-13)
    if queries == 1 and kernel is attention:
        close(kernel(q, k, v, mask=bias.repeat(1, k.shape[2], 1, 1)), wanted, 1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# Losses over the vocabulary


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """13 tokens, of which 4 are ignored, width 5, 17 words."""
    labels = integers(17, 13)
    labels[[0, 4, 5, 12]] = IGNORED
    return normal(13, 5, dtype=dtype), normal(17, 5, seed=1, dtype=dtype), labels


def brute_force_logps(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> list[list[float]]:
    """log p of every word after every token."""
    logits = [[sum(a * b for a, b in zip(h, w, strict=True)) / temperature for w in weight.tolist()]
              for h in hidden.tolist()]  # fmt: skip
    return [[z - math.log(sum(math.exp(y) for y in row)) for z in row] for row in logits]


def test_linear_cross_entropy_value():
    hidden, weight, labels = problem()
    logps = brute_force_logps(hidden, weight)
    want = -sum(row[label] for row, label in zip(logps, labels.tolist(), strict=True) if label != IGNORED)
    assert linear_cross_entropy(hidden, weight, labels, chunk_size=4).item() == pytest.approx(want, rel=1e-12)


def test_linear_logps_and_entropy_value():
    hidden, weight, labels = problem()
    logps, entropy = linear_logps(hidden, weight, labels, temperature=0.6, with_entropy=True, chunk_size=4)
    for i, row in enumerate(brute_force_logps(hidden, weight, 0.6)):
        kept = labels[i] != IGNORED
        assert logps[i].item() == pytest.approx(row[labels[i]] if kept else 0.0, rel=1e-12)
        assert entropy[i].item() == pytest.approx(-sum(math.exp(z) * z for z in row) if kept else 0.0, rel=1e-12)


def both_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None = None) -> list[Tensor]:
    logps, entropy = linear_logps(hidden, weight, labels, temperature=0.6, with_entropy=True, chunk_size=chunk_size)
    return [linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size), logps, entropy]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9, 13, 1000])
def test_chunks_do_not_matter(chunk_size):
    hidden, weight, labels = problem()
    want, found = both_losses(hidden, weight, labels), both_losses(hidden, weight, labels, chunk_size)
    for a, b in zip(want, found, strict=True):
        close(a, b, 1e-13)
        for d, e in zip(gradients(a, [hidden, weight]), gradients(b, [hidden, weight]), strict=True):
            close(d, e, 1e-13)


def test_ignored_rows_may_hold_anything():
    hidden, weight, labels = problem()
    poisoned = hidden.detach().clone()
    poisoned[labels == IGNORED] = torch.nan
    poisoned.requires_grad_()
    for want, found in zip(both_losses(hidden, weight, labels), both_losses(poisoned, weight, labels), strict=True):
        assert torch.equal(want, found)
        d_hidden, d_weight = gradients(found, [poisoned, weight])
        for d, e in zip(gradients(want, [hidden, weight]), (d_hidden, d_weight), strict=True):
            assert torch.equal(d, e)
        assert ((d_hidden != 0).all(-1) == (labels != IGNORED)).all()


def test_all_rows_ignored():
    hidden, weight, _ = problem()
    for loss in both_losses(hidden, weight, torch.full((13,), IGNORED)):
        assert (loss == 0).all()
        assert all((d == 0).all() for d in gradients(loss, [hidden, weight]))


@pytest.mark.parametrize("label", [17, 18, -1, -99, -101])
def test_label_outside_the_vocabulary(label):
    hidden, weight, labels = problem()
    labels[3] = label
    for loss in (linear_cross_entropy, linear_logps):
        with pytest.raises(ValueError, match=rf"label {label} .*\[0, 17\)"):
            loss(hidden, weight, labels)


def test_shapes_that_do_not_fit():
    hidden, weight, labels = problem()
    for loss in (linear_cross_entropy, linear_logps):
        with pytest.raises(ValueError, match="expected"):
            loss(hidden, weight, labels[1:])
        with pytest.raises(ValueError, match="expected"):
            loss(hidden, weight[:, 1:], labels)


def test_uniform_model():
    """Known values: ln V a token, entropy ln V, and at the optimum of the entropy its gradient is zero."""
    hidden, weight, labels = normal(6, 5), torch.zeros(17, 5, dtype=torch.float64, requires_grad=True), integers(17, 6)
    logps, entropy = linear_logps(hidden, weight, labels, with_entropy=True)
    assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(6 * math.log(17))
    torch.testing.assert_close(logps, torch.full_like(logps, -math.log(17)))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(17)))
    assert gradients(entropy, [weight])[0].abs().max() < 1e-15


def test_extreme_logits_stay_finite():
    """The label's probability underflows in fp32; its logarithm and the gradients do not care."""
    hidden, weight, labels = problem(torch.float32)
    kept, exact = labels != IGNORED, ((hidden * 200).double(), weight.double(), labels)
    wanted = kernels.linear_logps_reference(exact[0][kept], exact[1], labels[kept], temperature=0.6, with_entropy=True)
    wanted = [torch.zeros(13).double().masked_scatter(kept, x) for x in wanted]
    assert wanted[0].min() < math.log(torch.finfo(torch.float32).tiny)
    wanted = [kernels.linear_cross_entropy_reference(*exact), *wanted]
    for found, want in zip(both_losses(hidden * 200, weight, labels), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)  # the entropy is 0 but for 1e-50
        assert all(d.isfinite().all() for d in gradients(found, [hidden, weight]))


def test_tied_weight():
    """The head is the embedding: its gradient is the sum of both uses."""
    _, weight, labels = problem()
    ids = integers(17, 13, seed=3)

    def grad(cross_entropy) -> Tensor:
        return torch.autograd.grad(cross_entropy(F.embedding(ids, weight).tanh(), weight, labels), weight)[0]

    close(grad(linear_cross_entropy), grad(kernels.linear_cross_entropy_reference), 1e-13)
    want = grad(lambda *x: -kernels.linear_logps_reference(*x[:2], labels.clamp(0))[labels != IGNORED].sum())
    close(grad(lambda *x: -linear_logps(*x).sum()), want, 1e-13)


def test_gradient_is_scaled_by_what_comes_down():
    hidden, weight, labels = problem()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    scaled = torch.autograd.grad(-2.5 * linear_cross_entropy(hidden, weight, labels), [hidden, weight])
    for a, b in zip(once, scaled, strict=True):
        close(b, -2.5 * a, 1e-14)


def test_each_output_alone_and_twice():
    """A loss may use only the log-probs, only the entropy, or go backward twice."""
    hidden, weight, labels = problem()
    logps, entropy = both_losses(hidden, weight, labels)[1:]
    alone = [torch.autograd.grad(x.sum(), [hidden, weight], retain_graph=True) for x in (logps, entropy)]
    both = torch.autograd.grad(logps.sum() + entropy.sum(), [hidden, weight])
    for a, b, c in zip(*alone, both, strict=True):
        close(a + b, c, 1e-12)


def test_cross_entropy_refuses_a_second_backward():
    loss = linear_cross_entropy(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        loss.backward()


@pytest.mark.parametrize("loss", [linear_cross_entropy, lambda *x: linear_logps(*x).sum()])
def test_frozen_parts_cost_no_product(loss):
    """Without a gradient for the weight (LoRA) or for the hidden states (a probe) the same product is not computed."""
    hidden, weight, labels = problem()
    want = torch.autograd.grad(loss(hidden, weight, labels), [hidden, weight])
    counts = []
    for frozen in (None, 0, 1):
        inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        with Watch() as watch:
            loss(*inputs, labels).backward()
        counts.append(watch.products)
        for x, d in zip(inputs, want, strict=True):
            assert x.grad is None if not x.requires_grad else torch.allclose(x.grad, d, rtol=1e-12)
    assert counts[1] == counts[2] == counts[0] - 1


def test_no_gradient_no_cost():
    hidden, weight, labels = problem()
    want = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad(), Watch() as watch:
        found = linear_cross_entropy(hidden, weight, labels)
    assert watch.products == 1
    assert not found.requires_grad
    close(found, want, 1e-13)


class Watch(TorchDispatchMode):
    """Counts matrix products, notes their dtypes and the largest tensor made meanwhile."""

    def __init__(self):
        super().__init__()
        self.products, self.dtypes, self.largest = 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
            self.dtypes.add(args[-1].dtype)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("loss", [linear_cross_entropy, lambda *x, **y: linear_logps(*x, **y).sum()])
def test_all_logits_never_exist(loss):
    """300 tokens x 200 words in chunks of 16: nothing larger than the weight (200 x 8) or a chunk's logits is made."""
    hidden, weight, labels = normal(300, 8), normal(200, 8, seed=1), integers(200, 300)
    with Watch() as watch:
        loss(hidden, weight, labels, chunk_size=16).backward()
    assert watch.largest <= 16 * 200


def test_default_chunk_bounds_the_logits():
    for words in (50, 1000, 32000, 151936):
        size = kernels._chunk_size(torch.empty(words, 1))
        assert size >= 128 and (size * words <= 2**23 or size == 128)


@pytest.mark.parametrize("loss", [linear_cross_entropy, lambda *x, **y: linear_logps(*x, **y).sum()])
def test_autocast(loss):
    """Products in bfloat16; loss, log-softmax and the sum over chunks that is the weight's gradient in fp32."""
    hidden, weight = normal(512, 16, dtype=torch.float32), normal(40, 16, seed=1, dtype=torch.float32)
    labels = integers(40, 512)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        total = loss(hidden, weight, labels, chunk_size=8)
    with watch:
        total.backward()
    assert watch.dtypes == {torch.bfloat16}
    assert total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = [hidden.detach().bfloat16().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()]
    want = kernels.linear_cross_entropy_reference(*exact, labels)
    close(total.abs(), want, 1e-3)
    for x, d in zip((hidden, weight), torch.autograd.grad(want, exact), strict=True):
        close(x.grad.abs(), d.abs(), 0.01)
    # 64 partial sums of a rounded total would be off by several per cent of a bfloat16's last place
    rounded = weight.grad.bfloat16().float()
    assert not torch.equal(rounded, weight.grad)


def test_any_leading_shape():
    hidden, weight, labels = normal(2, 3, 5), normal(17, 5, seed=1), integers(17, 2, 3)
    flat = linear_logps(hidden.flatten(0, 1), weight, labels.flatten())
    assert torch.equal(linear_logps(hidden, weight, labels), flat.view(2, 3))
    loss = linear_cross_entropy(hidden, weight, labels)
    close(loss, -linear_logps(hidden, weight, labels).sum(), 1e-14)
    assert gradients(loss, [hidden])[0].shape == hidden.shape


# ----------------------------------------------------------------------------------------------------------------------
# A frozen matrix with a low-rank one beside it, and four bits a weight

SPANS = ((1, 4), (6, 8))  # of 9 outputs: a row before them, two between, one behind


def low_rank(dtype: torch.dtype = torch.float64, bias: bool = True, dropped: bool = False) -> dict[str, Tensor]:
    """What lora_linear takes, the frozen ones without gradient; ranks of 3, spans of 3 and 2 rows."""
    shapes = {"x": (2, 4, 7), "weight": (9, 7), "bias": (9,), "down": (6, 7), "up": (5, 3), "dropped": (2, 4, 7)}
    made = {name: normal(*shape, seed=i, dtype=torch.bfloat16).detach().to(dtype)
            for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip
    made |= {"bias": made["bias"] if bias else None, "dropped": made["dropped"] if dropped else None}
    for name in ("x", "down", "up", "dropped"):
        if made[name] is not None:
            made[name].requires_grad_()
    return made


def lora_of(function, t: dict[str, Tensor], weight=None) -> tuple[Tensor, list[Tensor]]:
    """The output, and what has a gradient; scale 0.4."""
    y = function(t["x"], weight or t["weight"], t["bias"], t["down"], t["up"], SPANS, 0.4, t["dropped"])
    return y, [x for x in t.values() if x is not None and x.requires_grad]


LORA = pytest.mark.parametrize(("bias", "dropped"), [(True, False), (False, True), (True, True), (False, False)])


@LORA
def test_lora_linear_value(bias, dropped):
    """One number at a time; kernel and reference; no input is changed."""
    t = low_rank(bias=bias, dropped=dropped)
    before = {name: x.clone() for name, x in t.items() if x is not None}
    found, reference = lora_of(kernels.lora_linear, t)[0], lora_of(kernels.lora_linear_reference, t)[0]
    seen = t["x"] if t["dropped"] is None else t["dropped"]
    for b in range(2):
        for i in range(4):
            for o in range(9):
                wanted = sum(t["weight"][o, j] * t["x"][b, i, j] for j in range(7)) + (t["bias"][o] if bias else 0.0)
                p, row = {1: (0, 0), 2: (0, 1), 3: (0, 2), 6: (1, 3), 7: (1, 4)}.get(o, (None, None))
                for r in range(3 if p is not None else 0):
                    h = sum(t["down"][3 * p + r, j] * seen[b, i, j] for j in range(7))
                    wanted = wanted + 0.4 * t["up"][row, r] * h
                assert found[b, i, o].item() == pytest.approx(wanted.item(), rel=1e-11, abs=1e-12)
    close(reference, found, 1e-13)
    assert all(torch.equal(x, before[name]) for name, x in t.items() if x is not None)


@LORA
@pytest.mark.parametrize("made_anew", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_lora_linear_equals_reference(dtype, tolerance, made_anew, bias, dropped):
    """Value and gradient; in bfloat16 against the reference in float64 on the same numbers."""
    t, exact = low_rank(dtype, bias, dropped), low_rank(torch.float64, bias, dropped)
    ours, inputs = lora_of(kernels.lora_linear, t, (lambda: t["weight"].clone()) if made_anew else None)
    wanted, exact_inputs = lora_of(kernels.lora_linear_reference, exact)
    assert ours.dtype == dtype and len(inputs) == 3 + dropped
    close(ours, wanted, tolerance)
    for found, want in zip(gradients(ours, inputs), gradients(wanted, exact_inputs), strict=True):
        assert found.dtype == dtype
        close(found, want, tolerance)


@LORA
def test_gradcheck_of_lora_linear(bias, dropped):
    t = low_rank(bias=bias, dropped=dropped)
    names = [name for name, x in t.items() if x is not None and x.requires_grad]

    def kernel(*inputs: Tensor) -> Tensor:
        return lora_of(kernels.lora_linear, t | dict(zip(names, inputs, strict=True)))[0]

    assert torch.autograd.gradcheck(kernel, [t[name] for name in names])


def test_lora_linear_without_factors():
    """What a quantized matrix that is not adapted does: a plain product, whose weight is not kept."""
    t = low_rank()
    nothing = t["x"].new_zeros(0, 7), t["x"].new_zeros(0, 1)
    for function in (kernels.lora_linear, kernels.lora_linear_reference):
        y = function(t["x"], lambda: t["weight"].clone(), t["bias"], *nothing, (), 0.0)
        close(y, F.linear(t["x"], t["weight"], t["bias"]), 1e-13)
        close(*gradients(y, [t["x"]]), gradients(F.linear(t["x"], t["weight"]), [t["x"]])[0], 1e-13)


def test_nothing_is_computed_for_the_frozen_weight():
    """Products: W x, A x and a B each; back one for x, two a B, one for A, and A's part of the gradient of x."""
    for dropped in (False, True):
        t = low_rank(bias=False, dropped=dropped)
        with Watch() as watch:
            y, _ = lora_of(kernels.lora_linear, t)
        assert watch.products == 2 + 2
        with Watch() as watch:
            y.sum().backward()
        assert watch.products == 1 + 4 + 1 + 1
    t = low_rank(bias=False)
    t["x"].requires_grad_(False)  # as that of the first block is, on frozen embeddings
    y, _ = lora_of(kernels.lora_linear, t)
    with Watch() as watch:
        y.sum().backward()
    assert watch.products == 4 + 1 and t["x"].grad is None
    t = low_rank(bias=False, dropped=True)
    t["dropped"].requires_grad_(False)
    y, _ = lora_of(kernels.lora_linear, t)
    with Watch() as watch:
        y.sum().backward()
    assert watch.products == 1 + 4 + 1


def test_a_weight_that_is_made_anew_is_not_kept():
    """Once in the forward, once in the backward if x wants a gradient; between them nothing of its shape is there."""
    made = []
    for wanted in (True, False):
        t = low_rank(dropped=True)
        t["x"].requires_grad_(wanted)

        def weight(t=t) -> Tensor:
            made.append(weakref.ref(fresh := t["weight"].clone()))
            return fresh

        made.clear()
        y, _ = lora_of(kernels.lora_linear, t, weight)
        assert len(made) == 1 and made[0]() is None
        y.sum().backward()
        assert len(made) == 1 + wanted


@LORA
def test_lora_linear_under_autocast(bias, dropped):
    """Products in bfloat16 and so is what comes out; gradients of fp32 inputs are fp32; float64 stays."""
    t, exact = low_rank(torch.float32, bias, dropped), low_rank(torch.float64, bias, dropped)
    wanted, exact_inputs = lora_of(kernels.lora_linear_reference, exact)
    d_wanted = gradients(wanted, exact_inputs)
    for weight in (None, lambda: t["weight"].clone()):
        with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
            y, inputs = lora_of(kernels.lora_linear, t, weight)
            reference = lora_of(kernels.lora_linear_reference, t, weight)[0]
            assert lora_of(kernels.lora_linear, exact)[0].dtype == torch.float64
        assert y.dtype == reference.dtype == torch.bfloat16
        close(y, wanted, 0.02)
        with Watch() as watch:
            found = gradients(y, inputs)
        assert watch.dtypes == {torch.bfloat16}
        for d, want in zip(found, d_wanted, strict=True):
            assert d.dtype == torch.float32
            close(d, want, 0.02)


PAPERS_LEVELS = [  # 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_levels_of_nf4_are_those_of_the_paper():
    levels = kernels.nf4_levels()
    torch.testing.assert_close(levels, torch.tensor(PAPERS_LEVELS), atol=2e-7, rtol=0)
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1 and levels.dtype == torch.float32


def test_what_is_kept_while_generating_serves_training():
    kernels.nf4_levels.cache_clear()
    kernels.rotation.cache_clear()
    x = torch.randn(2, 24, requires_grad=True)
    with torch.inference_mode():
        levels, rotated = kernels.nf4_levels()[:2, None], kernels.rotate(x, 5)
    assert torch.equal(kernels.rotate(x, 5), rotated)
    (kernels.rotate(x, 5) * kernels.nf4_levels()[:2, None]).sum().backward()
    torch.testing.assert_close(x.grad, kernels.rotate(levels.expand(2, 24).clone(), 5, back=True))


def matrix(*shape: int) -> Tensor:
    """Blocks of very different sizes, as outliers make them, more of them than share a step."""
    weight = normal(*shape, dtype=torch.float32).detach()
    return weight * normal(shape[0], *[1] * (len(shape) - 1), seed=1, dtype=torch.float32).detach().exp()


@pytest.mark.parametrize("shape", [(130, 130), (3, 5, 7), (64,), (1, 1), (2, 97)])
def test_nf4_by_brute_force(shape):
    """Blocks of 64, the last filled up with zeros; a step for 256 of their sizes; nearest levels; high half first."""
    weight = matrix(*shape)
    q, flat = kernels.nf4_quantize(weight), weight.flatten().tolist()
    n = -(-len(flat) // 64)
    blocks = [(flat + [0.0] * 63)[64 * i : 64 * i + 64] for i in range(n)]
    largest = [max(map(abs, block)) for block in blocks]
    mean = sum(largest) / n
    assert q.codes.dtype == torch.uint8 and q.scales.dtype == torch.int8 and q.shape == shape
    assert len(q.codes) == 32 * n and len(q.scales) == n and len(q.steps) == -(-n // 256)
    assert q.mean.item() == pytest.approx(mean, rel=1e-6)
    values, sizes = kernels.nf4_dequantize(q), []
    for i in range(n):
        group = largest[i // 256 * 256 : i // 256 * 256 + 256]
        step = max(abs(x - mean) for x in group)
        assert q.steps[i // 256].item() == pytest.approx(step, rel=1e-4, abs=1e-6)
        wanted = (largest[i] - mean) / step * 127 if n > 1 else 0.0
        assert abs(q.scales[i].item() - wanted) <= 0.51
        sizes.append(q.mean.item() + q.scales[i].item() * q.steps[i // 256].item() / 127)
        assert abs(sizes[i] - largest[i]) <= 0.51 * step / 127 + 1e-6 * mean
    assert values.shape == shape and values.dtype == torch.float32
    for i, (w, value) in enumerate(zip(flat, values.flatten().tolist(), strict=True)):
        byte = int(q.codes[i // 2])
        code, size = (byte >> 4, byte & 15)[i % 2], sizes[i // 64]
        assert value == pytest.approx(PAPERS_LEVELS[code] * size, rel=1e-5, abs=1e-7)
        if size > 0:
            assert abs(w - value) <= min(abs(w - level * size) for level in PAPERS_LEVELS) + 1e-5 * size


def test_nf4_of_normal_weights():
    """As near as 16 levels come: an error of a tenth; 4.13 bits a weight, all that is stored counted."""
    weight = normal(512, 512, dtype=torch.float32).detach()
    q = kernels.nf4_quantize(weight)
    error = (kernels.nf4_dequantize(q) - weight).norm() / weight.norm()
    assert error < 0.1
    assert 8 * sum(t.numel() * t.element_size() for t in q[:4]) / weight.numel() == pytest.approx(4.127, abs=1e-3)
    narrow = kernels.nf4_dequantize(q, torch.bfloat16)
    assert torch.equal(narrow, kernels.nf4_dequantize(q).bfloat16())
    close(kernels.nf4_dequantize(kernels.nf4_quantize(weight.bfloat16())), weight, 0.3)


def test_nf4_of_zeros_and_of_one_sign():
    weight = matrix(8, 64)
    weight[3], weight[4], weight[5] = 0.0, weight[4].abs(), -weight[5].abs()
    found = kernels.nf4_dequantize(kernels.nf4_quantize(weight))
    assert (found[3] == 0).all() and (found[4] >= 0).all() and (found[5] <= 0).all() and found.isfinite().all()
    for row, w in zip(found[[0, 1, 4, 5]], weight[[0, 1, 4, 5]], strict=True):
        assert row.abs()[w.abs().argmax()] == row.abs().max() > 0
    nothing = kernels.nf4_quantize(torch.zeros(3, 50))
    assert (kernels.nf4_dequantize(nothing) == 0).all() and (nothing.codes == 0x77).all()  # the place of 0, twice
    one = kernels.nf4_quantize(torch.full((64,), -2.5))  # one block: its size is the mean
    assert (kernels.nf4_dequantize(one) == -2.5).all()


def test_a_block_of_nf4_knows_nothing_of_the_others():
    """Other small weights in block 5, whose largest stays: only its bytes change."""
    weight = matrix(20, 64)
    other = weight.clone()
    small = weight[5].abs() < 0.9 * weight[5].abs().max()
    other[5, small] = -0.7 * weight[5, small]
    a, b = kernels.nf4_quantize(weight), kernels.nf4_quantize(other)
    same = (a.codes == b.codes).view(20, 32).all(-1)
    assert same.tolist() == [i != 5 for i in range(20)]
    assert all(torch.equal(x, y) for x, y in zip(a[1:4], b[1:4], strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Divergences over the vocabulary


def divergence_of(p: list[float], q: list[float], kind: str, s: float) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def mix(a: list[float], b: list[float], share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    match kind:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            return s * kl(p, mix(p, q, s)) + (1 - s) * kl(q, mix(p, q, s))
        case "skew_kl":
            return kl(p, mix(p, q, s))
        case "skew_reverse_kl":
            return kl(q, mix(q, p, s))
        case "tvd":
            return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def student() -> tuple[Tensor, Tensor]:
    return normal(7, 6), normal(11, 6, seed=1)


def divergence(hidden: Tensor, weight: Tensor, said=None, mask: Tensor = MASK, **changes) -> Tensor:
    options = {"kind": "jsd", "skew": 0.3, "temperature": 0.7} | changes
    return kernels.linear_divergence(hidden, weight, teachers()[:1] if said is None else said, mask, **options)


def probs_of(hidden: Tensor, weight: Tensor, temperature: float) -> list[list[float]]:
    return [[math.exp(x) for x in row] for row in brute_force_logps(hidden, weight, temperature)]


@pytest.mark.parametrize("function", [kernels.linear_divergence, kernels.linear_divergence_reference])
@pytest.mark.parametrize("kind", kernels.DIVERGENCES)
def test_linear_divergence_value(kind, function):
    """The sum over the tokens that count, in loops; at temperature 1 and 0.7; with two teachers, with buckets."""
    hidden, weight = student()
    for temperature in (1.0, 0.7):
        options = {"kind": kind, "skew": 0.3, "temperature": temperature}
        q, first, second = (probs_of(*pair, temperature) for pair in ((hidden, weight), *teachers()))
        kept = [i for i in range(7) if MASK[i]]
        want = sum(divergence_of(first[i], q[i], kind, 0.3) for i in kept)
        assert function(hidden, weight, teachers()[:1], MASK, **options).item() == pytest.approx(want, rel=1e-11)
        for shares in (None, SHARES):
            of_first = [0.5] * 7 if shares is None else SHARES[:, 0].tolist()
            pairs = [zip(x, y, strict=True) for x, y in zip(first, second, strict=True)]
            p = [[a * x + (1 - a) * y for x, y in some] for a, some in zip(of_first, pairs, strict=True)]
            want = sum(divergence_of(p[i], q[i], kind, 0.3) for i in kept)
            found = function(hidden, weight, teachers(), MASK, **options, mixture=shares)
            assert found.item() == pytest.approx(want, rel=1e-11)
        want = 0.0
        for i in kept:
            best = sorted(range(11), key=lambda v, i=i: -first[i][v])[:3]
            p_kept, q_kept = ([of[i][v] for v in best] for of in (first, q))
            want += divergence_of([*p_kept, 1 - sum(p_kept)], [*q_kept, 1 - sum(q_kept)], kind, 0.3)
        stored = kernels.linear_top_k(teachers()[:1], 3, temperature=temperature)
        assert function(hidden, weight, stored, MASK, **options).item() == pytest.approx(want, rel=1e-9)


def test_divergences_know_their_sides():
    """By hand: p = (3/4, 1/4), q = (1/2, 1/2). Forward and reverse KL change places when the models do."""
    one = torch.ones(1, 1, dtype=torch.float64)
    p, q = (one, torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)), (one, torch.zeros(2, 1).double())
    forward, reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)

    def value(kind: str, student: tuple, teacher: tuple, skew: float = 0.5) -> float:
        options = {"kind": kind, "skew": skew, "temperature": 1.0}
        return kernels.linear_divergence(*student, [teacher], torch.ones(1), **options).item()

    assert value("forward_kl", q, p) == pytest.approx(forward) == pytest.approx(value("reverse_kl", p, q))
    assert value("reverse_kl", q, p) == pytest.approx(reverse) == pytest.approx(value("forward_kl", p, q))
    assert forward != pytest.approx(reverse, rel=0.05)
    assert value("tvd", q, p) == pytest.approx(0.25)
    assert value("jsd", q, p) == pytest.approx(value("jsd", p, q))  # with b = 1/2
    assert value("jsd", q, p, 0.2) != pytest.approx(value("jsd", p, q, 0.2), rel=1e-3)
    assert value("jsd", q, p, 1e-5) / 1e-5 == pytest.approx(forward, rel=1e-3)  # GKD: b to 0 is forward KL, over b
    for kind, limit in (("skew_kl", forward), ("skew_reverse_kl", reverse)):
        assert value(kind, q, p, 1e-9) == pytest.approx(limit, rel=1e-6)
        assert 0 < value(kind, q, p, 0.3) < limit


@pytest.mark.parametrize("kind", kernels.DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    hidden, weight = student()
    loss = divergence(hidden, weight, [(hidden.detach(), weight.detach())], kind=kind)
    assert abs(loss.item()) < 1e-14
    assert all(d.abs().max() < 1e-14 for d in torch.autograd.grad(loss, [hidden, weight]))
    loss = divergence(hidden, weight, kind=kind)
    assert loss > 0.1 and all(d.abs().max() > 1e-3 for d in torch.autograd.grad(loss, [hidden, weight]))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 1000])
@pytest.mark.parametrize("said", [teachers(), STORED])
def test_chunks_of_a_divergence_do_not_matter(chunk_size, said):
    mixture = None if isinstance(said, kernels.TopK) else SHARES
    for kind in kernels.DIVERGENCES:
        found = []
        for size in (None, chunk_size):
            inputs = student()
            loss = divergence(*inputs, said, kind=kind, mixture=mixture, chunk_size=size)
            found.append((loss, *torch.autograd.grad(loss, inputs)))
        for a, b in zip(*found, strict=True):
            close(a, b, 1e-13)


def test_tokens_that_do_not_count_may_hold_anything():
    hidden, weight = student()
    dead = MASK == 0
    poisoned, said = hidden.detach().clone(), [(h.clone(), w) for h, w in teachers()]
    stored = kernels.TopK(*(x.clone() for x in STORED))
    for x in (poisoned, *(h for h, _ in said), stored.logps):
        x[dead] = torch.nan
    poisoned.requires_grad_()
    for a, b, mixture in ((said, teachers(), SHARES), (stored, STORED, None)):
        found, want = divergence(poisoned, weight, a, mixture=mixture), divergence(hidden, weight, b, mixture=mixture)
        assert torch.equal(found, want)
        d_hidden, d_weight = torch.autograd.grad(found, [poisoned, weight])
        for d, e in zip((d_hidden, d_weight), torch.autograd.grad(want, [hidden, weight]), strict=True):
            assert torch.equal(d, e)
        assert ((d_hidden != 0).all(-1) == ~dead).all()
    loss = divergence(hidden, weight, mask=torch.zeros(7))
    assert loss == 0 and all((d == 0).all() for d in torch.autograd.grad(loss, [hidden, weight]))


def test_what_is_stored_of_a_teacher():
    """The k most probable tokens and the rest, of one teacher and of a mixture, in any shape; chunks do not matter."""
    first, second = (torch.tensor(probs_of(*pair, 0.7)) for pair in teachers())
    for said, mixture, p in (
        (teachers()[:1], None, first),
        (teachers(), None, (first + second) / 2),
        (teachers(), SHARES, SHARES[:, :1] * first + SHARES[:, 1:] * second),
    ):
        best, ids = p.double().topk(4)
        for size in (None, 2):
            found = kernels.linear_top_k(said, 4, temperature=0.7, mixture=mixture, chunk_size=size)
            assert torch.equal(found.ids, ids)
            close(found.logps.exp(), torch.cat([best, 1 - best.sum(-1, keepdim=True)], dim=-1), 1e-6)
    h, w = teachers(torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):  # the products', not their sums'
        found, logits = kernels.linear_top_k([(h, w)], 4, temperature=1.0), kernels.linear_logits(h, w)
    wanted = h.bfloat16().double() @ w.bfloat16().double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-5)
    close(found.logps[..., :4], wanted.log_softmax(-1).topk(4).values, 1e-5)
    torch.testing.assert_close(kernels.linear_logits(h.double(), w.double()), h.double() @ w.double().T)
    folded = kernels.linear_top_k([(h.view(7, 1, -1), w) for h, w in teachers()], 4, temperature=0.7)
    assert folded.ids.shape == (7, 1, 4) and folded.logps.shape == (7, 1, 5)


@pytest.mark.parametrize("kind", kernels.DIVERGENCES)
def test_all_tokens_stored_are_the_whole_distribution(kind):
    """k = V: the bucket of the others is empty. Below it less is told, never more: the divergence grows with k."""
    hidden, weight = student()
    whole, values = divergence(hidden, weight, kind=kind), []
    for k in (1, 3, 6, 11):
        stored = kernels.linear_top_k(teachers()[:1], k, temperature=0.7)
        values.append(divergence(hidden, weight, stored, kind=kind))
    assert all(0 < a.item() <= b.item() + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[0] < 0.99 * whole
    close(values[-1], whole, 1e-12)
    for d, e in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (values[-1], whole)), strict=True):
        close(d, e, 1e-11)


def test_a_sure_teacher_is_stored_without_nan():
    """In fp32 the rest underflows: a teacher all but certain, a student that is certain of something else."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [200.0], [1.0]], requires_grad=True)
    stored = kernels.linear_top_k([(torch.ones(1, 1), torch.tensor([[300.0], [0.0], [0.0]]))], 1, temperature=1.0)
    for kind in kernels.DIVERGENCES:
        loss = divergence(hidden, weight, stored, torch.ones(1), kind=kind, temperature=1.0)
        assert loss.isfinite() and loss > 0.1
        assert all(d.isfinite().all() for d in torch.autograd.grad(loss, [hidden, weight]))


def test_a_mixture_of_one_teacher_is_that_teacher():
    hidden, weight = student()
    for k in (0, 1):
        shares = torch.zeros(7, 2, dtype=torch.float64)
        shares[:, k] = 1.0
        alone = divergence(hidden, weight, teachers()[k : k + 1])
        close(divergence(hidden, weight, teachers(), mixture=shares), alone, 1e-13)
    equal = divergence(hidden, weight, teachers(), mixture=torch.full_like(SHARES, 0.5))
    close(divergence(hidden, weight, teachers()), equal, 1e-13)


def test_a_divergence_takes_any_leading_shape():
    hidden, weight = student()
    folded = [(h.view(7, 1, -1), w) for h, w in teachers()]
    stored = kernels.TopK(*(x[:, None] for x in STORED))
    for said, other, mixture in ((folded, teachers(), SHARES), (stored, STORED, None)):
        found = divergence(hidden.view(7, 1, 6), weight, said, MASK[:, None],
                           mixture=None if mixture is None else mixture[:, None])  # fmt: skip
        close(found, divergence(hidden, weight, other, mixture=mixture), 1e-14)


def test_a_divergence_of_what_does_not_fit():
    hidden, weight = student()
    short, stored = [(h[1:], w) for h, w in teachers()], kernels.TopK(*(x[1:] for x in STORED))
    for wrong in ((hidden[1:], weight, None), (hidden, weight, short), (hidden, weight, stored)):
        with pytest.raises(ValueError, match="expected"):
            divergence(*wrong)
    with pytest.raises(ValueError, match=r"vocabularies of 11 and \[10, 10\] words"):
        divergence(hidden, weight, [(h, w[1:]) for h, w in teachers()])
    for kind, skew in (("jsd", 0.0), ("skew_kl", 1.0), ("skew_reverse_kl", -0.1)):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            kernels.linear_divergence(hidden, weight, teachers(), MASK, kind=kind, skew=skew)


def test_the_gradient_of_a_divergence_is_scaled_and_given_once():
    hidden, weight = student()
    once = torch.autograd.grad(divergence(hidden, weight), [hidden, weight])
    loss = divergence(hidden, weight)
    for a, b in zip(once, torch.autograd.grad(-2.5 * loss, [hidden, weight], retain_graph=True), strict=True):
        close(b, -2.5 * a, 1e-14)
    with pytest.raises(RuntimeError, match="ran already"):
        loss.backward()


def test_no_gradient_of_a_divergence_no_cost():
    """A product for each model, one more for each gradient that is wanted; none for a teacher, whatever it holds."""
    said = [(h.requires_grad_(), w.requires_grad_()) for h, w in teachers()]
    for frozen, products in ((None, 5), (0, 4), (1, 4), (2, 3)):
        inputs = [x.detach().requires_grad_(i != frozen and frozen != 2) for i, x in enumerate(student())]
        with Watch() as watch:
            loss = divergence(*inputs, said)
            if frozen != 2:
                loss.backward()
        assert watch.products == products and loss.requires_grad == (frozen != 2)
        assert [x.grad is not None for x in inputs] == [x.requires_grad for x in inputs]
    assert all(x.grad is None for pair in said for x in pair)
    with torch.no_grad(), Watch() as watch:
        assert not divergence(*student(), said).requires_grad
    assert watch.products == 3


def test_logits_of_neither_model_ever_exist():
    """300 tokens x 200 words in chunks of 16: nothing larger than a weight or a chunk's logits is made."""
    hidden, weight, said = normal(300, 8), normal(200, 8, seed=1), [(normal(300, 8, seed=2), normal(200, 8, seed=3))]
    with Watch() as watch:
        divergence(hidden, weight, said, torch.ones(300), chunk_size=16).backward()
        stored = kernels.linear_top_k(said, 2, temperature=1.0, chunk_size=16)
        divergence(hidden, weight, stored, torch.ones(300), chunk_size=16).backward()
    assert watch.largest <= 16 * 200


def test_a_divergence_under_autocast():
    """Products in bfloat16; the loss and the sum over chunks that is the weight's gradient in fp32."""
    inputs = [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(512, 8), (20, 8)] * 2)]
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        loss = divergence(*inputs[:2], [inputs[2:]], torch.ones(512), chunk_size=8)
        loss.backward()
    assert watch.dtypes == {torch.bfloat16} and loss.dtype == torch.float32 == inputs[1].grad.dtype
    exact = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    want = divergence(*exact[:2], [exact[2:]], torch.ones(512))
    close(loss, want, 1e-3)
    for x, d in zip(inputs, torch.autograd.grad(want, exact[:2]), strict=False):
        close(x.grad, d, 0.01)
    assert not torch.equal(inputs[1].grad.bfloat16().float(), inputs[1].grad)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling


@pytest.fixture
def compiling():
    if not kernels.use_compile(True):
        pytest.skip("no compiler on this machine")
    torch._dynamo.reset()
    kernels._compiled.cache_clear()
    yield
    kernels.use_compile(False)


def compiled_equals_eager(name: str) -> None:
    found, inputs = run_case(name, torch.float64, reference=False)
    d_found = gradients(found, inputs)
    kernels.use_compile(False)
    wanted, inputs = run_case(name, torch.float64, reference=False)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
        close(a, b, 1e-12)
    for a, b in zip(d_found, gradients(wanted, inputs), strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("name", ["swiglu", "linear_cross_entropy"])
def test_compiled_equals_eager(name, compiling):
    compiled_equals_eager(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_compiled_kernel_equals_eager(name, compiling):
    compiled_equals_eager(name)


@pytest.mark.slow
def test_compiled_lora_linear_equals_eager(compiling):
    """Inside a compiled block, as one graph: the reference, with a weight that is made anew."""
    t = low_rank(dropped=True)
    compiled = torch.compile(lambda: lora_of(kernels.lora_linear, t, lambda: 2 * t["weight"])[0], fullgraph=True)
    found, inputs = compiled(), [t[name] for name in ("x", "down", "up", "dropped")]
    d_found = gradients(found, inputs)
    kernels.use_compile(False)
    wanted = lora_of(kernels.lora_linear, t, lambda: 2 * t["weight"])[0]
    close(found, wanted, 1e-12)
    for a, b in zip(d_found, gradients(wanted, inputs), strict=True):
        close(a, b, 1e-12)


def test_one_graph_serves_every_number_of_tokens(compiling):
    """The last chunk is padded to the size of the others, so that 5, 7, 4 and 0 tokens need one compilation."""
    graphs = torch._dynamo.utils.counters["stats"]
    hidden, weight, labels = normal(7, 6), normal(11, 6, seed=1), LABELS
    before = graphs["unique_graphs"]
    for n in (5, 7, 4, 0):
        linear_cross_entropy(hidden[:n], weight, labels[:n], chunk_size=3).backward()
    assert graphs["unique_graphs"] == before + 1
    assert getattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)


def test_nothing_is_compiled_where_it_runs_eagerly(monkeypatch):
    """Neither kernels nor modules; the kernels are not their references; the switch is what it was, come what may."""
    monkeypatch.setattr(kernels, "_compiling", True)
    monkeypatch.setattr(kernels, "rms_norm_reference", None)
    doubled = torch.compile(lambda x: 2 * x, backend=lambda graph, inputs: pytest.fail("compiled"))
    with contextlib.suppress(KeyError), kernels.eager():
        close(rms_norm(torch.ones(3), torch.ones(3), 0.0), torch.ones(3), 1e-6)
        close(doubled(torch.ones(3)), torch.full((3,), 2.0), 0.0)
        raise KeyError
    assert kernels._compiling


@pytest.mark.gpu
@pytest.mark.parametrize("on", [False, True])
def test_gpu_equals_cpu(on):
    """In bfloat16 with fp32 sums from the tensor cores, and flex_attention over documents."""
    kernels.use_compile(on)
    hidden, weight = normal(300, 64, dtype=torch.bfloat16), normal(1000, 64, seed=1, dtype=torch.bfloat16, scale=0.1)
    labels, documents = integers(1000, 300), torch.arange(256)[None] // 100
    inputs = [normal(1, 256, heads, 64, seed=heads, dtype=torch.bfloat16) for heads in (4, 2, 2)]

    def run(device: str) -> list[tuple[Tensor, ...]]:
        loss = linear_cross_entropy(hidden.to(device), weight.to(device), labels.to(device), chunk_size=128)
        logps = linear_logps(hidden.to(device), weight.to(device), labels.to(device), with_entropy=True, chunk_size=128)
        heard = attention(*(x.to(device) for x in inputs), documents=documents.to(device))
        return [(loss, [hidden, weight]), (logps[0], [hidden, weight]), (logps[1], [hidden, weight]), (heard, inputs)]

    try:
        for (found, x), (wanted, y) in zip(run("cuda"), run("cpu"), strict=True):
            close(found.cpu(), wanted, 0.02)
            for a, b in zip(gradients(found, x), gradients(wanted, y), strict=True):
                close(a, b, 0.03)
    finally:
        kernels.use_compile(False)


def test_no_compiler_means_eager(monkeypatch, capsys):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    kernels._has_compiler.cache_clear()
    try:
        assert kernels.use_compile(True) is False
        assert capsys.readouterr().err.count("\n") == 1
        run_case("linear_cross_entropy", torch.float32, reference=False)
    finally:
        kernels._has_compiler.cache_clear()
        kernels.use_compile(False)


@pytest.mark.parametrize("there", [True, False])
def test_on_a_gpu_triton_is_the_compiler(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: there)
    assert kernels._has_compiler.__wrapped__() == there
