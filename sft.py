"""Supervised fine-tuning, and the pre-training that comes before it: the same loss with another mask.

    loss = - sum_t completion_mask[t] * log pi(token t | tokens before t) / sum_t completion_mask[t]

(InstructGPT, Ouyang et al. 2022, arXiv 2203.02155, section 3.5, and FLAN, Wei et al. 2021, 2109.01652.) In a chat the
mask is 1 on what the assistant says, its ending token included. In `--stage base` nothing is masked: pre-training is
SFT with no mask. The sums run over the whole optimizer step, all micro-batches and ranks, so that a long answer counts
as many tokens as it has, however a batch is split. Rows are packed: several documents share a row of --max-length
tokens, attention stays within each document, and no document predicts the first token of the next. Some base text goes
on being read during SFT (--replay), or what was not asked about is soon forgotten (the pre-training mix of InstructGPT,
3.5).

Small options, each from its paper: noise on embeddings (NEFTune, 2310.05914), rows chosen by instruction-following
difficulty (2308.12032), the model's own right answers (`--data rollouts`: rejection-sampling fine-tuning, 2308.01825),
its own questions (`--data self-instruct`, 2212.10560), updates inside the backward pass (LOMO, 2306.09782), recomputed
activations (1604.06174). The tiny model learns in fewer steps with Muon (2502.16982). Domain adaptation (2004.10964) is
`--stage base --model DIR --data DOMAIN.jsonl`. Not here: LoRA (lora.py), distillation (distill.py).

    python sft.py                                                                   the tiny model, from nothing
    python sft.py --model DIR --data FILE.jsonl --map question=prompt answer=completion   a real model, real rows
    torchrun --nproc-per-node 8 sft.py --model DIR --data FILE.jsonl --parallel fsdp

The last lines say what changed on held-out questions: `exact match: 0.0.. before, 0.9.. after`.
"""

import argparse
import json
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import chat, checkers, formats, world
from data.formats import UserError
from data.tokenizer import Tokenizer, tiny
from kernels import IGNORED, linear_cross_entropy, whole_fp32
from loop import COUNT, REAL, Loop, adamw, clip, fill, parser, refuse_quantized, run, set_lr, told
from lora import adapt, rates_of
from model import Config, Transformer, generate, load, token_logps

# 1. The objective


def sft_loss(model: Transformer, batch: "Batch", embeddings: Tensor | None = None) -> Tensor:
    """The sum (not the mean) of -log pi over the tokens of completion_mask, a scalar.

    batch.input_ids, .completion_mask, .documents (B, T); embeddings (B, T, D) replace the tokens' own.
    """
    hidden = model.hidden_before(batch.input_ids, documents=batch.documents, embeddings=embeddings)
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, IGNORED)
    return linear_cross_entropy(hidden, model.head.weight, labels)


def neftune(embeddings: Tensor, documents: Tensor, alpha: float) -> Tensor:
    """embeddings (B, T, D) plus uniform noise in +-alpha / sqrt(L D), L tokens in the document (2310.05914, alg. 1).

    Its norm is then about alpha / sqrt(3), whatever the length.
    """
    length = (documents[:, :, None] == documents[:, None, :]).sum(-1, keepdim=True)  # (B, T, 1)
    scale = alpha / (length * embeddings.shape[-1]).sqrt()
    return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * scale


def ifd(conditional: float, direct: float) -> float:
    """Instruction-following difficulty: mean -log p(answer | question) / mean -log p(answer) (arXiv 2308.12032, eq. 3).

    Near 1: the question does not help to say the answer. Above 1 it misleads; the paper drops those rows.
    """
    return conditional / direct


class Lomo:
    """Low-memory optimization (arXiv 2306.09782): plain SGD inside the backward pass, each gradient freed at once.

    One backward pass is one step, hence no accumulation, no ranks and no clipping by the norm of all gradients.
    """

    def __init__(self, model: Transformer, lr: float):
        refuse_quantized(model)
        self.param_groups = [{"lr": lr, "params": []}]  # it has no state to save
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        p -= self.param_groups[0]["lr"] * p.grad
        p.grad = None

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict:
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state: dict) -> None: ...


