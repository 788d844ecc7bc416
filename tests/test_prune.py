"""prune.py: scores and masks by hand, SparseGPT by brute force, smaller models equal to larger ones with zeros."""

import copy
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loop as loop_module
import lora
import prune
import quantize
import sft
from data import chat, world
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop, RunFailed
from model import Config, Transformer, load, read_safetensors, save
from prune import METHODS, Units, keep
from quantize import Inputs, inverse_factor
from sft import collate
from tests.oracle import oracle
from tests.readme import variants_table

LLAMA = Config("llama", vocab_size=40, depth=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn_width=48, max_length=64,
               tied=False)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "qwen2": Config(**{**vars(LLAMA), "family": "qwen2", "qkv_bias": True, "tied": True, "kv_heads": 4}),
    "qwen3": Config(**{**vars(LLAMA), "family": "qwen3", "qk_norm": True, "head_dim": 16, "tied": True, "depth": 3}),
}
CPU = torch.device("cpu")


def random_net(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    net = Transformer(FAMILIES[family]).to(dtype)
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return net


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows_of(n: int = 12, seed: int = 0) -> list[chat.Row]:
    """Rows of 3 to 17 random tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 18, (n,), generator=g).tolist()
    return [chat.Row(torch.randint(1, 40, (k,), generator=g).tolist(), [0] + [1] * (k - 1)) for k in lengths]


def batches_of(rows: list[chat.Row]) -> list:
    """Two rows packed behind each other in each of two, padding at the end."""
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    return [collate(groups[i : i + 2], CPU, with_documents=True) for i in range(0, len(groups), 2)]


def flags(method: str, *more: object) -> Namespace:
    return prune.get_args(["--method", method, *map(str, more)])


def applied(net: Transformer, method: str, *more: object, rows: list[chat.Row] | None = None
            ) -> tuple[Transformer, dict[str, Tensor]]:  # fmt: skip
    """What `method` makes of a copy of `net`."""
    args = flags(method, *more)
    return METHODS[args.method][0](copy.deepcopy(net), batches_of(rows or rows_of()), args)


def entering(net: Transformer, rows: list[chat.Row]) -> dict[str, Tensor]:
    """{path: X (tokens, in)} of every matrix of the blocks, from one row at a time, with nothing packed or padded."""
    seen: dict[str, list[Tensor]] = {}
    matrices = [(path, m) for path, m in net.named_modules() if path.startswith("blocks.") and isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, x, path=path: seen.setdefault(path, []).append(x[0][0]))
             for path, m in matrices]  # fmt: skip
    with torch.no_grad():
        for row in rows:
            net.hidden(torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def inputs_of(x: Tensor) -> Inputs:
    inputs = Inputs(x.shape[1], x.dtype, x.device)
    inputs.add(x)
    return inputs


def parts_of(net: Transformer, path: str) -> list[int]:
    """Rows of each matrix of its own within the one at `path`."""
    c = net.config
    if path.endswith("attention.qkv"):
        return [c.head_dim * n for n in (c.heads, c.kv_heads, c.kv_heads)]
    return [c.ffn_width] * 2 if path.endswith("gate_up") else [net.get_submodule(path).out_features]


# ----------------------------------------------------------------------------------------------------------------------
# Scores and masks


def test_wanda_by_hand():
    """Four inputs of norms 1, 2, 8 and 3: a small weight on a large input matters more than a large one on a small."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    x = torch.tensor([[0.6, 0.0, 8.0, 3.0], [-0.8, 2.0, 0.0, 0.0]])
    scores = prune.wanda(weight, inputs_of(x))
    torch.testing.assert_close(scores, torch.tensor([[4.0, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]))
    assert keep(scores, 0.5, "unstructured", "row").int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
    assert prune.magnitude(weight, inputs_of(x)).tolist() == weight.abs().tolist()


def kept_by_hand(scores: list[float], gone: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i not in order[:gone] for i in range(len(scores))]


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_exactly_the_least_are_left_out(scope, sparsity):
    """Equal scores among them; 0.3 of 35 weights, or of 7 in a row, is no whole number."""
    scores = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(1)).double()
    kept = keep(scores, sparsity, "unstructured", scope)
    if scope == "row":
        wanted = [kept_by_hand(row, round(7 * sparsity)) for row in scores.tolist()]
    else:
        flat = kept_by_hand(scores.flatten().tolist(), round(35 * sparsity))
        wanted = [flat[i : i + 7] for i in range(0, 35, 7)]
    assert kept.tolist() == wanted


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_n_of_every_m_neighbours_in_a_row_are_kept(pattern):
    n, m = map(int, pattern.split(":"))
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    kept = keep(scores, 0.123, pattern, "layer")
    for row, mask in zip(scores.tolist(), kept.tolist(), strict=True):
        assert mask == [x for i in range(0, 16, m) for x in kept_by_hand(row[i : i + m], m - n)]


# ----------------------------------------------------------------------------------------------------------------------
# SparseGPT


def brute_force(w: Tensor, h: Tensor, block: int, choose) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery with an inverse of its own at each column, 2301.00774, equation 3; one row at a time.

    choose(scores (rows, n)): which are kept of the next n = `block` columns.
    """
    w, kept = w.clone(), torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % block == 0:
            some = range(j, min(j + block, w.shape[1]))
            scores = [[w[r, k] ** 2 / torch.linalg.inv(h[k:, k:])[0, 0] for k in some] for r in range(len(w))]
            kept[:, j : j + block] = choose(torch.tensor(scores))
        inverse = torch.linalg.inv(h[j:, j:])
        for r in range(len(w)):
            if not kept[r, j]:
                w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
                w[r, j] = 0.0
    return w, kept


def problem(rows: int = 4, columns: int = 12) -> tuple[Tensor, Tensor]:
    """Weights, and inputs that depend on each other and are of different sizes."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) * (1 + torch.arange(columns))
    x = torch.randn(50, columns, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x


@pytest.mark.parametrize("pattern, block, step", [("unstructured", 12, 12), ("unstructured", 5, 5), ("2:4", 12, 4),
                                                  ("2:4", 4, 4), ("2:4", 6, 4), ("2:6", 4, 6)])  # fmt: skip
def test_sparsegpt_is_brute_force(pattern, block, step):
    w, x = problem()
    gram, damping = x.T @ x, 0.01
    h = gram + damping * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    found, kept = prune.sparsegpt(w, inverse_factor(gram, damping), 0.4, pattern, block=block)
    wanted, mask = brute_force(w, h, step, lambda scores: keep(scores, 0.4, pattern, "layer"))
    assert torch.equal(kept, mask) and 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    assert (found[~kept] == 0).all()


def test_sparsegpt_in_blocks_is_sparsegpt_at_once():
    w, x = problem(6, 24)
    upper = inverse_factor(x.T @ x, 0.01)
    whole, mask = prune.sparsegpt(w, upper, 0.5, "2:4", block=24)
    for block in (4, 8, 20):
        found, kept = prune.sparsegpt(w, upper, 0.5, "2:4", block=block)
        assert torch.equal(kept, mask)
        torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-10)


def test_what_is_left_is_the_least_squares_solution():
    """Where all zeros come before all that is kept, no other weights at those places say X W better."""
    w, x = problem()
    w[:, :5] *= 1e-9
    found, kept = prune.sparsegpt(w, inverse_factor(x.T @ x, 0.0), 5 / 12, "unstructured", block=12)
    assert not kept[:, :5].any() and kept[:, 5:].all()
    best = torch.linalg.lstsq(x[:, 5:], x @ w.T).solution.T
    torch.testing.assert_close(found[:, 5:], best)


def test_sparsegpt_multiplies_in_whole_fp32(monkeypatch):
    """Though Loop allows TF32 on CUDA."""
    seen, before, (w, x) = [], torch.get_float32_matmul_precision(), problem()
    monkeypatch.setattr(prune, "keep", lambda scores, *how, whole=prune.keep: (
        seen.append(torch.get_float32_matmul_precision()), whole(scores, *how))[1])  # fmt: skip
    try:
        torch.set_float32_matmul_precision("high")
        prune.sparsegpt(w, inverse_factor(x.T @ x, 0.01), 0.5, "unstructured", block=6)
        assert seen == ["highest"] * 2 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_inputs_that_are_always_0_are_pruned_first(size):
    """However small all others are."""
    w, x = problem()
    w, x = w.sign(), x * size
    x[:, [2, 7]] = 0.0
    found, kept = prune.sparsegpt(w, inverse_factor(x.T @ x, 0.01), 2 / 12, "unstructured", block=12)
    assert not kept[:, [2, 7]].any() and found.isfinite().all()
    others = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    torch.testing.assert_close(found[:, others], w[:, others])  # nobody has to make up for them


# ----------------------------------------------------------------------------------------------------------------------
# A whole model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method, more", [
    ("wanda", ("--sparsity", 0.4)), ("wanda", ("--pattern", "2:4")), ("magnitude", ("--sparsity", 0.4)),
    ("wanda", ("--sparsity", 0.6, "--scope", "layer")), ("magnitude", ("--scope", "row")),
    ("sparsegpt", ("--sparsity", 0.4)), ("sparsegpt", ("--pattern", "2:4")),
])  # fmt: skip
def test_each_matrix_sees_what_the_pruned_ones_before_it_make_of_the_text(family, method, more):
    """So that its inputs are those in the pruned model; of q, k, v, gate and up each is judged by itself."""
    net, rows, args = random_net(family), rows_of(), flags(method, *more)
    pruned, masks = applied(net, method, *more, rows=rows)
    assert masks.keys() == {f"blocks.{i}.{name}" for i in range(net.config.depth) for name in prune.MATRICES}
    for path, x in entering(pruned, rows).items():
        new, kept = [], []
        for w in net.get_submodule(path).weight.detach().split(parts_of(net, path)):
            if method == "sparsegpt":
                upper = inverse_factor(x.T @ x, 0.01)
                one, mask = prune.sparsegpt(w, upper, args.sparsity, args.pattern, block=128)
            else:
                scores = w.abs() * (x.square().sum(0).sqrt() if method == "wanda" else 1)
                mask = keep(scores, args.sparsity, args.pattern, args.scope)
                one = w * mask
            new.append(one)
            kept.append(mask)
        assert torch.equal(masks[path], torch.cat(kept)), path
        torch.testing.assert_close(pruned.get_submodule(path).weight, torch.cat(new), atol=1e-6, rtol=1e-6)
    for name, p in pruned.named_parameters():
        if name.removesuffix(".weight") not in masks:
            assert torch.equal(p, net.get_parameter(name))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_global_threshold_is_one_for_all_matrices(method):
    net, rows = random_net(), rows_of()
    pruned, masks = applied(net, method, "--scope", "global", "--sparsity", 0.37, rows=rows)
    x = entering(net, rows)
    scores = {path: net.get_submodule(path).weight.detach().abs() for path in masks}
    if method == "wanda":
        scores = {path: s * x[path].square().sum(0).sqrt() for path, s in scores.items()}
    gone = torch.cat([s[~masks[path]] for path, s in scores.items()])
    kept = torch.cat([s[masks[path]] for path, s in scores.items()])
    assert len(gone) == round(0.37 * (len(gone) + len(kept))) and gone.max() < kept.min()
    shares = {round(mask.double().mean().item(), 3) for mask in masks.values()}
    assert len(shares) > 4
    for path, mask in masks.items():
        assert torch.equal(pruned.get_submodule(path).weight, net.get_submodule(path).weight * mask)


