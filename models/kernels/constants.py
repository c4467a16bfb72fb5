"""Constants that a kernel and its PyTorch twin share. This module imports nothing, so that both can import it."""

NEGATIVE_SLOPE = 0.01  # of the leaky ReLU, PyTorch's default
S_MAX = 8.0  # the log-scale of a coupling layer is clamped to [-S_MAX, S_MAX] (OmniMotion's released code)
