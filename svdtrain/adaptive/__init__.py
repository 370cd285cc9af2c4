"""The method: factored weights, the decision, the optimizer adapters, the controller. Imports spectral only."""
