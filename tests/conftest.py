"""What holds for every test."""

import os

for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):  # read when torch is loaded
    if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core
        os.environ.setdefault(name, value)

import pytest  # noqa: E402

from dnr_recbole import names, registry  # noqa: E402


@pytest.fixture(autouse=True)
def what_is_registered_stays():
    """A model, a noise, … that a test registers is gone after it: other tests go over all that is registered."""
    registry.list_models()  # loads the package's own
    kept = [(table, dict(table)) for table in (registry._rerankers, registry._retrievers)]
    yield
    for table, models in kept:
        table.clear()
        table.update(models)
    for table in names.registries():
        for name in [name for name, thing in table.items() if names.is_foreign(thing)]:
            del table[name]
