"""Pure functions on tensors: decompositions and what they mean. Imports torch only.

Import from the modules (`from svdtrain.spectral.decompose import decompose`); nothing is re-exported here.
"""
