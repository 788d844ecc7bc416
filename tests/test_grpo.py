"""Facts about grpo.py: losses by hand and as trl has them, KL by enumeration, bandits, rewards, whole runs."""

import json
import math
import random
import shutil
import statistics
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import grpo
from data import chat, world
from data.formats import UserError
from data.tokenizer import tiny
from grpo import KLS, LOSSES, Rollout, Tokens, get_args, main, objective, token_weights
from loop import Loop, RunFailed
from model import Config, Transformer, load, save
from reward import file_example
from tests.oracle import oracle
from tests.test_loop import on_two_ranks
from tests.test_ppo import NoFloat64

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_float64(request):
    """Maths in float64; whole runs, which take a checkpoint, as they are."""
    if "checkpoint" not in request.fixturenames and "default_run" not in request.node.name:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of(name: str, *flags: object) -> Namespace:
    return get_args(["--loss", name, *map(str, flags)])


def random_tokens(B: int = 6, T: int = 9, seed: int = 0) -> Tokens:
    """Ragged rows with a hole, as a tool leaves it; ratios from 0.3 to 3; an advantage a row."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g) * 3 - 0.1
    logps = (old + 0.5 * torch.randn(B, T, generator=g)).requires_grad_()
    ref = old + 0.4 * torch.randn(B, T, generator=g)
    starts, ends = torch.randint(1, 4, (B, 1), generator=g), torch.randint(5, T + 1, (B, 1), generator=g)
    place = torch.arange(T)
    mask = ((place >= starts) & (place < ends)).long()
    mask[0, 4] = 0
    advantages = torch.randn(B, 1, generator=g).expand(B, T)
    return Tokens(logps, old, advantages, mask, ref)


def loss_of(x: Tokens, args: Namespace, importance: torch.Tensor | None = None, longest: int = 20) -> torch.Tensor:
    n_rows, n_tokens = int(x.completion_mask.any(-1).sum()), int(x.completion_mask.sum())
    weights = token_weights(x.completion_mask, args.aggregate, n_rows=n_rows, n_tokens=n_tokens, longest=longest)
    return objective(x, weights, torch.ones_like(x.logps) if importance is None else importance, args)[0]


def by_hand(x: Tokens, args: Namespace, longest: int = 20) -> float:
    """The loss as the papers have it, one number at a time."""
    rows = []
    for b in range(len(x.logps)):
        places = [t for t in range(x.logps.shape[1]) if x.completion_mask[b, t]]
        logr = {t: (x.logps[b, t] - x.old_logps[b, t]).item() for t in places}
        a = x.advantages[b, 0].item()
        terms = []
        for t in places:
            r = math.exp(logr[t])
            if args.loss == "gspo":
                r = math.exp(sum(logr.values()) / len(places))
            if args.loss == "rloo":
                r = math.exp(sum(logr.values()))
            if args.loss == "cispo":
                term = min(r, 1 + args.clip_high) * a * x.logps[b, t].item()
            elif args.loss == "reinforce":
                term = r * a
            else:
                term = min(r * a, min(max(r, 1 - args.clip_low), 1 + args.clip_high) * a)
            d = (x.logps[b, t] - x.ref_logps[b, t]).item()
            kl = {"k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[args.kl]
            kl *= math.exp(logr[t]) if args.kl_weighted else 1
            terms.append(-term + args.beta * kl)
        rows.append(terms)
    total = sum(map(sum, rows))
    match args.aggregate:
        case "sequence":
            return sum(sum(row) / len(row) for row in rows) / len(rows)
        case "token":
            return total / sum(map(len, rows))
        case "constant":
            return total / (len(rows) * longest)
        case "sum":
            return total / len(rows)
    raise AssertionError


# ----------------------------------------------------------------------------------------------------------------------
# The losses


@pytest.mark.parametrize("kl", ["k2", "k3", "k3 weighted", "k2 weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_its_paper(name, kl):
    args = of(name, "--beta", 0.3, "--kl", kl[:2], *(["--kl-weighted"] if "weighted" in kl else []))
    if args.clip_low is not None and name != "gspo":
        args.clip_low, args.clip_high = 0.3, 0.4
    if name == "gspo":
        args.clip_low, args.clip_high = 0.05, 0.1
    if name == "cispo":
        args.clip_high = 0.5
    for seed in range(3):
        x = random_tokens(seed=seed)
        assert loss_of(x, args).item() == pytest.approx(by_hand(x, args), rel=1e-9)


def test_defaults_are_those_of_the_papers():
    found = {name: (args.clip_low, args.clip_high, args.aggregate) for name in LOSSES for args in [of(name)]}
    assert found["grpo"] == (0.2, 0.2, "sequence") and found["dapo"] == (0.2, 0.28, "token")
    assert found["gspo"] == (3e-4, 4e-4, "sequence") and found["dr_grpo"][2] == "constant"
    assert of("dapo").dynamic_sampling and of("dapo").overlong_buffer and not of("grpo").dynamic_sampling
    assert of("reinforce++").kl_coef > 0


def test_gradient_of_the_clipped_ratio():
    """P10: A > 0: 1, 1, 0 at ratios .5, 1, 1.5; A < 0: 0, -1, -1."""
    for a, wanted in ((1.0, [1, 1, 0]), (-1.0, [0, -1, -1])):
        ratio = torch.tensor([[0.5, 1.0, 1.5]], requires_grad=True)
        mask = torch.ones(1, 3, dtype=torch.long)
        x = Tokens(ratio.log(), torch.zeros(1, 3), torch.full((1, 3), a), mask)
        (gradient,) = torch.autograd.grad(-grpo.clipped(ratio, x, clip_low=0.2, clip_high=0.2).sum(), ratio)
        assert gradient.tolist() == [wanted]


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_update_is_the_policy_gradient(name):
    """Where pi is pi_old, the gradient of every loss is that of - A log pi, weighted as the loss weighs tokens."""
    x = random_tokens()
    x = x._replace(old_logps=x.logps.detach(), ref_logps=None)
    args = of(name)
    (gradient,) = torch.autograd.grad(loss_of(x, args), x.logps)
    mask = x.completion_mask
    weights = {"sequence": mask / mask.sum(-1, keepdim=True) / 6, "token": mask / mask.sum(), "sum": mask / 6,
               "constant": mask / (6 * 20)}[args.aggregate]  # fmt: skip
    if name == "rloo":
        weights = mask / 6.0  # the log-prob of a sequence is a sum
    torch.testing.assert_close(gradient, -x.advantages * weights)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "reinforce"])
def test_weights_of_long_and_short_answers(name):
    """G5: gradients of one token in answers of 10 and of 100."""
    mask = torch.zeros(2, 101, dtype=torch.long)
    mask[0, 1:11] = mask[1, 1:101] = 1
    weights = token_weights(mask, of(name).aggregate, n_rows=2, n_tokens=110, longest=200)
    wanted = {"grpo": (1 / 20, 1 / 200), "dapo": (1 / 110,) * 2, "dr_grpo": (1 / 400,) * 2, "reinforce": (1 / 2,) * 2}
    assert (weights[0, 1].item(), weights[1, 1].item()) == pytest.approx(wanted[name])
    assert weights[0, 0] == 0 and weights[0, 11] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_masked_positions_are_poisoned(name):
    """Value and gradient are blind to what stands where the mask is 0; padding is nothing; a masked row is gone."""
    args = of(name, "--beta", 0.1)
    x = random_tokens()
    dead = x.completion_mask == 0
    loss = loss_of(x, args)
    (gradient,) = torch.autograd.grad(loss, x.logps)
    assert (gradient[dead] == 0).all() and (gradient[~dead] != 0).any()
    wide = [torch.nn.functional.pad(t.detach(), (0, 3)) for t in x]
    dead = wide[3] == 0
    for poison in (1e6, float("inf"), float("nan")):
        spoiled = [t if i == 3 else t.masked_fill(dead, poison) for i, t in enumerate(wide)]
        spoiled[0].requires_grad_()
        y = Tokens(*spoiled)
        found = loss_of(y, args, torch.ones_like(y.logps).masked_fill(dead, poison))
        assert found.item() == pytest.approx(loss.item(), rel=1e-12)
        assert torch.autograd.grad(found, y.logps)[0][:, :9].equal(gradient)
    y = Tokens(*(t.detach()[1:] for t in x))
    gone = x._replace(completion_mask=x.completion_mask * torch.tensor([0, 1, 1, 1, 1, 1])[:, None])
    assert loss_of(gone, args).item() == pytest.approx(loss_of(y, args).item(), rel=1e-12)


def test_gspo_is_blind_to_padding_and_takes_the_mean_of_logs():
    """G16: ratios e^.3, e^-.1, e^0: exp(mean) 1.069, not the mean of exp 1.085, nor exp(sum) 1.221."""
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    logps = torch.tensor([[9.0, 0.3, -0.1, 0.0, 9.0]])
    x = Tokens(logps, torch.zeros(1, 5), torch.ones(1, 5), mask)
    assert grpo.mean_ratio(x)[0, 1].item() == pytest.approx(math.exp(0.2 / 3))
    assert grpo.sequence_ratio(x)[0, 1].item() == pytest.approx(math.exp(0.2))
    assert grpo.token_ratio(x)[0].tolist() == pytest.approx([1, math.exp(0.3), math.exp(-0.1), 1, 1])


def test_importance_is_truncated_and_a_constant():
    x = random_tokens()._replace(ref_logps=None)
    sampled = x.old_logps + torch.tensor([0.5, -0.4, -3.0, 0, 0, 0])[:, None]
    weights = grpo.truncated_importance(x.old_logps, sampled, 2.0)
    assert weights[:3, 2].tolist() == pytest.approx([math.exp(-0.5), math.exp(0.4), 2.0])
    args = of("dapo")
    mask, n = x.completion_mask, x.completion_mask.sum()
    plain = grpo.clipped(grpo.token_ratio(x), x, clip_low=0.2, clip_high=0.28)
    assert loss_of(x, args, weights).item() == pytest.approx(((plain * weights * mask).sum() / n).item())


# ----------------------------------------------------------------------------------------------------------------------
# Parity with trl


class Recorded(dict):
    def __missing__(self, key):
        self[key] = defaultdict(list)
        return self[key]


def trl_loss(x: Tokens, loss_type: str, *, level: str, beta: float, weighted: bool, low: float, high: float):
    """GRPOTrainer's own _compute_loss on these log-probs."""
    trainer = oracle("trl.trainer.grpo_trainer").GRPOTrainer
    accelerator = Namespace(gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1)
    config = Namespace(delta=None, use_bias_correction_kl=weighted, steps_per_generation=1)
    it = Namespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (x.logps, torch.zeros_like(x.logps), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, args=config, loss_type=loss_type, epsilon_low=low,
        epsilon_high=high, use_vllm=False, model=Namespace(training=True), current_gradient_accumulation_steps=1,
        max_completion_length=20, accelerator=accelerator, _entropy_bonus_enabled=False, _metrics=Recorded(),
    )  # fmt: skip
    inputs = {"prompt_ids": torch.zeros(6, 0), "prompt_mask": torch.zeros(6, 0), "completion_ids": x.logps,
              "completion_mask": x.completion_mask, "advantages": x.advantages[:, 0],
              "old_per_token_logps": x.old_logps, "ref_per_token_logps": x.ref_logps,
              "num_items_in_batch": x.completion_mask.sum()}  # fmt: skip
    return trainer._compute_loss(it, None, inputs)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo"])
