"""Batch scripts: what is filled in, what is refused, and that the generic ones are the same scripts."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_urlvr.exit_codes import UnusableInput
from megatron_urlvr.launch.slurm import GENERIC, SlurmJob, evaluation_of, generic, render

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
JOB = SlurmJob(
    name="llama70b",
    arguments=("configs/llama70b.yaml", "optim.lr=1e-6", "'run.name=a b'"),
    run_dir="runs/llama70b",
    nodes=16,
)
JOBS = {
    "seeds.sbatch": replace(JOB, seeds="0-4%2", partition="h200", account="lab", qos="high", time="2-00:00:00"),
    "colocated.sbatch": replace(JOB, servers=True, setup=("source .venv/bin/activate",)),
    "hetjob.sbatch": replace(JOB, rollout_nodes=8, partition="train", rollout_partition="rollout", image="urlvr.sqsh"),
    "cpu.sbatch": replace(JOB, ranks_per_node=2, gpus_per_node=0, time="10"),
}
JOBS |= {f"{name}-eval.sbatch": evaluation_of(JOBS[f"{name}.sbatch"]) for name in ("seeds", "hetjob")}


@pytest.mark.parametrize("name", JOBS)
def test_a_filled_in_script_is_the_golden_one(name):
    """After a wanted change: `python tests/unit/launch/test_slurm_scripts.py` writes them again; read the diff."""
    assert render(JOBS[name]) == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GENERIC)
def test_the_scripts_of_the_slurm_folder_are_rendered_from_the_same_templates(name):
    """After a wanted change: `python -m megatron_urlvr.launch.slurm slurm`."""
    assert generic(name) == (ROOT / "slurm" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", [*map(generic, GENERIC), *map(render, JOBS.values())])
def test_scripts_are_short_and_bash_reads_them(script, tmp_path):
    assert len(script.splitlines()) <= 100
    file = tmp_path / "script"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_container_flags_come_with_an_image_only():
    assert "--container" not in render(JOB)
    assert '--container-image="urlvr.sqsh"' in render(replace(JOB, image="urlvr.sqsh"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"time": "soon"}, "--time soon: give minutes"),
        ({"seeds": "0..4"}, "--seeds 0..4: give numbers and ranges"),
        ({"seeds": "0-4", "rollout_nodes": 1}, "no arrays of heterogeneous jobs"),
        ({"servers": True, "rollout_nodes": 1}, "either on the trainer's nodes or on their own"),
        ({"mounts": "/data:/data"}, "without --image"),
        ({"name": "a b"}, "'a b' holds spaces"),
        ({"partition": "x\n#SBATCH --uid=0"}, "holds spaces or signs"),
    ],
)
def test_what_slurm_would_not_take_is_refused_in_a_sentence(change, sentence):
    with pytest.raises(UnusableInput, match=sentence):
        render(replace(JOB, **change))


if __name__ == "__main__":
    for file, job in JOBS.items():
        (GOLDEN / file).write_text(render(job), encoding="utf-8")
