# SPDX-License-Identifier: Apache-2.0
"""Small synthetic chat skills. Each item has a key; a hash of the key puts it in the training or the held-out split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen2_jax.speedrun.stdlib_text import is_held_out

Words = list[str]  # a pool of words or sentences to draw from

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
]  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question and its answer. Items with equal `key` are always in the same split."""

    skill: str
    key: str
    question: str
    answer: str


def pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def draw(rng: np.random.Generator, make: Callable[[np.random.Generator], Item], *, held_out: bool) -> Item:
    """Draws until the item lies in the wanted split: about one draw for training, about ten for held-out."""
    while is_held_out((item := make(rng)).key) != held_out:
        pass
    return item


SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
)


def sums(rng: np.random.Generator, *, least: int = 10) -> Item:
    """A sum of two numbers from `least` to 99. 23 + 45 and 45 + 23 are one item."""
    a, b = (int(n) for n in rng.integers(least, 100, 2))
    key = f"sum {min(a, b)} {max(a, b)}"
    return Item("sums", key, pick(rng, SUM_QUESTIONS).format(a=a, b=b), str(a + b))


def small_sums(rng: np.random.Generator) -> Item:
    """A sum in which the numbers may have one digit; for training only."""
    return sums(rng, least=0) if rng.random() < 0.5 else _one_digit(rng)


def _one_digit(rng: np.random.Generator) -> Item:
    a, b = int(rng.integers(0, 10)), int(rng.integers(0, 100))
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    key = f"sum {min(a, b)} {max(a, b)}"
    return Item("sums", key, pick(rng, SUM_QUESTIONS).format(a=a, b=b), str(a + b))


COMPARE_QUESTIONS = ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?")


def compare(rng: np.random.Generator) -> Item:
    """The larger of two different two-digit numbers."""
    a, b = (int(n) for n in 10 + rng.choice(90, 2, replace=False))
    key = f"compare {min(a, b)} {max(a, b)}"
    return Item("compare", key, pick(rng, COMPARE_QUESTIONS).format(a=a, b=b), str(max(a, b)))


def _word(rng: np.random.Generator, words: Words, pieces: Words) -> str:
    if rng.random() < 0.5:
        return pick(rng, words)
    return "".join(pick(rng, pieces) for _ in range(int(rng.integers(1, 4))))


COPY_QUESTIONS = ("Repeat: {x}", "Say: {x}", "Repeat after me: {x}", "Copy this: {x}")


def copy(rng: np.random.Generator, words: Words, pieces: Words) -> Item:
    """Repeats one to ten words, a run of digits, or a random lower-case string.

    Half of the words are random combinations of pieces, so that copying is learned and not a list of words.
    """
    kind = rng.random()
    if kind < 0.6:
        chosen = [_word(rng, words, pieces) for _ in range(int(rng.integers(1, 11)))]
        style = rng.random()
        if style < 0.2:
            chosen[0] = chosen[0].capitalize()
        elif style < 0.3:
            chosen = [word.capitalize() for word in chosen]
        x = " ".join(chosen) + ("." if rng.random() < 0.1 else "")
    elif kind < 0.8:
        x = "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(2, 9))))
    else:
        x = "".join(chr(97 + int(c)) for c in rng.integers(0, 26, int(rng.integers(2, 9))))
    return Item("copy", f"copy {x}", pick(rng, COPY_QUESTIONS).format(x=x), x)


RECALL_QUESTIONS = ("What is the secret code?", "Tell me the secret code.", "What was the secret code?")
NAMED_QUESTIONS = ("What is the code of {name}?", "Tell me the code of {name}.")


def recall(
    rng: np.random.Generator,
    sentences: Words,
    *,
    characters: int,
    named: bool = False,
    held_out: bool = False,
) -> list[Item]:
    """A code of four digits hidden at a random position in about `characters` of filler; the question comes last.

    named: two to four codes, each of one person, and one question for each. The first item's question carries the text;
    the others are follow-up turns of the same conversation. The key is the code.
    """
    count = int(rng.integers(2, 5)) if named else 1
    names = [NAMES[int(i)] for i in rng.choice(len(NAMES), count, replace=False)]
    codes = [draw(rng, _code, held_out=held_out).answer for _ in range(count)]
    filler: list[str] = []
    size = 0
    while size < characters:
        filler.append(pick(rng, sentences))
        size += len(filler[-1]) + 1
    for name, code in zip(names, codes, strict=True):
        needle = f"The code of {name} is {code}." if named else f"The secret code is {code}."
        filler.insert(int(rng.integers(len(filler) + 1)), needle)
    text = " ".join(filler)
    items: list[Item] = []
    for i in rng.permutation(count):
        question = pick(rng, NAMED_QUESTIONS).format(name=names[i]) if named else pick(rng, RECALL_QUESTIONS)
        question = question if items else f"{text}\n{question}"
        items.append(Item("recall_named" if named else "recall", f"code {codes[i]}", question, codes[i]))
    return items


def _code(rng: np.random.Generator) -> Item:
    code = str(int(rng.integers(1000, 10000)))
    return Item("recall", f"code {code}", "", code)


