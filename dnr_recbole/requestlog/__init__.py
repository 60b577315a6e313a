"""Request logs: requests, candidates, scores and clicks of one's own, read, checked and made into tensors.

Data flow: files or a DataFrame → :mod:`reading` (batches of whole requests) → :mod:`checks` (every problem with its
place) → :mod:`preprocessor` (ids, features, scores → numbers) → :mod:`building` (memory-mapped tensors, made by
:mod:`maker`).
"""
