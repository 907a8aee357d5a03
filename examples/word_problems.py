"""Multi-step word problems in English, with a worked reasoning trace and an answer.

The corpus of ``train_tiny.py``. Every problem is a pure function of ``(split, index)``: the same index gives the same
problem on every machine, and three splits never meet:

``train``     what the model and its tokenizer see.
``held_out``  the same sentence templates with people's names that no training problem uses, and at least one sum that no
              training problem contains (see `reserved`).
``unseen``    as ``held_out``, and every sentence that has an alternative is one of the wordings kept from training.

Arithmetic in a trace is written column by column, units first, as on paper: every number the model has to produce is a
sum, a difference or a product of single digits and a carry, and a model of a million weights can learn those.

Run it to read some:  python examples/word_problems.py --split unseen --count 3
"""

from __future__ import annotations

import argparse
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LIMIT = 999  # the largest number in a problem, its steps and its answer
SPLITS = ("train", "held_out", "unseen")

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic as it is written on paper
# ---------------------------------------------------------------------------------------------------------------------


class OutOfRange(ValueError):
    """A result below 1 or above `LIMIT`."""


@dataclass(frozen=True)
class Step:
    """One operation of a solution."""

    left: int
    op: str  # one of "+", "-", "x"
    right: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right}"

    @property
    def result(self) -> int:
        return {"+": self.left + self.right, "-": self.left - self.right, "x": self.left * self.right}[self.op]

    @property
    def columns(self) -> list[str]:
        """The columns of the sum on paper, units first; none where both numbers are single digits."""
        if self.left < 10 and self.right < 10:
            return []
        return list({"+": _add, "-": _subtract, "x": _multiply}[self.op](self.left, self.right))


def work_out(expression: str) -> tuple[list[Step], str]:
    """The steps of an expression and how they are written down.

    ``47 + 35`` is ``47 + 35: 7 + 5 = 12, 4 + 3 + 1 = 8, so 82.``; longer ones are reduced from the left, products
    first, and what is left of them is written again: ``3 + 5 - 2. 3 + 5 = 8, so 8 - 2 = 6.``
    """
    terms: list = [int(part) if part.isdigit() else part for part in expression.split()]
    steps, text = [], expression
    while len(terms) > 1:
        at = terms.index("x") if "x" in terms else 1
        step = Step(terms[at - 1], terms[at], terms[at + 1])
        if not 1 <= step.result <= LIMIT:
            raise OutOfRange(f"{step} = {step.result} is not between 1 and {LIMIT}")
        if len(terms) > 3:
            text += f". {step}"
        terms[at - 1 : at + 2] = [step.result]
        rest = " ".join(map(str, terms))
        if step.columns:
            text += f": {', '.join(step.columns)}, so {rest}"
        else:
            text += f" = {step.result}" + (f", so {rest}" if len(terms) > 1 else "")
        steps.append(step)
    return steps, text + "."


def _digits(number: int) -> list[int]:
    """Decimal digits, units first."""
    return [int(digit) for digit in reversed(str(number))]


def _add(left: int, right: int) -> Iterator[str]:
    above, below, carry = _digits(left), _digits(right), 0
    for column in range(max(len(above), len(below))):
        a = above[column] if column < len(above) else 0
        b = below[column] if column < len(below) else 0
        total = a + b + carry
        yield f"{a} + {b} + 1 = {total}" if carry else f"{a} + {b} = {total}"
        carry = total // 10


def _subtract(left: int, right: int) -> Iterator[str]:
    above, below, borrow = _digits(left), _digits(right), 0
    for column, a in enumerate(above):
        b = below[column] if column < len(below) else 0
        lent = 10 if a < b + borrow else 0
        yield f"{a + lent} - {b} - 1 = {a + lent - b - 1}" if borrow else f"{a + lent} - {b} = {a + lent - b}"
        borrow = lent // 10


def _multiply(left: int, right: int) -> Iterator[str]:
    if left > 9 and right > 9:
        raise ValueError(f"one factor of {left} x {right} must be a single digit")
    carry = 0
    for digit in _digits(max(left, right)):
        product = digit * min(left, right)
        yield f"{digit} x {right} = {product}" if left > right else f"{left} x {digit} = {product}"
        if carry:
            yield f"{product} + {carry} = {product + carry}"
        carry = (product + carry) // 10


