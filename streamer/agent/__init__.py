"""The agent itself: the process and its life, the wiring, the account and what is told of it."""
