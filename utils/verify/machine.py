"""What this machine has beside its cores: a GPU, SLURM."""

from __future__ import annotations

import shutil
import subprocess

import torch

from configs.schema import Compute
from utils.run.checks import Finding
from utils.slurm import client

DEVICE = "cuda"
TOLERANCE = 0.02  # bf16 keeps 8 bits: a factor is off by 0.4 % at most, a product by 0.8 %
COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo")
ANSWER_SECONDS = 10.0


def gpu(compute: Compute) -> Finding:
    """torch sees the GPU, some of its memory is free, and a bf16 product on it is right."""
    if not torch.cuda.is_available():
        if card := _card_of_the_driver():
            words = f"the driver shows {card}, but torch {torch.__version__} cannot use it"
            return ("warn" if compute.device == "cpu" else "no"), words
        if compute.device == "cuda":
            return "warn", "none here, and compute.device=cuda: the stages need a machine that has one"
        return "skip", "none here, and the configuration does not need one"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    words = f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"
    error = product_error(DEVICE)
    if not error < TOLERANCE:
        return "no", f"{words}; a bf16 product is off by {error:.2g} of its largest entry, expected less than {TOLERANCE}"
    return "warn" if free < total / 2 else "ok", f"{words}; a bf16 product is off by {error:.1g}"


def _card_of_the_driver() -> str | None:
    """Name of the first GPU that the driver's own tool lists."""
    if not shutil.which("nvidia-smi"):
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ANSWER_SECONDS)
    return listed.stdout.splitlines()[0] if listed.returncode == 0 and listed.stdout.startswith("GPU") else None


def product_error(device: str) -> float:
    """Largest error of a bf16 product against fp64 on the CPU, as a share of the largest entry."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=random)
    exact = a.double() @ b.double()
    found = torch.matmul(a.to(device, torch.bfloat16), b.to(device, torch.bfloat16)).double().cpu()
    return float((found - exact).abs().max() / exact.abs().max())


def slurm() -> Finding:
    """SLURM's commands are there and its controller answers. Only a warning: everything can run without it."""
    absent = [name for name in COMMANDS if not shutil.which(name)]
    if len(absent) == len(COMMANDS):
        return "skip", "not installed here; run_all.sh runs stage after stage on this machine"
    if absent:
        return "warn", f"{', '.join(absent)} not on the PATH; load the site's SLURM module, or run here with `bash run_all.sh --local`"
    try:
        names = client.call("sinfo", "-h", "-o", "%R", seconds=ANSWER_SECONDS).split()
    except client.SlurmError as error:
        return "warn", f"{str(error).splitlines()[0]}; submit where it answers, or run here with `bash run_all.sh --local`"
    return "ok", f"partitions {', '.join(names)}"
