"""Facts about sft.py: loss and mask, packing, cutting, options, measuring, whole runs, bad input, real shapes."""

import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import loop as loop_module
import sft
from data import chat, world
from data.chat import Row
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop, learning_rate
from model import Block, Config, Transformer, load, save, token_logps
from sft import (
    Batch,
    Lomo,
    Muon,
    collate,
    document,
    fit,
    get_args,
    ifd,
    main,
    neftune,
    orthogonalized,
    pack,
    rouge_l,
    sft_loss,
)
from tests.test_loop import on_two_ranks

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parent.parent


def small(vocab_size: int = 32, *, seed: int = 0, depth: int = 1, max_length: int = 160) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(Config.from_depth(depth, vocab_size, max_length))


def ragged(lengths=(3, 40, 2, 17, 9, 29, 5), *, vocab_size: int = 32, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for n in lengths:
        first = rng.randint(1, n - 1)  # where the completion begins
        rows.append(Row([rng.randrange(vocab_size) for _ in range(n)], [int(i >= first) for i in range(n)]))
    return rows


def brute_force(model: Transformer, rows: list[Row]) -> float:
    """-log p of each trained token, one row and one token at a time, in float64."""
    total, model = 0.0, model.double()
    for row in rows:
        for t, trained in enumerate(row.completion_mask):
            if trained:
                logits = model(torch.tensor([row.input_ids[:t]]))[0, -1]
                total -= (logits[row.input_ids[t]] - logits.logsumexp(0)).item()
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The objective


@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_the_sum_over_trained_tokens(packed):
    rows, model = ragged(), small().double()
    groups = [rows[:4], rows[4:]] if packed else [[row] for row in rows]
    assert sft_loss(model, collate(groups, CPU)).item() == pytest.approx(brute_force(model, rows), rel=1e-9)


def test_loss_knows_nothing_of_tokens_outside_the_mask():
    """Nothing trained: 0, not NaN. One token trained: what comes after it has no say."""
    model = small().double()
    ids, mask = torch.randint(32, (1, 12)), torch.zeros(1, 12, dtype=torch.long)
    assert sft_loss(model, Batch(ids, mask, None)).item() == 0.0
    mask[0, 5] = 1
    changed = ids.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 32  # tokens after the only trained one
    assert sft_loss(model, Batch(ids, mask, None)).item() == sft_loss(model, Batch(changed, mask, None)).item()


def test_neftune_scales_with_the_length_of_each_document():
    documents = torch.tensor([[0] * 4 + [1] * 16 + [-1] * 4])
    zeros = torch.zeros(200, 24, 8)
    torch.manual_seed(0)
    noise = neftune(zeros, documents.expand(200, -1), 5.0)
    for start, end in ((0, 4), (4, 20)):
        bound = 5.0 / math.sqrt((end - start) * 8)
        part = noise[:, start:end]
        assert part.abs().max() <= bound and part.abs().max() > 0.99 * bound
        assert part.flatten(1).norm(dim=1).mean().item() == pytest.approx(5 / math.sqrt(3), rel=0.02)
        assert abs(part.mean().item()) < 0.02 * bound
        assert len(part.unique()) > 0.9 * min(part.numel(), 20_000)  # each number is drawn by itself
    assert torch.equal(neftune(zeros + 1, documents, 0.0), zeros + 1)


def test_lomo_is_gradient_descent_that_keeps_no_gradient():
    model, twin, rows = small().double(), small().double(), collate([ragged()], CPU)
    lomo, sgd = Lomo(model, 0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for rate in (0.1, 0.05):
        lomo.param_groups[0]["lr"] = sgd.param_groups[0]["lr"] = rate
        sft_loss(model, rows).backward()
        lomo.step()
        sgd.zero_grad()
        sft_loss(twin, rows).backward()
        sgd.step()
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", [Lomo, partial(Muon, weight_decay=0.0)])
def test_what_is_quantized_does_not_learn(kind):
    model = small()
    model.config = replace(model.config, quantization={"bits": 4})
    with pytest.raises(UserError, match="--model: its matrices are quantized"):
        kind(model, lr=0.1)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic polynomial on singular values, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def test_orthogonalized_acts_on_singular_values_alone():
    shapes = ((8, 24), 1), ((24, 8), 9), ((8, 8), 1), ((5, 7), 1e-3)
    matrices = [torch.randn(shape) * scale for shape, scale in shapes]
    for matrix, found in zip(matrices, orthogonalized(matrices), strict=True):
        torch.testing.assert_close(found.double(), newton_schulz(matrix), atol=1e-4, rtol=0)
    values = torch.linalg.svdvals(orthogonalized([torch.randn(16, 48)])[0])
    assert 0.6 < values.min() < values.max() < 1.3
    assert not orthogonalized([torch.zeros(3, 4)])[0].any()  # and not NaN


def test_orthogonalized_multiplies_in_whole_fp32(monkeypatch):
    """Though Loop allows TF32 on CUDA, and goes on doing so."""
    seen, whole, matrix = [], torch.baddbmm, torch.randn(8, 24)
    wanted, before = orthogonalized([matrix])[0], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **named: seen.append(torch.get_float32_matmul_precision())
                        or whole(*a, **named))  # fmt: skip
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(orthogonalized([matrix])[0], wanted) and seen == ["highest"] * 5
        with pytest.raises(RuntimeError):
            orthogonalized([torch.zeros(2, 0)[:, :, None], matrix])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_muon_is_momentum_orthogonalized_and_adamw_elsewhere():
    model, twin = small(), small()
    muon, plain = Muon(model, 0.1, 0.5), loop_module.adamw(twin, 0.1, 0.5)
    matrices = {name: p.detach().clone() for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}
    assert len(matrices) == 4 * model.config.depth
    buffers = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for rate in (0.1, 0.03, 0.01):
        muon.param_groups[0]["lr"] = rate
        for optimizer in (muon, plain):
            for group in optimizer.param_groups:
                group["lr"] = rate
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        for (name, w), grad in zip(matrices.items(), [dict(model.named_parameters())[name].grad for name in matrices],
                                   strict=True):  # fmt: skip
            buffers[name] = 0.95 * buffers[name] + 0.05 * grad
            update = newton_schulz(0.05 * grad + 0.95 * buffers[name]).float()
            matrices[name] = w - rate * (0.2 * math.sqrt(max(w.shape)) * update + 0.5 * w)
        muon.step()
        plain.step()
        others = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, matrices.get(name, others[name]), atol=1e-5, rtol=1e-4)


def test_a_convolution_is_a_matrix_to_muon():
    layer = torch.nn.Conv2d(4, 6, 3)
    muon, before = Muon(layer, 0.1, 0.0), layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(before)
    direction = newton_schulz(layer.weight.grad.flatten(1)).float().view_as(before)  # of whatever size the gradient is
    muon.step()
    torch.testing.assert_close(layer.weight, before - 0.1 * 0.2 * 6 * direction, atol=1e-5, rtol=1e-4)  # 36 = 4 * 3 * 3


def test_ifd_is_the_ratio_of_the_paper():
    assert ifd(1.0, 4.0) == 0.25  # the question makes the answer four times easier


def common_words(x: list[str], y: list[str]) -> int:
    """The longest common subsequence, by trying them all."""
    if not x or not y:
        return 0
    return max(common_words(x[1:], y), common_words(x, y[1:]), (x[0] == y[0]) + common_words(x[1:], y[1:]))


def test_rouge_l_against_all_subsequences():
    rng = random.Random(0)
    for _ in range(60):
        x, y = ([rng.choice("abc") for _ in range(rng.randint(1, 6))] for _ in range(2))
        n = common_words(x, y)
        precision, recall = n / len(x), n / len(y)
        wanted = 2 * precision * recall / (precision + recall) if n else 0.0
        assert rouge_l(" ".join(x), " ".join(y)) == pytest.approx(wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_a_document_trains_on_all_but_its_first_token():
    tokenizer = tiny()
    row = document("We sort 3 1 2.", tokenizer)
    assert tokenizer.decode(row.input_ids[:-1]) == "We sort 3 1 2." and row.input_ids[-1] == tokenizer.eos_ids[0]
    assert row.completion_mask == [0] + [1] * (len(row.input_ids) - 1)
    with_bos = document("We sort 3 1 2.", replace(tokenizer, bos_id=7, add_bos=True))
    assert with_bos.input_ids == [7, *row.input_ids] and with_bos.completion_mask == [0, 1, *row.completion_mask[1:]]


@pytest.mark.parametrize("n", range(1, 25))
def test_the_end_is_trained_on_only_where_it_is(n):
    """Cut and split at every length: no token is made up, moved or trained on where nothing comes before it."""
    whole = Row(list(range(100, 112)), [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1])
    for policy in ("cut", "split", "drop"):
        counts = Counter()
        parts = list(fit([Row(list(whole.input_ids), list(whole.completion_mask))], n, policy, counts))
        assert all(len(ids) <= n and mask[0] == 0 < sum(mask) for ids, mask in parts)
        trained = [i for part in parts for i, m in zip(part.input_ids, part.completion_mask, strict=True) if m]
        if n >= 12:
            assert [(p.input_ids, p.completion_mask) for p in parts] == [tuple(whole)] and not counts
            continue
        assert counts["dropped" if policy == "drop" else policy] == 1
        assert (111 in trained) == (policy == "split" and 11 % n != 0)
        if policy == "drop":
            assert parts == []
        if policy == "cut":
            assert trained == [i for i, m in zip(whole.input_ids[:n], whole.completion_mask[:n], strict=True) if m]
            assert len(parts) + counts["without a trained token"] == 1
        if policy == "split":
            assert trained == [100 + i for i, m in enumerate(whole.completion_mask) if m and i % n]
            assert len(parts) + counts["without a trained token"] == math.ceil(12 / n)


def test_a_row_that_is_too_long_is_refused_with_its_length():
    with pytest.raises(UserError, match=r"a row has 40 tokens, --max-length is 39"):
        list(fit(ragged(), 39, "refuse", Counter()))


def test_packing_keeps_every_row_once_and_fills_rows():
    rows = ragged([random.Random(1).randint(2, 60) for _ in range(400)])
    groups = list(pack(iter(rows), 64))
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, rows))
    filled = [sum(len(row.input_ids) for row in group) for group in groups]
    assert max(filled) <= 64 and sum(filled) > 0.93 * 64 * len(groups)


