"""The wording that every family shares: one thought that reads two values and adds them.

Owned by models/tasks; called by the family files only.

The order matters more than the words. The thought first says what it needs, then spends
about a dozen tokens before it reads a value, so that a runtime has time to page in the two
thoughts. Every value is written as `KEY is VALUE` with a key of one token, which small
models learn to look up long before any looser wording. The sum is written digit by digit,
so that no number larger than 19 has to be added by heart, and its two digits are named
before they are put together.
"""

from __future__ import annotations

from .problem import Thought

MODULUS = 100


def add_thought(
    opening: str,
    name: str,
    operands: tuple[tuple[str, int], tuple[str, int]],
    needs: tuple[int, ...],
) -> tuple[Thought, int]:
    """The thought that works out `name` = sum of two (name, value) operands, modulo 100.

    `opening` is the family's own first sentence or two, ending before the need line.
    Returns the thought and its value. Neither operand's nor the result's value is in the summary.
    """
    (first, x), (second, y) = operands
    ones = x % 10 + y % 10
    carry = ones // 10
    tens = x // 10 + y // 10 + carry
    value = (x + y) % MODULUS
    text = (
        f"{opening} Need {first} and {second}."
        f" Look back at the notes on {first} and {second} now."
        f" {first} is {x}. {second} is {y}."
        f" Ones: {x % 10} plus {y % 10} makes {ones}."
        f" Tens: {x // 10} plus {y // 10} plus {carry} makes {tens}."
        f" Keep {tens % 10} and {ones % 10}, so {name} is {value}."
    )
    return Thought(text, f"Worked out {name}.", tuple(sorted(set(needs)))), value
