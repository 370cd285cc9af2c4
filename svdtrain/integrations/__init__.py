"""`attach` for trainers that own their loop: transformers and Lightning. Each needs its library installed."""
