"""Records, tokenizers, packing, loading, analysis, sampling, deduplication and decontamination."""
