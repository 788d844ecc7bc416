"""Planted bugs of reward.py, and of the scalar head in model.py, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_reward.py::"

HEAD = "test_a_scalar_head_is_new_and_the_body_a_copy"
SMALL = "test_rewards_begin_small"
LAST = "test_a_reward_is_read_at_the_last_token_of_the_answer"
AFTER = "test_a_reward_knows_nothing_of_what_follows_the_answer"
TERMS = "test_bradley_terry_term_by_term"
POINTS = "test_bradley_terry_at_points_that_are_known"
WINNER = "test_a_margin_is_asked_of_the_winner_whichever_that_is"
GOOD = "test_binary_is_the_cross_entropy_of_the_sigmoid"
ORDERS = "test_plackett_luce_is_a_distribution_over_orders"
UNEQUAL = "test_plackett_luce_of_unequal_lists"
PAIRS = "test_all_pairs_of_a_list_count_alike"
ENDS = "test_a_process_reward_is_judged_at_the_ends_of_steps_alone"
PEARSON = "test_pearson_is_the_correlation"
EPIC = "test_epic_is_blind_to_what_changes_no_policy"
LOSSES = "test_losses_of_a_batch_are_those_of_its_rows_alone"
MET = "test_margins_say_whether_the_feedback_is_met"
PARITY = "test_a_reward_model_of_transformers_gives_the_same_scores_here_and_goes_back"
SAVED = "test_a_run_leaves_a_model_that_transformers_loads"
KINDS = "test_models_of_the_other_kind_are_refused"
SHARED = "test_answers_share_their_prompt_and_the_mask_is_on_them_alone"
STEPS = "test_steps_end_at_the_last_token_of_each"
LONG = "test_what_is_too_long_is_refused_dropped_or_cut_at_the_end_of_the_answers"
SAME = "test_pairs_that_are_the_same_after_cutting_are_dropped_and_counted"
COLLATE = "test_collate_puts_the_answers_of_an_example_one_after_the_other"
COIN = "test_good_is_a_coin_of_the_utility"
FOUR = "test_four_answers_are_in_the_order_of_plackett_and_luce"
NOISE = "test_the_noise_of_an_order_is_that_of_the_answer_wherever_it_runs"
AT_ONCE = "test_a_judge_reads_so_many_questions_at_a_time_and_none_beyond_its_context"
ODDS = "test_odds_are_of_the_first_token_after_each_prompt"
AI = "test_the_ai_label_is_the_weighted_difference_of_its_opinions"
JUDGE = "test_a_judge_that_prefers_a_place_says_nothing"
RULES = "test_a_constitution_is_a_list_of_questions_and_weights"
REVISE = "test_revision_drops_what_is_held_against_an_answer_and_adds_what_it_lacks"
CHANGE = "test_each_round_of_revision_makes_the_best_change"
UNKNOWN = "test_revision_by_what_the_world_cannot_check_is_refused"
STAGE = "test_the_tiny_worlds_judge_is_a_stage_of_its_own"
ENDINGS = "test_steps_are_labelled_by_where_their_endings_arrive"
CHECKER = "test_the_checker_of_steps_wants_all_before_them_right"
BEST = "test_best_of_eight"
SCORES = "test_scores_come_in_the_order_of_the_examples"
MARGINS = "test_margins_of_every_kind"
CALIBRATION = "test_calibration_by_hand"
CEILING = "test_a_reward_that_is_the_utility_reaches_the_ceiling"
NEVER = "test_what_the_world_trains_on_is_never_measured"
SPLIT = "test_feedback_of_every_kind_is_learned_by_heart_however_batches_are_split"
PLAIN = "test_a_run_is_a_plain_loop"
RANKS = "test_two_ranks_equal_one"
RESUME = "test_resuming_is_exact"
ONCE = "test_rows_are_trained_on_once_an_epoch_and_held_out_ones_never"
BY_AI = "test_a_file_is_labelled_by_the_ai"
SORTED = "test_ranked_answers_are_sorted_by_their_scores"
TIES = "test_answers_of_equal_scores_have_no_order"
DTYPE = "test_compiled_runs_see_few_lengths_and_forward_passes_are_in_dtype"
NONE = "test_no_steps_are_no_steps"
DEFAULTS = "test_defaults_are_of_one_table"
FLAGS = "test_bad_flags_are_one_line_and_exit_2"
ROWS = "test_bad_rows_are_one_line_and_exit_2"
DROPPED = "test_what_was_dropped_is_counted_out_loud"

MUTANTS = [
    Mutant(name, file, old, new, tuple(TESTS + t for t in ((test,) if isinstance(test, str) else test)))
    for file, group in {
        "reward.py": [
            # the head, and where it is read
            ("R9: the head starts like a matrix of the body", "-0.5)\n    new.load", "0.5)\n    new.load", SMALL),
            (
                "R9: the head starts at zero",
                "nn.init.normal_(new.head.weight, std=(model.config.width + 1) ** -0.5)",
                "nn.init.zeros_(new.head.weight)",
                SMALL,
            ),
            (
                "the body starts anew",
                'new.load_state_dict(model.state_dict() | {"head.weight": new.head.weight})',
                "",
                HEAD,
            ),
            ("a head on integers", "    refuse_quantized(new)\n", "", HEAD),
            ("the head stays tied to the embedding", "labels=1, tied=False", "labels=1", HEAD),
            ("the new head is of another dtype", ".to(model.embed.weight)\n", "\n", HEAD),
            (
                "R8: the mean of the answer's states",
                "return running_rewards(model, input_ids).gather(1, last).squeeze(1)",
                "return (running_rewards(model, input_ids) * completion_mask).sum(1) / completion_mask.sum(1)",
                LAST,
            ),
            (
                "the first token of the answer",
                ".amax(1, keepdim=True)",
                ".masked_fill(completion_mask == 0, 999).amin(1, keepdim=True)",
                LAST,
            ),
            (
                "the last column, padding or not",
                "return running_rewards(model, input_ids).gather(1, last).squeeze(1)",
                "return running_rewards(model, input_ids)[:, -1]",
                AFTER,
            ),
            (
                "R2: before the first pad",
                "last = (completion_mask * torch",
                "completion_mask = (input_ids != 0).long().cumprod(1)\n    last = (completion_mask * torch",
                LAST,
            ),
            (
                "R2: the last token that is no pad",
                "last = (completion_mask * torch",
                "completion_mask = (input_ids != 0).long()\n    last = (completion_mask * torch",
                LAST,
            ),
            (
                "the token before the last",
                "(completion_mask * torch.arange(input_ids.shape[1], device=input_ids.device))",
                "(completion_mask * torch.arange(-1, input_ids.shape[1] - 1, device=input_ids.device)).clamp(0)",
                LAST,
            ),
            (
                "the state that predicts the last token",
                "(model.hidden(input_ids) * model",
                "(model.hidden_before(input_ids) * model",
                LAST,
            ),
            # Bradley-Terry
            ("R3: the worse answer wins", "d, won = first - second,", "d, won = second - first,", POINTS),
            ("no margin", "binary(d - margin, won)", "binary(d, won)", TERMS),
            ("the margin is given, not asked for", "binary(d - margin, won)", "binary(d + margin, won)", TERMS),
            (
                "the margin is the first answer's, whoever wins",
                "binary(d + margin, 1 - won)",
                "binary(d - margin, 1 - won)",
                (WINNER, TERMS),
            ),
            (
                "labels are all certain",
                "confidence * binary(d - margin, won) + (1 - confidence) * binary(d + margin, 1 - won)",
                "binary(d - margin, won)",
                TERMS,
            ),
            (
                "labels upside down",
                "confidence * binary(d - margin, won) + (1 - confidence) *",
                "(1 - confidence) * binary(d - margin, won) + confidence *",
                TERMS,
            ),
            ("centred on the difference", "centre * (first + second) ** 2", "centre * (first - second) ** 2", TERMS),
            ("centred by its size", "centre * (first + second) ** 2", "centre * (first + second).abs()", TERMS),
            ("centring pushes away", "loss + centre *", "loss - centre *", TERMS),
            ("no centring", "loss + centre * (first + second) ** 2", "loss", TERMS),
            # binary, rank, steps
            ("good is bad", "(reward, good.to(reward.dtype)", "(-reward, good.to(reward.dtype)", GOOD),
            ("the worst first", "r.flip(1).logcumsumexp(1).flip(1)", "r.logcumsumexp(1)", ORDERS),
            (
                "each place is won against those before, too",
                "rest = r.flip(1).logcumsumexp(1).flip(1)",
                "rest = r.logsumexp(1, keepdim=True).expand_as(r)",
                ORDERS,
            ),
            ("only the first place counts", "((rest - r) * answers).sum(1)", "((rest - r) * answers)[:, 0]", ORDERS),
            ("sum, not log of a sum of exponentials", "logcumsumexp", "cumsum", ORDERS),
            ("absent answers compete", "r = rewards.masked_fill(~answers, -1e9)", "r = rewards", UNEQUAL),
            ("absent answers are infinitely bad", "~answers, -1e9)", "~answers, -math.inf)", UNEQUAL),
            (
                "pairs of a list: the worse wins",
                "r[:, :, None] - r[:, None, :]",
                "r[:, None, :] - r[:, :, None]",
                PAIRS,
            ),
            ("pairs of a list: their sum", " / pairs.sum((1, 2))", "", PAIRS),
            ("pairs of a list: each answer with itself, too", ".triu(1)", ".triu(0)", PAIRS),
            ("pairs of a list: of neighbours", ".triu(1)", ".triu(1).tril(1)", PAIRS),
            ("pairs of a list: with one that is not there", ":, None] & answers", ":, None] | answers", PAIRS),
            (
                "pairs of a list: what is not there is read",
                "r = rewards.masked_fill(~answers, 0.0)",
                "r = rewards",
                PAIRS,
            ),
            (
                "--rank-loss is not looked at",
                'all_pairs if args.rank_loss == "pairwise" else plackett_luce',
                "plackett_luce",
                f"{LOSSES}[rank pairwise]",
            ),
            (
                "every token is a step",
                "binary(rewards[steps >= 0], steps[steps >= 0])",
                "binary(rewards.flatten(), steps.flatten().clamp(0))",
                ENDS,
            ),
            ("steps that are wrong are right", "steps[steps >= 0])\n", "(steps[steps >= 0] >= 0))\n", ENDS),
            # distances
            ("not centred", "y.double().flatten() - y.double().mean()", "y.double().flatten()", PEARSON),
            ("a covariance", " / (x.norm() * y.norm()).clamp_min(1e-12)", "", PEARSON),
            ("what does not vary gives NaN", ".clamp_min(1e-12)", "", PEARSON),
            (
                "EPIC without the canonical reward",
                "x.double() - x.double().mean(1, keepdim=True) for",
                "x.double() for",
                EPIC,
            ),
            ("EPIC centred over all prompts", "x.double().mean(1, keepdim=True) for", "x.double().mean() for", EPIC),
            ("EPIC without its half", "1 - pearson(first, second)) / 2)", "1 - pearson(first, second)))", EPIC),
            (
                "EPIC squared",
                "return math.sqrt(max(0.0, 1 - pearson(first, second)) / 2)",
                "return max(0.0, 1 - pearson(first, second)) / 2",
                EPIC,
            ),
            # the losses of a batch
            ("margins of steps without their labels", "* (2 * right - 1)", "* 1", MET),
            ("margins of good without their labels", "rewards[:, 0] * (2 * labels - 1)", "rewards[:, 0]", MET),
            ("no smoothing", "args.label_smoothing + (1 - 2 * args.label_smoothing) * labels", "labels", LOSSES),
            ("smoothing counts once", "(1 - 2 * args.label_smoothing)", "(1 - args.label_smoothing)", LOSSES),
            ("margins of smooth labels", "rewards[:, 0] * (2 * labels - 1)", "rewards[:, 0] * (2 * smooth - 1)", MET),
            (
                "a row of padding is a comparison",
                "there = batch.answers[:, 0]",
                "there = batch.answers[:, 0] >= 0",
                LOSSES,
            ),
            (
                "answers of an example far from each other",
                ".view_as(batch.answers)",
                ".view(batch.answers.shape[::-1]).T",
                LOSSES,
            ),
            (
                "the margin of a comparison is that of the label",
                "args.margin, args.centre), rewards[:, 0] - rewards[:, 1]",
                "args.margin, args.centre), rewards[:, 0] - rewards[:, 1] - args.margin",
                LOSSES,
            ),
            # data
            ("R6: earlier answers are judged, too", "[0] * start + mask[start:end]", "mask[:end]", SHARED),
            ("the line break after the end belongs to the answer", "mask) if said) + 1", "mask)) + 1", SHARED),
            ("the end of the turn is cut off", "mask) if said) + 1", "mask) if said)", SHARED),
            (
                "a step ends with the next one's first token",
                "rows[-1].input_ids])) - 1",
                "rows[-1].input_ids]))",
                STEPS,
            ),
            ("steps run together", '"\\n".join(row["completions"]', '"".join(row["completions"]', STEPS),
            ("too long by one", "example.rows)) > max_length", "example.rows)) > max_length + 1", LONG),
            (
                "the first row decides",
                "longest := max(len(row.input_ids) for row in example.rows)",
                "longest := len(example.rows[0].input_ids)",
                LONG,
            ),
            (
                "cut from the left, the prompt first",
                "chat.Row(ids[:max_length], mask[:max_length])",
                "chat.Row(ids[-max_length:], mask[-max_length:])",
                LONG,
            ),
            ("dropped rows stay", '            if too_long == "drop":\n                continue\n', "", LONG),
            (
                "R5: equal answers are compared",
                "if len({tuple(row.input_ids) for row in rows}) < len(rows):",
                "if False:",
                SAME,
            ),
            ("R5: only where all are equal", "in rows}) < len(rows):", "in rows}) == 1:", SAME),
            (
                "a prompt without an answer is compared",
                "if not all(any(row.completion_mask) for row in rows) or",
                "if",
                SAME,
            ),
            ("steps beyond the end", "in example.steps if end < max_length)", "in example.steps)", SAME),
            (
                "AI labels are certain after cutting",
                "yield Example(rows, example.label, steps)",
                "yield Example(rows, 1.0, steps)",
                SAME,
            ),
            ("every place holds an answer", "answers[b, k] = True", "answers[b] = True", COLLATE),
            ("an example is one term, steps or not", "sum(len(example.steps) or 1 for", "sum(1 for", COLLATE),
            (
                "good: at all events better than nothing",
                "prefers_first(manners.utility(answer, asker, name), 0.0)",
                "prefers_first(manners.utility(answer, asker, name), 1.0)",
                COIN,
            ),
            (
                "ranked without noise",
                "-manners.utility(answer, asker, name) - noise[answer]",
                "-manners.utility(answer, asker, name)",
                FOUR,
            ),
            ("ranked by the noise of a place in a set", "in sorted(answers)}", "in list(answers)}", NOISE),
            ("ranked by noise of another law", "-math.log(-math.log(rng.random()))", "3 * rng.gauss(0, 1)", FOUR),
            ("ranked from bad to good", "sorted(first, reverse=True)", "sorted(first)", SORTED),
            ("of equal scores the last", "dict(reversed([*zip(row", "dict(([*zip(row", TIES),
            ("rows of equal scores are ranked", 'if len(set(row["scores"])) > 1]', "]", TIES),
            (
                "what is measured is trained on",
                "args.eval_data, partial(file_rows, args, loop), loop.say)\n",
                "args.eval_data, partial(file_rows, args, loop), loop.say)\n        rows = rows + held_out\n",
                ONCE,
            ),
            ("--eval-data is not read", "split([args.data], args.eval_data,", "split([args.data], None,", ONCE),
            (
                "the AI labels the test as well",
                "rows = ai_labels(model, tokenizer, rows, args, loop) if args.labels",
                "rows = held_out = ai_labels(model, tokenizer, rows, args, loop) if args.labels",
                BY_AI,
            ),
            (
                "what the AI labels is measured",
                "list(manners.preferences(args.pairs, args.seed)), args",
                'list(manners.preferences(args.pairs, args.seed, "test")), args',
                f"{NEVER}[flags4]",
            ),
            ("sums of the training are measured", '"test", 200, 8)', '"train", 200, 8)', f"{NEVER}[flags3]"),
            (
                "what is trained on is measured",
                "enumerate(manners.preferences(args.pairs, args.seed)):",
                'enumerate(manners.preferences(args.pairs, args.seed, "test")):',
                f"{NEVER}[flags0]",
            ),
            # AI feedback
            ("a question beyond the judge's context", "> model.context:", "> 10**9:", AT_ONCE),
            ("a prefix of the judge takes no room", "> model.context:", "> model.config.max_length:", AT_ONCE),
            ("--micro-batch-size: not of questions", "args.micro_batch_size if args.model else 256", "256", AT_ONCE),
            (
                "the tiny judge reads few questions",
                "micro_batch_size if args.model else 256",
                "micro_batch_size",
                AT_ONCE,
            ),
            ("all questions at once", "some = order[start : start + rows_at_once]", "some = order", AT_ONCE),
            ("--micro-batch-size: not of --judge", '("A", "B"), args.micro_batch_size,', '("A", "B"), 256,', JUDGE),
            ("exact ties are written", 'for row in labelled if row["confidence"] > 0.5]', "for row in labelled]", AI),
            ("exact ties are left out in silence", "if len(decided) < len(labelled):", "if False:", AI),
            ("rules that nobody can check", "if not rules or (odd :=", "if not rules and (odd :=", UNKNOWN),
            ("no rules at all are kept", "if not rules or (odd :=", "if (odd :=", UNKNOWN),
            (
                "a rule of no weight is one",
                "in read_constitution(args) if weight]",
                "in read_constitution(args)]",
                CHANGE,
            ),
            ("the last column is the last token", "batch.completion_mask.sum(1) - 1]", "-1]", ODDS),
            ("odds in another order", "found[some] = (last", "found[start : start + len(some)] = (last", ODDS),
            (
                "no minus yes",
                "model.head.weight[yes].float() - model.head.weight[no].float()",
                "model.head.weight[no].float() - model.head.weight[yes].float()",
                ODDS,
            ),
            (
                "the judge takes another model's --chat-format",
                "        if not its_tokenizer.chat_format:  # else",
                "        if True:  # else",
                "test_a_judge_that_prefers_a_place_says_nothing",
            ),
            (
                "the judge ignores --chat-format",
                "        if not its_tokenizer.chat_format:  # else",
                "        if False:  # else",
                "test_a_judge_that_prefers_a_place_says_nothing",
            ),
            (
                "--centre of what is no comparison",
                "(args.margin or args.centre is not None)",
                "args.margin",
                "test_bad_flags_are_one_line_and_exit_2",
            ),
            (
                "--out in a file is found out at the end",
                "if any(path.is_file() for path in (loop.out, *loop.out.parents)):",
                "if loop.out.is_file():",
                "test_bad_flags_are_one_line_and_exit_2",
            ),
            ("odds are rounded under autocast", "loop.device.type, enabled=False", "loop.device.type", ODDS),
            ("a prefix takes no room", "model.context - max(", "model.config.max_length - max(", ODDS),
            ("samples run out of the context", "max(map(len, prompts))) < new", "max(map(len, prompts))) < 0", ODDS),
            ("opinions in log-odds", '("yes", "no"), at_once, loop).sigmoid()', '("yes", "no"), at_once, loop)', AI),
            ("the constitution without weights", "sum(p * weight for", "sum(p for", AI),
            (
                "b over a",
                "worth(yes[a], rules), worth(yes[b], rules)",
                "worth(yes[b], rules), worth(yes[a], rules)",
                AI,
            ),
            (
                "a confidence that overflows",
                "manners.prefers_first(worth(yes[a], rules), worth(yes[b], rules))",
                "1 / (1 + math.exp(worth(yes[b], rules) - worth(yes[a], rules)))",
                AI,
            ),
            (
                "labels are not turned round",
                '("chosen", "rejected") if p >= 0.5 else ("rejected", "chosen")',
                '("chosen", "rejected")',
                AI,
            ),
            ("hard labels", '"confidence": max(p, 1 - p)', '"confidence": 1.0', AI),
            (
                "agreement with the annotator's coin",
                '(p > 0.5) == (row["utility_chosen"] > row["utility_rejected"])',
                "(p > 0.5)",
                AI,
            ),
            ("ties are judged", "abs(p - 0.5) >= 0.05 and", "", AI),
            ("no ties", "abs(p - 0.5) < 0.05 for p", "p == 0.5 for p", AI),
            (
                "the judge is asked in one order",
                "for x, y in ((a, b), (b, a))]",
                "for x, y in ((a, b), (a, b))]",
                JUDGE,
            ),
            ("position bias stays", "((first + 1 - second) / 2)", "first", JUDGE),
            ("the second order is not turned round", "(first + 1 - second) / 2", "(first + second) / 2", JUDGE),
            (
                "the judge reads the last message only",
                'text_of(row["prompt"], whole=True)',
                'text_of(row["prompt"])',
                JUDGE,
            ),
            (
                "infinite weights",
                "math.isfinite(weight) for text, weight in rules",
                "True for text, weight in rules",
                RULES,
            ),
            ("a constitution without questions", "if not rules or not all(", "if not all(", RULES),
            ("no sentence goes", "if len(answers[i]) > 1 and at < len(answers[i])]", "if False]", REVISE),
            (
                "every round draws the same",
                "prompts, final, args.seed + turn + 1)",
                "prompts, final, args.seed + 1)",
                REVISE,
            ),
            ("an answer may say nothing", "if len(answers[i]) > 1 and at <", "if at <", CHANGE),
            ("two sentences go", "answers[i][at + 1 :]) for", "answers[i][at + 2 :]) for", CHANGE),
            ("nothing is added", "return more + [", "return [", REVISE),
            (
                "the last change that helps is made",
                "if score > max(scores[i], needed[i]):",
                "if score > needed[i]:",
                CHANGE,
            ),
            ("any gain will do", "needed = [score + 0.25 for", "needed = [score for", CHANGE),
            ("added where it was not written", "[:1] + answers[i][at:])", "[:1] + answers[i])", CHANGE),
            ("whole continuations are put in", "tokenizer))[:1] +", "tokenizer)) +", CHANGE),
            (
                "the model revises its drafts alone",
                "prompts, final, args.seed + turn",
                "prompts, drafts, args.seed + turn",
                CHANGE,
            ),
            ("scores of the drafts stay", "final[i], scores[i] = sentences, score", "final[i] = sentences", CHANGE),
            ("what stayed is written, too", "enumerate(drafts) if final[i] != draft]", "enumerate(drafts)]", CHANGE),
            (
                "the model that answers judges",
                "opinions(judge, tokenizer, sorted",
                "opinions(model, tokenizer, sorted",
                REVISE,
            ),
            (
                "the model that is to learn labels",
                "opinions(judge, tokenizer, (answer",
                "opinions(model, tokenizer, (answer",
                AI,
            ),
            (
                "the tiny world's judge is the SFT model",
                "return model if args.model else",
                "return model if model else",
                STAGE,
            ),
            ("a model of one's own is not asked", "return model if args.model else", "return", STAGE),
            ("rude is good", "*who) == is_wanted)", "*who))", REVISE),
            ("one rule is enough", "[min(row) for row in zip([1.0] *", "[max(row) for row in zip([0.0] *", REVISE),
            # process supervision
            ("all four must arrive", "right[p, *ids] = any(world", "right[p, *ids] = all(world", ENDINGS),
            (
                "the checker labels what is trained on",
                'if split == "train":\n        exact',
                "if False:\n        exact",
                ENDINGS,
            ),
            (
                "a step ends a token early",
                "(start + len(part) - 2, right[part])",
                "(start + len(part) - 3, right[part])",
                ENDINGS,
            ),
            (
                "an answer that begins well is right",
                "for p, *ids in {some[-1] for some in parts}:",
                "for p, *ids in ():",
                CHECKER,
            ),
            (
                "endings forget what stands before them",
                "chat.completion_text(ids + ending, tokenizer)",
                "chat.completion_text(ending, tokenizer)",
                ENDINGS,
            ),
            ("min is max", '("min", min)', '("min", max)', BEST),
            ("a sum for the product", '("product", math.prod)', '("product", sum)', BEST),
            ("the first for the last", "lambda sure: sure[-1]", "lambda sure: sure[0]", BEST),
            ("the worst of eight", "best = [max(range", "best = [min(range", BEST),
            (
                "a product of rewards, not of probabilities",
                "ranks = [total([1 / (1 + math.exp(-r)) for r in values])",
                "ranks = [total(values)",
                BEST,
            ),
            ("a vote for the first", ".most_common(1)[0][0]", ".most_common()[-1][0]", BEST),
            # the measurement
            (
                "scores in the order of their lengths",
                "in zip(places, values",
                "in zip(range(start, start + len(places)), values",
                SCORES,
            ),
            (
                "neighbours only",
                "for a, b in combinations(rewards, 2)]",
                "for a, b in zip(rewards, rewards[1:])]",
                MARGINS,
            ),
            ("what is bad is good", "[rewards[0] * (2 * example.label - 1)]", "[rewards[0]]", MARGINS),
            ("sure of the contrary", "math.exp(-abs(margin))", "math.exp(-margin)", CALIBRATION),
            (
                "the last bucket is open",
                "min(4, int(10 * says) - 5)",
                "int(10 * says) - 5 if says < 1 else 3",
                CALIBRATION,
            ),
            ("ties are right", "(m > 0) + 0.5 * (m == 0)", "(m >= 0) + 0.0", CEILING),
            ("pairs that do not differ", "if a != b]", "if a == b]", CEILING),
            ("length as the reward", "[pearson(reward, length)]", "[pearson(length, length)]", CEILING),
            (
                "the ceiling of another coin",
                'manners.best_accuracy(test["pairs"])',
                'manners.best_accuracy(test["pairs"][:100])',
                CEILING,
            ),
            # the run
            (
                "the mean of each micro-batch",
                "loss = losses.sum() / n\n",
                "loss = losses.mean() * len(losses) / batch.n\n",
                SPLIT,
            ),
            ("accuracy of the last micro-batch", "sums += torch.stack", "sums = torch.stack", SPLIT),
            ("gradients not clipped", "grad_norm = clip(model, args.grad_clip)", "grad_norm = clip(model, 0.0)", PLAIN),
            ("another head at each start", "    loop.seed(0)  # the head", "    torch.rand(1)  # the head", PLAIN),
            (
                "pairs of this rank alone",
                "n = loop.sum_over_ranks(sum(batch.n for batch in batches))",
                "n = sum(batch.n for batch in batches)",
                RANKS,
            ),
            (
                "accuracy of this rank alone",
                "loss, accuracy, margin = loop.sum_over_ranks(sums)",
                "loss, accuracy, margin = sums",
                RANKS,
            ),
            ("nothing is restored", "extra = loop.restore(model, optimizer)", "extra = loop.restore()", RESUME),
            ("what was measured before is measured again", 'extra.get("before") or evaluate', "evaluate", RESUME),
            (
                "no autocast",
                "            with loop.autocast():\n                losses,",
                "            with torch.enable_grad():\n                losses,",
                DTYPE,
            ),
            (
                "compiled runs see every length",
                "in some], loop.device, 64 if loop.compiled else 1)",
                "in some], loop.device)",
                DTYPE,
            ),
            (
                "compiled runs are measured at every length",
                "in places], loop.device, 64 if loop.compiled else 1)",
                "in places], loop.device)",
                DTYPE,
            ),
            (
                "compiled runs judge at every length",
                "collate(rows, loop.device, 64 if loop.compiled else 1)",
                "collate(rows, loop.device)",
                DTYPE,
            ),
            ("defaults of the tiny model for all", "DEFAULTS, args.model is not None)", "DEFAULTS, 0)", DEFAULTS),
            ("--steps 0 trains an epoch", "args.steps if args.steps is not None else", "args.steps or", NONE),
            (
                "labels may be smoothed upside down",
                "args.label_smoothing >= 0.5,",
                "args.label_smoothing > 0.5,",
                FLAGS,
            ),
            ("steps are looked at once", '3.0 if args.feedback == "steps" else 1.0', "1.0", DEFAULTS),
            ("--epochs is overruled", "if args.epochs is None:", "if True:", DEFAULTS),
            ("nothing left to train on", "if not rows or not test", "if not test", DROPPED),
            ("a list of one is ranked", 'any(len(row["scores"]) < 2', 'any(len(row["scores"]) < 1', ROWS),
            (
                "measured rows are dropped in silence",
                "args.too_long, counts))\n        for kind, n in counts.items():",
                "args.too_long, counts))\n        for kind, n in ():",
                DROPPED,
            ),
            ("--revise reads no --judge", '(args.labels == "ai" or args.feedback != "comparison"),', "False,", FLAGS),
            (
                "--revise reads no --feedback",
                '(args.labels == "ai" or args.feedback != "comparison"),',
                '(args.labels == "ai"),',
                FLAGS,
            ),
            ("--rank-loss of what is no list", 'args.feedback != "rank" and args.rank_loss,', "False,", FLAGS),
            (
                "lists are always of a stage",
                '    if args.feedback == "rank":  # elsewhere',
                "    if True:  #",
                DEFAULTS,
            ),
            (
                "dropped in silence",
                '        loop.say(f"--max-length {args.max_length}: {n} rows {kind}")',
                "        pass",
                DROPPED,
            ),
        ],
        "model.py": [
            (
                "a scalar head under another name",
                '"score.weight" if config.labels and',
                '"lm_head.weight" if config.labels and',
                PARITY,
            ),
            (
                "a scalar head is saved as a language model",
                'architecture = architecture.replace("ForCausalLM", SCALAR)',
                "pass",
                PARITY,
            ),
            ("labels without names", 'config |= {"id2label"', '_ = {"id2label"', PARITY),
            (
                "a reward model stays tied",
                'c.get("tie_word_embeddings", False)) and not scalar',
                'c.get("tie_word_embeddings", False))',
                PARITY,
            ),
            ("padding hides the end", "if eos and tokenizer.pad_id in tokenizer.eos_ids:", "if False:", SAVED),
            ("no padding is ever saved", "if eos and tokenizer.pad_id in tokenizer.eos_ids:", "if eos:", SAVED),
            ("a head of any kind will do", "if labels is not None and config.labels != labels:", "if False:", KINDS),
            ("two labels are one", 'c.get("num_labels") or 2)', 'c.get("num_labels") or 1)', KINDS),
            ("the number of labels is not read", 'len(c.get("id2label") or range', "len(range", KINDS),
            ("a head as wide as the vocabulary", "config.labels or config.vocab_size", "config.vocab_size", HEAD),
        ],
    }.items()
    for name, old, new, test in group
]
