"""Proximal policy optimization from a learned reward: RLHF, with a critic and a penalty for leaving the start.

    rewards[t]    = - kl_coef * (old_logps[t] - ref_logps[t]) + reward where t is the last token
    delta[t]      = rewards[t] + gamma * values[t + 1] - values[t]
    advantages[t] = delta[t] + gamma * lam * advantages[t + 1]
    loss = mean_t - min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps) A)
           + vf_coef / 2 * mean_t max((values - returns)^2, (values_clipped - returns)^2)

(Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9; GAE, 1506.02438, equation 16; the KL in the reward of
Ziegler et al. 2019, 1909.08593, equation 2, and InstructGPT, 2203.02155; the details of Huang et al. 2024, 2403.17031,
here N+.)
values[t] is what the critic expects from the state before token t, and returns = advantages + values, before whitening.
An answer that is cut off ends there like any other, and its reward is --eos-penalty instead (see `withheld`).

    detail of N+                                               here
    reward -1 for an answer without its ending token           --eos-penalty, in `final_reward`
    the mean reward of demonstrations is 0                     `scale_of`: that of the start; and its deviation is 1
    critic: the reward model's weights                         `new_critic`; its head is new, std 1/sqrt(D+1)
    advantages whitened over real tokens, rewards not          `whitened`
    4 passes over a rollout, 1 minibatch                       --passes 4 --minibatches 1
    gamma 1, lam 0.95, clip_eps 0.2, vf_coef 0.1, kl_coef 0.05    the defaults; in the generated world kl_coef is 0.1
    temperature in sampling and in log-probs, no top-k         `score`
    no dropout, policy and critic step together, linear lr     there is none; one optimizer; --schedule linear
    Adam's eps 1e-5                                            1e-8, as in all scripts here

    --reward model     the reward model of reward.py, or --reward-model DIR (such as one of --labels ai)
    --reward judge     a chat model's opinion by the constitution (direct RLAIF, 2309.00267, section 3.2)
    --reward exact     or another rule of data/checkers.py, or FILE.py:function; --preset reft: SFT, then PPO on the
                       same questions with a rule's reward (ReFT, 2401.08967)
    --rm-pairs N       comparisons of the start's own answers that the reward model learns from first
    --refresh-rm N     and every N steps it learns from comparisons of new answers (2204.05862)
    --judge ai         a chat model compares them, by the constitution (RLAIF, 2309.00267)
    --kl-target X      kl_coef follows the KL (1909.08593, section 2.2)      --loss a2c   one pass, no clip (1602.01783)

In the generated world the annotator's true utility is known, and OUT/overoptimisation.svg draws it and the learned
reward over the KL (Gao et al. 2022, 2210.10760). A reward model that never saw this policy's own answers (--rm-pairs 0)
cannot tell its false facts from true ones: with --kl-coef 0 the reward rises and the utility falls from the first step.

    python ppo.py                                                    the tiny model, reward.py's reward
    python ppo.py --model DIR --reward-model DIR --data FILE.jsonl   a real model; rows with a prompt
    torchrun --nproc-per-node 8 ppo.py --model DIR --reward-model DIR --data FILE.jsonl
    python ppo.py --kl-coef 0 --rm-pairs 0                           too much of a good thing

The last lines say what the annotator thinks of held-out answers: `utility: -1.x before, 1.x after`.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import chat, checkers, formats, manners, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from kernels import IGNORED, linear_logps
from loop import COUNT, REAL, WHOLE, Loop, RunFailed, adamw, clip, curve, fill, parser, run, set_lr, told
from lora import adapt, rates_of
from model import Generation, Transformer, frozen, generate, load
from reward import (
    CONSTITUTION,
    bradley_terry,
    judge_of,
    load_reward_model,
    opinions,
    rewards_of,
    with_scalar_head,
    worth,
)
from sft import collate, sft_loss

# 1. The objective

# All tensors are (B, T), aligned to input_ids; where completion_mask is 0 anything may stand.


def final_reward(scores: Tensor, finished: Tensor, *, mean: float, std: float, clip_at: float, eos_penalty: float
                 ) -> Tensor:  # fmt: skip
    """(B,): (score - mean) / std within +-clip_at (0: no clip); eos_penalty for an answer that did not end (N+)."""
    reward = (scores - mean) / std
    reward = reward.clamp(-clip_at, clip_at) if clip_at else reward
    return torch.where(finished, reward, eos_penalty)


def token_rewards(reward: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_mask: Tensor, *, kl_coef: float
                  ) -> Tensor:  # fmt: skip
    """- kl_coef * log pi_old / ref at each token, and reward (B,) at the last one (1909.08593, equation 2)."""
    kl = (old_logps - ref_logps).masked_fill(completion_mask == 0, 0.0)
    is_last = completion_mask.flip(-1).cumsum(-1).flip(-1) * completion_mask == 1
    return -kl_coef * kl + torch.where(is_last, reward[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns): A[t] = delta[t] + gamma lam A[t + 1], and A + values (1506.02438, equation 16).

    Behind the last token the value is 0: nothing follows.
    """
    real = completion_mask.bool()
    values = values.masked_fill(~real, 0.0)
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(real[:, t], delta + gamma * lam * following, 0.0)
        advantages[:, t], next_value = following, values[:, t]
    return advantages, (advantages + values).masked_fill(~real, 0.0)


