"""The systems: switches of the cost model by hand, what is exact of each system, and the table's contract."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table_systems
from experiments.systems import s1_low_bit, s2_in_situ, s3_row_pipeline, s4_ladder, s6_cnnp
from experiments.systems.networks import stereo_pair
from experiments.systems.pictures import PARTS
from experiments.systems.record import Figure, System, between, exactly, sweep, swept, widened
from experiments.systems.steps import bits_without_masks, digits_step, trace_shapes, uniform
from experiments.table_systems import is_inside, join, main, read_systems
from hw.accesses import count
from hw.chips.preset import Assumption
from hw.mapping import make_mapping
from hw.operation import LOOPS, OPERANDS, make_operation
from hw.pipeline import line_buffer_bits, map_bits, row_pipelined
from hw.shift import shift_inputs
from hw.sparse import store_sparse, stored_share
from nets import decomposed

INPUTS = OPERANDS.index("inputs")


def row_of_four():
    """Four outputs side by side on four PEs, three taps in time: 12 words asked for, 6 of them different."""
    operation = make_operation(P=4, R=3)
    temporal, spatial = np.ones((3, 8)), np.ones((3, 2, 8))
    temporal[1, LOOPS.index("R")], spatial[1, 0, LOOPS.index("P")] = 3, 4
    mapping = make_mapping(operation, temporal, spatial)
    return operation, mapping, jax.jit(count)(operation, mapping)


def test_shifted_inputs_are_read_once():
    operation, mapping, accesses = row_of_four()
    shifted = shift_inputs(accesses, operation, mapping, level=1)
    assert float(accesses.reads[1, INPUTS]) == 12 and float(shifted.reads[1, INPUTS]) == pytest.approx(6)
    # Each PE gets three words, half of them from a neighbour that reads them once more.
    assert float(shifted.reads[0, INPUTS] - accesses.reads[0, INPUTS]) == pytest.approx(1.5)
    others = [i for i in range(3) if i != INPUTS]
    np.testing.assert_array_equal(shifted.reads[:, others], accesses.reads[:, others])


def test_sparse_operands_take_values_and_a_bitmap():
    """A quarter of the 4-bit slices: 1/4 of the bits and 1/4 of a bitmap; at nine tenths the map does not pay."""
    np.testing.assert_allclose(stored_share(jnp.array([0.25, 0.9]), 4.0), [0.5, 1.0])
    _, _, accesses = row_of_four()
    half = store_sparse(accesses, jnp.array([1.0, 0.5, 1.0]))
    np.testing.assert_allclose(half.reads[:, INPUTS], accesses.reads[:, INPUTS] / 2)
    assert half.macs == accesses.macs and half.compute_cycles == accesses.compute_cycles


def test_line_buffers_by_hand():
    """8 outputs of 3 taps reach over 10: 10 x 10 x 2 words; 3 + 1 rows of 10 x 2, or twice 3."""
    layer = make_operation(C=2, K=5, P=8, Q=8, R=3, S=3)
    assert float(map_bits(layer, 4.0)) == 800
    assert float(line_buffer_bits(layer, 4.0)) == 320 and float(line_buffer_bits(layer, 4.0, double=True)) == 480


def test_a_row_pipeline_keeps_lines_of_one_sample():
    """Five layers read two images of 32 x 32 with 4 channels: 4 rows of 34 words each, 2720 words in all."""
    network, shapes = stereo_pair(4)
    step = trace_shapes(network, shapes, (2, 32, 32, 1)).inference
    piped = row_pipelined(step)
    between_layers, image = np.asarray(step.operand_tensor)[1:, 1], int(step.operand_tensor[0, 1])
    assert set(np.asarray(step.tensor_elements)[between_layers]) == {2 * 1024 * 4}
    assert set(np.asarray(piped.tensor_elements)[between_layers]) == {5 * 4 * 34 * 4}
    assert set(np.asarray(piped.tensor_elements)[np.asarray(step.operand_tensor)[:, 2]]) == {32 * 4}
    assert piped.tensor_elements[image] == step.tensor_elements[image], "the image comes from outside"


def test_masks_of_the_digits_cnn_by_hand():
    """Per sample 1024 and 512 values are pooled, 3 bits for 4 of 8 bits each, and 64 are not, one bit for 8."""
    step = digits_step(2)
    expected = 1 - (1024 * 3 / 4 + 512 * 3 / 4 + 64) / (8 * (1024 + 512 + 64))
    assert s2_in_situ.masks_saved(step) == pytest.approx(100 * expected)
    widths = step.tensor_bits(uniform(step, 8.0))
    assert float((bits_without_masks(step, widths, 8.0) - widths).min()) == 0
    # Of 144 and 4608 weight gradients, 144 of 256 and all PEs work; over outputs 9 of 256 do.
    work = 64 * 144, 16 * 4608
    assert s2_in_situ.weight_grad_utilisation(step, own=True) == pytest.approx(100 * sum(work) / (64 * 256 + work[1]))
    assert s2_in_situ.weight_grad_utilisation(step, own=False) == pytest.approx(100 * 9 / 256)


def test_buffer_of_alexnet_by_hand():
    """All layers keep 227^2 x 3 (argument, not kept) apart: the inputs of conv2 to fc8; trained fc8 alone keeps 4096."""
    kept = 27**2 * 96 + 13**2 * (256 + 384 + 384) + 6**2 * 256 + 2 * 4096
    saved = s1_low_bit.buffer_saved("fc8", 4.0, 32.0)
    assert saved == pytest.approx(100 * (1 - 4096 * 4.25 / (32 * kept)), abs=0.05)


def test_buffer_of_the_digits_cnn_by_hand():
    """Trained whole it keeps the inputs of conv2, dense1 and dense2, with its convolutions frozen those of the dense ones
    and the mask of 64 values between them."""
    saved = s1_low_bit.digits_buffer_saved(4.0, 32.0)
    assert saved == pytest.approx(100 * (1 - ((128 + 64) * 4.25 + 64) / (32 * (4 * 4 * 16 + 128 + 64))))


def test_utilisation_of_a_chain_by_hand(monkeypatch):
    """One layer, 12 outputs a row on chains of 8: two passes of 16 places; the ends of a row lack two of 36 taps."""
    monkeypatch.setattr(s6_cnnp, "VGG_FACE", ((1, 4, 12),))
    assert s6_cnnp.utilisation(8, 4) == pytest.approx(12 / 16 * 34 / 36)
    # Chains of 30 hold two rows of twelve.
    assert s6_cnnp.utilisation(30, 4) == pytest.approx(24 / 30 * 34 / 36)


def test_direct_feedback_projects_the_output_error_only():
    """Of dense2 (64 inputs), dense1 (128) and conv2 (512) errors remain projections of ten numbers: 704/64 products."""
    network, shapes = s4_ladder.digits_cnn()
    step = trace_shapes(network, shapes, (2, 8, 8, 1))
    runs = np.asarray(s4_ladder.direct_feedback_runs(step))
    backward = [pass_ == "input_grad" for pass_ in step.passes]
    assert sorted(runs[backward]) == [0, 0, pytest.approx((64 + 128 + 4 * 4 * 16) / 64)]
    assert set(runs[~np.array(backward)]) == {1.0}


def test_a_ladder_holds_the_sums_of_its_networks():
    """A weight gradient of ResNet-18's first layer sums 8 images of 112 x 112 products of 8 by 8 bits."""
    mac = s4_ladder.chip_for(s4_ladder.RUNGS["+ 8-bit fixed point"]).mac
    assert mac.accumulator_bits >= 16 + np.log2(8 * 112 * 112)


