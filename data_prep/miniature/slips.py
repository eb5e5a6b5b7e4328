"""How often a demonstration goes wrong.

Independent slips average out under greedy decoding: a policy that learned them is still greedily right.
Each family therefore also has one systematic slip, made more often than not on a known third of its
prompts, so that the greedy answer is wrong there and there is something left to learn.
"""

import random

DEFAULT_SLIP = 0.35
SYSTEMATIC = 0.6  # probability of the systematic slip at slip >= DEFAULT_SLIP


def slips(rng: random.Random, slip: float, weight: float) -> bool:
    """Whether one kind of slip happens: with probability slip * weight."""
    return rng.random() < slip * weight


def slips_systematically(rng: random.Random, slip: float) -> bool:
    """Whether the family's systematic slip happens: proportional to `slip` up to DEFAULT_SLIP, then 0.6."""
    return rng.random() < SYSTEMATIC * min(1.0, slip / DEFAULT_SLIP)
