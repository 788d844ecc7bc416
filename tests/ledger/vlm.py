"""Planted bugs of vlm.py, of its pictures, of what model.py does for it, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_vlm.py::"
PICTURES = "tests/test_pictures.py::"
BY_HAND = "test_contrastive_losses_by_hand"
KNOWN = "test_known_values_of_the_contrast"
GRADCACHE = "test_splitting_the_contrast_changes_nothing"
PAIRS = "test_pairs_are_of_a_picture_and_its_whole_caption"
PATCHES = "test_patches_stand_row_by_row"
POSITIONS = "test_positions_tell_row_and_column"
ATTENTION = "test_attention_by_hand"
SLOTS = "test_pictures_land_in_their_own_slots"
AGREE = "test_slots_and_pictures_must_agree"
MASK = "test_what_the_assistant_says_is_trained_on_and_no_slot"
EXPAND = "test_expanding_by_hand"
CUT = "test_cutting_never_cuts_a_picture"
PADDING = "test_padding_and_neighbours_change_nothing"
LOGPS = "test_log_probs_are_of_the_answer_by_hand"
CAUSAL = "test_every_picture_counts_and_only_for_what_follows"
GATE = "test_cross_attention_changes_nothing_at_first"
FLAMINGO = "test_cross_attention_by_hand"
CACHED = "test_cached_decoding_is_the_full_forward_pass"
SAMPLING = "test_log_probs_while_sampling_are_those_of_training"
BATCH = "test_replies_of_a_batch_are_those_of_single_rows"
LEARNS = "test_only_what_a_stage_names_learns"
STAGES = "test_a_run_of_all_stages"
SPLIT = "test_splitting_a_batch_changes_nothing"
RANKS = "test_two_ranks_equal_one"
RESUME = "test_resuming_is_exact"
PLAIN = "test_a_step_is_a_plain_one"
PREFER = "test_pairs_for_dpo"
BY_HAND_DPO = "test_two_steps_of_prefer_by_hand"
INVENTS = "test_hallucinations_are_counted_by_hand"
BLIND = "test_who_does_not_look_is_right_no_more_often_than_a_constant"
RETRIEVAL = "test_retrieval_is_among_captions_that_differ"
LOADED = "test_a_checkpoint_is_itself_when_it_is_loaded"
GOES_ON = "test_training_goes_on_from_a_model_that_sees"
ANSWERS = "test_the_language_model_answers_about_a_file"
ROWS = "test_rows_of_files"
BAD = "test_bad_rows_are_refused"
PLAN = "test_default_plan_and_rates"
TURNS = "test_turns_are_true_and_balanced"
NEARLY = "test_what_is_nearly_right_is_wrong_in_the_shape_alone"
HELD_OUT = "test_what_is_measured_is_not_trained_on"

LONG = "test_long_rows_of_the_world_are_treated_likewise"

IN_VLM = [
    # what is refused, and what is not
    ("a column of a stage of no steps", 'or plan.get("prefer"))', "or True)", "test_a_table_of_the_connectors"),
    ("no column of a stage that was run", 'or plan.get("prefer"))', "or False)", "test_a_table_of_the_connectors"),
    (
        "a rate of stages that have their own",
        "if args.lr is not None and not any(",
        "if False and not any(",
        "test_flags_that_do_not_go_together_are_refused",
    ),
    (
        "cross-attention of embeddings before a row",
        'if vlm.model.prompt is not None and args.connector == "cross-attention":',
        "if False:",
        "test_embeddings_before_a_row_see_no_picture",
    ),
    (
        "what stands before a row takes no room",
        "vlm.model.context - max(",
        "vlm.config.max_length - max(",
        "test_what_stands_before_a_row_takes_room",
    ),
    ("rows of the world of any length", "(fitting(rows, what, vlm, args, loop) for", "(rows for", LONG),
    ("no row of the world is left", "if not all(asked if name", "if not any(asked or True if name", LONG),
    ("no description is left", 'asked if name == "instruct" else described for', "asked for", LONG),
    # what is measured
    ("scenes of the exam are trained on", 'example(f"exam {seed}", i)', "example(0, i)", HELD_OUT),
    ("unseen pairs are seen", "exam(kind, seed, pictures.UNSEEN, n)", "exam(kind, seed, pictures.SEEN, n)", HELD_OUT),
    ("another --exam is the same", "for e in pictures.exam(kind, seed)]", "for e in pictures.exam(kind)]", HELD_OUT),
    ("questions are not trained on", "if i % 4 else described[i]", "if False else described[i]", HELD_OUT),
    ("the share of text of the pictures", "n * args.replay / (1 - args.replay)", "n * args.replay", HELD_OUT),
    ("text that the model has read", "10**6 + args.seed", "args.seed", HELD_OUT),
    ("prefer teaches to say yes", "{*yes[few:], *no[few:]}", "{*no[few:]}", "test_pairs_for_dpo"),
    ("prefer looks at few scenes", "n = 3 * plan.get", "n = plan.get", BY_HAND_DPO),
    ("prefer sees the exam", 'f"prefer {args.seed}"', 'f"exam {args.exam}"', HELD_OUT),
    (
        "an unbounded temperature",
        "vlm.log_scale.clamp_(max=math.log(MOST_SCALE))",
        "vlm.log_scale.clamp_(max=1e9)",
        "test_the_temperature_has_a_bound",
    ),
    ("a run of no steps writes", "loop.main and loop.done:", "loop.main and loop.checkpoint.exists():", GOES_ON),
    (
        "an adapter of an adapter",
        "vlm.model.adapter.base if vlm.model.adapter else start",
        "start",
        "test_training_goes_on_from_an_adapter",
    ),
    (
        "an adapter goes on at the rate of full fine-tuning",
        "args.adapter or (trained(str(sees)) if sees else None)",
        "args.adapter",
        "test_training_goes_on_from_an_adapter",
    ),
    ("a sampled mark is a picture", "and not shows:", ":", PREFER),
    ("a rate of 0 is the default", "if args.lr is None:", "if not args.lr:", PLAN),
    # contrast
    (
        "CLIP: no temperature",
        "(log_scale.exp() * z for z in similarities(pairs))",
        "(1 * z for z in similarities(pairs))",
        BY_HAND,
    ),
    (
        "CLIP: the scale is not exponentiated",
        "(log_scale.exp() * z for z in similarities(pairs))",
        "(log_scale * z for z in similarities(pairs))",
        BY_HAND,
    ),
    (
        "CLIP: pictures to captions only",
        "(of_captions.diagonal() + logits.log_softmax(0).diagonal()) / 2",
        "of_captions.diagonal()",
        BY_HAND,
    ),
    (
        "CLIP: twice the softmax over captions",
        "logits.log_softmax(0).diagonal()",
        "of_captions.diagonal()",
        BY_HAND,
    ),
    (
        "CLIP: the sum of both directions",
        "logits.log_softmax(0).diagonal()) / 2",
        "logits.log_softmax(0).diagonal())",
        BY_HAND,
    ),
    ("CLIP: the sign", "return -(of_captions.diagonal()", "return (of_captions.diagonal()", BY_HAND),
    (
        "CLIP: the same caption counts as a wrong one",
        "same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)",
        "same & ~same",
        BY_HAND,
    ),
    (
        "CLIP: what is nearly right is not told apart",
        "torch.cat([logits, nearly], dim=1).log_softmax(1)",
        "logits.log_softmax(1)",
        BY_HAND,
    ),
    ("SigLIP: what is nearly right is right", "F.logsigmoid(-nearly)", "F.logsigmoid(nearly)", BY_HAND),
    ("SigLIP: what is nearly right does not count", "+ F.logsigmoid(-nearly).sum(1)", "+ 0 * nearly.sum(1)", BY_HAND),
    ("nearly right is the caption", "pairs[:, 1], pairs[:, 2:]", "pairs[:, 1], pairs[:, 1:-1]", BY_HAND),
    ("a caption that is nearly right, of the next picture", "(wrong @ images", "(wrong.roll(1, 0) @ images", BY_HAND),
    ("SigLIP: no bias", "(log_scale.exp() * z + bias for z", "(log_scale.exp() * z for z", BY_HAND),
    ("SigLIP: no temperature", "(log_scale.exp() * z + bias for z", "(z + bias for z", BY_HAND),
    ("SigLIP: all pairs are right", "torch.where(own, logits, -logits)", "logits", BY_HAND),
    (
        "SigLIP: the same caption counts as a wrong one",
        "* (own | ~same)\n",
        "* (own | own.logical_not())\n",
        BY_HAND,
    ),
    ("SigLIP: the mean over captions", "of_batch.sum(1)", "of_batch.mean(1)", BY_HAND),
    (
        "a tower of text that Muon does not train",
        '(Muon if args.optimizer == "muon" else adamw)',
        '(Muon if args.optimizer == "Muon" else adamw)',
        "test_the_tiny_model_learns_with_muon",
    ),
    ("an own model with Muon", '("adamw" if args.model or args.adapter else "muon")', '"muon"', PLAN),
    (
        "captions that are nearly right are not used",
        "captions=captions)\n\n    captions",
        "captions=captions[:1])\n\n    captions",
        HELD_OUT,
    ),
    (
        "what is nearly right is of another picture",
        "pictures.nearly(e.things, f",
        "pictures.nearly(made[0].things, f",
        HELD_OUT,
    ),
    ("SigLIP begins in the middle", "siglip_loss, 10.0, -10.0", "siglip_loss, 10.0, 0.0", KNOWN),
    ("CLIP begins at a temperature of 1", "clip_loss, 1 / 0.07, 0.0", "clip_loss, 1.0, 0.0", KNOWN),
    (
        "not of length 1",
        "return F.normalize(torch.cat([image[:, None], text.unflatten(0, (len(image), -1))], dim=1).float(), dim=-1)",
        "return torch.cat([image[:, None], text.unflatten(0, (len(image), -1))], dim=1).float()",
        PAIRS,
    ),
    ("a caption is its padding", "batch.caption_lengths - 1]", "-1]", PAIRS),
    ("a caption is its first word", "batch.caption_lengths - 1]", "0]", PAIRS),
    ("a caption lacks its last word", "batch.caption_lengths - 1]", "(batch.caption_lengths - 2).clamp(min=0)]", PAIRS),
    (
        "captions have no end",
        "tuple((*tokenizer.encode(text), tokenizer.eos_ids[0]) for text in texts)",
        "tuple((*tokenizer.encode(text),) for text in texts)",
        PAIRS,
    ),
    (
        "GradCache: each part has a loss of its own",
        "part.backward(gradient)",
        "part.backward(torch.ones_like(gradient))",
        GRADCACHE,
    ),
    (
        "GradCache: parts in another order",
        ".split([len(part) for part in parts])",
        ".flip(0).split([len(part) for part in parts])",
        GRADCACHE,
    ),
    (
        "the temperature does not learn",
        "(whole, vlm.log_scale, vlm.bias, same)",
        "(whole, vlm.log_scale.detach(), vlm.bias, same)",
        GRADCACHE,
    ),
    (
        "ranks: each adds the whole gradient of the scale",
        "(loss / loop.world_size).backward()",
        "loss.backward()",
        RANKS,
    ),
    ("ranks: a part of the gradient", "(whole.grad * loop.world_size)[places]", "whole.grad[places]", RANKS),
    ("ranks: rows in the places of others", "* loop.world_size + loop.rank\n", "+ loop.rank * len(mine)\n", RANKS),
    (
        "the same caption is wrong in top-1",
        "return same[torch.arange(len(same), device=same.device), nearest]",
        "return torch.eye(len(same), device=same.device)[torch.arange(len(same)), nearest]",
        "test_top1_counts_captions_that_say_the_same",
    ),
    (
        "top-1 of captions",
        "similarities(pairs)[0].argmax(1)",
        "similarities(pairs)[0].argmin(1)",
        "test_top1_counts_captions_that_say_the_same",
    ),
    # the encoder
    (
        "columns before rows",
        "rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)",
        "columns, rows = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)",
        POSITIONS,
    ),
    (
        "one position for all rows",
        "torch.cat([rows, columns], dim=-1)",
        "torch.cat([columns, columns], dim=-1)",
        POSITIONS,
    ),
    (
        "no cosines",
        "torch.cat([angles.sin(), angles.cos()], dim=1)",
        "torch.cat([angles.sin(), angles.sin()], dim=1)",
        POSITIONS,
    ),
    (
        "all frequencies alike",
        "1 / 100 ** (torch.arange(width // 4) / (width // 4))",
        "1 / 100 ** (0 * torch.arange(width // 4))",
        POSITIONS,
    ),
    (
        "no positions",
        "        x = self.norm_patches(x) + self.positions\n",
        "        x = self.norm_patches(x)\n",
        "test_positions_are_added",
    ),
    (
        "patches column by column",
        "self.stem(2 * pixels - 1).flatten(2)",
        "self.stem(2 * pixels - 1).transpose(2, 3).flatten(2)",
        PATCHES,
    ),
    ("pixels are mirrored", ".permute(0, 3, 1, 2) / 255", ".permute(0, 3, 2, 1) / 255", PATCHES),
    ("pixels from 0 to 255", ".permute(0, 3, 1, 2) / 255", ".permute(0, 3, 1, 2) / 1", PATCHES),
    (
        "patches overlap",
        "nn.Conv2d(3, c.width, c.patch, stride=c.patch)",
        "nn.Conv2d(3, c.width, c.patch + 8, stride=c.patch, padding=4)",
        PATCHES,
    ),
    (
        "patches see themselves only",
        "            x = x + attend(x)\n            x = x + mlp(x)\n        return self.norm(x)",
        "            x = x + mlp(x)\n        return self.norm(x)",
        "test_every_patch_sees_every_other",
    ),
    (
        "the scores are not masked",
        "attn_mask=mask)\n        return self.out",
        "attn_mask=None)\n        return self.out",
        ATTENTION,
    ),
    (
        "keys are values",
        "q, k, v = self.q(x), *self.kv(x if context is None else context).chunk(2, dim=-1)",
        "q, v, k = self.q(x), *self.kv(x if context is None else context).chunk(2, dim=-1)",
        ATTENTION,
    ),
    (
        "heads are interleaved",
        "y.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
        "y.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)",
        ATTENTION,
    ),
    ("x is not normed", "        x = self.norm(x)\n        q, k, v", "        q, k, v", ATTENTION),
    ("queries see no picture", "            x = x + see(x, features)\n", "", "test_tokens_of_a_picture"),
    (
        "queries are one",
        "self.queries.expand(len(features), -1, -1)",
        "self.queries[:1].expand(len(features), len(self.queries), -1)",
        "test_tokens_of_a_picture[query]",
    ),
    (
        "new tokens are as loud as they come",
        "nn.init.normal_(self.down.weight, std=2 * model.embed.weight.float().std().item() / math.sqrt(D))",
        "nn.init.normal_(self.down.weight, std=1.0)",
        "test_new_tokens_are_of_the_size_of_words",
    ),
    # cross-attention
    (
        "Flamingo: gates are open at first",
        "nn.Parameter(torch.zeros(len(model.blocks), 2))",
        "nn.Parameter(torch.ones(len(model.blocks), 2))",
        GATE,
    ),
    ("Flamingo: no tanh", "self.connector.gates[i].tanh()", "self.connector.gates[i]", FLAMINGO),
    (
        "Flamingo: one gate for both",
        "        return x + b * sees * mlp(x)",
        "        return x + a * sees * mlp(x)",
        FLAMINGO,
    ),
    (
        "Flamingo: the gates of another block",
        "self.connector.gates[i].tanh()",
        "self.connector.gates[0].tanh()",
        FLAMINGO,
    ),
    ("Flamingo: no MLP", "        return x + b * sees * mlp(x)", "        return x", FLAMINGO),
    (
        "Flamingo: the MLP of what came in",
        "        x = x + a * sees * attend(x, self.features, seen)\n        return x + b",
        "        y, x = x, x + a * sees * attend(x, self.features, seen)\n        return x + b * sees * mlp(y) + 0 * b",
        FLAMINGO,
    ),
    (
        "Flamingo: tokens before a picture see it",
        "slots.cumsum(1) * P)",
        "slots.sum(1, keepdim=True).expand_as(slots) * P)",
        CAUSAL,
    ),
    (
        "Flamingo: the first picture only",
        "slots.cumsum(1) * P)",
        "slots.cumsum(1).clamp(max=1) * P)",
        (FLAMINGO, "test_every_picture_counts_and_only_for_what_follows[cross-attention]"),
    ),
    ("Flamingo: text alone sees something", "sees = (reach > 0)[..., None].to(x.dtype)", "sees = 1.0", GATE),
    ("Flamingo: one feature too many", "seen = places < reach", "seen = places <= reach", FLAMINGO),
    (
        "Flamingo: while decoding, only the first picture's reach",
        "self.reach[:, -1:]  # one",
        "self.reach[:, :1]  # one",
        f"{CACHED}[cross-attention]",
    ),
    (
        "Flamingo: rows keep the pictures of others",
        "features=self.features[rows], reach",
        "features=self.features[: len(rows)], reach",
        (f"{SAMPLING}[cross-attention]", "test_memory_follows_its_rows"),
    ),
    (
        "Flamingo: rows keep the reach of others",
        "reach=self.reach[rows])",
        "reach=self.reach[: len(rows)])",
        (f"{SAMPLING}[cross-attention]", "test_memory_follows_its_rows"),
    ),
    (
        "Flamingo: pictures of all rows in the first",
        "padded[torch.arange(padded.shape[1], device=slots.device) < counts[:, None]] = features",
        "padded.flatten(0, 1)[:N] = features",
        f"{PADDING}[cross-attention]",
    ),
    (
        "Flamingo: a shorter part of a rollout is taken for one token",
        "reach = self.reach[:, :T] if T > 1 else",
        "reach = self.reach if T == self.reach.shape[1] else",
        "test_rollouts_in_parts_keep_their_pictures",
    ),
    (
        "a token is made of patches in a row",
        "(n, self.merge, n, self.merge)).transpose(2, 3)",
        "(n, self.merge, n, self.merge)).transpose(1, 1)",
        "test_tokens_of_a_picture",
    ),
    # slots
    (
        "V4: pictures and slots need not agree",
        "if int(slots.sum()) != len(batch.pixels) * self.connector.slots:",
        "if False:",
        AGREE,
    ),
    (
        "pictures in the slots of others",
        "seen = self.connector(features).to(embeddings.dtype)",
        "seen = self.connector(features).to(embeddings.dtype).flip(0)",
        SLOTS,
    ),
    (
        "the tokens of a picture backwards",
        "seen = self.connector(features).to(embeddings.dtype)",
        "seen = self.connector(features).to(embeddings.dtype).flip(1)",
        SLOTS,
    ),
    (
        "V9: pictures are not put in",
        "embeddings.masked_scatter(slots[..., None], seen)",
        "embeddings.masked_scatter(slots[..., None], 0 * seen)",
        (SLOTS, f"{CAUSAL}[mlp]"),
    ),
    (
        "V9: all rows see the first picture",
        "features = self.encoder(batch.pixels)\n        if",
        "features = self.encoder(batch.pixels[:1].expand_as(batch.pixels))\n        if",
        (SLOTS, f"{BATCH}[cross-attention]"),
    ),
    (
        "V1: slots are trained on",
        "mask += [trained_on if token != image_id else 0] * n",
        "mask += [1 if token == image_id else trained_on] * n",
        MASK,
    ),
    (
        "the first slot only is expanded",
        "n = slots if token == image_id else 1",
        "n = slots if token == image_id and token not in ids else 1",
        EXPAND,
    ),
    ("one slot too few", "n = slots if token == image_id else 1", "n = slots - 1 if token == image_id else 1", EXPAND),
    (
        "V1: the mask of a picture is one long",
        "mask += [trained_on if token != image_id else 0] * n",
        "mask += [trained_on if token != image_id else 0]",
        EXPAND,
    ),
    (
        "pictures without a mark",
        "if (n := rendered.input_ids.count(image_id)) != len(shown):",
        "if (n := rendered.input_ids.count(image_id)) > len(shown):",
        "test_marks_and_pictures_must_be_as_many",
    ),
    ("V3: a row is cut in a picture", "        end -= 1\n", "        break\n", CUT),
    (
        "V3: the pictures of what was cut stay",
        "pictures=row.pictures[:n])  # fmt: skip",
        "pictures=row.pictures)  # fmt: skip",
        CUT,
    ),
    ("V3: a picture that fits is cut, too", "            break  # the last one fits\n", "            pass\n", CUT),
    (
        "V3: the mask is not cut",
        "completion_mask=row.completion_mask[:end],",
        "completion_mask=row.completion_mask,",
        CUT,
    ),
    (
        "V6: padding is trained on",
        "input_ids, completion_mask = torch.zeros(2, len(rows), length, dtype=torch.long)\n",
        "input_ids, completion_mask = torch.zeros(2, len(rows), length, dtype=torch.long)\n    completion_mask += 1\n",
        PADDING,
    ),
    (
        "V13: padding on the left",
        "input_ids[b, : len(row.input_ids)] = torch.tensor(row.input_ids)",
        "input_ids[b, length - len(row.input_ids) :] = torch.tensor(row.input_ids)",
        PADDING,
    ),
    (
        "prompts are trained on",
        "batch.input_ids.masked_fill(batch.completion_mask == 0, IGNORED)",
        "batch.input_ids.masked_fill(batch.completion_mask == -1, IGNORED)",
        LOGPS,
    ),
    ("mean, not sum", "targets).sum(-1)", "targets).mean(-1)", LOGPS),
    (
        "V12: replies without the picture",
        "seen = vlm.look(batch)\n            if",
        "seen = {}\n            if",
        f"{CACHED}[mlp]",
    ),
    (
        "replies with padding's embeddings",
        'seen["embeddings"] = [x[: len(row.input_ids)] for x, row',
        'seen["embeddings"] = [x.roll(1, 0)[: len(row.input_ids)] for x, row',
        f"{CACHED}[mlp]",
    ),
    (
        "a chosen length does not count",
        "longest = longest or args.max_new_tokens",
        "longest = args.max_new_tokens",
        BATCH,
    ),
    ("samples of all seeds alike", "seed=10**6 * seed + start", "seed=start", BATCH),
    # stages
    (
        "V10: all learns",
        "if name not in names for p in some if p.requires_grad]",
        "if name in () for p in some if p.requires_grad]",
        LEARNS,
    ),
    (
        "V10: the frozen stays frozen",
        "            p.requires_grad_(True)\n\n\ndef contrast",
        "            p.requires_grad_(False)\n\n\ndef contrast",
        LEARNS,
    ),
    (
        "what an adapter froze learns",
        "if name not in names for p in some if p.requires_grad]",
        "if name not in names for p in some]",
        LEARNS,
    ),
    (
        "V10: the connector is not trained",
        '"lr": (1e-3, 3e-4), "trains": ("connector",)',
        '"lr": (1e-3, 3e-4), "trains": ()',
        LEARNS,
    ),
    (
        "V10: align trains the language model",
        '"lr": (1e-3, 3e-4), "trains": ("connector",)',
        '"lr": (1e-3, 3e-4), "trains": ("connector", "model")',
        LEARNS,
    ),
    (
        "V10: the towers go on learning",
        'with learning(vlm, STAGES[name]["trains"]):',
        'with learning(vlm, ("encoder", *STAGES[name]["trains"])):',
        STAGES,
    ),
    ("no gradient is forgotten", "            optimizer.zero_grad()\n        with", "        with", BY_HAND_DPO),
    ("the connector at the rate of the language model", "p.lr_times = 3.0  # it", "p.lr_times = 1.0  # it", PLAIN),
    ("no clipping", "grad_norm = clip(vlm, args.grad_clip)", "grad_norm = clip(vlm, 0.0)", PLAIN),
    (
        "mean over rows",
        "-answer_logps(vlm, batch).sum() / n_tokens",
        "-answer_logps(vlm, batch).sum() / args.batch_size",
        PLAIN,
    ),
    (
        "mean of each part",
        "-answer_logps(vlm, batch).sum() / n_tokens",
        "-answer_logps(vlm, batch).sum() / int(batch.completion_mask.sum())",
        SPLIT,
    ),
    (
        "a stage has the schedule of the run",
        "set_lr(optimizer, schedule, step - first, plan[name])",
        "set_lr(optimizer, schedule, step, len(stages))",
        STAGES,
    ),
    ("all stages at one rate", "schedule = Namespace(lr=rate(name, args)", "schedule = Namespace(lr=args.lr", STAGES),
    ("ranks keep their gradients", "            loop.all_reduce(vlm)\n", "", RANKS),
    ("DPO: the mean of a part", "(losses.sum() / args.batch_size).backward()", "losses.mean().backward()", SPLIT),
    (
        "DPO: chosen and rejected exchanged",
        "s = Scored(logps, ref_logps[some].to(logps), None, None)",
        "s = Scored(logps.flip(1), ref_logps[some].flip(1).to(logps), None, None)",
        BY_HAND_DPO,
    ),
    (
        "DPO: no reference",
        "s = Scored(logps, ref_logps[some].to(logps), None, None)",
        "s = Scored(logps, 0 * logps.detach(), None, None)",
        BY_HAND_DPO,
    ),
    ("DPO: the reference of other rows", "ref_logps[some].to(logps)", "ref_logps[: len(some)].to(logps)", BY_HAND_DPO),
    (
        "DPO: the first description that is true",
        "best, worst = min(range(4), key=worse.__getitem__)",
        "best, worst = min(range(4), key=lambda i: worse[i][0])",
        PREFER,
    ),
    (
        "DPO: any false description",
        "max(range(4), key=worse.__getitem__)",
        "max(range(4), key=lambda i: worse[i][0] > 0)",
        PREFER,
    ),
    (
        "DPO: the chosen one may invent",
        "if worse[best] == (0, 0) and worse[worst][0] and",
        "if worse[best][1] == 0 and worse[worst][0] and",
        PREFER,
    ),
    (
        "DPO: what is left out counts as invented",
        "if worse[best] == (0, 0) and worse[worst][0] and",
        "if worse[best] == (0, 0) < worse[worst] and",
        PREFER,
    ),
    (
        "DPO: the question is trained on",
        "Row(prompt.input_ids + ids, [0] * len(prompt.input_ids) + [1] * len(ids), prompt.pictures)",
        "Row(prompt.input_ids + ids, [1] * len(prompt.input_ids) + [1] * len(ids), prompt.pictures)",
        PREFER,
    ),
    (
        "DPO: no question for existence",
        'e.question if e.kind == "existence" else pictures.DESCRIBE',
        "pictures.DESCRIBE",
        PREFER,
    ),
    (
        "DPO: every scene's question",
        'e.question if e.kind == "existence" else pictures.DESCRIBE',
        "e.question or pictures.DESCRIBE",
        PREFER,
    ),
    (
        "DPO: the wrong answer is chosen",
        "return int(text.strip() != e.answer), 0",
        "return int(text.strip() == e.answer), 0",
        PREFER,
    ),
    (
        "DPO: answers are judged as descriptions",
        '    if e.kind == "existence":\n        return int',
        "    if False:\n        return int",
        PREFER,
    ),
    ("DPO: how much is false is not counted", "false += sum(invented > 0 for", "false += sum(invented for", PREFER),
    ("DPO: without its picture's place", "[scenes[i] for i, *_ in found]", "scenes[: len(found)]", PREFER),
    (
        "--steps: all to one stage",
        "plan[name] = round(done * args.steps / whole) - sum(plan.values())",
        "plan[name] = args.steps",
        PLAN,
    ),
    (
        "--steps: a step is lost",
        "plan[name] = round(done * args.steps / whole) - sum(plan.values())",
        'plan[name] = STAGES[name]["steps"] * args.steps // whole',
        PLAN,
    ),
    ("--lr scales the towers, too", 'if "model" not in STAGES[name]["trains"]:', "if False:", PLAN),
    (
        "prefer as fast as instruct",
        'return args.lr * STAGES[name]["lr"][column] / STAGES',
        'return args.lr * STAGES["instruct"]["lr"][column] / STAGES',
        PLAN,
    ),
    (
        "an adapter at the rate of all weights",
        'rates_of({"lr": STAGES["instruct"]["lr"]}, adapter and str(adapter))',
        'rates_of({"lr": STAGES["instruct"]["lr"]}, None)',
        PLAN,
    ),
    # kept
    ("a resumed encoder is new", '        fill_vision(vlm, saved, "--resume")\n', "        pass\n", RESUME),
    (
        "a resumed run has no pairs",
        'kept |= {"pairs": found, "ref_logps": ref_logps.tolist()}',
        'kept |= {"pairs": found, "ref_logps": (0 * ref_logps).tolist()}',
        RESUME,
    ),
    ("a resumed run is measured anew", 'before = extra.get("before") or evaluate(', "before = evaluate(", RESUME),
    (
        "a loaded connector is new",
        '        fill_vision(vlm, read_safetensors(folder / "vision.safetensors"), str(folder))\n',
        "        pass\n",
        LOADED,
    ),
    (
        "an adapter is not loaded",
        "        adapt(model, str(adapter), start, dropout=False)\n",
        "        pass\n",
        LOADED,
    ),
    (
        "weights of another shape",
        "or own[name].shape != tensors[name].shape:",
        "or own[name].ndim != tensors[name].ndim:",
        "test_broken_folders_are_refused",
    ),
    ("a new connector for one that is there", "if sees and value not in (None, own):", "if False:", GOES_ON),
    (
        "a model that sees begins anew",
        'args.stages or (["instruct"] if sees else',
        'args.stages or (["contrast", "instruct"] if sees else',
        GOES_ON,
    ),
    # measured
    (
        "V9: another picture is its own",
        "others = list(zip(asked, pictures.exchanged(rows), strict=True))",
        "others = [(e.question, e.picture) for e in rows]",
        f"{BLIND}[True]",
    ),
    (
        "V9: blank pictures are pictures",
        "[(question, pictures.BLANK) for question in unique]",
        "[(question, rows[0].picture) for question in unique]",
        f"{BLIND}[True]",
    ),
    ("the worst constant", ".most_common(1)[0]", ".most_common()[-1]", "test_the_best_constant_is_the_best"),
    (
        "left out is invented",
        "[float(pictures.missing(*pair) > 0) for pair in pairs]",
        "[float(len(pictures.invented(*pair)) > 0) for pair in pairs]",
        INVENTS,
    ),
    (
        "hallucinations a description",
        "float(len(pictures.invented(text, things)) > 0)",
        "float(len(pictures.invented(text, things)))",
        "test_a_description_invents_or_not",
    ),
    (
        "yes to what is there",
        'e.kind == "existence" and e.answer == "no"]',
        'e.kind == "existence" and e.answer == "yes"]',
        INVENTS,
    ),
    (
        "sampled is greedy",
        '(("hallucination", 1.0), ("hallucination, greedy", 0.0))',
        '(("hallucination", 0.0), ("hallucination, greedy", 0.0))',
        INVENTS,
    ),
    (
        "retrieval among captions that are the same",
        "list({pictures.describe(e.things): e for e in scenes}.items())",
        "[(pictures.describe(e.things), e) for e in scenes]",
        RETRIEVAL,
    ),
    (
        "retrieval of captions",
        "(pairs[:, 0] @ pairs[:, 1].T).argmax(1).cpu()",
        "(pairs[:, 0] @ pairs[:, 1].T).argmin(1).cpu()",
        RETRIEVAL,
    ),
    (
        "the held-out loss is a mean of means",
        'found["loss"] = [x / mean_count for x in sums]',
        'found["loss"] = [x / sum(row.completion_mask) for x, row in zip(sums, test["rows"], strict=True)]',
        ROWS,
    ),
    ("pictures beside the program", "str(Path(path).parent / name) for name in row", "str(name) for name in row", ROWS),
    (
        "held-out rows are trained on",
        'train, test = encoded(sum(parts, []), "rows")',
        'train, test = encoded(sum(parts, []) + held_out, "rows")',
        ROWS,
    ),
    ("several pictures in the contrast", "if len(row.pictures) == 1]", "if row.pictures]", ROWS),
    (
        "--too-long cut keeps rows without an answer",
        'if args.too_long == "drop" or not any(row.completion_mask):',
        'if args.too_long == "drop":',
        BAD,
    ),
    ("the question is a file", "*files, question = args.image", "question, *files = args.image", ANSWERS),
    (
        "one picture is enough",
        'conversation([(question, "")], len(shown))',
        'conversation([(question, "")], 1)',
        ANSWERS,
    ),
    ("an answer to what follows the answer", "n_pictures * (i == 0) + question", "n_pictures + question", MASK),
]

IN_PICTURES = [
    # captions that are nearly right
    ("nearly: of pairs that are unseen", "[shape for colour, shape in SEEN if colour == t.colour]", "SHAPES", NEARLY),
    ("nearly: right", "[shape for shape in others if shape != t.shape]", "[*others]", NEARLY),
    ("nearly: always the same", 'rng_for("nearly", seed)', 'rng_for("nearly")', NEARLY),
    ("nearly: one of several", "for t in things]) for shape", "for t in things[:1]]) for shape", NEARLY),
    # several questions about a picture
    ("turns: no is said to what is there", 'here if answer == "yes" else cells_for', "here if 1 else cells_for", TURNS),
    ("turns: always no", 'rng.choice(("yes", "no"))', 'rng.choice(("no", "no"))', TURNS),
    ("turns: the question of the row twice", "return [own, *((ask(", "return [own, own, *((ask(", TURNS),
    ("turns: the shape is asked after it was named", "t.shape), own]", "t.shape), own][::-1]", TURNS),
    ("turns: the shape is always asked", '"count") and rng.random() < 0.5:', '"count"):', TURNS),
    (
        "right is left",
        'PLACES = ("left", "right", "top", "bottom")',
        'PLACES = ("right", "left", "top", "bottom")',
        ("test_places_by_hand", "test_what_is_asked_is_true"),
    ),
    ("top is bottom", "2 + (dy > 0)]", "2 + (dy < 0)]", ("test_places_by_hand", "test_what_is_asked_is_true")),
    ("corners are sides", "min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):", "False:", "test_places_by_hand"),
    (
        "the middle is a side",
        "if max(abs(dx), abs(dy)) < 6 or",
        "if max(abs(dx), abs(dy)) < 0 or",
        "test_places_by_hand",
    ),
    (
        "unseen pairs are seen",
        "if (colour, shape) not in UNSEEN]\nDESCRIBE",
        "]\nDESCRIBE",
        "test_unseen_compositions_are_in_no_training_picture",
    ),
    (
        "one too few",
        "[cell] * (1 + NUMBERS.index(answer))",
        "[cell] * max(1, NUMBERS.index(answer))",
        "test_what_is_asked_is_true",
    ),
    ("no is far only", "= rng.random() < near", "= rng.random() < 0.0", "test_no_is_asked_near_and_far"),
    ("no is near only", "= rng.random() < near", "= rng.random() < 1.1", "test_no_is_asked_near_and_far"),
    ("training: no is near as often as in the exam", "draw_scene(rng, kind, cell, answer, NEAR)",
     "draw_scene(rng, kind, cell, answer)", "test_no_is_asked_near_and_far"),
    ("later turns are near as often as the exam", '"existence", here, "no", NEAR)', '"existence", here, "no")',
     "test_no_is_asked_near_and_far"),
    ("no is yes", 'if kind == "existence" and answer == "no":', "if False:", "test_what_is_asked_is_true"),
    (
        "things touch",
        "> radius + t.radius + 1.5 for t in things)",
        "> radius for t in things)",
        "test_things_lie_apart_and_within",
    ),
    (
        "things are cut off",
        "rng.uniform(radius + 1, SIDE - radius - 1)",
        "rng.uniform(0, SIDE)",
        "test_things_lie_apart_and_within",
    ),
    ("any size", 'answer if kind == "size" else rng.choice(SIZES)', "rng.choice(SIZES)", "test_what_is_asked_is_true"),
    ("a caption does not say where", '{where}."', '."', "test_captions_tell_all_that_is_there"),
    (
        "a caption counts one",
        "world.noun(len(things), t.colour",
        "world.noun(1, t.colour",
        "test_captions_tell_all_that_is_there",
    ),
    (
        "invented: colours alone",
        "return [cell for cell in named(text) if cell not in there]",
        "return [cell for cell in named(text) if cell[0] not in {c for c, _ in there}]",
        "test_what_a_text_invents_and_leaves_out",
    ),
    (
        "left out: none",
        "return len({(t.colour, t.shape) for t in things} - set(named(text)))",
        "return len(set(named(text)) - {(t.colour, t.shape) for t in things})",
        "test_what_a_text_invents_and_leaves_out",
    ),
    (
        "an exam that favours an answer",
        "for answer in answers_of(kind, cell))\n    found = []",
        "for answer in (*answers_of(kind, cell), answers_of(kind, cell)[0]))\n    found = []",
        "test_a_question_of_the_exam_gives_nothing_away",
    ),
    (
        "another picture: the next row's",
        "group[(n + 1) % R * K + (a + n) % K].picture",
        "group[(n + 1) % R * K + (a + 1) % K].picture",
        "test_the_picture_of_another_row_says_nothing",
    ),
    (
        "another picture is the same",
        "group[(n + 1) % R * K + (a + n) % K].picture",
        "group[n * K + a].picture",
        "test_the_picture_of_another_row_says_nothing",
    ),
    (
        "exams of all names alike",
        'world.rng_for("exam", seed, kind, question, answer, n)',
        'world.rng_for("exam", kind, question, answer, n)',
        "test_exams_and_training_share_no_picture",
    ),
    (
        "all repetitions are one picture",
        'world.rng_for("exam", seed, kind, question, answer, n)',
        'world.rng_for("exam", seed, kind, question, answer)',
        "test_exams_and_training_share_no_picture",
    ),
    (
        "training pictures of all seeds alike",
        'world.rng_for("pictures", seed, i)',
        'world.rng_for("pictures", i)',
        "test_exams_and_training_share_no_picture",
    ),
    (
        "colours: red is green",
        '"red": (205, 45, 45), "green": (45, 150, 65)',
        '"red": (45, 150, 65), "green": (205, 45, 45)',
        "test_colours_are_what_they_are_called",
    ),
    (
        "squares are circles",
        "return np.maximum(abs(x), abs(y)) - 0.85 * r",
        "return np.hypot(x, y) - r",
        "test_shapes_are_what_they_are_called",
    ),
    (
        "triangles stand on a corner",
        "np.maximum(y, np.maximum(*(s * math.sqrt(0.75) * x - 0.5 * y",
        "np.maximum(-y, np.maximum(*(s * math.sqrt(0.75) * x + 0.5 * y",
        "test_shapes_are_what_they_are_called",
    ),
    ("stars of six", "sector = math.pi / 5", "sector = math.pi / 6", "test_shapes_are_what_they_are_called"),
    (
        "edges are hard",
        "np.clip(0.5 - distance(t.shape, x, y, t.radius), 0, 1)[..., None]",
        "(distance(t.shape, x, y, t.radius) < 0)[..., None]",
        "test_edges_are_smooth_and_backgrounds_uneven",
    ),
    (
        "x is y",
        "x, y = XS - t.x, YS - t.y",
        "x, y = XS - t.y, YS - t.x",
        ("test_edges_are_smooth_and_backgrounds_uneven", "test_a_thing_has_its_colour_where_it_is"),
    ),
    ("six is five", "afgcd afgedc abc", "afgcd afgcd abc", "test_digits_are_those_of_a_pocket_calculator"),
    (
        "PNG: Sub of the next pixel",
        "row.reshape(-1, n), axis=0, dtype=np.uint8)",
        "row.reshape(-1, n), axis=1, dtype=np.uint8)",
        "test_png_files_are_read",
    ),
    ("PNG: Up is Sub", "        return row + above\n", "        return row + row\n", "test_png_files_are_read"),
    ("PNG: Average rounds up", "guess = (a + b) // 2", "guess = (a + b + 1) // 2", "test_png_files_are_read"),
    ("PNG: Paeth's corner", "p = a + b - c\n", "p = a + b + c\n", "test_png_files_are_read"),
    ("PNG: what is transparent is black", "+ 255 * (1 - alpha)", "+ 0 * (1 - alpha)", "test_png_files_are_read"),
    ("PNG: only the first part", "packed.append(body)", "packed[:] = packed or [body]", "test_png_files_are_read"),
    (
        "PNG: checksums are not read",
        "if zlib.crc32(kind + body) != ",
        "if 0 and zlib.crc32(kind + body) != ",
        "test_other_files_are_refused_in_one_line",
    ),
    (
        "PNG: a bomb",
        'stream.decompress(b"".join(packed), wanted + 1)\n    if len(raw) != wanted:',
        'stream.decompress(b"".join(packed))[:wanted]\n    if len(raw) != wanted:',
        "test_other_files_are_refused_in_one_line",
    ),
    (
        "PNG: interlaced ones are garbled",
        "if depth != 8 or colour not in (0, 2, 4, 6) or interlaced:",
        "if depth != 8 or colour not in (0, 2, 4, 6):",
        "test_other_files_are_refused_in_one_line",
    ),
    ("PPM: any depth", "    if most != 255:\n", "    if most > 10**9:\n", "test_other_files_are_refused_in_one_line"),
    (
        "npy: the header is believed",
        "if math.prod(shape) * dtype.itemsize != len(data) - file.tell():",
        "if False:",
        "test_other_files_are_refused_in_one_line",
    ),
    (
        "npy: a header that does not end",
        "SyntaxError, tokenize.TokenError) as",
        "SyntaxError) as",
        "test_other_files_are_refused_in_one_line[open.npy]",
    ),
    (
        "npy: a header that is no Python",
        "SyntaxError, tokenize.TokenError) as",
        "tokenize.TokenError) as",
        "test_other_files_are_refused_in_one_line[comma.npy]",
    ),
    (
        "npy: any numbers",
        "if pixels.dtype != np.uint8 or pixels.ndim != 3",
        "if pixels.ndim != 3",
        "test_arrays_that_are_no_pictures_are_refused",
    ),
    (
        "npy: pickles are loaded",
        "allow_pickle=False",
        "allow_pickle=True",
        "test_arrays_that_are_no_pictures_are_refused",
    ),
    (
        "scaling takes a sample",
        "- np.maximum(ends[:-1, None], np.arange(longest)), 0, None) * side / longest",
        "- np.maximum(ends[:-1, None], np.arange(longest)), 0, None).round() * side / longest",
        "test_scaling_is_a_mean_over_areas",
    ),
    (
        "scaling stretches",
        "longest = max(height, width)",
        "longest = min(height, width); pixels, height, width = pixels[:longest, :longest], longest, longest",
        "test_scaling_is_a_mean_over_areas",
    ),
    (
        "scaling: a black margin",
        "edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(0)",
        "edge = np.zeros(3)",
        "test_scaling_is_a_mean_over_areas",
    ),
]

IN_MODEL = [
    ("a memory is not looked at", "x = x if memory is None else memory(i, x)", "x = x", FLAMINGO),
    (
        "hidden_before forgets the memory",
        "embeddings=embeddings, memory=memory)\n        return F.pad",
        "embeddings=embeddings)\n        return F.pad",
        f"{SAMPLING}[cross-attention]",
    ),
    (
        "V12: the cache forgets the memory",
        "memory = cache.memory if cache else memory",
        "memory = None if cache else memory",
        f"{CACHED}[cross-attention]",
    ),
    (
        "select forgets the memory's rows",
        "self.memory = None if self.memory is None else self.memory.select(rows)",
        "pass",
        f"{SAMPLING}[cross-attention]",
    ),
    (
        "drop forgets the memory's rows",
        "self.memory = None if self.memory is None else self.memory.select(kept)",
        "pass",
        f"{SAMPLING}[cross-attention]",
    ),
    (
        "prompts of the same words share a picture",
        "keys = prompts if owners is None else list(zip(prompts, owners, strict=True))",
        "keys = prompts if owners is None else [(p, prompts.index(p)) for p in prompts]",
        BATCH,
    ),
    ("V12: prefill re-embeds", 'more["embeddings"] = nn', 'more["documents"] = None; _ = nn', f"{CACHED}[mlp]"),
    (
        "each sample has the picture of another prompt",
        "[r // samples for r in range(rows)]",
        "[r % len(prompts) for r in range(rows)]",
        SAMPLING,
    ),
    (
        "a part of the rows has the pictures of the first",
        "owners and owners[span]",
        "owners and owners[: span.stop - span.start]",
        "test_rollouts_in_parts_keep_their_pictures",
    ),
]


def mutant(file: str, prefix: str, name: str, old: str, new: str, test: str | tuple[str, ...]) -> Mutant:
    tests = (test,) if isinstance(test, str) else test
    label = f"for vlm.py: {name}" if file == "model.py" else name
    return Mutant(label, file, old, new, tuple(prefix + t for t in tests))


MUTANTS = [
    *(mutant("vlm.py", TESTS, *row) for row in IN_VLM),
    *(mutant("data/pictures.py", PICTURES, *row) for row in IN_PICTURES),
    *(mutant("model.py", TESTS, *row) for row in IN_MODEL),
]
