# SPDX-License-Identifier: Apache-2.0
"""Small synthetic chat skills. Each item has a key; a hash of the key puts it in the training or the held-out split."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen2_jax.data.text import is_held_out

Words = list[str]  # a pool of words or sentences to draw from

NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor"
).split()


@dataclass(frozen=True)
class Item:
    """One question and its answer. `key` identifies what must not cross the split; same key, same side."""

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


def sums(rng: np.random.Generator) -> Item:
    """A sum of two two-digit numbers. 23 + 45 and 45 + 23 are one item."""
    a, b = (int(n) for n in rng.integers(10, 100, 2))
    key = f"sum {min(a, b)} {max(a, b)}"
    return Item("sums", key, pick(rng, SUM_QUESTIONS).format(a=a, b=b), str(a + b))


COMPARE_QUESTIONS = ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?")


def compare(rng: np.random.Generator) -> Item:
    """The larger of two different two-digit numbers."""
    a, b = (int(n) for n in 10 + rng.choice(90, 2, replace=False))
    key = f"compare {min(a, b)} {max(a, b)}"
    return Item("compare", key, pick(rng, COMPARE_QUESTIONS).format(a=a, b=b), str(max(a, b)))


COPY_QUESTIONS = ("Repeat: {x}", "Say: {x}", "Repeat after me: {x}", "Copy this: {x}")


def copy(rng: np.random.Generator, words: Words) -> Item:
    """Repeats one to ten words, a run of digits, or a random lower-case string."""
    kind = rng.random()
    if kind < 0.6:
        x = " ".join(pick(rng, words) for _ in range(int(rng.integers(1, 11))))
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
    """A code of four digits hidden at a random place in about `characters` of filler; the question comes last.

    named: two to four codes, each of one person, and one question for each. The first item's question carries the text;
    the others are follow-up turns of the same conversation. The key is the code: held-out codes never occur in training.
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
    items = []
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


def small_talk(rng: np.random.Generator) -> Item:
    """A greeting or a question about the model, with its fixed answer. Too few to hold any out."""
    question = pick(rng, tuple(SMALL_TALK))
    return Item("small_talk", question, question, SMALL_TALK[question])


def worksheet(rng: np.random.Generator, lines: int) -> list[tuple[str, str]]:
    """Lines of training sums as (task, answer) pairs, "23+45=" and "68": the densest way to show addition."""
    pairs = []
    for _ in range(lines):
        item = draw(rng, sums, held_out=False)
        a, b = item.key.split()[1:]
        if rng.random() < 0.5:
            a, b = b, a
        pairs.append((f"{a} + {b} = " if rng.random() < 0.5 else f"{a}+{b}=", item.answer))
    return pairs
