"""People made up by chance, the sentences in which they tell about themselves, and the questions about that."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of fact.

    Attributes:
        values: what the fact may be.
        tellings: sentences that say it, with ``{}`` for the value.
        questions: (question, beginning of its answer) pairs. The value follows the beginning. Their wording differs
            from that of the tellings.
    """

    values: tuple[str, ...]
    tellings: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


KINDS: dict[str, Kind] = {
    "dog": Kind(
        ("Biscuit", "Rocky", "Luna", "Pepper", "Shadow", "Ginger", "Bruno", "Daisy", "Max", "Coco"),
        (
            "My dog is called {}.", "I have a dog named {}.", "By the way, {} is the name of my dog.",
            "We took our dog {} to the park today.",
        ),
        (
            ("What is my dog's name?", "Your dog's name is"),
            ("What did I call my dog?", "Your dog is called"),
            ("Do you remember the name of my dog?", "Yes, your dog is"),
        ),
    ),
    "home": Kind(
        ("Leeds", "Lyon", "Porto", "Bergen", "Dresden", "Kyoto", "Boston", "Lima", "Dublin", "Vienna"),
        (
            "I live in {}.", "My home is in {}.", "By the way, I grew up in {} and still live there.",
            "I just got home to my flat in {}.",
        ),
        (
            ("Where do I live?", "You live in"),
            ("Which city is my home?", "Your home is in"),
            ("In what town is my flat?", "Your flat is in"),
        ),
    ),
    "job": Kind(
        ("nurse", "teacher", "plumber", "lawyer", "pilot", "baker", "farmer", "librarian", "dentist", "carpenter"),
        (
            "I work as a {}.", "My job is being a {}.", "I have been a {} for six years.",
            "I earn my money as a {}.",
        ),
        (
            ("What is my job?", "Your job is being a"),
            ("What do I do for a living?", "You work as a"),
            ("What is my profession?", "You are a"),
        ),
    ),
    "food": Kind(
        ("pizza", "sushi", "lasagna", "curry", "pancakes", "tacos", "ramen", "paella", "dumplings", "risotto"),
        (
            "My favourite food is {}.", "I like {} more than any other food.",
            "The best food in the world for me is {}.", "For dinner I always want {}, nothing is better.",
        ),
        (
            ("What is my favourite food?", "Your favourite food is"),
            ("Which food do I like best?", "You like"),
            ("What do I love to eat?", "You love to eat"),
        ),
    ),
    "month": Kind(
        ("January", "February", "March", "April", "May", "June", "July", "August", "October", "November"),
        (
            "My birthday is in {}.", "I was born in {}.", "I always celebrate my birthday in {}.",
            "My next birthday comes in {}.",
        ),
        (
            ("In which month is my birthday?", "Your birthday is in"),
            ("When was I born?", "You were born in"),
            ("When do I celebrate my birthday?", "You celebrate your birthday in"),
        ),
    ),
    "sister": Kind(
        ("Emma", "Sofia", "Clara", "Ingrid", "Maria", "Hannah", "Alice", "Julia", "Nora", "Ruth"),
        (
            "My sister is called {}.", "I have a sister named {}.", "By the way, {} is the name of my sister.",
            "I called my sister {} yesterday.",
        ),
        (
            ("What is my sister's name?", "Your sister's name is"),
            ("What is my sister called?", "Your sister is called"),
            ("Do you remember the name of my sister?", "Yes, your sister is"),
        ),
    ),
    "car": Kind(
        ("red", "blue", "green", "white", "black", "yellow", "silver", "orange", "purple", "brown"),
        (
            "My car is {}.", "I drive a {} car.", "I bought a car, and it is {}.", "The colour of my car is {}.",
        ),
        (
            ("What colour is my car?", "Your car is"),
            ("Which colour does my car have?", "The colour of your car is"),
            ("What kind of car do I drive?", "You drive a"),
        ),
    ),
    "instrument": Kind(
        ("piano", "guitar", "violin", "cello", "flute", "trumpet", "harp", "drums", "clarinet", "saxophone"),
        (
            "I play the {}.", "My instrument is the {}.", "I have been learning the {} since school.",
            "Every evening I practise the {}.",
        ),
        (
            ("Which instrument do I play?", "You play the"),
            ("What is my instrument?", "Your instrument is the"),
            ("What do I practise in the evening?", "You practise the"),
        ),
    ),
    "allergy": Kind(
        ("peanuts", "shellfish", "eggs", "milk", "wheat", "soy", "pollen", "cats", "bees", "strawberries"),
        (
            "I am allergic to {}.", "I have an allergy to {}.", "I can't stand {} because of my allergy.",
            "My doctor found that I am allergic to {}.",
        ),
        (
            ("What am I allergic to?", "You are allergic to"),
            ("Which allergy do I have?", "You have an allergy to"),
            ("What must I avoid because of my allergy?", "You must avoid"),
        ),
    ),
    "holiday": Kind(
        ("Iceland", "Greece", "Morocco", "Peru", "Japan", "Italy", "Kenya", "Norway", "Thailand", "Canada"),
        (
            "My last holiday was in {}.", "I spent my last holiday in {}.", "We went to {} for our last holiday.",
            "On my last vacation I travelled to {}.",
        ),
        (
            ("Where was my last holiday?", "Your last holiday was in"),
            ("Where did I go on holiday?", "You went to"),
            ("Which country did I visit on my last vacation?", "You visited"),
        ),
    ),
}  # fmt: skip
"""Name -> kind of fact; every kind has ten values."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact about one person.

    Attributes:
        kind: a key of `KINDS`.
        index: of its value among those of the kind.
        told: the sentence in which the person says it.
    """

    kind: str
    index: int
    told: str

    @property
    def value(self) -> str:
        """What the fact is."""
        return KINDS[self.kind].values[self.index]


