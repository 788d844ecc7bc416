"""Facts about ppo.py: GAE, whitening and losses by brute force, a bandit, the KL in the reward, critics, whole runs."""

import json
import math
import random
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ppo
import reward as reward_module
from data import chat, manners, world
from data.formats import UserError
from data.tokenizer import tiny
from loop import Loop, RunFailed
from model import Config, Transformer, frozen, load, save
from ppo import adapted, final_reward, gae, get_args, main, policy_loss, token_rewards, value_loss, whitened, withheld
from tests.test_loop import on_two_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_float64(request):
    """Maths in float64; whole runs, which take a checkpoint, as they are."""
    if "checkpoint" not in request.fixturenames and "default_run" not in request.node.name:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ragged(B: int = 5, T: int = 10, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Completion mask (a prompt, ragged ends), and four random (B, T)."""
    g = torch.Generator().manual_seed(seed)
    starts, ends = torch.randint(1, 4, (B, 1), generator=g), torch.randint(5, T + 1, (B, 1), generator=g)
    mask = ((torch.arange(T) >= starts) & (torch.arange(T) < ends)).long()
    return mask, *torch.randn(4, B, T, generator=g)


def one() -> Loop:
    return Loop(get_args(["--out", "/nowhere", "--device", "cpu"]), "ppo")


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and advantages


def test_rewards_stand_at_the_last_token():
    """P1, P7: the score once, at the ending token; the KL at each token, once, with its sign."""
    mask, old, ref, *_ = ragged()
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    found = token_rewards(reward, old, ref, mask, kl_coef=0.3)
    for b in range(5):
        places = mask[b].nonzero().flatten().tolist()
        for t in range(10):
            wanted = (-0.3 * (old - ref)[b, t] if t in places else 0.0) + (reward[b] if t == places[-1] else 0.0)
            assert found[b, t].item() == pytest.approx(float(wanted))
    total = token_rewards(torch.zeros(5), old, ref, mask, kl_coef=0.3).sum(-1)
    torch.testing.assert_close(total, -0.3 * ((old - ref) * mask).sum(-1))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_a_double_sum(gamma, lam):
    """P4: A[t] = sum over k of (gamma lam)^k delta[t + k], delta = r + gamma V' - V, V' = 0 behind the last token."""
    mask, rewards, values, *_ = ragged()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b in range(5):
        places = mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, places].tolist(), [*values[b, places].tolist(), 0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, t in enumerate(places):
            wanted = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(r)))
            assert advantages[b, t].item() == pytest.approx(wanted)
            assert returns[b, t].item() == pytest.approx(wanted + v[i])  # P5: of raw advantages
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_at_its_ends():
    """lam 1: the reward to go less the value; lam 0: delta. With no value and no KL each token gets the reward (P1)."""
    mask, rewards, values, *_ = ragged()
    to_go = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    torch.testing.assert_close(returns, to_go)
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    last = token_rewards(reward, values, values, mask, kl_coef=0.5)
    advantages, _ = gae(last, torch.zeros(5, 10), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, reward[:, None] * mask)


def test_masked_positions_are_poisoned():
    mask, old, rewards, values, returns = ragged()
    dead = mask == 0
    wide = torch.nn.functional.pad(mask, (0, 4))
    for poison in (1e6, math.inf, math.nan):
        bad = [torch.nn.functional.pad(x.masked_fill(dead, poison), (0, 4), value=poison)
               for x in (old, rewards, values, returns)]  # fmt: skip
        found = gae(bad[1], bad[2], wide, gamma=0.9, lam=0.8)
        for x, y in zip(found, gae(rewards, values, mask, gamma=0.9, lam=0.8), strict=True):
            assert torch.equal(x[:, :10], y) and (x[:, 10:] == 0).all()
        assert torch.equal(whitened(bad[0], wide, one())[:, :10], whitened(old, mask, one()))
        for function, good, spoiled in (
            (lambda *x: policy_loss(*x, clip_eps=0.2)[0], (old, rewards, values, mask), (*bad[:3], wide)),
            (lambda *x: value_loss(*x, value_clip=0.2), (old, rewards, values, mask), (*bad[:3], wide)),
        ):
            leaf, other = good[0].clone().requires_grad_(), spoiled[0].clone().requires_grad_()
            a, b = function(leaf, *good[1:]).sum(), function(other, *spoiled[1:]).sum()
            (grad,), (other_grad,) = torch.autograd.grad(a, leaf), torch.autograd.grad(b, other)
            assert a.item() == pytest.approx(b.item()) and torch.equal(other_grad[:, :10], grad)
            assert (grad[dead] == 0).all() and (other_grad[:, 10:] == 0).all()
        assert torch.equal(token_rewards(torch.ones(5), bad[0], bad[1], wide, kl_coef=0.1)[:, :10],
                           token_rewards(torch.ones(5), old, rewards, mask, kl_coef=0.1))  # fmt: skip


def test_whitening_is_over_real_tokens():
    """P2: mean 0 and deviation 1 over them, not over the pads, whatever stands there; the order stays."""
    mask, x, *_ = ragged()
    white = whitened(5 + 3 * x, mask, one())
    real = white[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-6) and real.std().item() == pytest.approx(1, abs=1e-6)
    assert (white[mask == 0] == 0).all() and (real.argsort() == x[mask.bool()].argsort()).all()


class NoFloat64(TorchDispatchMode):
    """Like an MPS device: whatever would be a float64 tensor (on `device`, if given) is an error."""

    def __init__(self, device: str = ""):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            bad = isinstance(x, torch.Tensor) and x.dtype == torch.float64 and self.device in (x.device.type, "")
            assert not bad, f"{function} in float64"
        return out


def test_advantages_need_no_float64():
    mask, x, *_ = ragged()
    x, loop = x.float(), one()
    with NoFloat64():
        white = whitened(x, mask, loop)
    torch.testing.assert_close(white.double(), whitened(x.double(), mask, loop), rtol=1e-5, atol=1e-5)


def test_rewards_are_scaled_clipped_and_withheld():
    """P14, P16: what does not end gets the penalty, whatever its score; a clip in deviations of the start."""
    scores, finished = torch.tensor([3.0, 30.0, -30.0, 30.0]), torch.tensor([True, True, True, False])
    found = final_reward(scores, finished, mean=1.0, std=2.0, clip_at=5.0, eos_penalty=-1.5)
    assert found.tolist() == [1.0, 5.0, -5.0, -1.5]
    assert final_reward(scores, finished, mean=0.0, std=1.0, clip_at=0.0, eos_penalty=0.0).tolist() == [3, 30, -30, 0]
    clips = [get_args(flags).reward_clip for flags in ([], ["--reward", "judge"], ["--reward", "exact"],
                                                       ["--reward", "exact", "--reward-clip", "2"])]  # fmt: skip
    assert clips == [5, 5, 0, 2]  # a rule's reward is in no deviations
    for name, mean, std in (("model", 2.5, 1.5), ("judge", 2.5, 1.5), ("exact", 0.0, 1.0)):
        assert ppo.scale_of({"reward": [1.0, 4.0]}, get_args(["--reward", name])) == {"mean": mean, "std": std}
    assert ppo.scale_of({"reward": [2.0, 2.0]}, get_args([])) == {"mean": 2.0, "std": 1e-3}


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def test_losses_by_brute_force():
    mask, logps, old, advantages, returns = ragged()
    old = logps + 0.4 * old
    losses, ratio = policy_loss(logps, old, advantages, mask, clip_eps=0.2)
    values = value_loss(logps, old, returns, mask, value_clip=0.3)
    for b in range(5):
        for t in mask[b].nonzero().flatten().tolist():
            r, a = math.exp(logps[b, t] - old[b, t]), advantages[b, t].item()
            assert ratio[b, t].item() == pytest.approx(r)
            assert losses[b, t].item() == pytest.approx(-min(r * a, max(0.8, min(1.2, r)) * a))
            v, v_old, target = logps[b, t].item(), old[b, t].item(), returns[b, t].item()
            near = v_old + max(-0.3, min(0.3, v - v_old))
            assert values[b, t].item() == pytest.approx(0.5 * max((v - target) ** 2, (near - target) ** 2))
    free, _ = policy_loss(logps, old, advantages, mask, clip_eps=0.0)
    torch.testing.assert_close(free, -(logps - old).exp() * advantages * mask)
    torch.testing.assert_close(value_loss(logps, old, returns, mask, value_clip=0.0),
                               0.5 * ((logps - returns) * mask).square())  # fmt: skip


def test_both_sides_are_beyond_the_clip():
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.29, 1.31])
    assert ppo.beyond_clip(ratio, clip_low=0.2, clip_high=0.2).tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    assert ppo.beyond_clip(ratio, clip_low=0.4, clip_high=0.3).tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert not ppo.beyond_clip(ratio, clip_low=math.inf, clip_high=math.inf).any()


def test_gradients_of_the_clips():
    """P10: the policy's at ratios .5, 1, 1.5. P11: the value's at V = .5, 1, 1.5, V_old 1, returns 0 and 2."""
    mask = torch.ones(1, 3, dtype=torch.long)
    for a, wanted in ((1.0, [-0.5, -1, 0]), (-1.0, [0, 1, 1.5])):
        logps = torch.tensor([[0.5, 1.0, 1.5]]).log().requires_grad_()
        loss, _ = policy_loss(logps, torch.zeros(1, 3), torch.full((1, 3), a), mask, clip_eps=0.2)
        assert torch.autograd.grad(loss.sum(), logps)[0][0].tolist() == pytest.approx(wanted)
    for target, wanted in ((0.0, [0, 1, 1.5]), (2.0, [-1.5, -1, 0])):
        values = torch.tensor([[0.5, 1.0, 1.5]], requires_grad=True)
        loss = value_loss(values, torch.ones(1, 3), torch.full((1, 3), target), mask, value_clip=0.2)
        assert torch.autograd.grad(loss.sum(), values)[0][0].tolist() == pytest.approx(wanted)


def test_what_is_cut_off_is_never_worth_more():
    """Than any answer that ended, where a rule or a function of the user's pays less than --eos-penalty."""
    finished = torch.tensor([[True, False], [True, True]])
    for first, wanted in ((-3.0, -3.0), (1.0, -1.0)):
        found = withheld(torch.tensor([[first, -9.0], [2.0, 4.0]]), finished, -1.0, one())
        assert found.tolist() == [[first, wanted], [2.0, 4.0]]
    assert withheld(torch.tensor([-3.0, 4.0]), torch.zeros(2, dtype=torch.bool), 0.0, one()).tolist() == [0, 0]


def test_the_controller_steers_to_its_target():
    """1909.08593: at most 2% a step; at the target nothing."""
    assert adapted(0.2, 6.0, 6.0) == 0.2
    assert adapted(0.2, 60.0, 6.0) == pytest.approx(0.2 * 1.02) and adapted(0.2, 0.0, 6.0) == pytest.approx(0.2 * 0.98)
    assert adapted(0.2, 6.6, 6.0) == pytest.approx(0.2 * 1.01)


def test_a_bandit_rests_at_the_closed_form():
    """PPO with the KL in the reward: ref * exp(reward / kl_coef) / Z within 1%; a group of 5000 in proportion to pi."""
    reward, ref, kl_coef = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5]).log(), 0.5
    theta, G = ref.clone().requires_grad_(), 5000
    mask = torch.tensor([[0, 1]]).expand(G, 2)

    def both(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(G), x], dim=1)

    for _ in range(100):
        pi = theta.log_softmax(-1)
        arms = torch.searchsorted(pi.detach().exp().cumsum(-1), (torch.arange(G) + 0.5) / G).clamp(max=2)
        old = both(pi.detach()[arms])
        rewards = token_rewards(reward[arms], old, both(ref[arms]), mask, kl_coef=kl_coef)
        values = both(rewards.sum(-1).mean().expand(G))  # a perfect critic
        advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
        for _ in range(3):
            losses, _ = policy_loss(both(theta.log_softmax(-1)[arms]), old, advantages, mask, clip_eps=0.2)
            (gradient,) = torch.autograd.grad(losses.sum() / G, theta)
            theta = (theta - 1.5 * gradient).detach().requires_grad_()
    wanted = (ref + reward / kl_coef).softmax(-1)
    torch.testing.assert_close(theta.softmax(-1).detach(), wanted, rtol=0.01, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Policy, critic, rewards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model that says a few words of a letter and ends, most of the time; beside it a reward model."""
    torch.manual_seed(0)
    model, rng = Transformer(Config.from_depth(1, tiny().vocab_size, 160)), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = get_args([])
    for i in range(60):
        rows = [ppo.world_row(("warm", i, b), "train", args) for b in range(16)]
        prompts = [ppo.task_of(row, tiny()).prompt for row in rows]
        words = [" ".join(rng.choice(("Hi", "nice", "day", "cat")) for _ in range(rng.randint(1, 7))) for _ in rows]
        said = [[*tiny().encode(text), tiny().eos_ids[0]] for text in words]
        width = max(len(p) + len(c) for p, c in zip(prompts, said, strict=True))
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in zip(prompts, said, strict=True)])
        mask = torch.tensor([[0] * len(p) + [1] * len(c) + [0] * (width - len(p) - len(c))
                             for p, c in zip(prompts, said, strict=True)])  # fmt: skip
        (-ppo.score(model, ids, mask, tiny(), 1.0)[0].sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("model")
    save(model, tiny(), folder / "policy")
    save(reward_module.with_scalar_head(model), tiny(), folder / "reward")
    return folder


def args_for(checkpoint: Path, out: Path, *flags: object) -> Namespace:
    learned = () if {"--reward", "--preset"} & set(flags) else ("--reward-model", checkpoint / "reward")
    argv = ["--model", checkpoint / "policy", *learned, "--out", out, "--device", "cpu",
            "--batch-size", 8, "--steps", 3, "--lr", 1e-3, "--max-new-tokens", 12, "--tests", 6, "--show-every", 0,
            "--rm-pairs", 0, "--max-length", 128, "--micro-batch-size", 128, "--warmup", 2, *flags]  # fmt: skip
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


def rollout(checkpoint, tmp_path, *flags):
    args = args_for(checkpoint, tmp_path / "out", *flags)
    loop, model = Loop(args, "ppo"), load(args.model)[0]
    tasks = [ppo.task_of(ppo.world_row(("x", i), "train", args), tiny()) for i in range(6)]
    return args, loop, model, tasks, ppo.answers_to(model, tasks, tiny(), 2, args.temperature, (1, 2), args, loop)


def test_values_are_not_rounded(checkpoint, tmp_path):
    """Under autocast states are in bf16, and the shared critic's products are not."""
    _, _, model, _, (found, _) = rollout(checkpoint, tmp_path)
    critic = ppo.new_critic(model, None, "shared")
    with torch.autocast("cpu", torch.bfloat16):
        values = ppo.score(model, found.input_ids, found.completion_mask, tiny(), 1.0, critic)[2]
        hidden = model.hidden_before(found.input_ids)
    wanted = (hidden.double() @ critic.weight[0].double()).masked_fill(found.completion_mask == 0, 0.0)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_critic_begins_as_the_reward_model_that_pays(checkpoint, tmp_path, monkeypatch):
    """After the lesson of --rm-pairs, not before; whose requests are those of training."""
    begun, about, new_critic = [], [], ppo.new_critic
    before = load(checkpoint / "reward", labels=1)[0].blocks[0].ffn.down.weight
    monkeypatch.setattr(ppo, "lesson", lambda reward_model, model, judge, tasks, *_: (
        about.extend(task.row for task in tasks), reward_model.blocks[0].ffn.down.weight.data.add_(1)))  # fmt: skip
    monkeypatch.setattr(ppo, "new_critic", lambda *a: begun.append(new_critic(*a)) or begun[-1])
    run(checkpoint, tmp_path / "out", "--rm-pairs", 20, "--steps", 0)
    assert {world.split_of(f"{row['asker']} asks about {row['name']}") for row in about} == {"train"}
    torch.testing.assert_close(begun[0].blocks[0].ffn.down.weight, before + 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_is_scored_alike(checkpoint, tmp_path, temperature):
    args, loop, model, _, (found, texts) = rollout(checkpoint, tmp_path, "--temperature", temperature)
    of = (found.input_ids, found.completion_mask, tiny())
    logps, values = ppo.scored(model, *of, temperature, args, loop)
    torch.testing.assert_close(logps, found.logps, atol=1e-4, rtol=0)
    assert (ppo.scored(model, *of, 0.5, args, loop)[0] - found.logps).abs().max() > 0.1
    assert (logps[found.completion_mask == 0] == 0).all()
    assert (values == 0).all() and len(set(texts)) > 6


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_values_are_of_the_state_before_the_token(checkpoint, tmp_path, kind):
    """P13: the critic's normed state, once; the value at a token is blind to that token and to all behind it."""
    args, loop, model, _, (found, _) = rollout(checkpoint, tmp_path)
    critic = ppo.new_critic(model, None, kind)
    weight = critic.head.weight if kind == "own" else critic.weight
    assert weight.std().item() == pytest.approx((model.config.width + 1) ** -0.5, rel=0.3)
    of = (found.completion_mask, tiny(), 1.0, args, loop, critic)
    _, values = ppo.scored(model, found.input_ids, *of)
    mask = found.completion_mask.bool()
    trunk = critic if kind == "own" else model
    wanted = (trunk.hidden(found.input_ids) @ weight[0]).detach()[:, :-1]
    torch.testing.assert_close(values[:, 1:][mask[:, 1:]], wanted[mask[:, 1:]])
    assert (values[~mask] == 0).all()
    other, t = found.input_ids.clone(), int(mask[0].nonzero()[1])
    other[0, t:] = 5
    _, changed = ppo.scored(model, other, *of)
    assert changed[0, t] == values[0, t] and (t + 1 == mask.shape[1] or (changed != values).any() or not mask[0, t + 1])


def test_an_own_critic_begins_as_the_reward_model(checkpoint):
    model, judge = load(checkpoint / "policy")[0], load(checkpoint / "reward", labels=1)[0]
    for p in judge.blocks.parameters():
        p.data += 0.5
    critic = ppo.new_critic(model, judge, "own")
    assert torch.equal(critic.blocks[0].ffn.down.weight, judge.blocks[0].ffn.down.weight)
    assert not torch.equal(critic.head.weight, judge.head.weight)


def test_scores_are_the_reward_models(checkpoint, tmp_path):
    args, loop, model, tasks, (found, texts) = rollout(checkpoint, tmp_path, "--micro-batch-size", 5)
    judge = load(checkpoint / "reward", labels=1)[0]
    wanted = reward_module.rewards_of(judge, found.input_ids, found.completion_mask)
    torch.testing.assert_close(ppo.scores_of(found, texts, tasks, tiny(), judge, args, loop), wanted)
    args.reward = "judge"
    yes = reward_module.opinions(model, tiny(), texts, list(reward_module.CONSTITUTION), args, loop)
    found = ppo.scores_of(found, texts, tasks, tiny(), model, args, loop)
    wanted = [reward_module.worth(yes[text], list(reward_module.CONSTITUTION)) for text in texts]
    assert found.tolist() == pytest.approx(wanted)


def test_rules_and_utilities_are_paired_with_their_prompts(checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompt, text, row):\n    return len(prompt) * 100 + len(text)\n")
    args, loop, _, tasks, (found, texts) = rollout(checkpoint, tmp_path, "--reward", f"{tmp_path}/mine.py:f")
    args_model = args_for(checkpoint, tmp_path / "out")
    tasks = [ppo.task_of(ppo.world_row(("x", i), "train", args_model), tiny()) for i in range(6)]
    scores = ppo.scores_of(found, texts, tasks, tiny(), None, args, loop)
    wanted = [len(tasks[i // 2].row["prompt"]) * 100 + len(text) for i, text in enumerate(texts)]
    assert scores.tolist() == wanted
    rows = [task.row for task in tasks for _ in range(2)]
    texts = [f"Hi {row['asker']}!" for row in rows]
    worth = ppo.utilities(texts, tasks)
    assert worth == [1.0] * 12
    assert worth == [manners.utility(t, r["asker"], r["name"]) for t, r in zip(texts, rows, strict=True)]


def test_best_of_4_is_the_reward_models_choice(checkpoint, tmp_path, monkeypatch):
    args, loop, model, tasks, _ = rollout(checkpoint, tmp_path)
    texts, asked = [f"{i}" for i in range(24)], []
    monkeypatch.setattr(ppo, "answers_to", lambda *a: asked.append(a[3:5]) or (None, texts))
    monkeypatch.setattr(ppo, "scores_of", lambda *a: torch.tensor([float(i % 4 == 2) for i in range(24)]))
    monkeypatch.setattr(ppo, "utilities", lambda *a: [float(i) for i in range(24)])
    assert ppo.best_of_4(model, None, tasks, tiny(), args, loop) == pytest.approx(statistics.fmean(range(2, 24, 4)))
    assert asked == [(4, 1.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_is_a_plain_loop(checkpoint, tmp_path, monkeypatch):
    """Rewards, GAE, whitening, both losses, clipping and AdamW, one answer at a time, from the answers that it saw."""
    seen, whole, coefs, of_tokens = [], ppo.answers_to, [], ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda *a, kl_coef: coefs.append(kl_coef) or of_tokens(
        *a, kl_coef=kl_coef))  # fmt: skip
    monkeypatch.setattr(ppo, "answers_to", lambda *a: seen.append((a[5], whole(*a))) or seen[-1][1])
    monkeypatch.setattr(ppo, "withheld", None)  # is of rules
    flags = ("--kl-coef", 0.2, "--vf-coef", 0.5, "--passes", 2, "--gamma", 0.97, "--grad-clip", 0.5,
             "--value-clip", 0.1, "--schedule", "constant", "--temperature", 0.7, "--kl-target", 0.5)  # fmt: skip
    run(checkpoint, tmp_path / "out", *flags)
    rollouts = {seed: found for seed, (found, _) in seen if len(seed) == 3 and isinstance(seed[1], int)}
    assert [*rollouts] == [(0, 1, 0), (0, 2, 0), (0, 3, 0)]  # of the run, the step and the rank
    start = next(found for seed, (found, _) in seen if seed[1:] == ("test",))  # before the first step
    model, ref = (load(checkpoint / "policy")[0] for _ in range(2))
    judge = load(checkpoint / "reward", labels=1)[0]
    scores = reward_module.rewards_of(judge, start.input_ids, start.completion_mask).tolist()
    mean, std = statistics.fmean(scores), statistics.pstdev(scores)
    torch.manual_seed(0)
    seed_of_run = Loop(args_for(checkpoint, tmp_path / "other"), "ppo")
    seed_of_run.seed(0)
    critic = ppo.new_critic(model, judge, "own")
    parameters = [*model.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)

    def of_row(net, ids, places, value=False):
        if value:
            return (net.hidden(ids[None])[0, :-1] @ net.head.weight[0])[[t - 1 for t in places]]
        logps = (net(ids[None])[0] / 0.7).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        return logps[[t - 1 for t in places]]

    kl_coef = 0.2
    for step, (found, line) in enumerate(zip(rollouts.values(), logged(tmp_path / "out"), strict=True), start=1):
        rows, kls = [], []
        for b in range(8):
            ids, places = found.input_ids[b], found.completion_mask[b].nonzero().flatten().tolist()
            with torch.no_grad():
                old, then, v = of_row(model, ids, places), of_row(ref, ids, places), of_row(critic, ids, places, True)
                raw = reward_module.rewards_of(judge, ids[None], found.completion_mask[b : b + 1]).item()
            kls.append((old - then).sum().item())
            r = (-kl_coef * (old - then)).tolist()
            r[-1] += max(-5, min(5, (raw - mean) / std)) if found.finished[b] else -1.0
            a, nxt, after, values = [0.0] * len(r), 0.0, 0.0, v.tolist()
            for i in reversed(range(len(r))):
                a[i] = after = r[i] + 0.97 * nxt - values[i] + 0.97 * 0.95 * after
                nxt = values[i]
            rows.append((ids, places, old, v, torch.tensor(a), torch.tensor(a) + v))
        flat = torch.cat([row[4] for row in rows])
        n, losses = len(flat), []
        for _ in range(2):
            optimizer.zero_grad()
            policy, value = 0.0, 0.0
            for ids, places, old, v_old, a, returns in rows:
                ratio = (of_row(model, ids, places) - old).exp()
                a = (a - flat.mean()) / flat.std()
                policy = policy - torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / n
                v = of_row(critic, ids, places, True)
                near = v_old + (v - v_old).clamp(-0.1, 0.1)
                value = value + 0.5 * torch.max((v - returns) ** 2, (near - returns) ** 2).sum() / n
            (policy + 0.5 * value).backward()
            losses.append((policy.item(), value.item()))
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            for group in optimizer.param_groups:
                group["lr"] = line["lr"]
            optimizer.step()
        policy, value = map(statistics.fmean, zip(*losses, strict=True))
        assert line["loss"] == pytest.approx(policy, abs=2e-4)
        assert line["unfinished"] == pytest.approx(1 - found.finished.float().mean().item())
        assert line["value_loss"] == pytest.approx(value, rel=2e-3)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-2)
        assert line["lr"] == pytest.approx(1e-3 * (step / 2 if step < 3 else 1.0))
        assert line["kl"] == pytest.approx(statistics.fmean(kls), rel=1e-2, abs=1e-4)
        assert line["kl_coef"] == coefs[step - 1] == pytest.approx(kl_coef)
        kl_coef = adapted(kl_coef, line["kl"], 0.5)
    assert line["kl"] > 1e-2 and kl_coef < 0.2
    assert difference(weights(tmp_path / "out"), dict(model.named_parameters())) < 5e-4


@pytest.mark.parametrize("critic", ["own", pytest.param("shared", marks=pytest.mark.slow)])
def test_splitting_a_batch_changes_nothing(checkpoint, tmp_path, critic):
    found = []
    for size in (8, 3):
        out = tmp_path / str(size)
        flags = ("--minibatches", 2, "--micro-batch-size", size, "--passes", 2, "--steps", 2)
        run(checkpoint, out, "--critic", critic, *flags)
        found.append((logged(out), weights(out)))
    for lines, found_weights in found[1:]:
        for a, b in zip(found[0][0], lines, strict=True):
            for metric in a.keys() - {"seconds", "tokens_per_second", "rollout_seconds", "scoring_seconds",
                                     "update_seconds", "mismatch"}:  # fmt: skip
                assert b[metric] == pytest.approx(a[metric], rel=3e-3, abs=3e-5), metric
        assert difference(found[0][1], found_weights) < 2e-4


RANKS = ("--questions", 16, "--micro-batch-size", 3)


def on_a_rank(rank: int, folder: Path) -> None:
    run(folder / "model", folder / "two", *RANKS)


def test_two_ranks_are_one_batch(checkpoint, tmp_path, monkeypatch):
    """Whitening, token counts, metrics and gradients over both: the answers of both ranks, trained on by one."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(on_a_rank, tmp_path)
    whole = ppo.answers_to

    def as_ranks_do(model, tasks, tokenizer, samples, temperature, seed, args, loop):
        if len(seed) != 3 or samples != 1:  # the evaluation
            return whole(model, tasks, tokenizer, samples, temperature, seed, args, loop)
        parts = [whole(model, tasks[r::2], tokenizer, 1, temperature, (*seed[:2], r), args, loop) for r in range(2)]
        width = max(part.input_ids.shape[1] for part, _ in parts)
        order = [j * 4 + i for i in range(4) for j in range(2)]  # rank r has every second task

        def together(x: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(y, (0, width - y.shape[1])) for y in x])[order]

        texts = [text for _, some in parts for text in some]
        fields = [together([part[i] for part, _ in parts]) for i in range(3)]
        finished = torch.cat([part.finished for part, _ in parts])[order]
        return ppo.Generation(*fields, [], finished), [texts[i] for i in order]

    monkeypatch.setattr(ppo, "answers_to", as_ranks_do)
    run(checkpoint, tmp_path / "one", *RANKS)
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for metric in ("loss", "value_loss", "reward", "utility", "length", "grad_norm", "step_kl", "entropy"):
            assert b[metric] == pytest.approx(a[metric], rel=5e-3, abs=1e-4), metric
    assert difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 5e-4


def each_by_itself(model, tasks, tokenizer, samples, temperature, seed, args, loop):
    """What ppo.answers_to may return, but depending on the task alone and not on who asks."""
    parts = [loop.whole(model, [task], tokenizer, samples, temperature, task.prompt, args, loop) for task in tasks]
    width = max(part.input_ids.shape[1] for part, _ in parts)
    fields = [torch.cat([torch.nn.functional.pad(part[i], (0, width - part[i].shape[1])) for part, _ in parts])
              for i in range(3)]  # fmt: skip
    finished = torch.cat([part.finished for part, _ in parts])
    return ppo.Generation(*fields, [], finished), [text for _, some in parts for text in some]


def taught(folder: Path, n: int = 45, *flags: object) -> dict[str, torch.Tensor]:
    """The reward model after a lesson on n comparisons, the policy after four steps of imitation, gradient norms."""
    args = args_for(folder / "model", folder / "out", "--judge", "annotator", "--rm-lr", 1e-2, *flags)
    loop, model = Loop(args, "ppo"), load(args.model)[0]
    loop.whole, ppo.answers_to = ppo.answers_to, each_by_itself
    norms, clip, ppo.clip = [], ppo.clip, lambda *a: norms.append(clip(*a))
    try:
        judge = load(args.reward_model, labels=1)[0]
        tasks = [ppo.task_of(ppo.world_row(("z", i), "train", args), tiny()) for i in range(n)]
        ppo.lesson(judge, model, model, tasks[loop.rank :: loop.world_size], tiny(), 1, args, loop)
        ppo.imitate(model, sums_to_imitate(), args, loop, steps=4)
    finally:
        ppo.answers_to, ppo.clip = loop.whole, clip
    found = {"log of norms": torch.stack(norms).log()}
    return dict(judge.named_parameters(prefix="judge")) | dict(model.named_parameters(prefix="model")) | found


def sums_to_imitate() -> list[chat.Row]:
    rows = [world.exchange("sums", world.rng_for("imitate", i), "train")["messages"] for i in range(90)]
    return [chat.render(messages, tiny()) for messages in rows]


def taught_on_a_rank(rank: int, folder: Path) -> None:
    """And beside it: the least that any rank's rule paid is what was cut off gets."""
    ruled = Loop(args_for(folder / "model", folder / "out", "--reward", "exact"), "ppo")
    paid = withheld(torch.tensor([-2.0 - rank, -1.0]), torch.tensor([True, False]), -1.0, ruled)
    assert paid.tolist() == [-2.0 - rank, -3.0]
    torch.save(taught(folder), folder / f"{rank}.pt")


def test_two_ranks_teach_one_model(checkpoint, tmp_path):
    """The reward model of --rm-pairs and --refresh-rm, and the steps of imitation: gradients of all ranks."""
    shutil.copytree(checkpoint, tmp_path / "model")
    on_two_ranks(taught_on_a_rank, tmp_path)
    ranks, one_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], taught(tmp_path)
    before = dict(load(checkpoint / "reward", labels=1)[0].named_parameters(prefix="judge"))
    before |= dict(load(checkpoint / "policy")[0].named_parameters(prefix="model"))
    assert difference(*ranks) == 0 and difference(ranks[0], one_rank) < 1e-3
    for part in ("judge", "model"):
        a, b = ({name: p for name, p in x.items() if name.startswith(part)} for x in (before, one_rank))
        assert difference(a, b) > 3e-3


def test_splitting_what_is_taught_changes_nothing(checkpoint, tmp_path, monkeypatch):
    """Of a lesson and of imitation, at most --micro-batch-size rows are in the model at once; a comparison is two."""
    shutil.copytree(checkpoint, tmp_path / "model")
    sizes: list[int] = []
    rewards_of, sft_loss = ppo.rewards_of, ppo.sft_loss
    monkeypatch.setattr(ppo, "rewards_of", lambda model, ids, m: sizes.append(len(ids)) or rewards_of(model, ids, m))
    monkeypatch.setattr(ppo, "sft_loss", lambda model, b: sizes.append(len(b.input_ids)) or sft_loss(model, b))
    found = []
    for size, seen in ((64, {32, 26, 64}), (10, {10, 2, 6, 4})):
        found.append(taught(tmp_path, 45, "--micro-batch-size", size))
        assert set(sizes) == seen and sum(sizes) == 2 * 45 + 4 * 64
        del sizes[:]
    assert difference(*found) < 1e-3


def test_a_short_lesson_is_one(checkpoint, tmp_path):
    """Fewer than 16 comparisons, and what is left of more, are learned from too."""
    shutil.copytree(checkpoint, tmp_path / "model")
    before = dict(load(checkpoint / "reward", labels=1)[0].named_parameters(prefix="judge"))
    found = [{k: v for k, v in taught(tmp_path, n).items() if k in before} for n in (3, 16, 19)]
    assert difference(before, found[0]) > 1e-3 and difference(found[1], found[2]) > 1e-3


def test_imitation_lowers_the_loss_of_its_rows(checkpoint, tmp_path):
    args, loop, model, _, _ = rollout(checkpoint, tmp_path)
    rows = sums_to_imitate()[:8]

    def cost() -> float:
        total = 0.0
        for ids, mask in rows:
            logps = model(torch.tensor([ids]))[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            total -= logps[torch.tensor(mask[1:]).bool()].sum().item()
        return total

    before = cost()
    ppo.imitate(model, rows, args, loop, steps=20)
    assert cost() < 0.9 * before


def test_imitation_learns_at_the_rates_of_an_adapter(checkpoint, tmp_path):
    """Each parameter at as many times --sft-lr as it is marked with; AdamW's first step is as long as the rate."""
    args, loop, model, _, _ = rollout(checkpoint, tmp_path, "--sft-lr", 1e-3)
    fast = "blocks.0.ffn.down.weight"
    model.get_parameter(fast).lr_times = 5.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ppo.imitate(model, sums_to_imitate()[:8], args, loop, steps=1)
    for name, p in model.named_parameters():
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(5e-3 if name == fast else 1e-3, rel=0.01)
    rates = [get_args(flags).sft_lr for flags in (
        [], ["--adapter", "prompt"], ["--adapter", "lora:lr=3"], ["--adapter", "lora", "--sft-lr", "7"])]  # fmt: skip
    assert rates == pytest.approx([1e-3, 0.5, 3e-3, 7])


class Stop(Exception): ...


def stopping(after: int):
    class StopsAfter(Loop):
        def save(self, step, **kept):
            super().save(step, **kept)
            if step == after:
                raise Stop

    return StopsAfter


@pytest.mark.parametrize("flags", [
    (), ("--critic", "shared", "--kl-target", 1.0), ("--refresh-rm", 2, "--batch-size", 16, "--rm-pairs", 32),
    pytest.param(("--preset", "reft", "--sft-steps", 2), marks=pytest.mark.slow),
    pytest.param(("--loss", "a2c", "--reward", "judge"), marks=pytest.mark.slow),
    pytest.param(("--critic-warmup", 2, "--weight-decay", 0.1), marks=pytest.mark.slow),
])  # fmt: skip
def test_resuming_is_exact(checkpoint, tmp_path, monkeypatch, flags):
    """The critic, the controller, the reward model, the start after SFT: all come back."""
    flags = (*flags, "--steps", 3, "--save-every", 2)
    whole = run(checkpoint, tmp_path / "whole", *flags)
    monkeypatch.setattr(ppo, "Loop", stopping(2))
    with pytest.raises(Stop):
        run(checkpoint, tmp_path / "parts", *flags)
    monkeypatch.setattr(ppo, "Loop", Loop)
    parts = run(checkpoint, tmp_path / "parts", *flags, "--resume")
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    timing = {"seconds", "tokens_per_second", "rollout_seconds", "scoring_seconds", "update_seconds"}
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in logged(tmp_path / name)]
             for name in ("whole", "parts")]  # fmt: skip
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3]
    assert all(parts[name] == whole[name] for name in ("before", "after", "metrics", "baselines"))


@pytest.mark.slow
def test_answers_are_decoded_as_many_at_a_time_as_asked(checkpoint, tmp_path, monkeypatch):
    """In training, lessons and all that is measured; a run may go on with another number."""
    asked, generate, flags = [], ppo.generate, ("--rm-pairs", 32, "--steps", 1, "--rollout-batch")
    monkeypatch.setattr(ppo, "generate", lambda *x, **y: (asked.append(y["rollout_batch"]), generate(*x, **y))[1])
    parts = run(checkpoint, tmp_path / "out", *flags, 5)
    assert len(asked) > 4 and set(asked) == {5}
    assert run(checkpoint, tmp_path / "out", *flags, 3, "--resume")["after"] == pytest.approx(parts["after"])
    assert args_for(checkpoint, tmp_path).rollout_batch is None


def test_the_ratio_moves_after_the_first_pass_only(checkpoint, tmp_path):
    """P8: with one update the ratio is 1 up to rounding; old log-probs stay, so that with more it is not."""
    run(checkpoint, tmp_path / "one", "--passes", 1)
    lines = logged(tmp_path / "one")
    assert all(line["ratio_max"] == pytest.approx(1, abs=1e-4) and line["updates"] == 1 for line in lines)
    run(checkpoint, tmp_path / "four", "--passes", 4)
    assert all(line["ratio_max"] > 1.005 and line["updates"] == 4 for line in logged(tmp_path / "four"))


def test_graphs_are_for_all_shapes_and_the_reference_is_kept_in_dtype(checkpoint, tmp_path, monkeypatch):
    told, kept, whole = [], [], ppo.frozen
    monkeypatch.setattr(ppo, "frozen", lambda model: kept.append(whole(model)) or kept[-1])
    monkeypatch.setattr(Loop, "compile", lambda loop, model, dynamic=False: told.append(dynamic))
    run(checkpoint, tmp_path / "out", "--steps", 0, "--dtype", "bf16")
    assert told == [True] and {p.dtype for p in kept[0].blocks.parameters() if p.ndim == 2} == {torch.bfloat16}
    with pytest.raises(UserError, match="--minibatches 9: a step has 8 answers"):
        run(checkpoint, tmp_path / "out", "--minibatches", 9)


def test_no_steps_are_a_measurement(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path / "out", "--steps", 0)
    assert result["before"] == result["after"] and result["n"] == 6
    run(checkpoint, tmp_path / "sft", "--steps", 0, "--reward", "exact", "--sft-steps", 1)


def test_updates_stop_where_the_policy_has_gone_too_far(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", "--passes", 8, "--lr", 3e-2, "--stop-kl", 0.01, "--warmup", 0)
    assert all(line["updates"] < 8 and line["step_kl"] > 0.01 for line in logged(tmp_path / "out"))


def test_a2c_is_one_pass_without_a_clip(checkpoint, tmp_path):
    args = get_args(["--loss", "a2c"])
    assert (args.clip_eps, args.value_clip, args.passes) == (0, 0, 1)
    args = get_args([])
    assert (args.clip_eps, args.value_clip, args.passes, args.vf_coef, args.lam) == (0.2, 0.2, 4, 0.1, 0.95)


def test_the_critic_may_learn_first(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", "--critic-warmup", 3, "--weight-decay", 0.5)
    before = dict(load(checkpoint / "policy")[0].named_parameters())
    assert difference(before, weights(tmp_path / "out")) == 0


def test_the_reference_is_frozen_and_the_rest_moves(checkpoint, tmp_path, monkeypatch):
    kept, whole = [], ppo.frozen
    monkeypatch.setattr(ppo, "frozen", lambda model: kept.append(whole(model)) or kept[-1])
    critics, make = [], ppo.new_critic
    monkeypatch.setattr(ppo, "new_critic", lambda *a: critics.append(
        (c := make(*a), [p.clone() for p in c.parameters()])) or c)  # fmt: skip
    result = run(checkpoint, tmp_path / "out")
    before = dict(load(checkpoint / "policy")[0].named_parameters())
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in kept[0].named_parameters())
    assert all(not torch.equal(before[name], p) for name, p in weights(tmp_path / "out").items())
    assert all(not torch.equal(p, old) for p, old in zip(critics[0][0].parameters(), critics[0][1], strict=True))
    assert result["metric"] == "utility" and result["metrics"]["KL"]["before"] == 0 != result["metrics"]["KL"]["after"]
    assert "nats<" in (tmp_path / "out" / "overoptimisation.svg").read_text()
    assert [line["kl"] for line in logged(tmp_path / "out")][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_the_log_ratio_of_whole_answers(checkpoint, tmp_path, temperature):
    """At temperature 1, whatever that of training is."""
    result = run(checkpoint, tmp_path / "out", "--lr", 1e-2, "--temperature", temperature)
    args, loop, ref, _, _ = rollout(checkpoint, tmp_path)
    model = load(tmp_path / "out" / "checkpoint")[0]
    _, test = ppo.tasks_of(args, tiny(), loop)
    found, _ = ppo.answers_to(model, test, tiny(), 1, 1.0, (args.seed, "test"), args, loop)
    total = 0.0
    for ids, mask in zip(found.input_ids, found.completion_mask, strict=True):
        logps = [m(ids[None])[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0] for m in (model, ref)]
        total += ((logps[0] - logps[1]) * mask[1:]).sum().item() / 6
    assert result["metrics"]["KL"]["after"] == pytest.approx(total, rel=1e-3) and total > 0.05


@pytest.mark.parametrize("who", ["annotator", "ai"])
def test_the_reward_model_learns_from_new_answers(checkpoint, tmp_path, monkeypatch, who):
    """--refresh-rm: Bradley-Terry on two answers of the policy each, by --judge alone; frozen again afterwards."""
    args, loop, model, _, _ = rollout(checkpoint, tmp_path, "--refresh-rm", 1, "--rm-lr", 1e-2, "--judge", who)
    tasks = [ppo.task_of(ppo.world_row(("y", i), "train", args), tiny()) for i in range(320)]
    judge = load(checkpoint / "reward", labels=1)[0].requires_grad_(False)
    sign, asked = {"annotator": 1, "ai": -1}[who], []  # the two are of opposite opinions
    monkeypatch.setattr(ppo, "utilities", lambda texts, tasks: [sign * 9.0 * len(text) for text in texts])
    monkeypatch.setattr(ppo, "opinions_of", lambda judge, tokenizer, texts, args, loop: [
        asked.append(judge) or -sign * 9.0 * len(text) for text in texts])  # fmt: skip
    start = frozen(model)
    ppo.lesson(judge, model, start, tasks, tiny(), 1, args, loop)
    assert all(who == "ai" and j is start for j in asked)
    found, texts = ppo.answers_to(model, tasks[:100], tiny(), 2, 1.0, (args.seed, 2), args, loop)
    rewards = reward_module.rewards_of(judge, found.input_ids, found.completion_mask).view(-1, 2)
    lengths = torch.tensor([float(len(text)) for text in texts]).view(-1, 2)
    told = lengths[:, 0] != lengths[:, 1]
    assert told.sum() >= 40
    agree = ((rewards[:, 0] > rewards[:, 1]) == (lengths[:, 0] > lengths[:, 1]))[told]
    assert agree.float().mean() > 0.8 and not any(p.requires_grad for p in judge.parameters())


@pytest.mark.parametrize("size", [20.0, 0.1])
def test_a_lesson_is_a_plain_loop(checkpoint, tmp_path, monkeypatch, size):
    """Two updates of 16 and 4 pairs: Bradley-Terry of soft labels, centring, clipping, AdamW, warm-up and decay."""
    args, loop, model, _, _ = rollout(checkpoint, tmp_path, "--judge", "ai", "--rm-lr", 1e-2)
    tasks = [ppo.task_of(ppo.world_row(("y", i), "train", args), tiny()) for i in range(20)]
    answers, answer = [], ppo.answers_to
    monkeypatch.setattr(ppo, "answers_to", lambda *a: answers.append(answer(*a)) or answers[-1])
    monkeypatch.setattr(ppo, "opinions_of", lambda judge, tokenizer, texts, *_: [len(text) / 50 for text in texts])
    taught, mine = (load(checkpoint / "reward", labels=1)[0] for _ in range(2))
    for judge in (taught, mine):
        judge.head.weight.data *= size  # 20: far from centred, and gradients that are clipped
    ppo.lesson(taught, model, model, tasks, tiny(), 1, args, loop)
    ((found, texts),) = answers
    optimizer = torch.optim.AdamW(mine.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for n, pairs in enumerate((range(16), range(16, 20))):
        loss = 0.0
        for i in pairs:
            rows = slice(2 * i, 2 * i + 2)
            a, b = reward_module.rewards_of(mine, found.input_ids[rows], found.completion_mask[rows])
            p = 1 / (1 + math.exp((len(texts[2 * i + 1]) - len(texts[2 * i])) / 50))
            loss = loss - p * (a - b).sigmoid().log() - (1 - p) * (b - a).sigmoid().log() + 0.01 * (a + b) ** 2
        (loss / len(pairs)).backward()
        assert (torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0) > 1) == (size > 1)
        optimizer.param_groups[0]["lr"] = 1e-2 * (n + 1) / 5 * (1 - n / 2)
        optimizer.step()
        optimizer.zero_grad()
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(taught.parameters(), mine.parameters(), strict=True)])
    assert (apart > 1e-4).float().mean() < 1e-3  # but where a gradient is as small as its rounding


def test_rewards_keep_their_scale_when_the_reward_model_learns(checkpoint, tmp_path, monkeypatch):
    """--refresh-rm: what is taken out are mean and deviation of the start's answers by the model as it is now."""
    paid, learners, whole = [], [], ppo.final_reward
    start = dict(load(checkpoint / "policy")[0].named_parameters())

    def lesson(reward_model, model, *_):
        reward_model.head.weight.data *= 3
        learners.append(difference(start, dict(model.named_parameters())))

    monkeypatch.setattr(ppo, "lesson", lesson)
    monkeypatch.setattr(ppo, "final_reward", lambda *a, mean, std, **how: (
        paid.append((mean, std)), whole(*a, mean=mean, std=std, **how))[1])  # fmt: skip
    result = run(checkpoint, tmp_path / "out", "--refresh-rm", 2, "--steps", 4, "--lr", 1e-2)
    (mean, std), *later = paid
    for found, times in zip(later, (3, 3, 9), strict=True):
        assert found == (pytest.approx(times * mean, rel=1e-3), pytest.approx(times * std, rel=1e-3))
    assert std > 1e-2 and result["metrics"]["reward"]["before"] == pytest.approx(9 * mean, rel=1e-3)
    assert len(learners) == 2 and learners[0] > 1e-4  # it compares answers of the policy as it is now


@pytest.mark.parametrize("flags", [("--reward", "judge"), ("--judge", "ai", "--rm-pairs", 16, "--refresh-rm", 1)])
def test_the_judge_is_the_start_and_does_not_learn(checkpoint, tmp_path, monkeypatch, flags):
    """--reward judge and --judge ai of a --model of one's own."""
    start, asked = load(checkpoint / "policy")[0], []
    monkeypatch.setattr(ppo, "opinions_of", lambda judge, tokenizer, texts, args, loop: asked.append(
        difference(dict(judge.named_parameters()), dict(start.named_parameters()))) or [0.5] * len(texts))  # fmt: skip
    run(checkpoint, tmp_path / "out", *flags, "--lr", 1e-2)
    assert len(asked) > 3 and not any(asked)
    assert difference(weights(tmp_path / "out"), dict(start.named_parameters())) > 1e-4


@pytest.mark.parametrize("flags, wanted", [(("--reward", "judge"), 1), (("--judge", "ai"), 1), ((), 0)])
def test_the_tiny_worlds_judge_is_asked(checkpoint, tmp_path, monkeypatch, flags, wanted):
    asked, judge = [], load(checkpoint / "policy")[0]
    monkeypatch.setattr(ppo, "judge_of", lambda *_: asked.append(1) or judge)
    run(checkpoint, tmp_path / "out", *flags, "--steps", 1)
    assert len(asked) == wanted


def test_a_reward_model_of_another_tokenizer_is_refused(checkpoint, tmp_path):
    """Two ids exchanged: everything would run, on other words."""
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "reward" / "tokenizer.json"
    parts = json.loads(path.read_text())
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(parts))
    with pytest.raises(UserError, match="tokenizer is not the policy's"):
        run(tmp_path / "model", tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="tokenizer is not the policy's"):
        run(tmp_path / "model", tmp_path / "out")


def test_an_adapter_learns_faster_than_the_critic(checkpoint, tmp_path, monkeypatch):
    """A method's own rate is no critic's; a head on the trunk is the default, and the base is not touched."""
    made, whole = [], ppo.adamw
    monkeypatch.setattr(ppo, "adamw", lambda *arguments: made.append(whole(*arguments)) or made[-1])
    run(checkpoint, tmp_path / "out", "--adapter", "lora:rank=2,lr=4", "--lr", 4e-3, "--schedule", "constant",
        "--warmup", 0)  # fmt: skip
    rates = {len(p.shape) and tuple(p.shape) for group in made[-1].param_groups if group["lr"] < 2e-3
             for p in group["params"]}  # fmt: skip
    assert rates == {(1, load(checkpoint / "policy")[0].config.width)}  # the head, at a quarter of the rate
    assert (tmp_path / "out" / "checkpoint" / "adapter_model.safetensors").exists()


def test_a_sampler_that_differs_fails_the_run(checkpoint, tmp_path, monkeypatch):
    whole = ppo.generate

    def off(*arguments, **options):
        found = whole(*arguments, **options)
        return found._replace(logps=found.logps + 0.002 * found.completion_mask)

    monkeypatch.setattr(ppo, "generate", off)
    with pytest.raises(RunFailed, match="differ by 0.002"):
        run(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("flags", [(), ("--preset", "reft")])
def test_what_is_measured_is_held_out(checkpoint, tmp_path, flags):
    """Requests are about entities that no training request is about, sums of operands that no training sum has."""
    args = args_for(checkpoint, tmp_path / "out", *flags)
    args.tests = 40
    for tasks, split in zip(ppo.tasks_of(args, tiny(), Loop(args, "ppo")), ("train", "test"), strict=True):
        for row in (task.row for task in tasks[:40]):
            if flags:
                numbers = [word for word in row["prompt"].strip("?").split() if word.isdigit()]
                assert world.split_of(f"sum {' '.join(numbers)}") == split
            else:
                assert world.split_of(f"{row['asker']} asks about {row['name']}") == split


def test_reft_imitates_then_searches(checkpoint, tmp_path):
    """The same questions in both; a rule is measured by greedy answers."""
    result = run(checkpoint, tmp_path / "out", "--preset", "reft", "--sft-steps", 3, "--questions", 9)
    assert result["metric"] == "accuracy" and result["baselines"] == {} and result["variant"] == "ppo reft"
    args = args_for(checkpoint, tmp_path / "out", "--preset", "reft")
    assert args.reward == "reft" and args.questions == 500 and args.eos_penalty == 0 and get_args([]).eos_penalty == -1
    tasks, test = ppo.tasks_of(args, tiny(), Loop(args, "ppo"))
    assert len(tasks) == 500 and len(test) == 6
    shown = [task for task in tasks if "<think></think>" not in task.row["messages"][1]["content"]]
    assert 110 < len(shown) < 190
    assert all(world.is_correct(task.row["messages"][1]["content"], task.row["answer"]) for task in tasks)


def test_a_run_on_a_file(checkpoint, tmp_path):
    rows = [{"prompt": f"Say {i}."} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(checkpoint, tmp_path / "out", "--data", path, "--max-length", 100)
    assert result["n"] == 16 and result["metric"] == "reward"
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(40)]
    for name, bad in (("good", 40), ("rows", 36)):  # of 40 rows, some of which are held out
        lines = [json.dumps(row if i != bad else row | {"answer": "x"}) for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for files in (("--data", path), ("--data", tmp_path / "good.jsonl", "--eval-data", path)):
        with pytest.raises(UserError, match="rows.jsonl:37: the answer 'x'"):
            run(checkpoint, tmp_path / "out", *files, "--max-length", 100, "--reward", "number")
    with pytest.raises(UserError, match="exceed --max-length 20"):
        run(checkpoint, tmp_path / "out", "--data", path, "--max-length", 20)


OWN = """
def tests(prompt, completion, row):
    return 0.1 * row["tests"] + (len(completion) > 0) - 9.0
def right(prompt, completion, row):
    return 1.0
"""


def test_a_function_of_the_users_sees_its_columns_and_is_the_metric(checkpoint, tmp_path, monkeypatch):
    """What is cut off is neither right nor paid."""
    path, mine = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    mine.write_text(OWN)
    path.write_text("".join(json.dumps({"prompt": f"Say {i}.", "tests": 3}) + "\n" for i in range(40)))
    flags = ("--data", path, "--max-length", 100, "--eos-penalty", -7, "--max-new-tokens", 6)
    paid, of_tokens = [], ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda *a, **how: paid.append(a[0]) or of_tokens(*a, **how))
    result = run(checkpoint, tmp_path / "out", *flags, "--reward", f"{mine}:tests", "--steps", 1)
    assert result["metric"] == "reward" and "accuracy" in result["metrics"] and result["before"] < -7.6
    assert logged(tmp_path / "out")[0]["unfinished"] > 0 and paid[0].amax() < -7.6  # not even the penalty
    args = args_for(checkpoint, tmp_path / "out", *flags, "--reward", f"{mine}:right")
    loop, model = Loop(args, "ppo"), load(args.model)[0]
    _, test = ppo.tasks_of(args, tiny(), loop)
    rows = ppo.evaluate(model, None, None, test, tiny(), args, loop)
    sampled, greedy = (ppo.answers_to(model, test, tiny(), 1, t, seed, args, loop)[0].finished
                       for t, seed in ((1.0, (args.seed, "test")), (0.0, (0,))))  # fmt: skip
    assert 0 < sampled.sum() < 16 and not greedy.all()
    assert rows["reward"] == [1.0 if ended else -7.0 for ended in sampled] and list(rows)[0] == "reward"
    assert rows["accuracy"] == greedy.float().tolist()


def test_rows_are_held_out_of_one_file_only(checkpoint, tmp_path):
    for name, n in (("a", 40), ("b", 7)):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"Say {name}{i}."}) + "\n" for i in range(n)))
    flags = ("--data", tmp_path / "a", "--eval-data", tmp_path / "b", "--max-length", 100)
    args = args_for(checkpoint, tmp_path / "out", *flags)
    train, test = ppo.tasks_of(args, tiny(), Loop(args, "ppo"))
    assert len(train) == 40 and len(test) == 7
    (tmp_path / "b").write_text(json.dumps({"prompt": "Say it. " * 40}) + "\n")
    with pytest.raises(UserError, match="exceed --max-length 100"):
        ppo.tasks_of(args, tiny(), Loop(args, "ppo"))


