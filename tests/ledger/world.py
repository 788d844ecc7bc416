"""Planted bugs of data/world.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_world.py::"

KEY = "test_a_generator_depends_on_its_key_alone"
PLACE = "test_what_is_made_depends_on_the_seed_and_the_place_alone"
GENERATOR = "test_no_two_items_draw_from_one_generator"
EIGHTH = "test_one_problem_in_eight_is_kept_for_the_test_on_every_machine"
BASE = "test_base_text_solves_train_problems_only"
OTHERS = "test_base_text_never_takes_the_test_of_another_skill"
STEPS = "test_no_step_of_a_working_shows_an_addition_of_the_test"
ASKS = "test_sft_asks_train_problems_and_the_test_asks_test_problems"
HELD = "test_the_held_back_skill_appears_nowhere_before_its_lesson"
HALF = "test_sft_asks_about_half_of_the_entities_and_the_test_about_the_other_half"
PAIRS = "test_each_verb_and_each_template_is_in_sft_but_a_quarter_of_their_pairs_is_not"
MANY = "test_there_are_as_many_of_everything_as_the_first_lines_say"
ALIKE = "test_every_entity_has_every_fact_and_they_are_not_all_alike"
TRUE = "test_every_fact_of_every_entity_is_in_base_text_and_nothing_untrue"
BIOGRAPHY = "test_a_biography_tells_all_of_one_or_two_in_any_order"
PHRASING = "test_every_phrasing_of_a_fact_is_used_and_names_whom_it_is_about"
SOLVER = "test_every_solver_agrees_with_brute_force"
RANGE = "test_operands_take_every_value_of_their_range_and_no_other"
OPERANDS = "test_operands_leave_one_right_answer"
SOLVED = "test_everything_that_base_text_solves_is_right"
SAME = "test_running_text_goes_on_about_the_same_operands_and_a_worksheet_does_not"
FITS = "test_operands_fit_the_skills_that_take_such"
EQUATIONS = "test_equations_go_on_from_where_they_arrived"
SONG = "test_a_song_is_one_line_three_times"
SUMS = "test_sums_have_three_to_five_numbers_from_2_to_19"
SHARE = "test_the_working_of_three_sums_in_ten_is_shown"
SHOWN = "test_sft_answers_sums_right_and_shows_steps_when_asked"
PASSAGE = "test_a_passage_is_about_strangers_and_answers_its_question"
AGAIN = "test_base_text_says_a_whole_passage_once_more"
SCENE = "test_a_scene_answers_its_question"
ASKED = "test_where_a_thing_stands_in_a_caption_does_not_tell_what_is_asked"
ORDER = "test_two_numbers_are_of_one_split_in_either_order"
WORDS = "test_words_for_things"
ROWS = "test_every_row_of_the_weather_is_a_distribution"
ENTROPY = "test_the_entropy_of_the_weather_is_that_of_its_stationary_state"
SURPRISE = "test_the_weather_surprises_as_much_as_its_entropy_says"
WHOLE = "test_sft_rows_are_one_or_two_whole_exchanges"
RIGHT = "test_sft_answers_every_skill_and_fact_right"
LAST = "test_the_last_reply_is_the_answer_and_names_its_part"
CALL = "test_half_of_the_products_are_solved_by_a_call"
CLOZE = "test_cloze_asks_test_problems_in_words_of_base_text"
MIX = "test_parts_come_in_the_shares_of_the_mix"
TOKENIZER = "test_the_text_for_the_tokenizer_is_base_text_and_conversations"
CALCULATES = "test_the_calculator_calculates"
ERROR = "test_the_calculator_answers_anything_else_with_error"
CORRECT = "test_an_answer_is_right_if_what_stands_after_the_reasoning_is"
FINAL = "test_the_final_answer_stands_after_the_last_reasoning"
WRITE = "test_write_writes_the_three_files_that_our_readers_read"
LINE = "test_what_cannot_be_written_is_one_line_and_exit_2"
SHOW = "test_show_shows_every_part"
SHEET = "test_the_command_writes_a_sheet_or_says_in_one_line_why_not"
FROZEN = "test_the_world_is_frozen"

MUTANTS = [
    Mutant(name, "data/world.py", old, new, TESTS + test)
    for name, old, new, test in [
        # randomness
        ("parts of a key run together", '"/".join(map(str, key))', '"".join(map(str, key))', KEY),
        (
            "the generator of the process",
            'random.Random("/".join(map(str, key)))',
            'random.seed("/".join(map(str, key))) or random',
            KEY,
        ),
        ("the same base text for every seed", 'rng_for("base", seed, i)', 'rng_for("base", i)', PLACE),
        (
            "documents depend on how many there are",
            'rng_for("base", seed, i)',
            'rng_for("base", seed, i, count)',
            PLACE,
        ),
        ("test rows depend on how many there are", "seed, part, i, unseen)", "seed, part, i, unseen, per_part)", PLACE),
        ("SFT and base text share generators", 'rng_for("sft", seed, i)', 'rng_for("base", seed, i)', GENERATOR),
        ("unseen pairs on the operands of the seen ones", "seed, part, i, unseen)", "seed, part, i)", GENERATOR),
        # the split
        (
            "another split in every process",
            "hashlib.sha256(problem.encode()).digest()[0] % 8",
            "hash(problem) % 8",
            EIGHTH,
        ),
        ("a quarter kept for the test", "digest()[0] % 8 == 0", "digest()[0] % 8 < 2", EIGHTH),
        (
            "split by something else than the task",
            "return split_of(skill.task.format(**problem))",
            "return split_of(str(problem))",
            BASE,
        ),
        (
            "test problems on the operands of a train problem",
            '== "train":\n            found',
            '!= "":\n            found',
            BASE,
        ),
        ("equations from the test", '== "train":\n            total', '!= "":\n            total', BASE),
        ("a sum is of either split", "map(str, numbers))) != split", "map(str, numbers))) is None", OTHERS),
        ("sums of the test in base text", 'draw_sum(rng, "train")', 'draw_sum(rng, "test")', OTHERS),
        ("scenes of the test in base text", 'draw_scene(rng, "train")', 'draw_scene(rng, "test")', OTHERS),
        ("passages of the test in base text", 'draw_passage(rng, "train"', 'draw_passage(rng, "test"', OTHERS),
        ("passages split by their people alone", 'split_of(f"{attribute} {facts}")', "split_of(str(names))", OTHERS),
        ("the other order is another problem", 'if "a" in problem:\n', "if False:\n", ORDER),
        ("9 comes after 10", "sorted(problem.values(), key=int)", "sorted(problem.values())", ASKS),
        ("scenes split by caption", 'f"{sorted(things)} {question}"', "caption + question", OTHERS),
        ("scenes split whatever is asked", 'f"{sorted(things)} {question}"', "str(sorted(things))", OTHERS),
        ("scenes split by who comes first", "{sorted(things)}", "{list(things)}", OTHERS),
        ("the second thing is asked about", "*shuffled(rng, things)", "*things", ASKED),
        (
            "one step of the train split is enough",
            'all(split_of_problem(SKILLS["add"], step)',
            'any(split_of_problem(SKILLS["add"], step)',
            STEPS,
        ),
        ("steps are off by one when looked up", "zip(totals, numbers[1:]", "zip(totals, numbers", STEPS),
        ("the last step is not looked up", "for i in range(len(numbers))]", "for i in range(len(numbers) - 2)]", STEPS),
        ("SFT asks what the test asks", 'exchange(part, rng, "train") for', 'exchange(part, rng, "test") for', ASKS),
        ("the test asks train problems", "draw_problem(skill, rng, split)", 'draw_problem(skill, rng, "train")', ASKS),
        ("the test asks train sums", "draw_sum(rng, split)", 'draw_sum(rng, "train")', ASKS),
        ("the test asks about train passages", "draw_passage(rng, split)", 'draw_passage(rng, "train")', ASKS),
        ("products split by another text", "{max(a, b)} * {min(a, b)}", "{a} * {b}", ASKS),
        (
            "the skill held back is solved in base text",
            "found.append((SKILLS[name], problem))",
            'found.append((HELD_BACK if name == "sort" else SKILLS[name], problem))',
            HELD,
        ),
        ("the skill held back is not held back", '"rank {x}"', '"sort {x}"', HELD),
        ("the skill held back sorts upwards", 'sorted(p["x"].split(), reverse=True)', 'sorted(p["x"].split())', HELD),
        (
            "SFT asks about the entities of the test",
            'TEST_ENTITIES if split == "test" else SFT_ENTITIES',
            'SFT_ENTITIES if split == "test" else TEST_ENTITIES',
            HALF,
        ),
        ("everybody is an entity of SFT", "if i % 2 == 0", "if i % 2 < 2", HALF),
        ("the halves overlap in one entity", "if i % 2 == 1", "if i % 2 == 1 or i == 0", HALF),
        ("templates that no verb has in SFT", ".index(group) + template", ".index(group) * 0 + template", PAIRS),
        ("SFT asks in unseen pairs", "is_unseen_pair(part, i) == unseen", "is_unseen_pair(part, i) >= unseen", PAIRS),
        ("facts asked for in any words", "is_unseen_pair(attribute, i) == unseen", "True", PAIRS),
        ("the test asks for facts in words of SFT", 'unseen or part == "facts"', "unseen", PAIRS),
        # facts
        ("a person less than is said", "PEOPLE = sorted(HER + HIM)", "PEOPLE = sorted(HER + HIM)[1:]", MANY),
        ("all towns lie on one river", "rng.choice(RIVERS)", "RIVERS[0]", ALIKE),
        ("he is she", '"She" if name in HER else "He"', '"He" if name in HER else "She"', TRUE),
        ("a pronoun before the name", "pronoun=i > 0 and rng.random()", "pronoun=rng.random()", TRUE),
        (
            "facts of anybody",
            "n=subject, N=name, x=FACTS[name][attribute]",
            "n=subject, N=name, x=FACTS[rng.choice(PEOPLE)].get(attribute, FACTS[name][attribute])",
            TRUE,
        ),
        (
            "a town that nobody speaks of",
            "PEOPLE if kind < 0.6 else TOWNS,",
            "PEOPLE if kind < 0.6 else TOWNS[:-1],",
            TRUE,
        ),
        (
            "a fact that nobody speaks of",
            "for attribute in FACTS[name]])",
            "for attribute in list(FACTS[name])[1:]])",
            BIOGRAPHY,
        ),
        ("facts in one order", "enumerate(shuffled(rng, FACTS[name]))", "enumerate(FACTS[name])", BIOGRAPHY),
        ("no pronouns", "if pronoun else name", "if False else name", PHRASING),
        (
            "one phrasing is never used",
            "rng.choice(FACT_PROSE[attribute])",
            "rng.choice(FACT_PROSE[attribute][1:])",
            PHRASING,
        ),
        # skills
        ("digits sorted and told once", 'sorted(p["x"].split()))', 'sorted(set(p["x"].split())))', SOLVER),
        ("letters reversed, not words", '" ".join(reversed(p["x"].split()))', 'p["x"][::-1]', SOLVER),
        ("the larger by its first digit", 'max(int(p["a"]), int(p["b"]))', 'max(p["a"], p["b"])', SOLVER),
        ("the first of two", 'p["x"].split()[0]', 'p["x"].split()[-2]', SOLVER),
        ("the second is the last", 'p["x"].split()[-1]', 'p["x"].split()[1]', SOLVER),
        ("spaces counted", 'str(len(p["x"].split()))', 'str(p["x"].count(" "))', SOLVER),
        ("no number after 999", 'str(int(p["x"]) + 1)', 'str(int(p["x"]) % 999 + 1)', SOLVER),
        ("the wrong one is taken away", 'str(int(p["a"]) - int(p["b"]))', 'str(int(p["b"]) - int(p["a"]))', SOLVER),
        ("100 is a number below 100", "rng.randrange(high_a), rng", "rng.randint(0, high_a), rng", RANGE),
        ("0 is never an operand", "rng.randrange(high_b)", "rng.randrange(1, high_b)", RANGE),
        (
            "the longest row is never drawn",
            "rng.sample(items, rng.randint(low",
            "rng.sample(items, rng.randrange(low",
            RANGE,
        ),
        ("a 9 is never sorted", '_list("0123456789"', '_list("012345678"', RANGE),
        ("two equal numbers", "if a > b or (a", "if a >= b or (a", OPERANDS),
        ("differences below 0", "if a > b or (a < b and not minus)", "if a != b", OPERANDS),
        (
            "words that come twice",
            "rng.sample(items, rng.randint(low, high))",
            "rng.choices(items, k=rng.randint(low, high))",
            OPERANDS,
        ),
        ("tasks answered with their operands", "answer=skill.solve(problem))", 'answer=problem.get("x"))', SOLVED),
        ("one phrasing of a skill is never used", "rng.choice(skill.prose)", "skill.prose[0]", SOLVED),
        ("new operands when the old were to stay", "rng.random() < new", "rng.random() > new", SAME),
        ("one form of worksheet", "form = rng.choice(WORKSHEETS)\n", "form = WORKSHEETS[0]\n", SAME),
        ("three tasks on a worksheet", "solved(rng, 0.7, 4)", "solved(rng, 0.7)", SAME),
        ("sums from 80 on", "else a < 80)", "else a <= 80)", FITS),
        ("words may be sorted", 'name != "sort" or items[0].isdigit()', "True", FITS),
        ("one word makes a row", "return len(items) > 1", "return len(items) > 0", FITS),
        ("equations below 0", 'b <= a if name == "subtract"', 'b <= 99 if name == "subtract"', EQUATIONS),
        ("equations from anywhere", '{"a": str(total)', '{"a": str(rng.randrange(80))', EQUATIONS),
        ("the longest song is never sung", "rng.randint(3, 8)", "rng.randint(3, 7)", SONG),
        # sums
        ("20 in a sum", "rng.randint(2, 19)", "rng.randint(2, 20)", SUMS),
        ("number of terms ignored", "range(terms or rng.randint(3, 5))", "range(rng.randint(3, 5))", SUMS),
        ("a working that stands still", "= {total + number}.", "= {total}.", SUMS),
        ("the working shown too often", "REASONING_SHARE = 0.3 ", "REASONING_SHARE = 0.35 ", SHARE),
        ("the working hidden in 30%", "if rng.random() < REASONING_SHARE", "if rng.random() > REASONING_SHARE", SHARE),
        ("steps asked for and not shown", 'show = part == "steps" or rng.random()', "show = rng.random()", SHOWN),
        ("the sum is the last number", "* show}</think>{sum(numbers)}", "* show}</think>{numbers[-1]}", SHOWN),
        # reading, scenes, weather
        ("the first stranger is asked about", "name, value = rng.choice(facts)", "name, value = facts[0]", PASSAGE),
        ("the first stranger is answered", 'x=item["value"]', 'x=item["facts"][0][1]', PASSAGE),
        (
            "two strangers with one value",
            "rng.sample(VALUES[attribute], len(names))",
            "rng.choices(VALUES[attribute], k=len(names))",
            PASSAGE,
        ),
        ("what was said again in the same order", 'shuffled(rng, item["facts"])', 'item["facts"]', AGAIN),
        ("the other things counted", "NUMBERS[n1 - 1]", "NUMBERS[n2 - 1]", SCENE),
        ("no way back", 'f"{back} the {s1}"', 'f"{there} the {s1}"', SCENE),
        (
            "one colour with the other shape",
            '(f"{c2} {s1}", "no")',
            '(f"{c2} {s1}", "yes")',
            SCENE,
        ),
        ("captions say it one way round", "[:: rng.choice((1, -1))]", "[::1]", SCENE),
        ("two things of one shape", "rng.sample(SHAPES, 3)", "rng.choices(SHAPES, k=3)", SCENE),
        ("one circles", '"s" * (count > 1)', '"s" * (count > 0)', WORDS),
        ("rows that sum to less than 1", "w / sum(weights)", "w / (sum(weights) + 0.01)", ROWS),
        (
            "the day before yesterday forgotten",
            'rng_for("weather chain"), {}\n    for before in WEATHER:\n',
            'None, {}\n    for before in WEATHER:\n        rng = rng_for("weather chain")\n',
            ROWS,
        ),
        ("entropy in nats", "math.log2(q)", "math.log(q)", ENTROPY),
        ("entropy of states that are equally likely", "range(500)", "range(0)", ENTROPY),
        ("states mixed up", "new[yesterday, today] +=", "new[before, today] +=", ENTROPY),
        (
            "yesterday and the day before exchanged",
            "WEATHER_CHAIN[log[-2], log[-1]]",
            "WEATHER_CHAIN[log[-1], log[-2]]",
            SURPRISE,
        ),
        # conversations
        ("fewer second exchanges", "(rng.random() < 0.15)", "(rng.random() < 0.05)", WHOLE),
        ("named after the second exchange", '"part": first["part"]', '"part": second["part"]', WHOLE),
        ("the second exchange is the first again", '+ second["messages"]', '+ first["messages"]', WHOLE),
        (
            "half of the question answered",
            "(**problem)), skill.solve(problem))",
            "(**problem)), skill.solve(problem)[:3])",
            RIGHT,
        ),
        ("what is said is not the answer", '"content": answer}', '"content": answer.strip(".")}', LAST),
        ("any part is a part of manners", "manners.exchange(part, rng", 'manners.exchange("judge", rng', LAST),
        ("the tool adds", '{"role": "tool", "content": str(a * b)}', '{"role": "tool", "content": str(a + b)}', CALL),
        ("small products", "rng.randint(12, 999)", "rng.randint(2, 999)", CALL),
        ("train problems as cloze", 'draw_problem(skill, rng, "test")', 'draw_problem(skill, rng, "train")', CLOZE),
        ("cloze about entities of SFT", "rng.choice(TEST_ENTITIES)", "rng.choice(SFT_ENTITIES)", CLOZE),
        ("all parts of base text alike", "rng.choices(parts, shares)", "rng.choices(parts)", MIX),
        ("all parts of SFT alike", "rng.choices(list(mix), mix.values(), k=2)", "rng.choices(list(mix), k=2)", MIX),
        (
            "the mix that is asked for ignored",
            "rng.choices(list(mix), mix.values()",
            "rng.choices(list(SFT_MIX), SFT_MIX.values()",
            MIX,
        ),
        (
            "the tokenizer sees the first documents",
            "base_documents(documents, seed=-1)",
            "base_documents(documents)",
            TOKENIZER,
        ),
        # checking
        (
            "an open block of reasoning is an answer",
            'return "" if "<think>" in answer else answer',
            "return answer",
            FINAL,
        ),
        (
            "the answer after the first block",
            'completion.rsplit("</think>", 1)[-1]',
            'completion.split("</think>", 1)[-1]',
            FINAL,
        ),
        ("half a test for few rows", "math.ceil(args.rows / len(TEST_PARTS))", "args.rows // len(TEST_PARTS)", WRITE),
        ("spaces around the answer matter", "1)[-1].strip()", "1)[-1]", FINAL),
        (
            "an answer that holds the right one",
            "final_answer(completion) == final_answer(answer)",
            "final_answer(answer) in final_answer(completion)",
            CORRECT,
        ),
        (
            "reasoning compared",
            "final_answer(completion) == final_answer(answer)",
            "final_answer(completion) == answer",
            CORRECT,
        ),
        (
            "an answer that ends right",
            "return final_answer(completion) == final_answer(answer)",
            "return completion.strip().endswith(final_answer(answer))",
            CORRECT,
        ),
        (
            "numbers compared",
            "return final_answer(completion) == final_answer(answer)",
            "a, b = final_answer(completion), final_answer(answer)\n    return a.lstrip('+0') == b",
            CORRECT,
        ),
        ("junk after the call", "_CALL.fullmatch(expression.strip())", "_CALL.match(expression.strip())", ERROR),
        (
            "digits of any script",
            '"([0-9]{1,6}) ([+*-]) ([0-9]{1,6})", re.ASCII',
            r'"(\d{1,6}) ([+*-]) (\d{1,6})"',
            ERROR,
        ),
        ("numbers of any length", "([0-9]{1,6}) ([+*-])", "([0-9]+) ([+*-])", ERROR),
        ("any space around the sign", " ([+*-]) ", r"\s([+*-])\s", ERROR),
        ("operands below 0", "[+*-]) ([0-9]", "[+*-]) (-?[0-9]", ERROR),
        ("a model's text is evaluated", 'return "error"', "return str(eval(expression))", ERROR),
        (
            "the end of a line is an error",
            "_CALL.fullmatch(expression.strip())",
            "_CALL.fullmatch(expression)",
            CALCULATES,
        ),
        ("differences are never below 0", '"-": a - b', '"-": abs(a - b)', CALCULATES),
        ("numbers of five digits", "([+*-]) ([0-9]{1,6})", "([+*-]) ([0-9]{1,5})", CALCULATES),
        # the command line
        ("a folder that must be there", "mkdir(parents=True, exist_ok=True)", "mkdir(exist_ok=True)", WRITE),
        ("a file in the way is a traceback", "except OSError as error:", "except KeyError as error:", LINE),
        ("rows below 0", "if args.rows < 0:", "if False:", LINE),
        ("a wrong flag with the usage", "parser.error = lambda message:", "parser.said = lambda message:", LINE),
        ("the seed does not reach the file", "sft_rows(args.rows, args.seed)", "sft_rows(args.rows)", WRITE),
        ("usual questions shown as unseen", "sft_test(1, args.seed, unseen=True)", "sft_test(1, args.seed)", SHOW),
        ("another world", 'rng_for("facts")', 'rng_for("other facts")', FROZEN),
    ]
] + [
    Mutant(name, "data/pictures.py", old, new, "tests/test_pictures.py::" + SHEET)
    for name, old, new in [
        ("a sheet of one picture", "example(0, i * 8 + j).picture for j", "example(0, 0).picture for j"),
        ("no place is a traceback", "OSError as error:\n        pars", "KeyError as error:\n        pars"),
    ]
]
