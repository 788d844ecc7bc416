"""Parameter-efficient fine-tuning: a few new numbers are trained, and the model itself stays as it is.

    y = W x + scale * B A x,    scale = alpha / r,    A (r, in) normal, B (out, r) zero: at first nothing has changed

(LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3.) What is trained is small, so are its gradients and the optimizer's
state, the base is never touched, and many such adapters share one base. --method picks one of the ways to put a small
part onto a frozen model below, each with its paper; their defaults are in METHODS.

    additive        adapter, parallel (modules between or beside the layers), prompt, p-tuning (embeddings before every
                    row), prefix, p-tuning-v2 (keys and values before every row), ia3 (factors)
    selective       bitfit (biases), fishmask (the weights that matter most)
    reparameterized lora (rslora=true, init=pissa, lora_plus=16, decay=5), dora, vera, qlora (on a base of 4 bits)
    hybrid          mam: a prefix in the attention, a parallel adapter at the feed-forward network

sft.py, dpo.py, ppo.py, grpo.py and vlm.py take --adapter: a method ("lora"), one with other values
("lora:rank=16,alpha=32"), or the folder of a trained one, which is trained on (a prompt of another task: SPoT,
2110.07904). There the base is its own reference: `model.frozen` shares what is frozen, and copies only the adapter.

A checkpoint is a folder in the format of the peft library (adapter_config.json, adapter_model.safetensors), which loads
those of lora, qlora, dora, prompt, p-tuning, prefix, p-tuning-v2 and ia3, as `adapt` loads peft's.

    python lora.py                                                         the tiny model learns to sort the other way
    python lora.py --model DIR --data rows.jsonl --method dora             a real model, real rows
    python lora.py --merge --model DIR --adapter out/lora/checkpoint --out out/merged      a plain checkpoint
    torchrun --nproc-per-node 8 lora.py --model DIR --data rows.jsonl
    python lora.py --method all                                            a table of all methods

In the generated world the task is new to the model (--task new: sort from large to small, of which it never heard) or
one that it knows under another name (--task known). Measured, greedy, on held-out questions: `task`, exact match;
`old skills`, exact match on the questions of sft.py, where forgetting shows; `trainable %`, of all parameters;
`optimizer MB`, Adam's two moments. The last lines: `task: 0.00 before, 0.9x after`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import re
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from data import chat, world
from data.formats import UserError
from data.tokenizer import Tokenizer, save_hf
from loop import COUNT, ROOT, Loop, RunFailed, adamw, clip, compare, fill, parser, run, set_lr, told
from model import Transformer, load, read_safetensors, save, stored_dtype, their_names, write_safetensors

# 1. The objective

# It is that of sft.py. What is new is of which numbers it is a function: of those of the modules below.


def wide(x: Tensor) -> Tensor:
    """x in fp32, if it is not in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NF4Linear(nn.Module):
    """A frozen matrix in 4-bit NormalFloat, made whole for each product and not kept (QLoRA, 2305.14314, section 3)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        codes, scales, steps, mean, self.shape = kernels.nf4_quantize(linear.weight)
        for name, tensor in (("codes", codes), ("scales", scales), ("steps", steps), ("mean", mean)):
            self.register_buffer(name, tensor)

    def dequantized(self) -> Tensor:
        q = kernels.NF4(self.codes, self.scales, self.steps, self.mean, self.shape)
        return kernels.nf4_dequantize(q, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        nothing = x.new_zeros(0, self.in_features), x.new_zeros(0, 1)
        return kernels.lora_linear(x, self.dequantized, self.bias, *nothing, (), 0.0)

    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.steps, self.mean))


class LowRank(nn.Module):
    """A frozen matrix `base`, and beside some of its rows scale * B A: what lora, dora and vera have in common.

    rows: {name: (start, end)} of those of the matrices below each other in `base` (q, k, v; gate, up) that have factors
    of their own. `down` (P r, in) and `up` (sum of end - start, r) hold the A and the B of all P of them.
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Linear | NF4Linear, rows: dict[str, tuple[int, int]], c: "Adapter"):
        super().__init__()
        self.base, self.rows, self.rank, self.dropout = base, rows, c.rank, c.dropout
        self.scale = c.alpha / (math.sqrt(c.rank) if c.rslora else c.rank)  # rsLoRA: 2312.03732
        self.n_out = sum(end - start for start, end in rows.values())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.dequantized if isinstance(self.base, NF4Linear) else self.base.weight
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        rows = tuple(self.rows.values())
        return kernels.lora_linear(x, weight, self.base.bias, self.down, self.up, rows, self.scale, dropped)

    def parts(self) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
        """(name, its rows, A, B) of each; A and B are views."""
        sizes = [end - start for start, end in self.rows.values()]
        parts = zip(self.rows.items(), self.down.split(self.rank), self.up.split(sizes), strict=True)
        for (name, span), down, up in parts:
            yield name, slice(*span), down, up

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A, B) of each: what is added to the base as it was loaded is scale * B A."""
        for name, _, down, up in self.parts():
            yield name, down, up

    def base_weight(self) -> Tensor:
        return wide((self.base.dequantized() if isinstance(self.base, NF4Linear) else self.base.weight).detach())

    @torch.no_grad()
    def weight(self) -> Tensor:
        """W + scale * B A (out, in), in fp32."""
        weight = self.base_weight().clone()
        for _, rows, down, up in self.parts():
            weight[rows] += self.scale * (wide(up) @ wide(down))
        return weight


class LoRA(LowRank):
    """A normal and B zero (2106.09685); B may learn lora_plus times as fast as A (LoRA+, 2402.12354).

    decay: weight decay of A and B. It draws B A to 0, and so the model to what it was (of dora the directions alone),
    where that of full fine-tuning draws all weights to 0; L2-SP (1802.01483) has a copy of the first weights for that.

    init=pissa: both begin as the r largest singular directions of W, which the base then lacks (2404.02948, eq. 2-4).
    """

    def __init__(self, base: nn.Linear | NF4Linear, rows: dict[str, tuple[int, int]], c: "Adapter"):
        super().__init__(base, rows, c)
        device = self.base_weight().device
        down = torch.randn(len(rows) * c.rank, base.in_features, device=device) / math.sqrt(base.in_features)
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(self.n_out, c.rank, device=device))
        self.up.lr_times = c.lora_plus
        self.down.decay = self.up.decay = c.decay
        self.first: list[tuple[Tensor, Tensor]] = []  # of pissa, each A and B as it began
        if c.init == "pissa":
            self._take_principal_directions()

    @torch.no_grad()
    def _take_principal_directions(self) -> None:
        weight = self.base_weight()
        for name, rows, down, up in self.parts():
            u, s, vt = torch.linalg.svd(weight[rows], full_matrices=False)
            root = (s[: self.rank] / self.scale).sqrt()
            if self.rank > len(s):
                raise UserError(f"init=pissa: rank is {self.rank}, and {name} has {len(s)} directions")
            up.copy_(u[:, : self.rank] * root)
            down.copy_(root[:, None] * vt[: self.rank])
        rest = 2 * weight - self.weight()
        self.base.weight = nn.Parameter(rest.to(self.base.weight.dtype), requires_grad=False)
        self.first = [(down.clone(), up.clone()) for _, _, down, up in self.parts()]

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of pissa twice the rank, for a base that lacks nothing: B A - B_first A_first."""
        if not self.first:
            yield from super().factors()
        for (name, _, down, up), (down0, up0) in zip(self.parts(), self.first, strict=bool(self.first)):
            yield name, torch.cat([down, -down0]), torch.cat([up, up0], dim=1)


