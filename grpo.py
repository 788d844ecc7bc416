"""Group relative policy optimization and its family: reinforcement learning without a critic, from checkable rewards.

    A_i  = (reward_i - mean(reward)) / std(reward)                       over the group_size answers i to one prompt
    loss = - 1/B sum_i 1/|y_i| sum_t [ min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - beta KL(pi || ref) ]
    ratio = pi(token t) / pi_old(token t),    KL = ref/pi - 1 - log(ref/pi)

(DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, equations 3, 4 and 21; DeepSeek-R1, Guo et al. 2025, 2501.12948.)
Each prompt gets a group of sampled answers, a rule says which are right, and what is better than the group's mean
becomes more likely. --loss picks a variant among the functions below, each with its paper; their defaults are in
LOSSES. Because it divides by the standard deviation, plain `grpo` does not rest at ref * exp(reward / beta), where
dr_grpo and rloo do with --kl k2, or k3 --kl-weighted, but (with k2) at ref * exp(reward / (beta * std)): of three arms
with reward 1, .5, 0, ref .2, .3, .5 and beta 1 that is .35, .32, .33 and grpo's fixed point .75, .19, .06.

    --reward exact format=0.2     rules of data/checkers.py, each with a weight; FILE.py:function is your own
    --reward majority             agreement with most of the group, no answers needed (TTRL, 2504.16084)
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
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import chat, checkers, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from kernels import IGNORED, linear_logps
from loop import COUNT, REAL, ROOT, WHOLE, Loop, RunFailed, adamw, clip, compare, parser, run, set_lr
from model import Transformer, frozen, generate, load
from ppo import clipped_surrogate

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
    """(r - mean) / std of the group (GRPO, 2402.03300, section 4.1.2)."""
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
    """(r - mean) / std over all rows of the step (REINFORCE++, 2501.03262, equation 4)."""
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


def majority(answers: Sequence[str]) -> list[float]:
    """1 for each answer of a group that is the most frequent one, the earliest of several; '' is no answer."""
    votes = Counter(answer for answer in answers if answer)
    return [float(answer == votes.most_common(1)[0][0]) if answer else 0.0 for answer in answers]


# 2. Data


class Task(NamedTuple):
    prompt: list[int]
    row: dict  # {"prompt": text or messages, "answer"}
    messages: list[dict] | None = None  # what a tool's answer is put behind


class Rollout(NamedTuple):
    """Row r is answer r % group_size to task r // group_size."""

    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T): 1 on what the model said, not on what a tool said
    sampled_logps: Tensor  # (B, T): as the sampler computed them
    completions: list[str]  # all that was said, for people
    answers: list[str]  # what is rewarded: the same, or behind a tool's answer the last turn
    finished: Tensor  # (B,): whether the answer ended by itself


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
        return Task(tokenizer.encode(question), {"prompt": question, "answer": answer})
    return task_of({"prompt": question, "answer": answer}, tokenizer, args)


def task_of(row: dict, tokenizer: Tokenizer, args: argparse.Namespace) -> Task:
    messages = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    ids = chat.render(messages, tokenizer, add_generation_prompt=True, chat_format=args.chat_format).input_ids
    return Task(ids, row, messages)


