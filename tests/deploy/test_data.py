"""Sites' data from files and functions, and what they have together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from consilience.core.errors import DataError
from consilience.core.streams import SERVER
from consilience.data.federation import from_arrays
from consilience.data.preprocess import table_from_frame
from consilience.deploy import data


def frame(rows: int, seed: int, colours: str = "rgb") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": rng.normal(50, 10, rows).round(),
            "colour": rng.choice(list(colours), rows),
            "sex": rng.choice(["f", "m"], rows),
            "label": rng.choice(["no", "yes"], rows),
        }
    )


def loaded(source: str, folder: Path, client: int = 0, **more: Any) -> data.Own:
    return data.load(source, folder, client=client, split=(0.6, 0.2, 0.2), seed=3, **more)


@pytest.fixture
def sites(tmp_path: Path) -> list[data.Own]:
    frames = [frame(40, 0), frame(25, 1, "gb"), frame(30, 2, "xyz")]
    found = []
    for i, table in enumerate(frames):
        (tmp_path / f"s{i}").mkdir()
        table.to_csv(tmp_path / f"s{i}" / "rows.csv", index=False)
        found.append(loaded("rows.csv", tmp_path / f"s{i}", i, sensitive=["sex"]))
    return found


def test_tables_become_the_inputs_that_pooled_rows_would(sites: list[data.Own]) -> None:
    """Means and words come from everybody's training rows, which nobody has together."""
    facts = [json.loads(json.dumps(own.facts())) for own in sites]
    assert all(data.checked(fact, "s") == fact for fact in facts)
    about = data.together(facts, ["s0", "s1", "s2"])
    rows = [own.rows(about) for own in sites]
    pooled = pd.concat([pd.DataFrame(own.x["train"].plain()) for own in sites], ignore_index=True)
    whole = from_arrays(table_from_frame(pooled, "pooled"), np.zeros(len(pooled), int), clients=1,
                        split=(1.0, 0.0, 0.0), test_fraction=0.0, classes=("a", "b"))  # fmt: skip
    expected = whole.rows.x[np.argsort(whole.partition.order)]
    assert torch.allclose(torch.cat([r.train.x for r in rows]), expected, atol=1e-6)
    assert about["classes"] == ["no", "yes"]
    assert about["rows"] == sum(len(r.train) for r in rows) == 57
    assert about["input_shape"] == [1 + 6 + 2]
    assert about["groups"] == {"sex": ["f", "m"]}
    assert [len(part) for part in (rows[0].train, rows[0].valid, rows[0].test)] == [24, 8, 8]


def test_labels_are_numbered_alike_everywhere(tmp_path: Path) -> None:
    """A site may have one class alone."""
    for name, labels in (("a", ["10", "9"]), ("b", ["9", "9"])):
        pd.DataFrame({"v": [1.0, 2.0], "label": labels}).to_csv(tmp_path / f"{name}.csv", index=False)
    owns = [loaded(f"{name}.csv", tmp_path, client=SERVER) for name in "ab"]
    about = data.together([own.facts() for own in owns], ["a", "b"])
    assert about["classes"] == ["9", "10"]
    assert [own.rows(about).test.y.tolist() for own in owns] == [[1, 0], [0, 0]]


def test_functions_of_the_owners(tmp_path: Path) -> None:
    (tmp_path / "mine_of_tests.py").write_text(
        "import numpy as np\nimport pandas as pd\n\n\ndef pair():\n    return np.ones((10, 3)), np.arange(10) % 2\n\n\n"
        "def table():\n    return pd.DataFrame({'a': [1.0, 2.0, 3.0], 'label': ['x', 'y', 'x']})\n\n\n"
        "def parts():\n    x = np.ones((4, 2))\n"
        "    return {'x': x, 'y': np.arange(4) % 2, 'x_test': x[:1], 'y_test': np.array([1])}\n\n\n"
        "def nothing():\n    return None\n\n\ndef wrong():\n    raise ValueError('no')\n"
    )
    assert loaded("mine_of_tests:pair", tmp_path).facts()["rows"] == [6, 2, 2]
    assert sum(loaded("mine_of_tests:table", tmp_path).facts()["rows"]) == 3
    assert loaded("mine_of_tests:parts", tmp_path).facts()["rows"] == [4, 0, 1]
    for name, words in (("nothing", "gave NoneType"), ("wrong", "failed: ValueError"), ("other", "no attribute")):
        with pytest.raises(Exception, match=words):
            loaded(f"mine_of_tests:{name}", tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"rows": [1, 2]}, {"rows": [-1, 0, 0]}, {"rows": [0, 1, 1]}, {"classes": 3}, {"kind": "operator"}, {"more": 1},
     {"statistics": [["age", "x"]]}, {"input_shape": ["8"]}],
)  # fmt: skip
def test_what_sites_tell_is_checked(change: dict[str, Any], sites: list[data.Own]) -> None:
    with pytest.raises(DataError, match="site north"):
        data.checked({**sites[0].facts(), **change}, "north")


def test_sites_that_do_not_fit_together(sites: list[data.Own]) -> None:
    fact = json.loads(json.dumps(sites[0].facts()))
    for change, words in (
        ({"kind": "regression"}, "has a task of regression"),
        ({"statistics": None, "input_shape": [4]}, "has inputs of shape"),
        ({"groups": {}}, "other sensitive columns"),
    ):
        with pytest.raises(DataError, match=words):
            data.together([fact, {**fact, **change}], ["a", "b"])
