"""Story families of the arithmetic problems: what is told, asked and computed.

A family draws numbers and returns a `Story`. Its plans are the right solution as a chain of
equations; its answer is worked out from the numbers on its own, as a check on the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from random import Random

from megatron_amrlhf.demo.story import Earlier, Plan, Story

_NAMES = (
    *("Ann", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas"),
    *("Kira", "Liam", "Mei", "Nora", "Omar", "Paula", "Rosa", "Sam", "Tara", "Wei"),
)
_GOODS = ("pens", "eggs", "cookies", "stickers", "marbles", "candles", "tea bags", "batteries")


def _shopping(rng: Random) -> Story:
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    boxes, each, given = rng.randint(3, 15), rng.randint(4, 12), rng.randint(2, 11)
    question = (
        f"{name} buys {boxes} boxes of {goods} with {each} {goods} in each box and gives {given} "
        f"{goods} to a friend. How many {goods} does {name} have left?"
    )
    plans = (
        Plan(f"{name} buys {{eq}} {goods}", boxes, "*", each),
        Plan(f"{name} has {{eq}} {goods} left", Earlier(0), "-", given),
    )
    return _story("shopping", (boxes, each, given), question, plans, boxes * each - given)


def _change(rng: Random) -> Story:
    name = rng.choice(_NAMES)
    shirts, price = rng.randint(2, 6), rng.randint(7, 18)
    caps, cap_price = rng.randint(2, 6), rng.randint(3, 9)
    paid = rng.choice((100, 150, 200))
    question = (
        f"{name} buys {shirts} shirts for {price} dollars each and {caps} caps for {cap_price} "
        f"dollars each, and pays with {paid} dollars. How many dollars does {name} get back?"
    )
    plans = (
        Plan("the shirts cost {eq} dollars", shirts, "*", price),
        Plan("the caps cost {eq} dollars", caps, "*", cap_price),
        Plan("together they cost {eq} dollars", Earlier(0), "+", Earlier(1)),
        Plan(f"{name} gets back {{eq}} dollars", paid, "-", Earlier(2)),
    )
    numbers = (shirts, price, caps, cap_price, paid)
    return _story("change", numbers, question, plans, paid - shirts * price - caps * cap_price)


def _travel(rng: Random) -> Story:
    name = rng.choice(_NAMES)
    hours, speed = rng.randint(2, 6), rng.choice((40, 50, 60, 70, 80, 90))
    later, slow = rng.randint(2, 5), rng.choice((12, 15, 18, 20, 25, 30))
    question = (
        f"{name} drives for {hours} hours at {speed} km per hour and then cycles for {later} hours "
        f"at {slow} km per hour. How many km does {name} travel in all?"
    )
    plans = (
        Plan(f"{name} drives {{eq}} km", hours, "*", speed),
        Plan(f"{name} cycles {{eq}} km", later, "*", slow),
        Plan("the whole way is {eq} km", Earlier(0), "+", Earlier(1)),
    )
    numbers = (hours, speed, later, slow)
    return _story("travel", numbers, question, plans, hours * speed + later * slow)


def _sharing(rng: Random) -> Story:
    name, friends, share = rng.choice(_NAMES), rng.randint(3, 9), rng.randint(4, 15)
    bags = rng.randint(2, 6)
    kept = rng.randint(2, 12)
    each = Fraction(friends * share + kept, bags)
    if each.denominator > 1:
        return _sharing(rng)
    question = (
        f"{name} has {bags} bags with {each} sweets in each bag. {name} keeps {kept} sweets and "
        f"shares the rest equally among {friends} friends. How many sweets does each friend get?"
    )
    plans = (
        Plan("the bags hold {eq} sweets", bags, "*", int(each)),
        Plan("{eq} sweets are shared", Earlier(0), "-", kept),
        Plan("each friend gets {eq} sweets", Earlier(1), "/", friends),
    )
    return _story("sharing", (bags, int(each), kept, friends), question, plans, share)


def _recipe(rng: Random) -> Story:
    name, people, grams = rng.choice(_NAMES), rng.randint(2, 8), rng.randint(20, 90)
    guests, spare = rng.randint(9, 20), rng.choice((50, 100, 150, 200))
    total = people * grams
    question = (
        f"A recipe for {people} people needs {total} grams of flour. {name} cooks it for {guests} "
        f"people and wants {spare} grams of flour more to dust the table. How many grams of flour "
        f"does {name} need?"
    )
    plans = (
        Plan("one person needs {eq} grams", total, "/", people),
        Plan(f"{guests} people need {{eq}} grams", Earlier(0), "*", guests),
        Plan(f"with the flour for the table {name} needs {{eq}} grams", Earlier(1), "+", spare),
    )
    numbers = (people, total, guests, spare)
    return _story("recipe", numbers, question, plans, Fraction(total * guests, people) + spare)


def _saving(rng: Random) -> Story:
    name, weekly, weeks = rng.choice(_NAMES), rng.randint(6, 25), rng.randint(4, 15)
    start, goal = rng.randint(10, 60), rng.choice((400, 450, 500, 600))
    question = (
        f"{name} has {start} dollars and saves {weekly} dollars each week for {weeks} weeks. "
        f"A bicycle costs {goal} dollars. How many dollars are still missing?"
    )
    plans = (
        Plan(f"{name} saves {{eq}} dollars", weekly, "*", weeks),
        Plan(f"{name} has {{eq}} dollars by then", start, "+", Earlier(0)),
        Plan("there are {eq} dollars missing", goal, "-", Earlier(1)),
    )
    numbers = (weekly, weeks, start, goal)
    return _story("saving", numbers, question, plans, goal - start - weekly * weeks)


def _work(rng: Random) -> Story:
    name, hours, days = rng.choice(_NAMES), rng.randint(3, 9), rng.randint(3, 12)
    wage, fee = rng.randint(11, 25), rng.randint(15, 90)
    question = (
        f"{name} works {hours} hours a day for {days} days and earns {wage} dollars an hour. "
        f"Afterwards {name} pays {fee} dollars for the train. How many dollars are left?"
    )
    plans = (
        Plan(f"{name} works {{eq}} hours", hours, "*", days),
        Plan(f"{name} earns {{eq}} dollars", Earlier(0), "*", wage),
        Plan("after the train {eq} dollars are left", Earlier(1), "-", fee),
    )
    numbers = (hours, days, wage, fee)
    return _story("work", numbers, question, plans, hours * days * wage - fee)


def _area(rng: Random) -> Story:
    length, width, side = rng.randint(8, 20), rng.randint(6, 12), rng.randint(2, 5)
    price = rng.randint(3, 9)
    question = (
        f"A garden is {length} meters long and {width} meters wide. In it lies a square pond with "
        f"sides of {side} meters. Grass for the rest costs {price} dollars per square meter. "
        "How many dollars does the grass cost?"
    )
    plans = (
        Plan("the garden has {eq} square meters", length, "*", width),
        Plan("the pond has {eq} square meters", side, "*", side),
        Plan("the grass covers {eq} square meters", Earlier(0), "-", Earlier(1)),
        Plan("the grass costs {eq} dollars", Earlier(2), "*", price),
    )
    numbers = (length, width, side, price)
    return _story("area", numbers, question, plans, (length * width - side**2) * price)


def _discount(rng: Random) -> Story:
    name, price = rng.choice(_NAMES), rng.choice(range(40, 261, 20))
    percent, pieces = rng.choice((5, 10, 15, 20, 25, 30, 40)), rng.randint(2, 9)
    question = (
        f"A lamp costs {price} dollars. {name} gets {percent} percent off and buys {pieces} lamps. "
        f"How many dollars does {name} pay?"
    )
    plans = (
        Plan("one percent of the price is {eq} dollars", price, "/", 100),
        Plan(f"{percent} percent off is {{eq}} dollars", Earlier(0), "*", percent),
        Plan("each lamp costs {eq} dollars", price, "-", Earlier(1)),
        Plan(f"{name} pays {{eq}} dollars", Earlier(2), "*", pieces),
    )
    answer = Fraction(price * (100 - percent) * pieces, 100)
    return _story("discount", (price, percent, pieces), question, plans, answer)


def _ages(rng: Random) -> Story:
    first, second = rng.sample(_NAMES, 2)
    age, older, times = rng.randint(4, 14), rng.randint(2, 9), rng.randint(2, 5)
    question = (
        f"{first} is {age} years old. {second} is {older} years older than {first}. Their teacher "
        f"is {times} times as old as {second}. How old are the three together?"
    )
    plans = (
        Plan(f"{second} is {{eq}} years old", age, "+", older),
        Plan("the teacher is {eq} years old", Earlier(0), "*", times),
        Plan("the two children are {eq} years old together", age, "+", Earlier(0)),
        Plan("the three are {eq} years old together", Earlier(2), "+", Earlier(1)),
    )
    answer = age + (age + older) * (times + 1)
    return _story("ages", (age, older, times), question, plans, answer)


def _reading(rng: Random) -> Story:
    name, daily, days = rng.choice(_NAMES), rng.randint(8, 25), rng.randint(3, 9)
    later, faster = rng.randint(3, 9), rng.randint(15, 40)
    pages = daily * days + later * faster
    question = (
        f"A book has {pages} pages. {name} reads {daily} pages a day for {days} days and after "
        f"that {faster} pages a day. How many more days does {name} need to finish the book?"
    )
    plans = (
        Plan(f"{name} reads {{eq}} pages at first", daily, "*", days),
        Plan("there are {eq} pages left", pages, "-", Earlier(0)),
        Plan(f"{name} needs {{eq}} more days", Earlier(1), "/", faster),
    )
    return _story("reading", (pages, daily, days, faster), question, plans, later)


def _fence(rng: Random) -> Story:
    length, width, price = rng.randint(7, 30), rng.randint(4, 18), rng.randint(3, 12)
    gate = rng.randint(2, 5)
    question = (
        f"A field is {length} meters long and {width} meters wide. A fence goes all around it but "
        f"for a gate of {gate} meters. A meter of fence costs {price} dollars. "
        "How many dollars does the fence cost?"
    )
    plans = (
        Plan("one long and one short side are {eq} meters", length, "+", width),
        Plan("all around it is {eq} meters", Earlier(0), "*", 2),
        Plan("the fence is {eq} meters long", Earlier(1), "-", gate),
        Plan("the fence costs {eq} dollars", Earlier(2), "*", price),
    )
    numbers = (length, width, gate, price)
    return _story("fence", numbers, question, plans, (2 * length + 2 * width - gate) * price)


def _harvest(rng: Random) -> Story:
    name, crates, per_crate = rng.choice(_NAMES), rng.randint(3, 12), rng.choice((12, 15, 20, 24))
    rows, trees = rng.randint(2, 6), rng.randint(2, 8)
    apples = Fraction(crates * per_crate, rows * trees)
    if apples.denominator > 1 or apples < 2:
        return _harvest(rng)
    question = (
        f"{name} has {rows} rows of {trees} young apple trees and picks {apples} apples from each "
        f"tree. A crate holds {per_crate} apples. How many crates does {name} fill?"
    )
    plans = (
        Plan("there are {eq} trees", rows, "*", trees),
        Plan(f"{name} picks {{eq}} apples", Earlier(0), "*", int(apples)),
        Plan(f"{name} fills {{eq}} crates", Earlier(1), "/", per_crate),
    )
    return _story("harvest", (rows, trees, int(apples), per_crate), question, plans, crates)


def _bus(rng: Random) -> Story:
    start, off, on = rng.randint(18, 45), rng.randint(3, 15), rng.randint(2, 18)
    leaving = rng.randint(2, 12)
    question = (
        f"A bus starts with {start} passengers. At the first stop {off} get off and {on} get on. "
        f"At the second stop {leaving} get off. How many passengers are on the bus then?"
    )
    plans = (
        Plan("after the first ones get off there are {eq} passengers", start, "-", off),
        Plan("with the new ones there are {eq} passengers", Earlier(0), "+", on),
        Plan("after the second stop there are {eq} passengers", Earlier(1), "-", leaving),
    )
    numbers = (start, off, on, leaving)
    return _story("bus", numbers, question, plans, start - off + on - leaving)


def _average(rng: Random) -> Story:
    name, mean = rng.choice(_NAMES), rng.randint(12, 60)
    first, second = rng.randint(5, 2 * mean), rng.randint(5, 2 * mean)
    third = 3 * mean - first - second
    question = (
        f"{name} throws a ball 3 times: {first} meters, {second} meters and {third} meters. "
        "How many meters is the average throw?"
    )
    plans = (
        Plan("the first two throws are {eq} meters", first, "+", second),
        Plan("all throws are {eq} meters", Earlier(0), "+", third),
        Plan("the average throw is {eq} meters", Earlier(1), "/", 3),
    )
    return _story("average", (first, second, third), question, plans, mean)


def _tank(rng: Random) -> Story:
    inflow, outflow = rng.randint(14, 40), rng.randint(3, 12)
    minutes, start = rng.randint(4, 20), rng.randint(30, 200)
    question = (
        f"A tank holds {start} liters of water. Each minute {inflow} liters flow in and {outflow} "
        f"liters flow out. How many liters are in the tank after {minutes} minutes?"
    )
    plans = (
        Plan("the tank gains {eq} liters a minute", inflow, "-", outflow),
        Plan(f"in {minutes} minutes it gains {{eq}} liters", Earlier(0), "*", minutes),
        Plan("the tank holds {eq} liters in the end", start, "+", Earlier(1)),
    )
    numbers = (inflow, outflow, minutes, start)
    return _story("tank", numbers, question, plans, start + (inflow - outflow) * minutes)


def _story(
    family: str, numbers: tuple[int, ...], question: str, plans: tuple[Plan, ...], answer
) -> Story:
    return Story(family, numbers, question, plans, Fraction(answer))


FAMILIES: tuple[Callable[[Random], Story], ...] = (
    _shopping,
    _change,
    _travel,
    _sharing,
    _recipe,
    _saving,
    _work,
    _area,
    _discount,
    _ages,
    _reading,
    _fence,
    _harvest,
    _bus,
    _average,
    _tank,
)
