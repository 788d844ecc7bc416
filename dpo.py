"""Direct preference optimization and its family: learn from comparisons, with no reward model and no sampling.

    loss = - log sigmoid(beta * (log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)))

(Rafailov et al. 2023, arXiv 2305.18290, equation 7.) Of all policies, pi = ref * exp(reward / beta) / Z has the largest
reward - beta * KL(pi || ref). Read backwards, every policy is the best one for the reward beta * log pi / ref, and Z
cancels where two answers to one prompt are compared: the Bradley-Terry likelihood of comparisons becomes a loss of pi
itself. --loss picks a variant among the functions below, each with its paper; their defaults are in LOSSES.

    --rounds N --ref last   the policy after a round is the reference of the next (sDPO, 2403.19270)
    --online                a round learns from samples of the policy, ranked by --judge (iterative DPO, 2312.16682;
                            with --judge ai, of a --model of your own, self-rewarding, 2401.10020)
    --sft-weight W          adds -W * mean log pi(best answer) to any loss (RPO, 2404.19733)
    --credit                shows held-out answers, each token coloured by beta * log pi / ref (2404.12358)
    --eval-data world       a run on --data is measured in the generated world, like one without

Logged. `loss`: the mean over the rows of a step, before its update, with --sft-weight. `margin`: the implicit reward of
the best answer minus that of the worst; it is beta * log pi / ref, or what stands in its place (LOSSES). `accuracy`:
how often it is above 0. `chosen_reward`, `rejected_reward`: its two parts. `chosen_logps`, `rejected_logps`: sums of
log pi; both may fall while the margin grows (likelihood displacement). `grad_norm`: before clipping. `lr`, `seconds` of
training so far, and `tokens_per_second`, padding among them. Measured in the generated world, one sample at temperature
1 for each held-out request: `win rate` against a sample of the SFT model by the annotator's true utility, ties half;
`utility` itself; `KL`, the mean of log pi / ref over these samples, in nats a sequence; `length` in tokens; `skills`,
exact match on the questions of sft.py: what falls there is the alignment tax. On held-out rows of --data: `pair
accuracy` of the implicit reward, and `loss`; `length`, and `KL` where a reference is held, of one sample to each of up
to 64 of their prompts, of those that leave room for --max-new-tokens within --max-length. With --adapter the reference
is the same model, but for the adapter (lora.py). Not here: PCO, DNO, UNA.

    python dpo.py                                                         the tiny model, the annotator's comparisons
    python dpo.py --model DIR --data preferences.jsonl --precompute-ref   a real model, real rows
    torchrun --nproc-per-node 8 dpo.py --model DIR --data FILE.jsonl --parallel fsdp
    python dpo.py --loss all --seeds 3                                    a table of all losses

The last lines say how often the annotator prefers the new answers: `win rate: 0.500 before, 0.7xx after`.
"""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import chat, formats, manners, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from kernels import IGNORED, linear_logits, linear_logps
from loop import COUNT, REAL, ROOT, Loop, adamw, clip, compare, fill, parser, run, set_lr, told
from lora import adapt, rates_of
from model import Transformer, frozen, generate, load, token_logps

# 1. The objective


class Scored(NamedTuple):
    """B prompts with K answers each, best first: column 0 is the chosen, column -1 the rejected answer.

    Where K = 1 (unpaired data) an answer stands alone, and its score, 1 or 0, says whether it is good.
    """

    logps: Tensor  # (B, K): log pi(answer | prompt), the SUM over its tokens
    ref_logps: Tensor  # (B, K): the same of the reference; no gradient
    lengths: Tensor  # (B, K): tokens of the answer
    scores: Tensor  # (B, K), falling: 1, 0 for a pair; in a list the chance to be preferred to another of the list
    baseline: Tensor | None = None  # (): kto and bco, of the whole step (see step_baseline)
    kls: Tensor | None = None  # (B, K): tdpo, sum over tokens of KL(ref || pi) given the tokens before


def log_ratio(s: Scored) -> Tensor:
    """(B, K): log pi / ref of each answer; times beta it is the implicit reward."""
    return s.logps - s.ref_logps


def mean_log_ratio(s: Scored) -> Tensor:
    return log_ratio(s) / s.lengths


def sum_logps(s: Scored) -> Tensor:
    return s.logps


def mean_logps(s: Scored) -> Tensor:
    return s.logps / s.lengths


def margin(x: Tensor) -> Tensor:
    """(B, K) -> (B,): the best answer's minus the worst's."""
    return x[:, 0] - x[:, -1]


def is_good(s: Scored) -> Tensor:
    """(B, K) bool, of pairs and of answers alone."""
    return s.scores > 0


# With a reference. Each is (B,): one number a row.


def dpo(s: Scored, *, beta: float, label_smoothing: float) -> Tensor:
    """- log sigmoid(beta * margin of log pi / ref) (DPO, 2305.18290, equation 7).

    label_smoothing e > 0 is the chance that a label is wrong: (1 - e) of the loss and e of the loss with the answers
    exchanged (conservative DPO, Mitchell 2023). Least at beta * margin = log((1 - e) / e), no longer at infinity.
    """
    logits = beta * margin(log_ratio(s))
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust(s: Scored, *, beta: float, label_smoothing: float) -> Tensor:
    """((1 - e) loss - e loss with the answers exchanged) / (1 - 2 e): the mean over flipped labels is DPO's loss.

    (Robust DPO, 2403.00409, equation 12; e = label_smoothing < 1/2.)
    """
    logits = beta * margin(log_ratio(s))
    mixed = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return mixed / (1 - 2 * label_smoothing)


def ipo(s: Scored, *, beta: float) -> Tensor:
    """(margin of the mean log pi / ref a token - 1 / (2 beta))^2: one to reach, not to exceed (2310.12036, eq. 17).

    The paper writes sums; its authors take means over the tokens (huggingface/trl#1677), as is done here.
    """
    return (margin(mean_log_ratio(s)) - 1 / (2 * beta)).square()


def hinge(s: Scored, *, beta: float) -> Tensor:
    """max(0, 1 - beta * margin of log pi / ref) (SLiC-HF, 2305.10425, with the reference of RSO, 2309.06657, eq. 9)."""
    return F.relu(1 - beta * margin(log_ratio(s)))