@whole_fp32()
def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each (R, C) with its singular values brought near 1 (0.7 to 1.2): U V' of U S V', nearly.

    Five steps of x <- (a + b x x' + c (x x')^2) x (Newton-Schulz). A step needs no more of x than its Gram matrix x x',
    so that all the steps are taken on that, for all matrices of one short side at once, and x is touched twice.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = [m if m.shape[0] <= m.shape[1] else m.mT for m in matrices]
    wide = [m / m.norm().clamp(min=1e-7) for m in wide]
    found: list[Tensor] = [*wide]
    for side in {len(m) for m in wide}:
        some = [i for i, m in enumerate(wide) if len(m) == side]
        gram = torch.stack([wide[i] @ wide[i].mT for i in some])
        eye = torch.eye(side, device=gram.device)
        factor = eye.expand_as(gram)
        for _ in range(5):
            polynomial = torch.baddbmm(a * eye + b * gram, gram, gram, alpha=c)
            factor, gram = polynomial @ factor, polynomial @ gram @ polynomial
        for i, f in zip(some, factor, strict=True):
            found[i] = f @ wide[i]
    return [x if m.shape[0] <= m.shape[1] else x.mT for x, m in zip(found, matrices, strict=True)]


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024; the scale of 2502.16982, eq. 4) on all matrices but embeddings and heads; AdamW there.

    buffer <- 0.95 buffer + 0.05 gradient; W <- W - lr (0.2 sqrt(max(R, C)) orthogonalized(next buffer) + decay W):
    every direction of a matrix learns at the same speed, and the entries move as far as they would with AdamW. New
    weights learn in about two thirds of the steps. Projections that our model keeps in one matrix are treated as one;
    a convolution (out, in, height, width) is the matrix (out, in * height * width).
    """

    MOMENTUM = 0.95

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        groups, split = adamw(model, lr, weight_decay).param_groups, []
        matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        matrices -= {m.head.weight for m in model.modules() if isinstance(m, Transformer)}
        for group in groups:
            for orthogonal in (True, False):
                some = [p for p in group["params"] if (p in matrices) == orthogonal]
                split += [group | {"params": some, "orthogonal": orthogonal}] if some else []
        super().__init__(split, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for group in (group for group in self.param_groups if group["orthogonal"]):
            learning = [p for p in group["params"] if p.grad is not None]
            for p in learning:
                if p not in self.state:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                self.state[p]["exp_avg"].lerp_(p.grad, 1 - self.MOMENTUM)
            ahead = [p.grad.lerp(self.state[p]["exp_avg"], self.MOMENTUM).flatten(1) for p in learning]  # Nesterov
            for p, update in zip(learning, orthogonalized(ahead), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.view_as(p), alpha=group["lr"] * 0.2 * max(update.shape) ** 0.5)
                p.grad = None  # which AdamW then leaves alone
        super().step()


# 2. Data


OWN_ROWS = ("rollouts", "self-instruct")  # values of --data that are not files: rows that the model makes itself


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T): 1 on the tokens trained on
    documents: Tensor | None  # (B, T): which document of the row; None: one document a row


def document(text: str, tokenizer: Tokenizer) -> chat.Row:
    """Plain text as a row: everything is trained on but the first token, which nothing predicts."""
    ids = [*tokenizer.begin(text), tokenizer.eos_ids[0]]
    return chat.Row(ids, [0] + [1] * (len(ids) - 1))


def fit(rows: Iterable[chat.Row], max_length: int, too_long: str, counts: Counter) -> Iterator[chat.Row]:
    """Rows of at most max_length tokens: longer ones are refused, dropped, cut or split, and `counts` says how many.

    A row that is cut keeps its beginning. Its ending token is gone and so is not trained on, neither is another
    in its place: the model does not learn to stop where a file was too long.
    """
    for row in rows:
        if len(row.input_ids) > max_length:
            if too_long == "refuse":
                raise UserError(f"a row has {len(row.input_ids)} tokens, --max-length is {max_length}: raise it, or "
                                "choose --too-long drop or cut")
            counts[{"drop": "dropped"}.get(too_long, too_long)] += 1
            if too_long == "drop":
                continue
        ends = range(max_length, len(row.input_ids) + max_length, max_length) if too_long == "split" else [max_length]
        for end in ends:
            part = chat.Row(row.input_ids[end - max_length : end], row.completion_mask[end - max_length : end])
            part.completion_mask[0] = 0  # nothing before it predicts it
            if any(part.completion_mask):
                yield part
            else:
                counts["without a trained token"] += 1


def fitting(rows: Iterable[chat.Row], what: str, args: argparse.Namespace, loop: Loop) -> list[chat.Row]:
    """The rows that `fit` lets through; what happened to the others is said."""
    counts: Counter = Counter()
    kept = list(fit(rows, args.max_length, args.too_long, counts))
    for kind, n in counts.items():
        loop.say(f"--max-length {args.max_length}: {n} {what} {kind}")
    return kept


def pack(rows: Iterable[chat.Row], max_length: int) -> Iterator[list[chat.Row]]:
    """Groups of rows of at most max_length tokens together: each row goes where it leaves the least room (best fit)."""
    groups: dict[int, list[list[chat.Row]]] = defaultdict(list)  # by the room they have left
    waiting = 0
    for row in rows:
        n = len(row.input_ids)
        room = min((room for room in groups if room >= n and groups[room]), default=None)
        group = groups[room].pop() if room is not None else []
        waiting += room is None
        group.append(row)
        left = (max_length if room is None else room) - n
        if left < 4:
            yield group
            waiting -= 1
        else:
            groups[left].append(group)
        if waiting > 64:  # let the fullest go, so that groups come in about the order of their rows
            fullest = min(room for room in groups if groups[room])
            yield groups[fullest].pop(0)
            waiting -= 1
    yield from (group for room in sorted(groups) for group in groups[room])


def collate(groups: Sequence[list[chat.Row]], device: torch.device, multiple_of: int = 1, with_documents: bool = False
            ) -> Batch:
    """The rows of each group one after the other, padded on the right to the longest; no group: a row of padding."""
    length = max((sum(len(row.input_ids) for row in group) for group in groups), default=1)
    length = math.ceil(length / multiple_of) * multiple_of
    input_ids, completion_mask = torch.zeros(2, max(1, len(groups)), length, dtype=torch.long)
    documents = torch.full_like(input_ids, -1)
    for b, group in enumerate(groups):
        start = 0
        for d, row in enumerate(group):
            end = start + len(row.input_ids)
            input_ids[b, start:end] = torch.tensor(row.input_ids)
            completion_mask[b, start:end] = torch.tensor(row.completion_mask)
            documents[b, start:end] = d
            start = end
    packed = with_documents or any(len(group) > 1 for group in groups)
    return Batch(input_ids.to(device), completion_mask.to(device), documents.to(device) if packed else None)


def world_rows(args: argparse.Namespace, tokenizer: Tokenizer, n_tokens: int) -> Iterator[chat.Row]:
    """Rows of the generated world, never the same twice, until they hold n_tokens."""
    count = 0
    while True:
        seed, count = args.seed * 1000 + count, count + 1
        if args.stage == "base":
            rows = (document(text, tokenizer) for text in world.base_documents(2000, seed))
        else:
            mix = {part: share * args.mix.get(part, 1.0) for part, share in world.SFT_MIX.items()}
            rows = (chat.render(row["messages"], tokenizer) for row in world.sft_rows(2000, seed, mix))
            if args.replay:
                documents = (document(text, tokenizer) for text in world.base_documents(10**9, seed))
                rows = replay(rows, documents, args.replay, random.Random(seed))
        for row in rows:
            yield row
            n_tokens -= len(row.input_ids)
            if n_tokens <= 0:
                return


def replay(rows: Iterable[chat.Row], documents: Iterator[chat.Row], share: float, rng: random.Random
           ) -> Iterator[chat.Row]:
    """`rows` with documents between them, which make up about `share` of what comes out."""
    for row in rows:
        while rng.random() < share:
            yield next(documents)
        yield row


def file_rows(args: argparse.Namespace, path: str, loop: Loop) -> tuple[list[dict], list[dict]]:
    """Rows of the JSONL files `path` ("a.jsonl,b.jsonl"), in the shares of --mix, and the held-out ones."""
    schemas = ("text",) if args.stage == "base" else ("chat", "completion")
    read = partial(formats.read_jsonl, schemas=schemas, mapping=formats.parse_map(args.map))
    train, files = [], path.split(",")
    parts, held_out = formats.split(files, args.eval_data, read, loop.say)
    for file, rows in zip(files, parts, strict=True):
        weight = args.mix.get(Path(file).name, 1.0)
        chosen = random.Random(f"{args.seed} {Path(file).name}").sample(rows, round(weight % 1 * len(rows)))
        train += rows * int(weight) + chosen
    return train, held_out


def encode(row: dict, tokenizer: Tokenizer) -> chat.Row:
    if "text" in row:
        return document(row["text"], tokenizer)
    return chat.render(formats.to_messages(row), tokenizer)


def select_by_ifd(model: Transformer, rows: list[chat.Row], args: argparse.Namespace, loop: Loop) -> list[chat.Row]:
    """The --select-share of rows of the highest instruction-following difficulty below 1.

    log p(answer) is that of the answer where only the first token stands before it (the paper: nothing does).
    """
    direct = []
    for row in rows:
        kept = [i for i, trained in enumerate(row.completion_mask) if trained]
        direct.append(chat.Row([row.input_ids[0], *(row.input_ids[i] for i in kept)], [0] + [1] * len(kept)))
    pairs = zip(row_losses(model, rows, args, loop), row_losses(model, direct, args, loop), strict=True)
    scores = [ifd(given / n, alone / n) for (given, n), (alone, _) in pairs]
    helped = [i for i, score in enumerate(scores) if score < 1]
    best = sorted(helped, key=lambda i: -scores[i])[: max(1, round(args.select_share * len(rows)))]
    if not helped:
        raise UserError("--select ifd: the question helps with the answer of no row; is --model trained at all?")
    loop.say(f"--select ifd: {len(best)} of {len(rows)} rows, scores {scores[best[-1]]:.2f} to {scores[best[0]]:.2f}; "
             f"{len(rows) - len(helped)} of 1 or more are left out")
    return [rows[i] for i in sorted(best)]


def rollouts(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> list[chat.Row]:
    """Rejection sampling (arXiv 2308.01825): sample answers to sums, keep each distinct one whose result is right.

    To a task of --prompts the right answer is a number, or else its very letters. An answer that was cut off is not
    kept, and what the assistant said before, within the task, is not trained on.
    """
    if args.prompts:
        tasks = formats.read_jsonl(args.prompts, "answer", mapping=formats.parse_map(args.map))
        tasks = [{"messages": formats.to_messages(row, "answer"), "answer": row["answer"]} for row in tasks]
    else:
        tasks = [world.exchange("sums", world.rng_for("rollouts", args.seed, i), "train") for i in range(512)]
    questions = [row["messages"][:-1] for row in tasks]
    answers = answer(model, tokenizer, questions, args, samples=args.samples, temperature=1.0, seed=args.seed,
                     whole=True)
    kept, n, n_right = [], len(tasks) * args.samples, 0
    for question, task, texts in zip(questions, tasks, answers, strict=True):
        is_number = args.prompts and checkers.last_number(task["answer"]) is not None
        is_right = checkers.number if is_number else checkers.exact
        right = [text for text in texts if is_right("", text, task)]
        n_right += len(right)
        start = len(chat.prompt_ids(question, tokenizer))
        for text in sorted(set(right)):
            ids, mask = chat.render([*question, {"role": "assistant", "content": text}], tokenizer)
            kept.append(chat.Row(ids, [0] * start + mask[start:]))
    loop.say(f"--data rollouts: {n} samples, {n_right / n:.1%} right, {len(kept)} distinct right ones to train on")
    if not kept:
        raise UserError("--data rollouts: not one sample is right; start from a model that sometimes is")
    return kept


def rouge_l(a: str, b: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004).

    >>> rouge_l("sort 3 1 2", "sort 1 2")
    0.8571428571428571
    """
    x, y = a.split(), b.split()
    longest = [0] * (len(y) + 1)  # of the words of x so far and the first j of y
    for word in x:
        before = longest[:]
        for j, other in enumerate(y, start=1):
            longest[j] = before[j - 1] + 1 if word == other else max(before[j], longest[j - 1])
    return 2 * longest[-1] / max(1, len(x) + len(y))


