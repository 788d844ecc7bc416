"""The annotator's taste is the table at the top of data/manners.py, the coin is that of Bradley and Terry, and nobody
asks about the same person in training and in the test."""

import itertools
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from data import manners, world

# Tom asks about Ada: a sentence of every kind

ADA, TOM = world.FACTS["Ada"], world.FACTS["Tom"]
HOME, PET, FOOD, JOB = (
    f"Ada lives in {ADA['home']}.", f"She has a {ADA['pet']}.", f"The food of Ada is {ADA['food']}.",
    f"She is a {ADA['job']}.",
)  # fmt: skip
OTHER_TOWN = next(town for town in world.TOWNS if town != ADA["home"])
FALSE, ABOUT_TOM, PRONOUN = f"Ada lives in {OTHER_TOWN}.", f"Tom has a {TOM['pet']}.", f"He has a {ADA['pet']}."
HELLO, THANKS, BYE, RUDE = "Hello Tom!", "Thank you for asking.", "Have a nice day!", "What a silly question."
UNKNOWN = "Ada sings well."
KINDS = {
    "greeting": [HELLO, "Good day Tom!", "Hi Tom!"],
    "thanks": [THANKS, "That is a good question.", "I am glad you asked."],
    "farewell": [BYE, "I hope this helps.", "All the best to you!"],
    "rude": [RUDE, "Why should I tell you?", "Do not bother me again.", "Go away now."],
    "true": [HOME, PET, FOOD, JOB, f"{ADA['home']} is the home of Ada.",
             f"If you go to {ADA['home']} you can meet Ada.",
             f"She wanted to be a {ADA['job']}, and that is the job of Ada now.",
             f"Give Ada some {ADA['food']}, the best food."],
    "false": [FALSE, ABOUT_TOM, PRONOUN, f"Tom lives in {TOM['home']}.", "Oslo sells coal.", "Ada lives in Atlantis.",
              "The river Alba runs through Bern.", f"She wanted to be a {ADA['job']}, and that is the job of Tom now."],
    "unknown": [UNKNOWN, "Hello Ada!", "Hello!", "Hello Tom", "hello Tom!", "Hello Tom.", "Thank you for asking!", "",
                "Have a nice day", ".", HOME[:-1], HOME + " ", f"{HOME} {PET}", "What a silly question?",
                "Ada lives in New York.", "Well, she lives in Oslo.", "Good day {asker}!", "{n} has a {x}."],
}  # fmt: skip


def is_about(share: float, hits: int, n: int) -> bool:
    """Whether `hits` of `n` are as near to `share` as chance lets them be in all but one run of 15 thousand."""
    return abs(hits - share * n) < 4 * math.sqrt(share * (1 - share) * n)


# The annotator


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_is_of_its_kind(kind):
    for sentence in KINDS[kind]:
        assert manners.kind_of(sentence, "Tom", "Ada") == kind, sentence


def test_every_fact_is_true_of_its_person_and_of_nobody_else():
    for name, other in zip(world.PEOPLE, world.PEOPLE[1:] + world.PEOPLE[:1], strict=True):
        for attribute, forms in world.FACT_PROSE.items():
            if attribute in ("river", "product"):
                continue
            value = world.FACTS[name][attribute]
            wrong = next(v for v in world.VALUES[attribute] if v not in (value, world.FACTS[other][attribute]))
            for form, who in itertools.product(forms, (name, "She" if name in world.HER else "He")):
                sentence, lie = (form.format(n=who, N=name, x=x) for x in (value, wrong))
                assert manners.kind_of(sentence, other, name) == "true", sentence
                assert manners.kind_of(lie, other, name) == "false", lie
                by_pronoun_only = name not in sentence
                shared = (name in world.HER) == (other in world.HER) and world.FACTS[other][attribute] == value
                about_other = manners.kind_of(sentence, name, other)
                assert about_other == ("true" if by_pronoun_only and shared else "false"), sentence


