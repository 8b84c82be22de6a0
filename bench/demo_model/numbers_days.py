"""Counting, sums up to 20, days and months: questions and answers that are right by computation."""

from __future__ import annotations

import random

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)  # fmt: skip
LIMIT = "I only learned sums up to 20; I am a tiny demo model."

Turn = tuple[str, str]


def sums(rng: random.Random) -> list[Turn]:
    """An addition or subtraction within 20, sometimes one that is out of reach."""
    if rng.random() < 0.12:
        return [_too_hard(rng)]
    a = rng.randint(0, 20)
    b = rng.randint(0, 20 - a)
    if rng.random() < 0.3:
        a += b
        sign, words, result = "-", rng.choice(("minus", "less")), a - b
        ask = rng.choice((f"subtract {b} from {a}", f"take {b} away from {a}"))
    else:
        sign, words, result = "+", rng.choice(("plus", "and")), a + b
        ask = rng.choice((f"add {a} and {b}", f"the sum of {a} and {b}", f"add {b} to {a}"))
    x, y = (str(a), str(b)) if rng.random() < 0.8 else (WORDS[a], WORDS[b])
    ask = rng.choice((
        f"what is {x} {sign} {y}", f"{x} {sign} {y}", f"{x}{sign}{y}", f"{x} {sign} {y} =",
        f"how much is {x} {words} {y}", f"what is {x} {words} {y}", f"compute {x} {sign} {y}",
        f"{x} {words} {y}", f"what does {x} {sign} {y} make", f"calculate {x}{sign}{y}", ask,
    ))  # fmt: skip
    turns = [(ask, f"{a} {sign} {b} = {result}.")]
    if rng.random() < 0.15 and result < 20:
        more = rng.randint(1, 20 - result)
        turns.append((f"and plus {more}", f"{result} + {more} = {result + more}."))
    return turns


def _too_hard(rng: random.Random) -> Turn:
    a, b = rng.randint(21, 9999), rng.randint(2, 999)
    sign = rng.choice(("+", "-", "*", "/", "times", "divided by", "x"))
    if sign in {"*", "/", "times", "divided by", "x"} and rng.random() < 0.5:
        a = rng.randint(2, 20)
    return rng.choice((
        f"what is {a} {sign} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}", f"how much is {a} {sign} {b}",
        f"what is the square root of {a}", f"what is {b} percent of {a}", f"what is {a} squared",
    )), LIMIT  # fmt: skip


def counting(rng: random.Random) -> list[Turn]:
    """Counting up, down or in twos."""
    kind = rng.random()
    if kind < 0.5:
        low, high = 1, rng.randint(2, 20)
        ask = rng.choice((f"count to {high}", f"count up to {high}", f"count from 1 to {high}",
                          f"can you count to {high}", f"please count to {high}",
                          f"count from one to {WORDS[high]}"))  # fmt: skip
        numbers = range(low, high + 1)
    elif kind < 0.75:
        low = rng.randint(0, 20)
        high = low + rng.randint(2, 12)
        ask = rng.choice((f"count from {low} to {high}", f"the numbers from {low} to {high}",
                          f"list the numbers from {low} to {high}"))  # fmt: skip
        numbers = range(low, high + 1)
    elif kind < 0.9:
        high = rng.randint(3, 20)
        ask = rng.choice((f"count backwards from {high}", f"count down from {high}",
                          f"count from {high} down to 1"))  # fmt: skip
        numbers = range(high, 0, -1)
    else:
        high = 2 * rng.randint(3, 10)
        ask = rng.choice((f"count in twos to {high}", f"the even numbers up to {high}"))
        numbers = range(2, high + 1, 2)
    return [(ask, ", ".join(map(str, numbers)) + ".")]


def days(rng: random.Random) -> list[Turn]:
    """The days of the week."""
    i = rng.randrange(7)
    after, before = DAYS[(i + 1) % 7], DAYS[(i - 1) % 7]
    ask_after = rng.choice((f"what day comes after {DAYS[i]}", f"which day is after {DAYS[i]}",
                            f"what comes after {DAYS[i]}", f"the day after {DAYS[i]}",
                            f"what day follows {DAYS[i]}",
                            f"if today is {DAYS[i]}, what is tomorrow"))  # fmt: skip
    ask_before = rng.choice((f"what day comes before {DAYS[i]}", f"which day is before {DAYS[i]}",
                             f"what comes before {DAYS[i]}", f"the day before {DAYS[i]}",
                             f"if today is {DAYS[i]}, what was yesterday"))  # fmt: skip
    options = [
        [(ask_after, f"{after} comes after {DAYS[i]}."),
         (rng.choice(("and then", "and after that", "and the next one")),
          f"{DAYS[(i + 2) % 7]} comes after {after}.")],
        [(ask_after, f"{after} comes after {DAYS[i]}.")],
        [(ask_before, f"{before} comes before {DAYS[i]}.")],
        [(rng.choice(("name the days of the week", "list the days", "what are the days of the week",
                      "the days of the week please", "which days are there", "say the days")),
          ", ".join(DAYS) + ".")],
        [(rng.choice(("how many days are in a week", "how many days does a week have")),
          "A week has 7 days.")],
        [(rng.choice(("which days are the weekend", "what days are the weekend")),
          "Saturday and Sunday are the weekend.")],
    ]  # fmt: skip
    return rng.choice(options)


def months(rng: random.Random) -> list[Turn]:
    """The months of the year and their lengths."""
    i = rng.randrange(12)
    month = MONTHS[i]
    after, before = MONTHS[(i + 1) % 12], MONTHS[(i - 1) % 12]
    leap = ", or 29 in a leap year" if i == 1 else ""
    options = [
        [(rng.choice((f"what month comes after {month}", f"which month is after {month}",
                      f"what comes after {month}", f"which month follows {month}")),
          f"{after} comes after {month}.")],
        [(rng.choice((f"what month comes before {month}", f"which month is before {month}",
                      f"what comes before {month}")), f"{before} comes before {month}.")],
        [(rng.choice((f"how many days does {month} have", f"how many days are in {month}",
                      f"how long is {month}", f"days in {month}")),
          f"{month} has {LENGTHS[i]} days{leap}.")],
        [(rng.choice((f"what is the {ORDINALS[i]} month", f"which month is the {ORDINALS[i]}",
                      f"what is month number {i + 1}", f"name the {ORDINALS[i]} month")),
          f"The {ORDINALS[i]} month is {month}.")],
        [(rng.choice(("name the months", "list the months", "what are the months of the year",
                      "which months are there", "the twelve months please", "say the months")),
          ", ".join(MONTHS) + ".")],
        [(rng.choice(("how many months are in a year", "how many months does a year have")),
          "A year has 12 months.")],
    ]  # fmt: skip
    return rng.choice(options)
