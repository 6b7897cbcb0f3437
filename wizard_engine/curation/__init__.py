"""Choice of training rows: attributes, analysis, weighted sampling, deduplication and decontamination."""
