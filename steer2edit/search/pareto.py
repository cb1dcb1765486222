"""The Pareto front of two objectives, and its knee."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def front_of(values: Mapping[int, tuple[float, float]], goals: tuple[str, str]) -> list[int]:
    """The indices of the points on the Pareto front, in order of the second value.

    No other point is at least as good in both values and better in one.
    """
    signed = {
        n: tuple(v if goal == "less" else -v for v, goal in zip(pair, goals, strict=True)) for n, pair in values.items()
    }

    def dominated(n: int) -> bool:
        a = signed[n]
        return any(b[0] <= a[0] and b[1] <= a[1] and (b != a or m < n) for m, b in signed.items() if m != n)

    return sorted((n for n in signed if not dominated(n)), key=lambda n: (signed[n][1], signed[n][0]))


def knee_of(
    values: Mapping[int, tuple[float, float]], front: Sequence[int], goals: tuple[str, str], base: tuple[float, float]
) -> int | None:
    """The point of the front that lies farthest over the line from the base to the front's strongest point.

    Both axes are scaled to that line's ends; with fewer than two points the strongest is the knee.
    """
    if not front:
        return None

    def gain(pair: tuple[float, float]) -> tuple[float, float]:
        signs = [1 if goal == "more" else -1 for goal in goals]
        return signs[0] * (pair[0] - base[0]), -signs[1] * (pair[1] - base[1])

    gains = {n: gain(values[n]) for n in front}
    best = max(front, key=lambda n: gains[n][0])
    top, cost = gains[best]
    if top <= 0 or cost <= 0:
        return best
    return max(front, key=lambda n: (gains[n][0] / top - gains[n][1] / cost, gains[n][0]))


def spread(numbers: Sequence[int], count: int) -> Iterator[int]:
    """At most ``count`` of the numbers, evenly over their order, the ends among them."""
    if len(numbers) <= count:
        yield from numbers
    else:
        yield from dict.fromkeys(numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count))