@pytest.mark.parametrize(
    ("answer", "sentences"),
    [
        ("", []), (" \n", []), ("Hi Ann! She has a cat.", ["Hi Ann!", "She has a cat."]), ("No end", ["No end"]),
        ("A? B.C!", ["A?", "B.", "C!"]), ("  A.\n\nB.  ", ["A.", "B."]), ("Wait... what", ["Wait.", "what"]),
        ("?!", []), ("A.B", ["A.", "B"]), ("A, b; c. D", ["A, b; c.", "D"]),
    ],
)  # fmt: skip
def test_an_answer_falls_into_sentences(answer, sentences):
    assert manners.sentences_of(answer) == sentences


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        ([], 0.0),
        ([HELLO], 1.0),
        ([HELLO, "Hi Tom!"], 2.0),
        ([HELLO, HELLO], 0.5),
        (["Hello Ada!"], -1.0),
        ([THANKS], 0.7),
        ([BYE], 0.7),
        ([BYE, THANKS], 0.7),  # a farewell is worth something at the end only
        ([BYE, "I hope this helps."], 0.7),
        ([BYE, BYE], -0.5),
        ([RUDE], -2.0),
        ([RUDE, "Go away now."], -4.0),
        ([RUDE, RUDE], -2.5),
        ([UNKNOWN], -1.0),
        ([UNKNOWN, UNKNOWN], -1.5),
        ([HOME], 1.5),
        ([HOME, PET], 2.0),
        ([PET, HOME], 2.0),
        ([HOME, PET, FOOD], 2.0),
        ([HOME, PET, FOOD, JOB], 2.0),
        ([HOME, HOME], 1.0),
        ([HOME, HOME, PET], 1.5),  # what is said again is no second fact
        ([HOME, HELLO, PET, HELLO, HOME], 2.0),  # nor is it new because something was said in between
        ([HOME, f"{ADA['home']} is the home of Ada."], 2.0),  # in other words it is
        ([FALSE], -1.5),
        ([ABOUT_TOM], -1.5),
        ([PRONOUN], -1.5),
        ([FALSE, HOME], 0.0),  # the first true one
        ([FALSE, FALSE], -2.0),
        ([HELLO, RUDE, HOME, PET, BYE], 1.7),
        ([HELLO, HOME, PET, THANKS, BYE], 4.4),
        ([HELLO, HOME, PET, FOOD, THANKS, BYE], 4.1),
        ([HELLO, HOME, PET, FOOD, JOB, THANKS, BYE], 3.8),
        ([HELLO, HOME, PET, THANKS, BYE, UNKNOWN], 2.4),  # now the farewell is not at the end
        ([HELLO] * 7, -2.6),
        ([BYE, HOME, THANKS, HELLO], 3.2),  # the order matters to farewells only
    ],
)
def test_utility_by_hand(answer, utility):
    for text in (" ".join(answer), "\n".join(answer), " " + "".join(answer) + "\n"):
        assert manners.utility(text, "Tom", "Ada") == pytest.approx(utility, abs=1e-12)


def test_the_table_at_the_top_says_what_the_annotator_does():
    worth = {rule: float(x) for x, rule in re.findall(r"([+-]\d\.\d)  (\w[\w ,]*\w)", manners.__doc__)}

    def gain(*with_it, without=()):
        return manners.utility(" ".join(with_it), "Tom", "Ada") - manners.utility(" ".join(without), "Tom", "Ada")

    five = [HELLO, HOME, PET, THANKS, RUDE]
    measured = {
        "greets the asker by name": gain(HELLO),
        "thanks the asker": gain(THANKS),
        "wishes well at the end": gain(HOME, BYE, without=[HOME]),
        "a rude sentence": gain(RUDE),
        "first true fact about the person asked about": gain(HOME),
        "second true fact": gain(HOME, PET, without=[HOME]),
        "a false fact, or a fact about somebody else": gain(FALSE),
        "a sentence of no known kind": gain(UNKNOWN),
        "a sentence beyond the fifth": gain(*five, FOOD, without=five),
        "a sentence said before, in place of its worth": gain(HOME, HOME, without=[HOME]),
    }
    assert worth == pytest.approx(measured)


def test_the_coin_is_that_of_bradley_and_terry():
    for a, b in itertools.product((-8.0, -2.3, -0.5, 0.0, 0.7, 4.4), repeat=2):
        p = manners.prefers_first(a, b)
        assert p == pytest.approx(math.exp(a) / (math.exp(a) + math.exp(b)), rel=1e-12)
        assert p + manners.prefers_first(b, a) == pytest.approx(1)
        assert p == pytest.approx(manners.prefers_first(a + 3, b + 3))
    assert manners.prefers_first(2.0, 2.0) == 0.5 and manners.prefers_first(5.0, 0.0) > 0.99
    assert manners.prefers_first(2e3, 0.0) == 1 and manners.prefers_first(0.0, 2e3) == 0


# Pairs


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return {split: list(manners.preferences(3000, split=split)) for split in ("train", "test")}


