"""Facts about what surrounds the training step: data order, schedule, ranks, stopping, resuming, failing, reporting."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import loop as loop_module
from data.formats import UserError
from data.tokenizer import tiny
from kernels import linear_cross_entropy
from loop import COMMON, Loop, RunFailed, adamw, clip, curve, learning_rate, paired, parser, run, set_lr
from model import Block, Config, Transformer, load

DEFAULTS = {
    "depth": 2, "steps": 10, "epochs": 1.0, "batch_size": 6, "micro_batch_size": 4, "lr": 1e-2, "warmup": 3,
    "schedule": "cosine", "weight_decay": 0.1, "grad_clip": 1.0, "max_length": 64, "max_new_tokens": 8,
}  # fmt: skip


def get_args(*argv: object) -> Namespace:
    made = parser("A test.", flags=tuple(COMMON), defaults=DEFAULTS)
    return made.parse_args(["--device", "cpu", "--log-every", "1", *map(str, argv)])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


# A training run in miniature, as a script would write it


def ragged_rows() -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(64) for _ in range(length)] for length in (3, 40, 2, 17, 9, 28, 5, 2, 33)]


def collate(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max((len(row) for row in rows), default=2)
    input_ids = torch.zeros(max(1, len(rows)), length, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, 1 : len(row)] = torch.tensor(row[1:])
    return input_ids, labels


def new_model() -> Transformer:
    torch.manual_seed(1)
    return Transformer(Config.from_depth(1, 1024, 64))


def backward(loop: Loop, model: torch.nn.Module, step: int) -> float:
    rows = ragged_rows()
    batches = [collate([rows[i] for i in indices]) for indices in loop.micro_batches(len(rows), step)]
    n_tokens = loop.sum_over_ranks(sum(int((labels != -100).sum()) for _, labels in batches))
    total = 0.0
    for input_ids, labels in batches:
        hidden = model.hidden_before(input_ids)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, labels.flatten()) / n_tokens
        loss.backward()
        total += loss.item()
    loop.all_reduce(model)
    return loop.sum_over_ranks(total)


def train(args: Namespace, *, noise: bool = False, during=lambda loop, step, model: None) -> torch.nn.Module:
    loop = Loop(args, "toy")
    model = loop.shard(new_model())
    optimizer = adamw(model, args.lr, args.weight_decay)
    extra = loop.restore(model, optimizer)
    for step in loop.steps(args.steps):
        loss = backward(loop, model, step)
        if noise:
            factor = 1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(()).item()
            for p in model.parameters():
                p.grad *= factor
        grad_norm = clip(model, args.grad_clip)
        lr = set_lr(optimizer, args, step)
        optimizer.step()
        optimizer.zero_grad()
        extra = {"seen": extra.get("seen", 0) + 1, "sum": extra.get("sum", torch.zeros(2)) + torch.tensor([1.5, step])}
        during(loop, step, model)
        loop.log(step, loss=loss, grad_norm=grad_norm, lr=lr, tokens=10)
        if loop.due("save", step):
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tiny(), extra=extra)
    assert extra["seen"] == args.steps and extra["sum"].tolist() == [1.5 * args.steps, sum(range(args.steps + 1))]
    return model


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# The command line


def test_flags_have_one_order_whatever_the_script_asks():
    kinds = {"": 8, "with --model": 4}  # of runs: the values that `fill` gives
    flags, defaults = ("--seed", "--lr", "--batch-size", "--model"), {"lr": 0.5, "batch_size": kinds}
    made = parser("Doc.", flags=flags, defaults=defaults)
    help_text = " ".join(made.format_help().split())
    assert help_text.index("--model") < help_text.index("--lr") < help_text.index("--seed")
    assert "(default: 0.5)" in help_text and "(default: 8, 4 with --model)" in help_text
    args = made.parse_args([])
    assert vars(args) == {"model": None, "lr": 0.5, "batch_size": None, "seed": 0}


@pytest.mark.parametrize(
    "argv", [["--lr", "nan"], ["--lr", "-1"], ["--batch-size", "0"], ["--steps", "1.5"], ["--device", "tpu"], ["--no"],
             ["--eval-data", "x"]]
)
def test_a_wrong_flag_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        get_args(*argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and argv[0] in error


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("rows.jsonl:3: no such\nfield"), 2, "rows.jsonl:3: no such field"),
        (RunFailed("step 7: loss is nan"), 1, "step 7"),
        (KeyboardInterrupt("interrupted; continue with: x"), 130, "continue with"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "step 0: disk full"),
        (MemoryError(), 1, "--micro-batch-size (now 4)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--micro-batch-size (now 4)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--micro-batch-size (now 4)"),
    ],
)
def test_exit_codes(raised, code, words, capsys, monkeypatch):
    monkeypatch.setattr(Loop, "step", 0)  # whatever ran before

    def main(args):
        raise raised

    with pytest.raises(SystemExit) as exit_:
        run(main, get_args)
    error = capsys.readouterr().err
    assert exit_.value.code == code and words in error and error.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_success_does_not_exit():
    def main(args):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main, get_args)
    assert run(lambda args: None, get_args) is None


def test_an_absent_device_is_refused():
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=f"--device {absent}"):
        Loop(get_args("--device", absent), "toy")


# The optimizer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_learning_rate_closed_form(schedule, warmup):
    total, lr = 11, 0.3
    rates = [learning_rate(step, total, lr, warmup, schedule) for step in range(1, total + 1)]
    for index, rate in enumerate(rates):  # index counts from 0
        if index < warmup:
            expected = lr * (index + 1) / warmup
        else:
            left = (total - index) / (total - warmup)  # 1 at the peak, 0 after the last step
            cosine = lr * (0.55 - 0.45 * math.cos(math.pi * left))
            level = lr * min(1.0, (total - index) / 4)  # the last 30% of 11 steps are 4
            expected = {"linear": lr * left, "constant": lr, "cosine": cosine, "wsd": level}[schedule]
        assert rate == pytest.approx(expected, rel=1e-12) and rate > 0
    assert max(rates) == pytest.approx(lr)
    assert [learning_rate(step, 100, lr, warmup, "wsd") < lr for step in (71, 72)] == [False, True]  # 30 of 100


def test_schedule_moves_once_an_optimizer_step(tmp_path):
    args = get_args("--out", tmp_path, "--micro-batch-size", 1)
    train(args)
    rates = [line["lr"] for line in logged(tmp_path)]
    assert rates == [learning_rate(step, 10, args.lr, args.warmup, args.schedule) for step in range(1, 11)]


def test_set_lr_reaches_every_group():
    optimizer = adamw(torch.nn.Linear(3, 2), 0.1, 0.5)
    args = get_args("--steps", 10, "--warmup", 4, "--lr", 0.8)
    assert set_lr(optimizer, args, 1) == pytest.approx(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2])
    assert set_lr(optimizer, args, 4, total=5) == pytest.approx(0.8)


def test_only_matrices_decay():
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model, 0.1, 0.5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * 0.95)
    assert torch.equal(model.bias, bias)


def test_adamw_moments():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer, w = adamw(model, 0.1, 0.0), model.weight.item()
    m = v = 0.0
    for step, g in enumerate((3.0, -1.0, 0.5), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
        model.weight.grad = torch.full((1, 1), g)
        optimizer.step()
    assert model.weight.item() == pytest.approx(w, rel=1e-5)


def test_bf16_weights_become_fp32_masters():
    model = torch.nn.Linear(4, 4).to(torch.bfloat16)
    frozen = torch.nn.Linear(4, 4).to(torch.bfloat16).requires_grad_(False)
    model.frozen = frozen
    optimizer = adamw(model, 1e-5, 0.0)
    start = model.weight.detach().clone()
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    torch.testing.assert_close(start - model.weight.detach(), torch.full((4, 4), 100 * 1e-5), rtol=1e-2, atol=0)
    assert frozen.weight.dtype == torch.bfloat16


def test_what_is_quantized_does_not_learn():
    model = new_model()
    model.config = replace(model.config, quantization={"bits": 4})
    both = torch.nn.ModuleDict({"policy": model, "critic": torch.nn.Linear(2, 1)})
    with pytest.raises(UserError, match="--model: its matrices are quantized"):
        adamw(both, 1e-3, 0.0)
    model.requires_grad_(False)  # what stands beside or before it may
    assert sum(len(group["params"]) for group in adamw(both, 1e-3, 0.0).param_groups) == 2


def test_clip_scales_the_gradient_to_the_norm():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[6.0, 8.0]])
    assert clip(model, 0.0).item() == 10.0 and model.weight.grad.tolist() == [[6.0, 8.0]]
    assert clip(model, 2.0).item() == 10.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.2, 1.6]]), rtol=1e-5, atol=0)


# Data order and seeds


def test_every_row_once_an_epoch_in_a_new_order():
    loop, n = Loop(get_args("--batch-size", 3), "toy"), 10
    order = [i for step in range(1, 11) for i in loop.batch_indices(n, step)]
    epochs = [order[start : start + n] for start in range(0, 30, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(n)) not in epochs
    other = Loop(get_args("--batch-size", 3, "--seed", 1), "toy")
    assert [i for step in range(1, 11) for i in other.batch_indices(n, step)] != order
    whole = Loop(get_args("--batch-size", 30), "toy")  # the order does not know the batch size; a batch may span epochs
    assert whole.batch_indices(n, 1) == order
    assert loop.batch_indices(n, 7) == order[18:21]  # nor which steps came before


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_and_micro_batches_share_the_batch(ranks, size):
    loop = Loop(get_args("--batch-size", 7, "--micro-batch-size", size), "toy")
    loop.world_size, shares = ranks, []
    for loop.rank in range(ranks):
        shares.append(list(loop.micro_batches(20, 2)))
        assert all(len(rows) <= size for rows in shares[-1])
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for rows in share for i in rows) == sorted(loop.batch_indices(20, 2))


def test_noise_is_a_function_of_seed_step_and_rank(tmp_path, monkeypatch):
    def draw(loop, step):
        loop.seed(step)
        return random.random(), np.random.rand(), torch.rand(()).item()

    loop = Loop(get_args(), "toy")
    first = draw(loop, 1)
    assert draw(loop, 1) == first
    others = [draw(loop, 2), draw(Loop(get_args("--seed", 5), "toy"), 1)]
    start = draw(loop, 0)
    loop.rank = 1
    assert draw(loop, 0) == start  # new weights are alike on all ranks
    others.append(draw(loop, 1))
    for a, b, c in others:
        assert a != first[0] and b != first[1] and c != first[2]
    loop.device, asked = torch.device("meta"), []  # on a GPU torch seeds its generators, too
    monkeypatch.setattr(torch, "manual_seed", asked.append)
    for step in (1, 2, 1):
        loop.seed(step)
    assert asked[0] == asked[2] != asked[1]


def test_gradient_does_not_depend_on_micro_batches():
    gradients, losses = [], []
    for size in (6, 4, 1):
        model, loop = new_model(), Loop(get_args("--micro-batch-size", size), "toy")
        losses.append(backward(loop, model, 1))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for gradient, loss in zip(gradients, losses, strict=True):
        assert (gradient - gradients[0]).norm() <= 1e-6 * gradients[0].norm()
        assert loss == pytest.approx(math.log(1024), rel=0.05)  # ln V at initialisation


# Two ranks


def _on_a_rank(function, rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, folder)
    torch.distributed.destroy_process_group()


def on_two_ranks(function, folder: Path) -> None:
    """Run function(rank, folder) in two processes forked from this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_on_a_rank, args=(function, rank, port, folder)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def two_rank_run(rank: int, folder: Path) -> None:
    for parallel in ("replicas", "fsdp"):
        argv = ("--parallel", parallel, "--batch-size", 5, "--micro-batch-size", 2, "--steps", 4)
        found = {}

        def look(loop, step, model, found=found):
            if step == 4:
                found["weights"] = [whole(p.detach()) for p in model.parameters()]

        args = get_args(*argv, "--out", folder / parallel)
        loop = Loop(args, "toy")
        model = loop.shard(new_model())
        with torch.no_grad():
            found["logits"] = model(collate(ragged_rows())[0])
            model.hidden(collate(ragged_rows())[0])
        groups = adamw(model, args.lr, args.weight_decay).param_groups  # the root is whole now: must see its shard
        assert all(hasattr(p, "full_tensor") == (parallel == "fsdp") for group in groups for p in group["params"])
        found["loss"] = backward(loop, model, 1)
        found["grads"] = [whole(p.grad).clone() for p in model.parameters()]
        found["norm"] = clip(model, 0.0)
        train(args, during=look)
        torch.save(found, folder / f"{parallel}-{rank}.pt")
        args.steps, args.resume = 6, True
        with pytest.raises(UserError, match="--steps"):  # all ranks refuse alike
            Loop(args, "toy")
        args.steps = 4
        resumed = Loop(args, "toy")
        model = resumed.shard(new_model())
        optimizer = adamw(model, args.lr, args.weight_decay)
        resumed.restore(model, optimizer)
        assert all(torch.equal(whole(p), w) for p, w in zip(model.parameters(), found["weights"], strict=True))
        moments = [whole(optimizer.state[p]["exp_avg_sq"]) for p in model.parameters()]
        torch.save(moments, folder / f"{parallel}-{rank}-moments.pt")
    narrow = (*argv, "--dtype", "bf16", "--micro-batch-size", 5)  # one backward: gradients of several add up in fp32
    loop = Loop(get_args(*narrow, "--out", folder / "narrow"), "toy")
    model = loop.shard(new_model())
    backward(loop, model, 1)
    gradients = [whole(p.grad) for p in model.parameters()]
    assert any((g.bfloat16() != g).any() for g in gradients), "gradients are summed in bf16"