def kto(s: Scored, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """1 - sigmoid(beta (log pi / ref - z0)) of a good answer, 1 - sigmoid(beta (z0 - log pi / ref)) of a bad one.

    (KTO, 2402.01306, equations 7 and 8, without the constant part of lambda - v.) Needs no pairs. z0 = s.baseline.
    """
    gains, losses = (torch.sigmoid(sign * beta * (log_ratio(s) - s.baseline)) for sign in (1, -1))
    good, bad = desirable_weight * (1 - gains), undesirable_weight * (1 - losses)
    return torch.where(is_good(s), good, bad).mean(-1)


def bco(s: Scored, *, beta: float) -> Tensor:
    """- log sigmoid(reward - delta) of a good answer, - log sigmoid(delta - reward) of a bad one (BCO, 2404.04656).

    reward = beta log pi / ref, delta = beta s.baseline. Needs no pairs. The bco_pair of trl leaves delta out.
    """
    rewards = beta * (log_ratio(s) - s.baseline)
    return -torch.where(is_good(s), F.logsigmoid(rewards), F.logsigmoid(-rewards)).sum(-1)


def apo_zero(s: Scored, *, beta: float) -> Tensor:
    """1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected), r = log pi / ref: one up, one down (2408.06266, eq. 7)."""
    r = log_ratio(s)
    return 1 - torch.sigmoid(beta * r[:, 0]) + torch.sigmoid(beta * r[:, -1])


def apo_down(s: Scored, *, beta: float) -> Tensor:
    """sigmoid(beta r_chosen) + 1 - sigmoid(beta margin): both down, one further (2408.06266, eq. 8).

    For chosen answers that are worse than the model's own.
    """
    r = log_ratio(s)
    return torch.sigmoid(beta * r[:, 0]) + 1 - torch.sigmoid(beta * margin(r))


def rdpo(s: Scored, *, beta: float, alpha: float) -> Tensor:
    """- log sigmoid(beta margin + alpha * (chosen length - rejected length)) (R-DPO, 2403.19159, equation 9).

    The best policy for reward - alpha * length has reward = beta log pi / ref + alpha * length: what length explains,
    pi need not. alpha > 0 shortens answers.
    """
    return -F.logsigmoid(beta * margin(log_ratio(s)) + alpha * margin(s.lengths))


def tdpo(s: Scored, *, beta: float, alpha: float) -> Tensor:
    """- log sigmoid(beta margin - alpha * beta * (KL of the rejected - KL of the chosen, no gradient)).

    (TDPO2, 2404.11999, equation 17.) KL = sum over the answer's tokens of KL(ref || pi): it holds pi near the reference
    along the rejected answer, too.
    """
    return -F.logsigmoid(beta * margin(log_ratio(s)) - alpha * beta * (s.kls[:, -1] - s.kls[:, 0].detach()))


def lipo(s: Scored, *, beta: float) -> Tensor:
    """sum over i better than j of lambda_ij * log(1 + exp(-(r_i - r_j))), r = beta log pi / ref (2402.01878).

    lambda_ij = |2^score_i - 2^score_j| * |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|: the change in DCG if i and j
    changed places; rank 1 has the largest r.
    """
    r = beta * log_ratio(s)
    discounts = 1 / torch.log(2.0 + r.argsort(descending=True).argsort().to(r))  # rank = 1 + argsort of argsort
    gains = torch.exp2(s.scores)
    weights = (pairs_of(gains) * pairs_of(discounts)).abs() * (pairs_of(s.scores) > 0)
    return -(weights * F.logsigmoid(pairs_of(r))).sum((1, 2))


def npo(s: Scored, *, beta: float) -> Tensor:
    """- 2 / beta * log sigmoid(-beta log pi / ref) of the bad answer; needs no other (NPO, 2404.05868, equation 3)."""
    return (-2 / beta * F.logsigmoid(-beta * log_ratio(s)) * ~is_good(s)).sum(-1)


def nn(s: Scored, *, beta: float, alpha: float) -> Tensor:
    """- log sigmoid(mean of beta log pi / ref over own samples - alpha log pi / ref of the bad answer).

    (Distributional dispreference, D2O, 2403.03419, equation 7; both of its references are ours.) Column -1 is the bad
    answer, the other columns are samples of the model itself: no answer that somebody calls good is needed.
    """
    r = log_ratio(s)
    return -F.logsigmoid(beta * r[:, :-1].mean(-1) - alpha * r[:, -1])


# Without a reference.


def orpo(s: Scored, *, beta: float) -> Tensor:
    """- beta log sigmoid(log odds of the chosen - log odds of the rejected), odds = p / (1 - p), p = exp(mean log pi).

    (ORPO, 2403.07691, equations 4 to 7.) Its SFT term is --sft-weight 1: the answer's mean, as in equation 2, where trl
    also counts the prompt.
    """
    m = mean_logps(s)
    return -beta * F.logsigmoid(margin(m - log1mexp(m)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 (where 1 - exp(x) cancels) and far from it (where it rounds to 1).

    At 0 it is a large number with no gradient.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    far = torch.where(near, -1.0, x)  # near 0 this branch has an infinite gradient, and 0 times that is NaN
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far)))


def simpo(s: Scored, *, beta: float, gamma: float) -> Tensor:
    """- log sigmoid(beta * margin of the mean log pi - gamma) (SimPO, 2405.14734, equation 6)."""
    return -F.logsigmoid(beta * margin(mean_logps(s)) - gamma)


def cpo(s: Scored, *, beta: float) -> Tensor:
    """- log sigmoid(beta * margin of log pi) (CPO, 2401.08417, equation 3: a uniform reference).

    Its term - log pi(chosen) is --sft-weight 1: the mean over tokens, as in the authors' code and in trl. Equation 6
    has the sum, beside which the first term would hardly count.
    """
    return -F.logsigmoid(beta * margin(s.logps))


def rrhf(s: Scored) -> Tensor:
    """sum over i better than j of max(0, p_j - p_i), p = mean log pi (RRHF, 2304.05302, equation 2)."""
    return (F.relu(-pairs_of(mean_logps(s))) * (pairs_of(s.scores) > 0)).sum((1, 2))


def pro(s: Scored) -> Tensor:
    """sum over k < K of - log(e_kk / sum over i >= k of e_ki), e_ki = exp(p_i * (score_k - score_i)), p = mean log pi.

    (PRO, 2306.17492, equations 7 and 8: a temperature 1 / (score_k - score_i); that of k itself is the least of them.)
    """
    p, loss = mean_logps(s), torch.zeros_like(s.logps[:, 0])
    for k in range(p.shape[1] - 1):
        inverse_temperatures = s.scores[:, k : k + 1] - s.scores[:, k:]  # (B, K - k); falling scores: none is negative
        inverse_temperatures[:, 0] = inverse_temperatures.amax(-1)
        loss = loss - F.log_softmax(p[:, k:] * inverse_temperatures, dim=-1)[:, 0]
    return loss


def pairs_of(x: Tensor) -> Tensor:
    """(B, K) -> (B, K, K): x_i - x_j."""
    return x[:, :, None] - x[:, None, :]


def sft(s: Scored) -> Tensor:
    """- mean log pi of the best answer, if that is a good one; --sft-weight times this is added to any loss."""
    return -mean_logps(s)[:, 0] * is_good(s)[:, 0]