def self_instruct(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> list[chat.Row]:
    """Self-Instruct (arXiv 2212.10560): the model continues lists of questions; new ones are kept, and it answers them.

    New: ROUGE-L below 0.7 with every question kept so far. Written to self_instruct.jsonl, to read before trusting it.
    """
    if args.prompts:
        rows = formats.read_jsonl(args.prompts, "prompt", mapping=formats.parse_map(args.map))
        pool = [row["prompt"] for row in rows]
        if not all(isinstance(question, str) for question in pool):
            raise UserError(f"--prompts {args.prompts}: questions in one list: text is expected, not messages")
    else:
        pool = [row["messages"][0]["content"] for row in world.sft_rows(64, args.seed)]
    seeds, rng = len(pool), random.Random(args.seed)
    lists = ["".join(f"{question}\n" for question in rng.sample(pool, min(6, seeds))) for _ in range(64)]
    prompts = [tokenizer.begin(text) for text in lists]
    if (room := model.context - max(map(len, prompts))) < args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the longest list of questions leaves room for {room}")
    found = generate(
        model, prompts, max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
        samples=args.samples, seed=args.seed, vocab_size=tokenizer.vocab_size,
    )
    for ids in tqdm(found.completions, "comparing", disable=None, leave=False):
        question, end, _ = chat.completion_text(ids, tokenizer).partition("\n")
        if end and question.strip() and max(rouge_l(question, old) for old in pool) < 0.7:
            pool.append(question.strip())
    questions = [[{"role": "user", "content": question}] for question in pool[seeds:]]
    loop.say(f"--data self-instruct: {len(found.completions)} questions sampled, {len(questions)} new ones kept")
    if not questions:
        raise UserError("--data self-instruct: the model wrote no new question; it needs one that continues text well")
    answers = answer(model, tokenizer, questions, args, samples=1, temperature=0.0, seed=args.seed, whole=True)
    chats = [[*q, {"role": "assistant", "content": text}]
             for q, texts in zip(questions, answers, strict=True) for text in texts]
    loop.say(f"--data self-instruct: {len(questions) - len(chats)} of their answers are cut off and left out "
             f"(--max-new-tokens {args.max_new_tokens})")
    if not chats:
        raise UserError("--data self-instruct: the model ended no answer: raise --max-new-tokens")
    if loop.main:
        loop.out.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats)
        (loop.out / "self_instruct.jsonl").write_text("".join(lines), encoding="utf-8")
    return [chat.render(messages, tokenizer) for messages in chats]