def test_packed_rows_come_in_about_their_order():
    """A stream is not held back to its end: what comes out early was put in early."""
    rows = ragged([random.Random(2).randint(2, 60) for _ in range(1000)])
    place = {id(row): i for i, row in enumerate(rows)}
    groups = list(pack(iter(rows), 64))
    first = [place[id(row)] for group in groups[: len(groups) // 4] for row in group]
    assert max(first) < 700


def lengths(groups) -> list[list[int]]:
    return [[len(row.input_ids) for row in group] for group in groups]


def test_packing_is_best_fit():
    """A row goes where it leaves the least room, and no earlier than it must: an exact fit is a fit."""
    assert sorted(lengths(pack(ragged((30, 40, 24)), 64))) == [[30], [40, 24]]
    assert sorted(lengths(pack(ragged((50, 20, 37, 10, 6, 4)), 64))) == [[20, 37, 6], [50, 10, 4]]


def test_packing_holds_at_most_64_groups_back():
    """Then the fullest goes, of equals the oldest; a group that is full goes at once and counts no more."""
    rows, taken = ragged((33,) * 70 + (60,) + (33,) * 30), []
    groups = pack((taken.append(row) or row for row in rows), 64)
    out = []
    for group in groups:
        out += group
        assert len(taken) - len(out) <= 64 or len(taken) == len(rows)
    fullest = out.index(rows[70])
    assert out[:fullest] + out[fullest + 1 :] == rows[:70] + rows[71:] and fullest == 6
    full = ragged((61,) * 90 + (33,) * 60 + (31,))
    assert lengths(pack(full, 64)) == [[61]] * 90 + [[33, 31]] + [[33]] * 59
    joined = ragged((33,) * 70 + (5,) * 5)  # the 64 that wait are not more for what joins one of them
    assert lengths(pack(joined, 64)) == [[33]] * 6 + [[33, 5, 5, 5, 5, 5]] + [[33]] * 63


def test_packing_changes_no_gradient():
    """Documents packed into a row: loss and gradients are those of the documents alone, whatever stands beside them."""
    rows = ragged((3, 40, 2, 17, 9, 29, 5, 31))
    packed, alone = small().double(), small().double()
    sft_loss(packed, collate(list(pack(rows, 64)), CPU)).backward()
    for row in rows:
        sft_loss(alone, collate([[row]], CPU)).backward()
    for p, q in zip(packed.parameters(), alone.parameters(), strict=True):  # angles are rounded to fp32 at each place
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_collate_pads_on_the_right_and_trains_on_no_padding():
    rows = [Row([7, 8, 9], [0, 1, 1]), Row([5, 6], [0, 1]), Row([1, 2, 3, 4], [0, 0, 0, 1])]
    batch = collate([rows[:2], rows[2:]], CPU, multiple_of=4)
    assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [0, 0, 0, 0, -1, -1, -1, -1]]
    assert collate([[row] for row in rows], CPU).documents is None
    empty = collate([], CPU)
    assert empty.input_ids.shape == (1, 1) and empty.completion_mask.sum() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save(small(tiny().vocab_size), tiny(), folder)
    return folder


PROBLEMS = [
    {"question": f"Tom has {n} apples and buys {n + 3} more. How many?",
     "answer": f"Tom has {n} + {n + 3} = {2 * n + 3}.", "level": n} for n in range(8)
]  # fmt: skip


@pytest.fixture
def problems(tmp_path) -> Path:
    return write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)


def run(checkpoint: Path, problems: Path, out: Path, *flags: object) -> dict:
    return main(args_for(checkpoint, problems, out, *flags))


def args_for(checkpoint: Path, problems: Path, out: Path, *flags: object) -> Namespace:
    argv = ["--model", checkpoint, "--data", problems, "--map", "question=prompt", "answer=completion", "--out", out,
            "--device", "cpu", "--max-length", 160, "--batch-size", 4, "--lr", 1e-2, "--warmup", 2, "--log-every", 1,
            *flags]  # fmt: skip
    return get_args(list(map(str, argv)))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load(out / "checkpoint")[0].named_parameters())


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def encoded() -> list[Row]:
    return [sft.encode({"prompt": r["question"], "completion": r["answer"]}, tiny()) for r in PROBLEMS]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def unequal(tmp_path) -> Path:
    """Answers of very different lengths."""
    rows = [dict(row, answer=row["answer"] * (1 + 3 * (i % 2))) for i, row in enumerate(PROBLEMS)]
    return write_jsonl(tmp_path / "unequal.jsonl", rows)


def watch_loss(monkeypatch) -> list[Namespace]:
    """What every call of sft_loss is given: model and its mode, batch, step and the noise of the embeddings."""
    calls = []

    def watched(model, batch, embeddings=None):
        noise = None if embeddings is None else (embeddings - model.embed(batch.input_ids)).detach()
        calls.append(Namespace(model=model, training=model.training, batch=batch, noise=noise,
                               step=loop_module.Loop.step))  # fmt: skip
        return sft_loss(model, batch, embeddings)

    monkeypatch.setattr(sft, "sft_loss", watched)
    return calls


class Stop(Exception): ...


def stop_after(last: int, monkeypatch) -> None:
    """Runs of sft.py die when they have saved step `last`."""

    class StopsAfter(loop_module.Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == last:
                raise Stop

    monkeypatch.setattr(sft, "Loop", StopsAfter)


def test_trained_tokens_are_answer_and_end(checkpoint, problems, tmp_path):
    """Of a file with other names for its fields: decoded, what is trained on is the answer and the ending token."""
    args = args_for(checkpoint, problems, tmp_path / "out")
    train, _ = sft.file_rows(args, str(problems), loop_module.Loop(args, "sft"))
    for row, problem in zip(train, PROBLEMS, strict=True):
        ids, mask = sft.encode(row, tiny())
        trained = [i for i, m in zip(ids, mask, strict=True) if m]
        assert tiny().decode(trained[:-1]) == problem["answer"] and trained[-1] in tiny().eos_ids


def test_the_chat_format_holds_for_all_that_a_run_renders(checkpoint, tmp_path, monkeypatch):
    seen = []

    def look(args, model, tokenizer, loop):
        seen.append(tokenizer.decode(chat.render([{"role": "user", "content": "Hello"}], tokenizer).input_ids))
        raise Stop

    monkeypatch.setattr(sft, "examples", look)
    for flags in ((), ("--chat-format", "qwen2")):
        with pytest.raises(Stop):
            main(get_args(flags_of(checkpoint, "rollouts", tmp_path, "--device", "cpu", *flags)))
    assert ["system" in text for text in seen] == [False, True]


def test_the_chat_format_that_was_trained_is_that_of_what_is_saved(checkpoint, problems, tmp_path):
    run(checkpoint, problems, tmp_path / "out", "--chat-format", "qwen2", "--steps", 1)
    assert load(tmp_path / "out" / "checkpoint")[1].chat_format == "qwen2" != tiny().chat_format


def test_eight_rows_are_learned_by_heart(checkpoint, problems, tmp_path):
    result = run(checkpoint, problems, tmp_path / "out", "--epochs", 300, "--no-pack")
    assert result["before"] > 5 and result["after"] < 0.05 and result["higher_is_better"] is False
    model, tokenizer = load(tmp_path / "out" / "checkpoint")
    args = Namespace(max_new_tokens=32)
    chats = [[{"role": "user", "content": row["question"]}] for row in PROBLEMS]
    said = sft.answer(model.eval(), tokenizer, chats, args, samples=1, temperature=0.0, seed=0)
    assert [text for (text,) in said] == [row["answer"] for row in PROBLEMS]


@pytest.mark.parametrize("flags", [("--micro-batch-size", 1), ("--micro-batch-size", 3), ("--checkpoint-activations",)])
def test_splitting_a_batch_changes_nothing(checkpoint, unequal, tmp_path, flags):
    """Rows of very different lengths, in one forward pass or several: the same loss, gradient norm and weights."""
    common = ("--steps", 3, "--no-pack", "--lr", 1e-3)
    run(checkpoint, unequal, tmp_path / "whole", *common, "--micro-batch-size", 4)
    run(checkpoint, unequal, tmp_path / "split", *common, *flags)
    for whole, split in zip(logged(tmp_path / "whole"), logged(tmp_path / "split"), strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4)
    whole, split = weights(tmp_path / "whole"), weights(tmp_path / "split")
    assert difference(whole, split) < 1e-4
    start = dict(load(checkpoint)[0].named_parameters())
    assert all(not torch.equal(start[name], whole[name]) for name in whole)


@pytest.mark.parametrize("flags", [
    (), ("--optimizer", "muon"), ("--optimizer", "lomo", "--grad-clip", 0, "--lr", 0.1, "--weight-decay", 0),
])  # fmt: skip
def test_a_run_is_a_plain_loop(checkpoint, unequal, tmp_path, monkeypatch, flags):
    """Schedule, loss, clipping, AdamW's decay or LOMO: as somebody would write it who has one row at a time."""
    clipped = []  # AdamW hardly feels the scale of its gradients: their norm is looked at

    def watched(model, max_norm):
        norm = loop_module.clip(model, max_norm)
        clipped.append(loop_module.clip(model, 0.0).item())
        return norm

    monkeypatch.setattr(sft, "clip", watched)
    args = args_for(checkpoint, unequal, tmp_path / "out", "--steps", 5, "--batch-size", 8, "--micro-batch-size", 8,
                    "--no-pack", "--lr", 1e-3, "--weight-decay", 1.0, "--grad-clip", 0.5, *flags)  # fmt: skip
    main(args)
    train, _ = sft.file_rows(args, str(unequal), loop_module.Loop(args, "sft"))
    rows = [sft.encode(row, tiny()) for row in train]
    model, n_tokens = load(checkpoint)[0], sum(sum(row.completion_mask) for row in rows)
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 1.0}, {"params": others, "weight_decay": 0.0}]
    clips = "lomo" not in flags  # which has let go of the gradients
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95)) if clips else torch.optim.SGD(model.parameters())
    plain = Muon(model, args.lr, 1.0) if "muon" in flags else plain
    for step, line in enumerate(logged(tmp_path / "out"), start=1):
        plain.zero_grad()
        total = 0.0
        for row in rows:
            logps = model(torch.tensor([row.input_ids[:-1]]))[0].log_softmax(-1)
            said = logps.gather(-1, torch.tensor(row.input_ids[1:])[:, None])[:, 0]
            loss = -(said * torch.tensor(row.completion_mask[1:])).sum() / n_tokens
            loss.backward()
            total += loss.item()
        rate = learning_rate(step, 5, args.lr, 2, "wsd")
        assert line["loss"] == pytest.approx(total, rel=1e-5) and line["lr"] == rate
        assert ("grad_norm" in line) == clips
        if clips:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
    assert difference(weights(tmp_path / "out"), dict(model.named_parameters())) < 1e-4
    assert clipped == pytest.approx([0.5 if clips else 0.0] * 5, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["lomo", "muon"])