def reserved(left: int, op: str, right: int) -> bool:
    """Whether this sum is kept from training: one in sixteen of those that are not sums of two single digits."""
    return (left > 9 or right > 9) and zlib.crc32(f"{left}{op}{right}".encode()) % 16 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
TRAIN_NAMES = {
    "she": ("Alice Amina Anna Aisha Beatriz Bella Carla Chloe Clara Daisy Diana Elena Ella Emma Eva Fatima Fiona Grace "
            "Hannah Helen Ines Iris Jane Julia Kate Keiko Laila Laura Lily Lina Lucy Maria Maya Mei Mia Nadia Nina Nora "
            "Olga Olivia Paula Petra Priya Rachel Rosa Ruth Sara Sofia Stella Tanya Tina Uma Vera Wendy Yara Zoe").split(),
    "he": ("Aaron Adam Ahmed Alan Ben Boris Carlos Chen Daniel David Diego Eli Eric Felix Finn Frank George Hassan Henry "
           "Hugo Ian Ivan Jack James Jonas Kai Karim Kevin Leo Liam Lucas Luis Marco Mark Max Milo Nick Noah Omar Oscar "
           "Pablo Paul Peter Raj Ravi Robert Sam Simon Stefan Theo Thomas Tom Victor Walter Yusuf Zack").split(),
}
HELD_OUT_NAMES = {
    "she": "Abigail Brenda Camila Edith Freya Gloria Ingrid Jasmine Leila Miriam Naomi Ophelia Ramona Sandra Tamara Violet".split(),
    "he": "Arthur Bruno Cedric Dmitri Emilio Gustav Harold Isaac Jamal Kenji Lorenzo Mateo Nigel Patrick Rashid Tobias".split(),
}
OBJECTS = ("marbles stickers stamps coins shells apples pears oranges lemons peaches cookies muffins candles pencils pens "
           "crayons books comics cards buttons beads ribbons balloons tickets postcards photos toys blocks puzzles stones "
           "feathers leaves flowers roses tulips eggs nuts grapes cherries plums carrots onions tomatoes potatoes badges "
           "magnets keys bottles cups plates spoons socks hats scarves kites balls dolls robots erasers notebooks").split()
CONTAINERS = "boxes bags baskets packs jars trays crates bowls tins drawers".split()
ANIMALS = "cows sheep goats hens ducks horses pigs geese rabbits bees".split()
GOODS = "shirt hat book cup lamp plate pen toy belt cap bowl scarf ball chair mug ticket plant".split()
PLANTS = "roses tulips trees bushes lettuces cabbages beans vines pumpkins melons".split()
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"}
# fmt: on
_VOWELS, _ONSETS, _ENDS = (
    "a e i o u ia ea".split(),
    "b d f g h j k l m n p r s t v w z br dr tr th sh".split(),
    "n r l s".split(),
)


@dataclass(frozen=True)
class Wording:
    """The wordings of one sentence: those that training uses and those it never sees."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()


def wording(*seen: str, unseen: tuple[str, ...] | str = ()) -> Wording:
    return Wording(seen, (unseen,) if isinstance(unseen, str) else unseen)


class Draw:
    """The random choices of one problem: people, things, numbers and wordings, all from one seed and one split."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        # Small numbers more often than large ones, as in a school book; one scale a problem, so that its numbers match.
        self.scale = rng.choice((20, 40, 60, 60, 99))
        self.names: set[str] = set()

    def person(self) -> dict[str, str]:
        pronoun = self.rng.choice(("she", "he"))
        names = TRAIN_NAMES if self.split == "train" else HELD_OUT_NAMES
        while True:
            # Made-up names in training teach the model to copy a name that it has never met.
            made_up = self.split == "train" and self.rng.random() < 0.35
            name = self._made_up_name() if made_up else self.rng.choice(names[pronoun])
            if name not in self.names:
                break
        self.names.add(name)
        return {"name": name, "she": pronoun, "She": pronoun.capitalize(), "her": "her" if pronoun == "she" else "him"}

    def _made_up_name(self) -> str:
        while True:
            syllables = (self.rng.choice(_ONSETS) + self.rng.choice(_VOWELS) for _ in range(self.rng.choice((2, 2, 3))))
            name = ("".join(syllables) + self.rng.choice(("", "", *_ENDS))).capitalize()
            if name not in HELD_OUT_NAMES["she"] and name not in HELD_OUT_NAMES["he"]:
                return name

    def number(self, low: int = 3, high: int | None = None) -> int:
        return self.rng.randint(low, max(low, self.scale if high is None else high))

    def factor(self, low: int = 2, high: int = 9) -> int:
        return self.rng.randint(low, high)

    def choice(self, options):
        return self.rng.choice(options)

    def sample(self, options, count: int) -> list:
        return self.rng.sample(options, count)

    def say(self, sentence: Wording, **words) -> str:
        options = sentence.unseen if self.split == "unseen" and sentence.unseen else sentence.seen
        return self.rng.choice(options).format(**words)