def test_steps_of_fp16_by_hand():
    """One is 2**-10 from its neighbour, two 2**-9; equal trees are no step apart."""
    two = {"a": np.array([1.0, -2.0]), "b": np.array([0.5])}
    assert s3_row_pipeline.fp16_steps(two, two) == 0
    other = {"a": np.array([1.0 + 2**-10, -2.0 + 3 * 2**-9]), "b": np.array([0.5])}
    assert s3_row_pipeline.fp16_steps(other, two) == 3


@pytest.mark.slow
def test_decomposed_and_simulated_products_train_alike(monkeypatch):
    """Bit for bit, with different programs; a form that scales its sums by a third of a per cent more is noticed."""
    difference, accuracy = s3_row_pipeline.compare_forms(2)
    assert difference == 0 and accuracy["decomposed"] == accuracy["simulated"] > 50
    exact = decomposed.dequantise_fp16
    monkeypatch.setattr(
        "nets.multipliers.dequantise_fp16", lambda sums, scale, *rest, **kw: exact(sums, scale * 1.003, *rest, **kw)
    )
    assert s3_row_pipeline.compare_forms(2)[0] > 1


def test_what_moves_one_at_a_time_widens_the_interval_of_the_samples():
    """Samples 8 to 12 around 10; one assumption takes it to 5 or 20, another cannot be met at one end."""
    values = np.array([10.0, *np.linspace(8.0, 12.0, 101), 5.0, 20.0, np.nan, 11.0])
    assert swept(values, 101) == pytest.approx(Figure(10.0, 8.2 * 0.5, 11.8 * 2.0))
    assert swept(values[:102], 101) == pytest.approx(between(values[:102]))


