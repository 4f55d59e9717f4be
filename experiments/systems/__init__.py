"""The published systems S1 to S8: one module each, that measures their headlines with the mechanisms they have."""
