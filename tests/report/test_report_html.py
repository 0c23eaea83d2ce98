"""The report: what it says, that it stands alone, and that Chromium draws it without an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from consilience.core.errors import Refused
from consilience.measure.board import board
from consilience.measure.statistics import leaderboard, t_interval
from consilience.report import answer
from consilience.report.blob import curve, curves_blob
from consilience.report.chosen import _cells
from consilience.report.facts import gather
from consilience.report.html import write_report
from consilience.report.load import read_runs

Make = Callable[..., Path]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def text_of(html: str) -> str:
    """Visible text, roughly: tags away, one kind of space."""
    body = re.sub(r"<(script|style).*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", body)).replace("\u00a0", " ").split())


def report(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


def blob(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    value = json.loads(found[1])
    assert isinstance(value, dict)
    return value


class Balance(HTMLParser):
    """Checks that elements nest and that ids are unique."""

    VOID = frozenset(("meta", "input", "br", "rect", "circle", "path"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")


@pytest.mark.parametrize(
    ("methods", "seeds", "options"),
    [
        (["fedavg", "scaffold", "fedprox"], 2, {}),
        (["local", "fedavg", "scaffold", "centralised"], 2, {}),
        (["local", "fedavg"], 1, {}),
        (["fedavg", "scaffold"], 2, {"regression": True}),
        (["local", "fedavg", "scaffold"], 2, {"regression": True}),
        (["local", "centralised"], 1, {}),
    ],
)
def test_page_is_whole(make_compare: Make, methods: list[str], seeds: int, options: dict[str, bool]) -> None:
    page = report(make_compare(methods, seeds, **options))
    checked = Balance()
    checked.feed(page)
    assert checked.wrong == []
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert anchor in checked.ids
    numbers = re.findall(r'<span class="no">(\d+)</span>', page)
    assert numbers == [str(i) for i in range(2, 2 + len(numbers))]
    assert not re.search(r"\b(nan|None|Infinity)\b", text_of(page))


def test_page_needs_nothing_else(make_compare: Make) -> None:
    page = report(make_compare(["fedavg", "scaffold"], 2))
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert not re.search(r"<(link|img|iframe)\b|@import|\bsrc=", page)


def test_winner(make_compare: Make) -> None:
    page = text_of(report(make_compare(["local", "fedavg", "scaffold", "fedprox", "centralised"], 5)))
    assert "Which federated method should these 20 clients use?" in page
    assert "SCAFFOLD wins: with it the average client gets" in page
    assert "a real difference (p < 0.001)" in page
    assert "(20 clients \u00d7 5 seeds)" in page
    assert "Local (each client alone, dashed line) and Centralised" in page


def test_no_difference_is_never_called_equal(make_compare: Make) -> None:
    page = text_of(report(make_compare(["fedavg", "fedprox"], 3)))
    assert "No difference was found between the 2 methods: all lie between" in page
    assert "3 seeds could only have shown differences above about" in page
    assert not re.search(r"\bequally|are equal\b", page)


def test_one_seed_claims_nothing(make_compare: Make) -> None:
    page = text_of(report(make_compare(["fedavg", "scaffold"], 1)))
    assert "SCAFFOLD is ahead" in page
    assert "one seed cannot show whether that is real" in page
    assert "a real difference" not in page
    assert "1=" not in page


def test_training_alone_wins(make_compare: Make) -> None:
    folder = make_compare(["centralised", "fedavg", "scaffold"], 2)
    for config in folder.glob("centralised-*/config.yaml"):  # the best of them plays Local
        value = yaml.safe_load(config.read_text()) | {"method": "local", "label": "local"}
        config.write_text(yaml.safe_dump(value))
    page = text_of(report(folder))
    assert "Training alone wins: no federated method beats the" in page
    assert re.search(
        r"and the best, SCAFFOLD, is [\d.]+ points worse, (a real difference|which may be chance) \(p", page
    )


def test_a_tie_of_two_over_a_third(make_compare: Make) -> None:
    facts = gather(make_compare(["fedavg", "fedprox", "local"], 5))
    local = facts.references[0]
    local.reference, local.slot = "", 2
    facts.ranked.append(facts.references.pop())
    from consilience.measure.statistics import compare_scores

    object.__setattr__(facts, "comparison", compare_scores({e.label: e.scores for e in facts.ranked}))
    said = answer.first(facts).replace("\u00a0", " ")
    assert re.match(r"<b>Fed\w+ and Fed\w+ win</b>: the average client gets [\d.]+ and [\d.]+ % right, at least", said)
    assert "between the two none was found (p ≥ " in said


def test_a_leader_that_one_other_method_cannot_be_told_from(tmp_path: Path, add_run: Make) -> None:
    noise = {"a": (0, 1, -1, 0, 0.5), "b": (20, -20, 15, -15, 0), "c": (0.2, 0.8, -1.1, 0.1, 0.4)}
    level = {"a": 0.900, "b": 0.895, "c": 0.880}
    for label, of in noise.items():
        for seed, d in enumerate(of):
            add_run(tmp_path / f"{label}-seed{seed}", "fedavg", seed, label=label, final=level[label] + d / 1000)
    page = text_of(report(tmp_path))
    assert re.search(r"a leads: with it the global model gets 90.0 % right, more than with c, a real difference", page)
    assert "between it and b none was found." in page
    assert "a and b share first place; c is last" in page


def test_a_single_run_has_no_ranks(make_run: Make) -> None:
    page = report(make_run("fedavg"))
    assert "How well does FedAvg do for these 20 clients?" in page
    assert 'id="leaderboard"' not in page
    assert "Local was not among the methods" in page
    assert "If something else matters more" not in page


def test_local_by_itself_does_not_miss_local(make_run: Make) -> None:
    page = report(make_run("local"))
    assert "How well does Local do for these 20 clients?" in page
    assert "Local was not among the methods" not in page


def test_joining_pays(make_compare: Make) -> None:
    page = text_of(report(make_compare(["local", "fedavg"], 5)))
    assert "Does joining pay for these 20 clients?" in page
    assert "Joining pays: with FedAvg the average client gets" in page


def test_joining_is_not_said_to_pay_on_one_seed(make_compare: Make) -> None:
    page = text_of(report(make_compare(["local", "fedavg"], 1)))
    assert "FedAvg is ahead of training alone: with FedAvg" in page
    assert "but one seed cannot show whether that is real" in page


def test_regression_speaks_of_loss(make_compare: Make) -> None:
    page = report(make_compare(["fedavg", "scaffold"], 3, regression=True))
    assert "SCAFFOLD wins" in text_of(page)
    assert "has a loss of 0." in text_of(page)
    assert "% right" not in text_of(page)


def test_no_interval_leaves_the_possible_range(make_compare: Make) -> None:
    folder = make_compare(["fedavg", "scaffold"], 2)
    for seed, score in enumerate((0.91, 0.99)):
        history = folder / f"scaffold-seed{seed}" / "history.jsonl"
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        lines[-1]["global"]["accuracy"] = score
        history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = leaderboard(read_runs(folder))[0]
    assert best["accuracy_ci"] == [pytest.approx(t_interval([0.91, 0.99])[0]), 1.0]
    page = report(folder)
    assert f'95.0 <span class="ci">{100 * best["accuracy_ci"][0]:.1f}…100.0</span>' in page
    board = page[page.index('<table class="lb') : page.index("</table>")]
    assert all(
        float(n) <= 100 for n in re.findall(r'<span(?: class=wide)? style="left:[\d.]+%">(-?[\d.]+)</span>', board)
    )
    assert "±" in board  # beside the other method, whose interval fits


def test_names_are_escaped(make_run: Make) -> None:
    folder = make_run("fedavg")
    federation = json.loads((folder / "federation.json").read_text())
    federation["name"] = "<b>&</script><script>alert(1)"
    federation["classes"][0] = "</script><script>alert(1)"
    (folder / "federation.json").write_text(json.dumps(federation))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"label": '<i a="b">', "command": "consilience run 'a <b>' \"unclosed"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = report(folder)
    assert "<script>alert" not in page
    assert "<i a=" not in page
    assert page.count("</script>") == 3
    blob(page)


def test_unfinished_runs_are_named(make_run: Make) -> None:
    folder = make_run("fedavg", finished=False, rounds=34)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"rounds": 50}))
    page = text_of(report(folder))
    assert "FedAvg, seed 0, is not finished: round 34 of 50." in page
    assert "No run is finished yet" in page


def test_a_run_that_has_not_ended_is_not_called_cheap(make_compare: Make, add_run: Make) -> None:
    folder = make_compare(["fedavg", "scaffold"], 1)
    add_run(folder / "fedprox-seed0", "fedprox", 0, rounds=5, finished=False)
    facts = gather(folder)
    assert {p.entry.name for p in answer.picks(facts) if p.aim in ("Traffic", "Time on this machine")} == {"FedAvg"}


def test_a_run_that_diverged_is_left_out_and_named(make_compare: Make) -> None:
    folder = make_compare(["fedavg", "scaffold"], 2, regression=True)
    history = folder / "fedavg-seed1" / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    for line in lines[20:]:
        line["global"]["loss"] = float("nan")
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    assert "FedAvg, seed 1, has no score, or one that is not a number" in text_of(page)
    blob(page)


def test_curves_are_thinned_and_the_page_stays_small(make_run: Make) -> None:
    page = report(make_run("fedavg", rounds=1500))
    curves = blob(page)["curves"]
    assert isinstance(curves, dict)
    curve = curves["of"]["global"]["fedavg"]
    assert len(curve["round"]) == 200
    assert (curve["round"][0], curve["round"][-1]) == (0, 1500)
    assert len(page) < 300_000


def test_without_client_evaluations_the_section_says_what_to_add(make_run: Make) -> None:
    folder = make_run("fedavg")
    (folder / "clients.jsonl").unlink()
    page = text_of(report(folder))
    assert "No client was evaluated. Lower --eval-clients-every" in page


def test_a_federation_too_large_to_draw_is_not_drawn(make_run: Make) -> None:
    folder = make_run("fedavg")
    about = json.loads((folder / "federation.json").read_text())
    few = {key: value for key, value in about.items() if key not in ("sizes", "counts")}
    (folder / "federation.json").write_text(json.dumps(few))
    page = report(folder)
    assert 'id="clients"' in page
    assert 'id="federation"' not in page
    assert blob(page)["federation"] == []


def test_an_old_report_survives_a_failure(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run("fedavg")
    target = write_report(folder)
    before = target.read_text()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert target.read_text() == before
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"]


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def browse(page: Path, profile: Path, width: int, theme: str, *more: str) -> tuple[str, str]:
    """The page as Chromium has it after its script ran, and what it complained about."""
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", f"--window-size={width},2000", "--enable-logging=stderr", "--dump-dom"),
            *more,
            f"{page.as_uri()}?theme={theme}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    return done.stdout, "\n".join(line for line in lines if "CONSOLE" in line or "uncaught" in line.lower())


USE = """<script>addEventListener('load', () => {
const all = s => [...document.querySelectorAll(s)], told = [];
all('fieldset input').forEach(i => i.click());
all('#bands').forEach(i => { i.click(); i.click(); });
all('.railkey [data-keys] button').forEach(b => { b.click(); b.focus(); });
told.push(document.querySelector('#cv').textContent);
all('.quick button').forEach(b => b.click());
told.push(all('#cv .series').length);
all('#strip [data-k]')[3].dispatchEvent(new MouseEvent('click', {bubbles: true}));
told.push(all('#strip circle[r="6.5"]').length);
document.querySelector('.lb .c4 button').click();
told.push(all('.lb tbody:nth-of-type(1) .c4').map(c => +c.dataset.v));
document.querySelector('.lb .c4 button').click();
told.push(all('.lb tbody:nth-of-type(1) .c4').map(c => +c.dataset.v));
const slider = document.querySelector('#cvr'); slider.value = 40; slider.dispatchEvent(new Event('input'));
told.push(document.querySelector('#cvo').textContent);
dispatchEvent(new Event('beforeprint')); told.push(document.querySelector('#cv svg').getAttribute('viewBox'));
dispatchEvent(new Event('afterprint'));
const theme = document.querySelector('#theme'); theme.value = 'light'; theme.dispatchEvent(new Event('change'));
told.push(getComputedStyle(document.body).backgroundColor);
document.title = JSON.stringify(told);
});</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
def test_controls_work_in_chromium(make_compare: Make, tmp_path: Path) -> None:
    page = write_report(make_compare(["local", "fedavg", "scaffold", "fedprox"], 2))
    used = page.with_name("used.html")
    used.write_text(page.read_text("utf-8").replace("</body>", USE), "utf-8")
    dom, complaints = browse(used, tmp_path / "profile", 1400, "dark")
    assert complaints == ""
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title
    nothing, series, traced, up, down, read, view, background = json.loads(unescape(title[1]))
    assert "None of the methods shown" in nothing
    assert series > 0
    assert traced == 3  # one ring for every method that the chart shows
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert up != down
    assert read.startswith("at ")
    assert view.startswith("0 0 680 ")
    assert background == "rgb(255, 255, 255)"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
