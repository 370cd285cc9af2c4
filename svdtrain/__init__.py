"""svdtrain: watch every weight matrix's spectrum while a GPT trains, and switch matrices to low-rank training and back."""

__version__ = "0.1.0"
