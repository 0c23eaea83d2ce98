"""What papers claim of their methods, beside FedAvg and SCAFFOLD on the skew each was made for.

    python -m benchmarks.reproduction            every row that is not complete yet, then the table
    python -m benchmarks.reproduction fednova    these rows
    python -m benchmarks.reproduction --table    the table as Markdown, of the results that there are

From the repository's folder. Fashion-MNIST (apt install dataset-fashion-mnist) and Adult, three seeds, 40 rounds. Every
method has four trials of 15 rounds on another seed, judged on validation rows, for lr and one parameter of its own; all
try the same lr.
What is done is kept in ``results``, one file for each method and setting, with date and versions; what was interrupted
goes on. Several processes may work beside one another. A claim that did not hold stays in the table.
"""

from __future__ import annotations

import argparse

from benchmarks.reproduction.rows import ROWS
from benchmarks.reproduction.run import work
from benchmarks.reproduction.table import table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--table", action="store_true", help="print what there is")
    given = parser.parse_args()
    unknown = set(given.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(row.name for row in ROWS)}")
    if not given.table:
        work(given.rows)
    print(table())


if __name__ == "__main__":
    main()
