"""Design spaces: the way between unconstrained numbers and buildable chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codesign.design import DEFAULT_VARIABLES, DesignSpace, Variable, physical_values, with_values
from hw.chip import make_chip


@pytest.fixture(scope="module")
def space():
    return DesignSpace(make_chip(), DEFAULT_VARIABLES)


def test_initial_design_is_the_base_chip(space):
    chip = space.chip(space.initial())
    expected = physical_values(space.base)
    got = physical_values(chip)
    for name, variable in DEFAULT_VARIABLES.items():
        assert abs(got[name] - expected[name]) <= variable.grain / 2 + 1e-4 * expected[name], name


def test_every_iterate_is_on_its_grain_and_inside_its_bounds(space):
    for seed in range(20):
        values = physical_values(space.chip(space.random(jax.random.key(seed))))
        for name, variable in DEFAULT_VARIABLES.items():
            assert variable.low <= values[name] * (1 + 1e-6) and values[name] <= variable.high * (1 + 1e-6)
            grains = values[name] / variable.grain
            assert abs(grains - round(grains)) < 1e-3, (name, values[name])


def test_gradient_passes_straight_through_the_grain():
    variable = Variable(1.0, 64.0, 1.0)
    raw = variable.raw(10.0)
    # d(low exp(s ln(high/low)))/d raw = value ln(high/low) s (1 - s), unaffected by rounding.
    share = float(jax.nn.sigmoid(raw))
    expected = 10.0 * np.log(64.0) * share * (1 - share)
    np.testing.assert_allclose(jax.grad(variable.value)(raw), expected, rtol=1e-4)


def test_value_and_raw_are_inverse():
    for variable in (Variable(2, 64, 1), Variable(0.5, 1.0, 0.01, "V", logarithmic=False)):
        for share in (0.2, 0.5, 0.9):
            value = variable.low + share * (variable.high - variable.low)
            assert abs(float(variable.value(variable.raw(value))) - value) <= variable.grain / 2 + 1e-5


def test_a_range_is_widened_to_hold_a_value_on_its_grain():
    rows, size = Variable(2, 64, 1), Variable(8, 2048, 8, "KiB")
    assert (rows.holding(100).low, rows.holding(100).high) == (2, 100)
    assert (size.holding(2049).low, size.holding(2049).high) == (8, 2056)
    assert rows.holding(7) == rows and rows.holding(0.5).low == 1  # not 0, which has no logarithm


def test_the_quantity_out_of_range_is_named():
    chip = with_values(make_chip(), {"rows": jnp.asarray(0.5)})
    with pytest.raises(ValueError, match=r"rows of the chip: expected a value in \[2, 64\] , got 0.5"):
        DesignSpace(chip, DEFAULT_VARIABLES).initial()


def test_raw_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match=r"expected a value in \[2, 64\]"):
        Variable(2, 64, 1).raw(65.0)


def test_neighbours_grow_one_quantity_each(space):
    design = space.initial()
    chips = space.neighbours(design)
    base = physical_values(chips[0])
    grown = ("rows", "columns", "register_bytes", "local_kib", "shared_kib")
    for i, name in enumerate(grown, start=1):
        values = physical_values(chips[i])
        assert values[name] >= base[name] + DEFAULT_VARIABLES[name].grain * 0.99
        for other in set(base) - {name}:
            assert values[other] == pytest.approx(base[other]), (name, other)


def test_with_values_changes_only_what_is_named():
    chip = make_chip()
    changed = with_values(chip, {"local_kib": jnp.asarray(64.0), "rows": jnp.asarray(8.0)})
    before, after = physical_values(chip), physical_values(changed)
    assert after["local_kib"] == 64.0 and after["rows"] == 8.0
    assert {n: v for n, v in after.items() if n not in ("local_kib", "rows")} == {
        n: v for n, v in before.items() if n not in ("local_kib", "rows")
    }


def test_space_shows_its_quantities_and_its_base_chip(space):
    page = space._repr_html_()
    for name, variable in DEFAULT_VARIABLES.items():
        assert f"<td>{name.replace('_', ' ')}</td><td>{physical_values(space.base)[name]:.6g}</td>" in page
        assert f"<td>{variable.low:.4g} to {variable.high:.4g}</td>" in page
    assert space.base._repr_html_() in page
