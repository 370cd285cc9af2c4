"""What plugs into the trainer: adaptive SVD, evaluation, samples, guards, sinks."""
