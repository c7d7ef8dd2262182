"""The command line. `cli`, `parser`, `requests`, `console` and `signals` do not import PyTorch."""