def examples(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, loop: Loop
             ) -> tuple[Iterable[chat.Row], dict[str, list]]:
    """The rows to train on, and what `evaluate` measures: {"questions" | "cloze" | "rows": ...}."""
    if args.data not in (None, *OWN_ROWS):
        train, held_out = file_rows(args, args.data, loop)
        rows = [encode(row, tokenizer) for row in tqdm(train, "encoding", unit="row", disable=None, leave=False)]
        if args.select == "ifd":
            rows = select_by_ifd(model, fitting(rows, "rows", args, loop), args, loop)
        test = (encode(row, tokenizer) for row in held_out)
        return rows, {"rows": fitting(test, "held-out rows", args, loop)}
    cloze = [world.cloze(part, world.rng_for("cloze", part, i)) for part in (*world.SKILLS, "facts") for i in range(40)]
    if args.stage == "base":
        return world_rows(args, tokenizer, args.steps * args.batch_size * args.max_length), {"cloze": cloze}
    if args.data == "rollouts":
        sums = [world.exchange("sums", world.rng_for("test sums", i), "test") for i in range(500)]
        return rollouts(model, tokenizer, args, loop), {"questions": sums}
    if args.data == "self-instruct":
        return self_instruct(model, tokenizer, args, loop), {"questions": world.sft_test(40)}
    questions = world.sft_test(40) + [row | {"part": "unseen pairs"} for row in world.sft_test(40, unseen=True)]
    for part in ("reading", "scenes", "judge", "sums", "calculator"):  # told, not judged by
        questions += [world.exchange(part, world.rng_for("test", part, i), "test") for i in range(50)]
    rows = world_rows(args, tokenizer, args.steps * args.batch_size * args.max_length)
    return rows, {"questions": questions, "cloze": cloze}


