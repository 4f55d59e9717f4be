"""Strict numerics for every test: no silent promotion of dtypes or ranks, warnings are errors (see pyproject)."""

import gc

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of small objects that live on in caches: looking for garbage among them took a tenth of the time.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture
def x64():
    """Double precision for one test: exact counts and finite-difference gradients."""
    with jax.enable_x64(True):
        yield