def test_parity_with_trl(name, weighted):
    """Value and gradient; trl's importance weight of the KL is, at the level of sequences, not that of a token."""
    x = random_tokens(seed=3)
    args = of(name, "--beta", 0.0 if name == "gspo" else 0.2)
    args.kl_weighted = weighted
    low, high = (0.1, 0.15) if name == "gspo" else (0.2, 0.28)
    args.clip_low, args.clip_high = (None if name == "cispo" else low), high
    theirs = trl_loss(x, "grpo" if name == "gspo" else name, level="sequence" if name == "gspo" else "token",
                      beta=args.beta, weighted=weighted, low=low, high=1 + high if name == "cispo" else high)
    ours = loss_of(x, args)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss, x.logps)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.slow  # importing trl takes seconds
def test_parity_with_trl_of_rloo():
    """RLOOTrainer's own _compute_loss."""
    trainer = oracle("trl.trainer.rloo_trainer").RLOOTrainer
    x = random_tokens(seed=1)._replace(ref_logps=None)
    accelerator = Namespace(gather=lambda t: t, reduce=lambda t, reduction: t)
    it = Namespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (x.logps, torch.zeros_like(x.logps), None),
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.3, model=Namespace(training=True),
        accelerator=accelerator, _metrics=Recorded(),
    )  # fmt: skip
    inputs = {"prompt_ids": torch.zeros(6, 0), "prompt_mask": torch.zeros(6, 0), "completion_ids": x.logps,
              "completion_mask": x.completion_mask, "advantages": x.advantages[:, 0],
              "old_logps": (x.old_logps * x.completion_mask).sum(-1)}  # fmt: skip
    theirs = trainer._compute_loss(it, None, inputs)
    args = of("rloo", "--clip-low", 0.2, "--clip-high", 0.3)
    torch.testing.assert_close(loss_of(x, args), theirs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss, x.logps)[0] for loss in (loss_of(x, args), theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def rewards(P: int = 4, G: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(P, G, generator=torch.Generator().manual_seed(seed)), torch.ones(P, G, dtype=torch.bool)


def test_advantages_by_hand():
    r, all_of_them = rewards()
    for p, row in enumerate(r.tolist()):
        mean, std = statistics.fmean(row), statistics.stdev(row)
        z = [(x - mean) / (std + 1e-4) for x in row]
        assert grpo.standardized(r, all_of_them, 9.0)[p].tolist() == pytest.approx(z)
        assert grpo.centred(r, all_of_them, 9.0)[p].tolist() == pytest.approx([x - mean for x in row])
        others = [x - (sum(row) - x) / (len(row) - 1) for x in row]
        assert grpo.leave_one_out(r, all_of_them, 9.0)[p].tolist() == pytest.approx(others)
        assert grpo.minus_baseline(r, all_of_them, 0.7)[p].tolist() == pytest.approx([x - 0.7 for x in row])
    flat = r.flatten().tolist()
    wanted = [(x - statistics.fmean(flat)) / (statistics.stdev(flat) + 1e-4) for x in flat]
    assert grpo.batch_standardized(r, all_of_them, 9.0).flatten().tolist() == pytest.approx(wanted)


def test_a_group_is_compared_with_itself_only():
    """G1, G25: another group's rewards, shifted by 100, change nothing; negative rewards keep their order."""
    r, all_of_them = rewards()
    shifted = r.clone()
    shifted[1] += 100
    for function in (grpo.standardized, grpo.centred, grpo.leave_one_out):
        torch.testing.assert_close(function(shifted, all_of_them, 0.0), function(r, all_of_them, 0.0))
        low = function(r - 50, all_of_them, 0.0)
        assert (low.argsort(-1) == r.argsort(-1)).all() and low.sum().abs() < 1e-9
    assert not torch.allclose(grpo.batch_standardized(shifted, all_of_them, 0.0)[0],
                              grpo.batch_standardized(r, all_of_them, 0.0)[0])
    equal = torch.full((2, 4), 0.1)
    assert (grpo.standardized(equal, equal > 0, 0.0).abs() < 1e-9).all()


def test_the_baseline_of_an_answer_does_not_hold_its_own_reward():
    """G17."""
    r, all_of_them = rewards()
    other = r.clone()
    other[2, 3] += 5
    a, b = (grpo.leave_one_out(x, all_of_them, 0.0)[2, 3] for x in (r, other))
    assert (b - a).item() == pytest.approx(5)
    assert torch.allclose(grpo.leave_one_out(r, all_of_them, 0.0), grpo.centred(r, all_of_them, 0.0) * 5 / 4)


@pytest.mark.parametrize(
    "function", ["standardized", "centred", "leave_one_out", "batch_standardized", "minus_baseline"]
)
def test_a_row_that_does_not_count_is_as_good_as_gone(function):
    """G23: whatever its reward is, its siblings' advantages are those of the group without it, and its own is 0."""
    r, counted = rewards()
    counted[:, 1] = False
    of_group = getattr(grpo, function)
    for poison in (1e6, math.nan):
        found = of_group(r.masked_fill(~counted, poison), counted, 0.3)
        rest = [0, 2, 3, 4]
        assert (found[:, 1] == 0).all()
        torch.testing.assert_close(found[:, rest], of_group(r[:, rest], counted[:, rest], 0.3))
    lone = torch.zeros(1, 3, dtype=torch.bool)
    lone[0, 0] = True
    assert of_group(r[:1, :3], lone, 0.0).isfinite().all()


def test_step_rewards_are_summed_to_the_end():
    """DeepSeekMath 4.1.3: two answers with two and one step; standardized over all three, summed from each token on."""
    scores = torch.zeros(1, 2, 6)
    ends = torch.zeros(1, 2, 6, dtype=torch.bool)
    for g, t, value in ((0, 2, 0.9), (0, 4, 0.1), (1, 3, 0.6)):
        scores[0, g, t], ends[0, g, t] = value, True
    z = [(v - statistics.fmean([0.9, 0.1, 0.6])) / (statistics.stdev([0.9, 0.1, 0.6]) + 1e-4) for v in (0.9, 0.1, 0.6)]
    found = grpo.process_advantages(scores.masked_fill(~ends, 77.0), ends)[0]
    assert found[0].tolist() == pytest.approx([z[0] + z[1]] * 3 + [z[1]] * 2 + [0])
    assert found[1].tolist() == pytest.approx([z[2]] * 4 + [0, 0])


def one_rank(*flags: object) -> tuple[Namespace, Loop]:
    args = get_args(["--out", "/nowhere", "--device", "cpu", *map(str, flags)])
    return args, Loop(args, "grpo")


def some_rollout(P: int, G: int, T: int = 9) -> Rollout:
    x = random_tokens(P * G, T)
    return Rollout(torch.zeros(P * G, T, dtype=torch.long), x.completion_mask, x.old_logps, ["a"] * P * G,
                   ["a"] * P * G, torch.ones(P * G, dtype=torch.bool))  # fmt: skip


def test_every_token_gets_its_answers_advantage():
    """G2: reward equal to the prompt's number: no advantage at all. Else each row its own, on its own tokens."""
    args, loop = one_rank("--loss", "dr_grpo", "--batch-size", 3)
    rollout, counted = some_rollout(3, 4), torch.ones(3, 4, dtype=torch.bool)
    of_prompt = torch.arange(3.0)[:, None].expand(3, 4)
    assert (grpo.advantages_of(rollout, of_prompt, counted, None, None, 0.0, args, loop) == 0).all()
    r = torch.randn(3, 4)
    found = grpo.advantages_of(rollout, r, counted, None, None, 0.0, args, loop)
    wanted = (r - r.mean(-1, keepdim=True)).flatten()[:, None] * rollout.completion_mask
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "reinforce++"])
def test_advantages_need_no_float64(name):
    """Rewards are float64 on the CPU; on the device, here meta, nothing is."""
    steps_count = ("--process-weight", 1) if name == "grpo" else ()
    args, loop = one_rank("--loss", name, "--batch-size", 3, "--reward", "prm", *steps_count)
    torch.set_default_dtype(torch.float32)
    rollout, counted = some_rollout(3, 4), torch.ones(3, 4, dtype=torch.bool)
    rollout = rollout._replace(**{name: x.to("meta") for name, x in rollout._asdict().items() if torch.is_tensor(x)})
    steps = torch.zeros(3, 4, 9, device="meta"), torch.ones(3, 4, 9, dtype=torch.bool, device="meta")
    with NoFloat64("meta"):
        found = grpo.advantages_of(rollout, torch.rand(3, 4).double(), counted, steps, None, 0.0, args, loop)
    assert found.shape == (12, 9) and found.dtype == torch.float32


