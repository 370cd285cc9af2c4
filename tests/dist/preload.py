"""What every process of a test needs, imported once by the server that they are forked from."""

import torch._dynamo  # noqa: F401 - torch.optim imports it with the first optimizer: four seconds

import svdtrain.build
import svdtrain.cli  # noqa: F401
