"""Planted bugs of bench.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_bench.py::"
FLOOR = "test_floor_leaves_the_time_of_products_and_of_attention"

MUTANTS = [
    Mutant(name, "bench.py", old, new, TESTS + test)
    for name, old, new, test in [
        # measuring
        (
            "the warm-up is timed",
            "            if i:\n                times.append",
            "            if True:\n                times.append",
            "test_race_alternates_and_discards_the_warm_up",
        ),
        (
            "one side runs after the other",
            "    for i in range(repeats + 1):\n        for call, times in seconds.items():\n",
            "    for call, times in seconds.items():\n        for i in range(repeats + 1):\n",
            "test_race_alternates_and_discards_the_warm_up",
        ),
        ("kB for MB", ") * 1024 / 1e6", ") * 1024 / 1e3", "test_resident_grows_by_what_is_allocated"),
        (
            "an earlier peak counts",
            'Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM',
            "pass  # resets VmHWM",
            "test_memory_of_a_kernel_forgets_earlier_peaks",
        ),
        # sft
        (
            "compiled rows decode eagerly",
            "decode=generate.__wrapped__",
            "decode=generate",
            "test_compiled_rows_are_compiled_and_leave_the_switch_off",
        ),
        (
            "after the compiled rows all is compiled",
            "    kernels.use_compile(False)\n    return rows\n",
            "    return rows\n",
            "test_compiled_rows_are_compiled_and_leave_the_switch_off",
        ),
        (
            "blocks of the compiled rows are not",
            "        block.compile(dynamic=True)  # one",
            "        pass  # one",
            "test_compiled_rows_are_compiled_and_leave_the_switch_off",
        ),
        (
            "models full of NaN are equal",
            "if not error <= 1e-3:",
            "if error > 1e-3:",
            "test_twins_that_differ_are_refused",
        ),
        ("ours also predicts the first token", "    mask[:, 0] = 0\n", "", "test_training_is_of_the_same_loss"),
        (
            "theirs samples among the best 50",
            "temperature=1.0, top_k=0, top_p",
            "temperature=1.0, top_p",
            "test_what_the_peer_is_asked_to_sample",
        ),
        (
            "their prompts are padded on the right",
            "[[0] * (longest - len(p)) + p for p in prompts]",
            "[p + [0] * (longest - len(p)) for p in prompts]",
            "test_what_the_peer_is_asked_to_sample",
        ),
        (
            "the ending token does not count",
            "is_end.cumsum(-1) - is_end == 0",
            "is_end.cumsum(-1) == 0",
            "test_tokens_after_an_end_do_not_count",
        ),
        (
            "their prompts count as sampled",
            "n_sampled(found[:, longest:], eos_ids)",
            "n_sampled(found, eos_ids)",
            "test_sampling_counts_the_tokens_made",
        ),
        (
            "trl trains on prompts too",
            "completion_only_loss=True",
            "completion_only_loss=False",
            "test_trl_trains_on_the_same_tokens_at_toy_size",
        ),
        (
            "floor: attention among the rest",
            'callers & {"attention"}',
            "False",
            "test_operations_of_sampling_by_kind",
        ),
        (
            "floor: what a norm multiplies is a product",
            '{"rms_norm", "_RMSNorm"}',
            '{"rms_norm"}',
            "test_operations_of_a_training_step_by_kind",
        ),
        (
            "floor: the head's gradient is no product",
            '"aten::addmm", "aten::addmm_")',
            '"aten::addmm")',
            "test_operations_of_a_training_step_by_kind",
        ),
        (
            "floor: a part of the whole is more than it",
            "whole / sum(parts[:n])",
            "sum(parts[:n]) / whole",
            FLOOR,
        ),
        ("floor: norms are attention", "sum(parts[:n])", "sum(parts[: 2 * n - 1])", FLOOR),
        ("floor: all operations but the small ones", '(4, "all operations")', '(3, "all operations")', FLOOR),
        (
            "floor: what is not an operation takes no time",
            "whole - sum(parts))",
            "0.0)",
            FLOOR,
        ),
        # dpo
        (
            "our dpo step exchanges the answers",
            "[Row(list(c), [1] * len(c)), Row(list(r), [1] * len(r))]",
            "[Row(list(r), [1] * len(r)), Row(list(c), [1] * len(c))]",
            "test_trl_takes_the_same_dpo_step_at_toy_size",
        ),
        (
            "our dpo step updates nothing",
            "dpo.sums_of(losses, s, options))\n            clip(model, 1.0)\n            optimizer.step()",
            "dpo.sums_of(losses, s, options))\n            clip(model, 1.0)",
            "test_trl_takes_the_same_dpo_step_at_toy_size",
        ),
        (
            "memory is a goal to exceed",
            'if r["higher_is_better"] else r["ratio"] <= goal)',
            'if r["higher_is_better"] else r["ratio"] >= goal)',
            "test_verdict",
        ),
        (
            "a goal of all that begins alike",
            'f"{r[\'name\']},".startswith(f"{name},")',
            "r['name'].startswith(name)",
            "test_verdict",
        ),
        # gpu
        (
            "a lookup is a product",
            "looked_up = 0 if model.config.tied else",
            "looked_up = 0 if True else",
            "test_flops_are_those_of_the_products",
        ),
        (
            "attention's backward is free",
            "12 * c.depth * c.heads",
            "4 * c.depth * c.heads",
            "test_flops_are_those_of_the_products",
        ),
        (
            "the cache never grows",
            "sum(range(prompt, prompt + new))",
            "new * prompt",
            "test_decoding_bytes_are_those_of_weights_and_cache",
        ),
        # quantize
        (
            "scales are not read",
            "sum(part.n_bytes() for part in parts)\n\n\n",
            "sum(part.codes.numel() for part in parts)\n\n\n",
            "test_bytes_of_a_step_are_those_of_codes_and_scales",
        ),
        (
            "the ceiling of the wide model",
            "(len(source) + len(target)) / of_copy / n_bytes[0]",
            "(len(source) + len(target)) / of_copy / n_bytes[1]",
            "test_quantized_decoding_against_its_ceiling",
        ),
        (
            "a step reads no cache",
            "n_bytes = [weight_bytes(model) + cached for",
            "n_bytes = [weight_bytes(model) for",
            "test_quantized_decoding_against_its_ceiling",
        ),
        (
            "a copy does not read",
            "2 * len(source) / of_copy",
            "len(source) / of_copy",
            "test_decoding_against_its_ceiling",
        ),
        ("a wrong flag with the usage", "    parser.error = lambda", "    parser.said = lambda",
         "test_a_wrong_flag_is_one_line_and_exit_2"),
        ("memory is measured in this process", '    if device == "cuda":\n        return measure',
         "    if True:\n        return measure",
         "test_memory_is_measured_in_a_process_of_its_own"),
        ("all that comes later allocates otherwise", "        os.environ.clear()\n", "        pass\n",
         "test_memory_is_measured_in_a_process_of_its_own"),
        ("theirs takes our LoRA step", 'step = ours if which == "ours" else theirs\n    step()\n    return peak_of',
         "step = ours\n    step()\n    return peak_of", "test_peft_takes_a_lora_step_at_toy_size"),
        ("half the tokens of a LoRA step", "else 16) * 64 / s", "else 16) * 32 / s",
         "test_every_goal_belongs_to_a_row"),
        ("scoring counts as sampling", 'spent["scoring"] -= start', 'spent["rollout"] -= start',
         "test_grpo_trainer_at_toy_size"),
    ]
]
