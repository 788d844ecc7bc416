"""Facts about reward.py: losses, where a reward is read, feedback of every kind, whole runs, bad input."""

import copy
import itertools
import json
import math
import random
import statistics
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loop as loop_module
import reward
from data import chat, formats, manners, world
from data.chat import Row
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop, learning_rate
from model import Config, Transformer, load, save
from reward import (
    Example,
    all_pairs,
    binary,
    bradley_terry,
    calibration,
    collate,
    encode,
    epic_distance,
    fit,
    get_args,
    losses_of,
    main,
    pearson,
    plackett_luce,
    process,
    rewards_of,
    running_rewards,
    with_scalar_head,
)  # fmt: skip
from tests.oracle import oracle
from tests.test_loop import on_two_ranks

CPU = torch.device("cpu")


def small(vocab_size: int = 32, *, seed: int = 0, max_length: int = 160) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(Config.from_depth(1, vocab_size, max_length))


def scalar(vocab_size: int = 32) -> Transformer:
    return with_scalar_head(small(vocab_size)).double()


def ragged(lengths=(3, 40, 2, 17, 9, 29, 5, 12), seed: int = 0) -> list[Row]:
    """Rows whose answers hold every id, also 0, and of which the answer ends before the row does."""
    rng, rows = random.Random(seed), []
    for n in lengths:
        first, last = sorted(rng.sample(range(1, n + 1), 2)) if n > 2 else (1, 2)
        rows.append(Row([rng.randrange(4) for _ in range(n)], [int(first <= i < last) for i in range(n)]))
    return rows


def brute_force(model: Transformer, row: Row) -> Tensor:
    """The reward of one row, which is read no further than its answer."""
    last = max(i for i, said in enumerate(row.completion_mask) if said)
    return model(torch.tensor([row.input_ids[: last + 1]]))[0, -1, 0]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ----------------------------------------------------------------------------------------------------------------------
# The objective


def test_a_scalar_head_is_new_and_the_body_a_copy():
    model = small(300)
    before = copy.deepcopy(model.state_dict())
    new = with_scalar_head(model)
    assert new.config.labels == 1 and not new.config.tied and new.head.weight.shape == (1, 32)
    own, theirs = new.state_dict(), model.state_dict()
    assert own.keys() == theirs.keys()
    for name in own.keys() - {"head.weight"}:
        assert torch.equal(own[name], theirs[name]) and own[name].data_ptr() != theirs[name].data_ptr()
    assert all(torch.equal(before[name], theirs[name]) for name in before)
    assert with_scalar_head(model.bfloat16()).head.weight.dtype == torch.bfloat16
    model.requires_grad_(False).config = replace(model.config, quantization={"bits": 4})  # the copy is to learn
    with pytest.raises(UserError, match="--model: its matrices are quantized"):
        with_scalar_head(model)


def test_rewards_begin_small():
    """R9: a normed state has size sqrt(width); times 1 / sqrt(width + 1) the first rewards are about 1 in size."""
    heads = torch.stack([with_scalar_head(small(8, seed=seed)).head.weight for seed in range(40)])
    assert heads.std().item() == pytest.approx(33**-0.5, rel=0.05) and abs(heads.mean().item()) < 0.02


def test_a_reward_is_read_at_the_last_token_of_the_answer():
    """R2, R8: not at the first or last pad, which is an id like others, nor a mean; row by row it is the same."""
    model, rows = scalar(), ragged()
    batch = collate([Example([row]) for row in rows], CPU)
    found = rewards_of(model, batch.input_ids, batch.completion_mask)
    torch.testing.assert_close(found, torch.stack([brute_force(model, row) for row in rows]))
    assert found.std() > 0.1


def test_a_reward_knows_nothing_of_what_follows_the_answer():
    model, rows = scalar(), ragged()
    batch = collate([Example([row]) for row in rows], CPU, multiple_of=64)
    found = rewards_of(model, batch.input_ids, batch.completion_mask)
    changed = batch.input_ids.clone()
    for b, row in enumerate(rows):
        last = max(i for i, said in enumerate(row.completion_mask) if said)
        changed[b, last + 1 :] = 31
    assert torch.equal(found, rewards_of(model, changed, batch.completion_mask))
    torch.testing.assert_close(running_rewards(model, batch.input_ids), model(batch.input_ids)[..., 0])


def test_a_rollout_and_a_chat_have_the_same_reward():
    """[prompt][completion with its end] is worth what the rendered chat is, with its line break after the end."""
    tokenizer, model = tiny(), scalar(tiny().vocab_size)
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
    ids, mask = chat.render(said, tokenizer)
    assert mask[-1] == 0
    rendered = rewards_of(model, torch.tensor([ids]), torch.tensor([mask]))
    (row,) = encode("Hello", ["Hi there."], tokenizer)
    assert row.input_ids == ids[: len(row.input_ids)] and row.input_ids[-1] in tokenizer.eos_ids
    rollout = rewards_of(model, torch.tensor([row.input_ids]), torch.tensor([row.completion_mask]))
    torch.testing.assert_close(rendered, rollout)


def test_bradley_terry_term_by_term():
    first, second, confidence = numbers(7), numbers(7, seed=1), torch.rand(7, dtype=torch.float64)
    for margin, centre in itertools.product((0.0, 0.7), (0.0, 0.3)):
        found = bradley_terry(first, second, confidence, margin, centre)
        for a, b, c, loss in zip(first.tolist(), second.tolist(), confidence.tolist(), found.tolist(), strict=True):
            won, lost = (math.log(1 + math.exp(margin + x)) for x in (b - a, a - b))
            assert loss == pytest.approx(c * won + (1 - c) * lost + centre * (a + b) ** 2)