@dataclass(frozen=True)
class Problem:
    question: str
    steps: tuple[Step, ...]
    trace: str
    kind: str
    split: str
    index: int

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def answer_text(self) -> str:
        return f"The answer is {self.answer}."

    def record(self) -> dict:
        """The problem as a line of ``held_out.jsonl``."""
        return {
            "question": self.question,
            "answer": self.answer,
            "kind": self.kind,
            "steps": len(self.steps),
            "unseen_template": self.split == "unseen",
            "reasoning": self.trace,
        }


@dataclass
class Story:
    """A problem while it is being told: sentences of the question, and the lines of its solution."""

    sentences: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def tell(self, sentence: str) -> str:
        self.sentences.append(sentence)
        return sentence

    def tell_product(self, sentence: str) -> str:
        """Tell a sentence with two numbers; their product, in the order in which the sentence has them."""
        left, right = re.findall(r"\d+", self.tell(sentence))
        return f"{left} x {right}"

    def solve(self, lead: str, expression: str) -> int:
        steps, text = work_out(expression)
        self.steps += steps
        self.lines.append(f"{lead} {text}")
        return steps[-1].result


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of problem. Each tells a story and solves it; numbers that leave 1..LIMIT are thrown away by `problem`.
# ---------------------------------------------------------------------------------------------------------------------

SUM = "That is"  # opens a line that is one expression, made of the numbers in the order of the question

START = wording(
    "{name} has {n} {things}.",
    "{name} starts with {n} {things}.",
    "At first {name} has {n} {things}.",
    "There are {n} {things} in {name}'s collection.",
    "{name} owns {n} {things}.",
    "In the morning {name} has {n} {things}.",
    unseen=("{name} keeps {n} {things} on a shelf.", "On Sunday {name} has {n} {things}."),
)
GAIN = wording(
    "{She} buys {n} more.",
    "Then {she} finds {n} more.",
    "{other} gives {name} {n} more.",
    "{She} gets {n} more from {other}.",
    "Later {name} buys another {n} {things}.",
    "{She} wins {n} {things} in a game.",
    "After that {she} collects {n} more {things}.",
    "{name} receives {n} {things} as a present.",
    unseen=(
        "{other} brings {name} {n} more {things}.",
        "Then {name} picks up {n} more.",
        "Later {she} wins another {n}.",
    ),
)
LOSS = wording(
    "{She} gives {n} to {other}.",
    "Then {she} loses {n} of them.",
    "{She} sells {n} {things}.",
    "Then {name} gives away {n} {things}.",
    "{other} takes {n} of the {things}.",
    "After that {she} throws away {n} of them.",
    "{name} gives {other} {n} {things}.",
    "Later {she} uses {n} of them.",
    unseen=(
        "Then {name} sells {n} to {other}.",
        "{She} loses {n} {things} on the way home.",
        "Later {she} gives {n} of them away.",
    ),
)
HOW_MANY_NOW = wording(
    "How many {things} does {name} have now?",
    "How many {things} does {she} have in the end?",
    "How many {things} are left with {name}?",
    "How many {things} does {name} end up with?",
    unseen=("What is the number of {things} that {name} has now?", "In the end, how many {things} does {name} have?"),
)


def _changes(draw: Draw, story: Story, expression: str, count: int, gain: Wording, loss: Wording, **words) -> str:
    """Tell ``count`` gains and losses; the expression with them."""
    for _ in range(count):
        n, op = draw.number(), draw.choice("+-")
        story.tell(draw.say(gain if op == "+" else loss, n=n, **words))
        expression += f" {op} {n}"
    return expression


