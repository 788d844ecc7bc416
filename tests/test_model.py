"""model.py against transformers and safetensors, against loops in float64, and against what must not matter."""

import builtins
import copy
import json
import math
import re
import runpy
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model
from data import chat
from data.formats import UserError
from data.tokenizer import tiny
from model import Config, Transformer, frozen, generate, load, read_config, sample, save, token_logps
from tests.oracle import oracle

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "initializer_range": 0.2}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-3, "rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "qwen2": {"tie_word_embeddings": True, "rms_norm_eps": 1e-4,
              "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "qwen3": {"tie_word_embeddings": False, "rms_norm_eps": 1e-2, "head_dim": 32,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}  # fmt: skip
TINY = Config("qwen3", vocab_size=31, depth=2, width=24, heads=4, kv_heads=2, head_dim=8, ffn_width=40, max_length=96,
              rope_theta=100.0, rope_scaling=LLAMA3, qkv_bias=True, qk_norm=True, tied=False)  # fmt: skip
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9]]


@cache
def theirs(family: str) -> nn.Module:
    """A random model of transformers whose biases are not 0 and whose norms are not 1."""
    transformers = oracle("transformers")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    net = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return net


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> str:
    """A family, a model of which transformers has just saved to tmp_path / "theirs"."""
    theirs(request.param).save_pretrained(tmp_path / "theirs")
    return request.param


def random_net(config: Config = TINY, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(config).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.4)
    return net


def random_ids(*shape: int, vocab_size: int = 31) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0.0)