def test_bradley_terry_at_points_that_are_known():
    """R3. Equal rewards: ln 2, and a step raises the first. Label c: least where sigmoid(first - second) = c."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, b = zero.clone().requires_grad_(), zero.clone().requires_grad_()
    loss = bradley_terry(a, b, one, 0.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12) and a.grad.item() == -0.5 and b.grad.item() == 0.5
    d = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    bradley_terry(d, zero, 0.8 * one, 0.0, 0.0).backward()
    assert d.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_a_margin_is_asked_of_the_winner_whichever_that_is():
    """Exchanged answers with the opposite label cost the same, and a tie is not moved."""
    x, y, c = numbers(5), numbers(5, seed=1), torch.rand(5, dtype=torch.float64)
    for margin in (0.0, 0.7):
        torch.testing.assert_close(bradley_terry(x, y, c, margin, 0.1), bradley_terry(y, x, 1 - c, margin, 0.1))
        d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        bradley_terry(d, torch.zeros_like(d), torch.full_like(d, 0.5), margin, 0.0).backward()
        assert d.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize("margin, centre", [(0.0, None), (0.4, None), (0.4, 0.05)])
def test_the_loss_is_that_of_trl(margin, centre):
    trl, rewards = oracle("trl"), [numbers(10), numbers(10)]

    class Stub:
        training = True

        def __init__(self, logits):
            self.logits = logits

        def __call__(self, **_):
            return Namespace(logits=self.logits[:, None])

    trainer = Namespace(
        model=Stub(None), args=Namespace(center_rewards_coefficient=centre), _total_train_tokens=0, _tp_size=1,
        accelerator=Namespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": dict.fromkeys(("num_tokens",)) | {name: [] for name in (
            "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(10, 2), "margin": torch.full((5,), margin, dtype=torch.float64)}
    theirs = trl.RewardTrainer.compute_loss(trainer, Stub(rewards[0]), inputs)
    first, second = rewards[1].chunk(2)
    ours = bradley_terry(first, second, torch.ones(5, dtype=torch.float64), margin, centre or 0.0).mean()
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rewards[0].grad, rewards[1].grad)


def test_binary_is_the_cross_entropy_of_the_sigmoid():
    rewards, good = numbers(5), torch.tensor([1, 0, 1, 0, 0])
    for r, g, loss in zip(rewards.tolist(), good.tolist(), binary(rewards, good).tolist(), strict=True):
        assert loss == pytest.approx(-math.log(sigmoid(r) if g else 1 - sigmoid(r)))


def test_plackett_luce_is_a_distribution_over_orders():
    """P of all orders of K answers adds up to 1, each is a product of choices, and of two it is Bradley-Terry."""
    rewards = numbers(4)
    total = 0.0
    for order in itertools.permutations(range(4)):
        loss = plackett_luce(rewards[list(order)][None], torch.ones(1, 4, dtype=torch.bool)).item()
        wanted, left = 1.0, [math.exp(rewards[i].item()) for i in order]
        while left:
            wanted, left = wanted * left[0] / sum(left), left[1:]
        assert math.exp(-loss) == pytest.approx(wanted)
        total += math.exp(-loss)
    assert total == pytest.approx(1.0)
    a, b = numbers(6), numbers(6, seed=1)
    both = plackett_luce(torch.stack([a, b], 1), torch.ones(6, 2, dtype=torch.bool))
    torch.testing.assert_close(both, bradley_terry(a, b, torch.ones_like(a), 0.0, 0.0))


def test_plackett_luce_of_unequal_lists():
    """Places without an answer win and lose nothing, whatever stands in them, and get no gradient."""
    rewards, answers = numbers(3, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    rewards.data[~answers] = 1e6
    found = plackett_luce(rewards, answers)
    for row, there, loss in zip(rewards, answers, found, strict=True):
        alone = plackett_luce(row[None, : there.sum()], there[None, : there.sum()])[0]
        assert loss.item() == pytest.approx(alone.item())
    (grad,) = torch.autograd.grad(found.sum(), rewards)
    assert grad.isfinite().all() and (grad[~answers] == 0).all() and (grad[:, 0] < 0).all()
    narrow = rewards.detach().float().masked_fill(~answers, -1e6).requires_grad_()
    (again,) = torch.autograd.grad(plackett_luce(narrow, answers).sum(), narrow)
    torch.testing.assert_close(again.double(), grad, rtol=1e-4, atol=1e-5)


def test_all_pairs_of_a_list_count_alike():
    """By brute force, of lists of 5, 3 and 2; what stands in places without an answer is not read."""
    rewards, answers = numbers(3, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    rewards.data[~answers] = math.nan
    found = all_pairs(rewards, answers)
    for row, n, loss in zip(rewards.tolist(), (5, 3, 2), found.tolist(), strict=True):
        pairs = itertools.combinations(row[:n], 2)
        assert loss == pytest.approx(statistics.fmean(-math.log(sigmoid(better - worse)) for better, worse in pairs))
    (grad,) = torch.autograd.grad(found.sum(), rewards)
    assert (grad[~answers] == 0).all() and (grad[:, 0] < 0).all() and grad[0, -1] > 0
    a, b = numbers(6), numbers(6, seed=1)
    both = all_pairs(torch.stack([a, b], 1), torch.ones(6, 2, dtype=torch.bool))
    torch.testing.assert_close(both, bradley_terry(a, b, torch.ones_like(a), 0.0, 0.0))


def test_a_process_reward_is_judged_at_the_ends_of_steps_alone():
    rewards, steps = numbers(2, 6), torch.tensor([[-1, 1, -1, 0, -1, -1], [-1, -1, 0, -1, -1, 1]])
    rewards.data[steps < 0] = math.nan
    found = process(rewards, steps)
    wanted = [binary(rewards[b, t][None], steps[b, t][None]).item() for b, t in ((0, 1), (0, 3), (1, 2), (1, 5))]
    assert found.tolist() == pytest.approx(wanted)
    (grad,) = torch.autograd.grad(found.sum(), rewards)
    assert (grad[steps < 0] == 0).all() and (grad[steps == 1] < 0).all() and (grad[steps == 0] > 0).all()


def test_pearson_is_the_correlation():
    x, y = numbers(3, 7).detach(), numbers(3, 7, seed=1).detach() + 3
    wanted = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
    assert pearson(x, y) == pytest.approx(wanted) and pearson(x, 2 - 3 * x) == pytest.approx(-1)
    assert pearson(x, torch.ones(3, 7)) == 0


def test_epic_is_blind_to_what_changes_no_policy():
    """A scale, and anything added to all answers of a prompt; the opposite is at 1, half way is sqrt(1/2)."""
    r, other = numbers(50, 8).detach(), numbers(50, 8, seed=1).detach()
    shaped = 3 * r + 100 * numbers(50, 1, seed=2).detach()
    assert epic_distance(r, shaped) == pytest.approx(0, abs=1e-6) and epic_distance(r, -shaped) == pytest.approx(1)
    a, b = (x - x.mean(1, keepdim=True) for x in (r, other))
    rho = ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()
    assert epic_distance(r, other) == pytest.approx(math.sqrt((1 - rho) / 2))
    assert epic_distance(shaped, other) == pytest.approx(epic_distance(r, other))


ARGS = Namespace(feedback="comparison", label_smoothing=0.0, margin=0.0, centre=0.0)


def some_examples(feedback: str) -> list[Example]:
    """Examples of unequal lengths."""
    rows = ragged((3, 40, 2, 17, 9, 29, 5, 12, 8, 33, 21, 4, 6, 31))
    if feedback == "comparison":
        return [
            Example(rows[i : i + 2], label) for i, label in zip(range(0, 14, 2), (1, 1, 0.7, 1, 0.5, 1, 1), strict=True)
        ]
    if feedback == "binary":
        return [Example([row], float(i % 3 == 0)) for i, row in enumerate(rows)]
    if feedback == "rank":
        return [Example(rows[:4]), Example(rows[4:6]), Example(rows[6:9]), Example(rows[9:14])]
    return [
        Example([row], steps=[(t, t % 2 == 0) for t in range(i % 2, len(row.input_ids), 3)])
        for i, row in enumerate(rows)
    ]


def brute_losses(model: Transformer, examples: list[Example], args: Namespace) -> list[float]:
    """The loss of each example or step, from rewards of rows alone."""
    losses = []
    for example in examples:
        if args.feedback == "steps":
            for t, right in example.steps:
                r = model(torch.tensor([example.rows[0].input_ids[: t + 1]]))[0, -1, 0].item()
                losses.append(-math.log(sigmoid(r if right else -r)))
            continue
        r = [brute_force(model, row).item() for row in example.rows]
        label = example.label * (1 - args.label_smoothing) + (1 - example.label) * args.label_smoothing
        if args.feedback == "rank" and args.rank_loss == "pairwise":
            pairs = itertools.combinations(r, 2)
            losses.append(statistics.fmean(-math.log(sigmoid(better - worse)) for better, worse in pairs))
            continue
        if args.feedback == "rank":
            losses.append(sum(math.log(sum(map(math.exp, r[k:]))) - r[k] for k in range(len(r))))
            continue
        pair = args.feedback == "comparison"
        z, margin = (r[0] - r[1], args.margin) if pair else (r[0], 0.0)
        centre = args.centre * (r[0] + r[1]) ** 2 if pair else 0.0
        won, lost = (-math.log(sigmoid(x - margin)) for x in (z, -z))
        losses.append(label * won + (1 - label) * lost + centre)
    return losses


@pytest.mark.parametrize("feedback", ["comparison", "binary", "rank", "rank pairwise", "steps"])
def test_losses_of_a_batch_are_those_of_its_rows_alone(feedback):
    feedback, _, rank_loss = feedback.partition(" ")
    model, examples = scalar(), some_examples(feedback)
    args = Namespace(feedback=feedback, label_smoothing=0.1, margin=0.2, centre=0.05, rank_loss=rank_loss or "listwise")
    batch = collate(examples, CPU, multiple_of=8)
    losses, margins = losses_of(model, batch, args)
    assert len(losses) == len(margins) == batch.n
    torch.testing.assert_close(losses.tolist(), brute_losses(model, examples, args), rtol=1e-6, atol=1e-6)
    if feedback in ("comparison", "rank"):
        first, second = zip(*([brute_force(model, row) for row in e.rows[:2]] for e in examples), strict=True)
        torch.testing.assert_close(margins, torch.stack(first) - torch.stack(second))
    nothing, _ = losses_of(model, collate([], CPU), args)  # of a rank without rows
    nothing.sum().backward()
    assert nothing.shape == (0,) and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_margins_say_whether_the_feedback_is_met():
    model = scalar()
    for feedback in ("binary", "steps"):
        args = Namespace(feedback=feedback, label_smoothing=0.2, margin=0.0, centre=0.0)
        examples = some_examples(feedback)
        losses, margins = losses_of(model, collate(examples, CPU), args)
        assert ((losses < math.log(2)) == (margins > 0)).all() and 0 < (margins > 0).sum() < len(margins)
        args.label_smoothing = 0.0  # it makes labels less sure, not rewards
        assert torch.equal(losses_of(model, collate(examples, CPU), args)[1], margins)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints with a scalar head

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_of_transformers_gives_the_same_scores_here_and_goes_back(family, tied, tmp_path):
    transformers = oracle("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, num_labels=1, pad_token_id=299,
        tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs", labels=1)
    ids, mask = torch.randint(299, (3, 40)), torch.zeros(3, 40, dtype=torch.long)
    for b, n in enumerate((40, 7, 23)):
        ids[b, n:], mask[b, n // 2 : n] = 299, 1
    wanted = theirs(ids).logits[:, 0]
    torch.testing.assert_close(rewards_of(ours, ids, mask), wanted, atol=1e-4, rtol=1e-4)
    save(ours, None, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["architectures"] == [f"{family.capitalize()}ForSequenceClassification"]
    assert saved["id2label"] == {"0": "LABEL_0"} and saved["label2id"] == {"LABEL_0": 0}
    back, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, pad_token_id=299)  # fmt: skip
    assert not any(info.values()), info
    torch.testing.assert_close(back.eval()(ids).logits[:, 0], wanted)


def test_a_run_leaves_a_model_that_transformers_loads(checkpoint, preferences, tmp_path):
    run(checkpoint, preferences, tmp_path / "out", "--steps", 1)
    transformers = oracle("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint").eval()
    assert theirs.config.num_labels == 1
    ours, tokenizer = load(tmp_path / "out" / "checkpoint", labels=1)
    rows = encode("Hello", ["Hi.", "What do you want from me?"], tokenizer)
    batch = collate([Example(rows)], CPU)
    for row, wanted in zip(rows, rewards_of(ours, batch.input_ids, batch.completion_mask), strict=True):
        torch.testing.assert_close(theirs(torch.tensor([row.input_ids])).logits[0, 0], wanted, atol=1e-5, rtol=1e-5)
    assert tokenizer.pad_id in tokenizer.eos_ids  # there, padding that ends answers would hide their ends
    with pytest.raises(ValueError, match="no padding token is defined"):
        theirs(batch.input_ids)
    other = replace(tokenizer, pad_id=1023)
    save(ours, other, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["pad_token_id"] == 1023


def test_models_of_the_other_kind_are_refused(tmp_path):
    save(small(), None, tmp_path / "lm")
    save(with_scalar_head(small()), None, tmp_path / "rm")
    assert load(tmp_path / "rm", labels=1)[0].config.labels == 1
    with pytest.raises(UserError, match="found a language model, expected a model with 1 labels"):
        load(tmp_path / "lm", labels=1)
    with pytest.raises(UserError, match="found a model with 1 labels, expected a language model"):
        load(tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    for changes, n in (({"id2label": None}, 2), ({"id2label": {str(i): "x" for i in range(5)}}, 5),
                       ({"id2label": None, "num_labels": 3}, 3)):  # fmt: skip
        (tmp_path / "rm" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=f"found a model with {n} labels"):
            load(tmp_path / "rm")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_answers_share_their_prompt_and_the_mask_is_on_them_alone():
    """R6, in several turns: what the assistant said before is prompt; a reply of messages is reply from its first."""
    tokenizer = tiny()
    prompt = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Go on"},
    ]
    longer = [
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": "Why"},
        {"role": "assistant", "content": "So"},
    ]
    rows = encode(prompt, ["Yes.", longer], tokenizer)
    start = chat.render(prompt, tokenizer, add_generation_prompt=True).input_ids
    for row, said in zip(rows, (["Yes."], ["No", "So"]), strict=True):
        assert row.input_ids[: len(start)] == start and not any(row.completion_mask[: len(start)])
        trained = [i for i, m in zip(*row, strict=True) if m]
        assert tokenizer.decode(trained, skip_special=True) == "".join(said) and trained[-1] in tokenizer.eos_ids
        assert row.completion_mask[-1] == 1 and len(row.input_ids) == len(row.completion_mask)
    other = encode("Hello", ["Hi"], tokenizer.with_chat_format("qwen2"))[0]
    assert "system" in tokenizer.decode(other.input_ids) and other.completion_mask[-1] == 1


def test_steps_end_at_the_last_token_of_each():
    row = {"prompt": "Add.", "completions": ["4 + 9 = 13.", "13 + 6 = 19.", "So 19"], "labels": [True, False, True]}
    tokenizer = tiny()
    example = reward.file_example(row, tokenizer, Namespace(feedback="steps"))
    ids = example.rows[0].input_ids
    texts = [tokenizer.decode(ids[: end + 1]) for end, _ in example.steps]
    assert [text.rsplit("assistant\n")[1] for text in texts] == [
        "4 + 9 = 13.", "4 + 9 = 13.\n13 + 6 = 19.", "4 + 9 = 13.\n13 + 6 = 19.\nSo 19<|im_end|>"]  # fmt: skip
    assert [right for _, right in example.steps] == row["labels"] and example.steps[-1][0] == len(ids) - 1


def pair(*lengths: int, prompt: int = 4, same: int = 0) -> Example:
    """Answers to one prompt of `prompt` tokens that are alike in their first `same` tokens."""
    rows = []
    for k, n in enumerate(lengths):
        ids = list(range(prompt)) + [50] * min(same, n) + [60 + k] * max(0, n - same)
        rows.append(Row(ids, [0] * prompt + [1] * n))
    return Example(rows)


def test_what_is_too_long_is_refused_dropped_or_cut_at_the_end_of_the_answers():
    examples = [pair(3, 5), pair(3, 9), pair(7, 9)]
    with pytest.raises(UserError, match=r"row 2 has 13 tokens, --max-length is 9"):
        list(fit(examples, 9, "refuse", Counter()))
    with pytest.raises(UserError, match=r"row 3 has 10 tokens"):
        list(fit([pair(3, 5), pair(4, 5), pair(3, 6)], 9, "refuse", Counter()))
    assert list(fit(examples, 13, "refuse", Counter())) == examples
    counts = Counter()
    assert list(fit(examples, 9, "drop", counts)) == examples[:1] and counts == {"too long, dropped": 2}
    counts = Counter()
    cut = list(fit(examples, 9, "cut", counts))
    assert counts == {"too long, cut": 2}
    assert [[len(row.input_ids) for row in e.rows] for e in cut] == [[7, 9], [7, 9], [9, 9]]
    for example in cut:
        for row in example.rows:
            assert row.input_ids[:4] == [0, 1, 2, 3] and row.completion_mask == [0] * 4 + [1] * (len(row.input_ids) - 4)


def test_pairs_that_are_the_same_after_cutting_are_dropped_and_counted():
    """R5. Also where the prompt alone fills the row, and of a list where any two are the same."""
    counts = Counter()
    examples = [pair(9, 9, same=5), pair(9, 9, same=4), pair(5, 5, same=5), pair(2, 3, prompt=9), pair(6, 3, 6, same=5)]
    assert [len(e.rows[0].input_ids) for e in fit(examples, 9, "cut", counts)] == [9]
    assert counts["dropped: its answers are the same"] == 3 and counts["dropped: nothing of an answer is left"] == 1
    steps = Example(pair(8).rows, steps=[(6, True), (9, False), (11, True)])
    (kept,) = fit([steps], 10, "cut", Counter())
    assert kept.steps == ((6, True), (9, False)) and list(fit([steps], 6, "cut", Counter())) == []
    assert next(fit([Example(pair(1, 2).rows, 0.7)], 9, "cut", Counter())).label == 0.7


def test_collate_puts_the_answers_of_an_example_one_after_the_other():
    rows = [Row([7, 8, 9], [0, 1, 1]), Row([7, 6], [0, 1]), Row([1, 2, 3, 4], [0, 0, 0, 1])]
    batch = collate([Example(rows[:2], 0.8), Example(rows[2:], steps=[(2, True), (3, False)])], CPU, multiple_of=3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 0, 0, 0], [7, 6, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0], [0] * 6]
    assert batch.completion_mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    assert batch.answers.tolist() == [[True, True], [True, False]] and batch.n == 3
    assert batch.labels.tolist() == pytest.approx([0.8, 1.0])
    assert batch.steps.tolist() == [[-1] * 6, [-1] * 6, [-1, -1, 1, 0, -1, -1], [-1] * 6]
    empty = collate([], CPU)
    assert empty.input_ids.shape == (2, 1) and not empty.answers.any() and empty.n == 0


def feedback_of_the_world(feedback: str, n: int) -> tuple[list[dict], list[Example]]:
    args = get_args(["--feedback", feedback, "--pairs", str(n)])
    return list(manners.preferences(n, 0)), list(reward.world_examples(args, tiny()))


def said(row: Row) -> str:
    return chat.completion_text([i for i, m in zip(*row, strict=True) if m], tiny())


def test_comparisons_of_the_world_are_the_annotators():
    rows, examples = feedback_of_the_world("comparison", 20)
    assert [[said(row) for row in e.rows] for e in examples] == [[row["chosen"], row["rejected"]] for row in rows]
    assert all(row["prompt"] in tiny().decode(e.rows[0].input_ids) for row, e in zip(rows, examples, strict=True))


def test_good_is_a_coin_of_the_utility():
    rows, examples = feedback_of_the_world("binary", 1200)
    groups: dict[int, list[tuple[float, float]]] = {}
    for row, e in zip(rows, examples, strict=True):
        assert said(e.rows[0]) in (row["chosen"], row["rejected"]) and len(e.rows) == 1
        p = sigmoid(manners.utility(said(e.rows[0]), row["asker"], row["name"]))
        groups.setdefault(round(4 * p), []).append((p, e.label))
    for group in groups.values():
        p, label = (sum(x) / len(group) for x in zip(*group, strict=True))
        assert label == pytest.approx(p, abs=3.5 * math.sqrt(0.25 / len(group)))
    assert len(groups) > 3


def test_four_answers_are_in_the_order_of_plackett_and_luce():
    rows, examples = feedback_of_the_world("rank", 800)
    wanted = found = 0.0
    for row, e in zip(rows, examples, strict=True):
        texts = [said(r) for r in e.rows]
        assert len(set(texts)) == 4 and {row["chosen"], row["rejected"]} <= set(texts)
        worth = [math.exp(manners.utility(text, row["asker"], row["name"])) for text in texts]
        wanted, found = wanted + max(worth) / sum(worth), found + (worth[0] == max(worth)) / worth.count(max(worth))
    assert found / 800 == pytest.approx(wanted / 800, abs=0.05)


def test_the_noise_of_an_order_is_that_of_the_answer_wherever_it_runs():
    """Not of the place that the answer has in a set, which is another in every process."""
    rows, examples = feedback_of_the_world("rank", 12)
    for i, (row, e) in enumerate(zip(rows, examples, strict=True)):
        rng, answers = world.rng_for("feedback", 0, i), {row["chosen"], row["rejected"]}
        while len(answers) < 4:
            answers.add(manners.draw_answer(rng, row["asker"], row["name"]))
        worth = {a: manners.utility(a, row["asker"], row["name"]) - math.log(-math.log(rng.random()))
                 for a in sorted(answers)}  # fmt: skip
        assert [said(r) for r in e.rows] == sorted(worth, key=worth.get, reverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# AI feedback


def a_loop(tmp_path, *flags: str) -> tuple[Namespace, Loop]:
    args = get_args(["--out", str(tmp_path / "out"), "--device", "cpu", *flags])
    return args, Loop(args, "reward")


def test_odds_are_of_the_first_token_after_each_prompt(tmp_path):
    model, tokenizer = small(tiny().vocab_size).eval(), tiny()
    _, loop = a_loop(tmp_path)
    prompts = [chat.prompt_ids(text, tokenizer) for text in ("Is it?", "Hello", "What is 3 + 4? Is it more than 5?")]
    yes, no = tokenizer.encode("yes")[0], tokenizer.encode("no")[0]
    wanted = [model(torch.tensor([ids]))[0, -1].log_softmax(-1) for ids in prompts]
    found = reward.odds(model, tokenizer, prompts, ("yes", "no"), 256, loop)
    torch.testing.assert_close(found, torch.stack([p[yes] - p[no] for p in wanted]).detach(), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as main has one around it: --dtype is of what the judge reads alone
        assert reward.odds(model, tokenizer, prompts, ("yes", "no"), 256, loop).equal(found)
    with pytest.raises(UserError, match="--max-new-tokens: 150 more are to be said, .* leaves room for 1[0-9][0-9]$"):
        reward.sampled(model, tokenizer, prompts, 150, 1, 1.0, 0)
    (short := small(tiny().vocab_size)).virtual = 100  # positions of a prefix
    with pytest.raises(UserError, match="leaves room for [0-9][0-9]$"):
        reward.sampled(short, tokenizer, prompts, 150, 1, 1.0, 0)
    assert (
        prompts[1]
        == chat.render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True).input_ids
    )


def test_a_judge_reads_so_many_questions_at_a_time_and_none_beyond_its_context(tmp_path, monkeypatch):
    """A --model of one's own --micro-batch-size of them, the tiny world's judge 256."""
    (_, loop), sizes = a_loop(tmp_path), []
    monkeypatch.setattr(reward, "collate", lambda rows, *how: sizes.append(len(rows)) or collate(rows, *how))
    model = small(tiny().vocab_size, max_length=40)
    prompts = [[1] * n for n in (40, 7, 9, 3, 5)]
    found = reward.odds(model, tiny(), prompts, ("yes", "no"), 2, loop)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(found, reward.odds(model, tiny(), prompts, ("yes", "no"), 5, loop))
    with pytest.raises(UserError, match="a question to the judge has 41 tokens: the judge reads at most 40"):
        reward.odds(model, tiny(), [*prompts, [1] * 41], ("yes", "no"), 2, loop)
    model.virtual = 1  # positions of a prefix
    with pytest.raises(UserError, match="has 40 tokens: the judge reads at most 39"):
        reward.odds(model, tiny(), prompts, ("yes", "no"), 2, loop)
    asked = []
    monkeypatch.setattr(reward, "odds", lambda model, tokenizer, prompts, words, at_once, loop: asked.append(at_once) or
                        torch.zeros(len(prompts)))  # fmt: skip
    for flags in (("--model", "x", "--micro-batch-size", "3"), ()):
        reward.opinions(model, tiny(), ["Hi!"], list(reward.CONSTITUTION), *a_loop(tmp_path, *flags))
    assert asked == [3, 256]


def knows_the_truth(requests: dict[str, tuple[str, str]]):
    """A stand-in for `odds` of the model "judge": answers the world's questions with what is true, sure by 3 nats."""

    def odds(model, tokenizer, prompts, words, at_once, loop):
        assert model == "judge"
        found = []
        for ids in prompts:
            text = tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0]
            name = next(name for name, asked in manners.QUESTIONS.items() if text.endswith(" " + asked))
            answer = text.removeprefix("Answer: ").removesuffix(manners.QUESTIONS[name]).strip()
            assert manners.judge_prompt(answer, name) == text and words == ("yes", "no")
            found.append(3.0 if manners.has(answer, name, *requests[answer]) else -3.0)
        return torch.tensor(found)

    return odds


