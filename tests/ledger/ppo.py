"""Planted bugs of ppo.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_ppo.py::"
LAST = "test_rewards_stand_at_the_last_token"
GAE = "test_gae_is_a_double_sum"
ENDS = "test_gae_at_its_ends"
POISON = "test_masked_positions_are_poisoned"
WHITE = "test_whitening_is_over_real_tokens"
SCALED = "test_rewards_are_scaled_clipped_and_withheld"
REFRESHED = "test_rewards_keep_their_scale_when_the_reward_model_learns"
PLAIN_LESSON = "test_a_lesson_is_a_plain_loop"
BRUTE = "test_losses_by_brute_force"
TABLE = "test_gradients_of_the_clips"
STEER = "test_the_controller_steers_to_its_target"
BANDIT = "test_a_bandit_rests_at_the_closed_form"
BEFORE = "test_values_are_of_the_state_before_the_token"
LOOP = "test_a_run_is_a_plain_loop"
SPLIT = "test_splitting_a_batch_changes_nothing[own]"
SHAPES = "test_graphs_are_for_all_shapes_and_the_reference_is_kept_in_dtype"
RANKS = "test_two_ranks_are_one_batch"
RESUME = "test_resuming_is_exact"
STAYS = "test_the_judge_is_the_start_and_does_not_learn"
ASKED = "test_the_tiny_worlds_judge_is_asked"
LESSON = "test_the_reward_model_learns_from_new_answers"
TEACH = "test_two_ranks_teach_one_model"
OWN = "test_a_function_of_the_users_sees_its_columns_and_is_the_metric"
OTHER = "test_a_reward_model_of_another_tokenizer_is_refused"
FILES = "test_rows_are_held_out_of_one_file_only"
WORST = "test_what_is_cut_off_is_never_worth_more"
RATES = "test_imitation_learns_at_the_rates_of_an_adapter"

MUTANTS = [
    Mutant(name, "ppo.py", old, new, TESTS + test)
    for name, old, new, test in [
        ("P14: the penalty is not given", "return torch.where(finished, reward, eos_penalty)", "return reward", SCALED),
        (
            "P16: the penalty is given to what ended",
            "torch.where(finished, reward, eos",
            "torch.where(~finished, reward, eos",
            SCALED,
        ),
        ("rewards are not centred", "(scores - mean) / std\n", "scores / std\n", SCALED),
        ("rewards are not divided", "(scores - mean) / std\n", "(scores - mean)\n", SCALED),
        ("rewards are not clipped", "reward.clamp(-clip_at, clip_at) if clip_at else reward", "reward", SCALED),
        (
            "a clip of 0 leaves nothing",
            "reward.clamp(-clip_at, clip_at) if clip_at else reward",
            "reward.clamp(-clip_at, clip_at)",
            SCALED,
        ),
        (
            "P1: the reward at the first token",
            "is_last = completion_mask.flip(-1).cumsum(-1).flip(-1) * completion_mask == 1",
            "is_last = completion_mask.cumsum(-1) * completion_mask == 1",
            LAST,
        ),
        (
            "P1: the reward at every token",
            "torch.where(is_last, reward[:, None], 0.0)",
            "reward[:, None] * completion_mask",
            LAST,
        ),
        (
            "P1: the reward behind the last token",
            "torch.where(is_last, reward[:, None], 0.0)",
            "torch.where(is_last.roll(1, -1), reward[:, None], 0.0)",
            LAST,
        ),
        ("P7: the KL is a bonus", "return -kl_coef * kl +", "return kl_coef * kl +", LAST),
        ("P7: the KL twice", "return -kl_coef * kl +", "return -2 * kl_coef * kl +", BANDIT),
        ("no KL in the reward", "return -kl_coef * kl +", "return 0 * kl +", BANDIT),
        (
            "the KL is not masked",
            "kl = (old_logps - ref_logps).masked_fill(completion_mask == 0, 0.0)",
            "kl = old_logps - ref_logps",
            LAST,
        ),
        (
            "P4: no next value",
            "rewards[:, t] + gamma * next_value - values[:, t]",
            "rewards[:, t] - values[:, t]",
            f"{GAE}[1.0-0.95]",
        ),
        (
            "P4: the next value is not discounted",
            "rewards[:, t] + gamma * next_value",
            "rewards[:, t] + next_value",
            f"{GAE}[0.9-0.8]",
        ),
        (
            "P4: its own value is not taken off",
            "gamma * next_value - values[:, t]",
            "gamma * next_value",
            f"{GAE}[1.0-0.95]",
        ),
        ("P4: no gamma in the sum", "delta + gamma * lam * following", "delta + lam * following", f"{GAE}[0.9-0.8]"),
        ("P4: no lambda", "delta + gamma * lam * following", "delta + gamma * following", f"{GAE}[1.0-0.95]"),
        (
            "P4: from the left",
            "for t in reversed(range(values.shape[1])):",
            "for t in range(values.shape[1]):",
            f"{GAE}[1.0-0.95]",
        ),
        (
            "P5: returns are the advantages",
            "(advantages + values).masked_fill(~real, 0.0)",
            "advantages.masked_fill(~real, 0.0)",
            f"{GAE}[1.0-0.95]",
        ),
        ("values of the padding are next values", "values.masked_fill(~real, 0.0)\n", "values\n", f"{GAE}[1.0-0.95]"),
        (
            "P2: whitened with the pads",
            "real = x[completion_mask.bool()]  #",
            "real = x.flatten()  #",
            WHITE,
        ),
        (
            "float64 on the device",
            "real = x[completion_mask.bool()]  #",
            "real = x[completion_mask.bool()].double()  #",
            "test_advantages_need_no_float64",
        ),
        (
            "a rule's reward is clipped, too",
            "5.0 if args.reward in LEARNED else 0.0",
            "5.0",
            SCALED,
        ),
        ("the mean stays", "white = (x - total / n) *", "white = x *", WHITE),
        ("divided by the variance", "+ 1e-8).rsqrt()", "+ 1e-8).reciprocal()", WHITE),
        (
            "whitened on each rank alone",
            "squares = loop.sum_over_ranks((real - total / n).square().sum())",
            "squares = 2 * (real - total / n).square().sum()",
            RANKS,
        ),
        ("P10: max, not min", "return torch.min(ratio * adv", "return torch.max(ratio * adv", TABLE),
        ("the policy's sign", "return -clipped_surrogate(", "return clipped_surrogate(", TABLE),
        (
            "the policy is not clipped",
            "ratio.clamp(1 - clip_low, 1 + clip_high) * advantages",
            "ratio * advantages",
            TABLE,
        ),
        (
            "a clip of 0 clips all",
            "clip_eps = clip_eps or math.inf",
            "pass",
            BRUTE,
        ),
        (
            "the ratio upside down",
            "(logps - old_logps).masked_fill(dead",
            "(old_logps - logps).masked_fill(dead",
            BRUTE,
        ),
        (
            "the ratio is not masked",
            "(logps - old_logps).masked_fill(dead, 0.0).exp()",
            "(logps - old_logps).exp()",
            POISON,
        ),
        (
            "advantages are not masked",
            "advantages = (logps - old_logps).masked_fill(dead, 0.0).exp(), advantages.masked_fill(dead, 0.0)",
            "advantages = (logps - old_logps).masked_fill(dead, 0.0).exp(), advantages",
            POISON,
        ),
        ("the clipped term has no advantage", "1 + clip_high) * advantages)", "1 + clip_high))", TABLE),
        ("P11: min, not max", "0.5 * torch.max((values - returns)", "0.5 * torch.min((values - returns)", TABLE),
        ("the value loss is not halved", "return 0.5 * torch.max((values", "return torch.max((values", BRUTE),
        (
            "values are clipped around the returns",
            "near = old_values + (values - old_values)",
            "near = returns + (values - old_values)",
            BRUTE,
        ),
        (
            "values are not clipped",
            ".clamp(-value_clip, value_clip) if value_clip else values",
            " if value_clip else values",
            TABLE,
        ),
        ("the controller runs away from its target", "kl / target - 1", "1 - kl / target", STEER),
        ("the controller is not bounded", "max(-0.2, min(0.2, kl / target - 1))", "(kl / target - 1)", STEER),
        ("the controller jumps", "(1 + 0.1 * max", "(1 + max", STEER),
        (
            "P13: the critic sees the token that it values",
            "else (critic.hidden_before(ids), critic.head)",
            "else (critic.hidden(ids), critic.head)",
            f"{BEFORE}[own]",
        ),
        (
            "P13: the shared critic sees the token",
            "(hidden, critic) if of_shared",
            "(model.hidden(ids), critic) if of_shared",
            f"{BEFORE}[shared]",
        ),
        (
            "values in bf16",
            "values = (trunk * value_head.weight).sum(-1).float()",
            "values = nn.functional.linear(trunk, value_head.weight)[..., 0].float()",
            "test_values_are_not_rounded",
        ),
        (
            "the critic is the reward model before its lesson",
            """        lesson(reward_model, model, judge, own, tokenizer, 0, args, loop)
    loop.seed(0)  # the critic's head is the same whatever was drawn before it
    critic = new_critic(model, reward_model if args.reward == "model" else None, args.critic)
