"""Whether one policy is better than another: exact tests and intervals for shares, paired by seed or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_robot.console import counted
from lightning_robot.evaluation.result import EvaluationResult, wilson

if TYPE_CHECKING:
    from rich.table import Table

LEVEL = 0.05  # a difference is called established below it

# Settings whose difference is worth naming beside a comparison; `weights`, `policy` and the like say what is compared.
COMPARED_SETTINGS = (
    *("environment_arguments", "max_steps", "execution_horizon", "ensembling", "postprocess"),
    *("inference_batch", "threads", "device"),
)


OWN = ("checkpoint", "statistics", "configuration")  # fingerprints of a policy, not of the world it was judged in
# What an environment says of itself that two policies may differ in: what they see of it.
SEEN = ("cameras", "views", "arguments")


class NotPaired(ValueError):
    """The two evaluations did not play the same episodes."""


class NotComparable(ValueError):
    """The two evaluations were played in different simulators, with different renderers or in different scenes."""


def mcnemar(only_a: int, only_b: int) -> tuple[float, float]:
    """McNemar's exact test: do two policies solve the same episodes equally often (McNemar 1947)?

    Args:
        only_a: episodes that A alone solved.
        only_b: episodes that B alone solved.

    Returns:
        Two-sided p by the binomial distribution, and the less conservative mid-p (half of the observed outcome's weight).
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"{only_a} and {only_b} episodes: counts cannot be negative.")
    count, least = only_a + only_b, min(only_a, only_b)
    if count == 0:
        return 1.0, 1.0
    ways = sum(math.comb(count, number) for number in range(least + 1))
    exact = min(1.0, 2 * ways / 2**count)  # integers up to here: nothing is rounded, however many episodes there are
    here = math.comb(count, least) / 2**count
    return exact, 1 - here if only_a == only_b else exact - here


def fisher(successes_a: int, episodes_a: int, successes_b: int, episodes_b: int) -> float:
    """Fisher's exact test of two independent shares, two-sided: all tables at most as likely as the observed one."""
    solved, total = successes_a + successes_b, episodes_a + episodes_b
    first, last = max(0, solved - episodes_b), min(solved, episodes_a)
    ways = [math.comb(episodes_a, number) * math.comb(episodes_b, solved - number) for number in range(first, last + 1)]
    observed = ways[successes_a - first]
    return sum(number for number in ways if number <= observed) / math.comb(total, solved)


