"""Planted bugs of data/download.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_download.py::"

GSM8K = "test_gsm8k_without_the_marks_of_the_calculator"
MATH = "test_math_and_dolly"
HH = "test_hh_is_split_before_the_last_answer"
ULTRA = "test_ultrafeedback_keeps_answers_with_their_scores"
EACH = "test_each_data_set_becomes_rows_of_its_schema"
CHANGED = "test_rows_that_changed_are_refused_with_their_line"
FIT = "test_rows_must_fit_the_schema"
FEW_WRONG = "test_a_few_rows_that_do_not_fit_are_left_out_and_counted"
FEW = "test_a_file_with_too_few_rows_is_refused"
SHA = "test_another_file_than_the_one_noted_is_refused"
SERVER = "test_what_the_server_refuses_is_one_line"
BREAKS = "test_a_file_that_breaks_off_is_refused"
LIMIT = "test_a_file_beyond_the_limit_is_refused"
STREAM = "test_a_stream_without_end_is_cut_off_at_the_limit"
CLI = "test_the_command"

MUTANTS = [
    Mutant(name, "data/download.py", old, new, TESTS + test)
    for name, old, new, test in [
        # rows
        ("G19: commas in the answer", '.strip().replace(",", "")', ".strip()", GSM8K),
        ("marks of the calculator stay", 're.sub(r"<<[^<>]*>>", "", solution)', "solution", GSM8K),
        ("the number goes with the mark", 'r"<<[^<>]*>>"', 'r"<<.*>>\\\\d+"', GSM8K),
        ("a solution without its answer", 'strip() + f"\\n#### {answer}"', "strip()", GSM8K),
        (
            "an answer without its mark is taken",
            'row["answer"].rsplit("\\n####", 1)',
            'row["answer"].rpartition("\\n####")[::2]',
            GSM8K,
        ),
        ("the solution is the answer", '"answer": row["answer"]}', '"answer": row["solution"]}', MATH),
        ("no context", '(row["instruction"], row["context"])', '(row["instruction"],)', MATH),
        ("an empty context leaves blank lines", "if part.strip())", "if part)", MATH),
        ("R6: only the last question is the prompt", '"prompt": chosen[:-1]', '"prompt": chosen[-2:-1]', HH),
        (
            "R3: chosen and rejected exchanged",
            '"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]',
            '"chosen": rejected[-1]["content"], "rejected": chosen[-1]["content"]',
            HH,
        ),
        ("dialogues that part earlier", "if chosen[:-1] != rejected[:-1]:", "if False:", HH),
        ("split at any name", 'r"\\n\\n(Human|Assistant):"', 'r"\\n\\n(Human|Assistant|a|e)"', HH),
        ("dialogues that end with the user", 'or turns[-1]["role"] != "assistant":', "or False:", HH),
        ("text before the first turn", "if parts[0].strip() or len(turns)", "if len(turns)", HH),
        (
            "roles exchanged",
            '{"Human": "user", "Assistant": "assistant"}',
            '{"Human": "assistant", "Assistant": "user"}',
            HH,
        ),
        (
            "scores of other answers",
            "(pair for pair in answers if pair[0])",
            "((a, s) for (a, _), (_, s) in zip(answers, answers[::-1]) if a)",
            ULTRA,
        ),
        ("empty answers kept", "(pair for pair in answers if pair[0])", "(pair for pair in answers)", ULTRA),
        # checks
        (
            "rows that do not fit skipped, however many",
            "if len(wrong) > TOLERATED * len(lines):",
            "if False:",
            CHANGED,
        ),
        ("lines counted from 0", "enumerate(lines, start=1)", "enumerate(lines)", CHANGED),
        (
            "a row that is no object raises TypeError",
            "(KeyError, ValueError, TypeError, AttributeError)",
            "(KeyError, ValueError, AttributeError)",
            CHANGED,
        ),
        (
            "bytes that are not UTF-8 replaced",
            'data.decode("utf-8")',
            'data.decode("utf-8", errors="replace")',
            CHANGED,
        ),
        ("rows not checked", "formats.read_jsonl(made, source.schema)", "made.stat()", FIT),
        ("the error names a file that is gone", ".replace(str(made),", '.replace("?",', FIT),
        ("rows with empty fields kept", 'if "" in row.values():', "if False:", FEW_WRONG),
        ("one bad row is too many", "> TOLERATED * len(lines):", "> 0:", FEW_WRONG),
        ("1% is too many", "> TOLERATED * len(lines):", ">= TOLERATED * len(lines):", FEW_WRONG),
        (
            "left out without a word",
            'print(f"wrote {folder / source.file}: {len(rows)} rows{left_out}")',
            'print(f"wrote {folder / source.file}: {len(rows)} rows")',
            FEW_WRONG,
        ),
        (
            "turns in which nothing is said",
            'if not all(turn["content"] for turn in turns):',
            'if not turns[-1]["content"]:',
            HH,
        ),
        (
            "answers in which nothing is said",
            'if not all(turn["content"] for turn in turns):',
            'if not all(turn["content"] for turn in turns[:-1]):',
            HH,
        ),
        # which file it is
        ("any file will do", "if sha256 and (found :=", "if False and (found :=", SHA),
        ("a file without a noted sum is refused", "if sha256 and (found :=", "if (found :=", FEW),
        ("the sum is not handed on", "fetch(source.url, source.sha256)", "fetch(source.url)", SHA),
        (
            "the sum of the first bytes only",
            "hashlib.sha256(data).hexdigest()",
            "hashlib.sha256(data[:10]).hexdigest()",
            SHA,
        ),
        (
            "a branch, which moves, instead of a commit",
            "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/",
            "openai/grade-school-math/master/",
            EACH,
        ),
        ("a sum with a digit missing", "5a06132", "5a0613", EACH),
        ("part of a file is enough", "if len(lines) < source.least:", "if len(lines) < 1:", FEW),
        ("a whole file is too short", "if len(lines) < source.least:", "if len(lines) <= source.least:", FEW),
        # the network
        ("refusals raise HTTPError", "(OSError, EOFError, zlib.error,", "(EOFError, zlib.error,", SERVER),
        ("half a file taken for the whole", "if length is not None and len(data) != length:", "if False:", BREAKS),
        (
            "a packed file that breaks off raises EOFError",
            "(OSError, EOFError, zlib.error, http.client.HTTPException)",
            "(OSError, zlib.error, http.client.HTTPException)",
            BREAKS,
        ),
        (
            "broken packing raises zlib.error",
            "(OSError, EOFError, zlib.error, http.client.HTTPException)",
            "(OSError, EOFError, http.client.HTTPException)",
            BREAKS,
        ),
        ("packed files kept packed", 'if url.endswith(".gz"):', "if False:", EACH),
        ("unpacked beyond the limit", "    if len(data) > LIMIT:\n", "    if False:\n", LIMIT),
        ("the limit itself refused", "if content.tell() > LIMIT:", "if content.tell() >= LIMIT:", LIMIT),
        ("an unpacked file of any size", "unpacked.read(LIMIT + 1)", "unpacked.read(LIMIT)", LIMIT),
        ("a stream of any size", "if content.tell() > LIMIT:", "if False:", STREAM),
        # files
        ("written in place", "made = Path(temporary, source.file)", "made = folder / source.file", FIT),
        ("a folder is not made", "folder.mkdir(parents=True, exist_ok=True)", "folder.mkdir(exist_ok=True)", EACH),
        ("fetched again each time", "if path.exists() and not args.force:", "if False:", CLI),
        ("never fetched again", "if path.exists() and not args.force:", "if path.exists():", CLI),
        (
            "a disk that fails ends with a traceback",
            "except (UserError, OSError) as error:",
            "except UserError as error:",
            CLI,
        ),
        ("errors end with code 1", "sys.exit(2)", "sys.exit(1)", CLI),
        (
            "a wrong flag prints the usage, too",
            'parser.exit(2, f"{parser.prog}: {message}\\n")',
            'parser.exit(2, f"{parser.format_usage()}{parser.prog}: {message}\\n")',
            CLI,
        ),
    ]
]
