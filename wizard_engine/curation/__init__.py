"""Which rows are trained on: attributes, analysis, weighted sampling, deduplication and decontamination."""
