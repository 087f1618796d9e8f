"""Message queues: one contract, any broker."""
