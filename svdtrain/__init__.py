"""svdtrain: watch the spectra of a GPT while it trains, switch matrices to low-rank training and back."""

__version__ = "0.1.0"
