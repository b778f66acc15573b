"""`urlvr convert`: which way to convert, and where the model's config is."""

from __future__ import annotations

from pathlib import Path

from megatron_urlvr.exit_codes import UnusableInput

from .outputs import make_folder


def convert(source: Path, target: Path, *, model: Path | None, max_shard_gb: float) -> str:
    """Convert `source` to the other format as `target`; returns a sentence. UnusableInput when it cannot be done."""
    from megatron_urlvr.policy.convert import to_hf, to_megatron
    from megatron_urlvr.policy.torch_dist import METADATA

    if not source.is_dir():
        raise UnusableInput(f"{source}: no such folder; give a Hugging Face folder or a Megatron checkpoint")
    make_folder(target.parent, str(target))
    if (source / METADATA).exists():
        to_hf(source, target, model=model or _model_of(source), max_shard_bytes=int(max_shard_gb * 1e9))
        return f"{target}: a Hugging Face folder"
    to_megatron(source, target)
    return f"{target}: a Megatron checkpoint (torch_dist), for any layout"


def _model_of(checkpoint: Path) -> Path:
    """The folder that holds a checkpoint's config.json: itself, or the run's model."""
    if (checkpoint / "config.json").exists():
        return checkpoint
    run = checkpoint.resolve().parent.parent
    if (run / "config.yaml").exists():
        from megatron_urlvr.config.loader import load_config

        return Path(load_config(run / "config.yaml").model.path)
    raise UnusableInput(
        f"{checkpoint}: neither a config.json nor a run's config.yaml says which model this is; give --model"
    )