def edit(path: Path, **changes: object) -> None:
    """Change the fields of a JSON file; None takes one out."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


# ----------------------------------------------------------------------------------------------------------------------
# Parity with transformers


def test_logits_equal_those_of_transformers_row_by_row(family, tmp_path):
    net, _ = load(tmp_path / "theirs")
    ids, lengths = random_ids(3, 97, vocab_size=300), (97, 64, 80)
    ids[1, 64:], ids[2, 80:] = 0, 7  # padding
    logits = net(ids)
    for row, found, n in zip(ids, logits, lengths, strict=True):
        wanted = theirs(family)(row[None, :n]).logits[0]
        assert wanted.std() > 0.5
        close(found[:n], wanted, 1e-4)


def test_what_is_saved_here_loads_there_and_is_what_was_loaded(family, tmp_path):
    save(load(tmp_path / "theirs")[0], None, tmp_path / "ours")
    net, info = oracle("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids(2, 70, vocab_size=300)
    assert torch.equal(net(ids).logits, theirs(family)(ids).logits)
    ours, original = (model.read_safetensors(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == original.keys() and all(torch.equal(ours[key], original[key]) for key in ours)
    assert read_config(tmp_path / "ours/config.json") == read_config(tmp_path / "theirs/config.json")


def test_sharded_checkpoints_load(family, tmp_path):
    theirs(family).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found, wanted = (load(tmp_path / d)[0].state_dict() for d in ("shards", "theirs"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


def test_a_bf16_checkpoint_is_read_in_the_dtype_asked_for_and_saved_in_its_own(tmp_path):
    copy.deepcopy(theirs("llama")).bfloat16().save_pretrained(tmp_path)
    transformers = oracle("transformers")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = random_ids(1, 70, vocab_size=300)
    wide, narrow = load(tmp_path)[0], load(tmp_path, dtype=torch.bfloat16)[0]
    close(wide(ids), net(ids).logits, 1e-4)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    save(narrow, None, tmp_path / "narrow")
    tensors = model.read_safetensors(tmp_path / "narrow/model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16


def test_what_ends_a_completion_is_saved_with_the_tokenizer(tmp_path):
    """Also where there are several such tokens, as in Llama 3 and Qwen."""
    tokenizer = replace(tiny(), eos_ids=(1010, 1008), bos_id=1009)
    save(random_net(Config.from_depth(1, 1100, 80), torch.float32), tokenizer, tmp_path)
    transformers = oracle("transformers")
    for config in (transformers.GenerationConfig, transformers.AutoConfig):
        config = config.from_pretrained(tmp_path)
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([1010, 1008], 1010, 1009)
    found = load(tmp_path)[1]
    assert (set(found.eos_ids), found.pad_id) == ({1010, 1008}, 1010)


def test_older_and_newer_configs_say_the_same(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    file, old_scaling = tmp_path / "config.json", {"type": "llama3", **LLAMA3}
    config = read_config(file)
    assert config.rope_scaling == LLAMA3 and config.rope_theta == 5000.0 and config.head_dim == 16
    del old_scaling["rope_type"]
    for scaling in (LLAMA3, old_scaling):
        edit(file, head_dim=None, rope_parameters=None, rope_theta=5000, rope_scaling=scaling)
        assert read_config(file) == config
    edit(file, rope_theta=None, rope_scaling=None, num_key_value_heads=None, tie_word_embeddings=None)
    assert read_config(file) == replace(config, rope_theta=10_000.0, rope_scaling=None, kv_heads=4)


def their_completion(net: nn.Module, prompt: list[int], eos_ids: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    return net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0,
                        eos_token_id=eos_ids or None)[0, len(prompt):].tolist()  # fmt: skip


def test_greedy_completions_equal_those_of_transformers(family, tmp_path):
    """Prompts of 3 to 31 tokens in one call, endless and with two ending tokens; not vacuous: the rows are varied."""
    net, hf = load(tmp_path / "theirs", dtype=torch.float64)[0], copy.deepcopy(theirs(family)).double()
    prompts = [random_ids(n, vocab_size=300).tolist() for n in (3, 31, 17, 8)]
    found = generate(net, prompts, max_new_tokens=48, eos_ids=[], temperature=0.0)
    assert found.completions == [their_completion(hf, prompt, [], 48) for prompt in prompts]
    assert min(len(set(completion)) for completion in found.completions) >= 20
    eos_ids = [found.completions[0][9], found.completions[3][20]]
    ended = generate(net, prompts, max_new_tokens=48, eos_ids=eos_ids, temperature=0.0)
    assert ended.completions == [their_completion(hf, prompt, eos_ids, 48) for prompt in prompts]
    assert ended.finished[0] and ended.finished[3]


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def test_rows_are_prompt_completion_padding():
    """Two ending tokens; the first ends a completion and belongs to it, whatever comes after is nowhere."""
    eos_ids, n = [2, 11], 20
    found = generate(random_net(), PROMPTS, max_new_tokens=n, eos_ids=eos_ids, samples=6, temperature=1.0)
    assert len(found.completions) == 24 and 0 < found.finished.sum() < 24
    assert {c[-1] for c, ended in zip(found.completions, found.finished, strict=True) if ended} == set(eos_ids)
    width = found.input_ids.shape[1]
    for r, completion in enumerate(found.completions):
        start, end = len(PROMPTS[r // 6]), len(PROMPTS[r // 6]) + len(completion)
        assert found.input_ids[r].tolist() == [*PROMPTS[r // 6], *completion, *[0] * (width - end)]
        assert found.completion_mask[r].tolist() == [0] * start + [1] * (end - start) + [0] * (width - end)
        assert found.logps[r, :start].eq(0).all() and found.logps[r, end:].eq(0).all()
        assert not set(eos_ids) & set(completion[:-1])
        assert found.finished[r] == (completion[-1] in eos_ids) and (found.finished[r] or len(completion) == n)


def test_samples_of_a_prompt_differ_and_depend_on_the_seed():
    options = {"max_new_tokens": 12, "eos_ids": [], "samples": 8}
    found = generate(random_net(), PROMPTS, seed=3, **options).completions
    for i in range(len(PROMPTS)):
        assert len({tuple(c) for c in found[8 * i : 8 * i + 8]}) == 8
    assert found == generate(random_net(), PROMPTS, seed=3, **options).completions
    assert found != generate(random_net(), PROMPTS, seed=4, **options).completions


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """Same row, same uniforms: with neighbours that are longer, end elsewhere, or are the same prompt again."""
    net, options = random_net(), {"max_new_tokens": 20, "eos_ids": [2, 11], "samples": 3}
    found = generate(net, PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        others = [[7] * 31, [1, 2], prompt, [4] * 12]
        others[i] = prompt
        again = generate(net, others, **options)
        assert again.completions[3 * i : 3 * i + 3] == found.completions[3 * i : 3 * i + 3]
        for r in range(3 * i, 3 * i + 3):
            mask, mask_again = found.completion_mask[r].bool(), again.completion_mask[r].bool()
            close(again.logps[r][mask_again], found.logps[r][mask], 1e-6)


def test_rows_that_ended_change_nothing_for_the_others(monkeypatch):
    """Where no token ends a row none is retired: with ending tokens its beginning is what remains."""
    left, drop = [], model.KVCache.drop
    monkeypatch.setattr(model.KVCache, "drop", lambda self, ended: (left.append(drop(self, ended)), left[-1])[1])
    net, eos_ids = random_net(), [2, 11, 17]
    endless, ending = (generate(net, PROMPTS, max_new_tokens=24, eos_ids=ids, samples=20) for ids in ([], eos_ids))
    sizes = [80, *map(len, left)]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] < 20
    for r, completion in enumerate(endless.completions):
        end = next((i + 1 for i, token in enumerate(completion) if token in eos_ids), 24)
        assert ending.completions[r] == completion[:end]
        start = len(PROMPTS[r // 20])
        close(ending.logps[r, start : start + end], endless.logps[r, start : start + end], 1e-6)


def test_a_completion_ends_at_its_first_ending_token(monkeypatch):
    """Rows that ended are computed until the next look at them, and some of them say the ending token again."""
    monkeypatch.setitem(model.PATIENCE, "cpu", 3)
    net, options = random_net(), {"max_new_tokens": 4, "samples": 20}
    endless = generate(net, PROMPTS, eos_ids=[], **options).completions
    for token in range(31):
        ending = generate(net, PROMPTS, eos_ids=[token], **options).completions
        assert ending == [c[: c.index(token) + 1] if token in c else c for c in endless]


def test_recomputing_activations_changes_nothing_in_generation():
    net, found = random_net(), []
    for net.checkpoint_activations in (False, True):
        found.append(generate(net, PROMPTS, max_new_tokens=12, eos_ids=[2], samples=2).completions)
    assert found[0] == found[1]


def test_a_bf16_model_samples_from_fp32_logits(monkeypatch):
    dtypes = set()
    monkeypatch.setattr(model, "sample", lambda logits, *x, **y: (dtypes.add(logits.dtype), sample(logits, *x, **y))[1])
    generate(random_net(dtype=torch.bfloat16), PROMPTS, max_new_tokens=3, eos_ids=[])
    assert dtypes == {torch.float32}


def test_rows_do_not_depend_on_how_many_are_decoded_at_once(monkeypatch):
    """No more than rollout_batch are; a prompt is prefilled once for those of its rows that are; none is computed on
    after its end."""
    caches, sizes, cache, hidden = [], [], model.KVCache, Transformer.hidden
    monkeypatch.setattr(model, "KVCache", lambda net, n, *x: (caches.append(n), cache(net, n, *x))[1])
    monkeypatch.setattr(Transformer, "hidden", lambda *x, **y: (sizes.append(len(x[1])), hidden(*x, **y))[1])
    net, options = random_net(), {"max_new_tokens": 15, "eos_ids": [2, 11], "samples": 4}
    whole = generate(net, [*PROMPTS, PROMPTS[1]], **options)
    assert caches == [4] and 16 < max(sizes) <= 20
    for n, prefilled in ((20, [4]), (8, [2, 2, 1]), (7, [2, 3, 2]), (1, [1] * 20)):
        caches.clear(), sizes.clear()
        found = generate(net, [*PROMPTS, PROMPTS[1]], **options, rollout_batch=n)
        assert caches == prefilled and max(sizes) <= n
        assert sum(sizes) == sum(prefilled) + sum(len(completion) - 1 for completion in found.completions)
        assert found.completions == whole.completions and torch.equal(found.input_ids, whole.input_ids)
        assert torch.equal(found.finished, whole.finished)
        close(found.logps, whole.logps, 1e-6)


def test_the_cache_holds_no_more_than_what_was_said_and_a_block(monkeypatch):
    """However many tokens there may be; what it holds stays when it grows."""
    held, mask = [], model.KVCache.mask
    monkeypatch.setattr(model.KVCache, "mask", lambda self, T: (held.append(self.values.shape[-2]), mask(self, T))[1])
    net, options = random_net(), {"max_new_tokens": 40, "eos_ids": [], "samples": 2}
    wanted = generate(net, PROMPTS, **options)
    assert set(held) == {7 + 40}
    held.clear()
    monkeypatch.setattr(model, "GROWTH", 16)
    found = generate(net, PROMPTS, **options)
    assert held == sorted(held) and set(held) == {7 + 16, 7 + 32, 7 + 48} and held[16:18] == [7 + 16, 7 + 32]
    assert found.completions == wanted.completions
    close(found.logps, wanted.logps, 1e-6)


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: in its `with` nothing has an effect, and replay() does the same operations on the same
    memory, without the code that asked for them. What a GPU refuses there fails: what the CPU would have to wait for.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::index.Tensor", "aten::index_put_"):
            assert not any(x.dtype == torch.bool for x in args[1]), "a mask as an index"
        else:
            assert not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags), func
        assert func.name() not in ("aten::isin.Tensor_Tensor", "aten::lift_fresh"), func
        if func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][-1]

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, before in reversed(self.before):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for x, y in zip(*(z if isinstance(z, (tuple, list)) else [z] for z in (out, again)), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():  # else a view, or changed in place
                    x.copy_(y)


@pytest.fixture(params=["as it is", "replayed"])
def pinned(request, monkeypatch) -> list[int]:
    """Decoding as on a GPU, with steps as they are or as a graph of them; how many rows were left at each look."""
    monkeypatch.setitem(model.PATIENCE, "cpu", 4)
    monkeypatch.setitem(model.CAPTURE, "cpu", lambda step, device: iter(step, "never"))
    if request.param == "replayed":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {"CUDAGraph": Tape, "graph": lambda tape, **options: tape, "stream": nullcontext,
                           "Stream": lambda device: stream, "current_stream": lambda device: stream}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setitem(model.CAPTURE, "cpu", model._captured)
        model._side_stream.cache_clear()
    left, drop = [], model.KVCache.drop
    monkeypatch.setattr(model.KVCache, "drop", lambda self, ended: (left.append(drop(self, ended)), left[-1])[1])
    yield left
    model._side_stream.cache_clear()


SORTS = {
    "llama": replace(TINY, family="llama", qkv_bias=False, qk_norm=False),
    "qwen2": replace(TINY, family="qwen2", qk_norm=False, rope_scaling=None, tied=True),
    "qwen3": replace(TINY, qkv_bias=False),
}


@pytest.mark.parametrize("sort", SORTS)
def test_decoding_on_a_gpu_says_the_same(sort, pinned, monkeypatch):
    """Ragged prompts, rows that end at all times and leave from the middle, more than are decoded at once."""
    net, options = random_net(SORTS[sort]), {"max_new_tokens": 40, "eos_ids": [2, 11], "samples": 13}
    found = [generate(net, PROMPTS, rollout_batch=n, **options) for n in (None, 20)]
    sizes = {*map(len, pinned)}
    assert {32, 16, 8} <= sizes <= {32, 16, 8, 4, 2, 1}
    monkeypatch.delitem(model.CAPTURE, "cpu")
    wanted = generate(net, PROMPTS, **options)
    for again in found:
        assert again.completions == wanted.completions and torch.equal(again.finished, wanted.finished)
        close(again.logps, wanted.logps, 1e-5)


def test_decoding_on_a_gpu_under_autocast(pinned, monkeypatch):
    """As much as other sizes of batches and other kernels round alike; an adapter may widen what the cache narrows."""
    net, options = random_net(dtype=torch.float32), {"max_new_tokens": 40, "eos_ids": [2, 11], "samples": 13}
    net.blocks[1].attention.qkv.register_forward_hook(lambda module, x, qkv: qkv.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(net, PROMPTS, **options)
        scored = token_logps(net, found.input_ids) * found.completion_mask
        monkeypatch.delitem(model.CAPTURE, "cpu")
        wanted = generate(net, PROMPTS, **options)
    assert sum(a == b for a, b in zip(found.completions, wanted.completions, strict=True)) > 0.8 * 52
    assert (found.logps - scored).abs().mean() < 0.02


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8}])
def test_every_way_of_drawing_is_the_same_on_a_gpu(options, pinned, monkeypatch):
    """With more ending tokens than torch.isin compares one by one, and a vocabulary with padding."""
    options |= {"max_new_tokens": 12, "eos_ids": range(40, 60), "vocab_size": 23, "samples": 5}
    found = generate(random_net(), PROMPTS, **options)
    monkeypatch.delitem(model.CAPTURE, "cpu")
    wanted = generate(random_net(), PROMPTS, **options)
    assert found.completions == wanted.completions and len(found.completions[0]) == 12
    close(found.logps, wanted.logps, 1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_stands_before_every_row_is_read_on_a_gpu(kind, pinned, monkeypatch):
    net, options = random_net(), {"max_new_tokens": 12, "eos_ids": [2], "samples": 5}
    shape = (3, TINY.width) if kind == "prompt" else (3, TINY.depth, 2, TINY.kv_heads, TINY.head_dim)
    learned = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net.virtual = 3
    setattr(net, kind, lambda: learned)
    found = generate(net, PROMPTS, **options)
    monkeypatch.delitem(model.CAPTURE, "cpu")
    wanted = generate(net, PROMPTS, **options)
    assert found.completions == wanted.completions
    close(found.logps, wanted.logps, 1e-5)


def test_a_step_on_a_gpu_is_captured_once_a_size(pinned, monkeypatch, request):
    """After a real one, which warms up; then no code of ours runs. All memory is there before, in whole lines."""
    calls, hidden = [], Transformer.hidden

    def counted(self, ids, cache):
        calls.append((len(ids), cache.keys.shape[-1], cache.keys.untyped_storage().data_ptr()))
        return hidden(self, ids, cache=cache)

    monkeypatch.setattr(Transformer, "hidden", counted)
    generate(random_net(), PROMPTS, max_new_tokens=40, eos_ids=[2, 11], samples=13)
    sizes = [4, 52, *map(len, pinned)]
    if "replayed" in request.node.name:
        assert [n for n, _, _ in calls] == [4, *(n for n in sizes[1:] for _ in range(2))]
    assert {n for n, _, _ in calls} == {*sizes} and {capacity for _, capacity, _ in calls} == {48}
    assert len({place for _, _, place in calls[1:]}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.8}])
@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "autocast"])
def test_captured_steps_equal_eager_ones(options, narrow, monkeypatch):
    net = random_net(SORTS["qwen3"], torch.float32 if narrow else torch.float64).cuda()
    options = {"max_new_tokens": 80, "eos_ids": [2], "samples": 13, **options}
    with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
        found = [generate(net, PROMPTS, rollout_batch=n, **options) for n in (None, 20)]
        if narrow:  # the same kernels: others round in their own way, and draw other tokens
            monkeypatch.setitem(model.CAPTURE, "cuda", lambda step, device: iter(step, "never"))
        else:
            monkeypatch.delitem(model.CAPTURE, "cuda")
        wanted = [generate(net, PROMPTS, rollout_batch=n, **options) for n in (None, 20)]
    for one, other in zip(found, wanted, strict=True):
        assert one.completions == other.completions
        close(one.logps, other.logps, 1e-5)
    token_logps(net, found[0].input_ids).sum().backward()  # what was captured is in nobody's way
    assert all(p.grad.any() for p in net.parameters())


def test_generation_is_eager_where_training_is_compiled(monkeypatch):
    net = random_net()
    wanted = generate(net, PROMPTS, max_new_tokens=5, eos_ids=[])
    for block in net.blocks:
        block.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    monkeypatch.setattr(kernels, "_compiling", True)
    assert generate(net, PROMPTS, max_new_tokens=5, eos_ids=[]).completions == wanted.completions


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_that_generated_is_trained_on_what_it_said(sharded, monkeypatch):
    """Nothing that generation leaves in the model or returns is closed to autograd: angles, shards, log-probs.

    Shards are gathered anew at every step: of that nothing is captured.
    """
    net = random_net(replace(Config.from_depth(1, 31, 96), tied=False), torch.float32)
    if sharded:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        if sharded:
            fully_shard(net)
            register_fsdp_forward_method(net, "hidden")
            monkeypatch.setitem(model.CAPTURE, "cpu", lambda step, device: pytest.fail("captured"))
        for _ in range(2):
            found = generate(net, PROMPTS, max_new_tokens=9, eos_ids=[2], samples=2)
            (token_logps(net, found.input_ids) * found.logps).sum().backward()
        assert all(p.grad.any() for p in net.parameters())
        assert not any(x.is_inference() for x in found if isinstance(x, Tensor))
    finally:
        if sharded:
            distributed.destroy_process_group()


def test_it_stops_when_all_rows_have_ended(monkeypatch):
    calls, hidden = [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *x, **y: (calls.append(1), hidden(*x, **y))[1])
    found = generate(random_net(), PROMPTS, max_new_tokens=50, eos_ids=range(0, 31, 2))
    assert found.input_ids.shape[1] == max(len(p) + len(c) for p, c in zip(PROMPTS, found.completions, strict=True))
    assert found.finished.all() and len(calls) == max(map(len, found.completions)) < 12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_logps_are_those_of_the_tempered_policy(dtype, tolerance):
    """Before top-k and top-p; at temperature 0 those of temperature 1. Cached decoding, against one forward pass."""
    net = random_net(dtype=dtype)
    for temperature, top_k, top_p in ((0.6, 5, 0.8), (1.7, 0, 1.0), (0.0, 0, 1.0)):
        found = generate(net, PROMPTS, max_new_tokens=30, eos_ids=[2], samples=4, temperature=temperature,
                         top_k=top_k, top_p=top_p)  # fmt: skip
        wanted = token_logps(net, found.input_ids, temperature=temperature or 1.0) * found.completion_mask
        close(found.logps, wanted.float(), tolerance)


def test_under_autocast_the_cache_is_as_narrow_as_the_keys(monkeypatch):
    dtypes, block = set(), model.KVCache.block
    monkeypatch.setattr(model.KVCache, "block", lambda self, i: (dtypes.add(self.keys.dtype), block(self, i))[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(random_net(dtype=torch.float32), PROMPTS, max_new_tokens=20, eos_ids=[])
        wanted = token_logps(random_net(dtype=torch.float32), found.input_ids) * found.completion_mask
    assert dtypes == {torch.bfloat16} and (found.logps - wanted).abs().mean() < 0.02


@pytest.mark.parametrize("on_gpu", [False, True], ids=["keys transposed", "keys as on a GPU"])
def test_cached_states_equal_one_forward_pass(on_gpu, monkeypatch):
    """Prompts of 1, 2 and 7 tokens, then 1, 3, 2, 2 and 1 at once; rows are selected, doubled and dropped, the cache
    grows by twos."""
    monkeypatch.setattr(model, "GROWTH", 2)
    net, lengths = random_net(), torch.tensor([1, 2, 7])
    rows = random_ids(3, 20)
    cache = model.KVCache(net, 3, 7, torch.float64)
    if on_gpu:
        cache.keys, cache.transposed = torch.zeros_like(cache.values), False
    whole = [net.hidden(row[None])[0] for row in rows]
    net.hidden(torch.where(torch.arange(7) < lengths[:, None], rows[:, :7], 30), cache=cache)
    cache.cut(lengths)
    held, alive = lengths.clone(), [0, 1, 2]
    for n, kept in ((1, None), (3, [2, 0, 0, 1, 2]), (2, {0, 2}), (2, [1, 0]), (1, None)):
        new = torch.stack([rows[r, held[r] : held[r] + n] for r in alive])
        found = net.hidden(new, cache=cache)
        for state, r in zip(found, alive, strict=True):
            close(state, whole[r][held[r] : held[r] + n], 1e-5)
        held += n
        if isinstance(kept, set):  # rows 2 0 0 1 2 without the first and the third: the last two move there
            kept = cache.drop(torch.tensor([i in kept for i in range(len(alive))])).tolist()
            assert kept == [3, 1, 4]
        elif kept:
            cache.select(torch.tensor(kept))
        alive = [alive[i] for i in kept] if kept else alive


def test_padding_of_the_vocabulary_is_never_sampled():
    options = {"max_new_tokens": 40, "eos_ids": [], "samples": 20}
    for temperature in (2.0, 0.0):
        free = generate(random_net(), PROMPTS, temperature=temperature, **options)
        found = generate(random_net(), PROMPTS, temperature=temperature, vocab_size=13, **options)
        assert free.input_ids.max() >= 13 > found.input_ids.max() >= 9


def test_one_candidate_is_the_greedy_one():
    options = {"max_new_tokens": 30, "eos_ids": [2]}
    greedy = generate(random_net(), PROMPTS, temperature=0.0, top_k=5, top_p=0.5, **options).completions
    assert greedy == generate(random_net(), PROMPTS, temperature=1.3, top_k=1, **options).completions
    assert greedy == generate(random_net(), PROMPTS, temperature=1.3, top_p=1e-6, **options).completions


def expected(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """What `sample` should draw from: temperature, then the top_k best, then the fewest that reach top_p of those."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if reached < top_p * total:
            kept.append(i)
        reached += weights[i]
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.8), (6, 0.6), (99, 0.95)])
def test_each_token_gets_its_share_of_the_uniforms(temperature, top_k, top_p):
    """Of 10,000 uniforms side by side each token gets its probability, and one outside the support gets none."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(5)) * 1.5
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    token, logps = sample(logits.expand(10_000, 11), uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    shares, wanted = token.bincount(minlength=11) / 10_000, expected(logits.tolist(), temperature, top_k, top_p)
    close(shares, torch.tensor(wanted), 1e-3)
    assert all(share == 0 if p == 0 else share > 0 or p < 1e-4 for share, p in zip(shares, wanted, strict=True))
    close(logps, torch.log_softmax(logits / temperature, -1)[token], 1e-6)


def test_top_p_that_is_reached_exactly_takes_no_more():
    """Four equal tokens and top_p 0.5: two of them; also the extremes of a uniform draw tokens of the support."""
    uniforms = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-24])
    assert sample(torch.zeros(4, 4), uniforms, temperature=1.0, top_k=0, top_p=0.5)[0].tolist() == [0, 0, 1, 1]
    unlikely = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4]).expand(4, 5)
    assert sample(unlikely, uniforms, temperature=1.0, top_k=0, top_p=1.0)[0].tolist() == [1, 1, 3, 3]


def test_prompts_that_cannot_be_continued_are_refused():
    for prompts, n, words in (([[1], []], 3, "empty"), ([[1], [1] * 90], 7, "90 tokens and 7 new ones .* 96")):
        with pytest.raises(ValueError, match=words):
            generate(random_net(), prompts, max_new_tokens=n, eos_ids=[])
    assert len(generate(random_net(), [[1] * 90], max_new_tokens=6, eos_ids=[]).completions[0]) == 6


# ----------------------------------------------------------------------------------------------------------------------
# States and log-probabilities


def test_token_logps_equal_loops_over_the_softmax():
    """hidden_before is hidden one position later, zeros first; logp t comes from logits t - 1 and the temperature."""
    net, ids = random_net(), random_ids(3, 9)
    hidden, before, logits = net.hidden(ids), net.hidden_before(ids), net(ids)
    assert before[:, 0].eq(0).all() and torch.equal(before[:, 1:], hidden[:, :-1])
    for temperature in (1.0, 0.6):
        found = token_logps(net, ids, temperature=temperature)
        for b, row in enumerate(ids.tolist()):
            assert found[b, 0] == 0
            for t in range(1, 9):
                weights = [math.exp(x / temperature) for x in logits[b, t - 1].tolist()]
                assert found[b, t].item() == pytest.approx(math.log(weights[row[t]] / sum(weights)), abs=1e-9)


def test_embeddings_stand_in_for_those_of_the_tokens():
    net, ids = random_net(), random_ids(2, 9)
    assert torch.equal(net.hidden(ids, embeddings=net.embed(ids)), net.hidden(ids))
    other = 30 - ids
    assert torch.equal(net.hidden_before(ids, embeddings=net.embed(other)), net.hidden_before(other))


def test_neither_the_future_nor_padding_is_seen():
    """Changing token t changes its own state and later ones only; columns that are added change nothing before."""
    net, ids = random_net(), random_ids(2, 12)
    hidden = net.hidden(ids)
    for t in (0, 5, 11):
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % 31
        changed = (net.hidden(other) - hidden).abs().amax(-1) > 1e-9
        assert not changed[:, :t].any() and changed[:, t].all()
    close(net.hidden(torch.cat([ids, random_ids(2, 30)], 1))[:, :12], hidden, 1e-12)


def losses_and_gradients(net: Transformer, rows: list[tuple[Tensor, Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logps, concatenated, and the gradient of their sum where the mask says so, over rows (ids, documents, mask)."""
    net.zero_grad()
    logps = torch.cat([token_logps(net, ids[None], documents=None if docs is None else docs[None])[0][mask]
                       for ids, docs, mask in rows])  # fmt: skip
    logps.sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten().clone() for p in net.parameters()])