def test_other_optimizers_resume(checkpoint, problems, tmp_path, monkeypatch, optimizer):
    flags = ("--optimizer", optimizer, "--grad-clip", 0, "--micro-batch-size", 4, "--steps", 4, "--save-every", 2)
    run(checkpoint, problems, tmp_path / "whole", *flags)
    stop_after(2, monkeypatch)
    with pytest.raises(Stop):
        run(checkpoint, problems, tmp_path / "parts", *flags)
    monkeypatch.undo()
    run(checkpoint, problems, tmp_path / "parts", *flags, "--resume")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


def test_lomo_has_no_ranks(checkpoint, problems, tmp_path, monkeypatch):
    """Its updates happen before gradients could be summed: each rank would train a model of its own."""
    monkeypatch.setattr(loop_module.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="over ranks"):
        run(checkpoint, problems, tmp_path / "out", "--optimizer", "lomo", "--grad-clip", 0, "--micro-batch-size", 4)


def test_no_steps_are_no_steps(checkpoint, problems, tmp_path):
    result = run(checkpoint, problems, tmp_path / "out", "--steps", 0)
    assert result["before"] == result["after"] and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_every_row_once_an_epoch(checkpoint, problems, tmp_path, monkeypatch):
    calls = watch_loss(monkeypatch)
    run(checkpoint, problems, tmp_path / "out", "--epochs", 2, "--batch-size", 3, "--micro-batch-size", 2, "--no-pack")
    steps = Counter(call.step for call in calls for _ in call.batch.input_ids)
    assert steps == dict.fromkeys(range(1, 7), 3)  # 16 rows, three at a time
    rows = [row.input_ids for row in encoded()]
    seen = [ids for call in calls for ids in call.batch.input_ids.tolist()]
    order = [next(i for i, row in enumerate(rows) if ids[: len(row)] == row) for ids in seen]
    assert sorted(order[:8]) == sorted(order[8:16]) == list(range(8)) and order[:8] != order[8:16]


def test_packing_is_what_pack_says(checkpoint, problems, tmp_path, monkeypatch):
    calls = watch_loss(monkeypatch)
    run(checkpoint, problems, tmp_path / "packed", "--steps", 1)
    run(checkpoint, problems, tmp_path / "alone", "--steps", 1, "--no-pack")
    (packed, alone) = (call.batch for call in calls)
    assert packed.documents is not None and packed.documents.max() > 0 and alone.documents is None


@pytest.mark.parametrize("flags", [(), ("--no-pack",), ("--no-pack", "--micro-batch-size", 8)])
def test_noise_of_a_run_is_that_of_neftune(checkpoint, unequal, tmp_path, monkeypatch, flags):
    """Each document has its own length, which knows nothing of the padding beside it; the loss is that of the noise."""
    common = ("--steps", 2, "--batch-size", 8)
    calls = watch_loss(monkeypatch)
    run(checkpoint, unequal, tmp_path / "out", *common, "--neftune", 5, *flags)
    width, bounds = load(checkpoint)[0].config.width, []
    for call in calls:
        for b, row in enumerate(call.batch.documents):
            for d in set(row.tolist()) - {-1}:
                noise = call.noise[b][row == d]
                bounds.append(noise.abs().max().item() * math.sqrt(len(noise) * width))
    assert len(bounds) >= 16 and bounds == pytest.approx([5.0] * len(bounds), rel=0.05)
    assert len({call.noise[0, 0, 0].item() for call in calls}) == len(calls)
    calls.clear()
    run(checkpoint, unequal, tmp_path / "none", *common, *flags)
    assert all(call.noise is None for call in calls)
    assert logged(tmp_path / "out")[0]["loss"] != pytest.approx(logged(tmp_path / "none")[0]["loss"], rel=1e-4)


def test_forward_passes_are_in_dtype_and_weights_in_fp32(checkpoint, problems, tmp_path, monkeypatch):
    narrow = {}

    def watched(name):
        function = getattr(sft, name)

        def call(*arguments, **options):
            narrow[name] = torch.is_autocast_enabled("cpu")
            return function(*arguments, **options)

        monkeypatch.setattr(sft, name, call)

    for name in ("sft_loss", "token_logps", "clip"):
        watched(name)
    run(checkpoint, problems, tmp_path / "out", "--steps", 2, "--dtype", "bf16")
    assert narrow == {"sft_loss": True, "token_logps": True, "clip": False}
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.float32}


def test_compiled_runs_see_few_lengths(checkpoint, unequal, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "use_compile", lambda wanted: wanted)
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: None)
    calls, measured = watch_loss(monkeypatch), []
    monkeypatch.setattr(sft, "token_logps", lambda model, ids: measured.append(ids.shape[1]) or token_logps(model, ids))
    with torch._dynamo.config.patch(recompile_limit=8):
        run(checkpoint, unequal, tmp_path / "out", "--compile", "on", "--epochs", 2, "--no-pack")
    assert all(call.batch.input_ids.shape[1] % 64 == 0 for call in calls)
    assert measured and all(length % 64 == 0 for length in measured)


@pytest.mark.slow
def test_a_compiled_run_with_many_lengths_stays_under_the_limit(checkpoint, tmp_path, monkeypatch):
    """As on CUDA, where beyond the limit the run fails; Dynamo itself, and in the compiler's place plain PyTorch."""
    rows = ({"prompt": "a " * n, "completion": str(n)} for n in range(1, 64, 5))
    path, whole = write_jsonl(tmp_path / "many.jsonl", rows), Loop.compile

    def compiled(loop, model):
        whole(loop, model)
        torch._dynamo.config.recompile_limit = 8  # two padded lengths, with and without gradient, and the last batch

    monkeypatch.setattr(kernels, "use_compile", lambda wanted: wanted)
    monkeypatch.setattr(Loop, "compile", compiled)
    monkeypatch.setattr(Block, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        run(checkpoint, path, tmp_path / "out", "--map", "prompt=prompt", "--compile", "on", "--epochs", 1, "--no-pack",
            "--batch-size", 2)  # fmt: skip
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    torch._dynamo.reset()


def test_speed_counts_tokens_without_their_padding(checkpoint, unequal, tmp_path, monkeypatch):
    told = []
    log = loop_module.Loop.log
    monkeypatch.setattr(loop_module.Loop, "log", lambda *a, **kept: told.append(kept["tokens"]) or log(*a, **kept))
    args = args_for(checkpoint, unequal, tmp_path / "out", "--steps", 2, "--batch-size", 8, "--no-pack")
    main(args)
    train, _ = sft.file_rows(args, str(unequal), loop_module.Loop(args, "sft"))
    assert told == [sum(len(sft.encode(row, tiny()).input_ids) for row in train)] * 2


def test_activations_are_recomputed_when_asked(checkpoint, problems, tmp_path, monkeypatch):
    calls = watch_loss(monkeypatch)
    run(checkpoint, problems, tmp_path / "out", "--steps", 1)
    run(checkpoint, problems, tmp_path / "out", "--steps", 1, "--checkpoint-activations")
    assert [call.model.checkpoint_activations for call in calls] == [False, True]


def test_measuring_on_the_way_changes_nothing(checkpoint, problems, tmp_path, capsys):
    run(checkpoint, problems, tmp_path / "quiet", "--steps", 5, "--neftune", 5)
    assert "step 2:" not in capsys.readouterr().err
    run(checkpoint, problems, tmp_path / "out", "--steps", 5, "--neftune", 5, "--eval-every", 2)
    assert re.findall(r"step (\d): loss \d\.\d\d\d", capsys.readouterr().err) == ["2", "4"]  # the end has its own line
    assert difference(weights(tmp_path / "quiet"), weights(tmp_path / "out")) == 0


def on_a_rank(rank: int, folder: Path) -> None:
    for parallel in ("replicas", "fsdp"):
        run(folder / "model", folder / "unequal.jsonl", folder / parallel, "--parallel", parallel, *RANKS)


def answers_on_a_rank(rank: int, folder: Path) -> None:
    questions = [{"messages": [{"role": "user", "content": str(i)}], "part": "sort", "answer": "7"} for i in range(4)]
    sft.examples = lambda *_: (ragged((20,) * 8), {"questions": questions})
    main(get_args(flags_of(folder / "model", "rollouts", folder / "out", "--parallel", "fsdp", "--steps", 1,
                           "--device", "cpu")))  # fmt: skip


def test_shards_answer_together(checkpoint, tmp_path):
    """What rank 0 prints takes all ranks to generate: none may leave before."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(answers_on_a_rank, tmp_path)
    assert (tmp_path / "out" / "result.json").exists()


RANKS = ("--steps", 4, "--batch-size", 5, "--micro-batch-size", 2, "--lr", 1e-3, "--no-pack")


def test_two_ranks_equal_one(checkpoint, unequal, tmp_path):
    """Replicas and shards, 5 rows a step: of 3 and 2, so that one rank has an empty micro-batch."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    run(checkpoint, unequal, tmp_path / "one", *RANKS)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    for parallel in ("replicas", "fsdp"):
        for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / parallel), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert difference(weights(tmp_path / "one"), weights(tmp_path / parallel)) < 1e-4
        two = json.loads((tmp_path / parallel / "result.json").read_text())
        assert all(two[name] == pytest.approx(one[name], rel=1e-4) for name in ("before", "after", "ci95"))
        tokens = [json.loads((tmp_path / name / "checkpoint" / "training.json").read_text())["tokens"]
                  for name in ("one", parallel)]  # fmt: skip
        assert tokens[0] == tokens[1] > 0


