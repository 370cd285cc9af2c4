"""From text to token batches: corpus, tokenizer, stream."""
