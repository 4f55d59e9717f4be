"""Chains spread over processes: the same answer as in one."""

import json
import socket
import subprocess
import sys

import pytest

MODULE = [sys.executable, "-m", "experiments.search_sharded", "--evaluations", "800"]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(processes):
    """What the first of some processes prints."""
    options = ["--processes", str(processes), "--coordinator", f"localhost:{free_port()}"]
    started = [
        subprocess.Popen([*MODULE, *options, "--process", str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    one, two = run(1), run(2)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["picks"] == two["picks"]
    for name in ("edp", "energy_uj", "cycles"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.slow
def test_a_process_without_the_others_ends_with_the_reason():
    options = ["--processes", "2", "--process", "1", "--coordinator", f"localhost:{free_port()}"]
    alone = subprocess.run([*MODULE, *options], capture_output=True, timeout=300, check=False)
    assert alone.returncode != 0 and b"DEADLINE_EXCEEDED" in alone.stderr
