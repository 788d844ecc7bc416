"""This code against reference implementations, side by side: `python bench.py AREA`.

Prints a table and writes out/bench/AREA.json: {"rows": [{"name", "ours", "peer", "unit", "ratio", "higher_is_better"}]}
where ratio = ours / peer. Times are medians of runs that alternate between the two in one process, so that whatever
else the machine does falls on both alike. Memory is the peak above what was held before the call: on a CPU the growth
of the resident set (Linux), each figure in a process of its own, on a GPU what torch allocated.

Areas
    kernels   each kernel of kernels.py, forward and backward, against its eager reference: time, memory, and the error
              of value and gradient against the reference in float64
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import kernels

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
    seconds = {ours: [], peer: []}
    for i in range(repeats + 1):
        for call, times in seconds.items():
            start = now(device)
            call()
            if i:
                times.append(now(device) - start)
    return statistics.median(seconds[ours]), statistics.median(seconds[peer])


def now(device: str) -> float:
    """Seconds, after the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
            memory = [kernel_memory(name, which, args.device, args.compile) for which in (0, 1)]
            rows.append(row(f"{name}: peak memory", *memory, "MB", False))
        errors = kernel_errors(name, args.device)
        rows += [row(f"{name}: {what} error", *pair, "relative", False) for what, pair in errors.items()]
    return rows


def kernel_case(name: str, device: str, full: bool) -> tuple[Callable, Callable, list[Tensor]]:
    """The kernel, its reference and random inputs; `full`: at the size that is timed, in the dtype of training.

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

    ours, peer = getattr(kernels, name.split()[0]), getattr(kernels, name.split()[0] + "_reference")
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
        case "attention" | "attention over documents":
            inputs, rest = [normal(b, t, h, d), normal(b, t, h // 2, d), normal(b, t, h // 2, d)], ()
    options = {}
    if name == "attention over documents":
        options["documents"] = integers(2, b, t).cumsum(1) // 8
    if name == "linear_logps with entropy":
        options["with_entropy"] = True
    return (lambda *x: ours(*x, *rest, **options)), (lambda *x: peer(*x, *rest, **options)), inputs


KERNELS = ("rms_norm", "add_rms_norm", "rotary", "qk_norm_rotary", "swiglu", "attention", "attention over documents",
           "linear_cross_entropy", "linear_logps", "linear_logps with entropy")  # fmt: skip


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


def kernel_memory(name: str, which: int, device: str, compiled: bool) -> float:
    """Peak MB above the inputs of the kernel (which = 0) or of its reference (1), forward and backward."""
    if device == "cuda":
        return _kernel_memory(name, which, device, compiled)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        return fresh_process.submit(_kernel_memory, name, which, device, compiled).result()


def _kernel_memory(name: str, which: int, device: str, compiled: bool) -> float:
    kernels.use_compile(compiled)
    small, full = kernel_case(name, device, full=False), kernel_case(name, device, full=True)
    gradients(small[which], small[2])  # loads libraries and starts threads
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(full[which], full[2])
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; getrusage's maximum is inherited from the parent
    before = resident("VmRSS")
    gradients(full[which], full[2])
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB of this process in memory, from Linux's /proc: "VmRSS" now, "VmHWM" the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# ----------------------------------------------------------------------------------------------------------------------
# The command line

AREAS = {"kernels": bench_kernels}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder of AREA.json (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile our side with torch.compile")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.compile = kernels.use_compile(args.compile)
    rows = AREAS[args.area](args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.area}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    width = max(len(r["name"]) for r in rows)
    print(f"{'':{width}}  {'ours':>12} {'peer':>12} {'ratio':>7}")
    for r in rows:
        better = "" if r["ratio"] == 1 else "better" if (r["ratio"] > 1) == r["higher_is_better"] else "worse"
        print(f"{r['name']:{width}}  {r['ours']:12.4g} {r['peer']:12.4g} {r['ratio']:7.2f}  {r['unit']:9} {better}")


if __name__ == "__main__":
    main(get_args())