def test_two_ranks_equal_one(tmp_path):
    on_two_ranks(two_rank_run, tmp_path)
    args = get_args("--batch-size", 5, "--micro-batch-size", 5, "--steps", 4, "--out", tmp_path / "one")
    one = new_model()
    loss = backward(Loop(args, "toy"), one, 1)
    trained = train(args)
    for parallel in ("replicas", "fsdp"):
        a, b = (torch.load(tmp_path / f"{parallel}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(x, y) for x, y in zip(a["weights"], b["weights"], strict=True)), "private replicas"
        with torch.no_grad():
            torch.testing.assert_close(a["logits"], new_model()(collate(ragged_rows())[0]))
        norm = torch.cat([p.grad.flatten() for p in one.parameters()]).norm()
        assert a["norm"].item() == pytest.approx(norm.item(), rel=1e-5) and a["loss"] == pytest.approx(loss, rel=1e-6)
        for p, grad in zip(one.parameters(), a["grads"], strict=True):
            assert (p.grad - grad).norm() <= 1e-6 * norm
        for p, w in zip(trained.parameters(), a["weights"], strict=True):
            assert (p - w).norm() <= 1e-4 * p.norm()
        saved, _ = load(tmp_path / parallel / "checkpoint")
        assert all(torch.equal(p, w) for p, w in zip(saved.parameters(), a["weights"], strict=True))
        moments = [torch.load(tmp_path / f"{parallel}-{rank}-moments.pt") for rank in (0, 1)]
        assert all(torch.equal(x, y) and x.any() for x, y in zip(*moments, strict=True))


def sums(rank: int, folder: Path) -> None:
    loop = Loop(get_args(), "toy")
    assert loop.sum_over_ranks(3) == 6 and isinstance(loop.sum_over_ranks(3), int)
    assert loop.sum_over_ranks(2**40 + rank) == 2**41 + 1
    mine = torch.tensor([1.0, rank])
    assert loop.sum_over_ranks(mine).tolist() == [2.0, 1.0] and mine.tolist() == [1.0, rank]
    model = torch.nn.ModuleList(torch.nn.Linear(2, 3, bias=False) for _ in range(3))
    model[0].weight.grad = torch.full((3, 2), 1.0 + rank)
    if rank == 1:
        model[1].weight.grad = torch.arange(6.0).view(3, 2)
    loop.all_reduce(model)
    assert torch.equal(model[0].weight.grad, torch.full((3, 2), 3.0))
    assert torch.equal(model[1].weight.grad, torch.arange(6.0).view(3, 2))
    assert model[2].weight.grad is None
    loop.args.save_every, loop.total, loop.signalled = 0, 9, rank == 1
    assert loop.due("save", 3)  # what one rank noticed, all know


def test_sums_over_two_ranks(tmp_path):
    on_two_ranks(sums, tmp_path)


# Stopping and going on


def test_due():
    loop = Loop(get_args("--save-every", 3, "--eval-every", 0), "toy")
    loop.total = 7
    assert [step for step in range(1, 8) if loop.due("save", step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if loop.due("eval", step)] == [7]


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resume_is_bit_exact(tmp_path, stop):
    straight = train(get_args("--out", tmp_path / "a"), noise=True)

    def die(loop, step, model):
        if step == stop + 1:
            raise RuntimeError("killed")

    args = get_args("--out", tmp_path / "b", "--save-every", stop)
    with pytest.raises(RuntimeError, match="killed"):
        train(args, noise=True, during=die)
    args.resume = True
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert same_weights(train(args, noise=True), straight)
    keep = ("step", "loss", "grad_norm", "lr")
    a, b = ([{k: line[k] for k in keep} for line in logged(tmp_path / name)] for name in "ab")
    assert a == b


def test_resume_cuts_the_log_to_the_saved_step(tmp_path):
    args = get_args("--out", tmp_path)
    train(args)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    notes = json.loads((tmp_path / "checkpoint" / "training.json").read_text())
    (tmp_path / "checkpoint" / "training.json").write_text(json.dumps(notes | {"seconds": 1000.0}))
    args.resume = True
    loop = Loop(args, "toy")
    loop.restore()
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 11)) and list(loop.steps(10)) == []
    assert loop.tokens == 100 and 1000 <= loop.seconds < 1100  # what went before counts


def test_a_fresh_run_starts_a_new_log(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    train(get_args("--out", tmp_path))
    train(get_args("--out", tmp_path, "--lr", 0.5))
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 11)) and not (tmp_path / "result.json").exists()


