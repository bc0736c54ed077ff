"""The adapters' kernels as they were, for `lora_compare` to time beside the new ones."""