def changes(draw: Draw, story: Story) -> None:
    who, other, things = draw.person(), draw.person(), draw.choice(OBJECTS)
    words = who | {"things": things, "other": other["name"]}
    start = draw.number(10)
    story.tell(draw.say(START, n=start, **words))
    story.solve(SUM, _changes(draw, story, f"{start}", draw.choice((2, 2, 3, 3, 4)), GAIN, LOSS, **words))
    story.tell(draw.say(HOW_MANY_NOW, **words))


BUS_START = wording(
    "A bus leaves the station with {n} people on it.",
    "There are {n} passengers on a train.",
    "A ferry starts its trip with {n} passengers.",
    "A bus has {n} passengers.",
    unseen=("A train leaves the city with {n} people on it.", "There are {n} people on a ferry."),
)
GET_ON = wording(
    "At the next stop {n} people get on.",
    "Then {n} more get on.",
    "{n} more passengers come on board.",
    "At a stop {n} people join.",
    unseen=("At the second stop {n} passengers get on.", "Then {n} people come on board."),
)
GET_OFF = wording(
    "At the next stop {n} people get off.",
    "Then {n} of them get off.",
    "{n} passengers leave.",
    "At a stop {n} people go out.",
    unseen=("At the second stop {n} passengers get off.", "Then {n} people leave."),
)
ON_BOARD = wording(
    "How many people are on board now?",
    "How many passengers are there now?",
    "How many people remain on board?",
    unseen=("How many passengers remain?", "How many people are there in the end?"),
)


def bus(draw: Draw, story: Story) -> None:
    start = draw.number(10)
    story.tell(draw.say(BUS_START, n=start))
    story.solve(SUM, _changes(draw, story, f"{start}", draw.choice((2, 3, 3, 4)), GET_ON, GET_OFF))
    story.tell(draw.say(ON_BOARD))


GROUPS = wording(
    "{name} has {k} {boxes} with {n} {things} in each.",
    "{name} buys {k} {boxes} of {n} {things} each.",
    "{name} packs {k} {boxes}, and each holds {n} {things}.",
    "There are {k} {boxes} with {n} {things} each in {name}'s room.",
    "{name} fills {k} {boxes} with {n} {things} each.",
    unseen=("{name} has {k} {boxes}, each with {n} {things}.", "{name} carries {k} {boxes} of {n} {things} each."),
)
MORE_GROUPS = wording(
    "{She} also has {k} {boxes} with {n} {things} in each.",
    "{She} also buys {k} {boxes} of {n} each.",
    "There are {k} {boxes} with {n} {things} each as well.",
    unseen="{She} also fills {k} {boxes} with {n} each.",
)
ALTOGETHER = wording(
    "How many {things} does {name} have altogether?",
    "How many {things} are there in total?",
    "How many {things} does {she} have in all?",
    unseen=("What is the total number of {things}?", "Altogether, how many {things} are there?"),
)


