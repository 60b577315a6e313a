"""A trained reranker as a directory: all that ranking needs, tensors and texts only, no pickle.

================================  ==========================================================================
``config.json``                   the model's name, every key, the shapes of its tables, versions, checksums
``model.safetensors``             weights, item spaces, popularity and features of known ids
``model.<part>.txt``              what a model keeps as text: LightGBM's trees
``preprocessor.json``             scores and their calibration, encoders of features, list and history lengths
``vocabulary.parquet``            ids of users and items
``histories.safetensors``         the newest items of each known user (can be left out: personal data)
``sample.parquet``                some held-out requests in the canonical form (can be left out: personal data)
``retrieved.safetensors``         what the retriever gives each user now (where there is a retriever)
``metrics.json``                  test metrics, probes, baselines, command, commit, versions, seed
``README.md``                     a model card made from these
================================  ==========================================================================
"""

from dnr_recbole.artefact.card import model_card
from dnr_recbole.artefact.contents import FORMAT, Artefact, Content, artefact_of_run
from dnr_recbole.artefact.reading import artefact_digest, artefact_folder, load_artefact
from dnr_recbole.artefact.writing import save_artefact, weights_digest

__all__ = [
    "FORMAT",
    "Artefact",
    "Content",
    "artefact_digest",
    "artefact_folder",
    "artefact_of_run",
    "load_artefact",
    "model_card",
    "save_artefact",
    "weights_digest",
]