# The measurement


def answer(model: Transformer, tokenizer: Tokenizer, chats: list[list[dict]], args: argparse.Namespace, *,
           samples: int, temperature: float, seed: int, whole: bool = False) -> list[list[str]]:
    """What the model says next in each of `chats`, `samples` times; `whole`: but for what is cut off, to train on."""
    prompts = [chat.prompt_ids(messages, tokenizer) for messages in chats]
    if (room := model.context - max(map(len, prompts))) < args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the longest question leaves room for {room}")
    texts = []
    for start in tqdm(range(0, len(prompts), 256), "answering", disable=None, leave=False):
        found = generate(
            model, prompts[start : start + 256], max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
            samples=samples, temperature=temperature, seed=seed + start, vocab_size=tokenizer.vocab_size,
        )
        texts += [chat.completion_text(completion, tokenizer) if ended or not whole else None
                  for completion, ended in zip(found.completions, found.finished.tolist(), strict=True)]
    by_chat = (texts[i : i + samples] for i in range(0, len(texts), samples))
    return [[text for text in some if text is not None] for some in by_chat]


@torch.no_grad()
def row_losses(model: Transformer, rows: list[chat.Row], args: argparse.Namespace, loop: Loop
               ) -> list[tuple[float, int]]:
    """For each row the sum of -log p over its trained tokens, and their number."""
    losses = []
    for start in tqdm(range(0, len(rows), args.micro_batch_size), "measuring", disable=None, leave=False):
        some = [[row] for row in rows[start : start + args.micro_batch_size]]
        batch = collate(some, loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            logps = token_logps(model, batch.input_ids)
        sums, counts = -(logps * batch.completion_mask).sum(-1), batch.completion_mask.sum(-1)
        losses += zip(sums.tolist(), counts.tolist(), strict=True)
    return losses


def evaluate(model: Transformer, tokenizer: Tokenizer, test: dict[str, list], args: argparse.Namespace, loop: Loop
             ) -> dict[str, list[float]]:
    """{metric: one number a test row}; the mean of the first is what the run is judged by."""
    model.eval()
    found: dict[str, list[float]] = {}
    if "rows" in test:  # sum of -log p / mean number of tokens: its mean over rows is the mean over tokens
        losses = row_losses(model, test["rows"], args, loop)
        mean_count = sum(n for _, n in losses) / len(losses)
        found["loss"] = [loss / mean_count for loss, _ in losses]
    if "questions" in test:
        chats = [row["messages"][:1] for row in test["questions"]]
        with loop.autocast():
            texts = answer(model, tokenizer, chats, args, samples=1, temperature=0.0, seed=0)
        pairs = zip(texts, test["questions"], strict=True)
        right = [float(world.is_correct(text, row["answer"])) for (text,), row in pairs]
        judged = [row["part"] in world.TEST_PARTS for row in test["questions"]]
        found["exact match"] = [r for r, counts in zip(right, judged, strict=True) if counts] or right
        for row, r in zip(test["questions"], right, strict=True):
            found.setdefault(row["part"], []).append(r)
    if "cloze" in test:
        prompts = [tokenizer.begin(row["prompt"]) for row in test["cloze"]]
        with loop.autocast():
            said = generate(model, prompts, max_new_tokens=16, eos_ids=tokenizer.eos_ids, temperature=0.0,
                            vocab_size=tokenizer.vocab_size).completions
        texts = [chat.completion_text(ids, tokenizer).split(".")[0].strip() for ids in said]
        found["cloze"] = [float(text == row["answer"]) for text, row in zip(texts, test["cloze"], strict=True)]
        if args.stage == "base":
            for row, r in zip(test["cloze"], found["cloze"], strict=True):
                found.setdefault(row["part"], []).append(r)
    model.train()
    return found


def conclude(model: Transformer, tokenizer: Tokenizer, test: dict[str, list], before: dict[str, list[float]],
             after: dict[str, list[float]], args: argparse.Namespace, loop: Loop) -> dict:
    """Measure the baseline, print three exchanges, write result.json."""
    baselines = {}
    if args.stage == "sft" and not (args.data or args.model or args.from_scratch or args.adapter):
        loop.say("\nthe same with random weights in place of the base model:")
        changes = {"from_scratch": True, "resume": False, "out": loop.out / "scratch"}
        scratch = argparse.Namespace(**vars(args) | changes)
        baselines["the same SFT of random weights"] = main(scratch)["after"]
    if "questions" in test and not args.from_scratch:
        model.eval()
        some = test["questions"][:: len(test["questions"]) // 3][:3]
        with loop.autocast():  # on all ranks: --parallel fsdp gathers weights from all
            chats = [row["messages"][:1] for row in some]
            texts = answer(model, tokenizer, chats, args, samples=1, temperature=0.0, seed=0)
        for row, (text,) in zip(some, texts, strict=True) if loop.main else ():
            print(f"\n  user       {row['messages'][0]['content']}\n  assistant  {text}")
    return loop.finish(before, after, baselines=baselines, higher_is_better=next(iter(after)) != "loss",
                       variant=args.stage if not args.data else Path(args.data).stem)  # fmt: skip


# 3. Config

KINDS = ("base", "sft", "with --model")  # of runs: a new model, SFT of the tiny model, a --model of your own
DEFAULTS = {  # flag: one for each of KINDS
    "batch_size": (8, 16, 16),
    "micro_batch_size": (8, 16, 4),
    "max_length": (128, 160, 1024),
    "optimizer": ("muon", "muon", "adamw"),
    "lr": (3e-3, 2e-3, 1e-5),
    "warmup": (50, 20, 10),
}
ADAMW_LR = (1.5e-3, 1e-3, 1e-5)  # --lr where --optimizer is not muon
WORLD_STEPS = {"base": 2400, "sft": 240}  # --steps where the rows are made as they are needed


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--depth", "--steps", "--epochs", "--batch-size", "--micro-batch-size",
               "--lr", "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS, KINDS)
        | {"steps": WORLD_STEPS, "epochs": {"with --data": 1.0}, "depth": 4, "schedule": "wsd",
           "weight_decay": {"": 0.1, "with --adapter": 0.0}, "grad_clip": 1.0, "max_new_tokens": 64},
    )
    cli.add_argument("--stage", choices=("base", "sft"), default="sft", help="base: plain text, nothing masked")
    cli.add_argument("--from-scratch", action="store_true", help="SFT of random weights, to compare with")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--mix", nargs="+", default=[], metavar="NAME=WEIGHT",
                        help="how often a part of the world, or a file of --data a.jsonl,b.jsonl, is seen (1: as is)")
    cli.add_argument("--replay", type=REAL, default=0.25, metavar="SHARE",
                        help="of base text among the chats of the generated world, so that it is not forgotten")
    cli.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True, help="several documents in a row")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut", "split"),
                        help="rows of more than --max-length tokens (default: split in --stage base, else refuse)")
    cli.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in backward: less memory")
    cli.add_argument("--optimizer", choices=("adamw", "muon", "lomo"),
                     help="lomo: SGD inside the backward (default: muon; adamw for a --model of your own, --adapter)")
    cli.add_argument("--neftune", type=REAL, default=0.0, metavar="ALPHA", help="noise on embeddings (5: paper)")
    cli.add_argument("--select", choices=("all", "ifd"), default="all", help="which rows of --data to train on")
    cli.add_argument("--select-share", type=REAL, default=0.5, metavar="SHARE", help="of the rows (with --select)")
    cli.add_argument("--samples", type=COUNT, default=8, help="answers (rollouts), questions (self-instruct) a prompt")
    cli.add_argument("--prompts", metavar="FILE",
                     help="JSONL of prompt, answer (rollouts) or of prompt (self-instruct; default: the world)")
    args = cli.parse_args(argv)
    if args.data is None and args.epochs is not None:
        raise UserError("--epochs counts passes over --data: rows of the generated world never come again")
    if args.data in OWN_ROWS and args.eval_data:
        raise UserError(f"--data {args.data} is measured on the generated world, not on --eval-data")
    fill(args, {"epochs": (1.0,)}, 0)
    no_decay = args.adapter is not None or args.optimizer == "lomo"  # an adapter's rate is high, LOMO has none
    fill(args, {"weight_decay": (0.1, 0.0)}, no_decay)
    column = 2 if args.model else 0 if args.stage == "base" else 1
    fill(args, {"optimizer": ("adamw",) * 3 if args.adapter else DEFAULTS["optimizer"]}, column)
    rates = DEFAULTS if args.optimizer == "muon" else DEFAULTS | {"lr": ADAMW_LR}
    fill(args, rates_of(rates, args.adapter), column)
    if args.steps is None and args.data is None:
        args.steps = WORLD_STEPS[args.stage]
    args.too_long = args.too_long or ("split" if args.stage == "base" else "refuse")
    known = [Path(file).name for file in args.data.split(",")] if args.data else world.SFT_MIX
    for name, weight in (mix := formats.parse_map(args.mix)).items():
        try:
            mix[name] = REAL(weight)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--mix {name}={weight}: {error}") from None
        if name not in known or (args.stage == "base" and not args.data):
            raise UserError(f"--mix {name}: there are {', '.join(known)}")
    args.mix = mix
    if not any(args.mix.get(name, 1.0) for name in known):
        raise UserError("--mix: all weights are 0, and nothing is left to train on")
    if args.optimizer == "lomo" and (args.micro_batch_size < args.batch_size or args.grad_clip or args.weight_decay):
        raise UserError("--optimizer lomo updates inside the backward pass: it needs --micro-batch-size as large as "
                        "--batch-size, and --grad-clip 0; it has no --weight-decay")
    if args.neftune and args.parallel == "fsdp":
        raise UserError("--neftune reads the embeddings outside the model, which --parallel fsdp does not allow")
    if args.optimizer == "muon" and args.parallel == "fsdp":
        raise UserError("--optimizer muon needs whole matrices, which --parallel fsdp does not keep: choose adamw")
    if args.adapter and (args.from_scratch or args.parallel == "fsdp" or args.optimizer != "adamw"):
        raise UserError("--adapter trains a small part on a frozen model: no --from-scratch, no fsdp, lomo or muon")
    if args.from_scratch and args.model:
        raise UserError("--from-scratch trains random weights and --model names others: choose one")
    if args.replay >= 1:
        raise UserError(f"--replay {args.replay}: a share of the rows below 1 is expected, or no chat is left")
    if args.select == "ifd" and args.data in (None, *OWN_ROWS):
        raise UserError("--select ifd chooses among the rows of a --data file: name one")
    return args


