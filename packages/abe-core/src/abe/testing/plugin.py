"""The pytest plugin of abe-core; it imports nothing of abe until a fixture is asked for."""