def test_the_ai_label_is_the_weighted_difference_of_its_opinions(tmp_path, monkeypatch, capsys):
    rows = list(manners.preferences(60, 5))
    told = {row[side]: (row["asker"], row["name"]) for row in rows for side in ("chosen", "rejected")}
    monkeypatch.setattr(reward, "odds", knows_the_truth(told))
    monkeypatch.setattr(reward, "judge_of", lambda *_: "judge")
    rules = [["Does it greet?", 1.0], ["Is it rude?", -2.5], ["Does it thank?", 0.1]]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    args, loop = a_loop(tmp_path, "--labels", "ai", "--constitution", str(tmp_path / "rules.json"))
    labelled = reward.ai_labels(None, tiny(), rows, args, loop)
    agree = ties = judged = 0
    for row, made in zip(rows, labelled, strict=True):
        score = []
        for side in ("chosen", "rejected"):
            yes = [
                sigmoid(3.0 if manners.has(row[side], q, row["asker"], row["name"]) else -3.0)
                for q in ("greets", "rude", "thanks")
            ]
            score.append(yes[0] - 2.5 * yes[1] + 0.1 * yes[2])
        p = sigmoid(score[0] - score[1])
        assert made["confidence"] == pytest.approx(max(p, 1 - p), abs=1e-6)
        assert (made["chosen"], made["rejected"]) == ((row["chosen"], row["rejected"]) if p >= 0.5 else
                                                      (row["rejected"], row["chosen"]))  # fmt: skip
        tie = abs(p - 0.5) < 0.05
        ties += tie
        if not tie and row["utility_chosen"] != row["utility_rejected"]:
            judged += 1
            agree += (p > 0.5) == (row["utility_chosen"] > row["utility_rejected"])
    assert 0 < ties < 60 and 0.5 < agree / judged < 1
    text = capsys.readouterr().err
    assert (
        f"60 pairs, {ties / 60:.1%} tied" in text
        and f"{agree / judged:.1%} are in the order of the true utility" in text
    )
    again = formats.read_jsonl(tmp_path / "out" / "preferences.jsonl", "preference")
    kept = [row for row in labelled if row["confidence"] != 0.5]  # whoever reads the others would take them for certain
    assert again == [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in kept]
    assert 0 < len(kept) < 60 and f"\n{60 - len(kept)} pairs are exact ties: not written" in text
    example = reward.file_example(labelled[0], tiny(), args)
    assert example.label == labelled[0]["confidence"] and said(example.rows[0]) == labelled[0]["chosen"]
    (tmp_path / "rules.json").write_text('[["Is it rude?", -5000]]')  # e^5000 is no float
    assert {row["confidence"] for row in reward.ai_labels(None, tiny(), rows, args, loop)} == {0.5, 1.0}


