"""Abstract Backend: application code depends on typed protocols; the broker is chosen when it is deployed."""
