"""lora.py: at first nothing has changed, only the adapter learns, merged is adapted, peft agrees; whole runs."""

import copy
import json
import math
import re
import shutil
import statistics
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpo
import kernels
import loop as loop_module
import lora
import model as model_module
import quantize
import sft
from data import chat, world
from data.formats import UserError
from data.tokenizer import tiny
from loop import adamw, set_lr
from lora import METHODS, adapt, described, merge, parse, unmerge
from model import Config, Transformer, frozen, generate, load, read_safetensors, save, write_safetensors
from tests.oracle import oracle
from tests.test_loop import on_two_ranks

LLAMA = Config("llama", vocab_size=40, depth=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn_width=48, max_length=64,
               tied=False)  # fmt: skip
FAMILIES = {"llama": LLAMA, "qwen2": Config(**{**vars(LLAMA), "family": "qwen2", "qkv_bias": True, "tied": True}),
            "qwen3": Config(**{**vars(LLAMA), "family": "qwen3", "qk_norm": True, "head_dim": 16})}  # fmt: skip
PUT = [name for name in METHODS if name not in lora.IN_PLACE]
SAME_AT_FIRST = ("lora", "dora", "vera", "adapter", "parallel", "ia3")  # to the bit


def random_net(family: str = "llama", dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(FAMILIES[family]).to(dtype)
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return net


def disturbed(net: Transformer) -> Transformer:
    """What learns is moved, so that nothing is zero or one any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return net


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def base(tmp_path) -> Path:
    save(random_net(), None, tmp_path / "base")
    return tmp_path / "base"


# ----------------------------------------------------------------------------------------------------------------------
# The modules


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [*SAME_AT_FIRST, "lora:init=pissa", "lora:rslora=true,dropout=0.5"])
def test_at_first_nothing_has_changed(family, text):
    """L3, L9, L12, L13: to the bit, in train mode too; pissa to rounding."""
    net = random_net(family)
    before = net(ids(2, 9))
    adapt(net, text, "")
    for _ in range(2):
        after = net.train()(ids(2, 9))
        if "pissa" in text:
            torch.testing.assert_close(after, before, atol=1e-5 * before.abs().max().item(), rtol=0)
        else:
            assert torch.equal(after, before)
        net.eval()
    assert not torch.equal(disturbed(net)(ids(2, 9)), before)


@pytest.mark.parametrize(
    "text", ["lora", "lora:rank=3,alpha=7", "lora:rslora=true", "dora", "lora:targets=(q|v|up)_proj$"]
)
def test_lora_by_hand(text):
    """L1, L6, L12: (alpha / r) B A added to each matrix of its own, in a model with every matrix written out."""
    net = random_net(dtype=torch.float64)
    by_hand = copy.deepcopy(net)
    c = adapt(net, text, "")
    disturbed(net.double())
    scale = c.alpha / (math.sqrt(c.rank) if c.rslora else c.rank)
    for path, module in net.named_modules():
        if not isinstance(module, lora.LowRank):
            continue
        weight, done = by_hand.get_submodule(path).weight.data, 0
        for p, (start, end) in enumerate(module.rows.values()):
            b, a = module.up[done : done + end - start], module.down[p * c.rank : (p + 1) * c.rank]
            new = weight[start:end] + scale * b @ a
            if text == "dora":
                new = module.magnitude[done : done + end - start, None] * new / new.norm(dim=1, keepdim=True)
            weight[start:end], done = new, done + end - start
    torch.testing.assert_close(net(ids(3, 11)), by_hand(ids(3, 11)), atol=1e-6, rtol=1e-6)
    adapted = [name for m in net.modules() if isinstance(m, lora.LowRank) for name in m.rows]
    kinds = {name.rsplit(".", 1)[-1] for name in adapted}
    assert kinds == ({"q_proj", "v_proj", "up_proj"} if "targets" in text else
                     {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")})  # fmt: skip
    assert len(adapted) == 2 * len(kinds)


def test_the_scale_is_alpha_over_r():
    """Twice the rank by A and B twice over changes nothing for the same alpha / r."""
    outputs = []
    for text in ("lora:rank=2,alpha=6", "lora:rank=4,alpha=12"):
        net = random_net()
        adapt(net, text, "")
        for m in net.modules():
            if isinstance(m, lora.LoRA):
                with torch.no_grad():
                    for _, _, down, up in m.parts():
                        g = torch.Generator().manual_seed(len(up))
                        a, b = torch.randn(2, down.shape[1], generator=g), torch.randn(len(up), 2, generator=g)
                        half = 1 if m.rank == 2 else 0.5
                        down.copy_(a.repeat(m.rank // 2, 1)), up.copy_(half * b.repeat(1, m.rank // 2))
        outputs.append(net(ids(2, 7)))
    torch.testing.assert_close(*outputs)


def test_the_norm_of_dora_has_no_gradient():
    net = random_net(dtype=torch.float64)
    adapt(net, "dora", "")
    disturbed(net.double())
    m = next(m for m in net.modules() if isinstance(m, lora.DoRA))
    x = torch.randn(5, m.base.in_features, dtype=torch.float64)
    found = torch.autograd.grad(m(x).square().sum(), [m.down, m.up, m.magnitude])
    ratio, delta = [], torch.zeros(m.base.out_features, m.base.in_features, dtype=torch.float64)
    for _, rows, down, up in m.parts():
        new = m.base.weight[rows] + m.scale * up @ down
        delta = delta.index_add(0, torch.arange(rows.start, rows.stop), m.scale * up @ down)
        ratio.append(1 / new.norm(dim=1).detach())
    y = F.linear(x, m.base.weight + delta) * (m.magnitude * torch.cat(ratio))
    for ours, wanted in zip(found, torch.autograd.grad(y.square().sum(), [m.down, m.up, m.magnitude]), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_pissa_takes_the_largest_directions():
    net, plain = random_net(), random_net()
    adapt(net, "lora:init=pissa,rank=4,alpha=6", "")
    m, weight = net.blocks[1].attention.out, plain.blocks[1].attention.out.weight.detach()
    left, whole = torch.linalg.svdvals(m.base.weight), torch.linalg.svdvals(weight)
    torch.testing.assert_close(left[:28], whole[4:], atol=1e-4, rtol=0)
    assert left[28:].max() < 1e-5 and not m.base.weight.requires_grad
    assert torch.allclose(m.down.norm(dim=1) ** 2 * m.scale, whole[:4], atol=1e-4)  # even shares


def test_vera_learns_two_vectors_and_shares_the_rest():
    net = random_net()
    c = adapt(net, "vera:rank=5,alpha=10", "")
    found = [m for m in net.modules() if isinstance(m, lora.VeRA)]
    assert {name.rsplit(".", 1)[-1] for name, p in net.named_parameters() if p.requires_grad} == {"d", "b"}
    a, b = (net.blocks[i].ffn.gate_up for i in (0, 1))
    assert torch.equal(a.fixed_down, b.fixed_down) and torch.equal(a.fixed_up, b.fixed_up)
    assert all((m.d == 0.1).all() for m in found)
    disturbed(net)
    x = torch.randn(3, 32)
    for m in found[:1]:
        y = F.linear(x, m.base.weight)
        for p, (start, end) in enumerate(m.rows.values()):
            h = x @ m.fixed_down[p * 5 : p * 5 + 5].T * m.d[p * 5 : p * 5 + 5]
            y[:, start:end] += c.alpha / 5 * (h @ m.fixed_up[start:end].T) * m.b[start:end]
        torch.testing.assert_close(m(x), y)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_of_what_enters_a_and_in_training_only(kind):
    net, plain = random_net(), random_net()
    adapt(net, f"{kind}:dropout=0.4", ""), adapt(plain, kind, "")
    disturbed(net), disturbed(plain)
    x = torch.randn(4, 32)
    m, without = (some.blocks[0].ffn.gate_up for some in (net, plain))
    without.load_state_dict(m.state_dict())
    torch.testing.assert_close(m.eval()(x), without(x))
    torch.manual_seed(3)
    found = m.train()(x)
    torch.manual_seed(3)
    h = F.dropout(x, 0.4)
    assert 0.2 < (h == 0).float().mean() < 0.6
    y = F.linear(x, m.base.weight) + m.scale * torch.cat([h @ down.T @ up.T for _, _, down, up in m.parts()], dim=-1)
    torch.testing.assert_close(found, y if kind == "lora" else y * m._ratio())


def test_the_networks_of_p_tuning_and_prefix():
    """A recurrent one that reads both ways and two layers; two layers with a tanh. Only what they make is used."""
    net = random_net()
    adapt(net, "p-tuning:tokens=5", "")
    p, size = net.prompt, net.embed.weight.std()
    assert p.encoder.bidirectional and p().shape == (5, 32)
    h = p.encoder(p.embeddings[None] / size)[0][0]
    hidden = F.relu(F.linear(h, p.layers[0].weight, p.layers[0].bias))
    torch.testing.assert_close(p(), F.linear(hidden, p.layers[2].weight, p.layers[2].bias) * size)
    for i in (0, 4):  # the first hears the last, and the other way round
        assert torch.autograd.grad(p()[4 - i].sum(), p.embeddings)[0][i].abs().sum() > 0
    assert (net.embed.weight[:, None] == p.embeddings).all(-1).any(0).all()  # tokens of the vocabulary, at first
    net = random_net()
    adapt(net, "prefix:tokens=5,width=12", "")
    p = net.prefix
    hidden = torch.tanh(F.linear(p.embeddings, p.layers[0].weight, p.layers[0].bias))
    assert hidden.shape == (5, 12) and p().shape == (5, 2, 2, 2, 8)
    torch.testing.assert_close(p().flatten(1), F.linear(hidden, p.layers[2].weight, p.layers[2].bias))


def test_the_network_of_p_tuning_runs_in_fp32_where_the_rest_does_not():
    """On a CPU without AVX-512 there is no recurrent network in bf16."""
    net, seen = random_net(), []
    adapt(net, "p-tuning:tokens=5", "")
    net.prompt.encoder.register_forward_hook(lambda module, given, made: seen.append(made[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        made = net.prompt()
    assert seen == [torch.float32] and made.dtype == torch.bfloat16


def test_ia3_scales_keys_values_and_what_enters_down():
    net, plain = random_net("qwen2"), random_net("qwen2")
    adapt(net, "ia3", "")
    disturbed(net)
    qkv, down = net.blocks[0].attention.qkv, net.blocks[0].ffn.down
    x, h = torch.randn(4, 32), torch.randn(4, 48)
    q, k, v = plain.blocks[0].attention.qkv(x).split((32, 16, 16), dim=-1)
    torch.testing.assert_close(qkv(x), torch.cat([q, k * qkv.l[:16], v * qkv.l[16:]], dim=-1))
    torch.testing.assert_close(down(h), plain.blocks[0].ffn.down(h * down.l))
    assert isinstance(net.blocks[0].attention.out, nn.Linear) and isinstance(net.blocks[0].ffn.gate_up, nn.Linear)


def test_adapters_stand_behind_and_beside():
    for text in ("adapter:width=5", "parallel:width=5,alpha=3"):
        net, plain = random_net(), random_net()
        adapt(net, text, "")
        disturbed(net)
        x = torch.randn(4, 32)
        if text.startswith("adapter"):
            for found, base, y in ((net.blocks[0].attention.out, plain.blocks[0].attention.out, x),
                                   (net.blocks[0].ffn.down, plain.blocks[0].ffn.down, torch.randn(4, 48))):  # fmt: skip
                said = base(y)
                torch.testing.assert_close(found(y), said + found.up(F.gelu(found.down(said))))
        else:
            found = net.blocks[0].ffn
            torch.testing.assert_close(found(x), plain.blocks[0].ffn(x) + 3 * found.up(F.relu(found.down(x))))
            assert isinstance(net.blocks[0].attention.out, nn.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_as_good_as_words(family):
    """Soft tokens with the embeddings of words are those words: logits behind them and greedy decoding."""
    net, plain = random_net(family), random_net(family)
    words = ids(5)
    adapt(net, "prompt:tokens=5", "")
    with torch.no_grad():
        net.prompt.embeddings.copy_(plain.embed.weight[words])
    rows = ids(3, 8)
    wanted = plain(torch.cat([words.expand(3, 5), rows], dim=1))[:, 5:]
    torch.testing.assert_close(net(rows), wanted, atol=1e-5, rtol=1e-5)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
    found = generate(net, prompts, max_new_tokens=12, eos_ids=(), temperature=0.0)
    longer = generate(plain, [[*words.tolist(), *p] for p in prompts], max_new_tokens=12, eos_ids=(), temperature=0.0)
    assert found.completions == longer.completions
    torch.testing.assert_close(found.logps[found.completion_mask > 0], longer.logps[longer.completion_mask > 0],
                               atol=1e-4, rtol=0)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_the_keys_and_values_of_words(family, monkeypatch):
    """With the keys and values of words, a prefix is as good as these words; with a cache and without one."""
    net, plain = random_net(family), random_net(family)
    words, rows, seen = ids(5), ids(3, 8), []
    original = kernels.attention

    def spy(q, k, v, **options):
        seen.append((k[0].clone(), v[0].clone()))
        return original(q, k, v, **options)

    monkeypatch.setattr(kernels, "attention", spy)
    plain(words[None])
    monkeypatch.undo()
    adapt(net, "p-tuning-v2:tokens=5", "")
    with torch.no_grad():
        net.prefix.embeddings.view(net.prefix.shape).copy_(
            torch.stack([torch.stack(pair, dim=1) for pair in seen], dim=1)
        )
    wanted = plain(torch.cat([words.expand(3, 5), rows], dim=1))[:, 5:]
    torch.testing.assert_close(net(rows), wanted, atol=1e-5, rtol=1e-5)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
    found = generate(net, prompts, max_new_tokens=12, eos_ids=(), temperature=0.0, samples=2)
    longer = generate(plain, [[*words.tolist(), *p] for p in prompts], max_new_tokens=12, eos_ids=(), temperature=0.0,
                      samples=2)  # fmt: skip
    assert found.completions == longer.completions


@pytest.mark.parametrize("text", ["prompt", "prefix", "p-tuning", "p-tuning-v2", "mam", "lora", "ia3", "adapter"])
def test_cached_decoding_equals_the_whole_forward_pass(text):
    """Ragged prompts, one by one or together, and padding behind a row changes nothing."""
    net = random_net("qwen3")
    adapt(net, text, "")
    disturbed(net)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    found = generate(net, prompts, max_new_tokens=9, eos_ids=(), temperature=0.0)
    logits = net(found.input_ids).log_softmax(-1)
    logps = logits[:, :-1].gather(-1, found.input_ids[:, 1:, None])[..., 0]
    mask = found.completion_mask[:, 1:] > 0
    torch.testing.assert_close(found.logps[:, 1:][mask], logps[mask], atol=1e-4, rtol=0)
    for prompt, together in zip(prompts, found.completions, strict=True):
        assert generate(net, [prompt], max_new_tokens=9, eos_ids=(), temperature=0.0).completions == [together]


def test_what_stands_before_a_row_is_not_packed():
    net = random_net()
    adapt(net, "prompt", "")
    with pytest.raises(ValueError, match="packed"):
        net.hidden(ids(1, 6), documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="exceed the context of 48$"):
        generate(net, [[1] * 20], max_new_tokens=30, eos_ids=())  # 16 + 20 + 30 > 64


# ----------------------------------------------------------------------------------------------------------------------
# What learns


@pytest.mark.parametrize("text", [*PUT, "lora:init=pissa", "lora:dropout=0.3"])
def test_only_the_adapter_learns(text):
    """L4, oracle 10: every part of it moves, and not a byte of the rest."""
    net = random_net("qwen2")
    adapt(net, text, "")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    optimizer = adamw(net, 1e-2, 0.0)
    assert {p for group in optimizer.param_groups for p in group["params"]} == {
        p for p in net.parameters() if p.requires_grad}  # fmt: skip
    for _ in range(3):
        F.cross_entropy(net.train()(ids(4, 9)).flatten(0, 1), ids(4, 9).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in learns), name
    assert learns


def test_bitfit_gives_every_matrix_a_bias():
    net, plain = random_net("qwen2"), random_net("qwen2")
    adapt(net, "bitfit", "")
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    wanted = {f"blocks.{i}.{part}.bias" for i in (0, 1) for part in ("attention.qkv", "attention.out", "ffn.gate_up",
                                                                    "ffn.down")}  # fmt: skip
    assert names == wanted
    torch.testing.assert_close(net(ids(2, 6)), plain(ids(2, 6)))
    assert torch.equal(net.blocks[0].attention.qkv.bias, plain.blocks[0].attention.qkv.bias)


def test_fishmask_lets_the_weights_learn_that_matter_most():
    net = random_net()
    losses = [lambda i=i: F.cross_entropy(net(ids(1, 5 + i))[0], ids(1, 5 + i)[0]) for i in range(3)]
    fisher = [sum(torch.autograd.grad(loss(), p)[0].square() for loss in losses) for p in net.parameters()]
    flat = torch.cat([f.flatten() for f in fisher])
    n = round(0.1 * len(flat))
    least = flat.topk(n).values[-1]
    lora.fish_mask(net, (loss() for loss in losses), 0.1)
    before = [p.clone() for p in net.parameters()]
    optimizer = adamw(net, 1e-2, 0.0)
    for _ in range(2):
        losses[0]().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.learns for p in net.parameters()) == n
    moved = 0
    for p, old, f in zip(net.parameters(), before, fisher, strict=True):
        assert torch.equal(p[f < 0.999 * least], old[f < 0.999 * least])
        moved += int((p != old).sum())
    assert 0.5 * n < moved <= n


def test_lora_plus_lets_b_learn_faster():
    net = random_net()
    adapt(net, "lora:lora_plus=16", "")
    optimizer = adamw(net, 1e-3, 0.0)
    args = Namespace(lr=1e-3, warmup=0, schedule="constant", steps=10)
    assert set_lr(optimizer, args, 1) == 1e-3
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for m in net.modules():
        if isinstance(m, lora.LoRA):
            assert rates[id(m.up)] == pytest.approx(16e-3) and rates[id(m.down)] == pytest.approx(1e-3)


def test_the_reference_shares_the_base():
    """A frozen copy under an adapter: another adapter, the same base, in the same memory."""
    for text in PUT:
        net = random_net()
        adapt(net, text, "")
        ref = frozen(disturbed(net))
        learns = dict(net.named_parameters())
        for name, p in ref.named_parameters():
            assert (p is learns[name]) == (not learns[name].requires_grad) and not p.requires_grad, name
        for (name, a), b in zip(net.named_buffers(), ref.buffers(), strict=True):
            assert a is b, name
        before = ref(ids(2, 5))
        assert torch.equal(before, net(ids(2, 5))), text
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p += 0.5
        assert torch.equal(ref(ids(2, 5)), before) and not torch.equal(net(ids(2, 5)), before), text


# ----------------------------------------------------------------------------------------------------------------------
# QLoRA


@pytest.mark.parametrize("targets", ["(q|v)_proj$", "down_proj$"])
def test_qlora_needs_4_bits_a_weight_and_learns_on_what_they_mean(targets):
    net, plain = random_net("qwen2"), random_net("qwen2")
    adapt(net, f"qlora:targets={targets}", "")
    quantized = [m for m in net.modules() if isinstance(m, lora.NF4Linear)]
    assert len(quantized) == 4 * 2  # factors or not
    n = sum(math.prod(m.shape) for m in quantized)
    assert 8 * sum(m.n_bytes() for m in quantized) / n < 4.2
    for path, m in net.named_modules():
        if isinstance(m, lora.NF4Linear):
            linear = plain.get_submodule(path.removesuffix(".base"))
            linear.weight.data = kernels.nf4_dequantize(kernels.nf4_quantize(linear.weight.data))
    assert torch.equal(net(ids(2, 9)), plain(ids(2, 9)))
    adapt(plain, f"lora:targets={targets}", "")
    learned = dict(disturbed(net).named_parameters())
    for name, p in plain.named_parameters():
        if p.requires_grad:
            p.data.copy_(learned[name])
    grads = []
    for some in (net, plain):
        loss = F.cross_entropy(some(ids(4, 9)).flatten(0, 1), ids(4, 9).flatten())
        loss.backward()
        grads.append([loss, *(p.grad for p in some.parameters() if p.requires_grad)])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Merging, saving, loading


@pytest.mark.parametrize("text", ["lora", "lora:init=pissa", "lora:rslora=true,rank=3", "dora", "vera", "ia3", "qlora"])
def test_merged_is_adapted(text):
    """L6: to 1e-5; a second time is refused; unmerged the base has its own bytes."""
    net = random_net("qwen2")
    adapt(net, text, "")
    disturbed(net)
    bytes_before = {name: t.clone() for name, t in net.state_dict().items()}
    before = net(ids(3, 9))
    adapted = merge(net)
    assert not any(isinstance(m, lora.LowRank | lora.IA3 | lora.NF4Linear) for m in net.modules())
    torch.testing.assert_close(net(ids(3, 9)), before, atol=1e-4, rtol=1e-5)
    with pytest.raises(UserError, match="merged before"):
        merge(net)
    unmerge(net, adapted)
    assert all(torch.equal(t, bytes_before[name]) for name, t in net.state_dict().items())
    assert torch.equal(net(ids(3, 9)), before) and net.adapter.method == parse(text).method


@pytest.mark.parametrize("text", ["lora:rank=4,alpha=12", "dora", "ia3"])
def test_merging_into_a_narrow_base(text):
    """L7: W + scale B A in fp32, then cast once."""
    net = random_net(dtype=torch.bfloat16)
    adapt(net, text, "")
    disturbed(net)
    wide_net = copy.deepcopy(net).float()
    merge(wide_net), merge(net)
    for (name, p), wanted in zip(net.named_parameters(), wide_net.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, wanted.bfloat16()), name


def test_what_was_quantized_and_not_adapted_is_not_merged():
    net = random_net()
    adapt(net, "qlora:targets=q_proj$", "")
    with pytest.raises(UserError, match=r"attention\.out is quantized"):
        merge(net)
    assert net.adapter is not None and isinstance(net.blocks[0].attention.qkv, lora.LoRA)


@pytest.mark.parametrize("text", ["prompt", "prefix", "adapter", "bitfit", "mam"])
def test_what_is_no_matrix_is_not_merged(text):
    net = random_net()
    adapt(net, text, "")
    with pytest.raises(UserError, match="cannot be merged"):
        merge(net)


@pytest.mark.parametrize("text", [*PUT, "lora:init=pissa,rslora=true", "lora:targets=(q|down)_proj$,rank=2",
                                  "lora:dropout=0.25,lora_plus=3,decay=2"])  # fmt: skip
def test_a_saved_adapter_is_itself_when_it_is_loaded(base, tmp_path, text):
    net = load(base)[0]
    adapt(net, text, base)
    disturbed(net)
    save(net, None, tmp_path / "saved")
    again = load(base)[0]
    c = adapt(again, str(tmp_path / "saved"), base)
    torch.manual_seed(5)
    torch.testing.assert_close(again.eval()(ids(3, 9)), net.eval()(ids(3, 9)), atol=1e-4, rtol=1e-4)
    assert (c.method == parse(text).method) == (text not in ("prefix", "p-tuning"))
    assert c.dropout == parse(text).dropout and c.base == str(base)
    assert (c.lora_plus, c.decay) == (parse(text).lora_plus, parse(text).decay)
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    net = load(base)[0]
    adapt(net, "lora", base)
    save(net, None, tmp_path / "saved")
    other = load(base)[0]
    other.blocks[1].ffn.down.weight.data[3, 5] += 1  # one number
    assert lora.fingerprint(load(base)[0]) == lora.fingerprint(load(base, dtype=torch.bfloat16)[0])
    with pytest.raises(UserError, match="another base"):
        adapt(other, str(tmp_path / "saved"), base)
    with pytest.raises(UserError, match="has one already"):
        adapt(net, "lora", base)


@pytest.mark.parametrize(("change", "said"), [
    ({"bias": "all"}, "bias all"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 4}, "shape"),
    ({"rank_pattern": {"x": 2}}, "rank_pattern"), ({"peft_type": None}, "no configuration"),
    ({"peft_type": "LOHA"}, "LOHA"), ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
])  # fmt: skip
def test_folders_that_are_not_understood_are_refused(base, tmp_path, change, said):
    net = load(base)[0]
    adapt(net, "lora", base)
    save(net, None, tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    with pytest.raises(UserError, match=said):
        adapt(load(base)[0], str(tmp_path / "saved"), base)


def test_tensors_without_a_place_are_refused(base, tmp_path):
    """L10: of a head or an embedding that peft adapted, or one too few."""
    net = load(base)[0]
    adapt(net, "lora", base)
    save(net, None, tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    more = {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(8, 8) for x in "AB"}
    for changed in (tensors | more, {name: t for name, t in tensors.items() if "1.mlp.up_proj.lora_B" not in name}):
        write_safetensors(path, changed)
        with pytest.raises(UserError, match=r"no place for .*lm_head|1\.mlp\.up_proj\.lora_B.* is expected"):
            adapt(load(base)[0], str(tmp_path / "saved"), base)


def test_no_dropout_where_asked(base, tmp_path):
    """RL and DPO compare log-probs, also of an adapter that was trained with dropout."""
    net = load(base)[0]
    adapt(net, "lora:dropout=0.5", base)
    save(disturbed(net), None, tmp_path / "saved")
    for text in ("lora:dropout=0.5", str(tmp_path / "saved")):
        net = load(base)[0]
        assert adapt(net, text, base, dropout=False).dropout == 0.0
        disturbed(net)
        assert torch.equal(net.train()(ids(2, 9)), net.eval()(ids(2, 9)))


def test_a_fish_mask_is_found_by_lora_alone(base, checkpoint, tmp_path):
    loop = Namespace(script="sft", narrow=lambda model: None, say=print)
    with pytest.raises(UserError, match="lora.py alone"):
        adapt(load(base)[0], "fishmask", base, loop)
    flags = ["--method", "fishmask", "--weight-decay", "0.1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(UserError, match="would move all"):
        lora.main(lora.get_args([*flags, "--model", str(checkpoint), "--steps", "1", "--max-length", "128"]))


PEFT = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]}),
    "rslora": ("LoraConfig", {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "down_proj"], "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "gate_proj"],
                            "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_saved_is_loaded_here(tmp_path, family, kind):
    """Equal logits over ragged lengths, alpha not r, every tensor of the adapter random."""
    peft, transformers = oracle("peft"), oracle("transformers")
    save(random_net(family), None, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    name, options = PEFT[kind]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, getattr(peft, name)(task_type="CAUSAL_LM", **options)).eval()
    disturbed(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "base")[0]
    adapt(ours, str(tmp_path / "theirs"), "")
    rows = ids(3, 12)
    wanted = theirs(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, -12:]
    torch.testing.assert_close(ours(rows), wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("text", ["lora:rank=3,alpha=7,targets=(q|up|down)_proj$", "lora:rank=3,alpha=7,rslora=true",
                                  "lora:init=pissa,rank=3,alpha=7", "lora:init=pissa,rank=3,alpha=7,rslora=true",
                                  "dora:rank=3,alpha=7", "ia3", "prompt:tokens=5", "p-tuning:tokens=5",
                                  "prefix:tokens=5", "p-tuning-v2:tokens=5"])  # fmt: skip
def test_what_is_saved_here_peft_loads(tmp_path, family, text):
    peft, transformers = oracle("peft"), oracle("transformers")
    save(random_net(family), None, tmp_path / "base")
    ours = load(tmp_path / "base")[0]
    adapt(ours, text, tmp_path / "base")
    save(disturbed(ours), None, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    rows = ids(3, 12)
    found = theirs(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, -12:]
    torch.testing.assert_close(found, ours(rows), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(("text", "said"), [
    ("laura", "expected the folder"), ("lora:rang=3", "no rang"), ("lora:rank=x", "rank is like 8"),
    ("lora:rank=0", "at least 1"), ("lora:dropout=1", "below 1"), ("lora:init=random", "zero or pissa"),
    ("lora:rslora=maybe", "rslora"), ("fishmask:share=0", "at most 1"), ("qlora:init=pissa", "no init"),
    ("lora:init=pissa,decay=1", "took the best part"), ("lora:decay=-1", "at least 0"),
    ("lora:targets=(", "targets is like _proj"), ("ia3:targets=[", "targets is like"),
])  # fmt: skip
def test_words_that_are_not_understood(text, said):
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.mark.parametrize(("text", "said"), [
    ("lora:targets=query", "in the name of no matrix"), ("ia3:targets=query", "in the name of no matrix"),
    ("lora:init=pissa,rank=17", "rank is 17, and model.layers.0.self_attn.k_proj has 16 directions"),
])  # fmt: skip
def test_what_fits_no_matrix_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        adapt(random_net(), text, "")


def quantized(method: str) -> Transformer:
    """A model as quantize.py makes it."""
    net, c = random_net(), quantize.get_args(["--method", method, *(["--group-size", "16"] * (method == "rtn"))])
    for path, linear, _ in list(lora.linears(net)):
        def make(rows: slice, weight: Tensor = linear.weight) -> dict[str, Tensor]:
            return quantize.METHODS[method](weight.detach()[rows], None, c)

        quantize.put_quantized(net, path, make, quantize.scheme_of(c))
    net.config = replace(net.config, quantization=quantize.scheme_of(c))
    return net


@pytest.mark.parametrize("text", METHODS)
def test_what_is_quantized_takes_only_what_stands_before_rows(text):
    """Whose gradients are those of a model of the weights that the codes mean."""
    whole = random_net()
    for path, module in model_module.quantized(net := quantized("rtn")).items():
        meant = [part(torch.eye(module.in_features)).T for part in module.parts]
        whole.get_submodule(path).weight.data = torch.cat(meant)
    if text not in lora.BEFORE_ROWS:
        with pytest.raises(UserError, match=f"adapter {text}: the matrices of DIR are quantized"):
            adapt(net, text, "DIR")
        return
    grads = []
    for one in (whole, net):
        torch.manual_seed(1)
        adapt(one, text, "DIR")
        F.cross_entropy(one(ids(1, 9))[0], ids(1, 9)[0]).backward()
        grads.append([p.grad for p in one.parameters() if p.requires_grad])
    for wanted, found in zip(*grads, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="the matrices of DIR are quantized"):  # tokens of 8 bits: no gradient passes
        adapt(quantized("w8a8"), text, "DIR")


def test_it_says_how_many_bits_qlora_needs():
    net = random_net()
    said = described(net, adapt(net, "qlora:rank=2", ""))
    stored = [m for m in net.modules() if isinstance(m, lora.NF4Linear)]
    size, n = sum(m.n_bytes() for m in stored), sum(m.in_features * m.out_features for m in stored)
    rest = 4 * sum(p.numel() for p in net.parameters())
    assert f"; {8 * size / n:.2f} bits" in said and f"{(size + rest) / 1e6:.2f} MB the whole" in said
    plain = random_net()
    assert "bits" not in described(plain, adapt(plain, "lora", ""))


def test_the_estimate_of_memory_counts_what_is_packed(tmp_path, capsys):
    """Of qlora and of a quantized base: codes and scales are no parameters, and the weights that they mean are many."""
    bases = {"qlora:rank=2": random_net(), "prompt": quantized("rtn")}
    n = sum(p.numel() for p in random_net().parameters())
    for text, net in bases.items():
        adapt(net, text, "")
        net.mass = nn.Buffer(torch.zeros(5, 10**6))
        learning, rest = ([p for p in net.parameters() if p.requires_grad is learns] for learns in (True, False))
        size = sum(16 * p.numel() for p in learning) + sum(4 * p.numel() for p in rest)
        size += sum(b.numel() * b.element_size() for b in net.buffers())
        assert size > 20e6
        loop_module.Loop(lora.get_args(["--out", str(tmp_path), "--device", "cpu"]), "lora").describe(net)
        whole = n + sum(p.numel() for p in learning)
        said = capsys.readouterr().err
        assert f"lora: {whole / 1e6:.2f}M parameters ({sum(p.numel() for p in learning) / whole:.1%} of" in said
        assert f"about {size / 1e6:,.0f} MB for weights" in said


def test_it_says_what_learns():
    net = random_net()
    c = adapt(net, "lora:rank=2,targets=(q|v)_proj$", "")
    n = 2 * (2 * 2 * 32 + 2 * (32 + 16))
    whole = sum(p.numel() for p in random_net().parameters()) + n
    said = described(net, c)
    assert "blocks.*.attention.qkv" in said and f"{n:,} of {whole:,}" in said and f"{100 * n / whole:.2f}%" in said
    assert f"{8 * n / 1e6:.2f} MB" in said


# ----------------------------------------------------------------------------------------------------------------------
# The task


def test_the_new_task_is_to_sort_the_other_way():
    """Every answer is right, no question of the test is trained on, and the known task has another name only."""
    args = lora.get_args(["--steps", "30", "--batch-size", "8"])
    rows, test = lora.examples(args, tiny(), None)
    texts = [tiny().decode(row.input_ids) for row in rows]
    assert len(rows) == 240 and len(set(texts)) > 200 and all("rank " in text for text in texts)
    assert [row["part"] for row in test["questions"][:400]] == ["task"] * 400
    assert all("rank " in row["messages"][0]["content"] for row in test["questions"][:400])
    assert test["questions"][400:] == world.sft_test(20)
    for task, word, falling in (("new", "rank", True), ("known", "arrange", False)):
        asked = {"train": set(), "test": set()}
        for split, questions in asked.items():
            for i in range(200):
                row = lora.exchange(task, (split, i), split)
                operands = re.search(rf"{word} ((\d+ ?)+)", row["messages"][0]["content"])[1].split()
                assert row["answer"] == row["messages"][1]["content"] == " ".join(
                    sorted(operands, reverse=falling)), row  # fmt: skip
                questions.add(tuple(operands))
        assert not asked["train"] & asked["test"] and len(asked["train"]) > 150
        known_as = world.HELD_BACK if task == "new" else world.SKILLS["sort"]  # as the base model's text is split
        assert {split: {world.split_of(known_as.task.format(x=" ".join(operands))) for operands in questions}
                for split, questions in asked.items()} == {"train": {"train"}, "test": {"test"}}  # fmt: skip
    assert lora.exchange("new", (0, 1), "train") != lora.exchange("new", (1, 1), "train")
    other = lora.examples(lora.get_args(["--steps", "1", "--task", "known", "--seed", "3"]), tiny(), None)[0]
    assert all("arrange " in tiny().decode(row.input_ids) for row in other)
    other = lora.examples(lora.get_args(["--steps", "1", "--seed", "3"]), tiny(), None)[0]
    assert len({str(row.input_ids) for row in other} & {str(row.input_ids) for row in rows}) < 5


def test_settings_are_chosen_on_other_questions():
    """Of the same kinds and as many, but none that the tables are made of and none that is trained on."""
    of = {which: lora.examples(lora.get_args(["--steps", "30", "--questions", which]), tiny(), None)
          for which in ("test", "validation")}  # fmt: skip
    assert of["test"][0] == of["validation"][0]  # the same rows are trained on
    parts = {which: Counter(row["part"] for row in test["questions"]) for which, (_, test) in of.items()}
    asked = {which: {row["messages"][0]["content"] for row in test["questions"]} for which, (_, test) in of.items()}
    assert not asked["test"] & asked["validation"]
    trained = "\n".join(tiny().decode(row.input_ids) for row in of["test"][0])
    assert not any(question in trained for question in asked["validation"])
    assert parts["validation"]["task"] > 390 and set(parts["validation"]) == set(parts["test"])
    assert lora.get_args([]).questions == "test"


def test_the_best_rate_is_the_least_that_is_enough():
    rows = [("SFT", 1.0, 1.0), ("lora:lr=0.5", 0.87, 0.9), ("lora:lr=1", 0.883, 0.1), ("lora:lr=4", 0.9, 0.5),
            ("lora:lr=2", 0.881, 0.5), ("full:lr=0.2", 0.7, 0.1), ("full:lr=0.1", 0.7, 0.0), ("full:lr=60", 0.6, 1.0),
            ("lora:rank=2,lr=3", 0.1, 1.0)]  # fmt: skip
    rows = [{"method": name, "task": {"mean": x}, "old skills": {"mean": y}} for name, x, y in rows]
    assert lora.tuned(rows) == {"lora": 1.0, "full": 0.1, "lora:rank=2": 3.0}
    assert lora.tuned([rows[0], rows[3], rows[4]]) == {"lora": 4.0}  # 0.881 is below 98% of 0.9


def test_what_is_measured(monkeypatch):
    found = {"exact match": [1.0, 0.0], "task": [1.0], "sort": [0.0]}
    monkeypatch.setattr(sft, "evaluate", lambda *_: found)
    measured = [lora.measured(None, None, {}, Namespace(data=data), None) for data in (None, "rows.jsonl")]
    assert list(measured[0].items()) == [("task", [1.0]), ("old skills", [1.0, 0.0])] and measured[1] is found


def test_full_fine_tuning_is_what_to_beat(tmp_path, monkeypatch):
    """From the committed table, where the run is like that of the table."""
    monkeypatch.setattr(lora, "ROOT", tmp_path)
    assert lora.stored(lora.get_args([])) == {}
    (tmp_path / "results" / "tables").mkdir(parents=True)
    rows = [{"method": name, "task": {"mean": x}, "old skills": {"mean": x / 2}}
            for name, x in (("SFT", 0.0), ("full", 0.9), ("lora", 0.8))]  # fmt: skip
    (tmp_path / "results" / "tables" / "lora.json").write_text(json.dumps({"rows": rows}))
    assert list(lora.stored(lora.get_args([])).values()) == [0.9, 0.45]
    for flags in (("--task", "known"), ("--model", "x"), ("--model", "x", "--data", "y"), ("--steps", "5"),
                  ("--batch-size", "5"), ("--questions", "validation")):  # fmt: skip
        assert lora.stored(lora.get_args([*flags])) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Transformer(Config.from_depth(2, tiny().vocab_size, 160))
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 3  # so that token probabilities differ
    save(model, tiny(), folder)
    return folder


ROWS = [{"prompt": f"Count to {i}." + " Please." * (i % 3), "completion": "one two three " * (i % 4) + f"{i}."}
        for i in range(8)]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    """Answers of very different lengths."""
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def args_for(checkpoint: Path, data: Path, out: Path, *flags: object) -> Namespace:
    argv = ["--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", "--max-length", 128, "--lr", 1e-2,
            "--batch-size", 8, "--micro-batch-size", 8, "--steps", 4, "--warmup", 2, "--log-every", 1,
            *flags]  # fmt: skip
    return lora.get_args(list(map(str, argv)))


def train(checkpoint: Path, data: Path, out: Path, *flags: object) -> dict:
    return lora.main(args_for(checkpoint, data, out, *flags))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def learned(out: Path) -> dict[str, Tensor]:
    """What learned, as a resume needs it."""
    tensors = read_safetensors(out / "checkpoint" / "training.safetensors")
    return {name: t for name, t in tensors.items() if name.startswith("model.")}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def row_loss(logits: Tensor, row) -> Tensor:
    """The sum of -log p over the trained tokens; logits (T, V)."""
    logps = logits.log_softmax(-1)
    return -sum(logps[t - 1, row.input_ids[t]] for t, trained in enumerate(row.completion_mask) if trained)


class LoRAByHand:
    """W + 5/3 B A for every matrix of the checkpoint's own, with A normal of variance 1 / in and B zero."""

    text = "lora:rank=3,alpha=5,lora_plus=4,decay=7"

    def __init__(self, model: Transformer):
        self.model, self.parts = model, {}
        c, of = model.config, "base_model.model.model.layers"
        heads = [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)]
        for i in range(c.depth):
            for path, names, sizes in (
                ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), heads),
                ("attention.out", ("self_attn.o_proj",), [c.width]),
                ("ffn.gate_up", ("mlp.gate_proj", "mlp.up_proj"), [c.ffn_width] * 2),
                ("ffn.down", ("mlp.down_proj",), [c.width]),
            ):
                weight = f"blocks.{i}.{path}.weight"
                n_in = model.get_parameter(weight).shape[1]
                a = (torch.randn(3 * len(names), n_in) / math.sqrt(n_in)).split(3)
                self.parts[weight] = [(f"{of}.{i}.{name}", x.requires_grad_(), torch.zeros(n, 3, requires_grad=True))
                                      for name, x, n in zip(names, a, sizes, strict=True)]  # fmt: skip

    def logits(self, ids: Tensor) -> Tensor:
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, parts in self.parts.items():
            weights[name] = weights[name] + 5 / 3 * torch.cat([b @ a for _, a, b in parts])
        return torch.func.functional_call(self.model, weights, (ids,))[0]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.lora_{x}.weight": t for parts in self.parts.values() for name, a, b in parts
                for x, t in (("A", a), ("B", b))}  # fmt: skip


