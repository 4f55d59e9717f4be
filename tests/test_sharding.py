"""Chains and chips spread over devices and processes: the same answer as on one."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

MODULE = [sys.executable, "-m", "experiments.search_sharded"]
MAPPINGS = ["--evaluations", "800"]
CHIPS = ["--search", "chips", "--workload", "mlp", "--batch-size", "32", "--rounds", "1", "--evaluations", "80"]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(search, processes, devices=1):
    """What the first of some processes, each with so many virtual devices, prints."""
    options = [*search, "--processes", str(processes), "--coordinator", f"localhost:{free_port()}"]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = [
        subprocess.Popen(
            [*MODULE, *options, "--process", str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    one, two = run(MAPPINGS, 1), run(MAPPINGS, 2)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["picks"] == two["picks"]
    for name in ("edp", "energy_uj", "cycles"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.slow
def test_two_devices_or_processes_find_the_chip_that_one_finds():
    one, devices, processes = run(CHIPS, 1), run(CHIPS, 1, devices=2), run(CHIPS, 2)
    assert (one["devices"], devices["devices"], processes["devices"]) == (1, 2, 2)
    for other in (devices, processes):
        assert other["chip"] == one["chip"] and other["front"] == one["front"]
        assert (other["edp"], other["bound"]) == pytest.approx((one["edp"], one["bound"]), rel=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_the_reason():
    options = ["--evaluations", "100000000", "--processes", "2", "--coordinator", f"localhost:{free_port()}"]
    first, second = (
        subprocess.Popen([*MODULE, *options, "--process", str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    )
    time.sleep(60)  # both have joined and search
    assert first.poll() is None and second.poll() is None
    second.kill()
    second.communicate()
    _, told = first.communicate(timeout=300)
    assert first.returncode != 0 and (b"unhealthy" in told or b"Connection closed by peer" in told), told


@pytest.mark.slow
def test_a_process_without_the_others_ends_with_the_reason():
    options = ["--processes", "2", "--process", "1", "--coordinator", f"localhost:{free_port()}"]
    alone = subprocess.run([*MODULE, *MAPPINGS, *options], capture_output=True, timeout=300, check=False)
    assert alone.returncode != 0 and b"DEADLINE_EXCEEDED" in alone.stderr
