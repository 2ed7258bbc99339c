"""Training of the bundled models: PyTorch, the extra `train`; never needed at run time."""