class DoRA(LoRA):
    """magnitude * (W + scale B A) / |W + scale B A|, row by row, the norms without gradient (2402.09353, 4.3)."""

    def __init__(self, base: nn.Linear, rows: dict[str, tuple[int, int]], c: "Adapter"):
        super().__init__(base, rows, c)
        self.magnitude = nn.Parameter(self._norms())

    def _norms(self) -> Tensor:
        """(n_out,)"""
        norms = torch.linalg.vector_norm(super().weight(), dim=1)
        return torch.cat([norms[start:end] for start, end in self.rows.values()])

    def _ratio(self) -> Tensor:
        """(out,): magnitude / norm, exactly 1 at first, and 1 in rows that are not adapted."""
        ratio, ones = self.magnitude / self._norms(), self.magnitude.new_ones(self.base.out_features)
        where = torch.cat([torch.arange(*span, device=ratio.device) for span in self.rows.values()])
        return ones.index_copy(0, where, ratio)

    def forward(self, x: Tensor) -> Tensor:
        y, bias = super().forward(x), 0.0 if self.base.bias is None else self.base.bias
        return y + ((self._ratio() - 1) * (y - bias)).to(y.dtype)

    @torch.no_grad()
    def weight(self) -> Tensor:
        return super().weight() * self._ratio()[:, None]


class VeRA(LowRank):
    """A = d * (random, frozen) and B = b * (random, frozen): only the vectors b and d learn (2310.11454).

    The random matrices come from a seed and are one pair for all that are of one shape; they need not be stored.
    """

    def __init__(self, base: nn.Linear, rows: dict[str, tuple[int, int]], c: "Adapter"):
        super().__init__(base, rows, c)
        self.d = nn.Parameter(torch.full((len(rows) * c.rank,), 0.1, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(self.n_out, device=base.weight.device))
        g = torch.Generator().manual_seed(0)
        for name, n, m in (("fixed_down", len(self.d), base.in_features), ("fixed_up", self.n_out, c.rank)):
            self.register_buffer(name, (torch.randn(n, m, generator=g) / math.sqrt(m)).to(base.weight.device))

    @property
    def down(self) -> Tensor:
        return self.d[:, None] * self.fixed_down

    @property
    def up(self) -> Tensor:
        return self.b[:, None] * self.fixed_up


class IA3(nn.Module):
    """A frozen matrix whose input (of_input), or some of whose outputs, are multiplied by l, 1 at first.

    (2205.05638, section 3.3: keys, values, and what enters the last matrix of the feed-forward network.)
    """

    def __init__(self, base: nn.Linear, rows: dict[str, tuple[int, int]], of_input: bool):
        super().__init__()
        self.base, self.rows, self.of_input = base, rows, of_input
        n = base.in_features if of_input else sum(end - start for start, end in rows.values())
        self.l = nn.Parameter(torch.ones(n, device=base.weight.device))

    def factor(self) -> Tensor:
        """(in,) or (out,)"""
        if self.of_input:
            return self.l
        where = torch.cat([torch.arange(*span, device=self.l.device) for span in self.rows.values()])
        return self.l.new_ones(self.base.out_features).index_copy(0, where, self.l)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor().to(x.dtype)
        return self.base(x * factor) if self.of_input else self.base(x) * factor

    @torch.no_grad()
    def weight(self) -> Tensor:
        weight = wide(self.base.weight)
        return weight * self.factor() if self.of_input else weight * self.factor()[:, None]

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        if self.base.bias is None or self.of_input:
            return self.base.bias
        return (self.base.bias * self.factor()).to(self.base.bias.dtype)


class Bottleneck(nn.Module):
    """base(x) + up(gelu(down(base(x)))) (Houlsby et al. 2019, 1902.00751), `up` zero at first.

    parallel: base(x) + scale * up(relu(down(x))), beside the base instead of behind it (2110.04366, table 6).
    """

    def __init__(self, base: nn.Module, config_width: int, c: "Adapter", parallel: bool):
        super().__init__()
        self.base, self.parallel, self.scale = base, parallel, c.alpha
        like = next(base.parameters())
        self.down = nn.Linear(config_width, c.width, device=like.device)
        self.up = nn.Linear(c.width, config_width, device=like.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.parallel:
            return y + self.scale * self.up(F.relu(self.down(x)))
        return y + self.up(F.gelu(self.down(y)))


class Prompt(nn.Module):
    """n embeddings before every row (2104.08691), which begin as those of tokens drawn from the vocabulary.

    lstm: they are what a recurrent network and two layers make of n free embeddings (P-tuning, 2103.10385).
    """

    def __init__(self, model: Transformer, c: "Adapter", lstm: bool):
        super().__init__()
        embed = model.embed.weight.detach()
        self.embeddings = nn.Parameter(embed[torch.randint(len(embed), (c.tokens,))].float().clone())
        self.encoder = None
        if lstm:
            D = embed.shape[1]
            self.encoder = nn.LSTM(D, D // 2, bidirectional=True, batch_first=True, device=embed.device)
            self.layers = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)).to(embed.device)
            self.size = embed.float().std().item()

    def forward(self) -> Tensor:
        """(n, D)"""
        if self.encoder is None:
            return self.embeddings
        with torch.autocast(self.embeddings.device.type, enabled=False):  # few CPUs have a recurrent network in bf16
            made = self.encoder(self.embeddings[None] / self.size)[0][0]
        return self.layers(made) * self.size


class Prefix(nn.Module):
    """n keys and values before every row in every layer (2101.00190), free ones (P-Tuning v2, 2110.07602).

    mlp: they are what two layers make of n free embeddings, which learns more steadily (2101.00190, section 4.3).
    """

    def __init__(self, model: Transformer, c: "Adapter", mlp: bool):
        super().__init__()
        config, device = model.config, model.embed.weight.device
        self.shape = c.tokens, config.depth, 2, config.kv_heads, config.head_dim
        n_out = math.prod(self.shape[1:])
        self.embeddings = nn.Parameter(torch.randn(c.tokens, config.width if mlp else n_out, device=device) * 0.1)
        self.layers = None
        if mlp:
            layers = nn.Linear(config.width, c.width), nn.Tanh(), nn.Linear(c.width, n_out)
            self.layers = nn.Sequential(*layers).to(device)

    def forward(self) -> Tensor:
        """(n, depth, 2, Hkv, d)"""
        return (self.embeddings if self.layers is None else self.layers(self.embeddings)).view(self.shape)


# How each method is put onto a model whose parameters are all frozen


def linears(model: Transformer) -> Iterator[tuple[str, nn.Linear, dict[str, tuple[int, int]]]]:
    """(path, matrix, {Hugging Face name: its rows}) of every matrix of every block."""
    for path, module in model.named_modules():
        if path.startswith("blocks.") and isinstance(module, nn.Linear):
            names, sizes = their_names(model.config, f"{path}.weight")
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))] or [module.out_features]
            spans = zip([0, *ends], ends, strict=False)
            yield path, module, {name.removesuffix(".weight"): span for name, span in zip(names, spans, strict=True)}


