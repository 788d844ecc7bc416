"""Planted bugs of data/checkers.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_checkers.py::"
RIGHT, WRONG = "test_right_answers_are_paid", "test_wrong_answers_are_not"
HOSTILE = "test_200_hostile_completions_neither_hang_nor_pay"
FORMULA, VOTE = "test_a_formula_is_not_the_number_in_it", "test_votes_are_for_what_is_said_in_the_end"

MUTANTS = [
    Mutant(name, "data/checkers.py", old, new, tuple(TESTS + t for t in ((test,) if isinstance(test, str) else test)))
    for name, old, new, test in [
        (
            "G19: exact: an empty answer matches",
            'float(said != "" and said == final_answer(row',
            'float(said in ("", gold := "") or said == final_answer(row',
            f"{WRONG}[exact]",
        ),
        (
            "exact: the right answer somewhere",
            "said == final_answer(row",
            'final_answer(row["answer"]) in (said, row',
            f"{WRONG}[exact]",
        ),
        (
            "number: a list of guesses is read from its end",
            "    if len(found) != 1:\n        return None\n",
            "    if not found:\n        return None\n    if len(found) > 1:\n        return _value(found[-1])\n",
            f"{WRONG}[number]",
        ),
        (
            "number: digits of other scripts beside it",
            "if any(c.isnumeric() for c in before + behind) or",
            "if",
            (f"{WRONG}[number]", HOSTILE),
        ),
        ("number: part of a word", r"(?<![\w.,])", "", f"{WRONG}[number]"),
        ("number: its sign is part of a word", "[{_SIGNS}^_/", "[_^/", f"{WRONG}[number]"),
        ("number: what follows it is not looked at", r"(?!\w|[.,]\w)", "", f"{WRONG}[number]"),
        ("number: no comma may follow", r"(?!\w|[.,]\w)", r"(?![\w,]|\.\w)", f"{RIGHT}[number]"),
        ("number: what a formula puts before it", "or _BEFORE.search(before) or", "or", FORMULA),
        ("number: what a formula puts behind it", " or _BEHIND.match(behind):", ":", FORMULA),
        ("number: markup is a formula", """text = _MARKUP.sub(" ", text)""", "text = text", f"{RIGHT}[number]"),
        ("number: markup joins digits", """_MARKUP.sub(" ", text)""", """_MARKUP.sub("", text)""", f"{WRONG}[number]"),
        ("number: a bracket parts it from its minus", r"\u00b1][\s({{]*|", r"\u00b1]\s*|", f"{WRONG}[number]"),
        (
            "G19: thousands are not read",
            r"(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,6}}|",
            "(?P<whole>",
            "test_numbers_are_exact",
        ),
        (
            "number: signs are lost",
            'sign = 1 if found["sign"] in (None, "+") else -1',
            "sign = 1",
            "test_numbers_are_exact",
        ),
        (
            "number: a minus of print is none",
            r"-+\u2010-\u2013\u2212\ufe63\uff0d",
            "-+",
            ("test_numbers_are_exact", f"{WRONG}[number]"),
        ),
        ("number: a dash of print is no minus", r"-+\u2010-\u2013\u2212", r"-+\u2212", f"{WRONG}[number]"),
        (
            "number: a minus with a space is none",
            r"(?:(?P<sign>[{_SIGNS}])\s*)?",
            r"(?:(?P<sign>[{_SIGNS}]))?",
            "test_numbers_are_exact",
        ),
        (
            "number: decimals are lost",
            '.replace(",", "") + (found["decimals"] or ""))',
            '.replace(",", ""))',
            "test_numbers_are_exact",
        ),
        ("number: the first ####", 'text.rsplit("####", 1)[1]', 'text.split("####", 2)[1]', f"{WRONG}[number]"),
        ("number: not after the last =", '.rsplit("=", 1)[-1]', "", f"{RIGHT}[number]"),
        (
            "number: the whole text, not its last sentence",
            "number_in(sentences[-1].rsplit",
            "number_in(text.rsplit",
            f"{RIGHT}[number]",
        ),
        (
            "number: reasoning is looked at",
            '    text = final_answer(completion)\n    if "####"',
            '    text = completion\n    if "####"',
            f"{WRONG}[number]",
        ),
        (
            "number: no number equals no number",
            "float(said is not None and said == last",
            "float(said == last",
            "test_answers_that_can_never_be_right_are_refused",
        ),
        (
            "boxed: the last of several",
            '    if text.count("\\\\boxed{") != 1:',
            '    if text.count("\\\\boxed{") < 1:',
            f"{WRONG}[boxed]",
        ),
        (
            "boxed: unbalanced braces",
            "        if depth == 0:\n            return rest[:i]\n    return None",
            "        if depth == 0:\n            return rest[:i]\n    return rest",
            f"{WRONG}[boxed]",
        ),
        (
            "boxed: the first brace ends it",
            "        if depth == 0:",
            '        if c == "}":',
            "test_texts_that_are_looked_at",
        ),
        (
            "boxed: nothing is right",
            'float(said != "" and (said == gold or same_number))',
            "float(said == gold or same_number)",
            "test_answers_that_can_never_be_right_are_refused",
        ),
        (
            "boxed: no number equals no number",
            "same_number = whole_number(said) is not None and whole_number",
            "same_number = whole_number",
            "test_numbers_are_exact",
        ),
        (
            "boxed: the number in a text is the text",
            "same_number = whole_number(said) is not None and whole_number(said) == whole_number(gold)",
            "same_number = number_in(said) is not None and number_in(said) == number_in(gold)",
            f"{WRONG}[boxed]",
        ),
        (
            "boxed: a text that begins with a number is it",
            "if found and re.fullmatch(_UNIT, text[found.end() :]) else None",
            "if found else None",
            (FORMULA, f"{WRONG}[boxed]"),
        ),
        ("boxed: percent are no number", r'r"(?:\\?%|', 'r"(?:', f"{RIGHT}[boxed]"),
        ("boxed: the dollar's backslash stays", r'[!,;: ]|\\?\$"', r'[!,;: ]|\$"', f"{RIGHT}[boxed]"),
        ("vote: the first box", 'text.rsplit("\\\\boxed{", 1)', 'text.split("\\\\boxed{", 1)', VOTE),
        ("vote: boxes are not looked at", '    if "\\\\boxed{" in text:', "    if False:", VOTE),
        ("vote: numbers as they are written", "return said if value is None else str(value)", "return said", VOTE),
        ("vote: the working votes, too", 'text.rpartition("####")[2].strip(), last', "text, last", VOTE),
        ("vote: reasoning votes", 'final_answer(completion)\n    if "\\\\boxed', 'completion\n    if "\\\\boxed', VOTE),
        ("vote: nothing is said alike", 'float(said != "" and said == vote(', "float(said == vote(", VOTE),
        ("rows are counted from 0", "for i, row in enumerate(rows, start=1):", "for i, row in enumerate(rows):",
         "test_answers_that_can_never_be_right_are_refused"),
        (
            "reft: any text is worth a tenth",
            "0.1 * (last_number(completion) is not None)",
            "0.1",
            "test_reft_pays_a_tenth_for_a_number",
        ),
        ("format: several tags", "closed and tags == 2 and", "closed and", f"{WRONG}[format]"),
        (
            "format: what stands before it",
            'reasoning.startswith("<think>")',
            '"<think>" in reasoning',
            f"{WRONG}[format]",
        ),
        ("format: no reasoning", "and reasoning[7:].strip() and answer", "and answer", f"{WRONG}[format]"),
        ("format: no answer", "and answer.strip()\n", "\n", f"{WRONG}[format]"),
        (
            "answers that can never be right are accepted",
            "!= 1.0:\n            raise",
            "!= 1.0 and i > 9:\n            raise",
            "test_answers_that_can_never_be_right_are_refused",
        ),
        (
            "a function's value is not looked at",
            "        if not isinstance(value, int | float) or not math.isfinite(value):",
            "        if False:",
            "test_a_function_of_your_own",
        ),
        (
            "a file of rewards runs at every call",
            "@functools.cache  # what",
            "# what",
            "test_a_file_of_rewards_runs_once",
        ),
        ("a NaN is a reward", " or not math.isfinite(value):", ":", "test_a_function_of_your_own"),
        (
            "boxed: the working of GSM8K is the answer",
            'last_boxed(gold) or gold.rpartition("####")[2]',
            "last_boxed(gold) or gold",
            "test_numbers_are_exact",
        ),
        (
            "boxed: thin spaces count",
            r're.sub(r"\s|\\[!,;: ]|',
            r're.sub(r"\s|',
            "test_numbers_are_exact",
        ),
        (
            "boxed: any text is an answer",
            ' and "\\n" in gold.strip():',
            " and False:",
            "test_answers_that_can_never_be_right_are_refused",
        ),
    ]
]
