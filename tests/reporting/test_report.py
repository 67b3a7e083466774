# SPDX-License-Identifier: Apache-2.0
"""The page of a run: its numbers are those of the folder, and whatever is missing is said."""

import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path as FilePath
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from handmade import EVIL, PER_EPOCH, QUOTES, SCRIPT, handmade
from tiny import train_tiny
from typer.testing import CliRunner

import dessilbi
from dessilbi import DessiLBI, Path, param_groups
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.cli import app
from dessilbi.files.runs import Run, status_of
from dessilbi.files.sealing import sealed
from dessilbi.files.storage import DamagedFileError, append_line, write_json
from dessilbi.outcomes.tickets import Drawer, Wish
from dessilbi.path.history import NEVER
from dessilbi.reporting import blockfigures, palette, plots
from dessilbi.reporting.comparison import growth_charts, macs_chart
from dessilbi.reporting.evidence import evidence_of, labels_of
from dessilbi.reporting.frames import MOST, frames_of
from dessilbi.reporting.page import Report, hash_of, report_of
from dessilbi.reporting.scales import of_accuracy
from dessilbi.reporting.sections import figures_of
from dessilbi.reporting.svg import to_svg


class Reader(HTMLParser):
    """What a browser would find in a page: elements, their ids, scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.inside, self.texts, self.open = [], [], [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.tags.append((tag, told))
        self.ids += [told["id"]] if "id" in told else []
        self.open.append(told.get("id") or told.get("data-field") or tag)
        if tag in ("meta", "link", "input", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


def page_of(*runs):
    page = report_of([run.folder for run in runs]).html()
    return page, Reader(page)


def frames_in(reader):
    return json.loads(reader.texts["frames"])


@pytest.fixture(scope="module")
def run_that_selects(tmp_path_factory):
    """A tiny run whose blocks enter one after the other, from the first points on."""
    conv = '{"conv*.weight" = {structure = "filter", lam = 0.15}}'
    return train_tiny(
        tmp_path_factory.mktemp("selects") / "run", "optimizer.lam=0.015", f"structure={conv}"
    )


@pytest.fixture(scope="module")
def tiny_report(run_that_selects):
    return report_of([run_that_selects.folder])


@pytest.fixture(scope="module")
def tiny_page(tiny_report):
    page = tiny_report.html()
    return page, Reader(page)


def in_percent(value):
    return f"{100 * value:.2f}\u00a0%" if value >= 0.01 else f"{100 * value:.3g}\u00a0%"


def test_the_numbers_of_the_slider_are_those_of_the_run_folder(tiny_page, run_that_selects):
    (run,) = frames_in(tiny_page[1])
    points = Path.load(run_that_selects.folder).points
    assert len(run["frames"]) == len(points) == 4
    for frame, point in zip(run["frames"], points, strict=True):
        shown = frame["shown"]
        assert f"step {point.step:,}" in shown["where"]
        assert shown["dense"] == in_percent(point.metrics["accuracy"])
        assert shown["ticket"] == in_percent(point.metrics["ticket_accuracy"])
        assert shown["gamma"] == in_percent(point.metrics["gamma_accuracy"])
        assert shown["support"] == in_percent(point.density)
        assert shown["time"] == f"{point.time:.4g}"
    assert len({frame["shown"]["ticket"] for frame in run["frames"]}) > 1


def test_the_models_of_the_slider_are_those_that_tickets_by_step_give(tiny_page, run_that_selects):
    (run,) = frames_in(tiny_page[1])
    drawer = Drawer(run_that_selects)
    dense, seen = drawer.family().costs.dense, set()
    for frame, point in zip(run["frames"], drawer.path.points, strict=True):
        if not drawer.path.ticket(step=point.step).kept_elements:
            assert frame["shown"]["params"] == "nothing has entered yet"
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="nothing is left of")
            drawn = drawer.draw(Wish(step=point.step))
        cost, shown = drawn.cost, frame["shown"]
        share = in_percent(cost.params / dense.params)
        assert shown["params"] == f"{cost.params:,} of {dense.params:,} ({share})"
        assert shown["macs"].startswith(f"{cost.macs:,} of {dense.macs:,} (")
        assert shown["density"] == in_percent(drawn.ticket.density)
        alive = []
        for name, spec in drawer.path.specs.items():
            live = drawn.ticket.mask_of(name)
            filters = spec.num_blocks == spec.shape[0]
            alive.append(int(live.flatten(1).any(1).sum() if filters else live.sum()))
        assert frame["alive"] == alive
        seen.add(cost.params)
    assert len(seen) > 1


def test_the_command_extracts_the_very_model_when_it_is_pasted(tiny_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = frames_in(tiny_page[1])
    frame = run["frames"][1]["shown"]
    taken, compacted = frame["command"].split("\n")
    for line in (taken, f"{compacted} --json"):
        done = CliRunner().invoke(app, line.split()[1:])
        assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert f"{told['params_after']:,} of {told['params_before']:,}" in frame["params"]
    assert f"{told['macs_after']:,} of {told['macs_before']:,}" in frame["macs"]


def test_a_page_without_its_script_shows_the_end_of_the_path(tiny_page):
    _, reader = tiny_page
    last = frames_in(reader)[0]["frames"][-1]
    for field in ("where", "ticket", "params", "command"):
        assert reader.texts[field].strip() == last["shown"][field]


def test_every_id_is_there_once_and_every_label_leads_somewhere(tiny_page):
    _, reader = tiny_page
    assert len(reader.ids) > 20
    assert len(set(reader.ids)) == len(reader.ids)
    for _, told in reader.tags:
        for name in ("for", "aria-labelledby"):
            for target in (told.get(name) or "").split():
                assert target in reader.ids
        if (told.get("href") or "").startswith("#"):
            assert told["href"][1:] in reader.ids


def test_headings_are_in_order(tiny_page):
    levels = [int(tag[1]) for tag, _ in tiny_page[1].tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_the_policy_of_a_page_allows_its_own_style_and_script_alone(tiny_page):
    page, reader = tiny_page
    (policy,) = [told["content"] for tag, told in reader.tags if "http-equiv" in told]
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    assert f"style-src 'sha256-{hash_of(style)}'" in policy
    assert f"script-src 'sha256-{hash_of(script)}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not any("style" in told for _, told in reader.tags)
    assert not any(name.startswith("on") for _, told in reader.tags for name in told)


def test_nothing_in_a_page_points_to_another_place(tiny_page):
    page, reader = tiny_page
    for _, told in reader.tags:
        for name in ("src", "href", "action", "data"):
            assert (told.get(name) or "#").startswith(("#", "data:"))
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_hostile_names_are_text_and_nothing_else(tmp_path):
    names = (f"{EVIL}.weight", f"{SCRIPT}.weight", f"{QUOTES}.weight")
    run = handmade(tmp_path / "<b onclick=x>run", names=names, summary=SCRIPT)
    page, reader = page_of(run)
    tags = [tag for tag, _ in reader.tags]
    assert "img" not in tags
    assert "b" not in tags
    assert tags.count("script") == 2
    assert len(set(reader.ids)) == len(reader.ids)
    assert "&lt;img src=x" in page
    assert "49" not in re.findall(r"onmouseover=[^<]*", page)[0].split("{{")[0]
    (told,) = frames_in(reader)
    assert told["frames"][0]["shown"]["command"].count("'") >= 2


def test_a_path_of_many_points_is_thinned_and_the_page_says_so(tmp_path):
    run = handmade(tmp_path / "run", points=200)
    page, reader = page_of(run)
    (told,) = frames_in(reader)
    assert len(told["frames"]) == MOST
    steps = [frame["shown"]["where"].split("step ")[1] for frame in told["frames"]]
    assert (steps[0], steps[-1]) == (f"{PER_EPOCH}", f"{200 * PER_EPOCH:,}")
    assert f"{MOST} of 200 recorded points, spread evenly" in page
    assert "60 of 200 recorded points are drawn" in page


def test_a_path_that_is_short_is_not_said_to_be_thinned(tmp_path):
    assert "spread evenly" not in page_of(handmade(tmp_path / "run"))[0]


def cut(run, lines):
    run.path.write_text("".join(run.path.read_text().splitlines(keepends=True)[:lines]))


def no_path(run):
    run.path.unlink()


def torn(run):
    run.path.write_text(run.path.read_text()[:-20])


def interrupted(run):
    write_json(run.status, status_of("interrupted", step=10, reason="the <b>disk</b> is full"))


MISSING = {
    "an empty path": (lambda run: cut(run, 1), "no recorded point yet"),
    "a path torn in its first line": (lambda run: run.path.write_text("{"), "No path was recorded"),
    "no path": (no_path, "No path was recorded"),
    "one point": (lambda run: cut(run, 2), "a single recorded point"),
    "a torn last line": (torn, "From simple to complex"),
    "no epochs": (lambda run: run.metrics.unlink(), "No epoch is over yet"),
    "an interrupted run": (interrupted, "its status is interrupted (the &lt;b&gt;disk"),
    "no status": (lambda run: run.status.unlink(), "does not say how far"),
    "no environment": (lambda run: run.environment.unlink(), "From simple to complex"),
    "another model": (lambda run: None, "Parameters and MACs could not be worked out"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said(tmp_path, what):
    change, said = MISSING[what]
    run = handmade(tmp_path / "run")
    change(run)
    page, reader = page_of(run)
    assert said in page
    assert reader.tags[-1][0] == "script"


def test_a_path_that_was_not_judged_has_a_page_without_accuracies(tmp_path):
    page, reader = page_of(handmade(tmp_path / "run", judged=False))
    assert "No point of the path was judged" in page
    assert not any("accuracy-by" in name for name in reader.ids)
    assert {f["shown"]["ticket"] for f in frames_in(reader)[0]["frames"]} == {"not measured"}


def test_a_run_without_norms_says_that_they_are_missing(tmp_path):
    run = handmade(tmp_path / "run")
    found = evidence_of(run.folder)
    found.path.history.norms.drop(found.path.history.norms.steps)
    page = Report([found], [frames_of(found)]).html()
    assert "norms of filters along the path are missing" in page


def test_a_damaged_run_is_refused(tmp_path):
    run = handmade(tmp_path / "run")
    text = run.path.read_text()
    run.path.write_text(text.replace('"density"', '"densitx"', 1))
    with pytest.raises(DamagedFileError, match="not a readable path"):
        report_of([run.folder])


def test_a_damaged_ticket_beside_a_run_is_said(tmp_path):
    run = handmade(tmp_path / "run")
    run.tickets.mkdir()
    (run.tickets / "broken.safetensors").write_bytes(b"no ticket")
    assert "The ticket broken.safetensors could not be read" in page_of(run)[0]


def test_chosen_tickets_are_marked_and_listed(run_that_selects, tmp_path):
    run = Run(shutil.copytree(run_that_selects.folder, tmp_path / "run"))
    drawer = Drawer(run)
    run.tickets.mkdir()
    drawer.draw(Wish(step=6)).ticket.save(run.tickets / "by-step.safetensors")
    drawn = drawer.draw(Wish(density=0.4)).ticket
    drawn.save(run.tickets / "by-density.safetensors")
    found = evidence_of(run.folder)
    charts = {f.name: f for f in figures_of(found, frames_of(found))["accuracy"]}
    marks = {mark.label: mark.x for mark in charts["accuracy-by-density"].marks}
    assert marks["by-density"] == drawn.density
    assert [m.label for m in charts["accuracy-by-epoch"].marks] == ["by-step"]
    assert charts["accuracy-by-epoch"].marks[0].x == pytest.approx(1.0)
    assert "all that had entered by step 6" in page_of(run)[0]


def test_the_family_and_retrained_tickets_are_listed(tmp_path):
    run = handmade(tmp_path / "run")
    tickets = [{"density": 0.25, "before": 0.5, "after": 0.75}]
    write_json(run.family, sealed({"accuracy": 0.9, "tickets": tickets}))
    row = {"mode": "rewind", "density": 0.25, "accuracy": 0.8125, "before": None, "std": 0.01}
    (run.retrained / "mine").mkdir(parents=True)
    write_json(
        run.retrained / "mine" / "results.json",
        {"rows": [{**row, "repetitions": 3, "epochs": 5}]},
    )
    page = page_of(run)[0]
    for told in ("Retrained: mine", in_percent(0.8125), "1.00 points", in_percent(0.75)):
        assert told in page


def test_an_early_stop_is_told(tmp_path):
    run = handmade(tmp_path / "run")
    settled = {"step": 60, "time": 6.0}
    write_json(run.status, status_of("finished", settled=settled, epochs_saved=4.0))
    found = evidence_of(run.folder)
    chart = {f.name: f for f in figures_of(found, frames_of(found))["accuracy"]}[
        "accuracy-by-epoch"
    ]
    assert [(m.x, m.label) for m in chart.marks] == [(6.0, "support had settled")]
    assert "The search stopped early" in page_of(run)[0]


def test_runs_side_by_side_are_told_apart_and_different_data_is_said(tmp_path):
    one = handmade(tmp_path / "a" / "run")
    two = handmade(tmp_path / "b" / "run", data="mnist", points=5)
    page, reader = page_of(one, two)
    assert "different data (digits, mnist)" in page
    assert [len(told["frames"]) for told in frames_in(reader)] == [12, 5]
    assert "a/run" in page
    assert "b/run" in page
    assert len(set(reader.ids)) == len(reader.ids)
    assert "different data" not in page_of(one, one)[0]


def test_runs_of_one_name_are_called_by_what_lies_above():
    assert labels_of([FilePath("/x/run"), FilePath("/y/run")]) == ["x/run", "y/run"]


def test_a_title_says_the_point_that_its_numbers_make(tmp_path):
    found = evidence_of(handmade(tmp_path / "run").folder)
    charts = {f.name: f for f in figures_of(found, frames_of(found))["accuracy"]}
    assert charts["accuracy-by-density"].title == (
        f"At its last density, {in_percent(1.0)}, the ticket is 5.00 points below the dense W"
    )
    near = [replace(row, ticket_accuracy=row.accuracy - 0.005) for row in found.rows[-3:]]
    found = replace(found, rows=[*found.rows[:-3], *near])
    charts = {f.name: f for f in figures_of(found, frames_of(found))["accuracy"]}
    assert charts["accuracy-by-density"].title == (
        f"From a density of {in_percent(near[0].density)} on, the ticket is within a point of the "
        f"dense W"
    )


def grown(run):
    """Let a run tell of a network that grew once, in the middle."""
    for epoch, width, spent in ((0, 2, 0), (6, 4, 3 * 100 * 32 * 60), (12, 4, 57_600 * 30)):
        sizes = {"conv1": width}
        line = {"epoch": epoch, "step": epoch * PER_EPOCH, "sizes": sizes, "params": 10 * width}
        append_line(run.growth, {**line, "macs": 50 * width, "training_macs": spent})
    return run


def test_the_widths_of_a_network_that_grew_are_drawn_with_what_it_cost(tmp_path):
    run = grown(handmade(tmp_path / "run", batch_size=32))
    found = evidence_of(run.folder)
    (widths,) = growth_charts(found)
    assert list(widths.lines[0].points) == [(0.0, 2.0), (6.0, 4.0), (12.0, 4.0), (12.0, 4.0)]
    chart = macs_chart([found], [frames_of(found)])
    assert "10⁶" in chart.x.label
    spent = [round(x * 1e6) for x, _ in chart.lines[0].points]
    assert spent[5] == 3 * 100 * 32 * 60
    assert spent[11] == spent[5] + 3 * 200 * 32 * 60
    assert [y for _, y in chart.lines[0].points] == [m["val_accuracy"] for m in found.metrics]


def test_figures_are_whole_svg_files_with_words_for_those_who_do_not_see(tiny_report, tmp_path):
    files = plots.save_figures(tiny_report.figures(), tmp_path / "figures", "svg")
    assert len(files) == len(tiny_report.figures()) > 6
    for file in files:
        root = ElementTree.fromstring(file.read_text())
        title, told = root[0], root[1]
        assert (title.tag.split("}")[1], told.tag.split("}")[1]) == ("title", "desc")
        assert len(title.text) > 10
        assert len(told.text) > 20
        assert root.attrib["role"] == "img"


def test_figures_as_png_are_pictures(tmp_path):
    run = handmade(tmp_path / "run", names=(f"{QUOTES}.weight",))
    figures = report_of([run.folder]).figures()
    wanted = {n: f for n, f in figures.items() if "norms" in n or "first" in n or "by-d" in n}
    files = plots.save_figures(wanted, tmp_path / "figures", "png")
    assert len(files) == len(wanted) >= 3
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)


@pytest.fixture(scope="module")
def own_loop(tmp_path_factory):
    """The folder of a loop of one's own, with nothing in it but a path and what it logged."""
    folder = tmp_path_factory.mktemp("own") / "loop"
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    optimizer = DessiLBI(param_groups(layer, {"weight": "neuron"}), lr=0.1, nu=1.0, lam=0.2)
    path = Path(optimizer, every=2, file=folder / "path.jsonl")
    for step in range(12):
        optimizer.zero_grad()
        (layer(torch.eye(6)) - torch.arange(4.0)).square().mean().backward()
        optimizer.step()
        if step % 2:
            path.log(epoch=step / 2, accuracy=0.5, ticket_accuracy=step / 24)
    path.close()
    assert path.points[-1].density > 0
    assert [file.name for file in folder.iterdir()] == ["path.jsonl"]
    return folder, path


