"""Every control's config is a run that can start, says what it is, and differs from the quickstart in its reward."""

from pathlib import Path

import pytest

from megatron_urlvr.config.checks import check
from megatron_urlvr.config.loader import load_config

FOLDER = Path(__file__).parents[3] / "configs"
FILES = sorted((FOLDER / "controls").glob("*.yaml"))
MODEL = {"vocab_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}


def test_the_controls_are_there():
    assert {file.stem for file in FILES} >= {
        "random", "format", "length", "incorrect", "anti_majority", "flipped_truth", "permuted_truth",
        "offline_votes", "zero_advantage", "direct_entropy",
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_control_can_start_and_changes_only_what_it_is_about(file):
    config = load_config(file)
    assert check(config, world_size=1, hf_config=MODEL, tokenizer_size=32, device="cpu") == []
    assert config.run.dir == f"runs/controls/{file.stem}"
    plain = load_config(FOLDER / "quickstart.yaml")
    for section in ("model", "data", "eval", "rollout", "optim", "parallel"):
        assert getattr(config, section) == getattr(plain, section)
    changed = config.reward != plain.reward, config.algorithm != plain.algorithm
    assert any(changed)
    assert file.read_text().startswith("# ")
