"""A design written for Timeloop and read back is the same mapping, counted the same."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from codesign.network_file import read_network, write_network
from codesign.timeloop_designs import read_timeloop_design, timeloop_design
from hw.accesses import count
from hw.chips import CHIPS
from hw.mapping import make_mapping
from hw.operation import LOOPS, make_operation
from nets import LayerRule, PrecisionRules, init_precision
from nets.jaxpr import find_products
from nets.precision import freeze

CHIP = CHIPS["edge_trainer"]()
LEVELS = len(CHIP.names)


def random_mapping(operation, seed):
    """Factors at random places, also on both axes below the local SRAM; uneven ones cover more than the bound."""
    rng = np.random.default_rng(seed)
    temporal, spatial = np.ones((LEVELS, 8)), np.ones((LEVELS, 2, 8))
    for d, bound in enumerate(np.asarray(operation.bounds, int)):
        left = int(bound)
        for place in [spatial[1, 0], spatial[1, 1], *(temporal[l] for l in rng.permutation(LEVELS - 1))]:
            factor = int(rng.integers(1, min(left, 4) + 1))
            place[d] = factor
            left = -(-left // factor)
        temporal[-1, d] = left
    order = np.array([rng.permutation(8) for _ in range(LEVELS)])
    keep = np.concatenate([rng.integers(0, 2, (LEVELS - 1, 3)), np.ones((1, 3))])
    return make_mapping(operation, temporal, spatial, order, keep)


@pytest.mark.parametrize("pass_", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("seed", range(4))
def test_a_design_is_read_back_and_counted_the_same(tmp_path, pass_, seed):
    operation = make_operation(N=6, K=9, C=8, P=5, Q=4, R=3, S=2, stride=(2, 1), pass_=pass_)
    mapping = random_mapping(operation, seed)
    path = tmp_path / "design.yaml"
    path.write_text(yaml.safe_dump(timeloop_design(CHIP, operation, mapping, np.array([4.0, 6.0, 16.0]))))
    read_operation, read_mapping = read_timeloop_design(path)
    chex.assert_trees_all_equal(read_operation, operation)
    chex.assert_trees_all_equal((read_mapping.temporal, read_mapping.spatial), (mapping.temporal, mapping.spatial))
    counts = [jax.jit(count)(operation, m) for m in (mapping, read_mapping)]
    chex.assert_trees_all_equal(*counts)


def test_the_file_by_hand():
    """13 outputs, 4 at a time on the columns and 2 on the rows of each, in 2 passes: the last has 13 - 8 = 5 of 8."""
    operation = make_operation(K=13, C=6)
    temporal, spatial = np.ones((LEVELS, 8)), np.ones((LEVELS, 2, 8))
    k, c = LOOPS.index("K"), LOOPS.index("C")
    temporal[2, k], spatial[1, :, k], temporal[0, c], temporal[-1, c] = 2, (4, 2), 3, 2
    keep = np.ones((LEVELS, 3))
    keep[1, 0] = 0
    mapping = make_mapping(operation, temporal, spatial, None, keep)
    content = timeloop_design(CHIP, operation, mapping, np.array([4.0, 8.0, 7.0]))
    names = [level["name"] for level in content["arch"]["storage"]]
    assert names == ["register", "local_rows", "local", "shared", "dram"]
    levels = {level["name"]: level for level in content["arch"]["storage"]}
    columns, rows = np.asarray(CHIP.fanout)[1]
    assert (levels["register"]["instances"], levels["local_rows"]["instances"]) == (columns * rows, columns)
    assert levels["local"]["entries"] == int(CHIP.size_bits[1]) // 8 and "entries" not in levels["dram"]
    per_word = float(CHIP.energy_per_bit()[2].mean()) * 8 * 1e12
    np.testing.assert_allclose(levels["shared"]["vector_access_energy"], per_word, rtol=1e-6)
    directives = {(entry["target"], entry["type"]): entry for entry in content["mapping"]}
    assert re.search(r"K=2 C=1", directives["shared", "temporal"]["factors"])
    # Rows lie innermost: the 13th output is the first of its pair. Pairs: 7, in fours: the last pass has 3.
    assert "K=4,3" in directives["local", "spatial"]["factors"]
    assert "K=2,1" in directives["local_rows", "spatial"]["factors"]
    assert "C=3 " in directives["register", "temporal"]["factors"]
    assert directives["local", "bypass"]["bypass"] == ["Weights"]
    assert directives["local_rows", "bypass"]["keep"] == []
    assert content["mapping"][0]["target"] == "dram"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "target: shared",
            "target: global",
            "expected targets register, local, shared, dram in the mapping, got 'global'",
        ),
        ("mapping:", "mappings:", "expected arch, problem and mapping"),
        ("K=2", "K=x", "invalid literal"),
        ("K=2", "K=1", "expected the factors of K to cover its bound"),
        ("type: temporal", "type: sequential", "expected temporal, spatial or bypass"),
        ("permutation: ", "permutation: G", "expected temporal, spatial or bypass and a permutation"),
    ],
)
def test_a_file_that_is_no_design_is_told_in_one_line(tmp_path, old, new, message):
    operation = make_operation(K=4)
    temporal = np.ones((LEVELS, 8))
    temporal[[0, 3], LOOPS.index("K")] = 2
    path = tmp_path / "design.yaml"
    text = yaml.safe_dump(timeloop_design(CHIP, operation, make_mapping(operation, temporal), np.full(3, 8.0)))
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_timeloop_design(path)
    assert "design.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_is_read_back(tmp_path):
    """Weights, state and formats bit for bit; another model's file is refused."""
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (3, 4)), "bias": jnp.ones(4)}}
    rest, images = {"norm": {"mean": jnp.full(4, 0.1)}}, jnp.ones((2, 3))

    def fn(params, x):
        return x @ params["dense"]["kernel"]

    precision, _ = init_precision(fn, PrecisionRules({"*": LayerRule(5, 6)}), params, images)
    path = tmp_path / "network.npz"
    write_network(path, params, rest, precision)
    templates = jax.tree.map(jnp.zeros_like, (params, rest))
    read = read_network(path, *templates, find_products(fn, params, images))
    chex.assert_trees_all_equal(read[:2], (params, rest))
    np.testing.assert_array_equal(read[2].bits(), freeze(precision).bits())
    other = {"dense": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
    with pytest.raises(ValueError, match="expected the network of this run's model, got that of another"):
        read_network(path, other, rest, find_products(fn, other, images))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"network.npz: expected the network of a finished run, got"):
        read_network(path, *templates, ())