def test_logged_loss_is_the_mean_over_the_tokens_of_the_step(checkpoint, problems, tmp_path):
    args = args_for(checkpoint, problems, tmp_path / "out", "--steps", 1, "--batch-size", 8, "--no-pack")
    main(args)
    rows = encoded()
    trained = sum(sum(row.completion_mask) for row in rows)
    wanted = brute_force(load(checkpoint)[0], rows) / trained
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["before"] == pytest.approx(wanted, rel=1e-4)  # the 8 rows are few: all are measured, as is said
    after = brute_force(load(tmp_path / "out" / "checkpoint")[0], rows) / trained
    assert result["after"] == pytest.approx(after, rel=1e-4) and after < 0.99 * wanted
    assert result["metric"] == "loss" and result["n"] == 8


def test_held_out_loss_is_the_mean_over_tokens(tmp_path):
    """Not the mean of the rows' means: lengths of 3 and 97."""
    args = get_args(["--model", "x", "--data", "y", "--out", str(tmp_path)])
    rows = ragged((3, 97, 4, 20, 60))
    found = sft.evaluate(small(), tiny(), {"rows": rows}, args, loop_module.Loop(args, "sft"))["loss"]
    wanted = brute_force(small(), rows) / sum(sum(row.completion_mask) for row in rows)
    assert len(found) == 5 and statistics.fmean(found) == pytest.approx(wanted, rel=1e-5)


def test_resuming_is_exact(checkpoint, problems, tmp_path, monkeypatch):
    flags = ("--steps", 7, "--save-every", 2, "--neftune", 5)
    run(checkpoint, problems, tmp_path / "whole", *flags)
    stop_after(4, monkeypatch)
    with pytest.raises(Stop):
        run(checkpoint, problems, tmp_path / "parts", *flags)
    monkeypatch.undo()
    calls = watch_loss(monkeypatch)
    result = run(checkpoint, problems, tmp_path / "parts", *flags, "--resume")
    assert calls and all(call.training for call in calls)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert result["before"] == json.loads((tmp_path / "whole" / "result.json").read_text())["before"]
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, 8))


def test_held_out_rows_are_not_trained_on(checkpoint, tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(400)]
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    args = get_args(["--model", str(checkpoint), "--data", str(path), "--out", str(tmp_path / "out")])
    loop = loop_module.Loop(args, "sft")
    train, held_out = sft.file_rows(args, str(path), loop)
    assert 16 <= len(held_out) < 60 and len(train) + len(held_out) == 400
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    trained, test = sft.examples(args, None, tiny(), loop)
    measured = {tuple(row.input_ids) for row in test["rows"]}
    assert len(trained) == len(train) and len(measured) == len(held_out)
    assert not measured & {tuple(row.input_ids) for row in trained}
    args.eval_data = str(write_jsonl(tmp_path / "other.jsonl", rows[:1]))
    train, held_out = sft.file_rows(args, str(path), loop)
    assert len(train) == 400 and [row["prompt"] for row in held_out] == ["Say 0."]
    other = write_jsonl(tmp_path / "theirs.jsonl", [{"q": f"Say {i}.", "completion": str(i)} for i in range(400)])
    args.map, args.eval_data = ["q=prompt"], str(other)  # --map is for both files
    assert sft.file_rows(args, str(other), loop)[1][399]["prompt"] == "Say 399."


