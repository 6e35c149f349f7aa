"""What only an accelerator can tell: whether the step is right there, and what it costs there."""
