"""Planted bugs of kernels.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_kernels.py::"

MUTANTS = [
    Mutant(name, "kernels.py", old, new, TESTS + test)
    for name, old, new, test in [
        # elementwise
        ("denormals are kept", "torch.set_flush_denormal(True)", "", "test_denormals_are_flushed"),
        ("rms_norm forgets eps", ".add_(eps).rsqrt_()", ".rsqrt_()", "test_rms_norm_value"),
        ("rms_norm sums, not averages", "norm.square_().div_(x.shape[-1])", "norm.square_()", "test_rms_norm_value"),
        ("rms_norm forgets its weight", "(wide * r).mul_(weight)", "(wide * r)", "test_rms_norm_value"),
        (
            "rms_norm's statistics in half precision",
            "wide = x.to(_wide(x.dtype))\n        norm",
            "wide = x\n        norm",
            "test_rms_norm_statistics_are_fp32",
        ),
        ("rms_norm dx: sign of the mean", "mean * r**3, value=-1)", "mean * r**3)", "test_gradcheck[rms_norm]"),
        ("rms_norm dx: power of r", "mean * r**3", "mean * r**2", "test_gradcheck[rms_norm]"),
        ("rms_norm dx: a sum for the mean", ".view_as(r) / x.shape[-1]", ".view_as(r)", "test_gradcheck[rms_norm]"),
        ("rms_norm dx: weight", "(grad * weight).mul_(r)", "(grad * 1).mul_(r)", "test_gradcheck[rms_norm]"),
        ("rms_norm dw: r", "(r.reshape(-1) @ gx)", "gx.sum(0)", "test_gradcheck[rms_norm]"),
        (
            "rms_norm gives gradients to the frozen",
            "if ctx.needs_input_grad[0]:\n            mean",
            "if ctx.needs_input_grad[1]:\n            mean",
            "test_rms_norm_skips_gradients_nobody_wants",
        ),
        (
            "add_rms_norm returns its input",
            "rms_norm(total, weight, eps), total",
            "rms_norm(total, weight, eps), x",
            "test_add_rms_norm_returns_the_sum_too",
        ),
        (
            "rotary interleaves the pairs",
            "x1, x2 = x.chunk(2, dim=-1)\n    out = x * cos\n    out1, out2 = out.chunk(2, dim=-1)",
            "x1, x2 = x[..., ::2], x[..., 1::2]\n    out = x * cos\n    out1, out2 = out[..., ::2], out[..., 1::2]",
            "test_rotary_is_a_complex_rotation",
        ),
        (
            "rotary turns half of the pair the wrong way",
            "out1.addcmul_(x2, sin1, value=-1)",
            "out1.addcmul_(x2, sin1)",
            "test_rotary_is_a_complex_rotation",
        ),
        ("rotary's backward rotates on", "-sin2, -sin1)", "sin1, sin2)", "test_gradcheck[rotary]"),
        (
            "rotary gives every row the first row's angles",
            "cos, sin1, sin2 = cos.unsqueeze(-2), sin1.unsqueeze(-2)",
            "cos, sin1, sin2 = cos[:1].unsqueeze(-2), sin1[:1].unsqueeze(-2)",
            "test_rotary_takes_angles_by_row",
        ),
        (
            "QK norm after the rotation",
            "return rotary(rms_norm(x, weight, eps), cos, sin)",
            "return rms_norm(rotary(x, cos, sin), weight, eps)",
            "test_kernel_equals_reference",
        ),
        (
            "swiglu with its halves exchanged",
            "gate, up = gate_up.chunk(2, dim=-1)\n        activated",
            "up, gate = gate_up.chunk(2, dim=-1)\n        activated",
            "test_swiglu_value",
        ),
        (
            "swiglu d_gate without up",
            "silu_backward.grad_input(grad * up",
            "silu_backward.grad_input(grad",
            "test_gradcheck[swiglu]",
        ),
        (
            "swiglu d_up without the sigmoid",
            "torch.mul(grad, activated",
            "torch.mul(grad, gate",
            "test_gradcheck[swiglu]",
        ),
        # attention
        ("attention is not causal", "is_causal=mask is None", "is_causal=False", "test_attention_causal"),
        (
            "M3: one query and a cache see key 0 alone",
            "elif mask is None and q.shape[1] != k.shape[1]:",
            "elif False:",
            "test_attention_queries_are_the_last_positions",
        ),
        (
            "the first queries, not the last",
            "torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])",
            "torch.bool, device=q.device).tril()",
            "test_attention_queries_are_the_last_positions",
        ),
        (
            "M5: groups of heads interleaved",
            "q_of_group = q.view(q.shape[0], k.shape[2], -1, q.shape[3])",
            "q_of_group = q.view(q.shape[0], -1, k.shape[2], q.shape[3]).transpose(1, 2)",
            "test_attention_with_the_mask_of_a_cache",
        ),
        (
            "M5 in the reference",
            "k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)",
            "k, v = k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1)",
            "test_kernel_equals_reference",
        ),
        (
            "a single query ignores the mask",
            "torch.baddbmm(mask.flatten(0, 1),",
            "torch.baddbmm(torch.zeros_like(mask).flatten(0, 1),",
            "test_attention_with_the_mask_of_a_cache",
        ),
        (
            "scores of a single query not scaled",
            "alpha=q.shape[-1] ** -0.5)",
            "alpha=1.0)",
            "test_attention_with_the_mask_of_a_cache",
        ),
        (
            "several queries ignore the mask",
            "attn_mask=mask, is_causal=mask is None",
            "attn_mask=None, is_causal=mask is None",
            "test_attention_with_the_mask_of_a_cache",
        ),
        (
            "what is added to the scores is ignored by the reference",
            "else scores + mask",
            "else scores",
            "test_kernel_equals_reference",
        ),
        ("documents see the future", "_same(documents).tril()", "_same(documents)", "test_attention_over_documents"),
        (
            "documents hear each other",
            "documents[:, None, :, None] == documents[:, None, None, :]",
            "documents[:, None, :, None] >= documents[:, None, None, :]",
            "test_attention_is_deaf_to_other_documents_and_the_future",
        ),
        # linear + cross-entropy
        (
            "the last, short chunk is dropped",
            "range(0, len(hidden), size)",
            "range(0, len(hidden) - size + 1, size)",
            "test_chunks_do_not_matter",
        ),
        (
            "all logits at once",
            "max(1, min(chunk_size, len(hidden)))",
            "max(1, len(hidden))",
            "test_all_logits_never_exist",
        ),
        (
            "the default chunk holds all",
            "n_logits // len(weight) // 64 * 64",
            "n_logits",
            "test_default_chunk_bounds_the_logits",
        ),
        ("S16: no labels, no loss but a crash", "max(1, min(", "max(0, min(", "test_all_rows_ignored"),
        (
            "labels below the vocabulary are ignored",
            "labels != IGNORED).nonzero()",
            "labels >= 0).nonzero()",
            "test_label_outside_the_vocabulary",
        ),
        ("labels are not checked", "if len(wrong):", "if False:", "test_label_outside_the_vocabulary"),
        (
            "the first label past the end passes",
            "labels >= len(weight)",
            "labels > len(weight)",
            "test_label_outside_the_vocabulary",
        ),
        (
            "cross-entropy d_logits: onehot",
            "torch.full_like(nll, -1.0)",
            "torch.full_like(nll, 0.0)",
            "test_kernel_equals_reference",
        ),
        ("cross-entropy d_logits: softmax", "probs = logps.exp_()", "probs = logps", "test_kernel_equals_reference"),
        ("cross-entropy value: sign", "nll = -logps.gather", "nll = logps.gather", "test_linear_cross_entropy_value"),
        ("cross-entropy keeps the last chunk's loss", "loss += nll", "loss = nll", "test_linear_cross_entropy_value"),
        (
            "cross-entropy through an underflowing softmax",
            "logps, labels = F.log_softmax(logits, dim=-1)",
            "logps, labels = F.softmax(logits, dim=-1).log()",
            "test_extreme_logits_stay_finite",
        ),
        (
            "weight gradient of the last chunk alone",
            "total.addmm_(d_logits.T, hidden)",
            "total.copy_(d_logits.T @ hidden)",
            "test_chunks_do_not_matter",
        ),
        ("upstream gradient ignored", "g.mul_(grad)", "g.mul_(1)", "test_gradient_is_scaled_by_what_comes_down"),
        (
            "gradients scaled twice",
            "grads, ctx.grads = ctx.grads, None",
            "grads = ctx.grads",
            "test_cross_entropy_refuses_a_second_backward",
        ),
        (
            "a gradient for the frozen head",
            "if ctx.grads[1] is not None:",
            "ctx.grads[1] = torch.zeros_like(w) if ctx.grads[1] is None else ctx.grads[1]\n            if True:",
            "test_frozen_parts_cost_no_product",
        ),
        (
            "gradients computed under no_grad",
            "if not (torch.is_grad_enabled() and ",
            "if not (",
            "test_no_gradient_no_cost",
        ),
        ("autocast ignored", "if torch.is_autocast_enabled(device) and", "if False and", "test_autocast"),
        (
            "weight gradient summed in half precision",
            "torch.zeros_like(w, dtype=_wide(w.dtype)) if ctx.needs_input_grad[1] else None]",
            "torch.zeros_like(w) if ctx.needs_input_grad[1] else None]",
            "test_autocast",
        ),
        # linear + log-probs
        (
            "log-probs: weight gradient summed in half precision",
            "d_weight = torch.zeros_like(w, dtype=_wide(w.dtype))",
            "d_weight = torch.zeros_like(w)",
            "test_autocast",
        ),
        (
            "temperature not in the log-probs",
            "z = logits if temperature == 1.0 else logits.div_(temperature)\n    lse",
            "z = logits\n    lse",
            "test_linear_logps_and_entropy_value",
        ),
        (
            "temperature multiplies",
            "z = logits if temperature == 1.0 else logits.div_(temperature)\n    lse",
            "z = logits.mul_(temperature)\n    lse",
            "test_linear_logps_and_entropy_value",
        ),
        (
            "temperature not in the recomputation",
            "z = logits if temperature == 1.0 else logits.div_(temperature)\n    z = z.sub_",
            "z = logits\n    z = z.sub_",
            "test_gradcheck",
        ),
        ("1/T missing from d_logps", "d_logps / ctx.temperature", "d_logps", "test_gradcheck[linear_logps]"),
        (
            "1/T missing from d_entropy",
            "d_entropy / ctx.temperature",
            "d_entropy",
            "test_gradcheck[linear_logps and entropy]",
        ),
        ("entropy: sign", "-z.mul_(z.exp()).sum(-1)", "z.mul_(z.exp()).sum(-1)", "test_uniform_model"),
        ("entropy: p missing", "-z.mul_(z.exp()).sum(-1)", "-z.sum(-1)", "test_linear_logps_and_entropy_value"),
        (
            "d_entropy: + entropy missing",
            "z.add_(entropy[:, None]).mul_(d_e",
            "z.mul_(d_e",
            "test_gradcheck[linear_logps and entropy]",
        ),
        ("d_entropy: p missing", ".mul_(p).neg_()", ".neg_()", "test_gradcheck[linear_logps and entropy]"),
        ("d_entropy: sign", ".mul_(p).neg_()", ".mul_(p)", "test_gradcheck[linear_logps and entropy]"),
        # gradcheck takes one output at a time
        (
            "d_logps lost beside d_entropy",
            ".add_(d_logps[:, None]).mul_(p)",
            ".mul_(p)",
            "test_kernel_equals_reference",
        ),
        ("d_logps: softmax", "z.exp_().mul_(-d_logps[:, None])", "z.zero_()", "test_gradcheck[linear_logps]"),
        (
            "d_logps: onehot",
            "targets[:, None], d_logps[:, None])",
            "targets[:, None], 0 * d_logps[:, None])",
            "test_gradcheck[linear_logps]",
        ),
        (
            "log-probs of the kept rows land on the first rows",
            "index_copy(0, kept, x)",
            "index_copy(0, torch.arange(len(kept)), x)",
            "test_linear_logps_and_entropy_value",
        ),
        # compiling
        (
            "the last chunk has a shape of its own",
            "_padded(labels[rows], size if _compiling else n)",
            "labels[rows]",
            "test_one_graph_serves_every_number_of_tokens",
        ),
        (
            "padding of the last chunk in the loss",
            "loss += nll[:n].sum()",
            "loss += nll.sum()",
            "test_compiled_equals_eager[linear_cross_entropy]",
        ),
        (
            "padding of the last chunk in the gradient",
            "_add_product(ctx.grads[1], d_logits[:n], h[rows])",
            "_add_product(ctx.grads[1], d_logits, F.pad(h[rows], (0, 0, 0, len(logits) - n), value=1.0))",
            "test_compiled_equals_eager[linear_cross_entropy]",
        ),
        (
            "the recompile limit is silent",
            "fail_on_recompile_limit_hit = True",
            "fail_on_recompile_limit_hit = False",
            "test_one_graph_serves_every_number_of_tokens",
        ),
        (
            "no compiler, no fallback",
            "on and _has_compiler()",
            "on and (_has_compiler() or on)",
            "test_no_compiler_means_eager",
        ),
    ]
]
