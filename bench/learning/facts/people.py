"""People made up by chance, the sentences in which they tell about themselves, and the questions about that."""

from __future__ import annotations

import dataclasses
import random


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
