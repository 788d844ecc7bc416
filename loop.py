"""What surrounds every method: flags, device and dtype, seeds, ranks, schedule, bar, log, checkpoint, resume, result.

It is not a trainer. Each script keeps its own training step in sight and calls what it needs from here:

    loop = Loop(args, "sft")                                # device, dtype, seed, ranks, out/sft
    model = loop.shard(model.to(loop.device))               # nothing to do unless --parallel fsdp
    optimizer = adamw(model, args.lr, args.weight_decay)
    loop.compile(model)                                     # --compile auto|on|off, decided once
    loop.restore(model, optimizer)                          # nothing to do unless --resume
    for step in loop.steps(total):                          # 1, 2, ..., total; the bar; notices Ctrl-C
        batches = [collate(rows, indices) for indices in loop.micro_batches(len(rows), step)]
        n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))
        for batch in batches:
            with loop.autocast():
                loss = loss_sum(model, batch) / n_tokens    # this micro-batch's sum / the tokens of the whole step
            loss.backward()
        loop.all_reduce(model)                              # SUMS gradients over ranks, once a step
        grad_norm = clip(model, args.grad_clip)
        lr = set_lr(optimizer, args, step, total)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(step, loss=..., grad_norm=grad_norm, lr=lr, tokens=n_tokens)
        if loop.due("save", step):
            loop.save(step, model=model, optimizer=optimizer, tokenizer=tokenizer)
    loop.finish(before, after)                              # {metric: one number a held-out row}, each

Three rules make a resume exact and the split into ranks and micro-batches irrelevant. The rows of step k are a pure
function of (seed, k). Every generator (python, numpy, torch) is seeded anew at each step from (seed, step, rank), so
that there is no random state to store. A loss is a sum over tokens divided by the tokens of the whole optimizer step.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from data.chat import FORMATS
from data.formats import UserError
from data.world import VERSION
from model import Transformer, load, read_safetensors, save, write_safetensors

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock around a stage that is being built, and no figure for peak memory
    fcntl = resource = None

ROOT = Path(__file__).resolve().parent
STAGES = {  # stage: the command that makes it, and how long that takes on two CPU cores
    "base": ("sft.py --stage base", "4 minutes"),
    "sft": ("sft.py", "2 minutes"),
    "judge": ("sft.py --model out/sft/checkpoint --max-length 160 --micro-batch-size 16 --optimizer muon --lr 2e-3 "
              "--mix judge=40 --steps 140", "half a minute"),
    "reward": ("reward.py", "1 minute"),
    "prm": ("reward.py --feedback steps", "1 minute"),
}
NEEDS = {"sft": "base", "judge": "sft", "reward": "sft", "prm": "sft"}  # what the command of a stage starts from
FILES = ("data", "eval_data", "prompts", "constitution")  # flags whose content counts, not only their path


class RunFailed(Exception):
    """The run itself failed (NaN, disk, memory): one line on stderr, exit code 1."""


# 1. The command line


def _number(kind: Callable, least: float, wanted: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < math.inf:  # NaN fails
                return value
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")

    return convert


COUNT = _number(int, 1, "a whole number of at least 1")
WHOLE = _number(int, 0, "a whole number of at least 0")
REAL = _number(float, 0.0, "a finite number of at least 0")
OPEN = object()  # no default for all: each script has its own

COMMON = {  # flag: (type or choices, default, help), in the order of every script
    "--model": (str, None, "Hugging Face checkpoint directory to start from"),
    "--data": (str, None, "JSONL file to train on in place of the generated world"),
    "--out": (Path, None, "folder that the run writes to (default: out/NAME in the repository; "
              "out/NAME-custom where out/NAME is a stage of other settings)"),
    "--depth": (COUNT, OPEN, "blocks of a new model, of width 32 * depth"),
    "--steps": (WHOLE, OPEN, "optimizer steps"),
    "--epochs": (REAL, OPEN, "passes over the rows, where --steps is not given"),
    "--batch-size": (COUNT, OPEN, "rows in one optimizer step, over all ranks"),
    "--micro-batch-size": (COUNT, OPEN, "rows in one forward pass on one rank; less needs less memory"),
    "--lr": (REAL, OPEN, "peak learning rate"),
    "--warmup": (WHOLE, OPEN, "steps of linear warm-up"),
    "--schedule": (
        ("cosine", "linear", "wsd", "constant"),
        OPEN,
        "after the warm-up: down to 10%%; down to 0; level, then down to 0 in the last 30%%; level",
    ),
    "--weight-decay": (REAL, OPEN, "AdamW's decay, on matrices only"),
    "--grad-clip": (REAL, OPEN, "largest gradient norm; 0 never clips"),
    "--max-length": (COUNT, OPEN, "tokens in the longest row"),
    "--max-new-tokens": (COUNT, OPEN, "tokens in the longest sampled completion"),
    "--eval-data": (str, None, "JSONL file to measure on in place of held-out rows of --data"),
    "--chat-format": (FORMATS, None, "of conversations, where the checkpoint does not say or says otherwise"),
    "--seed": (WHOLE, 0, "of the data order, new weights and all noise"),
    "--device": (("auto", "cpu", "cuda", "mps"), "auto", "auto takes the fastest there is"),
    "--dtype": (("auto", "fp32", "bf16"), "auto", "of the forward pass; auto is bf16 on CUDA, else fp32"),
    "--compile": (("auto", "on", "off"), "auto", "torch.compile; auto is on for CUDA"),
    "--parallel": (("replicas", "fsdp"), "replicas", "what the ranks of torchrun hold: copies or shards"),
    "--log-every": (WHOLE, 10, "steps between lines of metrics.jsonl; 0: the first and last only"),
    "--eval-every": (WHOLE, 0, "steps between measurements; 0: only at the end"),
    "--save-every": (WHOLE, 0, "steps between checkpoints; 0: only at the end"),
    "--resume": (bool, False, "continue the run in --out, which must have the same settings"),
    "--adapter": (str, None, "train a small part on a frozen model: a method of lora.py (lora, or lora:rank=16) or the "
                             "folder of a trained one"),
}
# What a resumed run may change: where and how it computes, never what. Of --seeds, each run has one.
FREE = {"out", "micro_batch_size", "rollout_batch", "device", "compile", "parallel", "log_every", "eval_every",
        "save_every", "resume", "seeds"}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        if getattr(found, "eval_data", None) and not found.data:
            self.error("--eval-data stands in for held-out rows of --data: name that, too")
        return found


def parser(doc: str, *, flags: tuple[str, ...], defaults: dict[str, object]) -> argparse.ArgumentParser:
    """A parser with the common `flags` ("--lr", ...) in their one order; the script adds its own afterwards.

    `defaults` ({"lr": 1e-3, ...}) must hold those that COMMON leaves open and may replace the others. A dictionary,
    {kind of run: value}, is told by --help; the flag itself is None and left to `fill`.
    """
    made = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for flag in sorted(flags, key=list(COMMON).index):
        kind, default, text = COMMON[flag]
        name = flag[2:].replace("-", "_")
        default = defaults[name] if default is OPEN else defaults.get(name, default)
        if kind is bool:
            made.add_argument(flag, action="store_true", default=default, help=text)
            continue
        typed = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": name.split("_")[-1].upper()}
        if isinstance(default, dict):
            text += f" (default: {', '.join(f'{value} {kind}'.strip() for kind, value in default.items())})"
            default = None
        text += "" if default is None else " (default: %(default)s)"
        made.add_argument(flag, default=default, help=text, **typed)
    return made


def fill(args: argparse.Namespace, table: dict[str, tuple], column: int) -> None:
    """Give every flag of `table` ({name: its value in each kind of run}) that was not set the value of `column`."""
    for name, values in table.items():
        if getattr(args, name) is None:
            setattr(args, name, values[column])


def told(table: dict[str, tuple], kinds: tuple[str, ...] = ("", "with --model")) -> dict[str, dict]:
    """A table of `fill` as defaults of `parser`, whose --help then says them all.

    >>> told({"lr": (1e-3, 1e-5)})
    {'lr': {'': 0.001, 'with --model': 1e-05}}
    """
    return {name: dict(zip(kinds, values, strict=True)) for name, values in table.items()}


def run(main: Callable, get_args: Callable) -> None:
    """`main(get_args())` with the exit codes of every script: 0 done, 1 run failed, 2 bad input, 130 interrupted."""
    args = None
    try:
        args = get_args()
        main(args)
        code = 0
    except UserError as error:
        code, line = 2, str(error)
    except RunFailed as error:
        code, line = 1, str(error)
    except KeyboardInterrupt as error:
        code, line = 130, str(error) or "interrupted"
    except (OSError, MemoryError, RuntimeError) as error:
        code, line = 1, _explain(error, args)
        if not line:
            raise  # a bug keeps its traceback
    if code:
        rank, line = int(os.environ.get("RANK", "0")), " ".join(line.split())
        if rank == 0 or code != 130:  # an interruption is agreed on by all; other ranks may have failures of their own
            print(f"rank {rank}: {line}" if rank else line, file=sys.stderr, flush=True)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def _explain(error: Exception, args: argparse.Namespace | None) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"step {Loop.step}: disk full ({error}); make room, then go on from the last checkpoint with --resume"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        sizes = [s for s in ("micro_batch_size", "batch_size", "max_length", "depth") if getattr(args, s, None)]
        flags = [f"--{s.replace('_', '-')} (now {getattr(args, s)})" for s in sizes[:2]]
        return f"step {Loop.step}: out of memory: lower {' or '.join(flags) or 'the size of the model'}"
    return ""


# 2. The optimizer


def _fp32_masters(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad and p.dtype != torch.float32:  # bf16 would lose updates below 1/256 of a weight
            p.data = p.data.float()


def refuse_quantized(model: nn.Module) -> None:
    """UserError if a Transformer in `model` is to learn whose matrices are integers: all else of it would, unasked."""
    of_integers = (m for m in model.modules() if isinstance(m, Transformer) and m.config.quantization)
    if any(m.embed.weight.requires_grad for m in of_integers):
        raise UserError("--model: its matrices are quantized, and integers do not learn; train first, quantize then")


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the trainable parameters of `model`, made fp32 in place; only matrices (2 or more dimensions) decay.

    A parameter may have a factor of its own for the rate, `lr_times`, and more decay than others, `decay`.
    """
    refuse_quantized(model)
    _reshard(model)
    _fp32_masters(model)
    groups: dict[tuple, list[nn.Parameter]] = {}
    for p in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim < 2):  # matrices first
        decay = weight_decay + getattr(p, "decay", 0.0) if p.ndim >= 2 else 0.0
        groups.setdefault((decay, getattr(p, "lr_times", 1.0)), []).append(p)
    settings = [{"params": ps, "weight_decay": decay, "lr_times": times} for (decay, times), ps in groups.items()]
    return torch.optim.AdamW(settings, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(step: int, total: int, lr: float, warmup: int, schedule: str) -> float:
    """The rate of step 1 <= `step` <= `total`: lr/warmup, 2 lr/warmup, ..., lr, then what `schedule` says.

    cosine: to 10%. linear: to 0. wsd (warm-up, stable, decay; arXiv 2404.06395): level, and to 0 in the last 30% of the
    steps. The floor belongs to the step after the last, so that no step is spent on a rate of 0.
    """
    if step <= warmup:
        return lr * step / warmup
    done = (step - 1 - warmup) / max(1, total - warmup)  # 0 at the first step after the warm-up
    if schedule == "cosine":
        return lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "wsd":
        return lr * min(1.0, (total + 1 - step) / math.ceil(0.3 * total))
    return lr * (1 - done) if schedule == "linear" else lr


def set_lr(optimizer: torch.optim.Optimizer, args: argparse.Namespace, step: int, total: int | None = None) -> float:
    """Give every parameter group the learning rate of `step` of `total` (default --steps), and return it.

    A parameter that was marked with `lr_times` learns that many times as fast (lora.py).
    """
    total = args.steps if total is None else total
    if step == 1 and total <= args.warmup and not (dist.is_initialized() and dist.get_rank()):
        tqdm.write(f"--warmup {args.warmup}: it takes all of the {total} steps, and the rate hardly comes to --lr, or "
                   "not at all; lower it, or take more --steps or --epochs", file=sys.stderr)  # fmt: skip
    lr = learning_rate(step, total, args.lr, args.warmup, args.schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_times", 1.0)
    return lr


def sharded(x: nn.Module | Tensor) -> bool:
    """Whether each rank holds a part of x (FSDP), told by its methods: importing their classes takes 0.7 s."""
    return hasattr(x, "reshard" if isinstance(x, nn.Module) else "full_tensor")


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient of `model` down to norm `max_norm` (0: leave it); return the norm it had, over all shards."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor() if sharded(norm) else norm


# 3. The loop


class Loop:
    """One run of `script` with `args`; it writes to --out, or else to out/`out` or out/`script` in the repository.

    Never into the folder of a stage that it is not: without --out it writes to out/NAME-custom then.
    """

    step = 0  # the step in hand; on the class, so that run() can name it when it fails

    def __init__(self, args: argparse.Namespace, script: str, *, out: str | None = None):
        self.args, self.script, self.identity = args, script, _identity(args)
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.main = self.rank == 0
        self.out = Path(args.out) if args.out else self._home(out or script)
        self.checkpoint, self.metrics_file = self.out / "checkpoint", self.out / "metrics.jsonl"
        self.device, dtype = _device(args.device), getattr(args, "dtype", "auto")
        on_cuda = self.device.type == "cuda"
        bf16 = on_cuda and torch.cuda.is_bf16_supported() if dtype == "auto" else dtype == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if on_cuda:
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if on_cuda else "gloo")
        launcher = f"torchrun --nproc-per-node {self.world_size}" if self.world_size > 1 else "python"
        self.command = f"{launcher} {shlex.join(sys.argv)}"
        self.compiled = self.signalled = self.stopping = False
        self.done = self.total = 0  # steps finished, steps wanted
        self.seconds, self.tokens = 0.0, 0  # of training, before the last resume
        self.unchecked: list[tuple[int, str, Tensor | float]] = []  # losses whose value nobody has looked at yet
        Loop.step = 0
        starts = [getattr(args, name, None) for name in ("model", "adapter", "reward_model", "prm", "judge")]
        for start in filter(None, starts + (getattr(args, "teacher", None) or "").split(",")):
            if self.checkpoint.resolve() in (Path(start).resolve(), (Path(start) / "checkpoint").resolve()):
                self._refuse_out()
        _recover(self.checkpoint)
        self.resume = getattr(args, "resume", False)
        if self.resume:
            if not (self.checkpoint / "training.json").exists():
                raise UserError(f"--resume: nothing to resume in {self.out}")
            if changed := _differences(self._notes()["identity"], self.identity):
                raise UserError(f"--resume: the run in {self.out} has other settings: {changed}")
        self.seed(0)

    def _refuse_out(self) -> NoReturn:
        raise UserError(f"--out {self.out}: the run starts from what is there; choose another folder")

    def _home(self, name: str) -> Path:
        """out/`name`; if that is a stage, later scripts start from it: only a run with its settings may write there."""
        if name in STAGES:
            mine = (stage for stage, (command, _) in STAGES.items() if command.split()[0] == f"{self.script}.py")
            same = next((stage for stage in mine if _of_stage(stage) == self.identity), None)
            if not same:
                self.say(f"these are not the settings of the stage out/{name}: writing to out/{name}-custom")
            name = same or f"{name}-custom"
        return ROOT / "out" / name

    def say(self, text: str) -> None:
        """Print a line once, above the bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    # Randomness and data order

    def seed(self, step: int) -> None:
        """Seed python, numpy and torch from (--seed, step, rank); step 0, of the new weights, is alike on all ranks."""
        seed = int(np.random.SeedSequence([self.args.seed, step, self.rank if step else 0]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        if self.device.type == "cpu":  # torch.manual_seed would note for CUDA, until that is used, who asked each time
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)  # the CPU's generator as well

    def batch_indices(self, n_rows: int, step: int) -> list[int]:
        """The --batch-size rows of `step`, over all ranks: the next in an endless run of seeded permutations."""
        places = range((step - 1) * self.args.batch_size, step * self.args.batch_size)
        return [int(_order(n_rows, self.args.seed, place // n_rows)[place % n_rows]) for place in places]

    def micro_batches(self, n_rows: int, step: int) -> Iterator[list[int]]:
        """This rank's rows of `step`, at most --micro-batch-size at a time.

        All ranks get equally many lists, the last one shorter or EMPTY on some: those run a row of padding without a
        supervised token, because all ranks must take part in what --parallel fsdp gathers.
        """
        rows = self.batch_indices(n_rows, step)
        size = self.args.micro_batch_size or len(rows)
        for start in range(0, math.ceil(len(rows) / self.world_size), size):
            yield rows[self.rank :: self.world_size][start : start + size]

    # Ranks

    def sum_over_ranks(self, value: float | Tensor) -> float | Tensor:
        """The sum of `value` over ranks, in the type it came in; whole numbers are exact up to 2^53."""
        if self.world_size == 1:
            return value
        wide = torch.float64 if not isinstance(value, Tensor) else value.dtype
        total = torch.as_tensor(value, dtype=wide, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total if isinstance(value, Tensor) else type(value)(total.item())

    def all_reduce(self, model: nn.Module) -> None:
        """Sum the gradients of `model` over ranks; FSDP did so in the backward pass.

        A parameter without a gradient counts as zero on that rank, and keeps none if it has none on any.
        """
        if self.world_size == 1 or sharded(model):
            return
        trainable = [p for p in model.parameters() if p.requires_grad]
        used = torch.tensor([p.grad is not None for p in trainable], dtype=torch.int32, device=self.device)
        dist.all_reduce(used)
        under_way = []
        for p, n in zip(trainable, used.tolist(), strict=True):
            if n:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                under_way.append(dist.all_reduce(p.grad, async_op=True))
        for work in under_way:
            work.wait()

    def shard(self, model: nn.Module) -> nn.Module:
        """Under --parallel fsdp, split weights, gradients and optimizer state over ranks, block by block, in place.

        The root (embedding, final norm, head) stays whole from `hidden` to the end of the backward pass, because the
        loss kernels take `model.head.weight` itself. Masters are fp32, gathered in --dtype; gradients are summed.
        """
        if self.world_size == 1 or self.args.parallel != "fsdp":
            return model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        _fp32_masters(model)
        narrow = None if self.dtype == torch.float32 else self.dtype
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy, reshard_after_forward=module is not model)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "hidden")  # which hidden_before calls
        return model

    # Precision and speed

    def autocast(self) -> contextlib.AbstractContextManager:
        """The forward pass in --dtype; weights, gradients and optimizer stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def narrow(self, model: nn.Module) -> None:
        """Keep the frozen matrices of the blocks in --dtype, to which autocast would round them at each use."""
        for p in model.blocks.parameters():
            if p.ndim == 2 and not p.requires_grad:
                p.data = p.data.to(self.dtype)

    def compile(self, model: nn.Module, *, dynamic: bool = False) -> None:
        """Compile kernels.py and the blocks of `model`, in place, if --compile says so; auto means on CUDA.

        Each padded length is compiled on its own. With `dynamic`, a few graphs serve every (B, T): rollouts come in too
        many shapes for one each.

        On a CPU the eager kernels are faster: sft.py --stage base reads 19,000 tokens a second, compiled 14,500.
        """
        wanted = self.args.compile == "on" or (self.args.compile == "auto" and self.device.type == "cuda")
        self.compiled = kernels.use_compile(wanted)  # says so, and stays off, where there is no compiler
        if self.compiled:
            # one graph for each padded length, with and without gradient, for whole batches and for the last
            torch._dynamo.config.recompile_limit = max(64, 4 * math.ceil(self.args.max_length / 64))
            for block in model.blocks:
                block.compile(dynamic=dynamic)

    def check_length(self, model: nn.Module) -> None:
        """UserError if `model` cannot read --max-length tokens."""
        if self.args.max_length > (most := model.context):
            raise UserError(f"--max-length {self.args.max_length}: the model reads at most {most} tokens")

    def describe(self, model: nn.Module) -> None:
        """Print what runs where, and an estimate of the memory that it needs."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # of a DTensor: the whole
        n, c, a = sum(p.numel() for p in model.parameters()), model.config, self.args
        state = 16 * trained + self.dtype.itemsize * (n - trained)  # trained: weight, gradient and two moments in fp32
        packed = [m for m in model.modules() if hasattr(m, "codes")]  # 4 bits and the like, which are no parameters
        n += sum(math.prod(m.shape) for m in packed)
        state += sum(b.numel() * b.element_size() for b in model.buffers())
        state /= self.world_size if sharded(model) else 1
        rows = a.micro_batch_size or a.batch_size
        kept = rows * a.max_length * c.depth * (16 * c.width + 3 * c.ffn_width) * self.dtype.itemsize  # for backward
        ranks = f" on {self.world_size} ranks ({a.parallel})" if self.world_size > 1 else ""
        kind = f"{self.device.type}{ranks}, {str(self.dtype)[6:]}{', compiled' if self.compiled else ''}"
        share = f" ({trained / n:.1%} of them learn)" if trained < n else ""
        self.say(f"{self.script}: {n / 1e6:.2f}M parameters{share}, {kind}; about {state / 1e6:,.0f} MB for weights "
                 f"and optimizer, up to {kept / 1e6:,.0f} MB for {rows} rows of {a.max_length} tokens")  # fmt: skip

    # Steps

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps that remain up to `total`, from 1 or the one after the checkpoint; notice Ctrl-C, SIGTERM.

        After a first signal, due("save") says yes at the end of the step, and KeyboardInterrupt with the command that
        resumes is raised once the script has saved; a second signal stops at once.
        """
        self.total = total
        self._open_out()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        pause = 0.2 if sys.stderr.isatty() else 20.0  # in a log file, a line now and then
        self.bar = tqdm(total=total, initial=self.done, desc=self.script, unit="step", mininterval=pause,
                        maxinterval=pause, dynamic_ncols=True, disable=not self.main)  # fmt: skip
        self.started, self.last_log = time.perf_counter(), (time.perf_counter(), self.tokens)
        try:
            for step in range(self.done + 1, total + 1):
                Loop.step = step
                self.seed(step)
                yield step
                self.done = step
                self.bar.update()
                if self.stopping:
                    resume = self.command if self.resume else f"{self.command} --resume"
                    raise KeyboardInterrupt(f"interrupted after step {step}, which is saved; go on with: {resume}")
        finally:
            self.seconds, self.started = self._elapsed(), None
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        if self.signalled:
            raise KeyboardInterrupt(f"stopped at once in step {Loop.step}; the last checkpoint is kept")
        self.signalled = True
        os.write(2, f"\nfinishing and saving step {Loop.step}; once more stops at once\n".encode())  # print cannot nest

    def due(self, name: str, step: int) -> bool:
        """Whether "log", "eval" or "save" is due after `step`: every --NAME-every, at the end, a save if interrupted.

        All ranks ask for "save" at every step: that is where they agree on an interruption.
        """
        if name == "save":
            self.stopping = self.sum_over_ranks(int(self.signalled)) > 0
        every = getattr(self.args, f"{name}_every")
        return step == self.total or (every > 0 and step % every == 0) or (name == "save" and self.stopping)

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.started if self.started else 0.0)

    # Log

    def log(self, step: int, *, tokens: int = 0, **metrics: float | Tensor) -> None:
        """Note the numbers of `step`; when due, write them to metrics.jsonl and show the first three beside the bar.

        `tokens` is what the step trained on, over all ranks. A loss or grad_norm that is not finite fails the run and
        names its step; it is looked at when a log or a save is due, so that a GPU need not wait at every step.
        """
        self.tokens += tokens
        metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.unchecked += [(step, name, metrics[name]) for name in ("loss", "grad_norm") if name in metrics]
        if step > 1 and not self.due("log", step):
            return
        self._check_finite()
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        line["seconds"], now, (then, before) = round(self._elapsed(), 3), time.perf_counter(), self.last_log
        if self.tokens > before:
            line["tokens_per_second"] = round((self.tokens - before) / max(now - then, 1e-9), 1)
        self.last_log = now, self.tokens
        if self.main:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({name: f"{values[name]:.4g}" for name in list(values)[:3]}, refresh=False)

    def _check_finite(self) -> None:
        for step, name, value in self.unchecked:
            if not math.isfinite(value):
                raise RunFailed(f"step {step}: {name} is {float(value)}; {self._kept()}; lower --lr or --grad-clip")
        self.unchecked = []

    # Checkpoints

    def save(self, step: int, *, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None,
             tokenizer=None, extra: dict[str, object] | None = None) -> None:  # fmt: skip
        """Write OUT/checkpoint: the model as a Hugging Face directory, and what a resume needs as safetensors and JSON.

        `extra` is what else the method carries over: tensors, and values that JSON can hold. All ranks call it. The
        folder is written and flushed beside the old one and renamed, so that a kill at any moment leaves a whole one.
        """
        self._check_finite()
        extra, state = extra or {}, optimizer.state_dict()["state"] if optimizer else {}
        tensors = {f"optimizer.{i}.{key}": _whole(v) for i, values in state.items() for key, v in values.items()}
        tensors |= {f"extra.{key}": _whole(v) for key, v in extra.items() if isinstance(v, Tensor)}
        if getattr(model, "adapter", None):  # its own folder may hold what was made of them
            tensors |= {f"model.{name}": _whole(p) for name, p in model.named_parameters() if p.requires_grad}
        notes = {"step": step, "seconds": self._elapsed(), "tokens": self.tokens, "identity": self.identity}
        notes["extra"] = {key: v for key, v in extra.items() if not isinstance(v, Tensor)}
        if sharded(model):
            _reshard(model)
            weights = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
            if self.main:
                model = Transformer(model.config)
                model.load_state_dict(weights)
        if self.main:
            new = self.out / "checkpoint.new"
            try:
                shutil.rmtree(new, ignore_errors=True)
                if model is not None:
                    save(model, tokenizer, new)
                new.mkdir(parents=True, exist_ok=True)
                write_safetensors(new / "training.safetensors", tensors)
                (new / "training.json").write_text(json.dumps(notes))
                _publish(new, self.checkpoint)
            except OSError as error:
                shutil.rmtree(new, ignore_errors=True)
                _recover(self.checkpoint)
                raise RunFailed(f"step {step}: checkpoint not saved ({error}); {self._kept()}") from error
        if self.world_size > 1:
            dist.barrier()  # a rank that exits first would have torchrun kill rank 0 in the middle of writing

    def restore(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> dict:
        """With --resume, load OUT/checkpoint into `model` and `optimizer` in place and cut metrics.jsonl to its step.

        Returns the saved `extra`; {} without --resume. On a CPU the run then goes on as if it had never stopped.
        """
        if not self.resume:
            return {}
        notes, tensors = self._notes(), read_safetensors(self.checkpoint / "training.safetensors")
        if model is not None:
            _reshard(model)
            if not getattr(model, "adapter", None):
                own, saved = model.state_dict(), load(self.checkpoint, labels=None)[0].state_dict()
            else:  # the rest is frozen, and was loaded with the base
                own = {name: p for name, p in model.named_parameters() if p.requires_grad}
                saved = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
            if own.keys() != saved.keys():
                odd = sorted(own.keys() ^ saved.keys())
                raise UserError(f"{self.checkpoint}: not the weights of this model ({', '.join(odd[:3])})")
            for name, tensor in own.items():
                tensor.data.copy_(_split_like(tensor, saved[name]))
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for _, i, key in (name.split(".") for name in tensors if name.startswith("optimizer.")):
                saved = tensors[f"optimizer.{i}.{key}"]
                state.setdefault(int(i), {})[key] = saved if key == "step" else _split_like(parameters[int(i)], saved)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.done, self.seconds, self.tokens = notes["step"], notes["seconds"], notes["tokens"]
        if self.main:
            lines = [line for line in self._lines() if line["step"] <= self.done]
            _write(self.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
        self.say(f"resumed after step {self.done}")
        return notes["extra"] | {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}

    def _kept(self) -> str:
        return f"that of step {self._notes()['step']} is kept" if self.checkpoint.exists() else "none was saved before"

    def _notes(self) -> dict:
        return json.loads((self.checkpoint / "training.json").read_text())

    def _lines(self) -> list[dict]:
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # a killed run may leave half a line, the last one
            for line in self.metrics_file.read_text().splitlines():
                lines.append(json.loads(line))
        return lines

    def _open_out(self) -> None:
        """Make OUT and settings.json; a fresh run removes what the last one reported, its checkpoint only by saving."""
        if not self.main:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in () if self.resume else ("metrics.jsonl", "result.json", "curve.svg"):
                (self.out / name).unlink(missing_ok=True)
            _write(self.out / "settings.json", json.dumps(self.identity, indent=1) + "\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # of a full disk `run` knows more to say
            raise UserError(f"--out {self.out}: {error.strerror}") from None

    # The end

    def finish(self, before: dict[str, list[float]], after: dict[str, list[float]], *,
               baselines: dict[str, float] | None = None, variant: str = "", higher_is_better: bool = True,
               series: tuple[str, ...] = ("loss",)) -> dict:  # fmt: skip
        """Write result.json and curve.svg (the `series` of metrics.jsonl), say the same in words, return the result.

        before, after: {metric: one number a held-out row}, of the same rows in the same order; the first metric is what
        the run is judged by. `baselines` is what the method must beat.
        """
        metrics = {name: paired(before[name], values) for name, values in after.items()}
        metric = next(iter(metrics))
        primary = metrics.pop(metric)
        device, peak = self.device.type, None
        if device == "cuda":
            device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20
        elif resource:  # kilobytes on Linux, bytes on macOS
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        speed = round(self.tokens / self.seconds, 1) if self.tokens and self.seconds else None
        result = {
            "script": self.script, "variant": variant, "metric": metric, "higher_is_better": higher_is_better,
            **primary, "metrics": metrics, "baselines": baselines or {},
            "seconds": round(self.seconds, 1), "tokens_per_second": speed, "peak_memory_mb": peak and round(peak, 1),
            "device": device, "seed": self.args.seed, "command": self.command, "torch": torch.__version__,
            "git": _commit(),
        }  # fmt: skip
        if not self.main:
            return result
        _write(self.out / "curve.svg", curve(self._lines(), series, title=f"{self.script} {variant}".strip()))
        _write(self.out / "result.json", json.dumps(result, indent=1) + "\n")
        interval = "" if primary["ci95"] is None else f" ± {primary['ci95']:.3f} (95%)"
        was, now = primary["before"], primary["after"]
        print(f"\n{metric}: {was:.3f} before, {now:.3f} after: {now - was:+.3f}{interval} on {primary['n']} rows")
        for name, row in result["metrics"].items():
            print(f"  {name}: {row['before']:.3f} before, {row['after']:.3f} after")
        for name, value in result["baselines"].items():
            print(f"  to beat: {name}, {value:.3f}")
        pace = f", {speed:,.0f} tokens a second" if speed else ""
        memory = f", peak memory {peak:,.0f} MB" if peak else ""
        print(f"{self.seconds:.0f} s of training{pace}{memory}; see {self.out}")
        return result

    # Stages

    def require(self, stage: str) -> Path:
        """The checkpoint of `stage` (of STAGES) with default settings, built first in its own process if it is missing.

        It is built in a temporary folder, under a lock, and renamed: it is there as a whole or not at all. UserError
        with the command to run if it is missing under torchrun, unfinished, or of other settings, tokenizer or data,
        and if this run would write there.
        """
        command, duration = STAGES[stage]
        home = ROOT / "out" / stage
        if home.resolve() == self.out.resolve():
            self._refuse_out()
        if not home.exists():
            if "RANK" in os.environ:
                raise UserError(f"{home} is missing and torchrun builds nothing; first run: python {command}")
            home.parent.mkdir(exist_ok=True)
            if stage in NEEDS:
                self.require(NEEDS[stage])  # here: a process of that process would not hear of Ctrl-C
            with (home.parent / f".{stage}.lock").open("w") as lock:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another builder; freed however that one ends
                if not home.exists():
                    self.say(f"no {stage} model yet, making it: python {command} (about {duration} on two CPU cores)")
                    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{stage}-") as folder:
                        made = Path(folder, stage)
                        argv = [sys.executable, *command.split(), "--out", made, "--device", self.args.device]
                        # in a session of its own, so that Ctrl-C reaches this process alone, which then ends it
                        if subprocess.run(argv, cwd=ROOT, check=False, start_new_session=True).returncode:
                            raise RunFailed(f"the {stage} model could not be made by: python {command}")
                        result = json.loads((made / "result.json").read_text())
                        result |= {"command": f"python {command}"}  # not the temporary folder
                        _write(made / "result.json", json.dumps(result, indent=1) + "\n")
                        made.rename(home)
                    self.say(f"the {stage} model is in {home}")
        _recover(home / "checkpoint")
        if not (home / "result.json").exists() or not (home / "checkpoint").exists():
            raise UserError(f"{home} holds an unfinished run; finish it with: python {command} --resume")
        if changed := _differences(json.loads((home / "settings.json").read_text()), _of_stage(stage)):
            raise UserError(f"{home} was made with other settings ({changed}); make it anew with: python {command}")
        return home / "checkpoint"


# 4. Devices, identities, shards, files


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, float | int | None]:
    """Means before and after, their n, and the half-width of the 95% interval of the mean difference of paired rows."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    n = len(differences)
    half_width = 1.96 * differences.std().item() / math.sqrt(n) if n > 1 else None
    return {"before": statistics.fmean(before), "after": statistics.fmean(after), "n": n, "ci95": half_width}


def _device(name: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        raise UserError(f"--device {name}: there is none on this machine")
    if name != "cuda":
        return torch.device(name)
    rank, n = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= n:
        raise UserError(f"--device cuda: torchrun started more processes than the {n} devices on this machine")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


@functools.cache
def _commit() -> str | None:
    """The short hash of the code's commit; None without git or outside a repository."""
    with contextlib.suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, check=False)
        return found.stdout.decode().strip() or None


def _identity(args: argparse.Namespace) -> dict[str, object]:
    """What makes two runs the same run: all flags but those of FREE, the tokenizer and the version of the data.

    A flag of FILES counts with a hash of what is in its file, or in each of several.
    """
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    for name in FILES:
        for path in (flags.get(name) or "").split(","):
            if os.path.isfile(path):  # not a pipe, which can be read only once
                with contextlib.suppress(OSError), open(path, "rb") as file:  # its reader has better words
                    flags[name] += f" sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    tokenizer = hashlib.sha256((ROOT / "data" / "tiny.tiktoken").read_bytes()).hexdigest()
    return json.loads(json.dumps({"flags": flags, "tokenizer": tokenizer, "data": VERSION}, default=str))


def _of_stage(stage: str) -> dict[str, object]:
    """The identity of a run with the settings of `stage`."""
    script, *flags = STAGES[stage][0].split()
    return _identity(runpy.run_path(str(ROOT / script))["get_args"](flags))


def _differences(saved: dict, wanted: dict) -> str:
    """What two identities differ in, in words; empty if nothing."""
    old, new = saved["flags"], wanted["flags"]
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    words = [f"--{name.replace('_', '-')} was {old.get(name)}, now {new.get(name)}" for name in names]
    return "; ".join(words + [f"another {kind}" for kind in ("tokenizer", "data") if saved[kind] != wanted[kind]])


@functools.lru_cache(maxsize=2)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if sharded(module):  # a forward pass without a backward leaves the root whole
            module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if sharded(tensor) else tensor).detach().cpu()


