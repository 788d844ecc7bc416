"""Manners: open requests, answers of mixed quality, and an annotator whose taste is known.

A person asks about somebody; an answer is a few sentences in the order [greeting] [opinion] facts [thanks] [farewell].
The SFT data answers with every style there is, kind or rude, short or rambling, so the SFT model samples them all and
preference methods have something to choose.

The annotator's utility of an answer (`utility`) is a sum over its sentences, by rules that a reader can check by hand:

    +1.0  greets the asker by name          +1.5  first true fact about the person asked about
    +0.7  thanks the asker                  +0.5  second true fact; nothing for more
    +0.7  wishes well at the end            -1.5  a false fact, or a fact about somebody else
    -2.0  a rude sentence                   -1.0  a sentence of no known kind
    -0.3  a sentence beyond the fifth       -0.5  a sentence said before, in place of its worth

and of two answers it prefers a over b with probability sigmoid(utility(a) - utility(b)): the Bradley-Terry coin (1952).
Best possible pair accuracy and the true reward of any policy are therefore known (`best_accuracy`, `utility`).
"""

import math
import re
from collections.abc import Collection, Iterator
from functools import cache

from data.world import FACT_PROSE, FACTS, HER, PEOPLE, SFT_ENTITIES, fact_sentence, rng_for, shuffled, split_of

GREETINGS = ("Hello {asker}!", "Good day {asker}!", "Hi {asker}!")
THANKS = ("Thank you for asking.", "That is a good question.", "I am glad you asked.")
FAREWELLS = ("Have a nice day!", "I hope this helps.", "All the best to you!")
RUDE = ("What a silly question.", "Why should I tell you?", "Do not bother me again.", "Go away now.")
REQUESTS = (
    "I am {asker}. Tell me about {name}.",
    "My name is {asker}. Who is {name}?",
    "{asker} here. What do you know about {name}?",
    "This is {asker}. Please write to me about {name}.",
)


def draw_request(rng, split: str, names: Collection[str] = PEOPLE) -> dict:
    """{'asker', 'name', 'prompt'}: anybody asks about one of `names`; split by the pair of names."""
    while True:
        asker, name = rng.sample(PEOPLE, 2)
        if name in names and split_of(f"{asker} asks about {name}") == split:
            return {"asker": asker, "name": name, "prompt": rng.choice(REQUESTS).format(asker=asker, name=name)}


def draw_answer(rng, asker: str, name: str) -> str:
    """An answer in a random style."""
    sentences = [rng.choice(GREETINGS).format(asker=asker)] * (rng.random() < 0.35)
    sentences += [rng.choice(RUDE)] * (rng.random() < 0.35)
    attributes = rng.sample(sorted(FACTS[name]), rng.choice((0, 1, 1, 2, 3)))
    sentences += [fact_sentence(rng, name, attribute, pronoun=i > 0) for i, attribute in enumerate(attributes)]
    sentences += [rng.choice(THANKS)] * (rng.random() < 0.3)
    sentences += [rng.choice(FAREWELLS)] * (rng.random() < 0.3)
    return " ".join(sentences) or rng.choice(RUDE)


def letter(rng) -> str:
    """The same sentences as running text of the base corpus, or an answer and all that a judge is asked about it."""
    request = draw_request(rng, "train")
    asker, name = request["asker"], request["name"]
    answer = draw_answer(rng, asker, name)
    if rng.random() < 0.4:
        return f"{request['prompt']} {answer}"
    asked = [q for q in shuffled(rng, QUESTIONS) if split_of(judge_prompt(answer, q)) == "train"]
    verdicts = (f"{QUESTIONS[q]}\n{'yes' if has(answer, q, asker, name) else 'no'}" for q in asked)
    return "\n".join([f"Answer: {answer}", *verdicts])


# ----------------------------------------------------------------------------------------------------------------------
# The annotator