def test_resume_refuses_other_settings(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        Loop(get_args("--out", tmp_path, "--resume"), "toy")
    train(get_args("--out", tmp_path))
    with pytest.raises(UserError, match=r"--lr was 0\.01, now 0\.5; --seed was 0, now 3$"):
        Loop(get_args("--out", tmp_path, "--resume", "--lr", 0.5, "--seed", 3), "toy")
    args = get_args("--out", tmp_path, "--resume", "--micro-batch-size", 1, "--save-every", 2, "--compile", "off")
    args.rollout_batch = 3
    Loop(args, "toy")


@pytest.mark.parametrize("flag", ["data", "eval_data", "prompts", "constitution"])
def test_resume_refuses_a_file_that_has_changed(tmp_path, flag):
    """One of two files, under the same path."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("old\n")

    def flags(*more: str) -> Namespace:
        args = get_args("--data", "x", "--out", tmp_path / "out", "--steps", 1, *more)
        setattr(args, flag, ",".join(map(str, files)))
        return args

    train(flags())
    Loop(flags("--resume"), "toy")
    files[1].write_text("new\n")
    with pytest.raises(UserError, match=rf"--{flag.replace('_', '-')} was .*b.jsonl sha256"):
        Loop(flags("--resume"), "toy")


def test_nothing_is_written_before_the_first_step(tmp_path):
    Loop(get_args("--out", tmp_path / "new"), "toy")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("out", "said"), [("file", "exists"), ("file/x", "Not a directory"), ("new", "Read-only")])
def test_where_nothing_can_be_written_is_one_line(tmp_path, monkeypatch, out, said):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").write_text("mine")
    if out == "new":
        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=rf"^--out .*{out}: .*{said}"):
        next(Loop(get_args("--out", tmp_path / out), "toy").steps(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_model_must_match_the_checkpoint(tmp_path):
    args = get_args("--out", tmp_path)
    train(args)
    args.resume = True
    with pytest.raises(UserError, match="not the weights of this model"):
        Loop(args, "toy").restore(torch.nn.Linear(2, 2))


def _save_and_die(args: Namespace, at: int) -> None:
    """Train in a fork, which is killed at call number `at` of those by which the second save touches the disk."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    calls = 0

    def deadly(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def second_save(loop, step, model):
        torch.save(list(model.parameters()), args.out.with_name(f"step {step}"))
        if step == 2:
            for module, names in {os: ["replace", "fsync"], shutil: ["rmtree"], Path: ["write_text", "mkdir"]}.items():
                for name in names:
                    setattr(module, name, deadly(getattr(module, name)))

    train(args, during=second_save)


def test_a_kill_at_any_point_of_saving_leaves_a_whole_checkpoint(tmp_path):
    """What was saved is compared with what the killed process itself noted: another one may round differently."""
    args = get_args("--out", tmp_path / "run", "--steps", 2, "--save-every", 1, "--log-every", 0)
    resumed, code, at = set(), -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        at += 1
        shutil.rmtree(args.out, ignore_errors=True)
        child = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(args, at))
        child.start()
        child.join(60)
        code = child.exitcode
        again = Loop(get_args("--out", args.out, "--steps", 2, "--resume"), "toy")
        model = new_model()
        again.restore(model, adamw(model, args.lr, args.weight_decay))
        noted = torch.load(tmp_path / f"step {again.done}")
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), noted, strict=True))
        resumed.add(again.done)
    assert code == 0 and at > 10 and resumed == {1, 2}
    assert {path.name for path in args.out.iterdir()} == {"checkpoint", "metrics.jsonl", "settings.json"}