def test_mix_weights_files(checkpoint, tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", ({"prompt": f"{name} {i}", "completion": "yes"} for i in range(12)))
    files = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    args = get_args(["--model", str(checkpoint), "--data", files, "--mix", "a.jsonl=2.5", "b.jsonl=0.25", "--out",
                     str(tmp_path / "out")])  # fmt: skip
    loop, drawn = loop_module.Loop(args, "sft"), []
    for args.seed in (0, 0, *range(1, 7)):
        train, _ = sft.file_rows(args, files, loop)
        counts = Counter(row["prompt"] for row in train)
        assert Counter(prompt[0] for prompt in counts.elements()) == {"a": 30, "b": 3}
        assert {(prompt[0], n) for prompt, n in counts.items()} == {("a", 2), ("a", 3), ("b", 1)}
        drawn.append(sorted(counts.elements()))
    assert drawn[0] == drawn[1] != drawn[2]  # the seed says which half


def test_mix_weights_parts_of_the_world():
    args = get_args(["--mix", *(f"{part}=0" for part in world.SFT_MIX if part != "reverse")])
    args.replay = 0.0
    rows = list(sft.world_rows(args, tiny(), 2000))
    assert all("reverse" in tiny().decode(row.input_ids) for row in rows)
    args = get_args(["--stage", "base"])
    tokens = [len(row.input_ids) for row in sft.world_rows(args, tiny(), 5000)]
    assert 5000 <= sum(tokens) < 5000 + tokens[-1] + 1
    first, again = ([row.input_ids for row in sft.world_rows(args, tiny(), 5000)] for _ in range(2))
    assert first == again
    args.seed = 1
    assert first != [row.input_ids for row in sft.world_rows(args, tiny(), 5000)]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_rows_of_the_world_never_come_again(stage, monkeypatch):
    """2000 are made at a time: the next 2000 are others, also than those of a run with another seed."""
    whole, seeds = {"base": world.base_documents, "sft": world.sft_rows}[stage], []
    monkeypatch.setattr(world, whole.__name__, lambda count, seed, *more: (
        seeds.append(seed), whole(count // 400, seed, *more))[1])  # fmt: skip
    args = get_args(["--stage", stage])
    for args.seed in (0, 1):
        rows = [tuple(row.input_ids) for row in sft.world_rows(args, tiny(), 2500)]
        assert len(rows) > 15 and len(set(rows)) == len(rows)
    assert len(seeds) >= 6 and len(set(seeds)) == len(seeds)


def test_replay_is_a_share_of_what_comes_out():
    rows, documents = ragged((5,) * 2000), ragged((7,) * 2000)
    out = list(sft.replay(rows, iter(documents), 0.3, random.Random(0)))
    assert [row for row in out if len(row.input_ids) == 5] == rows
    replayed = [row for row in out if len(row.input_ids) == 7]
    assert replayed == documents[: len(replayed)] and len(replayed) / len(out) == pytest.approx(0.3, abs=0.02)
    args, made = get_args([]), []
    for args.seed, args.replay in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)):
        made.append([(tuple(ids), tuple(mask)) for ids, mask in sft.world_rows(args, tiny(), 4000)])
    assert made[0] == made[1] != made[2]
    texts = [mask for ids, mask in made[0] if ids[0] != tiny().special("<|im_start|>")]
    chats = [row for row in made[0] if row[0][0] == tiny().special("<|im_start|>")]
    assert chats == made[3][: len(chats)] and min(len(chats), len(texts)) > 20
    assert all(mask == (0,) + (1,) * (len(mask) - 1) for mask in texts)


def test_weights_of_the_mix_are_factors_of_the_usual_shares(monkeypatch):
    asked, whole = [], world.sft_rows
    monkeypatch.setattr(world, "sft_rows", lambda count, seed, mix: asked.append(mix) or whole(count, seed, mix))
    assert list(sft.world_rows(get_args(["--mix", "sort=3", "facts=0.5"]), tiny(), 10))
    factors = {part: share / world.SFT_MIX[part] for part, share in asked[0].items()}
    assert factors == pytest.approx(dict.fromkeys(world.SFT_MIX, 1.0) | {"sort": 3.0, "facts": 0.5})


def test_ifd_keeps_the_hardest_rows_that_the_question_helps(checkpoint, problems, tmp_path):
    args = args_for(checkpoint, problems, tmp_path / "out", "--select", "ifd", "--select-share", 0.5)
    model = load(checkpoint)[0].eval()
    rows = encoded()
    scores = []
    for row in rows:
        said = [i for i, m in zip(row.input_ids, row.completion_mask, strict=True) if m]
        alone = Row([row.input_ids[0], *said], [0] + [1] * len(said))
        scores.append(brute_force(model, [row]) / brute_force(model, [alone]))
    order = sorted((i for i in range(8) if scores[i] < 1), key=lambda i: -scores[i])[:4]
    loop = loop_module.Loop(args, "sft")
    if not order:
        pytest.fail("the fixture should have rows that the question helps")
    chosen = sft.select_by_ifd(model.float(), rows, args, loop)
    assert chosen == [rows[i] for i in sorted(order)]


def test_ifd_drops_what_the_question_misleads(tmp_path, monkeypatch):
    """The share is one of all rows, the scores are means over the same tokens, a row alone has no question in it."""
    args = get_args(["--model", "x", "--data", "y", "--select", "ifd", "--select-share", "0.5", "--out", str(tmp_path)])
    rows = [Row([1, 2, 3, 4 + i, 5], [0, 0, 0, 1, 1]) for i in range(7)]
    scores = [0.2, 1.3, 0.9, 1.0, 0.5, 0.7, 0.6]
    given = []

    def losses(model, rows, args, loop):
        given.append(rows)
        return [(8.0 * score if len(given) == 1 else 8.0, 2) for score in scores]

    monkeypatch.setattr(sft, "row_losses", losses)
    loop = loop_module.Loop(args, "sft")
    assert sft.select_by_ifd(None, rows, args, loop) == [rows[i] for i in (2, 4, 5, 6)]  # the 4 hardest of 7
    assert given == [rows, [Row([1, 4 + i, 5], [0, 1, 1]) for i in range(7)]]
    for args.select_share, wanted in ((1.0, (0, 2, 4, 5, 6)), (0.0, (2,)), (0.3, (2, 5))):
        given.clear()
        assert sft.select_by_ifd(None, rows, args, loop) == [rows[i] for i in wanted]
    scores, given[:] = [1.0] * 7, []
    with pytest.raises(UserError, match="is --model trained at all"):
        sft.select_by_ifd(None, rows, args, loop)


def test_ifd_chooses_the_rows_that_are_trained_on(checkpoint, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "select_by_ifd", lambda model, rows, args, loop: rows[3:5])
    args = args_for(checkpoint, problems, tmp_path / "out", "--select", "ifd")
    rows, test = sft.examples(args, None, tiny(), loop_module.Loop(args, "sft"))
    assert rows == encoded()[3:5] and len(test["rows"]) == 8


def test_rollouts_keep_distinct_right_answers(checkpoint, tmp_path, monkeypatch, capsys):
    """Of a file, a number is right however it is said; words are compared letter by letter."""
    shown = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 1?"},
             {"role": "assistant", "content": "3"}, {"role": "user", "content": "2 + 2?"}]  # fmt: skip
    prompts = [("1 + 1?", "2"), (shown, "2 + 2 are 4.\n#### 4"), ("Who?", "Ada")]
    rows = [{"prompt": prompt, "answer": said} for prompt, said in prompts]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    args = get_args(["--model", str(checkpoint), "--data", "rollouts", "--prompts", str(path), "--out",
                     str(tmp_path / "o"), "--samples", "4", "--seed", "5"])  # fmt: skip
    seen = {}

    def answers(model, tokenizer, chats, args, **how):
        seen.update(how, chats=chats)
        return [["2", "3", "2", "<think>1 + 1</think>2"], ["5", "6. So it is 4.", "<think>4", "22"],
                ["Ada", "ada", "4", "It is Ada"]]  # fmt: skip

    monkeypatch.setattr(sft, "answer", answers)
    loop = loop_module.Loop(args, "sft")
    rows = sft.rollouts(None, tiny(), args, loop)
    assert "12 samples, 41.7% right, 4 distinct right ones" in capsys.readouterr().err
    texts = [tiny().decode([i for i, m in zip(*row, strict=True) if m][:-1]) for row in rows]
    assert texts == ["2", "<think>1 + 1</think>2", "6. So it is 4.", "Ada"]
    assert rows[2].input_ids == chat.render([*shown, {"role": "assistant", "content": "6. So it is 4."}], tiny())[0]
    assert seen.pop("chats") == [[{"role": "user", "content": "1 + 1?"}], shown, [{"role": "user", "content": "Who?"}]]
    assert seen == {"samples": 4, "temperature": 1.0, "seed": 5, "whole": True}
    monkeypatch.setattr(sft, "answer", lambda *_, **__: [["5"] * 4] * 3)
    with pytest.raises(UserError, match="not one sample is right"):
        sft.rollouts(None, tiny(), args, loop)


def test_rollouts_of_the_world_are_right_by_its_own_check(tmp_path, monkeypatch):
    """As they are measured: a result among words is none."""
    args, tasks = get_args(["--data", "rollouts", "--out", str(tmp_path)]), []
    whole = world.exchange
    monkeypatch.setattr(world, "exchange", lambda *what: tasks.append(whole(*what)) or tasks[-1])
    monkeypatch.setattr(sft, "answer", lambda *_, **__: [[text, f"It is {text}."] for text in (
        world.final_answer(task["answer"]) for task in tasks)])  # fmt: skip
    rows = sft.rollouts(None, tiny(), args, loop_module.Loop(args, "sft"))
    assert len(rows) == 512 and not any("It is" in tiny().decode(row.input_ids) for row in rows)


@pytest.mark.parametrize("flags", [("--data", "rollouts"), ("--data", "self-instruct"), ("--select", "ifd")])
def test_own_rows_are_made_in_dtype_and_without_dropout(checkpoint, problems, tmp_path, monkeypatch, flags):
    seen = []

    def watched(function):
        def call(model, *arguments, **options):
            function(model, *arguments, **options)  # in fp32 the rounded matrices of a frozen model would not do
            seen.append((model.training, torch.is_autocast_enabled("cpu")))
            raise Stop

        return call

    for name in ("generate", "token_logps"):
        monkeypatch.setattr(sft, name, watched(getattr(sft, name)))
    with pytest.raises(Stop):
        run(checkpoint, problems, tmp_path / "out", "--adapter", "lora:dropout=0.5", "--dtype", "bf16", "--samples", 1,
            "--max-new-tokens", 2, *flags)  # fmt: skip
    assert seen == [(False, True)]


def sums_of(chats: list[list[dict]]) -> list[str]:
    """The split of the sum that each of `chats` begins with."""
    return [world.split_of("sum " + " ".join(re.findall(r"\d+", messages[0]["content"]))) for messages in chats]


def test_rollouts_train_on_other_sums_than_they_are_measured_on(tmp_path, monkeypatch):
    args = get_args(["--data", "rollouts", "--out", str(tmp_path)])
    asked = []
    monkeypatch.setattr(sft, "answer", lambda model, tokenizer, chats, *_, **__: asked.append(chats) or [["?"]] * 512)
    for args.seed in (0, 0, 1):
        with pytest.raises(UserError, match="not one sample"):
            sft.rollouts(None, tiny(), args, loop_module.Loop(args, "sft"))
    assert len(asked[0]) == 512 and set(sums_of(asked[0])) == {"train"} and {len(chat) for chat in asked[0]} == {1}
    assert asked[0] == asked[1] != asked[2]
    monkeypatch.setattr(sft, "rollouts", lambda *_: ["rows"])
    rows, test = sft.examples(args, None, tiny(), loop_module.Loop(args, "sft"))
    assert rows == ["rows"] and set(sums_of([row["messages"] for row in test["questions"]])) == {"test"}


def test_what_is_measured_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "self_instruct", lambda *_: ["own"])
    args = get_args(["--out", str(tmp_path), "--steps", "1"])
    loop = loop_module.Loop(args, "sft")
    rows, test = sft.examples(args, None, tiny(), loop)
    taught = {tiny().decode(row.input_ids).partition("user\n")[2].partition("<|im_end|>")[0] for row in rows}
    assert len(taught) > 20 and not taught & {row["messages"][0]["content"] for row in test["questions"]}
    by_part = {}
    for row in test["questions"]:
        by_part.setdefault(row["part"], []).append(row["messages"])
    assert by_part.keys() >= {*world.TEST_PARTS, "unseen pairs", "sums", "calculator"}
    assert set(sums_of(by_part["sums"] + by_part["steps"])) == {"test"}
    for messages in by_part["calculator"]:
        larger_first = sorted(re.findall(r"\d+", messages[0]["content"]), key=int, reverse=True)
        assert world.split_of(" * ".join(larger_first)) == "test"
    ways = {part: {template.partition("{")[0] for i, template in enumerate(world.TEMPLATES)
                   if not world.is_unseen_pair(part, i)} for part in world.SKILLS}  # fmt: skip
    assert all(messages[0]["content"].startswith(tuple(ways["sort"])) for messages in by_part["sort"])
    assert len(by_part["unseen pairs"]) == 40 * (len(world.SKILLS) + 1)
    assert not [m for m in by_part["unseen pairs"] if " sort " in m[0]["content"]
                and m[0]["content"].startswith(tuple(ways["sort"]))]  # fmt: skip
    assert Counter(row["part"] for row in test["cloze"]) == dict.fromkeys((*world.SKILLS, "facts"), 40)
    args.data = "self-instruct"
    rows, test = sft.examples(args, None, tiny(), loop)
    assert rows == ["own"] and {row["part"] for row in test["questions"]} == {*world.TEST_PARTS}
    args = get_args(["--stage", "base", "--steps", "1"])
    rows, only = sft.examples(args, None, tiny(), loop)
    assert only.keys() == {"cloze"} and sum(next(iter(rows)).completion_mask) > 1


def test_an_answer_needs_room(monkeypatch):
    """Beside the question, and the positions that a prefix takes."""
    monkeypatch.setattr(sft, "generate", lambda model, prompts, **_: Namespace(
        completions=[[65]] * len(prompts), finished=torch.zeros(len(prompts))))  # fmt: skip
    chats, (model := small(max_length=40)).virtual = [[{"role": "user", "content": text}] for text in ("Go.", "Hi")], 7
    room = 40 - 7 - len(chat.prompt_ids(chats[0], tiny()))
    options = {"samples": 1, "temperature": 0.0, "seed": 0}
    assert sft.answer(model, tiny(), chats, Namespace(max_new_tokens=room), **options) == [["A"]] * 2
    with pytest.raises(UserError, match=f"--max-new-tokens {room + 1}: the longest question leaves room for {room}$"):
        sft.answer(model, tiny(), chats, Namespace(max_new_tokens=room + 1), **options)


