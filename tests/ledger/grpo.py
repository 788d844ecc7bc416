"""Planted bugs of grpo.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_grpo.py::"
PAPER = "test_every_loss_is_that_of_its_paper"
POISON = "test_masked_positions_are_poisoned"
LOOP = "test_a_run_is_a_plain_loop[grpo]"
SPLIT = "test_splitting_a_batch_changes_nothing"
RANKS = "test_two_ranks_are_one_batch"
RESUME = "test_resuming_is_exact"
HAND = "test_advantages_by_hand"
GONE = "test_a_row_that_does_not_count_is_as_good_as_gone"
KL = "test_estimators_of_the_kl"
REWARDS = "test_rewards_are_paired_with_their_prompts"
TOOLS = "test_tools_are_called_and_masked"
DYNAMIC = "test_dynamic_sampling_takes_groups_with_spread"
WORST = "test_an_answer_that_is_cut_off_is_never_worth_more"
CUT = "test_what_is_cut_off_is_not_right"
OWN = "test_a_function_of_the_users_sees_its_columns_and_is_the_metric"
SINGLE = "test_advantages_need_no_float64"
MEAN = "test_the_loss_is_the_mean_over_updates"
STEPS = "test_no_steps_are_a_measurement"

MUTANTS = [
    Mutant(name, "grpo.py", old, new, tuple(TESTS + t for t in ((test,) if isinstance(test, str) else test)))
    for name, old, new, test in [
        # advantages
        (
            "moments: the mean counts rows that do not count",
            "torch.where(counted, reward, 0.0).sum(-1, keepdim=True) / n",
            "reward.sum(-1, keepdim=True) / n",
            f"{GONE}[centred]",
        ),
        (
            "moments: divided by the size of the group, not by what counts",
            "keepdim=True) / n.clamp(min=1)",
            "keepdim=True) / reward.shape[-1]",
            f"{GONE}[centred]",
        ),
        (
            "moments: the spread counts rows that do not count",
            "torch.where(counted, reward - mean, 0.0).square()",
            "(reward - mean).square()",
            f"{GONE}[standardized]",
        ),
        (
            "moments: the biased standard deviation",
            "(squares / (n - 1).clamp(min=1)).sqrt()",
            "(squares / n.clamp(min=1)).sqrt()",
            HAND,
        ),
        ("grpo: the variance, not its root", "(n - 1).clamp(min=1)).sqrt()", "(n - 1).clamp(min=1))", HAND),
        (
            "grpo: not divided by the spread",
            "(reward - mean) / (std + 1e-4), 0.0)\n\n\ndef centred",
            "(reward - mean), 0.0)\n\n\ndef centred",
            HAND,
        ),
        (
            "grpo: the mean is not taken off",
            "torch.where(counted, (reward - mean) / (std + 1e-4), 0.0)\n\n\ndef centred",
            "torch.where(counted, reward / (std + 1e-4), 0.0)\n\n\ndef centred",
            HAND,
        ),
        (
            "G1: grpo: normalised over the batch",
            "    _, mean, std = moments(reward, counted)\n",
            "    _, mean, std = moments(reward.flatten(), counted.flatten())\n",
            ("test_a_group_is_compared_with_itself_only", HAND),
        ),
        (
            "grpo: a row that does not count has an advantage",
            "    return torch.where(counted, (reward - mean) / (std + 1e-4), 0.0)\n\n\ndef centred",
            "    return (reward - mean) / (std + 1e-4)\n\n\ndef centred",
            f"{GONE}[standardized]",
        ),
        (
            "G25: grpo: divided by the mean",
            "(reward - mean) / (std + 1e-4), 0.0)\n\n\ndef centred",
            "(reward - mean) / (mean + 1e-4), 0.0)\n\n\ndef centred",
            "test_a_group_is_compared_with_itself_only",
        ),
        (
            "dr_grpo: the mean is not taken off",
            "torch.where(counted, reward - mean, 0.0)\n\n\ndef leave",
            "torch.where(counted, reward, 0.0)\n\n\ndef leave",
            HAND,
        ),
        (
            "G17: rloo: its own reward is in the baseline",
            "(reward - mean) * n / (n - 1).clamp(min=1), 0.0)",
            "reward - mean, 0.0)",
            "test_the_baseline_of_an_answer_does_not_hold_its_own_reward",
        ),
        (
            "rloo: the other way round",
            "(reward - mean) * n / (n - 1).clamp(min=1)",
            "(reward - mean) * (n - 1) / n.clamp(min=1)",
            HAND,
        ),
        ("reinforce++: of the group", "moments(reward.flatten(), counted.flatten())", "moments(reward, counted)", HAND),
        ("reinforce: no baseline", "reward - baseline, 0.0)", "reward, 0.0)", HAND),
        (
            "steps: standardized in each answer",
            "standardized(rewards.flatten(1), ends.flatten(1), 0.0)",
            "standardized(rewards, ends, 0.0)",
            "test_step_rewards_are_summed_to_the_end",
        ),
        (
            "steps: summed from the start",
            "return flat.flip(-1).cumsum(-1).flip(-1)",
            "return flat.cumsum(-1)",
            "test_step_rewards_are_summed_to_the_end",
        ),
        (
            "steps: not summed",
            "return flat.flip(-1).cumsum(-1).flip(-1)",
            "return flat",
            "test_step_rewards_are_summed_to_the_end",
        ),
        # ratios and terms
        (
            "the ratio upside down",
            "return (x.logps - x.old_logps).masked",
            "return (x.old_logps - x.logps).masked",
            (f"{PAPER}[grpo-k3]", "test_the_first_update_is_the_policy_gradient[grpo]"),
        ),
        (
            "the log ratio is not masked",
            "(x.logps - x.old_logps).masked_fill(x.completion_mask == 0, 0.0)",
            "x.logps - x.old_logps",
            (f"{PAPER}[gspo-k3]", f"{POISON}[gspo]"),
        ),
        (
            "grpo: the log ratio as the ratio",
            "    return log_ratio(x).exp()\n\n\ndef mean_ratio",
            "    return 1 + log_ratio(x)\n\n\ndef mean_ratio",
            f"{PAPER}[grpo-k3]",
        ),
        (
            "G16: gspo: the sum of logs",
            "(log_ratio(x).sum(-1, keepdim=True) / length).exp()",
            "log_ratio(x).sum(-1, keepdim=True).exp()",
            "test_gspo_is_blind_to_padding_and_takes_the_mean_of_logs",
        ),
        (
            "G16: gspo: the mean of ratios",
            "(log_ratio(x).sum(-1, keepdim=True) / length).exp()",
            "((log_ratio(x).exp() * x.completion_mask).sum(-1, keepdim=True) / length)",
            "test_gspo_is_blind_to_padding_and_takes_the_mean_of_logs",
        ),
        (
            "G16: gspo: the mean over padding",
            "length = x.completion_mask.sum(-1, keepdim=True).clamp(min=1)",
            "length = x.logps.shape[1]",
            "test_gspo_is_blind_to_padding_and_takes_the_mean_of_logs",
        ),
        (
            "rloo: ratios of tokens",
            "    return log_ratio(x).sum(-1, keepdim=True).exp().expand_as(x.logps)",
            "    return log_ratio(x).exp()",
            f"{PAPER}[rloo-k3]",
        ),
        (
            "the sign of the policy term",
            "return -clipped_surrogate(",
            "return clipped_surrogate(",
            "test_the_first_update_is_the_policy_gradient[grpo]",
        ),
        (
            "clip bounds exchanged",
            "clip_low=clip_low, clip_high=clip_high)",
            "clip_low=clip_high, clip_high=clip_low)",
            f"{PAPER}[dapo-k3]",
        ),
        (
            "cispo: the gradient goes through the ratio",
            "clamp(max=1 + clip_high).detach()",
            "clamp(max=1 + clip_high)",
            "test_parity_with_trl[cispo-False]",
        ),
        ("cispo: not clipped", "-ratio.clamp(max=1 + clip_high).detach()", "-ratio.detach()", f"{PAPER}[cispo-k3]"),
        (
            "cispo: clipped at clip_high",
            "-ratio.clamp(max=1 + clip_high)",
            "-ratio.clamp(max=clip_high)",
            f"{PAPER}[cispo-k3]",
        ),
        (
            "cispo: the log-prob is not masked",
            "x.advantages * x.logps.masked_fill(x.completion_mask == 0, 0.0)",
            "x.advantages * x.logps",
            f"{POISON}[cispo]",
        ),
        (
            "reinforce: no ratio",
            "    return -ratio * x.advantages\n",
            "    return -ratio.detach() * x.advantages\n",
            "test_the_first_update_is_the_policy_gradient[reinforce]",
        ),
        # KL
        (
            "k2: not halved",
            "kl = ref_log_ratio(x).square() / 2",
            "kl = ref_log_ratio(x).square()",
            (KL, f"{PAPER}[grpo-k2]"),
        ),
        (
            "k2: the weight has a gradient",
            "kl * log_ratio(x).exp().detach() if weighted",
            "kl * log_ratio(x).exp() if weighted",
            KL,
        ),
        (
            "k2: never weighted",
            "kl * log_ratio(x).exp().detach() if weighted else kl",
            "kl",
            (KL, f"{PAPER}[grpo-k2 weighted]"),
        ),
        (
            "G11: k3: the log ratio inverted",
            "torch.expm1(-ref_log_ratio(x)) + ref_log_ratio(x)",
            "torch.expm1(ref_log_ratio(x)) - ref_log_ratio(x)",
            (KL, f"{PAPER}[grpo-k3]"),
        ),
        (
            "k3: without its linear term",
            "torch.expm1(-ref_log_ratio(x)) + ref_log_ratio(x)",
            "torch.expm1(-ref_log_ratio(x))",
            KL,
        ),
        ("k3: without -1", "torch.expm1(-ref_log_ratio(x)) + ref", "torch.exp(-ref_log_ratio(x)) + ref", KL),
        (
            "G10: k3: never weighted",
            "    return kl * log_ratio(x).exp() if weighted else kl\n\n\ndef ref",
            "    return kl\n\n\ndef ref",
            KL,
        ),
        (
            "G10: k3: the weight has no gradient",
            "    return kl * log_ratio(x).exp() if weighted else kl\n\n\ndef ref",
            "    return kl * log_ratio(x).exp().detach() if weighted else kl\n\n\ndef ref",
            KL,
        ),
        (
            "the KL is not masked",
            "(x.logps - x.ref_logps).masked_fill(x.completion_mask == 0, 0.0)",
            "x.logps - x.ref_logps",
            f"{POISON}[grpo]",
        ),
        ("beta is not looked at", "losses + args.beta * kl)", "losses + kl)", f"{PAPER}[grpo-k3]"),
        (
            "the KL is wanted",
            "losses + args.beta * kl)",
            "losses - args.beta * kl)",
            (f"{PAPER}[grpo-k3]", "test_bandits_rest_at_the_closed_form[rloo-flags0]"),
        ),
        (
            "k1 is accepted",
            '(args.kl == "k1", "--kl k1:',
            '(False, "--kl k1:',
            "test_k1_is_refused_in_the_loss_with_the_reason",
        ),
        # aggregation
        (
            "G5: grpo: the mean over tokens",
            '"sequence": mask / mask.sum(-1, keepdim=True).clamp(min=1) / n_rows',
            '"sequence": mask / n_tokens',
            (f"{PAPER}[grpo-k3]", "test_weights_of_long_and_short_answers[grpo]"),
        ),
        (
            "G5: grpo: divided by the padded width",
            '"sequence": mask / mask.sum(-1, keepdim=True).clamp(min=1)',
            '"sequence": mask / mask.shape[1]',
            "test_weights_of_long_and_short_answers[grpo]",
        ),
        (
            "grpo: the sum over rows",
            ".clamp(min=1) / n_rows,",
            ".clamp(min=1),",
            "test_weights_of_long_and_short_answers[grpo]",
        ),
        (
            "G5: dapo: means of sequences",
            '"token": mask / n_tokens',
            '"token": mask / mask.sum(-1, keepdim=True) / n_rows',
            "test_weights_of_long_and_short_answers[dapo]",
        ),
        (
            "G8: dapo: divided by the tokens of the micro-batch",
            '"token": mask / n_tokens',
            '"token": mask / mask.sum()',
            f"{SPLIT}[dapo]",
        ),
        (
            "G8: grpo: divided by the rows of the micro-batch",
            ".clamp(min=1) / n_rows,",
            ".clamp(min=1) / len(mask),",
            f"{SPLIT}[grpo]",
        ),
        (
            "G5: dr_grpo: divided by the length",
            '"constant": mask / (n_rows * longest)',
            '"constant": mask / mask.sum(-1, keepdim=True) / n_rows',
            "test_weights_of_long_and_short_answers[dr_grpo]",
        ),
        (
            "dr_grpo: divided by the longest answer of the batch",
            "(n_rows * longest)",
            "(n_rows * mask.shape[1])",
            "test_weights_of_long_and_short_answers[dr_grpo]",
        ),
        (
            "reinforce: the mean over tokens",
            '"sum": mask / n_rows',
            '"sum": mask / n_tokens',
            "test_weights_of_long_and_short_answers[reinforce]",
        ),
        ("importance is not used", "**clips) * importance", "**clips)", "test_importance_is_truncated_and_a_constant"),
        (
            "importance upside down",
            "(old_logps - sampled_logps).exp().clamp",
            "(sampled_logps - old_logps).exp().clamp",
            "test_importance_is_truncated_and_a_constant",
        ),
        (
            "importance is not truncated",
            ".exp().clamp(max=cap)",
            ".exp()",
            "test_importance_is_truncated_and_a_constant",
        ),
        (
            "masked advantages are not masked",
            "x._replace(advantages=x.advantages.masked_fill(dead, 0.0))",
            "x",
            f"{POISON}[gspo]",
        ),
        # the entropy, penalties, votes
        (
            "equation 22: the standard deviation",
            "reward.var(correction=0)",
            "reward.std(correction=0)",
            "test_entropy_coefficient_is_the_surveys_equation_22",
        ),
        (
            "equation 22: grows with the variance",
            "math.exp(-adapt *",
            "math.exp(adapt *",
            "test_entropy_coefficient_is_the_surveys_equation_22",
        ),
        (
            "equation 22: alpha is lost",
            "return coef * math.exp",
            "return math.exp",
            "test_entropy_coefficient_is_the_surveys_equation_22",
        ),
        (
            "the overlong penalty begins at the end",
            "(longest - buffer - length) / buffer",
            "(longest - length) / buffer",
            "test_overlong_penalty_and_majority",
        ),
        ("the overlong penalty has no floor", ".clamp(-1, 0)", ".clamp(max=0)", "test_overlong_penalty_and_majority"),
        (
            "majority: no answer is an answer",
            "if answer else 0.0 for answer in answers]",
            "for answer in answers]",
            "test_overlong_penalty_and_majority",
        ),
        (
            "majority: texts are compared, reasoning and all",
            "world.final_answer(text) if ended else",
            "text if ended else",
            "test_majority_needs_no_answers",
        ),
        (
            "majority: what is cut off has a vote",
            'world.final_answer(text) if ended else ""',
            "world.final_answer(text)",
            CUT,
        ),
        # rollouts and rewards
        (
            "G22: the samples do not depend on the step",
            "seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)",
            "seed = 0",
            "test_answers_of_a_group_are_different_and_aligned",
        ),
        (
            "the head is scored whole or not at all: another temperature in the update",
            "part.completion_mask, tokenizer, args.temperature)",
            "part.completion_mask, tokenizer, 0.9)",
            LOOP,
        ),
        (
            "G2: repeat, not repeat_interleave",
            "groups = [rollout.answers[i : i + G] for i in range(0, len(rollout.answers), G)]",
            "groups = [rollout.answers[i :: len(tasks)] for i in range(len(tasks))]",
            REWARDS,
        ),
        ("weights of rewards are not looked at", "withheld(weight * values", "withheld(values", (REWARDS, WORST)),
        (
            "P16: what is cut off is rewarded",
            "return torch.where(finished, values, everybodys(least[None], loop).amin().cpu())",
            "return values",
            REWARDS,
        ),
        (
            "P16: what is cut off gets 0, be the others below",
            "everybodys(least[None], loop).amin().cpu())",
            "0.0)",
            WORST,
        ),
        ("P16: what is cut off gets the least, be it above 0", ".amin().clamp(max=0.0)\n", ".amin()\n", WORST),
        (
            "P16: the least of what was cut off, too",
            "least = values.masked_fill(~finished, math.inf)",
            "least = values",
            WORST,
        ),
        (
            "P16: each rank has a least of its own",
            "everybodys(least[None], loop).amin().cpu()",
            "least",
            f"{WORST}_on_any_rank",
        ),
        ("P16: what is cut off passes", "passed = finished & (values", "passed = (values", (REWARDS, WORST)),
        (
            "what is cut off is right where it is measured",
            "right = (finished & (value >= 1))",
            "right = (value >= 1)",
            CUT,
        ),
        (
            "what is cut off is paid where it is measured",
            "return parts, withheld(value, finished, loop).view",
            "return parts, value.view",
            CUT,
        ),
        (
            "r1: what is cut off is imitated",
            "                     if whole and checkers",
            "                     if checkers",
            "test_the_pipeline_of_r1",
        ),
        (
            "r1: the last part resumes what it never saved",
            'resume = args.resume and (folder / "checkpoint").exists()',
            "resume = args.resume",
            "test_the_pipeline_of_r1",
        ),
        ("the user's function is measured by its ones", "dict(both[::-1] if own else both)", "dict(both)", OWN),
        ("passed by the last reward", "if passed is None else passed", "", REWARDS),
        (
            "the length is rewarded",
            "unshaped - args.length_penalty * lengths",
            "unshaped + args.length_penalty * lengths",
            REWARDS,
        ),
        (
            "no overlong penalty",
            "    if args.overlong_buffer:\n        reward +=",
            "    if False:\n        reward +=",
            REWARDS,
        ),
        (
            "prm: the mean of steps",
            "torch.where(steps[1], steps[0], 1.0).amin(-1)",
            "torch.where(steps[1], steps[0], 1.0).mean(-1)",
            "test_steps_are_scored_where_they_end",
        ),
        (
            "prm: the last token is no end",
            "ends = marked | last",
            "ends = marked",
            "test_steps_are_scored_where_they_end",
        ),
        (
            "prm: steps of --data end with a full stop",
            '("\\n" in text if args.data else text.endswith("."))',
            'text.endswith(".")',
            "test_steps_of_files_end_before_the_line_does",
        ),
        (
            "prm: steps of --data end with the break",
            "        marked = said & F.pad(marked[:, 1:] & ~marked[:, :-1], (0, 1))  # the token before\n",
            "        pass\n",
            "test_steps_of_files_end_before_the_line_does",
        ),
        (
            "prm: an empty line is a step",
            "F.pad(marked[:, 1:] & ~marked[:, :-1], (0, 1))",
            "F.pad(marked[:, 1:], (0, 1))",
            "test_steps_of_files_end_before_the_line_does",
        ),
        (
            "process rewards that reinforce++ does not see",
            'args.process_weight and args.loss == "reinforce++"',
            "False",
            "test_flags_that_do_not_go_together_are_refused",
        ),
        (
            "prm: no sigmoid",
            "torch.cat(parts).float().sigmoid()",
            "torch.cat(parts).float()",
            "test_steps_are_scored_where_they_end",
        ),
        (
            "prm: all answers at once",
            "rollout.input_ids.split(args.micro_batch_size)",
            "rollout.input_ids.split(10**9)",
            "test_steps_are_scored_where_they_end",
        ),
        (
            "tools: the tool's tokens are trained on",
            "    mask[rows] += new_mask",
            "    mask[rows] = (new_ids > 0).long()",
            TOOLS,
        ),
        ("tools: the first turn is not trained on", "    mask[rows] += new_mask", "    mask[rows] = new_mask", TOOLS),
        (
            "tools: log-probs of the first turn are lost",
            "    logps[rows] += new_logps",
            "    logps[rows] = new_logps",
            TOOLS,
        ),
        (
            "tools: the call is what is rewarded",
            "answers[r] = chat.completion_text(found.completions[i], tokenizer)",
            "pass",
            TOOLS,
        ),
        ("tools: one call at most", "for turn in range(1, 3):", "for turn in range(1, 2):", TOOLS),
        (
            "tools: a call anywhere",
            'if opened and call.endswith("</tool>") else None',
            "if opened else None",
            "test_only_a_call_at_the_end_is_a_call",
        ),
        (
            "tools: the end of the turn twice",
            "end = len(mask) - mask[::-1].index(1)",
            "end = len(mask) - mask[::-1].index(1) - 1",
            TOOLS,
        ),
        (
            "DAPO: groups without spread are kept",
            "bool(args.dynamic_sampling and alike[p])",
            "False",
            DYNAMIC,
        ),
        (
            "DAPO: groups that differ in length only are kept",
            "torch.cat([judged.unshaped for _, _, judged in drawn])",
            "torch.cat([judged.reward for _, _, judged in drawn])",
            DYNAMIC,
        ),
        (
            "DAPO: answers of other groups",
            "[p * G + g for p in order for g in range(G)]",
            "[p * G + g for p in range(wanted) for g in range(G)]",
            DYNAMIC,
        ),
        ("DAPO: one draw only", "range(max(1, args.dynamic_sampling))", "range(1)", DYNAMIC),
        ("DAPO: the step grows", "and alike[p]))[:wanted]", "and alike[p]))", DYNAMIC),
        ("DAPO: rewards of other groups", "(torch.cat(parts)[order] for", "(torch.cat(parts)[:wanted] for", DYNAMIC),
        # advantages of tokens
        (
            "advantages stand in the prompt, too",
            "    return advantages * mask\n",
            "    return advantages\n",
            "test_every_token_gets_its_answers_advantage",
        ),
        (
            "G2: advantages in the wrong order",
            "whole[first : first + P].reshape(-1, 1)",
            "whole[first : first + P].T.reshape(-1, 1)",
            "test_every_token_gets_its_answers_advantage",
        ),
        (
            "P7: the KL is a bonus",
            "reward = reward - args.kl_coef * kl_to_go",
            "reward = reward + args.kl_coef * kl_to_go",
            "test_the_kl_is_taken_off_the_reward",
        ),
        (
            "the KL of the last token only",
            "kl_to_go[:, 0].cpu()",
            "kl_to_go[:, -1].cpu()",
            "test_the_kl_is_taken_off_the_reward",
        ),
        (
            "reinforce++: the whole KL at each token",
            "else args.kl_coef * kl_to_go)",
            "else args.kl_coef * kl_to_go[:, :1])",
            "test_the_kl_is_taken_off_the_reward",
        ),
        (
            "reinforce++: pads are whitened with the rest",
            "of_group(whole, all_counted > 0, baseline)",
            "of_group(whole, all_counted > -1, baseline)",
            "test_the_kl_is_taken_off_the_reward",
        ),
        ("float64 on the device", "reward.float().to(device)", "reward.to(device)", f"{SINGLE}[reinforce++]"),
        ("float64 on the device: groups", "baseline).float().to(device)", "baseline).to(device)", f"{SINGLE}[grpo]"),
        # the loop
        (
            "KL measured at the temperature of training",
            "part.completion_mask, tokenizer, 1.0, args, loop)",
            "part.completion_mask, tokenizer, args.temperature, args, loop)",
            "test_kl_is_the_log_ratio_of_whole_answers_at_temperature_1[0.5]",
        ),
        (
            "old log-probs at temperature 1",
            "scored(model, *rollout[:2], tokenizer, args.temperature,",
            "scored(model, *rollout[:2], tokenizer, 1.0,",
            "test_several_updates_leave_the_old_policy_where_it_was",
        ),
        ("the loss is a sum over updates", '"loss": loss / updates', '"loss": loss', MEAN),
        ("a graph for each shape", "loop.compile(model, dynamic=True)", "loop.compile(model)", STEPS),
        ("no steps, no questions", "max(1, args.steps) * args.batch_size", "args.steps * args.batch_size", STEPS),
        (
            "a process reward model of another tokenizer",
            'prm = load_reward_model(args.prm or loop.require("prm"), tokenizer, loop.device)',
            'prm = load(args.prm or loop.require("prm"), labels=1)[0].to(loop.device).eval()',
            "test_a_process_reward_model_of_another_tokenizer_is_refused",
        ),
        (
            "prompts of any length",
            "    check_length([*train, *(task for tasks in test.values() for task in tasks)], args)\n",
            "    check_length(train, args)\n",
            "test_a_long_prompt_is_refused_before_anything_runs",
        ),
        (
            "P8: old log-probs are recomputed",
            "old = logps.detach() if part.old_logps is None else part.old_logps",
            "old = logps.detach()",
            "test_several_updates_leave_the_old_policy_where_it_was",
        ),
        (
            "the learning rate is never set",
            "lr, begun = set_lr(optimizer, args, step), time",
            "lr, begun = args.lr, time",
            LOOP,
        ),
        ("gradients are not clipped", "grad_norm = clip(model, args.grad_clip)", "grad_norm = clip(model, 0.0)", LOOP),
        (
            "gradients pile up",
            "            optimizer.step()\n            optimizer.zero_grad()\n        loop.log",
            "            optimizer.step()\n        loop.log",
            LOOP,
        ),
        ("the reference is the policy", "    ref_model = frozen(model)\n", "    ref_model = model\n", LOOP),
        ("ranks do not share gradients", "            loop.all_reduce(model)\n", "", RANKS),
        (
            "ranks count their own tokens",
            "n_tokens = max(1, loop.sum_over_ranks(int(mask[rows].sum())))",
            "n_tokens = max(1, int(mask[rows].sum()))",
            RANKS,
        ),
        (
            "ranks count their own rows",
            "n_rows = max(1, loop.sum_over_ranks(int(mask[rows].any(-1).sum())))",
            "n_rows = max(1, int(mask[rows].any(-1).sum()))",
            RANKS,
        ),
        ("ranks take each other's advantages", "first = loop.rank * P\n", "first = 0\n", RANKS),
        ("the running mean of rewards is not kept", '"baseline": baseline}', '"baseline": None}', f"{RESUME}[flags1]"),
        (
            "the start is not kept where SFT came before",
            "if args.sft_steps else {}\n",
            "if False else {}\n",
            (f"{RESUME}[flags3]", f"{RESUME}[flags4]"),
        ),
        (
            "the entropy costs",
            "(loss - entropy_coef * (entropy",
            "(loss + entropy_coef * (entropy",
            "test_the_entropy_bonus_raises_the_entropy",
        ),
        (
            "padding of the longest rows is cut into them",
            "max(ends[part[-1]], 1)",
            "max(ends[part[0]], 1)",
            f"{SPLIT}[grpo]",
        ),
        (
            "cut-off answers are left in",
            ".cpu() | (not args.mask_unfinished)",
            ".cpu() | True",
            "test_rows_that_are_cut_off_can_be_left_out",
        ),
        (
            "cut-off answers give a group spread",
            "finished | (not args.mask_unfinished)",
            "finished | True",
            "test_rows_that_are_cut_off_can_be_left_out",
        ),
        (
            "cut-off answers are in the baseline",
            "baseline = earned.mean().item() if",
            "baseline = rewards.mean().item() if",
            "test_rows_that_are_cut_off_can_be_left_out",
        ),
        (
            "cut-off answers are in the variance",
            "args.entropy_adapt, earned)",
            "args.entropy_adapt, rewards)",
            "test_rows_that_are_cut_off_can_be_left_out",
        ),
        (
            "tools: the end of a turn without the tool's, which qwen3 writes otherwise",
            "        end = len(mask) - mask[::-1].index(1)  # behind",
            "        mask = chat.render(said[r][:-1], tokenizer, chat_format=args.chat_format).completion_mask\n"
            "        end = len(mask) - mask[::-1].index(1)  # behind",
            f"{TOOLS}[qwen3]",
        ),
        (
            "no answer is known: accuracy nevertheless",
            "    if not known:\n",
            "    if False:\n",
            CUT,
        ),
        (
            "no answer is known: the last of --reward",
            "first, whole = {}, args.rewards[0][0]",
            "first, whole = {}, args.rewards[-1][0]",
            CUT,
        ),
        ("the reference is kept in fp32", "loop.narrow(ref_model)", "loop.narrow(frozen(model))", STEPS),
        (
            "--loss all of runs that leave no result",
            'if args.loss == "all" and args.preset == "r1":',
            'if args.loss == "r1" and args.preset == "all":',
            "test_flags_that_do_not_go_together_are_refused",
        ),
        ("more minibatches than answers", "if args.minibatches > (n :=", "if 99 < (n :=", STEPS),
        (
            "--sft-steps of sums on --data",
            "(args.sft_steps and (args.data or args.tools) and",
            "(args.sft_steps and args.tools and",
            "test_flags_that_do_not_go_together_are_refused",
        ),
        (
            "SFT imitates other questions",
            'world.exchange("sums", world.rng_for("rl", args.seed, i), "train")["messages"]',
            'world.exchange("sums", world.rng_for("rl", args.seed, i + 1), "train")["messages"]',
            "test_annotation_is_of_the_questions_of_rl",
        ),
        (
            "all answers are decoded at once",
            '"rollout_batch": args.rollout_batch',
            '"rollout_batch": None',
            "test_answers_are_decoded_as_many_at_a_time_as_asked",
        ),
        ("r1: the longest of the right ones", "min(right, key=len)", "max(right, key=len)", "test_the_pipeline_of_r1"),
        (
            "r1: wrong ones, too",
            'if whole and checkers.exact("", text, task.row) and checkers.format("", text, {})]',
            "]",
            "test_the_pipeline_of_r1",
        ),
    ]
]