def test_the_kl_is_taken_off_the_reward():
    """RLOO: the whole answer's, before the group is compared, as RLOOTrainer does. REINFORCE++: from each token on."""
    to_go = torch.randn(12, 9)
    r, counted = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    args, loop = one_rank("--loss", "rloo", "--kl-coef", 0.3, "--batch-size", 3)
    rollout = some_rollout(3, 4)
    found = grpo.advantages_of(rollout, r, counted, None, to_go, 0.0, args, loop)
    shaped = r - 0.3 * to_go[:, 0].view(3, 4)
    wanted = ((shaped - shaped.mean(-1, keepdim=True)) * 4 / 3).flatten()[:, None] * rollout.completion_mask
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    args, loop = one_rank("--loss", "reinforce++", "--kl-coef", 0.3, "--batch-size", 3)
    found = grpo.advantages_of(rollout, r, counted, None, to_go, 0.0, args, loop)
    mask = rollout.completion_mask.bool()
    raw = r.flatten()[:, None] - 0.3 * to_go
    torch.testing.assert_close(found[mask].double(), (raw[mask] - raw[mask].mean()) / (raw[mask].std() + 1e-4),
                               rtol=1e-5, atol=1e-5)
    assert (found[~mask] == 0).all()


def test_entropy_coefficient_is_the_surveys_equation_22():
    r = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert grpo.entropy_coefficient(0.5, 2.0, r) == pytest.approx(0.5 * math.exp(-2 * 0.1875))
    assert grpo.entropy_coefficient(0.5, 0.0, r) == 0.5


def test_overlong_penalty_and_majority():
    lengths = torch.tensor([10.0, 80.0, 90.0, 100.0, 120.0])
    assert grpo.overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.5, -1, -1]
    assert grpo.majority(["3", "4", "4", "", "5"]) == [0, 1, 1, 0, 0]
    assert grpo.majority(["", ""]) == grpo.majority(["a", "b"]) == [0, 0] and grpo.majority(["a", ""]) == [1, 0]
    assert grpo.majority(["b", "a", "a", "b"]) == [1, 0, 0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# KL by enumeration, and bandits


def five() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of pi, of pi_old and log-probs of ref of a choice among five."""
    g = torch.Generator().manual_seed(4)
    theta = torch.randn(5, generator=g, requires_grad=True)
    return theta, theta.detach() + 0.5 * torch.randn(5, generator=g), torch.randn(5, generator=g).log_softmax(-1)


def enumerated(estimator: str, weighted: bool, off_policy: bool) -> tuple[torch.Tensor, ...]:
    """(expectation under pi_old, its gradient, KL(pi || ref), its gradient, gradient of KL(ref || pi))."""
    theta, old_theta, ref = five()
    old = (old_theta if off_policy else theta.detach()).log_softmax(-1)
    logps = theta.log_softmax(-1)
    x = Tokens(logps[None], old[None], torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.long), ref[None])
    value = (old.exp() * KLS[estimator](x, weighted=weighted)[0]).sum()
    kl, other = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    return value, *(torch.autograd.grad(y, theta, retain_graph=True)[0] if i != 1 else y
                    for i, y in ((0, value), (1, kl), (2, kl), (3, other)))  # fmt: skip


def test_estimators_of_the_kl():
    """G10, G11: k3's value is KL, its gradient that of KL(ref || pi); k2's and weighted k3's are KL's own."""
    value, gradient, kl, of_kl, of_other = enumerated("k3", weighted=False, off_policy=False)
    assert value.item() == pytest.approx(kl.item())
    torch.testing.assert_close(gradient, of_other)
    assert (gradient - of_kl).norm() / of_kl.norm() > 0.1
    _, gradient, _, of_kl, _ = enumerated("k2", weighted=False, off_policy=False)
    torch.testing.assert_close(gradient, of_kl)
    for off_policy in (False, True):
        value, gradient, kl, of_kl, _ = enumerated("k3", weighted=True, off_policy=off_policy)
        assert value.item() == pytest.approx(kl.item())
        torch.testing.assert_close(gradient, of_kl)
        _, gradient, _, of_kl, _ = enumerated("k2", weighted=True, off_policy=off_policy)
        torch.testing.assert_close(gradient, of_kl)


def test_k1_is_refused_in_the_loss_with_the_reason():
    with pytest.raises(UserError, match="expectation of its gradient is 0"):
        of("grpo", "--kl", "k1", "--beta", 0.1)
    theta, _, ref = five()
    logps = theta.log_softmax(-1)
    expectation = (logps.detach().exp() * (logps - ref)).sum()
    torch.testing.assert_close(torch.autograd.grad(expectation, theta)[0], torch.zeros(5))


REWARD, REF, BETA = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5]), 0.5


def rest_of(name: str, *flags: object, kl_coef: float = 0.0) -> torch.Tensor:
    """Where gradient descent on a bandit with three arms rests; a group is 2000 draws in exact proportion to pi."""
    args = of(name, *flags)
    theta, G = REF.double().log().clone().requires_grad_(), 2000
    _, _, of_group, _ = LOSSES[name]
    arms = ((torch.arange(G) + 0.5) / G).double()
    for _ in range(200):
        pi = theta.log_softmax(-1)
        a = torch.searchsorted(pi.detach().exp().cumsum(-1), arms).clamp(max=2)
        logps = pi[a][:, None]
        reward = REWARD.double()[a][None] - kl_coef * (logps.detach()[:, 0] - REF.double().log()[a])[None]
        advantages = of_group(reward, torch.ones(1, G, dtype=torch.bool), reward.mean().item()).view(G, 1)
        ref = REF.double().log()[a][:, None]
        x = Tokens(logps, logps.detach(), advantages, torch.ones(G, 1, dtype=torch.long), ref)
        loss = loss_of(x, args, longest=1)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 2.0 * gradient).detach().requires_grad_()
    return theta.softmax(-1).detach()


@pytest.mark.parametrize(("name", "flags"), [
    ("rloo", ("--kl", "k2")), ("rloo", ("--kl", "k3", "--kl-weighted")), ("dr_grpo", ("--kl", "k2")),
    ("dr_grpo", ("--kl", "k3", "--kl-weighted")),
])  # fmt: skip
def test_bandits_rest_at_the_closed_form(name, flags):
    wanted = REF.double() * (REWARD.double() / BETA).exp()
    torch.testing.assert_close(rest_of(name, "--beta", BETA, *flags), wanted / wanted.sum(), rtol=0.01, atol=0)


def test_kl_in_the_reward_rests_there_too():
    wanted = REF.double() * (REWARD.double() / BETA).exp()
    torch.testing.assert_close(rest_of("rloo", kl_coef=BETA), wanted / wanted.sum(), rtol=0.01, atol=0)


def test_plain_grpo_rests_elsewhere():
    """At ref * exp(r / (beta std)), std that of its own rewards: what its docstring says."""
    found = rest_of("grpo", "--beta", 1.0, "--kl", "k2")
    r = REWARD.double()
    std = ((found * r**2).sum() - (found * r).sum() ** 2).sqrt()
    wanted = REF.double() * (r / std).exp()
    torch.testing.assert_close(found, wanted / wanted.sum(), rtol=0.01, atol=0)
    said = grpo.standardized.__doc__.split("fixed point ")[1].split(".\n")[0].replace(",", "").split()[:3]
    said = [float(word) for word in said]
    assert found.tolist() == pytest.approx(said, abs=0.006)
    closed = REF.double() * r.exp()
    assert (found - closed / closed.sum()).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and rewards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model that says one to eleven random digits and ends, most of the time."""
    torch.manual_seed(0)
    model, rng = Transformer(Config.from_depth(1, tiny().vocab_size, 160)), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = get_args(["--preset", ""])
    for i in range(60):
        prompts = [grpo.world_task(args, tiny(), ("warm", i, b), "train").prompt for b in range(16)]
        digits = ["".join(rng.choice("0123456789") for _ in range(rng.randint(1, 11))) for _ in prompts]
        said = [[*tiny().encode(text), tiny().eos_ids[0]] for text in digits]
        width = max(len(p) + len(c) for p, c in zip(prompts, said, strict=True))
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, said, strict=True)])
        mask = torch.tensor([[0] * len(p) + [1] * len(c) + [0] * (width - len(p) - len(c))
                             for p, c in zip(prompts, said, strict=True)])  # fmt: skip
        (-grpo.score(model, ids, mask, tiny(), 1.0)[0].sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model")
    save(model, tiny(), folder)
    return folder


REWARD_FILE = """
def shorter(prompt, completion, row):
    return 1.0 / (1 + len(completion)) + 0.01 * (len(row.get("answer", "")) + len(prompt) % 7)
def bad(prompt, completion, row):
    return float("nan")
"""


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(REWARD_FILE)
    return f"{tmp_path / 'mine.py'}:shorter"


def args_for(checkpoint: Path, out: Path, *flags: object) -> Namespace:
    argv = ["--model", checkpoint, "--out", out, "--device", "cpu", "--batch-size", 4, "--group-size", 3, "--steps", 3,
            "--lr", 1e-3, "--max-new-tokens", 12, "--tests", 6, "--show-every", 0, "--max-length", 128,
            "--micro-batch-size", 256, "--warmup", 2, *flags]  # fmt: skip
    return get_args(list(map(str, argv)))


def run(checkpoint: Path, out: Path, *flags: object) -> dict:
    return main(args_for(checkpoint, out, *flags))


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load(out / "checkpoint")[0].named_parameters())


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def asked(checkpoint, tmp_path, *flags: object) -> tuple[Namespace, Loop, Transformer, list[grpo.Task]]:
    args = args_for(checkpoint, tmp_path / "out", *flags)
    tasks = [grpo.world_task(args, tiny(), ("x", i), "train") for i in range(4)]
    return args, Loop(args, "grpo"), load(checkpoint)[0], tasks


