"""The names of the columns that a request log may have; everything else is a score or a feature."""

REQUEST, USER, ITEM, LABEL, TIME, SPLIT, HISTORY = (
    "request_id", "user_id", "item_id", "label", "timestamp", "split", "history",
)  # fmt: skip
SHOWN, PLACE, PROPENSITY, ITEMS = "exposed", "position", "propensity", "items"
EXAMINATION, INTENDED, RANDOMISED = "examination", "intended_position", "randomised"
PER_REQUEST = (REQUEST, USER, TIME, SPLIT, HISTORY)
KNOWN = (*PER_REQUEST, ITEM, LABEL, SHOWN, PLACE, PROPENSITY, EXAMINATION, INTENDED, RANDOMISED)
