"""Quantization: the weights of a finished model in a few bits each (GPTQ, Frantar et al. 2022, arXiv 2210.17323)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import kernels
from loop import RunFailed
from model import Transformer
from sft import Batch

# 1. The objective


class Inputs:
    """What a matrix is multiplied with in the calibration text: all that quantization and pruning need to know of it."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        dtype = torch.promote_types(dtype, torch.float32)
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)  # X^T X (in, in), summed over tokens
        self.absmax, self.abssum = self.gram.new_zeros(2, width)  # (in,): the largest of |x| in each channel, the sum
        self.sum = self.gram.new_zeros(width)  # of x
        self.n = 0  # tokens

    def add(self, x: Tensor) -> None:
        """Count the tokens x (n, in)."""
        x = x.to(self.gram.dtype)
        self.gram.addmm_(x.T, x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.abssum = self.abssum + x.abs().sum(0)
        self.sum = self.sum + x.sum(0)
        self.n += len(x)


MATRICES = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")  # of a block, in the order of its forward pass


@torch.no_grad()
def layer_by_layer(model: Transformer, batches: list[Batch]) -> Iterator[tuple[str, nn.Module, Inputs]]:
    """(path, matrix, what enters it) of every matrix of every block, in the order of the forward pass.

    batches: of sft.collate(..., with_documents=True); padding is not counted. Whoever iterates may change a matrix, or
    put another module at its path, before asking for the next: what enters that is then what the changed ones make of
    the text (GPTQ and SparseGPT want it so). One state per token is kept, and the text goes five times through each
    block.
    """
    states, tables = [model.embed(batch.input_ids) for batch in batches], []
    for batch in batches:
        T = batch.input_ids.shape[1]
        cos, sin = model._rotary_table(T, batch.input_ids.device)
        tables.append((cos[None, :T], sin[None, :T], kernels.document_mask(batch.documents), None))
    for i, block in enumerate(model.blocks):
        for name in MATRICES:
            matrix = block.get_submodule(name)
            inputs = Inputs(matrix.in_features, states[0].dtype, states[0].device)
            seen: list[Tensor] = []
            hook = matrix.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            for x, table, batch in zip(states, tables, batches, strict=True):
                block(x, *table)
                inputs.add(seen.pop()[batch.documents >= 0])
            hook.remove()
            yield f"blocks.{i}.{name}", matrix, inputs
        states = [block(x, *table) for x, table in zip(states, tables, strict=True)]


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1, H = gram + damping * mean(diagonal of gram) * I (2210.17323, step 3).

    U_jj^2 is the (j, j) entry of the inverse of H without the columns before j, and U_j: / U_jj says how the columns
    after j make up for a change of column j. A channel that is always 0 tells nothing, and gets H_jj = 1. RunFailed if
    H is not positive definite, as it always is with some damping.
    """
    h = gram.clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[gram.diagonal() == 0] = 1.0
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed or not lower.isfinite().all():
        raise RunFailed(f"X^T X of the inputs is not positive definite: raise the damping, now {damping}")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