@pytest.mark.parametrize("recompute", [False, True], ids=["activations kept", "activations recomputed"])
def test_packed_documents_equal_documents_alone(recompute):
    """Log-probabilities and gradients, with the first token of each document masked; other documents are not heard."""
    net, lengths = random_net(), (5, 1, 9, 3)
    net.checkpoint_activations = recompute
    ids, documents = random_ids(18), torch.arange(4).repeat_interleave(torch.tensor(lengths))
    mask = torch.cat([torch.arange(n) > 0 for n in lengths])
    alone = [(row, None, torch.arange(len(row)) > 0) for row in ids.split(lengths)]
    logps, gradient = losses_and_gradients(net, alone)
    packed_logps, packed_gradient = losses_and_gradients(net, [(ids, documents, mask)])
    close(packed_logps, logps, 1e-5)
    close(packed_gradient, gradient, 1e-5 * gradient.abs().max().item())
    third, poisoned = documents == 2, torch.where(documents == 2, ids, 30 - ids)
    for state, first in ((net.hidden, 0), (net, 0), (net.hidden_before, 1)):
        found, wanted = (state(x[None], documents=documents[None])[0, third][first:] for x in (poisoned, ids))
        close(found, wanted, 1e-12)


def test_recomputed_activations_give_equal_gradients_and_every_block_runs_twice():
    found = []
    for times in (1, 2):
        net, runs = random_net(), []
        net.embed.weight.requires_grad_(False)  # the inputs of the blocks then need no gradient: nothing may be lost
        net.checkpoint_activations = times == 2
        net.blocks[1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        token_logps(net, random_ids(2, 20)).sum().backward()
        assert len(runs) == times
        found.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) and found[0][name].any() for name in found[0])