def test_a_pattern_must_fill_the_rows():
    with pytest.raises(UserError, match=r"--pattern 2:5: blocks.0.attention.qkv has 32 inputs"):
        applied(random_net(), "wanda", "--pattern", "2:5")


# ----------------------------------------------------------------------------------------------------------------------
# Smaller shapes


def silenced(net: Transformer, units: Units) -> Transformer:
    """A copy in which what is taken out says nothing: its columns of `out` and `down` are 0."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for block, heads, channels in zip(net.blocks, units.heads, units.channels, strict=True):
            for h in set(range(net.config.heads)) - set(heads.tolist()):
                block.attention.out.weight[:, h * net.config.head_dim : (h + 1) * net.config.head_dim] = 0
            for j in set(range(net.config.ffn_width)) - set(channels.tolist()):
                block.ffn.down.weight[:, j] = 0
    return net


def some_units(c: Config) -> Units:
    torch.manual_seed(4)
    return Units.best(c, torch.rand(c.depth, c.heads), torch.rand(c.depth, c.ffn_width), 0.5, "both")


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_out_is_silenced(family):
    """In every layer other heads and channels; q heads that share keys and values, or with keys of their own."""
    net = random_net(family)
    units = some_units(net.config)
    assert len({tuple(x.tolist()) for x in units.heads}) > 1
    small = units.taken(net)
    c = small.config
    assert (c.heads, c.kv_heads, c.ffn_width) == (2, 2, 24)
    torch.testing.assert_close(small(ids(2, 9)), silenced(net, units)(ids(2, 9)))
    assert sum(p.numel() for p in small.blocks.parameters()) < 0.7 * sum(p.numel() for p in net.blocks.parameters())


def test_of_heads_that_share_keys_as_many_are_kept_in_each_group():
    c = Config(**{**vars(LLAMA), "heads": 6, "depth": 1})  # 3 query heads to each of 2 key heads
    heads = torch.tensor([[0.9, 0.8, 0.7, 0.3, 0.1, 0.2]])
    for sparsity, wanted in ((1 / 3, [0, 1, 3, 5]), (2 / 3, [0, 3]), (0.99, [0, 3]), (0.1, [0, 1, 2, 3, 4, 5])):
        units = Units.best(c, heads, torch.rand(1, 48), sparsity, "heads")
        assert units.heads.tolist() == [wanted] and units.channels.tolist() == [[*range(48)]]
    channels = torch.arange(48.0).flip(0)[None]
    units = Units.best(c, heads, channels, 0.75, "ffn")
    assert units.channels.tolist() == [[*range(12)]] and units.heads.tolist() == [[*range(6)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_with_a_unit_by_hand(family):
    """The scores of all weights that are taken out with it, added up in loops."""
    net = random_net(family)
    c, g = net.config, torch.Generator().manual_seed(5)
    scores = {name: torch.rand(p.shape, generator=g) for name, p in net.blocks.named_parameters(prefix="blocks")}
    heads, channels = prune.unit_scores(c, scores)
    d = c.head_dim
    for i in range(c.depth):
        qkv, out, gate_up, down = (scores[f"blocks.{i}.{name}.weight"] for name in prune.MATRICES)
        for h in range(c.heads):
            wanted = qkv[h * d : (h + 1) * d].sum() + out[:, h * d : (h + 1) * d].sum()
            if c.kv_heads == c.heads:
                for start in (c.heads * d, 2 * c.heads * d):
                    wanted += qkv[start + h * d : start + (h + 1) * d].sum()
            torch.testing.assert_close(heads[i, h], wanted)
        for j in range(c.ffn_width):
            wanted = gate_up[j].sum() + gate_up[c.ffn_width + j].sum() + down[:, j].sum()
            torch.testing.assert_close(channels[i, j], wanted)


def test_taylor_is_the_size_of_weight_times_gradient():
    """A mean over batches of |w dL/dw|, L the mean over tokens: by finite differences of a few weights."""
    net, batches = random_net(), batches_of(rows_of())
    found = prune.saliency(net, batches, "taylor", 0)
    assert found.keys() == {f"blocks.{i}.{name}.weight" for i in range(2) for name in prune.MATRICES}
    for name, (r, k) in (("blocks.0.attention.qkv.weight", (3, 5)), ("blocks.1.ffn.down.weight", (7, 40)),
                         ("blocks.1.ffn.gate_up.weight", (60, 1))):  # fmt: skip
        w, total = net.get_parameter(name), 0.0
        for batch in batches:
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    w[r, k] += sign * 1e-5
                    logps = F.log_softmax(net(batch.input_ids, documents=batch.documents), -1)[:, :-1]
                    said = logps.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]
                    losses.append(-said.sum() / batch.completion_mask.sum())
                    w[r, k] -= sign * 1e-5
            total += abs(w[r, k].item() * (losses[0] - losses[1]).item() / 2e-5) / len(batches)
        assert found[name][r, k].item() == pytest.approx(total, rel=1e-4)


def test_other_scores():
    net = random_net()
    size = prune.saliency(net, [], "magnitude", 0)
    name = "blocks.1.ffn.down.weight"
    torch.testing.assert_close(size[name], net.get_parameter(name).detach() ** 2)
    one, same, other = (prune.saliency(net, [], "random", seed)[name] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("score", ["taylor", "magnitude", "random"])
def test_llm_pruner_takes_out_the_units_of_least_score(score):
    net, rows = random_net("qwen2"), rows_of()
    heads, channels = prune.unit_scores(net.config, prune.saliency(net, batches_of(rows), score, 3))
    more = ("--units", "both", "--sparsity", 0.5, "--score", score, "--seed", 3)
    small, masks = applied(net, "llm-pruner", *more, rows=rows)
    units = Units(heads.topk(2).indices.sort().values, channels.topk(24).indices.sort().values)
    torch.testing.assert_close(small(ids(2, 9)), silenced(net, units)(ids(2, 9)))
    assert not masks
    small, _ = applied(net, "llm-pruner", "--sparsity", 0.25, rows=rows)
    assert (small.config.heads, small.config.ffn_width) == (4, 36)


@pytest.mark.parametrize("family", FAMILIES)
def test_flap_by_hand(family):
    """Least Var(X_j) |W_:j|^2; what is gone still says its mean, so that the mean of what is said is as before."""
    net, rows = random_net(family), rows_of()
    c, x = net.config, entering(net, rows)
    small, _ = applied(net, "flap", "--units", "both", "--sparsity", 0.5, rows=rows)
    assert small.config.out_bias
    for i in range(c.depth):
        for name, n_units in (("attention.out", c.heads), ("ffn.down", c.ffn_width)):
            path = f"blocks.{i}.{name}"
            w, seen = net.get_submodule(path).weight.detach(), x[path]
            scores = (seen.var(0, correction=0) * w.square().sum(0)).view(n_units, -1)
            of_unit = scores.sum(1)
            if n_units == c.heads and c.kv_heads < c.heads:
                best = of_unit.view(c.kv_heads, -1).argmax(1)
                units = (best + torch.arange(c.kv_heads) * 2).tolist()
            else:
                units = of_unit.topk(n_units // 2).indices.sort().values.tolist()
            inner = scores.shape[1]
            columns = [u * inner + k for u in units for k in range(inner)]
            found = small.get_submodule(path)
            torch.testing.assert_close(found.weight.detach(), w[:, columns])
            said = seen[:, columns].mean(0) @ found.weight.T + found.bias
            torch.testing.assert_close(said, seen.mean(0) @ w.T)


def test_what_comes_with_biases_keeps_them():
    net, _ = applied(random_net(), "flap")
    units = some_units(net.config)
    small = units.taken(net)
    assert small.config.out_bias
    torch.testing.assert_close(small(ids(2, 9)), silenced(net, units)(ids(2, 9)))


def test_flap_twice_keeps_the_first_bias():
    net, rows = random_net(), rows_of()
    once, _ = applied(net, "flap", "--sparsity", 0.25, rows=rows)
    twice, _ = applied(once, "flap", "--sparsity", 0.25, rows=rows)
    seen = entering(once, rows)["blocks.1.ffn.down"]
    before, after = (m.blocks[1].ffn.down for m in (once, twice))
    kept = [k for k in range(36) if any(torch.equal(before.weight[:, k], w) for w in after.weight.T)]
    assert len(kept) == 27
    torch.testing.assert_close(seen[:, kept].mean(0) @ after.weight.T + after.bias,
                               seen.mean(0) @ before.weight.T + before.bias)  # fmt: skip


def test_influence_is_how_far_a_layer_turns_the_stream():
    net, rows = random_net("qwen3"), rows_of()
    cosines = [[] for _ in net.blocks]
    for row in rows:
        x = net.embed(torch.tensor([row.input_ids]))
        cos, sin = net._rotary_table(x.shape[1], CPU)
        for block, found in zip(net.blocks, cosines, strict=True):
            y = block(x, cos[None, : x.shape[1]], sin[None, : x.shape[1]], None, None)
            found += [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(x[0], y[0], strict=True)]
            x = y
    wanted = torch.tensor([1 - sum(found) / len(found) for found in cosines], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(prune.influence(net, batches_of(rows)), wanted)


def test_shortgpt_leaves_out_the_layer_of_least_influence():
    net, rows = random_net("qwen3"), rows_of()
    with torch.no_grad():
        for p in (net.blocks[1].attention.out.weight, net.blocks[1].ffn.down.weight):
            p *= 0.01
    small, _ = applied(net, "shortgpt", "--sparsity", 0.34, rows=rows)
    assert small.config.depth == 2
    net.blocks = nn.ModuleList([net.blocks[0], net.blocks[2]])
    torch.testing.assert_close(small(ids(2, 9)), net(ids(2, 9)))


def test_layers_may_be_left_out_by_chance():
    net = random_net("qwen3")
    for seed in range(6):
        args = flags("shortgpt", "--score", "random", "--seed", seed, "--sparsity", 0.34)
        small, _ = prune.shortgpt(net, batches_of(rows_of()), args)
        chance = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        kept = [net.blocks[i] for i in range(3) if i != chance.argmin()]
        for block, wanted in zip(small.blocks, kept, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(block.parameters(), wanted.parameters(), strict=True))


def test_something_is_always_left():
    net = random_net("qwen3")
    sizes = {"shortgpt": "depth", "llm-pruner": "ffn_width", "flap": "ffn_width", "slicegpt": "width"}
    for method, name in sizes.items():
        small, _ = applied(net, method, "--sparsity", 0.999)
        assert getattr(small.config, name) == (8 if name == "width" else 1)
        assert small(ids(2, 9)).isfinite().all()


@pytest.mark.parametrize("method", ["llm-pruner", "flap", "shortgpt", "slicegpt", "svd", "asvd", "svd-llm"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_parameter_of_a_smaller_model_has_memory_of_its_own(family, method):
    """Or an optimizer would add the updates of several to one."""
    small, _ = applied(random_net(family), method, "--sparsity", 0.5)
    before = [p.detach().clone() for p in small.parameters()]
    for i, p in enumerate(small.parameters()):
        p.data += i
    assert all(torch.equal(p, old + i) for i, (p, old) in enumerate(zip(small.parameters(), before, strict=True)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rotating_the_stream_changes_nothing(family):
    net = random_net(family)
    turned, _ = prune.slicegpt(net, batches_of(rows_of()), Namespace(sparsity=0.0))
    torch.testing.assert_close(turned(ids(2, 9)), net(ids(2, 9)))
    assert not torch.allclose(turned.embed.weight, net.embed.weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_directions_that_are_never_used_are_cut_off_for_nothing(family, with_bias):
    """A stream in 24 of 32 directions, which are no coordinates."""
    net = Transformer(replace(FAMILIES[family], norm_eps=1e-12)).double()  # eps is not turned with it
    net.load_state_dict(random_net(family).state_dict())
    if with_bias:
        net, _ = applied(net, "flap")
    basis = torch.linalg.qr(torch.randn(32, 24, dtype=torch.float64)).Q
    with torch.no_grad():
        net.embed.weight.copy_(net.embed.weight @ basis @ basis.T)
        for block in net.blocks:
            for linear in (block.attention.out, block.ffn.down):
                for p in linear.parameters():
                    p.copy_(basis @ basis.T @ p)
    small, _ = applied(net, "slicegpt", "--sparsity", 0.25)
    assert small.config.width == 24 and not small.config.tied
    torch.testing.assert_close(small(ids(2, 9)), net(ids(2, 9)))


def test_slicegpt_keeps_the_directions_of_most_variance():
    net, rows = random_net(), rows_of()
    small, _ = applied(net, "slicegpt", "--sparsity", 0.25, rows=rows)
    states = []
    for row in rows:  # before and within each block, and at the end
        with torch.no_grad():
            x = net.embed(torch.tensor([row.input_ids]))
            cos, sin = net._rotary_table(x.shape[1], CPU)
            table = cos[None, : x.shape[1]], sin[None, : x.shape[1]], None, None
            for block in net.blocks:
                states += [x[0], (x + block.attention(block.attention_norm(x), *table))[0]]
                x = block(x, *table)
            states.append(x[0])
    x = F.normalize(torch.cat(states), dim=-1)
    largest = torch.linalg.eigh(x.T @ x).eigenvectors[:, -24:]
    found = small.embed.weight @ small.embed.weight.T  # does not depend on the basis
    torch.testing.assert_close(found, net.embed.weight @ largest @ largest.T @ net.embed.weight.T)


# ----------------------------------------------------------------------------------------------------------------------
# Low rank


def test_svd_llm_loses_as_little_as_any_matrix_of_that_rank():
    """The tail of the singular values of X W^T: of all X V^T, V of rank r, none is nearer to X W^T."""
    w, x = problem(9, 12)
    errors = {}
    for method in ("svd", "asvd", "svd-llm"):
        a, b = prune.factors(w, prune.whitening(method, inputs_of(x)), 4)
        assert a.shape == (4, 12) and b.shape == (9, 4)
        errors[method] = (x @ (w - b @ a).T).square().sum().item()
    tail = torch.linalg.svdvals(x @ w.T)[4:].square().sum().item()
    assert errors["svd-llm"] == pytest.approx(tail, rel=1e-2)  # which damping keeps from being equal
    assert errors["svd-llm"] < 0.9 * min(errors["svd"], errors["asvd"])


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm"])
def test_all_of_the_rank_is_the_matrix(method):
    w, x = problem(9, 12)
    a, b = prune.factors(w, prune.whitening(method, inputs_of(x)), 9)
    torch.testing.assert_close(b @ a, w)


def test_svd_is_the_nearest_matrix_and_asvd_that_of_scaled_columns():
    w, x = problem(9, 12)
    a, b = prune.factors(w, prune.whitening("svd", inputs_of(x)), 4)
    assert (w - b @ a).square().sum().item() == pytest.approx(torch.linalg.svdvals(w)[4:].square().sum().item())
    scale = x.abs().mean(0).sqrt()
    a, b = prune.factors(w, prune.whitening("asvd", inputs_of(x)), 4)
    error = ((w - b @ a) * scale).square().sum().item()
    assert error == pytest.approx(torch.linalg.svdvals(w * scale)[4:].square().sum().item())


def test_an_input_that_is_always_0_has_a_whitening():
    _, x = problem()
    x[:, 3] = 0.0
    for method in ("asvd", "svd-llm"):
        s = prune.whitening(method, inputs_of(x))
        assert torch.linalg.inv(s).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_factors_have_the_numbers_that_were_asked_for(family):
    net = random_net(family)
    small, _ = applied(net, "svd-llm", "--sparsity", 0.3)
    assert small.config.ranks.keys() == set(prune.MATRICES)
    for path, two in small.named_modules():
        if isinstance(two, nn.Sequential):
            n, old = sum(p.numel() for p in two.parameters() if p.ndim == 2), net.get_submodule(path)
            step = sum(old.weight.shape)
            assert n <= 0.7 * old.weight.numel() < n + step
            assert (two.up.bias is None) == (old.bias is None)
            if old.bias is not None:
                assert torch.equal(two.up.bias, old.bias)
    assert applied(net, "svd", "--sparsity", 0.97)[0].config.ranks["attention.out"] == 1


def test_inputs_that_are_not_finite_end_in_a_line():
    """The sums of a text that overflowed, and of nothing but noise of rounding."""
    _, x = problem()
    inputs = inputs_of(x)
    for gram in (inputs.gram * math.inf, torch.tensor([[1.0, 2.0], [2.0, 1.0]])):
        inputs.gram = gram
        with pytest.raises(RunFailed, match="not positive definite: the damping, 0.0001, is too small"):
            prune.whitening("svd-llm", inputs)


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm"])
def test_low_rank_follows_what_the_factors_before_make_of_the_text(method):
    net, rows = random_net(), rows_of()
    small, _ = applied(net, method, "--sparsity", 0.5, rows=rows)
    path = "blocks.1.attention.out"
    x = entering(small, rows)[f"{path}.down"]
    a, b = prune.factors(net.get_submodule(path).weight, prune.whitening(method, inputs_of(x)),
                         small.config.ranks["attention.out"])  # fmt: skip
    two = small.get_submodule(path)
    torch.testing.assert_close(two.up.weight @ two.down.weight, b @ a, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


PLAIN = ["sparsegpt", "wanda --pattern 2:4", "llm-pruner --units both --sparsity 0.5", "shortgpt --sparsity 0.5",
         "slicegpt"]  # fmt: skip
OURS = ["flap --units both --sparsity 0.5", "svd-llm"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [*PLAIN, *OURS])
def test_a_saved_pruned_model_is_itself_when_it_is_loaded(tmp_path, family, text):
    pruned, masks = applied(random_net(family, torch.float32), text)
    save(pruned, None, tmp_path)
    again, _ = load(tmp_path)
    assert again.config == pruned.config
    torch.testing.assert_close(again(ids(2, 9)), pruned(ids(2, 9)), atol=0, rtol=0)
    for path, mask in masks.items():
        assert (again.get_submodule(path).weight[~mask] == 0).all()
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in pruned.parameters())
    for end in ("o_proj.bias", "down_proj.bias"):
        assert any(name.endswith(end) for name in tensors) == pruned.config.out_bias


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", PLAIN)
def test_transformers_loads_what_keeps_the_architecture(tmp_path, family, text):
    auto = oracle("transformers").AutoModelForCausalLM
    pruned, _ = applied(random_net(family, torch.float32), text)
    save(pruned, None, tmp_path)
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids(2, 9)).logits, pruned(ids(2, 9)), atol=2e-4, rtol=2e-4)


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parametrize("text", OURS)
def test_transformers_refuses_what_does_not(tmp_path, text):
    """It would leave out biases and factors without a word, and be another model."""
    auto = oracle("transformers").AutoModelForCausalLM
    save(applied(random_net(dtype=torch.float32), text)[0], None, tmp_path)
    with pytest.raises(ValueError, match="llama_pruned"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("ranks", [{"attention_norm": 3}, {"ffn.down": 0}, {"ffn.down": 1.5}, [4], {"head": 2}])
def test_ranks_that_are_none_are_refused(tmp_path, ranks):
    save(applied(random_net(dtype=torch.float32), "svd")[0], None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"ranks": ranks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: (ranks|the sizes make no model)"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Recovery


def disturbed(net: Transformer) -> Transformer:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return net


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_under_a_mask_is_merged_as_it_was_trained(family):
    """mask * (W + (alpha / r) B A), also while it is trained: at first nothing has changed, in the end zeros are 0."""
    pruned, masks = applied(random_net(family, dtype=torch.float32), "wanda")
    net = copy.deepcopy(pruned)
    prune.prepare(net, masks, "lora")
    assert torch.equal(net(ids(2, 9)), pruned(ids(2, 9)))
    assert {name.rsplit(".", 1)[1] for name, p in net.named_parameters() if p.requires_grad} == {"down", "up"}
    disturbed(net)
    by_hand = copy.deepcopy(pruned)
    for path, mask in masks.items():
        m, done = net.get_submodule(path), 0
        low = torch.zeros_like(mask, dtype=torch.float32)
        for p, n in enumerate(parts_of(pruned, path)):
            low[done : done + n], done = m.up[done : done + n] @ m.down[8 * p : 8 * p + 8], done + n
        by_hand.get_submodule(path).weight.data.add_(2.0 * low).mul_(mask)
    torch.testing.assert_close(net(ids(2, 9)), by_hand(ids(2, 9)))
    trained = net(ids(2, 9))
    lora.merge(net)
    torch.testing.assert_close(net(ids(2, 9)), trained)
    for path, mask in masks.items():
        weight = net.get_submodule(path).weight
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()


def test_no_gradient_goes_to_what_is_pruned():
    pruned, masks = applied(random_net(), "wanda")
    net = copy.deepcopy(pruned)
    prune.prepare(net, masks, "kd")
    for one in (net, pruned):
        sft.sft_loss(one, batches_of(rows_of())[0]).backward()
    for name, p in net.named_parameters():
        mask = masks.get(name.removesuffix(".weight"), torch.ones_like(p))
        torch.testing.assert_close(p.grad, pruned.get_parameter(name).grad * mask)
        assert (p.grad != 0).any()


def test_kd_by_hand():
    """sum_v p (log p - log q) over the tokens that count, p the teacher's; its gradient goes to the student alone."""
    teacher, net = random_net(), random_net(seed=1)
    rows = rows_of(3)
    rows[0].completion_mask[1] = 0
    batch = collate([[row] for row in rows], CPU)
    loss = prune.kd_loss(net, teacher, batch)
    wanted = 0.0
    for row in rows:
        p, q = (m(torch.tensor([row.input_ids]))[0].softmax(-1) for m in (teacher, net))
        for t in range(1, len(row.input_ids)):
            if row.completion_mask[t]:
                wanted += sum(a * math.log(a / b) for a, b in zip(p[t - 1].tolist(), q[t - 1].tolist(), strict=True))
    assert loss.item() == pytest.approx(wanted)
    assert prune.kd_loss(net, teacher, collate([rows[:2], rows[2:]], CPU)).item() == pytest.approx(wanted)  # packed
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and net.embed.weight.grad.abs().sum() > 0
    assert prune.kd_loss(teacher, teacher, batch).item() == pytest.approx(0.0, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Transformer(Config.from_depth(2, tiny().vocab_size, 96))
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 3
    save(model, tiny(), folder)
    return folder


ROWS = [{"prompt": f"Count to {i}." + " Please." * (i % 3), "completion": "one two three " * (i % 4) + f"{i}."}
        for i in range(10)]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def args_for(checkpoint: Path, data: Path, out: Path, *more: object) -> Namespace:
    argv = ["--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", "--max-length", 96, "--lr", 1e-2,
            "--batch-size", 6, "--micro-batch-size", 6, "--steps", 3, "--warmup", 1, "--log-every", 1,
            *more]  # fmt: skip
    return prune.get_args(list(map(str, argv)))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in load(folder)[0].named_parameters()}