def test_a_loop_of_ones_own_has_a_page_as_well(own_loop):
    folder, path = own_loop
    page = report_of([folder]).html()
    reader = Reader(page)
    (run,) = frames_in(reader)
    assert [frame["at"]["density"] or 0.0 for frame in run["frames"]] == [
        point.density for point in path.points
    ]
    assert run["frames"][-1]["shown"]["ticket"] == in_percent(11 / 24)
    assert "This path was recorded outside of dessilbi train" in page
    assert "None" not in page
    assert "unknown" not in reader.texts["h1"]


def test_its_page_says_how_to_load_each_ticket(own_loop):
    folder, path = own_loop
    (run,) = frames_in(Reader(report_of([folder]).html()))
    line = run["frames"][-1]["shown"]["command"]
    ticket = eval(line, {"dessilbi": dessilbi})
    assert ticket.density == path.ticket(step=path.points[-1].step).density > 0


def test_it_stands_beside_other_runs(own_loop, tmp_path):
    page = report_of([own_loop[0], handmade(tmp_path / "run").folder]).html()
    assert "These runs are of different data (digits, unknown)" in page


def test_a_folder_without_recipe_and_path_is_still_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no recipe\.json"):
        report_of([tmp_path])


def test_png_without_matplotlib_is_refused_in_one_sentence(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'dessilbi\[figures\]'"):
        plots.save_figures({}, tmp_path / "figures", "png")
    assert not (tmp_path / "figures").exists()


def test_a_picture_has_ids_of_its_own_on_every_page(tiny_report):
    figure = next(iter(tiny_report.figures().values()))
    one, two = (ElementTree.fromstring(str(to_svg(figure, prefix))) for prefix in ("a", "b"))
    ids = [[e.attrib["id"] for e in tree.iter() if "id" in e.attrib] for tree in (one, two)]
    assert len(ids[0]) == 2
    assert not set(ids[0]) & set(ids[1])


def run_command(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_a_page_and_never_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = handmade(tmp_path / "run")
    assert run_command(run.folder).exit_code == 0
    assert run_command(run.folder, "--figures", "drawn").exit_code == 0
    assert {f.name for f in tmp_path.glob("*.html")} == {"report.html", "report-2.html"}
    assert len(list((tmp_path / "drawn").glob("*.svg"))) > 6
    done = run_command(run.folder, "--out", "report.html")
    assert done.exit_code == 1
    assert "never overwritten" in done.output


@pytest.mark.parametrize("count", [0, 13])
def test_no_run_and_too_many_are_refused(count):
    with pytest.raises(ValueError, match="give 1 to 12 run folders"):
        report_of([FilePath("x")] * count)


def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path):
    done = run_command(tmp_path)
    assert done.exit_code == 1
    assert "is not a run folder" in done.output
    assert "Traceback" not in done.output


def test_where_data_lay_is_not_on_the_page(tmp_path):
    assert "somebody" not in page_of(handmade(tmp_path / "run"))[0]


def luminance(colour):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    low, high = sorted(luminance([v / 255 for v in palette.rgb(c)]) for c in (one, two))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_curves_stand_out_from_their_ground_in_both_themes(theme):
    tones = {name: getattr(tone, theme) for name, tone in palette.TONES.items()}
    for ground in (tones["ground"], tones["page"]):
        assert all(contrast(tones[name], ground) >= 4.5 for name in ("ink", "soft", "ticket"))
        assert all(contrast(tones[name], ground) >= 3 for name in palette.SERIES)
    assert len({tones[name] for name in palette.SERIES}) == len(palette.SERIES)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.1, 0.5, 0.7], "linear"),
        ([0.1, 0.97, 0.99], "error"),
        ([0.9, 1.0], "linear"),
        ([0.95, 0.9999], "linear"),
        ([], "linear"),
    ],
)
def test_accuracies_near_one_are_told_apart_and_one_itself_has_a_place(values, kind):
    scale = of_accuracy(values)
    assert scale.kind == kind
    places = [scale.place(value) for value in values]
    assert all(0 <= place <= 1 for place in places)
    assert places == sorted(set(places))
    assert len(scale.ticks()) >= 3


def test_the_first_entry_of_a_filter_is_that_of_its_own_block_also_where_parts_are_packed():
    spec = TensorSpec((4, 1, 3, 3), ((1, 1), None, None, None))  # blocks {0, 2} and {1, 3}
    entry = torch.tensor([7, NEVER]).reshape(spec.grid)
    path = SimpleNamespace(specs={"conv": spec}, entry=lambda: {"conv": entry})
    assert blockfigures._entry_by_filter(path, "conv") == [7, -1, 7, -1]