def newcombe(
    successes_a: int, episodes_a: int, successes_b: int, episodes_b: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference A - B of two independent shares, from their Wilson intervals (Newcombe 1998, method 10)."""
    rate_a, rate_b = successes_a / episodes_a, successes_b / episodes_b
    low_a, high_a = wilson(successes_a, episodes_a, confidence)
    low_b, high_b = wilson(successes_b, episodes_b, confidence)
    difference = rate_a - rate_b
    return (
        difference - math.hypot(rate_a - low_a, high_b - rate_b),
        difference + math.hypot(high_a - rate_a, rate_b - low_b),
    )


def newcombe_paired(both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference A - B of two shares of the same episodes (Newcombe 1998, paired data, method 10).

    The Wilson intervals of both shares are combined with the correlation of the outcomes, which is corrected for continuity
    where it is positive.
    """
    count = both + only_a + only_b + neither
    solved_a, solved_b = both + only_a, both + only_b
    rate_a, rate_b = solved_a / count, solved_b / count
    low_a, high_a = wilson(solved_a, count, confidence)
    low_b, high_b = wilson(solved_b, count, confidence)
    spread = solved_a * (count - solved_a) * solved_b * (count - solved_b)
    together: float = both * neither - only_a * only_b
    if together > 0:
        together = max(together - count / 2, 0)
    correlation = together / math.sqrt(spread) if spread else 0.0
    difference = rate_a - rate_b

    def reach(end_a: float, end_b: float) -> float:
        return math.sqrt(max(0.0, end_a**2 - 2 * correlation * end_a * end_b + end_b**2))

    return (
        difference - reach(rate_a - low_a, high_b - rate_b),
        difference + reach(high_a - rate_a, rate_b - low_b),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values of several comparisons, raised so that the chance of any false claim stays below the level (Holm 1979)."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, number in enumerate(sorted(range(len(values)), key=lambda number: values[number])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        adjusted[number] = largest
    return adjusted


@dataclass
class Comparison:
    """Two policies, and what the difference of their success is worth.

    Attributes:
        names: of A and B.
        successes, episodes: of each.
        counts: ``both``, ``only_a``, ``only_b``, ``neither``: episodes by who solved them; None where not paired.
        p: of McNemar's exact test, or of Fisher's where not paired.
        p_mid: the mid-p; None where not paired.
        p_adjusted: by Holm, where several comparisons were made.
        interval: of the difference A - B, 95 %.
        notes: what else differs between the two evaluations.
    """

    names: tuple[str, str]
    successes: tuple[int, int]
    episodes: tuple[int, int]
    counts: dict[str, int] | None
    p: float
    p_mid: float | None
    interval: tuple[float, float]
    p_adjusted: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rates(self) -> tuple[float, float]:
        return self.successes[0] / self.episodes[0], self.successes[1] / self.episodes[1]

    @property
    def difference(self) -> float:
        """A - B."""
        return self.rates[0] - self.rates[1]

    @property
    def established(self) -> bool:
        """Whether the test, adjusted for the number of comparisons, speaks against equality."""
        return (self.p if self.p_adjusted is None else self.p_adjusted) < LEVEL

    @property
    def sentence(self) -> str:
        """The answer, with its ground."""
        name_a, name_b = self.names
        test = "McNemar's exact test" if self.counts is not None else "Fisher's exact test"
        ground = f"{test}: p = {_number(self.p)}"
        if self.p_adjusted is not None:
            ground += f", {_number(self.p_adjusted)} adjusted for the number of comparisons (Holm)"
        if self.counts is not None:
            only_a, only_b = self.counts["only_a"], self.counts["only_b"]
            ground += (
                f"; {only_a + only_b} of {counted(self.episodes[0], 'episode')} decide, {only_a} solved by {name_a} alone and "
                f"{only_b} by {name_b} alone"
            )
        if self.established:
            better, worse = (name_a, name_b) if self.difference > 0 else (name_b, name_a)
            return f"Established: {better} solves more than {worse} ({ground})."
        return f"Not established: these episodes do not tell {name_a} and {name_b} apart ({ground})."

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.names[0],
            "b": self.names[1],
            "successes": list(self.successes),
            "episodes": list(self.episodes),
            "paired": self.counts is not None,
            "counts": self.counts,
            "difference": self.difference,
            "interval_95": list(self.interval),
            "p": self.p,
            "p_mid": self.p_mid,
            "p_adjusted": self.p_adjusted,
            "established": self.established,
            "sentence": self.sentence,
            "notes": self.notes,
        }

    def table(self) -> Table:
        """Both shares with their intervals, for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        table.add_column("policy", overflow="fold")
        for name in ("success", "rate", "95 % interval"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, successes, episodes in zip(self.names, self.successes, self.episodes):
            low, high = wilson(successes, episodes)
            rate = 100 * successes / episodes
            table.add_row(name, f"{successes}/{episodes}", f"{rate:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
        return table

    @property
    def difference_sentence(self) -> str:
        low, high = self.interval
        return (
            f"Difference {self.names[0]} - {self.names[1]}: {100 * self.difference:+.1f} points, 95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f}."
        )


def compare(a: EvaluationResult, b: EvaluationResult, names: tuple[str, str] = ("A", "B"), across: bool = False) -> Comparison:
    """Compares two policies by the episodes that both played.

    Args:
        a, b: their evaluations.
        names: theirs.
        across: whether different renderers, simulators and scenes are compared all the same.

    Raises:
        NotPaired: they did not play the same episodes: other seeds or tasks, or another environment.
        NotComparable: they did, but in another world.
    """
    played_a = {(row.seed, row.task): row.success for row in a.counted}
    played_b = {(row.seed, row.task): row.success for row in b.counted}
    if not played_a or not played_b:
        raise ValueError("There is nothing to compare: an evaluation holds no episode.")
    where_a, where_b = a.settings.get("environment"), b.settings.get("environment")
    if where_a != where_b:
        raise NotPaired(f"{names[0]} was judged in {where_a}, {names[1]} in {where_b}: their success cannot be paired.")
    if played_a.keys() != played_b.keys():
        shared = len(played_a.keys() & played_b.keys())
        raise NotPaired(
            f"{names[0]} played {_described(a)}, {names[1]} {_described(b)}; {counted(shared, 'episode')} in common. A paired "
            "test needs the same episodes on both sides."
        )
    if not across:
        refuse_other_worlds(a, b, names)
    counts = {"both": 0, "only_a": 0, "only_b": 0, "neither": 0}
    for episode, success in played_a.items():
        other = played_b[episode]
        counts["both" if success and other else "only_a" if success else "only_b" if other else "neither"] += 1
    p, p_mid = mcnemar(counts["only_a"], counts["only_b"])
    return Comparison(
        names=names,
        successes=(a.successes, b.successes),
        episodes=(a.episodes, b.episodes),
        counts=counts,
        p=p,
        p_mid=p_mid,
        interval=newcombe_paired(**counts),
        notes=differences(a, b, names),
    )


def compare_unpaired(
    a: EvaluationResult, b: EvaluationResult, names: tuple[str, str] = ("A", "B"), across: bool = False
) -> Comparison:
    """Compares two policies that played different episodes, drawn alike: needs more of them for the same certainty.

    Arguments and `NotComparable` as of `compare`.
    """
    if not a.counted or not b.counted:
        raise ValueError("There is nothing to compare: an evaluation holds no episode.")
    if not across:
        refuse_other_worlds(a, b, names)
    numbers = (a.successes, a.episodes, b.successes, b.episodes)
    notes = differences(a, b, names)
    where_a, where_b = a.settings.get("environment"), b.settings.get("environment")
    if where_a != where_b:
        notes.insert(0, f"Environment: {names[0]} {where_a}, {names[1]} {where_b}.")
    if shared := len({(row.seed, row.task) for row in a.records} & {(row.seed, row.task) for row in b.records}):
        notes.append(f"{counted(shared, 'episode')} in common are counted as if they were different ones.")
    return Comparison(
        names=names,
        successes=(a.successes, b.successes),
        episodes=(a.episodes, b.episodes),
        counts=None,
        p=fisher(*numbers),
        p_mid=None,
        interval=newcombe(*numbers),
        notes=notes,
    )


def differences(a: EvaluationResult, b: EvaluationResult, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Sentences about what differs between two evaluations beside the policy: simulator, renderer, settings, software."""
    notes = []

    def note(what: str, first: Any, second: Any) -> None:
        if first != second:
            notes.append(f"{what}: {names[0]} {_shown(first)}, {names[1]} {_shown(second)}.")

    for name in sorted((set(a.fingerprints) | set(b.fingerprints)) - set(OWN)):
        note(name.replace("_", " ").capitalize(), a.fingerprints.get(name), b.fingerprints.get(name))
    for name in COMPARED_SETTINGS:
        note(name.replace("_", " ").capitalize(), a.settings.get(name), b.settings.get(name))
    versions_a, versions_b = a.settings.get("versions", {}), b.settings.get("versions", {})
    for name in sorted(set(versions_a) | set(versions_b)):
        note(f"Version of {name}", versions_a.get(name), versions_b.get(name))
    same = a.fingerprints.get("checkpoint")
    if same is not None and same == b.fingerprints.get("checkpoint"):
        notes.append(f"{names[0]} and {names[1]} have the same weights.")
    for name, result in zip(names, (a, b)):
        if result.errors:
            notes.append(f"{counted(len(result.errors), 'episode')} of {name} ended by an error and count as failures.")
    return notes


def worlds(result: EvaluationResult) -> dict[str, str]:
    """What decides which world an evaluation was played in: simulator, versions, scene, renderer."""
    stated = {name: value for name, value in result.fingerprints.items() if name not in (*OWN, *SEEN)}
    if version := result.settings.get("versions", {}).get("mujoco"):
        stated.setdefault("mujoco", version)
    return stated


def refuse_other_worlds(a: EvaluationResult, b: EvaluationResult, names: tuple[str, str]) -> None:
    """Refuses to compare what was played in different simulators or scenes, or drawn by different renderers.

    Raises:
        NotComparable: names every difference that both evaluations state.
    """
    first, second = worlds(a), worlds(b)
    different = [
        f"{name} {first[name]} and {second[name]}"
        for name in sorted(first.keys() & second.keys())
        if first[name] != second[name]
    ]
    if different:
        raise NotComparable(
            f"{names[0]} and {names[1]} were judged in different worlds: {'; '.join(different)}. A difference between them "
            "need not be one of the policies: evaluate both in the same, or compare all the same with --across."
        )


def _described(result: EvaluationResult) -> str:
    seeds = [row.seed for row in result.records]
    tasks = sorted({row.task for row in result.records if row.task is not None})
    text = f"{counted(result.episodes, 'episode')} (seeds {min(seeds)} to {max(seeds)}"
    return text + (f"; {', '.join(tasks)})" if tasks else ")")


def _shown(value: Any) -> str:
    return "nothing" if value in (None, {}, []) else str(value)


def _number(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"
