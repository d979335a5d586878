"""The whole attack as one graph, in its own process: the tests' shape checks do not compile."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from gacd.attacks.objectives import cross_entropy, feature_transport
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel

torch._dynamo.config.trace_autograd_ops = True
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).requires_grad_(False)
x, labels, clean = torch.rand(6, 3, 2, 2), torch.randint(0, 4, (6,)), torch.randn(6, 4)

def attack(x, labels, clean):
    settings = dict(steps=2, step_size=0.05, random_start=False)
    x_adv = pgd(cross_entropy(net, labels), x, ThreatModel(eps=0.1), **settings)
    objective = feature_transport(net, clean, iterations=5)
    return x_adv, pgd(objective, x, ThreatModel(norm="l2", eps=0.1), **settings)

compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
for a, b in zip(compiled(x, labels, clean), attack(x, labels, clean)):
    assert (a - x).abs().max() > 0.01
    torch.testing.assert_close(a, b)
"""


@pytest.mark.skipif(torch.__version__ < "2.14", reason="Dynamo learnt requires_grad_ later")
def test_compiles_without_a_break() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
