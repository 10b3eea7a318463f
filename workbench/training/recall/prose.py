"""Ordinary prose from templates: the filler between facts, and whole texts without facts, so that any prompt finds a style to continue."""

from __future__ import annotations

import random

from . import words

_WHO = "the old man|the young woman|a child|the teacher|the farmer|a traveller|the captain|my sister|my brother|our neighbour|the king|the queen|a stranger|the doctor|the gardener|the cook".split(
    "|"
)
_DID = (
    "walked along the river|opened the window|waited for the train|looked at the sky|read a long letter|closed the door|told a story|"
    "sat by the fire|bought some bread|carried the water|sang a song|slept until noon|counted the stars|wrote a letter|drank a cup of tea|"
    "lost the way|found a coin|went home|planted a tree|watched the rain|fed the birds|climbed the hill|swept the floor|lit the lamp"
).split("|")
_WHEN = "in the morning|in the evening|at night|after lunch|before noon|last summer|last winter|every day|on Sunday|on Monday|for a while|once more|without a word|with a smile".split(
    "|"
)
_THING = "the wind|the rain|the sea|the road|the river|the snow|the house|the garden|the forest|the sun|the moon|the fog|the street|the room|the village|the sky".split(
    "|"
)
_WAS = "was quiet|was cold|was dark|was bright|was far away|was full of people|was very old|was still|grew warm|turned grey|seemed empty|looked new|was beautiful|was calm".split(
    "|"
)
_THERE = "There was {a} {t} near the {p}|There were two {o}s on the table|{a} {t} lay beyond the {p}|Near the {p} stood {a} tree|{c} {o} hung on the wall|Behind the {p} there was a small garden|Some {b} people came to the {p}|No one had seen such {a} {t} before".split(
    "|"
)
_SET = (
    "Nobody spoke for a while|A bell rang twice in the distance|Two gulls circled above the water|Someone had left a door open|"
    "Smoke rose from a chimney|It was colder than the day before|The children ran past the fence|It is time to go home|"
    "We did not know what to say|I think that it will rain|They were happy to be together|Nothing else happened that day|"
    "It was a long time ago|She did not answer|He looked at her and smiled|I do not know|Everything was in its place"
).split("|")
_GREETINGS = "Hello , how are you ?|Good morning .|Thank you very much .|I am well , thank you .|How can I help you ?|Please come in and sit down .|What is your name ?|It is nice to see you .".split(
    "|"
)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentence(rng: random.Random) -> str:
    """One sentence, ending in ` .`; it states nothing about any key."""
    kind = rng.randrange(6)
    if kind == 0:
        text = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHEN)}"
    elif kind == 1:
        text = f"{rng.choice(_WHEN)} , {rng.choice(_WHO)} {rng.choice(_DID)}"
    elif kind == 2:
        text = f"{rng.choice(_THING)} {rng.choice(_WAS)}"
    elif kind == 3:
        text = f"{rng.choice(_THING)} {rng.choice(_WAS)} and {rng.choice(_THING)} {rng.choice(_WAS)}"
    elif kind == 4:
        text = rng.choice(_THERE).format(
            a=_article(rng.choice(words.ADJECTIVES)),
            b=rng.choice(words.ADJECTIVES),
            t=rng.choice(words.THINGS),
            p=rng.choice(words.PLACES),
            c=_article(rng.choice(words.COLOURS)),
            o=rng.choice([o for o in words.OBJECTS if o not in ("knife", "scarf", "watch")]),
        )
    else:
        text = rng.choice(_SET)
    return text[0].upper() + text[1:] + " ."


def noise_unit(rng: random.Random) -> str:
    """A short run of sentences to be repeated over and over, as a haystack without content."""
    return " ".join(rng.choice(_SET) + " ." for _ in range(rng.randint(2, 5)))


def text(rng: random.Random) -> str:
    """A short text without facts: a story, a letter, a talk, a list, a sum or a sequence."""
    kind = rng.randrange(8)
    body = " ".join(sentence(rng) for _ in range(rng.randint(3, 10)))
    who, other = rng.sample(words.NAMES, 2)
    if kind == 0:
        opening = rng.choice(
            ["Once upon a time there was", "There once lived", "A long time ago there lived", "This is the story of"]
        )
        return f"{opening} {_article(rng.choice(words.ADJECTIVES))} {rng.choice(words.TRADES)} . {body}\n"
    if kind == 1:
        return f"Dear {who} , {rng.choice(['thank you for your letter', 'I hope you are well', 'it was good to see you'])} . {body} With love , {other}\n"
    if kind == 2:
        lines = [
            f"{p} : {rng.choice(_GREETINGS) if rng.random() < 0.5 else sentence(rng)}"
            for p in [who, other] * rng.randint(2, 4)
        ]
        return "\n".join(lines) + "\n"
    if kind == 3:
        items = rng.sample(rng.choice([words.FRUITS, words.ANIMALS, words.COLOURS, words.OBJECTS]), rng.randint(4, 8))
        return "List : " + " , ".join(items[:-1]) + f" and {items[-1]} .\n"
    if kind == 4:
        first, step = rng.randrange(1, 30), rng.choice([1, 1, 2, 5, 10])
        return "Count : " + " ".join(str(first + step * i) for i in range(rng.randint(8, 20))) + "\n"
    return f"{body}\n"