def test_a_frozen_model_is_a_copy_without_gradient():
    net = random_net(replace(TINY, tied=True)).train()
    copied, ids = frozen(net), random_ids(1, 9)
    wanted = net(ids).detach()
    assert torch.equal(copied(ids), wanted) and not copied.training and net.training
    assert not any(p.requires_grad for p in copied.parameters()) and all(p.requires_grad for p in net.parameters())
    assert copied.head.weight is copied.embed.weight
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(copied(ids), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_knows_nothing_and_each_matrix_starts_at_its_scale(tied):
    torch.manual_seed(0)
    depth, width = 8, 64
    net = Transformer(replace(TINY, vocab_size=200, depth=depth, width=width, ffn_width=128, tied=tied))
    loss = -token_logps(net, random_ids(8, 60, vocab_size=200))[:, 1:].mean().item()
    assert loss == pytest.approx(math.log(200), abs=0.05)
    stds = {"embed": 0.02, "head": 0.02, "qkv": width**-0.5, "gate_up": width**-0.5,
            "out": width**-0.5 / math.sqrt(2 * depth), "down": width**-0.5 / math.sqrt(2 * depth)}  # fmt: skip
    for name, p in net.named_parameters():
        if p.ndim == 1:
            assert p.eq(float(not name.endswith("bias"))).all()
        else:
            assert p.std().item() == pytest.approx(stds[name.split(".")[-2]], rel=0.05), name
            assert p.mean().item() == pytest.approx(0.0, abs=0.1 * p.std().item()), name


def test_a_tied_head_stays_the_embedding(tmp_path):
    nets = [random_net(replace(Config.from_depth(1, 31, 96), tied=True), torch.float32)]
    save(nets[0], None, tmp_path)
    assert "lm_head.weight" not in model.read_safetensors(tmp_path / "model.safetensors")
    nets += [load(tmp_path)[0], copy.deepcopy(nets[0])]
    for net in nets:
        token_logps(net, random_ids(1, 9)).sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        assert net.head.weight is net.embed.weight and sum(p.shape == (31, 32) for p in net.parameters()) == 1
        assert torch.equal(net.embed.weight, nets[0].embed.weight)


def test_depth_sets_the_other_sizes():
    sizes = {1: (32, 1, 1, 32, 128), 4: (128, 4, 2, 32, 384), 11: (352, 11, 11, 32, 960), 12: (384, 6, 3, 64, 1024)}
    for depth, wanted in sizes.items():
        c = Config.from_depth(depth, 1000, 77)
        assert (c.width, c.heads, c.kv_heads, c.head_dim, c.ffn_width) == wanted
        assert (c.family, c.depth, c.vocab_size, c.max_length, c.tied) == ("qwen3", depth, 1000, 77, True)
        assert c.rope_scaling is None and not c.qkv_bias and c.qk_norm


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors

TENSORS = {
    **{str(dtype): (torch.arange(6).reshape(2, 3) % 5 - 2).to(dtype) for dtype in model.NAMES},
    "empty": torch.zeros(3, 0), "scalar": torch.tensor(2.5), "transposed": torch.arange(6.0).reshape(2, 3).T,
    "odd": torch.ones(5, dtype=torch.uint8), "every other": torch.arange(10)[::2], "näme": torch.ones(1),
}  # fmt: skip


def test_safetensors_go_round_and_agree_with_the_library(tmp_path):
    """All dtypes, no element, no dimension, strides: written and read here and there, in all four ways."""
    library = oracle("safetensors.torch")
    model.write_safetensors(tmp_path / "ours", TENSORS)
    library.save_file({name: x.contiguous() for name, x in TENSORS.items()}, tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
    for file in ("ours", "theirs"):
        for found in (model.read_safetensors(tmp_path / file), library.load_file(tmp_path / file)):
            assert found.keys() == TENSORS.keys()
            for name, wanted in TENSORS.items():
                assert found[name].dtype == wanted.dtype and found[name].shape == wanted.shape
                assert torch.equal(found[name], wanted), name


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    model.write_safetensors(tmp_path / "x", {"a": torch.ones(2)})
    with pytest.raises(RuntimeError, match="meta"):
        model.write_safetensors(tmp_path / "x", {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})
    assert model.read_safetensors(tmp_path / "x")["a"].tolist() == [1, 1]


def entry(shape: object = (2,), begin: object = 0, end: object = 8, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TAMPERED = {  # what is wrong: (header, bytes of data, claimed length of the header or None, words of the error)
    "header beyond the file": ({"a": entry()}, 8, 200, "header should have 200 bytes"),
    "header of exabytes": ({"a": entry()}, 8, 2**63 + 5, "header should have"),
    "header cut": ({"a": entry()}, 8, 20, "not JSON"),
    "data cut": ({"a": entry()}, 7, None, "its tensors have 8 bytes, the data 7"),
    "bytes behind": ({"a": entry()}, 9, None, "its tensors have 8 bytes, the data 9"),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, 12, None, "leave or share bytes at 4"),
    "hole": ({"a": entry(), "b": entry(begin=12, end=20)}, 20, None, "leave or share bytes at 8"),
    "hole at the start": ({"a": entry(begin=4, end=12)}, 12, None, "leave or share bytes at 0"),
    "shape too large": ({"a": entry([3])}, 8, None, "a of shape .3. and dtype F32 does not fill"),
    "shape too small": ({"a": entry([])}, 8, None, "does not fill"),
    "wrong size of dtype": ({"a": entry(dtype="F16")}, 8, None, "does not fill"),
    "negative offset": ({"a": entry([4], -8, 8)}, 8, None, "a has shape .4. at -8 to 8"),
    "negative shape": ({"a": entry([-2, -1])}, 8, None, "a has shape"),
    "end before begin": ({"a": entry([-2], 8, 0)}, 8, None, "a has shape"),
    "shape of true": ({"a": entry([2, True])}, 8, None, "a has shape"),
    "offset of false": ({"a": entry(begin=False)}, 8, None, "a has shape"),
    "shape of floats": ({"a": entry([2.0])}, 8, None, "a has shape"),
    "offset of floats": ({"a": entry(end=8.0)}, 8, None, "entry of a is malformed"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 8, 8]}}, 8, None, "entry of a is malformed"),
    "unknown dtype": ({"a": entry(dtype="F7")}, 8, None, "a has dtype F7"),
    "entry of another kind": ({"a": [1]}, 8, None, "entry of a is malformed"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, None, "entry of a is malformed"),
    "a name twice": ('{"a": [], "a": []}', 8, None, "occurs twice"),
    "a field twice": ('{"a": {"shape": [9], "shape": [2]}}', 8, None, "occurs twice"),
    "a list": ([entry()], 8, None, "not a JSON object"),
    "nested without end": ("[" * 100_000, 0, None, "not JSON"),
    "not text": (b"\xff\xfe{}", 0, None, "not JSON"),
    "nothing": (b"", 0, None, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_safetensors_are_refused_before_anything_is_allocated(what, tmp_path, monkeypatch):
    header, n_data, claimed, words = TAMPERED[what]
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(n_data))
    monkeypatch.setattr(model, "bytearray", None, raising=False)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*{words}"):
        model.read_safetensors(file)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(bytes(7))
    for name, words in (("short", "7 bytes are too few"), ("absent", "No such file"), ("", "Is a directory")):
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}: .*{words}"):
            model.read_safetensors(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------------
# Directories that do not fit


def change_tensors(path: Path, change) -> None:
    tensors = model.read_safetensors(path / "model.safetensors")
    change(tensors)
    model.write_safetensors(path / "model.safetensors", tensors)


WRONG_TENSORS = {
    "lack model.layers.1.self_attn.k_proj.weight": lambda x: x.pop("model.layers.1.self_attn.k_proj.weight"),
    "lack model.embed_tokens.weight": lambda x: x.pop("model.embed_tokens.weight"),
    "no place for the tensor model.layers.2.mlp": lambda x: x.update({"model.layers.2.mlp": torch.ones(1)}),
    "model.norm.weight is .31,.*asks for .64,": lambda x: x.update({"model.norm.weight": torch.ones(31)}),
    "v_proj.weight is .64, 32.*asks for .32, 64": lambda x: x.update(
        {"model.layers.0.self_attn.v_proj.weight": torch.ones(64, 32)}),
    "up_proj.weight is .95, 64": lambda x: x.update({"model.layers.0.mlp.up_proj.weight": torch.ones(95, 64)}),
    "model.norm.weight is .64,. torch.int64": lambda x: x.update({"model.norm.weight": torch.ones(64).long()}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    config = Config.from_depth(2, 31, 96)
    save(random_net(config, torch.float32), None, tmp_path)
    return tmp_path


def test_the_folder_of_a_run_stands_for_its_checkpoint(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(folder, run / "checkpoint")
    wanted = load(folder)[0].state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in load(run)[0].state_dict().items())
    other = load(folder)[0]
    nn.init.zeros_(other.norm.weight)
    save(other, None, run)  # a model of the folder itself goes first
    assert not load(run)[0].norm.weight.any()


@pytest.mark.parametrize("words", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(words, folder):
    change_tensors(folder, WRONG_TENSORS[words])
    with pytest.raises(UserError, match=words):
        load(folder)


def test_tensors_that_other_writers_leave_in_are_ignored(folder):
    """The angles of old checkpoints, and the head beside the embedding it is tied to."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "lm_head.weight": torch.ones(31, 64)}
    wanted = load(folder)[0].state_dict()
    change_tensors(folder, lambda tensors: tensors.update(extra))
    assert all(torch.equal(x, wanted[name]) for name, x in load(folder)[0].state_dict().items())


CONFIGS = {
    "model_type 'mixtral' is not supported; llama, qwen2, qwen3 are": {"model_type": "mixtral"},
    "use_sliding_window is not supported": {"use_sliding_window": True},
    "quantization_config is not supported": {"quantization_config": {"bits": 4}},
    "rope type 'yarn' is not supported": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope type 'linear' is not supported": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "hidden_act gelu is not supported": {"hidden_act": "gelu"},
    "attention_bias is not supported": {"attention_bias": True},
    "mlp_bias is not supported": {"mlp_bias": True},
    "partial_rotary_factor is not supported": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "low_freq_factor is missing": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
    "hidden_size is missing": {"hidden_size": None},
    "the sizes make no model": {"num_key_value_heads": 3, "num_attention_heads": 4},
    "sizes make no model": {"vocab_size": -31},
    "sizes make no": {"num_hidden_layers": 0},
    "make no model": {"num_hidden_layers": 2.0},
    "no model": {"head_dim": 31},
    "model: .*division": {"head_dim": None, "num_attention_heads": 0},
    "model: .*int": {"head_dim": None, "num_attention_heads": "2"},
}


@pytest.mark.parametrize("words", CONFIGS)
def test_models_that_this_is_not_are_refused(words, folder):
    edit(folder / "config.json", **CONFIGS[words])
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}/config.json: .*{words}"):
        load(folder)


def test_configs_and_directories_that_are_none_are_refused(folder):
    for text, words in (("{", "not JSON"), ("[]", "not a JSON object"), (None, "No such file.*directory is expected")):
        (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json: .*{words}"):
            load(folder)
    with pytest.raises(UserError, match="nowhere/config.json"):
        load(folder / "nowhere")


INDICES = {
    "'../x.safetensors' is not the name of a file beside it": {"a": "../x.safetensors"},
    "'/etc/x' is not the name": {"a": "/etc/x"},
    "7 is not the name": {"a": 7},
    "no index of a sharded checkpoint": ["a"],
    "index of a sharded": {"a": ["x.safetensors"]},
    "x.safetensors: No such file": {"a": "x.safetensors"},
    "says None holds model.norm.weight, which model.safetensors does": {"a": "model.safetensors"},
    "no file holds z": {"z": "model.safetensors", "model.norm.weight": "model.safetensors"},
}


@pytest.mark.parametrize("words", INDICES)
def test_an_index_names_files_beside_it_and_what_they_hold(words, folder):
    keep = {"model.norm.weight": torch.ones(64)}
    model.write_safetensors(folder / "model.safetensors", keep)
    model.write_safetensors(folder.parent / "x.safetensors", {"a": torch.ones(1)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": INDICES[words]}))
    with pytest.raises(UserError, match=words):
        load(folder)


def test_a_directory_without_weights_and_a_tokenizer_too_large_are_refused(folder):
    save(random_net(Config.from_depth(1, 1000, 96), torch.float32), tiny(), folder)
    with pytest.raises(UserError, match="the tokenizer has 1024 tokens, the model 1000"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load(folder)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made, in elements."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_a_vocabulary_of_151936_words_trains_without_its_logits(tmp_path):
    """A directory shaped like Qwen2's: no tensor of the training step comes near (tokens, vocabulary)."""
    config = Config("qwen2", 151_936, 1, width=32, heads=2, kv_heads=1, head_dim=16, ffn_width=64, max_length=768,
                    qkv_bias=True)  # fmt: skip
    save(Transformer(config), None, tmp_path)
    net, ids = load(tmp_path)[0], random_ids(1, 768, vocab_size=151_936)
    with Largest() as largest:
        loss = kernels.linear_cross_entropy(net.hidden_before(ids)[:, 1:], net.head.weight, ids[:, 1:])
        loss.backward()
    assert largest.size < 768 * 151_936 / 5 and loss.item() / 767 == pytest.approx(math.log(151_936), abs=0.1)
    assert all(p.grad.any() for p in net.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def chatty(tmp_path) -> str:
    save(random_net(replace(Config.from_depth(1, 1100, 80), tied=False), torch.float32), tiny(), tmp_path)
    return str(tmp_path)


def answer(folder: str, prompt: list[int], samples: int, **options: object) -> str:
    net, tokenizer = load(folder)
    found = generate(net, [prompt], eos_ids=tokenizer.eos_ids, samples=samples, vocab_size=1024, **options)
    return "".join(chat.completion_text(c, tokenizer) + "\n" for c in found.completions)


def test_the_command_line_answers(chatty, capsys):
    """The answers are those of `generate` to the prompt as a user's turn, or, raw, to the text itself."""
    options = {"max_new_tokens": 9, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "samples": 2}
    flags = [x for key, value in options.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    turn = chat.render([{"role": "user", "content": "Sort 3 1."}], tiny(), add_generation_prompt=True).input_ids
    qwen = chat.render([{"role": "user", "content": "Sort 3 1."}], tiny(), add_generation_prompt=True,
                       chat_format="qwen2").input_ids  # fmt: skip
    ways = (["--raw"], tiny().encode("Sort 3 1.")), ([], turn), (["--chat-format", "qwen2"], qwen)
    for way, prompt in ways:
        model.main(model.get_args(["--model", chatty, "--device", "cpu", "Sort 3 1.", *flags, *way, "--seed", "4"]))
        assert capsys.readouterr().out == answer(chatty, prompt, **options, seed=5)


def test_raw_text_begins_as_the_tokenizer_begins(chatty, capsys, monkeypatch):
    net, tokenizer = load(chatty)
    monkeypatch.setattr(model, "load", lambda *_, **__: (net, replace(tokenizer, bos_id=7, add_bos=True)))
    flags = ["--device", "cpu", "--raw", "Sort 3 1.", "--max-new-tokens", "9"]
    model.main(model.get_args(["--model", chatty, *flags]))
    wanted = answer(chatty, [7, *tiny().encode("Sort 3 1.")], 1, max_new_tokens=9, temperature=0.0)
    assert capsys.readouterr().out == wanted


def test_an_answer_ends_with_the_context(chatty, capsys):
    model.main(model.get_args(["--model", chatty, "--device", "cpu", "--raw", "Sort 3 1.", "--max-new-tokens", "999"]))
    prompt = tiny().encode("Sort 3 1.")
    wanted = answer(chatty, prompt, 1, max_new_tokens=80 - len(prompt), temperature=0.0)
    assert capsys.readouterr().out == wanted


def test_python_model_py_is_a_program(chatty):
    command = [sys.executable, model.__file__, "--model", ".", "--device", "cpu", "--max-new-tokens", "5", "Hi"]
    ended = subprocess.run(command, cwd=chatty, capture_output=True, text=True, check=False)
    turn = chat.render([{"role": "user", "content": "Hi"}], tiny(), add_generation_prompt=True).input_ids
    wanted = answer(chatty, turn, 1, max_new_tokens=5, temperature=0.0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, wanted, "")


def test_a_chat_remembers_what_was_said(chatty, capsys, monkeypatch):
    lines = iter(["Hi", " Sort 3 1. ", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    model.main(model.get_args(["--model", chatty, "--device", "cpu", "--max-new-tokens", "7"]))
    said, wanted = [], ""
    for text in ("Hi", "Sort 3 1."):
        said.append({"role": "user", "content": text})
        prompt = chat.render(said, tiny(), add_generation_prompt=True).input_ids
        wanted += answer(chatty, prompt, 1, max_new_tokens=7, temperature=0.0)
        said.append({"role": "assistant", "content": wanted.removesuffix("\n")})
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("raised, code", [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_a_chat_ends_with_its_input_or_with_ctrl_c(raised, code, chatty, capsys, monkeypatch):
    def end(_):
        raise raised

    monkeypatch.setattr(builtins, "input", end)
    monkeypatch.setattr(sys, "argv", ["model.py", "--device", "cpu", "--model", chatty])
    found = 0
    try:
        runpy.run_module("model", run_name="__main__")
    except SystemExit as exit_:
        found = exit_.code
    except KeyboardInterrupt:
        found = "a traceback"
    assert found == code
    assert capsys.readouterr() == ("", "")


def test_the_command_line_refuses_in_one_line(chatty, capsys, monkeypatch, tmp_path):
    save(random_net(Config.from_depth(1, 31, 96), torch.float32), None, tmp_path / "mute")
    cases = {"nowhere/config.json": ["nowhere", "Hi"], "model reads 1 to 79": [chatty, "a " * 99],
             "model reads 1 to 79$": [chatty, "--raw", ""], "no tokenizer.json": [str(tmp_path / "mute"), "Hi"],
             "--device tpu: there is none": [chatty, "Hi", "--device", "tpu"],
             "--max-new-tokens: expected": [chatty, "Hi", "--max-new-tokens", "0"],
             "--temperature: expected": [chatty, "Hi", "--temperature", "-1"],
             "--temperature: .* of at least 0": [chatty, "Hi", "--temperature", "nan"],
             "--temperature: .* at least 0": [chatty, "Hi", "--temperature", "inf"],
             "--top-k: expected": [chatty, "Hi", "--top-k", "-1"],
             "--top-p: expected": [chatty, "Hi", "--top-p", "0"],
             "--top-p: .* at most 1": [chatty, "Hi", "--top-p", "1.1"],
             "--samples: expected": [chatty, "Hi", "--samples", "0"],
             "draw at random, --temperature 0 does not: ": [chatty, "Hi", "--samples", "3"],
             "draw at random, --temperature 0 does not: choose": [chatty, "Hi", "--top-k", "3"],
             "draw at random, --temperature 0 does not: choose one": [chatty, "Hi", "--top-p", "0.5"],
             "argument --top-k: invalid": [chatty, "Hi", "--top-k", "x"]}  # fmt: skip
    for words, argv in cases.items():
        monkeypatch.setattr(sys, "argv", ["model.py", "--device", "cpu", "--model", *argv])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("model", run_name="__main__")
        assert re.fullmatch(f".*{words}.*\n", capsys.readouterr().err)
