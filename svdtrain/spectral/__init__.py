"""Pure functions on tensors: decompositions and what they mean. Imports torch only."""
