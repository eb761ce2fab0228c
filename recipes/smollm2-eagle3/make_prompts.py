# SPDX-License-Identifier: Apache-2.0
"""Task-shaped prompts for training a head: arithmetic stories, translations, questions, summaries, reading.

The target's own answers from a first run of `polyspec train-eagle` serve as passages to summarise and to read, so
that nothing but a list of foreign sentences has to be brought along. Passages that people wrote, of which the target's
next token is harder to guess, come from a file.

    python make_prompts.py --texts first_run/texts --tokenizer MODEL --sentences german.txt --out prompts.jsonl
    python make_prompts.py --passages passages.txt --each 400 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from pathlib import Path

from transformers import AutoTokenizer

from hf_polyspec.eagle.training.shards import GREEDY, read_samples

NAMES = [
    "Ana",
    "Ben",
    "Carla",
    "Dev",
    "Elif",
    "Femi",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Marta",
    "Noor",
    "Omar",
    "Priya",
    "Rosa",
    "Sven",
    "Tara",
    "Yuki",
]
THINGS = [
    "apples",
    "books",
    "candles",
    "marbles",
    "stickers",
    "eggs",
    "pencils",
    "tickets",
    "cookies",
    "shirts",
    "plants",
    "coins",
    "shells",
]
PLACES = ("a bakery", "the market", "a farm", "the library", "a small shop", "the school fair", "a workshop")
STORIES = (
    "{a} buys {n} {t} for ${p} each and sells them for ${q} each. How much profit does {a} make?",
    "{a} has {n} {t}. {b} has {k} times as many. How many {t} do they have together?",
    "At {w}, {a} packs {t} into boxes of {k}. How many boxes are needed for {m} {t}?",
    "{a} works {k} hours a day for {n} days and earns ${p} an hour. How much does {a} earn in all?",
    "{a} reads {n} pages on Monday, twice as many on Tuesday and {k} fewer on Wednesday than on Tuesday. "
    "How many pages does {a} read in total?",
    "A train leaves with {m} passengers. At the first stop {n} get off and {k} get on. How many are on board?",
    "{a} saves ${p} every week. After {n} weeks {a} spends half of the money on {t}. How much is left?",
    "There are {m} {t} at {w}. {a} takes a quarter of them and {b} takes {n}. How many {t} remain?",
    "{a} is {k} years older than {b}. In {n} years {a} will be {m} years old. How old is {b} now?",
    "A recipe for {k} people needs {n} eggs. How many eggs does {a} need for {m} people?",
)
SUBJECTS = [
    "the telephone",
    "the Nile",
    "the periodic table",
    "the first Olympic Games",
    "jazz",
    "the Great Wall",
    "penicillin",
    "chess",
    "the Moon landing",
    "volcanoes",
    "the French Revolution",
    "photosynthesis",
    "the printing press",
    "whales",
    "coffee",
    "the euro",
    "Mount Everest",
    "the Roman Empire",
    "vaccines",
    "the guitar",
    "black holes",
    "the Suez Canal",
    "silk",
    "the Internet",
    "bees",
    "democracy",
    "tides",
    "the violin",
    "glaciers",
    "the steam engine",
    "soccer",
    "the alphabet",
    "bridges",
    "antibiotics",
    "rice",
]
QUESTIONS = (
    "Who is best known for {s}?",
    "When was {s} first mentioned?",
    "Where would you go to learn about {s}?",
    "What is the most important fact about {s}?",
    "Why did {s} matter to people in the past?",
    "How many kinds of {s} are there?",
    "Write three interview questions about {s} and answer one of them.",
    "Give a short outline of an essay on {s}.",
    "Explain {s} to a child of ten.",
    "Write a short Python function with a comment that has to do with {s}.",
    "Compose an email to a friend about {s}.",
    "Name advantages and disadvantages of {s} in two lists.",
)

# two to four capitalised words, not at the beginning of a sentence
NAME = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+ ){1,3}[A-Z][a-z]+\b")


def stories(dice: random.Random, count: int) -> list[str]:
    """Arithmetic in words, every number drawn anew."""
    made = []
    for _ in range(count):
        a, b = dice.sample(NAMES, 2)
        values = {"n": dice.randint(3, 40), "k": dice.randint(2, 9), "m": dice.randint(41, 400)}
        values |= {"p": dice.randint(2, 20), "q": dice.randint(21, 45)}
        story = dice.choice(STORIES)
        made.append(story.format(a=a, b=b, t=dice.choice(THINGS), w=dice.choice(PLACES), **values))
    return made


def questions(dice: random.Random, subjects: list[str], count: int) -> list[str]:
    """Every question about every subject, shuffled."""
    every = [question.format(s=subject) for subject in subjects for question in QUESTIONS]
    dice.shuffle(every)
    return every[:count]


def subjects_of(passages: list[str]) -> list[str]:
    """Names of two to four words that the passages speak of, besides the subjects of this file."""
    found = {name for passage in passages for name in NAME.findall(passage)}
    return [*SUBJECTS, *sorted(found)]


def translations(dice: random.Random, sentences: list[str], count: int) -> list[str]:
    """Requests to translate one of the sentences."""
    dice.shuffle(sentences)
    return [f"Translate German to English: {sentence}" for sentence in sentences[:count]]


def readings(dice: random.Random, passages: list[str], count: int) -> list[str]:
    """Summaries of two passages, and questions after three."""
    made = []
    for number in range(count):
        chosen = dice.sample(passages, 3)
        if number % 2:
            made.append("Summarize: " + " ".join(chosen[:2]))
        else:
            subject = chosen[dice.randrange(3)].split(".")[0]
            made.append("\n\n".join(chosen) + f"\n\nWhat does the text say about this: {subject}?")
    return made


ABOUT_NAMES = (
    "Who was {s}?",
    "What is {s} known for?",
    "When does {s} appear in the text, and why?",
    "how did {s} come about",
    "Where is {s}?",
    "what is the role of {s}",
    "Describe {s} in your own words.",
    "Is {s} still important today?",
)
PIECE_WORDS = 100


def summaries(dice: random.Random, passages: list[str], count: int) -> list[str]:
    """One passage to summarise each."""
    return ["Summarize: " + passage for passage in dice.sample(passages, min(count, len(passages)))]


def piece(dice: random.Random, passage: str) -> str:
    """A hundred words from anywhere in a passage, cut wherever they end."""
    words = passage.split()
    start = dice.randint(0, max(len(words) - PIECE_WORDS, 0))
    return " ".join(words[start : start + PIECE_WORDS])


def lookups(dice: random.Random, passages: list[str], count: int) -> list[str]:
    """Questions about a name after three to five pieces, one of which has it."""
    made: list[str] = []
    while len(made) < count:
        chosen = [piece(dice, passage) for passage in dice.sample(passages, dice.choice((3, 4, 5)))]
        names = NAME.findall(dice.choice(chosen))
        if names:
            made.append("\n".join([*chosen, dice.choice(ABOUT_NAMES).format(s=dice.choice(names))]))
    return made


def passages_of(folder: Path, tokenizer_name: str) -> list[str]:
    """Greedy answers of at least a hundred ids, as text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    found = []
    for sample in read_samples(folder):
        answer = sample.tokens[sample.prompt_length :]
        if sample.kind == GREEDY and len(answer) >= 100:
            found.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    return found