@pytest.mark.parametrize("recover", ["lora", "kd"])
@pytest.mark.parametrize("method", ["sparsegpt", pytest.param("wanda --pattern 2:4", marks=pytest.mark.slow)])
def test_what_is_pruned_is_exactly_0_after_recovery(checkpoint, data, tmp_path, recover, method):
    said = prune.main(args_for(checkpoint, data, tmp_path / "a", "--method", method, "--recover", "none"))
    result = prune.main(args_for(checkpoint, data, tmp_path / "b", "--method", method, "--recover", recover))
    pruned, trained = weights(tmp_path / "a"), weights(tmp_path / "b")
    matrices = [name for name, p in pruned.items() if name.startswith("blocks.") and p.ndim == 2]
    for name in matrices:
        assert (pruned[name] == 0).double().mean() == 0.5
        assert torch.equal(pruned[name] == 0, trained[name] == 0), name
        assert not torch.equal(pruned[name], trained[name])
    assert result["metrics"]["sparsity"]["after"] == said["metrics"]["sparsity"]["after"] == 0.5
    assert result["metrics"]["pruned: bits per byte"]["after"] == said["after"]
    others = [name for name in pruned if name not in matrices]
    assert all(torch.equal(pruned[name], trained[name]) == (recover == "lora") for name in others)


