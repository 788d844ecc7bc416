"""Planted bugs of lora.py, of what carries its adapters in other files, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_lora.py::"
FIRST = "test_at_first_nothing_has_changed"
HAND = "test_lora_by_hand"
ONLY = "test_only_the_adapter_learns"
MERGED = "test_merged_is_adapted"
SAVED = "test_a_saved_adapter_is_itself_when_it_is_loaded"
FROM_PEFT = "test_what_peft_saved_is_loaded_here"
TO_PEFT = "test_what_is_saved_here_peft_loads"
BESIDE = "test_adapters_stand_behind_and_beside"
IA3 = "test_ia3_scales_keys_values_and_what_enters_down"
VERA = "test_vera_learns_two_vectors_and_shares_the_rest"
PISSA = "test_pissa_takes_the_largest_directions"
NETWORKS = "test_the_networks_of_p_tuning_and_prefix"
FISH = "test_fishmask_lets_the_weights_learn_that_matter_most"
QLORA = "test_qlora_needs_4_bits_a_weight_and_learns_on_what_they_mean"
LOOP = "test_a_run_is_a_plain_loop"
SPLIT = "test_splitting_a_batch_changes_nothing"
RANKS = "test_two_ranks_equal_one"
RESUME = "test_resuming_is_exact"
MERGE = "test_merge_writes_a_plain_checkpoint"
TABLE = "test_a_table_of_all_methods"
TUNE = "test_a_table_of_rates"
OTHERS = "test_settings_are_chosen_on_other_questions"
BEST = "test_the_best_rate_is_the_least_with_the_most_right_answers"
RATES = "test_default_rates_are_those_of_full_fine_tuning_times_the_methods"
FLAGS = "test_flags_that_do_not_go_together_are_refused"
NO_MATRIX = "test_what_fits_no_matrix_is_refused"
PACKED = "test_the_estimate_of_memory_counts_what_is_packed"
TASK = "test_the_new_task_is_to_sort_the_other_way"
PROMPT = "test_a_prompt_is_as_good_as_words"
PREFIX = "test_a_prefix_is_the_keys_and_values_of_words"
SHARES = "test_the_reference_shares_the_base"
WORDS = "test_words_that_are_not_understood"
INTEGERS = "test_what_is_quantized_takes_only_what_stands_before_rows"
ODD = "test_folders_that_are_not_understood_are_refused"

IN_LORA = [
    # on what is quantized
    ("adapters of integers", "if scheme and (c.method not in BEFORE_ROWS or", "if scheme and (", INTEGERS),
    ("gradients through rounded tokens", 'or scheme["activations"] == 8)', "or False)", INTEGERS),
    # the modules
    ("L1: the scale is alpha", "c.alpha / (math.sqrt(c.rank) if c.rslora else c.rank)", "c.alpha", HAND),
    ("L1: the scale is 1 / r", "c.alpha / (math.sqrt", "1.0 / (math.sqrt", HAND),
    ("L13: rsLoRA divides by r", "math.sqrt(c.rank) if c.rslora", "c.rank if c.rslora", HAND),
    ("all LoRA is rsLoRA", "math.sqrt(c.rank) if c.rslora else c.rank)", "math.sqrt(c.rank))", HAND),
    (
        "L3: B is not zero",
        "torch.zeros(self.n_out, c.rank, device=device)",
        "0.01 * torch.randn(self.n_out, c.rank)",
        FIRST,
    ),
    (
        "A is zero, too",
        "torch.randn(len(rows) * c.rank, base.in_features, device=device)",
        "torch.zeros(len(rows) * c.rank, base.in_features)",
        ONLY,
    ),
    ("A of variance 1", " / math.sqrt(base.in_features)", "", f"{LOOP}[LoRAByHand]"),
    (
        "L9: dropout on the base path",
        "kernels.lora_linear(x, weight,",
        "kernels.lora_linear(x if dropped is None else dropped, weight,",
        FIRST,
    ),
    (
        "L9: dropout when answering",
        "if self.dropout and self.training else None",
        "if self.dropout else None",
        "test_dropout_is_of_what_enters_a_and_in_training_only",
    ),
    (
        "no dropout at all",
        "if self.dropout and self.training else None",
        "if False else None",
        "test_dropout_is_of_what_enters_a_and_in_training_only",
    ),
    (
        "merged and saved, the factors of q, k and v exchanged",
        "self.down.split(self.rank), self.up.split(sizes)",
        "self.down.split(self.rank)[::-1], self.up.split(sizes)",
        (MERGED, FROM_PEFT),
    ),
    (
        "gate takes up's factors",
        "zip([0, *ends], ends, strict=False)",
        "list(zip([0, *ends], ends, strict=False))[:: -1 if len(ends) == 2 else 1]",
        FROM_PEFT,
    ),
    (
        "L6: the merge forgets the scale",
        "weight[rows] += self.scale * (wide(up)",
        "weight[rows] += (wide(up)",
        MERGED,
    ),
    (
        "L6: the merge forgets the base",
        "weight = self.base_weight().clone()",
        "weight = 0 * self.base_weight()",
        MERGED,
    ),
    (
        "L7: the sum in the base's precision",
        "return wide((self.base.dequantized() if isinstance(self.base, NF4Linear) else self.base.weight).detach())",
        "return (self.base.dequantized() if isinstance(self.base, NF4Linear) else self.base.weight).detach()",
        "test_merging_into_a_narrow_base",
    ),
    ("L13: PiSSA's residual is not subtracted", "rest = 2 * weight - self.weight()", "rest = weight", FIRST),
    ("PiSSA without the scale", "(s[: self.rank] / self.scale).sqrt()", "s[: self.rank].sqrt()", PISSA),
    (
        "PiSSA takes the smallest directions",
        "full_matrices=False)\n",
        "full_matrices=False)\n            u, s, vt = u.flip(1), s.flip(0), vt.flip(0)\n",
        PISSA,
    ),
    (
        "PiSSA: A has unit rows",
        "up.copy_(u[:, : self.rank] * root)\n            down.copy_(root[:, None] * vt[: self.rank])",
        "up.copy_(u[:, : self.rank] * root**2)\n            down.copy_(vt[: self.rank])",
        PISSA,
    ),
    (
        "PiSSA's base learns",
        "self.base.weight.dtype), requires_grad=False)",
        "self.base.weight.dtype), requires_grad=True)",
        (PISSA, ONLY),
    ),
    (
        "PiSSA forgets how it began",
        "self.first = [(down.clone(), up.clone())",
        "self.first = [(down, up)",
        (SAVED, TO_PEFT),
    ),
    (
        "PiSSA is saved as if the base lacked nothing",
        "torch.cat([down, -down0])",
        "torch.cat([down, 0 * down0])",
        SAVED,
    ),
    ("PiSSA adds its beginning once more", "torch.cat([down, -down0])", "torch.cat([down, down0])", SAVED),
    (
        "L12: DoRA's norms of the columns",
        "torch.linalg.vector_norm(super().weight(), dim=1)",
        "torch.linalg.vector_norm(super().weight(), dim=0).repeat(9)[: self.base.out_features]",
        HAND,
    ),
    (
        "L12: DoRA's norms have a gradient",
        '    @torch.no_grad()\n    def weight(self) -> Tensor:\n        """W + scale',
        '    def weight(self) -> Tensor:\n        """W + scale',
        "test_the_norm_of_dora_has_no_gradient",
    ),
    (
        "L12: DoRA's magnitude is 1",
        "nn.Parameter(self._norms())",
        "nn.Parameter(torch.ones_like(self._norms()))",
        FIRST,
    ),
    (
        "DoRA's norms are those of the base",
        "torch.linalg.vector_norm(super().weight(), dim=1)",
        "torch.linalg.vector_norm(self.base_weight(), dim=1)",
        HAND,
    ),
    ("DoRA scales the bias", "* (y - bias)).to", "* y).to", (FROM_PEFT, MERGED)),
    ("DoRA adds the ratio, not what it is above 1", "(self._ratio() - 1) *", "self._ratio() *", FIRST),
    (
        "L6: DoRA is merged without its magnitude",
        "super().weight() * self._ratio()[:, None]",
        "super().weight()",
        MERGED,
    ),
    (
        "DoRA loses the rows that it does not adapt",
        "self.magnitude.new_ones(self.base.out_features)",
        "self.magnitude.new_zeros(self.base.out_features)",
        FROM_PEFT,
    ),
    (
        "VeRA: b is not zero",
        "nn.Parameter(torch.zeros(self.n_out, device",
        "nn.Parameter(torch.ones(self.n_out, device",
        FIRST,
    ),
    ("VeRA: d is not 0.1", "c.rank,), 0.1,", "c.rank,), 1.0,", VERA),
    ("VeRA without d", "self.d[:, None] * self.fixed_down", "0 * self.d[:, None] + self.fixed_down", VERA),
    ("VeRA without b", "self.b[:, None] * self.fixed_up", "0 * self.b[:, None] + self.fixed_up", FIRST),
    (
        "VeRA: each matrix has random ones of its own",
        "torch.Generator().manual_seed(0)",
        "torch.default_generator",
        (VERA, SAVED),
    ),
    ("IA3 scales q", '"targets": "(k|v|down)_proj$"', '"targets": "(q|k|v|down)_proj$"', IA3),
    ("IA3 scales gate and up", '"targets": "(k|v|down)_proj$"', '"targets": "(k|v|up|gate)_proj$"', IA3),
    ("IA3 is zero at first", "self.l = nn.Parameter(torch.ones(n", "self.l = nn.Parameter(torch.zeros(n", FIRST),
    (
        "IA3 scales outputs from the first on",
        "torch.cat([torch.arange(*span, device=self.l.device) for span in self.rows.values()])",
        "torch.arange(len(self.l))",
        IA3,
    ),
    ("IA3 leaves what enters down", "self.base(x * factor) if self.of_input", "self.base(x) if self.of_input", IA3),
    ("IA3 is merged without keys and values", "else weight * self.factor()[:, None]", "else weight", MERGED),
    ("IA3 is merged without what enters down", "weight * self.factor() if", "weight if", MERGED),
    ("IA3 merges no bias", "(self.base.bias * self.factor()).to", "self.base.bias.to", MERGED),
    (
        "an adapter hears what enters its base",
        "self.up(F.gelu(self.down(y)))",
        "self.up(F.gelu(self.down(x[..., :32])))",
        BESIDE,
    ),
    ("an adapter in the place of its base", "return y + self.up(F.gelu", "return self.up(F.gelu", FIRST),
    ("an adapter with a relu", "F.gelu(self.down(y))", "F.relu(self.down(y))", BESIDE),
    ("a parallel adapter with a gelu", "F.relu(self.down(x))", "F.gelu(self.down(x))", BESIDE),
    ("a parallel adapter behind its base", "F.relu(self.down(x))", "F.relu(self.down(y))", BESIDE),
    ("a parallel adapter without its scale", "return y + self.scale * self.up", "return y + self.up", BESIDE),
    ("an adapter is there at once", "nn.init.zeros_(self.up.weight)", "nn.init.ones_(self.up.weight)", FIRST),
    ("an adapter has a bias at once", "nn.init.zeros_(self.up.bias)", "nn.init.ones_(self.up.bias)", FIRST),
    (
        "no adapter behind the attention",
        "block.attention.out = Bottleneck(block.attention.out, model.config.width, c, parallel=False)",
        "pass",
        BESIDE,
    ),
    (
        "a prompt begins at random",
        "embed[torch.randint(len(embed), (c.tokens,))].float().clone()",
        "torch.randn(c.tokens, embed.shape[1])",
        (f"{LOOP}[PromptByHand]", NETWORKS),
    ),
    (
        "P-tuning: embeddings as small as they are",
        "self.embeddings[None] / self.size)",
        "self.embeddings[None])",
        NETWORKS,
    ),
    ("P-tuning: what is made is not of their size", "[0][0]) * self.size", "[0][0])", NETWORKS),
    ("P-tuning: the network reads one way", "bidirectional=True", "bidirectional=False, proj_size=0", NETWORKS),
    ("P-tuning without its network", "if self.encoder is None:", "if True:", NETWORKS),
    ("prefix with a relu", "nn.Tanh()", "nn.ReLU()", NETWORKS),
    (
        "prefix: layers and tokens exchanged",
        "self.layers(self.embeddings)).view(self.shape)",
        "self.layers(self.embeddings)).view(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1)",
        (NETWORKS, PREFIX),
    ),
    (
        "prefix: keys and values exchanged",
        ").view(self.shape)\n\n\n# How",
        ").view(self.shape).flip(2)\n\n\n# How",
        PREFIX,
    ),
    # what learns
    ("L4: the base is not frozen", "    model.requires_grad_(False)\n    if loop and c", "    if loop and c", ONLY),
    (
        "L4: nothing learns",
        "    METHODS[c.method][0](model, c)\n    model.adapter",
        "    METHODS[c.method][0](model, c)\n    model.requires_grad_(False)\n    model.adapter",
        ONLY,
    ),
    (
        "targets are searched at the beginning of a name",
        "if re.search(c.targets, name)}\n        base",
        "if re.match(c.targets, name)}\n        base",
        HAND,
    ),
    ("targets are not looked at", "if re.search(c.targets, name)}\n        base", "if name}\n        base", HAND),
    ("targets that match nothing are silent", "    if not found:\n", "    if False:\n", NO_MATRIX),
    (
        "BitFit forgets the biases that are there",
        "else linear.bias.detach()",
        "else torch.zeros_like(linear.bias)",
        "test_bitfit_gives_every_matrix_a_bias",
    ),
    (
        "BitFit without new biases",
        "        bias = linear.weight.new_zeros(",
        "        if linear.bias is None:\n            continue\n        bias = linear.weight.new_zeros(",
        "test_bitfit_gives_every_matrix_a_bias",
    ),
    (
        "LoRA+: A learns faster",
        "self.up.lr_times = c.lora_plus",
        "self.down.lr_times = c.lora_plus",
        ("test_lora_plus_lets_b_learn_faster", f"{LOOP}[LoRAByHand]"),
    ),
    (
        "LoRA+ is forgotten",
        "self.up.lr_times = c.lora_plus",
        "self.up.lr_times = 1.0",
        "test_lora_plus_lets_b_learn_faster",
    ),
    (
        "FishMask: the weights that matter least",
        "flat.topk(max(1, round(share * len(flat))))",
        "(-flat).topk(max(1, round(share * len(flat))))",
        FISH,
    ),
    ("FishMask: the others", "mask = (total >= least)", "mask = (total < least)", FISH),
    ("FishMask: sizes, not squares", "p.grad.float().square()", "p.grad.float().abs()", FISH),
    ("FishMask: the square of the sum", "        model.zero_grad()\n", "", FISH),
    ("FishMask: the last row alone", "total += p.grad.float().square()", "total.copy_(p.grad.float().square())", FISH),
    (
        "FishMask masks nothing",
        "p.register_hook(lambda grad, mask=mask: grad * mask)",
        "p.register_hook(lambda grad: grad)",
        FISH,
    ),
    (
        "FishMask: the last mask for all",
        "lambda grad, mask=mask: grad * mask",
        "lambda grad: grad * mask.flatten()[0]",
        FISH,
    ),
    ("FishMask does not say how many learn", "p.learns = int(mask.sum())", "p.learns = p.numel()", FISH),
    # qlora
    ("QLoRA does not quantize", 'NF4Linear(linear) if c.method == "qlora" else linear', "linear", QLORA),
    (
        "QLoRA leaves what it does not adapt",
        "kind(base, rows, c) if rows else base)",
        "kind(base, rows, c) if rows else linear)",
        QLORA,
    ),
    (
        "QLoRA loses the bias of what it does not adapt",
        "self.dequantized, self.bias, *nothing",
        "self.dequantized, None, *nothing",
        QLORA,
    ),
    (
        "QLoRA makes a narrow weight of a wide one",
        "kernels.nf4_dequantize(q, self.dtype)",
        "kernels.nf4_dequantize(q, torch.bfloat16).to(self.dtype)",
        QLORA,
    ),
    # merging
    ("L6: a second merge does nothing", "    if not adapted:\n", "    if not adapted and model.adapter:\n", MERGED),
    (
        "L6: merged, and still an adapter",
        'adapted[""], model.adapter = model.adapter, None',
        'adapted[""] = model.adapter',
        (MERGED, MERGE),
    ),
    (
        "L6: unmerge puts nothing back",
        "    for path, module in adapted.items():\n        put_at(model, path, module)\n",
        "",
        MERGED,
    ),
    ("unmerged, no adapter is known", 'model.adapter = adapted.pop("")', 'adapted.pop("")', MERGED),
    (
        "the merge loses the biases",
        "linear.bias = None if bias is None else",
        "linear.bias = None if True else",
        MERGED,
    ),
    (
        "half a model is merged before it is refused",
        "if isinstance(m, NF4Linear) and path not in bases]",
        "if False]",
        "test_what_was_quantized_and_not_adapted_is_not_merged",
    ),
    ("--merge: the base is narrowed first", "None if args.merge else loop)", "loop)", MERGE),
    ("--merge: what is written is wide", "        p.data = p.data.to(dtype)\n", "", MERGE),
    (
        "--merge: all of the change is kept, it says",
        "p.detach().to(dtype).float() - old",
        "p.detach().float() - old",
        MERGE,
    ),
    ("--merge: shares of squares", "1 - math.sqrt(lost / asked)", "1 - lost / asked", MERGE),
    ("--merge: what is lost is said to be kept", "(change - kept).square()", "kept.square()", MERGE),
    (
        "--merge writes the base",
        "    merge(model)\n    asked",
        "    merge(model)\n    model = load(args.model)[0]\n    asked",
        MERGE,
    ),
    (
        "--merge wants a short --max-length",
        "    if not args.merge:\n        loop.check",
        "    if True:\n        loop.check",
        MERGE,
    ),
    ("--merge wants a tokenizer", "with_tokenizer=not args.merge", "with_tokenizer=True", MERGE),
    (
        "--merge loses the tokenizer",
        "save(model, tokenizer, loop.out)",
        "save(model, None, loop.out)",
        "test_a_merged_checkpoint_has_the_tokenizer",
    ),
    # folders
    (
        "L10: an adapter is saved with the base's bytes",
        "for name, t in tensors.items()})\n        (path",
        "for name, t in (tensors | dict(model.named_parameters())).items()})\n        (path",
        SAVED,
    ),
    ("the fingerprint ignores values", " + some.numpy().tobytes())", ")", "test_an_adapter_of_another_base_is_refused"),
    (
        "the fingerprint looks at one value",
        "flat[:: max(1, len(flat) // 4096)]",
        "flat[:1]",
        "test_an_adapter_of_another_base_is_refused",
    ),
    (
        "the fingerprint knows the dtype",
        ".cpu().bfloat16().view(torch.int16)",
        ".cpu().view(torch.uint8)",
        "test_an_adapter_of_another_base_is_refused",
    ),
    (
        "an adapter of another base is taken",
        'if c.fingerprint not in ("", mark):',
        "if False:",
        "test_an_adapter_of_another_base_is_refused",
    ),
    (
        "an adapter on an adapter",
        "    if model.adapter is not None:\n        raise",
        "    if False:\n        raise",
        "test_an_adapter_of_another_base_is_refused",
    ),
    (
        "tensors without a place are dropped",
        "        if tensors:\n            raise",
        "        if False:\n            raise",
        "test_tensors_without_a_place_are_refused",
    ),
    ("tensors are looked at and not copied", "tensor.copy_(tensors.pop(name))", "tensors.pop(name)", SAVED),
    (
        "peft's names of A and B exchanged",
        '.lora_A.weight": down, f"{ROOT_NAME}{name}.lora_B.weight": up}',
        '.lora_B.weight": down, f"{ROOT_NAME}{name}.lora_A.weight": up}',
        (FROM_PEFT, TO_PEFT),
    ),
    ("peft's names are others", 'ROOT_NAME = "base_model.model."', 'ROOT_NAME = "base_model."', (FROM_PEFT, TO_PEFT)),
    (
        "peft's name of the magnitude is another",
        '.lora_magnitude_vector": part',
        '.lora_magnitude_vector.weight": part',
        (FROM_PEFT, TO_PEFT),
    ),
    (
        "peft's shape of IA3 is another",
        "shape = (1, -1) if m.of_input else (-1, 1)",
        "shape = (-1, 1)",
        (FROM_PEFT, TO_PEFT),
    ),
    ("saved: rsLoRA is forgotten", '"use_rslora": c.rslora,', '"use_rslora": False,', TO_PEFT),
    ("loaded: rsLoRA is forgotten", 'rslora=bool(config.get("use_rslora"))', "rslora=False", FROM_PEFT),
    ("saved: DoRA is LoRA", '"use_dora": c.method == "dora"', '"use_dora": False', (SAVED, TO_PEFT)),
    ("loaded: alpha is the rank", 'alpha=float(config["lora_alpha"])', 'alpha=float(config["r"])', FROM_PEFT),
    ("loaded: dropout is forgotten", 'dropout=float(config.get("lora_dropout", 0.0))', "dropout=0.0", SAVED),
    ("saved: dropout is forgotten", '"lora_dropout": c.dropout', '"lora_dropout": 0.0', SAVED),
    (
        "L13: saved PiSSA has the alpha of half its rank",
        "alpha = c.alpha * (math.sqrt(times) if c.rslora else times)",
        "alpha = c.alpha",
        (SAVED, TO_PEFT),
    ),
    ("L13: saved PiSSA: rsLoRA's alpha twice", "(math.sqrt(times) if c.rslora else times)", "times", (SAVED, TO_PEFT)),
    ("saved PiSSA has half its rank", '"r": times * c.rank', '"r": c.rank', (SAVED, TO_PEFT)),
    (
        "peft scales outputs where IA3 scales inputs",
        'config["feedforward_modules"] = [name',
        'config["feedforward_modules"] = [] and [name',
        TO_PEFT,
    ),
    (
        "what the network of a prompt reads is saved",
        'tensors["prompt_embeddings"] = model.prompt()',
        'tensors["prompt_embeddings"] = model.prompt.embeddings',
        (SAVED, TO_PEFT),
    ),
    (
        "saved: keys before values of all layers",
        "model.prefix().flatten(1)\n",
        "model.prefix().transpose(1, 2).flatten(1)\n",
        TO_PEFT,
    ),
    ("qlora is loaded as lora", '({"method": "qlora"} if self.method == "qlora" else {})', "{}", SAVED),
    (
        "hyperparameters are not stored",
        "for name in METHODS[c.method][1]}\n    if config",
        "for name in ()}\n    if config",
        SAVED,
    ),
    ("the model's method is not known", "None if c.method in IN_PLACE else c", "c", f"{RESUME}[fishmask]"),
    ("an adapter is a whole checkpoint", "None if c.method in IN_PLACE else c", "None", (SAVED, RESUME)),
    ("alpha_pattern and others are ignored", "            if config.get(name):\n", "            if False:\n", ODD),
    ("biases of peft are ignored", 'if config.get("bias", "none") != "none":', "if False:", ODD),
    # words
    (
        "unknown hyperparameters are ignored",
        "        if name not in found:\n            raise",
        "        if False:\n            raise",
        WORDS,
    ),
    (
        "true and false are words",
        '{"true": True, "false": False}[value] if kind is bool else kind(value)',
        "kind(value)",
        WORDS,
    ),
    (
        "any rank will do",
        "            if name in found and not is_ok(found[name]):\n",
        "            if False:\n",
        WORDS,
    ),
    (
        "it does not say where",
        "', '.join(where) or 'the weights themselves'",
        "'the weights themselves'",
        "test_it_says_which_modules_learn",
    ),
    (
        "it counts what does not learn",
        "for p in model.parameters() if p.requires_grad)\n\n\ndef described",
        "for p in model.parameters())\n\n\ndef described",
        ("test_it_says_what_learns", LOOP),
    ),
    (
        "it counts no quantized weights",
        "    whole += n\n",
        "    whole += 0 * n\n",
        "test_it_says_which_modules_learn",
    ),
    ("a half of Adam's memory", "8 * trained / 1e6", "4 * trained / 1e6", "test_it_says_which_modules_learn"),
    ("a moment is forgotten in the result", "8 * n / 1e6)", "4 * n / 1e6)", LOOP),
    ("the share of what does not learn", "100 * n / n_whole", "100 - 100 * n / n_whole", LOOP),
    (
        "a fish mask learns whole matrices, it says",
        'getattr(p, "learns", p.numel())',
        "p.numel()",
        f"{RESUME}[fishmask]",
    ),
    ("bytes for bits", "{8 * size / n:.2f} bits", "{size / n:.2f} bits", "test_it_says_how_many_bits_qlora_needs"),
    ("RL under dropout", "dropout=c.dropout if dropout else 0.0)", "dropout=c.dropout)", "test_no_dropout_where_asked"),
    (
        "fishmask anywhere is full fine-tuning",
        'if c.method == "fishmask" and loop and loop.script != "lora":',
        "if False:",
        "test_a_fish_mask_is_found_by_lora_alone",
    ),
    (
        "a fish mask and weight decay",
        'if adapter.method == "fishmask" and args.weight_decay:',
        "if False:",
        "test_a_fish_mask_is_found_by_lora_alone",
    ),
    (
        "peft's pissa is taken for LoRA",
        '.startswith(("pissa", "olora", "corda", "loftq"))',
        '.startswith("none at all")',
        "test_folders_that_are_not_understood_are_refused",
    ),
    ("frozen weights stay wide", "        loop.narrow(model)  #", "        pass  #", "test_only_what_learns_is_wide"),
    # the task
    (
        "trained on operands of the test",
        "world.draw_problem(skill, rng, split)",
        'world.draw_problem(skill, rng, "test")',
        TASK,
    ),
    ("the same question again and again", 'world.rng_for("lora", task, *key)', 'world.rng_for("lora", task)', TASK),
    ("the new task is the known one", 'world.HELD_BACK if task == "new"', 'world.HELD_BACK if task == "known"', TASK),
    (
        "the known task sorts the other way",
        'replace(world.SKILLS["sort"], task=',
        "replace(world.HELD_BACK, task=",
        TASK,
    ),
    ("the rows do not depend on the seed", "exchange(args.task, (args.seed, i)", "exchange(args.task, (0, i)", TASK),
    (
        "the test is of the known task",
        'exchange(args.task, ("test", i), "test")',
        'exchange("known", ("test", i), "test")',
        TASK,
    ),
    ("old skills are not asked for", " + world.sft_test(20)", "", TASK),
    (
        "old skills are the new one",
        '"old skills": found["exact match"]',
        '"old skills": found["task"]',
        "test_what_is_measured",
    ),
    (
        "old skills come first",
        '{"task": found["task"], "old skills": found["exact match"]}',
        '{"old skills": found["exact match"], "task": found["task"]}',
        "test_what_is_measured",
    ),
    (
        "no row is left, and it trains",
        "        if not rows or not test:\n",
        "        if False:\n",
        "test_rows_and_models_that_do_not_fit_are_refused",
    ),
    (
        "full fine-tuning of another task is to beat",
        'or args.task != "new" or',
        "or",
        "test_full_fine_tuning_is_what_to_beat",
    ),
    ("the start is to beat", 'rows["full"][name]', 'rows["SFT"][name]', "test_full_fine_tuning_is_what_to_beat"),
    # the run
    ("S1: a mean over rows", "sft_loss(model, batch) / n_tokens", "sft_loss(model, batch) / len(rows)", LOOP),
    (
        "T1: each micro-batch by its own tokens",
        "sft_loss(model, batch) / n_tokens",
        "sft_loss(model, batch) / int(batch.completion_mask.sum()) / len(batches)",
        SPLIT,
    ),
    (
        "T1: the tokens of one rank",
        "n_tokens = loop.sum_over_ranks(sum(int(batch.completion_mask.sum()) for batch in batches))",
        "n_tokens = max(1, sum(int(batch.completion_mask.sum()) for batch in batches))",
        RANKS,
    ),
    ("gradients stay on their ranks", "        loop.all_reduce(model)\n", "", RANKS),
    ("the loss of the last micro-batch", "loss_sum += loss.detach()", "loss_sum = loss.detach()", SPLIT),
    ("nothing is clipped", "clip(model, args.grad_clip)", "clip(model, 0.0)", LOOP),
    ("gradients add up over steps", "        optimizer.zero_grad()\n        loop.log", "        loop.log", LOOP),
    ("no schedule", "lr = set_lr(optimizer, args, step, total)", "lr = args.lr", LOOP),
    ("no decay", "adamw(model, args.lr, args.weight_decay)", "adamw(model, args.lr, 0.0)", LOOP),
    (
        "forward passes in fp32",
        "            with loop.autocast():\n                loss = sft_loss",
        "            if True:\n                loss = sft_loss",
        "test_forward_passes_are_in_dtype",
    ),
    ("a resumed run begins anew", "extra = loop.restore(model, optimizer)", "extra = {}", RESUME),
    ("a resumed run forgets where it began", 'before = extra.get("before") or measured', "before = measured", RESUME),
    ("a resumed optimizer begins anew", "loop.restore(model, optimizer)", "loop.restore(model)", RESUME),
    ("no mask for FishMask", 'if adapter.method == "fishmask":', "if False:", f"{RESUME}[fishmask]"),
    (
        "FishMask has a share of its own",
        "fish_mask(model, some, adapter.share)",
        "fish_mask(model, some, 0.2)",
        f"{RESUME}[fishmask]",
    ),
    (
        "measuring leaves the model as it is",
        'loop.say(f"step {step}: {name}',
        'model.eval(), loop.say(f"step {step}: {name}',
        "test_measuring_on_the_way_changes_nothing",
    ),
    (
        "the end is the start",
        "    after = measured(model, tokenizer, test, args, loop)",
        "    after = dict(before)",
        LOOP,
    ),
    ("a higher loss is better", "higher_is_better=not args.data", "higher_is_better=True", LOOP),
    (
        "--adapter is called lora",
        "variant=adapter.method if args.adapter else args.method",
        "variant=args.method",
        "test_going_on_with_a_trained_adapter",
    ),
    (
        "--adapter is not looked at",
        "adapt(model, args.adapter or args.method, start",
        "adapt(model, args.method, start",
        "test_going_on_with_a_trained_adapter",
    ),
    # the table
    (
        "both tasks are the new one",
        'vars(args) | {"task": task, "out": out}',
        'vars(args) | {"task": "new", "out": out}',
        TABLE,
    ),
    (
        "the new task is the known task",
        'for name in ("before", "after", "n", "ci95")}\n    shutil',
        'for name in ("before", "before", "n", "ci95")} | {"after": results[1]["after"]}\n    shutil',
        TABLE,
    ),
    ("a run that failed is a row", "        if process.exitcode:\n", "        if False:\n", TABLE),
    (
        "the runs of a table talk",
        "with contextlib.redirect_stdout(io.StringIO()):\n        main(args)",
        "main(args)",
        TABLE,
    ),
    (
        "a table without seeds",
        '               MAIN_METHODS, flag="method")',
        '               (), flag="method")',
        TABLE,
    ),
    (
        "a method is not in the table",
        '"vera", "adapter", "parallel", "prompt"',
        '"adapter", "parallel", "prompt"',
        TABLE,
    ),
    # the table of rates
    ("rates: chosen on the questions of the table", '"tune": None, "questions": "validation"', '"tune": None', TUNE),
    ("rates: validation questions are those of the test", '("validation", i), "test")', '("test", i), "test")', OTHERS),
    ("rates: old skills of the test", "world.sft_test(20, seed=1)", "world.sft_test(20)", OTHERS),
    (
        "rates: questions of the test are not left out",
        '["content"] not in asked]',
        '["content"] not in ()]',
        OTHERS,
    ),
    (
        "rates: validation questions that are trained on",
        '("validation", i), "test")',
        '(args.seed, i), "train")',
        OTHERS,
    ),
    ("rates: every run at the first", "for times in RATES[name]]", "for times in RATES[name][:1]]", TUNE),
    ("rates: of all methods, always", "for name in args.tune or RATES", "for name in RATES", TUNE),
    ("rates: the largest of equals", 'row["task"]["mean"], -float(rate)', 'row["task"]["mean"], float(rate)', BEST),
    ("rates: by the old skills", '(row["task"]["mean"], -float', '(row["old skills"]["mean"], -float', BEST),
    (
        "rates: the worst",
        "found[name] = max(found.get(name, (-1.0, 0.0))",
        "found[name] = min(found.get(name, (2.0, 0.0))",
        BEST,
    ),
    ("rates: the last", "found[name] = max(found.get(name, (-1.0, 0.0)), (", "found[name] = max((-1.0, 0.0), (", BEST),
    # flags
    ("every method at the rate of full fine-tuning", "tuple(c.lr * lr for lr", "tuple(lr for lr", RATES),
    (
        "--adapter at the rate of --method",
        "rates_of(DEFAULTS, args.adapter or args.method)",
        "rates_of(DEFAULTS, args.method)",
        RATES,
    ),
    (
        "a folder at the rate of full fine-tuning",
        'replace(c, lr=METHODS[c.method][1]["lr"], base',
        "replace(c, lr=1.0, base",
        RATES,
    ),
    (
        "a large model at the rate of the tiny one",
        "args.model is not None)\n    return args",
        "0)\n    return args",
        RATES,
    ),
    (
        "--merge of nothing",
        "(args.merge and not (args.adapter and args.model),",
        "(args.merge and not args.model,",
        FLAGS,
    ),
    (
        "--merge into nothing",
        "(args.merge and not (args.adapter and args.model),",
        "(args.merge and not args.adapter,",
        FLAGS,
    ),
    (
        "--merge into a run, an adapter, or beside an index",
        "[name for name in names if (loop.out / name).exists()]",
        "[]",
        "test_a_merge_writes_over_nothing",
    ),
    (
        "--merge over the base",
        "is_base = loop.out.resolve() in",
        "is_base = loop.out in",
        "test_a_merge_writes_over_nothing",
    ),
    (
        "--merge over the base in a run",
        '(Path(args.model), Path(args.model, "checkpoint"))',
        "(Path(args.model),)",
        "test_a_merge_writes_over_nothing",
    ),
    (
        "--chat-format of the generated world",
        "tokenizer = replace(tokenizer, chat_format=args.chat_format)",
        "pass",
        "test_the_chat_format_holds_for_all_that_a_run_renders",
    ),
    (
        "rows of the world of any length",
        'sft.fitting((chat.render(row["messages"], tokenizer) for row in chats), "rows", args, loop)',
        '[chat.render(row["messages"], tokenizer) for row in chats]',
        "test_rows_and_models_that_do_not_fit_are_refused",
    ),
    (
        "no row of the world is left",
        "if args.steps and not rows:",
        "if False:",
        "test_rows_and_models_that_do_not_fit_are_refused",
    ),
    (
        "targets that are no expression",
        "re.compile(value if",
        "str(value if",
        "test_words_that_are_not_understood",
    ),
    ("ia3 on nothing", "        found += rows\n    check_targets(found, c)\n\n\ndef check", "\n\ndef check", NO_MATRIX),
    ("lora on nothing", "        found += rows\n    check_targets(found, c)\n\n\ndef put", "\n\ndef put", NO_MATRIX),
    ("pissa of more directions than there are", "if self.rank > len(s):", "if self.rank > len(vt[0]):", NO_MATRIX),
    ("--method all with --data", "(table and args.data,", "(False,", FLAGS),
    ("--method all with --adapter", "(table and args.adapter,", "(False,", FLAGS),
    ("--parallel fsdp", '(args.parallel == "fsdp",', "(False,", FLAGS),
]