""",
            """        critic = new_critic(model, reward_model, args.critic)
        lesson(reward_model, model, judge, own, tokenizer, 0, args, loop)
    else:
        critic = new_critic(model, reward_model if args.reward == "model" else None, args.critic)
""",
            "test_the_critic_begins_as_the_reward_model_that_pays",
        ),
        (
            "P17: a large head",
            "std=(model.config.width + 1) ** -0.5)\n    return head",
            "std=1.0)\n    return head",
            f"{BEFORE}[shared]",
        ),
        (
            "values of the prompt are left",
            "values.masked_fill(mask == 0, 0.0)\n\n\ndef new",
            "values\n\n\ndef new",
            f"{BEFORE}[own]",
        ),
        (
            "the critic begins as the policy",
            "with_scalar_head(reward_model or model)",
            "with_scalar_head(model)",
            "test_an_own_critic_begins_as_the_reward_model",
        ),
        (
            "scored at temperature 1",
            "score(model, ids[rows], mask[rows], tokenizer, temperature, critic)",
            "score(model, ids[rows], mask[rows], tokenizer, 1.0, critic)",
            "test_what_was_sampled_is_scored_alike[0.7]",
        ),
        (
            "log-probs of the prompt are scored",
            "targets, hidden = ids.masked_fill(mask == 0, IGNORED), model",
            "targets, hidden = ids, model",
            "test_what_was_sampled_is_scored_alike[1.0]",
        ),
        (
            "rewards of other prompts",
            "rule(prompt_text(tasks[i // each]), text",
            "rule(prompt_text(tasks[i % len(tasks)]), text",
            "test_rules_and_utilities_are_paired_with_their_prompts",
        ),
        (
            "utilities of other requests",
            "rows = [tasks[i // each].row",
            "rows = [tasks[i % len(tasks)].row",
            "test_rules_and_utilities_are_paired_with_their_prompts",
        ),
        (
            "the worst of 4",
            ".view(-1, 4).argmax(-1)",
            ".view(-1, 4).argmin(-1)",
            "test_best_of_4_is_the_reward_models_choice",
        ),
        (
            "the best of 4 by its own worth",
            "return worth.gather(1, best[:, None].cpu()).mean().item()",
            "return worth.amax(1).mean().item()",
            "test_best_of_4_is_the_reward_models_choice",
        ),
        (
            "the lesson is upside down",
            "bradley_terry(*rewards.T, few",
            "bradley_terry(*rewards.T.flip(0), few",
            LESSON,
        ),
        (
            "the lesson's labels are of other pairs",
            "labels = better[start : start + size]",
            "labels = better[:size]",
            "test_a_lesson_is_a_plain_loop",
        ),
        ("ranks teach each its own reward model", "        loop.all_reduce(reward_model)\n", "", TEACH),
        (
            "a rank's lesson is divided by its own pairs",
            "n_pairs = loop.sum_over_ranks(len(labels))",
            "n_pairs = len(labels)",
            TEACH,
        ),
        (
            "all ranks toss the same coins",
            "range(len(tasks) * ranks)][loop.rank :: ranks]",
            "range(len(tasks))]",
            TEACH,
        ),
        (
            "a short lesson is none",
            "math.ceil(n_all / (size * ranks)), max",
            "n_all // (size * ranks), max",
            "test_a_short_lesson_is_one",
        ),
        (
            "a lesson of all rows at once",
            "max(1, args.micro_batch_size // 2)",
            "10**9",
            "test_splitting_what_is_taught_changes_nothing",
        ),
        (
            "a lesson on the first rows alone",
            "2 * (start % chunk + i)",
            "2 * (start % chunk)",
            "test_splitting_what_is_taught_changes_nothing",
        ),
        (
            "imitation of all rows at once",
            "for row in some[i : i + args.micro_batch_size]]",
            "for row in some]",
            "test_splitting_what_is_taught_changes_nothing",
        ),
        (
            "imitation: tokens of a part alone are counted",
            "sum(int(batch.completion_mask.sum()) for batch in batches))",
            "int(batches[0].completion_mask.sum()))",
            "test_splitting_what_is_taught_changes_nothing",
        ),
        ("ranks imitate each by itself", "        loop.all_reduce(model)\n", "", TEACH),
        (
            "all ranks imitate the same rows",
            "for i in range(64)][loop.rank :: loop.world_size]",
            "for i in range(64)][: 64 // loop.world_size]",
            TEACH,
        ),
        (
            "SFT unlearns",
            "loss = sft_loss(model, batch) / n_tokens",
            "loss = -sft_loss(model, batch) / n_tokens",
            "test_imitation_lowers_the_loss_of_its_rows",
        ),
        (
            "the tokenizer of the reward model is not looked at",
            'load_reward_model(args.reward_model or loop.require("reward"), tokenizer, loop.device)',
            'load(args.reward_model or loop.require("reward"), labels=1)[0].to(loop.device).eval()',
            OTHER,
        ),
        ("the annotator labels whoever is asked to", 'if args.judge == "ai":\n', 'if args.judge == "":\n', LESSON),
        ("the policy judges itself", "for x in opinions_of(judge,", "for x in opinions_of(model,", LESSON),
        ("the judge learns too", "frozen(judge_of(model, args, loop))", "judge_of(model, args, loop)", STAYS),
        ("the judge of lessons learns too", "judge = judge_of(ref_model,", "judge = judge_of(model,", STAYS),
        ("the judge is the start", "frozen(judge_of(model, args, loop))", "frozen(model)", ASKED),
        ("the judge of lessons is the start", "judge_of(ref_model, args, loop) if", "ref_model if", ASKED),
        (
            "the critic learns as fast as an adapter",
            "p.lr_times = 1 / times",
            "p.lr_times = 1.0",
            "test_an_adapter_learns_faster_than_the_critic",
        ),
        ("the reward model is not frozen again", "    reward_model.requires_grad_(False)\n", "", LESSON),
        (
            "P8: old log-probs are those of now",
            "policy_loss(logps, part.old_logps,",
            "policy_loss(logps, logps.detach(),",
            LOOP,
        ),
        ("advantages are not whitened", "        advantages = whitened(advantages, mask, loop)\n", "", LOOP),
        (
            "P5: returns of white advantages",
            "        advantages = whitened(advantages, mask, loop)\n",
            "        advantages = whitened(advantages, mask, loop)\n        returns = advantages + old_values\n",
            LOOP,
        ),
        ("vf_coef is not looked at", "args.vf_coef * value_losses", "value_losses", LOOP),
        (
            "gamma and lambda exchanged",
            "gae(rewards, old_values, mask, gamma=args.gamma, lam=args.lam)",
            "gae(rewards, old_values, mask, gamma=args.lam, lam=args.gamma)",
            LOOP,
        ),
        (
            "the mean over rows, not tokens",
            "n_tokens = max(1, loop.sum_over_ranks(int(mask[rows].sum())))",
            "n_tokens = len(rows)",
            LOOP,
        ),
        (
            "ranks count their own tokens",
            "n_tokens = max(1, loop.sum_over_ranks(int(mask[rows].sum())))",
            "n_tokens = int(mask[rows].sum())",
            RANKS,
        ),
        ("ranks do not share gradients", "            loop.all_reduce(both)\n", "", RANKS),
        (
            "the critic's gradients are not shared",
            "            loop.all_reduce(both)\n",
            "            loop.all_reduce(model)\n",
            RANKS,
        ),
        (
            "gradients pile up",
            "            optimizer.step()\n            optimizer.zero_grad()\n            update, updates",
            "            optimizer.step()\n            update, updates",
            LOOP,
        ),
        (
            "the learning rate is never set",
            "lr, begun = set_lr(optimizer, args, step), time",
            "lr, begun = args.lr, time",
            LOOP,
        ),
        (
            "the gradient of both is not clipped",
            "grad_norm = clip(both, args.grad_clip)",
            "grad_norm = clip(both, 0.0)",
            LOOP,
        ),
        (
            "the critic is not trained",
            'both = nn.ModuleDict({"policy": model, "critic": critic})',
            'both = nn.ModuleDict({"policy": model})',
            "test_the_reference_is_frozen_and_the_rest_moves",
        ),
        (
            "the reference is the policy",
            "    ref_model = frozen(model)\n    if not",
            "    ref_model = model\n    if not",
            LOOP,
        ),
        ("the reference is kept in fp32", "loop.narrow(ref_model)", "loop.narrow(frozen(model))", SHAPES),
        (
            "--judge ai of a rule",
            ' or args.judge == "ai"\n',
            "\n",
            "test_flags_that_do_not_go_together_are_refused",
        ),
        ("more minibatches than answers", "if args.minibatches > (n :=", "if 9 < (n :=", SHAPES),
        ("the divisor of a micro-batch", ".sum() / n_tokens).backward()", ".mean()).backward()", SPLIT),
        (
            "one pass",
            "for _ in range(args.passes))",
            "for _ in range(1))",
            "test_the_ratio_moves_after_the_first_pass_only",
        ),
        (
            "updates never stop",
            'if args.stop_kl and of_update["step_kl"] > args.stop_kl:',
            "if False:",
            "test_updates_stop_where_the_policy_has_gone_too_far",
        ),
        (
            "the policy learns in the critic's warm-up",
            "(losses if step > args.critic_warmup else 0.0)",
            "losses",
            "test_the_critic_may_learn_first",
        ),
        ("the critic does not come back", 'modules = {"critic": critic} |', "modules = {} |", f"{RESUME}[flags0]"),
        (
            "the controller does not come back",
            '"kl_coef": kl_coef}\n',
            '"kl_coef": args.kl_coef}\n',
            f"{RESUME}[flags1]",
        ),
        ("the reward model does not come back", '{"reward_model": reward_model} if', "{} if", f"{RESUME}[flags2]"),
        ("the start does not come back", '({"ref": ref_model} if args.sft_steps else {})', "{}", f"{RESUME}[flags3]"),
        (
            "the best of 4 is measured again",
            'baselines = extra.get("baselines", {})',
            "baselines = {}",
            f"{RESUME}[flags0]",
        ),
        (
            "a sampler that differs is not noticed",
            "if mismatch > 1e-3 and",
            "if mismatch > 1 and",
            "test_a_sampler_that_differs_fails_the_run",
        ),
        (
            "KL: the mean over tokens",
            "(now - then).tolist()",
            "((now - then) / found.completion_mask.sum(-1)).tolist()",
            "test_kl_is_the_log_ratio_of_whole_answers[1.0]",
        ),
        (
            "KL measured at the temperature of training",
            "found.completion_mask, tokenizer, 1.0, args, loop)",
            "found.completion_mask, tokenizer, args.temperature, args, loop)",
            "test_kl_is_the_log_ratio_of_whole_answers[0.5]",
        ),
        ("the loss of the last update", "(sums / updates).tolist()", "update.tolist()", LOOP),
        ("the loss is a sum over updates", "(sums / updates).tolist()", "sums.tolist()", LOOP),
        (
            "a graph for each shape",
            "loop.compile(model, dynamic=True)",
            "loop.compile(model)",
            SHAPES,
        ),
        (
            "no steps, no questions",
            "max(1, args.steps) * args.batch_size",
            "args.steps * args.batch_size",
            "test_no_steps_are_a_measurement",
        ),
        (
            "what is cut off is right where it is measured",
            " >= 1) & said.finished.to(loop.device)",
            " >= 1)",
            OWN,
        ),
        (
            "what is cut off is paid where it is measured",
            "paid = withheld(reward, ended, args.eos_penalty, loop)",
            "paid = reward",
            OWN,
        ),
        (
            "what is cut off is paid the penalty where it is measured, be the others below",
            "paid = withheld(reward, ended, args.eos_penalty, loop)",
            "paid = torch.where(ended, reward, args.eos_penalty)",
            OWN,
        ),
        (
            "P14: what is cut off is the best, be the others below",
            "            reward = withheld(reward, finished, args.eos_penalty, loop)\n",
            "            pass\n",
            OWN,
        ),
        (
            "P14: all get the least",
            "torch.where(finished, values, everybodys(",
            "torch.where(finished & False, values, everybodys(",
            WORST,
        ),
        (
            "P14: each rank has a least of its own",
            "everybodys(least[None], loop).amin().to(values.device)",
            "least",
            TEACH,
        ),
        ("P14: the least, be it above the penalty", ".amin().clamp(max=at_most)\n", ".amin()\n", WORST),
        ("P14: the least of what was cut off, too", "least = values.masked_fill(~finished, math.inf)", "least = values",
         WORST),
        ("P14: a learned reward's, too", "        if args.reward not in LEARNED:  # whose", "        if True:  # whose",
         LOOP),
        ("the user's function is measured by its ones", 'both[::-1] if ":" in args.reward else both', "both", OWN),
        (
            "columns of the user's are dropped",
            "formats.read_jsonl(path, schemas, mapping=mapping, keep=keep)",
            "formats.read_jsonl(path, schemas, mapping=mapping)",
            OWN,
        ),
        (
            "rows are held out though others are measured",
            "(files[args.data], files[args.eval_data]) if args.eval_data",
            "(formats.hold_out(files[args.data])[0], files[args.eval_data]) if args.eval_data",
            FILES,
        ),
        ("prompts of any length", "    check_length(train + test, args)\n", "    check_length(train, args)\n", FILES),
        (
            "answers that can never be right are accepted",
            "        checkers.check_answers(name, rows, path)",
            "        pass",
            "test_a_run_on_a_file",
        ),
        (
            "answers of --eval-data that can never be right are accepted",
            "itertools.product(needing, files.items()):",
            "itertools.product(needing, [*files.items()][:1]):",
            "test_a_run_on_a_file",
        ),
        (
            "a controller that multiplies 0",
            "(args.kl_target and not args.kl_coef,",
            "(False,",
            "test_flags_that_do_not_go_together_are_refused",
        ),
        ("the controller steers nothing", "mask, kl_coef=kl_coef)", "mask, kl_coef=args.kl_coef)", LOOP),
        (
            "the start is scored at temperature 1",
            "scored(ref_model, found.input_ids, mask, tokenizer, args.temperature,",
            "scored(ref_model, found.input_ids, mask, tokenizer, 1.0,",
            LOOP,
        ),
        ("updates score at temperature 1", "args.temperature, critic)  # fmt", "1.0, critic)  # fmt", LOOP),
        ("kl: upside down", '"kl": (batch.old_logps - ref_logps)', '"kl": (ref_logps - batch.old_logps)', LOOP),
        ("kl: the mean over tokens", "- ref_logps).sum(-1)", "- ref_logps).mean(-1)", LOOP),
        ("another step's samples", "(args.seed, step, loop.rank)", "(args.seed, 1, loop.rank)", LOOP),
        (
            "lessons of the test's requests",
            '("lesson", args.seed, i), "train", args)',
            '("lesson", args.seed, i), "test", args)',
            "test_the_critic_begins_as_the_reward_model_that_pays",
        ),
        (
            "the best of four that are one",
            '4, 1.0, (args.seed, "best of 4")',
            '4, 0.0, (args.seed, "best of 4")',
            "test_best_of_4_is_the_reward_models_choice",
        ),
        ("imitation at one rate", '        group["lr"] *= group["lr_times"]\n', "        pass\n", RATES),
        (
            "--sft-lr: the rate of full fine-tuning for an adapter",
            '{"sft_lr": rates_of({"lr": SFT_LR}, args.adapter)["lr"]}',
            '{"sft_lr": SFT_LR}',
            RATES,
        ),
        (
            "all answers are decoded at once",
            "rollout_batch=args.rollout_batch,",
            "rollout_batch=None,",
            "test_answers_are_decoded_as_many_at_a_time_as_asked",
        ),
        ("a2c clips", '"a2c": {"clip_eps": 0.0,', '"a2c": {"clip_eps": 0.2,', "test_a2c_is_one_pass_without_a_clip"),
        (
            "judge: its rewards keep their own scale",
            "    if args.reward not in LEARNED:\n        return {",
            '    if args.reward != "model":\n        return {',
            SCALED,
        ),
        (
            "--refresh-rm: the scale stays that of the old reward model",
            "            scale = scale_of(before, args)\n",
            "",
            REFRESHED,
        ),
        (
            "--refresh-rm: what is taken out is the policy's, not the start's",
            "evaluate(ref_model, None, reward_model, test",
            "evaluate(model, None, reward_model, test",
            REFRESHED,
        ),
        (
            "--refresh-rm compares answers of the start",
            "lesson(reward_model, model, judge, some,",
            "lesson(reward_model, ref_model, judge, some,",
            REFRESHED,
        ),
        ("a lesson does not centre", "few, 0.0, 0.01)", "few, 0.0, 0.0)", PLAIN_LESSON),
        ("a lesson without warm-up", "args.rm_lr * min(1, (n + 1) / 5) *", "args.rm_lr *", PLAIN_LESSON),
        ("a lesson without decay", " * (1 - n / total)", "", PLAIN_LESSON),
        ("a lesson of sums", ".sum() / n_pairs).backward()", ".sum()).backward()", PLAIN_LESSON),
        ("a lesson without clipping", "        clip(reward_model, 1.0)\n", "", PLAIN_LESSON),
        ("clip_fraction: one side", "((ratio < 1 - clip_low) | (ratio > 1 + clip_high))", "(ratio > 1 + clip_high)",
         "test_both_sides_are_beyond_the_clip"),
        ("unfinished are the finished", "1 - found.finished.float().mean(),", "found.finished.float().mean(),", LOOP),
        ("requests of the test are those of training", '("ppo test", i), "test", args)',
         '("ppo test", i), "train", args)', "test_what_is_measured_is_held_out"),
        ("training requests are those of the test", 'args.seed, i), "train", args), tokenizer',
         'args.seed, i), "test", args), tokenizer', "test_what_is_measured_is_held_out"),
    ]
] + [
    Mutant(name, "reward.py", old, new, TESTS + OTHER)
    for name, old, new in [
        (
            "any tokenizer of a reward model will do",
            "if own is None or not getattr(tokenizer, kind).items() <= getattr(own, kind).items():",
            "if own is None:",
        ),
        (
            "a reward model without a tokenizer will do",
            "if own is None or not getattr(tokenizer, kind)",
            "if own is not None and not getattr(tokenizer, kind)",
        ),
    ]
]