class PromptByHand:
    """Five embeddings before every row, at first those of tokens drawn from the vocabulary."""

    text = "prompt:tokens=5"

    def __init__(self, model: Transformer):
        self.model = model.requires_grad_(False)
        self.prompt = model.embed.weight[torch.randint(model.config.vocab_size, (5,))].clone().requires_grad_()

    def logits(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompt, self.model.embed(ids[0])])[None]
        return self.model.head(self.model.hidden(ids, embeddings=x))[0, 5:]

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prompt}


@pytest.mark.parametrize("kind", [LoRAByHand, PromptByHand])
def test_a_run_is_a_plain_loop(checkpoint, data, tmp_path, kind):
    """Loss a token, schedule, rates and decay of A and B, clipping, AdamW, and what the folder then holds."""
    out = tmp_path / "out"
    flags = ("--method", kind.text, "--grad-clip", 0.2, "--weight-decay", 0.3, "--micro-batch-size", 3, "--steps", 5)
    args = args_for(checkpoint, data, out, *flags)
    result, model, file_bytes = lora.main(args), load(checkpoint)[0], (checkpoint / "model.safetensors").read_bytes()
    roles = {"prompt": "user", "completion": "assistant"}
    rows = [chat.render([{"role": roles[k], "content": v} for k, v in row.items()], tiny()) for row in ROWS]
    n_tokens = sum(sum(row.completion_mask) for row in rows)
    loop_module.Loop(args, "lora")  # which seeds
    mine = kind(model)
    groups = [{"params": [t], "lr_times": 4.0 if "lora_B" in name else 1.0,
               "weight_decay": 7.3 if "lora" in name else 0.3} for name, t in mine.tensors().items()]  # fmt: skip
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95)), []
    for step in range(1, 7):
        optimizer.zero_grad()
        loss = sum(row_loss(mine.logits(torch.tensor([row.input_ids])), row) for row in rows) / n_tokens
        losses.append(loss.item())
        if step == 6:
            break
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(mine.tensors().values()), 0.2)
        line, rate = logged(out)[step - 1], 1e-2 * (step / 2 if step <= 2 else 1 - (step - 3) / 3)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["lr"] == pytest.approx(rate) and norm > 0.2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_times"]
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert difference(read_safetensors(out / "checkpoint" / "adapter_model.safetensors"), mine.tensors()) < 2e-4
    assert result["before"] == pytest.approx(losses[0], rel=1e-5)
    assert result["after"] == pytest.approx(losses[-1], rel=1e-4)
    learns, whole = (sum(t.numel() for t in some) for some in (mine.tensors().values(), model.parameters()))
    for name, before, after in (("trainable %", 100.0, 100 * learns / whole),
                                ("optimizer MB", 8e-6 * whole, 8e-6 * learns)):  # fmt: skip
        assert result["metrics"][name]["before"] == pytest.approx(before)
        assert result["metrics"][name]["after"] == pytest.approx(after)
    assert result["metric"] == "loss" and not result["higher_is_better"] and result["variant"] == kind.text
    assert (checkpoint / "model.safetensors").read_bytes() == file_bytes


