"""LambdaMART: boosted trees on the shared inputs, what a user would pick instead of a neural reranker."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Iterator, List

import numpy as np
import torch
from torch import Tensor

from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.errors import CheckpointError, ConfigError
from dnr_recbole.lists import first_score, score_ranks
from dnr_recbole.model.abstract_reranker import AbstractReranker
from dnr_recbole.model.context import Context
from dnr_recbole.model.inputs.affinity import make_affinity, standardise
from dnr_recbole.model.inputs.score_fusion import ScoreFusion, parts_of
from dnr_recbole.registry import register_reranker

_SHOWN = 10  # columns whose gain is logged


@register_reranker
class LambdaMART(AbstractReranker):
    """Gradient-boosted trees with LambdaRank's objective (Burges, 2010), fitted by LightGBM.

    Its columns are the inputs that all rerankers share, as numbers: similarities of candidate and history
    (:mod:`dnr_recbole.model.inputs.affinity`), popularity, item and user features, the length of the history, and the
    retriever's score as ``score_fusion`` says. Ids and the retriever's vectors are no columns: trees make little of
    them, and the similarities say what the vectors know. ``gbdt_columns: similarities`` leaves similarities as they
    are, popularity and score; ``all`` has each of them standardised within the request as well.

    The trees are fitted at once, with early stopping by NDCG@K on validation requests, and the same requests and
    threads give the same trees. Under ``score_fusion: residual`` they start from a · log-odds(x), a fitted to the
    training requests and kept. A checkpoint holds LightGBM's text model as bytes.

    Raises:
        ConfigError: ``history_interaction`` is ``attention`` or ``both``, which need gradients, or no column is left.
    """

    family = "boosted trees"
    paper = "Burges, Microsoft Research 2010: From RankNet to LambdaRank to LambdaMART: An Overview"
    supports_noise = False
    noise_refusal = "its trees are fitted at once, to the scores as they are, and give no gradient to synthetic ones"
    export_refusal = "its trees are LightGBM's, and the artefact's model.trees.txt is a file that LightGBM reads itself"
    interactions = ("none", "affinity")
    embeds = ()  # trees read columns
    fits_itself = True
    text_parts = ("trees",)
    needs = ("lightgbm", "dnr_recbole[gbdt]")

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        by_history = config["history_interaction"] == "affinity"
        self.affinity = make_affinity(config, catalogue, self.independent) if by_history else None
        self.n_features = catalogue.n_features
        self.position_input, self.reads_position = None, config["position_input"] != "none"
        parts = parts_of(config["score_fusion"])
        self.fusion = ScoreFusion("residual" if "residual" in parts else "none", self.dim, n_scores=catalogue.n_scores)
        if self.fusion.slope is not None:
            self.fusion.slope.requires_grad_(False)
        self.n_scores = 1 if parts == () else catalogue.n_scores
        by_value = {"concat", "add", "weight"} & set(parts)
        self.score_columns = (*(["score.rank"] if "rank" in parts else []), *(["score"] if by_value else []))
        self.everything: bool = config["gbdt_columns"] == "all"
        features = self.everything and config["use_features"]
        sides = {
            "popularity": catalogue.item_popularity.unsqueeze(1) if config["use_popularity"] else None,
            "item_features": catalogue.item_features if features and catalogue.item_features.shape[1] else None,
            "user_features": catalogue.user_features if features and catalogue.user_features.shape[1] else None,
        }
        for name, table in sides.items():
            self.register_buffer(name, None if table is None else table.float().clone())
        self.register_buffer("trees", torch.zeros(0, dtype=torch.uint8))
        self._booster: Any = None
        self.fit_requests: int = config["fit_requests"]
        self.position_bias: bool = config["gbdt_position_bias"]
        self.settings = {
            "objective": "lambdarank", "metric": "ndcg", "eval_at": [self.slate_size], "verbosity": -1,
            "deterministic": True, "force_row_wise": True, "bagging_freq": 1, "seed": config["seed"] or 0,
            "learning_rate": config["tree_learning_rate"],
            **{key: config[key] for key in
               ("num_leaves", "min_data_in_leaf", "lambda_l2", "feature_fraction", "bagging_fraction")},
        }  # fmt: skip
        self.n_trees: int = config["n_trees"]
        self.patience: int = config["early_stopping_trees"]
        if not self.columns:
            raise ConfigError("LambdaMART has no column: set history_interaction, score_fusion or use_popularity")

    # ------------------------------------------------------------------ columns

    @property
    def columns(self) -> List[str]:
        """Names of the trees' columns, in order."""
        names = self._fixed_columns()
        if self.everything:
            if self.popularity is not None:
                names.append("popularity.standardised")
            if "score" in self.score_columns:
                names.append("score.standardised")
        further = [f"score{number}" for number in range(2, self.n_scores + 1)]
        return [*names, *self.score_columns, *further, *(["position"] if self.reads_position else [])]

    def _fixed_columns(self) -> List[str]:
        affinity = self.affinity
        names = [] if affinity is None else affinity.columns if self.everything else affinity.columns[: self._raw]
        names = [*names, *(["popularity"] if self.popularity is not None else [])]
        if self.everything:
            for name, table in (("item_feature", self.item_features), ("user_feature", self.user_features)):
                names += [] if table is None else [f"{name}.{number}" for number in range(table.shape[1])]
            names.append("history_length")
            names += [f"log_feature.{number}" for number in range(self.n_features)]
        return names

    @property
    def _raw(self) -> int:
        """How many of the similarities are not standardised; they come first."""
        return sum(not name.endswith(".standardised") for name in self.affinity.columns)

    def encode(self, slate: UnscoredSlate) -> Context:
        """The columns that do not depend on scores, as ``candidates`` ``[B, n, C]``."""
        parts: List[Tensor] = []
        if self.affinity is not None:
            similarities = self.affinity(slate)
            parts.append(similarities if self.everything else similarities[..., : self._raw])
        if self.popularity is not None:
            parts.append(self.popularity[slate.candidates])
        if self.everything:
            n = slate.mask.shape[1]
            if self.item_features is not None:
                parts.append(self.item_features[slate.candidates])
            if self.user_features is not None:
                parts.append(self.user_features[slate.users].unsqueeze(1).expand(-1, n, -1))
            parts.append(slate.history_mask.sum(1).float().view(-1, 1, 1).expand(-1, n, -1))
            if self.n_features:
                parts.append(slate.features)
        empty = torch.zeros(*slate.mask.shape, 0, device=slate.device)
        columns = torch.cat([part.float() for part in [empty, *parts]], dim=-1)
        return Context(columns, columns.new_zeros(len(slate), 0, 0), columns.new_zeros(len(slate), 0))

    def matrix(self, context: Context, slate: UnscoredSlate, x: Tensor, learning: bool = False) -> np.ndarray:
        """All columns of the valid candidates, request by request: float32 ``[valid, len(columns)]``.

        Of several scores, the first is used as a single one is, the others by their values (missing: −1). With
        ``position_input``, the last column is where a candidate was shown when ``learning``, and 0 otherwise.
        """
        further = x[..., 1 : self.n_scores] if x.dim() == 3 else x.unsqueeze(-1)[..., :0]
        x = first_score(x)
        parts = [context.candidates]
        if self.everything:
            if self.popularity is not None:
                parts.append(standardise(self.popularity[slate.candidates], slate.mask))
            if "score" in self.score_columns:
                parts.append(standardise(x.unsqueeze(-1), slate.mask))
        if "score.rank" in self.score_columns:
            parts.append(score_ranks(x, slate.mask).unsqueeze(-1).float())
        if "score" in self.score_columns:
            parts.append(x.unsqueeze(-1))
        parts.append(further)
        if self.reads_position:
            place = slate.position if learning and slate.position is not None else torch.zeros_like(slate.candidates)
            parts.append(place.unsqueeze(-1))
        return torch.cat([part.float() for part in parts], dim=-1)[slate.mask].detach().cpu().numpy()

    # ------------------------------------------------------------------ trees

    def fit(self, train: Iterable[Slate], valid: Iterable[Slate]) -> None:
        import lightgbm

        table = self._table(evenly(train, self.fit_requests))
        data = lightgbm.Dataset(**table, feature_name=self.columns)
        check = data.create_valid(**{name: values for name, values in self._table(valid).items() if name != "position"})
        booster = lightgbm.train(
            {**self.settings, "num_threads": torch.get_num_threads()}, data, self.n_trees, valid_sets=[check],
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False)],
        )  # fmt: skip
        text = booster.model_to_string(num_iteration=booster.best_iteration)
        self.trees = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.trees.device)
        self._booster = None
        gain = booster.feature_importance("gain", iteration=booster.best_iteration)
        share = gain / max(gain.sum(), 1e-12)
        best = ", ".join(f"{self.columns[i]} {share[i]:.1%}" for i in np.argsort(-gain, kind="stable")[:_SHOWN])
        self.logger.info(f"LambdaMART: {booster.best_iteration} trees on {len(self.columns)} columns; gain: {best}")

    @torch.no_grad()
    def _table(self, slates: Iterable[Slate]) -> Dict[str, np.ndarray]:
        """What LightGBM calls its dataset's parts: columns, labels, candidates per request and, where there are such,
        weights, positions, and what the trees start from."""
        parts: Dict[str, List[np.ndarray]] = {}
        for slate in slates:
            slate = slate.to(self.trees.device)
            real = slate.mask
            found = {
                "data": self.matrix(self.encode(slate), slate, slate.scores, learning=True),
                "label": slate.labels[real],
                "group": real.sum(1),
                "weight": None if slate.label_weights is None else slate.label_weights[real],
                "position": slate.position[real] if self.position_bias else None,
            }
            residual = self.fusion.residual(slate.scores)
            found["init_score"] = None if residual is None else residual[real].double()
            for name, values in found.items():
                if values is not None:
                    values = values.cpu().numpy() if isinstance(values, Tensor) else values
                    parts.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    def score(self, context: Context, slate: UnscoredSlate, x: Tensor) -> Tensor:
        logits = x.new_zeros(slate.mask.shape, dtype=torch.float32)
        if len(self.trees):
            values = self._load().predict(self.matrix(context, slate, x), raw_score=True)
            logits[slate.mask] = torch.from_numpy(values).to(logits)
        return logits

    def _load(self):
        if self._booster is None:
            import lightgbm

            try:
                self._booster = lightgbm.Booster(model_str=bytes(self.trees.cpu().numpy()).decode())
            except Exception as error:  # whatever LightGBM makes of a text that is none of its models
                raise CheckpointError(f"LambdaMART: the text of its trees cannot be read: {error}") from None
        return self._booster

    def training_steps(self, slate: Slate):
        """None: :meth:`fit` does it all."""
        return iter(())

    def _upgrade(self, state_dict, prefix):
        old = f"{prefix}interaction.affinity."  # until 0.1
        for name in [name for name in state_dict if name.startswith(old)]:
            state_dict[f"{prefix}affinity.{name[len(old) :]}"] = state_dict.pop(name)
        super()._upgrade(state_dict, prefix)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(f"{prefix}trees")
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8 and stored.dim() == 1:  # of any length
            self.trees, self._booster = torch.empty_like(stored, device=self.trees.device), None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "_booster": None}


def evenly(slates: Iterable[Slate], most: int) -> Iterator[Slate]:
    """The requests of ``slates``; of more than ``most``, evenly spaced ones."""
    step, place = -(-sum(map(len, slates)) // most), 0
    for slate in slates:
        yield slate if step == 1 else slate.select(torch.arange(len(slate), device=slate.device)[-place % step :: step])
        place += len(slate)
