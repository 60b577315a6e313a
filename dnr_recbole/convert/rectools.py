"""RecTools: a table of recommendations and one of interactions that were held out."""

from __future__ import annotations

from dnr_recbole.convert.recommendations import flat_lists, label_lists, positives_of
from dnr_recbole.convert.registry import converter
from dnr_recbole.convert.tables import ROW, Source
from dnr_recbole.errors import DataError


@converter("rectools", "RECOMMENDATIONS INTERACTIONS", least=2, most=2)
def rectools(inputs, options, counts):
    """A user's recommendations are a request; what he interacted with in the second table is positive, whatever the
    weight. The second table is held in memory."""
    recommended, held_out = map(Source, inputs)
    recommended.need(["user_id", "item_id"])
    if not {"score", "rank"} & set(recommended.names):
        raise DataError(f"'{recommended.path}' has neither score nor rank: there is no incoming order")
    left = [name for name in held_out.names if name not in ("user_id", "item_id")]
    if left:
        counts.note(f"columns left out of the interactions: {', '.join(left)}")
    lists = flat_lists(recommended, "user_id", counts)
    truth = positives_of(held_out, "user_id", counts)
    yield from label_lists(lists, truth, counts, lambda group: recommended.place(group[ROW][0]))
