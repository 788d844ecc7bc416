"""Group relative policy optimization and its family: reinforcement learning without a critic, from checkable rewards.

    A_i  = (reward_i - mean(reward)) / std(reward)                       over the group_size answers i to one prompt
    loss = - 1/B sum_i 1/|y_i| sum_t [ min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - beta KL(pi || ref) ]
    ratio = pi(token t) / pi_old(token t),    KL = ref/pi - 1 - log(ref/pi)

(DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, equations 3, 4 and 21; DeepSeek-R1, Guo et al. 2025, 2501.12948.)
Each prompt gets a group of sampled answers, a rule says which are right, and what is better than the group's mean
becomes more likely. --loss picks a variant among the functions below, each with its paper; their defaults are in
LOSSES. Plain `grpo` does not rest at ref * exp(reward / beta), where rloo does: see `standardized`.

    --reward exact format=0.2     rules of data/checkers.py, each with a weight; FILE.py:function is your own
    --reward majority             agreement with most of the group, no answers needed (TTRL, 2504.16084): of what is in
                                  the last \\boxed, else of the number at the end, else of all that is said
    --reward prm                  the least step by the process reward model of reward.py --feedback steps
    --preset zero                 from the base model (R1-Zero)     --preset cold   after SFT on a few worked sums
    --preset reft                 SFT on the questions' annotation, then RL on the same questions (2401.08967)
    --preset r1                   the whole pipeline of R1: SFT, RL, best-of-N filter, SFT, RL
    --tools                       several turns: the model may call a calculator, whose tokens are masked

Not here: asynchronous rollouts, and what the survey (5.2.3) says of R1 but the R1 report does not have, a critic and
human-labelled steps; its adaptive entropy (equation 22) is --entropy-coef with --entropy-adapt.

    python grpo.py                                                              the tiny model, sums with 3 to 5 terms
    python grpo.py --model DIR --data FILE.jsonl --map question=prompt --reward boxed       a real model, real questions
    torchrun --nproc-per-node 8 grpo.py --model DIR --data FILE.jsonl --reward FILE.py:function
    python grpo.py --loss all --seeds 3                                         a table of all losses

The last lines say how many held-out sums the model gets right: `accuracy: 0.1xx before, 0.9xx after`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import chat, checkers, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from loop import COUNT, REAL, ROOT, WHOLE, Loop, adamw, clip, compare, fill, parser, run, set_lr, told
from lora import adapt, rates_of
from model import Transformer, frozen, generate, load
from ppo import (
    SFT_LR,
    Task,
    beyond_clip,
    check_length,
    clipped_surrogate,
    everybodys,
    file_tasks,
    imitate,
    prompt_text,
    ratio_and_mismatch,
    score,
    scored,
    task_of,
    withheld,
)
from reward import load_reward_model, running_rewards

# 1. The objective

# Advantages: reward (P, G) of G answers to each of the P prompts of a whole step, and counted (P, G): False for rows
# that are masked out, which touch nobody else's advantage. Each returns (P, G), 0 where not counted.


def moments(reward: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and (unbiased) standard deviation of the counted rewards in each row (P, 1)."""
    n = counted.sum(-1, keepdim=True)
    mean = torch.where(counted, reward, 0.0).sum(-1, keepdim=True) / n.clamp(min=1)
    squares = torch.where(counted, reward - mean, 0.0).square().sum(-1, keepdim=True)
    return n, mean, (squares / (n - 1).clamp(min=1)).sqrt()


def standardized(reward: Tensor, counted: Tensor, baseline: float) -> Tensor:
    """(r - mean) / std of the group (GRPO, 2402.03300, section 4.1.2).

    Because of std, grpo rests (with --kl k2) at ref * exp(reward / (beta * std)), where rloo, with k2 or k3
    --kl-weighted, rests at ref * exp(reward / beta), and so does dr_grpo with as many answers that the one itself
    hardly moves their mean (with G of them reward counts (G - 1) / G): of three arms with reward 1, .5, 0, ref .2, .3,
    .5 and beta 1 the latter is .35, .32, .33 and grpo's fixed point .75, .19, .06.
    """
    _, mean, std = moments(reward, counted)
    return torch.where(counted, (reward - mean) / (std + 1e-4), 0.0)


def centred(reward: Tensor, counted: Tensor, baseline: float) -> Tensor:
    """r - mean of the group (Dr. GRPO, 2503.20783, section 3.2: no prompt counts more for being easy or hard)."""
    _, mean, _ = moments(reward, counted)
    return torch.where(counted, reward - mean, 0.0)


def leave_one_out(reward: Tensor, counted: Tensor, baseline: float) -> Tensor:
    """r_i - mean of the others' rewards = n / (n - 1) * (r_i - mean) (RLOO, 2402.14740, section 3.2)."""
    n, mean, _ = moments(reward, counted)
    return torch.where(counted, (reward - mean) * n / (n - 1).clamp(min=1), 0.0)


def batch_standardized(reward: Tensor, counted: Tensor, baseline: float) -> Tensor:
    """(r - mean) / std over all of the step, r (B, T) of every token (REINFORCE++, 2501.03262, equation 4)."""
    _, mean, std = moments(reward.flatten(), counted.flatten())
    return torch.where(counted, (reward - mean) / (std + 1e-4), 0.0)


def minus_baseline(reward: Tensor, counted: Tensor, baseline: float) -> Tensor:
    """r - the running mean of earlier steps' rewards (REINFORCE, Williams 1992)."""
    return torch.where(counted, reward - baseline, 0.0)


def process_advantages(rewards: Tensor, ends: Tensor) -> Tensor:
    """(P, G, T) from the rewards of steps, at their last tokens where `ends` is True; both (P, G, T).

    Step rewards are standardized over all steps of the group; a token gets the sum over the steps that end at or after
    it (DeepSeekMath, 2402.03300, section 4.1.3).
    """
    flat = standardized(rewards.flatten(1), ends.flatten(1), 0.0).view_as(rewards)
    return flat.flip(-1).cumsum(-1).flip(-1)


# The policy's ratio and what is to be made small, both (B, T).


class Tokens(NamedTuple):
    """Rows of one update; all (B, T), aligned to input_ids. Where completion_mask is 0 anything may stand."""

    logps: Tensor  # log pi, the only one with a gradient
    old_logps: Tensor  # of the policy at the start of the step; equal to logps in the first update
    advantages: Tensor
    completion_mask: Tensor
    ref_logps: Tensor | None = None  # of the frozen start


def log_ratio(x: Tokens) -> Tensor:
    """log pi / pi_old, 0 where masked, whatever stands there."""
    return (x.logps - x.old_logps).masked_fill(x.completion_mask == 0, 0.0)


def token_ratio(x: Tokens) -> Tensor:
    return log_ratio(x).exp()


def mean_ratio(x: Tokens) -> Tensor:
    """One for the whole sequence: exp(mean over its tokens of the log ratio) (GSPO, 2507.18071, equation 7)."""
    length = x.completion_mask.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio(x).sum(-1, keepdim=True) / length).exp().expand_as(x.logps)


def sequence_ratio(x: Tokens) -> Tensor:
    """pi(y) / pi_old(y) of the whole sequence (RLOO, 2402.14740: the whole answer is one action)."""
    return log_ratio(x).sum(-1, keepdim=True).exp().expand_as(x.logps)


