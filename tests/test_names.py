"""Registries that plugins add to, the keys that read them, and what a changed plugin does to identities."""

import importlib

import pytest

from dnr_recbole import names
from dnr_recbole.config import Config
from dnr_recbole.config_schema import load_properties, properties_dir
from dnr_recbole.dnr.noises import NOISES
from dnr_recbole.errors import ConfigError, UnknownNameError
from dnr_recbole.identity import identity
from dnr_recbole.names import Names, added, foreign, import_plugins

# Choices that stand for "no such thing", or for what is no function of its own.
WITHOUT_A_THING = {
    "propensity": {"none", "column"},
    "score_calibration": {"none"},
    "split": {"last"},
    "synthetic_clicks": {"none"},
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """write(code) -> the module ``plugin_of_names`` in the working directory, ready to be named by ``plugins``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> str:
        (tmp_path / "plugin_of_names.py").write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        return "plugin_of_names"

    yield write
    names.sys.modules.pop("plugin_of_names", None)


NOISE = """
from dnr_recbole.dnr.noises import Noise, register_noise

@register_noise("halves")
class Halves(Noise):
    def draw(self, slate):
        return slate.all_logged_scores / 2
"""


def test_a_name_is_taken_once_and_a_reload_is_no_second_time():
    things = Names("thing")
    first, again = type("A", (), {"__module__": "mine"}), type("A", (), {"__module__": "mine"})
    assert things.register("a")(first) is first and things.register("a")(again) is again
    with pytest.raises(ValueError, match="thing 'a' of theirs is taken by one of mine"):
        things.register("a")(type("A", (), {"__module__": "theirs"}))
    assert things.find("a") is again
    with pytest.raises(UnknownNameError, match="thing 'b' is unknown; choose one of a, or name the module"):
        things.find("b")


def open_keys():
    for file in sorted(properties_dir().rglob("*.yaml")):
        if file.name != "recbole.yaml":
            for name, key in load_properties(file, "process").keys.items():
                if key.open:
                    yield pytest.param(name, key, id=name)


@pytest.mark.parametrize("name, key", list(open_keys()))
def test_the_choices_of_an_open_key_are_what_this_package_registers(name, key):
    import dnr_recbole.data.candidates  # noqa: F401  (each registers its own)
    import dnr_recbole.sources.log  # noqa: F401
    import dnr_recbole.sources.recbole  # noqa: F401
    import dnr_recbole.sources.synthetic  # noqa: F401

    registered = {thing for registry in names._of_key[name] for thing in registry}
    assert set(key.choices) == registered | WITHOUT_A_THING.get(name, set())


def test_a_plugin_opens_a_key(plugin):
    with pytest.raises(ConfigError, match="noise_type='halves' .*: must be one of gaussian, .*, residual"):
        Config("DNR", "synthetic", config_dict={"noise_type": "halves"})
    keys = {"noise_type": "Halves", "plugins": [plugin(NOISE)]}
    assert Config("DNR", "synthetic", config_dict=keys)["noise_type"] == "halves"
    assert added("noise_type") == ["halves"] and set(foreign("noise_type", "halves")) == {"halves"}
    assert not foreign("noise_type", "beta")
    with pytest.raises(ConfigError, match="noise_type='third' .*: must be one of .*, halves"):
        Config("DNR", "synthetic", config_dict={**keys, "noise_type": "third"})


def test_a_plugin_that_changes_changes_the_identity_of_what_used_it(plugin):
    def stages(code, **keys):
        NOISES.pop("halves", None)
        names.sys.modules.pop("plugin_of_names", None)
        config = Config("DNR", "synthetic", config_dict={"plugins": [plugin(code)], **keys})
        return identity(config, "evaluation")

    used = [stages(code, noise_type="halves") for code in (NOISE, NOISE, NOISE.replace("/ 2", "/ 3"))]
    assert used[0] == used[1] and list(used[0]["reranker"]["code"]) == ["noise_type=halves"]
    assert used[0]["reranker"] != used[2]["reranker"] and used[0]["candidates"] == used[2]["candidates"]
    unused = [stages(code) for code in (NOISE, NOISE.replace("/ 2", "/ 3"))]
    assert unused[0] == unused[1] and "code" not in unused[0]["reranker"]


def test_a_plugin_defines_keys(plugin, tmp_path):
    (tmp_path / "mine.yaml").write_text("part: {default: 2, type: int, min: 1, scope: reranker, help: a part}\n")
    module = plugin('properties_file = "mine.yaml"\n' + NOISE)
    assert Config("DNR", "synthetic", config_dict={"plugins": [module]})["part"] == 2
    with pytest.raises(ConfigError, match="part=0 .*: must be an integer >= 1"):
        Config("DNR", "synthetic", config_dict={"plugins": [module], "part": 0})
    given = identity(Config("DNR", "synthetic", argv=[f"--plugins={module}", "--part=3"]), "reranker")
    assert given["reranker"]["keys"]["part"] == 3


def test_a_plugin_that_is_not_there(plugin):
    with pytest.raises(ConfigError, match="plugins: module 'nowhere_at_all' cannot be imported"):
        import_plugins("nowhere_at_all")
    module = plugin('properties_file = "absent.yaml"\n')
    with pytest.raises(ConfigError, match="absent.yaml' cannot be read"):
        Config("PRM", "synthetic", config_dict={"plugins": [module]})