def tasks_of(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[Task], dict[str, list[Task]]]:
    """The questions to train on, and the held-out ones: {"test", and of the world "longer"}."""
    if not args.data:
        n = args.questions or args.steps * args.batch_size
        train = [world_task(args, tokenizer, ("rl", args.seed, i), "train") for i in range(n)]
        test = {"test": [world_task(args, tokenizer, ("rl test", i), "test") for i in range(args.tests)]}
        if not args.tools:
            test["longer"] = [world_task(args, tokenizer, ("rl longer", i), "test", 6 + i % 3) for i in range(100)]
        return train, test
    needs = any(name in checkers.NEED_ANSWER for name, _ in args.rewards)
    schemas, mapping = ("answer",) if needs else ("answer", "prompt"), formats.parse_map(args.map)
    rows, held_out = formats.read_jsonl(args.data, schemas, mapping=mapping), []
    if args.eval_data:
        held_out = formats.read_jsonl(args.eval_data, schemas, mapping=mapping)
    else:
        rows, held_out = formats.hold_out(rows)
    for name, _ in args.rewards:
        if name in checkers.NEED_ANSWER:
            checkers.check_answers(name, rows + held_out)
    if not held_out:
        loop.say(f"only {len(rows)} rows: none are held out, and what is measured are the training rows")
    rows, held_out = ([task_of(row, tokenizer, args) for row in some] for some in (rows, held_out or rows))
    too_long = [task for task in rows if len(task.prompt) + args.max_new_tokens > args.max_length]
    if too_long:
        raise UserError(f"{len(too_long)} prompts and --max-new-tokens {args.max_new_tokens} exceed --max-length "
                        f"{args.max_length}; the longest prompt has {max(len(t.prompt) for t in too_long)} tokens")
    return rows, {"test": held_out}


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
    """The rollout with the calculator's answers to `calls` (row: expression), masked, and what the model says then."""
    prompts, rows = [], list(calls)
    for r in rows:
        result = world.calculator(calls[r])  # it parses
        said[r] += [{"role": "assistant", "content": rollout.answers[r]}, {"role": "tool", "content": result}]
        mask = chat.render(said[r][:-1], tokenizer, chat_format=args.chat_format).completion_mask
        end = len(mask) - mask[::-1].index(1)  # behind the token that ended the model's turn
        whole = chat.render(said[r], tokenizer, add_generation_prompt=True, chat_format=args.chat_format).input_ids
        n = int(rollout.completion_mask[r].nonzero()[-1]) + 1
        prompts.append(rollout.input_ids[r, :n].tolist() + whole[end:])
    found = generate(model, prompts, max_new_tokens=args.max_new_tokens, seed=seed, **common)
    width = max(found.input_ids.shape[1], rollout.input_ids.shape[1])
    ids, mask, logps, new_ids, new_mask, new_logps = (
        F.pad(x, (0, width - x.shape[1])) for x in (*rollout[:3], found.input_ids, found.completion_mask, found.logps)
    )
    ids[rows] = new_ids
    mask[rows] += new_mask  # the earlier turns' ones stay; the tool's tokens are 0 in both
    logps[rows] += new_logps
    completions, answers, finished = [*rollout.completions], [*rollout.answers], rollout.finished.clone()
    for i, r in enumerate(rows):
        answers[r] = chat.completion_text(found.completions[i], tokenizer)
        completions[r] += f" [{said[r][-1]['content']}] {answers[r]}"
        finished[r] = found.finished[i]
    return Rollout(ids, mask, logps, completions, answers, finished)


def reward_of(rollout: Rollout, tasks: Sequence[Task], tokenizer: Tokenizer, prm: Transformer | None,
              args: argparse.Namespace, loop: Loop) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Rewards (P, G), whether an answer passes the first of --reward (P, G), and the PRM's (rewards, ends) (P, G, T).

    An answer that did not end by itself gets nothing from a rule, whatever it says.
    """
    G = len(rollout.completions) // len(tasks)
    total, passed, steps = torch.zeros(len(tasks), G, dtype=torch.float64), None, None
    finished, lengths = rollout.finished.view(-1, G).cpu(), rollout.completion_mask.sum(-1).view(-1, G).cpu()
    groups = [rollout.answers[i : i + G] for i in range(0, len(rollout.answers), G)]
    for name, weight in args.rewards:
        if name == "majority":
            values = [majority([world.final_answer(text) for text in texts]) for texts in groups]
        elif name == "prm":
            steps = step_scores(prm, rollout, tokenizer, G, loop)
            values = torch.where(steps[1], steps[0], 1.0).amin(-1).cpu() * steps[1].any(-1).cpu()
        else:
            rule = checkers.load_reward(name)
            values = [[rule(prompt_text(task), text, task.row) for text in texts]
                      for task, texts in zip(tasks, groups, strict=True)]  # fmt: skip
        values = torch.as_tensor(values, dtype=torch.float64) * finished
        passed = values >= (1.0 if name != "prm" else 0.5) if passed is None else passed
        total += weight * values
    if args.overlong_buffer:
        total += overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
    return total - args.length_penalty * lengths / args.max_new_tokens, passed, steps


def prompt_text(task: Task) -> str:
    prompt = task.row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@torch.no_grad()
def step_scores(prm: Transformer, rollout: Rollout, tokenizer: Tokenizer, G: int, loop: Loop
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P(step is right) at the last token of each step, and where these are, (P, G, T); a step ends with a full stop."""
    from reward import token_rewards  # a sibling, which only this reward needs

    with loop.autocast():
        scores = token_rewards(prm, rollout.input_ids).float().sigmoid()
    stops = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).endswith(".")]
    there = rollout.completion_mask.bool()
    last = there & (rollout.completion_mask.flip(-1).cumsum(-1).flip(-1) == 1)
    ends = (there & torch.isin(rollout.input_ids, torch.tensor(stops, device=scores.device))) | last
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
                 args: argparse.Namespace, loop: Loop):  # fmt: skip
    """This rank's part of a step: (tasks, rollout, reward (P, G), passed (P, G), step scores, share without spread).

    With --dynamic-sampling N (DAPO, 2503.14476, section 3.2), groups whose rewards are all alike make room for the next
    prompts, up to N times; what is still missing then is filled up with such groups, so that a step keeps its size.
    """
    wanted, kept, spare, alike, n = args.batch_size // loop.world_size, [], [], 0, 0
    for turn in range(max(1, args.dynamic_sampling)):
        rows = loop.batch_indices(len(tasks), step + turn * args.steps)[loop.rank :: loop.world_size]
        some = [tasks[i] for i in rows]
        with loop.autocast():
            rollout = rollout_of(model, tokenizer, some, args.group_size, args.temperature,
                                 (args.seed, step, turn, loop.rank), args)  # fmt: skip
        reward, passed, steps = reward_of(rollout, some, tokenizer, prm, args, loop)
        flat = (reward - reward[:, :1]).abs().amax(-1) < 1e-9
        alike, n = alike + int(flat.sum()), n + len(some)
        if not args.dynamic_sampling:
            return some, rollout, reward, passed, steps, alike / n
        for p, task in enumerate(some):
            group = range(p * args.group_size, (p + 1) * args.group_size)
            (spare if flat[p] else kept).append((task, rows_of(rollout, group), reward[p], passed[p]))
        if len(kept) >= wanted:
            break
    kept = (kept + spare)[:wanted]
    some, parts, reward, passed = zip(*kept, strict=True)
    return list(some), joined(parts), torch.stack(reward), torch.stack(passed), None, alike / n


