"""Each training has a run in W&B or MLflow, in the first process only, and it ends as the training did."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
from toy_run import toy_keys

from dnr_recbole import compat
from dnr_recbole.config import Config
from dnr_recbole.errors import ConfigError
from dnr_recbole.quick_start import run_dnr
from dnr_recbole.trackers import Trackers

TRAIN_BATCH = "dnr_recbole.trainer.rerank_trainer.RerankTrainer._train_batch"


@pytest.fixture
def keys(tmp_path, monkeypatch):
    yield from toy_keys(tmp_path, monkeypatch)


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


# ---------------------------------------------------------------------- Weights & Biases


class FakeWandb(types.ModuleType):
    """What RecBole and the package call of `wandb`; ``begun`` lists its runs."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run, self.begun, self.refusal = None, [], None

    def init(self, **given):
        if self.refusal:
            raise self.Error(self.refusal)
        self.run = types.SimpleNamespace(given=given, summary={}, logged=[], finish=self.finish, code=None)
        self.begun.append(self.run)
        return self.run

    def finish(self, exit_code=None):
        self.run.code, self.run = exit_code, None

    def define_metric(self, name, step_metric):
        assert self.run is not None

    def log(self, metrics, commit=True):
        self.run.logged.append(metrics)


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_each_training_has_a_wandb_run_below_log_dir(keys, wandb, tmp_path):
    result = run_dnr(config_dict={**keys, "log_wandb": True, "wandb_project": "lists"})
    assert [run.given["job_type"] for run in wandb.begun] == ["retriever", "reranker"]
    for run in wandb.begun:
        assert (run.given["project"], run.given["dir"], run.code) == ("lists", str(tmp_path / "log_dir"), 0)
        assert any("train/train_loss" in metrics for metrics in run.logged)
    assert wandb.begun[1].given["config"]["embedding_size"] == 8
    assert wandb.begun[1].summary == {f"eval/{name}": value for name, value in result["test_result"].items()}

    run_dnr(config_dict={**keys, "log_wandb": True, "init_seed": 5})
    assert [run.given["job_type"] for run in wandb.begun[2:]] == ["reranker"], "stage 1 came from the cache"


def test_a_wandb_run_of_the_caller_is_used_and_left_open(keys, wandb):
    own = wandb.init(project="own")
    run_dnr(config_dict={**keys, "log_wandb": True})
    assert wandb.begun == [own] and wandb.run is own and own.logged