def _split_like(like: Tensor, whole: Tensor) -> Tensor:
    if not sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _publish(new: Path, final: Path) -> None:
    """Flush the folder `new` to the disk and put it in the place of `final`; _recover mends a kill in between."""
    _flush(*new.iterdir(), new)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(final: Path) -> None:
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.replace(old, final)


def _flush(*paths: Path) -> None:
    for path in paths:
        if path.is_file() or os.name != "nt":  # Windows cannot open a folder
            handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _write(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


# 5. The curve


def _ticks(low: float, high: float) -> list[float]:
    """Five or more round numbers that enclose low to high."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = power * max(m for m in (1, 2, 5) if m * power <= span / 4)
    first = math.floor(low / step)
    return [float(f"{i * step:.12g}") for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def curve(lines: list[dict], series: tuple[str, ...], *, title: str) -> str:
    """An SVG line chart of the `series` of metrics.jsonl's `lines` over the step, for light and dark pages."""
    points = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in series}
    steps, values = ([point[axis] for line in points.values() for point in line] or [0] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(0, max(steps)), _ticks(min(values), max(values))
    left, right, top, bottom = 64, 690, 44, 330

    def x(step: float) -> float:
        return round(left + (right - left) * step / x_ticks[-1], 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    def text(at: float, height: float, words: object, kind: str) -> str:
        return f'<text x="{at}" y="{height}" class="{kind}">{words}</text>'

    parts = [text(left, 24, title, "title"), text((left + right) / 2, bottom + 41, "step", "middle")]
    for t in y_ticks:
        parts += [f'<path d="M{left} {y(t)}H{right}" class="grid"/>', text(left - 8, y(t) + 4, f"{t:g}", "end")]
    for t in x_ticks:
        parts += [f'<path d="M{x(t)} {bottom}v5" class="axis"/>', text(x(t), bottom + 20, f"{t:g}", "middle")]
    parts += [f'<path d="M{left} {top}V{bottom}H{right}" class="axis"/>']
    for i, (name, line) in enumerate(points.items()):
        path = " ".join(f"{x(step)},{y(value)}" for step, value in line)
        parts += [f'<polyline points="{path}" class="line s{i}"/>']
        parts += [f'<path d="M540 {20 + 16 * i}h20" class="line s{i}"/>', text(566, 24 + 16 * i, name, "name")]
    return SVG.replace("PARTS", "\n".join(parts))


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 380" width="720" height="380">
<style>
text { font: 12px system-ui, sans-serif; fill: #555 }
.title { font-size: 15px; font-weight: 600 } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #8883 } .axis { stroke: #888; fill: none }
.line { fill: none; stroke: #2ca05a; stroke-width: 2; stroke-linejoin: round }
.s0 { stroke: #3b82d6 } .s1 { stroke: #e07b28 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }
</style>
PARTS
</svg>
"""


# 6. The table of variants


def compare(main: Callable, resolved: Callable, args: argparse.Namespace, variants: Iterable[str], out: Path,
            columns: tuple[str, ...], repeated: tuple[str, ...], flag: str = "loss", start: str = "SFT"
            ) -> dict:  # fmt: skip
    """--loss (or another `flag`) all: `main` of every one of `variants`, as a table, which is in OUT/table.json, too.

    `resolved` gives `args` the defaults of a variant. Variants that are `repeated` run with --seeds seeds. The first of
    `columns` is the metric of result.json, the others are among its metrics. The row `start` is the first run before
    it began. --resume keeps the runs that are finished, if their settings are those of now.
    """
    rows, wide, variants = [], max(map(len, columns)) + 9, list(variants)
    for name in variants:  # what one of them refuses is refused before any has run
        resolved(argparse.Namespace(**vars(args) | {flag: name}))
    print(f"{flag:16}{'seeds':>6}" + "".join(f"{name:>{wide}}" for name in (*columns, "seconds")))
    for name in variants:
        runs = []
        for seed in range(args.seed, args.seed + (args.seeds if name in repeated else 1)):
            folder = out / f"{re.sub(r'[^a-z0-9_.=+-]+', '-', name)}-{seed}"
            mine = {flag: name, "seed": seed, "out": folder,
                    "resume": args.resume and (folder / "checkpoint").exists()}  # fmt: skip
            one = resolved(argparse.Namespace(**vars(args) | mine))
            finished = args.resume and (folder / "result.json").exists()
            if not (finished and json.loads((folder / "settings.json").read_text()) == _identity(one)):
                with contextlib.redirect_stdout(io.StringIO()):
                    main(one)  # which refuses to resume a run of other settings
            run = json.loads((folder / "result.json").read_text())
            whole = {"seconds": run["seconds"], "peak MB": run["peak_memory_mb"] or math.nan}  # 0 before
            runs.append({columns[0]: run} | {k: {"before": 0.0, "after": v} for k, v in whole.items()} | run["metrics"])
        for label, moment, some in ([(start, "before", runs[:1])] if not rows else []) + [(name, "after", runs)]:
            rows.append({flag: label, "seeds": len(some)})
            line = f"{label:16}{len(some):6}"
            for column in (*columns, "seconds"):
                values = [run[column][moment] for run in some]
                mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
                rows[-1][column] = {"mean": mean, "spread": spread}
                line += f"{mean:.3f}{'' if spread is None else f' ± {spread:.3f}'}".rjust(wide)
            print(line, flush=True)
    _write(out / "table.json", json.dumps({"rows": rows}, indent=1) + "\n")
    return {"rows": rows}
