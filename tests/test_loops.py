"""The snippets of docs/loops.md do what they say, as scripts under `headwater run -n 2`; and workers of different kinds train together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Arrays, assert_close, assert_equal_bits, start_job

import headwater as hw

TRAINER, LIGHTNING, OWN = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "loops.md").read_text(), re.DOTALL
)
TIMEOUT_S = 120
#: Each worker tells what it has in the end, in one piece, for others print too.
TELL = """
import hashlib, os
tensors = [tensor for name, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()]
digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
x = torch.randn(512, 4, generator=torch.Generator().manual_seed(7))
layers = getattr(model, "layers", model).eval()
error = float((layers(x) - x.sum(1, keepdim=True)).detach().square().mean())
os.write(1, f"\\nworker {session.index} has {digest} error {error}\\n".encode())
"""


def run(folder: Path, script: str, more: str = "") -> tuple[dict[int, tuple[int, int]], float, str]:
    """Run a script in two workers; return by worker the step that it ended at and its clock, the model's error, and the output."""
    (folder / "script.py").write_text("import torch\n\ntorch.manual_seed(0)\n" + script + TELL + more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "run", "-n", "2", "--restarts", "0", "script.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    ends = {
        int(w): (int(s), int(c)) for w, s, c in re.findall(r"worker (\d) ends at step (\d+) with clock (\d+)", output)
    }
    digests = dict(re.findall(r"worker (\d) has (\w+)", output))
    assert len(digests) == 2, output
    assert len(set(digests.values())) == 1, f"workers differ: {output}"
    return ends, float(re.findall(r"error (\S+)", output)[0]), output


@pytest.mark.slow
def test_hugging_faces_trainer_trains_and_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    ends, first, _ = run(tmp_path, TRAINER.replace("max_steps=20", "max_steps=10"))
    assert ends == {0: (10, 10), 1: (10, 10)}
    compiled = TRAINER.replace("bf16=True", "bf16=True, torch_compile=True, torch_compile_backend='aot_eager'")
    ends, second, _ = run(tmp_path, compiled)
    assert ends == {0: (20, 10), 1: (20, 10)}
    assert second < first
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["checkpoint-10", "checkpoint-20"]


#: The first worker goes on from its checkpoint, alone: that spares importing it all again.
AGAIN = """
if is_first:
    del os.environ["HEADWATER_ADDRESS"]
    session = hw.connect()
    checkpoint = trainer.checkpoint_callback.best_model_path
    scaling = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer = lightning.Trainer(
        max_steps=28, accelerator="cpu", logger=False, enable_progress_bar=False, plugins=[scaling]
    )
    model = Regression()
    model.layers.compile(backend="aot_eager")
    trainer.fit(model, loader, ckpt_path=checkpoint)
    (optimizer,) = trainer.optimizers
    error = float((model.eval().layers(x) - x.sum(1, keepdim=True)).detach().square().mean())
    steps = {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
    os.write(1, f"\\nresumed with clock {session.clock} steps {steps} error {error}\\n".encode())
"""


@pytest.mark.slow
def test_lightning_trains_and_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    ends, error, output = run(tmp_path, LIGHTNING, AGAIN)
    assert ends == {0: (20, 20), 1: (20, 20)}
    assert error < 1.0
    resumed = re.search(r"resumed with clock 8 steps \{28\} error (\S+)", output)
    assert resumed, output
    assert float(resumed[1]) < 2 * error


@pytest.mark.slow
def test_a_compiled_model_with_autocast_scaler_and_accumulation(tmp_path: Path) -> None:
    """Compiled without its C++ back end, which takes half a minute."""
    ends, error, _ = run(tmp_path, OWN.replace("torch.compile(", "torch.compile(backend='aot_eager', model="))
    assert ends == {0: (20, 20), 1: (20, 20)}
    assert error < 1.0


# Workers of different kinds.


def test_a_worker_in_pytorch_and_one_in_numpy_train_the_same_arrays() -> None:
    """As one process does with the batches of both; what only one of them has is its own business."""
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((5, 2, 6, 3)).astype(np.float32)
    settings = hw.optim.AdamW(lr=0.05)

    def make() -> torch.nn.Sequential:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.Linear(3, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model

    registered = threading.Event()

    def in_pytorch(session: hw.Session) -> Arrays:
        model = make()
        optimizer = hw.torch.Optimizer(model, settings, session=session)
        registered.set()  # the first worker's values are the job's
        for one, _ in batches:
            optimizer.zero_grad()
            model(torch.from_numpy(one)).square().mean().backward()
            optimizer.step()
        return {name: t.numpy().copy() for name, t in model.state_dict().items() if t.is_floating_point()}

    def in_numpy(session: hw.Session) -> Arrays:
        shapes = {"1.weight": (1, 3), "1.bias": (1,), "0.running_mean": (3,), "0.running_var": (3,)}
        assert registered.wait(30)
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        session.register(arrays, settings, averaged=["0.running_mean", "0.running_var"])
        for _, other in batches:
            x = (other - other.mean(0)) / np.sqrt(other.var(0) + np.float32(1e-5))
            error = x @ session.parameters["1.weight"][0] + session.parameters["1.bias"]
            session.step({"1.weight": (error @ x)[None] / 3, "1.bias": error.sum(keepdims=True) / 3})
        return {name: array.copy() for name, array in session.parameters.items()}

    with start_job(workers=2) as job:
        ours, theirs = job.run(lambda session: (in_numpy if session.index else in_pytorch)(session))
    assert_equal_bits(ours, {name: theirs[name] for name in ours})
    alone = make()
    reference = torch.optim.AdamW(alone.parameters(), lr=0.05)
    for pair in torch.from_numpy(batches):
        reference.zero_grad()
        sum(alone(batch).square().mean() / 2 for batch in pair).backward()
        reference.step()
    assert_close(
        {n: ours[n] for n, _ in alone.named_parameters()},
        {n: p.detach().numpy() for n, p in alone.named_parameters()},
        1e-5,
    )