@pytest.mark.parametrize("bias", [-2.0, 0.0, 5.0])
def test_a_judge_that_prefers_a_place_says_nothing(bias, tmp_path, monkeypatch, capsys):
    """Asked in both orders: equal answers get 1/2, the better one more, and nothing depends on which comes first."""
    seen = []

    def odds(model, tokenizer, prompts, words, at_once, loop):
        found = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            first, second = (text.split(f"Answer {x}: ")[1].split("\n\n")[0] for x in "AB")
            seen.append(text)
            found.append(bias + len(first) - len(second))
        assert words == ("A", "B") and at_once == 5
        return torch.tensor(found)

    monkeypatch.setattr(reward, "odds", odds)
    own = "" if bias else "chatml"  # --chat-format is for a judge that does not say
    monkeypatch.setattr(reward, "load", lambda path, **how: (None, replace(tiny(), chat_format=own)))
    args, loop = a_loop(tmp_path, "--labels", "ai", "--judge", "somewhere", "--chat-format", "qwen2.5",
                        "--micro-batch-size", "5")  # fmt: skip
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say something."}]
    rows = [
        {"prompt": prompt, "chosen": a, "rejected": b}
        for a, b in (("short", "longer"), ("longer", "short"), ("same", "size"))
    ]
    made = reward.ai_labels(None, None, rows, args, loop)
    p = (sigmoid(bias + 1) + 1 - sigmoid(bias - 1)) / 2
    assert [row["confidence"] for row in made] == pytest.approx([p, p, 0.5], abs=1e-6)
    assert [row["chosen"] for row in made[:2]] == ["longer", "longer"] and p > 0.5
    consistent = {-2.0: 0, 0.0: 2, 5.0: 0}[bias] / 3
    assert f"the same answer in both orders of {consistent:.1%}" in capsys.readouterr().err
    assert ("You are Qwen" in seen[0]) == (not own)
    assert "system: Be kind.\n\nuser: Say something." in seen[0] and "- Is it rude? -2" in seen[0]


def test_a_constitution_is_a_list_of_questions_and_weights(tmp_path):
    assert {text for text, _ in reward.CONSTITUTION} == set(manners.QUESTIONS.values())
    assert {text for text, weight in reward.CONSTITUTION if weight < 0} == {"Is it rude?"}
    path = tmp_path / "rules.json"
    for text in ("{", "[]", '["x"]', '[["x", "y"]]', "[[1, 2]]", '[["", 2]]', '[["x", 1e999]]', '{"a": 1}', "7"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"rules.json: expected"):
            reward.read_constitution(Namespace(constitution=str(path)))
    with pytest.raises(UserError, match="nowhere"):
        reward.read_constitution(Namespace(constitution="nowhere"))


