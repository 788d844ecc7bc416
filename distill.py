"""Knowledge distillation: a small model learns what a large one thinks of every next token, not only which one came.

    loss = alpha * CE(y, q) + (1 - alpha) * T^2 * D(p, q) + hidden * |P h_student - h_teacher|^2 / width,    a token

(Hinton et al. 2015, arXiv 1503.02531.) p and q are softmax(logits / T) of the teacher and of the student, CE is that of
the tokens y of the text and has T = 1, T^2 keeps the size of a KL's gradient as T grows, P is a learned projection of
the state before the head. One token of text says one thing; p says how likely all others were. --loss picks D, or a
loss of its own:

    hard              alpha = 1: the text alone, what every other loss must beat
    forward_kl        KL(p || q), which covers all that the teacher may say (Hinton)
    reverse_kl        KL(q || p), which says only what the teacher is sure of
    jsd               b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = --skew (GKD, 2306.13649)
    skew_kl           KL(p || a p + (1 - a) q), a = --skew (DistiLLM, 2402.03898)
    skew_reverse_kl   KL(q || (1 - a) p + a q)
    tvd               half the sum of |p - q| (2307.15190)
    minillm           KL(q || p) of whole texts, on texts of the student, by a policy gradient (2306.08543)
    sequence          the text is the teacher's own, no probabilities are needed (Kim and Rush 2016, 1606.07947)

    --on-policy L     a share L of the rows of each step is written by the student itself (GKD)
    --top-k K         K probabilities a token and the sum of all others are stored once: no step asks the teacher again
    --teacher A,B     several teachers: the mean of their p, or with --fusion min_ce that of the one that expects the
                      text most (FuseLLM, 2401.10491)
    --task steps --loss sequence    the teacher's worked solutions, those with the right result (R1, 2501.12948)
    --weak-to-strong  a small teacher and a large student (2312.09390)

Vocabularies must be the same. Neither model's (tokens, vocabulary) logits ever exist (kernels.linear_divergence). Not
here: other layers' states, beam search, MiniLLM's mixing of both models in its samples. Zeros that prune.py left in a
--model are weights like others, and learn.

    python distill.py                                                     the tiny model teaches one of a ninth
    python distill.py --model SMALL --teacher LARGE --data rows.jsonl --loss jsd --on-policy 0.5
    torchrun --nproc-per-node 8 distill.py --model SMALL --teacher LARGE --data rows.jsonl
    python distill.py --loss all --seeds 3                                a table of the losses

Logged: `loss` and its terms, weighted: `hard` (of the text), `soft` (of the teacher), `later` (minillm), `hidden`.
Measured: `bits per byte` of held-out texts (of the generated world's weather, whose entropy is known); `KL`, KL(p || q)
a token of them; of the weather also `reverse KL`, KL(q || p) a token of texts of the student: what it says that the
teacher would not; both in nats. In --task steps and rank `exact match`. The last line says how much of the gap between
hard labels and the teacher is closed.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sft
from data import chat, checkers, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from kernels import IGNORED, Teachers, TopK, linear_cross_entropy, linear_divergence, linear_logps, linear_top_k
from loop import COUNT, REAL, ROOT, WHOLE, Loop, adamw, clip, compare, fill, parser, run, set_lr, told
from model import Config, Transformer, generate, load, token_logps

# 1. The objective


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T): 1 on the tokens that are learned from
    own: Tensor  # (B, T): 1 on the tokens that the student wrote itself
    stored: TopK | None  # (B, T, k), with --top-k


class Taught(NamedTuple):
    """What the teachers say of a batch, without a gradient."""

    targets: Teachers | TopK  # of each teacher the states (B, T, D) and the head (V, D), or what was stored of them
    mixture: Tensor | None = None  # (B, T, K): shares of the K teachers; None: equal
    logps: Tensor | None = None  # (B, T): log p of the tokens, for minillm


# {hyperparameter: (generated world, --data)}; of lr alone (a new model, a --model of your own)
PLAIN = {"lr": (3e-3, 1e-5), "weight_decay": (0.0, 0.0)}
SOFT = PLAIN | {"alpha": (0.0, 0.0), "temperature": (1.0, 1.0), "on_policy": (0.0, 0.0), "sft_steps": (0, 0)}
LOSSES = {  # name: (divergence of kernels.py, if any, its hyperparameters)
    "hard": (None, {"lr": (5e-4, 1e-5), "weight_decay": (1.0, 0.0)}),
    "forward_kl": ("forward_kl", SOFT),
    "reverse_kl": ("reverse_kl", SOFT),
    "jsd": ("jsd", SOFT | {"skew": (0.5, 0.5)}),
    "skew_kl": ("skew_kl", SOFT | {"skew": (0.1, 0.1)}),
    "skew_reverse_kl": ("skew_reverse_kl", SOFT | {"skew": (0.1, 0.1)}),
    "tvd": ("tvd", SOFT),
    "minillm": ("reverse_kl", PLAIN | {"alpha": (0.0, 0.0), "on_policy": (1.0, 1.0), "sft_steps": (None, 0)}),
    "sequence": (None, PLAIN),
}
HYPER = ("lr", "weight_decay", "alpha", "temperature", "skew", "on_policy", "sft_steps")


def objective(model: Transformer, projection: nn.Linear | None, batch: Batch, taught: Taught | None, n_words: int,
              args: argparse.Namespace) -> dict[str, Tensor]:  # fmt: skip
    """The terms of --loss, each with its weight and summed (not averaged) over the tokens; the loss is their sum.

    n_words: entries of the vocabulary; what a head has beyond them is padding.
    """
    kind, alpha = LOSSES[args.loss][0], args.alpha
    hidden, head, mask = model.hidden_before(batch.input_ids), head_of(model, n_words), batch.completion_mask
    terms = {}
    if alpha:
        labels = batch.input_ids.masked_fill(mask * (1 - batch.own) == 0, IGNORED)  # its own texts are no truth
        terms["hard"] = alpha * linear_cross_entropy(hidden, head, labels)
    if kind and alpha < 1:
        T = args.temperature
        terms["soft"] = (1 - alpha) * T**2 * linear_divergence(
            hidden, head, taught.targets, mask, kind=kind, skew=args.skew or 0.0, temperature=T, mixture=taught.mixture
        )  # fmt: skip
    if args.loss == "minillm":
        logps = linear_logps(hidden, head, batch.input_ids.masked_fill(batch.own == 0, IGNORED))
        terms["later"] = (1 - alpha) * later_tokens(logps, taught.logps, batch.own)
    if projection is not None:
        errors = nn.functional.mse_loss(projection(hidden), taught.targets[0][0], reduction="none").mean(-1)
        terms["hidden"] = args.hidden * errors.masked_fill(mask == 0, 0.0).sum()
    return terms


def head_of(model: Transformer, n_words: int) -> Tensor:
    """(n_words, D): the rows of the head that are compared; a slice of it would take a gradient of the whole size."""
    weight = model.head.weight
    return weight if len(weight) == n_words else weight[:n_words]


def later_tokens(logps: Tensor, teacher_logps: Tensor, own: Tensor) -> Tensor:
    """- sum over t of R_t log q(y_t), R_t the mean of log p / q over the tokens after t (MiniLLM, equations 4 and 7).

    All (B, T); `own` is 1 on what the student sampled. D at each token answers for that token alone; this is what its
    choice does to all that follows. In the paper R_t is clipped, too (equation 6: several updates a sample; here one).
    """
    gains = ((teacher_logps - logps) * own).detach()
    after, n_after = (x.flip(-1).cumsum(-1).flip(-1) - x for x in (gains, own))
    return -(after / n_after.clamp(min=1) * logps * own).sum()


@torch.no_grad()
def taught(teachers: Sequence[Transformer], batch: Batch, n_words: int, args: argparse.Namespace) -> Taught:
    """What --loss needs of the teachers: of a batch with stored probabilities nothing."""
    if batch.stored is not None:
        return Taught(batch.stored)
    targets = [(teacher.hidden_before(batch.input_ids), head_of(teacher, n_words)) for teacher in teachers]
    minillm = args.loss == "minillm"
    if not minillm and (len(teachers) == 1 or args.fusion == "mean"):
        return Taught(targets)
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, IGNORED)
    logps = torch.stack([linear_logps(hidden, head, labels) for hidden, head in targets], dim=-1)  # (B, T, K)
    if minillm:
        return Taught(targets, logps=logps.logsumexp(-1) - math.log(len(teachers)))
    return Taught(targets, fused(logps))


def fused(logps: Tensor) -> Tensor:
    """(B, T, K): all to the teacher under whom the text of the row is most probable (FuseLLM's MinCE, 2401.10491)."""
    best = logps.sum(1).argmax(-1)  # (B,)
    return nn.functional.one_hot(best, logps.shape[-1])[:, None].expand_as(logps).to(logps.dtype)


# 2. Data


class Example(NamedTuple):
    input_ids: list[int]
    completion_mask: list[int]
    n_prompt: int  # tokens that a model is given when it is to write the rest itself
    row: dict  # of --data or of the world; with an "answer" that is what a teacher's answer must come to
    stored: TopK | None = None  # (T, k)
    own: bool = False  # whether the student wrote what follows the prompt


def document(text: str, tokenizer: Tokenizer, n_prompt: int) -> Example:
    row = sft.document(text, tokenizer)
    return Example(*row, min(n_prompt, len(row.input_ids) - 1), {"text": text})


def conversation(row: dict, tokenizer: Tokenizer) -> Example:
    """All that the assistant says is learned from; a model that writes itself is given all but its last turn."""
    messages = formats.to_messages(row, "completion" if "completion" in row else "answer")
    ids, mask = chat.render(messages, tokenizer)
    prompt = chat.prompt_ids(messages[:-1], tokenizer)
    if ids[: len(prompt)] != prompt:
        raise UserError("the chat format writes a prompt otherwise once its answer is there: choose --chat-format")
    end = len(mask) - mask[::-1].index(1)  # without the line break after the turn
    return Example(ids[:end], mask[:end], len(prompt), row)


def world_row(task: str, key: Sequence, split: str, tokenizer: Tokenizer, args: argparse.Namespace) -> Example:
    """The weather of a month; a sum whose working is asked for, and its result; or numbers to sort the other way."""
    rng = world.rng_for("distill", task, *key)
    if task == "weather":
        return document(world.weather_log(rng), tokenizer, args.prompt_length)
    if task == "steps":  # without the steps: they are what a teacher has to add
        row = world.exchange("steps", rng, split)
        question, answer = row["messages"][0], f"<think></think>{world.final_answer(row['answer'])}"
        messages = [question, {"role": "assistant", "content": answer}]
        return conversation({"messages": messages, "answer": answer}, tokenizer)
    problem = world.draw_problem(world.HELD_BACK, rng, split)
    question = rng.choice(world.TEMPLATES).format(task=world.HELD_BACK.task.format(**problem))
    answer = world.HELD_BACK.solve(problem)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return conversation({"messages": messages, "answer": answer}, tokenizer)


def file_row(row: dict, tokenizer: Tokenizer, args: argparse.Namespace) -> Example:
    return document(row["text"], tokenizer, args.prompt_length) if "text" in row else conversation(row, tokenizer)


def fit(examples: Iterable[Example], what: str, args: argparse.Namespace, loop: Loop) -> list[Example]:
    """Examples of at most --max-length tokens; longer ones are refused, dropped or cut at their end.

    Where a model is to write the last turn of a row, and the cut is before it, the row is dropped.
    """
    kept, counts, written = [], Counter(), what == "rows" and (args.on_policy or args.loss == "sequence")
    for e in examples:
        if len(e.input_ids) > args.max_length:
            if args.too_long == "refuse":
                raise UserError(f"a row has {len(e.input_ids)} tokens, --max-length is {args.max_length}: raise it, or "
                                "choose --too-long drop or cut")
            done = {"drop": "dropped"}.get(args.too_long, args.too_long)
            if done == "cut" and written and e.n_prompt >= args.max_length:
                done = "dropped: the turn to be written begins beyond it"
            counts[done] += 1
            if done != "cut":
                continue
            ids, mask = (x[: args.max_length] for x in (e.input_ids, e.completion_mask))
            e = e._replace(input_ids=ids, completion_mask=mask, n_prompt=min(e.n_prompt, args.max_length - 1))
        if any(e.completion_mask):
            kept.append(e)
        else:
            counts["without a token to learn from"] += 1
    for kind, n in counts.items():
        loop.say(f"--max-length {args.max_length}: {n} {what} {kind}")
    return kept


def examples(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[Example], list[Example]]:
    """The rows to learn from, and the held-out ones."""
    if args.data:
        read = partial(formats.read_jsonl, schemas=("text", "chat", "completion", "answer"),
                       mapping=formats.parse_map(args.map), keep=bool(args.check))  # fmt: skip
        parts, held_out = formats.split(args.data.split(","), args.eval_data, read, loop.say)
        rows = sum(parts, [])
        if args.check and args.loss == "sequence" and not all(isinstance(row.get("answer"), str) for row in rows):
            raise UserError("--check: the rows of --data have no answer to compare with")
        both = ([file_row(row, tokenizer, args) for row in some] for some in (rows, held_out))
    else:
        keys = [("train", args.seed, i) for i in range(args.rows)], [("test", i) for i in range(HELD_OUT)]
        both = ([world_row(args.task, key, key[0], tokenizer, args) for key in some] for some in keys)
    rows, test = (fit(some, what, args, loop) for some, what in zip(both, ("rows", "held-out rows"), strict=True))
    if not rows or not test:
        raise UserError(f"no row is left to learn from or to measure: --max-length is {args.max_length}")
    return rows, test


def collate(examples: Sequence[Example], device: torch.device, multiple_of: int = 1, top_k: int | None = None
            ) -> Batch:  # fmt: skip
    """Rows padded on the right to the longest; no example: a row of padding, with --top-k stored zeros beside it."""
    length = max((len(e.input_ids) for e in examples), default=1)
    length = math.ceil(length / multiple_of) * multiple_of
    input_ids, completion_mask, own = torch.zeros(3, max(1, len(examples)), length, dtype=torch.long)
    for b, e in enumerate(examples):
        input_ids[b, : len(e.input_ids)] = torch.tensor(e.input_ids)
        completion_mask[b, : len(e.input_ids)] = torch.tensor(e.completion_mask)
        own[b, e.n_prompt : len(e.input_ids)] = int(e.own)
    stored = None
    if examples and examples[0].stored:
        pairs = [[nn.functional.pad(x, (0, 0, 0, length - len(x))) for x in e.stored] for e in examples]
        stored = TopK(*(torch.stack(some).to(device) for some in zip(*pairs, strict=True)))
    elif top_k and not examples:  # so that no rank asks a sharded teacher while the others do not
        ids = torch.zeros(1, length, top_k, dtype=torch.long, device=device)
        stored = TopK(ids, torch.zeros(1, length, top_k + 1, device=device))
    return Batch(input_ids.to(device), completion_mask.to(device), own.to(device), stored)


def continued(model: Transformer, tokenizer: Tokenizer, some: Sequence[Example], samples: int, temperature: float,
              key: Sequence, args: argparse.Namespace, loop: Loop) -> list[list[Example]]:  # fmt: skip
    """For each of `some`, `samples` texts that begin with its prompt and go on as `model` says; `key` seeds them."""
    check_room(model, some, args)
    prompts, texts = [e.input_ids[: e.n_prompt] for e in some], []
    with loop.autocast():
        starts = range(0, len(prompts), 256)
        for start in tqdm(starts, "writing", disable=None if len(starts) > 1 else True, leave=False):
            found = generate(
                model, prompts[start : start + 256], max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                samples=samples, temperature=temperature, vocab_size=tokenizer.vocab_size,
                seed=world.rng_for(*key, start).getrandbits(53),
            )  # fmt: skip
            texts += found.completions
    owners = [e for e in some for _ in range(samples)]
    new = [e._replace(input_ids=e.input_ids[: e.n_prompt] + ids, stored=None,
                      completion_mask=e.completion_mask[: e.n_prompt] + [1] * len(ids))
           for e, ids in zip(owners, texts, strict=True)]  # fmt: skip
    return [new[i : i + samples] for i in range(0, len(new), samples)]


def check_room(model: Transformer, some: Sequence[Example], args: argparse.Namespace) -> None:
    """UserError if a prompt leaves no room for --max-new-tokens tokens of `model`."""
    room = model.context - max((e.n_prompt for e in some), default=0)
    if room < args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the longest prompt leaves room for {room}")


def teacher_written(teacher: Transformer, tokenizer: Tokenizer, rows: list[Example], args: argparse.Namespace,
                    loop: Loop) -> list[Example]:  # fmt: skip
    """--loss sequence: --samples texts of the teacher for each row (of 1 the greedy one), different ones.

    With --check only those that end by themselves and whose result is right.
    """
    temperature = 0.0 if args.samples == 1 else 1.0
    texts = continued(teacher, tokenizer, rows, args.samples, temperature, ("teacher", args.seed), args, loop)
    if args.check:
        n, texts = sum(map(len, texts)), [[e for e in some if is_right(e, tokenizer, args)] for some in texts]
        loop.say(f"--check {args.check}: {sum(map(len, texts))} of {n} texts of the teacher are right")
    found = [e for some in texts for e in {tuple(e.input_ids): e for e in some}.values()]
    loop.say(f"--loss sequence: {len(found)} different texts of the teacher in place of {len(rows)} rows")
    if not found:
        raise UserError(f"no text of the teacher passes --check {args.check}")
    return found


def is_right(e: Example, tokenizer: Tokenizer, args: argparse.Namespace) -> bool:
    """Whether what follows the prompt of `e` ends by itself and comes to the answer of its row, by --check."""
    said = e.input_ids[e.n_prompt :]
    row = e.row | {"answer": world.final_answer(e.row["answer"])}
    asked, rule = formats.to_messages(e.row, "answer")[-2]["content"], checkers.load_reward(args.check)
    return said[-1] in tokenizer.eos_ids and rule(asked, chat.completion_text(said, tokenizer), row) >= 1


def with_top_k(teachers: Sequence[Transformer], rows: list[Example], n_words: int, args: argparse.Namespace, loop: Loop
               ) -> list[Example]:  # fmt: skip
    """Each row with the --top-k probabilities of the teachers at all its tokens: no step asks them again."""
    found = []
    for start in tqdm(range(0, len(rows), args.micro_batch_size), "storing", disable=None, leave=False):
        some = rows[start : start + args.micro_batch_size]
        with loop.autocast():
            said = taught(teachers, collate(some, loop.device, 64 if loop.compiled else 1), n_words, args)
            best = linear_top_k(said.targets, args.top_k, temperature=args.temperature, mixture=said.mixture)
        for i, e in enumerate(some):
            found.append(e._replace(stored=TopK(*(x[i, : len(e.input_ids)].cpu() for x in best))))
    return found


def partly_own(model: Transformer, tokenizer: Tokenizer, groups: list[list[Example]], indices: list[list[int]],
               step: int, args: argparse.Namespace, loop: Loop) -> list[list[Example]]:  # fmt: skip
    """The rows of a step, about a share --on-policy of them as the student writes them now.

    The chance of a row depends on the step and the row, not on how a batch is split.
    """
    own = [[world.rng_for("on-policy", args.seed, step, i).random() < args.on_policy for i in some] for some in indices]
    chosen = [e for some, mine in zip(groups, own, strict=True) for e, is_own in zip(some, mine, strict=True) if is_own]
    if not chosen:
        return groups
    key = ("student", args.seed, step, loop.rank)
    texts = iter(continued(model, tokenizer, chosen, 1, 1.0, key, args, loop))
    return [[next(texts)[0]._replace(own=True) if is_own else e for e, is_own in zip(some, mine, strict=True)]
            for some, mine in zip(groups, own, strict=True)]  # fmt: skip


# The measurement


@torch.no_grad()
def evaluate(model: Transformer, teachers: Sequence[Transformer], tokenizer: Tokenizer, test: list[Example],
             n_words: int, args: argparse.Namespace, loop: Loop) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out row}; the mean of the first is what the run is judged by.

    Of several teachers KL is from their mean, whatever --fusion says. Sums over a row are divided by the mean number of
    bytes or tokens, so that their mean is that of all bytes, tokens.
    """
    training = model.training
    model.eval()
    found: dict[str, list[float]] = {}
    if not args.data and args.task != "weather":
        answers = continued(model, tokenizer, test, 1, 0.0, ("test",), args, loop)
        judged = argparse.Namespace(check="exact")
        found["exact match"] = [float(is_right(e, tokenizer, judged)) for (e,) in answers]
    bits, kls = [], []
    for some in batches_of(test, args):
        batch = collate(some, loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            logps = token_logps(model, batch.input_ids)
        bits += (-(logps * batch.completion_mask).sum(-1) / math.log(2)).tolist()
        kls += divergences("forward_kl", model, teachers, batch, len(some), n_words, loop) if teachers else []
    n_bytes = statistics.fmean(n_bytes_of(e, tokenizer) for e in test)
    found["bits per byte"] = [b / n_bytes for b in bits]
    if teachers:
        n_tokens = statistics.fmean(sum(e.completion_mask) for e in test)
        found["KL"] = [x / n_tokens for x in kls]
    if teachers and not args.data and args.task == "weather":
        own = [e._replace(completion_mask=[0] * e.n_prompt + e.completion_mask[e.n_prompt :])  # what it wrote itself
               for (e,) in continued(model, tokenizer, test, 1, 1.0, ("test",), args, loop)]  # fmt: skip
        n_tokens, kls = statistics.fmean(sum(e.completion_mask) for e in own), []
        for some in batches_of(own, args):
            batch = collate(some, loop.device, 64 if loop.compiled else 1)
            kls += divergences("reverse_kl", model, teachers, batch, len(some), n_words, loop)
        found["reverse KL"] = [x / n_tokens for x in kls]
    model.train(training)
    return found


def batches_of(rows: list[Example], args: argparse.Namespace) -> Iterable[list[Example]]:
    starts = tqdm(range(0, len(rows), args.micro_batch_size), "measuring", disable=None, leave=False)
    return (rows[start : start + args.micro_batch_size] for start in starts)


def divergences(kind: str, model: Transformer, teachers: Sequence[Transformer], batch: Batch, n: int, n_words: int,
                loop: Loop) -> list[float]:  # fmt: skip
    """The sum over the tokens of each of the first n rows, at temperature 1."""
    with loop.autocast():
        hidden, head = model.hidden_before(batch.input_ids), head_of(model, n_words)
        targets = [(teacher.hidden_before(batch.input_ids), head_of(teacher, n_words)) for teacher in teachers]
        return [linear_divergence(hidden[i], head, [(h[i], w) for h, w in targets], batch.completion_mask[i],
                                  kind=kind).item() for i in range(n)]  # fmt: skip


def n_bytes_of(e: Example | chat.Row, tokenizer: Tokenizer) -> int:
    """Of the text that is learned from; the tokens that end it have none."""
    ids = [i for i, trained in zip(e.input_ids, e.completion_mask, strict=True) if trained]
    return len(tokenizer.decode(ids, skip_special=True).encode())


# 3. Config

WORLD = {  # --task: the defaults of its flags
    "weather": {"rows": 24, "steps": 800, "depth": 1, "batch_size": 16, "samples": 8},
    "steps": {"rows": 1000, "steps": 800, "depth": 2, "batch_size": 32, "samples": 1, "check": "exact", "lr": 4e-3,
              "weight_decay": 0.0},
    "rank": {"rows": 2000, "steps": 800, "depth": 1, "batch_size": 32, "samples": 1, "lr": 4e-3,
             "weight_decay": 0.0},
}  # fmt: skip
HARD_STEPS = {"weather": 300}  # of hard labels, which are learned by heart later
HELD_OUT = 200  # rows of the generated world
OF_WEAK = {"rows": 500, "steps": 250}  # in --weak-to-strong of the small model, which is to make mistakes
OF_STRONG = {"rows": 500, "steps": 150, "lr": 5e-4}  # of the large one
DEFAULTS = {  # flag: (the generated world), (--data)
    "depth": (1, 4),
    "batch_size": (16, 16),
    "samples": (1, 4),
    "micro_batch_size": (32, 4),
    "max_length": (128, 1024),
    "max_new_tokens": (64, 256),
    "warmup": (20, 20),
}
MAIN_LOSSES = ("hard", "forward_kl", "reverse_kl", "jsd", "skew_kl")  # which --loss all runs with --seeds seeds
TABLE = (*LOSSES, "hard:lr=0.003,weight_decay=0", "forward_kl:alpha=0.5", "forward_kl:temperature=2",
         "forward_kl:top_k=4", "forward_kl:hidden=1", "forward_kl:on_policy=0.5", "jsd:on_policy=0.5",
         "reverse_kl:on_policy=1")  # fmt: skip
COLUMNS = ("bits per byte", "KL", "reverse KL")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--depth", "--steps", "--epochs", "--batch-size", "--micro-batch-size",
               "--lr", "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume"),
        defaults=told(DEFAULTS, ("", "with --data")) | dict.fromkeys(("lr", "weight_decay", "steps"))
        | {"epochs": {"with --data": 1.0}, "schedule": "cosine", "grad_clip": 1.0},
    )
    cli.add_argument("--loss", default="forward_kl", metavar="NAME", help="one of " + ", ".join(LOSSES) + ", also with "
                     "other values (jsd:skew=0.1,on_policy=1), or all: a table (default: %(default)s)")  # fmt: skip
    cli.add_argument("--teacher", metavar="DIR[,DIR...]", help="who teaches (default: the tiny base model, of --task "
                     "steps the chat model)")  # fmt: skip
    cli.add_argument("--width", type=COUNT, default=64, help="of a new student, a multiple of 32 (default: 64)")
    cli.add_argument("--task", choices=tuple(WORLD), default="weather", help="of the generated world: texts of known "
                     "entropy, sums, or numbers to sort from large to small (default: %(default)s)")  # fmt: skip
    cli.add_argument("--rows", type=COUNT, help="of the generated world to learn from (weather: 24)")
    cli.add_argument("--alpha", type=REAL, help="weight of the text itself, 1 - alpha that of the teacher")
    cli.add_argument("--temperature", type=REAL, help="of both distributions in D, which is multiplied by its square")
    cli.add_argument("--skew", type=REAL, help="the b of jsd, the a of skew_kl and skew_reverse_kl, between 0 and 1")
    cli.add_argument("--on-policy", type=REAL, metavar="SHARE", help="of the rows that the student writes itself")
    cli.add_argument("--sft-steps", type=WHOLE, metavar="STEPS", help="on the text alone at first, so that a student "
                     "can write (default: minillm of the generated world a quarter of --steps; else 0)")  # fmt: skip
    cli.add_argument("--hidden", type=REAL, default=0.0, metavar="WEIGHT", help="of the distance of the states before "
                     "the head")  # fmt: skip
    cli.add_argument("--top-k", type=COUNT, metavar="K", help="store K probabilities a token: no step asks the "
                     "teacher again")  # fmt: skip
    cli.add_argument("--fusion", choices=("mean", "min_ce"), default="mean", help="of several teachers: the mean, or "
                     "for each row the one that expects it most")  # fmt: skip
    cli.add_argument("--samples", type=COUNT, help="sequence: texts of the teacher a row; 1: its greedy one")
    cli.add_argument("--check", metavar="RULE", help="sequence: keep the teacher's texts that this rule of "
                     "data/checkers.py finds right (--task steps: exact)")  # fmt: skip
    cli.add_argument("--prompt-length", type=COUNT, default=2, help="tokens of a plain text that are given where a "
                     "model writes the rest (default: %(default)s)")  # fmt: skip
    cli.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="of the generated world: "
                     "train the same student on hard labels, too")  # fmt: skip
    cli.add_argument("--weak-to-strong", action="store_true", help="a small model teaches the large one --task rank")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut"), default="refuse",
                     help="rows of more than --max-length tokens (default: %(default)s)")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_LOSSES)} in --loss all")
    args = cli.parse_args(argv)
    if args.loss == "all" and (args.data or args.task != "weather" or "," in (args.teacher or "")):
        raise UserError("--loss all makes a table of the generated world's weather: it takes no --data, no other "
                        "--task and one --teacher")
    own = (name for name in ("data", "model", "teacher", "steps", "rows", "loss", "task")
           if getattr(args, name) not in (cli.get_default(name), "rank"))  # fmt: skip
    if args.weak_to_strong and (name := next(own, None)):
        raise UserError(f"--weak-to-strong has models, rows, steps and losses of its own: it takes no --{name}")
    return args if args.loss == "all" or args.weak_to_strong else resolved(args)


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults of its --task and --loss; UserError for flags that do not go together."""
    name, _, changes = args.loss.partition(":")
    if name not in LOSSES:
        raise UserError(f"--loss {name}: there are {', '.join(LOSSES)} and all")
    for key, value in formats.parse_map(changes.split(",") if changes else []).items():
        if key not in (*HYPER, "hidden", "top_k"):
            raise UserError(f"--loss {args.loss}: {key} is not one of {', '.join(HYPER)}, hidden, top_k")
        try:
            setattr(args, key, {"top_k": COUNT, "sft_steps": WHOLE}.get(key, REAL)(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--loss {args.loss}: {key}: {error}") from None
    args.loss = name
    asked, weather = (args.check, args.epochs), not args.data and args.task == "weather"
    if not args.data and name == "hard":
        fill(args, {"steps": (HARD_STEPS.get(args.task),)}, 0)
    if not args.data:
        fill(args, {key: (value,) for key, value in WORLD[args.task].items() if not (key == "lr" and args.model)}, 0)
    fill(args, DEFAULTS, args.data is not None)
    if args.data:
        fill(args, {"epochs": (1.0,)}, 0)
    kind, defaults = LOSSES[name]
    for key in HYPER:
        if getattr(args, key) is None and key in defaults:
            setattr(args, key, defaults[key][(args.model if key == "lr" else args.data) is not None])
        elif getattr(args, key) is not None and key not in defaults:
            raise UserError(f"--{key.replace('_', '-')}: --loss {name} has none")
    args.alpha = 1.0 if kind is None else args.alpha
    args.temperature = args.temperature if "temperature" in defaults else 1.0
    if name == "minillm" and args.sft_steps is None:
        args.sft_steps = args.steps // 4  # of the world: from random weights a policy gradient finds nothing
    args.on_policy, args.sft_steps = args.on_policy or 0.0, args.sft_steps or 0
    if args.check:
        checkers.load_reward(args.check)
    for is_wrong, text in (
        (asked[0] and (name != "sequence" or weather),
         "--check: of answers that a teacher writes, --loss sequence; of the weather there are none"),
        (asked[1] and not args.data, "--epochs counts passes over --data: texts of the world come by --steps"),
        (args.alpha > 1, "--alpha: expected a number of at most 1"),
        (args.on_policy > 1, "--on-policy: expected a share of at most 1"),
        (args.temperature == 0, "--temperature: expected a number above 0"),
        (args.skew is not None and not 0 < args.skew < 1, "--skew: expected a number between 0 and 1, neither of them"),
        (args.hidden and kind is None, f"--hidden: --loss {name} has no teacher at hand"),
        (args.top_k and kind is None, f"--top-k: --loss {name} has no use for probabilities"),
        (args.top_k and (args.on_policy or args.hidden or name == "minillm"),
         "--top-k: no step asks the teacher again, and so no --on-policy, minillm or --hidden"),
        (args.width % 32, "--width: expected a multiple of 32"),
        (args.hidden and args.parallel == "fsdp", "--hidden: the projection is not sharded, no --parallel fsdp"),
        (args.on_policy and args.parallel == "fsdp",
         "--on-policy: each rank samples rows of its own, no --parallel fsdp"),
        ((args.hidden or name == "sequence") and "," in (args.teacher or ""),
         "--loss sequence and --hidden have one teacher: its texts, its states"),
        (args.fusion == "min_ce" and name == "minillm", "--fusion min_ce chooses by the text: not with --loss minillm"),
    ):
        if is_wrong:
            raise UserError(text)
    return args


def new_student(tokenizer: Tokenizer, args: argparse.Namespace) -> Transformer:
    """Random weights: --depth blocks of --width, the feed-forward twice as wide; a context of 512 or --max-length."""
    like = Config.from_depth(args.width // 32, tokenizer.vocab_size, max(512, args.max_length))
    return Transformer(replace(like, depth=args.depth, ffn_width=2 * args.width))


def load_teachers(args: argparse.Namespace, tokenizer: Tokenizer | None, loop: Loop
                  ) -> tuple[list[Transformer], Tokenizer]:  # fmt: skip
    """The models of --teacher, frozen, in --dtype, and their tokenizer; UserError if any two vocabularies differ."""
    if args.data and not args.teacher:
        raise UserError("--teacher: which model teaches the rows of --data?")
    folders = args.teacher.split(",") if args.teacher else [loop.require("base" if args.task == "weather" else "sft")]
    teachers = []
    for folder in folders:
        teacher, theirs = load(folder, with_tokenizer=True)
        tokenizer = tokenizer or theirs
        if odd := first_difference(tokenizer, theirs):
            raise UserError(f"{folder}: not the vocabulary of the student: {odd}")
        teacher.to(loop.device).eval().requires_grad_(False)
        loop.check_length(teacher)
        loop.narrow(teacher)
        teachers.append(loop.shard(teacher))
    return teachers, tokenizer


def first_difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    """Where two vocabularies differ, in words; '' if nowhere."""
    a, b = ({i: (text, False) for i, text in t.token_bytes.items()}
            | {i: (name.encode(), True) for name, i in t.special_tokens.items()} for t in (ours, theirs))  # fmt: skip
    for i in sorted(a.keys() | b.keys()):
        if a.get(i) != b.get(i):
            words = ("nothing" if x is None else repr(x[0].decode(errors="replace")) for x in (b.get(i), a.get(i)))
            return "token {} is {} in it and {} there".format(i, *words)
    return ""


@torch.no_grad()
def common_words(model: Transformer, teachers: Sequence[Transformer], tokenizer: Tokenizer, test: list[Example],
                 loop: Loop) -> int:  # fmt: skip
    """The number of rows of every head that are compared: all, or where they are padded unequally the tokenizer's.

    What the teacher thinks likely beyond them is left out, and said.
    """
    sizes = {m.config.vocab_size for m in (model, *teachers)}
    if len(sizes) == 1:
        return sizes.pop()
    n, batch = tokenizer.vocab_size, collate(test[:1], loop.device)
    with loop.autocast():
        hidden = teachers[0].hidden_before(batch.input_ids)[batch.completion_mask.bool()]
        logps = teachers[0].head(hidden).float().log_softmax(-1)
    loop.say(f"heads of {', '.join(map(str, sorted(sizes)))} rows: the first {n}, which are tokens, are compared; "
             f"{logps[:, n:].exp().sum(-1).mean():.2g} of the teacher's probability is beyond them")
    return n


def gap_closed(value: float, hard: float, teacher: float) -> float:
    """The share of the way from hard labels to the teacher; 1 is as good as the teacher.

    >>> gap_closed(0.5, 0.6, 0.4)
    0.5
    """
    return (value - hard) / (teacher - hard) + 0.0  # which makes 0 of -0


def conclude(teachers: Sequence[Transformer], tokenizer: Tokenizer, test: list[Example], n_words: int,
             before: dict[str, list[float]], after: dict[str, list[float]], args: argparse.Namespace, loop: Loop
             ) -> dict:  # fmt: skip
    """Measure what the student must beat and what it cannot, write result.json."""
    metric, baselines, hard, best = next(iter(after)), {}, None, max if "exact match" in after else min
    if args.baseline and args.loss != "hard" and teachers and not args.data and not args.model:
        loop.say("\nthe same student on hard labels:")
        changes = {"loss": "hard", "out": loop.out / "hard", "resume": False, "hidden": 0.0, "check": None}
        changes |= dict.fromkeys((*HYPER, "top_k")) | {"steps": min(args.steps, HARD_STEPS.get(args.task, args.steps))}
        hard = main(resolved(argparse.Namespace(**vars(args) | changes)))["after"]
        baselines["the same student on hard labels"] = hard
    if teachers:
        found = (evaluate(teacher, (), tokenizer, test, n_words, args, loop)[metric] for teacher in teachers)
        limit = best(map(statistics.fmean, found))
        baselines["the teacher" if len(teachers) == 1 else "the best teacher"] = limit
    if args.task == "weather" and not args.data:
        texts = [e.row["text"] for e in test]
        if texts == [tokenizer.decode(e.input_ids, skip_special=True) for e in test]:  # none was cut
            bits = sum(map(world.code_length, texts))  # no model can do better on average
            baselines["entropy of the text"] = bits / sum(n_bytes_of(e, tokenizer) for e in test)
    result = loop.finish(before, after, variant=args.loss, baselines=baselines,
                         higher_is_better=best is max)  # fmt: skip
    if hard is not None:
        share = gap_closed(result["after"], hard, limit) if best(hard, limit) == limit != hard else None
        loop.say("hard labels alone are as good as the teacher: there is no gap to close" if share is None else
                 f"{share:.0%} of the gap between hard labels and the teacher is closed")
    return result


def weak_to_strong(args: argparse.Namespace) -> dict:
    """A small model learns the task from the truth, the large one from what the small one says (2312.09390).

    Gap recovered = (strong - weak) / (ceiling - weak), the ceiling being the large one that learns from the truth.
    """
    home = Path(args.out or ROOT / "out" / "distill-weak-to-strong")
    loop = Loop(argparse.Namespace(**vars(args) | {"out": home, "resume": False}), "distill")  # each run has its own
    strong = loop.require("sft")
    of_strong = {"model": str(strong), "seed": args.seed + 1} | OF_STRONG  # on other questions
    runs = {
        "weak": {"loss": "hard"} | OF_WEAK,
        "strong": {"loss": "sequence", "teacher": str(home / "weak")} | of_strong,
        "ceiling": {"loss": "hard"} | of_strong,
    }
    found = {}
    for name, changes in runs.items():
        loop.say(f"\n{name}:")
        run_args = {"task": "rank", "out": home / name, "baseline": False, "weak_to_strong": False,
                    "resume": args.resume and (home / name / "checkpoint").exists()} | changes  # fmt: skip
        one = resolved(argparse.Namespace(**vars(args) | run_args))
        main(one)
        model, tokenizer = load(home / name, device=loop.device, with_tokenizer=True)
        rows = examples(one, tokenizer, loop)[1]
        found[name] = evaluate(model, (), tokenizer, rows, model.config.vocab_size, one, loop)
    means = {name: statistics.fmean(values["exact match"]) for name, values in found.items()}
    gap, baselines = means["ceiling"] - means["weak"], {"ceiling: the large model on the truth": means["ceiling"]}
    if gap > 0:
        found["weak"]["gap recovered"] = [0.0]
        found["strong"]["gap recovered"] = [(means["strong"] - means["weak"]) / gap]
    else:
        loop.say("the weak model is as good as the ceiling: there is no gap to recover")
    return loop.finish(found["weak"], found["strong"], variant="weak-to-strong", baselines=baselines)


def table(args: argparse.Namespace) -> dict:
    """--loss all: every loss, and how much of the gap between the rows `hard` and `teacher` each closes."""
    home = Path(args.out or ROOT / "out" / "distill")
    args.baseline = False
    rows = compare(main, resolved, args, TABLE, home, COLUMNS, MAIN_LOSSES, start="new student")["rows"]
    first = json.loads((home / f"hard-{args.seed}" / "result.json").read_text())["baselines"]
    nothing = {"mean": 0.0, "spread": None}
    rows.insert(0, {"loss": "teacher", "seeds": 1} | {name: dict(nothing) for name in (*COLUMNS, "seconds")})
    rows[0][COLUMNS[0]]["mean"] = first["the teacher"]
    means = {row["loss"]: row[COLUMNS[0]]["mean"] for row in rows}
    for row in rows:
        gap = nothing | {"mean": gap_closed(means[row["loss"]], means["hard"], means["teacher"])}
        row |= {"gap closed": gap, "seconds": row.pop("seconds")}
    (home / "table.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return {"rows": rows}


def main(args: argparse.Namespace) -> dict:
    if args.weak_to_strong:
        return weak_to_strong(args)
    if args.loss == "all":
        return table(args)

    # 4. Setup
    loop = Loop(args, "distill")
    model, tokenizer = load(args.model, with_tokenizer=True) if args.model else (None, None)
    needs_teacher = args.loss != "hard" or not (args.data and args.model)  # or its vocabulary
    teachers, tokenizer = load_teachers(args, tokenizer, loop) if needs_teacher else ([], tokenizer)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    loop.seed(0)
    model = (model or new_student(tokenizer, args)).to(loop.device)
    loop.check_length(model)
    values = (f"{name} {value:g}" for name in (*HYPER, "hidden", "top_k") if (value := getattr(args, name)))
    loop.say(f"--loss {args.loss}: {', '.join(values)}")
    rows, test = examples(args, tokenizer, loop)
    if args.on_policy:
        check_room(model, rows, args)
    n_words = common_words(model, teachers, tokenizer, test, loop)
    if teachers:
        sizes = [sum(p.numel() for p in m.parameters()) for m in (teachers[0], model)]
        loop.say(f"a teacher of {sizes[0]:,} parameters, a student of {sizes[1]:,}: 1/{sizes[0] / sizes[1]:.1f}")
    if args.loss == "sequence":
        rows = fit(teacher_written(teachers[0], tokenizer, rows, args, loop), "texts", args, loop)
    total = args.steps if args.steps is not None else math.ceil(args.epochs * len(rows) / args.batch_size)
    if 0 < total <= args.sft_steps:
        raise UserError(f"--sft-steps {args.sft_steps}: of {total} steps none is left for --loss {args.loss}")
    projection = nn.Linear(model.config.width, teachers[0].config.width).to(loop.device) if args.hidden else None
    trained = nn.ModuleList([model, projection]) if args.hidden else model
    model = loop.shard(model)
    optimizer = adamw(trained if args.hidden else model, args.lr, args.weight_decay)
    loop.compile(model)
    extra = loop.restore(model, optimizer)
    if projection is not None and extra:
        projection.load_state_dict({name: extra[f"projection.{name}"] for name in projection.state_dict()})
    loop.describe(model)
    before = extra.get("before") or evaluate(model, teachers, tokenizer, test, n_words, args, loop)
    on_text = argparse.Namespace(**vars(args) | {"loss": "hard", "alpha": 1.0, "on_policy": 0.0})
    if args.top_k:
        if args.top_k > n_words:
            raise UserError(f"--top-k {args.top_k}: the vocabulary has {n_words} tokens")
        rows = with_top_k(teachers, rows, n_words, args, loop)

    # 5. Train
    for step in loop.steps(total):
        lr, now = set_lr(optimizer, args, step, total), on_text if step <= args.sft_steps else args
        indices = list(loop.micro_batches(len(rows), step))
        groups = [[rows[i] for i in some] for some in indices]
        if now.on_policy:
            groups = partly_own(model, tokenizer, groups, indices, step, args, loop)
        batches = [collate(some, loop.device, 64 if loop.compiled else 1, args.top_k) for some in groups]
        n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
        n_read = loop.sum_over_ranks(sum(len(e.input_ids) for some in groups for e in some))
        sums: dict[str, Tensor | float] = {}
        for batch in batches:
            with loop.autocast():
                said = taught(teachers, batch, n_words, now) if LOSSES[now.loss][0] else None
                terms = objective(model, projection if said else None, batch, said, n_words, now)
            (sum(terms.values()) / n_tokens).backward()
            sums = {name: sums.get(name, 0.0) + term.detach() / n_tokens for name, term in terms.items()}
        loop.all_reduce(trained)
        grad_norm = clip(trained, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        sums = {name: loop.sum_over_ranks(x) for name, x in sums.items()}
        loop.log(step, loss=sum(sums.values()), **sums, grad_norm=grad_norm, lr=lr, tokens=n_read)
        if args.eval_every and loop.due("eval", step) and step < total:
            name, values = next(iter(evaluate(model, teachers, tokenizer, test, n_words, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            kept = {f"projection.{name}": p for name, p in projection.state_dict().items()} if projection else {}
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra={"before": before} | kept)

    # 6. Evaluate
    after = evaluate(model, teachers, tokenizer, test, n_words, args, loop)
    return conclude(teachers, tokenizer, test, n_words, before, after, args, loop)


if __name__ == "__main__":
    run(main, get_args)
