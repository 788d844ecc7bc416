"""A vision-language model: an image encoder, a connector, and a language model that answers questions about pictures.

    f = encoder(image)                      (P, D_v), a vision transformer: a vector for each patch (2010.11929)
    mlp              x = W2 gelu(W1 f)      of 2 x 2 patches each, in the place of `<image>` (LLaVA, arXiv 2304.08485)
    query            x = what k learned queries attend to in f: k tokens, however large P is (BLIP-2, 2301.12597)
    cross-attention  h + tanh(g) attend(h, f) before every block, g = 0 at first (Flamingo, 2204.14198)

The weights come in four stages, of which one command does all.

    contrast   encoder and text tower: the caption of a picture is nearer to it than those of the others in the batch,
               and than captions of its own that are wrong in one word (CLIP, 2103.00020; NegCLIP, 2210.01936;
               --contrast siglip: each pair by itself, 2303.15343)
    align      the connector alone, on descriptions: loss = - sum_t mask[t] log pi(token t | image, tokens before t)
    instruct   the connector and the language model, on questions and answers, with conversations without pictures
               between them (--replay), or what the model could do before is forgotten
    prefer     the same two, by the loss of dpo.py: of the model's own descriptions the one that names only what is
               there is chosen, the one that names what is not is rejected (RLHF-V, 2312.00849), and likewise of its
               answers to "Is there a ...?"

What a stage does not name is frozen in it, to the byte. --lr is the rate of instruct, to which that of prefer stays in
proportion; contrast and align have rates of their own (STAGES). A batch is split by the two passes of GradCache
(2101.06983), so that in `contrast`, too, --micro-batch-size and the number of ranks change nothing. Left out: the
image-text matching and captioning losses of BLIP-2, Flamingo's resampler, tiles for large pictures; a picture is scaled
to 48 x 48 pixels.

    python vlm.py                                                     the tiny model learns to see, and is measured
    python vlm.py --model out/vlm --image shape.png "How many red squares are there?"
    python vlm.py --model DIR --data rows.jsonl --adapter lora        a real model, {"messages", "images"} on each line
    torchrun --nproc-per-node 8 vlm.py --model DIR --data rows.jsonl
    python vlm.py --connector all                                     a table of the connectors

Logged: `loss`, of the stage in hand; `stage`, its number; `top-1` in `contrast`, how often a picture's own caption is
the nearest of the batch; `accuracy` and `margin` in `prefer`, as in dpo.py. Measured, greedy and by exact match, on
held-out questions about held-out pictures: `exact match`, the mean of all kinds of question; each kind; `unseen
compositions`, about pairs of colour and shape that no training picture shows; `retrieval top-1` among 64 different
captions; `hallucination`, the share of descriptions (sampled at temperature 1) that name what is not there (CHAIR_s,
1809.02156), `hallucination, greedy`, and `left out`, the share that does not name all that is there, each before and
after the last stage; `yes to what is absent` (POPE, 2305.10355); `text skills`, the questions of sft.py. As baselines:
the best constant answer to each kind, and what the model says to a blank picture and to that of another row with the
same question: who does not look is right no more often. out/vlm/samples.svg shows pictures, questions and answers.

The last lines begin with `exact match: 0.0.. before, 0.8.. after`.
"""

import argparse
import base64
import contextlib
import html
import json
import math
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import chat, formats, pictures, world
from data.formats import UserError
from data.tokenizer import Tokenizer
from dpo import Scored, dpo, log_ratio, margin
from kernels import IGNORED, linear_logps
from loop import COUNT, REAL, ROOT, Loop, adamw, clip, compare, fill, parser, run, set_lr, told
from lora import adapt, rates_of, trained
from model import Config, Transformer, generate, load, read_safetensors, write_safetensors
from sft import Muon

# 1. The objective


def clip_loss(pairs: Tensor, log_scale: Tensor, bias: Tensor, same: Tensor) -> Tensor:
    """(B,): half of -log softmax of a picture's own caption among all, and half of a caption's picture (2103.00020).

    pairs (B, 2 + k, d), of length 1: a picture, its caption, and k captions that are nearly right, which only this
    picture must tell from its own (hard negatives: NegCLIP, 2210.01936). logits = exp(log_scale) * images @ texts.T;
    bias is siglip's. same (B, B): where captions are the same, the one is no wrong answer to the other's picture.
    """
    logits, nearly = (log_scale.exp() * z for z in similarities(pairs))
    logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -torch.inf)
    of_captions = torch.cat([logits, nearly], dim=1).log_softmax(1)
    return -(of_captions.diagonal() + logits.log_softmax(0).diagonal()) / 2


def siglip_loss(pairs: Tensor, log_scale: Tensor, bias: Tensor, same: Tensor) -> Tensor:
    """(B,): sum over captions of -log sigmoid(+-(exp(log_scale) * image . text + bias)), + if it is its own.

    (SigLIP, 2303.15343.) Arguments as in clip_loss. Each pair is judged alone: no softmax over the batch.
    """
    logits, nearly = (log_scale.exp() * z + bias for z in similarities(pairs))
    own = torch.eye(len(same), dtype=torch.bool, device=same.device)
    of_batch = F.logsigmoid(torch.where(own, logits, -logits)) * (own | ~same)
    return -(of_batch.sum(1) + F.logsigmoid(-nearly).sum(1))


