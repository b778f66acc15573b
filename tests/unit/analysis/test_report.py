"""The report: one page that needs nothing else, says what happened, and says what it lacks."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from synthetic_runs import make_run

from megatron_urlvr.analysis.report import write_report, write_series_report
from megatron_urlvr.analysis.runs import RunError, Series, load_run


class Page(HTMLParser):
    """Text, images and links of a page."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, path):
        super().__init__()
        self.images, self.links, self.open, self.text = [], [], [], ""
        self.folder, self.source = path.parent, path.read_text()
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th", "tr", "p", "li", "div"):
            self.text += " "

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def three_runs(folder):
    return [
        make_run(folder / "weak", "dies"),
        make_run(folder / "strong", "rises", base="strong"),
        make_run(folder / "truth", "truth", reward="ground_truth"),
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page of three runs, for tests that only read it."""
    folder = tmp_path_factory.mktemp("demo")
    return Page(write_report(three_runs(folder), folder / "report", title="Two beliefs", notes=["Modes are planted."]))


def test_the_page_holds_all_it_shows_and_every_figure_has_an_alt_text(demo):
    page = demo
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.images) == 8
    assert all(len(image["alt"]) > 60 for image in page.images)
    for image in page.images:
        assert base64.b64decode(image["src"].split(",")[1]).startswith(b"\x89PNG")
    overview = (page.folder / "overview.png").read_bytes()
    assert base64.b64encode(overview).decode() in page.source


def test_it_says_what_happened_in_words_and_numbers(demo):
    text = demo.text
    assert re.search(r"weak: rose and collapsed\. Accuracy 0\.\d\d at the start, 0\.4\d at its peak \(step 10\)", text)
    assert re.search(r"strong: rose and held\..*The proxy reward rose from -\d", text)
    assert re.search(r"truth: rose and held\..*The reward rose from 0\.\d", text)
    assert "trajectory_entropy (sum)" in text


def test_it_says_what_greedy_decoding_of_each_base_already_scores(demo):
    text = demo.text
    assert "Modes are planted." in text
    assert "base weak scores on held_out: maj@16 0.690, greedy 0.990" in text
    assert "base strong scores on held_out: maj@16 0.980, greedy 1.000" in text


def test_a_supervised_run_is_marked_and_every_use_of_labels_is_listed(demo):
    page = demo
    assert page.text.count("supervised") >= 3  # in the accuracy table, in the table of labels, in its text
    assert "reward:ground_truth: 25,600" in page.text
    assert page.text.count("label-free") == 2


def test_samples_of_the_same_prompts_stand_side_by_side_at_start_peak_and_end(demo):
    assert "start (step 0) peak (step 10) end (step 100)" in demo.text
    assert demo.text.count("123450=") == 3  # once a run


def test_settings_that_differ_are_shown_and_equal_ones_are_not(demo):
    section = demo.text.split("Settings that differ")[1].split("Files")[0]
    assert "model.path" in section
    assert "reward.terms.main.name" in section
    assert "optim.lr" not in section


def test_text_of_runs_cannot_break_out_of_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    sample = {"prompt": "<b>?", "response": "<script>alert(1)</script>", "answer": None, "reward": 0.0, "correct": None}
    (run / "samples/step_000100.jsonl").write_text(json.dumps(sample) + "\n")
    page = Page(write_report([run], tmp_path / "report", title="a <i> & b", notes=["</p><script>"]))
    assert "<script>" not in page.source
    assert "<script>alert(1)</script>" in page.text
    assert "no answer · not graded" in page.text


def test_a_run_that_only_began_still_gives_a_page_which_says_what_is_missing(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: young, steps: 100}\n")
    page = Page(write_report([folder]))
    assert "young: no value of reward/proxy" in page.text
    assert "any evaluation" in page.text
    assert "no probe samples" in page.text
    assert "labels.json" in page.text
    assert page.images == []


def test_a_metric_that_one_run_lacks_is_named_and_the_others_are_drawn(tmp_path):
    runs = three_runs(tmp_path)
    path = runs[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "policy/sampled_entropy"}) + "\n" for row in rows)
    )
    page = Page(write_report(runs))
    assert "weak: no value of policy/sampled_entropy was logged." in page.text
    assert any(image["alt"].startswith("Policy entropy") and "strong" in image["alt"] for image in page.images)


def test_an_empty_response_and_a_very_long_one_are_readable(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"prompt": "p", "response": ""}, {"prompt": "q", "response": "m" * 5000}]
    (run / "samples/step_000100.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report([run], tmp_path / "report")).text
    assert "(empty)" in text
    assert "(3500 more characters)" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first, second = make_run(tmp_path / "a/x", name="same"), make_run(tmp_path / "b/x", name="same")
    page = write_report([first, second])
    assert page == tmp_path / "report/report.html"
    assert str(first) in Page(page).text


def test_a_page_can_be_named_and_a_single_run_keeps_its_report_with_it(tmp_path):
    run = make_run(tmp_path / "weak")
    assert write_report([run]) == run / "report/report.html"
    assert write_report([run], tmp_path / "x/page.html") == tmp_path / "x/page.html"


def test_no_runs_or_a_folder_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="at least one run"):
        write_report([])
    with pytest.raises(RunError, match="is no run folder"):
        write_report([tmp_path])


def test_replicates_are_one_line_and_their_peaks_are_counted_over_seeds(tmp_path):
    sets = ("select", "measure")
    weak = [load_run(make_run(tmp_path / f"weak{k}", "dies", seed=k, sets=sets, problems=512)) for k in range(3)]
    truth = [
        load_run(make_run(tmp_path / f"gt{k}", "truth", seed=k, sets=sets, problems=512, reward="ground_truth"))
        for k in range(3)
    ]
    series = [Series("entropy", weak), Series("truth", truth)]
    page = Page(
        write_series_report(series, tmp_path / "report.html", title="Seeds", select_set="select", measure_set="measure")
    )
    assert "entropy, seed 2" in page.text
    assert "entropy: rose and collapsed in 3 of 3" in page.text
    assert "entropy: the lower bound of peak − start is above 0 in 3 of 3; the end is below 0.05 in 3" in page.text
    assert (
        "truth: the lower bound of peak − start is above 0 in 3 of 3; the end is below 0.05 in 0 and above 0.9 in 3"
        in (page.text)
    )
    assert "the reward it trains on rises in 3 of 3" in page.text
    assert page.text.index("avg@4 on measure") < page.text.index("avg@4 on select")
    assert "512 problems" in page.text


def test_the_page_says_where_the_label_free_detector_raised_its_alarm(tmp_path):
    folder = make_run(tmp_path / "run", "dies")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["collapse/alarm"] = float(line["step"] >= 17)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "raised its alarm at step 17." in write_report([folder]).read_text()