# name: (function, beta times which is the implicit reward, {hyperparameter: (generated world, --data)}); of lr alone
# (the tiny model, a --model of your own)
LOSSES = {
    "dpo": (dpo, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1), "label_smoothing": (0.0, 0.0)}),
    "robust": (robust, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1), "label_smoothing": (0.1, 0.1)}),
    "ipo": (ipo, mean_log_ratio, {"lr": (2e-4, 5e-7), "beta": (1.0, 0.1)}),
    "hinge": (hinge, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1)}),
    "kto": (kto, log_ratio, {"lr": (4e-4, 5e-7), "beta": (0.5, 0.1), "desirable_weight": (1.0, 1.0),
                             "undesirable_weight": (1.0, 1.0)}),
    "bco": (bco, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1)}),
    "apo_zero": (apo_zero, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1)}),
    "apo_down": (apo_down, log_ratio, {"lr": (5e-5, 5e-7), "beta": (0.2, 0.1)}),
    "rdpo": (rdpo, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1), "alpha": (0.02, 0.01)}),
    "tdpo": (tdpo, log_ratio, {"lr": (4e-4, 5e-7), "beta": (0.2, 0.1), "alpha": (0.1, 0.5)}),
    "lipo": (lipo, log_ratio, {"lr": (2e-4, 5e-7), "beta": (0.2, 0.1)}),
    "npo": (npo, log_ratio, {"lr": (5e-5, 5e-7), "beta": (1.0, 0.1)}),
    "nn": (nn, log_ratio, {"lr": (1e-4, 5e-7), "beta": (0.2, 0.1), "alpha": (0.2, 0.1)}),
    "orpo": (orpo, mean_logps, {"lr": (4e-4, 5e-6), "beta": (4.0, 0.1), "sft_weight": (1.0, 1.0)}),
    "simpo": (simpo, mean_logps, {"lr": (2e-4, 1e-6), "beta": (2.0, 2.5), "gamma": (1.0, 1.4)}),
    "cpo": (cpo, sum_logps, {"lr": (4e-4, 1e-6), "beta": (0.1, 0.1), "sft_weight": (0.1, 1.0)}),
    "rrhf": (rrhf, mean_logps, {"lr": (2e-4, 1e-6), "sft_weight": (1.0, 1.0)}),
    "pro": (pro, mean_logps, {"lr": (2e-4, 1e-6), "sft_weight": (0.1, 0.1)}),
}  # fmt: skip
WITH_REFERENCE = (log_ratio, mean_log_ratio)
UNPAIRED = ("kto", "bco", "npo", "nn")  # may learn from answers that stand alone
OF_BAD = ("npo", "nn")  # of which these have no use for the good ones
LISTWISE = ("lipo", "rrhf", "pro", "nn")  # take any number of answers to a prompt


def objective(s: Scored, args: argparse.Namespace) -> Tensor:
    """(B,): --loss with its hyperparameters, and --sft-weight times the SFT term."""
    function, _, defaults = LOSSES[args.loss]
    hyper = {name: getattr(args, name) for name in defaults if name not in ("lr", "sft_weight")}
    return function(s, **hyper) + args.sft_weight * sft(s)


def implicit_rewards(s: Scored, args: argparse.Namespace) -> Tensor:
    """(B, K): beta (1 where a loss has none) times the score of --loss."""
    _, of_answers, _ = LOSSES[args.loss]
    return of_answers(s).detach() * (args.beta or 1.0)


def step_baseline(loss: str, parts: Sequence[Scored], loop: Loop) -> Tensor:
    """(): the baseline of kto or bco in units of log pi / ref, of the rows of a whole step on all ranks.

    kto: `parts` hold answers to other prompts, and max(0, mean log pi / ref) estimates KL(pi || ref) (2402.01306,
    section 4.1). bco: `parts` hold the rows themselves, and it lies between the means of good and bad answers, of this
    step; the paper's running mean over steps would depend on where a run was resumed.
    """
    r, good = (torch.cat([f(s).flatten() for s in parts]).detach() for f in (log_ratio, is_good))
    sums = torch.stack([r[good].sum(), r[~good].sum(), good.sum(), good.logical_not().sum()])
    up, down, n_up, n_down = loop.sum_over_ranks(sums)
    if loss == "kto":
        return ((up + down) / (n_up + n_down).clamp(min=1)).clamp(min=0)
    means = up / n_up.clamp(min=1) + down / n_down.clamp(min=1)
    return means / ((n_up > 0).float() + (n_down > 0).float()).clamp(min=1)


class Batch(NamedTuple):
    input_ids: Tensor  # (B K, T): the K answers to a prompt are rows beside each other
    completion_mask: Tensor  # (B K, T): 1 on the tokens of the answer
    scores: Tensor  # (B, K)
    ref_logps: Tensor | None  # (B, K), if they were computed before


def score(model: Transformer, ref_model: Transformer | None, batch: Batch, args: argparse.Namespace) -> Scored:
    """All answers of a batch in one forward pass; without ref_model, and none computed before, ref_logps are 0."""
    B, K = batch.scores.shape
    kls, ref_logps = None, batch.ref_logps
    if args.loss == "tdpo":
        logps, ref_logps, kls = logps_and_kls(model, ref_model, batch)
    else:
        logps = answer_logps(model, batch)
    if ref_model is not None and ref_logps is None:
        with torch.no_grad():
            ref_logps = answer_logps(ref_model, batch)
    ref_logps = torch.zeros_like(logps[: B * K]) if ref_logps is None else ref_logps
    # a rank without rows ran one row of padding: B = 0 drops it, but its gradient, 0, is there to be summed
    logps, ref_logps, lengths = (x[: B * K].view(B, K) for x in (logps, ref_logps, batch.completion_mask.sum(-1)))
    kls = None if kls is None else kls[: B * K].view(B, K)
    return Scored(logps, ref_logps, lengths, batch.scores, kls=kls)


def answer_logps(model: Transformer, batch: Batch) -> Tensor:
    """(B K,): log pi of each answer, the sum over its tokens; no head is computed for the tokens of the prompt."""
    targets = batch.input_ids.masked_fill(batch.completion_mask == 0, IGNORED)
    return linear_logps(model.hidden_before(batch.input_ids), model.head.weight, targets).sum(-1)


