"""Facts about dpo.py: every loss by hand, closed forms, parity with trl, log-probs and masks, data, whole runs."""

import itertools
import json
import math
import random
import re
import shutil
import statistics
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

import dpo
import loop as loop_module
from data import chat, manners, world
from data.chat import Row
from data.formats import UserError
from data.tokenizer import tiny
from dpo import LOSSES, Batch, Example, Scored, collate, encode, fit, get_args, main, objective, score, step_baseline
from loop import Loop
from model import Config, Transformer, frozen, load, save
from tests.oracle import oracle
from tests.test_loop import on_two_ranks

CPU = torch.device("cpu")
LN2 = math.log(2)


def small(vocab_size: int = 32, *, seed: int = 0, depth: int = 1, max_length: int = 160) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Config.from_depth(depth, vocab_size, max_length))
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 4  # so that token probabilities differ
    return model


def random_scored(K: int = 2, B: int = 6, seed: int = 0) -> Scored:
    """Log-probs of ragged answers in float64; those of the first row are the reference's, where losses begin."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (B, K), generator=generator)
    ref_logps = -5 - lengths * (0.3 + torch.rand(B, K, generator=generator, dtype=torch.float64))
    logps = ref_logps + torch.randn(B, K, generator=generator, dtype=torch.float64) * 3
    logps = logps.clamp(max=-0.1)
    logps[0] = ref_logps[0]
    logps[1:2] = ref_logps[1:2] + torch.linspace(4, -6, K)  # a margin beyond that of the hinge
    scores = torch.rand(B, K, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    if K <= 2:
        scores = torch.tensor([[1.0, 0.0]] * B) if K == 2 else (torch.arange(B)[:, None] % 3 == 0).double()
    kls = torch.rand(B, K, generator=generator, dtype=torch.float64) * 4
    return Scored(logps.requires_grad_(), ref_logps, lengths, scores, torch.tensor(0.7), kls.requires_grad_())


def of(name: str, *flags: object) -> Namespace:
    return get_args(["--loss", name, *map(str, flags)])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, s: Scored, b: int, h: dict[str, float]) -> float:
    """The loss of row b as its paper has it, one number at a time."""
    logp, ref, n, score, kl = (x[b].tolist() for x in (s.logps, s.ref_logps, s.lengths, s.scores, s.kls))
    K, beta = len(logp), h.get("beta", 1.0)
    r = [x - y for x, y in zip(logp, ref, strict=True)]
    mean = [x / y for x, y in zip(logp, n, strict=True)]
    delta = r[0] - r[-1]
    match name:
        case "dpo":
            e = h["label_smoothing"]
            return -(1 - e) * math.log(sigmoid(beta * delta)) - e * math.log(sigmoid(-beta * delta))
        case "robust":
            e, up, down = h["label_smoothing"], -math.log(sigmoid(beta * delta)), -math.log(sigmoid(-beta * delta))
            return ((1 - e) * up - e * down) / (1 - 2 * e)
        case "ipo":
            return (r[0] / n[0] - r[-1] / n[-1] - 1 / (2 * beta)) ** 2
        case "hinge":
            return max(0.0, 1 - beta * delta)
        case "kto":
            z = s.baseline.item()
            values = [
                h["desirable_weight"] * (1 - sigmoid(beta * (x - z))) if good > 0
                else h["undesirable_weight"] * (1 - sigmoid(beta * (z - x)))
                for x, good in zip(r, score, strict=True)
            ]  # fmt: skip
            return sum(values) / K
        case "bco":
            rewards = [beta * x - beta * s.baseline.item() for x in r]
            return -sum(math.log(sigmoid(x if good > 0 else -x)) for x, good in zip(rewards, score, strict=True))
        case "apo_zero":
            return (1 - sigmoid(beta * r[0])) + sigmoid(beta * r[-1])
        case "apo_down":
            return sigmoid(beta * r[0]) + (1 - sigmoid(beta * delta))
        case "rdpo":
            return -math.log(sigmoid(beta * delta + h["alpha"] * n[0] - h["alpha"] * n[-1]))
        case "tdpo":
            return -math.log(sigmoid(beta * delta - h["alpha"] * (beta * kl[-1] - beta * kl[0])))
        case "lipo":
            ranked = sorted(range(K), key=lambda i: -r[i])
            rank = {i: place for place, i in enumerate(ranked, start=1)}
            total = 0.0
            for i, j in ((i, j) for i in range(K) for j in range(K) if score[i] > score[j]):
                gain = abs((2 ** score[i] - 1) - (2 ** score[j] - 1))
                weight = gain * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total += weight * math.log(1 + math.exp(-(beta * r[i] - beta * r[j])))
            return total
        case "npo":
            return (
                2 / beta * sum(math.log(1 + math.exp(beta * x)) for x, good in zip(r, score, strict=True) if not good)
            )
        case "nn":
            own = sum(beta * x for x in r[:-1]) / (K - 1)
            return -math.log(sigmoid(own - h["alpha"] * r[-1]))
        case "orpo":
            odds = [math.exp(x) / (1 - math.exp(x)) for x in mean]
            return -beta * math.log(sigmoid(math.log(odds[0] / odds[-1])))
        case "simpo":
            return -math.log(sigmoid(beta * mean[0] - beta * mean[-1] - h["gamma"]))
        case "cpo":
            return -math.log(sigmoid(beta * logp[0] - beta * logp[-1]))
        case "rrhf":
            return sum(max(0.0, mean[j] - mean[i]) for i in range(K) for j in range(K) if score[i] > score[j])
        case "pro":
            total = 0.0
            for k in range(K - 1):
                T = {i: 1 / (score[k] - score[i]) for i in range(k + 1, K)}
                T[k] = min(T.values())
                total -= mean[k] / T[k] - math.log(sum(math.exp(mean[i] / T[i]) for i in range(k, K)))
            return total
    raise AssertionError(name)


# ----------------------------------------------------------------------------------------------------------------------
# The losses

UNUSUAL = {"beta": 0.37, "gamma": 0.6, "alpha": 0.23, "label_smoothing": 0.15, "desirable_weight": 1.3,
           "undesirable_weight": 0.8}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_its_paper(name):
    """Row by row; hyperparameters that are nowhere 0, 1 or equal; lists of 4 where a loss takes them, and pairs."""
    hyper = {h: UNUSUAL[h] for h in LOSSES[name][2] if h in UNUSUAL}
    flags = [x for h, value in hyper.items() for x in (f"--{h.replace('_', '-')}", value)]
    args = of(name, *flags, "--sft-weight", 0)
    for K in (4, 2) if name in (*dpo.LISTWISE, "nn") else (2, 1) if name in ("kto", "bco", "npo") else (2,):
        s = random_scored(K)
        found = objective(s, args)
        assert found.shape == (6,)
        assert found.tolist() == pytest.approx([by_hand(name, s, b, hyper) for b in range(6)], rel=1e-6)
    found.sum().backward()
    assert s.logps.grad.abs().sum(0).min() > 0 or name == "npo"


@pytest.mark.parametrize("name", LOSSES)
def test_the_sft_term_is_the_mean_of_the_best_answer(name):
    s = random_scored(4 if name in (*dpo.LISTWISE, "nn") else 2)
    with_it, without = (objective(s, of(name, "--sft-weight", w)) for w in (0.7, 0.0))
    mean = (s.logps / s.lengths)[:, 0]
    torch.testing.assert_close(with_it - without, -0.7 * mean)
    if name in ("kto", "bco"):
        alone = random_scored(1)
        found = objective(alone, of(name, "--sft-weight", 0.7)) - objective(alone, of(name))
        torch.testing.assert_close(found, -0.7 * (alone.logps / alone.lengths * alone.scores)[:, 0])


def test_defaults_of_the_sft_term_are_those_of_the_papers():
    assert {name for name in LOSSES if of(name).sft_weight} == {"orpo", "cpo", "rrhf", "pro"}


@pytest.mark.parametrize(("name", "start"), [
    ("dpo", LN2), ("robust", LN2), ("ipo", None), ("hinge", 1.0), ("kto", 0.5), ("bco", 2 * LN2), ("apo_zero", 1.0),
    ("apo_down", 1.0), ("tdpo", LN2), ("npo", None),
])  # fmt: skip
def test_where_policy_and_reference_agree(name, start):
    args, s = of(name), random_scored()
    s = s._replace(logps=s.ref_logps, baseline=torch.tensor(0.0), kls=torch.zeros(6, 2))
    start = {"ipo": 1 / (4 * args.beta**2), "npo": 2 * LN2 / args.beta}.get(name, start) if start is None else start
    assert objective(s, args).tolist() == pytest.approx([start] * 6, abs=1e-6)


def slope(name: str, margin: float, *flags: object) -> float:
    """d loss / d log pi(chosen) where the margin of log pi / ref (a token for ipo) is this; one answer is longer."""
    lengths = torch.tensor([[4, 7]])
    rows = margin * torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    logps = (rows * lengths if name == "ipo" else rows).requires_grad_()
    s = Scored(logps, torch.zeros_like(rows), lengths, torch.tensor([[1.0, 0.0]]))
    return torch.autograd.grad(objective(s, of(name, *flags)).sum(), logps)[0][0, 0].item()


def test_ipo_rests_at_its_margin():
    for beta in (0.1, 0.4, 2.0):
        at = 1 / (2 * beta)
        assert slope("ipo", at, "--beta", beta) == pytest.approx(0, abs=1e-12)
        assert slope("ipo", 0.9 * at, "--beta", beta) < 0 < slope("ipo", 1.1 * at, "--beta", beta)


def test_conservative_dpo_rests_where_labels_are_as_sure_as_they_are_right():
    for e, beta in ((0.1, 0.5), (0.3, 2.0)):
        at, flags = math.log((1 - e) / e) / beta, ("--beta", beta, "--label-smoothing", e)
        assert slope("dpo", at, *flags) == pytest.approx(0, abs=1e-12)
        assert slope("dpo", at - 0.1, *flags) < 0 < slope("dpo", at + 0.1, *flags)
        assert slope("dpo", at, "--beta", beta) < 0  # without smoothing there is no rest


def test_robust_dpo_is_dpo_on_average_over_flipped_labels():
    s = random_scored()
    flipped = s._replace(logps=s.logps.flip(1), ref_logps=s.ref_logps.flip(1))
    args = of("robust", "--label-smoothing", 0.2)
    mixed = 0.8 * objective(s, args) + 0.2 * objective(flipped, args)
    torch.testing.assert_close(mixed, objective(s, of("dpo", "--beta", args.beta)))


def test_exchanged_answers_exchange_the_loss():
    s = random_scored()
    swapped = s._replace(logps=s.logps.flip(1), ref_logps=s.ref_logps.flip(1), lengths=s.lengths.flip(1))
    for name in ("dpo", "rdpo", "cpo"):
        args = of(name, "--sft-weight", 0)
        there, back = objective(s, args), objective(swapped, args)
        torch.testing.assert_close((-there).exp() + (-back).exp(), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(dpo.implicit_rewards(s, args).flip(1), dpo.implicit_rewards(swapped, args))


def test_rdpo_asks_less_of_a_longer_chosen_answer():
    s = random_scored()._replace(lengths=torch.tensor([[30, 5], [5, 30], [9, 9], [9, 9], [9, 9], [9, 9]]))
    longer, shorter = (
        objective(s, of("rdpo", "--alpha", a)) - objective(s, of("rdpo", "--alpha", 0)) for a in (0.1, 0.0)
    )
    assert longer[0] < 0 < longer[1] and longer[2:].abs().max() == 0 and shorter.abs().max() == 0


def test_tdpo_moves_the_kl_of_the_rejected_answer_only():
    s = random_scored()
    objective(s, of("tdpo")).sum().backward()
    assert s.kls.grad[:, 0].abs().max() == 0 and s.kls.grad[:, 1].min() > 0


def test_lists_of_lipo_are_weighted_by_what_a_change_of_places_costs():
    """Ties have no order; a pair of the first and the last rank weighs more than one of the last two."""
    s = random_scored(3, 1)._replace(scores=torch.tensor([[1.0, 1.0, 0.0]]))
    objective(s, of("lipo")).sum().backward()
    tied = s._replace(scores=torch.tensor([[1.0, 1.0, 1.0]]))
    assert objective(tied, of("lipo")).item() == objective(tied, of("rrhf", "--sft-weight", 0)).item() == 0


def test_log1mexp_near_and_far():
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = torch.tensor([-1e-6, -1e-3, -0.5, -LN2, -0.7, -5.0, -50.0], dtype=dtype, requires_grad=True)
        wanted = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
        found = dpo.log1mexp(x)
        assert found.tolist() == pytest.approx(wanted, rel=rel, abs=0)
        found.sum().backward()
        assert x.grad.tolist() == pytest.approx([-1 / math.expm1(-v) for v in x.tolist()], rel=10 * rel)


@pytest.mark.parametrize("x", [0.0, -1e-9, -6e-8, -1e-7, -100.0, -math.inf])
def test_log1mexp_has_a_gradient_everywhere(x):
    """Where one branch of torch.where is infinite, the other one is taken and the gradient stays a number."""
    x = torch.tensor([x], requires_grad=True)
    dpo.log1mexp(x).backward()
    assert x.grad.item() == pytest.approx(-1 / math.expm1(-x.item()) if x.item() else 0.0, rel=1e-4)


def test_orpo_learns_where_a_token_is_certain():
    """log pi = 0 of the chosen answer, of the rejected one, of both."""
    args = of("orpo")
    for sure in ([0.0, -9.0], [-9.0, 0.0], [0.0, 0.0]):
        logps = torch.tensor([sure], requires_grad=True)
        s = random_scored(B=1)._replace(logps=logps, lengths=torch.tensor([[3, 3]]))
        objective(s, args).sum().backward()
        assert logps.grad.isfinite().all() and objective(s, args).isfinite().all()


def test_orpo_of_sure_and_of_hopeless_answers():
    """Mean log-probs of -1e-6 and -50: log odds are 13.8 and -50, not infinite, not NaN."""
    logps = torch.tensor([[-4e-6, -350.0]], dtype=torch.float64, requires_grad=True)
    s = Scored(logps, torch.zeros(1, 2), torch.tensor([[4, 7]]), torch.tensor([[1.0, 0.0]]))
    log_odds = (-1e-6 - math.log(-math.expm1(-1e-6))) - (-50 - math.log1p(-math.exp(-50)))
    args = of("orpo", "--sft-weight", 0, "--beta", 0.5)
    assert objective(s, args).item() == pytest.approx(0.5 * math.log1p(math.exp(-log_odds)), rel=1e-9)
    back = s._replace(logps=s.logps.flip(1), lengths=s.lengths.flip(1))
    found = objective(back, args)
    assert found.item() == pytest.approx(0.5 * log_odds, rel=1e-9)
    found.sum().backward()
    assert logps.grad.isfinite().all() and logps.grad.abs().min() > 0


# ----------------------------------------------------------------------------------------------------------------------
# The baselines


@pytest.fixture
def one(tmp_path) -> Loop:
    return Loop(of("kto", "--out", tmp_path / "one", "--device", "cpu"), "dpo")


@pytest.mark.parametrize("B", range(1, 6))
def test_baseline_of_kto(B, one):
    """The mean over the rows of the step, at least 0, without a gradient, in one part or many; rows may be odd."""
    s = random_scored(1, B, seed=B)
    r = (s.logps - s.ref_logps)[:, 0]
    parts = [Scored(*(x if x is None or x.dim() == 0 else x[i : i + 2] for x in s)) for i in range(0, B, 2)]
    assert step_baseline("kto", [s], one).item() == pytest.approx(max(0.0, r.mean().item()))
    assert step_baseline("kto", parts, one).item() == pytest.approx(max(0.0, r.mean().item()))
    up = s._replace(logps=s.ref_logps + 1.5)
    assert step_baseline("kto", [up], one).item() == pytest.approx(1.5)
    assert step_baseline("kto", [s._replace(logps=s.ref_logps - 1.5)], one).item() == 0.0
    assert not step_baseline("kto", [up._replace(logps=up.logps.requires_grad_())], one).requires_grad
    losses = objective(s._replace(baseline=step_baseline("kto", [s], one)), of("kto"))
    assert losses.shape == (B,) and losses.isfinite().all()
    assert step_baseline("kto", [score(small(), None, collate([], CPU), of("kto"))], one).item() == 0.0


def test_baseline_of_bco_is_between_good_and_bad(one):
    s = random_scored(1, 6)
    r, good = (s.logps - s.ref_logps)[:, 0].detach(), s.scores[:, 0] > 0
    wanted = (r[good].mean() + r[~good].mean()) / 2
    assert step_baseline("bco", [s], one).item() == pytest.approx(wanted.item()) != pytest.approx(r.mean().item())
    all_bad = s._replace(scores=s.scores * 0)
    assert step_baseline("bco", [all_bad], one).item() == pytest.approx(r.mean().item())
    assert step_baseline("bco", [s._replace(logps=s.ref_logps - 2)], one).item() == pytest.approx(-2)


def test_held_out_pairs_of_kto_are_measured_beside_answers_to_other_prompts(one):
    """As in training; the two models are told apart by which of them gives those answers more."""
    rows = ragged_examples()
    others = dpo.of_other_prompts(rows, 99)

    def ratios(models, some):
        return [[logp_by_hand(models[0], e, k) - logp_by_hand(models[1], e, k) for k in (0, 1)] for e in some]

    models = [small(), small(seed=1)]
    mean = statistics.fmean(x for row in ratios(models, others) for x in row)
    models, z = models if mean > 0 else models[::-1], abs(mean)
    found = dpo.evaluate(*models, tiny(), {"pairs": rows, "others": others}, None, one.args, one)
    own, beta = ratios(models, rows), one.args.beta
    wanted = [(1 - sigmoid(beta * (a - z)) + 1 - sigmoid(beta * (z - b))) / 2 for a, b in own]
    assert found["loss"] == pytest.approx(wanted, rel=1e-3)
    assert z > 0.1 and z != pytest.approx(statistics.fmean(x for row in own for x in row), rel=0.1)


def test_answers_to_other_prompts():
    def example(prompt, *answers):
        return Example(prompt, [Row(a, [1] * len(a)) for a in answers], [1.0, 0.0])

    rows = [example([1], [5], [6]), example([1], [7], [8]), example([2], [9], [10]), example([3], [11], [12])]
    found = dpo.of_other_prompts(rows, 99)
    assert [(e.prompt, [a.input_ids for a in e.answers]) for e in found] == [
        ([1], [[9], [10]]), ([1], [[9], [10]]), ([2], [[11], [12]]), ([3], [[5], [6]])]  # fmt: skip
    assert all(e.scores == [0.0, 0.0] for e in found)
    assert dpo.of_other_prompts(rows[:2], 99) == [] and dpo.of_other_prompts(rows[:1], 99) == []
    long = [example([1, 2, 3], [5], [6]), example([2], [7, 8, 9], [7, 8])]
    cut, whole = dpo.of_other_prompts(long, 5)
    assert cut.answers == [Row([7, 8], [1, 1])] * 2 and whole.answers == [Row([5], [1]), Row([6], [1])]


# ----------------------------------------------------------------------------------------------------------------------
# Parity with trl


class Recorded(dict):
    """_metrics of a trainer: takes whatever is written."""

    def __missing__(self, key):
        self[key] = defaultdict(list)
        return self[key]


def stub(logits: torch.Tensor):
    """A model of trl's fused head whose logits are this tensor."""

    def model(input_ids, labels, **rest):
        logps = logits.log_softmax(-1)[:, :-1]
        targets = labels[:, 1:]
        kept = targets != -100
        picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept
        return Namespace(log_probs=picked, entropy=picked * 0, mean_logits=picked * 0, is_top1=kept)

    return model