@pytest.mark.parametrize("breaks", ["write_safetensors", "_flush"])
def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys, breaks):
    args = get_args("--out", tmp_path, "--save-every", 4)

    def fill(loop, step, model):
        if step == 5:

            def full(*arguments):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(loop_module, breaks, full)

    with pytest.raises(SystemExit) as exit_:
        run(lambda args: train(args, during=fill), lambda: args)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 1 and error.startswith("step 8: ") and "No space" in error and "step 4 is kept" in error
    monkeypatch.undo()
    args.resume = True
    train(args)


def test_a_loss_that_is_not_finite_fails_the_run(tmp_path, capsys):
    args = get_args("--out", tmp_path, "--save-every", 2, "--log-every", 100)

    def poison(loop, step, model):
        if step == 4:  # noticed in the loss of step 5, saved or logged first at step 6
            with torch.no_grad():
                model.norm.weight[0] = math.nan

    with pytest.raises(SystemExit) as exit_:
        run(lambda args: train(args, during=poison), lambda: args)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 1 and error.startswith("step 5: loss is nan") and "step 4 is kept" in error


@pytest.mark.parametrize(("steps", "warmup", "told"), [(3, 3, True), (3, 2, False), (2, 5, True)])
def test_a_run_that_never_leaves_the_warm_up_says_so(capsys, steps, warmup, told):
    args, optimizer = get_args("--warmup", warmup), torch.optim.SGD(new_model().parameters(), lr=1.0)
    for step in range(1, steps + 1):
        set_lr(optimizer, args, step, steps)
    said = capsys.readouterr().err
    assert (f"--warmup {warmup}: it takes all of the {steps} steps" in said) == told and said.count("\n") == told


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    loop = Loop(get_args("--out", tmp_path, "--log-every", 100), "toy")
    for step in loop.steps(9):
        loop.log(step, loss=torch.tensor(1.0), grad_norm=torch.tensor(math.inf if step == 3 else 1.0))
        if step == 3:
            with pytest.raises(RunFailed, match="step 3: grad_norm is inf; none was saved before"):
                loop.save(step, model=new_model(), tokenizer=tiny())
            break
    assert not loop.checkpoint.exists()