def logps_and_kls(model: Transformer, ref_model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(B K,) thrice: log pi and log ref of each answer, and the sum of KL(ref || pi) over its tokens.

    The logits of all these tokens are held.
    """
    kept = batch.completion_mask.bool()

    def distributions(model: Transformer) -> Tensor:  # log pi(. | tokens before) (n, V) at each of the n tokens
        return linear_logits(model.hidden_before(batch.input_ids)[kept], model.head.weight).log_softmax(-1)

    now = distributions(model)
    with torch.no_grad():
        before = distributions(ref_model)
    said = batch.input_ids[kept][:, None]
    of_tokens = now.gather(-1, said)[:, 0], before.gather(-1, said)[:, 0], (before.exp() * (before - now)).sum(-1)
    zeros = now.new_zeros(kept.shape)
    return tuple(zeros.masked_scatter(kept, x).sum(-1) for x in of_tokens)


def reference(model: Transformer, loop: Loop) -> Transformer:
    """A frozen copy; under an adapter it shares the base, and holds an adapter of its own.

    Matrices of the blocks are kept in --dtype, to which autocast rounds those of the policy at each use: the margin of
    the first step is exactly 0.
    """
    ref_model = frozen(model)
    if not model.adapter and (loop.world_size == 1 or loop.args.parallel != "fsdp"):  # else the base is kept so already
        loop.narrow(ref_model)
    return loop.shard(ref_model)


# 2. Data


class Example(NamedTuple):
    prompt: list[int]
    answers: list[chat.Row]  # the ids that follow the prompt and their mask, best answer first
    scores: list[float]
    ref_logps: list[float] | None = None


def collate(examples: Sequence[Example], device: torch.device, multiple_of: int = 1) -> Batch:
    """The answers of each example in rows beside each other, padded on the right; no example: a row of padding."""
    rows = [(e.prompt, *answer) for e in examples for answer in e.answers]
    length = max((len(prompt) + len(ids) for prompt, ids, _ in rows), default=1)
    length = math.ceil(length / multiple_of) * multiple_of
    input_ids, completion_mask = torch.zeros(2, max(1, len(rows)), length, dtype=torch.long)
    for b, (prompt, ids, mask) in enumerate(rows):
        end = len(prompt) + len(ids)
        input_ids[b, :end] = torch.tensor(prompt + ids)
        completion_mask[b, len(prompt) : end] = torch.tensor(mask)
    scores = torch.tensor([e.scores for e in examples]) if examples else torch.zeros(0, 2)
    ref_logps = torch.tensor([e.ref_logps for e in examples]) if examples and examples[0].ref_logps else None
    return Batch(*(x if x is None else x.to(device) for x in (input_ids, completion_mask, scores, ref_logps)))


def encode(prompt: str | list[dict], answers: Sequence[str | list[dict]], scores: Sequence[float], tokenizer: Tokenizer
           ) -> Example:  # fmt: skip
    """The answers share the ids of the prompt. What the assistant said within the prompt is not trained on."""
    start, rows = chat.prompt_ids(prompt, tokenizer), []
    for answer in answers:
        messages = formats.to_messages({"prompt": prompt, "completion": answer})
        ids, mask = chat.render(messages, tokenizer)
        if ids[: len(start)] != start:
            raise UserError("the chat format writes a prompt otherwise once its answer is there: choose --chat-format")
        end = len(mask) - mask[::-1].index(1)  # without the line break after the turn
        rows.append(chat.Row(ids[len(start) : end], mask[len(start) : end]))
    return Example(start, rows, list(scores))


def fit(examples: Iterable[Example], args: argparse.Namespace, counts: Counter) -> list[Example]:
    """Examples of at most --max-length tokens; dropped if an answer is then empty, or the best and the worst alike.

    --too-long cut shortens the prompt from its beginning, for all its answers alike and at most to half of
    --max-length, and only then the answers from their end. `counts` says what was cut and dropped.
    """
    kept = []
    for i, e in enumerate(examples, start=1):
        longest = max(len(answer.input_ids) for answer in e.answers)
        if len(e.prompt) + longest > args.max_length:
            if args.too_long == "refuse":
                raise UserError(f"row {i} has {len(e.prompt) + longest} tokens, --max-length is {args.max_length}: "
                                "raise it, or choose --too-long drop or cut")
            counts[f"too long: {args.too_long}"] += 1
            if args.too_long == "drop":
                continue
            prompt = e.prompt[-max(args.max_length - longest, args.max_length // 2) :]
            room = args.max_length - len(prompt)
            e = e._replace(prompt=prompt, answers=[chat.Row(ids[:room], mask[:room]) for ids, mask in e.answers])
        if not all(any(answer.completion_mask) for answer in e.answers):
            counts["with nothing left of an answer: dropped"] += 1
        elif len(e.answers) > 1 and e.answers[0] == e.answers[-1]:
            counts["with two answers that are the same: dropped"] += 1
        else:
            kept.append(e)
    return kept


def check_room(prompts: Iterable[list[int]], args: argparse.Namespace) -> None:
    """UserError if a prompt and what is sampled after it may be longer than --max-length."""
    if (longest := max(map(len, prompts))) + args.max_new_tokens > args.max_length:
        raise UserError(f"--max-length {args.max_length}: the longest prompt has {longest} tokens, and as many as "
                        f"--max-new-tokens {args.max_new_tokens} are sampled after it: raise it or lower that")


def ranked(prompt: list[int], answers: list[chat.Row], scores: list[float], args: argparse.Namespace) -> Example:
    """Answers in any order as an example: all of them, or for a pairwise loss the best and the worst."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chances = chances_to_win(scores)
    if args.loss not in LISTWISE:
        order, chances = [order[0], order[-1]], {order[0]: 1.0, order[-1]: 0.0}
    return Example(prompt, [answers[i] for i in order], [chances[i] for i in order])


def chances_to_win(scores: Sequence[float]) -> list[float]:
    """For each of a list the mean chance to be preferred to another one, by Bradley and Terry.

    >>> chances_to_win([1.0, 1.0])
    [0.5, 0.5]
    """
    return [(sum(manners.prefers_first(a, b) for b in scores) - 0.5) / (len(scores) - 1) for a in scores]


def written_rows(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Example]:
    """--pairs written: what data/manners.py wrote in various styles, labelled by its annotator."""
    rows = manners.preferences(max(1, args.steps) * args.batch_size, args.seed, "train")
    return [encode(row["prompt"], [row["chosen"], row["rejected"]], [1.0, 0.0], tokenizer) for row in rows]


def file_rows(args: argparse.Namespace, counts: Counter, path: str) -> list[dict]:
    """The rows of a JSONL file as examples; those that compare nothing are dropped and counted."""
    schemas = ("preference", "scores", "label") if args.loss in UNPAIRED else ("preference", "scores")
    rows = formats.read_jsonl(path, schemas, mapping=formats.parse_map(args.map))
    if args.loss in OF_BAD:
        bad = [row for row in rows if not row.get("label")]
        counts[f"good, which --loss {args.loss} has no use for: dropped"] += len(rows) - len(bad)
        rows = bad
    counts["with equal scores: dropped"] += sum(len(set(row.get("scores", "ab"))) == 1 for row in rows)
    rows = [row for row in rows if len(set(row.get("scores", "ab"))) > 1]
    if args.loss in LISTWISE and len({len(row.get("scores", "ab")) for row in rows}) > 1:
        raise UserError(f"{path}: --loss {args.loss} needs the same number of answers in every row")
    return rows


def from_file(row: dict, tokenizer: Tokenizer, args: argparse.Namespace) -> Example:
    if "chosen" in row:
        return encode(row["prompt"], [row["chosen"], row["rejected"]], [1.0, 0.0], tokenizer)
    if "label" in row:
        return encode(row["prompt"], [row["completion"]], [float(row["label"])], tokenizer)
    return ranked(*encode(row["prompt"], row["completions"], row["scores"], tokenizer)[:3], args)


def examples(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, loop: Loop
             ) -> tuple[list, dict[str, list]]:  # fmt: skip
    """The rows to train on (with --online their prompts), and what `evaluate` measures."""
    counts, of_test, test = Counter(), Counter(), {}
    if args.data:
        read = partial(file_rows, args, counts)
        if args.eval_data == "world":
            rows = read(args.data)
        else:
            (rows,), held_out = formats.split([args.data], args.eval_data, read, loop.say)
            test["pairs"] = fit((from_file(row, tokenizer, args) for row in held_out), args, of_test)
        bar = tqdm(rows, "encoding", unit="row", disable=None, leave=False)
        rows = fit((from_file(row, tokenizer, args) for row in bar), args, counts)
    if not args.data or args.eval_data == "world":
        requests = [manners.draw_request(world.rng_for("dpo test", i), "test") for i in range(REQUESTS)]
        test = {"requests": [(chat.prompt_ids(row["prompt"], tokenizer), row) for row in requests]}
        test["skills"] = world.sft_test(40)
    if not args.data and args.pairs == "sampled":
        requests = [manners.draw_request(world.rng_for("dpo", args.seed, i), "train")
                    for i in range(max(1, args.steps) * args.batch_size)]  # fmt: skip
        prompts = [(chat.prompt_ids(row["prompt"], tokenizer), row) for row in requests]
        check_room((ids for ids, _ in prompts), args)
        return (prompts if args.online else sampled_rows(model, tokenizer, prompts, args, loop)), test
    if not args.data:
        rows = fit(written_rows(args, tokenizer), args, counts)
    said = [*((f"rows {kind}", n) for kind, n in counts.items()),
            *((f"measured rows {kind}", n) for kind, n in of_test.items())]  # fmt: skip
    for kind, n in said:
        if n:
            loop.say(f"{n} {kind}")
    if not rows or not all(test.values()):
        raise UserError(f"no row is left to train on or to measure: --max-length is {args.max_length}")
    if "pairs" in test:
        asked = [list(ids) for ids in dict.fromkeys(tuple(e.prompt) for e in test["pairs"])]
        asked = [ids for ids in asked if len(ids) + args.max_new_tokens <= args.max_length][:PROMPTS]
        test |= {"prompts": asked} if asked else {}
    if args.online:
        check_room((e.prompt for e in rows), args)
        return [(e.prompt, {}) for e in rows], test
    if args.loss == "nn":
        check_room((e.prompt for e in rows + test.get("pairs", [])), args)
        rows = with_own_answers(rows, model, tokenizer, args, loop)
        if "pairs" in test:
            test["pairs"] = with_own_answers(test["pairs"], model, tokenizer, args, loop)
    return rows, test


def of_other_prompts(rows: Sequence[Example], max_length: int) -> list[Example]:
    """Each prompt with the answers to the next other prompt, good and bad, for kto; [] if all prompts are the same.

    The next of all rows, not of the batch as in the paper: so a batch of one row has such answers, too.
    """
    n, found = len(rows), []
    for i, e in enumerate(rows):
        other = next((x for j in range(1, n) if (x := rows[(i + j) % n]).prompt != e.prompt), None)
        if other:
            room = max(1, max_length - len(e.prompt))
            answers = [chat.Row(ids[:room], mask[:room]) for ids, mask in other.answers]
            found.append(Example(e.prompt, answers, [0.0] * len(answers)))
    return found


def with_own_answers(rows: list[Example], model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop
                     ) -> list[Example]:  # fmt: skip
    """For nn: --answers - 1 samples of the model itself, then the bad answer."""
    own = sampled(model, tokenizer, [e.prompt for e in rows], args.answers - 1, 1.0, args.seed + 4, args, loop)
    scores = [1.0] * (args.answers - 1) + [0.0]
    return [Example(e.prompt, [*mine, e.answers[-1]], scores) for e, mine in zip(rows, own, strict=True)]


def sampled_rows(model: Transformer, tokenizer: Tokenizer, prompts: list[tuple[list[int], dict]],
                 args: argparse.Namespace, loop: Loop) -> list[Example]:  # fmt: skip
    """--answers samples of the model to each prompt, ranked by --judge; left out where all are the same."""
    found = sampled(model, tokenizer, [ids for ids, _ in prompts], args.answers, 1.0, 10 + Loop.step, args, loop)
    scores = judged(model, tokenizer, prompts, found, args, loop)
    rows = [ranked(ids, some, row, args) for (ids, _), some, row in zip(prompts, found, scores, strict=True)]
    rows = [e for e, row in zip(rows, scores, strict=True) if e.answers[0] != e.answers[-1] and len(set(row)) > 1]
    loop.say(f"{args.answers} answers sampled to each of {len(prompts)} prompts, told apart by --judge in {len(rows)}")
    if not rows:
        raise UserError("no prompt has two different answers of the model that --judge tells apart")
    return rows


def rows_of_round(i: int, rows: list, others: list[Example], kept: list[Example], model: Transformer,
                  tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop
                  ) -> tuple[list[Example], list[Example]]:  # fmt: skip
    """The rows of round i, and for kto answers to other prompts; --online samples the rows that are not `kept`."""
    mine = rows[i :: args.rounds]
    if not args.online:
        return mine, others[i :: args.rounds]
    mine = kept or sampled_rows(model, tokenizer, mine, args, loop)
    return mine, of_other_prompts(mine, args.max_length) if args.loss == "kto" else []


def judged(model: Transformer, tokenizer: Tokenizer, prompts: list[tuple[list[int], dict]],
           answers: list[list[chat.Row]], args: argparse.Namespace, loop: Loop) -> list[list[float]]:  # fmt: skip
    """The score of each answer by --judge: the annotator, a chat model's opinion (ai) or a reward model.

    The annotator's is its utility plus Gumbel noise: of two answers, one then comes first with the chance of its coin.
    """
    if args.judge == "annotator":
        rng = world.rng_for("coin", args.seed, Loop.step)
        return [[u - math.log(-math.log(1 - rng.random())) for u in row]
                for row in utilities(tokenizer, prompts, answers)]  # fmt: skip
    import reward  # a sibling, which only these two judges need

    if args.judge == "ai":
        texts = [[chat.completion_text(ids, tokenizer) for ids, _ in some] for some in answers]
        rules = reward.CONSTITUTION
        judge = reward.judge_of(model, args, loop)
        said = reward.opinions(judge, tokenizer, [text for some in texts for text in some], rules, args, loop)
        return [[reward.worth(said[text], rules) for text in some] for some in texts]
    path = loop.require("reward") if args.judge == "reward" else args.judge
    judge, found = reward.load_reward_model(path, tokenizer, loop.device), []
    if (room := judge.context - max(len(ids) for ids, _ in prompts)) < args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the longest prompt leaves --judge room for {room}")
    for (ids, _), some in zip(prompts, answers, strict=True):
        batch = collate([Example(ids, some, [0.0] * len(some))], loop.device, 64 if loop.compiled else 1)
        with torch.no_grad(), loop.autocast():
            found.append(reward.rewards_of(judge, batch.input_ids, batch.completion_mask).tolist())
    return found


def utilities(tokenizer: Tokenizer, prompts: list[tuple[list[int], dict]], answers: list[list[chat.Row]]
              ) -> list[list[float]]:  # fmt: skip
    """The annotator's true utility of each answer."""
    return [[manners.utility(chat.completion_text(ids, tokenizer), row["asker"], row["name"]) for ids, _ in some]
            for (_, row), some in zip(prompts, answers, strict=True)]  # fmt: skip


# The measurement


def sampled(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], samples: int, temperature: float,
            seed: int, args: argparse.Namespace, loop: Loop) -> list[list[chat.Row]]:  # fmt: skip
    """`samples` answers of the model to each prompt."""
    rows = []
    if (room := model.context - max(map(len, prompts))) < args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the longest prompt leaves room for {room}")
    with loop.autocast():
        for start in tqdm(range(0, len(prompts), 256), "answering", disable=None, leave=False):
            found = generate(
                model, prompts[start : start + 256], max_new_tokens=args.max_new_tokens, eos_ids=tokenizer.eos_ids,
                samples=samples, temperature=temperature, seed=10**6 * seed + start, vocab_size=tokenizer.vocab_size,
                rollout_batch=args.rollout_batch,
            )  # fmt: skip
            rows += [chat.Row(ids, [1] * len(ids)) for ids in found.completions]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


