"""The table of published chips: a full array, whole networks, and how both are told."""