def test_first_signal_finishes_the_step_and_saves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", "a b"])
    args = get_args("--out", tmp_path)
    default = signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("nobody handled SIGTERM"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, step_in_hand in ((signal.SIGINT, 4), (signal.SIGTERM, 7)):

        def interrupt(loop, step, model, number=number, at=step_in_hand):
            if step == at:
                os.kill(os.getpid(), number)

        with pytest.raises(SystemExit) as exit_:
            run(lambda args, interrupt=interrupt: train(args, noise=True, during=interrupt), lambda: args)
        error = capsys.readouterr().err
        assert exit_.value.code == 130 and f"interrupted after step {step_in_hand}, which is saved" in error
        assert "python toy.py --out 'a b'" in error.splitlines()[-1]
        assert [line["step"] for line in logged(tmp_path)] == list(range(1, step_in_hand + 1))
        args.resume = True
    straight = train(get_args("--out", tmp_path / "straight"), noise=True)
    assert same_weights(train(args, noise=True), straight)
    assert (signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, default)) == handlers


def test_resume_command_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--lr", "0.1"])

    def interrupt(loop, step, model):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"python toy\.py --lr 0\.1 --resume$"):
        train(get_args("--out", tmp_path), during=interrupt)


def test_second_signal_stops_at_once(tmp_path):
    def interrupt(loop, step, model):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt, match="stopped at once in step 2"):
        train(get_args("--out", tmp_path), during=interrupt)
    assert not (tmp_path / "checkpoint").exists()