def clipped(ratio: Tensor, x: Tokens, *, clip_low: float, clip_high: float) -> Tensor:
    """- min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (PPO, 1707.06347, equation 7).

    clip_high > clip_low is DAPO's clip-higher (2503.14476, equation 10): unlikely tokens may become likely.
    """
    return -clipped_surrogate(ratio, x.advantages, clip_low=clip_low, clip_high=clip_high)


def cispo(ratio: Tensor, x: Tokens, *, clip_high: float) -> Tensor:
    """- clip(ratio, max 1 + clip_high), a constant, times A log pi: every token counts (2506.13585, equations 4, 5)."""
    return -ratio.clamp(max=1 + clip_high).detach() * x.advantages * x.logps.masked_fill(x.completion_mask == 0, 0.0)


def unclipped(ratio: Tensor, x: Tokens) -> Tensor:
    """- ratio A: at ratio 1 its gradient is that of - A log pi (REINFORCE, Williams 1992)."""
    return -ratio * x.advantages


# KL(pi || ref) at each token (B, T), estimated from samples of pi_old (Schulman 2020). Expectations of a gradient are
# those of KL itself for k2 and, importance-weighted, for k3; k3 alone has the gradient of KL(ref || pi).


def k2(x: Tokens, *, weighted: bool) -> Tensor:
    """(log pi / ref)^2 / 2; `weighted`: times the ratio, as a constant."""
    kl = ref_log_ratio(x).square() / 2
    return kl * log_ratio(x).exp().detach() if weighted else kl


def k3(x: Tokens, *, weighted: bool) -> Tensor:
    """ref / pi - 1 - log(ref / pi) (2402.03300, equation 4); `weighted`: times the ratio (2512.02556, equation 7)."""
    kl = torch.expm1(-ref_log_ratio(x)) + ref_log_ratio(x)
    return kl * log_ratio(x).exp() if weighted else kl


def ref_log_ratio(x: Tokens) -> Tensor:
    return (x.logps - x.ref_logps).masked_fill(x.completion_mask == 0, 0.0)


KLS = {"k2": k2, "k3": k3}  # k1 = log pi / ref is an estimate, too, but the expectation of its gradient is 0


def token_weights(completion_mask: Tensor, aggregate: str, *, n_rows: int, n_tokens: int, longest: int) -> Tensor:
    """(B, T): what each token's term is multiplied by; n_rows and n_tokens are those of the whole update, all ranks.

    sequence: 1 / (n_rows |y|), the mean over tokens and then over rows. token: 1 / n_tokens. constant: 1 / (n_rows *
    `longest`), in which `longest` is no property of the sample (Dr. GRPO). sum: 1 / n_rows, log-probs of sequences.
    """
    mask = completion_mask.to(torch.get_default_dtype())
    return {
        "sequence": mask / mask.sum(-1, keepdim=True).clamp(min=1) / n_rows,
        "token": mask / n_tokens,
        "constant": mask / (n_rows * longest),
        "sum": mask / n_rows,
    }[aggregate]


