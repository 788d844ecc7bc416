"""Planted bugs of model.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_model.py::"

PAR = "test_logits_equal_those_of_transformers_row_by_row"
TOK = "test_token_logps_equal_loops_over_the_softmax"
PACK = "test_packed_documents_equal_documents_alone"
FRESH = "test_a_fresh_model_knows_nothing_and_its_blocks_start_small"
FROZEN = "test_a_frozen_model_is_a_copy_without_gradient"
DEPTH = "test_depth_sets_the_other_sizes"
CACHE = "test_cached_states_equal_one_forward_pass"
GRE = "test_greedy_completions_equal_those_of_transformers"
LOGPS = "test_logps_are_those_of_the_tempered_policy"
ENDED = "test_rows_that_ended_change_nothing_for_the_others"
SAMPLES = "test_samples_of_a_prompt_differ_and_depend_on_the_seed"
ROWS = "test_rows_are_prompt_completion_padding"
CANNOT = "test_prompts_that_cannot_be_continued_are_refused"
SHARE = "test_each_token_gets_its_share_of_the_uniforms"
GO = "test_safetensors_go_round_and_agree_with_the_library"
BF = "test_a_bf16_checkpoint_is_read_in_the_dtype_asked_for_and_saved_in_its_own"
TAMPER = "test_tampered_safetensors_are_refused_before_anything_is_allocated"
FIT = "test_tensors_that_do_not_fit_are_refused_by_name"
SAVE = "test_what_is_saved_here_loads_there_and_is_what_was_loaded"
OLD = "test_older_and_newer_configs_say_the_same"
NOT = "test_models_that_this_is_not_are_refused"
INDEX = "test_an_index_names_files_beside_it_and_what_they_hold"
CHAT = "test_a_chat_remembers_what_was_said"
CLI = "test_the_command_line_answers"
REF = "test_the_command_line_refuses_in_one_line"

MUTANTS = [
    Mutant(name, "model.py", old, new, TESTS + test)
    for name, old, new, test in [
        # the network
        (
            "the residual around attention is lost",
            "kernels.add_rms_norm(h,",
            "kernels.add_rms_norm(h, 0 *",
            PAR + "[llama]",
        ),
        ("the residual around the feed-forward is lost", "return x +", "return", PAR + "[llama]"),
        (
            "attention reads the unnormed state",
            "self.attention(self.attention_norm(x),",
            "self.attention(x,",
            PAR + "[llama]",
        ),
        (
            "the epsilon of the block's second norm",
            "self.ffn = RMSNorm(c.width, c.norm_eps)",
            "self.ffn = RMSNorm(c.width, 1e-5)",
            PAR,
        ),
        ("the epsilon of the last norm", "RMSNorm(config.width, config.norm_eps)", "RMSNorm(config.width, 1e-5)", PAR),
        ("P13: no final norm", "return self.norm(x)", "return x", PAR + "[llama]"),
        (
            "v takes the place of k",
            "            qk, v = qkv.split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=2)",
            "            q, v, k = qkv.split(self.sizes, dim=2)\n            qk = torch.cat([q, k], 2)",
            PAR + "[llama]",
        ),
        ("no norms of q and k", "self.q_norm is not None:", "self.q_norm is not None and False:", PAR + "[qwen3]"),
        ("no bias on q, k and v", 'qkv_bias=family == "qwen2"', "qkv_bias=False", PAR + "[qwen2]"),
        (
            "the width of a head is that of an equal share",
            'c.get("head_dim") or c["hidden_size"]',
            'c["hidden_size"]',
            PAR + "[qwen3]",
        ),
        ("angles in half precision", ".to(device)).repeat(1, 2)", ".to(device)).bfloat16().float().repeat(1, 2)", PAR),
        (
            "angles are not repeated for the second half",
            ".to(device)).repeat(1, 2)",
            ".to(device)).repeat_interleave(2, 1)",
            PAR,
        ),
        (
            "a table of angles that never grows",
            "len(self._angles[0]) < length",
            "False",
            "test_neither_the_future_nor_padding_is_seen",
        ),
        (
            "exponents of the angles without the 2",
            "torch.arange(0, config.head_dim,",
            "torch.arange(0, config.head_dim //",
            PAR,
        ),
        ("no scaling of the angles", "if config.rope_scaling is None:", "if True:", PAR + "[llama]"),
        ("scaling between the two bounds is not clamped", ".clamp(0, 1)", "", PAR + "[llama]"),
        ("low and high frequencies exchanged", "* (keep + (1 - keep)", "* (1 - keep + keep", PAR + "[llama]"),
        ("wavelengths shrunk, not stretched", '/ s["factor"])', '* s["factor"])', PAR + "[llama]"),
        # states, log-probabilities, initial weights
        ("S4: hidden_before is not shifted", "(0, 0, 1, -1))", "(0, 0, 0, 0))", TOK),
        ("S4: hidden_before is shifted twice", "(0, 0, 1, -1))", "(0, 0, 2, -2))", TOK),
        ("the first token is scored from nothing", "    targets[:, 0] = kernels.IGNORED\n", "", TOK),
        ("the caller's ids are overwritten", "targets = input_ids.clone()", "targets = input_ids", TOK),
        ("token_logps at temperature 1", "targets, temperature=temperature)", "targets, temperature=1.0)", TOK),
        (
            "token_logps forgets the documents",
            "model.hidden_before(input_ids, documents=documents)",
            "model.hidden_before(input_ids)",
            PACK,
        ),
        (
            "hidden_before forgets the documents",
            "self.hidden(input_ids, documents=documents,",
            "self.hidden(input_ids,",
            PACK,
        ),
        (
            "forward forgets the documents",
            "self.head(self.hidden(input_ids, documents=documents))",
            "self.head(self.hidden(input_ids))",
            PACK,
        ),
        ("hidden forgets the documents", "kernels.document_mask(documents) if documents", "None if documents", PACK),
        (
            "documents are forgotten where activations are recomputed",
            "checkpoint(block, x, cos, sin, mask,",
            "checkpoint(block, x, cos, sin, None,",
            PACK + "[activations recomputed]",
        ),
        (
            "embeddings are ignored",
            "self.embed(input_ids) if embeddings is None else embeddings",
            "self.embed(input_ids)",
            "test_embeddings_stand_in_for_those_of_the_tokens",
        ),
        (
            "hidden_before forgets the embeddings",
            "documents=documents, embeddings=embeddings),",
            "documents=documents),",
            "test_embeddings_stand_in_for_those_of_the_tokens",
        ),
        (
            "T8: reentrant recomputation",
            "use_reentrant=False",
            "use_reentrant=True",
            "test_recomputed_activations_give_equal_gradients_and_every_block_runs_twice",
        ),
        (
            "activations are kept after all",
            "if self.checkpoint_activations",
            "if False",
            "test_recomputed_activations_give_equal_gradients_and_every_block_runs_twice",
        ),
        (
            "into the residual at full size",
            "0.02 / math.sqrt(2 * self.config.depth) if into_residual else 0.02",
            "0.02",
            FRESH,
        ),
        (
            "the down projection starts at full size",
            '("attention.out.weight", "ffn.down.weight")',
            '("attention.out.weight",)',
            FRESH,
        ),
        ("weights start ten times too large", "else 0.02)\n", "else 0.2)\n", FRESH),
        ("biases start at random", "nn.init.zeros_(p)", "nn.init.ones_(p)", FRESH),
        ("D4: the frozen model is the model", "return copy.deepcopy(model).eval()", "return model.eval()", FROZEN),
        ("the frozen model takes gradients", ".eval().requires_grad_(False)", ".eval()", FROZEN),
        ("K8: the frozen model trains", "copy.deepcopy(model).eval()", "copy.deepcopy(model)", FROZEN),
        (
            "M8: a tied head that is a copy",
            "self.embed.weight\n",
            "nn.Parameter(self.embed.weight.detach().clone())\n",
            "test_a_tied_head_stays_the_embedding",
        ),
        (
            "M8: load unties the head",
            "    if config.tied:\n        model.head.weight = model.embed.weight\n",
            "",
            "test_a_tied_head_stays_the_embedding",
        ),
        (
            "as many key heads as query heads",
            "kv_heads=heads // 2 if heads % 2 == 0 else heads",
            "kv_heads=heads",
            DEPTH,
        ),
        ("wide heads one block too late", "32 if depth < 12 else 64", "32 if depth <= 12 else 64", DEPTH),
        ("the feed-forward rounded down", "math.ceil(width * 8 / 3 / 64)", "math.floor(width * 8 / 3 / 64)", DEPTH),
        # cache and generation
        ("M2: positions do not advance", "        self.lengths += T\n", "", CACHE),
        ("M2: columns do not advance", "        self.used += T\n", "", CACHE),
        (
            "M2: positions are columns, not the row's own",
            "cache.lengths[:, None] + torch.arange(T, device=x.device)",
            "cache.used + torch.arange(T, device=x.device).expand(x.shape[0], T)",
            CACHE,
        ),
        (
            "M2: positions of several tokens are one",
            "None] + torch.arange(T, device=x.device)",
            "None].expand(-1, T)",
            CACHE,
        ),
        (
            "the padding of a prompt is seen",
            "        self.visible[..., : self.used] = torch.arange(self.used, device=lengths.device) < lengths[:, None, None, None]\n",
            "",
            CACHE,
        ),
        ("one column of padding is seen", "device=lengths.device) <", "device=lengths.device) <=", CACHE),
        ("positions go on after the padding", "        self.lengths = lengths.clone()\n", "", CACHE),
        ("several tokens see their future", ".tril(self.used)", "", CACHE),
        ("several tokens see the padding", "return keys &", "return torch.ones_like(keys) &", CACHE),
        ("what is visible stays where it was", "self.visible[rows],", "self.visible[: len(rows)],", CACHE),
        ("lengths stay where they were", "self.lengths[rows]", "self.lengths[: len(rows)]", CACHE),
        (
            "only the newest keys are read",
            "keys[:, : used + T], values[:,",
            "keys[:, max(0, used - 3) : used + T], values[:, max(0, used - 3)",
            CACHE,
        ),
        ("the state of the longest prompt's end", "device=device), lengths", "device=device), longest", GRE),
        ("G2: repeat for repeat_interleave", ".repeat_interleave(samples)", ".repeat(samples)", LOGPS),
        (
            "prompts in the order of their first occurrence",
            "[place[tuple(prompt)] for prompt in prompts]",
            "[i % len(distinct) for i in range(len(prompts))]",
            "test_a_row_does_not_depend_on_the_rows_beside_it",
        ),
        ("uniforms of the place, not of the row", "uniforms[alive,", "uniforms[: len(alive),", ENDED),
        ("the same uniform at each step", "uniforms[alive, t]", "uniforms[alive, 0]", SAMPLES),
        ("G22: the same uniforms for all samples", "torch.rand(rows,", "torch.rand(1,", SAMPLES),
        ("the seed is ignored", "manual_seed(seed)).to(device)", "manual_seed(0)).to(device)", SAMPLES),
        (
            "the completion goes to the place, not to the row",
            "tokens[alive, t], logps[alive,",
            "tokens[: len(alive), t], logps[: len(alive),",
            ENDED,
        ),
        ("the cache keeps rows that left", "cache.select(kept)", "cache.select(torch.arange(len(kept)))", ENDED),
        ("rows are never dropped", "if n_ended * 8 >= len(alive):", "if n_ended * 8 > 8 * len(alive):", ENDED),
        ("N3: it goes on when all have ended", "n_ended ==", "n_ended >", "test_it_stops_when_all_rows_have_ended"),
        ("N3: it stops when one has ended", "if n_ended == len(alive):", "if n_ended:", ENDED),
        (
            "G13: the ending token is no part of the completion",
            "is_end.int().argmax(-1) + 1,",
            "is_end.int().argmax(-1),",
            ROWS,
        ),
        ("G13: one token after the end is", "is_end.int().argmax(-1) + 1,", "is_end.int().argmax(-1) + 2,", ROWS),
        (
            "G13: the last ending token counts, not the first",
            "is_end.int().argmax(-1) + 1,",
            "max_new_tokens - is_end.flip(-1).int().argmax(-1),",
            ENDED,
        ),
        ("G14: one of several ending tokens", "torch.tensor(list(eos_ids),", "torch.tensor(list(eos_ids)[:1],", GRE),
        (
            "the ending token is masked",
            "completion_mask[r, start : start + n]",
            "completion_mask[r, start : start + n - 1]",
            ROWS,
        ),
        ("the prompt is in the mask", "completion_mask[r, start : start + n]", "completion_mask[r, : start + n]", ROWS),
        (
            "logps a column late",
            "aligned_logps[r, start : start + n]",
            "aligned_logps[r, start - 1 : start + n - 1]",
            LOGPS,
        ),
        ("the prompt of another row", "[*prompts[r // samples],", "[*prompts[r % len(prompts)],", ROWS),
        (
            "rows are as wide as the longest could be",
            "max(start + n",
            "max(start + max_new_tokens",
            "test_it_stops_when_all_rows_have_ended",
        ),
        (
            "M11: padding of the vocabulary is sampled",
            "model.head(state)[:, :vocab_size].float()",
            "model.head(state).float()",
            "test_padding_of_the_vocabulary_is_never_sampled",
        ),
        (
            "the cache is wide under autocast",
            "torch.get_autocast_dtype(device.type)",
            "torch.float32",
            "test_under_autocast_the_cache_is_as_narrow_as_the_keys",
        ),
        ("no room for the prompt", "if longest + max_new_tokens > model", "if longest > model", CANNOT),
        ("no room for the last token", "if longest + max_new_tokens >", "if longest + max_new_tokens >=", CANNOT),
        ("an empty prompt", "if min(map(len, prompts)) == 0:", "if max(map(len, prompts)) == 0:", CANNOT),
        # sampling
        ("temperature is ignored", "logits / temperature if temperature else", "logits if temperature else", SHARE),
        ("logps at temperature 1", "token, logps.gather", "token, torch.log_softmax(logits, -1).gather", LOGPS),
        (
            "logps after top-k and top-p",
            "return token,",
            "logps = logps if temperature == 0 else p.log() - p.sum(-1, keepdim=True).log()\n    return token,",
            LOGPS,
        ),
        ("the least probable token is the greedy one", "logps.argmax(-1)", "logps.argmin(-1)", GRE),
        ("top_k is ignored", "        if top_k:\n", "        if False:\n", SHARE),
        ("top_k keeps one too few", "p = p.masked_fill(p <", "p = p.masked_fill(p <=", SHARE),
        ("top_k larger than the vocabulary", "p.topk(min(top_k, p.shape[-1]))", "p.topk(top_k)", SHARE),
        ("top_p is ignored", "        if top_p < 1:\n", "        if False:\n", SHARE),
        ("top_p keeps one too many", "before >=", "before >", "test_top_p_that_is_reached_exactly_takes_no_more"),
        ("top_p leaves out the token that reaches it", "- sorted_p ", "", SHARE),
        ("top_p of all, not of the top_k", "top_p * sorted_p.sum(-1, keepdim=True)", "top_p", SHARE),
        ("N2: top-p before the temperature", "        p = logps.exp()", "        p = logits.softmax(-1)", SHARE),
        ("what is left is not renormalised", "uniforms[:, None] * cdf[:, -1:],", "uniforms[:, None],", SHARE),
        (
            "a uniform of 0 draws a token of probability 0",
            "right=True",
            "right=False",
            "test_top_p_that_is_reached_exactly_takes_no_more",
        ),
        # safetensors
        (
            "strides are ignored",
            ".cpu().contiguous().reshape(-1)",
            ".cpu().t().contiguous().reshape(-1) if tensor.ndim == 2 else tensor.detach().reshape(-1)",
            GO,
        ),
        ("offsets count elements", "offset + tensor.numel() * tensor.element_size()", "offset + tensor.numel()", GO),
        ("the length of the header in big-endian", 'file.write(struct.pack("<Q"', 'file.write(struct.pack(">Q"', GO),
        ("bf16 is read as f16", '"BF16": torch.bfloat16', '"BF16": torch.float16', BF),
        ("a dimension is lost", 'flat.reshape(entry["shape"])', 'flat.reshape(entry["shape"] or [1])', GO),
        ("written in place", "    os.replace(new, path)\n", "", GO),
        (
            "the old file is destroyed first",
            '.with_name(Path(path).name + ".new")',
            ".with_name(Path(path).name)",
            "test_a_file_that_cannot_be_written_whole_leaves_the_old_one",
        ),
        ("no check: length of the header", "if n > size - 8:", "if False:", TAMPER),
        ("no check: too short", "if size >= 8", "if size >= 0", "test_what_is_no_safetensors_file_is_refused"),
        ("no check: JSON", "    except (ValueError, RecursionError):", "    except ZeroDivisionError:", TAMPER),
        ("no check: depth of the JSON", "except (ValueError, RecursionError):", "except ValueError:", TAMPER),
        ("no check: an object", "if not isinstance(header, dict):", "if False:", TAMPER),
        ("no check: names are unique", "if len(dict(pairs)) < len(pairs):", "if False:", TAMPER),
        (
            "no check: the form of an entry",
            '                refuse(f"the entry of {name} is malformed")',
            "                continue",
            TAMPER,
        ),
        ("no check: known dtype", "if dtype not in DTYPES:", "if dtype in ():", TAMPER),
        ("no check: negative sizes", "type(x) is int and x >= 0 for", "type(x) is int for", TAMPER),
        ("no check: true is a size", "type(x) is int and x >= 0 for", "isinstance(x, int) and x >= 0 for", TAMPER),
        ("no check: offsets are natural numbers", "(*shape, begin, end)):", "shape):", TAMPER),
        ("no check: the size of the dtype", "* DTYPES[dtype].itemsize:", "* 4:", TAMPER),
        ("no check: holes", "if begin != filled:", "if begin < filled:", TAMPER),
        ("no check: overlap", "if begin != filled:", "if begin > filled:", TAMPER),
        ("no check: bytes behind", "if filled != size - 8 - n:", "if filled > size - 8 - n:", TAMPER),
        ("no check: data cut", "if filled != size - 8 - n:", "if filled < size - 8 - n:", TAMPER),
        # Hugging Face directories
        (
            "M9: gate and up exchanged",
            '("mlp.gate_proj.weight", "mlp.up_proj.weight")',
            '("mlp.up_proj.weight", "mlp.gate_proj.weight")',
            PAR,
        ),
        (
            "k and v exchanged",
            '"self_attn.k_proj.weight", "self_attn.v_proj.weight")',
            '"self_attn.v_proj.weight", "self_attn.k_proj.weight")',
            PAR,
        ),
        (
            "the norms of q and k exchanged",
            '("self_attn.q_norm.weight",),\n    "attention.k_norm.weight": ("self_attn.k_norm.weight",)',
            '("self_attn.k_norm.weight",),\n    "attention.k_norm.weight": ("self_attn.q_norm.weight",)',
            PAR + "[qwen3]",
        ),
        (
            "T7: a missing tensor is skipped",
            '            raise UserError(f"{path}: the weights lack {missing[0]}")',
            "            continue",
            FIT,
        ),
        ("T7: a tensor too many is ignored", "odd := [name for name in tensors", "odd := [name for name in ()", FIT),
        ("transposed is good enough", "if tuple(part.shape) != shape", "if part.numel() != math.prod(shape)", FIT),
        ("integers are weights", "or not part.is_floating_point():", "or False:", FIT),
        (
            "the head beside the tied embedding is too much",
            '        tensors.pop("lm_head.weight", None)\n',
            "",
            "test_tensors_that_other_writers_leave_in_are_ignored",
        ),
        (
            "the angles of old checkpoints are too much",
            ' if not name.endswith("rotary_emb.inv_freq")]',
            "]",
            "test_tensors_that_other_writers_leave_in_are_ignored",
        ),
        ("the dtype asked for is ignored", "part.to(device, dtype) for", "part.to(device) for", BF),
        (
            "the model that was loaded does not train",
            "model.requires_grad_(True),",
            "model.requires_grad_(False),",
            "test_a_vocabulary_of_151936_words_trains_without_its_logits",
        ),
        (
            "a tokenizer larger than the model",
            "tokenizer and tokenizer.vocab_size > config.vocab_size:",
            "False:",
            "test_a_directory_without_weights_and_a_tokenizer_too_large_are_refused",
        ),
        (
            "no weights",
            'not (path / "model.safetensors").exists():',
            "False:",
            "test_a_directory_without_weights_and_a_tokenizer_too_large_are_refused",
        ),
        ("saved as untied", '"tie_word_embeddings": c.tied', '"tie_word_embeddings": False', SAVE + "[qwen2]"),
        ("saved without the scaling", '"rope_scaling": c.rope_scaling', '"rope_scaling": None', SAVE + "[llama]"),
        ("saved without the width of a head", '"head_dim": c.head_dim, ', "", SAVE + "[qwen3]"),
        ("saved under another dtype", 'str(model.embed.weight.dtype).removeprefix("torch.")', '"float32"', BF),
        (
            "the new place of theta and scaling is not read",
            '(c.get("rope_scaling") or c.get("rope_parameters")',
            '(c.get("rope_scaling")',
            PAR,
        ),
        ("the old place of theta is not read", 'c.get("rope_theta", 10_000.0)}', "10_000.0}", OLD),
        (
            "the old place of the scaling is not read",
            '(c.get("rope_scaling") or c.get("rope_parameters")',
            '(c.get("rope_parameters")',
            OLD,
        ),
        ("the old name of the kind of scaling is not read", 'rope.get("type", "default"))', '"default")', OLD),
        (
            "tied unless it says otherwise",
            'c.get("tie_word_embeddings", False)',
            'c.get("tie_word_embeddings", True)',
            OLD,
        ),
        ("one key head unless it says otherwise", 'or c["num_attention_heads"]', "or 1", OLD),
        ("no check: family", "if family not in ARCHITECTURES:", 'if family == "gpt2":', NOT),
        ("no check: activation", '(c.get("hidden_act", "silu") == "silu",', "(True,", NOT),
        ("no check: bias of attention", '(not c.get("attention_bias"),', "(True,", NOT),
        ("no check: bias of the feed-forward", '(not c.get("mlp_bias"),', "(True,", NOT),
        ("no check: sliding window", '(not c.get("use_sliding_window"),', "(True,", NOT),
        ("no check: quantized", '("quantization_config" not in c,', "(True,", NOT),
        ("no check: kind of scaling", '(kind in ("default", "llama3"),', "(True,", NOT),
        ("no check: part of a head rotated", '(rope.get("partial_rotary_factor", 1.0) == 1.0,', "(True,", NOT),
        ("no check: sizes", "if not all(type(n) is int and n > 0 for n in sizes) or", "if", NOT),
        ("no check: groups of heads", "or config.heads % config.kv_heads or", "or", NOT),
        ("no check: odd heads", " or config.head_dim % 2:", ":", NOT),
        ("no check: numbers", "except (TypeError, ValueError, ZeroDivisionError) as", "except OverflowError as", NOT),
        ("no check: fields", "    except KeyError as error:", "    except OverflowError as error:", NOT),
        (
            "no check: a config that is an object",
            "not isinstance(c, dict):",
            "False:",
            "test_configs_and_directories_that_are_none_are_refused",
        ),
        ("an index leads out of the directory", "str) or Path(file).name != file:", "str):", INDEX),
        ("no check: names of files are text", "if not isinstance(file, str) or Path(file)", "if Path(file)", INDEX),
        ("no check: tensors are where the index says", "if places.get(name) != file:", "if False:", INDEX),
        ("no check: tensors of the index are there", ":= places.keys() - tensors.keys():", ":= None:", INDEX),
        (
            "no check: the form of the index",
            "(ValueError, KeyError, TypeError, AttributeError):",
            "OverflowError:",
            INDEX,
        ),
        (
            "the first shard alone is read",
            "sorted(set(places.values()))",
            "sorted(set(places.values()))[:1]",
            "test_sharded_checkpoints_load",
        ),
        # the command line
        (
            "a chat forgets the answers",
            '        messages.append({"role": "assistant", "content": chat.completion_text(found.completions[0], tokenizer)})\n',
            "",
            CHAT,
        ),
        (
            "a chat forgets everything",
            '        messages.append({"role": "user", "content": text})',
            '        messages = [{"role": "user", "content": text}]',
            CHAT,
        ),
        ("a chat without end", "            if not text:\n                return\n", "", CHAT),
        ("S13: no generation prompt", "add_generation_prompt=True", "add_generation_prompt=False", CLI),
        ("raw is not raw", "if args.raw:", "if False:", CLI),
        ("the flag --top-k does nothing", "top_k=args.top_k, top", "top", CLI),
        ("the flag --top-p does nothing", "top_p=args.top_p,", "", CLI),
        ("the flag --temperature does nothing", "temperature=args.temperature,", "", CLI),
        ("the flag --seed does nothing", "seed=args.seed + len(messages)", "seed=len(messages)", CLI),
        ("one answer of several is printed", "in found.completions:", "in found.completions[:1]:", CLI),
        ("the tokens of the vocabulary's padding are spoken", ", vocab_size=tokenizer.vocab_size)", ")", CLI),
        ("a device that is not there", "    except (RuntimeError, AssertionError):", "    except KeyError:", REF),
        ("a prompt longer than the context", "if not prompt or room < 1:", "if not prompt:", REF),
        ("a traceback for a user's error", "    except UserError as error:", "    except KeyError as error:", REF),
        ("exit code 1 for a user's error", "sys.exit(2)", "sys.exit(1)", REF),
    ]
]
