"""Ranking over HTTP: an artefact behind FastAPI (extra ``serve``); ``dnr-recbole serve``.

Data flow: a body is checked (:mod:`schema`), waits in a bounded queue (:mod:`batching`), is scored with others by one
thread (:mod:`scoring`), and is answered by exactly one version of one model (:mod:`models`).
"""
