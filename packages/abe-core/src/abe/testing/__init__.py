"""What an application's tests need: a clock they move, a backend that records, fixtures."""
