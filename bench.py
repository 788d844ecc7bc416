"""This code against reference implementations, side by side: `python bench.py AREA`.

Prints a table and writes out/bench/AREA.json: {"rows": [{"name", "ours", "peer", "unit", "ratio", "higher_is_better"}]}
where ratio = ours / peer. Times are medians of runs that alternate between the two in one process, so that whatever
else the machine does falls on both alike. Memory is the peak above what was held before the call: on a CPU the growth
of the resident set (Linux), each figure in a process of its own, on a GPU what torch allocated.

Areas
    kernels   each kernel of kernels.py, forward and backward, against its eager reference: time, memory, and the error
              of value and gradient against the reference in float64
    sft       training and sampling against transformers, and training against trl, if that is installed: same weights,
              same batch, both in fp32, on a CPU with denormals flushed for both; there also where our time goes, and
              rows "floor: ..." of what it would be if only the products with the weights, these and attention, or all
              operations did, and rows "..., compiled" of what torch.compile makes of our blocks
    dpo       the training step of dpo.py against trl's DPOTrainer, and its peak memory: the same in weights, pairs and
              precision
    lora      the training step of lora.py against peft's LoRA, and its peak memory: same base, same rank, same matrices
    grpo      whole steps of grpo.py (rollout, rewards, update) against trl's GRPOTrainer with its own generate: same
              weights, questions, group size and lengths; a breakdown of ours is printed
    quantize  greedy decoding of a model of quantized weights against the same in bf16, one row and four at a time; the
              bytes that a token reads; against what memory allows. A prompt, where nothing is gained
    gpu       training (bf16, compiled) and decoding of a model of half a billion parameters against what the device
              can do at all, measured here: products of matrices and copies; the kernels against Liger's, if that is
              installed. Without CUDA the same code at toy size
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpo
import grpo
import kernels
import quantize
from data import world
from data.chat import Row
from data.formats import UserError
from data.tokenizer import save_hf, tiny
from loop import COUNT, Loop, RunFailed, adamw, clip, run
from lora import adapt
from model import Config, Transformer, frozen, generate, load, quantized
from sft import Batch, collate, pack, sft_loss

# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def row(name: str, ours: float, peer: float, unit: str, higher_is_better: bool) -> dict:
    ratio = ours / peer if peer else float(ours == peer)
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "unit": unit,
        "ratio": ratio,
        "higher_is_better": higher_is_better,
    }


def race(ours: Callable[[], object], peer: Callable[[], object], repeats: int, device: str) -> tuple[float, float]:
    """Median seconds of each, run alternately after one warm-up."""
    return tuple(medians([ours, peer], repeats, device))


def medians(calls: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    seconds = {call: [] for call in calls}
    for i in range(repeats + 1):
        for call, times in seconds.items():
            start = now(device)
            call()
            if i:
                times.append(now(device) - start)
    return [statistics.median(times) for times in seconds.values()]


def now(device: str) -> float:
    """Seconds, after the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def library(name: str) -> ModuleType:
    """The module of a reference library, imported when it is first needed; UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"nothing to compare with: {error}; pip install -r requirements-dev.txt") from None


def installed(name: str) -> bool:
    """Whether there is a library `name`; says so if its rows are left out."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: its rows are left out")
    return found


