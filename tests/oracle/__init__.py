"""Plain Python that executes what the closed forms of `hw` predict."""