def test_a_training_that_fails_ends_its_wandb_run(keys, wandb, monkeypatch):
    monkeypatch.setattr(TRAIN_BATCH, raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_dnr(config_dict={**keys, "log_wandb": True})
    assert [run.code for run in wandb.begun] == [0, 1] and wandb.run is None


def test_processes_other_than_the_first_begin_no_wandb_run(keys, wandb):
    config = Config(config_dict={**keys, "log_wandb": True})
    config["rank"] = 1
    with Trackers(config) as trackers:
        trackers.log_metrics({"train_loss": 1.0, "train_step": 0})
    assert wandb.begun == []


def test_wandb_without_a_login_is_one_line(keys, wandb):
    wandb.refusal = "No API key configured.\nUse `wandb login`."
    with pytest.raises(ConfigError, match=r"^log_wandb=True: No API key configured. Use `wandb login`.$"):
        run_dnr(config_dict={**keys, "log_wandb": True})


def test_wandb_itself_without_a_network(keys, monkeypatch, tmp_path):
    """The real package: its files lie below log_dir, and nothing is asked for."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path / "c"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "d"))
    run_dnr(config_dict={**keys, "log_wandb": True})
    found = list((tmp_path / "log_dir" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 2 and all(path.stat().st_size > 0 for path in found)
    import wandb

    assert wandb.run is None


# ---------------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(monkeypatch):
    package = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return package


def runs(mlflow, uri, experiment="dnr_recbole"):
    """All runs of an experiment by their stage, in the order in which they began."""
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time ASC"])
    return client, [(run.data.tags["stage"], run) for run in found]


def store(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'log_dir' / 'mlflow.db'}"


def test_each_training_has_an_mlflow_run_in_a_store_below_log_dir(keys, mlflow, tmp_path):
    more = {"epochs": 2, "score_fusion": "rank+concat", "mlflow_experiment": "lists"}
    result = run_dnr(config_dict={**keys, **more, "log_mlflow": True})
    client, found = runs(mlflow, store(tmp_path), "lists")
    assert [stage for stage, _ in found] == ["retriever", "reranker"]
    assert all(run.info.status == "FINISHED" for _, run in found)
    reranker = found[1][1]
    params = reranker.data.params
    assert (params["embedding_size"], params["score_fusion"], params["model"]) == ("8", "rank+concat", "PRM")
    assert "mlflow_tracking_uri" not in params and len(params) > 100
    losses = client.get_metric_history(reranker.info.run_id, "train/train_loss")
    assert [metric.step for metric in losses] == [0, 1] and losses[0].value != losses[1].value
    assert len(client.get_metric_history(reranker.info.run_id, "valid/ndcg_at_3")) == 2
    for name, value in result["test_result"].items():
        assert reranker.data.metrics["eval/" + name.replace("@", "_at_")] == pytest.approx(value)
    assert not mlflow.active_run(), "nothing global is left"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), "KILLED"), (RuntimeError("bad"), "FAILED")])
def test_an_mlflow_run_ends_as_the_training_did(keys, mlflow, tmp_path, monkeypatch, error, status):
    monkeypatch.setattr(TRAIN_BATCH, raising(error))
    with pytest.raises(type(error)):
        run_dnr(config_dict={**keys, "log_mlflow": True})
    _, found = runs(mlflow, store(tmp_path))
    assert [run.info.status for _, run in found] == ["FINISHED", status]


def test_an_mlflow_run_of_the_caller_is_used_and_left_open(keys, mlflow, tmp_path):
    uri = f"sqlite:///{tmp_path / 'own.db'}"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("own", artifact_location=(tmp_path / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment) as own:
            run_dnr(config_dict={**keys, "log_mlflow": True})
            assert client.get_run(own.info.run_id).info.status == "RUNNING"
        assert "eval/ndcg_at_3" in client.get_run(own.info.run_id).data.metrics
        assert not (tmp_path / "log_dir" / "mlflow.db").exists()
    finally:
        mlflow.set_tracking_uri(before)


def test_processes_other_than_the_first_begin_no_mlflow_run(keys, mlflow, tmp_path):
    config = Config(config_dict={**keys, "log_mlflow": True})
    config["rank"] = 1
    with Trackers(config) as trackers:
        trackers.log_metrics({"train_loss": 1.0, "train_step": 0})
    assert not (tmp_path / "log_dir" / "mlflow.db").exists()


def test_an_mlflow_server_that_is_not_there_is_one_line(keys, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="^log_mlflow=True: .*127.0.0.1") as error:
        run_dnr(config_dict={**keys, "log_mlflow": True, "mlflow_tracking_uri": "http://127.0.0.1:9"})
    assert "\n" not in str(error.value)


def test_a_store_that_is_lost_later_is_said_once_and_the_training_goes_on(keys, mlflow, tmp_path, monkeypatch, caplog):
    def lost(*arguments, **options):
        raise mlflow.exceptions.MlflowException("the store\nis gone")

    config = Config(config_dict={**keys, "log_mlflow": True})
    with Trackers(config) as trackers:
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", lost)
            for step in range(3):
                trackers.log_metrics({"train_loss": 1.0, "train_step": step})
        trackers.log_eval_metrics({"ndcg@3": 0.5})
    said = [record.message for record in caplog.records if "log_mlflow" in record.message]
    assert said == ["log_mlflow: the store is gone; going on without"]
    assert runs(mlflow, store(tmp_path))[1][0][1].info.status == "FINISHED"


@pytest.mark.parametrize("key, package", [("log_wandb", "wandb"), ("log_mlflow", "mlflow")])
def test_a_missing_package_is_one_line_that_names_the_extra(keys, monkeypatch, key, package):
    found = compat.importlib.util.find_spec
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(
        ConfigError, match=rf"^{key}=True needs .*not installed: pip install 'dnr_recbole\[{package}\]'$"
    ):
        run_dnr(config_dict={**keys, key: True})


def test_the_first_tracker_ends_if_the_second_cannot_begin(keys, wandb, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    both = {"log_wandb": True, "log_mlflow": True, "mlflow_tracking_uri": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match="log_mlflow"):
        run_dnr(config_dict={**keys, **both})
    assert [run.code for run in wandb.begun] == [1] and wandb.run is None


def test_losses_of_several_terms(keys, mlflow, tmp_path):
    """Some of RecBole's models return a tuple."""
    with Trackers(Config(config_dict={**keys, "log_mlflow": True})) as trackers:
        trackers.log_metrics({"train_loss": (1.0, 0.5), "train_step": 4})
    client, found = runs(mlflow, store(tmp_path))
    (metric,) = client.get_metric_history(found[0][1].info.run_id, "train/train_loss")
    assert (metric.value, metric.step) == (1.5, 4)


def test_a_run_that_could_not_be_begun_wholly_is_ended(keys, wandb, mlflow, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "define_metric", raising(wandb.Error("no such thing")))
    with pytest.raises(ConfigError, match="^log_wandb=True: no such thing$"):
        with Trackers(Config(config_dict={**keys, "log_wandb": True})):
            raise AssertionError("it has begun")
    assert [run.code for run in wandb.begun] == [1] and wandb.run is None
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", raising(mlflow.exceptions.MlflowException("too long")))
    with pytest.raises(ConfigError, match="^log_mlflow=True: too long$"):
        with Trackers(Config(config_dict={**keys, "log_mlflow": True})):
            raise AssertionError("it has begun")
    assert [run.info.status for _, run in runs(mlflow, store(tmp_path))[1]] == ["FAILED"]