def whitened(x: Tensor, completion_mask: Tensor, loop: Loop) -> Tensor:
    """x with mean 0 and deviation 1 over the real tokens of the whole step, on all ranks."""
    real = x[completion_mask.bool()]  # in its own dtype: an MPS device has no float64
    n, total = loop.sum_over_ranks(torch.stack([torch.ones_like(real).sum(), real.sum()]))
    squares = loop.sum_over_ranks((real - total / n).square().sum())
    white = (x - total / n) * (squares / (n - 1).clamp(min=1) + 1e-8).rsqrt()
    return white.masked_fill(completion_mask == 0, 0.0)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (1707.06347, equation 7): no gain from going further."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def beyond_clip(ratio: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1.0 where the ratio lies beyond the clip, on whichever side, else 0.0: what clip_fraction is the mean of."""
    return ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).float()


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, *, clip_eps: float
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """- clipped_surrogate within +-clip_eps, and the ratio.

    clip_eps 0 does not clip: at ratio 1 the gradient is that of - A log pi, which is A2C (1602.01783).
    """
    dead = completion_mask == 0
    ratio, advantages = (logps - old_logps).masked_fill(dead, 0.0).exp(), advantages.masked_fill(dead, 0.0)
    clip_eps = clip_eps or math.inf
    return -clipped_surrogate(ratio, advantages, clip_low=clip_eps, clip_high=clip_eps), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, *, value_clip: float
               ) -> Tensor:  # fmt: skip
    """1/2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2); value_clip 0 does not clip."""
    values, old_values, returns = (x.masked_fill(completion_mask == 0, 0.0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-value_clip, value_clip) if value_clip else values
    return 0.5 * torch.max((values - returns).square(), (near - returns).square())


def adapted(kl_coef: float, kl: float, target: float) -> float:
    """kl_coef * (1 + 0.1 * clip(KL / target - 1, -0.2, 0.2)) (1909.08593, section 2.2)."""
    return kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))


LOSSES = {  # name: {hyperparameter: default}
    "ppo": {"clip_eps": 0.2, "value_clip": 0.2, "passes": 4},
    "a2c": {"clip_eps": 0.0, "value_clip": 0.0, "passes": 1},
}