def test_revision_drops_what_is_held_against_an_answer_and_adds_what_it_lacks(tmp_path, monkeypatch):
    """The judge knows the truth and the model writes one of everything: what is kept keeps the whole constitution."""
    tokenizer, (args, loop) = tiny(), a_loop(tmp_path, "--revise", "--pairs", "6")
    requests = [manners.draw_request(world.rng_for("revise", 0, i), "train") for i in range(6)]
    who = {request["prompt"]: (request["asker"], request["name"]) for request in requests}
    rng, turns = random.Random(0), []

    def sampled(model, tokenizer, prompts, new, samples, temperature, seed):
        turns.append(seed)
        found = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            asker, name = next(pair for prompt, pair in who.items() if prompt in text)
            fact = world.fact_sentence(rng, name, "job")
            others = (manners.THANKS[0], manners.FAREWELLS[0], manners.RUDE[0])
            more = [manners.GREETINGS[0].format(asker=asker) if text.endswith("assistant\n") else rng.choice(others)
                    for _ in range(samples)]  # fmt: skip
            more = [f"{manners.RUDE[1]} Blue is it."] if len(turns) == 1 else more
            found.append([tokenizer.encode(f"{first} {fact}") for first in more])
        return found

    def opinions(model, tokenizer, answers, rules, args, loop):
        """An answer names nobody but its own people, so that any request will do that makes it true."""
        assert model == "judge"
        return {a: [float(any(manners.has(a, q, *pair) for pair in who.values())) for q in manners.QUESTIONS]
                for a in answers}  # fmt: skip

    monkeypatch.setattr(reward, "sampled", sampled)
    monkeypatch.setattr(reward, "opinions", opinions)
    monkeypatch.setattr(reward, "judge_of", lambda *_: "judge")
    result = reward.revise("model", tokenizer, args, loop)
    assert result["metric"] == "answers that keep the constitution" and result["before"] == 0 and result["n"] == 6
    rows = formats.read_jsonl(tmp_path / "out" / "revised.jsonl", "chat")
    assert [row["messages"][0]["content"] for row in rows] == [request["prompt"] for request in requests]
    keeps = 0
    for row in rows:
        text, pair = row["messages"][1]["content"], who[row["messages"][0]["content"]]
        assert not manners.has(text, "rude", *pair) and manners.utility(text, *pair) > 0
        keeps += all(manners.has(text, q, *pair) == (q != "rude") for q in manners.QUESTIONS)
    assert result["after"] == keeps / 6 and result["after"] > 0.6 and len(turns) == len(set(turns)) == 9
    assert result["metrics"]["utility"]["after"] > result["metrics"]["utility"]["before"] + 2
    rule = result["metrics"]["rules kept: rude"]
    assert (rule["before"], rule["after"]) == (0.0, 1.0) and len(result["metrics"]) == 1 + len(manners.QUESTIONS)


def revised(tmp_path, monkeypatch, draft: str, additions: list[str], worth: dict[str, float]) -> list[str]:
    """What --revise writes for two requests, with the draft and the additions of a model, by a judge's one question.

    Nobody is asked the one of no weight.
    """
    (tmp_path / "rules.json").write_text('[["Does it greet?", 0], ["Does it tell a fact?", 1.0]]')
    args, loop = a_loop(tmp_path, "--revise", "--pairs", "2", "--constitution", str(tmp_path / "rules.json"))
    monkeypatch.setattr(reward, "judge_of", lambda *_: None)
    monkeypatch.setattr(reward, "sampled", lambda model, tokenizer, prompts, new, samples, *_: [
        [tokenizer.encode(text) for text in ([draft] if samples == 1 else additions)] for _ in prompts])  # fmt: skip
    monkeypatch.setattr(reward, "opinions", lambda model, tokenizer, answers, *_: {a: [worth.get(a, 0.0)]
                                                                                   for a in answers})  # fmt: skip
    result = reward.revise(None, tiny(), args, loop)
    assert set(result["metrics"]) == {"utility", "rules kept: facts"}
    rows = map(json.loads, (tmp_path / "out" / "revised.jsonl").read_text().splitlines())
    return [row["messages"][1]["content"] for row in rows]


@pytest.mark.parametrize(
    "worth, wanted",
    [
        ({"A.": 0.2, "A. B.": 0.9, "A. C.": 0.6}, ["A. B."] * 2),  # the best change, not the last that helps
        ({"A.": 0.2, "A. B.": 0.9, "A. C. B.": 1.0}, ["A. B."] * 2),  # one sentence of what is written, no more
        ({"A.": 0.2, "A. B.": 0.5, "C. A. B.": 0.8, "C. B.": 1.2}, ["C. B."] * 2),  # in its place; a sentence goes
        ({"A.": 0.2, "A. B.": 0.4}, []),  # too little to be sure of
        ({"A.": 0.2, "": 1.0}, []),  # an answer says something
    ],
)
def test_each_round_of_revision_makes_the_best_change(tmp_path, monkeypatch, worth, wanted):
    assert revised(tmp_path, monkeypatch, "A.", ["B. D.", "C. B.", "D."], worth) == wanted


@pytest.mark.parametrize("rules, found", [
    ('[["Does it greet?", 1], ["Is it good?", 1]]', "'Is it good[?]'"),
    ('[["Is it rude?", 0]]', "no question with a weight"), ('[["Is it good?", 0]]', "no question with a weight"),
])  # fmt: skip
def test_revision_by_what_the_world_cannot_check_is_refused(tmp_path, monkeypatch, rules, found):
    """All of no rules would be kept. It is said before anybody is asked."""
    monkeypatch.setattr(reward, "judge_of", lambda *_: pytest.fail("the judge is loaded"))
    (tmp_path / "rules.json").write_text(rules)
    args, loop = a_loop(tmp_path, "--revise", "--constitution", str(tmp_path / "rules.json"))
    with pytest.raises(UserError, match=rf"rules.json: found {found}; .*: Does it greet[?] Is it rude[?]"):
        reward.revise(None, tiny(), args, loop)


def test_the_tiny_worlds_judge_is_a_stage_of_its_own(tmp_path, monkeypatch):
    """A --model of one's own is asked itself."""
    other = small(tiny().vocab_size, seed=1)
    save(other, tiny(), tmp_path / "judge")
    asked = []
    monkeypatch.setattr(loop_module.Loop, "require", lambda loop, stage: asked.append(stage) or tmp_path / "judge")
    model = small(tiny().vocab_size)
    assert reward.judge_of(model, *a_loop(tmp_path, "--model", "x")) is model and not asked
    judge = reward.judge_of(model, *a_loop(tmp_path))
    assert asked == ["judge"] and not judge.training and torch.equal(judge.head.weight, other.head.weight)
    script, *flags = loop_module.STAGES["judge"][0].split()
    assert script == "sft.py" and {"out/sft/checkpoint", "judge=40"} <= set(flags)


# ----------------------------------------------------------------------------------------------------------------------
# Process supervision


def test_steps_are_labelled_by_where_their_endings_arrive(tmp_path, monkeypatch, capsys):
    args, loop = a_loop(tmp_path, "--feedback", "steps")
    tokenizer, calls = tiny(), []

    def sampled(model, tokenizer, prompts, new, samples, temperature, seed):
        calls.append((prompts, samples, temperature))
        if len(calls) == 1:  # of each problem one right answer and one that errs in its second step and recovers
            found = []
            for i in range(len(prompts)):
                a, b, *rest = world.draw_sum(world.rng_for("process", 0, "train", i), "train", 5)
                right = f"<think>{world.working([a, b, *rest])}</think>{sum([a, b, *rest])}"
                wrong = right.replace(f" {a + b} + ", f" {a + b + 1} + ")
                found.append(
                    [[*tokenizer.encode_with(x, chat.OF_ASSISTANT), tokenizer.eos_ids[0]] for x in (right, wrong)]
                )
            return found
        endings = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            total = sum(map(int, text.split("What is ")[1].split("?")[0].split(" + ")))
            good = text.count(".") == 2  # only from the end of the first step (the question has a full stop, too)
            ends = [f"</think>{total}" if good and k == 3 else "</think>0" for k in range(4)]
            endings.append([[*tokenizer.encode_with(x, chat.OF_ASSISTANT), tokenizer.eos_ids[0]] for x in ends])
        return endings

    monkeypatch.setattr(reward, "sampled", sampled)
    examples = reward.worked_sums(None, tokenizer, args, loop, "train", 3, 2)
    assert len(examples) == 6 and calls[0][2] == 1.0 and calls[1][1:] == (4, 1.0)
    assert len(calls[1][0]) == 3 * 7  # four steps each, of which the first is the same in both
    for e in examples:
        ids = e.rows[0].input_ids
        texts = [tokenizer.decode(ids[: end + 1]).split("assistant\n")[1] for end, _ in e.steps]
        assert len(texts) == 5 and all(text.endswith(".") for text in texts[:4]) and texts[4].endswith("<|im_end|>")
        assert [right for _, right in e.steps] == [True, False, False, False, True]
    err = capsys.readouterr().err  # 9 different beginnings of each problem: the first step is in both answers
    assert f"6 worked sums, {9 / 27:.1%} of 27 steps are right by 84 endings" in err
    assert f"say the same of {15 / 27:.1%}" in err


def test_the_checker_of_steps_wants_all_before_them_right(tmp_path, monkeypatch):
    args, loop = a_loop(tmp_path, "--feedback", "steps")
    tokenizer = tiny()
    numbers = world.draw_sum(world.rng_for("process", 0, "test", 0), "test", 5)
    right = f"<think>{world.working(numbers)}</think>{sum(numbers)}"
    second = right.split(". ")[1]
    texts = [right, right.replace(second, second + "1"), right + "1", right[: -len(str(sum(numbers)))]]
    ids = [[*tokenizer.encode_with(x, chat.OF_ASSISTANT), tokenizer.eos_ids[0]] for x in texts]
    ids.append(ids[0][:-3])  # ran out of room
    monkeypatch.setattr(reward, "sampled", lambda *_: [ids])
    found = [[ok for _, ok in e.steps] for e in reward.worked_sums(None, tokenizer, args, loop, "test", 1, 5)]
    t, f = True, False
    assert found == [[t] * 5, [t, f, f, f, f], [t, t, t, t, f], [t, t, t, t, f], found[4]] and found[4][-1] is f


