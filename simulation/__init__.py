"""A deterministic simulation of the engine: hosts, a broker and faults, all drawn from one seed, in virtual time."""

from simulation.history import History
from simulation.simulate import simulate

__all__ = ["History", "simulate"]
