"""Family `dag`: named quantities defined from earlier ones, worked out in the order given.

Owned by models/tasks. Call it through `models.tasks.generate`.

The question holds every definition; a thought works one out; its summary names which. A
value that was worked out stands in its thought and nowhere else. Each definition says what
it comes after, so that which one is next is a lookup too and not a matter of counting.
"""

from __future__ import annotations

from random import Random

from .addition import MODULUS, add_thought
from .problem import Problem, make_problem

NAMES = (
    "oak elm ash fig ivy yew fir hop pea nut rye oat bay tea corn rice lime plum "
    "pear kiwi mint sage dill beet kale leek bean okra palm pine rose lily iris moss fern reed"
).split()
KNOWN = 3  # quantities whose value the question states
MAX_THOUGHTS = len(NAMES) - KNOWN
_USE_DERIVED = 0.85  # chance that an operand is a worked-out quantity
_USE_OLDEST = 0.5  # chance that the first operand is the one that has waited longest


def _pick_operands(
    rng: Random, known: list[str], derived: list[str], unused: list[str], firsts: set[str]
) -> tuple[str, str]:
    """Two different earlier names, mostly worked-out ones so that thoughts must be read.

    Half of the time the first is the oldest that nothing has used yet: it is far back, and
    few quantities are left without a use. No two definitions share their first operand, so
    that `FIRST and` names the second one without a doubt.
    """
    chosen: list[str] = []
    if unused and rng.random() < _USE_OLDEST:
        chosen.append(unused[0])
    while len(chosen) < 2:
        use_derived = len(derived) > 0 and rng.random() < _USE_DERIVED
        name = rng.choice(derived if use_derived else known)
        if name not in chosen and (chosen or name not in firsts):
            chosen.append(name)
    return chosen[0], chosen[1]


def make(rng: Random, thoughts: int) -> Problem:
    """One random problem of `thoughts` definitions; asks for the last."""
    if not 1 <= thoughts <= MAX_THOUGHTS:
        raise ValueError(f"dag takes 1 to {MAX_THOUGHTS} thoughts, not {thoughts}")
    names = rng.sample(NAMES, KNOWN + thoughts)
    known, derived, unused = names[:KNOWN], [], []
    firsts: set[str] = set()
    values = {name: rng.randrange(MODULUS) for name in known}
    facts = " ".join(f"{name} is {values[name]}." for name in known)
    rules, steps = [], []
    for name in names[KNOWN:]:
        a, b = _pick_operands(rng, known, derived, unused, firsts)
        firsts.add(a)
        link = f"After {derived[-1]}, " if derived else ""
        rules.append(f"{link}{name} adds {a} and {b}.")
        needs = tuple(derived.index(x) for x in (a, b) if x in derived)
        opening = f"{link or 'Next '}{name}."
        operands = ((a, values[a]), (b, values[b]))
        step, values[name] = add_thought(opening, name, operands, needs)
        steps.append(step)
        derived.append(name)
        unused = [x for x in unused if x not in (a, b)] + [name]
    prompt = (
        f"Some amounts are known. {facts} The others are sums. {' '.join(rules)}"
        f" Keep only the last two digits. What is {names[-1]}?"
    )
    return make_problem("dag", prompt, values[names[-1]], steps)