@torch.no_grad()
def scored(model: Transformer, ref_model: Transformer | None, groups: Iterable[Sequence[Example]],
           args: argparse.Namespace, loop: Loop) -> list[Scored]:  # fmt: skip
    """`score` of each group of examples, without a gradient."""
    found = []
    for some in groups:
        with loop.autocast():
            found.append(score(model, ref_model, collate(some, loop.device, 64 if loop.compiled else 1), args))
    return found


def in_groups(rows: Sequence[Example], size: int) -> Iterable[Sequence[Example]]:
    starts = tqdm(range(0, len(rows), size), "scoring", disable=None, leave=False)
    return (rows[start : start + size] for start in starts)


def with_ref_logps(model: Transformer, rows: list[Example], args: argparse.Namespace, loop: Loop) -> list[Example]:
    groups = scored(model, None, in_groups(rows, args.micro_batch_size), args, loop)
    logps = [row for s in groups for row in s.logps.tolist()]
    return [e._replace(ref_logps=row) for e, row in zip(rows, logps, strict=True)]


def is_right(rewards: Tensor, s: Scored) -> Tensor:
    """(B,): 1 where the best answer has more reward than the worst, or a lone one the sign of its label; ties 0.5."""
    difference = margin(rewards) if s.scores.shape[1] > 1 else torch.where(is_good(s), rewards, -rewards)[:, 0]
    return (difference > 0).float() + 0.5 * (difference == 0)


