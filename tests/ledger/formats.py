"""Planted bugs of data/formats.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_formats.py::"

SPLIT = "test_rows_of_files_and_what_is_held_out_of_them"
EACH = "test_each_schema_is_read_as_it_is"
FIRST = "test_the_first_row_decides_the_schema_and_the_others_follow"
EDITOR = "test_what_a_text_editor_leaves_is_no_error"
BAD = "test_a_bad_row_is_refused_with_file_and_line"
KIND = "test_a_field_of_the_wrong_kind_is_refused"
NUMBER = "test_a_number_beyond_floats_is_refused"
EMPTY = "test_a_file_without_rows_is_refused"
UNKNOWN = "test_fields_that_no_schema_knows_are_named_once"
MAP = "test_map_renames_fields"
PARSE = "test_parse_map"
CHAT = "test_rows_become_conversations"
MANY = "test_how_many_are_held_out"
ALONE = "test_held_out_depends_on_the_rows_alone"
EQUAL = "test_equal_rows_stay_together"
COMMON = "test_what_most_rows_ask_is_trained_on"

MUTANTS = [
    Mutant(name, "data/formats.py", old, new, TESTS + test)
    for name, old, new, test in [
        # the file
        ("a byte-order mark becomes part of the first row", '"utf-8-sig"', '"utf-8"', EDITOR),
        (
            "text is split at every line end of Unicode",
            'text.rstrip().split("\\n")',
            "text.rstrip().splitlines()",
            EDITOR,
        ),
        ("empty lines at the end refused", "text.rstrip().split", "text.split", EDITOR),
        ("bytes that are not UTF-8 replaced", '.decode("utf-8-sig")', '.decode("utf-8-sig", errors="replace")', BAD),
        ("line of a bad byte counted from 0", '.count(b"\\n") + 1', '.count(b"\\n")', BAD),
        ("lines counted from 0", "enumerate(lines, start=1)", "enumerate(lines)", BAD),
        ("an empty file is no rows", 'if lines == [""]:', "if not lines:", EMPTY),
        ("a missing file raises OSError", "except OSError as error:", "except EOFError as error:", EMPTY),
        # rows
        (
            "broken lines skipped",
            "        row = _parse(line, where)\n",
            "        try:\n            row = _parse(line, where)\n        except UserError:\n            continue\n",
            BAD,
        ),
        ("NaN is a number", "parse_constant=refuse", "parse_constant=float", BAD),
        ("the last of equal fields wins", "if len(dict(pairs)) < len(pairs):", "if False:", BAD),
        ("deep nesting raises RecursionError", "(ValueError, RecursionError)", "(ValueError, EOFError)", BAD),
        ("error goes over several lines", "repr(name)[1:-1] for name in fields", "str(name) for name in fields", BAD),
        (
            "the last schema that fits is taken",
            "for name in schemas if row.keys()",
            "for name in reversed(schemas) if row.keys()",
            FIRST,
        ),
        ("schema chosen anew for every row", "        if not fields:\n", "        if True:\n", FIRST),
        (
            "a schema fits if one field is there",
            "if row.keys() >= SCHEMAS[name].keys()),",
            "if row.keys() & SCHEMAS[name].keys()),",
            FIRST,
        ),
        (
            "a row that lacks fields is kept",
            "rows.append(row if keep else {name: row[name] for name in fields})",
            "rows.append(row)",
            UNKNOWN,
        ),
        (
            "unknown fields said for each row",
            "        ignored |= set() if keep else row.keys() - fields.keys()\n",
            "        ignored |= row.keys() - fields.keys()\n"
            "        print(f'{path}: ignored the fields {_names(sorted(ignored))}', file=sys.stderr)\n",
            UNKNOWN,
        ),
        (
            "unknown fields passed over in silence",
            "        ignored |= set() if keep else row.keys() - fields.keys()\n",
            "",
            UNKNOWN,
        ),
        (
            "all fields are kept, but for those unknown",
            "rows.append(row if keep else {",
            "rows.append({",
            "test_all_fields_may_be_kept",
        ),
        ("unknown fields of messages passed over in silence", 'ignored |= {f"', '_ = {f"', UNKNOWN),
        # kinds
        ("lists of different lengths", "if len(lengths) > 1:", "if len(lengths) > 9:", KIND),
        ("truth of any number", '"truths": bool,', '"truths": int,', KIND),
        (
            "a label of any number",
            "        ok = isinstance(value, bool)\n",
            "        ok = isinstance(value, int)\n",
            KIND,
        ),
        ("true is a number", "return not isinstance(value, bool) and", "return", KIND),
        ("infinite scores", "abs(value) <= sys.float_info.max", "abs(value) >= 0", NUMBER),
        (
            "integers beyond floats",
            "abs(value) <= sys.float_info.max",
            'value not in (float("inf"), -float("inf"))',
            NUMBER,
        ),
        ("empty text among texts", 'ok = ok and not (kind == "texts" and "" in value)', "ok = ok", KIND),
        ("empty lists", "isinstance(value, list) and value and all", "isinstance(value, list) and all", KIND),
        ("empty text", "ok = isinstance(value, str) and value\n", "ok = isinstance(value, str)\n", BAD),
        ("anything true is text", "ok = isinstance(value, str) and value\n", "ok = value\n", BAD),
        # messages
        (
            "R6: the prompt said again in the chosen answer",
            'if kind == "reply" and value[0]["role"] != "assistant":',
            "if False:",
            KIND,
        ),
        ("an answer that ends with the user", 'complete=kind != "said"', 'complete=kind == "messages"', KIND),
        ("prompt: text alone", '"prompt": {"prompt": "said"}', '"prompt": {"prompt": "text"}', EACH),
        ("a prompt must end with the assistant", 'complete=kind != "said"', "complete=True", EACH),
        (
            "a conversation that ends with the user",
            'if complete and messages[-1]["role"]',
            'if False and messages[-1]["role"]',
            KIND,
        ),
        ("unknown roles", 'if message["role"] not in ROLES:', "if False:", KIND),
        ("no tools", '"assistant", "tool")', '"assistant")', EACH),
        (
            "a system message anywhere",
            'if message["role"] == "system" and i:',
            'if message["role"] == "system" and i < 0:',
            KIND,
        ),
        ("a system message nowhere", 'if message["role"] == "system" and i:', 'if message["role"] == "system":', EACH),
        (
            "empty messages",
            '        _check(message["content"], "text"',
            '        _ = (message["content"], "text"',
            KIND,
        ),
        (
            "conversations without messages",
            "if not isinstance(messages, list) or not messages:",
            "if not isinstance(messages, list):",
            KIND,
        ),
        # --map
        (
            "map works the wrong way round",
            "mapping.get(name, name): value",
            "{v: k for k, v in mapping.items()}.get(name, name): value",
            MAP,
        ),
        ("a mapped field overwrites another", "if ours in row and ours not in mapping:", "if False:", MAP),
        ("fields cannot be exchanged", "if ours in row and ours not in mapping:", "if ours in row:", MAP),
        ("a field to map may be missing", "if theirs not in row:", "if theirs not in row and not rows:", MAP),
        ("two fields become one", "if len(set(mapping.values())) < len(mapping):", "if False:", MAP),
        ("a name without a value", "if not (name and equals and value) or", "if not name or", PARSE),
        ("a value without a name", "if not (name and equals and value) or", "if not (equals and value) or", PARSE),
        ("the last of equal names wins", " or name in mapping:\n", ":\n", PARSE),
        ("split at the last sign", 'pair.partition("=")', 'pair.rpartition("=")', PARSE),
        # conversations
        (
            "the rejected answer is the chosen one",
            'row["prompt"], row[completion]',
            'row["prompt"], row.get("chosen", row[completion])',
            CHAT,
        ),
        ("the prompt is written to", "    return prompt + (", "    return prompt.__iadd__(", CHAT),
        (
            "an answer said by the user",
            '{"role": "assistant", "content": said}',
            '{"role": "user", "content": said}',
            CHAT,
        ),
        # held-out rows
        ("a file of few rows loses half of them", "if len(rows) < 32:", "if len(rows) < 17:", MANY),
        ("a tenth held out", "len(rows) // 20", "len(rows) // 10", MANY),
        ("no upper limit", "min(512, max(16, len(rows) // 20))", "max(16, len(rows) // 20)", MANY),
        ("no lower limit", "max(16, len(rows) // 20)", "max(1, len(rows) // 20)", MANY),
        ("held-out rows trained on", "if key not in taken]", "if key]", MANY),
        (
            "the last rows of the file, whatever they say",
            "hashlib.sha256(content.encode())",
            "hashlib.sha256(json.dumps(contents.index(content)).encode())",
            ALONE,
        ),
        (
            "the hash of the process",
            "hashlib.sha256(content.encode()).hexdigest() for content in contents",
            "str(id(row)) for row in rows",
            ALONE,
        ),
        (
            "order of the fields matters",
            "json.dumps(asked(row) if by_question else row, sort_keys=True)",
            "json.dumps(asked(row) if by_question else row)",
            ALONE,
        ),
        (
            "answers to one prompt are on both sides",
            "json.dumps(asked(row) if by_question else row, sort_keys=True)",
            "json.dumps(row, sort_keys=True)",
            "test_answers_to_one_prompt_stay_together",
        ),
        (
            "few prompts cannot be parted",
            " and not (by_question and len(set(keys)) < 32):\n",
            ":\n",
            "test_answers_to_one_prompt_stay_together",
        ),
        (
            "equal rows on both sides",
            "        taken, n = set(), 0\n",
            "        keys = [f'{key}{i}' for i, key in enumerate(keys)]\n        taken, n = set(), 0\n",
            EQUAL,
        ),
        ("nothing left to train on", "min(2 * wanted, len(rows) - 1)", "2 * wanted", EQUAL),
        ("one row is held out, and nobody told", "if n >= 16 and not (", "if n and not (", COMMON),
        ("a common prompt is held out with all its rows", "min(2 * wanted, len(rows) - 1)", "len(rows) - 1", COMMON),
        ("held out up to the limit", "if n < wanted and n + size", "if n + size", MANY),
        (
            "rows are held out for nothing beside --eval-data",
            "return parts, read(eval_path)",
            "return [hold_out(part)[0] for part in parts], read(eval_path)",
            SPLIT,
        ),
        ("--eval-data is not looked at", "return parts, read(eval_path)", "return parts, sum(parts, [])", SPLIT),
        (
            "held-out rows are trained on",
            "[row for row in part if id(row) in kept]",
            "list(part)",
            SPLIT,
        ),
        (
            "each file holds out for itself, and others train on it",
            "[[row for row in part if id(row) in kept] for part in parts]",
            "[hold_out(part)[0] for part in parts]",
            "test_what_one_file_holds_out_no_other_trains_on",
        ),
        (
            "a file may lose all its rows",
            "if before and not left]",
            "if not before and not left]",
            "test_what_one_file_holds_out_no_other_trains_on",
        ),
        ("nothing is measured of a small file", "        return parts, train\n", "        return parts, []\n", SPLIT),
        (
            "chats with two answers to a question are on both sides",
            "messages[: answers[0] if answers else None]",
            "messages",
            "test_answers_to_one_prompt_stay_together",
        ),
        (
            "rows about other pictures ask the same",
            ', row.get("images")]',
            "]",
            "test_what_a_row_asks",
        ),
        (
            "a greeting of the assistant is the first answer",
            'role == "assistant" and "user" in roles[:i]]',
            'role == "assistant"]',
            "test_what_a_row_asks",
        ),
        (
            "a prompt and a chat that ask the same do not",
            'messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt',
            "messages = [] if isinstance(prompt, str) else prompt",
            "test_what_a_row_asks",
        ),
        ("all texts ask the same", "        return row\n", "        return {}\n", "test_what_a_row_asks"),
    ]
]
