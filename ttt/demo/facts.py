"""The page of facts that the demo tells, and the questions about it, in other words than those of the telling."""

from __future__ import annotations

from ttt.demo.questions import Question

_PAGE: tuple[tuple[str, str, tuple[tuple[str, str], ...], str], ...] = (
    ("We adopted a dog last spring and named him Biscuit.", "Biscuit",
     (("What is my dog's name?", "Your dog's name is"), ("What did I call my dog?", "You called your dog")),
     "Rocky Luna Pepper Shadow Ginger Bruno Daisy Max Coco"),
    ("I live in Porto, close to the river.", "Porto",
     (("Which city is my home?", "Your home is in"), ("Where do I live?", "You live in")),
     "Leeds Lyon Bergen Dresden Kyoto Boston Lima Dublin Vienna"),
    ("I work as a librarian.", "librarian",
     (("What is my profession?", "You are a"), ("What do I do for a living?", "You work as a")),
     "nurse teacher plumber lawyer pilot baker farmer dentist carpenter"),
    ("Nothing tastes better to me than ramen.", "ramen",
     (("What is my favourite food?", "Your favourite food is"), ("What do I love to eat?", "You love to eat")),
     "pizza sushi lasagna curry pancakes tacos paella dumplings risotto"),
    ("My birthday is in October.", "October",
     (("In which month was I born?", "You were born in"), ("When is my birthday?", "Your birthday is in")),
     "January February March April May June July August September"),
    ("My sister is called Ingrid.", "Ingrid",
     (("What is my sister's name?", "Your sister's name is"), ("Do you know my sister?", "Yes, your sister is")),
     "Emma Sofia Clara Maria Hannah Alice Julia Nora Ruth"),
    ("I drive an old silver car.", "silver",
     (("What colour is my car?", "Your car is"), ("Which colour does my car have?", "The colour of your car is")),
     "red blue green white black yellow orange purple brown"),
    ("I have been learning the cello since school.", "cello",
     (("Which instrument do I play?", "You play the"), ("What is my instrument?", "Your instrument is the")),
     "piano guitar violin flute trumpet harp drums clarinet saxophone"),
    ("I am allergic to shellfish.", "shellfish",
     (("What am I allergic to?", "You are allergic to"), ("Which allergy do I have?", "You have an allergy to")),
     "peanuts eggs milk wheat soy pollen cats bees strawberries"),
    ("We spent our last holiday in Iceland.", "Iceland",
     (("Where was my last holiday?", "Your last holiday was in"), ("Where did I go on holiday?", "You went to")),
     "Greece Morocco Peru Japan Italy Kenya Norway Thailand Canada"),
)  # fmt: skip

SENTENCES: tuple[str, ...] = tuple(sentence for sentence, *_ in _PAGE)
"""What the demo's user tells, a sentence in each turn."""

QUESTIONS: tuple[Question, ...] = tuple(
    Question(text, begins, tuple(sorted((value, *others.split()))), sorted((value, *others.split())).index(value))
    for _, value, asked, others in _PAGE
    for text, begins in asked
)
"""Two questions about each sentence; the answer is chosen among ten values."""