def put_at(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def put_low_rank(model: Transformer, c: "Adapter") -> None:
    kind, found = {"lora": LoRA, "qlora": LoRA, "dora": DoRA, "vera": VeRA}[c.method], []
    for path, linear, rows in list(linears(model)):
        rows = {name: span for name, span in rows.items() if re.search(c.targets, name)}
        base = NF4Linear(linear) if c.method == "qlora" else linear
        put_at(model, path, kind(base, rows, c) if rows else base)
        found += rows
    check_targets(found, c)


def put_ia3(model: Transformer, c: "Adapter") -> None:
    found = []
    for path, linear, rows in list(linears(model)):
        if rows := {name: span for name, span in rows.items() if re.search(c.targets, name)}:
            put_at(model, path, IA3(linear, rows, of_input=all("down_proj" in name for name in rows)))
        found += rows
    check_targets(found, c)


def check_targets(found: list[str], c: "Adapter") -> None:
    if not found:
        raise UserError(f"targets {c.targets!r}: in the name of no matrix, such as model.layers.0.self_attn.q_proj")


def put_adapter(model: Transformer, c: "Adapter") -> None:
    for block in model.blocks:
        block.attention.out = Bottleneck(block.attention.out, model.config.width, c, parallel=False)
        block.ffn.down = Bottleneck(block.ffn.down, model.config.width, c, parallel=False)


def put_parallel(model: Transformer, c: "Adapter") -> None:
    for block in model.blocks:
        block.ffn = Bottleneck(block.ffn, model.config.width, c, parallel=True)


def put_prompt(model: Transformer, c: "Adapter") -> None:
    model.prompt, model.virtual = Prompt(model, c, lstm=c.method == "p-tuning"), c.tokens


def put_prefix(model: Transformer, c: "Adapter") -> None:
    model.prefix, model.virtual = Prefix(model, c, mlp=c.method == "prefix"), c.tokens


def put_mam(model: Transformer, c: "Adapter") -> None:
    put_prefix(model, c)
    put_parallel(model, c)


def put_bitfit(model: Transformer, c: "Adapter") -> None:
    """Biases alone learn (2106.10199); a Llama has none, and every matrix gets one, zero at first."""
    for _, linear, _ in linears(model):
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(bias.float())


def put_all(model: Transformer, c: "Adapter") -> None:
    model.requires_grad_(True)


@dataclass(frozen=True)
class Adapter:
    """A method and its hyperparameters; those that the method does not have stay as they are here and mean nothing."""

    method: str
    lr: float = 1.0  # times the learning rate of full fine-tuning
    rank: int = 0
    alpha: float = 1.0  # scale = alpha / rank; of parallel adapters the scale itself
    rslora: bool = False
    dropout: float = 0.0
    init: str = "zero"
    lora_plus: float = 1.0
    decay: float = 0.0  # of A and B, added to --weight-decay
    targets: str = ""  # regular expression, searched in names like model.layers.0.self_attn.q_proj
    tokens: int = 0  # positions before every row
    width: int = 0  # between two layers
    share: float = 0.0  # of the weights that fishmask lets learn
    base: str = ""  # where the model came from
    fingerprint: str = ""  # of its weights

    def save(self, model: Transformer, tokenizer: Tokenizer | None, path: Path) -> None:
        """Write a folder that `adapt` reads, and peft if it knows the method; `model.save` calls this."""
        config, tensors = to_peft(model, self)
        write_safetensors(path / "adapter_model.safetensors", {name: t.detach() for name, t in tensors.items()})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        own = {"fingerprint": self.fingerprint, "lora_plus": self.lora_plus, "decay": self.decay}
        own |= {"method": "qlora"} if self.method == "qlora" else {}
        (path / "base.json").write_text(json.dumps(own) + "\n")  # what peft has no place for
        if tokenizer:
            save_hf(tokenizer, path)


OF_LORA = {"lr": 5.0, "rank": 8, "alpha": 16.0, "rslora": False, "dropout": 0.0, "lora_plus": 1.0, "decay": 0.0,
           "targets": "_proj$"}  # fmt: skip
METHODS = {  # name: (what puts it there, {hyperparameter: default})
    "full": (put_all, {"lr": 1.0}),
    "lora": (put_low_rank, OF_LORA | {"init": "zero"}),
    "dora": (put_low_rank, OF_LORA),
    "qlora": (put_low_rank, OF_LORA),
    "vera": (put_low_rank, {"lr": 200.0, "rank": 64, "alpha": 64.0, "targets": "_proj$"}),
    "adapter": (put_adapter, {"lr": 30.0, "width": 16}),
    "parallel": (put_parallel, {"lr": 20.0, "width": 32, "alpha": 4.0}),
    "prompt": (put_prompt, {"lr": 500.0, "tokens": 16}),
    "p-tuning": (put_prompt, {"lr": 30.0, "tokens": 16}),
    "prefix": (put_prefix, {"lr": 50.0, "tokens": 16, "width": 64}),
    "p-tuning-v2": (put_prefix, {"lr": 1000.0, "tokens": 16}),
    "ia3": (put_ia3, {"lr": 300.0, "targets": "(k|v|down)_proj$"}),
    "bitfit": (put_bitfit, {"lr": 300.0}),
    "fishmask": (put_all, {"lr": 10.0, "share": 0.05}),
    "mam": (put_mam, {"lr": 20.0, "tokens": 16, "width": 32, "alpha": 4.0}),
}
IN_PLACE = ("full", "fishmask")  # change the weights themselves: a checkpoint is a plain one
BEFORE_ROWS = ("prompt", "p-tuning", "prefix", "p-tuning-v2")  # change no matrix: those may be of quantize.py


def parse(text: str) -> Adapter:
    """'lora' or 'lora:rank=16,alpha=32' as an Adapter; UserError for what is not there."""
    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise UserError(f"adapter {text}: expected the folder of one, or one of {', '.join(METHODS)}")
    found = dict(METHODS[method][1])
    for name, _, value in (pair.partition("=") for pair in filter(None, rest.split(","))):
        if name not in found:
            raise UserError(f"adapter {text}: {method} has {', '.join(found)}, and no {name}")
        try:
            kind = type(found[name])
            re.compile(value if name == "targets" else "")
            found[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError, re.error):
            raise UserError(f"adapter {text}: {name} is like {found[name]}, found {value!r}") from None
    for names, is_ok, wanted in (
        (("rank", "tokens", "width"), lambda value: value >= 1, "at least 1"),
        (("lr", "alpha", "lora_plus"), lambda value: 0 < value < math.inf, "a number above 0"),
        (("dropout",), lambda value: 0 <= value < 1, "from 0 to below 1"),
        (("decay",), lambda value: 0 <= value < math.inf, "at least 0"),
        (("share",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
        (("init",), lambda value: value in ("zero", "pissa"), "zero or pissa"),
    ):
        for name in names:
            if name in found and not is_ok(found[name]):
                raise UserError(f"adapter {text}: {name} is {found[name]}, expected {wanted}")
    if found.get("init") == "pissa" and found["decay"]:
        raise UserError(f"adapter {text}: decay draws the model to its base, of which init=pissa took the best part")
    return Adapter(method, **found)


def adapt(model: Transformer, text: str, base: str | Path, loop: Loop | None = None, *, dropout: bool = True
          ) -> Adapter:  # fmt: skip
    """Put the adapter `text` (see `parse`), or the trained one in that folder, onto `model`, and freeze the rest.

    base: where the model came from, for the adapter's own folder. UserError if the folder's is of another base, or if
    the model is quantized and the method none of BEFORE_ROWS. With a `loop`, what is frozen is kept in --dtype, and a
    line says what learns. Without `dropout` there is none, whatever `text` says: log-probs that are compared must come
    from one network, not from random parts of it.
    """
    if model.adapter is not None:
        raise UserError(f"adapter {text}: the model has one already; merge that first")
    tensors, mark = None, fingerprint(model)
    if folder := trained(text):
        c, tensors = from_peft(folder)
        if c.fingerprint not in ("", mark):  # a folder of peft itself has none
            raise UserError(f"{text}: was trained on another base than this model, {c.base}")
    else:
        c = parse(text)
    c = replace(c, base=str(base), fingerprint=mark, dropout=c.dropout if dropout else 0.0)
    if c.method == "fishmask" and loop and loop.script != "lora":
        raise UserError(f"adapter {text}: lora.py alone finds which weights matter: python lora.py --method fishmask")
    scheme = model.config.quantization
    if scheme and (c.method not in BEFORE_ROWS or scheme["activations"] == 8):  # rounded tokens pass no gradient on
        raise UserError(f"adapter {text}: the matrices of {base} are quantized; adapt what they were made from")
    model.requires_grad_(False)
    if loop and c.method not in IN_PLACE:
        loop.narrow(model)  # first: the norms of dora are those of the base as it is kept
    METHODS[c.method][0](model, c)
    model.adapter = None if c.method in IN_PLACE else c
    if tensors is not None:
        ours = to_peft(model, c)[1]  # views of the parameters
        for name, tensor in ours.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise UserError(f"{text}: {name} of shape {tuple(tensor.shape)} is expected")
            with torch.no_grad():
                tensor.copy_(tensors.pop(name))
        if tensors:
            raise UserError(f"{text}: no place for {min(tensors)} in this model")
    if loop and c.method != "fishmask":  # which has not seen its data yet
        loop.say(described(model, c))
    return c


def trained(text: str) -> Path | None:
    """The folder of the adapter in `text`, which may be that of its run; None if `text` is no such folder."""
    folders = Path(text), Path(text) / "checkpoint"
    return next((folder for folder in folders if (folder / "adapter_config.json").exists()), None)


def rates_of(table: dict[str, tuple], adapter: str | None) -> dict[str, tuple]:
    """`table`, whose "lr" are rates of full fine-tuning, with as many times these as `adapter` asks for."""
    if not adapter:
        return table
    c = from_peft(folder)[0] if (folder := trained(adapter)) else parse(adapter)
    return table | {"lr": tuple(c.lr * lr for lr in table["lr"])}


def fingerprint(model: Transformer) -> str:
    """A hash of names, shapes and some of the values of all weights, rounded to bf16, so that it outlives a cast."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        some = flat[:: max(1, len(flat) // 4096)].cpu().bfloat16().view(torch.int16)
        found.update(f"{name} {tuple(p.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def n_learning(model: Transformer) -> int:
    return sum(getattr(p, "learns", p.numel()) for p in model.parameters() if p.requires_grad)


def n_held(model: Transformer) -> int:
    """How many numbers have moments in the optimizer: under fishmask all, though few of them move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def described(model: Transformer, c: Adapter) -> str:
    """Which modules were adapted, the share of parameters that learn, the optimizer's memory, the bits of qlora."""
    whole, trained = sum(p.numel() for p in model.parameters()), n_learning(model)
    quantized = [m for m in model.modules() if isinstance(m, NF4Linear)]
    n, size = sum(math.prod(m.shape) for m in quantized), sum(m.n_bytes() for m in quantized)
    total = size + sum(p.numel() * p.element_size() for p in model.parameters())
    bits = f"; {8 * size / n:.2f} bits a quantized weight, {total / 1e6:.2f} MB the whole model" if n else ""
    whole += n
    kinds = (LowRank, IA3, Bottleneck, Prompt, Prefix)
    where = sorted({re.sub(r"\.\d+\.", ".*.", name) for name, m in model.named_modules() if isinstance(m, kinds)})
    return (f"{c.method} on {', '.join(where) or 'the weights themselves'}: {trained:,} of {whole:,} parameters learn "
            f"({trained / whole:.2%}), {8 * n_held(model) / 1e6:.2f} MB for Adam{bits}")  # fmt: skip


def merge(model: Transformer) -> dict[str, nn.Module]:
    """Put each adapted matrix in the place of its parts, in fp32, then cast once; returns what `unmerge` puts back."""
    adapted = {path: m for path, m in model.named_modules() if isinstance(m, LowRank | IA3)}
    if not adapted:
        why = f"{model.adapter.method} is no matrix" if model.adapter else "there is none, or it was merged before"
        raise UserError(f"the adapter cannot be merged: {why}")
    bases = {f"{path}.base" for path in adapted}
    if left := [path for path, m in model.named_modules() if isinstance(m, NF4Linear) and path not in bases]:
        raise UserError(f"the adapter cannot be merged: {left[0]} is quantized, and in none of its targets")
    for path, module in adapted.items():
        weight, bias = module.weight(), module.bias() if isinstance(module, IA3) else module.base.bias
        dtype = module.base.dtype if isinstance(module.base, NF4Linear) else module.base.weight.dtype
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        put_at(model, path, linear)
    adapted[""], model.adapter = model.adapter, None
    return adapted


def unmerge(model: Transformer, adapted: dict[str, nn.Module]) -> None:
    """Undo `merge`: the base gets its own bytes back."""
    model.adapter = adapted.pop("")
    for path, module in adapted.items():
        put_at(model, path, module)


# peft's format. Its names stand for views of our parameters, so that the same table writes and reads.

ROOT_NAME = "base_model.model."
KNOWN = {"lora": "LORA", "qlora": "LORA", "dora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING",
         "p-tuning": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "p-tuning-v2": "PREFIX_TUNING"}  # fmt: skip


def to_peft(model: Transformer, c: Adapter) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, {name in adapter_model.safetensors: tensor}).

    What peft does not know has our own names. A pissa adapter becomes an ordinary one of twice the rank on the whole
    base, and of p-tuning and prefix only what their networks make is kept, as by peft.
    """
    config = {"peft_type": KNOWN.get(c.method, c.method.upper()), "task_type": "CAUSAL_LM", "inference_mode": True,
              "base_model_name_or_path": c.base or None}  # fmt: skip
    tensors: dict[str, Tensor] = {}
    if config["peft_type"] == "LORA":
        for m in (m for m in model.modules() if isinstance(m, LowRank)):
            for name, down, up in m.factors():
                tensors |= {f"{ROOT_NAME}{name}.lora_A.weight": down, f"{ROOT_NAME}{name}.lora_B.weight": up}
            if isinstance(m, DoRA):
                parts = zip(m.rows, m.magnitude.split([end - start for start, end in m.rows.values()]), strict=True)
                tensors |= {f"{ROOT_NAME}{name}.lora_magnitude_vector": part for name, part in parts}
        times = 2 if c.init == "pissa" else 1
        alpha = c.alpha * (math.sqrt(times) if c.rslora else times)  # of `times` the rank, and the same scale
        config |= {"r": times * c.rank, "lora_alpha": alpha, "lora_dropout": c.dropout, "use_rslora": c.rslora,
                   "use_dora": c.method == "dora", "bias": "none"}  # fmt: skip
    elif c.method == "ia3":
        for m in (m for m in model.modules() if isinstance(m, IA3)):
            sizes = [len(m.l)] if m.of_input else [end - start for start, end in m.rows.values()]
            shape = (1, -1) if m.of_input else (-1, 1)
            parts = zip(m.rows, m.l.split(sizes), strict=True)
            tensors |= {f"{ROOT_NAME}{name}.ia3_l": part.view(shape) for name, part in parts}
        of_input = (m for m in model.modules() if isinstance(m, IA3) and m.of_input)
        config["feedforward_modules"] = [name for m in of_input for name in m.rows]
    elif config["peft_type"] == "PROMPT_TUNING":
        tensors["prompt_embeddings"] = model.prompt()
        config |= {"num_virtual_tokens": c.tokens, "token_dim": model.config.width, "num_transformer_submodules": 1,
                   "num_attention_heads": model.config.heads, "num_layers": model.config.depth}  # fmt: skip
    elif config["peft_type"] == "PREFIX_TUNING":
        tensors["prompt_embeddings"] = model.prefix().flatten(1)
        config |= {"num_virtual_tokens": c.tokens, "token_dim": model.config.kv_heads * model.config.head_dim,
                   "num_transformer_submodules": 1, "num_attention_heads": model.config.kv_heads,
                   "num_layers": model.config.depth, "prefix_projection": False}  # fmt: skip
    else:
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        config["hyperparameters"] = {name: getattr(c, name) for name in METHODS[c.method][1]}
    if config["peft_type"] in ("LORA", "IA3"):
        config["target_modules"] = [name for m in model.modules() if isinstance(m, LowRank | IA3) for name in m.rows]
    return config, tensors


def from_peft(path: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in the folder `path`, and its tensors; UserError for what lora.py cannot represent."""
    tensors = read_safetensors(path / "adapter_model.safetensors")
    names = {re.sub(r"\.(lora_.*|ia3_l)$", "", name.removeprefix(ROOT_NAME)) for name in tensors}
    targets = f"^({'|'.join(map(re.escape, sorted(names)))})$"
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        own = json.loads((path / "base.json").read_text()) if (path / "base.json").exists() else {}
        kind = str(config["peft_type"])
        for name in ("alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
                     "layer_replication", "alora_invocation_tokens"):  # fmt: skip
            if config.get(name):
                raise UserError(f"{path}: {name} is not supported")
        if (init := str(config.get("init_lora_weights")).lower()).startswith(("pissa", "olora", "corda", "loftq")):
            raise UserError(f"{path}: init_lora_weights {init} changed the base; have peft convert it to plain LoRA")
        if config.get("bias", "none") != "none":
            raise UserError(f"{path}: bias {config['bias']} is not supported")
        if kind == "LORA":
            c = Adapter("dora" if config.get("use_dora") else "lora", rank=int(config["r"]), targets=targets,
                        alpha=float(config["lora_alpha"]), rslora=bool(config.get("use_rslora")),
                        dropout=float(config.get("lora_dropout", 0.0)))  # fmt: skip
        elif kind == "IA3":
            c = Adapter("ia3", targets=targets)
        elif kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
            method = "p-tuning-v2" if kind == "PREFIX_TUNING" else "prompt"
            c = Adapter(method, tokens=int(config["num_virtual_tokens"]))
        elif kind.lower() in METHODS:
            c = Adapter(kind.lower(), **config["hyperparameters"])
        else:
            raise UserError(f"{path}: peft_type {kind} is not supported")
        c = replace(c, lr=METHODS[c.method][1]["lr"], base=str(config.get("base_model_name_or_path")), **own)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'adapter_config.json'}: no configuration of an adapter ({error!r})") from None
    return c, tensors


def fish_mask(model: Transformer, losses: Iterator[Tensor], share: float) -> None:
    """Let only that `share` of the weights learn whose Fisher information is largest (FishMask, 2111.09839, eq. 4).

    losses: -log p of one row each; the information of a weight is the mean of its squared gradient. The others get a
    gradient of 0, with which AdamW without decay leaves them as they are.
    """
    totals = {p: torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()}
    for loss in losses:
        loss.backward()
        for p, total in totals.items():
            total += p.grad.float().square()
        model.zero_grad()
    flat = torch.cat([total.flatten() for total in totals.values()])
    least = flat.topk(max(1, round(share * len(flat)))).values[-1]
    for p, total in totals.items():
        mask = (total >= least).to(p.dtype)
        p.register_hook(lambda grad, mask=mask: grad * mask)
        p.learns = int(mask.sum())


# 2. Data

TASKS = ("new", "known")


def skill_of(task: str) -> world.Skill:
    """Sorting from large to small, of which the model never heard; or from small to large, by a new name."""
    return world.HELD_BACK if task == "new" else replace(world.SKILLS["sort"], task="arrange {x}")


def exchange(task: str, key: tuple, split: str) -> dict:
    """A question of `task`, in any of the world's wordings, and its answer; operands are of `split`."""
    rng, skill = world.rng_for("lora", task, *key), skill_of(task)
    known_as = skill if task == "new" else world.SKILLS["sort"]  # by which name the base model's text is split
    problem = world.draw_problem(known_as, rng, split)
    question = rng.choice(world.TEMPLATES).format(task=skill.task.format(**problem))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": skill.solve(problem)}]
    return {"messages": messages, "part": "task", "answer": skill.solve(problem)}


def examples(args: argparse.Namespace, tokenizer: Tokenizer, loop: Loop) -> tuple[list[chat.Row], dict[str, list]]:
    """The rows to train on, and what sft.evaluate measures."""
    import sft  # which imports this file

    if args.data:
        train, held_out = sft.file_rows(args, args.data, loop)
        encoded = ([sft.encode(row, tokenizer) for row in some] for some in (train, held_out))
        rows, test = (sft.fitting(*some, args, loop) for some in zip(encoded, ("rows", "held-out rows"), strict=True))
        if not rows or not test:
            raise UserError(f"no row is left to train on or to measure: --max-length is {args.max_length}")
        return rows, {"rows": test}
    chats = (exchange(args.task, (args.seed, i), "train") for i in range(args.steps * args.batch_size))
    questions = [exchange(args.task, ("test", i), "test") for i in range(400)] + world.sft_test(20)
    if args.questions == "validation":
        asked = {row["messages"][0]["content"] for row in questions}
        others = [exchange(args.task, ("validation", i), "test") for i in range(400)] + world.sft_test(20, seed=1)
        questions = [row for row in others if row["messages"][0]["content"] not in asked]
    rows = sft.fitting((chat.render(row["messages"], tokenizer) for row in chats), "rows", args, loop)
    if args.steps and not rows:
        raise UserError(f"no row is left to train on: --max-length is {args.max_length}")
    return rows, {"questions": questions}


def measured(model: Transformer, tokenizer: Tokenizer, test: dict[str, list], args: argparse.Namespace, loop: Loop
             ) -> dict[str, list[float]]:  # fmt: skip
    """{metric: one number a held-out row}; the first is what the run is for."""
    from sft import evaluate

    found = evaluate(model, tokenizer, test, args, loop)
    return found if args.data else {"task": found["task"], "old skills": found["exact match"]}


# 3. Config

DEFAULTS = {  # flag: (the tiny model), (a --model of your own)
    "batch_size": (32, 16),
    "micro_batch_size": (32, 4),
    "max_length": (128, 1024),
    "warmup": (10, 10),
    "lr": (1e-4, 1e-5),  # of full fine-tuning: that of a method is as many times that as METHODS says
}
KEEPS = "lora:targets=(gate|up)_proj$,rank=16,alpha=32,decay=5"  # found by --questions validation: keeps old skills
RATES = {  # what --tune tries, as multiples of the rate of DEFAULTS
    "full": (0.5, 1.0, 1.5, 2.5, 5.0, 10.0),
    "lora": (2.5, 5.0, 10.0, 20.0, 40.0),
    KEEPS: (5.0, 10.0, 20.0, 40.0),
}
WORLD_STEPS = 300  # --steps where the rows are made as they are needed
TABLE = ("full", "full:lr=5", "lora:rank=1", "lora:rank=4", "lora", f"{KEEPS},lr=20", "lora:init=pissa",
         "lora:lora_plus=8,lr=2", "dora", "qlora", "vera", "adapter", "parallel", "prompt", "p-tuning", "prefix",
         "p-tuning-v2", "ia3", "bitfit", "fishmask", "mam")  # fmt: skip
MAIN_METHODS = ("full", "lora", f"{KEEPS},lr=20", "qlora")  # which --method all runs with --seeds seeds
COLUMNS = ("task", "old skills", "known task", "trainable %", "optimizer MB", "peak MB")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    cli = parser(
        __doc__,
        flags=("--model", "--data", "--out", "--steps", "--epochs", "--batch-size", "--micro-batch-size", "--lr",
               "--warmup", "--schedule", "--weight-decay", "--grad-clip", "--max-length", "--max-new-tokens",
               "--eval-data", "--chat-format", "--seed", "--device", "--dtype", "--compile", "--parallel",
               "--log-every", "--eval-every", "--save-every", "--resume", "--adapter"),
        defaults=told(DEFAULTS) | {"steps": None, "epochs": 1.0, "schedule": "linear", "weight_decay": 0.0,
                                   "grad_clip": 1.0, "max_new_tokens": 32},
    )
    cli.epilog = ("methods, and what may follow them, as in lora:rank=16,alpha=32 (lr: times --lr, the rate of full):\n"
                  + listed())
    cli.add_argument("--method", default="lora", metavar="NAME", help="see below, or all: a table (default: lora)")
    cli.add_argument("--task", choices=TASKS, default="new", help="of the generated world: a new skill, or a "
                     "known one under a new name (default: %(default)s)")  # fmt: skip
    cli.add_argument("--questions", choices=("test", "validation"), default="test", help="what is measured: the "
                     "questions of the tables, or others, to choose settings on (default: %(default)s)")  # fmt: skip
    cli.add_argument("--tune", nargs="*", choices=("full", "lora"), metavar="METHOD", help="a table of learning "
                     "rates, on validation questions, of full or lora (default: of both; DoRA and QLoRA share LoRA's)")
    cli.add_argument("--merge", action="store_true", help="write --model with --adapter merged into it, and end")
    cli.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of the JSONL files")
    cli.add_argument("--too-long", choices=("refuse", "drop", "cut", "split"), default="refuse",
                     help="rows of more than --max-length tokens (default: %(default)s)")
    cli.add_argument("--seeds", type=COUNT, default=1, help=f"runs of {', '.join(MAIN_METHODS)} in --method all")
    cli.set_defaults(stage="sft", mix={})  # which sft.file_rows asks for
    args = cli.parse_args(argv)
    if args.steps is None and args.data is None:
        args.steps = WORLD_STEPS
    table = "--tune" if args.tune is not None else "--method all" if args.method == "all" else ""
    for is_wrong, text in (
        (table and args.data, f"{table} makes a table of the generated world: it takes no --data"),
        (table and args.adapter, f"{table} makes a table of all methods: it takes no --adapter"),
        (args.merge and not (args.adapter and args.model), "--merge needs --model, the base, and --adapter"),
        (args.parallel == "fsdp", "--parallel fsdp: an adapter is too small to shard; choose replicas"),
    ):
        if is_wrong:
            raise UserError(text)
    return args if table else resolved(args)


def listed() -> str:
    """The methods with their hyperparameters, a line each."""
    pairs = ((name, " ".join(f"{key}={value}" for key, value in hyper.items())) for name, (_, hyper) in METHODS.items())
    return "\n".join(f"  {name:12} {text}" for name, text in pairs)


SAME_TASK = ("data", "model", "task", "questions", "steps", "batch_size", "max_length", "chat_format")


def stored(args: argparse.Namespace) -> dict[str, float]:
    """What full fine-tuning reaches on the same task, from the committed table."""
    path, usual = ROOT / "results" / "tables" / "lora.json", get_args([])
    same = all(getattr(args, flag) == getattr(usual, flag) for flag in SAME_TASK)
    if not same or not path.exists():
        return {}
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    names = ("task", "old skills")
    return {f"{name} of full fine-tuning (stored, of another run)": rows["full"][name]["mean"] for name in names}


def merged_checkpoint(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace, loop: Loop) -> dict:
    """--merge: a plain checkpoint in the dtype of the base's; says how much of the change a narrow one keeps."""
    is_base = loop.out.resolve() in (folder.resolve() for folder in (Path(args.model), Path(args.model, "checkpoint")))
    names = ("checkpoint", "adapter_config.json", "model.safetensors.index.json")
    if held := ["the base"] * is_base + [name for name in names if (loop.out / name).exists()]:
        raise UserError(f"--out {loop.out} holds {held[0]}: choose another folder for the merged checkpoint")
    dtype, base = stored_dtype(args.model), load(args.model, device=loop.device)[0]
    merge(model)
    asked = lost = 0.0
    for p, old in zip(model.parameters(), base.parameters(), strict=True):
        change, kept = p.detach() - old.detach(), p.detach().to(dtype).float() - old.detach()
        asked, lost = asked + change.square().sum().item(), lost + (change - kept).square().sum().item()
        p.data = p.data.to(dtype)
    save(model, tokenizer, loop.out)
    share = 1 - math.sqrt(lost / asked) if asked else 1.0
    loop.say(f"merged into {loop.out}, in {str(dtype)[6:]}, which keeps {share:.1%} of the change")
    return {"kept": share}


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the defaults of its --method, or of --adapter."""
    fill(args, rates_of(DEFAULTS, args.adapter or args.method), args.model is not None)
    return args


def at_rate(method: str, times: float) -> str:
    return f"{method}{',' if ':' in method else ':'}lr={times:g}"


def tuned(rows: list[dict]) -> dict[str, float]:
    """{method: the least rate that answers 98% as many questions of the new task as its best}, of the `rows` of --tune.

    Old skills are not looked at: who tunes for a task does not know what will be asked afterwards.
    """
    found: dict[str, dict[float, float]] = {}
    for row in rows[1:]:  # the first is the model before
        name, rate = re.split("[:,]lr=", row["method"])
        found.setdefault(name, {})[float(rate)] = row["task"]["mean"]
    return {name: min(rate for rate, right in rates.items() if right >= 0.98 * max(rates.values()))
            for name, rates in found.items()}  # fmt: skip


def both_tasks(args: argparse.Namespace) -> None:
    """A row of the table: the run of `args`, and one of the same method on the task that the model knows.

    Each is a process of its own, so that its peak of memory is its own, too; both run at once, on half of the cores.
    """
    outs = {task: args.out / task for task in ("known", "new")}
    runs = [argparse.Namespace(**vars(args) | {"task": task, "out": out}) for task, out in outs.items()]
    processes = [multiprocessing.get_context("spawn").Process(target=quiet, args=(run,)) for run in runs]
    for process in processes:
        process.start()
    for process, task in zip(processes, outs, strict=True):
        process.join()
        if process.exitcode:
            raise RunFailed(f"{args.method} on the {task} task ended with exit code {process.exitcode}")
    results = [json.loads((out / "result.json").read_text()) for out in outs.values()]
    results[1]["metrics"]["known task"] = {name: results[0][name] for name in ("before", "after", "n", "ci95")}
    shutil.copy(outs["new"] / "settings.json", args.out)
    (args.out / "result.json").write_text(json.dumps(results[1], indent=1) + "\n")  # last: the row is finished


def quiet(args: argparse.Namespace) -> None:
    if multiprocessing.parent_process():
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    with contextlib.redirect_stdout(io.StringIO()):
        main(args)


def main(args: argparse.Namespace) -> dict:
    from sft import collate, sft_loss  # which imports this file

    if args.tune is not None:
        names = [name for name in RATES if not args.tune or name.partition(":")[0] in args.tune]
        variants = [at_rate(name, times) for name in names for times in RATES[name]]
        args = argparse.Namespace(**vars(args) | {"tune": None, "questions": "validation"})
        table = compare(main, resolved, args, variants, Path(args.out or ROOT / "out" / "lora-tune"), COLUMNS[:2], (),
                        flag="method")  # fmt: skip
        print("\n".join(f"{at_rate(*best)} is enough" for best in tuned(table["rows"]).items()))
        return table
    if args.method == "all":
        return compare(both_tasks, resolved, args, TABLE, Path(args.out or ROOT / "out" / "lora"), COLUMNS,
                       MAIN_METHODS, flag="method")  # fmt: skip

    # 4. Setup
    loop = Loop(args, "lora")
    start = args.model or loop.require("sft")
    model, tokenizer = load(start, with_tokenizer=not args.merge)
    model.to(loop.device)
    n_whole = sum(p.numel() for p in model.parameters())
    adapter = adapt(model, args.adapter or args.method, start, None if args.merge else loop)  # which may narrow it
    if args.merge:
        return merged_checkpoint(model, tokenizer, args, loop)
    loop.check_length(model)
    tokenizer = tokenizer.with_chat_format(args.chat_format)
    rows, test = examples(args, tokenizer, loop)
    total = args.steps if args.steps is not None else math.ceil(args.epochs * len(rows) / args.batch_size)
    if adapter.method == "fishmask" and args.weight_decay:
        raise UserError("--method fishmask: --weight-decay would move all weights, masked or not")
    if adapter.method == "fishmask":
        some = (sft_loss(model, collate([[row]], loop.device)) for row in rows[:64])
        fish_mask(model, some, adapter.share)
        loop.say(described(model, adapter))
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model)
    extra = loop.restore(model, optimizer)
    loop.describe(model)
    before = extra.get("before") or measured(model, tokenizer, test, args, loop)

    # 5. Train
    for step in loop.steps(total):
        lr = set_lr(optimizer, args, step, total)
        groups = [[rows[i] for i in some] for some in loop.micro_batches(len(rows), step)]
        batches = [collate([[row] for row in some], loop.device, 64 if loop.compiled else 1) for some in groups]
        n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
        n_read = loop.sum_over_ranks(sum(len(row.input_ids) for some in groups for row in some))
        loss_sum = 0.0
        for batch in batches:
            with loop.autocast():
                loss = sft_loss(model, batch) / n_tokens
            loss.backward()
            loss_sum += loss.detach()
        loop.all_reduce(model)
        grad_norm = clip(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(step, loss=loop.sum_over_ranks(loss_sum), grad_norm=grad_norm, lr=lr, tokens=n_read)
        if args.eval_every and loop.due("eval", step) and step < total:
            name, values = next(iter(measured(model, tokenizer, test, args, loop).items()))
            loop.say(f"step {step}: {name} {statistics.fmean(values):.3f}")
        if loop.due("save", step):
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer, extra={"before": before})

    # 6. Evaluate
    after = measured(model, tokenizer, test, args, loop)
    n = n_learning(model)
    sizes = ("trainable %", 100.0, 100 * n / n_whole), ("optimizer MB", 8 * n_whole / 1e6, 8 * n_held(model) / 1e6)
    before |= {name: [whole] for name, whole, _ in sizes}
    after |= {name: [part] for name, _, part in sizes}
    return loop.finish(before, after, variant=adapter.method if args.adapter else args.method, baselines=stored(args),
                       higher_is_better=not args.data)  # fmt: skip


if __name__ == "__main__":
    run(main, get_args)
