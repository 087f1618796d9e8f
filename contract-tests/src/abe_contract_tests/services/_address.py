"""A broker that runs outside of the tests."""

import shlex
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from abe_contract_tests.services._base import Broker, FaultUnsupportedError, NotReadyError, Service, ServiceUnavailable
from abe_contract_tests.services._companion import ProcessCompanion


class AddressService(Service):
    """A broker at an address from the environment. Faults are refused."""

    evidence: ClassVar[str] = "address from the environment"
    faults: ClassVar[bool] = False

    def __init__(self, broker: Broker, url: str, *, shell: str = "") -> None:
        """Make the service; `start` checks that it answers.

        Args:
            broker: The kind of broker.
            url: Its address.
            shell: A command that runs the words after it where the broker runs, such as ``docker exec -i NAME``.
        """
        self._broker = broker
        self._url = url
        self._shell = shell
        self._version = ""

    @property
    def url(self) -> str:
        """The address as it was given."""
        return self._url

    @property
    def version(self) -> str:
        """The broker's name and version, empty before `start`."""
        return self._version

    def start(self) -> None:
        """Check that the broker answers."""
        try:
            self._version = self._broker.probe(self._url)
        except (NotReadyError, OSError, ValueError) as exc:
            # The address is not repeated: it may hold a password.
            raise ServiceUnavailable(
                f"no {self._broker.name} answers at {self._broker.address_variable}: {exc}"
            ) from exc

    def stop(self) -> None:
        """Do nothing: the tests did not start it."""

    def kill(self) -> None:
        """Refuse."""
        self._refuse()

    def terminate(self) -> None:
        """Refuse."""
        self._refuse()

    def pause(self) -> None:
        """Refuse."""
        self._refuse()

    def resume(self) -> None:
        """Refuse."""
        self._refuse()

    def beside(self, command: Sequence[str]) -> ProcessCompanion:
        """Start a program by the command that was given for it."""
        if not self._shell:
            raise ServiceUnavailable(
                f"the tests must ask this {self._broker.name} what its protocol does not tell, by a program beside it: set "
                f"{self._broker.shell_variable} to a command that runs another one there, such as 'docker exec -i NAME', "
                f"or unset {self._broker.address_variable} to have a private one"
            )
        return ProcessCompanion([*shlex.split(self._shell), *command])

    def _refuse(self) -> NoReturn:
        raise FaultUnsupportedError(
            f"the {self._broker.name} at {self._broker.address_variable} was not started by the tests; "
            "unset the variable to have a private one"
        )
