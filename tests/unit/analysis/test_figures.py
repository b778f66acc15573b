"""Figures: labels that do not overlap, alt texts that tell the curves, colours that stay with a run."""

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_runs import make_run

from megatron_urlvr.analysis.figures import (
    COLOURS,
    Caption,
    Styles,
    accuracy_panels,
    proxy_panels,
    render,
    spread,
)
from megatron_urlvr.analysis.pictures import DETAILS, report_pictures
from megatron_urlvr.analysis.runs import Series, load_run


@given(
    st.lists(st.tuples(st.floats(-50, 250), st.floats(8, 25)), min_size=1, max_size=8),
)
def test_labels_never_overlap_keep_their_order_and_stay_in_the_figure(boxes):
    wanted, heights = [box[0] for box in boxes], [box[1] for box in boxes]
    placed = spread(wanted, heights, low=0.0, high=200.0)
    order = sorted(range(len(boxes)), key=lambda index: wanted[index])
    for below, above in pairwise(order):
        assert placed[above] - placed[below] >= (heights[above] + heights[below]) / 2 - 1e-6
    for y, height in zip(placed, heights, strict=True):
        assert y - height / 2 >= -1e-6
        assert y + height / 2 <= 200.0 + 1e-6


def test_labels_with_room_stay_where_their_lines_end():
    assert spread([10.0, 100.0, 50.0], [10.0] * 3, low=0.0, high=200.0) == [10.0, 100.0, 50.0]


def test_two_labels_on_one_spot_part_evenly():
    assert spread([50.0, 50.0], [10.0, 10.0], low=0.0, high=200.0) == [45.0, 55.0]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "weak + trajectory entropy": make_run(folder / "weak", "dies"),
        "strong + trajectory entropy": make_run(folder / "strong", "rises", base="strong"),
        "weak + ground truth": make_run(folder / "truth", "truth", reward="ground_truth"),
    }
    return [Series(label, [load_run(path)]) for label, path in runs.items()]


@pytest.fixture(scope="module")
def pictures(three):
    """(overview, other wide ones, details)."""
    return report_pictures(three, ["held_out"], Styles(three), "Two beliefs")


def test_accuracy_has_a_panel_for_each_base_and_rewards_one_for_each_unit(three):
    styles = Styles(three)
    assert [panel.title for panel in accuracy_panels(three, "held_out", styles)] == ["Base: weak", "Base: strong"]
    assert [panel.subtitle for panel in proxy_panels(three, styles)] == [
        "trajectory_entropy (sum), batch mean",
        "ground_truth, batch mean",
    ]
    label_free = proxy_panels(three, styles, unsupervised_only=True)
    assert [panel.subtitle for panel in label_free] == ["trajectory_entropy (sum), batch mean"]


def test_the_overview_shows_every_run_in_its_colour_and_each_training_metric_has_a_figure(pictures):
    overview, _, details = pictures
    pixels = np.asarray(Image.open(io.BytesIO(overview.png)).convert("RGB")).reshape(-1, 3)
    for colour in COLOURS[:3]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=1).sum() > 300
    assert [picture.name for picture in details] == [detail.name for detail in DETAILS]


def test_the_alt_text_tells_every_curve_in_numbers(three, pictures):
    for item in three:
        accuracy, proxy = item.mean("eval/held_out/avg@4").values, item.mean("reward/proxy").values
        assert f"{item.label}: {accuracy[0]:.2f} at step 0" in pictures[0].alt
        assert f"{proxy[-1]:.2f} at step 100" in pictures[0].alt


def test_a_study_of_bases_by_settings_names_and_colours_settings_alike_in_every_bases_panel(three):
    runs = three[0].runs
    series = [
        Series(f"{base}, {setting}", runs, base=f"{base}/weak", within_base=setting)
        for base in ("planted", "clean")
        for setting in ("vote", "truth")
    ]
    styles = Styles(series)
    assert [styles.name(item) for item in series] == ["vote", "truth", "vote", "truth"]
    assert [styles.colour(item) for item in series] == [*COLOURS[:2], *COLOURS[:2]]
    assert [styles.by_base.name(item) for item in series] == ["planted/weak"] * 2 + ["clean/weak"] * 2
    overview, _, details = report_pictures(series, ["held_out"], styles, "Two by two")
    width, height = Image.open(io.BytesIO(details[0].png)).size
    assert width > 1.5 * height, "a panel for each of the two bases"
    assert "planted, vote" in overview.alt


def test_a_figure_is_the_same_bytes_when_made_again(three):
    panels = accuracy_panels(three, "held_out", Styles(three))[1:]
    first, second = (render(Caption("name", "title", "text", "alt"), panels).png for _ in range(2))
    assert first == second


def test_nothing_to_draw_is_no_figure():
    assert render(Caption("name", "title", "text", "alt"), []) is None
