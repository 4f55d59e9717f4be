"""The benchmark: its accelerator against a worked example and the shared reference, its program end to end."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from codesign.enumeration import Enumerator
from codesign.mapspace import Nest
from codesign.timeloop_designs import read_timeloop_design
from experiments.gemmini import DEFAULT, WORKLOADS, Gemmini, read_workload
from experiments.search_benchmark import Effort, main, random_chips, random_search, run, to_mapping
from experiments.timeloop_inputs import timeloop_input, write_timeloop_inputs
from hw.accesses import count
from tests.oracle import loop_nest

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "workloads.json"
NETWORKS = ("resnet50", "bert", "unet", "retinanet")


@pytest.mark.skipif(not REFERENCE.exists(), reason="no ../shared/reference beside the repository")
def test_layers_and_constants_are_those_of_the_reference():
    reference = json.loads(REFERENCE.read_text())
    for name in NETWORKS:
        assert read_workload(WORKLOADS, name) == read_workload(REFERENCE, name)
        workload = read_workload(WORKLOADS, name)
        total = sum(n * nest.macs for n, nest in zip(workload.counts, workload.nests, strict=True))
        assert total == reference["workloads"][name]["total_macs"]
    ranges, family = reference["hardware"]["random_start_hw"], Gemmini()
    assert (ranges["pe_dim"][0], ranges["pe_dim"][-1]) == (family.low[0], family.high[0])
    assert ranges["sp_KB"] == ranges["acc_KB"] == "2^0..2^11" and family.high[1:] == (2**11, 2**11)
    assert tuple(reference["hardware"]["default_gemmini_hw"].values()) == DEFAULT


def test_the_area_of_the_default_chip():
    assert Gemmini().area(DEFAULT) == pytest.approx(0.636, abs=5e-4)


def test_a_worked_example():
    """4 x 8 x 6 products (P, K, C) on the default chip, all of C and K in space, all of P at the accumulator.

    Weights: 48 words, one in each of 48 MACs, filled once and read 4 times: 48 + 192 at the registers, 48 reads and 48
    fills at the scratchpad, 48 reads at DRAM. Inputs: 24 words; each is read once, for all 8 columns: 24 + 24 at the
    scratchpad, 24 at DRAM. Outputs: 32 sums of 6 products added up in space: 32 updates at the accumulators, no reads, no
    fills; 32 updates at DRAM. Cycles: DRAM moves 48 + 24 + 32 words at 8 a cycle = 13, more than any other.
    """
    nest = Nest((1, 1, 8, 6, 4, 1, 1, 1), (1, 1), (1, 1))
    family = Gemmini()
    picojoules = 192 * 0.5608 + 240 * 0.48746172 + 32 * (1.94 + 0.1005 * 32 / 16)
    picojoules += (96 + 48) * (0.49 + 0.02513 * 128) + 104 * 100.0
    found = Enumerator(nest, family.space).search(family.price(DEFAULT, DEFAULT, nest), family.limits(DEFAULT, DEFAULT))
    assert found.costs.shape == (2, 1)
    np.testing.assert_allclose(found.costs[:, 0], [1e-6 * picojoules, 13.0], rtol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_beside_the_published_random_search(name):
    """The optimum lies below the best of 10 000 random mappings a layer that DOSA's repository states for this chip."""
    from codesign.family_search import FamilySearch

    published = {
        "resnet50": 250199353098.03815,
        "bert": 9085864499.35872,
        "retinanet": 146460188214.4036,
        "unet": 252173694896890.3,
    }[name]
    workload = read_workload(WORKLOADS, name)
    design, bound = FamilySearch(Gemmini(), workload.nests, workload.counts).map_chip(DEFAULT)
    assert bound == design.choice.value
    assert published / 2 < design.choice.value < published


def test_timeloop_inputs_say_what_was_searched(tmp_path, x64):
    """Every layer's file read again, its mapping counted by `hw.accesses.count` and priced with its own energies."""
    answer = run("bert", ["fixed"], Effort(draws=20, chips=1, seeds=1, local_evaluations=0), WORKLOADS, tmp_path)[
        "fixed"
    ]
    workload, energy, cycles = read_workload(WORKLOADS, "bert"), 0.0, 0.0
    files = sorted((tmp_path / "bert" / "fixed").glob("*.yaml"))
    assert len(files) == len(workload.nests) and (tmp_path / "bert.png").stat().st_size > 1000
    for path, times in zip(files, workload.counts, strict=True):
        joules, latency = score(path)
        energy, cycles = energy + times * joules, cycles + times * latency
    assert (energy, cycles) == (pytest.approx(1e6 * answer.energy_uj), pytest.approx(answer.cycles))


def score(path):
    """Picojoules and cycles of one file, with the energies and bandwidths that it states."""
    arch = yaml.safe_load(path.read_text())["arch"]
    storage, (operation, mapping) = arch["storage"], read_timeloop_design(path)
    accesses = jax.jit(count)(operation, mapping)
    words = np.asarray((accesses.reads + accesses.fills + accesses.updates).sum(axis=1))
    instances, footprint = np.asarray(accesses.instances), np.asarray(accesses.footprint.sum(axis=1))
    assert all(f <= level.get("entries", np.inf) for f, level in zip(footprint, storage, strict=True))
    assert all(n <= level["instances"] for n, level in zip(instances, storage, strict=True))
    picojoules = float(accesses.macs) * arch["arithmetic"]["energy"]
    picojoules += sum(
        w * n * level["vector_access_energy"] for w, n, level in zip(words, instances, storage, strict=True)
    )
    ports = [w / level["shared_bandwidth"] for w, level in zip(words, storage, strict=True)]
    return picojoules, max(float(jnp.max(accesses.compute_cycles)), *ports)