def score(model: Transformer, ids: Tensor, mask: Tensor, tokenizer: Tokenizer, temperature: float,
          critic: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """log pi, entropy and (with a critic) values of the completions, 0 elsewhere; a Linear critic shares the trunk."""
    targets, hidden = ids.masked_fill(mask == 0, IGNORED), model.hidden_before(ids)
    head, values = model.head.weight[: tokenizer.vocab_size], None  # ids beyond it are never sampled
    logps, entropy = linear_logps(hidden, head, targets, temperature=temperature, with_entropy=True)
    if critic is not None:
        of_shared = isinstance(critic, nn.Linear)
        trunk, value_head = (hidden, critic) if of_shared else (critic.hidden_before(ids), critic.head)
        values = (trunk * value_head.weight).sum(-1).float()  # no product that autocast would round
    return logps, entropy, None if values is None else values.masked_fill(mask == 0, 0.0)


def new_critic(model: Transformer, reward_model: Transformer | None, kind: str) -> nn.Module:
    """A network of its own with the weights of the reward model (or policy), or a head on the policy's trunk."""
    if kind == "own":
        return with_scalar_head(reward_model or model)
    head = nn.Linear(model.config.width, 1, bias=False).to(model.embed.weight)
    nn.init.normal_(head.weight, std=(model.config.width + 1) ** -0.5)
    return head


# 2. Data


class Task(NamedTuple):
    prompt: list[int]
    row: dict  # "prompt", and what there is of "answer", "asker", "name" and the annotation, "messages"
    messages: Sequence[dict] = ()  # the prompt as a conversation


class Batch(NamedTuple):
    """A rollout and what is learned from it, all (B, T)."""

    input_ids: Tensor
    completion_mask: Tensor
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def task_of(row: dict, tokenizer: Tokenizer) -> Task:
    messages = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    ids = chat.render(messages, tokenizer, add_generation_prompt=True).input_ids
    return Task(ids, row, messages)


def prompt_text(task: Task) -> str:
    prompt = task.row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def file_tasks(rewards: Sequence[str], tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop
               ) -> tuple[list[Task], list[Task]]:  # fmt: skip
    """(train, held out) of --data, as the `rewards` need it: a function of the user's sees every column of its row."""
    needing, keep = [name for name in rewards if name in checkers.NEED_ANSWER], any(":" in name for name in rewards)
    schemas, mapping = ("answer",) if needing else ("answer", "prompt"), formats.parse_map(args.map)
    files = {path: formats.read_jsonl(path, schemas, mapping=mapping, keep=keep)
             for path in (args.data, args.eval_data) if path}  # fmt: skip
    for name, (path, rows) in itertools.product(needing, files.items()):
        checkers.check_answers(name, rows, path)
    rows, held_out = (files[args.data], files[args.eval_data]) if args.eval_data else formats.hold_out(files[args.data])
    if not held_out:
        loop.say(f"only {len(rows)} rows: none are held out, and what is measured are the training rows")
    train, test = ([task_of(row, tokenizer) for row in some] for some in (rows, held_out or rows))
    return train, test


def check_length(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """UserError if a prompt leaves no room for an answer."""
    longest = max(len(task.prompt) for task in tasks)
    if longest + args.max_new_tokens > args.max_length:
        raise UserError(f"a prompt of {longest} tokens and --max-new-tokens {args.max_new_tokens} exceed --max-length "
                        f"{args.max_length}")  # fmt: skip


def tasks_of(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[Task], list[Task]]:
    """(train, held out): requests of data/manners.py for a learned reward, sums for a rule, or rows of --data."""
    if args.data:
        train, test = file_tasks([args.reward], tokenizer, args, loop)
    else:
        n = args.questions or max(1, args.steps) * args.batch_size
        train = [task_of(world_row(("ppo", args.seed, i), "train", args), tokenizer) for i in range(n)]
        test = [task_of(world_row(("ppo test", i), "test", args), tokenizer) for i in range(args.tests)]
    check_length(train + test, args)
    return train, test


def world_row(key: Sequence, split: str, args: argparse.Namespace) -> dict:
    rng = world.rng_for(*key)
    if args.reward in LEARNED:
        return manners.draw_request(rng, split)
    row = world.exchange("sums", rng, split)
    return {"prompt": row["messages"][0]["content"], "answer": row["answer"], "messages": row["messages"]}


def answers_to(model: Transformer, tasks: Sequence[Task], tokenizer: Tokenizer, samples: int, temperature: float,
               seed: Sequence[int], args: argparse.Namespace, loop: Loop) -> tuple[Generation, list[str]]:  # fmt: skip
    """`samples` answers to each task, and their texts; sampled from what is scored: no top-k, no top-p."""
    with loop.autocast():
        found = generate(
            model, [task.prompt for task in tasks], max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
            samples=samples, temperature=temperature, vocab_size=tokenizer.vocab_size,
            seed=world.rng_for("rollout", *seed).getrandbits(60), rollout_batch=args.rollout_batch,
        )  # fmt: skip
    return found, [chat.completion_text(ids, tokenizer) for ids in found.completions]


@torch.no_grad()
def scores_of(found: Generation, texts: list[str], tasks: Sequence[Task], tokenizer: Tokenizer,
              reward_model: Transformer | None, args: argparse.Namespace, loop: Loop) -> Tensor:  # fmt: skip
    """(B,): what --reward thinks of each answer; row r answers task r // (B / tasks)."""
    each = len(texts) // len(tasks)
    if args.reward == "model":
        parts = []
        for start in range(0, len(texts), args.micro_batch_size):
            rows = slice(start, start + args.micro_batch_size)
            with loop.autocast():
                parts.append(rewards_of(reward_model, found.input_ids[rows], found.completion_mask[rows]).float())
        return torch.cat(parts)
    if args.reward == "judge":
        values = opinions_of(reward_model, tokenizer, texts, args, loop)
    else:
        rule = checkers.load_reward(args.reward)
        values = [rule(prompt_text(tasks[i // each]), text, tasks[i // each].row) for i, text in enumerate(texts)]
    return torch.tensor(values, device=loop.device)


def opinions_of(judge: Transformer, tokenizer: Tokenizer, texts: list[str], args: argparse.Namespace, loop: Loop
                ) -> list[float]:  # fmt: skip
    """What the chat model `judge` thinks of each text by the constitution of reward.py."""
    yes = opinions(judge, tokenizer, texts, list(CONSTITUTION), args, loop)
    return [worth(yes[text], list(CONSTITUTION)) for text in texts]


def utilities(texts: list[str], tasks: Sequence[Task]) -> list[float]:
    """The annotator's true utility of each answer; NaN where there is no annotator."""
    each = len(texts) // len(tasks)
    rows = [tasks[i // each].row for i in range(len(texts))]
    return [manners.utility(text, row["asker"], row["name"]) if "asker" in row else math.nan
            for text, row in zip(texts, rows, strict=True)]  # fmt: skip


def withheld(values: Tensor, finished: Tensor, at_most: float, loop: Loop) -> Tensor:
    """`values`; an answer that did not end by itself gets `at_most`, or what the worst got that did, on all ranks.

    Else never to end would be the best answer to a rule, or to a function of the user's, that pays less.
    """
    least = values.masked_fill(~finished, math.inf).amin().clamp(max=at_most)
    return torch.where(finished, values, everybodys(least[None], loop).amin().to(values.device))


@torch.no_grad()
def scored(model: Transformer, ids: Tensor, mask: Tensor, tokenizer: Tokenizer, temperature: float,
           args: argparse.Namespace, loop: Loop, critic: nn.Module | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log pi and values (B, T) of a whole rollout, without a gradient."""
    logps, values = torch.zeros(2, *ids.shape, device=ids.device)
    for start in range(0, len(ids), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        with loop.autocast():
            logps[rows], _, found = score(model, ids[rows], mask[rows], tokenizer, temperature, critic)
        values[rows] = 0.0 if critic is None else found
    return logps, values


def everybodys(x: Tensor, loop: Loop) -> Tensor:
    """(world_size * n, ...): the rows (n, ...) of all ranks, in their order."""
    if loop.world_size == 1:
        return x
    whole = torch.zeros(loop.world_size, *x.shape, dtype=x.dtype, device=loop.device)
    whole[loop.rank] = x.to(loop.device)
    return loop.sum_over_ranks(whole).flatten(0, 1)


def ratio_and_mismatch(largest: Tensor, loop: Loop) -> dict[str, float]:
    """The largest ratio and |log-prob as sampled - as rescored| of all ranks, from this one's (2,).

    RunFailed if the latter is no rounding: sampler and training forward are then of two models.
    """
    ratio_max, mismatch = everybodys(largest[None], loop).amax(0).tolist()
    if mismatch > 1e-3 and loop.dtype == torch.float32 and loop.device.type == "cpu":
        raise RunFailed(f"step {Loop.step}: log-probs as sampled and as rescored differ by {mismatch:.2g}")
    return {"ratio_max": ratio_max, "mismatch": mismatch}


def measured(found: Generation, texts: list[str], tasks: Sequence[Task], scores: Tensor, batch: Batch,
             ref_logps: Tensor, of_updates: dict[str, float], largest: Tensor, loop: Loop
             ) -> dict[str, float]:  # fmt: skip
    """What LOGGED explains, of all ranks."""
    real, values, returns = batch.completion_mask.bool(), batch.old_values, batch.returns
    explained = 1 - (returns - values)[real].var() / returns[real].var().clamp(min=1e-8)
    means = {
        "reward": scores.mean(), "utility": torch.tensor(utilities(texts, tasks), device=loop.device).mean(),
        "kl": (batch.old_logps - ref_logps).sum(-1).mean(), "length": real.sum(-1).float().mean(),
        "unfinished": 1 - found.finished.float().mean(), "explained": explained,
    }  # fmt: skip
    of_all = (loop.sum_over_ranks(torch.stack([*means.values()])) / loop.world_size).tolist()
    return dict(zip(means, of_all, strict=True)) | of_updates | ratio_and_mismatch(largest, loop)


def lesson(reward_model: Transformer, model: Transformer, judge: Transformer | None, tasks: Sequence[Task],
           tokenizer: Tokenizer, step: int, args: argparse.Namespace, loop: Loop) -> None:  # fmt: skip
    """One pass of Bradley-Terry over two answers of the policy to each task, labelled by --judge, in place.

    A reward model that has only seen what others wrote is blind to what this policy gets wrong (InstructGPT, section
    3.2, compares samples of its SFT model; 2204.05862, section 4.5, goes on with those of each new policy). `judge` is
    the chat model of --judge ai, whose labels are chances; the annotator's are coins. `tasks` are this rank's; 16 of
    all ranks make an update.
    """
    ranks = loop.world_size
    size = max(1, 16 // ranks)  # of this rank in an update
    parts, chunk, n_all = [], 128 // size * size, loop.sum_over_ranks(len(tasks))
    for i in range(0, len(tasks), chunk):
        seed = (args.seed, step, "lesson", loop.rank + i * ranks)  # the place of its first task among those of all
        parts.append(answers_to(model, tasks[i : i + chunk], tokenizer, 2, args.temperature, seed, args, loop))
    if args.judge == "ai":
        liked = [x for _, texts in parts for x in opinions_of(judge, tokenizer, texts, args, loop)]
    else:
        liked = [x for i, (_, texts) in enumerate(parts) for x in utilities(texts, tasks[chunk * i : chunk * (i + 1)])]
    chances = [manners.prefers_first(a, b) for a, b in zip(liked[::2], liked[1::2], strict=True)]
    if args.judge == "annotator":
        rng = world.rng_for("coin", args.seed, step)
        coins = [rng.random() for _ in range(len(tasks) * ranks)][loop.rank :: ranks]
        chances = [float(coin < chance) for coin, chance in zip(coins, chances, strict=True)]
    better = torch.tensor(chances, device=loop.device)
    optimizer = adamw(reward_model.requires_grad_(True), args.rm_lr, 0.0)
    total, at_once = math.ceil(n_all / (size * ranks)), max(1, args.micro_batch_size // 2)
    for n, start in enumerate(range(0, size * total, size)):
        labels = better[start : start + size]
        n_pairs = loop.sum_over_ranks(len(labels))
        for i in range(0, len(labels), at_once):
            few, found, first = labels[i : i + at_once], parts[start // chunk][0], 2 * (start % chunk + i)
            rows = slice(first, first + 2 * len(few))
            with loop.autocast():
                rewards = rewards_of(reward_model, found.input_ids[rows], found.completion_mask[rows]).view(-1, 2)
            (bradley_terry(*rewards.T, few, 0.0, 0.01).sum() / n_pairs).backward()
        loop.all_reduce(reward_model)
        clip(reward_model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.rm_lr * min(1, (n + 1) / 5) * (1 - n / total)
        optimizer.step()
        optimizer.zero_grad()
    reward_model.requires_grad_(False)


def imitate(model: Transformer, rows: Sequence[chat.Row], args: argparse.Namespace, loop: Loop, *, steps: int = 0,
            seconds: float = 0.0) -> None:  # fmt: skip
    """Supervised steps on `rows` by sft.py's loss, in place, 64 rows each: `steps` of them, or for some `seconds`."""
    optimizer, start, done = adamw(model, args.sft_lr, 0.0), time.perf_counter(), 0
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_times"]
    while loop.sum_over_ranks(int(loop.main and (done < steps or time.perf_counter() - start < seconds))):
        some = [rows[(done * 64 + i) % len(rows)] for i in range(64)][loop.rank :: loop.world_size]
        starts = range(0, len(some) or 1, args.micro_batch_size)  # a rank without rows has one of padding
        batches = [collate([[row] for row in some[i : i + args.micro_batch_size]], loop.device) for i in starts]
        n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
        for batch in batches:
            with loop.autocast():
                loss = sft_loss(model, batch) / n_tokens
            loss.backward()
        loop.all_reduce(model)
        clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done += 1


# The measurement


@torch.no_grad()
def evaluate(model: Transformer, ref_model: Transformer | None, reward_model: Transformer | None, tasks: list[Task],
             tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out question}, of one sample at temperature 1; the first is what the run is for.

    ref_model None: this is the start. A rule is measured by the share of greedy answers that it gives 1 or more, a
    function of the user's by its mean; what is cut off is not right and is paid as in training.
    """
    training = model.training
    model.eval()
    found, texts = answers_to(model, tasks, tokenizer, 1, 1.0, (args.seed, "test"), args, loop)
    reward = scores_of(found, texts, tasks, tokenizer, reward_model, args, loop)
    rows = {"length": found.completion_mask.sum(-1).float().tolist(), "KL": [0.0] * len(tasks)}
    if args.reward in LEARNED:
        rows = {"reward": reward.tolist()} | rows
        rows = {"utility": utilities(texts, tasks)} | rows if "asker" in tasks[0].row else rows
    else:
        said, greedy = answers_to(model, tasks, tokenizer, 1, 0.0, (0,), args, loop)
        right = (scores_of(said, greedy, tasks, tokenizer, None, args, loop) >= 1) & said.finished.to(loop.device)
        ended = found.finished.to(loop.device)
        paid = withheld(reward, ended, args.eos_penalty, loop)
        both = [("accuracy", right.float().tolist()), ("reward", paid.tolist())]
        rows = dict(both[::-1] if ":" in args.reward else both) | rows
    if ref_model is not None:
        now, then = (scored(m, found.input_ids, found.completion_mask, tokenizer, 1.0, args, loop)[0].sum(-1)
                     for m in (model, ref_model))  # fmt: skip
        rows["KL"] = (now - then).tolist()
    model.train(training)
    return rows


def scale_of(before: dict[str, list[float]], args: argparse.Namespace) -> dict[str, float]:
    """Mean and deviation of the start's scores by a learned reward, which `final_reward` takes out; of a rule 0 and 1.

    --refresh-rm, whose lessons move and stretch all scores, measures them anew.
    """
    if args.reward not in LEARNED:
        return {"mean": 0.0, "std": 1.0}
    return {"mean": statistics.fmean(before["reward"]), "std": max(statistics.pstdev(before["reward"]), 1e-3)}


def best_of_4(model: Transformer, reward_model: Transformer | None, tasks: list[Task], tokenizer: Tokenizer,
              args: argparse.Namespace, loop: Loop) -> float:  # fmt: skip
    """The true utility of that one of four samples of the start which --reward likes best."""
    found, texts = answers_to(model, tasks, tokenizer, 4, 1.0, (args.seed, "best of 4"), args, loop)
    best = scores_of(found, texts, tasks, tokenizer, reward_model, args, loop).view(-1, 4).argmax(-1)
    worth = torch.tensor(utilities(texts, tasks)).view(-1, 4)
    return worth.gather(1, best[:, None].cpu()).mean().item()


def conclude(model: Transformer, ref_model: Transformer, tokenizer: Tokenizer, tasks: list[Task],
             before: dict[str, list[float]], after: dict[str, list[float]], baselines: dict[str, float],
             args: argparse.Namespace, loop: Loop) -> dict:  # fmt: skip
    """Print three answers before and after, draw reward and utility over the KL, write result.json."""
    if loop.main:
        said = [answers_to(m, tasks[:3], tokenizer, 1, 1.0, (0,), args, loop)[1] for m in (ref_model, model)]
        for task, a, b in zip(tasks, *said, strict=False):
            print(f"\n  user    {prompt_text(task)}\n  before  {a}\n  after   {b}")
        series = ("reward", "utility") if "utility" in after else ("reward",)
        written = loop.metrics_file.read_text() if loop.metrics_file.exists() else ""  # --steps 0
        lines = [json.loads(line) for line in written.splitlines()]
        picture = curve([line | {"step": max(line["kl"], 0.0)} for line in lines], series,
                        title="reward as learned and utility as it is")  # fmt: skip
        Path(loop.out / "overoptimisation.svg").write_text(picture.replace(">step<", ">KL to the start, nats<"))
    was, now = (statistics.fmean(found[next(iter(after))]) for found in (before, after))
    for name, value in baselines.items():
        if value > was:
            loop.say(f"the gain is {(now - was) / (value - was):.0%} of that of {name}, at a KL of "
                     f"{statistics.fmean(after['KL']):.1f} nats")
    return loop.finish(before, after, baselines=baselines, variant=f"{args.loss} {args.preset or args.reward}",
                       series=series if loop.main else ())  # fmt: skip


# 3. Config

LEARNED = ("model", "judge")  # rewards that are no rule
UPDATED = ("loss", "value_loss", "entropy", "clip_fraction", "step_kl")  # summed over an update's tokens, over theirs
DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (128, 64),
    "micro_batch_size": (128, 4),
    "lr": (3e-4, 3e-6),
    "warmup": (2, 10),
    "max_length": (128, 2048),
    "max_new_tokens": (72, 512),
}
SFT_LR = (1e-3, 1e-3)  # likewise, of the supervised steps before
OF_DATA = {"steps": (15, 200), "kl_coef": (0.1, 0.05), "rm_pairs": (6000, 0)}  # (the generated world), (--data)
PRESETS = {  # of the generated world
    "": {"reward": "model", "sft_steps": 0, "questions": None, "eos_penalty": -1.0},
    "reft": {"reward": "reft", "sft_steps": 30, "questions": 500, "eos_penalty": 0.0},
}
LOGGED = """logged every --log-every steps, with what is healthy (printed once at the start):
  reward            mean score of the answers, as --reward gives it       rises
  utility           the annotator's, in the generated world               rises with it; where it falls: too much
  kl                nats a sequence to the start                          below 10; look at answers beyond 20
  kl_coef           moves with --kl-target only
  length            tokens of an answer                                   no sudden jump
  unfinished        share of answers cut off at --max-new-tokens          below 0.1
  explained         share of the returns' variance that the critic foresaw   above 0, better above 0.5
  loss, value_loss  means over the step's updates; the latter should fall, below the variance of returns
  entropy           nats a token, mean over the updates                   falls slowly; near 0: nothing new is tried
  clip_fraction     tokens whose ratio is beyond the clip, likewise       0.01 to 0.3
  step_kl           KL of the old to the new policy, nats a token, in the last update    below 0.02, or see --stop-kl
  ratio_max         largest pi / pi_old of all updates                    below 10
  updates           made of --passes * --minibatches                      all of them, unless --stop-kl stops
  grad_norm         before clipping                                       below 10 times its usual value
  mismatch          largest |log-prob as sampled - as rescored|           below 1e-3 in fp32, or the run fails
  rollout_seconds   sampling, and the lessons of --refresh-rm
  scoring_seconds   rewards, log-probs of policy and start, values, advantages
  update_seconds, seconds, tokens_per_second
"""


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--batch-size", "--micro-batch-size", "--lr", "--warmup",
               "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens", "--eval-data",
               "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel", "--log-every",
               "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS) | told(OF_DATA, ("", "with --data"))
        | {"schedule": "linear", "weight_decay": 0.0, "grad_clip": 1.0, "log_every": 1},
    )
    cli.epilog = LOGGED
    cli.add_argument("--loss", choices=tuple(LOSSES), default="ppo", help="a2c: one pass and no clip")
    cli.add_argument("--preset", choices=tuple(PRESETS), default="", help="a recipe of the generated world, see above")
    cli.add_argument("--reward", metavar="NAME", help="model, judge, exact, number, boxed, reft, format or "
                     "FILE.py:function (default: model)")  # fmt: skip
    cli.add_argument("--reward-model", metavar="DIR", help="checkpoint of reward.py (default: out/reward)")
    cli.add_argument("--reward-clip", type=REAL, help="largest reward, 0: none (default: 5 deviations of the "
                     "start's, if it is learned; else 0)")  # fmt: skip
    cli.add_argument("--eos-penalty", type=float, help="reward of an answer that is cut off; of a rule or "
                     "FILE.py at most the least of those that ended (default: -1; reft 0)")  # fmt: skip
    cli.add_argument("--critic", choices=("own", "shared"),
                     help="a network, or a head on the policy (default: own; with --adapter shared)")
    cli.add_argument("--critic-warmup", type=WHOLE, default=0, help="first steps in which only the critic learns")
    cli.add_argument("--rollout-batch", type=COUNT, help="answers decoded at a time, to save memory (default: all)")
    cli.add_argument("--temperature", type=REAL, default=1.0, help="of sampling and of scoring (default: %(default)s)")
    cli.add_argument("--passes", type=COUNT, help="over the answers of a step (default: 4; a2c 1)")
    cli.add_argument("--minibatches", type=COUNT, default=1, help="updates in a pass (default: %(default)s)")
    cli.add_argument("--kl-coef", type=REAL, help="of log pi / ref in the reward (default: 0.1; 0.05 with --data)")
    cli.add_argument("--kl-target", type=REAL, default=0.0, help="nats a sequence that kl_coef steers to; 0: fixed")
    cli.add_argument("--stop-kl", type=REAL, default=0.0, help="end a step's updates beyond this KL a token; 0: never")
    cli.add_argument("--gamma", type=REAL, default=1.0, help="discount (default: %(default)s)")
    cli.add_argument("--lam", type=REAL, default=0.95, help="GAE's lambda (default: %(default)s)")
    cli.add_argument("--clip-eps", type=REAL, help="how far the ratio may go from 1; 0 never clips (default: 0.2)")
    cli.add_argument("--value-clip", type=REAL, help="how far values may go in a step; 0 never clips (default: 0.2)")
    cli.add_argument("--vf-coef", type=REAL, default=0.1, help="weight of the value loss (default: %(default)s)")
    cli.add_argument("--rm-pairs", type=WHOLE, help="of the start's own answers that --judge compares "
                     "for the reward model before PPO (default: 6000; 0 with --data)")  # fmt: skip
    cli.add_argument("--refresh-rm", type=WHOLE, default=0, help="steps between further lessons of it, after "
                     "which its rewards are on another scale (default: 0, none)")  # fmt: skip
    cli.add_argument("--judge", choices=("annotator", "ai"), default="annotator", help="who compares in these lessons; "
                     "ai: --model itself, or out/judge, by the constitution of reward.py")  # fmt: skip
    cli.add_argument("--rm-lr", type=REAL, default=1e-3, help="learning rate of these lessons (default: %(default)s)")
    cli.add_argument("--sft-steps", type=WHOLE, help="supervised steps before PPO (default: 0; reft 30)")
    cli.add_argument("--sft-lr", type=REAL, help="their learning rate (default: 1e-3, with --adapter as many times "
                     "that as --lr)")  # fmt: skip
    cli.add_argument("--questions", type=COUNT, help="different ones of the world (default: never one twice; reft 500)")
    cli.add_argument("--tests", type=COUNT, default=400, help="held-out ones of the world (default: %(default)s)")
    cli.add_argument("--show-every", type=WHOLE, default=10, help="steps between samples shown (default: %(default)s)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    args = cli.parse_args(argv)
    of_model = args.reward_model or args.rm_pairs or args.judge == "ai"
    fill(args, rates_of(DEFAULTS, args.adapter), args.model is not None)
    fill(args, {"sft_lr": rates_of({"lr": SFT_LR}, args.adapter)["lr"]}, args.model is not None)
    fill(args, OF_DATA, args.data is not None)
    fill(args, {"critic": ("own", "shared")}, args.adapter is not None)
    for name, value in (PRESETS[args.preset] | LOSSES[args.loss]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.reward_clip is None:
        args.reward_clip = 5.0 if args.reward in LEARNED else 0.0
    for is_wrong, text in (
        (args.temperature == 0, "--temperature 0: nothing new would ever be tried"),
        (args.parallel == "fsdp", "--parallel fsdp: ranks decode unequal numbers of tokens; only replicas work here"),
        (args.clip_eps >= 1, "--clip-eps: expected less than 1"),
        (max(args.gamma, args.lam) > 1, "--gamma and --lam: expected at most 1"),
        (args.kl_target and not args.kl_coef, "--kl-target multiplies kl_coef, and from --kl-coef 0 it stays 0"),
        (args.data and args.preset, "--preset is a recipe of the generated world: it takes no --data"),
        (args.data and args.sft_steps, "--sft-steps learns from the generated world: it takes no --data"),
        (args.refresh_rm and args.reward != "model", "--refresh-rm teaches a reward model: it needs --reward model"),
        (of_model and args.reward != "model", "--reward-model, --rm-pairs and --judge ai need --reward model"),
        (args.data and (args.rm_pairs or args.refresh_rm), "--rm-pairs and --refresh-rm ask for the "
         "generated world's manners: they take no --data"),
        (args.critic == "shared" and args.critic_warmup, "--critic-warmup leaves the policy alone, but --critic shared "
         "learns in its trunk: choose --critic own"),
        (args.adapter and args.critic == "own" and args.reward != "model", "--adapter: a critic of its own would be a "
         "second whole model: choose --critic shared"),
        (args.sft_steps and args.reward in LEARNED, "--sft-steps needs annotated sums: --preset reft"),
        (args.data and args.reward == "model" and not args.reward_model, "--data needs --reward-model or --reward"),
    ):  # fmt: skip
        if is_wrong:
            raise UserError(text)
    if args.reward not in LEARNED:
        checkers.load_reward(args.reward)
    return args


def main(args: argparse.Namespace) -> dict:
    # 4. Setup
    loop = Loop(args, "ppo", out="-".join(filter(None, ["ppo", args.preset])))
    if args.batch_size % loop.world_size:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of the {loop.world_size} ranks")
    if args.minibatches > (n := args.batch_size // loop.world_size):
        raise UserError(f"--minibatches {args.minibatches}: a step has {n} answers on each rank")
    start = args.model or loop.require("sft")
    model, tokenizer = load(start, with_tokenizer=True)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    model.to(loop.device)
    times = adapt(model, args.adapter, start, loop, dropout=False).lr if args.adapter else 1.0
    loop.check_length(model)
    reward_model = None
    if args.reward == "model":
        reward_model = load_reward_model(args.reward_model or loop.require("reward"), tokenizer, loop.device)
    elif args.reward == "judge":
        reward_model = frozen(judge_of(model, args, loop))
    loop.say(f"--loss {args.loss}: " + ", ".join(f"{name} {getattr(args, name)}" for name in LOSSES[args.loss]))
    if not args.resume:
        loop.say(LOGGED.rstrip())
    tasks, test = tasks_of(args, tokenizer, loop)
    if args.sft_steps and not args.resume:
        rows = [chat.render(task.row["messages"], tokenizer) for task in tasks]
        imitate(model, rows, args, loop, steps=args.sft_steps)
    ref_model = frozen(model)
    if not model.adapter:  # else the base is kept so already
        loop.narrow(ref_model)
    judge = judge_of(ref_model, args, loop) if args.judge == "ai" else None
    if args.reward == "model" and args.rm_pairs and not args.resume:
        mine = range(loop.rank, args.rm_pairs, loop.world_size)
        rows = (world_row(("lesson", args.seed, i), "train", args) for i in mine)
        own = [task_of(row, tokenizer) for row in rows]
        lesson(reward_model, model, judge, own, tokenizer, 0, args, loop)
    loop.seed(0)  # the critic's head is the same whatever was drawn before it
    critic = new_critic(model, reward_model if args.reward == "model" else None, args.critic)
    for p in critic.parameters():
        p.lr_times = 1 / times  # the rate of an adapter is no critic's
    both = nn.ModuleDict({"policy": model, "critic": critic})
    optimizer = adamw(both, args.lr, args.weight_decay)
    loop.compile(model, dynamic=True)
    extra = loop.restore(model, optimizer)
    for name, module in (("ref", ref_model), ("critic", critic), ("reward_model", reward_model)):
        if kept := {key.removeprefix(f"{name}."): value for key, value in extra.items() if key.startswith(f"{name}.")}:
            module.load_state_dict(kept)
    loop.describe(model)
    before = extra.get("before") or evaluate(model, None, reward_model, test, tokenizer, args, loop)
    scale = scale_of(before, args)
    baselines = extra.get("baselines", {})
    if "utility" in before and not extra:
        baselines["best of 4 by the same reward"] = best_of_4(model, reward_model, test, tokenizer, args, loop)
    kl_coef = extra.get("kl_coef", args.kl_coef)

    # 5. Train
    for step in loop.steps(args.steps):
        lr, begun = set_lr(optimizer, args, step), time.perf_counter()

        # rollout and reward
        some = [tasks[i] for i in loop.batch_indices(len(tasks), step)[loop.rank :: loop.world_size]]
        if args.refresh_rm and step % args.refresh_rm == 0:
            lesson(reward_model, model, judge, some, tokenizer, step, args, loop)
            before |= {"reward": evaluate(ref_model, None, reward_model, test, tokenizer, args, loop)["reward"]}
            scale = scale_of(before, args)
        found, texts = answers_to(model, some, tokenizer, 1, args.temperature, (args.seed, step, loop.rank), args, loop)
        rollout_seconds = time.perf_counter() - begun
        scores = scores_of(found, texts, some, tokenizer, reward_model, args, loop)
        finished = found.finished.to(loop.device)
        reward = final_reward(scores, finished, clip_at=args.reward_clip, eos_penalty=args.eos_penalty, **scale)
        if args.reward not in LEARNED:  # whose penalty is in deviations, as they are themselves
            reward = withheld(reward, finished, args.eos_penalty, loop)
        if args.show_every and step % args.show_every == 1 % args.show_every:
            loop.say(f"step {step}: {prompt_text(some[0])!r} -> {texts[0]!r}: {reward[0].item():.2f}")

        # advantages
        mask = found.completion_mask
        old_logps, old_values = scored(model, found.input_ids, mask, tokenizer, args.temperature, args, loop, critic)
        ref_logps, _ = scored(ref_model, found.input_ids, mask, tokenizer, args.temperature, args, loop)
        rewards = token_rewards(reward, old_logps, ref_logps, mask, kl_coef=kl_coef)
        advantages, returns = gae(rewards, old_values, mask, gamma=args.gamma, lam=args.lam)
        advantages = whitened(advantages, mask, loop)
        batch = Batch(found.input_ids, mask, old_logps, old_values, advantages, returns)
        scoring_seconds = time.perf_counter() - begun - rollout_seconds

        # updates: forward -> loss -> backward -> clip -> step
        updates, n_read, sums = 0, 0, torch.zeros(len(UPDATED), device=loop.device)
        largest = torch.stack([torch.zeros_like(old_logps[0, 0]), (old_logps - found.logps).abs().max()])
        passes = (torch.randperm(len(mask)).tensor_split(args.minibatches) for _ in range(args.passes))
        for rows in itertools.chain.from_iterable(passes):
            n_tokens = max(1, loop.sum_over_ranks(int(mask[rows].sum())))
            update = torch.zeros_like(sums)
            for part in (Batch(*(x[few] for x in batch)) for few in rows.split(args.micro_batch_size)):
                with loop.autocast():
                    logps, entropy, values = score(model, part.input_ids, part.completion_mask, tokenizer,
                                                   args.temperature, critic)  # fmt: skip
                losses, ratio = policy_loss(logps, part.old_logps, part.advantages, part.completion_mask,
                                            clip_eps=args.clip_eps)  # fmt: skip
                value_losses = value_loss(values, part.old_values, part.returns, part.completion_mask,
                                          value_clip=args.value_clip)  # fmt: skip
                loss = args.vf_coef * value_losses + (losses if step > args.critic_warmup else 0.0)
                (loss.sum() / n_tokens).backward()
                with torch.no_grad():
                    clip_eps = args.clip_eps or math.inf
                    beyond = beyond_clip(ratio, clip_low=clip_eps, clip_high=clip_eps)
                    step_kl = ratio - 1 - ratio.log()  # of pi_old to pi
                    parts = {"loss": losses, "value_loss": value_losses, "entropy": entropy, "clip_fraction": beyond,
                             "step_kl": step_kl}  # fmt: skip
                    update += torch.stack([parts[name].sum() for name in UPDATED]) / n_tokens
                    largest[0] = torch.maximum(largest[0], ratio.amax())
                n_read += part.input_ids.numel()
            loop.all_reduce(both)
            grad_norm = clip(both, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            update, updates = loop.sum_over_ranks(update), updates + 1
            sums += update
            of_update = dict(zip(UPDATED, update, strict=True))
            if args.stop_kl and of_update["step_kl"] > args.stop_kl:
                break

        # log
        means = dict(zip(UPDATED, (sums / updates).tolist(), strict=True)) | {"step_kl": of_update["step_kl"]}
        metrics = measured(found, texts, some, scores, batch, ref_logps, means, largest, loop)
        loop.log(
            step, **metrics, kl_coef=kl_coef, updates=updates, grad_norm=grad_norm, lr=lr,
            rollout_seconds=rollout_seconds, scoring_seconds=scoring_seconds,
            update_seconds=time.perf_counter() - begun - rollout_seconds - scoring_seconds,
            tokens=loop.sum_over_ranks(n_read),
        )  # fmt: skip
        if args.kl_target:
            kl_coef = adapted(kl_coef, metrics["kl"], args.kl_target)
        if args.eval_every and loop.due("eval", step) and step < args.steps:
            name, values = next(iter(evaluate(model, None, reward_model, test, tokenizer, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            kept = {"before": before, "baselines": baselines, "kl_coef": kl_coef}
            modules = {"critic": critic} | ({"ref": ref_model} if args.sft_steps else {})
            modules |= {"reward_model": reward_model} if args.reward == "model" else {}
            kept |= {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra=kept)

    # 6. Evaluate
    after = evaluate(model, ref_model, reward_model, test, tokenizer, args, loop)
    return conclude(model, ref_model, tokenizer, test, before, after, baselines, args, loop)


if __name__ == "__main__":
    run(main, get_args)
