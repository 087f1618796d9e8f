"""Runs an application's processes in simulated worlds: in virtual time, with faults, all of it decided by a seed."""

from abe.testing.simulation.simulate import Simulation, simulate

__all__ = ["Simulation", "simulate"]