@pytest.mark.parametrize(("width", "theme"), [(1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")])
@pytest.mark.parametrize(
    ("methods", "seeds", "options"),
    [
        (["local", "fedavg", "scaffold", "fedprox", "centralised"], 2, {}),
        (["fedavg", "scaffold"], 2, {"regression": True}),
        (["fedavg"], 1, {}),
    ],
)
def test_chromium_draws_it_without_an_error(
    make_compare: Make,
    tmp_path: Path,
    methods: list[str],
    seeds: int,
    options: dict[str, bool],
    width: int,
    theme: str,
) -> None:
    page = write_report(make_compare(methods, seeds, **options))
    dom, complaints = browse(page, tmp_path / "profile", width, theme)
    assert complaints == ""
    assert f'data-theme="{theme}"' in dom
    for plot in ("cv", "strip", "fed"):
        drawn = re.search(rf'id="{plot}"[^>]*><svg [^>]*role="img" aria-label="([^"]+)"', dom)
        assert drawn, plot
        assert "NaN" not in drawn[1]
    assert not re.search(r'(?:x|y|d|cx|cy|width|height|x1|y2|transform)="[^"]*(NaN|undefined|Infinity)', dom)


MEASURE = """<script>addEventListener('load', () => {
const W = document.documentElement.clientWidth, scrolls = '.scroll,pre,.opts,svg,.sr,details:not([open])';
const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest(scrolls) && e.getBoundingClientRect().right > W + 1);
parent.postMessage(JSON.stringify([W, document.documentElement.scrollWidth, wide.map(e => e.tagName + '.' + e.className)]), '*');
});</script></body>"""  # noqa: E501
FRAME = "<script>addEventListener('message', e => { document.title = e.data; })</script><iframe src='%s' width='%d'>"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [360, 400, 800, 1400])
def test_nothing_is_wider_than_the_window(make_compare: Make, tmp_path: Path, width: int) -> None:
    """In a frame, since Chromium's own windows have a least width."""
    folder = make_compare(["local", "fedavg", "scaffold", "fedprox", "centralised"], 2)
    for file in folder.glob("*/config.yaml"):
        config = yaml.safe_load(file.read_text())
        config["versions"]["platform"] = "Linux-6.18.44-some-name-of-a-kernel-x86_64-with-glibc2.36"
        file.write_text(yaml.safe_dump(config))
    page = write_report(folder)
    (folder / "inner.html").write_text(page.read_text("utf-8").replace("</body>", MEASURE), "utf-8")
    (folder / "outer.html").write_text(FRAME % ("inner.html", width))
    dom, _ = browse(folder / "outer.html", tmp_path / "profile", 1500, "light", "--virtual-time-budget=5000")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title
    inside, needed, wide = json.loads(unescape(title[1]))
    assert inside > width - 20  # beside a scroll bar
    assert (needed, wide) == (inside, [])


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
def test_chromium_draws_what_a_real_comparison_wrote(tmp_path: Path) -> None:
    """The folders above are fabricated; this one is as the command leaves it."""
    command = [sys.executable, "-m", "consilience.cli", "compare", "local", "scaffold", "--data", "digits"]
    command += ["--model", "mlp:16", "--partition", "dirichlet:0.3", "--rounds", "4", "--eval-clients-every", "2"]
    done = subprocess.run(
        [*command, "--seeds", "2", "--workers", "2", "--out", "real"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dom, complaints = browse(tmp_path / "real" / "report.html", tmp_path / "profile", 1400, "light")
    assert complaints == ""
    for plot in ("cv", "strip", "fed"):
        drawn = re.search(rf'id="{plot}"[^>]*><svg [^>]*role="img" aria-label="([^"]+)"', dom)
        assert drawn, plot
        assert "NaN" not in drawn[1]
    page = text_of(dom)
    assert "SCAFFOLD" in page
    assert "Dirichlet" in page or "dirichlet:0.3" in page
    best = json.loads((tmp_path / "real" / "leaderboard.json").read_text())[0]
    assert f"{100 * best['accuracy']:.1f}" in page


def with_validation(folder: Path) -> Path:
    """The comparison with validation scores that are best at round 20."""
    for path in folder.glob("*/history.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "clients" in line:
                line["clients"]["valid"] = {"mean": 1 - abs(line["round"] - 20) / 100}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_the_round_that_is_best_on_validation_data(make_compare: Make) -> None:
    folder = make_compare(["fedavg", "scaffold"], 2)
    assert 'data-state="pick"' not in write_report(folder).read_text()
    with_validation(folder)
    found = curves_blob(gather(folder))
    of, best = found["of"]["mean"]["fedavg"], found["best"]["mean"]["fedavg"]
    at = of["round"].index(20)
    assert best["round"] == of["round"]
    assert best["y"][: at + 1] == of["y"][: at + 1]
    assert set(best["y"][at:]) == {of["y"][at]}
    assert 'data-state="pick"' in write_report(folder).read_text()
    row = next(r for r in board(read_runs(folder)) if r["method"] == "fedavg")
    assert row["best_rounds"] == [20, 20]
    lines = [run.history[20]["global"]["accuracy"] for run in read_runs(folder) if run.label == "fedavg"]
    assert row["best_accuracy"] == pytest.approx(sum(lines) / 2)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
def test_the_switch_to_the_best_round(make_compare: Make, tmp_path: Path) -> None:
    page = write_report(with_validation(make_compare(["fedavg", "scaffold"], 2)))
    script = """<script>addEventListener('load', () => {
    const told = [document.querySelector('#cv-t').textContent, document.querySelector('#cv svg').outerHTML];
    document.querySelector('[data-state=pick] input[value=best]').click();
    told.push(document.querySelector('#cv-t').textContent, document.querySelector('#cv svg').outerHTML);
    const strip = () => document.querySelector('#strip svg').getAttribute('aria-label');
    const least = strip(), radio = document.querySelector('[data-state=who] input');
    radio.focus();
    told.push(document.activeElement === radio);
    document.querySelector('[data-state=who] input[value=best]').click();
    document.title = JSON.stringify([told[0], told[2], told[1] === told[3], told[4], least, strip()]);
    });</script></body>"""
    used = page.with_name("used.html")
    used.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    dom, complaints = browse(used, tmp_path / "profile", 1400, "light")
    assert complaints == ""
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title
    before, after, same, focusable, last, best = json.loads(unescape(title[1]))
    assert after == f"{before}, of the round best on validation data so far"
    assert not same
    assert focusable
    assert "at the round best on validation data" in best
    assert last.partition("ation data. ")[2] != best.partition("ation data. ")[2]
    assert "validation" not in last


def test_clients_and_tables_of_the_best_round(make_compare: Make) -> None:
    folder = with_validation(make_compare(["local", "fedavg", "scaffold"], 2))
    page = report(folder)
    facts = gather(folder)
    strip = blob(page)["strip"]
    assert isinstance(strip, dict)
    runs = {(run.label, run.seed): run for run in read_runs(folder)}

    def score(label: str, seed: int, client: int) -> float:
        lines = runs[label, seed].clients
        return next(of["accuracy"] for of in lines if (of["round"], of["client"]) == (20, client))

    for seed, client, gained in strip["best"]["fedavg"]:
        assert gained == pytest.approx(100 * (score("fedavg", seed, client) - score("local", seed, client)), rel=1e-4)
    assert strip["best"]["fedavg"] != strip["dots"]["fedavg"]
    assert 'data-state="who"' in page
    text = text_of(page)
    assert "Scores at the round best on validation data" in text
    row = next(r for r in board(read_runs(folder)) if r["method"] == "fedavg")
    entry = next(e for e in facts.entries if e.label == "fedavg")
    best, last, ahead, chosen, seeds = (cell.html for cell in _cells(facts, entry))
    assert best.startswith(f"{100 * row['best_accuracy']:.1f} <span")
    assert last == f"{100 * entry.mean:.1f}"
    assert ahead == facts.scale.signed(row["best_accuracy"] - entry.mean)
    assert (chosen, seeds) == ("round 20", "2 seeds")
    assert all(f">{html}<" in page for html in (best, last, chosen))


def test_the_table_of_curves_says_which_round_is_best(make_compare: Make) -> None:
    folder = with_validation(make_compare(["fedavg", "scaffold"], 2))
    points = curve(gather(folder).best, ("clients", "mean"), best=True)
    assert [(p.round, p.shown) for p in points] == [
        (0, (0, 0)),
        (10, (10, 10)),
        *((r, (20, 20)) for r in (20, 30, 40, 50)),
    ]
    assert '<br><span class="ci">round 20</span>' in report(folder)