def test_best_of_eight(tmp_path, monkeypatch):
    """By the least step, by the product, by the last; and what they are compared with."""
    args, loop = a_loop(tmp_path, "--feedback", "steps")
    tokenizer = tiny()
    row = [Row([5, *tokenizer.encode(text)], [0] + [1] * len(tokenizer.encode(text))) for text in ("7", "8")]
    t, f = True, False
    marks = [[t, t], [f, t], [t, f], [t, f, t], [f, t], [f, f], [f, f], [f, f]]
    rewards = [[0.5, 0.5], [-1.0, 3.0], [3.5, 0.1], [0.4, 0.4, 0.4]] + [[-2.0, -2.0]] * 4
    examples = [Example([row[not steps[-1]]], steps=list(enumerate(steps))) for steps in marks]
    test = {"examples": examples}
    monkeypatch.setattr(reward, "scores", lambda model, examples, args, loop: rewards)
    found = reward.evaluate(small(), tokenizer, test, args, loop)
    assert found["best of 8 by min"] == [1.0] and found["best of 8 by product"] == [0.0]
    assert found["best of 8 by last"] == [1.0]
    hits = [
        float((r > 0) == ok)
        for steps, some in zip(marks, rewards, strict=True)
        for r, ok in zip(some, steps, strict=True)
    ]
    assert found["step accuracy"] == hits
    assert reward.baselines(test, tokenizer, args) == {
        "every step is right": 7 / 17, "one sample": 4 / 8, "majority vote of 8": 1.0,
        "ceiling: any of 8": 1.0}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The measurement


@pytest.mark.parametrize("feedback", ["comparison", "steps"])
def test_scores_come_in_the_order_of_the_examples(feedback, tmp_path):
    model, examples = scalar().float(), some_examples(feedback)
    args, loop = a_loop(tmp_path, "--feedback", feedback, "--micro-batch-size", "3")
    found = reward.scores(model, examples, args, loop)
    for example, values in zip(examples, found, strict=True):
        if feedback == "steps":
            wanted = [
                model(torch.tensor([example.rows[0].input_ids[: t + 1]]))[0, -1, 0].item() for t, _ in example.steps
            ]
        else:
            wanted = [brute_force(model, row).item() for row in example.rows]
        assert values == pytest.approx(wanted, abs=1e-4)


def test_margins_of_every_kind():
    row = Row([1], [1])
    assert reward.margins_of(Example([row] * 3), [3.0, 1.0, 2.0]) == [2.0, 1.0, -1.0]  # all pairs of a list
    assert reward.margins_of(Example([row], 0.0), [0.5]) == [-0.5] and reward.margins_of(
        Example([row], 1.0), [0.5]
    ) == [0.5]
    assert reward.margins_of(Example([row], steps=[(0, True), (1, False)]), [0.5, 0.25]) == [0.5, -0.25]


def test_calibration_by_hand():
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    rows = calibration([logit(0.55), -logit(0.59), logit(0.72), logit(0.97), logit(0.999), -logit(0.95)])
    said, true, n = zip(*rows, strict=True)
    assert (
        said == pytest.approx((0.57, 0.72, (0.97 + 0.999 + 0.95) / 3)) and true == (0.5, 1.0, 2 / 3) and n == (2, 1, 3)
    )
    assert sum(n for _, _, n in calibration([0.1 * i for i in range(-99, 99)])) == 198
    assert calibration([100.0, 1.5]) == [(sigmoid(1.5), 1.0, 1), (1.0, 1.0, 1)]


def test_a_reward_that_is_the_utility_reaches_the_ceiling(tmp_path, monkeypatch):
    """Every number of the measurement, with the annotator's utility in the reward's place, and with its opposite."""
    args, loop = a_loop(tmp_path)
    _, test = reward.examples(args, small(), tiny(), loop)
    who = {}
    for row in test["pairs"]:
        who |= {(row["prompt"], row[side]): row[f"utility_{side}"] for side in ("chosen", "rejected")}
    for r in test["requests"]:
        who |= {(r["prompt"], answer): manners.utility(answer, r["asker"], r["name"]) for answer in r["answers"]}

    def utilities(sign: float):
        def scores(model, examples, args, loop):
            return [[sign * who[prompt_of(row), said(row)] + 0.5 for row in e.rows] for e in examples]

        return scores

    def prompt_of(row: Row) -> str:
        return tiny().decode(row.input_ids).split("user\n")[1].split("<|im_end|>")[0]

    monkeypatch.setattr(reward, "scores", utilities(1.0))
    found = reward.evaluate(small(), tiny(), test, args, loop)
    ceiling = manners.best_accuracy(test["pairs"])
    assert len(found["pair accuracy"]) == 1000 and statistics.fmean(found["pair accuracy"]) == pytest.approx(
        ceiling, abs=0.03
    )
    base = reward.baselines(test, tiny(), args)
    assert base["ceiling: the annotator's own utility"] == ceiling
    longer = [(len(row["chosen"]) > len(row["rejected"])) + (len(row["chosen"]) >= len(row["rejected"]))
              for row in test["pairs"]]  # fmt: skip
    assert 1 in longer and base["the longer answer"] == pytest.approx(statistics.fmean(longer) / 2)
    assert found["correlation with utility"] == pytest.approx([1.0])
    assert found["EPIC distance to utility"] == pytest.approx([0.0], abs=1e-3) and found["calibration error"][0] < 0.05
    assert found["correlation with length"] == pytest.approx(found["utility's correlation with length"])
    told = [(a, r["asker"], r["name"]) for r in test["requests"] for a in r["answers"]]
    mean = statistics.fmean(manners.utility(*x) for x in told)
    assert found["mean reward"] == pytest.approx([0.5 + mean], abs=1e-5)
    lengths, worth = [float(len(a)) for a, *_ in told], [manners.utility(*x) for x in told]
    assert found["correlation with length"][0] == pytest.approx(
        pearson(torch.tensor(lengths), torch.tensor(worth)), abs=1e-6
    )
    for name in manners.QUESTIONS:
        hits = found[f"pairs that differ in: {name}"]
        rows = [r for r in test["pairs"] if manners.has(r["chosen"], name, r["asker"], r["name"]) !=
                manners.has(r["rejected"], name, r["asker"], r["name"])]  # fmt: skip
        both = [(r["utility_chosen"], r["utility_rejected"]) for r in rows]
        wanted = [1.0 if good > bad else 0.5 * (good == bad) for good, bad in both]  # fmt: skip
        assert hits == wanted and 100 < len(hits) < 900
    monkeypatch.setattr(reward, "scores", utilities(-1.0))
    worst = reward.evaluate(small(), tiny(), test, args, loop)
    assert statistics.fmean(worst["pair accuracy"]) == pytest.approx(1 - statistics.fmean(found["pair accuracy"]))
    assert worst["EPIC distance to utility"] == pytest.approx([1.0]) and worst["calibration error"][0] > 0.3


@pytest.mark.parametrize("flags", [*(("--feedback", kind) for kind in reward.PAIRS), ("--labels", "ai")])
def test_what_the_world_trains_on_is_never_measured(flags, tmp_path, monkeypatch):
    """Of no kind: nobody asks the same in training and in the test."""
    written = manners.preferences
    monkeypatch.setattr(manners, "preferences", lambda count, *how: written(min(count, 60), *how))
    monkeypatch.setattr(reward, "ai_labels", lambda model, tokenizer, rows, args, loop: rows)
    monkeypatch.setattr(reward, "sampled", lambda model, tokenizer, prompts, new, samples, *_: [
        [[tokenizer.eos_ids[0]]] * samples for _ in prompts])  # fmt: skip
    train, test = reward.examples(*((args := a_loop(tmp_path, *flags, "--pairs", "120"))[0], None, tiny(), args[1]))
    asked, measured = ({tuple(e.rows[0].input_ids[: e.rows[0].completion_mask.index(1)]) for e in some}
                       for some in (train, test["examples"]))  # fmt: skip
    assert min(len(asked), len(measured)) > 25 and not asked & measured


def test_held_out_pairs_are_of_other_requests():
    train = {(row["asker"], row["name"]) for row in manners.preferences(3000, 0)}
    args = get_args([])
    _, test = reward.examples(args, small(), tiny(), None)
    assert not train & {(row["asker"], row["name"]) for row in test["pairs"] + test["requests"]}
    assert len(test["requests"]) == 64 and {len(r["answers"]) for r in test["requests"]} == {8}


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save(small(tiny().vocab_size), tiny(), folder)
    return folder


PAIRS = [
    {"prompt": f"Say {n} in words.", "chosen": "Gladly. " * (1 + n % 4) + str(n), "rejected": f"No {n}" + "!" * n}
    for n in range(8)
]  # fmt: skip
FILES = {
    "comparison": PAIRS,
    "binary": [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in PAIRS
               for side in ("chosen", "rejected")],
    "rank": [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"], "Hm."][: 2 + i % 2],
              "scores": [1, 3, 2][: 2 + i % 2]} for i, r in enumerate(PAIRS)],
    "steps": [{"prompt": r["prompt"], "completions": [r["chosen"], "So.", r["rejected"]][: 2 + i % 2],
               "labels": [True, True, False][: 2 + i % 2]} for i, r in enumerate(PAIRS)],
}  # fmt: skip


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def preferences(tmp_path) -> Path:
    return write_jsonl(tmp_path / "preferences.jsonl", PAIRS)


def args_for(checkpoint: Path, data: Path, out: Path, *flags: object) -> Namespace:
    argv = ["--model", checkpoint, "--data", data, "--out", out, "--device", "cpu", "--max-length", 160,
            "--batch-size", 4, "--lr", 1e-2, "--warmup", 2, "--log-every", 1, *flags]  # fmt: skip
    return get_args(list(map(str, argv)))