def test_answers_of_a_group_are_different_and_aligned(checkpoint, tmp_path):
    """G13, G22: distinct samples; the mask ends with the first ending token, and it is in; prompts stay in order."""
    args, loop, model, tasks = asked(checkpoint, tmp_path)
    rollout = grpo.rollout_of(model, tiny(), tasks, 8, 1.0, (0, 1), args)
    assert all(len(set(rollout.completions[i : i + 8])) >= 4 for i in range(0, 32, 8))
    for r in range(32):
        prompt, ids, mask = tasks[r // 8].prompt, rollout.input_ids[r].tolist(), rollout.completion_mask[r].tolist()
        assert ids[: len(prompt)] == prompt and sum(mask[: len(prompt)]) == 0
        said = ids[len(prompt) : len(prompt) + sum(mask)]
        ends = [i for i, token in enumerate(said) if token in tiny().eos_ids]
        assert ends in ([], [len(said) - 1]) and bool(ends) == bool(rollout.finished[r])
        assert mask[len(prompt) : len(prompt) + len(said)] == [1] * len(said)
    again = grpo.rollout_of(model, tiny(), tasks, 8, 1.0, (0, 1), args)
    other = grpo.rollout_of(model, tiny(), tasks, 8, 1.0, (0, 2), args)
    assert again.completions == rollout.completions != other.completions


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_is_scored_alike(checkpoint, tmp_path, temperature):
    args, loop, model, tasks = asked(checkpoint, tmp_path, "--temperature", temperature)
    rollout = grpo.rollout_of(model, tiny(), tasks, 4, temperature, (0, 1), args)
    found, _ = grpo.scored(model, *rollout[:2], tiny(), temperature, args, loop)
    torch.testing.assert_close(found, rollout.sampled_logps, atol=1e-4, rtol=0)


def test_a_sampler_that_differs_fails_the_run(checkpoint, tmp_path, mine, monkeypatch):
    whole = grpo.generate

    def off(*arguments, **options):
        found = whole(*arguments, **options)
        return found._replace(logps=found.logps + 0.002 * found.completion_mask)

    monkeypatch.setattr(grpo, "generate", off)
    with pytest.raises(RunFailed, match="as sampled and as rescored differ by 0.002"):
        run(checkpoint, tmp_path / "out", "--reward", mine)


def scripted(texts: list[str], finished: list[bool] | None = None) -> Rollout:
    """A rollout that says these texts, masked from token 2 on."""
    ids = [tiny().encode(text) + [tiny().eos_ids[0]] for text in texts]
    width = 2 + max(map(len, ids))
    input_ids, mask = torch.zeros(2, len(ids), width, dtype=torch.long)
    for b, row in enumerate(ids):
        input_ids[b, 2 : 2 + len(row)], mask[b, 2 : 2 + len(row)] = torch.tensor(row), 1
    ended = torch.tensor(finished or [True] * len(texts))
    return Rollout(input_ids, mask, torch.zeros(len(ids), width), texts, texts, ended)


def test_rewards_are_paired_with_their_prompts(checkpoint, tmp_path, mine):
    """G2, G20: 2 prompts, 3 answers each; weights; what is cut off gets nothing from a rule; penalties are for all."""
    flags = ("--reward", "exact", "format=0.5", f"{mine}=2", "--length-penalty", 0.3, "--overlong-buffer", 6)
    args, loop, _, _ = asked(checkpoint, tmp_path, *flags)
    tasks = [grpo.Task([1], {"prompt": "A", "answer": "7"}), grpo.Task([1], {"prompt": "BB", "answer": "8"})]
    texts = ["7", "8", "<think>x</think>7", "7", "8", "8"]
    rollout = scripted(texts, [True, True, True, True, True, False])
    reward, unshaped, passed, steps = grpo.reward_of(rollout, tasks, tiny(), None, args, loop)
    assert passed.tolist() == [[True, False, True], [False, True, False]] and steps is None
    n = rollout.completion_mask.sum(-1).tolist()
    for i, text in enumerate(texts):
        p, ended = i // 3, i != 5
        own = 1 / (1 + len(text)) + 0.01 * (1 + len("ABB"[p : 2 * p + 1]))
        wanted = ended * ((text[-1] == "78"[p]) + 0.5 * ("think" in text) + 2 * own)
        assert unshaped[p, i % 3].item() == pytest.approx(wanted, rel=1e-6)
        wanted += max(-1, min(0, (12 - 6 - n[i]) / 6)) - 0.3 * n[i] / 12
        assert reward[p, i % 3].item() == pytest.approx(wanted, rel=1e-6)


def test_an_answer_that_is_cut_off_is_never_worth_more(checkpoint, tmp_path):
    """Of rewards below 0 it gets the least that a finished answer of the step got, of any prompt; else 0."""
    (tmp_path / "mine.py").write_text("def f(prompt, completion, row):\n    return float(completion)\n")
    mine, tasks = f"{tmp_path / 'mine.py'}:f", [grpo.Task([1], {"prompt": "A"})] * 2
    for weight, texts, wanted in (
        (1, ["-1", "3", "-2", "5"], [[-1, -2], [-2, -2]]), (1, ["1", "3", "2", "5"], [[1, 0], [2, 0]]),
        (-2, ["1", "3", "2", "5"], [[-2, -4], [-4, -4]]),
    ):  # fmt: skip
        args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", f"{mine}={weight}")
        judged = grpo.reward_of(scripted(texts, [True, False] * 2), tasks, tiny(), None, args, loop)
        assert judged.reward.tolist() == wanted and not judged.passed[:, 1].any()


def test_what_is_cut_off_is_not_right(checkpoint, tmp_path, monkeypatch):
    """As in training: neither in what is measured, nor has it a vote."""
    args, loop, model, _ = asked(checkpoint, tmp_path, "--reward", "exact")
    test = {"test": [grpo.Task([1], {"prompt": "A", "answer": "7"})] * 2}
    monkeypatch.setattr(grpo, "rollout_of", lambda model, tokenizer, tasks, samples, *rest: scripted(
        ["7"] * 2 * samples, [True] * samples + [False] * samples))  # fmt: skip
    found = grpo.evaluate(model, None, None, tiny(), test, args, loop)
    assert found["accuracy"] == found["reward"] == found["pass@1"] == found["pass@8"] == [1, 0]
    unknown = {"test": [grpo.Task([1], {"prompt": "A"})] * 2}
    for names, wanted in ((["majority", "format"], [1, 0]), (["format", "majority"], [0, 0])):
        args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", *names)
        found = grpo.evaluate(model, None, None, tiny(), unknown, args, loop)
        assert list(found) == ["reward", "length", "KL"] and found["reward"] == wanted
    args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", "majority")
    judged = grpo.reward_of(scripted(["8", "8", "7"], [False, False, True]), test["test"][:1], tiny(), None, args, loop)
    assert judged.reward.tolist() == [[0, 0, 1]]


def test_pass_at_8_is_of_the_best_and_pass_at_1_of_all(checkpoint, tmp_path, monkeypatch):
    args, loop, model, _ = asked(checkpoint, tmp_path, "--reward", "exact")
    test = {"test": [grpo.Task([1], {"prompt": "A", "answer": answer}) for answer in "789"]}
    said = {1: ["7", "7", "9"], 8: ["7"] * 2 + ["0"] * 6 + ["7"] * 8 + ["9"] * 8}
    monkeypatch.setattr(grpo, "rollout_of", lambda model, tokenizer, tasks, samples, *_: scripted(said[samples]))
    found = grpo.evaluate(model, None, None, tiny(), test, args, loop)
    assert found["accuracy"] == [1, 0, 1] and found["pass@1"] == [0.25, 0, 1] and found["pass@8"] == [1, 0, 1]


@pytest.mark.parametrize("preset", ["", "zero"])
def test_what_is_measured_is_held_out(checkpoint, tmp_path, preset):
    """Sums of operands that no training sum has; the longer ones are longer than any of training."""
    args, loop, _, _ = asked(checkpoint, tmp_path, "--preset", preset, "--tests", 40, "--batch-size", 20)
    train, test = grpo.tasks_of(args, tiny(), loop)
    for tasks, split, terms in ((train, "train", {3, 4, 5}), (test["test"], "test", {3, 4, 5}),
                                (test["longer"], "test", {6, 7, 8})):  # fmt: skip
        numbers = [[word for word in task.row["prompt"].strip("?").split() if word.isdigit()] for task in tasks]
        assert {len(some) for some in numbers} == terms and len(tasks) >= 40
        assert {world.split_of(f"sum {' '.join(some)}") for some in numbers} == {split}
        assert all(str(sum(map(int, some))) == task.row["answer"] for some, task in zip(numbers, tasks, strict=True))


def test_products_that_are_measured_are_held_out(checkpoint, tmp_path):
    args, loop, _, _ = asked(checkpoint, tmp_path, "--tools", "--tests", 40, "--batch-size", 20)
    train, test = grpo.tasks_of(args, tiny(), loop)
    assert [*test] == ["test"]
    for tasks, split in ((train, "train"), (test["test"], "test")):
        for row in (task.row for task in tasks):
            a, b = (int(word) for word in row["prompt"].strip("?").split() if word.isdigit())
            assert world.split_of(f"{max(a, b)} * {min(a, b)}") == split and str(a * b) == row["answer"]


def test_majority_needs_no_answers(checkpoint, tmp_path):
    args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", "majority")
    tasks = [grpo.Task([1], {"prompt": "A"})] * 2
    texts = ["<think>a</think>7", "We have 3 + 4 = 7.\n#### 7", r"As 3 + 5 = 8, \boxed{8}", "1", "<think>2", "2"]
    reward, _, passed, _ = grpo.reward_of(scripted(texts), tasks, tiny(), None, args, loop)
    assert reward.tolist() == [[1, 1, 0], [0, 0, 0]] and passed.tolist() == [[True, True, False], [False] * 3]


def test_majority_is_measured_by_what_it_counts(checkpoint, tmp_path, monkeypatch):
    """Rows as GSM8K has them, with the working; other rewards that know no answer, by the whole text."""
    rows = [{"prompt": "A", "answer": f"3 * 6 = {answer}\n#### {answer}"} for answer in (18, 9)]
    test = {"test": [grpo.Task([1], row) for row in rows]}
    monkeypatch.setattr(grpo, "rollout_of", lambda model, tokenizer, tasks, samples, *_: scripted(
        [r"It is \boxed{18}."] * 2 * samples))  # fmt: skip
    for names, wanted in ((["majority", "format"], [1, 0]), (["format", "majority"], [1, 0]), (["format"], [0, 0])):
        args, loop, model, _ = asked(checkpoint, tmp_path, "--reward", *names)
        assert grpo.evaluate(model, None, None, tiny(), test, args, loop)["accuracy"] == wanted


def test_steps_are_scored_where_they_end(checkpoint, tmp_path, monkeypatch):
    """The PRM's probability at each full stop and at the end; the reward is the least of them."""
    read = []
    monkeypatch.setattr(grpo, "running_rewards", lambda model, ids: read.append(len(ids)) or (ids % 7).double() - 3)
    args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", "prm", "--micro-batch-size", 1)
    rollout = scripted(["1 + 2 = 3. 3 + 4 = 7. So 7", "5"])
    found, _, _, (scores, ends) = grpo.reward_of(rollout, [grpo.Task([1], {"prompt": "A"})], tiny(), None, args, loop)
    texts = [[tiny().decode([i]) for i in row] for row in rollout.input_ids.tolist()]
    for b in range(2):
        n = int(rollout.completion_mask[b].sum()) + 1
        wanted = [t for t in range(2, n + 1) if texts[b][t].endswith(".") or t == n]
        assert ends[0, b].nonzero().flatten().tolist() == wanted and len(wanted) == (3 if b == 0 else 1)
        least = min(1 / (1 + math.exp(3 - i % 7)) for i in rollout.input_ids[b, wanted].tolist())
        assert found[0, b].item() == pytest.approx(least)
    assert read == [1, 1]


def test_steps_of_files_end_before_the_line_does(checkpoint, tmp_path, monkeypatch):
    """As a reward model of --data has learned it: at the last token before a line break; no decimal point ends one."""
    monkeypatch.setattr(grpo, "running_rewards", lambda model, ids: torch.zeros_like(ids, dtype=torch.float))
    args, loop, _, _ = asked(checkpoint, tmp_path, "--reward", "prm")
    args.data = "rows.jsonl"
    completions = ["3 * 0.5 = 1.5\nSo x is 1.5.\n\nDone", "5."]
    rollout, task = scripted(completions), grpo.Task([1], {"prompt": "A"})
    _, _, _, (_, ends) = grpo.reward_of(rollout, [task], tiny(), None, args, loop)
    row = {"prompt": "A", "completions": ["3 * 0.5 = 1.5", "So x is 1.5.", "", "Done"], "labels": [1] * 4}
    taught = file_example(row, tiny(), Namespace(feedback="steps"))
    before = [tiny().decode([i]) for i in rollout.input_ids[0][ends[0, 0]].tolist()]
    said = [tiny().decode([taught.rows[0].input_ids[t]]) for t, _ in taught.steps]
    assert before[:2] == said[:2] == ["5", "."] and len(before) == 3
    assert ends[0, 1].sum() == 1


def saying(turns: list[list[str]], asked: list | None = None):
    """A model.generate that says these texts, in each of its calls the next; `asked` gets its options."""
    said = iter(turns)

    def generate(model, prompts, **options):
        if asked is not None:
            asked.append(options)
        completions = [tiny().encode_with(text, chat.OF_ASSISTANT) + [tiny().eos_ids[0]] for text in next(said)]
        T = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids, mask = torch.zeros(2, len(prompts), T, dtype=torch.long)
        for b, (p, c) in enumerate(zip(prompts, completions, strict=True)):
            ids[b, : len(p) + len(c)] = torch.tensor([*p, *c])
            mask[b, len(p) : len(p) + len(c)] = 1
        ended = torch.ones(len(prompts), dtype=torch.bool)
        return Namespace(input_ids=ids, completion_mask=mask, logps=-0.5 * mask, completions=completions,
                         finished=ended)

    return generate


@pytest.mark.parametrize("chat_format", ["chatml", "qwen2.5", "qwen3"])
def test_tools_are_called_and_masked(checkpoint, tmp_path, monkeypatch, chat_format):
    """The model says <tool>12 * 3</tool>, reads 36, says 36: rendered as a conversation; only its own words count."""
    flags = ("--tools", "--rollout-batch", 5)
    args, loop, model, _ = asked(checkpoint, tmp_path, *flags)
    tokenizer = tiny().with_chat_format(chat_format)
    tasks = [grpo.task_of({"prompt": f"What is {a} * 3?", "answer": str(3 * a)}, tokenizer) for a in (12, 5)]
    end, options = tiny().eos_ids[0], []
    monkeypatch.setattr(type(model), "context", 999)  # qwen2.5's system message is long
    monkeypatch.setattr(grpo, "generate", saying(
        [["<tool>12 * 3</tool>", "15"], ["<tool>1 / 0</tool>"], ["36"]], options))  # fmt: skip
    rollout = grpo.rollout_of(model, tokenizer, tasks, 1, 1.0, (0,), args)
    assert rollout.answers == ["36", "15"] and "[36]" in rollout.completions[0] and "[error]" in rollout.completions[0]
    turns = [("user", "What is 12 * 3?"), ("assistant", "<tool>12 * 3</tool>"), ("tool", "36"),
             ("assistant", "<tool>1 / 0</tool>"), ("tool", "error")]  # fmt: skip
    ids, mask = chat.render([{"role": role, "content": text} for role, text in turns], tiny(),
                            add_generation_prompt=True, chat_format=chat_format)  # fmt: skip
    ids, mask = ids + tiny().encode("36") + [end], mask + [1] * (len(tiny().encode("36")) + 1)
    assert rollout.input_ids[0].tolist() == ids and rollout.completion_mask[0].tolist() == mask
    torch.testing.assert_close(rollout.sampled_logps, -0.5 * rollout.completion_mask.float())
    assert grpo.reward_of(rollout, tasks, tiny(), None, args, loop).passed.tolist() == [[True], [True]]
    assert {turn["rollout_batch"] for turn in options} == {5} and len({turn["seed"] for turn in options}) == 3


def test_a_turn_for_which_there_is_no_room_is_not_begun(checkpoint, tmp_path, monkeypatch):
    """The row ends with its call and is one that was cut off; others go on."""
    args, _, model, _ = asked(checkpoint, tmp_path, "--tools")
    tasks = [grpo.task_of({"prompt": "What is 12 * 3?" * n, "answer": "36"}, tiny()) for n in (1, 2)]
    call = "<tool>12 * 3</tool>"
    turns = [*tasks[0].messages, {"role": "assistant", "content": call}, {"role": "tool", "content": "36"}]
    room = len(chat.render(turns, tiny(), add_generation_prompt=True).input_ids) + args.max_new_tokens
    for context, said in ((room, "36"), (room - 1, call)):
        monkeypatch.setattr(type(model), "context", context)
        monkeypatch.setattr(grpo, "generate", saying([[call, call], ["36"]]))
        rollout = grpo.rollout_of(model, tiny(), tasks, 1, 1.0, (0,), args)
        assert rollout.answers == [said, call] and rollout.finished.tolist() == [said == "36", False]


def test_only_a_call_at_the_end_is_a_call():
    assert grpo.calculator_call("<tool>12 * 34</tool>") == "12 * 34"
    assert grpo.calculator_call("so <tool>1 + 1</tool> ") == "1 + 1"
    for text in ("<tool>1 + 1</tool> 2", "1 + 1</tool>", "<tool>1 + 1", "", "</tool>"):
        assert grpo.calculator_call(text) is None


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def batches_of(monkeypatch) -> list:
    """What every call of by_length is given: (batch, rows)."""
    seen, whole = [], grpo.by_length
    monkeypatch.setattr(grpo, "by_length", lambda *a: seen.append(a[:2]) or whole(*a))
    return seen


PLAIN = [("grpo", 0.2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dr_grpo", 0.0), ("rloo", 0.2)))]


@pytest.mark.parametrize(("name", "beta"), PLAIN)
def test_a_run_is_a_plain_loop(checkpoint, tmp_path, mine, monkeypatch, name, beta):
    """Loss, clipping, schedule and AdamW, as somebody would write it who scores one answer at a time.

    And who samples from another model, whose log-probs are higher by 0.3.
    """
    seen, to_go, seeds = batches_of(monkeypatch), [], []
    generate, advantages_of, rollout_of = grpo.generate, grpo.advantages_of, grpo.rollout_of

    def off(*arguments, **options):
        found = generate(*arguments, **options)
        return found._replace(logps=found.logps + 0.3 * found.completion_mask)

    monkeypatch.setattr(grpo, "generate", off)
    monkeypatch.setattr(grpo, "ratio_and_mismatch", lambda largest, loop: {"ratio_max": largest[0].item()})
    monkeypatch.setattr(grpo, "advantages_of", lambda *a: to_go.append(a[4]) or advantages_of(*a))
    monkeypatch.setattr(grpo, "rollout_of", lambda *a: seeds.append(a[5]) or rollout_of(*a))
    flags = ("--loss", name, "--reward", mine, "--beta", beta, "--grad-clip", 0.1, "--weight-decay", 0.1, "--warmup", 2,
             "--temperature", 0.7, "--kl-coef", beta / 2)  # fmt: skip
    args = args_for(checkpoint, tmp_path / "out", *flags)
    main(args)
    model, ref = load(checkpoint)[0], load(checkpoint)[0]
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    assert len(seen) == 3 and [seed for seed in seeds if len(seed) == 4 and seed[1]] == [
        (0, step, 0, 0) for step in (1, 2, 3)]  # run, step, turn, rank; step 0 is the evaluation
    for step, ((batch, rows), line) in enumerate(zip(seen, logged(tmp_path / "out"), strict=True), start=1):
        taught = batch.advantages.any(-1)  # others are left out where no KL is held against them
        assert sorted(rows) == (list(range(12)) if beta else taught.nonzero().flatten().tolist())
        assert {-1, 1} <= set(batch.advantages[taught].sum(-1).sign().tolist())
        optimizer.zero_grad()
        losses, kls = [], []
        for b in range(12):
            mask = batch.completion_mask[b].bool()
            ids = batch.input_ids[b]
            lp, lr = ((m(ids[None])[0] / 0.7).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0][mask[1:]]
                      for m in (model, ref))  # fmt: skip
            if beta:
                whole = (lp + 0.3 - lr).detach().flip(0).cumsum(0).flip(0)
                torch.testing.assert_close(to_go[step - 1][b][mask], whole, rtol=1e-3, atol=1e-3)
            kl = (lr.detach() - lp).exp() - 1 - (lr.detach() - lp)
            a = batch.advantages[b][mask]
            term = -(lp - lp.detach()).exp() * a if name != "rloo" else -(lp.sum() - lp.sum().detach()).exp() * a
            n = 12 if name == "dr_grpo" else len(lp)
            losses.append((math.exp(-0.3) * term + beta * kl).sum() / n)
            kls += kl.tolist()
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["kl"] == (pytest.approx(statistics.fmean(kls), rel=1e-3, abs=1e-6) if beta else 0.0)
        assert line["lr"] == pytest.approx(1e-3 * min(1, step / 2))
        assert line["ratio_max"] == 1.0 and line["clip_fraction"] == 0.0
        assert min(line[f"{part}_seconds"] for part in ("rollout", "scoring", "update")) > 0
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
    assert difference(weights(tmp_path / "out"), dict(model.named_parameters())) < 1e-4


SPLITS = (
    ("--loss", "grpo"), ("--loss", "dapo", "--beta", "0.1", "--overlong-buffer", "6"),
    pytest.param(("--loss", "reinforce++"), marks=pytest.mark.slow),
    pytest.param(("--loss", "dr_grpo", "--passes", "2"), marks=pytest.mark.slow),
    pytest.param(("--loss", "gspo", "--entropy-coef", "0.1"), marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("flags", SPLITS, ids=lambda flags: flags[1])
def test_splitting_a_batch_changes_nothing(checkpoint, tmp_path, mine, flags):
    """G8: ragged rows in one forward pass and five at a time."""
    found = []
    for size in (12, 5):
        out = tmp_path / str(size)
        run(checkpoint, out, *flags, "--reward", mine, "--micro-batch-size", size, "--steps", 2)
        found.append((logged(out), weights(out)))
    for lines, found_weights in found[1:]:
        for a, b in zip(found[0][0], lines, strict=True):
            for metric in a.keys() - {"seconds", "tokens_per_second", "rollout_seconds", "scoring_seconds",
                                     "update_seconds", "mismatch"}:  # fmt: skip
                assert b[metric] == pytest.approx(a[metric], rel=1e-3, abs=1e-5), metric
        assert difference(found[0][1], found_weights) < 1e-4


def test_several_updates_leave_the_old_policy_where_it_was(checkpoint, tmp_path, mine):
    """P8: ratio exactly 1 in a single update, with rescored log-probs near 1 in the first and not 1 in the next."""
    run(checkpoint, tmp_path / "one", "--reward", mine)
    assert all(line["ratio_max"] == 1.0 for line in logged(tmp_path / "one"))
    run(checkpoint, tmp_path / "two", "--reward", mine, "--passes", 2, "--minibatches", 2, "--lr", 3e-3)
    assert all(line["ratio_max"] > 1.001 for line in logged(tmp_path / "two"))
    run(checkpoint, tmp_path / "warm", "--reward", mine, "--passes", 2, "--lr", 1e-6, "--temperature", 0.7)
    assert all(line["ratio_max"] < 1.001 for line in logged(tmp_path / "warm"))
    args, loop, model, _ = asked(checkpoint, tmp_path)
    seen = random_tokens()
    assert grpo.log_ratio(seen._replace(old_logps=seen.logps.detach())).abs().max() == 0


def on_a_rank(rank: int, folder: Path) -> None:
    for name in ("grpo", "reinforce++", "reinforce"):
        run(folder / "model", folder / f"two-{name}", "--reward", f"{folder / 'mine.py'}:shorter", "--loss", name,
            "--questions", 4, "--group-size", 5, "--batch-size", 2, "--beta", 0.1)  # fmt: skip


def test_two_ranks_are_one_batch(checkpoint, tmp_path, mine, monkeypatch):
    """Advantages, weights and metrics are those of the whole step: the samples of both ranks, trained on by one."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    whole = grpo.rollout_of

    def as_ranks_do(model, tokenizer, tasks, samples, temperature, seed, args):
        if len(seed) != 4 or seed[1] == 0 or len(tasks) != 2:  # the evaluation
            return whole(model, tokenizer, tasks, samples, temperature, seed, args)
        return grpo.joined([whole(model, tokenizer, tasks[r : r + 1], samples, temperature, (*seed[:3], r), args)
                            for r in range(2)])  # fmt: skip

    monkeypatch.setattr(grpo, "rollout_of", as_ranks_do)
    for name in ("grpo", "reinforce++", "reinforce"):
        run(checkpoint, tmp_path / name, "--reward", mine, "--loss", name, "--questions", 4,
            "--group-size", 5, "--batch-size", 2, "--beta", 0.1)  # fmt: skip
        for a, b in zip(logged(tmp_path / name), logged(tmp_path / f"two-{name}"), strict=True):
            for metric in ("loss", "reward", "kl", "entropy", "length", "pass_rate", "no_spread", "grad_norm"):
                assert b[metric] == pytest.approx(a[metric], rel=1e-3, abs=1e-5), (name, metric)
        assert difference(weights(tmp_path / name), weights(tmp_path / f"two-{name}")) < 1e-4


class Stop(Exception): ...


def stopping(after: int):
    class StopsAfter(Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == after:
                raise Stop

    return StopsAfter


@pytest.mark.parametrize("flags", [
    pytest.param((), marks=pytest.mark.slow), ("--loss", "reinforce", "--passes", 2, "--minibatches", 2),
    pytest.param(("--loss", "dapo", "--overlong-buffer", 6), marks=pytest.mark.slow),
    pytest.param(("--preset", "reft"), marks=pytest.mark.slow), ("--kl-coef", 0.1, "--preset", "cold"),
    pytest.param(("--tools", "--beta", 0.1), marks=pytest.mark.slow),
])  # fmt: skip
def test_resuming_is_exact(checkpoint, tmp_path, mine, monkeypatch, flags):
    flags = (*flags, "--steps", 3, "--save-every", 2, "--reward", mine, "--sft-steps", 2 * ("--preset" in flags))
    whole = run(checkpoint, tmp_path / "whole", *flags)
    monkeypatch.setattr(grpo, "Loop", stopping(2))
    with pytest.raises(Stop):
        run(checkpoint, tmp_path / "parts", *flags)
    monkeypatch.setattr(grpo, "Loop", Loop)
    parts = run(checkpoint, tmp_path / "parts", *flags, "--resume")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    timing = {"seconds", "tokens_per_second", "rollout_seconds", "scoring_seconds", "update_seconds"}
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in logged(tmp_path / name)]
             for name in ("whole", "parts")]  # fmt: skip
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3]
    assert all(parts[name] == whole[name] for name in ("before", "after", "metrics"))


@pytest.mark.slow
def test_answers_are_decoded_as_many_at_a_time_as_asked(checkpoint, tmp_path, mine, monkeypatch):
    """In training and in all that is measured; a run may go on with another number."""
    asked, generate, flags = [], grpo.generate, ("--reward", mine, "--steps", 1, "--rollout-batch")
    monkeypatch.setattr(grpo, "generate", lambda *x, **y: (asked.append(y["rollout_batch"]), generate(*x, **y))[1])
    parts = run(checkpoint, tmp_path / "out", *flags, 5)
    assert len(asked) > 2 and set(asked) == {5}
    assert run(checkpoint, tmp_path / "out", *flags, 3, "--resume")["after"] == pytest.approx(parts["after"])
    assert args_for(checkpoint, tmp_path).rollout_batch is None


def test_dynamic_sampling_takes_groups_with_spread(checkpoint, tmp_path, monkeypatch):
    """DAPO: groups that are alike but for their lengths make room for the next prompts; the size of a step stays."""
    args, loop, model, tasks = asked(checkpoint, tmp_path, "--loss", "dapo", "--steps", 2, "--overlong-buffer", 6)
    calls = []

    def reward_of(rollout, some, *rest):
        calls.append(len(some))
        spread = torch.zeros(4, 3)
        n = len(calls)  # groups with spread: 1 of the first four, 2 of the next, 3 of the third
        spread[:n, 0] = torch.arange(1.0, n + 1)
        return grpo.Judged(spread.double() - torch.rand(4, 3), spread.double(), spread > 0, None)

    monkeypatch.setattr(grpo, "reward_of", reward_of)
    some, rollout, judged, alike, seconds = grpo.sampled_step(model, tiny(), tasks, 1, None, args, loop)
    assert len(calls) == 3 and len(some) == 4 and seconds > 0 and rollout.input_ids.shape[0] == 12
    assert judged.unshaped.amax(-1).tolist() == [1, 1, 2, 1] and alike == pytest.approx(6 / 12)
    assert (judged.passed == (judged.unshaped > 0)).all()
    assert ((judged.unshaped - judged.reward >= 0) & (judged.unshaped - judged.reward < 1)).all()
    for p, task in enumerate(some):
        assert all(rollout.input_ids[3 * p + g, : len(task.prompt)].tolist() == task.prompt for g in range(3))
    monkeypatch.setattr(grpo, "reward_of", lambda rollout, some, *rest: (
        grpo.Judged(-torch.rand(4, 3).double(), torch.zeros(4, 3).double(), torch.zeros(4, 3) > 0, None)))  # fmt: skip
    some, _, _, alike, _ = grpo.sampled_step(model, tiny(), tasks, 1, None, args, loop)
    assert len(some) == 4 and alike == 1.0


def test_rows_that_are_cut_off_can_be_left_out(checkpoint, tmp_path, mine, monkeypatch):
    """Of what is learned, of the baseline, of the variance of rewards, and of what tells a group's answers apart."""
    seen, steps, varied = batches_of(monkeypatch), [], []
    whole, coefficient = grpo.sampled_step, grpo.entropy_coefficient
    monkeypatch.setattr(grpo, "sampled_step", lambda *a: steps.append(whole(*a)) or steps[-1])
    monkeypatch.setattr(grpo, "entropy_coefficient", lambda *a: varied.append(a[2]) or coefficient(*a))
    run(checkpoint, tmp_path / "out", "--reward", mine, "--mask-unfinished", "--steps", 3, "--max-new-tokens", 6,
        "--loss", "reinforce", "--entropy-coef", 0.1)  # fmt: skip
    baseline, by_the_cut = None, 0
    for (batch, _), step, reward, line in zip(seen, steps, varied, logged(tmp_path / "out"), strict=True):
        ended = (torch.isin(batch.input_ids, torch.tensor(tiny().eos_ids)) & (batch.completion_mask > 0)).any(-1)
        assert 0 < int(ended.sum()) < 12 and (ended == batch.completion_mask.any(-1)).all()
        assert reward.tolist() == step.judged.reward.flatten()[ended].tolist()
        advantage = (batch.advantages.sum(-1) / batch.completion_mask.sum(-1))[ended]
        assert advantage.tolist() == pytest.approx((reward - (baseline or 0.0)).tolist(), rel=1e-4)
        groups = zip(step.judged.reward.tolist(), ended.view(4, 3).tolist(), strict=True)
        told_apart = [len({r for r, whole in zip(*group, strict=True) if whole}) > 1 for group in groups]
        assert line["no_spread"] == 1 - statistics.fmean(told_apart)
        assert line["unfinished"] == pytest.approx(1 - ended.float().mean().item())
        by_the_cut += int((step.judged.reward.std(-1) > 0).sum()) - sum(told_apart)
        mean = reward.mean().item()
        baseline = mean if baseline is None else 0.9 * baseline + 0.1 * mean
    assert by_the_cut  # there are groups that only differ in what is left out


def test_the_reference_is_frozen_and_the_policy_moves(checkpoint, tmp_path, mine, monkeypatch):
    refs, whole = [], grpo.frozen
    monkeypatch.setattr(grpo, "frozen", lambda model: refs.append(whole(model)) or refs[-1])
    result = run(checkpoint, tmp_path / "out", "--reward", mine, "--beta", 0.1)
    before = dict(load(checkpoint)[0].named_parameters())
    assert all(torch.equal(before[name], p) for name, p in refs[0].named_parameters())
    assert all(not torch.equal(before[name], p) for name, p in weights(tmp_path / "out").items())
    assert result["metrics"]["KL"]["before"] == 0.0 != result["metrics"]["KL"]["after"]
    assert [line["kl"] for line in logged(tmp_path / "out")][0] == pytest.approx(0, abs=1e-6)


def test_the_entropy_bonus_raises_the_entropy(checkpoint, tmp_path, mine):
    runs = [run(checkpoint, tmp_path / str(coef), "--reward", mine, "--steps", 5, "--entropy-coef", coef)
            and logged(tmp_path / str(coef)) for coef in (0.0, 2.0)]  # fmt: skip
    assert runs[1][-1]["entropy"] > runs[0][-1]["entropy"] + 0.02


def test_a_run_on_a_file(checkpoint, tmp_path, mine):
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", path, "--max-length", 100)
    result = run(checkpoint, tmp_path / "out", *flags, "--reward", "number")
    assert result["n"] == 16 and result["metric"] == "accuracy"
    path.write_text(json.dumps({"prompt": "Say x.", "answer": "x"}) + "\n")
    with pytest.raises(UserError, match="rows.jsonl:1: the answer 'x'"):
        run(checkpoint, tmp_path / "out", *flags, "--reward", "number")
    with pytest.raises(UserError, match="exceed --max-length 20"):
        run(checkpoint, tmp_path / "out", *flags, "--max-length", 20)
    with pytest.raises(UserError, match="finite number, found nan"):
        run(checkpoint, tmp_path / "out", *flags, "--reward", mine.replace("shorter", "bad"))


def test_a_function_of_the_users_sees_its_columns_and_is_the_metric(checkpoint, tmp_path):
    path, mine = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    mine.write_text("def f(prompt, completion, row):\n    return 0.5 * row['tests']\n")
    path.write_text("".join(json.dumps({"prompt": f"Say {i}.", "tests": 1}) + "\n" for i in range(40)))
    result = run(checkpoint, tmp_path / "out", "--data", path, "--max-length", 100, "--reward", f"{mine}:f",
                 "--max-new-tokens", 30, "--steps", 1)  # fmt: skip
    assert result["metric"] == "reward" and 0.25 < result["before"] <= 0.5
    assert result["metrics"]["accuracy"]["before"] == 0


def test_a_long_prompt_is_refused_before_anything_runs(checkpoint, tmp_path):
    (tmp_path / "a").write_text("".join(json.dumps({"prompt": f"Say {i}.", "answer": "1"}) + "\n" for i in range(40)))
    (tmp_path / "b").write_text(json.dumps({"prompt": "Say it. " * 40, "answer": "1"}) + "\n")
    with pytest.raises(UserError, match="exceed --max-length 100"):
        run(checkpoint, tmp_path / "out", "--data", tmp_path / "a", "--eval-data", tmp_path / "b", "--max-length", 100)


def test_a_process_reward_model_of_another_tokenizer_is_refused(checkpoint, tmp_path):
    from reward import with_scalar_head

    save(with_scalar_head(load(checkpoint)[0]), tiny(), tmp_path / "prm")
    path = tmp_path / "prm" / "tokenizer.json"
    parts = json.loads(path.read_text())
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(parts))
    with pytest.raises(UserError, match="tokenizer is not the policy's"):
        run(checkpoint, tmp_path / "out", "--reward", "prm", "--prm", tmp_path / "prm")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_the_log_ratio_of_whole_answers_at_temperature_1(checkpoint, tmp_path, mine, temperature):
    flags = ("--reward", mine, "--lr", 1e-2, "--temperature", temperature)
    result = run(checkpoint, tmp_path / "out", *flags)
    args, loop, ref, _ = asked(checkpoint, tmp_path, *flags)
    model = load(tmp_path / "out" / "checkpoint")[0]
    _, test = grpo.tasks_of(args, tiny(), loop)
    rollout = grpo.rollout_of(model, tiny(), test["test"], 8, 1.0, (args.seed, 0, 0, 8), args)
    total = 0.0
    for ids, mask in zip(rollout.input_ids[::8], rollout.completion_mask[::8], strict=True):
        logps = [m(ids[None])[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0] for m in (model, ref)]
        total += ((logps[0] - logps[1]) * mask[1:]).sum().item() / 6
    assert result["metrics"]["KL"]["after"] == pytest.approx(total, rel=1e-3, abs=1e-4) and abs(total) > 0.05


def test_the_loss_is_the_mean_over_updates(checkpoint, tmp_path, mine, monkeypatch):
    losses, whole = [], grpo.observe
    monkeypatch.setattr(grpo, "observe", lambda *a: losses.append(a[3].item()) or whole(*a))
    run(checkpoint, tmp_path / "out", "--reward", mine, "--passes", 3, "--steps", 1, "--beta", 0.3, "--lr", 1e-2)
    (line,) = logged(tmp_path / "out")
    assert len(losses) == 3 and line["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-4)


def test_no_steps_are_a_measurement(checkpoint, tmp_path, monkeypatch):
    told, kept, whole = [], [], grpo.frozen
    monkeypatch.setattr(grpo, "frozen", lambda model: kept.append(whole(model)) or kept[-1])
    monkeypatch.setattr(Loop, "compile", lambda loop, model, dynamic=False: told.append(dynamic))
    result = run(checkpoint, tmp_path / "out", "--steps", 0, "--preset", "cold", "--sft-steps", 1, "--dtype", "bf16")
    assert result["before"] == result["after"] and told == [True]
    assert {p.dtype for p in kept[0].blocks.parameters() if p.ndim == 2} == {torch.bfloat16}
    with pytest.raises(UserError, match="--minibatches 13: a step has 12 answers"):
        run(checkpoint, tmp_path / "out", "--minibatches", 13)


@pytest.mark.parametrize(("flags", "said"), [
    (("--group-size", 1), "compares the answers of a group"), (("--temperature", 0), "would be the same"),
    (("--parallel", "fsdp"), "only replicas"), (("--reward", "nothing"), "expected exact"),
    (("--loss", "cispo", "--clip-low", 0.1), "--loss cispo has none"), (("--reward", "x.py:f"), "there is no file"),
    (("--data", "x", "--preset", "zero"), "takes no --data"), (("--process-weight", 1), "needs --reward prm"),
    (("--process-weight", 1, "--reward", "prm", "--loss", "reinforce++"), "has no groups whose steps"),
    (("--clip-low", 1), "less than 1"), (("--importance-cap", 0.5), "at least 1"),
    (("--data", "x", "--sft-steps", 3), "give --sft-data"), (("--tools", "--sft-steps", 3), "give --sft-data"),
    (("--sft-data", "x"), "--sft-data needs --sft-steps"), (("--prm", "x"), "needs --reward prm"),
    (("--kl-weighted",), "needs --beta"), (("--entropy-adapt", 1), "needs --entropy-coef"),
    (("--loss", "all", "--preset", "r1"), "no --loss all"), (("--preset", "zero", "--sft-steps", 3), "in its own way"),
    (("--baseline", "--preset", "zero"), "--preset zero has none"),
    (("--baseline", "--preset", "cold"), "--preset cold has none"),
    (("--baseline", "--preset", "r1"), "--preset r1 has none"),
    (("--loss", "all", "--data", "x", "--reward", "majority"), "name a rule"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(list(map(str, flags)))


def test_presets_and_their_start():
    found = {name: get_args(["--preset", name]) for name in ("zero", "cold", "reft")} | {"": get_args([])}
    assert [found[name].start for name in ("zero", "cold", "reft", "")] == ["base", "base", "sft", "sft"]
    assert found["zero"].rewards == [("number", 1.0)] and found["reft"].rewards == [("reft", 1.0)]
    assert found["cold"].sft_steps and found["reft"].sft_steps and not found[""].sft_steps
    args = get_args(["--data", "x", "--sft-steps", "3", "--sft-data", "y"])
    assert (args.sft_steps, args.sft_data) == (3, "y") and get_args(["--baseline", "--sft-data", "y"]).sft_data == "y"
    steps = [get_args(["--loss", "all", *flags]).steps for flags in ([], ["--data", "x"], ["--steps", "9"])]
    assert steps == [5, 200, 9] and get_args(["--adapter", "prompt"]).sft_lr == 0.5 and found[""].sft_lr == 1e-3
    assert found["reft"].questions == 500 and get_args(["--reward", "exact=2", "format"]).rewards == [
        ("exact", 2.0), ("format", 1.0)]  # fmt: skip
    assert grpo.weighted("a=b.py:f=0.5") == ("a=b.py:f", 0.5) and grpo.weighted("a=b.py:f") == ("a=b.py:f", 1.0)


def test_annotation_is_of_the_questions_of_rl():
    """What SFT may imitate are RL's own questions, 30% of them with the working."""
    args = get_args(["--steps", "1", "--batch-size", "200"])
    rows = grpo.annotation(args, tiny(), 200)
    tasks = [grpo.world_task(args, tiny(), ("rl", 0, i), "train") for i in range(200)]
    assert all(row.input_ids[: len(task.prompt)] == task.prompt for row, task in zip(rows, tasks, strict=True))
    texts = [tiny().decode([i for i, m in zip(*row, strict=True) if m]) for row in rows]
    shown = [text for text in texts if "<think></think>" not in text]
    assert 40 < len(shown) < 80
    for text, task in zip(texts, tasks, strict=True):
        assert world.final_answer(text.split("<|im_end|>")[0]) == task.row["answer"]
    args.sft_data = "worked"
    worked = [tiny().decode(row.input_ids) for row in grpo.annotation(args, tiny(), 20)]
    assert all("<think>" in text and "<think></think>" not in text for text in worked)
    test = {tuple(grpo.world_task(args, tiny(), ("rl test", i), "test").prompt) for i in range(400)}
    assert not test & {tuple(task.prompt) for task in tasks}


def test_a_table_of_all_losses(checkpoint, tmp_path, mine, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "LOSSES", {name: LOSSES[name] for name in ("grpo", "cispo")})
    result = run(checkpoint, tmp_path / "out", "--loss", "all", "--seeds", 2, "--reward", mine, "--steps", 1)
    assert [row["loss"] for row in result["rows"]] == ["SFT", "grpo", "cispo"]
    assert [row["seeds"] for row in result["rows"]] == [1, 2, 1]
    runs = [json.loads((tmp_path / "out" / f"grpo-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    assert result["rows"][1]["length"]["mean"] == pytest.approx(
        statistics.fmean(run["metrics"]["length"]["after"] for run in runs))
    assert result == json.loads((tmp_path / "out" / "table.json").read_text())


def test_the_pipeline_of_r1(checkpoint, tmp_path, monkeypatch):
    """SFT, RL, best of four that pass, SFT of the start on these, RL: three folders."""
    texts = iter(["<think>1 + 1 = 2.</think>", "<think>a long one</think>", "", "<think>x</think>"] * 10**4)

    def rollout_of(model, tokenizer, tasks, samples, *rest):
        said = [f"{next(texts)}{task.row['answer']}" for task in tasks for _ in range(samples)]
        said[3::8] = [text.replace("x", "y") for text in said[3::8]]  # half of the shortest are cut off
        return Namespace(answers=said, finished=torch.tensor(["y" not in text for text in said]))

    parts, dies = [], [True]
    monkeypatch.setattr(grpo, "rollout_of", rollout_of)
    whole = grpo.main

    def part(args):
        if args.sft_data.endswith("kept.jsonl") and dies.pop():
            raise Stop
        parts.append(args)
        out = Path(args.out) / "checkpoint"
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, out, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(grpo, "main", part)
    with pytest.raises(Stop):
        whole(args_for(checkpoint, tmp_path / "r1", "--preset", "r1"))
    dies.append(False)
    whole(args_for(checkpoint, tmp_path / "r1", "--preset", "r1", "--resume"))
    assert [args.preset for args in parts] == ["cold"] * 3
    assert [args.resume for args in parts] == [False, True, False]  # part 3 has saved nothing yet
    kept = [json.loads(line) for line in (tmp_path / "r1" / "2" / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 1000
    for i, row in enumerate(kept):
        assert row["completion"].startswith("<think>x</think>" if i % 2 else "<think>1 + 1 = 2.</think>")
    assert parts[2].sft_data == str(tmp_path / "r1" / "2" / "kept.jsonl")


@pytest.mark.slow
def test_the_default_run_reasons(tmp_path):
    """From answers given at once to answers that are worked out: at least 0.85, from at most 0.45."""
    result = main(get_args(["--out", str(tmp_path / "out")]))
    assert result["before"] <= 0.45 and result["after"] >= 0.85 and result["n"] == 400
    assert result["metrics"]["length"]["after"] > 1.5 * result["metrics"]["length"]["before"]
