"""Facts about sft.py: the loss and its mask, packing, cutting, options, whole runs on small models and real-shaped input."""

import json
import math
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import loop as loop_module
import sft
from data import chat, world
from data.chat import Row
from data.formats import UserError
from data.tokenizer import tiny
from model import Config, Transformer, load, save
from sft import Batch, Lomo, collate, document, fit, get_args, ifd, main, neftune, pack, rouge_l, sft_loss

CPU = torch.device("cpu")


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
    """Gradient support: the head's rows move for trained tokens and, by the softmax, where one is predicted; no more."""
    model = small().double()
    ids, mask = torch.randint(32, (1, 12)), torch.zeros(1, 12, dtype=torch.long)
    assert sft_loss(model, Batch(ids, mask, None)).item() == 0.0  # nothing trained: 0, not NaN
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


@pytest.mark.parametrize("n", range(1, 25))
def test_the_end_is_trained_on_only_where_it_is(n):
    """Cut and split at every length: no token is made up, moved or trained on where nothing comes before it."""
    whole = Row(list(range(100, 112)), [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1])
    for policy in ("cut", "split", "drop"):
        counts = Counter()
        parts = list(fit([Row(list(whole.input_ids), list(whole.completion_mask))], n, policy, counts))
        assert all(len(part.input_ids) <= n and part.completion_mask[0] == 0 for part in parts)
        trained = [i for part in parts for i, m in zip(part.input_ids, part.completion_mask, strict=True) if m]
        if n >= 12:
            assert [(p.input_ids, p.completion_mask) for p in parts] == [tuple(whole)] and not counts
            continue
        assert counts[policy] == 1
        assert (111 in trained) == (policy == "split" and 11 % n != 0)
        if policy == "drop":
            assert parts == []
        if policy == "cut":
            assert trained == [i for i, m in zip(whole.input_ids[:n], whole.completion_mask[:n], strict=True) if m]
            assert len(parts) + counts["without a trained token"] == 1
        if policy == "split":
            assert trained == [100 + i for i, m in enumerate(whole.completion_mask) if m and i % n]
            assert len(parts) + counts["without a trained token"] == math.ceil(12 / n)


def test_a_row_that_is_too_long_is_refused_with_its_number():
    with pytest.raises(UserError, match=r"row 2 has 40 tokens, --max-length is 39"):
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
    {"question": f"Tom has {n} apples and buys {n + 3} more. How many?", "answer": f"Tom has {n} + {n + 3} = {2 * n + 3}.",
     "level": n} for n in range(8)
]  # fmt: skip


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


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


def test_trained_tokens_are_answer_and_end(checkpoint, problems, tmp_path):
    """Of a file with other names for its fields: decoded, what is trained on is the answer and the ending token."""
    args = args_for(checkpoint, problems, tmp_path / "out")
    train, _ = sft.file_rows(args, str(problems), loop_module.Loop(args, "sft"))
    for row, problem in zip(train, PROBLEMS, strict=True):
        ids, mask = sft.encode(row, tiny(), args)
        trained = [i for i, m in zip(ids, mask, strict=True) if m]
        assert tiny().decode(trained[:-1]) == problem["answer"] and trained[-1] in tiny().eos_ids


def test_eight_rows_are_learned_by_heart(checkpoint, problems, tmp_path):
    result = run(checkpoint, problems, tmp_path / "out", "--epochs", 120, "--no-pack")
    assert result["before"] > 5 and result["after"] < 0.05 and result["higher_is_better"] is False
    model, tokenizer = load(tmp_path / "out" / "checkpoint")
    args = Namespace(max_new_tokens=32)
    chats = [[{"role": "user", "content": row["question"]}] for row in PROBLEMS]
    said = sft.answer(model.eval(), tokenizer, chats, args, samples=1, temperature=0.0, seed=0)
    assert [text for (text,) in said] == [row["answer"] for row in PROBLEMS]