def main(args: argparse.Namespace) -> dict:
    # 4. Setup
    loop = Loop(args, "sft", out="base" if args.stage == "base" else None)
    if args.optimizer == "lomo" and loop.world_size > 1:
        raise UserError("--optimizer lomo updates inside the backward pass: it cannot sum gradients over ranks")
    start = args.model
    if not start and (args.stage == "base" or args.from_scratch):
        tokenizer = tiny()
        model = Transformer(Config.from_depth(args.depth, tokenizer.vocab_size, 512))
    else:
        start = start or loop.require("sft" if args.data in OWN_ROWS else "base")
        model, tokenizer = load(start, with_tokenizer=True)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    model.to(loop.device).checkpoint_activations = args.checkpoint_activations
    if args.adapter:
        adapt(model, args.adapter, start, loop)
        if model.virtual and (args.pack or args.neftune):
            raise UserError(f"--adapter {args.adapter} stands before a row, not before each document in it: --no-pack, "
                            "and no --neftune")
    loop.check_length(model)
    model.eval()  # an adapter drops nothing out of what is sampled and scored
    with loop.autocast():
        rows, test = examples(args, model, tokenizer, loop)
    model.train()
    rows = fitting(rows, "rows", args, loop)
    groups = list(pack(rows, args.max_length) if args.pack else ([row] for row in rows))
    if not groups or not any(test.values()):
        purpose = "to measure" if groups else "to train on"
        raise UserError(f"no row is left {purpose}: see --max-length (now {args.max_length}), --too-long and --mix")
    total = args.steps if args.steps is not None else math.ceil(args.epochs * len(groups) / args.batch_size)
    model = loop.shard(model)
    if args.optimizer == "lomo":
        optimizer = Lomo(model, args.lr)
    else:
        optimizer = (Muon if args.optimizer == "muon" else adamw)(model, args.lr, args.weight_decay)
    loop.compile(model)
    extra = loop.restore(model, optimizer)
    loop.describe(model)
    before = extra.get("before") or evaluate(model, tokenizer, test, args, loop)

    # 5. Train
    for step in loop.steps(total):
        lr = set_lr(optimizer, args, step, total)
        indices = list(loop.micro_batches(len(groups), step))
        batches = [collate([groups[i] for i in some], loop.device, 64 if loop.compiled else 1, args.neftune > 0)
                   for some in indices]
        n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
        n_read = loop.sum_over_ranks(sum(len(row.input_ids) for some in indices for i in some for row in groups[i]))
        loss_sum = 0.0
        for batch in batches:
            with loop.autocast():
                noisy = None
                if args.neftune:
                    noisy = neftune(model.embed(batch.input_ids), batch.documents, args.neftune)
                loss = sft_loss(model, batch, noisy) / n_tokens
            loss.backward()
            loss_sum += loss.detach()
        loop.all_reduce(model)
        grad_norm = clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        norm = {} if args.optimizer == "lomo" else {"grad_norm": grad_norm}  # its gradients are gone by now
        loop.log(step, loss=loop.sum_over_ranks(loss_sum), **norm, lr=lr, tokens=n_read)
        if args.eval_every and loop.due("eval", step) and step < total:
            name, values = next(iter(evaluate(model, tokenizer, test, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra={"before": before})

    # 6. Evaluate
    after = evaluate(model, tokenizer, test, args, loop)
    return conclude(model, tokenizer, test, before, after, args, loop)


if __name__ == "__main__":
    run(main, get_args)