SUMS = ("loss", "accuracy", "rows", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "chosen",
        "rejected")  # fmt: skip


def sums_of(losses: Tensor, s: Scored, args: argparse.Namespace) -> Tensor:
    """(9,): what SUMS names, each summed over the rows of a batch."""
    rewards, logps, K = implicit_rewards(s, args), s.logps.detach(), s.scores.shape[1]
    place = torch.arange(K, device=rewards.device).expand_as(rewards)
    chosen, rejected = (place == 0, place == K - 1) if K > 1 else (is_good(s), ~is_good(s))
    found = (losses.detach(), is_right(rewards, s), torch.ones_like(losses), rewards[chosen], rewards[rejected],
             logps[chosen], logps[rejected], chosen.float(), rejected.float())  # fmt: skip
    return torch.stack([x.sum() for x in found])


def metrics_of(sums: Tensor) -> dict[str, float]:
    """The means of a whole step, from the sums over all its batches and ranks."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    n, n_chosen, n_rejected = (max(1.0, total.pop(name)) for name in ("rows", "chosen", "rejected"))
    found = {name: x / (n_chosen if "chosen" in name else n_rejected if "rejected" in name else n)
             for name, x in total.items()}  # fmt: skip
    return {"loss": found.pop("loss"), "margin": found["chosen_reward"] - found["rejected_reward"]} | found


def evaluate(model: Transformer, ref_model: Transformer | None, tokenizer: Tokenizer, test: dict[str, list],
             before: dict[str, list[float]] | None, args: argparse.Namespace, loop: Loop
             ) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a test row}; the mean of the first is what the run is judged by. before=None: the start."""
    model.eval()
    found: dict[str, list[float]] = {}
    if "pairs" in test:
        groups = scored(model, ref_model, in_groups(test["pairs"], args.micro_batch_size), args, loop)
        if args.loss in ("kto", "bco"):
            about = groups
            if args.loss == "kto":
                about = scored(model, ref_model, in_groups(test["others"], args.micro_batch_size), args, loop)
            baseline = step_baseline(args.loss, about, loop)
            groups = [s._replace(baseline=baseline) for s in groups]
        found["pair accuracy"] = [x for s in groups for x in is_right(implicit_rewards(s, args), s).tolist()]
        found["loss"] = [x for s in groups for x in objective(s, args).tolist()]
    if "prompts" in test:
        answers = sampled(model, tokenizer, test["prompts"], 1, 1.0, 5 if before is None else 6, args, loop)
        if before is None and ref_model is not None:
            found["KL"] = [0.0] * len(answers)
        elif before is not None and "KL" in before:  # a reference that --credit alone needs is not there before
            found["KL"] = sampled_kls(model, ref_model, test["prompts"], answers, args, loop)
        found["length"] = [float(len(answer.input_ids)) for (answer,) in answers]
    if "requests" in test:
        prompts = [ids for ids, _ in test["requests"]]
        answers = sampled(model, tokenizer, prompts, 1, 1.0, 1 if before is None else 2, args, loop)
        utility = [x for (x,) in utilities(tokenizer, test["requests"], answers)]
        theirs = utility if before is None else before["utility"]  # of the SFT model, sampled independently
        found["win rate"] = [(a > b) + 0.5 * (a == b) for a, b in zip(utility, theirs, strict=True)]
        found["utility"], found["KL"] = utility, [0.0] * len(utility)
        if before is not None and ref_model is not None:
            found["KL"] = sampled_kls(model, ref_model, prompts, answers, args, loop)
        found["length"] = [float(len(answer.input_ids)) for (answer,) in answers]
        asked = [chat.prompt_ids(row["messages"][:1], tokenizer) for row in test["skills"]]
        said = sampled(model, tokenizer, asked, 1, 0.0, 0, args, loop)
        found["skills"] = [float(world.is_correct(chat.completion_text(answer.input_ids, tokenizer), row["answer"]))
                           for (answer,), row in zip(said, test["skills"], strict=True)]  # fmt: skip
    model.train()
    return found


