"""Constants shared by the kernels and their PyTorch versions. Without imports, so that every module can import it."""

NEGATIVE_SLOPE = 0.01  # slope of the LeakyReLU for negative inputs, no unit (PyTorch's default)
S_MAX = 8.0  # bound of a coupling layer's log-scale s, natural log: s is in [-S_MAX, S_MAX] (OmniMotion's code)