def groups(draw: Draw, story: Story) -> None:
    who, other, things = draw.person(), draw.person(), draw.choice(OBJECTS)
    words = who | {"things": things, "other": other["name"]}
    boxes = draw.sample(CONTAINERS, 2)
    largest = max(12, draw.scale // 3)
    expression = story.tell_product(
        draw.say(GROUPS, k=draw.factor(), n=draw.number(2, largest), boxes=boxes[0], **words)
    )
    if draw.rng.random() < 0.35:
        more = draw.say(MORE_GROUPS, k=draw.factor(), n=draw.number(2, largest), boxes=boxes[1], **words)
        expression += f" + {story.tell_product(more)}"
        count = draw.choice((0, 1))
    else:
        count = draw.choice((1, 2, 2))
    story.solve(SUM, _changes(draw, story, expression, count, GAIN, LOSS, **words))
    story.tell(draw.say(HOW_MANY_NOW if count else ALTOGETHER, **words))


HAS = wording(
    "{name} has {n} {things}.",
    "{name} collects {n} {things}.",
    "{name} owns {n} {things}.",
    "{name} picks {n} {things}.",
    unseen=("{name} finds {n} {things}.", "{name} keeps {n} {things}."),
)
HAS_MORE = wording(
    "{name} has {n} more {things} than {than}.",
    "{name} has {n} more than {than}.",
    "{name} owns {n} {things} more than {than}.",
    unseen=("{name} owns {n} more than {than}.", "{name} has {n} {things} more than {than} does."),
)
HAS_FEWER = wording(
    "{name} has {n} fewer {things} than {than}.",
    "{name} has {n} fewer than {than}.",
    "{name} owns {n} {things} fewer than {than}.",
    unseen=("{name} owns {n} fewer than {than}.", "{name} has {n} {things} fewer than {than} does."),
)
HAS_TIMES = wording(
    "{name} has {times} as many {things} as {than}.",
    "{name} has {times} as many as {than}.",
    "{name} owns {times} as many {things} as {than}.",
    unseen=("{name} owns {times} as many as {than}.", "{name} has {times} as many {things} as {than} does."),
)
HOW_MANY_HAS = wording(
    "How many {things} does {name} have?",
    "How many {things} belong to {name}?",
    unseen="What is the number of {things} that {name} has?",
)
TOGETHER = wording(
    "How many {things} do they have together?",
    "How many {things} do they have in total?",
    "How many {things} are there altogether?",
    unseen=("In total, how many {things} do they have?", "How many {things} do they have in all?"),
)


def _compared(draw: Draw, story: Story, name: str, than: str, base: int, things: str, which: str) -> int:
    """Say how many ``name`` has by comparison with ``than``, who has ``base``."""
    relation = draw.choice(("more", "fewer", "times"))
    if relation == "times":
        k = draw.factor(2, 6)
        story.tell(draw.say(HAS_TIMES, name=name, than=than, times=TIMES[k], things=things))
        return story.solve(f"The {which} has", f"{base} x {k}")
    n = draw.number()
    story.tell(draw.say(HAS_MORE if relation == "more" else HAS_FEWER, name=name, than=than, n=n, things=things))
    return story.solve(f"The {which} has", f"{base} {'+' if relation == 'more' else '-'} {n}")


def comparison(draw: Draw, story: Story) -> None:
    a, b, c = (draw.person()["name"] for _ in range(3))
    things, first = draw.choice(OBJECTS), draw.number(5)
    story.tell(draw.say(HAS, name=a, n=first, things=things))
    second = _compared(draw, story, b, a, first, things, "second")
    shape = draw.choice(("two together", "third", "third together"))
    if shape == "two together":
        story.solve("Together", f"{first} + {second}")
    else:
        third = _compared(draw, story, c, b, second, things, "third")
        if shape == "third together":
            story.solve("Together", f"{first} + {second} + {third}")
    if shape == "third":
        story.tell(draw.say(HOW_MANY_HAS, name=c, things=things))
    else:
        story.tell(draw.say(TOGETHER, things=things))


TWO_DAYS = wording(
    "{name} finds {m} {things} on Monday and {n} on Tuesday.",
    "{name} picks {m} {things} in the morning and {n} in the afternoon.",
    "{name} collects {m} {things} on one day and {n} on the next.",
    "{name} sells {m} {things} on Saturday and {n} on Sunday.",
    unseen=(
        "{name} sells {m} {things} on Monday and {n} on Tuesday.",
        "{name} collects {m} {things} in the morning and {n} in the evening.",
    ),
)
HOW_MANY_MORE = wording(
    "How many more {things} is that for {name} than for {other}?",
    "How many more {things} does {name} get than {other}?",
    "By how many {things} is {name} ahead of {other}?",
    unseen="How many more {things} has {name} got than {other}?",
)


def difference(draw: Draw, story: Story) -> None:
    a, b = (draw.person()["name"] for _ in range(2))
    things = draw.choice(OBJECTS)
    more, less = sorted(([draw.number(), draw.number()] for _ in range(2)), key=sum, reverse=True)
    pattern = draw.say(TWO_DAYS, name="{name}", m="{m}", n="{n}", things=things)
    totals = []
    for which, name, (m, n) in (("first", a, more), ("second", b, less)):
        story.tell(pattern.format(name=name, m=m, n=n))
        totals.append(story.solve(f"The {which} has", f"{m} + {n}"))
    story.solve("The difference is", f"{totals[0]} - {totals[1]}")
    story.tell(draw.say(HOW_MANY_MORE, name=a, other=b, things=things))


TWO_START = wording(
    "{a} has {m} {things} and {b} has {n}.",
    "{a} has {m} {things}. {b} has {n} {things}.",
    "{a} owns {m} {things} and {b} owns {n} {things}.",
    unseen=("{a} starts with {m} {things} and {b} starts with {n}.", "{a} has {m} {things}, while {b} has {n}."),
)
TRANSFER = wording(
    "{b} gives {n} of them to {a}.",
    "Then {b} gives {a} {n} {things}.",
    "{a} gets {n} {things} from {b}.",
    unseen=("{a} receives {n} {things} from {b}.", "Later {b} gives {n} to {a}."),
)
MORE_NOW = wording(
    "How many more {things} does {a} have than {b} now?",
    "Now {a} has more than {b}. How many more?",
    unseen="In the end, how many more {things} does {a} have than {b}?",
)


def transfer(draw: Draw, story: Story) -> None:
    a, b = (draw.person()["name"] for _ in range(2))
    things, m, n, moved = draw.choice(OBJECTS), draw.number(8), draw.number(8), draw.number(2)
    story.tell(draw.say(TWO_START, a=a, b=b, m=m, n=n, things=things))
    story.tell(draw.say(TRANSFER, a=a, b=b, n=moved, things=things))
    more = story.solve("The first has", f"{m} + {moved}")
    less = story.solve("The second has", f"{n} - {moved}")
    story.solve("The difference is", f"{more} - {less}")
    story.tell(draw.say(MORE_NOW, a=a, b=b, things=things))


MONEY = wording(
    "{name} has {n} dollars.",
    "{name} goes to the shop with {n} dollars.",
    "{name} takes {n} dollars to the market.",
    unseen=("{name} goes to the market with {n} dollars.", "{name} has {n} dollars to spend."),
)
BUYS_MANY = wording(
    "{She} buys {k} {good}s for {n} dollars each.",
    "{She} buys {k} {good}s that cost {n} dollars each.",
    "{She} pays for {k} {good}s at {n} dollars each.",
    unseen=("{She} pays {n} dollars each for {k} {good}s.", "{She} takes {k} {good}s that cost {n} dollars each."),
)
BUYS_ONE = wording(
    "{She} also buys a {good} for {n} dollars.",
    "Then {she} pays {n} dollars for a {good}.",
    "A {good} costs {her} another {n} dollars.",
    unseen="{She} also pays {n} dollars for a {good}.",
)
DOLLARS_LEFT = wording(
    "How many dollars are left?",
    "How many dollars does {name} have left?",
    "How much money does {she} still have?",
    unseen=("How much money is left?", "How many dollars does {she} have now?"),
)


def shop(draw: Draw, story: Story) -> None:
    who = draw.person()
    many, one = draw.sample(GOODS, 2)
    k, price, other = draw.factor(), draw.number(2, max(15, draw.scale // 4)), draw.number(3)
    two = draw.rng.random() < 0.65
    money = k * price + (other if two else 0) + draw.number(5)
    story.tell(draw.say(MONEY, n=money, **who))
    expression = f"{money} - {story.tell_product(draw.say(BUYS_MANY, k=k, n=price, good=many, **who))}"
    if two:
        story.tell(draw.say(BUYS_ONE, n=other, good=one, **who))
        expression += f" - {other}"
    story.solve(SUM, expression)
    story.tell(draw.say(DOLLARS_LEFT, **who))


BOOK = wording(
    "{name}'s book has {n} pages.",
    "{name} is reading a book of {n} pages.",
    "There are {n} pages in {name}'s book.",
    unseen=("{name} has a book with {n} pages.", "{name} starts a book of {n} pages."),
)
READS = wording(
    "{She} reads {n} pages a day for {k} days.",
    "For {k} days {she} reads {n} pages every day.",
    "{She} reads {n} pages on each of {k} days.",
    unseen=("Every day for {k} days {she} reads {n} pages.", "{She} reads {n} pages each day for {k} days."),
)
READS_MORE = wording(
    "Then {she} reads {n} more.",
    "On the last day {she} reads {n} pages.",
    "After that {she} reads another {n} pages.",
    unseen="Then {name} reads another {n} pages.",
)
PAGES_LEFT = wording(
    "How many pages are left?",
    "How many pages does {name} still have to read?",
    unseen=("How many pages does {she} have left?", "How many pages remain?"),
)


def reading(draw: Draw, story: Story) -> None:
    who = draw.person()
    k, pages, more = draw.factor(), draw.number(4, max(15, draw.scale // 4)), draw.number(3)
    two = draw.rng.random() < 0.6
    book = k * pages + (more if two else 0) + draw.number(5)
    story.tell(draw.say(BOOK, n=book, **who))
    expression = f"{book} - {story.tell_product(draw.say(READS, k=k, n=pages, **who))}"
    if two:
        story.tell(draw.say(READS_MORE, n=more, **who))
        expression += f" - {more}"
    story.solve(SUM, expression)
    story.tell(draw.say(PAGES_LEFT, **who))


ROWS = wording(
    "{name} plants {k} rows of {n} {plants}.",
    "A garden has {k} rows with {n} {plants} in each.",
    "There are {k} rows of {n} {plants} in {name}'s garden.",
    unseen=("{name}'s garden has {k} rows of {n} {plants}.", "{name} plants {k} rows with {n} {plants} in each."),
)
DIE = wording(
    "In winter {n} of them die.",
    "{n} of the {plants} are cut.",
    "A storm destroys {n} of them.",
    unseen=("In a storm {n} of them die.", "Then {n} of the {plants} die."),
)
PLANT_MORE = wording(
    "Then {name} plants {n} more.",
    "In spring {n} new {plants} are planted.",
    "{name} adds {n} {plants}.",
    unseen=("In spring {name} plants {n} more {plants}.", "Then {n} new ones are planted."),
)
HOW_MANY_PLANTS = wording(
    "How many {plants} are there now?",
    "How many {plants} are in the garden in the end?",
    unseen="What is the number of {plants} now?",
)


def garden(draw: Draw, story: Story) -> None:
    words = draw.person() | {"plants": draw.choice(PLANTS)}
    expression = story.tell_product(
        draw.say(ROWS, k=draw.factor(), n=draw.number(3, max(15, draw.scale // 3)), **words)
    )
    story.solve(SUM, _changes(draw, story, expression, draw.choice((1, 2, 2, 3)), PLANT_MORE, DIE, **words))
    story.tell(draw.say(HOW_MANY_PLANTS, **words))


WORKS = wording(
    "{name} works {k} hours for {n} dollars an hour.",
    "{name} earns {n} dollars an hour and works {k} hours.",
    "For {k} hours of work {name} gets {n} dollars an hour.",
    unseen=("{name} works {k} hours and earns {n} dollars an hour.", "{name} gets {n} dollars an hour for {k} hours."),
)
WORKS_MORE = wording(
    "Then {she} works {k} hours for {n} dollars an hour.",
    "Then {she} works {k} more hours at {n} dollars an hour.",
    unseen="After that {she} works {k} hours for {n} dollars an hour.",
)
SPENDS = wording(
    "{She} spends {n} dollars on food.",
    "{She} pays {n} dollars for a {good}.",
    "{name} gives {n} dollars to {other}.",
    unseen=("{She} spends {n} dollars on a {good}.", "{name} pays {n} dollars for food."),
)
TIP = wording(
    "{other} gives {her} {n} dollars more.",
    "{She} also gets {n} dollars from {other}.",
    unseen="{other} gives {name} another {n} dollars.",
)


def wages(draw: Draw, story: Story) -> None:
    words = draw.person() | {"other": draw.person()["name"], "good": draw.choice(GOODS)}
    highest = max(20, draw.scale // 3)
    expression = story.tell_product(draw.say(WORKS, k=draw.factor(), n=draw.number(5, highest), **words))
    if draw.rng.random() < 0.5:
        more = draw.say(WORKS_MORE, k=draw.factor(), n=draw.number(5, highest), **words)
        expression += f" + {story.tell_product(more)}"
    story.solve(SUM, _changes(draw, story, expression, 1, TIP, SPENDS, **words))
    story.tell(draw.say(DOLLARS_LEFT, **words))


FARM = wording(
    "A farm has {n} {animals}.",
    "There are {n} {animals} on {name}'s farm.",
    "{name} keeps {n} {animals}.",
    unseen=("{name}'s farm has {n} {animals}.", "A farmer keeps {n} {animals}."),
)
FARM_MORE = wording(
    "There are {n} more {animals} than {than}.",
    "The farm has {n} more {animals} than {than}.",
    unseen="The number of {animals} is {n} more than that of {than}.",
)
FARM_FEWER = wording(
    "There are {n} fewer {animals} than {than}.",
    "The farm has {n} fewer {animals} than {than}.",
    unseen="The number of {animals} is {n} fewer than that of {than}.",
)
FARM_TIMES = wording(
    "There are {times} as many {animals} as {than}.",
    "The farm has {times} as many {animals} as {than}.",
    unseen="The number of {animals} is {times} that of {than}.",
)
HOW_MANY_ANIMALS = wording(
    "How many animals are there in all?",
    "How many animals are there altogether?",
    unseen="What is the total number of animals?",
)


def farm(draw: Draw, story: Story) -> None:
    who, animals = draw.person(), draw.sample(ANIMALS, 3)
    first = draw.number(4)
    story.tell(draw.say(FARM, n=first, animals=animals[0], **who))
    counts = [first]
    for which, kind in list(zip(("second", "third"), animals[1:], strict=True))[: draw.choice((1, 2, 2))]:
        relation = draw.choice(("more", "fewer", "times"))
        if relation == "times":
            k = draw.factor(2, 6)
            story.tell(draw.say(FARM_TIMES, animals=kind, than=animals[0], times=TIMES[k]))
            counts.append(story.solve(f"The {which} has", f"{first} x {k}"))
        else:
            n, op = draw.number(), "+" if relation == "more" else "-"
            story.tell(draw.say(FARM_MORE if op == "+" else FARM_FEWER, animals=kind, than=animals[0], n=n))
            counts.append(story.solve(f"The {which} has", f"{first} {op} {n}"))
    story.solve("Together", " + ".join(map(str, counts)))
    story.tell(draw.say(HOW_MANY_ANIMALS))


POINTS = wording(
    "{name} scores {n} points in the first game.",
    "In the first game {name} gets {n} points.",
    unseen="{name} wins {n} points in the first game.",
)
POINTS_MORE = wording(
    "In the {game} game {she} scores {n} more than in the first.",
    "{She} gets {n} points more in the {game} game than in the first.",
    unseen="In the {game} game {she} gets {n} points more than in the first.",
)
POINTS_FEWER = wording(
    "In the {game} game {she} scores {n} fewer than in the first.",
    "{She} gets {n} points fewer in the {game} game than in the first.",
    unseen="In the {game} game {she} gets {n} points fewer than in the first.",
)
HOW_MANY_POINTS = wording(
    "How many points does {name} have in total?",
    "How many points is that altogether?",
    unseen="What is the total number of points?",
)


def points(draw: Draw, story: Story) -> None:
    who, first = draw.person(), draw.number(5)
    story.tell(draw.say(POINTS, n=first, **who))
    counts = [first]
    for game in ("second", "third")[: draw.choice((1, 2))]:
        n, op = draw.number(), draw.choice("+-")
        story.tell(draw.say(POINTS_MORE if op == "+" else POINTS_FEWER, n=n, game=game, **who))
        counts.append(story.solve(f"The {game} has", f"{first} {op} {n}"))
    story.solve("Together", " + ".join(map(str, counts)))
    story.tell(draw.say(HOW_MANY_POINTS, **who))


KINDS: dict[str, Callable[[Draw, Story], None]] = {
    function.__name__: function
    for function in (changes, bus, groups, comparison, difference, transfer, shop, reading, garden, wages, farm, points)
}

# ---------------------------------------------------------------------------------------------------------------------
# The splits
# ---------------------------------------------------------------------------------------------------------------------


def problem(split: str, index: int) -> Problem:
    """The problem number ``index`` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {index}")
    kind = list(KINDS)[index % len(KINDS)]
    while True:
        story = Story()
        try:
            KINDS[kind](Draw(rng, split), story)
        except OutOfRange:
            continue
        has_reserved = any(reserved(step.left, step.op, step.right) for step in story.steps)
        if 2 <= len(story.steps) <= 4 and has_reserved == (split != "train"):
            return Problem(" ".join(story.sentences), tuple(story.steps), " ".join(story.lines), kind, split, index)


def problems(split: str, count: int, start: int = 0) -> Iterator[Problem]:
    return (problem(split, index) for index in range(start, start + count))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some word problems.")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--start", type=int, default=0, help="number of the first problem")
    arguments = parser.parse_args()
    for item in problems(arguments.split, arguments.count, arguments.start):
        print(f"[{item.kind}] {item.question}\n  {item.trace}\n  {item.answer_text}\n")


if __name__ == "__main__":
    main()
