"""Freed memory stays with the process once training on a CPU has begun: later blocks cost no new pages."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from lightning_robot.callbacks.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_blocks_are_used_again():
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120).stdout
    given_back, kept = map(int, output.split())
    assert given_back > 1000  # 5 times 64 MiB
    assert kept < given_back / 20