# Reporting


@pytest.mark.parametrize("flag", ["model", "adapter", "teacher", "reward_model", "prm", "judge"])
@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_a_run_does_not_overwrite_what_it_starts_from(tmp_path, flag, inside):
    """Nor the second of two teachers."""
    args = get_args("--out", tmp_path)
    setattr(args, flag, "other," * (flag == "teacher") + str(tmp_path / inside))
    with pytest.raises(UserError, match="starts from what is there"):
        Loop(args, "toy")
    setattr(args, flag, str(tmp_path / "other"))
    Loop(args, "toy")


def test_a_run_does_not_overwrite_the_stage_that_it_starts_from(house):
    with pytest.raises(UserError, match="starts from what is there"):
        Loop(get_args("--out", house / "out" / "sft"), "toy").require("sft")
    Loop(get_args("--out", house / "out" / "sft2"), "toy").require("sft")


def test_narrow_rounds_frozen_matrices_of_blocks(tmp_path):
    loop, model = Loop(get_args("--out", tmp_path, "--dtype", "bf16"), "toy"), new_model()
    for name, p in model.named_parameters():
        p.requires_grad_("ffn" in name)
    loop.narrow(model)
    for name, p in model.named_parameters():
        frozen_matrix = name.startswith("blocks.") and "ffn" not in name and p.ndim == 2
        assert p.dtype == (torch.bfloat16 if frozen_matrix else torch.float32), name


def test_log_writes_plain_numbers(tmp_path, monkeypatch):
    """And the speed, by a clock that goes on by a second each step."""
    loop = Loop(get_args("--out", tmp_path, "--log-every", 3), "toy")
    for step in loop.steps(7):
        monkeypatch.setattr(loop_module.time, "perf_counter", lambda step=step: loop.started + step)
        loop.log(step, loss=torch.tensor(2.0), odd=math.nan, tokens=5)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6, 7] and loop.tokens == 35
    assert all(line["loss"] == 2.0 and line["odd"] is None for line in lines)
    assert [line["tokens_per_second"] for line in lines] == [5.0, 5.0, 5.0, 5.0]  # since the last line


def test_finish_writes_the_result_and_says_it(tmp_path, capsys):
    args = get_args("--out", tmp_path)
    train(args)
    loop = Loop(args, "toy")
    before = {"exact match": [0.0] * 56 + [1.0] * 8, "sorting": [0.0] * 4}
    after = {"exact match": [1.0] * 60 + [0.0] * 4, "sorting": [1.0, 1.0, 1.0, 0.0]}
    baselines = {"random": 0.25}
    loop.finish(before, after, baselines=baselines, variant="x")
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result) == [
        "script", "variant", "metric", "higher_is_better", "before", "after", "n", "ci95", "metrics", "baselines",
        "seconds", "tokens_per_second", "peak_memory_mb", "device", "seed", "command", "torch", "git",
    ]  # fmt: skip
    expected = {"script": "toy", "variant": "x", "metric": "exact match", "before": 0.125, "after": 0.9375, "n": 64}
    expected |= {"ci95": paired(*(found["exact match"] for found in (before, after)))["ci95"], "seed": 0}
    expected |= {"metrics": {"sorting": paired(before["sorting"], after["sorting"])}, "baselines": baselines}
    assert (expected | {"higher_is_better": True}).items() <= result.items()
    assert 10 < result["peak_memory_mb"] < 1e5 and result["device"] == "cpu" and result["torch"] == torch.__version__
    said = capsys.readouterr().out
    words = ("0.125 before", "0.938 after", "+0.812 ± 0.1", "64 rows", "sorting", "random", str(tmp_path))
    assert all(word in said for word in words)
    ElementTree.parse(tmp_path / "curve.svg")


def test_the_interval_is_that_of_the_paired_difference():
    found = paired([3.0, 1.0, 2.0, 5.0], [2.0, 1.5, 1.0, 1.0])
    assert (found["before"], found["after"], found["n"]) == (2.75, 1.375, 4)
    assert found["ci95"] == pytest.approx(1.96 * statistics.stdev((-1.0, 0.5, -1.0, -4.0)) / 2)
    assert paired([0.0], [1.0]) == {"before": 0.0, "after": 1.0, "n": 1, "ci95": None}


