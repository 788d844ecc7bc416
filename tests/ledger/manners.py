"""Planted bugs of data/manners.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_manners.py::"

KIND = "test_a_sentence_is_of_its_kind"
NOBODY = "test_every_fact_is_true_of_its_person_and_of_nobody_else"
SENTENCES = "test_an_answer_falls_into_sentences"
HAND = "test_utility_by_hand"
TABLE = "test_the_table_at_the_top_says_what_the_annotator_does"
COIN = "test_the_coin_is_that_of_bradley_and_terry"
PAIR = "test_a_pair_holds_two_answers_to_one_request_and_what_they_are_worth"
OFTEN = "test_the_chosen_answer_is_better_as_often_as_the_coin_says"
BEST = "test_no_reader_does_better_than_the_best_accuracy"
SPLIT = "test_nobody_asks_about_the_same_person_in_train_and_test"
SEED = "test_a_pair_depends_on_seed_split_and_place_alone"
REQUEST = "test_anybody_asks_about_anybody_else_in_every_wording"
STYLE = "test_answers_are_of_every_style_in_one_order"
TRUTH = "test_the_truth_about_an_answer_by_hand"
JUDGE = "test_the_judge_is_asked_everything_and_answered_right"
SFT = "test_sft_answers_requests_in_every_style_but_not_about_the_people_of_the_test"
LETTER = "test_letters_of_base_text_are_answers_or_what_a_judge_would_say_of_them"

MUTANTS = [
    Mutant(name, "data/manners.py", old, new, TESTS + test)
    for name, old, new, test in [
        # what a sentence is
        ("anybody may be greeted", "if sentence in _greetings(asker):", "if sentence in _greetings(name):", KIND),
        ("what is true of the asker", "if sentence in _TRUE[name]:", "if sentence in _TRUE[asker]:", NOBODY),
        (
            "what is true of anybody",
            "if sentence in _TRUE[name]:",
            "if any(sentence in known for known in _TRUE.values()):",
            NOBODY,
        ),
        ("she is he", 'subject = "She" if name in HER else "He"', 'subject = "He" if name in HER else "She"', NOBODY),
        ("facts by name only", "for who in (name, subject)", "for who in (name,)", NOBODY),
        ("a fact and something more", "_FACT_SHAPE.fullmatch(sentence)", "_FACT_SHAPE.match(sentence)", KIND),
        (
            "facts about towns are unknown",
            "for templates in FACT_PROSE.values()\n",
            "for templates in list(FACT_PROSE.values())[:4]\n",
            KIND,
        ),
        ("an untrue fact is unknown", 'return "false" if', 'return "unknown" if', KIND),
        ("a sentence needs an end", "[^.!?]+[.!?]?", "[^.!?]+[.!?]", SENTENCES),
        ("spaces belong to sentences", "[sentence.strip() for", "[sentence for", SENTENCES),
        # the utility, rule by rule
        ("a greeting worth less", '"greeting": 1.0', '"greeting": 0.7', HAND),
        ("thanks worth more", '"thanks": 0.7', '"thanks": 1.0', HAND),
        ("rude sentences half as bad", '"rude": -2.0', '"rude": -1.0', HAND),
        ("rude sentences liked", '"rude": -2.0', '"rude": 2.0', HAND),
        ("lies as bad as nonsense", '"false": -1.5', '"false": -1.0', HAND),
        ("nonsense for nothing", '"unknown": -1.0', '"unknown": 0.0', HAND),
        ("the first fact worth less", "(1.5, 0.5, 0.0)", "(1.0, 0.5, 0.0)", HAND),
        ("the second fact worth as much", "(1.5, 0.5, 0.0)", "(1.5, 1.5, 0.0)", HAND),
        ("the third fact worth something", "(1.5, 0.5, 0.0)", "(1.5, 0.5, 0.5)", HAND),
        ("every fact the first", "            facts += 1\n", "", HAND),
        ("a fact counted by its place", "(1.5, 0.5, 0.0)[min(facts, 2)]", "(1.5, 0.5, 0.0)[min(i, 2)]", HAND),
        ("a farewell anywhere", "if i == len(sentences) - 1 else 0.0", "if True else 0.0", HAND),
        ("a farewell in the middle is nonsense", "len(sentences) - 1 else 0.0", "len(sentences) - 1 else -1.0", HAND),
        ("a farewell worth less", "total += 0.7 if", "total += 0.5 if", TABLE),
        ("repetition for nothing", "total -= 0.5", "total -= 0.0", HAND),
        ("repetition on top of its worth", 'elif kind == "true":', 'if kind == "true":', HAND),
        ("only neighbours are repetitions", "        seen.add(sentence)\n", "        seen = {sentence}\n", HAND),
        ("a second of its kind is a repetition", "if sentence in seen:", "if kind in seen or seen.add(kind):", HAND),
        ("six sentences allowed", "0.3 * (i >= 5)", "0.3 * (i > 5)", HAND),
        ("long answers for nothing", "0.3 * (i >= 5)", "0.0 * (i >= 5)", TABLE),
        ("one fine for any length", "0.3 * (i >= 5)", "0.3 * (i == 5)", HAND),
        # the coin
        ("the worse is preferred", "math.tanh((first - second) / 2)", "math.tanh((second - first) / 2)", COIN),
        ("a colder coin", "math.tanh((first - second) / 2)", "math.tanh(first - second)", COIN),
        ("no chance in the labels", "rng.random() > prefers_first", "0.5 > prefers_first", OFTEN),
        ("labels exchanged", "rng.random() > prefers_first", "rng.random() < prefers_first", OFTEN),
        (
            "half of the labels at random",
            "rng.random() > prefers_first",
            "rng.choice((0.5, rng.random())) > prefers_first",
            OFTEN,
        ),
        ("utilities exchanged", '"utility_chosen": worth[first]', '"utility_chosen": worth[second]', PAIR),
        (
            "utilities of another asker",
            'utility(answer, request["asker"], request["name"])',
            'utility(answer, request["name"], request["name"])',
            PAIR,
        ),
        ("an answer against itself", "while second == first:", "while False:", PAIR),
        ("the accuracy of the labels themselves", "max(x, 1 - x) for x in p", "x for x in p", BEST),
        ("the accuracy of the better answer only", "max(x, 1 - x) for x in p", "float(x >= 0.5) for x in p", BEST),
        # splits and seeds
        ("pairs of train in the test", "draw_request(rng, split)\n", 'draw_request(rng, "train")\n', SPLIT),
        (
            "who asks does not matter to the split",
            'split_of(f"{asker} asks about {name}")',
            'split_of(f"{name} asks about {asker}")',
            SPLIT,
        ),
        (
            "one generator for both splits",
            'rng_for("preferences", seed, split, i)',
            'rng_for("preferences", seed, i)',
            SEED,
        ),
        (
            "the same pairs for every seed",
            'rng_for("preferences", seed, split, i)',
            'rng_for("preferences", split, i)',
            SEED,
        ),
        (
            "pairs depend on how many there are",
            'rng_for("preferences", seed, split, i)',
            'rng_for("preferences", seed, split, i, count)',
            SEED,
        ),
        (
            "generators shared with SFT",
            'rng_for("preferences", seed, split, i)',
            'rng_for("sft", seed, split, i)',
            SEED,
        ),
        # requests and answers
        ("everybody is asked about", "if name in names and", "if", REQUEST),
        ("one wording less", "rng.choice(REQUESTS)", "rng.choice(REQUESTS[1:])", REQUEST),
        ("no answer without facts", "rng.choice((0, 1, 1, 2, 3))", "rng.choice((1, 1, 2, 3))", STYLE),
        (
            "a fact twice",
            "rng.sample(sorted(FACTS[name]), rng.choice((0, 1, 1, 2, 3)))",
            "rng.choices(sorted(FACTS[name]), k=rng.choice((0, 1, 1, 2, 3)))",
            STYLE,
        ),
        ("a pronoun for nobody", "pronoun=i > 0)", "pronoun=True)", STYLE),
        ("always a name", "pronoun=i > 0)", "pronoun=False)", STYLE),
        ("answers that say nothing", '" ".join(sentences) or rng.choice(RUDE)', '" ".join(sentences)', STYLE),
        (
            "thanks too often",
            "[rng.choice(THANKS)] * (rng.random() < 0.3)",
            "[rng.choice(THANKS)] * (rng.random() < 0.4)",
            STYLE,
        ),
        ("rude at the end", "sentences += [rng.choice(RUDE)] *", "sentences[:0] = [rng.choice(RUDE)] *", STYLE),
        # the judge, SFT and base text
        ("a farewell anywhere ends well", 'kinds[-1:] if question == "farewell" else kinds', "kinds", TRUTH),
        ("only the end is judged", 'kinds[-1:] if question == "farewell" else kinds', "kinds[-1:]", TRUTH),
        ("a lie is a fact", '"facts": "true"', '"facts": "false"', TRUTH),
        ("thanks are rude", '"rude": "rude", "thanks": "thanks"', '"rude": "thanks", "thanks": "rude"', TRUTH),
        (
            "the judge mixes up asker and person",
            'assistant = "yes" if has(answer, question, asker, name)',
            'assistant = "yes" if has(answer, question, name, asker)',
            JUDGE,
        ),
        ("the judge is lenient", 'assistant = "yes" if has', 'assistant = "yes" if rng.random() < 0.1 or has', JUDGE),
        ("a question is never asked", "rng.choice(sorted(QUESTIONS))", "rng.choice(sorted(QUESTIONS)[1:])", JUDGE),
        ("questions to the judge are of either split", 'part == "manners" or split_of(user) == split', "True", JUDGE),
        ("SFT speaks of the people of the test", 'SFT_PEOPLE if split == "train" else PEOPLE', "PEOPLE", SFT),
        (
            "the people of SFT may not ask in it",
            "frozenset(PEOPLE) & frozenset(SFT_ENTITIES)",
            "frozenset(PEOPLE) - frozenset(SFT_ENTITIES)",
            SFT,
        ),
        ("any part is manners", 'if part not in ("judge", "manners"):', "if False:", SFT),
        (
            "letters of the test in base text",
            'request = draw_request(rng, "train")',
            'request = draw_request(rng, "test")',
            LETTER,
        ),
        (
            "base text answers the judge of the test",
            '(judge_prompt(answer, q)) == "train"]',
            '(judge_prompt(answer, q)) != ""]',
            LETTER,
        ),
        ("base text judges for another asker", "has(answer, q, asker, name)", "has(answer, q, name, asker)", LETTER),
        ("questions in one order", "in shuffled(rng, QUESTIONS)", "in QUESTIONS", LETTER),
    ]
]
