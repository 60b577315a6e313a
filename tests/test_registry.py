"""Look-ups by name, registration, and what happens when a module is broken."""

import pytest

from dnr_recbole import registry
from dnr_recbole.errors import UnknownNameError
from dnr_recbole.registry import ModelInfo, get_reranker, get_retriever, list_models


@pytest.fixture
def scratch(monkeypatch):
    """Registrations inside a test do not outlive it."""
    list_models()
    for name in ("_rerankers", "_retrievers", "_broken"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def test_every_model_module_can_be_imported():
    list_models()
    assert registry._broken == {}


def test_list_models():
    everything = list_models()
    assert all(isinstance(info, ModelInfo) for info in everything)
    assert [info.kind for info in everything] == sorted(info.kind for info in everything)
    names = [info.name for info in list_models("reranker")]
    assert {"PRM", "DNR"} <= set(names) and names == sorted(names, key=str.lower)
    assert {"MF", "DualTower"} <= {info.name for info in list_models("retriever")}
    for info in everything:
        assert info.paper and info.family and info.cls.__name__ == info.name
    with pytest.raises(ValueError, match="'reranker' or 'retriever'"):
        list_models("ranker")


def test_names_in_any_case():
    assert get_reranker("prm") is get_reranker("PRM")
    assert get_retriever("mf").__name__ == "MF"


@pytest.mark.parametrize("name", ["BPR", "lightgcn", "ease", "ItemKNN", "pop", "slimelastic", "MULTIVAE"])
def test_recbole_general_recommenders(name):
    cls = get_retriever(name)
    assert cls.__name__.lower() == name.lower() and cls.__module__.startswith("recbole.model.general_recommender")


def test_every_recbole_module_holds_a_class_of_its_name():
    assert len(registry.recbole_retrievers()) > 30 and "bpr" in registry.recbole_retrievers()


@pytest.mark.parametrize("name", ["FM", "SASRec", "KGAT", "bpr.py", "", "../bpr"])
def test_other_families_are_no_retrievers(name):
    with pytest.raises(UnknownNameError):
        get_retriever(name)


def test_unknown_names_get_a_hint():
    with pytest.raises(UnknownNameError, match="did you mean .*PRM"):
        get_reranker("PRMM")
    with pytest.raises(UnknownNameError, match="known: .*PRM") as caught:
        get_reranker("zzzzzz")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_registering(scratch):
    @registry.register_reranker
    class Mine:
        family, paper = "mine", "unpublished"

    assert get_reranker("mine") is Mine
    assert ModelInfo("Mine", "reranker", "mine", "unpublished", Mine) in list_models()
    assert registry.register_reranker(Mine) is Mine  # a reload

    other = type("MINE", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="'MINE' of elsewhere is taken"):
        registry.register_reranker(other)


def test_own_retriever_wins_over_recbole(scratch):
    @registry.register_retriever
    class BPR:
        pass

    assert get_retriever("bpr") is BPR


def test_one_broken_module_leaves_the_others(scratch, monkeypatch):
    imported = registry.importlib.import_module

    def import_module(name, *args):
        if name == "dnr_recbole.model.reranker.prm":
            raise ImportError("No module named 'optional'")
        return imported(name, *args)

    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry.importlib, "import_module", import_module)
    with pytest.warns(UserWarning, match="reranker.prm are not available: ImportError: No module named 'optional'"):
        assert "MF" in {info.name for info in list_models()}
    with pytest.raises(UnknownNameError, match=r"not importable: dnr_recbole\.model\.reranker\.prm: ImportError"):
        get_reranker("zzzzzz")
