"""Where a broker comes from: an address, a container, a private process, in this order."""

import os
from collections.abc import Mapping
from typing import Final

from abe_contract_tests.services._address import AddressService
from abe_contract_tests.services._base import Broker, Service, ServiceUnavailable
from abe_contract_tests.services._container import ContainerService, image_problem
from abe_contract_tests.services._process import ProcessService

FORCE_VARIABLE: Final = "ABE_TEST_SERVICES"


def choose(broker: Broker, *, process_only: bool = False, environ: Mapping[str, str] | None = None) -> Service:
    """Return a broker, not started yet.

    ``ABE_TEST_SERVICES=containers|processes`` forces one of the two; else the address in the broker's variable wins,
    then a container where a Docker engine answers and the image is there or can be pulled, then a private process.

    Args:
        broker: The kind of broker.
        process_only: The caller needs what only a private process gives, such as a server of a certain make.
        environ: Read instead of the process environment.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    forced = values.get(FORCE_VARIABLE, "")
    if forced not in ("", "containers", "processes"):
        raise ServiceUnavailable(f"{FORCE_VARIABLE} must be containers or processes, not {forced!r}")
    if process_only or forced == "processes":
        return ProcessService(broker)
    address = values.get(broker.address_variable, "")
    if address and not forced:
        return AddressService(broker, address, shell=values.get(broker.shell_variable, ""))
    problem = image_problem(broker.image) if broker.image else "it has no image"
    if problem is None:
        return ContainerService(broker)
    if forced:
        raise ServiceUnavailable(f"no container of {broker.image or broker.name}: {problem}")
    return ProcessService(broker)