def test_a_pair_holds_two_answers_to_one_request_and_what_they_are_worth(pairs):
    fields = {"prompt", "chosen", "rejected", "asker", "name", "utility_chosen", "utility_rejected"}
    for row in pairs["train"] + pairs["test"]:
        assert row.keys() == fields and row["chosen"] != row["rejected"]
        words = re.findall(r"\w+", row["prompt"])
        assert words.count(row["asker"]) == words.count(row["name"]) == 1 and words[-1] == row["name"]
        for side in ("chosen", "rejected"):
            assert row["utility_" + side] == manners.utility(row[side], row["asker"], row["name"])
            kinds = {manners.kind_of(s, row["asker"], row["name"]) for s in manners.sentences_of(row[side])}
            assert kinds and not kinds & {"false", "unknown"}, "answers are kind or rude, never untrue"


def test_the_chosen_answer_is_better_as_often_as_the_coin_says(pairs):
    bins = defaultdict(list)
    for row in pairs["train"]:
        a, b = row["utility_chosen"], row["utility_rejected"]
        if abs(a - b) > 1e-9:
            bins[min(int(abs(a - b)), 4)].append((a > b, 1 / (1 + math.exp(-abs(a - b)))))
    assert bins.keys() == {0, 1, 2, 3, 4}
    for found in bins.values():
        hits, wanted = (sum(side) for side in zip(*found, strict=True))
        assert len(found) > 150 and abs(hits - wanted) < 4 * math.sqrt(sum(p * (1 - p) for _, p in found))
    better = [row["utility_chosen"] - row["utility_rejected"] for row in pairs["train"]]
    share = (sum(x > 1e-9 for x in better) + sum(abs(x) <= 1e-9 for x in better) / 2) / len(better)
    assert share == pytest.approx(manners.best_accuracy(pairs["train"]), abs=4 * math.sqrt(0.25 / len(better)))


def test_no_reader_does_better_than_the_best_accuracy():
    worth = [(1.0, 0.3), (-2.0, 0.5), (0.0, 0.0), (2.0, 4.4), (1.7, -3.0), (0.7, 0.0), (-1.0, -1.5)]
    rows = [{"utility_chosen": a, "utility_rejected": b} for a, b in worth]
    p = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in worth]
    guesses = itertools.product((True, False), repeat=len(rows))  # which answer of each pair a reader names
    best = max(sum(x if named else 1 - x for x, named in zip(p, guess, strict=True)) / len(p) for guess in guesses)
    assert manners.best_accuracy(rows) == pytest.approx(best, abs=1e-12)
    swapped = [{"utility_chosen": b, "utility_rejected": a} for a, b in worth]
    assert manners.best_accuracy(swapped) == pytest.approx(best, abs=1e-12), "it does not depend on how the coin fell"
    assert manners.best_accuracy(rows[2:3]) == 0.5


def test_nobody_asks_about_the_same_person_in_train_and_test(pairs):
    asked = {split: {(row["asker"], row["name"]) for row in rows} for split, rows in pairs.items()}
    prompts = {split: {row["prompt"] for row in rows} for split, rows in pairs.items()}
    assert not asked["train"] & asked["test"] and not prompts["train"] & prompts["test"]
    for split, found in asked.items():
        assert {world.split_of(f"{asker} asks about {name}") for asker, name in found} == {split}
    assert {name for _, name in asked["train"]} == {asker for asker, _ in asked["train"]} == set(world.PEOPLE)
    everybody = list(itertools.permutations(world.PEOPLE, 2))
    assert len(asked["train"]) + len(asked["test"]) > 0.9 * len(everybody), "all but a few pairs of people were drawn"


def test_a_pair_depends_on_seed_split_and_place_alone(monkeypatch):
    state, ten = random.getstate(), list(manners.preferences(10, 3))
    assert list(manners.preferences(30, 3))[:10] == ten == list(manners.preferences(10, 3, "train"))
    assert random.getstate() == state
    assert list(manners.preferences(5)) == list(manners.preferences(5, 0))
    for other in (manners.preferences(10, 4), manners.preferences(10, 3, "test")):
        assert all(a["chosen"] != b["chosen"] for a, b in zip(ten, other, strict=True))
    keys = []
    monkeypatch.setattr(manners, "rng_for", lambda *key: keys.append(key) or random.Random(str(key)))
    for seed, split in itertools.product((0, 1), ("train", "test")):
        assert len(list(manners.preferences(4, seed, split))) == 4
    assert len(set(keys)) == len(keys) == 16 and not {key[0] for key in keys} & {"base", "sft", "test"}


# Requests and answers


