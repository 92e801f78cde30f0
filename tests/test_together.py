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

def train(share, folder, iterations):
    prior = si.GaussianPrior(torch.zeros(1, 1, 4), 1.0)
    A = si.DenseOperator(torch.eye(4)[:2].double(), prior.shape)
    likelihood = si.Likelihood(A, si.StudentNoise(0.5, 3.0))
    plan = si.Plan(iterations=iterations, groups=4, paths=8, rate=5e-3)
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
process.wait_for_everyone()
process.destroy_process_group()
"""


def launched(script, folder):
    """What each of two processes found, and one alone."""
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
    return [torch.load(folder / f"{name}.pt") for name in ("0", "1", "alone")]


def test_processes_train_one_control(tmp_path):
    """They end with the same weights, which are not those of one alone, whose paths are others, but do as well."""
    (one, first), (two, second), (alone, single) = launched(SCRIPT + TWO, tmp_path)
    assert torch.equal(one, two) and torch.equal(first, second)
    assert first.shape == single.shape == (150, 2)
    assert float((one - alone).abs().max()) > 1e-3
    # the spread of log-weights falls: 20 iterations of 32 paths
    fallen = lambda history: float(history[-20:, 1].mean() / history[:20, 1].mean())
    assert fallen(first) < 0.8 and fallen(single) < 0.8
    assert fallen(first) == pytest.approx(fallen(single), abs=0.2)


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
