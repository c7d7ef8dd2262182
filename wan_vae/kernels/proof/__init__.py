"""The proof of a kernel on this device, and the verdicts that are kept."""
