"""Training without torch's compiler: in a process of its own, since what is imported stays so."""

import subprocess
import sys

TRAINS = """
import sys
from fl_client.uncompiled import leave_out_the_compiler
leave_out_the_compiler()
import torch
model = torch.nn.Linear(2, 1)
for make in (torch.optim.AdamW, torch.optim.SGD):
    optimiser = make(model.parameters(), lr=0.1)
    optimiser.zero_grad()
    before = model.weight.detach().clone()
    model(torch.ones(4, 2)).sum().backward()
    optimiser.step()
    assert not torch.equal(before, model.weight)
    optimiser.load_state_dict(optimiser.state_dict())
print(any(name.startswith("torch._dynamo.") for name in sys.modules))
"""
COMPILES = """
print(float(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(()))))
import torch._dynamo.config
torch._dynamo.reset()
print(torch._dynamo.config.recompile_limit > 0)
"""


def said(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_training_imports_no_compiler_and_who_compiles_has_it() -> None:
    assert said(TRAINS + COMPILES) == ["False", "2.0", "True"]
