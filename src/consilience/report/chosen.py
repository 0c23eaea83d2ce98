"""Scores at the rounds that are best on validation data, beside those of the last round."""

from __future__ import annotations

from statistics import fmean

from consilience.measure.best import best_scores
from consilience.measure.statistics import mean_interval
from consilience.report.blob import judged_on_validation
from consilience.report.facts import Entry, Facts
from consilience.report.markup import Cell, Column, details, named, note, table
from consilience.report.words import NONE, plural, rounds_of


def chosen_table(facts: Facts) -> str:
    """A row a method; nothing where no run was judged on validation data more than once."""
    if not judged_on_validation(facts):
        return ""
    scale = facts.scale
    columns = [Column("Method"), Column("Best", scale.unit, facts.lower), Column("Last", scale.unit, facts.lower)]
    columns += [Column("Best over last", scale.points), Column("Chosen", "", True), Column("Seeds")]
    what = f"{scale.noun.capitalize()} at the round that is best on validation data."
    shown = table(what, what, columns, [(named(e), _cells(facts, e)) for e in facts.entries])
    text = (
        "A run's best round is the judged one with the "
        f"{'lowest' if facts.lower else 'highest'} mean {scale.noun} on the validation rows of the clients that take "
        "part in training, the earliest of equals. Test rows have no say in it, and ranks and tests are of the last "
        "round. Both scores are means over the seeds that have a best round."
    )
    return details("Scores at the round best on validation data", shown + note(text))


def _cells(facts: Facts, entry: Entry) -> list[Cell]:
    found = best_scores(entry.runs, facts.metric, lower=facts.lower)
    if not found:
        return [Cell(NONE, "")] * 5
    scale, scores, rounds = facts.scale, [b.score for b in found.values()], [b.round for b in found.values()]
    mean, last = fmean(scores), fmean(entry.scores[seed] for seed in found)
    interval = mean_interval(scores, share=not facts.lower)
    beside = f' <span class="ci">{scale.beside(mean, *interval)}</span>' if interval else ""
    ahead = facts.ahead(mean, last)
    return [
        Cell(scale.number(mean) + beside, mean),
        Cell(scale.number(last), last),
        Cell(scale.signed(ahead), ahead),
        Cell(rounds_of(min(rounds), max(rounds)), fmean(rounds)),
        Cell(plural(len(found), "seed"), len(found)),
    ]