LOSSES = {  # name: (ratio, policy term, advantages, {hyperparameter: default})
    "grpo": (token_ratio, clipped, standardized, {"aggregate": "sequence", "clip_low": 0.2, "clip_high": 0.2}),
    "dr_grpo": (token_ratio, clipped, centred, {"aggregate": "constant", "clip_low": 0.2, "clip_high": 0.2}),
    "dapo": (token_ratio, clipped, standardized, {"aggregate": "token", "clip_low": 0.2, "clip_high": 0.28,
                                                  "dynamic_sampling": 4, "overlong_buffer": 16}),
    "gspo": (mean_ratio, clipped, standardized, {"aggregate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    # as trl has it: GRPO with a mean over the step's tokens; the advantages of the paper, a Beta's, are not here
    "bnpo": (token_ratio, clipped, standardized, {"aggregate": "token", "clip_low": 0.2, "clip_high": 0.2}),
    "cispo": (token_ratio, cispo, standardized, {"aggregate": "token", "clip_high": 4.0}),
    "rloo": (sequence_ratio, clipped, leave_one_out, {"aggregate": "sequence", "clip_low": 0.2, "clip_high": 0.2}),
    "reinforce++": (token_ratio, clipped, batch_standardized, {"aggregate": "token", "clip_low": 0.2, "clip_high": 0.2,
                                                               "kl_coef": 0.01}),
    "reinforce": (token_ratio, unclipped, minus_baseline, {"aggregate": "sum"}),
}  # fmt: skip
MAIN_LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")  # which --loss all runs with --seeds seeds
HYPER = ("aggregate", "clip_low", "clip_high", "dynamic_sampling", "overlong_buffer", "kl_coef")


def objective(x: Tokens, weights: Tensor, importance: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The loss () of some rows of an update, and the KL (B, T) that it contains.

    weights (B, T): see token_weights. importance (B, T): pi_old as trained / as sampled, truncated; 1 if they agree.
    """
    ratio, term, _, defaults = LOSSES[args.loss]
    dead = x.completion_mask == 0
    x, importance = x._replace(advantages=x.advantages.masked_fill(dead, 0.0)), importance.masked_fill(dead, 0.0)
    clips = {name: getattr(args, name) for name in ("clip_low", "clip_high") if name in defaults}
    losses = term(ratio(x), x, **clips) * importance
    kl = torch.zeros_like(losses) if x.ref_logps is None else KLS[args.kl](x, weighted=args.kl_weighted)
    return ((losses + args.beta * kl) * weights).sum(), kl.detach()


def truncated_importance(old_logps: Tensor, sampled_logps: Tensor, cap: float) -> Tensor:
    """min(pi_old as the training forward has it / as it was sampled, cap) (B, T) (Yao et al. 2025)."""
    return (old_logps - sampled_logps).exp().clamp(max=cap)


def entropy_coefficient(coef: float, adapt: float, reward: Tensor) -> float:
    """lambda = coef * exp(-adapt * Var(reward)): the survey's equation 22 (2503.06072); R1 has nothing like it."""
    return coef * math.exp(-adapt * reward.var(correction=0).item())


def overlong_penalty(length: Tensor, longest: int, buffer: int) -> Tensor:
    """0 up to longest - buffer tokens, then down in a line to -1 at `longest` (DAPO, 2503.14476, equation 13)."""
    return ((longest - buffer - length) / buffer).clamp(-1, 0)


def majority(votes: Sequence[str]) -> list[float]:
    """1 for each vote of a group for what has most, the earliest of several; '' is no vote.

    Where several vote and no two agree, nobody is right.
    """
    count = Counter(vote for vote in votes if vote)
    (most, n), *others = count.most_common() or [("", 0)]
    return [float(vote == most and (n > 1 or not others)) if vote else 0.0 for vote in votes]


# 2. Data


class Rollout(NamedTuple):
    """Row r is answer r % group_size to task r // group_size."""

    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T): 1 on what the model said, not on what a tool said
    sampled_logps: Tensor  # (B, T): as the sampler computed them
    completions: list[str]  # all that was said, for people
    answers: list[str]  # what is rewarded: the same, or behind a tool's answer the last turn
    finished: Tensor  # (B,): whether the answer ended by itself


class Judged(NamedTuple):
    """What G answers to each of P prompts are worth."""

    reward: Tensor  # (P, G)
    unshaped: Tensor  # (P, G): without the penalties of length
    passed: Tensor  # (P, G): whether an answer passes the first of --reward
    steps: tuple[Tensor, Tensor] | None  # the PRM's (rewards, ends), both (P, G, T)


class Sampled(NamedTuple):
    """This rank's part of a step."""

    tasks: list[Task]
    rollout: Rollout
    judged: Judged
    no_spread: float  # share of the groups sampled whose answers are all worth the same
    seconds: float  # of sampling alone


def world_task(args: argparse.Namespace, tokenizer: Tokenizer, key: Sequence, split: str, terms: int = 0) -> Task:
    """A sum with 3 to 5 terms (or `terms`), or with --tools a product; --preset zero asks in the base model's way."""
    rng = world.rng_for(*key)
    if args.tools:
        row = world.exchange("calculator", rng, split)
        question, answer = row["messages"][0]["content"], row["answer"]
    else:
        numbers = world.draw_sum(rng, split, terms)
        sum_of, answer = " + ".join(map(str, numbers)), str(sum(numbers))
        question = f"The sum of {sum_of}" if args.preset == "zero" else f"What is {sum_of}?"
    if args.preset == "zero":
        return Task(tokenizer.begin(question), {"prompt": question, "answer": answer})
    return task_of({"prompt": question, "answer": answer}, tokenizer)


def tasks_of(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[Task], dict[str, list[Task]]]:
    """The questions to train on, and the held-out ones: {"test", and of the world "longer"}."""
    if args.data:
        train, held_out = file_tasks([name for name, _ in args.rewards], tokenizer, args, loop)
        test = {"test": held_out}
    else:
        n = args.questions or max(1, args.steps) * args.batch_size
        train = [world_task(args, tokenizer, ("rl", args.seed, i), "train") for i in range(n)]
        test = {"test": [world_task(args, tokenizer, ("rl test", i), "test") for i in range(args.tests)]}
        if not args.tools:
            test["longer"] = [world_task(args, tokenizer, ("rl longer", i), "test", 6 + i % 3) for i in range(100)]
    check_length([*train, *(task for tasks in test.values() for task in tasks)], args)
    return train, test


def rollout_of(model: Transformer, tokenizer: Tokenizer, tasks: Sequence[Task], samples: int, temperature: float,
               seed: Sequence[int], args: argparse.Namespace) -> Rollout:  # fmt: skip
    """`samples` answers to each task, sampled from the same distribution that is scored: no top-k, no top-p."""
    seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    rows = [task for task in tasks for _ in range(samples)] if args.tools else tasks
    common = {"eos_ids": tokenizer.eos_ids, "temperature": temperature, "vocab_size": tokenizer.vocab_size,
              "rollout_batch": args.rollout_batch}  # fmt: skip
    found = generate(model, [task.prompt for task in rows], max_new_tokens=args.max_new_tokens,
                     samples=1 if args.tools else samples, seed=seed, **common)  # fmt: skip
    texts = [chat.completion_text(ids, tokenizer) for ids in found.completions]
    rollout = Rollout(found.input_ids, found.completion_mask, found.logps, texts, texts, found.finished)
    if not args.tools:
        return rollout
    said = [[*task.messages] for task in rows]
    calls = {r: call for r, text in enumerate(texts) if (call := calculator_call(text)) is not None}
    for turn in range(1, 3):  # at most two calls
        calls = {r: call for r, call in calls.items() if rollout.finished[r]}
        if calls:
            rollout = with_tool_turn(model, tokenizer, rollout, said, calls, seed + turn, args, common)
        calls = {r: call for r in calls if (call := calculator_call(rollout.answers[r])) is not None}
    return rollout


def calculator_call(text: str) -> str | None:
    """What a turn asks the calculator, if it ends with a call: '<tool>12 * 34</tool>' -> '12 * 34'."""
    _, opened, call = text.rstrip().rpartition("<tool>")
    return call.removesuffix("</tool>") if opened and call.endswith("</tool>") else None


def with_tool_turn(model: Transformer, tokenizer: Tokenizer, rollout: Rollout, said: list[list[dict]],
                   calls: dict[int, str], seed: int, args: argparse.Namespace, common: dict) -> Rollout:  # fmt: skip
    """The rollout with the calculator's answers to `calls` (row: expression), masked, and what the model says then.

    A row to which the model's context leaves no room for another turn ends with its call, as one that was cut off.
    """
    prompts, rows, finished = [], [], rollout.finished.clone()
    for r, call in calls.items():
        result = world.calculator(call)  # it parses
        said[r] += [{"role": "assistant", "content": rollout.answers[r]}, {"role": "tool", "content": result}]
        # not without the tool's turn: there are formats that write the last turn of all otherwise
        ids, mask = chat.render(said[r], tokenizer, add_generation_prompt=True)
        end = len(mask) - mask[::-1].index(1)  # behind the token that ended the model's turn
        n = int(rollout.completion_mask[r].nonzero()[-1]) + 1
        prompt = rollout.input_ids[r, :n].tolist() + ids[end:]
        finished[r] = len(prompt) + args.max_new_tokens <= model.context
        if finished[r]:
            prompts.append(prompt)
            rows.append(r)
    if not rows:
        return rollout._replace(finished=finished)
    found = generate(model, prompts, max_new_tokens=args.max_new_tokens, seed=seed, **common)
    width = max(found.input_ids.shape[1], rollout.input_ids.shape[1])
    ids, mask, logps, new_ids, new_mask, new_logps = (
        F.pad(x, (0, width - x.shape[1])) for x in (*rollout[:3], found.input_ids, found.completion_mask, found.logps)
    )
    ids[rows] = new_ids
    mask[rows] += new_mask  # the earlier turns' ones stay; the tool's tokens are 0 in both
    logps[rows] += new_logps
    completions, answers = [*rollout.completions], [*rollout.answers]
    for i, r in enumerate(rows):
        answers[r] = chat.completion_text(found.completions[i], tokenizer)
        completions[r] += f" [{said[r][-1]['content']}] {answers[r]}"
        finished[r] = found.finished[i]
    return Rollout(ids, mask, logps, completions, answers, finished)


def reward_of(rollout: Rollout, tasks: Sequence[Task], tokenizer: Tokenizer, prm: Transformer | None,
              args: argparse.Namespace, loop: Loop) -> Judged:  # fmt: skip
    """The sum of --reward, each with its weight and `withheld` from what was cut off, and the penalties of length.

    On the CPU, in float64: there are devices without.
    """
    G = len(rollout.completions) // len(tasks)
    unshaped, passed, steps = torch.zeros(len(tasks), G, dtype=torch.float64), None, None
    finished, lengths = rollout.finished.view(-1, G).cpu(), rollout.completion_mask.sum(-1).view(-1, G).cpu()
    for name, weight in args.rewards:
        if name == "prm":
            steps = step_scores(prm, rollout, tokenizer, G, args, loop)
        values = values_of(name, rollout, tasks, steps)
        passed = finished & (values >= (1.0 if name != "prm" else 0.5)) if passed is None else passed
        unshaped += withheld(weight * values, finished, 0.0, loop)
    reward = unshaped - args.length_penalty * lengths / args.max_new_tokens
    if args.overlong_buffer:
        reward += overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
    return Judged(reward, unshaped, passed, steps)


def values_of(name: str, rollout: Rollout, tasks: Sequence[Task], steps: tuple[Tensor, Tensor] | None) -> Tensor:
    """(P, G): what one of --reward thinks of each answer; of prm the least of its `steps`."""
    G = len(rollout.answers) // len(tasks)
    groups = [rollout.answers[i : i + G] for i in range(0, len(rollout.answers), G)]
    if name == "majority":
        values = [majority([checkers.vote(text) if ended else "" for text, ended in zip(*group, strict=True)])
                  for group in zip(groups, rollout.finished.view(-1, G).cpu(), strict=True)]  # fmt: skip
    elif name == "prm":
        values = torch.where(steps[1], steps[0], 1.0).amin(-1).cpu() * steps[1].any(-1).cpu()
    else:
        rule = checkers.load_reward(name)
        values = [[rule(prompt_text(task), text, task.row) for text in texts]
                  for task, texts in zip(tasks, groups, strict=True)]  # fmt: skip
    return torch.as_tensor(values, dtype=torch.float64)


@torch.no_grad()
def step_scores(prm: Transformer, rollout: Rollout, tokenizer: Tokenizer, G: int, args: argparse.Namespace, loop: Loop
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P(step is right) at the last token of each step, and where these are, (P, G, T).

    As reward.py was taught: a step of the world ends with a full stop, one of --data before the line does.
    """
    with loop.autocast():
        parts = [running_rewards(prm, ids) for ids in rollout.input_ids.split(args.micro_batch_size)]
    scores, ids, said = torch.cat(parts).float().sigmoid(), rollout.input_ids, rollout.completion_mask.bool()
    texts = {i: tokenizer.decode([i]) for i in ids.unique().tolist()}
    marks = [i for i, text in texts.items() if ("\n" in text if args.data else text.endswith("."))]
    marked = said & torch.isin(ids, torch.tensor(marks, device=ids.device))
    if args.data:
        marked = said & F.pad(marked[:, 1:] & ~marked[:, :-1], (0, 1))  # the token before
    last = said & (rollout.completion_mask.flip(-1).cumsum(-1).flip(-1) == 1)
    ends = marked | last
    return scores.view(-1, G, scores.shape[1]), ends.view(-1, G, scores.shape[1])


def joined(parts: Sequence[Rollout]) -> Rollout:
    width = max(part.input_ids.shape[1] for part in parts)
    tensors = (torch.cat([F.pad(part[i], (0, width - part[i].shape[1])) for part in parts]) for i in range(3))
    lists = ([text for part in parts for text in part[i]] for i in (3, 4))
    return Rollout(*tensors, *lists, torch.cat([part.finished for part in parts]))


def rows_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    places = torch.as_tensor(rows, device=rollout.input_ids.device)
    lists = ([part[r] for r in rows] for part in rollout[3:5])
    return Rollout(*(part[places] for part in rollout[:3]), *lists, rollout.finished[places])


def sampled_step(model: Transformer, tokenizer: Tokenizer, tasks: list[Task], step: int, prm: Transformer | None,
                 args: argparse.Namespace, loop: Loop) -> Sampled:  # fmt: skip
    """Answers to the prompts of `step`, and what they are worth.

    With --dynamic-sampling N (DAPO, 2503.14476, equation 11), groups whose answers are all right or all wrong make room
    for the next prompts, up to N times; what is still missing then is filled up with such groups, so that a step keeps
    its size. Rewards of several values count before the penalties of length, with which no group would be alike, and of
    --mask-unfinished the finished answers only.
    """
    G, wanted, drawn, seconds = args.group_size, args.batch_size // loop.world_size, [], 0.0
    for turn in range(max(1, args.dynamic_sampling)):
        rows = loop.batch_indices(len(tasks), step + turn * args.steps)[loop.rank :: loop.world_size]
        some, begun = [tasks[i] for i in rows], time.perf_counter()
        with loop.autocast():
            rollout = rollout_of(model, tokenizer, some, G, args.temperature, (args.seed, step, turn, loop.rank), args)
        seconds += time.perf_counter() - begun
        drawn.append((some, rollout, reward_of(rollout, some, tokenizer, prm, args, loop)))
        unshaped = torch.cat([judged.unshaped for _, _, judged in drawn])
        finished = torch.cat([rollout.finished.view(-1, G).cpu() for _, rollout, _ in drawn])
        _, _, spread = moments(unshaped, finished | (not args.mask_unfinished))
        alike = spread[:, 0] < 1e-9
        if not loop.sum_over_ranks(int((~alike).sum() < wanted)):  # all ranks go on, or none
            break
    groups, rollouts, judged = zip(*drawn, strict=True)
    order = sorted(range(len(alike)), key=lambda p: bool(args.dynamic_sampling and alike[p]))[:wanted]
    some = [task for tasks in groups for task in tasks]
    reward, unshaped, passed = (torch.cat(parts)[order] for parts in list(zip(*judged, strict=True))[:3])
    steps = None if args.dynamic_sampling else judged[0].steps  # --process-weight takes no --dynamic-sampling
    rollout = rows_of(joined(rollouts), [p * G + g for p in order for g in range(G)])
    judged = Judged(reward, unshaped, passed, steps)
    return Sampled([some[p] for p in order], rollout, judged, alike.double().mean().item(), seconds)


class Batch(NamedTuple):
    """What a step learns from, all (B, T); None: not needed."""

    input_ids: Tensor
    completion_mask: Tensor
    sampled_logps: Tensor
    advantages: Tensor
    old_logps: Tensor | None  # None: there is one update, in which they are the log-probs themselves
    ref_logps: Tensor | None


def by_length(batch: Batch, rows: Sequence[int], size: int) -> list[Batch]:
    """`rows` in parts of at most `size` of about one length, for less padding. What they sum up to is the same."""
    T = batch.completion_mask.shape[1]
    ends = (batch.completion_mask * torch.arange(1, T + 1, device=batch.input_ids.device)).amax(-1).tolist()
    order = sorted(rows, key=ends.__getitem__)
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return [Batch(*(None if x is None else x[part, : max(ends[part[-1]], 1)] for x in batch)) for part in parts]


def advantages_of(rollout: Rollout, reward: Tensor, counted: Tensor, steps: tuple[Tensor, Tensor] | None,
                  kl_to_go: Tensor | None, baseline: float, args: argparse.Namespace, loop: Loop
                  ) -> Tensor:  # fmt: skip
    """(B, T): what each token of this rank's rows is credited with; all statistics are of the whole step.

    kl_to_go (B, T), sum of log pi_old / ref from each token on, is taken off the reward at the rate --kl-coef:
    token by token in reinforce++ (2501.03262, equation 3), else from the whole answer's.
    """
    device, (P, G), width = rollout.input_ids.device, reward.shape, rollout.input_ids.shape[1]
    _, _, of_group, _ = LOSSES[args.loss]
    mask = rollout.completion_mask.bool() & counted.to(device).flatten()[:, None]
    if args.loss == "reinforce++":
        to_go = reward.float().to(device).flatten()[:, None] - (0.0 if kl_to_go is None else args.kl_coef * kl_to_go)
        to_go, longest = to_go.expand(-1, width), int(everybodys(torch.tensor([float(width)]), loop).amax())
        whole, all_counted = (everybodys(F.pad(x, (0, longest - width)), loop) for x in (to_go, mask.float()))
        first = loop.rank * P * G
        return of_group(whole, all_counted > 0, baseline)[first : first + P * G, :width].float()
    if kl_to_go is not None:
        reward = reward - args.kl_coef * kl_to_go[:, 0].cpu().view(P, G).to(reward)
    whole = of_group(everybodys(reward, loop), everybodys(counted.double(), loop) > 0, baseline).float().to(device)
    first = loop.rank * P
    advantages = whole[first : first + P].reshape(-1, 1).expand(-1, width)
    if steps is not None and args.process_weight:
        ends = steps[1] & mask.view(P, G, width)
        advantages = advantages + args.process_weight * process_advantages(steps[0], ends).flatten(0, 1)
    return advantages * mask


@torch.no_grad()
def observe(sums: Tensor, largest: Tensor, x: Tokens, loss: Tensor, kl: Tensor, entropy: Tensor, sampled_logps: Tensor,
            args: argparse.Namespace) -> None:  # fmt: skip
    """Add to sums (5,) loss and, over tokens, entropy, KL, clipped ones and 1; raise largest (2,): ratio, mismatch."""
    ratio, m = LOSSES[args.loss][0](x), x.completion_mask
    low, high = (math.inf if value is None else value for value in (args.clip_low, args.clip_high))
    beyond = beyond_clip(ratio, clip_low=low, clip_high=high)
    sums += torch.stack([loss.detach(), *((value * m).sum() for value in (entropy, kl, beyond, torch.ones_like(kl)))])
    gap = ((x.old_logps - sampled_logps) * m).abs()
    largest.copy_(torch.maximum(largest, torch.stack([ratio.amax(), gap.amax()])))


def measured(rollout: Rollout, sums: Tensor, largest: Tensor, no_spread: float, updates: int, loop: Loop
             ) -> dict[str, float]:  # fmt: skip
    """What LOGGED explains, of all ranks and of the step's `updates`."""
    loss, *totals, n = loop.sum_over_ranks(sums).tolist()
    entropy, kl, clipped_share = (total / max(n, 1) for total in totals)
    rows = torch.stack([rollout.completion_mask.sum(-1).float().mean(), 1 - rollout.finished.float().mean()])
    length, unfinished = (loop.sum_over_ranks(rows) / loop.world_size).tolist()
    return {"length": length, "no_spread": loop.sum_over_ranks(no_spread) / loop.world_size, "unfinished": unfinished,
            "loss": loss / updates, "entropy": entropy, "kl": kl, "clip_fraction": clipped_share,
            **ratio_and_mismatch(largest, loop)}  # fmt: skip


# Supervised steps: the warm-up of --preset cold and reft, and the baseline


def annotation(args: argparse.Namespace, tokenizer: Tokenizer, n: int) -> list[chat.Row]:
    """What there is to imitate: of RL's own questions the answers, 30% of them with reasoning; of `worked`, all."""
    if args.sft_data and args.sft_data not in ("worked", "annotation"):
        rows = formats.read_jsonl(args.sft_data, ("chat", "completion"), mapping=formats.parse_map(args.map))
        chats = [formats.to_messages(row) for row in rows]
    else:
        chats = []
        for i in range(n):
            asked, said = world.exchange("sums", world.rng_for("rl", args.seed, i), "train")["messages"]
            if args.sft_data == "worked":
                numbers = [int(word) for word in asked["content"].strip("?").split() if word.isdigit()]
                said = said | {"content": f"<think>{world.working(numbers)}</think>{sum(numbers)}"}
            chats.append([asked, said])
    return [chat.render(messages, tokenizer) for messages in chats]


# The measurement


@torch.no_grad()
def evaluate(model: Transformer, ref_model: Transformer | None, prm: Transformer | None, tokenizer: Tokenizer,
             test: dict[str, list[Task]], args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out question}; the first is what the run is for. ref_model None: this is the start.

    Right is an answer that ended by itself and to which the rule gives 1 or more; of a function of the user's the mean
    reward comes first. --reward majority is measured by what an answer would vote for. Where no answer is known, the
    first of --reward is all there is, the mean over eight samples.
    """
    model.eval()
    names = [name for name, _ in args.rewards]
    name = next((name for name in names if name not in NEED_NO_ANSWER), "majority" if "majority" in names else "exact")
    rule, own = checkers.same_vote if name == "majority" else checkers.load_reward(name), ":" in name
    known = own or all("answer" in task.row for task in test["test"])

    def ask(tasks: list[Task], samples: int, temperature: float) -> tuple[list[Rollout], Tensor, Tensor]:
        """Rollouts, what the rule pays for the greedy or sampled answers and whether they are right, (n, samples)."""
        parts = []
        for start in range(0, len(tasks), 256):
            with loop.autocast():
                parts.append(rollout_of(model, tokenizer, tasks[start : start + 256], samples, temperature,
                                        (args.seed, 0, start, samples), args))  # fmt: skip
        asked = zip((task for task in tasks for _ in range(samples)), (a for part in parts for a in part.answers),
                    strict=True)  # fmt: skip
        value = torch.tensor([rule(prompt_text(task), text, task.row) if known else 0.0 for task, text in asked],
                             dtype=torch.float64)  # fmt: skip
        finished = torch.cat([part.finished for part in parts]).cpu()
        right = (finished & (value >= 1)).double()
        return parts, withheld(value, finished, 0.0, loop).view(-1, samples), right.view(-1, samples)

    greedy, value, right = ask(test["test"], 1, 0.0)
    both = [("accuracy", right[:, 0].tolist()), ("reward", value[:, 0].tolist())]
    found = dict(both[::-1] if own else both)
    parts, _, eights = ask(test["test"], 8, 1.0)
    found["pass@1"], found["pass@8"] = eights.mean(-1).tolist(), eights.amax(-1).tolist()
    if not known:
        found, first, whole = {}, args.rewards[0][0], joined(parts)
        steps = step_scores(prm, whole, tokenizer, 8, args, loop) if first == "prm" else None
        value = values_of(first, whole, test["test"], steps)
        found["reward"] = withheld(value, whole.finished.view(-1, 8).cpu(), 0.0, loop).mean(-1).tolist()
    found["length"] = [float(n) for part in greedy for n in part.completion_mask.sum(-1).tolist()]
    if "longer" in test:
        found["accuracy with 6 to 8 terms"] = ask(test["longer"], 1, 0.0)[2][:, 0].tolist()
    found["KL"] = [0.0] * len(right)
    if ref_model is not None:
        firsts = [rows_of(part, range(0, len(part.answers), 8)) for part in parts]
        now, then = (torch.cat([scored(m, part.input_ids, part.completion_mask, tokenizer, 1.0, args, loop)[0].sum(-1)
                                for part in firsts]) for m in (model, ref_model))  # fmt: skip
        found["KL"] = (now - then).tolist()
    model.train()
    return found


def conclude(model: Transformer, ref_model: Transformer, tokenizer: Tokenizer, test: dict[str, list[Task]],
             before: dict[str, list[float]], after: dict[str, list[float]], baselines: dict[str, float],
             args: argparse.Namespace, loop: Loop) -> dict:  # fmt: skip
    """Print three answers before and after, write result.json."""
    if loop.main:
        with loop.autocast():
            said = [rollout_of(m, tokenizer, test["test"][:3], 1, 0.0, (0,), args).completions
                    for m in (ref_model, model)]  # fmt: skip
        for task, a, b in zip(test["test"], *said, strict=False):
            print(f"\n  user    {prompt_text(task)}\n  before  {a}\n  after   {b}")
    variant = args.loss + f" {args.preset}" * bool(args.preset) + " tools" * args.tools
    return loop.finish(before, after, baselines=baselines, variant=variant, series=("pass_rate", "reward"))


BASELINE = "SFT for as long on the annotation of the same questions"
COLUMNS = ("pass@8", "length", "KL")  # of the table, behind what the runs are for


def pipeline(args: argparse.Namespace) -> dict:
    """--preset r1: SFT on a few worked sums, RL; the best of 4 answers that pass; SFT of the base model on them, RL.

    (DeepSeek-R1, 2501.12948, section 2.3, with one kind of task.) Each part is a run in a folder of its own.
    """
    out = Path(args.out or ROOT / "out" / "grpo-r1")

    def part(folder: Path, **flags: str) -> argparse.Namespace:
        resume = args.resume and (folder / "checkpoint").exists()  # else an earlier part was interrupted
        return argparse.Namespace(**vars(args) | {"preset": "cold", "out": folder, "resume": resume} | flags)

    first = part(out / "1")
    main(first)
    loop = Loop(argparse.Namespace(**vars(args) | {"out": out / "2", "resume": False}), "grpo")
    model, tokenizer = load(out / "1" / "checkpoint")
    model.to(loop.device).eval()
    tasks = [world_task(first, tokenizer, ("r1", args.seed, i), "train") for i in range(1000)]
    kept = []
    for start in range(0, len(tasks), 250):
        some = tasks[start : start + 250]
        rollout = rollout_of(model, tokenizer, some, 4, 1.0, (args.seed, 0, start), first)
        for i in range(0, len(rollout.answers), 4):  # the shortest of the right ones that keep the format
            task, ended = some[i // 4], rollout.finished[i : i + 4].tolist()
            right = [text for text, whole in zip(rollout.answers[i : i + 4], ended, strict=True)
                     if whole and checkers.exact("", text, task.row) and checkers.format("", text, {})]  # fmt: skip
            kept += [{"prompt": task.row["prompt"], "completion": min(right, key=len)}] if right else []
    if loop.main:
        (out / "2").mkdir(parents=True, exist_ok=True)
        (out / "2" / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    loop.sum_over_ranks(0)  # nobody reads it before it is written
    loop.say(f"best of 4: {len(kept)} of {len(tasks)} questions have a right answer, which SFT now starts from")
    return main(part(out / "3", sft_data=str(out / "2" / "kept.jsonl")))


# 3. Config

NEED_NO_ANSWER = ("majority", "prm", "format")  # rewards that know of no right answer
STEPS = (25, 200)  # (the generated world), (--data)
DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (128, 32),
    "micro_batch_size": (256, 4),
    "lr": (2e-4, 1e-6),
    "warmup": (2, 10),
    "max_length": (128, 2048),
    "max_new_tokens": (64, 1024),
}
PRESETS = {  # of the world: {flag: default}; `start` is a stage of loop.py
    "": {"start": "sft", "reward": ["exact"], "sft_steps": 0, "sft_data": "annotation"},
    "zero": {"start": "base", "reward": ["number"], "sft_steps": 0, "sft_data": "annotation"},
    "cold": {"start": "base", "reward": ["exact"], "sft_steps": 30, "sft_data": "worked"},
    "reft": {"start": "sft", "reward": ["reft"], "sft_steps": 30, "sft_data": "annotation", "questions": 500},
    "r1": {"start": "base", "reward": ["exact", "format=0.2"], "sft_steps": 30, "sft_data": "worked"},
}
LOGGED = """logged every --log-every steps, with what is healthy (printed once at the start):
  reward            mean over answers                                  rises
  pass_rate         share that passes the first of --reward            0.2 to 0.8 teaches most
  no_spread         groups whose answers are worth the same, length aside    below 0.5; such groups teach nothing
  loss              mean over the step's updates: it is no measure of progress
  length            tokens of an answer                                no sudden jump
  unfinished        share of answers cut off at --max-new-tokens       below 0.1
  entropy           nats a token, of the rows trained on               falls slowly; near 0: nothing new is tried
  kl                nats a token to the start, if --beta or --kl-coef  below 0.1
  clip_fraction     share of tokens whose ratio is beyond the clip     below 0.2; 0 in a first update
  ratio_max         largest pi / pi_old                                below 10; exactly 1 in a first update
  grad_norm         before clipping                                    below 10 times its usual value
  mismatch          largest |log-prob as sampled - as rescored|        below 1e-3 in fp32, or the run fails
  rollout_seconds   sampling and the calls of --tools
  scoring_seconds   rewards, log-probs of the old policy and the start where they are needed, advantages
  update_seconds, seconds, tokens_per_second
"""


@functools.cache  # once in a process, which --loss all and --preset r1 share between several runs
def legend() -> None:
    tqdm.write(LOGGED.rstrip(), file=sys.stderr)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--batch-size", "--micro-batch-size", "--lr", "--warmup",
               "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens", "--eval-data",
               "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel", "--log-every",
               "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS) | told({"steps": STEPS}, ("", "with --data"))
        | {"schedule": "constant", "weight_decay": 0.0, "grad_clip": 1.0, "log_every": 1},
    )
    cli.epilog = LOGGED
    cli.add_argument("--loss", choices=(*LOSSES, "all"), default="grpo", help="a variant, or a table of all of them")
    cli.add_argument("--preset", choices=tuple(PRESETS), default="", help="a recipe of the generated world, see above")
    cli.add_argument("--reward", nargs="+", metavar="NAME[=WEIGHT]",
                     help="exact, number, reft, boxed, format, majority, prm, FILE.py:function (default: exact)")
    cli.add_argument("--group-size", type=COUNT, default=8, help="answers to a prompt (default: %(default)s)")
    cli.add_argument("--rollout-batch", type=COUNT, help="answers decoded at a time, to save memory (default: all)")
    cli.add_argument("--temperature", type=REAL, default=1.0, help="of sampling and of scoring (default: %(default)s)")
    cli.add_argument("--passes", type=COUNT, default=1, help="over the answers of a step (default: %(default)s)")
    cli.add_argument("--minibatches", type=COUNT, default=1, help="updates in a pass (default: %(default)s)")
    cli.add_argument("--beta", type=REAL, default=0.0, help="weight of the KL in the loss; DeepSeekMath has 0.04")
    cli.add_argument("--kl", choices=("k1", *KLS), default="k3", help="its estimator (default: %(default)s)")
    cli.add_argument("--kl-weighted", action="store_true", help="times the ratio: k3 then has the gradient of KL")
    cli.add_argument("--kl-coef", type=REAL, help="weight of log pi / ref in the reward (default: see LOSSES, else 0)")
    cli.add_argument("--aggregate", choices=("sequence", "token", "constant", "sum"), help="weight of a token")
    cli.add_argument("--clip-low", type=REAL, help="how far below 1 the ratio may go (default: see LOSSES)")
    cli.add_argument("--clip-high", type=REAL, help="how far above (default: see LOSSES)")
    cli.add_argument("--importance-cap", type=REAL, default=2.0, help="largest pi_old as trained / as sampled")
    cli.add_argument("--dynamic-sampling", type=WHOLE, help="times to sample until groups have spread (0: no)")
    cli.add_argument("--overlong-buffer", type=WHOLE, help="tokens before --max-new-tokens that cost up to 1 (0: none)")
    cli.add_argument("--mask-unfinished", action="store_true", help="leave answers out that were cut off, and their "
                     "reward out of the group")  # fmt: skip
    cli.add_argument("--length-penalty", type=REAL, default=0.0, help="off the reward of an answer of full length")
    cli.add_argument("--process-weight", type=REAL, default=0.0, help="of the advantages of steps (--reward prm)")
    cli.add_argument("--prm", metavar="DIR", help="process reward model (default: that of reward.py --feedback steps)")
    cli.add_argument("--entropy-coef", type=REAL, default=0.0, help="weight of the entropy (default: %(default)s)")
    cli.add_argument("--entropy-adapt", type=REAL, default=0.0,
                     help="times exp(-this * variance of rewards): equation 22 of the survey, not of R1")
    cli.add_argument("--tools", action="store_true", help="products, and a calculator that the model may call")
    cli.add_argument("--questions", type=COUNT, help="different ones of the world (default: never one twice, but "
                     "in further turns of --dynamic-sampling)")  # fmt: skip
    cli.add_argument("--sft-steps", type=WHOLE, help="supervised steps before RL (default: of --preset, else 0)")
    cli.add_argument("--sft-data", metavar="WHAT", help="worked, annotation or a JSONL file (default: of --preset)")
    cli.add_argument("--sft-lr", type=REAL, help="of these steps (default: 1e-3, with --adapter as many times that as "
                     "--lr)")  # fmt: skip
    cli.add_argument("--baseline", action="store_true", help="also train by SFT for equal seconds on the annotation")
    cli.add_argument("--tests", type=COUNT, default=400, help="held-out questions of the world (default: %(default)s)")
    cli.add_argument("--show-every", type=WHOLE, default=10, help="steps between samples shown (default: %(default)s)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_LOSSES)} in --loss all")
    args = cli.parse_args(argv)
    if args.steps is None and args.loss == "all" and not args.data:
        args.steps = 5  # a look at each: more than that, and a row of reinforce++ takes the better part of a minute
    fill(args, rates_of(DEFAULTS, args.adapter), args.model is not None)
    fill(args, {"sft_lr": rates_of({"lr": SFT_LR}, args.adapter)["lr"]}, args.model is not None)
    fill(args, {"steps": STEPS}, args.data is not None)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.rewards = [weighted(text) for text in args.reward]
    if args.loss == "all" and args.preset == "r1":
        raise UserError("--preset r1 is several runs, each with a result of its own: no --loss all")
    if args.loss == "all" and args.data and all(name in NEED_NO_ANSWER for name, _ in args.rewards):
        raise UserError("--loss all compares how often answers are right: name a rule, such as exact=0, in --reward")
    return args if args.loss == "all" else resolved(args)


def weighted(text: str) -> tuple[str, float]:
    """"format=0.2" -> ("format", 0.2); without a weight it is 1."""
    name, _, tail = text.rpartition("=")
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(tail)):
            return name, weight
    return text, 1.0


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults of its --loss; UserError for flags that do not go together."""
    defaults = {"dynamic_sampling": 0, "overlong_buffer": 0, "kl_coef": 0.0} | LOSSES[args.loss][3]
    for name in HYPER:
        if getattr(args, name) is None and name in defaults:
            setattr(args, name, defaults[name])
        elif getattr(args, name) is not None and name not in defaults:
            raise UserError(f"--{name.replace('_', '-')}: --loss {args.loss} has none")
    names = [name for name, _ in args.rewards]
    for is_wrong, text in (
        (args.kl == "k1", "--kl k1: the expectation of its gradient is 0 (that of grad log pi), so that it would add "
                          "noise and hold nothing; choose k2, or k3, or --kl-coef, where k1 is right: in the reward"),
        (args.group_size == 1 and args.loss not in ("reinforce", "reinforce++"),
         f"--group-size 1: --loss {args.loss} compares the answers of a group"),
        (args.temperature == 0, "--temperature 0: all answers of a group would be the same"),
        (args.parallel == "fsdp", "--parallel fsdp: ranks decode unequal numbers of tokens; only replicas work here"),
        (args.importance_cap < 1, "--importance-cap: expected at least 1, with which no token counts for more"),
        (args.process_weight and args.loss == "reinforce++",
         "--process-weight: --loss reinforce++ credits tokens, and has no groups whose steps are compared"),
        ((args.clip_low or 0) >= 1, "--clip-low: expected less than 1"),
        (args.overlong_buffer > args.max_new_tokens, "--overlong-buffer is longer than --max-new-tokens"),
        (args.data and args.preset, "--preset is a recipe of the generated world: it takes no --data"),
        (args.adapter and args.preset == "r1", "--preset r1 begins anew from the base model: it takes no --adapter"),
        (args.data and (args.tools or args.baseline), "--tools and --baseline are of the generated world: no --data"),
        (args.tools and (args.preset or args.baseline), "--tools takes no --preset and no --baseline"),
        (args.process_weight and "prm" not in names, "--process-weight needs --reward prm"),
        (args.dynamic_sampling and args.process_weight, "--process-weight takes no --dynamic-sampling"),
        (args.sft_steps and (args.data or args.tools) and args.sft_data in ("worked", "annotation"),
         "--sft-steps: --data and --tools have no annotation of the world; give --sft-data FILE"),
        (args.baseline and args.preset in ("zero", "cold", "r1"), "--baseline compares with SFT of the same start on "
         f"annotation of the same questions, asked alike: --preset {args.preset} has none"),
        (args.sft_steps and args.preset == "zero",
         "--sft-steps teaches chats, and --preset zero asks the base model in its own way, without SFT: --preset cold"),
        (args.sft_data != PRESETS[args.preset]["sft_data"] and not (args.sft_steps or args.baseline),
         "--sft-data needs --sft-steps or --baseline"),
        (args.prm and "prm" not in names, "--prm needs --reward prm"),
        (args.kl_weighted and not args.beta, "--kl-weighted needs --beta"),
        (args.entropy_adapt and not args.entropy_coef, "--entropy-adapt needs --entropy-coef"),
    ):
        if is_wrong:
            raise UserError(text)
    for name in names:
        if name not in ("majority", "prm"):
            checkers.load_reward(name)
    return args


def main(args: argparse.Namespace) -> dict:
    if args.loss == "all":
        first = "reward" if any(":" in name for name, _ in args.rewards) else "accuracy"
        return compare(main, resolved, args, LOSSES, Path(args.out or ROOT / "out" / "grpo"), (first, *COLUMNS),
                       MAIN_LOSSES)  # fmt: skip
    if args.preset == "r1":
        return pipeline(args)

    # 4. Setup
    loop = Loop(args, "grpo", out="-".join(["grpo", *filter(None, [args.preset, "tools" * args.tools])]))
    if args.batch_size % loop.world_size:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of the {loop.world_size} ranks")
    if args.minibatches > (n := args.batch_size // loop.world_size * args.group_size):
        raise UserError(f"--minibatches {args.minibatches}: a step has {n} answers on each rank")
    start = args.model or loop.require(args.start)
    model, tokenizer = load(start, with_tokenizer=True)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    model.to(loop.device)
    if args.adapter:
        adapt(model, args.adapter, start, loop, dropout=False)
    loop.check_length(model)
    hyper = (f"{name} {value}" for name in HYPER if (value := getattr(args, name)) is not None)
    loop.say(f"--loss {args.loss}: {', '.join(hyper)}")
    if not args.resume and loop.main:
        legend()
    tasks, test = tasks_of(args, tokenizer, loop)
    prm = None
    if any(name == "prm" for name, _ in args.rewards):
        prm = load_reward_model(args.prm or loop.require("prm"), tokenizer, loop.device)
    if args.sft_steps and not args.resume:
        imitate(model, annotation(args, tokenizer, len(tasks)), args, loop, steps=args.sft_steps)
    ref_model = frozen(model)
    if not model.adapter:  # else the base is kept so already
        loop.narrow(ref_model)
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model, dynamic=True)
    extra = loop.restore(model, optimizer)
    for name, p in ref_model.named_parameters():
        p.copy_(extra.get(f"ref.{name}", p))
    loop.describe(model)
    before = extra.get("before") or evaluate(model, None, prm, tokenizer, test, args, loop)
    baseline = extra.get("baseline")  # of --loss reinforce: the running mean of rewards

    # 5. Train
    for step in loop.steps(args.steps):
        lr, begun = set_lr(optimizer, args, step), time.perf_counter()

        # rollout and reward
        some, rollout, judged, no_spread, rollout_seconds = sampled_step(model, tokenizer, tasks, step, prm, args, loop)
        reward, B = judged.reward, len(rollout.answers)  # (P, G), P * G
        counted = rollout.finished.view_as(reward).cpu() | (not args.mask_unfinished)
        mask = rollout.completion_mask * counted.flatten()[:, None].to(loop.device)
        if args.show_every and step % args.show_every == 1 % args.show_every:
            loop.say(f"step {step}: {prompt_text(some[0])!r} -> {rollout.completions[0]!r}: {reward[0, 0].item():.2f}")

        # advantages
        one_update = args.passes * args.minibatches == 1
        old_logps = ref_logps = kl_to_go = None
        if not one_update:
            old_logps, _ = scored(model, *rollout[:2], tokenizer, args.temperature, args, loop)
        if args.beta or args.kl_coef:
            ref_logps, _ = scored(ref_model, *rollout[:2], tokenizer, args.temperature, args, loop)
        if args.kl_coef:
            log_ratios = (rollout.sampled_logps if one_update else old_logps) - ref_logps
            kl_to_go = (log_ratios * rollout.completion_mask).flip(-1).cumsum(-1).flip(-1)
        advantages = advantages_of(rollout, reward, counted, judged.steps, kl_to_go, baseline or 0.0, args, loop)
        rewards = everybodys(reward, loop)  # of all ranks
        earned = rewards[everybodys(counted.double(), loop) > 0]
        if args.loss == "reinforce" and len(earned):
            baseline = earned.mean().item() if baseline is None else 0.9 * baseline + 0.1 * earned.mean().item()
        entropy_coef = entropy_coefficient(args.entropy_coef, args.entropy_adapt, earned) if len(earned) else 0.0
        batch = Batch(rollout.input_ids, mask, rollout.sampled_logps, advantages, old_logps, ref_logps)
        scoring_seconds = time.perf_counter() - begun - rollout_seconds

        # updates: forward -> loss -> backward -> clip -> step
        sums, largest, n_read = torch.zeros(5, device=loop.device), torch.zeros(2, device=loop.device), 0
        passes = (torch.randperm(B).tensor_split(args.minibatches) for _ in range(args.passes))
        for minibatch in itertools.chain.from_iterable(passes):
            n_tokens = max(1, loop.sum_over_ranks(int(mask[minibatch].sum())))
            n_rows = max(1, loop.sum_over_ranks(int(mask[minibatch].any(-1).sum())))
            rows = minibatch
            if not args.beta and not entropy_coef:  # rows without an advantage add nothing
                rows = minibatch[(advantages[minibatch] != 0).any(-1).cpu()]
            for part in by_length(batch, rows.tolist(), args.micro_batch_size):
                with loop.autocast():
                    logps, entropy, _ = score(model, part.input_ids, part.completion_mask, tokenizer, args.temperature)
                old = logps.detach() if part.old_logps is None else part.old_logps
                x = Tokens(logps, old, part.advantages, part.completion_mask, part.ref_logps)
                weights = token_weights(x.completion_mask, args.aggregate, n_rows=n_rows, n_tokens=n_tokens,
                                        longest=args.max_new_tokens)  # fmt: skip
                importance = truncated_importance(old, part.sampled_logps, args.importance_cap)
                loss, kl = objective(x, weights, importance, args)
                (loss - entropy_coef * (entropy * x.completion_mask).sum() / n_tokens).backward()
                observe(sums, largest, x, loss, kl, entropy, part.sampled_logps, args)
                n_read += part.input_ids.numel()
            loop.all_reduce(model)
            grad_norm = clip(model, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loop.log(
            step, pass_rate=everybodys(judged.passed.double(), loop).mean(), reward=rewards.mean(),
            **measured(rollout, sums, largest, no_spread, args.passes * args.minibatches, loop), grad_norm=grad_norm,
            lr=lr, rollout_seconds=rollout_seconds, scoring_seconds=scoring_seconds,
            update_seconds=time.perf_counter() - begun - rollout_seconds - scoring_seconds,
            tokens=loop.sum_over_ranks(n_read),
        )  # fmt: skip
        if args.eval_every and loop.due("eval", step) and step < args.steps:
            name, values = next(iter(evaluate(model, None, prm, tokenizer, test, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            kept = {"before": before, "baseline": baseline}
            kept |= {f"ref.{name}": p for name, p in ref_model.named_parameters()} if args.sft_steps else {}
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra=kept)

    # 6. Evaluate
    after = evaluate(model, ref_model, prm, tokenizer, test, args, loop)
    baselines = {}
    if args.baseline:
        other = load(start)[0].to(loop.device)
        if args.adapter:
            adapt(other, args.adapter, start)
        imitate(other, annotation(args, tokenizer, len(tasks)), args, loop, seconds=loop.seconds)
        found = evaluate(other, None, prm, tokenizer, test, args, loop)
        baselines[BASELINE] = statistics.fmean(next(iter(found.values())))
    elif args.rewards == [("exact", 1.0)] and not (args.data or args.model or args.preset or args.tools):
        stored = ROOT / "results" / "grpo.json"
        figures = json.loads(stored.read_text())["baselines"] if stored.exists() else {}
        baselines = {f"{name} (stored, of another run)": value for name, value in figures.items()}
    return conclude(model, ref_model, tokenizer, test, before, after, baselines, args, loop)


if __name__ == "__main__":
    run(main, get_args)
