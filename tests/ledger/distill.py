"""Planted bugs of distill.py and the tests that catch them; those of the divergences are among those of kernels.py."""

from tests.mutants import Mutant

TESTS = "tests/test_distill.py::"
HAND = "test_the_loss_by_hand"
ALPHA = "test_alpha_weighs_the_text_and_the_rest_the_teacher"
OWN = "test_the_student_s_own_texts_are_no_truth"
PADS = "test_padding_and_neighbours_change_nothing"
NOTHING = "test_the_teacher_takes_no_gradient_and_a_student_that_is_its_teacher_learns_nothing"
HIDDEN = "test_hidden_states_are_matched_through_the_projection"
LATER = "test_later_tokens_by_hand"
TOKENWISE = "test_minillm_takes_texts_of_the_data_token_by_token"
MINILLM = "test_minillm_is_the_gradient_of_the_kl_of_whole_texts"
SEVERAL = "test_several_teachers_and_the_one_that_expects_the_text"
PADDED = "test_padding_of_a_head_takes_no_part"
ROWS = "test_what_is_learned_from"
WORLD = "test_rows_of_the_world_are_apart_from_the_test"
CUT = "test_no_model_goes_on_from_the_middle_of_a_question"
LONG = "test_long_rows"
BATCH = "test_a_batch_is_padded_on_the_right"
GO_ON = "test_texts_go_on_from_their_prompts"
RIGHT = "test_which_answers_are_right"
WRITES = "test_what_the_teacher_writes"
STORED = "test_what_is_stored_is_what_the_teachers_say"
SHARE = "test_a_share_of_the_rows_is_the_students_own"
BITS = "test_bits_and_divergences_are_those_of_the_rows"
COLUMNS = "test_a_rule_of_ones_own_sees_all_columns"
VOCABULARY = "test_vocabularies_must_be_the_same"
WIDE = "test_padded_heads_are_compared_where_there_are_tokens"
FROZEN = "test_teachers_are_frozen_and_in_eval_mode"
LOOP = "test_a_run_is_a_plain_loop"
SPLIT = "test_splitting_a_batch_changes_nothing"
RANKS = "test_two_ranks_equal_one"
RESUME = "test_resuming_is_exact"
TOP = "test_all_probabilities_stored_teach_like_the_teacher"
EMPTY = "test_an_empty_batch_asks_no_teacher_and_changes_nothing"
CLIPPED = "test_gradients_are_clipped"
STUDENT = "test_the_default_student_is_an_eighth_of_the_tiny_teacher"
GAP = "test_the_gap_is_the_way_from_hard_labels_to_the_teacher"
SAYS = "test_the_default_run_says_what_was_closed"
SEQUENCE = "test_sequence_learns_from_texts_of_the_teacher"
WEAK = "test_weak_to_strong_is_three_runs"
TABLE = "test_a_table_of_the_losses"
DEFAULTS = "test_defaults_are_those_of_the_loss_the_task_and_the_kind_of_run"
FLAGS = "test_flags_that_do_not_go_together_are_refused"
FILE_RULE = "test_questions_of_a_file_and_a_rule"
TEXT = "test_a_run_may_begin_on_the_text_alone"
FILE = "test_a_file_needs_a_teacher_and_top_k_a_large_enough_vocabulary"