@pytest.mark.parametrize("flags", [("--micro-batch-size", 1), ("--micro-batch-size", 3), ("--checkpoint-activations",)])
def test_splitting_a_batch_changes_nothing(checkpoint, problems, tmp_path, flags):
    """Rows of very different lengths, in one forward pass or several: the same loss, gradient norm and weights."""
    rows = [dict(row, answer=row["answer"] * (1 + 3 * (i % 2))) for i, row in enumerate(PROBLEMS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--steps", 3, "--no-pack", "--lr", 1e-3)
    run(checkpoint, problems, tmp_path / "whole", *common, "--micro-batch-size", 4)
    run(checkpoint, problems, tmp_path / "split", *common, *flags)
    for whole, split in zip(logged(tmp_path / "whole"), logged(tmp_path / "split"), strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4)
    whole, split = weights(tmp_path / "whole"), weights(tmp_path / "split")
    assert max((whole[name] - split[name]).abs().max().item() for name in whole) < 1e-4
    start = dict(load(checkpoint)[0].named_parameters())
    assert all(not torch.equal(start[name], whole[name]) for name in whole)


def test_logged_loss_is_the_mean_over_the_tokens_of_the_step(checkpoint, problems, tmp_path):
    args = args_for(checkpoint, problems, tmp_path / "out", "--steps", 1, "--batch-size", 8, "--no-pack")
    main(args)
    rows = [sft.encode({"prompt": r["question"], "completion": r["answer"]}, tiny(), args) for r in PROBLEMS]
    trained = sum(sum(row.completion_mask) for row in rows)
    wanted = brute_force(load(checkpoint)[0], rows) / trained
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["before"] == pytest.approx(wanted, rel=1e-4)  # the 8 rows are few: all are measured, as is said
    assert result["metric"] == "loss" and result["n"] == 8


def test_resuming_is_exact(checkpoint, problems, tmp_path):
    class Stop(Exception): ...

    class StopsAfter(loop_module.Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == 4:
                raise Stop

    flags = ("--steps", 7, "--save-every", 2, "--neftune", 5)
    run(checkpoint, problems, tmp_path / "whole", *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(sft, "Loop", StopsAfter)
        run(checkpoint, problems, tmp_path / "parts", *flags)
    result = run(checkpoint, problems, tmp_path / "parts", *flags, "--resume")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert result["before"] == json.loads((tmp_path / "whole" / "result.json").read_text())["before"]
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, 8))


def test_held_out_rows_are_not_trained_on(checkpoint, tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(400)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = get_args(["--model", str(checkpoint), "--data", str(path), "--out", str(tmp_path / "out")])
    loop = loop_module.Loop(args, "sft")
    train, held_out = sft.file_rows(args, str(path), loop)
    assert 16 <= len(held_out) < 60 and len(train) + len(held_out) == 400
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n")
    args.eval_data = str(other)
    train, held_out = sft.file_rows(args, str(path), loop)
    assert len(train) == 400 and [row["prompt"] for row in held_out] == ["Say 0."]


def test_mix_weights_files(checkpoint, tmp_path):
    for name in ("a", "b"):
        rows = ({"prompt": f"{name} {i}", "completion": "yes"} for i in range(20))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    args = get_args(["--model", str(checkpoint), "--data", files, "--mix", "a.jsonl=2.5", "b.jsonl=0.25", "--out",
                     str(tmp_path / "out")])  # fmt: skip
    train, _ = sft.file_rows(args, files, loop_module.Loop(args, "sft"))
    counts = Counter(row["prompt"][0] for row in train)
    assert counts == {"a": 50, "b": 5}


def test_mix_weights_parts_of_the_world():
    args = get_args(["--mix", *(f"{part}=0" for part in world.SFT_MIX if part != "reverse")])
    rows = list(sft.world_rows(args, tiny(), 2000))
    assert all("reverse" in tiny().decode(row.input_ids) for row in rows)
    args = get_args(["--stage", "base"])
    tokens = [len(row.input_ids) for row in sft.world_rows(args, tiny(), 5000)]
    assert 5000 <= sum(tokens) < 5000 + tokens[-1] + 1
    first, again = ([row.input_ids for row in sft.world_rows(args, tiny(), 5000)] for _ in range(2))
    assert first == again
    args.seed = 1
    assert first != [row.input_ids for row in sft.world_rows(args, tiny(), 5000)]


def test_ifd_keeps_the_hardest_rows_that_the_question_helps(checkpoint, problems, tmp_path):
    args = args_for(checkpoint, problems, tmp_path / "out", "--select", "ifd", "--select-share", 0.5)
    model = load(checkpoint)[0].eval()
    rows = [sft.encode({"prompt": r["question"], "completion": r["answer"]}, tiny(), args) for r in PROBLEMS]
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


def test_rollouts_keep_distinct_right_answers(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?", "answer": "4"}\n')
    args = get_args(["--model", str(checkpoint), "--data", "rollouts", "--prompts", str(path), "--out", str(tmp_path / "o"),
                     "--samples", "4"])  # fmt: skip
    seen = {}

    def answers(model, tokenizer, chats, args, *, samples, temperature, seed):
        seen.update(samples=samples, temperature=temperature, chats=chats)
        return [["2", "3", "2", "<think>1 + 1</think>2"], ["5", "6", "<think>4", "22"]]

    monkeypatch.setattr(sft, "answer", answers)
    loop = loop_module.Loop(args, "sft")
    texts = [tiny().decode([i for i, m in zip(*row, strict=True) if m][:-1]) for row in sft.rollouts(None, tiny(), args, loop)]
    assert sorted(texts) == ["2", "<think>1 + 1</think>2"]
    assert seen["samples"] == 4 and seen["temperature"] == 1.0
    monkeypatch.setattr(sft, "answer", lambda *_, **__: [["5"] * 4] * 2)
    with pytest.raises(UserError, match="not one sample is right"):
        sft.rollouts(None, tiny(), args, loop)


def test_self_instruct_keeps_what_is_new(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"prompt": "sort 1 2 3 4 5 6"}\n{"prompt": "what is the pet of Ada"}\n')
    args = get_args(["--model", str(checkpoint), "--data", "self-instruct", "--prompts", str(path), "--out",
                     str(tmp_path / "out")])  # fmt: skip
    written = ["sort 1 2 3 4 5 7\n", "reverse cat dog sun\nmore", "reverse cat dog sun now\n", "never ended", "\n"]
    found = Namespace(completions=[[*tiny().encode(text), tiny().eos_ids[0]] for text in written])
    monkeypatch.setattr(sft, "generate", lambda *_, **__: found)
    monkeypatch.setattr(sft, "answer", lambda model, tokenizer, chats, args, **_: [["sun dog cat"] for _ in chats])
    (row,) = sft.self_instruct(None, tiny(), args, loop_module.Loop(args, "sft"))
    (line,) = (tmp_path / "out" / "self_instruct.jsonl").read_text().splitlines()
    assert [message["content"] for message in json.loads(line)["messages"]] == ["reverse cat dog sun", "sun dog cat"]
    assert row == chat.render(json.loads(line)["messages"], tiny())


def test_accuracy_is_counted_by_part(monkeypatch):
    """Parts with more than one right answer are shown and do not count for the primary metric."""
    rows = [{"messages": [{"role": "user", "content": str(i)}], "part": part, "answer": "7"}
            for i, part in enumerate(("sort", "sort", "facts", "sums", "unseen pairs"))]  # fmt: skip
    said = [["7"], ["8"], ["<think>3 + 4 = 7.</think>7"], ["7"], ["6"]]
    monkeypatch.setattr(sft, "answer", lambda *_, **__: said)
    args = get_args(["--steps", "1"])
    loop = loop_module.Loop(args, "sft")
    found = sft.evaluate(small(), tiny(), {"questions": rows}, args, loop)
    assert found == {"exact match": [1.0, 0.0, 1.0], "sort": [1.0, 0.0], "facts": [1.0], "sums": [1.0], "unseen pairs": [0.0]}


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
    config = Config(family="qwen2", vocab_size=vocab_size, depth=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn_width=32,
                    max_length=256, qkv_bias=True, tied=True)  # fmt: skip
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
    assert (base.too_long, tuned.too_long) == ("split", "refuse")
    assert get_args(["--lr", "0.5"]).lr == 0.5


def test_rows_without_an_answer_left_are_refused(checkpoint, problems, tmp_path):
    with pytest.raises(UserError, match="no row is left"):
        run(checkpoint, problems, tmp_path / "out", "--max-length", 12, "--too-long", "cut")


@pytest.mark.parametrize(("flags", "said"), [
    (("--optimizer", "lomo", "--grad-clip", "1"), "--optimizer lomo"),
    (("--optimizer", "lomo", "--grad-clip", "0", "--batch-size", "8", "--micro-batch-size", "4"), "--optimizer lomo"),
    (("--neftune", "5", "--parallel", "fsdp"), "--neftune"),
    (("--select", "ifd"), "--select ifd"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(list(flags))


def test_a_context_that_the_model_lacks_is_refused(checkpoint, problems, tmp_path):
    with pytest.raises(UserError, match="--max-length 161"):
        run(checkpoint, problems, tmp_path / "out", "--max-length", 161)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_what_was_cut_is_counted_out_loud(checkpoint, problems, tmp_path, capsys):
    run(checkpoint, problems, tmp_path / "out", "--steps", 1, "--max-length", 36, "--too-long", "cut")
    assert "--max-length 36: 8 rows cut" in capsys.readouterr().err


def test_domain_text_continues_pre_training(checkpoint, tmp_path):
    path = tmp_path / "domain.jsonl"
    path.write_text("".join(json.dumps({"text": f"The mill of town {i} grinds corn. " * 12}) + "\n" for i in range(8)))
    result = main(get_args(["--stage", "base", "--model", str(checkpoint), "--data", str(path), "--out", str(tmp_path / "out"),
                            "--steps", "30", "--lr", "1e-2", "--max-length", "64", "--batch-size", "4"]))  # fmt: skip
    assert result["after"] < result["before"] / 3 and result["variant"] == "domain"


@pytest.mark.slow
def test_the_whole_path_from_nothing(tmp_path, monkeypatch):
    """A short base run and a short SFT of it: the parts of `python sft.py`, and its baseline."""
    monkeypatch.setattr(loop_module, "ROOT", tmp_path)
    base = main(get_args(["--stage", "base", "--steps", "300", "--out", str(tmp_path / "out" / "base")]))
    assert base["metric"] == "cloze" and base["after"] > 0.05 > base["before"]
    monkeypatch.setattr(loop_module.Loop, "require", lambda self, stage: tmp_path / "out" / stage / "checkpoint")
    tuned = main(get_args(["--steps", "200"]))
    assert tuned["n"] >= 500 and tuned["before"] <= 0.05 and tuned["after"] > 0.1
    assert tuned["after"] > tuned["baselines"]["the same SFT of random weights"]
    assert (tmp_path / "out" / "sft" / "curve.svg").exists()
