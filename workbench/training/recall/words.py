"""The vocabulary of the recall text, and the words that training never sees.

Keys (the things facts are about) are people's names, invented words and hyphenated pairs. Each of the three has a held-out part,
used by evaluation only; values (colours, places, …) are shared, so that a held-out question asks for binding and not for spelling.
"""

from __future__ import annotations

import random
from collections.abc import Callable

NAMES = (
    "Mira Oskar Lena Tobin Aya Farid Noor Ivo Petra Juno Kesi Ravi Sol Tess Umar Vera Wen Yara Zane Bram Cleo Dario Elin Hugo Ines "
    "Jonas Karim Livia Marta Nils Olga Pavel Rosa Samir Tara Viktor Anna Boris Clara David"
).split()
HELD_OUT_NAMES = "Xavi Greta Leon Nadia Otto Priya Selma Timo Ulla Yusuf Zora Emil".split()

COLOURS = (
    "amber black blue brown coral crimson gold green grey indigo ivory jade navy olive orange pink purple red silver teal violet "
    "white yellow"
).split()
PLACES = (
    "bakery barn bridge castle cellar chapel farm forest garden harbour library lighthouse market mill museum palace port school "
    "station tower valley village"
).split()
OBJECTS = (
    "basket bell book bottle clock cup drum flute hammer kite knife ladder lamp lantern mirror pen ring rope scarf spoon violin watch"
).split()
TRADES = "baker barber cook doctor driver farmer guard judge miner nurse painter pilot poet potter sailor singer smith tailor teacher writer".split()
ANIMALS = "bear cat crow dog duck fox frog goat goose hare hen horse lamb mouse parrot pig rabbit sheep snake swan turtle wolf".split()
FRUITS = "apple banana cherry date fig grape kiwi lemon lime mango melon olive peach pear plum quince".split()

ADJECTIVES = "brave bright calm clever cold dark deep dry early fast gentle happy hidden kind late loud lucky narrow old plain proud quick quiet sharp slow small soft strong tall warm wide young".split()
THINGS = "arrow autumn cloud coast dawn door dust field fire flame hill island lake leaf meadow moon night ocean path rain river road rock sand shadow snow star stone storm sun tree wind".split()

SYLLABLES = [c + v for c in "bcdfghjklmnprstvz" for v in "aeiou"]
_FIXED = random.Random(20240229)  # fixes what is held out, for ever; unrelated to any training seed


def _split(words: list[str], held_out: int) -> tuple[list[str], list[str]]:
    """Shuffle once, for ever, and cut off the held-out part: (training, held-out)."""
    _FIXED.shuffle(words)
    return words[held_out:], words[:held_out]


INVENTED, HELD_OUT_INVENTED = _split([a + b for a in SYLLABLES for b in SYLLABLES if a != b], 500)
_REAL = {"hare", "have", "jade", "line"}  # two syllables that happen to be words, which training texts do contain
HELD_OUT_INVENTED = [word for word in HELD_OUT_INVENTED if word not in _REAL]
PAIRS, HELD_OUT_PAIRS = _split([f"{a}-{b}" for a in ADJECTIVES for b in THINGS], 200)


def invented(rng: random.Random, held_out: bool = False) -> str:
    """A word of two syllables that means nothing."""
    return rng.choice(HELD_OUT_INVENTED if held_out else INVENTED)


def spelt(rng: random.Random) -> str:
    """Three to six letters in any order: trained on such keys too, the model is thrown by no spelling. Never a held-out word."""
    while True:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
        if word not in HELD_OUT_INVENTED and word.capitalize() not in HELD_OUT_NAMES:
            return word.capitalize()


def pair(rng: random.Random, held_out: bool = False) -> str:
    """A hyphenated adjective and noun, such as `quiet-river`."""
    return rng.choice(HELD_OUT_PAIRS if held_out else PAIRS)


def name(rng: random.Random, held_out: bool = False) -> str:
    """A person: two in five have an ordinary name, the others an invented one."""
    if rng.random() < 0.4:
        return rng.choice(HELD_OUT_NAMES if held_out else NAMES)
    return invented(rng, held_out).capitalize()


def several(draw: Callable[[], str], n: int) -> list[str]:
    """`n` different results of `draw()`, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)


def number(rng: random.Random, low: int = 2, high: int = 7) -> str:
    """A number of `low` to `high` digits, without a leading zero."""
    digits = rng.randint(low, high)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
