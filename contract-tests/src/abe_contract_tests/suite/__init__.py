"""The clauses of the contract as tests: a module for each area, and the same tests for every backend."""
