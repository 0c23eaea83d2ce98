"""`consilience profile` as a user has it, and its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import here

WIDE = {"COLUMNS": "100"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile of clients in two groups, and what was printed."""
    where = tmp_path_factory.mktemp("profile")
    done = here("profile", "--partition", "permute:2", "--clients", "6", "--out", "one", cwd=where, env=WIDE)
    assert done.returncode == 0, done.stderr
    (where / "printed").write_text(done.stdout)
    return where


def test_the_fleet_is_part_of_it(tmp_path: Path) -> None:
    fleet = ["--fleet", "phones", "--availability", "bernoulli:0.25", "--clients", "4", "--out", "one"]
    done = here("profile", *fleet, "--json", cwd=tmp_path, env=WIDE)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["fleet"]}
    assert rows["online"]["least"] == rows["online"]["most"] == 0.25
    assert 0 < rows["upload"]["least"] <= rows["upload"]["median"] <= rows["upload"]["most"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert 'id="devices"' in page


def test_what_is_printed(place: Path) -> None:
    printed = (place / "printed").read_text()
    assert printed.startswith("Concept shift sets these 6 clients apart most")
    assert "They fall into 2 groups (3 and 3 clients)" in printed
    for title in ("Label skew", "Feature skew", "Input skew", "Concept shift", "Total", "Quantity skew", "Limits"):
        assert title in printed
    assert "Label skew and feature skew add up to the total" in printed
    assert "report: one/report.html" in printed


def test_json_has_the_keys_that_scripts_rely_on(place: Path) -> None:
    done = here("profile", "--json", "--clients", "3", "--out", "two", cwd=place, env=WIDE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"bits", "clients", "fleet", "suggestions"} <= found.keys()
    terms = {"label_skew", "feature_skew", "input_skew", "concept_shift", "total", "quantity_skew"}
    assert found["bits"].keys() == terms
    assert all({"value", "low", "high", "max"} <= row.keys() for row in found["bits"].values())
    assert found == json.loads((place / "two" / "profile.json").read_text())
    assert done.stderr == ""


def test_the_partition_is_written_and_gives_the_same_profile(place: Path) -> None:
    done = here("profile", "--json", "--partition", "one/partition.json", "--out", "three", cwd=place, env=WIDE)
    first = json.loads((place / "one" / "profile.json").read_text())
    assert json.loads(done.stdout)["bits"] == first["bits"]


def test_refused_profiles_leave_nothing(place: Path) -> None:
    done = here("profile", "--partition", "permute:99", "--out", "bad", cwd=place, env=WIDE)
    assert done.returncode == 2
    assert done.stderr.startswith("consilience: partition 'permute:99'")
    assert not (place / "bad").exists()
    done = here("profile", "--out", "one", cwd=place, env=WIDE)
    assert done.returncode == 2
    assert done.stderr == "consilience: one is not empty; give another --out\n"


class Balance(HTMLParser):
    """Checks that elements nest and that ids are unique."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(place: Path) -> None:
    page = (place / "one" / "report.html").read_text("utf-8")
    checked = Balance()
    checked.feed(page)
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert not re.search(r"(src|href)=\"(?!#)", page)
    for anchor in ("answer", "bits", "classes", "map", "nearest", "limits", "reproduce"):
        assert f'<section id="{anchor}"' in page
    assert page.count('class="track" role="img" aria-label=') == 6
    assert page.count('class="heat" role="img"') == 1
    assert len(re.findall(r'<i style="background:var\(--r\d\)" title=', page)) == 6 * 10
    assert len(re.findall(r'<span style="left:[\d.]+%;top:[\d.]+%" title="client', page)) == 6
    assert "profile --partition permute:2 --clients 6 --out one" in page


def test_the_page_is_written_anew(place: Path) -> None:
    page = (place / "one" / "report.html").read_bytes()
    (place / "one" / "report.html").unlink()
    done = here("report", "one", cwd=place, env=WIDE)
    assert done.returncode == 0, done.stderr
    assert (place / "one" / "report.html").read_bytes() == page
