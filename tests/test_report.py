"""Figures and report: every figure draws and says what it shows; the page stands alone and escapes what it is given."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from codesign import plots, report, rundir

LAYERS = ["conv1", "dense/$odd$ <name>"]
PASSES = ["forward", "input_grad", "weight_grad"]
DATA = {
    "training_curves": {
        "history": {
            "joint": {
                "epoch": [1, 2, 3],
                "loss": [2.0, 0.5, 0.1],
                "validation_accuracy": [0.5, None, 0.9],
                "energy_uj": [9, 7, 5],
            },
            "mine_2": {"epoch": [1, 2], "loss": [2.0, float("nan")]},
        }
    },
    "accuracy_energy": {
        "points": [
            {"label": "joint", "energy_uj": 10.0, "accuracy": 0.97, "interval": [8.0, 14.0]},
            {"label": "random", "energy_uj": 20.0, "accuracy": 0.95},
            {"label": "random", "energy_uj": 90.0, "accuracy": 0.98},
        ]
    },
    "bits_per_layer": {"table": {LAYERS[0]: {"weights": 3, "inputs": 4, "weight_grad": 6}, LAYERS[1]: {"weights": 4}}},
    "energy_breakdown": {
        "energy_j": (np.arange(12.0).reshape(2, 3, 2) * 1e-7).tolist(),
        "layers": LAYERS,
        "passes": PASSES,
        "components": ["MAC", "DRAM"],
        "intervals_j": (np.arange(12.0).reshape(2, 2, 3) * 2e-7).tolist(),
    },
    "roofline": {
        "points": [
            {"name": layer, "pass": p, "operations_per_byte": 2.0 + i, "operations_per_second": 1e9 * (i + 1)}
            for layer in LAYERS
            for i, p in enumerate(PASSES)
        ],
        "peaks": {"8 bit": 1e10, "4 bit": 4e10},
        "bandwidths": {"DRAM": 4e9},
    },
    "area_breakdown": {
        "areas": {"joint": {"MAC array": 0.1, "SRAM": 0.3}, "float32": {"MAC array": 2.0}},
        "intervals": {"joint": [0.3, 0.6]},
    },
}
RESULT = {
    "title": "T <script>alert(1)</script>",
    "config": {"train": {"epochs": 3}},
    "summary": [
        {
            "method": "joint",
            "accuracy": 0.975,
            "energy_uj": 4.0,
            "latency_ms": 0.5,
            "edp_js": 2e-9,
            "gap": 0.002,
            "intervals": {"energy_uj": [3.25, 6.75], "edp_js": [1.5e-9, 3e-9]},
            "edp_to_bound": 1.04,
        },
        {
            "method": "uniform8",
            "accuracy": 0.98,
            "energy_uj": 16.0,
            "latency_ms": 0.5,
            "edp_js": 8e-9,
            "gap": None,
            "against_joint": {"edp_js": {"ratio": 4.0, "interval": [3.75, 4.25], "holds": 0.97}},
        },
    ],
    "design": {
        "chip": {"rows": 12, "local_kib": 32.0, "<b>": "&"},
        "precision": {"conv1": {"weights_bits": 4}},
        "training_step": {"energy_uj": 4.0, "energy_to_bound": 1.02, "intervals": {"energy_uj": [3.25, 6.75]}},
        "inference": {"latency_ms": 0.125, "latency_to_bound": 1.5, "intervals": {"latency_ms": [0.0625, 0.25]}},
    },
    "operations": [
        {
            "operation": "conv1 (forward)",
            "energy_uj": 1.5,
            "energy_to_bound": 1.25,
            "latency_ms": 0.25,
            "limited_by": "shared",
            "intervals": {"energy_uj": [1.125, 2.5]},
        },
    ],
    "explanations": [{"operation": "conv1 (forward)", "share": 0.375, "text": "for K in 4 <deep>"}],
    "notes": ["<img src=x onerror=y>"],
    "figures": DATA,
}


def drawn_texts(figure: Figure) -> list[Text]:
    """The texts one sees; matplotlib keeps labels of ticks outside the view among its artists."""
    hidden = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_text() and text.get_visible() and text not in hidden]


def test_every_figure_of_the_report_has_data_here():
    assert set(DATA) == set(report.FIGURES)


@pytest.mark.parametrize("name", DATA)
def test_figure_is_valid_svg_and_alike_when_drawn_again(name):
    draw = getattr(plots, name)
    first, second = (plots.to_svg(draw(**DATA[name]), "f") for _ in range(2))
    assert first == second
    ElementTree.fromstring(first)
    assert plots.INK not in first and plots.PAPER not in first and "currentColor" in first
    assert "<svg" in plots.to_svg(draw(**DATA[name])) and "currentColor" not in plots.to_svg(draw(**DATA[name]))


@pytest.mark.parametrize("name", ["training_curves", "bits_per_layer", "area_breakdown"])
def test_figure_without_data_draws(name):
    empty = {key: {} for key in DATA[name]}
    ElementTree.fromstring(plots.to_svg(getattr(plots, name)(**empty), "f"))


@pytest.mark.parametrize("name", DATA)
def test_texts_do_not_overlap(name):
    figure = getattr(plots, name)(**DATA[name])
    figure.draw_without_rendering()
    texts = drawn_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, texts[index]
        for other in range(index):
            assert not box.overlaps(boxes[other]), (texts[index], texts[other])


def test_energy_stacks_to_its_total_and_says_its_unit():
    figure = plots.energy_breakdown(**DATA["energy_breakdown"])
    ends = [max(bar.get_x() + bar.get_width() for bar in ax.patches) for ax in figure.axes]
    # conv2's components are the pairs (6, 7), (8, 9), (10, 11) in units of 1e-7 J.
    np.testing.assert_allclose(ends, [1.3, 1.7, 2.1])
    assert "energy (µJ)" in {text.get_text() for text in drawn_texts(figure)}


def test_energy_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 2\)"):
        plots.energy_breakdown(**{**DATA["energy_breakdown"], "layers": ["one"]})


def test_front_joins_the_points_no_other_beats():
    points = [*DATA["accuracy_energy"]["points"], {"label": "random", "energy_uj": 30.0, "accuracy": 0.96}]
    (line,) = plots.accuracy_energy(points).axes[0].lines
    assert line.get_xdata().tolist() == [10.0, 90.0]
    np.testing.assert_allclose(line.get_ydata(), [97.0, 98.0])


@pytest.mark.parametrize(
    ("values", "unit"), [([2e-6, 3e-3], "mJ"), ([5e-13], "fJ"), ([0.0], "J"), ([], "J"), ([40.0], "J")]
)
def test_unit_prefix_suits_the_largest_value(values, unit):
    scaled, named, scale = plots._prefixed(np.array(values), "J")
    assert named == unit
    np.testing.assert_allclose(scaled, np.array(values) * scale)
    assert not values or max(values) == 0 or 1 <= scaled.max() < 1000


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    VOID = ("meta", "br", "img")

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page_text():
    return report.render(RESULT, report.draw_figures(DATA))


def test_page_is_whole_and_stands_alone(page_text):
    page = Page()
    page.feed(page_text)
    assert not page.open and page.tags.count("svg") == len(DATA)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
    identities = [value for name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    references = re.findall(r'(?:url\(|href=")#([^")]+)', page_text)
    assert references and set(references) <= set(identities)


def test_page_escapes_everything(page_text):
    assert "<script" not in page_text and "&lt;script&gt;" in page_text
    assert "<img" not in page_text and "&lt;b&gt;" in page_text and "<name>" not in page_text


def test_page_tells_the_numbers_with_units_and_follows_the_colour_scheme(page_text):
    assert "97.50" in page_text and "energy (µJ)" in page_text and "32 KiB" in page_text
    assert "4.00" in page_text  # 8 bit: 8e-9 J s against 2e-9 J s
    assert "+0.2" in page_text and "–" in page_text
    assert "prefers-color-scheme: dark" in page_text
    for _, caption in report.FIGURES.values():
        assert caption in page_text


def test_page_tells_intervals_bounds_and_in_which_share_of_samples_the_order_holds(page_text):
    cells = re.findall(r"<td>(.*?)</td>", page_text)
    for shown in (
        "4<i>3.25–6.75</i>",  # energy of joint
        "1.04",  # its EDP over the bound
        "4.00<i>3.75–4.25</i>",  # EDP of uniform8 over joint's
        "97",
        "0.125<i>0.0625–0.25</i>",  # of an inference
        "1.5<i>1.12–2.5</i>",  # of an operation
        "shared",
    ):
        assert shown in cells, shown
    assert report.INTERVALS in html.unescape(page_text)
    explained = re.search(r"<summary>(conv1 \(forward\).*?)</summary><pre>(.*?)</pre>", page_text)
    assert explained[1] == "conv1 (forward): 38 % of the energy of a training step"
    assert explained[2] == "for K in 4 &lt;deep&gt;"


def test_colours_do_not_repeat():
    """Of methods in one figure, whatever others there are, and of as many components as a step has."""
    names = ["pretrain", *plots.METHODS]
    colors = [color for color, _ in plots._method_styles(names).values()]
    assert len(set(colors)) == len(names)
    assert plots._method_styles(["mine", "joint"])["joint"] == plots._method_styles(plots.METHODS)["joint"]
    components = ["mac", "register", "local", "shared", "dram", "control", "vector", "leakage"]
    figure = plots.energy_breakdown(np.ones((1, 1, len(components))), ["a"], ["forward"], components)
    bars = figure.axes[0].patches
    assert len({bar.get_facecolor() for bar in bars}) == len(components)


def test_intervals_are_drawn_where_they_are():
    (ax,) = plots.accuracy_energy(**DATA["accuracy_energy"]).axes
    ((low, height), (high, _)) = ax.collections[0].get_segments()[0]
    assert (low, high, height) == (8.0, 14.0, 97.0)
    forward = plots.energy_breakdown(**DATA["energy_breakdown"]).axes[0]
    lines = [line for collection in forward.collections for line in collection.get_segments()]
    # Low and high of the first layer are 0 and 12, of the second 6 and 18, times 1e-7 J; in uJ.
    np.testing.assert_allclose(lines, [[[0.0, 0], [1.2, 0]], [[0.6, 1], [1.8, 1]]])


def test_page_with_nothing_but_a_title():
    page = Page()
    page.feed(report.render({"title": "empty"}, {}))
    assert "figure" not in page.tags


def test_report_is_made_from_a_run_directory(tmp_path):
    without_curves = {key: value for key, value in DATA.items() if key != "training_curves"}
    rundir.write_result(tmp_path, {**RESULT, "figures": without_curves})
    for epoch in (1, 2):
        rundir.append_metrics(tmp_path, {"step": 10 * epoch, "method": "joint", "epoch": epoch, "loss": 1 / epoch})
        rundir.append_metrics(tmp_path, {"step": 10 * epoch, "note": "no epoch"})
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html" and 'id="training_curves"' in path.read_text()
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == sorted(report.FIGURES)


def test_history_collects_epochs_by_method():
    records = [
        {"step": 1, "method": "a", "epoch": 1, "loss": 3.0},
        {"step": 2, "method": "b", "epoch": 1, "loss": 2.0},
        {"step": 3, "method": "a", "epoch": 2, "loss": 1.0, "accuracy": 0.5},
        {"step": 4, "method": "a", "loss": 9.0},
        {"step": 5, "method": "b", "epoch": 1, "loss": 4.0},  # another try
    ]
    assert report.history_from_metrics(records) == {
        "a": {"epoch": [1, 2], "loss": [3.0, 1.0], "accuracy": [None, 0.5]},
        "b": {"epoch": [1, 1, 1], "loss": [2.0, None, 4.0]},
    }


@pytest.mark.parametrize(
    "wrong",
    [{"summary": 3}, {"figures": {"pie": {}}}, {"figures": {"roofline": {}}}, {"summary": [{}]}, {"design": [1]}],
)
def test_damaged_result_is_named_in_one_line(tmp_path, wrong):
    rundir.write_result(tmp_path, {**RESULT, **wrong})
    with pytest.raises(ValueError, match=r"^damaged: .*result\.json"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("local_kib", 32.0, ("local", "32 KiB")),
        ("vdd_v", 0.61234, ("vdd", "0.6123 V")),
        ("rows", 12, ("rows", "12")),
        ("vector_lanes", 4, ("vector lanes", "4")),
        ("v", 1.0, ("v", "1")),
    ],
)
def test_units_are_read_from_key_names(key, value, expected):
    assert report.labelled(key, value) == expected


MEASURE = """<script>
const style = getComputedStyle(document.body);
document.body.dataset.measured = JSON.stringify({
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  figures: [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().width),
  background: style.backgroundColor,
  ink: getComputedStyle(document.querySelector("figure svg")).color,
});
</script></body>"""


def in_browser(directory: Path, page_text: str, width: int, dark: bool) -> tuple[dict, str]:
    """What a browser makes of the page: measurements, and what it says on its console."""
    (directory / "page.html").write_text(page_text)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={directory}", f"--window-size={width},900",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), str(directory / "page.html"),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r'data-measured="([^"]*)"', finished.stdout)
    console = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(measured[1])) if measured else {}, "\n".join(console)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to render the page")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(page_text, width, dark, tmp_path):
    """The policy against scripts is taken out of a copy, to measure with one; the page itself must not trip over it."""
    assert in_browser(tmp_path, page_text, width, dark)[1] == ""
    policy = re.search(r"<meta http-equiv=.*>", page_text)[0]
    measured, console = in_browser(tmp_path, page_text.replace(policy, "").replace("</body>", MEASURE), width, dark)
    assert console == "" and measured["overflow"] <= 0
    assert len(measured["figures"]) == len(DATA) and min(measured["figures"]) > 340
    light = sum(int(part) for part in re.findall(r"\d+", measured["background"])[:3]) > 380
    assert light != dark
    assert (sum(int(part) for part in re.findall(r"\d+", measured["ink"])[:3]) > 380) == dark