def test_answers_are_asked_for_as_they_were_taught(monkeypatch):
    """The ids of a question begin those that are trained on; answers come back by question, in any number."""
    asked, tokenizer = [], replace(tiny(), eos_ids=(tiny().eos_ids[0], 5))

    def generate(model, prompts, *, samples, **options):
        asked.append((prompts, options))
        said = [f"{len(asked)}.{i}.{j}" for i in range(len(prompts)) for j in range(samples)]
        ends = ([tokenizer.eos_ids[i % 2], 65] for i in range(len(said)))  # what comes after an end is not said
        return Namespace(completions=[tiny().encode(text) + end for text, end in zip(said, ends, strict=True)],
                         finished=torch.arange(len(said)) % 3 != 1)  # fmt: skip

    monkeypatch.setattr(sft, "generate", generate)
    chats = [[{"role": "user", "content": f"Say {i}."}] for i in range(300)]
    texts = sft.answer(small(), tokenizer, chats, Namespace(max_new_tokens=9), samples=3, temperature=0.5, seed=4)
    assert texts == [[f"{1 + i // 256}.{i % 256}.{j}" for j in range(3)] for i in range(300)]
    assert asked[0][1].pop("seed") == 4 != asked[1][1].pop("seed")  # the second batch draws other numbers
    for _, options in asked:
        assert options == {"max_new_tokens": 9, "temperature": 0.5, "eos_ids": tokenizer.eos_ids,
                           "vocab_size": tokenizer.vocab_size}  # fmt: skip
    ids, mask = chat.render([*chats[299], {"role": "assistant", "content": "299"}], tiny())
    assert asked[1][0][43] == ids[: mask.index(1)]
    options = {"samples": 3, "temperature": 0.5, "seed": 4}
    ended = sft.answer(small(), tokenizer, chats[:2], Namespace(max_new_tokens=9), **options, whole=True)
    assert ended == [[f"3.{i}.{j}" for j in (0, 2)] for i in range(2)]  # what is cut off is left out


def test_self_instruct_keeps_what_is_new(checkpoint, tmp_path, monkeypatch, capsys):
    seeds = ["sort 1 2 3 4 5 6", "what is the pet of Ada"]
    path = write_jsonl(tmp_path / "seeds.jsonl", ({"prompt": seed} for seed in seeds))
    args = get_args(["--model", str(checkpoint), "--data", "self-instruct", "--prompts", str(path), "--out",
                     str(tmp_path / "out"), "--samples", "7", "--seed", "5"])  # fmt: skip
    written = ["sort 1 2 3 4 5 7\n", "what is the pet of Ada now\n", "reverse cat dog sun \nmore",
               "reverse cat dog sun now\n", "never ended", "\n", " \n", "one two three four five six seven x y z\n",
               "one two three four five six seven a b c\n", "who is it that never stops to talk\n"]  # fmt: skip
    found, lists, asked = Namespace(completions=[[*tiny().encode(text), tiny().eos_ids[0]] for text in written]), [], []
    monkeypatch.setattr(sft, "generate", lambda model, prompts, **how: (
        asked.append(how), lists.extend(prompts), found)[2])  # fmt: skip
    monkeypatch.setattr(sft, "answer", lambda model, tokenizer, chats, args, **how: asked.append(how) or [
        ["sun dog cat"] if "stops" not in q[0]["content"] else [] for q in chats])  # fmt: skip
    tokenizer = replace(tiny(), bos_id=7, add_bos=True, eos_ids=(*tiny().eos_ids, 5))
    rows = sft.self_instruct(small(), tokenizer, args, loop_module.Loop(args, "sft"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "self_instruct.jsonl").read_text().splitlines()]
    questions, answers = zip(*([m["content"] for m in line["messages"]] for line in lines), strict=True)
    assert questions == ("reverse cat dog sun", "one two three four five six seven x y z")
    assert set(answers) == {"sun dog cat"}
    assert rows == [chat.render(line["messages"], tiny()) for line in lines]
    assert {tiny().decode(ids[1:]) for ids in lists} == {f"{a}\n{b}\n" for a, b in (seeds, seeds[::-1])}
    assert {ids[0] for ids in lists} == {7}
    assert asked == [
        {"max_new_tokens": 64, "samples": 7, "seed": 5, "eos_ids": tokenizer.eos_ids, "vocab_size": tiny().vocab_size},
        {"samples": 1, "temperature": 0.0, "seed": 5, "whole": True},  # one answer, and only if it came to its end
    ]
    assert "1 of their answers are cut off" in capsys.readouterr().err
    monkeypatch.setattr(sft, "answer", lambda model, tokenizer, chats, args, **how: [[] for _ in chats])
    with pytest.raises(UserError, match="raise --max-new-tokens"):
        sft.self_instruct(small(), tokenizer, args, loop_module.Loop(args, "sft"))
    assert rouge_l(*written[-3:-1]) == 0.7  # is not below 0.7
    write_jsonl(path, [{"prompt": seeds[0]}, {"prompt": [{"role": "user", "content": seeds[1]}]}])
    with pytest.raises(UserError, match="text is expected, not messages"):
        sft.self_instruct(small(), tokenizer, args, loop_module.Loop(args, "sft"))


def test_accuracy_is_counted_by_part(monkeypatch):
    """Parts with more than one right answer are shown and do not count for the primary metric."""
    rows = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "7"}], "part": part,
             "answer": "7"} for i, part in enumerate(("sort", "sort", "facts", "sums", "unseen pairs"))]  # fmt: skip
    said = [["7"], ["8"], ["<think>3 + 4 = 7.</think>7"], ["7"], ["6"]]
    seen = {}

    def answers(model, tokenizer, chats, args, **options):
        seen.update(options, chats=chats, training=model.training, narrow=torch.is_autocast_enabled("cpu"))
        return said[: len(chats)]

    monkeypatch.setattr(sft, "answer", answers)
    args, model = get_args(["--steps", "1", "--dtype", "bf16", "--device", "cpu"]), small()
    loop = loop_module.Loop(args, "sft")
    found = sft.evaluate(model, tiny(), {"questions": rows}, args, loop)
    parts = {"sort": [1.0, 0.0], "facts": [1.0], "sums": [1.0], "unseen pairs": [0.0]}
    assert found == {"exact match": [1.0, 0.0, 1.0]} | parts
    assert next(iter(found)) == "exact match" and model.training
    assert seen.pop("chats") == [row["messages"][:1] for row in rows]  # the answer is not shown
    assert seen == {"samples": 1, "temperature": 0.0, "seed": 0, "training": False, "narrow": True}
    only = [row | {"part": "sums"} for row in rows]
    assert sft.evaluate(model, tiny(), {"questions": only}, args, loop)["exact match"] == [1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_cloze_is_right_up_to_the_full_stop(monkeypatch, stage):
    rows = [{"prompt": f"The {part} is {i}", "answer": "7 8", "part": part}
            for i, part in enumerate(("sort", "next", "next"))]  # fmt: skip
    asked = {}

    def generate(model, prompts, **options):
        asked.update(options, prompts=prompts, training=model.training, narrow=torch.is_autocast_enabled("cpu"))
        return Namespace(completions=[tiny().encode(text) for text in (" 7 8. And so on. 9", " 7. 8", " 7 8")])

    monkeypatch.setattr(sft, "generate", generate)
    args, model = get_args(["--stage", stage, "--dtype", "bf16", "--device", "cpu"]), small()
    tokenizer = replace(tiny(), bos_id=7, add_bos=True)
    found = sft.evaluate(model, tokenizer, {"cloze": rows}, args, loop_module.Loop(args, "sft"))
    parts = {"sort": [1.0], "next": [0.0, 1.0]} if stage == "base" else {}
    assert found == {"cloze": [1.0, 0.0, 1.0]} | parts and next(iter(found)) == "cloze"
    assert asked.pop("prompts") == [[7, *tiny().encode(row["prompt"])] for row in rows]  # plain text, no chat
    assert asked.pop("max_new_tokens") >= 12
    assert asked == {"eos_ids": tiny().eos_ids, "temperature": 0.0, "vocab_size": tiny().vocab_size, "training": False,
                     "narrow": True}  # fmt: skip


def test_the_result_says_what_was_measured(tmp_path):
    args = get_args(["--model", "x", "--data", "d/rows.jsonl", "--out", str(tmp_path)])
    before, after = {"loss": [3.0, 1.0, 2.0, 5.0], "b": [0.0, 1.0]}, {"loss": [2.0, 1.5, 1.0, 1.0], "b": [1.0, 1.0]}
    result = sft.conclude(None, tiny(), {"rows": []}, before, after, args, loop_module.Loop(args, "sft"))
    assert (result["metric"], result["before"], result["after"], result["n"]) == ("loss", 2.75, 1.375, 4)
    assert result["higher_is_better"] is False and result["variant"] == "rows" and not result["baselines"]
    assert list(result["metrics"]) == ["b"] and result["metrics"]["b"]["before"] == 0.5
    one = sft.conclude(None, tiny(), {}, {"x": [0.0]}, {"x": [1.0]}, args, loop_module.Loop(args, "sft"))
    assert one["n"] == 1 and one["higher_is_better"] is True


@pytest.mark.parametrize(("flags", "compared"), [
    ((), True), (("--resume",), True), (("--stage", "base"), False), (("--from-scratch",), False),
    (("--model", "x"), False), (("--data", "rollouts"), False), (("--adapter", "lora", "--optimizer", "adamw"), False),
])  # fmt: skip
def test_the_default_run_is_compared_with_random_weights(tmp_path, monkeypatch, capsys, flags, compared):
    args = get_args(["--out", str(tmp_path), *flags])
    loop, runs = loop_module.Loop(Namespace(**vars(args) | {"resume": False}), "sft"), []
    monkeypatch.setattr(sft, "main", lambda args: runs.append(args) or {"before": 0.0, "after": 0.25})
    monkeypatch.setattr(sft, "answer", lambda model, _, chats, *more, **names: [
        [f"{c[0]['content']}!" * (not model.training)] for c in chats])  # fmt: skip
    test = {"questions": [{"messages": [{"content": f"<{i}>"}, {"content": "no"}]} for i in range(7)]}
    result = sft.conclude(small(), tiny(), test, {"m": [0.0, 1.0]}, {"m": [1.0, 1.0]}, args, loop)
    assert result["baselines"] == ({"the same SFT of random weights": 0.25} if compared else {})
    said = re.findall(r"<\d>!", capsys.readouterr().out)
    assert len(set(said)) == (0 if "--from-scratch" in flags else 3) == len(said)
    if compared:
        own = {"from_scratch": True, "resume": False, "out": tmp_path / "scratch"}
        assert [vars(run) for run in runs] == [vars(args) | own]
        assert result["variant"] == "sft"


@pytest.mark.parametrize(("flags", "stage"), [
    (("--stage", "base", "--depth", "3"), None), (("--from-scratch", "--depth", "3"), None), ((), "base"),
    (("--data", "rows.jsonl"), "base"), (("--data", "rollouts"), "sft"), (("--data", "self-instruct"), "sft"),
    (("--model", "DIR"), None), (("--model", "DIR", "--stage", "base"), None),
])  # fmt: skip
def test_the_model_that_a_run_begins_with(checkpoint, tmp_path, monkeypatch, flags, stage):
    asked, begun = [], []

    def enough(args, model, tokenizer, loop):
        begun.append(model)
        raise Stop

    monkeypatch.setattr(loop_module.Loop, "require", lambda loop, stage: asked.append(stage) or checkpoint)
    monkeypatch.setattr(sft, "examples", enough)
    flags = [str(checkpoint) if flag == "DIR" else flag for flag in flags]
    for seed in ("0", "0", "1"):
        with pytest.raises(Stop):
            main(get_args([*flags, "--out", str(tmp_path), "--max-length", "100", "--device", "cpu", "--seed", seed]))
    assert asked == ([stage] * 3 if stage else [])
    states = [model.state_dict() for model in begun]
    assert difference(states[0], states[1]) == 0
    if "--depth" in flags:
        assert begun[0].config.depth == 3 and begun[0].config.vocab_size == tiny().vocab_size
        assert difference(states[0], states[2]) > 0  # --seed makes other weights
    else:
        assert difference(states[0], load(checkpoint)[0].state_dict()) == 0


def test_row_losses_are_sums_over_each_row(checkpoint, tmp_path):
    args = get_args(["--model", str(checkpoint), "--data", "rollouts", "--out", str(tmp_path)])
    rows, model = ragged(), small().eval()
    found = sft.row_losses(model, rows, args, loop_module.Loop(args, "sft"))
    for row, (loss, count) in zip(rows, found, strict=True):
        assert count == sum(row.completion_mask)
        assert loss == pytest.approx(brute_force(small().eval(), [row]), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Real shapes, bad input


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_of_a_large_vocabulary_are_never_held():
    vocab_size, tokens = 151_936, 8 * 256
    config = Config(family="qwen2", vocab_size=vocab_size, depth=1, width=16, heads=2, kv_heads=1, head_dim=8,
                    ffn_width=32, max_length=256, qkv_bias=True, tied=True)  # fmt: skip
    model = Transformer(config)
    ids = torch.randint(vocab_size, (8, 256))
    with Largest() as largest:
        loss = sft_loss(model, Batch(ids, torch.ones_like(ids), None))
        loss.backward()
    assert largest.elements < tokens * vocab_size / 3
    assert math.isfinite(loss.item()) and model.embed.weight.grad.abs().sum() > 0


def test_defaults_are_of_one_table():
    base, tuned, own = get_args(["--stage", "base"]), get_args([]), get_args(["--model", "x", "--data", "y"])
    for i, args in enumerate((base, tuned, own)):
        assert all(getattr(args, name) == values[i] for name, values in sft.DEFAULTS.items())
    assert (base.steps, tuned.steps, own.steps) == (sft.WORLD_STEPS["base"], sft.WORLD_STEPS["sft"], None)
    assert (base.too_long, tuned.too_long, base.epochs, own.epochs) == ("split", "refuse", 1.0, 1.0)
    rates = [get_args([*flags, "--optimizer", "adamw"]).lr for flags in (["--stage", "base"], [], ["--model", "x"])]
    assert tuple(rates) == sft.ADAMW_LR
    adapted = get_args(["--adapter", "lora:lr=2"])
    assert (adapted.optimizer, adapted.lr) == ("adamw", 2 * sft.ADAMW_LR[1])
    assert get_args(["--lr", "0.5"]).lr == 0.5


def test_rows_without_an_answer_left_are_refused(checkpoint, problems, tmp_path):
    for flags in (("--max-length", 12, "--too-long", "cut"), ("--mix", "problems.jsonl=0.001")):
        with pytest.raises(UserError, match="no row is left to train on"):
            run(checkpoint, problems, tmp_path / "out", *flags)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "a " * 300, "answer": "b"}) + "\n")
    with pytest.raises(UserError, match="no row is left to measure"):
        run(checkpoint, problems, tmp_path / "out", "--eval-data", long, "--too-long", "drop")


