"""Memories against CACTI, synthesised register files and by hand."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from experiments import check_sram, command_line
from hw import memory
from hw.memory import MemoryLevel
from hw.technology import make_technology
from hw.units import BYTE, KIB

TECHNOLOGY = make_technology(28)
VDD = jnp.array(0.9)


def level(size_bits, port_bits, banks=1.0, kind="sram", ports="1RW"):
    bandwidth = jnp.array(port_bits * banks)
    return MemoryLevel(jnp.array(size_bits), bandwidth, jnp.array(banks), kind, ports)


# Points of a CACTI 7 sweep: every node, transistor type and kind of ports; three sizes and widths each, at random.
CACTI = Path(__file__).with_name("cacti_sample.csv")


def test_sram_is_close_to_cacti():
    errors = check_sram.summarise(check_sram.read_sweep(CACTI))
    # The tolerances are those of the fit; CACTI's own energy is a staircase of up to 40 %.
    assert errors["energy"]["median"] < 0.05 and errors["energy"]["p90"] < 0.15 and errors["energy"]["max"] < 0.45
    assert errors["area"]["median"] < 0.08
    assert all(errors[f"leakage_{device}"]["median"] < 0.25 for device in ("hp", "lop", "lstp"))


def test_sram_energy_by_hand():
    # 65 nm, 1.2 V, 4 KiB of 32 bits: periphery 16.53 * 32 bits = 0.06457 KiB; 4.06457 ** 0.5133 = 2.0543;
    # 32 ** 0.8803 = 21.133; 0.05954 pJ * 1.44 * 2.0543 * (12.57 + 21.133) = 5.9362 pJ.
    energy = memory.access_energy(level(4 * KIB, 32.0), make_technology(65), jnp.array(1.2))
    assert energy.tolist() == pytest.approx([5.9362e-12, 5.9362e-12], rel=1e-3)


def test_a_bank_is_what_an_access_costs():
    one = memory.access_energy(level(16 * KIB, 64.0), TECHNOLOGY, VDD)
    four = memory.access_energy(level(64 * KIB, 64.0, banks=4.0), TECHNOLOGY, VDD)
    assert four.tolist() == pytest.approx(one.tolist())
    assert memory.area(level(64 * KIB, 64.0, 4.0), TECHNOLOGY) > memory.area(level(64 * KIB, 64.0), TECHNOLOGY)


def test_larger_wider_and_dual_ported_cost_more():
    sizes = jnp.geomspace(64 * BYTE, 4096 * KIB, 50)

    def prices(size, port, ports):
        one = MemoryLevel(size, port, jnp.ones(()), "sram", ports)
        energy = memory.access_energy(one, TECHNOLOGY, VDD)[0]
        return jnp.stack([energy, memory.area(one, TECHNOLOGY), memory.leakage_power(one, TECHNOLOGY, VDD)])

    widths = jnp.geomspace(8.0, 256.0, 50)
    by_size, by_width = {}, {}
    for ports in memory.PORTS:
        by_size[ports] = jax.vmap(lambda size, ports=ports: prices(size, 64.0, ports))(sizes)
        by_width[ports] = jax.vmap(lambda width, ports=ports: prices(16 * KIB, width, ports))(widths)
        assert (jnp.diff(by_size[ports], axis=0) > 0).all()
        assert (jnp.diff(by_width[ports][:, :2], axis=0) > 0).all()  # leakage is that of the cells
    assert (by_size["1R1W"] > by_size["1RW"]).all() and (by_width["1R1W"] > by_width["1RW"]).all()


# Synthesised flip-flop register files: words, bits; read and write units of 0.24 fJ, transistors.
REGISTER_FILES = [
    (2, 8, 14.1, 94.1, 686),
    (4, 8, 52.4, 137.5, 1478),
    (8, 8, 140.6, 195.9, 3060),
    (16, 8, 339.5, 287.3, 6130),
    (32, 8, 745.6, 456.7, 12296),
    (64, 8, 1546.9, 770.0, 24544),
    (16, 16, 670.8, 524.9, 12126),
    (32, 16, 1483.5, 835.4, 24290),
    (16, 32, 1331.4, 1000.1, 24106),
]


@pytest.mark.parametrize(("words", "bits", "read", "write", "transistors"), REGISTER_FILES)
def test_register_files_match_synthesis(words, bits, read, write, transistors):
    technology = make_technology(45)
    file = level(float(words * bits), float(bits), kind="register")
    energy = memory.access_energy(file, technology, jnp.array(0.9)) / 0.24e-15
    assert energy.tolist() == pytest.approx([read, write], rel=0.18)
    assert memory.area(file, technology) == pytest.approx(transistors * 0.12e-12, rel=0.12)


def test_dram_costs_its_energy_per_bit_whatever_the_supply():
    external = level(math.inf, 64.0, kind="dram")
    for vdd in (0.5, 0.9):
        energy = memory.access_energy(external, TECHNOLOGY, jnp.array(vdd))
        assert energy.tolist() == pytest.approx([64 * 8e-12] * 2)
    assert memory.area(external, TECHNOLOGY) == 0 and memory.leakage_power(external, TECHNOLOGY, VDD) == 0
    # 102.4 Gbit/s at 3.2 GHz is 32 bits per cycle; at 100 MHz the interface of 64 bits binds.
    assert memory.bits_per_cycle(external, TECHNOLOGY, jnp.array(3.2e9)) == pytest.approx(32.0)
    assert memory.bits_per_cycle(external, TECHNOLOGY, jnp.array(1e8)) == 64.0


# Picojoules per bit that sources give for the device alone and for the system, least and most; bus in bits, MT/s.
DRAM_KINDS = [
    ("DDR3", 20, 70, 64, 1600),
    ("DDR4", 12, 45, 64, 3200),
    ("LPDDR2", 8, 40, 32, 1066),
    ("LPDDR3", 6, 24, 32, 1600),
    ("LPDDR4", 4, 12.5, 32, 3200),
    ("LPDDR4X", 3, 7, 32, 4267),
    ("LPDDR5", 2.5, 6, 32, 6400),
]


@pytest.mark.parametrize(("kind", "least", "most", "width", "megatransfers"), DRAM_KINDS)
def test_dram_kinds_span_what_sources_give(kind, least, most, width, megatransfers):
    technology = make_technology(28, dram=kind)
    energy = technology.constant("dram.energy")
    assert (energy.low, energy.high) == pytest.approx((least * 1e-12, most * 1e-12))
    assert technology["dram.bandwidth"] == pytest.approx(width * megatransfers * 1e6, rel=1e-3)


@pytest.mark.parametrize(("kind", "ports"), [("sram", "1RW"), ("sram", "1R1W"), ("register", "1R1W"), ("dram", "1RW")])
def test_gradients(kind, ports, x64):
    technology = make_technology(28)

    def logarithms(size, bandwidth, banks, vdd):
        one = MemoryLevel(size, bandwidth, banks, kind, ports)
        energy = jnp.log(memory.access_energy(one, technology, vdd))
        return energy, jnp.log1p(1e9 * memory.area(one, technology) + 1e6 * memory.leakage_power(one, technology, vdd))

    arguments = tuple(jnp.array(x) for x in (4096.0, 64.0, 2.0, 0.8))
    check_grads(logarithms, arguments, order=1, modes=["rev"], rtol=1e-6)
    infinite = (jnp.array(jnp.inf), *arguments[1:])
    if kind == "dram":
        gradient = jax.grad(lambda *x: logarithms(*x)[0].sum(), argnums=(0, 1, 2, 3))(*infinite)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (2, "22,itrs-hp,1RW,300,512,64,x,0.4,0.04,0.0005,0.0005", "line 2: field read_energy_pJ.*'x'"),
        (2, "22,itrs-hp,2RW,300,512,64,0.2,0.4,0.04,0.0005,0.0005", "line 2: field ports.*'2RW'"),
        (3, "22,itrs-hp,1RW,300,512", "line 3: field width_bits"),
        (4, "90,itrs-hp,1RW,300,512,64,0.2,0.4,0.04,0.0005,0.0005", "line 4: field node_nm"),
        (1, "node_nm,device", "line 1: field capacity_bytes is missing"),
    ],
)
def test_check_sram_names_line_and_field(line, text, message, tmp_path):
    lines = CACTI.read_text().splitlines()
    lines[line - 1] = text
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        check_sram.read_sweep(path)


def test_check_sram_prints_json_and_exits_with_2(tmp_path, capsys):
    check_sram.main(CACTI, as_json=True)
    assert json.loads(capsys.readouterr().out).keys() >= {"energy", "area", "leakage"}
    path = tmp_path / "empty.csv"
    path.write_text("")
    assert command_line.run(check_sram.main, [str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: line 1")


def test_levels_are_pytrees():
    one = level(4 * KIB, 32.0)
    assert len(jax.tree.leaves(one)) == 3 and dataclasses.replace(one, kind="dram").kind == "dram"