@pytest.mark.parametrize("recover", ["lora", pytest.param("kd", marks=pytest.mark.slow)])
def test_splitting_a_batch_changes_nothing(checkpoint, data, tmp_path, recover):
    for size in (6, 4, 1):
        prune.main(args_for(checkpoint, data, tmp_path / str(size), "--recover", recover, "--method", "magnitude",
                            "--micro-batch-size", size))  # fmt: skip
    whole = weights(tmp_path / "6")
    for size in ("4", "1"):
        split = weights(tmp_path / size)
        assert max((whole[name] - split[name]).abs().max().item() for name in whole) < 1e-4, size


@pytest.mark.parametrize("method", ["magnitude", pytest.param("llm-pruner", marks=pytest.mark.slow)])
def test_recovery_is_a_plain_loop(checkpoint, data, tmp_path, method):
    """All that is left learns what the dense model says: torch's AdamW on the rows of each step, one by one."""
    prune.main(args_for(checkpoint, data, tmp_path / "none", "--method", method, "--recover", "none"))
    args = args_for(checkpoint, data, tmp_path / "kd", "--method", method, "--recover", "kd", "--grad-clip", 0.5)
    prune.main(args)
    rows = [chat.render([{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": row["completion"]}], tiny()) for row in ROWS]  # fmt: skip
    teacher, model = load(checkpoint)[0], load(tmp_path / "none")[0]
    masks = {name: p != 0 for name, p in model.blocks.named_parameters() if p.ndim == 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    loop, logged = Loop(args, "prune"), []
    for step in (1, 2, 3):
        loss, n = 0.0, 0
        for i in loop.batch_indices(len(rows), step):
            x = torch.tensor([rows[i].input_ids])
            p, q = (m(x)[0].log_softmax(-1) for m in (teacher, model))
            kl = (p.exp() * (p - q)).sum(-1)[:-1]
            mask = torch.tensor(rows[i].completion_mask[1:])
            loss, n = loss + (kl * mask).sum(), n + int(mask.sum())
        (loss / n).backward()
        for name, p in model.blocks.named_parameters():
            if name in masks:
                p.grad *= masks[name]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1, 1, 0.5)[step - 1]
        optimizer.step()
        optimizer.zero_grad()
        logged.append({"step": step, "loss": loss.item() / n, "grad_norm": norm.item()})
    found = weights(tmp_path / "kd")
    for name, p in model.named_parameters():
        error = (found[name] - p.detach()).abs()  # Adam makes a step of the rounding where a gradient is next to 0
        assert error.mean() < 1e-5 and error.max() < 5e-3
    lines = [json.loads(line) for line in (tmp_path / "kd" / "metrics.jsonl").read_text().splitlines()]
    for line, wanted in zip(lines, logged, strict=True):
        assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


def test_lora_learns_the_text(checkpoint, data, tmp_path):
    """The first loss is -log p of the answers' tokens under the pruned model, per token."""
    prune.main(args_for(checkpoint, data, tmp_path / "none", "--recover", "none"))
    args = args_for(checkpoint, data, tmp_path / "lora", "--recover", "lora", "--lr", "1e-3")
    prune.main(args)
    model, loss, n = load(tmp_path / "none")[0], 0.0, 0
    rows = [chat.render([{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": row["completion"]}], tiny()) for row in ROWS]  # fmt: skip
    for i in Loop(args, "prune").batch_indices(len(rows), 1):
        x, mask = torch.tensor([rows[i].input_ids]), torch.tensor(rows[i].completion_mask[1:])
        logps = model(x)[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0]
        loss, n = loss - (logps * mask).sum().item(), n + int(mask.sum())
    lines = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(loss / n, rel=1e-5) and lines[0]["tokens_per_second"] > 0


def test_bits_per_byte_by_hand(checkpoint, data, tmp_path):
    """-log2 p of all tokens that count, of all rows, over the bytes of their text; an ending token has none."""
    result = prune.main(args_for(checkpoint, data, tmp_path / "out", "--recover", "none"))
    for folder, found in ((checkpoint, result["before"]), (tmp_path / "out", result["after"])):
        model, bits, n = load(folder)[0], 0.0, 0
        for row in ROWS:
            one = chat.render([{"role": "user", "content": row["prompt"]},
                               {"role": "assistant", "content": row["completion"]}], tiny())  # fmt: skip
            x = torch.tensor([one.input_ids])
            logps = model(x)[0, :-1].log_softmax(-1).gather(-1, x[0, 1:, None])[:, 0]
            bits -= (logps * torch.tensor(one.completion_mask[1:])).sum().item() / math.log(2)
            n += len(row["completion"].encode())
        assert found == pytest.approx(bits / n, rel=1e-4)
    assert result["metric"] == "bits per byte" and not result["higher_is_better"]
    assert result["n"] == len(ROWS)


def test_the_code_length_of_a_report_is_that_of_its_chain():
    log = "Weather: rain sun fog fog"
    chain = world.WEATHER_CHAIN
    p = 1 / 8 / 7 * chain["rain", "sun"][world.WEATHER.index("fog")] * chain["sun", "fog"][world.WEATHER.index("fog")]
    assert world.code_length(log) == pytest.approx(-math.log2(p))
    logs = [world.weather_log(world.rng_for("a test", i), days=302) for i in range(40)]
    mean = sum(world.code_length(log) - math.log2(56) for log in logs) / (40 * 300)
    assert mean == pytest.approx(world.weather_entropy(), rel=0.02)


def test_sizes_by_hand():
    dense = random_net(dtype=torch.float32)
    n = sum(p.numel() for p in dense.parameters())
    inside = sum(p.numel() for p in dense.blocks.parameters() if p.ndim == 2)

    def found(model: Transformer) -> tuple[float, ...]:
        sizes = prune.sizes(model, dense)
        assert list(sizes) == ["sparsity", "parameters", "MB", "MB packed"]
        return tuple(value for (value,) in sizes.values())

    assert found(dense) == (0.0, n / 1e6, 4 * n / 1e6, 4 * n / 1e6)
    pruned, _ = applied(dense, "wanda --pattern 2:4")
    packed = 4 * (n - inside // 2) + inside / 8
    assert found(pruned) == pytest.approx((0.5, n / 1e6, 4 * n / 1e6, packed / 1e6))
    small, _ = applied(dense, "llm-pruner --sparsity 0.5")
    gone = 2 * 3 * 24 * 32
    assert found(small) == pytest.approx((gone / inside, *[x * (n - gone) / 1e6 for x in (1, 4, 4)]))
    packed = 2 * (n - inside // 2) + inside / 8
    assert found(pruned.bfloat16()) == pytest.approx((0.5, n / 1e6, 2 * n / 1e6, packed / 1e6))


def test_speed_is_tokens_over_the_median_second(checkpoint, data, tmp_path, monkeypatch):
    """Two models in turns; the first round, which warms up, does not count."""
    args, clock, turns = args_for(checkpoint, data, tmp_path), [0.0], []
    models = load(checkpoint)[0], load(checkpoint)[0]

    def slow(model: Transformer, input_ids: Tensor) -> Tensor:
        turns.append(models.index(model))
        clock[0] += (100.0, 1.0, 2.0, 2.0, 2.0, 2.0, 9.0, 2.0)[turns.count(turns[-1]) - 1] * (1 + turns[-1])
        return input_ids.new_zeros(1)

    monkeypatch.setattr(prune, "token_logps", slow)
    monkeypatch.setattr(prune.time, "perf_counter", lambda: clock[0])
    assert prune.speeds(models, args, Loop(args, "prune")) == [6 * 96 / 2.0, 6 * 96 / 4.0]
    assert turns == [0, 1] * 8


def test_a_narrow_checkpoint_stays_narrow(checkpoint, data, tmp_path):
    model, tokenizer = load(checkpoint)
    save(model.bfloat16(), tokenizer, tmp_path / "narrow")
    result = prune.main(args_for(tmp_path / "narrow", data, tmp_path / "out", "--method", "wanda"))
    tensors = read_safetensors(tmp_path / "out" / "checkpoint" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert result["metrics"]["sparsity"]["after"] == 0.5
    assert result["metrics"]["MB"]["after"] == pytest.approx(sum(t.nbytes for t in tensors) / 1e6)
    assert result["metrics"]["MB"]["before"] == result["metrics"]["MB"]["after"]


def test_a_narrow_checkpoint_is_measured_as_the_dense_one_was(checkpoint, data, tmp_path, monkeypatch):
    """The numbers that were written, in fp32; what is timed has the type of the checkpoint."""
    model, tokenizer = load(checkpoint)
    save(model.bfloat16(), tokenizer, tmp_path / "narrow")
    measured, speeds, seen, timed = prune.measured, prune.speeds, [], []
    monkeypatch.setattr(prune, "measured", lambda m, *x: seen.append({p.dtype for p in m.parameters()}) or
                        measured(m, *x))  # fmt: skip
    monkeypatch.setattr(prune, "speeds", lambda models, *x: timed.append([m.embed.weight.dtype for m in models]) or
                        speeds(models, *x))  # fmt: skip
    args = args_for(tmp_path / "narrow", data, tmp_path / "out", "--method", "wanda")
    result = prune.main(args)
    assert seen == [{torch.float32}] * 3 and timed == [[torch.bfloat16] * 2]
    loop = Loop(args_for(checkpoint, data, tmp_path / "other"), "prune")
    written = measured(load(tmp_path / "out")[0], tokenizer, prune.examples(args, tokenizer, loop)[2], args, loop)
    assert sum(written["bits per byte"]) / len(ROWS) == pytest.approx(result["after"], rel=1e-6)


def test_rows_of_the_world_are_a_third_of_each_kind():
    tokenizer = tiny()
    rows = list(prune.world_rows(8, 0, tokenizer))
    assert len(rows) == 9
    texts = [tokenizer.decode(row.input_ids) for row in rows]
    assert all(text.startswith("<|im_start|>user") for text in texts[::3])
    assert all(text.startswith("Weather:") for text in texts[2::3])
    others = {tokenizer.decode(row.input_ids) for row in prune.world_rows(8, 1, tokenizer)}
    assert len(others | set(texts)) == 18
    trained = [chat.render(row["messages"], tokenizer) for row in world.sft_rows(8, 0)]  # by sft.py
    trained += [sft.document(text, tokenizer) for text in world.base_documents(8, 0)]
    assert not {tokenizer.decode(row.input_ids) for row in trained} & set(texts)


def test_reports_that_are_measured_are_not_those_of_the_training(tmp_path):
    args = prune.get_args(["--out", str(tmp_path), "--device", "cpu", "--steps", "2"])
    some, rows, test = prune.examples(args, tiny(), Loop(args, "prune"))
    assert len(some) == 192 and len(rows) >= 2 * args.batch_size and len(test["rows"]) == 128
    trained = {tuple(row.input_ids) for row in (*some, *rows)}
    assert not trained & {tuple(row.input_ids) for row in test["rows"]}
    assert len(test["questions"]) == 20 * len(world.TEST_PARTS)


def test_long_rows_of_the_world_are_treated_as_those_of_a_file(tmp_path):
    def rows(*flags: object) -> list[chat.Row]:
        args = prune.get_args(list(map(str, ("--rows", 60, "--steps", 1, "--batch-size", 30, *flags))))
        return sum(prune.examples(args, tiny(), Namespace(say=print))[:2], [])

    whole, split = rows("--max-length", 300), rows("--max-length", 40)
    dropped = rows("--max-length", 40, "--too-long", "drop")
    assert max(len(row.input_ids) for row in split) == 40 and len(split) > len(whole) > len(dropped)
    assert dropped == [row for row in whole if len(row.input_ids) <= 40]
    with pytest.raises(UserError, match="a row has .* tokens, --max-length is 40"):
        rows("--max-length", 40, "--too-long", "refuse")
    for flags, is_left in (((), False), (("--recover", "none"), True), (("--steps", 0), True)):
        flags = ("--max-length", 40, "--too-long", "drop", "--rows", 90, *flags)
        if is_left:
            assert rows(*flags)
        else:
            with pytest.raises(UserError, match="no row is left"):
                rows(*flags)


def test_some_rows_of_a_file_are_calibrated_on(checkpoint, data, tmp_path):
    """--rows of them; recovery has all."""
    args = args_for(checkpoint, data, tmp_path / "out", "--rows", 3)
    some, rows, test = prune.examples(args, tiny(), Loop(args, "prune"))
    assert len(some) == 3 and len(rows) == len(test["rows"]) == len(ROWS) and all(row in rows for row in some)
    args.seed = 1
    assert prune.examples(args, tiny(), Loop(args, "prune"))[0] != some


def test_recovery_of_the_dense_model_is_a_baseline(checkpoint, tmp_path, monkeypatch):
    """From the committed table, where the run is that of the table: --recover lora of the tiny model."""
    table = tmp_path / "results" / "tables" / "prune.json"
    table.parent.mkdir(parents=True)
    rows = [{"method": name, "bits per byte": {"mean": x}, "exact match": {"mean": 2 * x}}
            for name, x in (("SFT", 0.125), ("dense", 0.25), ("wanda", 0.5))]  # fmt: skip
    table.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(prune, "ROOT", tmp_path)
    monkeypatch.setattr(Loop, "require", lambda self, stage: checkpoint)
    monkeypatch.setattr(prune.world, "sft_test", lambda n: [
        world.exchange("first", world.rng_for("some", i), "test") for i in range(3)])  # fmt: skip
    words = "of the dense model after the same training (stored, of another run)"
    wanted = {f"bits per byte {words}": 0.25, f"exact match {words}": 0.5}
    assert prune.stored(prune.get_args(["--method", "wanda", "--sparsity", "0.3"])) == wanted
    for more in (["--recover", "kd"], ["--recover", "none"], ["--model", "x"], ["--data", "x"], ["--method", "dense"],
                 ["--steps", "0"], ["--lr", "1"], ["--batch-size", "3"], ["--plant", "9"], ["--warmup", "0"],
                 ["--schedule", "cosine"], ["--max-length", "64"]):  # fmt: skip
        assert prune.stored(prune.get_args(more)) == {}
    argv = ["--out", tmp_path / "out", "--device", "cpu", "--max-length", 64, "--steps", 0, "--rows", 9, "--batch-size",
            4, "--max-new-tokens", 4, "--method", "shortgpt", "--sparsity", 0.5]  # fmt: skip
    said = prune.main(prune.get_args(list(map(str, argv))))["baselines"]
    assert len(said) == 1  # the entropy: nothing was trained
    monkeypatch.setattr(prune, "SAME_TRAINING", ())
    said = prune.main(prune.get_args(list(map(str, argv))))["baselines"]
    assert len(said) == 3 and said.items() >= wanted.items()


def test_rows_are_no_longer_than_the_model_reads(checkpoint, data, tmp_path):
    with pytest.raises(UserError, match="--max-length 97: the model reads at most 96 tokens"):
        prune.main(args_for(checkpoint, data, tmp_path / "out", "--max-length", 97))


def test_the_chat_format_holds_for_all_that_a_run_renders(checkpoint, data, tmp_path, monkeypatch):
    class Stop(Exception): ...

    seen = []

    def look(args: Namespace, tokenizer, loop: Loop) -> None:
        seen.append(tokenizer.decode(chat.render([{"role": "user", "content": "Hello"}], tokenizer).input_ids))
        raise Stop

    monkeypatch.setattr(prune, "examples", look)
    for more in ((), ("--chat-format", "qwen2")):
        with pytest.raises(Stop):
            prune.main(args_for(checkpoint, data, tmp_path / "out", *more))
    assert ["system" in text for text in seen] == [False, True]


def test_a_run_is_measured_before_after_and_in_between(checkpoint, data, tmp_path, monkeypatch):
    """Of the world, exact match, too; and the entropy of the reports is what to beat."""
    monkeypatch.setattr(prune.world, "sft_test", lambda n: [
        world.exchange("first", world.rng_for("some", i), "test") for i in range(3)])  # fmt: skip
    argv = ["--model", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--max-length", 64, "--steps", 0,
            "--rows", 9, "--method", "shortgpt", "--sparsity", 0.5, "--max-new-tokens", 4, "--batch-size", 4,
            "--micro-batch-size", 64]  # fmt: skip
    result = prune.main(prune.get_args(list(map(str, argv))))
    names = {"pruned: bits per byte", "exact match", "pruned: exact match", "sparsity", "parameters", "MB", "MB packed",
             "tokens/s"}  # fmt: skip
    assert result["metrics"].keys() == names and result["variant"] == "shortgpt"
    assert result["metrics"]["sparsity"] == {"before": 0.0, "after": 0.5, "n": 1, "ci95": None}
    assert result["metrics"]["pruned: bits per byte"]["before"] == result["before"]
    (floor,) = result["baselines"].values()
    assert 0.2 < floor < 0.6 < result["before"]
    assert load(tmp_path / "out")[0].config.depth == 1


@pytest.mark.parametrize("words, said", [
    (["--method", "best"], "--method best: there are dense, magnitude"),
    (["--method", ""], "--method : there are"),
    (["--method", "svd", "--pattern", "2:4"], "--method svd has no --pattern"),
    (["--method", "sparsegpt", "--scope", "row"], "--method sparsegpt has no --scope"),
    (["--method", "wanda", "--pattern", "2:4", "--sparsity", "0.7"], "leaves out 0.5 of each row"),
    (["--method", "wanda", "--pattern", "2:4", "--scope", "global"], "no --scope global"),
    (["--sparsity", "1"], "--sparsity 1.0: expected a share below 1"),
    (["--method", "shortgpt", "--score", "taylor"], "--score taylor: --method shortgpt has influence, random"),
    (["--method", "wanda --lr 3"], "--lr is none of --sparsity"),
    (["--method", "all", "--sparsity", "0.5"], "it takes no --model"),
    (["--method", "all", "--model", "x"], "it takes no --model"),
    (["--resume"], "--resume keeps the finished runs of --method all"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        prune.get_args(words)


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "two:4", "dense", "2:4:8"])
def test_patterns_that_are_none_are_refused(pattern, capsys):
    with pytest.raises(SystemExit) as end:
        prune.get_args(["--pattern", pattern])
    assert end.value.code == 2 and "expected unstructured, or N:M" in capsys.readouterr().err


def test_a_method_brings_its_flags():
    args = flags("wanda --pattern 2:4 --recover kd")
    assert (args.method, args.pattern, args.sparsity, args.recover, args.scope) == ("wanda", "2:4", 0.5, "kd", "row")
    assert args.variant == "wanda --pattern 2:4 --recover kd"
    assert flags("wanda", "--pattern", "1:4").sparsity == 0.75
    assert flags("magnitude").scope == "layer" and flags("flap").sparsity == 0.25
    assert flags("svd --sparsity 0.6").sparsity == 0.6
    assert flags("svd", "--recover", "kd").lr == prune.RATES["kd"][0]
    assert flags("svd", "--model", "x").lr == prune.RATES["lora"][1]


def test_too_little_sparsity_is_refused(checkpoint, data, tmp_path):
    with pytest.raises(UserError, match="--sparsity 0.1 is less than one of the units of --method shortgpt"):
        prune.main(args_for(checkpoint, data, tmp_path / "a", "--method", "shortgpt", "--sparsity", 0.1))
    with pytest.raises(UserError, match="--sparsity 0.25 is less than one of the units of --method flap"):  # one head
        prune.main(args_for(checkpoint, data, tmp_path / "a", "--method", "flap", "--units", "both"))
    assert not (tmp_path / "a").exists()


def test_a_model_of_low_rank_is_refused(checkpoint, data, tmp_path):
    prune.main(args_for(checkpoint, data, tmp_path / "a", "--method", "svd", "--steps", 0))
    with pytest.raises(UserError, match="its matrices are of low rank or quantized"):
        prune.main(args_for(tmp_path / "a", data, tmp_path / "b", "--method", "wanda"))


def test_a_quantized_model_is_refused(checkpoint, data, tmp_path):
    flags = ["--model", checkpoint, "--data", data, "--out", tmp_path / "a", "--device", "cpu", "--method", "rtn",
             "--max-length", 96]  # fmt: skip
    quantize.main(quantize.get_args(list(map(str, flags))))
    with pytest.raises(UserError, match="its matrices are of low rank or quantized"):
        prune.main(args_for(tmp_path / "a", data, tmp_path / "b"))


def test_planted_outliers_leave_the_dense_model_as_it_is(checkpoint, data, tmp_path):
    """But magnitude prunes other weights of it, and Wanda the same: |W| / s * |s X|."""
    for method in ("magnitude", "wanda"):
        runs = [prune.main(args_for(checkpoint, data, tmp_path / f"{method}{factor}", "--method", method, "--recover",
                                    "none", "--plant", factor)) for factor in (0, 64)]  # fmt: skip
        assert runs[0]["before"] == pytest.approx(runs[1]["before"], rel=1e-5)
        zeros = [weights(tmp_path / f"{method}{factor}")["blocks.0.ffn.gate_up.weight"] == 0 for factor in (0, 64)]
        same = (zeros[0] == zeros[1]).double().mean().item()
        assert same > 0.999 if method == "wanda" else same < 0.99


def test_outliers_are_planted_by_the_seed(checkpoint, data, tmp_path, monkeypatch):
    class Stop(Exception): ...

    seen = []

    def look(model: Transformer, factor: float, seed: int) -> None:
        seen.append((factor, seed))
        raise Stop

    monkeypatch.setattr(prune, "plant", look)
    with pytest.raises(Stop):
        prune.main(args_for(checkpoint, data, tmp_path / "a", "--plant", 8, "--seed", 3))
    assert seen == [(8.0, 3)]


def test_a_run_whose_measurement_was_interrupted_begins_anew(checkpoint, data, tmp_path, monkeypatch):
    """As --method all --resume runs it, which asks whether there is a checkpoint."""
    args, n = args_for(checkpoint, data, tmp_path / "a", "--method", "magnitude"), []

    def measured(*x: object) -> dict[str, list[float]]:
        n.append(1)
        if len(n) == 3:  # of what was saved
            raise KeyboardInterrupt
        return {"bits per byte": [1.0]}

    monkeypatch.setattr(prune, "measured", measured)
    monkeypatch.setattr(prune, "speeds", lambda *x: [1.0, 1.0])
    with pytest.raises(KeyboardInterrupt):
        prune.main(args)
    again = Namespace(**vars(args) | {"resume": True})
    prune.main(again)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    again.lr = 0.5
    with pytest.raises(UserError, match="has other settings: --lr was 0.01, now 0.5"):
        prune.main(again)


def test_several_processes_are_refused(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, not under torchrun"):
        prune.main(args_for(checkpoint, data, tmp_path / "a"))


def test_an_interrupted_run_leaves_nothing(checkpoint, data, tmp_path, monkeypatch):
    """Which --resume of a table would take for a finished one."""
    log = Loop.log

    def interrupted(self, step: int, **metrics: object) -> None:
        log(self, step, **metrics)
        self.signalled = step == 2

    monkeypatch.setattr(Loop, "log", interrupted)
    with pytest.raises(KeyboardInterrupt, match="in step 2"):
        prune.main(args_for(checkpoint, data, tmp_path / "a"))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"metrics.jsonl", "settings.json"}


def test_the_table_runs_every_row(tmp_path, monkeypatch):
    """Each row is a command line of its own; the row SFT is the dense model as it was."""
    seen = []

    def run(args: Namespace) -> None:
        seen.append((args.variant, args.seed))
        args.out.mkdir(parents=True)
        (args.out / "settings.json").write_text("{}")
        one = {"before": 1.0, "after": 2.0, "n": 1, "ci95": None}
        metrics = dict.fromkeys(prune.COLUMNS[1:], one)
        (args.out / "result.json").write_text(json.dumps(one | {"metrics": metrics, "seconds": 3.0,
                                                                "peak_memory_mb": 1.0}))  # fmt: skip

    args = prune.get_args(["--method", "all", "--out", str(tmp_path / "t"), "--seeds", "2"])
    original = prune.main
    monkeypatch.setattr(prune, "main", run)
    table = original(args)["rows"]
    assert [row["method"] for row in table] == ["SFT", *prune.TABLE]
    assert seen == [(name, seed) for name in prune.TABLE for seed in range(1 + (name in prune.MAIN_METHODS))]
    assert METHODS.keys() == {text.split()[0] for text in prune.TABLE}
    lines = variants_table(tmp_path / "t" / "table.json").splitlines()  # as in the README
    assert lines[0] == "| method | seeds | " + " | ".join((*prune.COLUMNS, "seconds")) + " |"
    assert len(lines) == 3 + len(prune.TABLE)


@pytest.mark.slow
def test_the_default_run_recovers_what_half_of_the_weights_were_worth(tmp_path):
    result = prune.main(prune.get_args(["--out", str(tmp_path / "out"), "--device", "cpu"]))
    metrics = result["metrics"]
    assert metrics["sparsity"]["after"] == 0.5
    assert metrics["exact match"]["after"] > metrics["pruned: exact match"]["after"] - 0.02
    assert result["after"] < metrics["pruned: bits per byte"]["after"]
