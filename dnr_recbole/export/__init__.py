"""A trained reranker as one ONNX file, and scoring with such a file; docs/export.md."""