def score(model: Transformer, input_ids: Tensor, completion_mask: Tensor, tokenizer: Tokenizer, temperature: float
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log pi and entropy (B, T) of the completions at the sampling temperature, 0 elsewhere; no head for the prompt."""
    targets = input_ids.masked_fill(completion_mask == 0, IGNORED)
    head = model.head.weight[: tokenizer.vocab_size]  # ids beyond it are never sampled
    hidden = model.hidden_before(input_ids)
    return linear_logps(hidden, head, targets, temperature=temperature, with_entropy=True)


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


@torch.no_grad()
def scored(model: Transformer, rollout: Rollout, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> Tensor:
    """log pi (B, T) of a whole rollout, without a gradient."""
    ids, mask, found = rollout.input_ids, rollout.completion_mask, torch.zeros_like(rollout.sampled_logps)
    for start in range(0, len(ids), args.micro_batch_size):
        rows = slice(start, start + args.micro_batch_size)
        with loop.autocast():
            found[rows] = score(model, ids[rows], mask[rows], tokenizer, args.temperature)[0]
    return found


def everybodys(x: Tensor, loop: Loop) -> Tensor:
    """(world_size * n, ...): the rows (n, ...) of all ranks, in their order."""
    if loop.world_size == 1:
        return x
    whole = torch.zeros(loop.world_size, *x.shape, dtype=x.dtype, device=loop.device)
    whole[loop.rank] = x.to(loop.device)
    return loop.sum_over_ranks(whole).flatten(0, 1)


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
    if kl_to_go is None:
        kl_to_go = torch.zeros_like(rollout.sampled_logps)
    if args.loss == "reinforce++":
        to_go = reward.to(device).flatten()[:, None] - args.kl_coef * kl_to_go.double()
        whole, all_counted = (everybodys(F.pad(x, (0, args.max_length - width)), loop) for x in (to_go, mask.double()))
        first = loop.rank * P * G if loop.world_size > 1 else 0
        return of_group(whole, all_counted > 0, baseline)[first : first + P * G, :width].float()
    reward = reward - args.kl_coef * kl_to_go[:, 0].view(P, G).to(reward)
    whole = of_group(everybodys(reward, loop), everybodys(counted.double(), loop) > 0, baseline).to(device)
    first = loop.rank * P if loop.world_size > 1 else 0
    advantages = whole[first : first + P].reshape(-1, 1).expand(-1, width)
    if steps is not None and args.process_weight:
        ends = steps[1] & mask.view(P, G, width)
        advantages = advantages + args.process_weight * process_advantages(steps[0].double(), ends).flatten(0, 1)
    return (advantages * mask).float()


@torch.no_grad()
def observe(sums: Tensor, largest: Tensor, x: Tokens, loss: Tensor, kl: Tensor, entropy: Tensor, sampled_logps: Tensor,
            args: argparse.Namespace) -> None:  # fmt: skip
    """Add to sums (5,) loss and, over tokens, entropy, KL, clipped ones and 1; raise largest (2,): ratio, mismatch."""
    ratio, m = LOSSES[args.loss][0](x), x.completion_mask
    low, high = (math.inf if value is None else value for value in (args.clip_low, args.clip_high))
    beyond = (ratio < 1 - low) | (ratio > 1 + high)
    sums += torch.stack([loss.detach(), *((value * m).sum() for value in (entropy, kl, beyond, torch.ones_like(kl)))])
    gap = ((x.old_logps - sampled_logps) * m).abs()
    largest.copy_(torch.maximum(largest, torch.stack([ratio.amax(), gap.amax()])))


def measured(rollout: Rollout, sums: Tensor, largest: Tensor, no_spread: float, loop: Loop) -> dict[str, float]:
    """What LOGGED explains, of all ranks; RunFailed if the sampler and the training forward disagree."""
    loss, *totals, n = loop.sum_over_ranks(sums).tolist()
    entropy, kl, clipped_share = (total / max(n, 1) for total in totals)
    ratio_max, mismatch = everybodys(largest[None], loop).amax(0).tolist()
    if mismatch > 1e-3 and loop.dtype == torch.float32 and loop.device.type == "cpu":
        raise RunFailed(f"step {Loop.step}: log-probs as sampled and as rescored differ by {mismatch:.2g}")
    rows = torch.stack([rollout.completion_mask.sum(-1).float().mean(), 1 - rollout.finished.float().mean()])
    length, unfinished = (loop.sum_over_ranks(rows) / loop.world_size).tolist()
    return {"length": length, "no_spread": loop.sum_over_ranks(no_spread) / loop.world_size, "unfinished": unfinished,
            "loss": loss, "entropy": entropy, "kl": kl, "clip_fraction": clipped_share, "ratio_max": ratio_max,
            "mismatch": mismatch}  # fmt: skip


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
    return [chat.render(messages, tokenizer, chat_format=args.chat_format) for messages in chats]


def imitate(model: Transformer, rows: list[chat.Row], tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop, *,
            steps: int = 0, seconds: float = 0.0) -> None:  # fmt: skip
    """Supervised steps on `rows`, in place: `steps` of them, or for some `seconds`; the loss is that of sft.py."""
    optimizer, start, done, size = adamw(model, args.sft_lr, 0.0), time.perf_counter(), 0, 64
    while done < steps or time.perf_counter() - start < seconds:
        some = [rows[(done * size + i) % len(rows)] for i in range(size)]
        width = max(len(row.input_ids) for row in some)
        ids, mask = (torch.tensor([part + [0] * (width - len(part)) for part in parts], device=loop.device)
                     for parts in zip(*some, strict=True))  # fmt: skip
        with loop.autocast():
            loss = -score(model, ids, mask, tokenizer, 1.0)[0].sum() / mask.sum()
        loss.backward()
        clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done += 1


# The measurement


@torch.no_grad()
def evaluate(model: Transformer, ref_model: Transformer | None, tokenizer: Tokenizer, test: dict[str, list[Task]],
             args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out question}; ref_model None: this is the start."""
    model.eval()
    name = next((name for name, _ in args.rewards if name not in ("majority", "prm", "format")), "exact")
    rule, found = checkers.load_reward(name), {}

    def ask(tasks: list[Task], samples: int, temperature: float) -> tuple[list[list[float]], list[Rollout]]:
        parts = []
        for start in range(0, len(tasks), 256):
            with loop.autocast():
                parts.append(rollout_of(model, tokenizer, tasks[start : start + 256], samples, temperature,
                                        (args.seed, 0, start, samples), args))  # fmt: skip
        answers = [text for part in parts for text in part.answers]
        passed = [float(rule(prompt_text(tasks[i // samples]), text, tasks[i // samples].row) >= 1)
                  if "answer" in tasks[i // samples].row or ":" in name else math.nan
                  for i, text in enumerate(answers)]  # fmt: skip
        return [passed[i : i + samples] for i in range(0, len(passed), samples)], parts

    right, greedy = ask(test["test"], 1, 0.0)
    found["accuracy"] = [row[0] for row in right]
    eights, parts = ask(test["test"], 8, 1.0)
    found["pass@1"], found["pass@8"] = [statistics.fmean(row) for row in eights], [max(row) for row in eights]
    found["length"] = [float(n) for part in greedy for n in part.completion_mask.sum(-1).tolist()]
    if "longer" in test:
        found["accuracy with 6 to 8 terms"] = [row[0] for row in ask(test["longer"], 1, 0.0)[0]]
    found["KL"] = [0.0] * len(right)
    if ref_model is not None:
        firsts = [rows_of(part, range(0, len(part.answers), 8)) for part in parts]
        now, then = (torch.cat([scored(m, part, tokenizer, args, loop).sum(-1) for part in firsts])
                     for m in (model, ref_model))  # fmt: skip
        found["KL"] = (now - then).tolist()
    model.train()
    return found


def conclude(model: Transformer, ref_model: Transformer, tokenizer: Tokenizer, test: dict[str, list[Task]],
             before: dict[str, list[float]], after: dict[str, list[float]], baselines: dict[str, float],
             args: argparse.Namespace, loop: Loop) -> dict:  # fmt: skip
    """Print three answers before and after, write result.json."""
    if loop.main:
        said = [rollout_of(m, tokenizer, test["test"][:3], 1, 0.0, (0,), args).completions for m in (ref_model, model)]
        for task, a, b in zip(test["test"], *said, strict=False):
            print(f"\n  user    {prompt_text(task)}\n  before  {a}\n  after   {b}")
    variant = args.loss + f" {args.preset}" * bool(args.preset) + " tools" * args.tools
    return loop.finish(before, after, baselines=baselines, variant=variant, series=("pass_rate", "reward"))


BASELINE = "SFT for as long on the annotation of the same questions"
COLUMNS = ("accuracy", "pass@8", "length", "KL")


def pipeline(args: argparse.Namespace) -> dict:
    """--preset r1: SFT on a few worked sums, RL; the best of 4 answers that pass; SFT of the base model on them, RL.

    (DeepSeek-R1, 2501.12948, section 2.3, with one kind of task.) Each part is a run in a folder of its own.
    """
    out = Path(args.out or ROOT / "out" / "grpo-r1")
    first = argparse.Namespace(**vars(args) | {"preset": "cold", "out": out / "1"})
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
            task, texts = some[i // 4], rollout.answers[i : i + 4]
            right = [text for text in texts if checkers.exact("", text, task.row) and checkers.format("", text, {})]
            kept += [{"prompt": task.row["prompt"], "completion": min(right, key=len)}] if right else []
    (out / "2").mkdir(parents=True, exist_ok=True)
    (out / "2" / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    loop.say(f"best of 4: {len(kept)} of {len(tasks)} questions have a right answer, which SFT now starts from")
    last = {"preset": "cold", "out": out / "3", "sft_data": str(out / "2" / "kept.jsonl")}
    return main(argparse.Namespace(**vars(args) | last))


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own); of steps (the generated world), (--data)
    "steps": (25, 200),
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
  no_spread         share of groups whose answers are all alike        below 0.5; such groups teach nothing
  loss              about 0 at every first update: it is no progress measure
  length            tokens of an answer                                no sudden jump
  unfinished        share of answers cut off at --max-new-tokens       below 0.1
  entropy           nats a token, of the rows trained on               falls slowly; near 0: nothing new is tried
  kl                nats a token to the start, if --beta or --kl-coef  below 0.1
  clip_fraction     share of tokens whose ratio is beyond the clip     below 0.2; 0 in a first update
  ratio_max         largest pi / pi_old                                below 10; exactly 1 in a first update
  grad_norm         before clipping                                    below 10 times its usual value
  mismatch          largest |log-prob as sampled - as rescored|        below 1e-3 in fp32, or the run fails
  rollout_seconds, update_seconds, seconds, tokens_per_second
"""


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--batch-size", "--micro-batch-size", "--lr", "--warmup",
               "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens", "--eval-data",
               "--seed", "--device", "--dtype", "--compile", "--parallel", "--log-every", "--eval-every",
               "--save-every", "--resume"),
        defaults=dict.fromkeys(DEFAULTS) | {"schedule": "constant", "weight_decay": 0.0, "grad_clip": 1.0,
                                            "log_every": 1},
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
    cli.add_argument("--questions", type=COUNT, help="different ones of the world (default: never one twice)")
    cli.add_argument("--sft-steps", type=WHOLE, help="supervised steps before RL (default: of --preset, else 0)")
    cli.add_argument("--sft-data", metavar="WHAT", help="worked, annotation or a JSONL file (default: of --preset)")
    cli.add_argument("--sft-lr", type=REAL, default=1e-3, help="of these steps (default: %(default)s)")
    cli.add_argument("--baseline", action="store_true", help="also train by SFT for equal seconds on the annotation")
    cli.add_argument("--tests", type=COUNT, default=400, help="held-out questions of the world (default: %(default)s)")
    cli.add_argument("--show-every", type=WHOLE, default=10, help="steps between samples shown (default: %(default)s)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--chat-format", help="chatml, qwen2.5, qwen3 or llama3, where the checkpoint does not say")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_LOSSES)} in --loss all")
    args = cli.parse_args(argv)
    if args.steps is None and args.loss == "all":
        args.steps = 10
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[(args.data if name == "steps" else args.model) is not None])
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.rewards = [(name, float(weight)) if math.isfinite(weight := number_or_nan(tail)) else (text, 1.0)
                    for text in args.reward for name, _, tail in [text.rpartition("=")]]  # fmt: skip
    return args if args.loss == "all" else resolved(args)


def number_or_nan(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return math.nan


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
        (args.importance_cap < 1, "--importance-cap: expected at least 1, where nothing is corrected"),
        ((args.clip_low or 0) >= 1, "--clip-low: expected less than 1"),
        (args.overlong_buffer > args.max_new_tokens, "--overlong-buffer is longer than --max-new-tokens"),
        (args.data and args.preset, "--preset is a recipe of the generated world: it takes no --data"),
        (args.data and (args.tools or args.baseline), "--tools and --baseline are of the generated world: no --data"),
        (args.tools and (args.preset or args.baseline), "--tools takes no --preset and no --baseline"),
        (args.process_weight and "prm" not in names, "--process-weight needs --reward prm"),
        (args.dynamic_sampling and args.process_weight, "--process-weight takes no --dynamic-sampling"),
    ):
        if is_wrong:
            raise UserError(text)
    for name in names:
        if name not in ("majority", "prm"):
            checkers.load_reward(name)
    return args


def main(args: argparse.Namespace) -> dict:
    if args.loss == "all":
        return compare(main, resolved, args, LOSSES, Path(args.out or ROOT / "out" / "grpo"), COLUMNS, MAIN_LOSSES)
    if args.preset == "r1":
        return pipeline(args)

    # 4. Setup
    loop = Loop(args, "grpo", out="-".join(["grpo", *filter(None, [args.preset, "tools" * args.tools])]))
    if args.batch_size % loop.world_size:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of the {loop.world_size} ranks")
    start = args.model or loop.require(args.start)
    model, tokenizer = load(start, with_tokenizer=True)
    model.to(loop.device)
    if max(args.max_length, 0) > model.config.max_length:
        raise UserError(f"--max-length {args.max_length}: the model reads at most {model.config.max_length} tokens")
    hyper = (f"{name} {value}" for name in HYPER if (value := getattr(args, name)) is not None)
    loop.say(f"--loss {args.loss}: {', '.join(hyper)}")
    loop.say(LOGGED.rstrip()) if not args.resume else None
    tasks, test = tasks_of(args, tokenizer, loop)
    prm = None
    if any(name == "prm" for name, _ in args.rewards):
        prm = load(args.prm or loop.require("prm"), labels=1)[0].to(loop.device).eval()
    if args.sft_steps and not args.resume:
        imitate(model, annotation(args, tokenizer, len(tasks)), tokenizer, args, loop, steps=args.sft_steps)
    ref_model = frozen(model)
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model)
    extra = loop.restore(model, optimizer)
    for name, p in ref_model.named_parameters():
        p.copy_(extra.get(f"ref.{name}", p))
    loop.describe(model)
    before = extra.get("before") or evaluate(model, None, tokenizer, test, args, loop)
    baseline = extra.get("baseline")  # of --loss reinforce: the running mean of rewards

    # 5. Train
    for step in loop.steps(args.steps):
        lr, begun = set_lr(optimizer, args, step), time.perf_counter()

        # rollout and reward
        some, rollout, reward, passed, steps, no_spread = sampled_step(model, tokenizer, tasks, step, prm, args, loop)
        B, rollout_seconds = len(rollout.answers), time.perf_counter() - begun
        counted = rollout.finished.view_as(reward).cpu() | (not args.mask_unfinished)
        mask = rollout.completion_mask * counted.flatten()[:, None].to(loop.device)
        if args.show_every and step % args.show_every == 1 % args.show_every:
            loop.say(f"step {step}: {prompt_text(some[0])!r} -> {rollout.completions[0]!r}: {reward[0, 0].item():.2f}")

        # advantages
        one_update = args.passes * args.minibatches == 1
        old_logps = None if one_update else scored(model, rollout, tokenizer, args, loop)
        ref_logps = scored(ref_model, rollout, tokenizer, args, loop) if args.beta or args.kl_coef else None
        kl_to_go = None
        if args.kl_coef:
            behind = (rollout.sampled_logps if one_update else old_logps) - ref_logps
            kl_to_go = (behind * rollout.completion_mask).flip(-1).cumsum(-1).flip(-1)
        advantages = advantages_of(rollout, reward, counted, steps, kl_to_go, baseline or 0.0, args, loop)
        rewards = everybodys(reward, loop)  # of all ranks
        if args.loss == "reinforce":
            baseline = rewards.mean().item() if baseline is None else 0.9 * baseline + 0.1 * rewards.mean().item()
        entropy_coef = entropy_coefficient(args.entropy_coef, args.entropy_adapt, rewards)
        batch = Batch(rollout.input_ids, mask, rollout.sampled_logps, advantages, old_logps, ref_logps)

        # updates: forward -> loss -> backward -> clip -> step
        sums, largest, n_read = torch.zeros(5, device=loop.device), torch.zeros(2, device=loop.device), 0
        for rows in (some for _ in range(args.passes) for some in torch.randperm(B).tensor_split(args.minibatches)):
            n_tokens = max(1, loop.sum_over_ranks(int(mask[rows].sum())))
            n_rows = max(1, loop.sum_over_ranks(int(mask[rows].any(-1).sum())))
            if not args.beta and not entropy_coef:  # rows without an advantage add nothing
                rows = rows[(advantages[rows] != 0).any(-1).cpu()]
            for part in by_length(batch, rows.tolist(), args.micro_batch_size):
                with loop.autocast():
                    logps, entropy = score(model, part.input_ids, part.completion_mask, tokenizer, args.temperature)
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
            step, pass_rate=everybodys(passed.double(), loop).mean(), reward=rewards.mean(),
            **measured(rollout, sums, largest, no_spread, loop), grad_norm=grad_norm, lr=lr,
            rollout_seconds=rollout_seconds, update_seconds=time.perf_counter() - begun - rollout_seconds,
            tokens=loop.sum_over_ranks(n_read),
        )  # fmt: skip
        if args.eval_every and loop.due("eval", step) and step < args.steps:
            found = evaluate(model, None, tokenizer, test, args, loop)
            loop.say(f"step {step}: accuracy {statistics.fmean(found['accuracy']):.3f}")
        if loop.due("save", step):
            kept = {"before": before, "baseline": baseline}
            kept |= {f"ref.{name}": p for name, p in ref_model.named_parameters()} if args.sft_steps else {}
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra=kept)

    # 6. Evaluate
    after = evaluate(model, ref_model, tokenizer, test, args, loop)
    baselines = {}
    if args.baseline:
        other = load(start)[0].to(loop.device)
        imitate(other, annotation(args, tokenizer, len(tasks)), tokenizer, args, loop, seconds=loop.seconds)
        baselines[BASELINE] = statistics.fmean(evaluate(other, None, tokenizer, test, args, loop)["accuracy"])
    elif not (args.data or args.preset or args.tools) and (stored := ROOT / "results" / "grpo.json").exists():
        figures = json.loads(stored.read_text())["baselines"]
        baselines = {f"{name} (stored, of another run)": value for name, value in figures.items()}
    return conclude(model, ref_model, tokenizer, test, before, after, baselines, args, loop)


if __name__ == "__main__":
    run(main, get_args)