def main() -> None:
    """Writes the prompts, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="folder of a first run")
    parser.add_argument("--tokenizer", help="of the texts")
    parser.add_argument("--passages", type=Path, help="file of passages, one a line, to summarise and to ask about")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=400, help="prompts of each kind")
    parser.add_argument("--readings", type=int, help="summaries and reading, if not as many")
    parser.add_argument("--max-characters", type=int, help="leave prompts of so many or more out")
    parser.add_argument("--min-characters", type=int, default=0, help="leave prompts of fewer out")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    if (wanted.texts is None) != (wanted.tokenizer is None):
        parser.error("--texts and --tokenizer belong together")
    if wanted.texts is None and wanted.passages is None and wanted.sentences is None:
        parser.error("there is nothing to make prompts of: give --texts, --passages or --sentences")
    dice = random.Random(wanted.seed)
    made: list[str] = []
    if wanted.texts is not None:
        passages = passages_of(wanted.texts, wanted.tokenizer)
        made += stories(dice, wanted.each) + questions(dice, subjects_of(passages), wanted.each)
        made += readings(dice, passages, wanted.each if wanted.readings is None else wanted.readings)
    if wanted.passages is not None:
        passages = wanted.passages.read_text(encoding="utf-8").splitlines()
        if len(passages) < 5 or not any(NAME.search(passage) for passage in passages):
            parser.error(f"{wanted.passages} has fewer than five passages, or no name of two words in any of them")
        made += summaries(dice, passages, wanted.each) + lookups(dice, passages, wanted.each)
    if wanted.sentences is not None:
        lines = [line.strip() for line in wanted.sentences.read_text(encoding="utf-8").splitlines()]
        made += translations(dice, [line for line in lines if 30 <= len(line) <= 220], wanted.each)
    dice.shuffle(made)
    most = math.inf if wanted.max_characters is None else wanted.max_characters
    made = [prompt for prompt in made if wanted.min_characters <= len(prompt) < most]
    wanted.out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in made), encoding="utf-8")
    print(f"{len(made)} prompts in {wanted.out}")


if __name__ == "__main__":
    main()