@pytest.mark.parametrize("text", ["lora", "prefix", "fishmask"])
def test_splitting_a_batch_changes_nothing(checkpoint, data, tmp_path, text):
    """Ragged rows in one forward pass, in three and one by one: the same loss, gradient norm and weights."""
    found = []
    for size in (8, 3, 1):
        out = tmp_path / str(size)
        train(checkpoint, data, out, "--method", text, "--micro-batch-size", size, "--lr", 1e-3)
        weights = load(out / "checkpoint")[0].state_dict() if text == "fishmask" else learned(out)
        found.append((logged(out), weights))
    for lines, weights in found[1:]:
        for a, b in zip(found[0][0], lines, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["lr"] == a["lr"]
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert difference(found[0][1], weights) < 1e-4


RANKS = ("--steps", 3, "--batch-size", 5, "--micro-batch-size", 2, "--lr", 1e-3)


def on_a_rank(rank: int, folder: Path) -> None:
    for text in ("lora", "p-tuning"):
        train(folder / "model", folder / "rows.jsonl", folder / f"{text}-2", "--method", text, *RANKS)


def test_two_ranks_equal_one(checkpoint, data, tmp_path):
    """5 rows a step: of 3 and 2, so that one rank has an empty micro-batch. What is random at first is alike."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    for text in ("lora", "p-tuning"):
        one = train(checkpoint, data, tmp_path / text, "--method", text, *RANKS)
        for a, b in zip(logged(tmp_path / text), logged(tmp_path / f"{text}-2"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert difference(learned(tmp_path / text), learned(tmp_path / f"{text}-2")) < 1e-4
        two = json.loads((tmp_path / f"{text}-2" / "result.json").read_text())
        assert two["after"] == pytest.approx(one["after"], rel=1e-4)


class Stop(Exception): ...


class StopsAfterThree(loop_module.Loop):
    def save(self, step, **kept):
        super().save(step, **kept)
        if step == 3:
            raise Stop


@pytest.mark.parametrize("text", ["lora:dropout=0.3,lora_plus=4", "dora", "prefix", "lora:init=pissa", "qlora", "vera",
                                  "fishmask"])  # fmt: skip
def test_resuming_is_exact(checkpoint, data, tmp_path, monkeypatch, text):
    """Also where the folder holds only what a network made, or twice the rank; the folder is that of an adapter."""
    flags = ("--method", text, "--steps", 5, "--save-every", 1, "--batch-size", 3)
    whole = train(checkpoint, data, tmp_path / "whole", *flags)
    monkeypatch.setattr(lora, "Loop", StopsAfterThree)
    with pytest.raises(Stop):
        train(checkpoint, data, tmp_path / "parts", *flags)
    monkeypatch.undo()
    parts = train(checkpoint, data, tmp_path / "parts", *flags, "--resume")
    assert all(parts[name] == whole[name] for name in ("before", "after", "n", "ci95", "metrics"))
    assert [line["step"] for line in logged(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    folders = [tmp_path / name / "checkpoint" for name in ("whole", "parts")]
    stored = "model.safetensors" if text == "fishmask" else "adapter_model.safetensors"
    assert len({(folder / stored).read_bytes() for folder in folders}) == 1
    if text == "fishmask":
        before = load(checkpoint)[0].state_dict()
        moved = sum(int((p != before[name]).sum()) for name, p in load(folders[0])[0].named_parameters())
        assert 0 < moved <= 0.051 * sum(p.numel() for p in load(checkpoint)[0].parameters())
        assert whole["metrics"]["trainable %"]["after"] == pytest.approx(5, abs=0.01)
        assert len({whole["metrics"]["optimizer MB"][when] for when in ("before", "after")}) == 1  # of all
        return
    assert difference(learned(tmp_path / "whole"), learned(tmp_path / "parts")) == 0
    names = {file.name for file in folders[1].iterdir()}
    assert {"adapter_config.json", "base.json", "tokenizer.json", "training.json"} < names
    assert not {"model.safetensors", "config.json"} & names
    tensors = read_safetensors(folders[1] / stored)
    if text == "prefix":
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {"prompt_embeddings": (16, 2 * 2 * 32)}
    if "pissa" in text:
        assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {16}
    net = load(checkpoint)[0]  # what the folder says is what was measured at the end
    adapt(net, str(folders[1]), checkpoint)
    args = args_for(checkpoint, data, tmp_path / "again", "--method", text)
    test = lora.examples(args, tiny(), loop := loop_module.Loop(args, "lora"))[1]
    assert statistics.fmean(sft.evaluate(net, tiny(), test, args, loop)["loss"]) == pytest.approx(whole["after"], 1e-4)


def test_going_on_with_a_trained_adapter(checkpoint, data, tmp_path):
    """--adapter FOLDER begins where that run ended, and is called what it is."""
    first = train(checkpoint, data, tmp_path / "first", "--method", "dora")
    more = train(checkpoint, data, tmp_path / "more", "--adapter", tmp_path / "first" / "checkpoint")
    assert more["before"] == pytest.approx(first["after"], rel=1e-4)
    assert more["after"] < more["before"] < first["before"] and more["variant"] == first["variant"] == "dora"


def test_measuring_on_the_way_changes_nothing(checkpoint, data, tmp_path, capsys):
    train(checkpoint, data, tmp_path / "quiet", "--method", "lora:dropout=0.3")
    assert "step 2:" not in capsys.readouterr().err
    train(checkpoint, data, tmp_path / "out", "--method", "lora:dropout=0.3", "--eval-every", 2)
    assert re.findall(r"step (\d): loss \d\.\d\d\d", capsys.readouterr().err) == ["2"]  # the end has its own line
    assert difference(learned(tmp_path / "quiet"), learned(tmp_path / "out")) == 0


def test_forward_passes_are_in_dtype(checkpoint, data, tmp_path):
    for text in ("qlora", "prefix", "bitfit"):
        wide, narrow = (
            train(checkpoint, data, tmp_path / f"{text}-{dtype}", "--method", text, "--steps", 1, "--dtype", dtype)
            for dtype in ("fp32", "bf16")
        )
        assert narrow["after"] != wide["after"] and narrow["after"] == pytest.approx(wide["after"], rel=0.02)
        assert all(t.dtype == torch.float32 for t in learned(tmp_path / f"{text}-bf16").values())


def test_only_what_learns_is_wide(checkpoint, capsys, tmp_path):
    """With a loop, frozen matrices are kept in --dtype, and a line says what learns."""
    args = lora.get_args(["--dtype", "bf16", "--device", "cpu", "--out", str(tmp_path)])
    for text in ("lora", "parallel", "prompt"):
        net = load(checkpoint)[0]
        c = adapt(net, text, checkpoint, loop_module.Loop(args, "lora"))
        for name, p in net.blocks.named_parameters():
            narrow = p.ndim == 2 and not p.requires_grad
            assert p.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert described(net, c) in capsys.readouterr().err
        assert net.embed.weight.dtype == torch.float32


# Merging


@pytest.mark.parametrize("dtype, key", [("float32", "torch_dtype"), ("bfloat16", "torch_dtype"), ("bfloat16", "dtype")])
def test_merge_writes_a_plain_checkpoint(tmp_path, capsys, dtype, key):
    """L7: in fp32, then cast once to the dtype of the base; transformers agrees; the share that it keeps is said."""
    transformers = oracle("transformers")
    save(random_net("llama", getattr(torch, dtype)), None, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({key: dtype} | {k: v for k, v in config.items() if k != "torch_dtype"})
    )
    net = load(tmp_path / "base")[0]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapt(net, "lora:rank=4,alpha=12", tmp_path / "base")
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += 0.01 * torch.randn_like(p)
    save(net, None, tmp_path / "adapter")
    flags = ["--merge", "--model", "base", "--adapter", "adapter", "--out", "out", "--device", "cpu", "--dtype", "bf16"]
    flags = [str(tmp_path / x) if x in ("base", "adapter", "out") else x for x in flags]
    kept = lora.main(lora.get_args(flags))["kept"]
    said = capsys.readouterr().err
    changes = lost = 0.0
    found = read_safetensors(tmp_path / "out" / "model.safetensors")
    for name, m in net.named_modules():
        if isinstance(m, lora.LowRank):
            for theirs, rows, down, up in m.parts():
                wanted = before[f"{name}.weight"][rows] + 3 * (up @ down).detach()
                assert torch.equal(found[f"{theirs}.weight"], wanted.to(getattr(torch, dtype))), theirs
                changes += (wanted - before[f"{name}.weight"][rows]).square().sum().item()
                lost += (wanted - found[f"{theirs}.weight"].float()).square().sum().item()
    assert all(t.dtype == getattr(torch, dtype) for t in found.values())
    assert kept == pytest.approx(1 - math.sqrt(lost / changes), abs=1e-5)
    assert (kept > 0.999) if dtype == "float32" else (0.3 < kept < 0.97)
    assert f"in {dtype}, which keeps {kept:.1%} of the change" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    wanted, rows = net(ids(3, 12)), ids(3, 12)
    loose = 1e-4 if dtype == "float32" else 0.1 * wanted.std().item()
    torch.testing.assert_close(theirs.float()(input_ids=rows).logits, wanted, atol=loose, rtol=1e-4)
    torch.testing.assert_close(load(tmp_path / "out")[0](rows), wanted, atol=loose, rtol=1e-4)
    assert (wanted - random_net("llama", getattr(torch, dtype)).float()(rows)).abs().max() > 3 * loose


def test_a_merged_checkpoint_has_the_tokenizer(checkpoint, data, tmp_path):
    train(checkpoint, data, tmp_path / "run", "--method", "lora")
    shutil.copytree(checkpoint, tmp_path / "whole" / "checkpoint")  # --model may be the folder of a run
    flags = ["--merge", "--model", tmp_path / "whole", "--adapter", tmp_path / "run" / "checkpoint",
             "--out", tmp_path / "out"]  # fmt: skip
    lora.main(lora.get_args(list(map(str, flags))))
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.encode("a b") == tiny().encode("a b")
    net = load(checkpoint)[0]
    adapt(net, str(tmp_path / "run" / "checkpoint"), checkpoint)
    torch.testing.assert_close(model(ids(2, 9)), net(ids(2, 9)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "out"), [
    ("run/checkpoint", "run"), ("out/adapter_config.json", "out"), ("out/model.safetensors.index.json", "out"),
    ("base/config.json", "base"), ("base/checkpoint/config.json", "base/checkpoint"),
])  # fmt: skip
def test_a_merge_writes_over_nothing(tmp_path, name, out):
    """Neither over the base, nor into a run or an adapter, nor beside the index of a checkpoint in parts."""
    for path in (tmp_path / name, tmp_path / "base" / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    args = Namespace(model=str(tmp_path / "base"))
    with pytest.raises(UserError, match="choose another folder for the merged checkpoint"):
        lora.merged_checkpoint(None, None, args, Namespace(out=tmp_path / "base" / ".." / out))


def test_the_chat_format_holds_for_all_that_a_run_renders(checkpoint, tmp_path, monkeypatch):
    """Of the generated world, too."""
    class Stop(Exception): ...

    def examples(args: Namespace, tokenizer, loop) -> None:
        raise Stop(tokenizer.chat_format)

    monkeypatch.setattr(lora, "examples", examples)
    with pytest.raises(Stop, match="qwen2.5"):
        lora.main(lora.get_args(["--model", str(checkpoint), "--out", str(tmp_path / "out"), "--max-length", "128",
                                 "--device", "cpu", "--chat-format", "qwen2.5"]))  # fmt: skip


def test_a_prompt_cannot_be_merged_and_says_so(checkpoint, data, tmp_path):
    train(checkpoint, data, tmp_path / "run", "--method", "prompt", "--steps", 1)
    flags = ["--merge", "--model", checkpoint, "--adapter", tmp_path / "run" / "checkpoint", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="prompt is no matrix"):
        lora.main(lora.get_args(list(map(str, flags))))
    assert not (tmp_path / "out").exists()


# The table


def result_of(args: Namespace, task: str) -> dict:
    x = len(args.method) + args.seed + (task == "known")
    names = ("old skills", "trainable %", "optimizer MB")
    return {"before": 0.0, "after": x, "n": 2, "ci95": 0.5, "seconds": 1.0, "peak_memory_mb": 100.0 + x,
            "metrics": {name: {"before": 1.0, "after": x + i} for i, name in enumerate(names)}}  # fmt: skip


def test_a_table_of_all_methods(tmp_path, monkeypatch, capsys):
    """A row a method, on both tasks, each at its own rate; seeds of the main ones; what is finished is kept."""
    runs = []

    class Inline:
        exitcode = 0

        def __init__(self, target, args):
            self.target, self.args = target, args

        def start(self):
            self.target(*self.args)

        def join(self): ...

    def main(args: Namespace) -> None:
        runs.append(args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result_of(args, args.task)))
        (args.out / "settings.json").write_text(json.dumps(loop_module._identity(args)))
        print("a run's own words")

    args = lora.get_args(["--method", "all", "--out", str(tmp_path), "--seeds", "2"])
    whole = lora.main
    monkeypatch.setattr(lora, "main", main)
    monkeypatch.setattr(lora.multiprocessing, "get_context", lambda kind: Namespace(Process=Inline))
    table = whole(args)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    kept = next(name for name in lora.TABLE if "decay" in name)
    wanted = [("SFT", 1), *((name, 2 if name in ("full", "lora", kept, "qlora") else 1) for name in lora.TABLE)]
    assert [(row["method"], row["seeds"]) for row in table["rows"]] == wanted
    assert {name.partition(":")[0] for name in lora.TABLE} == set(METHODS)
    for row in table["rows"]:
        assert set(row) == {"method", "seeds", "seconds", "task", "old skills", "known task", "trainable %",
                            "optimizer MB", "peak MB"}  # fmt: skip
        if row["method"] != "SFT":
            x = len(row["method"]) + 0.5 * (row["seeds"] - 1)
            assert row["task"]["mean"] == row["old skills"]["mean"] == x and row["known task"]["mean"] == x + 1
            assert row["optimizer MB"]["mean"] == x + 2 and row["peak MB"]["mean"] == 100 + x
    for one in runs:
        assert one.lr == pytest.approx(1e-4 * parse(one.method).lr) and not one.resume
    assert [(one.task, one.method, one.seed) for one in runs[:4]] == [
        ("known", "full", 0), ("new", "full", 0), ("known", "full", 1), ("new", "full", 1)]  # fmt: skip
    assert len({one.out for one in runs}) == len(runs) == 2 * sum(n for _, n in wanted[1:])
    assert "own words" not in (said := capsys.readouterr().out)
    assert [line.split()[0] for line in said.splitlines()] == ["method", "SFT", *lora.TABLE]
    lora.quiet(runs[0])  # what a process of its own says on stdout, nobody redirects
    assert runs.pop() is runs[0] and not capsys.readouterr().out
    (tmp_path / "vera-0" / "result.json").unlink()
    again = whole(lora.get_args(["--method", "all", "--out", str(tmp_path), "--seeds", "2", "--resume"]))
    assert again["rows"] == table["rows"] and [one.method for one in runs[-2:]] == ["vera", "vera"]
    monkeypatch.setattr(Inline, "exitcode", 3)
    with pytest.raises(loop_module.RunFailed, match="full on the known task ended with exit code 3"):
        whole(lora.get_args(["--method", "all", "--out", str(tmp_path / "fails")]))


def test_a_table_of_rates(tmp_path, monkeypatch, capsys):
    """A run for each rate of each method, on validation questions, and the best rates in the end."""
    runs = []

    def main(args: Namespace) -> None:
        runs.append(args)
        args.out.mkdir(parents=True)
        (args.out / "result.json").write_text(json.dumps(result_of(args, "new") | {"after": 1 - 99 * args.lr}))

    whole = lora.main
    monkeypatch.setattr(lora, "main", main)
    whole(lora.get_args(["--tune", "lora", "full", "--out", str(tmp_path)]))
    wanted = [(name, rate) for name in ("full", "lora", lora.KEEPS) for rate in lora.RATES[name]]
    names = {"full": "full:", "lora": "lora:", lora.KEEPS: f"{lora.KEEPS},"}
    assert [one.method for one in runs] == [f"{names[name]}lr={rate:g}" for name, rate in wanted]
    assert [one.lr for one in runs] == pytest.approx([1e-4 * rate for _, rate in wanted])
    assert all(one.questions == "validation" and one.tune is None for one in runs)
    least = [f"{before}lr={min(lora.RATES[name]):g} is enough" for name, before in names.items()]
    assert capsys.readouterr().out.splitlines()[-3:] == least
    del runs[:]
    whole(lora.get_args(["--tune", "full", "--out", str(tmp_path / "full")]))
    assert [one.method.partition(":")[0] for one in runs] == ["full"] * len(lora.RATES["full"])
    whole(lora.get_args(["--tune", "--out", str(tmp_path / "all")]))
    assert len(runs) == len(lora.RATES["full"]) + len(wanted)


# Flags


def test_default_rates_are_those_of_full_fine_tuning_times_the_methods(checkpoint, data, tmp_path):
    """--lr is taken as it is; a folder has the rate of its method."""
    train(checkpoint, data, tmp_path / "run", "--method", "vera", "--steps", 1)
    folder, model = str(tmp_path / "run" / "checkpoint"), ("--model", str(checkpoint))
    for method, (_, hyper) in METHODS.items():
        assert lora.get_args(["--method", method]).lr == pytest.approx(1e-4 * hyper["lr"])
        assert lora.get_args(["--method", method, *model]).lr == pytest.approx(1e-5 * hyper["lr"])
        assert lora.get_args(["--method", method, "--lr", "0.3"]).lr == 0.3
    given = {("--method", "lora:lr=7"): 7, ("--adapter", "dora:lr=3"): 3, ("--adapter", "prompt:lr=100"): 100,
             ("--adapter", folder): METHODS["vera"][1]["lr"]}  # fmt: skip
    for flags, times in given.items():
        assert lora.get_args([*flags]).lr == pytest.approx(1e-4 * times)
        assert lora.get_args([*flags, "--lr", "0.3"]).lr == 0.3
        if flags[0] == "--adapter":
            assert sft.get_args([*flags]).lr == pytest.approx(1e-3 * times)
            assert sft.get_args([*flags, "--lr", "0.3"]).lr == 0.3
            assert dpo.get_args([*flags]).lr == pytest.approx(dpo.get_args([]).lr * times)
            assert dpo.get_args([*flags, *model]).lr == pytest.approx(dpo.get_args([*model]).lr * times)
            assert dpo.get_args([*flags, "--lr", "0.3"]).lr == 0.3
    args, of_model = lora.get_args([]), lora.get_args([*model, "--data", "x"])
    assert (args.batch_size, args.micro_batch_size, args.max_length, args.steps) == (32, 32, 128, 300)
    assert (of_model.batch_size, of_model.micro_batch_size, of_model.max_length) == (16, 4, 1024)
    assert of_model.steps is None and lora.get_args(["--method", "all"]).lr is None


@pytest.mark.parametrize(("flags", "said"), [
    (("--merge",), "--merge needs"), (("--merge", "--model", "x"), "--merge needs"),
    (("--merge", "--adapter", "x"), "--merge needs"),
    (("--method", "all", "--data", "x.jsonl"), "--method all makes a table of the generated world"),
    (("--method", "all", "--adapter", "lora"), "--method all makes a table of all methods"),
    (("--tune", "--data", "x.jsonl"), "--tune makes a table of the generated world"),
    (("--tune", "lora", "--adapter", "lora"), "--tune makes a table of all methods"),
    (("--parallel", "fsdp"), "--parallel fsdp"), (("--method", "laura"), "adapter laura"),
    (("--method", "laura", "--lr", 1), "adapter laura"), (("--adapter", "no/folder"), "expected the folder"),
    (("--method", "lora:rank=0", "--lr", 1), "at least 1"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        lora.get_args(list(map(str, flags)))


def test_rows_and_models_that_do_not_fit_are_refused(checkpoint, data, tmp_path):
    with pytest.raises(UserError, match="--max-length 161"):
        train(checkpoint, data, tmp_path / "out", "--max-length", 161)
    with pytest.raises(UserError, match="--max-length is 8"):
        train(checkpoint, data, tmp_path / "out", "--max-length", 8)
    with pytest.raises(UserError, match="no row is left"):
        train(checkpoint, data, tmp_path / "out", "--max-length", 8, "--too-long", "drop")
    for flags, said in (((), "--max-length is 8"), (("--too-long", "drop"), "no row is left")):  # the world's rows
        with pytest.raises(UserError, match=said):
            lora.examples(lora.get_args(["--max-length", "8", "--steps", "1", *flags]), tiny(), Namespace(say=print))


def test_it_says_which_modules_learn():
    for text, where in (("full", "the weights themselves"), ("prefix", "prefix"), ("prompt", "prompt"),
                        ("ia3", "blocks.*.attention.qkv, blocks.*.ffn.down"), ("parallel", "blocks.*.ffn"),
                        ("mam", "blocks.*.ffn, prefix")):  # fmt: skip
        net = random_net()
        said = described(net, adapt(net, text, ""))
        learns, whole = (sum(p.numel() for p in net.parameters() if p.requires_grad or every) for every in (0, 1))
        assert said == (f"{text} on {where}: {learns:,} of {whole:,} parameters learn ({learns / whole:.2%}), "
                        f"{8e-6 * learns:.2f} MB for Adam")  # fmt: skip
    texts = []
    for text in ("lora:targets=o_proj$", "qlora:targets=o_proj$"):  # quantized weights are counted, too
        net = random_net()
        texts.append(described(net, adapt(net, text, "")))
    assert texts[1].partition(";")[0] == "q" + texts[0]


# Other scripts


def flags_of(checkpoint: Path, data: Path, out: Path, *flags: object) -> list[str]:
    argv = ("--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", "--max-length", 128, "--steps", 3,
            "--batch-size", 4, "--micro-batch-size", 4, "--warmup", 0, "--lr", 1e-2, "--log-every", 1, *flags)
    return list(map(str, argv))


@pytest.mark.parametrize("flags", [("--adapter", "lora:rank=2"), ("--adapter", "prefix", "--no-pack")])
def test_sft_with_an_adapter(checkpoint, data, tmp_path, flags):
    """An adapter folder that is the trained model; the base is not touched."""
    file_bytes = (checkpoint / "model.safetensors").read_bytes()
    args = sft.get_args(flags_of(checkpoint, data, tmp_path / "out", *flags))
    result = sft.main(args)
    assert result["after"] < result["before"] - 0.1
    assert (checkpoint / "model.safetensors").read_bytes() == file_bytes
    assert not (tmp_path / "out" / "checkpoint" / "model.safetensors").exists()
    net = load(checkpoint)[0]
    adapt(net, str(tmp_path / "out" / "checkpoint"), checkpoint)
    loop = loop_module.Loop(args, "sft")
    rows = [sft.encode(row, tiny()) for row in ROWS]
    found = sft.evaluate(net, tiny(), {"rows": rows}, args, loop)["loss"]
    assert statistics.fmean(found) == pytest.approx(result["after"], rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--no-pack", "--neftune", 5)])
def test_a_prompt_is_refused_before_packed_rows(checkpoint, data, tmp_path, flags):
    with pytest.raises(UserError, match="--no-pack"):
        sft.main(sft.get_args(flags_of(checkpoint, data, tmp_path / "out", "--adapter", "prompt", *flags)))


@pytest.mark.parametrize("text", ["lora", "dora", "prefix"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dpo_with_an_adapter(checkpoint, tmp_path, monkeypatch, text, precision):
    """ln 2 at first; the reference has an adapter of its own on a base that both share, not a byte of which changes.

    In bf16 to 2e-4: kernels.rms_norm rounds otherwise without a gradient, which bf16 may make a last place.
    """
    rows = [row | {"chosen": row["completion"], "rejected": f"no {i}" * (1 + i % 3)} for i, row in enumerate(ROWS)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    made, file_bytes = [], (checkpoint / "model.safetensors").read_bytes()

    def watched(model: Transformer) -> Transformer:
        made.append((model, copy_of := frozen(model), copy.deepcopy(model.state_dict())))
        return copy_of

    monkeypatch.setattr(dpo, "frozen", watched)
    dpo.main(dpo.get_args(flags_of(checkpoint, pairs, tmp_path / "out", "--adapter", text, "--dtype", precision)))
    first, *_, last = logged(tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6 if precision == "fp32" else 2e-4)
    assert abs(last["loss"] - math.log(2)) > 1e-2
    ((model, ref_model, before),) = made
    for (name, p), q in zip(model.named_parameters(), ref_model.parameters(), strict=True):
        assert (p.data_ptr() == q.data_ptr()) == (not p.requires_grad), name
        assert torch.equal(q, before[name].to(q.dtype)) and torch.equal(p, before[name]) == (not p.requires_grad), name
    assert (checkpoint / "model.safetensors").read_bytes() == file_bytes
    assert {"adapter_model.safetensors"} == {f.name for f in (tmp_path / "out" / "checkpoint").glob("*model.safe*")}
    net = load(checkpoint)[0]
    adapt(net, str(tmp_path / "out" / "checkpoint"), checkpoint)
    assert not torch.equal(net(ids(1, 9)), load(checkpoint)[0](ids(1, 9)))


@pytest.mark.parametrize("text", PUT)
def test_the_reference_of_a_trained_adapter_rounds_as_the_policy_does(checkpoint, tmp_path, text):
    """Under bf16 to the bit, so that DPO on from a folder begins at a margin of 0."""
    loop = loop_module.Loop(dpo.get_args(["--dtype", "bf16", "--device", "cpu", "--out", str(tmp_path)]), "dpo")
    net = load(checkpoint)[0]
    adapt(net, text, checkpoint, loop)
    ref_model = dpo.reference(disturbed(net), loop)
    with loop.autocast(), torch.no_grad():
        assert torch.equal(net(ids(2, 20)), ref_model(ids(2, 20)))


def test_the_end_of_dpo_is_measured_against_the_adapter_that_it_began_with(checkpoint, tmp_path, monkeypatch):
    """What is random in a prompt at first is drawn again alike: a run that hardly moves has no KL."""
    monkeypatch.setattr(dpo, "REQUESTS", 4)
    monkeypatch.setattr(world, "sft_test", lambda n: [world.exchange("add", world.rng_for("x", 1), "test")])
    for lr, least, most in ((1e-9, 0.0, 1e-3), (1.0, 1e-2, math.inf)):
        flags = ["--model", checkpoint, "--out", tmp_path / "out", "--adapter", "prompt", "--loss", "simpo", "--lr", lr,
                 "--steps", 1, "--batch-size", 4, "--max-length", 128, "--max-new-tokens", 8, "--pairs", "written",
                 "--device", "cpu"]  # fmt: skip
        result = dpo.main(dpo.get_args(list(map(str, flags))))
        assert least <= abs(result["metrics"]["KL"]["after"]) <= most


@pytest.mark.slow
def test_a_row_of_the_table_is_two_processes(checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "out", "--max-length", 128,
             "--max-new-tokens", 4, "--device", "cpu"]  # fmt: skip
    lora.both_tasks(lora.get_args(list(map(str, flags))))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["metrics"]) == ["old skills", "trainable %", "optimizer MB", "known task"]
    assert result["metric"] == "task" and result["metrics"]["known task"]["n"] == result["n"] == 400


@pytest.mark.slow
def test_the_default_run_learns_a_new_skill(tmp_path):
    """At least 0.9 of held-out questions, from none, with less than a tenth of the parameters."""
    result = lora.main(lora.get_args(["--out", str(tmp_path / "out")]))
    assert result["metric"] == "task" and result["n"] == 400
    assert result["before"] <= 0.05 and result["after"] >= 0.9
    assert result["metrics"]["trainable %"]["after"] < 10
