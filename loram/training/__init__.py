"""The local training loop and the LoRA it trains."""
