"""A chip and what work costs on it."""
