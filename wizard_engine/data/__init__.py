"""Records and their formats, tokenizers, chat formats, samples, batches, packing, loading."""