ELSEWHERE = [
    ("loop.py", "codes take no memory", "state += sum(b.numel() * b.element_size() for b in", "sum(0 for b in", PACKED),
    ("loop.py", "packed weights do not count", "n += sum(math.prod(m.shape) for m in packed)", "pass", PACKED),
    ("model.py", "--merge: the newer name of the dtype is not known", ' or config.get("dtype")', "", MERGE),
    (
        "model.py",
        "--merge reads no folder of a run",
        'folders = Path(path), Path(path) / "checkpoint"',
        "folders = (Path(path),)",
        "test_a_merged_checkpoint_has_the_tokenizer",
    ),
    ("model.py", "--merge: the older name of the dtype is not known", 'config.get("torch_dtype") or ', "", MERGE),
    (
        "model.py",
        "positions of the tokens not shifted by a prefix",
        "cos[None, n : n + T], sin[None, n : n + T]",
        "cos[None, :T], sin[None, :T]",
        PREFIX,
    ),
    ("model.py", "behind a prompt, positions are shifted twice", ", x], dim=1), 0\n", ", x], dim=1), n\n", PROMPT),
    (
        "model.py",
        "the state of a prompt is returned",
        "self.norm(x[:, T - n_tokens :])",
        "self.norm(x[:, :n_tokens])",
        PROMPT,
    ),
    (
        "model.py",
        "a prompt before every new token",
        "n = self.virtual if cache is None or cache.used == 0 else 0",
        "n = self.virtual",
        PROMPT,
    ),
    (
        "model.py",
        "a prompt behind the row",
        "torch.cat([self.prompt().to(x.dtype).expand(len(x), -1, -1), x], dim=1)",
        "torch.cat([x, self.prompt().to(x.dtype).expand(len(x), -1, -1)], dim=1)",
        PROMPT,
    ),
    (
        "model.py",
        "prefix keys and values exchanged",
        "else (*prefix[:, i].transpose(0, 1), None)",
        "else (*prefix[:, i].transpose(0, 1).flip(0), None)",
        PREFIX,
    ),
    (
        "model.py",
        "every layer has the prefix of the first",
        "else (*prefix[:, i].transpose",
        "else (*prefix[:, 0].transpose",
        PREFIX,
    ),
    (
        "model.py",
        "in a cache, prefix keys and values exchanged",
        "keys[:, :n], values[:, :n] = k, v",
        "keys[:, :n], values[:, :n] = v, k",
        PREFIX,
    ),
    (
        "model.py",
        "a cache without the prefix",
        "        if model.prefix is not None:\n            prefix",
        "        if False:\n            prefix",
        PREFIX,
    ),
    (
        "model.py",
        "a prefix behind the keys",
        "torch.cat([x.to(y.dtype).expand(B, *x.shape), y], dim=1)",
        "torch.cat([y, x.to(y.dtype).expand(B, *x.shape)], dim=1)",
        PREFIX,
    ),
    (
        "model.py",
        "one prompt for all documents",
        "        if self.virtual and documents is not None:\n",
        "        if False:\n",
        "test_what_stands_before_a_row_is_not_packed",
    ),
    (
        "model.py",
        "a prompt needs no room",
        "if model.virtual + longest + max_new_tokens >",
        "if longest + max_new_tokens >",
        "test_what_stands_before_a_row_is_not_packed",
    ),
    (
        "model.py",
        "the frozen copy of an adapted model copies everything",
        "copy.deepcopy(model, shared)",
        "copy.deepcopy(model)",
        (SHARES, "test_dpo_with_an_adapter"),
    ),
    (
        "model.py",
        "D4: the frozen copy learns with the adapter",
        "(*model.parameters(), *model.buffers()) if not t.requires_grad}",
        "(*model.parameters(), *model.buffers())}",
        (SHARES, "test_dpo_with_an_adapter"),
    ),
    (
        "model.py",
        "the whole model is saved, and no adapter",
        "    if model.adapter is not None:\n        model.adapter.save",
        "    if False:\n        model.adapter.save",
        (SAVED, RESUME),
    ),
    ("loop.py", "LoRA+: all learn alike", 'lr * group.get("lr_times", 1.0)', "lr", f"{LOOP}[LoRAByHand]"),
    ("loop.py", "LoRA+: no groups", 'getattr(p, "lr_times", 1.0))', "1.0)", f"{LOOP}[LoRAByHand]"),
    (
        "loop.py",
        "L4: the optimizer holds the frozen base",
        "sorted((p for p in model.parameters() if p.requires_grad), key",
        "sorted(model.parameters(), key",
        ONLY,
    ),
    (
        "loop.py",
        "a resume reads what the network of a prefix made",
        'tensors |= {f"model.{name}": _whole(p) for name, p in model.named_parameters() if p.requires_grad}',
        "pass",
        RESUME,
    ),
    (
        "sft.py",
        "a prompt before packed rows",
        "if model.virtual and (args.pack or args.neftune):",
        "if False:",
        "test_a_prompt_is_refused_before_packed_rows",
    ),
    (
        "sft.py",
        "a prompt before noisy documents",
        "if model.virtual and (args.pack or args.neftune):",
        "if model.virtual and args.pack:",
        "test_a_prompt_is_refused_before_packed_rows",
    ),
    (
        "sft.py",
        "no adapter",
        "        adapt(model, args.adapter, start, loop)\n",
        "        pass\n",
        "test_sft_with_an_adapter",
    ),
    ("sft.py", "the rate of full fine-tuning", "rates_of(rates, args.adapter)", "rates", RATES),
    ("dpo.py", "the rate of full fine-tuning", "rates_of(defaults, args.adapter)", "defaults", RATES),
    (
        "dpo.py",
        "the start is drawn anew",
        "        loop.seed(0)  # with what is random in an adapter\n",
        "",
        "test_the_end_of_dpo_is_measured_against_the_adapter_that_it_began_with",
    ),
    (
        "dpo.py",
        "the start has no adapter",
        "            adapt(ref_model, args.adapter, start)\n",
        "            pass\n",
        "test_the_end_of_dpo_is_measured_against_the_adapter_that_it_began_with",
    ),
]


def mutant(file: str, name: str, old: str, new: str, test: str | tuple[str, ...]) -> Mutant:
    tests = (test,) if isinstance(test, str) else test
    label = name if file == "lora.py" else f"for lora.py: {name}"
    return Mutant(label, file, old, new, tuple(TESTS + t for t in tests))


MUTANTS = [mutant("lora.py", *row) for row in IN_LORA] + [mutant(*row) for row in ELSEWHERE]
