"""Reward models: one number for an answer, learned from comparisons, and the labels an AI gives in a person's place.

    loss = - log sigmoid(r(chosen) - r(rejected) - margin) + centre * (r(chosen) + r(rejected))^2

(Bradley and Terry 1952; Christiano et al. 2017, arXiv 1706.03741; InstructGPT, 2203.02155, equation 1; the margin of
Llama 2, 2307.09288, equation 2; the centring of Eisenstein et al. 2023, 2312.09244.) The reward r is a linear function
of the state at the last token of the answer, in a copy of the SFT model whose head has one row. The annotator of the
generated world tosses a known coin, so that the best possible accuracy is known. Other feedback, other losses:

    --feedback comparison   which of two answers is better; the label may be a probability (AI labels, label smoothing)
    --feedback binary       good or not, one answer at a time (critique): cross-entropy of sigmoid(r)
    --feedback rank         K answers in order: Plackett-Luce (Zhu et al. 2023, 2301.11270); --rank-loss pairwise: the
                            mean over all pairs i < j of - log sigmoid(r_i - r_j) (InstructGPT, equation 1)
    --feedback steps        right or wrong at the end of each step of a sum: a process reward model (Lightman et al.
                            2023, 2305.20050), its labels made by finishing each step often (Math-Shepherd, 2312.08935)

`--labels ai` puts a chat model in the annotator's place (RLAIF, 2309.00267; constitutional AI, 2212.08073): it answers
a list of questions about each answer, the constitution, and the weighted difference is the label; `--judge DIR` asks a
chat model which of two answers is better. In the tiny world it is the SFT model after more of those of its lessons that
ask about an answer (evaluation fine-tuning, 2401.10020, section 2.1): it never saw a preference. `--revise` is the
supervised half of constitutional AI: answers are criticised, revised and written as SFT data. Not here: rewards along
the way other than steps, and the distances between rewards that need them (DARD, STARC); training on easy and ranking
hard problems (2403.09472) is `--feedback steps` with files of your own.

    python reward.py                                                         the annotator's comparisons, tiny model
    python reward.py --model DIR --data preferences.jsonl                    a real model, real rows
    torchrun --nproc-per-node 8 reward.py --model DIR --data FILE.jsonl --parallel fsdp

The last lines say how often the reward agrees with held-out comparisons, `pair accuracy: 0.5 before, 0.7x after`, and
the ceiling that the annotator's coin sets.
"""

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import chat, formats, manners, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from loop import COUNT, REAL, Loop, adamw, clip, fill, parser, refuse_quantized, run, set_lr, told
from model import Transformer, generate, load

# 1. The objective


def with_scalar_head(model: Transformer) -> Transformer:
    """A copy of `model` with one number in place of the logits: a reward model or a critic before its training.

    The new head is normal of standard deviation 1 / sqrt(width + 1), so that rewards begin small (arXiv 2403.17031).
    """
    new = Transformer(replace(model.config, labels=1, tied=False)).to(model.embed.weight)
    refuse_quantized(new)
    nn.init.normal_(new.head.weight, std=(model.config.width + 1) ** -0.5)
    new.load_state_dict(model.state_dict() | {"head.weight": new.head.weight})
    return new


