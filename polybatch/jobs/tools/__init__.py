"""Tool calls: what a body says of tools, how a family of models writes calls, and how they are read back."""
