"""Generation, serving, and parity of servers with the model of this package."""