@pytest.mark.parametrize(("flags", "said"), [
    (("--optimizer", "lomo", "--grad-clip", "1"), "--optimizer lomo"),
    (("--optimizer", "lomo", "--grad-clip", "0", "--batch-size", "8", "--micro-batch-size", "4"), "--optimizer lomo"),
    (("--neftune", "5", "--parallel", "fsdp"), "--neftune"),
    (("--parallel", "fsdp"), "--optimizer muon"),
    (("--adapter", "lora", "--optimizer", "muon"), "--adapter"),
    (("--optimizer", "lomo", "--grad-clip", "0", "--weight-decay", "0.1"), "--weight-decay"),
    (("--epochs", "2"), "--epochs counts"),
    (("--data", "rollouts", "--eval-data", "x"), "not on --eval-data"),
    (("--select", "ifd"), "--select ifd"),
    (("--mix", *(f"{part}=0" for part in world.SFT_MIX)), "all weights are 0"),
    (("--data", "a.jsonl,b/c.jsonl", "--mix", "a.jsonl=0", "c.jsonl=0.0"), "all weights are 0"),
    (("--from-scratch", "--model", "DIR"), "--from-scratch"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(list(flags))


def test_a_context_that_the_model_lacks_is_refused(checkpoint, problems, tmp_path):
    with pytest.raises(UserError, match="--max-length 161"):
        run(checkpoint, problems, tmp_path / "out", "--max-length", 161)
    with pytest.raises(UserError, match="--max-length 158: the model reads at most 157 tokens"):  # beside a prompt of 3
        run(checkpoint, problems, tmp_path / "out", "--max-length", 158, "--adapter", "prompt:tokens=3", "--no-pack")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_what_was_cut_is_counted_out_loud(checkpoint, problems, tmp_path, capsys):
    run(checkpoint, problems, tmp_path / "out", "--steps", 1, "--max-length", 36, "--too-long", "cut")
    assert "--max-length 36: 8 rows cut" in capsys.readouterr().err


def test_held_out_rows_that_are_dropped_are_counted_out_loud(checkpoint, problems, tmp_path, capsys):
    test = [{"question": "Please sort 3 1 2.", "answer": said} for said in ("1 2 3", "1 2 3 " * 9)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", test)
    run(checkpoint, problems, tmp_path / "out", "--steps", 1, "--max-length", 40, "--too-long", "drop",
        "--eval-data", held_out)  # fmt: skip
    assert "--max-length 40: 1 held-out rows dropped" in capsys.readouterr().err


def test_domain_text_continues_pre_training(checkpoint, tmp_path):
    rows = ({"text": f"The mill of town {i} grinds corn. " * 12} for i in range(8))
    path, out = write_jsonl(tmp_path / "domain.jsonl", rows), tmp_path / "out"
    result = main(get_args(["--stage", "base", "--model", str(checkpoint), "--data", str(path), "--out", str(out),
                            "--steps", "30", "--lr", "1e-2", "--max-length", "64", "--batch-size", "4"]))  # fmt: skip
    assert result["after"] < result["before"] / 3 and result["variant"] == "domain"


def flags_of(checkpoint: Path, data: Path, out: Path, *flags: object) -> list[str]:
    return list(map(str, ("--model", checkpoint, "--data", data, "--out", out, "--max-length", 160, *flags)))


def ends_with(code: int, capsys, *what: object) -> str:
    """The last line on stderr, and of bad input the only one, of a run with flags_of(*what) that ends with `code`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        loop_module.run(main, lambda: get_args(flags_of(*what)))
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == code and (len(lines) == 1 or code == 1), lines
    return lines[-1]


GOOD = '{"prompt": "Say 1.", "completion": "One."}\n'


@pytest.mark.parametrize(("text", "said"), [
    ('{"prompt": "a", "completion": "b"\n', "rows.jsonl:1: broken JSON"),
    (GOOD * 2 + "{]\n" + GOOD, "rows.jsonl:3: broken JSON"),
    (GOOD + "\n" + GOOD, "rows.jsonl:2: broken JSON"),
    (GOOD + "[1, 2]\n", "rows.jsonl:2: found list"),
    ('{"prompt": "a"}\n', "rows.jsonl:1: found the fields prompt, expected messages or prompt, completion"),
    (GOOD + '{"prompt": "a"}\n', "rows.jsonl:2: no field 'completion'"),
    (GOOD + '{"prompt": "a", "completion": 3}\n', "rows.jsonl:2: completion: found 3"),
    (GOOD + '{"prompt": "a", "completion": ""}\n', 'rows.jsonl:2: completion: found ""'),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "rows.jsonl:1: messages: the last message"),
    ('{"messages": [{"role": "bot", "content": "a"}]}\n', "rows.jsonl:1: messages[0]: found the role 'bot'"),
    (GOOD + '{"prompt": "\udcff", "completion": "b"}\n', "rows.jsonl:2: a byte that is not UTF-8"),
    ("", "rows.jsonl: empty"),
    ("\n\n", "rows.jsonl: empty"),
    ("".join(GOOD.replace("1", str(i)) for i in range(40)) + GOOD.replace("One", "One " * 200), "--max-length is 160"),
])  # fmt: skip
def test_bad_rows_are_one_line_and_exit_2(checkpoint, tmp_path, capsys, text, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert said in ends_with(2, capsys, checkpoint, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if said != "--max-length is 160":
        good = write_jsonl(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "b"}])
        assert said in ends_with(2, capsys, checkpoint, good, tmp_path / "out", "--eval-data", path)


ABSENT = "mps" if not torch.backends.mps.is_available() else "cuda"


@pytest.mark.parametrize(("flags", "said"), [
    (("--data", "absent.jsonl"), "absent.jsonl: No such file"),
    (("--eval-data", "absent.jsonl"), "absent.jsonl: No such file"),
    (("--model", "absent"), "absent/config.json: No such file"),
    (("--map", "question=prompt"), "rows.jsonl:1: --map question=prompt: no field 'question'"),
    (("--map", "question"), "'question': expected NAME=VALUE"),
    (("--device", ABSENT), f"--device {ABSENT}: there is none on this machine"),
    (("--max-length", 161), "--max-length 161"),
    (("--chat-format", "latin"), "invalid choice: 'latin'"),
    (("--resume",), "--resume: nothing to resume"),
    (("--mix", "rows.jsonl=much"), "--mix rows.jsonl=much: expected a finite number"),
    (("--mix", "rows.jsonl=nan"), "--mix rows.jsonl=nan"),
    (("--mix", "rows.jsonl=-2"), "--mix rows.jsonl=-2"),
    (("--mix", "rwos.jsonl=2"), "--mix rwos.jsonl: there are rows.jsonl"),
    (("--replay", 1), "--replay 1.0"),
    (("--data", "rollouts", "--max-new-tokens", 150), "--max-new-tokens 150: the longest question"),
    (("--data", "self-instruct", "--max-new-tokens", 150), "--max-new-tokens 150: the longest list"),
    (("--lr", "nan"), "argument --lr"),
    (("--neftune", -1), "argument --neftune"),
    (("--steps", "many"), "argument --steps"),
    (("--too-long", "shrink"), "argument --too-long"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_exit_2(checkpoint, tmp_path, capsys, flags, said):
    rows = write_jsonl(tmp_path / "rows.jsonl", ({"prompt": f"Say {i}.", "completion": f"{i}"} for i in range(40)))
    assert said in ends_with(2, capsys, checkpoint, rows, tmp_path / "out", "--device", "cpu", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("harm", "said"), [
    ("gpt2", "config.json: model_type 'gpt2' is not supported"),
    ("other size", "config.json asks for"),
    ("cut short", "model.safetensors"),
    ("header", "model.safetensors"),
    ("no weights", "no model.safetensors in it"),
    ("no tokenizer", "no tokenizer.json in it"),
])  # fmt: skip
def test_a_damaged_model_is_one_line_and_exit_2(checkpoint, problems, tmp_path, capsys, harm, said):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    whole = file.read_bytes()
    if harm.startswith("no "):
        (file if harm == "no weights" else folder / "tokenizer.json").unlink()
    elif harm in ("cut short", "header"):
        file.write_bytes(whole[:-4] if harm == "cut short" else whole[:8] + b"!" + whole[9:])
    else:
        config |= {"model_type": "gpt2"} if harm == "gpt2" else {"intermediate_size": 999}
        (folder / "config.json").write_text(json.dumps(config))
    assert said in ends_with(2, capsys, folder, problems, tmp_path / "out")
    assert not (tmp_path / "out").exists()


GSM = ("--map", "question=prompt", "answer=completion", "--device", "cpu")


def test_a_resume_with_other_settings_is_one_line_and_exit_2(checkpoint, problems, tmp_path, capsys):
    what = (checkpoint, problems, tmp_path / "out", *GSM, "--steps", 2)
    main(get_args(flags_of(*what)))
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    line = ends_with(2, capsys, *what, "--resume", "--neftune", 5, "--no-pack")
    assert line.endswith("has other settings: --neftune was 0.0, now 5.0; --pack was True, now False")
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_rate_that_is_too_high_fails_the_run_and_keeps_a_checkpoint(checkpoint, problems, tmp_path, capsys):
    line = ends_with(1, capsys, checkpoint, problems, tmp_path / "out", *GSM, "--steps", 9, "--save-every", 1,
                     "--lr", 1e30, "--grad-clip", 0)  # fmt: skip
    found = re.search(r"^step (\d): (?:loss|grad_norm) is (?:nan|inf); that of step (\d) is kept", line)
    assert int(found[1]) == int(found[2]) + 1
    assert json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())["step"] == int(found[2])
    assert all(w.isfinite().all() for w in weights(tmp_path / "out").values())
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_full_disk_fails_the_run_which_then_goes_on(checkpoint, problems, tmp_path, capsys, monkeypatch):
    what = (checkpoint, problems, tmp_path / "out", *GSM, "--steps", 6, "--save-every", 2)
    write, calls = loop_module.write_safetensors, []

    def fills(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(loop_module, "write_safetensors", fills)
    line = ends_with(1, capsys, *what)
    assert line.startswith("step 4: checkpoint not saved") and "No space left" in line and "step 2 is kept" in line
    monkeypatch.undo()
    assert load(tmp_path / "out" / "checkpoint")
    resumed = main(get_args(flags_of(*what, "--resume")))
    whole = main(get_args(flags_of(*what, "--out", tmp_path / "whole")))
    assert difference(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0
    assert resumed["before"] == whole["before"] and resumed["after"] == whole["after"]


# ----------------------------------------------------------------------------------------------------------------------
# Whole processes


def start(*argv: object) -> subprocess.Popen:
    """`python ARGV` in the repository, in a session of its own."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def finished(*argv: object, code: int = 0) -> str:
    """What `python ARGV` says on stderr; it must end with this code."""
    process = start(*argv)
    try:
        _, error = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, error
    return error


def command(checkpoint: Path, data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return ("sft.py", *flags_of(checkpoint, data, out), *GSM, "--batch-size", 4, "--lr", 1e-3, "--warmup", 2,
            "--log-every", 1, *flags)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "rounding"), [("replicas", 1e-6), ("fsdp", 1e-5)])
def test_torchrun_equals_one_process(checkpoint, unequal, tmp_path, parallel, rounding):
    """A norm that is summed in fp32 is off by some 5e-6 itself, and over shards it is summed in another order."""
    flags = ("--steps", 20, "--micro-batch-size", 2, "--no-pack")
    finished(*command(checkpoint, unequal, tmp_path / "one", *flags))
    finished("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
             *command(checkpoint, unequal, tmp_path / "two", *flags, "--parallel", parallel))  # fmt: skip
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 20
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=rounding)
    assert difference(weights(tmp_path / "one"), weights(tmp_path / "two")) <= 1e-4
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["command"].startswith("torchrun --nproc-per-node 2 ")


@pytest.mark.slow
def test_a_killed_and_an_interrupted_run_go_on_as_if_nothing_had_been(checkpoint, unequal, tmp_path):
    """SIGKILL at a random moment, SIGINT at another; the latter is gone on with by the command that it prints."""
    flags = ("--steps", 250, "--save-every", 7, "--neftune", 5, "--no-pack")

    def stopped_by(number: int, out: Path) -> tuple[int, str, int]:
        least, log = random.randint(8, 50), out / "metrics.jsonl"
        process = start(*command(checkpoint, unequal, out, *flags))
        try:
            until = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < until:
                if log.exists() and log.read_bytes().count(b"\n") >= least:
                    os.kill(process.pid, number)
                    break
                time.sleep(0.001)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, error, least

    finished(*command(checkpoint, unequal, tmp_path / "whole", *flags))
    code, error, least = stopped_by(signal.SIGKILL, tmp_path / "killed")
    assert code == -signal.SIGKILL, error
    assert "resumed after step" in finished(*command(checkpoint, unequal, tmp_path / "killed", *flags, "--resume"))
    code, error, after = stopped_by(signal.SIGINT, tmp_path / "interrupted")
    last = error.splitlines()[-1]
    step, advice = re.search(r"^interrupted after step (\d+), which is saved; go on with: python (.*)$", last).groups()
    assert code == 130 and int(step) >= after and "Traceback" not in error
    assert f"resumed after step {step}\n" in finished(*shlex.split(advice))
    whole, results = weights(tmp_path / "whole"), []
    for name in ("whole", "killed", "interrupted"):
        assert difference(whole, weights(tmp_path / name)) == 0, f"{name}, after {least} or {after}"
        assert [line["step"] for line in logged(tmp_path / name)] == list(range(1, 251))
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert all(result[k] == results[0][k] for result in results for k in ("before", "after", "n", "ci95"))


@pytest.mark.slow
def test_bad_input_of_a_whole_process(checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    error = finished(*command(checkpoint, tmp_path / "rows.jsonl", tmp_path / "out"), code=2)
    assert error.count("\n") == 1 and "rows.jsonl:2: --map answer=completion" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_path_from_nothing(tmp_path, monkeypatch):
    """A short base run and a short SFT of it: the parts of `python sft.py`, and its baseline."""
    (tmp_path / "data").mkdir()
    shutil.copy(loop_module.ROOT / "data" / "tiny.tiktoken", tmp_path / "data")
    monkeypatch.setattr(loop_module, "ROOT", tmp_path)
    base = main(get_args(["--stage", "base", "--steps", "1000", "--out", str(tmp_path / "out" / "base")]))
    assert base["metric"] == "cloze" and base["after"] > 0.05 > base["before"]
    monkeypatch.setattr(loop_module.Loop, "require", lambda self, stage: tmp_path / "out" / stage / "checkpoint")
    tuned = main(get_args(["--steps", "200", "--out", str(tmp_path / "out" / "sft")]))
    assert tuned["n"] >= 500 and tuned["before"] <= 0.05 and tuned["after"] > 0.06
    assert tuned["after"] > tuned["baselines"]["the same SFT of random weights"]
    assert (tmp_path / "out" / "sft" / "curve.svg").exists()
