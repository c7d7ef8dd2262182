"""The eager reference of each operation: plain PyTorch, right on every device."""