def test_curve_puts_points_where_the_axes_say():
    lines = [{"step": 0, "loss": 1.0}, {"step": 50, "loss": 3.0, "eval": 2.0}, {"step": 100, "loss": 2.0, "eval": None}]
    root = ElementTree.fromstring(curve(lines, ("loss", "eval"), title="toy"))
    name = "{http://www.w3.org/2000/svg}"
    ticks = {t.text: (float(t.get("x")), float(t.get("y")) - 4) for t in root.iter(f"{name}text")}
    lines = [line.get("points").split() for line in root.iter(f"{name}polyline")]
    loss, evaluation = ([tuple(map(float, point.split(","))) for point in line] for line in lines)
    assert [x for x, _ in loss] == [ticks["0"][0], (ticks["40"][0] + ticks["60"][0]) / 2, ticks["100"][0]]
    assert [y for _, y in loss] == [ticks["1"][1], ticks["3"][1], ticks["2"][1]]
    assert evaluation == [(loss[1][0], ticks["2"][1])]


def test_curve_rises_with_its_values():
    root = ElementTree.fromstring(curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}], ("loss",), title="toy"))
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x1 < x2 and y1 > y2  # SVG counts y downwards


@pytest.mark.parametrize("losses", [[], [0.0], [-2.5], [1e9], [1e-9, 2e-9], [0.0, None, 1e-300]])
def test_curve_of_little(losses):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    ElementTree.fromstring(curve(lines, ("loss",), title="toy"))


# Speed


@pytest.mark.parametrize(
    ("flag", "device", "compiled"),
    [("off", "cuda", False), ("on", "cpu", True), ("auto", "cpu", False), ("auto", "cuda", True)],
)
def test_compile_is_decided_once(monkeypatch, flag, device, compiled):
    told, model = [], new_model()
    monkeypatch.setattr(kernels, "use_compile", lambda on: told.append(on) or on)
    monkeypatch.setattr(type(model.blocks[0]), "compile", lambda block, dynamic: told.append(dynamic))
    with torch._dynamo.config.patch(recompile_limit=8):
        loop = Loop(get_args("--compile", flag), "toy")
        loop.device = torch.device(device)
        loop.compile(model)
    assert told == [compiled] + [False] * len(model.blocks) * compiled and loop.compiled == compiled