def load_reward_model(path: str | Path, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The reward model in `path`, to score ids of `tokenizer`; UserError if one of these is another token to it."""
    model, own = load(path, labels=1)
    for kind in ("token_bytes", "special_tokens"):
        if own is None or not getattr(tokenizer, kind).items() <= getattr(own, kind).items():
            raise UserError(f"{path}: the reward model's tokenizer is not the policy's: it would read other words")
    return model.to(device).eval()


def running_rewards(model: Transformer, input_ids: Tensor) -> Tensor:
    """The reward (B, T) of each row as far as token t, that one included; in fp32 under autocast."""
    return (model.hidden(input_ids) * model.head.weight).sum(-1)


def rewards_of(model: Transformer, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """The reward (B,) of each row, read at the last token of completion_mask (B, T) and blind to all that follows."""
    last = (completion_mask * torch.arange(input_ids.shape[1], device=input_ids.device)).amax(1, keepdim=True)  # (B, 1)
    return running_rewards(model, input_ids).gather(1, last).squeeze(1)


def bradley_terry(first: Tensor, second: Tensor, confidence: Tensor, margin: float, centre: float) -> Tensor:
    """c * softplus(margin - d) + (1 - c) * softplus(margin + d), (N,), of d = first - second and c = `confidence` (N,).

    c is the chance that the first is better: 1 is the loss of InstructGPT, with a margin that of Llama 2; 1 - eps label
    smoothing; in between are AI labels. The margin is asked of the winner, whichever that is: a tie stays one.
    A comparison leaves the level of rewards open: centre * (first + second)^2 draws it to 0 (2312.09244, 3.1).
    """
    d, won = first - second, torch.ones_like(confidence)
    loss = confidence * binary(d - margin, won) + (1 - confidence) * binary(d + margin, 1 - won)
    return loss + centre * (first + second) ** 2


def binary(reward: Tensor, good: Tensor) -> Tensor:
    """Cross-entropy (N,) of P(good) = sigmoid(reward) with the labels `good`, both (N,)."""
    return F.binary_cross_entropy_with_logits(reward, good.to(reward.dtype), reduction="none")


def plackett_luce(rewards: Tensor, answers: Tensor) -> Tensor:
    """- log P(order) (N,) of K answers, best first: sum_k log(sum_{i >= k} e^r_i) - r_k (arXiv 2301.11270, section 5).

    rewards (N, K); answers (N, K): False where a list has fewer than K. Each place is won against all that follow.
    """
    r = rewards.masked_fill(~answers, -1e9)  # wins against nothing
    rest = r.flip(1).logcumsumexp(1).flip(1)  # (N, K): log sum of e^r from place k on
    return ((rest - r) * answers).sum(1)


def all_pairs(rewards: Tensor, answers: Tensor) -> Tensor:
    """Mean over i < j of - log sigmoid(r_i - r_j) (N,) of K answers, best first (InstructGPT, section 3.5, equation 1).

    rewards (N, K); answers (N, K): False where a list has fewer than K. However long it is, a list counts as much as
    another.
    """
    r = rewards.masked_fill(~answers, 0.0)
    pairs = (answers[:, :, None] & answers[:, None, :]).triu(1)  # (N, K, K): i is there, and j, which is worse
    losses = -F.logsigmoid(r[:, :, None] - r[:, None, :])
    return (losses * pairs).sum((1, 2)) / pairs.sum((1, 2))


def process(rewards: Tensor, steps: Tensor) -> Tensor:
    """Cross-entropy (S,) at the ends of steps: P(step is right) = sigmoid(reward) (arXiv 2312.08935, equation 2).

    rewards (B, T); steps (B, T): 1 at the last token of a right step, 0 of a wrong one, -1 elsewhere.
    """
    return binary(rewards[steps >= 0], steps[steps >= 0])


def pearson(x: Tensor, y: Tensor) -> float:
    """The correlation of two tensors of one shape; 0 if one of them does not vary."""
    x, y = x.double().flatten() - x.double().mean(), y.double().flatten() - y.double().mean()
    return ((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-12)).item()


def epic_distance(first: Tensor, second: Tensor) -> float:
    """EPIC (arXiv 2006.13900, definition 4.7) of two rewards (prompts, answers): 0 equal, 1 opposite, 0.71 unrelated.

    sqrt((1 - rho) / 2) of canonical rewards. A reward given at the end makes that a mean of 0 over each prompt's
    answers: what a reward adds to every answer of a prompt, or multiplies all by, changes no policy and counts nothing.
    """
    first, second = (x.double() - x.double().mean(1, keepdim=True) for x in (first, second))
    return math.sqrt(max(0.0, 1 - pearson(first, second)) / 2)


def losses_of(model: Transformer, batch: "Batch", args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """What the batch's feedback costs, and the margin by which it is met (above 0: it is), both (batch.n,)."""
    if args.feedback == "steps":
        rewards = running_rewards(model, batch.input_ids)
        right = batch.steps[batch.steps >= 0]
        return process(rewards, batch.steps), rewards[batch.steps >= 0] * (2 * right - 1)
    rewards = rewards_of(model, batch.input_ids, batch.completion_mask).view_as(batch.answers)  # (B, K)
    there = batch.answers[:, 0]  # a rank without rows has a row of padding
    rewards, answers, labels = rewards[there], batch.answers[there], batch.labels[there]
    smooth = args.label_smoothing + (1 - 2 * args.label_smoothing) * labels
    if args.feedback == "binary":
        return binary(rewards[:, 0], smooth), rewards[:, 0] * (2 * labels - 1)
    if args.feedback == "rank":
        of_lists = all_pairs if args.rank_loss == "pairwise" else plackett_luce
        return of_lists(rewards, answers), rewards[:, 0] - rewards[:, 1]
    return bradley_terry(rewards[:, 0], rewards[:, 1], smooth, args.margin, args.centre), rewards[:, 0] - rewards[:, 1]


# 2. Data


class Example(NamedTuple):
    """One piece of feedback: answers to one prompt, and what is said of them."""

    rows: list[chat.Row]  # one answer, two, or K with the best first
    label: float = 1.0  # P(the first of two is better), or whether the only one is good
    steps: Sequence[tuple[int, bool]] = ()  # of the only one: the last token of each step, and whether it is right


class Batch(NamedTuple):
    input_ids: Tensor  # (B * K, T): the K answers of an example one after the other
    completion_mask: Tensor  # (B * K, T)
    answers: Tensor  # (B, K) bool: False where an example has fewer than K
    labels: Tensor  # (B,)
    steps: Tensor  # (B * K, T): 1 at the last token of a right step, 0 of a wrong one, -1 elsewhere
    n: int  # terms of the loss: examples, or steps


def encode(prompt: str | list[dict], replies: Sequence[str | list[dict]], tokenizer: Tokenizer) -> list[chat.Row]:
    """A row for each reply to the prompt: the mask is 1 on the reply alone, and nothing stands after its last token."""
    start, rows = len(chat.prompt_ids(prompt, tokenizer)), []
    for reply in replies:
        messages = formats.to_messages({"prompt": prompt, "completion": reply})
        ids, mask = chat.render(messages, tokenizer)
        end = max(i for i, said in enumerate(mask) if said) + 1
        rows.append(chat.Row(ids[:end], [0] * start + mask[start:end]))
    return rows


def fit(examples: Iterable[Example], max_length: int, too_long: str, counts: Counter) -> Iterator[Example]:
    """Examples of at most max_length tokens a row: longer ones are refused, dropped or cut, and `counts` says how many.

    Answers are cut at their end, and the prompt stays whole in all of them: where it fills the row, or where the
    answers are the same then, there is nothing to compare.
    """
    for n, example in enumerate(examples, start=1):
        if (longest := max(len(row.input_ids) for row in example.rows)) > max_length:
            if too_long == "refuse":
                raise UserError(f"row {n} has {longest} tokens, --max-length is {max_length}: raise it, or choose "
                                "--too-long drop or cut")
            counts["too long, dropped" if too_long == "drop" else "too long, cut"] += 1
            if too_long == "drop":
                continue
        rows = [chat.Row(ids[:max_length], mask[:max_length]) for ids, mask in example.rows]
        steps = tuple((end, right) for end, right in example.steps if end < max_length)
        if not all(any(row.completion_mask) for row in rows) or (example.steps and not steps):
            counts["dropped: nothing of an answer is left"] += 1
        elif len({tuple(row.input_ids) for row in rows}) < len(rows):
            counts["dropped: its answers are the same"] += 1
        else:
            yield Example(rows, example.label, steps)


def collate(examples: Sequence[Example], device: torch.device, multiple_of: int = 1) -> Batch:
    """All answers of the examples, padded on the right to the longest; no example: a row of padding."""
    B, K = max(1, len(examples)), max((len(example.rows) for example in examples), default=2)
    T = max((len(row.input_ids) for example in examples for row in example.rows), default=1)
    T = math.ceil(T / multiple_of) * multiple_of
    input_ids, completion_mask = torch.zeros(2, B, K, T, dtype=torch.long)
    answers, labels, steps = torch.zeros(B, K, dtype=torch.bool), torch.zeros(B), torch.full((B, K, T), -1)
    for b, example in enumerate(examples):
        labels[b] = example.label
        for k, (ids, mask) in enumerate(example.rows):
            input_ids[b, k, : len(ids)], completion_mask[b, k, : len(ids)] = torch.tensor(ids), torch.tensor(mask)
            answers[b, k] = True
        for end, right in example.steps:
            steps[b, 0, end] = int(right)
    input_ids, completion_mask, steps = (x.flatten(0, 1).to(device) for x in (input_ids, completion_mask, steps))
    n = sum(len(example.steps) or 1 for example in examples)
    return Batch(input_ids, completion_mask, answers.to(device), labels.to(device), steps, n)


def world_examples(args: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[Example]:
    """What the annotator of data/manners.py says: which is better, whether one is good, or the order of four."""
    for i, row in enumerate(manners.preferences(args.pairs, args.seed)):
        asker, name, rng = row["asker"], row["name"], world.rng_for("feedback", args.seed, i)
        if args.feedback == "binary":  # good: better than an answer of no utility
            answer = rng.choice((row["chosen"], row["rejected"]))
            good = rng.random() < manners.prefers_first(manners.utility(answer, asker, name), 0.0)
            yield Example(encode(row["prompt"], [answer], tokenizer), float(good))
        elif args.feedback == "rank":  # sorted by utility and Gumbel noise, which is the order of Plackett and Luce
            answers = {row["chosen"], row["rejected"]}
            while len(answers) < 4:
                answers.add(manners.draw_answer(rng, asker, name))
            noise = {answer: -math.log(-math.log(rng.random())) for answer in sorted(answers)}
            answers = sorted(noise, key=lambda answer: -manners.utility(answer, asker, name) - noise[answer])
            yield Example(encode(row["prompt"], answers, tokenizer))
        else:
            yield Example(encode(row["prompt"], [row["chosen"], row["rejected"]], tokenizer))


def file_rows(args: argparse.Namespace, loop: Loop, path: str) -> list[dict]:
    """The rows of a JSONL file in the schema of --feedback; lists that rank nothing are dropped and counted."""
    schema = {"comparison": "preference", "binary": "label", "rank": "scores", "steps": "steps"}[args.feedback]
    rows = formats.read_jsonl(path, schema, mapping=formats.parse_map(args.map))
    if args.feedback != "rank":
        return rows
    if any(len(row["scores"]) < 2 for row in rows):
        raise UserError(f"{path}: a row has one answer only: there is nothing to rank")
    kept = [row for row in rows if len(set(row["scores"])) > 1]
    if len(kept) < len(rows):
        loop.say(f"{len(rows) - len(kept)} rows with equal scores: dropped")
    return kept


def file_example(row: dict, tokenizer: Tokenizer, args: argparse.Namespace) -> Example:
    """The example of a row of --data in the schema of --feedback. Of answers of equal scores the first stays.

    Plackett-Luce knows no ties: an order of theirs would be the file's. Steps stand on lines of their own; one ends
    with the last token that it shares with the longer text.
    """
    label, steps = 1.0, ()
    if args.feedback == "binary":
        replies, label = [row["completion"]], float(row["label"])
    elif args.feedback == "rank":
        first = dict(reversed([*zip(row["scores"], row["completions"], strict=True)]))
        replies = [first[score] for score in sorted(first, reverse=True)]
    elif args.feedback == "steps":
        replies = ["\n".join(row["completions"][: i + 1]) for i in range(len(row["completions"]))]
    else:
        replies, label = [row["chosen"], row["rejected"]], row.get("confidence", 1.0)
    rows = encode(row["prompt"], replies, tokenizer)
    if args.feedback == "steps":
        ends = [len(os.path.commonprefix([part.input_ids, rows[-1].input_ids])) - 1 for part in rows]
        rows, steps = rows[-1:], tuple(zip(ends, row["labels"], strict=True))
    return Example(rows, label, steps)


def examples(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, loop: Loop
             ) -> tuple[Iterable[Example], dict[str, list]]:
    """The feedback to train on, and what `evaluate` measures: {"examples", of the world "pairs", "requests"}."""
    if args.data:
        (rows,), held_out = formats.split([args.data], args.eval_data, partial(file_rows, args, loop), loop.say)
        rows = ai_labels(model, tokenizer, rows, args, loop) if args.labels == "ai" else rows
        train, test = ([file_example(row, tokenizer, args) for row in part] for part in (rows, held_out))
        counts: Counter = Counter()
        test = list(fit(test, args.max_length, args.too_long, counts))
        for kind, n in counts.items():
            loop.say(f"--max-length {args.max_length}: {n} measured rows {kind}")
        return train, {"examples": test}
    if args.feedback == "steps":
        train = worked_sums(model, tokenizer, args, loop, "train", math.ceil(args.pairs / 4), 4)
        return train, {"examples": worked_sums(model, tokenizer, args, loop, "test", 200, 8)}
    pairs = list(manners.preferences(1000, 0, "test"))
    requests = [manners.draw_request(world.rng_for("requests", i), "test") for i in range(64)]
    for i, request in enumerate(requests):
        rng = world.rng_for("answers", i)
        request["answers"] = [manners.draw_answer(rng, request["asker"], request["name"]) for _ in range(8)]
    both = [encode(row["prompt"], [row["chosen"], row["rejected"]], tokenizer) for row in pairs]
    test = {"examples": [Example(rows) for rows in both], "pairs": pairs, "requests": requests}
    if args.labels == "ai":
        rows = ai_labels(model, tokenizer, list(manners.preferences(args.pairs, args.seed)), args, loop)
        return [file_example(row, tokenizer, args) for row in rows], test
    return world_examples(args, tokenizer), test


# AI feedback

CONSTITUTION = (  # (question about an answer, what a yes is worth): what data/manners.py calls good, in round numbers
    ("Does it greet?", 1.0), ("Is it rude?", -2.0), ("Does it thank?", 1.0), ("Does it end well?", 1.0),
    ("Does it tell a fact?", 2.0),
)  # fmt: skip
WHICH = """Compare two answers. What counts, and how much (below 0: against it):
{rules}

{prompt}

Answer A: {first}

Answer B: {second}

Which answer is better? Say A or B and nothing else."""


def read_constitution(args: argparse.Namespace) -> list[tuple[str, float]]:
    """(question, weight) of --constitution, a JSON list of [question, weight]."""
    if not args.constitution:
        return list(CONSTITUTION)
    try:
        found = json.loads(Path(args.constitution).read_text(encoding="utf-8"))
        rules = [(question, float(weight)) for question, weight in found]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{args.constitution}: expected a JSON list of [question, weight] ({error})") from None
    if not rules or not all(isinstance(text, str) and text and math.isfinite(weight) for text, weight in rules):
        raise UserError(f"{args.constitution}: expected [question, weight] pairs, found {json.dumps(found)[:60]}")
    return rules


@torch.no_grad()
def odds(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], words: tuple[str, str], rows_at_once: int,
         loop: Loop) -> Tensor:  # fmt: skip
    """log p(words[0]) - log p(words[1]) (N,), each by its first token, as what the model says next."""
    if (longest := max(map(len, prompts), default=0)) > model.context:
        raise UserError(f"a question to the judge has {longest} tokens: the judge reads at most {model.context}")
    yes, no = (tokenizer.encode(word)[0] for word in words)
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), torch.zeros(len(prompts))
    for start in tqdm(range(0, len(order), rows_at_once), "judging", disable=None, leave=False):
        some = order[start : start + rows_at_once]
        rows = [Example([chat.Row(prompts[i], [1] * len(prompts[i]))]) for i in some]
        batch = collate(rows, loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            hidden = model.hidden(batch.input_ids)
        last = hidden[range(len(some)), batch.completion_mask.sum(1) - 1].float()  # (B, D)
        with torch.autocast(loop.device.type, enabled=False):  # who calls may have one, which rounds a product
            found[some] = (last @ (model.head.weight[yes].float() - model.head.weight[no].float())).cpu()
    return found


def judge_of(model: Transformer, args: argparse.Namespace, loop: Loop) -> Transformer:
    """Who is asked for opinions: a --model of your own itself, in the tiny world its copy that learned to judge."""
    return model if args.model else load(loop.require("judge"), device=loop.device)[0].eval()


def opinions(model: Transformer, tokenizer: Tokenizer, answers: Iterable[str], rules: list[tuple[str, float]],
             args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{answer: P(yes) to each question of the constitution}, as the model says when it is asked.

    A --model of one's own reads --micro-batch-size questions at a time, the judge of the tiny world 256.
    """
    answers, at_once = list(dict.fromkeys(answers)), args.micro_batch_size if args.model else 256
    asked = [chat.prompt_ids(f"Answer: {a} {q}", tokenizer) for a in answers for q, _ in rules]
    yes = odds(model, tokenizer, asked, ("yes", "no"), at_once, loop).sigmoid().view(len(answers), len(rules))
    return dict(zip(answers, yes.tolist(), strict=True))


def worth(yes: list[float], rules: list[tuple[str, float]]) -> float:
    """sum_q weight_q P(yes to q)"""
    return sum(p * weight for p, (_, weight) in zip(yes, rules, strict=True))


def ai_labels(model: Transformer, tokenizer: Tokenizer, rows: list[dict], args: argparse.Namespace, loop: Loop
              ) -> list[dict]:  # fmt: skip
    """`rows` of the schema "preference" as the AI would label them, with its "confidence", at least 1/2; also a file.

    Whoever reads that file as --data takes its labels for certain: "confidence" is no field of the schema. So it has no
    exact ties, which the rows returned keep, as 1/2.

    P(a is better) = sigmoid(sum_q weight_q (P(yes to q of a) - P(yes to q of b))), or with --judge the mean of what the
    judge says where a comes first and where it comes second: what it gives to the first of two, whatever that says,
    cancels (arXiv 2309.00267, section 2.1).
    """
    rules, pairs = read_constitution(args), [[text_of(row[side]) for side in ("chosen", "rejected")] for row in rows]
    if args.judge:
        judge, its_tokenizer = load(args.judge, device=loop.device, dtype=loop.dtype, with_tokenizer=True)
        listed = "\n".join(f"- {question} {weight:+g}" for question, weight in rules)
        asked = [WHICH.format(rules=listed, prompt=text_of(row["prompt"], whole=True), first=x, second=y)
                 for row, (a, b) in zip(rows, pairs, strict=True) for x, y in ((a, b), (b, a))]
        if not its_tokenizer.chat_format:  # else --chat-format is another's, that of --model
            its_tokenizer = its_tokenizer.with_chat_format(args.chat_format)
        prompts = [chat.prompt_ids(text, its_tokenizer) for text in asked]
        found = odds(judge, its_tokenizer, prompts, ("A", "B"), args.micro_batch_size, loop)
        first, second = found.sigmoid().view(-1, 2).T
        better = ((first + 1 - second) / 2).tolist()  # first: P(a) where a is A; second: P(b) where b is A
        alike = ((first > 0.5) != (second > 0.5)).float().mean()
        loop.say(f"--judge: prefers the same answer in both orders of {alike:.1%}")
    else:
        judge = judge_of(model, args, loop)
        yes = opinions(judge, tokenizer, (answer for pair in pairs for answer in pair), rules, args, loop)
        better = [manners.prefers_first(worth(yes[a], rules), worth(yes[b], rules)) for a, b in pairs]
    ties = sum(abs(p - 0.5) < 0.05 for p in better) / len(better)
    judged = [(p, row) for p, row in zip(better, rows, strict=True) if abs(p - 0.5) >= 0.05 and "asker" in row]
    judged = [(p > 0.5) == (row["utility_chosen"] > row["utility_rejected"]) for p, row in judged
              if row["utility_chosen"] != row["utility_rejected"]]
    agreement = f"; of the others {fmean(judged):.1%} are in the order of the true utility" if judged else ""
    loop.say(f"--labels ai: {len(rows)} pairs, {ties:.1%} tied (0.45 to 0.55){agreement}")
    labelled = []
    for p, row in zip(better, rows, strict=True):
        chosen, rejected = ("chosen", "rejected") if p >= 0.5 else ("rejected", "chosen")
        labelled.append({"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected],
                         "confidence": max(p, 1 - p)})
    decided = [row for row in labelled if row["confidence"] > 0.5]
    if len(decided) < len(labelled):
        loop.say(f"{len(labelled) - len(decided)} pairs are exact ties: not written")
    write_jsonl(loop, "preferences.jsonl", decided)
    return labelled


def text_of(said: str | list[dict], whole: bool = False) -> str:
    """A text, the last message of several, or as a `whole` all of them with who says them."""
    if isinstance(said, str):
        return said
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in said) if whole else said[-1]["content"]


def write_jsonl(loop: Loop, name: str, rows: list[dict]) -> None:
    if loop.main:
        loop.out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (loop.out / name).write_text(text, encoding="utf-8")
        loop.say(f"wrote {loop.out / name}")


def sampled(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], new: int, samples: int,
            temperature: float, seed: int) -> list[list[list[int]]]:  # fmt: skip
    """`samples` continuations of each prompt, of at most `new` tokens."""
    found = []
    if (room := model.context - max(map(len, prompts))) < new:
        raise UserError(f"--max-new-tokens: {new} more are to be said, and the longest prompt leaves room for {room}")
    for start in tqdm(range(0, len(prompts), 256), "sampling", disable=None, leave=False):
        found += generate(
            model, prompts[start : start + 256], max_new_tokens=new, eos_ids=tokenizer.eos_ids, samples=samples,
            temperature=temperature, seed=seed + start, vocab_size=tokenizer.vocab_size,
        ).completions  # fmt: skip
    return [found[i : i + samples] for i in range(0, len(found), samples)]


def revise(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> dict:
    """Constitutional AI, supervised phase (arXiv 2212.08073, section 3): answer, criticise, revise; write SFT data.

    In each of eight rounds every sentence is taken out once, and at every place the model goes on writing and its next
    sentence is put in; of all these changes the one that raises the judge's score most is made. What the judge sees in
    an answer is all that it knows: not who asked, nor whether a fact is true.
    """
    rules = [(question, weight) for question, weight in read_constitution(args) if weight]
    known = manners.QUESTIONS.values()
    if not rules or (odd := [question for question, _ in rules if question not in known]):
        found = repr(odd[0]) if rules else "no question with a weight"
        raise UserError(f"{args.constitution}: found {found}; --revise measures what the world can check: "
                        f"{' '.join(known)}")
    judge = judge_of(model, args, loop)
    requests = [manners.draw_request(world.rng_for("revise", args.seed, i), "train") for i in range(args.pairs)]
    prompts = [chat.prompt_ids(request["prompt"], tokenizer) for request in requests]
    seen: dict[str, list[float]] = {}  # text: P(yes) to each question

    def scores_of(answers: list[list[str]]) -> list[float]:
        texts = [" ".join(sentences) for sentences in answers]
        seen.update(opinions(judge, tokenizer, sorted(set(texts) - seen.keys()), rules, args, loop))
        return [worth(seen[text], rules) for text in texts]

    said = sampled(model, tokenizer, prompts, args.max_new_tokens, 1, 1.0, args.seed)
    drafts = [manners.sentences_of(chat.completion_text(ids, tokenizer)) for (ids,) in said]
    final, scores = list(drafts), scores_of(drafts)
    for turn in range(8):
        needed = [score + 0.25 for score in scores]  # more than the judge wavers
        ideas = changes(model, tokenizer, prompts, final, args.seed + turn + 1)
        for (i, sentences), score in zip(ideas, scores_of([sentences for _, sentences in ideas]), strict=True):
            if score > max(scores[i], needed[i]):
                final[i], scores[i] = sentences, score
    write_revised(requests, drafts, final, loop)
    return conclude(*(kept_rules(answers, requests, rules) for answers in (drafts, final)), {}, args, loop)


def changes(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], answers: list[list[str]], seed: int
            ) -> list[tuple[int, list[str]]]:  # fmt: skip
    """(i, answers[i] with a sentence less, or with one more): at every place three that the model would say there."""
    places = [(i, at) for i, sentences in enumerate(answers) for at in range(len(sentences) + 1)]
    starts = [prompts[i] + tokenizer.encode(" ".join(answers[i][:at])) for i, at in places]
    said = sampled(model, tokenizer, starts, 24, 3, 0.5, seed)
    more = [(i, answers[i][:at] + manners.sentences_of(chat.completion_text(ids, tokenizer))[:1] + answers[i][at:])
            for (i, at), some in zip(places, said, strict=True) for ids in some]  # fmt: skip
    return more + [(i, answers[i][:at] + answers[i][at + 1 :]) for i, at in places
                   if len(answers[i]) > 1 and at < len(answers[i])]


def write_revised(requests: list[dict], drafts: list[list[str]], final: list[list[str]], loop: Loop) -> None:
    """Write what became better to revised.jsonl, rows of SFT, and say the first."""
    improved = [i for i, draft in enumerate(drafts) if final[i] != draft]
    write_jsonl(loop, "revised.jsonl", [
        {"messages": [{"role": "user", "content": requests[i]["prompt"]},
                      {"role": "assistant", "content": " ".join(final[i])}]} for i in improved])  # fmt: skip
    for i in improved[:1]:
        loop.say(f"\n  user       {requests[i]['prompt']}\n  draft      {' '.join(drafts[i])}\n"
                 f"  revised    {' '.join(final[i])}\n")


def kept_rules(answers: list[list[str]], requests: list[dict], rules: list[tuple[str, float]]
               ) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number an answer}, by what the world knows of them: whether all of `rules` are kept, and each."""
    wanted = {name: weight > 0 for name, asked in manners.QUESTIONS.items() for text, weight in rules if text == asked}
    told = [(" ".join(said), r["asker"], r["name"]) for said, r in zip(answers, requests, strict=True)]
    keeps = {f"rules kept: {name}": [float(manners.has(text, name, *who) == is_wanted) for text, *who in told]
             for name, is_wanted in wanted.items()}  # fmt: skip
    all_of_them = [min(row) for row in zip([1.0] * len(told), *keeps.values(), strict=True)]
    utility = [manners.utility(*row) for row in told]
    return {"answers that keep the constitution": all_of_them, "utility": utility} | keeps


# Process supervision


def worked_sums(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop, split: str,
                problems: int, samples: int) -> list[Example]:  # fmt: skip
    """`samples` worked sums of each of some problems, as the model writes them; a step ends with its full stop.

    For the test a step is right if all so far is as data.world.working has it. For training nobody looks at steps: one
    is right if any of four endings that the model gives it arrives at the right answer (Math-Shepherd, equation 3).
    """
    sums = [world.draw_sum(world.rng_for("process", args.seed, split, i), split, 5) for i in range(problems)]
    asked = [f"What is {' + '.join(map(str, numbers))}? Show your steps." for numbers in sums]
    prompts = [chat.prompt_ids(text, tokenizer) for text in asked]
    truths = [f"<think>{world.working(numbers)}</think>{sum(numbers)}" for numbers in sums]
    said = sampled(model, tokenizer, prompts, args.max_new_tokens, samples, 1.0, args.seed)
    parts = []  # of each answer, as far as each step: (problem, ids)
    for p, ids in ((p, ids) for p, some in enumerate(said) for ids in some):
        ends = [t for t, i in enumerate(ids, start=1) if t == len(ids) or tokenizer.decode([i]).endswith(".")]
        parts.append([(p, *ids[:end]) for end in ends])
    right = {}
    for p, *ids in {part for some in parts for part in some}:
        right[p, *ids] = truths[p].startswith(chat.completion_text(ids, tokenizer))
    for p, *ids in {some[-1] for some in parts}:
        right[p, *ids] = chat.completion_text(ids, tokenizer) == truths[p]
    if split == "train":
        exact, starts = dict(right), sorted({part for some in parts for part in some[:-1]})
        begun = [prompts[p] + ids for p, *ids in starts]
        endings = sampled(model, tokenizer, begun, args.max_new_tokens, 4, 1.0, args.seed + 1)
        for (p, *ids), four in [*zip(starts, endings, strict=True), *((some[-1], [[]]) for some in parts)]:
            texts = [chat.completion_text(ids + ending, tokenizer) for ending in four]
            right[p, *ids] = any(world.is_correct(text, truths[p]) for text in texts)
        agreement = fmean(right[part] == exact[part] for part in right)
        share = fmean(right.values())
        loop.say(f"--feedback steps: {len(parts)} worked sums, {share:.1%} of {len(right)} steps are right by "
                 f"{4 * len(starts)} endings; a checker would say the same of {agreement:.1%}")
    found = []
    for some in parts:
        (p, *ids), start = some[-1], len(prompts[some[-1][0]])
        row = chat.Row(prompts[p] + ids, [0] * start + [1] * len(ids))
        found.append(Example([row], steps=tuple((start + len(part) - 2, right[part]) for part in some)))
    return found


# The measurement


@torch.no_grad()
def scores(model: Transformer, some: Sequence[Example], args: argparse.Namespace, loop: Loop) -> list[list[float]]:
    """For each example the rewards of its answers, or those at the ends of its steps."""
    order = sorted(range(len(some)), key=lambda i: max(len(row.input_ids) for row in some[i].rows))
    found: list[list[float]] = [[] for _ in some]
    for start in tqdm(range(0, len(order), args.micro_batch_size), "measuring", disable=None, leave=False):
        places = order[start : start + args.micro_batch_size]
        batch = collate([some[i] for i in places], loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            if args.feedback == "steps":
                values = running_rewards(model, batch.input_ids)[batch.steps >= 0]
            else:
                values = rewards_of(model, batch.input_ids, batch.completion_mask)[batch.answers.flatten()]
        sizes = [len(some[i].steps) or len(some[i].rows) for i in places]
        for i, part in zip(places, values.float().cpu().split(sizes), strict=True):
            found[i] = part.tolist()
    return found


def margins_of(example: Example, rewards: list[float]) -> list[float]:
    """By how much each thing that the example says is met: above 0 it is."""
    if example.steps:
        return [r if right else -r for r, (_, right) in zip(rewards, example.steps, strict=True)]
    if len(rewards) == 1:
        return [rewards[0] * (2 * example.label - 1)]
    return [a - b for a, b in combinations(rewards, 2)]


def calibration(margins: Iterable[float]) -> list[tuple[float, float, int]]:
    """(what it says, what is true, how many) where the model says sigmoid(|margin|) = 0.5 to 0.6, to 0.7, ... to 1."""
    buckets: list[list[tuple[float, bool]]] = [[] for _ in range(5)]
    for margin in margins:
        says = 1 / (1 + math.exp(-abs(margin)))
        buckets[min(4, int(10 * says) - 5)].append((says, margin > 0))
    return [(fmean(p for p, _ in some), fmean(met for _, met in some), len(some)) for some in buckets if some]


def evaluate(model: Transformer, tokenizer: Tokenizer, test: dict[str, list], args: argparse.Namespace, loop: Loop
             ) -> dict[str, list[float]]:
    """{metric: one number a test row, or one alone}; the mean of the first is what the run is judged by."""
    model.eval()
    rewards = scores(model, test["examples"], args, loop)
    margins = [m for some in zip(test["examples"], rewards, strict=True) for m in margins_of(*some)]
    hits = [(m > 0) + 0.5 * (m == 0) for m in margins]
    kind = "step" if args.feedback == "steps" else "label" if len(test["examples"][0].rows) == 1 else "pair"
    off = sum(abs(says - true) * n for says, true, n in calibration(margins)) / len(margins)
    found = {f"{kind} accuracy": hits, "margin": margins, "calibration error": [off]}
    if "pairs" in test:
        for name in manners.QUESTIONS:
            both = [[manners.has(row[side], name, row["asker"], row["name"]) for side in ("chosen", "rejected")]
                    for row in test["pairs"]]
            found[f"pairs that differ in: {name}"] = [hit for hit, (a, b) in zip(hits, both, strict=True) if a != b]
        told = [(answer, r["asker"], r["name"], r["prompt"]) for r in test["requests"] for answer in r["answers"]]
        rows = [Example(encode(prompt, [answer], tokenizer)) for answer, _, _, prompt in told]
        reward = torch.tensor(scores(model, rows, args, loop)).view(-1, 8)  # (64 prompts, 8 answers)
        utility = torch.tensor([manners.utility(*row[:3]) for row in told]).view(-1, 8)
        length = torch.tensor([float(len(row[0])) for row in told]).view(-1, 8)
        found["correlation with utility"] = [pearson(reward, utility)]
        found["EPIC distance to utility"] = [epic_distance(reward, utility)]
        found["correlation with length"] = [pearson(reward, length)]
        found["utility's correlation with length"] = [pearson(utility, length)]
        found["mean reward"] = [reward.mean().item()]
    if args.feedback == "steps" and not args.data:
        for name, total in (("min", min), ("product", math.prod), ("last", lambda sure: sure[-1])):
            ranks = [total([1 / (1 + math.exp(-r)) for r in values]) for values in rewards]
            best = [max(range(i, i + 8), key=lambda i: ranks[i]) for i in range(0, len(ranks), 8)]
            found[f"best of 8 by {name}"] = [float(test["examples"][i].steps[-1][1]) for i in best]
    model.train()
    return found


def conclude(before: dict[str, list[float]], after: dict[str, list[float]], baselines: dict[str, float],
             args: argparse.Namespace, loop: Loop) -> dict:  # fmt: skip
    """Print the calibration and write result.json: means before and after, and intervals of the paired differences."""
    if "margin" in after:
        for says, true, n in calibration(after["margin"]):
            loop.say(f"where it says {says:.2f}, {true:.2f} come true ({n} rows)")
    kind = "revise" if args.revise else args.feedback + "-ai" * (args.labels == "ai")
    return loop.finish(before, after, baselines=baselines, variant=kind)


def baselines(test: dict[str, list], tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """What the numbers of the generated world are to be compared with."""
    if "pairs" in test:
        lengths = [(len(row["chosen"]), len(row["rejected"])) for row in test["pairs"]]
        longer = [(a > b) + 0.5 * (a == b) for a, b in lengths]
        return {"ceiling: the annotator's own utility": manners.best_accuracy(test["pairs"]),
                "the longer answer": fmean(longer)}  # fmt: skip
    if args.feedback != "steps" or args.data:
        return {}
    said = []  # of each sample: its final answer, and whether all of it is right
    for (row,), _, steps in test["examples"]:
        text = chat.completion_text(row.input_ids[row.completion_mask.index(1) :], tokenizer)
        said.append((world.final_answer(text), steps[-1][1]))
    eights = [said[i : i + 8] for i in range(0, len(said), 8)]
    votes = [Counter(answer for answer, _ in eight).most_common(1)[0][0] for eight in eights]
    return {"every step is right": fmean(right for example in test["examples"] for _, right in example.steps),
            "one sample": fmean(right for _, right in said),
            "majority vote of 8": fmean((vote, True) in eight for vote, eight in zip(votes, eights, strict=True)),
            "ceiling: any of 8": fmean(any(right for _, right in eight) for eight in eights)}  # fmt: skip


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (16, 32),
    "micro_batch_size": (16, 2),
    "max_length": (128, 1024),
    "lr": (6e-4, 1e-5),
    "warmup": (10, 10),
}
PAIRS = {"comparison": 8000, "binary": 4000, "rank": 1500, "steps": 6000}  # of the world, --pairs
LOGGED = """logged every --log-every steps, of the rows of that step before its update:
  loss        the loss above, a mean over comparisons (answers, lists, steps)
  accuracy    share of comparisons whose better answer has the higher reward (of labels that the reward's sign agrees
              with; of lists whose best answer beats the second)
  margin      by how much it does, on average; also measured
  grad_norm, lr, seconds, tokens_per_second

measured before and after on held-out rows:
  pair accuracy              as above, of lists on all their pairs (label accuracy, step accuracy for other feedback);
                             to compare with: the ceiling
  pairs that differ in ...   the same on pairs of which one answer greets, is rude, thanks, ends well, tells a fact
  calibration error          mean distance of what the model says, sigmoid(margin), and what comes true, in five buckets
  correlation with utility   Pearson's, of the rewards of 8 answers to each of 64 prompts
  correlation with length    the same with the length in characters; utility's correlation with length is the honest one
  EPIC distance to utility   0 the same order and spacing within prompts, 0.71 unrelated, 1 opposite
  mean reward                about 0, or an offset that RL would have to carry
  best of 8 by ...           --feedback steps: how often the highest of 8 solutions is right, by its least step, the
                             product or the last
  answers that keep the constitution  --revise: all its rules, by what the world knows of them (the judge sees neither
                             who asked nor what is true), of drafts and of what is made of them; rules kept: one by one
"""


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--epochs", "--batch-size", "--micro-batch-size", "--lr",
               "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume"),
        defaults=told(DEFAULTS) | {"steps": None, "epochs": None, "schedule": "linear", "weight_decay": 0.0,
                                   "grad_clip": 1.0, "max_new_tokens": 80},
    )
    cli.epilog = LOGGED
    cli.add_argument("--feedback", choices=("comparison", "binary", "rank", "steps"), default="comparison",
                     help="what is said of answers, and so which loss (default: %(default)s; steps: 3 epochs, not 1)")
    cli.add_argument("--labels", choices=("annotator", "ai"), default="annotator", help="who compares")
    cli.add_argument("--judge", metavar="DIR", help="chat model that compares, for --labels ai (default: --model "
                     "itself, in the tiny world out/judge, is asked the constitution's questions about each answer)")
    cli.add_argument("--constitution", metavar="FILE", help="JSON list of [question, what a yes is worth]")
    cli.add_argument("--revise", action="store_true", help="critique and revision: write revised.jsonl, train nothing")
    cli.add_argument("--pairs", type=COUNT, help="comparisons (labels, lists, solutions, answers to revise) of the "
                     "generated world (default: 8000; 4000, 1500, 6000, 256)")
    cli.add_argument("--margin", type=REAL, default=0.0, help="that the better answer must have (default: %(default)s)")
    cli.add_argument("--centre", type=REAL, help="weight of (r + r)^2, of comparisons (default: 0.01)")
    cli.add_argument("--label-smoothing", type=REAL, default=0.0, metavar="EPS", help="share of labels held for wrong")
    cli.add_argument("--rank-loss", choices=("listwise", "pairwise"), help="of --feedback rank: Plackett-Luce, or the "
                     "mean over all pairs of a list (default: listwise)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut"), default="refuse",
                     help="rows of more than --max-length tokens (cut: at the end of the answers, never the prompt)")
    args = cli.parse_args(argv)
    fill(args, DEFAULTS, args.model is not None)
    if args.epochs is None:  # few worked sums, which take long to make, are looked at more often
        args.epochs = 3.0 if args.feedback == "steps" else 1.0
    args.pairs = args.pairs or (256 if args.revise else PAIRS[args.feedback])
    for wrong, said in (
        (args.feedback != "comparison" and (args.margin or args.centre is not None),
         "--margin and --centre are of comparisons: they need --feedback comparison"),
        (args.feedback in ("rank", "steps") and args.label_smoothing,
         "--label-smoothing: --feedback rank and steps have none"),
        (args.feedback != "rank" and args.rank_loss, "--rank-loss is of lists: it needs --feedback rank"),
        (args.label_smoothing >= 0.5, "--label-smoothing: from 0.5 on the labels say the opposite"),
        (args.labels == "ai" and args.feedback != "comparison", "--labels ai compares: it needs --feedback comparison"),
        (args.judge and args.labels != "ai", "--judge compares in the annotator's place: it needs --labels ai"),
        (args.constitution and args.labels != "ai" and not args.revise, "--constitution needs --labels ai or --revise"),
        (args.revise and args.data, "--revise answers requests of the generated world, not those of --data"),
        (args.revise and (args.labels == "ai" or args.feedback != "comparison"),
         "--revise compares and labels nothing: it takes no --labels, --judge or --feedback"),
    ):
        if wrong:
            raise UserError(said)
    fill(args, {"centre": (0.01,)}, 0)
    if args.feedback == "rank":  # elsewhere it stays None
        fill(args, {"rank_loss": ("listwise",)}, 0)
    return args


