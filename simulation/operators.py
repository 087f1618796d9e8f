"""What operators do, beside the application."""

from abe.errors import AbeError
from simulation.application import Application, Interrupted
from simulation.faults import ProviderFaultError


async def operate(application: Application) -> None:
    """Look at groups, and at their dead letters, until nothing is to go wrong any more."""
    while not application.calm and not await application.sleep(application.random.random() * 4):
        group = application.random.choice(list(application.scenario.groups))
        try:
            await application.interrupted(_one(application, group))
        except (AbeError, Interrupted, ProviderFaultError) as exc:
            application.note("fails", f"{type(exc).__name__}: {exc}")


async def _one(application: Application, group: str) -> None:
    letters = application.backend.dead_letters(group)
    chance = application.random.random()
    if application.scenario.deletes and chance < 0.2:
        await application.backend.delete_group(group)
    elif chance < 0.4:
        application.note("replay", await letters.replay_all())
    elif chance < 0.5:
        application.note("purge", await letters.purge_all())
    elif chance < 0.7:
        application.note("letters", len(await letters.list()))
    elif chance < 0.8:
        await application.backend.declare(group)
    else:
        application.note("stats", await application.backend.stats(group))