ROWS_OF_BUGS = [
    # the objective
    ("K11: alpha weighs the teacher", 'terms["hard"] = alpha *', 'terms["hard"] = (1 - alpha) *', (HAND, ALPHA)),
    ("K11: the text at full weight", 'terms["hard"] = alpha * ', 'terms["hard"] = ', (HAND, ALPHA)),
    ("K11: the teacher at full weight", 'terms["soft"] = (1 - alpha) * T**2', 'terms["soft"] = T**2', HAND),
    ("T, not its square", "(1 - alpha) * T**2 *", "(1 - alpha) * T *", HAND),
    ("no square of T", "(1 - alpha) * T**2 *", "(1 - alpha) *", HAND),
    ("D at temperature 1", "temperature=T, mixture=taught.mixture", "temperature=1.0, mixture=taught.mixture", HAND),
    ("--skew is not looked at", "skew=args.skew or 0.0, temperature=T", "skew=0.5, temperature=T", HAND),
    ("K1: another divergence", '"jsd": ("jsd", SOFT', '"jsd": ("skew_kl", SOFT', HAND),
    ("K1: reverse KL is forward KL", '"reverse_kl": ("reverse_kl",', '"reverse_kl": ("forward_kl",', HAND),
    (
        "K4: the teacher on prompts and padding",
        "taught.targets, mask, kind=kind",
        "taught.targets, mask * 0 + 1, kind=kind",
        HAND,
    ),
    (
        "K4: hard labels on prompts and padding",
        "masked_fill(mask * (1 - batch.own) == 0, IGNORED)",
        "masked_fill(1 - batch.own == 0, IGNORED)",
        HAND,
    ),
    (
        "its own texts are truth",
        "masked_fill(mask * (1 - batch.own) == 0, IGNORED)",
        "masked_fill(mask == 0, IGNORED)",
        OWN,
    ),
    ("K5: the student teaches itself", "said = taught(teachers, batch,", "said = taught([model], batch,", LOOP),
    ("K8: the teacher takes a gradient", "@torch.no_grad()\ndef taught(", "def taught(", NOTHING),
    ("the shares of the teachers are forgotten", "mixture=taught.mixture\n", "mixture=None\n", SEVERAL),
    ("the teacher that expects the text least", "logps.sum(1).argmax(-1)", "logps.sum(1).argmin(-1)", SEVERAL),
    (
        "one teacher for the whole batch",
        "best = logps.sum(1).argmax(-1)",
        "best = logps.sum((0, 1)).argmax(-1).expand(len(logps))",
        SEVERAL,
    ),
    ("--fusion is not looked at", 'or args.fusion == "mean"):', "or True):", SEVERAL),
    ("a vocabulary pass for nothing", '(len(teachers) == 1 or args.fusion == "mean")', "len(teachers) == 1", SEVERAL),
    ("prompts choose the teacher", "IGNORED)\n    logps = torch.stack", "0)\n    logps = torch.stack", SEVERAL),
    (
        "minillm: teachers are their sum",
        "logps.logsumexp(-1) - math.log(len(teachers))",
        "logps.logsumexp(-1)",
        SEVERAL,
    ),
    ("the projection is of the teacher's prompts, too", "errors.masked_fill(mask == 0, 0.0)", "errors", HIDDEN),
    ("the width is not divided by", 'reduction="none").mean(-1)', 'reduction="none").sum(-1)', HIDDEN),
    ("--hidden has no weight", "args.hidden * errors", "1.0 * errors", HIDDEN),
    (
        "states are not projected",
        "mse_loss(projection(hidden), taught",
        "mse_loss(projection(hidden.detach()), taught",
        HIDDEN,
    ),
    (
        "K7: the student's padding in its softmax",
        "head_of(model, n_words), batch",
        "model.head.weight, batch",
        PADDED,
    ),
    # minillm
    (
        "minillm without its long part",
        '    if args.loss == "minillm":\n        logps',
        "    if False:\n        logps",
        MINILLM,
    ),
    ("minillm: its long part at full weight", "(1 - alpha) * later_tokens(", "later_tokens(", TOKENWISE),
    ("later: sign", "return -(after /", "return (after /", (LATER, MINILLM)),
    (
        "later: the token itself counts",
        "x.flip(-1).cumsum(-1).flip(-1) - x for",
        "x.flip(-1).cumsum(-1).flip(-1) for",
        (LATER, MINILLM),
    ),
    ("later: what came before", "x.flip(-1).cumsum(-1).flip(-1) - x for", "x.cumsum(-1) - x for", (LATER, MINILLM)),
    ("later: a sum, no mean", "after / n_after.clamp(min=1)", "after", LATER),
    (
        "later: gains have a gradient",
        "((teacher_logps - logps) * own).detach()",
        "(teacher_logps - logps) * own",
        LATER,
    ),
    (
        "later: the gain of the student",
        "((teacher_logps - logps) * own)",
        "((logps - teacher_logps) * own)",
        (LATER, MINILLM),
    ),
    ("later: gains of the prompt", "((teacher_logps - logps) * own)", "(teacher_logps - logps)", LATER),
    (
        "minillm: texts of the data as if sampled",
        '    if args.loss == "minillm":\n',
        '    if args.loss == "minillm":\n        batch = batch._replace(own=mask)\n',
        TOKENWISE,
    ),
    # data
    ("a text is all prompt", "min(n_prompt, len(row.input_ids) - 1), {", "n_prompt, {", ROWS),
    (
        "only the last turn is written from the first",
        "chat.prompt_ids(messages[:-1], tokenizer",
        "chat.prompt_ids(messages[:1], tokenizer",
        ROWS,
    ),
    (
        "any prompt will do",
        "    if ids[: len(prompt)] != prompt:\n",
        "    if False:\n",
        "test_a_prompt_that_is_written_otherwise_with_its_answer_is_refused",
    ),
    ("the line break after a turn stays", "end = len(mask) - mask[::-1].index(1)", "end = len(mask)", ROWS),
    ("all seeds see the same rows", '[("train", args.seed, i) for i', '[("train", i) for i', WORLD),
    (
        "the test is the training set",
        '[("test", i) for i in range(HELD_OUT)]',
        '[("train", args.seed, i) for i in range(HELD_OUT)]',
        WORLD,
    ),
    ("the working is shown", "f\"<think></think>{world.final_answer(row['answer'])}\"", 'row["answer"]', WORLD),
    (
        "sorted from small to large",
        "answer = world.HELD_BACK.solve(problem)",
        'answer = world.SKILLS["sort"].solve(problem)',
        WORLD,
    ),
    ("long rows are let through", "if len(e.input_ids) > args.max_length:", "if False:", LONG),
    ("a cut row keeps its end", "(x[: args.max_length] for x in", "(x[-args.max_length :] for x in", LONG),
    (
        "the prompt of a cut row is beyond it",
        "n_prompt=min(e.n_prompt, args.max_length - 1))",
        "n_prompt=e.n_prompt)",
        CUT,
    ),
    (
        "a model goes on from the middle of a question",
        'if done == "cut" and written and e.n_prompt >= args.max_length:',
        "if False:",
        CUT,
    ),
    (
        "one token that may be written is none",
        "written and e.n_prompt >= args",
        "written and e.n_prompt >= -1 + args",
        CUT,
    ),
    ("own texts may begin anywhere", '(args.on_policy or args.loss == "sequence")', 'args.loss == "sequence"', CUT),
    ("the teacher's texts may begin anywhere", '(args.on_policy or args.loss == "sequence")', "args.on_policy", CUT),
    ("held-out rows depend on --loss", 'what == "rows" and (args.on_policy', "(args.on_policy", CUT),
    ("rows with nothing to learn", "if any(e.completion_mask):", "if True:", LONG),
    ("padding is learned", "= torch.tensor(e.completion_mask)", "= 1", BATCH),
    (
        "what is stored is padded on the left",
        "nn.functional.pad(x, (0, 0, 0, length - len(x)))",
        "nn.functional.pad(x, (0, 0, length - len(x), 0))",
        BATCH,
    ),
    (
        "a model goes on from the whole row",
        "prompts, texts = [e.input_ids[: e.n_prompt] for",
        "prompts, texts = [e.input_ids for",
        GO_ON,
    ),
    ("G22: every batch of texts has the same seed", "seed=world.rng_for(*key, start).getrandbits(53)", "seed=0", GO_ON),
    ("G22: every 256 prompts have the same seed", "world.rng_for(*key, start)", "world.rng_for(*key)",
     "test_every_256_prompts_have_a_seed_of_their_own"),
    (
        "the temperature of texts",
        "samples=samples, temperature=temperature,",
        "samples=samples, temperature=1.0,",
        GO_ON,
    ),
    (
        "texts go to the wrong prompts",
        "owners = [e for e in some for _ in range(samples)]",
        "owners = [e for _ in range(samples) for e in some]",
        GO_ON,
    ),
    (
        "the prompt of a text is learned anew",
        "completion_mask=e.completion_mask[: e.n_prompt] + [1]",
        "completion_mask=[1] * e.n_prompt + [1]",
        GO_ON,
    ),
    ("unfinished answers are right", "said[-1] in tokenizer.eos_ids and rule", "rule", RIGHT),
    (
        "right is whatever was said",
        "chat.completion_text(said, tokenizer), row) >= 1",
        "chat.completion_text(said, tokenizer), row) >= 0",
        RIGHT,
    ),
    ("the most probable text is sampled", "0.0 if args.samples == 1 else 1.0", "1.0", WRITES),
    ("the same text many times", "{tuple(e.input_ids): e for e in some}.values()]", "some]", WRITES),
    ("nothing is checked", "    if args.check:\n        n, texts", "    if False:\n        n, texts", WRITES),
    ("a rule does not see the prompt", "rule(asked, chat", 'rule("", chat', RIGHT),
    ("a rule sees the system's words", '"answer")[-2]["content"]', '"answer")[0]["content"]', RIGHT),
    (
        "padding of a head is said",
        "temperature=temperature, vocab_size=tokenizer.vocab_size,",
        "temperature=temperature,",
        GO_ON,
    ),
    (
        "what is stored is that of all teachers",
        "temperature=args.temperature, mixture=said.mixture)",
        "temperature=args.temperature)",
        STORED,
    ),
    (
        "the texts of all steps have one seed",
        '("student", args.seed, step, loop.rank)',
        '("student", args.seed, loop.rank)',
        SHARE,
    ),
    (
        "the texts of all runs have one seed",
        '("student", args.seed, step, loop.rank)',
        '("student", step, loop.rank)',
        SHARE,
    ),
    (
        "the texts of all ranks have one seed",
        '("student", args.seed, step, loop.rank)',
        '("student", args.seed, step)',
        SHARE,
    ),
    (
        "what is stored has another temperature",
        "args.top_k, temperature=args.temperature, mixture",
        "args.top_k, temperature=1.0, mixture",
        STORED,
    ),
    (
        "what is stored is that of the row before",
        "TopK(*(x[i, : len(e.input_ids)].cpu()",
        "TopK(*(x[i - 1, : len(e.input_ids)].cpu()",
        STORED,
    ),
    ("all rows or none are the student's own", "args.seed, step, i).random()", "args.seed, step).random()", SHARE),
    ("always the same rows are the student's own", "args.seed, step, i).random()", "args.seed, i).random()", SHARE),
    ("on-policy is off", "own = [[world.rng_for", "own = [[False and world.rng_for", SHARE),
    (
        "data and own texts exchanged",
        "[next(texts)[0]._replace(own=True) if is_own else e for e, is_own",
        "[e if is_own else next(texts)[0]._replace(own=True) for e, is_own",
        SHARE,
    ),
    # the measurement
    ("nats for bits", "/ math.log(2)).tolist()", ").tolist()", BITS),
    ("bits of prompts", "(-(logps * batch.completion_mask).sum(-1)", "(-logps.sum(-1)", BITS),
    ("bits a token", "fmean(n_bytes_of(e, tokenizer) for", "fmean(len(e.input_ids) for", BITS),
    ("characters for bytes", "skip_special=True).encode())", "skip_special=True))", BITS),
    ("K1: KL is the other way round", 'divergences("forward_kl", model', 'divergences("reverse_kl", model', BITS),
    ("K1: reverse KL is forward KL", 'divergences("reverse_kl", model', 'divergences("forward_kl", model', BITS),
    (
        "reverse KL of tokens that were given",
        "[0] * e.n_prompt + e.completion_mask[e.n_prompt :]",
        "e.completion_mask",
        BITS,
    ),
    ("reverse KL on the data", "batches_of(own, args)", "batches_of(test, args)", BITS),
    ("KL of another row", "[(h[i], w) for h, w in targets]", "[(h[i - 1], w) for h, w in targets]", BITS),
    ("K8: measuring leaves a teacher in training mode", "model.train(training)", "model.train()", FROZEN),
    (
        "answers are sampled",
        'continued(model, tokenizer, test, 1, 0.0, ("test",)',
        'continued(model, tokenizer, test, 1, 1.0, ("test",)',
        "test_answers_are_judged_greedily",
    ),
    ("entropy per text", "bits / sum(n_bytes_of(e, tokenizer) for e in test)", "bits / len(test)", SAYS),
    ("entropy of one text", "sum(map(world.code_length, texts))", "max(map(world.code_length, texts))", SAYS),
    # models
    ("K7: any vocabulary will do", "if odd := first_difference(tokenizer, theirs):", "if odd := '':", VOCABULARY),
    (
        "K7: special tokens are not compared",
        "in t.special_tokens.items()} for t",
        "in () and t.special_tokens.items()} for t",
        VOCABULARY,
    ),
    (
        "K7: the padding of heads is compared",
        "if len(sizes) == 1:\n        return sizes.pop()",
        "if True:\n        return max(sizes)",
        WIDE,
    ),
    ("K7: the mass beyond is not said", "logps[:, n:].exp().sum(-1).mean()", "logps[:, :n].exp().sum(-1).mean()", WIDE),
    (
        "K8: teachers in training mode",
        "(loop.device).eval().requires_grad_(False)",
        "(loop.device).train().requires_grad_(False)",
        FROZEN,
    ),
    ("K8: teachers may learn", "(loop.device).eval().requires_grad_(False)", "(loop.device).eval()", FROZEN),
    (
        "a student of a fifth",
        'cli.add_argument("--width", type=COUNT, default=64',
        'cli.add_argument("--width", type=COUNT, default=96',
        STUDENT,
    ),
    # the run
    (
        "K4, S1: divided by the tokens of the micro-batch",
        "/ n_tokens).backward()",
        "/ batch.completion_mask.sum()).backward()",
        (LOOP, SPLIT),
    ),
    ("S2: divided once more", "/ n_tokens).backward()", "/ n_tokens / len(batches)).backward()", LOOP),
    ("no weight decays", "args.lr, args.weight_decay)", "args.lr, 0.0)", LOOP),
    ("the schedule is not followed", "set_lr(optimizer, args, step, total)", "set_lr(optimizer, args, 1, total)", LOOP),
    (
        "the schedule has --steps of its own",
        "set_lr(optimizer, args, step, total)",
        "set_lr(optimizer, args, step, 5)",
        LOOP,
    ),
    ("--epochs is not looked at", "math.ceil(args.epochs * len(rows) / args.batch_size)", "1", LOOP),
    ("an epoch is rounded down", "math.ceil(args.epochs * len", "math.floor(args.epochs * len", LOOP),
    ("--eval-every does nothing", 'if args.eval_every and loop.due("eval", step)', "if False", LOOP),
    ("the worst teacher", "best(map(statistics.fmean, found))", "max(map(statistics.fmean, found))", FROZEN),
    (
        "the teacher is measured on one row",
        "evaluate(teacher, (), tokenizer, test, n_words",
        "evaluate(teacher, (), tokenizer, test[:1], n_words",
        FROZEN,
    ),
    ("the logged loss is that of the last micro-batch", "sums.get(name, 0.0) + term.detach()", "term.detach()", LOOP),
    ("no step is taken", "        optimizer.step()\n", "", LOOP),
    ("gradients of the steps before", "        optimizer.zero_grad()\n", "", LOOP),
    ("nothing is clipped", "grad_norm = clip(trained, args.grad_clip)", "grad_norm = clip(trained, 0)", CLIPPED),
    ("T1: every rank for itself", "        loop.all_reduce(trained)\n", "", RANKS),
    ("T1: the projection of every rank for itself", "loop.all_reduce(trained)", "loop.all_reduce(model)", RANKS),
    ("the tokens of this rank", "n_tokens = loop.sum_over_ranks(sum(int(", "n_tokens = (sum(int(", RANKS),
    ("T5: the projection begins anew", "if projection is not None and extra:", "if False:", RESUME),
    ("T5: the optimizer begins anew", "loop.restore(model, optimizer)", "loop.restore(model)", RESUME),
    (
        "the projection does not learn",
        "adamw(trained if args.hidden else model,",
        "adamw(model,",
        "test_the_projection_learns",
    ),
    (
        "own texts are of the data",
        "own[b, e.n_prompt : len(e.input_ids)] = int(e.own)",
        "pass",
        "test_the_run_knows_which_texts_are_the_students_own",
    ),
    (
        "the teacher is asked after all",
        "        rows = with_top_k(teachers, rows",
        "        with_top_k(teachers, rows",
        TOP,
    ),
    ("T4: an empty batch asks the teacher", "    elif top_k and not examples:", "    elif False:", EMPTY),
    ("T4: an empty batch does not know of --top-k", "64 if loop.compiled else 1, args.top_k) for some",
     "64 if loop.compiled else 1) for some", EMPTY),
    ("--loss sequence learns from the data", "rows = fit(teacher_written(", "fit(teacher_written(", SEQUENCE),
    (
        "the end is the start",
        "after = evaluate(model, teachers, tokenizer, test, n_words, args, loop)",
        "after = before",
        SAYS,
    ),
    ("fewer bits are worse", "higher_is_better=best is max", "higher_is_better=True", LOOP),
    ("the baseline is this run", '{"loss": "hard", "out": loop.out / "hard"', '{"out": loop.out / "hard"', SAYS),
    ("the baseline has this run's rate", 'fromkeys((*HYPER, "top_k")', 'fromkeys((*HYPER[1:], "top_k")', SAYS),
    ("the baseline has all steps", "min(args.steps, HARD_STEPS.get(args.task, args.steps))", "args.steps", SAYS),
    ("the baseline has steps of its own", "min(args.steps, HARD_STEPS.get(args.task, args.steps))", "None", SAYS),
    (
        "hard labels at the rate of all",
        '"hard": (None, {"lr": (5e-4, 1e-5),',
        '"hard": (None, {"lr": (3e-3, 1e-5),',
        SAYS,
    ),
    ("nothing is less than nothing", "(teacher - hard) + 0.0", "(teacher - hard)", GAP),
    ("the gap from nothing", "(value - hard) / (teacher - hard)", "value / teacher", GAP),
    # several runs
    ("strong and weak are on different machines", "load(home / name, device=loop.device,", "load(home / name,", WEAK),
    ("the weak one is measured three times", "load(home / name, device", 'load(home / "weak", device', WEAK),
    (
        "measured on what was learned",
        "rows = examples(one, tokenizer, loop)[1]",
        "rows = examples(one, tokenizer, loop)[0]",
        WEAK,
    ),
    ("three runs cannot be resumed", '{"out": home, "resume": False}', '{"out": home}', WEAK),
    ("a run that never began is resumed", 'args.resume and (home / name / "checkpoint").exists()', "args.resume", WEAK),
    ("three runs begin anew", 'args.resume and (home / name / "checkpoint").exists()', "False", WEAK),
    ("the strong one sees the truth", '"strong": {"loss": "sequence"', '"strong": {"loss": "hard"', WEAK),
    (
        "weak and strong see the same rows",
        '"model": str(strong), "seed": args.seed + 1}',
        '"model": str(strong)}',
        WEAK,
    ),
    ("what is recovered of the ceiling", '(means["strong"] - means["weak"]) / gap', 'means["strong"] / gap', WEAK),
    (
        "the gap of each row of its own",
        'means["hard"], means["teacher"])}',
        'means["new student"], means["teacher"])}',
        TABLE,
    ),
    ("the table measures the baseline again", "    args.baseline = False\n", "", TABLE),
    ("a table without seeds", "TABLE, home, COLUMNS, MAIN_LOSSES, start", "TABLE, home, COLUMNS, (), start", TABLE),
    # flags
    ("a rate for models of one's own", '(args.model if key == "lr" else args.data) is not None])', "0])", DEFAULTS),
    ("a task's rate for a --model", 'if not (key == "lr" and args.model)}', "}", DEFAULTS),
    ("steps on the text are not taken", "on_text if step <= args.sft_steps else args", "args", TEXT),
    ("minillm: a short run is all hard labels", "args.sft_steps = args.steps // 4 ", "args.sft_steps = 200 ",
     "test_defaults_are_those_of_the_loss_the_task_and_the_kind_of_run"),
    ("no step is left for the loss itself", "if 0 < total <= args.sft_steps:", "if False:",
     "test_steps_on_the_text_leave_some_for_the_loss"),
    ("the student writes at another temperature than it is scored", "continued(model, tokenizer, chosen, 1, 1.0, key",
     "continued(model, tokenizer, chosen, 1, args.temperature, key",
     "test_a_share_of_the_rows_is_the_students_own"),
    ("the projection is not clipped", "grad_norm = clip(trained, args.grad_clip)",
     "grad_norm = clip(model, args.grad_clip)", "test_gradients_are_clipped"),
    ("held-out problems are of training", "world_row(args.task, key, key[0],", 'world_row(args.task, key, "train",',
     WORLD),
    ("the entropy of texts that were cut",
     "if texts == [tokenizer.decode(e.input_ids, skip_special=True) for e in test]:",
     "if True:", "test_texts_that_were_cut_have_no_entropy"),
    ("one step on the text too many", "if step <= args.sft_steps", "if step <= args.sft_steps + 1", TEXT),
    ("the student writes before it can", "        if now.on_policy:", "        if args.on_policy:", TEXT),
    ("other values are not looked at", "setattr(args, key, {", "str({", DEFAULTS),
    ("--alpha above 1", "(args.alpha > 1,", "(False,", FLAGS),
    ("--on-policy above 1", "(args.on_policy > 1,", "(False,", FLAGS),
    ("--temperature 0", "(args.temperature == 0,", "(False,", FLAGS),
    ("--skew at its ends", "not 0 < args.skew < 1,", "not 0 <= args.skew <= 1,", FLAGS),
    ("--hidden without a teacher", "(args.hidden and kind is None,", "(False,", FLAGS),
    ("--top-k without probabilities", "(args.top_k and kind is None,", "(False,", FLAGS),
    ("--top-k on new texts", "(args.top_k and (args.on_policy or", "(args.top_k and (", FLAGS),
    ("--top-k of a policy gradient", ' or name == "minillm"),', "),", FLAGS),
    ("any width", "(args.width % 32,", "(False,", FLAGS),
    ("a projection in shards", '(args.hidden and args.parallel == "fsdp",', "(False,", FLAGS),
    ("ranks wait for each other", '(args.on_policy and args.parallel == "fsdp",', "(False,", FLAGS),
    ("a teacher for each text of the student", '(args.fusion == "min_ce" and name == "minillm",', "(False,", FLAGS),
    (
        "a flag that a loss has not",
        "elif getattr(args, key) is not None and key not in defaults:",
        "elif False:",
        FLAGS,
    ),
    ("a rule that is not known", "    if args.check:\n        checkers", "    if False:\n        checkers", FLAGS),
    ("a table of a file", '(args.data or args.task != "weather" or ","', '(args.task != "weather" or ","', FLAGS),
    ("a table of another task", '(args.data or args.task != "weather" or ","', '(args.data or ","', FLAGS),
    ("a table of two teachers", ' or "," in (args.teacher or "")):', "):", FLAGS),
    ("weak and strong of a file", '("data", "model", "teacher", "steps",', '("model", "teacher", "steps",', FLAGS),
    ("weak and strong are given", '"teacher", "steps", "rows"', '"rows"', FLAGS),
    ("weak and strong of no rank", "not in (cli.get_default(name),", "is not None not in (True,", FLAGS),
    ("gap recovered of nothing", '[(means["strong"] - means["weak"]) / gap]', '[means["strong"] / gap]', WEAK),
    ("a rule sees few columns", ", keep=bool(args.check)", "", COLUMNS),
    ("a rule of ours sees few columns", "keep=bool(args.check)", 'keep=":" in (args.check or "")',
     "test_answers_beside_completions_are_kept"),
    ("the first of several files", "        rows = sum(parts, [])\n", "        rows = parts[0]\n",
     "test_rows_may_be_of_several_files"),
    ("an answer for a completion", '"completion" if "completion" in row else', '"completion" if 0 else', COLUMNS),
    ("answers are not looked for", 'if args.check and args.loss == "sequence" and', "if False and", COLUMNS),
    ("answers that are no text", 'isinstance(row.get("answer"), str)', '"answer" in row', COLUMNS),
    ("a prefix takes no room", "model.context - max(", "model.config.max_length - max(", GO_ON),
    (
        "no room for what the student writes",
        "    if args.on_policy:\n        check_room(",
        "    if False:\n        check_room(",
        FILE_RULE,
    ),
    ("the weather's answers are checked", '(name != "sequence" or weather)', '(name != "sequence")', FLAGS),
    ("--check of what nobody writes", '(name != "sequence" or weather)', "(weather)", FLAGS),
    ("--epochs of the world", "asked[1] and not args.data", "False", FLAGS),
    ("one of several teachers writes", '((args.hidden or name == "sequence") and', "(args.hidden and", FLAGS),
    (
        "the states of one of several teachers",
        '((args.hidden or name == "sequence") and',
        '(name == "sequence" and',
        FLAGS,
    ),
    ("hard labels without a vocabulary", " or not (args.data and args.model)", " or not args.data", FILE),
    ("a student that cannot read --max-length", "max(512, args.max_length))", "512)", STUDENT),
    (
        "the mass of a narrow teacher",
        "    with loop.autocast():\n        hidden = teachers[0]",
        "    if True:\n        hidden = teachers[0]",
        WIDE,
    ),
    ("any teacher for a file", "    if args.data and not args.teacher:\n", "    if False:\n", FILE),
    ("more probabilities than tokens", "if args.top_k > n_words:", "if False:", FILE),
]

MUTANTS = [
    Mutant(name, "distill.py", old, new, tuple(TESTS + t for t in ((test,) if isinstance(test, str) else test)))
    for name, old, new, test in ROWS_OF_BUGS
]