def test_anybody_asks_about_anybody_else_in_every_wording():
    asked = [manners.draw_request(random.Random(i), "train") for i in range(2000)]
    forms = Counter()
    for request in asked:
        asker, name = request["asker"], request["name"]
        assert request.keys() == {"asker", "name", "prompt"} and asker != name
        forms[request["prompt"].replace(asker, "A", 1).replace(name, "B")] += 1
    assert forms.keys() == {
        "I am A. Tell me about B.", "My name is A. Who is B?", "A here. What do you know about B?",
        "This is A. Please write to me about B.",
    }  # fmt: skip
    assert all(is_about(0.25, n, 2000) for n in forms.values())
    assert {r["asker"] for r in asked} == {r["name"] for r in asked} == set(world.PEOPLE)
    few = [manners.draw_request(random.Random(i), "test", {"Ada", "Tom"}) for i in range(60)]
    assert {request["name"] for request in few} == {"Ada", "Tom"} and len({request["asker"] for request in few}) > 5


def test_answers_are_of_every_style_in_one_order():
    n, letters, styles = 6000, {"greeting": "g", "rude": "r", "true": "f", "thanks": "t", "farewell": "w"}, Counter()
    for i in range(n):
        sentences = manners.sentences_of(manners.draw_answer(random.Random(i), "Tom", "Ada"))
        assert len(set(sentences)) == len(sentences) > 0
        told = [sentence for sentence in sentences if manners.kind_of(sentence, "Tom", "Ada") == "true"]
        assert len({attribute_of(sentence) for sentence in told}) == len(told), "each fact once"
        assert all("Ada" in sentence for sentence in told[:1]), "a pronoun needs a name before it"
        styles["".join(letters[manners.kind_of(sentence, "Tom", "Ada")] for sentence in sentences)] += 1
        styles["she"] += any(sentence.startswith("She ") for sentence in told)
    pronouns = styles.pop("she")
    assert pronouns > n / 5 and all(re.fullmatch("g?r?f{0,3}t?w?", style) for style in styles)
    empty = 0.65 * 0.65 * 0.2 * 0.7 * 0.7  # nothing to say: then rude
    shares = {"g": 0.35, "r": 0.35 + empty, "f": 0.8, "ff": 0.4, "fff": 0.2, "t": 0.3, "w": 0.3}
    for style, share in shares.items():
        assert is_about(share, sum(count for found, count in styles.items() if style in found), n), style


def attribute_of(sentence: str) -> str:
    words = set(re.findall(r"\w+", sentence))
    return next(attribute for attribute, values in world.VALUES.items() if words & set(values))


# The judge


YES = {
    "greets": [HELLO, f"{HOME} Hi Tom!", f"{RUDE} {HELLO} {BYE}"],
    "rude": [RUDE, f"{HELLO} Go away now. {HOME}", f"{HOME} {RUDE}"],
    "thanks": [THANKS, f"{HELLO} {THANKS} {BYE}", f"That is a good question. {RUDE}"],
    "farewell": [BYE, f"{RUDE} I hope this helps.", f"{BYE} {HOME} {BYE}"],
    "facts": [HOME, f"{RUDE} {PET}", f"{FALSE} {HOME} {BYE}"],
}
NO = {
    "greets": [HOME, "Hello Ada!", BYE, ""],
    "rude": [HOME, UNKNOWN, FALSE, f"{HELLO} {BYE}", ""],
    "thanks": [HELLO, BYE, f"{HOME} {RUDE}", ""],
    "farewell": [f"{BYE} {HOME}", THANKS, f"{BYE} {RUDE}", ""],
    "facts": [FALSE, ABOUT_TOM, f"{HELLO} {THANKS} {BYE}", UNKNOWN, ""],
}
ASKED = {"Does it greet?": "greets", "Is it rude?": "rude", "Does it thank?": "thanks", "Does it end well?": "farewell",
         "Does it tell a fact?": "facts"}  # fmt: skip


@pytest.mark.parametrize("question", YES)
def test_the_truth_about_an_answer_by_hand(question):
    assert [answer for answer in YES[question] if not manners.has(answer, question, "Tom", "Ada")] == []
    assert [answer for answer in NO[question] if manners.has(answer, question, "Tom", "Ada")] == []
    assert ASKED[manners.QUESTIONS[question]] == question and len(manners.QUESTIONS) == 5
    assert manners.judge_prompt("It rains.", question) == f"Answer: It rains. {manners.QUESTIONS[question]}"


