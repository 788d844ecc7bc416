"""Planted bugs of prune.py, of what stores its models in model.py, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_prune.py::"
WANDA = "test_wanda_by_hand"
LEAST = "test_exactly_the_least_are_left_out"
N_OF_M = "test_n_of_every_m_neighbours_in_a_row_are_kept"
BRUTE = "test_sparsegpt_is_brute_force"
BLOCKS = "test_sparsegpt_in_blocks_is_sparsegpt_at_once"
SEES = "test_each_matrix_sees_what_the_pruned_ones_before_it_make_of_the_text"
GLOBAL = "test_a_global_threshold_is_one_for_all_matrices"
SILENCED = "test_taken_out_is_silenced"
GROUPS = "test_of_heads_that_share_keys_as_many_are_kept_in_each_group"
GOES = "test_what_goes_with_a_unit_by_hand"
TAYLOR = "test_taylor_is_the_size_of_weight_times_gradient"
SCORES = "test_other_scores"
UNITS = "test_llm_pruner_takes_out_the_units_of_least_score"
FLAP = "test_flap_by_hand"
INFLUENCE = "test_influence_is_how_far_a_layer_turns_the_stream"
LAYERS = "test_shortgpt_leaves_out_the_layer_of_least_influence"
ROTATED = "test_rotating_the_stream_changes_nothing"
CUT = "test_directions_that_are_never_used_are_cut_off_for_nothing"
VARIANCE = "test_slicegpt_keeps_the_directions_of_most_variance"
SVD_LLM = "test_svd_llm_loses_as_little_as_any_matrix_of_that_rank"
SVD = "test_svd_is_the_nearest_matrix_and_asvd_that_of_scaled_columns"
FULL_RANK = "test_all_of_the_rank_is_the_matrix"
DEAD = "test_an_input_that_is_always_0_has_a_whitening"
RANKS = "test_two_factors_have_the_numbers_that_were_asked_for"
FOLLOWS = "test_low_rank_follows_what_the_factors_before_make_of_the_text"
SAVED = "test_a_saved_pruned_model_is_itself_when_it_is_loaded"
THEIRS = "test_transformers_loads_what_keeps_the_architecture"
REFUSED = "test_transformers_refuses_what_does_not"
MASKED = "test_lora_under_a_mask_is_merged_as_it_was_trained"
GRADIENT = "test_no_gradient_goes_to_what_is_pruned"
KD = "test_kd_by_hand"
ZERO = "test_what_is_pruned_is_exactly_0_after_recovery"
SPLIT = "test_splitting_a_batch_changes_nothing"
LOOP = "test_recovery_is_a_plain_loop"
TEXT = "test_lora_learns_the_text"
BITS = "test_bits_per_byte_by_hand"
ENTROPY = "test_the_code_length_of_a_report_is_that_of_its_chain"
SIZES = "test_sizes_by_hand"
LONG = "test_long_rows_of_the_world_are_treated_as_those_of_a_file"
SPEED = "test_speed_is_tokens_over_the_median_second"
NARROW = "test_a_narrow_checkpoint_stays_narrow"
ALIKE = "test_a_narrow_checkpoint_is_measured_as_the_dense_one_was"
KINDS = "test_rows_of_the_world_are_a_third_of_each_kind"
APART = "test_reports_that_are_measured_are_not_those_of_the_training"
WHOLE = "test_a_run_is_measured_before_after_and_in_between"
FLAGS = "test_flags_that_do_not_fit_are_refused"
LEFT = "test_something_is_always_left"
SOME = "test_some_rows_of_a_file_are_calibrated_on"
APART_IN_MEMORY = "test_every_parameter_of_a_smaller_model_has_memory_of_its_own"
STORED = "test_recovery_of_the_dense_model_is_a_baseline"
PATTERNS = "test_patterns_that_are_none_are_refused"
BRINGS = "test_a_method_brings_its_flags"
TABLE = "test_the_table_runs_every_row"

IN_PRUNE = [
    # scores and masks
    ("magnitude keeps the sign", "return wide(weight).abs()\n", "return wide(weight)\n", WANDA),
    ("wanda keeps the sign", "wide(weight).abs() * inputs", "wide(weight) * inputs", WANDA),
    ("wanda takes the square of the norm", "inputs.gram.diagonal().sqrt()", "inputs.gram.diagonal()", WANDA),
    ("wanda takes the norm of whole rows of the gram", "inputs.gram.diagonal().sqrt()", "inputs.gram.norm(dim=0)",
     WANDA),
    ("the largest go", "rows.argsort(dim=-1, stable=True)[:, :gone]", "rows.argsort(dim=-1, descending=True)[:, :gone]",
     LEAST),
    ("the share is rounded down", "round(sparsity * rows.shape[1])", "int(sparsity * rows.shape[1])", LEAST),
    ("equal scores by chance", "rows.argsort(dim=-1, stable=True)", "rows.flip(1).argsort(dim=-1, stable=True)", LEAST),
    ("rows are compared with each other", 'scores if scope == "row" else', 'scores if scope == "layer" else', LEAST),
    ("n of m are left out", "scores.reshape(-1, m), m - n", "scores.reshape(-1, m), n", N_OF_M),
    ("the m are below each other", "scores.reshape(-1, m), m - n",
     "scores.T.reshape(-1, m), m - n", N_OF_M),
    # SparseGPT
    ("no update at all", "            w[:, j:end] -= errors[:, j - start, None] * upper[j, j:end]\n", "", BRUTE),
    ("the update has the wrong sign", "w[:, j:end] -=", "w[:, j:end] +=", BRUTE),
    ("Q6: no propagation to later blocks", "        w[:, end:] -= errors @ upper[start:end, end:]\n", "", BLOCKS),
    ("Q6: the index in the block for that in the matrix", "errors @ upper[start:end, end:]",
     "errors @ upper[: end - start, end:]", BLOCKS),
    ("Q6: later blocks learn of kept weights, too", "torch.where(kept[:, j], 0.0, w[:, j] / scale[j])",
     "w[:, j] / scale[j]", BRUTE),
    ("the error is not divided", "torch.where(kept[:, j], 0.0, w[:, j] / scale[j])",
     "torch.where(kept[:, j], 0.0, w[:, j])", BRUTE),
    ("the score is that of magnitude", "(w[:, some] / scale[some]).square()", "w[:, some].square()", BRUTE),
    ("the score is multiplied", "(w[:, some] / scale[some]).square()", "(w[:, some] * scale[some]).square()", BRUTE),
    ("zeros are chosen by the weights of the beginning", "keep((w[:, some] / scale[some])",
     "keep((wide(weight)[:, some] / scale[some])", BRUTE),
    ("groups of a pattern begin anywhere in a block", "    block = max(group, block - block % max(1, group))\n", "",
     BRUTE),
    ("the zeros are only nearly zero", "return w.masked_fill(~kept, 0.0).to", "return w.to", BRUTE),
    ("Q8: no damping", "inverse_factor(inputs.gram, DAMPING)", "inverse_factor(inputs.gram, 0.0)",
     (SEES,)),
    # over a whole model
    ("all matrices see the dense model", "            linear.weight.masked_fill_(~masks[path], 0.0)\n    return model",
     "    for path in masks if args.method != 'sparsegpt' else ():\n"
     "        model.get_submodule(path).weight.masked_fill_(~masks[path], 0.0)\n    return model", SEES),
    ("q, k and v are compared with each other", "everywhere = [(path, list(rows.values())) for path, _, rows",
     "everywhere = [(path, [(0, m.out_features)]) for path, m, rows", SEES),
    ("a global threshold for each matrix", 'kept = keep(flat, args.sparsity, "unstructured", "layer").split(',
     "kept = torch.cat([keep(x, args.sparsity, 'unstructured', 'layer').flatten() for x in scores.values()]).split(",
     GLOBAL),
    ("a global threshold after the first zeros", "scores = {path: score(linear.weight, inputs) for",
     "scores = {path: score(linear.weight.mul_(0.5), inputs) * 2 for", GLOBAL),
    ("--scope global is not looked at", '    if args.scope == "global":\n        return prune', "    if False:\n"
     "        return prune", GLOBAL),
    ("a pattern that rows do not fill", "if pattern != \"unstructured\" and n_in %", "if False and n_in %",
     "test_a_pattern_must_fill_the_rows"),
    # units
    ("a head's rows of up for gate", "both = torch.cat([channels, c.ffn_width + channels])",
     "both = torch.cat([channels, channels])", SILENCED),
    ("down keeps its first columns", "block.ffn.down.weight.detach()[:, channels]",
     "block.ffn.down.weight.detach()[:, : len(channels)]", SILENCED),
    ("out keeps its first columns", "block.attention.out.weight.detach()[:, q]",
     "block.attention.out.weight.detach()[:, : len(q)]", SILENCED),
    ("values begin where keys do", "rows = torch.cat([q, start_k + kv, start_v + kv])",
     "rows = torch.cat([q, start_k + kv, start_k + kv])", SILENCED),
    ("keys of other heads", "shared = heads if alone else", "shared = torch.arange(n) if alone else", SILENCED),
    ("the bias of q, k and v stays", "block.attention.qkv.bias.detach()[rows]",
     "block.attention.qkv.bias.detach()[: len(rows)]", SILENCED),
    ("all layers lose the units of the first", "heads, channels = self.heads[i], self.channels[i]",
     "heads, channels = self.heads[0], self.channels[0]", SILENCED),
    ("heads are not in order", "groups.topk(n).indices.sort().values", "groups.topk(n).indices", GROUPS),
    ("heads of any group", "groups = heads.view(c.depth, c.kv_heads, group) if group > 1 else heads[:, None]",
     "groups = heads[:, None]", GROUPS),
    ("none of a group is left", "n = max(1, round((1 - of_heads)", "n = max(0, round((1 - of_heads)", GROUPS),
    ("the sparsity is what is kept of heads", "round((1 - of_heads) * groups", "round(of_heads * groups", GROUPS),
    ("the sparsity is what is kept of channels", "round((1 - of_channels) * c.ffn_width)",
     "round(of_channels * c.ffn_width)", GROUPS),
    ("the worst channels are kept", "channels.topk(m).indices", "channels.topk(m, largest=False).indices", GROUPS),
    ("--units is not looked at", 'sparsity if units in (kind, "both") else 0.0', "sparsity", GROUPS),
    ("a head without its columns of out", "q + out.sum(0).view(c.heads, -1).sum(1) +", "q +", GOES),
    ("a head's rows of k and v always count", "(k + v if c.heads == c.kv_heads else 0)",
     "(k + v).repeat_interleave(c.heads // c.kv_heads)", GOES),
    ("a head's rows of k and v never count", "(k + v if c.heads == c.kv_heads else 0)", "0", GOES),
    ("a head without its rows of v", "(k + v if c.heads", "(k if c.heads", GOES),
    ("a channel without up", "gate_up.sum(1).view(2, -1).sum(0)", "gate_up.sum(1).view(2, -1)[0]", GOES),
    ("gate and up take turns", "gate_up.sum(1).view(2, -1).sum(0)", "gate_up.sum(1).view(-1, 2).sum(1)", GOES),
    ("a channel without down", ".sum(0) + down.sum(0))", ".sum(0))", GOES),
    ("the gradient alone", "(w.detach() * grad).abs()", "grad.abs()", TAYLOR),
    ("the sign of w dL/dw", "(w.detach() * grad).abs() /", "(w.detach() * grad) /", TAYLOR),
    ("the sum over batches", ".abs() / len(batches)", ".abs()", TAYLOR),
    ("the loss of all tokens together", "loss = sft_loss(model, batch) / batch.completion_mask.sum()",
     "loss = sft_loss(model, batch)", TAYLOR),
    ("the size is not squared", "wide(w.detach()).square()", "wide(w.detach()).abs()", SCORES),
    ("chance without a seed", "g = torch.Generator().manual_seed(seed)\n", "g = torch.Generator()\n", SCORES),
    ("magnitude whatever is asked", "saliency(model, batches, args.score, args.seed)",
     "saliency(model, batches, 'magnitude', args.seed)", UNITS),
    ("taylor whatever is asked", "saliency(model, batches, args.score, args.seed)",
     "saliency(model, batches, 'taylor', args.seed)", UNITS),
    ("always the same chance", "saliency(model, batches, args.score, args.seed)",
     "saliency(model, batches, args.score, 0)", UNITS),
    ("a model loses the biases that it came with", "out_bias=c.out_bias or bool(biases)", "out_bias=bool(biases)",
     "test_what_comes_with_biases_keeps_them"),
    # FLAP
    ("FLAP scores without the variance", "variance * wide(linear.weight).square()", "wide(linear.weight).square()",
     FLAP),
    ("FLAP scores without the weights", "variance * wide(linear.weight).square()",
     "variance.expand_as(linear.weight).clone()", FLAP),
    ("the second moment for the variance", "(inputs.gram.diagonal() / inputs.n - means[path].square()).clamp(min=0)",
     "inputs.gram.diagonal() / inputs.n", FLAP),
    ("the sum for the mean", "means[path] = inputs.sum / inputs.n", "means[path] = inputs.sum", FLAP),
    ("the mean of the sizes", "means[path] = inputs.sum / inputs.n", "means[path] = inputs.abssum / inputs.n", FLAP),
    ("the bias of what is kept", "(mean * gone)", "(mean * ~gone)", FLAP),
    ("the bias of all", "(mean * gone)", "mean", FLAP),
    ("no bias", "units.taken(model, biases), {}", "units.taken(model), {}", FLAP),
    ("the bias that was there is lost", "old = 0.0 if linear.bias is None else linear.bias", "old = 0.0",
     "test_flap_twice_keeps_the_first_bias"),
    # layers
    ("the cosine for the distance", "return 1 - total / n\n", "return total / n\n", INFLUENCE),
    ("half layers", "stream(model, batch)[::2]", "stream(model, batch)[::1][: model.config.depth + 1]", INFLUENCE),
    ("padding counts", "[wide(x[batch.documents >= 0]) for x in seen]", "[wide(x.flatten(0, 1)) for x in seen]",
     INFLUENCE),
    ("documents see each other", "model.hidden(batch.input_ids, documents=batch.documents)\n    for hook",
     "model.hidden(batch.input_ids)\n    for hook", INFLUENCE),
    ("the layers of least influence are kept", "kept = scores.topk(n).indices",
     "kept = scores.topk(n, largest=False).indices",
     LAYERS),
    ("the layers that are kept change places", "kept = scores.topk(n).indices.sort().values.tolist()",
     "kept = scores.topk(n).indices.sort(descending=True).values.tolist()", LAYERS),
    ("the first layers are kept", "name, p in model.blocks[old].named_parameters()",
     "name, p in model.blocks[new].named_parameters()", LAYERS),
    ("chance is not looked at", '    if args.score == "random":\n        scores', "    if False:\n        scores",
     "test_layers_may_be_left_out_by_chance"),
    ("no layer is left", "model.config, max(1, round((1 - args.sparsity)",
     "model.config, max(0, round((1 - args.sparsity)", LEFT),
    ("no channel is left", "m = max(1, round((1 - of_channels)", "m = max(0, round((1 - of_channels)", LEFT),
    ("no direction is left", "width = max(8, round(", "width = max(0, round(", LEFT),
    # SliceGPT
    ("gains are not moved into matrices", "(wide(linear.weight) * wide(norm.weight) @ q)", "(wide(linear.weight) @ q)",
     ROTATED),
    ("the norms keep their gains",
     '        changed |= {f"blocks.{i}.{name}_norm.weight": gain() for name in ("attention", "ffn")}\n', "", ROTATED),
    ("the last gain stays", '               "norm.weight": gain()}', '               }', ROTATED),
    ("the head stays the embedding", "replace(c, width=width, tied=False)", "replace(c, width=width)", ROTATED),
    ("a norm of fewer numbers divides by a larger root", "math.sqrt(c.width / width))", "1.0)", CUT),
    ("the gain is turned round", "math.sqrt(c.width / width))", "math.sqrt(width / c.width))", CUT),
    ("biases are not rotated", "changed[f\"blocks.{i}.{name}.{kind}\"] = write(p)",
     "changed[f\"blocks.{i}.{name}.{kind}\"] = write(p) if p.ndim == 2 else p[:width]", CUT),
    ("all norms are one tensor", '_norm.weight": gain() for name in ("attention", "ffn")}',
     '_norm.weight": changed["norm.weight"] for name in ("attention", "ffn")}', APART_IN_MEMORY),
    ("the first components are cut off", ".eigenvectors.flip(1)[:, :width]", ".eigenvectors[:, :width]", CUT),
    ("large states count more", "            x = F.normalize(x, dim=-1)  # what", "            # what", VARIANCE),
    ("half of the states", "        for x in stream(model, batch):\n", "        for x in stream(model, batch)[::2]:\n",
     VARIANCE),
    # low rank
    ("SVD-LLM does not look at the text", 'if method == "svd":', "if True:", SVD_LLM),
    ("S is upper triangular", "return cholesky(h, 1e-4)", "return cholesky(h, 1e-4, upper=True)",
     SVD_LLM),
    ("S is H", "return cholesky(h, 1e-4)", "return h", SVD_LLM),
    ("what is not positive definite ends in a traceback", "return cholesky(h, 1e-4)",
     "return torch.linalg.cholesky(h)", "test_inputs_that_are_not_finite_end_in_a_line"),
    ("SVD-LLM whatever is asked", "whitening(args.method, inputs), rank",
     'whitening("svd-llm", inputs), rank', FOLLOWS),
    ("S is not taken out again", "torch.linalg.solve(s, root[:, None] * vt[:rank], left=False)",
     "root[:, None] * vt[:rank]", FULL_RANK),
    ("S is taken out from the other side", "torch.linalg.solve(s, root[:, None] * vt[:rank], left=False)",
     "torch.linalg.solve(s, (root[:, None] * vt[:rank]).T).T", FULL_RANK),
    ("the singular values count twice", "root = sigma[:rank].sqrt()", "root = sigma[:rank]", FULL_RANK),
    ("the smallest singular values", "root = sigma[:rank].sqrt()",
     "u, sigma, vt = u.flip(1), sigma.flip(0), vt.flip(0)\n    root = sigma[:rank].sqrt()", SVD),
    ("asvd scales by the mean itself", "mean.clamp(min=1e-4 * mean.max()).sqrt()", "mean.clamp(min=1e-4 * mean.max())",
     SVD),
    ("asvd by the largest", "mean = inputs.abssum / inputs.n", "mean = inputs.absmax", SVD),
    ("asvd by the signed mean", "mean = inputs.abssum / inputs.n", "mean = (inputs.sum / inputs.n).abs()", SVD),
    ("Q8: no damping of the whitening", "    h.diagonal().add_(1e-4 * h.diagonal().mean())", "    h.diagonal().add_(0)",
     DEAD),
    ("Q8: a dead channel has no scale", "torch.diag(mean.clamp(min=1e-4 * mean.max()).sqrt())",
     "torch.diag(mean.sqrt())",
     DEAD),
    ("half of the rank", "int((1 - args.sparsity) * n_out", "int(0.5 * (1 - args.sparsity) * n_out", RANKS),
    ("the rank as a share of the smaller side", "* n_out * n_in / (n_out + n_in)", "* min(n_out, n_in)", RANKS),
    ("no rank is left", "= max(1, int((1 - args.sparsity)", "= max(0, int((1 - args.sparsity)", RANKS),
    ("the bias is lost", '("up", up, linear.bias))', '("up", up, None))', RANKS),
    ("factors see the dense model", "for path, linear, inputs in layer_by_layer(model, batches):\n        n_out",
     "for path, linear, inputs in layer_by_layer(copy.deepcopy(model), batches):\n        n_out", FOLLOWS),
    # recovery
    ("LoRA fills the gaps while it is trained", "(self.base.weight + self.scale * low) * self.mask",
     "(self.base.weight + self.scale * low)", (MASKED, ZERO)),
    ("LoRA fills the gaps when it is merged", "return super().weight() * self.mask", "return super().weight()",
     (MASKED, ZERO)),
    ("LoRA without its scale", "self.base.weight + self.scale * low", "self.base.weight + low", MASKED),
    ("matrices with a mask get LoRA without one", "if path in masks else LoRA(linear, rows, c)",
     "if not masks else LoRA(linear, rows, c)", MASKED),
    ("the base learns, too", "    model.requires_grad_(False)\n    for path", "    for path", MASKED),
    ("zeros learn under kd", "lambda grad, mask=mask: grad * mask)", "lambda grad, mask=mask: grad)", (GRADIENT, ZERO)),
    ("all masks are the last one", "lambda grad, mask=mask: grad * mask", "lambda grad: grad * mask", GRADIENT),
    ("weights decay under kd", "adamw(model, args.lr, 0.0)", "adamw(model, args.lr, 0.1)", LOOP),
    ("K1: KL(pruned, dense)", 'batch.completion_mask, kind="forward_kl")',
     'batch.completion_mask, kind="reverse_kl")', KD),
    ("K2: at temperature 2", 'batch.completion_mask, kind="forward_kl")',
     'batch.completion_mask, kind="forward_kl", temperature=2.0)', KD),
    ("K4: prompt and padding count", "[said], batch.completion_mask,", "[said], batch.completion_mask * 0 + 1,", KD),
    ("K5: teacher and teacher", " hidden = model.hidden_before(batch", " hidden = teacher.hidden_before(batch", KD),
    ("K5: the teacher is the model", "said = teacher.hidden_before(", "said = model.hidden_before(", KD),
    ("K5: the teacher has the model's head", "documents=batch.documents), teacher.head.weight",
     "documents=batch.documents), model.head.weight", KD),
    ("documents see each other under kd",
     " hidden = model.hidden_before(batch.input_ids, documents=batch.documents)\n    return linear",
     " hidden = model.hidden_before(batch.input_ids)\n    return linear", KD),
    ("kd from the pruned model itself", "kd_loss(model, dense, batch)", "kd_loss(model, model, batch)", LOOP),
    ("kd learns the text", 'if args.recover == "kd" else sft_loss', 'if args.recover == "none" else sft_loss', LOOP),
    ("lora learns from the dense model", 'if args.recover == "kd" else sft_loss', "if True else sft_loss", TEXT),
    ("the mean over micro-batches",
     "n_tokens, loss_sum = sum(int(batch.completion_mask.sum()) for batch in batches), 0.0",
     "n_tokens, loss_sum = int(batches[0].completion_mask.sum()), 0.0", SPLIT),
    ("gradients pile up over steps", "        optimizer.zero_grad()\n", "", LOOP),
    ("the schedule is not followed", "        lr = set_lr(optimizer, args, step)\n", "        lr = args.lr\n", LOOP),
    ("gradients are not clipped", "clip(model, args.grad_clip)", "clip(model, 0.0)", LOOP),
    ("what was trained is not merged", 'if total and args.recover == "lora":\n        merge(model)',
     'if False:\n        merge(model)', ZERO),
    # data and measurement
    ("nats", "nats / math.log(2) / mean_bytes", "nats / mean_bytes", BITS),
    ("the mean of the rows' own rates", "statistics.fmean(n_bytes_of(row, tokenizer) for row in test[\"rows\"])",
     "statistics.median(n_bytes_of(row, tokenizer) for row in test[\"rows\"])", BITS),
    ("rows of the world of any length", 'rows = fitting(rows, "rows", args, loop)', "rows = [*rows]", LONG),
    ("no row is left", "if not rows[args.rows if args.steps", "if not rows[0 if args.steps", LONG),
    ("rows that nothing needs", 'if args.steps and args.recover != "none" else 0 :]', "if True else 0 :]", LONG),
    ("sparsity of what is left", "1 - present / whole", "1 - present / sum(p.numel() for p in matrices)", SIZES),
    ("zeros take no room", '"MB": [n * width / 1e6]', '"MB": [(n - zeros) * width / 1e6]', SIZES),
    ("the bits that say what is there are free", "(sum(p.numel() for p in matrices) / 8 if zeros else 0)", "0", SIZES),
    ("a byte each", "p.numel() for p in matrices) / 8 if zeros", "p.numel() for p in matrices) if zeros", SIZES),
    ("a number takes 4 bytes", "width = model.embed.weight.element_size()", "width = 4", SIZES),
    ("the embedding counts for sparsity", "matrices = [p for p in model.blocks.parameters() if p.ndim == 2]",
     "matrices = [p for p in model.parameters() if p.ndim == 2]", SIZES),
    ("the warm-up counts", "statistics.median(times[1:])", "statistics.fmean(times)", SPEED),
    ("one model after the other",
     "    for _ in range(8):\n        for model, times in zip(models, found, strict=True):\n",
     "    for model, times in zip(models, found, strict=True):\n        for _ in range(8):\n", SPEED),
    ("what is written is fp32", "model=model.to(dtype), tokenizer", "model=model.float(), tokenizer", NARROW),
    ("after is measured in less than before", "measured(model.float(), tokenizer", "measured(model, tokenizer", ALIKE),
    ("after is what was not yet rounded", "model=model.to(dtype), tokenizer=tokenizer)",
     "model=copy.deepcopy(model).to(dtype), tokenizer=tokenizer)", ALIKE),
    ("what is timed is fp32", "(dense.to(dtype), model.to(dtype))", "(dense, model)", ALIKE),
    ("one kind is twice as frequent", "for i in range(n // 3 + 1):\n", "for i in range(n // 3 + 2):\n", KINDS),
    ("always the same rows", "world.sft_rows(n, 1_000_000 + seed), world.base_documents(n, 1_000_000 + seed)",
     "world.sft_rows(n, 0), world.base_documents(n, 0)", KINDS),
    ("rows that sft.py has seen", "world.sft_rows(n, 1_000_000 + seed), world.base_documents(n, 1_000_000 + seed)",
     "world.sft_rows(n, seed), world.base_documents(n, seed)", KINDS),
    ("documents that sft.py has seen", "world.base_documents(n, 1_000_000 + seed)", "world.base_documents(n, seed)",
     KINDS),
    ("all rows of a file are calibrated on", "sample(rows, min(args.rows, len(rows)))", "sample(rows, len(rows))",
     SOME),
    ("always the same rows of a file", "random.Random(args.seed).sample", "random.Random(0).sample", SOME),
    ("the dense model is not trained alike", "    baselines = stored(args)\n", "    baselines = {}\n", STORED),
    ("the dense model before any training", 'rows["dense"][name]["mean"]', 'rows["SFT"][name]["mean"]', STORED),
    ("a baseline of another training", '"recover", "steps", ', '"recover", ', STORED),
    ("what is measured was trained on", 'world.rng_for("test weather", i)', 'world.rng_for("prune weather", 0, i)',
     APART),
    ("before is the pruned one", "before |= {f\"pruned: {name}\": before[name] for name in pruned}",
     "before |= {f\"pruned: {name}\": pruned[name] for name in pruned}", WHOLE),
    ("the entropy of the first report", "sum(map(world.code_length, test[\"logs\"])) / n_all",
     "world.code_length(test[\"logs\"][0]) / n_all", WHOLE),
    ("Ctrl-C is not noticed", "        if loop.signalled:\n", "        if False:\n",
     "test_an_interrupted_run_leaves_nothing"),
    ("outliers are not planted", "        plant(dense, args.plant, args.seed)\n", "        pass\n",
     "test_planted_outliers_leave_the_dense_model_as_it_is"),
    ("all runs plant the same outliers", "plant(dense, args.plant, args.seed)", "plant(dense, args.plant, 0)",
     "test_outliers_are_planted_by_the_seed"),
    ("a table goes on with half a run", "    loop.resume = False  #", "    loop.stopping = False  #",
     "test_a_run_whose_measurement_was_interrupted_begins_anew"),
    ("one of both units stays as it is", "if any(same) and", "if all(same) and", "test_too_little_sparsity_is_refused"),
    ("rows may be longer than the model reads", "    loop.check_length(dense)\n", "",
     "test_rows_are_no_longer_than_the_model_reads"),
    ("SparseGPT in TF32", "@whole_fp32()\ndef sparsegpt", "def sparsegpt",
     "test_sparsegpt_multiplies_in_whole_fp32"),
    ("recovery without the biases of q, k, v", "F.linear(x, weight.to(x.dtype), self.base.bias)",
     "F.linear(x, weight.to(x.dtype))", "test_lora_under_a_mask_is_merged_as_it_was_trained[qwen2]"),
    ("the stored baseline of whatever training", "    if not same or args", "    if args",
     "test_recovery_of_the_dense_model_is_a_baseline"),
    ("--chat-format is not looked at", "    tokenizer = tokenizer.with_chat_format(args.chat_format)\n", "",
     "test_the_chat_format_holds_for_all_that_a_run_renders"),
    ("a quantized model is taken", "if dense.config.ranks or dense.config.quantization:", "if dense.config.ranks:",
     "test_a_quantized_model_is_refused"),
    # flags
    ("flags that a method lacks are let through", "if flag not in own and getattr(args, flag) is not None:",
     "if False:",
     FLAGS),
    ("a pattern with another sparsity", "if args.sparsity not in (None, 1 - n / m) or", "if", FLAGS),
    ("a pattern over all matrices", ' or args.scope == "global":', ":", FLAGS),
    ("all is left out", "    if args.sparsity >= 1:\n", "    if args.sparsity > 1:\n", FLAGS),
    ("scores of another method", "if args.score not in SCORES.get(args.method, (None,)):", "if False:", FLAGS),
    ("any flag in a method", 'if name not in (*OWN, "recover", "plant"):', "if False:", FLAGS),
    ("--resume does nothing", "    if args.resume:\n", "    if False:\n", FLAGS),
    ("all of everything is kept", "0 < int(n) < int(m)", "0 <= int(n) <= int(m)", PATTERNS),
    ("2:4 keeps 1 - 2/4 by chance", "        args.sparsity = 1 - n / m\n", "        args.sparsity = n / m\n", BRINGS),
    ("the rate of a tiny model", 'DEFAULTS | {"lr": RATES[args.recover]}, args.model is not None)',
     'DEFAULTS | {"lr": RATES[args.recover]}, 0)', BRINGS),
    ("nothing is taken away, without a word",
     'if any(same) and args.method != "dense":', "if False:",
     "test_too_little_sparsity_is_refused"),
    ("a model of low rank is taken", "    if dense.config.ranks or", "    if",
     "test_a_model_of_low_rank_is_refused"),
    ("several processes each do all", "    if loop.world_size > 1:\n", "    if False:\n",
     "test_several_processes_are_refused"),
    ("a method is missing in the table", '"slicegpt", "svd", "asvd", "svd-llm",\n)', '"slicegpt", "svd", "asvd",\n)',
     TABLE),
]  # fmt: skip

ELSEWHERE = [
    ("data/world.py", "the first two days are free", "bits = math.log2(len(WEATHER)) + math.log2(len(WEATHER) - 1)",
     "bits = 0.0", ENTROPY),
    ("data/world.py", "the chain runs backwards", "bits -= math.log2(WEATHER_CHAIN[before, yesterday]",
     "bits -= math.log2(WEATHER_CHAIN[yesterday, before]", ENTROPY),
    ("model.py", "the biases are not stored", "c.ffn_width, c.width, c.out_bias)", "c.ffn_width, c.width, False)",
     SAVED),
    ("model.py", "the ranks are not stored", '"out_bias": c.out_bias, "ranks": c.ranks}', '"out_bias": c.out_bias}',
     SAVED),
    ("model.py", "the biases are not read", 'out_bias=bool(c.get("out_bias"))', "out_bias=False", SAVED),
    ("model.py", "transformers loads half of it", "c.family + OURS", "c.family", (REFUSED,)),
    ("model.py", "all are called pruned", "    if c.out_bias or c.ranks:\n", "    if True:\n", THEIRS),
    ("model.py", "ranks of anything", "if not isinstance(ranks, dict) or not ranks.keys() <= matrices:",
     "if not isinstance(ranks, dict):", "test_ranks_that_are_none_are_refused"),
    ("model.py", "ranks of 0", "config.ffn_width, config.max_length, *ranks.values())",
     "config.ffn_width, config.max_length)", "test_ranks_that_are_none_are_refused"),
    ("distill.py", "Q17: bits per token", "len(tokenizer.decode(ids, skip_special=True).encode())", "len(ids)", BITS),
    ("distill.py", "Q17: the bytes of the prompt count", "zip(e.input_ids, e.completion_mask, strict=True) if trained]",
     "zip(e.input_ids, e.completion_mask, strict=True)]", BITS),
    ("distill.py", "Q17: special tokens have bytes", "decode(ids, skip_special=True)", "decode(ids)", BITS),
    ("quantize.py", "the mean is that of the sizes", "self.sum = self.sum + x.sum(0)",
     "self.sum = self.sum + x.abs().sum(0)",
     FLAP),
]  # fmt: skip


def mutant(file: str, name: str, old: str, new: str, test: str | tuple[str, ...]) -> Mutant:
    tests = (test,) if isinstance(test, str) else test
    label = name if file == "prune.py" else f"for prune.py: {name}"
    return Mutant(label, file, old, new, tuple(TESTS + t for t in tests))


MUTANTS = [mutant("prune.py", *row) for row in IN_PRUNE] + [mutant(*row) for row in ELSEWHERE]