def run(checkpoint: Path, data: Path, out: Path, *flags: object) -> dict:
    return main(args_for(checkpoint, data, out, *flags))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, Tensor]:
    return dict(load(out / "checkpoint", labels=1)[0].named_parameters())


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("feedback", FILES)
def test_feedback_of_every_kind_is_learned_by_heart_however_batches_are_split(checkpoint, tmp_path, feedback):
    data = write_jsonl(tmp_path / "rows.jsonl", FILES[feedback])
    common = ("--feedback", feedback, "--steps", 30, *(("--centre", 0) if feedback == "comparison" else ()))
    result = run(checkpoint, data, tmp_path / "whole", *common, "--micro-batch-size", 4)
    kind = {"comparison": "pair", "rank": "pair", "binary": "label", "steps": "step"}[feedback]
    assert (
        result["metric"] == f"{kind} accuracy"
        and result["after"] > 0.9
        and logged(tmp_path / "whole")[-1]["accuracy"] > 0.8
    )
    common = ("--feedback", feedback, "--steps", 3, "--lr", 1e-3, "--margin", 0.1 * (feedback == "comparison"))
    sizes = (4, 3, 1) if feedback == "steps" else (4, 3)
    for size in sizes:
        run(checkpoint, data, tmp_path / str(size), *common, "--micro-batch-size", size)
    for size in sizes[1:]:
        for whole, split in zip(logged(tmp_path / "4"), logged(tmp_path / str(size)), strict=True):
            for name in ("loss", "accuracy", "margin", "grad_norm", "lr"):
                assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
        assert difference(weights(tmp_path / "4"), weights(tmp_path / str(size))) < 1e-4


def test_a_run_is_a_plain_loop(checkpoint, preferences, tmp_path):
    """Head, schedule, loss, clipping, AdamW: as somebody would write it who has one pair at a time."""
    flags = ("--steps", 4, "--batch-size", 8, "--micro-batch-size", 8, "--lr", 1e-3, "--grad-clip", 0.5,
             "--margin", 0.3, "--centre", 0.1, "--label-smoothing", 0.1)  # fmt: skip
    args = args_for(checkpoint, preferences, tmp_path / "out", *flags)
    main(args)
    Loop(args, "reward").seed(0)
    model = with_scalar_head(load(checkpoint)[0])
    plain = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    pairs = [encode(row["prompt"], [row["chosen"], row["rejected"]], tiny()) for row in PAIRS]
    for step, line in enumerate(logged(tmp_path / "out"), start=1):
        plain.zero_grad()
        total = right = margin = 0.0
        for pair in pairs:
            a, b = (brute_force(model, row) for row in pair)
            won, lost = (torch.nn.functional.softplus(0.3 + x) for x in (b - a, a - b))
            nll = 0.9 * won + 0.1 * lost
            loss = (nll + 0.1 * (a + b) ** 2) / 8
            loss.backward()
            total, right, margin = total + loss.item(), right + (a > b).item() / 8, margin + (a - b).item() / 8
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        plain.param_groups[0]["lr"] = learning_rate(step, 4, 1e-3, 2, "linear")
        plain.step()
        assert line["loss"] == pytest.approx(total, rel=1e-4) and line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["accuracy"] == pytest.approx(right) and line["margin"] == pytest.approx(margin, rel=1e-3, abs=1e-5)
        assert line["lr"] == plain.param_groups[0]["lr"]
    assert difference(weights(tmp_path / "out"), dict(model.named_parameters())) < 2e-4


def on_a_rank(rank: int, folder: Path) -> None:
    for parallel in ("replicas", "fsdp"):
        run(folder / "model", folder / "preferences.jsonl", folder / parallel, "--parallel", parallel, *RANKS)


RANKS = ("--steps", 4, "--batch-size", 5, "--micro-batch-size", 2, "--lr", 1e-3)


def test_two_ranks_equal_one(checkpoint, preferences, tmp_path):
    """Replicas and shards, 5 pairs a step: of 3 and 2, so that one rank has an empty micro-batch."""
    save(*load(checkpoint), tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    run(checkpoint, preferences, tmp_path / "one", *RANKS)
    for parallel in ("replicas", "fsdp"):
        for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / parallel), strict=True):
            for name in ("loss", "accuracy", "margin", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6)
        assert difference(weights(tmp_path / "one"), weights(tmp_path / parallel)) < 1e-4


def test_resuming_is_exact(checkpoint, preferences, tmp_path, monkeypatch):
    class Stop(Exception): ...

    class StopsAfter(loop_module.Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == 4:
                raise Stop

    flags = ("--steps", 7, "--save-every", 4)
    whole = run(checkpoint, preferences, tmp_path / "whole", *flags)
    monkeypatch.setattr(reward, "Loop", StopsAfter)
    with pytest.raises(Stop):
        run(checkpoint, preferences, tmp_path / "parts", *flags)
    monkeypatch.undo()
    parts = run(checkpoint, preferences, tmp_path / "parts", *flags, "--resume")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    assert [parts[name] for name in ("before", "after", "metrics")] == [
        whole[name] for name in ("before", "after", "metrics")]  # fmt: skip
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, 8))


def test_rows_are_trained_on_once_an_epoch_and_held_out_ones_never(checkpoint, tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {i}.", "chosen": f"Yes {i}", "rejected": "No"} for i in range(60)]
    data, seen = write_jsonl(tmp_path / "many.jsonl", rows), Counter()

    def watched(model, batch, args):
        seen.update(tiny().decode(row).split("Say ")[1].split(".")[0] for row in batch.input_ids[::2].tolist())
        return losses_of(model, batch, args)

    monkeypatch.setattr(reward, "losses_of", watched)
    result = run(checkpoint, data, tmp_path / "out", "--epochs", 2, "--batch-size", 11)
    held_out = {row["prompt"][4:-1] for row in formats.hold_out(formats.read_jsonl(data, "preference"))[1]}
    assert set(seen) | held_out == set(map(str, range(60))) and not set(seen) & held_out and set(seen.values()) == {2}
    assert result["n"] == len(held_out) == 16
    args = args_for(checkpoint, data, tmp_path / "out", "--eval-data", write_jsonl(tmp_path / "other.jsonl", rows[:3]))
    train, test = reward.examples(args, None, tiny(), Loop(args, "reward"))
    assert len(train) == 60 and len(test["examples"]) == 3


def test_a_file_is_labelled_by_the_ai(checkpoint, preferences, tmp_path, monkeypatch):
    """The AI labels what is trained on, people's labels are what it is measured by."""
    rows = write_jsonl(tmp_path / "many.jsonl", [dict(PAIRS[i % 8], prompt=f"Say {i}.") for i in range(40)])
    flip = {"chosen": "rejected", "rejected": "chosen"}
    monkeypatch.setattr(reward, "ai_labels", lambda model, tokenizer, rows, args, loop: [
        row | {side: row[flip[side]] for side in flip} | {"confidence": 0.9} for row in rows])  # fmt: skip
    args = args_for(checkpoint, rows, tmp_path / "out", "--labels", "ai")
    train, test = reward.examples(args, None, tiny(), Loop(args, "reward"))
    assert {e.label for e in train} == {0.9} and all("No" in said(e.rows[0]) for e in train)
    assert {e.label for e in test["examples"]} == {1.0} and all("Gladly" in said(e.rows[0]) for e in test["examples"])


def test_ranked_answers_are_sorted_by_their_scores():
    row = {"prompt": "Go", "completions": ["b", "d", "a", "c"], "scores": [2, -1, 3, 0.5]}
    example = reward.file_example(row, tiny(), Namespace(feedback="rank"))
    assert [said(r) for r in example.rows] == ["a", "b", "c", "d"]


def test_answers_of_equal_scores_have_no_order(checkpoint, tmp_path, capsys):
    """Of a list the first of them stays; of a row where all are equal nothing, which is counted out loud."""
    row = {"prompt": "Go", "completions": ["b", "d", "a", "c"], "scores": [2, -1, 2.0, -1]}
    example = reward.file_example(row, tiny(), Namespace(feedback="rank"))
    assert [said(r) for r in example.rows] == ["b", "d"]
    rows = [row | {"prompt": f"Go {i}"} for i in range(3)]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0] | {"scores": [1, 1, 1, 1]}])
    args = args_for(checkpoint, data, tmp_path / "out", "--feedback", "rank")
    train, test = reward.examples(args, None, tiny(), Loop(args, "reward"))
    assert len(train) == len(test["examples"]) == 3 and "1 rows with equal scores: dropped" in capsys.readouterr().err


def test_the_default_run_starts_from_the_sft_model_and_is_a_stage(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loop_module.Loop, "require", lambda loop, stage: asked.append(stage) or checkpoint)
    result = main(get_args(["--out", str(tmp_path / "out"), "--pairs", "8", "--steps", "1", "--device", "cpu"]))
    assert asked == ["sft"] and result["n"] == 1000 and result["variant"] == "comparison"
    assert loop_module.STAGES["reward"][0] == "reward.py"
    said = set(result["metrics"]) | {result["metric"]} | set(logged(tmp_path / "out")[0]) - {"step"}
    for name in said:
        assert name in reward.LOGGED or name.split(":")[0] in reward.LOGGED, f"--help does not explain {name!r}"


def test_other_settings_leave_the_stages_alone():
    for flags, folder in (((), "reward"), (("--feedback", "steps"), "prm"), (("--labels", "ai"), "reward-custom"),
                          (("--feedback", "steps", "--seed", "1"), "reward-custom")):  # fmt: skip
        assert Loop(get_args([*flags, "--device", "cpu"]), "reward").out == loop_module.ROOT / "out" / folder