@torch.no_grad()
def sampled_kls(model: Transformer, ref_model: Transformer, prompts: list[list[int]], answers: list[list[chat.Row]],
                args: argparse.Namespace, loop: Loop) -> list[float]:  # fmt: skip
    """log pi / ref of the one answer that pi gave to each prompt: their mean estimates KL(pi || ref), in nats."""
    rows, found = [Example(ids, some, [1.0]) for ids, some in zip(prompts, answers, strict=True)], []
    for some in in_groups(rows, args.micro_batch_size):
        batch = collate(some, loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            now, then = (answer_logps(m, batch) for m in (model, ref_model))
        found += (now - then).tolist()
    return found


def conclude(model: Transformer, ref_model: Transformer | None, tokenizer: Tokenizer, test: dict[str, list],
             before: dict[str, list[float]], after: dict[str, list[float]], args: argparse.Namespace, loop: Loop
             ) -> dict:  # fmt: skip
    """Print three answers before and after, write result.json."""
    if "requests" in test:
        prompts = [ids for ids, _ in test["requests"][:3]]  # on all ranks: --parallel fsdp gathers weights from all
        said = [sampled(m, tokenizer, prompts, 1, 1.0, 3, args, loop) for m in (ref_model, model)]
        for (_, row), *answers in zip(test["requests"], *said, strict=False) if loop.main else ():
            a, b = (chat.completion_text(answer.input_ids, tokenizer) for (answer,) in answers)
            print(f"\n  user    {row['prompt']}\n  before  {a}\n  after   {b}")
    return loop.finish(before, after, variant=args.loss + "-ai" * (args.judge == "ai"),
                       series=("chosen_reward", "rejected_reward"))  # fmt: skip


@torch.no_grad()
def show_credit(model: Transformer, ref_model: Transformer, tokenizer: Tokenizer, test: dict[str, list],
                args: argparse.Namespace, loop: Loop) -> None:  # fmt: skip
    """Print answers to three held-out prompts, each token on green where beta * log pi / ref is above 0, or on red.

    All ranks score them, since --parallel fsdp gathers weights from all.
    """
    rows = test["pairs"][:3] if "pairs" in test else [
        encode(row["prompt"], [row["chosen"], row["rejected"]], [1.0, 0.0], tokenizer)
        for row in manners.preferences(3, args.seed, "test")
    ]  # fmt: skip
    for e in rows:
        batch = collate([e], loop.device, 64 if loop.compiled else 1)
        with loop.autocast():
            logps, ref_logps = (token_logps(m, batch.input_ids) for m in (model, ref_model))
        if not loop.main:
            continue
        print("\n" + tokenizer.decode(e.prompt))
        for (ids, mask), credits in zip(e.answers, (args.beta or 1.0) * (logps - ref_logps), strict=True):
            credits = credits[len(e.prompt) :][: len(ids)] * torch.tensor(mask, device=loop.device)
            text = coloured([tokenizer.decode([i]) for i in ids], credits.tolist())
            print(f"{credits.sum().item():+8.2f}  {text}")


def coloured(tokens: Sequence[str], credits: Sequence[float]) -> str:
    r"""`tokens` on green (credit above 0) or red (below), the deeper the larger its size, of at most 1.

    >>> coloured(["a", "b"], [1.0, -0.5])
    '\x1b[30;48;2;55;255;55ma\x1b[0m\x1b[30;48;2;255;155;155mb\x1b[0m'
    """
    parts = []
    for token, r in zip(tokens, credits, strict=True):
        pale = round(255 - 200 * min(1.0, abs(r)))
        red, green = (pale, 255) if r > 0 else (255, pale)
        parts.append(f"\033[30;48;2;{red};{green};{pale}m{token}\033[0m")
    return "".join(parts)


COLUMNS = ("win rate", "utility", "KL", "length", "skills")
MAIN_LOSSES = ("dpo", "ipo", "kto", "simpo", "orpo")  # which --loss all runs with --seeds seeds


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (32, 64),
    "micro_batch_size": (32, 4),
    "max_length": (128, 1024),
    "max_new_tokens": (64, 256),
    "warmup": (10, 20),
}
REQUESTS = 500  # of the generated world that are held out
PROMPTS = 64  # at most, of held-out rows of --data, that are answered for KL and length
WORLD_STEPS = 60  # --steps where the rows are made as they are needed
HYPER = ("lr", "beta", "gamma", "alpha", "label_smoothing", "desirable_weight", "undesirable_weight", "sft_weight")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--epochs", "--batch-size", "--micro-batch-size", "--lr",
               "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS) | dict.fromkeys(("lr", "steps"))
        | {"epochs": {"with --data": 1.0}, "schedule": "linear", "weight_decay": 0.0, "grad_clip": 1.0},
    )
    cli.add_argument("--loss", choices=(*LOSSES, "all"), default="dpo", help="a variant, or a table of all of them")
    cli.add_argument("--beta", type=REAL, help="how near to the reference, in most losses (defaults: see LOSSES)")
    cli.add_argument("--gamma", type=REAL, help="simpo: the margin that is aimed at")
    cli.add_argument("--alpha", type=REAL, help="rdpo: weight of a token; tdpo: of the KLs; nn: of the bad answer")
    cli.add_argument("--label-smoothing", type=REAL, help="dpo, robust: how often a label is wrong, below 0.5")
    cli.add_argument("--desirable-weight", type=REAL, help="kto: of good answers")
    cli.add_argument("--undesirable-weight", type=REAL, help="kto: of bad answers")
    cli.add_argument("--sft-weight", type=REAL, help="of the SFT term on the best answer, beside any loss")
    cli.add_argument("--rollout-batch", type=COUNT, help="answers decoded at a time, to save memory (default: all; "
                     "with --model 32)")  # fmt: skip
    cli.add_argument("--answers", type=COUNT, help="sampled to each prompt (default: 2; of lipo, rrhf, pro and nn 4)")
    cli.add_argument("--pairs", choices=("sampled", "written"), default="sampled",
                     help="of the world: answers of the model that the run begins with, or written by data/manners.py")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut"), default="refuse",
                     help="rows of more than --max-length tokens; cut: first the prompt's beginning, last the answers")
    cli.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in backward: less memory")
    cli.add_argument("--precompute-ref", action="store_true", help="log-probs of the reference once, and no copy of it")
    cli.add_argument("--rounds", type=COUNT, default=1, help="parts of the run, each with its part of the rows")
    cli.add_argument("--ref", choices=("first", "last"), default="first",
                     help="reference: the model at the start of the run, or at the start of each round")
    cli.add_argument("--online", action="store_true", help="the rows of a round are ranked samples of the policy")
    cli.add_argument("--judge", default="annotator", metavar="WHO",
                     help="who ranks them: annotator, ai (the policy itself, or out/judge), reward (of reward.py) or "
                     "such a folder")
    cli.add_argument("--credit", action="store_true", help="show held-out answers, each token coloured")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_LOSSES)} in --loss all")
    args = cli.parse_args(argv)
    fill(args, DEFAULTS | {"rollout_batch": (None, 32)}, args.model is not None)
    if args.epochs is not None and args.data is None:
        raise UserError("--epochs are passes over the rows of --data: those of the world are as many as --steps needs")
    fill(args, {"epochs": (1.0,)}, 0)
    if args.steps is None and args.data is None:
        args.steps = WORLD_STEPS
    if args.loss == "all" and args.data:
        raise UserError("--loss all makes a table of the generated world: it takes no --data")
    return args if args.loss == "all" else resolved(args)


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults of its --loss; UserError for flags that do not go together."""
    _, of_answers, defaults = LOSSES[args.loss]
    defaults = {"sft_weight": (0.0, 0.0)} | rates_of(defaults, args.adapter)
    needs_reference = of_answers in WITH_REFERENCE
    for name in HYPER:
        if getattr(args, name) is None and name in defaults:
            setattr(args, name, defaults[name][(args.model if name == "lr" else args.data) is not None])
        elif getattr(args, name) is not None and name not in defaults:
            raise UserError(f"--{name.replace('_', '-')}: --loss {args.loss} has none")
    for is_wrong, text in (
        (args.beta == 0, "--beta: expected a number above 0"),
        ((args.label_smoothing or 0) >= 0.5, "--label-smoothing: expected less than 0.5, where labels say nothing"),
        (args.answers == 1, "--answers: expected at least 2"),
        (not needs_reference and (args.precompute_ref or args.ref == "last"), f"--loss {args.loss} has no reference"),
        (args.precompute_ref and args.loss == "tdpo", "--loss tdpo needs the reference itself: no --precompute-ref"),
        (args.precompute_ref and (args.online or args.ref == "last"),
         "--precompute-ref is for rows and a reference that stay: no --online, no --ref last"),
        (args.ref == "last" and args.parallel == "fsdp", "--ref last copies whole models: no --parallel fsdp"),
        (args.adapter and args.parallel == "fsdp", "--adapter: too small to shard; choose --parallel replicas"),
        (args.online and args.pairs == "written", "--online samples its answers: no --pairs written"),
        (args.online and args.data and args.judge == "annotator", "--judge annotator knows the generated world only"),
        (args.judge != "annotator" and not args.online and (args.data or args.pairs == "written"),
         "--judge ranks sampled answers: it needs --online or --pairs sampled"),
        (args.pairs == "written" and args.data, "--pairs is of the generated world: it takes no --data"),
        (args.answers and not args.online and args.loss != "nn" and (args.data or args.pairs == "written"),
         "--answers are sampled: they need --online, --pairs sampled or --loss nn"),
    ):
        if is_wrong:
            raise UserError(text)
    args.answers = args.answers or (4 if args.loss in LISTWISE else 2)
    return args


def main(args: argparse.Namespace) -> dict:
    if args.loss == "all":
        return compare(main, resolved, args, LOSSES, Path(args.out or ROOT / "out" / "dpo"), COLUMNS, MAIN_LOSSES)

    # 4. Setup
    loop = Loop(args, "dpo")
    start = args.model or loop.require("sft")
    model, tokenizer = load(start, with_tokenizer=True)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    model.to(loop.device).checkpoint_activations = args.checkpoint_activations
    if args.adapter:
        adapt(model, args.adapter, start, loop, dropout=False)
    loop.check_length(model)
    resolved_values = (f"{name} {value:g}" for name in HYPER if (value := getattr(args, name)) is not None)
    loop.say(f"--loss {args.loss}: {', '.join(resolved_values)}")
    rows, test = examples(args, model, tokenizer, loop)
    others = of_other_prompts(rows, args.max_length) if args.loss == "kto" and not args.online else []
    if args.loss == "kto" and "pairs" in test:
        test["others"] = of_other_prompts(test["pairs"], args.max_length)
    total = args.steps if args.steps is not None else math.ceil(args.epochs * len(rows) / args.batch_size)
    if args.rounds > max(1, min(total, len(rows))):
        raise UserError(f"--rounds {args.rounds}: there are {total} steps and {len(rows)} rows")
    starts = [i * total // args.rounds for i in range(args.rounds)]  # steps done before each round
    with_reference = LOSSES[args.loss][1] in WITH_REFERENCE
    ref_model = reference(model, loop) if with_reference and not args.precompute_ref else None
    model = loop.shard(model)
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model)
    if args.precompute_ref:  # now the model is its own reference: there is never a copy
        rows, others = (with_ref_logps(model, some, args, loop) for some in (rows, others))
        test |= {name: with_ref_logps(model, test[name], args, loop) for name in {"pairs", "others"} & test.keys()}
    extra = loop.restore(model, optimizer)
    loop.describe(model)
    before = extra.get("before") or evaluate(model, ref_model, tokenizer, test, None, args, loop)
    kept = [Example(ids, [chat.Row(*answer) for answer in answers], *rest)  # samples of a round that was interrupted
            for ids, answers, *rest in extra.get("current", ())]  # fmt: skip
    current: list[Example] = []
    if extra and args.ref == "last":
        ref_model.load_state_dict({name: extra[f"ref.{name}"] for name in ref_model.state_dict()})

    # 5. Train
    for step in loop.steps(total):
        lr = set_lr(optimizer, args, step, total)
        i = max(i for i, done in enumerate(starts) if done < step)  # the round
        begins = step == starts[i] + 1
        if begins and args.ref == "last":
            ref_model.load_state_dict(model.state_dict())
        if begins or not current:  # or a resumed run is within a round
            current, unrelated = rows_of_round(i, rows, others, [] if begins else kept, model, tokenizer, args, loop)
        indices = list(loop.micro_batches(len(current), step - starts[i]))
        batches = [collate([current[j] for j in some], loop.device, 64 if loop.compiled else 1) for some in indices]
        n_read = loop.sum_over_ranks(sum(batch.input_ids.numel() for batch in batches))
        baseline = None
        if args.loss in ("kto", "bco"):
            about = unrelated if args.loss == "kto" else current
            groups = ([about[j] for j in some if about] for some in indices)
            baseline = step_baseline(args.loss, scored(model, ref_model, groups, args, loop), loop)
        sums = torch.zeros(len(SUMS), device=loop.device)
        for batch in batches:
            with loop.autocast():
                s = score(model, ref_model, batch, args)._replace(baseline=baseline)
            losses = objective(s, args)
            (losses.sum() / args.batch_size).backward()  # the mean over the rows of the step, on all ranks
            sums += sums_of(losses, s, args)
        loop.all_reduce(model)
        grad_norm = clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(step, **metrics_of(loop.sum_over_ranks(sums)), grad_norm=grad_norm, lr=lr, tokens=n_read)
        if args.eval_every and loop.due("eval", step) and step < total:
            some = {kind: rows for kind, rows in test.items() if kind != "prompts"}  # what is shown needs no answers
            name, values = next(iter(evaluate(model, ref_model, tokenizer, some, before, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            state = {"before": before, "current": current if args.online else []}
            state |= {f"ref.{name}": p for name, p in ref_model.state_dict().items()} if args.ref == "last" else {}
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra=state)

    # 6. Evaluate
    if args.ref == "last" or (ref_model is None and ("requests" in test or args.credit)):
        ref_model = load(start)[0].to(loop.device)  # the model that the run began with
        loop.seed(0)  # with what is random in an adapter
        if args.adapter:
            adapt(ref_model, args.adapter, start)
        ref_model = reference(ref_model, loop)
    after = evaluate(model, ref_model, tokenizer, test, before, args, loop)
    if args.credit:
        show_credit(model, ref_model, tokenizer, test, args, loop)
    return conclude(model, ref_model, tokenizer, test, before, after, args, loop)


if __name__ == "__main__":
    run(main, get_args)