def main(args: argparse.Namespace) -> dict:
    # 4. Setup
    loop = Loop(args, "reward")
    if any(path.is_file() for path in (loop.out, *loop.out.parents)):  # else it is found out after the labelling
        raise UserError(f"--out {loop.out}: expected a folder, found a file")
    start, tokenizer = load(args.model or loop.require("sft"), with_tokenizer=True)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    loop.check_length(start)
    start.to(loop.device).eval()
    if args.revise:
        with loop.autocast():
            return revise(start, tokenizer, args, loop)
    counts: Counter = Counter()
    with loop.autocast():  # it may sample, or judge
        rows, test = examples(args, start, tokenizer, loop)
    rows = list(fit(tqdm(rows, "encoding", disable=None, leave=False), args.max_length, args.too_long, counts))
    for kind, n in counts.items():
        loop.say(f"--max-length {args.max_length}: {n} rows {kind}")
    if not rows or not test["examples"]:
        raise UserError(f"no row is left to train on or to measure: --max-length is {args.max_length}")
    total = args.steps if args.steps is not None else math.ceil(args.epochs * len(rows) / args.batch_size)
    loop.seed(0)  # the head is the same whatever was drawn before it
    model = loop.shard(with_scalar_head(start))
    del start  # its memory
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model)
    extra = loop.restore(model, optimizer)
    loop.describe(model)
    before = extra.get("before") or evaluate(model, tokenizer, test, args, loop)

    # 5. Train
    for step in loop.steps(total):
        lr = set_lr(optimizer, args, step, total)
        indices = loop.micro_batches(len(rows), step)
        batches = [collate([rows[i] for i in some], loop.device, 64 if loop.compiled else 1) for some in indices]
        n = loop.sum_over_ranks(sum(batch.n for batch in batches))
        n_read = loop.sum_over_ranks(sum(batch.input_ids.numel() for batch in batches))
        sums = torch.zeros(3, device=loop.device)
        for batch in batches:
            with loop.autocast():
                losses, margins = losses_of(model, batch, args)
            loss = losses.sum() / n
            loss.backward()
            sums += torch.stack([loss, (margins > 0).sum() / n, margins.sum() / n]).detach()
        loop.all_reduce(model)
        grad_norm = clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss, accuracy, margin = loop.sum_over_ranks(sums)
        loop.log(step, loss=loss, accuracy=accuracy, margin=margin, grad_norm=grad_norm, lr=lr, tokens=n_read)
        if args.eval_every and loop.due("eval", step) and step < total:
            name, values = next(iter(evaluate(model, tokenizer, test, args, loop).items()))
            loop.say(f"step {step}: {name} {fmean(values):.3f}")
        if loop.due("save", step):
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra={"before": before})

    # 6. Evaluate
    after = evaluate(model, tokenizer, test, args, loop)
    return conclude(before, after, baselines(test, tokenizer, args), args, loop)


if __name__ == "__main__":
    run(main, get_args)