@pytest.mark.parametrize("longest", [64, 8192])
def test_every_padded_length_may_have_its_graphs(monkeypatch, longest):
    """With and without gradient, of whole batches and of the last one."""
    monkeypatch.setattr(kernels, "use_compile", lambda on: on)
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        Loop(get_args("--compile", "on", "--max-length", longest), "toy").compile(new_model())
        assert torch._dynamo.config.recompile_limit >= max(64, 4 * longest // 64)


def test_a_dynamic_graph_serves_many_shapes(monkeypatch):
    """Rollouts have ever new (B, T), and running into the limit of recompilations is an error."""
    model, whole = new_model(), torch.nn.Module.compile
    monkeypatch.setattr(kernels, "use_compile", lambda on: on)
    monkeypatch.setattr(kernels, "_compiled", lambda body, dynamic: body)
    monkeypatch.setattr(kernels, "_compiling", True)
    monkeypatch.setattr(type(model.blocks[0]), "compile", lambda block, dynamic: whole(
        block, backend="eager", dynamic=dynamic))  # fmt: skip
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        Loop(get_args("--compile", "on"), "toy").compile(model, dynamic=True)
        torch._dynamo.config.recompile_limit = 12
        for i in range(15):
            model.hidden(torch.zeros(1 + i * 5 % 9, 2 + i * 7 % 15, dtype=torch.long)).sum().backward()
    torch._dynamo.reset()


def test_without_a_compiler_the_run_is_eager(monkeypatch):
    told, model = [], new_model()
    monkeypatch.setattr(kernels, "use_compile", lambda on: False)
    monkeypatch.setattr(type(model.blocks[0]), "compile", lambda block, dynamic: told.append(dynamic))
    loop = Loop(get_args("--compile", "on"), "toy")
    loop.compile(model)
    assert told == [] and not loop.compiled


def test_describe_says_the_size(capsys):
    model = new_model()
    Loop(get_args(), "toy").describe(model)
    n = sum(p.numel() for p in model.parameters())
    said = capsys.readouterr().err
    assert f"{n / 1e6:.2f}M parameters, cpu, float32; about {16 * n / 1e6:,.0f} MB" in said


# Stages

SCRIPT = """
import json, sys
from argparse import Namespace
from pathlib import Path
LR = 0.1
def get_args(argv):
    flags = dict(zip(argv[::2], argv[1::2]))
    return Namespace(stage=flags.get("--stage", "sft"), lr=LR, seed=0, out=Path(flags.get("--out", "x")))
if __name__ == "__main__":
    args = get_args(sys.argv[1:])
    Path("count").open("a").write(args.stage + " ")
    if Path("fail").exists(): sys.exit(1)
    (args.out / "checkpoint").mkdir(parents=True)
    (args.out / "settings.json").write_text(SETTINGS.replace("base", args.stage))
    (args.out / "result.json").write_text('{"seconds": 1, "command": "with a temporary folder"}')
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository whose sft.py makes a checkpoint at once."""
    monkeypatch.setattr(loop_module, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.tiktoken").write_text("old")
    settings = json.dumps(loop_module._identity(Namespace(stage="base", lr=0.1, seed=0)))
    (tmp_path / "sft.py").write_text(SCRIPT.replace("SETTINGS", repr(settings)))
    return tmp_path


def test_what_a_stage_starts_from_is_built_first_and_by_this_process(house):
    """So that Ctrl-C, of which a stage's own process does not hear, leaves none behind."""
    assert Loop(get_args(), "toy").require("sft") == house / "out" / "sft" / "checkpoint"
    assert (house / "count").read_text() == "base sft "
    assert set(loop_module.NEEDS) == set(loop_module.STAGES) - {"base"}


def test_a_missing_stage_is_built_once(house, capsys):
    loop = Loop(get_args(), "toy")
    path = loop.require("base")
    assert path == house / "out" / "base" / "checkpoint" and path.exists()
    assert "sft.py --stage base" in capsys.readouterr().err
    assert loop.require("base") == path and (house / "count").read_text() == "base "
    assert {p.name for p in (house / "out").iterdir()} == {"base", ".base.lock"}
    result = json.loads((house / "out" / "base" / "result.json").read_text())
    assert result == {"seconds": 1, "command": "python sft.py --stage base"}, "the command that anybody can repeat"


def test_runs_with_settings_of_their_own_leave_the_stages_alone(house, capsys):
    """Later scripts start from out/base and out/sft; the same flags with --resume find their run again."""

    def new(stage: str, script: str = "sft", **flags: object) -> Path:
        settings = {"stage": stage, "lr": 0.1, "seed": 0, "out": None, "device": "cpu", "resume": False}
        loop = Loop(Namespace(**settings | flags), script, out="base" if stage == "base" else None)
        return loop.out.relative_to(house)

    assert [new("base"), new("sft"), new("sft", device="auto")] == [Path("out/base"), Path("out/sft"), Path("out/sft")]
    assert new("sft", "dpo", lr=0.5) == Path("out/dpo") and new("sft", lr=0.5, out=house / "x") == Path("x")
    assert capsys.readouterr().err == ""
    assert [new("base", seed=1), new("sft", lr=0.5)] == [Path("out/base-custom"), Path("out/sft-custom")]
    assert capsys.readouterr().err.splitlines() == [
        f"these are not the settings of the stage out/{name}: writing to out/{name}-custom" for name in ("base", "sft")
    ]
    (house / "out" / "sft-custom" / "checkpoint").mkdir(parents=True)
    notes = {"identity": loop_module._identity(Namespace(stage="sft", lr=0.5, seed=0))}
    (house / "out" / "sft-custom" / "checkpoint" / "training.json").write_text(json.dumps(notes))
    assert new("sft", lr=0.5, resume=True) == Path("out/sft-custom")
    with pytest.raises(UserError, match="nothing to resume in .*out/sft$"):
        new("sft", resume=True)


def test_a_stage_that_fails_leaves_nothing(house):
    (house / "fail").touch()
    with pytest.raises(RunFailed, match=r"sft\.py --stage base"):
        Loop(get_args(), "toy").require("base")
    assert {p.name for p in (house / "out").iterdir()} == {".base.lock"}


def test_torchrun_builds_nothing(house, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    loop = Loop(get_args(), "toy")
    with pytest.raises(UserError, match=r"python sft\.py --stage base"):
        loop.require("base")
    assert not (house / "out").exists()
    monkeypatch.delenv("RANK")
    path = loop.require("base")
    monkeypatch.setenv("RANK", "0")
    assert loop.require("base") == path


@pytest.mark.parametrize("stale", ["flag", "data", "tokenizer", "unfinished"])
def test_a_stale_stage_is_refused_with_the_command(house, stale, monkeypatch):
    loop = Loop(get_args(), "toy")
    home = loop.require("base").parent
    words = {"flag": "--lr was 0.1, now 0.2", "data": "another data", "tokenizer": "another tok", "unfinished": "unfin"}
    if stale == "flag":
        (house / "sft.py").write_text(SCRIPT.replace("LR = 0.1", "LR = 0.2"))
    elif stale == "data":
        monkeypatch.setattr(loop_module, "VERSION", 99)
    elif stale == "tokenizer":
        (house / "data" / "tiny.tiktoken").write_text("new")
    else:
        (home / "result.json").unlink()
    with pytest.raises(UserError, match=words[stale]) as refused:
        loop.require("base")
    assert "python sft.py --stage base" in str(refused.value)
