"""bench.py measures what it says: FLOPs and bytes against brute force, races by a fake clock, areas at toy size."""

import json
import os
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import kernels
from data.chat import Row
from data.formats import UserError
from data.tokenizer import tiny
from loop import RunFailed
from model import Config, KVCache, Transformer
from tests.oracle import oracle

FIELDS = {"name": str, "ours": float, "peer": float, "unit": str, "ratio": float, "higher_is_better": bool}
ARGS = Namespace(device="cpu", repeats=1, compile=False)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def check(row: dict) -> None:
    """The fields that out/bench/AREA.json promises, and what they promise of each other."""
    assert {key: type(value) for key, value in row.items()} == FIELDS
    assert row["ours"] > 0 and row["peer"] > 0
    assert row["ratio"] == row["ours"] / row["peer"]
    assert json.loads(json.dumps(row)) == row


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race in which both run once, ours in 2 seconds and the peer in 5."""

    def race(ours, peer, repeats, device):
        ours()
        peer()
        return 2.0, 5.0

    monkeypatch.setattr(bench, "race", race)


def tiny_model(**changes: object) -> Transformer:
    return Transformer(replace(Config.from_depth(4, vocab_size=64, max_length=32), **changes))


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def test_race_alternates_and_discards_the_warm_up(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(bench, "now", lambda device: clock[0])

    def runner(name: str, seconds: list[float]):
        def call() -> None:
            clock[0] += seconds[calls.count(name)]
            calls.append(name)

        return call

    ours, peer = runner("ours", [1000.0, 1.0, 7.0, 3.0]), runner("peer", [0.0, 20.0, 4.0, 5.0])
    assert bench.race(ours, peer, 3, "cpu") == (3.0, 5.0)
    assert calls == ["ours", "peer"] * 4


def test_row_with_a_peer_of_zero():
    assert bench.row("error", 0.0, 0.0, "relative", False)["ratio"] == 1.0
    assert bench.row("error", 1e-7, 0.0, "relative", False)["ratio"] == 0.0


@LINUX
def test_resident_grows_by_what_is_allocated():
    before = bench.resident("VmRSS")
    held = torch.ones(100_000_000, dtype=torch.uint8)
    assert bench.resident("VmRSS") - before == pytest.approx(100, abs=10)
    del held
    assert bench.resident("VmRSS") - before < 10
    assert bench.resident("VmHWM") - before > 90


@LINUX
def test_memory_of_a_kernel_forgets_earlier_peaks():
    torch.ones(300_000_000, dtype=torch.uint8)
    assert 0 <= bench.kernel_memory("cpu", "swiglu", 1, False) < 150


@LINUX
def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    """Whose allocator is set; what is timed later in this one allocates as before."""
    for before in (None, "7"):
        if before:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", before)
        assert bench.in_fresh_process(os.getenv, "MALLOC_MMAP_THRESHOLD_") == "65536"
        assert os.environ.get("MALLOC_MMAP_THRESHOLD_") == before
    assert bench.in_fresh_process(os.path.realpath, "/proc/self") != f"/proc/{os.getpid()}"


def test_kernel_error_is_that_of_the_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "swiglu", lambda x: kernels.swiglu_reference(x) * 1.01)
    for ours, peer in bench.kernel_errors("swiglu", "cpu").values():
        assert ours == pytest.approx(0.01, rel=0.01)
        assert peer < 1e-6


def test_kernels_area(monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", ("rms_norm",))
    monkeypatch.setattr(bench, "in_fresh_process", lambda measure, device, name, which, compiled: 2.0 + which)
    rows = bench.bench_kernels(ARGS)
    memory = ["rms_norm: peak memory"] if sys.platform == "linux" else []
    errors = ["rms_norm: value error", "rms_norm: gradient error"]
    assert [r["name"] for r in rows] == ["rms_norm: time", *memory, *errors]
    for row in rows:
        check(row)


# ----------------------------------------------------------------------------------------------------------------------
# sft


@pytest.fixture(scope="module")
def pair():
    oracle("transformers")
    return bench.twins(64, 64, "cpu", depth=2)


def test_twins_compute_the_same(pair):
    input_ids = torch.tensor(bench.random_ids(64, [9, 9]))
    torch.testing.assert_close(pair[0](input_ids), pair[1](input_ids).logits, rtol=0, atol=1e-4)
    assert len(set(input_ids.flatten().tolist())) > 9


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_twins_that_differ_are_refused(pair, change):
    bench.check_equal(*pair)
    weight = pair[0].blocks[1].ffn.down.weight
    with torch.no_grad():
        old, weight[3] = weight.clone(), weight[3] + change
        with pytest.raises(RunFailed, match="differ"):
            bench.check_equal(*pair)
        weight.copy_(old)


def test_training_counts_its_tokens_and_changes_both(stopped):
    oracle("transformers")
    pair = bench.twins(32, 64, "cpu", depth=1)
    before = [[p.detach().clone() for p in model.parameters()] for model in pair]
    row = bench.training("training step, 3 x 7 tokens", pair, (3, 7), ARGS)
    check(row)
    assert (row["ours"], row["peer"], row["unit"]) == (3 * 7 / 2, 3 * 7 / 5, "tokens/s")
    assert row["higher_is_better"]
    for model, old in zip(pair, before, strict=True):
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_training_is_of_the_same_loss(pair, monkeypatch):
    losses, sft_loss = [], bench.sft_loss
    monkeypatch.setattr(bench, "sft_loss", lambda *x: losses.append(sft_loss(*x)) or losses[-1])
    monkeypatch.setattr(bench, "adamw", lambda *x: torch.optim.SGD(pair[0].parameters(), lr=0.0))
    input_ids = torch.tensor(bench.random_ids(64, [8, 8, 8]))
    bench.our_step(pair[0], input_ids, torch.float32)()
    theirs = pair[1](input_ids=input_ids, labels=input_ids).loss
    assert losses[0].item() / (3 * 7) == pytest.approx(theirs.item(), rel=1e-5)


def test_sampling_at_toy_size(pair):
    row = bench.sampling("sampling", pair, bench.random_ids(64, [5, 2]), ARGS, samples=2, new=3, eos_ids=(1, 2))
    check(row)
    assert row["unit"] == "tokens/s" and row["higher_is_better"]


@pytest.mark.parametrize(("eos_ids", "n"), [((), 4), (range(64), 1)])
def test_sampling_counts_the_tokens_made(pair, stopped, eos_ids, n):
    row = bench.sampling("sampling", pair, bench.random_ids(64, [5, 2]), ARGS, samples=3, new=4, eos_ids=eos_ids)
    assert (row["ours"], row["peer"]) == (2 * 3 * n / 2, 2 * 3 * n / 5)


def test_what_the_peer_is_asked_to_sample(stopped):
    asked = {}

    def generate(input_ids, **options):
        asked.update(options, input_ids=input_ids)
        return torch.nn.functional.pad(input_ids, (0, 4), value=9).repeat_interleave(3, 0)

    both = tiny_model(), SimpleNamespace(generate=generate)
    row = bench.sampling("sampling", both, [[5, 6, 7], [0, 4]], ARGS, samples=3, new=4)
    assert row["peer"] == 2 * 3 * 4 / 5
    assert asked.pop("input_ids").tolist() == [[5, 6, 7], [0, 0, 4]]
    assert asked.pop("attention_mask").tolist() == [[1, 1, 1], [0, 1, 1]]
    assert asked == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4,
                     "num_return_sequences": 3, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip


def test_tokens_after_an_end_do_not_count():
    completions = torch.tensor([[5, 6, 7, 8], [5, 1, 0, 0], [2, 0, 1, 5], [5, 6, 7, 1]])
    assert bench.n_sampled(completions, (1, 2)) == 4 + 2 + 1 + 4
    assert bench.n_sampled(completions, ()) == 16


def products(operations: list[tuple]) -> int:
    """FLOPs of products that are noted: the last two arguments are (..., m, k) and (k, n), or of linear (n, k)."""
    total = 0
    for func, args, _ in operations:
        a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
        total += 2 * a.numel() * b.shape[0 if "linear" in func.name() else -1]
    return total


def test_operations_of_a_training_step_by_kind():
    """All products with weights and no others are products; forward and backward of attention and norms are theirs."""
    model = tiny_model(tied=False)
    head, B, T = model.head.weight.numel(), 3, 8
    step = bench.our_step(model, torch.tensor(bench.random_ids(64, [T] * B)), torch.float32)
    with bench.Operations() as noted:
        step()
    assert products(noted.of_kind["products"]) == 6 * bench.n_weights(model) * B * T - 6 * head * B
    names = {kind: [func.name() for func, _, _ in operations] for kind, operations in noted.of_kind.items()}
    assert [sum("scaled_dot_product" in name for name in names[kind]) for kind in bench.KINDS] == [0, 2 * 4, 0, 0]
    assert names["norms"].count("aten::linalg_vector_norm") == names["norms"].count("aten::mv") == 4 * 4 + 1
    assert not any(word in name for name in names["other operations"] for word in ("mm", "mv", "norm", "bmm"))


def test_operations_of_sampling_by_kind():
    model = tiny_model(tied=False)
    head, B, P, N = model.head.weight.numel(), 3, 5, 6
    with bench.Operations() as noted:
        bench.generate(model, bench.random_ids(64, [P] * B), max_new_tokens=N, eos_ids=())
    blocks = bench.n_weights(model) - head
    assert products(noted.of_kind["products"]) == 2 * B * (blocks * (P + N - 1) + head * N)
    names = {kind: [func.name() for func, _, _ in operations] for kind, operations in noted.of_kind.items()}
    assert names["attention"].count("aten::baddbmm") == names["attention"].count("aten::bmm") == 4 * (N - 1)
    assert sum(name.endswith("rms_norm") for name in names["norms"]) == (4 * 4 + 1) * N
    assert not any(word in name for name in names["other operations"] for word in ("mm", "linear", "rms_norm"))


def test_floor_leaves_the_time_of_products_and_of_attention(monkeypatch, capsys):
    def medians(calls, repeats, device):
        return [(call(), seconds)[1] for call, seconds in zip(calls, (10.0, 4.0, 3.0, 1.0, 0.5), strict=True)]

    monkeypatch.setattr(bench, "medians", medians)
    rows = bench.floor(bench.row("sampling, 3 x 4", 7.0, 5.0, "tokens/s", True), lambda: torch.ones(2).exp(), ARGS)
    assert rows == [bench.row("floor: sampling, 3 x 4: products", 7.0 * 10 / 4, 5.0, "tokens/s", True),
                    bench.row("floor: sampling, 3 x 4: products, attention", 7.0 * 10 / 7, 5.0, "tokens/s", True),
                    bench.row("floor: sampling, 3 x 4: all operations", 7.0 * 10 / 8.5, 5.0, "tokens/s", True)]
    assert bench.verdict(rows[0]) == "if nothing else took time"
    wanted = "products 40%, attention 30%, norms 10%, other operations 5%, between them 15%\n"
    assert capsys.readouterr().out == f"sampling, 3 x 4: of our 10000.0 ms, {wanted}"


def test_floor_at_toy_size():
    model, prompts = tiny_model(), bench.random_ids(64, [8] * 3)
    for step in (bench.our_step(model, torch.tensor(prompts), torch.float32),
                 lambda: bench.generate(model, prompts, max_new_tokens=4, eos_ids=range(9))):  # fmt: skip
        for row in bench.floor(bench.row("x", 6.0, 5.0, "tokens/s", True), step, ARGS):
            check(row)
            assert row["peer"] == 5.0 and row["unit"] == "tokens/s"


def test_trl_trains_on_the_same_tokens_at_toy_size(tmp_path):
    oracle("trl")
    oracle("transformers")
    row = bench.sft_trainer("trl.SFTTrainer", ARGS, width=32, batch=4, steps=2)
    check(row)
    assert row["unit"] == "tokens/s" and row["higher_is_better"]

    rows = [Row([5, 6, 7, 8], [0, 1, 1, 1]), Row([9, 8, 7], [0, 0, 1])]
    model = bench.twins(32, tiny().vocab_size, "cpu", depth=1)[1]
    trainer = bench.their_trainer(model, rows, 2, str(tmp_path), "cpu")
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["labels"][batch["labels"] != -100].tolist()) == [6, 7, 7, 8]
    assert batch["attention_mask"].sum() == 7
    config = trainer.args
    assert not (config.bf16 or config.fp16 or config.gradient_checkpointing)
    assert config.gradient_accumulation_steps == 1 and config.max_grad_norm == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# dpo


@pytest.mark.parametrize("before", [False, True])
def test_trl_takes_the_same_dpo_step_at_toy_size(monkeypatch, before):
    """Of one batch, so that no order matters: what both then say has changed alike."""
    oracle("trl")
    ids, made, twins = torch.randint(5, 500, (4, 20)), [], bench.twins

    def kept(*args, **options):
        made.extend(twins(*args, **options))
        return made

    def race(ours, theirs, repeats, device):
        said = [(made[0](ids).detach(), made[1](ids).logits.detach()) for call in (int, ours, theirs) if call() or True]
        changes = [(after - said[0][i]).flatten() for i, after in ((0, said[2][0]), (1, said[2][1]))]
        assert torch.corrcoef(torch.stack(changes))[0, 1] > (0.9 if before else 0.98)  # of made-up logps
        return 2.0, 5.0

    monkeypatch.setattr(bench, "twins", kept)
    monkeypatch.setattr(bench, "race", race)
    row = bench.dpo_trainer("toy", ARGS, before=before, batch=4, steps=1)
    check(row)
    assert row["ours"] == 2.0 and row["unit"] == "pairs/s" and row["higher_is_better"]


@LINUX
def test_memory_of_a_dpo_step_at_toy_size(monkeypatch):
    """In this process, with few words: what counts is that both take a step."""
    oracle("trl")
    monkeypatch.setattr(bench, "VOCABULARY", 2048)
    assert all(bench.dpo_memory("cpu", which) >= 0 for which in ("ours", "theirs"))


# ----------------------------------------------------------------------------------------------------------------------
# lora


def test_peft_takes_a_lora_step_at_toy_size(monkeypatch):
    """Each side changes its own model, and what it says, though only the adapters learn."""
    oracle("peft")
    ids, made, twins = torch.randint(5, 500, (2, 8)), [], bench.twins
    monkeypatch.setattr(bench, "twins", lambda *args: made.extend(twins(*args, depth=1)) or made)
    steps = bench.lora_steps(32, (2, 8), "cpu")
    for i, step in enumerate(steps):
        said = []
        for call in (int, step):
            call()
            said.append([made[0](ids).detach(), made[1](ids).logits.detach()])
        assert [bool((a != b).any()) for a, b in zip(*said, strict=True)] == [i == 0, i == 1]
    taken = []
    monkeypatch.setattr(bench, "lora_steps", lambda *x: (lambda: taken.append("ours"), lambda: taken.append("theirs")))
    monkeypatch.setattr(bench, "peak_of", lambda step, device: step())
    for which in ("ours", "theirs"):
        bench.lora_memory("cpu", which)
        assert taken == [which] * 2  # the first pays for what is made once
        taken.clear()


# ----------------------------------------------------------------------------------------------------------------------
# grpo


def test_grpo_trainer_at_toy_size(stopped, tmp_path, capsys, monkeypatch):
    """By a clock on which a rollout takes 1 second, scoring 2 and an update 4."""
    oracle("trl")
    clock = iter([8.0 * step + t for step in range(2) for t in (0, 1, 3, 7)])
    monkeypatch.setattr(bench, "now", lambda device: next(clock))
    row = bench.grpo_trainer("trl.GRPOTrainer", ARGS, prompts=2, group=2, new=4, steps=2, width=32)
    check(row)
    assert (row["ours"], row["peer"], row["unit"]) == (60 * 2 / 2, 60 * 2 / 5, "steps/min") and row["higher_is_better"]
    seconds = re.search(r"a step of ours is rollout (\S+) s, scoring (\S+) s, update (\S+) s;", capsys.readouterr().out)
    assert [float(seconds[i]) * (ARGS.repeats + 1) for i in (1, 2, 3)] == pytest.approx([1, 2, 4], abs=0.01)
    model = bench.twins(32, tiny().vocab_size, "cpu", depth=1)[1]
    config = bench.their_grpo_trainer(model, ["a", "b"], str(tmp_path), ARGS, 2, 2, 4, 1).args
    assert not (config.bf16 or config.fp16 or config.gradient_checkpointing) and config.beta == 0.0
    assert config.gradient_accumulation_steps == 1 and config.max_grad_norm == 1.0 and config.max_completion_length == 4
    assert config.per_device_train_batch_size == 4 and config.num_generations == 2 and config.num_iterations == 1


def test_variety_is_the_share_of_new_tokens():
    assert bench.variety([1, 2, 2, 2]) == 0.5 and bench.variety([3]) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# quantize


SMALL = Config("llama", vocab_size=512, depth=2, width=64, heads=2, kv_heads=1, head_dim=32, ffn_width=128,
               max_length=256)  # fmt: skip


def test_bytes_of_a_step_are_those_of_codes_and_scales():
    per_block = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    plain = Transformer(SMALL).requires_grad_(False)
    assert bench.weight_bytes(plain.bfloat16()) == 2 * (512 * 64 + 2 * per_block)
    rows = 64 + 2 * 32 + 64 + 2 * 128  # of 64 inputs: one group each; those of `down`, 64 rows of 128, have two
    wanted = ("int8", per_block, 2 * (rows + 64)), ("int4", per_block / 2, 3 * (rows + 2 * 64))
    for name, of_codes, of_scales in wanted:
        narrow = bench.rounded_model(Transformer(SMALL).requires_grad_(False), *bench.SCHEMES[name]).bfloat16()
        less = 64 if name == "int4" else 0  # two zeros of a row of `down` share a byte
        assert bench.weight_bytes(narrow) == 2 * 512 * 64 + 2 * (of_codes + of_scales - less)
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_quantized_decoding_against_its_ceiling(monkeypatch):
    made: list = []

    def medians(calls, repeats, device):
        made.append(calls)
        for call in calls:
            call()
        return [2.0, 5.0, 0.5]

    monkeypatch.setattr(bench, "medians", medians)
    plain = Transformer(SMALL).requires_grad_(False)
    narrow = bench.rounded_model(plain, *bench.SCHEMES["int4"]).bfloat16()
    plain = plain.bfloat16()
    rate, n_bytes, ceiling = bench.decoding_of_bf16("int4, 3 at a time", narrow, plain, 3, 5, 4, ARGS)
    assert (rate["ours"], rate["peer"], rate["ratio"]) == (6.0, 2.4, 2.5)
    assert 0 < n_bytes["ratio"] < 1 and n_bytes["ours"] < bench.decoding_bytes(plain, 3, 5, 4) / 4e6
    cached = bench.decoding_bytes(plain, 3, 5, 4) / 4 - bench.weight_bytes(plain)
    assert n_bytes["ours"] == pytest.approx((bench.weight_bytes(narrow) + cached) / 1e6)
    assert n_bytes["peer"] == pytest.approx(bench.decoding_bytes(plain, 3, 5, 4) / 4e6)
    assert ceiling["peer"] == pytest.approx(3 * 2 * 2**27 / 0.5 / (1e6 * n_bytes["ours"]))
    for row in (rate, n_bytes, ceiling):
        check(row)


def test_the_quantize_area_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "large", lambda depth: SMALL)
    bench.main(bench.get_args(["quantize", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]))
    rows = json.loads((tmp_path / "quantize.json").read_text())["rows"]
    assert len(rows) == 14 and len({row["name"] for row in rows}) == 14
    for row in rows:
        check(row)


# ----------------------------------------------------------------------------------------------------------------------
# gpu


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"head_dim": 48, "heads": 6, "kv_heads": 3}])
def test_flops_are_those_of_the_products(monkeypatch, changes):
    monkeypatch.setattr(kernels, "rms_norm", kernels.rms_norm_reference)  # the kernel's backward has small products
    model, length = tiny_model(**changes), 16
    input_ids = torch.tensor(bench.random_ids(64, [length] * 3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the fused one it knows nothing
        model(input_ids).sum().backward()
    assert bench.training_flops(model, length) * input_ids.numel() == counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"tied": False}])
def test_decoding_bytes_are_those_of_weights_and_cache(changes):
    model = tiny_model(**changes).bfloat16()
    products = [m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear)]
    caches = [KVCache(model, 5, n, torch.bfloat16) for n in (7, 8, 9)]  # no smaller ones would do
    read = 3 * sum(products) + sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    assert bench.decoding_bytes(model, rows=5, prompt=7, new=3) == read


def test_training_against_its_ceiling(stopped):
    config = Config.from_depth(1, 64, 8)
    row = bench.training_of_ceiling(config, 3, torch.float32, ARGS)
    check(row)
    assert (row["ours"], row["unit"], row["higher_is_better"]) == (3 * 8 / 2, "tokens/s", True)
    flops = bench.training_flops(Transformer(config), 8)
    assert row["ratio"] == pytest.approx((3 * 8 * flops / 2) / (2 * 512**3 / 5))  # FLOPs a second, done and possible


def test_decoding_against_its_ceiling(stopped):
    config = Config.from_depth(1, 64, 16)
    row = bench.decoding_of_ceiling(config, 3, 5, 4, torch.float32, ARGS)
    check(row)
    assert (row["ours"], row["unit"], row["higher_is_better"]) == (3 * 4 / 2, "tokens/s", True)
    n_bytes = bench.decoding_bytes(Transformer(config), 3, 5, 4)
    assert row["ratio"] == pytest.approx((n_bytes / 2) / (2 * 2**26 / 5))  # bytes a second, read and possible


def test_default_size_on_a_gpu_is_half_a_billion(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = bench.get_args(["gpu"])
    assert args.device == "cuda" and args.compile
    with torch.device("meta"):
        model = Transformer(Config.from_depth(args.depth, 32768, 2048))
    assert 0.45e9 < bench.n_weights(model) < 0.6e9
    assert not bench.get_args(["sft"]).compile


def test_gpu_area_at_toy_size_writes_what_it_prints(tmp_path, capsys):
    flags = ["--device", "cpu", "--repeats", "1", "--out", str(tmp_path), "--batch-size", "1"]
    bench.main(bench.get_args(["gpu", *flags]))
    (file,) = tmp_path.iterdir()
    assert file.name == "gpu.json"
    rows = json.loads(file.read_text()).pop("rows")
    printed = capsys.readouterr().out.splitlines()
    assert sum("no CUDA" in line for line in printed) == 1
    assert len(rows) == 3
    for row, line in zip(rows, printed[-3:], strict=True):
        check(row)
        assert line.startswith(row["name"])
        assert line.endswith(f" {row['ratio']:.0%} of the ceiling")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_verdict():
    assert bench.verdict(bench.row("rms_norm: time", 2.0, 3.0, "ms", False)) == "better"
    assert bench.verdict(bench.row("rms_norm: time", 3.0, 2.0, "ms", False)) == "worse"
    memory = [bench.verdict(bench.row("peak memory of a step, V", n, 100.0, "MB", False)) for n in (25.0, 26.0)]
    assert memory == ["better  goal 0.25 met", "better  goal 0.25 missed"]
    assert bench.verdict(bench.row("sampling, 2 prompts", 1.9, 1.0, "tokens/s", True)) == "better  goal 2.0 missed"
    assert bench.verdict(bench.row("sampling, 2 prompts", 2.0, 1.0, "tokens/s", True)) == "better  goal 2.0 met"
    assert bench.verdict(bench.row("sampling at width 512, 1 prompt", 0.5, 1.0, "tokens/s", True)) == "worse"
    assert "goal 1.6 missed" in bench.verdict(bench.row("trl.GRPOTrainer, 8 prompts x 8 answers", 1.5, 1.0, "", True))


def test_every_goal_belongs_to_a_row(monkeypatch):
    named = []
    monkeypatch.setattr(bench, "library", lambda name: SimpleNamespace(__version__="0"))
    monkeypatch.setattr(bench, "installed", lambda name: True)
    monkeypatch.setattr(bench, "twins", lambda *x: (None, None))
    for function in ("sampling", "training", "sft_trainer", "dpo_trainer", "grpo_trainer"):
        whole = function == "grpo_trainer"  # a goal for each of its rows
        monkeypatch.setattr(bench, function, lambda name, *x, whole=whole, **options: named.append(
            name if whole else name.split(",")[0]))  # fmt: skip
    monkeypatch.setattr(bench, "our_step", lambda *x: None)
    monkeypatch.setattr(bench, "floor", lambda *x: [])
    monkeypatch.setattr(bench, "compiled", lambda *x: [])
    monkeypatch.setattr(bench, "in_fresh_process", lambda *x: 1.0)
    bench.bench_sft(ARGS)
    bench.bench_grpo(ARGS)
    memory = [row["name"].split(",")[0] for row in bench.bench_dpo(Namespace(device="cuda")) if row]
    monkeypatch.setattr(bench, "lora_steps", lambda *x: (None, None))
    monkeypatch.setattr(bench, "race", lambda *x: (1.0, 1.0))
    rows = bench.bench_lora(Namespace(device="cuda", repeats=1))
    assert [row["ours"] for row in rows] == [64 * 64, 16 * 64, 1.0]  # tokens a second, where a step takes one
    adapters = [row["name"].split(",")[0] for row in rows]
    measured = json.loads((Path(bench.__file__).parent / "results" / "bench" / "quantize.json").read_text())["rows"]
    narrow = {row["name"].split(",")[0] for row in measured} - {"bytes of a step", "prompts"}
    assert set(bench.GOALS) == {*named, *memory, *adapters, *narrow} - {"sampling at width 512"}


def test_compiled_rows_are_compiled_and_leave_the_switch_off(monkeypatch):
    seen = []

    def sampled(name, pair, prompts, args, *, decode):
        seen.append((bench.kernels._compiling, args.compile, decode is bench.generate.__wrapped__))
        seen.append([block._compiled_call_impl is not None for block in pair[0].blocks])
        return name

    def trained(name, pair, shape, args):
        seen.append((bench.kernels._compiling, args.compile, shape))
        return name

    monkeypatch.setattr(bench, "twins", lambda *x: (Transformer(Config.from_depth(1, 64, 32)), None))
    monkeypatch.setattr(bench, "sampling", sampled)
    monkeypatch.setattr(bench, "training", trained)
    names = bench.compiled([[1]], ARGS)
    assert all(bench.verdict(bench.row(name, 1.0, 1.0, "", True)).endswith("missed") for name in names), "goals apply"
    assert seen == [(True, True, True), [True], (True, True, (64, 64))]
    assert not bench.kernels._compiling and not ARGS.compile
    monkeypatch.setattr(bench.kernels, "_has_compiler", lambda: False)
    assert bench.compiled([[1]], ARGS) == []


def test_a_missing_library_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "sft", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        bench.run(bench.main, bench.get_args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformers" in line and "requirements-dev.txt" in line
    requirements = Path(bench.__file__).with_name("requirements-dev.txt").read_text()
    assert "transformers" in requirements and "trl" in requirements


@pytest.mark.parametrize("argv", [["speed"], ["sft", "--repeats", "0"], ["--no"]])
def test_a_wrong_flag_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.get_args(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_rows_of_an_optional_library_are_left_out_aloud(capsys):
    assert bench.installed("torch")
    assert capsys.readouterr().out == ""
    assert not bench.installed("no_such_library")
    assert capsys.readouterr().out == "no_such_library is not installed: its rows are left out\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda"):
        bench.get_args(["gpu", "--device", "cuda"])