def paired_logits(B: int = 5, T: int = 9, V: int = 7, seed: int = 0):
    """Logits (2 B, T, V) of chosen rows, then rejected ones, as trl has them; ids, ragged masks, reference logps."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * B, T, V, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (2 * B, T), generator=generator)
    starts, ends = (
        torch.randint(1, 4, (2 * B, 1), generator=generator),
        torch.randint(5, T + 1, (2 * B, 1), generator=generator),
    )
    mask = ((torch.arange(T) >= starts) & (torch.arange(T) < ends)).long()
    ref = -torch.rand(2 * B, generator=generator, dtype=torch.float64) * 6 - 7
    return logits, ids, mask, ref


class OnePast(torch.nn.Module):
    """A model of ours with these logits: the state is the logits, and the head leaves it as it is."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.head = logits, Namespace(weight=torch.eye(logits.shape[-1], dtype=logits.dtype))

    def hidden_before(self, input_ids):
        return torch.nn.functional.pad(self.logits, (0, 0, 1, -1))


def ours(logits, ids, mask, ref, args) -> Scored:
    """`score` of the same, each chosen row beside its rejected one."""
    order = torch.arange(len(ids)).view(2, -1).T.flatten()
    scores = torch.tensor([[1.0, 0.0]] * (len(ids) // 2))
    return score(OnePast(logits[order]), None, Batch(ids[order], mask[order], scores, ref[order].view(-1, 2)), args)


def same(found: torch.Tensor, wanted: torch.Tensor, logits: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize(("name", "theirs", "smoothing"), [
    ("dpo", "sigmoid", 0.0), ("robust", "robust", 0.2), ("ipo", "ipo", 0.0), ("hinge", "hinge", 0.0),
    ("bco", "bco_pair", 0.0), ("apo_zero", "apo_zero", 0.0), ("apo_down", "apo_down", 0.0),
])  # fmt: skip
def test_parity_with_trl(name, theirs, smoothing):
    """DPOTrainer's own _compute_loss. Its bco_pair has no delta: ours is 0 here."""
    trainer = oracle("trl.trainer.dpo_trainer").DPOTrainer
    logits, ids, mask, ref = paired_logits()
    accelerator = Namespace(device=CPU, gather=lambda x: x, gather_for_metrics=lambda x: x)
    it = Namespace(
        model=torch.nn.Linear(1, 1), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, beta=0.3,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[theirs], loss_weights=[1.0],
        label_smoothing=smoothing, use_weighting=False, _metrics=Recorded(), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    chosen, rejected = ref.chunk(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
              "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}  # fmt: skip
    wanted = trainer._compute_loss(it, stub(logits), inputs, return_outputs=False)
    args = of(name, "--beta", 0.3, *(("--label-smoothing", smoothing) if smoothing else ()))
    s = ours(logits, ids, mask, ref, args)._replace(baseline=torch.tensor(0.0, dtype=torch.float64))
    same(objective(s, args).mean(), wanted, logits)
    metrics = dpo.metrics_of(dpo.sums_of(objective(s, args), s, args))
    if name != "ipo":  # whose implicit reward is a mean here
        named = {
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
            "chosen_reward": "rewards/chosen",
            "rejected_reward": "rewards/rejected",
            "chosen_logps": "logps/chosen",
            "rejected_logps": "logps/rejected",
        }
        for mine, other in named.items():
            assert metrics[mine] == pytest.approx(it._metrics["train"][other][-1], rel=1e-6), mine


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize("B", range(1, 6))
def test_parity_with_trl_of_kto(B, one):
    """KTOTrainer's own _compute_loss: lone answers, odd batches, two weights, baselines on both sides of 0."""
    trainer = oracle("trl.trainer.kto_trainer").KTOTrainer
    for shift in (-1.0, 1.0):
        logits, ids, mask, ref = (x[:B] for x in paired_logits(seed=B))
        labels = torch.arange(B) % 2 == 0
        generator = torch.Generator().manual_seed(B)
        kl, ref_kl = (
            torch.randn(B, generator=generator, dtype=torch.float64) + shift,
            torch.zeros(B, dtype=torch.float64),
        )
        accelerator = Namespace(device=CPU, gather_for_metrics=lambda x: x)
        it = Namespace(
            model=torch.nn.Linear(1, 1), accelerator=accelerator, aux_loss_enabled=False, beta=0.3, calculate_KL=True,
            precompute_ref_logps=True, loss_type="kto", desirable_weight=1.2, undesirable_weight=0.7,
            _total_train_tokens=0, _tp_size=1, _metrics=Recorded(), _compute_kl_logps=lambda model, batch, kl=kl: kl,
        )  # fmt: skip
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": labels,
                  "ref_logps": ref, "ref_KL_logps": ref_kl}  # fmt: skip
        wanted = trainer._compute_loss(it, stub(logits), inputs, return_outputs=False)
        args = of("kto", "--beta", 0.3, "--desirable-weight", 1.2, "--undesirable-weight", 0.7)
        batch = Batch(ids, mask, labels.double()[:, None], ref[:, None])
        unrelated = Scored(kl[:, None], ref_kl[:, None], None, torch.zeros(B, 1))
        s = score(OnePast(logits), None, batch, args)._replace(baseline=step_baseline("kto", [unrelated], one))
        assert (s.baseline > 0) == (kl.mean() > 0)
        same(objective(s, args).mean(), wanted, logits)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_parity_with_trl_without_a_reference(name, monkeypatch):
    """The losses of ORPOTrainer and CPOTrainer; ORPO's casts to fp32 are left out, to compare in float64.

    Their SFT terms: CPO's is the mean over all tokens of a batch, here of one row; ORPO's counts the prompt, ours not.
    """
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    logits, ids, mask, ref = paired_logits(B=1 if name == "cpo" else 5)
    theirs = stub(logits)(ids, ids.masked_fill(mask == 0, -100)).log_probs
    accelerator = Namespace(device=CPU)
    sums, lengths = theirs.sum(-1), mask.sum(-1)
    if name == "orpo":
        args = of("orpo", "--beta", 0.4, "--sft-weight", 0)
        trainer = oracle("trl.experimental.orpo.orpo_trainer").ORPOTrainer
        it = Namespace(beta=0.4, accelerator=accelerator)
        wanted = -trainer.odds_ratio_loss(it, *(sums / lengths).chunk(2))[0].mean()
    else:
        flags = ("--beta", 2.0, "--gamma", 0.5) if name == "simpo" else ("--beta", 0.3, "--sft-weight", 1)
        args = of(name, *flags)
        trainer = oracle("trl.experimental.cpo.cpo_trainer").CPOTrainer
        it = Namespace(beta=args.beta, accelerator=accelerator, alpha=0.0, label_smoothing=0.0, simpo_gamma=0.5,
                       loss_type="simpo" if name == "simpo" else "sigmoid")  # fmt: skip
        wanted = trainer.cpo_loss(it, *(sums / lengths if name == "simpo" else sums).chunk(2))[0].mean()
        if name == "cpo":
            labels = ids[:1].masked_fill(mask[:1] == 0, -100)
            wanted = wanted + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    same(objective(ours(logits, ids, mask, ref, args), args).mean(), wanted, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs, masks, batches


def ragged_examples(B: int = 5, K: int = 2, vocab_size: int = 32, seed: int = 0) -> list[Example]:
    """Prompts of 1 to 12 tokens, answers of 1 to 30, some of whose tokens (another speaker's) are not credited."""
    rng, found = random.Random(seed), []
    for _ in range(B):
        answers = []
        for _ in range(K):
            n = rng.choice((1, 2, 5, 17, 30))
            mask = [1] + [int(rng.random() < 0.8) for _ in range(n - 1)]
            answers.append(Row([rng.randrange(vocab_size) for _ in range(n)], mask))
        scores = sorted((rng.random() for _ in range(K)), reverse=True) if K > 2 else [1.0, 0.0][:K]
        found.append(Example([rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))], answers, scores))
    return found


@torch.no_grad()
def logp_by_hand(model: Transformer, e: Example, k: int) -> float:
    """log pi of answer k, which stands alone in the batch."""
    ids, mask = e.answers[k]
    logits = model(torch.tensor([e.prompt + ids]))[0, len(e.prompt) - 1 : -1]
    logps = (logits.gather(-1, torch.tensor(ids)[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
    return sum(logp for logp, credited in zip(logps, mask, strict=True) if credited)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_log_probs_are_sums_over_the_tokens_of_each_answer(K):
    """D1, D2, D14: rows by themselves, no padding, no prompt, in their own places; the same of the reference."""
    model, ref_model, rows = small().double(), small(seed=1).double(), ragged_examples(K=K)
    s = score(model, ref_model, collate(rows, CPU), of("dpo"))
    for name, m in (("logps", model), ("ref_logps", ref_model)):
        wanted = [[logp_by_hand(m, e, k) for k in range(K)] for e in rows]
        torch.testing.assert_close(getattr(s, name).tolist(), wanted, rtol=1e-6, atol=1e-6)
    assert s.lengths.tolist() == [[sum(answer.completion_mask) for answer in e.answers] for e in rows]
    assert s.scores.tolist() == [pytest.approx(e.scores) for e in rows]
    assert s.logps.requires_grad and not s.ref_logps.requires_grad and s.kls is None


def test_padding_and_neighbours_change_nothing():
    model, rows, args = small().double(), ragged_examples(), of("dpo")
    batch = collate(rows, CPU)
    wider = collate(rows, CPU, multiple_of=64)
    assert wider.input_ids.shape[1] == 64 > batch.input_ids.shape[1]
    poisoned = wider._replace(input_ids=wider.input_ids.masked_fill(torch.arange(64) >= batch.input_ids.shape[1], 31))
    whole = score(model, None, batch, args).logps
    for other in (wider, poisoned):
        torch.testing.assert_close(score(model, None, other, args).logps, whole, rtol=1e-9, atol=1e-9)
    alone = torch.cat([score(model, None, collate([e], CPU), args).logps for e in rows])
    torch.testing.assert_close(alone, whole, rtol=1e-6, atol=1e-6)


def test_tokens_that_are_not_credited_get_no_gradient():
    logits, ids, mask, ref = paired_logits()
    args = of("dpo")
    objective(ours(logits, ids, mask, ref, args), args).sum().backward()
    predicted = torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()  # logits at t predict token t + 1
    gradient = logits.grad.abs().amax(-1)
    assert gradient[~predicted].max() == 0 and gradient[predicted].min() > 0


def test_an_empty_batch_is_worth_nothing_and_still_runs():
    for name in LOSSES:
        model, args = small(), of(name)
        s = score(model, frozen(model), collate([], CPU), args)
        loss = objective(s._replace(baseline=torch.tensor(0.0)), args).sum()
        loss.backward()
        assert loss.item() == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


def test_kls_of_tdpo_are_not_rounded():
    """Under autocast states are in bf16, logits are not: the KL of two models that are nearly one is small."""
    model, ref_model = small(), small()
    with torch.no_grad():
        model.head.weight += 1e-3 * torch.randn_like(model.head.weight)
    batch = collate(ragged_examples(), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(model, ref_model, batch, of("tdpo")).kls.flatten()
        hidden = [m.hidden_before(batch.input_ids) for m in (model, ref_model)]
    now, then = ((h.bfloat16().double() @ m.head.weight.bfloat16().double().T).log_softmax(-1)
                 for h, m in zip(hidden, (model, ref_model), strict=True))  # fmt: skip
    wanted = ((then.exp() * (then - now)).sum(-1) * batch.completion_mask).sum(-1)
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=1e-6)


def test_kls_of_tdpo_are_those_of_whole_distributions():
    model, ref_model, rows = small().double(), small(seed=1).double(), ragged_examples()
    args = of("tdpo")
    s = score(model, ref_model, collate(rows, CPU), args)
    wanted = torch.zeros(5, 2, dtype=torch.float64)
    for b, e in enumerate(rows):
        for k, (ids, mask) in enumerate(e.answers):
            for t, credited in enumerate(mask):
                if credited:
                    seen = torch.tensor([e.prompt + ids[:t]])
                    now, then = (m(seen)[0, -1].log_softmax(-1) for m in (model, ref_model))
                    wanted[b, k] += (then.exp() * (then - now)).sum().item()
    torch.testing.assert_close(s.kls.detach().double(), wanted, rtol=1e-4, atol=1e-4)
    plain = score(model, ref_model, collate(rows, CPU), of("dpo"))
    torch.testing.assert_close(s.logps.double(), plain.logps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(s.ref_logps, plain.ref_logps)
    same_models = score(model, frozen(model), collate(rows, CPU), args)
    assert same_models.kls.abs().max() < 1e-6 and (s.kls > 0).all() and s.kls.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_is_trained(name):
    """D11: the loss depends on the model, not on numbers that were taken from it."""
    model, K = small(), 4 if name in (*dpo.LISTWISE, "nn") else 2
    s = score(model, small(seed=1), collate(ragged_examples(K=K), CPU), of(name))._replace(baseline=torch.tensor(0.1))
    objective(s, of(name)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_metrics_are_means_over_the_rows():
    args = of("dpo", "--beta", 0.5)
    s = random_scored()
    s.logps.data[1] = s.ref_logps[1] + torch.tensor([-1.0, -3.0])  # both less likely, and yet the margin is above 0
    losses = objective(s, args)
    parts = [Scored(*(x if x is None or x.dim() == 0 else x[i : i + 4] for x in s)) for i in (0, 4)]
    sums = sum(dpo.sums_of(losses[i : i + 4], part, args) for i, part in zip((0, 4), parts, strict=True))
    found, r = dpo.metrics_of(sums), 0.5 * (s.logps - s.ref_logps).detach()
    margins = (r[:, 0] - r[:, 1]).tolist()
    wanted = {
        "loss": losses.mean().item(), "margin": statistics.fmean(margins),
        "accuracy": statistics.fmean((m > 0) + 0.5 * (m == 0) for m in margins),
        "chosen_reward": r[:, 0].mean().item(), "rejected_reward": r[:, 1].mean().item(),
        "chosen_logps": s.logps[:, 0].mean().item(), "rejected_logps": s.logps[:, 1].mean().item(),
    }  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-6)
    assert list(found)[:3] == ["loss", "margin", "accuracy"]  # what the bar shows


def test_metrics_of_lone_answers_are_means_over_their_kind():
    args, s = of("kto", "--beta", 0.5), random_scored(1)
    losses = objective(s, args)
    found, good = dpo.metrics_of(dpo.sums_of(losses, s, args)), s.scores[:, 0] > 0
    r = 0.5 * (s.logps - s.ref_logps).detach()[:, 0]
    assert found["chosen_reward"] == pytest.approx(r[good].mean().item())
    assert found["rejected_reward"] == pytest.approx(r[~good].mean().item())
    assert found["rejected_logps"] == pytest.approx(s.logps[~good].mean().item())
    for one in (random_scored(1, seed=seed) for seed in range(8)):
        signs = zip((one.logps - one.ref_logps)[:, 0].tolist(), one.scores[:, 0].tolist(), strict=True)
        right = [(x > 0) == (label > 0) if x != 0 else 0.5 for x, label in signs]
        accuracy = dpo.metrics_of(dpo.sums_of(losses, one, args))["accuracy"]
        assert accuracy == pytest.approx(statistics.fmean(right)) and 0.5 in right
    only_bad = dpo.metrics_of(dpo.sums_of(losses, s._replace(scores=s.scores * 0), args))
    assert only_bad["chosen_reward"] == 0.0


def test_metrics_of_lists_are_those_of_their_ends():
    args, s = of("lipo", "--beta", 0.5), random_scored(4)
    found = dpo.metrics_of(dpo.sums_of(objective(s, args), s, args))
    r = 0.5 * (s.logps - s.ref_logps).detach()
    assert found["chosen_reward"] == pytest.approx(r[:, 0].mean().item())
    assert found["rejected_reward"] == pytest.approx(r[:, 3].mean().item())


def test_implicit_rewards_are_what_a_loss_compares():
    s = random_scored()
    for name, wanted in (
        ("ipo", (s.logps - s.ref_logps) / s.lengths),
        ("simpo", s.logps / s.lengths),
        ("cpo", s.logps),
    ):
        torch.testing.assert_close(dpo.implicit_rewards(s, of(name, "--beta", 0.25)), 0.25 * wanted.detach())
    torch.testing.assert_close(dpo.implicit_rewards(s, of("rrhf")), (s.logps / s.lengths).detach())


# ----------------------------------------------------------------------------------------------------------------------
# Data


def example_of(prompt, *answers) -> Example:
    return encode(prompt, answers, [1.0, 0.0][: len(answers)], tiny())


def test_credited_tokens_are_the_answer_and_its_end():
    e, tokenizer = example_of("Say 1 or 2.", "One.", "It is two."), tiny()
    assert tokenizer.decode(e.prompt) == "<|im_start|>user\nSay 1 or 2.<|im_end|>\n<|im_start|>assistant\n"
    for (ids, mask), text in zip(e.answers, ("One.", "It is two."), strict=True):
        assert tokenizer.decode(ids) == f"{text}<|im_end|>" and mask == [1] * len(ids)
    whole = chat.render(
        [{"role": "user", "content": "Say 1 or 2."}, {"role": "assistant", "content": "One."}], tokenizer
    )
    assert (e.prompt + e.answers[0].input_ids) == whole.input_ids[: len(e.prompt + e.answers[0].input_ids)]
    batch = collate([e], CPU)
    for row, (ids, mask) in zip(range(2), e.answers, strict=True):
        start = len(e.prompt)
        assert batch.input_ids[row, :start].tolist() == e.prompt and batch.completion_mask[row, :start].sum() == 0
        assert batch.input_ids[row, start : start + len(ids)].tolist() == ids
        assert batch.completion_mask[row].sum() == sum(mask)


def test_only_the_answer_of_a_long_conversation_is_credited():
    """What the assistant said before is prompt; of a longer answer, all that it says counts."""
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
              {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Say 1."}]  # fmt: skip
    long = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Two."}]  # fmt: skip
    e, tokenizer = example_of(prompt, "One.", long), tiny()
    assert tokenizer.decode(e.prompt).count("<|im_start|>") == 5 and "Hi!" in tokenizer.decode(e.prompt)
    credited = [tokenizer.decode([i for i, m in zip(*answer, strict=True) if m]) for answer in e.answers]
    assert credited == ["One.<|im_end|>", "One.<|im_end|>Two.<|im_end|>"]
    same_words = example_of("Say 1.", [{"role": "assistant", "content": "One."}], "One.")
    assert same_words.answers[0] == same_words.answers[1]


def test_a_prompt_that_is_written_otherwise_with_its_answer_is_refused(monkeypatch):
    whole = chat.render
    monkeypatch.setattr(
        chat,
        "render",
        lambda messages, tokenizer, **how: whole(
            [{"role": "system", "content": "x"}, *messages] if messages[-1]["role"] == "assistant" else messages,
            tokenizer,
            **how,
        ),
    )
    with pytest.raises(UserError, match="writes a prompt otherwise"):
        example_of("Say 1.", "One.")


def row_of(n_prompt: int, *lengths: int) -> Example:
    answers = [Row([100 * k + i for i in range(n)], [1] * n) for k, n in enumerate(lengths, start=1)]
    return Example(list(range(n_prompt)), answers, [1.0, 0.0])


@pytest.mark.parametrize("room", range(4, 34))
def test_prompts_are_cut_alike_and_answers_last(room):
    """D13, D2: one prompt for both answers, its end kept, at least half of the room if it is that long."""
    before, counts = row_of(12, 9, 20), Counter()
    args = Namespace(max_length=room, too_long="cut")
    (after,) = fit([before], args, counts)
    assert counts == ({"too long: cut": 1} if room < 32 else {})
    assert after.prompt == before.prompt[-len(after.prompt) :] and len(after.prompt) >= min(12, room // 2)
    for old, new in zip(before.answers, after.answers, strict=True):
        assert new.input_ids == old.input_ids[: len(new.input_ids)] and len(new.input_ids) == len(new.completion_mask)
        assert len(after.prompt) + len(new.input_ids) <= room
    if len(after.prompt) > max(room // 2, 0) and room < 32:
        assert len(after.answers[1].input_ids) == 20  # no answer was cut before the prompt had given what it could
    assert list(fit([before], Namespace(max_length=room, too_long="drop"), Counter())) == (
        [before] if room >= 32 else []
    )
    if room < 32:
        with pytest.raises(UserError, match=f"row 1 has 32 tokens, --max-length is {room}"):
            fit([before], Namespace(max_length=room, too_long="refuse"), Counter())


def test_pairs_that_are_the_same_are_dropped_and_counted():
    same_start = Example([1, 2], [Row([5, 6, 7], [1] * 3), Row([5, 6, 8], [1] * 3)], [1.0, 0.0])
    counts = Counter()
    assert len(fit([same_start], Namespace(max_length=5, too_long="cut"), counts)) == 1 and not counts
    assert fit([same_start], Namespace(max_length=4, too_long="cut"), counts) == []
    assert counts == {"too long: cut": 1, "with two answers that are the same: dropped": 1}
    counts = Counter()
    of_another = Example([1, 2], [Row([5, 6, 7], [0, 0, 1]), Row([5, 8, 9], [1, 1, 1])], [1.0, 0.0])  # a mean over none
    assert fit([of_another], Namespace(max_length=5, too_long="cut"), counts) == [of_another] and not counts
    assert fit([of_another], Namespace(max_length=4, too_long="cut"), counts) == []
    assert counts == {"too long: cut": 1, "with nothing left of an answer: dropped": 1}
    alone = Example([1], [Row([5], [1])], [0.0])
    assert fit([alone], Namespace(max_length=4, too_long="cut"), Counter()) == [alone]


def test_ranked_answers():
    answers = [Row([k], [1]) for k in range(4)]
    pair = dpo.ranked([9], answers, [0.5, 3.0, -1.0, 2.0], of("dpo"))
    assert pair == Example([9], [answers[1], answers[2]], [1.0, 0.0])
    whole = dpo.ranked([9], answers, [0.5, 3.0, -1.0, 2.0], of("lipo"))
    assert whole.answers == [answers[k] for k in (1, 3, 0, 2)]
    wins = [statistics.fmean(sigmoid(a - b) for j, b in enumerate((3.0, 2.0, 0.5, -1.0)) if j != i)
            for i, a in enumerate((3.0, 2.0, 0.5, -1.0))]  # fmt: skip
    assert whole.scores == pytest.approx(wins)


def test_written_pairs_are_the_annotators():
    args = of("dpo", "--steps", 3, "--batch-size", 2, "--seed", 5)
    rows = list(manners.preferences(6, 5, "train"))
    for e, row in zip(dpo.written_rows(args, tiny()), rows, strict=True):
        said = [chat.completion_text(ids, tiny()) for ids, _ in e.answers]
        assert said == [row["chosen"], row["rejected"]] and row["prompt"] in tiny().decode(e.prompt)


def requests(n: int, split: str = "train") -> list[tuple[list[int], dict]]:
    rows = [manners.draw_request(world.rng_for("test", i), split) for i in range(n)]
    return [(chat.prompt_ids(row["prompt"], tiny()), row) for row in rows]


def says(monkeypatch, texts) -> list[Namespace]:
    """A model that says `texts`, in turn; returns what `generate` was asked."""
    calls, turn = [], iter(texts)

    def generate(model, prompts, **how):
        calls.append(Namespace(model=model, prompts=prompts, **how))
        said = [next(turn) for _ in range(len(prompts) * how["samples"])]
        return Namespace(completions=[[*tiny().encode(text), tiny().eos_ids[0]] for text in said])

    monkeypatch.setattr(dpo, "generate", generate)
    return calls


def test_the_annotator_labels_samples_by_its_coin(one, monkeypatch):
    """Not by its utility alone: the worse of two answers comes first as often as the coin says; the same again."""
    prompts = requests(1) * 600
    asker = prompts[0][1]["asker"]
    kind, plain = f"Hello {asker}!", "Thank you for asking."  # 1.0 and 0.7
    calls, one.args.rollout_batch = says(monkeypatch, [kind, plain] * 1800), 7
    rows = dpo.sampled_rows(small(), tiny(), prompts, one.args, one)
    assert [call.samples for call in calls] == [2] * 3 and {call.temperature for call in calls} == {1.0}
    assert {call.rollout_batch for call in calls} == {7}
    with pytest.raises(UserError, match="--max-new-tokens 64: the longest prompt leaves room for 60"):
        dpo.sampled(small(), tiny(), [[1] * 99, [1] * 100], 1, 1.0, 0, one.args, one)
    (model := small()).virtual = 9  # positions of a prefix
    with pytest.raises(UserError, match="leaves room for 51$"):
        dpo.sampled(model, tiny(), [[1] * 99, [1] * 100], 1, 1.0, 0, one.args, one)
    assert len({call.seed for call in calls}) == 3
    first = statistics.fmean(chat.completion_text(e.answers[0].input_ids, tiny()) == kind for e in rows)
    assert first == pytest.approx(sigmoid(0.3), abs=0.06)
    assert dpo.sampled_rows(small(), tiny(), prompts, one.args, one) == rows
    loop_module.Loop.step, before = 7, {call.seed for call in calls}
    assert dpo.sampled_rows(small(), tiny(), prompts, one.args, one) != rows
    assert not before & {call.seed for call in calls[6:]}  # other samples, not only other coins
    assert all(e.scores == [1.0, 0.0] and e.answers[0].completion_mask[-1] == 1 for e in rows)


def test_samples_that_are_alike_teach_nothing(one, monkeypatch):
    says(monkeypatch, ["Go away now.", "Go away now.", "Go away now.", "Thank you for asking."] + ["a"] * 4)
    rows = dpo.sampled_rows(small(), tiny(), requests(2), one.args, one)
    assert [e.prompt for e in rows] == [requests(2)[1][0]]
    with pytest.raises(UserError, match="no prompt has two different answers"):
        dpo.sampled_rows(small(), tiny(), requests(2), one.args, one)


def test_lists_of_samples_are_ranked(one, monkeypatch):
    texts = [
        "Go away now.",
        "Thank you for asking.",
        "Have a nice day!",
        "Go away now. Do not bother me again. What a silly question.",
    ]
    says(monkeypatch, texts * 50)
    one.args = of("pro", "--out", one.out)
    rows = dpo.sampled_rows(small(), tiny(), requests(50), one.args, one)
    assert all(len(e.answers) == 4 and e.scores == sorted(e.scores, reverse=True) for e in rows)
    last = Counter(chat.completion_text(e.answers[-1].input_ids, tiny()) for e in rows)
    assert last.most_common(1)[0][0] == texts[3]


def test_other_judges(one, tmp_path, monkeypatch):
    """The policy's own opinion by the constitution, and a reward model from its folder."""
    import reward

    answers = [
        [
            Row([*tiny().encode(text), tiny().eos_ids[0]], [1] * (len(tiny().encode(text)) + 1))
            for text in ("Hi!", "Go away now.")
        ]
    ]
    model, prompts = small(tiny().vocab_size), requests(1)
    one.args.judge, asked, rules = "ai", small(tiny().vocab_size, seed=1), reward.CONSTITUTION
    monkeypatch.setattr(reward, "judge_of", lambda policy, args, loop: asked if policy is model else None)
    opinions = reward.opinions(asked, tiny(), ["Hi!", "Go away now."], rules, one.args, one)
    wanted = [reward.worth(opinions[text], rules) for text in ("Hi!", "Go away now.")]
    assert dpo.judged(model, tiny(), prompts, answers, one.args, one) == [pytest.approx(wanted, abs=1e-4)]
    judge = reward.with_scalar_head(model)
    save(judge, tiny(), tmp_path / "judge")
    one.args.judge = str(tmp_path / "judge")
    batch = collate([Example(prompts[0][0], answers[0], [0.0, 0.0])], CPU)
    wanted = reward.rewards_of(judge, batch.input_ids, batch.completion_mask).tolist()
    assert wanted[0] != wanted[1]
    assert dpo.judged(model, tiny(), prompts, answers, one.args, one) == [pytest.approx(wanted, abs=1e-4)]
    room = 20 - len(prompts[0][0])
    save(reward.with_scalar_head(small(tiny().vocab_size, max_length=20 + 63)), tiny(), tmp_path / "short")
    one.args.judge = str(tmp_path / "short")
    with pytest.raises(UserError, match=f"--max-new-tokens 64: .* leaves --judge room for {63 + room}$"):
        dpo.judged(model, tiny(), prompts, answers, one.args, one)
    one.args.judge = str(tmp_path / "judge")
    (tmp_path / "judge" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer is not the policy's"):
        dpo.judged(model, tiny(), prompts, answers, one.args, one)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save(small(tiny().vocab_size), tiny(), folder)
    return folder


def pairs(n: int = 8) -> list[dict]:
    """Answers of very different lengths."""
    return [{"prompt": f"Count to {i}." + " Please." * (i % 3), "chosen": "one two three " * (1 + i % 4) + f"{i}",
             "rejected": f"no {i}" * (1 + 3 * (i % 2))} for i in range(n)]  # fmt: skip


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", pairs())


def args_for(checkpoint: Path, data: Path | None, out: Path, *flags: object) -> Namespace:
    rows = ("--data", data) if data else ("--steps", 2, "--max-new-tokens", 8)
    argv = ["--model", checkpoint, *rows, "--out", out, "--device", "cpu", "--batch-size", 4, "--micro-batch-size", 4,
            "--max-length", 160, "--lr", 1e-3, "--warmup", 2, "--log-every", 1, *flags]  # fmt: skip
    return get_args(list(map(str, argv)))


def run(checkpoint: Path, data: Path | None, out: Path, *flags: object) -> dict:
    return main(args_for(checkpoint, data, out, *flags))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load(out / "checkpoint")[0].named_parameters())


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def watch(monkeypatch, name: str, look) -> None:
    """Have look(result, *arguments) called after every call of dpo.NAME."""
    whole = getattr(dpo, name)

    def watched(*arguments, **options):
        result = whole(*arguments, **options)
        look(result, *arguments)
        return result

    monkeypatch.setattr(dpo, name, watched)


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_a_run_is_a_plain_loop(checkpoint, data, tmp_path, name):
    """Loss, mean over the rows, schedule, clipping, AdamW: as somebody would write it who has one answer at a time."""
    flags = ("--steps", 3, "--grad-clip", 0.5, "--weight-decay", 0.3, "--loss", name)
    args = args_for(checkpoint, data, tmp_path / "out", *flags, "--batch-size", 8, "--micro-batch-size", 3)
    main(args)
    model, ref_model = load(checkpoint)[0], load(checkpoint)[0]
    rows = [dpo.from_file(row, tiny(), args) for row in pairs()]
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == decays], "weight_decay": 0.3 * decays}
              for decays in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, line in enumerate(logged(tmp_path / "out"), start=1):
        optimizer.zero_grad()
        z = 0.0
        if name == "kto":
            for i, e in enumerate(rows):
                other = Example(e.prompt, rows[(i + 1) % 8].answers, [0.0, 0.0])
                z += sum(logp_by_hand(model, other, k) - logp_by_hand(ref_model, other, k) for k in (0, 1)) / 16
        losses = []
        for e in rows:
            s = Scored(
                *(x[None] if x.dim() == 1 else x for x in answer_by_answer(model, ref_model, e)),
                torch.tensor(max(z, 0.0)),
            )
            losses.append(by_tensor(name, s, args))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        rate = args.lr * (step / 2 if step <= 2 else 1 - (step - 3) / 1)
        assert line["lr"] == pytest.approx(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert difference(weights(tmp_path / "out"), dict(model.named_parameters())) < 1e-4


def answer_by_answer(model, ref_model, e: Example) -> list[torch.Tensor]:
    """logps, ref_logps, lengths and scores (2,) of a pair."""
    sums = []
    for m in (model, ref_model):
        for ids, mask in e.answers:
            logps = m(torch.tensor([e.prompt + ids]))[0].log_softmax(-1)[len(e.prompt) - 1 : -1]
            sums.append((logps.gather(-1, torch.tensor(ids)[:, None])[:, 0] * torch.tensor(mask)).sum())
    logps, ref_logps = torch.stack(sums).chunk(2)
    return [logps, ref_logps.detach(), torch.tensor([sum(mask) for _, mask in e.answers]), torch.tensor([1.0, 0.0])]


def by_tensor(name: str, s: Scored, args: Namespace) -> torch.Tensor:
    r = (s.logps - s.ref_logps)[0]
    if name == "dpo":
        return -torch.log(torch.sigmoid(args.beta * (r[0] - r[1])))
    if name == "kto":
        up, down = torch.sigmoid(args.beta * (r[0] - s.baseline)), torch.sigmoid(args.beta * (s.baseline - r[1]))
        return (args.desirable_weight * (1 - up) + args.undesirable_weight * (1 - down)) / 2
    mean = (s.logps / s.lengths)[0]
    return -torch.log(torch.sigmoid(args.beta * (mean[0] - mean[1]) - args.gamma))


@pytest.mark.parametrize(
    ("name", "start"), [("dpo", LN2), ("robust", LN2), ("tdpo", LN2), ("kto", 0.5), ("bco", 2 * LN2)]
)
def test_a_run_begins_where_the_policy_is_its_reference(checkpoint, data, tmp_path, name, start, monkeypatch):
    """D4, D5: in train mode, to 1e-6; then it moves, and not a byte of the reference does."""
    seen = []
    watch(
        monkeypatch, "score", lambda s, model, ref_model, batch, args: seen.append((model, ref_model, model.training))
    )
    for precision in ("fp32", "bf16"):
        run(checkpoint, data, tmp_path / "out", "--loss", name, "--steps", 4, "--dtype", precision)
        first, *_, last = logged(tmp_path / "out")
        assert first["loss"] == pytest.approx(start, abs=1e-6) and abs(last["loss"] - start) > 1e-4
        assert abs(first["margin"]) < 3e-6 and first["chosen_reward"] == pytest.approx(0, abs=3e-6)
    before = dict(load(checkpoint)[0].named_parameters())
    (ref_model,) = {id(ref): ref for model, ref, _ in seen[: len(seen) // 2] if ref is not None}.values()
    assert all(ref is not model for model, ref, _ in seen) and any(training for *_, training in seen)
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in ref_model.named_parameters())
    assert all(not torch.equal(before[name], p) for name, p in weights(tmp_path / "out").items())


@pytest.mark.parametrize("name", ["dpo", "kto", "cpo", *(pytest.param(name, marks=pytest.mark.slow)
                                                         for name in ("ipo", "bco", "orpo", "tdpo"))])  # fmt: skip
def test_splitting_a_batch_changes_nothing(checkpoint, data, tmp_path, name):
    """Ragged rows in one forward pass, in parts or one by one: the same loss, metrics, gradient norm and weights."""
    found = []
    for size in (8, 3) if name != "kto" else (8, 3, 1):
        out = tmp_path / str(size)
        run(checkpoint, data, out, "--loss", name, "--steps", 2, "--batch-size", 8, "--micro-batch-size", size)
        found.append((logged(out), weights(out)))
    for lines, found_weights in found[1:]:
        for a, b in zip(found[0][0], lines, strict=True):
            for metric in a.keys() - {"seconds", "tokens_per_second"}:
                if metric != "accuracy" or a["step"] > 1:  # at first all pairs tie, but for rounding
                    assert b[metric] == pytest.approx(a[metric], rel=1e-3, abs=1e-5), metric
        assert difference(found[0][1], found_weights) < 1e-4


def on_a_rank(rank: int, folder: Path) -> None:
    for name in ("dpo", "kto", "orpo"):
        for parallel in ("replicas", "fsdp"):
            out = folder / f"{name}-{parallel}"
            run(folder / "model", folder / "pairs.jsonl", out, "--parallel", parallel, "--loss", name, *RANKS[name])


RANKS = {name: ("--steps", 2, "--batch-size", 5, "--micro-batch-size", 2, "--beta", beta)
         for name, beta in (("dpo", 0.1), ("kto", 1.0), ("orpo", 0.1))}  # fmt: skip


def test_two_ranks_equal_one(checkpoint, data, tmp_path):
    """Replicas and shards, 5 rows a step: of 3 and 2, so that one rank has an empty micro-batch."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    for name in ("dpo", "kto", "orpo"):
        run(checkpoint, data, tmp_path / name, "--loss", name, *RANKS[name])
        for parallel in ("replicas", "fsdp"):
            two = tmp_path / f"{name}-{parallel}"
            for a, b in zip(logged(tmp_path / name), logged(two), strict=True):
                for metric in ("loss", "margin", "rejected_reward", "chosen_logps", "grad_norm"):
                    assert b[metric] == pytest.approx(a[metric], rel=1e-3, abs=1e-5), (name, parallel, metric)
            assert difference(weights(tmp_path / name), weights(two)) < 1e-4


@pytest.mark.parametrize("name", ["dpo", "kto", "bco", "nn"])
def test_a_reference_computed_before_is_the_same(checkpoint, data, tmp_path, name, monkeypatch):
    """--precompute-ref: the same numbers, and no second model."""
    copies = []
    watch(monkeypatch, "frozen", lambda copy, model: copies.append(copy))
    flags = ("--loss", name, "--steps", 4, "--max-new-tokens", 4, *(("--answers", 3) if name == "nn" else ()))
    live = run(checkpoint, data, tmp_path / "live", *flags)
    assert len(copies) == 1
    before = run(checkpoint, data, tmp_path / "before", *flags, "--precompute-ref")
    assert len(copies) == 1
    for a, b in zip(logged(tmp_path / "live"), logged(tmp_path / "before"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["margin"] == pytest.approx(a["margin"], abs=1e-5)
    assert difference(weights(tmp_path / "live"), weights(tmp_path / "before")) < 1e-4
    assert before["after"] == live["after"] and before["metrics"]["loss"]["after"] == pytest.approx(
        live["metrics"]["loss"]["after"], rel=1e-4
    )


def test_a_loss_without_a_reference_makes_none(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "frozen", None)
    for name in ("orpo", "simpo", "cpo"):
        result = run(checkpoint, data, tmp_path / name, "--loss", name, "--steps", 2)
        assert result["metric"] == "pair accuracy" and result["variant"] == name


def test_held_out_pairs(checkpoint, tmp_path, monkeypatch):
    """Accuracy and loss of the implicit reward on rows that are not trained on, by hand."""
    rows, out = pairs(40), tmp_path / "out"
    file = write_jsonl(tmp_path / "many.jsonl", rows)
    args, used = args_for(checkpoint, file, out, "--steps", 6), trained_on(monkeypatch)
    result = main(args)
    train, held_out = dpo.formats.hold_out([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    model, ref_model = load(out / "checkpoint")[0], load(checkpoint)[0]
    margins = []
    for row in held_out:
        logps, ref_logps, *_ = answer_by_answer(model, ref_model, dpo.from_file(row, tiny(), args))
        margins.append(((logps - ref_logps)[0] - (logps - ref_logps)[1]).item())
    assert result["n"] == len(held_out) == 16 and result["before"] == 0.5
    assert used == [dpo.from_file(row, tiny(), args) for row in train]
    assert result["after"] == pytest.approx(statistics.fmean(m > 0 for m in margins))
    wanted = statistics.fmean(-math.log(sigmoid(args.beta * m)) for m in margins)
    assert result["metrics"]["loss"]["after"] == pytest.approx(wanted, rel=1e-4)
    assert result["metrics"]["loss"]["before"] == pytest.approx(LN2, rel=1e-6)
    other = write_jsonl(tmp_path / "other.jsonl", rows[:3])
    assert run(checkpoint, file, out, "--steps", 1, "--eval-data", other)["n"] == 3


def test_held_out_prompts_are_answered(checkpoint, data, tmp_path, monkeypatch):
    """KL and length of one sample to each of a few different prompts that leave room; the policy's, not the start's."""
    monkeypatch.setattr(dpo, "PROMPTS", 3)
    answers = {}
    watch(monkeypatch, "sampled", lambda rows, model, tokenizer, prompts, samples, temperature, seed, args, loop:
          answers.update({(seed, len(answers)): (prompts, [row[0] for row in rows], samples, temperature,
                                                 next(model.parameters()).requires_grad)}))  # fmt: skip
    long, *rows = pairs(6)
    long["prompt"] *= 20
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [long, rows[0], rows[0] | {"chosen": "Other."}, *rows[1:]])
    flags = ("--steps", 2, "--lr", 1e-2, "--max-new-tokens", 30, "--eval-data", held_out, "--eval-every", 1)
    result = run(checkpoint, data, tmp_path / "out", *flags, "--max-length", 130)
    wanted = [chat.prompt_ids(row["prompt"], tiny()) for row in rows[:3]]
    assert len(answers) == len({seed for seed, _ in answers}) == 2  # at the start and at the end, of other draws
    assert all(some[0] == wanted and some[2:] == (1, 1.0, True) for some in answers.values())
    (_, old, *_), (_, new, *_) = answers.values()
    model, ref_model = load(tmp_path / "out" / "checkpoint")[0], load(checkpoint)[0]
    some = [Example(prompt, [answer], [1.0]) for prompt, answer in zip(wanted, new, strict=True)]
    kl = statistics.fmean(logp_by_hand(model, e, 0) - logp_by_hand(ref_model, e, 0) for e in some)
    metrics = result["metrics"]
    assert metrics["KL"]["after"] == pytest.approx(kl, rel=1e-3, abs=1e-4) and abs(kl) > 1e-3
    assert metrics["KL"]["before"] == 0 and metrics["KL"]["n"] == metrics["length"]["n"] == 3 < result["n"] == 7
    assert metrics["length"]["before"] == pytest.approx(statistics.fmean(len(answer.input_ids) for answer in old))
    assert metrics["length"]["after"] == pytest.approx(statistics.fmean(len(answer.input_ids) for answer in new))
    for more in (("--loss", "simpo"), ("--precompute-ref", "--credit")):  # no reference is held
        assert set(run(checkpoint, data, tmp_path / "out", *flags, *more)["metrics"]) == {"loss", "length"}
    assert set(run(checkpoint, data, tmp_path / "out", *flags, "--max-new-tokens", 155)["metrics"]) == {"loss"}


class Stop(Exception): ...


def stopping(after: int):
    class StopsAfter(Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == after:
                raise Stop

    return StopsAfter


@pytest.mark.parametrize(("world_run", "flags"), [
    pytest.param(False, (), marks=pytest.mark.slow),
    (False, ("--loss", "kto", "--precompute-ref")), (False, ("--rounds", 3, "--ref", "last")),
    (True, ("--online", "--rounds", 4)), (True, ("--online", "--rounds", 2, "--ref", "last", "--loss", "kto")),
    (True, ()),
])  # fmt: skip
def test_resuming_is_exact(checkpoint, data, tmp_path, monkeypatch, world_run, flags):
    """Stopped in the middle of a round: the reference and the samples of that round are the same as ever.

    Stopped at the end of one (the third of 4): the next round has samples of its own.
    """
    monkeypatch.setattr(dpo, "REQUESTS", 6)
    monkeypatch.setattr(world, "sft_test", lambda n: [world.exchange("add", world.rng_for("x", 1), "test")])
    flags = (*flags, "--steps", 7, "--save-every", 5)
    rows = None if world_run else data
    whole = run(checkpoint, rows, tmp_path / "whole", *flags)
    monkeypatch.setattr(dpo, "Loop", stopping(5))
    with pytest.raises(Stop):
        run(checkpoint, rows, tmp_path / "parts", *flags)
    monkeypatch.setattr(dpo, "Loop", Loop)
    parts = run(checkpoint, rows, tmp_path / "parts", *flags, "--resume")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, 8))
    for name in ("before", "after", "metrics"):
        assert parts[name] == whole[name]


def test_rounds_have_rows_and_references_of_their_own(checkpoint, data, tmp_path, monkeypatch):
    """sDPO: each round its part of the rows, each row once; the reference of a round is the policy at its start."""
    seen = []

    def look(s, model, ref_model, batch, args):
        if model.training:
            state = [p.detach().clone() for p in ref_model.parameters()]
            seen.append((Loop.step, batch.input_ids.tolist(), state, s))

    watch(monkeypatch, "score", look)
    run(checkpoint, data, tmp_path / "last", "--rounds", 2, "--ref", "last", "--steps", 4, "--batch-size", 2,
        "--micro-batch-size", 2, "--lr", 1e-2)  # fmt: skip
    rows = [tuple(map(tuple, ids)) for _, ids, *_ in seen]
    prompts = [{tuple(row)[:9] for row in ids} for ids in rows]
    assert not (prompts[0] | prompts[1]) & (prompts[2] | prompts[3])  # parts of the rows, not the same again
    assert not prompts[0] & prompts[1] and not prompts[2] & prompts[3]
    assert [step for step, *_ in seen] == [1, 2, 3, 4]
    first, _, third, fourth = (state for _, _, state, _ in seen)
    start = list(load(checkpoint)[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, start, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(third, start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(third, fourth, strict=True))
    margins = [line["margin"] for line in logged(tmp_path / "last")]
    assert abs(margins[0]) < 1e-5 and abs(margins[2]) < 1e-5 < abs(margins[1])
    run(checkpoint, data, tmp_path / "first", "--rounds", 2, "--steps", 4, "--batch-size", 2, "--micro-batch-size", 2,
        "--lr", 1e-2)  # fmt: skip
    assert abs(logged(tmp_path / "first")[2]["margin"]) > 1e-5


@pytest.fixture
def short_world(monkeypatch) -> None:
    monkeypatch.setattr(dpo, "REQUESTS", 8)
    monkeypatch.setattr(
        world, "sft_test", lambda n: [world.exchange("add", world.rng_for("x", i), "test") for i in range(3)]
    )


def test_online_rounds_sample_the_policy_anew(checkpoint, tmp_path, monkeypatch, short_world):
    rounds = []
    watch(
        monkeypatch,
        "sampled_rows",
        lambda rows, model, tokenizer, prompts, args, loop: rounds.append(
            (Loop.step, len(prompts), {tuple(ids) for ids, _ in prompts}, rows, [row for _, row in prompts],
             next(model.parameters()).requires_grad)
        ),
    )  # fmt: skip
    run(checkpoint, None, tmp_path / "out", "--online", "--rounds", 3, "--steps", 6)
    assert [(step, n) for step, n, *_ in rounds] == [(1, 8), (3, 8), (5, 8)]
    assert not rounds[0][2] & rounds[1][2] and rounds[0][3] != rounds[1][3]
    asked = [row for *_, some, _ in rounds for row in some]
    assert {world.split_of(f"{row['asker']} asks about {row['name']}") for row in asked} == {"train"}
    assert all(is_policy for *_, is_policy in rounds)  # not the reference, which is frozen
    rounds.clear()
    run(checkpoint, None, tmp_path / "out", "--steps", 6)
    assert [(step, n) for step, n, *_ in rounds] == [(0, 24)]


def test_the_world_is_measured_by_true_utility(checkpoint, tmp_path, monkeypatch, short_world, capsys):
    """One answer to each request before, another after, by independent draws; wins, ties half; KL by hand; skills."""
    texts = ["Go away now.", "I hope this helps.", "Nobody knows.", "Have a nice day! Thank you for asking.", "No. No."]
    says(monkeypatch, itertools.cycle([*texts, "Go away now.", "Thank you for asking."]))
    answers, who = {}, []

    def look(rows, model, tokenizer, prompts, samples, temperature, seed, args, loop):
        answers.setdefault((seed, temperature, len(prompts)), (prompts, [row[0] for row in rows]))
        who.append((seed, "policy" if next(model.parameters()).requires_grad else "reference"))

    watch(monkeypatch, "sampled", look)
    result = run(checkpoint, None, tmp_path / "out", "--lr", 1e-2)
    (prompts, old), (_, new) = answers[1, 1.0, 8], answers[2, 1.0, 8]
    asked = [manners.draw_request(world.rng_for("dpo test", i), "test") for i in range(8)]
    worth = [[manners.utility(chat.completion_text(ids, tiny()), row["asker"], row["name"])
              for row, (ids, _) in zip(asked, some, strict=True)] for some in (old, new)]  # fmt: skip
    wins = [1.0 if b > a else 0.5 if a == b else 0.0 for a, b in zip(*worth, strict=True)]
    assert result["metric"] == "win rate" and result["before"] == 0.5 and result["n"] == 8
    assert result["after"] == pytest.approx(statistics.fmean(wins))
    assert {0.0, 1.0} < set(wins) or set(wins) == {0.0, 1.0}
    spread = 1.96 * statistics.stdev(w - 0.5 for w in wins) / math.sqrt(8)
    assert result["ci95"] == pytest.approx(spread)
    metrics = result["metrics"]
    assert metrics["utility"]["before"] == pytest.approx(statistics.fmean(worth[0]))
    assert metrics["utility"]["after"] == pytest.approx(statistics.fmean(worth[1]))
    model, ref_model = load(tmp_path / "out" / "checkpoint")[0], load(checkpoint)[0]
    rows = [Example(prompt, [answer], [1.0]) for prompt, answer in zip(prompts, new, strict=True)]
    kl = statistics.fmean(logp_by_hand(model, e, 0) - logp_by_hand(ref_model, e, 0) for e in rows)
    assert metrics["KL"]["after"] == pytest.approx(kl, rel=1e-3) and metrics["KL"]["before"] == 0 and abs(kl) > 1e-3
    assert metrics["length"]["after"] == pytest.approx(statistics.fmean(len(answer.input_ids) for answer in new))
    assert set(metrics) == {"utility", "KL", "length", "skills"}
    assert who[-5:] == [(0, "policy"), (2, "policy"), (0, "policy"), (3, "reference"), (3, "policy")]
    assert answers[0, 0.0, 3] and capsys.readouterr().out.count("  user    ") == 3


@pytest.mark.parametrize("world_run", [False, True])
def test_the_end_is_measured_against_the_start(checkpoint, data, tmp_path, monkeypatch, short_world, world_run):
    """Not against the reference of the last round."""
    seen, data = [], None if world_run else data
    watch(monkeypatch, "evaluate", lambda found, model, ref_model, *rest: seen.append(ref_model))
    run(checkpoint, data, tmp_path / "out", "--rounds", 2, "--ref", "last", "--lr", 1e-2)
    start = list(load(checkpoint)[0].parameters())
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(start, seen[1].parameters(), strict=True))
    with pytest.raises(UserError, match="--rounds 3: there are 2 steps"):
        run(checkpoint, data, tmp_path / "out", "--rounds", 3)


def test_skills_are_what_sft_measures(checkpoint, tmp_path, monkeypatch, short_world, one):
    rows = [world.exchange("add", world.rng_for("x", i), "test") for i in range(3)]
    said = iter([["x"] * 8, [rows[0]["answer"], "<think>1 + 1 = 2.</think>" + rows[1]["answer"], "wrong"]])
    monkeypatch.setattr(
        dpo, "sampled", lambda *a: [[Row([*tiny().encode(t), tiny().eos_ids[0]], [1])] for t in next(said)]
    )
    args = args_for(checkpoint, None, tmp_path / "out")
    _, test = dpo.examples(Namespace(**vars(args) | {"pairs": "written"}), None, tiny(), one)
    found = dpo.evaluate(small(tiny().vocab_size), None, tiny(), test, None, args, one)
    assert found["skills"] == [1.0, 1.0, 0.0]
    assert all(world.split_of(f"{row['asker']} asks about {row['name']}") == "test" for _, row in test["requests"])


def test_the_world_can_measure_a_run_on_a_file(checkpoint, data, tmp_path, short_world):
    result = run(checkpoint, data, tmp_path / "out", "--steps", 2, "--eval-data", "world", "--max-new-tokens", 8)
    assert result["metric"] == "win rate" and result["n"] == 8


def test_credit_is_the_implicit_reward_of_each_token(checkpoint, data, tmp_path, capsys):
    run(checkpoint, data, tmp_path / "out", "--steps", 4, "--lr", 1e-2, "--credit", "--precompute-ref")
    out = capsys.readouterr().out
    args = args_for(checkpoint, data, tmp_path / "out")
    model, ref_model = load(tmp_path / "out" / "checkpoint")[0], load(checkpoint)[0]
    rows = [dpo.from_file(row, tiny(), args) for row in pairs()[:3]]
    wanted = []
    for e in rows:
        logps, ref_logps, *_ = answer_by_answer(model, ref_model, e)
        wanted += (args.beta * (logps - ref_logps)).tolist()
    assert [float(x) for x in re.findall(r"^ +([+-]\d+\.\d\d)  \033", out, re.MULTILINE)] == pytest.approx(
        wanted, abs=0.01
    )
    texts = re.sub("\033\\[[0-9;]*m", "", out)
    assert all(row["chosen"] + "<|im_end|>" in texts and row["rejected"] + "<|im_end|>" in texts for row in pairs()[:3])


def test_credit_is_shown_in_bf16_and_once(checkpoint, data, tmp_path, capsys, one):
    """A reference in bf16 is scored under autocast, like the policy; other ranks score and say nothing."""
    run(checkpoint, data, tmp_path / "out", "--steps", 1, "--credit", "--dtype", "bf16")
    assert capsys.readouterr().out.count("\033[30;48") > 20
    args = args_for(checkpoint, data, tmp_path / "out")
    test = {"pairs": [dpo.from_file(row, tiny(), args) for row in pairs()]}
    model, scored = small(tiny().vocab_size), []
    model.norm.register_forward_pre_hook(lambda *a: scored.append(1))
    for one.main in (False, True):
        scored.clear()
        dpo.show_credit(model, model, tiny(), test, args, one)
        assert bool(capsys.readouterr().out) == one.main and len(scored) == 6


def test_compiled_runs_see_few_lengths(checkpoint, data, tmp_path, monkeypatch, short_world):
    """Training, measuring, a reward model that judges, --credit."""
    import kernels
    import reward
    from model import Block

    save(reward.with_scalar_head(small(tiny().vocab_size)), tiny(), tmp_path / "judge")
    seen = []
    watch(monkeypatch, "collate", lambda batch, *how: seen.append(batch.input_ids.shape[1]))
    monkeypatch.setattr(kernels, "use_compile", lambda wanted: wanted)
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        run(checkpoint, data, tmp_path / "out", "--steps", 1, "--compile", "on", "--online", "--max-new-tokens", 8,
            "--judge", tmp_path / "judge", "--credit")  # fmt: skip
        run(checkpoint, data, tmp_path / "out", "--steps", 0, "--compile", "on", "--eval-data", "world",
            "--max-new-tokens", 8)  # fmt: skip
    assert len(seen) > 8 and all(length % 64 == 0 for length in seen)


@pytest.mark.parametrize("world_run", [False, True])
def test_every_number_is_explained(checkpoint, data, tmp_path, short_world, world_run):
    rows = None if world_run else data
    result = run(checkpoint, rows, tmp_path / "out", "--steps", 1, "--max-new-tokens", 8)
    for name in {result["metric"], *result["metrics"], *logged(tmp_path / "out")[0]} - {"step"}:
        assert f"`{name}`" in " ".join(dpo.__doc__.split()), f"--help does not explain {name!r}"


@pytest.mark.parametrize("world_run", [False, True])
def test_no_steps_are_no_steps(checkpoint, data, tmp_path, short_world, world_run):
    result = run(checkpoint, None if world_run else data, tmp_path / "out", "--steps", 0)
    assert result["seconds"] < 1 and not (tmp_path / "out" / "checkpoint").exists()
    assert world_run or result["before"] == result["after"]


def test_an_eval_file_that_compares_nothing_is_refused(checkpoint, data, tmp_path):
    alike = write_jsonl(tmp_path / "alike.jsonl", [{"prompt": "x", "completions": ["a", "b"], "scores": [1, 1]}])
    with pytest.raises(UserError, match="to train on or to measure"):
        run(checkpoint, data, tmp_path / "out", "--eval-data", alike)


def test_settings_are_resolved_and_kept(checkpoint, data, tmp_path, capsys):
    run(checkpoint, data, tmp_path / "out", "--loss", "simpo", "--steps", 1)
    assert "--loss simpo: lr 0.001, beta 2.5, gamma 1.4, sft_weight 0" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())["flags"]
    assert (kept["beta"], kept["gamma"], kept["sft_weight"]) == (2.5, 1.4, 0.0)
    with pytest.raises(UserError, match="--gamma was 1.4, now 1.0"):
        run(checkpoint, data, tmp_path / "out", "--loss", "simpo", "--steps", 1, "--gamma", 1, "--resume")
    for name, (_, _, defaults) in LOSSES.items():  # sizes and rate are of the model, the rest is of the data
        for data, model in itertools.product((False, True), repeat=2):
            args = of(name, *("--data", "x.jsonl") * data, *("--model", "x") * model)
            assert args.rollout_batch == (32 if model else None)
            assert all(getattr(args, flag) == values[model] for flag, values in dpo.DEFAULTS.items())
            for flag, values in defaults.items():
                assert getattr(args, flag) == values[model if flag == "lr" else data]
            assert args.steps == (None if data else dpo.WORLD_STEPS)


@pytest.mark.parametrize(("flags", "said"), [
    (("--gamma", 1), "--gamma: --loss dpo has none"),
    (("--loss", "simpo", "--precompute-ref"), "--loss simpo has no reference"),
    (("--loss", "orpo", "--ref", "last"), "--loss orpo has no reference"),
    (("--loss", "tdpo", "--precompute-ref"), "--loss tdpo needs the reference itself"),
    (("--online", "--precompute-ref"), "--precompute-ref is for rows"),
    (("--ref", "last", "--precompute-ref"), "--precompute-ref is for rows"),
    (("--ref", "last", "--parallel", "fsdp"), "--ref last copies whole models"),
    (("--label-smoothing", 0.5), "--label-smoothing"),
    (("--beta", 0), "--beta"),
    (("--answers", 1), "--answers"),
    (("--online", "--data", "x.jsonl"), "--judge annotator"),
    (("--online", "--pairs", "written"), "--online samples"),
    (("--loss", "all", "--data", "x.jsonl"), "--loss all"),
    (("--judge", "ai", "--data", "x.jsonl"), "--judge ranks sampled answers"),
    (("--judge", "ai", "--pairs", "written"), "--judge ranks sampled answers"),
    (("--pairs", "written", "--data", "x.jsonl"), "--pairs is of the generated world"),
    (("--epochs", 1), "--epochs are passes over the rows of --data"),
    (("--answers", 2, "--data", "x.jsonl"), "--answers are sampled"),
    (("--answers", 4, "--loss", "lipo", "--pairs", "written"), "--answers are sampled"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(list(map(str, flags)))


def test_flags_that_go_together():
    assert [of("dpo", *flags).epochs for flags in ((), ("--data", "x"), ("--data", "x", "--epochs", 2))] == [1, 1, 2]
    for flags in ((), ("--online", "--judge", "ai", "--data", "x"), ("--loss", "nn", "--data", "x"),
                  ("--loss", "nn", "--pairs", "written")):  # fmt: skip
        assert get_args([*flags, "--answers", "3"]).answers == 3


@pytest.mark.parametrize("flags", [(), ("--online", "--judge", "ai"), ("--loss", "nn")])
def test_samples_that_may_be_too_long_are_refused(checkpoint, data, tmp_path, flags):
    with pytest.raises(UserError, match=r"--max-length 100: the longest prompt has \d+ tokens, .* --max-new-tokens 84"):
        run(checkpoint, data if flags else None, tmp_path / "out", "--max-length", 100, "--max-new-tokens", 84, *flags)


# Files


def trained_on(monkeypatch) -> list[Example]:
    found = []
    watch(monkeypatch, "examples", lambda both, *rest: found.extend(both[0]))
    return found


def test_a_file_of_messages_with_several_turns_and_shared_beginnings(checkpoint, tmp_path, monkeypatch):
    """Prompts that begin alike, as text and as messages; a system message; replies of several turns."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
             {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Say 1."}]  # fmt: skip
    one, two = ({"role": "assistant", "content": text} for text in ("One.", "No."))
    more = [one, {"role": "user", "content": "And 2?"}, {"role": "assistant", "content": "Two."}]
    rows = [
        {"prompt": turns[:2], "chosen": "Hi!", "rejected": "Go."},
        {"prompt": turns, "chosen": [one], "rejected": [two]},
        {"prompt": turns, "chosen": more, "rejected": [two]},
        {"prompt": "Say 1.", "chosen": "One.", "rejected": "No."},
    ]
    used = trained_on(monkeypatch)
    run(checkpoint, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--steps", 2)
    assert len(used) == 4 and used[1].prompt[: len(used[0].prompt) - 4] == used[0].prompt[:-4]
    credited = [[tiny().decode([i for i, m in zip(*answer, strict=True) if m]) for answer in e.answers] for e in used]
    assert credited[1] == ["One.<|im_end|>", "No.<|im_end|>"] and credited[2][0] == "One.<|im_end|>Two.<|im_end|>"


def test_equal_pairs_of_a_file_are_dropped_and_said(checkpoint, tmp_path, monkeypatch, capsys):
    rows = [*pairs(4), {"prompt": "Say 1.", "chosen": "One.", "rejected": "One."}]
    used, file = trained_on(monkeypatch), write_jsonl(tmp_path / "rows.jsonl", rows)
    run(checkpoint, file, tmp_path / "out", "--steps", 1)
    assert len(used) == 4 and "1 rows with two answers that are the same: dropped" in capsys.readouterr().err
    run(checkpoint, write_jsonl(tmp_path / "good.jsonl", pairs(4)), tmp_path / "out", "--steps", 1, "--eval-data", file)
    assert "\n1 measured rows with two answers that are the same: dropped" in capsys.readouterr().err


@pytest.mark.parametrize("name", dpo.UNPAIRED)
def test_a_file_of_lone_answers_with_an_odd_batch(checkpoint, tmp_path, name, monkeypatch, capsys):
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}." * (1 + i % 2), "label": i % 3 == 0} for i in range(7)]
    used, file = trained_on(monkeypatch), write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run(checkpoint, file, tmp_path / "out", "--loss", name, "--steps", 5, "--batch-size", 3,
                 "--micro-batch-size", 2, "--max-new-tokens", 4, "--lr", 1e-2)  # fmt: skip
    of_bad = name in dpo.OF_BAD
    assert len(used) == (4 if of_bad else 7) and ("has no use for" in capsys.readouterr().err) == of_bad
    assert result["before"] == 0.5 < result["after"]
    lines = logged(tmp_path / "out")
    assert all(math.isfinite(line["loss"]) for line in lines) and lines[-1]["rejected_reward"] < 0
    with pytest.raises(UserError, match="expected prompt, chosen, rejected or prompt, completions, scores"):
        run(checkpoint, file, tmp_path / "out", "--loss", "dpo", "--steps", 1)


def test_a_file_of_scored_lists(checkpoint, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"Say {i}.", "completions": ["no", f"{i}", "so so"], "scores": [-1, 2.0, 0.5]} for i in range(4)]
    rows.append({"prompt": "Tie.", "completions": ["a", "b", "c"], "scores": [1, 1, 1]})
    used, file = trained_on(monkeypatch), write_jsonl(tmp_path / "rows.jsonl", rows)
    run(checkpoint, file, tmp_path / "out", "--loss", "lipo", "--steps", 2)
    assert "1 rows with equal scores: dropped" in capsys.readouterr().err
    said = [[chat.completion_text(ids, tiny()) for ids, _ in e.answers] for e in used]
    assert said[2] == ["2", "so so", "no"] and len(said) == 4
    run(checkpoint, file, tmp_path / "out", "--loss", "dpo", "--steps", 1)
    assert [chat.completion_text(ids, tiny()) for ids, _ in used[-1].answers] == ["3", "no"]
    rows[0] = {"prompt": "Two.", "completions": ["a", "b"], "scores": [1, 0]}
    with pytest.raises(UserError, match="the same number of answers in every row"):
        run(checkpoint, write_jsonl(tmp_path / "uneven.jsonl", rows), tmp_path / "out", "--loss", "pro", "--steps", 1)


def test_a_file_with_long_rows(checkpoint, data, tmp_path, capsys):
    with pytest.raises(UserError, match=r"row \d has \d+ tokens, --max-length is 24"):
        run(checkpoint, data, tmp_path / "out", "--max-length", 24, "--steps", 1)
    run(checkpoint, data, tmp_path / "out", "--max-length", 24, "--too-long", "cut", "--steps", 1)
    assert re.search(r"\d rows too long: cut", capsys.readouterr().err)
    with pytest.raises(UserError, match="no row is left"):
        run(checkpoint, data, tmp_path / "out", "--max-length", 8, "--too-long", "drop", "--steps", 1)
    with pytest.raises(UserError, match="--max-length 161"):
        run(checkpoint, data, tmp_path / "out", "--max-length", 161)


def test_a_table_of_all_losses(checkpoint, tmp_path, monkeypatch, short_world, capsys):
    """One row a loss, several seeds of the main ones; --resume keeps what is finished."""
    chosen = {name: LOSSES[name] for name in ("dpo", "pro", "simpo", "nn")}
    monkeypatch.setattr(dpo, "LOSSES", chosen)
    runs = []
    watch(monkeypatch, "evaluate", lambda found, *rest: runs.append(found))
    flags = ["--loss", "all", "--model", checkpoint, "--out", tmp_path / "all", "--steps", 2, "--seeds", 2,
             "--device", "cpu", "--batch-size", 2, "--max-length", 128, "--max-new-tokens", 6]  # fmt: skip
    args = list(map(str, flags))
    with pytest.raises(UserError, match="--beta: --loss pro has none"):
        main(get_args([*args, "--beta", "0.3"]))
    assert not runs  # not even of dpo, which comes first
    table = main(get_args(args))
    assert json.loads((tmp_path / "all" / "table.json").read_text()) == table
    assert [(row["loss"], row["seeds"]) for row in table["rows"]] == [
        ("SFT", 1),
        ("dpo", 2),
        ("pro", 1),
        ("simpo", 2),
        ("nn", 1),
    ]
    results = [json.loads((tmp_path / "all" / f"dpo-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    for column in ("utility", "KL", "length", "skills"):
        values = [result["metrics"][column]["after"] for result in results]
        assert table["rows"][1][column]["mean"] == pytest.approx(statistics.fmean(values))
        assert table["rows"][1][column]["spread"] == pytest.approx(statistics.stdev(values))
        assert table["rows"][0][column]["mean"] == results[0]["metrics"][column]["before"]
    assert table["rows"][1]["win rate"]["mean"] == statistics.fmean(r["after"] for r in results)
    assert table["rows"][0]["win rate"]["mean"] == 0.5 and results[0]["variant"] == "dpo"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["loss", "SFT", "dpo", "pro", "simpo", "nn"]
    assert (
        json.loads((tmp_path / "all" / "simpo-1" / "settings.json").read_text())["flags"]["gamma"]
        == chosen["simpo"][2]["gamma"][0]
    )
    n = len(runs)
    (tmp_path / "all" / "pro-0" / "result.json").unlink()
    with pytest.raises(UserError, match=r"dpo-0 has other settings: --lr was .* now 0\.5"):
        main(get_args([*args, "--resume", "--lr", "0.5"]))
    again = main(get_args([*args, "--resume"]))
    assert len(runs) == n + 1 and [row["utility"] for row in again["rows"]] == [row["utility"] for row in table["rows"]]
    fewer = main(get_args([*args, "--resume", "--seeds", "1"]))
    assert len(runs) == n + 1 and [row["seeds"] for row in fewer["rows"]] == [1] * 5
