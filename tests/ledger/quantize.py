"""Planted bugs of quantize.py, of what it needs of kernels.py and model.py, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_quantize.py::"
PACK = "test_pack_writes_the_bits_one_after_the_other"
HAND = "test_grid_by_hand"
NEAREST = "test_the_nearest_code_is_the_nearest_of_all"
ROWS = "test_rows_and_groups_have_grids_of_their_own"
LINEAR = "test_quantized_linear_multiplies_what_is_meant"
INT8 = "test_int8_linear_is_a_product_of_integers"
ROTATE = "test_rotations_are_orthogonal_and_undone"
INPUTS = "test_inputs_are_those_of_a_plain_forward"
DOCUMENTS = "test_packed_documents_do_not_see_each_other"
CHANGED = "test_what_enters_a_matrix_is_what_the_changed_ones_make"
WHOLE = "test_inputs_and_what_makes_up_for_errors_are_multiplied_in_whole_fp32"
FACTOR = "test_the_inverse_factor_is_that_of_the_inverse"
OBQ = "test_gptq_is_optimal_brain_quantization"
BLOCKS = "test_blocks_change_nothing"
ORDER = "test_act_order_is_of_channels_not_of_places"
DEAD = "test_without_correlation_gptq_is_rounding_and_a_dead_channel_hurts_nobody"
OWQ = "test_owq_keeps_the_columns_that_cost_most_and_they_make_up_for_the_others"
MIXED = "test_int8_mixed_keeps_the_channels_that_stand_out"
FOLD = "test_folding_changes_no_logit"
SHARED = "test_heads_that_share_values_share_scales"
FOLD_ALL = "test_awq_and_smoothquant_fold_the_same_function"
AWQ = "test_awq_scales_are_the_best_of_twenty"
SIGNS = "test_awq_looks_at_sizes_not_at_signs"
SMOOTH = "test_smooth_scales_by_hand"
PLANT = "test_planted_outliers_change_no_bit"
FAKE = "test_fake_quantization_is_that_of_the_codes_and_passes_gradients_in_range"
EXPORT = "test_what_was_trained_is_exported_to_the_bit"
TEACH = "test_the_full_model_teaches_its_copy"
SAVED = "test_a_quantized_checkpoint_is_itself_when_it_is_loaded"
PARTS = "test_a_quantized_matrix_is_its_parts"
OUTLIERS = "test_outliers_are_not_rounded"
DAMAGED = "test_damaged_checkpoints_are_refused"
OTHERS = "test_schemes_of_others_are_refused"
CACHE = "test_the_cache_rounds_groups_of_keys_and_values"
RAGGED = "test_the_bias_of_the_cache_is_that_of_all_columns"
PADDING = "test_padding_widens_no_grid"
THROUGH = "test_the_measurement_goes_through_the_cache"
LOSSES = "test_losses_are_those_of_sft_and_the_divergence_is_from_the_full_model"
RUN = "test_a_run_leaves_a_checkpoint_that_is_what_was_measured"
FLAGS = "test_flags_and_their_defaults"
SHARE = "test_smoothquant_moves_the_share_that_is_asked_for"
WORLD = "test_the_world_to_calibrate_on_is_neither_what_is_measured_nor_what_was_learned"
FILE = "test_a_file_is_calibrated_on_and_its_held_out_rows_are_measured"
PLAIN = "test_qat_is_a_plain_loop"
SPLIT = "test_splitting_a_batch_changes_nothing"
HALF = "test_an_interrupted_run_saves_no_half_model"
NARROW = "test_a_narrow_checkpoint_stays_narrow"
SCHEMAS = "test_a_file_may_be_of_chats_or_plain_text_and_one_of_several"
ANEW = "test_a_run_whose_measurement_was_interrupted_begins_anew"
CACHE_ALONE = "test_a_cache_alone"
REFUSED = "test_what_does_not_fit_is_refused"
FEW = "test_few_rows_of_bf16_are_multiplied_from_the_codes"

IN_QUANTIZE = [
    # calibration
    (
        "Q: padding counts",
        "inputs.add(seen.pop()[batch.documents >= 0])",
        "inputs.add(seen.pop().flatten(0, 1))",
        INPUTS,
    ),
    ("the gram of the last batch", "self.gram.addmm_(x.T, x)", "self.gram = x.T @ x", INPUTS),
    ("absmax of signed inputs", "x.abs().amax(0))", "x.amax(0))", INPUTS),
    ("Q11: no abs in the mean", "self.abssum + x.abs().sum(0)", "self.abssum + x.sum(0)", (INPUTS, SIGNS)),
    ("tokens are not counted", "self.n += len(x)", "self.n = len(x)", INPUTS),
    ("documents see each other", "kernels.document_mask(batch.documents), None))", "None, None))", DOCUMENTS),
    (
        "the next block sees the old states",
        "        states = [block(x, *table) for x, table in zip(states, tables, strict=True)]\n",
        "",
        (INPUTS, CHANGED),
    ),
    ("a hook stays", "            hook.remove()\n", "", INPUTS),
    (
        "the inputs are those of the uncompressed model",
        "    for i, block in enumerate(model.blocks):\n        for name in MATRICES:",
        "    for i, block in enumerate(copy.deepcopy(model).blocks):\n        for name in MATRICES:",
        CHANGED,
    ),
    # the inverse
    ("Q8: no damping", "diagonal += damping * diagonal.mean()", "diagonal += 0 * diagonal.mean()", FACTOR),
    ("Q8: damping in absolute size", "damping * diagonal.mean()", "damping", FACTOR),
    ("Q8: a dead channel is divided by", "diagonal[diagonal == 0] = 1.0", "pass", FACTOR),
    ("a dead channel counts like an input of size 1", "diagonal[diagonal == 0] = 1.0",
     "diagonal[gram.diagonal() == 0] = 1.0", FACTOR),
    ("X^T X in TF32", "    @kernels.whole_fp32()\n    def add", "    def add", WHOLE),
    ("errors are made up for in TF32", "@kernels.whole_fp32()\ndef optimal_brain", "def optimal_brain", WHOLE),
    ("AWQ by the largest inputs", "shared(model, path, inputs.abssum / inputs.n)", "shared(model, path, inputs.absmax)",
     "test_awq_moves_by_the_mean_size_of_the_inputs"),
    ("symmetric: one code more in training than in the file", "self.bits, int(self.symmetric))", "self.bits, 0)",
     f"{EXPORT}[True]"),
    ("the error of a matrix whatever enters it", "(((change @ gram) * change).sum()", "((change * change).sum()",
     "test_a_quantized_matrix_is_its_parts"),
    ("Q8: what fails is passed on", "if failed or not factor.isfinite().all():", "if False:", FACTOR),
    ("NaN is positive definite", "if failed or not factor.isfinite().all():", "if failed < 0:", FACTOR),
    ("the inverse fails with a traceback",
     "cholesky(torch.cholesky_inverse(cholesky(h, damping)), damping, upper=True)",
     "torch.linalg.cholesky(torch.cholesky_inverse(cholesky(h, damping)), upper=True)", FACTOR),
    (
        "the factor of H, not of its inverse",
        "return cholesky(torch.cholesky_inverse(cholesky(h, damping)), damping, upper=True)",
        "return cholesky(h, damping).T",
        FACTOR,
    ),
    ("the lower factor", "damping)), damping, upper=True)", "damping)), damping)", FACTOR),
    ("the gram is damped for good", "    h = gram.clone()\n", "    h = gram\n", (FACTOR, OWQ)),
    # codes
    ("Q2: 0 is not in a range of positives", "groups.amin(-1).clamp(max=0)", "groups.amin(-1)", HAND),
    ("Q2: 0 is not in a range of negatives", "groups.amax(-1).clamp(min=0)", "groups.amax(-1)", HAND),
    (
        "Q3: groups of rows",
        "groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))  # (out, G, g)",
        "groups = weight.unflatten(-1, (group_size or weight.shape[-1], -1)).mT",
        (NEAREST, ROWS),
    ),
    (
        "Q3: one grid for all rows",
        "low, high = groups.amin(-1).clamp(max=0)",
        "low, high = groups.amin((0, -1)).clamp(max=0) + 0 * groups.amin(-1)",
        (HAND, ROWS),
    ),
    (
        "symmetric: 2^(bits - 1) codes above 0",
        "/ (2 ** (bits - 1) - 1) if symmetric",
        "/ (2 ** (bits - 1)) if symmetric",
        HAND,
    ),
    ("symmetric: the largest weight, not size", "torch.maximum(-low, high)", "high", HAND),
    ("asymmetric: 2^bits steps", "(high - low) / (2**bits - 1)\n", "(high - low) / 2**bits\n", HAND),
    ("a scale of 0", "torch.where(scales > 0, scales, 1.0)", "scales", HAND),
    ("scales are rounded down", "torch.where(narrow.to(x.dtype) < x,", "torch.where(narrow.to(x.dtype) < 0,", NEAREST),
    (
        "scales are not those that are stored",
        "scales = not_below(torch.where(scales > 0, scales, 1.0))",
        "scales = torch.where(scales > 0, scales, 1.0)",
        NEAREST,
    ),
    ("zero is the highest code", "(-low / scales).round(), bits", "(high / scales).round(), bits", HAND),
    (
        "codes are cut, not rounded",
        "((groups / scales).round() + zeros)",
        "((groups / scales).floor() + zeros)",
        NEAREST,
    ),
    ("codes are not clamped", ".clamp(least, 2**grid.bits - 1).flatten(-2)", ".flatten(-2)", HAND),
    ("symmetric: the lowest code is used", "1 if grid.symmetric else 0", "0", HAND),
    ("the zero is added", "((groups - grid.zeros[..., None]) * grid", "((groups + grid.zeros[..., None]) * grid", HAND),
    ("symmetric ones store zeros, too", "return found if grid.symmetric else found |", "return found |", NEAREST),
    # GPTQ
    ("no error feedback in a block", "            w[:, j:end] -= torch.outer(error, u[j, j:end])\n", "", OBQ),
    ("Q6: no feedback to later blocks", "        w[:, end:] -= errors @ u[start:end, end:]\n", "", BLOCKS),
    ("Q6: the index of the block", "errors @ u[start:end, end:]", "errors @ u[: end - start, end:]", BLOCKS),
    ("Q6: the place in the block", "errors[:, j - start] = error", "errors[:, j % block_size] = error", BLOCKS),
    (
        "the error is fed back with its own sign",
        "w[:, j:end] -= torch.outer(error",
        "w[:, j:end] += torch.outer(error",
        OBQ,
    ),
    ("the error is not divided by U_jj", "[:, 0]) / u[j, j]", "[:, 0])", OBQ),
    ("the error of the weight as it was", "error = (w[:, j] - meant", "error = (weight[:, column] - meant", OBQ),
    ("the grid is that of the weights as they were", "if j in sizes:", "if False:", OBQ),
    ("OWQ: the grid is that of the weights as they were", "sizes = {} if c.act_order else",
     "sizes = {} if c.act_order or kept.any() else", OBQ),
    ("OWQ: a grid reaches into the next group", "{groups.index(g): size for", "{groups.index(g): group for", OBQ),
    (
        "a grid without its zero",
        "scales[:, g], zeros[:, g] = new.scales[:, 0], new.zeros[:, 0]",
        "scales[:, g] = new.scales[:, 0]",
        OBQ,
    ),
    ("blocks end within a group", "*range(0, n, block_size), *sizes, n}", "*range(0, n, block_size), n}", BLOCKS),
    ("OWQ: blocks begin where no column is kept", "*range(0, n, block_size), *sizes, n}",
     "*range(0, n, block_size), *(range(0, n, group) if sizes else ()), n}", BLOCKS),
    (
        "Q9: the gram keeps its order",
        "inverse_factor(gram[order][:, order], c.damping)",
        "inverse_factor(gram, c.damping)",
        ORDER,
    ),
    ("Q9: only the rows of the gram are moved", "gram[order][:, order]", "gram[order]", ORDER),
    ("Q9: codes stay in the order of the work", "codes[:, column] = nearest", "codes[:, j] = nearest", (ORDER, OBQ)),
    ("Q9: the group of the place", "column, g = columns[j], groups[j]", "column, g = columns[j], j // group", OBQ),
    ("Q9: small inputs first", "argsort(descending=True, stable=True)", "argsort(stable=True)", (ORDER, OBQ)),
    ("act order is ignored", "if c.act_order else torch.arange(n)", "if False else torch.arange(n)", ORDER),
    ("kept columns are rounded", "columns = order[: n - int(kept.sum())].tolist()", "columns = order.tolist()", OBQ),
    ("kept columns come where they stand", "order = torch.cat([order[~kept[order]], order[kept[order]]])", "pass", OBQ),
    ("kept columns are not put back", "return codes, grid, w[:, order.argsort()]", "return codes, grid, w", OBQ),
    (
        "kept columns widen the grids",
        "fit_grid(weight.masked_fill(kept, 0.0), c.bits, c.group_size, c.symmetric)\n    scales, zeros",
        "fit_grid(weight, c.bits, c.group_size, c.symmetric)\n    scales, zeros",
        OBQ,
    ),
    (
        "kept columns count twice",
        "zeros.repeat_interleave(group, dim=1)[:, kept]",
        "zeros.repeat_interleave(group, dim=1)[:, kept] + 1",
        OBQ,
    ),
    (
        "OWQ: kept columns have the zero of the first grid",
        "zeros.repeat_interleave(group, dim=1)[:, kept]",
        "fit_grid(weight.masked_fill(kept, 0.0), c.bits, c.group_size, c.symmetric)[1].repeat_interleave(group, dim=1)"
        "[:, kept]",
        OBQ,
    ),
    # OWQ, LLM.int8
    ("OWQ without the inputs", ".square().sum(0) * inputs.gram.diagonal()", ".square().sum(0)", OWQ),
    (
        "OWQ keeps what costs least",
        "error.topk(max(1, round(c.keep * len(error)))).indices",
        "(-error).topk(max(1, round(c.keep * len(error)))).indices",
        OWQ,
    ),
    ("OWQ keeps the weights as they were", "kept_columns(changed, kept)", "kept_columns(weight, kept)", OWQ),
    ("OWQ keeps none", "max(1, round(c.keep", "max(0, round(c.keep", OWQ),
    ("int8-mixed: of the mean channel", "inputs.absmax.median()", "inputs.absmax.max()", MIXED),
    ("int8-mixed: --threshold is not looked at", "inputs.absmax > c.threshold *", "inputs.absmax > 6.0 *", MIXED),
    (
        "int8-mixed: kept weights widen the grids",
        "grid = fit_grid(weight.masked_fill(kept, 0.0), c.bits, c.group_size, c.symmetric)\n    return",
        "grid = fit_grid(weight, c.bits, c.group_size, c.symmetric)\n    return",
        MIXED,
    ),
    (
        "int8-mixed: kept columns count twice",
        "nearest(weight.masked_fill(kept, 0.0), grid), grid) |",
        "nearest(weight, grid), grid) |",
        MIXED,
    ),
    # QuIP
    (
        "the KL of logits in bf16",
        "(kernels.linear_logits(h, w).log_softmax(-1) for h, w in pairs)",
        "(F.linear(h, w).float().log_softmax(-1) for h, w in pairs)",
        "test_the_kl_is_not_rounded",
    ),
    ("flags of a row in one spelling only", '"^--(no-)?|=.*", "", flag)', '"^--", "", flag)', FLAGS),
    (
        "QuIP: one rotation for both sides",
        "c.seed).T.contiguous(), c.seed + 1)",
        "c.seed).T.contiguous(), c.seed)",
        "test_quip_spreads_what_stands_out",
    ),
    (
        "QuIP: the gram is not rotated",
        "optimal_brain(rotated, gram, c)",
        "optimal_brain(rotated, inputs.gram, c)",
        "test_quip_sees_the_rotated_inputs",
    ),
    (
        "QuIP: one side only",
        "rotated = kernels.rotate(kernels.rotate(weight, c.seed).T.contiguous(), c.seed + 1).T.contiguous()",
        "rotated = kernels.rotate(weight, c.seed)",
        PARTS,
    ),
    # folding
    ("Q12: the matrix is not multiplied", "    block.get_submodule(name).weight *= s\n", "", FOLD),
    ("Q12: the norm is not divided", "        block.attention_norm.weight /= s\n", "        pass\n", FOLD),
    ("Q12: the second norm is not divided", "        block.ffn_norm.weight /= s\n", "        pass\n", FOLD),
    (
        "Q12: gate in the place of up",
        "multiply_rows(block.ffn.gate_up, c.ffn_width, 1 / s)",
        "multiply_rows(block.ffn.gate_up, 0, 1 / s)",
        FOLD,
    ),
    (
        "Q12: keys in the place of values",
        "(c.heads + c.kv_heads) * c.head_dim, 1 / of_values)",
        "c.heads * c.head_dim, 1 / of_values)",
        FOLD,
    ),
    (
        "Q12: heads of a group in another order",
        "s.view(c.kv_heads, -1, c.head_dim)[:, 0]",
        "s.view(-1, c.kv_heads, c.head_dim)[0]",
        FOLD,
    ),
    (
        "Q12: the bias of the values stays",
        "for p in (linear.weight, linear.bias):",
        "for p in (linear.weight,):",
        f"{FOLD}[attention.out-qwen2]",
    ),
    ("query heads have scales of their own", 'if not path.endswith("attention.out"):', "if True:", (SHARED, FOLD_ALL)),
    ("heads share the mean", "of_heads.amax(1, keepdim=True)", "of_heads.mean(1, keepdim=True)", SHARED),
    # AWQ and SmoothQuant
    ("AWQ: no search", "if loss < least:", "if best is None or alpha == 0.5:", AWQ),
    (
        "AWQ: the worst",
        "        if loss < least:\n            best, least = s, loss",
        "        if loss > least or least == math.inf:\n            best, least = s, loss",
        AWQ,
    ),
    ("AWQ: scales are not normed", "s = s / (s.amax() * s.amin()).sqrt()", "pass", AWQ),
    (
        "AWQ: the error of weights alone",
        "loss = ((change @ gram) * change).sum().item()",
        "loss = change.square().sum().item()",
        AWQ,
    ),
    ("AWQ: not scaled back", "grid) / s - weight", "grid) - weight * s", AWQ),
    ("AWQ: dead channels", "sizes.clamp(min=1e-4)", "sizes", AWQ),
    (
        "SmoothQuant: alpha and 1 - alpha",
        "absmax**alpha / weight.abs().amax(0) ** (1 - alpha)",
        "absmax ** (1 - alpha) / weight.abs().amax(0) ** alpha",
        SMOOTH,
    ),
    ("SmoothQuant: the range of rows", "weight.abs().amax(0) ** (1", "weight.abs().amax() ** (1", SMOOTH),
    ("SmoothQuant: dead channels", "torch.where(s.isfinite() & (s > 0), s, 1.0)", "s", SMOOTH),
    (
        "SmoothQuant: always a half",
        "shared(model, path, inputs.absmax), c.alpha)",
        "shared(model, path, inputs.absmax), 0.5)",
        SHARE,
    ),
    ("SmoothQuant: signed weights", "weight.abs().amax(0) ** (1", "weight.amax(0) ** (1", SMOOTH),
    # outliers
    (
        "planted: keys of unpaired channels",
        "s[[pair, pair + c.head_dim // 2]] = factor",
        "s[[pair, (pair + 1) % c.head_dim]] = factor",
        PLANT,
    ),
    ("planted: the queries stay", "            attention.q_norm.weight /= s\n", "", PLANT),
    (
        "planted: the rows of queries stay",
        "            multiply_rows(attention.qkv, 0, 1 / s.repeat(c.heads))\n",
        "",
        PLANT,
    ),
    (
        "planted: no outliers",
        'fold(model, f"blocks.{i}.{name}", 1 / s)',
        'fold(model, f"blocks.{i}.{name}", s / s)',
        PLANT,
    ),
    (
        "planted: small channels",
        'fold(model, f"blocks.{i}.{name}", 1 / s)',
        'fold(model, f"blocks.{i}.{name}", s)',
        PLANT,
    ),
    (
        "planted: whatever the seed",
        "torch.Generator().manual_seed(seed), model.config\n    for i",
        "torch.Generator().manual_seed(0), model.config\n    for i",
        PLANT,
    ),
    # QAT
    (
        "Q14: gradients outside the range",
        "rounded(places, places.round()) * scales",
        "rounded(weight.unflatten(-1, (scales.shape[1], -1)) / scales, places.round()) * scales",
        FAKE,
    ),
    ("Q14: no gradient at all", "    return x + (to - x).detach()\n", "    return to\n", FAKE),
    (
        "Q14: the scale learns nothing",
        "places = weight.unflatten(-1, (scales.shape[1], -1)) / scales",
        "scales = scales.detach()\n    places = weight.unflatten(-1, (scales.shape[1], -1)) / scales",
        FAKE,
    ),
    (
        "Q14: the division is held fixed",
        "places = weight.unflatten(-1, (scales.shape[1], -1)) / scales",
        "places = weight.unflatten(-1, (scales.shape[1], -1)) / scales.detach()",
        FAKE,
    ),
    (
        "Q15: scales are rounded only when exported",
        "scales, zeros = rounded(scales, scales.bfloat16().to(scales.dtype))[..., None], zeros[..., None]",
        "scales, zeros = scales[..., None], zeros[..., None]",
        (FAKE, EXPORT),
    ),
    (
        "Q15: rounded in training only",
        "grid = Grid(scales, self.zeros[rows], self.bits, self.symmetric)\n        return "
        "tensors_of(nearest(self.weight",
        "grid = fit_grid(self.weight.detach()[rows], self.bits, 8, self.symmetric)\n        return "
        "tensors_of(nearest(self.weight",
        EXPORT,
    ),
    (
        "Q15: all parts are the first rows",
        "nearest(self.weight.detach()[rows], grid)",
        "nearest(self.weight.detach()[: rows.stop - rows.start], grid)",
        EXPORT,
    ),
    ("symmetric: the lowest code in training", "clamp(least - zeros", "clamp(0 - zeros", FAKE),
    ("the copy teaches the full model", 'kind="forward_kl"', 'kind="reverse_kl"', TEACH),
    (
        "the divergence of the full model from its copy",
        "(ref_logps.exp() * (ref_logps - logps))",
        "(logps.exp() * (logps - ref_logps))",
        LOSSES,
    ),
    ("padding is taught, too", "[teacher], batch.documents >= 0,", "[teacher], batch.documents >= -1,", TEACH),
    ("the teacher is the copy", "teacher = ref_model.hidden(", "teacher = model.hidden(", TEACH),
    (
        "the step divides by the tokens of its last part",
        "batch) / n_tokens",
        "batch) / int((batch.documents >= 0).sum())",
        SPLIT,
    ),
    ("gradients pile up", "            optimizer.zero_grad()\n", "", PLAIN),
    ("the rate is that of no schedule", "set_lr(optimizer, args, step), 0.0", "args.lr, 0.0", PLAIN),
    ("no clipping", "clip(model, args.grad_clip)", "clip(model, 0.0)", PLAIN),
    ("weights decay", "args.lr, weight_decay=0.0)", "args.lr, weight_decay=0.5)", PLAIN),
    ("half a model is saved", "    if loop.signalled:\n", "    if False:\n", HALF),
    ("ranks train apart", "    if loop.world_size > 1:\n", "    if False:\n", REFUSED),
    # the data
    (
        "the held-out weather is calibrated on",
        'rng_for("calibration", seed, i)',
        'rng_for("test", "weather", 0, i)',
        WORLD,
    ),
    ("calibrated on what sft.py learned", "1_000_000 + args.seed", "args.seed", WORLD),
    ("what is calibrated on is measured", '(test, "held-out rows"))', '(train, "held-out rows"))', FILE),
    ("plain text is refused", 'schemas=("text", "chat", "completion")', 'schemas=("chat", "completion")', SCHEMAS),
    ("the first of several files", "train = sum(parts, [])", "train = parts[0]", SCHEMAS),
    ("a table goes on with half a run", "    loop.resume = False  #", "    loop.stopping = False  #", ANEW),
    ("all of a file is calibrated on", 'if args.method != "qat":', "if False:", FILE),
    ("few rows of a file are trained on", 'if args.method != "qat":', "if True:", FILE),
    (
        "the first rows of a file are calibrated on",
        "random.Random(args.seed).sample(train, min(args.rows, len(train)))",
        "train[: args.rows]",
        FILE,
    ),
    ("--seed draws no rows", "random.Random(args.seed).sample(train", "random.Random(0).sample(train", FILE),
    ("more than all columns", "if args.keep > 1:", "if False:", FLAGS),
    ("a --method of no words", "except ValueError as error:  # a quote", "except KeyError as error:  # a quote", FLAGS),
    (
        "the chat format is that of the checkpoint",
        "    tokenizer = tokenizer.with_chat_format(args.chat_format)\n",
        "",
        "test_a_chat_format_that_is_asked_for_is_that_of_all_chats",
    ),
    # the cache
    ("keys by token", "keys.mT if self.by_channel else keys), *self._pack", "keys), *self._pack", CACHE),
    ("values by channel", "*self._pack(values)])", "*self._pack(values.mT)])", CACHE),
    (
        "a column is lost",
        "self.values = self.values[..., KV_GROUP:, :].clone()",
        "self.values = self.values[..., KV_GROUP + 1 :, :].clone()",
        CACHE,
    ),
    (
        "new columns are not kept",
        "        self._close()\n        super().advance(T)",
        "        self.open = ()\n        super().advance(T)",
        (CACHE, THROUGH),
    ),
    (
        "only the last block's columns are kept",
        "        self._close()\n        keys, values, column = super().block(i)",
        "        keys, values, column = super().block(i)",
        RAGGED,
    ),
    (
        "packed rows stay when rows are dropped",
        "        kept = super().drop(ended)\n        self.packed = [[t[:, kept] for t in group] for "
        "group in self.packed]\n",
        "        kept = super().drop(ended)\n",
        RAGGED,
    ),
    ("padding widens the grids", " * shown for x in (keys, self.values))", " for x in (keys, self.values))", PADDING),
    (
        "bits without scales",
        "for group in self.packed for t in group)\n",
        "for group in self.packed for t in group[::3])\n",
        CACHE,
    ),
    (
        "the measurement sees the exact cache",
        "through = hidden_through_cache if model.cache else Transformer.hidden_before",
        "through = Transformer.hidden_before",
        "test_the_measurement_of_a_cache_is_through_it",
    ),
    # the measurement
    (
        "Q17: the first token counts",
        "hidden, mask = through(model, batch.input_ids), batch.completion_mask.bool()",
        "hidden, mask = through(model, batch.input_ids), batch.input_ids > 0",
        LOSSES,
    ),
    (
        "KL of the model to itself",
        "kl_of(ref, ref_model.head.weight, h, model.head.weight) for ref, h in parts",
        "kl_of(h, model.head.weight, h, model.head.weight) for ref, h in parts",
        LOSSES,
    ),
    ("micronats", "[1000 * kl /", "[2000 * kl /", RUN),
    ("keys are always by token", "keys_by=args.kv_keys)", 'keys_by="token")', "test_a_cache_alone[channel-16]"),
    ("tokens of one row a second", "len(starts) * new", "new", "test_speed_is_tokens_of_all_rows_a_second"),
    ("bits are nats", "per_row = math.log(2) * sum(n_bytes)", "per_row = sum(n_bytes)", RUN),
    ("bytes of the first token, too", "if trained] for row in test", "] for row in test", RUN),
    (
        "bits per weight without scales",
        "8 * sum(part.n_bytes() for part in parts)",
        "8 * sum(part.codes.numel() for part in parts)",
        SAVED,
    ),
    # whole runs
    (
        "what was not saved is measured",
        "    model, _ = load(loop.checkpoint, device=loop.device)  # what",
        "    # what",
        RUN,
    ),
    ("what was narrow is written wide", "        p.data = p.data.to(stored)\n", "        pass\n", NARROW),
    (
        "the whole checkpoint is narrowed, steps and mean, too",
        "    for p in model.parameters():  #",
        "    for p in (*model.parameters(), *model.buffers()):  #",
        NARROW,
    ),
    ("bits per weight as it was loaded", "(8.0 * stored.itemsize, bits", "(bits_per_weight(ref_model), bits", NARROW),
    (
        "bits per cached number of the weights",
        "8.0 * loop.dtype.itemsize",
        "8.0 * model.embed.weight.element_size()",
        NARROW,
    ),
    ("low rank is quantized", "if quantized(model) or model.config.ranks:", "if quantized(model):", REFUSED),
    ("a quantized model is quantized", "if quantized(model) or model.config.ranks:", "if model.config.ranks:", RUN),
    (
        "what has no groups must have the right ones",
        "0 if args.method in WITHOUT_GROUPS else args.group_size",
        "args.group_size",
        CACHE_ALONE,
    ),
    ("a table fails at its row 22", "    for row in TABLE:", "    for row in ():", FLAGS),
    ("awq is not folded", "if args.method in FOLDED:", "if False:", RUN),
    ("nothing is planted", "    if args.plant:\n", "    if False:\n", RUN),
    ("all runs plant the same outliers", "plant(model, args.plant, args.seed)", "plant(model, args.plant, 0)",
     "test_outliers_are_planted_by_the_seed"),
    (
        "the reference is what was quantized",
        "ref_model, scheme = copy.deepcopy(model), scheme_of(args)",
        "ref_model, scheme = model, scheme_of(args)",
        RUN,
    ),
    ("w8a8 of 4 bits", '"bits": (4, 8)', '"bits": (4, 4)', FLAGS),
    ("nf4 of other bits", "!= (4, 64, False):", "!= (args.bits, 64, False):", FLAGS),
    ("nf4 with zeros at will", "!= (4, 64, False):", "!= (4, 64, args.symmetric):", FLAGS),
    ("w8a8 in groups", '"group_size": (64, 0)', '"group_size": (64, 64)', FLAGS),
    (
        "tokens stay as they are",
        '"activations": 8 if args.method in OF_ACTIVATIONS else 16',
        '"activations": 16',
        (OUTLIERS, FLAGS),
    ),
]

ELSEWHERE = [
    (
        "kernels.py",
        "Q5: the first code in the high bits",
        "words = (words << shifts).sum(-1)",
        "words = (words << shifts.flip(0)).sum(-1)",
        PACK,
    ),
    (
        "kernels.py",
        "Q5: unpacked from the high bits",
        "packed[..., None] >> bits * torch.arange(count, dtype=packed.dtype, device=device)",
        "packed[..., None] >> bits * torch.arange(count, dtype=packed.dtype, device=device).flip(0)",
        PACK,
    ),
    (
        "kernels.py",
        "Q5: bytes of 3 bits in another order",
        "byte_shifts = 8 * torch.arange(n_bytes, dtype=torch.int32, device=device)",
        "byte_shifts = 8 * torch.arange(n_bytes, dtype=torch.int32, device=device).flip(0)",
        f"{PACK}[3]",
    ),
    ("kernels.py", "Q5: a sign in the highest code", "& (1 << bits) - 1", "& (1 << bits - 1) - 1", PACK),
    (
        "kernels.py",
        "the last codes are lost",
        "F.pad(codes.int(), (0, -codes.shape[-1] % count))",
        "F.pad(codes.int(), (0, -(codes.shape[-1] % count)))",
        PACK,
    ),
    (
        "kernels.py",
        "the zero is added",
        "return ((codes - zeros) * q.scales",
        "return ((codes + zeros) * q.scales",
        NEAREST,
    ),
    (
        "kernels.py",
        "symmetric: zero is 2^bits",
        "2.0 ** (q.bits - 1) if q.zeros is None",
        "2.0 ** q.bits if q.zeros is None",
        NEAREST,
    ),
    (
        "kernels.py",
        "a quantized product loses its bias",
        "return lora_linear(x, functools.partial(dequantize, q, x.dtype), bias,",
        "return lora_linear(x, functools.partial(dequantize, q, x.dtype), None,",
        LINEAR,
    ),
    (
        "kernels.py",
        "int8: one scale for all tokens",
        "scales = flat.abs().amax(-1, keepdim=True)",
        "scales = flat.abs().amax().view(1, 1)",
        INT8,
    ),
    (
        "kernels.py",
        "int8: 128 steps",
        "scales = flat.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127",
        "scales = flat.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 128",
        INT8,
    ),
    (
        "kernels.py",
        "int8: tokens are cut",
        "(flat / scales).round().to(torch.int8)",
        "(flat / scales).to(torch.int8)",
        INT8,
    ),
    (
        "kernels.py",
        "int8: codes without their sign",
        "(q.codes ^ 128).view(torch.int8)\n    if x.is_cuda",
        "q.codes.view(torch.int8)\n    if x.is_cuda",
        INT8,
    ),
    ("kernels.py", "int8: few rows are too few for CUDA", "max(24 - len(tokens), -len(tokens) % 8)", "-len(tokens) % 8",
     "test_few_rows_are_padded_for_the_product_of_cuda"),
    ("kernels.py", "int8: few rows become a few more for CUDA", "max(24 - len(tokens), -len(tokens) % 8)",
     "24 if len(tokens) < 24 else -len(tokens) % 8", "test_few_rows_are_padded_for_the_product_of_cuda"),
    ("kernels.py", "int8: no scale of the weight", "* scales * q.scales[:, 0].to(scales.dtype)", "* scales", INT8),
    (
        "kernels.py",
        "a rotation that is none",
        "found.append((q * r.diagonal().sign()).float().to(device))",
        "found.append(r.float().to(device))",
        ROTATE,
    ),
    (
        "kernels.py",
        "one rotation for all seeds",
        "torch.Generator().manual_seed(seed), []\n",
        "torch.Generator().manual_seed(0), []\n",
        ROTATE,
    ),
    ("kernels.py", "back is forth", "m.to(x.dtype).T if back else m.to(x.dtype)", "m.to(x.dtype)", (ROTATE, PARTS)),
    (
        "kernels.py",
        "only one factor rotates",
        "(a @ x.unflatten(-1, (len(a), len(b))) @ b.T)",
        "(x.unflatten(-1, (len(a), len(b))) @ b.T)",
        ROTATE,
    ),
    (
        "kernels.py",
        "int4 in another order",
        "scales_and_shifts.transpose(0, 1).contiguous()",
        "scales_and_shifts.transpose(0, 1).flip(0).contiguous()",
        FEW,
    ),
    ("kernels.py", "int4 without zeros", "(8 - zeros) * q.scales], dim=-1)", "0 * q.scales], dim=-1)", FEW),
    (
        "kernels.py",
        "int8 without scales",
        "return (q.codes ^ 128).view(torch.int8), q.scales[:, 0].contiguous()",
        "return (q.codes ^ 128).view(torch.int8), torch.ones_like(q.scales[:, 0])",
        FEW,
    ),
    ("model.py", "the input is not rotated", "            x = kernels.rotate(x, seed)\n", "            pass\n", PARTS),
    (
        "model.py",
        "the output is not rotated back",
        "return y if seed is None else kernels.rotate(y, seed + 1, back=True)",
        "return y",
        PARTS,
    ),
    ("model.py", "kept columns are forgotten", "y = y if of_kept is None else y + of_kept", "pass", PARTS),
    (
        "model.py",
        "outliers set the scale",
        "x = x if self.kept is None else x.index_fill(-1, self.kept.long(), 0.0)",
        "pass",
        OUTLIERS,
    ),
    (
        "model.py",
        "a quantized matrix without its bias",
        "return y if self.bias is None else y + self.bias.to(y.dtype)",
        "return y",
        EXPORT,
    ),
    (
        "model.py",
        "what is quantized is not saved",
        'state |= {key.removesuffix("weight") + name: tensor for name, tensor in part.named_buffers()}',
        "pass",
        SAVED,
    ),
    (
        "model.py",
        "config.json does not say it",
        '        config["quantization_config"] = c.quantization\n',
        "        pass\n",
        SAVED,
    ),
    (
        "model.py",
        "damaged parts are taken",
        "for name, t in found.items()}) != wanted:",
        "for name, t in found.items()}) is None:",
        DAMAGED,
    ),
    (
        "model.py",
        "columns that are not there",
        "if any(not 0 <= column < shape[1]",
        "if any(not 0 <= column",
        f"{DAMAGED}[kept]",
    ),
    (
        "model.py",
        "all schemes are ours",
        "    if scheme is None:\n        return True\n    known",
        "    return True\n    known",
        OTHERS,
    ),
    ("model.py", "keys that are not known", "scheme.keys() == {*known,", "scheme.keys() >= {*known,", OTHERS),
    ("model.py", "a negative group", 'and scheme["group_size"] >= 0', "", OTHERS),
    (
        "model.py",
        "generation knows no other cache",
        "cache, more = (model.cache or KVCache)(model",
        "cache, more = KVCache(model",
        RAGGED,
    ),
    ("model.py", "many rows go where few should", "if x.numel() > kernels.FEW * x.shape[-1]:", "if False:", FEW),
]


def mutant(file: str, name: str, old: str, new: str, test: str | tuple[str, ...]) -> Mutant:
    tests = (test,) if isinstance(test, str) else test
    label = name if file == "quantize.py" else f"for quantize.py: {name}"
    return Mutant(label, file, old, new, tuple(TESTS + t for t in tests))


MUTANTS = [mutant("quantize.py", *row) for row in IN_QUANTIZE] + [mutant(*row) for row in ELSEWHERE]