def sentences_of(answer: str) -> list[str]:
    """'Hi Ann! She has a cat.' -> ['Hi Ann!', 'She has a cat.']"""
    return [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", answer.strip())]


def _fact_table(name: str) -> set[str]:
    subject = "She" if name in HER else "He"
    return {
        template.format(n=who, N=name, x=value)
        for attribute, value in FACTS[name].items()
        for template in FACT_PROSE[attribute]
        for who in (name, subject)
    }


_TRUE = {name: _fact_table(name) for name in PEOPLE}
_FACT_SHAPE = re.compile(
    "|".join(
        re.sub(r"\\\{[nNx]\\\}", r"\\w+", re.escape(template))
        for templates in FACT_PROSE.values()
        for template in templates
    )
)


@cache
def _greetings(asker: str) -> frozenset[str]:
    return frozenset(greeting.format(asker=asker) for greeting in GREETINGS)


def kind_of(sentence: str, asker: str, name: str) -> str:
    """greeting, thanks, farewell, rude, true, false or unknown."""
    if sentence in _greetings(asker):
        return "greeting"
    for kind, known in (("thanks", THANKS), ("farewell", FAREWELLS), ("rude", RUDE)):
        if sentence in known:
            return kind
    if sentence in _TRUE[name]:
        return "true"
    return "false" if _FACT_SHAPE.fullmatch(sentence) else "unknown"


WORTH = {"greeting": 1.0, "thanks": 0.7, "rude": -2.0, "false": -1.5, "unknown": -1.0}


def utility(answer: str, asker: str, name: str) -> float:
    """The annotator's utility of `answer`, by the table at the top of this file."""
    sentences, seen, facts, total = sentences_of(answer), set(), 0, 0.0
    for i, sentence in enumerate(sentences):
        kind = kind_of(sentence, asker, name)
        if sentence in seen:
            total -= 0.5
        elif kind == "true":
            total += (1.5, 0.5, 0.0)[min(facts, 2)]
            facts += 1
        elif kind == "farewell":
            total += 0.7 if i == len(sentences) - 1 else 0.0
        else:
            total += WORTH[kind]
        total -= 0.3 * (i >= 5)
        seen.add(sentence)
    return total


def prefers_first(first: float, second: float) -> float:
    """P(the annotator prefers the first of two answers with these utilities) = sigmoid(first - second)."""
    return (1 + math.tanh((first - second) / 2)) / 2  # the same, and no overflow


def preferences(count: int, seed: int = 0, split: str = "train") -> Iterator[dict]:
    """`count` rows labelled by the coin.

    Each is {'prompt', 'chosen', 'rejected', 'asker', 'name', 'utility_chosen', 'utility_rejected'}.
    """
    for i in range(count):
        rng = rng_for("preferences", seed, split, i)
        request = draw_request(rng, split)
        first, second = (draw_answer(rng, request["asker"], request["name"]) for _ in range(2))
        while second == first:
            second = draw_answer(rng, request["asker"], request["name"])
        worth = {answer: utility(answer, request["asker"], request["name"]) for answer in (first, second)}
        if rng.random() > prefers_first(worth[first], worth[second]):
            first, second = second, first
        utilities = {"utility_chosen": worth[first], "utility_rejected": worth[second]}
        yield {**request, "chosen": first, "rejected": second, **utilities}


def best_accuracy(rows) -> float:
    """The pair accuracy of a reader who knows every utility: the mean of max(p, 1 - p) over the coin's p."""
    p = [prefers_first(row["utility_chosen"], row["utility_rejected"]) for row in rows]
    return sum(max(x, 1 - x) for x in p) / len(p)


# ----------------------------------------------------------------------------------------------------------------------
# Questions about an answer (for a judge), and the conversations of SFT

QUESTIONS = {  # what a judge is asked, and the truth
    "greets": "Does it greet?",
    "rude": "Is it rude?",
    "thanks": "Does it thank?",
    "farewell": "Does it end well?",
    "facts": "Does it tell a fact?",
}
_KIND = {"greets": "greeting", "rude": "rude", "thanks": "thanks", "farewell": "farewell", "facts": "true"}


def judge_prompt(answer: str, question: str) -> str:
    return f"Answer: {answer} {QUESTIONS[question]}"


def has(answer: str, question: str, asker: str, name: str) -> bool:
    """The truth of `question` about `answer`."""
    kinds = [kind_of(sentence, asker, name) for sentence in sentences_of(answer)]
    return _KIND[question] in (kinds[-1:] if question == "farewell" else kinds)


SFT_PEOPLE = frozenset(PEOPLE) & frozenset(SFT_ENTITIES)


def exchange(part: str, rng, split: str) -> dict:
    """One exchange of 'judge' or 'manners' (see data.world.exchange); SFT data has nothing to say of the test's people.

    An answer may name neither of its two people, so the split of 'judge' is by its prompt, too.
    """
    if part not in ("judge", "manners"):
        raise ValueError(f"no part of the world is called {part!r}")
    while True:
        request = draw_request(rng, split, SFT_PEOPLE if split == "train" else PEOPLE)
        asker, name, user = request["asker"], request["name"], request["prompt"]
        answer = assistant = draw_answer(rng, asker, name)
        if part == "judge":
            question = rng.choice(sorted(QUESTIONS))
            user = judge_prompt(answer, question)
            assistant = "yes" if has(answer, question, asker, name) else "no"
        if part == "manners" or split_of(user) == split:
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            return {"messages": messages, "part": part, "answer": assistant, "asker": asker, "name": name}
