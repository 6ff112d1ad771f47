"""Does it help? Held-out loss, exact match, and the quality ladder."""