def compile_blocks(model: Transformer) -> None:
    """What Loop.compile does, where kernels.use_compile found a compiler."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile(dynamic=False)


# ----------------------------------------------------------------------------------------------------------------------
# kernels: each against its eager reference


def bench_kernels(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in KERNELS:
        *both, inputs = kernel_case(name, args.device, full=True)
        times = race(*(functools.partial(gradients, kernel, inputs) for kernel in both), args.repeats, args.device)
        rows.append(row(f"{name}: time", *(1e3 * seconds for seconds in times), "ms", False))
        del inputs
        if args.device == "cuda" or sys.platform == "linux":
            memory = [in_fresh_process(kernel_memory, args.device, name, which, args.compile) for which in (0, 1)]
            rows.append(row(f"{name}: peak memory", *memory, "MB", False))
        errors = kernel_errors(name, args.device)
        rows += [row(f"{name}: {what} error", *pair, "relative", False) for what, pair in errors.items()]
    return rows


def kernel_case(
    name: str, device: str, full: bool, peer: Callable | None = None
) -> tuple[Callable, Callable, list[Tensor]]:
    """The kernel, its reference (or `peer`) and random inputs; `full`: the size that is timed, the dtype of training.

    The timed sizes are those of the tiny model's training step, and for the vocabulary 4,096 tokens of width 512 and
    32,000 words; on a GPU all are larger.
    """
    generator = torch.Generator().manual_seed(0)
    large = full and device == "cuda"
    dtype = torch.bfloat16 if large else torch.float32
    b, t, h, d = (8, 2048, 16, 128) if large else (64, 64, 4, 32) if full else (3, 17, 4, 32)
    n, width, vocab = (16384, 2048, 131072) if large else (4096, 512, 32000) if full else (100, 64, 1000)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    ours, peer = getattr(kernels, name.split()[0]), peer or getattr(kernels, name.split()[0] + "_reference")
    angles = torch.rand(1, t, d // 2, generator=generator).repeat(1, 1, 2).to(device) * 6
    cos, sin = angles.cos(), angles.sin()
    match name:
        case "rms_norm":
            inputs, rest = [normal(b, t, h * d), normal(h * d)], (1e-5,)
        case "add_rms_norm":
            inputs, rest = [normal(b, t, h * d), normal(b, t, h * d), normal(h * d)], (1e-5,)
        case "rotary":
            inputs, rest = [normal(b, t, h, d)], (cos, sin)
        case "qk_norm_rotary":
            inputs, rest = [normal(b, t, h, d), normal(d)], (1e-5, cos, sin)
        case "swiglu":
            inputs, rest = [normal(b, t, 2 * 3 * h * d)], ()
        case "linear_cross_entropy" | "linear_logps" | "linear_logps with entropy":
            inputs, rest = [normal(n, width), normal(vocab, width, scale=0.05)], (integers(vocab, n),)
        case "linear_divergence":  # a teacher of twice the width
            inputs = [normal(n, width), normal(vocab, width, scale=0.05)]
            teacher = normal(n, 2 * width).detach(), normal(vocab, 2 * width, scale=0.05).detach()
            rest = [teacher], torch.ones(n, device=device)
        case "attention" | "attention over documents":
            inputs, rest = [normal(b, t, h, d), normal(b, t, h // 2, d), normal(b, t, h // 2, d)], ()
        case "lora_linear" | "lora_linear on NF4":
            inputs, rest = [normal(b, t, h * d), normal(3 * 8, h * d), normal(3 * h * d, 8)], ()
            weight, rows = normal(3 * h * d, h * d).detach(), [(i * h * d, (i + 1) * h * d) for i in range(3)]
            q = kernels.nf4_quantize(weight)

            def frozen_first(kernel: Callable) -> Callable:
                def call(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
                    whole = functools.partial(kernels.nf4_dequantize, q, x.dtype) if "NF4" in name else weight.to(x)
                    return kernel(x, whole, None, down, up, rows, 2.0)

                return call

            ours, peer = frozen_first(ours), frozen_first(peer)
    options = {}
    if name == "attention over documents":
        options["documents"] = integers(2, b, t).cumsum(1) // 8
    if name == "linear_logps with entropy":
        options["with_entropy"] = True
    if name == "linear_divergence":
        options = {"kind": "forward_kl", "skew": 0.0, "temperature": 1.0}
    return (lambda *x: ours(*x, *rest, **options)), (lambda *x: peer(*x, *rest, **options)), inputs


KERNELS = ("rms_norm", "add_rms_norm", "rotary", "qk_norm_rotary", "swiglu", "attention", "attention over documents",
           "lora_linear", "lora_linear on NF4", "linear_cross_entropy", "linear_logps",
           "linear_logps with entropy", "linear_divergence")  # fmt: skip


def gradients(kernel: Callable, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of the sum of all of them, each weighted by a ramp from 0 to 1."""
    outputs = kernel(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ramps = [torch.linspace(0, 1, x.shape[-1] if x.dim() else 2, device=x.device, dtype=x.dtype) for x in outputs]
    ramps = [ramp[1] if x.dim() == 0 else ramp.expand_as(x) for x, ramp in zip(outputs, ramps, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, inputs, ramps))


def kernel_errors(name: str, device: str) -> dict[str, tuple[float, float]]:
    """Largest errors of the kernel and of its reference in fp32, relative to the largest entry in float64."""
    ours, peer, inputs = kernel_case(name, device, full=False)
    exact = gradients(peer, [x.detach().double().requires_grad_() for x in inputs])

    def error(found: list[Tensor], wanted: list[Tensor]) -> float:
        return max(((f - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True))

    both = gradients(ours, inputs), gradients(peer, inputs)
    return {what: tuple(error(run[i], exact[i]) for run in both) for i, what in enumerate(("value", "gradient"))}


def kernel_memory(device: str, name: str, which: int, compiled: bool) -> float:
    """Peak MB above the inputs of the kernel (which = 0) or of its reference (1), forward and backward."""
    kernels.use_compile(compiled)
    small, full = (kernel_case(name, device, full=size) for size in (False, True))
    gradients(small[which], small[2])  # loads libraries and starts threads
    return peak_of(lambda: gradients(full[which], full[2]), device)


def in_fresh_process(measure: Callable, device: str, *what: object) -> float:
    """measure(device, *what), on a CPU in a process of its own: its memory has no history there.

    glibc gives every tensor of that process its own mapping, and so back when it is freed: else what one step leaves
    in the heap hides what the next one needs.
    """
    if device == "cuda":
        return measure(device, *what)
    before = dict(os.environ)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            return fresh_process.submit(measure, device, *what).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def peak_of(step: Callable[[], object], device: str) -> float:
    """Peak MB of a step above what is held before it; libraries are loaded, and states there, by what came before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; getrusage's maximum is inherited from the parent
    held = resident("VmRSS")
    step()
    return resident("VmHWM") - held


def resident(field: str) -> float:
    """MB of this process in memory, from Linux's /proc: "VmRSS" now, "VmHWM" the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# sft: training and sampling, against transformers and trl

GOALS = {  # of the ratio, by the name of the row up to one of its commas, or its end
    "training step": 1.3,
    "sampling": 2.0,
    "sampling to natural ends": 3.0,
    "trl.SFTTrainer": 1.5,
    "live reference": 1.4,
    "reference computed before": 1.8,
    "trl.GRPOTrainer, 64 prompts x 8 answers": 1.3,
    "trl.GRPOTrainer, 8 prompts x 8 answers": 1.6,
    "peak memory of a step": 0.25,  # at most: less is better
    "LoRA step": 1.0,
    "memory of a LoRA step": 1.02,  # at most
    "decoding": 1.3,
}


def bench_sft(args: argparse.Namespace) -> list[dict]:
    transformers = library("transformers")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {args.device}, fp32, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats} alternating runs")  # fmt: skip
    narrow, wide = twins(128, 512, args.device), twins(512, 512, args.device)
    equal, ragged = random_ids(512, [32] * 64), random_ids(512, range(3, 32, 4))
    ends = {"samples": 8, "eos_ids": range(1, 17)}
    rows = [
        sampling("sampling, 64 prompts x 64 tokens", narrow, equal, args),
        sampling("sampling to natural ends, 8 ragged prompts x 8", narrow, ragged, args, **ends),
        sampling("sampling at width 512, 1 prompt x 64 tokens", wide, equal[:1], args),
    ]
    seen = args.device == "cpu" and not args.compile  # operations are not seen in a CUDA graph or a compiled block
    if seen:
        rows += floor(rows[0], lambda: generate(narrow[0], equal, max_new_tokens=64, eos_ids=()), args)
        rows += floor(rows[1], lambda: generate(narrow[0], ragged, max_new_tokens=64, **ends), args)
    rows.append(training("training step, 64 x 64 tokens", narrow, (64, 64), args))  # last: it changes both's weights
    if seen:
        input_ids = torch.tensor(random_ids(512, [64] * 64))
        rows += floor(rows[-1], our_step(narrow[0], input_ids, torch.float32), args)
        rows += compiled(equal, args)
    return rows + ([sft_trainer("trl.SFTTrainer, 256 short rows a step", args)] if installed("trl") else [])


def compiled(prompts: list[list[int]], args: argparse.Namespace) -> list[dict]:
    """Sampling and the training step again, our blocks fused by torch.compile: what their small operations cost.

    No script decodes like that: to compile a shape takes longer than a short run saves. [] without a compiler.
    """
    if not kernels.use_compile(True):
        return []
    pair, args = twins(128, 512, args.device), argparse.Namespace(**vars(args) | {"compile": True})
    for block in pair[0].blocks:
        block.compile(dynamic=True)  # one for all lengths
    rows = [sampling("sampling, 64 prompts x 64 tokens, compiled", pair, prompts, args, decode=generate.__wrapped__),
            training("training step, 64 x 64 tokens, compiled", twins(128, 512, args.device), (64, 64), args)]
    kernels.use_compile(False)
    return rows


KINDS = ("products", "attention", "norms", "other operations")


class Operations(TorchDispatchMode):
    """Notes every operation and its arguments, by kind: products are those with weights."""

    def __init__(self):
        super().__init__()
        self.of_kind: dict[str, list[tuple]] = {kind: [] for kind in KINDS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame, callers = sys._getframe(), set()
        while frame := frame.f_back:
            if frame.f_code.co_filename == kernels.__file__:
                callers.add(frame.f_code.co_qualname.split(".")[0])
        name, kind = func.name(), "other operations"
        if "scaled_dot_product" in name or callers & {"attention"}:
            kind = "attention"
        elif callers & {"rms_norm", "_RMSNorm"}:
            kind = "norms"
        elif name.split(".")[0] in ("aten::linear", "aten::mm", "aten::addmm", "aten::addmm_"):
            kind = "products"
        self.of_kind[kind].append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def again(operations: list[tuple]) -> None:
    """The same on the same tensors, without the code that asked for it; what is changed in place goes on changing."""
    for func, args, kwargs in operations:
        func(*args, **kwargs)


def floor(of: dict, step: Callable[[], object], args: argparse.Namespace) -> list[dict]:
    """The row `of`, of `step`, as it would be if its products took all of the time, they and attention, all operations.

    The last says what these operations cost even if Python, autograd and PyTorch's way to them took no time: only fewer
    operations would be faster, and compiling shows what that gives. Prints what takes how much. The operations of a
    kind run again by themselves; what no kind accounts for is between them.
    """
    step()
    with Operations() as noted:
        step()
    calls = [step, *(functools.partial(again, noted.of_kind[kind]) for kind in KINDS)]
    whole, *parts = medians(calls, args.repeats, args.device)
    shares = zip((*KINDS, "between them"), (*parts, whole - sum(parts)), strict=True)
    print(f"{of['name']}: of our {1e3 * whole:.1f} ms, " + ", ".join(f"{kind} {s / whole:.0%}" for kind, s in shares))
    return [row(f"floor: {of['name']}: {name}", of["ours"] * whole / sum(parts[:n]), of["peer"], of["unit"], True)
            for n, name in ((1, "products"), (2, "products, attention"), (4, "all operations"))]  # fmt: skip


def twins(width: int, vocab_size: int, device: str, depth: int = 4) -> tuple[Transformer, nn.Module]:
    """A random Llama: loaded by model.py from the files of the second, which is that of transformers.

    Its weights are large (standard deviation 0.1), since with 0.02 a random tied model says one token for ever.
    """
    transformers = library("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64), intermediate_size=3 * width, max_position_embeddings=512,
        initializer_range=0.1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(device)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = load(folder, device=device)
    check_equal(ours, theirs)
    return ours, theirs


@torch.no_grad()
def check_equal(ours: Transformer, theirs: nn.Module) -> None:
    """RunFailed unless the logits of the two agree to 1e-3."""
    input_ids = torch.tensor(random_ids(ours.config.vocab_size, [32, 32]), device=ours.embed.weight.device)
    error = (ours(input_ids) - theirs(input_ids).logits).abs().max().item()
    if not error <= 1e-3:  # NaN fails
        raise RunFailed(f"there is nothing to compare: the logits of the two models differ by {error:.2g}")


def random_ids(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def training(name: str, pair: tuple[Transformer, nn.Module], shape: tuple[int, int], args: argparse.Namespace) -> dict:
    """Tokens a second of forward, loss, backward and AdamW on one batch of this shape, without clipping.

    Ours: hidden_before, linear_cross_entropy and the fused loop.adamw. Theirs: model(input_ids, labels=input_ids).loss
    and torch.optim.AdamW as it comes.
    """
    print(f"{name}: forward, loss, backward and AdamW, without clipping")
    model, their_model = pair
    input_ids = torch.tensor(random_ids(model.config.vocab_size, [shape[1]] * shape[0]), device=args.device)
    if args.compile:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(their_model.parameters(), lr=1e-4)

    def their_step() -> None:
        their_model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = race(our_step(model, input_ids, torch.float32), their_step, args.repeats, args.device)
    return row(name, *(input_ids.numel() / s for s in seconds), "tokens/s", True)


def our_step(model: Transformer, input_ids: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The step of sft.py without clipping, forward in `dtype`, on all of input_ids (B, T) but what nothing predicts."""
    optimizer, mask = adamw(model, 1e-4, 0.1), torch.ones_like(input_ids)
    mask[:, 0] = 0
    n_tokens = input_ids.numel() - len(input_ids)

    def step() -> None:
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = sft_loss(model, Batch(input_ids, mask, None)) / n_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(name: str, pair: tuple[Transformer, nn.Module], prompts: list[list[int]], args: argparse.Namespace, *,
             samples: int = 1, eos_ids: Sequence[int] = (), new: int = 64, decode: Callable = generate
             ) -> dict:  # fmt: skip
    """Tokens a second of a whole call, prefill included: up to `new` for each prompt and sample, at temperature 1.

    Both draw from the whole vocabulary; ours also returns log-probs. Their prompts are padded on the left beforehand.
    Without eos_ids all completions are equally long. With some they end at various times, and a token counts if none
    before it ended its row: what a library spends on rows that have ended is time lost. As the two draw different
    random numbers, they make slightly different numbers of tokens. Every call has a seed of its own, and the rate is
    the mean number of tokens by the median time.
    """
    print(f"{name}: prefill and decoding at temperature 1" + (f", {len(eos_ids)} ids end a row" if eos_ids else ""))
    model, their_model = pair
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=args.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    made, their_made, seeds = [], [], itertools.count()

    def ours() -> None:
        found = decode(model, prompts, max_new_tokens=new, eos_ids=eos_ids, samples=samples, seed=next(seeds))
        made.append(sum(map(len, found.completions)))

    def theirs() -> None:
        torch.manual_seed(next(seeds))
        found = their_model.generate(
            input_ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
            num_return_sequences=samples, pad_token_id=0, eos_token_id=list(eos_ids) or None,
        )  # fmt: skip
        their_made.append(n_sampled(found[:, longest:], eos_ids))

    seconds = race(ours, theirs, args.repeats, args.device)
    return row(name, statistics.mean(made) / seconds[0], statistics.mean(their_made) / seconds[1], "tokens/s", True)


def n_sampled(completions: Tensor, eos_ids: Sequence[int]) -> int:
    """How many tokens of completions (B, T) have no ending token before them in their row."""
    is_end = torch.isin(completions, torch.tensor(list(eos_ids), dtype=torch.long, device=completions.device)).int()
    return int((is_end.cumsum(-1) - is_end == 0).sum())


def sft_trainer(name: str, args: argparse.Namespace, *, width: int = 128, batch: int = 256, steps: int = 4) -> dict:
    """Tokens a second, padding not counted, of `steps` steps of `batch` rows of 8 to 24 tokens.

    The rows are tokenized beforehand; their second half is trained on. Ours: pack into rows of 128, collate, and the
    step of sft.py. Theirs: the whole of SFTTrainer.train(), in fp32, all rows of a step at once, clipped, its fused
    AdamW; without reports, logs, saves, worker processes and recomputed activations.
    """
    print(f"{name}: trainer.train() of trl {library('trl').__version__} for {steps} steps; ours: pack, collate, "
          "forward, loss, backward, clip, AdamW")  # fmt: skip
    tokenizer = tiny()
    model, their_model = twins(width, tokenizer.vocab_size, args.device)
    lengths = torch.randint(8, 25, (steps * batch,), generator=torch.Generator().manual_seed(0)).tolist()
    masks = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    rows = [Row(ids, mask) for ids, mask in zip(random_ids(tokenizer.vocab_size, lengths), masks, strict=True)]
    if args.compile:
        compile_blocks(model)
    optimizer = adamw(model, 1e-4, 0.0)

    def ours() -> None:
        for start in range(0, len(rows), batch):
            groups = list(pack(rows[start : start + batch], 128))
            some = collate(groups, torch.device(args.device), 64 if args.compile else 1)
            (sft_loss(model, some) / some.completion_mask.sum()).backward()
            clip(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        trainer = their_trainer(their_model, rows, batch, folder, args.device)
        seconds = race(ours, trainer.train, args.repeats, args.device)
    if trainer.state.global_step != steps:
        raise RunFailed(f"trl made {trainer.state.global_step} steps, not {steps}")
    return row(name, *(sum(lengths) / s for s in seconds), "tokens/s", True)


def their_trainer(model: nn.Module, rows: list[Row], batch: int, folder: str, device: str):
    """A trl.SFTTrainer of `model` on `rows` that does nothing but train, with its files in `folder`."""
    trl, datasets, transformers = library("trl"), library("datasets"), library("transformers")
    datasets.disable_progress_bars()
    save_hf(tiny(), Path(folder))
    columns = {"input_ids": [r.input_ids for r in rows], "completion_mask": [r.completion_mask for r in rows]}
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        config = trl.SFTConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=1e-4,
            max_grad_norm=1.0, completion_only_loss=True, gradient_checkpointing=False, bf16=False,
            use_cpu=device == "cpu", report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_num_workers=0, dataloader_pin_memory=device == "cuda",
        )  # fmt: skip
    trainer = trl.SFTTrainer(model, config, train_dataset=datasets.Dataset.from_dict(columns),
                             processing_class=transformers.AutoTokenizer.from_pretrained(folder))  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# ----------------------------------------------------------------------------------------------------------------------
# dpo: the step against trl's


VOCABULARY = 151_936  # Qwen's


def bench_dpo(args: argparse.Namespace) -> list[dict]:
    library("trl")
    rows = [dpo_trainer("live reference, 64 short pairs a step", args, before=False),
            dpo_trainer("reference computed before, 64 short pairs a step", args, before=True)]  # fmt: skip
    if args.device == "cuda" or sys.platform == "linux":
        memory = [in_fresh_process(dpo_memory, args.device, which) for which in ("ours", "theirs")]
        rows.append(row(f"peak memory of a step, vocabulary {VOCABULARY:,}", *memory, "MB", False))
    return rows


def short_pairs(count: int) -> dict[str, list[str]]:
    """Questions of the generated world as trl wants them: columns of text, with a right and a wrong answer."""
    rows = [world.exchange("add", world.rng_for("bench", i), "train") for i in range(count)]
    asked = [r["messages"][0]["content"] for r in rows]
    return {"prompt": asked, "chosen": [r["answer"] for r in rows], "rejected": [r["answer"] + " or so" for r in rows]}


def our_dpo_steps(model: Transformer, pairs: list[dpo.Example], batch_size: int, ref_model: Transformer | None
                  ) -> Callable[[], None]:  # fmt: skip
    """One pass over `pairs` with the step of dpo.py."""
    options, optimizer, device = dpo.get_args(["--beta", "0.1"]), adamw(model, 1e-4, 0.0), model.embed.weight.device

    def steps() -> None:
        for start in range(0, len(pairs), batch_size):
            batch = dpo.collate(pairs[start : start + batch_size], device)
            s = dpo.score(model, ref_model, batch, options)
            losses = dpo.objective(s, options)
            (losses.sum() / len(losses)).backward()
            dpo.metrics_of(dpo.sums_of(losses, s, options))
            clip(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def their_dpo_trainer(model: nn.Module, pairs: dict[str, list[str]], batch: int, folder: str, device: str, before: bool
                      ):  # fmt: skip
    """A trl.DPOTrainer of `model` on `pairs` that does nothing but train, with its files in `folder`."""
    trl, datasets, transformers = library("trl"), library("datasets"), library("transformers")
    datasets.disable_progress_bars()
    save_hf(tiny(), Path(folder))
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=1e-4, beta=0.1,
            max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, use_cpu=device == "cpu", report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
            dataloader_pin_memory=device == "cuda", precompute_ref_log_probs=before,
        )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, None if before else copy.deepcopy(model), config, train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def dpo_trainer(name: str, args: argparse.Namespace, *, before: bool, batch: int = 64, steps: int = 4) -> dict:
    """Pairs a second of `steps` steps of `batch` pairs; `before`: the reference's log-probs are there already.

    Ours: collate, both answers in one forward, the reference's forward, loss, metrics, clip, AdamW. Theirs: the whole
    of DPOTrainer.train(), in fp32, without reports, logs, saves, worker processes and recomputed activations. Both
    train on the ids that theirs has tokenized.
    """
    print(f"{name}: trainer.train() of trl {library('trl').__version__} for {steps} steps; ours: forward of both, "
          f"{'' if before else 'forward of the reference, '}loss, metrics, backward, clip, AdamW")  # fmt: skip
    model, their_model = twins(128, tiny().vocab_size, args.device)
    if args.compile:
        compile_blocks(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = their_dpo_trainer(their_model, short_pairs(steps * batch), batch, folder, args.device, before)
        columns = (trainer.train_dataset[c] for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
        pairs = [dpo.Example(list(p), [Row(list(c), [1] * len(c)), Row(list(r), [1] * len(r))], [1.0, 0.0],
                             [-9.0, -9.0] if before else None) for p, c, r in zip(*columns, strict=True)]  # fmt: skip
        ours = our_dpo_steps(model, pairs, batch, None if before else frozen(model))
        seconds = race(ours, trainer.train, args.repeats, args.device)
    if trainer.state.global_step != steps:
        raise RunFailed(f"trl made {trainer.state.global_step} steps, not {steps}")
    return row(name, *(steps * batch / s for s in seconds), "pairs/s", True)


def dpo_memory(device: str, which: str) -> float:
    """Peak MB above what is held before it: a step on 8 pairs of 128 tokens, half of them an answer's."""
    pairs = 8
    model, their_model = twins(64, VOCABULARY, device, depth=2)
    ids = random_ids(VOCABULARY, [128] * 2 * pairs)
    with tempfile.TemporaryDirectory() as folder:
        if which == "ours":
            half = [1] * 64
            examples = [dpo.Example(a[:64], [Row(a[64:], half), Row(b[64:], half)], [1.0, 0.0])
                        for a, b in zip(ids[::2], ids[1::2], strict=True)]  # fmt: skip
            step = our_dpo_steps(model, examples, pairs, frozen(model))
        else:
            trainer = their_dpo_trainer(their_model, short_pairs(pairs), pairs, folder, device, before=False)
            batch = {"input_ids": torch.tensor(ids[::2] + ids[1::2], device=device)}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["completion_mask"] = (torch.arange(128, device=device) >= 64).long().expand(2 * pairs, -1)
            optimizer = torch.optim.AdamW(their_model.parameters(), lr=1e-4)

            def step() -> None:
                trainer.compute_loss(their_model.train(), batch).backward()
                optimizer.step()
                optimizer.zero_grad()

        step()
        return peak_of(step, device)


# ----------------------------------------------------------------------------------------------------------------------
# lora: adapters against peft


def bench_lora(args: argparse.Namespace) -> list[dict]:
    print(f"peft {library('peft').__version__}, torch {torch.__version__}, {args.device}, fp32, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats} alternating runs")  # fmt: skip
    rows = []
    for name, width in (("LoRA step, width 128, 64 x 64 tokens", 128), ("LoRA step, width 512, 16 x 64 tokens", 512)):
        steps = lora_steps(width, (64 if width == 128 else 16, 64), args.device)
        seconds = race(*steps, args.repeats, args.device)
        rows.append(row(name, *((64 if width == 128 else 16) * 64 / s for s in seconds), "tokens/s", True))
    if args.device == "cuda" or sys.platform == "linux":
        memory = [in_fresh_process(lora_memory, args.device, which) for which in ("ours", "theirs")]
        rows.append(row("memory of a LoRA step, width 512", *memory, "MB", False))
    return rows


def lora_steps(width: int, shape: tuple[int, int], device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward, loss, backward and AdamW of rank 8 on every matrix of every block, ours and peft's."""
    peft = library("peft")
    model, their_model = twins(width, 512, device)
    adapt(model, "lora:rank=8,alpha=16", "")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    their_model = peft.get_peft_model(their_model, config)
    if sum(p.numel() for p in model.parameters() if p.requires_grad) != their_model.get_nb_trainable_parameters()[0]:
        raise RunFailed("there is nothing to compare: the two train different numbers of parameters")
    input_ids = torch.tensor(random_ids(512, [shape[1]] * shape[0]), device=device)
    optimizer = torch.optim.AdamW((p for p in their_model.parameters() if p.requires_grad), lr=1e-4)

    def their_step() -> None:
        their_model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return our_step(model, input_ids, torch.float32), their_step


def lora_memory(device: str, which: str) -> float:
    ours, theirs = lora_steps(512, (16, 64), device)
    step = ours if which == "ours" else theirs
    step()
    return peak_of(step, device)


# ----------------------------------------------------------------------------------------------------------------------
# grpo: reinforcement learning against trl


def bench_grpo(args: argparse.Namespace) -> list[dict]:
    print(f"trl {library('trl').__version__}, torch {torch.__version__}, {args.device}, fp32, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats} alternating runs")  # fmt: skip
    return [grpo_trainer("trl.GRPOTrainer, 64 prompts x 8 answers", args, prompts=64),
            grpo_trainer("trl.GRPOTrainer, 8 prompts x 8 answers", args, prompts=8)]  # fmt: skip


PARTS = ("rollout", "scoring", "update")  # of a step, whose seconds are printed


def variety(completion: Sequence[int]) -> float:
    """What both are rewarded for: the share of tokens that are not said before."""
    return len(set(completion)) / len(completion)


def grpo_trainer(name: str, args: argparse.Namespace, *, prompts: int, group: int = 8, new: int = 32, steps: int = 3,
                 width: int = 128) -> dict:  # fmt: skip
    """Steps a minute: answers of up to `new` tokens, --loss grpo without a KL, one update, clipped, AdamW.

    Theirs: the whole of GRPOTrainer.train() in fp32, all rows at once, without reports, saves and recomputation.
    """
    tokenizer = tiny()
    model, their_model = twins(width, tokenizer.vocab_size, args.device)
    flags = ["--out", "unused", "--device", args.device, "--batch-size", prompts, "--group-size", group,
             "--steps", steps, "--max-new-tokens", new, "--micro-batch-size", 256, "--dtype", "fp32"]  # fmt: skip
    ours_args = grpo.get_args(list(map(str, flags)))
    loop, optimizer, spent = Loop(ours_args, "grpo"), adamw(model, 1e-4, 0.0), dict.fromkeys(PARTS, 0.0)
    tasks = [grpo.world_task(ours_args, tokenizer, ("bench", i), "train") for i in range(prompts * steps)]

    def ours() -> None:
        for step in range(steps):
            start = now(args.device)
            some = tasks[step * prompts : (step + 1) * prompts]
            rollout = grpo.rollout_of(model, tokenizer, some, group, 1.0, (0, step), ours_args)
            spent["rollout"] -= start - (start := now(args.device))
            starts = rollout.completion_mask.argmax(-1).tolist()
            rows = zip(rollout.input_ids.tolist(), starts, rollout.completion_mask.sum(-1).tolist(), strict=True)
            reward = torch.tensor([variety(ids[first : first + n]) for ids, first, n in rows]).view(-1, group).double()
            counted = torch.ones_like(reward, dtype=torch.bool)
            advantages = grpo.advantages_of(rollout, reward, counted, None, None, 0.0, ours_args, loop)
            spent["scoring"] -= start - (start := now(args.device))
            batch = grpo.Batch(*rollout[:3], advantages, None, None)
            n_rows, n_tokens = len(advantages), int(rollout.completion_mask.sum())
            for part in grpo.by_length(batch, range(n_rows), ours_args.micro_batch_size):
                logps, *_ = grpo.score(model, part.input_ids, part.completion_mask, tokenizer, 1.0)
                x = grpo.Tokens(logps, logps.detach(), part.advantages, part.completion_mask)
                weights = grpo.token_weights(part.completion_mask, ours_args.aggregate, n_rows=n_rows,
                                             n_tokens=n_tokens, longest=new)  # fmt: skip
                importance = grpo.truncated_importance(x.old_logps, part.sampled_logps, 2.0)
                grpo.objective(x, weights, importance, ours_args)[0].backward()
            clip(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            spent["update"] += now(args.device) - start

    with tempfile.TemporaryDirectory() as folder:
        trainer = their_grpo_trainer(their_model, [grpo.prompt_text(task) for task in tasks], folder, args, prompts,
                                     group, new, steps)  # fmt: skip
        seconds = race(ours, trainer.train, args.repeats, args.device)
    if trainer.state.global_step != steps:
        raise RunFailed(f"trl made {trainer.state.global_step} steps, not {steps}")
    parts = ", ".join(f"{part} {total / (args.repeats + 1) / steps:.3f} s" for part, total in spent.items())
    print(f"{name}: a step of ours is {parts}; scoring is rewards and advantages, for log-probs are "
          "those of the update's own forward")  # fmt: skip
    return row(name, *(60 * steps / s for s in seconds), "steps/min", True)


def their_grpo_trainer(model: nn.Module, questions: list[str], folder: str, args: argparse.Namespace, prompts: int,
                       group: int, new: int, steps: int):  # fmt: skip
    """A trl.GRPOTrainer of `model` that does nothing but train, with its files in `folder`."""
    trl, datasets, transformers = library("trl"), library("datasets"), library("transformers")
    datasets.disable_progress_bars()
    save_hf(tiny(), Path(folder))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions]
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        config = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=prompts * group, num_generations=group, max_steps=steps,
            max_completion_length=new, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="grpo",
            learning_rate=1e-4, max_grad_norm=1.0, gradient_checkpointing=False, bf16=False,
            use_cpu=args.device == "cpu", report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=args.device == "cuda",
        )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completion_ids, **rest: [variety(ids) for ids in completion_ids], args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# ----------------------------------------------------------------------------------------------------------------------
# quantize: fewer bytes a token


SCHEMES = {"int8": (8, 0, True), "int4": (4, 64, False)}  # name: (bits, group_size, symmetric)


def bench_quantize(args: argparse.Namespace) -> list[dict]:
    """Weights at random, since only their number matters, and enough of them that no cache holds them."""
    new, prompt = 16, 16
    wide = Transformer(large(args.depth)).requires_grad_(False)
    plain = copy.deepcopy(wide).to(args.device, torch.bfloat16)
    print(f"quantize: {n_weights(plain) / 1e6:.3g}M weights, {prompt} + {new} tokens, greedy, {args.device}, bf16, "
          f"{torch.get_num_threads()} threads, medians of {args.repeats} alternating runs")  # fmt: skip
    rows = []
    for name, scheme in SCHEMES.items():
        narrow = rounded_model(wide, *scheme).to(args.device, torch.bfloat16)
        for n in (1, 4):
            rows += decoding_of_bf16(f"{name}, {n} at a time", narrow, plain, n, prompt, new, args)
        text = torch.tensor(random_ids(512, [128] * 8), device=args.device)

        def read(model: Transformer, text: Tensor = text) -> None:
            with torch.inference_mode():
                model.hidden(text)

        seconds = race(functools.partial(read, narrow), functools.partial(read, plain), args.repeats, args.device)
        rows.append(row(f"prompts, {name}, 8 x 128 tokens", *(text.numel() / s for s in seconds), "tokens/s", True))
    return rows


def large(depth: int) -> Config:
    """Twelve million weights a block."""
    return Config("llama", vocab_size=512, depth=depth, width=1024, heads=16, kv_heads=8, head_dim=64, ffn_width=2816,
                  max_length=256)  # fmt: skip


def rounded_model(model: Transformer, bits: int, group_size: int, symmetric: bool) -> Transformer:
    """A copy of `model` with all matrices of its blocks rounded to the nearest code."""
    model = copy.deepcopy(model)
    c = argparse.Namespace(method="rtn", bits=bits, group_size=group_size, symmetric=symmetric)
    for path in [f"blocks.{i}.{name}" for i in range(model.config.depth) for name in quantize.MATRICES]:
        weight = model.get_submodule(path).weight

        def make(rows: slice, weight: Tensor = weight) -> dict[str, Tensor]:
            return quantize.rtn(weight[rows], None, c)

        quantize.put_quantized(model, path, make, quantize.scheme_of(c))
    return model


def decoding_of_bf16(name: str, narrow: Transformer, plain: Transformer, rows: int, prompt: int, new: int,
                     args: argparse.Namespace) -> list[dict]:  # fmt: skip
    """Tokens a second of both models, the bytes of a step of theirs, and ours against what a copy of memory allows."""
    prompts = random_ids(512, [prompt] * rows)
    source = torch.zeros(2**30 if args.device == "cuda" else 2**27, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)

    def decode(model: Transformer) -> None:
        generate(model, prompts, max_new_tokens=new, eos_ids=(), temperature=0.0)

    calls = functools.partial(decode, narrow), functools.partial(decode, plain), lambda: target.copy_(source)
    ours, theirs, of_copy = medians(calls, args.repeats, args.device)
    cached = decoding_bytes(plain, rows, prompt, new) / new - 2 * n_weights(plain)
    n_bytes = [weight_bytes(model) + cached for model in (narrow, plain)]  # of a step
    best = rows * (len(source) + len(target)) / of_copy / n_bytes[0]
    return [row(f"decoding, {name}", rows * new / ours, rows * new / theirs, "tokens/s", True),
            row(f"bytes of a step, {name}", *(n / 1e6 for n in n_bytes), "MB", False),
            row(f"decoding, {name}, {CEILING} of bandwidth", rows * new / ours, best, "tokens/s", True)]  # fmt: skip


def weight_bytes(model: Transformer) -> int:
    """What every step reads of the weights of `model`: the codes and scales of quantized ones."""
    parts = [part for module in quantized(model).values() for part in module.parts]
    return n_weights(model) * model.embed.weight.element_size() + sum(part.n_bytes() for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# gpu: training and decoding against what the device can do

CEILING = "of the ceiling"  # in the name of a row whose peer is one


def bench_gpu(args: argparse.Namespace) -> list[dict]:
    on_cuda = args.device == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high")  # as loop.Loop does
    else:
        print("gpu: no CUDA: the same code at toy size on the CPU, in fp32; its figures say nothing about a GPU")
    vocab_size, length, prompt, new = (32768, 2048, 128, 128) if on_cuda else (512, 64, 8, 16)
    dtype = torch.bfloat16 if on_cuda else torch.float32
    config = Config.from_depth(args.depth, vocab_size, length)
    rows = [training_of_ceiling(config, args.batch_size, dtype, args)]
    kernels.use_compile(False)  # generate does not compile
    rows += [decoding_of_ceiling(config, n, prompt, new, dtype, args) for n in (1, 64 if on_cuda else 4)]
    if on_cuda and installed("liger_kernel"):
        kernels.use_compile(args.compile)
        rows += liger(args)
    return rows


def training_of_ceiling(config: Config, batch: int, dtype: torch.dtype, args: argparse.Namespace) -> dict:
    """Tokens a second of our_step; the peer is what they would be if the device only ever multiplied matrices.

    Their ratio is the model FLOPs utilization (MFU). The ceiling, of a large product in `dtype`, is measured between
    the steps.
    """
    model = Transformer(config).to(args.device)
    if args.compile:
        compile_blocks(model)
    input_ids = torch.tensor(random_ids(config.vocab_size, [config.max_length] * batch), device=args.device)
    n = 8192 if args.device == "cuda" else 512
    a, b = torch.randn(2, n, n, device=args.device, dtype=dtype)
    seconds, of_product = race(our_step(model, input_ids, dtype), lambda: a @ b, args.repeats, args.device)
    flops, ceiling, rate = training_flops(model, config.max_length), 2 * n**3 / of_product, input_ids.numel() / seconds
    print(f"training step: forward, loss, backward and AdamW, without clipping: {n_weights(model) / 1e6:.3g}M weights, "
          f"{batch} x {config.max_length} tokens, {str(dtype)[6:]}{', compiled' if args.compile else ''}\n"
          f"    {rate:,.0f} tokens/s, {flops / 1e9:.3g} GFLOP each: {rate * flops / 1e12:.3g} TFLOP/s, of {n} x {n} "
          f"products {ceiling / 1e12:.3g}: MFU {rate * flops / ceiling:.1%}")  # fmt: skip
    return row(f"training step, {CEILING} of products", rate, ceiling / flops, "tokens/s", True)


def n_weights(model: Transformer) -> int:
    """Entries of the matrices that every token is multiplied by: no norms, no biases, no embedding but a tied one."""
    looked_up = 0 if model.config.tied else model.embed.weight.numel()
    return sum(p.numel() for p in model.parameters() if p.ndim == 2) - looked_up


def training_flops(model: Transformer, length: int) -> int:
    """FLOPs a token, forward and backward: 6 N + 12 depth * width * T (PaLM, arXiv 2204.02311, appendix B).

    N is n_weights, width that of all heads. The second term is attention, in which every query counts as seeing all
    T = `length` keys, though a causal one sees half of them. What is computed twice to save memory counts once.
    """
    c = model.config
    return 6 * n_weights(model) + 12 * c.depth * c.heads * c.head_dim * length


def decoding_of_ceiling(config: Config, rows: int, prompt: int, new: int, dtype: torch.dtype, args: argparse.Namespace
                        ) -> dict:  # fmt: skip
    """Tokens a second of greedy decoding; the peer is what memory allows that must yield weights and cache every step.

    The prefill is timed too and counts as the step that makes the first token. The ceiling, the bytes that a large
    copy reads and writes a second, is measured between the runs.
    """
    model = Transformer(config).to(args.device, dtype).requires_grad_(False)
    prompts = random_ids(config.vocab_size, [prompt] * rows)
    source = torch.zeros(2**30 if args.device == "cuda" else 2**26, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)

    def decode() -> None:
        generate(model, prompts, max_new_tokens=new, eos_ids=(), temperature=0.0)

    seconds, of_copy = race(decode, lambda: target.copy_(source), args.repeats, args.device)
    n_bytes, ceiling = decoding_bytes(model, rows, prompt, new), 2 * len(source) / of_copy
    rate, best = rows * new / seconds, rows * new * ceiling / n_bytes
    print(f"decoding: {rows} x ({prompt} + {new}) tokens, greedy, {str(dtype)[6:]}, not compiled\n"
          f"    {rate:,.0f} tokens/s read {n_bytes / seconds / 1e9:.3g} GB/s, a copy {ceiling / 1e9:.3g}")  # fmt: skip
    return row(f"decoding {rows} at a time, {CEILING} of bandwidth", rate, best, "tokens/s", True)


def decoding_bytes(model: Transformer, rows: int, prompt: int, new: int) -> int:
    """Bytes that `new` steps read: all weights every time, and keys and values of the tokens that each row then has."""
    c = model.config
    cached = rows * sum(range(prompt, prompt + new)) * 2 * c.depth * c.kv_heads * c.head_dim
    return (new * n_weights(model) + cached) * model.embed.weight.element_size()


def liger(args: argparse.Namespace) -> list[dict]:
    """Forward and backward of our kernels against those of liger_kernel, which are Triton, on inputs as in kernels."""
    functional = library("liger_kernel.transformers.functional")
    theirs = {
        "rms_norm": functools.partial(functional.liger_rms_norm, in_place=False),
        "add_rms_norm": functools.partial(functional.liger_fused_add_rms_norm, in_place=False),
        "swiglu": functional.liger_swiglu,
        "linear_cross_entropy": functools.partial(functional.liger_fused_linear_cross_entropy, reduction="sum"),
    }
    rows = []
    for name, function in theirs.items():
        ours, peer, inputs = kernel_case(name, args.device, full=True, peer=function)
        halves = [x.detach().clone().requires_grad_() for x in inputs[0].chunk(2, dim=-1)]
        their_inputs = halves if name == "swiglu" else inputs  # gate and up apart; it writes their gradients over them
        both = functools.partial(gradients, ours, inputs), functools.partial(gradients, peer, their_inputs)
        seconds = race(*both, args.repeats, args.device)
        rows.append(row(f"{name}, against Liger: time", *(1e3 * s for s in seconds), "ms", False))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The command line

AREAS = {"kernels": bench_kernels, "sft": bench_sft, "dpo": bench_dpo, "lora": bench_lora, "grpo": bench_grpo,
         "quantize": bench_quantize, "gpu": bench_gpu}  # fmt: skip


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("area", choices=AREAS)
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder of AREA.json (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument("--repeats", type=COUNT, default=9, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile our side (area gpu: always on CUDA)")
    parser.add_argument("--depth", type=COUNT, help="gpu, quantize: blocks of the model (default: 36, on a CPU 2, 8)")
    parser.add_argument("--batch-size", type=COUNT, help="gpu: rows of a training step (default: 8, on a CPU 4)")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is none on this machine")
    on_cuda = args.device == "cuda"
    toy = 8 if args.area == "quantize" else 2
    args.depth, args.batch_size = args.depth or (36 if on_cuda else toy), args.batch_size or (8 if on_cuda else 4)
    args.compile = args.compile or (on_cuda and args.area == "gpu")
    return args


def main(args: argparse.Namespace) -> None:
    args.compile = kernels.use_compile(args.compile)
    rows = AREAS[args.area](args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.area}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    width = max(len(r["name"]) for r in rows)
    print(f"{'':{width}}  {'ours':>12} {'peer':>12} {'ratio':>7}")
    for r in rows:
        line = f"{r['name']:{width}}  {r['ours']:12.4g} {r['peer']:12.4g} {r['ratio']:7.2f}  {r['unit']:9} {verdict(r)}"
        print(line.rstrip())


def verdict(r: dict) -> str:
    """In a word or two, how a row came out, and how it should have."""
    if CEILING in r["name"]:
        return f"{r['ratio']:.0%} of the ceiling"
    if r["name"].startswith("floor: "):
        return "if nothing else took time"
    better = "" if r["ratio"] == 1 else "better" if (r["ratio"] > 1) == r["higher_is_better"] else "worse"
    goal = next((goal for name, goal in GOALS.items() if f"{r['name']},".startswith(f"{name},")), None)
    met = goal and (r["ratio"] >= goal if r["higher_is_better"] else r["ratio"] <= goal)
    return f"{better:6}  goal {goal} {'met' if met else 'missed'}" if goal else better


if __name__ == "__main__":
    run(main, get_args)
