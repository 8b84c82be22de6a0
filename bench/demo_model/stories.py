"""Short stories from a small grammar: one hero, one friend, one wish, one trouble, one end.

A story keeps its names, kinds, pronouns and places to the end, so that the model has something
consistent to learn; `questions` asks about it in a second turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KINDS = (
    "fox", "rabbit", "bear", "mouse", "owl", "cat", "dog", "hedgehog", "duck", "frog",
    "turtle", "squirrel", "goat", "robot", "dragon", "sparrow", "badger", "otter",
)  # fmt: skip
SHE = ("Ruby", "Mia", "Nora", "Lily", "Ada", "Hazel", "Ivy", "Luna", "Rosa", "Tilda", "Wanda")
HE = ("Max", "Tom", "Oscar", "Leo", "Ben", "Hugo", "Finn", "Otto", "Sam", "Theo", "Bruno")
TRAITS = ("small", "brave", "curious", "shy", "clever", "kind", "young", "cheerful", "sleepy")
PLACES = {
    "forest": "in a quiet forest",
    "village": "in a small village",
    "mountain": "on a green mountain",
    "river": "by a wide river",
    "garden": "in an old garden",
    "lake": "near a blue lake",
    "island": "on a sunny island",
    "farm": "on a little farm",
}
# wish: (what the hero wants, trouble on the way, how the friend helps, the end)
PLOTS = (
    (
        "find the tallest tree in the land",
        "a thick fog came and {p} lost the path",
        "{f} knew the way by the smell of the wind",
        "they stood under the tallest tree and looked up until the stars came out",
    ),
    (
        "bake a cake for the feast",
        "the bag of flour fell into the water",
        "{f} brought a new bag of flour and a jar of honey",
        "they baked the cake together and everybody had a piece",
    ),
    (
        "cross the old bridge",
        "the bridge was broken in the middle",
        "{f} found a long board and laid it over the hole",
        "they crossed the bridge hand in hand and waved from the other side",
    ),
    (
        "see the sea for the first time",
        "the road was long and {p} grew very tired",
        "{f} had a cart and offered {o} a seat",
        "they saw the sea in the evening light and said nothing for a long time",
    ),
    (
        "learn to sing",
        "no note would come out right",
        "{f} showed {o} how to breathe slowly",
        "{h} sang a song in the evening and everybody listened",
    ),
    (
        "find a lost red kite",
        "a strong wind had carried it to the top of a roof",
        "{f} climbed up and threw the string down",
        "the red kite flew high again and they took turns to hold it",
    ),
    (
        "build a boat",
        "the first boat sank at once",
        "{f} showed {o} how to close the holes with wax",
        "the new boat floated and they sailed until sunset",
    ),
    (
        "plant a garden of sunflowers",
        "it did not rain for many days",
        "{f} carried water from the well every morning",
        "the sunflowers opened and they were taller than the door",
    ),
    (
        "write a letter to the moon",
        "{p} did not know how to spell the words",
        "{f} taught {o} the letters one by one",
        "they left the letter on the hill and in the morning it was gone",
    ),
    (
        "repair the clock of the tower",
        "one small wheel was missing",
        "{f} had found the wheel in the grass and gave it to {o}",
        "the clock struck twelve and everybody cheered",
    ),
)
OPENINGS = ("Once upon a time", "Long ago", "One day in spring", "Many years ago", "One summer")
MORALS = (
    "From that day on, {h} and {f} were best friends.",
    "{h} learned that a friend makes every road shorter.",
    "And {h} never forgot how {f} had helped.",
    "That night {h} and {f} slept well, and they were happy.",
)


@dataclass(frozen=True, slots=True)
class Story:
    """A finished story and the facts that follow-up questions ask for."""

    text: str
    hero: str
    hero_kind: str
    friend: str
    friend_kind: str
    place: str
    wish: str


def article(word: str) -> str:
    """'a' or 'an'."""
    return "an" if word[0] in "aeiou" else "a"


def tell(rng: random.Random, kind: str = "", hero: str = "", place: str = "") -> Story:
    """Tell a story; what is given is kept, the rest is chosen."""
    hero = hero or rng.choice(SHE + HE)
    is_she = hero in SHE
    p, o, d = ("she", "her", "her") if is_she else ("he", "him", "his")
    kind = kind or rng.choice(KINDS)
    place = place or rng.choice(tuple(PLACES))
    friend = rng.choice([name for name in SHE + HE if name != hero])
    friend_kind = rng.choice([other for other in KINDS if other != kind])
    wish, trouble, help_, end = rng.choice(PLOTS)
    names = {"h": hero, "f": f"{friend} the {friend_kind}", "p": p, "o": o, "d": d}
    trait = rng.choice(TRAITS)
    met = rng.choice(("Just then", "Luckily", "After a while", "At that moment"))
    parts = [
        (
            f"{rng.choice(OPENINGS)} there lived {article(trait)} {trait} {kind} named {hero}"
            f" {PLACES[place]}."
        ),
        f"{hero} wanted to {wish}.",
        rng.choice((f"So {p} set out early in the morning.", f"One morning {p} began.")),
        f"But {trouble}.".format(**names),
        rng.choice((f"{hero} sat down and sighed.", f"{hero} almost gave up.", "")),
        f"{met} {p} met {article(friend_kind)} {friend_kind} named {friend}.",
        f"{help_[0]}{help_[1:]}.".format(**{**names, "f": friend}),
        f"In the end {end}.".format(**{**names, "f": friend}),
        rng.choice(MORALS).format(**{**names, "f": friend}),
    ]
    return Story(" ".join(x for x in parts if x), hero, kind, friend, friend_kind, place, wish)


def request(rng: random.Random) -> tuple[str, Story]:
    """A user's wish for a story, and the story."""
    kind, hero, place = "", "", ""
    what = "story"
    if rng.random() < 0.55:
        kind = rng.choice(KINDS)
        what = f"story about {article(kind)} {kind}"
        if rng.random() < 0.5:
            hero = rng.choice(SHE + HE)
            what += f" {rng.choice(('named', 'called'))} {hero}"
    elif rng.random() < 0.5:
        hero = rng.choice(SHE + HE)
        what = f"story about {hero}"
    if rng.random() < 0.2:
        place = rng.choice(tuple(PLACES))
        what += f" {PLACES[place]}"
    short = rng.choice(("", "short ", "little ", "nice "))
    ask = rng.choice((
        f"tell me a {short}{what}", f"can you tell me a {short}{what}", f"a {short}{what} please",
        f"write a {short}{what}", f"i want to hear a {short}{what}", f"please tell a {short}{what}",
        f"do you know a {short}{what}", f"make up a {short}{what}", f"{what}",
    ))  # fmt: skip
    return ask, tell(rng, kind, hero, place)


def questions(rng: random.Random, story: Story) -> tuple[str, str]:
    """One question about the story that was just told, and its answer."""
    return rng.choice((
        (f"what was the {story.hero_kind} called", f"The {story.hero_kind} was called {story.hero}."),
        ("who was the hero", f"The hero was {story.hero} the {story.hero_kind}."),
        (f"who helped {story.hero}", f"{story.friend} the {story.friend_kind} helped {story.hero}."),
        (f"what did {story.hero} want", f"{story.hero} wanted to {story.wish}."),
        (f"where did {story.hero} live", f"{story.hero} lived {PLACES[story.place]}."),
        (f"what kind of animal was {story.friend}",
         f"{story.friend} was {article(story.friend_kind)} {story.friend_kind}."),
        ("who was the friend", f"The friend was {story.friend} the {story.friend_kind}."),
    ))  # fmt: skip