@pytest.mark.parametrize(
    ("bounds", "stride"),
    [((1, 2, 8, 6, 4, 1, 1, 1), (1, 1)), ((1, 1, 4, 2, 6, 4, 3, 1), (2, 1))],
    ids=["product", "strided"],
)
def test_a_timeloop_input_executed_costs_what_the_search_says(bounds, stride, tmp_path):
    """The text of a file alone: its loops are run step by step by tests/oracle, its words priced at its own energies."""
    nest, family = Nest(bounds, stride, (1, 1)), Gemmini()
    enumerator = Enumerator(nest, family.space)
    found = enumerator.search(family.price(DEFAULT, DEFAULT, nest), family.limits(DEFAULT, DEFAULT))
    mapping = to_mapping(family.space, enumerator.mapping(found.origin[0]))
    write_timeloop_inputs(tmp_path, [timeloop_input(DEFAULT, nest, mapping)])
    np.testing.assert_allclose(executed_cost(tmp_path / "layer00.yaml"), found.costs[:, 0] * [1e6, 1.0], rtol=1e-9)


def executed_cost(path):
    """Picojoules and cycles of one file, by nothing of ours but the oracle."""
    content = yaml.safe_load(path.read_text())
    sizes, storage = content["problem"]["instance"], content["arch"]["storage"]
    names = [level["name"] for level in storage]
    temporal, spatial, order = ([empty] * len(names) for empty in ({}, {}, ""))
    keep = {space: [True] * len(names) for space in ("Weights", "Inputs", "Outputs")}
    for entry in content["mapping"]:
        level = names.index(entry["target"])
        if entry["type"] == "bypass":
            for space in entry["bypass"]:
                keep[space][level] = False
            continue
        factors = {loop: int(factor) for loop, factor in (text.split("=") for text in entry["factors"].split())}
        if entry["type"] == "spatial":
            spatial[level] = factors
        else:
            temporal[level], order[level] = factors, entry["permutation"]
    nest = loop_nest.Nest(
        {loop: sizes[loop] for loop in "GNKCPQRS"}, (sizes["Wstride"], sizes["Hstride"]),
        (sizes["Wdilation"], sizes["Hdilation"]), temporal, spatial, order, {n.lower(): levels for n, levels in keep.items()},
    )  # fmt: skip
    words = [loop_nest.execute(nest, space, space == "outputs") for space in nest.keep]
    macs = math.prod(nest.bounds.values())
    picojoules, cycles = (
        macs * content["arch"]["arithmetic"]["energy"],
        math.prod(math.prod(t.values()) for t in temporal),
    )
    for l, level in enumerate(storage):
        instances = math.prod(math.prod(factors.values()) for factors in spatial[l + 1 :])
        moved = sum(sum(of_operand[l]) for of_operand in words)
        picojoules += moved * instances * level["vector_access_energy"]
        cycles = max(cycles, moved / level["shared_bandwidth"])
    return picojoules, cycles


def test_random_chips_are_within_the_area():
    family, rng = Gemmini(), np.random.default_rng(0)
    assert random_chips("fixed", 3, rng) == [DEFAULT]
    chips = random_chips("equal_area", 40, rng)
    assert len(chips) == 40 and all(family.area(chip) <= family.area(DEFAULT) for chip in chips)
    drawn = np.array(random_chips("free", 400, rng))
    assert drawn.min(axis=0).tolist() == list(family.low) and drawn.max(axis=0).tolist() == list(family.high)


def test_random_search_improves_with_draws_and_repeats_with_its_seed():
    workload, effort = read_workload(WORKLOADS, "bert"), Effort(draws=50, chips=1)
    first = random_search(workload, "fixed", effort, 3, widest=False)
    assert (np.diff(first) <= 0).all() and first[-1] < first[0]
    np.testing.assert_array_equal(first, random_search(workload, "fixed", effort, 3, widest=False))


def test_the_program_prints_one_object(tmp_path, capsys):
    main(quick=True, out=tmp_path, as_json=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["bert"]
    assert set(result) == {"fixed", "equal_area", "free"}
    assert result["fixed"]["proven"] and result["fixed"]["edp_over_bound"] == pytest.approx(1.0)
    assert result["free"]["edp"] < result["equal_area"]["edp"] < result["fixed"]["edp"]
    assert result["equal_area"]["area_mm2"] <= result["fixed"]["area_mm2"]
    for answer in result.values():
        assert answer["edp"] == pytest.approx(answer["energy_uj"] * answer["cycles"])
        assert min(answer["random_edp"]) > answer["edp"] and answer["convergence"]


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give --workloads"):
        read_workload(tmp_path / "none.json", "bert")
    (tmp_path / "broken.json").write_text('{"workloads": {"bert": {"layers": [{"K": 3}]}}}')
    with pytest.raises(ValueError, match="expected layers of bert"):
        read_workload(tmp_path / "broken.json", "bert")