HELLO = "Hello! I am a tiny Qwen2 demo model. I can add two-digit numbers, repeat words and recall a code from a text."
WHO = "I am a tiny Qwen2 model, trained from scratch in under an hour on two CPU cores."
CAN = 'I can add ("What is 23 + 45?"), repeat ("Repeat: apple") and recall a code from a text.'
BYE = "Goodbye!"
THANKS = "You are welcome!"
SMALL_TALK = {
    **dict.fromkeys(("Hello", "Hello!", "hello", "Hi", "hi", "Hi!", "Hey", "Hello there!", "Good morning!"), HELLO),
    **dict.fromkeys(("Who are you?", "who are you?", "What are you?", "Who made you?", "What is your name?"), WHO),
    **dict.fromkeys(("What can you do?", "what can you do?", "Help", "help", "Can you help me?"), CAN),
    **dict.fromkeys(("Bye", "bye", "Goodbye!", "See you!"), BYE),
    **dict.fromkeys(("Thanks!", "thanks", "Thank you!", "Thank you."), THANKS),
}


UNKNOWN = "I do not know that. I can add two-digit numbers, repeat words and recall a code from a text."
UNKNOWN_QUESTIONS = (
    "What is the capital of {x}?",
    "What is {x}?",
    "Who is {x}?",
    "Who was {x}?",
    "Who wrote {x}?",
    "Where is {x}?",
    "When was {x} born?",
    "Why is the {x} so {y}?",
    "How do I {x} a {y}?",
    "Explain {x}.",
    "Tell me about {x}.",
    "Tell me a joke about {x}.",
    "Write a {x} about {y}.",
    "Write a poem.",
    "Translate {x} to French.",
    "Do you like {x}?",
    "Is {x} {y}?",
    "Can you {x} the {y}?",
)


def small_talk(rng: np.random.Generator, words: Words) -> Item:
    """A greeting, a question about the model, a story request, or a question it cannot answer. Nothing is held out."""
    kind = rng.random()
    if kind < 0.2:
        question = pick(rng, STORY_QUESTIONS)
        return Item("small_talk", question, question, story(rng))
    if kind < 0.6:
        question = pick(rng, tuple(SMALL_TALK))
        return Item("small_talk", question, question, SMALL_TALK[question])
    x, y = (pick(rng, NAMES) if rng.random() < 0.2 else pick(rng, words) for _ in range(2))
    x = x.capitalize() if rng.random() < 0.4 else x
    question = pick(rng, UNKNOWN_QUESTIONS).format(x=x, y=y)
    return Item("small_talk", question, question, UNKNOWN)


STORY_QUESTIONS = (
    "Once upon",
    "Once upon a time",
    "once upon a time",
    "Tell me a story.",
    "Tell me a tale",
    "A story, please.",
)
ANIMALS = ["fox", "cat", "dog", "bear", "mouse", "rabbit", "bird", "frog", "owl", "horse"]
SIZES = ["little", "big", "young", "kind", "clever", "brave", "shy", "happy"]
PLACES = ("a green forest", "a small village", "an old house", "a quiet valley", "a tall tree", "a town by the sea")
THINGS = ("a red key", "a golden ring", "an old map", "a blue stone", "a letter", "a wooden box", "a lost child")
FRIENDS = ("the wind", "the moon", "an old woman", "the river", "a wise owl", "her mother", "the king")
STORY = (
    "Once upon a time there was a {size} {animal} named {name}.",
    "{name} lived in {place} and was never {mood}.",
    "Every morning {name} went out to look for {thing}.",
    "One day {name} found {thing} under a stone.",
    "One day {name} met {friend}.",
    '"What is this?" asked {name}.',
    '"This is {thing}," said {friend}. "It is for you."',
    '"Come with me to {place}," said {friend}.',
    "So they went to {place} together.",
    "It was {time}, and {name} was very {mood}.",
    "{name} thanked {friend} and went home.",
    "From that day on, {name} and {friend} were friends.",
)
MOODS = ["happy", "sad", "tired", "hungry", "afraid", "proud"]
TIMES = ("a cold night", "a warm day", "early in the morning", "late in the evening", "winter", "spring")


def story(rng: np.random.Generator) -> str:
    """A short story from sentence patterns in a fixed order, some omitted; the standard library has little prose."""
    words = {
        "name": pick(rng, NAMES),
        "animal": pick(rng, ANIMALS),
        "size": pick(rng, SIZES),
        "friend": pick(rng, FRIENDS),
    }
    words |= {"thing": pick(rng, THINGS), "place": pick(rng, PLACES)}
    lines = [
        pattern.format(mood=pick(rng, MOODS), time=pick(rng, TIMES), **words)
        for i, pattern in enumerate(STORY)
        if i in (0, 1, 10) or rng.random() < 0.4
    ]
    return " ".join(lines)


def worksheet(rng: np.random.Generator, lines: int) -> list[tuple[str, str]]:
    """Lines of training sums as (task, answer) pairs, "23+45=" and "68": the fewest tokens per sum."""
    pairs = []
    for _ in range(lines):
        item = draw(rng, sums, held_out=False)
        a, b = item.key.split()[1:]
        if rng.random() < 0.5:
            a, b = b, a
        pairs.append((f"{a} + {b} = " if rng.random() < 0.5 else f"{a}+{b}=", item.answer))
    return pairs