def similarities(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of B pictures with B captions (B, B), and of each with its k captions that are nearly right (B, k)."""
    images, texts, wrong = pairs[:, 0], pairs[:, 1], pairs[:, 2:]
    return images @ texts.T, (wrong @ images[:, :, None]).squeeze(2)


CONTRASTS = {  # name: (loss, scale and bias at first)
    "clip": (clip_loss, 1 / 0.07, 0.0),
    "siglip": (siglip_loss, 10.0, -10.0),
}
MOST_SCALE = 100.0  # of CLIP: a larger one makes the training unsteady

# The network


class Attend(nn.Module):
    """What x (B, T, D), normed, attends to in context (B, M, C), or in itself. mask (B, T, M): True is seen."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width or width, 2 * width, bias=False)  # one of the keys would change nothing
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        q, k, v = self.q(x), *self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, ., d)
        mask = None if mask is None else mask[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


@dataclass(frozen=True)
class Vision:
    """The shape of all that is not the language model; vision.json of a checkpoint holds it."""

    connector: str = "mlp"
    contrast: str = "clip"
    stem: str = "conv"  # convolutions, three of stride 2 (2106.14881), or "patch": one matrix, as in the ViT
    side: int = pictures.SIDE  # pixels
    patch: int = 8
    width: int = 96
    depth: int = 3
    heads: int = 3
    merge: int = 2  # of mlp: patches a token is wide and high
    queries: int = 9
    joint: int = 64  # dimensions in which pictures and captions are compared
    text_depth: int = 2
    text_length: int = 128  # tokens of a caption at most


def positions_2d(grid: int, width: int) -> Tensor:
    """(grid * grid, width): sines and cosines of the row, then of the column (2205.01580)."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # (grid, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class Encoder(nn.Module):
    """A vision transformer without a class token: pixels (N, 3, side, side) from 0 to 1 -> (N, P, width)."""

    def __init__(self, c: Vision):
        super().__init__()
        if c.stem == "patch":
            self.stem = nn.Conv2d(3, c.width, c.patch, stride=c.patch)
        else:  # 8 = 2 * 2 * 2
            widths = (3, c.width // 3, 2 * c.width // 3, c.width)
            layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (
                nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(1, b), nn.GELU(),
                nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(1, b), nn.GELU())]  # fmt: skip
            self.stem = nn.Sequential(*layers[:-1])
        self.norm_patches = nn.LayerNorm(c.width)  # as loud as their positions
        self.blocks = nn.ModuleList(nn.ModuleList([Attend(c.width, c.heads), MLP(c.width)]) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.register_buffer("positions", positions_2d(c.side // c.patch, c.width), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(2 * pixels - 1).flatten(2).transpose(1, 2)  # (N, P, D): row by row
        x = self.norm_patches(x) + self.positions
        for attend, mlp in self.blocks:
            x = x + attend(x)
            x = x + mlp(x)
        return self.norm(x)


class Pool(nn.Module):
    """One vector of a picture, for `contrast`: what a learned query attends to (the head of SigLIP, 2303.15343)."""

    def __init__(self, c: Vision):
        super().__init__()
        self.query, self.attend = nn.Parameter(torch.randn(1, c.width)), Attend(c.width, c.heads)
        self.mlp = MLP(c.width)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, D_v) -> (N, D_v)"""
        x = self.attend(self.query.expand(len(features), -1, -1), features)
        return (x + self.mlp(x))[:, 0]


class MLPConnector(nn.Module):
    """LLaVA-1.5: two layers; as in InternVL (2312.14238) one token is made of merge x merge patches beside each other.

    At first the tokens are of the size of the language model's embeddings.
    """

    def __init__(self, c: Vision, model: Transformer):
        super().__init__()
        D = model.config.width
        self.grid, self.merge = c.side // c.patch, c.merge
        self.slots = (self.grid // c.merge) ** 2
        self.up, self.down = nn.Linear(c.merge**2 * c.width, D), nn.Linear(D, D)
        nn.init.normal_(self.down.weight, std=2 * model.embed.weight.float().std().item() / math.sqrt(D))

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, D_v) -> (N, slots, D)"""
        n = self.grid // self.merge
        x = features.unflatten(1, (n, self.merge, n, self.merge)).transpose(2, 3)  # (N, n, n, merge, merge, D_v)
        return self.down(F.gelu(self.up(x.flatten(3).flatten(1, 2))))


class QueryConnector(nn.Module):
    """Q-Former: learned queries see each other, then the picture; two rounds; a last matrix as in MLPConnector."""

    def __init__(self, c: Vision, model: Transformer):
        super().__init__()
        self.slots = c.queries
        self.queries = nn.Parameter(torch.randn(c.queries, c.width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attend(c.width, c.heads), Attend(c.width, c.heads, c.width), MLP(c.width)]) for _ in range(2)
        )
        self.norm, self.down = nn.LayerNorm(c.width), nn.Linear(c.width, model.config.width)
        nn.init.normal_(self.down.weight, std=model.embed.weight.float().std().item() / math.sqrt(c.width))

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, D_v) -> (N, slots, D)"""
        x = self.queries.expand(len(features), -1, -1)
        for see_each_other, see, mlp in self.blocks:
            x = x + see_each_other(x)
            x = x + see(x, features)
            x = x + mlp(x)
        return self.down(self.norm(x))


class CrossAttentionConnector(nn.Module):
    """Flamingo: before each block, h + tanh(a) attend(h, pictures so far), then h + tanh(b) MLP(h); a = b = 0 at first.

    `<image>` stays one token of its own, which only marks the place. Flamingo shows a token the last picture before
    it, this all that stand before it.
    """

    slots = 1

    def __init__(self, c: Vision, model: Transformer):
        super().__init__()
        D, heads = model.config.width, model.config.heads
        self.blocks = nn.ModuleList(nn.ModuleList([Attend(D, heads, c.width), MLP(D)]) for _ in model.blocks)
        self.gates = nn.Parameter(torch.zeros(len(model.blocks), 2))


class Sight(NamedTuple):
    """The pictures of each row, for cross-attention (model.Memory): token t sees the first reach[t] features."""

    connector: CrossAttentionConnector
    features: Tensor  # (B, M, D_v)
    reach: Tensor  # (B, T)

    def __call__(self, i: int, x: Tensor) -> Tensor:
        T = x.shape[1]
        reach = self.reach[:, :T] if T > 1 else self.reach[:, -1:]  # one token comes after the prompt, and sees all
        places = torch.arange(self.features.shape[1], device=x.device)
        seen = places < reach[..., None].clamp(min=1)  # (B, T, M): one, lest nothing be divided by nothing
        (attend, mlp), (a, b) = self.connector.blocks[i], self.connector.gates[i].tanh()
        sees = (reach > 0)[..., None].to(x.dtype)
        x = x + a * sees * attend(x, self.features, seen)
        return x + b * sees * mlp(x)

    def select(self, rows: Tensor) -> "Sight":
        return self._replace(features=self.features[rows], reach=self.reach[rows])


CONNECTORS = {"mlp": MLPConnector, "query": QueryConnector, "cross-attention": CrossAttentionConnector}


class VLM(nn.Module):
    """encoder, connector and language model (`model`), and what only `contrast` and retrieval need."""

    def __init__(self, model: Transformer, image_id: int, c: Vision):
        super().__init__()
        self.c, self.image_id, self.model = c, image_id, model
        self.encoder, self.connector = Encoder(c), CONNECTORS[c.connector](c, model)
        self.text = Transformer(Config.from_depth(c.text_depth, model.config.vocab_size, c.text_length))
        self.pool = Pool(c)
        self.of_image, self.of_text = nn.Linear(c.width, c.joint), nn.Linear(self.text.config.width, c.joint)
        _, scale, bias = CONTRASTS[c.contrast]
        self.log_scale, self.bias = nn.Parameter(torch.tensor(math.log(scale))), nn.Parameter(torch.tensor(bias))
        for p in self.connector.parameters():
            p.lr_times = 3.0  # it is new, and the language model is not
        self.to(model.embed.weight.device)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """{what a stage may train: its parameters}"""
        contrast = [p for part in (self.pool, self.text, self.of_image, self.of_text) for p in part.parameters()]
        found = {name: [*getattr(self, name).parameters()] for name in ("encoder", "connector", "model")}
        return found | {"contrast": [*contrast, self.log_scale, self.bias]}

    def vision(self) -> dict[str, Tensor]:
        """All parameters but those of the language model."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("model.")}

    def pair(self, batch: "Batch") -> Tensor:
        """(B, 2 + k, d): pictures and captions, each of length 1; a batch's rows have one picture each."""
        image = self.of_image(self.pool(self.encoder(batch.pixels)))
        hidden = self.text.hidden(batch.captions)  # causal: the last token has seen the whole caption
        text = self.of_text(hidden[torch.arange(len(hidden), device=hidden.device), batch.caption_lengths - 1])
        return F.normalize(torch.cat([image[:, None], text.unflatten(0, (len(image), -1))], dim=1).float(), dim=-1)

    def look(self, batch: "Batch") -> dict[str, object]:
        """`embeddings` or `memory` for `Transformer.hidden`; ValueError unless there is a place for each picture."""
        slots = batch.input_ids == self.image_id
        if int(slots.sum()) != len(batch.pixels) * self.connector.slots:
            raise ValueError(f"{int(slots.sum())} slots, {len(batch.pixels)} pictures of {self.connector.slots} each")
        if not len(batch.pixels):
            return {}
        features = self.encoder(batch.pixels)
        if isinstance(self.connector, CrossAttentionConnector):
            counts = slots.sum(1)
            N, P, D = features.shape
            padded = features.new_zeros(len(slots), int(counts.max()), P, D)
            padded[torch.arange(padded.shape[1], device=slots.device) < counts[:, None]] = features
            return {"memory": Sight(self.connector, padded.flatten(1, 2), slots.cumsum(1) * P)}
        embeddings = self.model.embed(batch.input_ids)
        seen = self.connector(features).to(embeddings.dtype)
        return {"embeddings": embeddings.masked_scatter(slots[..., None], seen)}  # row by row, in order

    def hidden_before(self, batch: "Batch") -> Tensor:
        """(B, T, D): the state that predicts token t."""
        return self.model.hidden_before(batch.input_ids, **self.look(batch))


def answer_logps(vlm: VLM, batch: "Batch") -> Tensor:
    """(B,): log pi of what the assistant says, the SUM over the tokens of completion_mask."""
    targets = batch.input_ids.masked_fill(batch.completion_mask == 0, IGNORED)
    return linear_logps(vlm.hidden_before(batch), vlm.model.head.weight, targets).sum(-1)


@contextlib.contextmanager
def learning(vlm: VLM, names: Sequence[str]) -> Iterator[None]:
    """Only these parts take a gradient within; what has none is left as it is by the optimizer, to the byte."""
    frozen = [p for name, some in vlm.parts.items() if name not in names for p in some if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def contrast_backward(vlm: VLM, batches: list["Batch"], same: Tensor, n_wrong: int, loop: Loop
                      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the contrast over all rows of the step, on all ranks; returns the mean loss and the top-1 rate.

    The whole batch is needed for the loss of each row. GradCache (2101.06983): embed all of it without a graph, take
    the gradient with respect to these embeddings, then embed part by part again and go back from there. same (B, B):
    and n_wrong, its k: see clip_loss; the j-th row of rank r is row j * ranks + r of it.
    """
    alone = len(batches) == 1  # then its graph is kept, and nothing is computed twice
    with torch.set_grad_enabled(alone), loop.autocast():
        parts = [vlm.pair(batch) for batch in batches]
    none = torch.zeros(0, 2 + n_wrong, vlm.c.joint, device=loop.device)
    mine = torch.cat([none, *(part.detach() for part in parts)])
    places = torch.arange(len(mine), device=mine.device) * loop.world_size + loop.rank
    whole = loop.sum_over_ranks(mine.new_zeros(len(same), *mine.shape[1:]).index_copy(0, places, mine))
    whole.requires_grad_()
    losses = CONTRASTS[vlm.c.contrast][0](whole, vlm.log_scale, vlm.bias, same)
    loss = losses.mean()
    (loss / loop.world_size).backward()  # of the scale and the bias each rank has a part
    gradients = (whole.grad * loop.world_size)[places].split([len(part) for part in parts])
    for batch, part, gradient in zip(batches, parts, gradients, strict=True):
        if not alone:
            with loop.autocast():
                part = vlm.pair(batch)
        part.backward(gradient)
    return loss.detach(), top1(whole.detach(), same)


def top1(pairs: Tensor, same: Tensor) -> Tensor:
    """(): how often the nearest of B captions is a picture's own, or the same in words. pairs as in clip_loss."""
    nearest = similarities(pairs)[0].argmax(1)
    return same[torch.arange(len(same), device=same.device), nearest].float().mean()


STAGES = {  # steps of the default run; rate of (the tiny model, a --model of your own); what it trains
    "contrast": {"steps": 720, "lr": (2e-3, 5e-4), "trains": ("encoder", "contrast")},
    "align": {"steps": 60, "lr": (1e-3, 3e-4), "trains": ("connector",)},
    "instruct": {"steps": 800, "lr": (1.2e-3, 2e-5), "trains": ("connector", "model")},
    "prefer": {"steps": 30, "lr": (3e-5, 5e-7), "trains": ("connector", "model")},
}

# 2. Data


class Row(NamedTuple):
    input_ids: list[int]
    completion_mask: list[int]
    pictures: tuple[np.ndarray, ...] = ()  # (side, side, 3) uint8 each, in the order of their slots
    captions: tuple[tuple[int, ...], ...] = ()  # the right one, then those that are nearly right


class Pair(NamedTuple):
    """A picture with two answers, and the sums of their log-probs under the model that began the stage."""

    chosen: Row
    rejected: Row
    ref_logps: tuple[float, float]


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T): 1 on the tokens trained on; never on a slot
    pixels: Tensor  # (N, 3, side, side) from 0 to 1: the pictures of all rows, row by row
    captions: Tensor  # (B (1 + k), L): those of the first row, of the second, ...
    caption_lengths: Tensor  # (B (1 + k),)


def collate(rows: Sequence[Row], side: int, device: torch.device, multiple_of: int = 1) -> Batch:
    """Rows padded on the right to the longest; of the captions as many of each as all rows have, or one of length 1."""
    length = max(len(row.input_ids) for row in rows)
    length = math.ceil(length / multiple_of) * multiple_of
    input_ids, completion_mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    n = min(len(row.captions) for row in rows)
    said = [caption for row in rows for caption in row.captions[:n]] or [(0,)] * len(rows)
    lengths = torch.tensor([len(caption) for caption in said])
    captions = torch.tensor([(*caption, *[0] * (int(lengths.max()) - len(caption))) for caption in said])
    for b, row in enumerate(rows):
        input_ids[b, : len(row.input_ids)] = torch.tensor(row.input_ids)
        completion_mask[b, : len(row.input_ids)] = torch.tensor(row.completion_mask)
    shown = [picture for row in rows for picture in row.pictures]
    pixels = np.stack(shown) if shown else np.zeros((0, side, side, 3), np.uint8)
    pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255
    return Batch(input_ids.to(device), completion_mask.to(device), pixels, captions.to(device), lengths.to(device))


MARKS = ("<image>", "<|image_pad|>", "<|vision_pad|>", "<|reserved_special_token_0|>")


def with_mark(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` in which `<image>` names a special token of its own, or an unused one; UserError if it has none."""
    mark = next((name for name in MARKS if name in tokenizer.special_tokens), None)
    if mark is None:
        raise UserError(f"the tokenizer has no special token to stand for a picture: {', '.join(MARKS)}")
    return replace(tokenizer, special_tokens=tokenizer.special_tokens | {"<image>": tokenizer.special_tokens[mark]})


def expand(row: chat.Row, image_id: int, slots: int) -> chat.Row:
    """`row` with each `<image>` of the user as `slots` tokens, none of which is trained on."""
    ids, mask = [], []
    for token, trained_on in zip(*row, strict=True):
        n = slots if token == image_id else 1
        ids += [token] * n
        mask += [trained_on if token != image_id else 0] * n
    return chat.Row(ids, mask)


def encode(messages: Sequence[dict], shown: Sequence[np.ndarray], tokenizer: Tokenizer, slots: int,
           *, ask: bool = False, captions: Sequence[str] = ()) -> Row:  # fmt: skip
    """A conversation as a Row; UserError unless it has an `<image>` for each picture. ask: the assistant is next."""
    image_id = tokenizer.special("<image>")
    rendered = chat.render(messages, tokenizer, add_generation_prompt=ask)
    if (n := rendered.input_ids.count(image_id)) != len(shown):
        raise UserError(f"{n} <image> in what the user says, {len(shown)} pictures")
    return Row(*expand(rendered, image_id, slots), tuple(shown), captions_of(captions, tokenizer))


def captions_of(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    return tuple((*tokenizer.encode(text), tokenizer.eos_ids[0]) for text in texts)


def cut(row: Row, max_length: int, image_id: int, slots: int) -> Row:
    """The beginning of `row`, of at most max_length tokens; a picture that does not fit is gone with all its slots."""
    end = max_length
    while end and end < len(row.input_ids) and row.input_ids[end - 1] == image_id:
        if row.input_ids[:end].count(image_id) % slots == 0:
            break  # the last one fits
        end -= 1
    n = row.input_ids[:end].count(image_id) // slots
    return row._replace(input_ids=row.input_ids[:end], completion_mask=row.completion_mask[:end],
                        pictures=row.pictures[:n])  # fmt: skip


def fitting(rows: Sequence[Row], what: str, vlm: VLM, args: Namespace, loop: Loop) -> list[Row]:
    """Rows of at most --max-length tokens: longer ones are refused, dropped or cut, as --too-long says."""
    counts, kept = Counter(), []
    for i, row in enumerate(rows, start=1):
        if len(row.input_ids) > args.max_length:
            if args.too_long == "refuse":
                raise UserError(f"{what[:-1]} {i} has {len(row.input_ids)} tokens, --max-length is {args.max_length}: "
                                "raise it, or choose --too-long drop or cut")  # fmt: skip
            counts["too long: " + args.too_long] += 1
            row = cut(row, args.max_length, vlm.image_id, vlm.connector.slots)
            if args.too_long == "drop" or not any(row.completion_mask):
                counts["without an answer: dropped"] += args.too_long == "cut"
                continue
        kept.append(row)
    for kind, n in counts.items():
        if n:
            loop.say(f"{n} {what} {kind}")
    return kept


def conversation(turns: Sequence[tuple[str, str]], n_pictures: int = 1) -> list[dict]:
    """(question, answer) in turn, the pictures before the first question; an empty answer is left out."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": "<image>" * n_pictures * (i == 0) + question})
        messages += [{"role": "assistant", "content": answer}] * (answer != "")
    return messages


class Data(NamedTuple):
    described: list[Row]  # contrast, align
    asked: list[Row]  # instruct
    scenes: list[pictures.Example]  # prefer
    test: dict[str, list]


def world_data(vlm: VLM, tokenizer: Tokenizer, args: Namespace, loop: Loop) -> Data:
    """Generated pictures, with text-only conversations among those of `asked`, and what `evaluate` measures."""
    plan = planned(args, 0)
    n = min(args.pictures, max(1, args.steps) * args.batch_size)
    made = [pictures.example(args.seed, i) for i in tqdm(range(n), "drawing", disable=None, leave=False)]

    def row(turns: Sequence[tuple[str, str]], e: pictures.Example, captions: Sequence[str] = ()) -> Row:
        slots = vlm.connector.slots
        return encode(conversation(turns), [e.picture], tokenizer, slots, captions=captions)

    captions = [[pictures.describe(e.things), *pictures.nearly(e.things, f"{args.seed} {i}")]
                for i, e in enumerate(made)]  # fmt: skip
    described = [row([(pictures.DESCRIBE, said[0])], e, said) for e, said in zip(made, captions, strict=True)]
    asked = [row(pictures.turns(e, f"{args.seed} {i}"), e) if i % 4 else described[i] for i, e in enumerate(made)]
    texts = world.sft_rows(round(n * args.replay / (1 - args.replay)), 10**6 + args.seed)
    asked += [Row(*chat.render(text["messages"], tokenizer)) for text in texts]
    described, asked = (fitting(rows, what, vlm, args, loop) for rows, what in
                        ((described, "descriptions"), (asked, "rows")))  # fmt: skip
    if not all(asked if name == "instruct" else described for name in args.stages if name != "prefer"):
        raise UserError(f"no row is left to train on: --max-length is {args.max_length}")
    n = 3 * plan.get("prefer", 0) * args.batch_size  # most are described rightly, and make no pair
    scenes = [pictures.example(f"prefer {args.seed}", i) for i in range(n)]
    return Data(described, asked, scenes, world_exam(args.exam))


def world_exam(seed: str) -> dict[str, list]:
    """What `evaluate` measures; --exam names other pictures than those of the tables, to choose settings on."""
    repeats = {"colour": 40, "shape": 40, "count": 10, "existence": 20}
    return {
        "kinds": [e for kind in pictures.KINDS for e in pictures.exam(kind, seed)],
        "unseen": [e for kind, n in repeats.items() for e in pictures.exam(kind, seed, pictures.UNSEEN, n)],
        "scenes": [pictures.example(f"exam {seed}", i) for i in range(400)],
        "texts": world.sft_test(40),
    }


def file_data(vlm: VLM, tokenizer: Tokenizer, args: Namespace, loop: Loop) -> Data:
    """Rows {"messages", "images"} of the JSONL files of --data, or rows of text alone, and the held-out ones."""
    read = partial(file_rows, mapping=formats.parse_map(args.map))
    parts, held_out = formats.split(args.data.split(","), args.eval_data, read, loop.say)

    def encoded(rows: list[dict], what: str) -> list[Row]:
        made = []
        for i, row in enumerate(tqdm(rows, "encoding", unit="row", disable=None, leave=False), start=1):
            shown = [resized(Path(path), vlm.c.side) for path in row.get("images", ())]
            messages = formats.to_messages(row)
            try:
                made.append(encode(messages, shown, tokenizer, vlm.connector.slots,
                                   captions=[messages[-1]["content"]]))  # fmt: skip
            except UserError as error:
                raise UserError(f"{what[:-1]} {i}: {error}") from None
        return fitting(made, what, vlm, args, loop)

    train, test = encoded(sum(parts, []), "rows"), encoded(held_out, "held-out rows")
    if not train or not test:
        raise UserError(f"no row is left to train on or to measure: --max-length is {args.max_length}")
    described = [row._replace(captions=(row.captions[0][: vlm.c.text_length],)) for row in train
                 if len(row.pictures) == 1]  # fmt: skip
    if not described and {"contrast", "align"} & {*args.stages}:
        raise UserError(f"{args.data}: the stages contrast and align need rows of one picture each; leave them out")
    return Data(described, train, [], {"rows": test})


def file_rows(path: str, mapping: dict[str, str]) -> list[dict]:
    """Rows of a JSONL file; the paths of its images are relative to its folder."""
    rows = formats.read_jsonl(path, ("images", "chat", "completion"), mapping=mapping)
    return [row | {"images": [str(Path(path).parent / name) for name in row["images"]]} if "images" in row else row
            for row in rows]  # fmt: skip


def resized(path: Path, side: int) -> np.ndarray:
    return pictures.resized(pictures.read_image(path), side)


# What the model says


def replies(vlm: VLM, tokenizer: Tokenizer, prompts: Sequence[Row], args: Namespace, loop: Loop, *, samples: int = 1,
            temperature: float = 0.0, seed: int = 0, longest: int = 0) -> list[list[list[int]]]:  # fmt: skip
    """The ids of `samples` completions of each prompt, of at most `longest` (0: --max-new-tokens) tokens."""
    found: list[list[int]] = []
    longest = longest or args.max_new_tokens
    if prompts and (room := vlm.model.context - max(len(row.input_ids) for row in prompts)) < longest:
        raise UserError(f"--max-new-tokens {longest}: the longest question leaves room for {room}")
    for start in tqdm(range(0, len(prompts), 256), "answering", disable=None, leave=False):
        some = prompts[start : start + 256]
        batch = collate(some, vlm.c.side, loop.device)
        with torch.no_grad(), loop.autocast():
            seen = vlm.look(batch)
            if "embeddings" in seen:
                seen["embeddings"] = [x[: len(row.input_ids)] for x, row in zip(seen["embeddings"], some, strict=True)]
            found += generate(
                vlm.model, [row.input_ids for row in some], max_new_tokens=longest,
                eos_ids=tokenizer.eos_ids, samples=samples, temperature=temperature, seed=10**6 * seed + start,
                vocab_size=tokenizer.vocab_size, **seen,
            ).completions  # fmt: skip
    return [found[i : i + samples] for i in range(0, len(found), samples)]


def prompts_of(vlm: VLM, tokenizer: Tokenizer, asked: Sequence[tuple[str, np.ndarray]]) -> list[Row]:
    return [encode(conversation([(question, "")]), [picture], tokenizer, vlm.connector.slots, ask=True)
            for question, picture in asked]  # fmt: skip


def answers(vlm: VLM, tokenizer: Tokenizer, asked: Sequence[tuple[str, np.ndarray]], args: Namespace, loop: Loop,
            longest: int = 12) -> list[str]:  # fmt: skip
    """What the model says, greedily, to each (question, picture)."""
    said = replies(vlm, tokenizer, prompts_of(vlm, tokenizer, asked), args, loop, longest=longest)
    return [chat.completion_text(ids, tokenizer).strip() for (ids,) in said]


def exact(said: Sequence[str], rows: Sequence[pictures.Example]) -> list[float]:
    return [float(text == row.answer) for text, row in zip(said, rows, strict=True)]


def hallucinations(vlm: VLM, tokenizer: Tokenizer, test: dict[str, list], args: Namespace, loop: Loop
                   ) -> dict[str, list[float]]:  # fmt: skip
    """Of descriptions of held-out pictures, and of the questions for what is absent (see the top of this file)."""
    prompts = prompts_of(vlm, tokenizer, [(pictures.DESCRIBE, e.picture) for e in test["scenes"]])
    found = {}
    for name, temperature in (("hallucination", 1.0), ("hallucination, greedy", 0.0)):
        said = replies(vlm, tokenizer, prompts, args, loop, temperature=temperature, seed=1)
        pairs = [(chat.completion_text(ids, tokenizer), e.things)
                 for (ids,), e in zip(said, test["scenes"], strict=True)]  # fmt: skip
        found[name] = [float(len(pictures.invented(text, things)) > 0) for text, things in pairs]
        found["left out" + name.removeprefix("hallucination")] = [float(pictures.missing(*pair) > 0) for pair in pairs]
    absent = [e for e in test["kinds"] if e.kind == "existence" and e.answer == "no"]
    said = answers(vlm, tokenizer, [(e.question, e.picture) for e in absent], args, loop)
    found["yes to what is absent"] = [float(text == "yes") for text in said]
    return found


def tempted(vlm: VLM, tokenizer: Tokenizer, scenes: Sequence[pictures.Example]) -> list[Row]:
    """What `prefer` asks: where the scene comes with a question for existence that one, else for a description."""
    asked = [(e.question if e.kind == "existence" else pictures.DESCRIBE, e.picture) for e in scenes]
    return prompts_of(vlm, tokenizer, asked)


def faults(text: str, e: pictures.Example) -> tuple[int, int]:
    """(What an answer to `tempted` says falsely, what it leaves out.)"""
    if e.kind == "existence":
        return int(text.strip() != e.answer), 0
    return len(pictures.invented(text, e.things)), pictures.missing(text, e.things)


def sampled_pairs(vlm: VLM, tokenizer: Tokenizer, scenes: Sequence[pictures.Example], args: Namespace, loop: Loop
                  ) -> list[list]:  # fmt: skip
    """[place in `scenes`, ids of an answer that is true, ids of one that is not], of 4 samples each.

    Chosen is a description that names what is there and nothing else (to say nothing would invent nothing, too),
    rejected the one that invents most; or the right answer to a question for existence and the wrong one. Of these
    yes is right as often as no, or the stage would teach to say the one that the model missed more often.
    """
    prompts = tempted(vlm, tokenizer, scenes)
    said, found = replies(vlm, tokenizer, prompts, args, loop, samples=4, temperature=1.0, seed=args.seed + 2), []
    false = 0
    for i, (some, e) in enumerate(zip(said, scenes, strict=True)):
        worse = [faults(chat.completion_text(ids, tokenizer), e) for ids in some]
        false += sum(invented > 0 for invented, _ in worse)
        best, worst = min(range(4), key=worse.__getitem__), max(range(4), key=worse.__getitem__)
        shows = vlm.image_id in (*some[best], *some[worst])  # a sampled `<image>` stands for no picture
        if worse[best] == (0, 0) and worse[worst][0] and not shows:
            found.append([i, some[best], some[worst]])
    yes, no = ([i for i, *_ in found if (scenes[i].kind, scenes[i].answer) == ("existence", answer)]
               for answer in ("yes", "no"))  # fmt: skip
    few = min(len(yes), len(no))
    surplus = {*yes[few:], *no[few:]}
    found = [pair for pair in found if pair[0] not in surplus]
    loop.say(f"prefer: {4 * len(scenes)} answers sampled, {false} say what is not so; {len(found)} pairs")
    return found


def pairs_of(found: list[list], vlm: VLM, tokenizer: Tokenizer, scenes: Sequence[pictures.Example], args: Namespace
             ) -> list[tuple[Row, Row]]:  # fmt: skip
    """(chosen, rejected) of what sampled_pairs found: the completion is trained on, its ending token included."""
    prompts = tempted(vlm, tokenizer, [scenes[i] for i, *_ in found])
    return [tuple(Row(prompt.input_ids + ids, [0] * len(prompt.input_ids) + [1] * len(ids), prompt.pictures)
                  for ids in said) for prompt, (_, *said) in zip(prompts, found, strict=True)]  # fmt: skip


def scored(vlm: VLM, pairs: Sequence[tuple[Row, Row]], args: Namespace, loop: Loop) -> Tensor:
    """(len(pairs), 2): log pi of the chosen and of the rejected answer."""
    batch = collate([row for pair in pairs for row in pair], vlm.c.side, loop.device, 64 if loop.compiled else 1)
    with loop.autocast():
        return answer_logps(vlm, batch).view(len(pairs), 2)


# The measurement


@torch.no_grad()
def evaluate(vlm: VLM, tokenizer: Tokenizer, test: dict[str, list], args: Namespace, loop: Loop
             ) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a test row}; the mean of the first is what the run is judged by."""
    vlm.eval()
    found: dict[str, list[float]] = {}
    if "rows" in test:  # sum of -log p / mean number of tokens: its mean over rows is the mean over tokens
        sums = []
        for start in range(0, len(test["rows"]), args.micro_batch_size):
            some = test["rows"][start : start + args.micro_batch_size]
            batch = collate(some, vlm.c.side, loop.device, 64 if loop.compiled else 1)
            with loop.autocast():
                sums += (-answer_logps(vlm, batch)).tolist()
        mean_count = statistics.fmean(sum(row.completion_mask) for row in test["rows"])
        found["loss"] = [x / mean_count for x in sums]
    if "kinds" in test:
        rows = test["kinds"]
        right = exact(answers(vlm, tokenizer, [(e.question, e.picture) for e in rows], args, loop), rows)
        found["exact match"] = right
        for e, r in zip(rows, right, strict=True):
            found.setdefault(e.kind, []).append(r)
        asked = [(e.question, e.picture) for e in test["unseen"]]
        found["unseen compositions"] = exact(answers(vlm, tokenizer, asked, args, loop), test["unseen"])
        found["retrieval top-1"] = retrieval(vlm, tokenizer, test["scenes"], loop)
        said = replies(vlm, tokenizer, text_prompts(test, tokenizer), args, loop)
        texts = [chat.completion_text(ids, tokenizer) for (ids,) in said]
        pairs = zip(texts, test["texts"], strict=True)
        found["text skills"] = [float(world.is_correct(text, row["answer"])) for text, row in pairs]
    vlm.train()
    return found


def text_prompts(test: dict[str, list], tokenizer: Tokenizer) -> list[Row]:
    ids = (chat.prompt_ids(row["messages"][:1], tokenizer) for row in test["texts"])
    return [Row(prompt, [0] * len(prompt)) for prompt in ids]


@torch.no_grad()
def retrieval(vlm: VLM, tokenizer: Tokenizer, scenes: Sequence[pictures.Example], loop: Loop, size: int = 64
              ) -> list[float]:  # fmt: skip
    """For each of `scenes` with a caption of its own among `size`: whether that is the nearest to the picture."""
    distinct = list({pictures.describe(e.things): e for e in scenes}.items())
    found = []
    for start in range(0, len(distinct) - size + 1, size):
        rows = [Row([0], [0], (e.picture,), captions_of([said], tokenizer))
                for said, e in distinct[start : start + size]]  # fmt: skip
        with loop.autocast():
            pairs = vlm.pair(collate(rows, vlm.c.side, loop.device))
        found += ((pairs[:, 0] @ pairs[:, 1].T).argmax(1).cpu() == torch.arange(size)).float().tolist()
    return found


def without_looking(vlm: VLM, tokenizer: Tokenizer, test: dict[str, list], after: dict[str, list[float]],
                    args: Namespace, loop: Loop) -> list[dict]:  # fmt: skip
    """For each kind of question: exact match with its picture, of the best constant, a blank and another picture."""
    table = []
    for kind in dict.fromkeys(e.kind for e in test["kinds"]):
        rows = [e for e in test["kinds"] if e.kind == kind]
        asked = [e.question for e in rows]
        found = {"exact match": after[kind]}
        constant, _ = Counter(e.answer for e in rows).most_common(1)[0]
        found["best constant"] = exact([constant] * len(rows), rows)
        unique = list(dict.fromkeys(asked))
        said = answers(vlm, tokenizer, [(question, pictures.BLANK) for question in unique], args, loop)
        blank = dict(zip(unique, said, strict=True))
        found["blank picture"] = exact([blank[question] for question in asked], rows)
        others = list(zip(asked, pictures.exchanged(rows), strict=True))
        found["another picture"] = exact(answers(vlm, tokenizer, others, args, loop), rows)
        means = {name: {"mean": statistics.fmean(values), "spread": None} for name, values in found.items()}
        table.append({"kind": kind, "seeds": 1, **means, "n": {"mean": len(rows), "spread": None}})
    return table


def printable(text: str) -> str:
    """What may stand in XML, where control characters may not, however they are written.

    >>> printable("1 < 2\\x00")
    '1 &lt; 2\ufffd'
    """
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def sheet(rows: Sequence[pictures.Example], said: Sequence[str]) -> str:
    """An SVG of pictures with question, answer and truth."""
    columns, cell, line = 6, 160, 18
    parts = []
    for i, (e, text) in enumerate(zip(rows, said, strict=True)):
        x, y = i % columns * cell + 8, i // columns * (cell + 34) + 8
        question, truth = e.question, e.answer
        packed = base64.b64encode(pictures.png(e.picture)).decode()
        parts.append(f'<image x="{x}" y="{y}" width="120" height="120" href="data:image/png;base64,{packed}"/>')
        kind = "right" if text == truth else "wrong"
        words = ((question, ""), (f"{text} ({truth})" if kind == "wrong" else text, kind))
        parts += [f'<text x="{x}" y="{y + 120 + line * (n + 1)}" class="{c}">{printable(words)}</text>'
                  for n, (words, c) in enumerate(words)]  # fmt: skip
    height = math.ceil(len(rows) / columns) * (cell + 34) + 8
    style = "text { font: 10px system-ui, sans-serif; fill: #555 } .right { fill: #2ca05a } .wrong { fill: #d64545 }"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * cell} {height}" '
            f'width="{columns * cell}" height="{height}">\n<style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n")


def conclude(vlm: VLM, tokenizer: Tokenizer, test: dict[str, list], before: dict[str, list[float]],
             after: dict[str, list[float]], args: Namespace, loop: Loop) -> dict:  # fmt: skip
    """Measure who does not look, write samples.svg, kinds.json and result.json."""
    baselines = {}
    if "kinds" in test:
        table = without_looking(vlm, tokenizer, test, after, args, loop)
        names = ("best constant", "blank picture", "another picture")
        total = sum(row["n"]["mean"] for row in table)
        baselines = {name: sum(row[name]["mean"] * row["n"]["mean"] for row in table) / total for name in names}
        some = [e for i, e in enumerate(test["kinds"]) if i % max(1, len(test["kinds"]) // 17) == 0]
        said = answers(vlm, tokenizer, [(e.question, e.picture) for e in some], args, loop)
        if loop.main:
            (loop.out / "samples.svg").write_text(sheet(some, said), encoding="utf-8")
            (loop.out / "kinds.json").write_text(json.dumps({"rows": table}, indent=1) + "\n")
            print(f"\n{'kind':10}{'n':>6}" + "".join(f"{name:>17}" for name in ("exact match", *names)))
            for row in table:
                shown = "".join(f"{row[name]['mean']:17.3f}" for name in ("exact match", *names))
                print(f"{row['kind']:10}{row['n']['mean']:6}{shown}")
    return loop.finish(before, after, variant=args.connector + "-siglip" * (args.contrast == "siglip"),
                       baselines=baselines, higher_is_better=next(iter(after)) != "loss")  # fmt: skip


COLUMNS = ("exact match", "colour", "shape", "size", "count", "existence", "position", "digit", "unseen compositions",
           "hallucination", "text skills")  # fmt: skip

# Checkpoints


def save_vision(vlm: VLM, folder: Path, start: str | Path) -> None:
    """Beside the language model: vision.safetensors, vision.json."""
    write_safetensors(folder / "vision.safetensors", vlm.vision())
    (folder / "vision.json").write_text(json.dumps(asdict(vlm.c) | {"start": str(start)}, indent=1) + "\n")


def vision_of(path: str | Path) -> Path | None:
    """The folder with the vision.json of a checkpoint, or of a run's folder; None if there is none."""
    folders = Path(path), Path(path) / "checkpoint"
    return next((folder for folder in folders if (folder / "vision.json").exists()), None)


def shape_of(folder: Path) -> tuple[Vision, str]:
    """What vision.json says: all sizes, and the language model that the run began with."""
    try:
        found = json.loads((folder / "vision.json").read_text())
        start = found.pop("start")
        return Vision(**found), start
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder / 'vision.json'}: not the shape of an encoder ({error!r})") from None


def load_vlm(path: str | Path, device: torch.device, c: Vision | None = None) -> tuple[VLM, Tokenizer]:
    """What a run of this file left, or, with `c`, a language model with a new encoder and a new connector."""
    folder = vision_of(path)
    if folder is None and c is None:
        raise UserError(f"{path}: no vision.json in it: this model does not see; first train it with vlm.py")
    if folder:
        c, start = shape_of(folder)
    adapter = trained(str(folder)) if folder else None
    model, tokenizer = load(start if adapter else path, with_tokenizer=True)
    model.to(device)
    if adapter:
        adapt(model, str(adapter), start, dropout=False)
    tokenizer = with_mark(tokenizer)
    vlm = VLM(model, tokenizer.special("<image>"), c)
    if folder:
        fill_vision(vlm, read_safetensors(folder / "vision.safetensors"), str(folder))
    return vlm, tokenizer


@torch.no_grad()
def fill_vision(vlm: VLM, tensors: dict[str, Tensor], where: str) -> None:
    own = vlm.vision()
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise UserError(f"{where}: {name} does not fit vision.json")
        own[name].copy_(tensors[name])


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (32, 32),
    "micro_batch_size": (32, 4),
    "max_length": (192, 1024),
    "warmup": (20, 20),
}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--epochs", "--batch-size", "--micro-batch-size", "--lr",
               "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS) | dict.fromkeys(("lr", "steps"))
        | {"epochs": 1.0, "schedule": "linear", "weight_decay": 0.01, "grad_clip": 1.0, "max_new_tokens": 64},
    )
    cli.add_argument("--image", nargs="+", metavar="FILE", help="answer: pictures, and the question after them")
    cli.add_argument("--connector", choices=(*CONNECTORS, "all"), help="or a table of all (default: mlp)")
    cli.add_argument("--contrast", choices=tuple(CONTRASTS), help="the loss of the stage contrast (default: clip)")
    cli.add_argument("--stem", choices=("conv", "patch"), help="what makes a vector of each patch (default: conv)")
    cli.add_argument("--optimizer", choices=("adamw", "muon"), help="(default: muon, at the rates of the tiny model; "
                     "adamw for a --model of your own and for --adapter)")  # fmt: skip
    cli.add_argument("--stages", nargs="+", choices=tuple(STAGES), help="of training, in this order (default: all of "
                     "them; with --data no prefer, and where --model sees already, instruct alone)")  # fmt: skip
    cli.add_argument("--pictures", type=COUNT, default=12_000, help="generated to train on (default: %(default)s)")
    cli.add_argument("--replay", type=REAL, default=0.4, metavar="SHARE", help="of conversations without pictures "
                     "among the generated rows of instruct (default: %(default)s)")  # fmt: skip
    cli.add_argument("--beta", type=REAL, default=0.1, help="of the loss of prefer (default: %(default)s)")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut"), default="refuse",
                     help="rows of more than --max-length tokens; cut: from the end, a picture only as a whole")
    cli.add_argument("--exam", default="held-out", metavar="NAME", help="another name measures on others, to choose "
                     "settings on (default: %(default)s)")  # fmt: skip
    cli.add_argument("--seeds", type=COUNT, default=1, help="runs of each connector in --connector all")
    args = cli.parse_args(argv)
    fill(args, DEFAULTS, args.model is not None)
    for is_wrong, text in (
        (args.image and len(args.image) < 2, "--image: expected one picture or more, and then the question"),
        (args.image and not args.model, "--image needs --model, a folder that vlm.py made"),
        (args.parallel == "fsdp", "--parallel fsdp: the encoder is outside of what is sharded; choose replicas"),
        (args.replay >= 1, f"--replay {args.replay}: a share of the rows below 1 is expected, or no picture is left"),
        (args.beta == 0, "--beta: expected a number above 0"),
        (args.connector == "all" and args.data, "--connector all makes a table of the generated world: no --data"),
        (args.connector == "all" and args.model and vision_of(args.model),
         "--connector all makes each connector anew: --model has one already"),
        (args.data and args.stages and "prefer" in args.stages,
         "--stages prefer knows what is there in generated pictures only: no --data"),
        (args.stages and len({*args.stages}) < len(args.stages), "--stages: each at most once"),
    ):
        if is_wrong:
            raise UserError(text)
    return args if args.connector == "all" or args.image else resolved(args)


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults that depend on others; of a --model that sees already, its own connector."""
    sees = args.model and vision_of(args.model)
    shape = shape_of(sees)[0] if sees else Vision()
    for name in ("connector", "contrast", "stem"):
        value, own = getattr(args, name), getattr(shape, name)
        if sees and value not in (None, own):
            raise UserError(f"--{name} {value}: {args.model} was made with {own}")
        setattr(args, name, value or own)
    args.stages = args.stages or (["instruct"] if sees else [s for s in STAGES if s != "prefer" or not args.data])
    if args.lr is not None and not any("model" in STAGES[name]["trains"] for name in args.stages):
        raise UserError("--lr is of stages that train the language model, which --stages does not name")
    args.optimizer = args.optimizer or ("adamw" if args.model or args.adapter else "muon")
    if args.lr is None:
        adapter = args.adapter or (trained(str(sees)) if sees else None)  # the one that --model left
        args.lr = rates_of({"lr": STAGES["instruct"]["lr"]}, adapter and str(adapter))["lr"][args.model is not None]
    if args.steps is None and args.data is None:
        args.steps = sum(STAGES[name]["steps"] for name in args.stages)
    return args


def rate(name: str, args: argparse.Namespace) -> float:
    """Peak learning rate of a stage: of those that train the language model in proportion to --lr."""
    column = args.model is not None
    if "model" not in STAGES[name]["trains"]:
        return STAGES[name]["lr"][column]
    return args.lr * STAGES[name]["lr"][column] / STAGES["instruct"]["lr"][column]


def planned(args: argparse.Namespace, n_rows: int) -> dict[str, int]:
    """{stage: its steps}: --steps divided as in STAGES, or --epochs over n_rows rows in each."""
    if args.steps is None:
        return dict.fromkeys(args.stages, math.ceil(args.epochs * n_rows / args.batch_size))
    whole, done, plan = sum(STAGES[name]["steps"] for name in args.stages), 0, {}
    for name in args.stages:
        done += STAGES[name]["steps"]
        plan[name] = round(done * args.steps / whole) - sum(plan.values())
    return plan


def see(args: argparse.Namespace) -> str:
    """--image: what the model of --model says to the pictures and the question."""
    loop = Loop(Namespace(**vars(args) | {"model": None}), "vlm")  # which writes nothing: --out may be --model
    vlm, tokenizer = load_vlm(args.model, loop.device)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    *files, question = args.image
    shown = [resized(Path(file), vlm.c.side) for file in files]
    prompt = encode(conversation([(question, "")], len(shown)), shown, tokenizer, vlm.connector.slots, ask=True)
    ((ids,),) = replies(vlm, tokenizer, [prompt], args, loop)
    print(chat.completion_text(ids, tokenizer).strip())
    return chat.completion_text(ids, tokenizer)


def main(args: argparse.Namespace) -> dict:
    if args.image:
        return see(args)
    if args.connector == "all":
        plan = planned(resolved(Namespace(**vars(args) | {"connector": "mlp"})), 0)
        columns = tuple(name for name in COLUMNS if name != "hallucination" or plan.get("prefer"))
        return compare(main, resolved, args, CONNECTORS, Path(args.out or ROOT / "out" / "vlm"), columns,
                       tuple(CONNECTORS), flag="connector")  # fmt: skip

    # 4. Setup
    loop = Loop(args, "vlm")
    start = args.model or loop.require("sft")
    vlm, tokenizer = load_vlm(start, loop.device, Vision(args.connector, args.contrast, args.stem))
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    if args.adapter:
        adapt(vlm.model, args.adapter, start, loop, dropout=False)
    loop.check_length(vlm)
    if vlm.model.prompt is not None and args.connector == "cross-attention":
        raise UserError(f"--connector cross-attention: not with the adapter {vlm.model.adapter.method}, whose "
                        "embeddings before a row are no tokens that could look at a picture")  # fmt: skip
    data = file_data(vlm, tokenizer, args, loop) if args.data else world_data(vlm, tokenizer, args, loop)
    plan = planned(args, len(data.asked))
    stages = [name for name, n in plan.items() for _ in range(n)]  # of each step
    optimizer = (Muon if args.optimizer == "muon" else adamw)(vlm, args.lr, args.weight_decay)
    loop.compile(vlm.model)
    extra = loop.restore(vlm.model, optimizer)
    if extra:
        saved = {name.removeprefix("vision."): p for name, p in extra.items() if name.startswith("vision.")}
        fill_vision(vlm, saved, "--resume")
    loop.describe(vlm)
    before = extra.get("before") or evaluate(vlm, tokenizer, data.test, args, loop)
    found, pairs, ref_logps = extra.get("pairs", []), [], torch.tensor(extra.get("ref_logps", []))

    # 5. Train
    for step in loop.steps(len(stages)):
        name = stages[step - 1]
        first = stages.index(name)  # steps before this stage
        schedule = Namespace(lr=rate(name, args), warmup=args.warmup, schedule=args.schedule)
        lr = set_lr(optimizer, schedule, step - first, plan[name])
        if name == "prefer" and step == first + 1:
            before |= hallucinations(vlm, tokenizer, data.test, args, loop)
            found = sampled_pairs(vlm, tokenizer, data.scenes, args, loop)
            pairs = pairs_of(found, vlm, tokenizer, data.scenes, args)
            with torch.no_grad():
                starts = range(0, len(pairs), args.micro_batch_size)
                parts = [scored(vlm, pairs[i : i + args.micro_batch_size], args, loop) for i in starts]
                ref_logps = torch.cat(parts) if parts else ref_logps
        rows = {"contrast": data.described, "align": data.described, "instruct": data.asked, "prefer": found}[name]
        indices = loop.micro_batches(len(rows), step - first) if rows else []  # of a model that invents nothing: none
        indices = [some for some in indices if some]  # replicas need not run an empty one
        metrics, n_tokens, loss_sum = {}, 0, torch.zeros((), device=loop.device)
        with learning(vlm, STAGES[name]["trains"]):
            if name == "prefer":
                pairs = pairs or pairs_of(found, vlm, tokenizer, data.scenes, args)
                sums = torch.zeros(3, device=loop.device)
                for some in indices:
                    logps = scored(vlm, [pairs[i] for i in some], args, loop)
                    s = Scored(logps, ref_logps[some].to(logps), None, None)  # of whose parts dpo takes two
                    losses = dpo(s, beta=args.beta, label_smoothing=0.0)
                    (losses.sum() / args.batch_size).backward()
                    margins = args.beta * margin(log_ratio(s)).detach()
                    sums += torch.stack([losses.detach().sum(), (margins > 0).float().sum(), margins.sum()])
                loss, accuracy, mean_margin = loop.sum_over_ranks(sums) / args.batch_size
                metrics = {"accuracy": accuracy, "margin": mean_margin}
            else:
                batches = [collate([rows[i] for i in some], vlm.c.side, loop.device, 64 if loop.compiled else 1)
                           for some in indices]  # fmt: skip
                n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
                if name == "contrast":
                    said = [rows[i].captions for i in loop.batch_indices(len(rows), step - first)]
                    same = torch.tensor([[a[0] == b[0] for b in said] for a in said], device=loop.device)
                    loss, metrics["top-1"] = contrast_backward(vlm, batches, same, len(said[0]) - 1, loop)
                else:
                    for batch in batches:
                        with loop.autocast():
                            loss = -answer_logps(vlm, batch).sum() / n_tokens
                        loss.backward()
                        loss_sum += loss.detach()
                    loss = loop.sum_over_ranks(loss_sum)
            loop.all_reduce(vlm)
            grad_norm = clip(vlm, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            vlm.log_scale.clamp_(max=math.log(MOST_SCALE))
        number = [*STAGES].index(name) + 1
        loop.log(step, loss=loss, stage=number, grad_norm=grad_norm, lr=lr, tokens=n_tokens, **metrics)
        if args.eval_every and loop.due("eval", step) and step < len(stages):
            metric, values = next(iter(evaluate(vlm, tokenizer, data.test, args, loop).items()))
            loop.say(f"step {step}: {metric} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            kept = {f"vision.{k}": v for k, v in vlm.vision().items()} | {"before": before}
            kept |= {"pairs": found, "ref_logps": ref_logps.tolist()}
            loop.save(step, model=vlm.model, optimizer=optimizer, tokenizer=tokenizer, extra=kept)

    # 6. Evaluate
    if loop.main and loop.done:  # with --steps 0 what lies there is another run's
        save_vision(vlm, loop.checkpoint, vlm.model.adapter.base if vlm.model.adapter else start)
    after = evaluate(vlm, tokenizer, data.test, args, loop)
    if "hallucination" in before:
        after |= hallucinations(vlm, tokenizer, data.test, args, loop)
    return conclude(vlm, tokenizer, data.test, before, after, args, loop)


if __name__ == "__main__":
    run(main, get_args)
