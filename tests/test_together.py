"""Processes that train one control together."""

import os
import subprocess
import sys

import pytest
import torch

import scoreinv as si
from scoreinv.finetune.together import check_share

SCRIPT = """
import sys
import torch
import scoreinv as si
from scoreinv.finetune.objectives import TrajectoryBalance
from scoreinv.finetune.training import Recipe

def train(share, folder, iterations, groups=4):
    prior = si.GaussianPrior(torch.zeros(1, 1, 4), 1.0)
    A = si.DenseOperator(torch.eye(4)[:2].double(), prior.shape)
    likelihood = si.Likelihood(A, si.StudentNoise(0.5, 3.0))
    plan = si.Plan(iterations=iterations, groups=groups, paths=8, rate=5e-3)
    learned = si.finetune(
        prior, likelihood, seed=0, steps=4, plan=plan, recipe=Recipe(TrajectoryBalance()),
        images=prior.sample(200, 1), folder=folder, share=share, guided=False,
    )
    weights = torch.cat([p.detach().double().flatten() for p in learned.control.parameters()])
    return weights, torch.tensor([[h["log_w"], h["spread"]] for h in learned.history])
"""
TWO = """
from accelerate import PartialState
process = PartialState(cpu=True)
share = process.process_index, process.num_processes
torch.save(train(share, None, 150), f"{sys.argv[1]}/{share[0]}.pt")
if share[0] == 0:
    torch.save(train((0, 1), None, 150), f"{sys.argv[1]}/alone.pt")
    torch.save(train((0, 1), None, 3, groups=2), f"{sys.argv[1]}/half.pt")
process.wait_for_everyone()
process.destroy_process_group()
"""


def launched(script, folder):
    """What a script of two processes has kept, in the order of the names."""
    path = folder / "script.py"
    path.write_text(script)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(path), str(folder)]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


def test_processes_train_one_control(tmp_path):
    """They end with the same weights, which are not those of one alone, whose paths are others, but do as well."""
    found = launched(SCRIPT + TWO, tmp_path)
    (one, first), (two, second), (alone, single), (_, half) = found
    # with paths of their own: two that did the same would be as one with half of the groups
    assert not torch.equal(first[:3], half)
    assert torch.equal(one, two) and torch.equal(first, second)
    assert first.shape == single.shape == (150, 2)
    assert float((one - alone).abs().max()) > 1e-3
    # the spread of log-weights falls: 20 iterations of 32 paths
    fallen = lambda history: float(history[-20:, 1].mean() / history[:20, 1].mean())
    assert fallen(first) < 0.8 and fallen(single) < 0.8
    assert fallen(first) == pytest.approx(fallen(single), abs=0.2)


def test_tensors_become_the_mean_of_those_of_all_processes(tmp_path):
    """In place, each in its own precision; numbers that must agree are compared."""
    found = launched(
        """
import sys, torch
from accelerate import PartialState
from scoreinv.finetune.together import average, average_numbers, check_same
process = PartialState(cpu=True)
share = process.process_index, process.num_processes
a, b = torch.full((2,), 1.0 + 2 * share[0]), torch.full((1, 3), 4.0 * share[0]).double()
average([a, b], share)
average([], share)
numbers = average_numbers({"gain": float(share[0])}, share)
check_same({"step": 3.0}, share)
try:
    check_same({"step": 3.0 + share[0]}, share)
    said = ""
except ValueError as error:
    said = str(error)
torch.save((a, b, numbers, said), f"{sys.argv[1]}/{share[0]}.pt")
process.wait_for_everyone()
process.destroy_process_group()
""",
        tmp_path,
    )
    for a, b, numbers, said in found:
        assert a.tolist() == [2.0, 2.0] and a.dtype == torch.float32
        assert b.tolist() == [[2.0] * 3] and b.dtype == torch.float64
        assert numbers == {"gain": 0.5}
        assert "do not agree on its step (3, 4)" in said


@pytest.mark.parametrize(
    ("share", "groups", "message"),
    [
        ((0, 2), 3, "2 processes share 3 groups of paths"),
        ((2, 2), 4, "expected the number of a process below their count"),
        ((0, 2), 4, "none knows of the others; start them by torchrun"),
    ],
)
def test_processes_that_cannot_share(share, groups, message):
    with pytest.raises(ValueError, match=message):
        check_share(share, groups)


def test_one_process_alone_is_the_default():
    prior = si.GaussianPrior(torch.zeros(1, 1, 2), 1.0)
    A = si.DenseOperator(torch.eye(2)[:1].double(), prior.shape)
    likelihood = si.Likelihood(A, si.GaussianNoise(std=0.5))
    plan = si.Plan(iterations=2, groups=3, paths=4)
    ends = [
        si.finetune(prior, likelihood, seed=0, steps=3, plan=plan, **options).history
        for options in ({}, {"share": (0, 1)})
    ]
    assert ends[0] == ends[1]
