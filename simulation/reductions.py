"""Smaller worlds of one seed: what can be left out of a world in which something does not hold, so that it still does not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from simulation.history import History
from simulation.scenario import HostPlan, Scenario


def reduced(scenario: Scenario, reductions: Sequence[str]) -> Scenario:
    """Return a scenario without what these leave out, one after the other.

    Args:
        scenario: The whole.
        reductions: Names that `smaller` gives.

    Raises:
        ValueError: One of them does not apply.
    """
    for name in reductions:
        found = dict(smaller(scenario)).get(name)
        if found is None:
            raise ValueError(
                f"{name!r} leaves out nothing of this world; possible is: {', '.join(dict(smaller(scenario)))}"
            )
        scenario = found
    return scenario


def smaller(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    """Yield what may be left out, each by its name and with the scenario that is left."""
    hosts = scenario.hosts
    if len(hosts) > 1:
        for host in hosts:
            yield f"host {host.name}", replace(scenario, hosts=tuple(each for each in hosts if each is not host))
    yield from _faults(scenario)
    yield from _habits(scenario)
    for group in list(scenario.groups)[1:]:
        yield f"group {group}", _without_group(scenario, group)
    for place, host in enumerate(hosts):
        for name, less in _of_host(host):
            yield name, replace(scenario, hosts=(*hosts[:place], less, *hosts[place + 1 :]))
    if scenario.duration > 1:
        yield "half the time", replace(scenario, duration=scenario.duration / 2)


def shrink(simulate: Callable[[Sequence[str]], History], failed: History) -> History:
    """Return the history of the smallest world that is found in which something does not hold.

    Args:
        simulate: Runs the world without what is named.
        failed: A history of it in which something does not hold.
    """
    best = failed
    progress = True
    while progress:
        progress = False
        for name, _ in list(smaller(best.scenario)):
            if name not in dict(smaller(best.scenario)):
                continue  # it went with something else
            other = simulate((*best.reductions, name))
            if other.violations:
                best, progress = other, True
    return best


def _faults(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    plan = scenario.plan
    for kind in plan.rates:
        rates = {each: rate for each, rate in plan.rates.items() if each != kind}
        yield kind, replace(scenario, plan=replace(plan, rates=rates))
    for event in plan.events:
        events = tuple(each for each in plan.events if each != event)
        yield event, replace(scenario, plan=replace(plan, events=events))


def _habits(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    if scenario.operators:
        yield "operators", replace(scenario, operators=False)
    if scenario.deletes:
        yield "deletes", replace(scenario, deletes=False)
    if scenario.reopens:
        yield "reopens", replace(scenario, reopens=False)
    if scenario.late:
        yield "late", replace(scenario, late=False)
    if scenario.shuffled:
        yield "shuffled", replace(scenario, shuffled=False)
    if scenario.cancels:
        yield "cancels", replace(scenario, cancels=0.0)


def _of_host(host: HostPlan) -> Iterator[tuple[str, HostPlan]]:
    if host.publishes > 1:
        yield f"half of what {host.name} publishes", replace(host, publishes=host.publishes // 2)
    for place in range(len(host.consumers)):
        rest = (*host.consumers[:place], *host.consumers[place + 1 :])
        yield f"consumer {place} of {host.name}", replace(host, consumers=rest)


def _without_group(scenario: Scenario, group: str) -> Scenario:
    hosts = tuple(
        replace(host, consumers=tuple(each for each in host.consumers if each.group != group))
        for host in scenario.hosts
    )
    groups = {name: patterns for name, patterns in scenario.groups.items() if name != group}
    return replace(scenario, hosts=hosts, groups=groups)
