"""The contract of Abstract Backend, as a test suite."""