def test_no_steps_are_no_steps(checkpoint, preferences, tmp_path):
    result = run(checkpoint, preferences, tmp_path / "out", "--steps", 0)
    assert result["before"] == result["after"] and not (tmp_path / "out" / "checkpoint").exists()


def test_a_judge_needs_a_tokenizer(checkpoint, preferences, tmp_path):
    save(small(), None, tmp_path / "mute")
    with pytest.raises(UserError, match="mute: no tokenizer.json in it"):
        run(checkpoint, preferences, tmp_path / "out", "--labels", "ai", "--judge", tmp_path / "mute")


def test_rewards_are_centred(checkpoint, preferences, tmp_path, monkeypatch):
    """R9: the squared sum draws the level of rewards to 0, from wherever a head begins; the order is learned."""
    levels, whole = {}, reward.with_scalar_head

    def far_off(model: Transformer) -> Transformer:
        found = whole(model)
        found.head.weight.data *= 10
        return found

    monkeypatch.setattr(reward, "with_scalar_head", far_off)
    for centre in (0.0, 0.5):
        args = args_for(checkpoint, preferences, tmp_path / "out", "--steps", 25, "--centre", centre, "--lr", 5e-3)
        result = main(args)
        model = load(tmp_path / "out" / "checkpoint", labels=1)[0]
        pairs = [Example(encode(row["prompt"], [row["chosen"], row["rejected"]], tiny())) for row in PAIRS]
        scores = reward.scores(model, pairs, args, Loop(args, "reward"))
        levels[centre] = abs(sum(map(sum, scores)) / 16)
        assert result["after"] == 1.0
    assert levels[0.5] < 0.2 * levels[0.0]


def test_compiled_runs_see_few_lengths_and_forward_passes_are_in_dtype(checkpoint, preferences, tmp_path, monkeypatch):
    import kernels
    from model import Block

    seen, measured = [], []

    def watched(model, batch, args):
        losses, margins = losses_of(model, batch, args)
        seen.append((batch.input_ids.shape[1], torch.is_autocast_enabled("cpu"), losses.dtype))
        return losses, margins

    def collated(*how):
        measured.append(collate(*how))
        return measured[-1]

    monkeypatch.setattr(reward, "losses_of", watched)
    monkeypatch.setattr(reward, "collate", collated)
    monkeypatch.setattr(kernels, "use_compile", lambda wanted: wanted)
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        run(checkpoint, preferences, tmp_path / "out", "--steps", 2, "--compile", "on", "--dtype", "bf16")
        args, loop = a_loop(tmp_path, "--compile", "on")
        loop.compile(small(tiny().vocab_size))
        reward.odds(small(tiny().vocab_size), tiny(), [[1, 2, 3]], ("yes", "no"), 1, loop)
    assert {(n % 64, narrow, dtype) for n, narrow, dtype in seen} == {(0, True, torch.float32)}
    assert len(measured) > len(seen) and all(batch.input_ids.shape[1] % 64 == 0 for batch in measured)
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.float32}


def test_measuring_on_the_way_changes_nothing(checkpoint, preferences, tmp_path, capsys):
    run(checkpoint, preferences, tmp_path / "quiet", "--steps", 5)
    assert "step 2:" not in capsys.readouterr().err
    run(checkpoint, preferences, tmp_path / "out", "--steps", 5, "--eval-every", 2)
    err = capsys.readouterr().err
    assert "step 2: pair accuracy" in err and "step 4:" in err and "step 5:" not in err
    assert difference(weights(tmp_path / "quiet"), weights(tmp_path / "out")) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Defaults and bad input


def test_defaults_are_of_one_table():
    for column, flags in enumerate(([], ["--model", "x"])):
        args = vars(get_args(flags))
        assert {name: args[name] for name in reward.DEFAULTS} == {n: v[column] for n, v in reward.DEFAULTS.items()}
    assert {f: get_args(["--feedback", f]).pairs for f in reward.PAIRS} == reward.PAIRS
    assert get_args(["--revise"]).pairs == 256 and get_args(["--revise", "--pairs", "9"]).pairs == 9
    assert get_args(["--lr", "0.5"]).lr == 0.5 and get_args(["--feedback", "rank"]).centre == 0.01
    assert (get_args(["--feedback", "rank"]).rank_loss, get_args([]).rank_loss) == ("listwise", None)
    epochs = [get_args(["--feedback", f, *more]).epochs for f in ("rank", "steps") for more in ((), ("--epochs", "2"))]
    assert epochs == [1.0, 2.0, 3.0, 2.0]


def exits(monkeypatch, capsys, *argv: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["reward.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        loop_module.run(main, get_args)
    err = capsys.readouterr().err.strip().splitlines()
    return stopped.value.code, err[-1] if err else ""


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--label-smoothing", 0.5), "from 0.5 on the labels say the opposite"),
        (("--labels", "ai", "--feedback", "rank"), "needs --feedback comparison"),
        (("--judge", "x"), "needs --labels ai"),
        (("--constitution", "x"), "needs --labels ai or --revise"),
        (("--revise", "--data", "x"), "not those of --data"),
        (("--revise", "--labels", "ai", "--judge", "x"), "it takes no --labels, --judge or"),
        (("--revise", "--labels", "ai"), "it takes no --labels, --judge or"),
        (("--revise", "--feedback", "rank"), "it takes no --labels, --judge or --feedback"),
        (("--rank-loss", "pairwise"), "--rank-loss is of lists: it needs --feedback rank"),
        (("--margin", -1), "expected a finite number of at least 0"),
        (("--margin", 1, "--feedback", "rank"), "need --feedback comparison"),
        (("--centre", 0, "--feedback", "binary"), "need --feedback comparison"),
        (("--label-smoothing", 0.1, "--feedback", "steps"), "--feedback rank and steps have none"),
        (("--out", Path(__file__, "out")), "expected a folder, found a file"),
        (("--pairs", 0), "expected a whole number of at least 1"),
        (("--feedback", "stars"), "invalid choice"),
        ((), "nowhere/config.json"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(flags, said, tmp_path, monkeypatch, capsys):
    start = ("--model", "nowhere")  # so that no stage is built where a flag is taken
    code, line = exits(monkeypatch, capsys, *start, "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and said in line


@pytest.mark.parametrize(
    "flags, row, said",
    [
        ((), {"prompt": "a", "chosen": "b"}, "found the fields prompt, chosen, expected prompt, chosen, rejected"),
        ((), {"prompt": "a", "chosen": "b", "rejected": "b"}, "no row is left"),
        ((), {"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "x"}]}, "rows.jsonl:1: rejected"),
        (("--max-length", 12), {"prompt": "a", "chosen": "b " * 20, "rejected": "c"}, "row 1 has"),
        (("--max-length", 200), {"prompt": "a", "chosen": "b", "rejected": "c"}, "reads at most 160 tokens"),
        (
            ("--feedback", "binary"),
            {"prompt": "a", "completion": "b", "label": 1},
            "label: found 1, expected true or false",
        ),
        (("--feedback", "rank"), {"prompt": "a", "completions": ["b"], "scores": [1]}, "nothing to rank"),
        (("--feedback", "steps"), {"prompt": "a", "completions": ["b"], "labels": [True, False]}, "different lengths"),
        (("--labels", "ai", "--constitution", "nowhere"), PAIRS[0], "nowhere: expected a JSON list"),
    ],
)
def test_bad_rows_are_one_line_and_exit_2(flags, row, said, checkpoint, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    code, line = exits(monkeypatch, capsys, "--model", checkpoint, "--data", data, "--out", tmp_path / "out",
                       "--device", "cpu", "--max-length", 100, *flags)  # fmt: skip
    assert code == 2 and said in line


def test_what_was_dropped_is_counted_out_loud(checkpoint, tmp_path, capsys):
    rows = [
        *PAIRS,
        {"prompt": "Same.", "chosen": "x", "rejected": "x"},
        {"prompt": "Long.", "chosen": "x" * 300, "rejected": "y"},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run(checkpoint, data, tmp_path / "out", "--steps", 1, "--too-long", "drop")
    err = capsys.readouterr().err
    assert "1 rows dropped: its answers are the same" in err and "1 rows too long, dropped" in err
    run(checkpoint, data, tmp_path / "out", "--steps", 0, "--too-long", "drop", "--eval-data", data)
    err = capsys.readouterr().err
    assert "1 measured rows dropped: its answers are the same" in err and "1 measured rows too long, dropped" in err
    same = write_jsonl(tmp_path / "same.jsonl", rows[-2:-1])
    with pytest.raises(UserError, match="no row is left to train on"):
        run(checkpoint, same, tmp_path / "out", "--eval-data", data, "--too-long", "drop")


def test_a_reward_model_is_not_a_start(tmp_path, preferences, monkeypatch, capsys):
    save(with_scalar_head(small(tiny().vocab_size)), tiny(), tmp_path / "rm")
    code, line = exits(
        monkeypatch, capsys, "--model", tmp_path / "rm", "--data", preferences, "--out", tmp_path / "out"
    )
    assert code == 2 and "found a model with 1 labels, expected a language model" in line


@pytest.mark.slow
def test_the_default_run_reaches_85_percent_of_the_way_to_the_ceiling(tmp_path):
    result = main(get_args(["--out", str(tmp_path / "out"), "--device", "cpu"]))
    ceiling = result["baselines"]["ceiling: the annotator's own utility"]
    assert (result["after"] - 0.5) / (ceiling - 0.5) >= 0.85
    assert result["metrics"]["EPIC distance to utility"]["after"] < 0.35