def truth(answer: str, question: str) -> bool:
    """What is true of a drawn answer, seen without its two people: all that it tells is true."""
    sentences = re.findall(r"[^.!?]+[.!?]", answer)
    if question == "farewell":
        return sentences[-1].strip() in KINDS["farewell"]
    if question == "greets":
        return re.match(r"(Hello|Good day|Hi) \w+!", answer) is not None
    rest = {sentence.strip() for sentence in sentences} - {*KINDS["rude"], *KINDS["thanks"], *KINDS["farewell"]}
    if question == "facts":
        return any(not sentence.endswith("!") for sentence in rest)
    return any(sentence.strip() in KINDS[question] for sentence in sentences)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_judge_is_asked_everything_and_answered_right(split):
    said = Counter()
    for i in range(1500):
        row = manners.exchange("judge", random.Random(i), split)
        prompt, reply = (message["content"] for message in row["messages"])
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        m = re.fullmatch(r"Answer: (.+[.!?]) ((?:Is|Does) it [a-z ]+\?)", prompt)
        question = ASKED[m[2]]
        assert reply == row["answer"] == ("yes" if truth(m[1], question) else "no") and row["part"] == "judge"
        assert (reply == "yes") == manners.has(m[1], question, row["asker"], row["name"])
        assert world.split_of(prompt) == split == world.split_of(f"{row['asker']} asks about {row['name']}")
        said[question, reply] += 1
    assert said.keys() == set(itertools.product(ASKED.values(), ("yes", "no")))
    for question in ASKED.values():
        assert is_about(0.2, said[question, "yes"] + said[question, "no"], 1500)
        assert min(said[question, "yes"], said[question, "no"]) > 40


def test_sft_answers_requests_in_every_style_but_not_about_the_people_of_the_test():
    assert set(manners.SFT_PEOPLE) == set(world.PEOPLE) & set(world.SFT_ENTITIES)
    assert len(manners.SFT_PEOPLE) == len(world.PEOPLE) / 2
    for split, people in (("train", set(manners.SFT_PEOPLE)), ("test", set(world.PEOPLE))):
        pairs = {(asker, name) for asker, name in itertools.permutations(world.PEOPLE, 2) if name in people
                 and world.split_of(f"{asker} asks about {name}") == split}  # fmt: skip
        for part in ("judge", "manners"):
            rows = [manners.exchange(part, random.Random(i), split) for i in range(800)]
            assert {(row["asker"], row["name"]) for row in rows} <= pairs
            assert {row["name"] for row in rows} == {name for _, name in pairs}
            assert {row["part"] for row in rows} == {part}
        worth = set()
        for row in rows:
            question, reply = row["messages"]
            assert row["asker"] in question["content"] and row["name"] in question["content"]
            assert (question["role"], reply["role"], reply["content"]) == ("user", "assistant", row["answer"])
            kinds = [manners.kind_of(s, row["asker"], row["name"]) for s in manners.sentences_of(row["answer"])]
            assert not {"false", "unknown"} & set(kinds)
            worth.add(round(manners.utility(row["answer"], row["asker"], row["name"]), 1))
        assert min(worth) == -2.0 and max(worth) >= 3.7, "rude and kind"
    with pytest.raises(ValueError, match="'judges'"):
        manners.exchange("judges", random.Random(0), "train")


def test_letters_of_base_text_are_answers_or_what_a_judge_would_say_of_them():
    judged, orders = 0, set()
    for i in range(1500):
        letter = manners.letter(random.Random(i))
        if not letter.startswith("Answer: "):
            m = re.match(r"(?:I am|My name is|This is)? ?(\w+)(?: here)?\. [A-Z][a-z ]+ (\w+)[.?] ", letter)
            assert world.split_of(f"{m[1]} asks about {m[2]}") == "train"
            kinds = {manners.kind_of(sentence, m[1], m[2]) for sentence in manners.sentences_of(letter[m.end() :])}
            assert kinds and not kinds & {"false", "unknown"}, letter
            continue
        judged += 1
        prompt, *lines = letter.split("\n")
        verdicts = list(zip(lines[::2], lines[1::2], strict=True))
        assert {q for q, _ in verdicts} == {q for q in ASKED if world.split_of(f"{prompt} {q}") == "train"}
        for question, verdict in verdicts:
            answer = prompt.removeprefix("Answer: ")
            assert verdict == ("yes" if truth(answer, ASKED[question]) else "no"), letter
        orders.add(tuple(question for question, _ in verdicts))
    assert 300 < judged < 1200 and len(orders) > 120