@pytest.mark.parametrize(("flags", "said"), [
    (("--critic", "shared", "--critic-warmup", 2), "learns in its trunk"),
    (("--temperature", 0), "ever be tried"), (("--parallel", "fsdp"), "only replicas"),
    (("--clip-eps", 1), "less than 1"), (("--reward", "nothing"), "expected exact"), (("--gamma", 1.1), "at most 1"),
    (("--data", "x"), "needs --reward-model"), (("--data", "x", "--preset", "reft"), "takes no --data"),
    (("--data", "x", "--reward-model", "y", "--rm-pairs", 5), "take no --data"),
    (("--refresh-rm", 2, "--reward", "judge"), "needs --reward model"), (("--sft-steps", 2), "needs annotated sums"),
    (("--rm-pairs", 2, "--reward", "judge"), "need --reward model"),
    (("--judge", "ai", "--reward", "exact"), "need --reward model"), (("--kl-target", 6, "--kl-coef", 0), "stays 0"),
    (("--reward-model", "x", "--preset", "reft"), "need --reward model"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        get_args(list(map(str, flags)))


@pytest.mark.slow
def test_the_default_run_is_liked_better_by_the_annotator(tmp_path):
    """At least 80% of best-of-4's gain in true utility, at a KL of at most 10 nats."""
    result = main(get_args(["--out", str(tmp_path / "out")]))
    gain = result["after"] - result["before"]
    assert gain >= 0.8 * (result["baselines"]["best of 4 by the same reward"] - result["before"]) > 0
    assert result["metrics"]["KL"]["after"] <= 10
