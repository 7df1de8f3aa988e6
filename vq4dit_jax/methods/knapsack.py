"""A choice of each kind within a budget: the knapsack problem with classes, solved exactly."""

import math

import numpy as np

_STATES = 1 << 16
"""Maximum number of states of the dynamic programme."""


def cheapest(menus: list[list[tuple[int, float]]], budget: int) -> list[int]:
    """Of each menu of (bits, cost) the option to take: the knapsack problem with a choice of each kind, by dynamic programming.

    Some choice keeps the budget. Bits are counted in their common divisor, or in a part of the budget where that would be
    too many states; then they are rounded up, and the budget holds.
    """
    divisor = math.gcd(*(bits for menu in menus for bits, _ in menu))
    unit = max(divisor, -(-budget // _STATES))
    # best[s]: the least cost of the menus so far with s units at most.
    best, taken = np.zeros(budget // unit + 1), []
    for menu in menus:
        costs = np.full((len(menu), len(best)), np.inf)
        for option, (bits, cost) in enumerate(menu):
            size = -(-bits // unit)
            costs[option, size:] = best[: max(len(best) - size, 0)] + cost
        taken.append(costs.argmin(0))
        best = costs.min(0)
    if not np.isfinite(best[-1]):  # only the rounding is in the way
        return [min(range(len(menu)), key=lambda option: menu[option]) for menu in menus]
    left, chosen = len(best) - 1, []
    for menu, options in zip(reversed(menus), reversed(taken), strict=True):
        chosen.append(int(options[left]))
        left -= -(-menu[chosen[-1]][0] // unit)
    return chosen[::-1]
