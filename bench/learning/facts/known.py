"""A hundred short sentences that a language model knows, and how they go on."""

from __future__ import annotations

from ttt.demo.knowledge import GENERAL_KNOWLEDGE

KNOWN: tuple[tuple[str, str], ...] = (
    *GENERAL_KNOWLEDGE,
    ("The capital of Greece is", " Athens"), ("The capital of Portugal is", " Lisbon"),
    ("The capital of Austria is", " Vienna"), ("The capital of Ireland is", " Dublin"),
    ("The capital of Cuba is", " Havana"), ("The capital of Poland is", " Warsaw"),
    ("The capital of China is", " Beijing"), ("The capital of Thailand is", " Bangkok"),
    ("The capital of Norway is", " Oslo"), ("The capital of Kenya is", " Nairobi"),
    ("The Statue of Liberty is located in New", " York"), ("The Colosseum is located in", " Rome"),
    ("Big Ben is located in", " London"), ("The Taj Mahal is located in", " India"),
    ("The pyramids of Giza are located in", " Egypt"), ("The Amazon rainforest is located in South", " America"),
    ("The Sahara is the largest hot", " desert"), ("The highest mountain in the world is Mount", " Everest"),
    ("The river that flows through London is the", " Thames"), ("The official language of Brazil is", " Portuguese"),
    ("The official language of Austria is", " German"), ("The currency of Japan is the", " yen"),
    ("The currency of India is the", " rupee"), ("The Earth revolves around the", " Sun"),
    ("The Moon orbits the", " Earth"), ("The fourth planet from the Sun is", " Mars"),
    ("The chemical symbol for silver is", " Ag"),
    ("Plants make food from light by a process called", " photosynthesis"),
    ("The force that pulls objects to the ground is called", " gravity"), ("The chemical symbol for oxygen is", " O"),
    ("The chemical symbol for iron is", " Fe"), ("The chemical formula of water is H", "2"),
    ("The opposite of left is", " right"), ("Humans breathe in oxygen and breathe out carbon", " dioxide"),
    ("Plants absorb carbon", " dioxide"), ("Red blood cells carry", " oxygen"),
    ("We see with our", " eyes"), ("The brain is protected by the", " skull"),
    ("Insulin is produced by the", " pancreas"), ("Spiders have eight", " legs"),
    ("We hear with our", " ears"), ("A young dog is called a", " puppy"), ("A young cat is called a", " kitten"),
    ("The largest animal on Earth is the blue", " whale"), ("The tallest animal in the world is the", " giraffe"),
    ("Penguins are birds that cannot", " fly"), ("The opposite of fast is", " slow"),
    ("Hamlet was written by William", " Shakespeare"), ("Harry Potter was written by J.K.", " Rowling"),
    ("The Mona Lisa was painted by Leonardo da", " Vinci"), ("The Odyssey was written by", " Homer"),
    ("The theory of evolution was developed by Charles", " Darwin"),
    ("The telephone was invented by Alexander Graham", " Bell"),
    ("The light bulb was invented by Thomas", " Edison"), ("The laws of motion were formulated by Isaac", " Newton"),
    ("The first man on the Moon was Neil", " Armstrong"), ("The opposite of day is", " night"),
    ("The opposite of young is", " old"), ("Christopher Columbus reached America in", " 1492"),
    ("The Declaration of Independence was signed in", " 1776"), ("A year has twelve", " months"),
    ("A day has twenty-four", " hours"), ("An hour has sixty", " minutes"), ("A triangle has three", " sides"),
    ("The opposite of rich is", " poor"), ("The first month of the year is", " January"),
    ("The day after Monday is", " Tuesday"), ("The opposite of big is", " small"),
    ("The opposite of good is", " bad"), ("The opposite of light is", " dark"),
)  # fmt: skip
"""(beginning, end); the first 30 are `ttt.demo.knowledge.GENERAL_KNOWLEDGE`."""