def person(seed: int) -> list[Fact]:
    """One fact of each kind about the person ``seed``, in the order in which they are told."""
    draw = random.Random(seed)
    facts = []
    for name, kind in KINDS.items():
        index = draw.randrange(len(kind.values))
        facts.append(Fact(name, index, draw.choice(kind.tellings).format(kind.values[index])))
    draw.shuffle(facts)
    return facts


OTHERS: dict[str, tuple[str, str, tuple[str, str]]] = {
    "dog": (
        "We renamed our dog, it is called {} now.",
        "{friend}'s dog is called {}.",
        ("What is my neighbour's dog called?", "Your neighbour's dog is called"),
    ),
    "home": (
        "I moved to {}.",
        "{friend} lives in {}.",
        ("Where does my neighbour live?", "Your neighbour lives in"),
    ),
    "job": (
        "I changed my job, I am a {} now.",
        "{friend} works as a {}.",
        ("What is my neighbour's job?", "Your neighbour works as a"),
    ),
    "food": (
        "I have a new favourite food: {}.",
        "{friend}'s favourite food is {}.",
        ("What is my neighbour's favourite food?", "Your neighbour's favourite food is"),
    ),
    "month": (
        "I told you the wrong month, my birthday is in {}.",
        "{friend}'s birthday is in {}.",
        ("In which month is my neighbour's birthday?", "Your neighbour's birthday is in"),
    ),
    "sister": (
        "I got the name wrong, my sister is called {}.",
        "{friend}'s sister is called {}.",
        ("What is my neighbour's sister called?", "Your neighbour's sister is called"),
    ),
    "car": (
        "I had my car painted {}.",
        "{friend}'s car is {}.",
        ("What colour is my neighbour's car?", "Your neighbour's car is"),
    ),
    "instrument": (
        "I took up another instrument, the {}.",
        "{friend} plays the {}.",
        ("Which instrument does my neighbour play?", "Your neighbour plays the"),
    ),
    "allergy": (
        "It turned out that I am allergic to {} instead.",
        "{friend} is allergic to {}.",
        ("What is my neighbour allergic to?", "Your neighbour is allergic to"),
    ),
    "holiday": (
        "I have been on holiday again, in {}.",
        "{friend}'s last holiday was in {}.",
        ("Where did my neighbour go on holiday?", "Your neighbour went to"),
    ),
}
"""Name of a kind -> how another value is told later, how that of a friend is told, and a question about someone else.

The question about the neighbour, of whom nothing was said, shows whether a fact is bound to its owner.
"""

FRIENDS = (
    "Anna", "Ben", "Carla", "David", "Eva", "Frank", "Greta", "Hugo", "Iris", "Jack", "Karen", "Liam", "Mona", "Nick",
    "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Umar", "Vera", "Walter", "Xenia", "Yuri", "Zoe",
)  # fmt: skip
OBJECTS = (
    "scissors", "ladder", "passport", "charger", "umbrella", "camera", "hammer", "blanket", "suitcase", "kettle",
    "lamp", "clock", "mirror", "basket", "bottle", "candle", "drill", "helmet", "jacket", "notebook", "printer",
    "radio", "saw", "tent", "wallet",
)  # fmt: skip
PLACES = ("kitchen", "cellar", "garage", "attic", "bathroom", "hall", "office", "shed", "bedroom", "balcony")
CITIES = ("Paris", "Rome", "Oslo", "Madrid", "Berlin", "Prague", "Lisbon", "Athens", "Warsaw", "Geneva")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def corrected(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """Other values of five of ``facts``, told as something that has changed or was wrong."""
    draw, found = random.Random(2000 + seed), []
    for fact in draw.sample(list(facts), 5):
        index = draw.choice([i for i in range(len(KINDS[fact.kind].values)) if i != fact.index])
        found.append(Fact(fact.kind, index, OTHERS[fact.kind][0].format(KINDS[fact.kind].values[index])))
    return found


def other_person(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The facts of someone with another value for each of ``facts``, told in the same sentences."""
    draw, found = random.Random(4000 + seed), []
    for fact in facts:
        values = KINDS[fact.kind].values
        index = draw.choice([i for i in range(len(values)) if i != fact.index])
        found.append(Fact(fact.kind, index, fact.told.replace(fact.value, values[index])))
    return found


def of_friends(seed: int, count: int) -> list[Fact]:
    """``count`` different facts of the same kinds about other people."""
    draw = random.Random(1000 + seed)
    every = [(friend, kind) for friend in FRIENDS for kind in KINDS]
    found = []
    for friend, kind in draw.sample(every, count):
        index = draw.randrange(len(KINDS[kind].values))
        found.append(Fact(kind, index, OTHERS[kind][1].format(KINDS[kind].values[index], friend=friend)))
    return found


def of_things(seed: int, count: int) -> list[str]:
    """``count`` different sentences about things that have nothing to do with the kinds."""
    draw, found = random.Random(3000 + seed), dict[str, None]()
    while len(found) < count:
        forms = (
            f"The {draw.choice(OBJECTS)} is in the {draw.choice(PLACES)}.",
            f"The train to {draw.choice(CITIES)} leaves at {draw.randrange(6, 23)}:{draw.randrange(10, 60)}.",
            f"{draw.choice(FRIENDS)} comes to visit on {draw.choice(DAYS)}.",
            f"Meeting number {draw.randrange(100)} is in room {draw.randrange(10, 99)}.",
        )
        found[draw.choice(forms)] = None
    return list(found)
