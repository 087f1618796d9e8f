"""The harnesses of the project's own providers."""