def test_figures_and_sweeps():
    assert between(np.array([2.0, 1.0, 1.5])).high == 2.0 and exactly(3) == Figure(3.0, 3.0, 3.0)
    assumed = {"x": Assumption(2.0, 1.0, 4.0, "by hand")}
    assert widened(Figure(2, 1, 3), Figure(9, 2, 9), Figure(0, 0, 1)) == Figure(2, 0, 9)
    found = sweep(lambda values: {"y": np.array([10.0, 9.0, 9.0]) * values.get("x", 2.0)}, assumed)
    assert found["y"] == pytest.approx(Figure(20.0, 9.0, 40.0))
    assert is_inside(Figure(1, 0.9, 1.1), 1.0, is_limit=False) and not is_inside(
        Figure(1, 0.9, 1.1), 1.2, is_limit=False
    )
    assert is_inside(Figure(8, 7, 12), 10.0, is_limit=True) and is_inside(Figure(1, 1, 1), None, is_limit=False) is None


def test_a_system_without_one_of_its_headlines_is_an_error():
    with pytest.raises(ValueError, match=r"expected figures for \['power', 'latency'\], got \['power'\]"):
        join(read_systems()["S8"], System("by hand", {"power": exactly(1.0)}))
    with pytest.raises(ValueError, match="expected a known system, got 'S9'"):
        main(only=("S9",))


def test_contract_of_the_table(monkeypatch, capsys, tmp_path):
    """JSON as told, page and pictures renewed, with a system measured by hand in place of S8."""
    system = System("by hand", {"power": Figure(9.0, 8.0, 12.0), "latency": exactly(40.0)}, {"x": {"energy x": 2.0}})
    monkeypatch.setattr(table_systems, "measure_system", lambda name, quick: system)
    page = tmp_path / "page.md"
    page.write_text("\n".join(table_systems.MARKS))
    main(only=("S8",), page=page, plot=tmp_path, as_json=True)
    headlines = json.loads(capsys.readouterr().out)["systems"]["S8"]["headlines"]
    assert [row["inside"] for row in headlines] == [True, False]
    assert {"name", "published", "ours", "low", "high", "unit"} <= set(headlines[0])
    assert "S8: Stereo" in page.read_text() and (tmp_path / "systems.svg").stat().st_size > 1000
    main(only=("S8",))
    assert "power" in capsys.readouterr().out


def test_earlier_measurements_are_told_beside_new_ones(monkeypatch, capsys, tmp_path):
    """S4's ladder from a file, S8 measured now: both in the JSON, the ladder drawn, S8 not measured again where it is known."""
    systems = {
        "S8": System("by hand", {"power": exactly(9.0), "latency": exactly(9.0)}),
        "S4": System(
            "by hand",
            {row["name"]: exactly(2.0) for row in read_systems()["S4"]["headlines"]},
            {rung: {f"net, {part} (uJ)": 1.0 for part in ("energy", *PARTS)} for rung in ("float32", "+ masks")},
        ),
    }
    monkeypatch.setattr(table_systems, "measure_system", lambda name, quick: systems[name])
    known = tmp_path / "s4.json"
    main(only=("S4",), as_json=True)
    known.write_text(capsys.readouterr().out)
    main(only=("S8",), measured=(known,), plot=tmp_path, as_json=True)
    both = json.loads(capsys.readouterr().out)["systems"]
    assert list(both) == ["S4", "S8"] and (tmp_path / "systems_ladder.svg").stat().st_size > 1000
    monkeypatch.setattr(table_systems, "MODULES", ("S4",))
    main(measured=(known,), as_json=True)
    assert json.loads(capsys.readouterr().out)["systems"] == {"S4": both["S4"]}
    known.write_text("{}")
    with pytest.raises(ValueError, match=r"expected .*s4.json to hold what --json printed, got KeyError"):
        main(measured=(known,))


@pytest.mark.slow
@pytest.mark.parametrize("name", table_systems.MODULES)
def test_every_system_runs_small(name, capsys):
    main(only=(name,), quick=True, as_json=True)
    system = json.loads(capsys.readouterr().out.splitlines()[-1])["systems"][name]
    assert system["workload"] and system["ablation"] and all(np.isfinite(row["ours"]) for row in system["headlines"])
