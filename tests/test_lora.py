"""lora.py: at first nothing has changed, only the adapter learns, merged is adapted, and peft agrees."""

import copy
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import lora
from data.formats import UserError
from loop import adamw, set_lr
from lora import METHODS, adapt, described, merge, parse, unmerge
from model import Config, Transformer, frozen, generate, load, save
from tests.oracle import oracle

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
    disturbed(net)
    x = torch.randn(3, 32)
    for m in found[:1]:
        y = F.linear(x, m.base.weight)
        for p, (start, end) in enumerate(m.rows.values()):
            h = x @ m.fixed_down[p * 5 : p * 5 + 5].T * m.d[p * 5 : p * 5 + 5]
            y[:, start:end] += c.alpha / 5 * (h @ m.fixed_up[start:end].T) * m.b[start:end]
        torch.testing.assert_close(m(x), y)


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
    with pytest.raises(ValueError, match="exceed the context"):
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


def test_qlora_needs_4_bits_a_weight_and_learns_on_what_they_mean():
    net, plain = random_net(), random_net()
    adapt(net, "qlora:targets=(q|v)_proj$", "")
    quantized = [m for m in net.modules() if isinstance(m, lora.NF4Linear)]
    assert len(quantized) == 4 * 2  # factors or not
    n = sum(math.prod(m.shape) for m in quantized)
    assert 8 * sum(m.n_bytes() for m in quantized) / n < 4.2
    for path, m in net.named_modules():
        if isinstance(m, lora.NF4Linear):
            linear = plain.get_submodule(path.removesuffix(".base"))
            linear.weight.data = kernels.nf4_dequantize(kernels.nf4_quantize(linear.weight.data))
    assert torch.equal(net(ids(2, 9)), plain(ids(2, 9)))
    adapt(plain, "lora:targets=(q|v)_proj$", "")
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


@pytest.mark.parametrize("text", ["prompt", "prefix", "adapter", "bitfit", "mam"])
def test_what_is_no_matrix_is_not_merged(text):
    net = random_net()
    adapt(net, text, "")
    with pytest.raises(UserError, match="cannot be merged"):
        merge(net)


@pytest.mark.parametrize("text", [*PUT, "lora:init=pissa,rslora=true", "lora:targets=(q|down)_proj$,rank=2"])
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
    ({"peft_type": "LOHA"}, "LOHA"),
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
])  # fmt: skip
def test_words_that_are_not_understood(text, said):
    with pytest.raises(UserError, match=said):
        parse(text)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match="in the name of no matrix"):
        adapt(random_net(), "lora:targets=query", "")


def test_it_says_what_learns():
    net = random_net()
    c = adapt(net, "lora:rank=2,targets=(q|v)_proj$", "")
    n = 2 * (2 * 2 * 32 + 2 * (32 + 16))
    whole = sum(p.numel() for p in random_net().parameters()) + n
    said = described(net, c)
    assert "blocks.*.attention.qkv" in said and f"{n:,} of {whole:,}" in said and f"{100 * n / whole:.2f}%" in said
    assert f"{8 * n / 1e6:.2f} MB" in said
